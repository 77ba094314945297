//! Which content has a file?
//!
//! A BLAKE3 hash of its bytes, so that a copy is known for what it is wherever it lies. Reading gigabytes takes seconds:
//! what was hashed once is remembered by what the kernel says about the file, and is not read again until that changes.
//!
//! ```text
//! path, size, mtime, ctime, inode, device  --unchanged-->  the hash that is remembered
//!                                          --else------->  the bytes are read, until the time is over
//! ```
//!
//! The time of the last change of the *inode* (ctime) is among them because no program can set it: content that was written
//! in place with its old mtime put back is seen.

use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Most files that are remembered: a data set is looked at in 1000 files at most.
const REMEMBERED_MAX: usize = 4000;

/// Longest list of remembered files that is read: 4000 entries of a path of 4 KiB.
const MEMORY_BYTES_MAX: u64 = 32 << 20;

/// Seconds for which a file that was changed is hashed each time.
///
/// A clock that file systems stamp with may stand for this long, so a second change could leave the same times. Source:
/// FAT stamps every 2 s, the coarsest of the usual ones; Git treats the same case so ("racy Git", its technical notes).
const UNSETTLED_S: u64 = 2;

/// Bytes that are read at once, between two looks at the clock: some milliseconds on a slow disk.
const PIECE_BYTES: usize = 1 << 20;

/// What the kernel says about a file without reading it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    inode: u64,
    device: u64,
    bytes: u64,
    /// Last change of content, name or rights, as the kernel says: seconds since 1970 and nanoseconds.
    changed: (i64, i64),
    /// Last change of the content, as its writer says: seconds since 1970 and nanoseconds.
    modified: (i64, i64),
    path: PathBuf,
}

impl FileIdentity {
    /// Returns the identity of the file at `path`, links followed; `None` where there is none that can be asked about.
    pub fn of(path: &Path) -> Option<FileIdentity> {
        path.metadata().ok().map(|found| FileIdentity::from_metadata(path, &found))
    }

    fn from_metadata(path: &Path, found: &Metadata) -> FileIdentity {
        FileIdentity {
            inode: found.ino(),
            device: found.dev(),
            bytes: found.len(),
            changed: (found.ctime(), found.ctime_nsec()),
            modified: (found.mtime(), found.mtime_nsec()),
            path: path.to_owned(),
        }
    }

    /// Returns whether any change from `now` on would show in the identity.
    pub fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        u64::try_from(self.changed.0).is_ok_and(|changed| changed.saturating_add(UNSETTLED_S) < now)
    }
}

/// The content of a file, as far as it was found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// BLAKE3 of all bytes, 64 hexadecimal digits.
    Hash(String),
    /// There was no time to read it to its end: nothing but its identity is known.
    Unread(FileIdentity),
    /// There is no such file, or it cannot be read.
    Absent,
}

/// A file with its content.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Remembered {
    identity: FileIdentity,
    content: Content,
}

/// Hashes files, and remembers them in a file of its own.
#[derive(Debug, Default)]
pub struct ContentHashes {
    /// The last that was read at the end.
    remembered: Vec<Remembered>,
    is_changed: bool,
}

impl ContentHashes {
    /// Reads what is remembered in `memory`: nothing where that file is not there, is damaged or too long.
    pub fn open(memory: &Path) -> ContentHashes {
        let mut text = Vec::new();
        let read = File::open(memory).and_then(|file| file.take(MEMORY_BYTES_MAX).read_to_end(&mut text));
        let remembered = read.ok().and_then(|_| serde_json::from_slice(&text).ok()).unwrap_or_default();
        ContentHashes { remembered, is_changed: false }
    }

    /// Returns the content of the file at `path`; what is not remembered is read until `deadline`.
    ///
    /// A file that was not read to its end by then is remembered too, so that the time is not spent on it again.
    pub fn content(&mut self, path: &Path, deadline: Instant) -> Content {
        self.content_at(path, deadline, SystemTime::now())
    }

    fn content_at(&mut self, path: &Path, deadline: Instant, now: SystemTime) -> Content {
        let Some(identity) = FileIdentity::of(path) else { return Content::Absent };
        if let Some(at) = self.remembered.iter().position(|known| known.identity == identity) {
            return self.remembered[at].content.clone();
        }
        let content = hash(path, deadline).unwrap_or(Content::Absent);
        // Changed while it was read: the hash may be of neither content, and holds for this time alone.
        if content != Content::Absent
            && identity.is_settled(now)
            && FileIdentity::of(path).as_ref() == Some(&identity)
        {
            self.remembered.retain(|known| known.identity.path != identity.path);
            self.remembered.push(Remembered { identity, content: content.clone() });
            self.is_changed = true;
        }
        content
    }

    /// Writes what is remembered to `memory`, for the owner's eyes alone. Another process that does the same at that moment
    /// loses nothing but time.
    ///
    /// # Errors
    /// The file or its directory cannot be written.
    pub fn save(&self, memory: &Path) -> std::io::Result<()> {
        if !self.is_changed {
            return Ok(());
        }
        if let Some(directory) = memory.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let newest = &self.remembered[self.remembered.len().saturating_sub(REMEMBERED_MAX)..];
        // JSON has no words for other paths, and the rest is worth keeping.
        let told: Vec<_> = newest.iter().filter(|known| known.identity.path.to_str().is_some()).collect();
        let mut file = tempfile::NamedTempFile::new_in(memory.parent().unwrap_or(Path::new(".")))?;
        file.write_all(&serde_json::to_vec(&told)?)?;
        file.persist(memory)?;
        Ok(())
    }
}

