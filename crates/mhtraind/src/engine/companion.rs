//! How does the companion get into a trainer, and what does the engine make of its reports?
//!
//! ms-swift ends on a plugin that is missing or broken, so the file is written and compiled by the trainer's own
//! interpreter before anything is launched; where that fails, training goes on without it and the receipt says why.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mhtrain_job::event::{AttemptStart, ResumeKind};
use mhtrain_supervisor::log_tail::LogTail;
use mhtrain_swift::companion::{FILE_NAME, Launch, Rescue, SOURCE, Telemetry, replays_first_epoch};
use mhtrain_swift::dialect::Dialect;
use mhtrain_swift::environment::TrainerEnvironment;

use super::directory::{JobDirectory, read_plain};
use super::follow::Follower;
use super::origin::Origin;
use crate::config::Config;

/// How long the interpreter may take to compile one small file: 0.05 s is usual, a cold network disk takes seconds.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(30);

/// Compiles without writing bytecode, and without whatever else is in Python's path.
const COMPILE: [&str; 4] =
    ["-I", "-B", "-c", "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')"];

/// The companion of one job's attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Companion {
    /// It is switched off in the settings.
    Off,
    /// The file is there and compiles.
    Ready(PathBuf),
    /// It cannot be used.
    Unusable(String),
}

impl Companion {
    /// Writes the companion's file and lets the trainer's interpreter compile it: 0.05 s, once for each interpreter.
    pub fn prepare(
        directory: &JobDirectory,
        environment: &TrainerEnvironment,
        origin: &Origin,
        config: &Config,
    ) -> Companion {
        if !config.trainer.companion {
            return Companion::Off;
        }
        match written(directory, SOURCE).and_then(|file| compiled_once(file, &environment.python, origin)) {
            Ok(file) => Companion::Ready(file),
            Err(why) => Companion::Unusable(why),
        }
    }

    /// Returns how an attempt is given the companion, whose recorder writes into `record`.
    pub fn launch(&self, record: &Path) -> Option<Launch> {
        match self {
            Companion::Ready(file) => Some(launch(file.clone(), record)),
            Companion::Off | Companion::Unusable(_) => None,
        }
    }

    /// Returns whether a resume inside a later epoch would replay the rows of the first.
    pub fn replays_first_epoch(
        &self,
        dialect: &Dialect,
        environment: &TrainerEnvironment,
        records: impl Iterator<Item = PathBuf>,
    ) -> bool {
        let earlier: Vec<Telemetry> = match self {
            Companion::Ready(_) => records.map(|record| telemetry_in(&record)).collect(),
            Companion::Off | Companion::Unusable(_) => Vec::new(),
        };
        replays_first_epoch(dialect, &environment.packages, &earlier)
    }

    /// Returns what the receipt must say about an attempt that trained: that the companion was not there, or that
    /// rows were repeated because it was not.
    pub fn warnings(
        &self,
        start: &AttemptStart,
        follower: &Follower,
        dialect: &Dialect,
        steps_per_epoch: Option<u64>,
    ) -> Vec<String> {
        let telemetry = &follower.telemetry;
        let why = match self {
            Companion::Off => return Vec::new(),
            Companion::Unusable(why) => why.clone(),
            Companion::Ready(_) if telemetry.begin().is_none() => telemetry.why_silent(),
            Companion::Ready(_) => {
                return stood_aside(telemetry).chain(lost_step(start, telemetry)).collect();
            }
        };
        if follower.glance(None).step == 0 && follower.log.end_of_training().is_none() {
            return Vec::new();
        }
        let mut warnings = vec![format!("training ran without the companion: {why}")];
        if let (Some(resume), Some(steps)) = (&start.resume, steps_per_epoch)
            && resume.kind == ResumeKind::Exact
            && dialect.replays_first_epoch()
            && resume.from_step > steps
            && !resume.from_step.is_multiple_of(steps)
        {
            warnings.push(format!(
                "attempt {} trained the rest of its epoch with the rows of the first one: only the companion keeps \
                 {dialect} from that",
                start.attempt
            ));
        }
        warnings
    }
}

fn stood_aside(telemetry: &Telemetry) -> impl Iterator<Item = String> + '_ {
    telemetry.aside().map(|why| format!("the companion stood aside: {why}")).into_iter()
}

/// Says that an attempt ran out of memory and its last finished step was not saved. The next one then begins at the last
/// regular checkpoint, and its own note says how many steps that repeats.
fn lost_step(start: &AttemptStart, telemetry: &Telemetry) -> Option<String> {
    let (step, why) = match telemetry.rescue()? {
        Rescue::Lost { step, why } => (step, why.as_str()),
        Rescue::Begun { step, .. } => (step, "it ended while that was written"),
        Rescue::Saved { .. } | Rescue::Needless { .. } => return None,
    };
    Some(format!("attempt {}: step {step} could not be saved when memory ran out: {why}", start.attempt))
}

/// Returns the launch of an attempt whose recorder writes into `record`. (`stop` in there is the recorder's own.)
fn launch(file: PathBuf, record: &Path) -> Launch {
    Launch { file, telemetry: telemetry_file(record), stop_file: record.join("stop-after-step") }
}

