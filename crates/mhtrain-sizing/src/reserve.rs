//! By what does the memory that a card shows exceed what torch has allocated?
//!
//! device peak = allocated peak x ratio + CUDA context. The ratio is what the caching allocator keeps beyond what it has
//! handed out; it depends on how batches are formed, because blocks of other sizes than the last ones cannot be reused.
//! Without runs of its own a machine is taken for one of those that published their peaks.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::estimate::CONTEXT;
use crate::learn::{Nearness, learn, learned_context};
use crate::observation::{Fingerprint, Observation, Reading};
use crate::tier::Tier;
use crate::workload::Workload;

/// How batches are formed, as far as the allocator sees it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Every pass has the same number of tokens: packed rows, or rows of one length.
    Equal,
    /// Rows of unequal length, with expandable segments.
    Expandable,
    /// Rows of unequal length in the allocator's default blocks, or nobody knows.
    Unequal,
}

impl Group {
    /// Every group.
    pub const ALL: [Group; 3] = [Group::Equal, Group::Expandable, Group::Unequal];

    /// Returns the group of a pass of which nothing but its shape is known.
    pub fn of(work: &Workload) -> Group {
        if work.packing || !work.padded { Group::Equal } else { Group::Unequal }
    }

    /// Returns the group of an attempt: expandable segments are switched on for it, and unpacked rows differ in length even
    /// in batches of one.
    pub fn of_attempt(packing: bool) -> Group {
        if packing { Group::Equal } else { Group::Expandable }
    }

    /// Returns what published peaks say about the ratio for a pass of which `resident_share` (0 to 1) of the allocated
    /// peak is weights, adapters and moments.
    ///
    /// What is resident is taken once and stays; what comes and goes leaves gaps. So the ratio is that of two parts. On
    /// the published figures this holds as many peaks as one ratio on the whole does in intervals that are narrower
    /// (unequal rows: 1.91 against 2.16 for 90 %).
    ///
    /// Source: `cargo xtask score-published` on figures that projects published (`docs/measurements/memory.md` has the
    /// table): reserved peak against predicted allocated peak.
    ///
    /// - `Equal`: twelve figures of axolotl, torchtune, LitGPT and ms-swift on packed rows or rows of one length; one lies
    ///   outside.
    /// - `Unequal`: 59 figures of ms-swift 1.x to 3.x, whose rows differed in length and whose loss held more copies of
    ///   the logits than today's: the part that comes and goes 3.0 times the predicted at the median, six figures above
    ///   4.6.
    /// - `Expandable`: nobody published figures. Expandable segments let blocks grow in place, so what remains is what
    ///   equal rows have and the spread of the longest batch: some way up to `Unequal`, by judgement.
    pub fn prior(self, resident_share: f64) -> Ratio {
        let [resident, dynamic] = self.parts();
        let share = if resident_share.is_nan() { 0.5 } else { resident_share.clamp(0.0, 1.0) };
        let mix = |a: f64, b: f64| share * a + (1.0 - share) * b;
        Ratio {
            low: mix(resident.low, dynamic.low),
            guess: mix(resident.guess, dynamic.guess),
            high: mix(resident.high, dynamic.high),
        }
    }

    /// Returns the published ratios of what is resident and of what comes and goes.
    pub fn parts(self) -> [Ratio; 2] {
        match self {
            Group::Equal => {
                [Ratio { low: 0.975, guess: 1.02, high: 1.1 }, Ratio { low: 0.95, guess: 1.15, high: 1.55 }]
            }
            Group::Expandable => {
                [Ratio { low: 0.98, guess: 1.01, high: 1.04 }, Ratio { low: 0.95, guess: 1.2, high: 1.9 }]
            }
            Group::Unequal => {
                [Ratio { low: 1.0, guess: 1.0, high: 1.0 }, Ratio { low: 1.0, guess: 3.0, high: 4.65 }]
            }
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Group::Equal => "packed or equal rows",
            Group::Expandable => "unequal rows, expandable segments",
            Group::Unequal => "unequal rows",
        })
    }
}

