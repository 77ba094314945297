//! `mhtraind completions`: what does a shell need to complete our command line?

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, output};
use crate::failure::{Failure, Status};

/// Print the completion script of a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind completions bash > ~/.local/share/bash-completion/completions/mhtraind
  mhtraind completions zsh > ~/.zfunc/_mhtraind         # with fpath+=~/.zfunc before compinit
  mhtraind completions fish > ~/.config/fish/completions/mhtraind.fish

The Debian package has them in place already.")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(args: &CompletionsArgs) -> Result<Status, Failure> {
    let mut script = Vec::new();
    // Into memory first: the generator panics when its writer fails, and a closed pipe is no bug.
    clap_complete::generate(args.shell, &mut Cli::command(), "mhtraind", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(Status::Done)
}
