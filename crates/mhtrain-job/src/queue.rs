//! Which jobs start now, on which device, and why do the others wait?
//!
//! One queue for each device, in order of priority and then of submission. A job that names a device stands in that
//! device's queue. A job that takes any stands in the queue of the device where it would get the best rung. The first
//! in a queue is never overtaken on its device: else small jobs would keep a large one waiting for ever.

use std::borrow::Borrow;
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};

use mhtrain_sizing::plan::Plan;
use mhtrain_sizing::tier::Profile;
use mhtrain_sizing::units::Bytes;

/// Foreign memory below which a device counts as idle: a display, a monitoring agent, a context that is just gone.
const IDLE_BELOW: Bytes = Bytes::from_mib(1024);

/// A job that is not started yet.
#[derive(Clone, Debug, PartialEq)]
pub struct QueuedJob {
    /// Its id: a smaller one was submitted earlier.
    pub id: u64,
    /// Higher goes first.
    pub priority: i32,
    /// Where everything of it goes.
    pub output_dir: String,
    /// Jobs that must have succeeded before.
    pub after: Vec<Dependency>,
    /// What each device that it may take offers.
    pub offers: Vec<Offer>,
}

/// A job that another one waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// Its id.
    pub id: u64,
    /// Where it stands.
    pub state: DependencyState,
}

/// Where a job stands that another one waits for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum DependencyState {
    /// It succeeded.
    Succeeded,
    /// It is not over.
    Pending,
    /// It failed, was cancelled or is not known: it will never have succeeded.
    Never,
}

/// What one device offers a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// UUID of the device.
    pub device: String,
    /// The device for people: `GPU 6`.
    pub name: String,
    /// How the job fits there.
    pub fit: Fit,
}

/// How a job fits on a device.
#[derive(Clone, Debug, PartialEq)]
pub enum Fit {
    /// It can start now.
    Now(Rank),
    /// It fits when others give memory back.
    Later {
        /// What it would get on the idle device.
        rank: Rank,
        /// What it needs at least.
        need: Bytes,
        /// What is free.
        free: Bytes,
        /// Who holds the rest, for people; empty where nobody is known.
        holders: String,
    },
    /// It does not fit on the idle device either.
    Never {
        /// Why, with the numbers.
        why: String,
        /// What the user can do.
        help: Option<String>,
    },
    /// The device cannot be used at the moment.
    Unusable {
        /// Why.
        why: String,
    },
}

/// How good a place is for a job. A greater one is better.
#[derive(Copy, Clone, Debug)]
pub struct Rank {
    /// Whether the prediction says that it fits.
    fits: bool,
    /// What would be trained.
    profile: Profile,
    /// Time of a trained token (`Rung::relative_time`).
    time: f64,
    /// Ties go to the device with the most free memory.
    free: Bytes,
}

impl Rank {
    /// Returns the rank of what a plan has chosen on a device with so much free memory.
    pub fn of(plan: &Plan, free: Bytes) -> Rank {
        let rung = plan.chosen_rung();
        Rank { fits: rung.fits, profile: rung.tier.name, time: rung.relative_time, free }
    }
}

impl Ord for Rank {
    fn cmp(&self, other: &Rank) -> Ordering {
        let better = self.fits.cmp(&other.fits).then(other.profile.cmp(&self.profile));
        better.then(other.time.total_cmp(&self.time)).then(self.free.cmp(&other.free))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Rank) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Rank {
    fn eq(&self, other: &Rank) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Rank {}

/// What the jobs of one user take that wait for a device, or are on their way in.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// How many.
    pub jobs: u32,
    /// Their bytes.
    pub bytes: usize,
}

impl Waits {
    /// Most bytes of the jobs of one user.
    pub const BYTES_MAX: usize = 256 << 20;

