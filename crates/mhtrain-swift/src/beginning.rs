//! Where does the next attempt of a job begin?
//!
//! `checkpoint::choose_resume` says which of some checkpoints can be resumed; here is said which are asked about, and what
//! each wish of `rerun::decide` means for them.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::PathBuf;

use mhtrain_job::event::{Resume, ResumeKind};
use mhtrain_job::rerun::ResumeWish;
use mhtrain_sizing::tier::Tier;

use crate::checkpoint::{
    CheckpointFacts, NoResume, PassedOver, ResumeDecision, ResumeQuestion, choose_resume,
};

/// What one attempt left.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Its rung.
    pub tier: Tier,
    /// Its checkpoints, in any order.
    pub checkpoints: Vec<CheckpointFacts>,
    /// Whether its training diverged.
    pub diverged: bool,
    /// Last step of it whose loss was a number, by its log; asked for only after a divergence.
    pub last_good_step: Option<u64>,
}

/// What the next attempt is like.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Its rung.
    pub tier: &'a Tier,
    /// From where it should go on.
    pub wish: ResumeWish,
    /// Last optimizer step that any attempt finished; 0 before the first.
    pub steps_done: u64,
    /// As in [`ResumeQuestion`].
    pub restores_train_batch_size: bool,
    /// As in [`ResumeQuestion`].
    pub replays_first_epoch: bool,
    /// Steps of one epoch, where they are known.
    pub steps_per_epoch: Option<u64>,
    /// Whether trained steps may be given up to start again.
    pub allow_restart: bool,
    /// Steps whose checkpoint an earlier attempt could not read.
    pub corrupt_steps: &'a BTreeSet<u64>,
}

/// Where an attempt begins.
#[derive(Clone, Debug, PartialEq)]
pub enum Beginning {
    /// At the first row.
    FirstRow {
        /// What is done again; `None` when nothing was done before.
        resume: Option<Resume>,
        /// Why no checkpoint is resumed; `None` when none was wished for.
        why: Option<NoResume>,
    },
    /// At a checkpoint.
    Checkpoint {
        /// How exact that is.
        resume: Resume,
        /// Its directory.
        path: PathBuf,
        /// The text that its `trainer_state.json` must have; `None`: as it is.
        repair: Option<String>,
        /// Newer checkpoints that cannot be used.
        passed_over: Vec<PassedOver>,
    },
    /// Nowhere: what would have to be done is not allowed.
    Refused {
        /// Why.
        why: NoResume,
        /// What the user can do.
        help: Option<String>,
    },
}

/// Returns where the next attempt begins, with what the attempts before it left, oldest first.
pub fn begin(saved: &[Saved], wanted: &Wanted<'_>) -> Beginning {
    // What went bad stays bad, also when a later attempt that goes better is interrupted.
    let saved: Vec<Saved> =
        saved.iter().map(|saved| if saved.diverged { good_part(saved) } else { saved.clone() }).collect();
    // A job that came back to these rows, from another card for example, goes on where it left them.
    let trained_these =
        |saved: &Saved| saved.tier.trains_the_same_as(wanted.tier) && !saved.checkpoints.is_empty();
    match wanted.wish {
        ResumeWish::FromStart if !saved.iter().any(trained_these) => {
            return Beginning::FirstRow { resume: again(wanted.steps_done), why: None };
        }
        ResumeWish::LastGoodWeights => return last_good_weights(&saved, wanted),
        ResumeWish::FromStart | ResumeWish::Latest | ResumeWish::Previous => {}
    }
    let (mut checkpoints, old) = to_ask_about(&saved, wanted.tier);
    let question = ResumeQuestion {
        old: &old,
        new: wanted.tier,
        restores_train_batch_size: wanted.restores_train_batch_size,
        replays_first_epoch: wanted.replays_first_epoch,
        steps_per_epoch: wanted.steps_per_epoch,
        allow_restart: wanted.allow_restart,
        corrupt_steps: wanted.corrupt_steps,
    };
    loop {
        let decision = choose_resume(&checkpoints, &question);
        let help = decision.help();
        return match decision {
            // A checkpoint of the last step cannot be resumed: nothing would be trained and nothing proven. The end is
            // trained again from the one before it. Another attempt may have meant to do more steps: only this one goes.
            ResumeDecision::Finished { checkpoint, .. } => {
                checkpoints.retain(|other| other.path != checkpoint);
                continue;
            }
            ResumeDecision::Exact { checkpoint, step, repair, passed_over, .. } => Beginning::Checkpoint {
                resume: Resume {
                    kind: ResumeKind::Exact,
                    checkpoint: Some(checkpoint.display().to_string()),
                    from_step: step,
                    steps_repeated: wanted.steps_done.saturating_sub(step),
                },
                path: checkpoint,
                repair,
                passed_over,
            },
            ResumeDecision::Restart { why, lost_steps } => {
                Beginning::FirstRow { resume: again(wanted.steps_done.max(lost_steps)), why: Some(why) }
            }
            ResumeDecision::Refuse { why, .. } => Beginning::Refused { why, help },
        };
    }
}

