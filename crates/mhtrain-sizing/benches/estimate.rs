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

fn one_estimate(c: &mut Criterion) {
    let model = Model::resolve("Qwen/Qwen2.5-7B", None, None).unwrap();
    let work = recipe::workload();
    c.bench_function("estimate", |bencher| bencher.iter(|| estimate(&model, &work)));
}

fn one_plan(c: &mut Criterion) {
    let request = recipe::request("Qwen/Qwen2.5-7B", Bytes::from_mib(23_900));
    let book = TierBook::builtin();
    c.bench_function("plan", |bencher| bencher.iter(|| plan(&request, &book)));
}

criterion_group!(benches, one_estimate, one_plan);
criterion_main!(benches);
