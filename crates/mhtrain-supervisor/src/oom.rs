//! Did the kernel kill for lack of memory where the trainer runs?
//!
//! The kernel counts its kills for each memory cgroup: `oom_kill` of `memory.events` (cgroup v2) or of
//! `memory.oom_control` (v1), see the kernel's admin-guide/cgroup-v2 and cgroup-v1/memory. The counter is read before and
//! after. A root cgroup has none in v2; then there is no evidence and none is invented.

use std::fs;
use std::path::{Path, PathBuf};

/// The counter of the cgroup in which this process, and with it its children, runs.
#[derive(Debug)]
pub(crate) struct OomCounter {
    before: Option<(PathBuf, u64)>,
}

impl OomCounter {
    /// Reads the counter for the first time.
    pub(crate) fn of_this_process() -> OomCounter {
        let read = |name| fs::read_to_string(name).unwrap_or_default();
        let file = counter_file(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
        let before = file.and_then(|file| Some((kills(&file)?, file))).map(|(count, file)| (file, count));
        OomCounter { before }
    }

    /// Returns whether the counter rose since; `None` where there is none to read.
    pub(crate) fn rose(&self) -> Option<bool> {
        let (file, before) = self.before.as_ref()?;
        Some(kills(file)? > *before)
    }
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
        None => {
            let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
            Some(directory(mountinfo, |mount| mount.kind == "cgroup2", path)?.join("memory.events"))
        }
    }
}

/// A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Mount<'a>> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let mut after = after.split(' ');
        Some(Mount {
            root: before.next()?,
            point: before.next()?,
            kind: after.next()?,
            options: after.nth(1)?,
        })
    }
}

/// Returns where the cgroup `path` is mounted. In a container the mount may show only a part of the hierarchy.
fn directory(mountinfo: &str, wanted: impl Fn(&Mount<'_>) -> bool, path: &str) -> Option<PathBuf> {
    let mount = mountinfo.lines().filter_map(Mount::parse).find(|mount| wanted(mount))?;
    let below = Path::new(path).strip_prefix(mount.root).ok()?;
    Some(Path::new(mount.point).join(below))
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
        assert_eq!(OomCounter { before: None }.rose(), None);
    }

    #[test]
    fn only_a_rise_is_evidence() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        fs::write(&file, "low 0\noom 5\noom_kill 4\noom_group_kill 9\n").unwrap();
        let counter = OomCounter { before: Some((file.clone(), kills(&file).unwrap())) };
        assert_eq!(counter.rose(), Some(false));
        fs::write(&file, "oom 6\noom_kill 5\n").unwrap();
        assert_eq!(counter.rose(), Some(true));
        fs::remove_file(&file).unwrap();
        assert_eq!(counter.rose(), None);
    }
}
