//! In which world do the decisions act, and who acts next?

use std::collections::{BTreeMap, BTreeSet};

use mhtrain_job::event::{JobEvent, ProcessIdentity, Record};
use mhtrain_sizing::known::ObservationOf;

use crate::attempts::JobLoop;
use crate::bugs::Bug;
use crate::daemon::Daemon;
use crate::disk::{AttemptId, Disk, Ended, StoreError};
use crate::draws::Draws;
use crate::faults::{Fault, name};
use crate::history::Story;
use crate::invariants::{self, Truth, Violation};
use crate::processes::Recorder;
use crate::script::Script;
use crate::trainer::Trainer;
use crate::users::Users;

/// Events after which a history must be over by itself. The longest that was seen is a third of it.
const EVENTS_MAX: u32 = 6000;

/// Process ids are few here, so that one is soon used again.
const PIDS: std::ops::Range<u32> = 100..112;

/// The whole world.
pub(crate) struct World<'a> {
    pub(crate) script: &'a Script,
    pub(crate) bug: Option<Bug>,
    pub(crate) draws: Draws,
    /// Events so far.
    pub(crate) event: u32,
    /// Seconds since the beginning.
    pub(crate) now: u64,
    /// By how much the clock on the wall is off.
    pub(crate) wall_offset: i64,
    boot: u32,
    next_pid: u32,
    pub(crate) disk: Disk,
    pub(crate) cards: Vec<Card>,
    /// NVML does not answer before this event.
    nvml_lost_until: u32,
    full_until: u32,
    /// Before which event the disk takes no record of a new attempt.
    records_refused_until: u32,
    drained_until: Option<u32>,
    pub(crate) daemon: Option<Daemon>,
    /// Which daemon it is, counted from 1.
    pub(crate) generation: u32,
    pub(crate) recorders: BTreeMap<AttemptId, Recorder>,
    pub(crate) trainers: BTreeMap<AttemptId, Trainer>,
    /// Process ids that belong to strangers.
    pub(crate) strangers: BTreeSet<u32>,
    pub(crate) users: Users,
    pub(crate) truth: Truth,
    pub(crate) story: Story,
    pub(crate) broken: Option<Violation>,
}

/// A card. Amounts are GiB.
#[derive(Clone, Debug)]
pub(crate) struct Card {
    pub(crate) total: u64,
    /// Whether nothing can be computed on it.
    pub(crate) broken: bool,
    /// What neighbours hold, and before which event they leave.
    neighbours: Vec<(u64, u32)>,
    /// What the driver has not given back yet, and until when.
    ghosts: Vec<(u64, u64)>,
}

/// Who can act.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Actor {
    ServiceManager,
    Queue,
    Job(u64),
    Recorder(AttemptId),
    Trainer(AttemptId),
    User(usize),
}

/// How a history went.
#[derive(Debug, Default)]
pub struct Course {
    /// Events.
    pub events: u32,
    /// Jobs that were acknowledged.
    pub jobs: u64,
    /// Attempts that were started.
    pub attempts: u32,
    /// Attempts that later plans learned from.
    pub observations: u32,
    /// Plans that came out otherwise for what was known.
    pub plans_moved: u32,
    /// What the store held at the end: the events of each job, as text.
    pub journals: Vec<Vec<String>>,
    /// What happened, if it was to be told.
    pub story: Story,
}

/// Runs a history to its end.
///
/// # Errors
/// A promise that was broken, with the course up to there.
pub fn run(script: &Script, bug: Option<Bug>, story: Story) -> Result<Course, (Violation, Course)> {
    let mut world = World::new(script, bug, story);
    let ended = world.run();
    let course = world.course();
    match ended {
        Ok(()) => Ok(course),
        Err(violation) => Err((violation, course)),
    }
}

