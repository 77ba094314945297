//! Was what was planned trained?
//!
//! Exit code 0 is not success: a resume at a wrong micro-batch ends with 0 and has trained nothing.

use serde::{Deserialize, Serialize};

use crate::checkpoint::CheckpointFacts;
use crate::progress::EndOfTraining;

/// How a process ended, as far as it is known.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited by itself with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// Nobody saw it: the files alone must prove success.
    Lost,
}

/// How many steps were planned.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedSteps {
    /// `max_steps` was pinned.
    Pinned(u64),
    /// So many passes over the data; a fraction is allowed.
    Epochs(f64),
}

/// What a proof is made from. All of it belongs to the last attempt.
#[derive(Clone, Debug)]
pub struct ProofInput<'a> {
    /// How the trainer ended.
    pub exit: ExitStatus,
    /// Its end-of-training line.
    pub end: Option<EndOfTraining>,
    /// Length of the train set after filtering and packing; `None` where it cannot be known.
    pub rows: Option<u64>,
    /// Rows of one pass on one device.
    pub micro_batch: u32,
    /// Passes per optimizer step.
    pub accumulation: u32,
    /// Devices that trained in parallel.
    pub world_size: u32,
    /// How many steps were planned.
    pub planned: PlannedSteps,
    /// The newest checkpoint.
    pub checkpoint: Option<&'a CheckpointFacts>,
}

/// How strong a proof is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofKind {
    /// The rows are known, and the steps that they (or a pinned number of steps) ask for were trained.
    Rows,
    /// The number of rows is unknown: the trainer did the steps that it meant to do.
    ExitAndSteps,
}

/// Success, with what it rests on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// How strong it is.
    pub proof: ProofKind,
    /// How the trainer ended.
    pub exit: ExitStatus,
    /// Steps that were trained, equal to those that were planned.
    pub steps: u64,
    /// Length of the train set.
    pub rows: Option<u64>,
    /// Steps of one pass over it.
    pub steps_per_epoch: Option<u64>,
    /// The final checkpoint.
    pub checkpoint: std::path::PathBuf,
}

/// Why success is not claimed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "unproven")]
pub enum Unproven {
    /// The trainer failed.
    #[error("the trainer exited with {code}")]
    ExitCode {
        /// Its code.
        code: i32,
    },
    /// A signal ended the trainer.
    #[error("the trainer was ended by signal {signal}")]
    ExitSignal {
        /// The signal.
        signal: i32,
    },
    /// The training loop did not end.
    #[error("the log has no end-of-training line")]
    NoEndOfTraining,
    /// Fewer (or more) steps than planned.
    #[error("trained {trained} of {planned} steps")]
    Steps {
        /// Steps done.
        trained: u64,
        /// Steps planned.
        planned: u64,
    },
    /// The trainer meant to do another number of steps than follows from the rows.
    #[error("the trainer meant to do {meant} steps, {planned} were planned")]
    MaxSteps {
        /// By the trainer.
        meant: u64,
        /// By the rows.
        planned: u64,
    },
    /// The plan itself is nothing that can be trained: no rows, or no epochs.
    #[error("no steps were planned ({} rows)", rows.map_or_else(|| "unknown".to_owned(), |rows| rows.to_string()))]
    NothingPlanned {
        /// Length of the train set.
        rows: Option<u64>,
    },
    /// No checkpoint.
    #[error("there is no checkpoint of step {step}")]
    NoCheckpoint {
        /// The step that it should have.
        step: u64,
    },
    /// The newest checkpoint is of an earlier step.
    #[error("the newest checkpoint is of step {found}, not of step {step}")]
    CheckpointStep {
        /// The step that it should have.
        step: u64,
        /// The step that it has.
        found: u64,
    },
    /// The final checkpoint is not complete.
    #[error("the checkpoint of step {step} is not complete: {why}")]
    CheckpointIncomplete {
        /// Its step.
        step: u64,
        /// What is missing.
        why: String,
    },
}

