//! Which rung is the best that fits?

use serde::Serialize;

use crate::estimate::{Estimate, EstimateError};
use crate::ladder::TierBook;
use crate::request::Request;
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

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The model or a pinned value cannot be estimated.
    #[error("cannot predict the memory")]
    Estimate(#[from] EstimateError),
}

impl PlanError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            PlanError::Estimate(error) => error.help(),
        }
    }
}

/// Returns every rung in order and the one to start at.
pub fn plan(_request: &Request, _book: &TierBook) -> Result<Plan, PlanError> {
    Err(EstimateError::OutOfRange { what: "plan", value: "WIP".into(), bounds: "WIP" }.into())
}

/// Returns the rung to try after the attempt at `dead_rung` ran out of device memory; `None` when nothing is left.
///
/// `observed_need` is what the out-of-memory message says the attempt would have needed, `free_now` what the card
/// has free for us.
pub fn after_oom(
    _plan: &Plan,
    _dead_rung: usize,
    _observed_need: Option<Bytes>,
    _free_now: Option<Bytes>,
) -> Option<usize> {
    None
}
