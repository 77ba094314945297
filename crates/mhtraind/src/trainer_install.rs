//! How does a machine get a trainer: ms-swift with everything that it needs, in a directory of its own?
//!
//! ```text
//! reuse a complete one -> lock -> remove a half-made one -> uv -> virtual environment -> packages -> bytecode -> mark complete
//! ```
//!
//! A virtual environment holds its own path in many files, so it is made where it will stay. The file
//! `mhtraind-trainer.json` says what the directory is: written first with the state `installing`, replaced last by
//! `complete`. A directory without the second is half-made and goes away at the next start; a directory without the
//! file is somebody else's and is never touched. What is installed is exactly a lock of `config/trainer/`, which the
//! environment keeps a copy of: when the program brings another lock, the environment is made anew.

mod child;
mod tools;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::child::{News, RunError};

/// Says what a directory is; see the module's documentation.
const STATE_FILE: &str = "mhtraind-trainer.json";
/// The lock that the environment was made from.
const LOCK_FILE: &str = "mhtraind-trainer.lock";
/// Free space that an install wants. Measured: 6.4 GiB of packages (most of it CUDA libraries of torch 2.15) and
/// 0.4 GiB of bytecode, both lines.
const DISK_NEEDED_BYTES: u64 = 7 << 30;
const COMPILER: &str = include_str!("trainer_install/compile_bytecode.py");
/// More processes than this wait for the disk.
const COMPILERS_MAX: usize = 8;

/// A trainer that can be installed: the two lines of ms-swift, each at the release that everything was measured with.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum TrainerRelease {
    /// ms-swift 4.6.0 with transformers 5.19.0.
    MsSwift460,
    /// ms-swift 3.12.6 with transformers 4.57.6.
    MsSwift3126,
}

impl TrainerRelease {
    /// All of them, the default first.
    pub const ALL: [TrainerRelease; 2] = [TrainerRelease::MsSwift460, TrainerRelease::MsSwift3126];

    /// Returns the release of that ms-swift version, or `None` when there is no lock for it.
    pub fn from_version(version: &str) -> Option<TrainerRelease> {
        TrainerRelease::ALL.into_iter().find(|release| release.version() == version)
    }

    /// Returns the version of ms-swift.
    pub fn version(self) -> &'static str {
        match self {
            TrainerRelease::MsSwift460 => "4.6.0",
            TrainerRelease::MsSwift3126 => "3.12.6",
        }
    }

    /// Returns the name of the environment's directory, for example `ms-swift-4.6.0`.
    pub fn directory_name(self) -> String {
        format!("ms-swift-{}", self.version())
    }

    fn lock(self) -> &'static str {
        match self {
            TrainerRelease::MsSwift460 => include_str!("../../../config/trainer/ms-swift-4.6.0.lock"),
            TrainerRelease::MsSwift3126 => include_str!("../../../config/trainer/ms-swift-3.12.6.lock"),
        }
    }
}

/// What to install, and where.
#[derive(Debug)]
pub struct InstallRequest<'a> {
    /// Which trainer.
    pub release: TrainerRelease,
    /// The directory that becomes the virtual environment. It may be absent or empty, or a former install.
    pub dir: PathBuf,
    /// Where a private uv is kept when PATH has none.
    pub tools_dir: PathBuf,
    /// Set it, and the install ends within seconds and leaves nothing half-made behind.
    pub cancel: &'a AtomicBool,
}

impl<'a> InstallRequest<'a> {
    /// Returns a request for the default place, `trainers/ms-swift-VERSION` under [`data_dir`].
    ///
    /// # Errors
    /// [`InstallError::NoHome`] when the environment names neither `XDG_DATA_HOME` nor `HOME`.
    pub fn in_default_place(
        release: TrainerRelease,
        cancel: &'a AtomicBool,
    ) -> Result<InstallRequest<'a>, InstallError> {
        let data = data_dir().ok_or(InstallError::NoHome)?;
        let dir = data.join("trainers").join(release.directory_name());
        Ok(InstallRequest { release, dir, tools_dir: data.join("tools"), cancel })
    }
}

