//! What has Gemma 4 beyond Gemma 3?
//!
//! Source: `configuration_gemma4.py` and `modeling_gemma4.py` of transformers 5.19 (`Gemma4TextConfig`).

use super::{Fields, HEADS_MAX, HIDDEN_MAX, LAYERS_MAX, ShapeError, VOCAB_MAX, is_each};

/// Dimensions of Gemma 4 that other kinds do not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gemma4 {
    /// Width of one head in layers that do not slide.
    pub full_head_dim: u64,
    /// Key and value heads of layers that do not slide.
    pub full_kv_heads: u64,
    /// Values of those layers are what the key product makes: they have no product of their own.
    pub value_is_key: bool,
    /// Last layers that take keys and values from an earlier layer of their sort.
    pub sharing: u64,
    /// The MLP of those is twice as wide.
    pub double_wide: bool,
    /// P, width of what each layer gets of the tokens beside the residual stream; 0 when it gets nothing.
    pub inputs: u64,
    /// Rows of the table that this is looked up in; it has P columns for each layer.
    pub inputs_vocab: u64,
}

impl Gemma4 {
    /// Reads them, with the defaults of the class, and the layers that do not slide.
    pub(super) fn read(
        fields: &Fields<'_>,
        layers: u64,
        kv_heads: u64,
    ) -> Result<(Gemma4, Vec<u64>), ShapeError> {
        let value_is_key = fields.flag("attention_k_eq_v")?.unwrap_or(false);
        let stated_kv_heads = fields.number(&["num_global_key_value_heads"], HEADS_MAX)?;
        let gemma4 = Gemma4 {
            full_head_dim: fields.number(&["global_head_dim"], HIDDEN_MAX)?.unwrap_or(512),
            full_kv_heads: stated_kv_heads.filter(|_| value_is_key).unwrap_or(kv_heads),
            value_is_key,
            sharing: fields.count("num_kv_shared_layers", layers)?.unwrap_or(0),
            double_wide: fields.flag("use_double_wide_mlp")?.unwrap_or(false),
            inputs: fields.count("hidden_size_per_layer_input", HIDDEN_MAX)?.unwrap_or(256),
            inputs_vocab: fields.number(&["vocab_size_per_layer_input"], VOCAB_MAX)?.unwrap_or(262_144),
        };
        // The last layer never slides, whatever the list says.
        let is_full = |index: &u64| {
            index + 1 == layers || fields.is_listed_as_full(*index).unwrap_or_else(|| is_each(6, *index))
        };
        Ok((gemma4, (0..layers.min(LAYERS_MAX)).filter(is_full).collect()))
    }
}
