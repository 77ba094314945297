//! What does a gated delta rule take and give back, in order?
//!
//! Source: `Qwen3_5GatedDeltaNet.forward` and `torch_chunk_gated_delta_rule` in `modeling_qwen3_5.py`, and
//! `Qwen3NextGatedDeltaNet.forward` in `modeling_qwen3_next.py` of transformers 5.19: what they do where
//! flash-linear-attention and causal-conv1d are not installed. Nobody measured those kernels.

use super::{Lists, float, up};
use crate::model::DeltaNet;
use crate::tape::{Saved, Tape, Tensor};

/// Tokens that are worked on together (`chunk_size`).
const CHUNK: f64 = 64.0;

/// Chunks at either end of a row that are put on the tape; what those between them keep is counted.
const CHUNKS_ON_TAPE: u32 = 2;

/// What all chunks of a row share.
#[derive(Copy, Clone)]
struct Chunks {
    query: Tensor,
    key: Tensor,
    /// Attention within each chunk.
    within: Tensor,
    values: Tensor,
    /// Keys that read the state.
    reading: Tensor,
    /// Decay of each chunk.
    decay: Tensor,
}

/// What is made of the input.
struct Inputs {
    /// Query, key and value beside each other.
    qkv: Tensor,
    /// What they were joined of.
    copies: Vec<Tensor>,
    /// Output gate.
    z: Tensor,
    /// What the step is made of.
    b: Tensor,
    /// What the decay is made of.
    a: Tensor,
    /// Products that the others are parts of.
    products: Vec<Tensor>,
}

/// What one chunk leaves to the next.
struct Running {
    core: Tensor,
    state: Tensor,
    /// `v_new` and `inter_chunk_attn` live until those of the next chunk are there.
    old: Option<[Tensor; 2]>,
    /// Where on the tape the last state was made.
    mark: usize,
}

