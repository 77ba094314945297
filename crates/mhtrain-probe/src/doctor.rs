//! Is everything here that a job needs, and what to do about what is not?
//!
//! [`examine`] is a pure function of a [`ProbeReport`]: each check looks at what was read and never reads itself.
//!
//! A check *fails* when no job can run as things are, and *warns* when jobs run but worse (slower, without packing, on
//! fewer cards) or when something optional is absent.

use std::path::Path;

use mhtrain_sizing::gpu::ComputeCapability;
use mhtrain_sizing::units::Bytes;
use mhtrain_swift::dialect::Dialect;
use mhtrain_swift::environment::TrainerEnvironment;
use serde::Serialize;

use crate::gpu::{ComputeMode, GpuRefusal, GpuReport, GpuState, NvmlState};
use crate::host::{DiskSpace, HostReport};
use crate::probe::{ProbeReport, TrainerReport};

/// Less than this and not even one adapter checkpoint with its optimizer is sure to fit.
const DISK_FAIL: Bytes = Bytes::from_gib(1);

/// Less than this is tight: three checkpoints of an adapter take about 1 GiB, one model of 7B parameters 15 GiB.
const DISK_WARN: Bytes = Bytes::from_gib(20);

/// Data loader workers pass batches through `/dev/shm`; containers often get 64 MiB, and die with a bus error.
const SHARED_MEMORY_WARN: Bytes = Bytes::from_gib(1);

/// Oldest Python that current torch and transformers support.
const PYTHON_OLDEST: (u32, u32) = (3, 10);

/// All checks, in the order in which they should be mended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    /// Whether none failed.
    pub healthy: bool,
    /// The checks.
    pub checks: Vec<Check>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked, in a word or two.
    pub name: String,
    /// How it stands.
    pub state: CheckState,
    /// What was found.
    pub what: String,
    /// What to do.
    pub help: Option<String>,
}

/// How a check stands.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// As it should be.
    Ok,
    /// Jobs run, but worse.
    Warn,
    /// No job can run.
    Fail,
}

fn ok(name: impl Into<String>, what: impl Into<String>) -> Check {
    Check { name: name.into(), state: CheckState::Ok, what: what.into(), help: None }
}

fn warn(name: impl Into<String>, what: impl Into<String>, help: impl Into<String>) -> Check {
    Check { name: name.into(), state: CheckState::Warn, what: what.into(), help: Some(help.into()) }
}

fn fail(name: impl Into<String>, what: impl Into<String>, help: impl Into<String>) -> Check {
    Check { name: name.into(), state: CheckState::Fail, what: what.into(), help: Some(help.into()) }
}

/// Returns what is well and what is not.
pub fn examine(report: &ProbeReport) -> DoctorReport {
    let mut checks = check_gpus(&report.gpus);
    checks.extend(check_trainer(&report.trainer, &report.gpus));
    checks.extend(check_host(&report.host));
    checks.push(check_disk(report.disk.as_ref()));
    let healthy = checks.iter().all(|check| check.state != CheckState::Fail);
    DoctorReport { healthy, checks }
}

// ---- cards -----------------------------------------------------------------------------------------------------

fn check_gpus(gpus: &GpuReport) -> Vec<Check> {
    if let Some((what, help)) = gpus.nvml.problem(&gpus.library) {
        return vec![fail("NVML", what, help)];
    }
    let mut checks = vec![ok("NVML", format!("{} answers", gpus.library)), check_driver(&gpus.nvml)];
    if gpus.devices().is_empty() {
        let help = "check `nvidia-smi -L`, and that the container was started with GPUs";
        checks.push(fail("GPUs", "the driver lists no GPU", help));
    }
    let another_is_usable =
        |index| gpus.devices().iter().any(|other| other.index != index && other.card().is_ok());
    checks.extend(gpus.devices().iter().map(|device| check_gpu(device, another_is_usable(device.index))));
    checks
}

