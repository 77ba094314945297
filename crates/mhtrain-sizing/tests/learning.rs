//! Does the next prediction on a machine learn from the last ones?

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod recipe;

use mhtrain_sizing::learn::{Learned, Nearness, learn};
use mhtrain_sizing::observation::{Fingerprint, Observation, Seen, Versions};
use mhtrain_sizing::reserve::{Group, Ratio, Reserve};
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::TrainType;
use proptest::prelude::*;

/// A small generator with a fixed seed (Marsaglia 2003, xorshift): the same hosts on every run.
struct Draws(u64);

impl Draws {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let high = u32::try_from(self.0 >> 32).unwrap();
        (f64::from(high) + 0.5) / 4_294_967_296.0
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

fn next(group: Group) -> Fingerprint {
    Fingerprint {
        model: "Qwen/Qwen2.5-7B".to_owned(),
        family: "qwen2".to_owned(),
        method: TrainType::Lora,
        group,
        versions: Versions {
            torch: Some("2.9.0".to_owned()),
            transformers: Some("5.19.0".to_owned()),
            ms_swift: Some("4.6.0".to_owned()),
            flash_attn: Some("2.8.3".to_owned()),
        },
        card: "NVIDIA A100-SXM4-80GB".to_owned(),
    }
}

/// Share of resident memory in the allocated peak.
const HALF: f64 = 0.5;

const PREDICTED: Bytes = Bytes::from_gib(20);

fn ran(fingerprint: &Fingerprint, ratio: f64) -> Observation {
    let reserved = Bytes::from_f64(ratio * PREDICTED.as_f64());
    let seen = Seen::Peak { allocated: Some(PREDICTED), reserved: Some(reserved), device: None };
    Observation {
        name: format!("ratio {ratio:.2}"),
        fingerprint: fingerprint.clone(),
        tier: None,
        predicted: PREDICTED,
        sized_row: None,
        seen,
        pace: None,
    }
}

fn died(fingerprint: &Fingerprint, limit: Bytes) -> Observation {
    Observation {
        name: "died".to_owned(),
        fingerprint: fingerprint.clone(),
        tier: None,
        predicted: PREDICTED,
        sized_row: None,
        seen: Seen::MoreThan { limit },
        pace: None,
    }
}

fn width(ratio: Ratio) -> f64 {
    (ratio.high / ratio.low).ln()
}

/// Hosts with ratios from 1.0 to 2.0 and noise of 2 % between runs.
#[test]
fn after_three_runs_the_interval_is_a_third_and_still_covers() {
    let mut draws = Draws(0x9E37_79B9_7F4A_7C15);
    for group in Group::ALL {
        let (hosts, mut inside, mut widest) = (4000, 0u32, 0.0f64);
        for _ in 0..hosts {
            let ratio = 1.0 + draws.uniform();
            let mut run = || ratio * (0.02 * draws.normal()).exp();
            let observations: Vec<Observation> = (0..3).map(|_| ran(&next(group), run())).collect();
            let learned = learn(group.prior(HALF), &next(group), &observations);
            widest += width(learned.ratio) / f64::from(hosts);
            inside += u32::from((learned.ratio.low..=learned.ratio.high).contains(&run()));
        }
        let covered = f64::from(inside) / f64::from(hosts);
        let share = widest / width(group.prior(HALF));
        assert!(covered >= 0.9, "{group}: {covered}");
        assert!(share <= 1.0 / 3.0, "{group}: {share}");
    }
}

#[test]
fn without_runs_the_prior_stays() {
    let prior = Group::Equal.prior(HALF);
    let learned = learn(prior, &next(Group::Equal), &[]);
    assert_eq!(learned, Learned { ratio: prior, prior, evidence: Vec::new() });
    assert_eq!(learned.sentence(), None);
}

#[test]
fn a_new_version_widens_the_interval_again() {
    let group = Group::Equal;
    let runs: Vec<Observation> = (0..5).map(|_| ran(&next(group), 1.2)).collect();
    let same = learn(group.prior(HALF), &next(group), &runs);
    let mut newer = next(group);
    newer.versions.torch = Some("2.10.0".to_owned());
    let other = learn(group.prior(HALF), &newer, &runs);
    assert!(width(other.ratio) > 2.0 * width(same.ratio), "{other:?} {same:?}");
    assert!(width(other.ratio) < width(group.prior(HALF)));
    assert_eq!(other.evidence[0].nearness, Nearness::OtherVersions);
}

#[test]
fn nearer_runs_count_more() {
    let group = Group::Equal;
    let mut relative = next(group);
    relative.model = "Qwen/Qwen2.5-3B".to_owned();
    let mut stranger = next(group);
    stranger.model = "meta-llama/Llama-3.2-3B".to_owned();
    stranger.family = "llama".to_owned();
    let guess = |runs: &[Observation]| learn(group.prior(HALF), &next(group), runs).ratio.guess;
    let [near, family, far] = [next(group), relative, stranger].map(|of| guess(&[ran(&of, 1.25)]));
    assert!(near > family && family > far && far > group.prior(HALF).guess, "{near} {family} {far}");
}

#[test]
fn an_end_that_runs_of_the_same_model_contradict_moves_nothing() {
    let group = Group::Equal;
    let ran: Vec<Observation> = (0..3).map(|_| ran(&next(group), 1.10)).collect();
    let without = learn(group.prior(HALF), &next(group), &ran);
    let absurd = died(&next(group), Bytes::from_gib(78));
    let with = learn(group.prior(HALF), &next(group), &[ran.clone(), vec![absurd.clone()]].concat());
    assert_eq!(with.ratio, without.ratio, "78 GiB were not enough for 20, and three runs took 22");
    // Without them it counts, and how much more it was stays open.
    let alone = learn(group.prior(HALF), &next(group), &[absurd]).ratio;
    assert!(alone.guess > 2.0 && width(alone) > width(group.prior(HALF)), "{alone:?}");
    // One that those runs do not exclude moves the prediction.
    let near = died(&next(group), Bytes::from_gib(23));
    let moved = learn(group.prior(HALF), &next(group), &[ran, vec![near]].concat()).ratio;
    assert!(moved.guess > without.ratio.guess, "{moved:?} {:?}", without.ratio);
}

#[test]
fn a_run_with_another_loss_or_that_died_does_not_make_a_pass_known() {
    let group = Group::Equal;
    let known = |runs: &[Observation], liger_kernel| {
        Reserve { group, history: Some((&next(group), runs)) }.knows_model(liger_kernel)
    };
    let ran = [ran(&next(group), 1.1)];
    assert!(known(&ran, false) && !known(&ran, true));
    assert!(!known(&[died(&next(group), Bytes::from_gib(21))], false), "a limit is no figure");
}

#[test]
fn runs_of_other_batches_say_nothing() {
    let run = ran(&next(Group::Unequal), 1.9);
    let learned = learn(Group::Equal.prior(HALF), &next(Group::Equal), &[run]);
    assert_eq!(learned.ratio, Group::Equal.prior(HALF));
}

#[test]
fn a_death_moves_the_prediction_up_and_never_down() {
    let group = Group::Equal;
    let prior = group.prior(HALF);
    let high = learn(prior, &next(group), &[died(&next(group), Bytes::from_gib(25))]);
    assert!(high.ratio.guess > 1.15, "{high:?}");
    assert!(high.evidence[0].at_least);
    let low = learn(prior, &next(group), &[died(&next(group), Bytes::from_gib(15))]);
    assert!((low.ratio.guess - prior.guess).abs() < 0.005, "{low:?}");
}

#[test]
fn the_sentence_names_the_runs() {
    let group = Group::Equal;
    let runs = [ran(&next(group), 1.2), ran(&next(group), 1.21)];
    let sentence = learn(group.prior(HALF), &next(group), &runs).sentence().unwrap();
    assert!(sentence.contains("ratio 1.20, ratio 1.21 (of this model)"), "{sentence}");
}

#[test]
fn observations_are_stored_as_json() {
    for observation in [ran(&next(Group::Equal), 1.1), died(&next(Group::Expandable), Bytes::from_gib(24))] {
        let text = serde_json::to_string(&observation).unwrap();
        assert_eq!(serde_json::from_str::<Observation>(&text).unwrap(), observation, "{text}");
    }
}

fn any_observation() -> impl Strategy<Value = Observation> {
    let bytes = prop_oneof![Just(0u64), any::<u64>(), 1u64 << 20..1 << 40];
    let group = prop::sample::select(Group::ALL.to_vec());
    (bytes.clone(), bytes, any::<[bool; 3]>(), group).prop_map(
        |(predicted, seen, [dead, other, model], group)| {
            let mut fingerprint = next(group);
            if other {
                fingerprint.versions.ms_swift = None;
            }
            if model {
                fingerprint.model = "other".to_owned();
            }
            let seen = Bytes::new(seen);
            let seen = if dead {
                Seen::MoreThan { limit: seen }
            } else {
                Seen::Peak { allocated: None, reserved: None, device: Some(seen) }
            };
            Observation {
                name: "any".to_owned(),
                fingerprint,
                tier: None,
                predicted: Bytes::new(predicted),
                sized_row: None,
                seen,
                pace: None,
            }
        },
    )
}

proptest! {
    #[test]
    fn the_ratio_stays_sane(observations in prop::collection::vec(any_observation(), 0..20)) {
        let ratio = learn(Group::Equal.prior(HALF), &next(Group::Equal), &observations).ratio;
        prop_assert!(ratio.low > 0.0 && ratio.low <= ratio.guess && ratio.guess <= ratio.high, "{ratio:?}");
        prop_assert!(ratio.high.is_finite() && ratio.high < 50.0, "{ratio:?}");
    }
}

mod plans {
    use mhtrain_sizing::ladder::TierBook;
    use mhtrain_sizing::pace::{Pace, StepTime};
    use mhtrain_sizing::plan::{History, Plan, plan, plan_learned};
    use mhtrain_sizing::request::Request;

