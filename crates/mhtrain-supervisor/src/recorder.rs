//! Who starts a trainer, sees it end, and makes sure that nobody is left?
//!
//! ```text
//! recorder                               gate = the trainer-to-be
//!   own session, sub-reaper
//!   recorder.json
//!   starts the gate ───────────────────>  waits for one byte on its stdin
//!   trainer.json (pid, start time)
//!   one byte ──────────────────────────>  executes the trainer under the same pid
//!   waits, caps the logs, hears stops      (no byte but end of file: exits; the recorder died)
//!   exit.json
//!   ends what outlived the trainer
//!   exit.json again: nobody is left
//! ```
//!
//! A recorder is a process of one thread without signal handlers. It lives in a session of its own, so that a terminal's
//! Ctrl-C or hang-up never reaches it, and it needs nobody: when mhtraind dies it goes on. As a *child sub-reaper*
//! (`PR_SET_CHILD_SUBREAPER`, prctl(2)) it becomes the parent of every orphan below it, whatever session or group that one
//! chose; so "no children left" proves "nobody left". A process group proves nothing: torchrun gives each rank its own.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeWriter, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions, WaitStatus};

use crate::log_cap::LogCap;
use crate::oom::OomCounter;
use crate::process::{ProcessIdentity, descendants};
use crate::record::{
    Ended, ExitRecord, LaunchRecord, RecordDir, RecordError, StopTook, TrainerRecord, private,
};
use crate::signals::{self, Heard, Signals};

/// The hidden subcommand that calls [`recorder_main`].
pub const RECORDER_VERB: &str = "recorder";

/// The hidden subcommand that calls [`gate_main`].
pub const GATE_VERB: &str = "recorder-gate";

/// Set in the trainer's environment to the path of its record directory. Whoever inherits it belongs to the attempt.
pub const ATTEMPT_VARIABLE: &str = "MHTRAIND_ATTEMPT";

/// How often a recorder looks at the logs and for a stop file when no signal wakes it.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// How long processes that outlived their trainer may take after SIGTERM. Data-loader workers of torch notice their parent's
/// death by themselves within about 5 s (`MP_STATUS_CHECK_INTERVAL` of torch/utils/data/_utils).
const LEFTOVER_GRACE: Duration = Duration::from_secs(5);

/// Why an attempt could not be recorded.
#[derive(Debug, thiserror::Error)]
enum RecorderError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("cannot {action}")]
    System { action: &'static str, source: io::Error },
    #[error("cannot open the log file {path}")]
    Log { path: PathBuf, source: io::Error },
}

impl RecorderError {
    fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> RecorderError {
        move |source| RecorderError::System { action, source: source.into() }
    }
}

/// Records the attempt of `record_dir` to its end. Returns the exit status of the recorder, not of the trainer.
///
/// Call it first thing in `main`: it closes every descriptor above 2 and must be the only thread.
#[must_use]
pub fn recorder_main(record_dir: &Path) -> i32 {
    // SAFETY: by the contract above nothing in this process owns a descriptor yet.
    unsafe { signals::close_inherited_descriptors() };
    exit_status(become_independent().and_then(|signals| record_attempt(record_dir, signals)))
}

/// Waits for the recorder's word and becomes the trainer. Returns only when there is no trainer to become.
#[must_use]
pub fn gate_main(record_dir: &Path) -> i32 {
    exit_status(pass_gate(record_dir))
}

fn exit_status(result: Result<(), RecorderError>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            // Standard error is recorder.log, or the trainer's log in the gate. Nobody else listens.
            let _nobody_left_to_tell = writeln!(io::stderr(), "{}", chain(&error));
            1
        }
    }
}

