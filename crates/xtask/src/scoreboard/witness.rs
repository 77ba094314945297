//! Which rows are in the final weights?
//!
//! Counted from what the trainers really drew, by the same two plugins in every contestant's trainer (`row_order.py` writes each
//! micro-batch down, `finished_steps.py` each finished step), and not from exit codes, logs or receipts.

use std::collections::BTreeMap;

use anyhow::Context;
use serde::Deserialize;

use super::cases::{EFFECTIVE, EPOCHS, ROWS};

/// A line of the plugins' file: a micro-batch, or an event.
#[derive(Debug, Deserialize)]
struct Line {
    step: u64,
    pid: u64,
    #[serde(default)]
    ids: Vec<u64>,
    event: Option<Event>,
    #[serde(default)]
    cpu: f64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Event {
    Begin,
    Done,
    Saved,
    End,
}

/// An optimizer step that was finished.
#[derive(Clone, Debug, PartialEq)]
struct Step {
    number: u64,
    rows: Vec<u64>,
}

/// What a contestant's trainers did, all attempts together.
#[derive(Debug, Default)]
pub(super) struct History {
    /// The steps that are in the weights, in order.
    weights: Vec<Step>,
    /// How many of `weights` the newest checkpoint of them has.
    saved: usize,
    /// Trainings that were begun, in one process or several.
    pub(super) begun: u32,
    /// Optimizer steps that were finished in any of them.
    pub(super) steps_done: u64,
    /// Seconds of processor time of the trainers.
    pub(super) cpu_s: f64,
    /// The newest step of the newest training, and whether a process has left.
    pub(super) newest_step: u64,
}

impl History {
    /// Reads the plugins' file. A last line that is not whole is left out: its writer lives, or was killed.
    pub(super) fn read(text: &str) -> anyhow::Result<History> {
        let mut history = History::default();
        let mut process = None;
        let mut drawn = Vec::new();
        let mut cpu: BTreeMap<u64, f64> = BTreeMap::new();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let line: Line =
                serde_json::from_str(line).with_context(|| format!("not the witness's: {line}"))?;
            match line.event {
                None => drawn.extend(line.ids),
                Some(Event::Begin) => {
                    history.begun += 1;
                    history.begin(line.step, process == Some(line.pid));
                    process = Some(line.pid);
                    drawn.clear();
                    history.newest_step = line.step;
                }
                Some(Event::Done) => {
                    history.steps_done += 1;
                    history.weights.push(Step { number: line.step, rows: std::mem::take(&mut drawn) });
                    history.newest_step = line.step;
                }
                Some(Event::Saved) => history.saved = history.weights.len(),
                Some(Event::End) => {}
            }
            if line.event.is_some() {
                cpu.insert(line.pid, line.cpu);
            }
        }
        history.cpu_s = cpu.values().sum();
        Ok(history)
    }

    /// A training begins after `step` steps. A new process has the weights of its checkpoint; one that begins again by itself
    /// keeps those that it has: `auto_find_batch_size` builds no new model.
    fn begin(&mut self, step: u64, same_process: bool) {
        if !same_process {
            self.weights.retain(|done| done.number <= step);
            self.saved = self.saved.min(self.weights.len());
        }
    }

    /// Returns what came of it. `ended_well`: the last trainer exited with 0; else only what was saved is left.
    pub(super) fn verdict(&self, ended_well: bool) -> Verdict {
        let kept = if ended_well { &self.weights[..] } else { &self.weights[..self.saved] };
        let mut times: BTreeMap<u64, u64> = (0..ROWS).map(|row| (row, 0)).collect();
        for row in kept.iter().flat_map(|step| &step.rows) {
            *times.entry(*row).or_default() += 1;
        }
        let sizes: Vec<u64> = kept.iter().map(|step| u64::try_from(step.rows.len()).unwrap_or(0)).collect();
        let steps_kept = u64::try_from(kept.len()).unwrap_or(0);
        Verdict {
            rows_again: times.values().map(|times| times.saturating_sub(EPOCHS)).sum(),
            rows_never: times.values().map(|times| EPOCHS.saturating_sub(*times)).sum(),
            steps_kept,
            steps_thrown_away: self.steps_done - steps_kept,
            least_batch: sizes.iter().copied().min().unwrap_or(0),
            largest_batch: sizes.iter().copied().max().unwrap_or(0),
            batch_kept: !sizes.is_empty() && sizes.iter().all(|size| *size == EFFECTIVE),
        }
    }
}

