//! Which jobs download, and what becomes of a download that failed?
//!
//! A job that waits for a model has no card: somebody else trains meanwhile. A download dies with the daemon and is begun
//! again by the next one, which goes on where it ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mhtrain_job::rerun::network_backoff;
use mhtrain_sizing::units::Bytes;
use mhtrain_store::JobId;

use super::queue::{HandedIn, QueuedEntry};
use super::{Daemon, job};
use crate::engine::download::{Downloaded, download, names};
use crate::engine::examine::Examined;
use crate::failure::{Failure, Status};

/// Downloads that run at the same time; more would only share the line.
const AT_ONCE: usize = 4;

/// The same of one user, so that others have a share.
const AT_ONCE_OF_USER: usize = 2;

/// How far the download of a job is.
#[derive(Clone, Debug, Default)]
pub enum Download {
    /// It was not begun, or it may be begun again.
    #[default]
    Due,
    /// It runs.
    UnderWay,
    /// Everything is here.
    Over,
    /// It failed, so often by now.
    Failed {
        /// How often.
        times: u32,
        /// When it is tried again; `None`: never.
        again_at: Option<Instant>,
        /// Why.
        failure: Failure,
    },
}

/// Returns whether a job may be offered cards: what it needs is here.
pub fn is_here(entry: &QueuedEntry, examined: &Examined) -> bool {
    examined.missing.is_nothing() || matches!(entry.download, Download::Over)
}

/// Starts the downloads that are due. Returns the jobs whose download failed for good.
pub fn start_due(daemon: &Arc<Daemon>) -> Vec<(JobId, Failure)> {
    let mut queued = daemon.queued();
    let mut running: BTreeMap<u32, usize> = BTreeMap::new();
    for entry in queued.values().filter(|entry| matches!(entry.download, Download::UnderWay)) {
        *running.entry(entry.handed_in.account.uid).or_default() += 1;
    }
    let mut all: usize = running.values().sum();
    let mut failed = Vec::new();
    for (id, entry) in queued.iter_mut() {
        let Some(examined) = entry.examined.clone().filter(|examined| !is_here(entry, examined)) else {
            continue;
        };
        let times = match &entry.download {
            Download::Due => 0,
            Download::Failed { times, again_at: Some(at), .. } if *at <= Instant::now() => *times,
            Download::Failed { again_at: None, failure, .. } => {
                failed.push((*id, failure.clone()));
                continue;
            }
            Download::UnderWay | Download::Over | Download::Failed { .. } => continue,
        };
        let of_user = running.entry(entry.handed_in.account.uid).or_default();
        if all >= AT_ONCE || *of_user >= AT_ONCE_OF_USER {
            entry.reason = format!("{} is downloaded after others", names(&examined.missing));
            continue;
        }
        *of_user += 1;
        all += 1;
        entry.reason = format!("downloading {}", names(&examined.missing));
        entry.download = Download::UnderWay;
        let (daemon, id, handed_in) = (Arc::clone(daemon), *id, entry.handed_in.clone());
        let work = move || {
            let done = carry_out(&daemon, id, &handed_in, &examined);
            note(&daemon, id, times, done);
        };
        if let Err(error) = std::thread::Builder::new().name(format!("download-{id}")).spawn(work) {
            tracing::error!(job = id.get(), %error, "no thread for the download");
            entry.download = Download::Due;
        }
    }
    failed
}

fn carry_out(
    daemon: &Daemon,
    id: JobId,
    handed_in: &HandedIn,
    examined: &Examined,
) -> Result<Downloaded, Failure> {
    let HandedIn { spec, submission, account } = handed_in;
    job::become_submitter(account, submission.umask)?;
    let log = daemon.make_job_dir(id, account)?.join("download.log");
    let origin = submission.origin(account, &daemon.config);
    let what = names(&examined.missing);
    download(&examined.missing, spec, &examined.environment.python, &origin, &log, |written| {
        let mut queued = daemon.queued();
        // Cancelled meanwhile: then it is in the queue no more.
        let Some(entry) = queued.get_mut(&id) else { return false };
        let so_far = written.filter(|bytes| *bytes >= Bytes::from_mib(1));
        entry.reason = match so_far {
            Some(bytes) => format!("downloading {what}: {bytes} so far"),
            None => format!("downloading {what}"),
        };
        true
    })
}

/// Notes what came of a download, and lets the queue go on.
fn note(daemon: &Daemon, id: JobId, times: u32, done: Result<Downloaded, Failure>) {
    let mut queued = daemon.queued();
    let Some(entry) = queued.get_mut(&id) else { return };
    let (temporary, failure) = match done {
        Ok(Downloaded::All) => {
            // Its files say more than its name: it is looked at again.
            entry.examined = None;
            entry.download = Download::Over;
            daemon.wake();
            return;
        }
        Ok(Downloaded::Stopped) => return,
        Ok(Downloaded::Failed { temporary, failure }) => (temporary, failure),
        Err(failure) => (failure.status == Status::Failed, failure),
    };
    let first = u64::from(daemon.config.attempt.network_backoff_s);
    let pause = network_backoff(first, times).filter(|_| temporary).map(Duration::from_secs);
    if let Some(pause) = pause {
        entry.reason = format!("{}; tried again in {} s", failure.message, pause.as_secs());
    }
    tracing::warn!(job = id.get(), error = failure.message, again = pause.is_some(), "a download failed");
    let again_at = pause.map(|pause| Instant::now() + pause);
    entry.download = Download::Failed { times: times + 1, again_at, failure };
    daemon.wake();
}
