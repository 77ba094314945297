//! A trainer that has imported ms-swift already: many attempts in the time of a few starts.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use mhtrain_swift::companion::{FILE_NAME, Launch, SOURCE, Telemetry};
use serde_json::{Value, json};

use crate::environment::{TestEnv, root};
use crate::lab::{Trained, trainer};

/// `warm_trainer.py`, a tiny model, 320 rows, and a directory for each attempt.
pub(crate) struct Warm {
    pub(crate) env: TestEnv,
    python: PathBuf,
    is_3x: bool,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// One attempt.
#[derive(Clone, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) micro_batch: u32,
    pub(crate) accumulation: u32,
    pub(crate) train_type: &'a str,
    pub(crate) lora_dropout: f64,
    pub(crate) epochs: u32,
    /// Rows of the data that are taken.
    pub(crate) rows: u32,
    pub(crate) companion: bool,
    /// Plugins of `tests/trainer/` beside `row_order.py` and the demo's simulated capacity.
    pub(crate) plugins: &'a [&'a str],
    pub(crate) args: &'a [&'a str],
    pub(crate) env: &'a [(&'a str, &'a str)],
    pub(crate) resume: Option<PathBuf>,
}

impl Default for Case<'_> {
    fn default() -> Self {
        Case {
            micro_batch: 8,
            accumulation: 4,
            train_type: "lora",
            lora_dropout: 0.0,
            epochs: 2,
            rows: 320,
            companion: true,
            plugins: &[],
            args: &[],
            env: &[],
            resume: None,
        }
    }
}

/// What one attempt left.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) dir: PathBuf,
    /// Exit code; `None` after a signal.
    pub(crate) code: Option<i64>,
    pub(crate) telemetry: Telemetry,
    /// Rows of each step.
    pub(crate) trained: Trained,
    /// Loss, norm of the gradients and learning rate of each step.
    pub(crate) logged: BTreeMap<u64, [f64; 3]>,
    /// Standard output and error.
    pub(crate) output: String,
}

