//! Which signals does a recorder hear, and which does a trainer inherit?
//!
//! A recorder takes its signals one by one from a queue ([`Signals::next`]) and has no handler, so nothing of it runs at an
//! odd moment. rustix offers no dispositions, masks and `sigtimedwait`, so libc is called here and nowhere else.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// The signals that a recorder takes from its queue.
const QUEUED: [libc::c_int; 5] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// What a recorder hears.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A child changed its state.
    Child,
    /// Somebody asks for a stop.
    Stop,
    /// The time is over, or the signal means nothing to us: a recorder has no terminal that could hang up.
    Nothing,
}

/// The queue of signals of this process. It must be opened before a second thread exists.
pub(crate) struct Signals {
    queued: libc::sigset_t,
}

impl Signals {
    /// Holds the recorder's signals back from now on, so that [`Signals::next`] can take them.
    pub(crate) fn hold() -> io::Result<Signals> {
        let queued = set_of(&QUEUED);
        set_mask(libc::SIG_BLOCK, &queued)?;
        Ok(Signals { queued })
    }

    /// Waits at most `at_most` for one signal.
    pub(crate) fn next(&self, at_most: Duration) -> Heard {
        let timeout = libc::timespec {
            tv_sec: libc::time_t::try_from(at_most.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: at_most.subsec_nanos().into(),
        };
        // SAFETY: both pointers are to live values of the right type, and a null siginfo is allowed by sigtimedwait(2).
        match unsafe { libc::sigtimedwait(&raw const self.queued, std::ptr::null_mut(), &raw const timeout) }
        {
            libc::SIGCHLD => Heard::Child,
            libc::SIGTERM | libc::SIGINT | libc::SIGQUIT => Heard::Stop,
            // -1 is the end of the time, or an interruption by a stop and continue.
            _ => Heard::Nothing,
        }
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

/// Lets every signal through again.
pub(crate) fn unblock_all() -> io::Result<()> {
    set_mask(libc::SIG_SETMASK, &set_of(&[]))
}

/// Closes every descriptor but the three standard ones: whatever our starter forgot to protect is not ours to keep open.
///
/// # Safety
/// Nothing in this process may own a descriptor above 2 yet.
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
