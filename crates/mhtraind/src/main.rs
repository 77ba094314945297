//! `mhtraind`: sizes, launches, diagnoses and recovers ms-swift fine-tuning jobs.
//!
//! This crate is where the others meet: `cli` holds what can be typed, `engine` what runs a job.
//! Decisions are in the pure crates (`mhtrain-sizing`, `mhtrain-job`, `mhtrain-swift`).

#![allow(unreachable_pub, reason = "a binary has no outside: `pub` says what other modules use")]

mod api;
mod cli;
mod config;
mod daemon;
mod demo;
mod engine;
mod failure;
mod trainer_install;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use mhtrain_supervisor::{adopt, recorder};

use crate::engine::look::{LOOK_VERB, look_main};

fn main() -> ExitCode {
    if let Some(code) = hidden_verb() {
        return code;
    }
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return report_usage(&error),
    };
    start_log();
    match cli::dispatch(&cli) {
        Ok(status) => ExitCode::from(status as u8),
        Err(failure) => {
            cli::output::failure(&failure, cli::wants_json(&cli));
            ExitCode::from(failure.status as u8)
        }
    }
}

/// Becomes the recorder of an attempt, or the process that looks at data, when the command line says so.
///
/// Before anything else: the recorder closes every descriptor and must be the only thread.
fn hidden_verb() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let verb = words.next()?;
    let become_it = match verb.to_str()? {
        recorder::RECORDER_VERB => recorder::recorder_main,
        adopt::ADOPT_VERB => adopt::adopt_main,
        LOOK_VERB => return Some(ExitCode::from(u8::try_from(look_main()).unwrap_or(u8::MAX))),
        _ => return None,
    };
    let record = words.next()?;
    let code = become_it(Path::new(&record));
    Some(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// Shows help, or says what is wrong with the command line; a script that asked for JSON gets JSON.
fn report_usage(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args_os().skip(1).any(|word| word == "--json");
    if error.use_stderr() && wants_json {
        cli::output::failure(&cli::usage_failure(error), true);
    } else if let Err(e) = error.print() {
        tracing::debug!("cannot print: {e}");
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(failure::Status::BadInput as u8))
}

/// Our own log goes to standard error and is silent unless MHTRAIND_LOG (or RUST_LOG) asks for it: what people need
/// to know is said by the commands.
fn start_log() {
    let asked = tracing_subscriber::EnvFilter::try_from_env("MHTRAIND_LOG")
        .or_else(|_| tracing_subscriber::EnvFilter::try_from_default_env());
    let Ok(filter) = asked else { return };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