/// Returns an error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Cuts every tie to whoever started us.
fn become_independent() -> Result<Signals, RecorderError> {
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
    if record.recorder()?.is_some() {
        return Err(RecordError::Used { path: record.path().to_owned() }.into());
    }
    record.reserve_exit()?;
    record.write_recorder(&this_process()?)?;
    let oom = OomCounter::of_this_process();
    let (trainer, logs) = match start(&record, &launch) {
        Ok(started) => started,
        Err(error) => {
            record.write_exit(&not_started(chain(&error)))?;
            return Err(error);
        }
    };
    let mut watch = Watch {
        record: &record,
        launch: &launch,
        trainer,
        signals,
        logs,
        ended: None,
        asked_by_signal: false,
        stop_file: None,
    };
    let stop = watch.until_trainer_ends();
    let mut exit = ExitRecord {
        ended: watch.how_it_ended(),
        ended_at: SystemTime::now(),
        oom_kill: oom.rose(),
        stop,
        leftovers_killed: None,
    };
    // The status first: should we be killed during the sweep, it is not lost. The sweep comes even if it cannot be written.
    if let Err(error) = record.write_exit(&exit) {
        complain("cannot write the exit status yet", &error);
    }
    exit.leftovers_killed = Some(watch.sweep(stop));
    watch.logs.enforce();
    Ok(record.write_exit(&exit)?)
}

fn this_process() -> Result<ProcessIdentity, RecorderError> {
    ProcessIdentity::of_this_process().map_err(RecorderError::system("read the recorder's start time"))
}

fn not_started(message: String) -> ExitRecord {
    ExitRecord {
        ended: Ended::NotStarted(message),
        ended_at: SystemTime::now(),
        oom_kill: None,
        stop: None,
        leftovers_killed: Some(0),
    }
}

/// Starts the trainer behind its gate, writes down who it is, and only then opens the gate.
fn start(record: &RecordDir, launch: &LaunchRecord) -> Result<(ProcessIdentity, LogCap), RecorderError> {
    let stdout = open_log(&launch.stdout)?;
    let stderr = open_log(&launch.stderr)?;
    let copies = [stdout.try_clone(), stderr.try_clone()].into_iter().collect::<io::Result<Vec<File>>>();
    let copies = copies.map_err(RecorderError::system("copy a descriptor"))?;
    let (pid, mut gate) =
        spawn_gate(record, stdout, stderr).map_err(RecorderError::system("start the gate"))?;
    let identity =
        ProcessIdentity::of(pid).map_err(RecorderError::system("read the trainer's start time"))?;
    record.write_trainer(&TrainerRecord { identity: identity.clone(), started_at: SystemTime::now() })?;
    // If it cannot be written the gate is dead already, and its end is reported like every trainer's.
    let _gate_already_dead = gate.write_all(b"\n");
    Ok((identity, LogCap::new(copies, launch.log_cap_bytes)))
}

fn open_log(path: &Path) -> Result<File, RecorderError> {
    private(OpenOptions::new().append(true).create(true))
        .open(path)
        .map_err(|source| RecorderError::Log { path: path.to_owned(), source })
}

/// Returns the pid of the gate and the end of the pipe that opens it.
fn spawn_gate(record: &RecordDir, stdout: File, stderr: File) -> io::Result<(u32, PipeWriter)> {
    let (word, gate) = io::pipe()?;
    // Our own executable, even if another version was put at its path since.
    let mut command = Command::new("/proc/self/exe");
    command.args([OsStr::new(GATE_VERB), record.path().as_os_str()]).env(ATTEMPT_VARIABLE, record.path());
    command.stdin(word).stdout(stdout).stderr(stderr);
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are sound. setsid(2) is one,
    // and rustix calls it without taking a lock or memory.
    unsafe {
        // A session of its own: a trainer that signals its whole group must not reach its recorder. Before the exec, so
        // that whoever reads trainer.json finds it in that session already.
        command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
    }
    Ok((command.spawn()?.id(), gate))
}

