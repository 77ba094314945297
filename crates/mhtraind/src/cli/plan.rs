//! `mhtraind plan`: what would run, and why?

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use mhtrain_job::spec::{DeviceWish, JobSpec};
use mhtrain_probe::probe::{ProbeQuery, probe};
use mhtrain_probe::trainer_environment::TrainerQuery;
use mhtrain_sizing::explain::bars;
use mhtrain_sizing::gpu::{Card, ComputeCapability};
use mhtrain_sizing::plan::{Plan, Rung, pass_row};
use mhtrain_sizing::request::TrainerFeatures;
use mhtrain_sizing::units::{Bytes, card_memory};
use mhtrain_sizing::workload::TrainType;
use mhtrain_swift::command::{
    AttemptFlags, Invocation, TRAINER_COMMAND, TrainerStart, exact_command, shell_block, user_command,
};
use mhtrain_swift::dialect::Dialect;
use serde_json::{Value, json};

use super::output;
use crate::config::Config;
use crate::engine::companion;
use crate::engine::eta::{eta_json, eta_line};
use crate::engine::look::{DataReport, look};
use crate::engine::origin::Origin;
use crate::engine::prepare::{self, Candidate, Datasets, Host, Prepared};
use crate::failure::{Failure, Status};

/// Show what would run and why, without starting anything
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind plan job.json                                    # on this machine's cards
  mhtraind plan job.json --gpu-free 22.5GiB --gpu-total 24GiB --compute-capability 8.6
  mhtraind plan job.json --json | jq .chosen
  echo '{\"model\": \"Qwen/Qwen2.5-7B-Instruct\", \"dataset\": \"d.jsonl\"}' | mhtraind plan - --gpu-free 80GiB

A card that is described by flags need not be here. What is not said about it is assumed, and the plan says so.")]
pub struct PlanArgs {
    /// The job file; `-` reads standard input
    job: PathBuf,
    /// The plan as JSON
    #[arg(long)]
    pub json: bool,
    /// Show the command that `run` really executes instead of the one that a person would type
    #[arg(long)]
    exact: bool,
    /// Free memory of a described card, for example 22.5GiB
    #[arg(long, value_name = "SIZE", value_parser = card_memory)]
    gpu_free: Option<Bytes>,
    /// Whole memory of a described card [default: the free memory]
    #[arg(long, value_name = "SIZE", value_parser = card_memory)]
    gpu_total: Option<Bytes>,
    /// Compute capability of a described card [default: 8.0]
    #[arg(long, value_name = "X.Y")]
    compute_capability: Option<ComputeCapability>,
    /// Name of a described card
    #[arg(long, value_name = "NAME")]
    gpu_name: Option<String>,
    /// How many such cards there are
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    gpus: Option<u32>,
    /// Plan for this version of ms-swift instead of the installed one
    #[arg(long, value_name = "VERSION")]
    ms_swift: Option<String>,
    /// Whether flash-attn is installed [default: as found; yes for a described card]
    #[arg(long, value_name = "yes|no")]
    flash_attn: Option<YesNo>,
    /// Whether liger-kernel is installed [default: as found; no for a described card]
    #[arg(long, value_name = "yes|no")]
    liger: Option<YesNo>,
    /// Whether bitsandbytes is installed [default: as found; yes for a described card]
    #[arg(long, value_name = "yes|no")]
    bitsandbytes: Option<YesNo>,
}

/// An answer on the command line.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
enum YesNo {
    Yes,
    No,
}

/// Runs the command.
pub fn run(args: &PlanArgs, config: &Config) -> Result<Status, Failure> {
    let spec = prepare::read_job(&args.job)?;
    let origin = Origin::of_this_process(config)?;
    let model = prepare::find_files(&spec, Datasets::NotNeeded, &origin)?;
    let host =
        if args.describes_a_card() { args.described_host(&spec)? } else { args.probed_host(&spec, config)? };
    let book = prepare::tier_book(config)?;
    let looked = look(&spec, &host.dialect, &origin, config);
    let prepared = prepare::prepare(spec, &model, host, &book, &origin, config, &looked)?;
    let invocation = if args.exact { exact(&prepared, config)? } else { typed(&prepared)? };
    if args.json {
        output::json(&plan_json(&prepared, &invocation))?;
    } else {
        output::line(plan_text(&prepared, &invocation))?;
    }
    Ok(Status::Done)
}

impl PlanArgs {
    fn describes_a_card(&self) -> bool {
        self.gpu_free.is_some()
            || self.gpu_total.is_some()
            || self.compute_capability.is_some()
            || self.gpu_name.is_some()
            || self.gpus.is_some()
    }

