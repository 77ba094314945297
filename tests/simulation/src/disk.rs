//! What is on the disk of the simulated host, and what of it survives a power cut?

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;

use mhtrain_job::event::{JobEvent, ProcessIdentity, Record, read_journal};
use mhtrain_job::spec::JobSpec;
use mhtrain_job::state::{IllegalEvent, JobState};
use mhtrain_sizing::known::ObservationOf;
use mhtrain_sizing::plan::Plan;
use mhtrain_sizing::tier::Tier;
use mhtrain_swift::checkpoint::{CheckpointFacts, TrainerState};

use crate::draws::Draws;

/// A number of a job and of one of its attempts.
pub(crate) type AttemptId = (u64, u32);

/// Everything that is on the disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    jobs: Vec<StoredJob>,
    /// Whether the daemon is drained.
    pub(crate) drained: bool,
    /// Cards on which nothing starts.
    pub(crate) failed_cards: BTreeSet<usize>,
    /// Whether nothing more fits.
    pub(crate) full: bool,
    /// What attempts left.
    pub(crate) attempts: BTreeMap<AttemptId, AttemptFiles>,
    /// Plans that jobs were started with: the real store has each whole in the event that names it.
    pub(crate) plans: Vec<Rc<Plan>>,
    /// What attempts showed about memory, oldest first, and whether it is certain to be there after a power cut.
    pub(crate) observations: Vec<(AttemptId, ObservationOf, bool)>,
}

/// A job in the store: its events as text, and their fold beside them, as the real store has both.
#[derive(Clone, Debug)]
pub(crate) struct StoredJob {
    /// The key that it was submitted with.
    pub(crate) key: String,
    /// Whose it is.
    pub(crate) owner_uid: u32,
    /// What its submitter left.
    pub(crate) context: Context,
    /// The job, as its first event has it.
    pub(crate) spec: Rc<JobSpec>,
    lines: Vec<String>,
    /// How many of the lines are certain to be there after a power cut.
    synced: usize,
    /// What the lines say.
    pub(crate) records: Vec<Record>,
    /// The fold of that.
    pub(crate) state: JobState,
}

/// What a submitter leaves with a job.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    /// Which job of the script it is.
    pub(crate) script: usize,
    /// The job that it goes on with.
    pub(crate) retry_of: Option<u64>,
}

/// Why the store did not write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// There is no room.
    #[error("the state directory is full")]
    Full,
    /// The state of the job does not allow the event.
    #[error(transparent)]
    Illegal(#[from] IllegalEvent),
    /// What is there cannot be read.
    #[error("the store cannot be read: {why}")]
    Unreadable {
        /// Why.
        why: String,
    },
}

/// Whether a write is on disk when it returns.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sync {
    /// It is.
    Now,
    /// It is not: a mistake that is planted.
    Later,
}

/// How a process ended, as its recorder writes it down.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    Signal(i32),
    StatusLost,
}

/// The record of an attempt, and what its trainer wrote.
#[derive(Clone, Debug)]
pub(crate) struct AttemptFiles {
    /// What is to be started.
    pub(crate) launch: Launch,
    /// The trainer, written before it may begin.
    pub(crate) trainer: Option<ProcessIdentity>,
    /// Whether a daemon gave the attempt up before there was a trainer.
    pub(crate) abandoned: bool,
    /// Whether somebody asked for the end.
    pub(crate) stop: bool,
    /// How the trainer ended, and whether the kernel counted a memory kill.
    pub(crate) exit: Option<(Ended, Option<bool>)>,
    /// Standard output and standard error.
    pub(crate) output: String,
    /// `logging.jsonl`.
    pub(crate) metrics: String,
    /// Checkpoints, oldest first.
    pub(crate) checkpoints: Vec<Checkpoint>,
}

/// What a trainer is started with.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) script: usize,
    pub(crate) card: usize,
    pub(crate) tier: Tier,
    /// The checkpoint that it is shown, with the micro-batch that the view of it names.
    pub(crate) from: Option<Checkpoint>,
    pub(crate) weights_only: bool,
    pub(crate) stable: bool,
    pub(crate) expandable: bool,
    /// Whether it evaluates a row at a time.
    pub(crate) small_eval: bool,
}

