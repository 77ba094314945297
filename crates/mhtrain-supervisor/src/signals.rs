//! Which signals does a recorder hear, and which does a trainer inherit?
//!
//! A recorder takes its signals from a queue ([`Signals`]) and has no handler, so nothing of it runs at an odd moment. rustix
//! offers no dispositions, masks and `signalfd`, so libc is called here.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// The signals that a recorder takes from its queue.
const QUEUED: [libc::c_int; 6] =
    [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGIO];

/// What F_NOTIFY tells of (a file that is made in a directory or renamed into it), and that it goes on doing so: linux/fcntl.h.
/// The C library's bindings do not name them.
const DN_CREATE: libc::c_int = 0x4;
const DN_MULTISHOT: libc::c_int = i32::MIN;

/// The queue of signals of this process. It must be opened before a second thread exists. Its descriptor is readable while
/// there is a signal.
#[derive(Debug)]
pub(crate) struct Signals {
    queue: OwnedFd,
    /// The directory of whose new files SIGIO tells, while it is open.
    directory: Option<OwnedFd>,
}

impl Signals {
    /// Holds the recorder's signals back from now on, and queues them.
    pub(crate) fn hold() -> io::Result<Signals> {
        let queued = set_of(&QUEUED);
        set_mask(libc::SIG_BLOCK, &queued)?;
        // SAFETY: a live set; -1 asks for a new descriptor.
        let queue = unsafe { libc::signalfd(-1, &raw const queued, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if queue < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made it for us.
        Ok(Signals { queue: unsafe { OwnedFd::from_raw_fd(queue) }, directory: None })
    }

    /// Asks for a SIGIO whenever a file is made in this directory or renamed into it (`F_NOTIFY`, fcntl(2)).
    ///
    /// inotify does the same, but closing one waits for a grace period of the kernel, 7 to 14 ms as measured, at the exit of a
    /// process as well, and a job's end waits for the end of its recorder.
    ///
    /// # Errors
    /// Where the kernel has no such thing, or the directory cannot be opened.
    pub(crate) fn hear_of_files_in(&mut self, directory: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        // SAFETY: a live descriptor and a number.
        if unsafe { libc::fcntl(directory.as_raw_fd(), libc::F_NOTIFY, DN_CREATE | DN_MULTISHOT) } == -1 {
            return Err(io::Error::last_os_error());
        }
        self.directory = Some(directory);
        Ok(())
    }

    /// Empties the queue. Returns whether one of its signals asks for a stop. SIGCHLD and SIGIO only wake, and SIGHUP means
    /// nothing: a recorder has no terminal that could hang up.
    pub(crate) fn ask_for_a_stop(&self) -> bool {
        let mut asked = false;
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.queue, &mut signal).is_ok_and(|read| read == signal.len()) {
            // The number is the first field: signalfd(2).
            let [a, b, c, d, ..] = signal;
            let number = u32::from_ne_bytes([a, b, c, d]).cast_signed();
            asked |= matches!(number, libc::SIGTERM | libc::SIGINT | libc::SIGQUIT);
        }
        asked
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

/// Sets every ignored signal back to its default. A shell starts `command &` with SIGINT ignored, nohup ignores SIGHUP, and
/// both survive an exec: without this a trainer would inherit deafness to Ctrl-C.
///
/// SIGPIPE stays as Rust wants it, and `std::process::Command` resets it for whatever it executes.
pub(crate) fn stop_ignoring() {
    for signal in (1..=libc::SIGRTMAX()).filter(|signal| *signal != libc::SIGPIPE) {
        let mut current = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: a null new action only asks; `current` has room for the answer. An invalid number (the C library keeps two
        // for itself) gives an error and leaves `current` zeroed, which is a valid sigaction.
        let current = unsafe {
            libc::sigaction(signal, std::ptr::null(), current.as_mut_ptr());
            current.assume_init()
        };
        if current.sa_sigaction == libc::SIG_IGN {
            // SAFETY: SIG_DFL is no function of ours; setting it has no precondition.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

/// Closes every descriptor but the three standard ones: whatever our starter forgot to protect is not ours to keep open.
///
/// # Safety
/// Nothing that still runs in this process may own a descriptor above 2.
pub(crate) unsafe fn close_inherited_descriptors() {
    // SAFETY: by the caller's promise no owner of these descriptors exists in this process. close_range(2) takes three numbers.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) } == 0;
    if done {
        return;
    }
    // Kernels before 5.9. The listing's own descriptor is among those found; it is closed when the listing ends, so the
    // numbers are taken first.
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        // SAFETY: as above; closing a number that is not open any more gives an error and does nothing.
        unsafe { libc::close(descriptor) };
    }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset gets an initialised one and numbers of real signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

fn set_mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: `set` is a live, initialised set, and a null old set is allowed.
    match unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{WaitOptions, waitpid};

    use crate::spawn::{Copy, fork};

    #[test]
    fn a_file_that_arrives_wakes_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let hears = || -> io::Result<bool> {
            let mut signals = Signals::hold()?;
            signals.hear_of_files_in(directory.path())?;
            let heard = || {
                let at_most = Timespec { tv_sec: 0, tv_nsec: 0 };
                let queue = signals.as_fd();
                let woken = poll(&mut [PollFd::new(&queue, PollFlags::IN)], Some(&at_most))?;
                let _asks = signals.ask_for_a_stop();
                Ok::<_, io::Error>(woken == 1)
            };
            let before = heard()?;
            let (made, stop) = (directory.path().join("made"), directory.path().join("stop"));
            std::fs::write(&made, "")?;
            let at_making = heard()?;
            std::fs::rename(&made, &stop)?;
            Ok(!before && at_making && heard()?)
        };
        let null = std::fs::File::open("/dev/null").unwrap();
        let copy = Copy { stdio: [null.as_fd(), null.as_fd(), null.as_fd()], group: None };
        // A process of its own: the signals of this one are its other threads' too. Without a cgroup it is made by fork(3), which
        // leaves the C library's locks as a child needs them.
        // SAFETY: the child uses no descriptor but its own.
        let pid = unsafe { fork(copy, || Ok(()), || i32::from(!hears().unwrap_or(false))) }.unwrap();
        let ended = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(ended.1.exit_status(), Some(0));
    }
}
