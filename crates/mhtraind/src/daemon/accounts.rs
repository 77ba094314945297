//! Who asks, who is served, and with whose rights is something done?
//!
//! The kernel says who is at the other end of a Unix socket (SO_PEERCRED, unix(7)); nobody can claim to be another.
//!
//! | the daemon runs as | it serves | trainers run as |
//! | --- | --- | --- |
//! | a user | that user | that user |
//! | root | everybody who has an account on this host | their submitter |
//!
//! Root's daemon touches the files of a job with the rights of its submitter alone: what a user may not read, the daemon
//! does not read for them, and a link that they put in its way leads nowhere that they could not go themselves.

use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::path::PathBuf;

use mhtrain_store::Owner;
use mhtrain_supervisor::Identity;
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use tokio::sync::oneshot;

use crate::failure::{Failure, Status};

/// A user of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one among them.
    pub groups: Vec<u32>,
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

/// Somebody who is served.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Whether the jobs of others are theirs to see and to stop, and the daemon theirs to drain.
    pub is_admin: bool,
}

/// Whom this daemon serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// The user who runs it.
    One(Account),
    /// Everybody: it runs as root.
    All {
        /// The group whose members are administrators, beside root.
        admin_group: Option<u32>,
    },
}

impl Served {
    /// Returns whether a user is answered by more than a refusal.
    pub fn serves(&self, uid: u32) -> bool {
        match self {
            Served::One(account) => uid == account.uid,
            Served::All { .. } => true,
        }
    }
}

impl Account {
    /// Returns the user who runs this process.
    ///
    /// # Errors
    /// There is no home directory.
    pub fn of_this_process() -> Result<Account, Failure> {
        let uid = nix::unistd::geteuid().as_raw();
        let home = std::env::home_dir().filter(|home| home.is_absolute()).ok_or_else(|| {
            Failure::failed("no_home", "this user has no home directory").help("set HOME".to_owned())
        })?;
        let gid = nix::unistd::getegid().as_raw();
        Ok(Account { uid, gid, groups: vec![gid], name: name_of(uid), home })
    }

    /// Returns the user with a uid as the host's user database has them: it may ask a directory service and take long.
    ///
    /// # Errors
    /// There is no such user, or the database does not answer.
    pub fn of(uid: u32) -> Result<Account, Failure> {
        let unknown = |why: String| {
            Failure::new(Status::NotPermitted, "no_account", format!("uid {uid} has no account here{why}"))
                .help(
                    "jobs run as their submitter, who must be known to this host (`getent passwd`)"
                        .to_owned(),
                )
        };
        let failed = |e: nix::Error| unknown(format!(": {e}"));
        let user =
            User::from_uid(Uid::from_raw(uid)).map_err(failed)?.ok_or_else(|| unknown(String::new()))?;
        let name = CString::new(user.name.as_str()).map_err(|e| unknown(format!(": {e}")))?;
        let groups = getgrouplist(&name, user.gid).map_err(failed)?;
        Ok(Account {
            uid,
            gid: user.gid.as_raw(),
            groups: groups.into_iter().map(Gid::as_raw).collect(),
            name: user.name,
            home: user.dir,
        })
    }

    /// Returns the owner of a job as they were when it was submitted: enough to find what runs as them.
    pub fn as_submitted(owner: &Owner) -> Account {
        let Owner { uid, gid, name } = owner.clone();
        Account { uid, gid, groups: vec![gid], name, home: PathBuf::from("/") }
    }

    /// Returns as whom something is done for this user; `None` where that is whom this process runs as anyway.
    pub fn identity(&self) -> Option<Identity> {
        let other = self.uid != nix::unistd::geteuid().as_raw();
        other.then(|| Identity { uid: self.uid, gid: self.gid, groups: self.groups.clone() })
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

    /// Does something with the file rights of this user, away from the tasks that serve clients: disks may be slow.
    ///
    /// # Errors
    /// There is no thread for it, it panicked, or the kernel refuses the rights.
    pub async fn act<T: Send + 'static>(
        &self,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let account = self.clone();
        on_a_thread_for(self.uid, move || {
            account.take_file_rights()?;
            Ok(what())
        })
        .await
    }

    /// Gives the calling thread the file rights of this user, unless it has them anyway.
    fn take_file_rights(&self) -> Result<(), Failure> {
        self.identity().map_or(Ok(()), |identity| identity.take_file_rights()).map_err(|e| no_thread(&e))
    }
}

