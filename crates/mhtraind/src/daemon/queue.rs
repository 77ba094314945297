//! Which jobs start, and when is the queue looked at again?
//!
//! The decisions are in `mhtrain_job::queue`; this is the loop that feeds it: a job comes or ends, somebody drains
//! the daemon, memory comes back on a card, or, while a job waits, a second has passed.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mhtrain_failpoint::reach;
use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::queue::{
    DRAINED, Dependency, DependencyState, Fit, Leases, Offer, Places, QueuedJob, Verdict, decide,
    place_in_line,
};
use mhtrain_job::spec::{DeviceWish, JobSpec};
use mhtrain_job::state::JobState;
use mhtrain_job::stop;
use mhtrain_job::take_over::{Place, place};
use mhtrain_probe::gpu::{GpuReport, GpuState};
use mhtrain_probe::host::{HostReport, probe_host};
use mhtrain_probe::nvml::Gpus;
use mhtrain_sizing::plan::History;
use mhtrain_sizing::units::Bytes;
use mhtrain_store::{JobId, UnfinishedJob};

use super::download::{self, Download};
use super::{Account, Daemon, Submission, job};
use crate::config::Config;
use crate::engine::examine::{Examined, Sized, device_name, examine};
use crate::engine::journal::{now, time_used};
use crate::engine::observations::versions;
use crate::failure::{Failure, Status};

/// How often NVML is asked while a job waits.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a job whose files or trainer cannot be read is left alone. After a reboot a disk may not be mounted yet.
const EXAMINE_AGAIN: Duration = Duration::from_secs(15);

/// Jobs of one user that are read at the same time.
const EXAMINED_AT_ONCE: usize = 4;

/// How often that is tried before the job fails.
const EXAMINED_MAX: u32 = 20;

/// How long the files of a job, and its owner's account, may take to be read. The trainer's interpreter alone may take 30 s on a
/// cold network disk.
const EXAMINED_WITHIN: Duration = Duration::from_secs(90);

/// For how long it is found out at a time why each job of a long queue waits: what starts comes first.
const REASONS_FOR: Duration = Duration::from_millis(20);

/// How many times longer that is left alone before it goes on.
const REASONS_BETWEEN: u32 = 3;

/// How many times longer than it took for the whole queue it is left alone.
const REASONS_REST: u32 = 10;

/// How often it is asked for the free memory alone, by which a card shows that somebody gave some back.
const MEMORY_EVERY: Duration = Duration::from_millis(25);

/// A job as it came in.
#[derive(Clone, Debug)]
pub struct HandedIn {
    /// The job.
    pub spec: JobSpec,
    /// What its submitter left.
    pub submission: Submission,
    /// Whose it is.
    pub account: Arc<Account>,
}

impl HandedIn {
    /// Returns the length of all that its submitter gave, as JSON.
    pub fn bytes(&self) -> usize {
        let submission = serde_json::to_string(&self.submission).map_or(0, |text| text.len());
        self.spec.to_json().to_string().len() + submission
    }

    /// Reads what is needed of the job, with the rights of the calling thread.
    ///
    /// # Errors
    /// Something that the job needs is missing.
    pub fn examine(&self, config: &Config) -> Result<Examined, Failure> {
        let origin = self.submission.origin(&self.account, config);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        examine(self.spec.clone(), &origin, config, u32::try_from(cores).unwrap_or(u32::MAX))
    }
}

/// A job that waits for a device.
#[derive(Clone, Debug)]
pub struct QueuedEntry {
    /// As it came.
    pub handed_in: HandedIn,
    /// What is known about its model and trainer; `None` until that was read.
    pub examined: Option<Arc<Examined>>,
    /// How far the download of what it needs is.
    pub download: Download,
    /// Why it does not start.
    pub reason: String,
    /// Memory that it takes, about: its length as JSON.
    pub bytes: usize,
    /// When its time is over; `None` without a limit, or before its first attempt.
    pub ends_at: Option<Instant>,
    /// Whether the store knows that it waits.
    told: bool,
    /// Whether its files are being read.
    examining: bool,
    tries: u32,
    try_at: Instant,
}

