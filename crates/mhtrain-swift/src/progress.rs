//! How far is a trainer, judged by what it writes?
//!
//! `logging.jsonl` in the output directory has true numbers in every version; stderr has the progress bar and what
//! was done to the data. stdout is not read: version 4 rounds the numbers there and prints them as text.

use std::sync::LazyLock;
use std::time::Duration;

use mhtrain_sizing::units::Bytes;
use regex::{Captures, Regex};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::python_json;

/// A longer line of `logging.jsonl` is skipped. The summary line holds the history of the whole run: about 200
/// bytes for each logged step.
const LONGEST_LOG_LINE: usize = 64 << 20;

/// Of a longer line of stderr only the beginning is looked at.
const LONGEST_STDERR_LINE: usize = 64 << 10;

/// One train line of `logging.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Steps that the trainer means to do.
    pub max_steps: u64,
    /// Training loss; NaN and infinite values are kept as such.
    pub loss: Option<f64>,
    /// Norm of the gradients before clipping.
    pub grad_norm: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: Option<f64>,
    /// Passes over the data, with a fraction.
    pub epoch: Option<f64>,
    /// Running maximum of what torch had reserved; absent on a CPU.
    pub memory: Option<Bytes>,
    /// Time since this process began to train (not since the job began).
    pub elapsed: Option<Duration>,
    /// The trainer's own guess of what is left.
    pub remaining: Option<Duration>,
    /// Mean over this process.
    pub seconds_per_step: Option<f64>,
}

impl Progress {
    /// Returns whether loss and gradient are numbers that training can go on with.
    pub fn is_finite(&self) -> bool {
        [self.loss, self.grad_norm].into_iter().flatten().all(f64::is_finite)
    }
}

/// One evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The step after which it ran.
    pub step: u64,
    /// Loss on the validation data.
    pub loss: f64,
}

/// The line that ms-swift writes after its training loop. It is written too when a resume trained nothing.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndOfTraining {
    /// Optimizer steps done, those before a resume included.
    pub step: u64,
    /// Steps that the trainer meant to do.
    pub max_steps: u64,
    /// Mean loss of this process.
    pub train_loss: Option<f64>,
}

/// The last line of a run. It is written on failure as well.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Length of the train set after filtering and packing.
    pub train_rows: Option<u64>,
    /// Length of the validation set.
    pub val_rows: Option<u64>,
    /// The last checkpoint that this process wrote.
    pub last_model_checkpoint: Option<String>,
    /// The best one by the evaluation.
    pub best_model_checkpoint: Option<String>,
    /// Optimizer steps done.
    pub global_step: Option<u64>,
}

/// What `logging.jsonl` says about its last attempt.
///
/// A rerun into the same directory appends to the file. A train line whose step does not rise, or that follows a
/// summary, begins the next attempt, and what was said about the one before is forgotten.
#[derive(Clone, Debug, Default)]
pub struct TrainerLog {
    pending: LineBuffer,
    latest: Option<Progress>,
    evaluation: Option<Evaluation>,
    end: Option<EndOfTraining>,
    summary: Option<Summary>,
    skipped_lines: u64,
    not_finite: u64,
    last_finite_step: Option<u64>,
}

impl TrainerLog {
    /// Returns a log that has read nothing.
    pub fn new() -> TrainerLog {
        TrainerLog::default()
    }