/// Which rows the weights have seen.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lineage {
    /// Whether every step so far trained the rows that an uninterrupted run would have trained.
    pub(crate) whole: bool,
    pub(crate) effective_batch: u64,
    pub(crate) max_length: u32,
    pub(crate) packing: bool,
    /// Whether the loss was no number.
    pub(crate) spoilt: bool,
}

/// One `checkpoint-N`.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) step: u64,
    pub(crate) max_steps: u64,
    pub(crate) steps_per_epoch: u64,
    pub(crate) micro_batch: u32,
    /// Whether `trainer_state.json`, which comes last, is written.
    pub(crate) has_state: bool,
    /// Whether the optimizer's file is not empty.
    pub(crate) has_optimizer: bool,
    /// Whether it looks whole and cannot be read.
    pub(crate) corrupt: bool,
    /// Whether a power cut leaves it as it is.
    pub(crate) synced: bool,
    pub(crate) lineage: Lineage,
}

impl Disk {
    /// Adds a job, or finds the one with this key of `whose`. Returns its number and whether it was there before.
    #[expect(clippy::too_many_arguments, reason = "a row of the store")]
    pub(crate) fn submit(
        &mut self,
        owner_uid: u32,
        whose: Option<u32>,
        key: &str,
        spec: &JobSpec,
        record: &Record,
        context: Context,
        sync: Sync,
    ) -> Result<(u64, bool), StoreError> {
        if let Some(known) = self
            .jobs
            .iter()
            .position(|job| job.key == key && whose.is_none_or(|whose| job.owner_uid == whose))
        {
            return Ok((number(known), true));
        }
        if self.full {
            return Err(StoreError::Full);
        }
        let state = JobState::begin(&record.event)?;
        let mut job = StoredJob {
            key: key.to_owned(),
            owner_uid,
            context,
            spec: Rc::new(spec.clone()),
            lines: vec![record.to_line()],
            synced: usize::from(sync == Sync::Now),
            records: Vec::new(),
            state,
        };
        job.read_again()?;
        self.jobs.push(job);
        Ok((number(self.jobs.len() - 1), false))
    }

    /// Appends an event to a job, as the real store does.
    pub(crate) fn append(&mut self, id: u64, record: Record) -> Result<(), StoreError> {
        let full = self.full;
        let job = &mut self.jobs[index(id)];
        let state = job.state.next(&record.event)?;
        if full {
            return Err(StoreError::Full);
        }
        job.lines.push(record.to_line());
        job.records.push(record);
        job.state = state;
        job.synced = job.lines.len();
        Ok(())
    }

    /// Notes what an attempt showed; a second observation of the same attempt takes the place of the first.
    pub(crate) fn note_observation(&mut self, of: AttemptId, noted: ObservationOf) {
        if !self.full {
            self.observations.retain(|(known, _, _)| *known != of);
            self.observations.push((of, noted, false));
        }
    }

    /// Returns the number of a plan.
    pub(crate) fn keep_plan(&mut self, plan: &Rc<Plan>) -> usize {
        let known = self.plans.iter().position(|known| Rc::ptr_eq(known, plan));
        known.unwrap_or_else(|| {
            self.plans.push(Rc::clone(plan));
            self.plans.len() - 1
        })
    }

    /// Reads everything again from its text, as a store does that is opened. Returns the first job that is not what it was.
    pub(crate) fn open(&mut self) -> Result<(), u64> {
        for (at, job) in self.jobs.iter_mut().enumerate() {
            let (records, state) = (job.records.clone(), job.state.clone());
            if job.read_again().is_err() || records != job.records || state != job.state {
                return Err(number(at));
            }
        }
        Ok(())
    }

    /// Returns a job; every number that was given out is one.
    pub(crate) fn job(&self, id: u64) -> &StoredJob {
        &self.jobs[index(id)]
    }

