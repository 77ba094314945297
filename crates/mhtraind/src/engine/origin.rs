//! From where does a job come: whose environment, directory and secrets does its trainer get?
//!
//! A foreground run has them from its own process. A job of the daemon has them from its submitter, who may be gone.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use mhtrain_probe::trainer_environment::TrainerQuery;
use mhtrain_supervisor::Identity;

use super::prepare::working_dir;
use super::secrets::Sources;
use crate::config::{Config, cache_home};
use crate::failure::Failure;

/// What a trainer has from whoever started the job.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Working directory; relative paths of the job are relative to it.
    pub cwd: PathBuf,
    /// Environment that the job's own `env` is laid over.
    pub env: BTreeMap<OsString, OsString>,
    /// Umask; `None` keeps ours.
    pub umask: Option<u32>,
    /// As whom everything of the job runs; `None`: as ourselves.
    pub identity: Option<Identity>,
    /// Where the values of secrets are looked for.
    pub secrets: Sources,
    /// Where results of probes are kept; `None`: nowhere.
    pub cache: Option<PathBuf>,
}

impl Origin {
    /// Returns what this process passes on.
    ///
    /// # Errors
    /// The working directory was removed.
    pub fn of_this_process(config: &Config) -> Result<Origin, Failure> {
        Ok(Origin {
            cwd: working_dir()?,
            env: std::env::vars_os().collect(),
            umask: None,
            identity: None,
            secrets: Sources::of_this_process(config),
            cache: cache_home(),
        })
    }

    /// Returns a variable of the environment.
    pub fn variable(&self, name: &str) -> Option<OsString> {
        self.env.get(OsStr::new(name)).cloned()
    }

    /// Returns the variables whose name and value are text.
    pub fn text_variables(&self) -> BTreeMap<String, String> {
        let text = |(name, value): (&OsString, &OsString)| {
            Some((name.to_str()?.to_owned(), value.to_str()?.to_owned()))
        };
        self.env.iter().filter_map(text).collect()
    }

    /// Returns the question for the trainer that this environment starts.
    pub fn trainer_query(&self, config: &Config) -> TrainerQuery {
        TrainerQuery {
            command: config.trainer.command.clone(),
            python: None,
            variables: self.env.clone(),
            cache_dir: self.cache.clone(),
        }
    }

    /// Makes a command run as the job's user.
    ///
    /// # Errors
    /// It is another user, and we are not root.
    pub fn prepare(&self, command: &mut Command) -> std::io::Result<()> {
        self.identity.as_ref().map_or(Ok(()), |identity| identity.prepare(command))
    }

    /// Returns a command that runs as the trainer would: with its environment, as its user.
    ///
    /// # Errors
    /// As [`Origin::prepare`].
    pub fn command(&self, program: &Path) -> std::io::Result<Command> {
        let mut command = Command::new(program);
        command.env_clear().envs(&self.env);
        self.prepare(&mut command)?;
        Ok(command)
    }
}
