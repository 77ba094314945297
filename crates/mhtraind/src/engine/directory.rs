//! Where does everything of a job lie?
//!
//! ```text
//! <output_dir>/
//!   attempt-1/  attempt-2/ …   what the trainer writes: logging.jsonl, checkpoint-N, args.json
//!   final -> attempt-2/checkpoint-40     on success, a relative link
//!   receipt.json                         what was chosen, why, what was retried
//!   previous-1/ …              an earlier job that was here, set aside as a whole; `.previous.new` until it is
//!   .mhtraind/
//!     lock                     held by the process that runs the job
//!     job.json                 the job as it was understood, defaults filled in
//!     journal.jsonl            what happened, one event a line; state is their fold
//!     attempt-1/ …             the recorder's files and the trainer's stdout and stderr
//! ```

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mhtrain_failpoint::reach;
use mhtrain_job::receipt::Receipt;
use rustix::fs::{FlockOperation, OFlags, flock};
use serde_json::Value;

use crate::failure::{Failure, Status, unwritable};

/// Largest receipt that is read: its owner could have put anything there.
const RECEIPT_BYTES_MAX: u64 = 16 << 20;

/// Where an earlier job is gathered until all of it is there.
const UNFINISHED_ASIDE: &str = ".previous.new";

/// Says beside the journal of a job that was set aside that the next one goes on with it.
const GONE_ON_WITH: &str = ".mhtraind/gone-on-with";

/// Files that are put on disk at the same time.
const SYNCED_AT_ONCE: usize = 16;

/// One job's directory, locked for this process.
#[derive(Debug)]
pub struct JobDirectory {
    root: PathBuf,
    /// Where our own files go.
    private: PathBuf,
    /// Held until the process ends; the kernel gives it back whatever happens to us.
    _lock: fs::File,
}

/// What a file is to outlive.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// The end of every process, but a power cut only by chance: it is written again then.
    UntilPowerCut,
    /// A power cut: nobody writes it again.
    OverPowerCut,
}

impl JobDirectory {
    /// Makes the directory where it is missing, and locks it.
    ///
    /// # Errors
    /// It cannot be made, or another process runs a job in it.
    pub fn open(root: &Path) -> Result<JobDirectory, Failure> {
        JobDirectory::open_beside(root, root.join(".mhtraind"))
    }

