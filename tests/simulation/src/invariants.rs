//! What must hold after every event, whatever happened?
//!
//! What really happened is known here and to nobody in the simulated daemon: which trainers live, what each of them
//! trained, of what it died. The numbers are those of the invariants in `docs/reliability.md`.

use std::collections::{BTreeMap, BTreeSet};

use mhtrain_job::diagnosis::{Answer, Kind};
use mhtrain_job::event::{AttemptStart, JobEvent, Record, Resume, ResumeKind};
use mhtrain_job::receipt::Receipt;
use mhtrain_job::rerun::Rerun;
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_job::take_over::last_start;
use mhtrain_sizing::known::ObservationOf;
use mhtrain_sizing::observation::{Observation, Seen};
use mhtrain_sizing::tier::Profile;
use mhtrain_sizing::units::Bytes;
use serde_json::Value;

use crate::attempts::{RECORD_REFUSED, REFUSED_MAX};
use crate::daemon::Sized;
use crate::disk::{AttemptId, Checkpoint, Lineage, StoredJob, path};
use crate::sizing::{card_name, policy};
use crate::users::Acknowledged;
use crate::world::World;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "each field is what its message calls it")]
pub enum Violation {
    #[error("(1) attempt {attempt} of job {job} has the effective batch {found}, and {least} is the least")]
    BatchTooSmall { job: u64, attempt: u32, found: u64, least: u64 },
    #[error(
        "(1) attempt {attempt} of job {job} has the effective batch {found}, the first attempt had {first}"
    )]
    BatchChanged { job: u64, attempt: u32, found: u64, first: u64 },
    #[error("(2) job {job} goes down the ladder, and its trainer did not run out of device memory")]
    LowerTierWithoutOom { job: u64 },
    #[error("(2) job {job} goes from rung {from} to rung {to}, which is not later or needs more")]
    NoLowerTier { job: u64, from: usize, to: usize },
    #[error("(2) job {job} is to stay on rung {from} and goes to rung {to}")]
    OtherRung { job: u64, from: usize, to: usize },
    #[error("(3) job {job} starts attempt {attempt}, and {most} are the most")]
    TooManyAttempts { job: u64, attempt: u32, most: usize },
    #[error("(4) job {job}, acknowledged under the key {key}, is lost")]
    Lost { job: u64, key: String },
    #[error("(4) the key {key} names two jobs")]
    Twice { key: String },
    #[error("(4) job {job} was {was}, and is {is}")]
    Undone { job: u64, was: &'static str, is: &'static str },
    #[error("(4) the acknowledged cancel of job {job} is forgotten")]
    CancelForgotten { job: u64 },
    #[error("(4) job {job} is cancelled, and nobody asked for it")]
    CancelledByNobody { job: u64 },
    #[error("(4) job {job} read again from the disk is not what it was")]
    StoreDiffers { job: u64 },
    #[error("(4) job {job} cannot take the event {event}: {why}")]
    Illegal { job: u64, event: &'static str, why: String },
    #[error("(4) job {job} fails for a reason that is not its own: {why}")]
    FailedByAccident { job: u64, why: String },
    #[error("(4) jobs {jobs:?} are not over by themselves")]
    NotOver { jobs: Vec<u64> },
    #[error("(5) two trainers of job {job} live")]
    TwoTrainers { job: u64 },
    #[error("(5) a trainer of attempt {attempt} of job {job} lives, and the store says: {state}")]
    UnknownTrainer { job: u64, attempt: u32, state: String },
    #[error("(6) two jobs of ours are on GPU {card}")]
    TwoJobs { card: usize },
    #[error("(6) job {job} was promised more than GPU {card} has")]
    PromisedTooMuch { job: u64, card: usize },
    #[error("(7) attempt {attempt} of job {job} has {what}, which the job does not allow")]
    NotAllowed { job: u64, attempt: u32, what: &'static str },
    #[error("(7) the receipt of job {job} does not have the attempts that were made")]
    ReceiptDiffers { job: u64 },
    #[error("(9) job {job} is called a success: {why}")]
    NoSuccess { job: u64, why: String },
    #[error("(10) attempt {attempt} of job {job} does not have the pinned {what}")]
    PinOverridden { job: u64, attempt: u32, what: &'static str },
    #[error("attempt {attempt} of job {job} is called exact, and is not: {why}")]
    NotExact { job: u64, attempt: u32, why: &'static str },
    #[error(
        "attempt {attempt} of job {job} goes on from step {step}, whose checkpoint an attempt before could not read"
    )]
    UnreadableAgain { job: u64, attempt: u32, step: u64 },
    #[error(
        "attempt {attempt} of job {job} goes on from step {step}, whose loss was no number, and that is known"
    )]
    SpoiltAgain { job: u64, attempt: u32, step: u64 },
    #[error("attempt {attempt} of job {job} begins again, and step {saved} is saved and good")]
    WorkLost { job: u64, attempt: u32, saved: u64 },
    #[error(
        "(3) job {job} is given up for an interruption, and attempt {attempt} had come further than all before it"
    )]
    GivenUpAmidProgress { job: u64, attempt: u32 },
    #[error(
        "(3) attempt {attempt} of job {job} was the 6th in a row that was interrupted and came no further, and there is to be another"
    )]
    InterruptedForEver { job: u64, attempt: u32 },
    #[error("job {job} is stopped by its time limit {early} s too early")]
    TimeLimitEarly { job: u64, early: u64 },
    #[error("the time of job {job} is over, and its trainer went on for {steps} steps")]
    TimeLimitIgnored { job: u64, steps: u32 },
    #[error("attempt {attempt} of job {job} begins, and the time of the job is over")]
    BeganAfterItsTime { job: u64, attempt: u32 },
    #[error("job {job} waits for a card, and its time is over")]
    WaitsAfterItsTime { job: u64 },
    #[error("a submit of user {uid} is refused, and only {jobs} of theirs wait")]
    RefusedWithRoom { uid: u32, jobs: u32 },
    #[error("{jobs} jobs of user {uid} wait")]
    TooManyOfAUser { uid: u32, jobs: u32 },
    #[error("(4) a submit of user {uid} was answered with job {job}, which is another user's")]
    OthersJob { job: u64, uid: u32 },
    #[error("job {job} is sized by what job {of} showed, which is another user's")]
    LearnedFromOthers { job: u64, of: u64 },
    #[error("attempt {attempt} of job {job} is said to have shown {what}, and did not")]
    NotShown { job: u64, attempt: u32, what: &'static str },
    #[error("attempt {attempt} of job {job} is learned from twice")]
    LearnedTwice { job: u64, attempt: u32 },
    #[error("something is left when everything is over: {what}")]
    LeftOver { what: String },
    #[error("the simulation itself is wrong: {what}")]
    Nonsense { what: String },
}

