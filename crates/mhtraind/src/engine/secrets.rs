//! Where do the values of secrets come from?
//!
//! job.json only names them. Their values are looked up right before a trainer is spawned and go into its
//! environment and nowhere else: no argument list, no file, no log line, no error message holds one.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mhtrain_supervisor::FileRights;
use rustix::fs::OFlags;

use crate::config::{Config, config_home};
use crate::failure::{Failure, Status};

/// Values by name. `Debug` shows the names alone.
#[derive(Clone, Default)]
pub struct SecretValues(BTreeMap<String, OsString>);

impl fmt::Debug for SecretValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl SecretValues {
    /// Returns names and values, for the environment of a trainer.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &OsStr)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_os_str()))
    }
}

/// Where secrets are looked for, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Directory of systemd credentials, a file a name.
    pub credentials: Option<PathBuf>,
    /// The user's env file.
    pub env_file: Option<PathBuf>,
    /// Whose it must be.
    pub owner: u32,
    /// Whether our own environment counts: that of a foreground run is its user's.
    pub own_environment: bool,
}

/// Largest env file that is read.
const ENV_FILE_BYTES_MAX: u64 = 1 << 20;

impl Sources {
    /// Returns the sources of this process and its user.
    pub fn of_this_process(config: &Config) -> Sources {
        let env_file = match config.secrets.env_file.as_str() {
            "" => config_home().map(|home| home.join("secrets.env")),
            path => Some(PathBuf::from(path)),
        };
        let owner = rustix::process::geteuid().as_raw();
        Sources { credentials: credentials(), env_file, owner, own_environment: true }
    }

    /// Returns the sources of another user of this host, for whom root's daemon acts.
    pub fn of_user(uid: u32, home: &Path, config: &Config) -> Sources {
        let env_file = match config.secrets.env_file.as_str() {
            "" => home.join(".config/mhtraind/secrets.env"),
            path => PathBuf::from(path),
        };
        Sources { credentials: credentials(), env_file: Some(env_file), owner: uid, own_environment: false }
    }
}

/// Returns where systemd put this service's credentials.
fn credentials() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// Finds the values of `names`: systemd credentials first, then the user's env file, then our own environment.
///
/// # Errors
/// A name has no value anywhere; the env file can be read by others, belongs to somebody else or cannot be read.
pub fn find(names: &[String], sources: &Sources) -> Result<SecretValues, Failure> {
    if names.is_empty() {
        return Ok(SecretValues::default());
    }
    let (credentials, file) = (&sources.credentials, &sources.env_file);
    let from_file = match file {
        Some(path) if path.exists() => read_env_file(path, sources.owner)?,
        _ => BTreeMap::new(),
    };
    let mut values = BTreeMap::new();
    for name in names {
        let credential = credentials.as_ref().and_then(|dir| read_credential(&dir.join(name)));
        let value = credential
            .or_else(|| from_file.get(name).map(OsString::from))
            .or_else(|| std::env::var_os(name).filter(|value| sources.own_environment && !value.is_empty()));
        let Some(value) = value else {
            let place =
                file.as_ref().map_or("the [secrets] env_file".to_owned(), |path| path.display().to_string());
            return Err(Failure::bad_input(
                "missing_secret",
                format!("the secret {name} that job.json names has no value"),
            )
            .help(if sources.own_environment {
                format!("write `{name}=…` into {place} (mode 0600), or export {name}")
            } else {
                format!("write `{name}=…` into {place} (mode 0600)")
            }));
        };
        values.insert(name.clone(), value);
    }
    Ok(SecretValues(values))
}

fn read_credential(path: &Path) -> Option<OsString> {
    // A service's credentials are the service's: the site put them there for whoever names them.
    let _as_ourselves = FileRights::of_this_process();
    let text = std::fs::read_to_string(path).ok()?;
    Some(OsString::from(text.trim_end_matches(['\n', '\r'])))
}

/// Reads `NAME=value` lines; blank lines, comments, `export` and surrounding quotes are understood.
fn read_env_file(path: &Path, owner: u32) -> Result<BTreeMap<String, String>, Failure> {
    let refuse = |message: String| {
        Failure::new(Status::NotPermitted, "unsafe_secrets", message)
            .help(format!("chmod 600 {0} && chown \"$(id -un)\" {0}", path.display()))
    };
    let unreadable = |e: std::io::Error| crate::failure::unreadable(path, &e);
    // Without waiting: a pipe of that name would have nobody at its other end.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() || meta.len() > ENV_FILE_BYTES_MAX {
        return Err(refuse(format!(
            "{} is no plain file of at most {ENV_FILE_BYTES_MAX} bytes",
            path.display()
        )));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(refuse(format!(
            "{} holds secrets and others can read it (mode {:04o}, must be 0600)",
            path.display(),
            meta.mode() & 0o7777
        )));
    }
    if meta.uid() != owner {
        return Err(refuse(format!(
            "{} belongs to user {}, and the job is of user {owner}",
            path.display(),
            meta.uid()
        )));
    }
    let mut text = String::new();
    file.take(ENV_FILE_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
    Ok(text.lines().filter_map(parse_env_line).collect())
}

fn parse_env_line(line: &str) -> Option<(String, String)> {
    let line = line.trim();
    let line = line.strip_prefix("export ").unwrap_or(line);
    if line.starts_with('#') {
        return None;
    }
    let (name, value) = line.split_once('=')?;
    let value = value.trim();
    let unquoted = ['"', '\'']
        .into_iter()
        .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote))
        .unwrap_or(value);
    Some((name.trim().to_owned(), unquoted.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lines_of_an_env_file_are_understood() {
        assert_eq!(parse_env_line("A=b"), Some(("A".into(), "b".into())));
        assert_eq!(parse_env_line(" export A=\"b c\" "), Some(("A".into(), "b c".into())));
        assert_eq!(parse_env_line("A='b=c'"), Some(("A".into(), "b=c".into())));
        assert_eq!(parse_env_line("# A=b"), None);
        assert_eq!(parse_env_line(""), None);
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets.env");
        std::fs::write(&path, "A=hidden").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let us = rustix::process::geteuid().as_raw();
        let failure = read_env_file(&path, us).unwrap_err();
        assert_eq!(failure.status, Status::NotPermitted);
        assert!(!failure.message.contains("hidden"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_env_file(&path, us).unwrap()["A"], "hidden");
        assert_eq!(read_env_file(&path, us + 1).unwrap_err().status, Status::NotPermitted);
    }

    #[test]
    fn debug_shows_names_and_no_values() {
        let values = SecretValues(BTreeMap::from([("TOKEN".to_owned(), OsString::from("hidden"))]));
        assert_eq!(format!("{values:?}"), "{\"TOKEN\"}");
    }
}
