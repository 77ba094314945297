//! How does a job that has a device run?
//!
//! In a thread of its own, by the same loop as a foreground run. The thread may die with the daemon at any moment:
//! what it did is in the store, what it started needs nobody.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use mhtrain_failpoint::reach;
use mhtrain_job::diagnosis::Diagnosis;
use mhtrain_job::event::{Exit, JobEvent, Record};
use mhtrain_job::receipt::Receipt;
use mhtrain_job::spec::JobSpec;
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_job::take_over::needs_other_device;
use mhtrain_sizing::observation::Observation;
use mhtrain_store::{JobId, ObservationOf};
use mhtrain_supervisor::attempt::{Attempt, AttemptState};
use rustix::fs::Mode;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::live::{Followers, LiveJob};
use super::store::StoreSink;
use super::{Account, Daemon, HandedIn, QueuedEntry, Submission};
use crate::engine::directory::{JobDirectory, receipt_id};
use crate::engine::examine::Sized;
use crate::engine::journal::{Journal, now};
use crate::engine::local::{self, LocalRun, OldAttempt, clean_up};
use crate::engine::observations::Observer;
use crate::engine::prepare::{self, chain};
use crate::engine::screen::Screen;
use crate::engine::signals::StopSignals;
use crate::failure::{Failure, Status};

/// The time until a job is taken up again after something outside of it went wrong.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// The time until it is tried again to end a job that could not be ended: something is very wrong then.
const TRY_TO_END_AGAIN: Duration = Duration::from_secs(30);

/// How often that is done for a job that has begun, before it fails: two minutes, for a disk that is mounted again or is given
/// room.
const TRIES_MAX: u32 = 24;

/// How often it is done after a bug of ours, for a job that has not begun.
const TRIES_AFTER_A_BUG_MAX: u32 = 3;

/// Starts the thread of a job. When it is over, `daemon` is woken and the job is no longer among the live ones.
pub fn start(daemon: &Arc<Daemon>, id: JobId, handed_in: HandedIn, sized: Sized) {
    let HandedIn { spec, submission, account } = handed_in;
    let live = Arc::new(LiveJob::new(id, spec.output_dir.clone(), &sized, daemon.store.clone()));
    daemon.live().insert(id, Arc::clone(&live));
    let worker = Worker { daemon: Arc::clone(daemon), id, spec, submission, account, sized, live };
    start_thread(Arc::new(worker));
}

/// Starts the thread of a job, now or as soon as there can be one. The card is the job's meanwhile.
fn start_thread(worker: Arc<Worker>) {
    let own = Arc::clone(&worker);
    let started = std::thread::Builder::new().name(format!("job-{}", worker.id)).spawn(move || {
        let _over = Over { daemon: Arc::clone(&own.daemon), id: own.id, live: Arc::clone(&own.live) };
        own.run();
    });
    if let Err(error) = started {
        tracing::error!(job = worker.id.get(), %error, "no thread for the job; it is tried again");
        tokio::spawn(async move {
            tokio::time::sleep(TRY_AGAIN).await;
            start_thread(worker);
        });
    }
}

/// Takes a job off the live ones when its thread ends, however that comes.
struct Over {
    daemon: Arc<Daemon>,
    id: JobId,
    live: Arc<LiveJob>,
}

impl Drop for Over {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let what = "the thread of the job has panicked: a bug; the next daemon goes on with it";
            tracing::error!(job = self.id.get(), what);
        }
        let mut live = self.daemon.live();
        // A job that left its card may have the next one already.
        if live.get(&self.id).is_some_and(|now| Arc::ptr_eq(now, &self.live)) {
            live.remove(&self.id);
        }
        drop(live);
        self.daemon.store.tell();
        self.daemon.wake();
    }
}

struct Worker {
    daemon: Arc<Daemon>,
    id: JobId,
    spec: JobSpec,
    submission: Submission,
    account: Arc<Account>,
    sized: Sized,
    live: Arc<LiveJob>,
}

/// What becomes of a job after something outside of it went wrong.
enum After {
    Over,
    TryAgain,
}

