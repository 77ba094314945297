//! How is a job's history written, and what is known about jobs that are not over?

use std::collections::HashMap;
use std::path::Path;

use mhtrain_job::event::{EVENT_VERSION, JobEvent, Record};
use mhtrain_job::state::{IllegalEvent, JobState};
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;

use crate::database::{Database, Durability};
use crate::directory::StateDirectory;
use crate::error::StoreError;
use crate::job::{self, Filter, Job, JobId, JobRow, NewJob, UnfinishedJob};
use crate::observations::{self, ObservationOf};
use crate::series::{self, Sample, SampleOf};

/// The store of one daemon.
#[derive(Debug)]
pub struct Store {
    database: Database,
    /// The fold of each job that is not over. Only what is committed is in it; what is missing is folded again.
    known: HashMap<JobId, Fold>,
}

/// The events of a job, folded.
#[derive(Clone, Debug, PartialEq)]
struct Fold {
    state: JobState,
    /// How many events there are.
    events: i64,
}

impl Fold {
    fn of(id: JobId, events: &[Record]) -> Result<Fold, StoreError> {
        let state = JobState::fold(events.iter().map(|record| &record.event))
            .map_err(|source| StoreError::Illegal { id, source })?;
        Ok(Fold { state, events: i64::try_from(events.len()).unwrap_or(i64::MAX) })
    }
}

/// One of several things that are written together.
#[derive(Copy, Clone, Debug)]
pub enum Write<'a> {
    /// A new job.
    Submit(&'a NewJob),
    /// An event of a job.
    Append(JobId, &'a Record),
}

/// What became of a [`Write`].
#[derive(Clone, Debug, PartialEq)]
pub enum Written {
    /// The job is in the store.
    Submitted(Submitted),
    /// The event is in the store, and this is the state after it.
    Appended(Box<JobState>),
}

/// A job that is in the store.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// Its number.
    pub id: JobId,
    /// Whether it was there before, under the same key.
    pub existed: bool,
}

