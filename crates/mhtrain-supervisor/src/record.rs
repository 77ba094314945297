//! What is on disk about one attempt?
//!
//! A directory, mode 0700, with files of mode 0600, each written whole (temporary file, rename):
//!
//! ```text
//! launch.json       by mhtraind, before the recorder exists: what is to be run, as whom, in which cgroup
//! recorder.json     by the recorder: who it is; written again by one that takes over
//! trainer.json      by the recorder, before the trainer may run: who that is, and its extent
//! start-error.json  by the gate, only when the trainer could not be executed: why
//! exit.json         by the recorder: how the trainer ended; written again when everything else is gone too
//! stop              by anybody: a request to stop; its text is the grace period in seconds
//! recorder.log      what the recorder complained about
//! lock              held by the recorder while it lives
//! ```
//!
//! What should survive a crash of the machine is synced before the rename: the exit status and a stop request. The other files
//! say who is alive, which nobody is after that; they are synced when the trainer runs already, so it does not wait for a disk.
//!
//! All of it belongs to the user of the attempt. For a daemon that runs as root every file here may be a trap: it is read and
//! written with that user's rights, symbolic links are not followed, and what is no plain file of a sane size is refused. Whom
//! a file names is believed only as far as that user could signal it himself. The parent directory should not be writable by
//! that user.
//!
//! The environment is nowhere in it: it holds secrets. It travels from process to process only.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mhtrain_failpoint::reach;
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::identity::{FileRights, Identity};
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

/// The largest file that is read. A command line of Linux has 2 MiB at most, as long as nobody raised a limit on purpose.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// How much of the recorder's complaints is read, from the start: what went wrong first.
const COMPLAINTS_BYTES_MAX: u64 = 64 << 10;

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
    /// As whom recorder and trainer run; `None` is the user of mhtraind. For the reader of the record only: whoever takes over
    /// is told by mhtraind, because the user of the attempt can write here what he likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// The attempt's cgroup; `None` where there was to be none. Whether it is used is in [`TrainerRecord::extent`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
}

/// The trainer, as it was when it was let go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerRecord {
    /// Who it is.
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    /// When it was started.
    pub started_at: SystemTime,
    /// How everything that it starts is found.
    #[serde(default)]
    pub extent: Extent,
}

