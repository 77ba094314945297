//! `cargo xtask startup`: how long does a trainer take to its first optimizer step, and a rerun after an error?
//!
//! Other work on the machine disturbs such figures. So the ways to start take turns, medians are given with the range,
//! and the load of the machine stands beside them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use clap::Args;

use mhtrain_swift::companion::{FILE_NAME, SOURCE};

use crate::test::{LINES, install_trainer};
use crate::workspace::{cargo, output, root, run, target_dir};

/// Measure the start of a trainer, and of a rerun, on both lines of ms-swift
#[derive(Debug, Args)]
pub(crate) struct StartupArgs {
    /// Starts of each kind; of those without bytecode, which take long, about half as many
    #[arg(long, default_value_t = 7)]
    runs: u32,

    /// File that gets the results
    #[arg(long, default_value = "docs/measurements/startup.md")]
    to: PathBuf,
}

/// Longest wait for a first step.
const LONGEST: Duration = Duration::from_secs(300);

/// How often a trainer's log is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The memory of the simulated card: eight rows fit until the growth step, four always (the demo's figures).
const CARD_BYTES: u64 = 2 << 30;
const CARD: &str = "GPU-00000000-0000-4000-8000-000000000001";

/// Packages whose own seconds are listed.
const PACKAGES: usize = 8;

/// One way to start a trainer.
#[derive(Copy, Clone, Debug, PartialEq)]
struct Way {
    name: &'static str,
    start: Start,
    bytecode: bool,
}

/// What is executed.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Start {
    Wrapper,
    Script,
    /// The script, with the companion as a plugin: what mhtraind does.
    Companion,
}

const WAYS: [Way; 5] = [
    Way { name: "`swift sft`", start: Start::Wrapper, bytecode: true },
    Way { name: "its script", start: Start::Script, bytecode: true },
    Way { name: "as mhtraind does: script, companion", start: Start::Companion, bytecode: true },
    Way { name: "`swift sft`, no bytecode", start: Start::Wrapper, bytecode: false },
    Way { name: "its script, no bytecode", start: Start::Script, bytecode: false },
];

/// One line of ms-swift with a tiny model to train.
struct Line {
    version: &'static str,
    trainer: PathBuf,
    script: PathBuf,
    dir: PathBuf,
    binary: PathBuf,
}

/// Measures, and writes the page.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run_all(args: &StartupArgs) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let root = root()?;
    let mut build = cargo();
    build.args(["build", "--package", "mhtraind", "--package", "nvml-sim"]).current_dir(&root);
    run(&mut build)?;
    let binary = target_dir(&root).join("debug/mhtraind");
    let mut rows = Rows::default();
    for version in LINES {
        let line = Line::prepare(version, &binary, &root)?;
        line.measure(args.runs, &mut rows)?;
        // Only now: a failure leaves the trainer's words there.
        std::fs::remove_dir_all(&line.dir)
            .with_context(|| format!("cannot remove {}", line.dir.display()))?;
    }
    let page = rows.page(args.runs);
    let path = root.join(&args.to);
    std::fs::write(&path, &page).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{page}\nwritten to {}", path.display());
    Ok(())
}

impl Line {
    fn prepare(version: &'static str, binary: &Path, root: &Path) -> anyhow::Result<Line> {
        let trainer = PathBuf::from(install_trainer(binary, version)?);
        let dir = target_dir(root).join(format!("startup-{version}"));
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        std::fs::create_dir_all(dir.join("usage"))?;
        std::fs::create_dir(dir.join("companion"))?;
        std::fs::write(dir.join("companion").join(FILE_NAME), SOURCE)?;
        let demo = root.join("crates/mhtraind/src/demo");
        std::fs::copy(demo.join("simulated_capacity.py"), dir.join("simulated_capacity.py"))?;
        let python = trainer.join("bin/python");
        run(Command::new(&python).arg(demo.join("make_demo.py")).arg(&dir).stdout(Stdio::null()))?;
        let script = sft_script(&python)?;
        // A first import writes what the installer did not compile, and fills the page cache.
        let line = Line { version, trainer, script, dir, binary: binary.to_owned() };
        line.first_step("warm", &WAYS[2])?;
        Ok(line)
    }

