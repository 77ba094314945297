//! How does mhtraind start an attempt, follow its state, and end it?
//!
//! ```text
//! launch ──> Starting ──> Running ──> Exited      the recorder saw it end, and nobody is left
//!                │           │
//!                └───────────┴──────> Lost        the recorder died without a word
//!                            ^          │
//!                            └──────────┘ take_over: a new recorder, the exit status is lost
//! ```
//!
//! All of it is read from the [record directory](crate::record), so [`Attempt::open`] by a later mhtraind sees the same.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use mhtrain_failpoint::{DIRECTORY_VARIABLE, reach};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, pidfd_open, waitid, waitpid,
};

use crate::adopt::ADOPT_VERB;
use crate::cgroup::{Cgroup, Group};
use crate::identity::{FileRights, Identity, Switch};
use crate::process::{ProcessIdentity, family};
use crate::record::{Ended, ExitRecord, Extent, LaunchRecord, RecordDir, RecordError, TrainerRecord};
use crate::recorder::{ATTEMPT_VARIABLE, DISK_REFUSED, RECORDER_VERB};
use crate::spawn::{self, Start};
use crate::wake::{self, Arrivals, end_of};

/// How often a state is looked at while somebody waits for a change, where the kernel tells us of none.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The same where it does. Another host may write to a network file system and tell nobody.
const LOOK_AGAIN_WHEN_WOKEN: Duration = Duration::from_secs(1);

/// How often a recorder that does not come up is looked at, where the kernel tells us nothing.
const IS_IT_UP: Duration = Duration::from_millis(2);

/// How long a recorder may take until it says who it is. It only has to be executed and to write a file.
const RECORDER_UP_WITHIN: Duration = Duration::from_secs(30);

/// How long a recorder may take from its last word to its end.
const RECORDER_GONE_WITHIN: Duration = Duration::from_secs(1);

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
    /// As whom recorder and trainer run; `None` is our own user. Only root can name another one.
    pub identity: Option<Identity>,
    /// How everything that the trainer starts is to be found. A cgroup is made where we may; else it is a sub-reaper whatever
    /// is asked for, and [`TrainerRecord::extent`] says so.
    pub extent: Extent,
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
    /// recorder died too early to say so, and [`Attempt::take_over`] or [`Attempt::kill_everything`] has to be called.
    Exited(ExitRecord),
    /// The recorder is gone and left no exit status. Call [`Attempt::take_over`] to go on with the trainer or to end what is
    /// left of it, or [`Attempt::kill_everything`], before anything is started again.
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
    /// Only root becomes another user.
    #[error("cannot start a recorder as uid {uid}")]
    Identity {
        /// The user.
        uid: u32,
        /// What is wrong with it.
        source: io::Error,
    },
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
        status: ExitStatus,
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

/// Returns whether an error is about the disk as it is now and not about what was asked of it, or by whom.
pub(crate) fn is_of_the_disk(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let now = [Errno::NOSPC, Errno::DQUOT, Errno::ROFS, Errno::IO];
    Errno::from_io_error(error).is_some_and(|errno| now.contains(&errno))
}

impl SpawnError {
    /// Returns whether a signal ended the recorder before it was up. Then nothing is wrong with what was to be run, and
    /// another attempt may be started.
    #[must_use]
    pub fn is_recorder_killed(&self) -> bool {
        matches!(self, SpawnError::RecorderDied { status, .. } if status.signal().is_some())
    }

    /// Returns whether the disk does not take the record now: it is full, broken or read-only.
    #[must_use]
    pub fn is_unwritable(&self) -> bool {
        match self {
            SpawnError::Record(RecordError::Io { source, .. }) => is_of_the_disk(source),
            SpawnError::RecorderDied { status, .. } => status.code() == Some(DISK_REFUSED),
            _ => false,
        }
    }

