//! Where does a process go on that takes a job over?
//!
//! Of the process before nothing is left but the job's events, and perhaps a trainer. The last event says what may be out
//! there, because each intention is recorded before its effect.

use std::collections::BTreeSet;

use crate::diagnosis::{Answer, Diagnosis, Kind};
use crate::event::{AttemptStart, Exit, JobEvent, Record};
use crate::rerun::{Adjustment, History, ResumeWish, Wait};
use crate::state::{IllegalEvent, JobState};

/// What comes next for a job.
#[derive(Clone, Debug, PartialEq)]
pub enum GoesOn {
    /// Nothing happened yet beside the submission.
    Begin,
    /// An attempt is followed to its end, if it ever was more than an intention.
    Follow(AttemptStart),
    /// An attempt ended, and what follows on that is not decided.
    Judge {
        /// The attempt.
        start: AttemptStart,
        /// How its trainer ended.
        exit: Exit,
        /// Why.
        diagnosis: Diagnosis,
    },
    /// An attempt is started.
    Start(NextAttempt),
    /// Somebody asked for the end, and nothing lives any more.
    Cancel,
}

/// An attempt that is to be started.
#[derive(Clone, Debug, PartialEq)]
pub struct NextAttempt {
    /// Index of its rung on the ladder that the events speak of; `None`: the rung that was planned.
    pub rung: Option<usize>,
    /// What is changed beside the rung.
    pub adjustments: Vec<Adjustment>,
    /// From where it should go on.
    pub resume: ResumeWish,
    /// What must pass before it starts.
    pub wait: Wait,
}

/// Why a job cannot be gone on with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// Its events contradict each other.
    #[error(transparent)]
    Illegal(#[from] IllegalEvent),
    /// It is over.
    #[error("a job that is over cannot be continued")]
    Over,
    /// An attempt lives or ended, and no event says that it was started.
    #[error("an attempt without its start")]
    NoStart,
}

/// Returns where a job with these events goes on.
///
/// # Errors
/// A job that is over, and events that contradict each other.
pub fn goes_on(records: &[Record]) -> Result<GoesOn, Contradiction> {
    let state = JobState::fold(events(records))?;
    if records.len() == 1 {
        return Ok(GoesOn::Begin);
    }
    // An end that nobody judged may be a success: a stop that came too late takes it from nobody.
    let unjudged = matches!(state, JobState::Recovering { rerun: None, .. });
    if state.stop().is_some() && !unjudged && !state.has_live_attempt() {
        return Ok(GoesOn::Cancel);
    }
    match state {
        JobState::Starting { attempt, .. } | JobState::Running { attempt, .. } => {
            let start = last_start(records).filter(|start| start.attempt == attempt.number);
            Ok(GoesOn::Follow(start.ok_or(Contradiction::NoStart)?.clone()))
        }
        JobState::Recovering { rerun: None, .. } => {
            let ended = events(records).rev().find_map(|event| match event {
                JobEvent::AttemptEnded { exit, diagnosis, .. } => Some((exit, diagnosis)),
                _ => None,
            });
            let (start, (exit, diagnosis)) = last_start(records).zip(ended).ok_or(Contradiction::NoStart)?;
            Ok(GoesOn::Judge {
                start: start.clone(),
                exit: exit.clone(),
                diagnosis: diagnosis.as_ref().clone(),
            })
        }
        JobState::Recovering { rerun: Some(_), .. } | JobState::Queued { .. } | JobState::Waiting { .. } => {
            let history = History::from_events(events(records));
            // On another card it was sized anew.
            let begins = last_start(records).is_none() || is_planned_anew(records);
            let decided = events(records).rev().find_map(|event| match event {
                JobEvent::RerunDecided(rerun) => Some(rerun),
                _ => None,
            });
            Ok(GoesOn::Start(NextAttempt {
                rung: (!begins).then_some(history.rung),
                adjustments: history.adjustments,
                resume: decided.map_or(ResumeWish::Latest, |rerun| rerun.resume),
                wait: decided.map_or(Wait::None, |rerun| rerun.wait),
            }))
        }
        JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled { .. } => {
            Err(Contradiction::Over)
        }
    }
}

/// Where a job belongs when a daemon starts.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It has a device, which it had before, or its attempt may still be there.
    OnDevice,
    /// It waits for one.
    InQueue,
    /// Somebody asked for its end before anything was started: it is over.
    Cancelled,
}

