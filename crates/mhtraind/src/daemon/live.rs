//! What do clients see of a job that has a device, and how do they stop it?

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mhtrain_sizing::units::Bytes;
use mhtrain_store::{JobId, Sample};
use tokio::sync::mpsc;

use super::Daemon;
use super::store::StoreHandle;
use crate::api::types::Progress;
use crate::engine::examine::Sized;
use crate::engine::screen::{Audience, Glance};
use crate::engine::signals::StopCause;

/// Sentences about a job that are kept for those who begin to follow it.
const SAID_MAX: usize = 200;

/// How often progress is kept.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// A job that has a device.
#[derive(Debug)]
pub struct LiveJob {
    /// Its id.
    pub id: JobId,
    /// UUID of its device.
    pub device_uuid: Option<String>,
    /// Its device for people.
    pub device: String,
    /// Where everything of it goes.
    pub output_dir: String,
    /// Whether it needs its device no more: its last checkpoint is made durable, its receipt written.
    device_is_back: AtomicBool,
    stop: Mutex<mpsc::UnboundedSender<StopCause>>,
    told: Mutex<Told>,
    store: StoreHandle,
}

/// What the job's thread told.
#[derive(Debug, Default)]
struct Told {
    attempt: u32,
    progress: Option<Progress>,
    sampled_at: Option<Instant>,
    said: VecDeque<(u64, String)>,
    said_count: u64,
}

impl LiveJob {
    /// Returns a job of which nothing is known yet.
    pub fn new(id: JobId, output_dir: String, sized: &Sized, store: StoreHandle) -> LiveJob {
        let (stop, _nobody_listens_yet) = mpsc::unbounded_channel();
        LiveJob {
            id,
            device_uuid: sized.device().map(str::to_owned),
            device: sized.device_name(),
            output_dir,
            device_is_back: AtomicBool::new(false),
            stop: Mutex::new(stop),
            told: Mutex::default(),
            store,
        }
    }

    /// Returns the UUID of its device while nobody else may have it.
    pub fn leased_device(&self) -> Option<&str> {
        self.device_uuid.as_deref().filter(|_| !self.gave_device_back())
    }

    /// Returns whether it needs no device any more: its success is proven, or it is over.
    pub fn gave_device_back(&self) -> bool {
        self.device_is_back.load(Ordering::Acquire)
    }

    /// Asks the job to end: politely, and at once the second time.
    pub fn stop(&self) {
        // A thread that is gone needs no stop; one that begins again finds the request in the store.
        let _over = self.stop.lock().unwrap_or_else(PoisonError::into_inner).send(StopCause::Cancel);
    }

    /// Returns where the job's thread hears stop requests from now on.
    pub fn listen(&self) -> mpsc::UnboundedReceiver<StopCause> {
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

    /// Notes a sentence for people.
    pub fn say(&self, sentence: &str) {
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

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ears and eyes of a live job, for the loop that runs it.
#[derive(Debug)]
pub struct Followers {
    /// The job.
    pub live: Arc<LiveJob>,
    /// Who has something for its device.
    pub daemon: Arc<Daemon>,
}

impl Audience for Followers {
    fn hear(&self, sentence: &str) {
        self.live.say(sentence);
    }

    fn attempt_begins(&mut self, attempt: u32) {
        let mut told = self.live.told();
        told.attempt = attempt;
        told.progress = None;
    }

    fn see(&mut self, glance: &Glance) {
        let progress = Progress {
            step: glance.step,
            max_steps: glance.max_steps,
            loss: glance.loss,
            eta_s: glance.eta_s,
            vram_bytes: glance.vram_used.map(Bytes::get),
        };
        let mut told = self.live.told();
        if told.progress.as_ref() == Some(&progress) {
            return;
        }
        told.progress = Some(progress.clone());
        let attempt = told.attempt;
        let due = told.sampled_at.is_none_or(|at| at.elapsed() >= SAMPLE_EVERY);
        if due {
            told.sampled_at = Some(Instant::now());
        }
        drop(told);
        self.live.store.tell();
        if due {
            self.live.store.note_sample(self.live.id, attempt, sample(&progress));
        }
    }

    fn attempt_ends(&mut self) {}

    fn device_is_back(&mut self) {
        self.live.device_is_back.store(true, Ordering::Release);
        self.daemon.wake();
    }

    fn has_device(&self) -> bool {
        let Some(device) = self.live.leased_device() else { return self.live.device_uuid.is_none() };
        // A daemon before this one may have given it to another.
        let live = self.daemon.live();
        live.values().all(|other| other.id == self.live.id || other.leased_device() != Some(device))
    }
}

/// Returns a point of the time series.
fn sample(progress: &Progress) -> Sample {
    let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    Sample {
        at_ms: i64::try_from(at_ms).unwrap_or(i64::MAX),
        step: progress.step,
        loss: progress.loss,
        vram_bytes: progress.vram_bytes,
        ..Sample::default()
    }
}
