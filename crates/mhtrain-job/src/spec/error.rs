//! What can be wrong with a job file, and what helps?

/// Why a job file is refused. No variant ever holds the value of an environment variable or of a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The file is longer than any job file.
    #[error("the job file has {bytes} bytes, the limit is {limit} bytes")]
    TooLarge {
        /// Length of the file.
        bytes: usize,
        /// Longest file that is read.
        limit: usize,
    },
    /// The file is not text.
    #[error("the job file is not UTF-8: the byte at offset {offset} is wrong")]
    NotUtf8 {
        /// Offset of the first wrong byte.
        offset: usize,
    },
    /// The file is not JSON.
    #[error("the job file is not JSON: {message} at line {line}, column {column}")]
    NotJson {
        /// What the reader met.
        message: String,
        /// Line, counted from 1.
        line: usize,
        /// Column, counted from 1.
        column: usize,
    },
    /// One object has a key twice.
    #[error("the job file has the key `{key}` twice, the second time at line {line}, column {column}")]
    KeyTwice {
        /// The key.
        key: String,
        /// Line, counted from 1.
        line: usize,
        /// Column, counted from 1.
        column: usize,
    },
    /// The file is JSON, but no object.
    #[error("the job file must hold one JSON object, not {found}")]
    NotAnObject {
        /// What it holds.
        found: String,
    },
    /// A key without which there is no job.
    #[error("`{key}` is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A key that means nothing.
    #[error("unknown key `{key}`")]
    UnknownKey {
        /// The key with its path.
        key: String,
        /// The known key that is most like it.
        nearest: Option<String>,
    },
    /// A value of another type than the key takes.
    #[error("`{key}` must be {expected}, not {found}")]
    WrongType {
        /// The key with its path.
        key: String,
        /// What it takes.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// A value of the right type that is outside of its range.
    #[error("`{key}` must be {expected}, not {found}")]
    OutOfRange {
        /// The key with its path.
        key: String,
        /// What it takes.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// A word that is not one of those the key takes.
    #[error("`{key}` cannot be {found}")]
    UnknownValue {
        /// The key with its path.
        key: String,
        /// What it was given.
        found: String,
        /// The words it takes.
        known: Vec<String>,
        /// The one that is most like it.
        nearest: Option<String>,
    },
    /// Text with a character that no path, name or argument can carry.
    #[error("`{key}` holds {what}")]
    ForbiddenCharacter {
        /// The key with its path.
        key: String,
        /// The character, in words.
        what: &'static str,
    },
    /// A slice of a card.
    #[error("`device` names a MIG slice, and MIG slices are not supported yet")]
    MigDevice,
    /// A wish that this version does not fulfil.
    #[error("{what} is not supported in this version")]
    NotSupported {
        /// The wish.
        what: &'static str,
        /// What can be done instead.
        instead: &'static str,
    },
    /// A run in the foreground of a job that waits for others.
    #[error("`after` names jobs to wait for, and a run in the foreground does not wait")]
    WaitsForOthers,
    /// An argument that says again what a key of the job says.
    #[error("`args.{arg}` says what the key `{field}` says")]
    ArgRepeatsField {
        /// The argument.
        arg: String,
        /// The key of the job.
        field: &'static str,
    },
    /// Two spellings of one argument.
    #[error("`args.{arg}` is given twice (`-` and `_` mean the same)")]
    ArgTwice {
        /// The argument.
        arg: String,
    },
    /// An abbreviation: ms-swift would accept it, and it would pass by the pins.
    #[error("`args.{arg}` is an abbreviation of `{full}`")]
    AbbreviatedArg {
        /// The argument.
        arg: String,
        /// Its full name.
        full: &'static str,
    },
    /// An argument that only the supervisor may set.
    #[error("`args.{arg}` cannot be set by a job: {why}")]
    ForbiddenArg {
        /// The argument.
        arg: String,
        /// Why.
        why: &'static str,
    },
    /// An environment variable that only the supervisor may set.
    #[error("`env.{name}` cannot be set by a job: {why}")]
    ForbiddenEnv {
        /// The variable.
        name: String,
        /// Why.
        why: &'static str,
    },
    /// Micro-batch and accumulation are both pinned, and their product is too small.
    #[error(
        "the pinned effective batch is {product} ({micro_batch} x {accumulation} x {devices} device(s)), the smallest allowed is {minimum}"
    )]
    PinsBelowMinimum {
        /// `per_device_train_batch_size`.
        micro_batch: u32,
        /// `gradient_accumulation_steps`.
        accumulation: u32,
        /// `devices`.
        devices: u32,
        /// Their product.
        product: u64,
        /// `min_effective_batch`.
        minimum: u32,
    },
    /// A secret is written into the job file.
    #[error("`{key}` looks like a secret in clear")]
    SecretInClear {
        /// The key with its path; never the value.
        key: String,
        /// The environment variable that can carry it instead.
        variable: String,
    },
    /// A shell variable where no shell will expand it.
    #[error("`{key}` is the shell variable {reference}, and a job file is not expanded")]
    NotExpanded {
        /// The key with its path.
        key: String,
        /// The reference, for example `$PROJECT`.
        reference: String,
    },
    /// A name that no environment variable can have.
    #[error("`{key}` is no name of an environment variable: {found}")]
    BadVariableName {
        /// The key with its path.
        key: String,
        /// What it was given.
        found: String,
    },
}

