//! What becomes of a job when an attempt has ended: a success, another attempt, or an end with its reason?

use std::path::PathBuf;
use std::time::Duration;

use mhtrain_failpoint::reach;
use mhtrain_job::diagnosis::{Answer, Diagnosis};
use mhtrain_job::event::{AttemptStart, Exit, JobEvent};
use mhtrain_job::receipt::{ProofFacts, ProofKind};
use mhtrain_job::rerun::{Decision, Rerun, decide};
use mhtrain_job::stop;
use mhtrain_sizing::observation::Seen;
use mhtrain_sizing::units::Bytes;
use mhtrain_swift::proof::{self, ExitStatus, PlannedSteps, ProofInput, Unproven, prove};
use mhtrain_swift::verdict::{Conclusion, conclude, diagnose_end};

use super::watch::Gone;
use super::{Job, Next, Step};
use crate::cli::diagnose;
use crate::engine::directory::Lasting;
use crate::engine::follow::Follower;
use crate::engine::journal::now;
use crate::engine::observations;
use crate::engine::resume::facts;
use crate::engine::signals::StopCause;
use crate::failure::{Failure, Status, unreadable};

/// The time until the last receipt is tried again where the disk did not take it.
const RECEIPT_AGAIN: Duration = Duration::from_secs(2);

/// How often a daemon tries that: for an hour. The store has all that is in it.
const RECEIPT_TRIES_MAX: u32 = 1800;