impl Worker {
    /// Runs the job to its end, over everything that goes wrong outside of it. A bug must not cost the lease: a trainer may be
    /// there.
    fn run(&self) {
        let mut has_rights = false;
        // What was said last: each trouble is told once, however often it is tried again.
        let (mut trouble, mut worse) = (String::new(), String::new());
        for tries in 1.. {
            let done = guarded(|| {
                if !has_rights {
                    become_submitter(&self.account, self.submission.umask)?;
                    has_rights = true;
                }
                self.attempt_to_run()
            });
            let Err(failure) = done else { return };
            if trouble != failure.message {
                trouble.clone_from(&failure.message);
                tracing::error!(job = self.id.get(), error = trouble, "the job cannot be followed");
                self.live.say(&format!("{trouble}; it is tried again"));
            }
            let rest = match guarded(|| self.after(&failure, tries, has_rights)) {
                Ok(After::Over) => return,
                Ok(After::TryAgain) => TRY_AGAIN,
                Err(failure) => {
                    // Its card stays leased: a trainer may still be there.
                    if worse != failure.message {
                        worse.clone_from(&failure.message);
                        tracing::error!(job = self.id.get(), error = worse, "the job cannot be ended");
                    }
                    TRY_TO_END_AGAIN
                }
            };
            std::thread::sleep(rest);
        }
    }

    fn records(&self) -> Result<Vec<Record>, Failure> {
        let id = self.id;
        self.daemon.store.call_blocking(move |store| store.brief_events(id))
    }

    fn attempt_to_run(&self) -> Result<(), Failure> {
        // Before the events are read: a request that comes later is heard, one that came earlier is among them.
        let requests = self.live.listen();
        let config = &self.daemon.config;
        let origin = self.submission.origin(&self.account, config);
        let records = self.records()?;
        // A pass before this one may have failed on the job's way to another card.
        self.daemon.queued().remove(&self.id);
        if needs_other_device(&records) {
            return self.leave_device(&Receipt::from_events(Some(self.id.get()), &records));
        }
        let own = self.daemon.make_job_dir(self.id, &self.account)?;
        let directory = JobDirectory::open_beside(&prepare::output_dir(&self.spec, &origin), own)?;
        let begun = records.iter().any(|record| matches!(record.event, JobEvent::AttemptStarting(_)));
        if !begun {
            self.make_room(&directory)?;
        }
        let earlier = self.earlier_attempts(&directory)?;
        let sink = StoreSink { store: self.daemon.store.clone(), id: self.id };
        let journal = Journal::go_on(records, Box::new(sink))?;
        if journal.state().is_final() {
            return Ok(());
        }
        let probe = self.sized.probe().clone();
        let (prepared, environment) = self.sized.clone().prepared(self.spec.clone(), &origin);
        let run = LocalRun {
            prepared,
            environment,
            probe,
            directory,
            gpus: self.daemon.gpus.clone(),
            id: Some(self.id.get()),
            journal: Some(journal),
            other_device: self.submission.device_uuid.is_none(),
            earlier,
            origin,
            screen: Screen::told_to(Followers {
                live: Arc::clone(&self.live),
                daemon: Arc::clone(&self.daemon),
            }),
            observer: Some(Box::new(StoreObserver {
                daemon: Arc::clone(&self.daemon),
                id: self.id,
                owner_uid: self.account.uid,
            })),
        };
        let verdict = local::run_until(run, config, || Ok(StopSignals::Requests(requests)))?;
        if verdict.status.is_none() {
            self.leave_device(&verdict.receipt)?;
        }
        Ok(())
    }

    /// Marks the card that failed, and puts the job back into the queue.
    fn leave_device(&self, receipt: &Receipt) -> Result<(), Failure> {
        let id = self.id;
        let state = self.daemon.store.call_blocking(move |store| store.state(id))?;
        if state.is_final() {
            return Ok(());
        }
        if let Some(uuid) = self.sized.device() {
            let line = receipt.attempts.last().and_then(|note| note.diagnosis.as_ref());
            let line = line.map_or("", |diagnosis| diagnosis.evidence.line.trim());
            let why = format!("it failed under job {} at {}: {line}", self.id, now());
            tracing::error!(job = self.id.get(), device = uuid, why, "nothing more starts on the card");
            reach("device.before_mark", "");
            self.daemon.mark_failed(uuid, &why)?;
            reach("device.after_mark", "");
        }
        let handed_in = HandedIn {
            spec: self.spec.clone(),
            submission: self.submission.clone(),
            account: Arc::clone(&self.account),
        };
        // Into the queue first: somebody who cancels it finds it in one place or the other. Its own lease keeps it there
        // until this thread is over.
        // Its time goes on.
        let entry = QueuedEntry::new(handed_in, None).with_time(&self.records()?);
        self.daemon.queued().insert(self.id, entry);
        self.end_if_stopped()
    }

