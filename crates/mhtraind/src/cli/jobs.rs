//! Which jobs does a command mean?

use clap::Args;
use serde::Serialize;

use super::output;
use crate::failure::{Failure, Status};

// Jobs that something is done with, one after the other.
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
    /// Does something with each job and prints the answer; `for_people` makes a line of it, or nothing. What cannot be done is
    /// said, and the others are done; the status is that of the first failure.
    ///
    /// # Errors
    /// Standard output cannot be written, or no daemon is there.
    pub fn each<T: Serialize>(
        &self,
        act: impl Fn(u64) -> Result<T, Failure>,
        for_people: impl Fn(&T) -> Option<String>,
    ) -> Result<Status, Failure> {
        let mut ended = Status::Done;
        for id in &self.ids {
            let answer = match act(*id) {
                Ok(answer) => answer,
                // With one job it is the command's own error, and without a daemon every job has the same.
                Err(failure) if self.ids.len() == 1 || failure.status == Status::NoDaemon => {
                    return Err(failure);
                }
                Err(failure) => {
                    output::failure(&failure, self.json);
                    if ended == Status::Done {
                        ended = failure.status;
                    }
                    continue;
                }
            };
            if self.json {
                output::json_line(&answer)?;
            } else if let Some(line) = for_people(&answer) {
                output::line(line)?;
            }
        }
        Ok(ended)
    }
}
