//! What was read about the cards, and which of them can take a job?
//!
//! Plain values; [`crate::nvml`] fills them in. A field that is `None` is one that the driver would not tell, and
//! [`GpuState::notes`] says why.

use mhtrain_job::spec::DeviceWish;
use mhtrain_sizing::gpu::{Card, ComputeCapability};
use mhtrain_sizing::units::Bytes;
use serde::Serialize;

/// The answer of NVML as a whole.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuReport {
    /// The library that was asked.
    pub library: String,
    /// What it answered.
    #[serde(flatten)]
    pub nvml: NvmlState,
}

/// How far the question to NVML came.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum NvmlState {
    /// The cards are listed.
    Ready {
        /// Driver version, for example `570.86.15`.
        driver: Option<String>,
        /// Newest CUDA version that the driver supports, for example `12.8`.
        cuda: Option<String>,
        /// The cards in the order of their index; may be empty.
        devices: Vec<GpuState>,
    },
    /// The library cannot be opened: no NVIDIA driver is installed here, or its path is wrong.
    NoLibrary {
        /// What the loader said.
        error: String,
    },
    /// The library is there, but the kernel module is not loaded.
    DriverNotLoaded,
    /// The library and the kernel module are of different versions, as after an upgrade without a reboot.
    VersionMismatch,
    /// This user may not ask the driver.
    NoPermission,
    /// Any other answer.
    Failed {
        /// What NVML said.
        error: String,
    },
}

/// One card.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuState {
    /// NVML index, in PCI order.
    pub index: u32,
    /// `GPU-…`
    pub uuid: Option<String>,
    /// Product name.
    pub name: Option<String>,
    /// Whether the card answers.
    pub health: Health,
    /// Its memory.
    pub memory: Option<GpuMemory>,
    /// CUDA compute capability.
    pub compute_capability: Option<ComputeCapability>,
    /// MIG mode.
    pub mig: MigMode,
    /// Compute mode.
    pub compute_mode: Option<ComputeMode>,
    /// Processes that hold memory there; `None` where the driver does not say.
    pub processes: Option<Vec<GpuProcess>>,
    /// Why a value is missing or comes from elsewhere, for people.
    pub notes: Vec<String>,
}

/// Whether a card answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Health {
    /// It does.
    Healthy,
    /// It has fallen off the bus or is otherwise gone.
    Lost,
    /// It must be reset first.
    ResetRequired,
    /// This user may not use it.
    NoPermission,
    /// Any other answer.
    Failed {
        /// What NVML said.
        error: String,
    },
}

/// Memory of a card at one moment.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuMemory {
    /// All of it, the reserved part included.
    pub total: Bytes,
    /// What the driver keeps for itself; `None` where only the first version of the call exists.
    pub reserved: Option<Bytes>,
    /// What processes hold; where `reserved` is unknown it is in here.
    pub used: Bytes,
    /// What can be had.
    pub free: Bytes,
    /// Who said so.
    pub source: MemorySource,
}

/// Where figures about memory come from.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemorySource {
    /// `nvmlDeviceGetMemoryInfo_v2`.
    Nvml,
    /// `nvmlDeviceGetMemoryInfo`, which old drivers have alone.
    NvmlFirstVersion,
    /// The host's memory, on cards that share it (GB10, Grace).
    Host,
}

impl GpuMemory {
    /// Returns what a job could have on an idle card: total less reserved.
    pub fn usable(&self) -> Bytes {
        self.total.saturating_sub(self.reserved.unwrap_or(Bytes::ZERO))
    }
}

/// MIG mode of a card.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MigMode {
    /// The card has no such thing, or does not say.
    NotSupported,
    /// Off.
    Disabled,
    /// On: the card can only be used in slices.
    Enabled,
}

/// Compute mode of a card.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeMode {
    /// Any number of processes.
    Default,
    /// One process at a time, from one thread (no longer supported by drivers).
    ExclusiveThread,
    /// No process may compute.
    Prohibited,
    /// One process at a time.
    ExclusiveProcess,
}

/// A process that holds memory on a card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuProcess {
    /// Process id as the driver sees it; in a container that may be the host's number.
    pub pid: u32,
    /// What it holds; `None`: not available (containers, WSL).
    pub used: Option<Bytes>,
    /// Name of its user; `None` when there is no such process here.
    pub owner: Option<String>,
    /// Name of its program, without arguments: those may hold secrets.
    pub command: Option<String>,
}

