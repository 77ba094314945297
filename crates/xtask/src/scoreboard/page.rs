//! The page `docs/scoreboard.md`, whole: nothing in it is typed by hand.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;

use super::cases::{EFFECTIVE, EPOCHS, NEIGHBOUR_S, ROWS, SAVE_STEPS, STEPS};
use super::contestant::Contestant;
use super::results::Record;
use crate::workspace::output;

/// Returns the page of all results of a seed.
pub(super) fn write(root: &Path, seed: u64, cases: u32, records: &[Record]) -> anyhow::Result<String> {
    let ours: Vec<&Record> =
        records.iter().filter(|record| record.seed == seed && record.case <= cases).collect();
    let of = |pick: fn(&Record) -> &str| -> String {
        let all: BTreeSet<&str> = ours.iter().map(|record| pick(record)).collect();
        all.into_iter().collect::<Vec<_>>().join(", ")
    };
    let loads: Vec<f64> = ours.iter().map(|record| record.load).collect();
    let versions: BTreeSet<&str> = ours.iter().map(|record| record.versions.as_str()).collect();
    let kernel = output(std::process::Command::new("uname").arg("-sr"))?;
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let mut page = format!(
        "# Scoreboard\n\nWritten whole by `cargo xtask scoreboard --seed {seed} --cases {cases}`; measured {}, commit {}; {}, \
         {cores} cores, load {}. {}. Every single result: [measurements/scoreboard.csv](measurements/scoreboard.csv).\n\n",
        of(|record| &record.date),
        of(|record| &record.commit),
        kernel.trim(),
        range(&loads, 1),
        versions.into_iter().collect::<Vec<_>>().join(". "),
    );
    page.push_str(&in_short(&ours));
    page.push_str(&introduction());
    let lines: BTreeSet<&str> = ours.iter().map(|record| record.line.as_str()).collect();
    for line in lines.iter().rev() {
        let of_line: Vec<&Record> = ours.iter().copied().filter(|record| record.line == *line).collect();
        let _ = writeln!(page, "## When memory runs out: ms-swift {line}\n\n{}", summary(&of_line));
        let _ = writeln!(page, "Case by case (definitions below):\n\n{}", case_by_case(&of_line));
    }
    page.push_str(&definitions(&ours));
    page.push_str(&included(root)?);
    Ok(page)
}

/// The whole in one small table: all lines and cases together.
fn in_short(records: &[&Record]) -> String {
    let mut table = String::from(
        "All lines together (each line by itself, and every word, below):\n\n| contestant | trainings | finished | said done and was \
         not | failed | effective batch kept | steps thrown away | human actions |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for contestant in Contestant::ALL {
        let own: Vec<&Record> =
            records.iter().copied().filter(|record| record.contestant == contestant.name()).collect();
        let count = |what: fn(&Record) -> bool| own.iter().filter(|record| what(record)).count();
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            contestant.name(),
            own.len(),
            count(Record::finished),
            count(|record| record.said_done() && !record.finished()),
            count(|record| !record.said_done()),
            count(|record| record.batch_kept),
            own.iter().map(|record| record.steps_thrown_away).sum::<u64>(),
            own.iter().map(|record| record.human_actions).sum::<u32>(),
        );
    }
    table + "\n"
}

