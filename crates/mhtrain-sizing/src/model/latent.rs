//! What has latent attention (DeepSeek V2 and V3, GLM-4.7-Flash)?
//!
//! Source: `configuration_deepseek_v2.py`, `configuration_deepseek_v3.py` and `configuration_glm4_moe_lite.py` of
//! transformers 5.19.

use super::{Fields, HIDDEN_MAX, ShapeError};

/// Widths of attention whose keys and values come out of a narrow product; in elements of a token.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Latent {
    /// What queries come out of; `None` when they come out of the stream.
    pub query_rank: Option<u64>,
    /// What keys and values come out of.
    pub rank: u64,
    /// The part of a head that has no positions.
    pub plain: u64,
    /// The part that has; the key's is the same for all heads.
    pub rotated: u64,
    /// Head of the value.
    pub value: u64,
}

impl Latent {
    /// Reads it, with the defaults of the class.
    pub(super) fn read(fields: &Fields<'_>, model_type: &str) -> Result<Latent, ShapeError> {
        let lite = model_type == "glm4_moe_lite";
        let default_rank = if lite { 768 } else { 1536 };
        let query_rank = match fields.number(&["q_lora_rank"], HIDDEN_MAX)? {
            // null switches it off.
            None if fields.object.contains_key("q_lora_rank") => None,
            stated => Some(stated.unwrap_or(default_rank)),
        };
        Ok(Latent {
            query_rank,
            rank: fields.number(&["kv_lora_rank"], HIDDEN_MAX)?.unwrap_or(512),
            plain: fields.number(&["qk_nope_head_dim"], HIDDEN_MAX)?.unwrap_or(if lite { 192 } else { 128 }),
            rotated: fields.number(&["qk_rope_head_dim"], HIDDEN_MAX)?.unwrap_or(64),
            value: fields.number(&["v_head_dim"], HIDDEN_MAX)?.unwrap_or(if lite { 256 } else { 128 }),
        })
    }

    /// Returns the width of a head of query and key.
    pub fn head(&self) -> u64 {
        self.plain.saturating_add(self.rotated)
    }
}
