//! What wakes somebody who waits for an attempt?

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::process::ProcessIdentity;

/// Wakes when a file is put into a directory by a rename: so every file of a record comes there.
/// Its descriptor is readable then.
#[derive(Debug)]
pub struct Arrivals {
    /// `None` only while it is dropped.
    instance: Option<OwnedFd>,
    watch: i32,
}

/// Instances of inotify that watch nothing now.
///
/// Closing one that ever watched anything waits for a grace period of the kernel (`fsnotify_destroy_group` synchronises SRCU):
/// 7 ms on a busy and 14 ms on an idle machine were measured, twice for each attempt. Taking its watch away costs 16 us, so an
/// instance is used again.
static SPARE: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

/// How many are kept. A user has 128 of them by default, for all programs (`fs.inotify.max_user_instances`).
const MAX_SPARE: usize = 32;

impl Arrivals {
    /// Watches from now on. Returns `None` where that cannot be had; somebody who waits must then look by himself. A
    /// directory on a network file system wakes nobody when another host writes.
    pub(crate) fn in_directory(path: &Path) -> Option<Arrivals> {
        Arrivals::watch(path, inotify::WatchFlags::MOVED_TO)
    }

    /// Like [`Arrivals::in_directory`], and for a file that somebody makes in place, as a shell does.
    pub(crate) fn by_anybody(path: &Path) -> Option<Arrivals> {
        let in_place = inotify::WatchFlags::CREATE | inotify::WatchFlags::CLOSE_WRITE;
        Arrivals::watch(path, inotify::WatchFlags::MOVED_TO | in_place)
    }

    fn watch(path: &Path, wanted: inotify::WatchFlags) -> Option<Arrivals> {
        let spare = spare().pop();
        let made = || inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK);
        let instance = spare.map_or_else(made, Ok).ok()?;
        let watch = inotify::add_watch(&instance, path, wanted | inotify::WatchFlags::ONLYDIR);
        // Whatever came of it, the instance goes back when this is dropped.
        let arrivals = Arrivals { instance: Some(instance), watch: *watch.as_ref().unwrap_or(&-1) };
        watch.is_ok().then_some(arrivals)
    }

    fn instance(&self) -> &OwnedFd {
        self.instance.as_ref().expect("it has one until it is dropped")
    }

    /// Forgets what came so far.
    pub fn forget(&self) {
        let mut events = [MaybeUninit::<u8>::uninit(); 4096];
        while rustix::io::read(self.instance(), &mut events).is_ok_and(|(read, _)| !read.is_empty()) {}
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        // A directory that is gone took its watch with it.
        let _none_left = inotify::remove_watch(self.instance(), self.watch);
        self.forget();
        let mut spare = spare();
        if spare.len() < MAX_SPARE {
            spare.extend(self.instance.take());
        }
    }
}

fn spare() -> MutexGuard<'static, Vec<OwnedFd>> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.instance().as_fd()
    }
}

/// What tokio's event loop asks for.
impl AsRawFd for Arrivals {
    fn as_raw_fd(&self) -> RawFd {
        self.instance().as_raw_fd()
    }
}

/// Returns a descriptor that becomes readable when the process ends; `None` where the kernel has no such thing, and for a
/// process that is gone.
pub(crate) fn end_of(process: &ProcessIdentity) -> Option<OwnedFd> {
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw)?;
    let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Only now, while the descriptor pins the process, can its identity be compared.
    process.is_alive().then_some(handle)
}

/// Waits until one of the descriptors has what is asked of it, or for `at_most`.
pub(crate) fn wait(descriptors: &[(BorrowedFd<'_>, PollFlags)], at_most: Duration) {
    let mut polled: Vec<_> = descriptors
        .iter()
        .map(|(descriptor, wanted)| PollFd::from_borrowed_fd(*descriptor, *wanted))
        .collect();
    let timeout = Timespec {
        tv_sec: i64::try_from(at_most.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: at_most.subsec_nanos().into(),
    };
    // Interrupted or failed: the caller looks, and waits again.
    let _looked_at_anyway = poll(&mut polled, Some(&timeout));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wakes(arrivals: &Arrivals) -> bool {
        let mut polled = [PollFd::new(arrivals, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn an_instance_that_is_used_again_knows_nothing_of_its_last_directory() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let arrive = |directory: &Path| {
            std::fs::write(directory.join("made"), "").unwrap();
            std::fs::rename(directory.join("made"), directory.join("arrived")).unwrap();
        };
        let first = Arrivals::in_directory(old.path()).unwrap();
        arrive(old.path());
        assert!(wakes(&first));
        drop(first);
        // Other tests of this process take and give back instances as well; with each of them this must hold.
        let second = Arrivals::in_directory(new.path()).unwrap();
        arrive(old.path());
        assert!(!wakes(&second), "woken by what came before, or by the other directory");
        arrive(new.path());
        assert!(wakes(&second));
        second.forget();
        assert!(!wakes(&second));
    }

    #[test]
    fn nothing_is_watched_where_there_is_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Arrivals::in_directory(&directory.path().join("none")).is_none());
        let there = Arrivals::in_directory(directory.path()).unwrap();
        std::fs::remove_dir(directory.path()).unwrap();
        drop(there);
    }
}
