//! What is known about jobs, and what can be done with one?

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use mhtrain_failpoint::reach;
use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::receipt::Receipt;
use mhtrain_job::state::JobState;
use mhtrain_sizing::tier::Tier;
use mhtrain_store::{Filter, JobId, JobRow, Order, Owner, SampleOf};
use serde::Deserialize;
use serde_json::{Value, json};

use super::routes::{Answer, Asked, Id, to_the_end};
use super::types::{JobList, JobView, SeriesPoint};
use crate::daemon::{Account, Caller, Daemon};
use crate::engine::directory::read_receipt;
use crate::failure::{Failure, Status};

/// Jobs of a page where the client names no number.
const PAGE: u32 = 100;

/// Most jobs of one page.
const PAGE_MAX: u32 = 1000;

/// How long a job whose end is on disk may take to write its receipt and end its thread, once its memory is back.
pub(super) const END_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    limit: Option<u32>,
    after_id: Option<u64>,
    state: Option<String>,
    #[serde(default)]
    order: ListOrder,
}

/// In which order jobs are listed, by id.
#[derive(Copy, Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ListOrder {
    #[default]
    Oldest,
    Newest,
}

/// Returns a page of jobs.
pub(super) async fn list(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Asked(query): Asked<ListQuery>,
) -> Answer<Json<JobList>> {
    let limit = query.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        let what = format!("`limit` must be 1 to {PAGE_MAX}, it is {limit}");
        return Err(Failure::bad_input("bad_limit", what).into());
    }
    let states: Vec<String> =
        query.state.iter().flat_map(|states| states.split(',')).map(str::to_owned).collect();
    if let Some(unknown) = states.iter().find(|state| !JobState::NAMES.contains(&state.as_str())) {
        let known = format!("known are {}", JobState::NAMES.join(", "));
        return Err(Failure::bad_input("unknown_state", format!("there is no state `{unknown}`"))
            .help(known)
            .into());
    }
    // One more than asked for says whether there is another page.
    let filter = Filter {
        owner_uid: (!caller.is_admin).then_some(caller.uid),
        states,
        after: query.after_id.and_then(JobId::new),
        limit: limit + 1,
        order: match query.order {
            ListOrder::Oldest => Order::OldestFirst,
            ListOrder::Newest => Order::NewestFirst,
        },
    };
    let read = daemon.store.call(move |store| {
        let rows = store.jobs(&filter)?.into_iter();
        rows.map(|row| Ok((store.brief_events(row.id)?, row))).collect::<Result<Vec<_>, _>>()
    });
    let mut found = read.await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_after_id = found.last().filter(|_| more).map(|(_, row)| row.id.get());
    let jobs = found.into_iter().map(|(records, row)| view(&daemon, row, &records)).collect();
    Ok(Json(JobList { jobs, next_after_id }))
}

