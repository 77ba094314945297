//! Who starts a trainer, sees it end, and makes sure that nobody is left?
//!
//! ```text
//! recorder                               gate = the trainer-to-be, a copy of the recorder
//!   own session, sub-reaper
//!   recorder.json
//!   makes the gate ────────────────────>  in the attempt's cgroup; waits for one byte on its stdin
//!   trainer.json (pid, start time, extent)
//!   one byte ──────────────────────────>  executes the trainer under the same pid
//!   waits, caps the logs, hears stops      (no byte but end of file: exits; the recorder died)
//!   exit.json, where somebody outlived it
//!   ends what outlived the trainer
//!   exit.json: nobody is left
//! ```
//!
//! A recorder is a process of one thread without signal handlers. It lives in a session of its own, so that a terminal's
//! Ctrl-C or hang-up never reaches it, and it needs nobody: when mhtraind dies it goes on. As a *child sub-reaper*
//! (`PR_SET_CHILD_SUBREAPER`, prctl(2)) it becomes the parent of every orphan below it, whatever session or group that one
//! chose; so "no children left" proves "nobody left". A process group proves nothing: torchrun gives each rank its own. Where
//! there is a [cgroup](crate::record::Extent), the trainer is in it as well: it ends everybody at once, and still finds them
//! when this recorder is dead and another one [took over](crate::adopt).

use std::fs::{File, OpenOptions};
use std::io::{self, PipeWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use mhtrain_failpoint::reach;
use rustix::io::Errno;
use rustix::process::Pid;

use crate::attempt::{has_ended, is_of_the_disk};
use crate::cgroup::{Cgroup, Group};
use crate::log_cap::LogCap;
use crate::oom::OomCounter;
use crate::process::ProcessIdentity;
use crate::record::{
    Ended, ExitRecord, Extent, LaunchRecord, RecordDir, RecordError, TrainerRecord, private,
};
use crate::signals::{self, Signals};
use crate::spawn::{self, Copy};
use crate::watch::{Sight, Watch, complain};

/// The hidden subcommand that calls [`recorder_main`].
pub const RECORDER_VERB: &str = "recorder";

/// Set in the trainer's environment to the path of its record directory. Whoever inherits it belongs to the attempt.
pub const ATTEMPT_VARIABLE: &str = "MHTRAIND_ATTEMPT";

/// The time until the last word is tried again where the disk did not take it.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// How long that is done. After that the status is lost, and what the trainer printed and saved says how it ended.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(24 * 3600);

/// Why an attempt could not be recorded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecorderError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("cannot {action}")]
    System { action: &'static str, source: io::Error },
    #[error("cannot open the log file {path}")]
    Log { path: PathBuf, source: io::Error },
}

impl RecorderError {
    /// Returns whether this is about the disk as it is now: full, broken or read-only.
    fn is_of_the_disk(&self) -> bool {
        match self {
            RecorderError::Record(RecordError::Io { source, .. })
            | RecorderError::Log { source, .. }
            | RecorderError::System { source, .. } => is_of_the_disk(source),
            RecorderError::Record(_) => false,
        }
    }

    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> RecorderError {
        move |source| RecorderError::System { action, source: source.into() }
    }
}

/// How a recorder ends whose record the disk does not take; standard error may have no room to say so.
pub(crate) const DISK_REFUSED: i32 = 74;

/// Records the attempt of `record_dir` to its end. Returns the exit status of the recorder, not of the trainer.
///
/// Call it first thing in `main`: it closes every descriptor above 2 and must be the only thread.
#[must_use]
pub fn recorder_main(record_dir: &Path) -> i32 {
    // SAFETY: by the contract above nothing in this process owns a descriptor yet.
    unsafe { signals::close_inherited_descriptors() };
    exit_status(become_independent().and_then(|signals| record_attempt(record_dir, signals)))
}

pub(crate) fn exit_status(result: Result<(), RecorderError>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            // Standard error is recorder.log, or the trainer's log in the gate. Nobody else listens.
            let _nobody_left_to_tell = writeln!(io::stderr(), "{}", chain(&error));
            if error.is_of_the_disk() { DISK_REFUSED } else { 1 }
        }
    }
}