    fn described_host(&self, spec: &JobSpec) -> Result<Host, Failure> {
        let (free, total) = match (self.gpu_free, self.gpu_total) {
            (Some(free), Some(total)) if free > total => {
                return Err(Failure::bad_input(
                    "bad_card",
                    format!("--gpu-free {free} is more than --gpu-total {total}"),
                )
                .help("free memory is a part of the total".to_owned()));
            }
            (Some(free), total) => (free, total.unwrap_or(free)),
            (None, Some(total)) => (total, total),
            (None, None) => {
                return Err(Failure::bad_input("bad_card", "a described card needs its memory")
                    .help("add --gpu-free 22.5GiB (and --gpu-total 24GiB)".to_owned()));
            }
        };
        let mut notes = Vec::new();
        let capability = self.compute_capability.unwrap_or_else(|| {
            notes.push("the compute capability was not given: 8.0 is assumed".to_owned());
            ComputeCapability::AMPERE
        });
        let flash_attn = self.flash_attn.map_or_else(
            || {
                notes.push(
                    "whether flash-attn is installed was not given: yes is assumed (--flash-attn no)"
                        .to_owned(),
                );
                true
            },
            |answer| answer == YesNo::Yes,
        );
        if self.bitsandbytes.is_none() && spec.train_type != TrainType::Full {
            notes.push(
                "whether bitsandbytes is installed was not given: yes is assumed (--bitsandbytes no)"
                    .to_owned(),
            );
        }
        if self.liger.is_none() {
            notes.push(
                "whether liger-kernel is installed was not given: no is assumed (--liger yes)".to_owned(),
            );
        }
        let version = self.ms_swift.clone();
        let (dialect, warnings) = Dialect::for_versions(version.as_deref(), None);
        notes.extend(warnings);
        let first = match &spec.device {
            DeviceWish::Index(index) => *index,
            DeviceWish::Auto | DeviceWish::Uuid(_) => 0,
        };
        let count = if matches!(spec.device, DeviceWish::Auto) { self.gpus.unwrap_or(1) } else { 1 };
        let candidate = |offset: u32| Candidate {
            card: Card {
                name: self.gpu_name.clone().unwrap_or_else(|| format!("a card of {total}")),
                index: Some(first + offset),
                total,
                free,
                compute_capability: Some(capability),
            },
            uuid: None,
            held_by_others: total.saturating_sub(free),
        };
        Ok(Host {
            candidates: (0..count).map(candidate).collect(),
            features: TrainerFeatures {
                flash_attn,
                liger: self.liger == Some(YesNo::Yes),
                bitsandbytes: self.bitsandbytes != Some(YesNo::No),
                experts: dialect.experts(),
            },
            dialect,
            cores: cores(),
            notes,
            // Another card's: what was seen here says nothing about it.
            history: Arc::default(),
        })
    }

    fn probed_host(&self, spec: &JobSpec, config: &Config) -> Result<Host, Failure> {
        let report = probe(&ProbeQuery {
            nvml_library: config.nvml_library(),
            trainer: TrainerQuery::from_environment(config.trainer.command.clone(), None),
            output_dir: prepare::working_dir()?,
        });
        let mut host = prepare::probed_host(spec, &report, &[])?;
        if let Some(version) = &self.ms_swift {
            let (dialect, warnings) = Dialect::for_versions(Some(version), None);
            host.features.experts = dialect.experts();
            host.dialect = dialect;
            host.notes.extend(warnings);
        }
        if let Some(answer) = self.flash_attn {
            host.features.flash_attn = answer == YesNo::Yes;
        }
        if let Some(answer) = self.liger {
            host.features.liger = answer == YesNo::Yes;
        }
        if let Some(answer) = self.bitsandbytes {
            host.features.bitsandbytes = answer == YesNo::Yes;
        }
        Ok(host)
    }
}

fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Returns the command that a person would type for the chosen rung.
pub fn typed(prepared: &Prepared) -> Result<Invocation, Failure> {
    user_command(&prepared.command_request(prepared.plan.chosen))
        .map_err(|e| Failure::bad_input("bad_command", prepare::chain(&e)).help(e.help()))
}

/// Returns the command of a first attempt at the chosen rung.
fn exact(prepared: &Prepared, config: &Config) -> Result<Invocation, Failure> {
    let output_dir = prepare::output_dir(&prepared.spec, &Origin::of_this_process(config)?);
    let flags = AttemptFlags {
        companion: companion::planned(&output_dir, config),
        output_dir: output_dir.join("attempt-1"),
        expandable_segments: true,
        ..AttemptFlags::default()
    };
    let query = TrainerQuery::from_environment(config.trainer.command.clone(), None);
    let environment = mhtrain_probe::trainer_environment::trainer_environment(&query).ok();
    let start = match environment.and_then(|found| Some((found.python, found.sft_script?))) {
        Some((python, script)) => TrainerStart::Script { python, script },
        None => TrainerStart::Command(TRAINER_COMMAND.map(str::to_owned).to_vec()),
    };
    exact_command(&prepared.command_request(prepared.plan.chosen), &flags, &start)
        .map_err(|e| Failure::bad_input("bad_command", prepare::chain(&e)).help(e.help()))
}

