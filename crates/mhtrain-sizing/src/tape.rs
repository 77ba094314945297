//! What is alive at every moment of a forward and a backward pass?
//!
//! A tape plays the part of torch's allocator and of autograd: every tensor is a size, every operation takes a new one,
//! and every operation that is differentiated leaves a node that keeps what its backward formula needs. The backward
//! pass replays the nodes from the last to the first with the temporaries of those formulas. Nothing is computed but
//! sums of bytes.
//!
//! Source of each list: the temporaries and the order of frees were recorded with `tests/record_blocks.py` (torch 2.15,
//! transformers 5.19, peft 0.20, fake tensors), one line for each allocation with the operation that made it; the formulas are
//! those of `derivatives.yaml`, the order of frees that of `torch/csrc/autograd/engine.cpp` (the gradient goes when the
//! formula returns, what was saved goes after it, gradients that meet are summed into a new tensor).

/// Requests are rounded up to this by torch's CUDA caching allocator (`kMinBlockSize`, `CUDACachingAllocator.cpp`).
const BLOCK: f64 = 512.0;

/// No node: a tensor that needs no gradient.
const NONE: u32 = u32::MAX;
/// The gradient of a parameter goes here: it is kept until the optimizer has used it.
const LEAF: u32 = u32::MAX - 1;
/// The gradient of the head that is also the embedding waits here for that of the embedding.
const TIED: u32 = u32::MAX - 2;

/// What a tensor counts as in the terms of the estimate.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything of the pass itself.
    Activation,
    /// Vocabulary-wide.
    Logits,
    /// Gradient of a parameter.
    Gradient,
}

/// A tensor, or a view of one. Copies of a handle share one reference; [`Tape::hold`] takes another.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Tensor {
    storage: u32,
    node: u32,
    /// Elements.
    pub n: f64,
    /// Bytes of an element.
    pub width: f64,
}

impl Tensor {
    /// Returns whether a gradient flows into it.
    pub(crate) fn needs_gradient(&self) -> bool {
        self.node != NONE
    }

    /// Returns the same storage with another number of elements: a view.
    pub(crate) fn view(self, n: f64) -> Tensor {
        Tensor { n, ..self }
    }

    /// Returns the tensor as what takes the place of `other` in the graph: a contiguous copy of it.
    pub(crate) fn with_way_back_of(self, other: Tensor) -> Tensor {
        Tensor { node: other.node, ..self }
    }

    fn bytes(&self) -> f64 {
        self.n * self.width
    }
}

#[derive(Copy, Clone, Debug)]
struct Storage {
    bytes: f64,
    references: u32,
    kind: Kind,
}

/// What one node does in the backward pass; sizes in bytes.
#[derive(Copy, Clone, Debug)]
enum Rule {
    /// The gradient goes on as it is: sums, views.
    Pass,
    /// A new gradient of this size replaces the incoming one (casts, activations, dropout, clones, means).
    New(f64),
    /// As [`Rule::New`], with this many temporaries of the same size alive beside it (`pow`, `rsqrt`).
    Power(f64),
    /// An indexed or sliced tensor: `zeros` and the result, both of this size.
    Scatter(f64),
    /// A product of two tensors: the full size, and to what each gradient is then summed (0: not summed).
    Product { full: f64, sums: [f64; 2] },
    /// A matrix product: gradient of the weight (0: frozen), of the input (0: none); the weight comes first.
    Matrix { weight: f64, input: f64 },
    /// A matrix product with bias: input, weight, bias.
    Affine { weight: f64, input: f64, bias: f64 },
    /// A product with a 4-bit weight: scales, unpacked weight, input.
    FourBit { scales: f64, weight: f64, input: f64 },
    /// Rotation by halves: size of the rotated tensor, and whether a rest was joined to it.
    Rotate { n: f64, joined: bool },
    /// A tensor of which one part was rotated and joined to the rest: sizes of all and of the part.
    Rejoin { all: f64, part: f64 },
    /// Rotation in two halves that are multiplied apart (gpt-oss).
    RotateHalves(f64),
    /// Attention: sizes of the three gradients, of the workspaces, and of K and V before they were repeated (0: not).
    Attention { gradients: [f64; 3], workspace: [f64; 5], unrepeated: f64 },
    /// Eager attention: scores, fp32 softmax (0: none), queries, keys before they were repeated (0: not), scores with
    /// sinks (0: none), one number for each row of scores.
    Eager { scores: f64, wide: f64, query: f64, key: f64, sinks: f64, sums: f64, capped: bool },
    /// Two halves come together: size of both.
    Join(f64),
    /// Clamped and scaled gate of gpt-oss: size of one half.
    ClampedGate(f64),
    /// Experts' weights: gradient of the weight (0: frozen), gradient of the input.
    Grouped { weight: f64, input: f64 },
    /// Gradients that were made in the forward pass: of the weight and of the input.
    Made,
    /// Weights of the routes are made to sum to one.
    Normalise { n: f64, sum: f64 },
    /// The chosen scores go back to their places: size of all scores.
    Scores(f64),
}

#[derive(Copy, Clone, Debug)]
struct Node {
    rule: Rule,
    inputs: [u32; 3],
    saved: [u32; 6],
    gradient: u32,
}

/// A highest sum and what it was made of.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub(crate) struct High {
    /// Everything.
    pub sum: f64,
    /// Vocabulary-wide tensors in it.
    pub logits: f64,
    /// Gradients of parameters in it.
    pub gradients: f64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tape {
    storages: Vec<Storage>,
    free: Vec<u32>,
    nodes: Vec<Node>,
    /// What is alive now.
    pub live: High,
    high: High,
    /// Whether operations leave nodes.
    pub recording: bool,
    /// Gradients of an earlier pass are there: a new one is summed to them, in a new tensor.
    pub accumulates: bool,
    cached: Vec<u32>,
    /// Parameters that are met now are the embedding's too.
    pub tied: bool,
    waiting: Option<u32>,
    /// What new tensors count as.
    pub kind: Kind,
}