/// Steps that a trainer makes at most after the time of its job, while a daemon is there: one that could not go on with the job
/// looks again after five seconds.
const LATE_STEPS_MAX: u32 = 6;

/// What really happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Truth {
    pub(crate) attempts: BTreeMap<AttemptId, AttemptTruth>,
    /// Jobs that were seen to be over, and how.
    over: BTreeMap<u64, &'static str>,
    /// Jobs with a time limit that began.
    times: BTreeMap<u64, Time>,
    pub(crate) observations: u32,
    pub(crate) plans_moved: u32,
}

/// The time of a job.
#[derive(Copy, Clone, Debug)]
struct Time {
    /// When it is over.
    until: u64,
    /// Whether the clock was set since it began: nobody can know any more.
    clock_was_set: bool,
    /// Steps after that, while a daemon was there that could have ended it.
    late_steps: u32,
}

/// What really happened to one attempt.
#[derive(Clone, Debug, Default)]
pub(crate) struct AttemptTruth {
    began: bool,
    /// GiB that were needed and not there.
    ran_out: Option<u64>,
    /// The most GiB that it held.
    held: u64,
    finished: Option<(u64, Lineage)>,
    /// The last step that it made.
    reached: u64,
    hangs_since: Option<u64>,
}

impl Truth {
    fn of(&mut self, id: AttemptId) -> &mut AttemptTruth {
        self.attempts.entry(id).or_default()
    }

    pub(crate) fn began(&mut self, id: AttemptId) {
        self.of(id).began = true;
    }

    pub(crate) fn ran_out(&mut self, id: AttemptId, needed: u64) {
        self.of(id).ran_out = Some(needed);
    }

    pub(crate) fn held(&mut self, id: AttemptId, gib: u64) {
        self.of(id).held = gib;
    }

    pub(crate) fn clock_was_set(&mut self) {
        self.times.values_mut().for_each(|time| time.clock_was_set = true);
    }

