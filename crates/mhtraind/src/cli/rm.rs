//! `mhtraind rm`: forget jobs that are over.

use serde_json::json;

use super::jobs::JobsArgs;
use crate::api::client::Client;
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Forgets jobs with their logs and records. Their output directories stay.
pub fn run(args: &JobsArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    args.each(|id| client.delete(&format!("/v1/jobs/{id}")).map(|()| json!({"removed": id})), |_| None)
}
