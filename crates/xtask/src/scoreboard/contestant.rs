//! What does each contestant do after an out-of-memory error?

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::cases::{Case, EFFECTIVE, EPOCHS, SAVE_STEPS};
use super::interrupt::Interrupt;
use super::trainer::{Line, Setting, run_watched};
use super::world::World;

/// Who trains.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Contestant {
    /// Knows the capacity: one attempt, at the largest micro-batch that always fits
    Oracle,
    /// The recipe's row, and its section 5.1 after an error, from zero each time
    Person,
    /// ms-swift's own `auto_find_batch_size`
    AutoFind,
    /// Half the micro-batch, twice the accumulation, from zero each time
    Halve,
    /// The same, with a plain `--resume_from_checkpoint` of the newest checkpoint
    HalveResume,
    /// This project
    Mhtraind,
}

/// What a contestant did, as it can be seen from outside.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Story {
    /// Processes of the trainer that were started.
    pub(super) processes: u32,
    /// Exit code of the last one, or of mhtraind.
    pub(super) code: Option<i32>,
    /// What somebody had to do after the first start.
    pub(super) human_actions: u32,
}

impl Contestant {
    pub(super) const ALL: [Contestant; 6] = [
        Contestant::Oracle,
        Contestant::Person,
        Contestant::AutoFind,
        Contestant::Halve,
        Contestant::HalveResume,
        Contestant::Mhtraind,
    ];

    /// Returns the name on the command line and in the results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Contestant::Oracle => "oracle",
            Contestant::Person => "person",
            Contestant::AutoFind => "auto-find",
            Contestant::Halve => "halve",
            Contestant::HalveResume => "halve-resume",
            Contestant::Mhtraind => "mhtraind",
        }
    }

    /// Returns the first attempt: the recipe's row for the model (8 x 4), but for the oracle.
    fn first(self, case: &Case) -> Setting {
        let micro_batch = if self == Contestant::Oracle { case.fits } else { 8 };
        Setting {
            micro_batch,
            accumulation: EFFECTIVE / micro_batch,
            emergency: false,
            auto_find: self == Contestant::AutoFind,
            resume: None,
        }
    }

    /// Returns the attempt after an out-of-memory error; `None`: nothing is left to try.
    fn next(self, before: &Setting, checkpoint: Option<PathBuf>) -> Option<Setting> {
        let halved = Setting {
            micro_batch: before.micro_batch / 2,
            accumulation: before.accumulation * 2,
            ..before.clone()
        };
        match self {
            // Section 5.1: 4 x 8; length 2048, no packing, checkpointing. The last three change nothing here (no row is that long,
            // nothing is packed, checkpointing is on), so no attempt is spent on them; the recipe's emergency profile is left.
            Contestant::Person if before.micro_batch == 8 => Some(halved),
            Contestant::Person if !before.emergency => {
                Some(Setting { micro_batch: 1, accumulation: 32, emergency: true, ..before.clone() })
            }
            Contestant::Halve if halved.micro_batch > 0 => Some(halved),
            Contestant::HalveResume if halved.micro_batch > 0 => {
                Some(Setting { resume: checkpoint.or(before.resume.clone()), ..halved })
            }
            Contestant::Oracle
            | Contestant::Person
            | Contestant::AutoFind
            | Contestant::Halve
            | Contestant::HalveResume
            | Contestant::Mhtraind => None,
        }
    }

    /// Trains to the end, whatever it is. Everything is left in `dir`.
    pub(super) fn run(
        self,
        line: &Line,
        case: &Case,
        dir: &Path,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Story> {
        let mut world = World::make(*case, dir)?;
        if self == Contestant::Mhtraind {
            return mhtraind(line, dir, &mut world, interrupt);
        }
        let mut setting = self.first(case);
        let mut processes = 0;
        loop {
            processes += 1;
            let out = dir.join(format!("out-{processes}"));
            let mut attempt = line.attempt(&setting, &world, &dir.join("home"), &out);
            let log = dir.join(format!("attempt-{processes}.log"));
            let ended = run_watched(&mut attempt, &log, &mut world, interrupt)?;
            let failed = ended.code != Some(0);
            let next = match failed && ended.out_of_memory {
                true => self.next(&setting, newest_checkpoint(&out)),
                false => None,
            };
            let Some(next) = next else {
                let edits = if self == Contestant::Person { processes - 1 } else { 0 };
                return Ok(Story { processes, code: ended.code, human_actions: edits + u32::from(failed) });
            };
            setting = next;
        }
    }
}