impl Tape {
    pub(crate) fn new(accumulates: bool) -> Tape {
        Tape {
            storages: Vec::with_capacity(256),
            free: Vec::with_capacity(128),
            nodes: Vec::with_capacity(512),
            live: High::default(),
            high: High::default(),
            recording: true,
            accumulates,
            cached: Vec::new(),
            tied: false,
            waiting: None,
            kind: Kind::Activation,
        }
    }

    /// Returns the highest sum since the last call.
    pub(crate) fn take_high(&mut self) -> High {
        std::mem::replace(&mut self.high, self.live)
    }

    fn storage(&mut self, bytes: f64, kind: Kind) -> u32 {
        let bytes = (bytes / BLOCK).ceil() * BLOCK;
        self.live.sum += bytes;
        match kind {
            Kind::Activation => {}
            Kind::Logits => self.live.logits += bytes,
            Kind::Gradient => self.live.gradients += bytes,
        }
        if self.live.sum > self.high.sum {
            self.high = self.live;
        }
        let storage = Storage { bytes, references: 1, kind };
        match self.free.pop() {
            Some(id) => {
                self.storages[id as usize] = storage;
                id
            }
            None => {
                self.storages.push(storage);
                u32::try_from(self.storages.len() - 1).unwrap_or(NONE)
            }
        }
    }

    fn release(&mut self, id: u32) {
        let storage = &mut self.storages[id as usize];
        storage.references -= 1;
        if storage.references == 0 {
            let (bytes, kind) = (storage.bytes, storage.kind);
            self.live.sum -= bytes;
            match kind {
                Kind::Activation => {}
                Kind::Logits => self.live.logits -= bytes,
                Kind::Gradient => self.live.gradients -= bytes,
            }
            self.free.push(id);
        }
    }

    fn retain(&mut self, id: u32) -> u32 {
        self.storages[id as usize].references += 1;
        id
    }

    /// Lets go of one reference.
    pub(crate) fn drop(&mut self, tensor: Tensor) {
        self.release(tensor.storage);
    }

    /// Takes one more reference.
    pub(crate) fn hold(&mut self, tensor: Tensor) -> Tensor {
        self.retain(tensor.storage);
        tensor
    }

    /// Takes something that comes and goes at once.
    pub(crate) fn transient(&mut self, bytes: f64) {
        let id = self.storage(bytes, Kind::Activation);
        self.release(id);
    }

    /// Returns a tensor that needs no gradient.
    pub(crate) fn plain(&mut self, n: f64, width: f64) -> Tensor {
        let kind = self.kind;
        Tensor { storage: self.storage(n * width, kind), node: NONE, n, width }
    }

    /// Returns the tensor as the root of a new graph: its gradient is kept apart by [`Tape::backward`].
    pub(crate) fn root(&mut self, tensor: Tensor) -> Tensor {
        let node = self.node(Rule::Pass, [NONE; 3], &[]);
        Tensor { node, ..tensor }
    }

    fn node(&mut self, rule: Rule, inputs: [u32; 3], saved: &[Tensor]) -> u32 {
        let mut ids = [NONE; 6];
        for (id, tensor) in ids.iter_mut().zip(saved) {
            *id = self.retain(tensor.storage);
        }
        self.nodes.push(Node { rule, inputs, saved: ids, gradient: NONE });
        u32::try_from(self.nodes.len() - 1).unwrap_or(NONE)
    }

    /// Makes the result of an operation. `saved` is kept when any of the inputs needs a gradient.
    fn result(&mut self, n: f64, width: f64, rule: Rule, inputs: [u32; 3], saved: &[Tensor]) -> Tensor {
        let mut out = self.plain(n, width);
        out = self.link(out, rule, inputs, saved);
        out
    }

    fn link(&mut self, out: Tensor, rule: Rule, inputs: [u32; 3], saved: &[Tensor]) -> Tensor {
        if self.recording && inputs.iter().any(|input| *input != NONE) {
            Tensor { node: self.node(rule, inputs, saved), ..out }
        } else {
            out
        }
    }

    /// Returns where the gradient of a parameter goes: nowhere when it is frozen.
    fn leaf(&self, trains: bool) -> u32 {
        match (trains, self.tied) {
            (false, _) => NONE,
            (true, false) => LEAF,
            (true, true) => TIED,
        }
    }

    // ------------------------------------------------------------------------------------------------ operations

    /// `x.to(width)`; `x` itself when it has that width.
    pub(crate) fn cast(&mut self, x: Tensor, width: f64) -> Tensor {
        if x.width == width {
            return self.hold(x);
        }
        self.result(x.n, width, Rule::New(x.bytes()), [x.node, NONE, NONE], &[])
    }

    /// Autocast's copy of a parameter of `n` elements of `width`, cached until the forward pass is left.
    pub(crate) fn weight_copy(&mut self, n: f64, width: f64, to: f64, trains: bool) -> Tensor {
        let leaf = self.leaf(trains);
        let copy = self.result(n, to, Rule::New(n * width), [leaf, NONE, NONE], &[]);
        if trains {
            let id = self.retain(copy.storage);
            self.cached.push(id);
        }
        copy
    }

    /// A parameter of `n` elements of `width` lifted to fp32 by the model's own code.
    pub(crate) fn lifted_parameter(&mut self, n: f64, width: f64, trains: bool) -> Tensor {
        let leaf = self.leaf(trains);
        self.result(n, 4.0, Rule::New(n * width), [leaf, NONE, NONE], &[])
    }

    /// Sum over `k` neighbours.
    pub(crate) fn sum_over(&mut self, x: Tensor, k: f64) -> Tensor {
        self.result(x.n / k, x.width, Rule::New(x.bytes()), [x.node, NONE, NONE], &[])
    }

