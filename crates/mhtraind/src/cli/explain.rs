//! `mhtraind explain`: the receipt of a job.

use clap::Args;
use mhtrain_job::receipt::{Receipt, render};
use serde_json::Value;

use super::output;
use crate::api::client::Client;
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Show what was chosen for a job, why, and what was retried
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind explain 7
  mhtraind explain 7 --json | jq '.attempts[].diagnosis'")]
pub struct ExplainArgs {
    /// The job
    id: u64,
    /// Print the receipt as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &ExplainArgs, config: &Config) -> Result<Status, Failure> {
    let receipt: Value = Client::new(config)?.get(&format!("/v1/jobs/{}/receipt", args.id))?;
    if args.json {
        output::json(&receipt)?;
    } else {
        let receipt: Receipt = serde_json::from_value(receipt)
            .map_err(|e| Failure::new(Status::Bug, "bad_answer", format!("no receipt: {e}")))?;
        output::line(render(&receipt))?;
    }
    Ok(Status::Done)
}
