//! What did the user ask for?

use std::collections::BTreeMap;
use std::time::Duration;

use mhtrain_sizing::request::{Allow, Learning, Length, Save};
use mhtrain_sizing::workload::TrainType;
use serde_json::Value;

/// One job, version 1 of job.json, checked: every value is of its type and inside its range.
#[derive(Clone, Debug, PartialEq)]
pub struct JobSpec {
    /// Hub id or local directory.
    pub model: String,
    /// Hub ids or local files; never empty.
    pub dataset: Vec<String>,
    /// For people.
    pub name: String,
    /// The wished card.
    pub device: DeviceWish,
    /// How many cards.
    pub devices: u32,
    /// What is trained.
    pub train_type: TrainType,
    /// How long a row may be.
    pub length: Length,
    /// Data to evaluate on; `None`: no evaluation.
    pub validation: Option<Validation>,
    /// How often a checkpoint is written.
    pub save: Save,
    /// How boldly is learned.
    pub learning: Learning,
    /// Where everything goes; as written, relative to the submitter's working directory.
    pub output_dir: String,
    /// Experiment trackers with their settings, for example `swanlab` with `project`, `mode`, `exp_name`.
    pub report_to: BTreeMap<String, BTreeMap<String, Value>>,
    /// Smallest effective batch that is allowed.
    pub min_effective_batch: u32,
    /// What a lower rung may change.
    pub allow: Allow,
    /// Names of environment variables whose values are secrets.
    pub secrets: Vec<String>,
    /// Longest time from the first attempt's start to the end of the job.
    pub time_limit: Option<Duration>,
    /// Any other parameter of `swift sft`, by its name without dashes; pinned.
    pub args: BTreeMap<String, Value>,
    /// Environment of the trainer.
    pub env: BTreeMap<String, String>,
    /// Higher goes first (daemon).
    pub priority: i32,
    /// For people and scripts.
    pub labels: BTreeMap<String, String>,
    /// Jobs that must have succeeded before (daemon).
    pub after: Vec<u64>,
}

/// The card that a job wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceWish {
    /// The one with the best rung; ties go to the most free memory.
    #[default]
    Auto,
    /// NVML index.
    Index(u32),
    /// `GPU-…`
    Uuid(String),
}

/// Data to evaluate on.
#[derive(Clone, Debug, PartialEq)]
pub enum Validation {
    /// Share of the training data that is split off, above 0 and below 1.
    Share(f64),
    /// Data sets of their own.
    Datasets(Vec<String>),
}
