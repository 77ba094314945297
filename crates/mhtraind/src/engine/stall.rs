//! Does a running attempt still do something, and if not, where does it hang?

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use mhtrain_supervisor::ProcessIdentity;
use rustix::process::Signal;

use super::directory::{Lasting, untrusted, write_whole};
use super::origin::Origin;

/// Steps whose median is the time of a step.
const STEPS_KEPT: usize = 64;

/// Steps that must have been seen before their median counts: the first ones compile and fill caches.
const STEPS_MIN: usize = 3;

/// So many times the shortest time is waited while no time of a step is known.
const UNKNOWN_STEPS: u32 = 4;

/// How long it may take to read the stacks of all processes: nothing else of the job is looked at meanwhile.
const STACKS_WITHIN: Duration = Duration::from_secs(20);

/// How long Python may take to print its own stacks after it was asked.
const PRINTED_WITHIN: Duration = Duration::from_secs(2);

/// After so long without output it has printed all.
const QUIET: Duration = Duration::from_millis(300);

/// Processes whose stacks are read: the ranks of a host and their workers.
const PROCESSES_MAX: usize = 32;

/// How much of the stacks is kept.
const STACKS_BYTES_MAX: usize = 256 << 10;

/// When an attempt counts as stalled.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct StallRule {
    /// The shortest time; zero: never.
    pub at_least: Duration,
    /// So many times the median of a step.
    pub steps: u32,
}

/// Signs of life of one attempt.
#[derive(Clone, Debug)]
pub struct LifeSigns {
    rule: StallRule,
    times: VecDeque<Duration>,
    step: u64,
    step_at: Instant,
    output_bytes: u64,
    alive_at: Instant,
}

/// An attempt that stood still.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Still {
    /// For how long.
    pub since: Duration,
    /// Median time of a step.
    pub step: Duration,
}

impl LifeSigns {
    /// Returns the signs of an attempt that is looked at from now on.
    pub fn new(rule: StallRule, now: Instant) -> LifeSigns {
        LifeSigns { rule, times: VecDeque::new(), step: 0, step_at: now, output_bytes: 0, alive_at: now }
    }

    /// Takes a look: the steps that are done, the bytes that were printed, and whether the card computes (`None`: unknown,
    /// which is no sign). Returns how long it stands still, when that is too long.
    pub fn look(&mut self, now: Instant, step: u64, output_bytes: u64, busy: Option<bool>) -> Option<Still> {
        if step > self.step {
            // The first one that is seen may have been done long before.
            if self.step > 0 {
                // Several between two looks took the same time, as far as anybody knows.
                let steps = u32::try_from(step - self.step).unwrap_or(u32::MAX);
                let time = now.duration_since(self.step_at) / steps;
                self.times.extend(std::iter::repeat_n(time, STEPS_KEPT.min(steps as usize)));
                let surplus = self.times.len().saturating_sub(STEPS_KEPT);
                self.times.drain(..surplus);
            }
            (self.step, self.step_at) = (step, now);
        }
        if now == self.step_at || output_bytes != self.output_bytes || busy == Some(true) {
            self.alive_at = now;
        }
        self.output_bytes = output_bytes;
        if self.rule.at_least.is_zero() || self.step == 0 {
            return None;
        }
        let median = self.median();
        let since = now.duration_since(self.alive_at);
        let limit = match self.times.len() < STEPS_MIN {
            // A step may take long, as far as is known: after a restart nobody has seen one.
            true => self.rule.at_least * UNKNOWN_STEPS,
            false => self.rule.at_least.max(median.saturating_mul(self.rule.steps)),
        };
        (since > limit).then_some(Still { since, step: median })
    }

