//! What have Qwen3.5 and Qwen3-Next in the place of attention?
//!
//! Source: `configuration_qwen3_5.py`, `configuration_qwen3_next.py` and the `*GatedDeltaNet` of their `modeling_*.py` in
//! transformers 5.19.

use serde_json::Value;

use super::{Fields, HEADS_MAX, HIDDEN_MAX, LAYERS_MAX, ShapeError, is_each};

/// A gated delta rule.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct DeltaNet {
    /// Heads of query and key.
    pub key_heads: u64,
    /// Heads of the value, a multiple of those.
    pub value_heads: u64,
    /// Width of a head of query and key.
    pub key_width: u64,
    /// Width of a head of the value.
    pub value_width: u64,
    /// Tokens that the convolution before it sees.
    pub kernel: u64,
    /// Query, key, value and output gate come out of one product head by head, and so do step and decay (Qwen3-Next).
    pub fused: bool,
}

impl DeltaNet {
    /// Reads it, with the defaults of the class, and the layers that have attention.
    pub(super) fn read(
        fields: &Fields<'_>,
        layers: u64,
        fused: bool,
    ) -> Result<(DeltaNet, Vec<u64>), ShapeError> {
        let delta_net = DeltaNet {
            key_heads: fields.number(&["linear_num_key_heads"], HEADS_MAX)?.unwrap_or(16),
            value_heads: fields.number(&["linear_num_value_heads"], HEADS_MAX)?.unwrap_or(32),
            key_width: fields.number(&["linear_key_head_dim"], HIDDEN_MAX)?.unwrap_or(128),
            value_width: fields.number(&["linear_value_head_dim"], HIDDEN_MAX)?.unwrap_or(128),
            kernel: fields.number(&["linear_conv_kernel_dim"], LAYERS_MAX)?.unwrap_or(4),
            fused,
        };
        if !delta_net.value_heads.is_multiple_of(delta_net.key_heads) {
            return Err(ShapeError::Unusable {
                key: "linear_num_key_heads".to_owned(),
                found: delta_net.key_heads.to_string(),
                expected: format!("a divisor of the {} heads of the value", delta_net.value_heads),
            });
        }
        let every = fields.number(&["full_attention_interval"], LAYERS_MAX)?.unwrap_or(4);
        let is_full =
            |index: &u64| fields.is_listed_as_full(*index).unwrap_or_else(|| is_each(every, *index));
        Ok((delta_net, (0..layers).filter(is_full).collect()))
    }

    /// Returns whether `layer_types`, where it is stated, says of every layer that it has attention or a delta rule.
    pub(super) fn has_usual_layers(fields: &Fields<'_>, layers: u64) -> bool {
        let Some(types) = fields.layer_types() else { return true };
        let is_usual = |of: &Value| of == "full_attention" || of == "linear_attention";
        u64::try_from(types.len()) == Ok(layers) && types.iter().all(is_usual)
    }

    /// Returns the width of all heads of query, and of key.
    pub fn keys(&self) -> u64 {
        self.key_heads.saturating_mul(self.key_width)
    }

    /// Returns the width of all heads of the value.
    pub fn values(&self) -> u64 {
        self.value_heads.saturating_mul(self.value_width)
    }

    /// Returns the width of query, key and value together.
    pub fn all(&self) -> u64 {
        self.keys().saturating_mul(2).saturating_add(self.values())
    }

    /// Returns its parameters beside linear modules: elements of one, and how many there are in a layer. The convolution,
    /// the norm of the output, decays and their biases.
    pub(super) fn parameters(&self) -> [(u64, u64); 3] {
        [(self.all().saturating_mul(self.kernel), 1), (self.value_width, 1), (self.value_heads, 2)]
    }
}