impl Lists<'_> {
    /// `Qwen3_5GatedDeltaNet.forward`: convolution, gated delta rule, gated norm, output.
    pub(super) fn delta_net(&self, tape: &mut Tape, x: Tensor, net: &DeltaNet) -> Tensor {
        let Inputs { qkv, copies, z, b, a, products } =
            if net.fused { self.fused_inputs(tape, x, net) } else { self.inputs(tape, x, net) };
        let channels = float(net.all());
        // What overlaps the end of a row is made too, and cut off.
        let n = self.rows * channels * (self.length + float(net.kernel) - 1.0);
        let weight = self.parameter(channels * float(net.kernel));
        let wide = tape.convolution(qkv, n, weight, 0.0);
        let cut = tape.slice(wide, qkv.n);
        tape.drop(wide);
        let mixed = tape.unary(cut, Saved::Input);
        tape.drop(cut);
        tape.drop(qkv);
        let (keys, values) = (self.tokens * float(net.keys()), self.tokens * float(net.values()));
        let [query, key, value] = tape.split(mixed, [keys, keys, values]);
        for tensor in copies {
            tape.drop(tensor);
        }
        let value = self.by_head(tape, value, float(net.value_heads));
        let beta = tape.unary(b, Saved::Output);
        let decay = self.decay(tape, a, net);
        let repeats = net.value_heads > net.key_heads;
        let [query, key] = [query, key].map(|part| {
            if repeats {
                let n = self.tokens * float(net.value_heads) * float(net.key_width);
                let spread = tape.made_anew(part, n);
                tape.drop(part);
                spread
            } else {
                self.by_head(tape, part, float(net.key_heads))
            }
        });
        let core = self.delta_rule(tape, [query, key, value, beta, decay], net);
        let normal = self.gated_norm(tape, core, z, float(net.value_width));
        tape.drop(core);
        let out = self.linear(tape, normal, [float(net.values()), self.h], false, self.adapted.delta_out);
        for tensor in [normal, query, key, value, beta, decay, mixed, z, b, a].into_iter().chain(products) {
            tape.drop(tensor);
        }
        out
    }

    /// Four products of the input (Qwen3.5).
    fn inputs(&self, tape: &mut Tape, x: Tensor, net: &DeltaNet) -> Inputs {
        // The gradients of the first and of the step come in another order: with several rows the products take a copy.
        let strided = self.rows > 1.0;
        let adapted = self.adapted;
        let heads = float(net.value_heads);
        let qkv = self.delta_input(tape, x, float(net.all()), adapted.delta_in, strided);
        let z = self.delta_input(tape, x, float(net.values()), adapted.delta_gate, false);
        let b = self.delta_input(tape, x, heads, adapted.delta_step, strided);
        let a = self.delta_input(tape, x, heads, adapted.delta_decay, false);
        Inputs { qkv, copies: Vec::new(), z, b, a, products: Vec::new() }
    }

    /// Two products of the input that are taken apart head by head (`fix_query_key_value_ordering` of Qwen3-Next).
    fn fused_inputs(&self, tape: &mut Tape, x: Tensor, net: &DeltaNet) -> Inputs {
        let (keys, values, heads) = (float(net.keys()), float(net.values()), float(net.value_heads));
        let adapted = self.adapted;
        let all = self.linear(tape, x, [self.h, 2.0 * (keys + values)], false, adapted.delta_in);
        let steps = self.linear(tape, x, [self.h, 2.0 * heads], false, adapted.delta_step);
        let [query, key, value, z] = tape.split(all, [keys, keys, values, values].map(|n| self.tokens * n));
        let [b, a] = tape.halves(steps);
        let copied = |tape: &mut Tape, part: Tensor| {
            let copy = tape.cloned(part);
            tape.drop(part);
            copy
        };
        // Several heads of the value to one of the key are copied out; else they are seen as they lie.
        let of_value = |tape: &mut Tape, part| {
            if net.value_heads > net.key_heads { copied(tape, part) } else { part }
        };
        let value = of_value(tape, value);
        let [z, b, a] = [z, b, a].map(|part| of_value(tape, part));
        let [query, key] = [query, key].map(|part| copied(tape, part));
        let value = if net.value_heads > net.key_heads { value } else { copied(tape, value) };
        let qkv = tape.joined([query, key], Some(value));
        Inputs { qkv, copies: vec![query, key, value], z, b, a, products: vec![all, steps] }
    }

    fn delta_input(&self, tape: &mut Tape, x: Tensor, width: f64, adapted: bool, strided: bool) -> Tensor {
        let sizes = [self.h, width];
        let mut product = self.linear(tape, x, sizes, false, false);
        if strided && !self.four_bit {
            product = self.copied_back(tape, product);
        }
        if adapted { self.adapter_of(tape, x, product, sizes, 1.0, strided) } else { product }
    }

    /// `-A_log.float().exp() * softplus(a.float() + dt_bias)`.
    fn decay(&self, tape: &mut Tape, a: Tensor, net: &DeltaNet) -> Tensor {
        let heads = float(net.value_heads);
        let logarithm = tape.lifted_parameter(heads, self.weight_width, self.full);
        let rate = tape.unary(logarithm, Saved::Output);
        tape.drop(logarithm);
        let negative = tape.scale(rate);
        tape.drop(rate);
        let lifted = tape.cast(a, 4.0);
        let sum = tape.plus_parameter(lifted, self.parameter(heads));
        tape.drop(lifted);
        let step = tape.unary(sum, Saved::Input);
        tape.drop(sum);
        let decay = tape.multiply(negative, step);
        tape.drop(negative);
        tape.drop(step);
        decay
    }

    /// `l2norm` over heads of `width`; `x` goes.
    fn of_length_one(tape: &mut Tape, x: Tensor, width: f64) -> Tensor {
        let squares = tape.times_itself(x);
        let sum = tape.sum_of_rows(squares, x.n / width);
        tape.drop(squares);
        let shifted = tape.plus_number(sum);
        tape.drop(sum);
        let inverse = tape.rsqrt(shifted);
        tape.drop(shifted);
        let normal = tape.multiply(x, inverse);
        tape.drop(inverse);
        tape.drop(x);
        normal
    }

    /// `torch_chunk_gated_delta_rule` on query, key, value, step and decay, all of them in the heads of the value.
    fn delta_rule(&self, tape: &mut Tape, inputs: [Tensor; 5], net: &DeltaNet) -> Tensor {
        let (key_width, value_width) = (float(net.key_width), float(net.value_width));
        let half = inputs[2].width;
        let [query, key, value, beta, decay] = inputs.map(|x| tape.cast(x, 4.0));
        let query = Self::of_length_one(tape, query, key_width);
        let key = Self::of_length_one(tape, key, key_width);
        let scaled = tape.scale(query);
        tape.drop(query);
        // Rows are filled up to whole chunks.
        let filled = up(self.length, CHUNK);
        let heads = self.rows * float(net.value_heads);
        let steps = heads * filled;
        let parts = [(scaled, key_width), (key, key_width), (value, value_width)];
        let padded = parts.map(|(x, width)| tape.made_anew(x, steps * width));
        for (x, _) in parts {
            tape.drop(x);
        }
        let [query, key, value] = padded;
        let padded = [beta, decay].map(|x| tape.made_anew(x, steps));
        tape.drop(beta);
        tape.drop(decay);
        let [beta, decay] = padded;
        let stepped_value = tape.multiply(value, beta);
        let stepped_key = tape.multiply(key, beta);
        // `reshape` of all four: these two have gradients in the order of a triangular system.
        let [stepped_key, stepped_value] = [stepped_key, stepped_value].map(|x| self.copied_back(tape, x));
        let ones = tape.plain(CHUNK * CHUNK, 1.0);
        let mask = tape.plain(CHUNK * CHUNK, 1.0);
        tape.drop(ones);
        let running = tape.running_sum(decay);
        let pairs = steps * CHUNK;
        let apart = tape.pairs_apart(running, running, pairs);
        let masked = tape.masked(apart, mask);
        tape.drop(apart);
        let pairwise = tape.unary(masked, Saved::Output);
        tape.drop(masked);
        let narrow = self.autocast;
        let [system, within] = [stepped_key, query].map(|x| {
            let product = tape.product_of(x, key, pairs, narrow);
            let decayed = tape.multiply(product, pairwise);
            tape.drop(product);
            decayed
        });
        let grown = tape.unary(running, Saved::Output);
        let decayed_key = tape.multiply(stepped_key, grown);
        tape.drop(grown);
        let values = tape.solved(system, stepped_value);
        let reading = tape.solved(system, decayed_key);
        let state = tape.plain(heads * key_width * value_width, 4.0);
        let core = tape.plain(values.n, 4.0);
        let grown = tape.unary(running, Saved::Output);
        let decayed_query = tape.multiply(query, grown);
        tape.drop(grown);
        tape.drop(query);
        let last = tape.slice(running, steps / CHUNK);
        let left = tape.pairs_apart(last, running, steps);
        tape.drop(last);
        let grown = tape.unary(left, Saved::Output);
        tape.drop(left);
        let left_key = tape.multiply(key, grown);
        tape.drop(grown);
        tape.drop(key);
        let last = tape.slice(running, steps / CHUNK);
        let chunk_decay = tape.unary(last, Saved::Output);
        tape.drop(last);
        let chunks =
            Chunks { query: decayed_query, key: left_key, within, values, reading, decay: chunk_decay };
        let start = Running { core, state, old: None, mark: tape.mark() };
        let Running { core, state, old, mark } = self.all_chunks(tape, &chunks, start, filled / CHUNK);
        // Nobody asks for the state after the last chunk: with it goes what its way back would need.
        tape.drop(state);
        tape.forget_since(mark);
        // `reshape`: what the system is solved to lies in another order, and so does what is made like it.
        let cloned = tape.cloned(core);
        tape.drop(core);
        let n = self.tokens * float(net.values());
        let cut = if n < cloned.n { tape.slice(cloned, n) } else { tape.hold(cloned) };
        let out = tape.cast(cut, half);
        tape.drop(cut);
        tape.drop(cloned);
        let locals = [value, beta, decay, stepped_key, stepped_value, mask, running, pairwise, system];
        let locals = locals.into_iter().chain([within, decayed_key, values, reading]);
        for tensor in locals.chain([decayed_query, left_key, chunk_decay]).chain(old.into_iter().flatten()) {
            tape.drop(tensor);
        }
        out
    }

    /// The chunks one after the other. What those in the middle keep is the same for each: they are counted as one.
    fn all_chunks(&self, tape: &mut Tape, all: &Chunks, mut running: Running, count: f64) -> Running {
        let ends = 2.0 * f64::from(CHUNKS_ON_TAPE);
        let on_tape = count.min(ends);
        let mut done = 0.0;
        while done < on_tape {
            let before = tape.live.sum;
            done += 1.0;
            running = self.chunk(tape, all, running, count);
            if done == f64::from(CHUNKS_ON_TAPE) {
                tape.keep_until_here((count - on_tape) * (tape.live.sum - before));
            }
        }
        running
    }

    /// One of `count` chunks: what of the state is read, and what is written to it.
    fn chunk(&self, tape: &mut Tape, all: &Chunks, running: Running, count: f64) -> Running {
        let narrow = self.autocast;
        let Running { core, state, old, .. } = running;
        let of = |tape: &mut Tape, x: Tensor| tape.slice(x, x.n / count);
        let value = of(tape, all.values);
        let n = value.n;
        let reading = of(tape, all.reading);
        let read = tape.product_of(reading, state, n, narrow);
        tape.drop(reading);
        let new = tape.minus_narrow(value, read);
        tape.drop(value);
        tape.drop(read);
        let [old_new, old_between] = old.map_or([None; 2], |old| old.map(Some));
        if let Some(old) = old_new {
            tape.drop(old);
        }
        let query = of(tape, all.query);
        let between = tape.product_of(query, state, n, narrow);
        tape.drop(query);
        if let Some(old) = old_between {
            tape.drop(old);
        }
        let within = of(tape, all.within);
        let attended = tape.product_of(within, new, n, narrow);
        tape.drop(within);
        let sum = tape.add(between, attended);
        tape.drop(attended);
        let core = tape.written(core, sum);
        tape.drop(sum);
        let mark = tape.mark();
        let decay = of(tape, all.decay);
        let kept = tape.multiply(state, decay);
        tape.drop(decay);
        let key = of(tape, all.key);
        let made = tape.product_of(key, new, state.n, narrow);
        tape.drop(key);
        let next = tape.add_narrow(kept, made);
        for tensor in [kept, made, state] {
            tape.drop(tensor);
        }
        Running { core, state: next, old: Some([new, between]), mark }
    }

    /// `Qwen3_5RMSNormGated.forward` over rows of `size`.
    fn gated_norm(&self, tape: &mut Tape, x: Tensor, gate: Tensor, size: f64) -> Tensor {
        let lifted = tape.cast(x, 4.0);
        let squares = tape.square(lifted);
        let variance = tape.mean(squares, x.n / size);
        tape.drop(squares);
        let shifted = tape.plus_number(variance);
        let inverse = tape.rsqrt(shifted);
        tape.drop(shifted);
        let normal = tape.multiply(lifted, inverse);
        tape.drop(inverse);
        tape.drop(lifted);
        let narrow = tape.cast(normal, x.width);
        let weight = self.parameter(size);
        let scaled = tape.multiply_by_parameter(narrow, weight);
        tape.drop(narrow);
        tape.drop(normal);
        let wide = tape.cast(gate, 4.0);
        let open = tape.unary(wide, Saved::Input);
        tape.drop(wide);
        let gated = tape.multiply(scaled, open);
        tape.drop(open);
        tape.drop(scaled);
        let out = tape.cast(gated, x.width);
        tape.drop(gated);
        tape.drop(variance);
        out
    }
}