    /// Returns whether the time of a job is over.
    pub(crate) fn is_late(&self, job: u64, now: u64) -> bool {
        self.times.get(&job).is_some_and(|time| time.until <= now)
    }

    /// Returns how many steps the trainer of a job made after its time.
    pub(crate) fn late_steps(&self, job: u64) -> u32 {
        self.times.get(&job).map_or(0, |time| time.late_steps)
    }

    pub(crate) fn finished(&mut self, id: AttemptId, steps: u64, lineage: Lineage) {
        self.of(id).finished = Some((steps, lineage));
    }

    pub(crate) fn reached(&mut self, id: AttemptId, step: u64) {
        self.of(id).reached = step;
    }

    pub(crate) fn hung(&mut self, id: AttemptId, now: u64) {
        self.of(id).hangs_since = Some(now);
    }

    pub(crate) fn hangs_since(&self, id: AttemptId) -> Option<u64> {
        self.attempts.get(&id)?.hangs_since
    }
}

/// Returns whether a job that starts is promised no more than the card has: it fits, or nobody else is there and the plan
/// is a last resort.
pub(crate) fn is_promised_only_what_is_there(total: u64, used: u64, sized: &Sized) -> bool {
    let rung = sized.plan.chosen_rung();
    let free = Bytes::from_gib(total.saturating_sub(used));
    let fits = rung.fits && rung.admission_bytes <= free;
    // Where nothing fits, one rung is tried all the same: the emergency profile, or the one that needs least by what runs of the
    // model showed (`mhtrain_sizing::plan`, `last_resort`).
    let nothing_fits = sized.plan.rungs.iter().all(|rung| !rung.fits);
    fits || (used == 0 && nothing_fits)
}

/// Looks at an event that was just written down.
pub(crate) fn event(world: &World<'_>, id: u64, event: &JobEvent) -> Result<(), Violation> {
    let job = world.disk.job(id);
    let before = &job.records[..job.records.len().saturating_sub(1)];
    match event {
        JobEvent::AttemptStarting(start) => {
            is_in_time(world, id, start)?;
            is_as_promised(world, id, job, before, start)?;
            begins_where_it_should(world, id, before, start)
        }
        JobEvent::RerunDecided(rerun) => {
            keeps_the_ladder(world, id, before, rerun)?;
            is_interrupted_within_bounds(world, id, before, rerun)
        }
        JobEvent::AttemptEnded { .. } => nobody_lives(world, id, job),
        JobEvent::Failed { reason, .. } => {
            nobody_lives(world, id, job)?;
            if reason == RECORD_REFUSED {
                return is_refused_too_often(id, job, reason);
            }
            if reason.contains("time limit") {
                return is_late(world, id);
            }
            is_not_amid_progress(world, id, before)
        }
        JobEvent::StopRequested { by } if by == stop::TIME_LIMIT => is_late(world, id),
        JobEvent::StopRequested { .. } => match world.users.wished_to_cancel(job.context.script) {
            true => Ok(()),
            false => Err(Violation::CancelledByNobody { job: id }),
        },
        JobEvent::Cancelled { .. } => {
            if !world.users.wished_to_cancel(job.context.script) {
                return Err(Violation::CancelledByNobody { job: id });
            }
            nobody_lives(world, id, job)
        }
        JobEvent::Succeeded { proof } => {
            nobody_lives(world, id, job)?;
            is_a_success(world, id, job, before, proof)
        }
        JobEvent::Submitted { .. }
        | JobEvent::Planned { .. }
        | JobEvent::Waiting { .. }
        | JobEvent::Started { .. }
        | JobEvent::Warned { .. } => Ok(()),
    }
}

