//! Which process is this, is it still alive, and what did it start?

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One process, for all time: a pid is used again, a pid with its start time and boot is not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat` (proc_pid_stat(5)). An exec keeps it.
    pub start_time: u64,
    /// The kernel's random id of this boot (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl ProcessIdentity {
    /// Returns the identity of the process that has `pid` now.
    ///
    /// # Errors
    /// When there is no such process, or `/proc` cannot be read.
    pub fn of(pid: u32) -> io::Result<ProcessIdentity> {
        Ok(ProcessIdentity { pid, start_time: Stat::of(pid)?.start_time, boot_id: boot_id()?.to_owned() })
    }

    /// Returns the identity of a process that never was.
    pub(crate) fn nobody() -> ProcessIdentity {
        ProcessIdentity { pid: 0, start_time: 0, boot_id: String::new() }
    }

    /// Returns the identity of the process that asks.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn of_this_process() -> io::Result<ProcessIdentity> {
        ProcessIdentity::of(std::process::id())
    }

    /// Returns whether this very process is alive. A zombie is not: it holds no memory and no device.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let same_boot = boot_id().is_ok_and(|now| now == self.boot_id);
        same_boot
            && Stat::of(self.pid).is_ok_and(|stat| stat.start_time == self.start_time && !stat.is_dead())
    }

    /// Returns whether it runs as this user (real user id, `/proc/PID/status`).
    pub(crate) fn is_of_user(&self, uid: u32) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let real = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next());
        real.is_some_and(|real| real.parse() == Ok(uid)) && self.is_alive()
    }

    /// Sends `signal` to this very process and to no later owner of its pid. Returns whether it was there.
    ///
    /// # Errors
    /// When the kernel refuses, for example because the process belongs to somebody else.
    pub fn signal(&self, signal: Signal) -> io::Result<bool> {
        let Some(pid) = raw_pid(self.pid) else { return Ok(false) };
        // The order matters: the descriptor pins the process, then its start time is compared, then it is signalled.
        let sent = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => {
                if !self.is_alive() {
                    return Ok(false);
                }
                pidfd_send_signal(&handle, signal)
            }
            Err(Errno::SRCH) => return Ok(false),
            // Kernels before 5.3 and some sandboxes have no pidfd: the pid could be used again between the two calls.
            Err(_) if self.is_alive() => kill_process(pid, signal),
            Err(_) => return Ok(false),
        };
        match sent {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Returns everything alive that `root` started, directly or through others, without `root` itself.
///
/// A process that changed its session or group is still found; one whose parent died is found only where `root`
/// is a sub-reaper.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn descendants(root: u32) -> io::Result<Vec<ProcessIdentity>> {
    let mut children: BTreeMap<u32, Vec<Stat>> = BTreeMap::new();
    for stat in all_processes()? {
        children.entry(stat.parent).or_default().push(stat);
    }
    let boot_id = boot_id()?;
    let (mut found, mut open, mut seen) = (Vec::new(), vec![root], BTreeSet::from([root]));
    while let Some(parent) = open.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            if !seen.insert(child.pid) {
                continue;
            }
            open.push(child.pid);
            if !child.is_dead() {
                found.push(child.identity(boot_id));
            }
        }
    }
    Ok(found)
}

/// Returns everything alive that was started with `name=value` in its environment, `also`, and everything that those started,
/// this process excepted.
///
/// Only processes whose environment we may read are found by it: our own user's, or all for root.
///
/// # Errors
/// When `/proc` cannot be listed.
pub(crate) fn family(
    name: &str,
    value: &OsStr,
    also: Option<&ProcessIdentity>,
) -> io::Result<BTreeSet<ProcessIdentity>> {
    let wanted = [name.as_bytes(), b"=", value.as_bytes()].concat();
    let boot_id = boot_id()?;
    // One listing for all of it: a pid that is used again between two of them would make a stranger's child one of ours.
    let alive: Vec<_> = all_processes()?.into_iter().filter(|stat| !stat.is_dead()).collect();
    let is_marked = |stat: &Stat| {
        let environment = fs::read(format!("/proc/{}/environ", stat.pid)).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == wanted)
    };
    let is_named = |stat: &Stat| also.is_some_and(|also| stat.identity(boot_id) == *also);
    let own_pid = std::process::id();
    let mut found: BTreeSet<u32> =
        alive.iter().filter(|stat| is_named(stat) || is_marked(stat)).map(|stat| stat.pid).collect();
    found.remove(&own_pid);
    loop {
        let more = alive.iter().filter(|stat| found.contains(&stat.parent) && stat.pid != own_pid);
        let more: Vec<u32> = more.map(|stat| stat.pid).filter(|pid| !found.contains(pid)).collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    Ok(alive.iter().filter(|stat| found.contains(&stat.pid)).map(|stat| stat.identity(boot_id)).collect())
}

/// Returns the id of this boot.
fn boot_id() -> io::Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(known) = BOOT_ID.get() {
        return Ok(known);
    }
    let read = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| read.trim().to_owned()))
}

/// Returns `pid` as the kernel wants it, or `None` for a number that is no process: 0 and negative numbers mean groups.
fn raw_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

fn all_processes() -> io::Result<Vec<Stat>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end between the listing and the reading.
        all.extend(Stat::of(pid));
    }
    Ok(all)
}

/// The fields of `/proc/PID/stat` that we need.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    state: char,
    parent: u32,
    start_time: u64,
}

impl Stat {
    fn of(pid: u32) -> io::Result<Stat> {
        let text = fs::read(format!("/proc/{pid}/stat"))?;
        Stat::parse(pid, &text).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has an unknown form"))
        })
    }

    /// Field 2 is the program's name in parentheses. It may hold spaces and parentheses itself, so the last one counts.
    fn parse(pid: u32, text: &[u8]) -> Option<Stat> {
        let end_of_name = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(text.get(end_of_name + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Stat {
            pid,
            state: field(3)?.chars().next()?,
            parent: field(4)?.parse().ok()?,
            start_time: field(22)?.parse().ok()?,
        })
    }

    /// Zombie or being removed.
    fn is_dead(self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }

    fn identity(self, boot_id: &str) -> ProcessIdentity {
        ProcessIdentity { pid: self.pid, start_time: self.start_time, boot_id: boot_id.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_program_name_with_parentheses_and_spaces_is_no_obstacle() {
        let text = b"7 (a) Z 1 (b c) S 42 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3\n";
        let stat = Stat::parse(7, text).unwrap();
        assert_eq!(stat, Stat { pid: 7, state: 'S', parent: 42, start_time: 98765 });
    }

    #[test]
    fn a_cut_stat_line_is_no_process() {
        assert_eq!(Stat::parse(7, b"7 (x) S 1 2"), None);
        assert_eq!(Stat::parse(7, b""), None);
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = Command::new("true").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        while !Stat::of(child.id()).unwrap().is_dead() {
            std::thread::yield_now();
        }
        assert!(!identity.is_alive());
        child.wait().unwrap();
        assert!(!identity.is_alive());
    }

    #[test]
    fn another_start_time_is_another_process() {
        let mut identity = ProcessIdentity::of_this_process().unwrap();
        assert!(identity.is_alive());
        identity.start_time += 1;
        assert!(!identity.is_alive());
        assert!(!identity.signal(Signal::KILL).unwrap(), "the signal must not reach the pid's new owner");
    }

    #[test]
    fn another_boot_is_another_process() {
        let mut identity = ProcessIdentity::of_this_process().unwrap();
        identity.boot_id.push('0');
        assert!(!identity.is_alive());
    }

    #[test]
    fn pid_zero_and_negative_pids_are_never_signalled() {
        let own = ProcessIdentity::of_this_process().unwrap();
        for pid in [0, u32::MAX, i32::MAX.cast_unsigned() + 1] {
            assert!(!ProcessIdentity { pid, ..own.clone() }.signal(Signal::KILL).unwrap());
        }
    }

    #[test]
    fn a_child_is_a_descendant_and_is_found_by_its_environment() {
        let mut child = Command::new("sleep").arg("60").env("MHTRAIND_TEST_MARK", "a b").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        assert!(descendants(std::process::id()).unwrap().contains(&identity));
        let marked = family("MHTRAIND_TEST_MARK", OsStr::new("a b"), None).unwrap();
        let named = family("MHTRAIND_TEST_MARK", OsStr::new("other"), Some(&identity)).unwrap();
        let later = ProcessIdentity { start_time: identity.start_time + 1, ..identity.clone() };
        let mistaken = family("MHTRAIND_TEST_MARK", OsStr::new("other"), Some(&later)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let only_the_child = BTreeSet::from([identity]);
        assert_eq!((marked, named, mistaken), (only_the_child.clone(), only_the_child, BTreeSet::new()));
    }
}
