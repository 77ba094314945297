//! What do the lines say that a healthy trainer prints?

use std::sync::LazyLock;

use regex::Regex;

use super::pattern::{ascii, pattern};

/// So many loss lines in a row that are no number, or exactly zero, are a divergence. One alone is an overflow that
/// mixed precision skips.
const DIVERGED_LINES: u32 = 2;

/// Exactly zero is rarer and less clear: rows without labels have such a loss as well.
const ZERO_LINES: u32 = 3;

/// So many bad lines in a row, and no step mends the weights any more: to go on costs time, and the checkpoints from before
/// it, which newer ones replace.
const LOST_LINES: u32 = 5;

/// A loss this many times above the smallest so far, and above [`EXPLODED_FLOOR`], has exploded.
const EXPLODED_RATIO: f64 = 20.0;

/// No language model that can still learn has a loss above this: ln(250 000 tokens) is 12.4.
const EXPLODED_FLOOR: f64 = 50.0;

const NUMBER: &str = r"([+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|nan|inf(?:inity)?))";

static LOSS: LazyLock<Regex> = LazyLock::new(|| ascii(&format!(r#"(?i)['"]loss['"]\s*:\s*['"]?{NUMBER}"#)));
static GRAD_NORM: LazyLock<Regex> =
    LazyLock::new(|| ascii(&format!(r#"(?i)['"]grad_norm['"]\s*:\s*['"]?{NUMBER}"#)));
// Other trainers: `lm loss: 2.1`, `loss=nan`, `| loss nan |`, `'eval_loss': nan`. Only NaN matters there.
pattern!(LOSS_IS_NAN, r#"(?i)\b(?:\w+[_ ])?loss['"]?\s*[=:| ]\s*['"]?(?:nan|-?inf(?:inity)?)\b"#);
pattern!(LOSS_IS_NUMBER, r#"(?i)\b(?:\w+[_ ])?loss['"]?\s*[=:| ]\s*['"]?\d"#);
pattern!(STEP, r#"global_step/max_steps['"]\s*:\s*['"](\d+)/(\d+)"#);
pattern!(
    BAR,
    r"(?:^|\s|\b(?:Train|steps|Training|Epoch \d+)):?\s*\d+%\|[^|]*\|\s*(\d+)/(\d+)\s*\[[^\]]*(?:it/s|s/it)"
);
pattern!(NAMED_BAR, r"^\s*([A-Za-z][\w ().-]*):\s*\d+%\|");
pattern!(STEP_WORDS, r"(?i)\b(?:step|iter(?:ation)?)s?[ :]+\[?\s*(\d+)\s*/\s*(\d+)");
pattern!(
    ENDED,
    concat!(
        r#"['"]train_runtime['"]\s*:|End time of running main|^\s*train_runtime\s+=|"#,
        r"(?i:training (?:completed|finished|is complete|done)\b|training has (?:finished|completed)|`?trainer\.fit`? stopped: `?max)"
    )
);
pattern!(SAVED, r"^(?:last_model_checkpoint|best_model_checkpoint): (.+)$");

/// What was seen of a running training.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    bad_in_a_row: u32,
    zero_in_a_row: u32,
    exploded_in_a_row: u32,
    smallest: Option<f64>,
    highest_step: Option<u64>,
    highest_bar: Option<u64>,
    bars_since: u32,
    lines: u32,
    last_bad_line: Option<String>,
    ended: bool,
    saved: bool,
}

/// What a line means for what came before it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing about progress.
    Other,
    /// A line of metrics or a bar that shows no new step.
    Metrics,
    /// More steps were done: what was printed before did not stop the run.
    WentOn,
    /// The training loop is over.
    Ended,
}

impl Metrics {
    /// Reads one line. `shown` is kept as evidence when it is bad.
    pub(super) fn read(&mut self, text: &str, shown: &str) -> Meaning {
        if ENDED.is_match(text) {
            self.ended = true;
            self.note_nan(text, shown);
            return Meaning::Ended;
        }
        if let Some(found) = SAVED.captures(text) {
            self.saved |= !matches!(found[1].trim(), "None" | "null");
            return Meaning::Other;
        }
        if text.trim_start().starts_with('{') {
            return self.read_record(text, shown);
        }
        if let Some(found) = BAR.captures(text) {
            if LOSS_IS_NAN.is_match(text) || LOSS_IS_NUMBER.is_match(text) {
                self.note_loss(text, shown);
            }
            return self.read_bar(text, found[1].parse().ok());
        }
        if let Some(found) = STEP_WORDS.captures(text) {
            self.note_loss(text, shown);
            return self.step_seen(found[1].parse().ok());
        }
        self.note_loss(text, shown);
        Meaning::Other
    }

    fn read_record(&mut self, text: &str, shown: &str) -> Meaning {
        let is_train_line = LOSS.is_match(text);
        if is_train_line {
            self.note_loss(text, shown);
        } else if text.contains("loss") {
            self.note_nan(text, shown);
        } else {
            return Meaning::Other;
        }
        let step = STEP.captures(text).and_then(|found| found[1].parse().ok());
        match step {
            Some(step) => self.step_seen(Some(step)),
            None => Meaning::Metrics,
        }
    }

    fn step_seen(&mut self, step: Option<u64>) -> Meaning {
        let Some(step) = step else { return Meaning::Metrics };
        let went_on = self.highest_step.is_some_and(|highest| step > highest);
        self.highest_step = Some(self.highest_step.map_or(step, |highest| highest.max(step)));
        if went_on { Meaning::WentOn } else { Meaning::Metrics }
    }

    /// A dying bar is drawn once more, and then may show one more step than before; two are progress.
    fn read_bar(&mut self, text: &str, step: Option<u64>) -> Meaning {
        let is_training = NAMED_BAR
            .captures(text)
            .is_none_or(|name| matches!(name[1].trim(), "Train" | "Training" | "steps" | "Steps"));
        let (true, Some(step)) = (is_training, step) else { return Meaning::Metrics };
        let rose = self.highest_bar.is_some_and(|highest| step > highest);
        self.highest_bar = Some(self.highest_bar.map_or(step, |highest| highest.max(step)));
        self.bars_since += u32::from(rose);
        if rose && self.bars_since >= 2 { Meaning::WentOn } else { Meaning::Metrics }
    }

    /// Bars count from here when it is asked whether the run went on.
    pub(super) fn something_happened(&mut self) {
        self.bars_since = 0;
    }

    /// The mean over a run and the loss of an evaluation can confirm a divergence; they do not end one.
    fn note_nan(&mut self, text: &str, shown: &str) {
        if LOSS_IS_NAN.is_match(text) {
            self.note_loss(text, shown);
        }
    }

    fn note_loss(&mut self, text: &str, shown: &str) {
        let number = |pattern: &Regex| {
            pattern.captures(text).and_then(|found| found[1].to_ascii_lowercase().parse::<f64>().ok())
        };
        let (loss, grad_norm) = (number(&LOSS), number(&GRAD_NORM));
        let nan_elsewhere = LOSS_IS_NAN.is_match(text);
        if loss.is_none() && !nan_elsewhere && !LOSS_IS_NUMBER.is_match(text) {
            return;
        }
        self.lines += 1;
        let bad =
            nan_elsewhere || loss.is_some_and(|loss| !loss.is_finite()) || grad_norm.is_some_and(f64::is_nan);
        let zero = loss == Some(0.0);
        let exploded = match (loss, self.smallest) {
            (Some(loss), Some(smallest)) => {
                loss > EXPLODED_FLOOR && loss > EXPLODED_RATIO * smallest.max(0.1)
            }
            _ => false,
        };
        let count = |counter: u32, hit: bool| if hit { counter + 1 } else { 0 };
        self.bad_in_a_row = count(self.bad_in_a_row, bad);
        self.zero_in_a_row = count(self.zero_in_a_row, zero);
        self.exploded_in_a_row = count(self.exploded_in_a_row, exploded);
        if let Some(loss) = loss.filter(|loss| loss.is_finite() && *loss > 0.0) {
            self.smallest = Some(self.smallest.map_or(loss, |smallest| smallest.min(loss)));
        }
        if bad || zero || exploded {
            self.last_bad_line = Some(shown.to_owned());
        }
    }

    /// Returns the line that shows a divergence that lasted to the end.
    pub(super) fn divergence(&self) -> Option<&str> {
        let diverged = self.bad_in_a_row >= DIVERGED_LINES
            || self.zero_in_a_row >= ZERO_LINES
            || self.exploded_in_a_row >= DIVERGED_LINES
            || (self.bad_in_a_row == 1 && self.lines == 1);
        self.last_bad_line.as_deref().filter(|_| diverged)
    }

    /// Returns the line that shows a divergence that nothing mends any more.
    pub(super) fn lost(&self) -> Option<&str> {
        let lines = self.bad_in_a_row.max(self.exploded_in_a_row);
        self.last_bad_line.as_deref().filter(|_| lines >= LOST_LINES)
    }

    /// Returns whether the training loop came to its end.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Returns whether the summary names a checkpoint. ms-swift prints it on failure too.
    pub(super) fn saved(&self) -> bool {
        self.saved
    }

    /// Returns whether a step was seen.
    pub(super) fn training_began(&self) -> bool {
        self.highest_step.is_some() || self.highest_bar.is_some_and(|step| step > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Metrics {
        let mut metrics = Metrics::default();
        for line in lines {
            metrics.read(line, line);
        }
        metrics
    }

    #[test]
    fn one_overflow_is_no_divergence() {
        let lines = [
            "{'loss': 2.0, 'grad_norm': 1.0}",
            "{'loss': 2.1, 'grad_norm': nan}",
            "{'loss': 1.9, 'grad_norm': 0.5}",
        ];
        assert_eq!(read(&lines).divergence(), None);
    }

    #[test]
    fn nan_that_stays_is_a_divergence() {
        let lines = [
            "{'loss': 2.0, 'grad_norm': 1.0}",
            "{'loss': 2.1, 'grad_norm': nan}",
            "{\"loss\": 0.0, \"grad_norm\": NaN}",
        ];
        assert_eq!(read(&lines).divergence(), Some(lines[2]));
    }

    #[test]
    fn a_divergence_is_lost_after_some_lines_and_only_while_it_lasts() {
        let nan = "{'loss': nan, 'grad_norm': nan}";
        assert_eq!(read(&[nan; 4]).lost(), None);
        assert_eq!(read(&[nan; 5]).lost(), Some(nan));
        assert_eq!(read(&["{'loss': 0.0}"; 9]).lost(), None, "rows without labels");
        let mut lines = vec![nan; 5];
        lines.push("{'loss': 2.0, 'grad_norm': 1.0}");
        assert_eq!(read(&lines).lost(), None);
    }

    #[test]
    fn a_loss_that_explodes_is_a_divergence() {
        let lines = ["{'loss': 2.0}", "{'loss': 900.5}", "{'loss': 1200.0}"];
        assert!(read(&lines).divergence().is_some());
        // A first loss may be huge and fall.
        assert!(read(&["{'loss': 900.5}", "{'loss': 80.0}", "{'loss': 12.0}"]).divergence().is_none());
    }

    #[test]
    fn the_last_redraw_of_a_bar_is_not_progress() {
        let mut metrics = Metrics::default();
        let bar = |step: u32| format!("Train:  20%|##   | {step}/10 [00:05<00:23,  2.94s/it]");
        metrics.read(&bar(1), "");
        metrics.something_happened();
        assert_eq!(metrics.read(&bar(2), ""), Meaning::Metrics);
        assert_eq!(metrics.read(&bar(2), ""), Meaning::Metrics);
        assert_eq!(metrics.read(&bar(3), ""), Meaning::WentOn);
    }

    #[test]
    fn the_end_of_training_is_seen() {
        assert!(read(&["{'train_runtime': 3.0, 'train_loss': 1.0}"]).ended());
        assert!(!read(&["{'loss': 1.0}"]).ended());
    }
}
