//! How many packs does ms-swift make of rows?
//!
//! `packing_strategy` binpack, the default of 4.x and the only one of 3.x. The rows of a pack are never cut.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rows that are packed together; what is left of the last pack goes on with the next ones.
/// Source: `PACKING_BATCH_SIZE` in `swift/dataset/packing.py` (4.6.0) and `swift/llm/dataset/utils.py` (3.12.6).
const ROWS_AT_ONCE: usize = 1000;

/// Returns how many packs of at most `packing_length` tokens ms-swift makes of rows of these lengths, in this order.
///
/// Each thousand rows, longest first, go into the emptiest pack where they fit, else into a new one; the pack that was
/// opened last is taken apart again and packed with the next thousand.
/// Source: `calculate_matched_group` there, and `binpacking.to_constant_volume` (2.0.1), which it calls. In that the
/// emptiest pack of those where a row fits is the emptiest of all, since when it does not fit there it fits nowhere.
pub fn count_packs(lengths: &[u32], packing_length: u32) -> u64 {
    let mut packs = 0;
    let mut waiting: Vec<u32> = Vec::new();
    let mut batches = lengths.chunks(ROWS_AT_ONCE).peekable();
    while let Some(batch) = batches.next() {
        waiting.extend_from_slice(batch);
        let (made, last) = pack(&mut waiting, packing_length);
        let is_last_batch = batches.peek().is_none();
        packs += made - u64::from(!is_last_batch);
        waiting = if is_last_batch { Vec::new() } else { last };
    }
    packs
}

/// Returns how many packs the rows make, and the rows of the one that was opened last.
fn pack(rows: &mut [u32], packing_length: u32) -> (u64, Vec<u32>) {
    rows.sort_unstable_by_key(|length| Reverse(*length));
    // (tokens, number of the pack): the first of the emptiest, as Python's `argmin` takes it.
    let mut emptiest: BinaryHeap<Reverse<(u64, u64)>> = BinaryHeap::new();
    let (mut opened, mut last) = (0, Vec::new());
    for &length in rows.iter() {
        let tokens = u64::from(length);
        let fits = |held: u64| held + tokens <= u64::from(packing_length);
        let (held, pack) = match emptiest.peek() {
            Some(Reverse((held, pack))) if fits(*held) => (*held, *pack),
            Some(_) | None => {
                opened += 1;
                last.clear();
                (0, opened)
            }
        };
        if held > 0 {
            emptiest.pop();
        }
        if pack == opened {
            last.push(length);
        }
        emptiest.push(Reverse((held + tokens, pack)));
    }
    (opened, last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same, as `binpacking.to_constant_volume` does it: a list of packs, searched through for each row.
    fn naive(lengths: &[u32], packing_length: u32) -> u64 {
        let (mut packs, mut waiting) = (0, Vec::new());
        let batches: Vec<&[u32]> = lengths.chunks(ROWS_AT_ONCE).collect();
        for (index, batch) in batches.iter().enumerate() {
            waiting.extend_from_slice(batch);
            waiting.sort_by_key(|length| Reverse(*length));
            let mut bins: Vec<Vec<u32>> = vec![Vec::new()];
            for &length in &waiting {
                let sum = |bin: &[u32]| bin.iter().sum::<u32>();
                let candidates = (0..bins.len()).filter(|&bin| sum(&bins[bin]) + length <= packing_length);
                match candidates.min_by_key(|&bin| sum(&bins[bin])) {
                    Some(bin) => bins[bin].push(length),
                    None if bins[0].is_empty() => bins[0].push(length),
                    None => bins.push(vec![length]),
                }
            }
            waiting = bins.pop().unwrap();
            packs += bins.len() as u64;
            if index + 1 == batches.len() {
                packs += 1;
            }
        }
        packs
    }

    #[test]
    fn the_emptiest_pack_takes_the_next_row() {
        assert_eq!(count_packs(&[], 100), 0);
        assert_eq!(count_packs(&[60, 55, 40, 30], 100), 2);
        // The fullest pack where a row fits would give two: 60 with 40, and 50 with 30 and 20.
        assert_eq!(count_packs(&[60, 50, 40, 30, 20], 100), 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn packs_equal_the_list_of_packs(lengths in prop::collection::vec(1_u32..=512, 0..2600)) {
            let expected = if lengths.is_empty() { 0 } else { naive(&lengths, 512) };
            prop_assert_eq!(count_packs(&lengths, 512), expected);
        }
    }
}
