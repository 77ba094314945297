//! What does one estimate cost, and a plan with its whole ladder?
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use criterion::{Criterion, criterion_group, criterion_main};
use mhtrain_sizing::estimate::estimate;
use mhtrain_sizing::gpu::Card;
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::plan::plan;
use mhtrain_sizing::request::{Allow, Learning, Length, Pins, Request, Save, TrainerFeatures};
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::{AttnImpl, Dtype, Targets, TrainType, Workload};

fn one_estimate(c: &mut Criterion) {
    let model = Model::resolve("Qwen/Qwen2.5-7B", None, None).unwrap();
    let work = Workload {
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
    };
    c.bench_function("estimate", |bencher| bencher.iter(|| estimate(&model, &work)));
}

fn one_plan(c: &mut Criterion) {
    let request = Request {
        model: Model::resolve("Qwen/Qwen2.5-7B", None, None).unwrap(),
        card: Card {
            name: "NVIDIA GeForce RTX 4090".to_owned(),
            index: Some(0),
            total: Bytes::from_mib(24_564),
            free: Bytes::from_mib(23_900),
            compute_capability: Some("8.9".parse().unwrap()),
        },
        held_by_others: Bytes::ZERO,
        train_type: TrainType::Lora,
        lora_rank: 8,
        targets: Targets::AllLinear,
        length: Length::Standard,
        save: Save::Standard,
        learning: Learning::Standard,
        min_effective_batch: 32,
        allow: Allow::default(),
        pins: Pins::default(),
        features: TrainerFeatures { flash_attn: true, liger: false, bitsandbytes: true },
        oom_risk: 0.1,
    };
    let book = TierBook::builtin();
    c.bench_function("plan", |bencher| bencher.iter(|| plan(&request, &book)));
}

criterion_group!(benches, one_estimate, one_plan);
criterion_main!(benches);
