//! What is one rung of the ladder?

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::workload::{AttnImpl, Dtype, Targets};

/// Which profile a rung follows; ordered from the most faithful to what was asked to the most frugal.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// Longer rows than the recipe's standard, because the job or its data ask for them.
    Long,
    /// The recipe's standard, or whatever the job pins.
    Standard,
    /// Shorter rows: changes the data that is trained.
    Shorter,
    /// Adapters on a few layers only: changes what is trained, where the job allows it.
    FewerTargets,
    /// Base weights packed into 4 bits: changes what is trained, where the job allows it.
    Quantized,
    /// The recipe's emergency profile: 1 x 32, no packing, sdpa. Always last.
    Emergency,
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Profile::Long => "long",
            Profile::Standard => "standard",
            Profile::Shorter => "shorter",
            Profile::FewerTargets => "fewer_targets",
            Profile::Quantized => "quantized",
            Profile::Emergency => "emergency",
        })
    }
}

/// How often something happens: every so many steps, or after a share of all steps.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Steps {
    /// Every `n` optimizer steps.
    Count(u32),
    /// After this share of all steps, above 0 and below 1 (ms-swift reads values below 1 so).
    Share(f64),
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Steps::Count(n) => write!(f, "{n}"),
            Steps::Share(share) => write!(f, "{share}"),
        }
    }
}

/// The adapters that are trained. Field names are ms-swift's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapters {
    /// Rank of the adapters.
    pub lora_rank: u32,
    /// Adapted layers.
    pub target_modules: Targets,
}

impl Default for Adapters {
    /// Returns ms-swift's own, which are also the recipe's (section 8.1).
    fn default() -> Adapters {
        Adapters { lora_rank: 8, target_modules: Targets::AllLinear }
    }
}

/// One rung: every value that the ladder decides. Field names are those of the JSON interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tier {
    /// The profile that it follows.
    pub name: Profile,
    /// Rows of one pass on one device (`--per_device_train_batch_size`).
    pub micro_batch: u32,
    /// Passes per optimizer step (`--gradient_accumulation_steps`).
    pub accumulation: u32,
    /// Devices that train in parallel.
    pub world_size: u32,
    /// Longest row in tokens.
    pub max_length: u32,
    /// Whether rows are packed.
    pub packing: bool,
    /// Attention implementation.
    pub attn_impl: AttnImpl,
    /// Type of weights and activations.
    pub torch_dtype: Dtype,
    /// Whether activations are computed again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Whether Liger's fused kernels are used.
    pub liger_kernel: bool,
    /// Bits that bitsandbytes packs each base weight into, where only this rung does that: `None` in a job whose
    /// `train_type` is qlora.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub quant_bits: Option<u8>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps over which the learning rate rises.
    pub warmup_ratio: f64,
    /// Gradient clipping; `None` leaves ms-swift's default of 1.0.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub max_grad_norm: Option<f64>,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// Steps between checkpoints.
    pub save_steps: Steps,
    /// Checkpoints that are kept.
    pub save_total_limit: u32,
    /// Steps between log lines.
    pub logging_steps: Steps,
    /// Auxiliary loss of the router, mixture-of-experts models only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub router_aux_loss_coef: Option<f64>,
    /// The adapters; `None` in full fine-tuning, and in tiers that were stored before rungs could differ in them.
    #[serde(flatten, default)]
    pub adapters: Option<Adapters>,
}

impl Tier {
    /// Returns the effective batch: rows per optimizer step over all devices.
    pub fn effective_batch(&self) -> u64 {
        u64::from(self.micro_batch) * u64::from(self.accumulation) * u64::from(self.world_size)
    }

    /// Returns whether a pass at `other` is the very same one for the memory of the card.
    pub fn passes_the_same_as(&self, other: &Tier) -> bool {
        let pass = |tier: &Tier| {
            let method = (tier.adapters.clone(), tier.quant_bits, tier.torch_dtype);
            let rows = (tier.micro_batch, tier.max_length, tier.packing);
            (method, rows, tier.attn_impl, tier.gradient_checkpointing, tier.liger_kernel)
        };
        pass(self) == pass(other)
    }

    /// Returns whether a run at `other` trains the same weights on the same rows in the same order as one at `self`, so
    /// that a checkpoint of one can be resumed by the other.
    ///
    /// Source: the sampler draws one permutation from seed and epoch and cuts it into batches, so the row at a
    /// position depends on neither factor of the effective batch (measured on ms-swift 3.12.6 and 4.6.0).
    pub fn trains_the_same_as(&self, other: &Tier) -> bool {
        let adapters = |tier: &Tier| tier.adapters.clone().unwrap_or_default();
        adapters(self) == adapters(other)
            && self.quant_bits == other.quant_bits
            && self.effective_batch() == other.effective_batch()
            && self.max_length == other.max_length
            && self.packing == other.packing
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}x{}", self.name, self.micro_batch, self.accumulation)?;
        if self.world_size > 1 {
            write!(f, "x{}", self.world_size)?;
        }
        write!(f, " @{}{} {}", self.max_length, if self.packing { " packed" } else { "" }, self.attn_impl)?;
        if let Some(bits) = self.quant_bits {
            write!(f, " {bits}-bit")?;
        }
        // Checkpointing is the rule, so only its absence is told.
        if self.gradient_checkpointing { Ok(()) } else { f.write_str(" no checkpointing") }
    }
}
