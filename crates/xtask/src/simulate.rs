//! `cargo xtask simulate`: the decisions in a simulated world with faults (`tests/simulation/`).

use std::ffi::OsString;
use std::process::Command;

use clap::Args;

use crate::workspace::{cargo, root, run as run_command};

/// Run the decisions of mhtraind in a simulated world with faults
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct SimulateArgs {
    /// What the simulation itself takes: --histories N, --seed S, --history N (tell that one), --threads N, --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds the simulation and runs it.
pub(crate) fn run(args: &SimulateArgs) -> anyhow::Result<()> {
    run_command(command()?.args(&args.arguments))
}

/// Returns the command that runs 20,000 histories where no argument says otherwise. It is optimised: the build costs less
/// than it saves.
pub(crate) fn command() -> anyhow::Result<Command> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "mhtrain-simulation", "--"]);
    command.current_dir(root()?);
    Ok(command)
}
