//! Which Python runs ms-swift, and what is installed there?
//!
//! ```text
//! ["swift", "sft"] --PATH--> script --first lines--> interpreter --read_environment.py--> TrainerEnvironment
//!                                   or named in the query               ^ cached by file times
//! ```
//!
//! torch is never imported: that takes seconds. The interpreter runs a small script that reads the metadata of what is
//! installed. It runs in the environment that the trainer will have, user site and `PYTHONPATH` included, because that
//! is where the trainer will find its packages.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mhtrain_swift::environment::TrainerEnvironment;
use serde::{Deserialize, Serialize};

/// How long the interpreter may take to say what is installed: 0.2 s is usual, a cold network disk takes many seconds.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// The answer is 2 KiB; what a talkative `sitecustomize` prints before it is cut here.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// How much of a script is read to find its interpreter.
const SCRIPT_BYTES_MAX: u64 = 4096;

const READER: &str = include_str!("read_environment.py");

const START_WITH_PYTHON: &str = "name ms-swift's own `swift` in `[trainer] command`, or start it with its interpreter: \
                                 [\"/path/to/python\", \"-m\", \"swift.cli.main\", \"sft\"]";

/// What stands before the answer on its line.
const ANSWER_MARK: &str = "MHTRAIND";

/// Variables that change which packages Python finds.
const PYTHON_VARIABLES: [&str; 6] =
    ["PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONPYCACHEPREFIX", "HOME"];

/// Which trainer is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainerQuery {
    /// The command, for example `["swift", "sft"]`.
    pub command: Vec<String>,
    /// Interpreter that the configuration names; the command is not looked at then.
    pub python: Option<PathBuf>,
    /// The whole environment that the trainer will have. Commands are looked for in its `PATH`.
    pub variables: BTreeMap<OsString, OsString>,
    /// Directory of the cache; `None`: nothing is cached.
    pub cache_dir: Option<PathBuf>,
}

impl TrainerQuery {
    /// Returns the question for `swift sft` as this process would start it, with the user's cache directory.
    pub fn from_environment(command: Vec<String>, python: Option<PathBuf>) -> TrainerQuery {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|directory| directory.is_absolute())
            .or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        TrainerQuery {
            command,
            python,
            variables: std::env::vars_os().collect(),
            cache_dir: cache.map(|cache| cache.join("mhtraind")),
        }
    }

    fn search_path(&self) -> Option<&OsStr> {
        self.variables.get(OsStr::new("PATH")).map(OsString::as_os_str)
    }
}

/// Who starts the interpreter that is asked. A daemon that serves several users starts it as the trainer's.
pub type Prepare<'a> = &'a dyn Fn(&mut Command) -> std::io::Result<()>;

