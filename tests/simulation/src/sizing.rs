//! How much memory does a job of the simulation take, by the real sizing engine?

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use mhtrain_job::queue::TooSmall;
use mhtrain_job::rerun::{ExpandableSegments, Policy};
use mhtrain_job::spec::JobSpec;
use mhtrain_sizing::estimate::estimate;
use mhtrain_sizing::gpu::{Card, ComputeCapability};
use mhtrain_sizing::ladder::{RunAdvice, TierBook};
use mhtrain_sizing::model::Model;
use mhtrain_sizing::observation::{Observation, Versions};
use mhtrain_sizing::plan::{History, Plan, plan_learned, workload};
use mhtrain_sizing::request::TrainerFeatures;
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::ExpertForm;

use crate::script::Wish;

/// What the ladder of a job depends on beside the job: GiB of the card, what is free, and what is known of earlier attempts.
type Question = (Wish, u64, u64, u64);

/// A plan, or why there is none.
pub(crate) type Answer = Result<Rc<Plan>, TooSmall>;

/// Answers that are kept at most where they rest on earlier attempts.
const LEARNED_KEPT: usize = 2000;

thread_local! {
    /// The engine is a function of its question, and the same question comes in thousands of histories.
    static ANSWERS: RefCell<HashMap<Question, Answer>> = RefCell::default();
    /// Answers that rest on earlier attempts: there is no end of different ones.
    static LEARNED: RefCell<HashMap<Question, Answer>> = RefCell::default();
    static BOOK: TierBook = TierBook::builtin();
    /// Of any model: the simulated jobs have the same rows of evaluation and the same workers.
    static ADVICE: RunAdvice = BOOK.with(|book| {
        let model = Model::resolve("Qwen2.5-7B", None, None).expect("a model of the catalogue");
        RunAdvice { per_device_eval_batch_size: 4, dataloader_num_workers: 4, ..book.run_advice(&model, 16) }
    });
}

/// What counts for the plans of one user.
#[derive(Clone, Debug, Default)]
pub(crate) struct Learned {
    pub(crate) history: History,
    /// Two of the same number are the same, for a plan.
    digest: u64,
}

impl Learned {
    pub(crate) fn from(observations: Vec<Observation>) -> Learned {
        let mut hasher = DefaultHasher::new();
        for seen in &observations {
            // All but its name.
            format!("{:?}", (&seen.fingerprint, &seen.tier, seen.predicted, seen.sized_row, seen.seen))
                .hash(&mut hasher);
        }
        let digest = if observations.is_empty() { 0 } else { hasher.finish() };
        Learned { history: History { observations, versions: Versions::default() }, digest }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.history.observations.is_empty()
    }
}

/// Returns the plan of a job for a card of so many GiB, of which so many are free.
pub(crate) fn size(spec: &JobSpec, wish: &Wish, total_gib: u64, free_gib: u64, learned: &Learned) -> Answer {
    let question = (wish.clone(), total_gib, free_gib, learned.digest);
    let answers = if learned.is_empty() { &ANSWERS } else { &LEARNED };
    if let Some(answer) = answers.with_borrow(|answers| answers.get(&question).cloned()) {
        return answer;
    }
    let answer = ask(spec, total_gib, free_gib, &learned.history);
    answers.with_borrow_mut(|answers| {
        if !learned.is_empty() && answers.len() >= LEARNED_KEPT {
            answers.clear();
        }
        answers.insert(question, answer.clone());
    });
    answer
}

/// Returns the name of a card of so many GiB.
pub(crate) fn card_name(total_gib: u64) -> String {
    format!("card of {total_gib} GiB")
}

fn ask(spec: &JobSpec, total_gib: u64, free_gib: u64, history: &History) -> Answer {
    let refused = |why: String, help| TooSmall { why, help };
    let model = Model::resolve(&spec.model, None, None).map_err(|e| refused(e.to_string(), e.help()))?;
    let card = Card {
        name: card_name(total_gib),
        index: Some(0),
        total: Bytes::from_gib(total_gib),
        free: Bytes::from_gib(free_gib),
        compute_capability: Some(ComputeCapability::AMPERE),
    };
    let features =
        TrainerFeatures { flash_attn: true, liger: false, bitsandbytes: true, experts: ExpertForm::Fused };
    let held = Bytes::from_gib(total_gib.saturating_sub(free_gib));
    let request = spec
        .sizing_request(model, card, held, features, 0.10)
        .map_err(|e| refused(e.to_string(), e.help()))?;
    let planned = BOOK.with(|book| plan_learned(&request, book, history));
    planned.map(Rc::new).map_err(|e| refused(e.to_string(), e.help()))
}

/// Returns the policy for a job of the daemon.
pub(crate) fn policy(spec: &JobSpec, other_device: bool) -> Option<Policy> {
    let mut policy = ADVICE.with(|advice| Policy::for_job(spec, ExpandableSegments::Off, advice)).ok()?;
    policy.other_device = other_device;
    Some(policy)
}

/// Returns the GiB that a pass of a rung takes whose prediction is off by so many percent. It is no finer, so that few
/// different questions come to the engine.
pub(crate) fn needs(wish: &Wish, tier: &Tier, percent: u64) -> u64 {
    let Ok(model) = Model::resolve(wish.model, None, None) else { return 1 };
    let predicted = estimate(&model, &workload(wish.method(), ExpertForm::Fused, tier, None))
        .map_or(1.0, |estimate| estimate.device_peak_bytes.gib());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some GiB")]
    let mib = (predicted * 1024.0) as u64;
    (mib * percent).div_ceil(100 * 1024).max(1)
}