impl Warm {
    /// Returns one for the environment that the tests run with; `None`, with a word, without one.
    pub(crate) fn start() -> Option<Warm> {
        let (trainer, version) = trainer()?;
        let env = TestEnv::new();
        let python = trainer.join("bin/python");
        let demo = root().join("crates/mhtraind/src/demo");
        let made = Command::new(&python).arg(demo.join("make_demo.py")).arg(env.path(".")).status();
        assert!(made.expect("the interpreter starts").success(), "the tiny model is made");
        env.write(&format!("companion/{FILE_NAME}"), SOURCE);
        let errors = std::fs::File::create(env.path("warm.log")).expect("can write");
        let mut command = Command::new(&python);
        command.arg(root().join("tests/trainer/warm_trainer.py")).current_dir(env.path("."));
        surroundings(&mut command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("the warm trainer starts");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut warm = Warm { env, python, is_3x: version.starts_with("3."), child, stdin, stdout };
        assert_eq!(warm.answer()["ready"], true);
        Some(warm)
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("it answers");
        serde_json::from_str(&line).unwrap_or_else(|_| {
            panic!("no answer: {}", std::fs::read_to_string(self.env.path("warm.log")).unwrap_or_default())
        })
    }

    /// Returns where an attempt is to stop when this file is there.
    pub(crate) fn stop_file(&self, name: &str) -> PathBuf {
        self.env.path(&format!("{name}.stop"))
    }

    /// Trains once, in the directory `name`.
    pub(crate) fn train(&mut self, name: &str, case: &Case<'_>) -> Left {
        let (argv, env) = self.call(name, case);
        let output = self.env.path(&format!("{name}.log"));
        let order = json!({"argv": argv, "env": env, "cwd": self.env.path("."), "output": output});
        writeln!(self.stdin, "{order}").expect("it listens");
        let code = self.answer()["exit"].as_i64();
        self.left(name, code)
    }

    /// Trains once on two ranks with DDP on the CPU: torchrun and two real starts.
    pub(crate) fn train_on_two_ranks(&self, name: &str, case: &Case<'_>) -> Left {
        let (argv, env) = self.call(name, case);
        let site = Command::new(&self.python)
            .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
            .output()
            .expect("the interpreter starts");
        let script =
            Path::new(String::from_utf8(site.stdout).expect("a path").trim()).join("swift/cli/sft.py");
        let log = std::fs::File::create(self.env.path(&format!("{name}.log"))).expect("can write");
        let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|socket| socket.local_addr());
        let mut command = Command::new(&self.python);
        command.args(["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]);
        command.arg(port.expect("a free port").port().to_string()).arg(script).args(argv);
        // Without `--use_cpu` two ranks on a CPU train independently of each other.
        command.args(["--use_cpu", "true", "--ddp_backend", "gloo"]).current_dir(self.env.path("."));
        surroundings(&mut command);
        let status = command
            .envs(env)
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("a second handle"))
            .stdout(log)
            .status()
            .expect("torchrun starts");
        self.left(name, status.code().map(i64::from))
    }

    /// Returns the arguments and variables of an attempt.
    fn call(&self, name: &str, case: &Case<'_>) -> (Vec<String>, BTreeMap<String, String>) {
        let launch = self.launch(name);
        let mut env: BTreeMap<String, String> =
            case.env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        env.insert("ORDER_LOG".to_owned(), self.order_log(name).display().to_string());
        if case.companion {
            env.extend(launch.environment());
        }
        (self.arguments(&self.env.path(name), case, &launch), env)
    }

    fn launch(&self, name: &str) -> Launch {
        Launch {
            file: self.env.path(&format!("companion/{FILE_NAME}")),
            telemetry: self.env.path(&format!("{name}.telemetry")),
            stop_file: self.stop_file(name),
        }
    }

    fn order_log(&self, name: &str) -> PathBuf {
        self.env.path(&format!("{name}.order"))
    }

    fn left(&self, name: &str, code: Option<i64>) -> Left {
        let dir = self.env.path(name);
        let read = |path: &Path| std::fs::read(path).unwrap_or_default();
        let mut telemetry = Telemetry::new();
        telemetry.push_bytes(&read(&self.launch(name).telemetry));
        Left {
            code,
            telemetry,
            trained: trained(&self.order_log(name)),
            logged: logged(&dir.join("logging.jsonl")),
            output: String::from_utf8_lossy(&read(&self.env.path(&format!("{name}.log")))).into_owned(),
            dir,
        }
    }

    fn arguments(&self, dir: &Path, case: &Case<'_>, launch: &Launch) -> Vec<String> {
        let mut plugins = vec![
            root().join("tests/trainer/row_order.py"),
            root().join("crates/mhtraind/src/demo/simulated_capacity.py"),
        ];
        plugins.extend(case.plugins.iter().map(|name| root().join("tests/trainer").join(name)));
        if case.companion {
            plugins.push(launch.file.clone());
        }
        let text = |path: &Path| path.display().to_string();
        let mut argv: Vec<String> = [
            "--model",
            "model",
            "--torch_dtype",
            "float32",
            "--max_length",
            "512",
            "--learning_rate",
            "1e-3",
            "--save_steps",
            "5",
            "--logging_steps",
            "1",
            "--add_version",
            "false",
            "--check_model",
            "false",
            "--report_to",
            "none",
            "--split_dataset_ratio",
            "0",
        ]
        .map(str::to_owned)
        .to_vec();
        argv.extend(["--dataset".to_owned(), format!("train.jsonl#{}", case.rows)]);
        if case.rows == 320 {
            // `#N` draws rows; the whole file is taken as it is.
            let last = argv.len() - 1;
            argv[last] = "train.jsonl".to_owned();
        }
        let mut push = |name: &str, value: String| argv.extend([format!("--{name}"), value]);
        push("output_dir", text(dir));
        push("per_device_train_batch_size", case.micro_batch.to_string());
        push("gradient_accumulation_steps", case.accumulation.to_string());
        push("num_train_epochs", case.epochs.to_string());
        push(if self.is_3x { "train_type" } else { "tuner_type" }, case.train_type.to_owned());
        if case.train_type == "lora" {
            push("lora_dropout", case.lora_dropout.to_string());
        }
        if let Some(checkpoint) = &case.resume {
            push("resume_from_checkpoint", text(checkpoint));
        }
        argv.push("--external_plugins".to_owned());
        argv.extend(plugins.iter().map(|plugin| text(plugin)));
        argv.extend(case.args.iter().map(|word| (*word).to_owned()));
        argv
    }
}

/// Sets what every trainer of these tests is to have around it.
fn surroundings(command: &mut Command) {
    command.env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
    command.env("CUDA_VISIBLE_DEVICES", "").env_remove("PYTHONDONTWRITEBYTECODE");
    for (name, value) in [
        ("CAPACITY_BYTES", 2u64 << 30),
        ("BYTES_PER_TOKEN", 1 << 20),
        ("RESIDENT_BYTES", 512 << 20),
        ("GROWTH_BYTES", 736 << 20),
        ("GROWTH_STEP", 1_000_000),
    ] {
        command.env(format!("MHT_SIM_{name}"), value.to_string());
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Left {
    /// Returns the trained weights, byte for byte, of the checkpoint of a step.
    pub(crate) fn weights(&self, step: u64) -> Vec<u8> {
        let checkpoint = self.dir.join(format!("checkpoint-{step}"));
        let names = ["adapter_model.safetensors", "model.safetensors"];
        let found = names.iter().find_map(|name| std::fs::read(checkpoint.join(name)).ok());
        found.unwrap_or_else(|| panic!("no weights in {}: {}", checkpoint.display(), self.output))
    }

    /// Asserts that each of this attempt's steps trained the same rows with the same learning rate as the whole run,
    /// and returns the largest difference of a loss.
    #[track_caller]
    pub(crate) fn assert_continues(&self, whole: &Left, from_step: u64) -> f64 {
        assert_eq!(self.code, Some(0), "{}", self.output);
        let expected: Trained = whole
            .trained
            .iter()
            .filter(|(step, _)| **step > from_step)
            .map(|(s, r)| (*s, r.clone()))
            .collect();
        assert_eq!(
            self.trained, expected,
            "from step {from_step}: the rows that an uninterrupted run trains"
        );
        let steps: Vec<_> = self.logged.keys().collect();
        assert_eq!(steps, expected.keys().collect::<Vec<_>>());
        let mut largest = 0.0f64;
        for (step, [loss, _, rate]) in &self.logged {
            let [whole_loss, _, whole_rate] = whole.logged[step];
            assert!((rate - whole_rate).abs() < 1e-12, "step {step}: learning rate {rate}, not {whole_rate}");
            largest = largest.max((loss - whole_loss).abs());
        }
        assert!(largest < 1e-3, "losses differ by {largest}");
        largest
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn trained(path: &Path) -> Trained {
    let mut trained = Trained::new();
    for line in lines(path) {
        let ids = line["ids"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id"));
        trained.entry(line["step"].as_u64().expect("a step")).or_default().extend(ids);
    }
    trained
}

fn logged(path: &Path) -> BTreeMap<u64, [f64; 3]> {
    let of = |line: &Value| {
        let (step, _) = line["global_step/max_steps"].as_str()?.split_once('/')?;
        let figures = ["loss", "grad_norm", "learning_rate"].map(|key| line[key].as_f64());
        let [Some(loss), Some(norm), Some(rate)] = figures else { return None };
        Some((step.parse().ok()?, [loss, norm, rate]))
    };
    lines(path).iter().filter_map(of).collect()
}
