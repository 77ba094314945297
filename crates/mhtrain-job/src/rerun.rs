//! What is tried after an attempt has ended?
//!
//! Only a device OOM of our own making goes down the ladder, and then always to a strictly later rung whose
//! predicted peak is not above that of the dead one. Every other answer keeps the rung, names what has changed,
//! and has a bound of its own in [`Bounds`]. So the attempts of a job are bounded by the ladder's length plus
//! the sum of the bounds ([`Policy::attempts_max`]).
//!
//! Interruptions and failures of the network come from outside, and the longer a job runs the more of them it meets. Those
//! that come one after the other, without a step of progress in between, are counted against a small bound; all of them in a
//! job's life against a large one.
//!
//! A job that was asked to stop is not brought here: its end is `Cancelled`.

use std::collections::BTreeMap;

use mhtrain_sizing::ladder::{RunAdvice, Values};
use mhtrain_sizing::plan::{Plan, Rung, after_oom};
use mhtrain_sizing::request::{Allow, Learning};
use mhtrain_sizing::tier::Profile;
use mhtrain_sizing::units::Bytes;
use serde::{Deserialize, Serialize};

use crate::diagnosis::{Answer, Diagnosis, Evidence, Kind, Phase};
use crate::event::JobEvent;
use crate::spec::{JobSpec, SpecError};

/// What happens after an attempt has ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Another attempt.
    Rerun(Rerun),
    /// No other attempt is needed: the test of success decides.
    Finish,
    /// No other attempt would help.
    GiveUp {
        /// Why, with the numbers.
        reason: String,
        /// What the user can do.
        help: Option<String>,
    },
}

/// Another attempt, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rerun {
    /// Index of the rung.
    pub rung: usize,
    /// The answer to the diagnosis that this attempt is.
    pub answer: Answer,
    /// Why the attempt before ended.
    pub after: Kind,
    /// Whether that was certain.
    pub certain: bool,
    /// Everything that is changed beside the rung, changes for earlier attempts included.
    pub adjustments: Vec<Adjustment>,
    /// What must pass before it starts.
    pub wait: Wait,
    /// From where it should go on.
    pub resume: ResumeWish,
    /// Why, in words.
    pub reason: String,
}

/// A change beside the rung. A pin is stronger than any of them.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Adjustment {
    /// torch's allocator uses expandable segments.
    ExpandableSegments,
    /// Rows of one evaluation pass.
    EvalBatch(u32),
    /// Processes that load data; 0: the trainer itself does.
    DataloaderWorkers(u32),
    /// Another rendezvous port.
    NewPort,
    /// The recipe's stable learning (its section 5.3; `[learning.stable]` of `config/tiers.toml`).
    RecipeStable,
}

/// What must pass before an attempt starts. The memory of the dead trainer is waited for anyway.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// Nothing.
    None,
    /// So many seconds.
    Seconds(u64),
    /// Until the card has `need` free, at most so many seconds.
    ForMemory {
        /// Memory that must be free.
        need: Bytes,
        /// Longest wait.
        seconds_max: u64,
    },
}

/// From where an attempt should go on. Whether that is exact is known to the crate that reads checkpoints.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResumeWish {
    /// The newest checkpoint that can be used; from the start where there is none.
    Latest,
    /// The one before the checkpoint that the dead attempt went on from.
    Previous,
    /// The weights of the newest checkpoint from before the divergence. Not its optimizer: the moments are
    /// spoilt, and its learning-rate schedule would win over the new one.
    LastGoodWeights,
    /// The beginning: other rows are trained than before. Where an earlier attempt trained these rows, what it saved.
    FromStart,
}

/// What happened to a job up to the attempt that just ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Index of the rung of the attempt that just ended.
    pub rung: usize,
    /// What was changed beside the rung in that attempt.
    pub adjustments: Vec<Adjustment>,
    /// The reruns so far, oldest first.
    pub reruns: Vec<Answered>,
    /// Last optimizer step that any attempt finished; 0 before the first.
    pub steps_done: u64,
    /// The same of the attempts at each rung: another one may train other rows, from the beginning.
    pub furthest: BTreeMap<usize, u64>,
    /// Whether the attempt that just ended finished a step that no earlier one at its rung had finished.
    pub progressed: bool,
    /// What the card has free for us now that the trainer is gone; `None` when it cannot be read.
    pub free_now: Option<Bytes>,
}

