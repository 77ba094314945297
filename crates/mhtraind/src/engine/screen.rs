//! How does a running job show itself?
//!
//! On a terminal: one live bar, sentences above it. Elsewhere (a file, a pipe, an sbatch log): sentences, and a line
//! of progress now and then.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mhtrain_sizing::units::Bytes;

use super::curve::Curve;
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

/// Who is told about a job: a terminal, or the daemon that serves its followers.
pub trait Audience: std::fmt::Debug + Send {
    /// A sentence for people.
    fn hear(&self, sentence: &str);
    /// An attempt begins.
    fn attempt_begins(&mut self, attempt: u32);
    /// How far the attempt is.
    fn see(&mut self, glance: &Glance);
    /// How the attempt went before it was looked at.
    fn remember(&mut self, _earlier: &[Glance]) {}
    /// The attempt is over.
    fn attempt_ends(&mut self);
    /// Nothing of the job runs any more, and nothing will: somebody else may have its device.
    fn device_is_back(&mut self) {}
    /// Whether the job still has it.
    fn has_device(&self) -> bool {
        true
    }
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

/// The figures of an attempt over time.
#[derive(Clone, Debug, Default)]
struct Curves {
    step: u64,
    loss: Curve,
    vram: Curve,
}

impl Curves {
    /// Adds a look, once for each step.
    fn push(&mut self, glance: &Glance) {
        if glance.step <= self.step {
            return;
        }
        self.step = glance.step;
        if let Some(loss) = glance.loss {
            self.loss.push(loss);
        }
        if let Some(used) = glance.vram_used {
            self.vram.push(used.gib());
        }
    }
}

impl Glance {
    fn details(&self, curves: &Curves) -> String {
        let mut parts = Vec::new();
        let mut part = |figure: String, curve: &Curve| {
            let curve = curve.draw();
            parts.push(if curve.is_empty() { figure } else { format!("{figure} {curve}") });
        };
        if let Some(loss) = self.loss {
            part(format!("loss {loss:.4}"), &curves.loss);
        }
        match (self.vram_used, self.vram_total) {
            (Some(used), Some(total)) => {
                part(format!("VRAM {:.2}/{:.2} GiB", used.gib(), total.gib()), &curves.vram);
            }
            (Some(used), None) => part(format!("VRAM {:.2} GiB", used.gib()), &curves.vram),
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

/// Where a job shows itself.
#[derive(Debug)]
pub struct Screen(Box<dyn Audience>);

impl Screen {
    /// Returns a screen that is this process's terminal, or what stands in for it.
    pub fn terminal(sentences: Sentences) -> Screen {
        Screen::told_to(Terminal::new(sentences))
    }

    /// Returns a screen that tells everything to `audience`.
    pub fn told_to(audience: impl Audience + 'static) -> Screen {
        Screen(Box::new(audience))
    }

    /// Says a sentence (or a block of lines).
    pub fn say(&self, text: impl std::fmt::Display) {
        self.0.hear(&text.to_string());
    }

    /// Starts to show an attempt.
    pub fn start_bar(&mut self, attempt: u32) {
        self.0.attempt_begins(attempt);
    }

    /// Shows how far the attempt is.
    pub fn glance(&mut self, glance: &Glance) {
        self.0.see(glance);
    }

    /// Tells how the attempt went before it was looked at.
    pub fn remember(&mut self, earlier: &[Glance]) {
        self.0.remember(earlier);
    }

    /// Ends the showing of the attempt.
    pub fn end_bar(&mut self) {
        self.0.attempt_ends();
    }

    /// Tells that the job needs its device no more.
    pub fn give_device_back(&mut self) {
        self.0.device_is_back();
    }

    /// Returns whether that was not told.
    pub fn has_device(&self) -> bool {
        self.0.has_device()
    }
}

/// A terminal with one live bar below the sentences; elsewhere lines.
#[derive(Debug)]
struct Terminal {
    sentences: Sentences,
    bar: ProgressBar,
    interactive: bool,
    last_line: Option<Instant>,
    last_step: u64,
    curves: Curves,
}

impl Terminal {
    fn new(sentences: Sentences) -> Terminal {
        let interactive = std::io::stderr().is_terminal();
        let (bar, curves) = (no_bar(), Curves::default());
        Terminal { sentences, bar, interactive, last_line: None, last_step: 0, curves }
    }
}

fn no_bar() -> ProgressBar {
    ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden())
}

impl Audience for Terminal {
    /// A standard output that cannot be written is no reason to end a training: the receipt tells all the same.
    fn hear(&self, sentence: &str) {
        self.bar.suspend(|| match self.sentences {
            Sentences::ToStdout => {
                let _ = output::line(sentence);
            }
            Sentences::ToStderr => output::note(sentence),
        });
    }

    fn attempt_begins(&mut self, attempt: u32) {
        self.last_line = None;
        self.last_step = 0;
        self.curves = Curves::default();
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

    fn see(&mut self, glance: &Glance) {
        self.curves.push(glance);
        if self.interactive {
            if let Some(max) = glance.max_steps {
                self.bar.set_length(max);
            }
            self.bar.set_position(glance.step);
            self.bar.set_message(glance.details(&self.curves));
            return;
        }
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
        let ended = glance.max_steps == Some(glance.step);
        if glance.step > self.last_step && (due || ended) {
            let max = glance.max_steps.map_or("?".to_owned(), |max| max.to_string());
            self.hear(&format!("  step {}/{max}  {}", glance.step, glance.details(&self.curves)));
            self.last_line = Some(Instant::now());
            self.last_step = glance.step;
        }
    }

    fn remember(&mut self, earlier: &[Glance]) {
        earlier.iter().for_each(|glance| self.curves.push(glance));
    }

    fn attempt_ends(&mut self) {
        self.bar.finish_and_clear();
        self.bar = no_bar();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_show_what_is_known_and_nothing_else() {
        let none = Curves::default();
        assert_eq!(Glance::default().details(&none), "");
        let glance = Glance {
            loss: Some(1.23456),
            vram_used: Some(Bytes::from_mib(1536)),
            vram_total: Some(Bytes::from_gib(24)),
            eta_s: Some(3725.0),
            ..Glance::default()
        };
        assert_eq!(glance.details(&none), "loss 1.2346  VRAM 1.50/24.00 GiB  ETA 1:02:05");
        let mut curves = Curves::default();
        for (step, loss) in [(1, 3.0), (1, 99.0), (2, 2.0), (3, 1.0)] {
            curves.push(&Glance { step, loss: Some(loss), ..Glance::default() });
        }
        assert_eq!(glance.details(&curves), "loss 1.2346 █▅▁  VRAM 1.50/24.00 GiB  ETA 1:02:05");
    }

    #[test]
    fn a_clock_survives_odd_numbers() {
        assert_eq!(clock(-3.0), "0:00");
        assert_eq!(clock(f64::NAN), "0:00");
        assert_eq!(clock(59.6), "1:00");
    }
}