fn check_driver(nvml: &NvmlState) -> Check {
    let (driver, cuda) = match nvml {
        NvmlState::Ready { driver, cuda, .. } => (driver.as_deref(), cuda.as_deref()),
        NvmlState::NoLibrary { .. }
        | NvmlState::DriverNotLoaded
        | NvmlState::VersionMismatch
        | NvmlState::NoPermission
        | NvmlState::Failed { .. } => (None, None),
    };
    match driver {
        Some(driver) => ok("driver", format!("{driver}, CUDA up to {}", cuda.unwrap_or("unknown"))),
        None => {
            warn("driver", "the driver does not say its version", "run `nvidia-smi` and see what it says")
        }
    }
}

fn check_gpu(device: &GpuState, another_is_usable: bool) -> Check {
    let name = format!("GPU {}", device.index);
    match device.card() {
        // A card that is merely taken, or one of several, does not keep the others from working.
        Err(refusal) if another_is_usable || matches!(refusal, GpuRefusal::Exclusive { .. }) => {
            warn(name, refusal.to_string(), refusal.help())
        }
        Err(refusal) => fail(name, refusal.to_string(), refusal.help()),
        Ok(card) => {
            let capability = card.compute_capability.map_or("?".to_owned(), |found| found.to_string());
            let mut what = format!(
                "{}, {} free of {}, compute capability {capability}",
                card.name, card.free, card.total
            );
            for note in &device.notes {
                what = format!("{what}; {note}");
            }
            usable_gpu(name, what, device)
        }
    }
}

fn usable_gpu(name: String, what: String, device: &GpuState) -> Check {
    if device.compute_capability.is_some_and(|found| found < ComputeCapability::AMPERE) {
        let help =
            "jobs run in fp16 with sdpa and without packing: bf16 and FlashAttention-2 need 8.0 or later";
        return warn(name, what, help);
    }
    match device.compute_mode {
        Some(ComputeMode::ExclusiveProcess | ComputeMode::ExclusiveThread) => {
            let help = format!(
                "one process at a time may use it, so a job with several processes on it dies: `nvidia-smi -i {} -c DEFAULT`",
                device.index
            );
            warn(name, format!("{what}; compute mode Exclusive_Process"), help)
        }
        Some(ComputeMode::Default | ComputeMode::Prohibited) | None => ok(name, what),
    }
}

// ---- trainer ---------------------------------------------------------------------------------------------------

fn check_trainer(trainer: &TrainerReport, gpus: &GpuReport) -> Vec<Check> {
    let environment = match trainer {
        TrainerReport::Ready(environment) => environment,
        TrainerReport::Missing { error, help } => {
            let help =
                help.as_deref().unwrap_or("`mhtraind install-trainer` makes an environment with ms-swift");
            return vec![fail("trainer", error, help)];
        }
    };
    let mut checks = vec![
        ok("trainer", environment.python.display().to_string()),
        check_python(environment),
        check_swift(environment),
        check_transformers(environment),
        check_torch(environment, gpus),
    ];
    checks.extend(check_peft(environment));
    checks.extend([check_flash_attn(environment, gpus), check_bitsandbytes(environment)]);
    checks.extend([check_liger(environment), check_deepspeed(environment), check_bytecode(environment)]);
    checks
}

fn install(environment: &TrainerEnvironment, what: &str) -> String {
    format!("{} -m pip install {what}", environment.python.display())
}

fn check_python(environment: &TrainerEnvironment) -> Check {
    let version = &environment.python_version;
    match release(version).as_slice() {
        [major, minor, ..] if (*major, *minor) < PYTHON_OLDEST => {
            let (major, minor) = PYTHON_OLDEST;
            warn("python", version, format!("make the environment anew with Python {major}.{minor} or later"))
        }
        _ => ok("python", version),
    }
}

fn check_swift(environment: &TrainerEnvironment) -> Check {
    let (dialect, warnings) = Dialect::for_environment(environment);
    let version = environment.version("ms-swift").unwrap_or("of unknown version");
    let what = match &environment.sft_script {
        Some(_) => version.to_owned(),
        None => format!("{version}, without swift/cli/sft.py: the slower wrapper is started instead"),
    };
    if dialect.is_listed_version() && warnings.is_empty() {
        return ok("ms-swift", what);
    }
    let tested =
        format!("mhtraind was tested with 3.12.6 and 4.6.0; this one is treated as {}", dialect.line());
    let help = warnings.into_iter().fold(tested, |text, warning| format!("{text}; {warning}"));
    warn("ms-swift", what, help)
}

