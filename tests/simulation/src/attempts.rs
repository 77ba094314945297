//! What does the daemon do with a job that has a device? (`engine/local.rs` and `daemon/job.rs` of mhtraind, played)
//!
//! ```text
//!   Open ──> Wait ──> Launch ──> Started ──> Follow ──> Ended ──> Conclude ──> Answer ──> Wait ...
//!                                                                    └──> End(succeeded, failed, cancelled)
//! ```
//!
//! Each step writes at most one thing, so that whatever is killed between two steps finds every order that there is.

use std::rc::Rc;
use std::time::Duration;

use mhtrain_job::diagnosis::{Answer, Diagnosis, Kind};
use mhtrain_job::event::{AttemptStart, Exit, JobEvent, Record};
use mhtrain_job::rerun::{
    Adjustment, Decision, ExpandableSegments, History, Policy, Rerun, ResumeWish, Wait, decide,
};
use mhtrain_job::spec::{DeviceWish, JobSpec};
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_job::take_over::{GoesOn, NextAttempt, attempts_made, goes_on, last_start, unreadable_steps};
use mhtrain_sizing::known::ObservationOf;
use mhtrain_sizing::observation::Seen;
use mhtrain_sizing::plan::Plan;
use mhtrain_sizing::units::Bytes;
use mhtrain_swift::beginning::{self, Beginning, Saved, Wanted};
use mhtrain_swift::diagnosis::{Diagnoser, ExitFacts};
use mhtrain_swift::dialect::Dialect;
use mhtrain_swift::progress::{StderrWatch, TrainerLog};
use mhtrain_swift::proof::{ExitStatus, PlannedSteps, Proof, ProofInput, ProofKind, Unproven, prove};
use mhtrain_swift::showed::{Showed, seen};
use mhtrain_swift::stall::Stall;
use mhtrain_swift::verdict::{Conclusion, EndedByUs, conclude, diagnose_end};

use crate::bugs::Bug;
use crate::daemon::{Sized, Waiting};
use crate::disk::{AttemptFiles, AttemptId, Checkpoint, Ended, Launch, StoreError, path};
use crate::invariants::Violation;
use crate::processes::Recorder;
use crate::sizing::policy;
use crate::world::World;

/// `[attempt] memory_return_s`.
const MEMORY_RETURN_S: u64 = 10;

/// `[attempt] stall_s`.
const STALL_S: u64 = 900;

/// Seconds until a job is taken up again after something outside of it went wrong, and how often that is done.
const TRY_AGAIN_S: u64 = 5;
const TRY_TO_END_AGAIN_S: u64 = 30;
const TRIES_MAX: u32 = 24;

/// How often the recorder of one attempt is replaced.
const TAKE_OVERS_MAX: u32 = 20;

/// `DISK_LOOK` and `REFUSED_MAX` of the engine, and why a job waits or fails then.
const DISK_LOOK_S: u64 = 2;
pub(crate) const REFUSED_MAX: u32 = 10;
pub(crate) const RECORD_REFUSED: &str = "its record cannot be written";

/// The loop of one job.
#[derive(Debug)]
pub(crate) struct JobLoop {
    pub(crate) id: u64,
    /// Whether somebody asked for the end since the events were read.
    pub(crate) asked_to_stop: bool,
    script: usize,
    sized: Sized,
    spec: Rc<JobSpec>,
    policy: Rc<Policy>,
    records: Vec<Record>,
    /// Who asked for the end, as the events name it.
    stop: Option<String>,
    /// When the job's time is over, once it is known.
    deadline: Option<u64>,
    step: Step,
    take_overs: u32,
    tries: u32,
    /// How often in a row the disk refused the record of an attempt.
    refused: u32,
    /// GiB that others held when the attempt was started; of one that was taken over, when it was planned.
    others_before: u64,
}

/// What the loop does next.
#[derive(Debug)]
enum Step {
    /// Reads the events and goes on where they end.
    Open,
    /// An attempt was meant to be, and never was.
    NeverStarted(AttemptStart),
    /// Something must pass first.
    Wait { next: Next, until: Until },
    /// Writes down what is about to be started.
    Launch(Next),
    /// Starts it.
    Spawn(AttemptStart, Option<Checkpoint>, ResumeWish),
    /// The disk does not take the record of the next attempt: that is told, and tried again at a time.
    WaitForDisk { next: Next, again: Option<u64> },
    /// Waits until the recorder wrote down who the trainer is.
    Started(AttemptStart),
    /// Waits until everything of it is gone.
    Follow { start: AttemptStart, noted: bool, stop_sent: bool },
    /// Writes down how it ended.
    Ended { start: AttemptStart, exit: Exit, oom_kill: Option<bool>, stall: Option<Stall> },
    /// Lets later plans learn from it.
    Observe { start: AttemptStart, exit: Exit, diagnosis: Diagnosis },
    /// Asks what that means.
    Conclude { start: AttemptStart, exit: Exit, diagnosis: Diagnosis },
    /// Asks what is tried next.
    Answer { diagnosis: Diagnosis, unproven: Option<Unproven> },
    /// Leaves a card that failed.
    Leave,
    /// Makes the last checkpoint survive a power cut, before that is called a success.
    Keep { id: AttemptId, last: u64, event: JobEvent },
    /// Writes down the end of the job.
    End(JobEvent),
    /// Something outside of the job went wrong.
    Broken { why: String },
    /// That is tried again.
    Pause { until: u64 },
    /// Nothing more.
    Over,
}

