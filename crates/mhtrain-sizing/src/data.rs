//! How long are the rows of the data?
//!
//! A profile is a histogram of token lengths. It may stand for every row, or for all rows through some of them; it says
//! which. What ms-swift makes of the rows (drops, packs, steps) is in `mhtrain-swift`.

use serde::{Deserialize, Serialize};

use crate::block::float;

/// Token lengths of the rows that the trainer can encode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthProfile {
    /// (tokens, rows of that length), rising, no row count of zero.
    counts: Vec<(u32, u64)>,
    /// Tokens of the longest row that was measured.
    longest: u32,
    /// Rows that were measured, those that cannot be encoded among them.
    measured: u64,
    /// Rows that the trainer cannot encode, and leaves out; estimated where not every row was measured.
    faulty: u64,
    /// Rows that are none, at the first of which the trainer stops; estimated as `faulty` is.
    #[serde(default)]
    unreadable: u64,
    /// Whether every row was measured.
    complete: bool,
    /// Whether the rows are a random part of those that were measured, or repeat some.
    drawn: bool,
    /// Whether the tokens of some rows are only about known; so where a profile was stored before this was kept.
    #[serde(default = "not_sure")]
    approximate: bool,
}

fn not_sure() -> bool {
    true
}

/// Tokens that a row may have beyond what was counted, before it is rounded up: templates that name the day differ by one,
/// and rows that end in a question by up to 15 (`docs/sizing.md`, section 5).
const ROOM: u32 = 16;

/// What a bound is rounded up to: what is padded to a multiple is padded to one of these.
const BOUND_STEP: u32 = 64;

impl LengthProfile {
    /// Returns the profile of `rows` rows (an estimate when `rows_known` is false), of which `lengths` were measured and
    /// `faulty` more cannot be encoded.
    pub fn from_measured(lengths: &[u32], faulty: u64, rows: u64, rows_known: bool) -> LengthProfile {
        let mut sorted = lengths.to_vec();
        sorted.sort_unstable();
        let mut counts: Vec<(u32, u64)> = Vec::new();
        for length in sorted {
            match counts.last_mut() {
                Some((last, count)) if *last == length => *count += 1,
                Some(_) | None => counts.push((length, 1)),
            }
        }
        let usable: u64 = counts.iter().map(|(_, count)| count).sum();
        let measured = usable + faulty;
        let complete = rows_known && measured == rows;
        let longest = counts.last().map_or(0, |(length, _)| *length);
        let mut profile =
            LengthProfile { counts, longest, measured, faulty, complete, ..LengthProfile::default() };
        if !complete && measured > 0 {
            let usable_of_all = share_of(rows.max(measured), usable, measured);
            profile.faulty = rows.max(measured) - usable_of_all;
            profile.counts = scaled(&profile.counts, usable_of_all);
        }
        profile
    }

    /// Returns the profile where `unreadable` of the `faulty` rows that were measured are rows at which the trainer stops.
    #[must_use]
    pub fn with_unreadable(self, unreadable: u64, faulty: u64) -> LengthProfile {
        let unreadable = share_of(self.faulty, unreadable, faulty).min(self.faulty);
        LengthProfile { unreadable, faulty: self.faulty - unreadable, ..self }
    }

    /// Returns the profile where the tokens of some rows are only about known, if so.
    #[must_use]
    pub fn with_approximate(self, approximate: bool) -> LengthProfile {
        LengthProfile { approximate, ..self }
    }

    /// Returns the profile of several data sets together.
    pub fn together(parts: impl IntoIterator<Item = LengthProfile>) -> LengthProfile {
        let mut all = LengthProfile { complete: true, ..LengthProfile::default() };
        let mut counts = std::collections::BTreeMap::new();
        for part in parts {
            for (length, count) in part.counts {
                *counts.entry(length).or_insert(0) += count;
            }
            all.longest = all.longest.max(part.longest);
            all.measured += part.measured;
            all.faulty += part.faulty;
            all.unreadable += part.unreadable;
            all.complete &= part.complete;
            all.drawn |= part.drawn;
            all.approximate |= part.approximate;
        }
        all.counts = counts.into_iter().collect();
        all
    }

