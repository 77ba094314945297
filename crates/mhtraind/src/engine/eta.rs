//! How long will the run take?
//!
//! Steps come from the rows of the data, the time of a step from earlier attempts on this host. Where one of them is not known,
//! that is said instead of a number.

use serde_json::{Value, json};

use super::prepare::Prepared;
use super::screen::clock;

/// An amount of seconds: best guess and 90 % interval.
#[derive(Copy, Clone, Debug, PartialEq)]
struct Seconds {
    guess: f64,
    low: f64,
    high: f64,
}

impl Seconds {
    fn json(self) -> Value {
        json!({"guess": self.guess, "low": self.low, "high": self.high})
    }
}

/// Returns seconds of a step and of all steps, each where it is known.
fn known(prepared: &Prepared) -> (Option<Seconds>, Option<Seconds>) {
    let Some(time) = &prepared.plan.step_time else { return (None, None) };
    let step = Seconds { guess: time.seconds, low: time.low, high: time.high };
    let steps = prepared.data.as_ref().map(|report| report.data.optimizer_steps);
    #[expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]
    let run = steps.map(|steps| steps as f64).map(|steps| Seconds {
        guess: steps * step.guess,
        low: steps * step.low,
        high: steps * step.high,
    });
    (Some(step), run)
}

/// Returns why the time of the run is not known, as a sentence; `None` where it is.
fn why_not(prepared: &Prepared) -> Option<&'static str> {
    match known(prepared) {
        (_, Some(_)) => None,
        (Some(_), None) => Some("nobody looked at the rows, so the number of steps is not known"),
        (None, _) => Some("no run of this model and method on such a card was seen here"),
    }
}

/// Returns the estimate as `plan --json` has it.
pub fn eta_json(prepared: &Prepared) -> Value {
    let (step, run) = known(prepared);
    json!({
        "step_s": step.map(Seconds::json),
        "run_s": run.map(Seconds::json),
        "from": prepared.plan.step_time.as_ref().map(|time| time.from.as_slice()).unwrap_or_default(),
        "same_rung": prepared.plan.step_time.as_ref().map(|time| time.same_rung),
        "why_not": why_not(prepared),
    })
}

/// Returns the estimate for people, a line.
pub fn eta_line(prepared: &Prepared) -> String {
    match (known(prepared).1, why_not(prepared)) {
        (Some(run), _) => format!(
            "time: about {} ({} to {}) in steps; loading, evaluation and checkpoints come on top",
            clock(run.guess),
            clock(run.low),
            clock(run.high)
        ),
        (None, why) => format!("time: not known yet: {}", why.unwrap_or_default()),
    }
}
