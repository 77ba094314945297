//! What does `mhtraind serve` do?
//!
//! ```text
//!   clients ──HTTP over the socket──> api::routes ──┐
//!                                                   ├──> store thread (SQLite, the only writer)
//!   NVML ──> scheduler (one task) ──starts──> job threads, one for each job that has a device
//!                 ^                                 │    engine::local: launch, follow, judge, rerun
//!                 └─────────── job is over ─────────┘
//! ```
//!
//! Nothing here has to be shut down with care: every intention is on disk before its effect, trainers and their
//! recorders need nobody, and the next daemon takes them over. So the daemon may be killed at any moment.

mod accounts;
mod download;
mod job;
mod live;
mod queue;
mod receipts;
mod room;
mod service_manager;
pub mod store;
mod submission;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IsTerminal;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mhtrain_failpoint::reach;
use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::queue::Leases;
use mhtrain_job::stop;
use mhtrain_probe::nvml::Gpus;
use mhtrain_store::JobId;
use mhtrain_supervisor::FileRights;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

pub use accounts::{Account, Caller, Peer, Served};
pub use live::LiveJob;
pub use queue::{HandedIn, QueuedEntry, within};
pub use room::{Entrance, Room, SMALL_BYTES_MAX};
pub use submission::Submission;

use crate::api::routes;
use crate::cli::output;
use crate::config::Config;
use crate::engine::journal::now;
use crate::engine::observations::Observations;
use crate::engine::plans::Plans;
use crate::engine::prepare::tier_book;
use crate::engine::signals::{StopCause, StopSignals};
use crate::failure::{Failure, Status, own_unwritable, unwritable};
use receipts::DueReceipts;
use room::Arriving;
use store::StoreHandle;

/// How the names of directories begin whose job is being removed.
const REMOVED: &str = ".removed-";

/// The flag of the store that says that nothing new may start.
const DRAINED: &str = "drained";

/// The flag of the store that holds the cards that failed.
const FAILED_DEVICES: &str = "failed_devices";

/// What the daemon's tasks share.
#[derive(Debug)]
pub struct Daemon {
    /// The settings.
    pub config: Config,
    /// The site's tiers, and the plans made with them last.
    pub plans: Plans,
    /// The cards.
    pub gpus: Gpus,
    /// The store.
    pub store: StoreHandle,
    /// Whom the daemon serves.
    pub served: Served,
    /// What earlier attempts on this host showed about memory.
    pub observations: Observations,
    /// Jobs that have a device.
    live: Mutex<BTreeMap<JobId, Arc<LiveJob>>>,
    /// Jobs that wait for one.
    queued: Mutex<BTreeMap<JobId, QueuedEntry>>,
    /// What the jobs of each user take that are on their way in.
    arriving: Arriving,
    /// Wakes the scheduler.
    wake: Notify,
    /// Whether nothing new may start.
    drained: AtomicBool,
    /// Cards that failed, by UUID, each with what happened. Nothing starts there.
    failed_devices: Mutex<BTreeMap<String, String>>,
    /// Takes jobs that nobody follows to their end.
    receipts: DueReceipts,
    /// Of each user the one who hands in a job without room for it, while it is looked up.
    asking_again: room::AskingAgain,
}

impl Daemon {
    /// Returns the jobs that have a device.
    pub fn live(&self) -> MutexGuard<'_, BTreeMap<JobId, Arc<LiveJob>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the jobs that wait.
    pub fn queued(&self) -> MutexGuard<'_, BTreeMap<JobId, QueuedEntry>> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what the jobs with a device have.
    pub fn leases(&self) -> Leases {
        let live = self.live();
        let device = |live: &Arc<LiveJob>| Some((live.leased_device()?.to_owned(), live.id.get()));
        Leases {
            devices: live.values().filter_map(device).collect(),
            output_dirs: live.values().map(|live| (live.output_dir.clone(), live.id.get())).collect(),
        }
    }

    /// Returns whether nothing new may start.
    pub fn is_drained(&self) -> bool {
        self.drained.load(Ordering::Relaxed)
    }