impl SpecError {
    /// Returns the error's name in the JSON interface. The names do not change.
    pub fn code(&self) -> &'static str {
        match self {
            SpecError::TooLarge { .. } => "job_too_large",
            SpecError::NotUtf8 { .. } => "job_not_utf8",
            SpecError::NotJson { .. } => "job_not_json",
            SpecError::KeyTwice { .. } => "key_twice",
            SpecError::NotAnObject { .. } => "job_not_an_object",
            SpecError::Missing { .. } => "missing_key",
            SpecError::UnknownKey { .. } => "unknown_key",
            SpecError::WrongType { .. } => "wrong_type",
            SpecError::OutOfRange { .. } => "out_of_range",
            SpecError::UnknownValue { .. } => "unknown_value",
            SpecError::ForbiddenCharacter { .. } => "forbidden_character",
            SpecError::MigDevice | SpecError::NotSupported { .. } | SpecError::WaitsForOthers => {
                "not_supported"
            }
            SpecError::ArgRepeatsField { .. } => "arg_repeats_key",
            SpecError::ArgTwice { .. } => "arg_twice",
            SpecError::AbbreviatedArg { .. } => "arg_abbreviated",
            SpecError::ForbiddenArg { .. } => "arg_forbidden",
            SpecError::ForbiddenEnv { .. } => "env_forbidden",
            SpecError::PinsBelowMinimum { .. } => "pins_below_minimum",
            SpecError::SecretInClear { .. } => "secret_in_clear",
            SpecError::NotExpanded { .. } => "not_expanded",
            SpecError::BadVariableName { .. } => "bad_variable_name",
        }
    }

    /// Returns what the author of the job file can do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            SpecError::TooLarge { .. } => {
                "check that this is the job file; data belongs into `dataset`".to_owned()
            }
            SpecError::NotUtf8 { .. } => "save the file as UTF-8".to_owned(),
            SpecError::KeyTwice { key, .. } => format!("keep one of the two `{key}`"),
            SpecError::NotJson { .. } | SpecError::NotAnObject { .. } => {
                "the smallest job is {\"model\": \"…\", \"dataset\": \"…\"}; `mhtraind schema` prints all keys"
                    .to_owned()
            }
            SpecError::Missing { key } => format!("add \"{key}\": \"…\""),
            SpecError::UnknownKey { nearest: Some(nearest), .. } => format!("did you mean `{nearest}`?"),
            SpecError::UnknownKey { nearest: None, .. } => {
                "a parameter of `swift sft` belongs into `args`; `mhtraind schema` prints all keys".to_owned()
            }
            SpecError::UnknownValue { nearest, known, .. } => unknown_value_help(nearest.as_deref(), known),
            SpecError::MigDevice => {
                "name a whole card by its index or GPU-… uuid, or leave `device` out".to_owned()
            }
            SpecError::NotSupported { instead, .. } => (*instead).to_owned(),
            SpecError::WaitsForOthers => "hand it in with `mhtraind submit`, whose jobs do wait, or leave `after` out and start it when the others are done".to_owned(),
            SpecError::ArgRepeatsField { arg, field } => {
                format!("set `{field}` at the top level of the job and remove `args.{arg}`")
            }
            SpecError::ArgTwice { .. } => "keep one of them".to_owned(),
            SpecError::AbbreviatedArg { full, .. } => format!("write `{full}`"),
            SpecError::ForbiddenArg { arg, .. } => format!("remove `args.{arg}`"),
            SpecError::ForbiddenEnv { name, .. } => format!("remove `env.{name}`"),
            SpecError::PinsBelowMinimum { .. } => {
                "raise one of the two, pin only one of them, or lower `min_effective_batch`".to_owned()
            }
            SpecError::SecretInClear { variable, .. } => format!(
                "remove it, add \"secrets\": [\"{variable}\"], and put the value into systemd credentials or \
                 your env file of mode 0600"
            ),
            SpecError::NotExpanded { .. } => {
                "write the value itself; for a secret write the variable's name into `secrets`".to_owned()
            }
            SpecError::BadVariableName { .. } => {
                "use letters, digits and `_`, and no digit first, for example SWANLAB_API_KEY".to_owned()
            }
            SpecError::WrongType { .. }
            | SpecError::OutOfRange { .. }
            | SpecError::ForbiddenCharacter { .. } => return None,
        })
    }
}

fn unknown_value_help(nearest: Option<&str>, known: &[String]) -> String {
    let all = known.join(", ");
    match nearest {
        Some(nearest) => format!("did you mean \"{nearest}\"? known are: {all}"),
        None => format!("known are: {all}"),
    }
}