fn pass_gate(record_dir: &Path) -> Result<(), RecorderError> {
    signals::stop_ignoring();
    signals::unblock_all().map_err(RecorderError::system("let signals through"))?;
    let mut word = [0];
    if io::stdin().lock().read(&mut word).map_err(RecorderError::system("wait for the recorder"))? == 0 {
        // The recorder died before it could write down who we are. Nobody would ever find the trainer.
        return Ok(());
    }
    let record = RecordDir::open(record_dir)?;
    let failure = match become_trainer(&record.launch()?) {
        Err(error) => error,
        Ok(never) => match never {},
    };
    record.write_start_error(chain(&failure))?;
    Err(failure)
}

/// Executes the trainer. Returns only when that fails.
fn become_trainer(launch: &LaunchRecord) -> Result<std::convert::Infallible, RecorderError> {
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
    let source = Command::new(program).args(arguments).exec();
    let source = io::Error::new(source.kind(), format!("{program}: {source}"));
    Err(RecorderError::System { action: "execute the trainer", source })
}

/// A recorder at work.
struct Watch<'a> {
    record: &'a RecordDir,
    launch: &'a LaunchRecord,
    trainer: ProcessIdentity,
    signals: Signals,
    logs: LogCap,
    ended: Option<WaitStatus>,
    asked_by_signal: bool,
    /// The text of the last stop request by file.
    stop_file: Option<String>,
}

impl Watch<'_> {
    /// Waits for the trainer's end, and brings it about when asked. Returns what a stop took.
    fn until_trainer_ends(&mut self) -> Option<StopTook> {
        loop {
            self.reap();
            if self.ended.is_some() {
                return None;
            }
            if let Some(grace) = self.new_stop_request() {
                return self.stop(grace);
            }
            self.pause(LOOK_AGAIN);
        }
    }

    /// Stops the trainer: SIGTERM to it alone, so that it can save with its workers alive; after the grace period SIGKILL to
    /// everything. Returns which of them it took; `None` if it had ended by itself.
    fn stop(&mut self, grace: Duration) -> Option<StopTook> {
        let mut until = Instant::now() + grace;
        if !grace.is_zero() && !self.signal(&self.trainer.clone(), Signal::TERM) {
            self.reap();
            return None;
        }
        loop {
            self.reap();
            if self.ended.is_some() {
                return Some(StopTook::Polite);
            }
            if let Some(shorter) = self.new_stop_request() {
                until = until.min(Instant::now() + shorter);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.pause(left.min(LOOK_AGAIN));
        }
        let mut patience = Patience::new();
        while self.ended.is_none() {
            self.signal_descendants(Signal::KILL, &mut BTreeSet::new());
            self.pause(patience.next());
            self.reap();
        }
        Some(StopTook::Kill)
    }

    /// Ends everything that outlived the trainer, and returns how many processes that were. There is no time limit: who
    /// says "gone" too early gives away a device whose memory is still held.
    fn sweep(&mut self, stop: Option<StopTook>) -> u32 {
        let grace = if stop == Some(StopTook::Kill) { Duration::ZERO } else { LEFTOVER_GRACE };
        let until = Instant::now() + grace;
        let (mut told, mut patience) = (BTreeSet::new(), Patience::new());
        while self.reap() {
            if Instant::now() < until {
                self.signal_descendants(Signal::TERM, &mut told);
            } else {
                // Again and again: one may fork between our look and our signal.
                let mut now = BTreeSet::new();
                self.signal_descendants(Signal::KILL, &mut now);
                told.append(&mut now);
            }
            self.pause(patience.next());
        }
        u32::try_from(told.len()).unwrap_or(u32::MAX)
    }

    /// Signals everything below us that is not in `told` yet, and notes it there.
    fn signal_descendants(&self, signal: Signal, told: &mut BTreeSet<ProcessIdentity>) {
        match descendants(std::process::id()) {
            Ok(all) => {
                for process in all {
                    if told.insert(process.clone()) {
                        self.signal(&process, signal);
                    }
                }
            }
            Err(error) => complain("cannot list processes", &error),
        }
    }

    /// Returns whether the signal was delivered.
    fn signal(&self, process: &ProcessIdentity, signal: Signal) -> bool {
        process.signal(signal).unwrap_or_else(|error| {
            complain(&format!("cannot signal pid {}", process.pid), &error);
            false
        })
    }

    /// Takes the status of every child that ended, orphans that became ours included. Returns whether any child is left.
    fn reap(&mut self) -> bool {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if u32::try_from(pid.as_raw_nonzero().get()) == Ok(self.trainer.pid) {
                        self.ended = Some(status);
                    }
                }
                Ok(None) => return true,
                Err(Errno::INTR) => {}
                // ECHILD: nobody is left below a sub-reaper that has no child.
                Err(_) => return false,
            }
        }
    }

    /// Waits a while, does the chores, and notes a request by signal.
    fn pause(&mut self, at_most: Duration) {
        if self.signals.next(at_most) == Heard::Stop {
            self.asked_by_signal = true;
        }
        self.logs.enforce();
    }

    /// Returns the grace period of a request that was not seen before: a new stop file, or a signal when there is no file.
    /// A signal beside a file only says that there is one.
    fn new_stop_request(&mut self) -> Option<Duration> {
        let usual = seconds(self.launch.grace_s).unwrap_or_default();
        if let Some(text) = self.record.stop_request() {
            if self.stop_file.as_ref() == Some(&text) {
                return None;
            }
            let grace = text.trim().parse().ok().and_then(seconds);
            self.stop_file = Some(text);
            return Some(grace.unwrap_or(usual));
        }
        (std::mem::take(&mut self.asked_by_signal)).then_some(usual)
    }

    fn how_it_ended(&self) -> Ended {
        match self.record.start_error() {
            Ok(Some(message)) => return Ended::NotStarted(message),
            Ok(None) => {}
            Err(error) => complain("cannot read why the trainer did not start", &error),
        }
        // A wait without WUNTRACED and WCONTINUED reports an exit or a signal and nothing else, see waitpid(2).
        let status = self.ended;
        match status.and_then(WaitStatus::terminating_signal) {
            Some(signal) => Ended::Signal(signal),
            None => Ended::Code(status.and_then(WaitStatus::exit_status).unwrap_or_default()),
        }
    }
}

