//! In which cgroup does an attempt live, who is in it, and how does it end?
//!
//! ```text
//! <our own cgroup>/mhtraind-attempt-<hash of the record's path>/    made by mhtraind, given to the attempt's user
//!     recorder/                                                     the recorder, or the one that took over
//!     trainer/                                                      the trainer and whatever it starts, and nobody else
//! ```
//!
//! Nobody leaves a cgroup by a session, a group, a double fork or a clean environment. In cgroup v2 a user moves processes
//! only below a directory that is his, so the recorder must be below the same one as the trainer: "delegation containment" of
//! the kernel's admin-guide/cgroup-v2, which also says which files to give away.
//!
//! The path in a record is a user's word. It is believed only when the directory belongs to the owner of the record:
//! nobody else can have given it to him, and no process of others can be in it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::identity::{FileRights, Identity};
use crate::process::ProcessIdentity;
use crate::wake;

/// The files that belong to whoever a cgroup is given to, `/sys/kernel/cgroup/delegate` less what is not about processes.
const GIVEN_AWAY: [&str; 3] = ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];

/// How deep below an attempt's cgroup its user's own cgroups are looked for.
const DEPTH_MAX: usize = 16;

/// How long the last process of a cgroup may take from its end until the kernel calls the cgroup empty.
const DEAD_WITHIN: Duration = Duration::from_millis(100);

/// The cgroup of one attempt, with its two groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// Returns where the cgroup of an attempt would be: below our own. `None` where there is no cgroup v2 for us to use.
    pub(crate) fn plan(record: &Path) -> Option<PathBuf> {
        let own = own_directory(
            &fs::read_to_string("/proc/self/cgroup").ok()?,
            &fs::read_to_string("/proc/self/mountinfo").ok()?,
        )?;
        is_ours_to_divide(&own, is_delegated).then(|| own.join(name_for(record)))
    }

    /// Makes the cgroup for `owner`, or for ourselves.
    ///
    /// # Errors
    /// When the hierarchy is not ours to divide, or somebody is in a cgroup of that name.
    pub(crate) fn create(directory: &Path, owner: Option<&Identity>) -> io::Result<Cgroup> {
        let _as_ourselves = FileRights::of_this_process();
        let cgroup = Cgroup { directory: directory.to_owned() };
        if let Err(error) = fs::create_dir(directory) {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error);
            }
            // Left by a launch that ended half-way. Not empty is not ours.
            cgroup.remove()?;
            fs::create_dir(directory)?;
        }
        cgroup.furnish(owner).inspect_err(|_| {
            let _left_for_the_next = cgroup.remove();
        })?;
        Ok(cgroup)
    }

    fn furnish(&self, owner: Option<&Identity>) -> io::Result<()> {
        // Made with the rights of the owner, so that every file in them is his, `cgroup.kill` included.
        let mut _as_owner = None;
        if let Some(owner) = owner {
            let give = |path: &Path| chown(path, Some(owner.uid), Some(owner.gid));
            give(&self.directory)?;
            for name in GIVEN_AWAY {
                give(&self.directory.join(name))?;
            }
            _as_owner = Some(FileRights::of(owner.uid, owner.gid));
        }
        fs::create_dir(self.recorder().directory)?;
        fs::create_dir(self.trainer().directory)
    }

    /// Returns the cgroup of an attempt whose record belongs to `owner_uid`; `None` where it is gone or not that user's.
    pub(crate) fn open(directory: &Path, record: &Path, owner_uid: u32) -> Option<Cgroup> {
        let ours = directory.file_name()?.as_bytes() == name_for(record).as_bytes();
        let plain =
            directory.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let owned =
            fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir() && found.uid() == owner_uid);
        let real = directory.join("cgroup.procs").exists();
        (ours && plain && owned && real).then(|| Cgroup { directory: directory.to_owned() })
    }

    /// Returns the group of the recorder.
    pub(crate) fn recorder(&self) -> Group {
        Group { directory: self.directory.join("recorder") }
    }

    /// Returns the group of the trainer and all that it started.
    pub(crate) fn trainer(&self) -> Group {
        Group { directory: self.directory.join("trainer") }
    }

    /// Returns all of it, the recorder included.
    pub(crate) fn whole(&self) -> Group {
        Group { directory: self.directory.clone() }
    }

    /// Removes it when nobody is in it. Harms nobody: one with a process in it stays as it is.
    ///
    /// # Errors
    /// When something of it is left.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let _as_ourselves = FileRights::of_this_process();
        // Somebody who is dead for everybody else still counts for a moment.
        let until = Instant::now() + DEAD_WITHIN;
        if let Ok(population) = self.whole().population() {
            while population.is_populated() && Instant::now() < until {
                wake::wait(&[(population.as_fd(), PollFlags::PRI)], DEAD_WITHIN / 10);
            }
            if population.is_populated() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
        }
        self.whole().remove()
    }
}

