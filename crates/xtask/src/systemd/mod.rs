//! `cargo xtask systemd`: the Debian package under a real systemd, on a machine that is thrown away.
//!
//! The trainer is `tests/fake-swift`, the card is nvml-sim's; package, units, dpkg, systemd, users and the daemon are
//! real. Every check is a line with its seconds; the first that fails ends the run with a message and the journal.

mod machine;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::package;
use crate::workspace::{cargo, root, run as run_command, target_dir};
use machine::{FILES, Machine};

/// The account of an ordinary user inside.
const USER: &str = "trainee";

/// The steps that every job here has: 320 rows at an effective batch of 32.
const STEPS: u64 = 10;

/// Run the Debian package under a real systemd, in namespaces and on a root in memory
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo -E cargo xtask systemd

Needs root, systemd 250 or later, dpkg and overlayfs. Nothing outside of the target directory is written: systemd boots
on an overlay in memory, after the root of this machine was detached.")]
pub(crate) struct SystemdArgs {
    /// Test this package instead of building one
    #[arg(long, value_name = "FILE")]
    deb: Option<PathBuf>,
}

/// Runs every check.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(args: &SystemdArgs) -> anyhow::Result<()> {
    if let Err(why) = Machine::check_host() {
        bail!("a throw-away machine cannot be had here: {why}");
    }
    let root = root()?;
    let target = target_dir(&root);
    let deb = match &args.deb {
        Some(deb) => deb.clone(),
        None => package::build()?,
    };
    let dir = target.join("systemd").join(format!("mhtraind-machine-{}", std::process::id()));
    let files = dir.with_extension("files");
    stage_files(&root, &target, &deb, &files)?;
    std::fs::create_dir_all(&dir)?;
    let script = root.join("tests/systemd/machine.sh");
    let checked = Checks::start(&script, &dir, &target.join("systemd/machine.log")).and_then(|checks| {
        checks.all().map_err(|error| {
            let journal = checks.machine.run(&["journalctl", "--no-pager", "--output=cat", "--lines=60"]);
            error.context(format!("the last lines of the journal:\n{}", journal.unwrap_or_default()))
        })
    });
    std::fs::remove_dir_all(&files)?;
    std::fs::remove_dir(&dir)?;
    checked?;
    println!("everything holds");
    Ok(())
}

/// Lays out what the machine is given: the package, a card, a model, rows and the source of the trainer.
fn stage_files(root: &Path, target: &Path, deb: &Path, files: &Path) -> anyhow::Result<()> {
    run_command(cargo().args(["build", "--package", "nvml-sim"]).current_dir(root))?;
    std::fs::create_dir_all(files.join("model"))?;
    std::fs::copy(deb, files.join("mhtraind.deb"))
        .with_context(|| format!("no package {}", deb.display()))?;
    std::fs::copy(target.join("debug/libnvml_sim.so"), files.join("libnvml_sim.so"))?;
    std::fs::copy(root.join("tests/fake-swift/fake_swift.py"), files.join("fake_swift.py"))?;
    std::fs::copy(root.join("tests/systemd/trainer.py"), files.join("trainer.py"))?;
    let card = json!({"uuid": "GPU-00000000-0000-4000-8000-000000000001", "name": "Simulated GPU",
        "total": 80_u64 << 30, "reserved": 0, "used": 0, "compute_capability": "8.0", "compute_mode": "default",
        "unified": false, "processes": []});
    let cards =
        json!({"version": 1, "driver_version": "570.00.00", "cuda_version": 12080, "devices": [card]});
    std::fs::write(files.join("nvml.json"), cards.to_string())?;
    let model = json!({"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936,
        "tie_word_embeddings": true});
    std::fs::write(files.join("model/config.json"), model.to_string())?;
    let row = |n| format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"<id {n:04}>\"}}]}}\n");
    std::fs::write(files.join("train.jsonl"), (0..32 * STEPS).map(row).collect::<String>())?;
    Ok(())
}

