//! What happened, for a reader?

use mhtrain_job::event::JobEvent;

use crate::script::Script;

/// What is told of a history.
#[derive(Clone, Debug, Default)]
pub struct Story {
    lines: Option<Vec<String>>,
}

impl Story {
    /// Returns a story that keeps what it is told.
    pub fn kept() -> Story {
        Story { lines: Some(Vec::new()) }
    }

    /// Tells what happened at an event, so many seconds after the beginning.
    pub(crate) fn tell(&mut self, event: u32, seconds: u64, what: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{event:>5} {seconds:>7} s  {}", what()));
        }
    }

    /// Returns the lines.
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }
}

/// Returns an event in words.
pub(crate) fn in_words(event: &JobEvent) -> String {
    let name = event.name();
    match event {
        JobEvent::Planned { tier, .. } => format!("{name}, {tier}"),
        JobEvent::Waiting { reason } => format!("{name}: {reason}"),
        JobEvent::AttemptStarting(start) => {
            let from = match &start.resume {
                Some(resume) => format!("{:?} from step {}", resume.kind, resume.from_step).to_lowercase(),
                None => "from the first row".to_owned(),
            };
            format!("{name} {}, rung {}, {}, {from}", start.attempt, start.rung, start.tier)
        }
        JobEvent::Started { attempt, process } => format!("{name}, attempt {attempt}, pid {}", process.pid),
        JobEvent::AttemptEnded { attempt, exit, diagnosis, last_step } => {
            let doubt = if diagnosis.certain { "" } else { ", not certain" };
            let step = last_step.map_or("no step".to_owned(), |step| format!("step {step}"));
            format!("{name} {attempt}, {exit:?}, {}{doubt}, {step}", diagnosis.kind)
        }
        JobEvent::RerunDecided(rerun) => format!("{name}, rung {}: {}", rerun.rung, rerun.reason),
        JobEvent::Warned { warning } => format!("{name}: {warning}"),
        JobEvent::StopRequested { by } => format!("{name} by {by}"),
        JobEvent::Failed { reason, .. } | JobEvent::Cancelled { reason } => format!("{name}: {reason}"),
        JobEvent::Submitted { .. } | JobEvent::Succeeded { .. } => name.to_owned(),
    }
}

/// Returns a script in words, a line each.
pub fn script_in_words(script: &Script) -> Vec<String> {
    let Script { cards, three, jobs_per_user, cgroups, jobs, faults, .. } = script;
    let line = if *three { "3.x" } else { "4.x" };
    let counts = if *cgroups { "count memory kills" } else { "are not there" };
    let mut lines = vec![format!(
        "cards of {cards:?} GiB; ms-swift {line}; cgroups {counts}; {jobs_per_user} jobs of a user may wait"
    )];
    for (n, job) in jobs.iter().enumerate() {
        lines.push(format!("job {}: {job:?}", crate::faults::name(n)));
    }
    lines.extend(faults.iter().map(|(at, fault)| format!("before event {at}: {fault}")));
    lines
}
