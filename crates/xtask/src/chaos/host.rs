//! What runs on the host of the trials, and how is it reached and killed?
//!
//! Everything is real but cards and training: the daemon of this checkout, its recorders and clients as processes, cards
//! of nvml-sim, and fake-swift for ms-swift.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nvml_sim::{SimDevice, SimFile};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::foreground::ID;
use super::verdict::{Found, Testimony};
use crate::fake_host::{make_model_and_data, make_trainer};

/// Cards of the host.
const CARDS: u32 = 4;

/// Seconds between SIGTERM and SIGKILL when a job is cancelled.
pub(super) const GRACE_S: u32 = 1;

/// How long a daemon may take until it serves.
const SERVES_WITHIN: Duration = Duration::from_secs(20);

/// Most jobs that the daemon lists at once.
const PAGE: &str = "1000";

/// How long a client may take that has a daemon.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

/// A directory with everything that the daemon of the trials reads and writes.
pub(super) struct Host {
    dir: PathBuf,
    /// Where the trainer's environment is: several hosts share one.
    trainer: PathBuf,
    binary: PathBuf,
    library: PathBuf,
    /// Where the points of a kill are noted, for those who want them.
    failpoints: Option<PathBuf>,
    /// Whose the clients are, where that is not whoever runs this.
    user: Option<(u32, u32)>,
}

/// An account of this host that is there for some trials.
pub(super) struct User {
    name: String,
    uid: u32,
    gid: u32,
}

impl Drop for User {
    fn drop(&mut self) {
        // By force: a trial that failed may have left a process of theirs.
        let _reported_by_nobody = Command::new("userdel").arg("--force").arg(&self.name).output();
    }
}

impl User {
    /// Makes an account with a home below `dir`; `None` where that is not possible.
    pub(super) fn make(dir: &Path) -> anyhow::Result<Option<User>> {
        let is_root = rustix::process::geteuid().is_root();
        if !is_root || Command::new("useradd").arg("--help").output().is_err() {
            return Ok(None);
        }
        let (name, home) = (format!("mhtchaos{}", std::process::id()), dir.join("home"));
        let mut add = Command::new("useradd");
        add.args(["--no-create-home", "--user-group", "--shell", "/bin/sh", "--home-dir"]);
        let made = add.arg(&home).arg(&name).output()?;
        if !made.status.success() {
            bail!("no account: {}", String::from_utf8_lossy(&made.stderr));
        }
        let mut user = User { name, uid: 0, gid: 0 };
        let id = |flag: &str| -> anyhow::Result<u32> {
            let said = Command::new("id").args([flag, &user.name]).output()?.stdout;
            Ok(String::from_utf8(said)?.trim().parse()?)
        };
        (user.uid, user.gid) = (id("-u")?, id("-g")?);
        fs::create_dir(&home)?;
        chown(&home, Some(user.uid), Some(user.gid))?;
        Ok(Some(user))
    }
}

/// What a client was told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The daemon took it: a job's id, or nothing to say.
    Acknowledged(Option<u64>),
    /// Nobody was there to answer, or the client was killed: it may or may not have been heard.
    Unknown,
    /// The daemon refused.
    Refused(String),
}

impl Host {
    pub(super) fn make(dir: &Path, target: &Path, root: &Path) -> anyhow::Result<Host> {
        let host = Host {
            dir: dir.to_owned(),
            trainer: dir.join("trainer"),
            binary: target.join("debug/mhtraind"),
            library: target.join("debug").join(nvml_sim::LIBRARY_FILE),
            failpoints: None,
            user: None,
        };
        let sft = root.join("tests/fake-swift/fake_swift.py");
        make_trainer(&host.trainer, &sft, "4.6.0", "5.19.0").context("no trainer environment")?;
        host.furnish(CARDS)?;
        Ok(host)
    }

    /// Makes another host with the same trainer, whose processes note their [points](mhtrain_failpoint).
    pub(super) fn beside(&self, dir: &Path, cards: u32) -> anyhow::Result<Host> {
        let host = Host {
            dir: dir.to_owned(),
            trainer: self.trainer.clone(),
            binary: self.binary.clone(),
            library: self.library.clone(),
            failpoints: Some(dir.join("failpoints")),
            user: self.user,
        };
        let failpoints = dir.join("failpoints");
        fs::create_dir_all(&failpoints)?;
        fs::write(failpoints.join("trace"), "")?;
        host.furnish(cards)?;
        if let Some((uid, gid)) = self.user {
            // Recorders of theirs note their points and kills as well.
            fs::write(failpoints.join("killed"), "")?;
            for (path, mode) in [("", 0o777), ("trace", 0o666), ("killed", 0o666)] {
                fs::set_permissions(failpoints.join(path), fs::Permissions::from_mode(mode))?;
            }
            fs::create_dir(dir.join("out"))?;
            for path in ["out", "witness"] {
                chown(dir.join(path), Some(uid), Some(gid))?;
            }
        }
        Ok(host)
    }

