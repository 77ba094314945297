//! What does the NVIDIA driver say about the cards?
//!
//! [`Gpus`] keeps the library open and is asked again and again: by `probe` once, by a run every second. It opens the
//! library at the first question, and again after any answer that says that the connection is bad, so a driver that
//! comes back is seen.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use mhtrain_sizing::gpu::ComputeCapability;
use mhtrain_sizing::units::Bytes;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper::{Device, Nvml};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System, UpdateKind, Users};

use crate::gpu::{
    ComputeMode, GpuMemory, GpuProcess, GpuReport, GpuState, Health, MemorySource, MigMode, NvmlState,
};
use crate::host;

/// The driver's library where nothing else is said.
pub const DEFAULT_LIBRARY: &str = "libnvidia-ml.so.1";

/// A question about one card that has no answer.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// NVML does not start.
    #[error("{what}")]
    NotReady {
        /// What is wrong.
        what: String,
        /// What to do.
        help: String,
    },
    /// The card does not answer.
    #[error("GPU {uuid} does not answer: {source}")]
    Device {
        /// Which card.
        uuid: String,
        /// What NVML said.
        source: NvmlError,
    },
}

impl GpuError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            GpuError::NotReady { help, .. } => Some(help.clone()),
            GpuError::Device { source: NvmlError::NotFound, .. } => {
                Some("`mhtraind probe` lists the cards".to_owned())
            }
            GpuError::Device { source: NvmlError::GpuLost, .. } => Some(
                "look for `Xid` in `dmesg`; a lost card usually comes back only with a reboot".to_owned(),
            ),
            GpuError::Device { .. } => {
                Some("run `nvidia-smi -q` and see what it says about this card".to_owned())
            }
        }
    }
}

/// A connection to NVML that mends itself. Its clones share it: to load the library and find its four hundred functions takes
/// 0.6 ms, and a driver's NVML much longer to start.
#[derive(Clone, Debug)]
pub struct Gpus {
    library: PathBuf,
    open: Arc<Mutex<Option<Arc<Nvml>>>>,
}

/// Returns what NVML says, through `library` or the driver's own.
pub fn probe_gpus(library: Option<&Path>) -> GpuReport {
    Gpus::new(library).report()
}

impl Gpus {
    /// Returns a connection through `library` or the driver's own; it is opened by the first question.
    pub fn new(library: Option<&Path>) -> Gpus {
        Gpus { library: library.unwrap_or(Path::new(DEFAULT_LIBRARY)).to_owned(), open: Arc::default() }
    }

    /// Returns all cards, with their processes and whose they are.
    pub fn report(&self) -> GpuReport {
        let library = self.library.display().to_string();
        let answer =
            self.connected().and_then(|nvml| read_all(&nvml).inspect_err(|_| self.disconnect(&nvml)));
        GpuReport { library, nvml: answer.unwrap_or_else(nvml_state) }
    }

    /// Brings those cards of a report up to date that are `wanted`, which takes the less the fewer they are. Where it is not
    /// as it was, all cards are asked.
    pub fn refresh(&self, report: &mut GpuReport, wanted: impl Fn(&GpuState) -> bool) {
        let refreshed = match &mut report.nvml {
            NvmlState::Ready { devices, .. } => self.connected().is_ok_and(|nvml| {
                let mut those: Vec<&mut GpuState> =
                    devices.iter_mut().filter(|state| wanted(state)).collect();
                read_again(&nvml, &mut those)
            }),
            _ => false,
        };
        if !refreshed {
            *report = self.report();
        }
    }

    /// Returns the memory of the card with this UUID.
    ///
    /// # Errors
    ///
    /// NVML does not start, knows no such card, or the card does not answer.
    pub fn memory(&self, uuid: &str) -> Result<GpuMemory, GpuError> {
        self.ask(uuid, |device| read_memory(device).map(|(memory, _)| memory))
    }

    /// Returns the index of the card with this UUID: asked right before a spawn, because an index can change.
    ///
    /// # Errors
    ///
    /// As [`Gpus::memory`].
    pub fn index_of(&self, uuid: &str) -> Result<u32, GpuError> {
        self.ask(uuid, |device| device.index())
    }

    /// Returns what each process holds on that card, by pid; `None` where the driver does not say how much.
    ///
    /// # Errors
    ///
    /// As [`Gpus::memory`].
    pub fn processes(&self, uuid: &str) -> Result<BTreeMap<u32, Option<Bytes>>, GpuError> {
        self.ask(uuid, read_processes)
    }