/// Returns a restart that does so many steps again; `None` where there are none.
fn again(steps: u64) -> Option<Resume> {
    (steps > 0).then_some(Resume {
        kind: ResumeKind::Restart,
        checkpoint: None,
        from_step: 0,
        steps_repeated: steps,
    })
}

/// Returns the checkpoints that come into question, those of the newest attempt first, and the rung that wrote them. Those of
/// attempts that trained other rows only come when there are no others: then they say why nothing can be resumed.
fn to_ask_about(saved: &[Saved], tier: &Tier) -> (Vec<CheckpointFacts>, Tier) {
    let all = |same: bool| {
        let these = saved.iter().filter(move |saved| saved.tier.trains_the_same_as(tier) == same);
        these.filter(|saved| !saved.checkpoints.is_empty())
    };
    let same: Vec<CheckpointFacts> = all(true).rev().flat_map(|saved| saved.checkpoints.clone()).collect();
    match all(false).next_back() {
        Some(other) if same.is_empty() => (other.checkpoints.clone(), other.tier.clone()),
        Some(_) | None => (same, tier.clone()),
    }
}

/// Returns an attempt without the checkpoints that it saved after its last good step.
fn good_part(saved: &Saved) -> Saved {
    let good_until = saved.last_good_step.unwrap_or(0);
    let mut good = saved.clone();
    good.checkpoints.retain(|checkpoint| checkpoint.step <= good_until);
    good
}

