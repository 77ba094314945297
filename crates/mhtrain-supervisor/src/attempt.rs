//! How does mhtraind start an attempt, follow its state, and end it?
//!
//! ```text
//! launch ──> Starting ──> Running ──> Exited      the recorder saw it end, and nobody is left
//!                │           │
//!                └───────────┴──────> Lost        the recorder died without a word
//! ```
//!
//! All of it is read from the [record directory](crate::record), so [`Attempt::open`] by a later mhtraind sees the same.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use crate::process::{ProcessIdentity, descendants, started_with};
use crate::record::{Ended, ExitRecord, LaunchRecord, RecordDir, RecordError, TrainerRecord, private};
use crate::recorder::{ATTEMPT_VARIABLE, RECORDER_VERB};

/// How often a state is looked at while somebody waits for a change.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long a recorder may take until it says who it is. It only has to be executed and to fsync a file.
const RECORDER_UP_WITHIN: Duration = Duration::from_secs(30);

/// How long killed processes may take to be gone. One that waits for a broken driver or disk may never be.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// What is to be run, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchSpec {
    /// Program and arguments. It is written to disk: no secrets here.
    pub argv: Vec<String>,
    /// The trainer's working directory.
    pub cwd: PathBuf,
    /// Where its standard output is appended. Made with mode 0600.
    pub stdout: PathBuf,
    /// Where its standard error is appended. May be the same file.
    pub stderr: PathBuf,
    /// The time between SIGTERM and SIGKILL when a stop comes from outside (a signal to the recorder).
    pub grace: Duration,
    /// The trainer's umask; `None` keeps ours.
    pub umask: Option<u32>,
    /// How much disk each log file may take; beyond it the middle is dropped. `None` is no bound.
    pub log_cap_bytes: Option<u64>,
}

/// Where an attempt stands.
#[derive(Clone, Debug, PartialEq)]
pub enum AttemptState {
    /// The recorder is up, the trainer does not run yet.
    Starting,
    /// The trainer runs, or what it left behind is being ended.
    Running {
        /// The trainer.
        trainer: TrainerRecord,
    },
    /// The trainer ended and its status is known. Nobody is left, unless `leftovers_killed` is `None`: then the
    /// recorder died too early to say so, and [`Attempt::kill_everything`] has to be called.
    Exited(ExitRecord),
    /// The recorder is gone and left no exit status. Call [`Attempt::kill_everything`] before anything is started again.
    Lost {
        /// Whether the trainer still runs.
        trainer_alive: bool,
    },
}

/// One attempt: a trainer with its recorder.
#[derive(Clone, Debug)]
pub struct Attempt {
    record: RecordDir,
}

/// Why an attempt could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// There is nothing to run.
    #[error("cannot start an attempt with an empty command")]
    EmptyCommand,
    /// The record directory could not be prepared.
    #[error("cannot prepare the record of the attempt")]
    Record(#[from] RecordError),
    /// The recorder could not be executed.
    #[error("cannot start the recorder {exe}")]
    Recorder {
        /// The program.
        exe: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The recorder ended before it was up.
    #[error("the recorder of {record} ended with {status} before it was up: {complaints}")]
    RecorderDied {
        /// The record directory.
        record: PathBuf,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it wrote.
        complaints: String,
    },
    /// The recorder did not come up.
    #[error("the recorder of {record} was not up after {} s", RECORDER_UP_WITHIN.as_secs())]
    RecorderSilent {
        /// The record directory.
        record: PathBuf,
    },
}

impl SpawnError {
    /// Returns what the reader can do, where there is something.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            SpawnError::EmptyCommand => None,
            SpawnError::Record(error) => error.help(),
            SpawnError::Recorder { exe, .. } => Some(format!("check that {} can be executed", exe.display())),
            SpawnError::RecorderDied { record, .. } | SpawnError::RecorderSilent { record } => {
                Some(format!("check free space, mode and load of the disk that holds {}", record.display()))
            }
        }
    }
}

