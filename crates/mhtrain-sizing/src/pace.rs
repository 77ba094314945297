//! How long does an optimizer step take?
//!
//! Only earlier attempts of the same model and method on such a card say it: what a card reaches of its published speed differs
//! by more than two from host to host, so without them nothing is said. An attempt at another rung is scaled by the cost model
//! (`cost.rs`), in an interval that is as much wider.

use serde::{Deserialize, Serialize};

use crate::block::float;
use crate::cost::Cost;
use crate::ladder::LadderRules;
use crate::observation::{Fingerprint, Observation};
use crate::request::Request;
use crate::tier::Tier;

/// How fast an attempt trained.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    /// Seconds of an optimizer step: the median over the attempt where steps were timed, else the mean.
    pub seconds_per_step: f64,
    /// Steps that it is from.
    pub steps: u64,
    /// Tokens of a row of a pass, its padding among them; `None` where nobody had looked at the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_tokens: Option<f64>,
}

/// Seconds of an optimizer step: best guess and 90 % interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Best guess.
    pub seconds: f64,
    /// 5th percentile.
    pub low: f64,
    /// 95th percentile.
    pub high: f64,
    /// Whether the attempts that say it ran the very rung, with the same versions.
    pub same_rung: bool,
    /// Names of those attempts, the newest last.
    pub from: Vec<String>,
}

impl StepTime {
    /// Returns it as a sentence.
    pub fn sentence(&self) -> String {
        let names: Vec<&str> = self.from.iter().rev().take(3).map(String::as_str).collect();
        let more = if self.from.len() > names.len() {
            format!(" and {} more", self.from.len() - names.len())
        } else {
            String::new()
        };
        let scaled = if self.same_rung { "" } else { ", scaled from another rung or other versions" };
        format!(
            "a step takes about {} s ({} to {}), because of {}{more}{scaled}",
            digits(self.seconds),
            digits(self.low),
            digits(self.high),
            names.join(", ")
        )
    }
}

/// Returns seconds with three digits that count.
fn digits(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.2}") } else { format!("{seconds:.0}") }
}

/// Half widths of the 90 % interval, of the logarithm. By judgement: nobody published how steps of the same job differ from run
/// to run on a shared host; a cost model of ratios may be off by a third; a version may bring other kernels; rows of unequal
/// length that nobody looked at may be half or twice as long.
const SAME: f64 = 0.10;
const OTHER_RUNG: f64 = 0.35;
const OTHER_VERSIONS: f64 = 0.20;
const OTHER_ROWS: f64 = 0.70;

/// Returns what earlier attempts say about the time of a step at `tier`, the surest of them; `None` when none says anything.
pub fn step_time(
    request: &Request,
    rules: &LadderRules,
    tier: &Tier,
    next: &Fingerprint,
    observations: &[Observation],
) -> Option<StepTime> {
    let cost = Cost::new(request, rules);
    let mut seen: Vec<(f64, f64, &Observation)> = observations
        .iter()
        .filter_map(|observation| {
            scaled(&cost, tier, next, observation).map(|(s, doubt)| (s, doubt, observation))
        })
        .collect();
    let doubt = seen.iter().map(|(_, doubt, _)| *doubt).min_by(f64::total_cmp)?;
    seen.retain(|(_, other, _)| *other <= doubt);
    let mut times: Vec<f64> = seen.iter().map(|(seconds, _, _)| *seconds).collect();
    times.sort_by(f64::total_cmp);
    let seconds = *times.get(times.len() / 2)?;
    let apart = times.iter().map(|time| (time / seconds).ln().abs()).fold(0.0, f64::max);
    let reach = doubt.hypot(apart).exp();
    Some(StepTime {
        seconds,
        low: seconds / reach,
        high: seconds * reach,
        same_rung: doubt <= SAME,
        from: seen.iter().map(|(_, _, observation)| observation.name.clone()).collect(),
    })
}

/// Returns the time of a step at `tier` by one attempt, and the half width of its interval.
fn scaled(cost: &Cost<'_>, tier: &Tier, next: &Fingerprint, seen: &Observation) -> Option<(f64, f64)> {
    let (pace, ran) = (seen.pace.as_ref()?, seen.tier.as_ref()?);
    let of = &seen.fingerprint;
    let is_alike = of.model == next.model && of.method == next.method && of.card == next.card;
    if !(is_alike && pace.seconds_per_step > 0.0 && pace.seconds_per_step.is_finite()) {
        return None;
    }
    // What the rung that ran would take on the rows of today.
    let (then, today) = (pace.row_tokens, cost.row_tokens(ran));
    let rows = then.zip(today).filter(|(then, today)| *then > 0.0 && *today > 0.0);
    let longer = rows.map_or(1.0, |(then, today)| today / then);
    let step = |tier: &Tier| float(tier.effective_batch()) * cost.of_row(tier);
    let seconds = pace.seconds_per_step * longer * step(tier) / step(ran);
    let mut doubt = SAME;
    for (differs, by) in [
        (!is_the_same_pass(ran, tier), OTHER_RUNG),
        (of.versions != next.versions, OTHER_VERSIONS),
        (rows.is_none(), OTHER_ROWS),
    ] {
        if differs {
            doubt = doubt.hypot(by);
        }
    }
    (seconds > 0.0 && seconds.is_finite()).then_some((seconds, doubt))
}

/// Returns whether a step at both does the same arithmetic.
fn is_the_same_pass(a: &Tier, b: &Tier) -> bool {
    let form = |tier: &Tier| {
        (tier.micro_batch, tier.attn_impl, tier.torch_dtype, tier.gradient_checkpointing, tier.liger_kernel)
    };
    a.trains_the_same_as(b) && form(a) == form(b)
}