/// A job that was handed in.
struct Job {
    id: String,
    output_dir: String,
}

/// A job whose trainer has trained a step and does not end before it is released.
struct Running {
    job: Job,
    /// Its pid inside.
    trainer: String,
}

struct Checks {
    machine: Machine,
    token: String,
    token_sha256: String,
}

impl Checks {
    fn start(script: &Path, dir: &Path, log: &Path) -> anyhow::Result<Checks> {
        let began = Instant::now();
        Machine::check_isolation(script, dir)?;
        report("what is written inside stays inside", began);
        let began = Instant::now();
        let machine = Machine::boot(script, dir, log)?;
        report(&format!("{} boots", version(&machine)?), began);
        // The token is different each time: a file of an earlier run cannot be taken for a leak.
        let token = format!("canary-{}-{:x}", std::process::id(), began_at().as_nanos());
        let mut checks = Checks { machine, token, token_sha256: String::new() };
        checks.prepare()?;
        Ok(checks)
    }

    fn all(&self) -> anyhow::Result<()> {
        self.check("dpkg -i installs, enables and starts the service", || self.install())?;
        self.check("start returns when the daemon answers", || self.start_is_ready())?;
        self.check("the status line counts jobs", || self.status_line())?;
        self.check("restart under a running trainer", || {
            self.survives(|_| self.machine.run(&["systemctl", "restart", "mhtraind"]).map(drop))
        })?;
        self.check("a hang ends by the watchdog, under a running trainer", || {
            self.survives(|_| self.hang())
        })?;
        self.check("stop, and the trainer ends without a daemon", || {
            self.survives(|running| self.stop_until_it_ends(running))
        })?;
        self.check("an upgrade by dpkg -i under a running trainer", || self.survives(|_| self.upgrade()))?;
        self.check("removed and installed again under a running trainer", || {
            self.survives(|running| self.remove_and_install(running))
        })?;
        self.check("the token is in the trainer's environment alone", || self.token_is_nowhere_else())?;
        self.check("the host's daemon runs a job as the user who handed it in", || self.job_of_a_user())?;
        self.check("a user's own daemon, under the user's service manager", || self.user_manager())?;
        self.check("a purge refuses under a trainer, and keeps what jobs made", || self.purge())?;
        Ok(())
    }

    fn check(&self, what: &str, check: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let began = Instant::now();
        check().with_context(|| format!("FAILED: {what}"))?;
        report(what, began);
        Ok(())
    }

    /// Makes what a site has before it installs: an account, a trainer, settings, a token.
    fn prepare(&mut self) -> anyhow::Result<()> {
        let machine = &self.machine;
        machine.run(&["useradd", "--create-home", USER])?;
        self.make_trainer()?;
        machine.write(
            "/etc/mhtraind/mhtraind.toml",
            &format!(
                "[nvml]\nlibrary = \"{FILES}/libnvml_sim.so\"\n[trainer]\ncommand = [\"{FILES}/trainer/bin/swift\", \"sft\"]\n\
                 [attempt]\ngrace_s = 2\n"
            ),
        )?;
        let credential = "/etc/mhtraind/credentials/SWANLAB_API_KEY";
        machine.write(credential, &self.token)?;
        machine.run(&["chmod", "-R", "go=", "/etc/mhtraind/credentials"])?;
        let card = format!("[Service]\nEnvironment=NVML_SIM_FILE={FILES}/nvml.json\nWatchdogSec=3\n");
        let unit = format!("{card}LoadCredential=SWANLAB_API_KEY:{credential}\n");
        machine.write("/etc/systemd/system/mhtraind.service.d/test.conf", &unit)?;
        machine.write(&format!("/home/{USER}/.config/systemd/user/mhtraind.service.d/test.conf"), &card)?;
        machine.run(&["chown", "-R", USER, &format!("/home/{USER}")])?;
        let sum = machine.run(&["sha256sum", credential])?;
        self.token_sha256 = sum.split(' ').next().unwrap_or_default().to_owned();
        Ok(())
    }