impl Unproven {
    /// Returns what can be done about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Unproven::Steps { .. } | Unproven::MaxSteps { .. } => Some(
                "the trainer may have resumed at another batch, dropped rows, or been stopped early: see its log"
                    .to_owned(),
            ),
            Unproven::NoCheckpoint { .. } | Unproven::CheckpointStep { .. } => {
                Some("see that `save_strategy` is not `no` and that the disk is not full".to_owned())
            }
            Unproven::NothingPlanned { .. } => {
                Some("see whether every row is longer than max_length, or the data set is empty".to_owned())
            }
            Unproven::ExitCode { .. }
            | Unproven::ExitSignal { .. }
            | Unproven::NoEndOfTraining
            | Unproven::CheckpointIncomplete { .. } => None,
        }
    }
}

/// Returns how many optimizer steps one pass over the data takes; zero when no row is left.
///
/// Source: ms-swift's `BatchSamplerShard` gives each rank floor(rows / world) rows and keeps the last incomplete
/// micro-batch; transformers' `set_initial_training_values` rounds the micro-batches up to whole steps. On one device
/// this is ceil(rows / effective batch).
pub fn steps_per_epoch(rows: u64, micro_batch: u32, accumulation: u32, world_size: u32) -> u64 {
    let rows_of_a_rank = rows / u64::from(world_size.max(1));
    let rows_of_a_step = u64::from(micro_batch.max(1)) * u64::from(accumulation.max(1));
    rows_of_a_rank.div_ceil(rows_of_a_step)
}

/// Returns how many steps are planned; `None` where that depends on unknown rows.
///
/// Source: transformers' `set_initial_training_values`: ceil(epochs x steps per epoch), a fraction of an epoch
/// included (read in 4.57.6 and 5.19.0).
pub fn planned_steps(planned: PlannedSteps, steps_per_epoch: Option<u64>) -> Option<u64> {
    match planned {
        PlannedSteps::Pinned(steps) => Some(steps),
        PlannedSteps::Epochs(epochs) => {
            #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 steps")]
            let steps = steps_per_epoch? as f64 * epochs;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "`as` saturates; a negative or absurd plan is refused by its value"
            )]
            Some(steps.ceil() as u64)
        }
    }
}