/// Why an attempt could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The request could not be written, or the record not be read.
    #[error("cannot ask the recorder to stop the attempt")]
    Record(#[from] RecordError),
    /// Nobody is there to do it.
    #[error("the recorder of {record} is gone")]
    RecorderGone {
        /// The record directory.
        record: PathBuf,
    },
    /// The processes could not be listed.
    #[error("cannot list the processes of the attempt")]
    List(#[source] io::Error),
    /// They were killed and are still there.
    #[error("{} processes are still there {} s after SIGKILL: pids {pids:?}", pids.len(), KILLED_WITHIN.as_secs())]
    StillThere {
        /// Which.
        pids: Vec<u32>,
    },
}

impl StopError {
    /// Returns what the reader can do, where there is something.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            StopError::Record(error) => error.help(),
            StopError::RecorderGone { .. } => Some("end what it left behind by killing everything".to_owned()),
            StopError::List(_) => Some("check that /proc is mounted".to_owned()),
            StopError::StillThere { .. } => Some(
                "a process that ignores SIGKILL waits inside the kernel, usually for a disk or a device driver: \
                 see `ps -o pid,stat,wchan` and the kernel log"
                    .to_owned(),
            ),
        }
    }
}

impl Attempt {
    /// Starts a recorder, which starts the trainer. Returns when the recorder is up; it outlives us.
    ///
    /// `exe` is a program that calls [`recorder_main`](crate::recorder::recorder_main) and
    /// [`gate_main`](crate::recorder::gate_main) for the two hidden verbs. `env` is the whole environment of the
    /// trainer; nothing of ours is added but the variable that marks the attempt's processes. A trainer that cannot
    /// be executed is no error here: the state becomes [`Ended::NotStarted`].
    ///
    /// # Errors
    /// When the record cannot be written, or the recorder does not come up. Then nothing runs.
    pub fn launch(
        exe: &Path,
        record_dir: &Path,
        spec: &LaunchSpec,
        env: &BTreeMap<OsString, OsString>,
    ) -> Result<Attempt, SpawnError> {
        if spec.argv.is_empty() {
            return Err(SpawnError::EmptyCommand);
        }
        let record = RecordDir::create(record_dir)?;
        record.write_launch(&spec.to_record())?;
        let mut recorder = spawn_recorder(exe, &record, env)
            .map_err(|source| SpawnError::Recorder { exe: exe.to_owned(), source })?;
        if let Err(error) = wait_until_up(&mut recorder, &record) {
            // Killing one that already ended fails, and is then not needed. The gate closes with its recorder.
            let _already_gone = recorder.kill();
            let _already_reaped = recorder.wait();
            return Err(error);
        }
        reap_later(recorder);
        Ok(Attempt { record })
    }

    /// Opens an attempt that somebody else started, dead or alive.
    ///
    /// # Errors
    /// When the directory holds no attempt.
    pub fn open(record_dir: &Path) -> Result<Attempt, RecordError> {
        let record = RecordDir::open(record_dir)?;
        record.launch()?;
        Ok(Attempt { record })
    }

    /// Returns the files about this attempt.
    #[must_use]
    pub fn record(&self) -> &RecordDir {
        &self.record
    }

