//! Who asks, and who is served?
//!
//! The kernel says who is at the other end of a Unix socket (SO_PEERCRED, unix(7)); nobody can claim to be another. A
//! daemon serves the user who runs it and no one else: its trainers run as that user.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use sysinfo::Users;

use crate::failure::{Failure, Status};

/// A user of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Name, or the uid in digits.
    pub name: String,
    /// Home directory.
    pub home: PathBuf,
}

/// Who is at the other end of a connection.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
}

impl Account {
    /// Returns the user who runs this process.
    ///
    /// # Errors
    /// There is no home directory.
    pub fn of_this_process() -> Result<Account, Failure> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let home = std::env::home_dir().filter(|home| home.is_absolute()).ok_or_else(|| {
            Failure::failed("no_home", "this user has no home directory").help("set HOME".to_owned())
        })?;
        Ok(Account { uid, gid, name: name_of(uid), home })
    }

    /// Returns the variables that every trainer of this user has before the submitter's are laid over them.
    pub fn base_environment(&self) -> BTreeMap<OsString, OsString> {
        let mut env = BTreeMap::new();
        let mut set = |name: &str, value: OsString| {
            env.insert(OsString::from(name), value);
        };
        set("HOME", self.home.clone().into());
        set("USER", self.name.clone().into());
        set("LOGNAME", self.name.clone().into());
        set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        set("LANG", "C.UTF-8".into());
        env
    }

    /// Returns whether the peer may use this daemon.
    ///
    /// # Errors
    /// It is another user.
    pub fn admits(&self, peer: Peer) -> Result<(), Failure> {
        if peer.uid == self.uid {
            return Ok(());
        }
        let message = format!("this daemon serves {} only, and you are {}", self.name, name_of(peer.uid));
        Err(Failure::new(Status::NotPermitted, "other_user", message).help(
            "start one of your own: `mhtraind serve`; --socket tells the commands which one is meant"
                .to_owned(),
        ))
    }
}

/// Returns a user's name, or the id in digits.
pub fn name_of(uid: u32) -> String {
    let users = Users::new_with_refreshed_list().ok();
    let found = users.iter().flat_map(|users| users.iter()).find(|user| **user.id() == uid);
    found.map_or_else(|| uid.to_string(), |user| user.name().to_owned())
}
