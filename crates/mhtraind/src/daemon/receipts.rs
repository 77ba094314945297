//! Who tells a receipt of an end that nobody was there to write down?
//!
//! The one who follows a job writes its receipt last, after the end is in the store. A daemon that is killed in between leaves
//! a receipt.json that says `running`, and a job that ends in the queue after its first attempt has nobody who follows it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::receipt::Receipt;
use mhtrain_job::spec::JobSpec;
use mhtrain_store::JobId;
use tokio::sync::mpsc;

use super::Daemon;
use super::submission::Submission;
use crate::engine::directory::{JobDirectory, Lasting, read_receipt, receipt_id, write_receipt_in};
use crate::engine::prepare;
use crate::failure::{Failure, Status};

/// How many of the jobs that ended last are looked at when a daemon starts. Between an end and its receipt are at most those that
/// ran when the daemon before was killed.
const LOOKED_AT: u32 = 256;

/// Takes the numbers of jobs that have ended, and whose receipts do not tell it yet.
#[derive(Debug)]
pub struct DueReceipts(mpsc::UnboundedSender<JobId>);

impl DueReceipts {
    /// Returns where numbers go in, and where they come out.
    pub fn new() -> (DueReceipts, mpsc::UnboundedReceiver<JobId>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (DueReceipts(sender), receiver)
    }

    /// Lets the receipt of a job be brought up to date soon; from any thread.
    pub fn is_due(&self, id: JobId) {
        // Nobody takes it when the daemon ends; the next one looks by itself.
        let _at_the_next_start = self.0.send(id);
    }
}

/// Brings receipts up to date: at first those that the daemon before left, then those that are due.
pub async fn keep_up_to_date(daemon: Arc<Daemon>, mut due: mpsc::UnboundedReceiver<JobId>) {
    match daemon.store.call(|store| store.ended_last(LOOKED_AT)).await {
        Ok(ids) => ids.into_iter().for_each(|id| bring_soon(&daemon, id)),
        Err(failure) => tracing::warn!(error = failure.message, "receipts are not looked at"),
    }
    while let Some(id) = due.recv().await {
        bring_soon(&daemon, id);
    }
}

/// A task of its own for each: the slow disk of one user keeps nobody else waiting.
fn bring_soon(daemon: &Arc<Daemon>, id: JobId) {
    let daemon = Arc::clone(daemon);
    tokio::spawn(async move {
        if let Err(failure) = bring_up_to_date(&daemon, id).await {
            let what = "the receipt does not tell how the job ended; the next daemon tries it again";
            tracing::warn!(job = id.get(), error = failure.message, what);
        }
    });
}

async fn bring_up_to_date(daemon: &Daemon, id: JobId) -> Result<(), Failure> {
    unfollowed(daemon, id).await;
    let read = daemon.store.call(move |store| Ok((store.job(id)?, store.brief_events(id)?))).await;
    let (job, records) = match read {
        // Removed meanwhile.
        Err(failure) if failure.status == Status::NotFound => return Ok(()),
        read => read?,
    };
    if !records.iter().any(|record| matches!(record.event, JobEvent::AttemptStarting(_))) {
        // Nothing of it is in its output directory.
        return Ok(());
    }
    let Some(account) = daemon.served.account_of(&job.row.owner).await else {
        let what = format!("{} is not known on this host any more", job.row.owner.name);
        return Err(Failure::failed("no_owner", what));
    };
    let unreadable = |e: &dyn std::fmt::Display| Failure::new(Status::Bug, "unreadable_job", e);
    let spec = JobSpec::from_value(&job.row.spec).map_err(|e| unreadable(&e))?;
    let submission: Submission = serde_json::from_value(job.context).map_err(|e| unreadable(&e))?;
    let output_dir = prepare::output_dir(&spec, &submission.origin(&account, &daemon.config));
    let own = daemon.job_dir(id);
    account.act(move || end_receipt(&output_dir, own, id, &records)).await?
}

/// Waits until no thread follows the job any more: it may write the receipt itself, and has the output directory.
async fn unfollowed(daemon: &Daemon, id: JobId) {
    let mut happenings = daemon.store.happenings();
    loop {
        happenings.mark_unchanged();
        if !daemon.live().contains_key(&id) || happenings.changed().await.is_err() {
            return;
        }
    }
}

/// Writes the end of a job that is over into its receipt, beside the store and, where that is still the job's, in its output
/// directory.
fn end_receipt(output_dir: &Path, own: PathBuf, id: JobId, records: &[Record]) -> Result<(), Failure> {
    let told = Receipt::from_events(Some(id.get()), records);
    let is_told = || read_receipt(&own).is_some_and(|kept| kept.state == told.state);
    if told.ended_at.is_none() || !own.is_dir() || is_told() {
        return Ok(());
    }
    let is_theirs = || receipt_id(output_dir) == Some(id.get());
    let text = |kept| {
        let receipt = Receipt::up_to_date(kept, told.clone());
        serde_json::to_vec_pretty(&receipt).map_err(|e| Failure::new(Status::Bug, "not_json", e))
    };
    if !is_theirs() {
        // It was removed, or a later job set it aside.
        return write_receipt_in(&own, &text(read_receipt(&own))?, Lasting::OverPowerCut);
    }
    let directory = JobDirectory::open_beside(output_dir, own.clone())?;
    // Only now does nobody else write there.
    if is_told() || !is_theirs() {
        return Ok(());
    }
    directory.write_receipt(&text(read_receipt(&own))?, Lasting::OverPowerCut)
}
