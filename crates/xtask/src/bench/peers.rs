//! The queues that mhtraind is compared with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::ground::{Ground, OUTPUT_MIB, median_of, resident_mib, time, until};
use crate::workspace::cargo;

/// The version of pueue that is measured.
const PUEUE: &str = "4.0.4";

/// Returns where pueue's two programs are, built from its registry where they are missing.
pub(super) fn find_pueue(tools: &Path) -> anyhow::Result<PathBuf> {
    let bin = tools.join("bin");
    if !bin.join("pueued").exists() {
        let mut install = cargo();
        install.args(["install", "--locked", &format!("pueue@{PUEUE}"), "--root"]).arg(tools);
        if !install.env_remove("CARGO_TARGET_DIR").status()?.success() {
            bail!("pueue {PUEUE} cannot be installed");
        }
    }
    Ok(bin)
}

/// Returns task-spooler's program, from the path or from Debian's package; `None` where it cannot be had.
pub(super) fn find_tsp(tools: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("tsp"));
    let unpacked = tools.join("tsp/usr/bin/tsp");
    if let Some(found) = on_path.chain([unpacked.clone()]).find(|path| path.exists()) {
        return Some(found);
    }
    let fetch = "apt-get download task-spooler && dpkg-deb -x task-spooler_*.deb tsp";
    let fetched = Command::new("sh").args(["-c", fetch]).current_dir(tools).stderr(Stdio::null()).status();
    (fetched.is_ok_and(|status| status.success()) && unpacked.exists()).then_some(unpacked)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) struct Pueue<'a> {
    ground: &'a Ground,
    bin: PathBuf,
    daemon: Option<Child>,
    jobs: u32,
}

impl Drop for Pueue<'_> {
    fn drop(&mut self) {
        let _ended_already = self.end();
    }
}

impl<'a> Pueue<'a> {
    pub(super) fn start(ground: &'a Ground, bin: PathBuf) -> anyhow::Result<Pueue<'a>> {
        let dir = ground.dir.join("pueue");
        fs::create_dir(&dir)?;
        let settings = format!(
            "shared:\n  pueue_directory: {0}/state\n  runtime_directory: {0}\n  use_unix_socket: true\n  unix_socket_path: {0}/socket\n",
            dir.display()
        );
        fs::write(dir.join("pueue.yml"), settings)?;
        let mut pueue = Pueue { ground, bin, daemon: None, jobs: 0 };
        pueue.serve()?;
        Ok(pueue)
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join(program));
        // The same small environment as ours: pueue keeps all of it with each task.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", &self.ground.dir).current_dir(&self.ground.dir);
        command.arg("-c").arg(self.ground.dir.join("pueue/pueue.yml")).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        output(&mut self.command("pueue", args))
    }

    pub(super) fn serve(&mut self) -> anyhow::Result<()> {
        let mut serve = self.command("pueued", &[]);
        self.daemon = Some(serve.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        until("pueued", || Ok(self.run(&["status", "--json"]).is_ok()))
    }

    fn end(&mut self) -> anyhow::Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
            // It does not replace what it left itself.
            let _gone_already = fs::remove_file(self.ground.dir.join("pueue/pueue.pid"));
            let _gone_already = fs::remove_file(self.ground.dir.join("pueue/socket"));
        }
        Ok(())
    }

    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        Ok(self.daemon.as_ref().context("pueued runs")?.id())
    }

    pub(super) fn version(&self) -> anyhow::Result<String> {
        Ok(output(Command::new(self.bin.join("pueue")).arg("--version"))?.trim().to_owned())
    }

    fn add(&mut self, mib: Option<u64>) -> anyhow::Result<()> {
        self.jobs += 1;
        let out = self.jobs.to_string();
        fs::create_dir_all(self.ground.dir.join("peers").join(&out))?;
        let mut command = self.ground.command(&out).join(" ");
        if let Some(mib) = mib {
            command = format!("BENCH_MIB={mib} {command}");
        }
        self.run(&["add", "--", &command]).map(drop)
    }

    fn until_quiet(&self) -> anyhow::Result<()> {
        until("pueue's tasks", || {
            let status: Value = serde_json::from_str(&self.run(&["status", "--json"])?)?;
            let tasks = status["tasks"].as_object().context("tasks")?;
            Ok(tasks.values().all(|task| task["status"].get("Done").is_some()))
        })
    }

    pub(super) fn submit_to_exec(&mut self) -> anyhow::Result<Duration> {
        median_of(40, || {
            self.ground.forget();
            let begin = Instant::now();
            self.add(None)?;
            let at = self.ground.next("begin")?;
            self.until_quiet()?;
            Ok(at - begin)
        })
    }

    pub(super) fn drain(&mut self, jobs: u32, slots: u32) -> anyhow::Result<f64> {
        self.ground.forget();
        self.run(&["parallel", &slots.to_string()])?;
        self.run(&["pause"])?;
        for _ in 0..jobs {
            self.add(None)?;
        }
        let begin = Instant::now();
        self.run(&["start"])?;
        for _ in 0..jobs {
            self.ground.next("end")?;
        }
        Ok(f64::from(jobs) / begin.elapsed().as_secs_f64())
    }

    pub(super) fn output(&mut self) -> anyhow::Result<f64> {
        self.ground.forget();
        self.add(Some(OUTPUT_MIB))?;
        let rate = self.ground.output_rate()?;
        self.until_quiet()?;
        Ok(rate)
    }

    /// As [`super::ours::Ours::at_rest`].
    pub(super) fn at_rest(&mut self) -> anyhow::Result<(Duration, Duration, f64)> {
        self.run(&["pause"])?;
        let first = self.jobs;
        let add = median_of(100, || {
            let begin = Instant::now();
            self.add(None)?;
            Ok(begin.elapsed())
        })?;
        let status = median_of(30, || time(|| self.run(&["status", "--json"]).map(drop)))?;
        let resident = resident_mib(self.pid()?)?;
        let mut remove = vec!["remove".to_owned()];
        let state: Value = serde_json::from_str(&self.run(&["status", "--json"])?)?;
        let tasks = state["tasks"].as_object().context("tasks")?;
        let queued = tasks.iter().filter(|(_, task)| task["status"].get("Done").is_none());
        remove.extend(queued.map(|(id, _)| id.clone()));
        self.jobs = first;
        self.run(&remove.iter().map(String::as_str).collect::<Vec<_>>())?;
        self.run(&["start"])?;
        Ok((add, status, resident))
    }

    /// Fills the state with copies of a task that is over.
    pub(super) fn fill(&mut self, tasks: u64) -> anyhow::Result<()> {
        self.end()?;
        let path = self.ground.dir.join("pueue/state/state.json");
        let mut state: Value = serde_json::from_slice(&fs::read(&path)?)?;
        let all = state["tasks"].as_object_mut().context("tasks")?;
        let done = all.values().find(|task| task["status"].get("Done").is_some()).context("a task")?.clone();
        for id in 100_000..100_000 + tasks {
            let mut copy = done.clone();
            copy["id"] = id.into();
            all.insert(id.to_string(), copy);
        }
        fs::write(&path, state.to_string())?;
        self.serve()
    }
}