/// An attempt that is about to be.
#[derive(Clone, Debug)]
struct Next {
    rung: usize,
    adjustments: Vec<Adjustment>,
    wish: ResumeWish,
    wait: Wait,
    /// Whether the memory of the attempt before must come back first.
    after_death: bool,
}

/// What is waited for.
#[derive(Clone, Debug, PartialEq)]
enum Until {
    /// The wait has not begun.
    Begin,
    /// The memory of a dead trainer, at most until then.
    Returned(u64),
    /// That it can be written down what is waited for.
    Told,
    /// A time.
    Time(u64),
    /// Free memory, at most until then.
    Memory(Bytes, u64),
}

/// Why a step could not be done.
#[derive(Debug)]
struct Failure(String);

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure(error.to_string())
    }
}

/// What is read of an attempt's files.
struct Follower {
    diagnoser: Diagnoser,
    watch: StderrWatch,
    log: TrainerLog,
}

impl Follower {
    fn read(files: &AttemptFiles) -> Follower {
        let (mut diagnoser, mut watch, mut log) = (Diagnoser::new(), StderrWatch::new(), TrainerLog::new());
        diagnoser.push_bytes(files.output.as_bytes());
        watch.push_bytes(files.output.as_bytes());
        log.push_bytes(files.metrics.as_bytes());
        Follower { diagnoser, watch, log }
    }

    fn last_step(&self) -> Option<u64> {
        let logged = self.log.latest().map_or(0, |progress| progress.step);
        Some(logged.max(self.watch.bar().map_or(0, |bar| bar.step))).filter(|step| *step > 0)
    }

    fn rows(&self) -> Option<u64> {
        self.watch.train_rows().or_else(|| self.log.summary()?.train_rows)
    }
}

impl JobLoop {
    pub(crate) fn new(world: &World<'_>, id: u64, sized: Sized) -> JobLoop {
        let spec = Rc::clone(&world.disk.job(id).spec);
        let other_device = matches!(spec.device, DeviceWish::Auto);
        let policy = policy(&spec, other_device).expect("a checked spec has a policy");
        let others_before = world.cards[sized.card].total.saturating_sub(sized.free);
        JobLoop {
            id,
            asked_to_stop: false,
            script: world.disk.job(id).context.script,
            sized,
            spec,
            policy: Rc::new(policy),
            records: Vec::new(),
            stop: None,
            deadline: None,
            step: Step::Open,
            take_overs: 0,
            tries: 0,
            refused: 0,
            others_before,
        }
    }

    pub(crate) fn card(&self) -> usize {
        self.sized.card
    }

    pub(crate) fn output_dir(&self) -> String {
        self.spec.output_dir.clone()
    }

    /// Returns whether there is something to do now.
    pub(crate) fn is_ready(&self, world: &World<'_>) -> bool {
        if world.disk.full && self.writes(world) {
            // The real one asks the store again and again: nothing follows on an event that is not recorded.
            return false;
        }
        match &self.step {
            Step::Wait { until, .. } => {
                self.asked_to_stop || self.is_late(world) || has_passed(until, self.sized.card, world)
            }
            Step::WaitForDisk { again, .. } if world.bug == Some(Bug::DiskWaitedForForEver) => {
                again.is_none()
            }
            Step::WaitForDisk { again, .. } => {
                self.asked_to_stop || self.is_late(world) || again.is_none_or(|at| at <= world.now)
            }
            Step::Pause { until } => *until <= world.now,
            Step::Started(start) => {
                let id = (self.id, start.attempt);
                !world.recorders.contains_key(&id)
                    || world.disk.attempts.get(&id).is_some_and(|files| files.trainer.is_some())
            }
            Step::Follow { start, noted, stop_sent } => {
                let id = (self.id, start.attempt);
                let Some(files) = world.disk.attempts.get(&id) else { return true };
                let started = files.trainer.is_some() && !noted;
                let late = self.is_late(world) && self.stop.is_none();
                let asked = (self.asked_to_stop || self.stop.is_some() || late) && !stop_sent;
                let gone = files.exit.is_some() || !world.recorders.contains_key(&id);
                started || asked || gone || self.is_stalled(id, world)
            }
            Step::Over => false,
            Step::Open
            | Step::NeverStarted(_)
            | Step::Launch(_)
            | Step::Spawn(..)
            | Step::Ended { .. }
            | Step::Observe { .. }
            | Step::Conclude { .. }
            | Step::Answer { .. }
            | Step::Leave
            | Step::Keep { .. }
            | Step::End(_)
            | Step::Broken { .. } => true,
        }
    }

    /// Returns whether the job's time is over.
    fn is_late(&self, world: &World<'_>) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= world.now)
    }

    /// Returns whether its time is over and it can do something about that now.
    pub(crate) fn is_late_and_ready(&self, world: &World<'_>) -> bool {
        self.is_late(world) && self.is_ready(world)
    }

    /// Returns whether it takes a job over whose time is over, and has not looked at the clock yet.
    pub(crate) fn is_late_and_new(&self, world: &World<'_>) -> bool {
        let is_new = matches!(self.step, Step::Open | Step::Follow { noted: false, .. });
        is_new && self.deadline.is_none() && world.truth.is_late(self.id, world.now) && self.is_ready(world)
    }

