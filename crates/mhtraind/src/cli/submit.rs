//! `mhtraind submit`: a job for the daemon.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use mhtrain_job::secrets::is_secret_name;
use mhtrain_job::spec::JobSpec;

use super::{follow, output};
use crate::api::client::Client;
use crate::api::types::{SubmitAnswer, SubmitRequest};
use crate::config::Config;
use crate::engine::prepare::working_dir;
use crate::failure::{Failure, Status};

/// Hand a job to the daemon; prints its id
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind submit job.json
  mhtraind submit job.json --follow                # and watch it; Ctrl-C leaves it running
  mhtraind import train.sh | mhtraind submit -
  mhtraind submit job.json --smoke                 # two steps and a save on 64 rows, in output_dir + '-smoke'
  mhtraind submit job.json --key nightly-2026-11-24   # twice is once

When the id is printed, the job is on disk and is not lost whatever happens.")]
pub struct SubmitArgs {
    /// The job file; `-` reads standard input
    job: PathBuf,
    /// Go on with `follow`
    #[arg(long)]
    follow: bool,
    /// The same key gives the same job: nothing new is started
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Run two steps, a save and (with validation) an evaluation on 64 rows
    #[arg(long)]
    smoke: bool,
    /// Print {"id": …}
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &SubmitArgs, config: &Config) -> Result<Status, Failure> {
    let bytes = output::read_input(&args.job)?;
    // Read here too: what is wrong with the file is told with its name, and before anything is sent.
    let spec = JobSpec::parse(&bytes)
        .map_err(|e| Failure::bad_input(e.code(), format!("{}: {e}", args.job.display())).help(e.help()))?;
    let cwd = working_dir()?;
    let cwd = cwd.to_str().ok_or_else(|| {
        Failure::bad_input("not_utf8", format!("the working directory {} is no UTF-8 text", cwd.display()))
    })?;
    let request = SubmitRequest {
        job: spec.to_json(),
        key: args.key.clone(),
        smoke: args.smoke,
        cwd: cwd.to_owned(),
        env: passed_environment(config),
        umask: umask(),
    };
    let client = Client::new(config)?;
    let answer: SubmitAnswer = client.post("/v1/jobs", &request)?;
    for note in &answer.notes {
        output::note(format!("note: {note}"));
    }
    if args.json {
        output::json_line(&answer)?;
    } else {
        output::line(answer.id)?;
    }
    if args.follow { follow::follow(&client, answer.id, args.json) } else { Ok(Status::Done) }
}

/// Returns the variables that go with the job.
fn passed_environment(config: &Config) -> BTreeMap<String, String> {
    let text = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(name, _)| config.trainer.passes(name) && !is_secret_name(name)).collect()
}

/// Returns this process's umask.
fn umask() -> u32 {
    // Reading it means setting it; nothing else runs in this process yet.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    rustix::process::umask(mask);
    mask.as_raw_mode()
}
