//! How does a job come in?

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use mhtrain_failpoint::reach;
use mhtrain_job::event::{JobEvent, Record};
use mhtrain_job::secrets::is_secret_name;
use mhtrain_job::spec::{DeviceWish, JOB_FILE_BYTES_MAX, JobSpec, SpecError};
use mhtrain_probe::nvml::probe_gpus;
use mhtrain_store::{JobId, NewJob, Owner};
use serde_json::{Value, json};

use super::jobs::permit;
use super::routes::{Answer, BODY_BYTES_MAX, Id, to_the_end};
use super::types::{SubmitAnswer, SubmitRequest};
use crate::config::Config;
use crate::daemon::{
    Account, Caller, Daemon, Entrance, HandedIn, QueuedEntry, Room, SMALL_BYTES_MAX, Submission, within,
};
use crate::engine::directory::holds_a_job;
use crate::engine::examine::Examined;
use crate::engine::journal::now;
use crate::engine::prepare;
use crate::failure::{Failure, Status};

/// How long a client may take to send a job.
const BODY_WITHIN: Duration = Duration::from_secs(30);

type Accepted = Answer<(StatusCode, Json<SubmitAnswer>)>;

/// Takes a new job.
pub(super) async fn submit(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Accepted {
    let bytes = body.size_hint().upper().and_then(|bytes| usize::try_from(bytes).ok());
    let bytes = bytes.map_or(BODY_BYTES_MAX, |bytes| bytes.min(BODY_BYTES_MAX));
    if bytes > SMALL_BYTES_MAX {
        // Much is read only for somebody who has an account here; of others it is found out later.
        daemon.served.account(caller.uid).await?;
    }
    let entrance = Entrance::take(&daemon, caller.uid, bytes).await?;
    let body = read(body).await?;
    let request: SubmitRequest = serde_json::from_slice(&body)
        .map_err(|e| Failure::bad_input("bad_request", format!("the request cannot be understood: {e}")))?;
    if let (Entrance::IfThere(refusal, _), None) = (&entrance, &request.key) {
        return Err(refusal.clone().into());
    }
    let mut spec = JobSpec::from_value(&request.job).map_err(bad_job)?;
    if request.smoke {
        spec = JobSpec::from_value(&smoke(spec.to_json())).map_err(bad_job)?;
    }
    spec.check_supported().map_err(bad_job)?;
    let config = &daemon.config;
    let passes = |name: &String| config.trainer.passes(name) && !is_secret_name(name);
    let submission = Submission {
        cwd: PathBuf::from(&request.cwd),
        env: request.env.into_iter().filter(|(name, _)| passes(name)).collect(),
        umask: request.umask & 0o777,
        device_uuid: device_uuid(&spec.device, config.nvml_library()).await?,
        retry_of: None,
    };
    to_the_end(async move {
        let theirs = Arc::clone(&daemon);
        match entrance {
            Entrance::Room(room) => {
                all_exist(&daemon, caller, &spec.after).await?;
                let look = move |account| {
                    look_at(placed(spec, submission, account, &theirs.config)?, &theirs.config)
                };
                let arrival = within(daemon.served.act_as(caller.uid, look)).await?;
                accept(&daemon, arrival, room, request.key).await
            }
            Entrance::IfThere(refusal, _alone) => {
                let place = move |account| placed(spec, submission, account, &theirs.config);
                let new = new_job(&within(daemon.served.act_as(caller.uid, place)).await?, request.key)?;
                let same = daemon.store.call(move |store| store.submitted_before(&new)).await?;
                same.map(existing).ok_or_else(|| refusal.into())
            }
        }
    })
    .await
}

/// Takes a failed or cancelled job once more, as a new one that goes on where it ended.
pub(super) async fn retry(
    State(daemon): State<Arc<Daemon>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Accepted {
    let owner = permit(&daemon, caller, id).await?;
    let old = daemon.store.call(move |store| store.job(id)).await?;
    if !matches!(old.row.state.as_str(), "failed" | "cancelled") {
        let what = format!("job {id} is {}: only failed and cancelled jobs are tried again", old.row.state);
        return Err(Failure::failed("not_over", what).into());
    }
    let mut spec = JobSpec::from_value(&old.row.spec).map_err(bad_job)?;
    let mut submission: Submission =
        serde_json::from_value(old.context).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
    submission.retry_of = Some(id.get());
    // Whoever asks for it, it stays its owner's.
    let account = Arc::new(daemon.served.account(owner.uid).await?);
    spec.expand_home(&account.home);
    let handed_in = HandedIn { spec, submission, account: Arc::clone(&account) };
    let room = Room::take(&daemon, account.uid, handed_in.bytes())?;
    to_the_end(async move {
        all_exist(&daemon, caller, &handed_in.spec.after).await?;
        let theirs = Arc::clone(&daemon);
        let look = account.act(move || look_at(handed_in, &theirs.config));
        let arrival = within(async { look.await? }).await?;
        accept(&daemon, arrival, room, None).await
    })
    .await
}

/// Reads a request's body.
async fn read(body: Body) -> Result<Bytes, Failure> {
    match tokio::time::timeout(BODY_WITHIN, axum::body::to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) => {
            let what = format!(
                "the request cannot be read ({error}); a job is {} MiB at most",
                JOB_FILE_BYTES_MAX >> 20
            );
            Err(Failure::bad_input("bad_request", what))
        }
        Err(_) => {
            let what = format!("the request was not whole within {} s", BODY_WITHIN.as_secs());
            Err(Failure::bad_input("slow_request", what))
        }
    }
}

fn bad_job(error: SpecError) -> Failure {
    Failure::bad_input(error.code(), &error).help(error.help())
}

/// Accepts a job: when this returns without an error the job is on disk.
async fn accept(daemon: &Arc<Daemon>, arrival: Arrival, room: Room, key: Option<String>) -> Accepted {
    let Arrival { handed_in, known, notes } = arrival;
    let new = new_job(&handed_in, key)?;
    let submitted = daemon.store.call(move |store| store.submit(&new)).await?;
    reach("submit.on_disk", "");
    if submitted.existed {
        return Ok(existing(submitted.id));
    }
    let id = submitted.id.get();
    let entry = QueuedEntry::new(handed_in, Some(Arc::new(known)));
    daemon.queued().insert(submitted.id, entry);
    drop(room);
    daemon.store.tell();
    daemon.wake();
    reach("submit.before_answer", "");
    Ok((StatusCode::CREATED, Json(SubmitAnswer { id, existing: false, notes })))
}

/// Returns the answer to whoever hands in a job that is there.
fn existing(id: JobId) -> (StatusCode, Json<SubmitAnswer>) {
    (StatusCode::OK, Json(SubmitAnswer { id: id.get(), existing: true, notes: Vec::new() }))
}

/// Returns a job as the store takes it.
fn new_job(handed_in: &HandedIn, key: Option<String>) -> Result<NewJob, Failure> {
    let HandedIn { spec, submission, account } = handed_in;
    Ok(NewJob {
        owner: Owner { uid: account.uid, gid: account.gid, name: account.name.clone() },
        key,
        record: Record::new(now(), JobEvent::Submitted { spec: spec.to_json() }),
        name: spec.name.clone(),
        priority: i64::from(spec.priority),
        context: serde_json::to_value(submission).map_err(|e| Failure::new(Status::Bug, "not_json", e))?,
    })
}

/// Checks that the jobs which a job waits for are there and may be seen.
async fn all_exist(daemon: &Daemon, caller: Caller, after: &[u64]) -> Result<(), Failure> {
    for id in after {
        must_exist(daemon, caller, *id).await?;
    }
    Ok(())
}

async fn must_exist(daemon: &Daemon, caller: Caller, id: u64) -> Result<(), Failure> {
    let unknown =
        || Failure::bad_input("no_such_job", format!("there is no job {id} that it could wait for"));
    let job = JobId::new(id).ok_or_else(unknown)?;
    match permit(daemon, caller, job).await {
        Ok(_) => Ok(()),
        Err(failure) if failure.status == Status::NotFound => Err(unknown()),
        Err(failure) => Err(failure),
    }
}

/// A job that may be accepted.
struct Arrival {
    handed_in: HandedIn,
    known: Examined,
    /// What its submitter should know.
    notes: Vec<String>,
}

/// Returns a job as it came from the owner of an account, whose file rights the calling thread has, with the directory of its
/// results as it is told from others.
fn placed(
    mut spec: JobSpec,
    submission: Submission,
    account: Account,
    config: &Config,
) -> Result<HandedIn, Failure> {
    spec.expand_home(&account.home);
    let origin = submission.origin(&account, config);
    let output_dir = prepare::output_dir(&spec, &origin);
    spec.output_dir = check_places(&origin.cwd, &output_dir, &config.state_dir())?.display().to_string();
    Ok(HandedIn { spec, submission, account: Arc::new(account) })
}

/// Reads what a job needs, with the rights of the calling thread.
fn look_at(handed_in: HandedIn, config: &Config) -> Result<Arrival, Failure> {
    let known = handed_in.examine(config)?;
    let output_dir = &handed_in.spec.output_dir;
    let is_new = handed_in.submission.retry_of.is_none();
    let note = || {
        format!("{output_dir} holds an earlier job: it is moved into previous-N there when this one starts")
    };
    let notes = (is_new && holds_a_job(Path::new(output_dir))).then(note).into_iter().collect();
    Ok(Arrival { handed_in, known, notes })
}

/// Checks the directories of a job with the rights of the calling thread: where its trainer starts, and where its results
/// go, which is not where the daemon keeps its own files. Returns the latter as it is told from others (see [`resolved`]).
fn check_places(cwd: &Path, output_dir: &Path, state_dir: &Path) -> Result<PathBuf, Failure> {
    if !cwd.is_absolute() || !cwd.is_dir() {
        let what = format!("`cwd` is `{}`, which is not the absolute path of a directory", cwd.display());
        return Err(Failure::bad_input("bad_cwd", what));
    }
    let refuse = |what: String| {
        let what = format!("the output_dir {} {what}", output_dir.display());
        Err(Failure::bad_input("bad_output_dir", what).help("choose another one".to_owned()))
    };
    let resolved = resolved(output_dir);
    let states = [state_dir.to_owned(), state_dir.canonicalize().unwrap_or_default()];
    if states.iter().any(|state| !state.as_os_str().is_empty() && resolved.starts_with(state)) {
        return refuse("is in the daemon's state directory".to_owned());
    }
    // What is missing is made later, in the nearest directory that is there.
    let Some(there) = resolved.ancestors().find(|path| path.exists()) else { return Ok(resolved) };
    if !there.is_dir() {
        return refuse(format!("cannot be: {} is no directory", there.display()));
    }
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    match rustix::fs::accessat(rustix::fs::CWD, there, access, rustix::fs::AtFlags::EACCESS) {
        Ok(()) => Ok(resolved),
        Err(error) => refuse(format!("cannot be written: {}: {error}", there.display())),
    }
}

/// Returns an absolute path without links, `.` and `..`: two spellings of one directory are the same then, and two jobs
/// that name it wait for each other.
fn resolved(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    for there in path.ancestors() {
        if let Ok(mut real) = there.canonicalize() {
            for part in missing.iter().rev() {
                match part {
                    Component::ParentDir => drop(real.pop()),
                    Component::Normal(name) => real.push(name),
                    Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
                }
            }
            return real;
        }
        missing.extend(there.components().next_back());
    }
    path.to_owned()
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
        let what = format!("there is no GPU {index}: this machine has {count}, numbered from 0");
        Failure::failed("no_device", what).help("`mhtraind probe` lists the cards".to_owned())
    })?;
    Ok(card.uuid.clone())
}

