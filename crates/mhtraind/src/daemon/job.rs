//! How does a job that has a device run?
//!
//! In a thread of its own, by the same loop as a foreground run. The thread may die with the daemon at any moment:
//! what it did is in the store, what it started needs nobody.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::spec::JobSpec;
use mhtrain_job::state::JobState;
use mhtrain_sizing::tier::Tier;
use mhtrain_store::{JobId, Sample};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

use super::store::{StoreHandle, StoreSink};
use super::{Account, Daemon};
use crate::api::types::Progress;
use crate::config::Config;
use crate::engine::directory::JobDirectory;
use crate::engine::examine::Sized;
use crate::engine::journal::{Journal, now};
use crate::engine::local::{self, LocalRun};
use crate::engine::origin::Origin;
use crate::engine::prepare;
use crate::engine::screen::{Audience, Glance, Screen};
use crate::engine::secrets::Sources;
use crate::engine::signals::{StopCause, StopSignals};
use crate::failure::{Failure, Status};

/// Sentences about a job that are kept for those who begin to follow it.
const SAID_MAX: usize = 200;

/// How often progress is kept.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// The time until a job is taken up again after something outside of it went wrong.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// What a submitter leaves behind, beside the job itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submission {
    /// Working directory.
    pub cwd: PathBuf,
    /// Variables that the trainer gets.
    pub env: std::collections::BTreeMap<String, String>,
    /// Umask.
    pub umask: u32,
    /// The wished card, as it was when the job came: its index can change.
    pub device_uuid: Option<String>,
    /// The job that this one goes on with.
    pub retry_of: Option<u64>,
}

impl Submission {
    /// Returns what the trainer of `account` gets.
    pub fn origin(&self, account: &Account, config: &Config) -> Origin {
        let mut env = account.base_environment();
        env.extend(self.env.iter().map(|(name, value)| (name.into(), value.into())));
        let env_file = match config.secrets.env_file.as_str() {
            "" => account.home.join(".config/mhtraind/secrets.env"),
            path => PathBuf::from(path),
        };
        Origin {
            cwd: self.cwd.clone(),
            env,
            umask: Some(self.umask),
            secrets: Sources {
                credentials: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
                env_file: Some(env_file),
                own_environment: false,
            },
            cache: Some(account.home.join(".cache/mhtraind")),
        }
    }
}

/// A job that has a device.
#[derive(Debug)]
pub struct LiveJob {
    /// Its id.
    pub id: u64,
    /// UUID of its device.
    pub device_uuid: Option<String>,
    /// Its device for people.
    pub device: String,
    /// Where everything of it goes.
    pub output_dir: String,
    stop: Mutex<mpsc::UnboundedSender<StopCause>>,
    told: Mutex<Told>,
    store: StoreHandle,
}

/// What the job's thread told.
#[derive(Debug, Default)]
struct Told {
    progress: Option<Progress>,
    said: VecDeque<(u64, String)>,
    said_count: u64,
    attempt: u32,
    sampled_at: Option<Instant>,
}

impl LiveJob {
    /// Asks the job to end: politely, and at once the second time.
    pub fn stop(&self) {
        // A thread that is gone needs no stop; one that begins again finds the request in the store.
        let _over = self.stop.lock().unwrap_or_else(PoisonError::into_inner).send(StopCause::Cancel);
    }

    /// Returns where this try of the job's thread hears stop requests.
    fn listen(&self) -> mpsc::UnboundedReceiver<StopCause> {
        let (stop, requests) = mpsc::unbounded_channel();
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = stop;
        requests
    }

    /// Returns how far the running attempt is.
    pub fn progress(&self) -> Option<Progress> {
        self.told().progress.clone()
    }

