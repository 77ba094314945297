//! Which files does the demo bring along?
//!
//! They run under the trainer's interpreter, or inside the trainer as plugins. Being part of the program, they need no
//! installation of their own.

use std::io;
use std::path::{Path, PathBuf};

/// Makes the tiny model, its tokenizer and the chat rows: `python make_demo.py OUTDIR --rows N`.
pub const MAKE_DEMO: Asset = Asset { name: "make_demo.py", text: include_str!("make_demo.py") };
/// Plugin: a device of simulated capacity. Its settings are variables, listed in the file.
pub const SIMULATED_CAPACITY: Asset =
    Asset { name: "simulated_capacity.py", text: include_str!("simulated_capacity.py") };

/// A file that is part of the program.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Asset {
    /// Its file name. ms-swift 3.x loads a plugin by it, so it must not be the name of an installed module.
    pub name: &'static str,
    /// What is in it.
    pub text: &'static str,
}

impl Asset {
    /// Writes the file into a directory and returns its path.
    ///
    /// # Errors
    /// The system's, when the file cannot be written.
    pub fn write_into(self, directory: &Path) -> io::Result<PathBuf> {
        let path = directory.join(self.name);
        std::fs::write(&path, self.text)?;
        Ok(path)
    }
}
