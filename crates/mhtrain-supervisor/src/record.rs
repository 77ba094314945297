//! What is on disk about one attempt?
//!
//! A directory, mode 0700, with files of mode 0600, each written whole (temporary file, fsync, rename, fsync of the directory):
//!
//! ```text
//! launch.json       by mhtraind, before the recorder exists: what is to be run
//! recorder.json     by the recorder: who it is
//! trainer.json      by the recorder, before the trainer may run: who that is
//! start-error.json  by the gate, only when the trainer could not be executed: why
//! exit.json         by the recorder: how the trainer ended; written again when everything else is gone too
//! stop              by anybody: a request to stop; its text is the grace period in seconds
//! recorder.log      what the recorder complained about
//! lock              held by the recorder while it lives
//! ```
//!
//! The environment is nowhere in it: it holds secrets. It travels from process to process only.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::process::ProcessIdentity;

/// The version of every file of a record. A file of another version is refused, not guessed at.
pub const RECORD_VERSION: u32 = 1;

const LAUNCH: &str = "launch.json";
const RECORDER: &str = "recorder.json";
const TRAINER: &str = "trainer.json";
const START_ERROR: &str = "start-error.json";
const EXIT: &str = "exit.json";
const STOP: &str = "stop";
const LOG: &str = "recorder.log";
const LOCK: &str = "lock";

/// What is to be run. Secrets belong into the environment, which is not here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchRecord {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The trainer's working directory.
    pub cwd: PathBuf,
    /// Where its standard output is appended.
    pub stdout: PathBuf,
    /// Where its standard error is appended. May be the same file.
    pub stderr: PathBuf,
    /// Seconds between SIGTERM and SIGKILL when a stop request names none.
    pub grace_s: f64,
    /// The trainer's umask; `None` keeps that of mhtraind.
    pub umask: Option<u32>,
    /// How much disk each of the two log files may take; `None` is no bound.
    pub log_cap_bytes: Option<u64>,
}

/// The trainer, as it was when it was let go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerRecord {
    /// Who it is.
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    /// When it was started.
    pub started_at: SystemTime,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The trainer's own end.
    #[serde(flatten)]
    pub ended: Ended,
    /// When the trainer ended.
    pub ended_at: SystemTime,
    /// Whether the kernel killed a process of the trainer's memory cgroup for lack of memory while it ran.
    /// `None` where no counter can be read. The cgroup may hold other processes too, so alone it proves nothing.
    pub oom_kill: Option<bool>,
    /// What a stop took; `None` when the trainer ended by itself.
    pub stop: Option<StopTook>,
    /// How many processes outlived the trainer and had to be ended.
    /// `None` until all of them are gone, and for ever if the recorder died before that.
    pub leftovers_killed: Option<u32>,
}

/// The trainer's own end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// It was never executed, for this reason.
    NotStarted(String),
}

/// What stopping a trainer took.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopTook {
    /// SIGTERM, and it ended within the grace period.
    Polite,
    /// SIGKILL to everything, because the grace period passed or was zero.
    Kill,
}

#[derive(Serialize, Deserialize)]
struct StartError {
    message: String,
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system said no.
    #[error("cannot {action} {path}")]
    Io {
        /// The verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// The file is not what this version writes.
    #[error("cannot understand {path}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The file has another version.
    #[error("{path} has version {found}, this program reads version {RECORD_VERSION}")]
    Version {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        found: u32,
    },
    /// The directory already holds an attempt.
    #[error("{path} already holds an attempt")]
    Used {
        /// The record directory.
        path: PathBuf,
    },
}

impl RecordError {
    /// Returns what the reader can do, where there is something.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            RecordError::Io { path, .. } => Some(format!(
                "check owner, mode and free space of {}",
                path.parent().unwrap_or(path).display()
            )),
            RecordError::Json { path, .. } => {
                Some(format!("{} is written whole, so something else changed it; look at it", path.display()))
            }
            RecordError::Version { .. } => {
                Some("use the version of mhtraind that started this attempt".to_owned())
            }
            RecordError::Used { .. } => Some("give each attempt a directory of its own".to_owned()),
        }
    }

    /// Returns whether what was looked for is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, RecordError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
        move |source| RecordError::Io { action, path: path.to_owned(), source }
    }
}

