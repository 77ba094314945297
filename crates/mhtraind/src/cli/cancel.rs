//! `mhtraind cancel`, `retry` and `rm`: what becomes of a job that is there.

use clap::Args;
use serde_json::json;

use super::output;
use crate::api::client::Client;
use crate::api::types::{JobView, SubmitAnswer};
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Jobs that something is done with.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// The jobs
    #[arg(required = true, value_name = "ID")]
    ids: Vec<u64>,
    /// Print the answer as JSON, a line for each job
    #[arg(long)]
    pub json: bool,
}

/// Stops jobs; a running trainer is asked to end, and killed when it does not.
pub fn cancel(args: &JobsArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    for id in &args.ids {
        let job: JobView = client.post(&format!("/v1/jobs/{id}/cancel"), &json!({}))?;
        if args.json {
            output::json_line(&job)?;
        } else {
            let word = if job.state == "cancelled" { "cancelled" } else { "stopping" };
            output::line(format!("job {id}: {word}"))?;
        }
    }
    Ok(Status::Done)
}

/// Hands failed or cancelled jobs in again; they go on from their last checkpoint.
pub fn retry(args: &JobsArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    for id in &args.ids {
        let answer: SubmitAnswer = client.post(&format!("/v1/jobs/{id}/retry"), &json!({}))?;
        if args.json {
            output::json_line(&answer)?;
        } else {
            output::line(answer.id)?;
        }
    }
    Ok(Status::Done)
}

/// Forgets jobs that are over. Their output directories stay.
pub fn remove(args: &JobsArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    for id in &args.ids {
        client.delete(&format!("/v1/jobs/{id}"))?;
        if args.json {
            output::json_line(&json!({"removed": id}))?;
        }
    }
    Ok(Status::Done)
}