/// Returns the job cut down to two steps, a save and an evaluation on 64 rows, in a directory of its own.
fn smoke(mut job: Value) -> Value {
    for (name, value) in [("max_steps", 2), ("save_steps", 2), ("logging_steps", 1)] {
        job["args"][name] = json!(value);
    }
    if !job["validation"].is_null() {
        job["args"]["eval_steps"] = json!(2);
    }
    for dataset in job["dataset"].as_array_mut().into_iter().flatten() {
        let name = dataset.as_str().unwrap_or_default();
        let name = name.rsplit_once('#').map_or(name, |(name, _)| name);
        *dataset = json!(format!("{name}#64"));
    }
    let output_dir = job["output_dir"].as_str().unwrap_or_default().trim_end_matches('/').to_owned();
    job["output_dir"] = json!(format!("{output_dir}-smoke"));
    job
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_do_not_go_into_the_state_directory_or_where_no_directory_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::write(dir.path().join("file"), "").unwrap();
        let check = |output_dir: &Path| check_places(dir.path(), output_dir, &state);
        for wrong in
            [state.clone(), state.join("jobs/1"), dir.path().join("file"), dir.path().join("file/out")]
        {
            assert_eq!(check(&wrong).unwrap_err().code, "bad_output_dir");
        }
        check(&dir.path().join("out/deep")).unwrap();
        std::fs::create_dir(dir.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        let one = check(&dir.path().join("real/new/out")).unwrap();
        for other in ["link/new/out", "link/./new//out/", "link/../real/new/x/../out"] {
            assert_eq!(check(&dir.path().join(other)).unwrap(), one, "{other}");
        }
        std::fs::create_dir(&state).unwrap();
        std::os::unix::fs::symlink(&state, dir.path().join("hidden")).unwrap();
        assert_eq!(check(&dir.path().join("hidden/jobs")).unwrap_err().code, "bad_output_dir");
        let nowhere = check_places(&dir.path().join("file"), &dir.path().join("out"), &state);
        assert_eq!(nowhere.unwrap_err().code, "bad_cwd");
    }

    #[test]
    fn a_smoke_job_is_two_steps_on_64_rows_of_each_data_set() {
        let job = json!({"dataset": ["a.jsonl#500", "b"], "validation": 0.1, "output_dir": "out/", "args": {"lr": 1}});
        let small = smoke(job);
        assert_eq!(small["dataset"], json!(["a.jsonl#64", "b#64"]));
        assert_eq!(small["output_dir"], "out-smoke");
        let args = json!({"lr": 1, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "eval_steps": 2});
        assert_eq!(small["args"], args);
    }
}