    /// Returns what these processes together hold on that card. `None`: the driver names one of them but not how much.
    ///
    /// # Errors
    ///
    /// As [`Gpus::memory`].
    pub fn used_by(&self, uuid: &str, pids: &[u32]) -> Result<Option<Bytes>, GpuError> {
        let processes = self.processes(uuid)?;
        Ok(processes
            .into_iter()
            .filter(|(pid, _)| pids.contains(pid))
            .map(|(_, used)| used)
            .sum::<Option<Bytes>>())
    }

    /// Returns the share of the last second or so in which the card computed, in percent, whoever used it.
    ///
    /// # Errors
    ///
    /// As [`Gpus::memory`]; some cards do not say.
    pub fn utilization(&self, uuid: &str) -> Result<u32, GpuError> {
        self.ask(uuid, |device| Ok(device.utilization_rates()?.gpu))
    }

    fn ask<T>(
        &self,
        uuid: &str,
        question: impl FnOnce(&Device<'_>) -> Result<T, NvmlError>,
    ) -> Result<T, GpuError> {
        let library = self.library.display().to_string();
        let nvml = self.connected().map_err(|error| {
            let fallback = (error.to_string(), String::new());
            let (what, help) = nvml_state(error).problem(&library).unwrap_or(fallback);
            GpuError::NotReady { what, help }
        })?;
        let answer = nvml.device_by_uuid(uuid).and_then(|device| question(&device));
        answer.map_err(|source| {
            if connection_is_bad(&source) {
                self.disconnect(&nvml);
            }
            GpuError::Device { uuid: uuid.to_owned(), source }
        })
    }

    fn connected(&self) -> Result<Arc<Nvml>, NvmlError> {
        let mut shared = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let nvml = match shared.take() {
            Some(nvml) => nvml,
            None => Arc::new(open(&self.library)?),
        };
        Ok(Arc::clone(shared.insert(nvml)))
    }

    /// Lets the next question open the library again, if nobody did meanwhile.
    fn disconnect(&self, bad: &Arc<Nvml>) {
        let mut shared = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.as_ref().is_some_and(|open| Arc::ptr_eq(open, bad)) {
            *shared = None;
        }
    }
}

/// Opens the library and starts NVML.
///
/// The wrapper's `Drop` calls `nvmlShutdown` and panics where a library lacks it. No NVML does, but the path is the
/// user's, so such a library is refused, and the connection to it is left open.
fn open(library: &Path) -> Result<Nvml, NvmlError> {
    let nvml = ManuallyDrop::new(Nvml::builder().lib_path(OsStr::new(library)).init()?);
    match &nvml.lib().nvmlShutdown {
        Ok(_) => Ok(ManuallyDrop::into_inner(nvml)),
        Err(error) => Err(NvmlError::FailedToLoadSymbol(error.to_string())),
    }
}

/// Whether the library should be opened anew before the next question. An answer about the question or about one card
/// is no such sign.
fn connection_is_bad(error: &NvmlError) -> bool {
    !matches!(
        error,
        NvmlError::NotSupported
            | NvmlError::NotFound
            | NvmlError::InvalidArg
            | NvmlError::NoPermission
            | NvmlError::GpuLost
            | NvmlError::ResetRequired
            | NvmlError::FunctionNotFound
            | NvmlError::FailedToLoadSymbol(_)
            | NvmlError::InsufficientSize(_)
    )
}

fn nvml_state(error: NvmlError) -> NvmlState {
    match error {
        NvmlError::LibloadingError(source) => NvmlState::NoLibrary { error: with_cause(&source) },
        NvmlError::FailedToLoadSymbol(text) => {
            NvmlState::NoLibrary { error: format!("it is no NVML library: {text}") }
        }
        NvmlError::LibraryNotFound => NvmlState::NoLibrary { error: error.to_string() },
        NvmlError::DriverNotLoaded => NvmlState::DriverNotLoaded,
        NvmlError::LibRmVersionMismatch => NvmlState::VersionMismatch,
        NvmlError::NoPermission => NvmlState::NoPermission,
        other => NvmlState::Failed { error: other.to_string() },
    }
}

/// Returns an error with its causes: the loader's own words are one level down.
fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        let words = deeper.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = deeper.source();
    }
    text
}

