//! `mhtraind wait`: until a job is over.

use std::time::{Duration, Instant};

use clap::Args;

use super::{follow, output};
use crate::api::client::{Client, ReadOn};
use crate::api::types::JobView;
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Wait until a job is over; exit code 0 only when it succeeded
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind wait 7 && ./evaluate.sh
  mhtraind wait 7 --timeout 12h       # exit code 75 when the time is up; the job goes on")]
pub struct WaitArgs {
    /// The job
    id: u64,
    /// Wait at most so long: 90, 45s, 30m, 12h, 1d
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    timeout: Option<Duration>,
    /// Print the job at the end
    #[arg(long)]
    pub json: bool,
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let (digits, unit) = match text.char_indices().find(|(_, c)| !c.is_ascii_digit() && *c != '.') {
        Some((at, _)) => text.split_at(at),
        None => (text, "s"),
    };
    let seconds = match unit {
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        other => return Err(format!("unknown unit `{other}`; use s, m, h or d")),
    };
    let number: f64 =
        digits.parse().map_err(|_| format!("`{text}` is no time; write 90, 45s, 30m, 12h or 1d"))?;
    Duration::try_from_secs_f64(number * seconds).map_err(|e| e.to_string())
}

/// Runs the command.
pub fn run(args: &WaitArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    let until = args.timeout.map(|timeout| Instant::now() + timeout);
    let path = format!("/v1/jobs/{}", args.id);
    loop {
        let job: JobView = client.get(&path)?;
        if job.is_over() {
            if args.json {
                output::json(&job)?;
            } else if let Some(reason) = job.reason.as_ref().filter(|_| job.state != "succeeded") {
                output::note(format!("job {} is {}: {reason}", job.id, job.state));
            }
            return follow::ended(&job);
        }
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let what = format!("job {} is still {}", job.id, job.state);
            return Err(Failure::new(Status::WaitRanOut, "wait_ran_out", what)
                .help(format!("it goes on; `mhtraind follow {}` shows it", job.id)));
        }
        client.stream_for(&format!("{path}/follow"), left, |_| Ok(ReadOn::Yes))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_and_without_a_unit() {
        assert_eq!(parse_time("90").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_time("0.5s").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_time("12h").unwrap(), Duration::from_secs(43_200));
        for wrong in ["", "x", "3w", "-1", "1e400s", "s"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