    /// Returns whether another one of so many bytes may come, where `jobs_max` may wait.
    #[must_use]
    pub fn have_room_for(self, bytes: usize, jobs_max: u32) -> bool {
        self.jobs < jobs_max && self.bytes.saturating_add(bytes) <= Waits::BYTES_MAX
    }
}

/// What a device has to give.
#[derive(Clone, Debug, PartialEq)]
pub struct Room {
    /// Memory that can be used when nobody else is there.
    pub total: Bytes,
    /// What is free now.
    pub free: Bytes,
    /// What processes that are not ours hold.
    pub held_by_others: Bytes,
    /// Who they are, for people.
    pub holders: String,
}

/// Why a job cannot be sized for a device.
#[derive(Clone, Debug, PartialEq)]
pub struct TooSmall {
    /// Why, with the numbers.
    pub why: String,
    /// What the user can do.
    pub help: Option<String>,
}

/// Returns how a job fits on a device now, and the plan with which it would start. `size` plans it for a device that has
/// so much free, and of which others hold so much.
///
/// What fits is taken even when an idle device would give a faster rung. The emergency profile is tried against the
/// prediction only on a device that is idle: elsewhere waiting helps.
///
/// # Errors
/// What keeps `size` from answering at all.
pub fn fit<P: Borrow<Plan>, E>(
    room: &Room,
    mut size: impl FnMut(Bytes, Bytes) -> Result<Result<P, TooSmall>, E>,
) -> Result<(Fit, Option<P>), E> {
    let is_idle = room.held_by_others < IDLE_BELOW;
    if let Ok(plan) = size(room.free, room.held_by_others)?
        && (plan.borrow().chosen_rung().fits || is_idle)
    {
        return Ok((Fit::Now(Rank::of(plan.borrow(), room.free)), Some(plan)));
    }
    let best = match size(room.total, Bytes::ZERO)? {
        Ok(plan) => plan,
        Err(TooSmall { why, help }) => return Ok((Fit::Never { why, help }, None)),
    };
    let best: &Plan = best.borrow();
    let fitting = best.rungs.iter().filter(|rung| rung.fits && rung.tier.name != Profile::Emergency);
    let need = fitting.map(|rung| rung.admission_bytes).min().unwrap_or(best.chosen_rung().admission_bytes);
    let rank = Rank::of(best, room.total);
    Ok((Fit::Later { rank, need, free: room.free, holders: room.holders.clone() }, None))
}

/// What jobs of ours have: each thing with the id of its job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    /// Devices, by UUID.
    pub devices: BTreeMap<String, u64>,
    /// Output directories.
    pub output_dirs: BTreeMap<String, u64>,
}

/// What becomes of a queued job now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It starts on this device.
    Start {
        /// UUID of the device.
        device: String,
    },
    /// It waits.
    Wait {
        /// For what, with the numbers.
        reason: String,
    },
    /// It can never start.
    Fail {
        /// Why, with the numbers.
        reason: String,
        /// What the user can do.
        help: Option<String>,
    },
}

/// Why nothing starts while a daemon is drained.
pub const DRAINED: &str = "the daemon is drained: nothing starts until `mhtraind undrain`";

/// Returns what becomes of every queued job, best placed first. `drained`: nothing may start.
pub fn decide<'a>(
    queue: impl IntoIterator<Item = &'a QueuedJob>,
    leases: &Leases,
    drained: bool,
) -> Vec<(u64, Verdict)> {
    let mut order: Vec<&QueuedJob> = queue.into_iter().collect();
    order.sort_by_key(|job| place_in_line(job));
    let mut places = Places::new(leases.clone(), drained);
    order.into_iter().map(|job| (job.id, places.verdict(job))).collect()
}

/// Returns what jobs are sorted by: a smaller one is asked first.
pub fn place_in_line(job: &QueuedJob) -> (Reverse<i32>, u64) {
    (Reverse(job.priority), job.id)
}

/// Places while a queue is looked through, job by job in their order.
#[derive(Clone, Debug)]
pub struct Places {
    /// Who has a device or a directory.
    taken: Leases,
    /// Who is first in line for a device, and so is not overtaken there.
    first_in_line: BTreeMap<String, u64>,
    /// Whether nothing may start.
    drained: bool,
}

impl Places {
    /// Returns the places beside what jobs have already.
    pub fn new(taken: Leases, drained: bool) -> Places {
        Places { taken, first_in_line: BTreeMap::new(), drained }
    }

