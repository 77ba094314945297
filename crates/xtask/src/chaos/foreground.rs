//! Does `mhtraind run` keep the promises when it is killed at each of the steps that it takes?
//!
//! ```text
//!   mhtraind run job.json  ──killed──>  the same command: it begins, or says how one goes on  ──>  mhtraind run job.json --continue
//! ```

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::failpoints::{Scenario, note};
use super::host::{Host, kill};
use super::verdict::{Asked, Cancel, Fault, Found, Kind, What};

/// How often the command may be given until the job is over.
const TIMES_MAX: usize = 12;

/// How long one of them may take.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// The number under which the job is judged: it has none.
pub(super) const ID: u64 = 1;

/// What is asked of the job's directory.
const RUN: &[&str] = &["run", "job.json"];
const GO_ON: &[&str] = &["run", "job.json", "--continue"];

/// A job of the foreground, and what its user did.
pub(super) struct Foreground<'a> {
    host: &'a Host,
    dir: &'a Path,
}

impl Foreground<'_> {
    /// Plays a scenario to its end. Returns what was asked and what the receipt says of it.
    pub(super) fn play(
        host: &Host,
        dir: &Path,
        scenario: Scenario,
        faults: &mut Vec<Fault>,
    ) -> anyhow::Result<(Asked, Vec<Found>)> {
        let job = host.job("job", &scenario.trainer());
        std::fs::write(dir.join("job.json"), job.to_string())?;
        let this = Foreground { host, dir };
        let mut asked =
            Asked { name: "job".to_owned(), fate: scenario.fate(), ids: [ID].into(), cancel: None };
        let said = match scenario {
            Scenario::CancelledWhileItRuns => {
                let first = host.foreground(RUN)?;
                this.until_step(2)?;
                this.stop(&first)?;
                // Its user interrupted it: from here on it is over, or goes on when they say so.
                asked.cancel = Some(Cancel { over_by: None });
                this.to_the_end(first, RUN)?
            }
            Scenario::TakenOver => {
                let first = host.foreground(RUN)?;
                this.until_step(2)?;
                note(dir, "from")?;
                kill(first.id());
                for (recorder, _) in host.recorders() {
                    kill(recorder);
                }
                this.to_the_end(first, RUN)?
            }
            Scenario::TriedAgain => {
                this.to_the_end(host.foreground(RUN)?, RUN)?;
                note(dir, "from")?;
                this.to_the_end(host.foreground(GO_ON)?, GO_ON)?
            }
            _ => this.to_the_end(host.foreground(RUN)?, RUN)?,
        };
        note(dir, "until")?;
        let receipt: Value = serde_json::from_slice(
            &std::fs::read(dir.join("out/job/receipt.json")).context("no receipt is there")?,
        )?;
        let state = receipt["state"].as_str().unwrap_or("nothing").to_owned();
        if state != said {
            faults.push(Fault {
                kind: Kind::Wrong,
                job: None,
                what: format!("the command said {said}, and the receipt {state}"),
            });
        }
        if state == "succeeded"
            && (receipt["proof"].is_null() || !dir.join("out/job/final/trainer_state.json").exists())
        {
            let what = "it succeeded without proof or final checkpoint".to_owned();
            faults.push(Fault { kind: Kind::Wrong, job: None, what });
        }
        let reason = receipt["reason"].as_str().map(str::to_owned);
        Ok((asked, vec![Found { id: ID, name: "job".to_owned(), state, reason }]))
    }

    /// Gives the same command again after a kill, and what it says itself, until the job is over. Returns the state that it told.
    fn to_the_end(&self, first: Child, same: &[&str]) -> anyhow::Result<String> {
        let mut child = first;
        for _ in 0..TIMES_MAX {
            let output = ended(child)?;
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            if told.contains("panicked") {
                bail!("it panicked: {told}");
            }
            child = match output.status.code() {
                None if output.status.signal() == Some(9) => self.host.foreground(same)?,
                Some(2) => {
                    let held = told.split("holds a job already").nth(1).unwrap_or_default();
                    if told.contains("has succeeded") {
                        return Ok("succeeded".to_owned());
                    }
                    // Whoever reads that it is over needs no other command.
                    let over = ["succeeded", "failed", "cancelled"];
                    if let Some(state) = over.iter().find(|state| held.starts_with(&format!(" ({state})"))) {
                        return Ok((*state).to_owned());
                    }
                    if held.is_empty() || !told.contains("--continue") {
                        bail!("it does not say how one goes on: {told}");
                    }
                    self.host.foreground(GO_ON)?
                }
                Some(0) => return Ok("succeeded".to_owned()),
                Some(1) => return Ok("failed".to_owned()),
                Some(130) => return Ok("cancelled".to_owned()),
                _ => bail!("it ended with {}: {told}", output.status),
            };
        }
        bail!("it is not over after {TIMES_MAX} commands")
    }

    /// Presses Ctrl-C. Whoever was killed before does not feel it.
    fn stop(&self, child: &Child) -> anyhow::Result<()> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no pid")?;
        Ok(kill_process(pid, Signal::INT)?)
    }

    fn until_step(&self, wanted: u64) -> anyhow::Result<()> {
        let until = Instant::now() + ENDS_WITHIN;
        while Instant::now() < until {
            let told = self.host.testimonies()?;
            if told.iter().any(|line| matches!(line.what, What::Step { step } if step >= wanted)) {
                return Ok(());
            }
            // It may have been killed on the way there.
            if self.dir.join("failpoints/killed").exists() && self.host.recorders().is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("step {wanted}: not within {} s", ENDS_WITHIN.as_secs())
    }
}

/// Waits for the end of a command.
fn ended(mut child: Child) -> anyhow::Result<Output> {
    let until = Instant::now() + ENDS_WITHIN;
    while child.try_wait()?.is_none() {
        if Instant::now() >= until {
            child.kill()?;
            bail!("the command did not end within {} s", ENDS_WITHIN.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child.wait_with_output()?)
}
