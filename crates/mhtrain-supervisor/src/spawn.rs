//! How is a process started straight into its cgroup: as another program, or as a copy of this one?
//!
//! To move a process that runs already, the kernel waits until no thread of the system is inside a fork or exec: 5 to 20 ms
//! were measured on an idle machine of two cores. `CLONE_INTO_CGROUP` of clone3(2) costs nothing, but
//! `std::process::Command` cannot ask for it. Where the kernel refuses it (before 5.7, or a sandbox without clone3) the child
//! moves itself.
//!
//! A child that becomes another program borrows our memory until then (vfork(2)) where we can give it a stack of its own: a
//! copy of a daemon's page tables costs 0.7 ms and grows with the daemon, and every page that its threads write meanwhile is
//! copied too.

use std::ffi::{CString, OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::cgroup::Group;
use crate::signals;

/// Flags of clone3(2) that do not fit the C library's `int`: linux/sched.h.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What to execute, and with what.
pub(crate) struct Start<'a> {
    /// The path of the executable; no search.
    pub(crate) program: &'a Path,
    /// Arguments without the name of the program.
    pub(crate) arguments: &'a [&'a OsStr],
    /// The whole environment.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// Standard input, output and error.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Where to start it. Best effort: ask [`Group::holds`] afterwards.
    pub(crate) group: Option<&'a Group>,
    /// Whether the child gets a copy of our memory, though it costs more than to lend it ours.
    pub(crate) copies_memory: bool,
}

/// A copy of this process, and with what it begins.
pub(crate) struct Copy<'a> {
    /// Standard input, output and error; it has no other descriptor.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// As [`Start::group`].
    pub(crate) group: Option<&'a Group>,
}

/// Starts a child. Returns its pid when it was executed. `prepare` runs in the child before the exec.
///
/// # Errors
/// When there is no child, or `prepare` or the exec failed. Then no child is left.
///
/// # Safety
/// `prepare` may only make system calls: no memory is to be taken, no lock, nothing of the C library that could do either.
pub(crate) unsafe fn spawn(start: Start<'_>, prepare: impl Fn() -> Result<(), Errno>) -> io::Result<Pid> {
    // SAFETY: the caller's promise about `prepare`; the rest of the child makes system calls only and ends in an exec or exit.
    unsafe { spawn_by(if start.copies_memory { copy_into } else { borrow_into }, start, prepare) }
}

