//! What do users ask for, and what were they told?
//!
//! A client that got no answer, because the daemon died, asks again: a submit with the same key.

use std::collections::BTreeSet;

use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::queue::Waits;
use mhtrain_job::spec::JobSpec;
use mhtrain_job::stop;

use crate::bugs::Bug;
use crate::disk::{Context, StoreError, Sync};
use crate::faults::name;
use crate::invariants::Violation;
use crate::script::Script;
use crate::world::World;

/// The users, and all that they know.
#[derive(Clone, Debug, Default)]
pub(crate) struct Users {
    asks: Vec<Ask>,
    /// Jobs of the script that came.
    came: usize,
    /// The number that each job of the script was acknowledged with, the last one after retries.
    pub(crate) numbers: Vec<Option<u64>>,
    /// Submits that were acknowledged.
    pub(crate) acknowledged: Vec<Acknowledged>,
    /// Cancels that were acknowledged.
    pub(crate) cancelled: Vec<u64>,
    /// Jobs of the script whose user wanted the end.
    unwanted: BTreeSet<usize>,
    /// How often each job of the script was retried.
    retries: Vec<u32>,
}

/// What a user was told of a submit.
#[derive(Clone, Debug)]
pub(crate) struct Acknowledged {
    pub(crate) id: u64,
    pub(crate) uid: u32,
    pub(crate) key: String,
}

/// Something that somebody asks the daemon.
#[derive(Clone, Debug)]
struct Ask {
    what: What,
    /// The job of the script.
    job: usize,
    /// What the daemon of this generation wrote down and did not answer yet.
    written: Option<(u32, u64)>,
    /// The daemon that had no room for it, and how many jobs of the user waited then: it is asked again when that is otherwise.
    refused: Option<(u32, u32)>,
}

#[derive(Clone, Debug, PartialEq)]
enum What {
    Submit {
        key: String,
        retry_of: Option<u64>,
    },
    Cancel,
    /// By somebody whose job it is not.
    CancelByAnother,
}

impl Ask {
    fn new(what: What, job: usize) -> Ask {
        Ask { what, job, written: None, refused: None }
    }
}

impl Users {
    /// Lets users submit whose time has come.
    pub(crate) fn come(&mut self, script: &Script, event: u32) {
        while let Some(job) = script.jobs.get(self.came).filter(|job| job.at <= event) {
            // Who waits for another job must know its number.
            if job.after.is_some_and(|after| self.numbers.get(after).copied().flatten().is_none()) {
                return;
            }
            // Two users may choose the same key.
            let before = script.jobs[..self.came].iter().filter(|earlier| earlier.user == job.user).count();
            let what = What::Submit { key: name(before), retry_of: None };
            self.asks.push(Ask::new(what, self.came));
            self.came += 1;
            self.numbers.resize(self.came, None);
            self.retries.resize(self.came, 0);
        }
    }

    /// Returns the asks that can go on.
    pub(crate) fn asking<'w>(&'w self, world: &'w World<'_>) -> impl Iterator<Item = usize> + 'w {
        let waits = |ask: &Ask| world.waiting(Some(world.script.jobs[ask.job].uid())).jobs;
        let goes_on = move |ask: &Ask| match ask.refused {
            Some(refused) => refused != (world.generation, waits(ask)),
            None => true,
        };
        let asks = self.asks.iter().enumerate().filter(move |(_, ask)| goes_on(ask));
        asks.map(|(at, _)| at).filter(|_| world.daemon.is_some())
    }

    /// Returns whether the user of a job ever wanted its end.
    pub(crate) fn wished_to_cancel(&self, job: usize) -> bool {
        self.unwanted.contains(&job)
    }

    /// Lets the user of a job want its end.
    pub(crate) fn wish_to_cancel(&mut self, job: usize) {
        if self.numbers.get(job).copied().flatten().is_some() {
            self.unwanted.insert(job);
            self.asks.push(Ask::new(What::Cancel, job));
        }
    }

    /// Lets another user want the end of a job.
    pub(crate) fn another_wishes_to_cancel(&mut self, job: usize) {
        if self.numbers.get(job).copied().flatten().is_some() {
            self.asks.push(Ask::new(What::CancelByAnother, job));
        }
    }

    /// Lets the user of a job want it once more.
    pub(crate) fn wish_to_retry(&mut self, job: usize) {
        if let Some(number) = self.numbers.get(job).copied().flatten() {
            self.retries[job] += 1;
            let key = format!("{}-again-{number}-{}", name(job), self.retries[job]);
            let what = What::Submit { key, retry_of: Some(number) };
            self.asks.push(Ask::new(what, job));
        }
    }
}

