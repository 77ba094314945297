//! How does one job run on this host, from its plan to its receipt?
//!
//! ```text
//!          +--> wait (memory, back-off) --> launch --> follow --> judge --+--> proven: final, receipt
//!          |                                                              +--> given up, cancelled: receipt
//!          +------------------------ rerun <------------------------------+
//! ```
//!
//! Decisions are made elsewhere (`rerun::decide`, `beginning::begin`, `verdict::conclude`); this is the loop that carries
//! them out.
//! Each intention is in the journal before its effect, so a process that comes after us knows what may be out there.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mhtrain_failpoint::reach;
use mhtrain_job::diagnosis::{Answer, Diagnosis, Kind};
use mhtrain_job::event::{AttemptStart, Exit, JobEvent, ProcessIdentity, Record, Resume, ResumeKind};
use mhtrain_job::receipt::{AttemptNote, ProofFacts, ProofKind, Receipt, render};
use mhtrain_job::rerun::{
    Adjustment, Decision, ExpandableSegments, History, Policy, Rerun, ResumeWish, Wait, decide,
};
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_job::take_over::{GoesOn, NextAttempt, attempts_made, goes_on, last_start, unreadable_steps};
use mhtrain_probe::nvml::Gpus;
use mhtrain_sizing::observation::Seen;
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use mhtrain_supervisor::Arrivals;
use mhtrain_supervisor::attempt::{Attempt, AttemptState, LaunchSpec, StopError};
use mhtrain_supervisor::log_tail::LogTail;
use mhtrain_supervisor::process::descendants;
use mhtrain_supervisor::record::{Ended as TrainerEnd, ExitRecord, Extent, RecordError};
use mhtrain_swift::beginning::{self, Saved, Wanted, begin};
use mhtrain_swift::command::{AttemptFlags, TrainerStart, exact_command};
use mhtrain_swift::diagnosis::ExitFacts;
use mhtrain_swift::environment::TrainerEnvironment;
use mhtrain_swift::progress::TrainerLog;
use mhtrain_swift::proof::{self, ExitStatus, PlannedSteps, ProofInput, Unproven, prove};
use mhtrain_swift::stall::Stall;
use mhtrain_swift::verdict::{Conclusion, EndedByUs, conclude, diagnose_end};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::companion::{self, Companion};
use super::directory::{JobDirectory, Lasting};
use super::follow::Follower;
use super::journal::{Journal, now, time_used};
use super::memory::{Waited, WatchedCard, pause};
use super::observations::{self, Observer};
use super::origin::Origin;
use super::prepare::{Prepared, chain};
use super::resume::{checkpoints_in, facts, repaired_view};
use super::screen::Screen;
use super::signals::{StopCause, StopSignals};
use super::stall::{LifeSigns, StallRule, Still, stacks};
use crate::cli::{diagnose, output};
use crate::config::Config;
use crate::engine::secrets;
use crate::failure::{Failure, Status, own_unwritable, unreadable, unwritable};

/// How often is tried whether the disk takes the record of an attempt now; twice as seldom after each that it refused all the
/// same, down to a 32nd.
const DISK_LOOK: Duration = Duration::from_secs(2);

/// How often in a row the disk may refuse the record of an attempt after it took a trial.
const REFUSED_MAX: u32 = 10;

/// What a trial writes: many times the files of a record before its trainer runs.
const TRIAL_BYTES: usize = 256 << 10;

/// How often a running attempt is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often the recorder of one attempt is replaced. It dies of `kill -9` alone, so more is somebody's intention.
const TAKE_OVERS_MAX: u32 = 20;

/// The time until the last receipt is tried again where the disk did not take it.
const RECEIPT_AGAIN: Duration = Duration::from_secs(2);

/// How often a daemon tries that: for an hour. The store has all that is in it.
const RECEIPT_TRIES_MAX: u32 = 1800;

/// How often NVML is asked about a running attempt.
const MEMORY_EVERY: Duration = Duration::from_secs(1);

/// Everything that a local run starts from.
#[derive(Debug)]
pub struct LocalRun {
    /// The sized job.
    pub prepared: Prepared,
    /// The trainer.
    pub environment: TrainerEnvironment,
    /// What was probed, for the receipt.
    pub probe: serde_json::Value,
    /// Where it runs, locked.
    pub directory: JobDirectory,
    /// The cards.
    pub gpus: Gpus,
    /// Id of the job; `None` in the foreground.
    pub id: Option<u64>,
    /// An earlier process's journal of this very job that is to be continued.
    pub journal: Option<Journal>,
    /// Whether somebody gives the job another card when this one fails.
    pub other_device: bool,
    /// Attempts of jobs that ended earlier, whose checkpoints may be resumed.
    pub earlier: Vec<OldAttempt>,
    /// Whose environment and directory the trainer gets.
    pub origin: Origin,
    /// Who is told.
    pub screen: Screen,
    /// Who keeps what attempts show about memory; `None`: nobody.
    pub observer: Option<Box<dyn Observer>>,
}

/// An attempt that ended.
#[derive(Clone, Debug)]
pub struct OldAttempt {
    /// Where it trained.
    pub directory: PathBuf,
    /// Its rung.
    pub tier: Tier,
    /// Whether its training diverged.
    pub diverged: bool,
}

impl OldAttempt {
    /// Returns the attempts that a job's events tell of, in the directories that `directory` says.
    pub fn all_of(records: &[Record], directory: impl Fn(u32) -> PathBuf) -> Vec<OldAttempt> {
        let made = attempts_made(records).into_iter().map(|(start, end)| OldAttempt {
            directory: directory(start.attempt),
            tier: start.tier.clone(),
            diverged: end == Some(Kind::Diverged),
        });
        made.collect()
    }
}

/// What came of a job.
#[derive(Debug)]
pub struct Verdict {
    /// How the process ends; `None` when the card failed and the job goes on on another one.
    pub status: Option<Status>,
    /// The whole story.
    pub receipt: Receipt,
}

/// Runs a job to its end, or to the signal that stops this process.
///
/// # Errors
/// Something outside of the job went wrong: the journal cannot be written, a recorder cannot be started.
pub fn run(run: LocalRun, config: &Config) -> Result<Verdict, Failure> {
    run_until(run, config, StopSignals::listen)
}

