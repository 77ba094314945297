//! How well does the predicted interval hold peaks that real GPUs have shown?
//!
//! Reads a table of peaks collected from public documents (columns of `published.csv` of the memory study), predicts each,
//! and counts how many lie inside the 90 % interval. Figures whose setting cannot be known (the model's shape, another
//! optimizer, several GPUs, a rule of thumb) are left out and counted.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use mhtrain_sizing::estimate::{Estimate, estimate_with};
use mhtrain_sizing::model::{Model, ShapeSource};
use mhtrain_sizing::reserve::{Group, Ratio, Reserve};
use mhtrain_sizing::workload::{AttnImpl, Dtype, ExpertForm, Targets, TrainType, Workload};
use serde::Deserialize;
use serde_json::{Value, json};

/// Arguments of `cargo xtask score-published`.
#[derive(Debug, clap::Args)]
pub(crate) struct ScorePublishedArgs {
    /// Table of published peaks.
    csv: PathBuf,
    /// Also print every figure.
    #[arg(long)]
    each: bool,
}

const GIB: f64 = 1_073_741_824.0;

#[derive(Debug, Deserialize)]
struct Row {
    framework: String,
    model: String,
    method: TrainType,
    quant: String,
    rank: String,
    targets: String,
    batch: String,
    length: String,
    gc: String,
    attn: String,
    packing: String,
    fused_loss: String,
    optimizer: String,
    gpus: String,
    peak_gib: f64,
    metric: String,
    fills_length: String,
    note: String,
}

/// One figure with what was predicted.
struct Figure {
    row: Row,
    group: Group,
    /// Predicted peak of what torch allocates, in bytes.
    allocated: f64,
    /// Of that, weights, adapters and moments.
    resident: f64,
    /// Best guess and 90 % interval of the figure, in bytes.
    guess: f64,
    low: f64,
    high: f64,
}

impl Figure {
    fn real(&self) -> f64 {
        self.row.peak_gib * GIB
    }
}

/// Prints how many published peaks lie inside the predicted interval.
///
/// # Errors
/// A table that cannot be read.
pub(crate) fn run(args: &ScorePublishedArgs) -> anyhow::Result<()> {
    let mut reader =
        csv::Reader::from_path(&args.csv).with_context(|| format!("cannot open {}", args.csv.display()))?;
    let mut figures = Vec::new();
    let mut left_out: BTreeMap<&'static str, usize> = BTreeMap::new();
    for row in reader.deserialize() {
        let row: Row = row.with_context(|| format!("cannot read {}", args.csv.display()))?;
        match figure(row) {
            Ok(figure) => figures.push(figure),
            Err(reason) => *left_out.entry(reason).or_default() += 1,
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<34} {:>7} {:>8} {:>7} {:>7} {:>10} {:>12} {:>12}",
        "group", "figures", "inside", "below", "above", "high/low", "ratio median", "p10 to p90"
    )?;
    for group in Group::ALL {
        let of_group: Vec<&Figure> = figures.iter().filter(|figure| figure.group == group).collect();
        print_group(&mut out, &group.to_string(), &of_group)?;
        let (fused, plain): (Vec<&Figure>, Vec<&Figure>) =
            of_group.iter().copied().partition(|figure| figure.row.fused_loss == "1");
        if !fused.is_empty() && !plain.is_empty() {
            print_group(&mut out, "  with a fused loss", &fused)?;
            print_group(&mut out, "  without", &plain)?;
        }
    }
    print_group(&mut out, "all", &figures.iter().collect::<Vec<_>>())?;
    for (reason, count) in left_out {
        writeln!(out, "left out: {count} {reason}")?;
    }
    if args.each {
        for figure in &figures {
            print_figure(&mut out, figure)?;
        }
    }
    Ok(())
}

