//! What does one card offer to a job?

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// CUDA compute capability, for example 8.6 on an RTX 3090 and 9.0 on an H100.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComputeCapability {
    /// Generation of the chip: 7 Volta and Turing, 8 Ampere and Ada, 9 Hopper, 10 and up Blackwell.
    pub major: u32,
    /// Variant inside the generation.
    pub minor: u32,
}

impl ComputeCapability {
    /// FlashAttention-2 and bf16 arithmetic need Ampere (sm 80) or later.
    pub const AMPERE: ComputeCapability = ComputeCapability { major: 8, minor: 0 };
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Text that is no compute capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no compute capability (write for example 8.0, 8.6 or 9.0)")]
pub struct ParseCapabilityError {
    text: String,
}

impl FromStr for ComputeCapability {
    type Err = ParseCapabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.trim().split_once('.').and_then(|(major, minor)| {
            Some(ComputeCapability { major: major.parse().ok()?, minor: minor.parse().ok()? })
        });
        parts.ok_or_else(|| ParseCapabilityError { text: text.to_owned() })
    }
}

impl Serialize for ComputeCapability {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ComputeCapability {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One card as the sizing engine sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Product name, for people.
    pub name: String,
    /// NVML index; `None` when the card is described by flags and not probed.
    pub index: Option<u32>,
    /// Usable memory: what NVML calls total, less what the driver reserves.
    pub total: Bytes,
    /// Memory that a new job can take now.
    pub free: Bytes,
    /// Compute capability; `None` when it could not be read, and then the card is taken for Ampere.
    pub compute_capability: Option<ComputeCapability>,
}