    /// Returns the sentences after the first `seen`, and how many there were in all.
    pub fn said_since(&self, seen: u64) -> (Vec<String>, u64) {
        let told = self.told();
        let new = told.said.iter().filter(|(number, _)| *number > seen).map(|(_, text)| text.clone());
        (new.collect(), told.said_count)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Audience for LiveJob {
    fn hear(&self, sentence: &str) {
        let mut told = self.told();
        told.said_count += 1;
        let number = told.said_count;
        told.said.push_back((number, sentence.to_owned()));
        if told.said.len() > SAID_MAX {
            told.said.pop_front();
        }
        drop(told);
        self.store.tell();
    }

    fn see(&self, attempt: u32, glance: &Glance) {
        let progress = Progress {
            step: glance.step,
            max_steps: glance.max_steps,
            loss: glance.loss,
            eta_s: glance.eta_s,
            vram_bytes: glance.vram_used.map(mhtrain_sizing::units::Bytes::get),
        };
        let mut told = self.told();
        let news = told.progress.as_ref() != Some(&progress) || told.attempt != attempt;
        let due = told.sampled_at.is_none_or(|at| at.elapsed() >= SAMPLE_EVERY);
        told.attempt = attempt;
        told.progress = Some(progress.clone());
        if news && due {
            told.sampled_at = Some(Instant::now());
        }
        drop(told);
        if news {
            self.store.tell();
        }
        if news && due {
            self.keep(attempt, &progress);
        }
    }
}

impl LiveJob {
    /// Keeps a point of the time series. It may be lost: it is no event.
    fn keep(&self, attempt: u32, progress: &Progress) {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let sample = Sample {
            at_ms: i64::try_from(at_ms).unwrap_or(i64::MAX),
            step: progress.step,
            loss: progress.loss,
            vram_bytes: progress.vram_bytes,
            ..Sample::default()
        };
        if let Some(id) = JobId::new(self.id) {
            self.store.cast(id, attempt, sample);
        }
    }
}

/// Starts the thread of a job. When it is over, `daemon` is woken and the job is no longer among the live ones.
pub fn start(daemon: &Arc<Daemon>, id: JobId, spec: JobSpec, submission: Submission, sized: Sized) {
    let (stop, _nobody_listens_yet) = mpsc::unbounded_channel();
    let live = Arc::new(LiveJob {
        id: id.get(),
        device_uuid: sized.device().map(str::to_owned),
        device: sized.device_name(),
        output_dir: spec.output_dir.clone(),
        stop: Mutex::new(stop),
        told: Mutex::default(),
        store: daemon.store.clone(),
    });
    daemon.live().insert(id.get(), Arc::clone(&live));
    let worker = Worker { daemon: Arc::clone(daemon), id, spec, submission, sized, live };
    let started = std::thread::Builder::new().name(format!("job-{id}")).spawn(move || {
        let _over = Over { daemon: Arc::clone(&worker.daemon), id: id.get() };
        worker.run();
    });
    if let Err(error) = started {
        // Nothing was started: the job is taken up again with the next daemon, or when threads can be had.
        tracing::error!(job = id.get(), %error, "no thread for the job");
        daemon.live().remove(&id.get());
    }
}

/// Returns the id of the job whose files were moved to `aside`: its receipt says it.
fn receipt_id(aside: &Path) -> Option<u64> {
    let receipt: Value = serde_json::from_slice(&std::fs::read(aside.join("receipt.json")).ok()?).ok()?;
    receipt.get("id")?.as_u64()
}

/// Takes a job off the live ones when its thread ends, however that comes.
struct Over {
    daemon: Arc<Daemon>,
    id: u64,
}

impl Drop for Over {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                job = self.id,
                "the thread of the job has panicked: a bug; the next daemon goes on with it"
            );
        }
        self.daemon.live().remove(&self.id);
        self.daemon.store.tell();
        self.daemon.wake();
    }
}

struct Worker {
    daemon: Arc<Daemon>,
    id: JobId,
    spec: JobSpec,
    submission: Submission,
    sized: Sized,
    live: Arc<LiveJob>,
}

impl Worker {
    /// Runs the job to its end, over everything that goes wrong outside of it.
    fn run(&self) {
        loop {
            let Err(failure) = self.attempt_to_run() else { return };
            tracing::error!(job = self.id.get(), error = failure.message, "the job cannot be followed");
            match self.after_failure(&failure) {
                Ok(true) => return,
                Ok(false) => std::thread::sleep(TRY_AGAIN),
                Err(failure) => {
                    tracing::error!(job = self.id.get(), error = failure.message, "the job is left as it is");
                    return;
                }
            }
        }
    }