/// A trainer environment that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// The configured command is empty.
    #[error("the trainer command is empty")]
    EmptyCommand,
    /// The command is nowhere.
    #[error("the trainer command `{command}` was not found{}", if *searched { " in PATH" } else { "" })]
    CommandNotFound {
        /// What was looked for.
        command: String,
        /// Whether it was looked for in `PATH`.
        searched: bool,
    },
    /// The file cannot be read.
    #[error("cannot read the trainer command {}: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no Python script.
    #[error("{} is not a Python script, so its interpreter is unknown: {what}", path.display())]
    NotPython {
        /// Which file.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// A script names an interpreter that is not there.
    #[error("the interpreter {} of the trainer does not exist", python.display())]
    NoInterpreter {
        /// Which interpreter.
        python: PathBuf,
    },
    /// A directory on the way to the interpreter is closed to the user.
    #[error("the interpreter {} of the trainer cannot be reached by the user of the job: {source}", python.display())]
    OutOfReach {
        /// Which interpreter.
        python: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The interpreter does not run.
    #[error("the interpreter {} does not work: {what}", python.display())]
    BrokenPython {
        /// Which interpreter.
        python: PathBuf,
        /// What it said last.
        what: String,
    },
    /// The interpreter takes too long.
    #[error("the interpreter {} did not answer within {seconds} s", python.display())]
    TimedOut {
        /// Which interpreter.
        python: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// Python works, ms-swift is absent.
    #[error("ms-swift is not installed for {}", python.display())]
    NoSwift {
        /// Which interpreter.
        python: PathBuf,
    },
    /// Another program of the name `swift`.
    #[error("the `swift` of {} is not ms-swift but {what}", python.display())]
    OtherSwift {
        /// Which interpreter.
        python: PathBuf,
        /// What it is.
        what: String,
    },
}

impl TrainerError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        let text = match self {
            TrainerError::EmptyCommand => "set `[trainer] command = [\"swift\", \"sft\"]`".to_owned(),
            TrainerError::CommandNotFound { .. } => {
                "activate the environment that has ms-swift, name its full path in `[trainer] command`, \
                 or install it with `mhtraind install-trainer` or `pip install ms-swift`"
                    .to_owned()
            }
            TrainerError::Unreadable { .. } => "check its rights".to_owned(),
            TrainerError::NotPython { .. } => START_WITH_PYTHON.to_owned(),
            TrainerError::NoInterpreter { .. } => {
                "the environment was moved or removed: make it again, or name another in `[trainer] command`"
                    .to_owned()
            }
            TrainerError::OutOfReach { .. } => {
                "install the trainer where everybody who uses it can read it, for example below /opt, and name that \
                 `swift` in `[trainer] command`; a Python that a tool keeps in somebody's home is closed to others"
                    .to_owned()
            }
            TrainerError::BrokenPython { python, .. } => {
                format!("run `{} -c 'import importlib.metadata'` and mend what it says", python.display())
            }
            TrainerError::TimedOut { python, .. } => {
                format!("run `{} -c pass`; a cold network disk needs a second try", python.display())
            }
            TrainerError::NoSwift { python } => {
                format!(
                    "run `{} -m pip install ms-swift`, let `mhtraind install-trainer` make an environment that has it, or \
                     name another in `[trainer] command`",
                    python.display()
                )
            }
            TrainerError::OtherSwift { .. } => {
                "name the full path of ms-swift's own `swift` in `[trainer] command`".to_owned()
            }
        };
        Some(text)
    }
}

/// What `read_environment.py` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    python_version: String,
    packages: BTreeMap<String, String>,
    swift_directory: Option<PathBuf>,
    sft_script: Option<PathBuf>,
    bytecode: bool,
    watched: Vec<PathBuf>,
}

/// Returns the environment that the trainer will run in. Files are read as the calling thread, the interpreter runs as
/// this process.
///
/// # Errors
///
/// The command or its interpreter is not found or does not work, or ms-swift is not there.
pub fn trainer_environment(query: &TrainerQuery) -> Result<TrainerEnvironment, TrainerError> {
    trainer_environment_as(query, &|_| Ok(()))
}

/// Like [`trainer_environment`], where `prepare` has the last word about how the interpreter is started.
///
/// # Errors
///
/// As [`trainer_environment`].
pub fn trainer_environment_as(
    query: &TrainerQuery,
    prepare: Prepare<'_>,
) -> Result<TrainerEnvironment, TrainerError> {
    let python = find_python(query)?;
    let key = python_variables(&query.variables);
    let cache = query.cache_dir.as_ref().map(|directory| cache_file(directory, &python, &key));
    let cached = cache.as_ref().and_then(|file| read_cache(file, &python, &key));
    let answer = match cached {
        Some(answer) => answer,
        None => {
            let answer = ask_python(&python, &query.variables, prepare, READ_TIMEOUT)?;
            if let Some(file) = &cache {
                write_cache(file, &python, key, &answer);
            }
            answer
        }
    };
    environment_of(python, answer)
}

fn environment_of(python: PathBuf, answer: Answer) -> Result<TrainerEnvironment, TrainerError> {
    if !answer.packages.contains_key("ms-swift") {
        return Err(match other_swift(&answer) {
            Some(what) => TrainerError::OtherSwift { python, what },
            None => TrainerError::NoSwift { python },
        });
    }
    Ok(TrainerEnvironment {
        python,
        python_version: answer.python_version,
        sft_script: answer.sft_script,
        packages: answer.packages,
        bytecode: answer.bytecode,
    })
}

/// Returns what else has the name `swift` here.
fn other_swift(answer: &Answer) -> Option<String> {
    if let Some(version) = answer.packages.get("python-swiftclient") {
        return Some(format!("OpenStack's object storage client (python-swiftclient {version})"));
    }
    if let Some(version) = answer.packages.get("swift") {
        return Some(format!("OpenStack's object storage (swift {version})"));
    }
    let directory = answer.swift_directory.as_ref()?;
    Some(format!("a package without the metadata of ms-swift at {}", directory.display()))
}

