//! How good is the memory estimate against measured peaks?
//!
//! Reads a table with one measured pass a row (columns as in the table that the harness of the memory study writes)
//! and a folder with a config.json for each model, and prints how far the estimate and simpler rules are off.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use mhtrain_sizing::estimate::estimate;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::workload::{AttnImpl, Dtype, ExpertForm, Targets, TrainType, Workload};
use serde::Deserialize;

/// Arguments of `cargo xtask score-memory`.
#[derive(Debug, clap::Args)]
pub(crate) struct ScoreMemoryArgs {
    /// Table of measured peaks.
    csv: PathBuf,
    /// Folder with one config.json per model, named `<model>.json`.
    #[arg(long)]
    configs: PathBuf,
    /// Also print the points that the estimate misses most.
    #[arg(long, default_value_t = 0)]
    worst: usize,
}

/// Cards that a verdict "fits" is asked for, in GiB.
const CARDS_GIB: [f64; 6] = [16.0, 24.0, 40.0, 48.0, 80.0, 141.0];
const GIB: f64 = 1_073_741_824.0;

/// A row of the table.
#[derive(Debug, Deserialize)]
struct Row {
    model: String,
    #[serde(default)]
    family: String,
    method: TrainType,
    rank: u32,
    #[serde(default)]
    targets: String,
    batch: u32,
    length: u32,
    packing: u8,
    padded: u8,
    attn: AttnImpl,
    gc: u8,
    kept: f64,
    grad_accum: u8,
    #[serde(default)]
    dtype: Option<Dtype>,
    params: f64,
    peak_bytes: f64,
}