/// What is compared, and what it does not show.
fn introduction() -> String {
    format!(
        "{ROWS} rows of unequal length, {EPOCHS} epochs, effective batch {EFFECTIVE}: {STEPS} optimizer steps, a checkpoint every \
         {SAVE_STEPS}. **Real**: ms-swift, its training (LoRA on a tiny Qwen2, CPU, one thread), the `torch.OutOfMemoryError`, every \
         recovery. **Simulated**: the capacity (a pass needs micro-batch x longest row in it; more than there is raises the \
         error) and the card that NVML shows. Each row of a table is the same cases. What was trained is counted by two plugins \
         that every trainer loads (`tests/trainer/row_order.py`, `finished_steps.py`), not taken from exit codes or receipts.\n\n\
         - **oracle**: knows the capacity; really run, in each case, at the largest of 4, 2, 1 rows that always fits.\n\
         - **person**: the recipe's row for the model (8 x 4); after an error its section 5.1 in order, from zero each time. Of \
         5.1 only 4 x 8 changes anything here (no row is longer than 2048 tokens, nothing is packed on a CPU, checkpointing is \
         on), so no attempt is spent on the rest; then its emergency profile, 1 x 32 (learning rate 1e-4, saves twice as often).\n\
         - **auto-find**: ms-swift's own `--auto_find_batch_size true`, from 8 x 4.\n\
         - **halve**: half the micro-batch, twice the accumulation, from zero each time: what wrappers do.\n\
         - **halve-resume**: the same with a plain `--resume_from_checkpoint` of the newest checkpoint.\n\
         - **mhtraind**: `mhtraind run job.json`; pinned is only what is scaled for everybody (epochs, save steps) or what a \
         CPU needs (float32).\n\n\
         *This does not show*: real memory (the error comes from a rule, so how well mhtraind's prediction fits a real card \
         plays no part, for or against it), trainings of hours (start-up is a large part of the time here, so a second attempt looks dearer \
         than it is beside hours, and a restart from zero cheaper), several cards, how often each kind of case comes in real life (a few cases of one seed are no statistics), or how long it takes until a person looks: \
         only the trainers' time counts for the person. All trainers are started by ms-swift's script without its wrapper, \
         which spares the others its second import of torch. Wall time was measured beside other work; processor time of the \
         trainers (without mhtraind's own, which is small) stands beside it.\n\n"
    )
}

/// One line for each contestant: sums over the cases, and medians with their range for ratios.
fn summary(records: &[&Record]) -> String {
    let mut table = String::from(
        "| contestant | finished | said done and was not | effective batch kept | rows trained twice | rows never | steps thrown \
         away | attempts | wall time, x oracle | CPU time, x oracle | trained rows/s, share of oracle's | human actions |\n\
         | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | ---: |\n",
    );
    for contestant in Contestant::ALL {
        let own: Vec<&Record> =
            records.iter().copied().filter(|record| record.contestant == contestant.name()).collect();
        if own.is_empty() {
            continue;
        }
        let count = |what: fn(&Record) -> bool| own.iter().filter(|record| what(record)).count();
        let sum = |what: fn(&Record) -> u64| own.iter().map(|record| what(record)).sum::<u64>();
        let pairs: Vec<(&Record, &Record)> =
            own.iter().filter_map(|record| Some((*record, oracle_of(records, record)?))).collect();
        let ratio = |what: fn(&Record, &Record) -> f64| -> String {
            range(&pairs.iter().map(|(record, oracle)| what(record, oracle)).collect::<Vec<_>>(), 2)
        };
        let kept = count(|record| record.batch_kept);
        let least = own.iter().map(|record| record.least_batch).min().unwrap_or(0);
        let largest = own.iter().map(|record| record.largest_batch).max().unwrap_or(0);
        let batch = match kept == own.len() {
            true => format!("{kept} of {}", own.len()),
            false => format!("{kept} of {} ({least} to {largest})", own.len()),
        };
        let _ = writeln!(
            table,
            "| {} | {} of {} | {} | {batch} | {} | {} | {} | {} | {} | {} | {} | {} |",
            contestant.name(),
            count(Record::finished),
            own.len(),
            count(|record| record.said_done() && !record.finished()),
            sum(|record| record.rows_again),
            sum(|record| record.rows_never),
            sum(|record| record.steps_thrown_away),
            sum(|record| u64::from(record.attempts)),
            ratio(|record, oracle| record.wall_s / oracle.wall_s),
            ratio(|record, oracle| record.cpu_s / oracle.cpu_s),
            ratio(|record, oracle| rows_per_second(record) / rows_per_second(oracle)),
            sum(|record| u64::from(record.human_actions)),
        );
    }
    table
}

