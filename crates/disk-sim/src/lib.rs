//! How does a program fare whose disk fails?
//!
//! A **fake**, for tests alone. `LD_PRELOAD=libdisk_sim.so` puts it between a dynamically linked program and the C library. It
//! passes every call on to the kernel, unless the file named by [`FILE_VARIABLE`] says otherwise at that moment, one line a
//! fault:
//!
//! ```text
//! fsync-fails PATH    fsync and fdatasync of what lies below PATH do nothing and answer EIO
//! read-only PATH      whatever would change something below PATH, or PATH itself, answers EROFS
//! spared PATH         nothing of that happens below PATH
//! ```
//!
//! The file is read anew at every call, so a test moves the faults of a running program by writing it (and ends them by
//! removing it). Each call that was refused is noted in the file's neighbour `*.hits`, as `CALL PATH`: a test that wants a
//! fault looks whether it came about.
//!
//! What it is not: after a real failed fsync the kernel takes the pages for clean and the data may be gone, here it stays. A
//! real file system that turned read-only refuses mapped memory too, and what is called without the C library (rustix's own
//! system calls: locks and modes here) passes.

#![allow(clippy::missing_safety_doc, reason = "the contracts are those of the C library")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libc::{AT_FDCWD, EIO, EROFS, mode_t, off_t, size_t, ssize_t};

/// Environment variable that names the file that says which faults there are.
pub const FILE_VARIABLE: &CStr = c"DISK_SIM_FILE";

/// Longest path, and longest file of faults.
const LENGTH_MAX: usize = 4096;

/// Text on the stack: what runs here may stand in for a call that must not allocate.
struct Text {
    bytes: [u8; LENGTH_MAX],
    length: usize,
}

impl Text {
    fn new() -> Text {
        Text { bytes: [0; LENGTH_MAX], length: 0 }
    }

    /// Appends what fits, and leaves room for a NUL.
    fn push(&mut self, bytes: &[u8]) {
        let room = LENGTH_MAX - 1 - self.length;
        let taken = bytes.len().min(room);
        self.bytes[self.length..self.length + taken].copy_from_slice(&bytes[..taken]);
        self.length += taken;
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// The byte after the text is 0, always.
    fn as_ptr(&self) -> *const c_char {
        self.bytes.as_ptr().cast()
    }
}

/// Returns the value of [`FILE_VARIABLE`].
fn file_of_faults() -> Option<&'static [u8]> {
    // SAFETY: the name ends with NUL. The value lives as long as nobody changes the environment, and programs under this
    // fake do that before they touch a disk.
    unsafe {
        let value = libc::getenv(FILE_VARIABLE.as_ptr());
        (!value.is_null()).then(|| CStr::from_ptr(value).to_bytes())
    }
}

/// Returns the file of faults, empty where there is none.
fn faults() -> Text {
    let mut text = Text::new();
    let Some(name) = file_of_faults() else { return text };
    let mut path = Text::new();
    path.push(name);
    // SAFETY: `path` ends with NUL, `text` is as long as is said, and the descriptor is closed by whoever opened it. The raw
    // system calls are used because the functions of these names are the ones below.
    unsafe {
        let file =
            libc::syscall(libc::SYS_openat, AT_FDCWD, path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0);
        if file < 0 {
            return text;
        }
        let read = libc::syscall(libc::SYS_read, file, text.bytes.as_mut_ptr(), LENGTH_MAX - 1);
        text.length = usize::try_from(read).unwrap_or(0);
        libc::syscall(libc::SYS_close, file);
    }
    text
}

/// Returns whether `path` is hit by the fault `name`, and notes that.
fn is_hit(name: &str, call: &str, path: &Text) -> bool {
    let faults = faults();
    let hit = is_below_any(&faults, name, path) && !is_below_any(&faults, "spared", path);
    if hit {
        note(call, path);
    }
    hit
}

