//! How is an attempt followed from its start until all its processes are gone?

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use mhtrain_failpoint::reach;
use mhtrain_job::event::{AttemptStart, Exit, JobEvent, ProcessIdentity};
use mhtrain_job::rerun::{Adjustment, ExpandableSegments};
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_supervisor::Arrivals;
use mhtrain_supervisor::attempt::{Attempt, AttemptState, StopError};
use mhtrain_supervisor::record::{Ended as TrainerEnd, ExitRecord};
use mhtrain_swift::diagnosis::ExitFacts;
use mhtrain_swift::stall::Stall;
use mhtrain_swift::verdict::EndedByUs;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::start::own_exe;
use super::{Job, family};
use crate::engine::companion;
use crate::engine::follow::Follower;
use crate::engine::journal::time_used;
use crate::engine::prepare::chain;
use crate::engine::screen::Screen;
use crate::engine::signals::StopCause;
use crate::engine::stall::{LifeSigns, StallRule, Still, stacks};
use crate::failure::{Failure, unreadable};

/// How often a running attempt is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often the recorder of one attempt is replaced. It dies of `kill -9` alone, so more is somebody's intention.
const TAKE_OVERS_MAX: u32 = 20;

/// How often NVML is asked about a running attempt.
const MEMORY_EVERY: Duration = Duration::from_secs(1);

/// An attempt whose processes are all gone.
#[derive(Debug)]
pub(super) struct Gone {
    pub(super) start: AttemptStart,
    pub(super) exit: Exit,
    pub(super) facts: ExitFacts,
    pub(super) follower: Follower,
    pub(super) pids: Vec<u32>,
    pub(super) ended: Option<EndedByUs>,
    /// Why its trainer was not started, where that was the disk, which did not take its record.
    pub(super) refused: Option<String>,
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

impl Job<'_> {
    /// Follows an attempt until everything that it started is gone.
    pub(super) async fn follow(&mut self, start: AttemptStart, attempt: &Attempt) -> Result<Gone, Failure> {
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

    pub(super) fn gone(
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
    pub(super) fn set_deadline(&mut self) {
        if self.deadline.is_none() {
            let left = time_used(self.journal.records())
                .and_then(|used| stop::time_left(self.prepared.spec.time_limit, used));
            self.deadline = left.map(|left| Instant::now() + left);
        }
    }

    pub(super) fn grace(&self) -> Duration {
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

/// Waits for a moment; for ever where there is none.
pub(super) async fn until(moment: Option<Instant>) {
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

fn kill_everything(attempt: &Attempt) -> Result<(), Failure> {
    attempt.kill_everything().map(drop).map_err(|e| Failure::failed("cannot_stop", chain(&e)).help(e.help()))
}