impl QueuedEntry {
    /// Returns a job that has just come.
    pub fn new(handed_in: HandedIn, examined: Option<Arc<Examined>>) -> QueuedEntry {
        let reason = "it is about to be looked at".to_owned();
        QueuedEntry {
            bytes: handed_in.bytes(),
            ends_at: None,
            handed_in,
            examined,
            download: Download::default(),
            reason,
            told: false,
            examining: false,
            tries: 0,
            try_at: Instant::now(),
        }
    }
}

impl QueuedEntry {
    /// Notes how much of the job's time is left, as its events tell it.
    #[must_use]
    pub fn with_time(self, records: &[Record]) -> QueuedEntry {
        let left = stop::time_left(self.handed_in.spec.time_limit, time_used(records).unwrap_or_default());
        let ends_at = time_used(records).and(left).and_then(|left| Instant::now().checked_add(left));
        QueuedEntry { ends_at, ..self }
    }

    /// Returns whether something that the job needs is not here.
    fn waits_for_download(&self) -> bool {
        self.examined.as_ref().is_some_and(|examined| !download::is_here(self, examined))
    }
}

/// Takes up what an earlier daemon left: jobs with a trainer are followed again, the others stand in the queue.
/// Returns how many there are.
///
/// # Errors
/// The store cannot be read.
pub async fn take_up(daemon: &Arc<Daemon>) -> Result<usize, Failure> {
    let unfinished = daemon.store.call(|store| store.unfinished()).await?;
    let count = unfinished.len();
    for UnfinishedJob { job, state } in unfinished {
        let id = job.row.id;
        let read = JobSpec::from_value(&job.row.spec).map_err(|e| e.to_string()).and_then(|spec| {
            let submission: Submission = serde_json::from_value(job.context).map_err(|e| e.to_string())?;
            Ok((spec, submission))
        });
        let (spec, submission) = match read {
            Ok(read) => read,
            Err(why) => {
                tracing::error!(job = id.get(), why, "the job cannot be read; it is left as it is");
                continue;
            }
        };
        let records = daemon.store.call(move |store| store.events(id)).await?;
        let sized = sized(id, &records);
        let place = place(&records, sized.is_some()).map_err(|e| Failure::new(Status::Bug, "bug", e))?;
        if place == Place::Cancelled {
            daemon.store.append(id, Record::new(now(), stop::end(stop::CANCEL, None))).await?;
            continue;
        }
        let account = daemon.served.account_of(&job.row.owner).await.unwrap_or_else(|| {
            // What runs still runs as them, and needs to be followed; nothing new is started.
            tracing::warn!(
                job = id.get(),
                owner = job.row.owner.name,
                "the job's owner is not known any more"
            );
            Account::as_submitted(&job.row.owner)
        });
        let handed_in = HandedIn { spec, submission, account: Arc::new(account) };
        match sized {
            Some(sized) if place == Place::OnDevice => job::start(daemon, id, handed_in, sized),
            _ => {
                let told = matches!(state, JobState::Waiting { .. });
                let entry = QueuedEntry::new(handed_in, None).with_time(&records);
                daemon.queued().insert(id, QueuedEntry { told, ..entry });
            }
        }
    }
    Ok(count)
}

/// Returns what a job was sized as, if it was.
fn sized(id: JobId, records: &[Record]) -> Option<Sized> {
    let value = records.iter().rev().find_map(|record| match &record.event {
        JobEvent::Planned { sized, .. } => sized.clone(),
        _ => None,
    });
    match value.map(serde_json::from_value).transpose() {
        Ok(sized) => sized,
        Err(error) => {
            tracing::error!(job = id.get(), %error, "the plan of the job cannot be read; it is made again");
            None
        }
    }
}

/// Looks at the queue whenever something changed. Ends only with an error of ours.
pub async fn schedule(daemon: Arc<Daemon>) {
    let mut queue = Queue {
        line: BTreeMap::new(),
        host: None,
        reasons_due: Instant::now(),
        told_up_to: None,
        reasons_took: Duration::ZERO,
        behind: false,
        trouble: BTreeMap::new(),
    };
    loop {
        let looked = queue.look(&daemon).await;
        if let Some(failure) = queue.tell_trouble(None, looked.as_ref().err()) {
            tracing::error!(error = failure.message, "the queue cannot be looked through");
        }
        let waits = !daemon.queued().is_empty();
        let free = looked.unwrap_or_default();
        let until_next = match queue.behind {
            true => LOOK_EVERY.min(queue.reasons_due.saturating_duration_since(Instant::now())),
            false => LOOK_EVERY,
        };
        tokio::select! {
            () = daemon.wake.notified() => {}
            () = tokio::time::sleep(until_next), if waits => {}
            () = more_memory(&daemon.gpus, &free), if waits && !free.is_empty() => {}
        }
    }
}