/// Proves that the attempt trained what was planned, or says which part is missing.
pub fn prove(input: &ProofInput<'_>) -> Result<Proof, Unproven> {
    match input.exit {
        ExitStatus::Code(0) | ExitStatus::Lost => {}
        ExitStatus::Code(code) => return Err(Unproven::ExitCode { code }),
        ExitStatus::Signal(signal) => return Err(Unproven::ExitSignal { signal }),
    }
    let end = input.end.ok_or(Unproven::NoEndOfTraining)?;
    let per_epoch =
        input.rows.map(|rows| steps_per_epoch(rows, input.micro_batch, input.accumulation, input.world_size));
    let planned = planned_steps(input.planned, per_epoch);
    if planned == Some(0) {
        return Err(Unproven::NothingPlanned { rows: input.rows });
    }
    let proof = if input.rows.is_some() { ProofKind::Rows } else { ProofKind::ExitAndSteps };
    let steps = planned.unwrap_or(end.max_steps);
    if end.step != steps {
        return Err(Unproven::Steps { trained: end.step, planned: steps });
    }
    if end.max_steps != steps {
        return Err(Unproven::MaxSteps { meant: end.max_steps, planned: steps });
    }
    let checkpoint = input.checkpoint.ok_or(Unproven::NoCheckpoint { step: steps })?;
    if checkpoint.step != steps {
        return Err(Unproven::CheckpointStep { step: steps, found: checkpoint.step });
    }
    if let Some(defect) = checkpoint.defect() {
        return Err(Unproven::CheckpointIncomplete { step: steps, why: defect.to_string() });
    }
    Ok(Proof {
        proof,
        exit: input.exit,
        steps,
        rows: input.rows,
        steps_per_epoch: per_epoch,
        checkpoint: checkpoint.path.clone(),
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::checkpoint::TrainerState;

    fn checkpoint(step: u64) -> CheckpointFacts {
        let state = format!(r#"{{"global_step": {step}, "max_steps": 20}}"#);
        CheckpointFacts {
            path: PathBuf::from(format!("out/checkpoint-{step}")),
            step,
            state: Some(TrainerState::parse(&state).unwrap()),
            has_optimizer: true,
            has_scheduler: true,
            has_rng: true,
            has_weights: true,
        }
    }

    /// 310 rows, 2 epochs, 8 x 4: 20 steps.
    fn input(checkpoint: &CheckpointFacts) -> ProofInput<'_> {
        ProofInput {
            exit: ExitStatus::Code(0),
            end: Some(EndOfTraining { step: 20, max_steps: 20, train_loss: None }),
            rows: Some(310),
            micro_batch: 8,
            accumulation: 4,
            world_size: 1,
            planned: PlannedSteps::Epochs(2.0),
            checkpoint: Some(checkpoint),
        }
    }

    #[test]
    fn all_planned_steps_and_a_final_checkpoint_are_a_proof() {
        let last = checkpoint(20);
        let proof = prove(&input(&last)).unwrap();
        assert_eq!((proof.proof, proof.steps, proof.steps_per_epoch), (ProofKind::Rows, 20, Some(10)));
        assert_eq!(serde_json::to_value(&proof).unwrap()["proof"], "rows");
    }

    #[test]
    fn unknown_rows_make_the_weaker_proof() {
        let last = checkpoint(20);
        let proof = prove(&ProofInput { rows: None, ..input(&last) }).unwrap();
        assert_eq!(serde_json::to_value(&proof).unwrap()["proof"], "exit_and_steps");
    }

    #[test]
    fn each_missing_part_is_named_with_both_numbers() {
        let last = checkpoint(20);
        let mut cut = checkpoint(20);
        cut.has_scheduler = false;
        let early = checkpoint(15);
        let end = |step, max_steps| Some(EndOfTraining { step, max_steps, train_loss: None });
        let cases = [
            (ProofInput { exit: ExitStatus::Code(1), ..input(&last) }, "the trainer exited with 1"),
            (ProofInput { exit: ExitStatus::Signal(9), ..input(&last) }, "signal 9"),
            (ProofInput { end: None, ..input(&last) }, "end-of-training"),
            // The resume of a bigger checkpoint that trained nothing: exit 0, end line, 9 of 6.
            (ProofInput { end: end(9, 6), ..input(&last) }, "trained 9 of 20 steps"),
            (ProofInput { end: end(20, 40), ..input(&last) }, "meant to do 40 steps, 20 were planned"),
            (ProofInput { rows: Some(0), ..input(&last) }, "no steps were planned (0 rows)"),
            (ProofInput { checkpoint: None, ..input(&last) }, "no checkpoint of step 20"),
            (input(&early), "step 15, not of step 20"),
            (input(&cut), "no scheduler state"),
        ];
        for (input, says) in cases {
            let unproven = prove(&input).unwrap_err();
            assert!(unproven.to_string().contains(says), "{unproven} / {says}");
            let json = serde_json::to_string(&unproven).unwrap();
            assert_eq!(serde_json::from_str::<Unproven>(&json).unwrap(), unproven);
        }
    }

    #[test]
    fn a_lost_status_leaves_the_rest_to_prove() {
        let last = checkpoint(20);
        assert!(prove(&ProofInput { exit: ExitStatus::Lost, ..input(&last) }).is_ok());
        assert!(prove(&ProofInput { exit: ExitStatus::Lost, end: None, ..input(&last) }).is_err());
    }

    #[test]
    fn steps_are_rounded_as_the_trainer_rounds_them() {
        assert_eq!(steps_per_epoch(320, 8, 4, 1), 10);
        assert_eq!(steps_per_epoch(310, 2, 16, 1), 10);
        assert_eq!(steps_per_epoch(5, 8, 4, 1), 1);
        assert_eq!(steps_per_epoch(0, 8, 4, 1), 0);
        // 65 rows on 2 ranks: 32 rows each, one step of 2 x 16.
        assert_eq!(steps_per_epoch(65, 16, 2, 2), 1);
        assert_eq!(planned_steps(PlannedSteps::Epochs(1.5), Some(9)), Some(14));
        assert_eq!(planned_steps(PlannedSteps::Pinned(7), None), Some(7));
        assert_eq!(planned_steps(PlannedSteps::Epochs(1.0), None), None);
    }

    proptest::proptest! {
        #[test]
        fn factors_of_the_effective_batch_do_not_change_the_steps(rows in 0u64..100_000, power in 0u32..6) {
            let (micro, accumulation) = (1 << power, 1 << (5 - power));
            proptest::prop_assert_eq!(steps_per_epoch(rows, micro, accumulation, 1), rows.div_ceil(32));
        }
    }
}
