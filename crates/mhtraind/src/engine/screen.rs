//! How does a running job show itself?
//!
//! On a terminal: one live bar, sentences above it. Elsewhere (a file, a pipe, an sbatch log): sentences, and a line
//! of progress now and then.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mhtrain_sizing::units::Bytes;

use crate::cli::output;

/// Seconds between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Where sentences go.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Sentences {
    /// Standard output: they are the result.
    ToStdout,
    /// Standard error: standard output holds JSON.
    ToStderr,
}

/// Who is told instead of a terminal.
pub trait Audience: std::fmt::Debug + Send + Sync {
    /// A sentence for people.
    fn hear(&self, sentence: &str);
    /// How far an attempt is.
    fn see(&self, attempt: u32, glance: &Glance);
}

/// One look at a running attempt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Glance {
    /// Optimizer steps that are done.
    pub step: u64,
    /// Optimizer steps in all, where known.
    pub max_steps: Option<u64>,
    /// Last loss that was logged.
    pub loss: Option<f64>,
    /// Memory of the card that the trainer holds.
    pub vram_used: Option<Bytes>,
    /// Memory of the card.
    pub vram_total: Option<Bytes>,
    /// Seconds to the end.
    pub eta_s: Option<f64>,
}

impl Glance {
    fn details(&self) -> String {
        let mut parts = Vec::new();
        if let Some(loss) = self.loss {
            parts.push(format!("loss {loss:.4}"));
        }
        match (self.vram_used, self.vram_total) {
            (Some(used), Some(total)) => parts.push(format!("VRAM {:.2}/{:.2} GiB", used.gib(), total.gib())),
            (Some(used), None) => parts.push(format!("VRAM {:.2} GiB", used.gib())),
            (None, _) => {}
        }
        if let Some(eta) = self.eta_s {
            parts.push(format!("ETA {}", clock(eta)));
        }
        parts.join("  ")
    }
}

/// Returns seconds as `m:ss` or `h:mm:ss`.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
pub fn clock(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s % 3600 / 60, s % 60),
    }
}

/// The terminal, or what stands in for it.
#[derive(Debug)]
pub struct Screen {
    sentences: Sentences,
    audience: Option<Arc<dyn Audience>>,
    bar: ProgressBar,
    interactive: bool,
    last_line: Option<Instant>,
    last_step: u64,
    attempt: u32,
}

impl Screen {
    /// Returns a screen with no bar on it yet.
    pub fn new(sentences: Sentences) -> Screen {
        let interactive = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        Screen { sentences, audience: None, bar, interactive, last_line: None, last_step: 0, attempt: 0 }
    }

    /// Returns a screen that is no terminal: everything is told to `audience`.
    pub fn told_to(audience: Arc<dyn Audience>) -> Screen {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let audience = Some(audience);
        Screen {
            sentences: Sentences::ToStderr,
            audience,
            bar,
            interactive: false,
            last_line: None,
            last_step: 0,
            attempt: 0,
        }
    }

    /// Says a sentence (or a block of lines) above the bar.
    ///
    /// A standard output that cannot be written is no reason to end a training: the receipt tells all the same.
    pub fn say(&self, text: impl std::fmt::Display) {
        if let Some(audience) = &self.audience {
            return audience.hear(&text.to_string());
        }
        self.bar.suspend(|| match self.sentences {
            Sentences::ToStdout => {
                let _ = output::line(&text);
            }
            Sentences::ToStderr => output::note(&text),
        });
    }

    /// Starts the bar of one attempt.
    pub fn start_bar(&mut self, attempt: u32) {
        self.attempt = attempt;
        self.last_line = None;
        self.last_step = 0;
        if !self.interactive {
            return;
        }
        self.bar = ProgressBar::new(0);
        let style =
            ProgressStyle::with_template("{prefix} [{bar:28}] {pos}/{len}  {msg}  ({elapsed_precise})")
                .expect("the template is valid: drawn by every interactive run")
                .progress_chars("=> ");
        self.bar.set_style(style);
        self.bar.set_prefix(format!("attempt {attempt}"));
        self.bar.set_message("starting");
        self.bar.enable_steady_tick(Duration::from_millis(250));
    }

    /// Shows how far the attempt is.
    pub fn glance(&mut self, glance: &Glance) {
        if let Some(audience) = &self.audience {
            return audience.see(self.attempt, glance);
        }
        if self.interactive {
            if let Some(max) = glance.max_steps {
                self.bar.set_length(max);
            }
            self.bar.set_position(glance.step);
            self.bar.set_message(glance.details());
            return;
        }
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
        let ended = glance.max_steps == Some(glance.step);
        if glance.step > self.last_step && (due || ended) {
            let max = glance.max_steps.map_or("?".to_owned(), |max| max.to_string());
            self.say(format!("  step {}/{max}  {}", glance.step, glance.details()));
            self.last_line = Some(Instant::now());
            self.last_step = glance.step;
        }
    }

    /// Takes the bar away.
    pub fn end_bar(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_show_what_is_known_and_nothing_else() {
        assert_eq!(Glance::default().details(), "");
        let glance = Glance {
            loss: Some(1.23456),
            vram_used: Some(Bytes::from_mib(1536)),
            vram_total: Some(Bytes::from_gib(24)),
            eta_s: Some(3725.0),
            ..Glance::default()
        };
        assert_eq!(glance.details(), "loss 1.2346  VRAM 1.50/24.00 GiB  ETA 1:02:05");
    }

    #[test]
    fn a_clock_survives_odd_numbers() {
        assert_eq!(clock(-3.0), "0:00");
        assert_eq!(clock(f64::NAN), "0:00");
        assert_eq!(clock(59.6), "1:00");
    }
}