/// The queue between two looks.
struct Queue {
    line: BTreeMap<JobId, InLine>,
    /// The host as it was when all of it was looked at last, but for the cards that somebody may take: they are asked at
    /// every look.
    host: Option<(Host, Instant)>,
    /// When it may be found out again why jobs wait, up to which job that was done, and how long it took so far.
    reasons_due: Instant,
    told_up_to: Option<JobId>,
    reasons_took: Duration,
    /// Whether something may have changed since that was found out.
    behind: bool,
    /// What went wrong when it was tried last, with the queue and with each job: it is said once, and tried at every look.
    trouble: BTreeMap<Option<JobId>, String>,
}

/// A queued job as it was looked at last: sized again only where something changed.
struct InLine {
    job: QueuedJob,
    entry: QueuedEntry,
    examined: Arc<Examined>,
    /// The cards that it may take, as far as they were looked at.
    cards: Vec<OnCard>,
    /// Whether all of them were.
    is_whole: bool,
}

/// What a card offered a job, and what that was found out of.
struct OnCard {
    offer: Option<Offer>,
    /// The card as it was then.
    gpu: GpuState,
    /// What earlier attempts had shown then.
    history: Arc<History>,
    /// Why it had failed, if it had.
    failed: Option<String>,
}

impl Queue {
    /// Looks through the queue. Returns what is free on the cards that none of our jobs has.
    ///
    /// What can start is started first, which takes as long as there are cards and not as long as the queue is. Why the others
    /// wait is found out after that, a few at a time.
    async fn look(&mut self, daemon: &Arc<Daemon>) -> Result<Vec<(String, Bytes)>, Failure> {
        self.trouble.retain(|id, _| id.is_none_or(|id| daemon.queued().contains_key(&id)));
        if daemon.queued().is_empty() {
            self.line.clear();
            return Ok(Vec::new());
        }
        self.end_late(daemon).await;
        examine_new(daemon);
        download_missing(daemon).await?;
        let had = daemon.leases();
        let drained = daemon.is_drained();
        let host = self.look_at_host(&daemon.gpus, &had, drained).await?;
        line_up(daemon, &mut self.line);
        let now = Now { host: &host, had, drained, failed: daemon.failed_devices().clone() };
        self.start(daemon, &now).await?;
        let begin = Instant::now();
        self.behind = begin < self.reasons_due;
        if !self.behind {
            let is_through = self.tell_reasons(daemon, &now).await?;
            self.reasons_took += begin.elapsed();
            let rest = match is_through {
                true => std::mem::take(&mut self.reasons_took) * REASONS_REST,
                false => begin.elapsed() * REASONS_BETWEEN,
            };
            self.reasons_due = Instant::now() + rest;
            self.behind = !is_through;
        }
        if drained {
            // More memory lets nothing start.
            return Ok(Vec::new());
        }
        let leases = daemon.leases();
        let unleased = host.gpus.devices().iter().filter_map(|gpu| {
            let uuid = gpu.uuid.clone().filter(|uuid| !leases.devices.contains_key(uuid))?;
            Some((uuid, gpu.card().ok()?.free))
        });
        Ok(unleased.collect())
    }

    /// Ends the jobs that wait for another card when their time is over.
    async fn end_late(&mut self, daemon: &Arc<Daemon>) {
        let now = Instant::now();
        let late: Vec<_> = {
            let queued = daemon.queued();
            let late = queued.iter().filter(|(_, entry)| entry.ends_at.is_some_and(|at| at <= now));
            late.map(|(id, entry)| (*id, entry.handed_in.spec.time_limit)).collect()
        };
        for (id, limit) in late {
            let done = end_in_queue(daemon, id, limit).await;
            if let Some(failure) = self.tell_trouble(Some(id), done.as_ref().err()) {
                tracing::error!(job = id.get(), error = failure.message, "the job cannot be ended");
            }
        }
    }

