use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::event::{AttemptStart, Exit};
use crate::testing::{diagnosis, plan, rung, tier};

const KINDS: [Kind; 17] = [
    Kind::DeviceOom,
    Kind::DeviceOomByNeighbour,
    Kind::HostOom,
    Kind::DiskFull,
    Kind::Network,
    Kind::Communication,
    Kind::Diverged,
    Kind::DeviceFault,
    Kind::CheckpointCorrupt,
    Kind::MissingModelOrDataset,
    Kind::BadArguments,
    Kind::IncompatibleEnvironment,
    Kind::BadData,
    Kind::CodeError,
    Kind::Interrupted,
    Kind::Success,
    Kind::Unknown,
];

fn policy_of(job: serde_json::Value) -> Policy {
    let mut complete = json!({"model": "m", "dataset": "d"});
    complete.as_object_mut().unwrap().extend(job.as_object().unwrap().clone());
    let model = Model::resolve("Qwen2.5-7B", None, None).unwrap();
    let advice = RunAdvice {
        per_device_eval_batch_size: 4,
        dataloader_num_workers: 8,
        ..TierBook::builtin().run_advice(&model, 16)
    };
    Policy::for_job(&JobSpec::from_value(&complete).unwrap(), ExpandableSegments::On, &advice).unwrap()
}

fn policy() -> Policy {
    policy_of(json!({}))
}

/// Returns the decision after the first attempt at the first rung.
fn first(diagnosis: &Diagnosis, policy: &Policy) -> Decision {
    decide(&History::at(0), diagnosis, &plan(), policy)
}

fn rerun(decision: Decision) -> Rerun {
    match decision {
        Decision::Rerun(rerun) => rerun,
        other @ (Decision::Finish | Decision::GiveUp { .. }) => panic!("no rerun: {other:?}"),
    }
}

fn gives_up(decision: Decision) -> String {
    match decision {
        Decision::GiveUp { reason, help } => format!("{reason} / {}", help.unwrap_or_default()),
        other @ (Decision::Finish | Decision::Rerun(_)) => panic!("does not give up: {other:?}"),
    }
}

/// Returns the reruns of a job that dies by the same diagnosis each time, and why it is given up.
fn repeat(diagnosis: &Diagnosis, policy: &Policy) -> (Vec<Rerun>, String) {
    let (plan, mut history, mut reruns) = (plan(), History::at(0), Vec::new());
    loop {
        match decide(&history, diagnosis, &plan, policy) {
            Decision::Rerun(rerun) => {
                history.advance(&rerun);
                reruns.push(rerun);
            }
            give_up @ Decision::GiveUp { .. } => return (reruns, gives_up(give_up)),
            Decision::Finish => panic!("finished"),
        }
    }
}

fn at_phase(phase: Phase) -> Diagnosis {
    Diagnosis { phase: Some(phase), ..diagnosis(Kind::DeviceOom) }
}

#[test]
fn device_oom_moves_one_rung_down_and_resumes_the_same_rows() {
    let next = rerun(first(&diagnosis(Kind::DeviceOom), &policy()));
    assert_eq!((next.rung, next.answer, next.resume), (1, Answer::LowerTier, ResumeWish::Latest));
    assert!(next.reason.contains("40.00 GiB instead of 60.00 GiB"), "{}", next.reason);
}

