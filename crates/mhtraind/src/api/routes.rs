//! What does the daemon answer?

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::receipt::Receipt;
use mhtrain_job::secrets::is_secret_name;
use mhtrain_job::spec::{DeviceWish, JobSpec};
use mhtrain_probe::nvml::probe_gpus;
use mhtrain_sizing::tier::Tier;
use mhtrain_store::{Filter, JobId, JobRow, NewJob, Owner, SampleOf};
use mhtrain_supervisor::LogTail;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::types::{
    DaemonView, FollowLine, JobList, JobView, Progress, SeriesPoint, SubmitAnswer, SubmitRequest,
};
use crate::daemon::{Daemon, Peer, QueuedEntry, Submission, examined};
use crate::engine::journal::now;
use crate::engine::prepare;
use crate::failure::{Failure, Status};

/// Longest request body: a job file of 10 MiB with what surrounds it.
const BODY_BYTES_MAX: usize = 11 << 20;

/// Most jobs of one page.
const PAGE_MAX: u32 = 1000;

/// Names of the states of a job.
const STATES: [&str; 8] =
    ["queued", "waiting", "starting", "running", "recovering", "succeeded", "failed", "cancelled"];

/// How often a followed log is read when nothing tells of news.
const LOG_LOOK: Duration = Duration::from_millis(300);

/// Lines and chunks that wait for a slow client; then the sender waits too.
const STREAM_BUFFER: usize = 16;

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Peer {
        // Who cannot be told is nobody that we serve.
        Peer { uid: stream.io().peer_cred().map_or(u32::MAX, |credentials| credentials.uid()) }
    }
}

/// A failure on its way to a client.
struct ApiError(Failure);

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        ApiError(failure)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let failure = self.0;
        let status = match failure.status {
            Status::BadInput => StatusCode::BAD_REQUEST,
            Status::NotPermitted => StatusCode::FORBIDDEN,
            Status::NotFound => StatusCode::NOT_FOUND,
            Status::Failed => StatusCode::CONFLICT,
            Status::Done
            | Status::NoDaemon
            | Status::Bug
            | Status::WaitRanOut
            | Status::Interrupted
            | Status::Terminated => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut body = failure.to_json();
        body["error"]["exit_code"] = json!(failure.status as u8);
        (status, Json(body)).into_response()
    }
}

type Answer<T> = Result<T, ApiError>;

/// Returns the routes. `docs/openapi.json` names each of them.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/daemon", get(about))
        .route("/v1/daemon/drain", post(drain))
        .route("/v1/daemon/undrain", post(undrain))
        .route("/v1/jobs", get(list).post(submit))
        .route("/v1/jobs/{id}", get(show).delete(remove))
        .route("/v1/jobs/{id}/cancel", post(cancel))
        .route("/v1/jobs/{id}/retry", post(retry))
        .route("/v1/jobs/{id}/receipt", get(receipt))
        .route("/v1/jobs/{id}/follow", get(follow))
        .route("/v1/jobs/{id}/log", get(log))
        .route("/v1/jobs/{id}/series", get(series))
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), admit))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(daemon)
}

/// Serves clients for ever.
pub async fn serve(listener: UnixListener, daemon: Arc<Daemon>) {
    let service = router(daemon).into_make_service_with_connect_info::<Peer>();
    if let Err(error) = axum::serve(listener, service).await {
        tracing::error!(%error, "the server has ended");
    }
}

/// Lets only those in whom this daemon serves.
async fn admit(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Answer<Response> {
    daemon.account.admits(peer)?;
    Ok(next.run(request).await)
}

/// Does something to its end even when the client hangs up: a task of its own is not dropped with the connection.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = Answer<T>> + Send + 'static) -> Answer<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(Failure::new(Status::Bug, "request_panicked", e).into()))
}

async fn unknown_route(request: Request) -> ApiError {
    let what = format!("there is nothing at {} {}", request.method(), request.uri().path());
    ApiError(Failure::new(Status::NotFound, "unknown_route", what))
}

async fn about(State(daemon): State<Arc<Daemon>>) -> Json<DaemonView> {
    Json(DaemonView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        drained: daemon.is_drained(),
        active: daemon.live().len(),
        queued: daemon.queued().len(),
    })
}

