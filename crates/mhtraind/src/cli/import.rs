//! `mhtraind import`: a shell block becomes a job file.

use std::path::PathBuf;

use clap::Args;
use mhtrain_swift::import::{ImportError, import, import_nth};

use super::output;
use crate::failure::{Failure, Status};

/// Turn a shell block that calls `swift sft` into a job.json
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind import train.sh > job.json          # batch, length, packing and attention are left to the engine
  mhtraind import train.sh --pin > job.json    # everything stays exactly as the block has it
  xclip -o | mhtraind import -
  mhtraind import all.sh --call 2 > job.json   # the second of several calls of `swift sft`

Secrets are never copied: the job names them, and standard error says where their values go.")]
pub struct ImportArgs {
    /// The shell block; `-` reads standard input
    file: PathBuf,
    /// Pin everything that the block sets
    #[arg(long)]
    pin: bool,
    /// Which call of `swift sft` to take where the text has several, counted from 1
    #[arg(long, value_name = "N")]
    call: Option<usize>,
    /// Errors as JSON; the job is JSON in any case
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &ImportArgs) -> Result<Status, Failure> {
    let text = output::read_text(&args.file)?;
    let imported = match args.call {
        Some(nth) => import_nth(&text, nth, args.pin),
        None => import(&text, args.pin),
    };
    let imported = imported.map_err(|e| {
        let help = match &e {
            ImportError::Several { lines } => {
                Some(format!("choose one of them with --call N, from 1 to {}", lines.len()))
            }
            other => other.help(),
        };
        Failure::bad_input("bad_block", format!("{}: {e}", args.file.display())).help(help)
    })?;
    for warning in &imported.warnings {
        output::note(format!("note: {warning}"));
    }
    let job =
        serde_json::to_string_pretty(&imported.job).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
    output::line(job)?;
    Ok(Status::Done)
}
