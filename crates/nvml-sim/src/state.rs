//! What do the file, the usage directory and the past calls make of a card?

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::file::{FailMode, SimDevice, SimFile, SimProcess};

/// A return code of NVML other than success. Numbers: `nvmlReturn_t` in nvml.h.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u32);

impl Code {
    pub(crate) const INVALID_ARGUMENT: Code = Code(2);
    pub(crate) const NOT_SUPPORTED: Code = Code(3);
    pub(crate) const NO_PERMISSION: Code = Code(4);
    pub(crate) const NOT_FOUND: Code = Code(6);
    pub(crate) const INSUFFICIENT_SIZE: Code = Code(7);
    pub(crate) const DRIVER_NOT_LOADED: Code = Code(9);
    pub(crate) const GPU_IS_LOST: Code = Code(15);
    pub(crate) const RESET_REQUIRED: Code = Code(16);
    pub(crate) const UNKNOWN: Code = Code(999);
}

/// Calls so far and the failure that tripped, for each card of each file.
static HISTORY: Mutex<Option<HashMap<(PathBuf, String), History>>> = Mutex::new(None);

#[derive(Default)]
struct History {
    calls: u64,
    tripped: Option<FailMode>,
}

/// Returns the simulated machine as the file says now.
///
/// No file named: the driver is not loaded. A file that cannot be read or is malformed: unknown error.
pub(crate) fn machine() -> Result<SimFile, Code> {
    SimFile::read(&file_path()?).map_err(|_| Code::UNKNOWN)
}

fn file_path() -> Result<PathBuf, Code> {
    std::env::var_os(crate::FILE_VARIABLE).map(PathBuf::from).ok_or(Code::DRIVER_NOT_LOADED)
}

/// Whether a call asks for a handle or asks a handle something.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Handle,
    Question,
}

/// Counts one call about `device` and returns the code that it must answer if the card is broken.
pub(crate) fn count_call(device: &SimDevice, call: Call) -> Result<(), Code> {
    let mut history = HISTORY.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (file_path()?, device.uuid.clone());
    let history = history.get_or_insert_default().entry(key).or_default();
    if history.tripped.is_none() {
        history.tripped = device.fail.filter(|fail| history.calls >= fail.after_calls).map(|fail| fail.mode);
    }
    history.calls = history.calls.saturating_add(1);
    match (history.tripped, call) {
        (None, _) => Ok(()),
        (Some(FailMode::FallenOffBus), _) | (Some(FailMode::Lost), Call::Question) => Err(Code::GPU_IS_LOST),
        (Some(FailMode::NoPermission), _) => Err(Code::NO_PERMISSION),
        (Some(FailMode::ResetRequired), Call::Question) => Err(Code::RESET_REQUIRED),
        (Some(FailMode::Unknown), Call::Question) => Err(Code::UNKNOWN),
        (Some(FailMode::Lost | FailMode::ResetRequired | FailMode::Unknown), Call::Handle) => Ok(()),
    }
}

/// Memory of a card, usage files counted.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    pub(crate) reserved: u64,
    pub(crate) used: u64,
    pub(crate) free: u64,
}

/// Returns the memory of a card: what the file says and what live processes claim in the usage directory.
pub(crate) fn memory(machine: &SimFile, device: &SimDevice) -> Memory {
    let claimed = usage(machine, device).iter().fold(0u64, |sum, (_, used)| sum.saturating_add(*used));
    let usable = device.total.saturating_sub(device.reserved);
    let used = device.used.saturating_add(claimed).min(usable);
    Memory { total: device.total, reserved: device.reserved, used, free: usable - used }
}

/// Returns the processes of a card, those of the usage directory included.
pub(crate) fn processes(machine: &SimFile, device: &SimDevice) -> Vec<SimProcess> {
    let mut processes = device.processes.clone();
    for (pid, used) in usage(machine, device) {
        match processes.iter_mut().find(|process| process.pid == pid) {
            Some(known) => known.used = known.used.map(|before| before.saturating_add(used)),
            None => processes.push(SimProcess { pid, used: Some(used) }),
        }
    }
    processes
}

/// Returns what live processes claim on this card. A file that is no number is no claim: it is being written.
fn usage(machine: &SimFile, device: &SimDevice) -> Vec<(u32, u64)> {
    let directory = std::env::var_os(crate::USAGE_VARIABLE).map(PathBuf::from).or(machine.usage_dir.clone());
    let Some(entries) = directory.and_then(|directory| std::fs::read_dir(directory).ok()) else {
        return Vec::new();
    };
    let mut claims: Vec<(u32, u64)> =
        entries.flatten().filter_map(|entry| claim(&entry.path(), &device.uuid)).collect();
    claims.sort_unstable();
    claims
}

fn claim(path: &Path, uuid: &str) -> Option<(u32, u64)> {
    let pid = path.file_name()?.to_str()?.strip_prefix(uuid)?.strip_prefix('.')?.parse().ok()?;
    if !is_alive(pid) {
        return None;
    }
    Some((pid, std::fs::read_to_string(path).ok()?.trim().parse().ok()?))
}

/// Returns whether a process holds memory: it exists and is no zombie. Field 3 of `/proc/<pid>/stat` is its state;
/// the command before it is in parentheses and may hold anything.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else { return false };
    let after_command = stat.iter().rposition(|byte| *byte == b')').and_then(|end| stat.get(end + 2));
    !matches!(after_command, Some(b'Z' | b'X' | b'x') | None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine_with(usage_dir: &Path) -> SimFile {
        let mut card = SimDevice::idle("GPU-a", "Card", 1000, "8.0");
        card.reserved = 100;
        card.used = 200;
        let mut machine = SimFile::new(vec![card]);
        machine.usage_dir = Some(usage_dir.to_owned());
        machine
    }

    #[test]
    fn a_live_process_uses_what_its_file_says_and_a_dead_one_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = child.id();
        child.wait().unwrap();
        std::fs::write(directory.path().join(format!("GPU-a.{}", std::process::id())), "300\n").unwrap();
        std::fs::write(directory.path().join(format!("GPU-a.{dead}")), "500").unwrap();
        std::fs::write(directory.path().join(format!("GPU-b.{}", std::process::id())), "500").unwrap();
        std::fs::write(directory.path().join("GPU-a.nonsense"), "500").unwrap();
        let machine = machine_with(directory.path());
        let card = &machine.devices[0];
        assert_eq!(memory(&machine, card), Memory { total: 1000, reserved: 100, used: 500, free: 400 });
        assert_eq!(processes(&machine, card), vec![SimProcess { pid: std::process::id(), used: Some(300) }]);
    }

    #[test]
    fn a_zombie_has_given_its_memory_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let path = directory.path().join(format!("GPU-a.{}", child.id()));
        std::fs::write(&path, "300").unwrap();
        for _ in 0..500 {
            if !is_alive(child.id()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(Path::new(&format!("/proc/{}", child.id())).exists(), "not waited for yet");
        let machine = machine_with(directory.path());
        assert_eq!(memory(&machine, &machine.devices[0]).used, 200);
        child.wait().unwrap();
    }

    #[test]
    fn used_never_exceeds_what_is_usable() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(format!("GPU-a.{}", std::process::id())), u64::MAX.to_string())
            .unwrap();
        let machine = machine_with(directory.path());
        assert_eq!(
            memory(&machine, &machine.devices[0]),
            Memory { total: 1000, reserved: 100, used: 900, free: 0 }
        );
    }
}