    /// Starts what can start.
    async fn start(&mut self, daemon: &Arc<Daemon>, now: &Now<'_>) -> Result<(), Failure> {
        let mut places = Places::new(now.leases(daemon), now.is_drained(daemon));
        let devices = || now.host.gpus.devices().iter().filter_map(|gpu| gpu.uuid.as_deref());
        if !places.are_left(devices()) {
            return Ok(());
        }
        let mut order: Vec<_> =
            self.line.iter().map(|(id, waiting)| (place_in_line(&waiting.job), *id)).collect();
        order.sort_unstable();
        for (_, id) in order {
            if !places.are_left(devices()) {
                break;
            }
            let Some(waiting) = self.line.get_mut(&id) else { continue };
            // A card that somebody has offers nothing now.
            let is_free = |gpu: &GpuState| gpu.uuid.as_ref().is_some_and(|uuid| places.is_free(uuid));
            waiting.bring_up_to_date(id, now, daemon, is_free).await?;
            if let Some(device) = places.start(&waiting.job) {
                self.carry_out(daemon, id, Verdict::Start { device }, now).await;
            }
        }
        Ok(())
    }

    /// Finds out for a moment why jobs wait, going on where the last look stopped. When it was through them all it is said, and
    /// those fail that can never start. Returns whether it was.
    async fn tell_reasons(&mut self, daemon: &Arc<Daemon>, now: &Now<'_>) -> Result<bool, Failure> {
        let until = Instant::now() + REASONS_FOR;
        let begin = self.told_up_to.map_or(Bound::Unbounded, Bound::Excluded);
        for (id, waiting) in self.line.range_mut((begin, Bound::Unbounded)) {
            if Instant::now() >= until {
                return Ok(false);
            }
            waiting.bring_up_to_date(*id, now, daemon, |_| true).await?;
            self.told_up_to = Some(*id);
        }
        self.told_up_to = None;
        for (id, waiting) in &mut self.line {
            // One may have come to the line, or may have been looked at for some cards alone.
            match waiting.is_whole {
                true => waiting.offer_all(),
                false => waiting.bring_up_to_date(*id, now, daemon, |_| true).await?,
            }
        }
        let jobs = self.line.values().map(|waiting| &waiting.job);
        for (id, verdict) in decide(jobs, &now.leases(daemon), now.is_drained(daemon)) {
            let Some(id) = JobId::new(id) else { continue };
            // What was found out of may have changed since: what starts is decided by the next look.
            if !matches!(verdict, Verdict::Start { .. }) {
                self.carry_out(daemon, id, verdict, now).await;
            }
        }
        Ok(true)
    }

    async fn carry_out(&mut self, daemon: &Arc<Daemon>, id: JobId, verdict: Verdict, now: &Now<'_>) {
        let starts = matches!(verdict, Verdict::Start { .. });
        // One job that cannot be started or told must not keep the others waiting.
        let done = carry_out(daemon, id, verdict, &self.line, now.host).await;
        if starts && done.is_ok() {
            self.line.remove(&id);
        }
        if let Some(failure) = self.tell_trouble(Some(id), done.as_ref().err()) {
            tracing::error!(job = id.get(), error = failure.message, "the queue cannot go on with the job");
        }
        if let (Err(failure), Some(entry)) = (done, daemon.queued().get_mut(&id)) {
            entry.reason = failure.message;
        }
    }

