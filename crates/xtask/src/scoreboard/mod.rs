//! Does a training end as it was planned, and at what cost, when memory runs out? Several contestants, the same cases.
//!
//! Every training is ms-swift's own, on CPU with a tiny model; simulated is the capacity at which memory runs out
//! ([`cases`]), and the card that NVML shows. What was trained is counted by a witness inside the trainer ([`witness`]).

mod cases;
mod contestant;
mod interrupt;
mod page;
mod results;
mod trainer;
mod witness;
mod world;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;

use crate::startup::{load, today};
use crate::test::LINES;
use crate::workspace::{cargo, output, root, run as run_command, target_dir};
use cases::{Case, EPOCHS, ROWS};
use contestant::Contestant;
use interrupt::Interrupt;
use results::{Record, Results};
use trainer::Line;
use witness::History;

/// Where the results of all runs are kept, and the page that is made of them.
const RESULTS: &str = "docs/measurements/scoreboard.csv";
const PAGE: &str = "docs/scoreboard.md";

/// Compare what people, wrappers, ms-swift and mhtraind make of an out-of-memory error
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask scoreboard                 # what is missing of four cases on both lines; about an hour from nothing\n  cargo xtask scoreboard --cases 20      # more of the same seed: what is there is not run again\n  cargo xtask scoreboard --lines 4.6.0 --contestants oracle,mhtraind"
)]
pub(crate) struct ScoreboardArgs {
    /// Cases of the seed, on each line
    #[arg(long, default_value_t = 4)]
    cases: u32,

    /// Which cases are drawn
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Lines of ms-swift
    #[arg(long, value_delimiter = ',', default_values = LINES)]
    lines: Vec<String>,

    /// Who trains; all by default
    #[arg(long, value_delimiter = ',', value_enum)]
    contestants: Vec<Contestant>,

    /// Run again what is there already
    #[arg(long)]
    again: bool,
}

/// Runs what is missing, and writes the page of all that is there.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(args: &ScoreboardArgs) -> anyhow::Result<()> {
    ensure!(args.cases > 0, "--cases must be at least 1");
    let root = root()?;
    let mut build = cargo();
    build.args(["build", "--package", "mhtraind", "--package", "nvml-sim"]).current_dir(&root);
    run_command(&mut build)?;
    let target = target_dir(&root);
    let contestants = if args.contestants.is_empty() { &Contestant::ALL[..] } else { &args.contestants[..] };
    let lines = args
        .lines
        .iter()
        .map(|line| Line::prepare(line, &target.join("debug/mhtraind"), &root, &target.join("scoreboard")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut results = Results::read(&root.join(RESULTS))?;
    // Listening begins after all that ends by Ctrl-C itself.
    let interrupt = Interrupt::listen()?;
    let commit = output(Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(&root))?;

    let longest = lines.iter().map(|line| line.longest).max().unwrap_or(0);
    let mut trials = Vec::new();
    for case in Case::draw(args.seed, args.cases, longest) {
        for line in &lines {
            for contestant in contestants {
                let there =
                    results.find(args.seed, case.number, &line.version, contestant.name(), &line.versions);
                if args.again || there.is_none() {
                    trials.push((case.with_longest(line.longest_here), line, *contestant));
                }
            }
        }
    }
    let all = trials.len();
    for (index, (case, line, contestant)) in trials.into_iter().enumerate() {
        says(&format!(
            "[{} of {all}] case {} ({}), ms-swift {}: {}",
            index + 1,
            case.number,
            case.kind.name(),
            line.version,
            contestant.name()
        ));
        let record = trial(args.seed, &case, line, contestant, commit.trim(), &interrupt)?;
        says(&format!(
            "    exit {:?}, {} attempts, {} rows again, {} never, {} steps thrown away, {:.1} s",
            record.exit_code,
            record.attempts,
            record.rows_again,
            record.rows_never,
            record.steps_thrown_away,
            record.wall_s
        ));
        results.add(record)?;
    }
    let page = page::write(&root, args.seed, args.cases, &results.records)?;
    fs::write(root.join(PAGE), page)?;
    println!("written to {PAGE}; every result is in {RESULTS}");
    Ok(())
}

/// Lets one contestant train one case, and counts what came of it.
fn trial(
    seed: u64,
    case: &Case,
    line: &Line,
    contestant: Contestant,
    commit: &str,
    interrupt: &Interrupt,
) -> anyhow::Result<Record> {
    let dir = line.dir.join(format!("case-{}-{}", case.number, contestant.name()));
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    let began = Instant::now();
    let story = contestant.run(line, case, &dir, interrupt)?;
    let wall_s = began.elapsed().as_secs_f64();
    let history = History::read(&witnessed(&dir))?;
    let verdict = history.verdict(story.code == Some(0));
    let record = Record {
        line: line.version.clone(),
        seed,
        case: case.number,
        contestant: contestant.name().to_owned(),
        kind: case.kind.name().to_owned(),
        fits: case.fits,
        short_from_step: case.step,
        short_mib: case.short_bytes >> 20,
        exit_code: story.code,
        // `auto_find_batch_size` begins again inside of one process; a process may also die before it begins.
        attempts: story.processes.max(history.begun),
        human_actions: story.human_actions,
        rows_planned: ROWS * EPOCHS,
        rows_again: verdict.rows_again,
        rows_never: verdict.rows_never,
        least_batch: verdict.least_batch,
        largest_batch: verdict.largest_batch,
        batch_kept: verdict.batch_kept,
        steps_done: history.steps_done,
        steps_kept: verdict.steps_kept,
        steps_thrown_away: verdict.steps_thrown_away,
        wall_s: (wall_s * 10.0).round() / 10.0,
        cpu_s: (history.cpu_s * 10.0).round() / 10.0,
        load: load()?,
        date: today(),
        commit: commit.to_owned(),
        versions: line.versions.clone(),
    };
    // What was not finished stays there to be looked at, until the next time.
    if record.finished() {
        fs::remove_dir_all(&dir)?;
    }
    Ok(record)
}

/// Returns what the witnesses wrote; nothing where no trainer came that far.
fn witnessed(dir: &Path) -> String {
    fs::read_to_string(dir.join("order.jsonl")).unwrap_or_default()
}

#[expect(clippy::print_stderr, reason = "a command for developers tells how far it is")]
fn says(what: &str) {
    eprintln!("{what}");
}
