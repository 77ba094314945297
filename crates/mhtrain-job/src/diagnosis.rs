//! Why did a trainer die, and what is the answer to it?

use std::fmt;

use mhtrain_sizing::units::Bytes;
use serde::{Deserialize, Serialize};

/// Why a trainer died. The names are those of the JSON interface.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The card had no memory for what our trainer asked.
    DeviceOom,
    /// The card had no memory because another process holds most of it.
    DeviceOomByNeighbour,
    /// The host ran out of memory, or of shared memory.
    HostOom,
    /// The disk is full.
    DiskFull,
    /// A hub or proxy could not be reached.
    Network,
    /// Ranks lost each other, or a port was in use.
    Communication,
    /// The loss is NaN or exploded.
    Diverged,
    /// The card or its driver failed.
    DeviceFault,
    /// A checkpoint cannot be read.
    CheckpointCorrupt,
    /// A model or dataset is not where it was said to be.
    MissingModelOrDataset,
    /// An argument is unknown or refused.
    BadArguments,
    /// Installed packages, driver and hardware do not fit together.
    IncompatibleEnvironment,
    /// The data cannot be trained on.
    BadData,
    /// A bug in the trainer, a plugin or the model's code.
    CodeError,
    /// Somebody stopped it.
    Interrupted,
    /// Nothing is wrong.
    Success,
    /// No known text says it.
    Unknown,
}

/// In which part of the run memory ran out.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// While the weights were loaded.
    Load,
    /// In a training step.
    Train,
    /// In an evaluation.
    Eval,
    /// While a checkpoint was written.
    Save,
}

/// What is done about a diagnosis. The names are those of the JSON interface.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The next rung that fits by corrected prediction.
    LowerTier,
    /// Wait for the memory, then the same rung.
    WaitSameTier,
    /// The same rung with expandable segments.
    SameTierExpandable,
    /// The same rung with a smaller evaluation batch.
    LowerEvalBatch,
    /// Quantise where allowed, else stop with the numbers.
    QuantizeOrStop,
    /// The same rung with fewer data-loader workers.
    FewerWorkers,
    /// Wait a little longer each time, then the same rung.
    Backoff,
    /// The same rung on another port.
    NewPort,
    /// The recipe's stable learning from the last good checkpoint.
    RecipeStable,
    /// The checkpoint before.
    PreviousCheckpoint,
    /// Another card.
    OtherDevice,
    /// Stop with the line that says why and what to do.
    Stop,
    /// Go on from the last checkpoint.
    Resume,
    /// Nothing to do.
    None,
}

/// What a diagnosis rests on. Amounts are those that the text names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The line that decided, verbatim but for colour codes; empty when no line did.
    pub line: String,
    /// What was asked for.
    pub tried_bytes: Option<Bytes>,
    /// Capacity of the card.
    pub total_bytes: Option<Bytes>,
    /// What was free.
    pub free_bytes: Option<Bytes>,
    /// What the dead process held, memory outside torch included.
    pub this_process_bytes: Option<Bytes>,
    /// What torch had allocated.
    pub allocated_bytes: Option<Bytes>,
    /// What torch had reserved in all.
    pub reserved_total_bytes: Option<Bytes>,
    /// What torch had reserved beyond what was allocated.
    pub reserved_unallocated_bytes: Option<Bytes>,
    /// What other processes held, where the text names them or arithmetic shows it.
    pub others_bytes: Option<Bytes>,
    /// The rank that failed first, where the text shows it.
    pub rank: Option<u32>,
}

/// A verdict about one dead trainer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Why it died.
    pub kind: Kind,
    /// Whether the run ended by it. A caught OOM is not fatal.
    pub fatal: bool,
    /// Whether a line or a counter proves the kind. A bare signal 9 proves nothing.
    pub certain: bool,
    /// In which part of the run it happened, where that matters.
    pub phase: Option<Phase>,
    /// What it rests on.
    pub evidence: Evidence,
    /// What is done about it.
    pub answer: Answer,
}

impl Diagnosis {
    /// Returns the diagnosis of an attempt that nobody saw end.
    pub fn interrupted() -> Diagnosis {
        Diagnosis {
            kind: Kind::Interrupted,
            fatal: true,
            certain: false,
            phase: None,
            evidence: Evidence::default(),
            answer: Answer::Resume,
        }
    }
}

impl fmt::Display for Kind {
    /// Says it in words; the JSON name is what serde writes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::DeviceOom => "out of device memory",
            Kind::DeviceOomByNeighbour => "out of device memory, taken by another process",
            Kind::HostOom => "out of host memory",
            Kind::DiskFull => "disk full",
            Kind::Network => "network or hub failed",
            Kind::Communication => "ranks lost each other",
            Kind::Diverged => "training diverged",
            Kind::DeviceFault => "card or driver failed",
            Kind::CheckpointCorrupt => "checkpoint cannot be read",
            Kind::MissingModelOrDataset => "model or dataset missing",
            Kind::BadArguments => "bad argument",
            Kind::IncompatibleEnvironment => "incompatible environment",
            Kind::BadData => "bad data",
            Kind::CodeError => "error in code",
            Kind::Interrupted => "interrupted",
            Kind::Success => "success",
            Kind::Unknown => "unknown",
        })
    }
}