    /// Notes whether something went wrong. Returns it when it has to be said: once, and again only when it is something else.
    fn tell_trouble<'a>(&mut self, of: Option<JobId>, now: Option<&'a Failure>) -> Option<&'a Failure> {
        let Some(failure) = now else {
            if self.trouble.remove(&of).is_some() {
                tracing::info!(job = of.map(JobId::get), "the queue goes on");
            }
            return None;
        };
        let before = self.trouble.insert(of, failure.message.clone());
        (before.as_ref() != Some(&failure.message)).then_some(failure)
    }

    /// Looks at the whole host when it is time, else at the cards that somebody may take: none where nothing may start.
    async fn look_at_host(&mut self, gpus: &Gpus, leases: &Leases, drained: bool) -> Result<Host, Failure> {
        let known = self.host.take().filter(|(_, at)| at.elapsed() < LOOK_EVERY);
        if drained && let Some((host, _)) = &known {
            let host = host.clone();
            self.host = known;
            return Ok(host);
        }
        let (gpus, leased) = (gpus.clone(), leases.devices.clone());
        // NVML may take long, and the daemon must answer meanwhile.
        let asked = tokio::task::spawn_blocking(move || match known {
            None => (Host { gpus: gpus.report(), beside: probe_host() }, Instant::now()),
            Some((mut host, at)) => {
                let is_leased = |uuid: &String| leased.contains_key(uuid);
                gpus.refresh(&mut host.gpus, |gpu| !gpu.uuid.as_ref().is_some_and(is_leased));
                (host, at)
            }
        });
        let asked = asked.await.map_err(|e| Failure::new(Status::Bug, "nvml_thread", e))?;
        let host = asked.0.clone();
        self.host = Some(asked);
        Ok(host)
    }
}

/// The host as a look at the queue sees it.
#[derive(Clone)]
struct Host {
    gpus: GpuReport,
    beside: HostReport,
}

/// What a look at the queue sees.
struct Now<'a> {
    host: &'a Host,
    /// What jobs had before NVML was asked: what is given back since was not asked about.
    had: Leases,
    /// Whether nothing might start then, so that the cards were not asked again.
    drained: bool,
    /// The cards that have failed.
    failed: BTreeMap<String, String>,
}

impl Now<'_> {
    /// Whether nothing may start, or nothing might when the cards were looked at.
    fn is_drained(&self, daemon: &Daemon) -> bool {
        self.drained || daemon.is_drained()
    }

    /// Returns what jobs have, or had.
    fn leases(&self, daemon: &Daemon) -> Leases {
        let (mut leases, had) = (daemon.leases(), self.had.clone());
        leases.devices.extend(had.devices);
        leases.output_dirs.extend(had.output_dirs);
        leases
    }
}

/// Brings the line up to date with the queue.
fn line_up(daemon: &Daemon, line: &mut BTreeMap<JobId, InLine>) {
    let queued = daemon.queued();
    line.retain(|id, _| queued.contains_key(id));
    for (id, entry) in queued.iter() {
        let here = !line.contains_key(id) && !entry.waits_for_download();
        let Some(examined) = entry.examined.as_ref().filter(|_| here) else { continue };
        let spec = &entry.handed_in.spec;
        let job = QueuedJob {
            id: id.get(),
            priority: spec.priority,
            output_dir: spec.output_dir.clone(),
            after: Vec::new(),
            offers: Vec::new(),
        };
        let examined = Arc::clone(examined);
        line.insert(*id, InLine { job, entry: entry.clone(), examined, cards: Vec::new(), is_whole: false });
    }
}

impl InLine {
    /// Finds out what the job may take now of these cards, and what it still waits for.
    async fn bring_up_to_date(
        &mut self,
        id: JobId,
        now: &Now<'_>,
        daemon: &Daemon,
        of: impl Fn(&GpuState) -> bool,
    ) -> Result<(), Failure> {
        self.size(id, now, daemon, of);
        if !self.entry.handed_in.spec.after.is_empty() {
            self.job.after = dependencies(daemon, &self.entry.handed_in.spec).await?;
        }
        Ok(())
    }