fn oracle_of<'a>(records: &[&'a Record], record: &Record) -> Option<&'a Record> {
    let name = Contestant::Oracle.name();
    records.iter().copied().find(|other| other.contestant == name && other.case == record.case)
}

#[expect(clippy::cast_precision_loss, reason = "hundreds of rows")]
fn rows_per_second(record: &Record) -> f64 {
    record.useful_rows() as f64 / record.wall_s
}

/// One cell for each contestant and case.
fn case_by_case(records: &[&Record]) -> String {
    let cases: BTreeSet<u32> = records.iter().map(|record| record.case).collect();
    let mut table = String::from("| case |");
    for contestant in Contestant::ALL {
        let _ = write!(table, " {} |", contestant.name());
    }
    table.push_str("\n| --- |");
    table.push_str(&" --- |".repeat(Contestant::ALL.len()));
    table.push('\n');
    for case in cases {
        let of_case: Vec<&Record> = records.iter().copied().filter(|record| record.case == case).collect();
        let Some(first) = of_case.first() else { continue };
        let _ = write!(table, "| {} |", described(first));
        for contestant in Contestant::ALL {
            let record = of_case.iter().find(|record| record.contestant == contestant.name());
            let _ = write!(table, " {} |", record.map_or("not run".to_owned(), |record| cell(record)));
        }
        table.push('\n');
    }
    table
}

fn described(record: &Record) -> String {
    let when = match record.short_from_step {
        1 => String::new(),
        step => format!(" from step {step}"),
    };
    format!("{}: {}{when}, {} fit", record.case, record.kind, record.fits)
}

fn cell(record: &Record) -> String {
    let mut text = match (record.finished(), record.exit_code) {
        (true, _) => "finished".to_owned(),
        (false, Some(0)) => "**said done**".to_owned(),
        (false, Some(code)) => format!("failed, exit {code}"),
        (false, None) => "killed".to_owned(),
    };
    for (count, what) in [
        (record.rows_again, "twice"),
        (record.rows_never, "never"),
        (record.steps_thrown_away, "thrown away"),
    ] {
        let unit = if what == "thrown away" { "step" } else { "row" };
        let plural = if count == 1 { "" } else { "s" };
        if count > 0 {
            let _ = write!(text, ", {count} {unit}{plural} {what}");
        }
    }
    if !record.batch_kept && record.largest_batch > 0 {
        let _ = write!(text, ", batch {} to {}", record.least_batch, record.largest_batch);
    }
    let plural = if record.attempts == 1 { "" } else { "s" };
    let _ = write!(text, "; {} attempt{plural}, {:.0} s", record.attempts, record.wall_s);
    text
}

/// Words of the tables.
fn definitions(records: &[&Record]) -> String {
    let least = records.iter().map(|record| record.short_mib).min().unwrap_or(0);
    let largest = records.iter().map(|record| record.short_mib).max().unwrap_or(0);
    format!(
        "### Words\n\n\
         - *finished*: exit 0, and every row is in the final weights exactly as often as planned. *Said done and was not*: exit 0 \
         all the same, with rows missing or trained too often.\n\
         - *rows twice, never*: passes over a row too many and too few in the final weights, summed over the cases ({} planned in \
         each). Weights that begin again in the same process are trained on top of what was trained before.\n\
         - *steps thrown away*: finished optimizer steps that are not in the final weights. *Effective batch kept*: every step in \
         the final weights has {EFFECTIVE} rows (else the range).\n\
         - *attempts*: trainings begun. *Human actions*: edits and restarts by hand; one more for a failure that is left to somebody.\n\
         - *wall, CPU, rows/s*: median of the cases (range), each beside the oracle of the same case. Rows that count are planned \
         ones in the final weights, once for each pass; of a failed training those in its last checkpoint.\n\
         - *long row*: from the beginning a pass may need only so much; *growth*: what is resident grows at a step and stays; \
         *neighbour*: another process takes memory at a step and leaves {NEIGHBOUR_S} s later. While it is short, {least} to \
         {largest} MiB are left for a pass, a token takes one, and *n fit* is the largest micro-batch of 4, 2, 1 that always fits \
         (ms-swift 3.x has a shorter system prompt, so its rows are 13 tokens shorter and more of them may fit).\n\n",
        ROWS * EPOCHS
    )
}