/// Returns mhtraind's directory for data of this user: `$XDG_DATA_HOME/mhtraind`, else `~/.local/share/mhtraind`.
///
/// A relative `XDG_DATA_HOME` is ignored, as the XDG base directory specification asks.
pub fn data_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")))?;
    Some(base.join("mhtraind"))
}

/// An environment that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledTrainer {
    /// Which trainer.
    pub release: TrainerRelease,
    /// The virtual environment.
    pub dir: PathBuf,
    /// Its interpreter.
    pub python: PathBuf,
    /// Whether it was already there.
    pub reused: bool,
    /// How long it took.
    pub elapsed: Duration,
}

/// A part of an install, in their order.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstallPhase {
    /// Another process installs into the same directory.
    Waiting,
    /// A half-made or outdated environment is removed.
    Removing,
    /// uv is looked for, or fetched.
    Tools,
    /// The virtual environment is made.
    Environment,
    /// Packages are downloaded and unpacked; counted in MiB of the large ones.
    Packages,
    /// Sources are compiled to bytecode; counted in KiB of source.
    Bytecode,
}

impl InstallPhase {
    /// Returns what people read.
    pub fn label(self) -> &'static str {
        match self {
            InstallPhase::Waiting => "waiting for another install",
            InstallPhase::Removing => "removing an unfinished or outdated environment",
            InstallPhase::Tools => "looking for uv",
            InstallPhase::Environment => "making the environment",
            InstallPhase::Packages => "installing packages",
            InstallPhase::Bytecode => "compiling to bytecode",
        }
    }

    /// Returns the part of the whole at which the phase begins and ends. Measured on 2 cores with an empty cache of
    /// uv: 3 s for uv, 47 s for packages, 45 s for bytecode; only a bar depends on it.
    fn span(self) -> (f64, f64) {
        match self {
            InstallPhase::Waiting | InstallPhase::Removing => (0.0, 0.0),
            InstallPhase::Tools => (0.0, 0.03),
            InstallPhase::Environment => (0.03, 0.04),
            InstallPhase::Packages => (0.04, 0.52),
            InstallPhase::Bytecode => (0.52, 1.0),
        }
    }
}

/// How far an install has come.
#[derive(Clone, Debug, PartialEq)]
pub struct InstallProgress {
    /// What is being done.
    pub phase: InstallPhase,
    /// How much of the phase is done, in its unit.
    pub done: u64,
    /// How much there is to do; `None` while unknown.
    pub total: Option<u64>,
    /// What it is busy with, for example a package's name; may be empty.
    pub detail: String,
    /// Since the install began.
    pub elapsed: Duration,
}

impl InstallProgress {
    /// Returns how much of the whole install is done, from 0 to 1.
    pub fn fraction(&self) -> f64 {
        let (from, to) = self.phase.span();
        let part = match self.total {
            Some(total) if total > 0 => (self.done as f64 / total as f64).min(1.0),
            _ => 0.0,
        };
        from + (to - from) * part
    }
}