/// Why a card cannot take a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuRefusal {
    /// It does not answer.
    #[error("GPU {index} is lost: it has fallen off the bus or is otherwise inaccessible")]
    Lost {
        /// Which card.
        index: u32,
    },
    /// It must be reset.
    #[error("GPU {index} must be reset before it can be used")]
    ResetRequired {
        /// Which card.
        index: u32,
    },
    /// This user may not use it.
    #[error("GPU {index} may not be used by this user")]
    NoPermission {
        /// Which card.
        index: u32,
    },
    /// It answers with an error.
    #[error("GPU {index} does not answer: {error}")]
    Failed {
        /// Which card.
        index: u32,
        /// What NVML said.
        error: String,
    },
    /// It is sliced.
    #[error("GPU {index} has MIG switched on; MIG slices are not supported yet")]
    Mig {
        /// Which card.
        index: u32,
    },
    /// Computing is forbidden.
    #[error("GPU {index} is in compute mode Prohibited")]
    Prohibited {
        /// Which card.
        index: u32,
    },
    /// Somebody has it alone.
    #[error("GPU {index} is in compute mode Exclusive_Process and pid {pid} has it")]
    Exclusive {
        /// Which card.
        index: u32,
        /// The process that has it.
        pid: u32,
    },
    /// Its memory is not known.
    #[error("the free memory of GPU {index} cannot be read")]
    MemoryUnknown {
        /// Which card.
        index: u32,
    },
}

impl GpuRefusal {
    /// Returns what to do about it.
    pub fn help(&self) -> String {
        match self {
            GpuRefusal::Lost { .. } => {
                "look for `Xid` in `dmesg`; a lost card usually comes back only with a reboot; use another device meanwhile".to_owned()
            }
            GpuRefusal::ResetRequired { index } => {
                format!("stop the programs that use it and run `nvidia-smi --gpu-reset -i {index}` as root, or reboot")
            }
            GpuRefusal::NoPermission { index } => {
                format!("check the rights of /dev/nvidia{index}, or pass the device into the container")
            }
            GpuRefusal::Failed { .. } => "run `nvidia-smi -q` and see what it says about this card".to_owned(),
            GpuRefusal::Mig { index } => {
                format!("use another device, or switch MIG off with `nvidia-smi -i {index} -mig 0` as root")
            }
            GpuRefusal::Prohibited { index } => {
                format!("use another device, or run `nvidia-smi -i {index} -c DEFAULT` as root")
            }
            GpuRefusal::Exclusive { index, .. } => {
                format!("wait for that process, use another device, or run `nvidia-smi -i {index} -c DEFAULT` as root")
            }
            GpuRefusal::MemoryUnknown { .. } => {
                "state the memory with --gpu-free and --gpu-total, or update the driver".to_owned()
            }
        }
    }
}

impl GpuState {
    /// Returns the card as the sizing engine sees it.
    ///
    /// # Errors
    ///
    /// The card cannot take a job, and why.
    pub fn card(&self) -> Result<Card, GpuRefusal> {
        let index = self.index;
        match &self.health {
            Health::Healthy => {}
            Health::Lost => return Err(GpuRefusal::Lost { index }),
            Health::ResetRequired => return Err(GpuRefusal::ResetRequired { index }),
            Health::NoPermission => return Err(GpuRefusal::NoPermission { index }),
            Health::Failed { error } => return Err(GpuRefusal::Failed { index, error: error.clone() }),
        }
        if self.mig == MigMode::Enabled {
            return Err(GpuRefusal::Mig { index });
        }
        self.check_compute_mode()?;
        let memory = self.memory.ok_or(GpuRefusal::MemoryUnknown { index })?;
        Ok(Card {
            name: self.name.clone().unwrap_or_else(|| format!("GPU {index}")),
            index: Some(index),
            total: memory.usable(),
            free: memory.free,
            compute_capability: self.compute_capability,
        })
    }

    fn check_compute_mode(&self) -> Result<(), GpuRefusal> {
        let index = self.index;
        match self.compute_mode {
            None | Some(ComputeMode::Default) => Ok(()),
            Some(ComputeMode::Prohibited) => Err(GpuRefusal::Prohibited { index }),
            Some(ComputeMode::ExclusiveProcess | ComputeMode::ExclusiveThread) => {
                match self.processes.iter().flatten().next() {
                    Some(process) => Err(GpuRefusal::Exclusive { index, pid: process.pid }),
                    None => Ok(()),
                }
            }
        }
    }

    /// Returns what others hold there: all that is used, less what the processes `ours` hold.
    ///
    /// Where the driver does not say what a process of ours holds, it counts as the others'.
    pub fn held_by_others(&self, ours: &[u32]) -> Bytes {
        let used = self.memory.map_or(Bytes::ZERO, |memory| memory.used);
        let processes = self.processes.iter().flatten();
        let held_by_us: Bytes =
            processes.filter(|process| ours.contains(&process.pid)).filter_map(|process| process.used).sum();
        used.saturating_sub(held_by_us)
    }
}