    /// Lets the clients be another user's, who may execute what is needed for that.
    pub(super) fn open_to(mut self, user: &User) -> anyhow::Result<Host> {
        fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o755))?;
        let binary = self.dir.join("mhtraind");
        // Where this is built may be closed to others.
        fs::copy(&self.binary, &binary)?;
        self.binary = binary;
        let python = self.trainer.join("bin/python");
        let works = |python: &Path| {
            let mut try_it = Command::new(python);
            try_it.args(["-c", "import json"]).current_dir("/").uid(user.uid).gid(user.gid);
            try_it.output().is_ok_and(|output| output.status.success())
        };
        if !works(&python) {
            fs::remove_file(&python)?;
            symlink("/usr/bin/python3", &python)?;
        }
        self.user = Some((user.uid, user.gid));
        Ok(self)
    }

    fn furnish(&self, cards: u32) -> anyhow::Result<()> {
        let dir = &self.dir;
        let card = |n| {
            SimDevice::idle(&format!("GPU-00000000-0000-4000-8000-{n:012}"), "Simulated GPU", 80 << 30, "8.0")
        };
        SimFile::new((0..cards).map(card).collect()).write_atomically(&dir.join("nvml.json"))?;
        make_model_and_data(dir)?;
        fs::create_dir(dir.join("witness"))?;
        let swift = self.trainer.join("bin/swift");
        let settings = format!("[trainer]\ncommand = [{swift:?}, \"sft\"]\n[attempt]\ngrace_s = {GRACE_S}\n");
        Ok(fs::write(dir.join("mhtraind.toml"), settings)?)
    }

    pub(super) fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).current_dir(&self.dir).env_clear().stdin(Stdio::null());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", &self.dir).env("LC_ALL", "C.UTF-8");
        command.env("MHTRAIND_NVML_LIBRARY", &self.library);
        command.env(nvml_sim::FILE_VARIABLE, self.dir.join("nvml.json"));
        command.env("MHTRAIND_CONFIG", self.dir.join("mhtraind.toml"));
        command.env("MHTRAIND_SOCKET", self.socket());
        command.env("MHTRAIND_STATE_DIR", self.state_dir());
        if let Some(failpoints) = &self.failpoints {
            command.env(mhtrain_failpoint::DIRECTORY_VARIABLE, failpoints);
        }
        command
    }

    /// Returns a command of whoever has the jobs.
    fn client(&self, args: &[&str]) -> Command {
        let mut command = self.command(args);
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid).env("HOME", self.dir.join("out"));
        }
        command
    }

    /// Starts a command in the foreground; what it says on standard error can be read at its end.
    pub(super) fn foreground(&self, args: &[&str]) -> anyhow::Result<Child> {
        Ok(self.client(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("daemon.sock")
    }

    // -- the daemon

    pub(super) fn serve(&self) -> anyhow::Result<Child> {
        let log = File::options().append(true).create(true).open(self.log())?;
        let mut command = self.command(&["serve"]);
        command.env("MHTRAIND_LOG", "debug").stdout(Stdio::null()).stderr(log);
        command.spawn().with_context(|| format!("cannot start {}", self.binary.display()))
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// Waits until the daemon serves. What it left of a socket is not taken for it: nobody listens there.
    pub(super) fn wait_until_it_serves(&self, daemon: &mut Child) -> anyhow::Result<()> {
        let until = Instant::now() + SERVES_WITHIN;
        while UnixStream::connect(self.socket()).is_err() {
            if let Some(status) = daemon.try_wait()? {
                bail!("the daemon ended by itself with {status}");
            }
            if Instant::now() >= until {
                bail!("the daemon did not serve within {} s", SERVES_WITHIN.as_secs());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    // -- its clients

    /// Submits a job. A client that is to be killed is so after `killed_after`.
    pub(super) fn submit(
        &self,
        name: &str,
        job: &Value,
        killed_after: Option<Duration>,
    ) -> anyhow::Result<Answer> {
        let mut command = self.client(&["submit", "-", "--key", name, "--json"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("piped")?;
        // It may be dead already, or end without reading.
        let _closed_early = input.write_all(job.to_string().as_bytes());
        drop(input);
        if let Some(after) = killed_after {
            std::thread::sleep(after);
            child.kill()?;
        }
        let output = child.wait_with_output()?;
        Ok(match answer(&output) {
            Answer::Acknowledged(_) => {
                let told: Value = serde_json::from_slice(&output.stdout)?;
                Answer::Acknowledged(told["id"].as_u64())
            }
            other => other,
        })
    }

    pub(super) fn cancel(&self, id: u64) -> anyhow::Result<Answer> {
        Ok(answer(&self.client(&["cancel", &id.to_string(), "--json"]).output()?))
    }

    /// Runs a command of a client to its end.
    pub(super) fn ask(&self, args: &[&str]) -> anyhow::Result<(Answer, String)> {
        let output = self.client(args).output()?;
        Ok((answer(&output), String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    pub(super) fn remove(&self, ids: &[u64]) -> anyhow::Result<Answer> {
        let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
        let mut arguments = vec!["rm"];
        arguments.extend(ids.iter().map(String::as_str));
        Ok(answer(&self.client(&arguments).output()?))
    }

    /// Returns every job that the daemon knows.
    pub(super) fn jobs(&self) -> anyhow::Result<Vec<Found>> {
        let mut jobs: Vec<Found> = Vec::new();
        loop {
            let after = jobs.last().map_or(0, |job| job.id).to_string();
            let page = self.page(&["status", "--json", "--limit", PAGE, "--after-id", &after])?;
            jobs.extend(serde_json::from_value::<Vec<Found>>(page["jobs"].clone())?);
            if page["next_after_id"].is_null() {
                return Ok(jobs);
            }
        }
    }

    /// Returns what a command answers that asks for JSON; until there is a daemon, it is asked again.
    fn page(&self, command: &[&str]) -> anyhow::Result<Value> {
        let until = Instant::now() + ANSWERED_WITHIN;
        loop {
            let output = self.client(command).output()?;
            if output.status.success() {
                return Ok(serde_json::from_slice(&output.stdout)?);
            }
            if Instant::now() >= until {
                bail!("the daemon does not list its jobs: {}", String::from_utf8_lossy(&output.stderr));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns a job as it is submitted.
    pub(super) fn job(&self, name: &str, scenario: &Value) -> Value {
        let mut scenario = scenario.clone();
        scenario["witness"] = json!(self.dir.join("witness"));
        json!({"name": name, "model": "./model", "dataset": "train.jsonl", "output_dir": format!("out/{name}"),
            "args": {"save_steps": 3, "logging_steps": 1, "num_train_epochs": 1},
            "env": {"FAKE_SWIFT_SCENARIO": scenario.to_string()}})
    }

    // -- what really happens

    /// Returns what the trainers themselves said so far.
    pub(super) fn testimonies(&self) -> anyhow::Result<Vec<Testimony>> {
        let path = self.dir.join("witness/trainers.jsonl");
        let text = if path.exists() { fs::read_to_string(path)? } else { String::new() };
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        Ok(whole.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }

    /// Returns the attempts that have a directory.
    pub(super) fn attempts(&self) -> BTreeSet<PathBuf> {
        let entries =
            |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        entries(&self.state_dir().join("jobs")).flat_map(|job| entries(&job).collect::<Vec<_>>()).collect()
    }

    /// Returns the recorders that live, each with the id of its job.
    pub(super) fn recorders(&self) -> Vec<(u32, u64)> {
        let (jobs, out) = (self.state_dir().join("jobs"), self.dir.join("out"));
        let mut found = Vec::new();
        for pid in pids() {
            let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            let [_, verb, record, ..] = words.as_slice() else { continue };
            let record = Path::new(std::ffi::OsStr::from_bytes(record));
            let id =
                record.strip_prefix(&jobs).ok().and_then(|path| path.iter().next()?.to_str()?.parse().ok());
            // That of a job in the foreground lies beside its results.
            let id = id.or_else(|| record.starts_with(&out).then_some(ID));
            if let (b"recorder" | b"recorder-adopt", Some(id)) = (*verb, id) {
                found.push((pid, id));
            }
        }
        // A gate is a copy of its recorder until it executes the trainer under the same pid.
        let recorders: BTreeSet<u32> = found.iter().map(|(pid, _)| *pid).collect();
        found.retain(|(pid, _)| parent(*pid).is_some_and(|parent| !recorders.contains(&parent)));
        found
    }

    /// Returns whether a process that was a trainer of these trials lives and still is one: its pid may be another's by now, the
    /// daemon's even.
    pub(super) fn is_trainer(&self, pid: u32) -> bool {
        let mark = format!("MHTRAIND_ATTEMPT={}/", self.state_dir().join("jobs").display());
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let is_marked = environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(mark.as_bytes()));
        is_marked && !self.recorders().iter().any(|(recorder, _)| *recorder == pid)
    }

    /// Returns everybody who was started for these trials and lives: all of them carry a path of the host in their
    /// environment, as the daemon's own settings or as the mark of an attempt.
    pub(super) fn everybody(&self) -> Vec<(u32, String)> {
        let mark = self.dir.as_os_str().as_bytes();
        let marked = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.windows(mark.len()).any(|window| window == mark)
        };
        let line = |pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            (pid, String::from_utf8_lossy(&line).replace('\0', " "))
        };
        pids().filter(marked).map(line).collect()
    }
}

fn answer(output: &Output) -> Answer {
    match output.status.code() {
        Some(0) => Answer::Acknowledged(None),
        // 3: nobody was there, or he died before he answered. A signal: the trial killed the client.
        Some(3) | None => Answer::Unknown,
        // A socket that is a moment old: its mode is not set yet.
        Some(4) if String::from_utf8_lossy(&output.stderr).contains("no daemon can be reached") => {
            Answer::Unknown
        }
        Some(code) => {
            Answer::Refused(format!("exit code {code}: {}", String::from_utf8_lossy(&output.stderr).trim()))
        }
    }
}

fn pids() -> impl Iterator<Item = u32> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(move |pid| *pid != own)
}

/// Returns the parent of a process: the second field after the name in parentheses, proc_pid_stat(5).
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Kills a process as `kill -9` would. Returns whether it was there.
pub(super) fn kill(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}