    /// Ends the job if that was asked for since its loop listened last.
    fn end_if_stopped(&self) -> Result<(), Failure> {
        let id = self.id;
        let state = self.daemon.store.call_blocking(move |store| store.state(id))?;
        if let Some(by) = state.stop().filter(|_| !state.is_final()) {
            self.append(stop::end(by, self.spec.time_limit))?;
            self.daemon.over_unfollowed(self.id);
        }
        Ok(())
    }

    /// Sets what an earlier job left in the output directory aside.
    fn make_room(&self, directory: &JobDirectory) -> Result<(), Failure> {
        if directory.holds_a_job() {
            let aside = directory.set_earlier_job_aside()?;
            self.live.say(&format!("what an earlier job left was moved to {}", aside.display()));
        }
        Ok(())
    }

    /// Returns the attempts that may be resumed beside the job's own, oldest first: those of the jobs that this one goes on
    /// with.
    fn earlier_attempts(&self, directory: &JobDirectory) -> Result<Vec<OldAttempt>, Failure> {
        let asides = directory.asides();
        let mut attempts = Vec::new();
        let mut next = self.submission.retry_of.and_then(JobId::new);
        // The job that this one goes on with may itself have gone on with another.
        while let Some(id) = next {
            let read =
                self.daemon.store.call_blocking(move |store| Ok((store.job(id)?, store.brief_events(id)?)));
            let (job, records) = match read {
                Ok(read) => read,
                Err(failure) if failure.status == Status::NotFound => break,
                Err(failure) => return Err(failure),
            };
            for aside in asides.iter().filter(|aside| receipt_id(aside) == Some(id.get())) {
                let old = |attempt| aside.join(format!("attempt-{attempt}"));
                attempts.splice(0..0, OldAttempt::all_of(&records, old));
            }
            let submission: Option<Submission> = serde_json::from_value(job.context).ok();
            // An earlier job has the smaller number: so this ends.
            next = submission.and_then(|it| JobId::new(it.retry_of?)).filter(|earlier| *earlier < id);
        }
        Ok(attempts)
    }

    /// Decides what becomes of the job. One that has begun is taken up again, within a bound: what is in the way may pass. After
    /// that, or when somebody asked for the end, it is ended; but a trainer that runs does not notice, and is not ended for it.
    ///
    /// Without `has_rights` its owner's files are not touched: a trainer that may run is left, and waited for.
    fn after(&self, failure: &Failure, tries: u32, has_rights: bool) -> Result<After, Failure> {
        let records = self.records()?;
        let state = JobState::fold(records.iter().map(|record| &record.event))
            .map_err(|e| Failure::new(Status::Bug, "bug", e))?;
        if state.is_final() {
            self.daemon.queued().remove(&self.id);
            return Ok(After::Over);
        }
        let has_begun = records.iter().any(|record| matches!(record.event, JobEvent::AttemptStarting(_)));
        if failure.is_own_unwritable() && !has_begun && state.stop().is_none() {
            // As a rerun waits whose record cannot be made: for as long as it takes.
            if state.reason().as_ref() != Some(&failure.message) {
                self.append(JobEvent::Waiting { reason: failure.message.clone() })?;
            }
            return Ok(After::TryAgain);
        }
        let tries_max = match (has_begun, failure.status) {
            (true, _) => TRIES_MAX,
            // Somebody else has the output directory: for a moment, when it is the receipt of the job before.
            (false, _) if failure.code == "busy" => TRIES_MAX,
            (false, Status::Bug) => TRIES_AFTER_A_BUG_MAX,
            (false, _) => 0,
        };
        // What is left of a job that has succeeded waits for the disk, and keeps nobody from a card.
        let is_proven = self.live.gave_device_back() && failure.code != local::DEVICE_GIVEN_BACK;
        let goes_on = || tries < tries_max || is_proven || self.trains(&state);
        if (state.stop().is_none() && goes_on()) || (state.has_live_attempt() && !has_rights) {
            return Ok(After::TryAgain);
        }
        if let JobState::Starting { attempt, .. } | JobState::Running { attempt, .. } = &state {
            self.end_attempt(attempt.number)?;
        }
        self.append(match state.stop() {
            Some(by) => stop::end(by, self.spec.time_limit),
            None => JobEvent::Failed { reason: failure.message.clone(), help: failure.help.clone() },
        })?;
        // It may have been on its way to another card.
        self.daemon.over_unfollowed(self.id);
        Ok(After::Over)
    }

