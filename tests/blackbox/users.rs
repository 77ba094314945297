//! Root's daemon on a host with several users, and a user's own one: real accounts, made and removed by the test.
//!
//! Only root can make accounts; as anybody else these tests say so and pass.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use crate::daemon::{Served, is_root};
use crate::environment::{FakeHost, Ran};

/// An account of this host, with a home that is closed to others. It is removed at the end of the test.
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: PathBuf,
}

impl Drop for User {
    fn drop(&mut self) {
        // By force: a test that failed may have left a process of theirs.
        let _reported_by_nobody = Command::new("userdel").arg("--force").arg(&self.name).output();
    }
}

/// A group of this host. It is removed at the end of the test.
struct Group(String);

impl Drop for Group {
    fn drop(&mut self) {
        let _reported_by_nobody = Command::new("groupdel").arg(&self.0).output();
    }
}

fn tool(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Returns a name that no other test uses at the same time.
fn fresh(kind: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("mht{kind}{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

impl Group {
    fn new() -> Group {
        let name = fresh("g");
        tool(Command::new("groupadd").arg(&name));
        Group(name)
    }
}

impl User {
    fn new(host: &FakeHost, groups: &[&Group]) -> User {
        let name = fresh("u");
        let home = host.env.path(&format!("home/{name}"));
        let mut add = Command::new("useradd");
        add.args(["--no-create-home", "--user-group", "--shell", "/bin/sh", "--home-dir"]).arg(&home);
        if !groups.is_empty() {
            let names: Vec<&str> = groups.iter().map(|group| group.0.as_str()).collect();
            add.args(["--groups", &names.join(",")]);
        }
        tool(add.arg(&name));
        let id = |flag: &str| -> u32 {
            let said = tool(Command::new("id").args([flag, &name])).stdout;
            String::from_utf8(said).unwrap().trim().parse().unwrap()
        };
        let user = User { uid: id("-u"), gid: id("-g"), home, name: name.clone() };
        std::fs::create_dir_all(&user.home).unwrap();
        for (from, to) in [("model/config.json", "model/config.json"), ("train.jsonl", "train.jsonl")] {
            std::fs::create_dir_all(user.home.join(to).parent().unwrap()).unwrap();
            std::fs::copy(host.env.path(from), user.home.join(to)).unwrap();
        }
        tool(Command::new("chown").args(["-R", &format!("{}:{}", user.uid, user.gid)]).arg(&user.home));
        std::fs::set_permissions(&user.home, PermissionsExt::from_mode(0o700)).unwrap();
        user
    }

    /// Writes a file of this user and returns its path.
    fn write(&self, relative: &str, text: &str, mode: u32) -> PathBuf {
        let path = self.home.join(relative);
        let mut made = path.parent().unwrap();
        std::fs::create_dir_all(made).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        chown(&path, Some(self.uid), Some(self.gid)).unwrap();
        while made != self.home {
            chown(made, Some(self.uid), Some(self.gid)).unwrap();
            made = made.parent().unwrap();
        }
        path
    }
}

/// A host whose daemon root runs, with what several users need of it.
struct Shared {
    served: Served,
    admins: Group,
}

impl Shared {
    fn new() -> Option<Shared> {
        let host = open_host()?;
        let admins = Group::new();
        let settings = std::fs::read_to_string(host.env.path("mhtraind.toml")).unwrap();
        host.env.write("mhtraind.toml", format!("{settings}[daemon]\nadmin_group = {:?}\n", admins.0));
        Some(Shared { served: Served::on(host), admins })
    }

    fn user(&self, groups: &[&Group]) -> User {
        User::new(&self.served.host, groups)
    }

    fn run(&self, user: &User, args: &[&str]) -> Ran {
        Ran::from(as_user(&self.served.host, user, args).output().unwrap())
    }

    /// Submits a job of a user, in the user's home; returns its id.
    fn submit(&self, user: &User, extra: Value, scenario: &Value) -> String {
        let ran = self.try_to_submit(user, extra, scenario).expect(0);
        ran.stdout.trim().to_owned()
    }

    fn try_to_submit(&self, user: &User, extra: Value, scenario: &Value) -> Ran {
        let mut job = json!({"model": "./model", "dataset": "train.jsonl", "output_dir": "out",
            "args": {"save_steps": 3, "logging_steps": 1, "num_train_epochs": 1},
            "env": {"FAKE_SWIFT_SCENARIO": scenario.to_string()}});
        for (key, value) in extra.as_object().unwrap() {
            job[key] = value.clone();
        }
        user.write("job.json", &job.to_string(), 0o600);
        self.run(user, &["submit", "job.json"])
    }

    /// Waits until a job trains, and returns its trainer's pid.
    fn trainer(&self, id: &str) -> u64 {
        self.served
            .wait_until("the trainer", |served| served.job(id)["progress"]["step"].as_u64() >= Some(1));
        self.recorded(id, "trainer.json")
    }

    /// Returns the pid in a file of the record of a job's first attempt.
    fn recorded(&self, id: &str, file: &str) -> u64 {
        let path = self.served.host.env.path(&format!("state/jobs/{id}/attempt-1/{file}"));
        let record: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        record["pid"].as_u64().unwrap()
    }
}

/// Returns a Python that everybody may execute: the one of whoever runs the tests may lie in a home that is closed.
fn python_for_everybody() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let candidates = std::env::split_paths(&path).map(|dir| dir.join("python3"));
    let works = |python: &PathBuf| {
        let mut try_it = Command::new("setpriv");
        try_it.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(python);
        try_it
            .args(["-c", "import json, math, random"])
            .current_dir("/")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    candidates.chain([PathBuf::from("/usr/bin/python3")]).find(works)
}

/// Returns a host that other users can come to; `None` where there can be no other users.
fn open_host() -> Option<FakeHost> {
    if !is_root() || Command::new("useradd").arg("--help").output().is_err() {
        println!("skipped: only root can make accounts, with useradd");
        return None;
    }
    let Some(python) = python_for_everybody() else {
        println!("skipped: there is no python3 that other users may execute");
        return None;
    };
    let host = FakeHost::with_card(80 << 30);
    for path in [".", "trainer"] {
        std::fs::set_permissions(host.env.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let link = host.env.path("trainer/bin/python");
    std::fs::remove_file(&link).unwrap();
    symlink(python.canonicalize().unwrap(), &link).unwrap();
    // Where this is built may be closed to others. Copied by another process: a child that a test beside this one forks
    // meanwhile would hold the copy open for writing, and it could not be executed (ETXTBSY).
    tool(Command::new("cp").arg(env!("CARGO_BIN_EXE_mhtraind")).arg(host.env.path("mhtraind")));
    Some(host)
}

/// Returns a command of a user, in their home, with their groups.
fn as_user(host: &FakeHost, user: &User, args: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid)).arg("--init-groups");
    command.arg("--").arg(host.env.path("mhtraind")).args(args).current_dir(&user.home).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", &user.home).env("LC_ALL", "C.UTF-8");
    command.env("MHTRAIND_SOCKET", host.env.path("daemon.sock"));
    command.env("MHTRAIND_CONFIG", host.env.path("mhtraind.toml"));
    command
}

fn status_of(pid: u64, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

const SLOW: f64 = 0.3;

#[test]
fn a_job_runs_as_its_submitter_and_outlives_daemon_and_recorder() {
    let Some(mut shared) = Shared::new() else { return };
    let research = Group::new();
    let ann = shared.user(&[&research]);
    let id = shared.submit(&ann, json!({}), &json!({"step_seconds": SLOW}));
    let pid = shared.trainer(&id);
    let four = |id: u32| [id, id, id, id].map(|id| id.to_string()).join(" ");
    assert_eq!(status_of(pid, "Uid"), four(ann.uid));
    assert_eq!(status_of(pid, "Gid"), four(ann.gid));
    let group: u32 = {
        let said = tool(Command::new("getent").args(["group", &research.0])).stdout;
        String::from_utf8(said).unwrap().split(':').nth(2).unwrap().parse().unwrap()
    };
    assert!(status_of(pid, "Groups").split(' ').any(|found| found == group.to_string()));
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment).replace('\0', "\n");
    for wanted in [format!("HOME={}", ann.home.display()), format!("USER={}", ann.name)] {
        assert!(environment.lines().any(|line| line == wanted), "{wanted} in {environment}");
    }

    let recorder = |shared: &Shared| shared.recorded(&id, "recorder.json");
    let first = recorder(&shared);
    assert_eq!(status_of(first, "Uid"), four(ann.uid));
    shared.served.kill_and_restart();
    assert_eq!(shared.served.state(&id), "running");
    tool(Command::new("kill").args(["-9", &first.to_string()]));
    shared.served.wait_until("another recorder", |_| recorder(&shared) != first);
    assert_eq!(status_of(recorder(&shared), "Uid"), four(ann.uid));

    shared.run(&ann, &["wait", &id, "--timeout", "60"]).expect(0);
    let job = shared.served.job(&id);
    assert_eq!((job["attempt"].as_u64(), job["owner"].as_str()), (Some(1), Some(ann.name.as_str())));
    let mut found = Vec::new();
    let mut look_at = vec![ann.home.join("out"), shared.served.host.env.path(&format!("state/jobs/{id}"))];
    while let Some(path) = look_at.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (ann.uid, ann.gid), "{}", path.display());
        if meta.is_dir() {
            look_at.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.push(path);
    }
    assert!(found.iter().any(|path| path.ends_with("receipt.json")) && found.len() > 10);
}

#[test]
fn users_neither_see_nor_stop_each_others_jobs_and_administrators_do() {
    let Some(shared) = Shared::new() else { return };
    let (ann, bob) = (shared.user(&[]), shared.user(&[]));
    let carol = shared.user(&[&shared.admins]);
    let anns = shared.submit(&ann, json!({"name": "secret-plan"}), &json!({"step_seconds": SLOW}));
    shared.trainer(&anns);
    let bobs = shared.submit(&bob, json!({}), &json!({}));
    for args in [
        &["status", &anns][..],
        &["follow", &anns],
        &["log", &anns],
        &["explain", &anns],
        &["wait", &anns],
        &["cancel", &anns],
        &["retry", &anns],
        &["rm", &anns],
        &["drain"],
    ] {
        let ran = shared.run(&bob, args).expect(4);
        assert!(!ran.stdout.contains("secret-plan") && !ran.stderr.contains("secret-plan"), "{args:?}");
    }
    let refused = shared.try_to_submit(
        &bob,
        json!({"output_dir": "b", "after": [anns.parse::<u64>().unwrap()]}),
        &json!({}),
    );
    refused.expect(4);
    shared.served.wait_until("the reason", |served| {
        served.job(&bobs)["reason"].as_str().is_some_and(|why| why.contains("job"))
    });
    let listed = shared.run(&bob, &["status", "--json"]).expect(0).json();
    assert_eq!(listed["jobs"].as_array().unwrap().len(), 1);
    assert_eq!(listed["jobs"][0]["id"].to_string(), bobs);
    // It waits for a card that ann's job has, and is told so without a look into that job.
    let why = listed["jobs"][0]["reason"].as_str().unwrap();
    assert!(why.contains(&format!("job {anns}")) && !why.contains("secret-plan"), "{why}");
    assert_eq!(shared.served.state(&anns), "running");

    let table = shared.run(&carol, &["status"]).expect(0).stdout;
    assert!(table.contains("OWNER") && table.contains(&ann.name) && table.contains(&bob.name), "{table}");
    shared.run(&carol, &["drain"]).expect(0);
    shared.run(&carol, &["undrain"]).expect(0);
    shared.run(&carol, &["cancel", &anns]).expect(0);
    shared.served.wait_until("the cancel", |served| served.state(&anns) == "cancelled");
    // Who asks for it does not become its owner.
    let again = shared.run(&carol, &["retry", &anns]).expect(0).stdout.trim().to_owned();
    assert_eq!(shared.served.job(&again)["owner"], ann.name.as_str());
    shared.run(&bob, &["wait", &bobs, "--timeout", "60"]).expect(0);
    shared.run(&ann, &["wait", &again, "--timeout", "60"]).expect(0);
    // A key is its user's: the same word of another one is another job.
    let keyed = |user: &User, out: &str| {
        user.write(
            "job.json",
            &json!({"model": "./model", "dataset": "train.jsonl", "output_dir": out}).to_string(),
            0o600,
        );
        shared.run(user, &["submit", "job.json", "--key", "nightly"]).expect(0).stdout
    };
    assert_ne!(keyed(&ann, "k"), keyed(&bob, "k"));
}

#[test]
fn the_daemon_reads_and_writes_nothing_that_the_submitter_could_not() {
    let Some(shared) = Shared::new() else { return };
    let (ann, mallory) = (shared.user(&[]), shared.user(&[]));
    let hidden = "hidden-0c7ae1";
    let roots = shared.served.host.env.write("roots.txt", hidden);
    std::fs::set_permissions(&roots, PermissionsExt::from_mode(0o600)).unwrap();

    let model = ann.home.join("model");
    let refused = shared.try_to_submit(&mallory, json!({"model": model}), &json!({})).expect(2);
    assert!(refused.stderr.contains(&model.display().to_string()), "{}", refused.stderr);
    let refused =
        shared.try_to_submit(&mallory, json!({"output_dir": ann.home.join("out")}), &json!({})).expect(2);
    assert!(refused.stderr.contains("Permission denied"), "{}", refused.stderr);

    // Secrets: one's own file, and no other through a link.
    symlink(&roots, ann.write("x", "", 0o600).with_file_name("link")).unwrap();
    ann.write(".config/mhtraind/secrets.env", "SWANLAB_API_KEY=anns-own\n", 0o600);
    std::fs::create_dir_all(mallory.home.join(".config/mhtraind")).unwrap();
    symlink(ann.home.join(".config/mhtraind/secrets.env"), mallory.home.join(".config/mhtraind/secrets.env"))
        .unwrap();
    let named = json!({"secrets": ["SWANLAB_API_KEY"]});
    let refused = shared.try_to_submit(&mallory, named.clone(), &json!({}));
    assert_ne!(refused.code, Some(0), "{}", refused.stderr);
    let id = shared.submit(&ann, named, &json!({"step_seconds": SLOW}));
    let pid = shared.trainer(&id);
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(String::from_utf8_lossy(&environment).contains("SWANLAB_API_KEY=anns-own"));
    shared.run(&ann, &["wait", &id, "--timeout", "60"]).expect(0);

    // Traps where root looks: the log and the receipt of a job that is over become links, then pipes.
    let id = shared.submit(&mallory, json!({}), &json!({}));
    shared.run(&mallory, &["wait", &id, "--timeout", "60"]).expect(0);
    let own = shared.served.host.env.path(&format!("state/jobs/{id}"));
    for name in ["attempt-1/trainer.log", "receipt.json"] {
        let path = own.join(name);
        std::fs::remove_file(&path).unwrap();
        symlink(&roots, &path).unwrap();
    }
    let ask = |args: &[&str]| {
        let ran = shared.run(&mallory, args);
        assert!(!ran.stdout.contains(hidden) && !ran.stderr.contains(hidden), "{args:?}: {}", ran.stdout);
        ran
    };
    ask(&["log", &id]);
    ask(&["explain", &id, "--json"]).expect(0);
    for name in ["attempt-1/trainer.log", "receipt.json"] {
        std::fs::remove_file(own.join(name)).unwrap();
        tool(Command::new("mkfifo").args(["-m", "666"]).arg(own.join(name)));
    }
    ask(&["log", &id]);
    ask(&["explain", &id, "--json"]).expect(0);
    // What is open to any thread of root's process: its own descriptors and memory.
    std::fs::remove_file(own.join("attempt-1/trainer.log")).unwrap();
    symlink("/proc/self/maps", own.join("attempt-1/trainer.log")).unwrap();
    assert!(!ask(&["log", &id]).stdout.contains("[stack]"));
    // A pipe where a lock should be holds no card: the job fails, and the next one runs.
    std::fs::create_dir_all(mallory.home.join("trap/.mhtraind")).unwrap();
    tool(Command::new("mkfifo").args(["-m", "666"]).arg(mallory.home.join("trap/.mhtraind/lock")));
    tool(Command::new("chown").args(["-R", &mallory.name]).arg(mallory.home.join("trap")));
    let trapped = shared.submit(&mallory, json!({"output_dir": "trap"}), &json!({}));
    shared.run(&mallory, &["wait", &trapped, "--timeout", "60"]).expect(1);
    // And a directory whose removal would reach elsewhere.
    let precious = shared.served.host.env.write("precious/kept.txt", "kept");
    symlink(precious.parent().unwrap(), own.join("elsewhere")).unwrap();
    ask(&["rm", &id]).expect(0);
    assert!(!own.exists() && precious.exists());
}

#[test]
fn a_users_own_daemon_serves_that_user_alone() {
    let Some(host) = open_host() else { return };
    let (ann, bob) = (User::new(&host, &[]), User::new(&host, &[]));
    let socket = ann.home.join("d.sock");
    std::fs::set_permissions(&ann.home, PermissionsExt::from_mode(0o711)).unwrap();
    let command = |user: &User, args: &[&str]| {
        let mut command = as_user(&host, user, args);
        command.env("MHTRAIND_SOCKET", &socket).env("NVML_SIM_FILE", host.env.path("nvml.json"));
        command.env("MHTRAIND_NVML_LIBRARY", host.env.path("libnvml_sim.so"));
        command
    };
    tool(Command::new("cp").arg(nvml_sim::find_library().unwrap()).arg(host.env.path("libnvml_sim.so")));
    let mut daemon = command(&ann, &["serve"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let run = |user: &User, args: &[&str]| Ran::from(command(user, args).output().unwrap());
    for _ in 0..200 {
        if run(&ann, &["status"]).code == Some(0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
    ann.write("job.json", &json!({"model": "./model", "dataset": "train.jsonl"}).to_string(), 0o600);
    let id = run(&ann, &["submit", "job.json"]).expect(0).stdout.trim().to_owned();
    let waited = run(&ann, &["wait", &id, "--timeout", "60"]);
    let others = run(&bob, &["status"]);
    let roots = Ran::from(
        Command::new(host.env.path("mhtraind")).args(["status", "--socket"]).arg(&socket).output().unwrap(),
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    waited.expect(0);
    for ran in [others, roots] {
        let ran = ran.expect(4);
        assert!(ran.stderr.contains(&format!("serves {} only", ann.name)), "{}", ran.stderr);
    }
}
