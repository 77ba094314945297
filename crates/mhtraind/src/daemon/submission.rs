//! What does a submitter leave behind, beside the job itself?

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Account;
use crate::config::{Config, cache_home};
use crate::engine::origin::Origin;
use crate::engine::secrets::Sources;

/// Where a job comes from. It is kept in the store beside the job, and holds no secrets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submission {
    /// Working directory.
    pub cwd: PathBuf,
    /// Variables that the trainer gets.
    pub env: BTreeMap<String, String>,
    /// Umask.
    pub umask: u32,
    /// The wished card, as it was when the job came: its index can change.
    pub device_uuid: Option<String>,
    /// The job that this one goes on with.
    pub retry_of: Option<u64>,
}

impl Submission {
    /// Returns what the trainer of `account` gets. The daemon's own environment is not in it.
    pub fn origin(&self, account: &Account, config: &Config) -> Origin {
        let mut env = account.base_environment();
        env.extend(self.env.iter().map(|(name, value)| (name.into(), value.into())));
        let (secrets, cache) = match account.identity() {
            None => (Sources::of_this_process(config), cache_home()),
            Some(identity) => {
                let secrets = Sources::of_user(identity.uid, &account.home, config);
                (secrets, Some(account.home.join(".cache/mhtraind")))
            }
        };
        Origin {
            cwd: self.cwd.clone(),
            env,
            umask: Some(self.umask),
            identity: account.identity(),
            secrets: Sources { own_environment: false, ..secrets },
            cache,
        }
    }
}