    use super::*;

    fn request(free: Bytes) -> Request {
        super::recipe::request("Qwen/Qwen2.5-7B", free)
    }

    fn history(request: &Request, ratio: f64, runs: usize) -> History {
        let mut history = History::default();
        let fingerprint = history.fingerprint(request, true);
        history.observations = (0..runs).map(|_| ran(&fingerprint, ratio)).collect();
        history
    }

    #[test]
    fn runs_that_needed_more_move_the_plan_down_and_the_plan_says_so() {
        let request = request(Bytes::from_gib(72));
        let cold = plan(&request, &TierBook::builtin()).unwrap();
        let warm = plan_learned(&request, &TierBook::builtin(), &history(&request, 1.4, 3)).unwrap();
        assert_eq!((cold.chosen_rung().tier.micro_batch, warm.chosen_rung().tier.micro_batch), (8, 4));
        assert!(warm.notes.iter().any(|note| note.contains("because of ratio 1.40")), "{:?}", warm.notes);
    }

    #[test]
    fn a_context_that_was_seen_takes_the_place_of_the_usual_one() {
        let request = request(Bytes::from_gib(72));
        let mut history = history(&request, 1.2, 3);
        let peak = |history: &History| {
            let plan = plan_learned(&request, &TierBook::builtin(), history).unwrap();
            let estimate = &plan.rungs[2].estimate;
            (estimate.device_peak_bytes, estimate.high_bytes.saturating_sub(estimate.device_peak_bytes))
        };
        let (usual, _) = peak(&history);
        for (run, context) in history.observations.iter_mut().zip([790, 800, 9000]) {
            let Seen::Peak { reserved: Some(reserved), device, .. } = &mut run.seen else { panic!("it ran") };
            *device = Some(reserved.saturating_add(Bytes::from_mib(context)));
        }
        // The last is no context: something else was on the card.
        let (seen, _) = peak(&history);
        let more = seen.checked_sub(usual).unwrap();
        assert!(more >= Bytes::from_mib(277) && more <= Bytes::from_mib(289), "{more}");
    }

