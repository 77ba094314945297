//! What is there, all in one?

use std::path::{Path, PathBuf};

use mhtrain_swift::environment::TrainerEnvironment;
use serde::Serialize;

use crate::gpu::GpuReport;
use crate::host::{self, DiskSpace, HostReport};
use crate::nvml;
use crate::trainer_environment::{self, TrainerQuery};

/// Everything that was read, at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeReport {
    /// The cards.
    pub gpus: GpuReport,
    /// The host.
    pub host: HostReport,
    /// Space where the results will go.
    pub disk: Option<DiskSpace>,
    /// The trainer.
    pub trainer: TrainerReport,
}

/// The trainer, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum TrainerReport {
    /// It was found.
    Ready(TrainerEnvironment),
    /// It was not.
    Missing {
        /// Why.
        error: String,
        /// What to do.
        help: Option<String>,
    },
}

impl TrainerReport {
    /// Returns the environment, if there is one.
    pub fn environment(&self) -> Option<&TrainerEnvironment> {
        match self {
            TrainerReport::Ready(environment) => Some(environment),
            TrainerReport::Missing { .. } => None,
        }
    }
}

/// What is to be probed.
#[derive(Clone, Debug)]
pub struct ProbeQuery {
    /// The NVML library; `None`: the driver's.
    pub nvml_library: Option<PathBuf>,
    /// The trainer.
    pub trainer: TrainerQuery,
    /// Where results will go; it need not exist.
    pub output_dir: PathBuf,
}

/// Reads everything. What cannot be read is said in the report; nothing here fails as a whole.
pub fn probe(query: &ProbeQuery) -> ProbeReport {
    ProbeReport {
        gpus: nvml::probe_gpus(query.nvml_library.as_deref()),
        host: host::probe_host(),
        disk: free_disk(&query.output_dir),
        trainer: probe_trainer(&query.trainer),
    }
}

fn free_disk(output_dir: &Path) -> Option<DiskSpace> {
    let answer = host::disk_space(output_dir);
    answer.inspect_err(|error| tracing::debug!(%error, "free space is unknown")).ok()
}

fn probe_trainer(query: &TrainerQuery) -> TrainerReport {
    match trainer_environment::trainer_environment(query) {
        Ok(environment) => TrainerReport::Ready(environment),
        Err(error) => TrainerReport::Missing { error: error.to_string(), help: error.help() },
    }
}