    /// Finds out when the job's time is over, once it has begun.
    fn set_deadline(&mut self, world: &World<'_>) {
        let Some(began) = stop::time_began(&self.records).filter(|_| self.deadline.is_none()) else { return };
        let used = (world.wall_seconds() - seconds_of(began)).max(0).unsigned_abs();
        let used = match world.bug {
            Some(Bug::TimeBeginsAgain) => 0,
            Some(Bug::TimeCountedTwice) => 2 * used,
            _ => used,
        };
        let left = stop::time_left(self.spec.time_limit, Duration::from_secs(used));
        self.deadline = left.map(|left| world.now + left.as_secs());
    }

    /// Returns whether the next step writes an event.
    fn writes(&self, world: &World<'_>) -> bool {
        match &self.step {
            Step::Follow { stop_sent: false, .. } if self.is_late(world) && self.stop.is_none() => true,
            Step::NeverStarted(_)
            | Step::Wait { until: Until::Told, .. }
            | Step::WaitForDisk { again: None, .. }
            | Step::Launch(_)
            | Step::Started(_)
            | Step::Follow { noted: false, .. }
            | Step::Ended { .. }
            | Step::Answer { .. }
            | Step::End(_)
            | Step::Broken { .. } => true,
            Step::Open
            | Step::Wait { .. }
            | Step::WaitForDisk { .. }
            | Step::Spawn(..)
            | Step::Follow { .. }
            | Step::Observe { .. }
            | Step::Conclude { .. }
            | Step::Leave
            | Step::Keep { .. }
            | Step::Pause { .. }
            | Step::Over => false,
        }
    }

    fn is_stalled(&self, id: AttemptId, world: &World<'_>) -> bool {
        let since =
            world.truth.hangs_since(id).filter(|_| world.trainers.get(&id).is_some_and(|it| it.hangs()));
        since.is_some_and(|since| since + STALL_S <= world.now) && !self.asked_to_stop && self.stop.is_none()
    }

    /// Returns when the loop goes on by the clock alone.
    pub(crate) fn timer(&self, world: &World<'_>) -> Option<u64> {
        let deadline = self.deadline.filter(|_| self.stop.is_none());
        match &self.step {
            Step::Wait { until: Until::Returned(at) | Until::Time(at) | Until::Memory(_, at), .. } => {
                Some(deadline.map_or(*at, |deadline| deadline.min(*at)))
            }
            Step::WaitForDisk { again: Some(at), .. } => {
                Some(deadline.map_or(*at, |deadline| deadline.min(*at)))
            }
            Step::Pause { until } => Some(*until),
            Step::Follow { start, .. } => {
                let stalls = world.truth.hangs_since((self.id, start.attempt)).map(|since| since + STALL_S);
                stalls.into_iter().chain(deadline).filter(|at| *at > world.now).min()
            }
            _ => None,
        }
    }

    fn state(&self) -> Result<JobState, Failure> {
        JobState::fold(self.records.iter().map(|record| &record.event)).map_err(|e| Failure(e.to_string()))
    }

    fn plan(&self) -> &Plan {
        &self.sized.plan
    }

