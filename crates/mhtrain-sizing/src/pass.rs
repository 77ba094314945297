//! How do the moments of a whole training pass follow each other?
//!
//! embedding, blocks forward, head and loss, blocks backward, embedding backward. Each kind of block is put on the tape
//! once and its net change and highest moment are then counted for as many layers as the model has, in their order,
//! because layers of a kind take and give back the same.
//!
//! With checkpointing a block is recorded when it is differentiated: forward without nodes, then recomputed from its
//! input (`torch/utils/checkpoint.py`, reentrant). The loss is `ForCausalLMLoss` of transformers (logits lifted to fp32,
//! cross-entropy), its outputs lifted to fp32 by accelerate.
//!
//! Where the figures follow the harness and a card differs: gradients that meet are summed into a new tensor, because
//! fake tensors cannot be summed in place. It matters for full fine-tuning with tied embeddings only, at most two tables
//! of the vocabulary too many at the very end.

use crate::block::{Layer, Lists, float};
use crate::model::{BlockKind, ModelShape, Unrotated};
use crate::tape::{High, Kind, Saved, Tape, Tensor};
use crate::workload::{AttnImpl, ExpertForm, Workload};

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
    let mut pass = Pass { lists, shape, work, tape: Tape::new(accumulates) };
    let earlier = if accumulates { all_gradients } else { 0.0 };
    pass.course(High { sum: earlier, logits: 0.0, gradients: earlier }, all_gradients)
}

struct Pass<'a> {
    lists: Lists<'a>,
    shape: &'a ModelShape,
    work: &'a Workload,
    tape: Tape,
}

/// The order of a model's layers: `sliding` and `dense` of each.
fn layers(shape: &ModelShape) -> impl DoubleEndedIterator<Item = Layer> + '_ {
    let dense = |index| {
        shape.experts.as_ref().is_none_or(|experts| experts.dense_layers.binary_search(&index).is_ok())
    };
    (0..shape.layers).map(move |index| {
        let full = |every: u64| every != 0 && (index + 1).is_multiple_of(every);
        let sliding = shape.window.is_some() && !full(shape.full_every);
        let rotated = match shape.style.unrotated {
            Unrotated::None => true,
            Unrotated::Every(every) => !full(every),
            Unrotated::Full => sliding,
        };
        Layer { sliding, dense: dense(index), rotated }
    })
}

/// Index of a kind of layer.
fn kind_of(layer: Layer) -> usize {
    usize::from(layer.sliding) + 2 * usize::from(layer.dense) + 4 * usize::from(!layer.rotated)
}

/// Kinds of layers.
const KINDS: usize = 8;

/// Returns all kinds of layers, each at its index.
fn kinds() -> impl Iterator<Item = (usize, Layer)> {
    (0..KINDS).map(|index| {
        (index, Layer { sliding: index & 1 != 0, dense: index & 2 != 0, rotated: index & 4 == 0 })
    })
}

