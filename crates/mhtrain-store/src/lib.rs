//! What is on disk about jobs, and what is certain to be there after a crash?
//!
//! One SQLite database in one directory. What happens to a job is appended to it as an event and never changed;
//! the state of a job is the fold of its events by `JobState::begin` and `JobState::next`, here as everywhere.
//! Beside the events stands one summary row per job, written in the same transaction, so that a listing reads no
//! events. This is the only crate that contains SQL.
//!
//! ```text
//!   submit, append, write_all ──> check the event ──> BEGIN ─ insert event, update summary ─ COMMIT (fsync) ──> Ok
//!                                                       |                                        |
//!                                                       +─ the open files are those at the path ─+
//! ```
//!
//! When a call that writes returns `Ok`, what it wrote survives a power cut; [`Store::note_samples`] and
//! [`Store::note_observation`] alone are weaker, and say so. When it returns an error, nothing is known to be written, and the next call may try
//! again: a full disk ends by itself when there is room.
//!
//! A [`Store`] is one connection, used by one thread; its calls block. Only one process at a time has a directory
//! open. The store has no clock and decides nothing about jobs. It encrypts nothing: secrets do not belong here.

mod database;
mod directory;
mod error;
mod job;
mod observations;
mod series;
mod store;
#[cfg(test)]
mod testing;

pub use error::StoreError;
pub use job::{Filter, Job, JobId, JobRow, NewJob, Order, Owner, UnfinishedJob};
pub use observations::{OBSERVATIONS_KEPT, ObservationOf};
pub use series::{SAMPLES_KEPT, Sample, SampleOf};
pub use store::{Store, Submitted, Write, Written};
