//! What can go wrong with the store, and what can be done about it?

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use mhtrain_job::event::{EVENT_VERSION, JournalError};
use mhtrain_job::state::IllegalEvent;
use rusqlite::ErrorCode;
use rustix::io::Errno;

use crate::database::SCHEMA_VERSION;
use crate::directory::Identified;
use crate::job::JobId;

/// What SQLite or the file system said.
type Cause = Box<dyn Error + Send + Sync>;

/// Why the store could not do what it was asked to. After any of them the store can be asked again.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the directory open.
    #[error("{} is in use by {}", directory.display(), holder(*pid))]
    Busy {
        /// The state directory.
        directory: PathBuf,
        /// Who wrote itself into the lock file; `None` when nothing readable is in it.
        pid: Option<u32>,
    },
    /// The directory lies on a file system that several hosts can mount.
    #[error("{} is on {kind}, a network file system", directory.display())]
    NetworkFileSystem {
        /// The state directory.
        directory: PathBuf,
        /// The kind of file system.
        kind: &'static str,
    },
    /// Others could put files into the directory.
    #[error("{} belongs to uid {owner} and has mode {mode:04o}: others can change what is in it", directory.display())]
    NotPrivate {
        /// The state directory.
        directory: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// The database was written by a later version of this program.
    #[error("{} has schema version {found}, this program knows up to {SCHEMA_VERSION}", path.display())]
    TooNew {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file is a database, but not one of ours.
    #[error("{} is a database of another program", path.display())]
    NotAStore {
        /// The file.
        path: PathBuf,
    },
    /// The database contradicts itself or cannot be read as one.
    #[error("{} is damaged: {detail}", path.display())]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What shows it.
        detail: String,
    },
    /// The events of a job cannot be read.
    #[error("the events of job {id} cannot be read")]
    Events {
        /// The job.
        id: JobId,
        /// The first that cannot be read, and why.
        source: JournalError,
    },
    /// There is no room for what was to be written.
    #[error("the disk is full: cannot write {}", path.display())]
    DiskFull {
        /// The file or its directory.
        path: PathBuf,
        /// What was said.
        source: Cause,
    },
    /// The file system or the file cannot be written.
    #[error("cannot write {}: it is read-only", path.display())]
    ReadOnly {
        /// The file or its directory.
        path: PathBuf,
        /// What was said.
        source: Cause,
    },
    /// The file system failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// The verb.
        action: &'static str,
        /// The file or its directory.
        path: PathBuf,
        /// What the operating system said.
        source: Cause,
    },
    /// A file that the store has open is no longer the one at its path, so nothing written to it would be found
    /// again.
    #[error("{} was removed or replaced while it was open", path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// Another program is writing to the database.
    #[error("another program keeps {} locked", path.display())]
    Locked {
        /// The database.
        path: PathBuf,
    },
    /// There is no such job.
    #[error("there is no job {id}")]
    NoSuchJob {
        /// What was asked for.
        id: JobId,
    },
    /// The key is taken by a job with another spec.
    #[error("the key {key:?} belongs to job {id}, which is another job than this one")]
    KeyReused {
        /// The key.
        key: String,
        /// The job that has it.
        id: JobId,
    },
    /// A job does not begin with this event.
    #[error("a job cannot be submitted so")]
    BadBeginning {
        /// Why not.
        source: IllegalEvent,
    },
    /// The event cannot follow on those before it.
    #[error("job {id} cannot take the event")]
    Illegal {
        /// The job.
        id: JobId,
        /// Why not.
        source: IllegalEvent,
    },
    /// The record is of a version that this program does not write.
    #[error("cannot append a record of version {found}, this program writes version {EVENT_VERSION}")]
    RecordVersion {
        /// Its version.
        found: u32,
    },
    /// The job is not over.
    #[error("job {id} is {state}: only jobs that are over can be removed")]
    NotFinal {
        /// The job.
        id: JobId,
        /// Its state.
        state: String,
    },
    /// SQLite refused a statement for a reason that has no place here.
    #[error("SQLite refused a statement")]
    Sql(#[from] rusqlite::Error),
}