#[test]
fn second_oom_moves_another_rung_down_and_the_last_gives_up() {
    let (reruns, why) = repeat(&diagnosis(Kind::DeviceOom), &policy());
    assert_eq!(reruns.iter().map(|rerun| rerun.rung).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(why.contains("last rung, emergency 1x32") && why.contains("qlora"), "{why}");
}

#[test]
fn rungs_that_cannot_fit_by_the_corrected_prediction_are_skipped() {
    let mut oom = diagnosis(Kind::DeviceOom);
    oom.evidence.this_process_bytes = Some(Bytes::from_gib(70));
    oom.evidence.tried_bytes = Some(Bytes::from_gib(5));
    // 75 seen instead of 60 predicted: 40 becomes 50, 28 becomes 35.
    let history = History { free_now: Some(Bytes::from_gib(36)), ..History::at(0) };
    assert_eq!(rerun(decide(&history, &oom, &plan(), &policy())).rung, 2);
    oom.evidence.this_process_bytes = None;
    assert_eq!(rerun(decide(&history, &oom, &plan(), &policy())).rung, 2, "28 fits, 40 does not");
    let roomy = History { free_now: Some(Bytes::from_gib(45)), ..History::at(0) };
    assert_eq!(rerun(decide(&roomy, &oom, &plan(), &policy())).rung, 1);
}

#[test]
fn a_need_below_the_prediction_never_makes_rungs_look_smaller() {
    let mut oom = diagnosis(Kind::DeviceOom);
    oom.evidence.allocated_bytes = Some(Bytes::from_gib(10));
    oom.evidence.tried_bytes = Some(Bytes::from_gib(1));
    let history = History { free_now: Some(Bytes::from_gib(30)), ..History::at(0) };
    assert_eq!(rerun(decide(&history, &oom, &plan(), &policy())).rung, 2);
}

#[test]
fn the_emergency_profile_is_tried_whatever_the_prediction_says_unless_weights_alone_exceed_what_is_free() {
    let tight = History { free_now: Some(Bytes::from_gib(15)), ..History::at(0) };
    assert_eq!(rerun(decide(&tight, &diagnosis(Kind::DeviceOom), &plan(), &policy())).rung, 5);
    let hopeless = History { free_now: Some(Bytes::from_gib(13)), ..History::at(0) };
    gives_up(decide(&hopeless, &diagnosis(Kind::DeviceOom), &plan(), &policy()));
}

#[test]
fn a_rung_above_the_dead_ones_prediction_is_no_answer() {
    let mut plan = plan();
    plan.rungs[1] = rung(tier(Profile::Standard, 4, 8), 61);
    assert_eq!(rerun(decide(&History::at(0), &diagnosis(Kind::DeviceOom), &plan, &policy())).rung, 2);
}

#[test]
fn a_rung_that_trains_other_rows_starts_again_only_if_allowed() {
    let oom = diagnosis(Kind::DeviceOom);
    let history = History { steps_done: 40, ..History::at(3) };
    assert_eq!(rerun(decide(&history, &oom, &plan(), &policy())).resume, ResumeWish::FromStart);
    let strict = policy_of(json!({"allow": {"restart": false}}));
    let why = gives_up(decide(&history, &oom, &plan(), &strict));
    assert!(why.contains("40 steps would be lost") && why.contains("allow.restart"), "{why}");
    let early = History::at(3);
    assert_eq!(rerun(decide(&early, &oom, &plan(), &strict)).rung, 4, "no step is lost before the first");
}

#[test]
fn fragmentation_switches_expandable_segments_on_once_and_then_goes_down() {
    let mut oom = diagnosis(Kind::DeviceOom);
    oom.evidence.tried_bytes = Some(Bytes::from_mib(500));
    oom.evidence.reserved_unallocated_bytes = Some(Bytes::from_mib(900));
    let off = Policy { expandable_segments: ExpandableSegments::Off, ..policy() };
    let next = rerun(first(&oom, &off));
    assert_eq!((next.rung, next.answer), (0, Answer::SameTierExpandable));
    let mut history = History::at(0);
    history.advance(&next);
    let then = rerun(decide(&history, &oom, &plan(), &off));
    assert_eq!((then.rung, then.adjustments), (1, vec![Adjustment::ExpandableSegments]), "the change stays");
    for switch in [ExpandableSegments::On, ExpandableSegments::Fixed] {
        let policy = Policy { expandable_segments: switch, ..policy() };
        assert_eq!(rerun(first(&oom, &policy)).rung, 1);
    }
    oom.evidence.reserved_unallocated_bytes = Some(Bytes::from_mib(100));
    assert_eq!(rerun(first(&oom, &off)).rung, 1, "little lies unused");
}

#[test]
fn oom_at_load_stops_with_numbers_and_names_qlora() {
    let why = gives_up(first(&at_phase(Phase::Load), &policy()));
    assert!(why.contains("14.00 GiB") && why.contains("qlora"), "{why}");
    let packed = Plan { can_quantise: false, ..plan() };
    let why = gives_up(decide(&History::at(0), &at_phase(Phase::Load), &packed, &policy()));
    assert!(!why.contains("submit again"), "{why}");
}

#[test]
fn oom_at_load_goes_to_packed_weights_where_they_are_allowed_and_never_to_a_smaller_batch() {
    let mut plan = plan();
    let packed = plan.rungs.len() - 1;
    for rung in &mut plan.rungs[packed..] {
        rung.tier.quant_bits = Some(4);
    }
    let load = at_phase(Phase::Load);
    let Decision::Rerun(rerun) = decide(&History::at(0), &load, &plan, &policy()) else {
        panic!("it was given up");
    };
    assert_eq!((rerun.rung, rerun.answer), (packed, Answer::QuantizeOrStop));
    assert_eq!(rerun.resume, ResumeWish::FromStart);
    let again = gives_up(decide(&History::at(packed), &load, &plan, &policy()));
    assert!(again.contains("while the model was loaded"), "{again}");
}

#[test]
fn oom_in_an_evaluation_lowers_its_batch_once_and_never_the_rung() {
    let (reruns, _) = repeat(&at_phase(Phase::Eval), &policy());
    assert_eq!(reruns.len(), 1);
    assert_eq!((reruns[0].rung, &reruns[0].adjustments[..]), (0, &[Adjustment::EvalBatch(1)][..]));
    let pinned = policy_of(json!({"args": {"per_device_eval_batch_size": 2}}));
    assert!(gives_up(first(&at_phase(Phase::Eval), &pinned)).contains("pins"));
    let one = Policy { eval_batch: Knob { value: 1, pinned: false }, ..policy() };
    assert!(gives_up(first(&at_phase(Phase::Eval), &one)).contains("1 already"));
}

#[test]
fn oom_while_saving_stops() {
    gives_up(first(&at_phase(Phase::Save), &policy()));
}

#[test]
fn a_probable_oom_is_taken_for_one_only_once() {
    let probable = Diagnosis { certain: false, ..diagnosis(Kind::DeviceOom) };
    let (reruns, why) = repeat(&probable, &policy());
    assert_eq!(reruns.iter().map(|rerun| rerun.rung).collect::<Vec<_>>(), [1]);
    assert!(why.contains("nothing proves it"), "{why}");
}

#[test]
fn a_neighbour_is_waited_for_three_times_at_the_same_rung() {
    let (reruns, why) = repeat(&diagnosis(Kind::DeviceOomByNeighbour), &policy());
    assert_eq!(reruns.iter().map(|rerun| rerun.rung).collect::<Vec<_>>(), [0, 0, 0]);
    assert_eq!(reruns[0].wait, Wait::ForMemory { need: Bytes::from_gib(61), seconds_max: 1800 });
    assert!(why.contains("4 times"), "{why}");
}

#[test]
fn host_oom_halves_the_workers_then_takes_none() {
    let (reruns, _) = repeat(&diagnosis(Kind::HostOom), &policy());
    let workers: Vec<_> = reruns.iter().map(|rerun| rerun.adjustments.clone()).collect();
    assert_eq!(workers, [[Adjustment::DataloaderWorkers(4)], [Adjustment::DataloaderWorkers(0)]]);
    let pinned = policy_of(json!({"args": {"dataloader_num_workers": 4}}));
    assert!(gives_up(first(&diagnosis(Kind::HostOom), &pinned)).contains("pins"));
}

#[test]
fn a_bare_signal_9_resumes_five_times_at_the_same_rung() {
    for kind in [Kind::HostOom, Kind::Interrupted] {
        let (reruns, _) = repeat(&Diagnosis { certain: false, ..diagnosis(kind) }, &policy());
        assert_eq!(reruns.len(), 5);
        assert!(reruns.iter().all(|rerun| rerun.rung == 0 && rerun.resume == ResumeWish::Latest));
        assert!(reruns.iter().all(|rerun| rerun.adjustments.is_empty()));
    }
}

/// Returns how many reruns there are of a job whose attempts end so, after these steps, and then for ever after the last.
fn reruns_of(diagnosis: &Diagnosis, steps: impl IntoIterator<Item = u64>) -> (usize, String) {
    let (plan, policy, mut history) = (plan(), policy(), History::at(0));
    for step in steps {
        history.ended(Some(step).filter(|step| *step > 0));
        match decide(&history, diagnosis, &plan, &policy) {
            Decision::Rerun(next) => history.advance(&next),
            give_up @ Decision::GiveUp { .. } => return (history.reruns.len(), gives_up(give_up)),
            Decision::Finish => panic!("finished"),
        }
    }
    panic!("{} reruns and no end", history.reruns.len())
}

#[test]
fn interruptions_with_progress_in_between_do_not_add_up() {
    let killed = Diagnosis { certain: false, ..diagnosis(Kind::HostOom) };
    for kind in [killed, diagnosis(Kind::Interrupted), diagnosis(Kind::Network)] {
        // Twenty nights, each a bit further; then it is stuck.
        let (reruns, why) = reruns_of(&kind, (1..=20).chain(std::iter::repeat(20)));
        assert_eq!(reruns, 20 + 4, "the one that ended the last progress is the first of five: {why}");
        // A step that was trained before is none, nor is one less.
        assert_eq!(reruns_of(&kind, [9, 9, 9, 3, 8, 9, 9]).0, 5);
        assert_eq!(reruns_of(&kind, std::iter::repeat(0)).0, 5);
        assert_eq!(reruns_of(&kind, [9, 9, 9, 9, 9, 10, 9, 9, 10, 10, 10, 10]).0, 5 + 5);
    }
}

#[test]
fn a_job_that_progresses_for_ever_is_not_interrupted_for_ever() {
    let (reruns, why) = reruns_of(&diagnosis(Kind::Interrupted), 1..);
    assert!(reruns == 100 && why.contains("101 times"), "{reruns} {why}");
    let (reruns, why) = reruns_of(&diagnosis(Kind::Network), 1..);
    assert!(reruns == 50 && why.contains("51 times"), "{reruns} {why}");
}

#[test]
fn the_first_wait_for_the_network_after_progress_is_short_again() {
    let (plan, policy, mut history) = (plan(), policy(), History::at(0));
    let waits = [3, 3, 3, 7, 7].map(|step| {
        history.ended(Some(step));
        let next = rerun(decide(&history, &diagnosis(Kind::Network), &plan, &policy));
        history.advance(&next);
        next.wait
    });
    assert_eq!(waits, [30, 60, 120, 30, 60].map(Wait::Seconds));
}

#[test]
fn on_another_rung_progress_is_counted_anew() {
    let (plan, policy, mut history) = (plan(), policy(), History::at(3));
    history.ended(Some(40));
    let next = rerun(decide(&history, &diagnosis(Kind::DeviceOom), &plan, &policy));
    assert_eq!(next.resume, ResumeWish::FromStart);
    history.advance(&next);
    history.ended(Some(2));
    assert!(history.progressed && history.steps_done == 40);
    // On its way over other cards a job may come back to a rung: there it must go beyond what it did there.
    history.rung = 3;
    history.ended(Some(40));
    assert!(!history.progressed);
}

#[test]
fn network_waits_double_from_thirty_seconds_up_to_ten_minutes() {
    let long = Policy { bounds: Bounds { network_backoffs: 8, ..Bounds::default() }, ..policy() };
    let seconds = |policy: &Policy| {
        let waits = repeat(&diagnosis(Kind::Network), policy).0.into_iter().map(|rerun| rerun.wait);
        waits.collect::<Vec<_>>()
    };
    assert_eq!(seconds(&policy()), [30, 60, 120, 240, 480].map(Wait::Seconds));
    assert_eq!(seconds(&long)[5..], [600, 600, 600].map(Wait::Seconds));
}

#[test]
fn communication_gets_three_new_ports() {
    let (reruns, _) = repeat(&diagnosis(Kind::Communication), &policy());
    assert_eq!(reruns.len(), 3);
    assert!(reruns.iter().all(|rerun| rerun.adjustments == [Adjustment::NewPort]));
}

#[test]
fn divergence_gets_the_stable_recipe_once_from_good_weights() {
    let (reruns, _) = repeat(&diagnosis(Kind::Diverged), &policy());
    assert_eq!(reruns.len(), 1);
    assert_eq!(
        (reruns[0].resume, &reruns[0].adjustments[..]),
        (ResumeWish::LastGoodWeights, &[Adjustment::RecipeStable][..])
    );
    for job in [
        json!({"learning": "stable"}),
        json!({"allow": {"recipe_stable": false}}),
        json!({"args": {"learning_rate": 1e-3}}),
    ] {
        gives_up(first(&diagnosis(Kind::Diverged), &policy_of(job)));
    }
}

#[test]
fn a_silent_divergence_is_not_taken_for_success() {
    let silent = Diagnosis { fatal: false, ..diagnosis(Kind::Diverged) };
    assert_eq!(rerun(first(&silent, &policy())).answer, Answer::RecipeStable);
    // What it goes on with is what the tiers say.
    let mut other = policy();
    other.stable = Values { learning_rate: Some(3e-5), max_grad_norm: Some(0.25), ..Values::default() };
    let why = rerun(first(&silent, &other)).reason;
    assert_eq!(why, "the training diverged; on with learning rate 3e-5, gradient clipping at 0.25");
}

#[test]
fn a_corrupt_checkpoint_is_replaced_by_earlier_ones_three_times() {
    let (reruns, _) = repeat(&diagnosis(Kind::CheckpointCorrupt), &policy());
    assert_eq!(reruns.len(), 3);
    assert!(reruns.iter().all(|rerun| rerun.resume == ResumeWish::Previous));
}

#[test]
fn success_after_the_last_allowed_attempt_is_still_success() {
    let none = Policy { bounds: Bounds { resumes: 0, ..Bounds::default() }, ..policy() };
    let used = Answered { answer: Answer::Resume, certain: true, after_progress: false };
    let history = History { reruns: vec![used; 299], ..History::at(0) };
    assert_eq!(decide(&history, &diagnosis(Kind::Success), &plan(), &none), Decision::Finish);
    assert!(gives_up(decide(&history, &diagnosis(Kind::DeviceOom), &plan(), &none)).contains("300 attempts"));
}

#[test]
fn success_and_a_caught_oom_finish() {
    assert_eq!(first(&diagnosis(Kind::Success), &policy()), Decision::Finish);
    let caught = Diagnosis { fatal: false, ..diagnosis(Kind::DeviceOom) };
    assert_eq!(first(&caught, &policy()), Decision::Finish);
}

#[test]
fn what_no_rerun_can_cure_stops_with_its_line_and_help() {
    for kind in [
        Kind::DeviceFault,
        Kind::DiskFull,
        Kind::MissingModelOrDataset,
        Kind::BadArguments,
        Kind::IncompatibleEnvironment,
        Kind::BadData,
        Kind::CodeError,
        Kind::Unknown,
    ] {
        let Decision::GiveUp { reason, help } = first(&diagnosis(kind), &policy()) else {
            panic!("{kind} is run again")
        };
        assert!(reason.contains("a line that says") && help.is_some(), "{kind}: {reason}");
    }
}

#[test]
fn the_history_is_the_same_whether_kept_or_read_from_events() {
    let (plan, policy) = (plan(), policy());
    let (mut kept, mut events) = (History::at(0), Vec::new());
    let mut adjustments = Vec::new();
    for (i, kind) in [Kind::HostOom, Kind::DeviceOom, Kind::Network].into_iter().enumerate() {
        let attempt = u32::try_from(i + 1).unwrap();
        events.push(JobEvent::AttemptStarting(AttemptStart {
            attempt,
            rung: kept.rung,
            tier: plan.rungs[kept.rung].tier.clone(),
            resume: None,
            adjustments: adjustments.clone(),
        }));
        events.push(JobEvent::AttemptEnded {
            attempt,
            exit: Exit::Code { code: 1 },
            diagnosis: Box::new(diagnosis(kind)),
            last_step: Some(10 * u64::from(attempt)),
        });
        kept.ended(Some(10 * u64::from(attempt)));
        let next = rerun(decide(&kept, &diagnosis(kind), &plan, &policy));
        kept.advance(&next);
        adjustments.clone_from(&next.adjustments);
        events.push(JobEvent::RerunDecided(next));
    }
    assert_eq!(History::from_events(&events), kept);
    assert_eq!(kept.reruns.len(), 3);
}

#[test]
fn a_history_that_is_not_on_the_ladder_gives_up() {
    gives_up(decide(&History::at(9), &diagnosis(Kind::DeviceOom), &plan(), &policy()));
}

fn any_amount() -> impl Strategy<Value = Option<Bytes>> {
    proptest::option::of((0..100_u64).prop_map(Bytes::from_gib))
}

prop_compose! {
    fn any_diagnosis()(
        kind in proptest::sample::select(&KINDS[..]),
        fatal in proptest::bool::weighted(0.95),
        certain in any::<bool>(),
        phase in proptest::option::of(proptest::sample::select(vec![Phase::Load, Phase::Train, Phase::Eval, Phase::Save])),
        amounts in proptest::collection::vec(any_amount(), 5),
    ) -> Diagnosis {
        let evidence = Evidence {
            tried_bytes: amounts[0],
            this_process_bytes: amounts[1],
            reserved_total_bytes: amounts[2],
            allocated_bytes: amounts[3],
            reserved_unallocated_bytes: amounts[4],
            ..Evidence::default()
        };
        Diagnosis { kind, fatal, certain, phase, evidence, answer: Answer::None }
    }
}

/// Returns a ladder whose predictions need not fall: the promise must not rest on a well-made plan.
fn any_plan() -> impl Strategy<Value = Plan> {
    proptest::collection::vec((0..90_u64, any::<bool>()), 1..9).prop_map(|rungs| {
        let last = rungs.len() - 1;
        let rungs = rungs.into_iter().enumerate().map(|(i, (gib, shorter))| {
            let name = match (i == last, shorter) {
                (true, _) => Profile::Emergency,
                (false, true) => Profile::Shorter,
                (false, false) => Profile::Standard,
            };
            rung(tier(name, 1, 32), gib)
        });
        Plan { rungs: rungs.collect(), ..plan() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn invariants_hold_for_every_sequence_of_deaths(
        plan in any_plan(),
        deaths in proptest::collection::vec((any_diagnosis(), any_amount(), 0..100_u64), 1..80),
        always_further in proptest::sample::select(vec![0, 1, 100_u64]),
        expandable in proptest::sample::select(vec![
            ExpandableSegments::On, ExpandableSegments::Off, ExpandableSegments::Fixed,
        ]),
    ) {
        let policy = Policy { expandable_segments: expandable, ..policy() };
        let mut history = History::at(0);
        let mut attempts = 1_usize;
        let mut ended = false;
        // Over and over, each time further than ever before: nothing but the bounds of a whole life ends that.
        for (n, (death, free, steps)) in (0..).zip(deaths.iter().cycle().take(400)) {
            history.free_now = *free;
            history.ended(Some(steps + n * always_further));
            let Decision::Rerun(next) = decide(&history, death, &plan, &policy) else {
                ended = true;
                break;
            };
            attempts += 1;
            prop_assert!(next.rung < plan.rungs.len());
            if next.rung == history.rung {
                prop_assert!(next.answer != Answer::LowerTier);
            } else {
                prop_assert_eq!(death.kind, Kind::DeviceOom, "only a device OOM lowers the rung");
                prop_assert!(death.fatal);
                prop_assert!(next.rung > history.rung);
                let (dead, next) = (&plan.rungs[history.rung], &plan.rungs[next.rung]);
                // The emergency profile is tried whatever is predicted for it.
                let is_last_resort = next.tier.name == Profile::Emergency;
                prop_assert!(is_last_resort || next.predicted_peak_bytes <= dead.predicted_peak_bytes);
            }
            if next.resume != ResumeWish::FromStart && next.rung != history.rung {
                prop_assert!(plan.rungs[history.rung].tier.trains_the_same_as(&plan.rungs[next.rung].tier));
            }
            prop_assert!(history.adjustments.iter().all(|old| {
                next.adjustments.iter().any(|new| old.is_replaced_by(*new))
            }), "a change was forgotten");
            history.advance(&next);
        }
        // The longest job: 9 rungs and 167 answers of other kinds.
        prop_assert!(ended, "{} attempts and no end", attempts);
        prop_assert!(attempts <= policy.attempts_max(&plan), "{} attempts", attempts);
    }

    #[test]
    fn memory_that_ran_out_at_the_emergency_profile_ends_the_job(
        mut death in any_diagnosis(), free in any_amount(),
    ) {
        death.kind = Kind::DeviceOom;
        death.fatal = true;
        let policy = Policy { eval_batch: Knob { value: 1, pinned: false }, ..policy() };
        let history = History { free_now: free, ..History::at(5) };
        let gave_up = matches!(decide(&history, &death, &plan(), &policy), Decision::GiveUp { .. });
        prop_assert!(gave_up);
    }
}