// ---- which interpreter ---------------------------------------------------------------------------------------

/// Returns the interpreter of the trainer: as configured, else as the command's script says.
///
/// # Errors
///
/// The command is not found, is no Python script, or names an interpreter that is not there.
pub fn find_python(query: &TrainerQuery) -> Result<PathBuf, TrainerError> {
    let python = match &query.python {
        Some(python) => python.clone(),
        None => python_of_command(query)?,
    };
    let absolute = std::path::absolute(&python).unwrap_or(python);
    match absolute.metadata() {
        Ok(found) if found.is_file() => Ok(absolute),
        Err(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(TrainerError::OutOfReach { python: absolute, source })
        }
        _ => Err(TrainerError::NoInterpreter { python: absolute }),
    }
}

fn python_of_command(query: &TrainerQuery) -> Result<PathBuf, TrainerError> {
    let command = query.command.first().ok_or(TrainerError::EmptyCommand)?;
    let search_path = query.search_path();
    let not_found =
        || TrainerError::CommandNotFound { command: command.clone(), searched: !command.contains('/') };
    let path = find_command(command, search_path).ok_or_else(not_found)?;
    if is_python_name(&path) {
        return Ok(path);
    }
    let start =
        read_start(&path).map_err(|source| TrainerError::Unreadable { path: path.clone(), source })?;
    match interpreter(&start) {
        Interpreter::Path(python) => Ok(python),
        Interpreter::Named(name) => find_command(&name, search_path)
            .ok_or(TrainerError::NoInterpreter { python: PathBuf::from(name) }),
        Interpreter::Beside(name) => {
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            Ok(real.with_file_name(name))
        }
        Interpreter::Other(what) => Err(TrainerError::NotPython { path, what }),
    }
}

