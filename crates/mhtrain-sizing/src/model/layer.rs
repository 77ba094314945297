//! What is one layer of a model, where its layers are not all alike?

use super::{ModelShape, Unrotated};

/// What one block is beside its dimensions.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Attention looks back a window only.
    pub sliding: bool,
    /// The MLP is dense, whatever the other blocks have.
    pub dense: bool,
    /// Positions are written into query and key.
    pub rotated: bool,
    /// Whose keys and values it attends to.
    pub keys: Keys,
    /// What brings tokens together.
    pub mixer: Mixer,
}

/// What brings the tokens of a row together in one layer.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mixer {
    /// Attention.
    Attention,
    /// A short convolution (LFM2).
    Convolution,
    /// A gated delta rule (Qwen3.5, Qwen3-Next).
    DeltaNet,
}

/// Whose keys and values a layer attends to (Gemma 4).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    /// Its own.
    Own,
    /// Its own, which are kept for later layers: the last of either sort that has its own, whether there are such or not.
    Stored,
    /// Those of an earlier layer; it makes none.
    Shared,
}

/// Heads of one layer; widths in elements of a token.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heads {
    /// Query heads.
    pub queries: u64,
    /// Key and value heads.
    pub keys: u64,
    /// Width of one head.
    pub width: u64,
}

impl ModelShape {
    /// Returns the layers in their order.
    pub(crate) fn layer_list(&self) -> impl DoubleEndedIterator<Item = Layer> + '_ {
        let dense = |index| {
            self.experts.as_ref().is_none_or(|experts| experts.dense_layers.binary_search(&index).is_ok())
        };
        let own = self.layers.saturating_sub(self.gemma4.as_ref().map_or(0, |gemma4| gemma4.sharing));
        let stored = [false, true].map(|sliding| (0..own).rev().find(|index| self.slides(*index) == sliding));
        (0..self.layers).map(move |index| {
            let sliding = self.slides(index);
            let rotated = match self.style.unrotated {
                Unrotated::None => true,
                Unrotated::Every(every) => !is_each(every, index),
                Unrotated::Full => sliding,
            };
            let keys = if index >= own {
                Keys::Shared
            } else if self.gemma4.is_some() && stored.contains(&Some(index)) {
                Keys::Stored
            } else {
                Keys::Own
            };
            let mixer = match (self.convolution, &self.delta_net) {
                _ if self.is_listed_as_full(index) => Mixer::Attention,
                (Some(_), _) => Mixer::Convolution,
                (None, Some(_)) => Mixer::DeltaNet,
                (None, None) => Mixer::Attention,
            };
            Layer { sliding, dense: dense(index), rotated, keys, mixer }
        })
    }

    /// Returns the kinds of layers, each once, and how many there are of each.
    pub(crate) fn layer_kinds(&self) -> Vec<(Layer, u64)> {
        kinds_of(self.layer_list())
    }

    /// Returns the heads of a layer: those of Gemma 4 that do not slide are others.
    pub(crate) fn heads_of(&self, layer: Layer) -> Heads {
        let (keys, width) = match &self.gemma4 {
            Some(gemma4) if !layer.sliding => (gemma4.full_kv_heads, gemma4.full_head_dim),
            Some(_) | None => (self.kv_heads, self.head_dim),
        };
        Heads { queries: self.heads, keys, width }
    }

    /// Returns how many layers have attention.
    pub(crate) fn attention_layers(&self) -> u64 {
        // Where something else is in the place of attention, the layers that have it are listed.
        let listed =
            self.full_layers.as_ref().filter(|_| self.convolution.is_some() || self.delta_net.is_some());
        listed.map_or(self.layers, |full| u64::try_from(full.len()).unwrap_or(self.layers))
    }

    fn is_listed_as_full(&self, index: u64) -> bool {
        self.full_layers.as_ref().is_some_and(|full| full.binary_search(&index).is_ok())
    }

    fn slides(&self, index: u64) -> bool {
        match &self.full_layers {
            Some(_) => self.window.is_some() && !self.is_listed_as_full(index),
            None => self.window.is_some() && !is_each(self.full_every, index),
        }
    }
}

/// Returns the kinds of layers in the order of their first, and how many there are of each.
pub(crate) fn kinds_of(layers: impl Iterator<Item = Layer>) -> Vec<(Layer, u64)> {
    let mut kinds: Vec<(Layer, u64)> = Vec::with_capacity(4);
    for layer in layers {
        match kinds.iter_mut().find(|(of, _)| *of == layer) {
            Some((_, count)) => *count += 1,
            None => kinds.push((layer, 1)),
        }
    }
    kinds
}

/// Returns whether the layer of that index is one of each `every`.
pub(super) fn is_each(every: u64, index: u64) -> bool {
    every != 0 && (index + 1).is_multiple_of(every)
}