    /// Returns what the reader can do, where there is something.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            SpawnError::EmptyCommand => None,
            SpawnError::Record(error) => error.help(),
            SpawnError::Identity { .. } => {
                Some("run mhtraind as root to serve several users, or as that user".to_owned())
            }
            SpawnError::Recorder { exe, .. } => {
                Some(format!("check that {} can be executed by the user of the attempt", exe.display()))
            }
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
    /// The record names processes of somebody else.
    #[error("pid {pid}, which {record} names as the recorder, does not belong to uid {owner}")]
    NotTheirs {
        /// The process.
        pid: u32,
        /// The record directory.
        record: PathBuf,
        /// The owner of the record.
        owner: u32,
    },
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
            StopError::NotTheirs { record, .. } => {
                Some(format!("the owner of {} changed it; nothing was signalled", record.display()))
            }
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
    /// [`adopt_main`](crate::adopt::adopt_main) for the two hidden verbs.
    /// `env` is the whole environment of the trainer; nothing of ours is added but the variable that marks the attempt's
    /// processes. A trainer that cannot be executed is no error here: the state becomes [`Ended::NotStarted`].
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
        let switch = switch_to(spec.identity.as_ref())?;
        let record = RecordDir::create(record_dir, spec.identity.as_ref())?;
        // The intention is on disk before the effect: whoever comes later knows where to look.
        let planned = match spec.extent {
            Extent::Cgroup => Cgroup::plan(record.path()),
            Extent::Subreaper => None,
        };
        reach("launch.directory_made", "");
        record.write_launch(&spec.to_record(planned.clone()))?;
        let log = record.open_log()?;
        let cgroup = planned.as_ref().and_then(|planned| make_cgroup(planned, spec.identity.as_ref(), &log));
        if planned.is_some() && cgroup.is_none() {
            // Whoever is in a cgroup of that name is not ours to kill.
            record.write_launch(&spec.to_record(None))?;
        }
        let group = cgroup.as_ref().map(Cgroup::recorder);
        reach("launch.cgroup_made", "");
        let attempt = Attempt { record };
        let environment = env.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        let started = attempt.start_recorder(exe, RECORDER_VERB, environment, switch, group, &log);
        if started.is_err() {
            // The gate closed with its recorder.
            let _nobody_or_found_later = attempt.kill_everything();
            let _left_empty = cgroup.map(|cgroup| cgroup.remove());
        }
        started.map(|()| attempt)
    }

    /// Starts a recorder for an attempt whose own died. Returns when it is up; it goes on with a live trainer, and ends what a
    /// dead one left behind. The trainer's exit status is lost: it becomes [`Ended::StatusLost`]. Can be called again at any
    /// time: where a recorder lives, or nobody is left, nothing happens.
    ///
    /// `identity` must be that of the launch. It is not taken from the record, which its user can change.
    ///
    /// # Errors
    /// When the record cannot be read or belongs to another user, or the recorder does not come up. Whatever ran still runs.
    pub fn take_over(&self, exe: &Path, identity: Option<&Identity>) -> Result<(), SpawnError> {
        let switch = switch_to(identity)?;
        self.must_belong_to(identity)?;
        if self.needs_no_recorder()? {
            return Ok(());
        }
        let log = self.record.open_log()?;
        let group = self.cgroup()?.map(|cgroup| cgroup.recorder());
        match self.start_recorder(exe, ADOPT_VERB, Vec::new(), switch, group, &log) {
            // Somebody else was faster.
            Err(_) if self.needs_no_recorder()? => Ok(()),
            result => result,
        }
    }

    /// Returns whether a recorder lives, or has said that nobody is left.
    fn needs_no_recorder(&self) -> Result<bool, RecordError> {
        Ok(match self.state()? {
            AttemptState::Starting | AttemptState::Running { .. } => true,
            AttemptState::Exited(exit) => exit.leftovers_killed.is_some(),
            AttemptState::Lost { .. } => false,
        })
    }

    fn start_recorder(
        &self,
        exe: &Path,
        verb: &str,
        environment: Vec<(OsString, OsString)>,
        switch: Option<Switch>,
        group: Option<Group>,
        log: &File,
    ) -> Result<(), SpawnError> {
        let arrivals = self.arrivals();
        let pid = spawn_recorder(exe, verb, &self.record, environment, switch, group.as_ref(), log)
            .map_err(|source| SpawnError::Recorder { exe: exe.to_owned(), source })?;
        reach("launch.recorder_spawned", verb);
        let up = self.wait_until_up(pid, arrivals.as_ref());
        reach("launch.recorder_up", verb);
        if up.is_err() {
            // Not reaped yet, so the pid is still its own. Killing one that already ended does nothing.
            let _already_gone = rustix::process::kill_process(pid, Signal::KILL);
            // Silent because of a broken disk, it may stay inside the kernel: it does nothing any more then.
            let until = Instant::now() + KILLED_WITHIN;
            while has_ended(pid).is_none() && Instant::now() < until {
                std::thread::sleep(IS_IT_UP);
            }
        }
        self.clone().reap_later(pid);
        up
    }

    /// Opens an attempt that somebody else started, dead or alive.
    ///
    /// A daemon that serves several users calls [`Attempt::open_of`]: where a user can write into the parent directory, another
    /// user's record may be in the place of his own.
    ///
    /// # Errors
    /// When the directory holds no attempt.
    pub fn open(record_dir: &Path) -> Result<Attempt, RecordError> {
        let record = RecordDir::open(record_dir)?;
        record.launch()?;
        let attempt = Attempt { record };
        // What a recorder may not remove itself. Somebody who may not either has no reason to care.
        let _by_somebody_else = attempt.clean_up();
        Ok(attempt)
    }

    /// Like [`Attempt::open`], for an attempt that was launched with `identity`.
    ///
    /// # Errors
    /// As [`Attempt::open`], and when the directory belongs to another user.
    pub fn open_of(record_dir: &Path, identity: Option<&Identity>) -> Result<Attempt, RecordError> {
        let attempt = Attempt::open(record_dir)?;
        attempt.must_belong_to(identity)?;
        Ok(attempt)
    }

    fn must_belong_to(&self, identity: Option<&Identity>) -> Result<(), RecordError> {
        let wanted = identity.map_or(rustix::process::geteuid().as_raw(), |identity| identity.uid);
        let found = self.record.owner()?;
        if found == wanted {
            return Ok(());
        }
        Err(RecordError::Foreign { path: self.record.path().to_owned(), found, wanted })
    }

    /// Removes the empty cgroups of an attempt that is over. Returns whether it left none behind. Whoever launched it, or opens
    /// it again, does so anyway; a program that ends right after an attempt calls it.
    ///
    /// # Errors
    /// When a file of the record cannot be read.
    pub fn clean_up(&self) -> Result<bool, RecordError> {
        let over = match self.state()? {
            AttemptState::Exited(_) => true,
            // Without a recorder.json the launch may be under way.
            AttemptState::Lost { trainer_alive } => !trainer_alive && self.record.recorder()?.is_some(),
            AttemptState::Starting | AttemptState::Running { .. } => false,
        };
        if !over {
            return Ok(false);
        }
        if let Some(end) = self.record.recorder()?.as_ref().and_then(end_of) {
            // It said its last word and is about to go.
            wake::wait(&[(end.as_fd(), PollFlags::IN)], RECORDER_GONE_WITHIN);
        }
        Ok(self.cgroup()?.is_none_or(|cgroup| cgroup.remove().is_ok()))
    }

    /// Returns the attempt's cgroup while there is one.
    fn cgroup(&self) -> Result<Option<Cgroup>, RecordError> {
        let owner = self.record.owner()?;
        let launch = self.record.launch();
        // Another user may have something to hide: then it is also looked for where we would have made it. Nobody but root
        // makes one there and gives it to him.
        let hidden = launch.is_err() || must_check(owner);
        let planned = hidden.then(|| Cgroup::plan(self.record.path())).flatten();
        let candidates = launch.ok().and_then(|launch| launch.cgroup).into_iter().chain(planned);
        Ok(candidates.filter_map(|directory| Cgroup::open(&directory, self.record.path(), owner)).next())
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
    /// For a launch that was cut off by the death of the process that launched. It need not survive a crash of the machine,
    /// and no recorder would.
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
                    let _by_whoever_opens_it_next = self.clean_up();
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

    /// Returns what wakes whoever follows the attempt in an event loop: files of the record come when its state changes, but a
    /// recorder that dies leaves none: see [`Attempt::recorder_end`]. `None` where the kernel tells us nothing.
    #[must_use]
    pub fn arrivals(&self) -> Option<Arrivals> {
        let _as_owner = self.record.as_owner();
        Arrivals::in_directory(self.record.path())
    }

    /// Returns a descriptor that becomes readable, for good, when the recorder ends: one that is killed leaves no file. `None`
    /// where there is none that lives, and where the kernel tells us nothing.
    #[must_use]
    pub fn recorder_end(&self) -> Option<OwnedFd> {
        // A file that cannot be read is told by the next look at the state.
        self.record.recorder().ok().flatten().as_ref().and_then(end_of)
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
        // From before the first look, so that nothing comes in between.
        let arrivals = self.arrivals();
        loop {
            if let Some(arrivals) = &arrivals {
                arrivals.forget();
            }
            let ends = self.ends_that_matter(seen)?;
            let state = self.state()?;
            let left = until.saturating_duration_since(Instant::now());
            if state != *seen || left.is_zero() {
                return Ok(state);
            }
            let mut wakes: Vec<_> = ends.iter().flatten().map(|end| (end.as_fd(), PollFlags::IN)).collect();
            wakes.extend(arrivals.as_ref().map(|arrivals| (arrivals.as_fd(), PollFlags::IN)));
            let woken = arrivals.is_some() && ends.iter().all(Option::is_some);
            wake::wait(&wakes, left.min(if woken { LOOK_AGAIN_WHEN_WOKEN } else { LOOK_AGAIN }));
        }
    }

    /// Returns what says that a process ended whose end changes the state; `None` for one that lives and cannot be watched.
    fn ends_that_matter(&self, seen: &AttemptState) -> Result<Vec<Option<OwnedFd>>, RecordError> {
        let mut alive: Vec<_> = self.record.recorder()?.into_iter().collect();
        if let AttemptState::Lost { trainer_alive: true } = seen {
            alive.extend(self.record.trainer()?.map(|trainer| trainer.identity));
        }
        Ok(alive.iter().filter(|process| process.is_alive()).map(end_of).collect())
    }

    /// Asks the recorder for a stop: SIGTERM to the trainer alone, SIGKILL to everything after `grace`.
    /// Returns at once. A later request can shorten the grace period, not lengthen it.
    ///
    /// # Errors
    /// When the request cannot be written, or the recorder is gone.
    pub fn request_stop(&self, grace: Duration) -> Result<(), StopError> {
        let gone = || StopError::RecorderGone { record: self.record.path().to_owned() };
        let recorder = self.record.recorder()?.ok_or_else(gone)?;
        let was_alive = recorder.is_alive();
        if was_alive && !self.is_ours_to_signal(&recorder)? {
            let (record, owner) = (self.record.path().to_owned(), self.record.owner()?);
            return Err(StopError::NotTheirs { pid: recorder.pid, record, owner });
        }
        self.record.write_stop(grace)?;
        reach("stop.written", "");
        // The signal only makes the recorder look at once. Where it may not be sent (another user), the file is found soon.
        match recorder.signal(Signal::TERM) {
            Ok(true) => Ok(()),
            Err(_) if recorder.is_alive() => Ok(()),
            // It had found the file, and was done before the signal was sent.
            Ok(false) | Err(_) if was_alive && self.record.exit()?.is_some() => Ok(()),
            Ok(false) | Err(_) => Err(gone()),
        }
    }

    /// Kills everything that this attempt started, and returns how many processes that were.
    ///
    /// For an attempt whose recorder is gone. A recorder that still lives is killed first, so its exit status is lost:
    /// prefer [`Attempt::request_stop`] while there is one. Where the attempt has a cgroup nobody escapes. Without one,
    /// descendants are found through their parents, and those whose parent is gone through the variable that marks them; one
    /// that cleared its environment as well escapes. A file of the record that cannot be read is no obstacle; an attempt that
    /// cannot be opened for that reason can be made of its [`RecordDir`].
    ///
    /// # Errors
    /// When processes cannot be listed, or are still there long after the kill.
    pub fn kill_everything(&self) -> Result<usize, StopError> {
        let until = Instant::now() + KILLED_WITHIN;
        let recorder = self.record.recorder().unwrap_or_default();
        if let Some(recorder) = &recorder
            && recorder.is_alive()
            && self.is_ours_to_signal(recorder)?
        {
            // Its descendants become orphans; they are marked. Failure shows below: they stay.
            let _refused = recorder.signal(Signal::KILL);
        }
        let cgroup = self.cgroup()?;
        let group = cgroup.as_ref().map(Cgroup::whole);
        let mut killed = BTreeSet::new();
        loop {
            let alive = self.survivors(group.as_ref())?;
            let populated = || group.as_ref().and_then(|group| group.population().ok());
            let populated = || populated().is_some_and(|population| population.is_populated());
            // Two looks: in one listing of /proc somebody can hide who forks and ends while it is read.
            // One that is ending loses its mark before its files, and with them its device: it is waited for by name.
            let nobody = alive.is_empty() && !killed.iter().any(ProcessIdentity::is_alive);
            if nobody && !populated() && self.survivors(group.as_ref())?.is_empty() {
                killed.retain(|process| Some(process) != recorder.as_ref());
                let _by_whoever_comes_next = cgroup.map(|cgroup| cgroup.remove());
                return Ok(killed.len());
            }
            if Instant::now() >= until {
                killed.extend(alive);
                let there = killed.iter().filter(|process| process.is_alive());
                return Err(StopError::StillThere { pids: there.map(|process| process.pid).collect() });
            }
            for process in alive {
                // A refusal shows as a process that is still there at the end.
                let _refused = process.signal(Signal::KILL);
                killed.insert(process);
            }
            if let Some(group) = &group {
                let _as_ourselves = FileRights::of_this_process();
                // Kernels before 5.14 cannot; then the loop comes again.
                let _comes_again = group.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns who of this attempt is alive, the recorder excepted where it is outside of the cgroup.
    fn survivors(&self, cgroup: Option<&Group>) -> Result<BTreeSet<ProcessIdentity>, StopError> {
        let trainer = self.record.trainer().unwrap_or_default().map(|trainer| trainer.identity);
        let owner = self.record.owner()?;
        let _as_ourselves = FileRights::of_this_process();
        let mut alive = family(ATTEMPT_VARIABLE, self.record.path().as_os_str(), trainer.as_ref())
            .map_err(StopError::List)?;
        if must_check(owner) {
            alive.retain(|process| process.is_of_user(owner));
        }
        alive.extend(cgroup.map(Group::members).into_iter().flatten());
        Ok(alive)
    }

    /// Returns whether the owner of the record could signal the process himself. A record can name anybody.
    fn is_ours_to_signal(&self, process: &ProcessIdentity) -> Result<bool, RecordError> {
        let owner = self.record.owner()?;
        Ok(!must_check(owner) || process.is_of_user(owner))
    }

    /// Waits for the recorder's own word that it is there, or that there was nothing to do.
    fn wait_until_up(&self, pid: Pid, arrivals: Option<&Arrivals>) -> Result<(), SpawnError> {
        let until = Instant::now() + RECORDER_UP_WITHIN;
        let path = || self.record.path().to_owned();
        let end = pidfd_open(pid, PidfdFlags::empty()).ok();
        let number = pid.as_raw_nonzero().get().cast_unsigned();
        loop {
            if let Some(arrivals) = arrivals {
                arrivals.forget();
            }
            let ended = has_ended(pid);
            if self.record.recorder()?.is_some_and(|recorder| recorder.pid == number) {
                return Ok(());
            }
            match ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let mut complaints = self.record.complaints().trim().to_owned();
                    if complaints.is_empty() && status.code() == Some(DISK_REFUSED) {
                        // Not even that was taken.
                        "the disk does not take its files".clone_into(&mut complaints);
                    }
                    return Err(SpawnError::RecorderDied { record: path(), status, complaints });
                }
                None if Instant::now() >= until => {
                    return Err(SpawnError::RecorderSilent { record: path() });
                }
                None => {}
            }
            let mut wakes: Vec<_> = end.iter().map(|end| (end.as_fd(), PollFlags::IN)).collect();
            wakes.extend(arrivals.map(|arrivals| (arrivals.as_fd(), PollFlags::IN)));
            let at_most = if wakes.len() == 2 { LOOK_AGAIN } else { IS_IT_UP };
            wake::wait(&wakes, at_most);
        }
    }

    /// Keeps the recorder from staying a zombie of ours, and removes what it could not. It is no loss if that fails: a zombie
    /// counts as dead.
    fn reap_later(self, pid: Pid) {
        let reaper = std::thread::Builder::new().name("recorder-reaper".to_owned());
        let _zombie_until_we_end = reaper.spawn(move || {
            let _waited = wait_for_end(pid);
            let _by_whoever_comes_next = self.clean_up();
        });
    }
}

/// Returns whether a process that a record of `owner` names must be shown to be that user's: the kernel lets root signal all.
fn must_check(owner: u32) -> bool {
    rustix::process::geteuid().is_root() && owner != 0
}

fn switch_to(identity: Option<&Identity>) -> Result<Option<Switch>, SpawnError> {
    let Some(identity) = identity else { return Ok(None) };
    identity.switch().map_err(|source| SpawnError::Identity { uid: identity.uid, source })
}

/// Returns `None` where the attempt has to do without, and says why in the recorder's log.
fn make_cgroup(planned: &Path, identity: Option<&Identity>, mut log: &File) -> Option<Cgroup> {
    match Cgroup::create(planned, identity) {
        Ok(cgroup) => Some(cgroup),
        Err(error) => {
            let _not_worth_an_attempt =
                writeln!(log, "without a cgroup of its own: cannot make {}: {error}", planned.display());
            None
        }
    }
}

/// For [`Attempt::kill_everything`]: nothing is read, so the record may be damaged or hostile.
impl From<RecordDir> for Attempt {
    fn from(record: RecordDir) -> Attempt {
        Attempt { record }
    }
}

impl LaunchSpec {
    fn to_record(&self, cgroup: Option<PathBuf>) -> LaunchRecord {
        LaunchRecord {
            argv: self.argv.clone(),
            cwd: self.cwd.clone(),
            stdout: self.stdout.clone(),
            stderr: self.stderr.clone(),
            grace_s: self.grace.as_secs_f64(),
            umask: self.umask,
            log_cap_bytes: self.log_cap_bytes,
            identity: self.identity.clone(),
            cgroup,
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

fn spawn_recorder(
    exe: &Path,
    verb: &str,
    record: &RecordDir,
    mut environment: Vec<(OsString, OsString)>,
    switch: Option<Switch>,
    group: Option<&Group>,
    log: &File,
) -> io::Result<Pid> {
    environment.extend(mhtrain_failpoint::directory().map(|it| (DIRECTORY_VARIABLE.into(), it)));
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let arguments = [OsStr::new(verb), record.path().as_os_str()];
    let stdio = [null.as_fd(), null.as_fd(), log.as_fd()];
    // To become somebody else in memory that is shared would make the daemon somebody whom that user's debugger may look at.
    let copies_memory = switch.is_some();
    let start = Start { program: exe, arguments: &arguments, environment, stdio, group, copies_memory };
    // The child begins with the rights of this thread, and only root's put it into the cgroup.
    let _as_ourselves = FileRights::of_this_process();
    // SAFETY: all of it is system calls through rustix, which takes neither memory nor locks for them.
    unsafe {
        spawn::spawn(start, || {
            // Before the exec, so that a terminal's Ctrl-C has no moment in which it could end the recorder.
            rustix::process::setsid()?;
            rustix::process::chdir(c"/")?;
            switch.as_ref().map_or(Ok(()), Switch::carry_out)
        })
    }
}

/// Returns how a child ended, or `None` while it lives. It is not reaped: then its pid could be another child's, which the
/// one who reaps later would wait for.
pub(crate) fn has_ended(pid: Pid) -> Option<ExitStatus> {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::Pid(pid), look) {
        // As wait(2) packs it: the code in the second byte, or the signal in the first.
        Ok(Some(status)) => {
            let code = status.exit_status().map_or(0, |code| (code & 0xff) << 8);
            Some(ExitStatus::from_raw(status.terminating_signal().unwrap_or(code)))
        }
        Ok(None) | Err(Errno::INTR) => None,
        // Whoever ignores SIGCHLD is never told the status.
        Err(_) => Some(ExitStatus::from_raw(-1)),
    }
}

fn wait_for_end(pid: Pid) -> rustix::io::Result<()> {
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            result => return result.map(drop),
        }
    }
}
