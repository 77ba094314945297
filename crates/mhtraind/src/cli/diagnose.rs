//! `mhtraind diagnose`: why did this trainer die?

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use mhtrain_job::diagnosis::{Answer, Diagnosis};
use mhtrain_swift::diagnosis::{Diagnoser, ExitFacts};

use super::output;
use crate::failure::{Failure, Status, unreadable};

/// Say why a trainer died, from its log
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind diagnose train.log
  mhtraind diagnose train.log --exit-code 137 --json
  journalctl -u my-training | mhtraind diagnose -

Any size, any trainer output; the exit code helps where the text is silent. A negative one is a signal.")]
pub struct DiagnoseArgs {
    /// The log; `-` reads standard input
    log: PathBuf,
    /// The diagnosis as JSON
    #[arg(long)]
    pub json: bool,
    /// Exit status of the trainer or its launcher; -9 means killed by signal 9
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    exit_code: Option<i32>,
}

/// Runs the command.
pub fn run(args: &DiagnoseArgs) -> Result<Status, Failure> {
    let mut log = output::open_lines(&args.log)?;
    let mut diagnoser = Diagnoser::new();
    let mut piece = vec![0; 1 << 16];
    let mut is_empty = true;
    loop {
        match log.read(&mut piece).map_err(|e| unreadable(&args.log, &e))? {
            0 => break,
            n => {
                is_empty &= piece[..n].trim_ascii().is_empty();
                diagnoser.push_bytes(&piece[..n]);
            }
        }
    }
    // The exit code alone may say why; and a script is told that it is not known.
    if is_empty && args.exit_code.is_none() && !args.json {
        let log = if args.log.as_os_str() == "-" {
            "standard input".into()
        } else {
            args.log.display().to_string()
        };
        let help =
            "is it the trainer's log? Where there is no other, say how the trainer ended: `--exit-code N`";
        return Err(Failure::bad_input("empty_log", format!("{log} is empty: there is nothing to diagnose"))
            .help(help.to_owned()));
    }
    let exit = match args.exit_code {
        Some(code) if code < 0 => ExitFacts { signal: Some(code.saturating_neg()), ..ExitFacts::default() },
        code => ExitFacts { code, ..ExitFacts::default() },
    };
    let diagnosis = diagnoser.finish(exit);
    if args.json {
        output::json(&diagnosis)?;
    } else {
        output::line(for_people(&diagnosis))?;
    }
    Ok(Status::Done)
}

/// Returns a diagnosis as a few lines for people.
pub fn for_people(diagnosis: &Diagnosis) -> String {
    let mut lines = vec![format!(
        "{} ({}{})",
        diagnosis.kind,
        if diagnosis.fatal { "ended the run" } else { "the run went on" },
        if diagnosis.certain { "" } else { ", not certain" },
    )];
    if !diagnosis.evidence.line.is_empty() {
        lines.push(format!("line:   {}", diagnosis.evidence.line.trim()));
    }
    let amounts = [
        ("asked for", diagnosis.evidence.tried_bytes),
        ("card", diagnosis.evidence.total_bytes),
        ("free", diagnosis.evidence.free_bytes),
        ("this process", diagnosis.evidence.this_process_bytes),
        ("others", diagnosis.evidence.others_bytes),
    ];
    let known: Vec<String> =
        amounts.iter().filter_map(|(what, bytes)| Some(format!("{what} {}", (*bytes)?))).collect();
    if !known.is_empty() {
        lines.push(format!("memory: {}", known.join(", ")));
    }
    lines.push(format!("answer: {}", in_words(diagnosis.answer)));
    lines.join("\n")
}

/// Returns an answer as words, from its name in the JSON interface.
fn in_words(answer: Answer) -> String {
    match serde_json::to_value(answer) {
        Ok(serde_json::Value::String(name)) => name.replace('_', " "),
        _ => String::new(),
    }
}
