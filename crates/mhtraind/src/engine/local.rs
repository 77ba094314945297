//! How does one job run on this host, from its plan to its receipt?
//!
//! ```text
//!          +--> wait (memory, back-off) --> launch --> follow --> judge --+--> proven: final, receipt
//!          |                                                              +--> given up, cancelled: receipt
//!          +------------------------ rerun <------------------------------+
//! ```
//!
//! Decisions are made elsewhere (`rerun::decide`, `choose_resume`, `prove`); this is the loop that carries them out.
//! Each intention is in the journal before its effect, so a process that comes after us knows what may be out there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mhtrain_job::diagnosis::{Answer, Diagnosis, Kind};
use mhtrain_job::event::{AttemptStart, Exit, JobEvent, ProcessIdentity, Record, Resume, ResumeKind};
use mhtrain_job::receipt::{AttemptNote, ProofFacts, ProofKind, Receipt, render};
use mhtrain_job::rerun::{
    Adjustment, Decision, ExpandableSegments, History, Policy, Rerun, ResumeWish, Wait, decide,
};
use mhtrain_job::state::JobState;
use mhtrain_probe::nvml::Gpus;
use mhtrain_sizing::observation::Seen;
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use mhtrain_supervisor::Arrivals;
use mhtrain_supervisor::attempt::{Attempt, AttemptState, LaunchSpec};
use mhtrain_supervisor::process::descendants;
use mhtrain_supervisor::record::{Ended as TrainerEnd, ExitRecord, Extent, RecordError};
use mhtrain_swift::checkpoint::{CheckpointFacts, ResumeDecision, ResumeQuestion, choose_resume};
use mhtrain_swift::command::{AttemptFlags, TrainerStart, exact_command};
use mhtrain_swift::diagnosis::ExitFacts;
use mhtrain_swift::environment::TrainerEnvironment;
use mhtrain_swift::proof::{self, ExitStatus, PlannedSteps, ProofInput, Unproven, prove};
use mhtrain_swift::stall::{self, Stall};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::companion::{self, Companion};
use super::directory::{JobDirectory, Lasting};
use super::follow::Follower;
use super::journal::{Journal, now};
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
use crate::failure::{Failure, Status, unreadable, unwritable};

/// How often a running attempt is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often the recorder of one attempt is replaced. It dies of `kill -9` alone, so more is somebody's intention.
const TAKE_OVERS_MAX: u32 = 20;

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
    /// Id of the job; `None` in the foreground.
    pub id: Option<u64>,
    /// An earlier process's journal of this very job that is to be continued.
    pub journal: Option<Journal>,
    /// Whether somebody gives the job another card when this one fails.
    pub other_device: bool,
    /// Attempts of a job that ended earlier, whose checkpoints may be resumed, with the rung of each.
    pub earlier: Vec<(PathBuf, Tier)>,
    /// Whose environment and directory the trainer gets.
    pub origin: Origin,
    /// Who is told.
    pub screen: Screen,
    /// Who keeps what attempts show about memory; `None`: nobody.
    pub observer: Option<Box<dyn Observer>>,
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
    /// The pids of the attempt before, whose memory must come back first.
    after: Vec<u32>,
}

/// From where an attempt goes on, and the checkpoint that its trainer is shown.
type Beginning = (Option<Resume>, Option<PathBuf>);

/// What the loop does next.
#[derive(Debug)]
enum Step {
    Start(Next),
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
    /// It hung, and we ended it.
    stall: Option<Stall>,
}

/// Why an attempt did not come up.
#[derive(Debug)]
enum Unlaunched {
    /// Somebody killed its recorder: another attempt can be made.
    Killed(String),
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
    earlier: Vec<(PathBuf, Tier)>,
    corrupt_steps: BTreeSet<u64>,
    /// Last step whose loss was a number; checkpoints after it are not trusted after a divergence.
    last_good_step: Option<u64>,
}

