//! What has LFM2 in the place of attention, and how wide is its MLP?
//!
//! Source: `configuration_lfm2.py` and `modeling_lfm2.py` of transformers 5.19.

use super::{Fields, LAYERS_MAX, ShapeError, WIDTH_MAX};

/// The short convolution of a layer without attention.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Tokens that it sees.
    pub kernel: u64,
    /// It has biases, and so have the products around it.
    pub bias: bool,
}

impl Convolution {
    /// Reads it, with the defaults of the class, and the layers that have attention.
    pub(super) fn read(fields: &Fields<'_>, layers: u64) -> Result<(Convolution, Vec<u64>), ShapeError> {
        let convolution = Convolution {
            kernel: fields.number(&["conv_L_cache"], LAYERS_MAX)?.unwrap_or(3),
            bias: fields.flag("conv_bias")?.unwrap_or(false),
        };
        let stated = |key: &str| fields.object.get(key).is_some_and(|value| !value.is_null());
        let full = if fields.layer_types().is_none() && stated("full_attn_idxs") {
            fields.layer_list("full_attn_idxs", layers)?
        } else {
            (0..layers).filter(|index| fields.is_listed_as_full(*index).unwrap_or(true)).collect()
        };
        Ok((convolution, full))
    }
}

/// Returns the width of the MLP (`Lfm2MLP.__init__`): two thirds of what is stated, times a factor, rounded up.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "widths are bounded far below 2^53, and a width that is not is refused"
)]
pub(super) fn mlp_width(fields: &Fields<'_>, stated: u64) -> Result<u64, ShapeError> {
    let stated = fields.number(&["block_ff_dim"], WIDTH_MAX)?.unwrap_or(stated);
    if fields.flag("block_auto_adjust_ff_dim")? == Some(false) {
        return Ok(stated);
    }
    let width = 2 * stated / 3;
    let factor = match fields.positive("block_ffn_dim_multiplier")? {
        // Null takes neither the factor nor the rounding.
        Some(None) => return Ok(width.max(1)),
        Some(Some(factor)) => factor,
        None => 1.0,
    };
    let multiple = fields.number(&["block_multiple_of"], WIDTH_MAX)?.unwrap_or(256);
    let scaled = (factor * width as f64).min(WIDTH_MAX as f64) as u64;
    Ok(scaled.div_ceil(multiple).saturating_mul(multiple).clamp(1, WIDTH_MAX))
}
