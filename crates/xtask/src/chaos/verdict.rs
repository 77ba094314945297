//! Did the daemon keep its promises, by the word of those who do not know it?
//!
//! What was asked is known to whoever asked, what was trained is told by the trainers, and whom we killed we know
//! ourselves. The daemon's own account is compared with that.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// Steps of every job of the trials: 320 rows in batches of 32, once.
pub(super) const STEPS: u64 = 10;

/// A line that a trainer wrote about itself.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Testimony {
    /// Seconds of CLOCK_MONOTONIC.
    pub(super) at: f64,
    pub(super) pid: u32,
    /// Name of the job.
    pub(super) job: String,
    #[serde(flatten)]
    pub(super) what: What,
}

/// What a trainer says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(super) enum What {
    Start,
    /// Another trainer of the same job, or on the same card, was alive when this one started.
    Beside {
        of: String,
    },
    Step {
        step: u64,
    },
    Saved {
        step: u64,
    },
    End {
        code: i32,
    },
}

/// How a job ends when nobody cancels it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It trains all steps.
    Succeeds,
    /// Its trainer runs out of memory at a step; on a lower rung it trains all steps.
    RunsOutOfMemory,
    /// Its trainer fails for good.
    Fails,
}

/// A cancel that was tried.
#[derive(Copy, Clone, Debug, PartialEq)]
pub(super) struct Cancel {
    /// It was acknowledged, and no step may end later than this.
    pub(super) over_by: Option<f64>,
}

/// A job that was asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) name: String,
    pub(super) fate: Fate,
    /// Every id that an acknowledgement named.
    pub(super) ids: BTreeSet<u64>,
    pub(super) cancel: Option<Cancel>,
}

/// A job as the daemon tells of it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Found {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
}

impl Found {
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state.as_str(), "succeeded" | "failed" | "cancelled")
    }
}

/// Whom we killed ourselves.
#[derive(Debug, Default)]
pub(super) struct Killed {
    /// Pids of trainers.
    pub(super) trainers: BTreeSet<u32>,
    /// Ids of the jobs of recorders, one for each.
    pub(super) recorders: Vec<u64>,
}

/// Which promise was broken.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// An acknowledged job is not there, or is there under two numbers.
    Lost,
    /// Something was trained twice, or beside something else.
    Twice,
    /// A state that is not so.
    Wrong,
    /// Something that would need a person.
    Manual,
    /// A process or file that nobody needs any more.
    LeftBehind,
}

/// A broken promise.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) kind: Kind,
    /// The job, where it is about one.
    pub(super) job: Option<String>,
    pub(super) what: String,
}

/// Returns every broken promise.
pub(super) fn judge(asked: &[Asked], found: &[Found], told: &[Testimony], killed: &Killed) -> Vec<Fault> {
    let mut faults = Vec::new();
    for asked in asked {
        let named: Vec<&Found> = found.iter().filter(|job| job.name == asked.name).collect();
        let mut fault = |kind, what: String| faults.push(Fault { kind, job: Some(asked.name.clone()), what });
        if asked.ids.len() != 1 || named.len() != 1 || !asked.ids.contains(&named[0].id) {
            let there: Vec<u64> = named.iter().map(|job| job.id).collect();
            fault(Kind::Lost, format!("acknowledged as {:?}, there as {there:?}", asked.ids));
            continue;
        }
        let said: Vec<&Testimony> = told.iter().filter(|line| line.job == asked.name).collect();
        let runs = runs(&said, killed);
        let recorders = killed.recorders.iter().filter(|id| **id == named[0].id).count();
        for what in trained_twice(asked, &runs, recorders) {
            fault(Kind::Twice, what);
        }
        for (kind, what) in wrong_state(asked, named[0], &runs) {
            fault(kind, what);
        }
    }
    faults
}

/// One trainer's life.
#[derive(Debug, Default)]
struct Run {
    pid: u32,
    beside: Vec<String>,
    steps: Vec<(u64, f64)>,
    saved: Vec<u64>,
    code: Option<i32>,
    /// We killed it. It may have said how it ends just before that; the kernel then says that a signal ended it.
    killed: bool,
}

impl Run {
    fn did_all(&self) -> bool {
        self.code == Some(0) && self.steps.last().is_some_and(|(step, _)| *step == STEPS)
    }
}

