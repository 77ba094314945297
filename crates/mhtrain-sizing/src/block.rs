//! What does one block of the model take and give back, in order?
//!
//! Each function below is the list of one part of a block: the operations of its `forward`, in the order of the code,
//! with the moments at which Python lets go of a value. [`Tape`] turns them into sums of bytes and replays them
//! backwards. Which parts a block has is said by its [`Style`](crate::model::Style); a new kind of operation is a new list
//! here, and needs no new constants.
//!
//! Source: `modeling_*.py` of transformers 5.19 (named at each part), `peft/tuners/lora/layer.py` of peft 0.20. They were
//! written from what `tests/record_blocks.py` prints; that they meet the recorded peaks is `tests/peaks.rs`.

mod delta_net;
mod latent;

use crate::model::{
    Activation, AttentionBias, AttentionGate, BlockKind, Convolution, Gemma4, HeadNorm, Heads, Keys, Layer,
    Mixer, ModelShape, Norm, Part, Placement, Rotary, Router, Shared,
};
use crate::tape::{Kernel, Parameter, Rotation, Saved, Scores, Tape, Tensor, Weight};
use crate::workload::{AttnImpl, Dtype, TrainType, Workload};

/// Returns a dimension as a number to calculate with; exact below 2^53, and every dimension is below 2^27.
#[expect(clippy::cast_precision_loss, reason = "dimensions are bounded far below 2^53")]
pub(crate) fn float(dimension: u64) -> f64 {
    dimension as f64
}

/// Which linear modules of a block carry adapters.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
struct Adapted {
    q: bool,
    k: bool,
    v: bool,
    qkv: bool,
    output: bool,
    gate: bool,
    up: bool,
    gate_up: bool,
    down: bool,
    router: bool,
    shared_gate: bool,
    input_gate: bool,
    input_projection: bool,
    all_inputs: bool,
    convolution_in: bool,
    convolution_out: bool,
    delta_in: bool,
    delta_gate: bool,
    delta_step: bool,
    delta_decay: bool,
    delta_out: bool,
    query_in: bool,
    query_out: bool,
    latent_in: bool,
    latent_out: bool,
    attention_gate: bool,
}

/// What a block gets beside the residual stream, and what it leaves for later ones.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Given {
    /// Sine and cosine of the positions.
    pub tables: [Tensor; 2],
    /// Keys and values of an earlier layer (Gemma 4); those that a layer stores take their place.
    pub stored: Option<[Tensor; 2]>,
    /// What the layer knows of the tokens (Gemma 4).
    pub input: Option<Tensor>,
}

impl Given {
    /// Returns what most layers get: the tables alone.
    pub(crate) fn tables(tables: [Tensor; 2]) -> Given {
        Given { tables, stored: None, input: None }
    }
}

/// A model and a pass as the lists need them.
#[derive(Debug)]
pub(crate) struct Lists<'a> {
    shape: &'a ModelShape,
    /// Rows and tokens of a row, as the kernels see them.
    pub rows: f64,
    /// Tokens of a row.
    pub length: f64,
    /// Tokens of a pass.
    pub tokens: f64,
    /// H.
    pub h: f64,
    q: f64,
    k: f64,
    heads: f64,
    head_dim: f64,
    /// Parameters of the model train.
    pub full: bool,
    /// 4-bit weights.
    four_bit: bool,
    /// Bytes of a weight.
    pub weight_width: f64,
    /// Bytes of the residual stream.
    pub stream_width: f64,
    /// Matrix products are cast to this width by autocast; `None` without autocast.
    autocast: Option<f64>,
    rank: f64,
    adapted: Adapted,
    attention: AttnImpl,
    padded: bool,
    /// Experts are linear modules.
    expert_modules: bool,
}

