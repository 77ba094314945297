//! How does a log that the trainer itself appends to stay small?
//!
//! The file is never rotated or cut, because its writer keeps it open. Instead the disk blocks in its middle are given back
//! (`FALLOC_FL_PUNCH_HOLE`, fallocate(2)): the size stays, the hole reads as zeros, [`LogTail`](crate::LogTail) jumps over
//! it. The head holds the arguments and the start, the tail the last words; both decide a diagnosis.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::Errno;

/// Holes are made of whole blocks. A multiple of every usual block size; smaller parts would only be overwritten with zeros.
const BLOCK_BYTES: u64 = 64 * 1024;

/// `st_blocks` counts in these, whatever the file system's own block is: stat(3type).
const STAT_BLOCK_BYTES: u64 = 512;

/// The log files of one attempt and their bound.
#[derive(Debug)]
pub(crate) struct LogCap {
    files: Vec<File>,
    cap_bytes: Option<u64>,
}

impl LogCap {
    /// `files` must be open for writing.
    pub(crate) fn new(files: Vec<File>, cap_bytes: Option<u64>) -> LogCap {
        LogCap { files, cap_bytes }
    }

    /// Gives back what is beyond the bound. A file system that cannot do that keeps the whole file, and is not asked again.
    pub(crate) fn enforce(&mut self) {
        let Some(cap_bytes) = self.cap_bytes else { return };
        self.files.retain(|file| shrink(file, cap_bytes).is_ok());
    }
}

/// Free bytes of a disk beyond which it is not asked whether there is room for a line.
const MUCH_ROOM_BYTES: u64 = 1 << 30;

/// Returns whether the disk of a log is far from being full. Of its owner's share this says nothing.
pub(crate) fn has_much_room(log: &Path) -> bool {
    let found = log.parent().and_then(|directory| rustix::fs::statvfs(directory).ok());
    found.is_some_and(|found| found.f_bavail.saturating_mul(found.f_frsize) >= MUCH_ROOM_BYTES)
}

/// Returns whether the disk of a log, or its owner's share of it, has no room left, or has turned read-only; `false` where that
/// cannot be asked.
///
/// A file without a name asks for it and is gone at once. Unlike statfs(2) it knows of quotas and of what is kept for root.
pub(crate) fn is_disk_full(log: &Path) -> bool {
    let Some(directory) = log.parent() else { return false };
    let flags = OFlags::TMPFILE.bits().cast_signed();
    let nameless = OpenOptions::new().write(true).mode(0o600).custom_flags(flags).open(directory);
    let taken = match nameless {
        Ok(file) => fallocate(&file, FallocateFlags::empty(), 0, BLOCK_BYTES).err(),
        Err(error) => Errno::from_io_error(&error),
    };
    matches!(taken, Some(Errno::NOSPC | Errno::DQUOT | Errno::ROFS))
}

/// Keeps a quarter of the bound at the head and half of it at the tail; the rest is room to grow until the next look.
fn shrink(file: &File, cap_bytes: u64) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.blocks() * STAT_BLOCK_BYTES <= cap_bytes {
        return Ok(());
    }
    let from = (cap_bytes / 4).next_multiple_of(BLOCK_BYTES);
    let to = metadata.size().saturating_sub(cap_bytes / 2) / BLOCK_BYTES * BLOCK_BYTES;
    if from >= to {
        return Ok(());
    }
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, to - from)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn head_and_tail_stay_and_the_middle_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = OpenOptions::new().append(true).create(true).read(true).open(&path).unwrap();
        let line = |number: u64| format!("{number:015}\n");
        for number in 0..(1 << 20) {
            file.write_all(line(number).as_bytes()).unwrap();
        }
        let size = file.metadata().unwrap().size();
        LogCap::new(vec![file.try_clone().unwrap()], Some(1 << 20)).enforce();
        assert_eq!(file.metadata().unwrap().size(), size);
        assert!(file.metadata().unwrap().blocks() * 512 <= 1 << 20);
        let read = |at| {
            let mut bytes = [0; 16];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        assert_eq!(read(0), line(0).as_bytes());
        assert_eq!(read((1 << 18) - 16), line((1 << 14) - 1).as_bytes());
        assert_eq!(read(size - 16), line((1 << 20) - 1).as_bytes());
        assert_eq!(read(size - (1 << 19)), line((1 << 20) - (1 << 15)).as_bytes());
        assert_eq!(read(size / 2), [0; 16]);
    }

    #[test]
    fn without_a_bound_nothing_goes() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![b'x'; 1 << 20]).unwrap();
        LogCap::new(vec![file.try_clone().unwrap()], None).enforce();
        assert!(file.metadata().unwrap().blocks() * 512 >= 1 << 20);
    }
}
