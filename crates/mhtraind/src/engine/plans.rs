//! Was this very question put to the sizing engine a moment ago?
//!
//! A plan is a function of its request and of what earlier attempts showed, and a sweep puts the same question for each of its
//! jobs. The last few answers are kept.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mhtrain_job::queue::TooSmall;
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::plan::{History, Plan, plan_learned};
use mhtrain_sizing::request::Request;

use super::prepare::chain;

/// Answers that are kept: two for each card of a host of sixteen.
const KEPT: usize = 32;

/// The plan that answers a request, or why there is none.
pub type Answer = Result<Arc<Plan>, TooSmall>;

/// The tiers of a site, and the answers that were found with them last.
#[derive(Debug)]
pub struct Plans {
    /// The site's tiers.
    pub book: TierBook,
    kept: Mutex<VecDeque<Kept>>,
}

#[derive(Debug)]
struct Kept {
    request: Request,
    history: Arc<History>,
    answer: Answer,
}

impl Plans {
    /// Returns a planner with these tiers.
    pub fn new(book: TierBook) -> Plans {
        Plans { book, kept: Mutex::default() }
    }

    /// Returns what `plan_learned` answers. Two histories count as the same where they are one and the same value in memory.
    pub fn answer(&self, request: Request, history: &Arc<History>) -> Answer {
        let is_it = |kept: &Kept| {
            Arc::ptr_eq(&kept.history, history)
                && kept.request.card == request.card
                && kept.request == request
        };
        if let Some(kept) = self.kept().iter().find(|kept| is_it(kept)) {
            return kept.answer.clone();
        }
        let planned = plan_learned(&request, &self.book, history);
        let answer = planned.map(Arc::new).map_err(|e| TooSmall { why: chain(&e), help: e.help() });
        let mut kept = self.kept();
        kept.truncate(KEPT - 1);
        kept.push_front(Kept { request, history: Arc::clone(history), answer: answer.clone() });
        answer
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mhtrain_job::spec::JobSpec;
    use mhtrain_sizing::gpu::{Card, ComputeCapability};
    use mhtrain_sizing::model::Model;
    use mhtrain_sizing::request::TrainerFeatures;
    use mhtrain_sizing::units::Bytes;
    use mhtrain_sizing::workload::ExpertForm;

    fn history() -> Arc<History> {
        Arc::new(History::default())
    }

    fn request() -> Request {
        let job = serde_json::json!({"model": "Qwen/Qwen2.5-7B", "dataset": "x.jsonl", "output_dir": "out"});
        let card = Card {
            name: "A100-SXM4-80GB".to_owned(),
            index: Some(0),
            total: Bytes::from_gib(80),
            free: Bytes::from_gib(80),
            compute_capability: Some(ComputeCapability::AMPERE),
        };
        let model = Model::resolve("Qwen/Qwen2.5-7B", None, None).unwrap();
        let features = TrainerFeatures {
            flash_attn: true,
            liger: false,
            bitsandbytes: true,
            experts: ExpertForm::Fused,
        };
        JobSpec::from_value(&job).unwrap().sizing_request(model, card, Bytes::ZERO, features, 0.1).unwrap()
    }

    #[test]
    fn an_answer_is_kept_for_the_same_question_alone() {
        let plans = Plans::new(TierBook::builtin());
        let request = request();
        let (first, other) = (history(), history());
        let answer = |request: &Request, history| plans.answer(request.clone(), history).unwrap();
        let begin = answer(&request, &first);
        assert!(Arc::ptr_eq(&begin, &answer(&request, &first)));
        // An attempt ended since.
        assert!(!Arc::ptr_eq(&begin, &answer(&request, &other)));
        // Memory came or went.
        let mut smaller = request.clone();
        smaller.card.free = Bytes::new(smaller.card.free.get() / 2);
        assert_ne!(*begin, *answer(&smaller, &first));
        assert!(Arc::ptr_eq(&begin, &answer(&request, &first)));
        // No more are kept than that.
        for n in 1..=KEPT as u64 {
            smaller.card.free = Bytes::new(request.card.free.get() - n);
            answer(&smaller, &first);
        }
        assert_eq!(plans.kept().len(), KEPT);
        assert!(!Arc::ptr_eq(&begin, &answer(&request, &first)));
    }
}
