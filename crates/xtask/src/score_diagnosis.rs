//! How good is the diagnosis over labelled logs?

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use mhtrain_job::diagnosis::{Diagnosis, Kind};
use mhtrain_sizing::units::Bytes;
use mhtrain_swift::diagnosis::{ExitFacts, diagnose};
use serde::Deserialize;

/// Scores the diagnosis over a directory of labelled logs: `<kind>/<nn>.log` and `labels.csv`.
#[derive(Debug, clap::Args)]
pub(crate) struct ScoreDiagnosisArgs {
    /// The directory.
    dir: PathBuf,
    /// Leave the exit code out, as when only a log is at hand.
    #[arg(long)]
    without_exit_code: bool,
    /// A file with one path a line: only these are scored.
    #[arg(long)]
    only: Option<PathBuf>,
    /// With `--only`: score the others.
    #[arg(long, requires = "only")]
    except: bool,
}

/// One row of labels.csv. Amounts are in MiB.
#[derive(Debug, Deserialize)]
struct Label {
    file: PathBuf,
    kind: Kind,
    fatal: String,
    exit_code: Option<i32>,
    tried_mib: Option<f64>,
    total_mib: Option<f64>,
    free_mib: Option<f64>,
    this_process_mib: Option<f64>,
    allocated_mib: Option<f64>,
    reserved_total_mib: Option<f64>,
    reserved_unallocated_mib: Option<f64>,
}

/// Counts over all logs.
#[derive(Debug, Default)]
struct Score {
    logs: usize,
    right: usize,
    fatal_right: usize,
    false_device_oom: usize,
    sizes: usize,
    sizes_right: usize,
    other_sizes: usize,
    other_sizes_right: usize,
    confusion: BTreeMap<(String, String), usize>,
    misses: String,
}

/// Runs the command.
pub(crate) fn run(args: &ScoreDiagnosisArgs) -> anyhow::Result<()> {
    let labels = args.dir.join("labels.csv");
    let mut reader =
        csv::Reader::from_path(&labels).with_context(|| format!("cannot read {}", labels.display()))?;
    let only: Option<Vec<PathBuf>> = match &args.only {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(text.lines().map(PathBuf::from).collect())
        }
        None => None,
    };
    let mut score = Score::default();
    for row in reader.deserialize() {
        let label: Label = row.with_context(|| format!("bad row in {}", labels.display()))?;
        if only.as_ref().is_some_and(|only| only.contains(&label.file) == args.except) {
            continue;
        }
        let path = args.dir.join(&label.file);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let code = if args.without_exit_code { None } else { label.exit_code };
        score.add(&label, &diagnose(&text, ExitFacts { code, ..ExitFacts::default() }));
    }
    anyhow::ensure!(score.logs > 0, "no log was scored: {} names none of the wanted ones", labels.display());
    std::io::stdout().write_all(score.report().as_bytes())?;
    Ok(())
}

impl Score {
    fn add(&mut self, label: &Label, found: &Diagnosis) {
        let is_device_oom = |kind| matches!(kind, Kind::DeviceOom | Kind::DeviceOomByNeighbour);
        self.logs += 1;
        let right = label.kind == found.kind;
        self.right += usize::from(right);
        self.fatal_right += usize::from((label.fatal == "yes") == found.fatal);
        self.false_device_oom += usize::from(is_device_oom(found.kind) && !is_device_oom(label.kind));
        *self.confusion.entry((name(label.kind), name(found.kind))).or_default() += 1;
        if !right {
            let evidence: String = found.evidence.line.chars().take(150).collect();
            let _ = writeln!(self.misses, "  {}: {}  <- {evidence}", label.file.display(), name(found.kind));
        } else if (label.fatal == "yes") != found.fatal {
            let _ = writeln!(self.misses, "  {}: fatal is {}", label.file.display(), found.fatal);
        }
        let evidence = &found.evidence;
        // A driver's nonsense is labelled as printed, and rightly not believed.
        let believed = |mib: Option<f64>| mib.filter(|mib| *mib < 1e9);
        for (wanted, read) in [
            (label.tried_mib, evidence.tried_bytes),
            (label.total_mib, evidence.total_bytes),
            (label.free_mib, evidence.free_bytes),
        ] {
            self.sizes += usize::from(wanted.is_some());
            let same = same_amount(wanted, read);
            self.sizes_right += usize::from(wanted.is_some() && same);
            if !same {
                let _ = writeln!(self.misses, "  {}: {wanted:?} MiB read as {read:?}", label.file.display());
            }
        }
        for (wanted, read) in [
            (label.this_process_mib, evidence.this_process_bytes),
            (label.allocated_mib, evidence.allocated_bytes),
            // The labels put the "cached" of old messages here; it is what was reserved and not allocated.
            (label.reserved_total_mib, evidence.reserved_total_bytes.or(evidence.reserved_unallocated_bytes)),
            (label.reserved_unallocated_mib, evidence.reserved_unallocated_bytes),
        ] {
            if let Some(wanted) = believed(wanted) {
                self.other_sizes += 1;
                let same = same_amount(Some(wanted), read);
                self.other_sizes_right += usize::from(same);
                if !same {
                    let _ =
                        writeln!(self.misses, "  {}: {wanted} MiB read as {read:?}", label.file.display());
                }
            }
        }
    }

    fn report(&self) -> String {
        let mut out = String::from("labelled as -> diagnosed as\n");
        for ((wanted, found), count) in &self.confusion {
            let mark = if wanted == found { ' ' } else { '*' };
            let _ = writeln!(out, "{mark} {wanted:26} {found:26} {count:3}");
        }
        if !self.misses.is_empty() {
            let _ = write!(out, "misses\n{}", self.misses);
        }
        let _ = writeln!(out, "kind right            {}", share(self.right, self.logs));
        let _ = writeln!(out, "fatal right           {}", share(self.fatal_right, self.logs));
        let _ = writeln!(out, "false device OOM      {}", self.false_device_oom);
        let _ = writeln!(out, "tried, total, free    {}", share(self.sizes_right, self.sizes));
        let _ = writeln!(out, "other amounts         {}", share(self.other_sizes_right, self.other_sizes));
        out
    }
}

/// Amounts are printed with two digits, so a hundredth of the unit is the same.
fn same_amount(wanted_mib: Option<f64>, read: Option<Bytes>) -> bool {
    match (wanted_mib, read) {
        (None, None) => true,
        (Some(wanted), Some(read)) => (read.mib() - wanted).abs() <= 0.01 + wanted * 1e-3,
        (None, Some(_)) | (Some(_), None) => false,
    }
}

fn name(kind: Kind) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        Ok(_) | Err(_) => format!("{kind:?}"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred logs")]
fn share(part: usize, whole: usize) -> String {
    let percent = if whole == 0 { 100.0 } else { 100.0 * part as f64 / whole as f64 };
    format!("{part}/{whole} ({percent:.1} %)")
}