/// The record directory of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordDir {
    path: PathBuf,
}

/// A file of the record with its version.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl RecordDir {
    /// Makes the directory of a new attempt. Its parents must be there.
    ///
    /// # Errors
    /// When it cannot be made, or already holds an attempt.
    pub fn create(path: &Path) -> Result<RecordDir, RecordError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(RecordError::io("create", path))?,
        }
        let record = RecordDir::open(path)?;
        match record.path.join(LAUNCH).try_exists() {
            Ok(false) => Ok(record),
            Ok(true) => Err(RecordError::Used { path: record.path }),
            Err(source) => Err(RecordError::io("look into", path)(source)),
        }
    }

    /// Opens the directory of an attempt that was started before.
    ///
    /// # Errors
    /// When there is no such directory.
    pub fn open(path: &Path) -> Result<RecordDir, RecordError> {
        let path = path.canonicalize().map_err(RecordError::io("open", path))?;
        Ok(RecordDir { path })
    }

    /// Returns the absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what is to be run.
    ///
    /// # Errors
    /// When the file is missing or cannot be understood.
    pub fn launch(&self) -> Result<LaunchRecord, RecordError> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        self.read(LAUNCH)?.ok_or_else(|| RecordError::io("read", &self.path.join(LAUNCH))(missing()))
    }

    /// Returns the recorder's identity; `None` before it is up.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn recorder(&self) -> Result<Option<ProcessIdentity>, RecordError> {
        self.read(RECORDER)
    }

    /// Returns the trainer's identity; `None` before it exists.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn trainer(&self) -> Result<Option<TrainerRecord>, RecordError> {
        self.read(TRAINER)
    }

    /// Returns how the attempt ended; `None` while the trainer runs.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn exit(&self) -> Result<Option<ExitRecord>, RecordError> {
        self.read(EXIT)
    }

    /// Returns what the recorder complained about.
    #[must_use]
    pub fn complaints(&self) -> String {
        fs::read(self.log_path()).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }

    pub(crate) fn write_launch(&self, launch: &LaunchRecord) -> Result<(), RecordError> {
        self.write(LAUNCH, launch)
    }

    pub(crate) fn write_recorder(&self, recorder: &ProcessIdentity) -> Result<(), RecordError> {
        self.write(RECORDER, recorder)
    }

    pub(crate) fn write_trainer(&self, trainer: &TrainerRecord) -> Result<(), RecordError> {
        self.write(TRAINER, trainer)
    }

    pub(crate) fn write_exit(&self, exit: &ExitRecord) -> Result<(), RecordError> {
        self.write(EXIT, exit)
    }

    /// Takes the disk space of the exit status in advance: a full disk is a common end of a trainer, and must not be
    /// the end of the news about it.
    pub(crate) fn reserve_exit(&self) -> Result<(), RecordError> {
        let path = self.temporary(EXIT);
        private(OpenOptions::new().write(true).create(true).truncate(true))
            .open(&path)
            .and_then(|mut file| file.write_all(&[0; 4096]).and_then(|()| file.sync_all()))
            .map_err(RecordError::io("write", &path))
    }

    pub(crate) fn write_start_error(&self, message: String) -> Result<(), RecordError> {
        self.write(START_ERROR, &StartError { message })
    }

    pub(crate) fn start_error(&self) -> Result<Option<String>, RecordError> {
        Ok(self.read::<StartError>(START_ERROR)?.map(|error| error.message))
    }

    /// Asks whoever records this attempt to stop it. The recorder looks for the file; it need not be told.
    pub(crate) fn write_stop(&self, grace: Duration) -> Result<(), RecordError> {
        self.write_bytes(STOP, format!("{}\n", grace.as_secs_f64()).as_bytes())
    }

    /// Returns the text of a stop request.
    pub(crate) fn stop_request(&self) -> Option<String> {
        // Bounded: the file is anybody's, and a number is short.
        let mut text = String::new();
        let file = File::open(self.path.join(STOP)).ok()?;
        match io::Read::read_to_string(&mut io::Read::take(file, 64), &mut text) {
            Ok(_) => Some(text),
            Err(_) => Some(String::new()),
        }
    }

    /// Takes the lock that only one recorder can hold. It is free again when the file is closed, however that comes.
    pub(crate) fn lock(&self) -> Result<File, RecordError> {
        let path = self.path.join(LOCK);
        let file = private(OpenOptions::new().write(true).create(true).truncate(false))
            .open(&path)
            .map_err(RecordError::io("open", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RecordError::Used { path: self.path.clone() }),
            Err(error) => Err(RecordError::io("lock", &path)(error.into())),
        }
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.path.join(LOG)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RecordError> {
        let path = self.path.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RecordError::io("read", &path)(error)),
        };
        let json = |source| RecordError::Json { path: path.clone(), source };
        let VersionOnly { version } = serde_json::from_slice(&text).map_err(json)?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version { path, found: version });
        }
        Ok(Some(serde_json::from_slice::<Versioned<T>>(&text).map_err(json)?.content))
    }

    fn write<T: Serialize>(&self, name: &str, content: &T) -> Result<(), RecordError> {
        let mut text = serde_json::to_vec_pretty(&Versioned { version: RECORD_VERSION, content })
            .map_err(|source| RecordError::Json { path: self.path.join(name), source })?;
        text.push(b'\n');
        self.write_bytes(name, &text)
    }

    /// The pid keeps two writers of one file (two stop requests) from writing the same temporary one.
    fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.{}.tmp", std::process::id()))
    }

    /// Puts a whole file in place: after a crash there is the old one or the new one, never a part.
    fn write_bytes(&self, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
        let path = self.path.join(name);
        let temporary = self.temporary(name);
        // Overwritten first and cut afterwards, so that reserved space is used and not given back.
        private(OpenOptions::new().write(true).create(true).truncate(false))
            .open(&temporary)
            .and_then(|mut file| {
                file.write_all(bytes)?;
                file.set_len(bytes.len() as u64)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| File::open(&self.path)?.sync_all())
            .map_err(RecordError::io("write", &path))
    }
}

