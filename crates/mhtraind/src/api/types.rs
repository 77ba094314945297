//! What travels between the daemon and its clients?

use std::collections::BTreeMap;

use mhtrain_job::state::JobState;
use mhtrain_sizing::tier::Tier;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A job that is handed in, with what its trainer gets from the submitter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubmitRequest {
    /// The job, version 1 of job.json.
    pub job: Value,
    /// The same key gives the same job: nothing is started twice.
    #[serde(default)]
    pub key: Option<String>,
    /// Two steps, a save and an evaluation on 64 rows.
    #[serde(default)]
    pub smoke: bool,
    /// Directory that relative paths are relative to.
    pub cwd: String,
    /// The submitter's environment, as far as `[trainer] pass_env` names it.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The submitter's umask.
    pub umask: u32,
}

/// The answer to a job that was handed in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SubmitAnswer {
    /// Id of the job.
    pub id: u64,
    /// Whether the key had been used for it before.
    pub existing: bool,
    /// What the submitter should know.
    pub notes: Vec<String>,
}

/// How far an attempt is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps that are done.
    pub step: u64,
    /// Optimizer steps in all.
    pub max_steps: Option<u64>,
    /// Last loss that was logged.
    pub loss: Option<f64>,
    /// Seconds to the end.
    pub eta_s: Option<f64>,
    /// Device memory that the trainer holds.
    pub vram_bytes: Option<u64>,
}

impl Progress {
    /// Returns `step/max_steps`.
    pub fn steps(&self) -> String {
        self.max_steps.map_or_else(|| format!("{}/?", self.step), |max| format!("{}/{max}", self.step))
    }
}

/// A job, as listings show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// queued, waiting, starting, running, recovering, succeeded, failed or cancelled.
    pub state: String,
    /// Why it is in that state; `None` while it runs undisturbed.
    pub reason: Option<String>,
    /// Number of its last attempt; 0 before the first.
    pub attempt: u32,
    /// Rung of its last attempt.
    pub tier: Option<Tier>,
    /// What is not as it should be, and did not stop it.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How far the running attempt is.
    pub progress: Option<Progress>,
    /// The device that it has or had: `GPU 6`.
    pub device: Option<String>,
    /// UUID of that device.
    pub device_uuid: Option<String>,
    /// When it was accepted, RFC 3339.
    pub submitted_at: String,
    /// When its state changed last, RFC 3339.
    pub updated_at: String,
    /// Who submitted it.
    pub owner: String,
    /// Higher goes first.
    pub priority: i64,
    /// For people and scripts.
    pub labels: Value,
    /// Where everything goes.
    pub output_dir: String,
}

impl JobView {
    /// Returns whether nothing more happens to it.
    pub fn is_over(&self) -> bool {
        JobState::is_final_name(&self.state)
    }
}

/// A page of jobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobList {
    /// The jobs, in order of their ids.
    pub jobs: Vec<JobView>,
    /// What to ask with for the next page; `None` on the last.
    pub next_after_id: Option<u64>,
}

/// What the daemon says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonView {
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Whether nothing new starts.
    pub drained: bool,
    /// Jobs that have a device.
    pub active: usize,
    /// Jobs that wait for one.
    pub queued: usize,
    /// Cards that failed, by UUID, each with what happened: nothing starts there until `undrain`.
    #[serde(default)]
    pub failed_devices: BTreeMap<String, String>,
}

/// A point of a job's time series.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SeriesPoint {
    /// Number of the attempt.
    pub attempt: u32,
    /// When, in milliseconds since 1970.
    pub at_ms: i64,
    /// Optimizer steps that were done.
    pub step: u64,
    /// Last loss that was logged.
    pub loss: Option<f64>,
    /// Device memory that the trainer held.
    pub vram_bytes: Option<u64>,
}

/// One line of a followed job.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FollowLine {
    /// Something happened.
    Event {
        /// As it is recorded.
        record: Value,
    },
    /// What the daemon says about the job.
    Said {
        /// A sentence for people.
        text: String,
    },
    /// How the job is now.
    Job {
        /// The job.
        job: Box<JobView>,
    },
}