/// Versions of transformers that a version of ms-swift permits: from the first, up to but not including the second.
///
/// Source: `Requires-Dist` of the two releases.
fn permitted_transformers(ms_swift: &str) -> Option<(&'static str, &'static str)> {
    match release(ms_swift).as_slice() {
        [3, 12, ..] => Some(("4.33", "4.58")),
        [4, 6, ..] => Some(("4.33", "5.20")),
        _ => None,
    }
}

fn check_transformers(environment: &TrainerEnvironment) -> Check {
    let name = "transformers";
    let ms_swift = environment.version("ms-swift").unwrap_or_default();
    let Some(version) = environment.version(name) else {
        return fail(name, "not installed", install(environment, name));
    };
    match permitted_transformers(ms_swift) {
        None => ok(name, format!("{version} (what ms-swift {ms_swift} permits is not known)")),
        Some((from, below)) if release(version) < release(from) || release(version) >= release(below) => {
            let what = format!("{version}, but ms-swift {ms_swift} permits only {from} up to below {below}");
            fail(name, what, install(environment, &format!("'transformers>={from},<{below}'")))
        }
        Some(_) => ok(name, version),
    }
}

fn check_torch(environment: &TrainerEnvironment, gpus: &GpuReport) -> Check {
    let Some(version) = environment.version("torch") else {
        return fail("torch", "not installed", install(environment, "torch"));
    };
    let build = version.split_once('+').map(|(_, build)| build);
    match build {
        Some("cpu") => {
            let help = "this build cannot use a GPU: install the CUDA build that https://pytorch.org names for this driver";
            warn("torch", version, help)
        }
        Some(build) if build.starts_with("rocm") => {
            warn("torch", version, "this build is for AMD cards, which mhtraind does not size")
        }
        _ => match build.and_then(cuda_major).zip(driver_cuda_major(gpus)) {
            Some((needed, offered)) if needed > offered => {
                let what = format!("{version} needs CUDA {needed}, the driver offers {offered}");
                fail("torch", what, format!("update the driver, or install a torch build for CUDA {offered}"))
            }
            _ => ok("torch", version),
        },
    }
}

/// Returns the CUDA generation of a build such as `cu128`. Within a generation any driver serves (CUDA minor version
/// compatibility).
fn cuda_major(build: &str) -> Option<u32> {
    let digits: u32 = build.strip_prefix("cu")?.parse().ok()?;
    Some(digits / 10)
}

fn driver_cuda_major(gpus: &GpuReport) -> Option<u32> {
    let NvmlState::Ready { cuda, .. } = &gpus.nvml else { return None };
    cuda.as_ref()?.split('.').next()?.parse().ok()
}

fn check_peft(environment: &TrainerEnvironment) -> Option<Check> {
    Some(match environment.version("peft") {
        Some(version) => ok("peft", version),
        None => fail("peft", "not installed", install(environment, "peft")),
    })
}

fn check_flash_attn(environment: &TrainerEnvironment, gpus: &GpuReport) -> Check {
    let name = "flash-attn";
    if let Some(version) = environment.version(name) {
        return ok(name, version);
    }
    let able =
        |device: &GpuState| device.compute_capability.is_none_or(|found| found >= ComputeCapability::AMPERE);
    match gpus.devices().is_empty() || gpus.devices().iter().any(able) {
        true => {
            let help = format!(
                "without it rows are not packed: {}",
                install(environment, "flash-attn --no-build-isolation")
            );
            warn(name, "not installed", help)
        }
        false => ok(name, "not installed; no card here could use it"),
    }
}

fn check_bitsandbytes(environment: &TrainerEnvironment) -> Check {
    let name = "bitsandbytes";
    match environment.version(name) {
        Some(version) => ok(name, version),
        None => warn(name, "not installed", format!("qlora needs it: {}", install(environment, name))),
    }
}

