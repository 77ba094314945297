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

mod end;
mod start;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::watch::until;
use mhtrain_failpoint::reach;
use mhtrain_job::diagnosis::{Diagnosis, Kind};
use mhtrain_job::event::{AttemptStart, Exit, JobEvent, Record};
use mhtrain_job::receipt::{Receipt, render};
use mhtrain_job::rerun::{Adjustment, ExpandableSegments, History, Policy, ResumeWish, Wait};
use mhtrain_job::take_over::{GoesOn, NextAttempt, attempts_made, goes_on, last_start};
use mhtrain_probe::nvml::Gpus;
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use mhtrain_supervisor::attempt::Attempt;
use mhtrain_supervisor::process::descendants;
use mhtrain_supervisor::record::RecordError;
use mhtrain_swift::environment::TrainerEnvironment;

use super::companion::Companion;
use super::directory::JobDirectory;
use super::journal::{Journal, now};
use super::memory::{Waited, WatchedCard, pause};
use super::observations::Observer;
use super::origin::Origin;
use super::prepare::{Prepared, chain};
use super::screen::Screen;
use super::signals::{StopCause, StopSignals};
use crate::cli::output;
use crate::config::Config;
use crate::failure::{Failure, Status, own_unwritable};

/// Code of the failure of a job that would start an attempt on a card that it gave back.
pub const DEVICE_GIVEN_BACK: &str = "device_given_back";

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

    /// Tells and keeps a warning; each but once.
    fn warn(&mut self, warning: String) -> Result<(), Failure> {
        if self.receipt.warnings.contains(&warning) {
            return Ok(());
        }
        self.screen.say(format!("warning: {warning}"));
        self.receipt.warnings.push(warning.clone());
        self.journal.record(JobEvent::Warned { warning })
    }
}

/// Prints a verdict: the receipt for people, or as JSON.
///
/// # Errors
/// Standard output cannot be written.
pub fn show(verdict: &Verdict, as_json: bool) -> Result<(), Failure> {
    if as_json { output::json(&verdict.receipt) } else { output::line(render(&verdict.receipt)) }
}

/// Returns a process and everything that came from it.
pub fn family(pid: u32) -> Vec<u32> {
    let mut pids = vec![pid];
    pids.extend(descendants(pid).unwrap_or_default().iter().map(|process| process.pid));
    pids
}

fn no_record(error: RecordError) -> Failure {
    Failure::failed("no_record", chain(&error)).help(error.help())
}

/// Removes the cgroup of an attempt that is over. One that stays costs nothing but the look of it.
pub fn clean_up(attempt: &Attempt) {
    match attempt.clean_up() {
        Ok(true) => {}
        Ok(false) => tracing::debug!("the attempt's cgroup stays: somebody is in it"),
        Err(error) => tracing::debug!(error = chain(&error), "the attempt's cgroup stays"),
    }
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
