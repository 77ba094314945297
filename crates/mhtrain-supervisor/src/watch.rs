//! How does a recorder at work wait for its trainer, stop it, and end what it left behind?
//!
//! The same for the recorder that started the trainer and for one that [took over](crate::adopt): they differ in how they see
//! its end, and in how they find everybody it started ([`Sight`]).

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions, WaitStatus};

use crate::cgroup::{Group, Population};
use crate::log_cap::{LogCap, has_much_room, is_disk_full};
use crate::process::{ProcessIdentity, descendants, family};
use crate::record::{Ended, LaunchRecord, RecordDir, StopTook};
use crate::recorder::{ATTEMPT_VARIABLE, chain};
use crate::signals::Signals;
use crate::wake::{self, Arrivals};

/// How often a recorder looks at the logs, and for a stop file where nothing tells it of one.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// How long processes that outlived their trainer may take after SIGTERM. Data-loader workers of torch notice their parent's
/// death by themselves within about 5 s (`MP_STATUS_CHECK_INTERVAL` of torch/utils/data/_utils).
const LEFTOVER_GRACE: Duration = Duration::from_secs(5);

/// How a recorder sees the trainer.
#[derive(Debug)]
pub(crate) enum Sight {
    /// It is our child, and we are the sub-reaper of all that it starts.
    Child,
    /// Somebody else started it; the descriptor says when it ends, where the kernel can.
    Stranger(Option<OwnedFd>),
}

/// The trainer's end, as far as it can be seen.
#[derive(Copy, Clone, Debug)]
enum End {
    Status(WaitStatus),
    StatusLost,
}

/// A trainer's own cgroup, watched.
#[derive(Debug)]
struct Watched {
    group: Group,
    population: Population,
}