    /// Makes an environment that looks as if ms-swift were in it.
    fn make_trainer(&self) -> anyhow::Result<()> {
        let machine = &self.machine;
        let venv = format!("{FILES}/trainer");
        machine.run(&["/usr/bin/python3", "-m", "venv", "--without-pip", &venv])?;
        let site = machine.run(&["sh", "-c", &format!("echo {venv}/lib/python3.*/site-packages")])?;
        for (name, version) in
            [("ms_swift", "4.6.0"), ("torch", "2.15.0"), ("transformers", "5.19.0"), ("peft", "0.20.0")]
        {
            let text =
                format!("Metadata-Version: 2.1\nName: {}\nVersion: {version}\n", name.replace('_', "-"));
            machine.write(&format!("{site}/{name}-{version}.dist-info/METADATA"), &text)?;
        }
        machine.write(&format!("{site}/swift/__init__.py"), "")?;
        machine.run(&["mkdir", &format!("{site}/swift/cli")])?;
        machine.run(&["cp", &format!("{FILES}/trainer.py"), &format!("{site}/swift/cli/sft.py")])?;
        machine.write(&format!("{venv}/bin/swift"), &format!("#!{venv}/bin/python\n"))?;
        machine.run(&["chmod", "755", &format!("{venv}/bin/swift")])?;
        Ok(())
    }

    fn install(&self) -> anyhow::Result<()> {
        self.machine.run(&["dpkg", "-i", &format!("{FILES}/mhtraind.deb")])?;
        ensure!(self.property("ActiveState")? == "active", "the service does not run");
        let enabled = self.machine.run(&["systemctl", "is-enabled", "mhtraind"])?;
        ensure!(enabled == "enabled", "the service is {enabled}");
        self.machine.run(&["mhtraind", "status"])?;
        let listed = self.machine.run(&["dpkg", "-L", "mhtraind"])?;
        for file in
            ["man1/mhtraind-submit.1.gz", "completions/mhtraind", "_mhtraind", "user/mhtraind.service"]
        {
            ensure!(listed.contains(file), "the package has no {file}");
        }
        Ok(())
    }

    fn start_is_ready(&self) -> anyhow::Result<()> {
        self.machine.run(&["systemctl", "stop", "mhtraind"])?;
        let began = Instant::now();
        self.machine.run(&["systemctl", "start", "mhtraind"])?;
        // Only once: whoever has to try again was told too early.
        self.machine.run(&["mhtraind", "status"])?;
        ensure!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
        Ok(())
    }

    fn status_line(&self) -> anyhow::Result<()> {
        self.wait_for_status("0 running, 0 waiting")?;
        let jobs = [self.submit()?, self.submit()?];
        self.wait_for_status("1 running, 1 waiting")?;
        for job in &jobs {
            self.release(job)?;
            self.succeeds(job)?;
        }
        self.wait_for_status("0 running, 0 waiting")
    }

    fn wait_for_status(&self, wanted: &str) -> anyhow::Result<()> {
        wait_until(&format!("StatusText={wanted}"), || Ok(self.property("StatusText")? == wanted))
    }

    /// Hands a job in, does something to the daemon while it trains, and asserts that the trainer did not notice.
    fn survives(&self, act: impl FnOnce(&Running) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let daemon = self.property("MainPID")?;
        let running = self.start_job()?;
        act(&running)?;
        ensure!(self.property("ActiveState")? == "active", "the service does not run");
        ensure!(self.property("MainPID")? != daemon, "it is still the same daemon");
        self.release(&running.job)?;
        self.succeeds(&running.job)
    }

    /// Hands a job in and waits until it has trained a step.
    fn start_job(&self) -> anyhow::Result<Running> {
        let job = self.submit()?;
        wait_until("a step", || Ok(!self.steps(&job).is_empty()))?;
        let record =
            self.machine.read(&format!("/var/lib/mhtraind/jobs/{}/attempt-1/trainer.json", job.id))?;
        let record: Value = serde_json::from_str(&record)?;
        Ok(Running { job, trainer: record["pid"].to_string() })
    }

