//! The controlled surroundings of one test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::fake_host::{make_model_and_data, make_trainer};

/// A temporary home with its own settings, cards and working directory; nothing of the caller's environment but PATH.
pub(crate) struct TestEnv {
    dir: tempfile::TempDir,
}

/// What a command left behind.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl TestEnv {
    pub(crate) fn new() -> TestEnv {
        let dir = tempfile::tempdir().expect("a temporary directory");
        TestEnv { dir }
    }

    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// Writes a file below the working directory and returns its path.
    pub(crate) fn write(&self, relative: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().expect("below the directory")).expect("can make a directory");
        std::fs::write(&path, content).expect("can write a file");
        path
    }

    /// Returns a command in this environment.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mhtraind"));
        command.args(args).current_dir(self.dir.path()).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.dir.path()).env("LC_ALL", "C.UTF-8");
        // Without this a machine with a real card would give other answers than one without.
        command.env("MHTRAIND_NVML_LIBRARY", self.path("no-such-library.so"));
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().expect("the binary starts"))
    }

    /// Runs a command with `input` on its standard input.
    pub(crate) fn run_with_input(&self, args: &[&str], input: &[u8]) -> Ran {
        use std::io::Write;
        use std::process::Stdio;
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            // A command that refuses early closes the pipe: that is no failure of the test.
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().expect("the binary ends");
        writer.join().expect("the writer ends");
        Ran::from(output)
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    /// Returns standard output as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("no JSON ({e}): {}\nstderr: {}", self.stdout, self.stderr))
    }

    /// Asserts the exit code and returns self.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Ran {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }
}

/// Returns the workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/mhtraind").to_owned()
}

/// A host with one simulated card and a trainer environment in which `swift sft` is `tests/fake-swift`.
pub(crate) struct FakeHost {
    pub(crate) env: TestEnv,
}

pub(crate) const CARD: &str = "GPU-00000000-0000-4000-8000-000000000001";

impl FakeHost {
    /// Makes the host; the card has `card` bytes, all free.
    pub(crate) fn with_card(card: u64) -> FakeHost {
        let env = TestEnv::new();
        let sft = root().join("tests/fake-swift/fake_swift.py");
        make_trainer(&env.path("trainer"), &sft, "4.6.0", "5.19.0").expect("a trainer environment");
        let device = nvml_sim::SimDevice::idle(CARD, "Simulated GPU", card, "8.0");
        nvml_sim::SimFile::new(vec![device]).write_atomically(&env.path("nvml.json")).expect("can write");
        env.write(
            "mhtraind.toml",
            format!(
                "[trainer]\ncommand = [{:?}, \"sft\"]\n[attempt]\ngrace_s = 2\n",
                env.path("trainer/bin/swift")
            ),
        );
        make_model_and_data(&env.path(".")).expect("can write");
        FakeHost { env }
    }

    /// Writes job.json: the local model and data, with `extra` keys laid over.
    pub(crate) fn job(&self, extra: Value) {
        let mut job = serde_json::json!({"model": "./model", "dataset": "train.jsonl", "output_dir": "out",
            "args": {"save_steps": 3, "logging_steps": 1, "num_train_epochs": 1}});
        for (key, value) in extra.as_object().expect("an object") {
            job[key] = value.clone();
        }
        self.env.write("job.json", job.to_string());
    }

    /// Returns a command with the card visible and the scenario set.
    pub(crate) fn command(&self, args: &[&str], scenario: &Value) -> Command {
        let library = nvml_sim::find_library().expect("libnvml_sim.so was built with the tests");
        let mut command = self.env.command(args);
        command.env("MHTRAIND_NVML_LIBRARY", library);
        command.env("NVML_SIM_FILE", self.env.path("nvml.json"));
        command.env("MHTRAIND_CONFIG", self.env.path("mhtraind.toml"));
        command.env("FAKE_SWIFT_SCENARIO", scenario.to_string());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str], scenario: Value) -> Ran {
        Ran::from(self.command(args, &scenario).output().expect("the binary starts"))
    }

    /// Returns the receipt of the job.
    pub(crate) fn receipt(&self) -> Value {
        let text = std::fs::read_to_string(self.env.path("out/receipt.json")).expect("there is a receipt");
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// Returns the rows that each optimizer step of an attempt trained, in order of the steps.
    pub(crate) fn trained(&self, attempt: u32) -> Vec<(u64, Vec<u64>)> {
        self.trained_in("out", attempt)
    }

    /// Like [`FakeHost::trained`], by the job with this output directory.
    pub(crate) fn trained_in(&self, output_dir: &str, attempt: u32) -> Vec<(u64, Vec<u64>)> {
        let path = self.env.path(&format!("{output_dir}/attempt-{attempt}/fake-rows.jsonl"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .map(|line| {
                let line: Value = serde_json::from_str(line).expect("JSON");
                let rows =
                    line["rows"].as_array().expect("rows").iter().map(|row| row.as_u64().expect("a row"));
                (line["step"].as_u64().expect("a step"), rows.collect())
            })
            .collect()
    }
}
