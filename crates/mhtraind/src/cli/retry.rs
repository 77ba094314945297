//! `mhtraind retry`: hand failed or cancelled jobs in again.

use serde_json::json;

use super::jobs::JobsArgs;
use crate::api::client::Client;
use crate::api::types::SubmitAnswer;
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Hands jobs in again; they go on from their last checkpoint. Prints the new ids.
pub fn run(args: &JobsArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    args.each(
        |id| client.post::<SubmitAnswer>(&format!("/v1/jobs/{id}/retry"), &json!({})),
        |answer| Some(answer.id.to_string()),
    )
}