/// Why a trainer was not installed.
#[derive(Debug, Error)]
pub enum InstallError {
    /// The cancel flag was set.
    #[error("the install was cancelled")]
    Cancelled,
    /// There is no place for data of this user.
    #[error("neither XDG_DATA_HOME nor HOME is set to an absolute path")]
    NoHome,
    /// The directory holds something that we did not make.
    #[error("{} is not empty and was not made by mhtraind", .0.display())]
    NotOurs(PathBuf),
    /// Too little space.
    #[error("{} has {} MiB free, a trainer needs {} MiB", .path.display(), .free_bytes >> 20, .needed_bytes >> 20)]
    NotEnoughDisk {
        /// The directory that was asked about.
        path: PathBuf,
        /// What is free there for this user.
        free_bytes: u64,
        /// What is needed.
        needed_bytes: u64,
    },
    /// No Python at all, and no uv that could bring one.
    #[error("neither uv nor python3 is on PATH")]
    NoPython,
    /// Python is there, but no way to get uv with it.
    #[error("uv cannot be fetched with {}: {}", .python.display(), .whys.join("; "))]
    NoUv {
        /// The interpreter that was tried.
        python: PathBuf,
        /// One reason for each way that was tried.
        whys: Vec<String>,
    },
    /// A program that the install consists of failed.
    #[error("{step} failed ({status}){}", indented(.last_lines))]
    Step {
        /// What it was doing.
        step: &'static str,
        /// How the program ended.
        status: ExitStatus,
        /// The end of its output.
        last_lines: Vec<String>,
        /// What its output points at.
        cause: StepCause,
    },
    /// What was installed does not start, or is another version.
    #[error("the new environment in {} is not ms-swift {wanted}: it says `{found}`", .dir.display())]
    WrongResult {
        /// The environment.
        dir: PathBuf,
        /// The version that the lock names.
        wanted: &'static str,
        /// What the environment's interpreter answered.
        found: String,
    },
    /// A file operation failed.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// The verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// What the output of a failed step points at.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum StepCause {
    /// The package index was not reached.
    Network,
    /// A file system is full.
    DiskFull,
    /// uv found no interpreter of a suitable version.
    NoSuitablePython,
    /// A file of the index is not the one that was locked.
    HashMismatch,
    /// A package without a ready-made file could not be built.
    Build,
    /// Nothing known.
    Unknown,
}

impl StepCause {
    /// Returns what the output points at. The texts are uv 0.13's and pip 26's own.
    fn from_output(lines: &[String]) -> StepCause {
        let text = lines.join("\n").to_lowercase();
        let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
        if says(&["no space left on device", "os error 28", "disk quota exceeded"]) {
            StepCause::DiskFull
        } else if says(&["hash mismatch", "do not match the hashes"]) {
            StepCause::HashMismatch
        } else if says(&["no interpreter found", "no python found", "could not find a suitable python"]) {
            StepCause::NoSuitablePython
        } else if says(&[
            "error sending request",
            "failed to fetch",
            "failed to download",
            "dns error",
            "connection refused",
            "connection reset",
            "timed out",
            "network is unreachable",
            "name resolution",
            "newconnectionerror",
            "connection broken",
            "max retries exceeded",
            "no matching distribution found",
            "certificate",
        ]) {
            StepCause::Network
        } else if says(&["failed to build", "build backend"]) {
            StepCause::Build
        } else {
            StepCause::Unknown
        }
    }

    fn help(self) -> &'static str {
        match self {
            StepCause::Network => {
                "packages come from the Python package index: check the network, or point uv and pip at a mirror \
                 or proxy as usual (UV_DEFAULT_INDEX, PIP_INDEX_URL, HTTPS_PROXY), then run it again: what was \
                 downloaded is kept"
            }
            StepCause::DiskFull => {
                "make room where the environment is made and in uv's cache (`uv cache dir`, moved by UV_CACHE_DIR), \
                 or choose another place with --dir"
            }
            StepCause::NoSuitablePython => {
                "install Python 3.11, 3.12 or 3.13, or let uv do it: `uv python install 3.12`"
            }
            StepCause::HashMismatch => {
                "the index gives another file than the one that was locked: use one that mirrors PyPI unchanged"
            }
            StepCause::Build => "a package is built from source: install a C compiler and Python's headers",
            StepCause::Unknown => {
                "the lines above are the program's own; run it again when the cause is gone"
            }
        }
    }
}

impl InstallError {
    fn io(what: &'static str, path: &Path, source: io::Error) -> InstallError {
        InstallError::Io { what, path: path.to_owned(), source }
    }

