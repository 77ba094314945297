//! `cargo xtask package`: the Debian package.
//!
//! What is in it is said by `[package.metadata.deb]` in crates/mhtraind/Cargo.toml; here are the steps before it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;

use crate::workspace::{cargo, output, root, run as run_command, target_dir};

/// The shells that have completions in the package, and the file that each looks for.
const COMPLETIONS: [(&str, &str); 3] =
    [("bash", "mhtraind"), ("zsh", "_mhtraind"), ("fish", "mhtraind.fish")];

/// Build the Debian package
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sudo dpkg -i \"$(cargo xtask package)\"    # the path alone is on standard output"
)]
pub(crate) struct PackageArgs {}

/// Builds the package and prints its path.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(_: &PackageArgs) -> anyhow::Result<()> {
    println!("{}", build()?.display());
    Ok(())
}

/// Builds the package and returns its path.
pub(crate) fn build() -> anyhow::Result<PathBuf> {
    let root = root()?;
    let target = target_dir(&root);
    let tool = cargo_deb(&root, &target)?;
    run_command(
        cargo().args(["build", "--profile", "dist", "--locked", "--package", "mhtraind"]).current_dir(&root),
    )?;
    generate(&target.join("dist/mhtraind"), &target.join("dist/package"))?;
    // The binary is stripped: its debug information is several times its size.
    let mut command = Command::new(tool);
    command.args([
        "--package",
        "mhtraind",
        "--profile",
        "dist",
        "--no-build",
        "--strip",
        "--quiet",
        "--output",
    ]);
    let path = output(command.arg(target.join("debian")).arg("--").arg("--locked").current_dir(&root))?;
    Ok(PathBuf::from(path.trim()))
}

/// Lets the binary write its completions and its manual below `dir`.
fn generate(binary: &Path, dir: &Path) -> anyhow::Result<()> {
    if dir.exists() {
        // A page of a command that is no more must not be packaged.
        std::fs::remove_dir_all(dir)?;
    }
    for (shell, file) in COMPLETIONS {
        let path = dir.join("completions").join(shell).join(file);
        std::fs::create_dir_all(path.parent().context("it has one")?)?;
        std::fs::write(path, output(Command::new(binary).args(["completions", shell]))?)?;
    }
    run_command(Command::new(binary).arg("man-pages").arg(dir.join("man")))?;
    // cargo-deb does it for pages that are not built.
    run_command(Command::new("gzip").args(["--best", "--no-name", "--recursive"]).arg(dir.join("man")))
}

/// Returns cargo-deb in the pinned version, installed beside what is built if it is not there yet.
fn cargo_deb(root: &Path, target: &Path) -> anyhow::Result<PathBuf> {
    let manifest: toml::Table = toml::from_str(&std::fs::read_to_string(root.join("Cargo.toml"))?)?;
    let pinned =
        manifest["workspace"].get("metadata").and_then(|metadata| metadata.get("cargo-deb")?.as_str());
    let Some(pinned) = pinned else { bail!("Cargo.toml has no workspace.metadata.cargo-deb") };
    let tools = target.join("tools");
    let binary = tools.join("bin/cargo-deb");
    let found = Command::new(&binary).arg("--version").output();
    if found.is_ok_and(|found| String::from_utf8_lossy(&found.stdout).trim() == format!("cargo-deb {pinned}"))
    {
        return Ok(binary);
    }
    let mut install = cargo();
    install
        .args(["install", "cargo-deb", "--locked", "--version", &format!("={pinned}"), "--root"])
        .arg(&tools);
    // Built in a directory of its own, which cargo removes.
    run_command(install.env_remove("CARGO_TARGET_DIR"))?;
    Ok(binary)
}
