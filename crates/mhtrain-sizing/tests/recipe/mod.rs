//! What do tests and benchmarks ask? The recipe's standard job, as a request and as one pass, and passes of any shape.

#![allow(dead_code, unreachable_pub, reason = "each test file and benchmark takes what it needs")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use mhtrain_sizing::gpu::{Card, ComputeCapability};
use mhtrain_sizing::model::Model;
use mhtrain_sizing::request::{Allow, Learning, Length, Pins, Request, Save, TrainerFeatures};
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::{AttnImpl, Dtype, ExpertForm, Targets, TrainType, Workload};
use proptest::prelude::*;

/// Returns a job that says nothing but its model, on an 80 GiB card of which so much is free.
pub fn request(model: &str, free: Bytes) -> Request {
    Request {
        model: Model::resolve(model, None, None).unwrap(),
        card: Card {
            name: "A100-SXM4-80GB".to_owned(),
            index: Some(0),
            total: Bytes::from_gib(80),
            free,
            compute_capability: Some(ComputeCapability::AMPERE),
        },
        held_by_others: Bytes::ZERO,
        train_type: TrainType::Lora,
        length: Length::Standard,
        save: Save::Standard,
        learning: Learning::Standard,
        min_effective_batch: 32,
        allow: Allow::default(),
        pins: Pins::default(),
        features: TrainerFeatures {
            flash_attn: true,
            liger: false,
            bitsandbytes: true,
            experts: ExpertForm::Fused,
        },
        oom_risk: 0.10,
        data: None,
    }
}

/// Returns the pass of the recipe's 7B block (section 2.1).
pub fn workload() -> Workload {
    Workload {
        train_type: TrainType::Lora,
        lora_rank: 8,
        targets: Targets::AllLinear,
        dtype: Dtype::Bfloat16,
        micro_batch: 8,
        accumulation: 4,
        max_length: 3072,
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

/// Returns passes of any shape, with micro-batch, length, rank and accumulation drawn from `counts`.
pub fn any_workload(counts: impl Strategy<Value = [u32; 4]>) -> impl Strategy<Value = Workload> {
    let attention = prop::sample::select(vec![AttnImpl::FlashAttn, AttnImpl::Sdpa, AttnImpl::Eager]);
    let method = prop::sample::select(vec![TrainType::Lora, TrainType::Qlora, TrainType::Full]);
    let dtype = prop::sample::select(vec![Dtype::Bfloat16, Dtype::Float16, Dtype::Float32]);
    let share = prop_oneof![Just(1.0), 0.0001f64..1.0];
    (attention, method, dtype, any::<[bool; 4]>(), counts, share).prop_map(
        |(attn_impl, train_type, dtype, flags, counts, logit_share)| {
            let [packing, padded, gradient_checkpointing, liger_kernel] = flags;
            let [micro_batch, max_length, lora_rank, accumulation] = counts;
            Workload {
                train_type,
                lora_rank,
                targets: Targets::AllLinear,
                dtype,
                micro_batch,
                accumulation,
                max_length,
                packing,
                padded,
                attn_impl,
                gradient_checkpointing,
                liger_kernel,
                logit_share,
                experts: ExpertForm::Fused,
                router_loss: false,
            }
        },
    )
}
