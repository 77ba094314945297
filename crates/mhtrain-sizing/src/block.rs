//! What does one block of the model keep, and what does it work with?
//!
//! A block's costs are linear forms in the dimensions. Each block kind has its own; a new kind is a new form here
//! and touches nothing else. Symbols: H hidden, q and k the widths of all query and key heads, A query heads, I width
//! of the MLP, M of an expert, T tokens of a pass, B rows, S tokens of a row.
//!
//! Source of the forms: peaks of transformers 5.19 with peft 0.20 under a tracker of storages on fake tensors. They
//! count what autograd saves; forms marked *fitted* were read off measured peaks and not off the code.

use crate::model::{BlockKind, ModelShape, Part};
use crate::workload::{AttnImpl, Dtype, TrainType, Workload};

/// Bytes of one block in one pass.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub(crate) struct BlockCosts {
    /// Kept from the forward to the backward pass.
    pub saved: f64,
    /// Alive at once while the block is recomputed and differentiated, `saved` included.
    pub working: f64,
    /// Kept once for all blocks: the mask.
    pub shared: f64,
}

/// How the adapters touch a block.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub(crate) struct Adapted {
    /// Sum of the inputs of the adapted modules.
    pub inputs: f64,
    /// The same for the modules of the MLP.
    pub mlp_inputs: f64,
    /// Number of adapted modules.
    pub modules: f64,
    /// The down projection is among them.
    pub down: bool,
    /// The gate or up projection is among them.
    pub gate_up: bool,
    /// Rank.
    pub rank: f64,
}

impl Adapted {
    /// Returns how the adapters of `work` touch one block of `shape`.
    pub(crate) fn of(shape: &ModelShape, work: &Workload) -> Adapted {
        let mut adapted = Adapted { rank: f64::from(work.lora_rank), ..Adapted::default() };
        if work.train_type == TrainType::Full {
            return adapted;
        }
        for linear in shape.adapted(&work.targets) {
            adapted.inputs += float(linear.input);
            adapted.mlp_inputs += if linear.part == Part::Attention { 0.0 } else { float(linear.input) };
            adapted.modules += 1.0;
            adapted.down |= linear.part == Part::Down;
            adapted.gate_up |= linear.part == Part::GateUp;
        }
        adapted
    }
}

/// Returns a dimension as a number to calculate with; exact below 2^53, and every dimension is below 2^27.
#[expect(clippy::cast_precision_loss, reason = "dimensions are bounded far below 2^53")]
pub(crate) fn float(dimension: u64) -> f64 {
    dimension as f64
}

/// Returns the costs of one block of `shape` in one pass of `work`.
pub(crate) fn block_costs(shape: &ModelShape, work: &Workload, adapted: &Adapted) -> BlockCosts {
    let sums = Sums::of(shape, work);
    let (tokens, mask, scores) = (sums.tokens, sums.mask(), sums.scores());
    let mlp = sums.norms() / 2.0 + sums.mlp() + sums.mlp_adapters(adapted);
    let per_token =
        sums.norms() / 2.0 + sums.attention() + mlp + sums.adapters(adapted) - sums.mlp_adapters(adapted);
    let saved = tokens * per_token + mask.per_block + scores.saved;
    // Either the MLP is busy while the scores wait, or attention is, when what the MLP kept is gone.
    let mlp_busy = saved + tokens * sums.working(adapted);
    let attention_busy = saved - tokens * mlp + scores.working;
    let mut working = mlp_busy.max(attention_busy);
    if work.train_type == TrainType::Qlora {
        // One weight of the MLP (in a mixture: of attention) is unpacked to bf16 while the activations live.
        let unpacked = 2.0 * sums.h * if sums.i > 0.0 { sums.i } else { sums.q };
        working = working.max(saved + tokens * 2.0 * sums.i + unpacked);
    }
    BlockCosts { saved, working: working + sums.weight_copies(), shared: mask.shared }
}

/// Bytes that grow with the square of a row.
#[derive(Copy, Clone, Debug, Default)]
struct Scores {
    saved: f64,
    working: f64,
}