    /// Returns whether a trainer of the job is alive, by its record.
    fn trains(&self, state: &JobState) -> bool {
        let (JobState::Starting { attempt, .. } | JobState::Running { attempt, .. }) = state else {
            return false;
        };
        let record = self.daemon.job_dir(self.id).join(format!("attempt-{}", attempt.number));
        let found = Attempt::open_of(&record, self.account.identity().as_ref()).and_then(|it| it.state());
        match found {
            Ok(AttemptState::Running { trainer }) => trainer.identity.is_alive(),
            Ok(AttemptState::Lost { trainer_alive }) => trainer_alive,
            Ok(AttemptState::Starting | AttemptState::Exited(_)) | Err(_) => false,
        }
    }

    /// Ends everything of an attempt by its record alone, which lies beside the store and not in the output directory.
    fn end_attempt(&self, number: u32) -> Result<(), Failure> {
        let record = self.daemon.job_dir(self.id).join(format!("attempt-{number}"));
        match Attempt::open_of(&record, self.account.identity().as_ref()) {
            Ok(attempt) => {
                let stop = |e: &mhtrain_supervisor::attempt::StopError| {
                    Failure::failed("cannot_stop", chain(e)).help(e.help())
                };
                attempt.kill_everything().map_err(|e| stop(&e))?;
                clean_up(&attempt);
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(Failure::failed("no_record", chain(&error)).help(error.help())),
        }
        self.append(JobEvent::AttemptEnded {
            attempt: number,
            exit: Exit::Lost,
            diagnosis: Box::new(Diagnosis::interrupted()),
            last_step: None,
        })
    }

    fn append(&self, event: JobEvent) -> Result<(), Failure> {
        let (id, record) = (self.id, Record::new(now(), event));
        self.daemon.store.call_blocking(move |store| store.append(id, &record))?;
        self.daemon.store.tell();
        Ok(())
    }
}

/// Does something, and turns a panic into a failure.
fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Failure::new(Status::Bug, "panicked", format!("a bug of mhtraind: {}", words_of(&*panic))))
    })
}

/// Returns what a panic said.
fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a word")
}

/// Keeps what a job's attempts show, for the predictions of the next ones.
#[derive(Debug)]
struct StoreObserver {
    daemon: Arc<Daemon>,
    id: JobId,
    owner_uid: u32,
}

impl Observer for StoreObserver {
    fn observe(&self, attempt: u32, observation: Observation) {
        let noted = ObservationOf { owner_uid: self.owner_uid, observation };
        self.daemon.observations.add(noted.clone());
        self.daemon.store.note_observation(self.id, attempt, noted);
    }
}

/// Lets this thread and those that it starts touch files as the submitter, for good.
///
/// # Errors
/// The kernel refuses.
pub fn become_submitter(account: &Account, umask: u32) -> Result<(), Failure> {
    if let Some(identity) = account.identity() {
        let refused =
            |e| Failure::failed("no_rights", format!("the rights of {} cannot be taken: {e}", account.name));
        identity.take_file_rights().map_err(refused)?;
    }
    take_umask(umask);
    Ok(())
}

/// Gives this thread the submitter's umask: what it makes in the output directory is as if the submitter had made it.
fn take_umask(umask: u32) {
    // SAFETY: CLONE_FS gives the calling thread its own copy of umask, root and working directory (unshare(2)) and touches
    // neither memory nor descriptors. Nothing here relies on threads sharing a umask.
    match unsafe { unshare_unsafe(UnshareFlags::FS) } {
        Ok(()) => {
            rustix::process::umask(Mode::from_raw_mode(umask));
        }
        // Some sandboxes forbid it. The daemon's own umask must not change for all threads.
        Err(error) => tracing::debug!(%error, "the submitter's umask holds for the trainer alone"),
    }
}