/// Returns where a job with these events belongs when a daemon starts. `sized`: whether what it was sized as can be read.
///
/// # Errors
/// Events that contradict each other.
pub fn place(records: &[Record], sized: bool) -> Result<Place, Contradiction> {
    let state = JobState::fold(events(records))?;
    if state.stop().is_some()
        && state.attempts() == 0
        && matches!(state, JobState::Queued { .. } | JobState::Waiting { .. })
    {
        return Ok(Place::Cancelled);
    }
    let began = state.attempts() > 0 || state.has_live_attempt();
    Ok(if sized && began && !needs_other_device(records) { Place::OnDevice } else { Place::InQueue })
}

/// Returns the start of the last attempt.
pub fn last_start(records: &[Record]) -> Option<&AttemptStart> {
    events(records).rev().find_map(|event| match event {
        JobEvent::AttemptStarting(start) => Some(start),
        _ => None,
    })
}

/// Returns the attempts that were made, oldest first, each with why it ended; `None` where it has not.
pub fn attempts_made(records: &[Record]) -> Vec<(&AttemptStart, Option<Kind>)> {
    let mut made: Vec<(&AttemptStart, Option<Kind>)> = Vec::new();
    for event in events(records) {
        match (event, made.last_mut()) {
            (JobEvent::AttemptStarting(start), _) => made.push((start, None)),
            (JobEvent::AttemptEnded { diagnosis, .. }, Some(last)) => last.1 = Some(diagnosis.kind),
            _ => {}
        }
    }
    made
}

/// Returns the steps whose checkpoint an attempt could not read.
pub fn unreadable_steps(records: &[Record]) -> BTreeSet<u64> {
    let mut begun_at = None;
    let mut unreadable = BTreeSet::new();
    for event in events(records) {
        match event {
            JobEvent::AttemptStarting(start) => {
                begun_at = start.resume.as_ref().map(|resume| resume.from_step)
            }
            JobEvent::RerunDecided(rerun) if rerun.answer == Answer::PreviousCheckpoint => {
                unreadable.extend(begun_at);
            }
            _ => {}
        }
    }
    unreadable
}

/// Returns whether a job waits for another card: it left one that failed, and was not sized for the next one yet.
pub fn needs_other_device(records: &[Record]) -> bool {
    let last = events(records).rev().find(|event| {
        matches!(event, JobEvent::Planned { .. } | JobEvent::RerunDecided(_) | JobEvent::AttemptStarting(_))
    });
    matches!(last, Some(JobEvent::RerunDecided(rerun)) if rerun.answer == Answer::OtherDevice)
}

/// Returns whether the job was sized for another card after it left one.
fn is_planned_anew(records: &[Record]) -> bool {
    let last = |wanted: fn(&JobEvent) -> bool| events(records).rposition(wanted);
    let planned = last(|event| matches!(event, JobEvent::Planned { .. }));
    let decided = last(|event| matches!(event, JobEvent::RerunDecided(_)));
    let started = last(|event| matches!(event, JobEvent::AttemptStarting(_)));
    decided.is_some() && planned > decided && planned > started
}

fn events(records: &[Record]) -> impl DoubleEndedIterator<Item = &JobEvent> + ExactSizeIterator {
    records.iter().map(|record| &record.event)
}

#[cfg(test)]
mod tests {
    use mhtrain_sizing::tier::Profile;

    use super::*;
    use crate::event::{Resume, ResumeKind};
    use crate::rerun::Rerun;
    use crate::testing::{diagnosis, tier};

    fn records(events: Vec<JobEvent>) -> Vec<Record> {
        let submitted = JobEvent::Submitted { spec: serde_json::json!({"model": "m"}) };
        let all = std::iter::once(submitted).chain(events);
        all.map(|event| Record::new("2026-01-02T03:04:05Z".to_owned(), event)).collect()
    }

    fn start(attempt: u32, rung: usize) -> JobEvent {
        let tier = tier(Profile::Standard, 8, 4);
        JobEvent::AttemptStarting(AttemptStart { attempt, rung, tier, resume: None, adjustments: Vec::new() })
    }

    fn ended(attempt: u32, kind: Kind) -> JobEvent {
        let diagnosis = Box::new(diagnosis(kind));
        JobEvent::AttemptEnded { attempt, exit: Exit::Code { code: 1 }, diagnosis, last_step: Some(3) }
    }

    fn decided(answer: Answer, rung: usize) -> JobEvent {
        JobEvent::RerunDecided(Rerun {
            rung,
            answer,
            after: Kind::DeviceOom,
            certain: true,
            adjustments: Vec::new(),
            wait: Wait::Seconds(5),
            resume: ResumeWish::FromStart,
            reason: "because".to_owned(),
        })
    }