    /// Stops or lets the starting of jobs; durable.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn set_drained(&self, drained: bool) -> Result<(), Failure> {
        self.store.call(move |store| store.set_flag(DRAINED, drained.then_some("yes"))).await?;
        reach("drain.on_disk", "");
        self.drained.store(drained, Ordering::Relaxed);
        self.store.tell();
        self.wake();
        Ok(())
    }

    /// Returns the cards that failed, by UUID, each with what happened.
    pub fn failed_devices(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.failed_devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nothing more start on a card; durable. For a thread that may wait.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn mark_failed(&self, uuid: &str, why: &str) -> Result<(), Failure> {
        let marked = {
            let mut failed = self.failed_devices();
            failed.insert(uuid.to_owned(), why.to_owned());
            serde_json::to_string(&*failed).map_err(|e| Failure::new(Status::Bug, "not_json", e))?
        };
        self.store.call_blocking(move |store| store.set_flag(FAILED_DEVICES, Some(&marked)))
    }

    /// Takes every card for good again; durable.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn forget_failed_devices(&self) -> Result<(), Failure> {
        self.store.call(|store| store.set_flag(FAILED_DEVICES, None)).await?;
        self.failed_devices().clear();
        Ok(())
    }

    /// Makes the scheduler look at the queue now.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Asks a job to end. Returns whether it was still there to be asked.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn cancel(&self, id: JobId) -> Result<bool, Failure> {
        // A job that leaves its card is in both for a moment, and in its thread nobody listens any more.
        let waits = || self.queued().contains_key(&id);
        let live = self.live().get(&id).cloned();
        let leaves = waits();
        if let Some(live) = live.filter(|_| !leaves) {
            // On disk before it is answered: should we die now, the next daemon ends the job.
            let by = StopCause::Cancel.to_string();
            self.store.append(id, Record::new(now(), JobEvent::StopRequested { by })).await?;
            live.stop();
            reach("cancel.told", "running");
            let has_left = waits();
            let ended = if has_left { self.end_stopped(id).await } else { Ok(()) };
            if let Err(failure) = ended {
                // What is on disk ends it when its turn comes.
                tracing::error!(job = id.get(), error = failure.message, "a cancelled job still waits");
            }
            return Ok(true);
        }
        if !waits() {
            return Ok(false);
        }
        // Off the queue only when it is on disk: a job whose end cannot be written still waits.
        self.store.append(id, Record::new(now(), stop::end(stop::CANCEL, None))).await?;
        self.over_unfollowed(id);
        reach("cancel.told", "queued");
        Ok(true)
    }

    /// Takes a job off the queue whose end was asked for while it left its card.
    async fn end_stopped(&self, id: JobId) -> Result<(), Failure> {
        let state = self.store.call(move |store| store.state(id)).await?;
        if !state.is_final() {
            let Some(by) = state.stop() else { return Ok(()) };
            let limit = self.queued().get(&id).and_then(|entry| entry.handed_in.spec.time_limit);
            self.store.append(id, Record::new(now(), stop::end(by, limit))).await?;
        }
        self.over_unfollowed(id);
        Ok(())
    }

    /// Takes a job off the queue, if it is there, whose end is on disk and that nobody follows: its receipt is still to tell of it.
    fn over_unfollowed(&self, id: JobId) {
        self.queued().remove(&id);
        self.receipts.is_due(id);
    }

    /// Returns where a job's own files lie. They are their owner's, and may hold traps for whoever has more rights.
    pub fn job_dir(&self, id: JobId) -> PathBuf {
        self.config.state_dir().join("jobs").join(id.to_string())
    }

    /// Forgets a job that is over, and removes its own files.
    ///
    /// They get another name first. Whoever is killed in between leaves them under it for the next daemon, which gives them
    /// back to a job that it knows. Under their own name nothing is ever removed: a store that was put back from a backup
    /// does not know jobs whose trainers run.
    ///
    /// # Errors
    /// The job is not over, the store cannot be written, or there is no thread.
    pub async fn remove(&self, id: JobId) -> Result<(), Failure> {
        let (files, apart) = (self.job_dir(id), self.removed_dir(id));
        let renamed = std::fs::rename(&files, &apart);
        reach("remove.files_apart", "");
        if let Err(failure) = self.store.call(move |store| store.remove(id)).await {
            if renamed.is_ok() {
                std::fs::rename(&apart, &files).map_err(|e| unwritable(&files, &e))?;
            }
            return Err(failure);
        }
        reach("remove.on_disk", "");
        self.remove_files(id).await
    }

    /// Returns where the files of a job lie that is being removed.
    fn removed_dir(&self, id: JobId) -> PathBuf {
        self.config.state_dir().join("jobs").join(format!("{REMOVED}{id}"))
    }

    async fn remove_files(&self, id: JobId) -> Result<(), Failure> {
        // As ourselves, because the directory lies in ours; it follows no link. There may be very many files.
        let dir = self.removed_dir(id);
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(dir)).await;
        match removed.map_err(|e| Failure::new(Status::Bug, "no_thread", e))? {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(job = id.get(), %error, "the job's own files cannot be removed");
            }
            _ => {}
        }
        Ok(())
    }

    /// Ends the removals that a killed daemon had begun.
    async fn end_removals(&self) -> Result<(), Failure> {
        let entries = std::fs::read_dir(self.config.state_dir().join("jobs"));
        let ids = entries.into_iter().flatten().flatten();
        let ids = ids
            .filter_map(|entry| JobId::new(entry.file_name().to_str()?.strip_prefix(REMOVED)?.parse().ok()?));
        for id in ids.collect::<Vec<_>>() {
            match self.store.call(move |store| store.job(id).map(drop)).await {
                Err(failure) if failure.status == Status::NotFound => self.remove_files(id).await?,
                Err(failure) => return Err(failure),
                Ok(()) => {
                    let files = self.job_dir(id);
                    std::fs::rename(self.removed_dir(id), &files).map_err(|e| unwritable(&files, &e))?;
                }
            }
        }
        Ok(())
    }

    /// Makes the directory of a job's own files, for its owner alone.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_job_dir(&self, id: JobId, account: &Account) -> Result<PathBuf, Failure> {
        let path = self.job_dir(id);
        let _as_ourselves = FileRights::of_this_process();
        self.make_jobs_dir().and_then(|()| make_dir(&path, 0o700)).map_err(own_unwritable)?;
        reach("job.directory_made", "");
        let is_theirs = |uid| std::fs::symlink_metadata(&path).is_ok_and(|found| found.uid() == uid);
        if let Some(identity) = account.identity().filter(|identity| !is_theirs(identity.uid)) {
            chown(&path, Some(identity.uid), Some(identity.gid))
                .map_err(|e| own_unwritable(unwritable(&path, &e)))?;
        }
        Ok(path)
    }

    fn make_jobs_dir(&self) -> Result<(), Failure> {
        make_dir(&self.config.state_dir().join("jobs"), mode_of_own(&self.served))
    }
}