/// One rerun of the past.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The answer.
    pub answer: Answer,
    /// Whether the diagnosis was certain.
    pub certain: bool,
    /// Whether the attempt that ended so had made progress.
    pub after_progress: bool,
}

impl History {
    /// Returns the history of a job whose first attempt, at `rung`, just ended.
    pub fn at(rung: usize) -> History {
        History { rung, ..History::default() }
    }

    /// Records a rerun: the next attempt to end is the one that it started.
    pub fn advance(&mut self, rerun: &Rerun) {
        let after_progress = std::mem::take(&mut self.progressed);
        self.rung = rerun.rung;
        self.adjustments.clone_from(&rerun.adjustments);
        self.reruns.push(Answered { answer: rerun.answer, certain: rerun.certain, after_progress });
    }

    /// Records the last step that the attempt finished which just ended; `None` before its first.
    pub fn ended(&mut self, last_step: Option<u64>) {
        let step = last_step.unwrap_or_default();
        let furthest = self.furthest.entry(self.rung).or_default();
        self.progressed = step > *furthest;
        *furthest = step.max(*furthest);
        self.steps_done = self.steps_done.max(step);
    }

    /// Returns the history that a job's events tell. `free_now` is for the shell to fill in.
    pub fn from_events<'a>(events: impl IntoIterator<Item = &'a JobEvent>) -> History {
        let mut history = History::default();
        for event in events {
            match event {
                JobEvent::AttemptStarting(start) => {
                    history.rung = start.rung;
                    history.adjustments.clone_from(&start.adjustments);
                }
                JobEvent::AttemptEnded { last_step, .. } => history.ended(*last_step),
                JobEvent::RerunDecided(rerun) => history.advance(rerun),
                JobEvent::Submitted { .. }
                | JobEvent::Planned { .. }
                | JobEvent::Waiting { .. }
                | JobEvent::Started { .. }
                | JobEvent::Warned { .. }
                | JobEvent::StopRequested { .. }
                | JobEvent::Succeeded { .. }
                | JobEvent::Failed { .. }
                | JobEvent::Cancelled { .. } => {}
            }
        }
        history
    }

    fn count(&self, answer: Answer) -> u32 {
        let count = self.reruns.iter().filter(|rerun| rerun.answer == answer).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Counts the reruns with this answer since the last progress. One that ended an attempt with progress is the first.
    fn count_in_a_row(&self, answer: Answer) -> u32 {
        if self.progressed {
            return 0;
        }
        let since = self.reruns.iter().rposition(|rerun| rerun.after_progress).unwrap_or(0);
        let count = self.reruns[since..].iter().filter(|rerun| rerun.answer == answer).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn has(&self, adjustment: Adjustment) -> bool {
        self.adjustments.contains(&adjustment)
    }
}

/// How often each same-rung answer may be given in one job.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Waits for memory that a neighbour holds.
    pub memory_waits: u32,
    /// Switches to expandable segments.
    pub expandable_segments: u32,
    /// Reductions of the evaluation batch.
    pub smaller_eval_batches: u32,
    /// Reductions of data-loader workers: half of them, then none.
    pub fewer_workers: u32,
    /// Waits for hub or network without progress in between.
    pub network_backoffs: u32,
    /// Waits for hub or network in all.
    pub network_backoffs_in_all: u32,
    /// New ports.
    pub new_ports: u32,
    /// Changes to the recipe's stable learning.
    pub recipe_stable: u32,
    /// Steps back to an earlier checkpoint.
    pub previous_checkpoints: u32,
    /// Resumes after an interruption, or a signal 9 that nothing explains, without progress in between.
    pub resumes: u32,
    /// The same in all. A job of two weeks on a host that is started again each night needs 14.
    pub resumes_in_all: u32,
    /// Device OOMs that are only probable, such as `CUBLAS_STATUS_ALLOC_FAILED`.
    pub uncertain_ooms: u32,
    /// Moves to another device after a fault: two broken ones in a row are one broken host.
    pub other_devices: u32,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            memory_waits: 3,
            expandable_segments: 1,
            smaller_eval_batches: 1,
            fewer_workers: 2,
            network_backoffs: 5,
            network_backoffs_in_all: 50,
            new_ports: 3,
            recipe_stable: 1,
            previous_checkpoints: 3,
            resumes: 5,
            resumes_in_all: 100,
            uncertain_ooms: 1,
            other_devices: 2,
        }
    }
}