    /// Like [`JobDirectory::open`], with our own files in `own`, which must be there. The lock stays in the job's
    /// directory: it keeps whoever else runs a job there away.
    ///
    /// # Errors
    /// As [`JobDirectory::open`].
    pub fn open_beside(root: &Path, own: PathBuf) -> Result<JobDirectory, Failure> {
        let private = root.join(".mhtraind");
        fs::create_dir_all(root).map_err(|e| match root.ancestors().find(|path| path.exists()) {
            Some(there) if !there.is_dir() => {
                let (root, there) = (root.display(), there.display());
                let what = format!("the output_dir {root} cannot be: {there} is no directory");
                Failure::bad_input("bad_output_dir", what).help("choose another one".to_owned())
            }
            Some(_) | None => unwritable(root, &e),
        })?;
        if !private.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(&private).map_err(|e| unwritable(&private, &e))?;
        }
        let path = private.join("lock");
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(untrusted())
            .open(&path)
            .map_err(|e| unwritable(&path, &e))?;
        lock_soon(&lock).map_err(|e| {
            if e == rustix::io::Errno::WOULDBLOCK {
                Failure::new(
                    Status::BadInput,
                    "busy",
                    format!("another mhtraind runs a job in {}", root.display()),
                )
                .help("wait for it, or give this job another output_dir".to_owned())
            } else {
                unwritable(&path, &e.into())
            }
        })?;
        let directory = JobDirectory { root: root.to_owned(), private: own, _lock: lock };
        directory.put_journal_back()?;
        Ok(directory)
    }

    /// Returns the job's output directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns where the trainer of an attempt writes.
    pub fn attempt(&self, number: u32) -> PathBuf {
        self.root.join(format!("attempt-{number}"))
    }

    /// Returns where the recorder of an attempt writes.
    pub fn record(&self, number: u32) -> PathBuf {
        self.private().join(format!("attempt-{number}"))
    }

    /// Returns the directory of our own files.
    pub fn private(&self) -> PathBuf {
        self.private.clone()
    }

    /// Returns whether a job was run here before.
    pub fn holds_a_job(&self) -> bool {
        holds_a_job(&self.root)
    }

    /// Returns the journal's path.
    pub fn journal(&self) -> PathBuf {
        self.private().join("journal.jsonl")
    }

    /// Returns the places where earlier jobs were moved to.
    pub fn asides(&self) -> Vec<PathBuf> {
        let places = (1u32..).map(|n| self.root.join(format!("previous-{n}")));
        places.take_while(|path| path.is_dir()).collect()
    }

    /// Notes that the job which is about to be set aside is gone on with: whoever comes after a kill must know its checkpoints.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn goes_on_with_this(&self) -> Result<(), Failure> {
        let path = self.root.join(GONE_ON_WITH);
        write_whole(&path, b"", Lasting::OverPowerCut).map_err(|e| unwritable(&path, &e))
    }

    /// Notes that nothing is gone on with: what is about to be set aside, or what was set aside last and not gone on with yet.
    ///
    /// # Errors
    /// The disk refuses it.
    pub fn goes_on_with_none(&self) -> Result<(), Failure> {
        let mut marks =
            vec![self.root.join(GONE_ON_WITH), self.root.join(UNFINISHED_ASIDE).join(GONE_ON_WITH)];
        if !self.holds_a_job() {
            marks.extend(self.asides().last().map(|aside| aside.join(GONE_ON_WITH)));
        }
        for path in marks {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(unwritable(&path, &e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns where the jobs lie that the one of this directory goes on with, the last one first.
    pub fn gone_on_with(&self) -> Vec<PathBuf> {
        let asides = self.asides().into_iter().rev();
        asides.take_while(|aside| aside.join(GONE_ON_WITH).exists()).collect()
    }

    /// Moves what an earlier job left here out of the way, into `previous-N` beside it; nothing is deleted.
    ///
    /// It has that name when all of it is there. A process that is killed before leaves a part, and whoever comes next moves
    /// the rest to it: two halves would be no job.
    ///
    /// # Errors
    /// Something cannot be moved.
    pub fn set_earlier_job_aside(&self) -> Result<PathBuf, Failure> {
        let aside = self.root.join(UNFINISHED_ASIDE);
        let kept = aside.join(".mhtraind");
        fs::create_dir_all(&kept).map_err(|e| unwritable(&kept, &e))?;
        reach("directory.set_aside", "begun");
        let entries = fs::read_dir(&self.root).map_err(|e| unwritable(&self.root, &e))?;
        for entry in entries {
            let entry = entry.map_err(|e| unwritable(&self.root, &e))?;
            let name = entry.file_name();
            let ours = name.to_str().is_some_and(|name| {
                name.starts_with("attempt-") || name == "final" || name == "receipt.json"
            });
            if ours {
                fs::rename(entry.path(), aside.join(&name)).map_err(|e| unwritable(&aside, &e))?;
                reach("directory.set_aside", &name.to_string_lossy());
            }
        }
        let own = self.root.join(".mhtraind");
        let own = fs::read_dir(&own).map_err(|e| unwritable(&own, &e))?;
        for entry in own.flatten().filter(|entry| entry.file_name() != "lock") {
            fs::rename(entry.path(), kept.join(entry.file_name())).map_err(|e| unwritable(&kept, &e))?;
            reach("directory.set_aside", &format!(".mhtraind-{}", entry.file_name().display()));
        }
        let whole = (1u32..)
            .map(|n| self.root.join(format!("previous-{n}")))
            .find(|path| !path.exists())
            .expect("some number is free");
        fs::rename(&aside, &whole).map_err(|e| unwritable(&whole, &e))?;
        reach("directory.set_aside", "whole");
        Ok(whole)
    }

    /// Moves the rest of a job aside that a killed process had begun to move, where there is one.
    ///
    /// # Errors
    /// Something cannot be moved.
    pub fn end_setting_aside(&self) -> Result<(), Failure> {
        if self.root.join(UNFINISHED_ASIDE).exists() {
            self.set_earlier_job_aside()?;
        }
        Ok(())
    }

    /// Returns whether a killed process had begun to set a job aside, and nobody has ended that.
    pub fn is_being_set_aside(&self) -> bool {
        self.root.join(UNFINISHED_ASIDE).exists()
    }

    /// Puts back a journal that a killed process was about to set aside: it says what the rest is.
    fn put_journal_back(&self) -> Result<(), Failure> {
        let moved = self.root.join(UNFINISHED_ASIDE).join(".mhtraind/journal.jsonl");
        let journal = self.root.join(".mhtraind/journal.jsonl");
        if !moved.exists() || journal.exists() {
            return Ok(());
        }
        fs::rename(&moved, &journal).map_err(|e| unwritable(&journal, &e))
    }

    /// Makes a checkpoint below the root survive a power cut: its files, and the directories that lead to them. No trainer
    /// does so, and the kernel takes half a minute.
    ///
    /// # Errors
    /// It cannot be read, or the disk refuses it.
    pub fn make_lasting(&self, checkpoint: &Path) -> Result<(), Failure> {
        let mut paths: Vec<PathBuf> = checkpoint
            .ancestors()
            .take_while(|dir| dir.starts_with(&self.root))
            .map(Path::to_owned)
            .collect();
        all_below(checkpoint, &mut paths).map_err(|e| unwritable(checkpoint, &e))?;
        sync_together(&paths).map_err(|(path, e)| unwritable(&path, &e))
    }

    /// Points `final` at a checkpoint below the root by a relative link, in one step that survives a power cut.
    ///
    /// # Errors
    /// The link cannot be made, for example because something that is no link is called `final`.
    pub fn link_final(&self, checkpoint: &Path) -> Result<(), Failure> {
        let target = checkpoint.strip_prefix(&self.root).unwrap_or(checkpoint);
        let link = self.root.join("final");
        let temporary = self.root.join(".final.new");
        let _ = fs::remove_file(&temporary);
        std::os::unix::fs::symlink(target, &temporary).map_err(|e| unwritable(&temporary, &e))?;
        reach("directory.before_rename", "final");
        let renamed = fs::rename(&temporary, &link).and_then(|()| fs::File::open(&self.root)?.sync_all());
        renamed.map_err(|e| unwritable(&link, &e))?;
        reach("directory.after_rename", "final");
        Ok(())
    }

    /// Writes receipt.json: whole or not at all, readable by its owner alone.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_receipt(&self, bytes: &[u8], lasting: Lasting) -> Result<(), Failure> {
        write_receipt_in(&self.root, bytes, lasting)?;
        write_receipt_in(&self.private, bytes, lasting)
    }

    /// Writes one of our own files, in the same way. It is written again by whoever goes on with the job.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_private(&self, relative: &str, bytes: &[u8]) -> Result<(), Failure> {
        let path = self.private.join(relative);
        write_whole(&path, bytes, Lasting::UntilPowerCut).map_err(|e| unwritable(&path, &e))
    }
}

/// Writes the receipt.json of one directory, as [`JobDirectory::write_receipt`] does.
///
/// # Errors
/// It cannot be written.
pub fn write_receipt_in(directory: &Path, bytes: &[u8], lasting: Lasting) -> Result<(), Failure> {
    let path = directory.join("receipt.json");
    write_whole(&path, bytes, lasting).map_err(|e| unwritable(&path, &e))
}

/// Returns whose receipt a directory holds, whatever else it says; `None` for that of a foreground run, and where there is none
/// that can be read.
pub fn receipt_id(directory: &Path) -> Option<u64> {
    let bytes = read_plain(&directory.join("receipt.json"), RECEIPT_BYTES_MAX).ok()?;
    serde_json::from_slice::<Value>(&bytes).ok()?.get("id")?.as_u64()
}

/// Returns the receipt that a directory holds; `None` where there is none that can be read.
pub fn read_receipt(directory: &Path) -> Option<Receipt> {
    serde_json::from_slice(&read_plain(&directory.join("receipt.json"), RECEIPT_BYTES_MAX).ok()?).ok()
}

/// Returns whether a job was run in an output directory before.
pub fn holds_a_job(output_dir: &Path) -> bool {
    ["receipt.json", "attempt-1", ".mhtraind/journal.jsonl", UNFINISHED_ASIDE]
        .iter()
        .any(|name| output_dir.join(name).exists())
}

/// Returns how a file is opened that lies where another user may put something else: no link is followed, no pipe waited
/// for, and no terminal becomes ours.
pub fn untrusted() -> i32 {
    (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed()
}

/// Reads a file that somebody else may have made: a link is not followed, and nothing but a plain file of a sane size is
/// read.
///
/// # Errors
/// It is not there, cannot be read, or is something else.
pub fn read_plain(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let file = fs::OpenOptions::new().read(true).custom_flags(untrusted()).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.len() > bytes_max {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Locks a file. A process that has just died may have left the lock to a child that it was about to execute, so it is
/// tried for a moment.
fn lock_soon(file: &fs::File) -> Result<(), rustix::io::Errno> {
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            answer => return answer,
        }
    }
}

/// Writes a file by a temporary one and rename, mode 0600.
///
/// # Errors
/// It cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8], lasting: Lasting) -> std::io::Result<()> {
    use std::io::Write;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .custom_flags(untrusted())
        .open(&temporary)?;
    file.write_all(bytes)?;
    if lasting == Lasting::OverPowerCut {
        file.sync_all()?;
    }
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    reach("directory.before_rename", name);
    fs::rename(&temporary, path)?;
    reach("directory.after_rename", name);
    match path.parent() {
        Some(parent) if lasting == Lasting::OverPowerCut => fs::File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

/// Adds the plain files and the directories below a directory. A link leads elsewhere and is left alone.
fn all_below(dir: &Path, paths: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            all_below(&entry.path(), paths)?;
        }
        if kind.is_dir() || kind.is_file() {
            paths.push(entry.path());
        }
    }
    Ok(())
}

/// Writes a file over with what it has, after an fsync of it has failed.
///
/// The kernel then takes its pages for written and tells of the failure once (since Linux 4.13): the next fsync would succeed,
/// and a power cut take what was never on disk. Written again the pages are dirty, and the next fsync says the truth.
fn write_again(path: &Path) -> std::io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).custom_flags(untrusted()).open(path)?;
    let (mut piece, mut at) = (vec![0; 1 << 20], 0);
    loop {
        let count = file.read_at(&mut piece, at)?;
        if count == 0 {
            return Ok(());
        }
        file.write_all_at(&piece[..count], at)?;
        at += count as u64;
    }
}