/// Like [`run`], stopped by whoever `stop` listens to.
///
/// # Errors
/// As [`run`].
pub fn run_until(
    run: LocalRun,
    config: &Config,
    stop: impl FnOnce() -> Result<StopSignals, Failure>,
) -> Result<Verdict, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Status::Bug, "no_runtime", e))?;
    runtime.block_on(async {
        let mut job = Job::new(run, config, stop()?)?;
        let first = job.first_step()?;
        job.drive(first).await
    })
}

/// An attempt that is about to start.
#[derive(Clone, Debug)]
struct Next {
    rung: usize,
    adjustments: Vec<Adjustment>,
    wish: ResumeWish,
    wait: Wait,
}

/// From where an attempt goes on, and the checkpoint that its trainer is shown.
type Beginning = (Option<Resume>, Option<PathBuf>);

/// What the loop does next.
#[derive(Debug)]
enum Step {
    Start(Next),
    /// The disk does not take the record of the next attempt, for this reason.
    WaitForDisk(Next, Failure),
    Adopt(AttemptStart, Attempt),
    Over(Status),
    OtherDevice,
}

/// An attempt whose processes are all gone.
#[derive(Debug)]
struct Gone {
    start: AttemptStart,
    exit: Exit,
    facts: ExitFacts,
    follower: Follower,
    pids: Vec<u32>,
    ended: Option<EndedByUs>,
    /// Why its trainer was not started, where that was the disk, which did not take its record.
    refused: Option<String>,
}

/// A stop that is asked for until the recorder knows of it: a full disk can be in the way.
#[derive(Debug, Default)]
struct DueStop {
    grace: Option<Duration>,
    is_told: bool,
}

impl DueStop {
    /// The attempt is to end within this time. A later word replaces an earlier one.
    fn within(&mut self, grace: Duration) {
        self.grace = Some(grace);
    }

    /// Asks the recorder, where there is something to ask.
    fn ask(&mut self, attempt: &Attempt, screen: &Screen) {
        let Some(grace) = self.grace else { return };
        match attempt.request_stop(grace) {
            Ok(()) => {
                reach("stop.asked", "");
                self.grace = None;
            }
            // Nobody is there to ask: whoever follows sees that, and puts another one there or kills what is left.
            Err(StopError::RecorderGone { .. }) => {}
            Err(error) => {
                if !std::mem::replace(&mut self.is_told, true) {
                    screen.say(format!("the trainer cannot be stopped yet: {}", chain(&error)));
                }
            }
        }
    }
}

/// Why an attempt did not come up.
#[derive(Debug)]
enum Unlaunched {
    /// Somebody killed its recorder: another attempt can be made.
    Killed(String),
    /// The disk does not take its record now.
    Unwritable(Failure),
    /// It cannot be started.
    Failed(Failure),
}

impl From<Failure> for Unlaunched {
    fn from(failure: Failure) -> Unlaunched {
        Unlaunched::Failed(failure)
    }
}

struct Job<'a> {
    config: &'a Config,
    prepared: Prepared,
    environment: TrainerEnvironment,
    directory: JobDirectory,
    companion: Companion,
    journal: Journal,
    receipt: Receipt,
    card: WatchedCard,
    policy: Policy,
    origin: Origin,
    screen: Screen,
    observer: Option<Box<dyn Observer>>,
    signals: StopSignals,
    stop: Option<StopCause>,
    deadline: Option<Instant>,
    earlier: Vec<OldAttempt>,
    /// Attempts of which the kernel may still hold something.
    ended: Vec<Attempt>,
    /// How often in a row the disk refused the record of an attempt.
    refused: u32,
    /// Processes of the last attempt, as long as its memory was not waited for.
    last_pids: Vec<u32>,
    /// Processes whose memory was waited for: the driver may still count some.
    waited_for: Vec<u32>,
    /// What others held on the card when the running attempt was started; `None` where nobody looked.
    others_before: Option<Bytes>,
}