    /// Gives the attempt up if no recorder has come up yet, for good: a recorder that comes later finds itself recorded
    /// as nobody and ends. Returns whether it was given up; if not, the recorder is up, or comes up within the time that
    /// recorders have.
    ///
    /// For a launch that was cut off by the death of the process that launched.
    ///
    /// # Errors
    /// When the record cannot be read or written.
    pub fn abandon_unrecorded(&self) -> Result<bool, RecordError> {
        let until = Instant::now() + RECORDER_UP_WITHIN;
        loop {
            if self.record.recorder()?.is_some() {
                return Ok(false);
            }
            // A recorder takes this lock before it says who it is, and holds it while it lives.
            match self.record.lock() {
                Ok(_held) => {
                    if self.record.recorder()?.is_some() {
                        return Ok(false);
                    }
                    self.record.write_recorder(&ProcessIdentity::nobody())?;
                    return Ok(true);
                }
                Err(RecordError::Used { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns where the attempt stands now.
    ///
    /// # Errors
    /// When a file of the record cannot be read.
    pub fn state(&self) -> Result<AttemptState, RecordError> {
        // Who is alive is asked before the files are read: a recorder that writes its last word and ends between the
        // two must be seen as exited, not as lost.
        let recorder_alive = self.record.recorder()?.is_some_and(|recorder| recorder.is_alive());
        let trainer = self.record.trainer()?;
        let trainer_alive = trainer.as_ref().is_some_and(|trainer| trainer.identity.is_alive());
        Ok(match (self.record.exit()?, trainer) {
            (Some(exit), _) if exit.leftovers_killed.is_some() || !recorder_alive => {
                AttemptState::Exited(exit)
            }
            (_, Some(trainer)) if recorder_alive => AttemptState::Running { trainer },
            (_, None) if recorder_alive => AttemptState::Starting,
            (_, _) => AttemptState::Lost { trainer_alive },
        })
    }

    /// Waits until the state is not `seen` any more, or until `timeout` has passed. Returns the state then.
    ///
    /// # Errors
    /// When a file of the record cannot be read.
    pub fn wait_for_change(
        &self,
        seen: &AttemptState,
        timeout: Duration,
    ) -> Result<AttemptState, RecordError> {
        let until = Instant::now() + timeout;
        let mut recorder = self.record.recorder()?.and_then(|recorder| watch_end(&recorder));
        loop {
            let state = self.state()?;
            let left = until.saturating_duration_since(Instant::now());
            if state != *seen || left.is_zero() {
                return Ok(state);
            }
            let ended = pause(recorder.as_ref(), left.min(LOOK_AGAIN));
            if ended {
                recorder = None;
            }
        }
    }

    /// Asks the recorder for a stop: SIGTERM to the trainer alone, SIGKILL to everything after `grace`.
    /// Returns at once. A later request can shorten the grace period, not lengthen it.
    ///
    /// # Errors
    /// When the request cannot be written, or the recorder is gone.
    pub fn request_stop(&self, grace: Duration) -> Result<(), StopError> {
        let gone = || StopError::RecorderGone { record: self.record.path().to_owned() };
        let recorder = self.record.recorder()?.ok_or_else(gone)?;
        self.record.write_stop(grace)?;
        // The signal only makes the recorder look at once. Where it may not be sent (another user), the file is found soon.
        match recorder.signal(Signal::TERM) {
            Ok(true) => Ok(()),
            Ok(false) => Err(gone()),
            Err(_) if recorder.is_alive() => Ok(()),
            Err(_) => Err(gone()),
        }
    }

    /// Kills everything that this attempt started, and returns how many processes that were.
    ///
    /// For an attempt whose recorder is gone. A recorder that still lives is killed first, so its exit status is lost:
    /// prefer [`Attempt::request_stop`] while there is one. Descendants are found through their parents, and those whose
    /// parent is gone through the variable that marks them; one that cleared its environment as well escapes.
    ///
    /// # Errors
    /// When processes cannot be listed, or are still there long after the kill.
    pub fn kill_everything(&self) -> Result<usize, StopError> {
        let until = Instant::now() + KILLED_WITHIN;
        let mut killed = BTreeSet::new();
        if let Some(recorder) = self.record.recorder()?
            && recorder.is_alive()
        {
            // Its descendants become orphans; they are marked. Failure shows below: they stay.
            let _refused = recorder.signal(Signal::KILL);
        }
        loop {
            let alive = self.survivors()?;
            if alive.is_empty() {
                return Ok(killed.len());
            }
            if Instant::now() >= until {
                return Err(StopError::StillThere {
                    pids: alive.iter().map(|process| process.pid).collect(),
                });
            }
            for process in alive {
                // A refusal shows as a process that is still there at the end.
                let _refused = process.signal(Signal::KILL);
                killed.insert(process);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns who of this attempt is alive, the recorder excepted.
    fn survivors(&self) -> Result<BTreeSet<ProcessIdentity>, StopError> {
        let mark = self.record.path().as_os_str();
        let mut alive: BTreeSet<_> =
            started_with(ATTEMPT_VARIABLE, mark).map_err(StopError::List)?.into_iter().collect();
        if let Some(trainer) = self.record.trainer()?
            && trainer.identity.is_alive()
        {
            alive.insert(trainer.identity);
        }
        for process in alive.clone() {
            alive.extend(descendants(process.pid).map_err(StopError::List)?);
        }
        Ok(alive)
    }
}

impl LaunchSpec {
    fn to_record(&self) -> LaunchRecord {
        LaunchRecord {
            argv: self.argv.clone(),
            cwd: self.cwd.clone(),
            stdout: self.stdout.clone(),
            stderr: self.stderr.clone(),
            grace_s: self.grace.as_secs_f64(),
            umask: self.umask,
            log_cap_bytes: self.log_cap_bytes,
        }
    }
}

impl ExitRecord {
    /// Returns whether the trainer exited with status 0. That alone is no success.
    #[must_use]
    pub fn is_exit_zero(&self) -> bool {
        self.ended == Ended::Code(0)
    }
}

fn spawn_recorder(exe: &Path, record: &RecordDir, env: &BTreeMap<OsString, OsString>) -> io::Result<Child> {
    let complaints = private(OpenOptions::new().append(true).create(true)).open(record.log_path())?;
    let mut command = Command::new(exe);
    command.args([OsStr::new(RECORDER_VERB), record.path().as_os_str()]);
    command.env_clear().envs(env).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(complaints);
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are sound. setsid(2) is one,
    // and rustix calls it without taking a lock or memory.
    unsafe {
        // Before the exec, so that a terminal's Ctrl-C has no moment in which it could end the recorder.
        command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
    }
    command.spawn()
}

fn wait_until_up(recorder: &mut Child, record: &RecordDir) -> Result<(), SpawnError> {
    let until = Instant::now() + RECORDER_UP_WITHIN;
    let path = || record.path().to_owned();
    loop {
        let ended = recorder.try_wait().ok().flatten();
        if record.recorder()?.is_some() {
            return Ok(());
        }
        if let Some(status) = ended {
            let complaints = record.complaints().trim().to_owned();
            return Err(SpawnError::RecorderDied { record: path(), status, complaints });
        }
        if Instant::now() >= until {
            return Err(SpawnError::RecorderSilent { record: path() });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Keeps the recorder from staying a zombie of ours. It is no loss if that fails: a zombie counts as dead.
fn reap_later(mut recorder: Child) {
    let reaper = std::thread::Builder::new().name("recorder-reaper".to_owned());
    let _zombie_until_we_end = reaper.spawn(move || recorder.wait());
}

/// Returns a descriptor that becomes readable when the process ends; `None` where the kernel has no such thing.
fn watch_end(process: &ProcessIdentity) -> Option<std::os::fd::OwnedFd> {
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw)?;
    let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    process.is_alive().then_some(handle)
}

/// Waits for `at_most`, or until the watched process ends. Returns whether it ended.
fn pause(watched: Option<&std::os::fd::OwnedFd>, at_most: Duration) -> bool {
    let Some(watched) = watched else {
        std::thread::sleep(at_most);
        return false;
    };
    let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: at_most.subsec_nanos().into() };
    matches!(poll(&mut [PollFd::new(watched, PollFlags::IN)], Some(&timeout)), Ok(1..))
}
