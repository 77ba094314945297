//! How do the daemon's tasks and threads reach the store?
//!
//! The store has one connection, used by one thread. Whoever wants something sends it there. Events that arrive
//! together are written together: one fsync serves them all.

use std::convert::Infallible;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use mhtrain_failpoint::reach;
use mhtrain_job::event::Record;
use mhtrain_job::state::JobState;
use mhtrain_store::{JobId, ObservationOf, Sample, Store, StoreError};
use tokio::sync::{oneshot, watch};

use crate::engine::journal::EventSink;
use crate::engine::prepare::chain;
use crate::failure::{Failure, Status};

/// Most events that are written in one transaction.
const BATCH_MAX: usize = 64;

/// The time until an event that could not be written is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

type Reply = Box<dyn FnOnce(Result<JobState, StoreError>) + Send>;

enum Work {
    Append(JobId, Box<Record>, Reply),
    Call(Box<dyn FnOnce(&mut Store) + Send>),
}

/// The way to the store. Clones lead to the same one.
#[derive(Clone, Debug)]
pub struct StoreHandle {
    work: mpsc::Sender<Work>,
    /// Counts what happened, so that followers wait for the next thing instead of asking.
    happened: watch::Sender<u64>,
}

impl StoreHandle {
    /// Opens the store and starts its thread. The receiver ends when that thread does, which is a bug: nothing can be
    /// acknowledged any more.
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn open(state_dir: &Path) -> Result<(StoreHandle, oneshot::Receiver<Infallible>), Failure> {
        let store = Store::open(state_dir).map_err(failure)?;
        let (work, requests) = mpsc::channel();
        let (alive, ended) = oneshot::channel();
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                let _dropped_with_the_thread = alive;
                serve(store, &requests);
            })
            .map_err(|e| Failure::failed("no_thread", e))?;
        Ok((StoreHandle { work, happened: watch::Sender::new(0) }, ended))
    }

    /// Does something with the store and returns its answer.
    ///
    /// # Errors
    /// What the store said.
    pub async fn call<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        // Whoever asked may be gone, here and below: a client that hung up.
        self.send(Work::Call(Box::new(move |store| drop(reply.send(what(store))))))?;
        answer.await.map_err(|_| gone())?.map_err(failure)
    }

    /// Like [`StoreHandle::call`], for a thread that may wait.
    ///
    /// # Errors
    /// What the store said.
    pub fn call_blocking<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Failure> {
        let (reply, answer) = mpsc::channel();
        self.send(Work::Call(Box::new(move |store| drop(reply.send(what(store))))))?;
        answer.recv().map_err(|_| gone())?.map_err(failure)
    }

    /// Keeps a point of a job's time series, some time soon. It may be lost.
    pub fn note_sample(&self, id: JobId, attempt: u32, sample: Sample) {
        let note = Work::Call(Box::new(move |store| {
            if let Err(error) = store.note_samples(id, attempt, &[sample]) {
                tracing::debug!(job = id.get(), error = chain(&error), "progress is not kept");
            }
        }));
        // A store that is gone keeps no progress.
        let _gone = self.send(note);
    }

    /// Keeps what an attempt showed about memory, some time soon. It may be lost.
    pub fn note_observation(&self, id: JobId, attempt: u32, noted: ObservationOf) {
        let note = Work::Call(Box::new(move |store| {
            if let Err(error) = store.note_observation(id, attempt, &noted) {
                tracing::debug!(job = id.get(), error = chain(&error), "an observation is not kept");
            }
        }));
        // A store that is gone keeps nothing.
        let _gone = self.send(note);
    }

    /// Notes which device a job has, some time soon. For listings; it may be lost.
    pub fn note_device(&self, id: JobId, device: String) {
        let note = Work::Call(Box::new(move |store| {
            if let Err(error) = store.set_device(id, Some(&device)) {
                tracing::debug!(job = id.get(), error = chain(&error), "the device is not noted");
            }
        }));
        // A store that is gone lists nothing.
        let _gone = self.send(note);
    }

    /// Records an event. When this returns it is on disk.
    ///
    /// # Errors
    /// What the store said.
    pub async fn append(&self, id: JobId, record: Record) -> Result<JobState, Failure> {
        let (reply, answer) = oneshot::channel();
        let event = record.event.name();
        self.send(Work::Append(id, Box::new(record), Box::new(move |result| drop(reply.send(result)))))?;
        let state = answer.await.map_err(|_| gone())?.map_err(failure)?;
        reach("store.recorded", event);
        self.tell();
        Ok(state)
    }

    /// Returns a watch that changes whenever something happened to a job.
    pub fn happenings(&self) -> watch::Receiver<u64> {
        self.happened.subscribe()
    }

    fn send(&self, work: Work) -> Result<(), Failure> {
        self.work.send(work).map_err(|_| gone())
    }

    /// Tells followers that something changed.
    pub fn tell(&self) {
        self.happened.send_modify(|count| *count = count.wrapping_add(1));
    }
}

