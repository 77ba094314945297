//! How many rows a second does a look at the data count, and how many bytes a second are hashed to know a file again?
//!
//! The figure that counts is rows a second (`thrpt`). The tokenizer is a toy of whole words, so a real one is slower: what is
//! measured is everything around it, reading, templates and counting. The file that is hashed is in the page cache.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mhtrain_probe::content_hash::ContentHashes;
use mhtrain_probe::data_files::DataFiles;
use mhtrain_probe::token_lengths::{TemplateWish, TokenCounter, count_rows};

/// A tokenizer with one token for each word.
const WORDS: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}"#;

const ROWS: u64 = 2000;

/// Rows of two turns, 40 to 600 words: about 1.9 KB each.
fn rows() -> String {
    let row = |id: u64| {
        let words = "word ".repeat(usize::try_from(40 + id * 37 % 560).unwrap());
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"question {id}\"}}, \
                 {{\"role\": \"assistant\", \"content\": \"{words}\"}}]}}\n"
        )
    };
    (0..ROWS).map(row).collect()
}

fn look(c: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), WORDS).unwrap();
    let lines = rows();
    let list = format!("[{}]", lines.trim_end().replace('\n', ", "));
    std::fs::write(directory.path().join("rows.jsonl"), &lines).unwrap();
    std::fs::write(directory.path().join("rows.json"), list).unwrap();
    let wish = TemplateWish { template: Some("qwen2_5".to_owned()), ..TemplateWish::default() };
    let counter = TokenCounter::open(directory.path(), &wish).unwrap();
    let mut group = c.benchmark_group("look");
    group.throughput(Throughput::Elements(ROWS)).sample_size(10);
    for name in ["rows.jsonl", "rows.json"] {
        let path = directory.path().join(name);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let files = DataFiles::open(std::slice::from_ref(&path)).unwrap();
                let counted = count_rows(&files, &counter, Duration::from_secs(600)).unwrap();
                assert_eq!(counted.profile.rows(), ROWS);
                black_box(counted)
            });
        });
    }
    group.finish();
}

fn hash(c: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rows.jsonl");
    let lines = rows().repeat(64);
    std::fs::write(&path, &lines).unwrap();
    let mut group = c.benchmark_group("hash");
    group.throughput(Throughput::Bytes(lines.len() as u64)).sample_size(10);
    group.bench_function("a file that is not remembered", |bencher| {
        bencher.iter(|| {
            let deadline = Instant::now() + Duration::from_secs(600);
            black_box(ContentHashes::default().content(&path, deadline))
        });
    });
    group.finish();
}

criterion_group!(benches, look, hash);
criterion_main!(benches);
