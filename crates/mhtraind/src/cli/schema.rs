//! `mhtraind schema`: what may stand in a job.json?

use clap::Args;

use super::output;
use crate::failure::{Failure, Status};

/// Print the JSON Schema of job.json
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  mhtraind schema > job.schema.json    # for an editor's completion")]
pub struct SchemaArgs {}

/// Runs the command.
pub fn run(_args: &SchemaArgs) -> Result<Status, Failure> {
    let schema = mhtrain_job::schema::job_schema();
    let text = serde_json::to_string_pretty(&schema).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
    output::line(text)?;
    Ok(Status::Done)
}
