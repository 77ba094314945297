//! How do the moments of a whole training pass follow each other?
//!
//! embedding, blocks forward, head and loss, blocks backward, embedding backward. Each kind of block is put on the tape
//! once and its net change and highest moment are then counted for as many layers as the model has, in their order,
//! because layers of a kind take and give back the same. Where they do not (Gemma 4, LFM2), a pass without checkpoints is put
//! on the tape layer by layer.
//!
//! With checkpointing a block is recorded when it is differentiated: forward without nodes, then recomputed from its
//! input (`torch/utils/checkpoint.py`, reentrant). The loss is `ForCausalLMLoss` of transformers (logits lifted to fp32,
//! cross-entropy), its outputs lifted to fp32 by accelerate.
//!
//! Where the figures follow the harness and a card differs: gradients that meet are summed into a new tensor, because
//! fake tensors cannot be summed in place. It matters for full fine-tuning with tied embeddings only, at most two tables
//! of the vocabulary too many at the very end.

use crate::block::{Given, Lists, float};
use crate::model::{BlockKind, Keys, Layer, ModelShape, Rotary, kinds_of};
use crate::tape::{High, Kind, Saved, Tape, Tensor};
use crate::workload::{AttnImpl, ExpertForm, Workload};

/// So many of the first layers are put on the tape one by one at most where a pass keeps everything: an estimate of a model with
/// 4,096 layers whose last one is of another kind must not cost as much as all of them. Models that were measured need six.
const FIRST_LAYERS_MAX: usize = 64;

/// What one part of the pass does to the sum of what is alive.
#[derive(Copy, Clone, Debug, Default)]
struct Segment {
    /// Highest moment, above the sum at its start.
    high: High,
    /// Sum at its end less that at its start.
    net: High,
    /// Of that, what goes when autocast is left.
    cached: f64,
}

impl High {
    fn plus(self, other: High) -> High {
        High {
            sum: self.sum + other.sum,
            logits: self.logits + other.logits,
            gradients: self.gradients + other.gradients,
        }
    }

    fn minus(self, other: High) -> High {
        High {
            sum: self.sum - other.sum,
            logits: self.logits - other.logits,
            gradients: self.gradients - other.gradients,
        }
    }
}

/// The highest moments of a pass above what is resident.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Highest {
    /// Of the backward pass and the optimizer's step: the stages that the measured tables take.
    pub staged: High,
    /// Of the forward pass too. With many adapters and few tokens, autocast's copies can make the end of the forward
    /// pass the highest moment; without checkpointing, the last block's forward pass can be. The tables miss it, because
    /// they are drawn out from two shallow copies of the model (by more than 0.1 % on 15 of
    /// 795 points, by 1.9 % at most; full-depth runs of four of them agree with this figure to 0.0001 %).
    pub overall: f64,
}

/// The running sum over the segments of a pass.
#[derive(Copy, Clone, Debug, Default)]
struct Course {
    now: High,
    highest: Highest,
    cached: f64,
    backward: bool,
}

impl Course {
    fn goes_through(&mut self, segment: &Segment) {
        let high = self.now.plus(segment.high);
        self.highest.overall = self.highest.overall.max(high.sum);
        if self.backward && high.sum > self.highest.staged.sum {
            self.highest.staged = high;
        }
        self.now = self.now.plus(segment.net);
        self.cached += segment.cached;
    }

    fn leaves_autocast(&mut self) {
        self.now.sum -= self.cached;
        self.cached = 0.0;
    }
}

/// Layers of one kind.
#[derive(Copy, Clone, Debug, Default)]
struct LayerSegments {
    forward: Segment,
    backward: Segment,
}

/// Returns the highest moment of one pass above what is resident (weights, adapters, moments; gradients of an earlier
/// pass are counted here).
pub(crate) fn highest(shape: &ModelShape, work: &Workload, all_gradients: f64) -> Highest {
    let lists = Lists::of(shape, work);
    let accumulates = work.accumulation > 1;
    let layers: Vec<Layer> = shape.layer_list().collect();
    let mut pass = Pass { lists, shape, work, layers: &layers, tape: Tape::new(accumulates) };
    let earlier = if accumulates { all_gradients } else { 0.0 };
    pass.course(High { sum: earlier, logits: 0.0, gradients: earlier }, all_gradients)
}

