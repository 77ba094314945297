//! What is trained, and in what shape does one pass reach the card?

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which parameters are trained.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrainType {
    /// Low-rank adapters beside frozen bf16 weights.
    #[default]
    Lora,
    /// Low-rank adapters beside frozen 4-bit NF4 weights.
    Qlora,
    /// Every parameter.
    Full,
}

impl fmt::Display for TrainType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrainType::Lora => "lora",
            TrainType::Qlora => "qlora",
            TrainType::Full => "full",
        })
    }
}

/// Type of weights and activations.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 2 bytes, the range of fp32; needs sm 80 or later.
    #[default]
    Bfloat16,
    /// 2 bytes, small range: mixed precision with a gradient scaler.
    Float16,
    /// 4 bytes.
    Float32,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float16 => "float16",
            Dtype::Float32 => "float32",
        })
    }
}

/// Attention implementation, by the names that ms-swift's `--attn_impl` documents.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttnImpl {
    /// FlashAttention, version 2 unless ms-swift decides otherwise.
    FlashAttn,
    /// FlashAttention 2 by its transformers name.
    #[serde(rename = "flash_attention_2")]
    FlashAttention2,
    /// FlashAttention 3.
    #[serde(rename = "flash_attention_3")]
    FlashAttention3,
    /// FlashAttention 4 (ms-swift 4.6 and later).
    #[serde(rename = "flash_attention_4")]
    FlashAttention4,
    /// PyTorch's scaled dot product attention.
    Sdpa,
    /// Plain matrix products: the whole score matrix is kept.
    Eager,
    /// PyTorch's flex attention.
    FlexAttention,
}

impl AttnImpl {
    /// Every implementation, in the order of preference.
    pub const ALL: [AttnImpl; 7] = [
        AttnImpl::FlashAttn,
        AttnImpl::FlashAttention2,
        AttnImpl::FlashAttention3,
        AttnImpl::FlashAttention4,
        AttnImpl::Sdpa,
        AttnImpl::Eager,
        AttnImpl::FlexAttention,
    ];

    /// Returns whether packing works with it: ms-swift refuses packing without a flash implementation.
    pub fn is_flash(self) -> bool {
        matches!(
            self,
            AttnImpl::FlashAttn
                | AttnImpl::FlashAttention2
                | AttnImpl::FlashAttention3
                | AttnImpl::FlashAttention4
        )
    }
}

impl fmt::Display for AttnImpl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AttnImpl::FlashAttn => "flash_attn",
            AttnImpl::FlashAttention2 => "flash_attention_2",
            AttnImpl::FlashAttention3 => "flash_attention_3",
            AttnImpl::FlashAttention4 => "flash_attention_4",
            AttnImpl::Sdpa => "sdpa",
            AttnImpl::Eager => "eager",
            AttnImpl::FlexAttention => "flex_attention",
        })
    }
}

/// Which linear layers get an adapter. JSON and TOML have it as ms-swift's text: `all-linear`, or names and commas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Targets {
    /// Every linear layer of the blocks, not the head. Fused experts are no linear layers.
    #[default]
    AllLinear,
    /// Layers whose name ends in one of these, for example `q_proj`.
    Names(Vec<String>),
}

impl Targets {
    /// Reads `all-linear`, or names joined by commas, plus signs or blanks.
    pub fn parse(text: &str) -> Targets {
        let names: Vec<String> = text
            .split([',', '+', ' '])
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect();
        if names.is_empty() || names.iter().any(|name| name == "all-linear") {
            Targets::AllLinear
        } else {
            Targets::Names(names)
        }
    }
}

impl From<String> for Targets {
    fn from(text: String) -> Targets {
        Targets::parse(&text)
    }
}

impl From<Targets> for String {
    fn from(targets: Targets) -> String {
        targets.to_string()
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Targets::AllLinear => f.write_str("all-linear"),
            Targets::Names(names) => f.write_str(&names.join(",")),
        }
    }
}

/// How transformers holds the experts of a mixture.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertForm {
    /// All experts of a block are one parameter, which neither adapters nor bitsandbytes take for a linear module
    /// (transformers 5).
    #[default]
    Fused,
    /// Each expert has linear modules of its own: each gets an adapter, and each is packed (transformers 4).
    Modules,
}

/// The shape of one training pass: everything but the model that decides how much memory it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// What is trained.
    pub train_type: TrainType,
    /// Rank of the adapters; ignored in full fine-tuning.
    pub lora_rank: u32,
    /// Adapted layers; ignored in full fine-tuning.
    pub targets: Targets,
    /// Type of weights and activations.
    pub dtype: Dtype,
    /// Rows of one pass on one device.
    pub micro_batch: u32,
    /// Passes per optimizer step; above 1 the gradients of an earlier pass are alive.
    pub accumulation: u32,
    /// Tokens of a row (packed: of a pack).
    pub max_length: u32,
    /// Rows are packed: all of a micro-batch become one row of `micro_batch * max_length` tokens.
    pub packing: bool,
    /// Rows differ in length, so attention without a flash kernel gets a mask.
    pub padded: bool,
    /// Attention implementation.
    pub attn_impl: AttnImpl,
    /// Activations of a block are computed again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Liger's fused loss: no full logits are kept.
    pub liger_kernel: bool,
    /// Share of positions that get logits, 0 to 1; 1 is the safe assumption.
    pub logit_share: f64,
    /// How the experts of a mixture are held, and thereby which transformers it is; means nothing for a dense model.
    pub experts: ExpertForm,
    /// The load balancing loss of a mixture is on (`router_aux_loss_coef` above 0).
    pub router_loss: bool,
}

#[cfg(test)]
impl Workload {
    /// Returns the pass of a usual job, for tests.
    pub(crate) fn packed_lora() -> Workload {
        Workload {
            train_type: TrainType::Lora,
            lora_rank: 16,
            targets: Targets::AllLinear,
            dtype: Dtype::Bfloat16,
            micro_batch: 2,
            accumulation: 16,
            max_length: 2048,
            packing: true,
            padded: false,
            attn_impl: AttnImpl::FlashAttn,
            gradient_checkpointing: true,
            liger_kernel: false,
            logit_share: 1.0,
            experts: ExpertForm::Fused,
            router_loss: false,
        }
    }
}
