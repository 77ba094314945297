//! What did the user ask for?
//!
//! [`JobSpec::parse`] reads job.json once and strictly; after it every value is of its type and inside its range.
//! The keys with their defaults are described for people in `docs/job.md` and for programs by `mhtraind schema`.

mod args;
mod error;
mod parse;
mod read;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use mhtrain_sizing::gpu::Card;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::request::{Allow, Learning, Length, Request, Save, TrainerFeatures};
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::TrainType;
use serde_json::{Map, Value, json};

pub use args::{ABBREVIATIONS_GUARDED, FORBIDDEN_ARGS, REPEATED_ARGS};
pub use error::SpecError;
pub use parse::{ALLOW_KEYS, FORBIDDEN_ENV, KEYS, TRACKERS};

use crate::secrets::Redacted;

/// Longest job file that is read, in bytes. A job file is some kilobytes long; whatever is longer is something else.
pub const JOB_FILE_BYTES_MAX: usize = 10 * 1024 * 1024;

/// One job, version 1 of job.json, checked: every value is of its type and inside its range.
#[derive(Clone, PartialEq)]
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

impl JobSpec {
    /// Reads a job file.
    ///
    /// # Errors
    /// The first thing that is wrong with it. Pinned values are checked here too, so that a bad job file is
    /// found before anything is probed.
    pub fn parse(bytes: &[u8]) -> Result<JobSpec, SpecError> {
        parse::parse(bytes)
    }

    /// Reads a job that is JSON already; otherwise like [`JobSpec::parse`].
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn from_value(value: &Value) -> Result<JobSpec, SpecError> {
        parse::from_value(value)
    }

    /// Returns an error if the job is right but wants what this version does not do.
    ///
    /// # Errors
    /// [`SpecError::NotSupported`], with what can be done instead.
    pub fn check_supported(&self) -> Result<(), SpecError> {
        if self.devices > 1 {
            return Err(SpecError::NotSupported {
                what: "more than one device for a job (`devices` above 1)",
                instead: "set `devices` to 1 or leave it out",
            });
        }
        Ok(())
    }

    /// Returns an error if the job wants what a run in the foreground cannot do.
    ///
    /// # Errors
    /// As [`JobSpec::check_supported`], and for jobs that wait for others: a queue knows those.
    pub fn check_foreground(&self) -> Result<(), SpecError> {
        self.check_supported()?;
        if self.after.is_empty() { Ok(()) } else { Err(SpecError::WaitsForOthers) }
    }

    /// Writes the home directory where `model`, `dataset`, `validation` or `output_dir` begins with `~/`: nobody does that for the
    /// trainer, which takes such a path for the id of a hub. A home directory that is no text or not absolute changes nothing.
    pub fn expand_home(&mut self, home: &Path) {
        let Some(home) = home.to_str().filter(|_| home.is_absolute()) else { return };
        let validation = match &mut self.validation {
            Some(Validation::Datasets(datasets)) => datasets.as_mut_slice(),
            Some(Validation::Share(_)) | None => &mut [],
        };
        let single = [&mut self.model, &mut self.output_dir];
        for path in single.into_iter().chain(&mut self.dataset).chain(validation) {
            if let Some(rest) = path.strip_prefix("~/") {
                *path = format!("{}/{rest}", home.trim_end_matches('/'));
            }
        }
    }

    /// Returns the job as complete JSON: every key, defaults filled in. Reading it again gives the same job.
    pub fn to_json(&self) -> Value {
        json!({
            "model": self.model,
            "dataset": self.dataset,
            "name": self.name,
            "device": match &self.device {
                DeviceWish::Auto => json!("auto"),
                DeviceWish::Index(index) => json!(index),
                DeviceWish::Uuid(uuid) => json!(uuid),
            },
            "devices": self.devices,
            "train_type": self.train_type,
            "length": match self.length {
                Length::Standard => json!("standard"),
                Length::Long => json!("long"),
                Length::Short => json!("short"),
                Length::Tokens(tokens) => json!(tokens),
            },
            "validation": match &self.validation {
                None => Value::Null,
                Some(Validation::Share(share)) => json!(share),
                Some(Validation::Datasets(datasets)) => json!(datasets),
            },
            "save": self.save,
            "learning": self.learning,
            "output_dir": self.output_dir,
            "report_to": self.report_to,
            "min_effective_batch": self.min_effective_batch,
            "allow": self.allow,
            "secrets": self.secrets,
            "time_limit": self.time_limit.map(|limit| limit.as_secs()),
            "args": self.args.iter().map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>(),
            "env": self.env,
            "priority": self.priority,
            "labels": self.labels,
            "after": self.after,
        })
    }

    /// Returns the question to the sizing engine that this job asks.
    ///
    /// `quant_bits` 4 in `args` makes a lora job a qlora job for the estimate: that is what it is in memory.
    ///
    /// # Errors
    /// A pinned value of the wrong type or outside of its range; none after [`JobSpec::parse`].
    pub fn sizing_request(
        &self,
        model: Model,
        card: Card,
        held_by_others: Bytes,
        features: TrainerFeatures,
        oom_risk: f64,
    ) -> Result<Request, SpecError> {
        Ok(Request {
            model,
            card,
            held_by_others,
            train_type: self.train_type_in_memory()?,
            length: self.length,
            save: self.save,
            learning: self.learning,
            min_effective_batch: self.min_effective_batch,
            allow: self.allow.clone(),
            pins: self.pins()?,
            features,
            oom_risk,
            data: None,
        })
    }
}

impl fmt::Debug for JobSpec {
    /// Hides the values of the environment. The pattern names every field, so that a new one is not forgotten.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let JobSpec {
            model,
            dataset,
            name,
            device,
            devices,
            train_type,
            length,
            validation,
            save,
            learning,
            output_dir,
            report_to,
            min_effective_batch,
            allow,
            secrets,
            time_limit,
            args,
            env,
            priority,
            labels,
            after,
        } = self;
        f.debug_struct("JobSpec")
            .field("model", model)
            .field("dataset", dataset)
            .field("name", name)
            .field("device", device)
            .field("devices", devices)
            .field("train_type", train_type)
            .field("length", length)
            .field("validation", validation)
            .field("save", save)
            .field("learning", learning)
            .field("output_dir", output_dir)
            .field("report_to", report_to)
            .field("min_effective_batch", min_effective_batch)
            .field("allow", allow)
            .field("secrets", secrets)
            .field("time_limit", time_limit)
            .field("args", args)
            .field("env", &Redacted(env))
            .field("priority", priority)
            .field("labels", labels)
            .field("after", after)
            .finish()
    }
}

#[cfg(test)]
mod tests;
