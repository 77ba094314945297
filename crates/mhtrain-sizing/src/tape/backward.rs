//! What does the backward formula of each operation take, and when does it let go?
//!
//! [`Rule`] names the formulas; [`Tape::backward`] replays the nodes from the last to the first, each as the list of the
//! temporaries of its formula.

use super::{Kind, LEAF, NONE, Node, TIED, Tape, Tensor};

/// What one node does in the backward pass; sizes in bytes.
#[derive(Copy, Clone, Debug)]
pub(super) enum Rule {
    /// The gradient goes on as it is: sums, views.
    Pass,
    /// A new gradient of this size replaces the incoming one (casts, activations, dropout, clones, means).
    New(f64),
    /// As [`Rule::New`], with this many temporaries of the same size alive beside it (`pow`, `rsqrt`).
    Power(f64),
    /// An indexed tensor, or the chosen scores of all: `zeros` and the result, both of this size.
    Scatter(f64),
    /// A product of two tensors: the full size, and to what each gradient is then summed or cast (0: neither).
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
    /// Eager attention: scores, fp32 softmax (0: none), queries, values of all heads, keys before they were repeated (0: not), scores with
    /// sinks (0: none), one number for each row of scores.
    Eager { scores: f64, wide: f64, query: f64, value: f64, key: f64, sinks: f64, sums: f64, capped: bool },
    /// Parts come together: size of all.
    Join(f64),
    /// Clamped and scaled gate of gpt-oss: size of one half.
    ClampedGate(f64),
    /// Experts' weights: gradient of the weight (0: frozen), gradient of the input.
    Grouped { weight: f64, input: f64 },
    /// Gradients that were made in the forward pass: of the weight and of the input.
    Made,
    /// A product whose gradient is made in a wider type and cast back.
    Narrow { wide: f64, narrow: f64 },
    /// A difference: the gradient goes on to the first, and negated to the second (`full`; 0: nobody asks), summed to `sum` (0: not
    /// summed).
    Difference { full: f64, sum: f64 },
    /// torch's layer norm, a convolution: gradients of the input, the weight and the bias (0: none).
    LayerNorm { input: f64, weight: f64, bias: f64 },
    /// Parts of a tensor are joined to it again: its size.
    Gather(f64),
    /// A tensor that was joined of what the nodes from `first` to `last` made, each of which gets its part.
    Spread { first: u32, last: u32 },
    /// The smaller of a tensor and a number: size of the gradient.
    Least(f64),
    /// A choice of two tensors: size of either gradient.
    Where(f64),
    /// One expert of `sparsemixer`: sizes of all scores and of the chosen ones.
    Mixer { scores: f64, chosen: f64 },
    /// A product with a table of complex numbers, of which the way back takes a copy: its size and that of the gradient.
    Conjugate { table: f64, new: f64 },
    /// A tensor times itself: its size.
    OwnProduct(f64),
    /// A sum: the gradient goes on to the first, and to the second cast to this size (0: as it is).
    Sum(f64),
    /// Differences of all pairs: size of all, and to what either gradient is summed (0: it is not).
    Pairs { full: f64, sums: [f64; 2] },
    /// A product of two activations: their gradients (0: none), the second comes first.
    Pair { first: f64, second: f64 },
    /// A triangular system that is solved: gradients of the system (0: none) and of the right side.
    Solve { system: f64, right: f64 },
    /// A part that was written over in place: sizes of all, of the part, and of what was written where that is narrower
    /// (0: it is not).
    Written { all: f64, part: f64, narrow: f64 },
    /// Weights of the routes are made to sum to one.
    Normalise { n: f64, sum: f64 },
}

impl Tape {
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

