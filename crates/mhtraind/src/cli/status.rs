//! `mhtraind status`: which jobs are there, and why does one not run?

use clap::Args;

use super::output;
use crate::api::client::Client;
use crate::api::types::{JobList, JobView};
use crate::config::Config;
use crate::engine::screen::clock;
use crate::failure::{Failure, Status};

/// Show jobs, and why those that do not run wait
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind status
  mhtraind status 7
  mhtraind status --state running,waiting
  mhtraind status --limit 20                           # what is not over, and the last of the others
  mhtraind status --json --limit 50 --after-id 100     # page by page, from the first")]
pub struct StatusArgs {
    /// Only this job
    id: Option<u64>,
    /// Only jobs in these states, separated by commas
    #[arg(long, value_name = "STATES")]
    state: Option<String>,
    /// At most so many jobs
    #[arg(long, default_value_t = 100, value_name = "N")]
    limit: u32,
    /// Only jobs after this one
    #[arg(long, value_name = "ID")]
    after_id: Option<u64>,
    /// Print {"jobs": […]}
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &StatusArgs, config: &Config) -> Result<Status, Failure> {
    let client = Client::new(config)?;
    let list = match args.id {
        Some(id) => JobList { jobs: vec![client.get(&format!("/v1/jobs/{id}"))?], next_after_id: None },
        None if args.json || args.after_id.is_some() => client.get(&args.page(""))?,
        None => args.latest(&client)?,
    };
    if args.json {
        output::json(&list)?;
    } else if args.id.is_some() {
        for job in &list.jobs {
            output::line(details(job))?;
        }
    } else if list.jobs.is_empty() {
        output::line("no jobs; `mhtraind submit job.json` hands one in")?;
    } else {
        output::line(table(&list.jobs))?;
        if let Some(after) = list.next_after_id {
            output::note(format!("there are more: --after-id {after}"));
        } else if args.after_id.is_none() && list.jobs.len() == args.limit as usize {
            output::note("there may be older ones: --after-id 0 begins with the first");
        }
    }
    Ok(Status::Done)
}

impl StatusArgs {
    /// Returns the jobs that somebody who looks wants to see: those that are not over, and the last of the others.
    fn latest(&self, client: &Client) -> Result<JobList, Failure> {
        let JobList { mut jobs, next_after_id } = client.get(&self.page("&order=newest"))?;
        if next_after_id.is_some() && self.state.is_none() {
            let unfinished: JobList =
                client.get(&self.page("&state=queued,waiting,starting,running,recovering"))?;
            let others = jobs.drain(..).filter(|job| unfinished.jobs.iter().all(|one| one.id != job.id));
            let room = (self.limit as usize).saturating_sub(unfinished.jobs.len());
            jobs = others.take(room).collect();
            jobs.extend(unfinished.jobs);
        }
        jobs.sort_by_key(|job| job.id);
        Ok(JobList { jobs, next_after_id: None })
    }

    fn page(&self, more: &str) -> String {
        let mut query = format!("/v1/jobs?limit={}{more}", self.limit);
        if let Some(after) = self.after_id {
            query.push_str(&format!("&after_id={after}"));
        }
        if let Some(states) = &self.state {
            let states: String = states.chars().filter(|c| c.is_ascii_alphanumeric() || *c == ',').collect();
            query.push_str(&format!("&state={states}"));
        }
        query
    }
}

fn table(jobs: &[JobView]) -> String {
    // Whose a job is matters to whoever sees those of several.
    let several = jobs.iter().any(|job| job.owner != jobs[0].owner);
    let row = |cells: [String; 8]| {
        let shown = cells.into_iter().enumerate().filter(|(column, _)| several || *column != 2);
        shown.map(|(_, cell)| cell).collect::<Vec<_>>()
    };
    let mut rows =
        vec![row(["ID", "NAME", "OWNER", "STATE", "DEVICE", "TIER", "PROGRESS", "WHY"].map(str::to_owned))];
    rows.extend(jobs.iter().map(|job| {
        row([
            job.id.to_string(),
            job.name.clone(),
            job.owner.clone(),
            job.state.clone(),
            job.device.clone().unwrap_or_else(|| "-".to_owned()),
            tier(job),
            progress(job),
            job.reason.clone().or_else(|| job.warnings.last().cloned()).unwrap_or_default(),
        ])
    }));
    // The last column is as wide as it is.
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    widths.pop();
    widths.push(0);
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Returns everything about one job, a fact a line.
pub fn details(job: &JobView) -> String {
    let mut lines = vec![format!("job {} · {} · {}", job.id, job.name, job.state)];
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            lines.push(format!("  {name:11} {value}"));
        }
    };
    fact("why", job.reason.clone().unwrap_or_default());
    fact("attempt", if job.attempt == 0 { String::new() } else { job.attempt.to_string() });
    fact("tier", job.tier.as_ref().map(ToString::to_string).unwrap_or_default());
    fact("device", job.device.clone().unwrap_or_default());
    fact("progress", if job.progress.is_some() { progress(job) } else { String::new() });
    fact("owner", job.owner.clone());
    fact("submitted", job.submitted_at.clone());
    fact("changed", job.updated_at.clone());
    fact("output", job.output_dir.clone());
    for warning in &job.warnings {
        fact("warning", warning.clone());
    }
    lines.join("\n")
}

fn tier(job: &JobView) -> String {
    job.tier.as_ref().map_or("-".to_owned(), |tier| format!("{}x{}", tier.micro_batch, tier.accumulation))
}

/// Returns how far a job is, in few words.
pub fn progress(job: &JobView) -> String {
    let Some(progress) = &job.progress else { return "-".to_owned() };
    let mut text = progress.steps();
    if let Some(loss) = progress.loss {
        text.push_str(&format!(" loss {loss:.3}"));
    }
    if let Some(eta) = progress.eta_s {
        text.push_str(&format!(" ETA {}", clock(eta)));
    }
    text
}
