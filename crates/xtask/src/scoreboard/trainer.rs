//! How is one attempt of a contestant run, and ended?

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::cases::{EPOCHS, SAVE_STEPS, rows};
use super::interrupt::Interrupt;
use super::world::World;
use crate::startup::{packages, sft_script};
use crate::test::install_trainer;
use crate::workspace::{output, run};

/// Longest life of one process of a contestant.
const LONGEST: Duration = Duration::from_secs(600);
/// How often a process, Ctrl-C and the neighbour are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long mhtraind may take to end its trainer after Ctrl-C.
const GRACE: Duration = Duration::from_secs(60);

/// Writes the tokens of the longest row for each system prompt, with the chat template's own.
const LONGEST_ROW: &str = r#"
import json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file("model/tokenizer.json")
turn = "<|im_start|>{}\n{}<|im_end|>\n"
rows = [json.loads(line)["messages"] for line in open("train.jsonl", encoding="utf-8")]
for system in sys.argv[1:]:
    texts = ["".join(turn.format(part["role"], part["content"]) for part in row) for row in rows]
    print(max(len(tokenizer.encode(turn.format("system", system) + text).ids) for text in texts))
"#;

/// What ms-swift 4.x takes for the system prompt of the model (its template `qwen2_5`), and 3.x (its template `qwen`).
const SYSTEM_4: &str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
const SYSTEM_3: &str = "You are a helpful assistant.";

/// One line of ms-swift, with the model and the data that everybody trains.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) version: String,
    /// Versions of what takes part, in words.
    pub(super) versions: String,
    /// Tokens of the longest row with the longer of both system prompts: what cases are drawn for, the same on all lines.
    pub(super) longest: u64,
    /// Tokens of the longest row as this line makes it.
    pub(super) longest_here: u64,
    pub(super) dir: PathBuf,
    pub(super) binary: PathBuf,
    pub(super) swift: PathBuf,
    python: PathBuf,
    script: PathBuf,
    plugins: Vec<PathBuf>,
}

/// What is asked of ms-swift in one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) micro_batch: u64,
    pub(super) accumulation: u64,
    /// The recipe's emergency profile, beside the batch.
    pub(super) emergency: bool,
    pub(super) auto_find: bool,
    pub(super) resume: Option<PathBuf>,
}

/// How a process of a contestant ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// `None` after a signal, ours if it took too long.
    pub(super) code: Option<i32>,
    /// Whether its last words are about memory, as a wrapper would look for it.
    pub(super) out_of_memory: bool,
}

impl Line {
    /// Installs the line, or finds it installed, and makes the model and the data.
    pub(super) fn prepare(version: &str, binary: &Path, root: &Path, ground: &Path) -> anyhow::Result<Line> {
        let trainer = PathBuf::from(install_trainer(binary, version)?);
        let dir = ground.join(version);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        fs::create_dir_all(&dir)?;
        let demo = root.join("crates/mhtraind/src/demo");
        let python = trainer.join("bin/python");
        run(Command::new(&python).arg(demo.join("make_demo.py")).arg(&dir).stdout(Stdio::null()))?;
        fs::write(dir.join("train.jsonl"), rows())?;
        let here = if version.starts_with("3.") { SYSTEM_3 } else { SYSTEM_4 };
        let longest =
            output(Command::new(&python).args(["-c", LONGEST_ROW, SYSTEM_4, here]).current_dir(&dir))?;
        let (longest, longest_here) = longest.trim().split_once('\n').context("not two numbers of tokens")?;
        let ours = output(Command::new(binary).arg("--version"))?;
        let tests = root.join("tests/trainer");
        Ok(Line {
            version: version.to_owned(),
            versions: format!("{}; {}", packages(&python)?, ours.trim()),
            longest: longest.parse().context("no number of tokens")?,
            longest_here: longest_here.parse().context("no number of tokens")?,
            dir,
            binary: binary.to_owned(),
            swift: trainer.join("bin/swift"),
            script: sft_script(&python)?,
            plugins: vec![
                tests.join("row_order.py"),
                tests.join("finished_steps.py"),
                demo.join("simulated_capacity.py"),
            ],
            python,
        })
    }

