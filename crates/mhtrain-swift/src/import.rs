//! Which job does a shell block describe that calls `swift sft`?
//!
//! [`import`] reads what people have: the recipe's blocks and their relatives, with exports, prefixes, quotes,
//! continuations, comments, launchers and redirections. Nothing in the text is executed. Secrets are taken out:
//! the job names the variable that carries one, and no value of a secret reaches the job or a warning.
//!
//! # What is pinned
//!
//! With `pin` everything that the block sets is pinned, and what ms-swift would choose by itself is pinned to
//! ms-swift's own default where that is a number (recorded as a warning), so that the training stays the same.
//!
//! Without it the **sizing knobs** are left to the engine: micro-batch, accumulation, packing, attention,
//! gradient checkpointing, `max_length` up to the recipe's 3072, and bfloat16. So are values that equal the
//! recipe's standard, and a whole emergency profile. Everything else is the user's **intent** and is kept:
//! longer rows, another precision, the amount of training, another learning rate, LoRA's shape, data options.
//! An effective batch above the recipe's is kept as `min_effective_batch`.

mod arithmetic;
mod block;
mod job;
mod shell;

use mhtrain_job::spec::SpecError;
use serde_json::Value;

/// A job read from a shell block.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    /// The job, version 1 of job.json; it has been read back by the job's own reader.
    pub job: Value,
    /// A sentence for each thing that was moved, changed or left out, and why.
    pub warnings: Vec<String>,
}

/// Why a text gives no job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// There is no call of `swift sft`.
    #[error("there is no `swift sft` in this text{}", hint.map(|hint| format!(" outside of {hint}")).unwrap_or_default())]
    NoCommand {
        /// Where there is one that would not be run.
        hint: Option<&'static str>,
    },
    /// Another command of ms-swift is called.
    #[error("line {line} calls `{command}`; only `swift sft` can be imported")]
    OtherCommand {
        /// The command.
        command: String,
        /// Its line.
        line: usize,
    },
    /// There is more than one call.
    #[error("this text calls `swift sft` {} times (lines {})", lines.len(), list(lines))]
    Several {
        /// Where they begin.
        lines: Vec<usize>,
    },
    /// A call was asked for that is not there.
    #[error("call {asked} of `swift sft` was asked for, there are {count}")]
    NoSuchCommand {
        /// The wished call, counted from 1.
        asked: usize,
        /// Calls in the text.
        count: usize,
    },
    /// Characters of another width or typography stand where ASCII must.
    #[error("line {line} has `{found}`, which looks like ASCII and is not")]
    NotAscii {
        /// The word, cut short.
        found: String,
        /// Its line.
        line: usize,
    },
    /// A quote or bracket is open at the end.
    #[error("a quote or bracket that is opened on line {line} is never closed")]
    Unterminated {
        /// Where it is opened.
        line: usize,
    },
    /// The parameters are in a file.
    #[error("line {line} reads its parameters from the file `{file}`")]
    ConfigFile {
        /// The file.
        file: String,
        /// Line of the call.
        line: usize,
    },
    /// A parameter without which there is no job.
    #[error("the call on line {line} has no `--{flag}`")]
    MissingFlag {
        /// The parameter.
        flag: &'static str,
        /// Line of the call.
        line: usize,
    },
    /// The value of a parameter that the job needs cannot be known.
    #[error("the value of `--{flag}` on line {line} cannot be known: it uses {what}")]
    Unresolved {
        /// The parameter.
        flag: &'static str,
        /// Line of the call.
        line: usize,
        /// What it depends on.
        what: String,
    },
    /// A way of training that is not sized.
    #[error("`{value}` is no train type of a job")]
    TrainType {
        /// As written.
        value: String,
    },
    /// Training is spread over machines.
    #[error("the call on line {line} trains on {nodes} machines")]
    SeveralMachines {
        /// Line of the call.
        line: usize,
        /// How many.
        nodes: String,
    },
    /// The block's values make no job.
    #[error("the block sets something that no job can have: {0}")]
    Job(#[source] SpecError),
}

impl ImportError {
    /// Returns what the author of the block can do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            ImportError::NoCommand { hint: Some(hint) } => {
                format!("put the command itself into the text, not into {hint}")
            }
            ImportError::NoCommand { hint: None } => {
                "the text must hold a call like `swift sft --model … --dataset …`".into()
            }
            ImportError::OtherCommand { .. } => "rewrite it as a call of `swift sft`".into(),
            ImportError::Several { .. } => {
                "keep one of them in the text, and import the others one by one".into()
            }
            ImportError::NoSuchCommand { count, .. } => format!("choose a call from 1 to {count}"),
            ImportError::NotAscii { .. } => {
                "write ASCII letters, hyphens, quotes and blanks; text editors and chat programs replace them"
                    .into()
            }
            ImportError::Unterminated { .. } => "close it".into(),
            ImportError::ConfigFile { .. } => {
                "write the parameters of the file on the command line: `--name value`".into()
            }
            ImportError::MissingFlag { flag, .. } => format!("add `--{flag} …` to the call"),
            ImportError::Unresolved { .. } => "write the value itself".into(),
            ImportError::TrainType { .. } => "known are lora, qlora and full".into(),
            ImportError::SeveralMachines { .. } => {
                "a job runs on one machine: import the call without NNODES".into()
            }
            ImportError::Job(error) => return error.help(),
        })
    }
}

/// Returns the job that the only call of `swift sft` in a text describes.
///
/// # Errors
/// A text without exactly one call, or a call that no job can stand for.
pub fn import(text: &str, pin: bool) -> Result<Imported, ImportError> {
    import_call(text, None, pin)
}

/// Returns the job that the `nth` call of `swift sft` in a text describes, counted from 1.
///
/// # Errors
/// As for [`import`], and a number that no call has.
pub fn import_nth(text: &str, nth: usize, pin: bool) -> Result<Imported, ImportError> {
    import_call(text, Some(nth), pin)
}

fn import_call(text: &str, nth: Option<usize>, pin: bool) -> Result<Imported, ImportError> {
    let mut warnings = Vec::new();
    let call = block::find_call(text, nth, &mut warnings)?;
    let job = job::describe(&call, pin, &mut warnings)?;
    Ok(Imported { job, warnings })
}

fn list(lines: &[usize]) -> String {
    lines.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
