//! In which order are the rungs of one length tried?
//!
//! They train the same on the same rows, so only speed decides (`cost.rs`): what is clearly faster than the class's own batch
//! before it, the rest behind it.

use std::cmp::Ordering;

use super::{Candidate, Rule, Sizing, percent};
use crate::tier::{Profile, Tier};

impl Sizing<'_> {
    /// Returns the rungs of one profile and length, in the order in which they are tried.
    ///
    /// 1. Passes without checkpointing, where the job allows them, the fastest first.
    /// 2. Larger micro-batches, the largest first.
    /// 3. Smaller micro-batches that are faster all the same, because less of a pass is padding, the fastest first.
    /// 4. The class's own batch.
    /// 5. The other smaller micro-batches, the fastest first.
    pub(super) fn by_speed(&self, profile: Profile, length: u32) -> Vec<(Tier, Rule)> {
        let cost = self.timing();
        let rung = |micro: u32| self.standard_tier(profile, micro, length);
        let own = rung(self.batches.own);
        let own_time = cost.of(&own);
        let gain = |tier: &Tier, over: f64| over / cost.of(tier) - 1.0;
        let fastest_first = |tiers: &mut Vec<Tier>| {
            // Stable: of two that are as fast, the larger micro-batch stays first.
            tiers.sort_by(|a, b| cost.of(a).total_cmp(&cost.of(b)));
        };
        let (mut kept, mut larger, mut faster, mut slower) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (place, &micro) in self.batches.micro.iter().enumerate() {
            let tier = rung(micro);
            if self.may_keep_activations() && micro <= self.batches.own {
                kept.push(Tier { gradient_checkpointing: false, ..tier.clone() });
            }
            match micro.cmp(&self.batches.own) {
                Ordering::Greater => {
                    let next =
                        self.batches.micro.get(place + 1).map_or(own_time, |next| cost.of(&rung(*next)));
                    larger.push((gain(&tier, next), tier));
                }
                Ordering::Equal => {}
                Ordering::Less if gain(&tier, own_time) >= self.book.ladder.throughput_gain_min => {
                    faster.push(tier)
                }
                Ordering::Less => slower.push(tier),
            }
        }
        for tiers in [&mut kept, &mut faster, &mut slower] {
            fastest_first(tiers);
        }
        let kept = kept.into_iter().map(|tier| (Rule::Larger { gain: gain(&tier, own_time) }, tier));
        let larger = larger.into_iter().map(|(gain, tier)| (Rule::Larger { gain }, tier));
        let careful = |tiers: Vec<Tier>| tiers.into_iter().map(|tier| (Rule::Careful, tier));
        let presumed = std::iter::once((Rule::Presumed, own));
        let ordered = kept.chain(larger).chain(careful(faster)).chain(presumed).chain(careful(slower));
        ordered.map(|(rule, tier)| (tier, rule)).collect()
    }

    /// Returns whether passes without checkpointing may be planned: the job allows it, and nobody has settled it.
    fn may_keep_activations(&self) -> bool {
        self.request.allow.no_checkpointing
            && self.request.pins.gradient_checkpointing.is_none()
            && self.book.profiles.standard.gradient_checkpointing
    }

    /// Returns why a rung of the same length goes before the class's own, where it is faster.
    pub(super) fn note_on_speed(&self, own: &Candidate, taken: &Candidate) -> Option<String> {
        let gain = own.relative_time / taken.relative_time - 1.0;
        if taken.tier.max_length != own.tier.max_length || gain < self.book.ladder.throughput_gain_min {
            return None;
        }
        let why = if !taken.tier.gradient_checkpointing && own.tier.gradient_checkpointing {
            "there is room to keep the activations instead of computing them again (`allow.no_checkpointing`)"
        } else if taken.tier.micro_batch < own.tier.micro_batch {
            "rows are padded to the longest of their pass, and those of this data differ much"
        } else {
            "a larger pass keeps the card busier"
        };
        Some(format!("{} is taken for about {} faster than {}: {why}", taken.tier, percent(gain), own.tier))
    }
}
