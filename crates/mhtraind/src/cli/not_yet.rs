//! Which commands wait for the daemon?
//!
//! They are named here so that they fail with one clear sentence instead of a guess at a typing error.

use clap::{Args, Subcommand};

use crate::failure::{Failure, Status};

/// Commands of the daemon, which this version does not have.
#[derive(Debug, Subcommand)]
pub enum NotYet {
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Serve(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Submit(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Status(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Follow(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Log(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Wait(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Cancel(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Retry(Anything),
    /// (needs the daemon, which this version does not have)
    #[command(hide = true)]
    Explain(Anything),
}

/// Whatever is typed behind such a command.
#[derive(Debug, Args)]
pub struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    words: Vec<String>,
}

impl NotYet {
    fn parts(&self) -> (&'static str, &Anything) {
        match self {
            NotYet::Serve(words) => ("serve", words),
            NotYet::Submit(words) => ("submit", words),
            NotYet::Status(words) => ("status", words),
            NotYet::Follow(words) => ("follow", words),
            NotYet::Log(words) => ("log", words),
            NotYet::Wait(words) => ("wait", words),
            NotYet::Cancel(words) => ("cancel", words),
            NotYet::Retry(words) => ("retry", words),
            NotYet::Explain(words) => ("explain", words),
        }
    }

    /// Returns whether the caller wants the error as JSON.
    pub fn wants_json(&self) -> bool {
        self.parts().1.words.iter().any(|word| word == "--json")
    }

    /// Returns the refusal.
    pub fn refuse(&self) -> Failure {
        let (name, _) = self.parts();
        Failure::new(
            Status::BadInput,
            "not_supported",
            format!("`{name}` needs the daemon, which this version of mhtraind does not have"),
        )
        .help("`mhtraind run job.json` runs a job in the foreground, with the same sizing and recovery; its receipt is <output_dir>/receipt.json".to_owned())
    }
}
