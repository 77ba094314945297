//! `mhtraind probe`: what can this machine offer to a job, right now?

use std::path::{Path, PathBuf};

use clap::Args;
use mhtrain_probe::gpu::{ComputeMode, GpuReport, GpuState, Health, MemorySource, MigMode, NvmlState};
use mhtrain_probe::probe::{ProbeQuery, ProbeReport, TrainerReport, probe};
use mhtrain_probe::trainer_environment::TrainerQuery;

use super::output;
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Show GPUs, host and trainer environment
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind probe
  mhtraind probe --json | jq '.gpus.devices[].memory.free'
  mhtraind probe --output-dir /scratch/output      # free space there

What cannot be read is said and is no failure; `mhtraind doctor` judges.")]
pub struct ProbeArgs {
    /// The report as JSON
    #[arg(long)]
    pub json: bool,
    /// Directory whose free space is shown; it need not exist
    #[arg(long, value_name = "DIR", default_value = "output")]
    pub output_dir: PathBuf,
}

/// Runs the command.
pub fn run(args: &ProbeArgs, config: &Config) -> Result<Status, Failure> {
    if args.json {
        output::json(&probe(&query(config, &args.output_dir)))?;
    } else {
        show(config, &args.output_dir)?;
    }
    Ok(Status::Done)
}

/// Prints the report for people.
///
/// # Errors
/// Standard output cannot be written.
pub fn show(config: &Config, output_dir: &Path) -> Result<(), Failure> {
    output::line(render_probe(&probe(&query(config, output_dir))))
}

/// Returns what is asked for with these settings.
pub fn query(config: &Config, output_dir: &Path) -> ProbeQuery {
    ProbeQuery {
        nvml_library: config.nvml_library(),
        trainer: TrainerQuery::from_environment(config.trainer.command.clone(), None),
        output_dir: output_dir.to_owned(),
    }
}

/// Returns the report for people.
pub fn render_probe(report: &ProbeReport) -> String {
    let mut lines = gpu_lines(&report.gpus);
    lines.extend([String::new(), host_line(report)]);
    if let Some(disk) = &report.disk {
        lines.push(format!("disk: {} free of {} at {}", disk.free, disk.total, disk.path.display()));
    }
    lines.push(String::new());
    lines.extend(trainer_lines(&report.trainer));
    lines.join("\n")
}

fn gpu_lines(gpus: &GpuReport) -> Vec<String> {
    if let Some((what, help)) = gpus.nvml.problem(&gpus.library) {
        return vec![format!("GPUs: {what}"), format!("  help: {help}")];
    }
    let mut lines = Vec::new();
    if let NvmlState::Ready { driver, cuda, devices } = &gpus.nvml {
        let version = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
        lines.push(format!("driver {}, CUDA {}, {} GPU(s)", version(driver), version(cuda), devices.len()));
    }
    lines.extend(gpus.devices().iter().flat_map(device_lines));
    lines
}

fn device_lines(device: &GpuState) -> Vec<String> {
    let name = device.name.as_deref().unwrap_or("(name unknown)");
    let capability = device.compute_capability.map_or(String::new(), |found| format!(", sm {found}"));
    let modes = modes(device);
    let uuid = device.uuid.as_deref().unwrap_or("(UUID unknown)");
    let mut lines = vec![format!("GPU {}: {name}{capability}{modes}  {uuid}", device.index)];
    match &device.health {
        Health::Healthy => {}
        Health::Lost => {
            lines.push("  LOST: it has fallen off the bus or is otherwise inaccessible".to_owned())
        }
        Health::ResetRequired => lines.push("  must be reset before it can be used".to_owned()),
        Health::NoPermission => lines.push("  this user may not use it".to_owned()),
        Health::Failed { error } => lines.push(format!("  does not answer: {error}")),
    }
    lines.push(format!("  {}", memory_text(device)));
    for process in device.processes.iter().flatten() {
        let used = process.used.map_or("not available".to_owned(), |used| used.to_string());
        let owner = process.owner.as_deref().unwrap_or("?");
        let command = process.command.as_deref().unwrap_or("?");
        lines.push(format!("  pid {:<8} {owner:<12} {used:>13}  {command}", process.pid));
    }
    lines.extend(device.notes.iter().map(|note| format!("  note: {note}")));
    lines
}

fn modes(device: &GpuState) -> String {
    let mut text = String::new();
    if device.mig == MigMode::Enabled {
        text.push_str(", MIG on");
    }
    match device.compute_mode {
        None | Some(ComputeMode::Default) => {}
        Some(ComputeMode::Prohibited) => text.push_str(", compute mode Prohibited"),
        Some(ComputeMode::ExclusiveProcess) => text.push_str(", compute mode Exclusive_Process"),
        Some(ComputeMode::ExclusiveThread) => text.push_str(", compute mode Exclusive_Thread"),
    }
    text
}

