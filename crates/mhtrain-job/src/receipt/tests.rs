use mhtrain_sizing::tier::Profile;
use serde_json::json;

use super::*;
use crate::diagnosis::{Answer, Evidence, Kind, Phase};
use crate::testing::{diagnosis, plan};

/// Returns the receipt of a job that survived an OOM.
fn survived() -> Receipt {
    let plan = plan();
    let job = json!({"model": "m", "name": "m-sft"});
    let mut receipt = Receipt::new(job, "2026-01-02T03:00:00Z".to_owned());
    receipt.record_plan(&plan);
    receipt.state = "succeeded".to_owned();
    receipt.ended_at = Some("2026-01-02T03:30:00Z".to_owned());
    receipt.versions = BTreeMap::from([("ms-swift".to_owned(), "4.6.0".to_owned())]);
    receipt.notes = vec!["packing is on because flash-attn is installed".to_owned()];
    receipt.warnings = vec!["the companion did not load".to_owned()];
    receipt.attempts = vec![died(&plan), went_on(&plan)];
    receipt.proof = Some(ProofKind::Rows);
    receipt.proof_facts = Some(ProofFacts {
        exit_code: Some(0),
        end_of_training: true,
        global_step: 10,
        max_steps: 10,
        rows: Some(310),
        effective_batch: 32,
        epochs: 1.0,
        checkpoint: "output/m-sft/attempt-2/checkpoint-10".to_owned(),
    });
    receipt.rows_dropped = Some(10);
    receipt
}

fn died(plan: &Plan) -> AttemptNote {
    AttemptNote {
        attempt: 1,
        tier: plan.rungs[0].tier.clone(),
        adjustments: Vec::new(),
        resume: None,
        started_at: "2026-01-02T03:00:10Z".to_owned(),
        ended_at: Some("2026-01-02T03:10:00Z".to_owned()),
        exit: Some(Exit::Code { code: 1 }),
        diagnosis: Some(Diagnosis {
            phase: Some(Phase::Train),
            evidence: Evidence {
                line: "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.".to_owned(),
                tried_bytes: Some(Bytes::from_gib(2)),
                ..Evidence::default()
            },
            answer: Answer::LowerTier,
            ..diagnosis(Kind::DeviceOom)
        }),
        last_step: Some(7),
        max_steps: Some(10),
        peak_bytes: Some(Bytes::from_gib(61)),
        then: Some("one rung lower".to_owned()),
    }
}

fn went_on(plan: &Plan) -> AttemptNote {
    AttemptNote {
        attempt: 2,
        tier: plan.rungs[1].tier.clone(),
        adjustments: vec![Adjustment::ExpandableSegments, Adjustment::DataloaderWorkers(0)],
        resume: Some(Resume {
            kind: ResumeKind::Exact,
            checkpoint: Some("output/m-sft/attempt-1/checkpoint-6".to_owned()),
            from_step: 6,
            steps_repeated: 1,
        }),
        started_at: "2026-01-02T03:10:20Z".to_owned(),
        ended_at: Some("2026-01-02T03:30:00Z".to_owned()),
        exit: Some(Exit::Code { code: 0 }),
        diagnosis: None,
        last_step: Some(10),
        max_steps: Some(10),
        peak_bytes: None,
        then: None,
    }
}

#[test]
fn a_receipt_for_people_tells_the_whole_story() {
    insta::assert_snapshot!(render(&survived()));
}

#[test]
fn a_receipt_as_json_keeps_its_names() {
    insta::assert_json_snapshot!(survived());
}

#[test]
fn a_receipt_is_read_back_from_json() {
    let receipt = survived();
    let text = serde_json::to_string(&receipt).unwrap();
    assert_eq!(serde_json::from_str::<Receipt>(&text).unwrap(), receipt);
}

#[test]
fn a_failed_job_says_why_and_what_to_do() {
    let mut receipt = Receipt::new(json!({"name": "m-sft"}), "2026-01-02T03:00:00Z".to_owned());
    receipt.id = Some(7);
    receipt.state = "failed".to_owned();
    receipt.reason = Some("no rung is left".to_owned());
    receipt.help = Some("choose a larger card".to_owned());
    insta::assert_snapshot!(render(&receipt));
}

#[test]
fn each_kind_of_resume_is_said_in_words() {
    let resume = |kind| Resume { kind, checkpoint: None, from_step: 6, steps_repeated: 0 };
    assert_eq!(resume_in_words(None), "from the beginning");
    let words = [ResumeKind::Exact, ResumeKind::WeightsOnly, ResumeKind::Restart]
        .map(|kind| resume_in_words(Some(&resume(kind))));
    assert!(
        words[0].contains("exactly after step 6")
            && words[1].contains("weights")
            && words[2].contains("again")
    );
}

#[test]
fn only_the_chosen_rung_is_marked() {
    let mut receipt = survived();
    receipt.chosen = Some(crate::testing::tier(Profile::Standard, 2, 16));
    let marked: Vec<_> =
        render(&receipt).lines().filter(|line| line.starts_with('>')).map(str::to_owned).collect();
    assert!(marked.len() == 1 && marked[0].contains("standard 2x16"), "{marked:?}");
}

#[test]
fn a_receipt_can_be_made_of_the_events_alone() {
    let plan = plan();
    let start = |attempt, rung: usize| AttemptStart {
        attempt,
        rung,
        tier: plan.rungs[rung].tier.clone(),
        resume: None,
        adjustments: Vec::new(),
    };
    let ended = |attempt, kind| JobEvent::AttemptEnded {
        attempt,
        exit: Exit::Code { code: 1 },
        diagnosis: Box::new(diagnosis(kind)),
        last_step: Some(7),
    };
    let events = [
        JobEvent::Submitted { spec: json!({"name": "m-sft"}) },
        JobEvent::AttemptStarting(start(1, 0)),
        ended(1, Kind::DeviceOom),
        JobEvent::AttemptStarting(start(2, 1)),
        ended(2, Kind::DiskFull),
        JobEvent::Failed { reason: "the disk is full".to_owned(), help: Some("make room".to_owned()) },
    ];
    let at = |minute| format!("2026-01-02T03:{minute:02}:00Z");
    let records: Vec<_> =
        events.into_iter().enumerate().map(|(n, event)| Record::new(at(n), event)).collect();
    let receipt = Receipt::from_events(Some(7), &records);
    assert_eq!((receipt.id, receipt.state.as_str()), (Some(7), "failed"));
    assert_eq!(receipt.reason.as_deref(), Some("the disk is full"));
    assert_eq!(receipt.help.as_deref(), Some("make room"));
    assert_eq!((receipt.submitted_at, receipt.ended_at), (at(0), Some(at(5))));
    let kinds = receipt.attempts.iter().map(|note| note.diagnosis.as_ref().unwrap().kind);
    assert_eq!(kinds.collect::<Vec<_>>(), [Kind::DeviceOom, Kind::DiskFull]);
    assert_eq!(receipt.attempts[1].started_at, at(3));
    assert_eq!(receipt.attempts[1].then.as_deref(), Some("the disk is full"));
}