/// How a child comes into a cgroup: given the directory of that and what the child does, which never returns. Returns the
/// child's pid.
type Into = unsafe fn(BorrowedFd<'_>, &dyn Fn()) -> io::Result<libc::pid_t>;

/// # Safety
/// As for [`spawn`], and `into` must be [`copy_into`], [`borrow_into`] or refuse.
unsafe fn spawn_by(into: Into, start: Start<'_>, prepare: impl Fn() -> Result<(), Errno>) -> io::Result<Pid> {
    let program = c_string(start.program.as_os_str())?;
    let mut arguments = vec![program.clone()];
    for argument in start.arguments {
        arguments.push(c_string(argument)?);
    }
    let entry = |(name, value): &(OsString, OsString)| {
        c_string(OsStr::from_bytes(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
    };
    let environment = start.environment.iter().map(entry).collect::<io::Result<Vec<_>>>()?;
    // All that the child needs, laid out before it exists: it may take no memory.
    let (arguments, environment) = (pointers(&arguments), pointers(&environment));
    let execute = || {
        // SAFETY: three lists of live C strings, the last two ended by a null pointer.
        unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
    };
    // SAFETY: the caller's promises, and `execute` makes a system call.
    unsafe { start_child(into, start.stdio, start.group, prepare, execute) }
}

/// Starts a copy of this process that ends with the exit status of `body`, and does nothing else. Returns its pid when it
/// stands where it should. It is cheaper than [`spawn`] by the start of a program.
///
/// # Errors
/// When there is no child, or `prepare` failed. Then no child is left.
///
/// # Safety
/// This process must have one thread, or `body` may only make system calls, as `prepare`. In the child every descriptor above 2
/// is closed, whoever owned it: `body` may use none of them.
pub(crate) unsafe fn fork(
    copy: Copy<'_>,
    prepare: impl Fn() -> Result<(), Errno>,
    body: impl Fn() -> i32,
) -> io::Result<Pid> {
    let run = || {
        // SAFETY: the child has no owner of a descriptor that still runs, by the caller's promise about `body`; `_exit` runs
        // nothing of the parent that this is a copy of. Closing is also what tells the parent that we are ready.
        unsafe {
            signals::close_inherited_descriptors();
            libc::_exit(body())
        }
    };
    // SAFETY: the caller's promises.
    unsafe { start_child(copy_into, copy.stdio, copy.group, prepare, run) }
}

/// # Safety
/// As for [`spawn_by`]; `then` is what the child does, and returns only with an error.
unsafe fn start_child(
    into: Into,
    stdio: [BorrowedFd<'_>; 3],
    group: Option<&Group>,
    prepare: impl Fn() -> Result<(), Errno>,
    then: impl Fn() -> Errno,
) -> io::Result<Pid> {
    // Copies above 2, so that none of them is overwritten while the three are put in place.
    let copy = |descriptor: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(descriptor, 3);
    let [input, output, error] = stdio;
    let stdio: [OwnedFd; 3] = [copy(input)?, copy(output)?, copy(error)?];
    let procs = group.and_then(|group| group.open_procs().ok());
    let directory = group.and_then(|group| group.open_directory().ok());
    let (mut failure, told) = io::pipe()?;
    let child = Child { stdio: &stdio, failure: told.as_fd() };
    let straight = directory.as_ref().and_then(|directory| {
        // SAFETY: the caller's promises; what is done never returns.
        unsafe { into(directory.as_fd(), &|| child.become_it(None, &prepare, &then)) }.ok()
    });
    let pid = match straight {
        Some(pid) => pid,
        // SAFETY: the child makes system calls only and ends in an exec or an exit, or the caller has one thread.
        None => match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => child.become_it(procs.as_ref().map(AsFd::as_fd), prepare, then),
            pid => pid,
        },
    };
    drop(told);
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::Other)?;
    let mut errno = [0; 4];
    // Nothing comes from a child that was executed, or died before it could say anything; the latter shows at its wait.
    if failure.read_exact(&mut errno).is_ok() {
        while matches!(waitpid(Some(pid), WaitOptions::empty()), Err(Errno::INTR)) {}
        return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)));
    }
    Ok(pid)
}

/// Ends a child that panics: unwound, it would go on as the parent that it is a copy of.
struct EndsHere;

impl Drop for EndsHere {
    fn drop(&mut self) {
        // SAFETY: `_exit` runs nothing of the parent. 101 is what a panic ends a Rust program with.
        unsafe { libc::_exit(101) }
    }
}

/// What a child begins with.
struct Child<'a> {
    stdio: &'a [OwnedFd; 3],
    failure: BorrowedFd<'a>,
}

impl Child<'_> {
    /// Runs in the child.
    fn become_it(
        &self,
        procs: Option<BorrowedFd<'_>>,
        prepare: impl Fn() -> Result<(), Errno>,
        then: impl Fn() -> Errno,
    ) -> ! {
        let _no_unwinding = EndsHere;
        let errno = match self.prepare(procs, prepare) {
            Err(errno) => errno,
            Ok(()) => then(),
        };
        let _nobody_listens = rustix::io::write(self.failure, &errno.raw_os_error().to_ne_bytes());
        // SAFETY: `_exit` runs nothing of the parent that this is a copy of.
        unsafe { libc::_exit(127) }
    }

    fn prepare(
        &self,
        procs: Option<BorrowedFd<'_>>,
        prepare: impl Fn() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if let Some(procs) = procs {
            // "0" is the writer itself. A refusal leaves it where it is, and shows by that.
            let _stays = rustix::io::write(procs, b"0");
        }
        let [input, output, error] = self.stdio;
        rustix::stdio::dup2_stdin(input)?;
        rustix::stdio::dup2_stdout(output)?;
        rustix::stdio::dup2_stderr(error)?;
        // SAFETY: a valid set and numbers; Rust ignores SIGPIPE and an exec would pass that on.
        unsafe {
            let mut none = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
            libc::sigemptyset(none.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            // What a library left open for every child must not be open for another user's debugger even for a moment.
            // 4 is CLOSE_RANGE_CLOEXEC; kernels before 5.11 refuse, and then the recorder closes them itself.
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 4u32);
        }
        prepare()
    }
}