impl Bounds {
    /// Returns how many attempts there can be beside one for each rung.
    ///
    /// Not in the sum are `uncertain_ooms`, which limits steps down the ladder, and the bounds of what comes in a row, which lie
    /// within those of all of it.
    pub fn total(&self) -> u32 {
        let Bounds {
            memory_waits,
            expandable_segments,
            smaller_eval_batches,
            fewer_workers,
            network_backoffs_in_all,
            new_ports,
            recipe_stable,
            previous_checkpoints,
            resumes_in_all,
            other_devices,
            network_backoffs: _,
            resumes: _,
            uncertain_ooms: _,
        } = *self;
        [
            memory_waits,
            expandable_segments,
            smaller_eval_batches,
            fewer_workers,
            network_backoffs_in_all,
            new_ports,
            recipe_stable,
            previous_checkpoints,
            resumes_in_all,
            other_devices,
        ]
        .into_iter()
        .fold(0, u32::saturating_add)
    }
}

/// A number that an answer may lower, unless the job pins it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Knob {
    /// Its value in the first attempt.
    pub value: u32,
    /// Whether the job pins it.
    pub pinned: bool,
}

/// Whether expandable segments can be switched on.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ExpandableSegments {
    /// They are on from the first attempt.
    On,
    /// They are off and can be switched on.
    Off,
    /// The user set the allocator, or it does not know them: nothing is changed.
    Fixed,
}

/// What decisions about one job depend on beside its history.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// How often each answer may be given.
    pub bounds: Bounds,
    /// What the job allows.
    pub allow: Allow,
    /// How boldly is learned.
    pub learning: Learning,
    /// Whether the job pins the learning rate.
    pub learning_rate_pinned: bool,
    /// Expandable segments.
    pub expandable_segments: ExpandableSegments,
    /// Whether somebody can give the job another device.
    pub other_device: bool,
    /// `per_device_eval_batch_size`.
    pub eval_batch: Knob,
    /// `dataloader_num_workers`.
    pub dataloader_workers: Knob,
    /// Values of stable learning.
    pub stable: Values,
    /// Longest wait for memory that a neighbour holds, in seconds.
    pub memory_wait_s: u64,
    /// First wait for hub or network, in seconds; each further one is twice as long.
    pub network_backoff_s: u64,
    /// Longest wait for hub or network, in seconds.
    pub network_backoff_max_s: u64,
}

/// Half an hour: long enough for a neighbour's evaluation, short enough that somebody still looks.
const MEMORY_WAIT_S: u64 = 30 * 60;
const NETWORK_BACKOFF_S: u64 = 30;
const NETWORK_BACKOFF_MAX_S: u64 = 10 * 60;

impl Policy {
    /// Returns the policy for a job.
    ///
    /// `advice` has the values that the command gets where the job pins none, and those of stable learning.
    ///
    /// # Errors
    /// A pinned value of the wrong type; none after [`JobSpec::parse`].
    pub fn for_job(
        job: &JobSpec,
        expandable_segments: ExpandableSegments,
        advice: &RunAdvice,
    ) -> Result<Policy, SpecError> {
        let knob = |pin: Option<u32>, ours| Knob { value: pin.unwrap_or(ours), pinned: pin.is_some() };
        Ok(Policy {
            bounds: Bounds::default(),
            allow: job.allow.clone(),
            learning: job.learning,
            learning_rate_pinned: job.pins()?.learning_rate.is_some(),
            expandable_segments,
            other_device: false,
            eval_batch: knob(job.eval_batch()?, advice.per_device_eval_batch_size),
            dataloader_workers: knob(job.dataloader_workers()?, advice.dataloader_num_workers),
            stable: advice.stable.clone(),
            memory_wait_s: MEMORY_WAIT_S,
            network_backoff_s: NETWORK_BACKOFF_S,
            network_backoff_max_s: NETWORK_BACKOFF_MAX_S,
        })
    }

    /// Returns the most attempts that a job with this plan can have, whatever happens.
    pub fn attempts_max(&self, plan: &Plan) -> usize {
        let extra = usize::try_from(self.bounds.total()).unwrap_or(usize::MAX);
        plan.rungs.len().saturating_add(extra)
    }
}