/// One measured point with what each rule says.
#[derive(Debug)]
struct Point {
    row: Row,
    ours: f64,
    rules: Vec<(&'static str, f64)>,
}

/// Prints the errors of the estimate over the points of a table.
///
/// # Errors
/// A table or a config that cannot be read, or a point that cannot be estimated.
pub(crate) fn run(args: &ScoreMemoryArgs) -> anyhow::Result<()> {
    let points = read(&args.csv, &args.configs)?;
    anyhow::ensure!(!points.is_empty(), "{} has no rows", args.csv.display());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", heading())?;
    print_group(&mut out, "all points", &points.iter().collect::<Vec<_>>())?;
    for (title, key) in GROUPINGS {
        let mut groups: BTreeMap<String, Vec<&Point>> = BTreeMap::new();
        for point in &points {
            groups.entry(key(&point.row)).or_default().push(point);
        }
        writeln!(out, "-- by {title}")?;
        for (name, group) in &groups {
            print_group(&mut out, name, group)?;
        }
    }
    print_rules(&mut out, &points)?;
    print_worst(&mut out, &points, args.worst)?;
    Ok(())
}

type Grouping = (&'static str, fn(&Row) -> String);

const GROUPINGS: [Grouping; 4] = [
    ("method", |row| row.method.to_string()),
    ("family", |row| if row.family.is_empty() { row.model.clone() } else { row.family.clone() }),
    ("checkpointing", |row| (if row.gc == 1 { "on" } else { "off" }).to_owned()),
    ("attention", |row| format!("{}{}", row.attn, if row.padded == 1 { " padded" } else { "" })),
];

fn heading() -> String {
    format!(
        "{:<28} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "", "points", "median", "p95", "max", "fits right", "near card", "under >1%"
    )
}

fn print_group(out: &mut impl Write, name: &str, points: &[&Point]) -> std::io::Result<()> {
    let pairs: Vec<(f64, f64)> = points.iter().map(|point| (point.ours, point.row.peak_bytes)).collect();
    writeln!(out, "{name:<28} {}", Score::of(&pairs))
}

fn print_rules(out: &mut impl Write, points: &[Point]) -> std::io::Result<()> {
    writeln!(out, "-- other rules on the same points")?;
    let names = points.first().map(|point| point.rules.len()).unwrap_or(0);
    for rule in 0..names {
        let pairs: Vec<(f64, f64)> =
            points.iter().map(|point| (point.rules[rule].1, point.row.peak_bytes)).collect();
        writeln!(out, "{:<28} {}", points[0].rules[rule].0, Score::of(&pairs))?;
    }
    Ok(())
}

fn print_worst(out: &mut impl Write, points: &[Point], count: usize) -> std::io::Result<()> {
    let mut sorted: Vec<&Point> = points.iter().collect();
    let error = |point: &Point| point.ours / point.row.peak_bytes - 1.0;
    sorted.sort_by(|a, b| error(b).abs().total_cmp(&error(a).abs()));
    for point in sorted.into_iter().take(count) {
        let row = &point.row;
        writeln!(
            out,
            "{:+8.3} % {:+9.2} MiB {:<24} {:<5} r{} {} {}x{} packing {} padded {} {} gc {} kept {} accum {} {:?} {:.0}",
            100.0 * error(point),
            (point.ours - row.peak_bytes) / 1_048_576.0,
            row.model,
            row.method.to_string(),
            row.rank,
            row.targets,
            row.batch,
            row.length,
            row.packing,
            row.padded,
            row.attn,
            row.gc,
            row.kept,
            row.grad_accum,
            row.dtype,
            row.peak_bytes
        )?;
    }
    Ok(())
}

/// How far a rule is off.
#[derive(Debug)]
struct Score {
    points: usize,
    median: f64,
    p95: f64,
    max: f64,
    fits_right: f64,
    /// The same where the measured peak is within 15 % of the card; `None` without such a point.
    near_card_right: Option<f64>,
    under: f64,
}

impl Score {
    /// Scores pairs of (said, measured).
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    fn of(pairs: &[(f64, f64)]) -> Score {
        let mut errors: Vec<f64> =
            pairs.iter().map(|(said, measured)| (said / measured - 1.0).abs()).collect();
        errors.sort_by(f64::total_cmp);
        let right: usize = pairs
            .iter()
            .map(|(said, measured)| {
                CARDS_GIB.iter().filter(|card| (*said <= **card * GIB) == (*measured <= **card * GIB)).count()
            })
            .sum();
        let near: Vec<bool> = pairs
            .iter()
            .flat_map(|(said, measured)| {
                CARDS_GIB
                    .iter()
                    .map(|card| card * GIB)
                    .filter(move |card| (measured / card - 1.0).abs() <= 0.15)
                    .map(move |card| (*said <= card) == (*measured <= card))
            })
            .collect();
        let near_right = near.iter().filter(|right| **right).count();
        let under = pairs.iter().filter(|(said, measured)| said / measured < 0.99).count();
        let count = pairs.len().max(1) as f64;
        Score {
            points: pairs.len(),
            median: quantile(&errors, 50),
            p95: quantile(&errors, 95),
            max: quantile(&errors, 100),
            fits_right: right as f64 / (count * CARDS_GIB.len() as f64),
            near_card_right: (!near.is_empty()).then(|| near_right as f64 / near.len() as f64),
            under: under as f64 / count,
        }
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:>6} {:>8.4} % {:>8.4} % {:>8.4} % {:>8.2} % {:>10} {:>8.2} %",
            self.points,
            100.0 * self.median,
            100.0 * self.p95,
            100.0 * self.max,
            100.0 * self.fits_right,
            self.near_card_right.map_or("-".to_owned(), |share| format!("{:.2} %", 100.0 * share)),
            100.0 * self.under
        )
    }
}

/// Returns the percentile of sorted numbers, by nearest rank; 0 of none.
fn quantile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

