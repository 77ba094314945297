//! What can be typed?
//!
//! The clap definition is here, one module a command beside it. A command returns a [`Failure`] or the status it
//! ends with; only `main` exits.

pub mod cancel;
pub mod completions;
pub mod demo;
pub mod diagnose;
pub mod doctor;
pub mod drain;
pub mod estimate;
pub mod explain;
pub mod follow;
pub mod import;
pub mod install_trainer;
pub mod jobs;
pub mod log;
pub mod man_pages;
pub mod output;
pub mod plan;
pub mod probe;
pub mod retry;
pub mod rm;
pub mod run;
pub mod schema;
pub mod serve;
pub mod status;
pub mod submit;
pub mod wait;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::failure::{Failure, Status};

/// Sizes, launches, diagnoses and recovers ms-swift fine-tuning jobs.
#[derive(Debug, Parser)]
#[command(name = "mhtraind", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done · 1 the thing asked for failed · 2 bad usage or bad input file · 3 no daemon reachable ·
4 not permitted · 5 not found · 70 a bug of ours · 75 a wait ran out · 130 Ctrl-C · 143 SIGTERM

Example:
  mhtraind import train.sh > job.json    # from the shell block that you have
  mhtraind plan job.json                 # what would run, and why
  mhtraind run job.json                  # run it, through out-of-memory errors, to the proven end";

/// Options of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// File of settings [default: ~/.config/mhtraind/mhtraind.toml, /etc/mhtraind/mhtraind.toml]
    #[arg(long, global = true, value_name = "FILE", env = "MHTRAIND_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// NVML library to open [default: the driver's libnvidia-ml.so.1]
    #[arg(long, global = true, value_name = "PATH", env = "MHTRAIND_NVML_LIBRARY", hide_env_values = true)]
    pub nvml_library: Option<PathBuf>,
    /// Socket of the daemon [default: $XDG_RUNTIME_DIR/mhtraind/mhtraind.sock, then root's: /run/mhtraind/mhtraind.sock]
    #[arg(long, global = true, value_name = "PATH", env = "MHTRAIND_SOCKET", hide_env_values = true)]
    pub socket: Option<PathBuf>,
    /// State directory of the daemon [default: ~/.local/state/mhtraind; root: /var/lib/mhtraind]
    #[arg(long, global = true, value_name = "DIR", env = "MHTRAIND_STATE_DIR", hide_env_values = true)]
    pub state_dir: Option<PathBuf>,
}

impl Global {
    /// Returns the settings with the flags laid over them.
    pub fn load_config(&self) -> Result<Config, Failure> {
        let mut config = Config::load(self.config.as_deref())?;
        if let Some(library) = &self.nvml_library {
            config.nvml.library = library.to_string_lossy().into_owned();
        }
        if let Some(socket) = &self.socket {
            config.daemon.socket = socket.to_string_lossy().into_owned();
        }
        if let Some(state_dir) = &self.state_dir {
            config.daemon.state_dir = state_dir.to_string_lossy().into_owned();
        }
        Ok(config)
    }
}

// Deferred: only the command that was typed is built (half a millisecond of every
// start). A doc comment on arguments that several commands share would hide the ones that
// stand here.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Run one job here, in the foreground, through out-of-memory errors to the proven end
    Run(run::RunArgs),
    /// Show what would run and why, without starting anything
    Plan(plan::PlanArgs),
    /// Predict the peak memory of workloads given as JSON lines; nothing is started
    Estimate(estimate::EstimateArgs),
    /// Turn a shell block that calls `swift sft` into a job.json
    Import(import::ImportArgs),
    /// Say why a trainer died, from its log
    Diagnose(diagnose::DiagnoseArgs),
    /// Show GPUs, host and trainer environment
    Probe(probe::ProbeArgs),
    /// Check everything that a job needs, and say what to do about what is missing
    Doctor(doctor::DoctorArgs),
    /// Print the JSON Schema of job.json
    Schema(schema::SchemaArgs),
    /// Install ms-swift, pinned, into an environment of its own
    InstallTrainer(install_trainer::InstallTrainerArgs),
    /// See it work on this machine: a real job through a real out-of-memory error, without a GPU
    Demo(demo::DemoArgs),
    /// Run the daemon: it queues jobs, starts them when their memory is free, and follows them to the end
    Serve(serve::ServeArgs),
    /// Hand a job to the daemon; prints its id
    Submit(submit::SubmitArgs),
    /// Show jobs, and why those that do not run wait
    Status(status::StatusArgs),
    /// Watch a job until it is over; Ctrl-C leaves it running
    Follow(follow::FollowArgs),
    /// Print what the trainer of a job wrote
    Log(log::LogArgs),
    /// Wait until a job is over; exit code 0 only when it succeeded
    Wait(wait::WaitArgs),
    /// Stop jobs
    #[command(after_help = "Examples:\n  mhtraind cancel 7\n  mhtraind cancel 7 8 9")]
    Cancel(jobs::JobsArgs),
    /// Hand failed or cancelled jobs in again, from their last checkpoint; prints the new ids
    #[command(after_help = "Example:\n  mhtraind retry 7")]
    Retry(jobs::JobsArgs),
    /// Show what was chosen for a job, why, and what was retried
    Explain(explain::ExplainArgs),
    /// Start no new jobs; running ones go on
    #[command(after_help = "Example:\n  mhtraind drain        # before an upgrade of the driver")]
    Drain(drain::DrainArgs),
    /// Start jobs again
    #[command(after_help = "Example:\n  mhtraind undrain")]
    Undrain(drain::DrainArgs),
    /// Forget jobs that are over; their output directories stay
    #[command(name = "rm", after_help = "Example:\n  mhtraind rm 7 8")]
    Remove(jobs::JobsArgs),
    /// Print the completion script of a shell
    Completions(completions::CompletionsArgs),
    /// Write the manual, a page a command, into a directory
    ManPages(man_pages::ManPagesArgs),
}

