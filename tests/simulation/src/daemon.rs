//! What does the daemon do with its queue? (`daemon/queue.rs` of mhtraind, played)

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use mhtrain_job::event::JobEvent;
use mhtrain_job::queue::{self, Dependency, DependencyState, Fit, Leases, Offer, QueuedJob, Room, Verdict};
use mhtrain_job::spec::DeviceWish;
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_job::take_over::{Place, place};
use mhtrain_sizing::known::{Known, ObservationOf};
use mhtrain_sizing::observation::Observation;
use mhtrain_sizing::plan::Plan;
use mhtrain_sizing::units::Bytes;
use serde_json::{Value, json};

use crate::attempts::{JobLoop, seconds_of};
use crate::bugs::Bug;
use crate::disk::StoreError;
use crate::invariants::{self, Violation};
use crate::sizing::{Learned, size};
use crate::world::World;

/// A daemon that lives. All of it is lost when it dies.
#[derive(Debug, Default)]
pub(crate) struct Daemon {
    /// Jobs that wait for a device, and whether the store knows why.
    pub(crate) queued: BTreeMap<u64, Waiting>,
    /// Jobs that have one.
    pub(crate) live: BTreeMap<u64, JobLoop>,
    pub(crate) drained: bool,
    pub(crate) failed_cards: BTreeSet<usize>,
    /// What attempts showed.
    known: Known,
    /// What of that counts for whom.
    learned: BTreeMap<u32, Rc<Learned>>,
    /// What the last look decided and is not done yet.
    effects: VecDeque<Effect>,
    /// What the last look saw.
    seen: Option<View>,
}

/// A job that waits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting {
    pub(crate) told: bool,
    /// When its time is over, once it has begun.
    pub(crate) ends_at: Option<u64>,
}

/// One durable step that follows on a look.
#[derive(Debug)]
enum Effect {
    Verdict(u64, Verdict),
    Start(u64, Sized),
    /// Its time is over.
    EndLate(u64),
}

/// What a job is started with.
#[derive(Clone, Debug)]
pub(crate) struct Sized {
    pub(crate) card: usize,
    /// What was free then: with it the plan can be made again.
    pub(crate) free: u64,
    pub(crate) plan: Rc<Plan>,
    /// What was known then.
    pub(crate) learned: Rc<Learned>,
}

/// All that a look depends on.
#[derive(Clone, Debug, PartialEq)]
struct View {
    used: Vec<u64>,
    answers: bool,
    drained: bool,
    failed: BTreeSet<usize>,
    queued: Vec<u64>,
    live: Vec<u64>,
    over: usize,
    observations: usize,
}

impl Daemon {
    fn view(&self, world: &World<'_>) -> View {
        View {
            used: (0..world.cards.len()).map(|card| world.used(card)).collect(),
            answers: world.nvml_answers(),
            drained: self.drained,
            failed: self.failed_cards.clone(),
            queued: self.queued.keys().copied().collect(),
            live: self.live.keys().copied().collect(),
            over: world.disk.jobs().filter(|(_, job)| job.state.is_final()).count(),
            observations: self.known.all().len(),
        }
    }

    pub(crate) fn wants_to_look(&self, world: &World<'_>) -> bool {
        !self.effects.is_empty()
            || (!self.queued.is_empty() && self.seen.as_ref() != Some(&self.view(world)))
            || (!world.disk.full && self.late(world.now).next().is_some())
    }

    /// Returns the jobs that wait and whose time is over.
    fn late(&self, now: u64) -> impl Iterator<Item = u64> {
        let late = self.queued.iter().filter(move |(_, job)| job.ends_at.is_some_and(|at| at <= now));
        late.map(|(id, _)| *id)
    }

    /// Adds what an attempt showed.
    pub(crate) fn learn(&mut self, noted: ObservationOf) {
        self.known.add(noted);
        self.learned.clear();
    }

    /// Returns how often an observation of this name is known.
    pub(crate) fn knows(&self, name: &str) -> usize {
        self.known.all().iter().filter(|noted| noted.observation.name == name).count()
    }

    /// Lets everything be ready that counts for a user.
    fn read_up(&mut self, uid: u32, bug: Option<Bug>) {
        if !self.learned.contains_key(&uid) {
            let counts: Vec<Observation> = match bug {
                Some(Bug::LearnedFromOthers) => {
                    self.known.all().iter().map(|noted| noted.observation.clone()).collect()
                }
                _ => self.known.of(uid).cloned().collect(),
            };
            self.learned.insert(uid, Rc::new(Learned::from(counts)));
        }
    }

    fn leases(&self) -> Leases {
        Leases {
            devices: self.live.values().map(|job| (device(job.card()), job.id)).collect(),
            output_dirs: self.live.values().map(|job| (job.output_dir(), job.id)).collect(),
        }
    }
}

/// Returns the name of a card.
pub(crate) fn device(card: usize) -> String {
    format!("GPU-{card}")
}

