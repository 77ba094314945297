//! Which rung comes after an out-of-memory death?

use crate::estimate::Estimate;
use crate::plan::{Plan, Rung};
use crate::tier::Profile;
use crate::units::Bytes;

/// Returns the rung to try after the attempt at `dead_rung` ran out of device memory; `None` when nothing is left.
///
/// `observed_need` is what the out-of-memory message says that the attempt would have needed on the device, `free_now`
/// what the card has free for us. The part of each prediction that grows with the batch is scaled by what the dead
/// rung needed against what was predicted for it, and never down. The answer is the first later rung that, so
/// corrected, needs less than the dead one did and fits. The emergency rung is the last answer whatever is predicted for it:
/// its rows are not packed, so what it really takes may be far less. But it is none when what stays in memory is too much
/// by itself, or when it would do the pass again that has just died.
pub fn after_oom(
    plan: &Plan,
    dead_rung: usize,
    observed_need: Option<Bytes>,
    free_now: Option<Bytes>,
) -> Option<usize> {
    let dead = plan.rungs.get(dead_rung)?;
    let correction = Correction::of(dead, observed_need, free_now);
    let dead_need = correction.need(&dead.estimate);
    let later = || plan.rungs.iter().enumerate().skip(dead_rung + 1);
    let fits = |rung: &Rung| {
        let need = correction.need(&rung.estimate);
        need < dead_need && free_now.is_none_or(|free| need <= free)
    };
    let same_rows = |rung: &Rung| rung.tier.effective_batch() == dead.tier.effective_batch();
    later().find(|(_, rung)| same_rows(rung) && fits(rung)).map(|(index, _)| index).or_else(|| {
        let (index, last) = later().last()?;
        let has_room = free_now.is_none_or(|free| last.estimate.resident_bytes() <= free);
        let is_new = !last.tier.passes_the_same_as(&dead.tier);
        (last.tier.name == Profile::Emergency && has_room && is_new).then_some(index)
    })
}

/// By what the predictions of one plan are off.
#[derive(Copy, Clone, Debug, PartialEq)]
struct Correction {
    factor: f64,
}

impl Correction {
    fn of(dead: &Rung, observed_need: Option<Bytes>, free_now: Option<Bytes>) -> Correction {
        // Without a report this much is known: it needed more than the card had.
        let need = observed_need.or(free_now).unwrap_or(dead.predicted_peak_bytes);
        let resident = dead.estimate.resident_bytes();
        let predicted = dead.predicted_peak_bytes.saturating_sub(resident).as_f64();
        let seen = need.saturating_sub(resident).as_f64();
        Correction { factor: if predicted > 0.0 { (seen / predicted).max(1.0) } else { 1.0 } }
    }

    fn need(&self, estimate: &Estimate) -> Bytes {
        let resident = estimate.resident_bytes();
        let dynamic = estimate.device_peak_bytes.saturating_sub(resident);
        resident.saturating_add(Bytes::from_f64(dynamic.as_f64() * self.factor))
    }
}
