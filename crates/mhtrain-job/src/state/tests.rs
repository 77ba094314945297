use mhtrain_sizing::tier::Profile;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::diagnosis::Answer;
use crate::event::{EVENT_VERSION, Exit, JournalError, Record, read_journal};
use crate::rerun::{Adjustment, Rerun, ResumeWish, Wait};
use crate::testing::{diagnosis, tier};

fn submitted() -> JobEvent {
    JobEvent::Submitted { spec: json!({"model": "m", "dataset": ["d"]}) }
}

fn planned() -> JobEvent {
    JobEvent::Planned { chosen: 1, rungs: 6, tier: tier(Profile::Standard, 8, 4), sized: None }
}

fn waiting() -> JobEvent {
    JobEvent::Waiting { reason: "the card is taken".to_owned() }
}

fn starting(attempt: u32) -> JobEvent {
    JobEvent::AttemptStarting(AttemptStart {
        attempt,
        rung: 1,
        tier: tier(Profile::Standard, 8, 4),
        resume: None,
        adjustments: vec![Adjustment::DataloaderWorkers(2)],
    })
}

fn started(attempt: u32) -> JobEvent {
    let process = ProcessIdentity { pid: 4121, start_time: 99, boot_id: "b".to_owned() };
    JobEvent::Started { attempt, process }
}

fn ended(attempt: u32) -> JobEvent {
    JobEvent::AttemptEnded {
        attempt,
        exit: Exit::Code { code: 1 },
        diagnosis: Box::new(diagnosis(Kind::DeviceOom)),
        last_step: Some(7),
    }
}

fn decided() -> JobEvent {
    JobEvent::RerunDecided(Rerun {
        rung: 2,
        answer: Answer::LowerTier,
        after: Kind::DeviceOom,
        certain: true,
        adjustments: Vec::new(),
        wait: Wait::Seconds(30),
        resume: ResumeWish::Latest,
        reason: "one rung lower".to_owned(),
    })
}

fn stop() -> JobEvent {
    JobEvent::StopRequested { by: "Ctrl-C".to_owned() }
}

fn succeeded() -> JobEvent {
    JobEvent::Succeeded { proof: json!({"global_step": 10}) }
}

fn failed() -> JobEvent {
    JobEvent::Failed { reason: "no rung is left".to_owned(), help: None }
}

fn cancelled() -> JobEvent {
    JobEvent::Cancelled { reason: "Ctrl-C".to_owned() }
}

fn state_after(events: &[JobEvent]) -> JobState {
    JobState::fold(events).unwrap()
}

#[test]
fn a_job_that_survives_an_oom_passes_through_recovering() {
    let mut events = Vec::new();
    let mut names = Vec::new();
    for event in [
        submitted(),
        planned(),
        waiting(),
        starting(1),
        started(1),
        ended(1),
        decided(),
        starting(2),
        started(2),
        ended(2),
        succeeded(),
    ] {
        events.push(event);
        names.push(state_after(&events).name());
    }
    assert_eq!(
        names,
        [
            "queued",
            "queued",
            "waiting",
            "starting",
            "running",
            "recovering",
            "recovering",
            "starting",
            "running",
            "recovering",
            "succeeded",
        ]
    );
    assert_eq!(state_after(&events).attempts(), 2);
}

#[test]
fn every_state_but_running_has_a_reason() {
    let life = [submitted(), waiting(), starting(1), started(1), ended(1), decided(), failed()];
    for end in 1..=life.len() {
        let state = state_after(&life[..end]);
        assert_eq!(state.reason().is_none(), state.name() == "running", "{state:?}");
    }
    assert_eq!(state_after(&life[..6]).reason().as_deref(), Some("one rung lower"));
}

#[test]
fn after_a_stop_request_no_attempt_starts_and_the_job_can_be_cancelled() {
    for life in [vec![submitted()], vec![submitted(), waiting()], vec![submitted(), starting(1), ended(1)]] {
        let state = state_after(&life).next(&stop()).unwrap();
        assert_eq!(state.stop(), Some("Ctrl-C"));
        let next = state.attempts() + 1;
        assert_eq!(state.next(&starting(next)), Err(IllegalEvent::StopsAlready { attempt: next }));
        assert_eq!(state.next(&cancelled()).unwrap().name(), "cancelled");
    }
}

#[test]
fn a_stop_request_survives_the_end_of_the_attempt() {
    let state = state_after(&[submitted(), starting(1), stop(), started(1), ended(1), decided()]);
    assert_eq!((state.name(), state.stop()), ("recovering", Some("Ctrl-C")));
}

#[test]
fn a_job_does_not_end_while_its_trainer_may_live() {
    for life in [vec![submitted(), starting(1)], vec![submitted(), starting(1), started(1)]] {
        for event in [failed(), cancelled(), succeeded(), starting(2), waiting(), submitted()] {
            assert!(state_after(&life).next(&event).is_err(), "{event:?}");
        }
    }
}

#[test]
fn an_event_about_another_attempt_is_refused() {
    let running = state_after(&[submitted(), starting(1), started(1)]);
    assert_eq!(
        running.next(&ended(2)),
        Err(IllegalEvent::WrongAttempt { event: "attempt_ended", found: 2, expected: 1 })
    );
    assert!(state_after(&[submitted()]).next(&starting(2)).is_err(), "the first attempt is number 1");
    assert!(state_after(&[submitted(), starting(1), ended(1)]).next(&starting(1)).is_err());
}