    #[test]
    fn memory_is_never_predicted_below_what_is_allocated_and_the_context() {
        let request = request(Bytes::from_gib(72));
        let plan = plan_learned(&request, &TierBook::builtin(), &history(&request, 0.9, 3)).unwrap();
        for rung in plan.rungs.iter().filter(|rung| rung.tier.packing) {
            let floor = rung.estimate.allocated_peak_bytes.saturating_add(Bytes::from_mib(512));
            assert_eq!(rung.predicted_peak_bytes, floor);
        }
    }

    #[test]
    fn what_a_rung_is_admitted_by_has_no_step_where_runs_took_what_was_allocated() {
        let request = request(Bytes::from_gib(72));
        let admitted_by = |ratio: f64| {
            let plan = plan_learned(&request, &TierBook::builtin(), &history(&request, ratio, 3)).unwrap();
            let own = plan.rungs.into_iter().find(|rung| rung.tier.micro_batch == 8).unwrap();
            (own.admission_bytes.as_f64() - Bytes::from_mib(512).as_f64(), own.predicted_peak_bytes)
        };
        // The interval is some percent wide, so at 0.99 what it is admitted by is above what is allocated all the same.
        let (below, above) = (admitted_by(0.99).0, admitted_by(1.01).0);
        assert!((below / above / (0.99 / 1.01) - 1.0).abs() < 0.002, "{below} {above}");
        // And at 0.9 no part of it is.
        let (least, predicted) = admitted_by(0.9);
        assert!((least - predicted.saturating_sub(Bytes::from_mib(512)).as_f64()).abs() < 1.0);
    }

