//! `cargo xtask test`: every test there is, in stages, each with its seconds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;

/// The lines of ms-swift that everything is tested on; their locks are in `config/trainer/`.
const LINES: [&str; 2] = ["4.6.0", "3.12.6"];

/// Run every test
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  cargo xtask test                 # everything\n  cargo xtask test --no-trainer    # only what needs no ms-swift: a minute or two"
)]
pub(crate) struct TestArgs {
    /// Leave out the tests on real ms-swift
    #[arg(long)]
    no_trainer: bool,
}

/// Runs the stages one after the other and stops at the first that fails.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let root = root()?;
    let mut stages: Vec<(String, f64)> = Vec::new();
    let mut stage = |name: &str, command: &mut Command| -> anyhow::Result<()> {
        println!("==> {name}");
        let start = Instant::now();
        let status = command.current_dir(&root).status().with_context(|| format!("cannot start {name}"))?;
        stages.push((name.to_owned(), start.elapsed().as_secs_f64()));
        if !status.success() {
            bail!("{name} failed ({status})");
        }
        Ok(())
    };

    // The binary and the simulated NVML library first: black-box tests start both.
    stage("build", cargo().args(["build", "--workspace", "--all-targets"]))?;
    stage("unit and black-box tests", cargo().args(["test", "--workspace", "--quiet"]))?;
    if args.no_trainer {
        println!("the tests on real ms-swift are left out, as asked");
    } else {
        let binary = target_dir(&root).join("debug/mhtraind");
        for line in LINES {
            let mut install = Command::new(&binary);
            stage(
                &format!("ms-swift {line} environment"),
                install.args(["install-trainer", "--ms-swift", line]),
            )?;
        }
        for line in LINES {
            let mut test = cargo();
            test.args(["test", "--package", "mhtraind", "--test", "trainer", "--", "--test-threads", "1"]);
            test.env("MHTRAIND_TEST_MS_SWIFT", line);
            stage(&format!("tests on real ms-swift {line}"), &mut test)?;
        }
    }
    let total: f64 = stages.iter().map(|(_, seconds)| seconds).sum();
    println!("\n{:<40} {:>8}", "stage", "seconds");
    for (name, seconds) in &stages {
        println!("{name:<40} {seconds:>8.1}");
    }
    println!("{:<40} {total:>8.1}", "all");
    Ok(())
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Returns the workspace's root: this crate lies two levels below it.
fn root() -> anyhow::Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here.ancestors().nth(2).context("xtask lies in crates/xtask")?.to_owned())
}

/// Returns where cargo builds.
fn target_dir(root: &Path) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root.join(dir),
        None => root.join("target"),
    }
}