/// Serves until a signal ends us.
///
/// # Errors
/// The store or the socket cannot be opened.
pub fn serve(config: Config) -> Result<Status, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Status::Bug, "no_runtime", e))?;
    let status = runtime.block_on(run(config));
    // Threads that follow jobs are left as they are: the next daemon goes on from what is on disk.
    runtime.shutdown_background();
    status
}

async fn run(config: Config) -> Result<Status, Failure> {
    let mut signals = StopSignals::listen()?;
    let served = Served::by_this_process(&config.daemon.admin_group)?;
    let plans = Plans::new(tier_book(&config)?);
    let state_dir = config.state_dir();
    make_dir(&state_dir, mode_of_own(&served))?;
    let (store, store_ended) = StoreHandle::open(&state_dir)?;
    let drained = store.call(|store| store.get_flag(DRAINED)).await?.is_some();
    let failed = store.call(|store| store.get_flag(FAILED_DEVICES)).await?;
    let failed_devices = failed.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let observations = Observations::new(store.call(|store| store.observations()).await?);
    let gpus = Gpus::new(config.nvml_library().as_deref());
    let (receipts, due) = DueReceipts::new();
    let daemon = Arc::new(Daemon {
        config,
        plans,
        gpus,
        store,
        served,
        observations,
        live: Mutex::default(),
        queued: Mutex::default(),
        arriving: Mutex::default(),
        wake: Notify::new(),
        drained: AtomicBool::new(drained),
        failed_devices: Mutex::new(failed_devices),
        receipts,
        asking_again: room::AskingAgain::default(),
    });
    if let Err(failure) = daemon.make_jobs_dir() {
        // Each job makes it where it is missing, and waits until that works.
        tracing::error!(error = failure.message, "no job can start until its files can be written");
    }
    reach("serve.store_open", "");
    let jobs = queue::take_up(&daemon).await?;
    reach("serve.taken_up", "");
    let socket = daemon.config.socket();
    let listener = listen(&socket).await?;
    reach("serve.listens", "");
    tracing::info!(socket = %socket.display(), state = %state_dir.display(), jobs, "serving");
    if std::io::stderr().is_terminal() {
        let socket = socket.display();
        output::note(format!(
            "serving on {socket} (unfinished jobs: {jobs}); Ctrl-C ends it, and trainers go on"
        ));
    }
    service_manager::tell(sd_notify::NotifyState::Ready);
    let scheduler = tokio::spawn(queue::schedule(Arc::clone(&daemon)));
    let watchdog = tokio::spawn(service_manager::keep_watchdog_quiet());
    tokio::spawn(service_manager::keep_status(Arc::clone(&daemon)));
    let tidied = Arc::clone(&daemon);
    tokio::spawn(async move {
        if let Err(failure) = tidied.end_removals().await {
            tracing::warn!(error = failure.message, "files of jobs that were removed are left");
        }
    });
    tokio::spawn(receipts::keep_up_to_date(Arc::clone(&daemon), due));
    let server = tokio::spawn(routes::serve(listener, Arc::clone(&daemon)));
    let cause = tokio::select! {
        cause = signals.next() => cause,
        ended = scheduler => return Err(ended_early("the scheduler", ended.err())),
        ended = server => return Err(ended_early("the server", ended.err())),
        _ = store_ended => return Err(ended_early("the store", None)),
    };
    watchdog.abort();
    service_manager::tell(sd_notify::NotifyState::Stopping);
    tracing::info!(%cause, "the daemon ends; running trainers go on");
    // A stale socket is replaced by the next daemon, so a failure here is none.
    let _stays = std::fs::remove_file(&socket);
    Ok(Status::Done)
}