/// Returns where an attempt's companion reports to, for an attempt whose recorder writes into `record`.
pub fn telemetry_file(record: &Path) -> PathBuf {
    record.join("telemetry.jsonl")
}

/// Returns the launch that a first attempt in `output_dir` would have, for `plan --exact`.
pub fn planned(output_dir: &Path, config: &Config) -> Option<Launch> {
    let private = output_dir.join(".mhtraind");
    config.trainer.companion.then(|| launch(private.join(PLACE).join(FILE_NAME), &private.join("attempt-1")))
}

/// Removes what a rescue left behind that was killed: it may be as large as a checkpoint. Everything that an attempt
/// started must be gone.
pub fn clean_up(attempt_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(attempt_dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("rescue-tmp-")
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove an unfinished rescue");
        }
    }
}

/// A directory of its own: ms-swift puts it into Python's path, where every `.py` beside the companion would be a
/// module for everybody.
const PLACE: &str = "companion";

/// Writes the file where it is missing or other, and returns its path.
fn written(directory: &JobDirectory, text: &str) -> Result<PathBuf, String> {
    let place = directory.private().join(PLACE);
    std::fs::create_dir_all(&place).map_err(|e| format!("cannot make {}: {e}", place.display()))?;
    let file = place.join(FILE_NAME);
    if read_plain(&file, text.len() as u64).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(file);
    }
    let relative = format!("{PLACE}/{FILE_NAME}");
    directory.write_private(&relative, text.as_bytes()).map_err(|failure| failure.message)?;
    Ok(file)
}

/// Like [`compiled`], for a file that holds [`SOURCE`]. An interpreter that this process has seen compile it is not asked
/// again until something else is at its path.
fn compiled_once(file: PathBuf, python: &Path, origin: &Origin) -> Result<PathBuf, String> {
    static SEEN: Mutex<BTreeMap<PathBuf, (u64, u64, SystemTime)>> = Mutex::new(BTreeMap::new());
    let what = std::fs::metadata(python).and_then(|it| Ok((it.dev(), it.ino(), it.modified()?))).ok();
    let seen = || SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if what.is_some() && seen().get(python).copied() == what {
        return Ok(file);
    }
    let file = compiled(&file, python, origin)?;
    if let Some(what) = what {
        seen().insert(python.to_owned(), what);
    }
    Ok(file)
}

/// Returns the file, when the interpreter compiles it.
fn compiled(file: &Path, python: &Path, origin: &Origin) -> Result<PathBuf, String> {
    let failed = |e: std::io::Error| format!("{} cannot compile it: {e}", python.display());
    let mut child = origin
        .command(python)
        .map_err(failed)?
        .args(COMPILE)
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let began = Instant::now();
    // It prints one short traceback at most, which fits into the pipe: nobody needs to read meanwhile.
    while child.try_wait().map_err(failed)?.is_none() {
        if began.elapsed() > COMPILE_TIMEOUT {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!(
                "{} took over {} s to compile it",
                python.display(),
                COMPILE_TIMEOUT.as_secs()
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(file.to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    Err(format!("{} cannot compile it: {}", python.display(), last.trim()))
}

/// Reads what an earlier attempt's companion reported; nothing where it was not there.
fn telemetry_in(record: &Path) -> Telemetry {
    let mut telemetry = Telemetry::new();
    let _ = LogTail::new(telemetry_file(record)).drain(|bytes| telemetry.push_bytes(bytes));
    telemetry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn python() -> PathBuf {
        PathBuf::from("python3")
    }

    fn origin() -> Origin {
        Origin::of_this_process(&Config::load(None).unwrap()).unwrap()
    }

    #[test]
    fn a_file_that_does_not_compile_is_never_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDirectory::open(dir.path()).unwrap();
        let file = written(&job, "def broken(:\n").unwrap();
        let why = compiled(&file, &python(), &origin()).unwrap_err();
        assert!(why.contains("SyntaxError"), "{why}");
        // The next start finds another text and writes the right one.
        let file = written(&job, SOURCE).unwrap();
        assert_eq!(compiled(&file, &python(), &origin()).unwrap(), file);
        assert_eq!(file.parent().unwrap().read_dir().unwrap().count(), 1, "nothing lies beside it");
    }

    #[test]
    fn no_interpreter_and_no_place_are_reasons() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDirectory::open(dir.path()).unwrap();
        std::fs::write(job.private().join(PLACE), "a file where a directory should be").unwrap();
        assert!(written(&job, SOURCE).unwrap_err().contains("cannot make"));
        let missing = dir.path().join("no-python");
        assert!(compiled(&missing, &missing, &origin()).unwrap_err().contains("cannot compile it"));
    }

    #[test]
    fn an_unfinished_rescue_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["rescue-tmp-12/checkpoint", "checkpoint-6", "runs"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        clean_up(dir.path());
        let mut left: Vec<_> =
            dir.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["checkpoint-6", "runs"]);
        clean_up(&dir.path().join("absent"));
    }
}