fn memory_text(device: &GpuState) -> String {
    let Some(memory) = device.memory else { return "memory: not available".to_owned() };
    let reserved = match (memory.reserved, memory.source) {
        (Some(reserved), _) => format!(", {reserved} reserved"),
        (None, MemorySource::Host) => ", shared with the host".to_owned(),
        (None, MemorySource::Nvml | MemorySource::NvmlFirstVersion) => ", reserved part unknown".to_owned(),
    };
    format!("{} free of {} ({} used{reserved})", memory.free, memory.total, memory.used)
}

fn host_line(report: &ProbeReport) -> String {
    let host = &report.host;
    let name = host.hostname.as_deref().unwrap_or("host");
    let memory = host.memory.map_or("memory unknown".to_owned(), |memory| {
        format!("{} of {} memory available", memory.available, memory.total)
    });
    let shared = host
        .shared_memory
        .as_ref()
        .map_or("no /dev/shm".to_owned(), |space| format!("/dev/shm {}", space.free));
    format!("{name}: {} cores, {memory}, {shared}", host.cores)
}

fn trainer_lines(trainer: &TrainerReport) -> Vec<String> {
    match trainer {
        TrainerReport::Missing { error, help } => {
            let help = help.iter().map(|help| format!("  help: {help}"));
            std::iter::once(format!("trainer: {error}")).chain(help).collect()
        }
        TrainerReport::Ready(environment) => {
            let bytecode = if environment.bytecode { "" } else { ", not compiled to bytecode" };
            let first = format!(
                "trainer: {} (Python {}{bytecode})",
                environment.python.display(),
                environment.python_version
            );
            let shown = [
                "ms-swift",
                "torch",
                "transformers",
                "peft",
                "flash-attn",
                "liger-kernel",
                "bitsandbytes",
                "deepspeed",
            ];
            let versions = shown.map(|name| {
                let version = environment.version(name).unwrap_or("not installed");
                format!("  {name:<14} {version}")
            });
            std::iter::once(first).chain(versions).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use mhtrain_probe::gpu::{GpuMemory, GpuProcess};
    use mhtrain_probe::host::{DiskSpace, HostMemory, HostReport};
    use mhtrain_sizing::gpu::ComputeCapability;
    use mhtrain_sizing::units::Bytes;
    use mhtrain_swift::environment::TrainerEnvironment;

    use super::*;

    fn report() -> ProbeReport {
        let healthy = GpuState {
            index: 0,
            uuid: Some("GPU-1111".to_owned()),
            name: Some("NVIDIA A100 80GB PCIe".to_owned()),
            health: Health::Healthy,
            memory: Some(GpuMemory {
                total: Bytes::from_gib(80),
                reserved: Some(Bytes::from_mib(600)),
                used: Bytes::from_gib(6),
                free: Bytes::from_gib(73),
                source: MemorySource::Nvml,
            }),
            compute_capability: Some(ComputeCapability::AMPERE),
            mig: MigMode::Disabled,
            compute_mode: Some(ComputeMode::Default),
            processes: Some(vec![
                GpuProcess {
                    pid: 4121,
                    used: Some(Bytes::from_gib(6)),
                    owner: Some("ana".into()),
                    command: Some("python".into()),
                },
                GpuProcess { pid: 9, used: None, owner: None, command: None },
            ]),
            notes: vec!["memory of single processes: not available".to_owned()],
        };
        let lost = GpuState {
            index: 1,
            uuid: None,
            name: None,
            health: Health::Lost,
            memory: None,
            compute_capability: None,
            mig: MigMode::NotSupported,
            compute_mode: None,
            processes: None,
            notes: Vec::new(),
        };
        let nvml =
            NvmlState::Ready { driver: Some("570.86".into()), cuda: None, devices: vec![healthy, lost] };
        ProbeReport {
            gpus: GpuReport { library: "libnvidia-ml.so.1".to_owned(), nvml },
            host: HostReport {
                hostname: Some("node1".to_owned()),
                boot_id: None,
                cores: 16,
                memory: Some(HostMemory { total: Bytes::from_gib(128), available: Bytes::from_gib(100) }),
                shared_memory: None,
                cgroup: None,
            },
            disk: Some(DiskSpace {
                path: PathBuf::from("/data"),
                total: Bytes::from_gib(900),
                free: Bytes::from_gib(500),
            }),
            trainer: TrainerReport::Ready(TrainerEnvironment {
                python: PathBuf::from("/opt/train/bin/python"),
                python_version: "3.11.7".to_owned(),
                sft_script: None,
                packages: [("ms-swift", "4.6.0"), ("torch", "2.9.0+cu128")]
                    .map(|(name, version)| (name.to_owned(), version.to_owned()))
                    .into(),
                bytecode: false,
            }),
        }
    }

    #[test]
    fn the_report_for_people() {
        insta::assert_snapshot!(render_probe(&report()));
    }

    #[test]
    fn without_nvml_and_trainer_the_report_says_what_to_do() {
        let mut report = report();
        report.gpus.nvml = NvmlState::VersionMismatch;
        report.trainer =
            TrainerReport::Missing { error: "nowhere".to_owned(), help: Some("install it".to_owned()) };
        insta::assert_snapshot!(render_probe(&report));
    }
}
