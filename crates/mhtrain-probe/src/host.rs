//! What does the host offer beside its cards?

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use mhtrain_sizing::units::Bytes;
use serde::Serialize;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// The host at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// Its name.
    pub hostname: Option<String>,
    /// Id of the running boot: a pid means nothing across two of them.
    pub boot_id: Option<String>,
    /// Cores that this process may use: affinity mask and cgroup quota are respected.
    pub cores: usize,
    /// Memory; `None` where the system does not tell.
    pub memory: Option<HostMemory>,
    /// Space of `/dev/shm`, through which data loader workers pass their batches.
    pub shared_memory: Option<DiskSpace>,
    /// Where the cgroup v2 hierarchy is mounted, if it is.
    pub cgroup: Option<CgroupV2>,
}

/// Memory of the host, or of the container that we are in when that has less.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostMemory {
    /// All of it.
    pub total: Bytes,
    /// What can be had without swapping.
    pub available: Bytes,
}

/// Space on a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskSpace {
    /// The directory that was looked at: the nearest one that exists.
    pub path: PathBuf,
    /// All of it.
    pub total: Bytes,
    /// What this user can still write.
    pub free: Bytes,
}

/// The cgroup v2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CgroupV2 {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Our own place in it, below the mount point.
    pub own: Option<PathBuf>,
    /// Whether we may make a leaf of our own there.
    pub writable: bool,
}

/// A path whose file system cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the free space at {}: {source}", path.display())]
pub struct DiskSpaceError {
    /// Which path.
    pub path: PathBuf,
    /// Why.
    pub source: std::io::Error,
}

/// Returns the host as it is now.
pub fn probe_host() -> HostReport {
    HostReport {
        hostname: System::host_name().ok(),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()
            .map(|id| id.trim().to_owned()),
        cores: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        memory: memory(),
        shared_memory: disk_space(Path::new("/dev/shm")).ok().filter(|space| space.path.ends_with("shm")),
        cgroup: cgroup_v2(),
    }
}

/// Returns the memory that is there and that can be had; a smaller limit of our cgroup wins. `None`: not known.
pub fn memory() -> Option<HostMemory> {
    let wanted = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(wanted).ok()?;
    let (total, available) = (system.total_memory(), system.available_memory());
    Some(match system.cgroup_limits() {
        Some(limits) if limits.total_memory < total => HostMemory {
            total: Bytes::new(limits.total_memory),
            available: Bytes::new(limits.free_memory.min(available)),
        },
        _ => HostMemory { total: Bytes::new(total), available: Bytes::new(available) },
    })
}

/// Returns the space at `path`, or at its nearest ancestor that exists: an output directory is made later.
///
/// # Errors
///
/// The file system does not answer.
pub fn disk_space(path: &Path) -> Result<DiskSpace, DiskSpaceError> {
    let absolute =
        std::path::absolute(path).map_err(|source| DiskSpaceError { path: path.to_owned(), source })?;
    let existing = absolute.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let answer = rustix::fs::statvfs(existing)
        .map_err(|error| DiskSpaceError { path: existing.to_owned(), source: error.into() })?;
    let bytes = |blocks: u64| Bytes::new(blocks.saturating_mul(answer.f_frsize));
    Ok(DiskSpace { path: existing.to_owned(), total: bytes(answer.f_blocks), free: bytes(answer.f_bavail) })
}

fn cgroup_v2() -> Option<CgroupV2> {
    let mount = cgroup_mount(&std::fs::read_to_string("/proc/self/mountinfo").ok()?)?;
    let own = own_cgroup(&std::fs::read_to_string("/proc/self/cgroup").ok()?).map(|own| mount.join(own));
    let writable =
        own.as_ref().is_some_and(|own| rustix::fs::access(own, rustix::fs::Access::WRITE_OK).is_ok());
    Some(CgroupV2 { mount, own, writable })
}

/// Returns where cgroup v2 is mounted, from `/proc/self/mountinfo`: field 5 is the mount point, the file system type
/// is the first field after the separator ` - ` (proc_pid_mountinfo(5)).
fn cgroup_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let kind = after.split(' ').next()?;
        let point = before.split(' ').nth(4)?;
        (kind == "cgroup2").then(|| PathBuf::from(point))
    })
}

/// Returns our place below the mount point, from `/proc/self/cgroup`: the line of v2 starts with `0::`.
fn own_cgroup(cgroup: &str) -> Option<PathBuf> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::/")).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_a_core_and_memory() {
        let host = probe_host();
        assert!(host.cores >= 1);
        let memory = host.memory.unwrap();
        assert!(memory.total > Bytes::ZERO);
        assert!(memory.available <= memory.total);
    }

    #[test]
    fn free_space_is_that_of_the_nearest_existing_directory() {
        let directory = tempfile::tempdir().unwrap();
        let space = disk_space(&directory.path().join("not/made/yet")).unwrap();
        assert_eq!(space.path, directory.path());
        assert!(space.free <= space.total && space.total > Bytes::ZERO);
    }

    #[test]
    fn cgroup_v2_is_found_on_unified_and_hybrid_hosts() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
                      31 24 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let first_only = "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(cgroup_mount(first_only), None);
        assert_eq!(own_cgroup("4:memory:/a\n0::/user.slice/x\n"), Some(PathBuf::from("user.slice/x")));
        assert_eq!(own_cgroup("4:memory:/a\n"), None);
    }
}
