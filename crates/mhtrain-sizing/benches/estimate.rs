//! What does one estimate cost?
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use criterion::{Criterion, criterion_group, criterion_main};
use mhtrain_sizing::estimate::estimate;
use mhtrain_sizing::model::Model;
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

criterion_group!(benches, one_estimate);
criterion_main!(benches);