/// Puts files and directories on disk, several at the same time: the disk takes those in one commit of its journal
/// (ext4, eight small files: 1 to 9 ms, one after the other 22 to 37 ms).
fn sync_together(paths: &[PathBuf]) -> Result<(), (PathBuf, std::io::Error)> {
    let sync = |path: &PathBuf| {
        let file = fs::OpenOptions::new().read(true).custom_flags(untrusted()).open(path);
        let synced = file.and_then(|file| file.sync_all());
        synced.map_err(|e| {
            // The next try must not be told that all is well: see there.
            let _read_only_perhaps = write_again(path);
            (path.clone(), e)
        })
    };
    for some in paths.chunks(SYNCED_AT_ONCE) {
        std::thread::scope(|scope| {
            let start = |path| std::thread::Builder::new().spawn_scoped(scope, move || sync(path));
            let started: Vec<_> = some.iter().map(|path| (path, start(path))).collect();
            started.into_iter().try_for_each(|(path, thread)| match thread {
                Ok(thread) => thread.join().expect("an fsync does not panic"),
                // The host has no thread left for us.
                Err(_) => sync(path),
            })
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_where_the_directory_should_be_is_bad_input() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("out");
        fs::write(&file, "").unwrap();
        for root in [file.clone(), file.join("below")] {
            let failure = JobDirectory::open(&root).err().unwrap();
            assert_eq!(failure.status, Status::BadInput);
            assert!(
                failure.message.ends_with(&format!("{} is no directory", file.display())),
                "{}",
                failure.message
            );
            assert_eq!(failure.help.as_deref(), Some("choose another one"));
        }
    }

    #[test]
    fn a_checkpoint_is_made_lasting_with_the_links_in_it_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDirectory::open(dir.path()).unwrap();
        let checkpoint = job.attempt(1).join("checkpoint-4");
        fs::create_dir_all(checkpoint.join("sub")).unwrap();
        for name in ["adapter_model.safetensors", "sub/x"] {
            fs::write(checkpoint.join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("/nowhere", checkpoint.join("link")).unwrap();
        job.make_lasting(&checkpoint).unwrap();
        assert!(job.make_lasting(&job.attempt(1).join("checkpoint-5")).is_err());
    }

    #[test]
    fn a_file_that_is_written_again_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.pt");
        let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        fs::write(&path, &content).unwrap();
        write_again(&path).unwrap();
        assert!(fs::read(&path).unwrap() == content);
        assert!(write_again(dir.path()).is_err(), "a directory is left alone");
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = JobDirectory::open(dir.path()).unwrap();
        let failure = JobDirectory::open(dir.path()).unwrap_err();
        assert_eq!(failure.code, "busy");
    }

    #[test]
    fn final_is_a_relative_link_and_can_be_moved_with_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDirectory::open(dir.path()).unwrap();
        let checkpoint = job.attempt(2).join("checkpoint-40");
        fs::create_dir_all(&checkpoint).unwrap();
        job.link_final(&checkpoint).unwrap();
        assert_eq!(fs::read_link(dir.path().join("final")).unwrap(), Path::new("attempt-2/checkpoint-40"));
        job.link_final(&checkpoint).unwrap();
    }

    #[test]
    fn an_earlier_job_is_moved_and_not_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDirectory::open(dir.path()).unwrap();
        fs::create_dir_all(job.attempt(1)).unwrap();
        fs::write(job.attempt(1).join("x"), "kept").unwrap();
        fs::write(job.journal(), "{}\n").unwrap();
        fs::write(dir.path().join("notes.txt"), "the user's own").unwrap();
        let aside = job.set_earlier_job_aside().unwrap();
        assert_eq!(fs::read_to_string(aside.join("attempt-1/x")).unwrap(), "kept");
        assert!(aside.join(".mhtraind/journal.jsonl").exists() && !job.journal().exists());
        assert!(dir.path().join("notes.txt").exists());
    }

    #[test]
    fn a_job_that_was_half_set_aside_is_set_aside_as_one() {
        let dir = tempfile::tempdir().unwrap();
        for moved in ["attempt-1", "attempt-2", "receipt.json", ".mhtraind/journal.jsonl"] {
            let root = dir.path().join(moved.replace('/', "-"));
            let job = JobDirectory::open(&root).unwrap();
            for place in ["attempt-1/x", "attempt-2/x", "receipt.json", ".mhtraind/journal.jsonl"] {
                fs::create_dir_all(root.join(place).parent().unwrap()).unwrap();
                fs::write(root.join(place), place).unwrap();
            }
            // As a process leaves it that is killed after its first move.
            fs::create_dir_all(root.join(".previous.new/.mhtraind")).unwrap();
            fs::rename(root.join(moved), root.join(".previous.new").join(moved)).unwrap();
            drop(job);
            let job = JobDirectory::open(&root).unwrap();
            assert!(job.holds_a_job() && job.journal().exists(), "{moved}");
            let aside = job.set_earlier_job_aside().unwrap();
            for place in ["attempt-1/x", "attempt-2/x", "receipt.json", ".mhtraind/journal.jsonl"] {
                assert_eq!(fs::read_to_string(aside.join(place)).unwrap(), place, "{moved}");
            }
            assert_eq!(job.asides(), [aside]);
            assert!(!job.holds_a_job());
        }
    }
}