async fn drain(State(daemon): State<Arc<Daemon>>) -> Answer<Json<DaemonView>> {
    set_drained(daemon, true).await
}

async fn undrain(State(daemon): State<Arc<Daemon>>) -> Answer<Json<DaemonView>> {
    set_drained(daemon, false).await
}

async fn set_drained(daemon: Arc<Daemon>, drained: bool) -> Answer<Json<DaemonView>> {
    to_the_end(async move {
        daemon.set_drained(drained).await?;
        Ok(about(State(daemon)).await)
    })
    .await
}

async fn submit(State(daemon): State<Arc<Daemon>>, body: Bytes) -> Answer<(StatusCode, Json<SubmitAnswer>)> {
    let request: SubmitRequest = serde_json::from_slice(&body)
        .map_err(|e| Failure::bad_input("bad_request", format!("the request cannot be understood: {e}")))?;
    let bad_job = |e: mhtrain_job::spec::SpecError| Failure::bad_input(e.code(), &e).help(e.help());
    let mut spec = JobSpec::from_value(&request.job).map_err(bad_job)?;
    if request.smoke {
        spec = JobSpec::from_value(&smoke(spec.to_json())).map_err(bad_job)?;
    }
    spec.check_supported().map_err(bad_job)?;
    if !std::path::Path::new(&request.cwd).is_absolute() || !std::path::Path::new(&request.cwd).is_dir() {
        let what = format!("the working directory `{}` is no absolute path of a directory", request.cwd);
        return Err(Failure::bad_input("bad_cwd", what).into());
    }
    let config = &daemon.config;
    let passes = |name: &String| config.trainer.passes(name) && !is_secret_name(name);
    let submission = Submission {
        cwd: PathBuf::from(&request.cwd),
        env: request.env.into_iter().filter(|(name, _)| passes(name)).collect(),
        umask: request.umask & 0o777,
        device_uuid: device_uuid(&spec.device, config.nvml_library()).await?,
        retry_of: None,
    };
    // Relative paths are the submitter's: stored absolute, they mean the same wherever they are read.
    spec.output_dir = prepare::output_dir(&spec, &submission.cwd).display().to_string();
    to_the_end(async move { accept(&daemon, spec, submission, request.key).await }).await
}

/// Accepts a job: when this returns without an error the job is on disk.
async fn accept(
    daemon: &Arc<Daemon>,
    spec: JobSpec,
    submission: Submission,
    key: Option<String>,
) -> Answer<(StatusCode, Json<SubmitAnswer>)> {
    let known = examined(daemon, spec.clone(), &submission).await?;
    let event = JobEvent::Submitted { spec: spec.to_json() };
    let account = &daemon.account;
    let new = NewJob {
        owner: Owner { uid: account.uid, gid: account.gid, name: account.name.clone() },
        key,
        record: Record::new(now(), event),
        name: spec.name.clone(),
        priority: i64::from(spec.priority),
        context: serde_json::to_value(&submission).map_err(|e| Failure::new(Status::Bug, "not_json", e))?,
    };
    let submitted = daemon.store.call(move |store| store.submit(&new)).await?;
    let id = submitted.id.get();
    if !submitted.existed {
        daemon.queued().insert(id, QueuedEntry::new(spec, submission, Some(Arc::new(known))));
        daemon.store.tell();
        daemon.wake();
    }
    let status = if submitted.existed { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(SubmitAnswer { id, existing: submitted.existed, notes: Vec::new() })))
}

/// Returns the UUID of the wished card; `None` where any will do, or NVML does not answer now.
async fn device_uuid(wish: &DeviceWish, library: Option<PathBuf>) -> Result<Option<String>, Failure> {
    let index = match wish {
        DeviceWish::Auto => return Ok(None),
        DeviceWish::Uuid(uuid) => return Ok(Some(uuid.clone())),
        DeviceWish::Index(index) => *index,
    };
    let report = tokio::task::spawn_blocking(move || probe_gpus(library.as_deref()))
        .await
        .map_err(|e| Failure::new(Status::Bug, "nvml_thread", e))?;
    let count = report.devices().len();
    if count == 0 {
        return Ok(None);
    }
    let card = report.devices().iter().find(|gpu| gpu.index == index);
    let card = card.ok_or_else(|| {
        Failure::failed(
            "no_device",
            format!("there is no GPU {index}: this machine has {count}, numbered from 0"),
        )
        .help("`mhtraind probe` lists the cards".to_owned())
    })?;
    Ok(card.uuid.clone())
}