impl World<'_> {
    /// Starts a daemon, which takes up what the one before left.
    pub(crate) fn start_daemon(&mut self) {
        self.generation += 1;
        self.tell(|| "the daemon starts".to_owned());
        let mut daemon = Daemon {
            drained: self.disk.drained,
            failed_cards: self.disk.failed_cards.clone(),
            ..Daemon::default()
        };
        if self.script.learns {
            self.disk.observations.iter().for_each(|(_, noted, _)| daemon.learn(noted.clone()));
        }
        if let Err(job) = self.disk.open() {
            self.broken = Some(Violation::StoreDiffers { job });
        }
        let unfinished: Vec<u64> =
            self.disk.jobs().filter(|(_, job)| !job.state.is_final()).map(|(id, _)| id).collect();
        for id in unfinished {
            let sized = self.sized_as(id);
            match place(&self.disk.job(id).records, sized.is_some()) {
                Ok(Place::Cancelled) => {
                    if self.append(id, stop::end(stop::CANCEL, None)).is_err() {
                        // The real one ends here, and is started again.
                        return;
                    }
                }
                Ok(Place::OnDevice) => {
                    if let Some(sized) = sized {
                        daemon.live.insert(id, JobLoop::new(self, id, sized));
                    }
                }
                Ok(Place::InQueue) => {
                    let told = matches!(self.disk.job(id).state, JobState::Waiting { .. });
                    daemon.queued.insert(id, Waiting { told, ends_at: self.ends_at(id) });
                }
                Err(error) => {
                    let why = error.to_string();
                    self.broken = Some(Violation::Illegal { job: id, event: "the fold", why });
                }
            }
        }
        self.daemon = Some(daemon);
    }

    /// Returns what a job was sized as, read from its events.
    pub(crate) fn sized_as(&self, id: u64) -> Option<Sized> {
        let stored = self.disk.job(id);
        let planned = stored.records.iter().rev().find_map(|record| match &record.event {
            JobEvent::Planned { sized, .. } => sized.as_ref(),
            _ => None,
        })?;
        let number = |key: &str| planned.get(key).and_then(Value::as_u64);
        let (card, free) = (usize::try_from(number("card")?).ok()?, number("free")?);
        let plan = Rc::clone(self.disk.plans.get(usize::try_from(number("plan")?).ok()?)?);
        Some(Sized { card, free, plan, learned: Rc::default() })
    }

    /// Looks through the queue, or does what the last look decided.
    pub(crate) fn look_through_queue(&mut self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        match daemon.effects.pop_front() {
            Some(effect) => {
                if self.carry_out(&mut daemon, effect).is_err() {
                    // Said in the log, and looked at again.
                    daemon.seen = None;
                }
            }
            None => self.look(&mut daemon),
        }
        self.daemon = Some(daemon);
    }

    /// Returns when the time of a job is over that waits, as `QueuedEntry::with_time` does.
    pub(crate) fn ends_at(&self, id: u64) -> Option<u64> {
        let job = self.disk.job(id);
        let began = stop::time_began(&job.records).filter(|_| self.bug != Some(Bug::QueueStopsTime))?;
        let used = (self.wall_seconds() - seconds_of(began)).max(0).unsigned_abs();
        let left = stop::time_left(job.spec.time_limit, Duration::from_secs(used))?;
        Some(self.now + left.as_secs())
    }

    fn look(&mut self, daemon: &mut Daemon) {
        daemon.effects = daemon.late(self.now).map(Effect::EndLate).collect();
        if !daemon.effects.is_empty() {
            return;
        }
        for id in daemon.queued.keys().copied().collect::<Vec<_>>() {
            daemon.read_up(self.disk.job(id).owner_uid, self.bug);
        }
        let jobs: Vec<QueuedJob> = daemon.queued.keys().map(|id| self.queued_job(*id, daemon)).collect();
        let leases =
            if self.bug == Some(Bug::TwoJobsOnADevice) { Leases::default() } else { daemon.leases() };
        let verdicts = queue::decide(&jobs, &leases, daemon.drained);
        let waits = |(id, verdict): &(u64, Verdict)| matches!(verdict, Verdict::Wait { .. }).then_some(*id);
        if let Some(job) = verdicts.iter().filter_map(waits).find(|id| invariants::is_over_time(self, *id))
            && self.broken.is_none()
        {
            self.broken = Some(Violation::WaitsAfterItsTime { job });
        }
        daemon.effects = verdicts.into_iter().map(|(id, verdict)| Effect::Verdict(id, verdict)).collect();
        daemon.seen = Some(daemon.view(self));
    }

    fn queued_job(&self, id: u64, daemon: &Daemon) -> QueuedJob {
        let spec = &self.disk.job(id).spec;
        let after = spec.after.iter().map(|id| Dependency { id: *id, state: self.stands(*id) }).collect();
        let cards = if self.nvml_answers() { self.cards.len() } else { 0 };
        let wished = |card: &usize| match spec.device {
            DeviceWish::Index(index) => u32::try_from(*card) == Ok(index),
            DeviceWish::Auto | DeviceWish::Uuid(_) => true,
        };
        let offer = |card| Offer {
            device: device(card),
            name: format!("GPU {card}"),
            fit: match daemon.failed_cards.contains(&card) {
                true => Fit::Unusable { why: "it failed".to_owned() },
                false => self.fit(daemon, id, card, self.used(card)).0,
            },
        };
        let offers = (0..cards).filter(wished).map(offer).collect();
        QueuedJob { id, priority: spec.priority, output_dir: spec.output_dir.clone(), after, offers }
    }

    fn stands(&self, id: u64) -> DependencyState {
        match self.disk.find(id).map(|job| &job.state) {
            Some(JobState::Succeeded { .. }) => DependencyState::Succeeded,
            Some(state) if !state.is_final() => DependencyState::Pending,
            Some(_) | None => DependencyState::Never,
        }
    }

    /// Returns how a job fits on a card of which so much is used.
    fn fit(&self, daemon: &Daemon, id: u64, card: usize, used: u64) -> (Fit, Option<Sized>) {
        let stored = self.disk.job(id);
        let learned = daemon.learned.get(&stored.owner_uid).cloned().unwrap_or_default();
        let wish = &self.script.jobs[stored.context.script].wish;
        let total = self.cards[card].total;
        let free = total.saturating_sub(used);
        let gib = |bytes: Bytes| bytes.get() >> 30;
        let room = Room {
            total: Bytes::from_gib(total),
            free: Bytes::from_gib(free),
            held_by_others: Bytes::from_gib(used),
            holders: String::new(),
        };
        let Ok((fit, plan)) = queue::fit(&room, |free, _held| {
            Ok::<_, Infallible>(size(&stored.spec, wish, total, gib(free), &learned))
        });
        (fit, plan.map(|plan| Sized { card, free, plan, learned }))
    }

    /// Returns whether a job is sized otherwise than it would be if nothing were known.
    fn is_moved(&self, id: u64, sized: &Sized) -> bool {
        let stored = self.disk.job(id);
        let wish = &self.script.jobs[stored.context.script].wish;
        let total = self.cards[sized.card].total;
        !sized.learned.is_empty()
            && size(&stored.spec, wish, total, sized.free, &Learned::default())
                .map_or(true, |plan| plan.chosen_rung() != sized.plan.chosen_rung())
    }

    fn carry_out(&mut self, daemon: &mut Daemon, effect: Effect) -> Result<(), StoreError> {
        match effect {
            Effect::Verdict(id, _) if !daemon.queued.contains_key(&id) => Ok(()),
            Effect::Verdict(id, Verdict::Fail { reason, help }) => {
                self.append(id, JobEvent::Failed { reason, help })?;
                daemon.queued.remove(&id);
                Ok(())
            }
            Effect::Verdict(id, Verdict::Wait { reason }) => {
                let told =
                    daemon.queued.get_mut(&id).is_some_and(|job| std::mem::replace(&mut job.told, true));
                if told { Ok(()) } else { self.append(id, JobEvent::Waiting { reason }) }
            }
            Effect::Verdict(id, Verdict::Start { device: wanted }) => {
                let Some(card) = (0..self.cards.len()).find(|card| device(*card) == wanted) else {
                    return Ok(());
                };
                // As the card was at the look: the answer is about that.
                let used = daemon.seen.as_ref().map_or(0, |seen| seen.used[card]);
                daemon.read_up(self.disk.job(id).owner_uid, self.bug);
                let Some(sized) = self.fit(daemon, id, card, used).1 else {
                    // What was learned since then speaks against it.
                    daemon.seen = None;
                    return Ok(());
                };
                self.truth.plans_moved += u32::from(self.is_moved(id, &sized));
                if let Err(violation) = invariants::is_sized_by_its_own(self, id, &sized)
                    && self.broken.is_none()
                {
                    self.broken = Some(violation);
                }
                if !invariants::is_promised_only_what_is_there(self.cards[card].total, used, &sized)
                    && self.broken.is_none()
                {
                    self.broken = Some(Violation::PromisedTooMuch { job: id, card });
                }
                let event = JobEvent::Planned {
                    chosen: sized.plan.chosen,
                    rungs: sized.plan.rungs.len(),
                    tier: sized.plan.chosen_rung().tier.clone(),
                    sized: Some(
                        json!({"card": sized.card, "free": sized.free, "plan": self.disk.keep_plan(&sized.plan)}),
                    ),
                };
                self.append(id, event)?;
                daemon.effects.push_front(Effect::Start(id, sized));
                Ok(())
            }
            Effect::EndLate(id) => {
                if daemon.queued.contains_key(&id) {
                    self.append(id, stop::end(stop::TIME_LIMIT, self.disk.job(id).spec.time_limit))?;
                    daemon.queued.remove(&id);
                }
                Ok(())
            }
            Effect::Start(id, sized) => {
                // Cancelled while the plan was written: then it is in the queue no more.
                if daemon.queued.remove(&id).is_some() {
                    daemon.live.insert(id, JobLoop::new(self, id, sized));
                }
                Ok(())
            }
        }
    }
}
