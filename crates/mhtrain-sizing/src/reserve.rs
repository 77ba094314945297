//! By what does the memory that a card shows exceed what torch has allocated?
//!
//! device peak = allocated peak x ratio + CUDA context. The ratio is what the caching allocator keeps beyond what it has
//! handed out; it depends on how batches are formed, because blocks of other sizes than the last ones cannot be reused.
//! Without runs of its own a machine is taken for one of those that published their peaks.

use std::fmt;

use serde::{Deserialize, Serialize};

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

    /// Returns what published peaks say about the ratio.
    ///
    /// Source: `cargo xtask score-published` on 123 figures that projects published (`docs/measurements/memory.md` has
    /// the table): reserved peak over predicted allocated peak.
    ///
    /// - `Equal`: twelve figures of axolotl, torchtune, LitGPT and ms-swift on packed rows or rows of one length, 0.97 to
    ///   1.34; the interval leaves one of them out. The guess is between the median of the four nearest to what is
    ///   simulated (LoRA and QLoRA of axolotl and LitGPT's LoRA, 1.04) and that of all (1.13).
    /// - `Unequal`: 59 figures of ms-swift 1.x to 3.x, whose rows differed in length and whose loss held more copies of
    ///   the logits than today's: median 1.33, five of them above 2.1.
    /// - `Expandable`: nobody published figures. Expandable segments let blocks grow in place, so what remains is what
    ///   equal rows have, and the spread of the longest batch: half-way up to `Unequal`, by judgement.
    pub fn prior(self) -> Ratio {
        match self {
            Group::Equal => Ratio { low: 0.968, guess: 1.08, high: 1.306 },
            Group::Expandable => Ratio { low: 0.968, guess: 1.12, high: 1.5 },
            Group::Unequal => Ratio { low: 0.97, guess: 1.33, high: 2.1 },
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

/// A ratio of reserved to allocated: best guess and 90 % interval.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// 5th percentile.
    pub low: f64,
    /// Median.
    pub guess: f64,
    /// 95th percentile.
    pub high: f64,
}