    /// Returns whether a job that comes next may still start, when these are all the devices.
    pub fn are_left<'a>(&self, devices: impl IntoIterator<Item = &'a str>) -> bool {
        !self.drained && devices.into_iter().any(|device| self.is_free(device))
    }

    /// Returns the device on which the next job starts; `None` when it waits or fails, for a reason that
    /// [`Places::verdict`] finds: that takes much longer.
    pub fn start(&mut self, job: &QueuedJob) -> Option<String> {
        if self.held_up(job).is_some() {
            return None;
        }
        let device = self.take(job);
        if device.is_none() {
            self.stand_in_line(job);
        }
        device
    }

    /// Returns what becomes of the next job.
    pub fn verdict(&mut self, job: &QueuedJob) -> Verdict {
        if let Some(verdict) = self.held_up(job) {
            return verdict;
        }
        if let Some(device) = self.take(job) {
            return Verdict::Start { device };
        }
        let reason = why_not(job, self);
        self.stand_in_line(job);
        Verdict::Wait { reason }
    }

    /// Returns the verdict on a job that cannot start whatever is free.
    fn held_up(&self, job: &QueuedJob) -> Option<Verdict> {
        if let Some(lost) = job.after.iter().find(|other| other.state == DependencyState::Never) {
            return Some(Verdict::Fail {
                reason: format!("job {}, which must succeed before it, did not", lost.id),
                help: Some(format!("see `mhtraind explain {}`, then submit this job again", lost.id)),
            });
        }
        if let Some(failed) = never_fits(job) {
            return Some(failed);
        }
        let pending: BTreeSet<u64> = job
            .after
            .iter()
            .filter(|other| other.state == DependencyState::Pending)
            .map(|other| other.id)
            .collect();
        if !pending.is_empty() {
            let reason = format!("waits for job {} to succeed", join(pending.iter()));
            return Some(Verdict::Wait { reason });
        }
        if self.drained {
            return Some(Verdict::Wait { reason: DRAINED.to_owned() });
        }
        let other = self.taken.output_dirs.get(&job.output_dir)?;
        Some(Verdict::Wait { reason: format!("job {other} works in the same output_dir") })
    }

    /// Returns whether a job that comes next could have this device.
    pub fn is_free(&self, device: &str) -> bool {
        !self.taken.devices.contains_key(device) && !self.first_in_line.contains_key(device)
    }

    /// Gives a job the best device that it can start on now.
    fn take(&mut self, job: &QueuedJob) -> Option<String> {
        let free = job.offers.iter().filter(|offer| self.is_free(&offer.device));
        let now = free.filter_map(|offer| match &offer.fit {
            Fit::Now(rank) => Some((*rank, offer)),
            Fit::Later { .. } | Fit::Never { .. } | Fit::Unusable { .. } => None,
        });
        let (_, offer) = now.max_by_key(|(rank, _)| *rank)?;
        self.taken.devices.insert(offer.device.clone(), job.id);
        self.taken.output_dirs.insert(job.output_dir.clone(), job.id);
        Some(offer.device.clone())
    }

    /// Puts a job into the line for the device where it would get the best rung.
    fn stand_in_line(&mut self, job: &QueuedJob) {
        let line = job.offers.iter().filter_map(|offer| match &offer.fit {
            Fit::Now(rank) | Fit::Later { rank, .. } => Some((*rank, &offer.device)),
            Fit::Never { .. } | Fit::Unusable { .. } => None,
        });
        if let Some((_, device)) = line.max_by_key(|(rank, _)| *rank) {
            self.first_in_line.entry(device.clone()).or_insert(job.id);
        }
    }
}

/// Returns the failure of a job that fits on none of its devices, however idle they are.
fn never_fits(job: &QueuedJob) -> Option<Verdict> {
    let never = job.offers.iter().filter_map(|offer| match &offer.fit {
        Fit::Never { why, help } => Some((offer, why, help)),
        Fit::Now(_) | Fit::Later { .. } | Fit::Unusable { .. } => None,
    });
    let never: Vec<_> = never.collect();
    if never.len() < job.offers.len() {
        return None;
    }
    let (offer, why, help) = never.first()?;
    Some(Verdict::Fail {
        reason: format!("it can never fit on {}: {why}", offer.name),
        help: (*help).clone(),
    })
}