/// Does something on a thread that may take the rights of a user: one of its own, because rights are a thread's and one of
/// the pool would keep them for whoever comes next. For whom this process runs as anyway one of the pool will do.
async fn on_a_thread_for<T: Send + 'static>(
    uid: u32,
    what: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    if uid == nix::unistd::geteuid().as_raw() {
        return tokio::task::spawn_blocking(what).await.map_err(|e| no_thread(&e))?;
    }
    let (reply, answer) = oneshot::channel();
    // Whoever asked may be gone.
    let act = move || drop(reply.send(what()));
    std::thread::Builder::new().name("on-behalf".to_owned()).spawn(act).map_err(|e| no_thread(&e))?;
    answer.await.map_err(|e| no_thread(&e))?
}

fn no_thread(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Status::Bug, "no_thread", error)
}

impl Served {
    /// Returns whom this process can serve.
    ///
    /// # Errors
    /// There is no home directory, or no group of the name that the settings give.
    pub fn by_this_process(admin_group: &str) -> Result<Served, Failure> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(Served::One(Account::of_this_process()?));
        }
        if admin_group.is_empty() {
            return Ok(Served::All { admin_group: None });
        }
        let unknown = |why: String| {
            Failure::bad_input("bad_config", format!("[daemon] admin_group = {admin_group:?}: {why}"))
                .help(format!("`groupadd --system {admin_group}` makes one"))
        };
        let found = Group::from_name(admin_group).map_err(|e| unknown(e.to_string()))?;
        let group = found.ok_or_else(|| unknown("there is no such group".to_owned()))?;
        Ok(Served::All { admin_group: Some(group.gid.as_raw()) })
    }

    /// Returns what a peer may do here. It may ask a directory service and take long.
    ///
    /// # Errors
    /// It is not served.
    pub fn admit(&self, peer: Peer) -> Result<Caller, Failure> {
        if let Some(caller) = self.admit_at_once(peer) {
            return Ok(caller);
        }
        match self {
            Served::One(account) => {
                let message =
                    format!("this daemon serves {} only, and you are {}", account.name, name_of(peer.uid));
                Err(Failure::new(Status::NotPermitted, "other_user", message).help(
                    "start one of your own: `mhtraind serve`; --socket tells the commands which one is meant"
                        .to_owned(),
                ))
            }
            Served::All { admin_group } => {
                let has = |group| Account::of(peer.uid).is_ok_and(|account| account.groups.contains(&group));
                Ok(Caller { uid: peer.uid, is_admin: admin_group.is_some_and(has) })
            }
        }
    }

    /// Returns what a peer may do here, where no user database has to be asked for it.
    pub fn admit_at_once(&self, peer: Peer) -> Option<Caller> {
        let is_admin = match self {
            Served::One(account) => (account.uid == peer.uid).then_some(true),
            Served::All { .. } if peer.uid == 0 => Some(true),
            Served::All { admin_group } => admin_group.is_none().then_some(false),
        };
        is_admin.map(|is_admin| Caller { uid: peer.uid, is_admin })
    }

    /// Returns the account of somebody who was admitted.
    ///
    /// # Errors
    /// They have none on this host.
    pub async fn account(&self, uid: u32) -> Result<Account, Failure> {
        match self {
            Served::One(account) => Ok(account.clone()),
            Served::All { .. } => {
                tokio::task::spawn_blocking(move || Account::of(uid)).await.map_err(|e| no_thread(&e))?
            }
        }
    }

    /// Looks for the account of somebody who was admitted, and does something with their file rights: on one thread, where
    /// [`Served::account`] and [`Account::act`] take two.
    ///
    /// # Errors
    /// As those two, and what is done.
    pub async fn act_as<T: Send + 'static>(
        &self,
        uid: u32,
        what: impl FnOnce(Account) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let known = match self {
            Served::One(account) => Some(account.clone()),
            Served::All { .. } => None,
        };
        on_a_thread_for(uid, move || {
            let account = known.map_or_else(|| Account::of(uid), Ok)?;
            account.take_file_rights()?;
            what(account)
        })
        .await
    }

    /// Returns the account of somebody who submitted a job; `None` where this host does not know them any more, or knows
    /// another by their number.
    pub async fn account_of(&self, owner: &Owner) -> Option<Account> {
        self.account(owner.uid).await.ok().filter(|account| account.name == owner.name)
    }
}

