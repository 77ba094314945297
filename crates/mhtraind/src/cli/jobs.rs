//! Which jobs does a command mean?

use clap::Args;
use serde::Serialize;

use super::output;
use crate::failure::{Failure, Status};

/// Jobs that something is done with, one after the other.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// The jobs
    #[arg(required = true, value_name = "ID")]
    ids: Vec<u64>,
    /// Print the answer as JSON, a line for each job
    #[arg(long)]
    pub json: bool,
}

impl JobsArgs {
    /// Does something with each job and prints the answer; `for_people` makes a line of it, or nothing.
    ///
    /// # Errors
    /// The first job with which it cannot be done; those before it are done.
    pub fn each<T: Serialize>(
        &self,
        act: impl Fn(u64) -> Result<T, Failure>,
        for_people: impl Fn(&T) -> Option<String>,
    ) -> Result<Status, Failure> {
        for id in &self.ids {
            let answer = act(*id)?;
            if self.json {
                output::json_line(&answer)?;
            } else if let Some(line) = for_people(&answer) {
                output::line(line)?;
            }
        }
        Ok(Status::Done)
    }
}