/// A recorder at work.
pub(crate) struct Watch<'a> {
    record: &'a RecordDir,
    launch: &'a LaunchRecord,
    signals: Signals,
    /// `None` when there was none to start.
    trainer: Option<ProcessIdentity>,
    sight: Sight,
    cgroup: Option<Watched>,
    logs: LogCap,
    /// What tells of a stop file where no signal does.
    arrivals: Option<Arrivals>,
    ended: Option<End>,
    asked_by_signal: bool,
    /// The text of the last stop request by file.
    stop_file: Option<String>,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(
        record: &'a RecordDir,
        launch: &'a LaunchRecord,
        mut signals: Signals,
        trainer: Option<ProcessIdentity>,
        sight: Sight,
        group: Option<Group>,
        logs: LogCap,
    ) -> Watch<'a> {
        let hears = signals.hear_of_files_in(record.path());
        let watched = |group: Group| Some(Watched { population: group.population().ok()?, group });
        Watch {
            record,
            launch,
            signals,
            trainer,
            sight,
            cgroup: group.and_then(watched),
            logs,
            arrivals: if hears.is_ok() { None } else { Arrivals::by_anybody(record.path()) },
            ended: None,
            asked_by_signal: false,
            stop_file: None,
        }
    }

    /// Waits for the trainer's end, and brings it about when asked. Returns what a stop took.
    pub(crate) fn until_trainer_ends(&mut self) -> Option<StopTook> {
        loop {
            self.look();
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
        let told = |trainer: &ProcessIdentity| signal(trainer, Signal::TERM);
        if !grace.is_zero() && !self.trainer.as_ref().is_some_and(told) {
            self.look();
            if self.ended.is_some() {
                return None;
            }
        }
        loop {
            self.look();
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
            self.kill(&mut BTreeSet::new());
            self.pause(patience.next());
            self.look();
        }
        Some(StopTook::Kill)
    }

    /// Ends everything that outlived the trainer, and returns how many processes that were. There is no time limit: who
    /// says "gone" too early gives away a device whose memory is still held.
    pub(crate) fn sweep(&mut self, stop: Option<StopTook>) -> u32 {
        let grace = if stop == Some(StopTook::Kill) { Duration::ZERO } else { LEFTOVER_GRACE };
        let until = Instant::now() + grace;
        let (mut told, mut patience) = (BTreeSet::new(), Patience::new());
        // One that is ending loses its memory, and with it the mark that it is known by, before its files, and with them its
        // device: whoever was signalled once is waited for by name.
        while self.is_anybody_left() || told.iter().any(ProcessIdentity::is_alive) {
            if Instant::now() < until {
                for process in self.members() {
                    if told.insert(process.clone()) {
                        signal(&process, Signal::TERM);
                    }
                }
            } else {
                // Again and again: one may fork between our look and our signal, where there is no cgroup.
                self.kill(&mut told);
            }
            self.pause(patience.next());
        }
        u32::try_from(told.len()).unwrap_or(u32::MAX)
    }

    /// Kills everybody, and notes whom.
    fn kill(&self, told: &mut BTreeSet<ProcessIdentity>) {
        for process in self.members() {
            signal(&process, Signal::KILL);
            told.insert(process);
        }
        // At once and without a gap for forks. Kernels before 5.14 cannot; the loop above comes again then.
        if let Some(watched) = &self.cgroup {
            let _comes_again = watched.group.kill();
        }
    }

    /// Returns everybody that the attempt started and that we can see, ourselves excepted.
    fn members(&self) -> BTreeSet<ProcessIdentity> {
        let listed = match &self.sight {
            Sight::Child => descendants(std::process::id()).map(BTreeSet::from_iter),
            Sight::Stranger(_) => {
                family(ATTEMPT_VARIABLE, self.record.path().as_os_str(), self.trainer.as_ref())
            }
        };
        let mut members = listed.unwrap_or_else(|error: io::Error| {
            complain("cannot list processes", &error);
            BTreeSet::new()
        });
        members.extend(self.cgroup.iter().flat_map(|watched| watched.group.members()));
        members
    }

    pub(crate) fn is_anybody_left(&mut self) -> bool {
        let children = self.reap();
        let populated = self.cgroup.as_ref().is_some_and(|watched| watched.population.is_populated());
        match self.sight {
            // A sub-reaper without children has nobody below it.
            Sight::Child => children || populated,
            // Two looks: in one listing of /proc somebody can hide who forks and ends while it is read.
            Sight::Stranger(_) => populated || !self.members().is_empty() || !self.members().is_empty(),
        }
    }

    /// Sees whether the trainer ended.
    fn look(&mut self) {
        self.reap();
        if let Sight::Stranger(_) = self.sight
            && !self.trainer.as_ref().is_some_and(ProcessIdentity::is_alive)
        {
            self.ended = Some(End::StatusLost);
            // It would wake us for ever.
            self.sight = Sight::Stranger(None);
        }
    }

    /// Takes the status of every child that ended, orphans that became ours included. Returns whether any child is left.
    fn reap(&mut self) -> bool {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = u32::try_from(pid.as_raw_nonzero().get()).ok();
                    if matches!(self.sight, Sight::Child)
                        && self.trainer.as_ref().map(|trainer| trainer.pid) == pid
                    {
                        self.ended = Some(End::Status(status));
                    }
                }
                Ok(None) => return true,
                Err(Errno::INTR) => {}
                // ECHILD: nobody is left below a sub-reaper that has no child.
                Err(_) => return false,
            }
        }
    }

    /// Waits a while or until something happens, does the chores, and notes a request by signal.
    fn pause(&mut self, at_most: Duration) {
        let mut descriptors = vec![(self.signals.as_fd(), PollFlags::IN)];
        descriptors.extend(self.arrivals.as_ref().map(|arrivals| (arrivals.as_fd(), PollFlags::IN)));
        descriptors.extend(self.cgroup.as_ref().map(|watched| (watched.population.as_fd(), PollFlags::PRI)));
        if let Sight::Stranger(Some(end)) = &self.sight {
            descriptors.push((end.as_fd(), PollFlags::IN));
        }
        wake::wait(&descriptors, at_most);
        self.asked_by_signal |= self.signals.ask_for_a_stop();
        if let Some(arrivals) = &self.arrivals {
            arrivals.forget();
        }
        if let Some(watched) = &self.cgroup {
            // Reading it is what says that we saw the change.
            let _seen = watched.population.is_populated();
        }
        self.logs.enforce();
    }

    /// Gives back what the logs hold beyond their bound.
    pub(crate) fn enforce_log_cap(&mut self) {
        self.logs.enforce();
    }

    /// Returns whether what the trainer printed last may have found no room.
    pub(crate) fn is_log_disk_full(&self) -> bool {
        let LaunchRecord { stdout, stderr, .. } = self.launch;
        let logs = [Some(stdout), Some(stderr).filter(|stderr| *stderr != stdout)];
        // Asking for room costs as much as all else at an end. Who ended well on a disk with room had it; a quota that is
        // used up ends a trainer.
        let ended_well = self.how_the_child_ended() == Some(Ended::Code(0));
        logs.into_iter().flatten().any(|log| !(ended_well && has_much_room(log)) && is_disk_full(log))
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

    pub(crate) fn how_it_ended(&self) -> Ended {
        match self.record.start_error() {
            Ok(Some(message)) => return Ended::NotStarted(message),
            Ok(None) => {}
            Err(error) => complain("cannot read why the trainer did not start", &error),
        }
        self.how_the_child_ended().unwrap_or(Ended::StatusLost)
    }

    /// Returns what the wait for the trainer told; `None` where nobody could wait for it.
    fn how_the_child_ended(&self) -> Option<Ended> {
        let Some(End::Status(status)) = self.ended else { return None };
        // A wait without WUNTRACED and WCONTINUED reports an exit or a signal and nothing else, see waitpid(2).
        Some(match status.terminating_signal() {
            Some(signal) => Ended::Signal(signal),
            None => Ended::Code(status.exit_status().unwrap_or_default()),
        })
    }
}

/// Returns whether the signal was delivered.
fn signal(process: &ProcessIdentity, signal: Signal) -> bool {
    process.signal(signal).unwrap_or_else(|error| {
        complain(&format!("cannot signal pid {}", process.pid), &error);
        false
    })
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
pub(crate) fn complain(what: &str, error: &dyn std::error::Error) {
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
