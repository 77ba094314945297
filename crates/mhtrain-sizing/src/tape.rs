//! What is alive at every moment of a forward and a backward pass?
//!
//! A tape plays the part of torch's allocator and of autograd: every tensor is a size, every operation takes a new one,
//! and every operation that is differentiated leaves a node that keeps what its backward formula needs. The backward
//! pass replays the nodes from the last to the first with the temporaries of those formulas. Nothing is computed but
//! sums of bytes. What each operation takes and keeps is in `operations.rs`, what its formula takes on the way back in
//! `backward.rs`; here is the allocator, and the graph.
//!
//! Source of each list: the temporaries and the order of frees were recorded with `tests/record_blocks.py` (torch 2.15,
//! transformers 5.19, peft 0.20, fake tensors), one line for each allocation with the operation that made it; the formulas are
//! those of `derivatives.yaml`, the order of frees that of `torch/csrc/autograd/engine.cpp` (the gradient goes when the
//! formula returns, what was saved goes after it, gradients that meet are summed into a new tensor).

mod backward;
mod operations;

use backward::Rule;
pub(crate) use operations::{Kernel, Parameter, Rotation, Saved, Scores, Weight};

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

    /// Returns where its gradient goes; `None` when it needs none.
    pub(crate) fn node_if(&self) -> Option<u32> {
        Some(self.node).filter(|node| *node != NONE)
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

impl High {
    /// Counts what comes, or with a negative size what goes.
    fn count(&mut self, kind: Kind, bytes: f64) {
        self.sum += bytes;
        match kind {
            Kind::Activation => {}
            Kind::Logits => self.logits += bytes,
            Kind::Gradient => self.gradients += bytes,
        }
    }
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
        self.live.count(kind, bytes);
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
            self.live.count(kind, -bytes);
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
        let node = self.node(Rule::Pass, [NONE; 3], []);
        Tensor { node, ..tensor }
    }

    fn node(&mut self, rule: Rule, inputs: [u32; 3], saved: impl IntoIterator<Item = Tensor>) -> u32 {
        let mut ids = [NONE; 6];
        for (id, tensor) in ids.iter_mut().zip(saved) {
            *id = self.retain(tensor.storage);
        }
        self.nodes.push(Node { rule, inputs, saved: ids, gradient: NONE });
        u32::try_from(self.nodes.len() - 1).unwrap_or(NONE)
    }

    /// Makes the result of an operation. `saved` is kept when any of the inputs needs a gradient.
    fn result(
        &mut self,
        n: f64,
        width: f64,
        rule: Rule,
        inputs: [u32; 3],
        saved: impl IntoIterator<Item = Tensor>,
    ) -> Tensor {
        let mut out = self.plain(n, width);
        out = self.link(out, rule, inputs, saved);
        out
    }

    fn link(
        &mut self,
        out: Tensor,
        rule: Rule,
        inputs: [u32; 3],
        saved: impl IntoIterator<Item = Tensor>,
    ) -> Tensor {
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

    /// Leaves autocast: its cached copies go.
    pub(crate) fn leave_autocast(&mut self) {
        for id in std::mem::take(&mut self.cached) {
            self.release(id);
        }
    }
}