/// Starts a copy of this process in a cgroup.
///
/// # Safety
/// As for fork(2) in a program of several threads: `then` may make system calls only. It never returns.
unsafe fn copy_into(directory: BorrowedFd<'_>, then: &dyn Fn()) -> io::Result<libc::pid_t> {
    let arguments = arguments(directory);
    // SAFETY: a live structure and its size. No stack is given and no memory shared: the child goes on with a copy of ours.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw const arguments, std::mem::size_of::<libc::clone_args>())
    };
    if pid == 0 {
        then();
    }
    pid_of(pid)
}

/// Starts a child in a cgroup that has our memory, and lets the calling thread stand still, until the child is executed or
/// ends.
///
/// # Safety
/// As for [`copy_into`]; what `then` writes is written in our memory. Handlers of signals cannot run in it: the kernel resets
/// them (`CLONE_CLEAR_SIGHAND`).
#[cfg(target_arch = "x86_64")]
unsafe fn borrow_into(directory: BorrowedFd<'_>, then: &dyn Fn()) -> io::Result<libc::pid_t> {
    /// What the child begins with: C's calling convention, and a thin pointer to `then`.
    extern "C" fn begin(then: *const &dyn Fn()) -> ! {
        // SAFETY: the parent stands still in the call below, so what the pointer was made of lives.
        let then = unsafe { &*then };
        then();
        // SAFETY: `_exit` runs nothing of the parent. It is not reached: `then` does not return.
        unsafe { libc::_exit(127) }
    }

    let mut stack = vec![Line([0; 16]); CHILD_STACK_BYTES / std::mem::size_of::<Line>()];
    let mut arguments = arguments(directory);
    arguments.flags |= (libc::CLONE_VM | libc::CLONE_VFORK).cast_unsigned() as u64;
    arguments.stack = stack.as_mut_ptr().expose_provenance() as u64;
    arguments.stack_size = CHILD_STACK_BYTES as u64;
    let mut pid = libc::SYS_clone3;
    // SAFETY: a live structure and its size; a stack that nobody else uses, aligned as a call wants it, from whose end the child
    // calls a function that never returns, so that it never runs in our frames. The kernel keeps all registers of ours but the
    // named three, and the child starts with the same ones.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") pid,
            in("rdi") &raw const arguments,
            in("rsi") std::mem::size_of::<libc::clone_args>(),
            in("r12") &raw const then,
            in("r13") begin as extern "C" fn(*const &dyn Fn()) -> !,
            out("rcx") _,
            out("r11") _,
        );
    }
    drop(stack);
    // The system call itself was made: the error is in its answer, not in `errno`.
    match i32::try_from(pid) {
        Ok(pid) if pid > 0 => Ok(pid),
        Ok(errno) => Err(io::Error::from_raw_os_error(-errno)),
        Err(_) => Err(io::ErrorKind::Other.into()),
    }
}

/// Elsewhere nobody gives the child a stack of its own.
#[cfg(not(target_arch = "x86_64"))]
use copy_into as borrow_into;

/// The stack of a child that borrows our memory: it makes a dozen system calls.
#[cfg(target_arch = "x86_64")]
const CHILD_STACK_BYTES: usize = 64 << 10;