    #[test]
    fn a_plan_is_read_back_as_it_was_written() {
        let plan = plan(&request(Bytes::from_gib(40)), &TierBook::builtin()).unwrap();
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    }

    /// Steps of 2 s at 8x4, as 7B on packed rows of 3072.
    fn paced(request: &Request, versions: Option<&str>) -> History {
        let mut history = history(request, 1.1, 1);
        let tier = plan(request, &TierBook::builtin()).unwrap().chosen_rung().tier.clone();
        let run = &mut history.observations[0];
        run.tier = Some(tier);
        run.pace = Some(Pace { seconds_per_step: 2.0, steps: 100, row_tokens: Some(3072.0) });
        run.fingerprint.versions.torch = versions.map(str::to_owned);
        history
    }

    #[test]
    fn a_step_takes_what_it_took_and_without_runs_nothing_is_said() {
        let book = TierBook::builtin();
        let request = request(Bytes::from_gib(78));
        assert_eq!(plan(&request, &book).unwrap().step_time, None);
        let known = plan_learned(&request, &book, &paced(&request, None)).unwrap();
        let time = known.step_time.unwrap();
        assert!(time.same_rung && (time.seconds - 2.0).abs() < 1e-9, "{time:?}");
        assert!(known.notes.iter().any(|note| note.contains("a step takes about 2.00 s (1.81 to 2.21)")));
        let mut other = request.clone();
        other.card.name = "another card".to_owned();
        assert_eq!(plan_learned(&other, &book, &paced(&request, None)).unwrap().step_time, None);
    }

    #[test]
    fn another_rung_or_version_is_scaled_in_a_wider_interval() {
        let book = TierBook::builtin();
        let roomy = request(Bytes::from_gib(78));
        let width = |time: &StepTime| (time.high / time.low).ln();
        let same = plan_learned(&roomy, &book, &paced(&roomy, None)).unwrap().step_time.unwrap();
        let newer = plan_learned(&roomy, &book, &paced(&roomy, Some("2.10"))).unwrap().step_time.unwrap();
        assert!(!newer.same_rung && width(&newer) > 2.0 * width(&same), "{newer:?}");
        let tight = request(Bytes::from_gib(30));
        let lower = plan_learned(&tight, &book, &paced(&roomy, None)).unwrap();
        assert!(lower.chosen_rung().tier.micro_batch < 8);
        let time = lower.step_time.unwrap();
        // The same rows in more passes: slower, and by less than a tenth.
        assert!(time.seconds > 2.0 && time.seconds < 2.2, "{time:?}");
        assert!(width(&time) > 3.0 * width(&same), "{time:?}");
    }

    proptest! {
        #[test]
        fn with_any_history_more_memory_never_picks_a_lower_rung(
            free in 1u64..90_000,
            more in 0u64..50_000,
            ratio in 0.4f64..3.0,
            runs in 0usize..4,
            unpacked in prop::option::of(0.4f64..3.0),
            no_checkpointing in any::<bool>(),
        ) {
            let book = TierBook::builtin();
            let mut tight = request(Bytes::from_mib(free));
            tight.allow.no_checkpointing = no_checkpointing;
            let mut roomy = tight.clone();
            roomy.card.free = Bytes::from_mib(free + more);
            let mut history = history(&tight, ratio, runs);
            let fingerprint = history.fingerprint(&tight, false);
            history.observations.extend(unpacked.map(|ratio| ran(&fingerprint, ratio)));
            if let Ok(tight) = plan_learned(&tight, &book, &history) {
                let roomy = plan_learned(&roomy, &book, &history);
                prop_assert!(roomy.is_ok_and(|roomy| roomy.chosen <= tight.chosen));
            }
        }
    }
}
