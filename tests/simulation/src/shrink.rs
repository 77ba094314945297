//! What is the least that still breaks the promise?

use std::mem::discriminant;

use crate::bugs::Bug;
use crate::faults::Fault;
use crate::history::Story;
use crate::invariants::Violation;
use crate::script::Script;
use crate::world::{Course, run};

/// Histories that are run at most to make one smaller: some seconds.
const TRIES_MAX: u32 = 3000;

/// Returns a smaller script that breaks the same promise, with what it breaks and how it went.
pub fn shrink(script: &Script, bug: Option<Bug>, violation: Violation) -> (Script, Violation, Course) {
    let mut smallest = (script.clone(), violation);
    let mut tries = 0;
    loop {
        let before = smallest.0.clone();
        for candidate in smaller(&before) {
            tries += 1;
            if tries > TRIES_MAX {
                break;
            }
            if let Err((found, _)) = run(&candidate, bug, Story::default())
                && discriminant(&found) == discriminant(&smallest.1)
            {
                smallest = (candidate, found);
                break;
            }
        }
        if smallest.0 == before || tries > TRIES_MAX {
            let (script, violation) = smallest;
            return match run(&script, bug, Story::kept()) {
                Err((violation, course)) => (script, violation, course),
                Ok(course) => (script, violation, course),
            };
        }
    }
}

/// Returns scripts that are smaller in one thing, the largest steps first.
fn smaller(script: &Script) -> Vec<Script> {
    let mut all = Vec::new();
    for job in (0..script.jobs.len()).filter(|_| script.jobs.len() > 1) {
        all.push(without_job(script, job));
    }
    let half = script.faults.len() / 2;
    if half > 0 {
        all.push(Script { faults: script.faults[half..].to_vec(), ..script.clone() });
        all.push(Script { faults: script.faults[..half].to_vec(), ..script.clone() });
    }
    for fault in 0..script.faults.len() {
        let mut fewer = script.clone();
        fewer.faults.remove(fault);
        all.push(fewer);
    }
    for (n, job) in script.jobs.iter().enumerate() {
        let mut with = |change: &dyn Fn(&mut crate::script::JobScript)| {
            let mut changed = script.clone();
            change(&mut changed.jobs[n]);
            if changed != *script {
                all.push(changed);
            }
        };
        for misfortune in 0..job.misfortunes.len() {
            with(&|job| job.misfortunes.truncate(misfortune));
        }
        with(&|job| job.after = None);
        with(&|job| job.same_directory_as = None);
        with(&|job| job.wish.epochs = 1);
        with(&|job| job.rows = 40);
        with(&|job| job.wish.micro_batch = None);
        with(&|job| job.wish.max_length = None);
        with(&|job| job.wish.min_effective_batch = None);
        with(&|job| job.wish.allow = [true; 3]);
        with(&|job| job.truth_percent = 85);
        with(&|job| job.priority = 0);
        with(&|job| job.vague = false);
        with(&|job| job.killed_each = None);
        with(&|job| job.time_limit = None);
        with(&|job| job.user = 0);
    }
    for fault in 0..script.faults.len() {
        let mut earlier = script.clone();
        earlier.faults[fault].0 /= 2;
        earlier.faults.sort_by_key(|(at, _)| *at);
        if earlier != *script {
            all.push(earlier);
        }
    }
    all
}

fn without_job(script: &Script, gone: usize) -> Script {
    let mut fewer = script.clone();
    fewer.jobs.remove(gone);
    let moved = |job: usize| (job != gone).then_some(if job > gone { job - 1 } else { job });
    for job in &mut fewer.jobs {
        job.after = job.after.and_then(moved);
        job.same_directory_as = job.same_directory_as.and_then(moved);
    }
    fewer.faults.retain_mut(|(_, fault)| match fault {
        Fault::KillRecorder(job)
        | Fault::KillTrainer(job)
        | Fault::KillAttempt(job)
        | Fault::OomKill(job)
        | Fault::PidReused(job)
        | Fault::Cancel(job)
        | Fault::CancelByAnother(job)
        | Fault::Retry(job) => moved(*job).map(|new| *job = new).is_some(),
        Fault::KillDaemon
        | Fault::KillEverything
        | Fault::PowerCut
        | Fault::DiskFull(_)
        | Fault::RecordsRefused(_)
        | Fault::NvmlLost(_)
        | Fault::Neighbour { .. }
        | Fault::CardFails(_)
        | Fault::ClockJump(_)
        | Fault::Drain(_) => true,
    });
    fewer
}