/// Returns an error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Cuts every tie to whoever started us.
pub(crate) fn become_independent() -> Result<Signals, RecorderError> {
    let signals = Signals::hold().map_err(RecorderError::system("hold back signals"))?;
    signals::stop_ignoring();
    // It fails for the leader of a session, and that is what we want to be: the launcher made us one.
    let _already_leader = rustix::process::setsid();
    null_stdin()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(RecorderError::system("become a sub-reaper"))?;
    Ok(signals)
}

fn null_stdin() -> Result<(), RecorderError> {
    let null = File::open("/dev/null").map_err(RecorderError::system("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(RecorderError::system("close standard input"))
}

fn record_attempt(record_dir: &Path, signals: Signals) -> Result<(), RecorderError> {
    let record = RecordDir::open(record_dir)?;
    let launch = record.launch()?;
    let _held_while_we_live = record.lock()?;
    reach("recorder.locked", "");
    if record.recorder()?.is_some() {
        return Err(RecordError::Used { path: record.path().to_owned() }.into());
    }
    record.write_recorder(&this_process()?)?;
    let group = trainers_group(&record, &launch);
    let shared_counter = OomCounter::at_the_start(None);
    let Started { trainer, logs, group } = match start(&record, &launch, group) {
        Ok(started) => started,
        Err(error) => {
            // The gate closed with its pipe: nothing was executed.
            let disk_refused = error.is_of_the_disk();
            record.write_exit(&ExitRecord { disk_refused, ..not_started(chain(&error)) })?;
            return Err(error);
        }
    };
    // From here on the trainer runs, and nothing may keep us from watching it. It did not have to wait for the disk, and how it
    // ended does not wait for it either.
    let pid = Pid::from_raw(trainer.pid.cast_signed());
    let settled = record.settle(|| pid.is_some_and(|pid| has_ended(pid).is_some())).and_then(|is_settled| {
        if is_settled {
            record.reserve_exit()?;
        }
        Ok(is_settled)
    });
    if let Err(error) = &settled {
        complain("cannot reserve the space of the exit status", error);
    }
    reach("recorder.settled", "");
    let own_counter = group.as_ref().and_then(Group::memory_events);
    let oom = own_counter.map_or(shared_counter, |own| OomCounter::at_the_start(Some(own)));
    let watch = Watch::new(&record, &launch, signals, Some(trainer), Sight::Child, group.clone(), logs);
    see_to_the_end(&record, watch, &oom, None, group)?;
    if let Ok(false) = settled
        && let Err(error) = record.settle(|| false)
    {
        complain("cannot make the record durable", &error);
    }
    Ok(())
}

/// Watches a trainer until nobody is left, and writes down how it ended; `known` is what was written down before.
pub(crate) fn see_to_the_end(
    record: &RecordDir,
    mut watch: Watch<'_>,
    oom: &OomCounter,
    known: Option<ExitRecord>,
    group: Option<Group>,
) -> Result<(), RecorderError> {
    let mut exit = match known {
        Some(exit) => exit,
        None => {
            let stop = watch.until_trainer_ends();
            reach("recorder.trainer_ended", "");
            let exit = ExitRecord {
                ended: watch.how_it_ended(),
                ended_at: SystemTime::now(),
                oom_kill: oom.rose(),
                log_full: watch.is_log_disk_full(),
                disk_refused: false,
                stop,
                leftovers_killed: None,
            };
            // The status first: should we be killed during the sweep, it is not lost. The sweep comes even if it cannot be
            // written. Where nobody is to be swept the last word is the first one.
            if watch.is_anybody_left()
                && let Err(error) = record.write_exit(&exit)
            {
                complain("cannot write the exit status yet", &error);
            }
            exit
        }
    };
    exit.leftovers_killed = Some(watch.sweep(exit.stop));
    reach("recorder.swept", "");
    watch.enforce_log_cap();
    if let Some(group) = group {
        // Our own group goes when we have left it, and the one above belongs to mhtraind.
        let _by_whoever_comes_next = group.remove();
    }
    write_last_word(record, &exit)?;
    reach("recorder.last_word", "");
    Ok(())
}

/// Writes down how the trainer ended, as soon as the disk takes it: it may be read-only for a while, and nobody else knows.
fn write_last_word(record: &RecordDir, exit: &ExitRecord) -> Result<(), RecordError> {
    let until = Instant::now() + LAST_WORD_WITHIN;
    let mut is_told = false;
    loop {
        match record.write_exit(exit) {
            Err(error) if !error.is_not_found() && Instant::now() < until => {
                if !std::mem::replace(&mut is_told, true) {
                    complain("cannot write the exit status yet", &error);
                }
                std::thread::sleep(TRY_AGAIN);
            }
            written => return written,
        }
    }
}

/// Returns the group in which the trainer is to run, or runs; `None` where there is none that we may use.
pub(crate) fn trainers_group(record: &RecordDir, launch: &LaunchRecord) -> Option<Group> {
    let directory = launch.cgroup.as_ref()?;
    Some(Cgroup::open(directory, record.path(), record.owner().ok()?)?.trainer())
}

pub(crate) fn this_process() -> Result<ProcessIdentity, RecorderError> {
    ProcessIdentity::of_this_process().map_err(RecorderError::system("read the recorder's start time"))
}

pub(crate) fn not_started(message: String) -> ExitRecord {
    ExitRecord {
        ended: Ended::NotStarted(message),
        ended_at: SystemTime::now(),
        oom_kill: None,
        log_full: false,
        disk_refused: false,
        stop: None,
        leftovers_killed: Some(0),
    }
}

/// A trainer that was let go.
struct Started {
    trainer: ProcessIdentity,
    logs: LogCap,
    group: Option<Group>,
}

/// Starts the trainer behind its gate, writes down who it is, and only then opens the gate.
fn start(record: &RecordDir, launch: &LaunchRecord, group: Option<Group>) -> Result<Started, RecorderError> {
    let stdout = open_log(&launch.stdout)?;
    let stderr = open_log(&launch.stderr)?;
    let (pid, mut gate) = spawn_gate(record, launch, &stdout, &stderr, group.as_ref())
        .map_err(RecorderError::system("start the gate"))?;
    let trainer = ProcessIdentity::of(pid).map_err(RecorderError::system("read the trainer's start time"))?;
    reach("recorder.gate_made", "");
    // Where it is counts, not where it was to be.
    let group = group.filter(|group| group.holds(pid));
    let extent = if group.is_some() { Extent::Cgroup } else { Extent::Subreaper };
    let started_at = SystemTime::now();
    record.write_trainer(&TrainerRecord { identity: trainer.clone(), started_at, extent })?;
    // If it cannot be written the gate is dead already, and its end is reported like every trainer's.
    let _gate_already_dead = gate.write_all(b"\n");
    reach("recorder.gate_opened", "");
    Ok(Started { trainer, logs: LogCap::new(vec![stdout, stderr], launch.log_cap_bytes), group })
}

fn open_log(path: &Path) -> Result<File, RecorderError> {
    private(OpenOptions::new().append(true).create(true))
        .open(path)
        .map_err(|source| RecorderError::Log { path: path.to_owned(), source })
}

/// Returns the pid of the gate and the end of the pipe that opens it.
fn spawn_gate(
    record: &RecordDir,
    launch: &LaunchRecord,
    stdout: &File,
    stderr: &File,
    group: Option<&Group>,
) -> io::Result<(u32, PipeWriter)> {
    let (word, gate) = io::pipe()?;
    let copy = Copy { stdio: [word.as_fd(), stdout.as_fd(), stderr.as_fd()], group };
    // SAFETY: a recorder has one thread. setsid(2) through rustix is a system call and nothing else. The gate uses its standard
    // descriptors, and what it opens itself.
    let pid = unsafe {
        // A session of its own: a trainer that signals its whole group must not reach its recorder. At once, so that
        // whoever reads trainer.json finds it in that session already.
        spawn::fork(copy, || rustix::process::setsid().map(drop), || exit_status(pass_gate(record, launch)))
    }?;
    Ok((pid.as_raw_nonzero().get().cast_unsigned(), gate))
}

/// Waits for the recorder's word and becomes the trainer. Returns only when there is no trainer to become.
fn pass_gate(record: &RecordDir, launch: &LaunchRecord) -> Result<(), RecorderError> {
    if !is_let_through()? {
        // The recorder died before it could write down who we are. Nobody would ever find the trainer.
        return Ok(());
    }
    reach("gate.let_through", "");
    let failure = match become_trainer(record, launch) {
        Err(error) => error,
        Ok(never) => match never {},
    };
    record.write_start_error(chain(&failure))?;
    Err(failure)
}

/// Waits for the word on standard input, or for its end: then there is nobody who could give it.
fn is_let_through() -> Result<bool, RecorderError> {
    let mut word = [0];
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut word) {
            Err(Errno::INTR) => {}
            read => return Ok(read.map_err(RecorderError::system("wait for the recorder"))? != 0),
        }
    }
}

