//! What was measured, and where is it kept?
//!
//! A line for each case and contestant in a CSV beside the other measurements. What is there for the same seed and the same
//! versions is not run again.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// A contestant's training in one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) line: String,
    pub(super) seed: u64,
    pub(super) case: u32,
    pub(super) contestant: String,
    pub(super) kind: String,
    pub(super) fits: u64,
    pub(super) short_from_step: u64,
    pub(super) short_mib: u64,
    pub(super) exit_code: Option<i32>,
    pub(super) attempts: u32,
    pub(super) human_actions: u32,
    pub(super) rows_planned: u64,
    pub(super) rows_again: u64,
    pub(super) rows_never: u64,
    pub(super) least_batch: u64,
    pub(super) largest_batch: u64,
    pub(super) batch_kept: bool,
    pub(super) steps_done: u64,
    pub(super) steps_kept: u64,
    pub(super) steps_thrown_away: u64,
    pub(super) wall_s: f64,
    pub(super) cpu_s: f64,
    pub(super) load: f64,
    pub(super) date: String,
    pub(super) commit: String,
    pub(super) versions: String,
}

impl Record {
    /// Every planned row is in the final weights as often as planned, and no more often.
    pub(super) fn finished(&self) -> bool {
        self.said_done() && self.rows_never == 0 && self.rows_again == 0
    }

    /// The last process claimed success.
    pub(super) fn said_done(&self) -> bool {
        self.exit_code == Some(0)
    }

    /// Planned rows that are in the final weights, each pass over them once.
    pub(super) fn useful_rows(&self) -> u64 {
        self.rows_planned - self.rows_never
    }
}

/// All results, in the file's order.
#[derive(Debug)]
pub(super) struct Results {
    path: PathBuf,
    pub(super) records: Vec<Record>,
}

impl Results {
    /// Reads what is there; without a file nothing is.
    pub(super) fn read(path: &Path) -> anyhow::Result<Results> {
        let mut records = Vec::new();
        if path.exists() {
            let mut reader =
                csv::Reader::from_path(path).with_context(|| format!("cannot open {}", path.display()))?;
            for record in reader.deserialize() {
                records.push(record.with_context(|| format!("cannot read {}", path.display()))?);
            }
        }
        Ok(Results { path: path.to_owned(), records })
    }

    pub(super) fn find(
        &self,
        seed: u64,
        case: u32,
        line: &str,
        contestant: &str,
        versions: &str,
    ) -> Option<&Record> {
        self.records.iter().rev().find(|record| {
            (record.seed, record.case) == (seed, case)
                && (record.line.as_str(), record.contestant.as_str()) == (line, contestant)
                && record.versions == versions
        })
    }

    /// Adds a result, on disk first. An older one of the same case goes.
    pub(super) fn add(&mut self, record: Record) -> anyhow::Result<()> {
        self.records.retain(|old| {
            (old.seed, old.case, &old.line, &old.contestant)
                != (record.seed, record.case, &record.line, &record.contestant)
        });
        self.records.push(record);
        let fresh = self.path.with_extension("csv.new");
        let mut writer = csv::Writer::from_writer(File::create(&fresh)?);
        for record in &self.records {
            writer.serialize(record)?;
        }
        writer.flush()?;
        std::fs::rename(&fresh, &self.path)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(())
    }
}
