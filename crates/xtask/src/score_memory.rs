//! How good is the memory formula against measured points?

use std::path::PathBuf;

/// Arguments of `cargo xtask score-memory`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Table of measured peaks.
    pub csv: PathBuf,
    /// Folder with one config.json per model, named after it.
    #[arg(long)]
    pub configs: PathBuf,
}

/// Prints the errors of the estimate over the points of a table.
pub fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}