fn read_all(nvml: &Nvml) -> Result<NvmlState, NvmlError> {
    let count = nvml.device_count()?;
    let mut devices: Vec<GpuState> = (0..count).map(|index| read_device(nvml, index)).collect();
    name_owners(&mut devices.iter_mut().collect::<Vec<_>>());
    Ok(NvmlState::Ready {
        driver: nvml.sys_driver_version().ok(),
        cuda: nvml.sys_cuda_driver_version().ok().map(|version| {
            let (major, minor) = (
                nvml_wrapper::cuda_driver_version_major(version),
                nvml_wrapper::cuda_driver_version_minor(version),
            );
            format!("{major}.{minor}")
        }),
        devices,
    })
}

/// Asks these cards everything again. Returns whether each is still the card that it was, and answers.
fn read_again(nvml: &Nvml, devices: &mut [&mut GpuState]) -> bool {
    for state in devices.iter_mut() {
        let now = read_device(nvml, state.index);
        if now.uuid != state.uuid || now.health != Health::Healthy {
            return false;
        }
        **state = now;
    }
    name_owners(devices);
    true
}

fn read_device(nvml: &Nvml, index: u32) -> GpuState {
    let mut state = GpuState {
        index,
        uuid: None,
        name: None,
        health: Health::Healthy,
        memory: None,
        compute_capability: None,
        mig: MigMode::NotSupported,
        compute_mode: None,
        processes: None,
        notes: Vec::new(),
    };
    match nvml.device_by_index(index) {
        Ok(device) => fill_in(&mut state, &device),
        Err(error) => state.health = health_after(&error),
    }
    state
}

/// Asks one card everything. What is not supported stays empty with a note; any other error is the card's health.
fn fill_in(state: &mut GpuState, device: &Device<'_>) {
    state.uuid = noted(state, "UUID", device.uuid());
    state.name = noted(state, "name", device.name());
    state.compute_capability =
        noted(state, "compute capability", device.cuda_compute_capability()).and_then(|found| {
            Some(ComputeCapability {
                major: found.major.try_into().ok()?,
                minor: found.minor.try_into().ok()?,
            })
        });
    state.mig = match device.mig_mode() {
        Ok(mode) if mode.current == 1 => MigMode::Enabled,
        Ok(_) => MigMode::Disabled,
        Err(NvmlError::NotSupported) => MigMode::NotSupported,
        Err(error) => noted(state, "MIG mode", Err(error)).unwrap_or(MigMode::NotSupported),
    };
    state.compute_mode = noted(state, "compute mode", device.compute_mode()).map(compute_mode);
    if let Some((memory, note)) = noted(state, "memory", read_memory(device)) {
        state.memory = Some(memory);
        state.notes.extend(note);
    }
    let processes = noted(state, "processes", read_processes(device));
    state.processes = processes.map(|processes| {
        let process = |(pid, used)| GpuProcess { pid, used, owner: None, command: None };
        processes.into_iter().map(process).collect()
    });
    if state.processes.iter().flatten().any(|process| process.used.is_none()) {
        state
            .notes
            .push("memory of single processes: not available (usual in containers and under WSL)".to_owned());
    }
}

/// Returns the value, or notes why there is none.
fn noted<T>(state: &mut GpuState, what: &str, answer: Result<T, NvmlError>) -> Option<T> {
    match answer {
        Ok(value) => Some(value),
        Err(error) => {
            match error {
                NvmlError::NotSupported | NvmlError::FunctionNotFound | NvmlError::FailedToLoadSymbol(_) => {
                    state.notes.push(format!("{what}: not available from this driver or card"));
                }
                NvmlError::Utf8Error(_) | NvmlError::UnexpectedVariant(_) => {
                    state.notes.push(format!("{what}: not readable: {error}"));
                }
                error if state.health == Health::Healthy => state.health = health_after(&error),
                _ => {}
            }
            None
        }
    }
}

fn health_after(error: &NvmlError) -> Health {
    match error {
        NvmlError::GpuLost => Health::Lost,
        NvmlError::ResetRequired => Health::ResetRequired,
        NvmlError::NoPermission => Health::NoPermission,
        other => Health::Failed { error: other.to_string() },
    }
}

fn compute_mode(mode: nvml_wrapper::enum_wrappers::device::ComputeMode) -> ComputeMode {
    use nvml_wrapper::enum_wrappers::device::ComputeMode as Nvml;
    match mode {
        Nvml::Default => ComputeMode::Default,
        Nvml::ExclusiveThread => ComputeMode::ExclusiveThread,
        Nvml::Prohibited => ComputeMode::Prohibited,
        Nvml::ExclusiveProcess => ComputeMode::ExclusiveProcess,
    }
}