/// Returns whether a line of this name is about `path`.
fn is_below_any(faults: &Text, name: &str, path: &Text) -> bool {
    faults.as_bytes().split(|byte| *byte == b'\n').any(|line| {
        let prefix = line.strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b" "));
        let rest = prefix.and_then(|prefix| path.as_bytes().strip_prefix(prefix));
        rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    })
}

fn note(call: &str, path: &Text) {
    let Some(name) = file_of_faults() else { return };
    let (mut hits, mut line) = (Text::new(), Text::new());
    hits.push(name);
    hits.push(b".hits");
    for part in [call.as_bytes(), b" ", path.as_bytes(), b"\n"] {
        line.push(part);
    }
    let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_CLOEXEC;
    // SAFETY: as in `faults`.
    unsafe {
        let file = libc::syscall(libc::SYS_openat, AT_FDCWD, hits.as_ptr(), flags, 0o666);
        if file >= 0 {
            libc::syscall(libc::SYS_write, file, line.bytes.as_ptr(), line.length);
            libc::syscall(libc::SYS_close, file);
        }
    }
}

/// Returns the path of an open file.
fn path_of(file: c_int) -> Text {
    let (mut link, mut digits, mut rest) = (Text::new(), [0; 10], file.unsigned_abs());
    link.push(b"/proc/self/fd/");
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b"0123456789"[(rest % 10) as usize];
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    link.push(&digits[at..]);
    target_of(&link)
}

fn target_of(link: &Text) -> Text {
    let mut path = Text::new();
    // SAFETY: `link` ends with NUL, and `path` has the room that is said.
    let length = unsafe {
        libc::syscall(libc::SYS_readlinkat, AT_FDCWD, link.as_ptr(), path.bytes.as_mut_ptr(), LENGTH_MAX - 1)
    };
    path.length = usize::try_from(length).unwrap_or(0);
    path
}

/// Returns the path that is named relative to `directory`. Links and dots in it stay.
///
/// # Safety
/// `path` must be null or end with NUL.
unsafe fn path_at(directory: c_int, path: *const c_char) -> Text {
    if path.is_null() {
        return Text::new();
    }
    // SAFETY: by the contract.
    let name = unsafe { CStr::from_ptr(path) }.to_bytes();
    let mut whole = match (name.first(), directory) {
        (Some(b'/'), _) => Text::new(),
        (_, AT_FDCWD) => {
            let mut link = Text::new();
            link.push(b"/proc/self/cwd");
            target_of(&link)
        }
        _ => path_of(directory),
    };
    if whole.length > 0 {
        whole.push(b"/");
    }
    whole.push(name);
    whole
}

fn fails(errno: c_int) {
    // SAFETY: the C library's errno of this thread.
    unsafe { *libc::__errno_location() = errno };
}

/// Makes a system call, or refuses it with an error where the condition holds.
macro_rules! unless {
    ($refused:expr, $errno:expr, $call:ident, $($argument:expr),+) => {{
        if $refused {
            fails($errno);
            return -1;
        }
        // SAFETY: the arguments are those of the caller, who keeps the contract of the function of this name.
        let answer = unsafe { libc::syscall(libc::$call, $($argument),+) };
        #[allow(clippy::cast_possible_truncation, clippy::unnecessary_cast, reason = "the kernel's answer has this type")]
        { answer as _ }
    }};
}

/// fsync(2)
#[unsafe(no_mangle)]
pub extern "C" fn fsync(file: c_int) -> c_int {
    unless!(is_hit("fsync-fails", "fsync", &path_of(file)), EIO, SYS_fsync, file)
}

/// fdatasync(2)
#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(file: c_int) -> c_int {
    unless!(is_hit("fsync-fails", "fdatasync", &path_of(file)), EIO, SYS_fdatasync, file)
}

fn no_write(call: &str, path: &Text) -> bool {
    is_hit("read-only", call, path)
}

