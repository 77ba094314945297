//! How fast and how heavy is the daemon beside the queues that people use instead?
//!
//! One run, one machine, the same job for everybody ([`ground`]). A goal that is missed is shown as missed.

mod ground;
mod ours;
mod peers;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::bail;

use crate::workspace::{cargo, root, target_dir};
use ground::{Ground, cpu_percent, resident_mib};
use ours::Ours;
use peers::{Pueue, Tsp, find_pueue, find_tsp};

/// Jobs that are over in the full store.
const FULL: u32 = 10_000;

/// Over how long an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(30);

/// Where the table is kept.
const PAGE: &str = "docs/measurements/bench.md";

/// Measure the daemon beside pueue and task-spooler
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench            # a table, after about six minutes\n  cargo xtask bench --write    # the same into docs/measurements/bench.md"
)]
pub(crate) struct BenchArgs {
    /// Write the table into docs/measurements/bench.md as well
    #[arg(long)]
    write: bool,

    /// Leave the other queues out: a minute or two
    #[arg(long, conflicts_with = "write")]
    ours_only: bool,

    /// Jobs of the eight slots
    #[arg(long, default_value_t = 2000, conflicts_with = "write")]
    jobs: u32,
}

/// A line of the table.
struct Row {
    what: &'static str,
    ours: String,
    pueue: String,
    tsp: String,
    goal: String,
    /// `None`: there is no goal.
    met: Option<bool>,
}

impl Row {
    fn verdict(&self) -> &'static str {
        match self.met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        }
    }
}

/// What one of the other queues does, as far as it was measured.
#[derive(Default)]
struct Peer {
    version: String,
    add: Option<Duration>,
    exec: Option<Duration>,
    one_slot: Option<f64>,
    eight_slots: Option<f64>,
    output: Option<f64>,
    idle_mib: Option<f64>,
    idle_cpu: Option<f64>,
    full: Option<(Duration, Duration, f64)>,
    empty: Option<(Duration, Duration, f64)>,
}

