//! `mhtraind follow`: watch a job until it is over.

use clap::Args;
use mhtrain_sizing::units::Bytes;
use serde::Deserialize;

use super::{output, status};
use crate::api::client::{Client, ReadOn};
use crate::api::types::{FollowLine, JobView, SeriesPoint};
use crate::config::Config;
use crate::engine::screen::{Glance, Screen, Sentences};
use crate::failure::{Failure, Status};

/// Watch a job until it is over; Ctrl-C leaves it running
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind follow 7
  mhtraind follow 7 --json | jq .        # an object a line: events, sentences, the job as it is

Exit code 0 only when the job succeeded.")]
pub struct FollowArgs {
    /// The job
    id: u64,
    /// Print what comes as JSON Lines
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &FollowArgs, config: &Config) -> Result<Status, Failure> {
    follow(&Client::new(config)?, args.id, args.json)
}

/// Follows a job to its end and returns how it ended.
///
/// # Errors
/// There is no such job, or the daemon is gone.
pub fn follow(client: &Client, id: u64, as_json: bool) -> Result<Status, Failure> {
    let earlier =
        if as_json { Vec::new() } else { client.get::<Series>(&format!("/v1/jobs/{id}/series"))?.samples };
    let mut view = View { screen: Screen::terminal(Sentences::ToStdout), attempt: 0, last: None, earlier };
    let mut buffer = Vec::new();
    client.stream(&format!("/v1/jobs/{id}/follow"), |bytes| {
        buffer.extend_from_slice(bytes);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            if as_json {
                output::line(String::from_utf8_lossy(&line).trim_end())?;
            }
            let line: FollowLine = serde_json::from_slice(&line).map_err(|e| {
                Failure::new(Status::Bug, "bad_answer", format!("no line of a followed job: {e}"))
            })?;
            view.take(line, as_json);
        }
        Ok(ReadOn::Yes)
    })?;
    view.screen.end_bar();
    let job: JobView = client.get(&format!("/v1/jobs/{id}"))?;
    if !as_json {
        output::line(status::details(&job))?;
    }
    ended(&job)
}

/// Returns how a command that waited for this job ends.
///
/// # Errors
/// The job is not over: the daemon ended while it was followed.
pub fn ended(job: &JobView) -> Result<Status, Failure> {
    match job.state.as_str() {
        "succeeded" => Ok(Status::Done),
        _ if job.is_over() => Ok(Status::Failed),
        _ => Err(Failure::new(
            Status::NoDaemon,
            "daemon_lost",
            format!("the daemon hung up while job {} was {}", job.id, job.state),
        )
        .help(format!("the job goes on; `mhtraind follow {}` again", job.id))),
    }
}

#[derive(Debug, Deserialize)]
struct Series {
    samples: Vec<SeriesPoint>,
}

struct View {
    screen: Screen,
    attempt: u32,
    last: Option<String>,
    /// How the job went until now.
    earlier: Vec<SeriesPoint>,
}

impl View {
    fn take(&mut self, line: FollowLine, as_json: bool) {
        if as_json {
            return;
        }
        match line {
            FollowLine::Said { text } => self.screen.say(text),
            FollowLine::Event { .. } => {}
            FollowLine::Job { job } => self.show(&job),
        }
    }

    fn show(&mut self, job: &JobView) {
        let now = match &job.reason {
            Some(reason) => format!("{}: {reason}", job.state),
            None => job.state.clone(),
        };
        if self.last.as_ref() != Some(&now) {
            self.screen.say(format!("job {} is {now}", job.id));
            self.last = Some(now);
        }
        let Some(progress) = &job.progress else { return };
        if self.attempt != job.attempt {
            self.attempt = job.attempt;
            self.screen.start_bar(job.attempt);
            let of_this = self.earlier.iter().filter(|point| point.attempt == job.attempt);
            let glances: Vec<Glance> = of_this.map(glance_of).collect();
            self.screen.remember(&glances);
        }
        self.screen.glance(&Glance {
            step: progress.step,
            max_steps: progress.max_steps,
            loss: progress.loss,
            vram_used: progress.vram_bytes.map(Bytes::new),
            vram_total: None,
            eta_s: progress.eta_s,
        });
    }
}

fn glance_of(point: &SeriesPoint) -> Glance {
    Glance {
        step: point.step,
        loss: point.loss,
        vram_used: point.vram_bytes.map(Bytes::new),
        ..Glance::default()
    }
}
