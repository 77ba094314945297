//! What does a run leave behind for the next prediction?

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::pace::Pace;
use crate::reserve::Group;
use crate::tier::Tier;
use crate::units::Bytes;
use crate::workload::TrainType;

/// Versions of what decides about memory; `None` where a part is not installed or not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Versions {
    /// torch: allocator, autograd, kernels of sdpa.
    pub torch: Option<String>,
    /// transformers: the models' code.
    pub transformers: Option<String>,
    /// ms-swift: batches, loss, defaults.
    pub ms_swift: Option<String>,
    /// flash-attn: workspaces.
    pub flash_attn: Option<String>,
}

/// What a run has in common with others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Hub id or path.
    pub model: String,
    /// `model_type` of its config.json.
    pub family: String,
    /// What is trained.
    pub method: TrainType,
    /// How batches are formed.
    pub group: Group,
    /// What was installed.
    pub versions: Versions,
    /// Product name of the card.
    pub card: String,
}

/// What an attempt showed.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Seen {
    /// It ran: peaks from the trainer's log, its companion, or NVML. Without one of the last two it says nothing about
    /// memory.
    Peak {
        /// What torch had allocated (`max_memory_allocated`).
        allocated: Option<Bytes>,
        /// What its allocator had reserved (`max_memory_reserved`).
        reserved: Option<Bytes>,
        /// What NVML showed for its processes, CUDA context included.
        device: Option<Bytes>,
    },
    /// It ran out of memory: it needed more than this on the device, CUDA context included.
    MoreThan {
        /// What it could have had.
        limit: Bytes,
    },
}

/// One attempt as later predictions use it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Name for explanations, for example `job 12, attempt 1`.
    pub name: String,
    /// What it has in common with others.
    pub fingerprint: Fingerprint,
    /// The rung that ran; for explanations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
    /// `allocated_peak_bytes` of the estimate for that rung, by the estimator of that day.
    pub predicted: Bytes,
    /// Tokens of a row that this was predicted with; `None` in observations that were stored before it was kept, which took
    /// rows for as long as the rung lets them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sized_row: Option<u32>,
    /// What happened.
    pub seen: Seen,
    /// How fast it trained; `None` where it did too little, and in observations that were stored before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pace: Option<Pace>,
}

/// CUDA contexts that are believed: from below the smallest that is known to half a gibibyte above the usual ones.
const CONTEXT_PLAUSIBLE: RangeInclusive<Bytes> = Bytes::from_mib(200)..=Bytes::from_mib(1100);

/// Ratios of reserved to predicted memory that are believed: the widest 90 % interval that any prediction has, rounded
/// outwards. Its lower end is 0.288, of what is resident of an unknown kind of block whose weights have unknown bits; its
/// upper end is 7.77, of what grows with the batch of a model known by its name with such weights, Liger's loss and unequal
/// rows in default blocks.
pub(crate) const RATIO_PLAUSIBLE: RangeInclusive<f64> = 0.28..=8.0;

/// A ratio of what was reserved to what was predicted.
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Reading {
    /// It was this.
    Exactly(f64),
    /// It was more than this.
    MoreThan(f64),
}

impl Observation {
    /// Returns the ratio of reserved to predicted memory that it shows; `None` when it shows none, or an absurd one
    /// (a peak of another process, a prediction of another model).
    ///
    /// The allocator's own figure goes before NVML's, which is lessened by the usual CUDA context.
    pub fn reading(&self) -> Option<Reading> {
        let context = crate::estimate::CONTEXT;
        let reading = match self.seen {
            Seen::Peak { reserved: Some(reserved), .. } => Reading::Exactly(self.ratio(reserved)?),
            Seen::Peak { device: Some(device), .. } => {
                Reading::Exactly(self.ratio(device.saturating_sub(context))?)
            }
            Seen::Peak { .. } => return None,
            Seen::MoreThan { limit } => Reading::MoreThan(self.ratio(limit.saturating_sub(context))?),
        };
        let (Reading::Exactly(ratio) | Reading::MoreThan(ratio)) = reading;
        RATIO_PLAUSIBLE.contains(&ratio).then_some(reading)
    }

    /// Returns what its processes held on the card beside what the allocator had reserved: CUDA context, kernels and
    /// workspaces; `None` when it does not show both, or shows what no context is.
    ///
    /// NVML is asked now and then and the pass over the longest rows does not count for the allocator's peak, so the
    /// difference can be of two moments.
    pub fn context(&self) -> Option<Bytes> {
        let Seen::Peak { reserved: Some(reserved), device: Some(device), .. } = self.seen else {
            return None;
        };
        device.checked_sub(reserved).filter(|context| CONTEXT_PLAUSIBLE.contains(context))
    }

    fn ratio(&self, bytes: Bytes) -> Option<f64> {
        (self.predicted > Bytes::ZERO).then(|| bytes.as_f64() / self.predicted.as_f64())
    }
}
