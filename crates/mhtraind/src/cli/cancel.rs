//! `mhtraind cancel`: stop jobs.

use serde_json::json;

use super::jobs::JobsArgs;
use crate::api::client::Client;
use crate::api::types::JobView;
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Stops jobs; a running trainer is asked to end, and killed when it does not.
pub fn run(args: &JobsArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    args.each(
        |id| client.post::<JobView>(&format!("/v1/jobs/{id}/cancel"), &json!({})),
        |job| Some(format!("job {}: {}", job.id, if job.is_over() { "cancelled" } else { "stopping" })),
    )
}
