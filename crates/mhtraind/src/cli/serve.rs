//! `mhtraind serve`: the daemon.

use clap::Args;

use crate::config::Config;
use crate::daemon;
use crate::failure::{Failure, Status};

/// Run the daemon: it queues jobs, starts them when their memory is free, and follows them to the end
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind serve                                   # in a terminal, for yourself
  mhtraind serve --socket /tmp/m.sock --state-dir /tmp/m
  systemctl --user start mhtraind                  # as a service

It may be stopped or killed at any moment: trainers go on, and the next daemon takes them over. MHTRAIND_LOG=info
(debug, warn) says how much it tells on standard error.")]
pub struct ServeArgs {}

/// Runs the command.
pub fn run(_: &ServeArgs, config: Config) -> Result<Status, Failure> {
    daemon::serve(config)
}
