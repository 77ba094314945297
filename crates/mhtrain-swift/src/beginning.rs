//! Where does the next attempt of a job begin?
//!
//! `checkpoint::choose_resume` says which of some checkpoints can be resumed; here is said which are asked about, and what
//! each wish of `rerun::decide` means for them.

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
    /// Last step whose loss was a number.
    pub last_good_step: Option<u64>,
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
    let (mut checkpoints, old) = to_ask_about(saved, wanted.tier);
    match wanted.wish {
        ResumeWish::FromStart => {
            return Beginning::FirstRow { resume: again(wanted.steps_done), why: None };
        }
        ResumeWish::LastGoodWeights => return last_good_weights(checkpoints, wanted),
        ResumeWish::Latest | ResumeWish::Previous => {}
    }
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

/// Returns the checkpoints that come into question, and the rung that wrote them. Those of attempts that trained other
/// rows only come when there are no others: then they say why nothing can be resumed.
fn to_ask_about(saved: &[Saved], tier: &Tier) -> (Vec<CheckpointFacts>, Tier) {
    let all = |same: bool| {
        let these = saved.iter().filter(move |saved| saved.tier.trains_the_same_as(tier) == same);
        these.filter(|saved| !saved.checkpoints.is_empty())
    };
    let same: Vec<CheckpointFacts> = all(true).flat_map(|saved| saved.checkpoints.clone()).collect();
    match all(false).next_back() {
        Some(other) if same.is_empty() => (other.checkpoints.clone(), other.tier.clone()),
        Some(_) | None => (same, tier.clone()),
    }
}

/// Returns the newest checkpoint from before the loss went bad, for its weights alone.
fn last_good_weights(mut checkpoints: Vec<CheckpointFacts>, wanted: &Wanted<'_>) -> Beginning {
    let good_until = wanted.last_good_step.unwrap_or(0);
    checkpoints.retain(|checkpoint| checkpoint.is_complete() && checkpoint.step <= good_until);
    let Some(newest) = checkpoints.into_iter().max_by_key(|checkpoint| checkpoint.step) else {
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