/// Returns the memory of a card, and a note where it does not come from the second version of the call.
///
/// Drivers before 510 have only the first version, in which the reserved part counts as used. Cards that share the
/// host's memory support neither: then the host's figures stand in.
fn read_memory(device: &Device<'_>) -> Result<(GpuMemory, Option<String>), NvmlError> {
    match device.memory_info() {
        Ok(memory) => {
            let memory = GpuMemory {
                total: Bytes::new(memory.total),
                reserved: Some(Bytes::new(memory.reserved)),
                used: Bytes::new(memory.used),
                free: Bytes::new(memory.free),
                source: MemorySource::Nvml,
            };
            Ok((memory, None))
        }
        Err(NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound | NvmlError::NotSupported) => {
            read_memory_otherwise(device)
        }
        Err(error) => Err(error),
    }
}

fn read_memory_otherwise(device: &Device<'_>) -> Result<(GpuMemory, Option<String>), NvmlError> {
    match read_memory_first_version(device) {
        Ok(memory) => {
            let note = "memory: this driver has only the first version of the call, so what it reserves counts as used";
            Ok((memory, Some(note.to_owned())))
        }
        Err(NvmlError::NotSupported) => {
            let memory = host::memory().ok_or(NvmlError::NotSupported)?;
            let memory = GpuMemory {
                total: memory.total,
                reserved: None,
                used: memory.total.saturating_sub(memory.available),
                free: memory.available,
                source: MemorySource::Host,
            };
            let note = "memory: the card shares the host's memory, so the host's figures are shown";
            Ok((memory, Some(note.to_owned())))
        }
        Err(error) => Err(error),
    }
}

fn read_memory_first_version(device: &Device<'_>) -> Result<GpuMemory, NvmlError> {
    let symbol = device.nvml().lib().nvmlDeviceGetMemoryInfo.as_ref();
    let call = symbol.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
    // SAFETY: the structure is three integers, for which all bits zero is a value.
    let mut memory = unsafe { std::mem::zeroed() };
    // SAFETY: the handle belongs to the open library that `device` borrows, the symbol comes from that library and has
    // the signature of nvml.h, and `memory` is valid for a write for the length of the call.
    nvml_try(unsafe { call(device.handle(), &mut memory) })?;
    Ok(GpuMemory {
        total: Bytes::new(memory.total),
        reserved: None,
        used: Bytes::new(memory.used),
        free: Bytes::new(memory.free),
        source: MemorySource::NvmlFirstVersion,
    })
}

/// Returns the processes of a card, computing and drawing. One that does both is listed twice by NVML with the same
/// figure, so it is counted once.
fn read_processes(device: &Device<'_>) -> Result<BTreeMap<u32, Option<Bytes>>, NvmlError> {
    let computing = device.running_compute_processes()?;
    let drawing = device.running_graphics_processes().unwrap_or_default();
    let mut processes = BTreeMap::new();
    for process in computing.into_iter().chain(drawing) {
        let used = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(Bytes::new(bytes)),
            UsedGpuMemory::Unavailable => None,
        };
        let known = processes.entry(process.pid).or_insert(used);
        *known = (*known).max(used);
    }
    Ok(processes)
}

/// Looks up whose the processes are and what they run.
fn name_owners(devices: &mut [&mut GpuState]) {
    let processes = || devices.iter().flat_map(|device| device.processes.iter().flatten());
    let pids: Vec<Pid> = processes().map(|process| Pid::from_u32(process.pid)).collect();
    if pids.is_empty() {
        return;
    }
    let Ok(mut system) = System::new() else { return };
    let wanted = ProcessRefreshKind::nothing().with_user(UpdateKind::Always);
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&pids), false, wanted);
    let users = Users::new_with_refreshed_list().ok();
    for process in devices.iter_mut().flat_map(|device| device.processes.iter_mut().flatten()) {
        let Some(found) = system.process(Pid::from_u32(process.pid)) else { continue };
        process.command = Some(found.name().to_string_lossy().into_owned());
        process.owner = found.user_id().map(|id| {
            let user = users.as_ref().and_then(|users| users.get_user_by_id(id));
            user.map_or_else(|| format!("uid {}", **id), |user| user.name().to_owned())
        });
    }
}