/// Returns the seconds until a download is tried again that failed for the network after `failures` failures before it,
/// `first` after the first; `None` when that was often enough. The same as for a trainer that dies of it.
pub fn network_backoff(first: u64, failures: u32) -> Option<u64> {
    let again = failures < Bounds::default().network_backoffs;
    again.then(|| doubled(first, failures, NETWORK_BACKOFF_MAX_S))
}

/// Returns what stable learning sets, for people.
fn stable_learning(values: &Values) -> String {
    let said = [
        ("learning rate", values.learning_rate),
        ("warm-up", values.warmup_ratio),
        ("gradient clipping at", values.max_grad_norm),
    ];
    let said: Vec<String> =
        said.iter().filter_map(|(name, value)| Some(format!("{name} {:?}", (*value)?))).collect();
    said.join(", ")
}

/// Returns `first`, doubled so many times, at most `max`.
fn doubled(first: u64, times: u32, max: u64) -> u64 {
    first.saturating_mul(1_u64.checked_shl(times).unwrap_or(u64::MAX)).min(max)
}

/// Returns what to do after the attempt at `history.rung` ended with `diagnosis`.
pub fn decide(history: &History, diagnosis: &Diagnosis, plan: &Plan, policy: &Policy) -> Decision {
    let case = Case { history, diagnosis, plan, policy };
    let Some(rung) = plan.rungs.get(history.rung) else {
        return give_up(format!("rung {} is not on the ladder of {}", history.rung, plan.rungs.len()), None);
    };
    let attempts = history.reruns.len().saturating_add(1);
    match case.answer(rung) {
        // The bounds below this one make it unreachable; it is checked all the same, so that a mistake in one
        // of them cannot make a job run for ever.
        Decision::Rerun(_) if attempts >= policy.attempts_max(plan) => {
            case.stop(&format!("{attempts} attempts were made, which is the limit"), None)
        }
        decision @ (Decision::Rerun(_) | Decision::Finish | Decision::GiveUp { .. }) => decision,
    }
}

/// Everything that one decision looks at.
struct Case<'a> {
    history: &'a History,
    diagnosis: &'a Diagnosis,
    plan: &'a Plan,
    policy: &'a Policy,
}

