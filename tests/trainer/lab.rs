//! One job's surroundings: a real trainer environment, a tiny model, a simulated card.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::environment::{CARD, Ran, TestEnv, root};

/// Rows that each optimizer step trained, in order.
pub(crate) type Trained = BTreeMap<u64, Vec<u64>>;

/// The simulated card: eight rows fit until `MHT_SIM_GROWTH_STEP`, four always (the demo's figures).
const CARD_BYTES: u64 = 2 << 30;

/// Returns the trainer environment that the environment names, and its version; `None`, with a word, without one.
pub(crate) fn trainer() -> Option<(PathBuf, String)> {
    let named = (
        std::env::var_os("MHTRAIND_TEST_TRAINER").map(PathBuf::from),
        std::env::var("MHTRAIND_TEST_MS_SWIFT").ok(),
    );
    let (Some(trainer), Some(version)) = named else {
        println!("skipped: needs a real trainer environment; `cargo xtask test` installs one and runs this");
        return None;
    };
    Some((trainer, version))
}

pub(crate) struct Lab {
    pub(crate) env: TestEnv,
}

impl Lab {
    /// Returns a lab with the trainer environment that the environment names; `None`, with a word, without one.
    pub(crate) fn new() -> Option<Lab> {
        let (trainer, _) = trainer()?;
        let env = TestEnv::new();
        let python = trainer.join("bin/python");
        let demo = root().join("crates/mhtraind/src/demo");
        let made = Command::new(&python).arg(demo.join("make_demo.py")).arg(env.path(".")).status();
        assert!(made.expect("the interpreter starts").success(), "the tiny model is made");
        for (from, name) in [(demo, "simulated_capacity.py"), (root().join("tests/trainer"), "row_order.py")]
        {
            std::fs::copy(from.join(name), env.path(name)).expect("can copy a plugin");
        }
        let device = nvml_sim::SimDevice::idle(CARD, "Simulated GPU", CARD_BYTES, "8.6");
        nvml_sim::SimFile::new(vec![device]).write_atomically(&env.path("nvml.json")).expect("can write");
        std::fs::create_dir(env.path("usage")).expect("can make a directory");
        let swift = trainer.join("bin/swift");
        env.write(
            "mhtraind.toml",
            format!("[trainer]\ncommand = [{swift:?}, \"sft\"]\n[attempt]\ngrace_s = 5\n"),
        );
        Some(Lab { env })
    }

    /// Writes job.json for so many epochs, with `extra` keys laid over; `args` are merged.
    pub(crate) fn job(&self, extra: Value, epochs: u32) {
        let mut job = json!({
            "model": "./model", "dataset": "train.jsonl", "output_dir": "out", "device": 0,
            "args": {"torch_dtype": "float32", "save_steps": 5, "save_total_limit": 10, "logging_steps": 1,
                "num_train_epochs": epochs, "lora_dropout": 0.0,
                "external_plugins": ["row_order.py", "simulated_capacity.py"]},
        });
        for (key, value) in extra.as_object().expect("an object") {
            match value {
                Value::Object(inner) if key == "args" => {
                    job["args"].as_object_mut().expect("args").extend(inner.clone());
                }
                value => job[key] = value.clone(),
            }
        }
        self.env.write("job.json", job.to_string());
    }

