//! What is a job in the store, and how is one looked up?

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use mhtrain_job::event::{JobEvent, Record, read_journal};
use mhtrain_job::state::JobState;
use rusqlite::types::{
    FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, Value as SqlValue, ValueRef,
};
use rusqlite::{Connection, OptionalExtension, Row, params_from_iter};
use serde_json::Value;

use crate::error::StoreError;

/// The number of a job: 1 or more, and never given to another job, not even after the job was removed.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(i64);

impl JobId {
    /// Returns the id with this number; `None` when no job can have it.
    #[must_use]
    pub fn new(number: u64) -> Option<JobId> {
        i64::try_from(number).ok().filter(|number| *number > 0).map(JobId)
    }

    /// Returns the number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0.unsigned_abs()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for JobId {
    type Err = std::num::ParseIntError;

    /// Reads the number of a job, as a user types it.
    fn from_str(text: &str) -> Result<JobId, Self::Err> {
        let number: NonZeroU64 = text.parse()?;
        // Numbers above the largest possible one are too large in the words of the standard library as well.
        JobId::new(number.get()).map_or_else(|| text.parse().map(JobId), Ok)
    }
}

impl ToSql for JobId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

impl FromSql for JobId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<JobId> {
        let number = value.as_i64()?;
        if number > 0 { Ok(JobId(number)) } else { Err(FromSqlError::OutOfRange(number)) }
    }
}

/// Whose job it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Name of the user when the job was submitted.
    pub name: String,
}

/// A job to be submitted.
#[derive(Clone)]
pub struct NewJob {
    /// Whose it is.
    pub owner: Owner,
    /// Makes submitting the same job again harmless; unique among the jobs of `owner`.
    pub key: Option<String>,
    /// Its first event, `Submitted`, with the spec.
    pub record: Record,
    /// Its name, for people.
    pub name: String,
    /// Its priority; what the number means is up to the scheduler.
    pub priority: i64,
    /// Where and how it is to run: working directory, umask, environment. Opaque to the store, and not shown by
    /// `Debug`.
    pub context: Value,
}

/// What a listing says about a job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobRow {
    /// Its number.
    pub id: JobId,
    /// Whose it is.
    pub owner: Owner,
    /// The key that it was submitted with.
    pub key: Option<String>,
    /// Its name.
    pub name: String,
    /// Its priority.
    pub priority: i64,
    /// When it was submitted, RFC 3339.
    pub submitted_at: String,
    /// When its last event happened, RFC 3339.
    pub updated_at: String,
    /// Name of its state (`JobState::name`).
    pub state: String,
    /// Why it is in that state (`JobState::reason`).
    pub reason: Option<String>,
    /// Attempts that were started so far.
    pub attempts: u32,
    /// Whether nothing more can happen.
    pub is_final: bool,
    /// The device that it asked for, or the one that [`Store::set_device`](crate::Store::set_device) named.
    pub device: Option<String>,
    /// The job as it was submitted (`JobSpec::to_json`).
    pub spec: Value,
}

/// All about a job but its events.
#[derive(Clone, PartialEq)]
pub struct Job {
    /// What a listing says.
    pub row: JobRow,
    /// Where and how it is to run. Not shown by `Debug`.
    pub context: Value,
}

/// A job that is not over.
#[derive(Clone, Debug, PartialEq)]
pub struct UnfinishedJob {
    /// The job.
    pub job: Job,
    /// Its state.
    pub state: JobState,
}

/// Which jobs are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Only jobs of this user; `None`: of everybody.
    pub owner_uid: Option<u32>,
    /// Only jobs in these states (`JobState::name`); empty: in any.
    pub states: Vec<String>,
    /// Only jobs that come after this one in `order`: where the listing before ended.
    pub after: Option<JobId>,
    /// At most so many.
    pub limit: u32,
    /// In which order.
    pub order: Order,
}

/// In which order jobs are listed.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The first that was submitted comes first.
    #[default]
    OldestFirst,
    /// The last that was submitted comes first.
    NewestFirst,
}

