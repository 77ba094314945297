//! Values that the tests of several modules need.

use mhtrain_sizing::tier::{Profile, Steps, Tier};
use mhtrain_sizing::workload::{AttnImpl, Dtype};

/// Returns the standard rung of a 7B model, 8x4.
pub(crate) fn tier() -> Tier {
    Tier {
        name: Profile::Standard,
        micro_batch: 8,
        accumulation: 4,
        world_size: 1,
        max_length: 3072,
        packing: true,
        attn_impl: AttnImpl::FlashAttn,
        torch_dtype: Dtype::Bfloat16,
        gradient_checkpointing: true,
        liger_kernel: false,
        learning_rate: 2e-4,
        warmup_ratio: 0.1,
        max_grad_norm: None,
        num_train_epochs: 1.0,
        save_steps: Steps::Count(200),
        save_total_limit: 3,
        logging_steps: Steps::Count(20),
        router_aux_loss_coef: None,
        quant_bits: None,
        adapters: None,
    }
}
