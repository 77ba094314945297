//! How is a plan shown to people, and what would change it?

use crate::estimate::Estimate;
use crate::ladder::TierBook;
use crate::plan::{History, Plan, Rung, plan_learned};
use crate::request::Request;
use crate::units::Bytes;
use crate::workload::TrainType;

/// Letters of a bar: with the name of the rung and its peak a line stays below [`LINE_WIDTH`].
const BAR_WIDTH: u32 = 56;

/// Longest line of the legend.
const LINE_WIDTH: usize = 100;

/// Returns the parts of a peak in the order in which a bar stacks them.
fn parts(estimate: &Estimate) -> [(char, &'static str, Bytes); 8] {
    let terms = &estimate.terms;
    [
        ('W', "weights", terms.weights),
        ('P', "adapter", terms.adapter),
        ('G', "gradients", terms.gradients),
        ('O', "optimizer", terms.optimizer),
        ('A', "activations", terms.activations),
        ('L', "logits", terms.logits),
        ('R', "reserve", estimate.reserve_bytes.min(terms.context)),
        ('C', "context", terms.context.saturating_sub(estimate.reserve_bytes)),
    ]
}

/// Returns the terms of a prediction as one stacked bar of `width` letters, which are the whole card.
///
/// `|` is where the free memory ends, `#` behind it is what others hold. What does not fit reaches over `|`, and what is more
/// than the card ends in `>`.
///
/// ```
/// # use mhtrain_sizing::{estimate::{Estimate, Terms}, explain::bar, units::Bytes};
/// let terms = Terms { weights: Bytes::from_gib(6), logits: Bytes::from_gib(3), ..Terms::default() };
/// let peak = Bytes::from_gib(9);
/// let estimate = Estimate {
///     allocated_peak_bytes: peak, device_peak_bytes: peak, low_bytes: peak, high_bytes: peak, terms,
///     reserve_bytes: Bytes::ZERO,
/// };
/// let card = Bytes::from_gib(16);
/// assert_eq!(bar(&estimate, Bytes::from_gib(12), card, 16), "[WWWWWWLLL...|####]");
/// assert_eq!(bar(&estimate, Bytes::from_gib(7), card, 16), "[WWWWWWL|LL#######]");
/// assert_eq!(bar(&estimate, Bytes::from_gib(8), Bytes::from_gib(8), 8), "[WWWWWWLL|>");
/// ```
pub fn bar(estimate: &Estimate, free: Bytes, total: Bytes, width: u32) -> String {
    let whole = total.max(free);
    let letter = |middle: f64| {
        let mut sum = 0.0;
        let term = parts(estimate).into_iter().find(|(_, _, bytes)| {
            sum += bytes.as_f64();
            middle < sum
        });
        match term {
            Some((letter, _, _)) => letter,
            None if middle < free.as_f64() => '.',
            None => '#',
        }
    };
    let middles =
        (0..width).map(|cell| (f64::from(cell) + 0.5) * whole.as_f64().max(1.0) / f64::from(width.max(1)));
    let limit = middles.clone().filter(|middle| *middle < free.as_f64()).count();
    let mut bar: String = middles.map(letter).collect();
    bar.insert(limit, '|');
    let end = if estimate.device_peak_bytes > whole { '>' } else { ']' };
    format!("[{bar}{end}")
}

/// Returns bars of the rung that is taken and of its neighbours, all on the scale of the card, and their legend; a line each.
pub fn bars(plan: &Plan, free: Bytes, total: Bytes) -> Vec<String> {
    let from = plan.chosen.saturating_sub(1);
    let shown: Vec<(usize, &Rung)> =
        plan.rungs.iter().enumerate().skip(from).take(plan.chosen + 2 - from).collect();
    let label = |rung: &Rung| {
        let tier = &rung.tier;
        let kept = if tier.gradient_checkpointing { "" } else { " no ckpt" };
        format!("{} {}x{} @{}{kept}", tier.name, tier.micro_batch, tier.accumulation, tier.max_length)
    };
    let width = shown.iter().map(|(_, rung)| label(rung).len()).max().unwrap_or(0);
    let mut lines: Vec<String> = shown
        .iter()
        .map(|(index, rung)| {
            let mark = if *index == plan.chosen { '>' } else { ' ' };
            let bar = bar(&rung.estimate, free, total, BAR_WIDTH);
            format!("{mark} {:<width$} {bar} {:>10}", label(rung), rung.predicted_peak_bytes)
        })
        .collect();
    lines.extend(legend(plan.chosen_rung(), &shown, free, total));
    lines
}

/// Returns what the letters mean, with the amounts of the rung that is taken.
fn legend(taken: &Rung, shown: &[(usize, &Rung)], free: Bytes, total: Bytes) -> Vec<String> {
    let is_drawn = |place: usize| shown.iter().any(|(_, rung)| parts(&rung.estimate)[place].2 > Bytes::ZERO);
    let mut entries: Vec<String> = parts(&taken.estimate)
        .into_iter()
        .enumerate()
        .filter(|(place, _)| is_drawn(*place))
        .map(|(_, (letter, name, bytes))| format!("{letter} {name} {bytes}"))
        .collect();
    entries.push(format!("| end of the free {free}"));
    let others = total.saturating_sub(free);
    if others > Bytes::ZERO {
        entries.push(format!("# held by others {others}"));
    }
    if shown.iter().any(|(_, rung)| rung.predicted_peak_bytes > total.max(free)) {
        entries.push("> more than the card".to_owned());
    }
    let mut lines: Vec<String> = Vec::new();
    for entry in entries {
        match lines.last_mut() {
            Some(line) if line.len() + entry.len() + 2 <= LINE_WIDTH => *line = format!("{line}, {entry}"),
            Some(_) | None => lines.push(format!("  {entry}")),
        }
    }
    lines
}

/// Returns what would make the plan take a higher rung, or fit at all: more free memory, Liger's loss, 4-bit weights; a line
/// each.
///
/// Each line is what a plan with that change takes. So a rung that is not worth its memory is in none of them.
pub fn what_would_change(request: &Request, book: &TierBook, history: &History, plan: &Plan) -> Vec<String> {
    let mut lines = with_more_memory(request.card.free, request.card.total, plan);
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

/// Returns each amount of memory that takes a higher rung than the one before, the least first.
fn with_more_memory(free: Bytes, total: Bytes, plan: &Plan) -> Vec<String> {
    // A last resort that does not fit is a step as well: more memory makes it fit.
    let mut reached = plan.chosen + usize::from(!plan.chosen_rung().fits);
    let mut amounts: Vec<Bytes> = plan
        .rungs
        .iter()
        .take(reached)
        // Nobody can free what the card does not have.
        .filter(|rung| rung.worth_it && rung.admission_bytes <= total)
        .filter_map(|rung| rung.admission_bytes.checked_sub(free))
        .map(|missing| as_shown(missing).min(total.saturating_sub(free)))
        .filter(|missing| *missing > Bytes::ZERO)
        .collect();
    amounts.sort_unstable();
    let mut lines = Vec::new();
    for amount in amounts {
        if let Some(index) = plan.taken_at(free.saturating_add(amount)).filter(|index| *index < reached) {
            reached = index;
            lines.push(format!("+{amount} free -> {}", plan.rungs[index].tier));
        }
    }
    lines
}

/// Returns an amount rounded up to what is printed of it, so that who frees what is printed has freed enough.
pub(crate) fn as_shown(amount: Bytes) -> Bytes {
    let bytes = u128::from(amount.get());
    let (unit, parts) = if bytes > 1023 << 20 { (1 << 30, 100) } else { (1 << 20, 1) };
    Bytes::new(u64::try_from((bytes * parts).div_ceil(unit) * unit / parts).unwrap_or(u64::MAX))
}

/// Returns the rung that another request gets, when it is a higher one.
fn better(what: &str, other: &Request, book: &TierBook, history: &History, plan: &Plan) -> Option<String> {
    let other = plan_learned(other, book, history).ok()?;
    let higher = other.rungs.len() == plan.rungs.len() && other.chosen < plan.chosen;
    higher.then(|| format!("{what} -> {}", other.chosen_rung().tier))
}