    fn planned() -> JobEvent {
        let tier = tier(Profile::Standard, 8, 4);
        JobEvent::Planned { chosen: 0, rungs: 3, tier, sized: None }
    }

    fn stop() -> JobEvent {
        JobEvent::StopRequested { by: crate::stop::CANCEL.to_owned() }
    }

    #[test]
    fn each_place_in_a_life_is_gone_on_from() {
        assert_eq!(goes_on(&records(vec![])).unwrap(), GoesOn::Begin);
        let first = goes_on(&records(vec![planned()])).unwrap();
        assert!(matches!(first, GoesOn::Start(NextAttempt { rung: None, wait: Wait::None, .. })));
        let alive = goes_on(&records(vec![planned(), start(1, 0)])).unwrap();
        assert!(matches!(alive, GoesOn::Follow(AttemptStart { attempt: 1, .. })));
        let dead = goes_on(&records(vec![planned(), start(1, 0), ended(1, Kind::Network)])).unwrap();
        assert!(matches!(dead, GoesOn::Judge { .. }), "{dead:?}");
        let oom = vec![planned(), start(1, 0), ended(1, Kind::DeviceOom), decided(Answer::LowerTier, 2)];
        let GoesOn::Start(next) = goes_on(&records(oom)).unwrap() else { panic!("no start") };
        assert_eq!((next.rung, next.resume, next.wait), (Some(2), ResumeWish::FromStart, Wait::Seconds(5)));
    }

    #[test]
    fn a_stop_ends_what_does_not_live_and_takes_no_success() {
        assert_eq!(goes_on(&records(vec![planned(), stop()])).unwrap(), GoesOn::Cancel);
        let alive = goes_on(&records(vec![planned(), start(1, 0), stop()])).unwrap();
        assert!(matches!(alive, GoesOn::Follow(_)));
        let unjudged = vec![planned(), start(1, 0), stop(), ended(1, Kind::Success)];
        assert!(matches!(goes_on(&records(unjudged)).unwrap(), GoesOn::Judge { .. }));
    }

    #[test]
    fn a_card_that_failed_is_left_and_the_next_one_is_sized_for() {
        let mut left =
            vec![planned(), start(1, 0), ended(1, Kind::DeviceFault), decided(Answer::OtherDevice, 0)];
        assert_eq!(place(&records(left.clone()), true).unwrap(), Place::InQueue);
        left.push(planned());
        assert_eq!(place(&records(left.clone()), true).unwrap(), Place::OnDevice);
        let GoesOn::Start(next) = goes_on(&records(left)).unwrap() else { panic!("no start") };
        assert_eq!(next.rung, None, "the rung of the new plan");
    }

    #[test]
    fn a_checkpoint_that_could_not_be_read_is_known_whoever_goes_on() {
        let resumed = |attempt, from_step| {
            let resume = Resume { kind: ResumeKind::Exact, checkpoint: None, from_step, steps_repeated: 0 };
            let JobEvent::AttemptStarting(start) = start(attempt, 0) else { panic!("no start") };
            JobEvent::AttemptStarting(AttemptStart { resume: Some(resume), ..start })
        };
        let mut life = vec![planned(), resumed(2, 16), ended(2, Kind::CheckpointCorrupt)];
        life.push(decided(Answer::PreviousCheckpoint, 0));
        life.extend([resumed(3, 14), ended(3, Kind::Interrupted), decided(Answer::Resume, 0)]);
        let life = records(life);
        assert_eq!(unreadable_steps(&life), BTreeSet::from([16]));
        let made: Vec<_> =
            attempts_made(&life).into_iter().map(|(start, end)| (start.attempt, end)).collect();
        assert_eq!(made, [(2, Some(Kind::CheckpointCorrupt)), (3, Some(Kind::Interrupted))]);
    }

    #[test]
    fn what_was_not_started_stands_in_the_queue() {
        assert_eq!(place(&records(vec![planned()]), true).unwrap(), Place::InQueue);
        assert_eq!(place(&records(vec![planned(), stop()]), true).unwrap(), Place::Cancelled);
        assert_eq!(place(&records(vec![planned(), start(1, 0)]), false).unwrap(), Place::InQueue);
        assert_eq!(place(&records(vec![planned(), start(1, 0)]), true).unwrap(), Place::OnDevice);
    }
}
