//! `mhtraind demo`: does it really work, here, without a GPU?
//!
//! A real job on a tiny model: the real trainer runs out of (simulated) memory, and the real recovery follows.

use std::path::{Path, PathBuf};

use clap::Args;
use mhtrain_job::spec::JobSpec;
use mhtrain_probe::nvml::probe_gpus;
use nvml_sim::{SimDevice, SimFile};

use super::install_trainer::install_with_bar;
use super::{output, probe, run};
use crate::config::{Config, data_home};
use crate::demo::{self, CARD_BYTES, CARD_UUID};
use crate::engine::local;
use crate::engine::screen::Sentences;
use crate::failure::{Failure, Status, unwritable};

/// See it work on this machine: a real job through a real out-of-memory error, without a GPU
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  mhtraind demo

The first run installs ms-swift (6 GB from PyPI) into an environment of its own and keeps it; later ones take a
minute or three. Ctrl-C ends it at any time: no process and no half-made environment is left.")]
pub struct DemoArgs {
    /// Where the demo's model, data and job go; what an earlier demo left there is replaced
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Rows of the demo's data set: ten optimizer steps of 32 an epoch.
const ROWS: u32 = 320;

/// The trainer's version.
const MS_SWIFT: &str = "4.6.0";

/// Runs the command.
pub fn run(args: &DemoArgs, config: &Config) -> Result<Status, Failure> {
    let simulated_card = probe_gpus(config.nvml_library().as_deref()).devices().is_empty();
    output::line(first_line(simulated_card))?;

    step(1, "the trainer environment")?;
    let trainer = install_with_bar(MS_SWIFT, None)?;
    output::line(format!(
        "ms-swift {MS_SWIFT} in {}{}",
        trainer.dir.display(),
        if trainer.reused { " (kept from before)" } else { "" }
    ))?;

    step(2, "a tiny model, its data, and a job")?;
    let dir = args.dir.clone().or_else(|| Some(data_home()?.join("demo"))).ok_or_else(|| {
        Failure::bad_input("no_home", "there is no home directory for the demo")
            .help("name one with --dir".to_owned())
    })?;
    let place = fresh_place(&dir)?;
    let plugin = demo::make(&trainer.python, &place, ROWS)?;
    let job = write_job(&place, &plugin)?;
    output::line(format!("{}:\n{}", place.join("job.json").display(), job.trim_end()))?;

    let mut config = config.clone();
    config.trainer.command = vec![trainer.dir.join("bin/swift").display().to_string(), "sft".to_owned()];
    if simulated_card {
        config.nvml.library = simulate_card(&place)?;
    }

    step(3, "the probe")?;
    probe::show(&config, &place)?;

    step(4, "mhtraind run job.json")?;
    let mut spec = JobSpec::parse(job.as_bytes()).map_err(|e| Failure::new(Status::Bug, "bug", e))?;
    spec.env.extend(demo::capacity_variables());
    let started = run::start(spec, run::Earlier::SetAside, Sentences::ToStdout, &config)?;
    let verdict = local::run(started, &config)?;

    step(5, "the receipt")?;
    local::show(&verdict, false)?;
    output::line(format!("everything is in {}", place.display()))?;
    // Only a daemon has another card to give.
    Ok(verdict.status.unwrap_or(Status::Failed))
}

fn first_line(simulated_card: bool) -> &'static str {
    if simulated_card {
        "Simulated: the GPU (nvml-sim answers for NVML) and the capacity at which its memory runs out. \
         Real: ms-swift, its training (on CPU), the torch.OutOfMemoryError that it raises, diagnosis, resume, proof."
    } else {
        "Simulated: the capacity at which memory runs out. Real: the GPU, ms-swift, its training, the \
         torch.OutOfMemoryError that it raises, diagnosis, resume, proof."
    }
}

fn step(number: u32, what: &str) -> Result<(), Failure> {
    output::line(format!("\n=== {number}. {what}"))
}

/// Returns the demo's directory, empty. Only a directory that a demo made is emptied.
fn fresh_place(dir: &Path) -> Result<PathBuf, Failure> {
    let marker = dir.join(".mhtraind-demo");
    if dir.exists() && !marker.exists() && dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure::bad_input(
            "not_empty",
            format!("{} is not empty and was not made by a demo", dir.display()),
        )
        .help("name another directory with --dir".to_owned()));
    }
    if marker.exists() {
        std::fs::remove_dir_all(dir).map_err(|e| unwritable(dir, &e))?;
    }
    std::fs::create_dir_all(dir).map_err(|e| unwritable(dir, &e))?;
    std::fs::write(&marker, "made by `mhtraind demo`; the next demo replaces it\n")
        .map_err(|e| unwritable(&marker, &e))?;
    std::path::absolute(dir).map_err(|e| unwritable(dir, &e))
}

/// Writes the job that a user would write, but for the pins that a CPU needs, and returns its text.
fn write_job(place: &Path, plugin: &Path) -> Result<String, Failure> {
    let job = serde_json::json!({
        "model": place.join("model"),
        "dataset": [place.join("train.jsonl")],
        "name": "demo",
        "device": 0,
        "output_dir": place.join("output"),
        "args": {
            "torch_dtype": "float32",
            "save_steps": 5,
            "logging_steps": 1,
            "num_train_epochs": 2,
            "external_plugins": [plugin],
        },
        // More threads make so small a model slower.
        "env": {"OMP_NUM_THREADS": "2"},
    });
    let text = serde_json::to_string_pretty(&job).map_err(|e| Failure::new(Status::Bug, "bug", e))? + "\n";
    let path = place.join("job.json");
    std::fs::write(&path, &text).map_err(|e| unwritable(&path, &e))?;
    Ok(text)
}

/// Writes the simulated card and returns the library that shows it.
fn simulate_card(place: &Path) -> Result<String, Failure> {
    let library = nvml_sim::find_library().ok_or_else(|| {
        Failure::new(
            Status::Failed,
            "no_nvml_sim",
            format!("{} was not found beside the program", nvml_sim::LIBRARY_FILE),
        )
        .help("build it: `cargo build --release --package nvml-sim`".to_owned())
    })?;
    let file = place.join("nvml-sim.json");
    let card = SimDevice::idle(CARD_UUID, "Simulated GPU", CARD_BYTES, "8.6");
    SimFile::new(vec![card])
        .write_atomically(&file)
        .map_err(|e| Failure::failed("unwritable", crate::engine::prepare::chain(&e)))?;
    let usage = place.join("nvml-sim-usage");
    std::fs::create_dir_all(&usage).map_err(|e| unwritable(&usage, &e))?;
    // SAFETY: no other thread runs yet: the engine's runtime starts later and is single-threaded.
    unsafe {
        std::env::set_var(nvml_sim::FILE_VARIABLE, &file);
        std::env::set_var(nvml_sim::USAGE_VARIABLE, &usage);
    }
    Ok(library.display().to_string())
}
