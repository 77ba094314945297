//! What does a run make of its rows?
//!
//! From the lengths of the rows and a rung: what ms-swift drops, how many packs it makes, how many optimizer steps that are,
//! and what about it should be said before hours are spent.

use mhtrain_sizing::data::LengthProfile;
use mhtrain_sizing::tier::{Steps, Tier};
use serde::{Deserialize, Serialize};

use crate::packing::count_packs;
use crate::proof::{PlannedSteps, planned_steps, steps_per_epoch};

/// Rows that are packed to count the packs; more are taken to be packed as these are.
const ROWS_PACKED_MAX: u64 = 200_000;

/// What becomes of a row that is longer than `max_length` (`--truncation_strategy`).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum LongRows {
    /// It is left out (`delete`, the default).
    #[default]
    Dropped,
    /// It is cut (`left`, `right`).
    Cut,
    /// It becomes several (`split`).
    Split,
}

impl LongRows {
    /// Returns what ms-swift does at this value of `truncation_strategy`.
    pub fn of_strategy(strategy: Option<&str>) -> LongRows {
        match strategy {
            Some("left" | "right") => LongRows::Cut,
            Some("split") => LongRows::Split,
            Some(_) | None => LongRows::Dropped,
        }
    }
}

/// What a job says about its steps beside the rung.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunFacts {
    /// What becomes of rows that are too long.
    pub long_rows: LongRows,
    /// Tokens of a pack; `None`: as many as a row.
    pub packing_length: Option<u32>,
    /// Pinned number of steps.
    pub max_steps: Option<u64>,
    /// Steps between evaluations; `None`: nothing is evaluated.
    pub eval_steps: Option<Steps>,
    /// Pinned steps of warm-up.
    pub warmup_steps: Option<u64>,
    /// Lengths that could be chosen instead.
    pub other_lengths: Vec<u32>,
}

/// What a run makes of its rows. Field names are those of the JSON interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataUse {
    /// Rows of the train set before any is dropped for its length.
    pub rows: u64,
    /// Whether that number, and those below, are counted; else they are estimated from `measured` rows.
    pub exact: bool,
    /// Rows whose tokens were counted.
    pub measured: u64,
    /// Rows that ms-swift's template refuses: it leaves them out.
    pub faulty: u64,
    /// Rows that are none, no JSON or no UTF-8: the trainer stops at the first of them.
    #[serde(default)]
    pub unreadable: u64,
    /// Tokens of all rows.
    pub tokens: u64,
    /// Tokens of the median row.
    pub p50: u32,
    /// Tokens that 95 % of the rows do not exceed.
    pub p95: u32,
    /// Tokens that 99 % of the rows do not exceed.
    pub p99: u32,
    /// Tokens of the longest row that was counted.
    pub max: u32,
    /// Longest row of the rung that is taken.
    pub max_length: u32,
    /// Rows that are dropped because they are longer.
    pub rows_dropped: u64,
    /// Their share, 0 to 1.
    pub share_dropped: f64,
    /// Rows that are trained.
    pub rows_trained: u64,
    /// Packs that they make; `None` where rows are not packed.
    pub packed_rows: Option<u64>,
    /// Optimizer steps of one pass over the data.
    pub steps_per_epoch: u64,
    /// Optimizer steps of the run.
    pub optimizer_steps: u64,
    /// What other lengths would drop.
    pub at_other_lengths: Vec<Dropped>,
    /// What should be said about it, a sentence each.
    pub warnings: Vec<String>,
}

/// What a length drops.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// The length.
    pub max_length: u32,
    /// Rows that are longer.
    pub rows_dropped: u64,
    /// Their share, 0 to 1.
    pub share_dropped: f64,
}

/// Returns what a run at `tier` makes of the rows.
pub fn data_use(profile: &LengthProfile, tier: &Tier, run: &RunFacts) -> DataUse {
    let dropped = |max_length| dropped_at(profile, max_length, run.long_rows);
    let Dropped { rows_dropped, share_dropped, .. } = dropped(tier.max_length);
    let trained = trained_lengths(profile, tier.max_length, run.long_rows);
    let rows_trained: u64 = trained.iter().map(|(_, rows)| rows).sum();
    let packed_rows = tier.packing.then(|| packs(&trained, run.packing_length.unwrap_or(tier.max_length)));
    let units = packed_rows.unwrap_or(rows_trained);
    let per_epoch = steps_per_epoch(units, tier.micro_batch, tier.accumulation, tier.world_size);
    let planned = match run.max_steps {
        Some(steps) => PlannedSteps::Pinned(steps),
        None => PlannedSteps::Epochs(tier.num_train_epochs),
    };
    let mut data = DataUse {
        rows: profile.rows(),
        exact: profile.is_exact(),
        measured: profile.measured(),
        faulty: profile.faulty(),
        unreadable: profile.unreadable(),
        tokens: profile.tokens(),
        p50: profile.quantile(0.5),
        p95: profile.quantile(0.95),
        p99: profile.quantile(0.99),
        max: profile.longest(),
        max_length: tier.max_length,
        rows_dropped,
        share_dropped,
        rows_trained,
        packed_rows,
        steps_per_epoch: per_epoch,
        optimizer_steps: planned_steps(planned, Some(per_epoch)).unwrap_or(0),
        at_other_lengths: run
            .other_lengths
            .iter()
            .filter(|length| **length != tier.max_length)
            .map(|length| dropped(*length))
            .collect(),
        warnings: Vec::new(),
    };
    data.warnings = warnings(&data, tier, run);
    data
}

