//! The simulation keeps every promise, and would notice if one were broken.

use mhtrain_job::event::{Record, read_journal};
use mhtrain_job::state::JobState;
use mhtrain_simulation::bugs::Bug;
use mhtrain_simulation::history::Story;
use mhtrain_simulation::invariants::Violation;
use mhtrain_simulation::script::Script;
use mhtrain_simulation::shrink::shrink;
use mhtrain_simulation::world::{Course, run};
use mhtrain_store::{NewJob, Owner, Store};

/// Histories of one test: some seconds without optimisation. `cargo xtask simulate` runs 20,000.
const HISTORIES: u64 = 700;

/// Histories in which a planted mistake must have been seen.
const SEEN_WITHIN: u64 = 2000;

fn course(history: u64) -> Course {
    run(&Script::of(1, history), None, Story::default()).unwrap_or_else(|(violation, _)| {
        panic!("history {history}: {violation}; see `cargo xtask simulate --history {history}`")
    })
}

/// Returns the first history that breaks a promise with this mistake.
fn caught(bug: Bug) -> (Script, Violation) {
    for history in 0..SEEN_WITHIN {
        let script = Script::of(1, history);
        if let Err((violation, _)) = run(&script, Some(bug), Story::default()) {
            return (script, violation);
        }
    }
    panic!("{bug:?} was not seen in {SEEN_WITHIN} histories");
}

#[test]
fn no_promise_is_broken_and_everything_happens() {
    let courses: Vec<Course> = (0..HISTORIES).map(course).collect();
    let sum = |of: fn(&Course) -> u32| courses.iter().map(of).sum::<u32>();
    assert!(sum(|course| course.plans_moved) > 5, "what earlier attempts showed moves no plan");
    let text: String = courses.iter().map(|course| course.journals.concat().concat()).collect();
    assert!(text.contains("its time limit of"), "no time limit ends a job");
    let answers = [
        "lower_tier",
        "wait_same_tier",
        "same_tier_expandable",
        "fewer_workers",
        "lower_eval_batch",
        "backoff",
        "new_port",
        "recipe_stable",
        "previous_checkpoint",
        "other_device",
        "resume",
    ];
    let answers = answers.map(|answer| format!("\"answer\":\"{answer}\",\"after\""));
    let events =
        ["stop_requested", "succeeded", "failed", "cancelled"].map(|it| format!("\"event\":\"{it}\""));
    let resumes = ["exact", "restart", "weights_only"].map(|it| format!("\"resume\":{{\"kind\":\"{it}\""));
    for wanted in answers.iter().chain(&events).chain(&resumes) {
        assert!(text.contains(wanted), "{wanted} does not happen in {HISTORIES} histories");
    }
}

#[test]
fn every_planted_mistake_is_caught_and_told_in_few_lines() {
    for bug in Bug::ALL {
        let (script, violation) = caught(bug);
        let expected = match bug {
            Bug::LostAck => matches!(violation, Violation::Lost { .. }),
            Bug::DoubleStart => {
                matches!(violation, Violation::UnknownTrainer { .. } | Violation::TwoTrainers { .. })
            }
            Bug::LowerTierOnKill => matches!(violation, Violation::LowerTierWithoutOom { .. }),
            Bug::SmallBatchAfterOom => matches!(
                violation,
                Violation::BatchTooSmall { found: 16, .. } | Violation::BatchChanged { found: 16, .. }
            ),
            Bug::TwoJobsOnADevice => {
                matches!(violation, Violation::TwoJobs { .. } | Violation::PromisedTooMuch { .. })
            }
            Bug::SuccessWithoutRows => matches!(violation, Violation::NoSuccess { .. }),
            Bug::PidAlone => matches!(violation, Violation::NotOver { .. }),
            Bug::ForgottenCancel => matches!(violation, Violation::CancelForgotten { .. }),
            Bug::EffectBeforeIntention => matches!(violation, Violation::UnknownTrainer { .. }),
            Bug::TimeBeginsAgain => {
                matches!(violation, Violation::TimeLimitIgnored { .. } | Violation::BeganAfterItsTime { .. })
            }
            Bug::TimeCountedTwice => matches!(violation, Violation::TimeLimitEarly { .. }),
            Bug::TimeLimitCancels | Bug::CancelByAnybody => {
                matches!(violation, Violation::CancelledByNobody { .. })
            }
            Bug::QueueStopsTime => matches!(violation, Violation::WaitsAfterItsTime { .. }),
            Bug::RefusedRecordFails => matches!(violation, Violation::FailedByAccident { .. }),
            Bug::DiskWaitedForForEver => {
                matches!(violation, Violation::NotOver { .. } | Violation::CancelForgotten { .. })
            }
            Bug::NoLimitPerUser => matches!(violation, Violation::TooManyOfAUser { .. }),
            Bug::LimitOfAllUsers => matches!(violation, Violation::RefusedWithRoom { .. }),
            Bug::KeyOfAnybody => matches!(violation, Violation::OthersJob { .. }),
            Bug::LearnedFromOthers => matches!(violation, Violation::LearnedFromOthers { .. }),
            Bug::CensoredAsPeak => matches!(violation, Violation::NotShown { .. }),
            Bug::LearnedTwice => matches!(violation, Violation::LearnedTwice { .. }),
        };
        assert!(expected, "{bug:?} was taken for something else: {violation}");
        let before = (script.faults.len(), script.jobs.len());
        let (small, again, course) = shrink(&script, Some(bug), violation.clone());
        assert_eq!(std::mem::discriminant(&again), std::mem::discriminant(&violation), "{bug:?}");
        assert!((small.faults.len(), small.jobs.len()) <= before, "{bug:?} became larger");
        assert!(small.faults.len() <= 4, "{bug:?} needs {:?}", small.faults);
        let lines = course.story.lines().len();
        assert!((2..=120).contains(&lines), "{bug:?} is told in {lines} lines");
    }
}

#[test]
fn the_same_number_is_the_same_history() {
    for history in 0..20 {
        let tell = || match run(&Script::of(7, history), None, Story::kept()) {
            Ok(course) | Err((_, course)) => course,
        };
        let (first, second) = (tell(), tell());
        assert_eq!(first.story.lines(), second.story.lines());
        assert_eq!(first.journals, second.journals);
    }
}

/// The simulated store is text and the fold. The real one is SQLite, a summary and the same fold.
#[test]
fn the_real_store_takes_every_history_and_reads_the_same_states() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let mut expected = Vec::new();
    for history in 0..40 {
        for lines in course(history).journals {
            let records = read_journal(&lines.concat()).unwrap();
            let id = store.submit(&new_job(&records[0])).unwrap().id;
            let rest: Vec<_> = records[1..].iter().map(|record| (id, record.clone())).collect();
            for written in store.append_all(&rest).unwrap() {
                written.unwrap();
            }
            expected.push((id, JobState::fold(records.iter().map(|record| &record.event)).unwrap(), records));
        }
    }
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    for (id, state, records) in expected {
        let row = store.job(id).unwrap().row;
        assert_eq!(store.events(id).unwrap(), records);
        assert_eq!(store.state(id).unwrap(), state);
        assert_eq!((row.state.as_str(), row.attempts, row.is_final), (state.name(), state.attempts(), true));
    }
    assert!(store.unfinished().unwrap().is_empty());
}

fn new_job(record: &Record) -> NewJob {
    NewJob {
        owner: Owner { uid: 1000, gid: 100, name: "ada".to_owned() },
        key: None,
        record: record.clone(),
        name: "simulated".to_owned(),
        priority: 0,
        context: serde_json::json!({}),
    }
}