/// Runs a parsed command line.
pub fn dispatch(cli: &Cli) -> Result<Status, Failure> {
    match &cli.command {
        Command::Run(args) => run::run(args, &cli.global.load_config()?),
        Command::Plan(args) => plan::run(args, &cli.global.load_config()?),
        Command::Estimate(args) => estimate::run(args),
        Command::Import(args) => import::run(args),
        Command::Diagnose(args) => diagnose::run(args),
        Command::Probe(args) => probe::run(args, &cli.global.load_config()?),
        Command::Doctor(args) => doctor::run(args, &cli.global.load_config()?),
        Command::Schema(args) => schema::run(args),
        Command::InstallTrainer(args) => install_trainer::run(args),
        Command::Demo(args) => demo::run(args, &cli.global.load_config()?),
        Command::Serve(args) => serve::run(args, cli.global.load_config()?),
        Command::Submit(args) => submit::run(args, &cli.global.load_config()?),
        Command::Status(args) => status::run(args, &cli.global.load_config()?),
        Command::Follow(args) => follow::run(args, &cli.global.load_config()?),
        Command::Log(args) => log::run(args, &cli.global.load_config()?),
        Command::Wait(args) => wait::run(args, &cli.global.load_config()?),
        Command::Cancel(args) => cancel::run(args, &cli.global.load_config()?),
        Command::Retry(args) => retry::run(args, &cli.global.load_config()?),
        Command::Explain(args) => explain::run(args, &cli.global.load_config()?),
        Command::Drain(args) => drain::drain(args, &cli.global.load_config()?),
        Command::Undrain(args) => drain::undrain(args, &cli.global.load_config()?),
        Command::Remove(args) => rm::run(args, &cli.global.load_config()?),
        Command::Completions(args) => completions::run(args),
        Command::ManPages(args) => man_pages::run(args),
    }
}

/// Returns what is wrong with a command line as the JSON interface shows it: clap's first sentence, and its hints.
pub fn usage_failure(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let (message, rest) = text.split_once("\n\n").unwrap_or((&text, ""));
    let message = message.trim().trim_start_matches("error: ");
    let message = message.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let hints = rest.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>();
    Failure::bad_input("usage", message).help((!hints.is_empty()).then(|| hints.join("\n")))
}

/// Returns whether the command line asks for errors as JSON.
pub fn wants_json(cli: &Cli) -> bool {
    match &cli.command {
        Command::Run(args) => args.json,
        Command::Plan(args) => args.json,
        Command::Estimate(args) => args.json,
        Command::Diagnose(args) => args.json,
        Command::Probe(args) => args.json,
        Command::Doctor(args) => args.json,
        Command::Submit(args) => args.json,
        Command::Status(args) => args.json,
        Command::Follow(args) => args.json,
        Command::Wait(args) => args.json,
        Command::Cancel(args) | Command::Retry(args) | Command::Remove(args) => args.json,
        Command::Explain(args) => args.json,
        Command::Drain(args) | Command::Undrain(args) => args.json,
        Command::Import(args) => args.json,
        Command::Serve(_)
        | Command::Log(_)
        | Command::Schema(_)
        | Command::InstallTrainer(_)
        | Command::Demo(_)
        | Command::Completions(_)
        | Command::ManPages(_) => false,
    }
}