/// task-spooler. Its queue is in memory: nothing to fill, nothing that is written.
pub(super) struct Tsp<'a> {
    ground: &'a Ground,
    program: PathBuf,
    jobs: u32,
}

impl Drop for Tsp<'_> {
    fn drop(&mut self) {
        let _ended_already = self.run(&["-K"]);
    }
}

impl<'a> Tsp<'a> {
    pub(super) fn start(ground: &'a Ground, program: PathBuf) -> Tsp<'a> {
        Tsp { ground, program, jobs: 0 }
    }

    fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("TS_SOCKET", self.ground.dir.join("tsp.socket")).env("TMPDIR", &self.ground.dir);
        command.env("TS_MAXFINISHED", "10").current_dir(&self.ground.dir);
        output(command.args(args))
    }

    pub(super) fn version(&self) -> anyhow::Result<String> {
        let text = self.run(&["-V"])?;
        let words: Vec<&str> = text.split_whitespace().take(3).collect();
        Ok(words.join(" "))
    }

    fn add(&mut self) -> anyhow::Result<()> {
        self.jobs += 1;
        let out = format!("tsp-{}", self.jobs);
        fs::create_dir_all(self.ground.dir.join("peers").join(&out))?;
        let mut words = vec!["-n".to_owned()];
        words.extend(self.ground.command(&out));
        self.run(&words.iter().map(String::as_str).collect::<Vec<_>>()).map(drop)
    }

    /// Returns the median of an add while a job is running, so that nothing else starts.
    pub(super) fn add_p50(&mut self) -> anyhow::Result<Duration> {
        self.ground.forget();
        self.run(&["-n", "sleep", "3"])?;
        let add = median_of(50, || {
            let begin = Instant::now();
            self.add()?;
            Ok(begin.elapsed())
        })?;
        for _ in 0..50 {
            self.ground.next("end")?;
        }
        Ok(add)
    }

    pub(super) fn submit_to_exec(&mut self) -> anyhow::Result<Duration> {
        median_of(40, || {
            self.ground.forget();
            let begin = Instant::now();
            self.add()?;
            let at = self.ground.next("begin")?;
            self.ground.next("end")?;
            std::thread::sleep(Duration::from_millis(20));
            Ok(at - begin)
        })
    }

    /// Its queue cannot be held back: the adds are part of the time.
    pub(super) fn drain(&mut self, jobs: u32, slots: u32) -> anyhow::Result<f64> {
        self.ground.forget();
        self.run(&["-S", &slots.to_string()])?;
        let begin = Instant::now();
        for _ in 0..jobs {
            self.add()?;
        }
        for _ in 0..jobs {
            self.ground.next("end")?;
        }
        Ok(f64::from(jobs) / begin.elapsed().as_secs_f64())
    }
}