    /// Forgets what was made since a mark, and what was kept for it: nothing that lives on came of it.
    pub(crate) fn forget_since(&mut self, mark: usize) {
        while self.nodes.len() > mark {
            let Some(mut node) = self.nodes.pop() else { return };
            self.forget(&mut node);
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
                    if let Some(free) = node.saved.iter_mut().find(|slot| **slot == NONE) {
                        *free = storage;
                    }
                    return;
                }
                if there != NONE && matches!(node.rule, Rule::Gather(_)) {
                    // Parts stay apart until all are there.
                    let bytes = std::mem::take(&mut self.storages[storage as usize].bytes);
                    self.storages[there as usize].bytes += bytes;
                    self.release(storage);
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
                self.replace(node, new);
            }
            Rule::Power(bytes) => {
                let power = self.new_gradient(bytes);
                let scaled = self.new_gradient(bytes);
                let new = self.new_gradient(bytes);
                self.release(scaled);
                self.release(power);
                self.replace(node, new);
            }
            Rule::Scatter(bytes) => {
                let zeros = self.new_gradient(bytes);
                let new = self.new_gradient(bytes);
                self.release(zeros);
                self.replace(node, new);
            }
            Rule::Product { full, sums } => {
                let second_gradient = (second != NONE).then(|| self.new_gradient(full));
                let first_gradient = (first != NONE).then(|| self.new_gradient(full));
                let first_gradient = first_gradient.map(|id| self.summed(id, sums[0]));
                let second_gradient = second_gradient.map(|id| self.summed(id, sums[1]));
                self.release(gradient);
                self.forget(node);
                self.give_some(first, first_gradient);
                self.give_some(second, second_gradient);
            }
            Rule::Matrix { weight, input } => {
                let weight_gradient = self.gradient_if(weight);
                let input_gradient = self.gradient_if(input);
                self.release(gradient);
                self.forget(node);
                self.give_some(second, input_gradient);
                self.give_some(first, weight_gradient);
            }
            Rule::Affine { weight, input, bias } => {
                let input_gradient = self.gradient_if(input);
                let weight_gradient = self.gradient_if(weight);
                let bias_gradient = self.gradient_if(bias);
                self.release(gradient);
                self.forget(node);
                self.give_some(first, bias_gradient);
                self.give_some(second, input_gradient);
                self.give_some(first, weight_gradient);
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
                let work = workspace.map(|bytes| self.gradient_if(bytes));
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
                self.replace(node, new);
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
                let weight_gradient = self.gradient_if(weight);
                let new = self.new_gradient(input);
                self.release(gradient);
                self.forget(node);
                self.give_some(first, weight_gradient);
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
            Rule::Narrow { wide, narrow } => {
                let product = self.new_gradient(wide);
                self.release(gradient);
                let new = self.new_gradient(narrow);
                self.release(product);
                self.forget(node);
                self.give(first, new);
            }
            Rule::Conjugate { table, new } => {
                let copy = self.new_gradient(table);
                let new = self.new_gradient(new);
                self.release(copy);
                self.replace(node, new);
            }
            Rule::OwnProduct(bytes) => {
                let second = self.new_gradient(bytes);
                let new = self.new_gradient(bytes);
                self.release(gradient);
                self.forget(node);
                // Both are alive until both have been added.
                self.retain(second);
                self.give(first, second);
                self.give(first, new);
                self.release(second);
            }
            Rule::Sum(narrow) => {
                let cast = self.gradient_if(narrow);
                let other = cast.unwrap_or_else(|| self.retain(gradient));
                self.give(first, gradient);
                self.give(second, other);
            }
            Rule::Pairs { full, sums } => {
                let negative = self.new_gradient(full);
                let new = [1, 0].map(|index: usize| match (index, sums[index]) {
                    (1, 0.0) => self.retain(negative),
                    (_, 0.0) => self.retain(gradient),
                    (_, bytes) => self.new_gradient(bytes),
                });
                self.release(negative);
                self.release(gradient);
                self.give(first, new[1]);
                self.give(second, new[0]);
            }
            Rule::Pair { first: bytes, second: other } => {
                let second_gradient = self.gradient_if(other);
                let first_gradient = self.gradient_if(bytes);
                self.release(gradient);
                self.forget(node);
                self.give_some(first, first_gradient);
                self.give_some(second, second_gradient);
            }
            Rule::Solve { system, right } => {
                let new = self.new_gradient(right);
                let mut lower = self.gradient_if(system);
                for _ in 0..2 {
                    lower = lower.map(|old| {
                        let next = self.new_gradient(system);
                        self.release(old);
                        next
                    });
                }
                self.release(gradient);
                self.forget(node);
                self.give_some(first, lower);
                self.give(second, new);
            }
            Rule::Written { all, part, narrow } => {
                let rest = self.new_gradient(all);
                let mut own = self.new_gradient(part);
                // Those take the place of the part in the gradient of all, if anyone asks for that.
                let zeros = (first != NONE).then(|| self.new_gradient(part));
                if narrow > 0.0 {
                    let cast = self.new_gradient(narrow);
                    self.release(own);
                    own = cast;
                }
                zeros.into_iter().for_each(|id| self.release(id));
                self.release(gradient);
                self.give(first, rest);
                self.give(second, own);
            }
            Rule::Difference { full: 0.0, .. } => self.give(first, gradient),
            Rule::Difference { full, sum } => {
                let negative = self.new_gradient(full);
                let second_gradient = self.summed(negative, sum);
                self.give(first, gradient);
                self.give(second, second_gradient);
            }
            Rule::LayerNorm { input, weight, bias } => {
                let new = [input, weight, bias].map(|bytes| self.gradient_if(bytes));
                self.release(gradient);
                self.forget(node);
                for (target, id) in [first, second, third].into_iter().zip(new) {
                    self.give_some(target, id);
                }
            }
            Rule::Gather(bytes) => {
                let new = self.new_gradient(bytes);
                self.replace(node, new);
            }
            Rule::Spread { first, last } => {
                for target in first..=last {
                    if matches!(self.nodes[target as usize].rule, Rule::LayerNorm { .. }) {
                        let shared = self.retain(gradient);
                        self.give(target, shared);
                    }
                }
                self.release(gradient);
            }
            Rule::Least(bytes) => {
                let new = self.new_gradient(bytes);
                self.replace(node, new);
            }
            Rule::Where(bytes) => {
                let new = [self.new_gradient(bytes), self.new_gradient(bytes)];
                self.release(gradient);
                self.forget(node);
                self.give(first, new[0]);
                self.give(second, new[1]);
            }
            Rule::Mixer { scores, chosen } => {
                let small = [self.new_gradient(chosen), self.new_gradient(chosen)];
                let new = self.new_gradient(scores);
                for id in small {
                    self.release(id);
                }
                self.replace(node, new);
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
        }
    }

    /// Ends a rule with one result: the incoming gradient goes, then what was saved, and the new one is handed on.
    fn replace(&mut self, node: &mut Node, new: u32) {
        self.release(node.gradient);
        self.forget(node);
        self.give(node.inputs[0], new);
    }

    /// Makes a gradient; `None` where its size says that there is none.
    fn gradient_if(&mut self, bytes: f64) -> Option<u32> {
        (bytes > 0.0).then(|| self.new_gradient(bytes))
    }

    fn give_some(&mut self, target: u32, gradient: Option<u32>) {
        if let Some(id) = gradient {
            self.give(target, id);
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
        let Rule::Eager { scores, wide, query, value: values, key, sinks, sums, capped } = node.rule else {
            return;
        };
        // The result was made contiguous.
        let copied = self.new_gradient(values);
        self.release(gradient);
        let mut value = self.new_gradient(values);
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
}
