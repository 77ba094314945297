//! What do adding, listing and opening cost, with few and with many finished jobs, beside a bare fsync?
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use mhtrain_job::event::{Record, read_journal};
use mhtrain_store::{Filter, JobId, NewJob, Order, Owner, Sample, Store, Write, Written};
use serde_json::json;

const LIFE: &str = include_str!("../tests/fixtures/life-v1.jsonl");
/// Jobs of one group commit.
const TOGETHER: usize = 50;

fn life() -> Vec<Record> {
    read_journal(LIFE).unwrap()
}

fn new_job() -> NewJob {
    NewJob {
        owner: Owner { uid: 1000, gid: 100, name: "ada".to_owned() },
        key: None,
        record: life().remove(0),
        name: "m-sft".to_owned(),
        priority: 0,
        context: json!({"cwd": "/home/ada", "umask": 18, "environment": {"HF_HOME": "x".repeat(1000)}}),
    }
}

/// Adds `jobs` jobs that lived a whole life, and returns the last.
fn add_finished(store: &mut Store, jobs: usize) -> JobId {
    let (new, life) = (new_job(), life());
    let mut last = None;
    for _ in 0..jobs.div_ceil(500) {
        let submitted = store.write_all(&vec![Write::Submit(&new); jobs.min(500)]).unwrap();
        let ids: Vec<_> = submitted.into_iter().map(|written| id_of(written.unwrap())).collect();
        for record in &life[1..] {
            let events: Vec<_> = ids.iter().map(|id| Write::Append(*id, record)).collect();
            assert!(store.write_all(&events).unwrap().iter().all(Result::is_ok));
        }
        last = ids.last().copied();
    }
    last.unwrap()
}

fn id_of(written: Written) -> JobId {
    match written {
        Written::Submitted(submitted) => submitted.id,
        Written::Appended(_) => unreachable!("a submission is answered as one"),
    }
}

fn bare_fsync(c: &mut Criterion, jobs: usize, dir: &Path) {
    let mut file = File::create(dir.join("bare")).unwrap();
    c.bench_function(&format!("8 KiB and a bare fsync, beside {jobs}"), |bencher| {
        bencher.iter(|| {
            file.write_all(&[7; 8192]).unwrap();
            file.sync_all().unwrap();
        });
    });
}

fn with_finished(c: &mut Criterion, jobs: usize) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    bare_fsync(c, jobs, dir.path());
    let state = dir.path().join("state");
    let mut store = Store::open(&state).unwrap();
    let finished = add_finished(&mut store, jobs);
    let (new, event) = (new_job(), life().remove(1));

    c.bench_function(&format!("list 100 of {jobs}"), |bencher| {
        let filter = Filter { order: Order::NewestFirst, ..Filter::default() };
        bencher.iter(|| store.jobs(&filter).unwrap());
    });
    c.bench_function(&format!("list all of {jobs}"), |bencher| {
        let filter = Filter { limit: u32::MAX, ..Filter::default() };
        bencher.iter(|| store.jobs(&filter).unwrap());
    });
    drop(store);
    c.bench_function(&format!("open with {jobs}"), |bencher| {
        bencher.iter_batched(|| (), |()| Store::open(&state).unwrap(), BatchSize::PerIteration);
    });

    let mut store = Store::open(&state).unwrap();
    c.bench_function(&format!("submit after {jobs}"), |bencher| bencher.iter(|| store.submit(&new).unwrap()));
    let id = store.submit(&new).unwrap().id;
    c.bench_function(&format!("append after {jobs}"), |bencher| {
        bencher.iter(|| store.append(id, &event).unwrap());
    });
    let events = vec![(id, event); TOGETHER];
    c.bench_function(&format!("append {TOGETHER} together after {jobs}"), |bencher| {
        bencher.iter(|| store.append_all(&events).unwrap());
    });
    let samples = [Sample { loss: Some(1.5), vram_bytes: Some(1 << 30), ..Sample::default() }; 5];
    c.bench_function(&format!("note 5 samples after {jobs}"), |bencher| {
        bencher.iter(|| store.note_samples(finished, 1, &samples).unwrap());
    });
}

/// Opening folds what is not over: a queue far longer than any that we know.
fn with_queued(c: &mut Criterion, jobs: usize) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let new = new_job();
    Store::open(dir.path()).unwrap().write_all(&vec![Write::Submit(&new); jobs]).unwrap();
    c.bench_function(&format!("open with {jobs} queued"), |bencher| {
        bencher.iter_batched(|| (), |()| Store::open(dir.path()).unwrap(), BatchSize::PerIteration);
    });
}

fn all(c: &mut Criterion) {
    for jobs in [10, 10_000] {
        with_finished(c, jobs);
    }
    with_queued(c, 10_000);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = all
}
criterion_main!(benches);