fn gone() -> Failure {
    Failure::new(Status::Bug, "store_gone", "the store's thread has ended")
}

/// Returns a store's error as commands show it.
pub fn failure(error: StoreError) -> Failure {
    let status = match &error {
        StoreError::NoSuchJob { .. } => Status::NotFound,
        StoreError::KeyReused { .. } => Status::BadInput,
        _ => Status::Failed,
    };
    Failure::new(status, "store", chain(&error)).help(error.help())
}

fn serve(mut store: Store, requests: &mpsc::Receiver<Work>) {
    let mut next = requests.recv().ok();
    let mut was_in_trouble = false;
    while let Some(work) = next.take() {
        match work {
            Work::Call(call) => call(&mut store),
            Work::Append(id, record, reply) => {
                let (mut batch, mut replies) = (vec![(id, *record)], vec![reply]);
                while batch.len() < BATCH_MAX {
                    match requests.try_recv() {
                        Ok(Work::Append(id, record, reply)) => {
                            batch.push((id, *record));
                            replies.push(reply);
                        }
                        Ok(call @ Work::Call(_)) => {
                            next = Some(call);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                append(&mut store, batch, replies);
            }
        }
        // Here, and not by each of those who wait for it: that is one line.
        match (was_in_trouble, store.trouble()) {
            (false, Some(error)) => tracing::error!(error, "the store cannot be written"),
            (true, None) => tracing::info!("the store can be written again"),
            (false, None) | (true, Some(_)) => {}
        }
        was_in_trouble = store.trouble().is_some();
        if next.is_none() {
            next = requests.recv().ok();
        }
    }
}

/// Writes events that came together, and tells each sender what became of its own.
fn append(store: &mut Store, batch: Vec<(JobId, Record)>, replies: Vec<Reply>) {
    match store.append_all(&batch) {
        Ok(answers) => {
            for (reply, answer) in replies.into_iter().zip(answers) {
                reply(answer);
            }
        }
        // None of them is written. Each is tried alone, so that each sender has an error of its own.
        Err(_) => {
            for (reply, (id, record)) in replies.into_iter().zip(batch) {
                reply(store.append(id, &record));
            }
        }
    }
}

/// The journal of one job in the store, for the thread that runs the job.
#[derive(Debug)]
pub struct StoreSink {
    /// The store.
    pub store: StoreHandle,
    /// The job.
    pub id: JobId,
}

impl EventSink for StoreSink {
    /// Waits until the event is on disk. A store that cannot write for a while (a full disk) is asked again and again:
    /// the trainer goes on meanwhile, and nothing follows on an event that is not recorded.
    fn append(&mut self, record: &Record) -> Result<(), Failure> {
        loop {
            let (reply, answer) = mpsc::channel();
            let reply: Reply = Box::new(move |result| drop(reply.send(result)));
            self.store.send(Work::Append(self.id, Box::new(record.clone()), reply))?;
            match answer.recv().map_err(|_| gone())? {
                Ok(_) => {
                    self.store.tell();
                    return Ok(());
                }
                Err(error) if error.is_temporary() => std::thread::sleep(TRY_AGAIN),
                Err(error) => return Err(failure(error)),
            }
        }
    }
}