/// A device wish that cannot be met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// NVML lists nothing.
    #[error("no GPU can be used: {why}")]
    NoNvml {
        /// What is wrong.
        why: String,
        /// What to do.
        help: String,
    },
    /// No card is there.
    #[error("no GPU can be used: the driver lists none")]
    NoGpus,
    /// No such index.
    #[error("there is no GPU {index}: this machine has {count}, numbered from 0")]
    NoSuchIndex {
        /// What was wished.
        index: u32,
        /// What is there.
        count: usize,
    },
    /// No such UUID.
    #[error("there is no GPU with the UUID {uuid}")]
    NoSuchUuid {
        /// What was wished.
        uuid: String,
        /// What is there.
        known: Vec<String>,
    },
    /// The wished card cannot take a job.
    #[error(transparent)]
    Refused(#[from] GpuRefusal),
    /// `auto`, and none of several cards can take a job.
    #[error("no GPU can be used: {}", join(refusals))]
    AllRefused {
        /// Why, card for card.
        refusals: Vec<GpuRefusal>,
    },
}

fn join(refusals: &[GpuRefusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl ResolveError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            ResolveError::NoNvml { help, .. } => Some(help.clone()),
            ResolveError::NoGpus => {
                Some("check `nvidia-smi -L`, and that the container was started with GPUs".to_owned())
            }
            ResolveError::NoSuchIndex { .. } => Some("`mhtraind probe` lists the cards".to_owned()),
            ResolveError::NoSuchUuid { uuid, .. } if uuid.starts_with("MIG-") => {
                Some("MIG slices are not supported yet".to_owned())
            }
            ResolveError::NoSuchUuid { known, .. } => Some(format!("known are {}", known.join(", "))),
            ResolveError::Refused(refusal) => Some(refusal.help()),
            ResolveError::AllRefused { refusals } => refusals.first().map(GpuRefusal::help),
        }
    }
}

impl NvmlState {
    /// Returns what is wrong and what to do, or `None` when the cards are listed.
    pub fn problem(&self, library: &str) -> Option<(String, String)> {
        let (what, help) = match self {
            NvmlState::Ready { .. } => return None,
            NvmlState::NoLibrary { error } => (
                format!("the NVML library {library} cannot be opened: {error}"),
                "install the NVIDIA driver, start the container with GPUs, or name the library with MHTRAIND_NVML_LIBRARY",
            ),
            NvmlState::DriverNotLoaded => (
                "the NVIDIA kernel module is not loaded".to_owned(),
                "run `modprobe nvidia` as root and look into `dmesg`; after a kernel update the driver may need to be built again",
            ),
            NvmlState::VersionMismatch => (
                format!("{library} and the loaded kernel module are of different driver versions"),
                "the driver was upgraded under a running system: reboot, or reload the nvidia modules",
            ),
            NvmlState::NoPermission => (
                "this user may not ask the NVIDIA driver".to_owned(),
                "check the rights of /dev/nvidiactl and /dev/nvidia*, and the groups of this user",
            ),
            NvmlState::Failed { error } => {
                (format!("NVML does not start: {error}"), "run `nvidia-smi` and see what it says")
            }
        };
        Some((what, help.to_owned()))
    }
}

impl GpuReport {
    /// Returns the cards; none unless NVML is ready.
    pub fn devices(&self) -> &[GpuState] {
        match &self.nvml {
            NvmlState::Ready { devices, .. } => devices,
            NvmlState::NoLibrary { .. }
            | NvmlState::DriverNotLoaded
            | NvmlState::VersionMismatch
            | NvmlState::NoPermission
            | NvmlState::Failed { .. } => &[],
        }
    }

    /// Returns the cards that meet the wish and can take a job, in the order of their index: one unless it is `auto`.
    ///
    /// # Errors
    ///
    /// There is no such card, or it cannot take a job.
    pub fn resolve(&self, wish: &DeviceWish) -> Result<Vec<(&GpuState, Card)>, ResolveError> {
        if let Some((why, help)) = self.nvml.problem(&self.library) {
            return Err(ResolveError::NoNvml { why, help });
        }
        let devices = self.devices();
        match wish {
            DeviceWish::Auto => all_usable(devices),
            DeviceWish::Index(index) => {
                let wished = devices.iter().find(|device| device.index == *index);
                let device =
                    wished.ok_or(ResolveError::NoSuchIndex { index: *index, count: devices.len() })?;
                Ok(vec![(device, device.card()?)])
            }
            DeviceWish::Uuid(uuid) => {
                let device = find_uuid(devices, uuid).ok_or_else(|| ResolveError::NoSuchUuid {
                    uuid: uuid.clone(),
                    known: devices.iter().filter_map(|device| device.uuid.clone()).collect(),
                })?;
                Ok(vec![(device, device.card()?)])
            }
        }
    }
}