    /// Returns a job, if there is one of this number.
    pub(crate) fn find(&self, id: u64) -> Option<&StoredJob> {
        self.jobs.get(index(id))
    }

    /// Returns the numbers of all jobs with the jobs.
    pub(crate) fn jobs(&self) -> impl Iterator<Item = (u64, &StoredJob)> {
        self.jobs.iter().enumerate().map(|(at, job)| (number(at), job))
    }

    /// Takes away what was not synced, or leaves it: nobody knows.
    pub(crate) fn lose_power(&mut self, draws: &mut Draws) {
        self.jobs.retain(|job| job.synced > 0);
        for job in &mut self.jobs {
            job.lines.truncate(job.synced);
            job.records.truncate(job.synced);
        }
        // They are not synced one by one, and the last ones may be gone.
        let unsynced = self.observations.iter().filter(|(_, _, synced)| !synced).count();
        let kept = self.observations.len() - draws.below(unsynced + 1);
        self.observations.truncate(kept);
        self.observations.iter_mut().for_each(|(_, _, synced)| *synced = true);
        for files in self.attempts.values_mut() {
            for text in [&mut files.output, &mut files.metrics] {
                let lost = draws.pick(&[0, 0, 30, 200]);
                text.truncate(text.len().saturating_sub(lost));
            }
            if let Some(newest) = files.checkpoints.last_mut().filter(|newest| !newest.synced) {
                match draws.below(4) {
                    0 => newest.has_optimizer = false,
                    1 => newest.has_state = false,
                    _ => {}
                }
            }
        }
    }
}

impl StoredJob {
    /// Reads the events and the job from the text.
    fn read_again(&mut self) -> Result<(), StoreError> {
        let unreadable = |why: String| StoreError::Unreadable { why };
        self.records = read_journal(&self.lines.concat()).map_err(|e| unreadable(e.to_string()))?;
        self.state = JobState::fold(self.records.iter().map(|record| &record.event))?;
        if let Some(Record { event: JobEvent::Submitted { spec }, .. }) = self.records.first() {
            self.spec = Rc::new(JobSpec::from_value(spec).map_err(|e| unreadable(e.to_string()))?);
        }
        Ok(())
    }

    /// Returns the text of the events, a line each.
    pub(crate) fn lines(&self) -> &[String] {
        &self.lines
    }
}

impl AttemptFiles {
    pub(crate) fn new(launch: Launch) -> AttemptFiles {
        AttemptFiles {
            launch,
            trainer: None,
            abandoned: false,
            stop: false,
            exit: None,
            output: String::new(),
            metrics: String::new(),
            checkpoints: Vec::new(),
        }
    }
}

impl Checkpoint {
    /// Returns what a shell reads of it.
    pub(crate) fn facts(&self, attempt: AttemptId) -> CheckpointFacts {
        let Checkpoint { step, max_steps, micro_batch, .. } = self;
        #[expect(clippy::cast_precision_loss, reason = "a handful of steps")]
        let epoch = *step as f64 / self.steps_per_epoch.max(1) as f64;
        let text = format!(
            "{{\"epoch\": {epoch}, \"global_step\": {step}, \"max_steps\": {max_steps}, \
             \"train_batch_size\": {micro_batch}}}"
        );
        CheckpointFacts {
            path: path(attempt, *step),
            step: *step,
            state: TrainerState::parse(&text).ok().filter(|_| self.has_state),
            has_optimizer: self.has_optimizer,
            has_scheduler: true,
            has_rng: true,
            has_weights: true,
        }
    }
}

/// Returns the path of a checkpoint.
pub(crate) fn path((id, attempt): AttemptId, step: u64) -> PathBuf {
    PathBuf::from(format!("job-{id}/attempt-{attempt}/checkpoint-{step}"))
}

fn number(index: usize) -> u64 {
    index as u64 + 1
}

fn index(id: u64) -> usize {
    usize::try_from(id).map_or(usize::MAX, |id| id.wrapping_sub(1))
}