impl Caller {
    /// Returns whether a job may be seen and stopped.
    ///
    /// # Errors
    /// It is another user's.
    pub fn may_touch(self, job: u64, owner: &Owner) -> Result<(), Failure> {
        if self.is_admin || owner.uid == self.uid {
            return Ok(());
        }
        let message = format!("job {job} is another user's");
        Err(Failure::new(Status::NotPermitted, "other_user", message)
            .help("`mhtraind status` lists yours".to_owned()))
    }

    /// Returns whether the daemon itself may be told what to do.
    ///
    /// # Errors
    /// Only administrators may.
    pub fn may_drain(self) -> Result<(), Failure> {
        if self.is_admin {
            return Ok(());
        }
        let message = "only root and the administrators of this daemon stop the starting of jobs";
        Err(Failure::new(Status::NotPermitted, "not_admin", message)
            .help("[daemon] admin_group in /etc/mhtraind/mhtraind.toml names their group".to_owned()))
    }
}

/// Returns a user's name, or the id in digits.
fn name_of(uid: u32) -> String {
    let found = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    found.map_or_else(|| uid.to_string(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: u32) -> Owner {
        Owner { uid, gid: uid, name: format!("user{uid}") }
    }

    #[test]
    fn a_users_daemon_serves_that_user_alone() {
        let account =
            Account { uid: 7, gid: 7, groups: vec![7], name: "ann".to_owned(), home: "/home/ann".into() };
        let served = Served::One(account);
        assert!(served.admit(Peer { uid: 7 }).unwrap().is_admin);
        let failure = served.admit(Peer { uid: 0 }).unwrap_err();
        assert_eq!((failure.status, failure.code.as_ref()), (Status::NotPermitted, "other_user"));
    }

    #[test]
    fn roots_daemon_serves_everybody_and_keeps_them_apart() {
        let served = Served::All { admin_group: None };
        let ann = served.admit(Peer { uid: 61_001 }).unwrap();
        ann.may_touch(1, &owner(61_001)).unwrap();
        assert_eq!(ann.may_touch(2, &owner(61_002)).unwrap_err().status, Status::NotPermitted);
        assert_eq!(ann.may_drain().unwrap_err().status, Status::NotPermitted);
        let root = served.admit(Peer { uid: 0 }).unwrap();
        root.may_touch(2, &owner(61_002)).unwrap();
        root.may_drain().unwrap();
    }

    #[test]
    fn who_is_an_administrator_by_a_group_is_not_known_at_once() {
        let nobody = Account::of(65_534).unwrap();
        let served = Served::All { admin_group: Some(nobody.gid) };
        assert!(served.admit_at_once(Peer { uid: 0 }).unwrap().is_admin);
        for (uid, is_admin) in [(61_001, false), (nobody.uid, true)] {
            assert_eq!(served.admit_at_once(Peer { uid }), None);
            assert_eq!(served.admit(Peer { uid }).unwrap().is_admin, is_admin);
        }
        let served = Served::All { admin_group: None };
        assert!(!served.admit_at_once(Peer { uid: 61_001 }).unwrap().is_admin);
    }

    #[tokio::test]
    async fn what_is_done_as_somebody_has_their_account_and_their_file_rights() {
        let of_thread = |account: Account| {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
            Ok((account.uid, uids.split_whitespace().nth(3).unwrap().parse::<u32>().unwrap()))
        };
        let own = nix::unistd::geteuid().as_raw();
        // Only root may become another: nobody, whom every host knows.
        let uids = if own == 0 { vec![own, 65_534] } else { vec![own] };
        let served = Served::All { admin_group: None };
        for uid in uids {
            assert_eq!(served.act_as(uid, of_thread).await.unwrap(), (uid, uid));
        }
        assert_eq!(served.act_as(4_000_000_001, of_thread).await.unwrap_err().code, "no_account");
        // Nobody's rights are left to a thread of the pool.
        let account = Account::of(own).unwrap();
        for _ in 0..8 {
            let of_pool = tokio::task::spawn_blocking({
                let account = account.clone();
                move || of_thread(account)
            });
            assert_eq!(of_pool.await.unwrap().unwrap(), (own, own));
        }
    }

    #[test]
    fn an_account_has_the_groups_and_home_of_the_user_database() {
        let root = Account::of(0).unwrap();
        assert_eq!((root.name.as_str(), root.gid), ("root", 0));
        assert!(root.groups.contains(&0) && root.home.is_absolute());
        assert_eq!(Account::of(4_000_000_001).unwrap_err().code, "no_account");
    }
}
