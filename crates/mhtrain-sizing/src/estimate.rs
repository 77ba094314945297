//! How much memory will this need?

use serde::Serialize;

use crate::units::Bytes;

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