fn plan_json(prepared: &Prepared, invocation: &Invocation) -> Value {
    let plan = &prepared.plan;
    let rungs: Vec<Value> = plan.rungs.iter().map(|rung| rung_json(plan, rung)).collect();
    json!({
        "chosen": plan.chosen_rung().tier,
        "chosen_index": plan.chosen,
        "rungs": rungs,
        "effective_batch": plan.effective_batch,
        "longest_row": plan.longest_row,
        "would_change": prepared.would_change,
        "data": prepared.data,
        "eta": eta_json(prepared),
        "device": {
            "index": prepared.candidate.card.index,
            "uuid": prepared.candidate.uuid,
            "name": prepared.candidate.card.name,
            "total_bytes": prepared.candidate.card.total,
            "free_bytes": prepared.candidate.card.free,
            "compute_capability": prepared.candidate.card.compute_capability,
            "held_by_others_bytes": prepared.candidate.held_by_others,
        },
        "command": invocation.argv,
        "env": invocation.env,
        "secrets": invocation.secrets,
        "notes": all_notes(prepared, invocation),
    })
}

fn rung_json(plan: &Plan, rung: &Rung) -> Value {
    json!({
        "tier": rung.tier,
        "predicted_peak_bytes": rung.predicted_peak_bytes,
        "low_bytes": rung.estimate.low_bytes,
        "high_bytes": rung.estimate.high_bytes,
        "admission_bytes": rung.admission_bytes,
        "terms": rung.estimate.terms,
        "reserve_bytes": rung.estimate.reserve_bytes,
        "fits": rung.fits,
        "worth_it": rung.worth_it,
        "relative_time": rung.relative_time,
        "sized_row": pass_row(&rung.tier, plan.longest_row),
        "why": rung.why,
    })
}

fn all_notes(prepared: &Prepared, invocation: &Invocation) -> Vec<String> {
    let secrets = invocation.secrets.iter().map(|name| {
        format!("{name} is a secret: the trainer finds it in its environment, and no argument holds it")
    });
    prepared
        .notes
        .iter()
        .chain(&prepared.plan.notes)
        .chain(&invocation.notes)
        .cloned()
        .chain(secrets)
        .collect()
}

/// Returns the plan for people: card, rungs with their reasons, bars of the one that is taken and its neighbours, what would
/// change the answer, notes, and the command as a block that can be pasted.
pub fn plan_text(prepared: &Prepared, invocation: &Invocation) -> String {
    let mut lines = vec![card_line(&prepared.candidate)];
    lines.extend(prepared.data.iter().flat_map(DataReport::lines));
    lines.push(eta_line(prepared));
    lines.push(String::new());
    lines.push(format!("rungs (effective batch {}), best first:", prepared.plan.effective_batch));
    let tiers: Vec<String> = prepared.plan.rungs.iter().map(|rung| rung.tier.to_string()).collect();
    let width = tiers.iter().map(String::len).fold(42, usize::max);
    for (index, (rung, tier)) in prepared.plan.rungs.iter().zip(&tiers).enumerate() {
        let mark = if index == prepared.plan.chosen { '>' } else { ' ' };
        lines.push(format!("{mark} {tier:<width$} {:>11}  {}", rung.predicted_peak_bytes, rung.why));
    }
    let card = &prepared.candidate.card;
    lines.push(String::new());
    lines.push(format!(
        "the rung that is taken (>) and its neighbours on the card of {}; amounts are of the one that is taken:",
        card.total.max(card.free)
    ));
    lines.extend(bars(&prepared.plan, card.free, card.total));
    if !prepared.would_change.is_empty() {
        lines.push(String::new());
        lines.push("what would change the answer:".to_owned());
        lines.extend(prepared.would_change.iter().map(|line| format!("  {line}")));
    }
    let warnings = prepared.data.iter().flat_map(|report| &report.data.warnings);
    if warnings.clone().next().is_some() {
        lines.push(String::new());
        lines.push("warnings:".to_owned());
        lines.extend(warnings.map(|warning| format!("- {warning}")));
    }
    let notes = all_notes(prepared, invocation);
    if !notes.is_empty() {
        lines.push(String::new());
        lines.push("notes:".to_owned());
        lines.extend(notes.iter().map(|note| format!("- {note}")));
    }
    lines.push(String::new());
    lines.push(shell_block(invocation).trim_end().to_owned());
    lines.join("\n")
}

fn card_line(candidate: &Candidate) -> String {
    let card = &candidate.card;
    let place = card.index.map_or(String::new(), |index| format!("GPU {index}: "));
    let capability = card.compute_capability.map_or(String::new(), |cc| format!(", sm {cc}"));
    format!(
        "{place}{}{capability}: {} free of {}, others hold {}",
        card.name, card.free, card.total, candidate.held_by_others
    )
}
