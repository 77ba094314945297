//! What does one estimate cost, and a plan with its whole ladder?
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../tests/recipe/mod.rs"]
mod recipe;

use criterion::{Criterion, criterion_group, criterion_main};
use mhtrain_sizing::estimate::estimate;
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::plan::plan;
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::Workload;
use serde_json::json;

fn one_estimate(c: &mut Criterion) {
    let model = Model::resolve("Qwen/Qwen2.5-7B", None, None).unwrap();
    let work = recipe::workload();
    c.bench_function("estimate", |bencher| bencher.iter(|| estimate(&model, &work)));
}

/// Qwen3.5-4B: what a delta rule does with a row is the longest list. With and without checkpoints.
fn one_estimate_of_a_delta_rule(c: &mut Criterion) {
    let config = json!({"model_type": "qwen3_5_text", "hidden_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216,
        "vocab_size": 248_320, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "tie_word_embeddings": true});
    let model = Model::resolve("Qwen/Qwen3.5-4B", Some(&config), None).unwrap();
    for (name, gradient_checkpointing) in [("estimate, delta rule", true), ("without checkpoints", false)] {
        let work = Workload { gradient_checkpointing, ..recipe::workload() };
        c.bench_function(name, |bencher| bencher.iter(|| estimate(&model, &work)));
    }
}

fn one_plan(c: &mut Criterion) {
    let request = recipe::request("Qwen/Qwen2.5-7B", Bytes::from_mib(23_900));
    let book = TierBook::builtin();
    c.bench_function("plan", |bencher| bencher.iter(|| plan(&request, &book)));
}

criterion_group!(benches, one_estimate, one_estimate_of_a_delta_rule, one_plan);
criterion_main!(benches);
