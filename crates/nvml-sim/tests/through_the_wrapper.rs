//! The shared object as nvml-wrapper sees it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nvml_sim::{Fail, FailMode, SimComputeMode, SimDevice, SimFile, SimProcess};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::ComputeMode;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;

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
        // SAFETY: only tests that hold `ENVIRONMENT` touch or read the environment in this program.
        unsafe { std::env::set_var(nvml_sim::FILE_VARIABLE, simulation.path()) };
        simulation
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("gpus.json")
    }

    fn rewrite(&self, file: &SimFile) {
        file.write_atomically(&self.path()).unwrap();
    }
}

fn open() -> Result<Nvml, NvmlError> {
    let library = nvml_sim::find_library().expect("cargo builds the shared object with this test");
    Nvml::builder().lib_path(OsStr::new(&library)).init()
}

fn card(uuid: &str) -> SimDevice {
    SimDevice { reserved: GIB, used: 2 * GIB, ..SimDevice::idle(uuid, "NVIDIA A100", 80 * GIB, "8.0") }
}

#[test]
fn a_healthy_machine_answers_every_question() {
    let mut first = card("GPU-a");
    first.mig = Some(false);
    first.compute_mode = SimComputeMode::ExclusiveProcess;
    first.processes = vec![SimProcess { pid: 11, used: Some(GIB) }, SimProcess { pid: 12, used: None }];
    let _simulation = Simulation::of(&SimFile::new(vec![first, card("GPU-b")]));
    let nvml = open().unwrap();
    assert_eq!(nvml.sys_driver_version().unwrap(), "570.00.00");
    assert_eq!(nvml.sys_cuda_driver_version().unwrap(), 12_080);
    assert!(nvml.sys_nvml_version().unwrap().contains("570"));
    assert_eq!(nvml.device_count().unwrap(), 2);
    let device = nvml.device_by_index(0).unwrap();
    assert_eq!(device.uuid().unwrap(), "GPU-a");
    assert_eq!(device.name().unwrap(), "NVIDIA A100");
    assert_eq!(device.index().unwrap(), 0);
    assert_eq!(device.minor_number().unwrap(), 0);
    let memory = device.memory_info().unwrap();
    assert_eq!((memory.total, memory.reserved, memory.used), (80 * GIB, GIB, 2 * GIB));
    assert_eq!(memory.free, 77 * GIB);
    let capability = device.cuda_compute_capability().unwrap();
    assert_eq!((capability.major, capability.minor), (8, 0));
    assert_eq!(device.mig_mode().unwrap().current, 0);
    assert_eq!(device.compute_mode().unwrap(), ComputeMode::ExclusiveProcess);
    let processes = device.running_compute_processes().unwrap();
    assert_eq!(processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [11, 12]);
    assert_eq!(processes[0].used_gpu_memory, UsedGpuMemory::Used(GIB));
    assert_eq!(processes[1].used_gpu_memory, UsedGpuMemory::Unavailable);
    assert!(device.running_graphics_processes().unwrap().is_empty());
    assert_eq!(device.utilization_rates().unwrap().gpu, 100);
    assert!(device.temperature(nvml_wrapper::enum_wrappers::device::TemperatureSensor::Gpu).is_ok());
    assert!(device.power_usage().is_ok());
    let second = nvml.device_by_uuid("GPU-b").unwrap();
    assert_eq!(second.index().unwrap(), 1);
    let address = second.pci_info().unwrap().bus_id;
    assert_eq!(nvml.device_by_pci_bus_id(address).unwrap().uuid().unwrap(), "GPU-b");
    assert!(matches!(second.mig_mode(), Err(NvmlError::NotSupported)));
    assert!(matches!(nvml.device_by_index(2), Err(NvmlError::InvalidArg)));
    assert!(matches!(nvml.device_by_uuid("GPU-c"), Err(NvmlError::NotFound)));
}

#[test]
fn a_new_file_is_seen_by_the_next_call() {
    let simulation = Simulation::of(&SimFile::new(vec![card("GPU-a")]));
    let nvml = open().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    assert_eq!(device.memory_info().unwrap().used, 2 * GIB);
    simulation.rewrite(&SimFile::new(vec![SimDevice { used: 70 * GIB, ..card("GPU-a") }]));
    assert_eq!(device.memory_info().unwrap().used, 70 * GIB);
}

#[test]
fn init_fails_as_the_file_says() {
    let mut file = SimFile::new(Vec::new());
    file.init_error = Some(18);
    let simulation = Simulation::of(&file);
    assert!(matches!(open(), Err(NvmlError::LibRmVersionMismatch)));
    file.init_error = Some(9);
    simulation.rewrite(&file);
    assert!(matches!(open(), Err(NvmlError::DriverNotLoaded)));
    std::fs::write(simulation.path(), "{").unwrap();
    assert!(matches!(open(), Err(NvmlError::Unknown)));
    std::fs::remove_file(simulation.path()).unwrap();
    assert!(matches!(open(), Err(NvmlError::Unknown)));
}

#[test]
fn a_lost_card_stays_lost_and_its_neighbour_works() {
    let mut lost = card("GPU-a");
    lost.fail = Some(Fail { mode: FailMode::Lost, after_calls: 2 });
    let simulation = Simulation::of(&SimFile::new(vec![lost, card("GPU-b")]));
    let nvml = open().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    assert!(device.memory_info().is_ok());
    assert!(matches!(device.memory_info(), Err(NvmlError::GpuLost)));
    simulation.rewrite(&SimFile::new(vec![card("GPU-a"), card("GPU-b")]));
    assert!(matches!(device.memory_info(), Err(NvmlError::GpuLost)), "the file cannot mend it");
    assert!(nvml.device_by_index(1).unwrap().memory_info().is_ok());
}

#[test]
fn a_card_off_the_bus_gives_no_handle() {
    let mut gone = card("GPU-a");
    gone.fail = Some(Fail { mode: FailMode::FallenOffBus, after_calls: 0 });
    let _simulation = Simulation::of(&SimFile::new(vec![gone]));
    let nvml = open().unwrap();
    assert_eq!(nvml.device_count().unwrap(), 1);
    assert!(matches!(nvml.device_by_index(0), Err(NvmlError::GpuLost)));
}

#[test]
fn an_old_driver_has_only_the_first_memory_call() {
    let mut file = SimFile::new(vec![card("GPU-a")]);
    file.memory_v2_error = Some(13);
    let _simulation = Simulation::of(&file);
    let nvml = open().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    assert!(matches!(device.memory_info(), Err(NvmlError::FunctionNotFound)));
    let first_version = nvml.lib().nvmlDeviceGetMemoryInfo.as_ref().unwrap();
    // SAFETY: all-zero is a valid value of this structure of integers.
    let mut memory = unsafe { std::mem::zeroed() };
    // SAFETY: the handle is alive, and `memory` outlives the call.
    let code = unsafe { first_version(device.handle(), &mut memory) };
    assert_eq!(code, 0);
    assert_eq!((memory.total, memory.free, memory.used), (80 * GIB, 77 * GIB, 3 * GIB));
}

#[test]
fn a_unified_card_has_no_memory_of_its_own() {
    let unified = SimDevice { unified: true, ..card("GPU-a") };
    let _simulation = Simulation::of(&SimFile::new(vec![unified]));
    let nvml = open().unwrap();
    assert!(matches!(nvml.device_by_index(0).unwrap().memory_info(), Err(NvmlError::NotSupported)));
}