/// One group of processes: a directory of the cgroup file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    directory: PathBuf,
}

impl Group {
    /// Returns the directory, for clone3(2).
    pub(crate) fn open_directory(&self) -> io::Result<File> {
        File::open(&self.directory)
    }

    /// Returns the file into which a process writes itself.
    pub(crate) fn open_procs(&self) -> io::Result<File> {
        OpenOptions::new().write(true).open(self.directory.join("cgroup.procs"))
    }

    /// Returns whether a process is in this group itself.
    pub(crate) fn holds(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(self.directory.join("cgroup.procs")) else { return false };
        text.lines().any(|line| line.parse() == Ok(pid))
    }

    /// Kills everybody in it at once, so that nobody can fork away.
    ///
    /// # Errors
    /// When the kernel refuses, or is older than 5.14 and does not know how.
    pub(crate) fn kill(&self) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.directory.join("cgroup.kill"))?.write_all(b"1")
    }

    /// Returns everybody in it and in the groups below.
    pub(crate) fn members(&self) -> Vec<ProcessIdentity> {
        let mut members = Vec::new();
        for directory in self.tree() {
            // A group that was removed meanwhile has no members, and a threaded one shows its own in a group above.
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            // One that ends between the listing and the look is none.
            let found = text.lines().filter_map(|line| ProcessIdentity::of(line.parse().ok()?).ok());
            members.extend(found.filter(ProcessIdentity::is_alive));
        }
        members
    }

    /// Starts to watch whether anybody is in it.
    ///
    /// # Errors
    /// When there is no such group.
    pub(crate) fn population(&self) -> io::Result<Population> {
        Ok(Population { events: File::open(self.directory.join("cgroup.events"))? })
    }

    /// Returns the kernel's count of kills for lack of memory in this group; `None` without the memory controller.
    pub(crate) fn memory_events(&self) -> Option<PathBuf> {
        Some(self.directory.join("memory.events")).filter(|file| file.exists())
    }

    /// Removes the group and all below it that have nobody in them.
    ///
    /// # Errors
    /// When something is left.
    pub(crate) fn remove(&self) -> io::Result<()> {
        for directory in self.tree().iter().rev().filter(|directory| **directory != self.directory) {
            let _then_the_last_fails = fs::remove_dir(directory);
        }
        match fs::remove_dir(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the directory and all below, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let (mut all, mut level) = (vec![self.directory.clone()], vec![self.directory.clone()]);
        for _ in 0..DEPTH_MAX {
            let entries =
                level.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            level = below.map(|entry| entry.path()).collect();
            all.extend_from_slice(&level);
        }
        all
    }
}

/// Whether anybody is in a group, and a descriptor that says when that changes: poll it for `PRI`.
#[derive(Debug)]
pub(crate) struct Population {
    events: File,
}

impl Population {
    /// Returns whether anybody is in the group or below. A group that is gone has nobody. Zombies do not count.
    pub(crate) fn is_populated(&self) -> bool {
        let mut text = [0; 256];
        // Read from the start of the same descriptor: this also says that the change was seen.
        let read = self.events.read_at(&mut text, 0).unwrap_or_default();
        String::from_utf8_lossy(&text[..read]).lines().any(|line| line == "populated 1")
    }
}