#[derive(Copy, Clone, Debug, Default)]
struct Mask {
    per_block: f64,
    shared: f64,
}

/// The dimensions as numbers, with the switches that the forms depend on.
struct Sums<'a> {
    shape: &'a ModelShape,
    work: &'a Workload,
    tokens: f64,
    h: f64,
    q: f64,
    k: f64,
    a: f64,
    i: f64,
}

impl Sums<'_> {
    fn of<'a>(shape: &'a ModelShape, work: &'a Workload) -> Sums<'a> {
        Sums {
            shape,
            work,
            tokens: f64::from(work.micro_batch) * f64::from(work.max_length),
            h: float(shape.hidden),
            q: float(shape.q_width()),
            k: float(shape.k_width()),
            a: float(shape.heads),
            i: match &shape.experts {
                Some(experts) => float(experts.shared_intermediate),
                None => float(shape.intermediate),
            },
        }
    }

    fn full(&self) -> bool {
        self.work.train_type == TrainType::Full
    }

    /// Bytes of an activation: 2 under autocast and in pure bf16, 4 in float32.
    fn e(&self) -> f64 {
        if self.work.dtype == Dtype::Float32 { 4.0 } else { 2.0 }
    }

    /// Full fine-tuning in fp16 keeps fp32 weights under fp16 autocast, so the residual stream is fp32.
    fn fp32_stream(&self) -> bool {
        self.full() && self.work.dtype == Dtype::Float16
    }

    /// Norms: the input in fp32; when the scale trains also the normalised copy, and, before a linear that trains, the
    /// result. Gemma normalises wholly in fp32, so its copies take four bytes.
    fn norms(&self) -> f64 {
        let heads = if self.shape.qk_norm { self.q + self.k } else { 0.0 };
        let count = float(self.shape.norms_per_block);
        if !self.full() {
            return count * 4.0 * self.h + 4.0 * heads;
        }
        // The first two norms stand before linears; further ones (Gemma 2, GLM-4) before the residual sum.
        let before_linears = count.min(2.0);
        let normalised =
            if self.shape.block == BlockKind::Gemma || self.fp32_stream() { 4.0 } else { self.e() };
        let results = if self.fp32_stream() {
            // The result is fp32, so each linear that reads it makes its own half copy.
            let fused = if self.shape.fused_qkv { 2.0 } else { 0.0 }
                + if self.shape.fused_gate_up { 1.0 } else { 0.0 };
            (5.0 - fused) * 2.0
        } else {
            before_linears * self.e()
        };
        (count * (4.0 + normalised) + results) * self.h + (4.0 + normalised) * heads
    }

    /// Attention: q, k, v and the result, and the log-sum-exp in fp32. Eager attention keeps its scores instead of the
    /// last two, but a trained output projection keeps the result all the same.
    fn attention(&self) -> f64 {
        let e = self.e();
        let repeated = self.repeats_heads();
        let kv = 2.0 * e * if repeated { self.q } else { self.k };
        let result = match (self.eager(), self.full()) {
            (true, false) => 0.0,
            (true, true) => e * self.q,
            (false, _) => e * self.q + 4.0 * self.a,
        };
        // A fused product is kept alive by v, which is a view of it, unless K and V are repeated.
        let fused = if self.shape.fused_qkv && !repeated { e * (self.q + self.k) } else { 0.0 };
        e * self.q + kv + result + fused
    }

    fn mlp(&self) -> f64 {
        let Some(experts) = &self.shape.experts else {
            return self.gated(self.i);
        };
        let (e, top_k, m) = (self.e(), float(experts.top_k), float(experts.intermediate));
        // Per routed copy: fused gate and up, the activation, the result before it is weighted; when the experts
        // train also their inputs.
        // gpt-oss clamps and scales both halves of its gate, which keeps three more copies.
        let gate = if self.shape.block == BlockKind::GptOss { 6.0 } else { 3.0 };
        let routed =
            top_k * (gate * e * m + e * self.h) + if self.full() { top_k * e * (m + self.h) } else { 0.0 };
        let shared = if self.i > 0.0 { self.gated(self.i) + e * self.h } else { 0.0 };
        routed + shared
    }

    /// Gate, activation of the gate, and up; the product too if the down projection trains.
    fn gated(&self, width: f64) -> f64 {
        if self.full() { 4.0 * self.e() * width } else { 3.0 * self.e() * width }
    }

    /// Adapters: a 1-byte dropout mask and a copy of each input, and the result of the first factor.
    fn adapters(&self, adapted: &Adapted) -> f64 {
        (1.0 + self.e()) * adapted.inputs + self.e() * adapted.rank * adapted.modules
    }

    /// The part of [`Sums::adapters`] that belongs to the MLP.
    fn mlp_adapters(&self, adapted: &Adapted) -> f64 {
        (1.0 + self.e()) * adapted.mlp_inputs
    }

    /// fp32 weights under fp16 autocast: half copies of one block's weights.
    fn weight_copies(&self) -> f64 {
        if self.fp32_stream() && self.shape.layers > 0 {
            2.0 * float(self.shape.linear_weights()) / float(self.shape.layers)
        } else {
            0.0
        }
    }

    /// What the busiest moment of a block's backward pass needs beyond what is saved, per token.
    fn working(&self, adapted: &Adapted) -> f64 {
        let wide = self.work.dtype == Dtype::Float32;
        if let Some(experts) = &self.shape.experts {
            return self.e() / 2.0 * (6.0 * float(experts.top_k) * self.h + 4.0 * self.h + 4.0 * self.i);
        }
        match (self.full(), adapted.down || adapted.gate_up) {
            // Fitted on two models.
            (true, _) if wide => 8.0 * self.i + 0.25 * self.h,
            (true, _) => 4.0 * self.i + 4.0 * self.h,
            // Fitted on two models.
            (false, true) if wide => 6.0 * self.i + 5.0 * self.h + 5.5 * self.k,
            // The down projection of the recomputed forward: the product, its fp32 copy, its dropped copy.
            (false, true) => 10.0 * self.i + 6.0 * self.h,
            // Backward through the gate.
            (false, false) if wide => 12.0 * self.i + 4.0 * self.h,
            (false, false) => 6.0 * self.i + 2.0 * self.h,
        }
    }

    fn eager(&self) -> bool {
        self.work.attn_impl == AttnImpl::Eager
    }

    /// K and V are repeated to all heads by eager attention, and by sdpa with a mask.
    fn repeats_heads(&self) -> bool {
        // A single head is repeated by a view and not by a copy.
        (2..self.shape.heads).contains(&self.shape.kv_heads) && (self.eager() || self.masked())
    }

    fn masked(&self) -> bool {
        !self.work.attn_impl.is_flash() && !self.eager() && self.work.padded
    }

    fn square(&self) -> f64 {
        let (rows, length) = if self.work.packing {
            (1.0, self.tokens)
        } else {
            (f64::from(self.work.micro_batch), f64::from(self.work.max_length))
        };
        rows * length * length
    }

    /// sdpa with a mask: one boolean mask, and in each block its bf16 form.
    fn mask(&self) -> Mask {
        if self.eager() {
            Mask { per_block: 0.0, shared: 2.0 * self.square() }
        } else if self.masked() {
            Mask { per_block: 2.0 * self.square(), shared: self.square() }
        } else {
            Mask::default()
        }
    }

    /// Eager attention: the softmax in fp32 and its copy in the type of V are kept for each head. In its backward pass
    /// as much again lives: the gradient of either, and the product of gradient and softmax.
    ///
    /// Source: `eager_attention_forward` in `modeling_llama.py`, transformers 5.19; the busy moment is measured.
    fn scores(&self) -> Scores {
        if !self.eager() {
            return Scores::default();
        }
        let scores = self.a * self.square();
        if self.shape.attention_sinks {
            // The softmax is not lifted to fp32 (`modeling_gpt_oss.py`).
            return Scores { saved: self.e() * scores, working: 2.0 * self.e() * scores };
        }
        let copy = if self.work.dtype == Dtype::Float32 { 0.0 } else { 2.0 };
        Scores { saved: (4.0 + copy) * scores, working: 6.0 * scores }
    }
}
