//! Did the kernel kill for lack of memory where the trainer runs?
//!
//! The kernel counts its kills for each memory cgroup: `oom_kill` of `memory.events` (cgroup v2) or of
//! `memory.oom_control` (v1), see the kernel's admin-guide/cgroup-v2 and cgroup-v1/memory. The counter is read before and
//! after. A root cgroup has none in v2; then there is no evidence and none is invented.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cgroup::{Mount, directory, own_directory};

/// The counter of the cgroup in which the trainer runs.
#[derive(Debug)]
pub(crate) struct OomCounter {
    before: Option<(PathBuf, u64)>,
    /// Whether we look since before the trainer's start, so that "it did not rise" says something.
    from_the_start: bool,
}

impl OomCounter {
    /// Reads the counter for the first time. The trainer will run in `leaf`, a new cgroup of its own with the memory
    /// controller, or else where this process runs.
    pub(crate) fn at_the_start(leaf: Option<PathBuf>) -> OomCounter {
        let before = match leaf {
            // Nobody was ever killed in a new one. So whoever takes over sees the same rise.
            Some(leaf) => Some((leaf, 0)),
            None => shared_counter(),
        };
        OomCounter { before, from_the_start: true }
    }

    /// The same when the trainer has run for a while.
    pub(crate) fn later(leaf: Option<PathBuf>) -> OomCounter {
        let from_the_start = leaf.is_some();
        OomCounter { from_the_start, ..OomCounter::at_the_start(leaf) }
    }

    /// Returns whether the counter rose since; `None` where there is none to read, or a rise may have been missed.
    pub(crate) fn rose(&self) -> Option<bool> {
        let (file, before) = self.before.as_ref()?;
        Some(kills(file)? > *before).filter(|rose| *rose || self.from_the_start)
    }
}

fn shared_counter() -> Option<(PathBuf, u64)> {
    let read = |name| fs::read_to_string(name).unwrap_or_default();
    let file = counter_file(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))?;
    // In v2 the kills of a cgroup without the controller are counted by the nearest one above that has it.
    let (directory, name) = (file.parent()?, file.file_name()?);
    let file = directory.ancestors().map(|above| above.join(name)).find(|file| file.exists())?;
    Some((file.clone(), kills(&file)?))
}

fn kills(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// Returns the file with the counter. The memory controller is in one hierarchy only: v1 where it is listed there, else v2.
fn counter_file(cgroup: &str, mountinfo: &str) -> Option<PathBuf> {
    let v1 = cgroup.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers.split(',').any(|name| name == "memory").then_some(path)
    });
    match v1 {
        Some(path) => {
            let mounted =
                |mount: &Mount<'_>| mount.kind == "cgroup" && mount.options.split(',').any(|o| o == "memory");
            Some(directory(mountinfo, mounted, path)?.join("memory.oom_control"))
        }
        None => Some(own_directory(cgroup, mountinfo)?.join("memory.events")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
";
    const UNIFIED: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const PART: &str = "30 23 0:26 /pod/c1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n";

    #[test]
    fn the_memory_controller_is_looked_for_where_it_is() {
        let file = |cgroup, mounts| counter_file(cgroup, mounts).map(|path| path.display().to_string());
        assert_eq!(
            file("8:pids:/\n4:cpu,memory:/jobs/7\n0::/x\n", HYBRID).unwrap(),
            "/sys/fs/cgroup/memory/jobs/7/memory.oom_control"
        );
        assert_eq!(
            file("0::/user.slice/session-3.scope\n", UNIFIED).unwrap(),
            "/sys/fs/cgroup/user.slice/session-3.scope/memory.events"
        );
        assert_eq!(file("0::/pod/c1/a\n", PART).unwrap(), "/sys/fs/cgroup/a/memory.events");
    }

    #[test]
    fn what_is_not_mounted_gives_no_evidence() {
        assert_eq!(counter_file("0::/other\n", PART), None);
        assert_eq!(counter_file("0::/a\n", ""), None);
        assert_eq!(counter_file("", HYBRID), None);
        assert_eq!(OomCounter { before: None, from_the_start: true }.rose(), None);
    }

    #[test]
    fn only_a_rise_is_evidence() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        fs::write(&file, "low 0\noom 5\noom_kill 4\noom_group_kill 9\n").unwrap();
        let before = Some((file.clone(), kills(&file).unwrap()));
        let counter = OomCounter { before: before.clone(), from_the_start: true };
        assert_eq!(counter.rose(), Some(false));
        let late = OomCounter { before, from_the_start: false };
        assert_eq!(late.rose(), None, "somebody may have been killed before we looked");
        fs::write(&file, "oom 6\noom_kill 5\n").unwrap();
        assert_eq!((counter.rose(), late.rose()), (Some(true), Some(true)));
        fs::remove_file(&file).unwrap();
        assert_eq!(counter.rose(), None);
    }
}