/// Returns the job cut down to two steps, a save and an evaluation on 64 rows, in a directory of its own.
fn smoke(mut job: Value) -> Value {
    let steps = [("max_steps", 2), ("save_steps", 2), ("logging_steps", 1)];
    for (name, value) in steps {
        job["args"][name] = json!(value);
    }
    if !job["validation"].is_null() {
        job["args"]["eval_steps"] = json!(2);
    }
    if let Some(datasets) = job["dataset"].as_array_mut() {
        for dataset in datasets {
            let name = dataset.as_str().unwrap_or_default();
            let name = name.rsplit_once('#').map_or(name, |(name, _)| name);
            *dataset = json!(format!("{name}#64"));
        }
    }
    let output_dir = job["output_dir"].as_str().unwrap_or("output").trim_end_matches('/').to_owned();
    job["output_dir"] = json!(format!("{output_dir}-smoke"));
    job
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    limit: Option<u32>,
    after_id: Option<u64>,
    state: Option<String>,
}

async fn list(State(daemon): State<Arc<Daemon>>, Query(query): Query<ListQuery>) -> Answer<Json<JobList>> {
    let limit = query.limit.unwrap_or(100).clamp(1, PAGE_MAX);
    let states: Vec<String> =
        query.state.iter().flat_map(|states| states.split(',')).map(str::to_owned).collect();
    if let Some(unknown) = states.iter().find(|state| !STATES.contains(&state.as_str())) {
        let what = format!("there is no state `{unknown}`");
        return Err(Failure::bad_input("unknown_state", what)
            .help(format!("known are {}", STATES.join(", ")))
            .into());
    }
    let filter =
        Filter { states, after: query.after_id.and_then(JobId::new), limit: limit + 1, ..Filter::default() };
    let mut found = daemon
        .store
        .call(move |store| {
            let rows = store.jobs(&filter)?;
            rows.into_iter()
                .map(|row| Ok((last_tier(&store.events(row.id)?), row)))
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_after_id = found.last().filter(|_| more).map(|(_, row)| row.id.get());
    let jobs = found.into_iter().map(|(tier, row)| view(&daemon, row, tier)).collect();
    Ok(Json(JobList { jobs, next_after_id }))
}

fn last_tier(records: &[Record]) -> Option<Tier> {
    records.iter().rev().find_map(|record| match &record.event {
        JobEvent::AttemptStarting(start) => Some(start.tier.clone()),
        JobEvent::Planned { tier, .. } => Some(tier.clone()),
        _ => None,
    })
}

fn view(daemon: &Daemon, row: JobRow, tier: Option<Tier>) -> JobView {
    let id = row.id.get();
    let live = daemon.live().get(&id).cloned();
    let waits_for = daemon.queued().get(&id).map(|entry| entry.reason.clone());
    let text = |key: &str| row.spec.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    JobView {
        id,
        progress: live.as_ref().and_then(|live| live.progress()).filter(|_| !row.is_final),
        device: live.as_ref().map(|live| live.device.clone()).or(row.device),
        device_uuid: live.as_ref().and_then(|live| live.device_uuid.clone()),
        reason: waits_for.or(row.reason),
        output_dir: text("output_dir"),
        labels: row.spec.get("labels").cloned().unwrap_or_default(),
        name: row.name,
        state: row.state,
        attempt: row.attempts,
        tier,
        submitted_at: row.submitted_at,
        updated_at: row.updated_at,
        owner: row.owner.name,
        priority: row.priority,
    }
}

async fn one(daemon: &Daemon, id: u64) -> Result<JobView, Failure> {
    let id = job_id(id)?;
    let (tier, row) =
        daemon.store.call(move |store| Ok((last_tier(&store.events(id)?), store.job(id)?.row))).await?;
    Ok(view(daemon, row, tier))
}

fn job_id(id: u64) -> Result<JobId, Failure> {
    JobId::new(id)
        .ok_or_else(|| Failure::new(Status::NotFound, "no_such_job", format!("there is no job {id}")))
}

async fn show(State(daemon): State<Arc<Daemon>>, Path(id): Path<u64>) -> Answer<Json<JobView>> {
    Ok(Json(one(&daemon, id).await?))
}

async fn cancel(State(daemon): State<Arc<Daemon>>, Path(id): Path<u64>) -> Answer<Json<JobView>> {
    to_the_end(async move {
        let job = one(&daemon, id).await?;
        if !daemon.cancel(job_id(id)?).await? {
            let what = format!("job {id} is over: it is {}", job.state);
            return Err(Failure::failed("over", what).into());
        }
        Ok(Json(one(&daemon, id).await?))
    })
    .await
}

async fn retry(
    State(daemon): State<Arc<Daemon>>,
    Path(id): Path<u64>,
) -> Answer<(StatusCode, Json<SubmitAnswer>)> {
    let job = job_id(id)?;
    let old = daemon.store.call(move |store| store.job(job)).await?;
    if !matches!(old.row.state.as_str(), "failed" | "cancelled") {
        let what = format!("job {id} is {}: only failed and cancelled jobs are tried again", old.row.state);
        return Err(Failure::failed("not_over", what).into());
    }
    let spec =
        JobSpec::from_value(&old.row.spec).map_err(|e| Failure::bad_input(e.code(), &e).help(e.help()))?;
    let mut submission: Submission =
        serde_json::from_value(old.context).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
    submission.retry_of = Some(id);
    to_the_end(async move { accept(&daemon, spec, submission, None).await }).await
}

async fn remove(State(daemon): State<Arc<Daemon>>, Path(id): Path<u64>) -> Answer<StatusCode> {
    let job = job_id(id)?;
    if daemon.live().contains_key(&id) {
        return Err(Failure::failed("not_over", format!("job {id} is not over yet")).into());
    }
    to_the_end(async move { forget(&daemon, job).await }).await
}

async fn forget(daemon: &Daemon, job: JobId) -> Answer<StatusCode> {
    let id = job.get();
    daemon.store.call(move |store| store.remove(job)).await?;
    let own = daemon.job_dir(id);
    match std::fs::remove_dir_all(&own) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(job = id, %error, "the job's own files cannot be removed");
        }
        _ => {}
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn receipt(State(daemon): State<Arc<Daemon>>, Path(id): Path<u64>) -> Answer<Json<Value>> {
    let job = one(&daemon, id).await?;
    let kept = std::fs::read(daemon.job_dir(id).join("receipt.json"));
    let kept: Option<Receipt> = kept.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let mut receipt = match kept {
        Some(receipt) => receipt,
        None => {
            let number = job_id(id)?;
            let row = daemon.store.call(move |store| store.job(number)).await?.row;
            let mut receipt = Receipt::new(row.spec, job.submitted_at.clone());
            receipt.id = Some(id);
            receipt
        }
    };
    receipt.state.clone_from(&job.state);
    receipt.reason = job.reason.or(receipt.reason);
    Ok(Json(serde_json::to_value(receipt).map_err(|e| Failure::new(Status::Bug, "not_json", e))?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SeriesQuery {
    attempt: Option<u32>,
}

async fn series(
    State(daemon): State<Arc<Daemon>>,
    Path(id): Path<u64>,
    Query(query): Query<SeriesQuery>,
) -> Answer<Json<Value>> {
    let job = job_id(id)?;
    let samples = daemon.store.call(move |store| store.series(job, query.attempt)).await?;
    let points = samples.into_iter().map(|SampleOf { attempt, sample }| SeriesPoint {
        attempt,
        at_ms: sample.at_ms,
        step: sample.step,
        loss: sample.loss,
        vram_bytes: sample.vram_bytes,
    });
    Ok(Json(json!({"samples": points.collect::<Vec<_>>()})))
}

/// Streams what happens to a job, a JSON object a line, until it is over.
async fn follow(State(daemon): State<Arc<Daemon>>, Path(id): Path<u64>) -> Answer<Response> {
    one(&daemon, id).await?;
    let (lines, stream) = mpsc::channel(STREAM_BUFFER);
    tokio::spawn(async move {
        // A client that hung up ends the stream; a store that cannot be read ends it too, and the client asks again.
        let _hung_up = send_happenings(&daemon, id, &lines).await;
    });
    let body = Body::from_stream(ReceiverStream::new(stream));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

type Chunk = Result<Bytes, std::io::Error>;

async fn send_happenings(daemon: &Arc<Daemon>, id: u64, lines: &mpsc::Sender<Chunk>) -> Option<()> {
    let mut happenings = daemon.store.happenings();
    let job = JobId::new(id)?;
    let (mut events, mut said, mut shown) = (0, 0, None);
    loop {
        happenings.mark_unchanged();
        // The sentences first: they were said before the end that the events tell.
        let live = daemon.live().get(&id).cloned();
        if let Some(live) = live {
            let (new, count) = live.said_since(said);
            said = count;
            for text in new {
                send(lines, &FollowLine::Said { text }).await?;
            }
        }
        let records = daemon.store.call(move |store| store.events(job)).await.ok()?;
        let count = records.len();
        for mut record in records.into_iter().skip(events) {
            if let JobEvent::Planned { sized, .. } = &mut record.event {
                *sized = None;
            }
            send(lines, &FollowLine::Event { record: serde_json::to_value(record).ok()? }).await?;
        }
        events = count;
        let view = one(daemon, id).await.ok()?;
        if shown.as_ref() != Some(&view) {
            send(lines, &FollowLine::Job { job: Box::new(view.clone()) }).await?;
            shown = Some(view.clone());
        }
        if matches!(view.state.as_str(), "succeeded" | "failed" | "cancelled")
            && !daemon.live().contains_key(&id)
        {
            return Some(());
        }
        happenings.changed().await.ok()?;
        // Several things that happen together are told together.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn send(lines: &mpsc::Sender<Chunk>, line: &FollowLine) -> Option<()> {
    let mut text = serde_json::to_vec(line).ok()?;
    text.push(b'\n');
    lines.send(Ok(Bytes::from(text))).await.ok()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogQuery {
    attempt: Option<u32>,
    #[serde(default)]
    follow: bool,
}

/// Streams a trainer's output, of the last attempt where none is named.
async fn log(
    State(daemon): State<Arc<Daemon>>,
    Path(id): Path<u64>,
    Query(query): Query<LogQuery>,
) -> Answer<Response> {
    let job = one(&daemon, id).await?;
    let attempt = query.attempt.unwrap_or(job.attempt);
    if attempt == 0 || attempt > job.attempt {
        let what = match job.attempt {
            0 => format!("job {id} has no log yet: it is {}", job.state),
            last => format!("job {id} has no attempt {attempt}: its last one is {last}"),
        };
        return Err(Failure::new(Status::NotFound, "no_log", what).into());
    }
    let (chunks, stream) = mpsc::channel(STREAM_BUFFER);
    tokio::spawn(async move {
        let _hung_up = send_log(&daemon, id, attempt, query.follow, &chunks).await;
    });
    let body = Body::from_stream(ReceiverStream::new(stream));
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

async fn send_log(
    daemon: &Arc<Daemon>,
    id: u64,
    attempt: u32,
    follow: bool,
    chunks: &mpsc::Sender<Chunk>,
) -> Option<()> {
    let path = daemon.job_dir(id).join(format!("attempt-{attempt}/trainer.log"));
    let mut tail = LogTail::new(path);
    loop {
        // Asked before reading: what is written until the end is read after it.
        let view = one(daemon, id).await.ok()?;
        let goes_on = view.attempt == attempt && daemon.live().contains_key(&id);
        loop {
            let mut chunk = Vec::new();
            tail.read_new(|bytes| chunk.extend_from_slice(bytes)).ok()?;
            if chunk.is_empty() {
                break;
            }
            chunks.send(Ok(Bytes::from(chunk))).await.ok()?;
        }
        if !follow || !goes_on {
            let mut rest = Vec::new();
            tail.drain(|bytes| rest.extend_from_slice(bytes)).ok()?;
            if !rest.is_empty() {
                chunks.send(Ok(Bytes::from(rest))).await.ok()?;
            }
            return Some(());
        }
        tokio::time::sleep(LOG_LOOK).await;
    }
}

/// Returns progress as a line shows it.
impl Progress {
    /// Returns `step/max_steps`.
    pub fn steps(&self) -> String {
        self.max_steps.map_or_else(|| format!("{}/?", self.step), |max| format!("{}/{max}", self.step))
    }
}