fn read(csv: &Path, configs: &Path) -> anyhow::Result<Vec<Point>> {
    let mut reader = csv::Reader::from_path(csv).with_context(|| format!("cannot open {}", csv.display()))?;
    let mut models: BTreeMap<String, Model> = BTreeMap::new();
    let mut points = Vec::new();
    for row in reader.deserialize() {
        let row: Row = row.with_context(|| format!("cannot read {}", csv.display()))?;
        if !models.contains_key(&row.model) {
            models.insert(row.model.clone(), model(&row.model, configs)?);
        }
        let model = &models[&row.model];
        let said = estimate(model, &workload(&row)).with_context(|| format!("cannot estimate {row:?}"))?;
        let rules = simpler_rules(&row, model);
        points.push(Point { ours: said.allocated_peak_bytes.as_f64(), rules, row });
    }
    Ok(points)
}

fn model(name: &str, configs: &Path) -> anyhow::Result<Model> {
    let path = configs.join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    Model::resolve(name, Some(&config), None).with_context(|| format!("cannot size {}", path.display()))
}

fn workload(row: &Row) -> Workload {
    Workload {
        train_type: row.method,
        lora_rank: row.rank.max(1),
        targets: Targets::parse(&row.targets),
        dtype: row.dtype.unwrap_or_default(),
        micro_batch: row.batch,
        accumulation: if row.grad_accum == 1 { 2 } else { 1 },
        max_length: row.length,
        packing: row.packing == 1,
        padded: row.padded == 1,
        attn_impl: row.attn,
        gradient_checkpointing: row.gc == 1,
        liger_kernel: false,
        logit_share: row.kept,
        experts: ExpertForm::Fused,
        router_loss: false,
    }
}

/// Returns what simpler published rules say about the same point, in bytes.
fn simpler_rules(row: &Row, model: &Model) -> Vec<(&'static str, f64)> {
    let parameters = row.params;
    // `accelerate estimate-memory`: weights, gradients and two moments, all in the type of the weights.
    let accelerate = 4.0 * 2.0 * parameters;
    // LLaMA-Factory's table of requirements: 60 GB, 16 GB and 6 GB for a 7B model.
    let llama_factory = match row.method {
        TrainType::Full => 60.0 / 7.0,
        TrainType::Lora => 16.0 / 7.0,
        TrainType::Qlora => 6.0 / 7.0,
    } * parameters;
    vec![
        ("accelerate estimate-memory", accelerate),
        ("LLaMA-Factory table", llama_factory),
        ("Unsloth formula", unsloth(row, model)),
        ("weights and states only", weights_and_states(row, model)),
    ]
}

/// Weights, gradients and moments, and nothing else.
fn weights_and_states(row: &Row, model: &Model) -> f64 {
    let adapter = as_float(model.shape.adapter_parameters(row.rank, &Targets::parse(&row.targets)));
    let linears = as_float(model.shape.linear_weights());
    match row.method {
        TrainType::Full => 8.0 * row.params,
        TrainType::Lora => 2.0 * row.params + 16.0 * adapter,
        TrainType::Qlora => 2.0 * (row.params - linears) + 0.516 * linears + 16.0 * adapter,
    }
}

/// The terms of Unsloth's VRAM document without its fixed 1.4 GB: weights, states in its own types, one block's
/// activations and the checkpoints; its loss never holds the logits.
fn unsloth(row: &Row, model: &Model) -> f64 {
    let shape = &model.shape;
    let tokens = f64::from(row.batch) * f64::from(row.length);
    let width = as_float(shape.hidden) * 6.0
        + as_float(shape.q_width() + 2 * shape.k_width()) * 2.0
        + as_float(shape.intermediate) * 6.0;
    let layers = as_float(shape.layers);
    let activations = if row.gc == 1 {
        tokens * (width + 2.0 * as_float(shape.hidden) * layers)
    } else {
        tokens * width * layers
    };
    weights_and_states(row, model) + activations
}

#[expect(clippy::cast_precision_loss, reason = "parameter counts, for a score")]
fn as_float(count: u64) -> f64 {
    count as f64
}