    /// Returns the profile of `rows` of these rows, drawn at random; of repeated ones when there are fewer.
    #[must_use]
    pub fn draw(self, rows: u64) -> LengthProfile {
        if rows == self.rows() || self.rows() == 0 {
            return self;
        }
        LengthProfile { counts: scaled(&self.counts, rows), drawn: true, ..self }
    }

    /// Returns how many rows there are that can be encoded.
    pub fn rows(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    /// Returns how many rows cannot be encoded.
    pub fn faulty(&self) -> u64 {
        self.faulty
    }

    /// Returns how many rows are none, so that the trainer stops at the first of them.
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    /// Returns how many rows were measured.
    pub fn measured(&self) -> u64 {
        self.measured
    }

    /// Returns whether every row was measured, so that no row is longer than the longest.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Returns whether the counts are those of the rows that are trained, not estimates of them.
    pub fn is_exact(&self) -> bool {
        self.complete && !self.drawn
    }

    /// Returns the tokens of all rows.
    pub fn tokens(&self) -> u64 {
        self.counts.iter().map(|(length, count)| u64::from(*length) * count).sum()
    }

    /// Returns the tokens of the longest row that was measured.
    pub fn longest(&self) -> u32 {
        self.longest
    }

    /// Returns the tokens that no row exceeds, with a little room and rounded up; `None` where that is not sure: some rows were
    /// not measured, are damaged, or have tokens that are only about known.
    pub fn bound(&self) -> Option<u32> {
        let is_sure = self.complete && self.unreadable == 0 && !self.approximate && self.longest > 0;
        let bound = self.longest.checked_add(ROOM)?.checked_next_multiple_of(BOUND_STEP)?;
        is_sure.then_some(bound)
    }

    /// Returns the tokens that a share (0 to 1) of the rows does not exceed, by the nearest rank; 0 without rows.
    pub fn quantile(&self, share: f64) -> u32 {
        let rank = float(self.rows()) * share.clamp(0.0, 1.0);
        let mut below = 0;
        for (length, count) in &self.counts {
            below += count;
            if float(below) >= rank {
                return *length;
            }
        }
        self.longest
    }

    /// Returns how many rows are longer than `length` tokens.
    pub fn rows_over(&self, length: u32) -> u64 {
        let longer = self.counts.partition_point(|(tokens, _)| *tokens <= length);
        self.counts[longer..].iter().map(|(_, count)| count).sum()
    }

    /// Returns which share of the rows (0 to 1) is longer than `length` tokens; 0 without rows.
    pub fn share_over(&self, length: u32) -> f64 {
        let rows = self.rows();
        if rows == 0 { 0.0 } else { float(self.rows_over(length)) / float(rows) }
    }

    /// Returns the (tokens, rows) of the rows that are at most `length` tokens long, rising.
    pub fn within(&self, length: u32) -> &[(u32, u64)] {
        &self.counts[..self.counts.partition_point(|(tokens, _)| *tokens <= length)]
    }
}

/// Returns `whole * part / of` without overflow, rounded down.
fn share_of(whole: u64, part: u64, of: u64) -> u64 {
    let share = u128::from(whole) * u128::from(part) / u128::from(of.max(1));
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// Returns counts in the same proportions that sum up to `rows`: each rounded down, and what is then missing given to
/// those that lost most (Hamilton's method).
fn scaled(counts: &[(u32, u64)], rows: u64) -> Vec<(u32, u64)> {
    let whole: u64 = counts.iter().map(|(_, count)| count).sum();
    if whole == 0 {
        return Vec::new();
    }
    let lost = |count: u64| u128::from(count) * u128::from(rows) % u128::from(whole);
    let mut scaled: Vec<(u32, u64, u128)> =
        counts.iter().map(|(length, count)| (*length, share_of(rows, *count, whole), lost(*count))).collect();
    let given: u64 = scaled.iter().map(|(_, count, _)| count).sum();
    let mut order: Vec<usize> = (0..scaled.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(scaled[index].2));
    for index in order.into_iter().zip(0..rows - given).map(|(index, _)| index) {
        scaled[index].1 += 1;
    }
    scaled.into_iter().filter(|(_, count, _)| *count > 0).map(|(length, count, _)| (length, count)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(lengths: &[u32]) -> LengthProfile {
        LengthProfile::from_measured(lengths, 0, lengths.len() as u64, true)
    }

    #[test]
    fn a_complete_look_is_exact_to_the_row() {
        let profile = LengthProfile::from_measured(&[30, 10, 10, 5000], 2, 6, true);
        assert!(profile.is_complete() && profile.is_exact());
        assert_eq!((profile.rows(), profile.faulty(), profile.measured()), (4, 2, 6));
        assert_eq!((profile.tokens(), profile.longest()), (5050, 5000));
        assert_eq!((profile.rows_over(10), profile.rows_over(9), profile.rows_over(5000)), (2, 4, 0));
        assert_eq!((profile.quantile(0.5), profile.quantile(0.51), profile.quantile(1.0)), (10, 30, 5000));
    }

    #[test]
    fn a_sample_stands_for_all_rows_and_says_so() {
        let profile = LengthProfile::from_measured(&[100, 100, 100, 900], 1, 1000, false);
        assert!(!profile.is_complete() && !profile.is_exact());
        assert_eq!((profile.rows(), profile.faulty()), (800, 200));
        assert_eq!(profile.rows_over(100), 200);
    }

    #[test]
    fn rows_at_which_the_trainer_stops_are_a_part_of_those_that_were_not_counted() {
        let profile = LengthProfile::from_measured(&[100, 100], 2, 1000, false).with_unreadable(1, 2);
        assert_eq!((profile.rows(), profile.faulty(), profile.unreadable()), (500, 250, 250));
    }

    #[test]
    fn a_part_keeps_the_bound_of_the_whole() {
        let part = all(&[10, 20, 30, 4000]).draw(2);
        assert_eq!((part.rows(), part.longest()), (2, 4000));
        assert!(part.is_complete() && !part.is_exact());
        assert_eq!(all(&[10, 20]).draw(6).rows(), 6);
        assert!(all(&[10, 20]).draw(2).is_exact());
    }

    #[test]
    fn the_longest_row_is_a_bound_only_where_every_row_is_surely_counted() {
        let rows = || LengthProfile::from_measured(&[30, 600], 1, 3, true);
        assert_eq!(rows().bound(), Some(640));
        assert_eq!(rows().draw(1).bound(), Some(640));
        assert_eq!(rows().with_approximate(true).bound(), None);
        assert_eq!(rows().with_unreadable(1, 1).bound(), None);
        assert_eq!(LengthProfile::from_measured(&[30, 600], 1, 4, true).bound(), None);
        assert_eq!(LengthProfile::from_measured(&[u32::MAX], 0, 1, true).bound(), None);
        let sample = LengthProfile::from_measured(&[10], 0, 5, false);
        assert_eq!(LengthProfile::together([rows(), sample]).bound(), None);
        assert_eq!(LengthProfile::together([rows(), rows()]).bound(), Some(640));
    }

    #[test]
    fn data_sets_together_are_as_known_as_the_least_known() {
        let known = LengthProfile::together([all(&[10, 20]), all(&[20])]);
        assert_eq!((known.rows(), known.rows_over(10), known.is_exact()), (3, 2, true));
        let sample = LengthProfile::from_measured(&[10], 0, 5, false);
        assert!(!LengthProfile::together([known, sample]).is_complete());
    }

    proptest! {
        /// The histogram answers as a list of all rows would.
        #[test]
        fn counts_equal_a_naive_list(lengths in prop::collection::vec(1_u32..5000, 1..200), limit in 0_u32..6000) {
            let profile = all(&lengths);
            prop_assert_eq!(profile.rows_over(limit), lengths.iter().filter(|l| **l > limit).count() as u64);
            prop_assert_eq!(profile.tokens(), lengths.iter().map(|l| u64::from(*l)).sum::<u64>());
            let mut sorted = lengths.clone();
            sorted.sort_unstable();
            prop_assert_eq!(profile.quantile(0.5), sorted[lengths.len().div_ceil(2) - 1]);
        }

        /// Scaling loses and invents no row, and bends no share by more than a row a length.
        #[test]
        fn scaling_keeps_rows_and_shares(
            lengths in prop::collection::vec(1_u32..50, 1..200), rows in 1_u64..100_000, limit in 0_u32..60,
        ) {
            let profile = all(&lengths).draw(rows);
            prop_assert_eq!(profile.rows(), rows);
            let expected = all(&lengths).share_over(limit) * rows as f64;
            prop_assert!((profile.rows_over(limit) as f64 - expected).abs() <= 50.0);
        }
    }
}