impl Store {
    /// Opens the store in the directory `path`, or makes both. Nobody else can until the store is dropped.
    ///
    /// Folds the events of the jobs that are not over; those of all others are not read.
    ///
    /// # Errors
    /// A directory that is not fit (in use, on a network file system, writable by others), a database of a later
    /// version, and one that is damaged.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let database = Database::open(StateDirectory::open(path)?)?;
        let mut store = Store { database, known: HashMap::new() };
        for history in store.database.read(job::unfinished_histories)? {
            let fold = Fold::of(history.id, &history.events()?)?;
            // The summary is written together with the event. If they differ, something else wrote.
            if fold.state.name() != history.noted {
                let (id, noted) = (history.id, history.noted);
                let detail = format!("job {id} is noted as {noted}, its events say {}", fold.state.name());
                return Err(store.database.damaged(detail));
            }
            store.known.insert(history.id, fold);
        }
        Ok(store)
    }

    /// Adds a job. The same key of the same owner with the same spec is the same job: nothing new is added then.
    ///
    /// # Errors
    /// [`StoreError::KeyReused`], [`StoreError::BadBeginning`], and what keeps the store from writing.
    pub fn submit(&mut self, new: &NewJob) -> Result<Submitted, StoreError> {
        match self.write_one(Write::Submit(new))? {
            Written::Submitted(submitted) => Ok(submitted),
            Written::Appended(_) => unreachable!("a submission is answered as one"),
        }
    }

    /// Returns the job that [`Store::submit`] would find to be the same; `None` where it would add one.
    ///
    /// # Errors
    /// [`StoreError::KeyReused`], and what keeps the store from reading.
    pub fn submitted_before(&self, new: &NewJob) -> Result<Option<JobId>, StoreError> {
        self.database.read(|connection| same_job(connection, new))
    }

    /// Appends an event to a job and returns the state after it.
    ///
    /// # Errors
    /// [`StoreError::Illegal`], and nothing is changed; [`StoreError::NoSuchJob`]; what keeps the store from writing.
    pub fn append(&mut self, id: JobId, record: &Record) -> Result<JobState, StoreError> {
        match self.write_one(Write::Append(id, record))? {
            Written::Appended(state) => Ok(*state),
            Written::Submitted(_) => unreachable!("an event is answered as one"),
        }
    }

    /// Appends several events with one fsync, as [`write_all`](Store::write_all) does.
    ///
    /// # Errors
    /// What keeps the store from writing.
    pub fn append_all(
        &mut self,
        events: &[(JobId, Record)],
    ) -> Result<Vec<Result<JobState, StoreError>>, StoreError> {
        let writes: Vec<_> = events.iter().map(|(id, record)| Write::Append(*id, record)).collect();
        let state = |written| match written {
            Written::Appended(state) => *state,
            Written::Submitted(_) => unreachable!("an event is answered as one"),
        };
        Ok(self.write_all(&writes)?.into_iter().map(|result| result.map(state)).collect())
    }

    /// Writes several things in one transaction, so with one fsync, in this order. Each has its own result: one that
    /// is refused changes nothing, and the others are written.
    ///
    /// # Errors
    /// What keeps the store from writing. Then none of them is written.
    pub fn write_all(
        &mut self,
        writes: &[Write<'_>],
    ) -> Result<Vec<Result<Written, StoreError>>, StoreError> {
        let known = &self.known;
        let mut fresh = HashMap::new();
        let done = self.database.write(Durability::PowerCut, |connection| {
            let mut results = Vec::with_capacity(writes.len());
            for write in writes {
                results.push(match one(connection, known, &mut fresh, *write) {
                    Err(error @ StoreError::Sql(_)) => return Err(error),
                    result => result,
                });
            }
            Ok(results)
        });
        if done.is_err() {
            // It is not certain what is on disk (see `Database::write`), so these will be read again.
            for write in writes {
                if let Write::Append(id, _) = write {
                    self.known.remove(id);
                }
            }
            return done;
        }
        for (id, fold) in fresh {
            if fold.state.is_final() {
                self.known.remove(&id);
            } else {
                self.known.insert(id, fold);
            }
        }
        done
    }

    fn write_one(&mut self, write: Write<'_>) -> Result<Written, StoreError> {
        let mut results = self.write_all(&[write])?;
        results.pop().expect("one write has one result")
    }

    /// Returns what keeps the store from writing; `None` when the last write that had to be on disk worked.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.database.trouble()
    }

    /// Returns a job.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], and what keeps the store from reading.
    pub fn job(&self, id: JobId) -> Result<Job, StoreError> {
        let row = self.database.read(|connection| job::row(connection, id))?;
        self.with_context(row.ok_or(StoreError::NoSuchJob { id })?)
    }

    /// Returns the jobs that `filter` asks for, without their contexts. Reads no events but the first of each.
    ///
    /// # Errors
    /// What keeps the store from reading.
    pub fn jobs(&self, filter: &Filter) -> Result<Vec<JobRow>, StoreError> {
        self.database.read(|connection| job::rows(connection, filter))
    }

    /// Returns the events of a job, oldest first.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], and what keeps the store from reading.
    pub fn events(&self, id: JobId) -> Result<Vec<Record>, StoreError> {
        self.events_by(id, job::events)
    }

    /// Returns the events of a job, oldest first, without what was sized: that is 95 % of their bytes and of the time that they
    /// take to read, and only a process that takes the job over needs it.
    ///
    /// # Errors
    /// As [`Store::events`].
    pub fn brief_events(&self, id: JobId) -> Result<Vec<Record>, StoreError> {
        self.events_by(id, job::brief_events)
    }

    fn events_by(
        &self,
        id: JobId,
        read: impl Fn(&Connection, JobId) -> Result<Vec<Record>, StoreError>,
    ) -> Result<Vec<Record>, StoreError> {
        let events = self.database.read(|connection| read(connection, id))?;
        if events.is_empty() {
            return Err(StoreError::NoSuchJob { id });
        }
        Ok(events)
    }

    /// Returns the state of a job.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], and what keeps the store from reading.
    pub fn state(&self, id: JobId) -> Result<JobState, StoreError> {
        if let Some(fold) = self.known.get(&id) {
            return Ok(fold.state.clone());
        }
        Ok(self.database.read(|connection| fold(connection, id))?.state)
    }

    /// Returns all jobs that are not over, with their states, by number.
    ///
    /// # Errors
    /// What keeps the store from reading.
    pub fn unfinished(&self) -> Result<Vec<UnfinishedJob>, StoreError> {
        let rows = self.database.read(job::unfinished_rows)?;
        rows.into_iter()
            .map(|row| Ok(UnfinishedJob { state: self.state(row.id)?, job: self.with_context(row)? }))
            .collect()
    }

    /// Returns the jobs that were the last to end after an attempt, the last one first, at most so many.
    ///
    /// # Errors
    /// What keeps the store from reading.
    pub fn ended_last(&self, at_most: u32) -> Result<Vec<JobId>, StoreError> {
        self.database.read(|connection| job::ended_last(connection, at_most))
    }

    /// Removes a job that is over, with its events and samples. Its number is not used again; its key can be.
    /// The file does not shrink, but its room is used again.
    ///
    /// # Errors
    /// [`StoreError::NotFinal`], [`StoreError::NoSuchJob`], and what keeps the store from writing.
    pub fn remove(&mut self, id: JobId) -> Result<(), StoreError> {
        self.database.write(Durability::PowerCut, |connection| {
            let row = job::row(connection, id)?.ok_or(StoreError::NoSuchJob { id })?;
            if !row.is_final {
                return Err(StoreError::NotFinal { id, state: row.state });
            }
            connection.prepare_cached("DELETE FROM jobs WHERE id = ?1")?.execute([id])?;
            Ok(())
        })
    }

    /// Notes which device a job has; `None`: again the one that it asked for. For listings only, so not one fsync: after a
    /// power cut it may be the one before.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], and what keeps the store from writing.
    pub fn set_device(&mut self, id: JobId, device: Option<&str>) -> Result<(), StoreError> {
        self.database.write(Durability::ProcessEnd, |connection| {
            let row = job::row(connection, id)?.ok_or(StoreError::NoSuchJob { id })?;
            let device = device.map(str::to_owned).or_else(|| device_of(&row.spec));
            connection
                .prepare_cached("UPDATE jobs SET device = ?2 WHERE id = ?1")?
                .execute(params![id, device])?;
            Ok(())
        })
    }

    /// Notes how an attempt goes on. Not one fsync: the samples of the last seconds may be missing after a power cut,
    /// though not after the end of this process.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], and what keeps the store from writing.
    pub fn note_samples(&mut self, id: JobId, attempt: u32, samples: &[Sample]) -> Result<(), StoreError> {
        if samples.is_empty() {
            return Ok(());
        }
        self.database.write(Durability::ProcessEnd, |connection| {
            if !exists(connection, id)? {
                return Err(StoreError::NoSuchJob { id });
            }
            series::note(connection, id, attempt, samples)
        })
    }

    /// Returns the samples of one attempt of a job, or of all its attempts, in order.
    ///
    /// # Errors
    /// [`StoreError::NoSuchJob`], and what keeps the store from reading.
    pub fn series(&self, id: JobId, attempt: Option<u32>) -> Result<Vec<SampleOf>, StoreError> {
        self.database.read(|connection| {
            if !exists(connection, id)? {
                return Err(StoreError::NoSuchJob { id });
            }
            series::series(connection, id, attempt)
        })
    }

    /// Notes what an attempt showed about memory. Not one fsync: the last may be missing after a power cut.
    ///
    /// # Errors
    /// What keeps the store from writing.
    pub fn note_observation(
        &mut self,
        id: JobId,
        attempt: u32,
        noted: &ObservationOf,
    ) -> Result<(), StoreError> {
        self.database
            .write(Durability::ProcessEnd, |connection| observations::note(connection, id, attempt, noted))
    }

    /// Returns what earlier attempts showed about memory, oldest first.
    ///
    /// # Errors
    /// What keeps the store from reading.
    pub fn observations(&self) -> Result<Vec<ObservationOf>, StoreError> {
        self.database.read(observations::all)
    }

    /// Sets what the daemon must remember about itself under `name`; `None` forgets it.
    ///
    /// # Errors
    /// What keeps the store from writing.
    pub fn set_flag(&mut self, name: &str, value: Option<&str>) -> Result<(), StoreError> {
        self.database.write(Durability::PowerCut, |connection| {
            match value {
                None => connection.execute("DELETE FROM settings WHERE name = ?1", [name])?,
                Some(value) => connection.execute(
                    "INSERT OR REPLACE INTO settings (name, value) VALUES (?1, ?2)",
                    [name, value],
                )?,
            };
            Ok(())
        })
    }

    /// Returns what was set under `name`; `None` when nothing is.
    ///
    /// # Errors
    /// What keeps the store from reading.
    pub fn get_flag(&self, name: &str) -> Result<Option<String>, StoreError> {
        self.database.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT value FROM settings WHERE name = ?1")?;
            Ok(statement.query_row([name], |row| row.get(0)).optional()?)
        })
    }

    fn with_context(&self, row: JobRow) -> Result<Job, StoreError> {
        let text = self.database.read(|connection| job::context(connection, row.id))?;
        let context = serde_json::from_str(&text)
            .map_err(|error| self.database.damaged(format!("the context of job {}: {error}", row.id)))?;
        Ok(Job { row, context })
    }
}