/// The time until the next look, growing: the first looks come quickly, and a process that hangs in the kernel costs little.
struct Patience(Duration);

impl Patience {
    fn new() -> Patience {
        Patience(Duration::from_millis(5))
    }

    fn next(&mut self) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(Duration::from_secs(1));
        now
    }
}

/// Returns a duration of `seconds`; `None` for what is none (negative, not a number, beyond all time).
fn seconds(seconds: f64) -> Option<Duration> {
    // An Instant cannot hold every Duration. A year of grace is as good as more.
    let year = Duration::from_secs(365 * 24 * 3600);
    Duration::try_from_secs_f64(seconds).ok().map(|duration| duration.min(year))
}

/// Writes into recorder.log. There is nothing to be done about a failure.
fn complain(what: &str, error: &dyn std::error::Error) {
    let _nobody_left_to_tell = writeln!(io::stderr(), "{what}: {}", chain(error));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_a_stop_file_is_a_panic() {
        for (given, wanted) in
            [(0.0, Some(0)), (1.5, Some(1)), (-1.0, None), (f64::NAN, None), (f64::INFINITY, None)]
        {
            assert_eq!(seconds(given).map(|duration| duration.as_secs()), wanted);
        }
        let forever = Instant::now() + seconds(1e18).unwrap();
        assert!(forever > Instant::now());
    }

    #[test]
    fn patience_grows_to_a_second() {
        let mut patience = Patience::new();
        let waits: Vec<_> = (0..12).map(|_| patience.next()).collect();
        assert!(waits.is_sorted());
        assert_eq!(waits.last(), Some(&Duration::from_secs(1)));
    }
}