    /// The embedding's backward pass: a gradient of the whole table, summed to that of a tied head.
    pub(crate) fn embedding_back(&mut self, gradient: Tensor, table: f64) {
        let new = self.storage(table, Kind::Activation);
        self.release(gradient.storage);
        let all = match self.waiting.take() {
            None => new,
            Some(head) => {
                let sum = self.storage(table, Kind::Activation);
                self.release(head);
                self.release(new);
                sum
            }
        };
        self.keep(all);
    }

    /// Liger's fused head and loss: the gradient of its input, and of its weight when it trains, are made in the forward
    /// pass and kept.
    pub(crate) fn liger(&mut self, x: Tensor, weight: Option<f64>, tied: bool) -> Tensor {
        let input = self.plain(x.n, x.width);
        let mut out = self.plain(1.0, 4.0);
        self.tied = tied;
        let weight = weight.map(|bytes| (self.plain(bytes, 1.0), self.leaf(true)));
        self.tied = false;
        if let Some((made, leaf)) = weight {
            out = self.link(out, Rule::Made, [leaf, x.node, NONE], &[made, input]);
            self.drop(made);
        } else {
            out = self.link(out, Rule::Made, [NONE, x.node, NONE], &[input, input]);
        }
        self.drop(input);
        out
    }

    /// Leaves autocast: its cached copies go.
    pub(crate) fn leave_autocast(&mut self) {
        for id in std::mem::take(&mut self.cached) {
            self.release(id);
        }
    }

    /// An operation whose backward formula makes one tensor of the size of `x` out of the gradient and of what is saved.
    pub(crate) fn unary(&mut self, x: Tensor, saved: Saved) -> Tensor {
        let mut out = self.plain(x.n, x.width);
        let rule = Rule::New(x.bytes());
        match saved {
            Saved::Nothing => out = self.link(out, rule, [x.node, NONE, NONE], &[]),
            Saved::Input => out = self.link(out, rule, [x.node, NONE, NONE], &[x]),
            Saved::Output => out = self.link(out, rule, [x.node, NONE, NONE], &[out]),
        }
        out
    }