#[test]
fn a_job_begins_with_submitted() {
    assert_eq!(JobState::fold(&[]), Err(IllegalEvent::NoBeginning { found: "nothing" }));
    assert_eq!(JobState::fold(&[starting(1)]), Err(IllegalEvent::NoBeginning { found: "attempt_starting" }));
}

#[test]
fn a_job_without_a_plan_fails_from_the_queue() {
    assert_eq!(state_after(&[submitted(), failed()]).name(), "failed");
}

fn every_event() -> Vec<JobEvent> {
    vec![
        submitted(),
        planned(),
        waiting(),
        starting(1),
        started(1),
        ended(1),
        decided(),
        stop(),
        succeeded(),
        failed(),
        cancelled(),
    ]
}

fn journal(events: &[JobEvent]) -> String {
    events
        .iter()
        .map(|event| Record::new("2026-01-02T03:04:05Z".to_owned(), event.clone()).to_line())
        .collect()
}

#[test]
fn every_event_is_read_back_from_its_line_under_its_own_name() {
    for event in every_event() {
        let line = journal(std::slice::from_ref(&event));
        assert!(line.contains(&format!("\"event\":\"{}\"", event.name())), "{line}");
        assert_eq!(read_journal(&line).unwrap()[0].event, event);
    }
}

#[test]
fn a_torn_last_line_is_not_there_and_a_torn_line_inside_is_an_error() {
    let text = journal(&[submitted(), waiting()]);
    for cut in 0..text.len() {
        let whole = text[..cut].matches('\n').count();
        assert_eq!(read_journal(&text[..cut]).unwrap().len(), whole, "cut at {cut}");
    }
    let error = read_journal(&format!("{{\"v\":1,\n{text}")).unwrap_err();
    assert!(matches!(error, JournalError::NotARecord { line: 1, .. }), "{error}");
}

#[test]
fn a_journal_of_a_later_version_is_refused() {
    let line = "{\"v\":2,\"at\":\"\",\"event\":\"something_new\"}\n";
    assert!(matches!(read_journal(line), Err(JournalError::TooNew { line: 1, found: 2 })));
    assert_eq!(EVENT_VERSION, 1);
}

/// A journal of version 1 as it was first written: it must be readable for ever.
#[test]
fn a_journal_of_version_1_is_readable() {
    let records = read_journal(include_str!("../../tests/fixtures/journal-v1.jsonl")).unwrap();
    let events: Vec<_> = records.into_iter().map(|record| record.event).collect();
    assert_eq!(JobState::fold(&events).unwrap().name(), "succeeded");
    assert_eq!(events.iter().map(JobEvent::name).collect::<std::collections::BTreeSet<_>>().len(), 8);
}

#[test]
fn states_are_read_back_from_json() {
    let life = [submitted(), waiting(), starting(1), started(1), ended(1), decided(), succeeded()];
    for end in 1..=life.len() {
        let state = state_after(&life[..end]);
        let json = serde_json::to_value(&state).unwrap();
        assert_eq!(json["state"], state.name());
        assert_eq!(serde_json::from_value::<JobState>(json).unwrap(), state);
    }
}

fn any_event() -> impl Strategy<Value = JobEvent> {
    (0..11_usize, 1..6_u32).prop_map(|(which, attempt)| match which {
        3 => starting(attempt),
        4 => started(attempt),
        5 => ended(attempt),
        other => every_event()[other].clone(),
    })
}

proptest! {
    #[test]
    fn attempts_grow_by_one_and_never_two_live(events in proptest::collection::vec(any_event(), 0..200)) {
        let mut state = JobState::begin(&submitted()).unwrap();
        for event in &events {
            let Ok(next) = state.next(event) else { continue };
            prop_assert!(!state.is_final(), "a final state took {}", event.name());
            let starts = matches!(event, JobEvent::AttemptStarting(_));
            prop_assert_eq!(next.attempts(), state.attempts() + u32::from(starts));
            if starts {
                prop_assert!(!state.has_live_attempt() && state.stop().is_none());
            }
            if next.is_final() {
                prop_assert!(!state.has_live_attempt());
            }
            if state.stop().is_some() && !next.is_final() {
                prop_assert_eq!(next.stop(), state.stop());
            }
            state = next;
        }
    }

    #[test]
    fn final_states_accept_nothing(event in any_event(), which in 0..3_usize) {
        let last = [succeeded(), failed(), cancelled()][which].clone();
        let state = state_after(&[submitted(), starting(1), ended(1), last]);
        prop_assert!(state.is_final());
        prop_assert!(state.next(&event).is_err());
    }

    #[test]
    fn reading_a_damaged_journal_never_panics(cut in 0..2000_usize, byte in any::<char>()) {
        let mut text = journal(&every_event());
        let at = (0..=cut.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap();
        text.insert(at, byte);
        let _ = read_journal(&text);
    }
}

#[test]
fn every_name_of_a_state_is_listed_and_final_ones_are_known_by_name() {
    let events = [
        planned(),
        waiting(),
        starting(1),
        started(1),
        ended(1),
        decided(),
        stop(),
        succeeded(),
        failed(),
        cancelled(),
    ];
    let mut states = vec![JobState::begin(&submitted()).unwrap()];
    let mut seen = std::collections::BTreeSet::new();
    while let Some(state) = states.pop() {
        if !seen.insert(state.name()) {
            continue;
        }
        assert!(JobState::NAMES.contains(&state.name()));
        assert_eq!(JobState::is_final_name(state.name()), state.is_final());
        states.extend(events.iter().filter_map(|event| state.next(event).ok()));
    }
    assert_eq!(seen.len(), JobState::NAMES.len(), "{seen:?}");
}
