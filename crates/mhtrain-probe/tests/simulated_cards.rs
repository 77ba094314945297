//! The probe against the simulated NVML, in every way that a driver can disappoint.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mhtrain_probe::gpu::{ComputeMode, GpuRefusal, Health, MemorySource, MigMode, NvmlState};
use mhtrain_probe::nvml::{GpuError, Gpus, probe_gpus};
use mhtrain_sizing::units::Bytes;
use nvml_sim::{Fail, FailMode, SimComputeMode, SimDevice, SimFile, SimProcess};

const GIB: u64 = 1 << 30;

/// The file is named by the environment, which all tests of a process share: one at a time.
static ENVIRONMENT: Mutex<()> = Mutex::new(());

struct Simulation {
    directory: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Simulation {
    fn of(file: &SimFile) -> Simulation {
        let alone = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
        let simulation = Simulation { directory: tempfile::tempdir().unwrap(), _alone: alone };
        simulation.rewrite(file);
        // SAFETY: every test of this program that reads or writes the environment holds `ENVIRONMENT`.
        unsafe { std::env::set_var(nvml_sim::FILE_VARIABLE, simulation.directory.path().join("gpus.json")) };
        simulation
    }

    fn rewrite(&self, file: &SimFile) {
        file.write_atomically(&self.directory.path().join("gpus.json")).unwrap();
    }
}

fn library() -> PathBuf {
    nvml_sim::find_library().expect("cargo builds the shared object with this test")
}

fn card(uuid: &str) -> SimDevice {
    SimDevice { reserved: GIB, used: 2 * GIB, ..SimDevice::idle(uuid, "NVIDIA A100", 80 * GIB, "8.0") }
}

fn devices(library: &Path) -> Vec<mhtrain_probe::gpu::GpuState> {
    let report = probe_gpus(Some(library));
    match report.nvml {
        NvmlState::Ready { devices, .. } => devices,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_card_is_read_whole_with_its_processes_and_their_owner() {
    let mut sim = card("GPU-a");
    sim.mig = Some(false);
    sim.compute_mode = SimComputeMode::ExclusiveProcess;
    sim.processes = vec![
        SimProcess { pid: std::process::id(), used: Some(GIB) },
        SimProcess { pid: 0x7fff_fff0, used: Some(GIB) },
    ];
    let _simulation = Simulation::of(&SimFile::new(vec![sim]));
    let report = probe_gpus(Some(&library()));
    let NvmlState::Ready { driver, cuda, devices } = &report.nvml else { panic!("{report:?}") };
    assert_eq!((driver.as_deref(), cuda.as_deref()), (Some("570.00.00"), Some("12.8")));
    let device = &devices[0];
    assert_eq!(device.uuid.as_deref(), Some("GPU-a"));
    assert_eq!(device.name.as_deref(), Some("NVIDIA A100"));
    assert_eq!(device.compute_capability.unwrap().to_string(), "8.0");
    assert_eq!((device.mig, device.compute_mode), (MigMode::Disabled, Some(ComputeMode::ExclusiveProcess)));
    let memory = device.memory.unwrap();
    assert_eq!((memory.total, memory.reserved), (Bytes::from_gib(80), Some(Bytes::from_gib(1))));
    assert_eq!((memory.used, memory.free), (Bytes::from_gib(2), Bytes::from_gib(77)));
    assert_eq!(memory.source, MemorySource::Nvml);
    let processes = device.processes.as_ref().unwrap();
    assert_eq!(processes[0].used, Some(Bytes::from_gib(1)));
    assert!(processes[0].owner.is_some() && processes[0].command.is_some(), "{processes:?}");
    assert_eq!((&processes[1].owner, &processes[1].command), (&None, &None), "there is no such process");
    assert_eq!(device.held_by_others(&[std::process::id()]), Bytes::from_gib(1));
    assert!(device.notes.is_empty(), "{:?}", device.notes);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["state"], "ready");
    assert_eq!(json["devices"][0]["memory"]["free"], 77 * GIB);
    assert_eq!(json["devices"][0]["compute_capability"], "8.0");
}

#[test]
fn no_library_and_no_nvml_are_states_with_help() {
    let missing = probe_gpus(Some(Path::new("/nowhere/libnvidia-ml.so.1")));
    assert!(
        matches!(&missing.nvml, NvmlState::NoLibrary { error } if error.contains("No such file")),
        "{missing:?}"
    );
    let (what, help) = missing.nvml.problem(&missing.library).unwrap();
    assert!(what.contains("/nowhere/libnvidia-ml.so.1") && help.contains("MHTRAIND_NVML_LIBRARY"));
    let other_library = probe_gpus(Some(Path::new("libc.so.6")));
    assert!(
        matches!(&other_library.nvml, NvmlState::NoLibrary { error } if error.contains("no NVML")),
        "{other_library:?}"
    );
}

#[test]
fn each_way_that_nvml_refuses_to_start_is_a_state() {
    let mut file = SimFile::new(vec![card("GPU-a")]);
    let simulation = Simulation::of(&file);
    for (code, expected) in
        [(9, NvmlState::DriverNotLoaded), (18, NvmlState::VersionMismatch), (4, NvmlState::NoPermission)]
    {
        file.init_error = Some(code);
        simulation.rewrite(&file);
        let report = probe_gpus(Some(&library()));
        assert_eq!(report.nvml, expected);
        assert!(report.nvml.problem("lib").is_some() && report.devices().is_empty());
    }
    for code in [999, 15, 12_345] {
        file.init_error = Some(code);
        simulation.rewrite(&file);
        assert!(matches!(probe_gpus(Some(&library())).nvml, NvmlState::Failed { .. }), "{code}");
    }
}

#[test]
fn a_broken_card_is_listed_beside_a_working_one() {
    let modes = [
        (FailMode::Lost, Health::Lost),
        (FailMode::FallenOffBus, Health::Lost),
        (FailMode::ResetRequired, Health::ResetRequired),
        (FailMode::NoPermission, Health::NoPermission),
    ];
    for (mode, expected) in modes {
        let broken = SimDevice { fail: Some(Fail { mode, after_calls: 0 }), ..card("GPU-a") };
        let _simulation = Simulation::of(&SimFile::new(vec![broken, card("GPU-b")]));
        let devices = devices(&library());
        assert_eq!((devices[0].index, &devices[0].health), (0, &expected), "{mode:?}");
        assert!(devices[0].card().is_err());
        assert_eq!(devices[1].health, Health::Healthy);
        assert!(devices[1].card().is_ok());
    }
}

#[test]
fn a_card_that_is_lost_in_the_middle_keeps_what_was_read() {
    let broken = SimDevice { fail: Some(Fail { mode: FailMode::Lost, after_calls: 3 }), ..card("GPU-a") };
    let _simulation = Simulation::of(&SimFile::new(vec![broken]));
    let device = devices(&library()).remove(0);
    assert_eq!((device.health.clone(), device.uuid.as_deref()), (Health::Lost, Some("GPU-a")));
    assert_eq!(device.memory, None);
}

#[test]
fn values_that_are_not_available_are_none_with_a_note() {
    let mut sim = card("GPU-a");
    sim.processes = vec![SimProcess { pid: 7, used: None }];
    let _simulation = Simulation::of(&SimFile::new(vec![sim]));
    let device = devices(&library()).remove(0);
    assert_eq!(device.processes.as_ref().unwrap()[0].used, None);
    assert!(device.notes.iter().any(|note| note.contains("not available")), "{:?}", device.notes);
    assert_eq!(device.held_by_others(&[7]), Bytes::from_gib(2), "what is not known is not ours");
    assert_eq!(device.mig, MigMode::NotSupported);
}

#[test]
fn an_old_driver_is_asked_with_the_first_memory_call() {
    for code in [13, 3] {
        let mut file = SimFile::new(vec![card("GPU-a")]);
        file.memory_v2_error = Some(code);
        let _simulation = Simulation::of(&file);
        let device = devices(&library()).remove(0);
        let memory = device.memory.unwrap();
        assert_eq!((memory.source, memory.reserved), (MemorySource::NvmlFirstVersion, None));
        assert_eq!((memory.used, memory.free), (Bytes::from_gib(3), Bytes::from_gib(77)));
        assert!(device.card().is_ok() && !device.notes.is_empty());
    }
}

#[test]
fn a_card_that_shares_the_hosts_memory_shows_that() {
    let sim = SimDevice { unified: true, ..card("GPU-a") };
    let _simulation = Simulation::of(&SimFile::new(vec![sim]));
    let device = devices(&library()).remove(0);
    let memory = device.memory.unwrap();
    assert_eq!(memory.source, MemorySource::Host);
    assert_eq!(Some(memory.total), mhtrain_probe::host::memory().map(|host| host.total));
    assert!(device.notes.iter().any(|note| note.contains("shares the host's memory")));
    assert!(device.card().is_ok());
}

#[test]
fn a_sliced_card_is_listed_and_refused() {
    let sim = SimDevice { mig: Some(true), ..card("GPU-a") };
    let _simulation = Simulation::of(&SimFile::new(vec![sim]));
    let device = devices(&library()).remove(0);
    assert_eq!(device.mig, MigMode::Enabled);
    assert_eq!(device.card(), Err(GpuRefusal::Mig { index: 0 }));
}

#[test]
fn a_connection_follows_memory_processes_and_a_driver_that_comes_back() {
    let mut file = SimFile::new(vec![card("GPU-x"), card("GPU-a")]);
    file.devices[1].processes =
        vec![SimProcess { pid: 5, used: Some(GIB) }, SimProcess { pid: 6, used: Some(2 * GIB) }];
    let simulation = Simulation::of(&file);
    let gpus = Gpus::new(Some(&library()));
    assert_eq!(gpus.index_of("GPU-a").unwrap(), 1);
    assert_eq!(gpus.memory("GPU-a").unwrap().used, Bytes::from_gib(2));
    assert_eq!(gpus.used_by("GPU-a", &[5, 6, 7]).unwrap(), Some(Bytes::from_gib(3)));
    assert_eq!(gpus.used_by("GPU-a", &[9]).unwrap(), Some(Bytes::ZERO));
    file.devices[1].processes.push(SimProcess { pid: 7, used: None });
    file.devices[1].used = 9 * GIB;
    simulation.rewrite(&file);
    assert_eq!(gpus.used_by("GPU-a", &[5, 7]).unwrap(), None);
    assert_eq!(gpus.memory("GPU-a").unwrap().used, Bytes::from_gib(9));
    assert!(matches!(gpus.memory("GPU-none"), Err(GpuError::Device { .. })));

    // The driver goes away under us, and comes back.
    std::fs::write(simulation.directory.path().join("gpus.json"), "{").unwrap();
    assert!(matches!(gpus.memory("GPU-a"), Err(GpuError::Device { .. })));
    assert!(matches!(gpus.memory("GPU-a"), Err(GpuError::NotReady { .. })));
    simulation.rewrite(&file);
    assert_eq!(gpus.memory("GPU-a").unwrap().used, Bytes::from_gib(9));
}

#[test]
fn a_process_that_claims_memory_is_followed_until_it_ends() {
    let mut file = SimFile::new(vec![card("GPU-a")]);
    let usage = tempfile::tempdir().unwrap();
    file.usage_dir = Some(usage.path().to_owned());
    let _simulation = Simulation::of(&file);
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    std::fs::write(usage.path().join(format!("GPU-a.{}", child.id())), (4 * GIB).to_string()).unwrap();
    let gpus = Gpus::new(Some(&library()));
    assert_eq!(gpus.used_by("GPU-a", &[child.id()]).unwrap(), Some(Bytes::from_gib(4)));
    assert_eq!(gpus.memory("GPU-a").unwrap().used, Bytes::from_gib(6));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(gpus.memory("GPU-a").unwrap().used, Bytes::from_gib(2));
}