/// What is in the final weights.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Rows that were trained more often than planned, each extra pass counted.
    pub(super) rows_again: u64,
    /// Rows that were not trained as often as planned, each missing pass counted.
    pub(super) rows_never: u64,
    pub(super) steps_kept: u64,
    pub(super) steps_thrown_away: u64,
    pub(super) least_batch: u64,
    pub(super) largest_batch: u64,
    pub(super) batch_kept: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes what the plugins write of a step: two micro-batches, and its end.
    fn step(pid: u64, number: u64, rows: std::ops::Range<u64>) -> String {
        let (first, all): (Vec<u64>, Vec<u64>) = (rows.clone().take(3).collect(), rows.collect());
        format!(
            "{{\"step\":{number},\"rows\":3,\"longest\":9,\"ids\":{first:?},\"pid\":{pid}}}\n\
             {{\"step\":{number},\"rows\":3,\"longest\":9,\"ids\":{:?},\"pid\":{pid}}}\n\
             {{\"event\":\"done\",\"step\":{number},\"pid\":{pid},\"cpu\":{number}.5}}\n",
            &all[3..]
        )
    }

    fn event(pid: u64, event: &str, step: u64) -> String {
        format!("{{\"event\":\"{event}\",\"step\":{step},\"pid\":{pid},\"cpu\":9.0}}\n")
    }

    fn epoch(pid: u64, from: u64, first: u64) -> String {
        (first..8).map(|n| step(pid, from + n + 1, n * 32..(n + 1) * 32)).collect()
    }

    #[test]
    fn a_whole_training_has_every_row_as_often_as_planned() {
        let text = event(1, "begin", 0) + &epoch(1, 0, 0) + &epoch(1, 8, 0);
        let verdict = History::read(&text).unwrap().verdict(true);
        assert_eq!((verdict.rows_again, verdict.rows_never, verdict.steps_thrown_away), (0, 0, 0));
        assert!(verdict.batch_kept);
    }

    #[test]
    fn a_resume_keeps_the_steps_of_its_checkpoint_and_throws_later_ones_away() {
        let died = event(1, "begin", 0) + &epoch(1, 0, 0) + &event(1, "end", 0);
        let text = died + &event(2, "begin", 4) + &epoch(2, 0, 4) + &epoch(2, 8, 0);
        let verdict = History::read(&text).unwrap().verdict(true);
        assert_eq!((verdict.rows_again, verdict.rows_never, verdict.steps_thrown_away), (0, 0, 4));
    }

    #[test]
    fn what_begins_again_in_the_same_process_is_trained_on_top_of_what_was() {
        let text = event(1, "begin", 0) + &step(1, 1, 0..32) + &event(1, "begin", 0) + &epoch(1, 0, 0);
        let history = History::read(&(text + &epoch(1, 8, 0))).unwrap();
        let verdict = history.verdict(true);
        assert_eq!((history.begun, verdict.rows_again, verdict.rows_never), (2, 32, 0));
    }

    #[test]
    fn of_a_training_that_died_only_what_was_saved_counts() {
        let text = event(1, "begin", 0) + &step(1, 1, 0..32) + &event(1, "saved", 1) + &step(1, 2, 32..64);
        let verdict = History::read(&text).unwrap().verdict(false);
        assert_eq!((verdict.steps_kept, verdict.steps_thrown_away, verdict.rows_never), (1, 1, 512 - 32));
    }
}