impl<'a> Lists<'a> {
    pub(crate) fn of(shape: &'a ModelShape, work: &Workload) -> Lists<'a> {
        let full = work.train_type == TrainType::Full;
        let tokens = f64::from(work.micro_batch) * f64::from(work.max_length);
        let (rows, length) = if work.packing {
            (1.0, tokens)
        } else {
            (f64::from(work.micro_batch), f64::from(work.max_length))
        };
        // Full fine-tuning in fp16 keeps fp32 weights under fp16 autocast, so the residual stream is fp32. Adapters
        // are fp32 beside half weights, and accelerate runs the pass under autocast; with fp32 weights there is none.
        let wide = work.dtype == Dtype::Float32 || (full && work.dtype == Dtype::Float16);
        let width = if wide { 4.0 } else { 2.0 };
        Lists {
            shape,
            rows,
            length,
            tokens,
            h: float(shape.hidden),
            q: float(shape.q_width()),
            k: float(shape.k_width()),
            heads: float(shape.heads),
            head_dim: float(shape.head_dim),
            full,
            four_bit: work.train_type == TrainType::Qlora,
            weight_width: width,
            stream_width: width,
            autocast: (work.dtype != Dtype::Float32).then_some(2.0),
            rank: f64::from(work.lora_rank),
            adapted: if full { Adapted::default() } else { Adapted::of(shape, work) },
            attention: work.attn_impl,
            padded: work.padded,
            expert_modules: shape.has_expert_modules(work.experts),
        }
    }

    /// Returns what one number of the RMSNorm scale or another parameter of the block weighs.
    fn parameter(&self, n: f64) -> Parameter {
        Parameter { n, width: self.weight_width, trains: self.full }
    }

    /// A linear module: product, and beside it the adapter (`Linear.forward` of peft: the input is lifted to the
    /// adapter's fp32, dropped out, and goes through both factors under autocast).
    pub(crate) fn linear(
        &self,
        tape: &mut Tape,
        x: Tensor,
        sizes: [f64; 2],
        bias: bool,
        adapted: bool,
    ) -> Tensor {
        self.linears(tape, x, sizes, bias, adapted, 1.0)
    }

    /// As many linear modules as `times` that share the rows: those of experts.
    fn linears(
        &self,
        tape: &mut Tape,
        x: Tensor,
        sizes: [f64; 2],
        bias: bool,
        adapted: bool,
        times: f64,
    ) -> Tensor {
        let [input, output] = sizes;
        let base = if self.four_bit {
            tape.four_bit(x, x.n / input, input, output, self.weight_width)
        } else {
            self.products(tape, x, sizes, bias, self.full, times)
        };
        if adapted { self.adapter(tape, x, base, sizes, times) } else { base }
    }

    /// What an adapter adds to `base`, the product of `x`.
    fn adapter(&self, tape: &mut Tape, x: Tensor, base: Tensor, sizes: [f64; 2], times: f64) -> Tensor {
        self.adapter_of(tape, x, base, sizes, times, false)
    }

    /// As [`Lists::adapter`]; `strided` where the gradient of its product is no row beside the other, and is copied.
    fn adapter_of(
        &self,
        tape: &mut Tape,
        x: Tensor,
        base: Tensor,
        sizes: [f64; 2],
        times: f64,
        strided: bool,
    ) -> Tensor {
        let [input, output] = sizes;
        let lifted = tape.cast(x, 4.0);
        let dropped = tape.dropout(lifted);
        let narrow = self.factor(tape, dropped, [input, self.rank], times);
        tape.drop(dropped);
        let mut product = self.factor(tape, narrow, [self.rank, output], times);
        tape.drop(narrow);
        if strided {
            product = self.copied_back(tape, product);
        }
        let scaled = tape.scale(product);
        tape.drop(product);
        let sum = tape.add(base, scaled);
        tape.drop(scaled);
        tape.drop(base);
        tape.drop(lifted);
        sum
    }

    /// A plain product with a weight of the model.
    pub(crate) fn product(
        &self,
        tape: &mut Tape,
        x: Tensor,
        sizes: [f64; 2],
        bias: bool,
        trains: bool,
    ) -> Tensor {
        self.products(tape, x, sizes, bias, trains, 1.0)
    }

    fn products(
        &self,
        tape: &mut Tape,
        x: Tensor,
        sizes: [f64; 2],
        bias: bool,
        trains: bool,
        times: f64,
    ) -> Tensor {
        let [input, output] = sizes;
        let width = self.autocast.unwrap_or(self.weight_width);
        let copy = (width < self.weight_width)
            .then(|| tape.weight_copy(times * input * output, self.weight_width, width, trains));
        let narrow = tape.cast(x, width);
        let weight = Weight { input, output, width, trains, copy, bias, times };
        let out = tape.matrix(narrow, x.n / input, weight);
        tape.drop(narrow);
        if let Some(copy) = copy {
            tape.drop(copy);
        }
        out
    }

    /// One factor of an adapter: fp32, copied to half by autocast.
    fn factor(&self, tape: &mut Tape, x: Tensor, sizes: [f64; 2], times: f64) -> Tensor {
        let [input, output] = sizes;
        let width = self.autocast.unwrap_or(4.0);
        let copy = (width < 4.0).then(|| tape.weight_copy(times * input * output, 4.0, width, true));
        let narrow = tape.cast(x, width);
        let weight = Weight { input, output, width, trains: true, copy, bias: false, times };
        let out = tape.matrix(narrow, x.n / input, weight);
        tape.drop(narrow);
        if let Some(copy) = copy {
            tape.drop(copy);
        }
        out
    }

    /// The norm of the kind over rows of `size`.
    pub(crate) fn norm(&self, tape: &mut Tape, x: Tensor, size: f64) -> Tensor {
        match self.shape.style.norm {
            Norm::Half | Norm::Wide | Norm::Lifted | Norm::Raised | Norm::Bare => {
                self.rms_norm(tape, x, size)
            }
            Norm::Power => self.power_norm(tape, x, size, true),
            Norm::Centred => self.centred_norm(tape, x, size, size),
            Norm::Layer { bias } => self.layer_norm(tape, x, size, bias),
            Norm::LayerRaised => {
                // `NemotronLayerNorm1P.forward`: autocast's half type for everything, then without autocast.
                let parameter = self.parameter(size);
                let raised = tape.raised_parameter(parameter);
                let out = tape.layer_norm(x, x.n / size, [raised.node_if(), tape.leaf_if(parameter)], size);
                tape.drop(raised);
                out
            }
            Norm::LayerLifted => {
                let lifted = tape.cast(x, 4.0);
                let wide = tape.layer_norm(lifted, x.n / size, [None; 2], size);
                tape.drop(lifted);
                let out = tape.cast(wide, x.width);
                tape.drop(wide);
                out
            }
        }
    }

    /// `nn.LayerNorm.forward`. The tables were measured under the autocast of a CPU, which leaves it in half precision;
    /// that of a card makes its result fp32.
    fn layer_norm(&self, tape: &mut Tape, x: Tensor, size: f64, bias: bool) -> Tensor {
        let leaf = tape.leaf_if(self.parameter(size));
        tape.layer_norm(x, x.n / size, [leaf, leaf.filter(|_| bias)], size)
    }

    /// `CohereLayerNorm.forward`, with a weight of `n` elements.
    fn centred_norm(&self, tape: &mut Tape, x: Tensor, size: f64, n: f64) -> Tensor {
        let rows = x.n / size;
        let lifted = tape.cast(x, 4.0);
        let mean = tape.mean(lifted, rows);
        let apart = tape.minus(lifted, mean);
        let squares = tape.square(apart);
        tape.drop(apart);
        let variance = tape.mean(squares, rows);
        tape.drop(squares);
        let apart = tape.minus(lifted, mean);
        let shifted = tape.plus_number(variance);
        let inverse = tape.rsqrt(shifted);
        tape.drop(shifted);
        let normal = tape.multiply(apart, inverse);
        tape.drop(inverse);
        tape.drop(apart);
        tape.drop(lifted);
        let weight = tape.lifted_parameter(n, self.weight_width, self.full);
        let scaled = tape.multiply(weight, normal);
        tape.drop(weight);
        tape.drop(normal);
        let out = tape.cast(scaled, x.width);
        for tensor in [scaled, mean, variance] {
            tape.drop(tensor);
        }
        out
    }

    /// `Gemma4RMSNorm.forward`, with or without a scale.
    fn power_norm(&self, tape: &mut Tape, x: Tensor, size: f64, scales: bool) -> Tensor {
        let lifted = tape.cast(x, 4.0);
        let squares = tape.power(lifted);
        let mean = tape.mean(squares, x.n / size);
        tape.drop(squares);
        let shifted = tape.plus_number(mean);
        tape.drop(mean);
        let inverse = tape.power(shifted);
        let mut normal = tape.multiply(lifted, inverse);
        for tensor in [inverse, lifted, shifted] {
            tape.drop(tensor);
        }
        if scales {
            let weight = tape.lifted_parameter(size, self.weight_width, self.full);
            let scaled = tape.multiply(normal, weight);
            tape.drop(weight);
            tape.drop(normal);
            normal = scaled;
        }
        let out = tape.cast(normal, x.width);
        tape.drop(normal);
        out
    }

    fn rms_norm(&self, tape: &mut Tape, x: Tensor, size: f64) -> Tensor {
        let rows = x.n / size;
        let lifted = tape.cast(x, 4.0);
        let squares = tape.square(lifted);
        let variance = tape.mean(squares, rows);
        tape.drop(squares);
        let shifted = tape.plus_number(variance);
        let kind = self.shape.style.norm;
        if matches!(kind, Norm::Bare | Norm::Raised) {
            tape.drop(variance);
            let inverse = tape.rsqrt(shifted);
            tape.drop(shifted);
            let normal = tape.multiply(lifted, inverse);
            tape.drop(inverse);
            tape.drop(lifted);
            let scaled = if kind == Norm::Raised {
                // `modeling_gemma*.py`: (1 + weight) in fp32, the result cast back.
                let weight = tape.lifted_parameter(size, self.weight_width, self.full);
                let raised = tape.plus_number(weight);
                tape.drop(weight);
                let scaled = tape.multiply(normal, raised);
                tape.drop(raised);
                tape.drop(normal);
                scaled
            } else {
                // `NanoChatRMSNorm.forward` has no weight.
                normal
            };
            let out = tape.cast(scaled, x.width);
            tape.drop(scaled);
            return out;
        }
        let inverse = tape.rsqrt(shifted);
        tape.drop(shifted);
        let normal = tape.multiply(lifted, inverse);
        tape.drop(inverse);
        tape.drop(lifted);
        let (first, out);
        if kind == Norm::Half {
            first = tape.cast(normal, x.width);
            out = tape.multiply_by_parameter(first, self.parameter(size));
        } else if kind == Norm::Lifted {
            // `HeliumRMSNorm.forward`: the weight is lifted to fp32.
            let weight = tape.lifted_parameter(size, self.weight_width, self.full);
            first = tape.multiply(weight, normal);
            tape.drop(weight);
            out = tape.cast(first, x.width);
        } else {
            // `modeling_gpt_oss.py`, `Olmo2RMSNorm.forward`: the weight is applied in fp32.
            first = tape.multiply_by_parameter(normal, self.parameter(size));
            out = tape.cast(first, x.width);
        }
        tape.drop(first);
        tape.drop(normal);
        tape.drop(variance);
        out
    }

    /// One block: norms, attention, MLP, and the residual sums (`*DecoderLayer.forward`).
    pub(crate) fn block(&self, tape: &mut Tape, x: Tensor, layer: Layer, given: &mut Given) -> Tensor {
        let placement = self.shape.style.placement;
        let before = placement != Placement::After;
        let after = matches!(placement, Placement::After | Placement::Around);
        let normal = if before { self.norm(tape, x, self.h) } else { tape.hold(x) };
        let mut attended = match &self.shape.gemma4 {
            Some(gemma4) => self.gemma4_attention(tape, normal, layer, given, gemma4),
            None if layer.mixer == Mixer::Convolution => self.short_convolution(tape, normal),
            None if let (Mixer::DeltaNet, Some(net)) = (layer.mixer, &self.shape.delta_net) => {
                self.delta_net(tape, normal, net)
            }
            None if let Some(latent) = &self.shape.latent => {
                self.latent_attention(tape, normal, layer, given.tables, latent)
            }
            None => self.attention(tape, normal, layer, given.tables),
        };
        if placement == Placement::ParallelOwn {
            tape.drop(normal);
            let normal = self.norm(tape, x, self.h);
            let expanded = self.expanded(tape, normal, layer);
            tape.drop(normal);
            // `GPTNeoXLayer.forward`: mlp_output + attn_output + hidden_states.
            let middle = tape.add(expanded, attended);
            let out = tape.add(middle, x);
            for tensor in [attended, expanded, middle] {
                tape.drop(tensor);
            }
            return out;
        }
        if placement == Placement::Parallel {
            let expanded = self.expanded(tape, normal, layer);
            let middle = tape.add(x, attended);
            let out = tape.add(middle, expanded);
            for tensor in [normal, attended, expanded, middle] {
                tape.drop(tensor);
            }
            return out;
        }
        tape.drop(normal);
        if after {
            attended = self.replaced_by_norm(tape, attended);
        }
        let middle = self.added(tape, x, attended);
        let normal = if before { self.norm(tape, middle, self.h) } else { tape.hold(middle) };
        let mut expanded = self.expanded(tape, normal, layer);
        tape.drop(normal);
        let mut locals = Vec::new();
        if self.shape.gemma4.is_some() && self.shape.experts.is_some() {
            (expanded, locals) = self.gemma4_mixture(tape, middle, expanded);
        }
        if after {
            expanded = self.replaced_by_norm(tape, expanded);
        }
        let mut out = self.added(tape, middle, expanded);
        tape.drop(middle);
        for tensor in locals {
            tape.drop(tensor);
        }
        if self.shape.gemma4.is_some() {
            if let Some(input) = given.input {
                out = self.with_input(tape, out, input);
            }
            // `hidden_states *= self.layer_scalar`, in place.
            let scaled = tape.copied_back(out);
            tape.drop(out);
            out = scaled;
        }
        out
    }

    /// What Gemma 4 makes of the stream and of what a layer knows of the tokens, added to the stream.
    fn with_input(&self, tape: &mut Tape, x: Tensor, input: Tensor) -> Tensor {
        let width = input.n / self.tokens;
        let gate = self.linear(tape, x, [self.h, width], false, self.adapted.input_gate);
        let active = tape.unary(gate, Saved::Input);
        tape.drop(gate);
        let product = tape.multiply(active, input);
        tape.drop(active);
        let wide = self.linear(tape, product, [width, self.h], false, self.adapted.input_projection);
        tape.drop(product);
        let normal = self.replaced_by_norm(tape, wide);
        let out = tape.add(x, normal);
        tape.drop(normal);
        tape.drop(x);
        out
    }

    /// What each layer of Gemma 4 knows of the tokens: of their own table, and of the embedding `x`.
    ///
    /// Source: `get_per_layer_inputs` and `project_per_layer_inputs` in `modeling_gemma4.py`.
    pub(crate) fn all_inputs(&self, tape: &mut Tape, x: Tensor, gemma4: &Gemma4) -> Tensor {
        let columns = float(gemma4.inputs) * float(self.shape.layers);
        let table = self.parameter(float(gemma4.inputs_vocab) * columns);
        let looked_up = tape.embedding(self.tokens * columns, table);
        let own = tape.scale(looked_up);
        tape.drop(looked_up);
        let product = self.linear(tape, x, [self.h, columns], false, self.adapted.all_inputs);
        let scaled = tape.scale(product);
        tape.drop(product);
        let normal = self.norm(tape, scaled, float(gemma4.inputs));
        tape.drop(scaled);
        let sum = tape.add(normal, own);
        let all = tape.scale(sum);
        for tensor in [sum, normal, own] {
            tape.drop(tensor);
        }
        all
    }

    /// `Gemma4TextAttention.forward`: query and key are normalised and rotated before they are transposed, the value is
    /// normalised without a scale, and some layers take both of an earlier one.
    fn gemma4_attention(
        &self,
        tape: &mut Tape,
        x: Tensor,
        layer: Layer,
        given: &mut Given,
        gemma4: &Gemma4,
    ) -> Tensor {
        let heads = self.shape.heads_of(layer);
        let width = float(heads.width);
        let (all_q, all_k) = (float(heads.queries) * width, float(heads.keys) * width);
        let rotated = |tape: &mut Tape, product: Tensor| {
            let normal = self.norm(tape, product, width);
            let turned = tape.rotate(normal, Rotation::Whole, given.tables);
            (normal, turned)
        };
        let product = self.linear(tape, x, [self.h, all_q], false, self.adapted.q);
        let (normal, q) = rotated(tape, product);
        tape.drop(product);
        tape.drop(normal);
        let [k, v] = match given.stored.filter(|_| layer.keys == Keys::Shared) {
            Some(stored) => stored.map(|tensor| tape.hold(tensor)),
            None => {
                let key = self.linear(tape, x, [self.h, all_k], false, self.adapted.k);
                let value = if gemma4.value_is_key && !layer.sliding {
                    tape.hold(key)
                } else {
                    self.linear(tape, x, [self.h, all_k], false, self.adapted.v)
                };
                let (normal, k) = rotated(tape, key);
                tape.drop(key);
                tape.drop(normal);
                let v = self.power_norm(tape, value, width, false);
                tape.drop(value);
                [k, v]
            }
        };
        if layer.keys == Keys::Stored {
            let old = given.stored.replace([k, v].map(|tensor| tape.hold(tensor)));
            for tensor in old.into_iter().flatten() {
                tape.drop(tensor);
            }
        }
        let attended = self.scores(tape, [q, k, v], layer);
        let out = self.linear(tape, attended, [all_q, self.h], false, self.adapted.output);
        for tensor in [attended, q, k, v] {
            tape.drop(tensor);
        }
        out
    }

    /// The experts of Gemma 4 beside its dense MLP, of which `dense` is the result: each with norms of its own. Their sum, and
    /// what the layer's `forward` holds until it returns.
    fn gemma4_mixture(&self, tape: &mut Tape, middle: Tensor, dense: Tensor) -> (Tensor, Vec<Tensor>) {
        let Some(experts) = &self.shape.experts else { return (dense, Vec::new()) };
        let first = self.norm(tape, dense, self.h);
        let routes = self.tokens * float(experts.top_k);
        let count = float(experts.count);
        let normal = self.power_norm(tape, middle, self.h, false);
        let scaled = tape.multiply_by_parameter(normal, self.parameter(self.h));
        tape.drop(normal);
        let lessened = tape.scale(scaled);
        tape.drop(scaled);
        let logits = self.linear(tape, lessened, [self.h, count], false, self.adapted.router);
        let lifted = tape.cast(logits, 4.0);
        let probabilities = tape.unary(lifted, Saved::Output);
        tape.drop(lifted);
        let [values, places] = tape.top(probabilities, routes);
        let values = tape.normalised(values, self.tokens);
        let each = tape.embedding(routes, self.parameter(count));
        let scores = tape.multiply(values, each);
        for tensor in [each, values, logits, lessened] {
            tape.drop(tensor);
        }
        let second = self.norm(tape, middle, self.h);
        let out = self.fused_experts(tape, second, scores);
        tape.drop(second);
        let out = self.replaced_by_norm(tape, out);
        let sum = tape.add(first, out);
        tape.drop(dense);
        (sum, vec![first, out, scores, places, probabilities])
    }

    /// The MLP of a block, or its experts.
    fn expanded(&self, tape: &mut Tape, x: Tensor, layer: Layer) -> Tensor {
        let out = match &self.shape.experts {
            Some(_) if !layer.dense && self.shape.gemma4.is_none() => self.mixture(tape, x),
            Some(_) | None => self.mlp(tape, x, float(self.shape.dense_width(layer)), 1.0),
        };
        self.dropped_out(tape, out)
    }

    /// What a sub-layer makes, dropped out where the kind does so.
    fn dropped_out(&self, tape: &mut Tape, x: Tensor) -> Tensor {
        if !self.shape.style.drops_residual {
            return x;
        }
        let dropped = tape.dropout(x);
        tape.drop(x);
        dropped
    }

    /// `x` and what a sub-layer made of it, which goes.
    fn added(&self, tape: &mut Tape, x: Tensor, made: Tensor) -> Tensor {
        if !self.shape.style.scales_residual {
            let sum = tape.add(x, made);
            tape.drop(made);
            return sum;
        }
        let scaled = tape.scale(made);
        let sum = tape.add(x, scaled);
        tape.drop(scaled);
        tape.drop(made);
        sum
    }

    fn replaced_by_norm(&self, tape: &mut Tape, x: Tensor) -> Tensor {
        let normal = self.norm(tape, x, self.h);
        tape.drop(x);
        normal
    }

    fn rotation(&self) -> Rotation {
        let style = &self.shape.style;
        match style.rotary {
            Rotary::Halves | Rotary::PairsWhole => Rotation::Whole,
            Rotary::Joined if style.rotated >= 1.0 => Rotation::WholeJoined,
            Rotary::Joined | Rotary::Pairs => Rotation::Partial(style.rotated),
            Rotary::Apart => Rotation::Halves,
            // Are seen by `latent_attention` alone.
            Rotary::PairsApart | Rotary::Complex => Rotation::Partial(style.rotated),
            Rotary::WideTables | Rotary::Lifted | Rotary::LiftedApart => Rotation::Lifted(style.rotary),
        }
    }

    /// Share of a head that the tables of sine and cosine cover.
    pub(crate) fn table_share(&self) -> f64 {
        match self.rotation() {
            _ if self.shape.latent.is_some() => self.shape.style.rotated,
            Rotation::Whole | Rotation::WholeJoined | Rotation::Lifted(_) => 1.0,
            Rotation::Partial(part) => part,
            Rotation::Halves => 0.5,
        }
    }

    /// Bytes of a number in those tables.
    pub(crate) fn table_width(&self) -> f64 {
        match self.shape.style.rotary {
            // Their `RotaryEmbedding.forward` casts nothing.
            Rotary::WideTables | Rotary::LiftedApart | Rotary::Complex => 4.0,
            Rotary::Halves
            | Rotary::Joined
            | Rotary::Pairs
            | Rotary::PairsWhole
            | Rotary::PairsApart
            | Rotary::Apart
            | Rotary::Lifted => self.stream_width,
        }
    }

    /// `Lfm2ShortConv.forward`, with the convolution of torch itself: a gate before and one behind it, channels before
    /// tokens.
    fn short_convolution(&self, tape: &mut Tape, x: Tensor) -> Tensor {
        let Some(Convolution { kernel, bias }) = self.shape.convolution else { return x };
        let sizes = [self.h, 3.0 * self.h];
        // The gradient comes channel by channel: with several rows the products take a copy, those of 4-bit weights none.
        let strided = self.rows > 1.0;
        let mut product = if self.four_bit {
            self.linear(tape, x, sizes, bias, false)
        } else {
            let product = self.linear(tape, x, sizes, bias, false);
            if strided { self.copied_back(tape, product) } else { product }
        };
        if self.adapted.convolution_in {
            product = self.adapter_of(tape, x, product, sizes, 1.0, strided);
        }
        let [before, behind, values] = tape.thirds(product);
        let gated = tape.multiply(before, values);
        // What overlaps the end of a row is made too, and cut off.
        let n = self.rows * self.h * (self.length + float(kernel) - 1.0);
        let weight = self.parameter(self.h * float(kernel));
        let wide = tape.convolution(gated, n, weight, if bias { self.h } else { 0.0 });
        tape.drop(gated);
        let cut = tape.slice(wide, x.n);
        tape.drop(wide);
        let made = tape.multiply(behind, cut);
        let out = self.linear(tape, made, [self.h, self.h], bias, self.adapted.convolution_out);
        for tensor in [made, cut, before, behind, values, product] {
            tape.drop(tensor);
        }
        out
    }

    /// `*Attention.forward`.
    fn attention(&self, tape: &mut Tape, x: Tensor, layer: Layer, tables: [Tensor; 2]) -> Tensor {
        let (qkv_bias, out_bias) = match self.shape.attention_bias {
            AttentionBias::None => (false, false),
            AttentionBias::Qkv => (true, false),
            AttentionBias::All => (true, true),
        };
        let kernel_copies_v = self.gradients_by_head(layer);
        let (mut fused, mut gate) = (None, None);
        let (mut q, mut k, v);
        if self.shape.fused_qkv && self.shape.style.fused_by_head {
            // `GPTNeoXAttention.forward`: the product seen head by head, then cut into three.
            let product = self.linear(tape, x, [self.h, self.q + 2.0 * self.k], qkv_bias, self.adapted.qkv);
            let product = self.by_head(tape, product, self.heads);
            [q, k, v] = tape.thirds(product);
            fused = Some(product);
        } else if self.shape.fused_qkv {
            let product = self.linear(tape, x, [self.h, self.q + 2.0 * self.k], qkv_bias, self.adapted.qkv);
            let parts = tape.parts(product, [self.q, self.k, self.k].map(|width| self.tokens * width));
            fused = Some(product);
            q = self.by_head(tape, parts[0], self.heads);
            k = self.by_head(tape, parts[1], self.kv_heads());
            v = if kernel_copies_v { self.by_head(tape, parts[2], self.kv_heads()) } else { parts[2] };
        } else {
            let head_norm = self.shape.style.head_norm;
            if self.shape.style.attention_gate == AttentionGate::InQuery {
                // Query and gate of a head beside each other; the gate is copied out.
                let both = self.linear(tape, x, [self.h, 2.0 * self.q], qkv_bias, self.adapted.q);
                let [query, beside] = tape.halves(both);
                gate = Some(tape.cloned(beside));
                tape.drop(beside);
                tape.drop(both);
                q = query;
            } else {
                q = self.linear(tape, x, [self.h, self.q], qkv_bias, self.adapted.q);
                if head_norm == HeadNorm::Whole {
                    q = self.replaced_by(tape, q, self.q);
                }
                q = self.by_head(tape, q, self.heads);
            }
            if head_norm == HeadNorm::Each {
                q = self.replaced_by(tape, q, self.head_dim);
            }
            k = self.linear(tape, x, [self.h, self.k], qkv_bias, self.adapted.k);
            if head_norm == HeadNorm::Whole {
                k = self.replaced_by(tape, k, self.k);
            }
            k = self.by_head(tape, k, self.kv_heads());
            if head_norm == HeadNorm::Each {
                k = self.replaced_by(tape, k, self.head_dim);
            }
            let product = self.linear(tape, x, [self.h, self.k], qkv_bias, self.adapted.v);
            v = if kernel_copies_v { self.by_head(tape, product, self.kv_heads()) } else { product };
            if self.shape.style.attention_gate == AttentionGate::Own {
                gate = Some(self.linear(tape, x, [self.h, self.q], false, self.adapted.attention_gate));
            }
            match head_norm {
                HeadNorm::None | HeadNorm::Each | HeadNorm::Whole | HeadNorm::EachRotated => {}
                HeadNorm::EachLater => {
                    q = self.replaced_by(tape, q, self.head_dim);
                    k = self.replaced_by(tape, k, self.head_dim);
                }
                HeadNorm::EachOwn => {
                    for (x, width) in [(&mut q, self.q), (&mut k, self.k)] {
                        let normal = self.centred_norm(tape, *x, self.head_dim, width);
                        tape.drop(*x);
                        *x = normal;
                    }
                }
                HeadNorm::EachModule => {
                    for (x, heads) in [(&mut q, self.heads), (&mut k, self.kv_heads())] {
                        let normal =
                            tape.layer_norms(*x, heads, self.head_dim, self.parameter(self.head_dim));
                        tape.drop(*x);
                        *x = normal;
                    }
                }
            }
        }
        if layer.rotated {
            [q, k] = self.rotated(tape, [q, k], tables);
        }
        if self.shape.style.head_norm == HeadNorm::EachRotated {
            q = self.replaced_by(tape, q, self.head_dim);
            k = self.replaced_by(tape, k, self.head_dim);
        }
        if let Some(width) = self.autocast.filter(|_| q.width > 2.0) {
            // The kernels take half precision: under autocast q and k are cast to what v is.
            let narrow = [tape.cast(q, width), tape.cast(k, width)];
            tape.drop(q);
            tape.drop(k);
            [q, k] = narrow;
        }
        let mut attended = self.scores(tape, [q, k, v], layer);
        if let Some(gate) = gate {
            let open = tape.unary(gate, Saved::Output);
            let gated = tape.multiply(attended, open);
            tape.drop(open);
            tape.drop(attended);
            attended = gated;
        }
        if self.shape.style.sub_norms {
            attended = self.replaced_by(tape, attended, self.q);
        }
        let out = self.linear(tape, attended, [self.q, self.h], out_bias, self.adapted.output);
        let out = self.dropped_out(tape, out);
        for tensor in [attended, q, k, v].into_iter().chain(gate) {
            tape.drop(tensor);
        }
        if let Some(product) = fused {
            tape.drop(product);
        }
        out
    }

    /// Query and key with their positions; without them they go.
    fn rotated(&self, tape: &mut Tape, [q, k]: [Tensor; 2], tables: [Tensor; 2]) -> [Tensor; 2] {
        let rotation = self.rotation();
        let spreads =
            matches!(self.shape.style.rotary, Rotary::Pairs | Rotary::PairsWhole | Rotary::LiftedApart);
        // `apply_rotary_pos_emb` of these repeats the first half of either table.
        let local = if spreads { tables.map(|table| tape.plain(table.n, table.width)) } else { tables };
        let turned = if let Rotation::Lifted(kind) = rotation {
            tape.rotate_lifted([q, k], kind, local)
        } else {
            let cuts = [tape.cut(q, rotation), tape.cut(k, rotation)];
            cuts.map(|cut| tape.rotate(cut, rotation, local))
        };
        if spreads {
            for table in local {
                tape.drop(table);
            }
        }
        tape.drop(q);
        tape.drop(k);
        turned
    }

    fn kv_heads(&self) -> f64 {
        float(self.shape.kv_heads)
    }

    /// A projection seen head by head: its gradient comes transposed and is copied, unless there is one head.
    fn by_head(&self, tape: &mut Tape, x: Tensor, heads: f64) -> Tensor {
        if heads < 2.0 { x } else { self.copied_back(tape, x) }
    }

    /// `x`, whose gradient is copied because it comes in another order; the handle of `x` goes.
    fn copied_back(&self, tape: &mut Tape, x: Tensor) -> Tensor {
        let copied = tape.copied_back(x);
        tape.drop(x);
        copied
    }

    /// `x` normalised over rows of `size`; `x` goes.
    fn replaced_by(&self, tape: &mut Tape, x: Tensor, size: f64) -> Tensor {
        let normal = self.norm(tape, x, size);
        tape.drop(x);
        normal
    }

    /// Whether the gradients of K and V come head by head: every kernel but FlashAttention's.
    fn gradients_by_head(&self, layer: Layer) -> bool {
        self.attention == AttnImpl::Eager || self.is_masked(layer)
    }

    /// Whether sdpa gets a mask in this layer.
    pub(crate) fn is_masked(&self, layer: Layer) -> bool {
        if self.attention.is_flash() || self.attention == AttnImpl::Eager {
            return false;
        }
        self.padded || (layer.sliding && self.shape.window.is_some_and(|window| self.length >= float(window)))
    }

    /// The attention kernel: FlashAttention (also sdpa without a mask), memory-efficient sdpa, or plain products.
    ///
    /// Source: `flash_attn_interface.py` and `flash_api.cpp` of flash-attn 2 (rows up to multiples of 128 and head
    /// widths of 32 or 64 in the backward pass); `attention_backward.cu` of torch's memory-efficient kernel.
    fn scores(&self, tape: &mut Tape, [q, k, v]: [Tensor; 3], layer: Layer) -> Tensor {
        let Heads { queries, keys, width } = self.shape.heads_of(layer);
        let grouped = keys < queries;
        let (heads, width) = (float(queries), float(width));
        let rows = self.rows * heads * self.length;
        let latent = self.shape.latent.as_ref();
        let value_width = latent.map_or(width, |latent| float(latent.value));
        if self.attention == AttnImpl::Eager {
            let scores = Scores {
                elements: rows * self.length,
                rows,
                masked: true,
                sinks: self.shape.attention_sinks,
                capped: self.shape.soft_capped_scores,
                lifts: !self.shape.attention_sinks,
                contiguous_query: self.rotation() == Rotation::Halves || latent.is_some(),
                // Queries and keys are joined of two parts; one row of values is seen as it lies.
                contiguous_key: latent.is_some(),
                contiguous_value: latent.is_some() && self.rows <= 1.0,
                values: rows * value_width,
            };
            return tape.eager(q, k, v, scores);
        }
        // FlashAttention takes heads of one width: sdpa without a mask goes another way, flash-attn gets wider values.
        let differ = value_width != width;
        let widens = differ && self.attention.is_flash();
        let v = if widens { tape.made_anew(v, rows * width) } else { tape.hold(v) };
        let kernel = if self.is_masked(layer) || differ && !widens {
            let summed = |wide: f64| if width.max(value_width) > 128.0 { 4.0 * rows * wide } else { 0.0 };
            Kernel {
                sums: 4.0 * self.rows * heads * up(self.length, 32.0),
                bias: if self.is_masked(layer) {
                    q.width * self.rows * self.length * self.length
                } else {
                    0.0
                },
                repeats: grouped && keys > 1,
                spreads: grouped,
                made: differ.then_some(rows * value_width),
                workspace: [4.0 * rows, 4.0 * rows * width, summed(width), summed(value_width), 0.0],
            }
        } else {
            let length = up(self.length, 128.0);
            let head = up(width, if width <= 128.0 { 32.0 } else { 64.0 });
            let each = if grouped { q.n * k.width } else { 0.0 };
            Kernel {
                sums: 4.0 * rows,
                workspace: [
                    4.0 * self.rows * heads * length,
                    4.0 * self.rows * heads * length * head,
                    each,
                    each,
                    0.0,
                ],
                ..Kernel::default()
            }
        };
        let made = tape.attention(q, k, v, kernel);
        tape.drop(v);
        if !widens {
            return made;
        }
        // What is too wide is cut off again, and the rest made contiguous.
        let cut = tape.slice(made, rows * value_width);
        tape.drop(made);
        let out = tape.cloned(cut);
        tape.drop(cut);
        out
    }

    /// `*MLP.forward`: gate, activation, up, product, down; with a fused first product when the model has one. `times` MLPs that share
    /// the rows: experts.
    fn mlp(&self, tape: &mut Tape, x: Tensor, width: f64, times: f64) -> Tensor {
        let adapted = self.adapted;
        let bias = self.shape.mlp_bias;
        let product = if self.shape.fused_gate_up {
            let fused = self.linears(tape, x, [self.h, 2.0 * width], bias, adapted.gate_up, times);
            let [gate, up] = tape.halves(fused);
            let active = tape.unary(gate, Saved::Input);
            let product = tape.multiply(up, active);
            tape.drop(active);
            tape.drop(gate);
            tape.drop(up);
            let out = self.linears(tape, product, [width, self.h], bias, adapted.down, times);
            tape.drop(product);
            tape.drop(fused);
            return out;
        } else if !self.shape.gated_mlp {
            let wide = self.linears(tape, x, [self.h, width], bias, adapted.up, times);
            let active = self.active(tape, wide);
            tape.drop(wide);
            active
        } else {
            let gate = self.linears(tape, x, [self.h, width], bias, adapted.gate, times);
            let active = self.active(tape, gate);
            tape.drop(gate);
            let up = self.linears(tape, x, [self.h, width], bias, adapted.up, times);
            let product = tape.multiply(active, up);
            tape.drop(active);
            tape.drop(up);
            if self.shape.style.sub_norms { self.replaced_by(tape, product, width) } else { product }
        };
        let out = self.linears(tape, product, [width, self.h], bias, adapted.down, times);
        tape.drop(product);
        out
    }

    /// The activation of an MLP.
    ///
    /// Source: `activations.py` of transformers 5.19.
    fn active(&self, tape: &mut Tape, x: Tensor) -> Tensor {
        match self.shape.style.activation {
            Activation::Kept => tape.unary(x, Saved::Input),
            Activation::Squared => {
                let positive = tape.unary(x, Saved::Output);
                let squared = tape.square(positive);
                tape.drop(positive);
                squared
            }
            Activation::Written => {
                // 0.5 * x * (1.0 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))
                let half = tape.scale(x);
                let cube = tape.square(x);
                let small = tape.scale(cube);
                tape.drop(cube);
                let sum = tape.add(x, small);
                tape.drop(small);
                let scaled = tape.scale(sum);
                tape.drop(sum);
                let tanh = tape.unary(scaled, Saved::Output);
                tape.drop(scaled);
                let raised = tape.plus_number(tanh);
                tape.drop(tanh);
                let out = tape.multiply(half, raised);
                tape.drop(half);
                tape.drop(raised);
                out
            }
            Activation::Xielu => tape.xielu(x, self.parameter(1.0)),
        }
    }

    /// A product of the router: never packed, and adapted where it is a linear module.
    fn router(&self, tape: &mut Tape, x: Tensor, output: f64, bias: bool, adapted: bool) -> Tensor {
        let sizes = [self.h, output];
        let base = self.product(tape, x, sizes, bias, self.full);
        if adapted { self.adapter(tape, x, base, sizes, 1.0) } else { base }
    }

    /// Rows sorted by expert through grouped products, back in order, summed.
    ///
    /// Source: `grouped_mm_experts_forward` in `integrations/moe.py` of transformers 5.19.
    fn fused_experts(&self, tape: &mut Tape, x: Tensor, scores: Tensor) -> Tensor {
        let Some(experts) = &self.shape.experts else { return x };
        let count = float(experts.count);
        let top_k = float(experts.top_k);
        let routes = self.tokens * top_k;
        let gpt_oss = self.shape.block == BlockKind::GptOss;
        let sorted = tape.plain(routes, 8.0);
        let order = tape.plain(routes, 8.0);
        let token = tape.plain(routes, 8.0);
        let inputs = tape.index(x, routes * self.h, token);
        tape.drop(token);
        let weights = tape.index(scores, routes, order);
        let ids = tape.plain(routes, 4.0);
        let histogram = tape.plain(count, 4.0);
        let offsets = tape.plain(count, 4.0);
        let width = float(experts.intermediate);
        let all = count * self.h * width;
        let mut bias = None;
        if experts.biases {
            bias = Some(tape.plain(routes * 2.0 * width, inputs.width));
        }
        let fused = tape.grouped(inputs, routes * 2.0 * width, self.parameter(2.0 * all), Some(offsets));
        let product = if gpt_oss {
            tape.clamped_gate(fused)
        } else {
            let [gate, up] = tape.halves(fused);
            let active = tape.unary(gate, Saved::Input);
            let product = tape.multiply(active, up);
            tape.drop(active);
            tape.drop(gate);
            tape.drop(up);
            product
        };
        tape.drop(fused);
        if let Some(old) = bias {
            bias = Some(tape.plain(routes * self.h, inputs.width));
            tape.drop(old);
        }
        let down = tape.grouped(product, routes * self.h, self.parameter(all), None);
        tape.drop(product);
        let weighted = tape.multiply(down, weights);
        let inverse = tape.plain(routes, 8.0);
        tape.transient(8.0 * routes);
        let ordered = tape.index(weighted, routes * self.h, inverse);
        tape.drop(weighted);
        let sum = tape.sum_over(ordered, top_k);
        let out = tape.cast(sum, x.width);
        tape.drop(sum);
        for tensor in [sorted, order, inputs, weights, ids, histogram, offsets, down, ordered, inverse] {
            tape.drop(tensor);
        }
        if let Some(bias) = bias {
            tape.drop(bias);
        }
        out
    }

    /// Each expert takes its rows, and adds what it makes of them to the sum.
    ///
    /// All experts are put on the tape as one that takes all rows: what is kept for the way back is the same, and what
    /// comes and goes is more, because really one expert follows the other.
    ///
    /// Source: `Qwen3MoeSparseMoeBlock.forward` of transformers 4.57; those of Qwen 2 and Mixtral are alike.
    fn experts_one_by_one(&self, tape: &mut Tape, x: Tensor, scores: Tensor) -> Tensor {
        let Some(experts) = &self.shape.experts else { return x };
        let count = float(experts.count);
        let top_k = float(experts.top_k);
        let routes = self.tokens * top_k;
        // Which expert has which row: one-hot, a number of eight bytes each.
        let mask = tape.plain(routes * count, 8.0);
        let places = tape.plain(routes, 8.0);
        let rows = tape.plain(routes, 8.0);
        let inputs = tape.index(x, routes * self.h, rows);
        let expanded = self.mlp(tape, inputs, float(experts.intermediate), count);
        tape.drop(inputs);
        let weights = tape.index(scores, routes, places);
        let weighted = tape.multiply(expanded, weights);
        tape.drop(expanded);
        tape.drop(weights);
        let out = tape.sum_over(weighted, top_k);
        for tensor in [weighted, mask, places, rows] {
            tape.drop(tensor);
        }
        out
    }

    /// `F.linear(x.float(), weight.float())`, which autocast makes half again; logits and what of them is saved.
    fn lifted_router(&self, tape: &mut Tape, x: Tensor, count: f64) -> Tensor {
        let lifted = tape.cast(x, 4.0);
        let weight = tape.lifted_parameter(count * self.h, self.weight_width, self.full);
        let width = self.autocast.unwrap_or(4.0);
        let copy = tape.cast(weight, width);
        let narrow = tape.cast(lifted, width);
        let product = Weight {
            input: self.h,
            output: count,
            width,
            trains: self.full,
            copy: Some(copy),
            bias: false,
            times: 1.0,
        };
        let logits = tape.matrix(narrow, self.tokens, product);
        for tensor in [narrow, copy, weight, lifted] {
            tape.drop(tensor);
        }
        logits
    }

    /// `Glm4MoeTopkRouter.forward`, and those of dots.1 and DeepSeek V3: logits, weights of the routes and their experts.
    fn sigmoid_router(&self, tape: &mut Tape, x: Tensor, routes: f64) -> [Tensor; 3] {
        let Some(experts) = &self.shape.experts else { return [x; 3] };
        let count = float(experts.count);
        let scores = self.tokens * count;
        let logits = self.lifted_router(tape, x, count);
        let open = tape.unary(logits, Saved::Output);
        let corrected = tape.plain(scores, 4.0);
        // The groups' own scores are next to nothing beside those of the experts.
        let mask = tape.plain(scores, 4.0);
        let bits = [tape.plain(scores, 1.0), tape.plain(scores, 1.0)];
        let masked = tape.plain(scores, 4.0);
        for tensor in [bits[0], bits[1], corrected] {
            tape.drop(tensor);
        }
        let values = tape.plain(routes, 4.0);
        let places = tape.plain(routes, 8.0);
        tape.drop(values);
        let mut chosen = tape.index(open, routes, places);
        if experts.normalises {
            chosen = tape.normalised(chosen, self.tokens);
        }
        let scaled = tape.scale(chosen);
        for tensor in [chosen, open, mask, masked] {
            tape.drop(tensor);
        }
        [logits, scaled, places]
    }

    /// `AfmoeTokenChoiceRouter.forward`: logits, weights of the routes and their experts.
    fn sigmoid_module_router(&self, tape: &mut Tape, x: Tensor, routes: f64) -> [Tensor; 3] {
        let Some(experts) = &self.shape.experts else { return [x; 3] };
        let product = self.linear(tape, x, [self.h, float(experts.count)], false, self.adapted.router);
        let logits = tape.cast(product, 4.0);
        tape.drop(product);
        let open = tape.unary(logits, Saved::Output);
        let corrected = tape.plain(open.n, 4.0);
        let values = tape.plain(routes, 4.0);
        let places = tape.plain(routes, 8.0);
        tape.drop(corrected);
        tape.drop(values);
        let chosen = tape.index(open, routes, places);
        let sum = tape.sum_of_rows(chosen, self.tokens);
        let shifted = tape.plus_number(sum);
        tape.drop(sum);
        let normal = tape.multiply(chosen, shifted);
        tape.drop(chosen);
        let scaled = tape.scale(normal);
        for tensor in [normal, shifted, open] {
            tape.drop(tensor);
        }
        [logits, scaled, places]
    }

    /// `DeepseekV2TopkRouter.forward`: logits, weights of the routes and their experts.
    fn lifted_softmax_router(&self, tape: &mut Tape, x: Tensor, routes: f64) -> [Tensor; 3] {
        let Some(experts) = &self.shape.experts else { return [x; 3] };
        let logits = self.lifted_router(tape, x, float(experts.count));
        let lifted = tape.cast(logits, 4.0);
        let mut scores = tape.unary(lifted, Saved::Output);
        tape.drop(lifted);
        let mut chosen = None;
        if self.shape.style.router == Router::SoftmaxGrouped {
            // Which groups are chosen, spread to their experts. The groups' own scores are next to nothing beside those.
            chosen = Some(tape.plain(scores.n, 4.0));
            let bits = [tape.plain(scores.n, 1.0), tape.plain(scores.n, 1.0)];
            tape.drop(bits[0]);
            let masked = tape.masked(scores, bits[1]);
            tape.drop(bits[1]);
            tape.drop(scores);
            scores = masked;
        }
        let [values, places] = tape.top(scores, routes);
        let scaled = tape.scale(values);
        for tensor in [values, scores].into_iter().chain(chosen) {
            tape.drop(tensor);
        }
        [logits, scaled, places]
    }

    /// `HunYuanMoEV1Gate.forward`: `wg(hidden_states.float())` with `wg` in fp32, both of which autocast makes half; logits.
    fn wide_router(&self, tape: &mut Tape, x: Tensor, count: f64) -> Tensor {
        let lifted = tape.cast(x, 4.0);
        let width = self.autocast.unwrap_or(4.0);
        let copy = (width < 4.0).then(|| tape.weight_copy(count * self.h, 4.0, width, self.full));
        let narrow = tape.cast(lifted, width);
        let weight =
            Weight { input: self.h, output: count, width, trains: self.full, copy, bias: false, times: 1.0 };
        let logits = tape.matrix(narrow, self.tokens, weight);
        tape.drop(narrow);
        if let Some(copy) = copy {
            tape.drop(copy);
        }
        tape.drop(lifted);
        logits
    }

    /// `MiniMaxM2TopKRouter.forward`: logits, weights of the routes and their experts.
    fn half_sigmoid_router(&self, tape: &mut Tape, x: Tensor, routes: f64) -> [Tensor; 3] {
        let Some(experts) = &self.shape.experts else { return [x; 3] };
        let logits = self.router(tape, x, float(experts.count), false, self.adapted.router);
        let lifted = tape.cast(logits, 4.0);
        let open = tape.unary(lifted, Saved::Output);
        tape.drop(lifted);
        let corrected = tape.plain(open.n, 4.0);
        let values = tape.plain(routes, 4.0);
        let places = tape.plain(routes, 8.0);
        tape.drop(values);
        let chosen = tape.index(open, routes, places);
        let chosen = tape.normalised(chosen, self.tokens);
        tape.drop(corrected);
        tape.drop(open);
        [logits, chosen, places]
    }

    /// `Ernie4_5_MoeTopKRouter.forward`: without autocast, on a router in fp32.
    fn corrected_router(&self, tape: &mut Tape, x: Tensor, routes: f64) -> [Tensor; 3] {
        let Some(experts) = &self.shape.experts else { return [x; 3] };
        let count = float(experts.count);
        let lifted = tape.cast(x, 4.0);
        let weight = Weight {
            input: self.h,
            output: count,
            width: 4.0,
            trains: self.full,
            copy: None,
            bias: false,
            times: 1.0,
        };
        let logits = tape.matrix(lifted, self.tokens, weight);
        tape.drop(lifted);
        let probabilities = tape.unary(logits, Saved::Output);
        let corrected = tape.plain(probabilities.n, 4.0);
        let values = tape.plain(routes, 4.0);
        let places = tape.plain(routes, 8.0);
        tape.drop(values);
        tape.drop(corrected);
        let chosen = tape.index(probabilities, routes, places);
        tape.drop(probabilities);
        let sum = tape.mean(chosen, self.tokens);
        let least = tape.unary(sum, Saved::Input);
        tape.drop(sum);
        let normal = tape.multiply(chosen, least);
        tape.drop(chosen);
        tape.drop(least);
        let scores = tape.cast(normal, x.width);
        tape.drop(normal);
        [logits, scores, places]
    }

    /// A mixture of experts: router, sorted rows through grouped products, back in order, summed; the shared expert.
    ///
    /// Source: `grouped_mm_experts_forward` in `integrations/moe.py`, `*TopKRouter.forward` of Qwen and gpt-oss.
    fn mixture(&self, tape: &mut Tape, x: Tensor) -> Tensor {
        let Some(experts) = &self.shape.experts else { return x };
        let style = &self.shape.style;
        let shared_width = float(experts.shared_intermediate);
        let has_shared = shared_width > 0.0;
        let mut shared = None;
        if has_shared && style.shared == Shared::First {
            shared = Some(self.mlp(tape, x, shared_width, 1.0));
        }
        let count = float(experts.count);
        let top_k = float(experts.top_k);
        let routes = self.tokens * top_k;
        let gpt_oss = self.shape.block == BlockKind::GptOss;
        let [logits, scores, places] = match style.router {
            Router::Softmax | Router::SoftmaxWide => {
                let logits = if style.router == Router::Softmax {
                    self.router(tape, x, count, false, self.adapted.router)
                } else {
                    self.wide_router(tape, x, count)
                };
                let lifted = tape.cast(logits, 4.0);
                let probabilities = tape.unary(lifted, Saved::Output);
                tape.drop(lifted);
                let [mut values, indices] = tape.top(probabilities, routes);
                if experts.normalises {
                    values = tape.normalised(values, self.tokens);
                }
                let scores = tape.cast(values, logits.width);
                tape.drop(values);
                tape.drop(probabilities);
                [logits, scores, indices]
            }
            Router::BestFirst => {
                let logits = self.router(tape, x, count, gpt_oss, self.adapted.router);
                // `GraniteMoeTopKRouter.forward` lifts the scores, that of gpt-oss does not.
                let lifted = if gpt_oss { tape.hold(logits) } else { tape.cast(logits, 4.0) };
                let [values, indices] = tape.top(lifted, routes);
                let chosen = tape.unary(values, Saved::Output);
                tape.drop(values);
                let scores = tape.cast(chosen, logits.width);
                tape.drop(chosen);
                tape.drop(lifted);
                [logits, scores, indices]
            }
            Router::Sigmoid => self.sigmoid_router(tape, x, routes),
            Router::Corrected => self.corrected_router(tape, x, routes),
            Router::Mixer => {
                let logits = self.router(tape, x, count, false, self.adapted.router);
                let [scores, places] = tape.mixed(logits, self.tokens);
                [logits, scores, places]
            }
            Router::SoftmaxLifted | Router::SoftmaxGrouped => self.lifted_softmax_router(tape, x, routes),
            Router::SigmoidModule => self.sigmoid_module_router(tape, x, routes),
            Router::SigmoidHalf => self.half_sigmoid_router(tape, x, routes),
            // Stands beside a dense MLP, see `gemma4_mixture`.
            Router::Scaled => return x,
        };
        if has_shared && style.shared == Shared::BehindRouter {
            shared = Some(self.mlp(tape, x, shared_width, 1.0));
        }
        let out = if self.expert_modules {
            self.experts_one_by_one(tape, x, scores)
        } else {
            self.fused_experts(tape, x, scores)
        };
        if has_shared && style.shared == Shared::Last {
            shared = Some(self.mlp(tape, x, shared_width, 1.0));
        }
        let out = match shared {
            None => out,
            Some(shared) if !style.gates_shared => {
                let sum = tape.add(out, shared);
                tape.drop(out);
                tape.drop(shared);
                sum
            }
            Some(shared) => {
                let gate = self.router(tape, x, 1.0, false, self.adapted.shared_gate);
                let open = tape.unary(gate, Saved::Output);
                tape.drop(gate);
                let gated = tape.multiply(open, shared);
                tape.drop(open);
                tape.drop(shared);
                let sum = tape.add(out, gated);
                tape.drop(out);
                tape.drop(gated);
                sum
            }
        };
        for tensor in [logits, scores, places] {
            tape.drop(tensor);
        }
        out
    }
}

/// Returns `n` rounded up to a multiple of `multiple`.
fn up(n: f64, multiple: f64) -> f64 {
    (n / multiple).ceil() * multiple
}

impl Adapted {
    fn of(shape: &ModelShape, work: &Workload) -> Adapted {
        let mut adapted = Adapted::default();
        let modules = shape.modules(work.experts);
        for linear in modules.iter().filter(|linear| linear.is_adapted_by(&work.targets)) {
            let place = match linear.part {
                Part::Query => &mut adapted.q,
                Part::Key => &mut adapted.k,
                Part::Value => &mut adapted.v,
                Part::QueryKeyValue => &mut adapted.qkv,
                Part::Output => &mut adapted.output,
                Part::Gate => &mut adapted.gate,
                Part::Up => &mut adapted.up,
                Part::GateUp => &mut adapted.gate_up,
                Part::Down => &mut adapted.down,
                Part::Router => &mut adapted.router,
                Part::SharedGate => &mut adapted.shared_gate,
                Part::InputGate => &mut adapted.input_gate,
                Part::InputProjection => &mut adapted.input_projection,
                Part::AllInputs => &mut adapted.all_inputs,
                Part::ConvolutionIn => &mut adapted.convolution_in,
                Part::ConvolutionOut => &mut adapted.convolution_out,
                Part::DeltaIn => &mut adapted.delta_in,
                Part::DeltaGate => &mut adapted.delta_gate,
                Part::DeltaStep => &mut adapted.delta_step,
                Part::DeltaDecay => &mut adapted.delta_decay,
                Part::DeltaOut => &mut adapted.delta_out,
                Part::QueryIn => &mut adapted.query_in,
                Part::QueryOut => &mut adapted.query_out,
                Part::LatentIn => &mut adapted.latent_in,
                Part::LatentOut => &mut adapted.latent_out,
                Part::AttentionGate => &mut adapted.attention_gate,
            };
            *place = true;
        }
        adapted
    }
}