fn print_figure(out: &mut impl Write, figure: &Figure) -> std::io::Result<()> {
    let row = &figure.row;
    writeln!(
        out,
        "{:<28} {:<16} {:<26} {:<5} {}x{} gc {} | {:6.2} GiB, allocated {:6.2} (resident {:6.2}), ratio {:.3}, {:.2} to {:.2}, guess {:.2} {}",
        figure.group.to_string(),
        row.framework,
        row.model,
        row.method.to_string(),
        row.batch,
        row.length,
        row.gc,
        row.peak_gib,
        figure.allocated / GIB,
        figure.resident / GIB,
        figure.real() / figure.allocated,
        figure.low / GIB,
        figure.high / GIB,
        figure.guess / GIB,
        if (figure.low..=figure.high).contains(&figure.real()) { "" } else { "OUTSIDE" },
    )
}

#[expect(clippy::cast_precision_loss, reason = "counts of figures")]
fn print_group(out: &mut impl Write, name: &str, figures: &[&Figure]) -> std::io::Result<()> {
    if figures.is_empty() {
        return writeln!(out, "{name:<34} {:>7}", 0);
    }
    let count = figures.len() as f64;
    let share = |wanted: &dyn Fn(&Figure) -> bool| {
        100.0 * figures.iter().filter(|figure| wanted(figure)).count() as f64 / count
    };
    let below = share(&|figure| figure.real() < figure.low);
    let above = share(&|figure| figure.real() > figure.high);
    let width = figures.iter().map(|figure| figure.high / figure.low).sum::<f64>() / count;
    let mut ratios: Vec<f64> = figures.iter().map(|figure| figure.real() / figure.allocated).collect();
    ratios.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        ratios.get((ratios.len() * percent / 100).min(ratios.len().saturating_sub(1))).copied().unwrap_or(0.0)
    };
    writeln!(
        out,
        "{name:<34} {:>7} {:>6.1} % {below:>5.1} % {above:>5.1} % {width:>10.2} {:>12.2} {:>5.2} to {:.2}",
        figures.len(),
        100.0 - below - above,
        at(50),
        at(10),
        at(90),
    )
}

/// Returns the prediction for a figure, or why there is none.
fn figure(row: Row) -> Result<Figure, &'static str> {
    if row.metric.contains("estimate") {
        return Err("rules of thumb");
    }
    if row.gpus != "1" {
        return Err("on several GPUs");
    }
    if !row.optimizer.starts_with("adamw") || (row.optimizer != "adamw" && row.method == TrainType::Full) {
        return Err("with another optimizer");
    }
    if !matches!(row.quant.as_str(), "" | "bnb4" | "nf4" | "nf4-dq" | "gptq4" | "awq4" | "hqq4") {
        return Err("with 8-bit weights");
    }
    if row.note.contains("compiled") {
        return Err("of compiled models");
    }
    let packed = row.packing == "1";
    let equal = row.fills_length.contains("packed") || row.fills_length.contains("longest row");
    let equal = equal || row.fills_length.starts_with("settings column");
    let swift = row.framework.starts_with("ms-swift");
    if !swift && !equal {
        return Err("of other frameworks on rows of unknown length");
    }
    if row.framework == "torchtune" && row.gc.is_empty() && row.length.is_empty() {
        return Err("of other frameworks on rows of unknown length");
    }
    let model = model(&row.model).ok_or("of models whose shape is not known")?;
    let number = |text: &str| text.parse::<u32>().ok();
    let length = match (number(&row.length), row.fills_length.as_str()) {
        // Short data: about 300 tokens a row, whatever the limit.
        (_, text) if text.contains("short data") && !packed => 300,
        (Some(length), _) => length,
        (None, _) => return Err("of unknown length"),
    };
    let work = Workload {
        train_type: row.method,
        lora_rank: number(&row.rank).unwrap_or(8),
        targets: targets(&row.targets, &model),
        dtype: Dtype::Bfloat16,
        micro_batch: number(&row.batch).unwrap_or(1),
        accumulation: if swift { 16 } else { 1 },
        max_length: length,
        packing: packed,
        padded: false,
        attn_impl: if row.attn.starts_with("math") { AttnImpl::Eager } else { AttnImpl::FlashAttn },
        gradient_checkpointing: row.gc != "0",
        liger_kernel: row.fused_loss == "1",
        logit_share: 1.0,
        experts: ExpertForm::Fused,
        router_loss: false,
    };
    let group = if equal || packed { Group::Equal } else { Group::Unequal };
    // As the product predicts a job of these batches, doubts about its model among it.
    let reserve = Reserve { group, history: None };
    let said: Estimate = estimate_with(&model, &work, &reserve).map_err(|_| "that cannot be estimated")?;
    let [guess, low, high] = reserved(&said, &reserve.context());
    Ok(Figure {
        row,
        group,
        allocated: said.allocated_peak_bytes.as_f64(),
        resident: said.terms.weights.as_f64() + said.terms.adapter.as_f64() + said.terms.optimizer.as_f64(),
        guess,
        low,
        high,
    })
}