/// How everything that a trainer started is found and ended.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// It is in a cgroup v2 of its own, which nobody leaves.
    Cgroup,
    /// It is below its recorder, a child sub-reaper. Without the recorder, it is below the trainer or carries the attempt's
    /// mark in its environment.
    #[default]
    Subreaper,
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
    /// Whether a log could not grow when the trainer ended: its last words may be lost. `false` where that cannot be asked.
    #[serde(default)]
    pub log_full: bool,
    /// Whether a trainer that was not started was not because the disk, full, broken or read-only, did not take its record.
    #[serde(default)]
    pub disk_refused: bool,
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
    /// Nobody was there to take its status when it ended: its recorder had died before, perhaps before it ran at all.
    StatusLost,
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
    /// Something else than a file is at the place of a file.
    #[error("{path} is not a plain file")]
    NotPlain {
        /// The path.
        path: PathBuf,
    },
    /// The file is larger than anything that is written here.
    #[error("{path} has {bytes} bytes, more than the {FILE_BYTES_MAX} that a file of a record can have")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The directory belongs to somebody else.
    #[error("{path} belongs to uid {found}, not to uid {wanted}")]
    Foreign {
        /// The record directory.
        path: PathBuf,
        /// Whose it is.
        found: u32,
        /// Whose it should be.
        wanted: u32,
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
            RecordError::NotPlain { path } | RecordError::TooLarge { path, .. } => {
                Some(format!("something else put {} there; look at it, then remove it", path.display()))
            }
            RecordError::Foreign { path, .. } => {
                Some(format!("remove {} if it is not needed, and use a new directory", path.display()))
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
    /// Makes the directory of a new attempt, for `owner` or for ourselves. Its parents must be there, and `owner` must be able to
    /// come to it through them.
    ///
    /// # Errors
    /// When it cannot be made, already holds an attempt, or belongs to somebody else.
    pub fn create(path: &Path, owner: Option<&Identity>) -> Result<RecordDir, RecordError> {
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(RecordError::io("create", path)(error)),
        };
        let record = RecordDir::open(path)?;
        if let Some(owner) = owner {
            record.give_to(owner, made)?;
        }
        let _as_owner = record.as_owner();
        match record.path.join(LAUNCH).symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(record),
            Ok(_) => Err(RecordError::Used { path: record.path }),
            Err(source) => Err(RecordError::io("look into", path)(source)),
        }
    }

    /// Makes sure that the directory is the owner's and private. Only one that we just made, and that is still empty, is given
    /// away: another one may have been put in its place.
    fn give_to(&self, owner: &Identity, made: bool) -> Result<(), RecordError> {
        let io = |source: io::Error| RecordError::io("give away", &self.path)(source);
        let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed();
        let directory = OpenOptions::new().read(true).custom_flags(flags).open(&self.path).map_err(io)?;
        let found = directory.metadata().map_err(io)?;
        if found.uid() != owner.uid {
            let empty = || fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none());
            let ours = found.uid() == crate::identity::file_ids().0;
            if !(made && ours && empty()) {
                return Err(RecordError::Foreign {
                    path: self.path.clone(),
                    found: found.uid(),
                    wanted: owner.uid,
                });
            }
            std::os::unix::fs::fchown(&directory, Some(owner.uid), Some(owner.gid)).map_err(io)?;
        }
        if found.mode() & 0o7777 != 0o700 {
            let _as_owner = self.as_owner();
            rustix::fs::fchmod(&directory, rustix::fs::Mode::RWXU).map_err(|error| io(error.into()))?;
        }
        Ok(())
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

    /// Returns the user id of the directory's owner: the user of the attempt.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn owner(&self) -> Result<u32, RecordError> {
        let found = self.path.symlink_metadata().map_err(RecordError::io("look at", &self.path))?;
        Ok(found.uid())
    }

    /// Makes this thread touch files with the rights of the owner, and with no others. A thread that took somebody's rights
    /// already keeps them: who could put another user's record in the place of his own must not get that user's rights.
    pub(crate) fn as_owner(&self) -> FileRights {
        let ours = crate::identity::file_ids().0 == rustix::process::geteuid().as_raw();
        match self.path.symlink_metadata() {
            Ok(found) if ours => FileRights::of(found.uid(), found.gid()),
            // Without a directory there is no file either.
            _ => FileRights::unchanged(),
        }
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
        let _as_owner = self.as_owner();
        let mut text = Vec::new();
        if let Ok(file) = open_plain(&self.log_path(), OpenOptions::new().read(true)) {
            // What was read before an error is as good as it gets.
            let _the_rest_is_lost = file.take(COMPLAINTS_BYTES_MAX).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(crate) fn write_launch(&self, launch: &LaunchRecord) -> Result<(), RecordError> {
        self.write(LAUNCH, launch, Durable::Later)
    }

    pub(crate) fn write_recorder(&self, recorder: &ProcessIdentity) -> Result<(), RecordError> {
        self.write(RECORDER, recorder, Durable::Later)
    }

    pub(crate) fn write_trainer(&self, trainer: &TrainerRecord) -> Result<(), RecordError> {
        self.write(TRAINER, trainer, Durable::Later)
    }

    pub(crate) fn write_exit(&self, exit: &ExitRecord) -> Result<(), RecordError> {
        self.write(EXIT, exit, Durable::AtOnce)
    }

    /// Makes what was written so far survive a crash of the machine. Returns whether that was done: it is left where something
    /// `else_is_due`, which may wait for a slow disk for long.
    pub(crate) fn settle(&self, else_is_due: impl Fn() -> bool) -> Result<bool, RecordError> {
        for path in [LAUNCH, RECORDER, TRAINER].map(|name| self.path.join(name)) {
            if else_is_due() {
                return Ok(false);
            }
            match File::open(&path).and_then(|file| file.sync_all()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(RecordError::io("write", &path)(error));
                }
                _ => {}
            }
        }
        self.sync_directory().map_err(RecordError::io("write", &self.path))?;
        Ok(true)
    }

    /// Removes what recorders left half-written when they died. Only the holder of the lock may do that.
    pub(crate) fn remove_temporaries(&self) {
        let ours = |name: &str| [RECORDER, TRAINER, EXIT].iter().any(|file| name.starts_with(*file));
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.ends_with(".tmp") && ours(name)) {
                let _costs_only_space = fs::remove_file(entry.path());
            }
        }
    }

    /// Takes the disk space of the exit status in advance: a full disk is a common end of a trainer, and must not be
    /// the end of the news about it.
    pub(crate) fn reserve_exit(&self) -> Result<(), RecordError> {
        let path = self.temporary(EXIT);
        let mut file =
            open_plain(&path, private(OpenOptions::new().write(true).create(true).truncate(false)))?;
        file.set_len(0)
            .and_then(|()| file.write_all(&[0; 4096]))
            .and_then(|()| file.sync_all())
            .map_err(RecordError::io("write", &path))
    }

    pub(crate) fn write_start_error(&self, message: String) -> Result<(), RecordError> {
        self.write(START_ERROR, &StartError { message }, Durable::AtOnce)
    }

    pub(crate) fn start_error(&self) -> Result<Option<String>, RecordError> {
        Ok(self.read::<StartError>(START_ERROR)?.map(|error| error.message))
    }

    /// Asks whoever records this attempt to stop it. The recorder looks for the file; it need not be told.
    pub(crate) fn write_stop(&self, grace: Duration) -> Result<(), RecordError> {
        self.write_bytes(STOP, format!("{}\n", grace.as_secs_f64()).as_bytes(), Durable::AtOnce)
    }

    /// Returns the text of a stop request.
    pub(crate) fn stop_request(&self) -> Option<String> {
        // Bounded: the file is anybody's, and a number is short. Whatever it is, it asks for a stop.
        let mut text = String::new();
        match open_plain(&self.path.join(STOP), OpenOptions::new().read(true)) {
            Ok(file) => match file.take(64).read_to_string(&mut text) {
                Ok(_) => Some(text),
                Err(_) => Some(String::new()),
            },
            Err(RecordError::NotPlain { .. }) => Some(String::new()),
            Err(_) => None,
        }
    }

    /// Takes the lock that only one recorder can hold. It is free again when the file is closed, however that comes.
    pub(crate) fn lock(&self) -> Result<File, RecordError> {
        let path = self.path.join(LOCK);
        let _as_owner = self.as_owner();
        let file = open_plain(&path, private(OpenOptions::new().write(true).create(true).truncate(false)))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(Errno::WOULDBLOCK) => Err(RecordError::Used { path: self.path.clone() }),
            Err(error) => Err(RecordError::io("lock", &path)(error.into())),
        }
    }

    /// Opens the file into which a recorder writes what goes wrong.
    pub(crate) fn open_log(&self) -> Result<File, RecordError> {
        let _as_owner = self.as_owner();
        open_plain(&self.log_path(), private(OpenOptions::new().append(true).create(true).truncate(false)))
    }

    fn log_path(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// After a crash of the machine a file that was not synced may be found empty or full of zeros. All of them tell of processes
    /// that went with it, so such a one counts as absent.
    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RecordError> {
        let text = self.read_bytes(name)?.filter(|text| text.iter().any(|byte| *byte != 0));
        text.map(|text| self.parse(name, &text)).transpose()
    }

    fn read_bytes(&self, name: &str) -> Result<Option<Vec<u8>>, RecordError> {
        let path = self.path.join(name);
        let _as_owner = self.as_owner();
        let file = match open_plain(&path, OpenOptions::new().read(true)) {
            Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let mut text = Vec::new();
        // One byte more than may be: the file can grow while it is read.
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(RecordError::io("read", &path))?;
        match text.len() as u64 {
            bytes if bytes > FILE_BYTES_MAX => Err(RecordError::TooLarge { path, bytes }),
            _ => Ok(Some(text)),
        }
    }

    fn parse<T: DeserializeOwned>(&self, name: &str, text: &[u8]) -> Result<T, RecordError> {
        let path = self.path.join(name);
        let json = |source| RecordError::Json { path: path.clone(), source };
        let VersionOnly { version } = serde_json::from_slice(text).map_err(json)?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version { path, found: version });
        }
        Ok(serde_json::from_slice::<Versioned<T>>(text).map_err(json)?.content)
    }

    fn write<T: Serialize>(&self, name: &str, content: &T, durable: Durable) -> Result<(), RecordError> {
        let mut text = serde_json::to_vec_pretty(&Versioned { version: RECORD_VERSION, content })
            .map_err(|source| RecordError::Json { path: self.path.join(name), source })?;
        text.push(b'\n');
        self.write_bytes(name, &text, durable)
    }

    /// The pid keeps two writers of one file (two stop requests) from writing the same temporary one.
    fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.{}.tmp", std::process::id()))
    }

    /// Puts a whole file in place: whoever looks finds the old one or the new one, never a part.
    fn write_bytes(&self, name: &str, bytes: &[u8], durable: Durable) -> Result<(), RecordError> {
        let path = self.path.join(name);
        let temporary = self.temporary(name);
        let _as_owner = self.as_owner();
        // Overwritten first and cut afterwards, so that reserved space is used and not given back.
        let mut file =
            open_plain(&temporary, private(OpenOptions::new().write(true).create(true).truncate(false)))?;
        let written = file.write_all(bytes).and_then(|()| file.set_len(bytes.len() as u64));
        if written.is_ok() && durable == Durable::AtOnce {
            // What the disk does not promise to keep is put in place all the same: a status that only a power cut can take is
            // better than none, and a trainer that is to stop is gone after one.
            let _may_go_with_the_power = file.sync_all();
        }
        reach("record.before_rename", name);
        let put = written.and_then(|()| fs::rename(&temporary, &path));
        reach("record.after_rename", name);
        if put.is_ok() && durable == Durable::AtOnce {
            let _may_go_with_the_power = self.sync_directory();
        }
        put.map_err(RecordError::io("write", &path))
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

/// When a file must be able to survive a crash of the machine.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Durable {
    /// Before anybody can read it.
    AtOnce,
    /// When [`RecordDir::settle`] is called.
    Later,
}

