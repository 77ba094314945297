//! How does a job survive the death of the process that runs it?
//!
//! Every event is appended to a file and on disk before its effect begins; state is the fold of the events.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mhtrain_failpoint::reach;
use mhtrain_job::event::{JobEvent, Record, read_journal};
use mhtrain_job::state::JobState;
use mhtrain_job::stop;

use crate::failure::{Failure, Status, unreadable, unwritable};

/// Where events are kept: a file for a job in the foreground, the store for one of the daemon.
pub trait EventSink: std::fmt::Debug + Send {
    /// Keeps a record. When this returns it is on disk.
    ///
    /// # Errors
    /// It cannot be kept.
    fn append(&mut self, record: &Record) -> Result<(), Failure>;
}

/// A file with a record a line.
#[derive(Debug)]
struct JournalFile {
    path: PathBuf,
    file: fs::File,
}

impl EventSink for JournalFile {
    fn append(&mut self, record: &Record) -> Result<(), Failure> {
        let written = self.file.write_all(record.to_line().as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|e| unwritable(&self.path, &e))
    }
}

/// The events of one job, on disk and in memory, with the state that they fold to.
#[derive(Debug)]
pub struct Journal {
    sink: Box<dyn EventSink>,
    records: Vec<Record>,
    state: JobState,
}

impl Journal {
    /// Begins the journal of a new job with its first event.
    ///
    /// # Errors
    /// The file cannot be written, or is there already.
    pub fn begin(path: &Path, first: JobEvent) -> Result<Journal, Failure> {
        let state = JobState::begin(&first).map_err(bug)?;
        let file = fs::OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| unwritable(path, &e))?;
        let sink = Box::new(JournalFile { path: path.to_owned(), file });
        let mut journal = Journal { sink, records: Vec::new(), state };
        journal.append(first)?;
        if let Some(parent) = path.parent() {
            fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| unwritable(parent, &e))?;
        }
        Ok(journal)
    }

    /// Opens the journal of an earlier process; `None` when there is none.
    ///
    /// A last line that was cut off by a crash is removed: its effect had not begun.
    ///
    /// # Errors
    /// It cannot be read, a whole line of it is damaged, or its events contradict each other.
    pub fn open(path: &Path) -> Result<Option<Journal>, Failure> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(path).map_err(|e| unreadable(path, &e))?;
        let damaged = |why: String| {
            Failure::bad_input("damaged_journal", format!("{}: {why}", path.display()))
                .help("`--fresh` sets what is there aside and starts again; nothing is deleted".to_owned())
        };
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let text = std::str::from_utf8(&bytes[..whole]).map_err(|e| damaged(e.to_string()))?;
        let records = read_journal(text).map_err(|e| {
            let cause = std::error::Error::source(&e).map_or(String::new(), |source| format!(": {source}"));
            damaged(format!("{e}{cause}"))
        })?;
        if records.is_empty() {
            fs::remove_file(path).map_err(|e| unwritable(path, &e))?;
            return Ok(None);
        }
        let state =
            JobState::fold(records.iter().map(|record| &record.event)).map_err(|e| damaged(e.to_string()))?;
        let file = fs::OpenOptions::new().append(true).open(path).map_err(|e| unwritable(path, &e))?;
        file.set_len(whole as u64).map_err(|e| unwritable(path, &e))?;
        Ok(Some(Journal { sink: Box::new(JournalFile { path: path.to_owned(), file }), records, state }))
    }

    /// Returns the journal of a job whose events are kept elsewhere: `records` so far, further ones go into `sink`.
    ///
    /// # Errors
    /// The records contradict each other.
    pub fn go_on(records: Vec<Record>, sink: Box<dyn EventSink>) -> Result<Journal, Failure> {
        let state = JobState::fold(records.iter().map(|record| &record.event)).map_err(bug)?;
        Ok(Journal { sink, records, state })
    }

    /// Records that `event` happened, or is about to be made to happen. When this returns it is on disk.
    ///
    /// # Errors
    /// The state does not allow the event (a bug), or it cannot be written.
    pub fn record(&mut self, event: JobEvent) -> Result<(), Failure> {
        let state = self.state.next(&event).map_err(bug)?;
        tracing::debug!(event = event.name(), state = state.name(), "job event");
        self.append(event)?;
        self.state = state;
        Ok(())
    }

    fn append(&mut self, event: JobEvent) -> Result<(), Failure> {
        let record = Record::new(now(), event);
        self.sink.append(&record)?;
        reach("journal.recorded", record.event.name());
        self.records.push(record);
        Ok(())
    }

    /// Returns the state of the job.
    pub fn state(&self) -> &JobState {
        &self.state
    }

    /// Returns what happened, in order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

/// Returns the time since a job's first attempt was started, by the clock on the wall: a process before us may have started it;
/// `None` before that.
pub fn time_used(records: &[Record]) -> Option<Duration> {
    let began = stop::time_began(records)?.parse::<jiff::Timestamp>().ok()?;
    // A clock that was set back says nothing.
    Some(Duration::try_from(jiff::Timestamp::now().duration_since(began)).unwrap_or_default())
}

/// Returns the time as RFC 3339 in UTC, to the second.
pub fn now() -> String {
    rfc3339(std::time::SystemTime::now())
}

/// Returns a time as RFC 3339 in UTC, to the second.
pub fn rfc3339(time: std::time::SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(at) => at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        Err(_) => "unknown".to_owned(),
    }
}

fn bug(error: impl std::fmt::Display) -> Failure {
    Failure::new(Status::Bug, "bug", error)
        .help("this is a bug of mhtraind: please report it with the journal.jsonl of the job".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submitted() -> JobEvent {
        JobEvent::Submitted { spec: serde_json::json!({"model": "m"}) }
    }

    #[test]
    fn a_journal_is_read_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        let mut journal = Journal::begin(&path, submitted()).unwrap();
        journal.record(JobEvent::Waiting { reason: "memory".to_owned() }).unwrap();
        let again = Journal::open(&path).unwrap().unwrap();
        assert_eq!(again.state(), journal.state());
        assert_eq!(again.records(), journal.records());
    }

    #[test]
    fn a_line_that_a_crash_cut_off_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        drop(Journal::begin(&path, submitted()).unwrap());
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{{\"v\":1,\"at\":\"2026")).unwrap();
        let mut journal = Journal::open(&path).unwrap().unwrap();
        journal.record(JobEvent::Waiting { reason: "memory".to_owned() }).unwrap();
        assert_eq!(Journal::open(&path).unwrap().unwrap().records().len(), 2);
    }

    #[test]
    fn a_damaged_line_is_an_error_and_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        fs::write(&path, "garbage\n").unwrap();
        assert_eq!(Journal::open(&path).unwrap_err().code, "damaged_journal");
        assert_eq!(fs::read_to_string(&path).unwrap(), "garbage\n");
    }

    #[test]
    fn an_event_that_cannot_happen_is_a_bug_and_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        let mut journal = Journal::begin(&path, submitted()).unwrap();
        let failure = journal.record(submitted()).unwrap_err();
        assert_eq!(failure.status, Status::Bug);
        assert_eq!(Journal::open(&path).unwrap().unwrap().records().len(), 1);
    }
}
