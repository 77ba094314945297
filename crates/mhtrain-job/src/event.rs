//! What can happen to a job?
//!
//! Events are appended, never changed. The intention is recorded before the effect and the result after it, so
//! that after a crash the last event says what may be out there. A journal is a file of [`Record`]s, one JSON
//! object a line; the shell writes it, this module only knows its text.

use mhtrain_sizing::tier::Tier;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnosis::Diagnosis;
use crate::rerun::{Adjustment, Rerun};

/// Version of the event format that is written.
pub const EVENT_VERSION: u32 = 1;

/// One thing that happened to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum JobEvent {
    /// The job was accepted. Always the first event.
    Submitted {
        /// The job, complete (`JobSpec::to_json`).
        spec: Value,
    },
    /// The ladder was sized. It can be sized again, when another card or other memory is there.
    Planned {
        /// Index of the rung that the next attempt takes.
        chosen: usize,
        /// Number of rungs.
        rungs: usize,
        /// The chosen rung.
        tier: Tier,
        /// Everything that was sized (card, ladder, trainer), for a process that takes the job over; opaque here.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sized: Option<Value>,
    },
    /// The job cannot start now.
    Waiting {
        /// What it waits for, in words.
        reason: String,
    },
    /// A trainer is about to be started. Recorded before anything is started.
    AttemptStarting(AttemptStart),
    /// The trainer runs.
    Started {
        /// Number of the attempt.
        attempt: u32,
        /// The trainer.
        process: ProcessIdentity,
    },
    /// Everything that the attempt started is gone.
    AttemptEnded {
        /// Number of the attempt.
        attempt: u32,
        /// How the trainer ended.
        exit: Exit,
        /// Why.
        diagnosis: Box<Diagnosis>,
        /// Last optimizer step that was finished; `None` before the first.
        last_step: Option<u64>,
    },
    /// The answer to the end of an attempt is another one.
    RerunDecided(Rerun),
    /// Something is not as it should be, and the job goes on all the same.
    Warned {
        /// What, in words.
        warning: String,
    },
    /// Somebody asked the job to stop.
    StopRequested {
        /// Who or what asked: `Ctrl-C`, `cancel`, `its time limit`.
        by: String,
    },
    /// The job did what was planned.
    Succeeded {
        /// What proves it.
        proof: Value,
    },
    /// The job is over without success.
    Failed {
        /// Why.
        reason: String,
        /// What to do.
        help: Option<String>,
    },
    /// The job was stopped because somebody asked.
    Cancelled {
        /// Why, in words.
        reason: String,
    },
}

/// One attempt, as it is meant to be started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttemptStart {
    /// Number of the attempt; the first is 1.
    pub attempt: u32,
    /// Index of its rung.
    pub rung: usize,
    /// Its rung.
    pub tier: Tier,
    /// From where it goes on; `None`: from the beginning, as the first attempt does.
    pub resume: Option<Resume>,
    /// What is changed beside the rung.
    pub adjustments: Vec<Adjustment>,
}

/// How an attempt goes on where an earlier one ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// How exact it is.
    pub kind: ResumeKind,
    /// The checkpoint; `None` for a restart.
    pub checkpoint: Option<String>,
    /// Optimizer step that it goes on from; 0 for a restart.
    pub from_step: u64,
    /// Optimizer steps that were done before and are done again.
    pub steps_repeated: u64,
}

/// How exact a resume is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResumeKind {
    /// The next row is the one that an uninterrupted run would have trained.
    Exact,
    /// Training begins again.
    Restart,
    /// Weights go on; optimizer and learning rate begin again.
    WeightsOnly,
}

/// A process that can be told from a later one with the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_time: u64,
    /// Boot that the ticks belong to (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

/// How a trainer ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Exit {
    /// It exited.
    Code {
        /// Exit status.
        code: i32,
    },
    /// A signal ended it.
    Signal {
        /// Number of the signal.
        signal: i32,
    },
    /// It was never started.
    SpawnFailed {
        /// Why.
        error: String,
    },
    /// It is gone and nobody saw how.
    Lost,
}

/// One line of a journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the format.
    pub v: u32,
    /// When, RFC 3339; the clock is the shell's.
    pub at: String,
    /// What happened.
    #[serde(flatten)]
    pub event: JobEvent,
}

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A whole line is no record.
    #[error("line {line} of the journal is no record")]
    NotARecord {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The journal is of a later version.
    #[error("line {line} of the journal is of version {found}, this program reads up to {EVENT_VERSION}")]
    TooNew {
        /// Line, counted from 1.
        line: usize,
        /// Its version.
        found: u32,
    },
}

impl Record {
    /// Returns a record of `event`, written now.
    pub fn new(at: String, event: JobEvent) -> Record {
        Record { v: EVENT_VERSION, at, event }
    }

    /// Returns the line of the journal, with its line break.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("records have text keys and finite numbers");
        line.push('\n');
        line
    }
}

/// Returns the records of a journal. A last line without line break was cut off by a crash and does not count:
/// its effect was not begun.
///
/// # Errors
/// The first whole line that is no record, or is of a later version.
pub fn read_journal(text: &str) -> Result<Vec<Record>, JournalError> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(i, line)| read_record(i + 1, line)).collect()
}

fn read_record(line: usize, text: &str) -> Result<Record, JournalError> {
    /// Read first: a later version may have events that this one cannot read.
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let not_a_record = |source| JournalError::NotARecord { line, source };
    let version: Version = serde_json::from_str(text).map_err(not_a_record)?;
    if version.v > EVENT_VERSION {
        return Err(JournalError::TooNew { line, found: version.v });
    }
    serde_json::from_str(text).map_err(not_a_record)
}