/// Returns the trainers of a job in the order of their starts.
fn runs(said: &[&Testimony], killed: &Killed) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    // Where a pid is used again, the later run is meant.
    let mut by_pid = BTreeMap::new();
    for line in said {
        if line.what == What::Start {
            by_pid.insert(line.pid, runs.len());
            runs.push(Run { pid: line.pid, killed: killed.trainers.contains(&line.pid), ..Run::default() });
        }
        let Some(run) = by_pid.get(&line.pid).map(|at| &mut runs[*at]) else { continue };
        match &line.what {
            What::Start => {}
            What::Beside { of } => run.beside.push(of.clone()),
            What::Step { step } => run.steps.push((*step, line.at)),
            What::Saved { step } => run.saved.push(*step),
            What::End { code } => run.code = Some(*code),
        }
    }
    runs
}

fn trained_twice(asked: &Asked, runs: &[Run], recorders: usize) -> Vec<String> {
    let mut faults = Vec::new();
    for run in runs {
        faults.extend(run.beside.iter().map(|of| format!("pid {} started while {of} was held", run.pid)));
        let goes_on = run.steps.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1);
        if !goes_on {
            faults.push(format!("pid {} trained its steps out of order: {:?}", run.pid, run.steps));
        }
    }
    let (mut saved, mut done) = (BTreeSet::new(), 0);
    let mut excused = recorders;
    for pair in runs.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        saved.extend(before.saved.iter().copied());
        done = done.max(before.steps.last().map_or(0, |(step, _)| *step));
        let explained = match before.code {
            _ if before.killed => true,
            None => false,
            Some(_) if before.did_all() => false,
            Some(_) if asked.fate == Fate::RunsOutOfMemory => true,
            // A failure whose status died with its recorder may be taken for an interruption.
            Some(_) => {
                let before = excused;
                excused = excused.saturating_sub(1);
                before > 0
            }
        };
        if !explained {
            let how = before.code.map_or("nobody killed".to_owned(), |code| format!("ended with {code}"));
            faults.push(format!("pid {} was started after pid {}, which {how}", after.pid, before.pid));
        }
        let Some((first, _)) = after.steps.first() else { continue };
        // A trainer killed right after a save could not tell of it; one of the last step cannot be resumed.
        let from = saved.range(..STEPS).next_back().copied().unwrap_or(0);
        if *first <= from || *first > done + 1 {
            faults.push(format!(
                "pid {} went on with step {first}, when {done} steps were done and {from} of them saved",
                after.pid
            ));
        }
    }
    faults
}