/// Does one write. Whatever it refuses, it refuses before it has written anything.
fn one(
    connection: &Connection,
    known: &HashMap<JobId, Fold>,
    fresh: &mut HashMap<JobId, Fold>,
    write: Write<'_>,
) -> Result<Written, StoreError> {
    match write {
        Write::Submit(new) => {
            let (submitted, fold) = submit(connection, new)?;
            if let Some(fold) = fold {
                fresh.insert(submitted.id, fold);
            }
            Ok(Written::Submitted(submitted))
        }
        Write::Append(id, record) => {
            let before = match fresh.get(&id).or_else(|| known.get(&id)) {
                Some(fold) => fold.clone(),
                None => fold(connection, id)?,
            };
            let after = append(connection, id, &before, record)?;
            let state = after.state.clone();
            fresh.insert(id, after);
            Ok(Written::Appended(Box::new(state)))
        }
    }
}

/// Adds a job; the fold is `None` when it was there before.
fn submit(connection: &Connection, new: &NewJob) -> Result<(Submitted, Option<Fold>), StoreError> {
    let refused = |source| StoreError::BadBeginning { source };
    let state = JobState::begin(&new.record.event).map_err(refused)?;
    let JobEvent::Submitted { spec } = &new.record.event else {
        return Err(refused(IllegalEvent::NoBeginning { found: new.record.event.name() }));
    };
    check_version(&new.record)?;
    if let Some(id) = same_job(connection, new)? {
        return Ok((Submitted { id, existed: true }, None));
    }
    let id: JobId = connection
        .prepare_cached(
            "INSERT INTO jobs (owner_uid, owner_gid, owner_name, key, name, priority, device, submitted_at, \
             updated_at, state, reason, attempts, is_final) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8, ?9, ?10, ?11, ?12) RETURNING id",
        )?
        .query_row(
            params![
                new.owner.uid,
                new.owner.gid,
                new.owner.name,
                new.key,
                new.name,
                new.priority,
                device_of(spec),
                new.record.at,
                state.name(),
                state.reason(),
                state.attempts(),
                state.is_final(),
            ],
            |row| row.get(0),
        )?;
    connection
        .prepare_cached("INSERT INTO contexts (job_id, context) VALUES (?1, ?2)")?
        .execute(params![id, new.context.to_string()])?;
    insert_event(connection, id, 1, &new.record)?;
    Ok((Submitted { id, existed: false }, Some(Fold { state, events: 1 })))
}

