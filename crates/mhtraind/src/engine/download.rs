//! How does what a job needs come onto this machine before the job has a card?
//!
//! With ms-swift's own functions, so that it lies where the trainer looks for it, by the trainer's interpreter, as the
//! job's user. A download that is interrupted is gone on with by the next one: the hubs' libraries keep what they have.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use mhtrain_job::diagnosis::Kind;
use mhtrain_job::spec::JobSpec;
use mhtrain_sizing::units::Bytes;
use mhtrain_supervisor::LogTail;
use mhtrain_swift::diagnosis::{Diagnoser, ExitFacts};
use mhtrain_swift::download::SOURCE;
use rustix::process::{Signal, kill_process_group, set_parent_process_death_signal};
use serde_json::json;

use super::directory::untrusted;
use super::origin::Origin;
use super::prepare::Missing;
use super::secrets;
use crate::failure::{Failure, unwritable};

/// How often a download is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// How much of what a download printed last is shown when nothing in it is understood.
const LAST_WORDS_BYTES: usize = 400;

/// What came of a download.
#[derive(Debug)]
pub enum Downloaded {
    /// Everything is here.
    All,
    /// Somebody ended it.
    Stopped,
    /// It failed.
    Failed {
        /// Whether a later try may succeed: the network failed, not the question.
        temporary: bool,
        /// Why, and what to do.
        failure: Failure,
    },
}

/// Downloads what is missing and returns when that is over. `goes_on` is told how much was written so far, and ends the
/// download by answering `false`. What it prints goes to `log`.
///
/// # Errors
/// The log cannot be written, a secret has no value, or the interpreter cannot be started.
pub fn download(
    missing: &Missing,
    spec: &JobSpec,
    python: &Path,
    origin: &Origin,
    log: &Path,
    mut goes_on: impl FnMut(Option<Bytes>) -> bool,
) -> Result<Downloaded, Failure> {
    let output = new_log(log).map_err(|e| unwritable(log, &e))?;
    let mut child = start(missing, spec, python, origin, &output)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|e| unwritable(log, &e))? {
            break status;
        }
        if !goes_on(written(&child)) {
            end(&mut child);
            return Ok(Downloaded::Stopped);
        }
        std::thread::sleep(LOOK_EVERY);
    };
    if status.success() {
        return Ok(Downloaded::All);
    }
    Ok(why_it_failed(log, status.code()))
}

fn new_log(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(untrusted())
        .open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    Ok(file)
}

fn start(
    missing: &Missing,
    spec: &JobSpec,
    python: &Path,
    origin: &Origin,
    output: &File,
) -> Result<Child, Failure> {
    let wanted = json!({
        "model": missing.model,
        "model_revision": spec.args.get("model_revision"),
        "datasets": missing.datasets,
        "use_hf": spec.args.get("use_hf"),
    });
    let failed = |e: std::io::Error| {
        Failure::failed("cannot_download", format!("{} cannot be started: {e}", python.display()))
            .help("`mhtraind doctor` checks the trainer".to_owned())
    };
    let mut command = origin.command(python).map_err(failed)?;
    command.args(["-c", SOURCE]).arg(wanted.to_string()).envs(&spec.env).current_dir(&origin.cwd);
    command.envs(secrets::find(&spec.secrets, &origin.secrets)?.iter());
    // Nothing of it is for a card, whatever an import looks for.
    command.env("CUDA_VISIBLE_DEVICES", "").env("PYTHONUNBUFFERED", "1");
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(failed)?);
    command.stderr(output.try_clone().map_err(failed)?).process_group(0);
    // SAFETY: one system call. It must come last: becoming the user takes the wish away again (prctl(2)).
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    command.spawn().map_err(failed)
}

/// Ends a download and whatever it started.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended by itself meanwhile; not reaped yet, its pid is still its own.
        let _gone_already = kill_process_group(group, Signal::KILL);
    }
    // Should it have left its own group.
    let _gone_already = child.kill();
    let _reaped = child.wait();
}

/// Returns how many bytes a process wrote so far (proc_pid_io(5)).
fn written(child: &Child) -> Option<Bytes> {
    let text = std::fs::read_to_string(format!("/proc/{}/io", child.id())).ok()?;
    let count = text.lines().find_map(|line| line.strip_prefix("wchar: "))?;
    count.trim().parse().ok().map(Bytes::new)
}

/// Reads why a download failed out of what it printed.
fn why_it_failed(log: &Path, code: Option<i32>) -> Downloaded {
    let (mut diagnoser, mut last) = (Diagnoser::new(), Vec::new());
    let read = LogTail::new(log).drain(|bytes| {
        diagnoser.push_bytes(bytes);
        last.extend_from_slice(bytes);
        let surplus = last.len().saturating_sub(LAST_WORDS_BYTES);
        last.drain(..surplus);
    });
    if let Err(error) = read {
        return Downloaded::Failed { temporary: true, failure: crate::failure::unreadable(log, &error) };
    }
    let diagnosis = diagnoser.finish(ExitFacts { code, ..ExitFacts::default() });
    let words = String::from_utf8_lossy(&last);
    let last_line = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    let line = match diagnosis.evidence.line.trim() {
        "" => last_line.trim(),
        line => line,
    };
    let failure = Failure::failed("download_failed", format!("the download failed: {line}")).help(format!(
        "is the name right, and may this user have it? A token is named under `secrets`; all of what it said is in {}",
        log.display()
    ));
    Downloaded::Failed { temporary: diagnosis.kind == Kind::Network, failure }
}

/// Returns what is downloaded, for people.
pub fn names(missing: &Missing) -> String {
    missing.model.iter().chain(&missing.datasets).map(String::as_str).collect::<Vec<_>>().join(", ")
}
