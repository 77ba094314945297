//! Which of two rungs trains faster?
//!
//! The time of a trained token is taken as
//!
//! ```text
//! padding x (saturation + attention) x recomputation
//! ```
//!
//! in units of the token's matrix products at full speed. Only ratios between rungs of one job on one card mean anything. Nothing
//! here was measured on a card by this project: each factor says where it comes from, and what is an assumption.

use crate::block::float;
use crate::data::LengthProfile;
use crate::ladder::LadderRules;
use crate::model::{Model, ModelShape};
use crate::request::Request;
use crate::tier::Tier;
use crate::workload::{AttnImpl, TrainType};

/// What the time of a trained token depends on beside the rung.
#[derive(Copy, Clone, Debug)]
pub struct Cost<'a> {
    model: &'a Model,
    train_type: TrainType,
    data: Option<&'a LengthProfile>,
    rules: &'a LadderRules,
}

impl<'a> Cost<'a> {
    /// Returns the cost model of a job.
    pub fn new(request: &'a Request, rules: &'a LadderRules) -> Cost<'a> {
        Cost { model: &request.model, train_type: request.train_type, data: request.data.as_ref(), rules }
    }

    /// Returns the time of a trained token at `tier`; 1 and more.
    pub fn of(&self, tier: &Tier) -> f64 {
        let rows = Rows::of(tier, self.data);
        let tokens = (f64::from(tier.micro_batch) * rows.computed).max(1.0);
        rows.padding() * (self.saturation(tokens) + self.attention(tier, &rows)) * self.recomputation(tier)
    }

    /// Returns the time of a row (a pack, where rows are packed), its padding among it, in the same units.
    pub fn of_row(&self, tier: &Tier) -> f64 {
        Rows::of(tier, self.data).trained * self.of(tier)
    }

    /// Returns how many tokens a row of a pass has with its padding, on average; `None` where it is not known.
    pub fn row_tokens(&self, tier: &Tier) -> Option<f64> {
        let is_known = tier.packing || self.data.is_some_and(|data| !data.within(tier.max_length).is_empty());
        is_known.then(|| Rows::of(tier, self.data).computed)
    }

    /// Returns by what a pass of `tokens` is slower than one of many: a matrix product first waits for its weights, then each
    /// token adds its share of arithmetic, so a pass of T tokens runs at T / (T + T0) of full speed.
    ///
    /// Source: the roofline (Williams et al. 2009); T0 is `[ladder] saturation_tokens`. Experts see their share of the tokens
    /// each, so theirs is as many times larger as there are experts to one that a token visits (arithmetic, no measurement).
    fn saturation(&self, tokens: f64) -> f64 {
        let shape = &self.model.shape;
        let share = shape.experts.as_ref().map_or(1.0, |experts| {
            float(experts.count.max(1)) / float(experts.top_k.clamp(1, experts.count.max(1)))
        });
        1.0 + share * self.rules.saturation_tokens / tokens
    }

    /// Returns the time of attention's products as a share of the others'.
    ///
    /// A token of a row of S has S / 2 others before it, and two products with each. How much slower than `FlashAttention` 2
    /// the others are: its paper (Dao 2023, section 4.1) has it about twice as fast as xFormers' kernel, which is what sdpa
    /// takes for rows with a mask, and 3 to 10 times as fast as plain products. That sdpa takes flash's own kernel for rows
    /// without padding is read off torch's choice of kernels. Not counted: sliding windows, and that a mask hides what would
    /// not have been computed without it.
    fn attention(&self, tier: &Tier, rows: &Rows) -> f64 {
        let shape = &self.model.shape;
        let products = float(shape.q_width()) * float(shape.layers) * rows.context;
        let masked = rows.padding() > 1.0;
        let slower = match tier.attn_impl {
            AttnImpl::FlashAttn
            | AttnImpl::FlashAttention2
            | AttnImpl::FlashAttention3
            | AttnImpl::FlashAttention4 => 1.0,
            AttnImpl::Sdpa | AttnImpl::FlexAttention if masked => 2.0,
            AttnImpl::Sdpa | AttnImpl::FlexAttention => 1.0,
            AttnImpl::Eager => 6.0,
        };
        slower * products / active_weights(shape).max(1.0)
    }

    /// Returns by what computing the activations again makes a pass longer: one more forward pass.
    ///
    /// A forward pass is one unit; a backward pass two in full fine-tuning (gradients of weights and of activations) and one
    /// with frozen weights. Source: arithmetic, 4/3 and 3/2; published are 1.3 to 1.4 for full training (Korthikanti et al.
    /// 2022, section 1) and about 1.2 (transformers' page on gradient checkpointing).
    fn recomputation(&self, tier: &Tier) -> f64 {
        match (tier.gradient_checkpointing, self.train_type) {
            (false, _) => 1.0,
            (true, TrainType::Full) => 4.0 / 3.0,
            (true, TrainType::Lora | TrainType::Qlora) => 3.0 / 2.0,
        }
    }
}

