//! The developers' commands: tests, the package, simulation, chaos, benchmarks and scores.

mod bench;
mod chaos;
mod draws;
#[path = "../../../tests/fake-swift/host.rs"]
mod fake_host;
mod package;
mod score_diagnosis;
mod score_memory;
mod score_plan;
mod score_published;
mod scoreboard;
mod simulate;
mod startup;
mod systemd;
mod test;
mod workspace;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The developers' commands of mhtraind")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every test, those on real ms-swift included, and print the seconds of each stage
    Test(test::TestArgs),
    /// Build the Debian package and print its path
    Package(package::PackageArgs),
    /// Run the Debian package under a real systemd, in namespaces and on a root in memory
    Systemd(systemd::SystemdArgs),
    /// Kill daemons, recorders and trainers at random moments, and see whether anything is lost or done twice
    Chaos(chaos::ChaosArgs),
    /// Run the decisions in a simulated world with faults, 20,000 histories of it or as many as asked for
    Simulate(simulate::SimulateArgs),
    /// Measure the daemon beside pueue and task-spooler
    Bench(bench::BenchArgs),
    /// Measure how long a trainer takes to its first step, and a rerun after an out-of-memory error
    Startup(startup::StartupArgs),
    /// Compare what people, wrappers, ms-swift and mhtraind make of an out-of-memory error
    Scoreboard(scoreboard::ScoreboardArgs),
    /// Score the memory estimate against measured points (columns of calibration.csv)
    ScoreMemory(score_memory::ScoreMemoryArgs),
    /// Score the plan against an oracle on random simulated hosts
    ScorePlan(score_plan::ScorePlanArgs),
    /// Score the predicted intervals against published peaks (columns of published.csv)
    ScorePublished(score_published::ScorePublishedArgs),
    /// Score the diagnosis against labelled logs (a folder a kind, labels.csv beside them)
    ScoreDiagnosis(score_diagnosis::ScoreDiagnosisArgs),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Test(args) => test::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Systemd(args) => systemd::run(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::Simulate(args) => simulate::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Startup(args) => startup::run_all(&args),
        Command::Scoreboard(args) => scoreboard::run(&args),
        Command::ScoreMemory(args) => score_memory::run(&args),
        Command::ScorePlan(args) => score_plan::run(&args),
        Command::ScorePublished(args) => score_published::run(&args),
        Command::ScoreDiagnosis(args) => score_diagnosis::run(&args),
    }
}
