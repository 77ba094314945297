//! What runs inside the trainer, and what does it report?
//!
//! [`SOURCE`] is a Python file that ms-swift loads as a plugin; its own text says what it does. It reports by lines
//! of JSON, which [`Telemetry`] reads:
//!
//! ```text
//! loaded -> begin -> preflight | preflight_oom | preflight_skipped -> step, saved ... -> end
//!                                        after an OOM: rescue_begin -> rescued | rescue_failed   (or rescue_refused,
//!                                                                                           rescue_needless)
//!                                        after a stop file: stopping -> saved -> stopped
//! ```
//!
//! `begin` is the proof that it is alive. Without it nothing that is promised here holds, and the trainer's own log
//! is what is left. Kinds and keys that are not known here are ignored, so a later companion can say more.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use mhtrain_sizing::units::Bytes;
use serde::Deserialize;
use serde_json::Value;

use crate::dialect::Dialect;
use crate::progress::LineBuffer;

/// The companion's text.
pub const SOURCE: &str = include_str!("companion.py");

/// The name of its file. ms-swift 3.x imports plugins by their bare name, so it must be nobody else's.
pub const FILE_NAME: &str = "mhtraind_companion.py";

/// Version of the lines that are understood (`PROTOCOL` in the companion).
pub const PROTOCOL: u64 = 1;

/// Names the file that the companion appends to. Without it the companion does nothing.
pub const TELEMETRY_VARIABLE: &str = "MHTRAIND_COMPANION_TELEMETRY";

/// Names the file whose appearance asks it to save and stop.
pub const STOP_VARIABLE: &str = "MHTRAIND_COMPANION_STOP";

/// Names parts to leave out, with commas between; a job may set it in its `env`.
pub const OFF_VARIABLE: &str = "MHTRAIND_COMPANION_OFF";

/// What the companion calls its cure of ms-swift 3.x replaying the rows of the first epoch.
const ROW_ORDER: &str = "row_order";

/// Of a longer line only the beginning is kept, and that is no JSON: the line is skipped.
const LONGEST_LINE: usize = 64 << 10;

/// Of how many lines the time of a step is kept.
const PACES: usize = 1000;

/// How many errors of the companion are kept.
const ERRORS: usize = 16;

/// How one attempt is given the companion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The file that holds [`SOURCE`], in a directory of its own: ms-swift puts that directory into Python's path.
    pub file: PathBuf,
    /// Where it reports to.
    pub telemetry: PathBuf,
    /// The file whose appearance asks it to save and stop.
    pub stop_file: PathBuf,
}

impl Launch {
    /// Returns the variables that the trainer needs beside the plugin's name on its command line.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        BTreeMap::from([
            (TELEMETRY_VARIABLE.to_owned(), text(&self.telemetry)),
            (STOP_VARIABLE.to_owned(), text(&self.stop_file)),
        ])
    }
}

/// What the companion says when its file is loaded, before model and data are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Loaded {
    /// Installed versions by distribution name.
    pub versions: BTreeMap<String, String>,
    /// The parts that are on.
    pub parts: Vec<String>,
    /// The faults of this trainer that it cures.
    pub cures: Vec<String>,
}

/// What it says when training begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Begin {
    /// The parts that are on; none where it stands aside.
    pub parts: Vec<String>,
    /// Length of the train set after filtering and packing; `None` for streamed data.
    pub rows: Option<u64>,
    /// The step that training goes on from.
    pub step: u64,
    /// Steps that the trainer means to do.
    pub max_steps: u64,
    /// Rows of one pass on one device, as the trainer really takes them.
    pub micro_batch: u32,
    /// Passes per step.
    pub accumulation: u32,
    /// Ranks.
    pub world_size: u32,
    /// What the model is wrapped in; `DistributedDataParallel` where ranks train together.
    #[serde(default)]
    pub wrapped: String,
}

/// The allocator's running peaks of one rank. Absent without CUDA.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct AllocatorPeaks {
    /// Most bytes in live tensors.
    #[serde(rename = "allocated_peak")]
    pub allocated: Bytes,
    /// Most bytes that torch held.
    #[serde(rename = "reserved_peak")]
    pub reserved: Bytes,
    /// How often the allocator gave its cached blocks back to find room.
    pub retries: u64,
}

/// How the pass over the longest rows went.
#[derive(Clone, Debug, PartialEq)]
pub enum Preflight {
    /// It fitted.
    Passed {
        /// What it cost.
        seconds: f64,
        /// Rows of it.
        rows: u64,
        /// Padded tokens of its longest row.
        width: u64,
        /// Its peaks.
        peaks: Option<AllocatorPeaks>,
    },
    /// Memory ran out in it: the trainer ended before its first step.
    OutOfMemory,
    /// There was none.
    Skipped {
        /// Why.
        why: String,
    },
}