/// Returns best guess and 90 % interval of what the allocator reserves: the device peak less the CUDA context, and less what
/// the context adds to the interval, since the figures are the allocator's.
fn reserved(said: &Estimate, context: &Ratio) -> [f64; 3] {
    let device = said.device_peak_bytes.as_f64();
    let alone = |whole: f64, of_context: f64| (whole.powi(2) - of_context.powi(2)).max(0.0).sqrt();
    let guess = device - context.guess;
    let below = alone(device - said.low_bytes.as_f64(), context.guess - context.low);
    let above = alone(said.high_bytes.as_f64() - device, context.high - context.guess);
    [guess, guess - below, guess + above]
}

fn targets(text: &str, model: &Model) -> Targets {
    let fused = model.shape.fused_qkv;
    match text {
        "c_attn" | "default attention" if fused => Targets::Names(
            ["c_attn", "qkv_proj", "W_pack", "wqkv", "query_key_value"].map(str::to_owned).to_vec(),
        ),
        "c_attn" | "default attention" => {
            Targets::Names(["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec())
        }
        "q+v" | "q_proj+v_proj" | "recipe default" if !fused => {
            Targets::Names(["q_proj", "v_proj"].map(str::to_owned).to_vec())
        }
        _ => Targets::AllLinear,
    }
}

/// Shapes of models that the catalogue does not have under the published name. Models whose blocks no list is there for
/// (Phi-1.5, Phi-2, StableLM-Alpha: no gate, LayerNorm) are left out.
fn model(name: &str) -> Option<Model> {
    let shape = |hidden: u64, layers: u64, heads: u64, kv: u64, width: u64, vocab: u64| {
        json!({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "intermediate_size": width, "vocab_size": vocab})
    };
    let stand_in: Option<Value> = match name {
        "Apertus-8B" => Some(shape(4096, 32, 32, 8, 14_336, 131_072)),
        "XVERSE-13B" | "xverse-13b-256k" => Some(shape(5120, 40, 40, 40, 13_824, 100_534)),
        "SUS-Chat-34B" => Some(shape(7168, 60, 56, 8, 20_480, 64_000)),
        "openbuddy-zephyr-7b-chat" => Some(shape(4096, 32, 32, 8, 14_336, 36_608)),
        _ => None,
    };
    let alias = match name {
        "Plano-Orchestrator-4B" => "Qwen3-4B",
        "tongyi-finance-14b-chat-int4" => "qwen-14b-chat",
        "qwen1half-7b-chat-awq" => "Qwen1.5-7B",
        "qwen1half-72b-chat-int4" => "Qwen1.5-72B",
        "internlm2-7b-sft-chat" => "internlm2-7b",
        "Mistral-7B-v0.2-hf" => "Mistral-7B-v0.2",
        other => other.trim_end_matches("-Int4"),
    };
    let model = Model::resolve(alias, stand_in.as_ref(), None).ok()?;
    (model.source < ShapeSource::PartlyKnown).then_some(model)
}