/// Sixteen bytes of a stack, aligned as the calling convention wants it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
#[repr(align(16))]
struct Line(#[expect(dead_code, reason = "the child alone writes here")] [u8; 16]);

/// Returns the arguments of clone3(2) for a child in this cgroup.
fn arguments(directory: BorrowedFd<'_>) -> libc::clone_args {
    // SAFETY: zero is a valid value of every field, and means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_CLEAR_SIGHAND | CLONE_INTO_CGROUP;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    arguments.cgroup = u64::from(directory.as_raw_fd().cast_unsigned());
    arguments
}

/// Returns the pid that `syscall` gave, or what `errno` says.
fn pid_of(pid: libc::c_long) -> io::Result<libc::pid_t> {
    libc::pid_t::try_from(pid).ok().filter(|pid| *pid >= 0).ok_or_else(io::Error::last_os_error)
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_bytes())?)
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Cgroup;
    use std::fs::File;

    /// Returns a cgroup of the test's own; `None` where none can be made.
    fn cgroup() -> Option<Cgroup> {
        let record = tempfile::tempdir().unwrap();
        let made = Cgroup::plan(record.path()).and_then(|plan| Cgroup::create(&plan, None).ok());
        if made.is_none() {
            eprintln!("skipped: no cgroup can be made here");
        }
        made
    }

    fn sleep<'a>(null: &'a File, arguments: &'a [&'a OsStr], group: Option<&'a Group>) -> Start<'a> {
        let stdio = [null.as_fd(), null.as_fd(), null.as_fd()];
        Start {
            program: Path::new("/bin/sleep"),
            arguments,
            environment: Vec::new(),
            stdio,
            group,
            copies_memory: false,
        }
    }

    #[test]
    fn a_child_is_in_its_group_straight_or_by_itself() {
        let Some(cgroup) = cgroup() else { return };
        let group = cgroup.trainer();
        let (null, long) = (File::open("/dev/null").unwrap(), [OsStr::new("600")]);
        let start = || sleep(&null, &long, Some(&group));
        let refuse: Into = |_, _| Err(io::Error::from(Errno::NOSYS));
        let ways: [Into; 3] = [borrow_into, copy_into, refuse];
        // SAFETY: nothing is prepared.
        let pids = ways.map(|way| unsafe { spawn_by(way, start(), || Ok(())) });
        for pid in pids {
            let pid = pid.unwrap();
            let inside = group.holds(pid.as_raw_nonzero().get().cast_unsigned());
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            waitpid(Some(pid), WaitOptions::empty()).unwrap();
            assert!(inside);
        }
        cgroup.remove().unwrap();
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_child_that_borrows_our_memory_writes_in_it() {
        use std::sync::atomic::{AtomicU32, Ordering};

        let Some(cgroup) = cgroup() else { return };
        let directory = cgroup.trainer().open_directory().unwrap();
        let written = AtomicU32::new(0);
        let then = || {
            written.fetch_add(1, Ordering::Relaxed);
            // SAFETY: it runs nothing of the parent.
            unsafe { libc::_exit(7) }
        };
        for (way, seen) in [(copy_into as Into, 0), (borrow_into, 1)] {
            // SAFETY: an addition and an end.
            let pid = unsafe { way(directory.as_fd(), &then) }.unwrap();
            let ended = waitpid(Pid::from_raw(pid), WaitOptions::empty()).unwrap().unwrap();
            assert_eq!(ended.1.exit_status(), Some(7));
            assert_eq!(written.load(Ordering::Relaxed), seen);
        }
        cgroup.remove().unwrap();
    }

    #[test]
    fn what_fails_in_a_child_with_our_memory_is_told_and_changes_nothing_of_ours() {
        let Some(cgroup) = cgroup() else { return };
        let group = cgroup.trainer();
        let null = File::open("/dev/null").unwrap();
        for _ in 0..50 {
            let missing = Start { program: Path::new("/no/such/program"), ..sleep(&null, &[], Some(&group)) };
            // SAFETY: nothing is done but to return.
            let (missing, refused) = unsafe {
                let refuse = || Err(Errno::PERM);
                (spawn(missing, || Ok(())), spawn(sleep(&null, &[], Some(&group)), refuse))
            };
            assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        // SAFETY: an empty set, and a question about this thread alone.
        let ignored = unsafe {
            let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
            libc::sigaction(libc::SIGPIPE, std::ptr::null(), action.as_mut_ptr());
            action.assume_init().sa_sigaction == libc::SIG_IGN
        };
        assert!(ignored, "the child's signal handling is its own");
        cgroup.remove().unwrap();
    }

    #[test]
    fn what_fails_in_the_child_is_told_and_leaves_no_child() {
        let (null, long) = (File::open("/dev/null").unwrap(), [OsStr::new("600")]);
        let missing = Start { program: Path::new("/no/such/program"), ..sleep(&null, &long, None) };
        // SAFETY: nothing is done but to return.
        let (missing, refused) =
            unsafe { (spawn(missing, || Ok(())), spawn(sleep(&null, &long, None), || Err(Errno::PERM))) };
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