/// Returns the newest checkpoint of a run that is whole: its state is written last.
fn newest_checkpoint(out: &Path) -> Option<PathBuf> {
    let step = |path: &PathBuf| -> Option<u64> {
        path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
    };
    let all = fs::read_dir(out).ok()?.flatten().map(|entry| entry.path());
    all.filter(|path| path.join("trainer_state.json").exists()).max_by_key(step)
}

/// Hands the same training to `mhtraind run`: the recipe's values are its own, and what is pinned is what is scaled here.
fn mhtraind(line: &Line, dir: &Path, world: &mut World, interrupt: &Interrupt) -> anyhow::Result<Story> {
    let settings = dir.join("mhtraind.toml");
    fs::write(&settings, format!("[trainer]\ncommand = [{:?}, \"sft\"]\n", line.swift))?;
    let out = dir.join("out");
    let job = json!({"model": "./model", "dataset": "train.jsonl", "output_dir": out, "device": 0, "args": {
        "torch_dtype": "float32", "num_train_epochs": EPOCHS, "save_steps": SAVE_STEPS, "save_total_limit": 3,
        "logging_steps": 1, "external_plugins": line.plugins(),
    }});
    let job_file = dir.join("job.json");
    fs::write(&job_file, job.to_string())?;
    // A home of its own: what one job shows about memory is kept there, and would help the next.
    let mut command = line.command(&line.binary, world, &dir.join("home"));
    let library = nvml_sim::find_library().context("libnvml_sim.so is not built")?;
    command.env("MHTRAIND_NVML_LIBRARY", library).env("MHTRAIND_CONFIG", settings);
    command.arg("run").arg(job_file);
    let ended = run_watched(&mut command, &dir.join("mhtraind.log"), world, interrupt)?;
    let receipt = fs::read_to_string(out.join("receipt.json")).context("mhtraind left no receipt")?;
    let receipt: Value = serde_json::from_str(&receipt)?;
    let processes = receipt["attempts"].as_array().map_or(0, Vec::len);
    Ok(Story {
        processes: u32::try_from(processes)?,
        code: ended.code,
        human_actions: u32::from(ended.code != Some(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ladder(contestant: Contestant) -> Vec<(u64, u64)> {
        let case = Case::draw(1, 1, 170)[0];
        let first = contestant.first(&case);
        std::iter::successors(Some(first), |before| contestant.next(before, None))
            .map(|setting| (setting.micro_batch, setting.accumulation))
            .collect()
    }

    #[test]
    fn each_keeps_its_own_order() {
        assert_eq!(ladder(Contestant::Person), [(8, 4), (4, 8), (1, 32)]);
        assert_eq!(ladder(Contestant::Halve), [(8, 4), (4, 8), (2, 16), (1, 32)]);
        assert_eq!(ladder(Contestant::HalveResume), ladder(Contestant::Halve));
        assert_eq!(ladder(Contestant::AutoFind), [(8, 4)]);
        assert_eq!(ladder(Contestant::Oracle).len(), 1);
    }

    #[test]
    fn a_wrapper_resumes_the_newest_checkpoint_that_there_is() {
        let first = Contestant::HalveResume.first(&Case::draw(1, 1, 170)[0]);
        let second = Contestant::HalveResume.next(&first, Some("checkpoint-4".into())).unwrap();
        assert_eq!(second.resume.as_deref(), Some(Path::new("checkpoint-4")));
        let third = Contestant::HalveResume.next(&second, None).unwrap();
        assert_eq!(third.resume, second.resume, "the attempt that died at once has saved none");
    }
}