    /// Reads the next bytes of the file, however they are cut.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.push(bytes, LONGEST_LOG_LINE, |byte| byte == b'\n', |line| self.push_line(&line));
        self.pending = pending;
    }

    /// Reads one whole line.
    pub fn push_line(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        match python_json::parse(line) {
            Ok(Value::Object(fields)) => self.push_fields(&fields),
            Ok(_) | Err(_) => self.skipped_lines += 1,
        }
    }

    /// Returns the last train line.
    pub fn latest(&self) -> Option<&Progress> {
        self.latest.as_ref()
    }

    /// Returns the last evaluation.
    pub fn evaluation(&self) -> Option<&Evaluation> {
        self.evaluation.as_ref()
    }

    /// Returns the end-of-training line of the last attempt.
    pub fn end_of_training(&self) -> Option<EndOfTraining> {
        self.end
    }

    /// Returns the summary line of the last attempt.
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }

    /// Returns how many lines were no JSON object of a known form.
    pub fn skipped_lines(&self) -> u64 {
        self.skipped_lines
    }

    /// Returns how many train lines of the last attempt in a row, up to the latest, had a loss or gradient that is
    /// no number.
    pub fn not_finite_in_a_row(&self) -> u64 {
        self.not_finite
    }

    /// Returns the last step of the last attempt whose loss and gradient were numbers.
    pub fn last_finite_step(&self) -> Option<u64> {
        self.last_finite_step
    }

    fn push_fields(&mut self, fields: &Map<String, Value>) {
        let float = |key: &str| fields.get(key).and_then(python_json::number);
        let steps = fields.get("global_step/max_steps").and_then(Value::as_str).and_then(step_of_max);
        if fields.contains_key("last_model_checkpoint") || fields.contains_key("log_history") {
            self.summary = Some(summary(fields));
        } else if let (Some((step, max_steps)), true) = (steps, fields.contains_key("train_runtime")) {
            self.end = Some(EndOfTraining { step, max_steps, train_loss: float("train_loss") });
        } else if let (Some((step, _)), Some(loss)) = (steps, float("eval_loss")) {
            self.evaluation = Some(Evaluation { step, loss });
        } else if let (Some((step, max_steps)), true) = (steps, fields.contains_key("loss")) {
            self.push_progress(Progress {
                step,
                max_steps,
                loss: float("loss"),
                grad_norm: float("grad_norm"),
                learning_rate: float("learning_rate"),
                epoch: float("epoch"),
                memory: float("memory(GiB)").map(|gib| Bytes::from_f64(gib * 1024f64.powi(3))),
                elapsed: fields.get("elapsed_time").and_then(Value::as_str).and_then(duration_of),
                remaining: fields.get("remaining_time").and_then(Value::as_str).and_then(duration_of),
                seconds_per_step: float("train_speed(s/it)")
                    .or_else(|| float("train_speed(iter/s)").filter(|speed| *speed > 0.0).map(f64::recip)),
            });
        } else {
            self.skipped_lines += 1;
        }
    }

    fn push_progress(&mut self, progress: Progress) {
        let goes_back = self.latest.as_ref().is_some_and(|latest| progress.step <= latest.step);
        if goes_back || self.end.is_some() || self.summary.is_some() {
            self.evaluation = None;
            self.end = None;
            self.summary = None;
            self.not_finite = 0;
            self.last_finite_step = None;
        }
        if progress.is_finite() {
            self.last_finite_step = Some(progress.step);
        }
        self.not_finite = if progress.is_finite() { 0 } else { self.not_finite + 1 };
        self.latest = Some(progress);
    }
}

fn summary(fields: &Map<String, Value>) -> Summary {
    let text = |key: &str| fields.get(key).and_then(Value::as_str);
    Summary {
        train_rows: text("train_dataset").and_then(size_of_statistics),
        val_rows: text("val_dataset").and_then(size_of_statistics),
        last_model_checkpoint: text("last_model_checkpoint").map(str::to_owned),
        best_model_checkpoint: text("best_model_checkpoint").map(str::to_owned),
        global_step: fields.get("global_step").and_then(Value::as_u64),
    }
}

/// Rows that a filter saw and kept.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filtered {
    /// Rows before.
    pub origin: u64,
    /// Rows after.
    pub kept: u64,
}

/// The state of a progress bar.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// Optimizer steps done.
    pub step: u64,
    /// Steps that the trainer means to do.
    pub max_steps: u64,
    /// What the bar thinks is left.
    pub remaining: Option<Duration>,
    /// Its current speed.
    pub seconds_per_step: Option<f64>,
}

/// What stderr says about the data and about how far training is.
#[derive(Clone, Debug, Default)]
pub struct StderrWatch {
    pending: LineBuffer,
    bar: Option<Bar>,
    token_lengths: Vec<u64>,
    filtered: Vec<Filtered>,
    dataset_rows: Option<u64>,
    in_train_dataset: bool,
}