/// Executes the trainer. Returns only when that fails.
fn become_trainer(
    record: &RecordDir,
    launch: &LaunchRecord,
) -> Result<std::convert::Infallible, RecorderError> {
    null_stdin()?;
    if let Some(umask) = launch.umask {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
    }
    let Some((program, arguments)) = launch.argv.split_first() else {
        return Err(RecorderError::system("execute an empty command")(io::Error::from(
            io::ErrorKind::InvalidInput,
        )));
    };
    std::env::set_current_dir(&launch.cwd).map_err(|source| {
        let source = io::Error::new(source.kind(), format!("{}: {source}", launch.cwd.display()));
        RecorderError::System { action: "enter the working directory", source }
    })?;
    let mut command = Command::new(program);
    let source = command.args(arguments).env(ATTEMPT_VARIABLE, record.path()).exec();
    let source = io::Error::new(source.kind(), format!("{program}: {source}"));
    Err(RecorderError::System { action: "execute the trainer", source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitOptions, waitpid};

    #[test]
    fn a_gate_whose_recorder_is_gone_does_not_execute() {
        let dir = tempfile::tempdir().unwrap();
        let record = RecordDir::create(&dir.path().join("record"), None).unwrap();
        let ran = dir.path().join("ran");
        let launch = LaunchRecord {
            argv: vec!["/bin/touch".to_owned(), ran.display().to_string()],
            cwd: dir.path().to_owned(),
            stdout: dir.path().join("log"),
            stderr: dir.path().join("log"),
            grace_s: 1.0,
            umask: None,
            log_cap_bytes: None,
            identity: None,
            cgroup: None,
        };
        let log = open_log(&launch.stdout).unwrap();
        let ends = |word: &[u8]| {
            // This process has more threads than a recorder, and the gate takes memory: without a cgroup it is made by fork(3),
            // which leaves the C library's locks as a child needs them.
            let (pid, mut gate) = spawn_gate(&record, &launch, &log, &log, None).unwrap();
            gate.write_all(word).unwrap();
            drop(gate);
            let pid = Pid::from_raw(pid.cast_signed()).unwrap();
            waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap().1.exit_status()
        };
        // The pipe closes without a word.
        assert_eq!(ends(b""), Some(0));
        assert!(!ran.exists());
        assert_eq!(ends(b"\n"), Some(0));
        assert!(ran.exists());
    }
}
