//! What has been written to this file since I last looked?
//!
//! For files that somebody else writes: it may not be there yet, grow, be truncated, be replaced, or have a hole in its
//! middle where a capped log was cut.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

/// How much one call reads at most, so that a trainer that prints without end cannot hold up its follower.
const BYTES_PER_CALL: u64 = 1 << 20;

/// How much is handed over at once at most.
const BYTES_PER_PIECE: usize = 1 << 16;

/// An incremental reader of a growing file.
#[derive(Debug)]
pub struct LogTail {
    path: PathBuf,
    open: Option<Open>,
    skipped_bytes: u64,
}

/// The file that is being read; another one may be at the path by now.
#[derive(Debug)]
struct Open {
    file: File,
    offset: u64,
}

impl LogTail {
    /// Returns a reader that begins at the start of the file at `path`, which need not be there yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> LogTail {
        LogTail { path: path.into(), open: None, skipped_bytes: 0 }
    }

    /// Returns the path that is followed.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns how many bytes were jumped over because they had been cut out of the file before they were read.
    #[must_use]
    pub fn skipped_bytes(&self) -> u64 {
        self.skipped_bytes
    }

    /// Hands new bytes to `take`, at most 1 MiB, and returns how many there were; 0 means there is nothing new now.
    ///
    /// A truncated or replaced file is read from its start. Where bytes are missing, one newline is handed over in their
    /// place, so that the halves of two different lines never become one line.
    ///
    /// # Errors
    /// When the file is there and cannot be read, or is no plain file.
    pub fn read_new(&mut self, take: impl FnMut(&[u8])) -> io::Result<usize> {
        self.read_for(Duration::MAX, take)
    }

    /// Like [`LogTail::read_new`], and stops when `take` has had so much time: what a trainer that prints without end is to
    /// have is the processor.
    ///
    /// # Errors
    /// As [`LogTail::read_new`].
    pub fn read_for(&mut self, time: Duration, mut take: impl FnMut(&[u8])) -> io::Result<usize> {
        let begin = Instant::now();
        let is_over = || begin.elapsed() >= time;
        if self.open.is_none() && !self.open_path()? {
            return Ok(0);
        }
        let mut total = self.read_open(is_over, &mut take)?;
        // Only after the old file gave all it had is the one that replaced it opened.
        if total == 0 && self.is_replaced() {
            let in_the_middle = self.open.take().is_some_and(|old| old.offset > 0);
            if in_the_middle {
                take(b"\n");
            }
            if self.open_path()? {
                total = self.read_open(is_over, &mut take)?;
            }
        }
        Ok(total)
    }

    /// Reads until nothing is left: for the last look after the writer ended. Returns how many bytes there were.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn drain(&mut self, mut take: impl FnMut(&[u8])) -> io::Result<u64> {
        let mut total = 0;
        // Whoever still writes is not waited for: there may be no end to it.
        let most = std::fs::symlink_metadata(&self.path).map_or(0, |found| found.len()) + BYTES_PER_CALL;
        while total <= most {
            match self.read_new(&mut take)? {
                0 => break,
                read => total += read as u64,
            }
        }
        Ok(total)
    }

    /// Returns whether there was a file to open.
    fn open_path(&mut self) -> io::Result<bool> {
        // It lies where another user may put something else. Without waiting, because a pipe may have nobody at its other
        // end; without following a link, which may lead into our own /proc; never to become our terminal.
        let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY).bits().cast_signed();
        match OpenOptions::new().read(true).custom_flags(flags).open(&self.path) {
            Ok(file) if !file.metadata()?.is_file() => Err(io::ErrorKind::InvalidInput.into()),
            Ok(file) => {
                self.open = Some(Open { file, offset: 0 });
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns whether another file is at the path than the one that is open. A removed file is still read to its end.
    fn is_replaced(&self) -> bool {
        let Some(open) = &self.open else { return false };
        let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        match (open.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(ours), Ok(theirs)) => identity(ours) != identity(theirs),
            _ => false,
        }
    }

    fn read_open(&mut self, is_over: impl Fn() -> bool, take: &mut impl FnMut(&[u8])) -> io::Result<usize> {
        let Some(open) = &mut self.open else { return Ok(0) };
        let size = open.file.metadata()?.size();
        if size < open.offset {
            open.offset = 0;
            take(b"\n");
        }
        let mut buffer = vec![0; BYTES_PER_PIECE];
        let end = open.offset.saturating_add(BYTES_PER_CALL);
        let mut total = 0;
        while open.offset < end && (total == 0 || !is_over()) {
            let read = match open.file.read_at(&mut buffer, open.offset) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            // Asked after the reading: a hole that is made in between then hides good bytes, never the other way round.
            match data_from(&open.file, open.offset, size)? {
                Data::Here { until } => {
                    let usable = usize::try_from(until - open.offset).map_or(read, |usable| usable.min(read));
                    take(&buffer[..usable]);
                    open.offset += usable as u64;
                    total += usable;
                }
                Data::HoleUntil(next) => {
                    self.skipped_bytes += next - open.offset;
                    open.offset = next;
                    take(b"\n");
                    total += 1;
                }
            }
        }
        Ok(total)
    }
}