/// Measures everything and prints the table.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let (root, dir) = (root()?, tempfile::Builder::new().prefix("mhtraind-bench-").tempdir()?);
    // As it is installed on hosts.
    let build = ["build", "--profile", "dist", "--package", "mhtraind", "--package", "nvml-sim"];
    if !cargo().args(build).current_dir(&root).status()?.success() {
        bail!("the daemon cannot be built");
    }
    let target = target_dir(&root);
    let ground = Ground::make(dir.path(), &root)?;
    let (pueue, tsp) = match args.ours_only {
        true => (Peer::default(), Peer::default()),
        false => others(&ground, &target.join("tools"))?,
    };
    let mut ours = Ours::start(&ground, &target)?;
    let version = ours.version()?;
    let rows = measure(&ground, &mut ours, &pueue, &tsp, args.jobs)?;
    let table = table(&rows);
    println!("{table}");
    if args.write {
        std::fs::write(root.join(PAGE), page(&root, &table, &[&version, &pueue.version, &tsp.version])?)?;
        println!("written to {PAGE}");
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a command for developers tells how far it is")]
fn says(what: &str) {
    eprintln!("measuring {what}");
}

fn others(ground: &Ground, tools: &Path) -> anyhow::Result<(Peer, Peer)> {
    std::fs::create_dir_all(tools)?;
    says("pueue");
    let mut pueue = Pueue::start(ground, find_pueue(tools)?)?;
    let (idle_mib, idle_cpu) = (resident_mib(pueue.pid()?)?, cpu_percent(pueue.pid()?, IDLE)?);
    let of_pueue = Peer {
        version: pueue.version()?,
        exec: Some(pueue.submit_to_exec()?),
        one_slot: Some(pueue.drain(100, 1)?),
        eight_slots: Some(pueue.drain(400, 8)?),
        output: Some(pueue.output()?),
        idle_mib: Some(idle_mib),
        idle_cpu: Some(idle_cpu),
        ..Peer::default()
    };
    let empty = Some(pueue.at_rest()?);
    pueue.fill(u64::from(FULL))?;
    let full = Some(pueue.at_rest()?);
    drop(pueue);
    let of_pueue = Peer { add: empty.map(|(add, ..)| add), empty, full, ..of_pueue };
    says("task-spooler");
    let Some(program) = find_tsp(tools) else {
        return Ok((
            of_pueue,
            Peer { version: "task-spooler: not to be had here".to_owned(), ..Peer::default() },
        ));
    };
    let mut tsp = Tsp::start(ground, program);
    let of_tsp = Peer {
        version: tsp.version()?,
        add: Some(tsp.add_p50()?),
        exec: Some(tsp.submit_to_exec()?),
        one_slot: Some(tsp.drain(100, 1)?),
        eight_slots: Some(tsp.drain(2000, 8)?),
        ..Peer::default()
    };
    Ok((of_pueue, of_tsp))
}

fn measure(
    ground: &Ground,
    ours: &mut Ours<'_>,
    pueue: &Peer,
    tsp: &Peer,
    jobs: u32,
) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut row = |what, ours: String, pueue: String, tsp: String, goal: &str, met| {
        rows.push(Row { what, ours, pueue, tsp, goal: goal.to_owned(), met });
    };
    let none = || "-".to_owned();
    let duration = |value: Option<Duration>| value.map_or_else(none, ms);
    let number =
        |value: Option<f64>, unit: &str| value.map_or_else(none, |value| format!("{value:.1}{unit}"));
    let fsync = ground.fsync_p50()?;
    row("4 KiB and an fsync on this disk, p50", ms(fsync), none(), none(), "", None);

    says("an idle daemon");
    std::thread::sleep(Duration::from_secs(1));
    let (idle_mib, idle_cpu) = (resident_mib(ours.pid()?)?, cpu_percent(ours.pid()?, IDLE)?);
    says("submits");
    // A first job is over, so that ten are.
    ours.drain(10, 8)?;
    let (add, status, resident) = ours.at_rest()?;
    let limit = 3 * fsync + Duration::from_millis(3);
    let goal = format!("3 fsync + 3 ms = {}", ms(limit));
    row(
        "submit by the command, p50",
        ms(add),
        duration(pueue.add),
        duration(tsp.add),
        &goal,
        Some(add <= limit),
    );
    says("launches");
    let exec = ours.submit_to_exec()?;
    let limit = Duration::from_millis(30);
    row(
        "submit to exec of the trainer, p50",
        ms(exec),
        duration(pueue.exec),
        duration(tsp.exec),
        "30 ms",
        Some(exec <= limit),
    );
    let memory = ours.memory_to_exec()?;
    let limit = Duration::from_millis(50);
    row(
        "memory is back to exec of the next, p50",
        ms(memory),
        none(),
        none(),
        "50 ms",
        Some(memory <= limit),
    );
    says("throughput");
    let one = ours.drain(100, 1)?;
    row(
        "100 jobs, one slot, jobs/s",
        format!("{one:.1}"),
        number(pueue.one_slot, ""),
        number(tsp.one_slot, " with adds"),
        "50",
        Some(one >= 50.0),
    );
    let eight = ours.drain(jobs, 8)?;
    row(
        "2,000 jobs, eight slots, jobs/s",
        format!("{eight:.1}"),
        number(pueue.eight_slots, " of 400"),
        number(tsp.eight_slots, " with adds"),
        "100",
        Some(eight >= 100.0),
    );
    says("output");
    let plain = ground.plain_output()?;
    let output = ours.output()?;
    let share = output / plain;
    row(
        "512 MiB of output, MiB/s",
        format!("{output:.0}"),
        number(pueue.output, ""),
        none(),
        &format!("plain file: {plain:.0}"),
        Some(share >= 0.9),
    );

    says("a full store");
    ours.end()?;
    ours.fill(usize::try_from(FULL)?)?;
    let start = ours.serve()?;
    let (full_add, full_status, full_resident) = ours.at_rest()?;
    row(
        "start with 10,000 jobs that are over",
        ms(start),
        none(),
        none(),
        "100 ms",
        Some(start <= Duration::from_millis(100)),
    );
    let pair = |few: &str, many: &str| format!("{few} -> {many}");
    let grown = |few: f64, many: f64| Some(many <= 1.5 * few);
    let of_peer = |pick: fn(&(Duration, Duration, f64)) -> String| {
        pueue
            .empty
            .as_ref()
            .zip(pueue.full.as_ref())
            .map_or_else(none, |(few, many)| pair(&pick(few), &pick(many)))
    };
    let seconds = |time: Duration| time.as_secs_f64();
    row(
        "submit with 10 -> 10,000 jobs over, p50",
        pair(&ms(add), &ms(full_add)),
        of_peer(|it| ms(it.0)),
        none(),
        "1.5 x",
        grown(seconds(add), seconds(full_add)),
    );
    row(
        "status --json with them, p50",
        pair(&ms(status), &ms(full_status)),
        of_peer(|it| ms(it.1)),
        none(),
        "1.5 x",
        grown(seconds(status), seconds(full_status)),
    );
    row(
        "RSS with them, MiB",
        pair(&format!("{resident:.1}"), &format!("{full_resident:.1}")),
        of_peer(|it| format!("{:.1}", it.2)),
        none(),
        "1.5 x",
        grown(resident, full_resident),
    );
    row(
        "status --json at 10,000, a page, p50",
        ms(full_status),
        duration(pueue.full.map(|it| it.1)),
        none(),
        "50 ms",
        Some(full_status <= Duration::from_millis(50)),
    );
    row(
        "idle RSS, MiB",
        format!("{idle_mib:.1}"),
        number(pueue.idle_mib, ""),
        none(),
        "15",
        Some(idle_mib <= 15.0),
    );
    row(
        "idle CPU over 30 s, % of a core",
        format!("{idle_cpu:.2}"),
        pueue.idle_cpu.map_or_else(none, |cpu| format!("{cpu:.2}")),
        none(),
        "0.1",
        Some(idle_cpu <= 0.1),
    );
    Ok(rows)
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn table(rows: &[Row]) -> String {
    let mut text =
        String::from("| measure | mhtraind | pueue | task-spooler | goal | |\n|---|---|---|---|---|---|\n");
    for row in rows {
        let Row { what, ours, pueue, tsp, goal, .. } = row;
        // Writing into a string cannot fail.
        let _ = writeln!(text, "| {what} | {ours} | {pueue} | {tsp} | {goal} | {} |", row.verdict());
    }
    text
}

fn page(root: &Path, table: &str, versions: &[&str]) -> anyhow::Result<String> {
    let told = |program: &str, args: &[&str]| -> anyhow::Result<String> {
        let output = Command::new(program).args(args).current_dir(root).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let date = told("date", &["-u", "+%Y-%m-%d"])?;
    let commit = told("git", &["rev-parse", "--short", "HEAD"])?;
    let kernel = told("uname", &["-sr"])?;
    let cores = std::thread::available_parallelism()?;
    let versions: Vec<&str> = versions.iter().copied().filter(|version| !version.is_empty()).collect();
    Ok(format!(
        "# The daemon beside other queues\n\n\
         Written by `cargo xtask bench --write` on {date}, commit {commit}, profile dist; {kernel}, {cores} cores. {}.\n\n\
         Cards are nvml-sim's. Every queue runs the same shell script, which says in a pipe that it was executed and copies what a\n\
         trainer leaves that trained ten steps: a Python that starts in 20 to 60 ms would be what is measured. Submits are\n\
         commands, their start included; the queues of the throughput rows are filled while nothing may start, but\n\
         task-spooler's, which cannot be held back. mhtraind syncs its log at each step of a job, the others record\n\
         nothing so; each of its jobs is sized, recorded, followed and proven. pueue's 10,000 tasks are copies in its state file.\n\
         `TMPDIR` was a freshly made file system: ext4 without a journal takes 0.5 ms for a new file while it looks over inodes\n\
         that were deleted in the last minutes, and whatever was removed before would be what is measured.\n\n\
         {table}",
        versions.join(", ")
    ))
}