impl Case<'_> {
    fn answer(&self, rung: &Rung) -> Decision {
        match self.diagnosis.kind {
            Kind::Success => Decision::Finish,
            // A run whose loss is NaN ends with status 0, and is worth nothing.
            Kind::Diverged => self.recipe_stable(),
            _ if !self.diagnosis.fatal => Decision::Finish,
            Kind::DeviceOom => match self.diagnosis.phase {
                Some(Phase::Load) => self.no_room_for_weights(rung),
                Some(Phase::Eval) => self.smaller_eval_batch(),
                Some(Phase::Save) => self.no_room_for_saving(rung),
                Some(Phase::Train) | None => self.device_oom(rung),
            },
            Kind::DeviceOomByNeighbour => self.wait_for_memory(rung),
            Kind::HostOom if !self.diagnosis.certain => self.go_on("a signal ended it and nothing says why"),
            Kind::HostOom => self.fewer_workers(),
            Kind::Network => self.back_off(),
            Kind::Communication => self.new_port(),
            Kind::CheckpointCorrupt => self.previous_checkpoint(),
            Kind::Interrupted => self.go_on("it was interrupted"),
            Kind::DeviceFault if self.diagnosis.answer == Answer::OtherDevice => self.other_device(),
            Kind::DeviceFault
            | Kind::DiskFull
            | Kind::MissingModelOrDataset
            | Kind::BadArguments
            | Kind::IncompatibleEnvironment
            | Kind::BadData
            | Kind::CodeError
            | Kind::Unknown => self.stop(stop_reason(self.diagnosis.kind), stop_help(self.diagnosis.kind)),
        }
    }

    fn device_oom(&self, rung: &Rung) -> Decision {
        if self.is_fragmented() && self.may_switch_on_expandable_segments() {
            return self.same_rung(
                Answer::SameTierExpandable,
                &[Adjustment::ExpandableSegments],
                Wait::None,
                ResumeWish::Latest,
                "the allocator held enough memory but in pieces; expandable segments are switched on"
                    .to_owned(),
            );
        }
        if !self.diagnosis.certain && self.uncertain_ooms() >= self.policy.bounds.uncertain_ooms {
            return self.stop(
                "it looks like a lack of device memory again, but nothing proves it",
                Some("read the log; pin a smaller `per_device_train_batch_size` if it is memory"),
            );
        }
        let need = observed_need(&self.diagnosis.evidence);
        let next = after_oom(self.plan, self.history.rung, need, self.history.free_now);
        match next.and_then(|index| Some((index, self.plan.rungs.get(index)?))) {
            Some((index, next)) => self.lower_rung(rung, index, next, Answer::LowerTier),
            None => self.ladder_exhausted(rung),
        }
    }

    fn lower_rung(&self, dead: &Rung, index: usize, next: &Rung, answer: Answer) -> Decision {
        let same = dead.tier.trains_the_same_as(&next.tier);
        let resume = if same { ResumeWish::Latest } else { ResumeWish::FromStart };
        if !same && self.history.steps_done > 0 && !self.policy.allow.restart {
            return give_up(
                format!(
                    "device memory ran out at {}, and the next rung, {}, trains other rows or adapters: {} steps would be \
                     lost, and `allow.restart` is false",
                    dead.tier, next.tier, self.history.steps_done
                ),
                Some("set `allow.restart` to true, or pin a shorter `length` from the beginning"),
            );
        }
        let reason = format!(
            "device memory ran out at {} ({}); next is {}, predicted peak {} instead of {}{}{}",
            dead.tier,
            oom_numbers(&self.diagnosis.evidence),
            next.tier,
            next.predicted_peak_bytes,
            dead.predicted_peak_bytes,
            self.skipped_before(index),
            if same { "" } else { "; it trains other rows or adapters, so it starts again" },
        );
        Decision::Rerun(Rerun {
            rung: index,
            answer,
            after: self.diagnosis.kind,
            certain: self.diagnosis.certain,
            adjustments: self.history.adjustments.clone(),
            wait: Wait::None,
            resume,
            reason,
        })
    }

    /// Says which rungs lie between the dead one and the next: by the same numbers they would die as well.
    fn skipped_before(&self, next: usize) -> String {
        let between = self.plan.rungs.get(self.history.rung.saturating_add(1)..next).unwrap_or_default();
        let names: Vec<String> = between.iter().map(|rung| rung.tier.to_string()).collect();
        if names.is_empty() {
            return String::new();
        }
        format!("; skipped, since these numbers rule it out: {}", names.join(", "))
    }

    fn ladder_exhausted(&self, rung: &Rung) -> Decision {
        let numbers = oom_numbers(&self.diagnosis.evidence);
        let emergency = rung.tier.name == Profile::Emergency;
        let reason = if emergency {
            format!("device memory ran out at the last rung, {} ({numbers})", rung.tier)
        } else {
            format!("device memory ran out at {} ({numbers}), and no later rung needs less", rung.tier)
        };
        let help = if !emergency && !self.policy.allow.emergency {
            "set `allow.emergency` to true, free memory on the card, or choose a larger card"
        } else if !self.plan.can_quantise {
            "free memory on the card, choose a larger card or a smaller model"
        } else {
            "free memory on the card, set \"train_type\": \"qlora\", or choose a larger card or a smaller model"
        };
        give_up(reason, Some(help))
    }

    /// No smaller batch makes room for weights: only packing them does.
    fn no_room_for_weights(&self, rung: &Rung) -> Decision {
        let packs = |rung: &Rung| rung.tier.quant_bits.is_some();
        let later = self.plan.rungs.iter().enumerate().skip(self.history.rung.saturating_add(1));
        let fits = |next: &Rung| {
            let room = self.history.free_now.is_none_or(|free| next.predicted_peak_bytes <= free);
            room || next.tier.name == Profile::Emergency
        };
        let next =
            later.filter(|(_, next)| packs(next) && next.predicted_peak_bytes <= rung.predicted_peak_bytes);
        if let Some((index, next)) = next.into_iter().find(|(_, next)| fits(next)).filter(|_| !packs(rung)) {
            return self.lower_rung(rung, index, next, Answer::QuantizeOrStop);
        }
        let free = self.history.free_now.or(self.diagnosis.evidence.free_bytes);
        let free = free.map_or_else(|| "an unknown amount is".to_owned(), |free| format!("{free} are"));
        let reason = format!(
            "device memory ran out while the model was loaded ({}): its weights alone take {}, {free} free",
            oom_numbers(&self.diagnosis.evidence),
            rung.estimate.terms.weights,
        );
        let help = if self.plan.can_quantise {
            // What is trained would change, so it is for the user to ask.
            "free memory on the card, submit again with \"train_type\": \"qlora\", or choose a larger card"
        } else {
            "free memory on the card, or choose a larger card or a smaller model"
        };
        give_up(reason, Some(help))
    }

    fn no_room_for_saving(&self, rung: &Rung) -> Decision {
        give_up(
            format!(
                "device memory ran out while a checkpoint was written at {} ({})",
                rung.tier,
                oom_numbers(&self.diagnosis.evidence)
            ),
            Some(
                "a smaller batch does not help here; look for other processes on the card, or use a larger one",
            ),
        )
    }

    fn smaller_eval_batch(&self) -> Decision {
        let knob = self.policy.eval_batch;
        let numbers = oom_numbers(&self.diagnosis.evidence);
        let used = self.history.count(Answer::LowerEvalBatch);
        if !knob.pinned && knob.value > 1 && used < self.policy.bounds.smaller_eval_batches {
            return self.same_rung(
                Answer::LowerEvalBatch,
                &[Adjustment::EvalBatch(1)],
                Wait::None,
                ResumeWish::Latest,
                format!(
                    "device memory ran out in an evaluation ({numbers}); its batch goes from {} to 1",
                    knob.value
                ),
            );
        }
        let (why, help) = if knob.pinned && knob.value > 1 {
            ("the job pins its batch", "lower `args.per_device_eval_batch_size`")
        } else {
            ("its batch is 1 already", "leave `validation` out, or evaluate on shorter rows")
        };
        give_up(format!("device memory ran out in an evaluation ({numbers}), and {why}"), Some(help))
    }

    fn wait_for_memory(&self, rung: &Rung) -> Decision {
        let used = self.history.count(Answer::WaitSameTier);
        let numbers = oom_numbers(&self.diagnosis.evidence);
        if used >= self.policy.bounds.memory_waits {
            return give_up(
                format!(
                    "another process took the card's memory {} times ({numbers})",
                    used.saturating_add(1)
                ),
                Some("choose another card, or start again when the card is free"),
            );
        }
        let wait = Wait::ForMemory { need: rung.admission_bytes, seconds_max: self.policy.memory_wait_s };
        let reason = format!(
            "another process took the card's memory ({numbers}); waiting until {} are free",
            rung.admission_bytes
        );
        self.same_rung(Answer::WaitSameTier, &[], wait, ResumeWish::Latest, reason)
    }

    fn fewer_workers(&self) -> Decision {
        let knob = self.policy.dataloader_workers;
        let used = self.history.count(Answer::FewerWorkers);
        let now = self.workers_now();
        if knob.pinned || now == 0 || used >= self.policy.bounds.fewer_workers {
            let (why, help) = if knob.pinned {
                ("the job pins its data-loader workers", "lower `args.dataloader_num_workers`")
            } else {
                ("fewer data-loader workers do not help", "free host memory, or use a smaller dataset")
            };
            return self.stop(&format!("the host ran out of memory, and {why}"), Some(help));
        }
        let next = if used == 0 { now / 2 } else { 0 };
        self.same_rung(
            Answer::FewerWorkers,
            &[Adjustment::DataloaderWorkers(next)],
            Wait::None,
            ResumeWish::Latest,
            format!("the host ran out of memory; data-loader workers go from {now} to {next}"),
        )
    }

    fn back_off(&self) -> Decision {
        let (used, in_all) =
            (self.history.count_in_a_row(Answer::Backoff), self.history.count(Answer::Backoff));
        let bounds = self.policy.bounds;
        if used >= bounds.network_backoffs || in_all >= bounds.network_backoffs_in_all {
            let why = match used >= bounds.network_backoffs {
                true => "the network failed again after every wait".to_owned(),
                false => format!("the network failed {} times", in_all.saturating_add(1)),
            };
            return self.stop(&why, Some("check proxy and hub, or use a local copy of model and dataset"));
        }
        let seconds = doubled(self.policy.network_backoff_s, used, self.policy.network_backoff_max_s);
        let reason = format!("the network or the hub failed; waiting {seconds} s");
        self.same_rung(Answer::Backoff, &[], Wait::Seconds(seconds), ResumeWish::Latest, reason)
    }

    fn new_port(&self) -> Decision {
        if self.history.count(Answer::NewPort) >= self.policy.bounds.new_ports {
            return self.stop(
                "the ranks lost each other again on every port",
                Some("look for the first rank that failed in the log; check NCCL's network interface"),
            );
        }
        let reason = "the ranks lost each other, or the port was in use; another port is taken".to_owned();
        self.same_rung(Answer::NewPort, &[Adjustment::NewPort], Wait::None, ResumeWish::Latest, reason)
    }

    fn recipe_stable(&self) -> Decision {
        let used = self.history.count(Answer::RecipeStable);
        let refused = if self.policy.learning == Learning::Stable
            || used >= self.policy.bounds.recipe_stable
            || self.history.has(Adjustment::RecipeStable)
        {
            Some((
                "learning is as stable as the recipe has it",
                "check the data; pin a lower `learning_rate`",
            ))
        } else if self.policy.learning_rate_pinned {
            Some(("the job pins the learning rate", "lower `args.learning_rate`, or leave it out"))
        } else if !self.policy.allow.recipe_stable {
            Some(("`allow.recipe_stable` is false", "set it to true, or set \"learning\": \"stable\""))
        } else {
            None
        };
        if let Some((why, help)) = refused {
            return self.stop(&format!("the training diverged, and {why}"), Some(help));
        }
        self.same_rung(
            Answer::RecipeStable,
            &[Adjustment::RecipeStable],
            Wait::None,
            ResumeWish::LastGoodWeights,
            format!("the training diverged; on with {}", stable_learning(&self.policy.stable)),
        )
    }

    fn previous_checkpoint(&self) -> Decision {
        if self.history.count(Answer::PreviousCheckpoint) >= self.policy.bounds.previous_checkpoints {
            return self.stop(
                "one checkpoint after the other cannot be read",
                Some("check the disk under `output_dir`"),
            );
        }
        let reason = "the checkpoint cannot be read; the one before it is taken".to_owned();
        self.same_rung(Answer::PreviousCheckpoint, &[], Wait::None, ResumeWish::Previous, reason)
    }

    fn other_device(&self) -> Decision {
        let may = self.policy.other_device
            && self.history.count(Answer::OtherDevice) < self.policy.bounds.other_devices;
        if !may {
            return self.stop(stop_reason(self.diagnosis.kind), stop_help(self.diagnosis.kind));
        }
        let line = self.diagnosis.evidence.line.trim();
        let reason =
            format!("the card or its driver failed ({line}); on from the last checkpoint on another one");
        self.same_rung(Answer::OtherDevice, &[], Wait::None, ResumeWish::Latest, reason)
    }

    fn go_on(&self, why: &str) -> Decision {
        let (used, in_all) =
            (self.history.count_in_a_row(Answer::Resume), self.history.count(Answer::Resume));
        let bounds = self.policy.bounds;
        if used >= bounds.resumes || in_all >= bounds.resumes_in_all {
            let times = match used >= bounds.resumes {
                true => format!("{} times, and no further step in between", used.saturating_add(1)),
                false => format!("{} times", in_all.saturating_add(1)),
            };
            return self.stop(
                &format!("{why}, {times}"),
                Some("look who ends the trainer: the kernel's log names what its memory killer took"),
            );
        }
        let reason = format!("{why}; on from the last checkpoint");
        self.same_rung(Answer::Resume, &[], Wait::None, ResumeWish::Latest, reason)
    }

    fn same_rung(
        &self,
        answer: Answer,
        new: &[Adjustment],
        wait: Wait,
        resume: ResumeWish,
        reason: String,
    ) -> Decision {
        let mut adjustments = self.history.adjustments.clone();
        for adjustment in new {
            adjustments.retain(|old| !old.is_replaced_by(*adjustment));
            adjustments.push(*adjustment);
        }
        Decision::Rerun(Rerun {
            rung: self.history.rung,
            answer,
            after: self.diagnosis.kind,
            certain: self.diagnosis.certain,
            adjustments,
            wait,
            resume,
            reason,
        })
    }

    /// Gives up with the line that decided the diagnosis.
    fn stop(&self, why: &str, help: Option<&str>) -> Decision {
        let line = self.diagnosis.evidence.line.trim();
        give_up(if line.is_empty() { why.to_owned() } else { format!("{why}: {line}") }, help)
    }

    /// Returns whether what was asked for lay unused in the allocator, cut into pieces.
    fn is_fragmented(&self) -> bool {
        let evidence = &self.diagnosis.evidence;
        match (evidence.reserved_unallocated_bytes, evidence.tried_bytes) {
            (Some(unused), Some(tried)) => tried > Bytes::ZERO && unused >= tried,
            (None, _) | (_, None) => false,
        }
    }

    fn may_switch_on_expandable_segments(&self) -> bool {
        self.policy.expandable_segments == ExpandableSegments::Off
            && !self.history.has(Adjustment::ExpandableSegments)
            && self.history.count(Answer::SameTierExpandable) < self.policy.bounds.expandable_segments
    }

    fn uncertain_ooms(&self) -> u32 {
        let reruns = self.history.reruns.iter();
        let count = reruns.filter(|rerun| rerun.answer == Answer::LowerTier && !rerun.certain).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn workers_now(&self) -> u32 {
        let changed = self.history.adjustments.iter().rev().find_map(|adjustment| match adjustment {
            Adjustment::DataloaderWorkers(count) => Some(*count),
            Adjustment::ExpandableSegments
            | Adjustment::EvalBatch(_)
            | Adjustment::NewPort
            | Adjustment::RecipeStable => None,
        });
        changed.unwrap_or(self.policy.dataloader_workers.value)
    }
}

