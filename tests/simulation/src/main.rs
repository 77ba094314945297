//! `cargo xtask simulate`: many histories, or one.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use clap::Parser;
use mhtrain_simulation::history::{Story, script_in_words};
use mhtrain_simulation::invariants::Violation;
use mhtrain_simulation::script::Script;
use mhtrain_simulation::shrink::shrink;
use mhtrain_simulation::world::{Course, run};

/// The decisions of mhtraind in a simulated world with faults
#[derive(Debug, Parser)]
#[command(name = "cargo xtask simulate")]
struct Args {
    /// How many histories
    #[arg(long, default_value_t = 20_000)]
    histories: u64,

    /// What the histories are drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Tell this one history, and run no other
    #[arg(long)]
    history: Option<u64>,

    /// Threads; by default one for each core
    #[arg(long)]
    threads: Option<usize>,
}

/// What all histories did together.
#[derive(Debug, Default)]
struct Sum {
    histories: AtomicU64,
    events: AtomicU64,
    jobs: AtomicU64,
    attempts: AtomicU64,
    observations: AtomicU64,
    plans_moved: AtomicU64,
}

#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(history) = args.history {
        return tell(args.seed, history);
    }
    let began = Instant::now();
    let (sum, broken) = run_all(&args);
    let Sum { histories, events, jobs, attempts, observations, plans_moved } = &sum;
    let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
    println!(
        "{} histories of seed {}: {} events, {} jobs, {} attempts, {} of them learned from, {} plans moved by that, in {:.1} s",
        get(histories),
        args.seed,
        get(events),
        get(jobs),
        get(attempts),
        get(observations),
        get(plans_moved),
        began.elapsed().as_secs_f64()
    );
    match broken {
        None => ExitCode::SUCCESS,
        Some((history, violation)) => {
            explain(args.seed, history, violation);
            ExitCode::FAILURE
        }
    }
}

/// Runs all histories, or those up to the first that breaks a promise.
fn run_all(args: &Args) -> (Sum, Option<(u64, Violation)>) {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (sum, next) = (Sum::default(), AtomicU64::new(0));
    let broken: Mutex<Option<(u64, Violation)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..args.threads.unwrap_or_else(cores).max(1) {
            scope.spawn(|| {
                loop {
                    let history = next.fetch_add(1, Ordering::Relaxed);
                    if history >= args.histories {
                        return;
                    }
                    let ran = run(&Script::of(args.seed, history), None, Story::default());
                    let course = match ran {
                        Ok(course) => course,
                        Err((violation, course)) => {
                            next.store(args.histories, Ordering::Relaxed);
                            let mut broken = broken.lock().unwrap_or_else(PoisonError::into_inner);
                            // Of two that break at the same time the first one is told, whoever was faster.
                            if broken.as_ref().is_none_or(|(earlier, _)| history < *earlier) {
                                *broken = Some((history, violation));
                            }
                            course
                        }
                    };
                    let Course { events, jobs, attempts, observations, plans_moved, .. } = course;
                    sum.histories.fetch_add(1, Ordering::Relaxed);
                    sum.events.fetch_add(u64::from(events), Ordering::Relaxed);
                    sum.jobs.fetch_add(jobs, Ordering::Relaxed);
                    sum.attempts.fetch_add(u64::from(attempts), Ordering::Relaxed);
                    sum.observations.fetch_add(u64::from(observations), Ordering::Relaxed);
                    sum.plans_moved.fetch_add(u64::from(plans_moved), Ordering::Relaxed);
                }
            });
        }
    });
    (sum, broken.into_inner().unwrap_or_else(PoisonError::into_inner))
}

#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
fn explain(seed: u64, history: u64, violation: Violation) {
    println!("\nhistory {history} breaks a promise: {violation}");
    let (script, violation, course) = shrink(&Script::of(seed, history), None, violation);
    println!("\nthe least of it that does:");
    for line in script_in_words(&script).iter().chain(course.story.lines()) {
        println!("{line}");
    }
    println!("\n{violation}");
    println!("\nthe whole of it: cargo xtask simulate --seed {seed} --history {history}");
}

#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
fn tell(seed: u64, history: u64) -> ExitCode {
    let script = Script::of(seed, history);
    let (course, violation) = match run(&script, None, Story::kept()) {
        Ok(course) => (course, None),
        Err((violation, course)) => (course, Some(violation)),
    };
    for line in script_in_words(&script).iter().chain(course.story.lines()) {
        println!("{line}");
    }
    match violation {
        None => ExitCode::SUCCESS,
        Some(violation) => {
            println!("\n{violation}");
            ExitCode::FAILURE
        }
    }
}