fn find_uuid<'a>(devices: &'a [GpuState], uuid: &str) -> Option<&'a GpuState> {
    devices.iter().find(|device| device.uuid.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(uuid)))
}

fn all_usable(devices: &[GpuState]) -> Result<Vec<(&GpuState, Card)>, ResolveError> {
    let mut usable = Vec::new();
    let mut refusals = Vec::new();
    for device in devices {
        match device.card() {
            Ok(card) => usable.push((device, card)),
            Err(refusal) => refusals.push(refusal),
        }
    }
    match (usable.is_empty(), refusals.is_empty()) {
        (false, _) => Ok(usable),
        (true, true) => Err(ResolveError::NoGpus),
        (true, false) => Err(ResolveError::AllRefused { refusals }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: u32) -> GpuState {
        GpuState {
            index,
            uuid: Some(format!("GPU-{index}")),
            name: Some("Card".to_owned()),
            health: Health::Healthy,
            memory: Some(GpuMemory {
                total: Bytes::from_gib(24),
                reserved: Some(Bytes::from_gib(1)),
                used: Bytes::from_gib(5),
                free: Bytes::from_gib(18),
                source: MemorySource::Nvml,
            }),
            compute_capability: None,
            mig: MigMode::Disabled,
            compute_mode: Some(ComputeMode::Default),
            processes: Some(Vec::new()),
            notes: Vec::new(),
        }
    }

    fn process(pid: u32, used: Option<u64>) -> GpuProcess {
        GpuProcess { pid, used: used.map(Bytes::from_gib), owner: None, command: None }
    }

    fn ready(devices: Vec<GpuState>) -> GpuReport {
        GpuReport { library: "lib".to_owned(), nvml: NvmlState::Ready { driver: None, cuda: None, devices } }
    }

    #[test]
    fn a_card_offers_total_less_reserved() {
        let card = gpu(3).card().unwrap();
        assert_eq!((card.total, card.free), (Bytes::from_gib(23), Bytes::from_gib(18)));
        assert_eq!(card.index, Some(3));
    }

    #[test]
    fn only_memory_of_known_size_is_taken_off_what_others_hold() {
        let mut device = gpu(0);
        device.processes = Some(vec![process(1, Some(2)), process(2, None), process(3, Some(1))]);
        assert_eq!(device.held_by_others(&[]), Bytes::from_gib(5));
        assert_eq!(device.held_by_others(&[1, 2]), Bytes::from_gib(3));
    }

    #[test]
    fn a_sliced_prohibited_or_taken_card_is_refused() {
        let mut sliced = gpu(0);
        sliced.mig = MigMode::Enabled;
        let mut prohibited = gpu(1);
        prohibited.compute_mode = Some(ComputeMode::Prohibited);
        let mut taken = gpu(2);
        taken.compute_mode = Some(ComputeMode::ExclusiveProcess);
        assert!(taken.card().is_ok(), "exclusive, but nobody is there");
        taken.processes = Some(vec![process(9, None)]);
        assert_eq!(sliced.card().unwrap_err(), GpuRefusal::Mig { index: 0 });
        assert_eq!(prohibited.card().unwrap_err(), GpuRefusal::Prohibited { index: 1 });
        assert_eq!(taken.card().unwrap_err(), GpuRefusal::Exclusive { index: 2, pid: 9 });
        let report = ready(vec![sliced, prohibited, taken]);
        assert!(
            matches!(report.resolve(&DeviceWish::Auto), Err(ResolveError::AllRefused { refusals }) if refusals.len() == 3)
        );
    }

    #[test]
    fn a_wish_finds_its_card_or_says_what_is_there() {
        let mut lost = gpu(1);
        lost.health = Health::Lost;
        let report = ready(vec![gpu(0), lost]);
        let uuid = |text: &str| DeviceWish::Uuid(text.to_owned());
        assert_eq!(report.resolve(&DeviceWish::Auto).unwrap().len(), 1);
        assert_eq!(report.resolve(&uuid("gpu-0")).unwrap()[0].0.index, 0);
        assert_eq!(
            report.resolve(&DeviceWish::Index(1)),
            Err(ResolveError::Refused(GpuRefusal::Lost { index: 1 }))
        );
        assert_eq!(
            report.resolve(&DeviceWish::Index(7)),
            Err(ResolveError::NoSuchIndex { index: 7, count: 2 })
        );
        let unknown = report.resolve(&uuid("GPU-9")).unwrap_err();
        assert_eq!(unknown.help().unwrap(), "known are GPU-0, GPU-1");
        let slice = report.resolve(&uuid("MIG-1")).unwrap_err();
        assert_eq!(slice.help().unwrap(), "MIG slices are not supported yet");
        assert_eq!(ready(Vec::new()).resolve(&DeviceWish::Auto), Err(ResolveError::NoGpus));
    }
}