impl<'a> Job<'a> {
    fn new(run: LocalRun, config: &'a Config, signals: StopSignals) -> Result<Job<'a>, Failure> {
        let LocalRun {
            prepared,
            environment,
            probe,
            directory,
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
        directory.write_private("job.json", &pretty)?;
        let mut policy = Policy::for_job(
            spec,
            expandable_segments(&prepared),
            prepared.advice.per_device_eval_batch_size,
            prepared.advice.dataloader_num_workers,
        )
        .map_err(|e| Failure::bad_input(e.code(), &e).help(e.help()))?;
        policy.other_device = other_device;
        policy.memory_wait_s = u64::from(config.attempt.neighbour_wait_min) * 60;
        policy.network_backoff_s = u64::from(config.attempt.network_backoff_s);
        let card =
            WatchedCard::new(Gpus::new(config.nvml_library().as_deref()), prepared.candidate.uuid.clone());
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
            corrupt_steps: BTreeSet::new(),
            last_good_step: None,
            prepared,
        })
    }

    /// Returns where an earlier process left the job, or its beginning.
    fn first_step(&mut self) -> Result<Step, Failure> {
        let begun = self.journal.records().len() > 1;
        let chosen = self.prepared.plan.chosen;
        if !begun {
            self.record_plan()?;
            let wish = ResumeWish::Latest;
            return Ok(Step::Start(Next {
                rung: chosen,
                adjustments: Vec::new(),
                wish,
                wait: Wait::None,
                after: Vec::new(),
            }));
        }
        self.receipt.attempts = Receipt::from_events(None, self.journal.records()).attempts;
        // An end that nobody judged may be a success: a stop that came too late takes it from nobody.
        let unjudged = matches!(self.journal.state(), JobState::Recovering { rerun: None, .. });
        if let Some(cause) = self.stop
            && !unjudged
            && !self.journal.state().has_live_attempt()
        {
            return self.cancelled(cause);
        }
        match self.journal.state().clone() {
            JobState::Starting { attempt, .. } | JobState::Running { attempt, .. } => {
                let start = self.last_start().filter(|start| start.attempt == attempt.number);
                let start =
                    start.ok_or_else(|| Failure::new(Status::Bug, "bug", "an attempt without its start"))?;
                let record = self.directory.record(attempt.number);
                match Attempt::open_of(&record, self.origin.identity.as_ref()) {
                    Ok(live) if live.abandon_unrecorded().map_err(no_record)? => self.never_started(&start),
                    Ok(live) => {
                        self.screen.say(format!("attempt {} is taken over", attempt.number));
                        if self.stop.is_some() {
                            let grace = Duration::from_secs(u64::from(self.config.attempt.grace_s));
                            // Without a recorder there is nobody to ask: following sees that and kills what is left.
                            let _nobody_to_ask = live.request_stop(grace);
                        }
                        Ok(Step::Adopt(start, live))
                    }
                    // The intention was recorded and nothing else: no recorder ever was.
                    Err(error) if error.is_not_found() => self.never_started(&start),
                    Err(error) => Err(no_record(error)),
                }
            }
            JobState::Recovering { rerun: None, .. } => self.judge_again(),
            JobState::Recovering { rerun: Some(_), .. }
            | JobState::Queued { .. }
            | JobState::Waiting { .. } => {
                let history = self.history();
                // On another card it was sized anew.
                let begins = self.last_start().is_none() || is_planned_anew(self.journal.records());
                let rung = if begins { chosen } else { self.rung_on_this_ladder(history.rung)? };
                let decided = self.journal.records().iter().rev().find_map(|record| match &record.event {
                    JobEvent::RerunDecided(rerun) => Some(rerun.clone()),
                    _ => None,
                });
                Ok(Step::Start(Next {
                    rung,
                    adjustments: history.adjustments,
                    wish: decided.as_ref().map_or(ResumeWish::Latest, |rerun| rerun.resume),
                    wait: decided.map_or(Wait::None, |rerun| rerun.wait),
                    after: Vec::new(),
                }))
            }
            JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled { .. } => {
                Err(Failure::new(Status::Bug, "bug", "a job that is over cannot be continued"))
            }
        }
    }

    /// Judges an attempt that ended when nobody was left to decide what follows: its files tell the same as then.
    fn judge_again(&mut self) -> Result<Step, Failure> {
        let ended = self.journal.records().iter().rev().find_map(|record| match &record.event {
            JobEvent::AttemptEnded { exit, diagnosis, .. } => {
                Some((exit.clone(), diagnosis.as_ref().clone()))
            }
            _ => None,
        });
        let (Some((exit, diagnosis)), Some(start)) = (ended, self.last_start()) else {
            return Err(Failure::new(Status::Bug, "bug", "an end without an attempt"));
        };
        let output_dir = self.directory.attempt(start.attempt);
        let mut follower = Follower::new(&self.output_of(start.attempt), &output_dir);
        follower.look_to_the_end().map_err(|e| unreadable(&self.output_of(start.attempt), &e))?;
        self.conclude(&start, &exit, &diagnosis, &follower, Vec::new())
    }

