//! What is an attempt doing, and what did it leave behind?
//!
//! The trainer writes files; this module reads them as they grow. It holds no pipe, so nothing breaks when we die,
//! and reading everything again from the start gives the same answer.

use std::path::Path;
use std::time::Duration;

use mhtrain_sizing::units::Bytes;
use mhtrain_supervisor::log_tail::LogTail;
use mhtrain_swift::companion::Telemetry;
use mhtrain_swift::diagnosis::Diagnoser;
use mhtrain_swift::progress::{StderrWatch, TrainerLog};

use super::companion::telemetry_file;
use super::screen::Glance;

/// How long one look may read what the trainer prints. It prints some KiB a second; one that floods its log has the processor for
/// itself, and what was not read by its end is read then.
const LOOK_FOR: Duration = Duration::from_millis(5);

/// The eyes on one attempt.
#[derive(Debug)]
pub struct Follower {
    output: LogTail,
    metrics: LogTail,
    reports: LogTail,
    /// What `logging.jsonl` says.
    pub log: TrainerLog,
    /// What the output says about rows and steps.
    pub watch: StderrWatch,
    /// What the output says about a death.
    pub diagnoser: Diagnoser,
    /// What the companion reports.
    pub telemetry: Telemetry,
    /// Most memory that NVML showed for the trainer.
    pub peak: Option<Bytes>,
    /// What NVML showed last.
    pub used: Option<Bytes>,
}

impl Follower {
    /// Returns eyes on the trainer's output file, beside which the companion reports, and the directory that it
    /// trains in.
    pub fn new(output: &Path, output_dir: &Path) -> Follower {
        let record = output.parent().unwrap_or(output);
        Follower {
            output: LogTail::new(output),
            metrics: LogTail::new(output_dir.join("logging.jsonl")),
            reports: LogTail::new(telemetry_file(record)),
            log: TrainerLog::new(),
            watch: StderrWatch::new(),
            diagnoser: Diagnoser::new(),
            telemetry: Telemetry::new(),
            peak: None,
            used: None,
        }
    }

    /// Reads what is new, a bounded amount of it.
    pub fn look(&mut self) -> std::io::Result<()> {
        let Follower { output, metrics, reports, log, watch, diagnoser, telemetry, .. } = self;
        output.read_for(LOOK_FOR, |bytes| {
            watch.push_bytes(bytes);
            diagnoser.push_bytes(bytes);
        })?;
        metrics.read_new(|bytes| log.push_bytes(bytes))?;
        // Training does not end because a report cannot be read: it counts as not written.
        let _ = reports.read_new(|bytes| telemetry.push_bytes(bytes));
        Ok(())
    }

    /// Reads what is left after the last writer is gone.
    pub fn look_to_the_end(&mut self) -> std::io::Result<()> {
        let Follower { output, metrics, reports, log, watch, diagnoser, telemetry, .. } = self;
        output.drain(|bytes| {
            watch.push_bytes(bytes);
            diagnoser.push_bytes(bytes);
        })?;
        metrics.drain(|bytes| log.push_bytes(bytes))?;
        let _ = reports.drain(|bytes| telemetry.push_bytes(bytes));
        Ok(())
    }

    /// Returns how many bytes the trainer printed and logged until now.
    pub fn printed_bytes(&self) -> u64 {
        let size = |tail: &LogTail| std::fs::metadata(tail.path()).map_or(0, |found| found.len());
        size(&self.output) + size(&self.metrics)
    }

    /// Notes what NVML shows for the trainer now.
    pub fn saw_memory(&mut self, used: Option<Bytes>) {
        self.used = used;
        self.peak = self.peak.max(used);
    }

    /// Returns how far the attempt is, from the log and the bar together: the bar moves every step, the log has the
    /// loss.
    pub fn glance(&self, vram_total: Option<Bytes>) -> Glance {
        let logged = self.log.latest();
        let bar = self.watch.bar();
        let step = logged.map_or(0, |p| p.step).max(bar.as_ref().map_or(0, |b| b.step));
        let step = step.max(self.telemetry.times().step);
        let max_steps = logged.map(|p| p.max_steps).or(bar.as_ref().map(|b| b.max_steps));
        let remaining = bar.as_ref().and_then(|b| b.remaining).or(logged.and_then(|p| p.remaining));
        Glance {
            step,
            max_steps,
            loss: logged.and_then(|p| p.loss),
            vram_used: self.used,
            vram_total,
            eta_s: remaining.map(|left| left.as_secs_f64()),
        }
    }
}
