//! mhtraind under measurement.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mhtrain_store::{Filter, JobId, NewJob, Owner, Store};
use nvml_sim::{SimDevice, SimFile};
use serde_json::{Value, json};

use super::ground::{Ground, median_of, resident_mib, time, until};

const CARD_BYTES: u64 = 80 << 30;

pub(super) struct Ours<'a> {
    ground: &'a Ground,
    binary: PathBuf,
    library: PathBuf,
    daemon: Option<Child>,
    jobs: u32,
}

impl Drop for Ours<'_> {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ended_already = daemon.kill();
            let _reaped = daemon.wait();
        }
    }
}

impl<'a> Ours<'a> {
    pub(super) fn start(ground: &'a Ground, target: &Path) -> anyhow::Result<Ours<'a>> {
        let dir = &ground.dir;
        let settings = format!("[trainer]\ncommand = [{:?}, \"sft\"]\n", dir.join("trainer/bin/swift"));
        std::fs::write(dir.join("mhtraind.toml"), settings)?;
        let built = target.join("dist");
        let library = built.join(nvml_sim::LIBRARY_FILE);
        let mut ours = Ours { ground, binary: built.join("mhtraind"), library, daemon: None, jobs: 0 };
        ours.hold(8, 0)?;
        ours.serve()?;
        Ok(ours)
    }

    /// Starts the daemon and returns how long it took until it served.
    pub(super) fn serve(&mut self) -> anyhow::Result<Duration> {
        let log = File::options().append(true).create(true).open(self.ground.dir.join("daemon.log"))?;
        let begin = Instant::now();
        let mut serve = self.command(&["serve"]);
        self.daemon = Some(serve.stdout(Stdio::null()).stderr(log).spawn()?);
        until("the daemon", || Ok(UnixStream::connect(self.socket()).is_ok()))?;
        Ok(begin.elapsed())
    }

    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
        }
        Ok(())
    }

    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        Ok(self.daemon.as_ref().context("the daemon runs")?.id())
    }

    fn socket(&self) -> PathBuf {
        self.ground.dir.join("daemon.sock")
    }

    fn command(&self, args: &[&str]) -> Command {
        let dir = &self.ground.dir;
        let mut command = Command::new(&self.binary);
        command.args(args).current_dir(dir).env_clear().stdin(Stdio::null());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", dir);
        command
            .env("MHTRAIND_NVML_LIBRARY", &self.library)
            .env(nvml_sim::FILE_VARIABLE, dir.join("nvml.json"));
        command.env("MHTRAIND_CONFIG", dir.join("mhtraind.toml")).env("MHTRAIND_SOCKET", self.socket());
        command.env("MHTRAIND_STATE_DIR", dir.join("state"));
        command
    }

    pub(super) fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.command(args).output()?;
        if !output.status.success() {
            bail!("mhtraind {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(super) fn version(&self) -> anyhow::Result<String> {
        Ok(self.run(&["--version"])?.trim().to_owned())
    }

    /// Makes so many cards, each with so much of it held by somebody else.
    pub(super) fn hold(&self, cards: u32, bytes: u64) -> anyhow::Result<()> {
        let card = |n| {
            let uuid = format!("GPU-00000000-0000-4000-8000-{n:012}");
            let mut card = SimDevice::idle(&uuid, "Simulated GPU", CARD_BYTES, "8.0");
            card.used = bytes;
            card
        };
        let file = SimFile::new((0..cards).map(card).collect());
        Ok(file.write_atomically(&self.ground.dir.join("nvml.json"))?)
    }

    fn job(&mut self, extra: &Value) -> Value {
        self.jobs += 1;
        let mut job = json!({"model": "./model", "dataset": "train.jsonl", "output_dir": format!("out/{}", self.jobs),
            "args": {"save_steps": 10, "logging_steps": 10, "num_train_epochs": 1}});
        for (key, value) in extra.as_object().into_iter().flatten() {
            job[key] = value.clone();
        }
        job
    }

    /// Submits a job as a user does, by the command.
    pub(super) fn submit(&mut self, extra: &Value) -> anyhow::Result<String> {
        let job = self.job(extra);
        let path = self.ground.dir.join("job.json");
        std::fs::write(&path, job.to_string())?;
        Ok(self.run(&["submit", "job.json"])?.trim().to_owned())
    }

    /// Submits a job over the socket, for measurements that are not about the command.
    pub(super) fn post(&mut self) -> anyhow::Result<()> {
        let job = self.job(&json!({}));
        let body = json!({"job": job, "cwd": self.ground.dir, "umask": 18}).to_string();
        let mut stream = UnixStream::connect(self.socket())?;
        let head = format!("POST /v1/jobs HTTP/1.0\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if !answer.contains(" 201 ") {
            bail!("a submit was answered by {answer}");
        }
        Ok(())
    }

    /// Returns how many jobs are in one of these states, a thousand at most.
    fn count(&self, states: &str) -> anyhow::Result<usize> {
        let page: Value =
            serde_json::from_str(&self.run(&["status", "--json", "--limit", "1000", "--state", states])?)?;
        Ok(page["jobs"].as_array().map_or(0, Vec::len))
    }

    pub(super) fn until_quiet(&self) -> anyhow::Result<()> {
        until("every job to be over", || Ok(self.count("queued,waiting,starting,running,recovering")? == 0))?;
        match self.count("failed")? {
            0 => Ok(()),
            failed => {
                bail!("{failed} jobs failed: {}", self.run(&["status", "--state", "failed", "--limit", "1"])?)
            }
        }
    }

    /// Returns the time from the begin of a submit until the job's command is executed.
    pub(super) fn submit_to_exec(&mut self) -> anyhow::Result<Duration> {
        median_of(40, || {
            self.ground.forget();
            let begin = Instant::now();
            self.submit(&json!({}))?;
            let at = self.ground.next("begin")?;
            self.until_quiet()?;
            Ok(at - begin)
        })
    }

    /// Returns the time from a neighbour's memory coming back until the job that waits for it is executed.
    pub(super) fn memory_to_exec(&mut self) -> anyhow::Result<Duration> {
        let all_but_one_gib = CARD_BYTES - (1 << 30);
        let spent = median_of(20, || {
            self.ground.forget();
            self.hold(1, all_but_one_gib)?;
            self.submit(&json!({}))?;
            until("the job to wait", || Ok(self.count("waiting")? == 1))?;
            // At no particular moment of whatever period there is.
            std::thread::sleep(Duration::from_millis(137));
            self.hold(1, 0)?;
            let begin = Instant::now();
            let at = self.ground.next("begin")?;
            self.until_quiet()?;
            Ok(at - begin)
        });
        self.hold(8, 0)?;
        spent
    }

    /// Returns how many jobs a second are worked off that stand in the queue already.
    pub(super) fn drain(&mut self, jobs: u32, cards: u32) -> anyhow::Result<f64> {
        self.ground.forget();
        self.hold(cards, 0)?;
        self.run(&["drain"])?;
        for _ in 0..jobs {
            self.post()?;
        }
        let begin = Instant::now();
        self.run(&["undrain"])?;
        for _ in 0..jobs {
            self.ground.next("end")?;
        }
        self.until_quiet()?;
        Ok(f64::from(jobs) / begin.elapsed().as_secs_f64())
    }

    /// Returns the rate of a job's output.
    pub(super) fn output(&mut self) -> anyhow::Result<f64> {
        self.ground.forget();
        self.submit(&json!({"env": {"BENCH_MIB": super::ground::OUTPUT_MIB.to_string()}}))?;
        let rate = self.ground.output_rate()?;
        self.until_quiet()?;
        Ok(rate)
    }

    /// Returns the medians of a submit and of a status, and what the daemon has resident after them, with nothing started.
    pub(super) fn at_rest(&mut self) -> anyhow::Result<(Duration, Duration, f64)> {
        self.run(&["drain"])?;
        let mut ids = Vec::new();
        let add = median_of(100, || {
            let begin = Instant::now();
            ids.push(self.submit(&json!({}))?);
            Ok(begin.elapsed())
        })?;
        let status = median_of(30, || time(|| self.run(&["status", "--json"]).map(drop)))?;
        let resident = resident_mib(self.pid()?)?;
        let mut cancel = vec!["cancel"];
        cancel.extend(ids.iter().map(String::as_str));
        self.run(&cancel)?;
        self.run(&["undrain"])?;
        Ok((add, status, resident))
    }

    /// Fills the store with copies of a job that is over, as they would be there after a year. The daemon must not run.
    pub(super) fn fill(&self, jobs: usize) -> anyhow::Result<()> {
        let mut store = Store::open(&self.ground.dir.join("state"))?;
        let first =
            store.jobs(&Filter { states: vec!["succeeded".to_owned()], limit: 1, ..Filter::default() })?;
        let id = first.first().context("a job that is over")?.id;
        let (job, events) = (store.job(id)?, store.events(id)?);
        let owner = Owner { name: job.row.owner.name.clone(), ..job.row.owner };
        let new = NewJob {
            owner,
            key: None,
            record: events[0].clone(),
            name: job.row.name.clone(),
            priority: 0,
            context: job.context,
        };
        let copies: Vec<JobId> =
            (0..jobs).map(|_| Ok(store.submit(&new)?.id)).collect::<anyhow::Result<_>>()?;
        for some in copies.chunks(100) {
            let batch: Vec<_> =
                some.iter().flat_map(|id| events[1..].iter().map(|event| (*id, event.clone()))).collect();
            for written in store.append_all(&batch)? {
                written?;
            }
        }
        Ok(())
    }
}