impl Default for Filter {
    /// Returns the filter of the hundred oldest jobs.
    fn default() -> Filter {
        Filter { owner_uid: None, states: Vec::new(), after: None, limit: 100, order: Order::OldestFirst }
    }
}

// Environments are nobody's business in a log.
impl fmt::Debug for NewJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NewJob { owner, key, record, name, priority, context: _ } = self;
        f.debug_struct("NewJob")
            .field("owner", owner)
            .field("key", key)
            .field("record", record)
            .field("name", name)
            .field("priority", priority)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("row", &self.row).finish_non_exhaustive()
    }
}

/// What a row needs: the summary, and the first event for the spec.
const ROWS: &str = "SELECT j.id, j.owner_uid, j.owner_gid, j.owner_name, j.key, j.name, j.priority, j.submitted_at, \
                    j.updated_at, j.state, j.reason, j.attempts, j.is_final, j.device, e.record \
                    FROM jobs j JOIN events e ON e.job_id = j.id AND e.number = 1";

/// Returns the row of a job; `None` when there is no such job.
pub(crate) fn row(connection: &Connection, id: JobId) -> Result<Option<JobRow>, StoreError> {
    let mut statement = connection.prepare_cached(&format!("{ROWS} WHERE j.id = ?1"))?;
    statement.query_row([id], read_row).optional()?.map(UnreadRow::read).transpose()
}

/// Returns the rows that `filter` asks for.
pub(crate) fn rows(connection: &Connection, filter: &Filter) -> Result<Vec<JobRow>, StoreError> {
    let (sql, values) = select(filter);
    let mut statement = connection.prepare_cached(&sql)?;
    let rows = statement.query_map(params_from_iter(values), read_row)?;
    rows.map(|row| row?.read()).collect()
}

/// Returns the rows of all jobs that are not over, by id.
pub(crate) fn unfinished_rows(connection: &Connection) -> Result<Vec<JobRow>, StoreError> {
    let mut statement = connection.prepare_cached(&format!("{ROWS} WHERE j.is_final = 0 ORDER BY j.id"))?;
    let rows = statement.query_map((), read_row)?;
    rows.map(|row| row?.read()).collect()
}

/// Returns the numbers of the jobs that are over and had an attempt, the one that was told of last first.
pub(crate) fn ended_last(connection: &Connection, at_most: u32) -> Result<Vec<JobId>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT id FROM jobs WHERE is_final = 1 AND attempts > 0 ORDER BY updated_at DESC LIMIT ?1",
    )?;
    let ids = statement.query_map([at_most], |row| row.get(0))?;
    Ok(ids.collect::<Result<_, _>>()?)
}

/// The events of a job that is not over, and the name of the state that is noted beside them.
pub(crate) struct History {
    pub(crate) id: JobId,
    pub(crate) noted: String,
    journal: String,
}

impl History {
    /// Returns the events.
    pub(crate) fn events(&self) -> Result<Vec<Record>, StoreError> {
        read_journal(&self.journal).map_err(|source| StoreError::Events { id: self.id, source })
    }
}

/// Returns the histories of all jobs that are not over, by id. One query: opening waits for it.
pub(crate) fn unfinished_histories(connection: &Connection) -> Result<Vec<History>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT j.id, j.state, e.record FROM jobs j JOIN events e ON e.job_id = j.id \
         WHERE j.is_final = 0 ORDER BY j.id, e.number",
    )?;
    let mut rows = statement.query(())?;
    let mut histories: Vec<History> = Vec::new();
    while let Some(row) = rows.next()? {
        let id = row.get(0)?;
        if histories.last().is_none_or(|last| last.id != id) {
            histories.push(History { id, noted: row.get(1)?, journal: String::new() });
        }
        if let Some(last) = histories.last_mut() {
            last.journal.push_str(row.get_ref(2)?.as_str().map_err(rusqlite::Error::from)?);
            last.journal.push('\n');
        }
    }
    Ok(histories)
}