    fn never_started(&mut self, start: &AttemptStart) -> Result<Step, Failure> {
        let diagnosis = interrupted();
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
            after: Vec::new(),
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
        self.journal.records().iter().rev().find_map(|record| match &record.event {
            JobEvent::AttemptStarting(start) => Some(start.clone()),
            _ => None,
        })
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
                    self.save_receipt()?;
                    return Ok(Verdict { status: Some(status), receipt: self.receipt.clone() });
                }
                Step::OtherDevice => {
                    self.save_receipt()?;
                    return Ok(Verdict { status: None, receipt: self.receipt.clone() });
                }
                Step::Start(next) => match self.wait(&next).await? {
                    Some(over) => over,
                    None => match self.launch(&next)? {
                        Ok((start, attempt)) => Step::Adopt(start, attempt),
                        Err(over) => over,
                    },
                },
                Step::Adopt(start, attempt) => {
                    let gone = self.follow(start, &attempt).await?;
                    self.judge(gone)?
                }
            };
        }
    }

    /// Waits for what must pass before an attempt; returns a step when that ends the job.
    async fn wait(&mut self, next: &Next) -> Result<Option<Step>, Failure> {
        let ours = Duration::from_secs(u64::from(self.config.attempt.memory_return_s));
        if !next.after.is_empty()
            && let Waited::Stopped(cause) =
                self.card.wait_for_return(&next.after, ours, &mut self.signals).await
        {
            return self.cancelled(cause).map(Some);
        }
        let waited = match next.wait {
            Wait::None => Waited::Free,
            Wait::Seconds(seconds) => {
                self.waiting(format!("{seconds} s until the next try"))?;
                pause(Duration::from_secs(seconds), &mut self.signals).await
            }
            Wait::ForMemory { need, seconds_max } => {
                let holders = self.card.holders().join(", ");
                self.waiting(format!("{need} of device memory are needed; {holders}"))?;
                let limit = Duration::from_secs(seconds_max);
                self.card.wait_for(need, limit, &mut self.signals, &self.screen).await
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
            Ok(attempt) => {
                self.save_receipt()?;
                Ok(Ok((start, attempt)))
            }
            Err(Unlaunched::Killed(why)) => {
                self.screen.say(format!("attempt {number} was interrupted: {why}"));
                let diagnosis = interrupted();
                self.note_end(&Exit::Lost, &diagnosis, None);
                self.journal.record(JobEvent::AttemptEnded {
                    attempt: number,
                    exit: Exit::Lost,
                    diagnosis: Box::new(diagnosis.clone()),
                    last_step: None,
                })?;
                self.answer(&diagnosis, None, Vec::new()).map(Err)
            }
            Err(Unlaunched::Failed(failure)) => {
                let exit = Exit::SpawnFailed { error: failure.message.clone() };
                let diagnosis = Diagnosis { kind: Kind::Unknown, certain: true, ..interrupted() };
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
        let steps_done = self.history().steps_done;
        let restart = |lost: u64| {
            (steps_done > 0 || lost > 0).then_some(Resume {
                kind: ResumeKind::Restart,
                checkpoint: None,
                from_step: 0,
                steps_repeated: steps_done.max(lost),
            })
        };
        let (mut checkpoints, old) = self.saved(tier)?;
        match next.wish {
            ResumeWish::FromStart => return Ok(Ok((restart(0), None))),
            ResumeWish::LastGoodWeights => return Ok(Ok(self.last_good_weights(checkpoints, steps_done))),
            ResumeWish::Previous => {
                if let Some(resume) = self.last_start().and_then(|start| start.resume) {
                    self.corrupt_steps.insert(resume.from_step);
                }
            }
            ResumeWish::Latest => {}
        }
        let corrupt_steps = self.corrupt_steps.clone();
        let question = ResumeQuestion {
            old: &old,
            new: tier,
            restores_train_batch_size: self.prepared.dialect.restores_checkpoint_batch(),
            replays_first_epoch: self.replays_first_epoch(),
            steps_per_epoch: self.steps_per_epoch(tier),
            allow_restart: self.prepared.spec.allow.restart,
            corrupt_steps: &corrupt_steps,
        };
        let mut decision = choose_resume(&checkpoints, &question);
        // A checkpoint of the last step cannot be resumed: nothing would be trained and nothing proven. The end is
        // trained again from the one before it.
        while let ResumeDecision::Finished { step, .. } = decision {
            checkpoints.retain(|checkpoint| checkpoint.step < step);
            decision = choose_resume(&checkpoints, &question);
        }
        match decision {
            ResumeDecision::Exact { checkpoint, step, repair, passed_over, .. } => {
                for passed in &passed_over {
                    self.warn(format!("{} is not resumed: {}", passed.path.display(), passed.why));
                }
                let shown = match repair {
                    None => checkpoint.clone(),
                    Some(state) => {
                        let parent = self
                            .directory
                            .private()
                            .join(format!("resume-{}", self.receipt.attempts.len() + 1));
                        repaired_view(&checkpoint, &state, &parent).map_err(|e| unwritable(&parent, &e))?
                    }
                };
                let resume = Resume {
                    kind: ResumeKind::Exact,
                    checkpoint: Some(checkpoint.display().to_string()),
                    from_step: step,
                    steps_repeated: steps_done.saturating_sub(step),
                };
                Ok(Ok((Some(resume), Some(shown))))
            }
            ResumeDecision::Restart { why, lost_steps } => {
                let resume = restart(lost_steps);
                if resume.is_some() {
                    self.warn(format!("training starts again: {why}"));
                }
                Ok(Ok((resume, None)))
            }
            ref refused @ ResumeDecision::Refuse { ref why, .. } => {
                self.failed(why.to_string(), refused.help()).map(Err)
            }
            ResumeDecision::Finished { .. } => unreachable!("finished checkpoints were taken out above"),
        }
    }

    /// Returns the newest checkpoint from before the loss went bad, for its weights alone.
    fn last_good_weights(&self, mut checkpoints: Vec<CheckpointFacts>, steps_done: u64) -> Beginning {
        let good_until = self.last_good_step.unwrap_or(0);
        checkpoints.retain(|checkpoint| checkpoint.is_complete() && checkpoint.step <= good_until);
        checkpoints.sort_by_key(|checkpoint| checkpoint.step);
        match checkpoints.pop() {
            Some(checkpoint) => {
                let resume = Resume {
                    kind: ResumeKind::WeightsOnly,
                    checkpoint: Some(checkpoint.path.display().to_string()),
                    from_step: checkpoint.step,
                    steps_repeated: steps_done.saturating_sub(checkpoint.step),
                };
                (Some(resume), Some(checkpoint.path))
            }
            None => {
                let resume = Resume {
                    kind: ResumeKind::Restart,
                    checkpoint: None,
                    from_step: 0,
                    steps_repeated: steps_done,
                };
                (Some(resume), None)
            }
        }
    }

    /// Returns the checkpoints that earlier attempts left, and the rung that wrote them. Those of attempts that
    /// trained other rows are only returned when there are no others: then they say why nothing can be resumed.
    fn saved(&self, tier: &Tier) -> Result<(Vec<CheckpointFacts>, Tier), Failure> {
        let mut sources = self.earlier.clone();
        sources.extend(
            self.receipt
                .attempts
                .iter()
                .map(|note| (self.directory.attempt(note.attempt), note.tier.clone())),
        );
        let (mut same, mut other, mut other_tier) = (Vec::new(), Vec::new(), None);
        for (path, old) in sources {
            let found = checkpoints_in(&path).map_err(|e| unreadable(&path, &e))?;
            if old.trains_the_same_as(tier) {
                same.extend(found);
            } else if !found.is_empty() {
                other = found;
                other_tier = Some(old);
            }
        }
        Ok(match (same.is_empty(), other_tier) {
            (true, Some(old)) => (other, old),
            _ => (same, tier.clone()),
        })
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
        if let Some(index) = self.card.index() {
            self.prepared.candidate.card.index = Some(index);
        }
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
        Attempt::launch(&own_exe()?, &record, &spec, &env).map_err(|error| match error.is_recorder_killed() {
            true => Unlaunched::Killed(chain(&error)),
            false => Failure::failed("cannot_start", chain(&error)).help(error.help()).into(),
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
        let (mut signs, mut stall) = (LifeSigns::new(rule, Instant::now()), None);
        let mut memory_at: Option<Instant> = None;
        let arrivals = attempt.arrivals().and_then(awaitable);
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        if self.deadline.is_none() {
            let used = self.time_used();
            let left = self.prepared.spec.time_limit.map(|limit| limit.saturating_sub(used));
            self.deadline = left.map(|left| Instant::now() + left);
        }
        self.screen.start_bar(start.attempt);
        loop {
            let asked = tokio::select! {
                cause = self.signals.next() => Some(cause),
                _ = look.tick() => None,
                () = arrival(arrivals.as_ref()) => None,
            };
            let late = self.deadline.is_some_and(|at| Instant::now() >= at) && self.stop.is_none();
            if let Some(cause) = asked.or(late.then_some(StopCause::TimeLimit)) {
                self.stop_attempt(cause, attempt)?;
            }
            follower.look().map_err(|e| unreadable(&self.output_of(start.attempt), &e))?;
            let state =
                attempt.state().map_err(|e| Failure::failed("no_record", chain(&e)).help(e.help()))?;
            self.note_started(&start, &state)?;
            match state {
                AttemptState::Starting => {}
                AttemptState::Running { trainer } => {
                    if memory_at.is_none_or(|at| at.elapsed() >= MEMORY_EVERY) {
                        pids = self.theirs(family(trainer.identity.pid));
                        follower.saw_memory(self.card.used_by(&pids));
                        memory_at = Some(Instant::now());
                        let (step, printed) = (follower.glance(None).step, follower.printed_bytes());
                        let still = signs.look(Instant::now(), step, printed, self.card.is_busy());
                        if let Some(still) = still.filter(|_| stall.is_none() && self.stop.is_none()) {
                            stall = Some(self.end_stalled(&start, attempt, still, step, &pids));
                        }
                    }
                    self.screen.glance(&follower.glance(Some(self.prepared.candidate.card.total)));
                }
                AttemptState::Exited(end) => {
                    if end.leftovers_killed.is_none() {
                        kill_everything(attempt)?;
                    }
                    // An empty cgroup that stays costs nothing but the look of it.
                    if let Err(error) = attempt.clean_up() {
                        tracing::debug!(error = chain(&error), "the attempt's cgroup stays");
                    }
                    return self.gone(start, follower, pids, Some(&end), stall);
                }
                AttemptState::Lost { .. } if take_overs < TAKE_OVERS_MAX => {
                    take_overs += 1;
                    self.screen
                        .say("the recorder is gone: another one takes its place, the exit status is lost");
                    if let Err(error) = attempt.take_over(&own_exe()?, self.origin.identity.as_ref()) {
                        self.screen.say(format!("no other recorder comes up: {}", chain(&error)));
                    }
                }
                AttemptState::Lost { .. } => {
                    kill_everything(attempt)?;
                    return self.gone(start, follower, pids, None, stall);
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
        stall: Option<Stall>,
    ) -> Result<Gone, Failure> {
        follower.look_to_the_end().map_err(|e| unreadable(&self.output_of(start.attempt), &e))?;
        self.screen.glance(&follower.glance(Some(self.prepared.candidate.card.total)));
        self.screen.end_bar();
        companion::clean_up(&self.directory.attempt(start.attempt));
        if follower.telemetry.stopped_at().is_some() {
            self.stop = self.stop.or(Some(StopCause::StopFile));
        }
        let exit = match end.map(|end| &end.ended) {
            Some(TrainerEnd::Code(code)) => Exit::Code { code: *code },
            Some(TrainerEnd::Signal(signal)) => Exit::Signal { signal: *signal },
            Some(TrainerEnd::NotStarted(error)) => Exit::SpawnFailed { error: error.clone() },
            Some(TrainerEnd::StatusLost) | None => Exit::Lost,
        };
        let facts = ExitFacts {
            code: if let Exit::Code { code } = exit { Some(code) } else { None },
            signal: if let Exit::Signal { signal } = exit { Some(signal) } else { None },
            oom_kill: end.and_then(|end| end.oom_kill),
            we_stopped_it: self.stop.is_some() || stall.is_some(),
            expandable_segments: Some(
                self.policy.expandable_segments != ExpandableSegments::Off
                    || start.adjustments.contains(&Adjustment::ExpandableSegments),
            ),
            full_log: end.filter(|end| end.log_full).map(|_| self.output_of(start.attempt)),
        };
        Ok(Gone { start, exit, facts, follower, pids, stall })
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

    /// Returns the time since the job's first attempt was started, by the clock on the wall: a process before us may
    /// have started it.
    fn time_used(&self) -> Duration {
        let first =
            self.journal.records().iter().find(|record| matches!(record.event, JobEvent::AttemptStarting(_)));
        let began = first.and_then(|record| record.at.parse::<jiff::Timestamp>().ok());
        began
            .and_then(|began| Duration::try_from(jiff::Timestamp::now().duration_since(began)).ok())
            .unwrap_or_default()
    }

    /// Asks an attempt to end: politely the first time, at once the second time.
    fn stop_attempt(&mut self, cause: StopCause, attempt: &Attempt) -> Result<(), Failure> {
        let again = self.stop.is_some();
        let grace = if again { 0 } else { self.config.attempt.grace_s };
        if again {
            self.screen.say("stopping at once");
        } else {
            self.screen.say(format!("{cause}: stopping the trainer (within {grace} s; again: at once)"));
            // A cancel was recorded by whoever took it, before it was answered.
            if cause != StopCause::Cancel {
                self.journal.record(JobEvent::StopRequested { by: cause.to_string() })?;
            }
            self.stop = Some(cause);
        }
        // Without a recorder there is nobody to ask: the loop sees that and kills what is left.
        let _nobody_to_ask = attempt.request_stop(Duration::from_secs(u64::from(grace)));
        Ok(())
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

    /// Keeps the stacks of an attempt that hangs, and ends it.
    fn end_stalled(
        &self,
        start: &AttemptStart,
        attempt: &Attempt,
        still: Still,
        last_step: u64,
        pids: &[u32],
    ) -> Stall {
        let file = self.directory.record(start.attempt).join("stacks.txt");
        let (seconds, shown) = (still.since.as_secs(), file.display());
        self.screen.say(format!("no sign of life for {seconds} s: it is ended; its stacks are in {shown}"));
        let stacks = stacks(pids, &self.origin, &self.output_of(start.attempt), &file);
        // Without a recorder there is nobody to ask: the loop sees that and kills what is left.
        let _nobody_to_ask = attempt.request_stop(Duration::ZERO);
        Stall { still: still.since, step: still.step, last_step, stacks }
    }

    /// Decides what the end of an attempt means.
    fn judge(&mut self, gone: Gone) -> Result<Step, Failure> {
        let Gone { start, exit, facts, mut follower, pids, stall } = gone;
        let mut diagnosis = std::mem::take(&mut follower.diagnoser).finish(facts);
        if exit == Exit::Lost && names_no_cause(&diagnosis) && follower.log.end_of_training().is_none() {
            // It died with its recorder. To a reader of its output alone it may still be running, but it is gone.
            diagnosis = Diagnosis { evidence: diagnosis.evidence, ..interrupted() };
        }
        // A cause in its words comes first: one rank may have died of it while the others waited.
        if let Some(stall) = stall
            && matches!(diagnosis.kind, Kind::Interrupted | Kind::Unknown)
        {
            diagnosis = stall::diagnose(&stall);
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
        self.conclude(&start, &exit, &diagnosis, &follower, pids)
    }

    /// Lets later predictions learn from an attempt.
    fn observe(&self, start: &AttemptStart, diagnosis: &Diagnosis, follower: &Follower) {
        let Some(observer) = &self.observer else { return };
        let (seen, pace) = (observations::seen(follower, diagnosis), observations::pace(follower));
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
        pids: Vec<u32>,
    ) -> Result<Step, Failure> {
        if let Some(good) = follower.log.last_finite_step() {
            self.last_good_step = self.last_good_step.max(Some(good));
        }
        let proven = self.prove(start, exit, follower);
        self.warn_of_companion(start, follower);
        if diagnosis.kind != Kind::Diverged {
            if let Ok(proof) = proven {
                return self.succeeded(start, &proof, follower);
            }
            if let Some(cause) = self.stop {
                return self.cancelled(cause);
            }
        } else if let Some(cause) = self.stop {
            return self.cancelled(cause);
        }
        self.save_receipt()?;
        if let Exit::SpawnFailed { error } = exit {
            let reason = format!("the trainer could not be started: {error}");
            return self.failed(reason, Some("`mhtraind doctor` checks the trainer".to_owned()));
        }
        self.screen.say(format!("attempt {} ended: {}", start.attempt, diagnose::for_people(diagnosis)));
        self.answer(diagnosis, proven.err(), pids)
    }

    fn warn_of_companion(&mut self, start: &AttemptStart, follower: &Follower) {
        let steps = self.steps_per_epoch(&start.tier);
        for warning in self.companion.warnings(start, follower, &self.prepared.dialect, steps) {
            if !self.receipt.warnings.contains(&warning) {
                self.warn(warning);
            }
        }
    }

    fn answer(
        &mut self,
        diagnosis: &Diagnosis,
        unproven: Option<Unproven>,
        after: Vec<u32>,
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
                Ok(Step::Start(Next { rung, adjustments, wish, wait, after }))
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
        let chosen =
            best.filter(|_| wants_best).map(PathBuf::from).filter(|path| path.is_dir()).unwrap_or(last);
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

    fn cancelled(&mut self, cause: StopCause) -> Result<Step, Failure> {
        if cause == StopCause::TimeLimit {
            let limit = self.prepared.spec.time_limit.unwrap_or_default().as_secs();
            let help = "raise `time_limit` and start it again with --continue: it goes on";
            return self.failed(format!("its time limit of {limit} s is over"), Some(help.to_owned()));
        }
        self.journal.record(JobEvent::Cancelled { reason: cause.to_string() })?;
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

    fn warn(&mut self, warning: String) {
        self.screen.say(format!("warning: {warning}"));
        self.receipt.warnings.push(warning);
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
}

/// Returns whether a job waits for another card: it left one that failed, and was not sized for the next one yet.
pub fn needs_other_device(records: &[Record]) -> bool {
    let last = records.iter().rev().find(|record| {
        matches!(
            record.event,
            JobEvent::Planned { .. } | JobEvent::RerunDecided(_) | JobEvent::AttemptStarting(_)
        )
    });
    last.is_some_and(|record| matches!(&record.event, JobEvent::RerunDecided(rerun) if rerun.answer == Answer::OtherDevice))
}

/// Returns whether the job was sized for another card after it left one.
fn is_planned_anew(records: &[Record]) -> bool {
    let last = |wanted: fn(&JobEvent) -> bool| records.iter().rposition(|record| wanted(&record.event));
    let planned = last(|event| matches!(event, JobEvent::Planned { .. }));
    let decided = last(|event| matches!(event, JobEvent::RerunDecided(_)));
    let started = last(|event| matches!(event, JobEvent::AttemptStarting(_)));
    decided.is_some() && planned > decided && planned > started
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

/// Returns the rows of the train set after filtering and packing: as the companion counted them, else as the
/// trainer's own log tells them.
fn rows(follower: &Follower) -> Option<u64> {
    let counted = follower.telemetry.rows().or_else(|| follower.watch.train_rows());
    counted.or_else(|| follower.log.summary()?.train_rows)
}

/// Returns arrivals that a task can wait for; `None` where this runtime cannot.
fn awaitable(arrivals: Arrivals) -> Option<AsyncFd<Arrivals>> {
    // SAFETY: `Arrivals` owns one descriptor from its making until it is dropped, and `as_raw_fd` always returns that one.
    unsafe { AsyncFd::register_with_interest(arrivals, Interest::READABLE) }.ok()
}

/// Waits for a change of an attempt's state, where the kernel tells of one.
async fn arrival(arrivals: Option<&AsyncFd<Arrivals>>) {
    let Some(arrivals) = arrivals else { return std::future::pending().await };
    match arrivals.readable().await {
        Ok(mut ready) => {
            arrivals.get_ref().forget();
            ready.clear_ready();
        }
        // Then only the clock wakes us.
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

/// Returns a port that nobody listens on now.
fn free_port() -> Option<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).ok()?;
    Some(listener.local_addr().ok()?.port())
}

/// Returns whether a diagnosis knows of nothing that a trainer could have died of.
fn names_no_cause(diagnosis: &Diagnosis) -> bool {
    !diagnosis.fatal && matches!(diagnosis.kind, Kind::Unknown | Kind::Success)
}

/// Returns the diagnosis of an attempt that nobody saw end.
pub fn interrupted() -> Diagnosis {
    Diagnosis {
        kind: Kind::Interrupted,
        fatal: true,
        certain: false,
        phase: None,
        evidence: mhtrain_job::diagnosis::Evidence::default(),
        answer: mhtrain_job::diagnosis::Answer::Resume,
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