/// Returns the hash of a file, or its identity where it is not read to its end by `deadline`.
fn hash(path: &Path, deadline: Instant) -> std::io::Result<Content> {
    let mut file = File::open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Ok(Content::Absent);
    }
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        if Instant::now() >= deadline {
            return Ok(Content::Unread(FileIdentity::from_metadata(path, &found)));
        }
        match file.read(&mut piece)? {
            0 => return Ok(Content::Hash(hasher.finalize().to_hex().to_string())),
            read => hasher.update(&piece[..read]),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    /// A moment at which every file here has been unchanged for long.
    fn settled() -> SystemTime {
        SystemTime::now() + Duration::from_secs(60)
    }

    #[test]
    fn the_hash_is_that_of_the_content_whatever_its_name_and_time() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        // More than one piece.
        let content = b"abc".repeat(PIECE_BYTES);
        std::fs::write(&a, &content).unwrap();
        std::fs::write(&b, &content).unwrap();
        File::options().write(true).open(&b).unwrap().set_modified(UNIX_EPOCH).unwrap();
        let mut hashes = ContentHashes::default();
        let of_a = hashes.content(&a, later());
        assert_eq!(of_a, Content::Hash(blake3::hash(&content).to_hex().to_string()));
        assert_eq!(hashes.content(&b, later()), of_a);
        assert_eq!(hashes.content(&directory.path().join("c"), later()), Content::Absent);
        assert_eq!(hashes.content(directory.path(), later()), Content::Absent);
    }

    #[test]
    fn an_unchanged_file_is_not_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let (file, memory) = (directory.path().join("a"), directory.path().join("cache/hashes.json"));
        std::fs::write(&file, "abc").unwrap();
        let mut hashes = ContentHashes::open(&memory);
        let content = hashes.content_at(&file, later(), settled());
        hashes.save(&memory).unwrap();
        assert_eq!(memory.metadata().unwrap().mode() & 0o777, 0o600);
        // Without time to read anything.
        assert_eq!(ContentHashes::open(&memory).content(&file, Instant::now()), content);
        assert!(matches!(ContentHashes::default().content(&file, Instant::now()), Content::Unread(_)));
    }

    #[test]
    fn a_change_in_place_with_its_old_time_put_back_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        std::fs::write(&file, "abc").unwrap();
        let mut hashes = ContentHashes::default();
        let before = hashes.content_at(&file, later(), settled());
        let then = FileIdentity::of(&file).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        // The kernel's clock for stamps goes in steps of some milliseconds.
        while FileIdentity::of(&file).unwrap().changed == then.changed {
            std::fs::write(&file, "abd").unwrap();
            File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
        }
        let now = FileIdentity::of(&file).unwrap();
        assert_eq!((now.bytes, now.modified, now.inode), (then.bytes, then.modified, then.inode));
        let after = hashes.content_at(&file, later(), settled());
        assert_ne!(after, before);
        assert_eq!(after, Content::Hash(blake3::hash(b"abd").to_hex().to_string()));
    }

    #[test]
    fn a_file_that_may_change_unseen_is_not_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        std::fs::write(&file, "abc").unwrap();
        let changed = FileIdentity::of(&file).unwrap().changed.0;
        let mut hashes = ContentHashes::default();
        let soon = UNIX_EPOCH + Duration::from_secs(u64::try_from(changed).unwrap() + UNSETTLED_S);
        hashes.content_at(&file, later(), soon);
        assert!(hashes.remembered.is_empty());
        hashes.content_at(&file, later(), soon + Duration::from_secs(1));
        assert_eq!(hashes.remembered.len(), 1);
    }

    #[test]
    fn what_could_not_be_read_in_time_is_not_tried_again_until_it_changes() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        std::fs::write(&file, "abc").unwrap();
        let mut hashes = ContentHashes::default();
        let unread = hashes.content_at(&file, Instant::now(), settled());
        assert!(matches!(unread, Content::Unread(_)));
        assert_eq!(hashes.content_at(&file, later(), settled()), unread);
        std::fs::write(&file, "abcd").unwrap();
        assert!(matches!(hashes.content_at(&file, later(), settled()), Content::Hash(_)));
    }

    #[test]
    fn a_damaged_memory_is_none_and_a_full_one_forgets_the_oldest() {
        let directory = tempfile::tempdir().unwrap();
        let memory = directory.path().join("hashes.json");
        std::fs::write(&memory, "[{").unwrap();
        let mut hashes = ContentHashes::open(&memory);
        assert!(hashes.remembered.is_empty());
        let file = directory.path().join("a");
        std::fs::write(&file, "abc").unwrap();
        let identity = FileIdentity::of(&file).unwrap();
        for number in 0..=REMEMBERED_MAX {
            let identity = FileIdentity { path: PathBuf::from(number.to_string()), ..identity.clone() };
            hashes.remembered.push(Remembered { identity, content: Content::Absent });
        }
        hashes.is_changed = true;
        hashes.save(&memory).unwrap();
        let left = ContentHashes::open(&memory).remembered;
        assert_eq!((left.len(), &left[0].identity.path), (REMEMBERED_MAX, &PathBuf::from("1")));
    }
}
