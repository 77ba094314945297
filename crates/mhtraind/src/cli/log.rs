//! `mhtraind log`: what a trainer printed.

use std::io::Write;

use clap::Args;

use crate::api::client::{Client, ReadOn};
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Print what the trainer of a job wrote
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind log 7
  mhtraind log 7 -f                 # until the attempt is over
  mhtraind log 7 --attempt 1        # the one that ran out of memory")]
pub struct LogArgs {
    /// The job
    id: u64,
    /// Which attempt [default: the last]
    #[arg(long, value_name = "N")]
    attempt: Option<u32>,
    /// Go on as more comes
    #[arg(short, long)]
    follow: bool,
}

/// Runs the command.
pub fn run(args: &LogArgs, config: &Config) -> Result<Status, Failure> {
    let attempt = args.attempt.map_or(String::new(), |attempt| format!("&attempt={attempt}"));
    let path = format!("/v1/jobs/{}/log?follow={}{attempt}", args.id, args.follow);
    let mut out = std::io::stdout().lock();
    Client::new(config)?.stream(&path, |bytes| match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(ReadOn::Yes),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ReadOn::No),
        Err(error) => Err(Failure::failed("unwritable", format!("cannot write to standard output: {error}"))),
    })?;
    Ok(Status::Done)
}