/// Returns the newest checkpoint from before the loss went bad, for its weights alone. Each attempt's own log says which of
/// its checkpoints are: a step that was good in one may have gone bad in the next.
fn last_good_weights(saved: &[Saved], wanted: &Wanted<'_>) -> Beginning {
    // Weights of other adapters, or packed into other bits, are no weights of this run.
    let fits = |saved: &&Saved| {
        let weights = |tier: &Tier| (tier.adapters.clone(), tier.quant_bits);
        weights(&saved.tier) == weights(wanted.tier)
    };
    let good: Vec<Saved> = saved.iter().filter(fits).map(good_part).collect();
    let (mut checkpoints, _) = to_ask_about(&good, wanted.tier);
    checkpoints.retain(|it| it.is_complete() && !wanted.corrupt_steps.contains(&it.step));
    checkpoints.sort_by_key(|checkpoint| Reverse(checkpoint.step));
    let Some(newest) = checkpoints.into_iter().next() else {
        let resume = Resume {
            kind: ResumeKind::Restart,
            checkpoint: None,
            from_step: 0,
            steps_repeated: wanted.steps_done,
        };
        return Beginning::FirstRow { resume: Some(resume), why: None };
    };
    Beginning::Checkpoint {
        resume: Resume {
            kind: ResumeKind::WeightsOnly,
            checkpoint: Some(newest.path.display().to_string()),
            from_step: newest.step,
            steps_repeated: wanted.steps_done.saturating_sub(newest.step),
        },
        path: newest.path,
        repair: None,
        passed_over: Vec::new(),
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::checkpoint::TrainerState;
    use crate::testing;

    fn tier(max_length: u32) -> Tier {
        Tier { max_length, ..testing::tier() }
    }

    fn saved(attempt: u32, steps: &[(u64, u64)], last_good_step: Option<u64>) -> Saved {
        let checkpoint = |(step, max_steps): &(u64, u64)| {
            let text =
                format!(r#"{{"global_step": {step}, "max_steps": {max_steps}, "train_batch_size": 8}}"#);
            CheckpointFacts {
                path: PathBuf::from(format!("attempt-{attempt}/checkpoint-{step}")),
                step: *step,
                state: TrainerState::parse(&text).ok(),
                has_optimizer: true,
                has_scheduler: true,
                has_rng: true,
                has_weights: true,
            }
        };
        Saved {
            tier: tier(3072),
            checkpoints: steps.iter().map(checkpoint).collect(),
            diverged: false,
            last_good_step,
        }
    }

    fn begun(saved: &[Saved], tier: &Tier, wish: ResumeWish) -> Beginning {
        begun_beside(saved, tier, wish, &[])
    }

    fn begun_beside(saved: &[Saved], tier: &Tier, wish: ResumeWish, corrupt: &[u64]) -> Beginning {
        let corrupt_steps = BTreeSet::from_iter(corrupt.iter().copied());
        let wanted = Wanted {
            tier,
            wish,
            steps_done: 12,
            restores_train_batch_size: false,
            replays_first_epoch: false,
            steps_per_epoch: None,
            allow_restart: true,
            corrupt_steps: &corrupt_steps,
        };
        begin(saved, &wanted)
    }

    fn path(beginning: &Beginning) -> Option<&str> {
        match beginning {
            Beginning::Checkpoint { path, .. } => path.to_str(),
            Beginning::FirstRow { .. } | Beginning::Refused { .. } => None,
        }
    }

    #[test]
    fn a_finished_checkpoint_is_left_out_alone() {
        let all = [saved(1, &[(3, 3)], None), saved(2, &[(3, 6), (6, 6)], None)];
        let beginning = begun(&all, &tier(3072), ResumeWish::Latest);
        assert_eq!(path(&beginning), Some("attempt-2/checkpoint-3"));
    }

    #[test]
    fn weights_are_good_by_the_log_of_the_attempt_that_saved_them() {
        let all = [saved(1, &[(4, 12), (6, 12)], Some(10)), saved(2, &[(8, 12), (10, 12)], None)];
        let beginning = begun(&all, &tier(3072), ResumeWish::LastGoodWeights);
        assert_eq!(path(&beginning), Some("attempt-1/checkpoint-6"));
        let spoilt = [saved(1, &[(4, 12)], None)];
        let beginning = begun(&spoilt, &tier(3072), ResumeWish::LastGoodWeights);
        assert!(matches!(beginning, Beginning::FirstRow { resume: Some(_), .. }), "{beginning:?}");
    }

    #[test]
    fn a_job_that_comes_back_to_its_rows_goes_on_where_it_left_them() {
        let shorter = Saved { tier: tier(2048), ..saved(1, &[(3, 12)], None) };
        let all = [shorter, saved(2, &[], None)];
        let beginning = begun(&all, &tier(2048), ResumeWish::FromStart);
        assert_eq!(path(&beginning), Some("attempt-1/checkpoint-3"));
        let beginning = begun(&all[1..], &tier(2048), ResumeWish::FromStart);
        assert!(matches!(beginning, Beginning::FirstRow { why: None, .. }), "{beginning:?}");
    }

    #[test]
    fn weights_that_could_not_be_read_or_are_of_other_adapters_are_not_taken() {
        let all = [saved(1, &[(4, 12), (6, 12)], Some(10))];
        let beginning = begun_beside(&all, &tier(3072), ResumeWish::LastGoodWeights, &[6]);
        assert_eq!(path(&beginning), Some("attempt-1/checkpoint-4"));
        let packed = Tier { quant_bits: Some(4), ..tier(3072) };
        let beginning = begun(&all, &packed, ResumeWish::LastGoodWeights);
        assert!(matches!(beginning, Beginning::FirstRow { resume: Some(_), .. }), "{beginning:?}");
    }

    #[test]
    fn what_went_bad_is_not_resumed_when_a_later_attempt_is_interrupted() {
        let spoilt = Saved { diverged: true, ..saved(1, &[(4, 12), (10, 12)], Some(5)) };
        let all = [spoilt, saved(2, &[(4, 12), (6, 12)], None)];
        let beginning = begun(&all, &tier(3072), ResumeWish::Latest);
        assert_eq!(path(&beginning), Some("attempt-2/checkpoint-6"));
        let beginning = begun(&all[..1], &tier(3072), ResumeWish::Latest);
        assert_eq!(path(&beginning), Some("attempt-1/checkpoint-4"));
    }

    #[test]
    fn of_one_step_the_newest_attempts_checkpoint_is_resumed() {
        let all = [saved(1, &[(4, 12)], None), saved(2, &[(4, 12)], None)];
        let beginning = begun(&all, &tier(3072), ResumeWish::Latest);
        assert_eq!(path(&beginning), Some("attempt-2/checkpoint-4"));
    }

    #[test]
    fn other_rows_are_begun_from_the_first_one() {
        let beginning = begun(&[saved(1, &[(4, 12)], None)], &tier(2048), ResumeWish::Latest);
        let Beginning::FirstRow { resume: Some(resume), why: Some(NoResume::OtherRows { .. }) } = beginning
        else {
            panic!("{beginning:?}");
        };
        assert_eq!((resume.kind, resume.steps_repeated), (ResumeKind::Restart, 12));
    }
}