struct Pass<'a> {
    lists: Lists<'a>,
    shape: &'a ModelShape,
    work: &'a Workload,
    /// In their order.
    layers: &'a [Layer],
    tape: Tape,
}

/// What the pass has when the first block begins.
struct Prologue {
    segment: Segment,
    /// The embedding.
    x: Tensor,
    /// Sine and cosine of layers that do not slide, and of those that do.
    tables: [[Tensor; 2]; 2],
    /// What the model's `forward` holds until it returns.
    held: Vec<Tensor>,
    /// The embedding, where the model's `forward` holds it beside what it makes of it: it goes when that returns.
    embedding: Option<Tensor>,
    /// What all layers know of the tokens (Gemma 4).
    inputs: Option<Tensor>,
}

impl Prologue {
    fn tables_of(&self, layer: Layer) -> [Tensor; 2] {
        self.tables[usize::from(layer.sliding)]
    }
}

impl Pass<'_> {
    fn course(&mut self, start: High, all_gradients: f64) -> Highest {
        let kinds: Vec<Layer> =
            kinds_of(self.layers.iter().copied()).into_iter().map(|(layer, _)| layer).collect();
        let mut course = Course { now: start, ..Course::default() };
        let prologue = self.prologue(&kinds);
        course.goes_through(&prologue.segment);
        if self.work.gradient_checkpointing {
            self.checkpointed(&mut course, &prologue, &kinds);
        } else {
            self.plain(&mut course, &prologue, &kinds);
        }
        // The optimizer's step: fused AdamW (ms-swift's default) takes nothing of its own.
        let step = High { sum: all_gradients, logits: 0.0, gradients: all_gradients };
        if step.sum > course.highest.staged.sum {
            course.highest.staged = step;
        }
        course.highest.overall = course.highest.overall.max(course.highest.staged.sum);
        course.highest
    }

    fn measured(&mut self, run: impl FnOnce(&mut Self)) -> Segment {
        let start = self.tape.live;
        self.tape.take_high();
        run(self);
        let high = self.tape.take_high().minus(start);
        Segment { high, net: self.tape.live.minus(start), cached: 0.0 }
    }

    /// Inputs, embedding, positions, masks.
    fn prologue(&mut self, kinds: &[Layer]) -> Prologue {
        let start = self.tape.live;
        self.tape.take_high();
        let lists = &self.lists;
        let (tokens, length) = (lists.tokens, lists.length);
        let positions = self.positions();
        let tape = &mut self.tape;
        // Token ids, labels, and how many of them count.
        tape.plain(tokens, 8.0);
        tape.plain(positions, 8.0);
        tape.plain(1.0, 4.0);
        let mut x = tape.plain(tokens * lists.h, lists.stream_width);
        // `enable_input_require_grads` makes what the embedding returns a leaf, which the graph holds: the scaled one of
        // Gemma, whose embedding scales itself, the one before it in others.
        let is_leaf = !lists.full && self.work.gradient_checkpointing && self.shape.block != BlockKind::Gemma;
        let keeps = self.shape.style.keeps_embedding;
        let mut embedding = None;
        if self.shape.style.scales_embedding {
            let scaled = tape.plain(x.n, x.width);
            if keeps && !is_leaf {
                embedding = Some(x);
            } else if !is_leaf {
                tape.drop(x);
            }
            x = scaled;
        }
        // `enable_input_require_grads`: reentrant checkpoints need an input with a gradient.
        if lists.full || self.work.gradient_checkpointing {
            x = tape.root(x);
        }
        let gemma4 = self.shape.gemma4.as_ref();
        let inputs =
            gemma4.filter(|gemma4| gemma4.inputs > 0).map(|gemma4| lists.all_inputs(tape, x, gemma4));
        let mut held = vec![tape.plain(length, 8.0)];
        // One mask for layers that slide, one for those that do not.
        for sliding in [false, true] {
            let Some(layer) = kinds.iter().find(|layer| layer.sliding == sliding) else { continue };
            if self.work.attn_impl == AttnImpl::Eager {
                held.push(tape.plain(lists.rows * length * length, lists.stream_width));
            } else if lists.is_masked(*layer) {
                held.push(tape.plain(lists.rows * length * length, 1.0));
            }
        }
        let rows = if self.shape.style.tables_by_row { lists.rows } else { 1.0 };
        let table = rows * length * float(self.shape.head_dim) * lists.table_share();
        let width = lists.table_width();
        // Complex numbers have both in one.
        let second = if self.shape.style.rotary == Rotary::Complex { 0.0 } else { table };
        let mut tables = [[tape.plain(table, width), tape.plain(second, width)]; 2];
        if let Some(gemma4) = gemma4 {
            let full = length * float(gemma4.full_head_dim);
            tables[0] = [tape.plain(full, width), tape.plain(full, width)];
        } else if self.shape.has_two_rotary_tables() {
            // Tables for local layers beside those for global ones.
            tape.plain(2.0 * table, width);
        }
        if self.shape.style.norms_embedding {
            embedding = Some(x).filter(|_| !is_leaf);
            x = lists.norm(tape, x, lists.h);
        }
        let high = self.tape.take_high().minus(start);
        let segment = Segment { high, net: self.tape.live.minus(start), cached: 0.0 };
        Prologue { segment, x, tables, held, embedding, inputs }
    }

    /// Number of positions that get logits.
    ///
    /// One row: exactly the supervised ones. Several rows: the same number of last ones in each. ms-swift 4.6,
    /// `logits_to_keep`; rounding as in the harness, but never fewer with more rows.
    fn positions(&self) -> f64 {
        let (rows, length, share) = (self.lists.rows, self.lists.length, self.work.logit_share);
        if rows <= 1.0 {
            return (length * share).round_ties_even().max(1.0);
        }
        let each = length * share;
        let whole = each.floor();
        // round(rows * each) / rows exceeds the whole number for few rows only.
        let rounded_up = if each > whole { (0.5 / (whole + 1.0 - each)).floor().min(rows) } else { 0.0 };
        (rows * whole).max(rounded_up * (whole + 1.0)).max(rows)
    }

    fn checkpointed(&mut self, course: &mut Course, prologue: &Prologue, kinds: &[Layer]) {
        let x = prologue.x;
        let mut segments: Vec<(Layer, LayerSegments)> = Vec::with_capacity(kinds.len());
        for &layer in kinds {
            let input = self.tape.plain(x.n, x.width);
            let mut given = Given::tables(prologue.tables_of(layer));
            given.stored = self.stored(layer);
            given.input = prologue.inputs.map(|all| self.tape.plain(self.input_of(all), all.width));
            let mut out = input;
            let mut forward = self.measured(|pass| {
                pass.tape.recording = false;
                if layer.keys == Keys::Stored {
                    // There is nothing yet that it would take the place of.
                    given.stored = None;
                }
                out = pass.lists.block(&mut pass.tape, input, layer, &mut given);
                pass.tape.recording = true;
            });
            let before = self.tape.live.sum;
            self.tape.leave_autocast();
            forward.cached = before - self.tape.live.sum;
            // The gradient takes the place of the output.
            let gradient = self.tape.plain(out.n, out.width);
            self.tape.drop(out);
            let backward = self.measured(|pass| pass.recompute(input, gradient, layer, given));
            segments.push((layer, LayerSegments { forward, backward }));
        }
        let segment = |layer: Layer| {
            segments.iter().find(|(of, _)| *of == layer).map(|(_, segments)| *segments).unwrap_or_default()
        };
        for &layer in self.layers {
            course.goes_through(&segment(layer).forward);
        }
        let last = self.tape.plain(x.n, x.width);
        let last = self.tape.root(last);
        self.head(course, last, prologue.embedding.into_iter().collect());
        self.tape.forget_root();
        let mut leaves = 0.0;
        for (&layer, index) in self.layers.iter().rev().zip(0..) {
            course.goes_through(&segment(layer).backward);
            course.now.sum += leaves;
            leaves = 0.0;
            if layer.keys == Keys::Stored {
                // The graph of what it stored holds its input, and the gradient of that, which the block below starts with.
                course.now.sum += requested(x);
                leaves = requested(x);
            }
            let Some(all) = prologue.inputs else { continue };
            if index + 1 == self.shape.layers {
                // No checkpoint needs it any longer; what made it still holds the embedding.
                course.now.sum -= requested(all);
                if layer.keys != Keys::Stored {
                    course.now.sum += requested(x);
                    self.tape.drop(x);
                }
            }
            if all.needs_gradient() {
                let mut back = self.measured(|pass| pass.input_back(all, index == 0));
                back.net.sum -= requested(all.view(self.input_of(all)));
                course.goes_through(&back);
            }
        }
        self.embedding_back(course, prologue);
    }

    /// Returns elements of what one layer knows of the tokens.
    fn input_of(&self, all: Tensor) -> f64 {
        all.n / float(self.shape.layers)
    }

    /// Returns stand-ins for the keys and values that a layer takes, or that it takes the place of.
    fn stored(&mut self, layer: Layer) -> Option<[Tensor; 2]> {
        if layer.keys == Keys::Own {
            return None;
        }
        let heads = self.shape.heads_of(layer);
        let n = self.lists.tokens * float(heads.keys) * float(heads.width);
        Some([0; 2].map(|_| self.tape.plain(n, self.lists.stream_width)))
    }

    /// The gradient of what one layer knows of the tokens becomes one of what all know, and is added to that of the others.
    ///
    /// Source: `select_backward` of torch.
    fn input_back(&mut self, all: Tensor, is_first: bool) {
        let whole = self.tape.plain(all.n, all.width);
        if !is_first {
            let sum = self.tape.plain(all.n, all.width);
            self.tape.drop(whole);
            self.tape.drop(sum);
        }
    }

    /// The backward pass of one checkpointed block.
    fn recompute(&mut self, input: Tensor, gradient: Tensor, layer: Layer, mut given: Given) {
        let mark = self.tape.mark();
        let root = self.tape.root(input);
        given.input = given.input.map(|input| self.tape.root(input));
        let roots = mark + 1 + usize::from(given.input.is_some());
        let out = self.lists.block(&mut self.tape, root, layer, &mut given);
        self.tape.leave_autocast();
        let seed = self.tape.hold(gradient);
        self.tape.seed(out, seed);
        self.tape.backward(roots);
        // The gradient of the input stays alive: it is what the block below starts with.
        if given.input.is_some() {
            self.tape.forget_root();
        }
        self.tape.forget_root();
        for tensor in [out, gradient, input] {
            self.tape.drop(tensor);
        }
    }

    fn plain(&mut self, course: &mut Course, prologue: &Prologue, kinds: &[Layer]) {
        let x = prologue.x;
        let mut held = prologue.held.clone();
        // Layers that share something are put on the tape one by one, others once for each kind. Before those come the first layers,
        // until there was one of each kind: only some kinds may have what is adapted, and layers before the first of them need no
        // gradient. A kind that comes late has no more of them before it than `FIRST_LAYERS_MAX`.
        let is_whole = self.shape.gemma4.is_some();
        let first = kinds.iter().filter_map(|kind| self.layers.iter().position(|layer| layer == kind)).max();
        let first = first.map_or(1, |index| (index + 1).min(FIRST_LAYERS_MAX));
        let order: Vec<Layer> = if is_whole {
            self.layers.to_vec()
        } else {
            self.layers.iter().take(first).chain(kinds).copied().collect()
        };
        let mut stack: Vec<(Layer, usize, LayerSegments)> = Vec::with_capacity(order.len());
        let mut current = self.tape.hold(x);
        held.push(x);
        held.extend(prologue.embedding);
        // What of the tables is needed on the way back is kept by the nodes that need it.
        held.extend(prologue.tables[1]);
        if self.shape.gemma4.is_some() {
            held.extend(prologue.tables[0]);
        }
        held.extend(prologue.inputs);
        let mut stored: [Option<[Tensor; 2]>; 2] = [None; 2];
        for &layer in &order {
            let mark = self.tape.mark();
            let mut forward = self.measured(|pass| {
                let mut given = Given::tables(prologue.tables_of(layer));
                given.stored = stored[usize::from(layer.sliding)];
                given.input = prologue.inputs.map(|all| pass.tape.slice(all, pass.input_of(all)));
                let next = pass.lists.block(&mut pass.tape, current, layer, &mut given);
                pass.tape.drop(current);
                if let Some(input) = given.input {
                    pass.tape.drop(input);
                }
                stored[usize::from(layer.sliding)] = given.stored;
                current = next;
            });
            let before = self.tape.live.sum;
            self.tape.leave_autocast();
            forward.cached = before - self.tape.live.sum;
            stack.push((layer, mark, LayerSegments { forward, ..LayerSegments::default() }));
        }
        held.extend(stored.into_iter().flatten().flatten());
        let segment = |stack: &[(Layer, usize, LayerSegments)], index: usize, layer: Layer| {
            let found = match index {
                _ if is_whole || index < first => stack.get(index),
                _ => stack.iter().skip(first).find(|(of, _, _)| *of == layer),
            };
            found.map(|(_, _, segments)| *segments).unwrap_or_default()
        };
        for (index, &layer) in self.layers.iter().enumerate() {
            course.goes_through(&segment(&stack, index, layer).forward);
        }
        self.head(course, current, held);
        for index in (0..stack.len()).rev() {
            let mark = stack[index].1;
            stack[index].2.backward = self.measured(|pass| pass.tape.backward(mark));
        }
        for (index, &layer) in self.layers.iter().enumerate().rev() {
            course.goes_through(&segment(&stack, index, layer).backward);
        }
        self.embedding_back(course, prologue);
    }

    /// Returns what the load balancing loss of a mixture takes at its highest moment, 0 where it is off.
    ///
    /// In transformers 4 the choices of all blocks together, for each token, chosen expert and expert: one-hot as int64,
    /// and the same as fp32. With an attention mask, which packed rows do not have, that mask spread as int64 and a product
    /// in fp32 too. Beside them the router's logits: of each block and joined in half, their softmax in fp32. In
    /// transformers 5 one block follows the other, and nothing is worth counting: two bytes a token, block and expert.
    ///
    /// Source: `load_balancing_loss_func` in `modeling_qwen3_moe.py` of transformers 4.57 and 5.19; Mixtral, Qwen 2 and
    /// gpt-oss have the same.
    fn router_loss(&self) -> f64 {
        let Some(experts) = self.shape.experts.as_ref().filter(|_| self.work.router_loss) else { return 0.0 };
        if self.work.experts == ExpertForm::Fused {
            return 0.0;
        }
        let sparse = self.layers.iter().filter(|layer| !layer.dense).count();
        let sparse = float(u64::try_from(sparse).unwrap_or(u64::MAX));
        let rows = sparse * self.lists.tokens;
        let (count, top_k) = (float(experts.count), float(experts.top_k));
        let choice = if self.work.packing { 8.0 + 4.0 } else { 8.0 + 4.0 + 8.0 + 4.0 };
        rows * (count * (top_k * choice + 2.0 * self.lists.stream_width + 4.0) + top_k * (4.0 + 8.0))
    }

    /// Last norm, head, loss, and their backward pass, until the gradient of the last block's output is there.
    ///
    /// `held` is what the model's `forward` holds until it returns: with checkpoints the graph holds it longer.
    fn head(&mut self, course: &mut Course, x: Tensor, held: Vec<Tensor>) {
        let mark = self.tape.mark();
        let positions = self.positions();
        let (rows, tokens, h) = (self.lists.rows, self.lists.tokens, self.lists.h);
        let vocab = float(self.shape.vocab);
        let mut lifted = x;
        let mut small: Vec<Tensor> = Vec::new();
        let mut softmax = x;
        let router_loss = self.router_loss();
        let forward = self.measured(|pass| {
            let lists = &pass.lists;
            let tape = &mut pass.tape;
            let normal = lists.norm(tape, x, h);
            tape.drop(x);
            for tensor in held {
                tape.drop(tensor);
            }
            let kept = if rows == 1.0 && positions < tokens {
                let places = tape.plain(0.0, 8.0);
                let kept = tape.index(normal, positions * h, places);
                tape.drop(places);
                kept
            } else {
                let view = tape.slice(normal, positions * h);
                if lists.full && positions < tokens {
                    // The product keeps a contiguous copy of the last positions of each row.
                    let copy = tape.plain(view.n, view.width).with_way_back_of(view);
                    tape.drop(view);
                    copy
                } else {
                    view
                }
            };
            if pass.work.liger_kernel {
                // Liger's fused loss never has more than one chunk of logits; its sizes are those of
                // `fused_linear_cross_entropy.py` of liger-kernel: chunks of T / ceil(V / H) rows.
                let chunks = (vocab / h).ceil().max(1.0);
                let chunk = (positions / chunks).ceil().max(1.0);
                tape.kind = Kind::Logits;
                let logits = tape.plain(chunk * vocab, kept.width);
                let wide = tape.plain(chunk * vocab, 4.0);
                tape.kind = Kind::Activation;
                tape.drop(wide);
                tape.drop(logits);
                lifted = tape.liger(
                    kept,
                    lists.full.then_some(vocab * h * lists.weight_width),
                    pass.shape.tied_embeddings,
                );
                tape.drop(kept);
                tape.drop(normal);
                return;
            }
            tape.kind = Kind::Logits;
            tape.tied = pass.shape.tied_embeddings;
            let bias = pass.shape.style.head_bias;
            let mut logits = lists.product(tape, kept, [h, vocab], bias, lists.full);
            tape.tied = false;
            tape.drop(kept);
            if pass.shape.style.scales_logits {
                let scaled = tape.scale(logits);
                tape.drop(logits);
                logits = scaled;
            }
            if pass.shape.soft_capped_logits {
                for saved in [Saved::Nothing, Saved::Output, Saved::Nothing] {
                    let next = tape.unary(logits, saved);
                    tape.drop(logits);
                    logits = next;
                }
            }
            lifted = tape.cast(logits, 4.0);
            tape.kind = Kind::Activation;
            let padded = tape.plain(positions + rows, 8.0);
            let labels = if rows > 1.0 { tape.plain(positions, 8.0) } else { tape.hold(padded) };
            tape.kind = Kind::Logits;
            softmax = tape.plain(positions * vocab, 4.0);
            tape.kind = Kind::Activation;
            let loss = tape.plain(1.0, 4.0);
            let count = tape.plain(1.0, 4.0);
            tape.plain(1.0, 4.0);
            tape.drop(loss);
            tape.drop(lifted);
            tape.drop(padded);
            tape.transient(router_loss);
            tape.drop(normal);
            small = vec![labels, count];
            tape.leave_autocast();
            tape.kind = Kind::Logits;
            if logits.width < 4.0 {
                let output = tape.plain(logits.n, 4.0);
                tape.drop(logits);
                tape.drop(output);
            } else {
                tape.drop(logits);
            }
            tape.kind = Kind::Activation;
        });
        // What the router's loss takes counts as a stage, unlike the rest of the forward pass: it grows with the layers.
        course.backward = router_loss > 0.0;
        course.goes_through(&forward);
        course.leaves_autocast();
        course.backward = true;
        let backward = self.measured(|pass| {
            let tape = &mut pass.tape;
            tape.plain(1.0, 4.0);
            let divided = tape.plain(1.0, 4.0);
            if pass.work.liger_kernel {
                tape.seed(lifted, divided);
            } else {
                tape.kind = Kind::Logits;
                let picked = tape.plain(positions * vocab, 4.0);
                tape.kind = Kind::Activation;
                tape.drop(divided);
                for tensor in small {
                    tape.drop(tensor);
                }
                tape.kind = Kind::Logits;
                let gradient = tape.plain(positions * vocab, 4.0);
                tape.kind = Kind::Activation;
                tape.drop(picked);
                tape.drop(softmax);
                tape.seed(lifted, gradient);
            }
            tape.backward(mark);
        });
        course.goes_through(&backward);
    }

    fn embedding_back(&mut self, course: &mut Course, prologue: &Prologue) {
        let x = prologue.x;
        let inputs = prologue.inputs.filter(Tensor::needs_gradient);
        if inputs.is_some() || self.shape.style.norms_embedding && x.needs_gradient() {
            if self.work.gradient_checkpointing {
                // What the layers left: the gradients of the embedding and of what all layers know.
                for tensor in [x].into_iter().chain(inputs).filter(Tensor::needs_gradient) {
                    let gradient = self.tape.plain(tensor.n, tensor.width);
                    self.tape.seed(tensor, gradient);
                }
            }
            let keep = usize::from(x.needs_gradient());
            let back = self.measured(|pass| pass.tape.backward(keep));
            course.goes_through(&back);
        }
        if !self.lists.full {
            return;
        }
        let lists = &self.lists;
        let table = float(self.shape.vocab) * lists.h * lists.weight_width;
        let scales = self.shape.style.scales_embedding;
        let bytes = x.n * x.width;
        let back = self.measured(|pass| {
            let mut gradient = pass.tape.plain(bytes, 1.0);
            if scales {
                let scaled = pass.tape.plain(bytes, 1.0);
                pass.tape.drop(gradient);
                gradient = scaled;
            }
            pass.tape.embedding_back(gradient, table);
        });
        // The gradient is alive already.
        let shifted = Segment { high: High { sum: back.high.sum - requested(x), ..back.high }, ..back };
        course.goes_through(&shifted);
    }
}

/// Returns what torch's allocator takes for a tensor, bytes.
fn requested(tensor: Tensor) -> f64 {
    (tensor.n * tensor.width / 512.0).ceil() * 512.0
}