    /// Finds out what those devices offer the job that it may take and `of` names; each again only where something changed.
    fn size(&mut self, id: JobId, now: &Now<'_>, daemon: &Daemon, of: impl Fn(&GpuState) -> bool) {
        let HandedIn { spec, submission, account } = &self.entry.handed_in;
        let wished = |gpu: &&GpuState| match (&submission.device_uuid, &spec.device) {
            (None, DeviceWish::Auto) => true,
            (None, DeviceWish::Index(index)) => gpu.index == *index,
            (Some(uuid), _) | (None, DeviceWish::Uuid(uuid)) => match &gpu.uuid {
                Some(its) => its == uuid,
                // A card that does not answer may be the one, where no other is.
                None => !now.host.gpus.devices().iter().any(|other| other.uuid.as_ref() == Some(uuid)),
            },
        };
        let history = daemon.observations.history(account.uid, &versions(&self.examined.environment));
        let mut before = std::mem::take(&mut self.cards);
        self.is_whole = true;
        for gpu in now.host.gpus.devices().iter().filter(wished) {
            let known = before.iter().position(|card| card.gpu.index == gpu.index);
            let known = known.map(|at| before.swap_remove(at));
            if !of(gpu) {
                self.is_whole &= known.is_some();
                self.cards.extend(known);
                continue;
            }
            let failed = gpu.uuid.as_ref().and_then(|uuid| now.failed.get(uuid));
            let as_before = known.filter(|card| {
                Arc::ptr_eq(&card.history, &history) && card.failed.as_ref() == failed && card.gpu == *gpu
            });
            let card = as_before.unwrap_or_else(|| OnCard {
                offer: self.offer(id, gpu, &history, now, daemon),
                gpu: gpu.clone(),
                history: Arc::clone(&history),
                failed: failed.cloned(),
            });
            self.cards.push(card);
        }
        let offered = self.cards.iter().filter(|card| of(&card.gpu));
        self.job.offers = offered.filter_map(|card| card.offer.clone()).collect();
    }

    /// Lets the job have what all its cards offered when each was looked at last.
    fn offer_all(&mut self) {
        self.job.offers = self.cards.iter().filter_map(|card| card.offer.clone()).collect();
    }

    /// Returns what a device offers the job; `None` where that cannot be said, which is a bug.
    fn offer(
        &self,
        id: JobId,
        gpu: &GpuState,
        history: &Arc<History>,
        now: &Now<'_>,
        daemon: &Daemon,
    ) -> Option<Offer> {
        let name = device_name(Some(gpu.index), gpu.uuid.as_deref());
        let Some(device) = gpu.uuid.clone() else {
            let why = gpu.card().err().map_or(format!("{name} does not answer"), |why| why.to_string());
            return Some(Offer { device: name.clone(), name, fit: Fit::Unusable { why } });
        };
        if let Some(why) = now.failed.get(&device) {
            let fit = Fit::Unusable { why: format!("{why}; `mhtraind undrain` when it is repaired") };
            return Some(Offer { device, name, fit });
        }
        match self.examined.fit(gpu, &daemon.plans, history, &daemon.config) {
            Ok((fit, _)) => Some(Offer { device, name, fit }),
            Err(failure) => {
                tracing::error!(job = id.get(), error = failure.message, "the job cannot be sized");
                None
            }
        }
    }

    /// Returns what the job would start with on a device.
    fn sized(&self, device: &str, daemon: &Daemon) -> Result<Option<Sized>, Failure> {
        let card = self.cards.iter().find(|card| card.gpu.uuid.as_deref() == Some(device));
        Ok(card
            .map(|card| self.examined.fit(&card.gpu, &daemon.plans, &card.history, &daemon.config))
            .transpose()?
            .and_then(|(_, it)| it))
    }
}

/// Waits until one of these cards has more memory free than it had. NVML tells nobody: it has to be asked.
async fn more_memory(gpus: &Gpus, had: &[(String, Bytes)]) {
    loop {
        tokio::time::sleep(MEMORY_EVERY).await;
        let (gpus, had) = (gpus.clone(), had.to_vec());
        let asked = tokio::task::spawn_blocking(move || {
            had.iter().any(|(uuid, had)| gpus.memory(uuid).is_ok_and(|memory| memory.free > *had))
        });
        // A card that does not answer is seen at the next look.
        if asked.await.unwrap_or_default() {
            return;
        }
    }
}

/// Ends a job that waits for another card and whose time is over, unless it is over already.
async fn end_in_queue(daemon: &Daemon, id: JobId, limit: Option<Duration>) -> Result<(), Failure> {
    let state = daemon.store.call(move |store| store.state(id)).await?;
    if !state.is_final() {
        // Whoever asked for the end before has it as it was asked for.
        append(daemon, id, stop::end(state.stop().unwrap_or(stop::TIME_LIMIT), limit)).await?;
    }
    daemon.over_unfollowed(id);
    Ok(())
}