impl<'a> World<'a> {
    fn new(script: &'a Script, bug: Option<Bug>, story: Story) -> World<'a> {
        let card =
            |total: &u64| Card { total: *total, broken: false, neighbours: Vec::new(), ghosts: Vec::new() };
        World {
            script,
            bug,
            draws: Draws::new(script.seed),
            event: 0,
            now: 0,
            wall_offset: 0,
            boot: 1,
            next_pid: PIDS.start,
            disk: Disk::default(),
            cards: script.cards.iter().map(card).collect(),
            nvml_lost_until: 0,
            full_until: 0,
            records_refused_until: 0,
            drained_until: None,
            daemon: None,
            generation: 0,
            recorders: BTreeMap::new(),
            trainers: BTreeMap::new(),
            strangers: BTreeSet::new(),
            users: Users::default(),
            truth: Truth::default(),
            story,
            broken: None,
        }
    }

    fn run(&mut self) -> Result<(), Violation> {
        let script = self.script;
        let last = script.faults.iter().map(|(at, _)| *at).chain(script.jobs.iter().map(|job| job.at)).max();
        let last = last.unwrap_or(0);
        let mut faults = script.faults.iter().peekable();
        let mut actors = Vec::new();
        while self.event < EVENTS_MAX {
            self.users.come(script, self.event);
            while let Some((_, fault)) = faults.next_if(|(at, _)| *at <= self.event) {
                self.strike(*fault);
                self.check()?;
            }
            self.heal();
            self.actors(&mut actors);
            if actors.is_empty() {
                match self.next_timer() {
                    Some(at) => self.now = at,
                    None if self.event > last && self.is_whole() => return invariants::at_the_end(self),
                    None => {}
                }
            } else {
                let actor = actors[self.draws.below(actors.len())];
                self.act(actor);
            }
            self.check()?;
            self.event += 1;
            self.now += 1;
        }
        Err(Violation::NotOver { jobs: self.unfinished() })
    }

    /// Returns whether nothing that passes by itself is still wrong. What does not pass, an operator mends at last.
    fn is_whole(&mut self) -> bool {
        let whole = self.nvml_lost_until <= self.event
            && self.full_until <= self.event
            && !self.refuses_records()
            && self.drained_until.is_none()
            && self.cards.iter().all(|card| card.neighbours.is_empty());
        if whole && !self.disk.failed_cards.is_empty() && !self.unfinished().is_empty() {
            self.tell(|| "operator: the cards are repaired; `mhtraind undrain`".to_owned());
            self.cards.iter_mut().for_each(|card| card.broken = false);
            self.disk.failed_cards.clear();
            if let Some(daemon) = &mut self.daemon {
                daemon.failed_cards.clear();
            }
            return false;
        }
        whole
    }

    fn unfinished(&self) -> Vec<u64> {
        self.disk.jobs().filter(|(_, job)| !job.state.is_final()).map(|(id, _)| id).collect()
    }

    fn check(&mut self) -> Result<(), Violation> {
        match self.broken.take() {
            Some(violation) => Err(violation),
            None => invariants::always(self),
        }
    }

    fn course(self) -> Course {
        let journals: Vec<_> = self.disk.jobs().map(|(_, job)| job.lines().to_vec()).collect();
        let attempts = u32::try_from(self.truth.attempts.len()).unwrap_or(u32::MAX);
        Course {
            events: self.event,
            jobs: journals.len() as u64,
            attempts,
            observations: self.truth.observations,
            plans_moved: self.truth.plans_moved,
            journals,
            story: self.story,
        }
    }

    /// Tells what happened, to whoever reads the history.
    pub(crate) fn tell(&mut self, what: impl FnOnce() -> String) {
        self.story.tell(self.event, self.now, what);
    }

    // -- who acts

    fn actors(&self, actors: &mut Vec<Actor>) {
        actors.clear();
        match &self.daemon {
            None => actors.push(Actor::ServiceManager),
            Some(daemon) => {
                if daemon.wants_to_look(self) {
                    actors.push(Actor::Queue);
                }
                actors.extend(
                    daemon.live.values().filter(|job| job.is_ready(self)).map(|job| Actor::Job(job.id)),
                );
            }
        }
        let ready = self.recorders.iter().filter(|(id, recorder)| recorder.is_ready(**id, self));
        actors.extend(ready.map(|(id, _)| Actor::Recorder(*id)));
        let acts = self.trainers.iter().filter(|(_, trainer)| trainer.acts());
        actors.extend(acts.map(|(id, _)| Actor::Trainer(*id)));
        actors.extend(self.users.asking(self).map(Actor::User));
    }

    fn act(&mut self, actor: Actor) {
        match actor {
            Actor::ServiceManager => self.start_daemon(),
            Actor::Queue => self.look_through_queue(),
            Actor::Job(id) => self.go_on_with_job(id),
            Actor::Recorder(id) => self.record(id),
            Actor::Trainer((job, _)) if self.looks_at_the_clock_first(job) => self.go_on_with_job(job),
            Actor::Trainer(id) => self.train(id),
            Actor::User(ask) => self.ask(ask),
        }
    }

    /// Returns whether the loop of a job whose time is over comes before its trainer: a step takes seconds, the loop looks at
    /// the clock each second, and one that takes the job over does so within one.
    fn looks_at_the_clock_first(&mut self, job: u64) -> bool {
        let is_late = |it: &JobLoop| it.is_late_and_ready(self) || it.is_late_and_new(self);
        let is_due = |daemon: &Daemon| daemon.live.get(&job).is_some_and(is_late);
        let is_due = self.daemon.as_ref().is_some_and(is_due);
        is_due && (self.truth.late_steps(job) >= 2 || self.draws.below(2) == 0)
    }

    /// Keeps what an attempt showed.
    pub(crate) fn learn(&mut self, id: AttemptId, noted: ObservationOf) {
        let seen = noted.observation.seen;
        self.tell(|| format!("learned from {id:?}: {seen:?}"));
        let found = invariants::observation(self, id, &noted);
        if let Some(daemon) = &mut self.daemon {
            daemon.learn(noted.clone());
        }
        self.disk.note_observation(id, noted);
        if let Err(violation) = found
            && self.broken.is_none()
        {
            self.broken = Some(violation);
        }
    }

    /// Returns when somebody acts who waits for the clock alone.
    fn next_timer(&self) -> Option<u64> {
        let jobs =
            self.daemon.iter().flat_map(|daemon| daemon.live.values()).filter_map(|job| job.timer(self));
        let recorders = self.recorders.values().filter_map(|recorder| recorder.kill_at);
        let ghosts = self.cards.iter().flat_map(|card| card.ghosts.iter().map(|(_, until)| *until));
        let queued =
            self.daemon.iter().flat_map(|daemon| daemon.queued.values()).filter_map(|job| job.ends_at);
        jobs.chain(queued).chain(recorders).chain(ghosts).filter(|at| *at > self.now).min()
    }

    // -- time, processes, disk

    /// Returns whether the disk takes no record of a new attempt.
    pub(crate) fn refuses_records(&self) -> bool {
        self.records_refused_until > self.event
    }

    /// Returns the seconds of the time on the wall.
    pub(crate) fn wall_seconds(&self) -> i64 {
        i64::try_from(self.now).unwrap_or(0) + self.wall_offset + 7 * 86_400
    }

    /// Returns the time on the wall. What it says is for people: nothing but a time limit is decided by it.
    pub(crate) fn wall(&self) -> String {
        let seconds = self.wall_seconds();
        let (day, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
        format!("2026-01-{:02}T{hour:02}:{minute:02}:{second:02}Z", day.clamp(0, 27) + 1)
    }

    /// Returns a process that just began.
    pub(crate) fn new_process(&mut self) -> ProcessIdentity {
        let taken = |world: &World<'_>, pid| {
            let ours = world.trainers.values().any(|trainer| trainer.identity.pid == pid);
            ours || world.strangers.contains(&pid)
        };
        while taken(self, self.next_pid) {
            self.pass_pid();
        }
        let pid = self.next_pid;
        self.pass_pid();
        ProcessIdentity { pid, start_time: self.now * 100, boot_id: format!("boot-{}", self.boot) }
    }

    fn pass_pid(&mut self) {
        self.next_pid = if self.next_pid + 1 < PIDS.end { self.next_pid + 1 } else { PIDS.start };
    }

    /// Returns whether power was never lost.
    pub(crate) fn has_first_boot(&self) -> bool {
        self.boot == 1
    }

    /// Returns whether a process lives, as a recorder finds out that did not start it.
    pub(crate) fn lives(&self, process: &ProcessIdentity) -> bool {
        if self.bug == Some(Bug::PidAlone) && self.strangers.contains(&process.pid) {
            return true;
        }
        self.trainers.values().any(|trainer| trainer.identity == *process)
    }

    /// Appends an event to a job, and lets the invariants look at it.
    pub(crate) fn append(&mut self, id: u64, event: JobEvent) -> Result<(), StoreError> {
        let record = Record::new(self.wall(), event);
        let event = record.event.clone();
        self.disk.append(id, record)?;
        let (state, shown) = (self.disk.job(id).state.name(), self.shown(id));
        self.tell(|| format!("{shown}: {}; it is {state}", crate::history::in_words(&event)));
        let found = invariants::event(self, id, &event);
        if matches!(event, JobEvent::AttemptStarting(_)) {
            self.note_start(id);
        }
        if let Err(violation) = found
            && self.broken.is_none()
        {
            self.broken = Some(violation);
        }
        Ok(())
    }

    /// Returns a job's number and name for people.
    pub(crate) fn shown(&self, id: u64) -> String {
        let script = self.disk.find(id).map_or_else(String::new, |job| name(job.context.script));
        format!("job {id} ({script})")
    }

    // -- cards

    /// Returns what is used of a card, by whomever.
    pub(crate) fn used(&self, card: usize) -> u64 {
        let ours = self.trainers.values().filter(|trainer| trainer.card == card).map(|trainer| trainer.held);
        let Card { neighbours, ghosts, .. } = &self.cards[card];
        ours.chain(neighbours.iter().map(|(gib, _)| *gib)).chain(ghosts.iter().map(|(gib, _)| *gib)).sum()
    }

    /// Returns what is free of a card.
    pub(crate) fn free(&self, card: usize) -> u64 {
        self.cards[card].total.saturating_sub(self.used(card))
    }

    /// Returns whether NVML answers.
    pub(crate) fn nvml_answers(&self) -> bool {
        self.nvml_lost_until <= self.event
    }

    /// Returns whether the driver still holds what a dead process had.
    pub(crate) fn has_ghosts(&self, card: usize) -> bool {
        !self.cards[card].ghosts.is_empty()
    }

    // -- faults

    /// Ends a trainer.
    pub(crate) fn trainer_ends(&mut self, id: AttemptId, ended: Ended, oom_kill: bool) {
        let Some(trainer) = self.trainers.remove(&id) else { return };
        let held = trainer.held;
        if held > 0 {
            let until = self.now + u64::try_from(self.draws.below(6)).unwrap_or(0);
            self.cards[trainer.card].ghosts.push((held, until));
        }
        if let Some(recorder) = self.recorders.get_mut(&id) {
            recorder.saw(ended, self.script.cgroups.then_some(oom_kill));
        }
    }

    fn kill(&mut self, id: AttemptId, oom_kill: bool) {
        self.trainer_ends(id, Ended::Signal(9), oom_kill);
    }

    /// Returns the live attempt of a job of the script.
    fn attempt_of(&self, script: usize) -> Option<AttemptId> {
        let of = |id: &&AttemptId| self.disk.job(id.0).context.script == script;
        self.trainers.keys().find(of).or_else(|| self.recorders.keys().find(of)).copied()
    }

    fn strike(&mut self, fault: Fault) {
        self.tell(|| format!("** {fault}"));
        match fault {
            Fault::KillDaemon => self.daemon = None,
            Fault::KillRecorder(job) => {
                if let Some(id) = self.attempt_of(job) {
                    self.recorders.remove(&id);
                }
            }
            Fault::KillTrainer(job) => self.kill_of(job, false),
            Fault::OomKill(job) => self.kill_of(job, true),
            Fault::KillAttempt(job) => {
                if let Some(id) = self.attempt_of(job) {
                    self.recorders.remove(&id);
                    self.kill(id, false);
                }
            }
            Fault::KillEverything => {
                self.daemon = None;
                self.kill_all();
            }
            Fault::PowerCut => self.lose_power(),
            Fault::DiskFull(events) => {
                self.disk.full = true;
                self.full_until = self.full_until.max(self.event + events);
            }
            Fault::RecordsRefused(events) => {
                self.records_refused_until = self.records_refused_until.max(self.event + events);
            }
            Fault::NvmlLost(events) => self.nvml_lost_until = self.nvml_lost_until.max(self.event + events),
            Fault::Neighbour { card, gib, events } => {
                // A neighbour gets what is there, and no more.
                let gib = gib.min(self.free(card));
                self.cards[card].neighbours.push((gib, self.event + events));
            }
            Fault::CardFails(card) => self.cards[card].broken = true,
            Fault::ClockJump(seconds) => {
                self.wall_offset += seconds;
                self.truth.clock_was_set();
            }
            Fault::PidReused(job) => self.reuse_pid(job),
            Fault::CancelByAnother(job) => self.users.another_wishes_to_cancel(job),
            Fault::Cancel(job) => self.users.wish_to_cancel(job),
            Fault::Retry(job) => self.users.wish_to_retry(job),
            Fault::Drain(events) => {
                let until = self.event + events;
                self.drained_until = Some(self.drained_until.map_or(until, |before| before.max(until)));
                self.disk.drained = true;
                if let Some(daemon) = &mut self.daemon {
                    daemon.drained = true;
                }
            }
        }
    }

    fn kill_of(&mut self, job: usize, oom_kill: bool) {
        if let Some(id) = self.attempt_of(job) {
            self.kill(id, oom_kill);
        }
    }

    fn kill_all(&mut self) {
        self.recorders.clear();
        let all: Vec<AttemptId> = self.trainers.keys().copied().collect();
        all.into_iter().for_each(|id| self.kill(id, false));
    }

    fn lose_power(&mut self) {
        self.daemon = None;
        self.kill_all();
        self.strangers.clear();
        self.cards.iter_mut().for_each(|card| card.ghosts.clear());
        self.disk.lose_power(&mut self.draws);
        self.boot += 1;
        self.next_pid = PIDS.start;
    }

    fn reuse_pid(&mut self, job: usize) {
        let dead = self.disk.attempts.iter().rev().find_map(|(id, files)| {
            let process = files.trainer.as_ref()?;
            let gone = !self.trainers.contains_key(id) && files.exit.is_none();
            (gone && files.launch.script == job).then_some(process.pid)
        });
        let free = |pid: &u32| self.trainers.values().all(|trainer| trainer.identity.pid != *pid);
        if let Some(pid) = dead.filter(free) {
            self.strangers.insert(pid);
        }
    }

    /// Ends what passes by itself.
    fn heal(&mut self) {
        let (event, now) = (self.event, self.now);
        if self.full_until <= event {
            self.disk.full = false;
        }
        if self.drained_until.is_some_and(|until| until <= event) {
            self.drained_until = None;
            self.disk.drained = false;
            if let Some(daemon) = &mut self.daemon {
                daemon.drained = false;
            }
        }
        for card in &mut self.cards {
            card.neighbours.retain(|(_, until)| *until > event);
            card.ghosts.retain(|(_, until)| *until > now);
        }
    }
}