impl Adjustment {
    fn is_replaced_by(self, newer: Adjustment) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&newer)
    }
}

/// Returns what the dead attempt would have needed at least: what it held, and what it asked for on top.
pub fn observed_need(evidence: &Evidence) -> Option<Bytes> {
    let held = evidence.this_process_bytes.or(evidence.reserved_total_bytes).or(evidence.allocated_bytes)?;
    Some(held.saturating_add(evidence.tried_bytes?))
}

/// Returns the amounts that an OOM's text names, for people.
fn oom_numbers(evidence: &Evidence) -> String {
    let amounts = [
        ("asked for", evidence.tried_bytes),
        ("free", evidence.free_bytes),
        ("held by this job", evidence.this_process_bytes.or(evidence.reserved_total_bytes)),
        ("held by others", evidence.others_bytes),
        ("card", evidence.total_bytes),
    ];
    let named: Vec<String> = amounts
        .into_iter()
        .filter_map(|(what, amount)| amount.map(|amount| format!("{what} {amount}")))
        .collect();
    if named.is_empty() { "the message names no amounts".to_owned() } else { named.join(", ") }
}

fn give_up(reason: String, help: Option<&str>) -> Decision {
    Decision::GiveUp { reason, help: help.map(str::to_owned) }
}

/// Returns what a diagnosis that no rerun can cure is called.
fn stop_reason(kind: Kind) -> &'static str {
    match kind {
        Kind::DeviceFault => "the card or its driver failed",
        Kind::DiskFull => "the disk is full",
        Kind::MissingModelOrDataset => "a model or dataset is not where the job says",
        Kind::BadArguments => "the trainer refused an argument",
        Kind::IncompatibleEnvironment => "packages, driver and card do not fit together",
        Kind::BadData => "the data cannot be trained on",
        Kind::CodeError => "the trainer, a plugin or the model's code failed",
        Kind::DeviceOom
        | Kind::DeviceOomByNeighbour
        | Kind::HostOom
        | Kind::Network
        | Kind::Communication
        | Kind::Diverged
        | Kind::CheckpointCorrupt
        | Kind::Interrupted
        | Kind::Success
        | Kind::Unknown => "the trainer ended and nothing known says why",
    }
}

fn stop_help(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::DeviceFault => Some(
            "do not use this card until `dmesg` and `nvidia-smi -q` are clean; start again on another `device`",
        ),
        Kind::DiskFull => Some("free space under `output_dir` and the caches, then start again: it goes on"),
        Kind::MissingModelOrDataset => Some("check `model` and `dataset`, and whether the hub needs a token"),
        Kind::BadArguments => Some("correct or remove the argument in `args`"),
        Kind::IncompatibleEnvironment => Some("`mhtraind doctor` says what to install"),
        Kind::BadData => Some("correct the row or the column that the line names"),
        Kind::CodeError | Kind::Unknown => Some("read the end of the attempt's log"),
        Kind::DeviceOom
        | Kind::DeviceOomByNeighbour
        | Kind::HostOom
        | Kind::Network
        | Kind::Communication
        | Kind::Diverged
        | Kind::CheckpointCorrupt
        | Kind::Interrupted
        | Kind::Success => None,
    }
}

#[cfg(test)]
mod tests;