    /// Returns what the reader can do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            InstallError::Cancelled | InstallError::WrongResult { .. } | InstallError::Io { .. } => return None,
            InstallError::NoHome => "set HOME, or give --dir".to_owned(),
            InstallError::NotOurs(_) => "give --dir a new or empty directory".to_owned(),
            InstallError::NotEnoughDisk { .. } => "make room, or choose another place with --dir".to_owned(),
            InstallError::NoPython => "install python3 (Debian: `apt install python3 python3-venv`) or uv".to_owned(),
            InstallError::NoUv { .. } => {
                "install Python's venv module (Debian: `apt install python3-venv`), virtualenv, pip, or uv itself"
                    .to_owned()
            }
            InstallError::Step { cause, .. } => cause.help().to_owned(),
        })
    }
}

fn indented(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  | {line}")).collect()
}

fn step_error(step: &'static str, error: RunError) -> InstallError {
    match error {
        RunError::Cancelled => InstallError::Cancelled,
        RunError::Io(source) => InstallError::io("run a program for", Path::new(step), source),
        RunError::Failed { status, last_lines } => {
            let cause = StepCause::from_output(&last_lines);
            InstallError::Step { step, status, last_lines, cause }
        }
    }
}

/// What [`STATE_FILE`] holds.
#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    state: State,
    trainer: String,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Installing,
    Complete,
}

/// What is found where an environment shall be.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    HalfMadeOrOutdated,
    Complete,
    NotOurs,
}

/// Returns a complete environment of the release in `request.dir`: the one that is there, or a new one.
///
/// Blocks for one to some minutes; `progress` is called about ten times a second, so that a bar can live on it. Two
/// installs into one directory wait for each other.
///
/// # Errors
/// See [`InstallError`]. After any of them no half-made environment and no process is left.
pub fn install(
    request: &InstallRequest<'_>,
    progress: &mut dyn FnMut(InstallProgress),
) -> Result<InstalledTrainer, InstallError> {
    let began = Instant::now();
    let dir = std::path::absolute(&request.dir).map_err(|e| InstallError::io("find", &request.dir, e))?;
    let installed = |reused| InstalledTrainer {
        release: request.release,
        python: dir.join("bin/python"),
        dir: dir.clone(),
        reused,
        elapsed: began.elapsed(),
    };
    // First without the lock: a complete environment may lie where we must not write.
    if look_at(&dir, request.release)? == Found::Complete {
        return Ok(installed(true));
    }
    let mut report = Report { began, progress };
    let _held = hold_lock(&dir, request.cancel, &mut report)?;
    match look_at(&dir, request.release)? {
        Found::Complete => return Ok(installed(true)),
        Found::NotOurs => return Err(InstallError::NotOurs(dir)),
        Found::HalfMadeOrOutdated => {
            report.phase(InstallPhase::Removing);
            remove(&dir)?;
        }
        Found::Nothing => {}
    }
    check_free_disk(&dir, DISK_NEEDED_BYTES)?;
    let made = make(request, &dir, &mut report);
    if made.is_err() {
        // The first error is the one to tell; what cannot be removed now is half-made and goes at the next start.
        let _ = remove(&dir);
    }
    made.map(|()| installed(false))
}

/// Passes on what an install is doing.
struct Report<'a> {
    began: Instant,
    progress: &'a mut dyn FnMut(InstallProgress),
}

impl Report<'_> {
    fn phase(&mut self, phase: InstallPhase) {
        self.tell(phase, 0, None, String::new());
    }

    fn tell(&mut self, phase: InstallPhase, done: u64, total: Option<u64>, detail: String) {
        (self.progress)(InstallProgress { phase, done, total, detail, elapsed: self.began.elapsed() });
    }
}