/// Opens a plain file and nothing else. A FIFO or a device must not hold us up, a symbolic link not lead us away.
pub(crate) fn open_plain(path: &Path, options: &mut OpenOptions) -> Result<File, RecordError> {
    let not_plain = || RecordError::NotPlain { path: path.to_owned() };
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = options.custom_flags(flags.bits().cast_signed()).open(path);
    let file = opened.map_err(|error| match Errno::from_io_error(&error) {
        // A symbolic link; a FIFO or socket without a reader; a directory.
        Some(Errno::LOOP | Errno::NXIO | Errno::ISDIR) => not_plain(),
        _ => RecordError::io("open", path)(error),
    })?;
    let found = file.metadata().map_err(RecordError::io("look at", path))?;
    if !found.is_file() {
        return Err(not_plain());
    }
    Ok(file)
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
            log_full: false,
            disk_refused: false,
            stop: Some(StopTook::Kill),
            leftovers_killed: Some(3),
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(&dir.path().join("attempt-1"), None).unwrap();
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
        let record = RecordDir::create(&dir.path().join("a"), None).unwrap();
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
        let record = RecordDir::create(dir.path(), None).unwrap();
        fs::write(record.path().join(EXIT), r#"{"version":2,"code":0}"#).unwrap();
        assert!(matches!(record.exit(), Err(RecordError::Version { found: 2, .. })));
        for garbage in ["{", "[]", r#"{"version":1}"#, r#"{"version":1,"code":"x"}"#] {
            fs::write(record.path().join(EXIT), garbage).unwrap();
            assert!(matches!(record.exit(), Err(RecordError::Json { .. })), "{garbage}");
        }
    }

    #[test]
    fn a_directory_serves_one_attempt_only() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(dir.path(), None).unwrap();
        fs::write(record.path().join(LAUNCH), "{}").unwrap();
        assert!(matches!(RecordDir::create(dir.path(), None), Err(RecordError::Used { .. })));
    }

    #[test]
    fn files_that_a_crash_of_the_machine_left_without_content_are_absent() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(dir.path(), None).unwrap();
        for content in [&[0; 512][..], b""] {
            for name in [LAUNCH, RECORDER, TRAINER] {
                fs::write(record.path().join(name), content).unwrap();
            }
            assert!(record.launch().unwrap_err().is_not_found());
            assert_eq!((record.recorder().unwrap(), record.trainer().unwrap()), (None, None));
            // These too: their fsync may have failed before.
            for name in [EXIT, START_ERROR] {
                fs::write(record.path().join(name), content).unwrap();
            }
            assert_eq!((record.exit().unwrap(), record.start_error().unwrap()), (None, None));
            // The launch that the journal tells of came to nothing; that is no broken record.
            assert!(crate::Attempt::open(dir.path()).unwrap_err().is_not_found());
        }
    }

    #[test]
    fn only_one_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(dir.path(), None).unwrap();
        let held = record.lock().unwrap();
        assert!(matches!(record.lock(), Err(RecordError::Used { .. })));
        drop(held);
        record.lock().unwrap();
    }
}