    /// Lets the trainer of a job end.
    fn release(&self, job: &Job) -> anyhow::Result<()> {
        let file = self.machine.path(&format!("{}/attempt-1/RELEASED", job.output_dir));
        wait_until("the attempt's directory", || Ok(std::fs::write(&file, "").is_ok()))
    }

    fn hang(&self) -> anyhow::Result<()> {
        let before: u32 = self.property("NRestarts")?.parse()?;
        let daemon = self.property("MainPID")?;
        self.machine.run(&["kill", "-STOP", &daemon])?;
        wait_until("the watchdog to start it again", || {
            let restarts: u32 = self.property("NRestarts")?.parse()?;
            Ok(restarts == before + 1 && self.property("ActiveState")? == "active")
        })?;
        let journal = self.machine.run(&["journalctl", "--unit=mhtraind", "--no-pager", "--output=cat"])?;
        ensure!(journal.contains("Watchdog timeout"), "it was not the watchdog");
        Ok(())
    }

    fn stop_until_it_ends(&self, running: &Running) -> anyhow::Result<()> {
        self.machine.run(&["systemctl", "stop", "mhtraind"])?;
        ensure!(self.property("ActiveState")? == "inactive", "the service still runs");
        ensure!(self.lives(running), "the trainer went with the daemon");
        self.release(&running.job)?;
        wait_until("the trainer's end", || Ok(!self.lives(running)))?;
        self.machine.run(&["systemctl", "start", "mhtraind"]).map(drop)
    }

    fn upgrade(&self) -> anyhow::Result<()> {
        self.machine.run(&["dpkg", "-i", &format!("{FILES}/mhtraind.deb")]).map(drop)
    }