/// Where the ratio of one pass comes from.
#[derive(Copy, Clone, Debug)]
pub struct Reserve<'a> {
    /// How batches are formed.
    pub group: Group,
    /// What the pass has in common with earlier ones, and those.
    pub history: Option<(&'a Fingerprint, &'a [Observation])>,
}

impl Reserve<'_> {
    /// Returns whether earlier runs of the same model, method, loss, batches and versions showed what they needed. One that ran out
    /// of memory shows a limit alone.
    pub fn knows_model(&self, liger_kernel: bool) -> bool {
        let same_loss = |tier: &Option<Tier>| {
            tier.as_ref().map_or(!liger_kernel, |tier| tier.liger_kernel == liger_kernel)
        };
        let is_known = |next: &Fingerprint, seen: &Observation| {
            Nearness::of(&seen.fingerprint, next) == Some(Nearness::SameModel)
                && same_loss(&seen.tier)
                && matches!(seen.reading(), Some(Reading::Exactly(_)))
        };
        self.history.is_some_and(|(next, observations)| observations.iter().any(|seen| is_known(next, seen)))
    }

    /// Returns the ratios of what is resident and of what comes and goes in a pass with this share of the first.
    ///
    /// Earlier runs show the ratio of the whole, so with them it is that for both.
    pub fn parts(&self, resident_share: f64) -> [Ratio; 2] {
        let learned = self
            .history
            .map(|(next, observations)| learn(self.group.prior(resident_share), next, observations))
            .filter(|learned| !learned.evidence.is_empty());
        learned.map_or_else(|| self.group.parts(), |learned| [learned.ratio; 2])
    }

    /// Returns what a CUDA context takes, in bytes: as runs on such a card with the same versions showed, else the usual
    /// figure, 300 to 700 MiB.
    pub fn context(&self) -> Ratio {
        let usual = CONTEXT.as_f64();
        let usual = Ratio { low: 0.6 * usual, guess: usual, high: 1.4 * usual };
        self.history.and_then(|(next, observations)| learned_context(next, observations)).unwrap_or(usual)
    }
}

/// A ratio of reserved to allocated, or an amount in bytes: best guess and 90 % interval.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// 5th percentile.
    pub low: f64,
    /// Median.
    pub guess: f64,
    /// 95th percentile.
    pub high: f64,
}

impl Ratio {
    /// Returns a factor that changes no best guess, and by which it may be wrong.
    pub(crate) fn about_one(low: f64, high: f64) -> Ratio {
        Ratio { low, guess: 1.0, high }
    }

    /// Returns the ratio times factors around one that are not known any better, each independent of the others: the
    /// logarithms of their widths are added as errors are, by the root of the sum of squares, above and below apart.
    pub(crate) fn doubted<'a>(self, factors: impl Iterator<Item = &'a Ratio>) -> Ratio {
        let width = |from: f64, to: f64| (to / from).ln().max(0.0).powi(2);
        let (mut below, mut above) = (width(self.low, self.guess), width(self.guess, self.high));
        for factor in factors {
            below += width(factor.low, factor.guess);
            above += width(factor.guess, factor.high);
        }
        Ratio {
            low: self.guess * (-below.sqrt()).exp(),
            guess: self.guess,
            high: self.guess * above.sqrt().exp(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubts_that_do_not_depend_on_each_other_are_added_as_errors_are() {
        let ratio = Ratio { low: 0.5, guess: 1.0, high: 2.0_f64.powi(3) };
        let same = ratio.doubted(std::iter::empty());
        assert!((same.low - 0.5).abs() < 1e-12 && (same.high - 8.0).abs() < 1e-12, "{same:?}");
        // Three and four twofold widths are five; below 1 and 0 are 1.
        let doubted = ratio.doubted([Ratio::about_one(1.0, 16.0)].iter());
        assert!((doubted.low - 0.5).abs() < 1e-12 && (doubted.high - 32.0).abs() < 1e-9, "{doubted:?}");
        assert_eq!(doubted.guess.to_bits(), 1.0_f64.to_bits());
    }
}
