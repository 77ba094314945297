//! How much may one user hand in?
//!
//! Each job that waits, or is on its way in, takes memory and disk of the daemon that serves the others too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mhtrain_job::queue::Waits;
use tokio::sync::OwnedMutexGuard;

use super::Daemon;
use crate::failure::Failure;

/// Largest request that is read without room for it, or before it is known whether whoever sends it has an account here.
pub const SMALL_BYTES_MAX: usize = 64 << 10;

/// How long somebody without room waits for another of the same user who has none either.
const ASKED_AGAIN_WITHIN: Duration = Duration::from_secs(2);

/// Of each user the one who hands in a job without room for it, because it may be there already.
#[derive(Debug, Default)]
pub(super) struct AskingAgain(Mutex<BTreeMap<u32, Arc<tokio::sync::Mutex<()>>>>);

impl AskingAgain {
    /// Waits until nobody else of this user asks, but not long. Returns what keeps it so.
    async fn alone(&self, uid: u32) -> Option<OwnedMutexGuard<()>> {
        let of_user = {
            let mut users = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(users.entry(uid).or_default())
        };
        tokio::time::timeout(ASKED_AGAIN_WITHIN, of_user.lock_owned()).await.ok()
    }
}

/// Where a job that is handed in gets its memory from.
#[derive(Debug)]
pub enum Entrance {
    /// There is room for it.
    Room(Room),
    /// There is none, for the reason that the failure tells. It is read all the same, one at a time of each user, to see whether
    /// it is there already: whoever did not hear the answer asks again, and may have filled the last place.
    IfThere(Failure, OwnedMutexGuard<()>),
}

impl Entrance {
    /// Takes the place of a job whose request has so many bytes.
    ///
    /// # Errors
    /// The user has as much waiting as may, and the job is too large to be read without room.
    pub async fn take(daemon: &Arc<Daemon>, uid: u32, bytes: usize) -> Result<Entrance, Failure> {
        let refusal = match Room::take(daemon, uid, bytes) {
            Ok(room) => return Ok(Entrance::Room(room)),
            Err(refusal) => refusal,
        };
        let alone = match bytes <= SMALL_BYTES_MAX {
            true => daemon.asking_again.alone(uid).await,
            false => None,
        };
        match alone {
            Some(alone) => Ok(Entrance::IfThere(refusal, alone)),
            None => Err(refusal),
        }
    }
}

/// What the jobs of each user take that are on their way in.
pub(super) type Arriving = Mutex<BTreeMap<u32, Waits>>;

/// The room of a job that is on its way in. It is given back when the job is in the queue, or refused.
#[derive(Debug)]
pub struct Room {
    daemon: Arc<Daemon>,
    uid: u32,
    bytes: usize,
}

impl Room {
    /// Takes the room for a job of so many bytes.
    ///
    /// # Errors
    /// The user has as much waiting as may.
    pub fn take(daemon: &Arc<Daemon>, uid: u32, bytes: usize) -> Result<Room, Failure> {
        let mut arriving = daemon.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = arriving.get(&uid).copied().unwrap_or_default();
        let jobs_max = daemon.config.daemon.jobs_per_user;
        let waits = {
            let queued = daemon.queued();
            let theirs = queued.values().filter(|entry| entry.handed_in.account.uid == uid);
            theirs.fold(taken, |sum, entry| Waits { jobs: sum.jobs + 1, bytes: sum.bytes + entry.bytes })
        };
        if waits.have_room_for(bytes, jobs_max) {
            arriving.insert(uid, Waits { jobs: taken.jobs + 1, bytes: taken.bytes + bytes });
            drop(arriving);
            return Ok(Room { daemon: Arc::clone(daemon), uid, bytes });
        }
        let what = format!(
            "{} jobs of uid {uid} wait, {} MiB, and this one has {} KiB: at most {jobs_max} jobs and {} MiB may",
            waits.jobs,
            waits.bytes >> 20,
            bytes.div_ceil(1 << 10),
            Waits::BYTES_MAX >> 20
        );
        let help = "hand more in when some have started; [daemon] jobs_per_user in the daemon's settings says how many";
        Err(Failure::failed("too_many_jobs", what).help(help.to_owned()))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut arriving = self.daemon.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = arriving.get_mut(&self.uid) {
            taken.jobs -= 1;
            taken.bytes -= self.bytes;
            if *taken == Waits::default() {
                arriving.remove(&self.uid);
            }
        }
    }
}
