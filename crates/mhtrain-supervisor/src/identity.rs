//! As which user does an attempt run, and with whose rights are its files touched?
//!
//! A daemon that runs as root starts each recorder as the submitter ([`Identity`]). From then on the record directory is
//! that user's: whatever lies in it may be a trap. So root never touches it with rights that the user does not have
//! ([`FileRights`]).

use std::io;
use std::marker::PhantomData;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set, set_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use serde::{Deserialize, Serialize};

/// What the kernel takes for "leave it as it is", so it is nobody's id.
const NOBODY: u32 = u32::MAX;

/// The user as whom a recorder, and with it the trainer, runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The user id, real, effective and saved.
    pub uid: u32,
    /// The group id, real, effective and saved.
    pub gid: u32,
    /// The supplementary groups, all of them.
    pub groups: Vec<u32>,
}

impl Identity {
    /// Lets a command run as this user, for good: with the three kinds of uid, gid and groups, and no capabilities.
    ///
    /// # Errors
    /// When it is another user, and we are not root.
    pub fn prepare(&self, command: &mut Command) -> io::Result<()> {
        if let Some(switch) = self.switch()? {
            // SAFETY: system calls only, with what was laid out before the fork.
            unsafe { command.pre_exec(move || Ok(switch.carry_out()?)) };
        }
        Ok(())
    }

    /// Lets the calling thread touch files as this user until the thread ends: with `fsuid`, `fsgid` and the groups of
    /// credentials(7), which each thread has for itself, as do the threads that it starts. What it executes would be root
    /// again: see [`Identity::prepare`]. Unless we are root, nothing changes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take_file_rights(&self) -> io::Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        let groups: Vec<Gid> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        set_thread_groups(&groups)?;
        set_file_ids(self.uid, self.gid);
        if file_ids() == (self.uid, self.gid) { Ok(()) } else { Err(Errno::PERM.into()) }
    }

    /// Returns what a child needs to become this user; `None` when it is that user already and may not change anything.
    ///
    /// # Errors
    /// When it is another user, and we are not root.
    pub(crate) fn switch(&self) -> io::Result<Option<Switch>> {
        if self.uid == NOBODY || self.gid == NOBODY || self.groups.contains(&NOBODY) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if !geteuid().is_root() {
            let same = geteuid().as_raw() == self.uid && rustix::process::getegid().as_raw() == self.gid;
            return if same { Ok(None) } else { Err(Errno::PERM.into()) };
        }
        Ok(Some(Switch {
            uid: Uid::from_raw(self.uid),
            gid: Gid::from_raw(self.gid),
            groups: self.groups.iter().map(|group| Gid::from_raw(*group)).collect(),
        }))
    }
}

/// An [`Identity`] in the kernel's form, ready to be used between fork and exec.
#[derive(Debug)]
pub(crate) struct Switch {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Switch {
    /// Becomes the user, for good. Makes system calls only, so it may run between fork and exec.
    pub(crate) fn carry_out(&self) -> Result<(), Errno> {
        // The order matters: without the uid of root neither groups nor gid could be set any more.
        set_thread_groups(&self.groups)?;
        set_thread_res_gid(self.gid, self.gid, self.gid)?;
        set_thread_res_uid(self.uid, self.uid, self.uid)?;
        if self.uid.is_root() {
            return Ok(());
        }
        // The kernel drops what root has when all three uids leave 0, but not what a service manager made inheritable,
        // and nothing at all under some secure bits: capabilities(7). Kernels before 4.3 have no ambient set.
        let _no_such_set = clear_ambient_capability_set();
        let none = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
        if set_thread_res_uid(None, Uid::ROOT, None).is_ok()
            || (!self.gid.is_root() && set_thread_res_gid(None, Gid::ROOT, None).is_ok())
        {
            return Err(Errno::PERM);
        }
        // Until the exec this process has a copy of mhtraind's memory (`Start::copies_memory`): that user's debugger must not
        // look. The exec makes it dumpable again, unless that user may not read the executable, so the tools of that user work on
        // the trainer.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
    }
}

/// Makes this thread touch files as somebody else, until it is dropped: `fsuid` and `fsgid` of Linux, which each thread has
/// for itself (setfsuid(2)). Only root can; for everybody else nothing changes.
#[derive(Debug)]
#[must_use = "the rights are given back when it is dropped"]
pub struct FileRights {
    back: Option<(u32, u32)>,
    /// The rights are those of one thread.
    _not_send: PhantomData<*const ()>,
}

impl FileRights {
    /// The rights of another user. Our supplementary groups stay.
    pub(crate) fn of(uid: u32, gid: u32) -> FileRights {
        let now = file_ids();
        let change = geteuid().is_root() && now != (uid, gid);
        if change {
            set_file_ids(uid, gid);
        }
        FileRights { back: change.then_some(now), _not_send: PhantomData }
    }