    fn median(&self) -> Duration {
        let mut times: Vec<Duration> = self.times.iter().copied().collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

/// Reads where the threads of processes are, as well as this host can: by py-spy where it is installed; else Python prints
/// it itself into the trainer's output where the companion asked it to; and the kernel's own view in any case. Everything is
/// also written to `file`.
pub fn stacks(pids: &[u32], origin: &Origin, output: &Path, file: &Path) -> String {
    let (mut text, until) = (String::new(), Instant::now() + STACKS_WITHIN);
    for pid in pids.iter().take(PROCESSES_MAX) {
        let _to_a_string = writeln!(text, "pid {pid}: {}", kernels_view(*pid));
    }
    match py_spy(origin) {
        Some(tool) => {
            for pid in pids.iter().take(PROCESSES_MAX) {
                text.push_str(&dumped(&tool, *pid, origin, until).unwrap_or_default());
            }
        }
        None => text.push_str(&printed_by_itself(pids, output, until)),
    }
    let end = (0..=STACKS_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    if let Err(error) = write_whole(file, text.as_bytes(), Lasting::UntilPowerCut) {
        tracing::warn!(file = %file.display(), %error, "the stacks are not kept");
    }
    text
}

/// Returns the name, the state and the place in the kernel of a process (proc_pid_stat(5), proc_pid_wchan(5)).
fn kernels_view(pid: u32) -> String {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    format!("{} {} in {}", field("Name:"), field("State:"), read("wchan"))
}

fn py_spy(origin: &Origin) -> Option<PathBuf> {
    let path = origin.variable("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("py-spy")).find(|tool| tool.is_file())
}

fn dumped(tool: &Path, pid: u32, origin: &Origin, until: Instant) -> Option<String> {
    if Instant::now() >= until {
        return None;
    }
    let mut command = origin.command(tool).ok()?;
    command.args(["dump", "--nonblocking", "--pid", &pid.to_string()]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let output = child.stdout.take()?;
    let reader = std::thread::spawn(move || std::io::read_to_string(output).unwrap_or_default());
    while child.try_wait().ok()?.is_none() {
        if Instant::now() >= until {
            let _ended_meanwhile = child.kill();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    reader.join().ok()
}

/// Asks each Python that wants to be asked to print its stacks, and returns what came into the trainer's output.
///
/// One after another: faulthandler writes a line in many pieces, and those of two processes would lie in each other.
fn printed_by_itself(pids: &[u32], output: &Path, until: Instant) -> String {
    let mut text = String::new();
    for pid in pids.iter().filter(|pid| prints_stacks(**pid)).take(PROCESSES_MAX) {
        if Instant::now() >= until {
            break;
        }
        let Ok(process) = ProcessIdentity::of(*pid) else { continue };
        let before = size(output);
        if process.signal(Signal::USR2).is_err() {
            continue;
        }
        wait_until_printed(output, before);
        text.push_str(&format!("pid {pid}:\n{}", printed_after(output, before).unwrap_or_default()));
    }
    text
}

/// Waits until something came after the first `before` bytes of a file, and then nothing more.
fn wait_until_printed(output: &Path, before: u64) {
    let until = Instant::now() + PRINTED_WITHIN;
    let mut seen = before;
    let mut since = Instant::now();
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
        let now = size(output);
        if now != seen {
            (seen, since) = (now, Instant::now());
        } else if seen > before && since.elapsed() >= QUIET {
            return;
        }
    }
}

fn size(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |found| found.len())
}

/// Reads what stands in a file after its first `before` bytes, as much of it as is kept.
fn printed_after(output: &Path, before: u64) -> std::io::Result<String> {
    let mut file = fs::OpenOptions::new().read(true).custom_flags(untrusted()).open(output)?;
    file.seek(SeekFrom::Start(before))?;
    let mut bytes = Vec::new();
    file.take(STACKS_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Returns whether a process has a handler for SIGUSR2, which ends one that has none. The companion's is faulthandler's.
fn prints_stacks(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (Signal::USR2.as_raw() - 1)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: StallRule = StallRule { at_least: Duration::from_secs(60), steps: 10 };

    /// Looks once a second for so long, with a step every `every` seconds until `until`.
    fn first_stall(every: u64, until: u64, seconds: u64, busy: Option<bool>, prints: bool) -> Option<u64> {
        let start = Instant::now();
        let mut signs = LifeSigns::new(RULE, start);
        (1..=seconds).find(|second| {
            let step = (*second).min(until) / every;
            let bytes = if prints { *second } else { step };
            signs.look(start + Duration::from_secs(*second), step, bytes, busy).is_some()
        })
    }

    #[test]
    fn an_attempt_that_stands_still_for_many_steps_is_stalled() {
        assert_eq!(first_stall(2, 100, 1000, Some(false), false), Some(161), "60 s at least");
        assert_eq!(first_stall(20, 100, 1000, None, false), Some(301), "ten steps of 20 s");
    }

    #[test]
    fn output_a_busy_card_and_the_beginning_are_no_stall() {
        assert_eq!(first_stall(2, 100, 1000, Some(true), false), None);
        assert_eq!(first_stall(2, 100, 1000, None, true), None);
        assert_eq!(first_stall(2, 6, 200, Some(false), false), None, "too few steps were seen");
        assert_eq!(first_stall(2, 6, 1000, Some(false), false), Some(247), "but for so long");
        let start = Instant::now();
        let off = StallRule { at_least: Duration::ZERO, ..RULE };
        let mut signs = LifeSigns::new(off, start);
        for second in 1..1000 {
            let at = start + Duration::from_secs(second);
            assert_eq!(signs.look(at, second.min(10), 0, Some(false)), None);
        }
    }

    #[test]
    fn a_process_without_a_handler_is_not_asked() {
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!prints_stacks(sleeper.id()));
        assert!(kernels_view(sleeper.id()).contains(" in "));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
    }
}
