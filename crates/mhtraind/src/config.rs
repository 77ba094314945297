//! What did the site set?
//!
//! `config/mhtraind.toml` is the reference and the embedded default: a file of the site is laid over it, so every
//! setting has exactly one default, written there.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::failure::{Failure, unreadable};

/// The reference configuration, which is also the default.
pub const REFERENCE: &str = include_str!("../../../config/mhtraind.toml");

/// Where root's daemon listens, which serves every user of the host.
const HOST_SOCKET: &str = "/run/mhtraind/mhtraind.sock";

/// Every setting.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Access to the cards.
    pub nvml: Nvml,
    /// The trainer.
    pub trainer: Trainer,
    /// The sizing engine.
    pub sizing: Sizing,
    /// Looking at the rows of data sets.
    pub data: Data,
    /// How attempts are run.
    pub attempt: Attempt,
    /// Where secrets come from.
    pub secrets: Secrets,
    /// The daemon.
    pub daemon: Daemon,
}

/// `[nvml]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nvml {
    /// Library to open; empty: the driver's.
    pub library: String,
}

/// `[trainer]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trainer {
    /// The command that people type.
    pub command: Vec<String>,
    /// Variables of a submitter that the trainer gets; `NAME_*` stands for every name that begins so.
    pub pass_env: Vec<String>,
    /// Whether the companion runs inside the trainer.
    pub companion: bool,
}

impl Trainer {
    /// Returns whether a submitter's variable goes to the trainer.
    pub fn passes(&self, name: &str) -> bool {
        self.pass_env.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        })
    }
}

/// `[sizing]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizing {
    /// One-sided risk of an OOM.
    pub oom_risk: f64,
    /// A site's own tiers.toml; empty: built-in.
    pub tiers: String,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Seconds that counting the tokens of the rows may take; 0: nobody looks.
    pub look_s: u32,
}

/// `[attempt]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_s: u32,
    /// Seconds that a rerun waits for our own memory.
    pub memory_return_s: u32,
    /// Minutes that a job waits for the memory of others.
    pub neighbour_wait_min: u32,
    /// Seconds of the first wait for network or hub.
    pub network_backoff_s: u32,
    /// MiB kept of each output file.
    pub log_cap_mib: u32,
    /// Seconds without a sign of life after which an attempt may count as stalled; 0: never.
    pub stall_s: u32,
    /// And so many times the median of its steps.
    pub stall_steps: u32,
}

/// `[secrets]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secrets {
    /// File with the values; empty: the user's default.
    pub env_file: String,
}

/// `[daemon]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Daemon {
    /// Socket; empty: the user's default.
    pub socket: String,
    /// State directory; empty: the user's default.
    pub state_dir: String,
    /// Group whose members may see and stop everybody's jobs; empty: none.
    pub admin_group: String,
    /// Jobs of one user that may wait.
    pub jobs_per_user: u32,
}

impl Config {
    /// Reads the site's configuration over the reference.
    ///
    /// # Errors
    /// The file named by `explicit` or found at a standard place cannot be read, is no TOML, has an unknown key or
    /// a value outside its range.
    pub fn load(explicit: Option<&Path>) -> Result<Config, Failure> {
        let path =
            explicit.map(Path::to_owned).or_else(|| standard_places().into_iter().find(|p| p.exists()));
        match path {
            None => Config::parse("", Path::new("built-in")),
            Some(path) => {
                let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
                Config::parse(&text, &path)
            }
        }
    }

