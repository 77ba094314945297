//! What wakes somebody who waits for an attempt?

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::process::ProcessIdentity;

/// Wakes when a file is put into a directory by a rename: so every file of a record comes there.
/// Its descriptor is readable then.
#[derive(Debug)]
pub struct Arrivals(OwnedFd);

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
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
        inotify::add_watch(&watch, path, wanted | inotify::WatchFlags::ONLYDIR).ok()?;
        Some(Arrivals(watch))
    }

    /// Forgets what came so far.
    pub fn forget(&self) {
        let mut events = [MaybeUninit::<u8>::uninit(); 4096];
        while rustix::io::read(&self.0, &mut events).is_ok_and(|(read, _)| !read.is_empty()) {}
    }
}

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What tokio's event loop asks for.
impl AsRawFd for Arrivals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
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