fn look_at(dir: &Path, release: TrainerRelease) -> Result<Found, InstallError> {
    let mut entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(e) => return Err(InstallError::io("read", dir, e)),
    };
    if entries.next().is_none() {
        return Ok(Found::Nothing);
    }
    let state = match fs::read(dir.join(STATE_FILE)) {
        // One that cannot be read is ours too: only the first write, of an empty directory, is not atomic.
        Ok(bytes) => serde_json::from_slice::<StateFile>(&bytes).map_or(State::Installing, |file| file.state),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::NotOurs),
        Err(e) => return Err(InstallError::io("read", &dir.join(STATE_FILE), e)),
    };
    let same_lock = fs::read_to_string(dir.join(LOCK_FILE)).is_ok_and(|text| text == release.lock());
    let usable =
        state == State::Complete && same_lock && installed_version(dir).as_deref() == Some(release.version());
    Ok(if usable { Found::Complete } else { Found::HalfMadeOrOutdated })
}

/// Returns the version of ms-swift that the environment's interpreter finds, or `None` when it does not start or finds
/// none: a system upgrade can take away the Python that a virtual environment stands on, or put a newer one there.
fn installed_version(dir: &Path) -> Option<String> {
    let script = "import importlib.metadata as m; print(m.version('ms-swift'))";
    let output = Command::new(dir.join("bin/python")).args(["-I", "-c", script]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Waits for the lock beside the directory. It is released when the file is closed, by whatever end we come to.
fn hold_lock(dir: &Path, cancel: &AtomicBool, report: &mut Report<'_>) -> Result<File, InstallError> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(InstallError::NotOurs(dir.to_owned()));
    };
    fs::create_dir_all(parent).map_err(|e| InstallError::io("create", parent, e))?;
    let path = parent.join(format!(".{}.lock", name.to_string_lossy()));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| InstallError::io("open", &path, e))?;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(e) => return Err(InstallError::io("lock", &path, e.into())),
        }
        if cancel.load(Ordering::Relaxed) {
            return Err(InstallError::Cancelled);
        }
        report.phase(InstallPhase::Waiting);
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn check_free_disk(dir: &Path, needed_bytes: u64) -> Result<(), InstallError> {
    let there = dir.ancestors().find(|path| path.exists()).unwrap_or(dir);
    let stat = rustix::fs::statvfs(there).map_err(|e| InstallError::io("look at", there, e.into()))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free_bytes < needed_bytes {
        return Err(InstallError::NotEnoughDisk { path: there.to_owned(), free_bytes, needed_bytes });
    }
    Ok(())
}

/// Removes an environment, its state file last: until then the rest is known to be ours.
fn remove(dir: &Path) -> Result<(), InstallError> {
    let failed = |path: &Path, e| InstallError::io("remove", path, e);
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let path = entry.map_err(|e| failed(dir, e))?.path();
        if path.file_name().is_some_and(|name| name == STATE_FILE) {
            continue;
        }
        let is_dir = path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
        if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
            .map_err(|e| failed(&path, e))?;
    }
    fs::remove_dir_all(dir).map_err(|e| failed(dir, e))
}

fn make(request: &InstallRequest<'_>, dir: &Path, report: &mut Report<'_>) -> Result<(), InstallError> {
    fs::create_dir_all(dir).map_err(|e| InstallError::io("create", dir, e))?;
    write_state(dir, State::Installing, request.release)?;
    let lock = dir.join(LOCK_FILE);
    fs::write(&lock, request.release.lock()).map_err(|e| InstallError::io("write", &lock, e))?;

    report.phase(InstallPhase::Tools);
    let uv = tools::uv(&request.tools_dir, request.cancel, &mut |_| report.phase(InstallPhase::Tools))?;
    report.phase(InstallPhase::Environment);
    make_environment(&uv, dir, request.cancel, report)?;
    install_packages(&uv, dir, &lock, request.cancel, report)?;
    compile(dir, request.cancel, report)?;
    check_result(dir, request.release)?;
    write_state(dir, State::Complete, request.release)
}