impl StoreError {
    /// Returns what the reader can do, where there is something.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        Some(match self {
            StoreError::Busy { pid: Some(pid), .. } => {
                format!("stop process {pid} first, or give this one a state directory of its own")
            }
            StoreError::Busy { pid: None, .. } => "stop the other mhtraind first".to_owned(),
            StoreError::NetworkFileSystem { .. } => {
                "choose a state directory on a disk of this host, such as /var/lib/mhtraind; a database that two hosts \
                 can open would lose jobs"
                    .to_owned()
            }
            StoreError::NotPrivate { directory, .. } => format!(
                "make {} belong to the user that mhtraind runs as, and take write permission from group and others \
                 (chmod go-w)",
                directory.display()
            ),
            StoreError::TooNew { .. } | StoreError::Events { source: JournalError::TooNew { .. }, .. } => {
                "use the version of mhtraind that wrote it, or a later one".to_owned()
            }
            StoreError::NotAStore { path } => {
                format!("give mhtraind a state directory without {}", path.display())
            }
            StoreError::Damaged { path, .. } => format!(
                "restore {0} from a backup together with {0}-wal, or move both away to begin with an empty store; \
                 running trainers and their files are not touched",
                path.display()
            ),
            StoreError::Events { .. } => "something else changed the database; restore it from a backup".to_owned(),
            StoreError::DiskFull { path, .. } => format!(
                "free some space, inodes or quota on the file system of {}; mhtraind goes on by itself",
                path.display()
            ),
            StoreError::ReadOnly { path, .. } => format!(
                "make {} writable again; a file system that became read-only by itself has found an error (see dmesg)",
                path.display()
            ),
            StoreError::Io { path, .. } => {
                format!("check the owner and mode of {}, and the health of its disk (see dmesg)", path.display())
            }
            StoreError::Replaced { path } => format!(
                "put {} back, or restart mhtraind to go on with what is there now; nothing is accepted until then",
                path.display()
            ),
            StoreError::Locked { path } => format!("end the other program (fuser {})", path.display()),
            StoreError::KeyReused { id, .. } => {
                format!("choose another key, or look at job {id}; a key stands for one submission")
            }
            StoreError::NotFinal { id, .. } => format!("cancel job {id} first"),
            StoreError::NoSuchJob { .. } => "`mhtraind status` lists the jobs that there are".to_owned(),
            StoreError::BadBeginning { .. }
            | StoreError::Illegal { .. }
            | StoreError::RecordVersion { .. }
            | StoreError::Sql(_) => return None,
        })
    }

    /// Returns whether disk, files or another program are in the way: the same write may work later.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self {
            StoreError::DiskFull { .. }
            | StoreError::ReadOnly { .. }
            | StoreError::Io { .. }
            | StoreError::Replaced { .. }
            | StoreError::Locked { .. }
            | StoreError::Sql(_) => true,
            StoreError::Busy { .. }
            | StoreError::NetworkFileSystem { .. }
            | StoreError::NotPrivate { .. }
            | StoreError::TooNew { .. }
            | StoreError::NotAStore { .. }
            | StoreError::Damaged { .. }
            | StoreError::Events { .. }
            | StoreError::NoSuchJob { .. }
            | StoreError::KeyReused { .. }
            | StoreError::BadBeginning { .. }
            | StoreError::Illegal { .. }
            | StoreError::RecordVersion { .. }
            | StoreError::NotFinal { .. } => false,
        }
    }

    /// Returns the error of a file operation.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        move |source| StoreError::failed(action, path, source.raw_os_error(), source.into())
    }

    /// Names what SQLite complains about, if this is a complaint of SQLite. `errno` is what the operating system
    /// said to it, where it asked.
    pub(crate) fn explain(self, path: &Path, errno: Option<i32>) -> StoreError {
        let StoreError::Sql(error) = self else { return self };
        let damaged = |error: &rusqlite::Error| StoreError::Damaged {
            path: path.to_owned(),
            detail: error.to_string(),
        };
        match (&error, error.sqlite_error_code()) {
            (_, Some(ErrorCode::DiskFull)) => {
                StoreError::DiskFull { path: path.to_owned(), source: error.into() }
            }
            (_, Some(ErrorCode::ReadOnly)) => {
                StoreError::ReadOnly { path: path.to_owned(), source: error.into() }
            }
            (_, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)) => damaged(&error),
            (_, Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)) => {
                StoreError::Locked { path: path.to_owned() }
            }
            (_, Some(ErrorCode::SystemIoFailure)) => StoreError::failed("use", path, errno, error.into()),
            (_, Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied)) => {
                StoreError::failed("open", path, errno, error.into())
            }
            // A row that is missing or holds what this program does not write.
            (
                rusqlite::Error::QueryReturnedNoRows
                | rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::InvalidColumnType(..)
                | rusqlite::Error::Utf8Error(..),
                _,
            ) => damaged(&error),
            _ => StoreError::Sql(error),
        }
    }

    fn failed(action: &'static str, path: &Path, errno: Option<i32>, source: Cause) -> StoreError {
        let path = path.to_owned();
        match errno.map(Errno::from_raw_os_error) {
            Some(Errno::NOSPC | Errno::DQUOT) => StoreError::DiskFull { path, source },
            Some(Errno::ROFS) => StoreError::ReadOnly { path, source },
            _ => StoreError::Io { action, path, source },
        }
    }

    /// Returns the error of a file that is not the one that was opened.
    pub(crate) fn replaced(file: &Identified) -> StoreError {
        StoreError::Replaced { path: file.path.clone() }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}