/// Looks at the whole world.
pub(crate) fn always(world: &mut World<'_>) -> Result<(), Violation> {
    let mut jobs = BTreeSet::new();
    let mut cards = BTreeSet::new();
    for (id, trainer) in &world.trainers {
        let (job, attempt) = *id;
        if !jobs.insert(job) {
            return Err(Violation::TwoTrainers { job });
        }
        if !cards.insert(trainer.card) {
            return Err(Violation::TwoJobs { card: trainer.card });
        }
        let known = match world.disk.find(job).map(|job| &job.state) {
            Some(JobState::Starting { attempt: live, .. } | JobState::Running { attempt: live, .. }) => {
                live.number == attempt
            }
            Some(_) | None => false,
        };
        if !known {
            let state = world.disk.find(job).map_or("nothing", |job| job.state.name()).to_owned();
            return Err(Violation::UnknownTrainer { job, attempt, state });
        }
    }
    if let Some(card) = (0..world.cards.len()).find(|card| world.used(*card) > world.cards[*card].total) {
        let what =
            format!("GPU {card} has {} GiB, and {} are held", world.cards[card].total, world.used(card));
        return Err(Violation::Nonsense { what });
    }
    let mut keys = BTreeSet::new();
    for (id, job) in world.disk.jobs() {
        if !keys.insert((job.owner_uid, &job.key)) {
            return Err(Violation::Twice { key: job.key.clone() });
        }
        let is = job.state.name();
        if let Some(was) = world.truth.over.get(&id).filter(|was| **was != is) {
            return Err(Violation::Undone { job: id, was, is });
        }
        if job.state.is_final() {
            world.truth.over.insert(id, is);
        }
        if matches!(job.state, JobState::Succeeded { .. }) && !has_its_result(world, id, job) {
            return Err(Violation::NoSuccess { job: id, why: "the last checkpoint is not whole".to_owned() });
        }
    }
    for Acknowledged { id, uid, key } in &world.users.acknowledged {
        match world.disk.find(*id) {
            Some(job) if job.owner_uid != *uid => return Err(Violation::OthersJob { job: *id, uid: *uid }),
            Some(job) if job.key == *key => {}
            Some(_) | None => return Err(Violation::Lost { job: *id, key: key.clone() }),
        }
    }
    if let Some((job, time)) = world.truth.times.iter().find(|(_, time)| time.late_steps > LATE_STEPS_MAX) {
        return Err(Violation::TimeLimitIgnored { job: *job, steps: time.late_steps });
    }
    let forgotten = |id: &&u64| {
        world.disk.find(**id).is_none_or(|job| !job.state.is_final() && job.state.stop().is_none())
    };
    match world.users.cancelled.iter().find(forgotten) {
        Some(job) => Err(Violation::CancelForgotten { job: *job }),
        None => Ok(()),
    }
}

/// Looks at what is said to have been learned from an attempt.
pub(crate) fn observation(
    world: &mut World<'_>,
    (id, attempt): AttemptId,
    noted: &ObservationOf,
) -> Result<(), Violation> {
    world.truth.observations += 1;
    let not_shown = |what| Err(Violation::NotShown { job: id, attempt, what });
    let Observation { name, fingerprint, tier, seen, .. } = &noted.observation;
    if world.daemon.as_ref().is_some_and(|daemon| daemon.knows(name) > 0) {
        return Err(Violation::LearnedTwice { job: id, attempt });
    }
    let job = world.disk.job(id);
    let launch = world.disk.attempts.get(&(id, attempt)).map(|files| &files.launch);
    let Some((truth, launch)) = world.truth.attempts.get(&(id, attempt)).zip(launch) else {
        return not_shown("anything");
    };
    if noted.owner_uid != world.script.jobs[job.context.script].uid() {
        return not_shown("this for its user");
    }
    if fingerprint.card != card_name(world.cards[launch.card].total) || fingerprint.model != job.spec.model {
        return not_shown("this on that card and model");
    }
    if tier.as_ref() != Some(&launch.tier) {
        return not_shown("this on that rung");
    }
    match seen {
        Seen::MoreThan { limit } => match truth.ran_out {
            Some(needed) if *limit < Bytes::from_gib(needed) => Ok(()),
            Some(_) => not_shown("that it needs so much"),
            None => not_shown("that it needs more than there was"),
        },
        // Its last words may be gone with the power.
        Seen::Peak { .. } if truth.ran_out.is_some() && world.has_first_boot() => {
            not_shown("all that it needs: it ran out of memory")
        }
        Seen::Peak { reserved, .. } if reserved.is_some_and(|it| it > Bytes::from_gib(truth.held)) => {
            not_shown("so high a peak")
        }
        Seen::Peak { .. } => Ok(()),
    }
}