fn ended_early(what: &str, error: Option<tokio::task::JoinError>) -> Failure {
    let why = error.map_or(String::new(), |error| format!(": {error}"));
    Failure::new(Status::Bug, "ended_early", format!("{what} has ended{why}")).help(
        "this is a bug of mhtraind: please report it; running trainers go on, start the daemon again"
            .to_owned(),
    )
}

/// Returns the mode of a directory of ours. Below it each user finds what is theirs; what is in it and below it is closed to
/// others.
fn mode_of_own(served: &Served) -> u32 {
    if matches!(served, Served::All { .. }) { 0o711 } else { 0o700 }
}

/// Makes a directory, or gives the one that is there the mode that it needs.
fn make_dir(path: &Path, mode: u32) -> Result<(), Failure> {
    let found = std::fs::symlink_metadata(path);
    if found.as_ref().is_ok_and(|found| found.is_dir() && found.permissions().mode() & 0o7777 == mode) {
        return Ok(());
    }
    std::fs::create_dir_all(path).map_err(|e| unwritable(path, &e))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|e| unwritable(path, &e))
}

fn another_listens(socket: &Path) -> Failure {
    Failure::failed("busy", format!("another daemon listens on {}", socket.display()))
        .help("use that one, or give this one another --socket and --state-dir".to_owned())
}

/// Listens on the socket. One that a dead daemon left is replaced; a live daemon there is an error.
async fn listen(socket: &Path) -> Result<UnixListener, Failure> {
    if let Some(parent) = socket.parent().filter(|parent| !parent.is_dir()) {
        // Whoever is served must come to the socket.
        make_dir(parent, if nix::unistd::geteuid().is_root() { 0o755 } else { 0o700 })?;
    }
    if std::fs::symlink_metadata(socket).is_ok_and(|found| !found.file_type().is_socket()) {
        return Err(Failure::bad_input("no_socket", format!("{} is there and no socket", socket.display()))
            .help("nothing of it is touched; name another place with --socket".to_owned()));
    }
    // Two that come to a dead daemon's socket at once must not both remove what is there, where a turn can be had.
    let _turn = turn(socket).await;
    if socket.exists() {
        if tokio::time::timeout(Duration::from_secs(1), UnixStream::connect(socket))
            .await
            .is_ok_and(|r| r.is_ok())
        {
            return Err(another_listens(socket));
        }
        std::fs::remove_file(socket).map_err(|e| unwritable(socket, &e))?;
    }
    // Who may do what is decided by the peer's credentials, so that others get a sentence and not a refusal to connect. It has its
    // name when it has its mode and is listened to, so that whoever finds it is served.
    // The other name is short, because the whole path of a socket has 107 bytes at most.
    let unnamed = socket.with_file_name(format!(".{}", std::process::id()));
    let _none_left = std::fs::remove_file(&unnamed);
    let named = UnixListener::bind(&unnamed).and_then(|listener| {
        std::fs::set_permissions(&unnamed, std::fs::Permissions::from_mode(0o666))?;
        // A daemon that was faster keeps the name. Some file systems cannot promise that.
        match renameat_with(CWD, &unnamed, CWD, socket, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(&unnamed, socket)?,
            renamed => renamed?,
        }
        Ok(listener)
    });
    named.map_err(|e| {
        let _none_left = std::fs::remove_file(&unnamed);
        match e.kind() {
            std::io::ErrorKind::AlreadyExists => another_listens(socket),
            _ => unwritable(socket, &e),
        }
    })
}

/// Waits until no other daemon looks at what is in the socket's directory; `None` where that cannot be known, or takes longer than
/// a daemon needs: whoever may read a directory may lock it, and must not keep us from starting.
async fn turn(socket: &Path) -> Option<File> {
    let directory = File::open(socket.parent()?).ok()?;
    for _ in 0..200 {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(_) => return None,
        }
    }
    None
}
