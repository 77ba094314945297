//! Which GPUs does a machine show that has none?
//!
//! This crate is a stand-in for `libnvidia-ml.so.1`. It is built twice from the same source:
//!
//! * as `libnvml_sim.so`, which exports the NVML functions that nvml-wrapper 0.13 calls ([`abi`]). The program under
//!   test opens it in place of the driver's library and nothing else about that program changes;
//! * as a Rust library, so that tests and the demo can write the file that drives it ([`SimFile`]) and find the
//!   shared object ([`find_library`]).
//!
//! The shared object reads the file named by [`FILE_VARIABLE`] anew at every call. A test that writes a new file over
//! it ([`SimFile::write_atomically`]) thereby moves memory, adds processes or loses a card in a running program.
//!
//! Left out on purpose: event sets, MIG slices (a card can *have* MIG switched on, but shows no slice), clocks, fans,
//! and anything that would change a card. Those symbols are absent, as in an old driver.

pub mod abi;
mod file;
mod state;

pub use file::{Fail, FailMode, SimComputeMode, SimDevice, SimFile, SimFileError, SimProcess};

use std::path::PathBuf;

/// Environment variable that names the file that drives the simulation.
pub const FILE_VARIABLE: &str = "NVML_SIM_FILE";

/// Environment variable that names the directory of usage files: see [`SimFile::usage_dir`].
pub const USAGE_VARIABLE: &str = "NVML_SIM_USAGE";

/// File name of the shared object.
pub const LIBRARY_FILE: &str = "libnvml_sim.so";

/// Returns the path of the shared object that was built or installed with the running program.
///
/// Looked for, in this order: beside the program (`target/<profile>/`, and for tests `target/<profile>/deps/`), in
/// `deps/` beside it, one directory up, and in `../lib/`. Cargo builds the shared object whenever something depends
/// on this crate, as a test's dev-dependency does; the copy in `deps/` is then the fresh one.
/// `None`: it is in none of these places.
pub fn find_library() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let directory = program.parent()?;
    ["", "deps", "..", "../lib"]
        .iter()
        .map(|place| directory.join(place).join(LIBRARY_FILE))
        .find(|candidate| candidate.is_file())
}