/// What became of the last finished step after an out-of-memory error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rescue {
    /// It is being written. Large models take minutes; nothing else is heard meanwhile.
    Begun {
        /// The step.
        step: u64,
        /// Bytes that are expected.
        bytes: Bytes,
    },
    /// It is a checkpoint now.
    Saved {
        /// The step.
        step: u64,
        /// The checkpoint.
        path: PathBuf,
    },
    /// It needed none: it was saved, or nothing was done since the start.
    Needless {
        /// The step.
        step: u64,
    },
    /// It could not be saved.
    Lost {
        /// The step.
        step: u64,
        /// Why.
        why: String,
    },
}

/// The steps that are done, and the time that they took.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// Last step that was finished.
    pub step: u64,
    /// Steps of this attempt that were timed.
    pub steps: u64,
    /// Seconds in them, from the first pass to the end of the optimizer.
    pub seconds: f64,
}

/// Seconds in the companion's own code and in the trainer's steps.
#[derive(Copy, Clone, Debug, PartialEq, Deserialize)]
pub struct OwnTime {
    /// In callbacks, the preflight not counted.
    pub own_seconds: f64,
    /// In steps.
    pub step_seconds: f64,
}

/// Everything that one attempt's companion has reported.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    pending: LineBuffer,
    loaded: Option<Loaded>,
    begin: Option<Begin>,
    preflight: Option<Preflight>,
    rescue: Option<Rescue>,
    times: StepTimes,
    /// Mean seconds of a step in each of the last lines, with how many steps they are of.
    paces: VecDeque<(f64, u64)>,
    peaks: Option<AllocatorPeaks>,
    saved_step: Option<u64>,
    stopped_at: Option<u64>,
    own_time: Option<OwnTime>,
    aside: Option<String>,
    errors: Vec<String>,
    skipped_lines: u64,
}

impl Telemetry {
    /// Returns what is known before anything was read.
    pub fn new() -> Telemetry {
        Telemetry::default()
    }