    /// `x` in another order or of another kind, whose gradient takes a copy of the same size.
    pub(crate) fn copied_back(&mut self, x: Tensor) -> Tensor {
        let mut out = self.hold(x);
        out.node = NONE;
        out = self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], &[]);
        out
    }

    /// `a + b`, of the wider type; both get the same gradient.
    pub(crate) fn add(&mut self, a: Tensor, b: Tensor) -> Tensor {
        self.result(a.n, a.width.max(b.width), Rule::Pass, [a.node, b.node, NONE], &[])
    }

    /// `x * factor`, a number.
    pub(crate) fn scale(&mut self, x: Tensor) -> Tensor {
        self.unary(x, Saved::Nothing)
    }

    /// `a * b`; a smaller one of the two is spread, and its gradient summed.
    pub(crate) fn multiply(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let n = a.n.max(b.n);
        let width = a.width.max(b.width);
        let sum = |x: Tensor| if x.n < n { x.n * width } else { 0.0 };
        let rule = Rule::Product { full: n * width, sums: [sum(a), sum(b)] };
        let mut out = self.plain(n, width);
        match (a.needs_gradient(), b.needs_gradient()) {
            (true, true) => out = self.link(out, rule, [a.node, b.node, NONE], &[a, b]),
            (true, false) => out = self.link(out, rule, [a.node, NONE, NONE], &[b]),
            (false, true) => out = self.link(out, rule, [NONE, b.node, NONE], &[a]),
            (false, false) => {}
        }
        out
    }

    /// `weight * x` with a parameter of `weight_n` elements; `x` is kept only if it trains.
    pub(crate) fn multiply_by_parameter(&mut self, x: Tensor, parameter: Parameter) -> Tensor {
        let width = x.width.max(parameter.width);
        let full = x.n * width;
        let rule = Rule::Product { full, sums: [parameter.n * width, 0.0] };
        let mut out = self.plain(x.n, width);
        let leaf = self.leaf(parameter.trains);
        if parameter.trains {
            out = self.link(out, rule, [leaf, x.node, NONE], &[x]);
        } else {
            out = self.link(out, rule, [NONE, x.node, NONE], &[]);
        }
        out
    }

    /// `x.pow(2)`.
    pub(crate) fn square(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::Power(x.bytes()), [x.node, NONE, NONE], &[x])
    }

    /// Mean over the last dimension, `rows` of which are left.
    pub(crate) fn mean(&mut self, x: Tensor, rows: f64) -> Tensor {
        self.result(rows, x.width, Rule::New(x.bytes()), [x.node, NONE, NONE], &[])
    }

    /// `x + epsilon`.
    pub(crate) fn plus_number(&mut self, x: Tensor) -> Tensor {
        self.result(x.n, x.width, Rule::Pass, [x.node, NONE, NONE], &[])
    }

    /// `1 / sqrt(x)`.
    pub(crate) fn rsqrt(&mut self, x: Tensor) -> Tensor {
        let mut out = self.plain(x.n, x.width);
        out = self.link(out, Rule::Power(x.bytes()), [x.node, NONE, NONE], &[out]);
        out
    }

    /// Dropout: a mask of one byte an element, kept if `x` needs a gradient.
    pub(crate) fn dropout(&mut self, x: Tensor) -> Tensor {
        let mut out = self.plain(x.n, x.width);
        let mask = self.plain(x.n, 1.0);
        out = self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], &[mask]);
        self.drop(mask);
        out
    }

    /// `x @ weight`, the weight a parameter or a copy of one.
    pub(crate) fn matrix(&mut self, x: Tensor, rows: f64, weight: Weight) -> Tensor {
        let Weight { input, output, width, trains, copy, bias } = weight;
        let weight_node = match copy {
            Some(copy) => copy.node,
            None => self.leaf(trains),
        };
        let mut out = self.plain(rows * output, x.width.min(width));
        let in_bytes = if x.needs_gradient() { rows * input * x.width } else { 0.0 };
        let weight_bytes = if weight_node == NONE { 0.0 } else { input * output * width };
        let rule = if bias {
            let bias = if weight_bytes > 0.0 { output * width } else { 0.0 };
            Rule::Affine { weight: weight_bytes, input: in_bytes, bias }
        } else {
            Rule::Matrix { weight: weight_bytes, input: in_bytes }
        };
        let inputs = [weight_node, x.node, NONE];
        match (weight_node != NONE, copy.filter(|_| x.needs_gradient())) {
            (true, Some(copy)) => out = self.link(out, rule, inputs, &[x, copy]),
            (true, None) => out = self.link(out, rule, inputs, &[x]),
            (false, Some(copy)) => out = self.link(out, rule, inputs, &[copy]),
            (false, None) => out = self.link(out, rule, inputs, &[]),
        }
        out
    }

    /// `x @ unpack(weight)` with a frozen 4-bit weight; peft clones the result.
    pub(crate) fn four_bit(&mut self, x: Tensor, rows: f64, input: f64, output: f64, width: f64) -> Tensor {
        let scales = 4.0 * (input * output / 64.0).ceil();
        let unpacked = width * input * output;
        let temporary = self.plain(scales, 1.0);
        let weight = self.plain(unpacked, 1.0);
        self.drop(temporary);
        let mut out = self.plain(rows * output, width);
        self.drop(weight);
        let rule = Rule::FourBit { scales, weight: unpacked, input: rows * input * width };
        out = self.link(out, rule, [x.node, NONE, NONE], &[]);
        let clone = self.result(out.n, out.width, Rule::Pass, [out.node, NONE, NONE], &[]);
        self.drop(out);
        clone
    }

    /// The point to which the gradients of a rotated part and of the rest come back; call it for q and k before
    /// [`Tape::rotate`], because the parts are cut before either is rotated.
    pub(crate) fn cut(&mut self, x: Tensor, rotation: Rotation) -> Tensor {
        let part = match rotation {
            Rotation::Whole | Rotation::Halves => return x,
            Rotation::WholeJoined => 1.0,
            Rotation::Partial(part) => part,
        };
        let mut cut = Tensor { node: NONE, ..x };
        let rule = Rule::Rejoin { all: x.bytes(), part: x.bytes() * part };
        cut = self.link(cut, rule, [x.node, NONE, NONE], &[]);
        cut
    }

    /// `x * cos + rotate_half(x) * sin`; a part that is not rotated is joined to it.
    pub(crate) fn rotate(&mut self, x: Tensor, rotation: Rotation, tables: [Tensor; 2]) -> Tensor {
        let width = x.width.max(tables[0].width);
        let n = match rotation {
            Rotation::Halves => return self.rotate_halves(x, width, tables),
            Rotation::Whole | Rotation::WholeJoined => x.n,
            Rotation::Partial(part) => x.n * part,
        };
        let straight = self.plain(n, width);
        let half = self.plain(n / 2.0, x.width);
        let turned = self.plain(n, x.width);
        self.drop(half);
        let crossed = self.plain(n, width);
        self.drop(turned);
        let mut out = self.plain(n, width);
        self.drop(straight);
        self.drop(crossed);
        let joined = matches!(rotation, Rotation::WholeJoined | Rotation::Partial(_));
        if joined {
            let all = self.plain(x.n, width);
            self.drop(out);
            out = all;
        }
        let rule = Rule::Rotate { n: n * width, joined };
        out = self.link(out, rule, [x.node, NONE, NONE], &[tables[0], tables[1]]);
        out
    }

    fn rotate_halves(&mut self, x: Tensor, width: f64, tables: [Tensor; 2]) -> Tensor {
        let half = x.n / 2.0;
        let mut halves = [x; 2];
        for out in &mut halves {
            let a = self.plain(half, width);
            let b = self.plain(half, width);
            *out = self.plain(half, width);
            self.drop(a);
            self.drop(b);
        }
        let mut out = self.plain(x.n, width);
        self.drop(halves[0]);
        self.drop(halves[1]);
        out = self.link(out, Rule::RotateHalves(half * width), [x.node, NONE, NONE], &[tables[0], tables[1]]);
        out
    }

    /// A fused attention kernel on q, k, v: its result and the log-sum-exp of `sums` bytes.
    pub(crate) fn attention(&mut self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor {
        let mut repeated = [k, v];
        if kernel.repeats {
            for tensor in &mut repeated {
                *tensor = self.plain(q.n, tensor.width);
            }
        } else {
            self.hold(k);
            self.hold(v);
        }
        let bias = (kernel.bias > 0.0).then(|| self.plain(kernel.bias, 1.0));
        let mut out = self.plain(q.n, v.width);
        let sums = self.plain(kernel.sums, 1.0);
        let unrepeated = if kernel.spreads { k.bytes() } else { 0.0 };
        let each = |x: Tensor| if kernel.spreads { q.n * x.width } else { x.bytes() };
        let rule = Rule::Attention {
            gradients: [q.bytes(), each(k), each(v)],
            workspace: kernel.workspace,
            unrepeated,
        };
        let inputs = [q.node, k.node, v.node];
        match bias {
            Some(bias) => {
                out = self.link(out, rule, inputs, &[q, repeated[0], repeated[1], out, sums, bias]);
            }
            None => out = self.link(out, rule, inputs, &[q, repeated[0], repeated[1], out, sums]),
        }
        self.drop(sums);
        self.drop(repeated[0]);
        self.drop(repeated[1]);
        if let Some(bias) = bias {
            self.drop(bias);
        }
        out
    }

    /// Attention by plain products: every score is kept.
    ///
    /// `rows` is rows x heads x length, `scores` that times the length; `sinks` adds one column.
    pub(crate) fn eager(&mut self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor {
        let Scores { elements, rows, masked, sinks, capped, lifts, contiguous_query } = scores;
        let width = q.width;
        // K and V are repeated to all heads, or made contiguous for the products: a copy in either case.
        let repeated = [self.plain(q.n, k.width), self.plain(q.n, v.width)];
        let query = if contiguous_query { self.hold(q) } else { self.plain(q.n, width) };
        let products = self.plain(elements, width);
        let scaled = self.plain(elements, width);
        self.drop(products);
        let mut logits = scaled;
        let mut tanh = None;
        if capped {
            let divided = self.plain(elements, width);
            self.drop(logits);
            let squeezed = self.plain(elements, width);
            self.drop(divided);
            logits = self.plain(elements, width);
            tanh = Some(squeezed);
        }
        if masked {
            let added = self.plain(elements, width);
            self.drop(logits);
            logits = added;
        }
        let mut saved_probabilities = None;
        let mut extra = None;
        let probabilities;
        if sinks {
            let joined = self.plain(elements + rows, width);
            let maxima = self.plain(rows, width);
            let places = self.plain(rows, 8.0);
            let shifted = self.plain(elements + rows, width);
            self.drop(maxima);
            self.drop(joined);
            probabilities = self.plain(elements + rows, width);
            extra = Some((places, shifted));
            self.drop(logits);
        } else if lifts && width < 4.0 {
            let wide = self.plain(elements, 4.0);
            let softmax = self.plain(elements, 4.0);
            self.drop(wide);
            probabilities = self.plain(elements, width);
            saved_probabilities = Some(softmax);
            self.drop(logits);
        } else {
            probabilities = self.plain(elements, width);
            self.drop(logits);
        }
        let product = self.plain(q.n, width);
        let mut out = self.plain(q.n, width);
        self.drop(product);
        let rule = Rule::Eager {
            scores: elements * width,
            wide: if saved_probabilities.is_some() { elements * 4.0 } else { 0.0 },
            query: q.bytes(),
            key: if k.n < q.n { k.bytes() } else { 0.0 },
            sinks: if sinks { (elements + rows) * width } else { 0.0 },
            sums: rows * width,
            capped,
        };
        let inputs = [q.node, k.node, v.node];
        let mut saved = [query, repeated[0], repeated[1], probabilities, probabilities, probabilities];
        let mut count = 4;
        if let Some(softmax) = saved_probabilities {
            saved[count] = softmax;
            count += 1;
        }
        if let Some((places, _)) = extra {
            saved[count] = places;
            count += 1;
        }
        if let Some(tanh) = tanh {
            saved[count] = tanh;
            count += 1;
        }
        out = self.link(out, rule, inputs, &saved[..count]);
        for tensor in [query, repeated[0], repeated[1], probabilities]
            .into_iter()
            .chain(saved_probabilities)
            .chain(tanh)
        {
            self.drop(tensor);
        }
        if let Some((places, shifted)) = extra {
            self.drop(places);
            self.drop(shifted);
        }
        out
    }

    /// `x[index]`: `n` elements of it.
    pub(crate) fn index(&mut self, x: Tensor, n: f64, index: Tensor) -> Tensor {
        self.result(n, x.width, Rule::Scatter(x.bytes()), [x.node, NONE, NONE], &[index])
    }

    /// `x[:, -k:]`: a view whose gradient is as large as all of `x`.
    pub(crate) fn slice(&mut self, x: Tensor, n: f64) -> Tensor {
        let mut out = self.hold(x).view(n);
        out.node = NONE;
        out = self.link(out, Rule::New(x.bytes()), [x.node, NONE, NONE], &[]);
        out
    }

    /// Two halves of `x`, views of it, as one handle each; their gradients are joined.
    pub(crate) fn halves(&mut self, x: Tensor) -> [Tensor; 2] {
        let mut first = self.hold(x).view(x.n / 2.0);
        let mut second = self.hold(x).view(x.n / 2.0);
        let mut node = Tensor { node: NONE, ..x };
        node = self.link(node, Rule::Join(x.bytes()), [x.node, NONE, NONE], &[]);
        first.node = node.node;
        second.node = node.node;
        [first, second]
    }

    /// Three parts of one product as views; each gradient is as large as all of it, and they are summed.
    pub(crate) fn parts(&mut self, x: Tensor, sizes: [f64; 3]) -> [Tensor; 3] {
        sizes.map(|n| {
            let mut part = self.hold(x).view(n);
            part.node = NONE;
            part = self.link(part, Rule::New(x.bytes()), [x.node, NONE, NONE], &[]);
            part
        })
    }

    /// Experts' weights on sorted rows; `weight` elements in all.
    pub(crate) fn grouped(
        &mut self,
        x: Tensor,
        n: f64,
        parameter: Parameter,
        offsets: Option<Tensor>,
    ) -> Tensor {
        let leaf = self.leaf(parameter.trains);
        let weight = if parameter.trains { parameter.n * parameter.width } else { 0.0 };
        let rule = Rule::Grouped { weight, input: x.bytes() };
        let inputs = [leaf, x.node, NONE];
        let mut out = self.plain(n, x.width);
        match (parameter.trains, offsets) {
            (true, Some(offsets)) => out = self.link(out, rule, inputs, &[x, offsets]),
            (true, None) => out = self.link(out, rule, inputs, &[x]),
            (false, Some(offsets)) => out = self.link(out, rule, inputs, &[offsets]),
            (false, None) => out = self.link(out, rule, inputs, &[]),
        }
        out
    }

    /// The largest `k` of the scores in each row: values, and places of 8 bytes.
    pub(crate) fn top(&mut self, scores: Tensor, n: f64) -> [Tensor; 2] {
        let mut values = self.plain(n, scores.width);
        let places = self.plain(n, 8.0);
        values = self.link(values, Rule::Scores(scores.bytes()), [scores.node, NONE, NONE], &[places]);
        [values, places]
    }

    /// `values /= values.sum()`, in place.
    pub(crate) fn normalised(&mut self, values: Tensor, rows: f64) -> Tensor {
        let sum = self.plain(rows, values.width);
        let mut out = values;
        if self.recording && values.needs_gradient() {
            let copy = self.plain(values.n, values.width);
            let rule = Rule::Normalise { n: values.bytes(), sum: rows * values.width };
            out.node = NONE;
            out = self.link(out, rule, [values.node, NONE, NONE], &[sum, copy]);
            self.drop(copy);
        }
        self.drop(sum);
        out
    }

    /// The clamped gate of gpt-oss on a fused product: `(up + 1) * gate * sigmoid(1.702 * gate)`.
    pub(crate) fn clamped_gate(&mut self, fused: Tensor) -> Tensor {
        let n = fused.n / 2.0;
        let width = fused.width;
        let gate = self.plain(n, width);
        let up = self.plain(n, width);
        let scaled = self.plain(n, width);
        let sigmoid = self.plain(n, width);
        self.drop(scaled);
        let glu = self.plain(n, width);
        let raised = self.plain(n, width);
        let mut out = self.plain(n, width);
        out = self.link(
            out,
            Rule::ClampedGate(n * width),
            [fused.node, NONE, NONE],
            &[fused, gate, sigmoid, glu, raised],
        );
        for tensor in [raised, gate, up, glu] {
            self.drop(tensor);
        }
        self.drop(sigmoid);
        out
    }

    // -------------------------------------------------------------------------------------------------- backward

    /// Returns a mark: nodes made after it belong to what is differentiated next.
    pub(crate) fn mark(&self) -> usize {
        self.nodes.len()
    }

    /// Gives `gradient` to the node of `output`.
    pub(crate) fn seed(&mut self, output: Tensor, gradient: Tensor) {
        self.give(output.node, gradient.storage);
    }

    /// Replays the nodes down to `mark`.
    pub(crate) fn backward(&mut self, mark: usize) {
        while self.nodes.len() > mark {
            let Some(mut node) = self.nodes.pop() else { return };
            if node.gradient != NONE {
                self.step(&mut node);
            }
            for id in node.saved {
                if id != NONE {
                    self.release(id);
                }
            }
        }
    }

    /// Forgets the root of a graph; the gradient that has arrived there stays alive.
    pub(crate) fn forget_root(&mut self) {
        self.nodes.pop();
    }

    /// Hands one reference of `storage` to a node, or keeps it as the gradient of a parameter.
    fn give(&mut self, node: u32, storage: u32) {
        match node {
            NONE => self.release(storage),
            LEAF => self.keep(storage),
            TIED => self.waiting = Some(storage),
            index => {
                let node = &mut self.nodes[index as usize];
                let there = node.gradient;
                if there != NONE && matches!(node.rule, Rule::Join(_) | Rule::Rejoin { .. }) {
                    node.saved[0] = storage;
                    return;
                }
                self.nodes[index as usize].gradient = if there == NONE {
                    storage
                } else {
                    let bytes =
                        self.storages[storage as usize].bytes.max(self.storages[there as usize].bytes);
                    let sum = self.storage(bytes, Kind::Activation);
                    self.release(there);
                    self.release(storage);
                    sum
                };
            }
        }
    }

    /// The gradient of a parameter: kept, or added in place to the one of an earlier pass.
    fn keep(&mut self, storage: u32) {
        let bytes = self.storages[storage as usize].bytes;
        if self.accumulates {
            self.release(storage);
        } else {
            self.storages[storage as usize].kind = Kind::Gradient;
            self.live.gradients += bytes;
        }
    }

    fn new_gradient(&mut self, bytes: f64) -> u32 {
        self.storage(bytes, Kind::Activation)
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each rule, and each is a list of allocations")]
    fn step(&mut self, node: &mut Node) {
        let gradient = node.gradient;
        let [first, second, third] = node.inputs;
        match node.rule {
            Rule::Pass => {
                let targets = node.inputs;
                for target in targets {
                    if target != NONE {
                        let shared = self.retain(gradient);
                        self.give(target, shared);
                    }
                }
                self.release(gradient);
            }
            Rule::New(bytes) => {
                // What is made of vocabulary-wide gradients is vocabulary-wide.
                let kind = self.storages[gradient as usize].kind;
                let new = self.storage(bytes, kind);
                self.release(gradient);
                self.forget(node);
                self.give(first, new);
            }
            Rule::Power(bytes) => {
                let power = self.new_gradient(bytes);
                let scaled = self.new_gradient(bytes);
                let new = self.new_gradient(bytes);
                self.release(scaled);
                self.release(power);
                self.release(gradient);
                self.forget(node);
                self.give(first, new);
            }
            Rule::Scatter(bytes) => {
                let zeros = self.new_gradient(bytes);
                let new = self.new_gradient(bytes);
                self.release(zeros);
                self.release(gradient);
                self.forget(node);
                self.give(first, new);
            }
            Rule::Product { full, sums } => {
                let second_gradient = (second != NONE).then(|| self.new_gradient(full));
                let first_gradient = (first != NONE).then(|| self.new_gradient(full));
                let first_gradient = first_gradient.map(|id| self.summed(id, sums[0]));
                let second_gradient = second_gradient.map(|id| self.summed(id, sums[1]));
                self.release(gradient);
                self.forget(node);
                if let Some(id) = first_gradient {
                    self.give(first, id);
                }
                if let Some(id) = second_gradient {
                    self.give(second, id);
                }
            }
            Rule::Matrix { weight, input } => {
                let weight_gradient = (weight > 0.0).then(|| self.new_gradient(weight));
                let input_gradient = (input > 0.0).then(|| self.new_gradient(input));
                self.release(gradient);
                self.forget(node);
                if let Some(id) = input_gradient {
                    self.give(second, id);
                }
                if let Some(id) = weight_gradient {
                    self.give(first, id);
                }
            }
            Rule::Affine { weight, input, bias } => {
                let input_gradient = (input > 0.0).then(|| self.new_gradient(input));
                let weight_gradient = (weight > 0.0).then(|| self.new_gradient(weight));
                let bias_gradient = (bias > 0.0).then(|| self.new_gradient(bias));
                self.release(gradient);
                self.forget(node);
                if let Some(id) = bias_gradient {
                    self.give(first, id);
                }
                if let Some(id) = input_gradient {
                    self.give(second, id);
                }
                if let Some(id) = weight_gradient {
                    self.give(first, id);
                }
            }
            Rule::FourBit { scales, weight, input } => {
                let temporary = self.new_gradient(scales);
                let unpacked = self.new_gradient(weight);
                self.release(temporary);
                let new = self.new_gradient(input);
                self.release(unpacked);
                self.release(gradient);
                self.give(first, new);
            }
            Rule::Rotate { n, joined } => self.rotate_back(node, gradient, n, joined),
            Rule::RotateHalves(half) => {
                let products = [self.new_gradient(half), self.new_gradient(half)];
                let negative = self.new_gradient(half);
                let third_product = self.new_gradient(half);
                self.release(negative);
                let sum = self.new_gradient(half);
                self.release(products[1]);
                self.release(third_product);
                let fourth = self.new_gradient(half);
                self.release(gradient);
                let other = self.new_gradient(half);
                self.release(products[0]);
                self.release(fourth);
                let joined = self.new_gradient(2.0 * half);
                self.release(sum);
                self.release(other);
                self.forget(node);
                self.give(first, joined);
            }
            Rule::Attention { gradients, workspace, unrepeated } => {
                let mut new = gradients.map(|bytes| self.new_gradient(bytes));
                let work = workspace.map(|bytes| (bytes > 0.0).then(|| self.new_gradient(bytes)));
                for id in work.into_iter().flatten() {
                    self.release(id);
                }
                self.release(gradient);
                self.forget(node);
                if unrepeated > 0.0 {
                    for id in [2, 1] {
                        let sum = self.new_gradient(unrepeated);
                        self.release(new[id]);
                        new[id] = sum;
                    }
                }
                for (target, id) in [first, second, third].into_iter().zip(new) {
                    self.give(target, id);
                }
            }
            Rule::Eager { .. } => self.eager_back(node, gradient),
            Rule::Join(bytes) => {
                let new = self.new_gradient(bytes);
                self.release(gradient);
                self.forget(node);
                self.give(first, new);
            }
            Rule::Rejoin { all, part } => {
                let rest = self.new_gradient(all);
                self.release(gradient);
                if part < all {
                    let own = self.new_gradient(all);
                    self.forget(node);
                    let sum = self.new_gradient(all);
                    self.release(rest);
                    self.release(own);
                    self.give(first, sum);
                } else {
                    let sum = self.new_gradient(all);
                    self.release(rest);
                    self.forget(node);
                    self.give(first, sum);
                }
            }
            Rule::ClampedGate(half) => {
                let raised = self.new_gradient(half);
                let glu = self.new_gradient(half);
                self.release(gradient);
                self.release_saved(node, 4);
                self.release_saved(node, 3);
                let sigmoid = self.new_gradient(half);
                let gate = self.new_gradient(half);
                self.release(raised);
                self.release_saved(node, 1);
                let scaled = self.new_gradient(half);
                self.release(sigmoid);
                self.release_saved(node, 2);
                let product = self.new_gradient(half);
                self.release(scaled);
                let sum = self.new_gradient(half);
                self.release(gate);
                self.release(product);
                let masks = [self.new_gradient(half / 2.0), self.new_gradient(half / 2.0)];
                let up = self.new_gradient(half);
                for id in masks {
                    self.release(id);
                }
                self.release(glu);
                let mask = self.new_gradient(half / 2.0);
                let clamped = self.new_gradient(half);
                self.release(mask);
                self.release(sum);
                self.forget(node);
                let wide = self.new_gradient(2.0 * half);
                self.release(up);
                let other = self.new_gradient(2.0 * half);
                self.release(clamped);
                let new = self.new_gradient(2.0 * half);
                self.release(wide);
                self.release(other);
                self.give(first, new);
            }
            Rule::Grouped { weight, input } => {
                let weight_gradient = (weight > 0.0).then(|| self.new_gradient(weight));
                let new = self.new_gradient(input);
                self.release(gradient);
                self.forget(node);
                if let Some(id) = weight_gradient {
                    self.give(first, id);
                }
                self.give(second, new);
            }
            Rule::Made => {
                self.release(gradient);
                let [weight, input, ..] = node.saved;
                node.saved = [NONE; 6];
                if first == NONE {
                    self.release(weight);
                } else {
                    self.give(first, weight);
                }
                self.give(second, input);
            }
            Rule::Normalise { n, sum } => {
                let work = [self.new_gradient(n), self.new_gradient(n), self.new_gradient(n)];
                let sums = self.new_gradient(n);
                for id in work {
                    self.release(id);
                }
                let new = self.new_gradient(n);
                let small = self.new_gradient(sum);
                self.release(sums);
                self.release(gradient);
                self.forget(node);
                let both = self.new_gradient(n);
                self.release(new);
                self.release(small);
                self.give(first, both);
            }
            Rule::Scores(bytes) => {
                let zeros = self.new_gradient(bytes);
                let new = self.new_gradient(bytes);
                self.release(zeros);
                self.release(gradient);
                self.forget(node);
                self.give(first, new);
            }
        }
    }

    fn forget(&mut self, node: &mut Node) {
        for id in &mut node.saved {
            if *id != NONE {
                let id = std::mem::replace(id, NONE);
                self.release(id);
            }
        }
    }

    fn summed(&mut self, id: u32, to: f64) -> u32 {
        if to == 0.0 {
            return id;
        }
        let sum = self.new_gradient(to);
        self.release(id);
        sum
    }

    fn rotate_back(&mut self, node: &mut Node, gradient: u32, n: f64, joined: bool) {
        if joined {
            let shared = self.retain(gradient);
            self.give(node.inputs[0], shared);
        }
        let crossed = self.new_gradient(n);
        let negative = self.new_gradient(n / 2.0);
        let left = self.new_gradient(n);
        self.release(negative);
        let right = self.new_gradient(n);
        self.release(crossed);
        let turned = self.new_gradient(n);
        self.release(left);
        self.release(right);
        let straight = self.new_gradient(n);
        self.release(gradient);
        let new = self.new_gradient(n);
        self.release(turned);
        self.release(straight);
        self.forget(node);
        self.give(node.inputs[0], new);
    }

    fn eager_back(&mut self, node: &mut Node, gradient: u32) {
        let Rule::Eager { scores, wide, query, key, sinks, sums, capped } = node.rule else { return };
        // The result was made contiguous.
        let copied = self.new_gradient(query);
        self.release(gradient);
        let mut value = self.new_gradient(query);
        let mut product = self.new_gradient(scores);
        self.release(copied);
        self.release_saved(node, 2);
        if wide > 0.0 {
            self.release_saved(node, 3);
            let lifted = self.new_gradient(wide);
            self.release(product);
            let back = self.new_gradient(wide);
            self.release(lifted);
            self.release_saved(node, 4);
            product = self.new_gradient(scores);
            self.release(back);
        } else if sinks > 0.0 {
            let padded = self.new_gradient(sinks);
            self.release(product);
            let back = self.new_gradient(sinks);
            self.release(padded);
            self.release_saved(node, 3);
            let negative = self.new_gradient(sinks);
            let small = self.new_gradient(sums);
            self.release(negative);
            let zeros = self.new_gradient(sinks);
            let scattered = self.new_gradient(sinks);
            self.release(zeros);
            self.release(small);
            self.release_saved(node, 4);
            let sum = self.new_gradient(sinks);
            self.release(back);
            self.release(scattered);
            product = sum;
        } else {
            let back = self.new_gradient(scores);
            self.release(product);
            self.release_saved(node, 3);
            product = back;
        }
        if capped {
            // Back through the product with the cap, tanh, and the division by the cap.
            for _ in 0..3 {
                let next = self.new_gradient(scores);
                self.release(product);
                product = next;
            }
        }
        let scaled = self.new_gradient(scores);
        self.release(product);
        let mut key_gradient = self.new_gradient(query);
        let query_gradient = self.new_gradient(query);
        self.release(scaled);
        self.forget(node);
        if key > 0.0 {
            for id in [&mut value, &mut key_gradient] {
                let sum = self.storage(key, Kind::Activation);
                let old = std::mem::replace(id, sum);
                self.release(old);
            }
        }
        let [first, second, third] = node.inputs;
        self.give(first, query_gradient);
        self.give(second, key_gradient);
        self.give(third, value);
    }

    fn release_saved(&mut self, node: &mut Node, index: usize) {
        if let Some(id) = node.saved.get_mut(index).filter(|id| **id != NONE) {
            let id = std::mem::replace(id, NONE);
            self.release(id);
        }
    }
}

/// What an operation with one input keeps for its backward formula.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Saved {
    /// Nothing.
    Nothing,
    /// Its input (silu, gelu).
    Input,
    /// Its result (tanh, sigmoid, softmax).
    Output,
}

/// A parameter: elements, bytes of one, and whether it trains.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Parameter {
    /// Elements.
    pub n: f64,
    /// Bytes of an element.
    pub width: f64,
    /// It gets a gradient.
    pub trains: bool,
}