/// Returns the tables that other commands write.
fn included(root: &Path) -> anyhow::Result<String> {
    let read = |name: &str| {
        let path = root.join("docs/measurements").join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let (bench, memory) = (read("bench.md")?, read("memory.md")?);
    let date = memory.lines().nth(2).and_then(|line| line.split('.').next()).unwrap_or_default();
    let bench = bench.split_once('\n').map_or("", |(_, text)| text).trim();
    Ok(format!(
        "## The daemon beside other queues\n\nTaken as it is from [measurements/bench.md](measurements/bench.md); again: `cargo xtask bench \
         --write`.\n\n{bench}\n\n*This does not show* a trainer's own time, which is hours beside these milliseconds, a host with \
         many users, or a disk that is slow to sync.\n\n## The memory estimate\n\nTaken from [measurements/memory.md](measurements/memory.md) \
         ({date}), which has every table; again: `cargo xtask score-memory calibration.csv --configs configs`.\n\n{}\n*This does \
         not show* a real card: the peaks are live storages of fake tensors, for shapes that the estimate's lists were made \
         for. What real cards have reported is the next table.\n\nPeaks of real GPUs, `cargo xtask score-published published.csv`:\n\n\
         {}\n*This does not show* a blind test: the intervals were drawn on these figures.\n\nThe plan against one who knows \
         the truth, `cargo xtask score-plan`:\n\n{}\n*This does not show* real hosts: cards, noise and time are drawn from the \
         command's own laws.\n",
        rows_of_first_table(&memory),
        block(&memory, "## Peaks that real GPUs have shown"),
        block(&memory, "## The plan against one who knows the truth"),
    ))
}

/// Returns the head, the sums and the other rules of the first table, without its lines for each family.
fn rows_of_first_table(memory: &str) -> String {
    let wanted = [
        "| points of",
        "| ---",
        "| all points",
        "| accelerate",
        "| LLaMA-Factory",
        "| Unsloth",
        "| weights and states",
    ];
    let table =
        memory.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    table
        .filter(|line| wanted.iter().any(|start| line.starts_with(start)))
        .fold(String::new(), |text, line| text + line + "\n")
}

/// Returns the first fenced block below a heading.
fn block(page: &str, heading: &str) -> String {
    let mut fences = 0;
    let below = page.lines().skip_while(|line| *line != heading);
    let text: Vec<&str> = below
        .skip_while(|line| !line.starts_with("```"))
        .take_while(|line| {
            let inside = fences < 2;
            fences += usize::from(line.starts_with("```"));
            inside
        })
        .collect();
    text.join("\n") + "\n"
}

/// Returns the median of figures and, where there are several, their range.
fn range(figures: &[f64], digits: usize) -> String {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.as_slice() {
        [] => "-".to_owned(),
        [one] => format!("{one:.digits$}"),
        [first, .., last] => {
            let middle = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
            format!("{middle:.digits$} ({first:.digits$} to {last:.digits$})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_a_median_and_its_range() {
        assert_eq!(range(&[], 1), "-");
        assert_eq!(range(&[2.0], 2), "2.00");
        assert_eq!(range(&[3.0, 1.0, 2.0], 1), "2.0 (1.0 to 3.0)");
        assert_eq!(range(&[4.0, 1.0, 2.0, 3.0], 1), "2.5 (1.0 to 4.0)");
    }

    /// Whoever writes those pages anew has to keep what is taken from them here.
    #[test]
    fn the_tables_of_the_other_commands_are_found() {
        let root = crate::workspace::root().unwrap();
        let text = included(&root).unwrap();
        for wanted in
            ["submit to exec of the trainer", "| all points | 795", "inside   below", "oracle's rung"]
        {
            assert!(text.contains(wanted), "{wanted}");
        }
        assert_eq!(text.matches("```").count(), 4, "two whole blocks");
    }
}