    /// Returns the plugins that everybody's trainer loads: the witnesses and the simulated capacity.
    pub(super) fn plugins(&self) -> &[PathBuf] {
        &self.plugins
    }

    /// Returns a command with nothing of the caller's surroundings but what a program needs, and the case's card.
    pub(super) fn command(&self, program: &Path, world: &World, home: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.dir).env_clear().stdin(Stdio::null());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", home);
        // One thread: the tiny model is not faster with two, and figures depend less on what else the machine does.
        command.env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
        command.envs(world.variables());
        command
    }

    /// Returns the recipe's command for one attempt: ms-swift's own script, without its wrapper, as mhtraind starts it.
    pub(super) fn attempt(&self, setting: &Setting, world: &World, home: &Path, out: &Path) -> Command {
        let mut command = self.command(&self.python, world, home);
        let train_type = if self.version.starts_with("3.") { "--train_type" } else { "--tuner_type" };
        command.arg(&self.script).args(["--model", "model", "--dataset", "train.jsonl", train_type, "lora"]);
        let (length, rate, save) = match setting.emergency {
            true => ("2048", "1e-4", (SAVE_STEPS / 2, 2)),
            false => ("3072", "2e-4", (SAVE_STEPS, 3)),
        };
        for (name, value) in [
            // What a CPU needs: no bfloat16, and no packing without flash attention.
            ("torch_dtype", "float32".to_owned()),
            ("packing", "false".to_owned()),
            ("attn_impl", "sdpa".to_owned()),
            ("max_length", length.to_owned()),
            ("gradient_checkpointing", "true".to_owned()),
            ("per_device_train_batch_size", setting.micro_batch.to_string()),
            ("gradient_accumulation_steps", setting.accumulation.to_string()),
            ("learning_rate", rate.to_owned()),
            ("warmup_ratio", "0.1".to_owned()),
            ("num_train_epochs", EPOCHS.to_string()),
            ("save_steps", save.0.to_string()),
            ("save_total_limit", save.1.to_string()),
            ("logging_steps", "1".to_owned()),
            ("report_to", "none".to_owned()),
            ("check_model", "false".to_owned()),
            ("add_version", "false".to_owned()),
        ] {
            command.arg(format!("--{name}")).arg(value);
        }
        if setting.auto_find {
            command.args(["--auto_find_batch_size", "true"]);
        }
        if let Some(checkpoint) = &setting.resume {
            command.arg("--resume_from_checkpoint").arg(checkpoint);
        }
        command.arg("--output_dir").arg(out).arg("--external_plugins").args(&self.plugins);
        command
    }
}

/// Runs a process to its end, in a group of its own, with its words in a file. Ctrl-C ends it, and is an error.
pub(super) fn run_watched(
    command: &mut Command,
    log: &Path,
    world: &mut World,
    interrupt: &Interrupt,
) -> anyhow::Result<Ended> {
    let words = File::create(log)?;
    command.stdout(words.try_clone()?).stderr(words).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let until = Instant::now() + LONGEST;
    let code = loop {
        if let Some(status) = child.try_wait()? {
            break status.code();
        }
        if interrupt.asked() {
            end(&mut child)?;
            bail!("interrupted");
        }
        if Instant::now() > until {
            end(&mut child)?;
            break None;
        }
        if let Err(error) = world.look() {
            end(&mut child)?;
            return Err(error);
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    Ok(Ended { code, out_of_memory: text.contains("OutOfMemoryError") })
}

/// Ends a process and all that it started. mhtraind's trainers have sessions of their own: it is asked first.
fn end(child: &mut Child) -> anyhow::Result<()> {
    let pid = Pid::from_child(child);
    kill_process(pid, Signal::INT)?;
    let until = Instant::now() + GRACE;
    while child.try_wait()?.is_none() && Instant::now() < until {
        std::thread::sleep(LOOK_EVERY);
    }
    // Data-loader workers are of its group. Nobody may be left of it.
    let _nobody_left = kill_process_group(pid, Signal::KILL);
    child.wait()?;
    Ok(())
}