/// Readable and writable by its owner only. Secrets may come out of a trainer at any time.
pub(crate) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options.mode(0o600)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn exit() -> ExitRecord {
        ExitRecord {
            ended: Ended::Signal(9),
            ended_at: SystemTime::UNIX_EPOCH,
            oom_kill: Some(false),
            stop: Some(StopTook::Kill),
            leftovers_killed: Some(3),
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(&dir.path().join("attempt-1")).unwrap();
        assert_eq!(record.exit().unwrap(), None);
        record.write_exit(&exit()).unwrap();
        assert_eq!(record.exit().unwrap(), Some(exit()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(record.path()), 0o700);
        assert_eq!(mode(&record.path().join(EXIT)), 0o600);
        assert_eq!(fs::read_dir(record.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn the_exit_file_names_code_signal_and_version() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(&dir.path().join("a")).unwrap();
        record.write_exit(&exit()).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(record.path().join(EXIT)).unwrap()).unwrap();
        assert_eq!(
            (&json["version"], &json["signal"], &json["stop"]),
            (&1.into(), &9.into(), &"kill".into())
        );
        record.write_exit(&ExitRecord { ended: Ended::Code(75), stop: None, ..exit() }).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(record.path().join(EXIT)).unwrap()).unwrap();
        assert_eq!((&json["code"], &json["signal"]), (&75.into(), &serde_json::Value::Null));
    }

    #[test]
    fn another_version_and_garbage_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(dir.path()).unwrap();
        fs::write(record.path().join(EXIT), r#"{"version":2,"code":0}"#).unwrap();
        assert!(matches!(record.exit(), Err(RecordError::Version { found: 2, .. })));
        for garbage in ["", "{", "[]", r#"{"version":1}"#, r#"{"version":1,"code":"x"}"#] {
            fs::write(record.path().join(EXIT), garbage).unwrap();
            assert!(matches!(record.exit(), Err(RecordError::Json { .. })), "{garbage}");
        }
    }

    #[test]
    fn a_directory_serves_one_attempt_only() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(dir.path()).unwrap();
        fs::write(record.path().join(LAUNCH), "{}").unwrap();
        assert!(matches!(RecordDir::create(dir.path()), Err(RecordError::Used { .. })));
    }

    #[test]
    fn only_one_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(dir.path()).unwrap();
        let held = record.lock().unwrap();
        assert!(matches!(record.lock(), Err(RecordError::Used { .. })));
        drop(held);
        record.lock().unwrap();
    }
}