/// What is at an offset of a file.
enum Data {
    /// Bytes, up to this offset at least.
    Here { until: u64 },
    /// Nothing, up to this offset.
    HoleUntil(u64),
}

/// File systems without holes, and devices, answer with an error or with "data everywhere": then everything is data.
fn data_from(file: &File, offset: u64, size: u64) -> io::Result<Data> {
    let everything = Ok(Data::Here { until: u64::MAX });
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(next) if next > offset => return Ok(Data::HoleUntil(next)),
        // No data up to the end: a hole that reaches there, or a file that was cut at this moment.
        Err(Errno::NXIO) if size > offset => return Ok(Data::HoleUntil(size)),
        Ok(_) => {}
        Err(_) => return everything,
    }
    match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
        Ok(hole) if hole > offset => Ok(Data::Here { until: hole }),
        _ => everything,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use std::io::Write;

    fn text(tail: &mut LogTail) -> String {
        let mut all = Vec::new();
        tail.read_new(|bytes| all.extend_from_slice(bytes)).unwrap();
        String::from_utf8(all).unwrap()
    }

    fn append(path: &Path, bytes: &[u8]) {
        OpenOptions::new().append(true).create(true).open(path).unwrap().write_all(bytes).unwrap();
    }

    #[test]
    fn a_file_that_comes_later_is_read_from_its_start_and_then_by_what_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut tail = LogTail::new(&path);
        assert_eq!(text(&mut tail), "");
        append(&path, b"one\ntw");
        assert_eq!(text(&mut tail), "one\ntw");
        assert_eq!(text(&mut tail), "");
        append(&path, b"o\n");
        assert_eq!(text(&mut tail), "o\n");
    }

    #[test]
    fn a_truncated_file_is_read_again_from_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        append(&path, b"long enough, half");
        let mut tail = LogTail::new(&path);
        text(&mut tail);
        fs::write(&path, "new\n").unwrap();
        assert_eq!(text(&mut tail), "\nnew\n");
    }

    #[test]
    fn a_replaced_file_is_read_after_the_rest_of_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("log"), dir.path().join("new"));
        append(&path, b"a");
        let mut tail = LogTail::new(&path);
        assert_eq!(text(&mut tail), "a");
        append(&path, b"b");
        fs::write(&new, "c\n").unwrap();
        fs::rename(&new, &path).unwrap();
        // The old one's last byte was written before the rename and is still there to read.
        assert_eq!(text(&mut tail), "b");
        assert_eq!(text(&mut tail), "\nc\n");
    }

    #[test]
    fn one_call_is_bounded_and_drain_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        append(&path, &vec![b'x'; 5 << 20]);
        let mut tail = LogTail::new(&path);
        assert_eq!(tail.read_new(|_| {}).unwrap(), 1 << 20);
        assert_eq!(tail.drain(|_| {}).unwrap(), 4 << 20);
    }

    #[test]
    fn a_hole_becomes_one_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let file = File::create(&path).unwrap();
        file.write_all_at(b"head", 0).unwrap();
        file.write_all_at(b"tail\n", 8 << 20).unwrap();
        let mut tail = LogTail::new(&path);
        let mut all = Vec::new();
        tail.drain(|bytes| all.extend_from_slice(bytes)).unwrap();
        // The rest of the head's block is zeros that are really there.
        let all: Vec<u8> = all.into_iter().filter(|byte| *byte != 0).collect();
        assert_eq!(String::from_utf8(all).unwrap(), "head\ntail\n");
        assert!(tail.skipped_bytes() > 7 << 20);
    }

    #[test]
    fn a_directory_is_an_error_and_no_panic() {
        let dir = tempfile::tempdir().unwrap();
        assert!(LogTail::new(dir.path()).read_new(|_| {}).is_err());
    }
}