impl<'a> Job<'a> {
    fn new(run: LocalRun, config: &'a Config, signals: StopSignals) -> Result<Job<'a>, Failure> {
        let LocalRun {
            prepared,
            environment,
            probe,
            directory,
            gpus,
            id,
            journal,
            other_device,
            earlier,
            origin,
            screen,
            observer,
        } = run;
        let spec = &prepared.spec;
        let job = spec.to_json();
        let journal = match journal {
            Some(journal) => journal,
            None => Journal::begin(&directory.journal(), JobEvent::Submitted { spec: job.clone() })?,
        };
        let submitted_at = journal.records().first().map_or_else(now, |record| record.at.clone());
        let mut receipt = Receipt::new(job.clone(), submitted_at);
        receipt.id = id;
        receipt.probe = probe;
        receipt.versions = environment.packages.clone();
        receipt.record_plan(&prepared.plan);
        receipt.notes.splice(0..0, prepared.notes.iter().cloned());
        // A report that is no JSON would be a bug of serde; the receipt does without.
        receipt.data = prepared.data.as_ref().and_then(|data| serde_json::to_value(data).ok());
        let pretty = serde_json::to_vec_pretty(&job).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
        if let Err(failure) = directory.write_private("job.json", &pretty) {
            // For people, and for `run --continue`. Whoever takes a job over finds it there already, perhaps on a disk that
            // cannot be written now: no reason to leave a trainer alone.
            if !journal.state().has_live_attempt() {
                return Err(if id.is_some() { own_unwritable(failure) } else { failure });
            }
        }
        let mut policy = Policy::for_job(spec, expandable_segments(&prepared), &prepared.advice)
            .map_err(|e| Failure::bad_input(e.code(), &e).help(e.help()))?;
        policy.other_device = other_device;
        policy.memory_wait_s = u64::from(config.attempt.neighbour_wait_min) * 60;
        policy.network_backoff_s = u64::from(config.attempt.network_backoff_s);
        let card = WatchedCard::new(gpus, prepared.candidate.uuid.clone());
        // Somebody asked for the end while nobody was there to bring it about.
        let stop = journal.state().stop().map(StopCause::recorded_as);
        let companion = Companion::prepare(&directory, &environment, &origin, config);
        Ok(Job {
            config,
            companion,
            environment,
            directory,
            journal,
            receipt,
            card,
            policy,
            origin,
            screen,
            observer,
            signals,
            stop,
            deadline: None,
            earlier,
            ended: Vec::new(),
            refused: 0,
            last_pids: Vec::new(),
            waited_for: Vec::new(),
            others_before: None,
            prepared,
        })
    }

    /// Returns where an earlier process left the job, or its beginning.
    fn first_step(&mut self) -> Result<Step, Failure> {
        let goes_on = goes_on(self.journal.records()).map_err(|e| Failure::new(Status::Bug, "bug", e))?;
        for (start, _) in attempts_made(self.journal.records()) {
            let earlier =
                Attempt::open_of(&self.directory.record(start.attempt), self.origin.identity.as_ref());
            // One that cannot be opened never was, or is looked at below.
            self.ended.extend(earlier);
        }
        let told = Receipt::from_events(None, self.journal.records());
        (self.receipt.attempts, self.receipt.warnings) = (told.attempts, told.warnings);
        match goes_on {
            GoesOn::Begin => {
                self.record_plan()?;
                Ok(Step::Start(Next {
                    rung: self.prepared.plan.chosen,
                    adjustments: Vec::new(),
                    wish: ResumeWish::Latest,
                    wait: Wait::None,
                }))
            }
            GoesOn::Cancel => self.cancelled(self.stop.unwrap_or(StopCause::Cancel)),
            GoesOn::Follow(start) => {
                let record = self.directory.record(start.attempt);
                match Attempt::open_of(&record, self.origin.identity.as_ref()) {
                    Ok(live) if live.abandon_unrecorded().map_err(no_record)? => self.never_started(&start),
                    Ok(live) => {
                        self.screen.say(format!("attempt {} is taken over", start.attempt));
                        // The first one started beside what the daemon's plan was made beside.
                        let known = self.receipt.id.is_some() && start.attempt == 1;
                        self.others_before = known.then_some(self.prepared.candidate.held_by_others);
                        Ok(Step::Adopt(start, live))
                    }
                    // The intention was recorded and nothing else: no recorder ever was.
                    Err(error) if error.is_not_found() => self.never_started(&start),
                    Err(error) => Err(no_record(error)),
                }
            }
            GoesOn::Judge { start, exit, diagnosis } => self.judge_again(&start, &exit, &diagnosis),
            GoesOn::Start(NextAttempt { rung, adjustments, resume: wish, wait }) => {
                let planned = self.prepared.plan.chosen;
                let rung = rung.map_or(Ok(planned), |recorded| self.rung_on_this_ladder(recorded))?;
                Ok(Step::Start(Next { rung, adjustments, wish, wait }))
            }
        }
    }

    /// Judges an attempt that ended when nobody was left to decide what follows: its files tell the same as then.
    fn judge_again(
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

    fn never_started(&mut self, start: &AttemptStart) -> Result<Step, Failure> {
        let diagnosis = Diagnosis::interrupted();
        self.journal.record(JobEvent::AttemptEnded {
            attempt: start.attempt,
            exit: Exit::Lost,
            diagnosis: Box::new(diagnosis),
            last_step: None,
        })?;
        Ok(Step::Start(Next {
            rung: self.rung_on_this_ladder(start.rung)?,
            adjustments: start.adjustments.clone(),
            wish: ResumeWish::Latest,
            wait: Wait::None,
        }))
    }

    /// Returns the index on the ladder of today of a rung of the ladder that the journal speaks of.
    fn rung_on_this_ladder(&self, recorded: usize) -> Result<usize, Failure> {
        let Some(start) = self.last_start() else { return Ok(self.prepared.plan.chosen) };
        let wanted = if start.rung == recorded {
            Some(start.tier)
        } else {
            self.receipt.rungs.get(recorded).map(|note| note.tier.clone())
        };
        let rungs = &self.prepared.plan.rungs;
        let same = rungs.iter().position(|rung| Some(&rung.tier) == wanted.as_ref());
        same.ok_or_else(|| {
            Failure::failed(
                "other_ladder",
                "the ladder is not the one that this job was started with: another trainer, card or setting is there",
            )
            .help("`--fresh` starts again; nothing is deleted".to_owned())
        })
    }

    fn last_start(&self) -> Option<AttemptStart> {
        last_start(self.journal.records()).cloned()
    }

    fn history(&mut self) -> History {
        let mut history = History::from_events(self.journal.records().iter().map(|record| &record.event));
        history.free_now = self.card.free();
        history
    }

    async fn drive(&mut self, first: Step) -> Result<Verdict, Failure> {
        let mut step = first;
        loop {
            step = match step {
                Step::Over(status) => {
                    self.let_memory_return().await;
                    // The receipt takes the disk a while, and needs no device.
                    self.screen.give_device_back();
                    self.save_last_receipt().await?;
                    reach("job.over", "");
                    self.clean_up();
                    return Ok(Verdict { status: Some(status), receipt: self.receipt.clone() });
                }
                Step::WaitForDisk(next, failure) => self.wait_for_disk(next, failure).await?,
                Step::OtherDevice => {
                    self.save_receipt()?;
                    self.clean_up();
                    return Ok(Verdict { status: None, receipt: self.receipt.clone() });
                }
                Step::Start(next) => {
                    self.let_memory_return().await;
                    match self.stop {
                        Some(cause) => self.cancelled(cause)?,
                        None => match self.wait(&next).await? {
                            Some(over) => over,
                            None => match self.launch(&next)? {
                                Ok((start, attempt)) => {
                                    self.refused = 0;
                                    Step::Adopt(start, attempt)
                                }
                                Err(over) => over,
                            },
                        },
                    }
                }
                Step::Adopt(start, attempt) => {
                    let gone = self.follow(start, &attempt).await?;
                    self.ended.push(attempt);
                    self.last_pids.clone_from(&gone.pids);
                    if gone.exit != (Exit::Code { code: 0 }) {
                        // What follows is decided by what is free.
                        self.let_memory_return().await;
                    }
                    self.judge(gone)?
                }
            };
        }
    }

    /// Waits until the driver has given the memory of the last attempt back: whoever has the card next is sized by what is
    /// free. An attempt that ended before it was looked at had no time to take any, and nothing is waited for when as much is free
    /// as when the job was sized.
    async fn let_memory_return(&mut self) {
        if self.last_pids.is_empty() {
            return;
        }
        self.waited_for = std::mem::take(&mut self.last_pids);
        let was = self.prepared.candidate.card.free;
        let limit = Duration::from_secs(u64::from(self.config.attempt.memory_return_s));
        let returned = self.card.wait_for_return(&self.waited_for, was, limit, &mut self.signals);
        if let Waited::Stopped(cause) = returned.await {
            self.stop = self.stop.or(Some(cause));
        }
    }

    /// Gives the device back, where its memory is back too, before a job that has succeeded is written down: a large checkpoint
    /// takes the disk minutes, and needs no device.
    fn give_device_back_at_once(&mut self) {
        if self.card.is_back(&self.last_pids, self.prepared.candidate.card.free) {
            self.waited_for = std::mem::take(&mut self.last_pids);
            self.screen.give_device_back();
        }
    }

    /// Removes what attempts that are over leave in the kernel. It waits for their recorders, so it comes last.
    fn clean_up(&mut self) {
        self.ended.drain(..).for_each(|attempt| clean_up(&attempt));
    }

    /// Waits for what must pass before an attempt; returns a step when that ends the job. Its time goes on meanwhile.
    async fn wait(&mut self, next: &Next) -> Result<Option<Step>, Failure> {
        self.set_deadline();
        let deadline = self.deadline;
        let late = until(deadline);
        let waited = match next.wait {
            Wait::None if deadline.is_some_and(|at| Instant::now() >= at) => {
                Waited::Stopped(StopCause::TimeLimit)
            }
            Wait::None => Waited::Free,
            Wait::Seconds(seconds) => {
                self.waiting(format!("{seconds} s until the next try"))?;
                tokio::select! {
                    waited = pause(Duration::from_secs(seconds), &mut self.signals) => waited,
                    () = late => Waited::Stopped(StopCause::TimeLimit),
                }
            }
            Wait::ForMemory { need, seconds_max } => {
                let holders = self.card.holders().join(", ");
                self.waiting(format!("{need} of device memory are needed; {holders}"))?;
                let limit = Duration::from_secs(seconds_max);
                tokio::select! {
                    waited = self.card.wait_for(need, limit, &mut self.signals, &self.screen) => waited,
                    () = late => Waited::Stopped(StopCause::TimeLimit),
                }
            }
        };
        match waited {
            Waited::Free => Ok(None),
            Waited::Stopped(cause) => self.cancelled(cause).map(Some),
            Waited::TimeUp(free) => {
                let free = free.map_or("an unknown amount".to_owned(), |free| free.to_string());
                let reason = format!("the memory did not become free in time: {free} free at the end");
                self.failed(reason, Some("start it again when the card is free: it goes on".to_owned()))
                    .map(Some)
            }
        }
    }

    fn waiting(&mut self, reason: String) -> Result<(), Failure> {
        self.screen.say(format!("waiting: {reason}"));
        self.journal.record(JobEvent::Waiting { reason })
    }

    fn record_plan(&mut self) -> Result<(), Failure> {
        let plan = &self.prepared.plan;
        let event = JobEvent::Planned {
            chosen: plan.chosen,
            rungs: plan.rungs.len(),
            tier: plan.chosen_rung().tier.clone(),
            sized: None,
        };
        self.journal.record(event)
    }

    /// Starts an attempt; returns a step instead when that ends the job.
    fn launch(&mut self, next: &Next) -> Result<Result<(AttemptStart, Attempt), Step>, Failure> {
        if !self.screen.has_device() {
            // Somebody took the checkpoint away by which success was proven, before that could be written down.
            let what =
                "what proved the job's success is not there any more, and others may have its device by now";
            let help = "`mhtraind retry` goes on from the last checkpoint".to_owned();
            return Err(Failure::failed("device_given_back", what).help(help));
        }
        let number = self.receipt.attempts.len() as u64 + 1;
        let number = u32::try_from(number).expect("attempts are bounded by the policy");
        let tier = self.prepared.plan.rungs[next.rung].tier.clone();
        let (resume, checkpoint) = match self.choose_resume(next, &tier)? {
            Ok(chosen) => chosen,
            Err(step) => return Ok(Err(step)),
        };
        let start = AttemptStart {
            attempt: number,
            rung: next.rung,
            tier,
            resume,
            adjustments: next.adjustments.clone(),
        };
        self.announce(&start);
        self.journal.record(JobEvent::AttemptStarting(start.clone()))?;
        self.receipt.attempts.push(AttemptNote::begun(&start, now()));
        match self.spawn(&start, checkpoint) {
            Ok(attempt) => Ok(Ok((start, attempt))),
            Err(Unlaunched::Killed(why)) => {
                let diagnosis = self.never_ran(number, &why)?;
                self.answer(&diagnosis, None).map(Err)
            }
            // Whoever starts a job by hand is told at once.
            Err(Unlaunched::Unwritable(failure)) if self.receipt.id.is_some() || number > 1 => {
                self.never_ran(number, &failure.message)?;
                Ok(Err(Step::WaitForDisk(next.clone(), failure)))
            }
            Err(Unlaunched::Unwritable(failure) | Unlaunched::Failed(failure)) => {
                let exit = Exit::SpawnFailed { error: failure.message.clone() };
                let diagnosis = Diagnosis { kind: Kind::Unknown, certain: true, ..Diagnosis::interrupted() };
                self.note_end(&exit, &diagnosis, None);
                self.journal.record(JobEvent::AttemptEnded {
                    attempt: number,
                    exit,
                    diagnosis: Box::new(diagnosis),
                    last_step: None,
                })?;
                self.failed(failure.message, failure.help).map(Err)
            }
        }
    }

    /// Writes down that an attempt ended before there was a trainer.
    fn never_ran(&mut self, number: u32, why: &str) -> Result<Diagnosis, Failure> {
        self.screen.say(format!("attempt {number} was interrupted: {why}"));
        let mut diagnosis = Diagnosis::interrupted();
        why.clone_into(&mut diagnosis.evidence.line);
        self.note_end(&Exit::Lost, &diagnosis, None);
        self.journal.record(JobEvent::AttemptEnded {
            attempt: number,
            exit: Exit::Lost,
            diagnosis: Box::new(diagnosis.clone()),
            last_step: None,
        })?;
        Ok(diagnosis)
    }

    /// Waits until the disk takes the record of an attempt, and starts one then.
    async fn wait_for_disk(&mut self, next: Next, failure: Failure) -> Result<Step, Failure> {
        self.set_deadline();
        self.refused += 1;
        if self.refused > REFUSED_MAX {
            return self.failed(failure.message, failure.help);
        }
        let error = &failure.message;
        let job = self.receipt.id;
        tracing::error!(job, error, "the next attempt waits until its record can be written");
        let help = failure.help.map_or(String::new(), |help| format!("; {help}"));
        self.waiting(format!("its record cannot be written: {error}{help}"))?;
        let rest = DISK_LOOK * (1 << (self.refused - 1).min(5));
        let number = u32::try_from(self.receipt.attempts.len() + 1).unwrap_or(u32::MAX);
        let record = self.directory.record(number);
        loop {
            let waited = tokio::select! {
                waited = pause(rest, &mut self.signals) => waited,
                () = until(self.deadline) => Waited::Stopped(StopCause::TimeLimit),
            };
            if let Waited::Stopped(cause) = waited {
                return self.cancelled(cause);
            }
            if can_be_written(&record) {
                return Ok(Step::Start(Next { wait: Wait::None, ..next }));
            }
        }
    }

    fn announce(&self, start: &AttemptStart) {
        let from = match &start.resume {
            None => String::new(),
            Some(Resume { kind: ResumeKind::Restart, .. }) => ", from the beginning".to_owned(),
            Some(Resume { kind: ResumeKind::Exact, from_step, steps_repeated, .. }) => {
                let again = match steps_repeated {
                    0 => String::new(),
                    n => format!("; {n} unsaved steps are trained again"),
                };
                format!(
                    ", resumed at step {from_step}: the next row is the one that would have followed{again}"
                )
            }
            Some(Resume { kind: ResumeKind::WeightsOnly, from_step, .. }) => {
                format!(", with the weights of step {from_step}")
            }
        };
        self.screen.say(format!("attempt {}: {}{from}", start.attempt, start.tier));
    }

    /// Decides from where an attempt goes on. Returns the checkpoint to show to the trainer, repaired where it must be.
    fn choose_resume(&mut self, next: &Next, tier: &Tier) -> Result<Result<Beginning, Step>, Failure> {
        let saved = self.saved(next.wish)?;
        let wanted = Wanted {
            tier,
            wish: next.wish,
            steps_done: self.history().steps_done,
            restores_train_batch_size: self.prepared.dialect.restores_checkpoint_batch(),
            replays_first_epoch: self.replays_first_epoch(),
            steps_per_epoch: self.steps_per_epoch(tier),
            allow_restart: self.prepared.spec.allow.restart,
            corrupt_steps: &unreadable_steps(self.journal.records()),
        };
        match begin(&saved, &wanted) {
            beginning::Beginning::FirstRow { resume, why } => {
                if let Some(why) = why.filter(|_| resume.is_some()) {
                    self.warn(format!("training starts again: {why}"))?;
                }
                Ok(Ok((resume, None)))
            }
            beginning::Beginning::Checkpoint { resume, path, repair, passed_over } => {
                for passed in &passed_over {
                    self.warn(format!("{} is not resumed: {}", passed.path.display(), passed.why))?;
                }
                let shown = match repair {
                    None => path,
                    Some(state) => {
                        let parent = self
                            .directory
                            .private()
                            .join(format!("resume-{}", self.receipt.attempts.len() + 1));
                        repaired_view(&path, &state, &parent).map_err(|e| unwritable(&parent, &e))?
                    }
                };
                Ok(Ok((Some(resume), Some(shown))))
            }
            beginning::Beginning::Refused { why, help } => self.failed(why.to_string(), help).map(Err),
        }
    }

    /// Returns what earlier attempts saved, oldest first.
    fn saved(&self, wish: ResumeWish) -> Result<Vec<Saved>, Failure> {
        let own = OldAttempt::all_of(self.journal.records(), |attempt| self.directory.attempt(attempt));
        let saved = |OldAttempt { directory, tier, diverged }: OldAttempt| {
            let checkpoints = checkpoints_in(&directory).map_err(|e| unreadable(&directory, &e))?;
            let asked = diverged || wish == ResumeWish::LastGoodWeights;
            let last_good_step = if asked { last_good_step(&directory)? } else { None };
            Ok(Saved { tier, checkpoints, diverged, last_good_step })
        };
        self.earlier.iter().cloned().chain(own).map(saved).collect()
    }

    fn steps_per_epoch(&self, tier: &Tier) -> Option<u64> {
        let rows = self.known_rows()?;
        Some(proof::steps_per_epoch(rows, tier.micro_batch, tier.accumulation, tier.world_size))
    }

    /// Returns whether the next trainer, resumed inside a later epoch, would replay the rows of the first.
    fn replays_first_epoch(&self) -> bool {
        let records = self.receipt.attempts.iter().map(|note| self.directory.record(note.attempt));
        self.companion.replays_first_epoch(&self.prepared.dialect, &self.environment, records)
    }

    /// Returns the rows of the train set as an earlier attempt's log told them.
    fn known_rows(&self) -> Option<u64> {
        let mut follower = Follower::new(&self.output_of(self.last_start()?.attempt), Path::new("."));
        follower.look_to_the_end().ok()?;
        follower.telemetry.rows().or_else(|| follower.watch.train_rows())
    }

    /// Returns the file that holds an attempt's standard output and standard error.
    fn output_of(&self, attempt: u32) -> PathBuf {
        self.directory.record(attempt).join("trainer.log")
    }

    fn spawn(&mut self, start: &AttemptStart, checkpoint: Option<PathBuf>) -> Result<Attempt, Unlaunched> {
        let output_dir = self.directory.attempt(start.attempt);
        std::fs::create_dir_all(&output_dir).map_err(|e| unwritable(&output_dir, &e))?;
        reach("attempt.directory_made", "");
        if let Some(index) = self.card.index() {
            self.prepared.candidate.card.index = Some(index);
        }
        let still_ours = self.card.used_by(&self.waited_for).unwrap_or_default();
        self.others_before = self.card.used().map(|used| used.saturating_sub(still_ours));
        let new_port = start.adjustments.contains(&Adjustment::NewPort);
        let flags = AttemptFlags {
            output_dir,
            resume_only_model: matches!(&start.resume, Some(resume) if resume.kind == ResumeKind::WeightsOnly),
            resume_from: checkpoint,
            companion: self.companion.launch(&self.directory.record(start.attempt)),
            expandable_segments: true,
            master_port: if new_port { free_port() } else { None },
            adjustments: start.adjustments.clone(),
        };
        let how = match &self.environment.sft_script {
            Some(script) => {
                TrainerStart::Script { python: self.environment.python.clone(), script: script.clone() }
            }
            None => TrainerStart::Command(self.config.trainer.command.clone()),
        };
        let request = self.prepared.command_request(start.rung);
        let invocation = exact_command(&request, &flags, &how)
            .map_err(|e| Failure::bad_input("bad_command", chain(&e)).help(e.help()))?;
        let env = self.trainer_environment(&invocation.env)?;
        let record = self.directory.record(start.attempt);
        let output = self.output_of(start.attempt);
        let spec = LaunchSpec {
            argv: invocation.argv,
            cwd: self.origin.cwd.clone(),
            stdout: output.clone(),
            stderr: output,
            grace: Duration::from_secs(u64::from(self.config.attempt.grace_s)),
            umask: self.origin.umask,
            log_cap_bytes: Some(u64::from(self.config.attempt.log_cap_mib) << 20),
            identity: self.origin.identity.clone(),
            extent: Extent::Cgroup,
        };
        Attempt::launch(&own_exe()?, &record, &spec, &env).map_err(|error| {
            let failure = || Failure::failed("cannot_start", chain(&error)).help(error.help());
            match error.is_recorder_killed() {
                true => Unlaunched::Killed(chain(&error)),
                false if error.is_unwritable() => Unlaunched::Unwritable(failure()),
                false => failure().into(),
            }
        })
    }

    /// Returns the whole environment of a trainer: ours, the job's, and the secrets that the job names.
    fn trainer_environment(
        &self,
        set: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<OsString, OsString>, Failure> {
        let mut env = self.origin.env.clone();
        // Without bytecode an import of torch costs three times as much, at every attempt.
        env.remove(&OsString::from("PYTHONDONTWRITEBYTECODE"));
        if !self.environment.bytecode
            && let Some(cache) = &self.origin.cache
        {
            env.entry("PYTHONPYCACHEPREFIX".into()).or_insert_with(|| cache.join("pycache").into());
        }
        // Output and errors share a file: unbuffered, their lines come in the order in which they were written.
        env.insert("PYTHONUNBUFFERED".into(), "1".into());
        env.extend(set.iter().map(|(name, value)| (name.into(), value.into())));
        let secrets = secrets::find(&self.prepared.spec.secrets, &self.origin.secrets)?;
        env.extend(secrets.iter().map(|(name, value)| (name.into(), value.to_owned())));
        Ok(env)
    }

    /// Follows an attempt until everything that it started is gone.
    async fn follow(&mut self, start: AttemptStart, attempt: &Attempt) -> Result<Gone, Failure> {
        let output_dir = self.directory.attempt(start.attempt);
        let mut follower = Follower::new(&self.output_of(start.attempt), &output_dir);
        let (mut pids, mut take_overs) = (Vec::new(), 0);
        let rule = StallRule {
            at_least: Duration::from_secs(u64::from(self.config.attempt.stall_s)),
            steps: self.config.attempt.stall_steps,
        };
        let (mut signs, mut ended) = (LifeSigns::new(rule, Instant::now()), None);
        let mut due_stop = DueStop::default();
        if self.stop.is_some() {
            // Somebody asked before we came, and perhaps nobody passed it on.
            due_stop.within(self.grace());
        }
        let mut companion_seen = false;
        // The first look at memory, and the receipt of a running job, come when it has run for a moment: until then there is
        // nothing to see, and both take longer than a launch.
        let (mut memory_due, mut is_told) = (Instant::now() + LOOK_EVERY, false);
        let arrivals = attempt.arrivals().and_then(awaitable);
        let recorder_end = || attempt.recorder_end().and_then(awaitable);
        let mut end = recorder_end();
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.set_deadline();
        self.screen.start_bar(start.attempt);
        loop {
            let asked = tokio::select! {
                cause = self.signals.next() => Some(cause),
                _ = look.tick() => None,
                () = arrival(arrivals.as_ref()) => None,
                () = readable(end.as_ref()) => {
                    // It stays readable, and has nothing more to tell.
                    end = None;
                    None
                }
            };
            let late = self.deadline.is_some_and(|at| Instant::now() >= at) && self.stop.is_none();
            if let Some(cause) = asked.or(late.then_some(StopCause::TimeLimit)) {
                due_stop.within(self.stop_attempt(cause)?);
            }
            due_stop.ask(attempt, &self.screen);
            follower.look().map_err(|e| unreadable(&self.output_of(start.attempt), &e))?;
            let state =
                attempt.state().map_err(|e| Failure::failed("no_record", chain(&e)).help(e.help()))?;
            self.note_started(&start, &state)?;
            match state {
                AttemptState::Starting => {}
                AttemptState::Running { trainer } => {
                    if Instant::now() >= memory_due {
                        // A disk that does not take it now is no reason to leave the trainer alone.
                        is_told = is_told || self.save_receipt().is_ok();
                        pids = self.theirs(family(trainer.identity.pid));
                        follower.saw_memory(self.card.used_by(&pids));
                        memory_due = Instant::now() + MEMORY_EVERY;
                        let (step, printed) = (follower.glance(None).step, follower.printed_bytes());
                        let still = signs.look(Instant::now(), step, printed, self.card.is_busy());
                        if let Some(still) = still.filter(|_| ended.is_none() && self.stop.is_none()) {
                            ended = Some(EndedByUs::Stalled(self.keep_stacks(&start, still, step, &pids)));
                            due_stop.within(Duration::ZERO);
                        }
                    }
                    let glance = follower.glance(Some(self.prepared.candidate.card.total));
                    if glance.step > 0 && !companion_seen {
                        companion_seen = true;
                        self.warn_of_companion(&start, &follower)?;
                    }
                    self.screen.glance(&glance);
                    if ended.is_none()
                        && self.stop.is_none()
                        && let Some(diagnosis) = follower.diagnoser.diverged_for_good()
                    {
                        // Each further step takes the time of the next attempt, and each further checkpoint replaces one
                        // from before.
                        self.screen.say(format!("it diverged, and is ended: {}", diagnosis.evidence.line));
                        ended = Some(EndedByUs::Diverged(diagnosis));
                        due_stop.within(self.grace());
                    }
                }
                AttemptState::Exited(end) => {
                    if end.leftovers_killed.is_none() {
                        kill_everything(attempt)?;
                    }
                    return self.gone(start, follower, pids, Some(&end), ended);
                }
                AttemptState::Lost { .. } if take_overs < TAKE_OVERS_MAX => {
                    take_overs += 1;
                    self.screen
                        .say("the recorder is gone: another one takes its place, the exit status is lost");
                    if let Err(error) = attempt.take_over(&own_exe()?, self.origin.identity.as_ref()) {
                        self.screen.say(format!("no other recorder comes up: {}", chain(&error)));
                    }
                    end = recorder_end();
                }
                AttemptState::Lost { .. } => {
                    kill_everything(attempt)?;
                    return self.gone(start, follower, pids, None, ended);
                }
            }
        }
    }

    fn gone(
        &mut self,
        start: AttemptStart,
        mut follower: Follower,
        pids: Vec<u32>,
        end: Option<&ExitRecord>,
        ended: Option<EndedByUs>,
    ) -> Result<Gone, Failure> {
        follower.look_to_the_end().map_err(|e| unreadable(&self.output_of(start.attempt), &e))?;
        self.screen.glance(&follower.glance(Some(self.prepared.candidate.card.total)));
        self.screen.end_bar();
        companion::clean_up(&self.directory.attempt(start.attempt));
        if follower.telemetry.stopped_at().is_some() {
            self.stop = self.stop.or(Some(StopCause::StopFile));
        }
        let refused = match end {
            // Whoever starts a job by hand is told at once.
            Some(ExitRecord { ended: TrainerEnd::NotStarted(why), disk_refused: true, .. })
                if self.receipt.id.is_some() || start.attempt > 1 =>
            {
                Some(why.clone())
            }
            _ => None,
        };
        let exit = match end.map(|end| &end.ended) {
            _ if refused.is_some() => Exit::Lost,
            Some(TrainerEnd::Code(code)) => Exit::Code { code: *code },
            Some(TrainerEnd::Signal(signal)) => Exit::Signal { signal: *signal },
            Some(TrainerEnd::NotStarted(error)) => Exit::SpawnFailed { error: error.clone() },
            Some(TrainerEnd::StatusLost) | None => Exit::Lost,
        };
        let facts = ExitFacts {
            code: if let Exit::Code { code } = exit { Some(code) } else { None },
            signal: if let Exit::Signal { signal } = exit { Some(signal) } else { None },
            oom_kill: end.and_then(|end| end.oom_kill),
            we_stopped_it: self.stop.is_some() || ended.is_some(),
            expandable_segments: Some(
                self.policy.expandable_segments != ExpandableSegments::Off
                    || start.adjustments.contains(&Adjustment::ExpandableSegments),
            ),
            full_log: end.filter(|end| end.log_full).map(|_| self.output_of(start.attempt)),
            others_before: self.others_before,
        };
        Ok(Gone { start, exit, facts, follower, pids, ended, refused })
    }

    fn note_started(&mut self, start: &AttemptStart, state: &AttemptState) -> Result<(), Failure> {
        if let (JobState::Starting { .. }, AttemptState::Running { trainer }) = (self.journal.state(), state)
        {
            let identity = &trainer.identity;
            self.journal.record(JobEvent::Started {
                attempt: start.attempt,
                process: ProcessIdentity {
                    pid: identity.pid,
                    start_time: identity.start_time,
                    boot_id: identity.boot_id.clone(),
                },
            })?;
        }
        Ok(())
    }

    /// Finds out when the job's time is over, once it has begun.
    fn set_deadline(&mut self) {
        if self.deadline.is_none() {
            let left = time_used(self.journal.records())
                .and_then(|used| stop::time_left(self.prepared.spec.time_limit, used));
            self.deadline = left.map(|left| Instant::now() + left);
        }
    }

    fn grace(&self) -> Duration {
        Duration::from_secs(u64::from(self.config.attempt.grace_s))
    }

    /// Notes that somebody asked for the end. Returns how long the trainer may take: some time at first, none when it was
    /// asked for again.
    fn stop_attempt(&mut self, cause: StopCause) -> Result<Duration, Failure> {
        if self.stop.is_some() {
            self.screen.say("stopping at once");
            return Ok(Duration::ZERO);
        }
        let grace = self.grace();
        let seconds = grace.as_secs();
        self.screen.say(format!("{cause}: stopping the trainer (within {seconds} s; again: at once)"));
        // A cancel was recorded by whoever took it, before it was answered.
        if cause != StopCause::Cancel {
            self.journal.record(JobEvent::StopRequested { by: cause.to_string() })?;
        }
        self.stop = Some(cause);
        Ok(grace)
    }

    /// Returns those of the processes that are the job's user's: the record that names the first of them is theirs to write.
    fn theirs(&self, mut pids: Vec<u32>) -> Vec<u32> {
        if let Some(identity) = &self.origin.identity {
            pids.retain(|pid| {
                let owner = std::fs::metadata(format!("/proc/{pid}")).map(|found| found.uid());
                owner.is_ok_and(|owner| owner == identity.uid)
            });
        }
        pids
    }

    /// Keeps the stacks of an attempt that hangs and is about to be ended.
    fn keep_stacks(&self, start: &AttemptStart, still: Still, last_step: u64, pids: &[u32]) -> Stall {
        let file = self.directory.record(start.attempt).join("stacks.txt");
        let (seconds, shown) = (still.since.as_secs(), file.display());
        self.screen.say(format!("no sign of life for {seconds} s: it is ended; its stacks are in {shown}"));
        let stacks = stacks(pids, &self.origin, &self.output_of(start.attempt), &file);
        Stall { still: still.since, step: still.step, last_step, stacks }
    }

    /// Decides what the end of an attempt means.
    fn judge(&mut self, gone: Gone) -> Result<Step, Failure> {
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
    fn conclude(
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

    fn warn_of_companion(&mut self, start: &AttemptStart, follower: &Follower) -> Result<(), Failure> {
        let steps = self.steps_per_epoch(&start.tier);
        let warnings = self.companion.warnings(start, follower, &self.prepared.dialect, steps);
        warnings.into_iter().try_for_each(|warning| self.warn(warning))
    }

    fn answer(&mut self, diagnosis: &Diagnosis, unproven: Option<Unproven>) -> Result<Step, Failure> {
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

    fn prove(
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

    fn succeeded(
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

    fn failed(&mut self, reason: String, help: Option<String>) -> Result<Step, Failure> {
        self.receipt.then(&reason);
        self.journal.record(JobEvent::Failed { reason: reason.clone(), help: help.clone() })?;
        self.over("failed", Some(reason), help);
        Ok(Step::Over(Status::Failed))
    }

    /// Ends the job as whoever stopped it has it: its time limit fails it, everybody else cancels it.
    fn cancelled(&mut self, cause: StopCause) -> Result<Step, Failure> {
        let end = stop::end(&cause.to_string(), self.prepared.spec.time_limit);
        if let JobEvent::Failed { reason, help } = end {
            return self.failed(reason, help);
        }
        self.journal.record(end)?;
        let help = "start it again with --continue: it goes on from its last checkpoint".to_owned();
        self.over("cancelled", Some(cause.to_string()), Some(help));
        Ok(Step::Over(cause.status()))
    }

    fn over(&mut self, state: &str, reason: Option<String>, help: Option<String>) {
        self.receipt.state = state.to_owned();
        self.receipt.reason = reason;
        self.receipt.help = help;
        self.receipt.ended_at = Some(now());
    }

    /// Tells and keeps a warning; each but once.
    fn warn(&mut self, warning: String) -> Result<(), Failure> {
        if self.receipt.warnings.contains(&warning) {
            return Ok(());
        }
        self.screen.say(format!("warning: {warning}"));
        self.receipt.warnings.push(warning.clone());
        self.journal.record(JobEvent::Warned { warning })
    }

    fn note_end(&mut self, exit: &Exit, diagnosis: &Diagnosis, follower: Option<&Follower>) {
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

    fn save_receipt(&mut self) -> Result<(), Failure> {
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

    /// Saves the receipt of a job that is over, as soon as the disk takes it: nobody does it later.
    async fn save_last_receipt(&mut self) -> Result<(), Failure> {
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

/// Prints a verdict: the receipt for people, or as JSON.
///
/// # Errors
/// Standard output cannot be written.
pub fn show(verdict: &Verdict, as_json: bool) -> Result<(), Failure> {
    if as_json { output::json(&verdict.receipt) } else { output::line(render(&verdict.receipt)) }
}

/// Returns the last optimizer step that the trainer finished.
fn last_step(follower: &Follower) -> Option<u64> {
    Some(follower.glance(None).step).filter(|step| *step > 0)
}

/// Returns the last step whose loss was a number in the attempt that trained in this directory.
fn last_good_step(output_dir: &Path) -> Result<Option<u64>, Failure> {
    let (path, mut log) = (output_dir.join("logging.jsonl"), TrainerLog::new());
    LogTail::new(&path).drain(|bytes| log.push_bytes(bytes)).map_err(|e| unreadable(&path, &e))?;
    Ok(log.last_finite_step())
}

/// Returns the rows of the train set after filtering and packing: as the companion counted them, else as the
/// trainer's own log tells them.
fn rows(follower: &Follower) -> Option<u64> {
    let counted = follower.telemetry.rows().or_else(|| follower.watch.train_rows());
    counted.or_else(|| follower.log.summary()?.train_rows)
}

/// Returns a descriptor that a task can wait for; `None` where this runtime cannot.
fn awaitable<T: AsRawFd>(descriptor: T) -> Option<AsyncFd<T>> {
    // SAFETY: `Arrivals` and `OwnedFd` own one descriptor from their making until they are dropped, and `as_raw_fd` always
    // returns that one.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.ok()
}

/// Waits for a change of an attempt's state, where the kernel tells of one.
async fn arrival(arrivals: Option<&AsyncFd<Arrivals>>) {
    readable(arrivals).await;
    if let Some(arrivals) = arrivals {
        arrivals.get_ref().forget();
    }
}

/// Returns whether a directory like this one, with something in it, can be made. Nothing is left of it.
fn can_be_written(record: &Path) -> bool {
    let trial = record.with_extension("trial");
    let file = trial.join("trial");
    let made = std::fs::create_dir(&trial).or_else(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Ok(()),
        _ => Err(e),
    });
    let written = made.and_then(|()| std::fs::write(&file, vec![0; TRIAL_BYTES]));
    let _not_made = std::fs::remove_file(&file);
    let _not_made = std::fs::remove_dir(&trial);
    written.is_ok()
}

/// Waits for a moment; for ever where there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until a descriptor can be read; for ever where there is none: then only the clock wakes us.
async fn readable<T: AsRawFd>(descriptor: Option<&AsyncFd<T>>) {
    let Some(descriptor) = descriptor else { return std::future::pending().await };
    match descriptor.readable().await {
        Ok(mut ready) => ready.clear_ready(),
        Err(_) => std::future::pending().await,
    }
}

/// Returns a process and everything that came from it.
pub fn family(pid: u32) -> Vec<u32> {
    let mut pids = vec![pid];
    pids.extend(descendants(pid).unwrap_or_default().iter().map(|process| process.pid));
    pids
}

/// Returns a path that executes this program, even after an upgrade put another version at its path.
fn own_exe() -> Result<PathBuf, Failure> {
    let path = std::env::current_exe().map_err(|e| Failure::new(Status::Bug, "no_exe", e))?;
    // The kernel adds " (deleted)" to the path of a file that was replaced. It is still there under this name, which
    // is not the first choice because process lists would then call a recorder "exe".
    Ok(if path.exists() { path } else { PathBuf::from("/proc/self/exe") })
}

fn no_record(error: RecordError) -> Failure {
    Failure::failed("no_record", chain(&error)).help(error.help())
}

fn kill_everything(attempt: &Attempt) -> Result<(), Failure> {
    attempt.kill_everything().map(drop).map_err(|e| Failure::failed("cannot_stop", chain(&e)).help(e.help()))
}

/// Removes the cgroup of an attempt that is over. One that stays costs nothing but the look of it.
pub fn clean_up(attempt: &Attempt) {
    match attempt.clean_up() {
        Ok(true) => {}
        Ok(false) => tracing::debug!("the attempt's cgroup stays: somebody is in it"),
        Err(error) => tracing::debug!(error = chain(&error), "the attempt's cgroup stays"),
    }
}

/// Returns a port that nobody listens on now.
fn free_port() -> Option<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).ok()?;
    Some(listener.local_addr().ok()?.port())
}

/// Returns whether the allocator's expandable segments are on: they are, unless the surroundings switched them off, and
/// what the job itself says of them stays.
fn expandable_segments(prepared: &Prepared) -> ExpandableSegments {
    let said = |variables: &BTreeMap<String, String>| {
        let names = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"];
        let text = names.iter().filter_map(|name| variables.get(*name)).find_map(|text| {
            text.split(',').find_map(|setting| setting.trim().strip_prefix("expandable_segments:"))
        })?;
        Some(text.trim().eq_ignore_ascii_case("true"))
    };
    match (said(&prepared.spec.env), said(&prepared.inherited)) {
        (Some(_), _) => ExpandableSegments::Fixed,
        (None, Some(false)) => ExpandableSegments::Off,
        (None, Some(true) | None) => ExpandableSegments::On,
    }
}