static BAR: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"Train:\s+\d+%\|[^|]*\|\s*(\d+)/(\d+)\s+\[[\d:?]+<([\d:?]+)(?:\s*days?)?,\s*(?:([\d.]+)(s/it|it/s)|\?)?",
    )
    .expect("the pattern of the bar is well-formed")
});

static FILTERED: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"Dataset filtered, origin length: (\d+), filtered dataset length: (\d+)")
        .expect("the pattern of the filter line is well-formed")
});

/// More filter lines than this are not kept; ms-swift writes one for each data set and stage.
const FILTER_LINES: usize = 256;

impl StderrWatch {
    /// Returns a watch that has read nothing.
    pub fn new() -> StderrWatch {
        StderrWatch::default()
    }

    /// Reads the next bytes of stderr, however they are cut.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        let mut pending = std::mem::take(&mut self.pending);
        let ends = |byte| byte == b'\n' || byte == b'\r';
        pending.push(bytes, LONGEST_STDERR_LINE, ends, |line| self.push_line(&line));
        self.pending = pending;
    }

    /// Returns where the progress bar of the training is.
    pub fn bar(&self) -> Option<Bar> {
        self.bar
    }

    /// Returns the length of the train set after filtering and packing, as the trainer itself counted it.
    ///
    /// ms-swift prints the token statistics of the train set first and of the validation set second; it prints
    /// none with `lazy_tokenize` or `streaming`. Source: `_stat_dataset` of its sft pipeline, 3.12.6 and 4.6.0.
    pub fn train_rows(&self) -> Option<u64> {
        self.token_lengths.first().copied()
    }

    /// Returns the length of the validation set.
    pub fn val_rows(&self) -> Option<u64> {
        self.token_lengths.get(1).copied()
    }

    /// Returns the rows of the train set before packing. With `lazy_tokenize` and without packing this is the only
    /// count there is.
    pub fn dataset_rows(&self) -> Option<u64> {
        self.dataset_rows
    }

    /// Returns every filter that dropped or kept rows, in order.
    pub fn filtered(&self) -> &[Filtered] {
        &self.filtered
    }

    /// Returns how many rows were dropped in all.
    pub fn rows_dropped(&self) -> u64 {
        self.filtered.iter().map(|filter| filter.origin.saturating_sub(filter.kept)).sum()
    }

    fn push_line(&mut self, line: &str) {
        if let Some(bar) = BAR.captures_iter(line).last().and_then(|found| bar_of(&found)) {
            self.bar = Some(bar);
        }
        // Text of the data may be on stderr as well, but not behind the trainer's own prefix.
        let Some((_, message)) = line.split_once("[INFO:swift] ") else {
            if let (true, Some(rows)) = (self.in_train_dataset, line.trim().strip_prefix("num_rows: ")) {
                self.dataset_rows = rows.parse().ok();
                self.in_train_dataset = false;
            }
            return;
        };
        self.in_train_dataset = message.starts_with("train_dataset: Dataset({");
        if let Some(statistics) = message.strip_prefix("Dataset Token Length: ") {
            if self.token_lengths.len() < 2 {
                self.token_lengths.extend(size_of_statistics(statistics));
            }
        } else if self.filtered.len() < FILTER_LINES {
            self.filtered.extend(FILTERED.captures(message).and_then(|found| filtered_of(&found)));
        }
    }
}

fn bar_of(found: &Captures<'_>) -> Option<Bar> {
    let speed: Option<f64> = found.get(4).and_then(|speed| speed.as_str().parse().ok());
    let per_second = found.get(5).is_some_and(|unit| unit.as_str() == "it/s");
    Some(Bar {
        step: found[1].parse().ok()?,
        max_steps: found[2].parse().ok()?,
        remaining: clock(&found[3]),
        seconds_per_step: match (speed, per_second) {
            (Some(speed), true) => (speed > 0.0).then(|| speed.recip()),
            (speed, _) => speed,
        },
    })
}

fn filtered_of(found: &Captures<'_>) -> Option<Filtered> {
    Some(Filtered { origin: found[1].parse().ok()?, kept: found[2].parse().ok()? })
}

/// Bytes of a line that is not complete yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct LineBuffer {
    bytes: Vec<u8>,
}