/// The weight of a matrix product.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Weight {
    /// Inputs.
    pub input: f64,
    /// Outputs.
    pub output: f64,
    /// Bytes of an element as the product sees it.
    pub width: f64,
    /// It gets a gradient.
    pub trains: bool,
    /// Autocast's copy, when the product sees one.
    pub copy: Option<Tensor>,
    /// A bias is added.
    pub bias: bool,
}

/// How positions are written into q and k.
#[derive(Copy, Clone, Debug, PartialEq)]
pub(crate) enum Rotation {
    /// All of a head, by halves.
    Whole,
    /// The same, joined to a rest that is empty (Phi-3).
    WholeJoined,
    /// This share of a head (GLM).
    Partial(f64),
    /// Both halves apart (gpt-oss).
    Halves,
}

/// What a fused attention kernel takes beside q, k, v and its result.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Kernel {
    /// Log-sum-exp, bytes.
    pub sums: f64,
    /// Mask in the type of q, bytes; 0 without.
    pub bias: f64,
    /// K and V are copied out to all heads.
    pub repeats: bool,
    /// K and V are spread to all heads by a copy or a view, and their gradients summed.
    pub spreads: bool,
    /// Buffers of the backward pass, bytes.
    pub workspace: [f64; 5],
}

/// Scores of eager attention.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Scores {
    /// Scores: rows x heads x length x length.
    pub elements: f64,
    /// Rows x heads x length.
    pub rows: f64,
    /// A mask is added.
    pub masked: bool,
    /// A learned sink is joined to each row.
    pub sinks: bool,
    /// Scores are squeezed through tanh (Gemma 2).
    pub capped: bool,
    /// The softmax is computed in fp32.
    pub lifts: bool,
    /// q needs no copy for the product.
    pub contiguous_query: bool,
}