impl World<'_> {
    /// Lets the daemon take the next step for somebody who asked.
    pub(crate) fn ask(&mut self, at: usize) {
        let mut ask = self.users.asks.remove(at);
        if ask.written.is_some_and(|(generation, _)| generation != self.generation) {
            // Whoever wrote it died: the client asks again.
            ask.written = None;
        }
        let goes_on = match (ask.what.clone(), ask.written) {
            (What::Submit { key, retry_of }, None) => self.take_in(&mut ask, &key, retry_of),
            (What::Submit { key, .. }, Some((_, id))) => self.acknowledge(ask.job, id, key),
            // As `Caller::may_touch` of mhtraind, which looks at the owner that the store has.
            (What::CancelByAnother, None) if self.bug != Some(Bug::CancelByAnybody) => {
                let user = 1 - script_user(self, ask.job);
                let owner = self.users.numbers[ask.job].map(|id| self.disk.job(id).owner_uid);
                let is_theirs = owner == Some(1000 + user);
                self.tell(|| {
                    format!("cancel by another user: {}", if is_theirs { "taken" } else { "refused" })
                });
                is_theirs && self.take_cancel(&mut ask)
            }
            (What::Cancel | What::CancelByAnother, None) => self.take_cancel(&mut ask),
            (What::Cancel | What::CancelByAnother, Some((_, id))) => self.acknowledge_cancel(id),
        };
        if goes_on {
            self.users.asks.push(ask);
        }
    }

    /// Writes a submit down. Returns whether the client still waits.
    fn take_in(&mut self, ask: &mut Ask, key: &str, retry_of: Option<u64>) -> bool {
        if retry_of.is_some_and(|id| !self.may_be_retried(id)) {
            return false;
        }
        let script = self.script;
        let job = &script.jobs[ask.job];
        let after: Vec<u64> = job.after.iter().filter_map(|after| self.users.numbers[*after]).collect();
        let spec = match JobSpec::from_value(&job.job_file(ask.job, &after)) {
            Ok(spec) => spec,
            Err(error) => {
                self.broken = Some(Violation::Nonsense { what: format!("the job file is refused: {error}") });
                return false;
            }
        };
        let record = Record::new(self.wall(), JobEvent::Submitted { spec: spec.to_json() });
        let uid = job.uid();
        if !self.has_room(uid) {
            self.tell(|| format!("submit {key}: refused, too many jobs of user {uid} wait"));
            ask.refused = Some((self.generation, self.waiting(Some(uid)).jobs));
            return true;
        }
        ask.refused = None;
        let context = Context { script: ask.job, retry_of };
        let sync = if self.bug == Some(Bug::LostAck) { Sync::Later } else { Sync::Now };
        let whose = (self.bug != Some(Bug::KeyOfAnybody)).then_some(uid);
        match self.disk.submit(uid, whose, key, &spec, &record, context, sync) {
            Ok((id, existed)) => {
                self.tell(|| {
                    format!("submit {key}: job {id} is written down{}", if existed { " already" } else { "" })
                });
                ask.written = Some((self.generation, id));
                if !existed {
                    self.came_beside(uid);
                }
                if existed {
                    return self.acknowledge(ask.job, id, key.to_owned());
                }
                true
            }
            Err(StoreError::Full) => true,
            Err(error) => {
                self.broken = Some(Violation::Illegal { job: 0, event: "submitted", why: error.to_string() });
                false
            }
        }
    }

    /// Returns whether another job of a user may come, as `Room::take` of mhtraind does.
    fn has_room(&mut self, uid: u32) -> bool {
        let max = self.script.jobs_per_user;
        let (theirs, all) = (self.waiting(Some(uid)), self.waiting(None));
        let has_room = match self.bug {
            Some(Bug::NoLimitPerUser) => true,
            Some(Bug::LimitOfAllUsers) => all.have_room_for(0, max),
            _ => theirs.have_room_for(0, max),
        };
        if !has_room && theirs.jobs < max && self.broken.is_none() {
            self.broken = Some(Violation::RefusedWithRoom { uid, jobs: theirs.jobs });
        }
        has_room
    }

    /// Looks whether a job that just came was one too many.
    fn came_beside(&mut self, uid: u32) {
        let before = self.waiting(Some(uid)).jobs;
        if before >= self.script.jobs_per_user && self.broken.is_none() {
            self.broken = Some(Violation::TooManyOfAUser { uid, jobs: before + 1 });
        }
    }

    /// Returns what waits of a user's, or everybody's, jobs: in the queue, or on its way there.
    fn waiting(&self, uid: Option<u32>) -> Waits {
        let is_theirs = |id: u64| uid.is_none_or(|uid| self.disk.job(id).owner_uid == uid);
        let queued = self.daemon.iter().flat_map(|daemon| daemon.queued.keys()).copied();
        let queued: BTreeSet<u64> = queued.filter(|id| is_theirs(*id)).collect();
        let arriving = self.users.asks.iter().filter_map(|ask| match (&ask.what, ask.written) {
            (What::Submit { .. }, Some((generation, id))) if generation == self.generation => Some(id),
            _ => None,
        });
        let arriving = arriving.filter(|id| is_theirs(*id) && !queued.contains(id)).count();
        Waits { jobs: u32::try_from(queued.len() + arriving).unwrap_or(u32::MAX), bytes: 0 }
    }

    fn may_be_retried(&self, id: u64) -> bool {
        self.disk.find(id).is_some_and(|job| matches!(job.state.name(), "failed" | "cancelled"))
    }

    fn acknowledge(&mut self, job: usize, id: u64, key: String) -> bool {
        self.tell(|| format!("submit {key}: acknowledged as job {id}"));
        self.users.numbers[job] = Some(id);
        let uid = self.script.jobs[job].uid();
        self.users.acknowledged.push(Acknowledged { id, uid, key });
        if let Some(daemon) = &mut self.daemon
            && !daemon.live.contains_key(&id)
            && self.disk.find(id).is_some_and(|job| !job.state.is_final())
        {
            daemon.queued.entry(id).or_default();
        }
        false
    }

    /// Writes a cancel down, as `Daemon::cancel` does. Returns whether the client still waits.
    fn take_cancel(&mut self, ask: &mut Ask) -> bool {
        let (Some(id), Some(daemon)) = (self.users.numbers[ask.job], &self.daemon) else { return false };
        let by = stop::CANCEL.to_owned();
        // A job that leaves its card is in both for a moment.
        let event = if daemon.queued.contains_key(&id) {
            stop::end(stop::CANCEL, None)
        } else if daemon.live.contains_key(&id) {
            JobEvent::StopRequested { by }
        } else {
            return false;
        };
        if self.bug == Some(Bug::ForgottenCancel) {
            ask.written = Some((self.generation, id));
            return true;
        }
        match self.append(id, event) {
            Ok(()) => {
                ask.written = Some((self.generation, id));
                true
            }
            // It is over, or it cannot be written: the client is told so.
            Err(_) => false,
        }
    }

    fn acknowledge_cancel(&mut self, id: u64) -> bool {
        let shown = self.shown(id);
        self.tell(|| format!("cancel of {shown}: acknowledged"));
        self.users.cancelled.push(id);
        if let Some(daemon) = &mut self.daemon {
            if let Some(job) = daemon.live.get_mut(&id) {
                job.asked_to_stop = true;
            }
            let has_left_its_card = daemon.queued.contains_key(&id);
            let is_over = self.disk.find(id).is_none_or(|job| job.state.is_final());
            if has_left_its_card && !is_over {
                // One that cannot be ended now is ended when its turn comes.
                let _told_when_it_is_started = self.append(id, stop::end(stop::CANCEL, None));
            }
        }
        if self.disk.find(id).is_none_or(|job| job.state.is_final())
            && let Some(daemon) = &mut self.daemon
        {
            daemon.queued.remove(&id);
        }
        false
    }
}

fn script_user(world: &World<'_>, job: usize) -> u32 {
    u32::try_from(world.script.jobs[job].user).unwrap_or(0)
}