/// Returns the executable file of a command, looked for in `search_path` unless it names a directory.
fn find_command(command: &str, search_path: Option<&OsStr>) -> Option<PathBuf> {
    if command.contains('/') {
        return Some(PathBuf::from(command)).filter(|path| is_executable(path));
    }
    std::env::split_paths(search_path?)
        .map(|directory| directory.join(command))
        .find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn is_python_name(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    ["python", "pypy"].iter().any(|prefix| {
        name.strip_prefix(prefix).is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.'))
    })
}

fn read_start(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::new();
    std::fs::File::open(path)?.take(SCRIPT_BYTES_MAX).read_to_end(&mut start)?;
    Ok(start)
}

/// What the first lines of a file say about its interpreter.
#[derive(Debug, PartialEq, Eq)]
enum Interpreter {
    /// This file.
    Path(PathBuf),
    /// Whatever has this name in `PATH` (`#!/usr/bin/env python3`).
    Named(String),
    /// A file of this name in the script's own directory (relocatable environments).
    Beside(String),
    /// No Python.
    Other(String),
}

/// Reads the first lines of a file.
///
/// Installers write three forms: `#!/path/python`, `#!/usr/bin/env python`, and, where the path is long or has
/// spaces, a shell line that is a string to Python: `'''exec' "/long path/python" "$0" "$@"` (pip's distlib, uv).
fn interpreter(start: &[u8]) -> Interpreter {
    if start.starts_with(b"\x7fELF") {
        return Interpreter::Other(
            "it is a binary program, perhaps the compiler of the Swift language".to_owned(),
        );
    }
    let text = String::from_utf8_lossy(start);
    let mut lines = text.lines();
    let Some(first) = lines.next().and_then(|line| line.strip_prefix("#!")) else {
        return Interpreter::Other("its first line names no interpreter".to_owned());
    };
    let mut words = first.split_whitespace();
    let program = words.next().unwrap_or_default();
    match Path::new(program).file_name().and_then(OsStr::to_str) {
        _ if is_python_name(Path::new(program)) => Interpreter::Path(PathBuf::from(program)),
        Some("env") => match words.find(|word| !word.starts_with('-') && !word.contains('=')) {
            Some(name) if is_python_name(Path::new(name)) => Interpreter::Named(name.to_owned()),
            other => Interpreter::Other(format!("it runs under `{}`", other.unwrap_or("env"))),
        },
        Some("sh" | "bash" | "dash") => match lines.next().and_then(trampoline) {
            Some(found) => found,
            None => Interpreter::Other("it is a shell script".to_owned()),
        },
        other => Interpreter::Other(format!("it runs under `{}`", other.unwrap_or(first.trim()))),
    }
}

fn trampoline(line: &str) -> Option<Interpreter> {
    let rest = line.strip_prefix("'''exec'").or_else(|| line.strip_prefix("\"\"\"exec\""))?.trim_start();
    if rest.contains("$(") {
        // "$(dirname -- "$(realpath -- "$0")")"/'python' "$0" "$@"
        let name = rest.split(['\'', '"', '/', ' ']).find(|word| is_python_name(Path::new(word)))?;
        return Some(Interpreter::Beside(name.to_owned()));
    }
    let path = match rest.chars().next()? {
        quote @ ('"' | '\'') => rest.get(1..)?.split(quote).next()?,
        _ => rest.split_whitespace().next()?,
    };
    is_python_name(Path::new(path)).then(|| Interpreter::Path(PathBuf::from(path)))
}

// ---- asking it -----------------------------------------------------------------------------------------------

fn ask_python(
    python: &Path,
    variables: &BTreeMap<OsString, OsString>,
    prepare: Prepare<'_>,
    timeout: Duration,
) -> Result<Answer, TrainerError> {
    let broken = |what: String| TrainerError::BrokenPython { python: python.to_owned(), what };
    let mut command = Command::new(python);
    command.args(["-c", READER]).env_clear().envs(variables);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = prepare(&mut command).and_then(|()| command.spawn());
    let mut child = started.map_err(|error| broken(error.to_string()))?;
    let output = collect(child.stdout.take());
    let errors = collect(child.stderr.take());
    let deadline = Instant::now() + timeout;
    let status = wait_until(&mut child, deadline).map_err(|error| broken(error.to_string()))?;
    let Some(status) = status else {
        return Err(TrainerError::TimedOut { python: python.to_owned(), seconds: timeout.as_secs() });
    };
    // The pipes end with the process, unless a child of its own holds them: then what came until now has to do.
    let patience = Duration::from_secs(2);
    let output = output.recv_timeout(patience).unwrap_or_default();
    let text = String::from_utf8_lossy(&output);
    let answer = text.lines().rev().find_map(|line| line.strip_prefix(ANSWER_MARK));
    match answer {
        Some(json) if status.success() => {
            serde_json::from_str(json).map_err(|error| broken(format!("its answer is garbled: {error}")))
        }
        _ => {
            let errors = errors.recv_timeout(patience).unwrap_or_default();
            let errors = String::from_utf8_lossy(&errors);
            let last = errors.lines().rev().find(|line| !line.trim().is_empty());
            Err(broken(format!("{status}: {}", last.unwrap_or("it said nothing").trim())))
        }
    }
}

/// Reads a pipe in a thread of its own, so that a full pipe cannot block the process that we wait for. What exceeds
/// the bound is thrown away.
fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is still worth looking at.
            let _ = pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
            let _ = sender.send(bytes);
        });
    }
    receiver
}

/// Waits for the child; after the deadline it is killed and the answer is `None`.
fn wait_until(child: &mut Child, deadline: Instant) -> std::io::Result<Option<std::process::ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

// ---- the cache -----------------------------------------------------------------------------------------------

/// An answer with what it depends on. It holds while all of that is unchanged.
#[derive(Debug, Serialize, Deserialize)]
struct Cached {
    version: String,
    python: PathBuf,
    variables: BTreeMap<String, String>,
    times: BTreeMap<PathBuf, FileTime>,
    answer: Answer,
}

/// Time of the last change and inode: an environment that is made anew at the same path differs at least in one.
type FileTime = Option<(i64, i64, u64)>;

fn python_variables(all: &BTreeMap<OsString, OsString>) -> BTreeMap<String, String> {
    let value = |name: &str| Some(all.get(OsStr::new(name))?.to_string_lossy().into_owned());
    PYTHON_VARIABLES.iter().filter_map(|name| Some(((*name).to_owned(), value(name)?))).collect()
}

fn cache_file(directory: &Path, python: &Path, variables: &BTreeMap<String, String>) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (python, variables).hash(&mut hasher);
    directory.join(format!("trainer-{:016x}.json", hasher.finish()))
}

fn file_time(path: &Path) -> FileTime {
    let found = path.metadata().ok()?;
    Some((found.mtime(), found.mtime_nsec(), found.ino()))
}