/// Looks at what a job that is about to start is sized by.
pub(crate) fn is_sized_by_its_own(world: &World<'_>, id: u64, sized: &Sized) -> Result<(), Violation> {
    let owner = world.disk.job(id).owner_uid;
    for seen in &sized.learned.history.observations {
        let of = seen.name.strip_prefix("job ").and_then(|rest| rest.split(',').next()?.parse().ok());
        let of = of.unwrap_or(0);
        if world.disk.find(of).is_none_or(|job| job.owner_uid != owner) {
            return Err(Violation::LearnedFromOthers { job: id, of });
        }
    }
    Ok(())
}

/// A job fails for records that the disk refused after ten in a row.
fn is_refused_too_often(id: u64, job: &StoredJob, why: &str) -> Result<(), Violation> {
    let waits =
        |record: &Record| matches!(&record.event, JobEvent::Waiting { reason } if reason == RECORD_REFUSED);
    match job.records.iter().filter(|record| waits(record)).count() >= REFUSED_MAX as usize {
        true => Ok(()),
        false => Err(Violation::FailedByAccident { job: id, why: why.to_owned() }),
    }
}

/// A time limit that stops a job is over.
fn is_late(world: &World<'_>, id: u64) -> Result<(), Violation> {
    match world.truth.times.get(&id) {
        Some(time) if time.clock_was_set || time.until <= world.now => Ok(()),
        time => {
            Err(Violation::TimeLimitEarly { job: id, early: time.map_or(0, |time| time.until - world.now) })
        }
    }
}

/// Returns whether the time of a job is over by a clock that nobody set.
pub(crate) fn is_over_time(world: &World<'_>, id: u64) -> bool {
    world.truth.times.get(&id).is_some_and(|time| !time.clock_was_set && time.until <= world.now)
}

/// No attempt begins when the time of the job is over.
fn is_in_time(world: &World<'_>, id: u64, start: &AttemptStart) -> Result<(), Violation> {
    match world.truth.times.get(&id) {
        Some(time) if !time.clock_was_set && time.until <= world.now => {
            Err(Violation::BeganAfterItsTime { job: id, attempt: start.attempt })
        }
        _ => Ok(()),
    }
}

/// Looks at what is left when nothing happens any more.
pub(crate) fn at_the_end(world: &World<'_>) -> Result<(), Violation> {
    let open: Vec<u64> =
        world.disk.jobs().filter(|(_, job)| !job.state.is_final()).map(|(id, _)| id).collect();
    if !open.is_empty() {
        return Err(Violation::NotOver { jobs: open });
    }
    for (id, job) in world.disk.jobs() {
        let receipt = Receipt::from_events(Some(id), &job.records);
        let starts = job.records.iter().filter_map(|record| match &record.event {
            JobEvent::AttemptStarting(start) => Some((start.attempt, &start.tier, &start.resume)),
            _ => None,
        });
        let noted = receipt.attempts.iter().map(|note| (note.attempt, &note.tier, &note.resume));
        if !starts.eq(noted) || receipt.state != job.state.name() {
            return Err(Violation::ReceiptDiffers { job: id });
        }
    }
    let leases = world.daemon.as_ref().map_or(0, |daemon| daemon.live.len() + daemon.queued.len());
    let what = match (world.trainers.len(), world.recorders.len(), leases) {
        (0, 0, 0) => return Ok(()),
        (trainers, recorders, leases) => {
            format!("{trainers} trainers, {recorders} recorders, {leases} jobs of the daemon")
        }
    };
    Err(Violation::LeftOver { what })
}

fn nobody_lives(world: &World<'_>, id: u64, job: &StoredJob) -> Result<(), Violation> {
    match world.trainers.keys().find(|(job, _)| *job == id) {
        Some((_, attempt)) => {
            let state = job.state.name().to_owned();
            Err(Violation::UnknownTrainer { job: id, attempt: *attempt, state })
        }
        None => Ok(()),
    }
}

