//! With which uv, and with which Python, is a trainer installed?
//!
//! uv from PATH where there is one. Else a private one is fetched with the user's own pip settings: into a virtual
//! environment, and where Python has no `venv` (Debian packs it apart), with `virtualenv`, else with `pip --target`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use super::child::{self, News, RunError};
use super::{InstallError, step_error};

/// The pinned uv and the hashes of its files.
const UV_LOCK: &str = include_str!("../../../../config/trainer/uv.lock");
/// The oldest uv that knows every option we give (`--build-constraints` with hashes came last).
const UV_OLDEST: (u32, u32) = (0, 5);
/// Pythons that ms-swift (below 3.14) and torch 2.15 (from 3.11) both take.
const PYTHON_OLDEST: (u32, u32) = (3, 11);
const PYTHON_NEWEST: (u32, u32) = (3, 13);
/// The same, for uv.
pub const PYTHON_RANGE: &str = ">=3.11,<3.14";

/// Returns the programs called `name` on PATH, in its order.
fn on_path(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&path).filter(|folder| folder.is_absolute()).collect();
    let name = name.to_owned();
    folders.into_iter().map(move |folder| folder.join(&name)).filter(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn two_numbers(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.trim().parse().ok()?, parts.next()?.trim().parse().ok()?))
}

