//! What does the daemon answer, to whom, and what does an error look like?

use std::sync::Arc;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use mhtrain_store::JobId;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::UnixListener;

use super::types::DaemonView;
use super::{connections, jobs, streams, submit};
use crate::daemon::{Caller, Daemon, Peer};
use crate::failure::{Failure, Status};

/// Longest request body: a job file of 10 MiB with what surrounds it.
pub(super) const BODY_BYTES_MAX: usize = 11 << 20;

/// Returns the routes. `docs/openapi.json` names each of them.
fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/daemon", get(about))
        .route("/v1/daemon/drain", post(drain))
        .route("/v1/daemon/undrain", post(undrain))
        .route("/v1/jobs", get(jobs::list).post(submit::submit))
        .route("/v1/jobs/{id}", get(jobs::show).delete(jobs::remove))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{id}/retry", post(submit::retry))
        .route("/v1/jobs/{id}/receipt", get(jobs::receipt))
        .route("/v1/jobs/{id}/follow", get(streams::follow))
        .route("/v1/jobs/{id}/log", get(streams::log))
        .route("/v1/jobs/{id}/series", get(jobs::series))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_route)
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), admit))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(daemon)
}

/// Serves clients for ever.
pub async fn serve(listener: UnixListener, daemon: Arc<Daemon>) {
    let of_the_house = Arc::clone(&daemon);
    connections::serve(listener, router(daemon), move |uid| of_the_house.served.serves(uid)).await;
}

/// Lets only those in whom this daemon serves. Handlers find who it is in the request: [`Caller`].
async fn admit(
    State(daemon): State<Arc<Daemon>>,
    Extension(peer): Extension<Peer>,
    mut request: Request,
    next: Next,
) -> Answer<Response> {
    let caller = match daemon.served.admit_at_once(peer) {
        Some(caller) => caller,
        None => {
            let admitted = tokio::task::spawn_blocking(move || daemon.served.admit(peer)).await;
            admitted.map_err(|e| Failure::new(Status::Bug, "no_thread", e))??
        }
    };
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
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
        failed_devices: daemon.failed_devices().clone(),
    })
}

async fn drain(state: State<Arc<Daemon>>, caller: Extension<Caller>) -> Answer<Json<DaemonView>> {
    set_drained(state, caller, true).await
}

async fn undrain(state: State<Arc<Daemon>>, caller: Extension<Caller>) -> Answer<Json<DaemonView>> {
    set_drained(state, caller, false).await
}

async fn set_drained(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    drained: bool,
) -> Answer<Json<DaemonView>> {
    caller.may_drain()?;
    to_the_end(async move {
        if !drained {
            daemon.forget_failed_devices().await?;
        }
        daemon.set_drained(drained).await?;
        Ok(about(State(daemon)).await)
    })
    .await
}

/// What a handler returns.
pub(super) type Answer<T> = Result<T, ApiError>;

/// A failure on its way to a client.
#[derive(Debug)]
pub(super) struct ApiError(Failure);

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

/// The job that a path names.
#[derive(Debug)]
pub(super) struct Id(pub(super) JobId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Id> {
        let Path(id): Path<u64> = Path::from_request_parts(parts, state)
            .await
            .map_err(|e: PathRejection| Failure::bad_input("bad_id", e.body_text()))?;
        let id = JobId::new(id)
            .ok_or_else(|| Failure::new(Status::NotFound, "no_such_job", format!("there is no job {id}")))?;
        Ok(Id(id))
    }
}

/// What stands behind the question mark.
#[derive(Debug)]
pub(super) struct Asked<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Asked<T>> {
        let Query(query): Query<T> = Query::from_request_parts(parts, state)
            .await
            .map_err(|e: QueryRejection| Failure::bad_input("bad_query", e.body_text()))?;
        Ok(Asked(query))
    }
}

/// Does something to its end even when the client hangs up: a task of its own is not dropped with the connection.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(Failure::new(Status::Bug, "request_panicked", e).into()))
}