impl AsFd for Population {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// Returns the name of an attempt's cgroup. The same record always has the same one.
fn name_for(record: &Path) -> String {
    // FNV-1a with 64 bits: not against malice, a cgroup of that name must also belong to the right user.
    let hash = record.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("mhtraind-attempt-{hash:016x}")
}

/// Returns whether systemd lets somebody else make cgroups below `own`, or has no hand in it. In a unit without `Delegate=`
/// it is the only one who may, root or not: systemd.resource-control(5), "Delegate=".
fn is_ours_to_divide(own: &Path, is_delegated: impl Fn(&Path) -> bool) -> bool {
    let kind = |path: &Path| path.extension().and_then(|kind| kind.to_str().map(str::to_owned));
    let unit = own.ancestors().find(|path| {
        matches!(kind(path).as_deref(), Some("service" | "scope" | "slice" | "socket" | "mount" | "swap"))
    });
    unit.is_none_or(is_delegated)
}

/// systemd marks the units that it delegated; newer versions in `user.` as well, which everybody may read.
fn is_delegated(unit: &Path) -> bool {
    ["user.delegate", "trusted.delegate"].iter().any(|name| {
        let mut value = [0_u8; 1];
        rustix::fs::getxattr(unit, *name, &mut value).is_ok_and(|read| read == 1) && value == *b"1"
    })
}

/// Returns the directory of the v2 cgroup that `/proc/self/cgroup` names.
pub(crate) fn own_directory(cgroup: &str, mountinfo: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    directory(mountinfo, |mount| mount.kind == "cgroup2", path)
}

/// A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
pub(crate) struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    pub(crate) kind: &'a str,
    pub(crate) options: &'a str,
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
pub(crate) fn directory(mountinfo: &str, wanted: impl Fn(&Mount<'_>) -> bool, path: &str) -> Option<PathBuf> {
    let mount = mountinfo.lines().filter_map(Mount::parse).find(|mount| wanted(mount))?;
    let below = Path::new(path).strip_prefix(mount.root).ok()?;
    // Somebody in another cgroup namespace sees paths with "..", and one that was removed ends in " (deleted)".
    let inside = below.components().all(|part| matches!(part, Component::Normal(_)));
    (inside && !path.ends_with(" (deleted)")).then(|| Path::new(mount.point).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_directory_follows_the_mount() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let hybrid = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let of = |cgroup, mounts| own_directory(cgroup, mounts).map(|path| path.display().to_string());
        assert_eq!(of("0::/a.slice/b.service\n", unified).unwrap(), "/sys/fs/cgroup/a.slice/b.service");
        assert_eq!(of("4:memory:/x\n0::/\n", hybrid).unwrap(), "/sys/fs/cgroup/unified/");
        assert_eq!(of("0::/../elsewhere\n", unified), None);
        assert_eq!(of("0::/a (deleted)\n", unified), None);
        assert_eq!(of("4:memory:/x\n", unified), None);
    }

    #[test]
    fn a_unit_that_systemd_did_not_delegate_is_not_divided() {
        let nobody = |_: &Path| false;
        assert!(is_ours_to_divide(Path::new("/sys/fs/cgroup/unified"), nobody));
        assert!(is_ours_to_divide(Path::new("/sys/fs/cgroup/docker/0123"), nobody));
        assert!(!is_ours_to_divide(Path::new("/sys/fs/cgroup/user.slice/session-3.scope"), nobody));
        let service = Path::new("/sys/fs/cgroup/system.slice/mhtraind.service");
        let delegated = |unit: &Path| unit == service;
        assert!(is_ours_to_divide(service, delegated));
        assert!(is_ours_to_divide(&service.join("daemon"), delegated));
        assert!(!is_ours_to_divide(Path::new("/sys/fs/cgroup/system.slice/ssh.service"), delegated));
    }

    #[test]
    fn a_record_has_one_name_and_no_other_is_believed() {
        let name = name_for(Path::new("/var/lib/mhtraind/jobs/7/1"));
        assert_eq!(name, name_for(Path::new("/var/lib/mhtraind/jobs/7/1")));
        assert_ne!(name, name_for(Path::new("/var/lib/mhtraind/jobs/7/2")));
        let uid = fs::metadata("/sys").map_or(0, |sys| sys.uid());
        assert_eq!(Cgroup::open(Path::new("/sys/fs/cgroup/system.slice"), Path::new("/r"), uid), None);
    }
}