fn check_liger(environment: &TrainerEnvironment) -> Check {
    optional(environment, "liger-kernel", "only used with `allow.liger`")
}

fn check_deepspeed(environment: &TrainerEnvironment) -> Check {
    optional(environment, "deepspeed", "only used for several cards, or when a job names it")
}

/// Something that most jobs do without.
fn optional(environment: &TrainerEnvironment, name: &str, used_for: &str) -> Check {
    match environment.version(name) {
        Some(version) => ok(name, version),
        None => {
            let help = Some(install(environment, name));
            Check { help, ..ok(name, format!("not installed; {used_for}")) }
        }
    }
}

fn check_bytecode(environment: &TrainerEnvironment) -> Check {
    if environment.bytecode {
        return ok("bytecode", "torch and transformers are compiled");
    }
    let python = environment.python.display();
    let help = format!(
        "every start takes about 10 s longer: {python} -m compileall -q -j 2 \"$({python} -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')\""
    );
    warn("bytecode", "torch or transformers is not compiled", help)
}

/// Returns the numbers of a version: `4.57.6.dev0+x` gives 4, 57, 6.
fn release(version: &str) -> Vec<u32> {
    let version = version.split('+').next().unwrap_or_default();
    version.split('.').map_while(|part| part.parse().ok()).collect()
}

// ---- host ------------------------------------------------------------------------------------------------------

fn check_host(host: &HostReport) -> Vec<Check> {
    let memory = match host.memory {
        Some(memory) => ok(
            "host",
            format!("{} cores, {} of {} memory available", host.cores, memory.available, memory.total),
        ),
        None => warn("host", format!("{} cores, memory unknown", host.cores), "check that /proc is mounted"),
    };
    vec![memory, check_shared_memory(host.shared_memory.as_ref()), check_cgroup(host)]
}

fn check_shared_memory(shared: Option<&DiskSpace>) -> Check {
    let help = "data loader workers die of a bus error when it is full: start the container with --shm-size=8g, or remount it larger";
    match shared {
        None => warn("/dev/shm", "not there", help),
        Some(space) if space.free < SHARED_MEMORY_WARN => {
            warn("/dev/shm", format!("{} free of {}", space.free, space.total), help)
        }
        Some(space) => ok("/dev/shm", format!("{} free of {}", space.free, space.total)),
    }
}

fn check_cgroup(host: &HostReport) -> Check {
    let help = "attempts are then followed by their process tree, which works; a host OOM is harder to prove. A systemd unit with Delegate=yes gives a writable one";
    match &host.cgroup {
        None => warn("cgroup v2", "not mounted", help),
        Some(cgroup) if cgroup.writable => {
            ok("cgroup v2", place(cgroup.own.as_deref().unwrap_or(&cgroup.mount)))
        }
        Some(cgroup) => {
            warn("cgroup v2", format!("{}, where we may not make a leaf", place(&cgroup.mount)), help)
        }
    }
}

fn place(path: &Path) -> String {
    path.display().to_string()
}