/// Returns the times of the interpreter, of what makes it a virtual environment, and of the directories whose change
/// means that something was installed, removed or compiled.
fn times(python: &Path, answer: &Answer) -> BTreeMap<PathBuf, FileTime> {
    let settings = python.parent().and_then(Path::parent).map(|root| root.join("pyvenv.cfg"));
    let compiled = answer.watched.iter().map(|directory| directory.join("__pycache__"));
    let watched = answer.watched.iter().cloned().chain(compiled);
    let paths = std::iter::once(python.to_owned()).chain(settings).chain(watched);
    paths.map(|path| (path.clone(), file_time(&path))).collect()
}

/// Returns the cached answer if it still holds. A corrupt file, one of somebody else or of another version of this
/// program is as good as none.
fn read_cache(file: &Path, python: &Path, variables: &BTreeMap<String, String>) -> Option<Answer> {
    let found = file.metadata().ok()?;
    if found.uid() != rustix::process::geteuid().as_raw() || found.len() > OUTPUT_BYTES_MAX {
        return None;
    }
    let cached: Cached = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let holds = cached.version == env!("CARGO_PKG_VERSION")
        && cached.python == python
        && cached.variables == *variables
        && cached.times == times(python, &cached.answer);
    holds.then_some(cached.answer)
}

/// Writes the answer. A cache that cannot be written costs 0.2 s the next time, and nothing else.
fn write_cache(file: &Path, python: &Path, variables: BTreeMap<String, String>, answer: &Answer) {
    let cached = Cached {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        python: python.to_owned(),
        variables,
        times: times(python, answer),
        answer: answer.clone(),
    };
    if let Err(error) = write_private(file, &cached) {
        tracing::debug!(file = %file.display(), %error, "the trainer cache was not written");
    }
}