    /// Reads the next bytes of the file, however they are cut. A last line without its end waits for the rest.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.push(bytes, LONGEST_LINE, |byte| byte == b'\n', |line| self.push_line(&line));
        self.pending = pending;
    }

    /// Reads one whole line.
    pub fn push_line(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        let Ok(value) = serde_json::from_str::<Value>(line) else {
            self.skipped_lines += 1;
            return;
        };
        let (Some(version), Some(kind)) = (value["v"].as_u64(), value["kind"].as_str()) else {
            self.skipped_lines += 1;
            return;
        };
        if version > PROTOCOL || self.push_kind(kind, &value).is_none() {
            self.skipped_lines += 1;
        }
    }

    /// Takes what a line says; `None` when it lacks what its kind must have.
    fn push_kind(&mut self, kind: &str, value: &Value) -> Option<()> {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let step = || value["step"].as_u64();
        match kind {
            "loaded" => self.loaded = Some(read(value)?),
            "begin" => {
                let begin: Begin = read(value)?;
                self.times.step = self.times.step.max(begin.step);
                self.begin = Some(begin);
            }
            "preflight" => {
                self.preflight = Some(Preflight::Passed {
                    seconds: value["seconds"].as_f64()?,
                    rows: value["rows"].as_u64()?,
                    width: value["width"].as_u64()?,
                    peaks: read(value),
                });
            }
            "preflight_oom" => self.preflight = Some(Preflight::OutOfMemory),
            "preflight_skipped" => self.preflight = Some(Preflight::Skipped { why: text("why")? }),
            "step" => {
                self.times.step = step()?;
                self.times.steps = self.times.steps.saturating_add(value["steps"].as_u64()?);
                let seconds = value["seconds"].as_f64()?;
                self.times.seconds += seconds;
                self.keep_pace(value["steps"].as_u64()?, seconds);
                self.peaks = read(value).or(self.peaks);
            }
            "saved" => self.saved_step = Some(step()?),
            "rescue_begin" => {
                let bytes = Bytes::new(value["bytes"].as_u64()?);
                self.keep_rescue(Rescue::Begun { step: step()?, bytes });
            }
            "rescued" => {
                let step = step()?;
                self.times.step = self.times.step.max(step);
                self.rescue = Some(Rescue::Saved { step, path: text("path")?.into() });
            }
            "rescue_needless" => self.keep_rescue(Rescue::Needless { step: step()? }),
            "rescue_refused" => self.keep_rescue(Rescue::Lost { step: step()?, why: text("why")? }),
            "rescue_failed" => self.keep_rescue(Rescue::Lost { step: step()?, why: text("error")? }),
            "stopped" => self.stopped_at = Some(step()?),
            "end" => {
                self.times.step = self.times.step.max(step()?);
                self.own_time = Some(read(value)?);
            }
            "aside" => self.aside = Some(text("why")?),
            "error" => {
                let error = format!("{}: {}", text("where")?, text("error")?);
                if self.errors.len() < ERRORS {
                    self.errors.push(error);
                }
            }
            _ => {}
        }
        Some(())
    }

    /// Notes what a line says about the time of a step. The first is left out: it has the warm-up of kernels in it.
    fn keep_pace(&mut self, steps: u64, seconds: f64) {
        if steps == 0 || self.times.steps == steps {
            return;
        }
        if self.paces.len() == PACES {
            self.paces.pop_front();
        }
        #[expect(clippy::cast_precision_loss, reason = "steps of some seconds")]
        self.paces.push_back((seconds / steps as f64, steps));
    }

    /// Notes a rescue that is under way or came to nothing, unless another rank has written one.
    fn keep_rescue(&mut self, rescue: Rescue) {
        if !matches!(self.rescue, Some(Rescue::Saved { .. })) {
            self.rescue = Some(rescue);
        }
    }

    /// Returns what it said when training began: the proof that it is alive.
    pub fn begin(&self) -> Option<&Begin> {
        self.begin.as_ref()
    }

    /// Returns the length of the train set after filtering and packing.
    pub fn rows(&self) -> Option<u64> {
        self.begin.as_ref()?.rows
    }

    /// Returns how the preflight went; `None` before it and where it is off.
    pub fn preflight(&self) -> Option<&Preflight> {
        self.preflight.as_ref()
    }

    /// Returns what became of the last finished step after an out-of-memory error.
    pub fn rescue(&self) -> Option<&Rescue> {
        self.rescue.as_ref()
    }

    /// Returns the steps that are done.
    pub fn times(&self) -> StepTimes {
        self.times
    }

    /// Returns the median time of a step over the last lines, each weighed by its steps; `None` before the second line.
    pub fn median_step_seconds(&self) -> Option<f64> {
        let mut paces: Vec<(f64, u64)> = self.paces.iter().copied().collect();
        paces.sort_by(|a, b| a.0.total_cmp(&b.0));
        let steps: u64 = paces.iter().map(|(_, steps)| steps).sum();
        let mut below = 0;
        let middle = paces.iter().find(|(_, steps_here)| {
            below += steps_here;
            2 * below >= steps
        });
        middle.map(|(seconds, _)| *seconds)
    }

    /// Returns the allocator's peaks, the preflight's own not among them.
    pub fn peaks(&self) -> Option<AllocatorPeaks> {
        self.peaks
    }

    /// Returns the step of the last regular checkpoint.
    pub fn saved_step(&self) -> Option<u64> {
        self.saved_step
    }

    /// Returns the step after which the stop file ended the training. The exit code is 0 then, and it is no success.
    pub fn stopped_at(&self) -> Option<u64> {
        self.stopped_at
    }

    /// Returns the companion's own share of the time; `None` until the trainer leaves its loop.
    pub fn own_time(&self) -> Option<OwnTime> {
        self.own_time
    }

    /// Returns why it stands aside, with telemetry alone.
    pub fn aside(&self) -> Option<&str> {
        self.aside.as_deref()
    }

    /// Returns what went wrong in it, the first ones.
    pub fn errors(&self) -> &[String] {
        &self.errors
    }

    /// Returns how many lines were not understood.
    pub fn skipped_lines(&self) -> u64 {
        self.skipped_lines
    }

    /// Returns why there is no sign of life, as far as it was said.
    pub fn why_silent(&self) -> String {
        match (self.errors.first(), &self.loaded) {
            (Some(error), _) => error.clone(),
            (None, Some(_)) => "it was loaded, and its begin line never came".to_owned(),
            (None, None) => "it said nothing".to_owned(),
        }
    }

    /// Returns whether this attempt's trainer resumed, or would resume, inside a later epoch with the right rows.
    pub fn cures_row_order(&self) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| loaded.cures.iter().any(|cure| cure == ROW_ORDER))
    }

    /// Returns whether the companion was alive in a trainer of these versions.
    pub fn lived_in(&self, versions: &BTreeMap<String, String>) -> bool {
        let same = |loaded: &Loaded| {
            ["ms-swift", "transformers"].iter().all(|name| loaded.versions.get(*name) == versions.get(*name))
        };
        self.begin.is_some() && self.loaded.as_ref().is_some_and(same)
    }
}

/// Returns whether a resume inside a later epoch replays the rows of the first, seen from what `earlier` attempts of
/// the same job reported: the cure is trusted where it was alive in a trainer of the very versions that come next.
pub fn replays_first_epoch<'a>(
    dialect: &Dialect,
    versions: &BTreeMap<String, String>,
    earlier: impl IntoIterator<Item = &'a Telemetry>,
) -> bool {
    dialect.replays_first_epoch()
        && !earlier.into_iter().any(|telemetry| telemetry.lived_in(versions) && telemetry.cures_row_order())
}

fn read<T: for<'a> Deserialize<'a>>(value: &Value) -> Option<T> {
    T::deserialize(value).ok()
}

#[cfg(test)]
mod tests;