/// openat(2); the mode is read where there is none too, and ignored then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(directory: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    let changes = flags & (libc::O_ACCMODE | libc::O_TRUNC) != libc::O_RDONLY;
    // SAFETY: the caller's path. A file that is there already can be opened with O_CREAT, so that alone is none.
    let refused = changes && no_write("open", &unsafe { path_at(directory, path) });
    unless!(refused, EROFS, SYS_openat, directory, path, flags, mode)
}

/// openat64(3)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: c_uint,
) -> c_int {
    // SAFETY: the same contract.
    unsafe { openat(directory, path, flags | libc::O_LARGEFILE, mode) }
}

/// open(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the same contract.
    unsafe { openat(AT_FDCWD, path, flags, mode) }
}

/// open64(3)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the same contract.
    unsafe { openat(AT_FDCWD, path, flags | libc::O_LARGEFILE, mode) }
}

/// write(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(file: c_int, bytes: *const c_void, count: size_t) -> ssize_t {
    unless!(no_write("write", &path_of(file)), EROFS, SYS_write, file, bytes, count)
}

/// writev(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(file: c_int, parts: *const c_void, count: c_int) -> ssize_t {
    unless!(no_write("writev", &path_of(file)), EROFS, SYS_writev, file, parts, count)
}

/// pwrite(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(file: c_int, bytes: *const c_void, count: size_t, at: off_t) -> ssize_t {
    unless!(no_write("pwrite", &path_of(file)), EROFS, SYS_pwrite64, file, bytes, count, at)
}

/// pwrite(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(file: c_int, bytes: *const c_void, count: size_t, at: off_t) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwrite64(file, bytes, count, at) }
}

/// ftruncate(2)
#[unsafe(no_mangle)]
pub extern "C" fn ftruncate64(file: c_int, length: off_t) -> c_int {
    unless!(no_write("ftruncate", &path_of(file)), EROFS, SYS_ftruncate, file, length)
}

/// ftruncate(2)
#[unsafe(no_mangle)]
pub extern "C" fn ftruncate(file: c_int, length: off_t) -> c_int {
    ftruncate64(file, length)
}

/// rename(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the caller's paths.
    let refused =
        unsafe { no_write("rename", &path_at(AT_FDCWD, from)) || no_write("rename", &path_at(AT_FDCWD, to)) };
    unless!(refused, EROFS, SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0)
}

/// unlinkat(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's path.
    let refused = no_write("unlink", &unsafe { path_at(directory, path) });
    unless!(refused, EROFS, SYS_unlinkat, directory, path, flags)
}

/// unlink(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { unlinkat(AT_FDCWD, path, 0) }
}

/// rmdir(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { unlinkat(AT_FDCWD, path, libc::AT_REMOVEDIR) }
}

/// mkdir(2). One that is there is said to be there, as on a real disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's path.
    let is_there = unsafe { libc::syscall(libc::SYS_faccessat, AT_FDCWD, path, libc::F_OK) == 0 };
    // SAFETY: the caller's path.
    let refused = !is_there && no_write("mkdir", &unsafe { path_at(AT_FDCWD, path) });
    unless!(refused, EROFS, SYS_mkdirat, AT_FDCWD, path, mode)
}

/// symlink(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn symlink(target: *const c_char, path: *const c_char) -> c_int {
    // SAFETY: the caller's path.
    let refused = no_write("symlink", &unsafe { path_at(AT_FDCWD, path) });
    unless!(refused, EROFS, SYS_symlinkat, target, AT_FDCWD, path)
}

/// chmod(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn chmod(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's path.
    let refused = no_write("chmod", &unsafe { path_at(AT_FDCWD, path) });
    unless!(refused, EROFS, SYS_fchmodat, AT_FDCWD, path, mode)
}

/// chown(2)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn chown(path: *const c_char, uid: c_uint, gid: c_uint) -> c_int {
    // SAFETY: the caller's path.
    let refused = no_write("chown", &unsafe { path_at(AT_FDCWD, path) });
    unless!(refused, EROFS, SYS_fchownat, AT_FDCWD, path, uid, gid, 0)
}
