//! How is a job watched while it runs?

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use mhtrain_store::JobId;
use mhtrain_supervisor::LogTail;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::jobs::{END_WITHIN, look, permit};
use super::routes::{Answer, Asked, Id};
use super::types::FollowLine;
use crate::daemon::{Account, Caller, Daemon};
use crate::failure::{Failure, Status};

/// How often a followed log is read.
const LOG_LOOK: Duration = Duration::from_millis(300);

/// What happens within this time is told together.
const TOGETHER: Duration = Duration::from_millis(100);

/// Lines and chunks that wait for a slow client; then the sender waits too.
const BUFFER: usize = 16;

type Chunk = Result<Bytes, std::io::Error>;

/// Streams what happens to a job, a JSON object a line, until it is over.
pub(super) async fn follow(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Answer<Response> {
    permit(&daemon, caller, id).await?;
    let (lines, stream) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        // A client that hung up ends the stream; a store that cannot be read ends it too, and the client asks again.
        let _hung_up = send_happenings(&daemon, id, &lines).await;
    });
    Ok(streamed("application/x-ndjson", stream))
}

fn streamed(kind: &'static str, stream: mpsc::Receiver<Chunk>) -> Response {
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(ReceiverStream::new(stream))).into_response()
}

async fn send_happenings(daemon: &Arc<Daemon>, id: JobId, lines: &mpsc::Sender<Chunk>) -> Option<()> {
    let mut happenings = daemon.store.happenings();
    let (mut events, mut said, mut shown) = (0, 0, None);
    let mut live = None;
    let put_away_within = Duration::from_secs(u64::from(daemon.config.attempt.memory_return_s)) + END_WITHIN;
    let mut over_until = None;
    loop {
        happenings.mark_unchanged();
        // Asked first: what a live job says and does is read after it, and nothing follows on the end of its thread. What
        // it said last is read from the job that was live before.
        let now = daemon.live().get(&id).cloned();
        let is_live = now.is_some();
        live = now.or(live);
        let (view, records) = look(daemon, id).await.ok()?;
        if let Some(live) = &live {
            let (new, count) = live.said_since(said);
            said = count;
            for text in new {
                send(lines, &FollowLine::Said { text }).await?;
            }
        }
        let count = records.len();
        for record in records.into_iter().skip(events) {
            send(lines, &FollowLine::Event { record: serde_json::to_value(record).ok()? }).await?;
        }
        events = count;
        let (is_over, over) = (view.is_over(), view.is_over() && !is_live);
        if shown.as_ref() != Some(&view) {
            shown = Some(view.clone());
            send(lines, &FollowLine::Job { job: Box::new(view) }).await?;
        }
        if over {
            return Some(());
        }
        if is_over {
            // A disk that does not take its receipt must not hold up who waits for its end, which is on disk.
            let until = *over_until.get_or_insert_with(|| tokio::time::Instant::now() + put_away_within);
            match tokio::time::timeout_at(until, happenings.changed()).await {
                Ok(changed) => changed.ok()?,
                Err(_) => return Some(()),
            }
        } else {
            happenings.changed().await.ok()?;
        }
        tokio::time::sleep(TOGETHER).await;
    }
}

async fn send(lines: &mpsc::Sender<Chunk>, line: &FollowLine) -> Option<()> {
    let mut text = serde_json::to_vec(line).ok()?;
    text.push(b'\n');
    lines.send(Ok(Bytes::from(text))).await.ok()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogQuery {
    attempt: Option<u32>,
    #[serde(default)]
    follow: bool,
}

/// Streams a trainer's output, of the last attempt where none is named.
pub(super) async fn log(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
    Asked(query): Asked<LogQuery>,
) -> Answer<Response> {
    let account = Account::as_submitted(&permit(&daemon, caller, id).await?);
    let (job, _) = look(&daemon, id).await?;
    let attempt = query.attempt.unwrap_or(job.attempt);
    if attempt == 0 || attempt > job.attempt {
        let what = match job.attempt {
            0 => format!("job {id} has no log yet: it is {}", job.state),
            last => format!("job {id} has no attempt {attempt}: its last one is {last}"),
        };
        return Err(Failure::new(Status::NotFound, "no_log", what).into());
    }
    let (chunks, stream) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let _hung_up = send_log(&daemon, &account, id, attempt, query.follow, &chunks).await;
    });
    Ok(streamed("text/plain; charset=utf-8", stream))
}

async fn send_log(
    daemon: &Arc<Daemon>,
    account: &Account,
    id: JobId,
    attempt: u32,
    follow: bool,
    chunks: &mpsc::Sender<Chunk>,
) -> Option<()> {
    let mut tail = LogTail::new(daemon.job_dir(id).join(format!("attempt-{attempt}/trainer.log")));
    loop {
        // Asked before reading: what is written until the end is read after it.
        let goes_on = daemon.live().contains_key(&id) && look(daemon, id).await.ok()?.0.attempt == attempt;
        loop {
            let (read, chunk) = account.act(move || read_on(tail)).await.ok()?.ok()?;
            tail = read;
            if chunk.is_empty() {
                break;
            }
            chunks.send(Ok(Bytes::from(chunk))).await.ok()?;
        }
        if !follow || !goes_on {
            return Some(());
        }
        tokio::time::sleep(LOG_LOOK).await;
    }
}

/// Reads the next piece of a log; an empty one where there is nothing new.
fn read_on(mut tail: LogTail) -> std::io::Result<(LogTail, Vec<u8>)> {
    let mut chunk = Vec::new();
    tail.read_new(|bytes| chunk.extend_from_slice(bytes))?;
    Ok((tail, chunk))
}