/// Invariants 1, 3, 7 and 10.
fn is_as_promised(
    world: &World<'_>,
    id: u64,
    job: &StoredJob,
    before: &[Record],
    start: &AttemptStart,
) -> Result<(), Violation> {
    let AttemptStart { attempt, tier, .. } = start;
    let attempt = *attempt;
    let spec = &job.spec;
    let found = tier.effective_batch();
    let least = u64::from(spec.min_effective_batch);
    if found < least {
        return Err(Violation::BatchTooSmall { job: id, attempt, found, least });
    }
    let first = starts(before).next();
    if let Some(first) = first.map(|first| first.tier.effective_batch()).filter(|first| *first != found) {
        return Err(Violation::BatchChanged { job: id, attempt, found, first });
    }
    let wish = &world.script.jobs[job.context.script].wish;
    let pin = |what| Violation::PinOverridden { job: id, attempt, what };
    if wish.micro_batch.is_some_and(|pinned| tier.micro_batch != pinned) {
        return Err(pin("per_device_train_batch_size"));
    }
    if wish.max_length.is_some_and(|pinned| tier.max_length != pinned) {
        return Err(pin("max_length"));
    }
    let refused = |what| Violation::NotAllowed { job: id, attempt, what };
    if !spec.allow.emergency && tier.name == Profile::Emergency {
        return Err(refused("the emergency profile"));
    }
    if !spec.allow.shorter_max_length && wish.max_length.is_none() && tier.max_length < 3072 {
        return Err(refused("shorter rows"));
    }
    // An attempt that never began was killed with the daemon that meant it, and cost nothing.
    let never_began = world.truth_of(id).filter(|truth| !truth.began).count();
    if let Some((sized, policy)) = world.sized_as(id).zip(policy(spec, true)) {
        let most = policy.attempts_max(&sized.plan);
        if attempt as usize > most + never_began + 1 {
            return Err(Violation::TooManyAttempts { job: id, attempt, most });
        }
    }
    Ok(())
}

/// Invariant 2.
fn keeps_the_ladder(world: &World<'_>, id: u64, before: &[Record], rerun: &Rerun) -> Result<(), Violation> {
    let Some(dead) = last_start(before) else { return Ok(()) };
    let (from, to) = (dead.rung, rerun.rung);
    if rerun.answer != Answer::LowerTier {
        return if from == to { Ok(()) } else { Err(Violation::OtherRung { job: id, from, to }) };
    }
    if world.truth.attempts.get(&(id, dead.attempt)).is_none_or(|truth| truth.ran_out.is_none()) {
        return Err(Violation::LowerTierWithoutOom { job: id });
    }
    let Some(sized) = world.sized_as(id) else { return Ok(()) };
    let peak = |rung: usize| sized.plan.rungs.get(rung).map(|rung| rung.predicted_peak_bytes);
    // The emergency profile is tried once, whatever is predicted for it.
    let is_last_resort = sized
        .plan
        .rungs
        .get(to)
        .is_some_and(|rung| rung.tier.name == Profile::Emergency && dead.tier.name != rung.tier.name);
    if to <= from || (peak(to) > peak(from) && !is_last_resort) {
        return Err(Violation::NoLowerTier { job: id, from, to });
    }
    Ok(())
}

/// Invariant 3, for what comes from outside: who comes further is not given up for it. What a trainer said last may be gone
/// with the power, and then nobody knows how far it came.
fn is_not_amid_progress(world: &World<'_>, id: u64, before: &[Record]) -> Result<(), Violation> {
    let Some(JobEvent::AttemptEnded { attempt, diagnosis, .. }) = before.last().map(|record| &record.event)
    else {
        return Ok(());
    };
    let interrupted = match diagnosis.kind {
        Kind::Interrupted | Kind::Network => true,
        Kind::HostOom => !diagnosis.certain,
        _ => false,
    };
    let in_all = before.iter().filter(|record| matches!(record.event, JobEvent::RerunDecided(_))).count();
    let further = came_further(world, id, before, *attempt);
    if interrupted && further && in_all < 50 && world.has_first_boot() {
        return Err(Violation::GivenUpAmidProgress { job: id, attempt: *attempt });
    }
    Ok(())
}

/// Invariant 3, for what comes from outside: who comes no further is given up.
fn is_interrupted_within_bounds(
    world: &World<'_>,
    id: u64,
    before: &[Record],
    rerun: &Rerun,
) -> Result<(), Violation> {
    let Some(last) = last_start(before).filter(|_| rerun.answer == Answer::Resume) else { return Ok(()) };
    let attempt = last.attempt;
    let mut in_a_row = 1;
    let mut of = attempt;
    for record in before.iter().rev() {
        match &record.event {
            JobEvent::RerunDecided(earlier) if earlier.answer == Answer::Resume => in_a_row += 1,
            JobEvent::AttemptEnded { attempt, .. } => of = *attempt,
            JobEvent::AttemptStarting(_) if came_further(world, id, before, of) => break,
            _ => {}
        }
    }
    if in_a_row > 5 && world.has_first_boot() {
        return Err(Violation::InterruptedForEver { job: id, attempt });
    }
    Ok(())
}