/// What a rung makes of the rows, in tokens.
#[derive(Copy, Clone, Debug)]
struct Rows {
    /// Mean length of a row that is trained.
    trained: f64,
    /// Mean length of it with its padding.
    computed: f64,
    /// Tokens that stand in a row with a token, on average over the tokens that are computed.
    context: f64,
}

impl Rows {
    /// Packed rows are full (ms-swift's packs of real data are full to some percent) and attention stays inside of each row of a
    /// pack; rows that are not packed are padded to the longest of their pass. Without data every row counts as full.
    fn of(tier: &Tier, data: Option<&LengthProfile>) -> Rows {
        let full = f64::from(tier.max_length);
        let lengths = data.map_or(&[][..], |data| data.within(tier.max_length));
        let count: f64 = lengths.iter().map(|(_, rows)| float(*rows)).sum();
        if count <= 0.0 {
            return Rows { trained: full, computed: full, context: full };
        }
        let sum = |of: fn(f64) -> f64| {
            lengths.iter().map(|(tokens, rows)| of(f64::from(*tokens)) * float(*rows)).sum::<f64>()
        };
        let (tokens, squares) = (sum(|tokens| tokens).max(1.0), sum(|tokens| tokens * tokens));
        if tier.packing {
            return Rows { trained: full, computed: full, context: squares / tokens };
        }
        let longest = mean_of_longest(lengths, count, tier.micro_batch);
        Rows { trained: tokens / count, computed: longest.max(1.0), context: longest }
    }

    /// Returns the tokens that are computed for each that is trained.
    fn padding(&self) -> f64 {
        self.computed / self.trained.max(1.0)
    }
}

/// Returns the mean length of the longest of `drawn` rows: the distribution of the longest is the distribution of one to that
/// power.
fn mean_of_longest(lengths: &[(u32, u64)], count: f64, drawn: u32) -> f64 {
    let mut below = 0.0;
    let mut mean = 0.0;
    for (tokens, rows) in lengths {
        let upto = below + float(*rows);
        let power = |share: f64| share.min(1.0).powf(f64::from(drawn));
        mean += f64::from(*tokens) * (power(upto / count) - power(below / count));
        below = upto;
    }
    mean
}

/// Returns the weights that a token is multiplied with: linear modules, the experts that it visits, and the head.
fn active_weights(shape: &ModelShape) -> f64 {
    let experts = shape.experts.as_ref().map_or(0.0, |experts| {
        float(shape.expert_weights()) * float(experts.top_k) / float(experts.count.max(1))
    });
    float(shape.linear_weights()) + experts + float(shape.vocab) * float(shape.hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_many_rows_is_the_longest_of_all() {
        let lengths = [(100, 90), (1000, 10)];
        assert!((mean_of_longest(&lengths, 100.0, 1) - 190.0).abs() < 1e-9);
        // Two rows are both short in 81 of 100 draws.
        assert!((mean_of_longest(&lengths, 100.0, 2) - (81.0 + 190.0)).abs() < 1e-9);
        assert!(mean_of_longest(&lengths, 100.0, 64) > 998.0);
    }

    #[test]
    fn the_weights_of_a_token_are_the_experts_that_it_visits() {
        let dense = Model::resolve("Qwen2.5-7B", None, None).unwrap();
        let active = active_weights(&dense.shape) / 1e9;
        assert!((6.9..7.2).contains(&active), "{active}");
        let mixture = Model::resolve("Qwen3-30B-A3B", None, None).unwrap();
        let active = active_weights(&mixture.shape) / 1e9;
        assert!((2.5..3.3).contains(&active), "{active}");
    }
}
