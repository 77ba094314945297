//! What does the end of an attempt mean?

use mhtrain_job::diagnosis::{Diagnosis, Kind};
use mhtrain_job::event::Exit;

use crate::diagnosis::{Diagnoser, ExitFacts};
use crate::proof::{Proof, Unproven};
use crate::stall::{self, Stall};

/// Why we ended an attempt that nobody asked to stop.
#[derive(Clone, Debug, PartialEq)]
pub enum EndedByUs {
    /// It hung.
    Stalled(Stall),
    /// Its loss was no number any more.
    Diverged(Diagnosis),
}

/// Returns why an attempt ended, by what it printed and by what is known beside that. `loop_ended`: it wrote its
/// end-of-training line.
pub fn diagnose_end(
    printed: Diagnoser,
    exit: &Exit,
    facts: ExitFacts,
    loop_ended: bool,
    ended: Option<&EndedByUs>,
) -> Diagnosis {
    // What it printed may lack the line that its log of metrics has.
    let diverged = printed.ended_diverged().filter(|_| *exit == Exit::Lost && loop_ended);
    let mut diagnosis = printed.finish(facts);
    if let (Some(diverged), Kind::Interrupted) = (diverged, diagnosis.kind) {
        diagnosis = diverged;
    }
    if *exit == Exit::Lost && names_no_cause(&diagnosis) && !loop_ended {
        // It died with its recorder. To a reader of its output alone it may still be running, but it is gone.
        diagnosis = Diagnosis { evidence: diagnosis.evidence, ..Diagnosis::interrupted() };
    }
    // A cause in its words comes first: one rank may have died of it while the others waited.
    match ended.filter(|_| matches!(diagnosis.kind, Kind::Interrupted | Kind::Unknown)) {
        Some(EndedByUs::Stalled(stall)) => stall::diagnose(stall),
        Some(EndedByUs::Diverged(found)) => found.clone(),
        None => diagnosis,
    }
}

/// Returns whether a diagnosis knows of nothing that a trainer could have died of.
fn names_no_cause(diagnosis: &Diagnosis) -> bool {
    !diagnosis.fatal && matches!(diagnosis.kind, Kind::Unknown | Kind::Success)
}

/// What follows on the end of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub enum Conclusion {
    /// The job succeeded.
    Succeeded(Proof),
    /// Somebody asked for the end, and this is it.
    Cancelled,
    /// The trainer could not be started, for this reason: another attempt would not be either.
    NotStarted(String),
    /// `rerun::decide` answers. What is missing for a success is `None` where only divergence stands against it.
    Answer(Option<Unproven>),
}

/// Returns what follows on an end. A stop that came too late takes a success from nobody; a run whose loss is no number is
/// none, whatever it did.
pub fn conclude(
    proven: Result<Proof, Unproven>,
    diagnosis: &Diagnosis,
    exit: &Exit,
    stopped: bool,
) -> Conclusion {
    match proven {
        Ok(proof) if diagnosis.kind != Kind::Diverged => Conclusion::Succeeded(proof),
        _ if stopped => Conclusion::Cancelled,
        proven => match exit {
            Exit::SpawnFailed { error } => Conclusion::NotStarted(error.clone()),
            Exit::Code { .. } | Exit::Signal { .. } | Exit::Lost => Conclusion::Answer(proven.err()),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::proof::{ExitStatus, ProofKind};

    fn proof() -> Proof {
        Proof {
            proof: ProofKind::Rows,
            exit: ExitStatus::Code(0),
            steps: 20,
            rows: Some(320),
            steps_per_epoch: Some(10),
            checkpoint: PathBuf::from("out/checkpoint-20"),
        }
    }

    fn of_kind(kind: Kind) -> Diagnosis {
        Diagnosis { kind, ..Diagnosis::interrupted() }
    }

    #[test]
    fn a_lost_attempt_without_a_word_was_interrupted_and_is_not_a_success() {
        let mut printed = Diagnoser::new();
        printed.push_bytes(b"Train:  50%|#####     | 5/10 [00:05<00:05,  1.00s/it]\n");
        let facts = ExitFacts::default();
        let lost = diagnose_end(printed.clone(), &Exit::Lost, facts.clone(), false, None);
        assert_eq!((lost.kind, lost.fatal), (Kind::Interrupted, true));
        printed.push_bytes(b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n");
        let oom = diagnose_end(printed, &Exit::Lost, facts, false, None);
        assert_eq!(oom.kind, Kind::DeviceOom, "its own words come first");
    }

    #[test]
    fn a_training_that_diverged_is_none_though_it_was_lost_or_stopped_at_its_end() {
        let mut printed = Diagnoser::new();
        for step in 1..=10 {
            let line = format!("{{'loss': nan, 'grad_norm': nan, 'global_step/max_steps': '{step}/10'}}\n");
            printed.push_bytes(line.as_bytes());
        }
        // The end may be in its log of metrics alone.
        let facts = ExitFacts { we_stopped_it: true, ..ExitFacts::default() };
        assert_eq!(
            diagnose_end(printed.clone(), &Exit::Lost, facts.clone(), true, None).kind,
            Kind::Diverged
        );
        assert_eq!(diagnose_end(printed.clone(), &Exit::Lost, facts, false, None).kind, Kind::Interrupted);
        printed.push_bytes(b"{'train_runtime': 12.0, 'train_loss': nan, 'epoch': 1.0}\n");
        for (we_stopped_it, oom_kill) in [(false, None), (true, None), (true, Some(true))] {
            let facts = ExitFacts { we_stopped_it, oom_kill, ..ExitFacts::default() };
            let lost = diagnose_end(printed.clone(), &Exit::Lost, facts, true, None);
            assert_eq!(lost.kind, Kind::Diverged, "stopped: {we_stopped_it}");
        }
    }

    #[test]
    fn a_proof_stands_against_a_late_stop_but_not_against_divergence() {
        let exit = Exit::Code { code: 0 };
        let success = of_kind(Kind::Success);
        assert_eq!(conclude(Ok(proof()), &success, &exit, true), Conclusion::Succeeded(proof()));
        let diverged = of_kind(Kind::Diverged);
        assert_eq!(conclude(Ok(proof()), &diverged, &exit, false), Conclusion::Answer(None));
        assert_eq!(conclude(Ok(proof()), &diverged, &exit, true), Conclusion::Cancelled);
        let unproven = Err(Unproven::NoEndOfTraining);
        assert_eq!(conclude(unproven.clone(), &success, &exit, true), Conclusion::Cancelled);
        let answer = conclude(unproven, &success, &exit, false);
        assert_eq!(answer, Conclusion::Answer(Some(Unproven::NoEndOfTraining)));
    }
}