/// Returns a job.
pub(super) async fn show(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Answer<Json<JobView>> {
    permit(&daemon, caller, id).await?;
    Ok(Json(look(&daemon, id).await?.0))
}

/// Returns whose job it is, for somebody who may see and stop it.
///
/// # Errors
/// There is no such job, or it is another user's.
pub(super) async fn permit(daemon: &Daemon, caller: Caller, id: JobId) -> Result<Owner, Failure> {
    let owner = daemon.store.call(move |store| Ok(store.job(id)?.row.owner)).await?;
    caller.may_touch(id.get(), &owner)?;
    Ok(owner)
}

/// Returns a job as clients see it, and what happened to it.
pub(super) async fn look(daemon: &Daemon, id: JobId) -> Result<(JobView, Vec<Record>), Failure> {
    let read = daemon.store.call(move |store| Ok((store.job(id)?.row, store.brief_events(id)?)));
    let (row, records) = read.await?;
    Ok((view(daemon, row, &records), records))
}

fn view(daemon: &Daemon, row: JobRow, records: &[Record]) -> JobView {
    let live = daemon.live().get(&row.id).cloned();
    let waits_for = daemon.queued().get(&row.id).map(|entry| entry.reason.clone());
    let text = |key: &str| row.spec.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    JobView {
        id: row.id.get(),
        progress: live.as_ref().and_then(|live| live.progress()).filter(|_| !row.is_final),
        device: live.as_ref().map(|live| live.device.clone()).or(row.device),
        device_uuid: live.as_ref().and_then(|live| live.device_uuid.clone()),
        reason: waits_for.or(row.reason),
        tier: last_tier(records),
        warnings: warnings(records),
        output_dir: text("output_dir"),
        labels: row.spec.get("labels").cloned().unwrap_or_default(),
        name: row.name,
        state: row.state,
        attempt: row.attempts,
        submitted_at: row.submitted_at,
        updated_at: row.updated_at,
        owner: row.owner.name,
        priority: row.priority,
    }
}

fn last_tier(records: &[Record]) -> Option<Tier> {
    records.iter().rev().find_map(|record| match &record.event {
        JobEvent::AttemptStarting(start) => Some(start.tier.clone()),
        JobEvent::Planned { tier, .. } => Some(tier.clone()),
        _ => None,
    })
}

fn warnings(records: &[Record]) -> Vec<String> {
    let warning = |record: &Record| match &record.event {
        JobEvent::Warned { warning } => Some(warning.clone()),
        _ => None,
    };
    records.iter().filter_map(warning).collect()
}

/// Asks a job to end.
pub(super) async fn cancel(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Answer<Json<JobView>> {
    permit(&daemon, caller, id).await?;
    to_the_end(async move {
        look(&daemon, id).await?;
        if !daemon.cancel(id).await? {
            let what = format!("job {id} is over: it is {}", look(&daemon, id).await?.0.state);
            return Err(Failure::failed("over", what).into());
        }
        Ok(Json(look(&daemon, id).await?.0))
    })
    .await
}

/// Forgets a job that is over.
pub(super) async fn remove(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Answer<StatusCode> {
    permit(&daemon, caller, id).await?;
    settled(&daemon, id).await?;
    to_the_end(async move {
        reach("remove.before", "");
        daemon.remove(id).await?;
        reach("remove.files_gone", "");
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Returns what was chosen for a job, why, and what was retried.
pub(super) async fn receipt(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Answer<Json<Value>> {
    let owner = permit(&daemon, caller, id).await?;
    let (job, records) = settled(&daemon, id).await?;
    let directory = daemon.job_dir(id);
    let kept = Account::as_submitted(&owner).act(move || read_receipt(&directory)).await?;
    let told = Receipt::from_events(Some(id.get()), &records);
    let receipt = Receipt { reason: job.reason, ..Receipt::up_to_date(kept, told) };
    Ok(Json(serde_json::to_value(receipt).map_err(|e| Failure::new(Status::Bug, "not_json", e))?))
}

/// Returns a job as [`look`] does. One whose end is on disk is waited for until its thread has written the receipt too.
async fn settled(daemon: &Daemon, id: JobId) -> Result<(JobView, Vec<Record>), Failure> {
    let mut happenings = daemon.store.happenings();
    let memory_return = Duration::from_secs(u64::from(daemon.config.attempt.memory_return_s));
    let until = tokio::time::Instant::now() + memory_return + END_WITHIN;
    loop {
        happenings.mark_unchanged();
        let found = look(daemon, id).await?;
        if !found.0.is_over() || !daemon.live().contains_key(&id) {
            return Ok(found);
        }
        if tokio::time::timeout_at(until, happenings.changed()).await.is_err() {
            let what = format!("job {id} is {} and still being put away", found.0.state);
            return Err(Failure::failed("not_settled", what).help("ask again in a moment".to_owned()));
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SeriesQuery {
    attempt: Option<u32>,
}

/// Returns the progress of a job over time.
pub(super) async fn series(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
    Asked(query): Asked<SeriesQuery>,
) -> Answer<Json<Value>> {
    permit(&daemon, caller, id).await?;
    let samples = daemon.store.call(move |store| store.series(id, query.attempt)).await?;
    let points = samples.into_iter().map(|SampleOf { attempt, sample }| SeriesPoint {
        attempt,
        at_ms: sample.at_ms,
        step: sample.step,
        loss: sample.loss,
        vram_bytes: sample.vram_bytes,
    });
    Ok(Json(json!({"samples": points.collect::<Vec<_>>()})))
}