fn write_private(file: &Path, cached: &Cached) -> std::io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let temporary = file.with_extension(format!("{}.new", std::process::id()));
    let mut opened =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    opened.write_all(&serde_json::to_vec(cached)?)?;
    drop(opened);
    std::fs::rename(&temporary, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a program that prints what an interpreter would and counts its runs.
    struct FakePython {
        directory: tempfile::TempDir,
    }

    impl FakePython {
        fn answering(answer: &str) -> FakePython {
            let fake = FakePython { directory: tempfile::tempdir().unwrap() };
            let runs = fake.directory.path().join("runs");
            let script = format!("#!/bin/sh\necho run >> '{}'\n{answer}\n", runs.display());
            write_executable(&fake.python(), &script);
            fake
        }

        fn with_packages(packages: &str) -> FakePython {
            FakePython::answering(&format!(
                "echo noise\necho 'MHTRAIND{{\"python_version\":\"3.11.7\",\"packages\":{{{packages}}},\
                 \"swift_directory\":null,\"sft_script\":null,\"bytecode\":true,\"watched\":[]}}'"
            ))
        }

        fn python(&self) -> PathBuf {
            self.directory.path().join("python3")
        }

        fn runs(&self) -> usize {
            std::fs::read_to_string(self.directory.path().join("runs")).unwrap().lines().count()
        }

        fn query(&self) -> TrainerQuery {
            TrainerQuery {
                command: Vec::new(),
                python: Some(self.python()),
                variables: std::env::vars_os().collect(),
                cache_dir: Some(self.directory.path().join("cache")),
            }
        }
    }

    fn write_executable(path: &Path, text: &str) {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o755)
            .open(path)
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn the_interpreter_is_read_from_every_form_of_script() {
        let path = |text: &str| Interpreter::Path(PathBuf::from(text));
        assert_eq!(interpreter(b"#!/opt/e/bin/python\nimport sys\n"), path("/opt/e/bin/python"));
        assert_eq!(interpreter(b"#!/opt/e/bin/python3.11 -E\n"), path("/opt/e/bin/python3.11"));
        assert_eq!(interpreter(b"#!/usr/bin/env python3\n"), Interpreter::Named("python3".to_owned()));
        assert_eq!(interpreter(b"#!/usr/bin/env -S python3 -u\n"), Interpreter::Named("python3".to_owned()));
        assert_eq!(
            interpreter(b"#!/bin/sh\n'''exec' \"/long path/bin/python3\" \"$0\" \"$@\"\n' '''\n"),
            path("/long path/bin/python3")
        );
        assert_eq!(
            interpreter(b"#!/bin/sh\n'''exec' /long/bin/python \"$0\" \"$@\"\n"),
            path("/long/bin/python")
        );
        assert_eq!(
            interpreter(
                b"#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python3' \"$0\" \"$@\"\n"
            ),
            Interpreter::Beside("python3".to_owned())
        );
    }

    #[test]
    fn what_is_no_python_script_is_said_to_be_none() {
        for start in [
            &b"\x7fELF\x02"[..],
            b"",
            b"#!",
            b"#!/bin/bash\nconda run swift\n",
            b"#!/usr/bin/env node\n",
            b"\xff\xfe",
        ] {
            assert!(matches!(interpreter(start), Interpreter::Other(_)), "{start:?}");
        }
    }

    #[test]
    fn the_command_is_looked_for_in_the_search_path() {
        let directory = tempfile::tempdir().unwrap();
        let fake = FakePython::with_packages("");
        std::fs::write(directory.path().join("swift"), "not executable").unwrap();
        let mut query = TrainerQuery {
            command: vec!["swift".to_owned(), "sft".to_owned()],
            python: None,
            variables: BTreeMap::from([("PATH".into(), directory.path().into())]),
            cache_dir: None,
        };
        assert!(matches!(find_python(&query), Err(TrainerError::CommandNotFound { searched: true, .. })));
        let script = directory.path().join("bin/swift");
        std::fs::create_dir(directory.path().join("bin")).unwrap();
        write_executable(&script, &format!("#!{}\n", fake.python().display()));
        let places = std::env::join_paths([directory.path(), &directory.path().join("bin")]).unwrap();
        query.variables.insert("PATH".into(), places);
        assert_eq!(find_python(&query).unwrap(), fake.python());
        write_executable(&script, "#!/nowhere/python3\n");
        assert!(matches!(find_python(&query), Err(TrainerError::NoInterpreter { .. })));
    }

    #[test]
    fn the_answer_is_cached_until_something_changes() {
        let fake = FakePython::with_packages("\"ms-swift\":\"4.6.0\"");
        let query = fake.query();
        let first = trainer_environment(&query).unwrap();
        assert_eq!(first.version("ms-swift"), Some("4.6.0"));
        assert_eq!(trainer_environment(&query).unwrap(), first);
        assert_eq!(fake.runs(), 1);
        let cache =
            std::fs::read_dir(query.cache_dir.as_ref().unwrap()).unwrap().next().unwrap().unwrap().path();
        assert_eq!(cache.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&cache, "{corrupt").unwrap();
        assert_eq!(trainer_environment(&query).unwrap(), first);
        assert_eq!(fake.runs(), 2, "a corrupt cache is ignored");
        let text = std::fs::read_to_string(fake.python()).unwrap().replace("4.6.0", "4.7.0");
        std::thread::sleep(Duration::from_millis(20));
        write_executable(&fake.python(), &text);
        assert_eq!(trainer_environment(&query).unwrap().version("ms-swift"), Some("4.7.0"));
    }

    #[test]
    fn a_python_without_ms_swift_and_another_swift_are_told_apart() {
        let nothing = FakePython::with_packages("\"torch\":\"2.9.0\"");
        assert!(matches!(trainer_environment(&nothing.query()), Err(TrainerError::NoSwift { .. })));
        let client = FakePython::with_packages("\"python-swiftclient\":\"4.6.0\"");
        let error = trainer_environment(&client.query()).unwrap_err();
        assert!(error.to_string().contains("OpenStack"), "{error}");
    }

    #[test]
    fn a_broken_or_silent_python_is_an_error_with_its_last_words() {
        let broken = FakePython::answering("echo 'Fatal Python error: no encodings' >&2\nexit 1");
        let error = trainer_environment(&broken.query()).unwrap_err();
        assert!(error.to_string().contains("Fatal Python error"), "{error}");
        let garbled = FakePython::answering("echo MHTRAIND{");
        assert!(matches!(trainer_environment(&garbled.query()), Err(TrainerError::BrokenPython { .. })));
        let silent = FakePython::answering("exec sleep 60");
        let error = ask_python(&silent.python(), &BTreeMap::new(), &|_| Ok(()), Duration::from_millis(100))
            .unwrap_err();
        assert!(matches!(error, TrainerError::TimedOut { .. }));
    }

    #[test]
    fn a_flood_of_output_does_not_block() {
        let flood = FakePython::answering("head -c 5000000 /dev/zero >&2\nexit 3");
        assert!(matches!(trainer_environment(&flood.query()), Err(TrainerError::BrokenPython { .. })));
    }
}