fn wrong_state(asked: &Asked, found: &Found, runs: &[Run]) -> Vec<(Kind, String)> {
    let mut faults = Vec::new();
    let state = found.state.as_str();
    let reason = found.reason.as_deref().unwrap_or("no reason");
    if !found.is_over() {
        faults.push((Kind::Manual, format!("it is still {state}: {reason}")));
        return faults;
    }
    let did_all = runs.last().is_some_and(Run::did_all);
    let steps: BTreeSet<u64> = runs.iter().flat_map(|run| run.steps.iter().map(|(step, _)| *step)).collect();
    let all_steps = steps.len() as u64 == STEPS;
    if state == "succeeded" && !(did_all && all_steps) {
        faults.push((Kind::Wrong, format!("it is called succeeded after the steps {steps:?}")));
    }
    if state != "succeeded" && did_all && !runs.last().is_some_and(|run| run.killed) {
        faults
            .push((Kind::Wrong, format!("its trainer did all and ended well, and it is {state}: {reason}")));
    }
    let expected = if asked.fate == Fate::Fails { "failed" } else { "succeeded" };
    let cancelled = state == "cancelled" && asked.cancel.is_some();
    if state != expected && !cancelled {
        faults.push((Kind::Wrong, format!("it should be {expected}, and is {state}: {reason}")));
    }
    if let Some(Cancel { over_by: Some(over_by) }) = asked.cancel {
        let late: Vec<u64> = runs
            .iter()
            .flat_map(|run| run.steps.iter().filter(|(_, at)| *at > over_by).map(|(step, _)| *step))
            .collect();
        if !late.is_empty() {
            faults
                .push((Kind::Wrong, format!("after its acknowledged cancel it trained the steps {late:?}")));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(fate: Fate) -> Asked {
        Asked { name: "a".to_owned(), fate, ids: [7].into(), cancel: None }
    }

    fn found(state: &str) -> Found {
        Found { id: 7, name: "a".to_owned(), state: state.to_owned(), reason: None }
    }

    /// A life of a trainer: its steps, each third one saved, and its end.
    fn life(pid: u32, steps: std::ops::RangeInclusive<u64>, code: Option<i32>) -> Vec<Testimony> {
        let mut what = vec![What::Start];
        for step in steps {
            what.push(What::Step { step });
            if step % 3 == 0 || step == STEPS {
                what.push(What::Saved { step });
            }
        }
        what.extend(code.map(|code| What::End { code }));
        what.into_iter().map(|what| Testimony { at: 1.0, pid, job: "a".to_owned(), what }).collect()
    }

    fn kinds(asked: Asked, found: &[Found], told: &[Vec<Testimony>], killed: &[u32]) -> Vec<Kind> {
        let killed = Killed { trainers: killed.iter().copied().collect(), recorders: Vec::new() };
        judge(&[asked], found, &told.concat(), &killed).into_iter().map(|fault| fault.kind).collect()
    }

    #[test]
    fn what_is_as_it_should_be_is_no_fault() {
        let good = || asked(Fate::Succeeds);
        let succeeded = [found("succeeded")];
        assert_eq!(kinds(good(), &succeeded, &[life(1, 1..=10, Some(0))], &[]), []);
        // Killed at step 5, gone on from the third.
        assert_eq!(kinds(good(), &succeeded, &[life(1, 1..=5, None), life(2, 4..=10, Some(0))], &[1]), []);
        // Killed after the save of the last step, which is trained again.
        assert_eq!(kinds(good(), &succeeded, &[life(1, 1..=10, None), life(2, 10..=10, Some(0))], &[1]), []);
        // Killed when it had said how it ends, and had not ended.
        assert_eq!(
            kinds(
                asked(Fate::Fails),
                &[found("failed")],
                &[life(1, 1..=2, Some(1)), life(2, 1..=2, Some(1))],
                &[1]
            ),
            []
        );
        let oom = [life(1, 1..=4, Some(1)), life(2, 4..=10, Some(0))];
        assert_eq!(kinds(asked(Fate::RunsOutOfMemory), &succeeded, &oom, &[]), []);
        assert_eq!(kinds(asked(Fate::Fails), &[found("failed")], &[life(1, 1..=2, Some(1))], &[]), []);
    }

    #[test]
    fn each_broken_promise_is_seen() {
        let good = || asked(Fate::Succeeds);
        let succeeded = [found("succeeded")];
        let whole = life(1, 1..=10, Some(0));
        assert_eq!(kinds(good(), &[], &[], &[]), [Kind::Lost]);
        let twice_there = [found("succeeded"), Found { id: 8, ..found("succeeded") }];
        assert_eq!(kinds(good(), &twice_there, std::slice::from_ref(&whole), &[]), [Kind::Lost]);
        // Started again although it had done everything, although nobody killed it, and too far back.
        assert!(
            kinds(good(), &succeeded, &[whole.clone(), life(2, 1..=10, Some(0))], &[]).contains(&Kind::Twice)
        );
        assert_eq!(
            kinds(good(), &succeeded, &[life(1, 1..=5, None), life(2, 4..=10, Some(0))], &[]),
            [Kind::Twice]
        );
        assert_eq!(
            kinds(good(), &succeeded, &[life(1, 1..=7, None), life(2, 4..=10, Some(0))], &[1]),
            [Kind::Twice]
        );
        let beside = Testimony {
            at: 1.0,
            pid: 1,
            job: "a".to_owned(),
            what: What::Beside { of: "card-0".to_owned() },
        };
        assert_eq!(kinds(good(), &succeeded, &[whole.clone(), vec![beside]], &[]), [Kind::Twice]);
        assert_eq!(kinds(good(), &[found("running")], std::slice::from_ref(&whole), &[]), [Kind::Manual]);
        assert!(kinds(good(), &succeeded, &[life(1, 1..=9, Some(0))], &[]).contains(&Kind::Wrong));
        assert!(kinds(good(), &[found("failed")], std::slice::from_ref(&whole), &[]).contains(&Kind::Wrong));
        assert_eq!(kinds(good(), &[found("cancelled")], &[life(1, 1..=2, None)], &[]), [Kind::Wrong]);
        let late = Asked { cancel: Some(Cancel { over_by: Some(0.5) }), ..good() };
        assert_eq!(kinds(late, &succeeded, &[whole], &[]), [Kind::Wrong]);
    }
}
