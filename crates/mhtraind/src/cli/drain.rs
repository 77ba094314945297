//! `mhtraind drain` and `undrain`: may new jobs start?

use clap::Args;
use serde_json::json;

use super::output;
use crate::api::client::Client;
use crate::api::types::DaemonView;
use crate::config::Config;
use crate::failure::{Failure, Status};

// Options of both.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Print what the daemon says of itself
    #[arg(long)]
    pub json: bool,
}

/// Lets running jobs end and starts no new ones.
pub fn drain(args: &DrainArgs, config: &Config) -> Result<Status, Failure> {
    let view: DaemonView = Client::new(config)?.post("/v1/daemon/drain", &json!({}))?;
    tell(args, &view, &format!("nothing new starts; {} running, {} waiting", view.active, view.queued))
}

/// Lets new jobs start again.
pub fn undrain(args: &DrainArgs, config: &Config) -> Result<Status, Failure> {
    let view: DaemonView = Client::new(config)?.post("/v1/daemon/undrain", &json!({}))?;
    tell(args, &view, &format!("jobs start again; {} running, {} waiting", view.active, view.queued))
}

fn tell(args: &DrainArgs, view: &DaemonView, text: &str) -> Result<Status, Failure> {
    if args.json {
        output::json(view)?
    } else {
        output::line(text)?
    }
    Ok(Status::Done)
}