    fn measure(&self, runs: u32, rows: &mut Rows) -> anyhow::Result<()> {
        let mut starts: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for number in 0..runs {
            for (index, way) in WAYS.iter().enumerate() {
                if way.bytecode || number % 2 == 0 {
                    let seconds = self.first_step(&format!("{index}-{number}"), way)?;
                    starts.entry(index).or_default().push(seconds);
                }
            }
        }
        for (index, seconds) in starts {
            rows.starts.push((self.version, WAYS[index].name, seconds));
        }
        let mut reruns = Vec::new();
        for _ in 0..runs {
            reruns.push(self.rerun()?);
        }
        rows.reruns.push((self.version, reruns));
        rows.imports.push((self.version, self.imports()?));
        rows.packages.push(packages(&self.trainer.join("bin/python"))?);
        rows.loads.push(load()?);
        Ok(())
    }

    /// Returns a command with nothing of the caller's surroundings but what a program needs.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.dir).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        // A home of its own: what one job shows about memory is kept there, and would make the next one begin lower.
        command.env("HOME", self.dir.join("home"));
        command.env("OMP_NUM_THREADS", "2").env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
        command.stdin(Stdio::null());
        command
    }

    /// Returns the seconds from exec to the end of the first optimizer step.
    fn first_step(&self, name: &str, way: &Way) -> anyhow::Result<f64> {
        let program = if way.start == Start::Wrapper { "bin/swift" } else { "bin/python" };
        let mut command = self.command(&self.trainer.join(program));
        let companion = self.dir.join("companion").join(FILE_NAME);
        match way.start {
            Start::Wrapper => command.arg("sft"),
            Start::Script | Start::Companion => command.arg(&self.script),
        };
        if way.start == Start::Companion {
            command.arg("--external_plugins").arg(&companion);
            command.env("MHTRAIND_COMPANION_TELEMETRY", self.dir.join("telemetry.jsonl"));
        }
        if !way.bytecode {
            // Python looks for bytecode there alone, finds none, and leaves none.
            command.env("PYTHONPYCACHEPREFIX", self.dir.join("none")).env("PYTHONDONTWRITEBYTECODE", "1");
        }
        let out = self.dir.join(name);
        let train_type = if self.version.starts_with("3.") { "--train_type" } else { "--tuner_type" };
        command.args(["--model", "model", "--dataset", "train.jsonl", train_type, "lora"]);
        command.args(["--torch_dtype", "float32", "--max_length", "512", "--max_steps", "1"]);
        command.args(["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"]);
        command.args(["--logging_steps", "1", "--report_to", "none", "--check_model", "false"]);
        command.args(["--add_version", "false", "--output_dir"]).arg(&out);
        let log = std::fs::File::create(self.dir.join("trainer.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        let began = Instant::now();
        let mut child =
            command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        self.wait_for_step(&out, &mut child)?;
        let seconds = began.elapsed().as_secs_f64();
        child.wait()?;
        std::fs::remove_dir_all(&out)?;
        Ok(seconds)
    }

    /// Waits until a trainer has logged a step.
    fn wait_for_step(&self, out: &Path, child: &mut Child) -> anyhow::Result<()> {
        let log = out.join("logging.jsonl");
        let until = Instant::now() + LONGEST;
        while !std::fs::read_to_string(&log).is_ok_and(|text| text.contains("\"loss\"")) {
            let ended = child.try_wait()?;
            ensure!(ended.is_none(), "it ended without a step: {}", self.dir.join("trainer.log").display());
            ensure!(Instant::now() < until, "no step in {} s", LONGEST.as_secs());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Returns the seconds from the exit of an attempt that ran out of memory to the first step of its rerun.
    fn rerun(&self) -> anyhow::Result<f64> {
        let swift = self.trainer.join("bin/swift");
        let write = |name: &str, text: String| std::fs::write(self.dir.join(name), text);
        write("mhtraind.toml", format!("[trainer]\ncommand = [{swift:?}, \"sft\"]\n"))?;
        let args = serde_json::json!({"torch_dtype": "float32", "logging_steps": 1, "num_train_epochs": 1,
            "external_plugins": ["simulated_capacity.py"]});
        let job = serde_json::json!({"model": "./model", "dataset": "train.jsonl", "output_dir": "job", "device": 0,
            "args": args});
        write("job.json", job.to_string())?;
        let device = nvml_sim::SimDevice::idle(CARD, "Simulated GPU", CARD_BYTES, "8.6");
        nvml_sim::SimFile::new(vec![device]).write_atomically(&self.dir.join("nvml.json"))?;
        let mut command = self.command(&self.binary);
        command.args(["run", "job.json"]).env("MHTRAIND_CONFIG", self.dir.join("mhtraind.toml"));
        let library = nvml_sim::find_library().context("libnvml_sim.so is not built")?;
        command.env("MHTRAIND_NVML_LIBRARY", library).env("NVML_SIM_FILE", self.dir.join("nvml.json"));
        command.env("NVML_SIM_USAGE", self.dir.join("usage")).env("MHT_SIM_DEVICE_UUID", CARD);
        for (name, value) in [
            ("CAPACITY_BYTES", CARD_BYTES),
            ("BYTES_PER_TOKEN", 1 << 20),
            ("RESIDENT_BYTES", 512 << 20),
            ("GROWTH_BYTES", 736 << 20),
            ("GROWTH_STEP", 4),
        ] {
            command.env(format!("MHT_SIM_{name}"), value.to_string());
        }
        let log = std::fs::File::create(self.dir.join("trainer.log"))?;
        let mut child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.wait_for_step(&self.dir.join("job/attempt-2"), &mut child)?;
        let stepped = SystemTime::now();
        ensure!(child.wait()?.success(), "the job failed: {}", self.dir.join("trainer.log").display());
        // The recorder writes how a trainer ended as soon as it is gone, and once more when all that it started is.
        let ended = std::fs::metadata(self.dir.join("job/.mhtraind/attempt-1/exit.json"))?.modified()?;
        let attempts = self.dir.join("job/attempt-3");
        ensure!(!attempts.exists(), "one rerun is enough, and there were two");
        std::fs::remove_dir_all(self.dir.join("job"))?;
        std::fs::remove_dir_all(self.dir.join("home"))?;
        Ok(stepped.duration_since(ended)?.as_secs_f64())
    }

    /// Returns which packages the seconds of the imports belong to, largest first: each module's own time.
    fn imports(&self) -> anyhow::Result<Vec<(String, f64)>> {
        let mut command = self.command(&self.trainer.join("bin/python"));
        command.args(["-X", "importtime"]).arg(&self.script);
        // Without a model it ends after its imports, with an error that is expected.
        let text = String::from_utf8_lossy(&command.output()?.stderr).into_owned();
        let mut own: BTreeMap<String, f64> = BTreeMap::new();
        for line in text.lines() {
            let Some((micros, module)) = import_line(line) else { continue };
            let package = module.split('.').next().unwrap_or(module);
            *own.entry(package.to_owned()).or_default() += micros / 1e6;
        }
        ensure!(own.contains_key("torch"), "the imports of ms-swift {} could not be read", self.version);
        let all: f64 = own.values().sum();
        let mut largest: Vec<(String, f64)> = own.into_iter().collect();
        largest.sort_by(|a, b| b.1.total_cmp(&a.1));
        largest.truncate(PACKAGES);
        largest.push(("all".to_owned(), all));
        Ok(largest)
    }
}

/// Returns ms-swift's own script for `swift sft`.
pub(crate) fn sft_script(python: &Path) -> anyhow::Result<PathBuf> {
    let find = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let packages = output(Command::new(python).args(["-c", find]))?;
    let script = Path::new(packages.trim()).join("swift/cli/sft.py");
    ensure!(script.is_file(), "{} is not there", script.display());
    Ok(script)
}

/// Returns the versions of what trains, in words.
pub(crate) fn packages(python: &Path) -> anyhow::Result<String> {
    let code = "import sys; from importlib.metadata import version as v; print('ms-swift', v('ms-swift'), 'with \
                transformers', v('transformers') + ', torch', v('torch') + ', Python', sys.version.split()[0])";
    Ok(output(Command::new(python).args(["-c", code]))?.trim().to_owned())
}

/// Returns a module's own microseconds and its name, of a line of `-X importtime`.
fn import_line(line: &str) -> Option<(f64, &str)> {
    let mut fields = line.strip_prefix("import time:")?.split('|');
    let own = fields.next()?.trim().parse().ok()?;
    Some((own, fields.nth(1)?.trim()))
}

/// Returns the machine's load over the last minute.
pub(crate) fn load() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    Ok(text.split(' ').next().unwrap_or_default().parse()?)
}

/// What was measured.
#[derive(Debug, Default)]
struct Rows {
    starts: Vec<(&'static str, &'static str, Vec<f64>)>,
    reruns: Vec<(&'static str, Vec<f64>)>,
    imports: Vec<(&'static str, Vec<(String, f64)>)>,
    packages: Vec<String>,
    loads: Vec<f64>,
}

impl Rows {
    fn page(&self, runs: u32) -> String {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let loads: Vec<String> = self.loads.iter().map(|load| format!("{load:.1}")).collect();
        let mut page = format!(
            "# Start-up, measured\n\nWritten by `cargo xtask startup --runs {runs}` on {}. {}. CPU, {cores} cores, load at the \
             end of each line {}; the demo's tiny Qwen2, LoRA, 8x4 rows, offline, files in the page cache.\n\n## To the first \
             step\n\nSeconds from exec to the end of the first optimizer step; the ways took turns.\n\n| ms-swift | started | \
             runs | median | range |\n| --- | --- | --- | --- | --- |\n",
            today(),
            self.packages.join("; "),
            loads.join(" and "),
        );
        for (version, name, seconds) in &self.starts {
            let _ = writeln!(page, "| {version} | {name} | {}", statistics(seconds));
        }
        page.push_str(
            "\n## To the first step of a rerun\n\nSeconds from the exit of a trainer that ran out of memory in step 4 (8x4) to the \
             end of the first step of its rerun (4x8), through `mhtraind run`: end noticed, cause diagnosed, memory seen to be \
             back, rescue chosen, trainer started, imports, companion's preflight, one step.\n\n| ms-swift | runs | median | \
             range |\n| --- | --- | --- | --- |\n",
        );
        for (version, seconds) in &self.reruns {
            let _ = writeln!(page, "| {version} | {}", statistics(seconds));
        }
        page.push_str(
            "\n## Where the imports go\n\n`python -X importtime`, once, with bytecode: seconds that modules of a package took \
             themselves (the measuring itself adds some).\n\n| ms-swift | packages |\n| --- | --- |\n",
        );
        for (version, packages) in &self.imports {
            let list: Vec<String> =
                packages.iter().map(|(name, seconds)| format!("{name} {seconds:.2}")).collect();
            let _ = writeln!(page, "| {version} | {} |", list.join(", "));
        }
        page
    }
}

/// Returns the cells of count, median and range.
fn statistics(seconds: &[f64]) -> String {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (first, last) = (sorted.first().copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0));
    let middle = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    format!("{} | {middle:.1} | {first:.1} to {last:.1} |", sorted.len())
}

/// Returns the date as `date` says it.
pub(crate) fn today() -> String {
    output(Command::new("date").arg("+%Y-%m-%d"))
        .map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned())
}
