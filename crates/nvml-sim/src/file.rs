//! What does the file say that drives the simulation?

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The whole simulated machine. JSON; unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimFile {
    /// Version of this format: 1.
    pub version: u32,
    /// What `nvmlSystemGetDriverVersion` answers.
    #[serde(default = "default_driver_version")]
    pub driver_version: String,
    /// What `nvmlSystemGetCudaDriverVersion_v2` answers: 1000 x major + 10 x minor.
    #[serde(default = "default_cuda_version")]
    pub cuda_version: i32,
    /// Return code of `nvmlInit_v2`, for example 9 (driver not loaded) or 18 (library and driver differ in version).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_error: Option<u32>,
    /// Return code of the second version of the memory call. 13 (function not found) plays a driver before 510.
    /// A symbol cannot vanish from a library at run time, so a code stands in for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_v2_error: Option<u32>,
    /// Directory of usage files; [`crate::USAGE_VARIABLE`] wins over it.
    ///
    /// A file `<uuid>.<pid>` holds a decimal number of bytes that this process uses on that card. It counts as long as
    /// `/proc/<pid>` is a live process (a zombie has given its memory back).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage_dir: Option<PathBuf>,
    /// The cards, in the order of their index.
    #[serde(default)]
    pub devices: Vec<SimDevice>,
}

fn default_driver_version() -> String {
    "570.00.00".to_owned()
}

fn default_cuda_version() -> i32 {
    12_080
}

/// One simulated card. Amounts are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimDevice {
    /// `GPU-…`
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// All memory, the reserved part included.
    pub total: u64,
    /// What the driver keeps for itself.
    #[serde(default)]
    pub reserved: u64,
    /// What processes use, without the usage files.
    #[serde(default)]
    pub used: u64,
    /// For example `8.6`.
    pub compute_capability: String,
    /// MIG: `null` the card has no such thing, `false` off, `true` on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mig: Option<bool>,
    /// Compute mode.
    #[serde(default)]
    pub compute_mode: SimComputeMode,
    /// The card shares the host's memory, so both memory calls answer 3 (not supported).
    #[serde(default)]
    pub unified: bool,
    /// Processes on the card. They need not exist. Their memory is already counted in `used`.
    #[serde(default)]
    pub processes: Vec<SimProcess>,
    /// How and when the card breaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fail: Option<Fail>,
}

/// Compute mode of a card, by the numbers of `nvmlComputeMode_t`.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SimComputeMode {
    /// Any number of processes.
    #[default]
    Default,
    /// No process may compute.
    Prohibited,
    /// One process may compute.
    ExclusiveProcess,
}

impl SimComputeMode {
    pub(crate) fn code(self) -> u32 {
        match self {
            SimComputeMode::Default => 0,
            SimComputeMode::Prohibited => 2,
            SimComputeMode::ExclusiveProcess => 3,
        }
    }
}

/// A process on a card.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimProcess {
    /// Process id.
    pub pid: u32,
    /// Bytes that it uses; `null` is shown as "not available", as in containers and under WSL.
    pub used: Option<u64>,
}

/// How a card breaks. A broken card stays broken for the life of the process that loaded the library, whatever the
/// file says later: a real one needs a reset or a reboot.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fail {
    /// What it answers then.
    pub mode: FailMode,
    /// How many calls about this card still work.
    #[serde(default)]
    pub after_calls: u64,
}

/// What a broken card answers.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailMode {
    /// A handle is given; every question about it is answered by 15 (GPU is lost).
    Lost,
    /// Not even a handle is given: 15.
    FallenOffBus,
    /// Questions are answered by 16 (reset required).
    ResetRequired,
    /// No handle is given: 4 (no permission), as when a container may not open the device.
    NoPermission,
    /// Questions are answered by 999 (unknown).
    Unknown,
}

/// A simulation file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SimFileError {
    /// The file system refused.
    #[error("cannot access {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no such file.
    #[error("{} is no simulation file: {source}", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It is of another version.
    #[error("{} has version {found}, this library reads version 1", path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// The version that it states.
        found: u32,
    },
}

impl SimFile {
    /// Returns a machine with these cards and a healthy driver.
    pub fn new(devices: Vec<SimDevice>) -> SimFile {
        SimFile {
            version: 1,
            driver_version: default_driver_version(),
            cuda_version: default_cuda_version(),
            init_error: None,
            memory_v2_error: None,
            usage_dir: None,
            devices,
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It cannot be read, is no valid file, or is of another version.
    pub fn read(path: &Path) -> Result<SimFile, SimFileError> {
        let text =
            std::fs::read(path).map_err(|source| SimFileError::Io { path: path.to_owned(), source })?;
        let file: SimFile = serde_json::from_slice(&text)
            .map_err(|source| SimFileError::Json { path: path.to_owned(), source })?;
        match file.version {
            1 => Ok(file),
            found => Err(SimFileError::Version { path: path.to_owned(), found }),
        }
    }

    /// Writes the file beside `path` and renames it over it, so that no reader sees half of it.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn write_atomically(&self, path: &Path) -> Result<(), SimFileError> {
        let json = serde_json::to_vec_pretty(self)
            .map_err(|source| SimFileError::Json { path: path.to_owned(), source })?;
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        write_and_rename(&temporary, path, &json)
            .map_err(|source| SimFileError::Io { path: path.to_owned(), source })
    }
}

fn write_and_rename(temporary: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::create(temporary)?;
    file.write_all(bytes)?;
    drop(file);
    std::fs::rename(temporary, path)
}

impl SimDevice {
    /// Returns an idle, healthy card without MIG.
    pub fn idle(uuid: &str, name: &str, total: u64, compute_capability: &str) -> SimDevice {
        SimDevice {
            uuid: uuid.to_owned(),
            name: name.to_owned(),
            total,
            reserved: 0,
            used: 0,
            compute_capability: compute_capability.to_owned(),
            mig: None,
            compute_mode: SimComputeMode::Default,
            unified: false,
            processes: Vec::new(),
            fail: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_read_back_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gpus.json");
        let mut card = SimDevice::idle("GPU-1", "Card", 8 << 30, "8.6");
        card.fail = Some(Fail { mode: FailMode::FallenOffBus, after_calls: 3 });
        card.processes.push(SimProcess { pid: 7, used: None });
        let file = SimFile::new(vec![card]);
        file.write_atomically(&path).unwrap();
        assert_eq!(SimFile::read(&path).unwrap(), file);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_misspelt_key_and_another_version_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gpus.json");
        std::fs::write(&path, r#"{"version": 1, "device": []}"#).unwrap();
        assert!(matches!(SimFile::read(&path), Err(SimFileError::Json { .. })));
        std::fs::write(&path, r#"{"version": 2}"#).unwrap();
        assert!(matches!(SimFile::read(&path), Err(SimFileError::Version { found: 2, .. })));
    }
}