/// Returns why a job does not start, device for device.
fn why_not(job: &QueuedJob, places: &Places) -> String {
    if job.offers.is_empty() {
        return "no GPU can be used now".to_owned();
    }
    let reasons = job.offers.iter().map(|offer| {
        let name = &offer.name;
        if let Some(other) = places.taken.devices.get(&offer.device) {
            return format!("{name} runs job {other}");
        }
        match &offer.fit {
            Fit::Unusable { why } => why.clone(),
            Fit::Never { why, .. } => format!("{name} is too small: {why}"),
            Fit::Now(_) => match places.first_in_line.get(&offer.device) {
                Some(other) => format!("job {other} is first in line for {name}"),
                None => format!("{name} is not free"),
            },
            Fit::Later { need, free, holders, .. } => {
                let holders = if holders.is_empty() { String::new() } else { format!(", held by {holders}") };
                format!("needs {need} on one GPU; {name} has {free} free{holders}")
            }
        }
    });
    join(reasons)
}

fn join(items: impl Iterator<Item = impl ToString>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(micro_batch: u32, free: u64) -> Rank {
        let (profile, time) = (Profile::Standard, 1.0 + 1.0 / f64::from(micro_batch));
        Rank { fits: true, profile, time, free: Bytes::from_gib(free) }
    }

    fn now(device: &str, micro_batch: u32, free: u64) -> Offer {
        Offer {
            device: device.to_owned(),
            name: format!("GPU {device}"),
            fit: Fit::Now(rank(micro_batch, free)),
        }
    }

    fn later(device: &str) -> Offer {
        let fit = Fit::Later {
            rank: rank(8, 80),
            need: Bytes::from_gib(62),
            free: Bytes::from_gib(40),
            holders: "pid 4121 of alice".to_owned(),
        };
        Offer { device: device.to_owned(), name: format!("GPU {device}"), fit }
    }

    fn job(id: u64, offers: Vec<Offer>) -> QueuedJob {
        QueuedJob { id, priority: 0, output_dir: format!("out-{id}"), after: Vec::new(), offers }
    }

    fn lease(id: u64) -> Leases {
        Leases { devices: BTreeMap::from([("0".to_owned(), id)]), ..Leases::default() }
    }

    fn started(verdicts: &[(u64, Verdict)]) -> Vec<(u64, String)> {
        let start = |(id, verdict): &(u64, Verdict)| match verdict {
            Verdict::Start { device } => Some((*id, device.clone())),
            Verdict::Wait { .. } | Verdict::Fail { .. } => None,
        };
        verdicts.iter().filter_map(start).collect()
    }

    fn reason(verdicts: &[(u64, Verdict)], wanted: u64) -> String {
        let (_, verdict) = verdicts.iter().find(|(id, _)| *id == wanted).unwrap();
        match verdict {
            Verdict::Wait { reason } | Verdict::Fail { reason, .. } => reason.clone(),
            Verdict::Start { device } => panic!("job {wanted} starts on {device}"),
        }
    }

    #[test]
    fn one_job_a_device_in_order_of_priority_and_submission() {
        let mut urgent = job(9, vec![now("0", 8, 80)]);
        urgent.priority = 1;
        let queue = [job(3, vec![now("0", 8, 80)]), urgent, job(2, vec![now("0", 8, 80)])];
        let verdicts = decide(&queue, &Leases::default(), false);
        assert_eq!(started(&verdicts), [(9, "0".to_owned())]);
        assert_eq!(reason(&verdicts, 2), "GPU 0 runs job 9");
        let leased = lease(1);
        assert_eq!(started(&decide(&queue, &leased, false)), []);
    }

    #[test]
    fn auto_takes_the_best_rung_then_the_most_free() {
        let offers = vec![now("0", 4, 80), now("1", 8, 30), now("2", 8, 60)];
        assert_eq!(
            started(&decide(&[job(1, offers.clone())], &Leases::default(), false)),
            [(1, "2".to_owned())]
        );
        let queue = [job(1, offers.clone()), job(2, offers.clone()), job(3, offers)];
        let places: Vec<_> = started(&decide(&queue, &Leases::default(), false));
        assert_eq!(places, [(1, "2".to_owned()), (2, "1".to_owned()), (3, "0".to_owned())]);
    }

    #[test]
    fn who_waits_for_memory_is_told_the_numbers_and_is_not_overtaken_there() {
        let queue = [job(1, vec![later("0")]), job(2, vec![now("0", 8, 40)]), job(3, vec![now("1", 8, 40)])];
        let verdicts = decide(&queue, &Leases::default(), false);
        assert_eq!(started(&verdicts), [(3, "1".to_owned())]);
        let told = reason(&verdicts, 1);
        assert_eq!(told, "needs 62.00 GiB on one GPU; GPU 0 has 40.00 GiB free, held by pid 4121 of alice");
        assert_eq!(reason(&verdicts, 2), "job 1 is first in line for GPU 0");
    }

    #[test]
    fn what_never_fits_fails_at_once_even_when_drained_or_all_is_leased() {
        let fit = Fit::Never { why: "needs 90 GiB, the card has 80".to_owned(), help: None };
        let never = Offer { device: "0".to_owned(), name: "GPU 0".to_owned(), fit };
        let leased = lease(7);
        let verdicts = decide(&[job(1, vec![never.clone()]), job(2, vec![never, later("1")])], &leased, true);
        assert!(matches!(verdicts[0].1, Verdict::Fail { .. }));
        assert!(matches!(verdicts[1].1, Verdict::Wait { .. }));
    }

    #[test]
    fn dependencies_wait_and_a_lost_one_fails_the_job() {
        let after = |state| {
            let mut job = job(2, vec![now("0", 8, 80)]);
            job.after = vec![Dependency { id: 1, state }];
            decide(&[job], &Leases::default(), false)
        };
        assert_eq!(reason(&after(DependencyState::Pending), 2), "waits for job 1 to succeed");
        assert!(matches!(after(DependencyState::Never)[0].1, Verdict::Fail { .. }));
        assert_eq!(started(&after(DependencyState::Succeeded)).len(), 1);
    }

    #[test]
    fn one_job_an_output_directory() {
        let mut second = job(2, vec![now("1", 8, 80)]);
        second.output_dir = "out-1".to_owned();
        let verdicts = decide(&[job(1, vec![now("0", 8, 80)]), second], &Leases::default(), false);
        assert_eq!(started(&verdicts), [(1, "0".to_owned())]);
        assert_eq!(reason(&verdicts, 2), "job 1 works in the same output_dir");
    }

    #[test]
    fn a_drained_daemon_starts_nothing() {
        assert_eq!(started(&decide(&[job(1, vec![now("0", 8, 80)])], &Leases::default(), true)), []);
    }

    mod laws {
        use super::*;
        use proptest::prelude::*;

        fn offers() -> impl Strategy<Value = Vec<Offer>> {
            let offer = (0..4u8, 0..3u8, 1..9u32, 1..90u64).prop_map(|(device, kind, batch, free)| {
                let device = device.to_string();
                match kind {
                    0 => now(&device, batch, free),
                    1 => later(&device),
                    _ => Offer {
                        name: format!("GPU {device}"),
                        device,
                        fit: Fit::Never { why: "too large".to_owned(), help: None },
                    },
                }
            });
            proptest::collection::vec(offer, 0..4)
        }

        proptest! {
            #[test]
            fn no_device_is_given_twice_and_none_that_is_leased(
                all in proptest::collection::vec((offers(), -1..2i32), 0..8),
                lease in proptest::option::of(0..4u8),
            ) {
                let queue: Vec<_> = (1..).zip(all).map(|(id, (offers, priority))| QueuedJob {
                    priority, ..job(id, offers)
                }).collect();
                let devices = lease.map(|device| (device.to_string(), 99)).into_iter().collect();
                let leased = Leases { devices, ..Leases::default() };
                let verdicts = decide(&queue, &leased, false);
                prop_assert_eq!(verdicts.len(), queue.len());
                let mut given = BTreeSet::new();
                for (_, device) in started(&verdicts) {
                    prop_assert!(!leased.devices.contains_key(&device));
                    prop_assert!(given.insert(device));
                }
                // The short way starts the same jobs, and stops where nothing can follow.
                let mut order: Vec<_> = queue.iter().collect();
                order.sort_by_key(|job| place_in_line(job));
                let (mut places, mut short) = (Places::new(leased, false), Vec::new());
                for job in order {
                    if !places.are_left(["0", "1", "2", "3"]) {
                        break;
                    }
                    short.extend(places.start(job).map(|device| (job.id, device)));
                }
                prop_assert_eq!(short, started(&verdicts));
            }
        }
    }
}