    /// Returns a command with the simulated card and capacity; `set` variables come last.
    pub(crate) fn command(&self, args: &[&str], set: &[(&str, &str)]) -> Command {
        let mut command = self.env.command(args);
        command.env(
            "MHTRAIND_NVML_LIBRARY",
            nvml_sim::find_library().expect("libnvml_sim.so was built with the tests"),
        );
        command
            .env("NVML_SIM_FILE", self.env.path("nvml.json"))
            .env("NVML_SIM_USAGE", self.env.path("usage"));
        command.env("MHTRAIND_CONFIG", self.env.path("mhtraind.toml"));
        for (name, value) in [
            ("MHT_SIM_CAPACITY_BYTES", CARD_BYTES),
            ("MHT_SIM_BYTES_PER_TOKEN", 1 << 20),
            ("MHT_SIM_RESIDENT_BYTES", 512 << 20),
            ("MHT_SIM_GROWTH_BYTES", 736 << 20),
            ("MHT_SIM_GROWTH_STEP", 1_000_000),
        ] {
            command.env(name, value.to_string());
        }
        command.env("MHT_SIM_DEVICE_UUID", CARD);
        // Each attempt appends; its lines bear its pid.
        command.env("ORDER_LOG", self.env.path("order.jsonl"));
        command.env("OMP_NUM_THREADS", "2").env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
        command.envs(set.iter().copied());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str], set: &[(&str, &str)]) -> Ran {
        Ran::from(self.command(args, set).output().expect("the binary starts"))
    }

    /// Returns the receipt.
    pub(crate) fn receipt(&self) -> Value {
        let text = std::fs::read_to_string(self.env.path("out/receipt.json")).expect("there is a receipt");
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// Returns the rows of each step that the attempt trained (in whole or in part) which is `number` of those that
    /// trained anything.
    pub(crate) fn trained(&self, number: usize) -> Trained {
        let text = std::fs::read_to_string(self.env.path("order.jsonl")).unwrap_or_default();
        // An attempt is one process.
        let mut attempts: Vec<(u64, Trained)> = Vec::new();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let step = line["step"].as_u64().expect("a step");
            let pid = line["pid"].as_u64().expect("a pid");
            let rows = line["ids"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id"));
            if attempts.last().is_none_or(|(before, _)| *before != pid) {
                attempts.push((pid, Trained::new()));
            }
            attempts.last_mut().expect("never empty").1.entry(step).or_default().extend(rows);
        }
        attempts.get(number - 1).map(|(_, trained)| trained.clone()).unwrap_or_default()
    }

    /// Returns a figure (`loss`, `learning_rate`) of each step that an attempt logged.
    pub(crate) fn logged(&self, number: u32, figure: &str) -> BTreeMap<u64, f64> {
        let path = self.env.path(&format!("out/attempt-{number}/logging.jsonl"));
        let text = std::fs::read_to_string(path).expect("the trainer's log");
        text.lines()
            .filter_map(|line| {
                let line: Value = serde_json::from_str(line).ok()?;
                let (step, _) = line["global_step/max_steps"].as_str()?.split_once('/')?;
                Some((step.parse().ok()?, line[figure].as_f64()?))
            })
            .collect()
    }

    /// Waits until an attempt has logged a step.
    #[track_caller]
    pub(crate) fn wait_for_step(&self, attempt: u32, step: u64) {
        let path = self.env.path(&format!("out/attempt-{attempt}/logging.jsonl"));
        let until = Instant::now() + Duration::from_secs(180);
        while !(path.exists() && self.logged(attempt, "loss").keys().any(|logged| *logged >= step)) {
            assert!(Instant::now() < until, "waited 180 s for step {step} in {}", path.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns the pid of an attempt's trainer, from the recorder's own file.
    pub(crate) fn trainer_pid(&self, attempt: u32) -> u32 {
        let path = self.env.path(&format!("out/.mhtraind/attempt-{attempt}/trainer.json"));
        let record: Value =
            serde_json::from_str(&std::fs::read_to_string(path).expect("trainer.json")).expect("JSON");
        u32::try_from(record["pid"].as_u64().expect("a pid")).expect("a small number")
    }

    /// Returns every process whose command line names the job's directory.
    pub(crate) fn processes_of_the_job(&self) -> Vec<u32> {
        let job = self.env.path("out");
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if contains(&arguments, job.as_path()) {
                found.push(pid);
            }
        }
        found
    }
}

fn contains(haystack: &[u8], path: &Path) -> bool {
    let needle = path.as_os_str().as_encoded_bytes();
    haystack.windows(needle.len()).any(|window| window == needle)
}
