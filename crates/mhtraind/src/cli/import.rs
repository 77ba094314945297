//! `mhtraind import`: a shell block becomes a job file.

use std::path::PathBuf;

use clap::Args;
use mhtrain_swift::import::import;

use super::output;
use crate::failure::{Failure, Status};

/// Turn a shell block that calls `swift sft` into a job.json
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind import train.sh > job.json          # batch, length, packing and attention are left to the engine
  mhtraind import train.sh --pin > job.json    # everything stays exactly as the block has it
  xclip -o | mhtraind import -

Secrets are never copied: the job names them, and standard error says where their values go.")]
pub struct ImportArgs {
    /// The shell block; `-` reads standard input
    file: PathBuf,
    /// Pin everything that the block sets
    #[arg(long)]
    pin: bool,
}

/// Runs the command.
pub fn run(args: &ImportArgs) -> Result<Status, Failure> {
    let text = output::read_text(&args.file)?;
    let imported = import(&text, args.pin).map_err(|e| {
        Failure::bad_input("bad_block", format!("{}: {e}", args.file.display())).help(e.help())
    })?;
    for warning in &imported.warnings {
        output::note(format!("note: {warning}"));
    }
    let job =
        serde_json::to_string_pretty(&imported.job).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
    output::line(job)?;
    Ok(Status::Done)
}