impl Pass<'_> {
    fn course(&mut self, start: High, all_gradients: f64) -> Highest {
        let mut present = [false; KINDS];
        for layer in layers(self.shape) {
            present[kind_of(layer)] = true;
        }
        let mut course = Course { now: start, ..Course::default() };
        let (prologue, x, tables, held) = self.prologue(&present);
        course.goes_through(&prologue);
        if self.work.gradient_checkpointing {
            self.checkpointed(&mut course, x, tables, present);
        } else {
            self.plain(&mut course, x, tables, present, held);
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
    fn prologue(&mut self, present: &[bool; KINDS]) -> (Segment, Tensor, [Tensor; 2], Vec<Tensor>) {
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
        if self.shape.style.scales_embedding {
            let scaled = tape.plain(x.n, x.width);
            // `enable_input_require_grads` makes what the embedding returns a leaf, which the graph holds: the scaled
            // one of Gemma, whose embedding scales itself, the one before it in others.
            let is_leaf = !lists.full && self.work.gradient_checkpointing;
            if !is_leaf || self.shape.block == BlockKind::Gemma {
                tape.drop(x);
            }
            x = scaled;
        }
        let mut held = vec![tape.plain(length, 8.0)];
        // One mask for layers that slide, one for those that do not.
        for sliding in [false, true] {
            let Some((_, layer)) = kinds().find(|(index, layer)| layer.sliding == sliding && present[*index])
            else {
                continue;
            };
            if self.work.attn_impl == AttnImpl::Eager {
                held.push(tape.plain(lists.rows * length * length, lists.stream_width));
            } else if lists.is_masked(layer) {
                held.push(tape.plain(lists.rows * length * length, 1.0));
            }
        }
        let share = lists.table_share();
        let table = length * float(self.shape.head_dim) * share;
        let tables = [tape.plain(table, lists.table_width()), tape.plain(table, lists.table_width())];
        if self.shape.has_two_rotary_tables() {
            // Tables for local layers beside those for global ones.
            tape.plain(2.0 * table, lists.table_width());
        }
        if lists.full {
            x = tape.root(x);
        } else if self.work.gradient_checkpointing {
            // `enable_input_require_grads`: reentrant checkpoints need an input with a gradient.
            x = tape.root(x);
        }
        let high = self.tape.take_high().minus(start);
        (Segment { high, net: self.tape.live.minus(start), cached: 0.0 }, x, tables, held)
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

    fn checkpointed(&mut self, course: &mut Course, x: Tensor, tables: [Tensor; 2], present: [bool; KINDS]) {
        let mut segments = [LayerSegments::default(); KINDS];
        for (index, layer) in kinds().filter(|(index, _)| present[*index]) {
            let input = self.tape.plain(x.n, x.width);
            let mut out = input;
            let mut forward = self.measured(|pass| {
                pass.tape.recording = false;
                out = pass.lists.block(&mut pass.tape, input, layer, tables);
                pass.tape.recording = true;
            });
            let before = self.tape.live.sum;
            self.tape.leave_autocast();
            forward.cached = before - self.tape.live.sum;
            // The gradient takes the place of the output.
            let gradient = self.tape.plain(out.n, out.width);
            self.tape.drop(out);
            let backward = self.measured(|pass| pass.recompute(input, gradient, layer, tables));
            segments[index] = LayerSegments { forward, backward };
        }
        for layer in layers(self.shape) {
            course.goes_through(&segments[kind_of(layer)].forward);
        }
        let last = self.tape.plain(x.n, x.width);
        let last = self.tape.root(last);
        self.head(course, last, Vec::new());
        for layer in layers(self.shape).rev() {
            course.goes_through(&segments[kind_of(layer)].backward);
        }
        self.embedding_back(course, x);
    }

    /// The backward pass of one checkpointed block.
    fn recompute(&mut self, input: Tensor, gradient: Tensor, layer: Layer, tables: [Tensor; 2]) {
        let mark = self.tape.mark();
        let root = self.tape.root(input);
        let out = self.lists.block(&mut self.tape, root, layer, tables);
        self.tape.leave_autocast();
        let seed = self.tape.hold(gradient);
        self.tape.seed(out, seed);
        self.tape.backward(mark + 1);
        // The gradient of the input stays alive: it is what the block below starts with.
        self.tape.forget_root();
        for tensor in [out, gradient, input] {
            self.tape.drop(tensor);
        }
    }

    fn plain(
        &mut self,
        course: &mut Course,
        x: Tensor,
        tables: [Tensor; 2],
        present: [bool; KINDS],
        mut held: Vec<Tensor>,
    ) {
        let first = layers(self.shape).next();
        let mut stack: Vec<(Layer, usize, LayerSegments)> = Vec::with_capacity(5);
        let middle = kinds().filter(|(index, _)| present[*index]).map(|(_, layer)| layer);
        let mut current = self.tape.hold(x);
        held.push(x);
        // What of the tables is needed on the way back is kept by the nodes that need it.
        held.extend(tables);
        for layer in first.into_iter().chain(middle) {
            let mark = self.tape.mark();
            let mut forward = self.measured(|pass| {
                let next = pass.lists.block(&mut pass.tape, current, layer, tables);
                pass.tape.drop(current);
                current = next;
            });
            let before = self.tape.live.sum;
            self.tape.leave_autocast();
            forward.cached = before - self.tape.live.sum;
            stack.push((layer, mark, LayerSegments { forward, ..LayerSegments::default() }));
        }
        let segment = |stack: &[(Layer, usize, LayerSegments)], layer: Layer| {
            stack.iter().skip(1).find(|(of, _, _)| *of == layer).map(|(_, _, segments)| *segments)
        };
        for (index, layer) in layers(self.shape).enumerate() {
            let segments =
                if index == 0 { stack.first().map(|(_, _, s)| *s) } else { segment(&stack, layer) };
            course.goes_through(&segments.unwrap_or_default().forward);
        }
        self.head(course, current, held);
        for index in (0..stack.len()).rev() {
            let mark = stack[index].1;
            stack[index].2.backward = self.measured(|pass| pass.tape.backward(mark));
        }
        for (index, layer) in layers(self.shape).enumerate().collect::<Vec<_>>().into_iter().rev() {
            let segments =
                if index == 0 { stack.first().map(|(_, _, s)| *s) } else { segment(&stack, layer) };
            course.goes_through(&segments.unwrap_or_default().backward);
        }
        self.embedding_back(course, x);
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
        let sparse = layers(self.shape).filter(|layer| !layer.dense).count();
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

    fn embedding_back(&mut self, course: &mut Course, x: Tensor) {
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
        let up = (bytes / 512.0).ceil() * 512.0;
        let shifted = Segment { high: High { sum: back.high.sum - up, ..back.high }, ..back };
        course.goes_through(&shifted);
    }
}
