//! How is a plan shown to people, and what would change it?

use crate::estimate::Estimate;
use crate::ladder::TierBook;
use crate::plan::{History, Plan, plan_learned};
use crate::request::Request;
use crate::units::Bytes;
use crate::workload::TrainType;

/// Returns the terms of a prediction as one bar of at most `width` letters against `free`, and a legend.
///
/// One letter a term, in the order of the legend; `|` is where the free memory ends.
///
/// ```
/// # use mhtrain_sizing::{estimate::{Estimate, Terms}, explain::bar, units::Bytes};
/// let terms = Terms { weights: Bytes::from_gib(6), logits: Bytes::from_gib(3), ..Terms::default() };
/// let peak = Bytes::from_gib(9);
/// let estimate = Estimate {
///     allocated_peak_bytes: peak, device_peak_bytes: peak, low_bytes: peak, high_bytes: peak, terms,
/// };
/// assert_eq!(bar(&estimate, Bytes::from_gib(12), 12), "WWWWWWLLL...|  W weights 6.00 GiB, L logits 3.00 GiB");
/// ```
pub fn bar(estimate: &Estimate, free: Bytes, width: u32) -> String {
    let terms = &estimate.terms;
    let parts = [
        ('W', "weights", terms.weights),
        ('P', "adapter", terms.adapter),
        ('G', "gradients", terms.gradients),
        ('O', "optimizer", terms.optimizer),
        ('A', "activations", terms.activations),
        ('L', "logits", terms.logits),
        ('R', "reserve and context", terms.context),
    ];
    let whole = estimate.device_peak_bytes.max(free).as_f64().max(1.0);
    // Cells whose middle lies below the amount.
    let place = |bytes: f64| {
        let cells = bytes / whole * f64::from(width);
        (0..width).take_while(|cell| f64::from(*cell) + 0.5 < cells).count()
    };
    let mut bar = String::new();
    let mut sum = 0.0;
    let mut drawn = 0;
    for (letter, _, bytes) in parts {
        sum += bytes.as_f64();
        let end = place(sum);
        bar.extend(std::iter::repeat_n(letter, end.saturating_sub(drawn)));
        drawn = drawn.max(end);
    }
    let limit = place(free.as_f64());
    bar.extend(std::iter::repeat_n('.', limit.saturating_sub(drawn)));
    bar.insert(limit.min(bar.len()), '|');
    let legend: Vec<String> = parts
        .into_iter()
        .filter(|(_, _, bytes)| *bytes > Bytes::ZERO)
        .map(|(letter, name, bytes)| format!("{letter} {name} {bytes}"))
        .collect();
    format!("{bar}  {}", legend.join(", "))
}

/// Returns what would make the plan take a higher rung: more free memory, Liger's loss, 4-bit weights; a line each.
pub fn what_would_change(request: &Request, book: &TierBook, history: &History, plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    let (free, total) = (request.card.free, request.card.total);
    let nearest = plan.rungs[..plan.chosen.min(plan.rungs.len())]
        .iter()
        .filter_map(|rung| Some((rung.admission_bytes.checked_sub(free)?, rung)))
        // Nobody can free what the card does not have.
        .filter(|(missing, rung)| *missing > Bytes::ZERO && rung.admission_bytes <= total)
        .min_by_key(|(missing, _)| *missing);
    if let Some((missing, rung)) = nearest {
        lines.push(format!("+{missing} free -> {}", rung.tier));
    }
    let mut other = request.clone();
    other.allow.liger = true;
    if request.features.liger && !request.allow.liger && request.pins.liger_kernel.is_none() {
        lines.extend(better("`allow.liger`", &other, book, history, plan));
    }
    if request.train_type == TrainType::Lora && request.features.bitsandbytes && plan.can_quantise {
        let other = Request { train_type: TrainType::Qlora, ..request.clone() };
        lines.extend(better("`train_type` qlora", &other, book, history, plan));
    }
    lines
}

/// Returns the rung that another request gets, when it is a higher one.
fn better(what: &str, other: &Request, book: &TierBook, history: &History, plan: &Plan) -> Option<String> {
    let other = plan_learned(other, book, history).ok()?;
    let higher = other.rungs.len() == plan.rungs.len() && other.chosen < plan.chosen;
    higher.then(|| format!("{what} -> {}", other.chosen_rung().tier))
}
