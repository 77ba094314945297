//! How much memory will this need?

use serde::Serialize;

use crate::model::Model;
use crate::units::Bytes;
use crate::workload::Workload;

/// Why a workload cannot be estimated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EstimateError {
    /// A number of the workload is outside of what a trainer takes.
    #[error("`{what}` is {value}, and has to be {bounds}")]
    OutOfRange {
        /// Key of the workload.
        what: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        bounds: &'static str,
    },
}

impl EstimateError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            EstimateError::OutOfRange { what, bounds, .. } => Some(format!("set `{what}` to {bounds}")),
        }
    }
}

/// Returns the predicted peak of one training pass.
pub fn estimate(_model: &Model, work: &Workload) -> Result<Estimate, EstimateError> {
    Err(EstimateError::OutOfRange { what: "micro_batch", value: work.micro_batch.to_string(), bounds: "WIP" })
}

/// A predicted peak. Field names are those of the JSON interface of `mhtraind estimate`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// What torch's allocator holds at its peak.
    pub allocated_peak_bytes: Bytes,
    /// What NVML shows at the peak: allocator reserve and CUDA context included. Best guess.
    pub device_peak_bytes: Bytes,
    /// Lower end of the 90 % interval of the device peak.
    pub low_bytes: Bytes,
    /// Upper end of the 90 % interval of the device peak.
    pub high_bytes: Bytes,
    /// What the peak is made of.
    pub terms: Terms,
}

/// Parts of the device peak.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Terms {
    /// Base weights.
    pub weights: Bytes,
    /// Adapter weights.
    pub adapter: Bytes,
    /// Gradients that are alive at the peak.
    pub gradients: Bytes,
    /// Optimizer moments.
    pub optimizer: Bytes,
    /// Activations that are alive at the peak, vocabulary-wide ones aside.
    pub activations: Bytes,
    /// Vocabulary-wide activations: logits and what the loss makes of them.
    pub logits: Bytes,
    /// CUDA context, kernels and the allocator's reserve above what is allocated.
    pub context: Bytes,
}
