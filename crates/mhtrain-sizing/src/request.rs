//! What is the sizing engine asked?

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::LengthProfile;
use crate::gpu::Card;
use crate::model::Model;
use crate::tier::Steps;
use crate::units::Bytes;
use crate::workload::{AttnImpl, Dtype, ExpertForm, Targets, TrainType};

/// How long a row may be.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Length {
    /// The recipe's 3072.
    #[default]
    Standard,
    /// The recipe's 4096 (section 4.2, memory to spare).
    Long,
    /// The recipe's 2048 (section 4.2, memory is short).
    Short,
    /// Exactly so many tokens: pinned.
    Tokens(u32),
}

/// How often a checkpoint is written (recipe section 4.4).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Save {
    /// Every 200 steps, 3 are kept; the emergency profile has its own.
    #[default]
    Standard,
    /// Every 100 steps, 5 are kept.
    FastIteration,
    /// Every 500 steps, 2 are kept.
    LongRun,
}

/// How boldly is learned (recipe sections 4.1 and 5.3).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Learning {
    /// 2e-4; the emergency profile has 1e-4.
    #[default]
    Standard,
    /// 5e-4; the loss wants watching.
    Fast,
    /// 1e-4, warm-up 0.15, gradients clipped at 0.5.
    Stable,
}

/// What a lower rung may change about the training; each change is in the receipt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Allow {
    /// Rows may be cut shorter than asked (rows over the length are dropped).
    pub shorter_max_length: bool,
    /// Packing may be switched off.
    pub no_packing: bool,
    /// fp16 may stand in for bf16 on cards that lack it.
    pub lower_precision: bool,
    /// The emergency profile may be tried.
    pub emergency: bool,
    /// Training may start again from its beginning where it cannot be resumed exactly.
    pub restart: bool,
    /// Base weights may be quantised to 4 bits.
    pub quantize: bool,
    /// Liger's fused kernels may be used.
    pub liger: bool,
    /// Adapters may be left off some layers (`q_proj,v_proj`).
    pub fewer_targets: bool,
    /// Activations may be kept instead of computed again (no gradient checkpointing), where there is room to spare.
    pub no_checkpointing: bool,
    /// After a divergence the recipe's stable learning may be used.
    pub recipe_stable: bool,
}

impl Default for Allow {
    fn default() -> Allow {
        Allow {
            shorter_max_length: true,
            no_packing: true,
            lower_precision: true,
            emergency: true,
            restart: true,
            quantize: false,
            liger: false,
            fewer_targets: false,
            no_checkpointing: false,
            recipe_stable: true,
        }
    }
}

/// What the user fixed. A pin is never overridden.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(
    missing_docs,
    reason = "each field is the parameter of ms-swift that it is named after, as in `Tier`"
)]
pub struct Pins {
    pub micro_batch: Option<u32>,
    pub accumulation: Option<u32>,
    pub max_length: Option<u32>,
    pub packing: Option<bool>,
    pub attn_impl: Option<AttnImpl>,
    pub torch_dtype: Option<Dtype>,
    pub gradient_checkpointing: Option<bool>,
    pub liger_kernel: Option<bool>,
    pub learning_rate: Option<f64>,
    pub warmup_ratio: Option<f64>,
    pub max_grad_norm: Option<f64>,
    pub num_train_epochs: Option<f64>,
    pub save_steps: Option<Steps>,
    pub save_total_limit: Option<u32>,
    pub logging_steps: Option<Steps>,
    pub router_aux_loss_coef: Option<f64>,
    pub lora_rank: Option<u32>,
    pub target_modules: Option<Targets>,
}

impl Pins {
    /// Returns whether nothing that decides the memory is left to the engine.
    pub fn leave_nothing_to_size(&self) -> bool {
        self.micro_batch.is_some()
            && self.accumulation.is_some()
            && self.max_length.is_some()
            && self.packing.is_some()
            && self.attn_impl.is_some()
    }
}

/// What the trainer environment can do.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerFeatures {
    /// flash-attn is installed.
    pub flash_attn: bool,
    /// liger-kernel is installed.
    pub liger: bool,
    /// bitsandbytes is installed; qlora needs it.
    pub bitsandbytes: bool,
    /// How its transformers holds the experts of a mixture.
    #[serde(default)]
    pub experts: ExpertForm,
}

/// A question to the sizing engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The model, as far as it is known.
    pub model: Model,
    /// The card that the job will run on.
    pub card: Card,
    /// Memory that other processes hold on that card, for the explanation.
    pub held_by_others: Bytes,
    /// What is trained.
    pub train_type: TrainType,
    /// Wish for the length of rows.
    pub length: Length,
    /// Wish for checkpoints.
    pub save: Save,
    /// Wish for the learning rate.
    pub learning: Learning,
    /// Smallest effective batch that is allowed.
    pub min_effective_batch: u32,
    /// Changes that are allowed.
    pub allow: Allow,
    /// What the user fixed.
    pub pins: Pins,
    /// What the trainer environment can do.
    pub features: TrainerFeatures,
    /// One-sided risk of running out of memory at which a rung is admitted, above 0 and below 1.
    pub oom_risk: f64,
    /// Token lengths of the rows; `None` where nobody looked at them.
    pub data: Option<LengthProfile>,
}