    fn records(&self) -> Result<Vec<Record>, Failure> {
        let id = self.id;
        self.daemon.store.call_blocking(move |store| store.events(id))
    }

    fn attempt_to_run(&self) -> Result<(), Failure> {
        // Before the events are read: a request that comes later is heard, one that came earlier is among them.
        let requests = self.live.listen();
        let config = &self.daemon.config;
        let origin = self.submission.origin(&self.daemon.account, config);
        let records = self.records()?;
        let own = self.daemon.job_dir(self.id.get());
        super::make_private_dir(&own)?;
        let directory = JobDirectory::open_beside(&prepare::output_dir(&self.spec, &origin.cwd), own)?;
        let begun = records.iter().any(|record| matches!(record.event, JobEvent::AttemptStarting(_)));
        let earlier = if begun { Vec::new() } else { self.make_room(&directory)? };
        let sink = StoreSink { store: self.daemon.store.clone(), id: self.id };
        let journal = Journal::go_on(records, Box::new(sink))?;
        if journal.state().is_final() {
            return Ok(());
        }
        let (prepared, environment) = self.sized.clone().prepared(self.spec.clone(), &origin);
        let audience: Arc<dyn Audience> = Arc::<LiveJob>::clone(&self.live);
        let run = LocalRun {
            prepared,
            environment,
            probe: Value::Null,
            directory,
            id: Some(self.id.get()),
            journal: Some(journal),
            earlier,
            origin,
            screen: Screen::told_to(audience),
        };
        local::run_until(run, config, || Ok(StopSignals::Requests(requests))).map(drop)
    }

    /// Sets what an earlier job left in the output directory aside. Returns the attempts that may be resumed: those of
    /// the job that this one goes on with.
    fn make_room(&self, directory: &JobDirectory) -> Result<Vec<(PathBuf, Tier)>, Failure> {
        if directory.holds_a_job() {
            let aside = directory.set_earlier_job_aside()?;
            self.live.note(&format!("what an earlier job left was moved to {}", aside.display()));
        }
        let asides = directory.asides();
        let mut attempts = Vec::new();
        let mut next = self.submission.retry_of;
        // The job that this one goes on with may have gone on with another.
        while let Some(id) = next.and_then(JobId::new) {
            next = None;
            let job = match self.daemon.store.call_blocking(move |store| store.job(id)) {
                Ok(job) => job,
                Err(failure) if failure.status == Status::NotFound => break,
                Err(failure) => return Err(failure),
            };
            let own = asides.iter().filter(|aside| receipt_id(aside) == Some(id.get()));
            let records = self.daemon.store.call_blocking(move |store| store.events(id))?;
            for aside in own {
                attempts.extend(records.iter().filter_map(|record| match &record.event {
                    JobEvent::AttemptStarting(start) => {
                        Some((aside.join(format!("attempt-{}", start.attempt)), start.tier.clone()))
                    }
                    _ => None,
                }));
            }
            if let Ok(submission) = serde_json::from_value::<Submission>(job.context) {
                // An earlier job has the smaller number: so this ends.
                next = submission.retry_of.filter(|earlier| *earlier < id.get());
            }
        }
        Ok(attempts)
    }

    /// Returns whether the job is over. One without a trainer fails; one with a trainer is taken up again.
    fn after_failure(&self, failure: &Failure) -> Result<bool, Failure> {
        let records = self.records()?;
        let state = JobState::fold(records.iter().map(|record| &record.event))
            .map_err(|e| Failure::new(Status::Bug, "bug", e))?;
        if state.is_final() {
            return Ok(true);
        }
        if state.has_live_attempt() {
            return Ok(false);
        }
        let event = match state.stop() {
            // A start was refused because somebody had asked for the end.
            Some(by) => JobEvent::Cancelled { reason: by.to_owned() },
            None => JobEvent::Failed { reason: failure.message.clone(), help: failure.help.clone() },
        };
        let (id, record) = (self.id, Record::new(now(), event));
        self.daemon.store.call_blocking(move |store| store.append(id, &record))?;
        self.daemon.store.tell();
        Ok(true)
    }
}

impl LiveJob {
    fn note(&self, sentence: &str) {
        Audience::hear(self, sentence);
    }
}
