//! Which rung comes after an out-of-memory death?

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
///
/// A rung that was sized by the longest row of the data, and needed more than the interval of its prediction, contradicts that
/// row. Most of such a prediction is resident, so what grows with the batch is too small a part of it to be scaled: then the
/// predictions for rows of full length are what is scaled, down as well. The next rung still has to need less by the
/// prediction for the longest row, since a `max_length` that no row reaches changes nothing.
pub fn after_oom(
    plan: &Plan,
    dead_rung: usize,
    observed_need: Option<Bytes>,
    free_now: Option<Bytes>,
) -> Option<usize> {
    let dead = plan.rungs.get(dead_rung)?;
    let correction = Correction::of(dead, observed_need, free_now);
    let dead_need = correction.need(dead);
    let later = || plan.rungs.iter().enumerate().skip(dead_rung + 1);
    let fits = |rung: &Rung| {
        let need = correction.need(rung);
        need < dead_need
            && rung.predicted_peak_bytes < dead.predicted_peak_bytes
            && free_now.is_none_or(|free| need <= free)
    };
    let same_rows = |rung: &Rung| rung.tier.effective_batch() == dead.tier.effective_batch();
    later().find(|(_, rung)| same_rows(rung) && fits(rung)).map(|(index, _)| index).or_else(|| {
        let (index, last) = later().last()?;
        let has_room = free_now.is_none_or(|free| last.estimate.resident_bytes() <= free);
        let is_new = !plan.pass(&last.tier).passes_the_same_as(&plan.pass(&dead.tier));
        (last.tier.name == Profile::Emergency && has_room && is_new).then_some(index)
    })
}

/// By what the predictions of one plan are off.
#[derive(Copy, Clone, Debug, PartialEq)]
struct Correction {
    factor: f64,
    /// The longest row of the data is contradicted: what counts is what rows of full length would need.
    full_rows: bool,
}

impl Correction {
    fn of(dead: &Rung, observed_need: Option<Bytes>, free_now: Option<Bytes>) -> Correction {
        // Without a report this much is known: it needed more than the card had.
        let need = observed_need.or(free_now).unwrap_or(dead.predicted_peak_bytes);
        let full_rows = dead.full_rows_peak_bytes.is_some() && need > dead.estimate.high_bytes;
        let whole = Correction { factor: 1.0, full_rows };
        let predicted = whole.dynamic(dead);
        let seen = need.saturating_sub(dead.estimate.resident_bytes()).as_f64();
        if predicted <= 0.0 {
            return whole;
        }
        let factor = seen / predicted;
        Correction { factor: if full_rows { factor } else { factor.max(1.0) }, full_rows }
    }

    fn need(&self, rung: &Rung) -> Bytes {
        let dynamic = self.dynamic(rung) * self.factor;
        rung.estimate.resident_bytes().saturating_add(Bytes::from_f64(dynamic))
    }

    /// Returns the predicted bytes of a rung that grow with its batch.
    fn dynamic(&self, rung: &Rung) -> f64 {
        let full = rung.full_rows_peak_bytes.filter(|_| self.full_rows);
        let peak = full.unwrap_or(rung.predicted_peak_bytes);
        peak.saturating_sub(rung.estimate.resident_bytes()).as_f64()
    }
}