fn write_state(dir: &Path, state: State, release: TrainerRelease) -> Result<(), InstallError> {
    let path = dir.join(STATE_FILE);
    let file = StateFile { state, trainer: release.directory_name() };
    let write = || -> io::Result<()> {
        let mut temporary = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(&mut temporary, &file)?;
        temporary.write_all(b"\n")?;
        temporary.as_file().sync_all()?;
        temporary.persist(&path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|e| InstallError::io("write", &path, e))
}

/// Returns a uv command that the settings of a project in the working directory do not reach. The user's own do.
fn uv_command(uv: &Path, dir: &Path, verb: &[&str]) -> Command {
    let mut command = Command::new(uv);
    command.args(verb).args(["--color", "never"]).current_dir(dir);
    command
}

fn make_environment(
    uv: &Path,
    dir: &Path,
    cancel: &AtomicBool,
    report: &mut Report<'_>,
) -> Result<(), InstallError> {
    let mut venv = uv_command(uv, dir, &["venv", "--allow-existing", "--no-project"]);
    let python = tools::suitable_python().unwrap_or_else(|| PathBuf::from(tools::PYTHON_RANGE));
    venv.arg(dir).arg("--python").arg(python);
    child::run(venv, cancel, &mut |_| report.phase(InstallPhase::Environment))
        .map(drop)
        .map_err(|e| step_error("making the virtual environment", e))
}

fn install_packages(
    uv: &Path,
    dir: &Path,
    lock: &Path,
    cancel: &AtomicBool,
    report: &mut Report<'_>,
) -> Result<(), InstallError> {
    let mut install = uv_command(uv, dir, &["pip", "install", "--require-hashes", "--no-deps"]);
    // Three packages exist only as source. What builds them is held to the lock as well.
    install.arg("--build-constraints").arg(lock).arg("-r").arg(lock);
    install.arg("--python").arg(dir.join("bin/python"));
    let mut packages = PackageProgress::default();
    child::run(install, cancel, &mut |news| {
        if let News::Line(_, line) = news {
            packages.read(line);
        }
        let (done, total) = packages.mib();
        report.tell(InstallPhase::Packages, done, total, packages.busy_with());
    })
    .map(drop)
    .map_err(|e| step_error("installing the packages", e))
}

/// What uv's output says about downloads. It names the large ones with their sizes, and each again when it is there.
#[derive(Debug, Default)]
struct PackageProgress {
    /// KiB by package of what is on its way.
    pending: BTreeMap<String, u64>,
    arrived_kib: u64,
}

impl PackageProgress {
    fn read(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("Downloading"), Some(name), Some(size)) => {
                if let Some(kib) = size_kib(size) {
                    self.pending.insert(name.to_owned(), kib);
                }
            }
            (Some("Downloaded"), Some(name), None) => {
                self.arrived_kib += self.pending.remove(name).unwrap_or(0);
            }
            _ => {}
        }
    }

    /// Returns the MiB that have arrived, and of how many; `None` while nothing is known.
    fn mib(&self) -> (u64, Option<u64>) {
        let total = self.arrived_kib + self.pending.values().sum::<u64>();
        (self.arrived_kib >> 10, (total > 0).then_some(total >> 10))
    }

    /// Returns the names of the two largest downloads that are on their way.
    fn busy_with(&self) -> String {
        let mut by_size: Vec<_> = self.pending.iter().collect();
        by_size.sort_by_key(|(_, kib)| std::cmp::Reverse(**kib));
        by_size
            .iter()
            .take(2)
            .map(|(name, kib)| format!("{name} {} MiB", *kib >> 10))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// Returns the KiB of a size as uv writes it: `(514.2MiB)`.
fn size_kib(text: &str) -> Option<u64> {
    let text = text.strip_prefix('(')?.strip_suffix(')')?;
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit_at);
    let kib_per_unit = match unit {
        "KiB" => 1,
        "MiB" => 1 << 10,
        "GiB" => 1 << 20,
        _ => return None,
    };
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    let whole: u64 = whole.parse().ok()?;
    let tenths: u64 = tenths.get(..1)?.parse().ok()?;
    Some(whole.checked_mul(kib_per_unit)? + tenths * kib_per_unit / 10)
}