    fn append(&mut self, world: &mut World<'_>, event: JobEvent) -> Result<(), Failure> {
        let name = event.name();
        match world.append(self.id, event) {
            Ok(()) => {
                self.records.clone_from(&world.disk.job(self.id).records);
                Ok(())
            }
            Err(StoreError::Illegal(error)) => {
                // A cancel may have come in between, from another thread. Anything else is a bug.
                if world.disk.job(self.id).state.stop().is_none() && world.broken.is_none() {
                    let why = error.to_string();
                    world.broken = Some(Violation::Illegal { job: self.id, event: name, why });
                }
                Err(Failure(error.to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn history(&self, world: &World<'_>) -> History {
        let mut history = History::from_events(self.records.iter().map(|record| &record.event));
        history.free_now = world.nvml_answers().then(|| Bytes::from_gib(world.free(self.sized.card)));
        history
    }

    // -- the steps

    fn advance(&mut self, world: &mut World<'_>) -> Result<Step, Failure> {
        match std::mem::replace(&mut self.step, Step::Over) {
            Step::Open => self.open(world),
            Step::NeverStarted(start) => {
                let (diagnosis, exit) = (Diagnosis::interrupted(), Exit::Lost);
                self.note_end(world, start.attempt, exit, &diagnosis, None)?;
                self.start_again(start.rung, start.adjustments, ResumeWish::Latest, Wait::None)
            }
            Step::Wait { next, until } => self.wait(world, next, until),
            Step::Launch(next) => self.launch(world, &next),
            Step::Spawn(start, from, wish) if world.refuses_records() => {
                if world.disk.full {
                    // Written down when the store can be written.
                    return Ok(Step::Spawn(start, from, wish));
                }
                self.refused(world, start, wish)
            }
            Step::WaitForDisk { next, again } => self.wait_for_disk(world, next, again),
            Step::Spawn(start, from, _) => {
                self.refused = 0;
                if world.nvml_answers() {
                    self.others_before = world.used(self.sized.card);
                }
                let launch = Launch {
                    script: self.script,
                    card: self.sized.card,
                    tier: start.tier.clone(),
                    from,
                    weights_only: start
                        .resume
                        .as_ref()
                        .is_some_and(|it| it.kind == mhtrain_job::event::ResumeKind::WeightsOnly),
                    stable: start.adjustments.contains(&Adjustment::RecipeStable),
                    expandable: start.adjustments.contains(&Adjustment::ExpandableSegments),
                    small_eval: start.adjustments.contains(&Adjustment::EvalBatch(1)),
                };
                let id = (self.id, start.attempt);
                world.disk.attempts.insert(id, AttemptFiles::new(launch));
                world.recorders.insert(id, Recorder::new());
                world.tell(|| format!("engine of {id:?}: a recorder is started"));
                Ok(Step::Started(start))
            }
            Step::Started(start) => {
                let id = (self.id, start.attempt);
                if world.bug == Some(Bug::EffectBeforeIntention) {
                    self.append(world, JobEvent::AttemptStarting(start.clone()))?;
                }
                if world.disk.attempts.get(&id).is_some_and(|files| files.trainer.is_some()) {
                    return Ok(Step::Follow { start, noted: false, stop_sent: false });
                }
                let diagnosis = Diagnosis::interrupted();
                self.note_end(world, start.attempt, Exit::Lost, &diagnosis, None)?;
                Ok(Step::Answer { diagnosis, unproven: None })
            }
            Step::Follow { start, noted, stop_sent } => self.follow(world, start, noted, stop_sent),
            Step::Ended { start, exit, oom_kill, stall } => {
                self.ended(world, start, exit, oom_kill, stall.as_ref())
            }
            Step::Observe { start, exit, diagnosis } => {
                self.observe(world, &start, &diagnosis)?;
                Ok(Step::Conclude { start, exit, diagnosis })
            }
            Step::Conclude { start, exit, diagnosis } => Ok(self.conclude(world, &start, &exit, diagnosis)),
            Step::Answer { diagnosis, unproven } => self.answer(world, &diagnosis, unproven),
            Step::Leave => {
                let card = self.sized.card;
                world.disk.failed_cards.insert(card);
                if let Some(daemon) = &mut world.daemon {
                    daemon.failed_cards.insert(card);
                }
                if let Some(by) = world.disk.job(self.id).state.stop() {
                    return Ok(Step::End(self.end_of_stopped(by)));
                }
                let ends_at = world.ends_at(self.id);
                if let Some(daemon) = &mut world.daemon {
                    daemon.queued.insert(self.id, Waiting { told: false, ends_at });
                }
                Ok(Step::Over)
            }
            Step::Keep { id, last, event } => {
                let files = world.disk.attempts.get_mut(&id);
                let checkpoints = files.into_iter().flat_map(|files| &mut files.checkpoints);
                checkpoints.filter(|it| it.step == last).for_each(|it| it.synced = true);
                Ok(Step::End(event))
            }
            Step::End(event) => {
                self.append(world, event)?;
                Ok(Step::Over)
            }
            Step::Broken { why } => self.after(world, &why),
            Step::Pause { .. } => Ok(Step::Open),
            Step::Over => Ok(Step::Over),
        }
    }

    /// Writes down that an attempt never ran, because the disk did not take its record.
    fn refused(
        &mut self,
        world: &mut World<'_>,
        start: AttemptStart,
        wish: ResumeWish,
    ) -> Result<Step, Failure> {
        world.tell(|| format!("engine of attempt {}: its record is refused", start.attempt));
        self.note_end(world, start.attempt, Exit::Lost, &Diagnosis::interrupted(), None)?;
        self.refused += 1;
        if self.refused > REFUSED_MAX || world.bug == Some(Bug::RefusedRecordFails) {
            return Ok(failed(RECORD_REFUSED.to_owned()));
        }
        let AttemptStart { rung, adjustments, .. } = start;
        let next = Next { rung, adjustments, wish, wait: Wait::None, after_death: false };
        Ok(Step::WaitForDisk { next, again: None })
    }

    fn wait_for_disk(
        &mut self,
        world: &mut World<'_>,
        next: Next,
        again: Option<u64>,
    ) -> Result<Step, Failure> {
        let rest = DISK_LOOK_S << (self.refused.max(1) - 1).min(5);
        if again.is_none() {
            self.set_deadline(world);
            self.append(world, JobEvent::Waiting { reason: RECORD_REFUSED.to_owned() })?;
        } else if self.asked_to_stop {
            return Ok(self.cancelled());
        } else if self.is_late(world) {
            return Ok(self.time_is_over());
        } else if !world.refuses_records() {
            return Ok(Step::Wait { next, until: Until::Begin });
        }
        Ok(Step::WaitForDisk { next, again: Some(world.now + rest) })
    }

    fn open(&mut self, world: &World<'_>) -> Result<Step, Failure> {
        self.asked_to_stop = false;
        self.deadline = None;
        self.records.clone_from(&world.disk.job(self.id).records);
        let state = self.state()?;
        if state.is_final() {
            return Ok(Step::Over);
        }
        self.stop = state.stop().map(str::to_owned);
        if world.bug == Some(Bug::TimeLimitCancels) {
            self.stop = self.stop.as_ref().map(|_| stop::CANCEL.to_owned());
        }
        match goes_on(&self.records).map_err(|e| Failure(e.to_string()))? {
            GoesOn::Begin => Err(Failure("a job with a device was planned".to_owned())),
            GoesOn::Cancel => Ok(self.cancelled()),
            GoesOn::Follow(start) if world.bug == Some(Bug::DoubleStart) => Ok(Step::NeverStarted(start)),
            GoesOn::Follow(start) => Ok(self.adopt(start)),
            GoesOn::Judge { start, exit, diagnosis } if world.bug == Some(Bug::LearnedTwice) => {
                Ok(Step::Observe { start, exit, diagnosis })
            }
            GoesOn::Judge { start, exit, diagnosis } => Ok(Step::Conclude { start, exit, diagnosis }),
            GoesOn::Start(NextAttempt { rung, adjustments, resume, wait }) => {
                self.start_again(rung.unwrap_or(self.plan().chosen), adjustments, resume, wait)
            }
        }
    }

    fn adopt(&self, start: AttemptStart) -> Step {
        Step::Follow { start, noted: false, stop_sent: false }
    }

    fn start_again(
        &self,
        recorded: usize,
        adjustments: Vec<Adjustment>,
        wish: ResumeWish,
        wait: Wait,
    ) -> Result<Step, Failure> {
        if recorded >= self.plan().rungs.len() {
            return Err(Failure("the ladder is not the one that this job was started with".to_owned()));
        }
        let next = Next { rung: recorded, adjustments, wish, wait, after_death: false };
        Ok(Step::Wait { next, until: Until::Begin })
    }

    fn wait(&mut self, world: &mut World<'_>, next: Next, until: Until) -> Result<Step, Failure> {
        if self.asked_to_stop && !matches!(until, Until::Begin | Until::Told) {
            return Ok(self.cancelled());
        }
        self.set_deadline(world);
        if self.is_late(world) && !matches!(until, Until::Begin | Until::Told | Until::Returned(_)) {
            return Ok(self.time_is_over());
        }
        let then = |until| Ok(Step::Wait { next: next.clone(), until });
        match until {
            Until::Begin if next.after_death => then(Until::Returned(world.now + MEMORY_RETURN_S)),
            Until::Begin | Until::Returned(_) if next.wait == Wait::None => Ok(Step::Launch(next)),
            Until::Begin | Until::Returned(_) => then(Until::Told),
            Until::Told => {
                self.append(world, JobEvent::Waiting { reason: format!("{:?}", next.wait) })?;
                match next.wait {
                    Wait::None => Ok(Step::Launch(next)),
                    Wait::Seconds(seconds) => then(Until::Time(world.now + seconds)),
                    Wait::ForMemory { need, seconds_max } => {
                        then(Until::Memory(need, world.now + seconds_max))
                    }
                }
            }
            Until::Time(_) => Ok(Step::Launch(next)),
            Until::Memory(need, _) if has_memory(need, self.sized.card, world) => Ok(Step::Launch(next)),
            Until::Memory(..) => Ok(failed("the memory did not become free in time".to_owned())),
        }
    }

    /// Decides from where an attempt goes on, and writes down that it is about to be started.
    fn launch(&mut self, world: &mut World<'_>, next: &Next) -> Result<Step, Failure> {
        // The real one looks at the clock and launches without anybody in between.
        self.set_deadline(world);
        if self.is_late(world) {
            return Ok(self.time_is_over());
        }
        let number = self.state()?.attempts() + 1;
        let mut tier = self.plan().rungs[next.rung].tier.clone();
        let saved = self.saved(world, next.wish);
        let dialect = Dialect::for_versions(
            Some(if world.script.three { "3.12.6" } else { "4.6.0" }),
            Some(if world.script.three { "4.57.6" } else { "5.19.0" }),
        );
        let dialect = dialect.0;
        let history = self.history(world);
        let wanted = Wanted {
            tier: &tier,
            wish: next.wish,
            steps_done: history.steps_done,
            restores_train_batch_size: dialect.restores_checkpoint_batch(),
            replays_first_epoch: dialect.replays_first_epoch(),
            steps_per_epoch: self.steps_per_epoch(world, &tier),
            allow_restart: self.spec.allow.restart,
            corrupt_steps: &unreadable_steps(&self.records),
        };
        let (resume, from) = match beginning::begin(&saved, &wanted) {
            Beginning::FirstRow { resume, why } => {
                if let Some(why) = why {
                    world.tell(|| format!("engine: it begins again: {why}"));
                }
                (resume, None)
            }
            Beginning::Checkpoint { resume, path, repair, .. } => {
                let mut shown = self.checkpoint_at(world, &path);
                if let (Some(shown), Some(_)) = (&mut shown, repair) {
                    shown.micro_batch = tier.micro_batch;
                }
                (Some(resume), shown)
            }
            Beginning::Refused { why, .. } => return Ok(failed(why.to_string())),
        };
        if world.bug == Some(Bug::SmallBatchAfterOom) && next.rung > self.plan().chosen {
            tier.accumulation = 16 / tier.micro_batch.min(16);
        }
        let adjustments = next.adjustments.clone();
        let start = AttemptStart { attempt: number, rung: next.rung, tier, resume, adjustments };
        if world.bug == Some(Bug::EffectBeforeIntention) {
            return Ok(Step::Spawn(start, from, next.wish));
        }
        self.append(world, JobEvent::AttemptStarting(start.clone()))?;
        Ok(Step::Spawn(start, from, next.wish))
    }

    /// Returns the attempts whose checkpoints may be resumed, oldest first, those of the jobs that this one goes on with
    /// before its own.
    fn attempts(&self, world: &World<'_>) -> Vec<AttemptId> {
        let mut jobs = vec![self.id];
        let mut next = world.disk.job(self.id).context.retry_of;
        while let Some(id) = next {
            jobs.push(id);
            next = world.disk.find(id).and_then(|job| job.context.retry_of).filter(|earlier| *earlier < id);
        }
        let of = |id: u64| world.disk.attempts.range((id, 0)..=(id, u32::MAX)).map(|(id, _)| *id);
        jobs.into_iter().rev().flat_map(of).collect()
    }

    fn saved(&self, world: &World<'_>, wish: ResumeWish) -> Vec<Saved> {
        let saved = |id: AttemptId| {
            let files = world.disk.attempts.get(&id)?;
            let checkpoints = files.checkpoints.iter().map(|checkpoint| checkpoint.facts(id)).collect();
            let mut made = attempts_made(&world.disk.job(id.0).records).into_iter();
            let diverged = made.any(|(start, end)| start.attempt == id.1 && end == Some(Kind::Diverged));
            let asked = diverged || wish == ResumeWish::LastGoodWeights;
            let last_good_step = asked.then(|| Follower::read(files).log.last_finite_step()).flatten();
            Some(Saved { tier: files.launch.tier.clone(), checkpoints, diverged, last_good_step })
        };
        self.attempts(world).into_iter().filter_map(saved).collect()
    }

    fn checkpoint_at(&self, world: &World<'_>, wanted: &std::path::Path) -> Option<Checkpoint> {
        let all = self.attempts(world).into_iter().filter_map(|id| Some((id, world.disk.attempts.get(&id)?)));
        let mut all = all.flat_map(|(id, files)| files.checkpoints.iter().map(move |it| (id, it)));
        all.find(|(id, it)| path(*id, it.step) == wanted).map(|(_, it)| it.clone())
    }

    fn steps_per_epoch(&self, world: &World<'_>, tier: &mhtrain_sizing::tier::Tier) -> Option<u64> {
        let last = last_start(&self.records)?;
        let files = world.disk.attempts.get(&(self.id, last.attempt))?;
        let rows = Follower::read(files).watch.train_rows()?;
        Some(mhtrain_swift::proof::steps_per_epoch(
            rows,
            tier.micro_batch,
            tier.accumulation,
            tier.world_size,
        ))
    }

    fn follow(
        &mut self,
        world: &mut World<'_>,
        start: AttemptStart,
        noted: bool,
        stop_sent: bool,
    ) -> Result<Step, Failure> {
        let id = (self.id, start.attempt);
        self.set_deadline(world);
        let late = self.is_late(world) && self.stop.is_none() && !self.asked_to_stop;
        let stalled = self.is_stalled(id, world);
        let Some(files) = world.disk.attempts.get_mut(&id) else {
            // The intention was recorded and nothing else: no recorder ever was.
            return Ok(Step::NeverStarted(start));
        };
        if files.trainer.is_none() && files.exit.is_none() {
            // Somebody who takes over gives an attempt up that has no trainer yet.
            files.abandoned = true;
            return Ok(Step::NeverStarted(start));
        }
        if late {
            self.append(world, JobEvent::StopRequested { by: stop::TIME_LIMIT.to_owned() })?;
            self.stop = Some(stop::TIME_LIMIT.to_owned());
            return Ok(Step::Follow { start, noted, stop_sent });
        }
        if (self.asked_to_stop || self.stop.is_some()) && !stop_sent {
            files.stop = true;
            self.stop.get_or_insert_with(|| stop::CANCEL.to_owned());
            return Ok(Step::Follow { start, noted, stop_sent: true });
        }
        if let (Some(process), false) = (files.trainer.clone(), noted) {
            if matches!(world.disk.job(self.id).state, JobState::Starting { .. }) {
                self.append(world, JobEvent::Started { attempt: start.attempt, process })?;
            }
            return Ok(Step::Follow { start, noted: true, stop_sent });
        }
        if let Some((ended, oom_kill)) = files.exit {
            let exit = match ended {
                Ended::Code(code) => Exit::Code { code },
                Ended::Signal(signal) => Exit::Signal { signal },
                Ended::StatusLost => Exit::Lost,
            };
            return Ok(Step::Ended { start, exit, oom_kill, stall: None });
        }
        if !world.recorders.contains_key(&id) {
            self.take_overs += 1;
            if self.take_overs > TAKE_OVERS_MAX {
                world.end_attempt(id);
                return Ok(Step::Ended { start, exit: Exit::Lost, oom_kill: None, stall: None });
            }
            world.tell(|| format!("engine of {id:?}: another recorder takes over"));
            world.recorders.insert(id, Recorder::adopting());
        } else if stalled {
            world.tell(|| format!("engine of {id:?}: it hangs and is ended"));
            let last_step = Follower::read(files_of(world, id)?).last_step().unwrap_or(0);
            world.end_attempt(id);
            let stall = Stall {
                still: Duration::from_secs(STALL_S),
                step: Duration::from_secs(7),
                last_step,
                stacks: String::new(),
            };
            let exit = Exit::Signal { signal: 9 };
            return Ok(Step::Ended { start, exit, oom_kill: None, stall: Some(stall) });
        }
        Ok(Step::Follow { start, noted, stop_sent })
    }

    /// Decides why an attempt ended, and writes it down.
    fn ended(
        &mut self,
        world: &mut World<'_>,
        start: AttemptStart,
        exit: Exit,
        oom_kill: Option<bool>,
        stall: Option<&Stall>,
    ) -> Result<Step, Failure> {
        let follower = Follower::read(files_of(world, (self.id, start.attempt))?);
        let facts = ExitFacts {
            code: if let Exit::Code { code } = exit { Some(code) } else { None },
            signal: if let Exit::Signal { signal } = exit { Some(signal) } else { None },
            oom_kill,
            we_stopped_it: self.stop.is_some() || stall.is_some(),
            expandable_segments: Some(
                self.policy.expandable_segments != ExpandableSegments::Off
                    || start.adjustments.contains(&Adjustment::ExpandableSegments),
            ),
            full_log: None,
            others_before: Some(Bytes::from_gib(self.others_before)),
        };
        let last_step = follower.last_step();
        let loop_ended = follower.log.end_of_training().is_some();
        let ended = stall.cloned().map(EndedByUs::Stalled);
        let diagnosis = diagnose_end(follower.diagnoser, &exit, facts, loop_ended, ended.as_ref());
        self.note_end(world, start.attempt, exit.clone(), &diagnosis, last_step)?;
        Ok(match world.script.learns {
            true => Step::Observe { start, exit, diagnosis },
            false => Step::Conclude { start, exit, diagnosis },
        })
    }

    /// Keeps what an attempt showed, for this daemon and, unless that gets lost, for the next.
    fn observe(
        &self,
        world: &mut World<'_>,
        start: &AttemptStart,
        diagnosis: &Diagnosis,
    ) -> Result<(), Failure> {
        let id = (self.id, start.attempt);
        let follower = Follower::read(files_of(world, id)?);
        let from_step = start.resume.as_ref().map_or(0, |resume| resume.from_step);
        let step = follower.last_step().unwrap_or(0);
        let logged = follower.log.latest();
        let mut shown = seen(&Showed { diagnosis, from_step, step, logged, peaks: None, device: None });
        if let (Some(Bug::CensoredAsPeak), Some(Seen::MoreThan { limit })) = (world.bug, shown) {
            shown = Some(Seen::Peak { allocated: None, reserved: Some(limit), device: None });
        }
        let Some(shown) = shown else { return Ok(()) };
        let name = format!("job {}, attempt {}", id.0, id.1);
        let Some(observation) = self.plan().observation(start.rung, name, shown, None) else { return Ok(()) };
        let noted = ObservationOf { owner_uid: world.disk.job(self.id).owner_uid, observation };
        world.learn(id, noted);
        Ok(())
    }

    fn note_end(
        &mut self,
        world: &mut World<'_>,
        attempt: u32,
        exit: Exit,
        diagnosis: &Diagnosis,
        last_step: Option<u64>,
    ) -> Result<(), Failure> {
        let diagnosis = Box::new(diagnosis.clone());
        self.append(world, JobEvent::AttemptEnded { attempt, exit, diagnosis, last_step })
    }

    fn conclude(
        &mut self,
        world: &World<'_>,
        start: &AttemptStart,
        exit: &Exit,
        diagnosis: Diagnosis,
    ) -> Step {
        let proven = self.prove(world, start, exit);
        let proven = match (world.bug, exit) {
            (Some(Bug::SuccessWithoutRows), Exit::Code { code: 0 }) => {
                Ok(proven.unwrap_or_else(|_| invented()))
            }
            _ => proven,
        };
        match conclude(proven, &diagnosis, exit, self.stop.is_some()) {
            Conclusion::Succeeded(proof) => {
                let last = proof.steps;
                let proof = serde_json::to_value(proof).unwrap_or_default();
                Step::Keep { id: (self.id, start.attempt), last, event: JobEvent::Succeeded { proof } }
            }
            Conclusion::Cancelled => self.cancelled(),
            Conclusion::NotStarted(error) => failed(format!("the trainer could not be started: {error}")),
            Conclusion::Answer(unproven) => Step::Answer { diagnosis, unproven },
        }
    }

    fn prove(&self, world: &World<'_>, start: &AttemptStart, exit: &Exit) -> Result<Proof, Unproven> {
        let id = (self.id, start.attempt);
        let files = world.disk.attempts.get(&id).ok_or(Unproven::NoEndOfTraining)?;
        let follower = Follower::read(files);
        let end = follower.log.end_of_training();
        let last = end.and_then(|end| files.checkpoints.iter().find(|it| it.step == end.step));
        let last = last.map(|checkpoint| checkpoint.facts(id));
        prove(&ProofInput {
            exit: match exit {
                Exit::Code { code } => ExitStatus::Code(*code),
                Exit::Signal { signal } => ExitStatus::Signal(*signal),
                Exit::Lost => ExitStatus::Lost,
                Exit::SpawnFailed { .. } => ExitStatus::Code(127),
            },
            end,
            rows: follower.rows(),
            micro_batch: start.tier.micro_batch,
            accumulation: start.tier.accumulation,
            world_size: start.tier.world_size,
            planned: PlannedSteps::Epochs(start.tier.num_train_epochs),
            checkpoint: last.as_ref(),
        })
    }

    /// Ends the job as whoever stopped it has it.
    fn cancelled(&self) -> Step {
        Step::End(self.end_of_stopped(self.stop.as_deref().unwrap_or(stop::CANCEL)))
    }

    fn time_is_over(&self) -> Step {
        Step::End(self.end_of_stopped(stop::TIME_LIMIT))
    }

    fn end_of_stopped(&self, by: &str) -> JobEvent {
        stop::end(by, self.spec.time_limit)
    }

    fn answer(
        &mut self,
        world: &mut World<'_>,
        diagnosis: &Diagnosis,
        unproven: Option<Unproven>,
    ) -> Result<Step, Failure> {
        let history = self.history(world);
        let mut decision = decide(&history, diagnosis, self.plan(), &self.policy);
        if let (Some(Bug::LowerTierOnKill), Kind::HostOom, Decision::Rerun(rerun)) =
            (world.bug, diagnosis.kind, &mut decision)
            && !diagnosis.certain
            && rerun.rung + 1 < self.plan().rungs.len()
        {
            (rerun.rung, rerun.answer) = (rerun.rung + 1, Answer::LowerTier);
        }
        match decision {
            Decision::Rerun(rerun) => {
                self.append(world, JobEvent::RerunDecided(rerun.clone()))?;
                if rerun.answer == Answer::OtherDevice {
                    return Ok(Step::Leave);
                }
                let Rerun { rung, adjustments, wait, resume: wish, .. } = rerun;
                let next = Next { rung, adjustments, wish, wait, after_death: true };
                Ok(Step::Wait { next, until: Until::Begin })
            }
            Decision::Finish => Ok(failed(format!("success cannot be proven: {unproven:?}"))),
            Decision::GiveUp { reason, .. } => Ok(failed(reason)),
        }
    }

    /// Decides what becomes of the job after something outside of it went wrong, as `Worker::after` does.
    fn after(&mut self, world: &mut World<'_>, why: &str) -> Result<Step, Failure> {
        self.tries += 1;
        let why_shown = why.to_owned();
        let id = self.id;
        world.tell(|| format!("engine of job {id}: cannot go on: {why_shown}"));
        self.records.clone_from(&world.disk.job(self.id).records);
        let state = self.state()?;
        if state.is_final() {
            return Ok(Step::Over);
        }
        if let JobState::Starting { attempt, .. } | JobState::Running { attempt, .. } = &state {
            if self.tries < TRIES_MAX && state.stop().is_none() {
                return Ok(Step::Pause { until: world.now + TRY_AGAIN_S });
            }
            world.end_attempt((self.id, attempt.number));
            self.note_end(world, attempt.number, Exit::Lost, &Diagnosis::interrupted(), None)?;
        }
        let event = match state.stop() {
            Some(by) => self.end_of_stopped(by),
            None => JobEvent::Failed { reason: why.to_owned(), help: None },
        };
        if state.stop().is_none() && world.broken.is_none() {
            world.broken = Some(Violation::FailedByAccident { job: self.id, why: why.to_owned() });
        }
        self.append(world, event)?;
        Ok(Step::Over)
    }
}

impl World<'_> {
    /// Lets the loop of a job do its next step.
    pub(crate) fn go_on_with_job(&mut self, id: u64) {
        let Some(mut job) = self.daemon.as_mut().and_then(|daemon| daemon.live.remove(&id)) else { return };
        let was_broken = matches!(job.step, Step::Broken { .. });
        job.step = match job.advance(self) {
            Ok(step) => step,
            Err(_) if was_broken => Step::Pause { until: self.now + TRY_TO_END_AGAIN_S },
            Err(Failure(why)) => Step::Broken { why },
        };
        if let Some(daemon) = &mut self.daemon
            && !matches!(job.step, Step::Over)
        {
            daemon.live.insert(id, job);
        }
    }
}

fn files_of<'w>(world: &'w World<'_>, id: AttemptId) -> Result<&'w AttemptFiles, Failure> {
    world.disk.attempts.get(&id).ok_or_else(|| Failure("the files of the attempt are gone".to_owned()))
}

fn has_passed(until: &Until, card: usize, world: &World<'_>) -> bool {
    match until {
        Until::Begin | Until::Told => true,
        Until::Returned(at) => *at <= world.now || !world.has_ghosts(card),
        Until::Time(at) => *at <= world.now,
        Until::Memory(need, at) => *at <= world.now || has_memory(*need, card, world),
    }
}

fn has_memory(need: Bytes, card: usize, world: &World<'_>) -> bool {
    !world.nvml_answers() || Bytes::from_gib(world.free(card)) >= need
}

/// Returns the seconds that a time of [`World::wall`] stands for.
pub(crate) fn seconds_of(wall: &str) -> i64 {
    let number =
        |at: std::ops::Range<usize>| wall.get(at).and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
    (number(8..10) - 1) * 86_400 + number(11..13) * 3600 + number(14..16) * 60 + number(17..19)
}

fn failed(reason: String) -> Step {
    Step::End(JobEvent::Failed { reason, help: None })
}

/// Returns a proof that nothing proves: of the mistake that is planted.
fn invented() -> Proof {
    Proof {
        proof: ProofKind::Rows,
        exit: ExitStatus::Code(0),
        steps: 0,
        rows: Some(0),
        steps_per_epoch: None,
        checkpoint: std::path::PathBuf::new(),
    }
}