/// Returns whether an attempt made a step that no earlier one at its rung had made.
fn came_further(world: &World<'_>, id: u64, before: &[Record], attempt: u32) -> bool {
    let reached = |attempt: u32| world.truth.attempts.get(&(id, attempt)).map_or(0, |truth| truth.reached);
    let rung = starts(before).find(|start| start.attempt == attempt).map(|start| start.rung);
    let earlier = starts(before).filter(|start| start.attempt < attempt && Some(start.rung) == rung);
    reached(attempt) > earlier.map(|start| reached(start.attempt)).max().unwrap_or(0)
}

/// What is said of a resume is true, and nothing saved is given up without need.
fn begins_where_it_should(
    world: &World<'_>,
    id: u64,
    before: &[Record],
    start: &AttemptStart,
) -> Result<(), Violation> {
    let attempt = start.attempt;
    let unreadable = diagnosed_unreadable(before);
    let checkpoints = || {
        let attempts = world.disk.attempts.range((id, 0)..=(id, u32::MAX));
        attempts.flat_map(|(id, files)| files.checkpoints.iter().map(move |it| (*id, it)))
    };
    let is_good = |it: &Checkpoint| {
        let Lineage { whole, effective_batch, max_length, packing, spoilt } = it.lineage;
        let tier = &start.tier;
        let same_rows = effective_batch == tier.effective_batch()
            && max_length == tier.max_length
            && packing == tier.packing;
        it.has_state && it.has_optimizer && !it.corrupt && whole && !spoilt && same_rows
    };
    match &start.resume {
        Some(Resume { kind: ResumeKind::Exact, checkpoint: Some(name), from_step, .. }) => {
            if unreadable.contains(from_step) {
                return Err(Violation::UnreadableAgain { job: id, attempt, step: *from_step });
            }
            let all = world.disk.attempts.iter();
            let mut all = all.flat_map(|(id, files)| files.checkpoints.iter().map(move |it| (*id, it)));
            let found = all.find(|(id, it)| path(*id, it.step).display().to_string() == *name);
            let why = match found {
                None => "the checkpoint is not there",
                Some((_, it)) if !it.has_state || !it.has_optimizer => "the checkpoint is not whole",
                Some((_, it)) if it.lineage.effective_batch != start.tier.effective_batch() => {
                    "its step had another effective batch"
                }
                Some((_, it)) if it.lineage.max_length != start.tier.max_length => {
                    "its rows were of another length"
                }
                Some((_, it)) if it.lineage.packing != start.tier.packing => "its rows were packed otherwise",
                Some((of, it)) if it.lineage.spoilt && is_known_to_have_diverged(world, of) => {
                    return Err(Violation::SpoiltAgain { job: id, attempt, step: it.step });
                }
                Some(_) => return Ok(()),
            };
            Err(Violation::NotExact { job: id, attempt, why })
        }
        Some(Resume { kind: ResumeKind::WeightsOnly, from_step, .. }) if unreadable.contains(from_step) => {
            Err(Violation::UnreadableAgain { job: id, attempt, step: *from_step })
        }
        None | Some(Resume { kind: ResumeKind::Restart, .. }) => {
            // In a later epoch the line 3.x would replay the rows of the first: there it has to begin again.
            let can = |it: &Checkpoint| is_good(it) && it.step < it.max_steps && !world.script.three;
            // What is good after a divergence is told by a log whose end may be gone with the power.
            let diverged = before.iter().any(|record| match &record.event {
                JobEvent::AttemptEnded { diagnosis, .. } => diagnosis.kind == Kind::Diverged,
                _ => false,
            });
            let is_told = !diverged || world.has_first_boot();
            let saved = checkpoints().map(|(_, it)| it).filter(|it| can(it)).map(|it| it.step).max();
            match saved.filter(|step| !unreadable.contains(step)) {
                Some(saved) if is_told => Err(Violation::WorkLost { job: id, attempt, saved }),
                Some(_) | None => Ok(()),
            }
        }
        Some(_) => Ok(()),
    }
}

