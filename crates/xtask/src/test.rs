//! `cargo xtask test`: every test there is, in stages, each with its seconds.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;

use crate::simulate;
use crate::workspace::{cargo, root, target_dir};

/// The lines of ms-swift that everything is tested on; their locks are in `config/trainer/`.
pub(crate) const LINES: [&str; 2] = ["4.6.0", "3.12.6"];

/// Run every test
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  cargo xtask test                 # everything\n  cargo xtask test --no-trainer    # only what needs no ms-swift: a minute or two"
)]
pub(crate) struct TestArgs {
    /// Leave out the tests on real ms-swift
    #[arg(long)]
    no_trainer: bool,

    /// Also the large matrix of resumes after an out-of-memory error: about ten minutes more for each line
    #[arg(long, conflicts_with = "no_trainer")]
    full: bool,
}

/// Runs the stages one after the other and stops at the first that fails.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let root = root()?;
    let mut stages: Vec<(String, f64)> = Vec::new();

    // The binary and the simulated NVML library first: black-box tests start both.
    let mut build = cargo();
    build.args(["build", "--workspace", "--all-targets"]).current_dir(&root);
    stage(&mut stages, "build", &mut build)?;
    let mut test = cargo();
    test.args(["test", "--workspace"]).current_dir(&root);
    stage(&mut stages, "unit and black-box tests", &mut test)?;
    stage(&mut stages, "20,000 simulated histories", &mut simulate::command()?)?;
    // Not this very program: the build may just have put another one in its place.
    let mut chaos = cargo();
    chaos.args(["run", "--quiet", "--package", "xtask", "--", "chaos", "--trials", "50"]).current_dir(&root);
    stage(&mut stages, "50 kills at random moments", &mut chaos)?;
    let mut points = cargo();
    points.args(["run", "--quiet", "--package", "xtask", "--", "chaos", "--failpoints"]).current_dir(&root);
    stage(&mut stages, "a kill at every durable step", &mut points)?;
    // What recorders do is the same under a daemon.
    let mut points = cargo();
    points.args(["run", "--quiet", "--package", "xtask", "--", "chaos", "--failpoints", "--once"]);
    points.args(["--of", "foreground", "--point", ": run:"]).current_dir(&root);
    stage(&mut stages, "a kill at every durable step of a foreground run", &mut points)?;
    let mut pure = Command::new("python3");
    pure.args(["-m", "unittest", "discover", "--start-directory", "tests/gpu"]).current_dir(&root);
    stage(&mut stages, "the GPU suite's own functions", &mut pure)?;
    if args.no_trainer {
        println!("the tests on real ms-swift are left out, as asked");
    } else {
        let binary = target_dir(&root).join("debug/mhtraind");
        for line in LINES {
            let start = Instant::now();
            let trainer = install_trainer(&binary, line)?;
            stages.push((format!("ms-swift {line} environment"), start.elapsed().as_secs_f64()));
            if line == LINES[0] {
                stage(
                    &mut stages,
                    "GPU suite, dry: memory and probe",
                    &mut dry_suite(&root, &binary, &trainer),
                )?;
            }
            let mut test = cargo();
            test.args(["test", "--package", "mhtraind", "--test", "trainer", "--", "--test-threads", "1"]);
            test.env("MHTRAIND_TEST_MS_SWIFT", line).env("MHTRAIND_TEST_TRAINER", trainer);
            if args.full {
                let table = target_dir(&root).join(format!("companion-{line}.md"));
                test.env("MHTRAIND_TEST_FULL", "1").env("MHTRAIND_TEST_TABLE", table);
            }
            stage(&mut stages, &format!("tests on real ms-swift {line}"), test.current_dir(&root))?;
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

/// Returns the parts of the GPU suite's dry run that take no minute. The others train for five minutes, on CPU as the
/// tests on real ms-swift do.
fn dry_suite(root: &Path, binary: &Path, trainer: &str) -> Command {
    let mut suite = Command::new(root.join("tests/gpu/run"));
    suite.args(["--dry-run", "--only", "memory/,probe", "--mhtraind"]).arg(binary);
    suite.arg("--python").arg(Path::new(trainer).join("bin/python")).current_dir(root);
    suite
}

/// Runs one stage and notes its seconds.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
fn stage(stages: &mut Vec<(String, f64)>, name: &str, command: &mut Command) -> anyhow::Result<()> {
    println!("==> {name}");
    let start = Instant::now();
    let status = command.status().with_context(|| format!("cannot start {name}"))?;
    stages.push((name.to_owned(), start.elapsed().as_secs_f64()));
    if !status.success() {
        bail!("{name} failed ({status})");
    }
    Ok(())
}

/// Installs a line of ms-swift, or finds it installed, and returns its directory: the command's only output.
pub(crate) fn install_trainer(binary: &Path, line: &str) -> anyhow::Result<String> {
    let mut command = Command::new(binary);
    command.args(["install-trainer", "--ms-swift", line]).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("cannot start {}", binary.display()))?;
    if !output.status.success() {
        bail!("ms-swift {line} cannot be installed ({})", output.status);
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
