//! Is this directory fit to hold the store, and do its files stay where they are?
//!
//! ```text
//! mhtraind.db       the database
//! mhtraind.db-wal   what was committed and is not yet copied into it; belongs to it
//! mhtraind.db-shm   SQLite's index of the -wal; can be made again
//! lock              held (flock) by the process that has the store open; names its pid
//! ```
//!
//! All of mode 0600. The directory may be searched by others (0711), because other things may live in it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::StoreError;

/// Name of the database in the state directory.
pub(crate) const DATABASE: &str = "mhtraind.db";
const WAL: &str = "mhtraind.db-wal";
const SHM: &str = "mhtraind.db-shm";
const LOCK: &str = "lock";
const PRIVATE: u32 = 0o600;

/// A state directory that this process holds the lock of.
#[derive(Debug)]
pub(crate) struct StateDirectory {
    path: PathBuf,
    /// Held, not read: the lock goes with the last descriptor of this file.
    _lock: File,
    /// The files that must stay in place.
    files: Vec<Identified>,
}

/// A file, as it was when it was opened.
#[derive(Debug)]
pub(crate) struct Identified {
    pub(crate) path: PathBuf,
    device: u64,
    inode: u64,
}

impl StateDirectory {
    /// Makes the directory if it is missing, checks it, and takes its lock.
    pub(crate) fn open(path: &Path) -> Result<StateDirectory, StoreError> {
        create(path)?;
        let path = path.canonicalize().map_err(StoreError::io("open", path))?;
        refuse_others(&path)?;
        refuse_network(&path)?;
        let lock = lock(&path)?;
        let mut directory = StateDirectory { path, _lock: lock, files: Vec::new() };
        directory.hold(LOCK)?;
        directory.make_private()?;
        Ok(directory)
    }

    /// Returns the path of the database.
    pub(crate) fn database(&self) -> PathBuf {
        self.path.join(DATABASE)
    }

    /// Returns whether something is in the log of the database.
    pub(crate) fn has_log(&self) -> bool {
        fs::symlink_metadata(self.path.join(WAL)).is_ok_and(|log| log.len() > 0)
    }

    /// Notes which files SQLite has opened, and makes their names durable. To be called once they all exist.
    pub(crate) fn hold_database(&mut self) -> Result<(), StoreError> {
        self.hold(DATABASE)?;
        self.hold(WAL)?;
        File::open(&self.path).and_then(|it| it.sync_all()).map_err(StoreError::io("sync", &self.path))
    }

    /// Returns an error unless every file that was opened is still the one at its path.
    ///
    /// The -wal counts: what is committed to a removed one is lost. So does the lock: with another file at its
    /// path, another process may believe that the store is its own.
    pub(crate) fn check_in_place(&self) -> Result<(), StoreError> {
        match self.files.iter().find(|file| !file.is_in_place()) {
            None => Ok(()),
            Some(file) => Err(StoreError::replaced(file)),
        }
    }

    fn hold(&mut self, name: &str) -> Result<(), StoreError> {
        let path = self.path.join(name);
        let metadata = fs::symlink_metadata(&path).map_err(StoreError::io("look at", &path))?;
        self.files.push(Identified { path, device: metadata.dev(), inode: metadata.ino() });
        Ok(())
    }

    /// Makes the database if it is missing, and all files private that a copy may have made readable.
    ///
    /// SQLite gives its own files the mode of the database, whatever the umask is, so the database's mode decides.
    fn make_private(&self) -> Result<(), StoreError> {
        let database = self.database();
        match options().create_new(true).open(&database) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(StoreError::io("create", &database)(error)),
        }
        for name in [LOCK, DATABASE, WAL, SHM] {
            let path = self.path.join(name);
            match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::io("look at", &path)(error)),
                Ok(metadata) if metadata.permissions().mode() & 0o7777 == PRIVATE => {}
                Ok(_) => fs::set_permissions(&path, Permissions::from_mode(PRIVATE))
                    .map_err(StoreError::io("change the mode of", &path))?,
            }
        }
        Ok(())
    }
}

impl Identified {
    fn is_in_place(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode))
    }
}

/// Makes the directory and what is missing above it, each name durable before the next.
fn create(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create(parent)?;
    DirBuilder::new().mode(0o700).create(path).map_err(StoreError::io("create", path))?;
    File::open(parent).and_then(|it| it.sync_all()).map_err(StoreError::io("sync", parent))
}