/// Appends an event, and returns the fold with it.
fn append(connection: &Connection, id: JobId, before: &Fold, record: &Record) -> Result<Fold, StoreError> {
    check_version(record)?;
    let state = before.state.next(&record.event).map_err(|source| StoreError::Illegal { id, source })?;
    let events = before.events + 1;
    insert_event(connection, id, events, record)?;
    connection
        .prepare_cached(
            "UPDATE jobs SET updated_at = ?2, state = ?3, reason = ?4, attempts = ?5, is_final = ?6 WHERE id = ?1",
        )?
        .execute(params![
            id,
            record.at,
            state.name(),
            state.reason(),
            state.attempts(),
            state.is_final()
        ])?;
    Ok(Fold { state, events })
}

fn insert_event(connection: &Connection, id: JobId, number: i64, record: &Record) -> Result<(), StoreError> {
    connection
        .prepare_cached("INSERT INTO events (job_id, number, record) VALUES (?1, ?2, ?3)")?
        .execute(params![id, number, text_of(record)])?;
    Ok(())
}

/// Reads the events of a job and folds them.
fn fold(connection: &Connection, id: JobId) -> Result<Fold, StoreError> {
    let events = job::events(connection, id)?;
    if events.is_empty() {
        return Err(StoreError::NoSuchJob { id });
    }
    Fold::of(id, &events)
}

/// Returns the job of this key and owner.
fn same_job(connection: &Connection, new: &NewJob) -> Result<Option<JobId>, StoreError> {
    let Some(key) = &new.key else { return Ok(None) };
    let Some((id, submitted)) = by_key(connection, new.owner.uid, key)? else { return Ok(None) };
    // Compared as they would be stored: a number may change in its last digit on the way through text.
    if job::spec_of(id, submitted)? != job::spec_of(id, text_of(&new.record))? {
        return Err(StoreError::KeyReused { key: key.clone(), id });
    }
    Ok(Some(id))
}

fn by_key(connection: &Connection, uid: u32, key: &str) -> Result<Option<(JobId, String)>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT j.id, e.record FROM jobs j JOIN events e ON e.job_id = j.id AND e.number = 1 \
         WHERE j.owner_uid = ?1 AND j.key = ?2",
    )?;
    Ok(statement.query_row(params![uid, key], |row| Ok((row.get(0)?, row.get(1)?))).optional()?)
}

fn exists(connection: &Connection, id: JobId) -> Result<bool, StoreError> {
    let mut statement = connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM jobs WHERE id = ?1)")?;
    Ok(statement.query_row([id], |row| row.get(0))?)
}

fn check_version(record: &Record) -> Result<(), StoreError> {
    if record.v == EVENT_VERSION {
        return Ok(());
    }
    Err(StoreError::RecordVersion { found: record.v })
}

/// Returns the line of the journal without its line break.
fn text_of(record: &Record) -> String {
    let mut line = record.to_line();
    line.truncate(line.trim_end().len());
    line
}

/// Returns the device that a spec asks for, as text: an index, a UUID, `auto`.
fn device_of(spec: &Value) -> Option<String> {
    match spec.get("device")? {
        Value::String(text) => Some(text.clone()),
        Value::Number(index) => Some(index.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