fn dropped_at(profile: &LengthProfile, max_length: u32, long_rows: LongRows) -> Dropped {
    match long_rows {
        LongRows::Dropped => Dropped {
            max_length,
            rows_dropped: profile.rows_over(max_length),
            share_dropped: profile.share_over(max_length),
        },
        LongRows::Cut | LongRows::Split => Dropped { max_length, rows_dropped: 0, share_dropped: 0.0 },
    }
}

/// Returns (tokens, rows) of the rows that are trained.
fn trained_lengths(profile: &LengthProfile, max_length: u32, long_rows: LongRows) -> Vec<(u32, u64)> {
    let mut lengths = profile.within(max_length).to_vec();
    match long_rows {
        LongRows::Dropped => {}
        LongRows::Cut => lengths.push((max_length, profile.rows_over(max_length))),
        LongRows::Split => {
            for (tokens, rows) in profile.within(u32::MAX).iter().filter(|(tokens, _)| *tokens > max_length) {
                lengths.push((max_length, rows * u64::from(tokens / max_length.max(1))));
                lengths.push((tokens % max_length.max(1), *rows));
            }
        }
    }
    lengths.retain(|(tokens, rows)| *tokens > 0 && *rows > 0);
    lengths
}

/// Returns how many packs rows of these lengths make.
///
/// ms-swift shuffles the rows first, and packs a thousand at a time: here another shuffle stands in. A thousand rows and
/// fewer are packed alike in any order.
fn packs(lengths: &[(u32, u64)], packing_length: u32) -> u64 {
    let rows: u64 = lengths.iter().map(|(_, rows)| rows).sum();
    let taken = rows.min(ROWS_PACKED_MAX);
    // Every k-th row of the sorted list is a sample with the proportions of the whole.
    let mut sample = Vec::new();
    let mut below: u64 = 0;
    for (tokens, count) in lengths {
        let until = |row: u64| u128::from(row) * u128::from(taken) / u128::from(rows.max(1));
        let copies = until(below + count) - until(below);
        sample.extend(std::iter::repeat_n(*tokens, usize::try_from(copies).unwrap_or(0)));
        below += count;
    }
    shuffle(&mut sample);
    let packs = count_packs(&sample, packing_length);
    let scaled = u128::from(packs) * u128::from(rows) / u128::from(taken.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// Shuffles with a fixed seed, so that the same data has the same plan (Fisher-Yates; the numbers are Knuth's MMIX).
fn shuffle(lengths: &mut [u32]) {
    let mut state: u64 = 42;
    for index in (1..lengths.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let other = (state >> 33) % (index as u64 + 1);
        lengths.swap(index, usize::try_from(other).unwrap_or(0));
    }
}

fn warnings(data: &DataUse, tier: &Tier, run: &RunFacts) -> Vec<String> {
    let mut warnings = Vec::new();
    let steps = data.optimizer_steps;
    let exactly = if data.exact { "" } else { "about " };
    if data.rows_trained == 0 {
        warnings.push(format!(
            "no row is left to train: all of {} are longer than {} tokens or cannot be read",
            data.rows + data.faulty + data.unreadable,
            data.max_length
        ));
        return warnings;
    }
    if data.rows_dropped > 0 {
        let others = data
            .at_other_lengths
            .iter()
            .map(|other| format!("; {} {}", other.max_length, percent(other.share_dropped)));
        warnings.push(format!(
            "{} drops {} of rows ({exactly}{}){}",
            data.max_length,
            percent(data.share_dropped),
            data.rows_dropped,
            others.collect::<String>()
        ));
    }
    if data.faulty > 0 {
        warnings.push(format!("ms-swift cannot encode {exactly}{} rows, and leaves them out", data.faulty));
    }
    let never = |every: Steps| matches!(every, Steps::Count(every) if u64::from(every) > steps);
    if never(tier.save_steps) {
        warnings.push(format!(
            "save_steps {} never comes: the run has {exactly}{steps} steps, and only its end is saved",
            tier.save_steps
        ));
    }
    if let Some(every) = run.eval_steps.filter(|every| never(*every)) {
        warnings.push(format!(
            "eval_steps {every} never comes: the run has {exactly}{steps} steps, and is evaluated at its end only"
        ));
    }
    let warmup = run.warmup_steps.unwrap_or_else(|| warmup_steps(tier.warmup_ratio, steps));
    if warmup >= steps {
        warnings.push(format!(
            "the learning rate never reaches {:e}: warm-up takes {warmup} steps, and the run has {exactly}{steps}",
            tier.learning_rate
        ));
    }
    warnings
}

/// Returns the steps of warm-up. Source: `TrainingArguments.get_warmup_steps`: ceil(steps x ratio).
fn warmup_steps(ratio: f64, steps: u64) -> u64 {
    planned_steps(PlannedSteps::Epochs(ratio), Some(steps)).unwrap_or(0)
}

/// Returns a share as a percentage with one place.
pub fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if percent > 0.0 && percent < 0.05 { "under 0.1 %".to_owned() } else { format!("{percent:.1} %") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn tier(max_length: u32, packing: bool) -> Tier {
        Tier { max_length, packing, num_train_epochs: 2.0, ..testing::tier() }
    }

    fn rows(lengths: &[u32]) -> LengthProfile {
        LengthProfile::from_measured(lengths, 0, lengths.len() as u64, true)
    }

    /// 1000 rows: 968 of 500 tokens, 30 of 2500, 2 of 3500.
    fn unequal() -> LengthProfile {
        let mut lengths = vec![500; 968];
        lengths.extend([2500; 30]);
        lengths.extend([3500; 2]);
        rows(&lengths)
    }

    fn all_lengths() -> RunFacts {
        RunFacts { other_lengths: vec![2048, 3072, 4096], ..RunFacts::default() }
    }

    #[test]
    fn a_length_that_drops_rows_is_named_beside_those_that_drop_fewer() {
        let data = data_use(&unequal(), &tier(2048, false), &all_lengths());
        assert_eq!((data.rows_dropped, data.rows_trained, data.optimizer_steps), (32, 968, 62));
        assert_eq!(data.warnings[0], "2048 drops 3.2 % of rows (32); 3072 0.2 %; 4096 0.0 %");
        let kept = data_use(&unequal(), &tier(4096, false), &all_lengths());
        assert!(!kept.warnings.iter().any(|warning| warning.contains("drops")), "{:?}", kept.warnings);
    }

    #[test]
    fn packs_and_not_rows_make_the_steps() {
        let data = data_use(&unequal(), &tier(3072, true), &RunFacts::default());
        // 2500 tokens leave room for one of 500; the other 938 go six into each.
        assert_eq!(data.packed_rows, Some(30 + 938_u64.div_ceil(6)));
        assert_eq!(data.steps_per_epoch, 187_u64.div_ceil(32));
    }

    #[test]
    fn cut_and_split_rows_are_not_dropped() {
        let cut = RunFacts { long_rows: LongRows::of_strategy(Some("right")), ..RunFacts::default() };
        assert_eq!(data_use(&unequal(), &tier(2048, false), &cut).rows_trained, 1000);
        let split = RunFacts { long_rows: LongRows::of_strategy(Some("split")), ..RunFacts::default() };
        let data = data_use(&unequal(), &tier(2048, false), &split);
        assert_eq!((data.rows_trained, data.rows_dropped), (1032, 0));
    }

    #[test]
    fn what_never_comes_is_said() {
        let facts = RunFacts { eval_steps: Some(Steps::Count(50)), ..RunFacts::default() };
        let data = data_use(&rows(&[100; 320]), &tier(3072, false), &facts);
        assert_eq!(data.optimizer_steps, 20);
        let said = data.warnings.join("\n");
        assert!(said.contains("save_steps 200 never comes: the run has 20 steps"), "{said}");
        assert!(said.contains("eval_steps 50 never comes"), "{said}");
        assert!(!said.contains("warm-up"), "{said}");
        let short = RunFacts { max_steps: Some(1), ..RunFacts::default() };
        let said = data_use(&rows(&[100; 320]), &tier(3072, false), &short).warnings.join("\n");
        assert!(said.contains("never reaches 2e-4: warm-up takes 1 steps, and the run has 1"), "{said}");
        let pinned = RunFacts { warmup_steps: Some(30), ..RunFacts::default() };
        let said = data_use(&rows(&[100; 320]), &tier(3072, false), &pinned).warnings.join("\n");
        assert!(said.contains("warm-up takes 30 steps"), "{said}");
    }

    #[test]
    fn nothing_left_is_the_only_thing_that_is_said() {
        let data = data_use(&rows(&[5000; 10]), &tier(2048, false), &all_lengths());
        assert_eq!(data.warnings.len(), 1);
        assert!(data.warnings[0].contains("all of 10 are longer than 2048"), "{:?}", data.warnings);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// No row is lost, no pack is over-full, and there are never more packs than rows.
        #[test]
        fn rows_and_packs_add_up(lengths in prop::collection::vec(1_u32..4000, 1..300), max_length in 100_u32..4096) {
            let profile = rows(&lengths);
            let data = data_use(&profile, &tier(max_length, true), &RunFacts::default());
            prop_assert_eq!(data.rows_trained + data.rows_dropped, data.rows);
            let packs = data.packed_rows.unwrap();
            let tokens: u64 = lengths.iter().filter(|l| **l <= max_length).map(|l| u64::from(*l)).sum();
            prop_assert!(packs <= data.rows_trained && packs >= tokens.div_ceil(u64::from(max_length)));
        }
    }
}