fn refuse_others(path: &Path) -> Result<(), StoreError> {
    let metadata = fs::metadata(path).map_err(StoreError::io("look at", path))?;
    let (owner, mode) = (metadata.uid(), metadata.permissions().mode() & 0o7777);
    if owner == rustix::process::geteuid().as_raw() && mode & 0o022 == 0 {
        return Ok(());
    }
    Err(StoreError::NotPrivate { directory: path.to_owned(), owner, mode })
}

fn refuse_network(path: &Path) -> Result<(), StoreError> {
    let found = rustix::fs::statfs(path).map_err(|error| StoreError::io("look at", path)(error.into()))?;
    match network_file_system(found.f_type) {
        None => Ok(()),
        Some(kind) => Err(StoreError::NetworkFileSystem { directory: path.to_owned(), kind }),
    }
}

/// Returns the name of a file system that several hosts can mount; `None` for all others.
///
/// SQLite's write-ahead log needs memory that all its users share, and the lock needs all its users to see it. FUSE
/// is not here: most of what it serves is local, and the kernel does not say what is behind it.
/// Source: `f_type` in statfs(2) and `include/uapi/linux/magic.h` of Linux 6.12; Lustre, GPFS and BeeGFS from their
/// own headers.
fn network_file_system(magic: i64) -> Option<&'static str> {
    Some(match magic & 0xffff_ffff {
        0x6969 => "NFS",
        0x517b => "SMB",
        0xff53_4d42 => "CIFS",
        0xfe53_4d42 => "SMB2",
        0x0102_1997 => "9p",
        0x00c3_6400 => "Ceph",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x0116_1970 => "GFS2",
        0x7461_636f => "OCFS2",
        0x0bd0_0bd0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        _ => return None,
    })
}

/// How long the lock of a dead process may still be held: a child that it was about to execute has the descriptor until
/// that exec.
const ORPHANED_LOCK: Duration = Duration::from_secs(3);

/// Takes the lock and writes this process into it. Waits only for what a dead process left behind.
fn lock(directory: &Path) -> Result<File, StoreError> {
    let path = directory.join(LOCK);
    let mut file = options().create(true).open(&path).map_err(StoreError::io("open", &path))?;
    let until = Instant::now() + ORPHANED_LOCK;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) => {
                let pid = read_pid(&file);
                // One that we have just let go may be with a child of ours until that executes its program.
                let held = |pid| is_running(pid) && pid != std::process::id();
                if Instant::now() >= until || pid.is_none_or(held) {
                    return Err(StoreError::Busy { directory: directory.to_owned(), pid });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(StoreError::io("lock", &path)(error.into())),
        }
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(StoreError::io("write", &path))?;
    Ok(file)
}

/// Returns whether there is such a process; whoever belongs to somebody else is one too.
fn is_running(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

fn read_pid(file: &File) -> Option<u32> {
    let mut bytes = [0; 32];
    let count = file.read_at(&mut bytes, 0).ok()?;
    std::str::from_utf8(&bytes[..count]).ok()?.trim().parse().ok()
}

/// A link is never followed: nobody but the owner can make one here, and the owner should not.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[expect(clippy::cast_possible_wrap, reason = "a flag of open(2), which takes an int")]
    options.read(true).write(true).mode(PRIVATE).custom_flags(OFlags::NOFOLLOW.bits() as i32);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_by_their_magic_and_local_ones_are_not_refused() {
        assert_eq!(network_file_system(0x6969), Some("NFS"));
        assert_eq!(network_file_system(0xff53_4d42), Some("CIFS"));
        // As a 32-bit kernel would extend it.
        assert_eq!(network_file_system(i64::from(0xff53_4d42_u32.cast_signed())), Some("CIFS"));
        // ext4, xfs, btrfs, zfs, overlay, tmpfs, FUSE.
        for local in [0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1, 0x794c_7630, 0x0102_1994, 0x6573_5546] {
            assert_eq!(network_file_system(local), None, "{local:#x}");
        }
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, refused) in [(0o700, false), (0o711, false), (0o755, false), (0o770, true), (0o1777, true)]
        {
            fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            let result = StateDirectory::open(dir.path());
            assert_eq!(matches!(result, Err(StoreError::NotPrivate { .. })), refused, "{mode:o}: {result:?}");
        }
    }
}