/// Invariant 9.
fn is_a_success(
    world: &World<'_>,
    id: u64,
    job: &StoredJob,
    before: &[Record],
    proof: &Value,
) -> Result<(), Violation> {
    let no = |why: String| Err(Violation::NoSuccess { job: id, why });
    let script = &world.script.jobs[job.context.script];
    let Some(start) = last_start(before) else { return no("no attempt was started".to_owned()) };
    let planned = script.rows.div_ceil(start.tier.effective_batch()) * u64::from(script.wish.epochs);
    let truth = world.truth.attempts.get(&(id, start.attempt));
    let Some((steps, lineage)) = truth.and_then(|truth| truth.finished) else {
        return no("its training loop did not end".to_owned());
    };
    // Without the rows nobody but the trainer knows how many steps there should be; the proof says that it is the weaker one.
    let said = proof.get("proof").and_then(Value::as_str);
    let by_rows = said == Some("rows");
    // The line that tells them may be gone with the power.
    if script.rows_known && !by_rows && world.has_first_boot() {
        return no(format!("the rows are known, and the proof is {said:?}"));
    }
    if script.rows_known && (by_rows && steps != planned || !lineage.whole) {
        return no(format!("{steps} of {planned} steps were trained, whole: {}", lineage.whole));
    }
    // The lines that say it may be gone with the power, and what is left is a success.
    if lineage.spoilt && world.has_first_boot() {
        return no("its loss was no number".to_owned());
    }
    Ok(())
}

/// Returns whether the checkpoint that a successful job ended with is whole: now, and after every power cut.
fn has_its_result(world: &World<'_>, id: u64, job: &StoredJob) -> bool {
    let Some(start) = last_start(&job.records) else { return false };
    let id = (id, start.attempt);
    let steps = world.truth.attempts.get(&id).and_then(|truth| truth.finished).map(|(steps, _)| steps);
    let files = world.disk.attempts.get(&id);
    let last = files.and_then(|files| files.checkpoints.iter().find(|it| Some(it.step) == steps));
    last.is_some_and(|it| it.has_state && it.has_optimizer)
}

fn starts(records: &[Record]) -> impl Iterator<Item = &AttemptStart> {
    records.iter().filter_map(|record| match &record.event {
        JobEvent::AttemptStarting(start) => Some(start),
        _ => None,
    })
}

/// Returns the steps from which an attempt went on and could not, as far as its words were not lost with the power.
fn diagnosed_unreadable(records: &[Record]) -> BTreeSet<u64> {
    let mut from = None;
    let mut unreadable = BTreeSet::new();
    for record in records {
        match &record.event {
            JobEvent::AttemptStarting(start) => from = start.resume.as_ref().map(|resume| resume.from_step),
            JobEvent::AttemptEnded { diagnosis, .. } if diagnosis.kind == Kind::CheckpointCorrupt => {
                unreadable.extend(from);
            }
            _ => {}
        }
    }
    unreadable
}

/// Returns whether the store says that an attempt diverged.
fn is_known_to_have_diverged(world: &World<'_>, (id, number): AttemptId) -> bool {
    world.disk.job(id).records.iter().any(|record| match &record.event {
        JobEvent::AttemptEnded { attempt, diagnosis, .. } => {
            *attempt == number && diagnosis.kind == Kind::Diverged
        }
        _ => false,
    })
}

impl World<'_> {
    /// Lets the time of a job begin.
    pub(crate) fn note_start(&mut self, id: u64) {
        if let Some(limit) = self.disk.job(id).spec.time_limit {
            let time = Time { until: self.now + limit.as_secs(), clock_was_set: false, late_steps: 0 };
            self.truth.times.entry(id).or_insert(time);
        }
    }

    /// Counts a step of a trainer whose time is over, unless nobody is there who could end it.
    pub(crate) fn note_late_step(&mut self, id: u64) {
        let (now, full) = (self.now, self.disk.full);
        let has_loop = self.daemon.as_ref().is_some_and(|daemon| daemon.live.contains_key(&id));
        let is_asked = self.disk.job(id).state.stop().is_some();
        if let Some(time) = self.truth.times.get_mut(&id)
            && time.until <= now
            && !time.clock_was_set
            && has_loop
            && !full
            && !is_asked
        {
            time.late_steps += 1;
        }
    }

    fn truth_of(&self, id: u64) -> impl Iterator<Item = &AttemptTruth> {
        self.truth.attempts.range((id, 0)..=(id, u32::MAX)).map(|(_, truth)| truth)
    }
}