    /// The rights that this thread has anyway.
    pub(crate) fn unchanged() -> FileRights {
        FileRights { back: None, _not_send: PhantomData }
    }

    /// The rights of this process, whatever this thread was told before.
    pub fn of_this_process() -> FileRights {
        FileRights::of(geteuid().as_raw(), rustix::process::getegid().as_raw())
    }
}

impl Drop for FileRights {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.back {
            set_file_ids(uid, gid);
        }
    }
}

/// Returns `fsuid` and `fsgid` of this thread.
pub(crate) fn file_ids() -> (u32, u32) {
    // An id that is nobody's changes nothing, and the answer is always the one before.
    set_file_ids(NOBODY, NOBODY)
}

/// Returns what they were.
fn set_file_ids(uid: u32, gid: u32) -> (u32, u32) {
    // SAFETY: both take a number and answer with one; they touch no memory, and change this thread alone.
    let (old_gid, old_uid) = unsafe { (libc::setfsgid(gid), libc::setfsuid(uid)) };
    (old_uid.cast_unsigned(), old_gid.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_rights_come_back() {
        let before = file_ids();
        {
            let _as_somebody = FileRights::of(61_001, 61_002);
            let wanted = if geteuid().is_root() { (61_001, 61_002) } else { before };
            assert_eq!(file_ids(), wanted);
            let _as_ourselves = FileRights::of_this_process();
            assert_eq!(file_ids().0, geteuid().as_raw());
        }
        assert_eq!(file_ids(), before);
    }

    #[test]
    fn a_thread_that_took_the_rights_of_a_user_has_them_alone() {
        let user = Identity { uid: 61_001, gid: 61_002, groups: vec![61_002, 61_003] };
        let before = file_ids();
        let (ids, groups) = std::thread::scope(|scope| {
            let taken = scope.spawn(|| {
                user.take_file_rights().unwrap();
                (file_ids(), rustix::process::getgroups().unwrap())
            });
            taken.join().unwrap()
        });
        if geteuid().is_root() {
            assert_eq!(ids, (61_001, 61_002));
            assert_eq!(groups.iter().map(|group| group.as_raw()).collect::<Vec<_>>(), [61_002, 61_003]);
        }
        assert_eq!(file_ids(), before);
    }

    #[test]
    fn a_command_runs_as_the_user_with_his_groups() {
        if !geteuid().is_root() {
            return;
        }
        let mut id = Command::new("sh");
        id.args(["-c", "id -u; id -G; setpriv -d 2>/dev/null | grep -i 'effective cap' || echo none"]);
        Identity { uid: 61_001, gid: 61_002, groups: vec![61_002, 61_003] }.prepare(&mut id).unwrap();
        let said = String::from_utf8(id.output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(&lines[..2], ["61001", "61002 61003"]);
        assert!(lines[2].ends_with("none]") || lines[2].ends_with("none"), "{said}");
    }

    #[test]
    fn nobody_is_no_identity() {
        let identity = Identity { uid: 1, gid: 1, groups: vec![u32::MAX] };
        assert!(identity.switch().is_err());
    }
}