impl LineBuffer {
    /// Hands every completed line to `take`; of a line over `longest` only the beginning.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        longest: usize,
        ends: impl Fn(u8) -> bool,
        mut take: impl FnMut(String),
    ) {
        for &byte in bytes {
            if ends(byte) {
                take(String::from_utf8_lossy(&self.bytes).into_owned());
                self.bytes.clear();
            } else if self.bytes.len() < longest {
                self.bytes.push(byte);
            }
        }
    }
}

/// Reads `3/10`.
fn step_of_max(text: &str) -> Option<(u64, u64)> {
    let (step, max_steps) = text.split_once('/')?;
    Some((step.trim().parse().ok()?, max_steps.trim().parse().ok()?))
}

/// Reads N from `161.75±32.25, min=108.0, max=220.0, size=304`.
fn size_of_statistics(text: &str) -> Option<u64> {
    let (_, size) = text.rsplit_once("size=")?;
    size.trim().parse().ok()
}

/// Reads `1d 2h 3m 4s`, any part of which may be missing.
fn duration_of(text: &str) -> Option<Duration> {
    let mut seconds = 0u64;
    for part in text.split_whitespace() {
        let unit = match part.chars().last()? {
            'd' => 86_400,
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        let amount: u64 = part[..part.len() - 1].parse().ok()?;
        seconds = seconds.checked_add(amount.checked_mul(unit)?)?;
    }
    (!text.trim().is_empty()).then(|| Duration::from_secs(seconds))
}

/// Reads `00:23` or `12:34:55`; `?` is unknown.
fn clock(text: &str) -> Option<Duration> {
    let mut seconds = 0u64;
    for part in text.split(':') {
        seconds = seconds.checked_mul(60)?.checked_add(part.parse().ok()?)?;
    }
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> TrainerLog {
        let mut log = TrainerLog::new();
        log.push_bytes(text.as_bytes());
        log
    }

    const TRAIN: &str = r#"{"loss": 2.5, "grad_norm": 1.25, "learning_rate": 0.0001, "epoch": 0.3, "global_step/max_steps": "3/10", "elapsed_time": "1m 2s", "remaining_time": "1h 0m 5s", "memory(GiB)": 1.5, "train_speed(s/it)": 2.0}"#;
    const EVAL: &str = r#"{"eval_loss": 2.25, "eval_runtime": 0.5, "global_step/max_steps": "3/10"}"#;
    const END: &str = r#"{"train_runtime": 9.5, "train_loss": 2.0, "global_step/max_steps": "10/10"}"#;
    const SUMMARY: &str = r#"{"train_dataset": "160.5±3.0, min=1.0, max=9.0, size=304", "last_model_checkpoint": "out/checkpoint-10", "best_model_checkpoint": null, "global_step": 10, "log_history": [{"loss": NaN}]}"#;

    #[test]
    fn each_kind_of_line_is_read() {
        let log = read(&format!("{TRAIN}\n{EVAL}\n{END}\n{SUMMARY}\n"));
        let latest = log.latest().unwrap();
        assert_eq!((latest.step, latest.max_steps, latest.loss), (3, 10, Some(2.5)));
        assert_eq!(latest.memory, Some(Bytes::from_mib(1536)));
        assert_eq!(latest.elapsed, Some(Duration::from_secs(62)));
        assert_eq!(latest.remaining, Some(Duration::from_secs(3605)));
        assert_eq!(log.evaluation(), Some(&Evaluation { step: 3, loss: 2.25 }));
        assert_eq!(
            log.end_of_training(),
            Some(EndOfTraining { step: 10, max_steps: 10, train_loss: Some(2.0) })
        );
        let summary = log.summary().unwrap();
        assert_eq!(summary.train_rows, Some(304));
        assert_eq!(summary.last_model_checkpoint.as_deref(), Some("out/checkpoint-10"));
        assert_eq!(log.skipped_lines(), 0);
    }

    #[test]
    fn a_line_is_read_only_when_it_is_whole() {
        let mut log = TrainerLog::new();
        let (head, tail) = TRAIN.split_at(40);
        log.push_bytes(head.as_bytes());
        assert_eq!(log.latest(), None);
        log.push_bytes(tail.as_bytes());
        log.push_bytes(b"\n");
        assert_eq!(log.latest().map(|latest| latest.step), Some(3));
    }

    #[test]
    fn a_second_attempt_in_the_same_file_forgets_the_end_of_the_first() {
        let log = read(&format!("{TRAIN}\n{END}\n{SUMMARY}\n{TRAIN}\n"));
        assert_eq!(log.end_of_training(), None);
        assert_eq!(log.summary(), None);
        assert_eq!(log.latest().map(|latest| latest.step), Some(3));
    }

    #[test]
    fn nan_is_a_loss_and_counted() {
        let nan = r#"{"loss": NaN, "grad_norm": Infinity, "global_step/max_steps": "4/10"}"#;
        let log = read(&format!("{TRAIN}\n{nan}\n"));
        assert!(log.latest().unwrap().loss.unwrap().is_nan());
        assert_eq!(log.not_finite_in_a_row(), 1);
        assert_eq!(log.skipped_lines(), 0);
    }

    #[test]
    fn garbage_is_skipped_and_counted() {
        let log = read(&format!("not json\n[1]\n{{\"loss\": 1}}\n\n{TRAIN}\n{{\"cut\": \n"));
        assert_eq!(log.skipped_lines(), 4);
        assert_eq!(log.latest().map(|latest| latest.step), Some(3));
    }

    #[test]
    fn stderr_tells_the_bar_and_the_rows() {
        let mut watch = StderrWatch::new();
        let text = "\rMap:  50%|#####     | 160/320 [00:00<00:01, 150.0 examples/s]\r[INFO:swift] Dataset filtered, \
                    origin length: 320, filtered dataset length: 316\n[INFO:swift] train_dataset: Dataset({\n    \
                    features: ['messages'],\n    num_rows: 300\n})\n[INFO:swift] val_dataset: Dataset({\n    num_rows: \
                    16\n})\n[INFO:swift] Dataset Token Length: 9.5±1.0, min=1.0, max=20.0, size=75\n[INFO:swift] \
                    Dataset Token Length: 9.5±1.0, min=1.0, max=20.0, size=16\n\rTrain:  20%|##        | 2/10 \
                    [00:05<00:23,  2.94s/it]\r";
        watch.push_bytes(text.as_bytes());
        assert_eq!(watch.train_rows(), Some(75));
        assert_eq!(watch.val_rows(), Some(16));
        assert_eq!(watch.dataset_rows(), Some(300));
        assert_eq!(watch.rows_dropped(), 4);
        let bar = watch.bar().unwrap();
        assert_eq!((bar.step, bar.max_steps), (2, 10));
        assert_eq!(bar.remaining, Some(Duration::from_secs(23)));
        assert_eq!(bar.seconds_per_step, Some(2.94));
    }

    #[test]
    fn the_speed_of_a_bar_is_in_either_unit_or_unknown() {
        for (text, speed) in [("?it/s]", None), (" 2.00it/s]", Some(0.5)), ("4.00s/it]", Some(4.0))] {
            let mut watch = StderrWatch::new();
            watch.push_bytes(format!("Train:   0%|    | 0/10 [00:00<?, {text}\n").as_bytes());
            assert_eq!(watch.bar().map(|bar| bar.seconds_per_step), Some(speed), "{text}");
        }
    }

    #[test]
    fn sample_text_of_the_data_does_not_pass_for_the_trainers_own_line() {
        let mut watch = StderrWatch::new();
        watch.push_bytes(b"Dataset Token Length: 1.0, size=5\nDataset filtered, origin length: 9, filtered dataset length: 1\n");
        assert_eq!((watch.train_rows(), watch.rows_dropped()), (None, 0));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_read_alike(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300), cut in 0usize..300) {
            let text = [TRAIN.as_bytes(), b"\n", &bytes, b"\n"].concat();
            let cut = cut.min(text.len());
            let mut whole = TrainerLog::new();
            whole.push_bytes(&text);
            let mut pieces = TrainerLog::new();
            pieces.push_bytes(&text[..cut]);
            pieces.push_bytes(&text[cut..]);
            proptest::prop_assert_eq!(whole.latest(), pieces.latest());
            proptest::prop_assert_eq!(whole.skipped_lines(), pieces.skipped_lines());
            let mut watch = StderrWatch::new();
            watch.push_bytes(&text);
        }
    }
}
