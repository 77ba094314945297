//! Which hosts and which data are the contestants given?
//!
//! A case is a card whose memory runs out, drawn from the seed; every contestant gets the same one. The capacity is
//! simulated by the demo's plugin: a pass needs one MiB for each token of its padded rectangle (micro-batch x longest row in
//! it), on top of what stays resident. Kinds take turns, so that a few cases hold all of them.

use std::fmt::Write as _;

use crate::draws::Draws;

/// Rows of one optimizer step, as the recipe's row for the model has it (8 x 4).
pub(super) const EFFECTIVE: u64 = 32;
/// Rows of the data: eight steps an epoch.
pub(super) const ROWS: u64 = 256;
/// Passes over the data: a resume of ms-swift 3.x inside the second differs from one inside the first.
pub(super) const EPOCHS: u64 = 2;
/// Optimizer steps of the whole training.
pub(super) const STEPS: u64 = ROWS / EFFECTIVE * EPOCHS;
/// Steps between checkpoints: the recipe's 200, scaled to so short a training.
pub(super) const SAVE_STEPS: u64 = 4;
/// Seconds that a neighbour stays who comes.
pub(super) const NEIGHBOUR_S: u64 = 20;

const MIB: u64 = 1 << 20;
/// What a token of a pass takes, and what stays between passes.
pub(super) const TOKEN_BYTES: u64 = MIB;
pub(super) const RESIDENT_BYTES: u64 = 512 * MIB;
/// A card on which eight of the longest rows fit.
const ROOMY_BYTES: u64 = 2048 * MIB;

/// Why memory runs out.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// From the beginning there is too little for a micro-batch with the longest rows; it comes when they are drawn.
    LongRow,
    /// What stays resident grows at a late step, and stays.
    Growth,
    /// Somebody else takes memory at a late step, and gives it back after a while.
    Neighbour,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::LongRow => "long row",
            Kind::Growth => "growth",
            Kind::Neighbour => "neighbour",
        }
    }
}

/// One simulated host.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) number: u32,
    pub(super) kind: Kind,
    /// The largest micro-batch of the halving ladder that always fits, even while memory is short.
    pub(super) fits: u64,
    /// The optimizer step from which on memory is short, counted from 1.
    pub(super) step: u64,
    /// What a pass may need while memory is short.
    pub(super) short_bytes: u64,
}

impl Case {
    /// Returns the first `count` cases of a seed, for data whose longest row has so many tokens.
    pub(super) fn draw(seed: u64, count: u32, longest: u64) -> Vec<Case> {
        let mut draws = Draws::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let first = draws.below(3);
        let kinds = [Kind::LongRow, Kind::Growth, Kind::Neighbour];
        (1..=count)
            .map(|number| {
                let kind = kinds[(first + number as usize) % kinds.len()];
                let fits = draws.pick(&[4, 2, 1]);
                let drawn = 2 + u64::try_from(draws.below(13)).unwrap_or(0);
                let step = if kind == Kind::LongRow { 1 } else { drawn };
                // Between `fits` and twice as many of the longest rows; not at an edge, where one token decides.
                let thousandths = 30 + u64::try_from(draws.below(940)).unwrap_or(0);
                let short_bytes = fits * longest * TOKEN_BYTES / 1000 * (1000 + thousandths);
                Case { number, kind, fits, step, short_bytes }
            })
            .collect()
    }

    /// Returns the same case for data whose longest row has so many tokens: where rows are shorter, more of them may fit.
    pub(super) fn with_longest(self, longest: u64) -> Case {
        let fits = [4, 2, 1].into_iter().find(|rows| rows * longest * TOKEN_BYTES <= self.short_bytes);
        Case { fits: fits.unwrap_or(1), ..self }
    }

    /// Returns the total of the card.
    pub(super) fn card_bytes(&self) -> u64 {
        match self.kind {
            Kind::LongRow => RESIDENT_BYTES + self.short_bytes,
            Kind::Growth | Kind::Neighbour => ROOMY_BYTES,
        }
    }

    /// Returns what is lacking from the late step on: more that is resident, or a neighbour's.
    pub(super) fn lacking_bytes(&self) -> u64 {
        self.card_bytes() - RESIDENT_BYTES - self.short_bytes
    }
}

/// Returns the rows of the data: most short, one in twenty long, each with its marker `<id NNNN>`.
pub(super) fn rows() -> String {
    // Words that the demo's tokenizer has learned.
    const WORDS: [&str; 7] = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];
    let mut draws = Draws::new(20);
    let mut text = String::new();
    for row in 0..ROWS {
        let words = if row % 20 == 7 { 90 + draws.below(31) } else { 6 + draws.below(31) };
        let first = draws.below(WORDS.len());
        let say: Vec<&str> = (0..words).map(|n| WORDS[(first + n) % WORDS.len()]).collect();
        let messages = serde_json::json!({"messages": [
            {"role": "user", "content": format!("<id {row:04}> Start with {} and go on for {words} words.", WORDS[first])},
            {"role": "assistant", "content": say.join(" ")},
        ]});
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{messages}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_the_same_for_a_seed_and_lack_what_they_should() {
        let few = Case::draw(1, 3, 170);
        let many = Case::draw(1, 30, 170);
        assert_eq!(few[..], many[..3], "more cases do not change the first");
        assert_ne!(many, Case::draw(2, 30, 170));
        for case in many {
            let tokens = case.short_bytes / TOKEN_BYTES;
            assert!(case.fits * 170 < tokens && tokens < 2 * case.fits * 170, "{case:?}");
            assert!((1..STEPS).contains(&case.step), "{case:?}");
            assert_eq!(case.with_longest(170), case);
            assert!(case.with_longest(100).fits >= case.fits, "shorter rows, more of them");
            assert!(case.kind == Kind::LongRow || case.lacking_bytes() > 0, "{case:?}");
        }
    }

    #[test]
    fn every_row_has_its_marker() {
        let text = rows();
        assert_eq!(text.lines().count() as u64, ROWS);
        assert!(text.lines().enumerate().all(|(n, line)| line.contains(&format!("<id {n:04}>"))));
    }
}
