//! What does the demo train, and when does it run out of memory?

pub mod assets;

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::{Failure, unwritable};

/// Makes the tiny model and its data of `rows` rows in `dir`, and returns the plugin that simulates the capacity.
///
/// # Errors
/// The interpreter cannot be started or fails, or `dir` cannot be written.
pub fn make(python: &Path, dir: &Path, rows: u32) -> Result<PathBuf, Failure> {
    let write =
        |asset: assets::Asset| asset.write_into(dir).map_err(|e| unwritable(&dir.join(asset.name), &e));
    let maker = write(assets::MAKE_DEMO)?;
    let plugin = write(assets::SIMULATED_CAPACITY)?;
    let made = Command::new(python)
        .arg(&maker)
        .arg(dir)
        .args(["--rows", &rows.to_string()])
        .output()
        .map_err(|e| Failure::failed("no_python", format!("cannot start {}: {e}", python.display())))?;
    if made.status.success() {
        return Ok(plugin);
    }
    let why = String::from_utf8_lossy(&made.stderr).trim().to_owned();
    Err(Failure::failed("no_model", format!("the tiny model cannot be made ({}): {why}", made.status)))
}

/// UUID of the simulated card.
pub const CARD_UUID: &str = "GPU-51111111-0000-4000-8000-000000000001";

/// Memory of the simulated card: the class's own batch of 8 x 4 is predicted to fit, 32 x 1 is not.
pub const CARD_BYTES: u64 = 2 << 30;

/// Bytes that a token of a pass takes on the simulated card. The longest row of the data has 176 tokens (with the chat
/// template's own), so a pass of eight takes at most 1.4 GiB and one of four 0.7 GiB.
const TOKEN_BYTES: u64 = 1 << 20;

/// Bytes that are held whatever the batch is: any eight rows fit beside them.
const RESIDENT_BYTES: u64 = 512 << 20;

/// Bytes that join them late. Then 0.8 GiB are left: enough for any four rows, too little for most eight.
const GROWTH_BYTES: u64 = 736 << 20;

/// The optimizer step at which they join: in the second of two epochs of ten steps, three after a checkpoint.
const GROWTH_STEP: u64 = 13;

/// Returns what the plugin is told, for the trainer's environment.
pub fn capacity_variables() -> impl Iterator<Item = (String, String)> {
    [
        ("MHT_SIM_CAPACITY_BYTES", CARD_BYTES.to_string()),
        ("MHT_SIM_BYTES_PER_TOKEN", TOKEN_BYTES.to_string()),
        ("MHT_SIM_RESIDENT_BYTES", RESIDENT_BYTES.to_string()),
        ("MHT_SIM_GROWTH_BYTES", GROWTH_BYTES.to_string()),
        ("MHT_SIM_GROWTH_STEP", GROWTH_STEP.to_string()),
        ("MHT_SIM_DEVICE_UUID", CARD_UUID.to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
}