fn check_disk(disk: Option<&DiskSpace>) -> Check {
    let help = "free some space, or set `output_dir` to another file system";
    let Some(disk) = disk else {
        return warn("disk", "the free space cannot be read", help);
    };
    let what = format!("{} free of {} at {}", disk.free, disk.total, disk.path.display());
    match disk.free {
        free if free < DISK_FAIL => fail("disk", what, help),
        free if free < DISK_WARN => warn("disk", what, help),
        _ => ok("disk", what),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;
    use crate::gpu::{GpuMemory, Health, MemorySource, MigMode};
    use crate::host::{CgroupV2, HostMemory};

    fn device(index: u32) -> GpuState {
        GpuState {
            index,
            uuid: Some(format!("GPU-{index}")),
            name: Some("NVIDIA A100".to_owned()),
            health: Health::Healthy,
            memory: Some(GpuMemory {
                total: Bytes::from_gib(80),
                reserved: Some(Bytes::ZERO),
                used: Bytes::ZERO,
                free: Bytes::from_gib(80),
                source: MemorySource::Nvml,
            }),
            compute_capability: Some(ComputeCapability::AMPERE),
            mig: MigMode::Disabled,
            compute_mode: Some(ComputeMode::Default),
            processes: Some(Vec::new()),
            notes: Vec::new(),
        }
    }

    fn gpus(devices: Vec<GpuState>) -> GpuReport {
        let nvml = NvmlState::Ready { driver: Some("570.1".into()), cuda: Some("12.8".into()), devices };
        GpuReport { library: "libnvidia-ml.so.1".to_owned(), nvml }
    }

    fn environment(versions: &[(&str, &str)]) -> TrainerEnvironment {
        let everything = [
            ("ms-swift", "4.6.0"),
            ("transformers", "5.19.0"),
            ("torch", "2.9.0+cu128"),
            ("peft", "0.20.0"),
            ("flash-attn", "2.8.0"),
            ("bitsandbytes", "0.48.0"),
            ("liger-kernel", "0.6.0"),
            ("deepspeed", "0.18.0"),
        ];
        let packages: BTreeMap<String, String> = everything
            .iter()
            .chain(versions)
            .map(|(name, version)| ((*name).to_owned(), (*version).to_owned()))
            .filter(|(_, version)| !version.is_empty())
            .collect();
        let removed =
            |name: &str| versions.iter().any(|(other, version)| *other == name && version.is_empty());
        TrainerEnvironment {
            python: PathBuf::from("/opt/e/bin/python"),
            python_version: "3.11.7".to_owned(),
            sft_script: Some(PathBuf::from("/opt/e/sft.py")),
            packages: packages.into_iter().filter(|(name, _)| !removed(name)).collect(),
            bytecode: true,
        }
    }

    fn report(gpus: GpuReport, environment: TrainerEnvironment) -> ProbeReport {
        let space = |gib| DiskSpace {
            path: PathBuf::from("/"),
            total: Bytes::from_gib(gib),
            free: Bytes::from_gib(gib),
        };
        ProbeReport {
            gpus,
            host: HostReport {
                hostname: None,
                boot_id: None,
                cores: 8,
                memory: Some(HostMemory { total: Bytes::from_gib(64), available: Bytes::from_gib(60) }),
                shared_memory: Some(space(8)),
                cgroup: Some(CgroupV2 { mount: PathBuf::from("/sys/fs/cgroup"), own: None, writable: true }),
            },
            disk: Some(space(500)),
            trainer: TrainerReport::Ready(environment),
        }
    }

    fn state(report: &DoctorReport, name: &str) -> CheckState {
        let check = report.checks.iter().find(|check| check.name == name);
        check.unwrap_or_else(|| panic!("no check named {name}")).state
    }

    #[test]
    fn a_complete_machine_is_healthy_without_a_warning() {
        let doctor = examine(&report(gpus(vec![device(0)]), environment(&[])));
        let not_ok: Vec<&Check> =
            doctor.checks.iter().filter(|check| check.state != CheckState::Ok).collect();
        assert!(doctor.healthy && not_ok.is_empty(), "{not_ok:?}");
    }

    #[test]
    fn whatever_is_not_ok_says_what_to_do() {
        let mut broken =
            report(gpus(Vec::new()), environment(&[("torch", ""), ("peft", ""), ("flash-attn", "")]));
        broken.disk = None;
        broken.host.cgroup = None;
        broken.host.shared_memory = None;
        broken.host.memory = None;
        let doctor = examine(&broken);
        assert!(!doctor.healthy);
        for check in doctor.checks.iter().filter(|check| check.state != CheckState::Ok) {
            assert!(check.help.as_ref().is_some_and(|help| !help.is_empty()), "{check:?}");
        }
    }

    #[test]
    fn one_bad_card_of_two_warns_and_an_only_one_fails() {
        let lost = GpuState { health: Health::Lost, ..device(0) };
        let sliced = GpuState { mig: MigMode::Enabled, ..device(0) };
        for bad in [lost, sliced] {
            let alone = examine(&report(gpus(vec![bad.clone()]), environment(&[])));
            assert_eq!(state(&alone, "GPU 0"), CheckState::Fail);
            let with_another = examine(&report(gpus(vec![bad, device(1)]), environment(&[])));
            assert_eq!(state(&with_another, "GPU 0"), CheckState::Warn);
            assert!(with_another.healthy);
        }
    }

    #[test]
    fn an_old_or_exclusive_card_warns() {
        let old =
            GpuState { compute_capability: Some(ComputeCapability { major: 7, minor: 5 }), ..device(0) };
        let doctor = examine(&report(gpus(vec![old]), environment(&[("flash-attn", "")])));
        assert_eq!(state(&doctor, "GPU 0"), CheckState::Warn);
        assert_eq!(state(&doctor, "flash-attn"), CheckState::Ok, "that card could not use it");
        let exclusive = GpuState { compute_mode: Some(ComputeMode::ExclusiveProcess), ..device(0) };
        let doctor = examine(&report(gpus(vec![exclusive]), environment(&[])));
        assert_eq!(state(&doctor, "GPU 0"), CheckState::Warn);
    }

    #[test]
    fn the_pair_of_ms_swift_and_transformers_is_checked() {
        let cases = [
            ("4.6.0", "5.19.0", CheckState::Ok),
            ("4.6.0", "5.20.0", CheckState::Fail),
            ("4.6.0", "4.32.1", CheckState::Fail),
            ("3.12.6", "4.57.6", CheckState::Ok),
            ("3.12.6", "4.58.0", CheckState::Fail),
            ("5.0.0", "6.0.0", CheckState::Ok),
            ("4.6.0", "", CheckState::Fail),
        ];
        for (ms_swift, transformers, expected) in cases {
            let environment = environment(&[("ms-swift", ms_swift), ("transformers", transformers)]);
            let doctor = examine(&report(gpus(vec![device(0)]), environment));
            assert_eq!(state(&doctor, "transformers"), expected, "{ms_swift} with {transformers}");
        }
        let unknown = examine(&report(gpus(vec![device(0)]), environment(&[("ms-swift", "5.0.0")])));
        assert_eq!(state(&unknown, "ms-swift"), CheckState::Warn);
    }

    #[test]
    fn the_build_of_torch_must_suit_the_driver() {
        let cases = [
            ("2.9.0+cu128", CheckState::Ok),
            ("2.9.0", CheckState::Ok),
            ("2.15.0+cu132", CheckState::Fail),
            ("2.9.0+cpu", CheckState::Warn),
            ("2.9.0+rocm6.4", CheckState::Warn),
            ("", CheckState::Fail),
        ];
        for (torch, expected) in cases {
            let doctor = examine(&report(gpus(vec![device(0)]), environment(&[("torch", torch)])));
            assert_eq!(state(&doctor, "torch"), expected, "{torch}");
        }
    }

    #[test]
    fn a_missing_trainer_is_one_failure_and_not_ten() {
        let mut without = report(gpus(vec![device(0)]), environment(&[]));
        without.trainer = TrainerReport::Missing { error: "nowhere".to_owned(), help: None };
        let doctor = examine(&without);
        let failed = doctor.checks.iter().filter(|check| check.state == CheckState::Fail);
        assert_eq!(failed.map(|check| check.name.as_str()).collect::<Vec<_>>(), ["trainer"]);
    }

    #[test]
    fn little_room_warns_and_none_fails() {
        let mut report = report(gpus(vec![device(0)]), environment(&[]));
        let mut with_free = |free| {
            report.disk = Some(DiskSpace { path: PathBuf::from("/"), total: Bytes::from_gib(500), free });
            report.host.shared_memory = report.disk.clone();
            examine(&report)
        };
        assert_eq!(state(&with_free(Bytes::from_gib(5)), "disk"), CheckState::Warn);
        let tiny = with_free(Bytes::from_mib(64));
        assert_eq!(state(&tiny, "disk"), CheckState::Fail);
        assert_eq!(state(&tiny, "/dev/shm"), CheckState::Warn);
    }
}