fn first_line(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Returns a uv that can be used, or `None`.
fn uv_on_path() -> Option<PathBuf> {
    on_path("uv").find(|uv| {
        let version = first_line(uv, &["--version"]);
        version
            .and_then(|line| two_numbers(line.strip_prefix("uv ")?))
            .is_some_and(|found| found >= UV_OLDEST)
    })
}

/// Returns an interpreter on PATH that the trainer can run on, or `None`: then uv looks for one in its own places.
pub fn suitable_python() -> Option<PathBuf> {
    ["python3", "python3.13", "python3.12", "python3.11"].iter().flat_map(|name| on_path(name)).find_map(|program| {
        // sys.executable, because a program on PATH may be a shim that chooses by the working directory.
        let line = first_line(
            &program,
            &["-c", "import sys; print('%d.%d %s' % (sys.version_info[0], sys.version_info[1], sys.executable))"],
        )?;
        let (version, executable) = line.split_once(' ')?;
        let version = two_numbers(version)?;
        (PYTHON_OLDEST..=PYTHON_NEWEST).contains(&version).then(|| PathBuf::from(executable))
    })
}

/// Returns uv: the user's, or a private one under `tools_dir`, which is fetched when it is not there yet.
pub fn uv(
    tools_dir: &Path,
    cancel: &AtomicBool,
    news: &mut dyn FnMut(News<'_>),
) -> Result<PathBuf, InstallError> {
    if let Some(uv) = uv_on_path() {
        return Ok(uv);
    }
    private_uv(tools_dir, cancel, news)
}

fn private_uv(
    tools_dir: &Path,
    cancel: &AtomicBool,
    news: &mut dyn FnMut(News<'_>),
) -> Result<PathBuf, InstallError> {
    let home = tools_dir.join(pinned_uv());
    let ready = home.join("bin/uv");
    if is_program(&ready) && first_line(&ready, &["--version"]).is_some() {
        return Ok(ready);
    }
    let python = on_path("python3").next().ok_or(InstallError::NoPython)?;
    fs::create_dir_all(tools_dir).map_err(|e| InstallError::io("create", tools_dir, e))?;
    // Made beside its place: a half-made one is in a temporary directory that goes away, whatever happens.
    let work = tempfile::Builder::new()
        .prefix(".uv-")
        .tempdir_in(tools_dir)
        .map_err(|e| InstallError::io("create a directory in", tools_dir, e))?;
    let lock = work.path().join("uv.lock");
    fs::write(&lock, UV_LOCK).map_err(|e| InstallError::io("write", &lock, e))?;
    let made = fetch_uv(&python, work.path(), &lock, cancel, news)?;
    // uv is one self-contained program: only it is kept, so no path inside a virtual environment matters.
    let bin = work.path().join("kept/bin");
    fs::create_dir_all(&bin).map_err(|e| InstallError::io("create", &bin, e))?;
    fs::rename(&made, bin.join("uv")).map_err(|e| InstallError::io("move", &made, e))?;
    match fs::remove_dir_all(&home) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(InstallError::io("remove", &home, e)),
        _ => {}
    }
    fs::rename(work.path().join("kept"), &home).map_err(|e| InstallError::io("rename to", &home, e))?;
    Ok(ready)
}

/// Returns `uv-VERSION` of the pinned uv.
fn pinned_uv() -> String {
    let pin = UV_LOCK.lines().next().unwrap_or_default();
    pin.split([' ', '\\']).next().unwrap_or_default().replace("==", "-")
}

/// Returns the uv program that pip put somewhere under `work`.
fn fetch_uv(
    python: &Path,
    work: &Path,
    lock: &Path,
    cancel: &AtomicBool,
    news: &mut dyn FnMut(News<'_>),
) -> Result<PathBuf, InstallError> {
    let environment = work.join("venv");
    let mut whys = Vec::new();
    for module in ["venv", "virtualenv"] {
        let mut make = Command::new(python);
        make.args(["-m", module]).arg(&environment);
        match child::run(make, cancel, news) {
            Ok(_) => {
                let own_python = environment.join("bin/python");
                pip_install(&own_python, lock, &[], cancel, news)?;
                return Ok(environment.join("bin/uv"));
            }
            Err(RunError::Failed { last_lines, .. }) => whys.push(why_not(module, &last_lines)),
            Err(error) => return Err(step_error("making a virtual environment for uv", error)),
        }
        let _ = fs::remove_dir_all(&environment);
    }
    let target = work.join("target");
    if first_line(python, &["-m", "pip", "--version"]).is_some() {
        pip_install(python, lock, &[OsStr::new("--target"), target.as_os_str()], cancel, news)?;
        return Ok(target.join("bin/uv"));
    }
    whys.push("pip: not installed".to_owned());
    Err(InstallError::NoUv { python: python.to_owned(), whys })
}

fn why_not(module: &str, last_lines: &[String]) -> String {
    let told = last_lines.iter().rev().find(|line| !line.trim().is_empty());
    let no_ensurepip = last_lines.iter().any(|line| line.contains("ensurepip"));
    match told {
        _ if no_ensurepip => format!("{module}: Python's ensurepip is not installed"),
        Some(line) => format!("{module}: {}", line.trim()),
        None => format!("{module}: failed without a word"),
    }
}

fn pip_install(
    python: &Path,
    lock: &Path,
    more: &[&OsStr],
    cancel: &AtomicBool,
    news: &mut dyn FnMut(News<'_>),
) -> Result<(), InstallError> {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]);
    pip.args(["--only-binary", ":all:", "--require-hashes", "-r"]).arg(lock).args(more);
    // A user's PIP_USER would contradict both a virtual environment and --target.
    pip.env("PIP_USER", "0");
    child::run(pip, cancel, news).map(drop).map_err(|e| step_error("fetching uv with pip", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_uv_names_its_directory() {
        let name = pinned_uv();
        assert!(name.starts_with("uv-") && two_numbers(&name[3..]).is_some_and(|v| v >= UV_OLDEST), "{name}");
    }

    #[test]
    fn versions_are_read_up_to_the_second_number() {
        assert_eq!(two_numbers("0.13.9 (x86_64-unknown-linux-gnu)"), Some((0, 13)));
        assert_eq!(two_numbers("3.11"), Some((3, 11)));
        assert_eq!(two_numbers("3"), None);
        assert_eq!(two_numbers("banana"), None);
    }

    #[test]
    fn a_debian_python_without_venv_is_explained() {
        let lines =
            ["The virtual environment was not created successfully because ensurepip is not".to_owned()];
        assert_eq!(why_not("venv", &lines), "venv: Python's ensurepip is not installed");
        let lines = ["/usr/bin/python3: No module named virtualenv".to_owned()];
        assert_eq!(why_not("virtualenv", &lines), "virtualenv: /usr/bin/python3: No module named virtualenv");
    }
}