/// Returns the context of a job that exists, as text.
pub(crate) fn context(connection: &Connection, id: JobId) -> Result<String, StoreError> {
    let mut statement = connection.prepare_cached("SELECT context FROM contexts WHERE job_id = ?1")?;
    Ok(statement.query_row([id], |row| row.get(0))?)
}

/// Returns the events of a job, oldest first; none when there is no such job.
pub(crate) fn events(connection: &Connection, id: JobId) -> Result<Vec<Record>, StoreError> {
    events_by(connection, "SELECT record FROM events WHERE job_id = ?1 ORDER BY number", id)
}

/// Returns the events of a job without what was sized. What is no JSON is found by whoever reads it.
pub(crate) fn brief_events(connection: &Connection, id: JobId) -> Result<Vec<Record>, StoreError> {
    let sql = "SELECT iif(json_valid(record), json_remove(record, '$.sized'), record) \
               FROM events WHERE job_id = ?1 ORDER BY number";
    events_by(connection, sql, id)
}

fn events_by(connection: &Connection, sql: &str, id: JobId) -> Result<Vec<Record>, StoreError> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query([id])?;
    let mut journal = String::new();
    while let Some(row) = rows.next()? {
        journal.push_str(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?);
        journal.push('\n');
    }
    read_journal(&journal).map_err(|source| StoreError::Events { id, source })
}

pub(crate) fn select(filter: &Filter) -> (String, Vec<SqlValue>) {
    let (after, order) = match filter.order {
        Order::OldestFirst => (" AND j.id > ?", " ORDER BY j.id ASC"),
        Order::NewestFirst => (" AND j.id < ?", " ORDER BY j.id DESC"),
    };
    let mut sql = format!("{ROWS} WHERE TRUE");
    let mut values: Vec<SqlValue> = Vec::new();
    if let Some(uid) = filter.owner_uid {
        sql.push_str(" AND j.owner_uid = ?");
        values.push(uid.into());
    }
    if !filter.states.is_empty() {
        let marks = vec!["?"; filter.states.len()].join(", ");
        sql.push_str(&format!(" AND j.state IN ({marks})"));
        values.extend(filter.states.iter().cloned().map(SqlValue::from));
    }
    if let Some(id) = filter.after {
        sql.push_str(after);
        values.push(id.0.into());
    }
    sql.push_str(order);
    sql.push_str(" LIMIT ?");
    values.push(filter.limit.into());
    (sql, values)
}

/// A row whose first event is still text.
struct UnreadRow {
    row: JobRow,
    submitted: String,
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<UnreadRow> {
    let owner = Owner { uid: row.get(1)?, gid: row.get(2)?, name: row.get(3)? };
    let summary = JobRow {
        id: row.get(0)?,
        owner,
        key: row.get(4)?,
        name: row.get(5)?,
        priority: row.get(6)?,
        submitted_at: row.get(7)?,
        updated_at: row.get(8)?,
        state: row.get(9)?,
        reason: row.get(10)?,
        attempts: row.get(11)?,
        is_final: row.get(12)?,
        device: row.get(13)?,
        spec: Value::Null,
    };
    Ok(UnreadRow { row: summary, submitted: row.get(14)? })
}

impl UnreadRow {
    fn read(self) -> Result<JobRow, StoreError> {
        let spec = spec_of(self.row.id, self.submitted)?;
        Ok(JobRow { spec, ..self.row })
    }
}

/// Returns the spec in the first event of a job; `Null` when it is another event, which the fold refuses.
pub(crate) fn spec_of(id: JobId, mut record: String) -> Result<Value, StoreError> {
    record.push('\n');
    let records = read_journal(&record).map_err(|source| StoreError::Events { id, source })?;
    Ok(match records.into_iter().next().map(|record| record.event) {
        Some(JobEvent::Submitted { spec }) => spec,
        _ => Value::Null,
    })
}