/// Starts to read what is not known yet about queued jobs, their files above all. Each is a task of its own: the slow disk
/// of one user keeps nobody else waiting.
fn examine_new(daemon: &Arc<Daemon>) {
    let mut queued = daemon.queued();
    let mut of_user: BTreeMap<u32, usize> = BTreeMap::new();
    for entry in queued.values().filter(|entry| entry.examining) {
        *of_user.entry(entry.handed_in.account.uid).or_default() += 1;
    }
    for (id, entry) in queued.iter_mut() {
        if entry.examined.is_some() || entry.examining || entry.try_at > Instant::now() {
            continue;
        }
        let running = of_user.entry(entry.handed_in.account.uid).or_default();
        if *running >= EXAMINED_AT_ONCE {
            continue;
        }
        *running += 1;
        entry.examining = true;
        let (daemon, id, entry) = (Arc::clone(daemon), *id, entry.clone());
        tokio::spawn(async move {
            let answer = examined(&daemon, &entry.handed_in).await;
            if let Err(failure) = note_examined(&daemon, id, &entry, answer).await {
                tracing::error!(
                    job = id.get(),
                    error = failure.message,
                    "the queue cannot go on with the job"
                );
            }
            daemon.wake();
        });
    }
}

/// Notes what was read about a queued job, or lets it be tried again later.
async fn note_examined(
    daemon: &Daemon,
    id: JobId,
    was: &QueuedEntry,
    answer: Result<Examined, Failure>,
) -> Result<(), Failure> {
    let tries = was.tries + 1;
    let failure = match answer {
        Ok(examined) if examined.model.is_none() && matches!(was.download, Download::Over) => {
            let what =
                format!("{} was downloaded, and no cache that is known has it", was.handed_in.spec.model);
            return fail(daemon, id, what, Some("name its directory as the model".to_owned())).await;
        }
        Ok(examined) => {
            if let Some(entry) = daemon.queued().get_mut(&id) {
                entry.examining = false;
                entry.examined = Some(Arc::new(examined));
            }
            return Ok(());
        }
        Err(failure) => failure,
    };
    if tries >= EXAMINED_MAX {
        return fail(daemon, id, failure.message, failure.help).await;
    }
    if let Some(entry) = daemon.queued().get_mut(&id) {
        entry.examining = false;
        entry.tries = tries;
        entry.try_at = Instant::now() + EXAMINE_AGAIN;
        entry.reason = failure.message;
    }
    Ok(())
}

/// Lets what queued jobs need be downloaded, unless nothing may start.
async fn download_missing(daemon: &Arc<Daemon>) -> Result<(), Failure> {
    let drained = daemon.is_drained();
    if !drained {
        for (id, failure) in download::start_due(daemon) {
            fail(daemon, id, failure.message, failure.help).await?;
        }
    }
    let under_way: Vec<(JobId, String)> = {
        let mut queued = daemon.queued();
        let waits = queued.iter_mut().filter(|(_, entry)| entry.waits_for_download());
        let tell = waits.filter_map(|(id, entry)| {
            if drained && matches!(entry.download, Download::Due) {
                entry.reason = DRAINED.to_owned();
            }
            (!entry.told).then(|| (*id, entry.reason.clone()))
        });
        tell.collect()
    };
    for (id, reason) in under_way {
        wait(daemon, id, reason).await?;
    }
    Ok(())
}

/// Examines a job away from the task that serves clients: disks may be slow.
///
/// # Errors
/// Something that the job needs is missing.
pub async fn examined(daemon: &Arc<Daemon>, handed_in: &HandedIn) -> Result<Examined, Failure> {
    let (daemon, theirs) = (Arc::clone(daemon), handed_in.clone());
    within(handed_in.account.act(move || theirs.examine(&daemon.config))).await?
}

/// Waits for what is read of a job, its files and its owner's account, but not for ever.
///
/// # Errors
/// It takes too long, or what it says.
pub async fn within<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match tokio::time::timeout(EXAMINED_WITHIN, work).await {
        Ok(done) => done,
        Err(_) => {
            let what = format!(
                "the job's files and its owner's account could not be read within {} s",
                EXAMINED_WITHIN.as_secs()
            );
            Err(Failure::failed("slow_files", what).help(
                "is the disk that holds model, data and trainer there, and does `getent passwd` answer?"
                    .to_owned(),
            ))
        }
    }
}