/// Compiles everything to bytecode: without it a trainer takes about three times as long to start.
fn compile(dir: &Path, cancel: &AtomicBool, report: &mut Report<'_>) -> Result<(), InstallError> {
    let shares = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(COMPILERS_MAX));
    let commands = (0..shares).map(|share| {
        let mut python = Command::new(dir.join("bin/python"));
        python.args(["-I", "-c", COMPILER]).arg(dir.join("lib"));
        python.args([share.to_string(), shares.to_string()]).current_dir(dir);
        python
    });
    let mut parts = vec![(0, 0); shares];
    child::run_all(commands.collect(), cancel, &mut |news| {
        if let News::Line(share, line) = news
            && let Some((done, total)) = line.split_once(' ')
            && let (Ok(done), Ok(total)) = (done.parse(), total.parse())
        {
            parts[share] = (done, total);
        }
        let (done, total): (u64, u64) =
            parts.iter().fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        report.tell(InstallPhase::Bytecode, done, (total > 0).then_some(total), String::new());
    })
    .map(drop)
    .map_err(|e| step_error("compiling to bytecode", e))
}

fn check_result(dir: &Path, release: TrainerRelease) -> Result<(), InstallError> {
    let found = installed_version(dir).unwrap_or_else(|| "nothing".to_owned());
    if found != release.version() {
        return Err(InstallError::WrongResult { dir: dir.to_owned(), wanted: release.version(), found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress_of(lines: &str) -> PackageProgress {
        let mut progress = PackageProgress::default();
        lines.lines().for_each(|line| progress.read(line));
        progress
    }

    #[test]
    fn downloads_are_counted_by_their_size() {
        let begun = progress_of(
            "Resolved 139 packages in 2.06s\nDownloading torch (514.2MiB)\nDownloading pillow (6.8MiB)\n\
             Downloading huge (1.5GiB)\n Downloaded pillow\n   Building oss2==2.19.1\n Downloaded never-announced",
        );
        assert_eq!(begun.mib(), (6, Some(2056)));
        assert_eq!(begun.busy_with(), "huge 1536 MiB, torch 514 MiB");
        assert_eq!(progress_of("Installed 139 packages in 1.34s").mib(), (0, None));
        assert_eq!(
            progress_of("Downloading x (lots)\nDownloading y\nDownloading z (\u{661}.MiB)").mib(),
            (0, None)
        );
    }

    #[test]
    fn the_whole_fraction_never_goes_back_from_phase_to_phase() {
        let at = |phase, done, total| {
            InstallProgress { phase, done, total, detail: String::new(), elapsed: Duration::ZERO }.fraction()
        };
        let order = [
            at(InstallPhase::Waiting, 0, None),
            at(InstallPhase::Tools, 0, None),
            at(InstallPhase::Environment, 0, None),
            at(InstallPhase::Packages, 0, None),
            at(InstallPhase::Packages, 50, Some(100)),
            at(InstallPhase::Bytecode, 0, None),
            at(InstallPhase::Bytecode, 120, Some(100)),
        ];
        assert!(order.is_sorted(), "{order:?}");
        assert!((order[6] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn locks_are_complete_pins_with_hashes_and_no_addresses() {
        for release in TrainerRelease::ALL {
            let lock = release.lock();
            let pins: Vec<&str> =
                lock.lines().filter(|line| line.contains("==") && !line.starts_with(' ')).collect();
            let strays = lock.lines().filter(|line| !line.trim_start().starts_with("--hash=sha256:"));
            assert_eq!(strays.count(), pins.len(), "a line that is neither a pin nor a hash");
            assert!(lock.contains(&format!("\nms-swift=={} ", release.version())));
            for word in ["://", "--index", "--find-links", "@ "] {
                assert!(!lock.contains(word), "{word}");
            }
        }
    }

    fn cause(line: &str) -> StepCause {
        StepCause::from_output(&[line.to_owned()])
    }

    #[test]
    fn output_points_at_its_cause() {
        assert_eq!(cause("  cause: error sending request for url"), StepCause::Network);
        assert_eq!(cause("ERROR: No matching distribution found for uv==0.13.9"), StepCause::Network);
        assert_eq!(cause("failed to copy file: No space left on device (os error 28)"), StepCause::DiskFull);
        assert_eq!(
            cause("error: No interpreter found for Python >=3.11, <3.14"),
            StepCause::NoSuitablePython
        );
        assert_eq!(cause("Hash mismatch for `addict==2.4.0`"), StepCause::HashMismatch);
        assert_eq!(cause("something else"), StepCause::Unknown);
    }

    fn scene() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("trainer");
        (folder, dir)
    }

    #[test]
    fn somebody_elses_directory_is_never_touched() {
        let (_folder, dir) = scene();
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("thesis.tex"), "years of work").unwrap();
        let cancel = AtomicBool::new(false);
        let request = InstallRequest {
            release: TrainerRelease::MsSwift460,
            dir: dir.clone(),
            tools_dir: dir.join("tools"),
            cancel: &cancel,
        };
        let error = install(&request, &mut |_| {}).unwrap_err();
        assert!(matches!(error, InstallError::NotOurs(_)), "{error}");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn half_made_and_outdated_environments_are_told_from_complete_ones() {
        let (_folder, dir) = scene();
        let release = TrainerRelease::MsSwift460;
        let look = || look_at(&dir, release).unwrap();
        assert_eq!(look(), Found::Nothing);
        fs::create_dir(&dir).unwrap();
        assert_eq!(look(), Found::Nothing);
        fs::write(dir.join(STATE_FILE), "").unwrap();
        assert_eq!(look(), Found::HalfMadeOrOutdated);
        write_state(&dir, State::Installing, release).unwrap();
        assert_eq!(look(), Found::HalfMadeOrOutdated);
        // An interpreter that answers like one with ms-swift in it.
        fs::create_dir(dir.join("bin")).unwrap();
        let python = dir.join("bin/python");
        fs::write(&python, "#!/bin/sh\necho 4.6.0\n").unwrap();
        fs::set_permissions(&python, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        write_state(&dir, State::Complete, release).unwrap();
        fs::write(dir.join(LOCK_FILE), release.lock()).unwrap();
        assert_eq!(look(), Found::Complete);
        fs::write(dir.join(LOCK_FILE), "ms-swift==4.5.9\n").unwrap();
        assert_eq!(look(), Found::HalfMadeOrOutdated);
        fs::write(dir.join(LOCK_FILE), release.lock()).unwrap();
        fs::remove_file(&python).unwrap();
        assert_eq!(look(), Found::HalfMadeOrOutdated);
        remove(&dir).unwrap();
        assert_eq!(look(), Found::Nothing);
    }

    #[test]
    fn a_second_install_waits_for_the_first_and_can_be_cancelled_while_waiting() {
        let (_folder, dir) = scene();
        let cancel = AtomicBool::new(false);
        let mut ignored = |_| {};
        let mut report = Report { began: Instant::now(), progress: &mut ignored };
        let first = hold_lock(&dir, &cancel, &mut report).unwrap();
        let mut waited = 0;
        let mut count = |progress: InstallProgress| {
            assert_eq!(progress.phase, InstallPhase::Waiting);
            waited += 1;
            cancel.store(true, Ordering::Relaxed);
        };
        let mut report = Report { began: Instant::now(), progress: &mut count };
        assert!(matches!(hold_lock(&dir, &cancel, &mut report), Err(InstallError::Cancelled)));
        assert_eq!(waited, 1);
        drop(first);
        let mut report = Report { began: Instant::now(), progress: &mut ignored };
        hold_lock(&dir, &cancel, &mut report).unwrap();
    }

    #[test]
    fn too_little_disk_gives_both_numbers() {
        let (_folder, dir) = scene();
        let error = check_free_disk(&dir, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("needs 17592186044415 MiB"), "{error}");
        check_free_disk(&dir, 1).unwrap();
    }
}