impl Job<'_> {
    /// Judges an attempt that ended when nobody was left to decide what follows: its files tell the same as then.
    pub(super) fn judge_again(
        &mut self,
        start: &AttemptStart,
        exit: &Exit,
        diagnosis: &Diagnosis,
    ) -> Result<Step, Failure> {
        let output_dir = self.directory.attempt(start.attempt);
        let mut follower = Follower::new(&self.output_of(start.attempt), &output_dir);
        follower.look_to_the_end().map_err(|e| unreadable(&self.output_of(start.attempt), &e))?;
        self.conclude(start, exit, diagnosis, &follower)
    }

    /// Decides what the end of an attempt means.
    pub(super) fn judge(&mut self, gone: Gone) -> Result<Step, Failure> {
        let Gone { start, exit, facts, mut follower, ended, refused, .. } = gone;
        let loop_ended = follower.log.end_of_training().is_some();
        let printed = std::mem::take(&mut follower.diagnoser);
        let mut diagnosis = diagnose_end(printed, &exit, facts, loop_ended, ended.as_ref());
        if let Some(why) = &refused {
            diagnosis = Diagnosis::interrupted();
            diagnosis.evidence.line.clone_from(why);
        }
        let last_step = last_step(&follower);
        self.note_end(&exit, &diagnosis, Some(&follower));
        self.journal.record(JobEvent::AttemptEnded {
            attempt: start.attempt,
            exit: exit.clone(),
            diagnosis: Box::new(diagnosis.clone()),
            last_step,
        })?;
        self.observe(&start, &diagnosis, &follower);
        let step = self.conclude(&start, &exit, &diagnosis, &follower)?;
        Ok(match (step, refused) {
            (Step::Start(next), Some(why)) => {
                let help = "check free space and mode of the disk that holds its record".to_owned();
                Step::WaitForDisk(next, Failure::failed("cannot_start", why).help(help))
            }
            (step, _) => step,
        })
    }

    /// Lets later predictions learn from an attempt.
    fn observe(&self, start: &AttemptStart, diagnosis: &Diagnosis, follower: &Follower) {
        let Some(observer) = &self.observer else { return };
        let from_step = start.resume.as_ref().map_or(0, |resume| resume.from_step);
        let seen = observations::seen(follower, diagnosis, from_step);
        let pace = observations::pace(follower);
        if seen.is_none() && pace.is_none() {
            return;
        }
        let seen = seen.unwrap_or(Seen::Peak { allocated: None, reserved: None, device: None });
        let job = match self.receipt.id {
            Some(id) => format!("job {id}"),
            None => format!("{} of {}", self.prepared.spec.name, self.receipt.submitted_at),
        };
        let name = format!("{job}, attempt {}", start.attempt);
        if let Some(observation) = self.prepared.plan.observation(start.rung, name, seen, pace) {
            observer.observe(start.attempt, observation);
        }
    }

    /// Decides what follows on an end that is recorded.
    pub(super) fn conclude(
        &mut self,
        start: &AttemptStart,
        exit: &Exit,
        diagnosis: &Diagnosis,
        follower: &Follower,
    ) -> Result<Step, Failure> {
        let proven = self.prove(start, exit, follower);
        self.warn_of_companion(start, follower)?;
        match conclude(proven, diagnosis, exit, self.stop.is_some()) {
            Conclusion::Succeeded(proof) => self.succeeded(start, &proof, follower),
            Conclusion::Cancelled => self.cancelled(self.stop.unwrap_or(StopCause::Cancel)),
            Conclusion::NotStarted(error) => {
                let reason = format!("the trainer could not be started: {error}");
                self.failed(reason, Some("`mhtraind doctor` checks the trainer".to_owned()))
            }
            Conclusion::Answer(unproven) => {
                self.save_receipt()?;
                self.screen.say(format!(
                    "attempt {} ended: {}",
                    start.attempt,
                    diagnose::for_people(diagnosis)
                ));
                self.answer(diagnosis, unproven)
            }
        }
    }

    pub(super) fn warn_of_companion(
        &mut self,
        start: &AttemptStart,
        follower: &Follower,
    ) -> Result<(), Failure> {
        let steps = self.steps_per_epoch(&start.tier);
        let warnings = self.companion.warnings(start, follower, &self.prepared.dialect, steps);
        warnings.into_iter().try_for_each(|warning| self.warn(warning))
    }

    pub(super) fn answer(
        &mut self,
        diagnosis: &Diagnosis,
        unproven: Option<Unproven>,
    ) -> Result<Step, Failure> {
        let history = self.history();
        match decide(&history, diagnosis, &self.prepared.plan, &self.policy) {
            Decision::Rerun(rerun) => {
                self.screen.say(format!("next: {}", rerun.reason));
                self.receipt.then(&rerun.reason);
                self.journal.record(JobEvent::RerunDecided(rerun.clone()))?;
                if rerun.answer == Answer::OtherDevice {
                    return Ok(Step::OtherDevice);
                }
                let Rerun { rung, adjustments, wait, resume: wish, .. } = rerun;
                Ok(Step::Start(Next { rung, adjustments, wish, wait }))
            }
            Decision::Finish => {
                let why = unproven.map_or("the end could not be proven".to_owned(), |unproven| {
                    let help = unproven.help().map_or(String::new(), |help| format!(" ({help})"));
                    format!("{unproven}{help}")
                });
                let help =
                    "the trainer did not fail, but did not do what was planned; its log is in .mhtraind/";
                self.failed(format!("success cannot be proven: {why}"), Some(help.to_owned()))
            }
            Decision::GiveUp { reason, help } => self.failed(reason, help),
        }
    }

    pub(super) fn prove(
        &self,
        start: &AttemptStart,
        exit: &Exit,
        follower: &Follower,
    ) -> Result<proof::Proof, Unproven> {
        let exit = match exit {
            Exit::Code { code } => ExitStatus::Code(*code),
            Exit::Signal { signal } => ExitStatus::Signal(*signal),
            Exit::Lost => ExitStatus::Lost,
            Exit::SpawnFailed { .. } => ExitStatus::Code(127),
        };
        let pinned = self.prepared.spec.max_steps().ok().flatten();
        let planned = pinned.map_or(PlannedSteps::Epochs(start.tier.num_train_epochs), PlannedSteps::Pinned);
        let end = follower.log.end_of_training();
        let last = end.map(|end| {
            let path = self.directory.attempt(start.attempt).join(format!("checkpoint-{}", end.step));
            facts(path, end.step)
        });
        prove(&ProofInput {
            exit,
            end,
            rows: rows(follower),
            micro_batch: start.tier.micro_batch,
            accumulation: start.tier.accumulation,
            world_size: start.tier.world_size,
            planned,
            checkpoint: last.as_ref(),
        })
    }

    pub(super) fn succeeded(
        &mut self,
        start: &AttemptStart,
        proof: &proof::Proof,
        follower: &Follower,
    ) -> Result<Step, Failure> {
        let value = serde_json::to_value(proof).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
        let best = follower.log.summary().and_then(|summary| summary.best_model_checkpoint.clone());
        let wants_best =
            self.prepared.spec.args.get("load_best_model_at_end") == Some(&serde_json::json!(true));
        let last = proof.checkpoint.clone();
        self.give_device_back_at_once();
        let chosen =
            best.filter(|_| wants_best).map(PathBuf::from).filter(|path| path.is_dir()).unwrap_or(last);
        self.directory.make_lasting(&proof.checkpoint)?;
        if chosen != proof.checkpoint {
            self.directory.make_lasting(&chosen)?;
        }
        reach("success.lasting", "");
        self.directory.link_final(&chosen)?;
        self.receipt.proof = Some(match proof.proof {
            proof::ProofKind::Rows => ProofKind::Rows,
            proof::ProofKind::ExitAndSteps => ProofKind::ExitAndSteps,
        });
        self.receipt.proof_facts = Some(ProofFacts {
            exit_code: if let ExitStatus::Code(code) = proof.exit { Some(code) } else { None },
            end_of_training: true,
            global_step: proof.steps,
            max_steps: proof.steps,
            rows: proof.rows,
            effective_batch: start.tier.effective_batch(),
            epochs: start.tier.num_train_epochs,
            checkpoint: chosen.display().to_string(),
        });
        self.receipt.rows_dropped = Some(follower.watch.rows_dropped());
        self.receipt.then("success was proven");
        self.journal.record(JobEvent::Succeeded { proof: value })?;
        self.over("succeeded", None, None);
        Ok(Step::Over(Status::Done))
    }

    pub(super) fn failed(&mut self, reason: String, help: Option<String>) -> Result<Step, Failure> {
        self.receipt.then(&reason);
        self.journal.record(JobEvent::Failed { reason: reason.clone(), help: help.clone() })?;
        self.over("failed", Some(reason), help);
        Ok(Step::Over(Status::Failed))
    }

    /// Ends the job as whoever stopped it has it: its time limit fails it, everybody else cancels it.
    pub(super) fn cancelled(&mut self, cause: StopCause) -> Result<Step, Failure> {
        let end = stop::end(&cause.to_string(), self.prepared.spec.time_limit);
        let reason = match &end {
            JobEvent::Failed { reason, help } => return self.failed(reason.clone(), help.clone()),
            JobEvent::Cancelled { reason } => Some(reason.clone()),
            _ => None,
        };
        self.journal.record(end)?;
        let help = "start it again with --continue: it goes on from its last checkpoint".to_owned();
        self.over("cancelled", reason, Some(help));
        Ok(Step::Over(cause.status()))
    }

    pub(super) fn over(&mut self, state: &str, reason: Option<String>, help: Option<String>) {
        self.receipt.state = state.to_owned();
        self.receipt.reason = reason;
        self.receipt.help = help;
        self.receipt.ended_at = Some(now());
    }

    pub(super) fn note_end(&mut self, exit: &Exit, diagnosis: &Diagnosis, follower: Option<&Follower>) {
        let Some(note) = self.receipt.attempts.last_mut() else { return };
        note.ended_at = Some(now());
        note.exit = Some(exit.clone());
        note.diagnosis = Some(diagnosis.clone());
        if let Some(follower) = follower {
            let glance = follower.glance(None);
            note.last_step = Some(glance.step).filter(|step| *step > 0);
            note.max_steps = glance.max_steps;
            note.peak_bytes = follower.peak.filter(|peak| *peak > Bytes::ZERO);
        }
    }

    pub(super) fn save_receipt(&mut self) -> Result<(), Failure> {
        let state = self.journal.state();
        let lasting = if state.is_final() { Lasting::OverPowerCut } else { Lasting::UntilPowerCut };
        if !state.is_final() {
            self.receipt.state = state.name().to_owned();
            self.receipt.reason = state.reason();
        }
        let text =
            serde_json::to_vec_pretty(&self.receipt).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
        self.directory.write_receipt(&text, lasting)
    }

    /// Saves the receipt of a job that is over, as soon as the disk takes it: what only this process knows is
    /// lost with it.
    pub(super) async fn save_last_receipt(&mut self) -> Result<(), Failure> {
        let mut tries = 1;
        loop {
            match self.save_receipt() {
                Err(failure) if tries < RECEIPT_TRIES_MAX && self.receipt.id.is_some() => {
                    if tries == 1 {
                        self.screen.say(format!("{}; it is tried again", failure.message));
                    }
                    tries += 1;
                    tokio::time::sleep(RECEIPT_AGAIN).await;
                }
                saved => return saved,
            }
        }
    }
}

/// Returns the last optimizer step that the trainer finished.
pub(super) fn last_step(follower: &Follower) -> Option<u64> {
    Some(follower.glance(None).step).filter(|step| *step > 0)
}

/// Returns the rows of the train set after filtering and packing: as the companion counted them, else as the
/// trainer's own log tells them.
pub(super) fn rows(follower: &Follower) -> Option<u64> {
    let counted = follower.telemetry.rows().or_else(|| follower.watch.train_rows());
    counted.or_else(|| follower.log.summary()?.train_rows)
}
