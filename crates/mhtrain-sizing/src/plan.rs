//! Which rung is the best that fits?

use serde::Serialize;

use crate::estimate::Estimate;
use crate::tier::Tier;
use crate::units::Bytes;

/// One rung of the ladder with the engine's verdict.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rung {
    /// The rung.
    pub tier: Tier,
    /// Predicted device peak, best guess.
    pub predicted_peak_bytes: Bytes,
    /// What the card must have free for this rung to be admitted at the stated risk.
    pub admission_bytes: Bytes,
    /// Whether the rung is admitted.
    pub fits: bool,
    /// Why it is, or is not, taken, with both numbers.
    pub why: String,
    /// The prediction in full.
    pub estimate: Estimate,
}

/// A sized job: every rung in order, and the one to start at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Index into `rungs` of the first attempt.
    pub chosen: usize,
    /// Rungs from the first choice to the last resort.
    pub rungs: Vec<Rung>,
    /// Effective batch of every rung.
    pub effective_batch: u64,
    /// What differs from the recipe or from what the job asked, and why; a sentence each.
    pub notes: Vec<String>,
}

impl Plan {
    /// Returns the rung that the first attempt takes.
    pub fn chosen_rung(&self) -> &Rung {
        &self.rungs[self.chosen]
    }
}