    /// Reads the text of a site's configuration over the reference.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Config, Failure> {
        let bad = |message: String| {
            Failure::bad_input("bad_config", format!("{}: {message}", path.display()))
                .help("config/mhtraind.toml lists every setting with its default".to_owned())
        };
        let mut merged: toml::Table = toml::from_str(REFERENCE).expect("the reference is valid: tested");
        let own: toml::Table = toml::from_str(text).map_err(|e| bad(e.to_string()))?;
        overlay(&mut merged, own, "").map_err(bad)?;
        let config: Config = merged.try_into().map_err(|e: toml::de::Error| bad(e.to_string()))?;
        if !(config.sizing.oom_risk > 0.0 && config.sizing.oom_risk < 1.0) {
            return Err(bad(format!(
                "sizing.oom_risk must be above 0 and below 1, it is {}",
                config.sizing.oom_risk
            )));
        }
        if config.trainer.command.is_empty() {
            return Err(bad("trainer.command is empty".to_owned()));
        }
        Ok(config)
    }

    /// Returns the sockets at which commands look for a daemon: where nobody named one, a user's own and then that of the host.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let mut sockets = vec![self.socket()];
        if self.daemon.socket.is_empty() && sockets[0] != Path::new(HOST_SOCKET) {
            sockets.push(PathBuf::from(HOST_SOCKET));
        }
        sockets
    }

    /// Returns the socket of the daemon that this process would be.
    pub fn socket(&self) -> PathBuf {
        if !self.daemon.socket.is_empty() {
            return PathBuf::from(&self.daemon.socket);
        }
        if rustix::process::geteuid().is_root() {
            return PathBuf::from(HOST_SOCKET);
        }
        match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute()) {
            Some(runtime) => runtime.join("mhtraind/mhtraind.sock"),
            None => self.state_dir().join("mhtraind.sock"),
        }
    }

    /// Returns the daemon's state directory.
    pub fn state_dir(&self) -> PathBuf {
        if !self.daemon.state_dir.is_empty() {
            return PathBuf::from(&self.daemon.state_dir);
        }
        let system = PathBuf::from("/var/lib/mhtraind");
        if rustix::process::geteuid().is_root() {
            return system;
        }
        state_home().unwrap_or(system)
    }

    /// Returns the NVML library to open; `None` means the driver's own.
    pub fn nvml_library(&self) -> Option<PathBuf> {
        (!self.nvml.library.is_empty()).then(|| PathBuf::from(&self.nvml.library))
    }
}

/// Lays `own` over `base`, which holds every known key.
fn overlay(base: &mut toml::Table, own: toml::Table, at: &str) -> Result<(), String> {
    for (key, value) in own {
        let name = format!("{at}{key}");
        let Some(slot) = base.get_mut(&key) else {
            let nearest = nearest(&key, base.keys().map(String::as_str));
            return Err(match nearest {
                Some(known) => format!("unknown key `{name}`; the nearest known one is `{at}{known}`"),
                None => format!("unknown key `{name}`"),
            });
        };
        match (slot, value) {
            (toml::Value::Table(inner), toml::Value::Table(own)) => {
                overlay(inner, own, &format!("{name}."))?;
            }
            (slot, value) => *slot = value,
        }
    }
    Ok(())
}

/// Returns the known name nearest to `name`.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn standard_places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(home) = config_home() {
        places.push(home.join("mhtraind.toml"));
    }
    places.push(PathBuf::from("/etc/mhtraind/mhtraind.toml"));
    places
}

/// Returns the user's own directory of settings, `$XDG_CONFIG_HOME/mhtraind`; `None` without a home.
pub fn config_home() -> Option<PathBuf> {
    xdg("XDG_CONFIG_HOME", ".config")
}

/// Returns the user's own directory of data, `$XDG_DATA_HOME/mhtraind`; `None` without a home.
pub fn data_home() -> Option<PathBuf> {
    xdg("XDG_DATA_HOME", ".local/share")
}

/// Returns the user's own directory of state, `$XDG_STATE_HOME/mhtraind`; `None` without a home.
pub fn state_home() -> Option<PathBuf> {
    xdg("XDG_STATE_HOME", ".local/state")
}

/// Returns the user's own cache directory, `$XDG_CACHE_HOME/mhtraind`; `None` without a home.
pub fn cache_home() -> Option<PathBuf> {
    xdg("XDG_CACHE_HOME", ".cache")
}

fn xdg(variable: &str, below_home: &str) -> Option<PathBuf> {
    let set = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = set.or_else(|| Some(std::env::home_dir()?.join(below_home)))?;
    Some(base.join("mhtraind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Failure> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn the_reference_is_a_complete_configuration() {
        let config = parse("").unwrap();
        assert_eq!(config.trainer.command, ["swift", "sft"]);
        assert!(config.trainer.companion);
        assert!((config.sizing.oom_risk - 0.10).abs() < 1e-12);
    }

    #[test]
    fn a_site_sets_one_value_and_keeps_the_others() {
        let config = parse("[sizing]\noom_risk = 0.02").unwrap();
        assert!((config.sizing.oom_risk - 0.02).abs() < 1e-12);
        assert_eq!(config.attempt.grace_s, 20);
    }

    #[test]
    fn an_unknown_key_names_the_nearest_known_one() {
        let failure = parse("[sizing]\noom_rsk = 0.02").unwrap_err();
        assert!(failure.message.contains("`sizing.oom_risk`"), "{}", failure.message);
        assert_eq!(failure.status, crate::failure::Status::BadInput);
    }

    #[test]
    fn a_risk_outside_its_range_is_refused() {
        for text in
            ["oom_risk = 0.0", "oom_risk = 1.0", "oom_risk = -3.0", "oom_risk = nan", "oom_risk = 'x'"]
        {
            assert!(parse(&format!("[sizing]\n{text}")).is_err(), "{text}");
        }
    }
}