async fn dependencies(daemon: &Daemon, spec: &JobSpec) -> Result<Vec<Dependency>, Failure> {
    let mut found = Vec::new();
    for id in &spec.after {
        let state = match JobId::new(*id) {
            None => DependencyState::Never,
            Some(job) => {
                let state = daemon.store.call(move |store| store.state(job)).await;
                match state {
                    Ok(JobState::Succeeded { .. }) => DependencyState::Succeeded,
                    Ok(state) if !state.is_final() => DependencyState::Pending,
                    Ok(_) => DependencyState::Never,
                    Err(failure) if failure.status == Status::NotFound => DependencyState::Never,
                    Err(failure) => return Err(failure),
                }
            }
        };
        found.push(Dependency { id: *id, state });
    }
    Ok(found)
}

async fn carry_out(
    daemon: &Arc<Daemon>,
    id: JobId,
    verdict: Verdict,
    line: &BTreeMap<JobId, InLine>,
    host: &Host,
) -> Result<(), Failure> {
    match verdict {
        Verdict::Start { device } => {
            let Some(waiting) = line.get(&id) else { return Ok(()) };
            let Some(sized) = waiting.sized(&device, daemon)? else { return Ok(()) };
            begin(daemon, id, sized.with_probe(host.gpus.clone(), host.beside.clone())).await
        }
        Verdict::Fail { reason, help } => fail(daemon, id, reason, help).await,
        Verdict::Wait { reason } => {
            let reason = match host.gpus.nvml.problem(&host.gpus.library) {
                Some((problem, _)) => problem,
                None => reason,
            };
            wait(daemon, id, reason).await
        }
    }
}

/// Lets a job wait, for this reason.
async fn wait(daemon: &Daemon, id: JobId, reason: String) -> Result<(), Failure> {
    let first = {
        let mut queued = daemon.queued();
        let Some(entry) = queued.get_mut(&id) else { return Ok(()) };
        let changed = entry.reason != reason;
        entry.reason.clone_from(&reason);
        if changed {
            daemon.store.tell();
        }
        !std::mem::replace(&mut entry.told, true)
    };
    // The numbers change every second; the event only says since when it waits, and why at first.
    if first && let Err(failure) = append(daemon, id, JobEvent::Waiting { reason }).await {
        if let Some(entry) = daemon.queued().get_mut(&id) {
            entry.told = false;
        }
        return Err(failure);
    }
    Ok(())
}

/// Gives a job its device.
async fn begin(daemon: &Arc<Daemon>, id: JobId, sized: Sized) -> Result<(), Failure> {
    let Some(entry) = daemon.queued().get(&id).cloned() else { return Ok(()) };
    // An account can be removed while its job waits, and its number be given to somebody else.
    let owner = &entry.handed_in.account;
    let now = daemon.served.account(owner.uid).await;
    if !now.is_ok_and(|now| now.name == owner.name) {
        let what =
            format!("{} (uid {}), whose job it is, has no account here any more", owner.name, owner.uid);
        return fail(daemon, id, what, None).await;
    }
    let plan = sized.plan();
    let event = JobEvent::Planned {
        chosen: plan.chosen,
        rungs: plan.rungs.len(),
        tier: plan.chosen_rung().tier.clone(),
        sized: Some(serde_json::to_value(&sized).map_err(|e| Failure::new(Status::Bug, "not_json", e))?),
    };
    append(daemon, id, event).await?;
    let device = sized.device_name();
    daemon.store.note_device(id, device);
    // Cancelled while the plan was written: then it is in the queue no more.
    if daemon.queued().remove(&id).is_none() {
        return Ok(());
    }
    reach("queue.before_start", "");
    job::start(daemon, id, entry.handed_in, sized);
    Ok(())
}

async fn fail(daemon: &Daemon, id: JobId, reason: String, help: Option<String>) -> Result<(), Failure> {
    append(daemon, id, JobEvent::Failed { reason, help }).await?;
    daemon.over_unfollowed(id);
    Ok(())
}

async fn append(daemon: &Daemon, id: JobId, event: JobEvent) -> Result<(), Failure> {
    daemon.store.append(id, Record::new(now(), event)).await.map(drop)
}