    fn token_is_nowhere_else(&self) -> anyhow::Result<()> {
        let running = self.start_job()?;
        let holds = |pid: &str, file: &str| {
            let bytes = std::fs::read(self.machine.path(&format!("/proc/{pid}/{file}"))).unwrap_or_default();
            String::from_utf8_lossy(&bytes).contains(&self.token)
        };
        ensure!(holds(&running.trainer, "environ"), "the trainer does not have it");
        ensure!(!holds(&self.property("MainPID")?, "environ"), "the daemon has it in its environment");
        for entry in std::fs::read_dir(self.machine.path("/proc"))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            ensure!(!holds(&name, "cmdline"), "process {name} has it among its arguments");
        }
        self.release(&running.job)?;
        self.succeeds(&running.job)?;
        // The pattern comes from the file, so that the search itself does not have it among its arguments.
        let pattern = "grep --fixed-strings --file=/etc/mhtraind/credentials/SWANLAB_API_KEY";
        for place in [
            format!(
                "{pattern} --recursive --files-with-matches /var/lib/mhtraind /run/mhtraind /tmp /srv/results /var/log"
            ),
            format!("journalctl --no-pager --output=export | {pattern}"),
        ] {
            let found = self.machine.try_run(&["sh", "-c", &place])?;
            let text = String::from_utf8_lossy(&found.stdout);
            ensure!(found.status.code() == Some(1), "the token is found by: {place}\n{text}");
        }
        Ok(())
    }

    fn job_of_a_user(&self) -> anyhow::Result<()> {
        use std::os::unix::fs::MetadataExt;
        let host = ["env", "MHTRAIND_SOCKET=/run/mhtraind/mhtraind.sock"];
        let job = self.submit_as_user(&host, "shared")?;
        wait_until("a step", || Ok(!self.steps(&job).is_empty()))?;
        self.machine.run(&["systemctl", "restart", "mhtraind"])?;
        self.release(&job)?;
        self.as_user(&[&host[..], &["mhtraind", "wait", &job.id, "--timeout", "60"]].concat())?;
        self.trained_once(&job)?;
        let (uid, seen) = (self.uid()?, self.seen(&job)?);
        ensure!(seen["uid"] == json!(uid), "the trainer ran as somebody else: {seen}");
        for made in ["", "/receipt.json", "/attempt-1"] {
            let path = format!("{}{made}", job.output_dir);
            let owner = std::fs::metadata(self.machine.path(&path))?.uid();
            ensure!(owner == uid, "{path} belongs to user {owner}");
        }
        Ok(())
    }

    fn user_manager(&self) -> anyhow::Result<()> {
        let uid = self.uid()?;
        self.machine.run(&["loginctl", "enable-linger", USER])?;
        wait_until("the user's service manager", || {
            Ok(self.machine.path(&format!("/run/user/{uid}/systemd/private")).exists())
        })?;
        self.as_user(&["systemctl", "--user", "daemon-reload"])?;
        self.as_user(&["systemctl", "--user", "start", "mhtraind"])?;
        let job = self.submit_as_user(&[], "own")?;
        wait_until("a step", || Ok(!self.steps(&job).is_empty()))?;
        self.as_user(&["systemctl", "--user", "restart", "mhtraind"])?;
        self.release(&job)?;
        self.as_user(&["mhtraind", "wait", &job.id, "--timeout", "60"])?;
        self.trained_once(&job)?;
        let seen = self.seen(&job)?;
        ensure!(seen["uid"] == json!(uid), "the trainer ran as somebody else: {seen}");
        self.as_user(&["systemctl", "--user", "stop", "mhtraind"]).map(drop)
    }

    fn uid(&self) -> anyhow::Result<u32> {
        Ok(self.machine.run(&["id", "-u", USER])?.parse()?)
    }

    /// Runs a command as the ordinary user, as in a session of theirs.
    fn as_user(&self, words: &[&str]) -> anyhow::Result<String> {
        let runtime = format!("XDG_RUNTIME_DIR=/run/user/{}", self.uid()?);
        let home = format!("HOME=/home/{USER}");
        self.machine.run(&[&["runuser", "-u", USER, "--", "env", &runtime, &home], words].concat())
    }

    /// Hands a job of the ordinary user in, by a command that begins with `to`; its output directory is in the user's home.
    fn submit_as_user(&self, to: &[&str], output_dir: &str) -> anyhow::Result<Job> {
        let output_dir = format!("/home/{USER}/{output_dir}");
        let file = format!("/home/{USER}/job.json");
        self.machine.write(&file, &job_spec(&output_dir, &[], "").to_string())?;
        let id = self.as_user(&[to, &["mhtraind", "submit", &file]].concat())?;
        Ok(Job { id, output_dir })
    }

    fn remove_and_install(&self, running: &Running) -> anyhow::Result<()> {
        self.machine.run(&["dpkg", "--remove", "mhtraind"])?;
        ensure!(self.property("ActiveState")? == "inactive", "the service still runs");
        ensure!(self.lives(running), "the trainer went with the package");
        self.upgrade()
    }

    fn purge(&self) -> anyhow::Result<()> {
        let running = self.start_job()?;
        let purge = self.machine.try_run(&["dpkg", "--purge", "mhtraind"])?;
        let said = String::from_utf8_lossy(&purge.stderr).into_owned();
        ensure!(!purge.status.success() && said.contains("still runs"), "the purge did not refuse: {said}");
        ensure!(self.lives(&running), "the trainer went with the package");
        ensure!(self.machine.path("/var/lib/mhtraind/jobs").exists(), "the state is gone under the trainer");
        self.release(&running.job)?;
        wait_until("the trainer's end", || Ok(!self.lives(&running)))?;
        self.trained_once(&running.job)?;
        wait_until("the purge", || {
            Ok(self.machine.try_run(&["dpkg", "--purge", "mhtraind"])?.status.success())
        })?;
        for gone in ["/var/lib/mhtraind", "/etc/mhtraind", "/run/mhtraind", "/usr/bin/mhtraind"] {
            ensure!(!self.machine.path(gone).exists(), "{gone} is still there");
        }
        ensure!(!self.steps(&running.job).is_empty(), "what the job made is gone");
        let kept = format!("/home/{USER}/own/receipt.json");
        ensure!(self.machine.path(&kept).exists(), "{kept} is gone");
        Ok(())
    }

    /// Hands a job in that names the token; each has an output directory of its own.
    fn submit(&self) -> anyhow::Result<Job> {
        let output_dir = format!("/srv/results/{:x}", began_at().as_nanos());
        let spec = job_spec(&output_dir, &["SWANLAB_API_KEY"], &self.token_sha256);
        self.machine.write("/srv/job.json", &spec.to_string())?;
        let id = self.machine.run(&["mhtraind", "submit", "/srv/job.json"])?;
        Ok(Job { id, output_dir })
    }

    /// Asserts that the job was proven, and that its trainer kept its files and got its token.
    fn succeeds(&self, job: &Job) -> anyhow::Result<()> {
        self.machine.run(&["mhtraind", "wait", &job.id, "--timeout", "120"])?;
        let status = self.machine.run(&["mhtraind", "status", &job.id, "--json"])?;
        let status: Value = serde_json::from_str(&status)?;
        let view = &status["jobs"][0];
        ensure!(view["state"] == "succeeded" && view["attempt"] == 1, "it was not one attempt: {view}");
        self.trained_once(job)?;
        let seen = self.seen(job)?;
        ensure!(seen["token_is_expected"] == true, "the trainer got another token, or none: {seen}");
        let held = seen["held"].as_object().context("what it held")?;
        ensure!(
            held.len() == 2 && held.values().all(|kept| *kept == true),
            "files vanished under it: {seen}"
        );
        Ok(())
    }

    fn trained_once(&self, job: &Job) -> anyhow::Result<()> {
        let steps = self.steps(job);
        ensure!(steps == (1..=STEPS).collect::<Vec<_>>(), "not every step was trained once: {steps:?}");
        Ok(())
    }

    fn steps(&self, job: &Job) -> Vec<u64> {
        let text =
            self.machine.read(&format!("{}/attempt-1/fake-rows.jsonl", job.output_dir)).unwrap_or_default();
        let step = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
        text.lines().filter_map(step).collect()
    }

    /// Returns what the trainer wrote down at its end.
    fn seen(&self, job: &Job) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.machine.read(&format!("{}/attempt-1/seen.json", job.output_dir))?)?)
    }

    fn lives(&self, running: &Running) -> bool {
        self.machine.path(&format!("/proc/{}", running.trainer)).exists()
    }

    fn property(&self, name: &str) -> anyhow::Result<String> {
        self.machine.run(&["systemctl", "show", "mhtraind", "--value", "--property", name])
    }
}

fn job_spec(output_dir: &str, secrets: &[&str], sha256: &str) -> Value {
    let scenario = json!({"step_seconds": 0.1}).to_string();
    json!({"model": format!("{FILES}/model"), "dataset": format!("{FILES}/train.jsonl"), "output_dir": output_dir,
        "secrets": secrets, "env": {"FAKE_SWIFT_SCENARIO": scenario, "EXPECTED_SHA256": sha256},
        "args": {"save_steps": 3, "logging_steps": 1, "num_train_epochs": 1}})
}

fn version(machine: &Machine) -> anyhow::Result<String> {
    let text = machine.run(&["systemctl", "--version"])?;
    Ok(text.split(" (").next().unwrap_or_default().to_owned())
}

fn began_at() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// Waits for a condition, at most a minute.
fn wait_until(what: &str, mut condition: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while !condition()? {
        if Instant::now() >= until {
            bail!("waited a minute for {what}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
fn report(what: &str, began: Instant) {
    println!("ok  {what:<62} {:>6.2} s", began.elapsed().as_secs_f64());
}
