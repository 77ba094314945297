//! The daemon and its clients around a fake trainer: nothing is lost, nothing runs twice, everything says why.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::environment::{CARD, FakeHost, Ran};

const GIB: u64 = 1 << 30;

/// A daemon on a host with one simulated card. It is killed at the end of the test.
pub(crate) struct Served {
    pub(crate) host: FakeHost,
    daemon: Child,
}

impl Drop for Served {
    fn drop(&mut self) {
        // What a failed test left running ends with its own steps; those of the tests here are few.
        let _dead_already = self.daemon.kill();
        let _reaped = self.daemon.wait();
    }
}

impl Served {
    pub(crate) fn new() -> Served {
        Served::on(FakeHost::with_card(80 * GIB))
    }

    /// Starts a daemon on a host and waits until it answers.
    pub(crate) fn on(host: FakeHost) -> Served {
        Served::with(host, |_| {})
    }

    /// Starts a daemon whose command was changed in some way.
    pub(crate) fn with(host: FakeHost, change: impl FnOnce(&mut Command)) -> Served {
        let daemon = Served::spawn(&host, change);
        let served = Served { host, daemon };
        served.wait_until("the daemon", |served| served.run(&["status", "--json"]).code == Some(0));
        served
    }

    fn spawn(host: &FakeHost, change: impl FnOnce(&mut Command)) -> Child {
        let log =
            std::fs::OpenOptions::new().append(true).create(true).open(host.env.path("daemon.log")).unwrap();
        let mut command = host.command(&["serve"], &json!({}));
        Served::places(host, &mut command);
        command.env("MHTRAIND_LOG", "info");
        change(&mut command);
        command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    fn places(host: &FakeHost, command: &mut Command) {
        command.env("MHTRAIND_SOCKET", host.env.path("daemon.sock"));
        command.env("MHTRAIND_STATE_DIR", host.env.path("state"));
        command.env("NVML_SIM_USAGE", host.env.path("usage"));
        command.env_remove("FAKE_SWIFT_SCENARIO");
    }

    /// Kills the daemon with SIGKILL and starts another one.
    pub(crate) fn kill_and_restart(&mut self) {
        self.kill();
        self.start();
    }

    /// Kills the daemon with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    /// Starts another daemon.
    pub(crate) fn start(&mut self) {
        self.start_with(|_| {});
    }

    /// Starts another daemon whose command was changed in some way.
    pub(crate) fn start_with(&mut self, change: impl FnOnce(&mut Command)) {
        self.daemon = Served::spawn(&self.host, change);
        self.wait_until("the next daemon", |served| served.run(&["status", "--json"]).code == Some(0));
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        let mut command = self.host.command(args, &json!({}));
        Served::places(&self.host, &mut command);
        Ran::from(command.output().expect("the binary starts"))
    }

    /// Submits the host's job with `extra` keys and the trainer's scenario; returns the id as text.
    pub(crate) fn submit(&self, extra: Value, scenario: &Value) -> String {
        let mut extra = extra;
        extra["env"] = json!({"FAKE_SWIFT_SCENARIO": scenario.to_string()});
        self.host.job(extra);
        let ran = self.run(&["submit", "job.json"]).expect(0);
        let id = ran.stdout.trim().to_owned();
        assert!(id.parse::<u64>().is_ok_and(|id| id > 0), "{}", ran.stdout);
        id
    }

    pub(crate) fn job(&self, id: &str) -> Value {
        self.run(&["status", id, "--json"]).expect(0).json()["jobs"][0].clone()
    }

    pub(crate) fn state(&self, id: &str) -> String {
        self.job(id)["state"].as_str().unwrap().to_owned()
    }

    pub(crate) fn receipt(&self, id: &str) -> Value {
        self.run(&["explain", id, "--json"]).expect(0).json()
    }

    /// Returns the daemon's pid.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Waits until a process is gone, or a zombie: that of a daemon whose recorder was killed.
    #[track_caller]
    pub(crate) fn wait_for_end(&self, pid: &str) {
        let until = Instant::now() + Duration::from_secs(20);
        let lives = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        };
        while lives() {
            assert!(Instant::now() < until, "pid {pid} ends");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for a condition, at most a minute.
    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, condition: impl Fn(&Served) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !condition(self) {
            if Instant::now() >= until {
                let log = std::fs::read_to_string(self.host.env.path("daemon.log")).unwrap_or_default();
                panic!("waited a minute for {what}\n{}\n{log}", self.run(&["status"]).stdout);
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Lets somebody else hold so much of the card.
    fn hold(&self, bytes: u64) {
        let mut device = nvml_sim::SimDevice::idle(CARD, "Simulated GPU", 80 * GIB, "8.0");
        device.used = bytes;
        nvml_sim::SimFile::new(vec![device]).write_atomically(&self.host.env.path("nvml.json")).unwrap();
    }
}

#[test]
fn a_submitted_job_is_run_proven_and_explained() {
    let served = Served::new();
    let id = served.submit(json!({"name": "first"}), &json!({}));
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let job = served.job(&id);
    assert_eq!((job["state"].as_str(), job["name"].as_str()), (Some("succeeded"), Some("first")));
    assert_eq!((job["attempt"].as_u64(), job["tier"]["micro_batch"].as_u64()), (Some(1), Some(8)));
    let receipt = served.receipt(&id);
    assert_eq!((receipt["proof"].as_str(), receipt["state"].as_str()), (Some("rows"), Some("succeeded")));
    assert_eq!(receipt["id"].to_string(), id);
    assert!(served.run(&["log", &id]).expect(0).stdout.contains("Train"), "the trainer's output is shown");
    let table = served.run(&["status"]).expect(0).stdout;
    assert!(table.contains("succeeded") && table.contains("first"), "{table}");
    assert_eq!(served.host.receipt()["state"], "succeeded");
}

#[test]
fn a_job_that_is_over_has_its_whole_receipt() {
    let served = Served::new();
    for number in 0..12 {
        let id = served.submit(json!({"output_dir": format!("out{number}")}), &json!({}));
        // Asked without a pause in between, as no command could.
        let until = Instant::now() + Duration::from_secs(60);
        while !ask(&served, "GET", &format!("/v1/jobs/{id}"), "").1.contains("\"succeeded\"") {
            assert!(Instant::now() < until, "job {id} ends");
        }
        let receipt: Value =
            serde_json::from_str(&ask(&served, "GET", &format!("/v1/jobs/{id}/receipt"), "").1).unwrap();
        assert_eq!(receipt["proof"], "rows", "job {id} just after its end");
        served.run(&["rm", &id]).expect(0);
        assert!(!served.host.env.path(&format!("state/jobs/{id}")).exists(), "nothing of job {id} stays");
    }
}

/// Makes receipts say what they said before the job ended, as a daemon leaves them that is killed just after the end.
fn forget_the_end(served: &Served, receipts: &[&str]) {
    for receipt in receipts {
        let path = served.host.env.path(receipt);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"state\": \"succeeded\""), "{text}");
        std::fs::write(&path, text.replace("\"state\": \"succeeded\"", "\"state\": \"running\"")).unwrap();
    }
}

#[test]
fn a_receipt_that_a_killed_daemon_left_tells_the_end_when_the_next_one_is_up() {
    let mut served = Served::new();
    let id = served.submit(json!({}), &json!({}));
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let whole = served.receipt(&id);
    served.kill();
    let own = format!("state/jobs/{id}/receipt.json");
    forget_the_end(&served, &["out/receipt.json", &own]);
    served.start();
    served.wait_until("the receipt", |served| served.host.receipt()["state"] == "succeeded");
    let receipt = served.host.receipt();
    assert_eq!((&receipt["rungs"], &receipt["proof"]), (&whole["rungs"], &whole["proof"]));
    // A later job has the directory: its receipt is not touched.
    let later = served.submit(json!({}), &json!({}));
    served.run(&["wait", &later, "--timeout", "60"]).expect(0);
    served.receipt(&later);
    served.kill();
    forget_the_end(&served, &[&own, &format!("state/jobs/{later}/receipt.json")]);
    served.start();
    for id in [&later, &id] {
        served.wait_until("both receipts of their own", |served| {
            let text =
                std::fs::read_to_string(served.host.env.path(&format!("state/jobs/{id}/receipt.json")));
            text.unwrap().contains("\"state\": \"succeeded\"")
        });
    }
    assert_eq!(served.host.receipt()["id"].to_string(), later);
}

#[test]
fn an_oom_is_recovered_and_followed() {
    let served = Served::new();
    let oom = json!({"oom": {"capacity_gib": 24, "base_gib": 8, "per_sample_gib": 3, "at_step": 5}});
    let id = served.submit(json!({}), &oom);
    let ran = served.run(&["follow", &id]).expect(0);
    assert!(ran.stdout.contains("attempt 2"), "{}", ran.stdout);
    let receipt = served.receipt(&id);
    assert_eq!(receipt["attempts"][0]["diagnosis"]["kind"], "device_oom");
    assert_eq!(receipt["attempts"][1]["resume"]["kind"], "exact");
    assert_eq!(served.job(&id)["attempt"], 2);
    assert!(served.run(&["log", &id, "--attempt", "1"]).expect(0).stdout.contains("OutOfMemoryError"));
    served.run(&["log", &id, "--attempt", "9"]).expect(5);
}

#[test]
fn a_killed_daemon_loses_nothing_and_trains_nothing_twice() {
    let mut served = Served::new();
    let id = served.submit(json!({}), &json!({"step_seconds": 0.2}));
    let second = served.submit(json!({"output_dir": "out2"}), &json!({}));
    served.wait_until("some steps", |served| served.host.trained(1).len() >= 2);
    for _ in 0..3 {
        served.kill_and_restart();
    }
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    served.run(&["wait", &second, "--timeout", "60"]).expect(0);
    assert_eq!(served.job(&id)["attempt"], 1, "it was taken over and not started again");
    let steps: Vec<u64> = served.host.trained(1).iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=10).collect::<Vec<_>>(), "every step was trained once");
    assert_eq!(served.receipt(&id)["proof"], "rows");
}

#[test]
fn the_service_manager_hears_ready_the_counts_and_the_end() {
    let host = FakeHost::with_card(80 * GIB);
    let notify = host.env.path("notify");
    let messages = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    messages.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut served = Served::with(host, |command| {
        command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "3000000");
    });
    let wait_for = |wanted: &str| {
        let mut heard = Vec::new();
        loop {
            let mut bytes = [0; 4096];
            let length = messages.recv(&mut bytes).unwrap_or_else(|e| panic!("{e}: {heard:?}, not {wanted}"));
            heard.push(String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned());
            if heard.last().is_some_and(|message| message == wanted) {
                return;
            }
        }
    };
    wait_for("READY=1");
    let first = served.submit(json!({"output_dir": "a"}), &json!({"step_seconds": 0.2}));
    let second = served.submit(json!({"output_dir": "b"}), &json!({}));
    wait_for("STATUS=1 running, 1 waiting");
    wait_for("WATCHDOG=1");
    for id in [first, second] {
        served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    }
    wait_for("STATUS=0 running, 0 waiting");
    served.run(&["drain"]).expect(0);
    wait_for("STATUS=0 running, 0 waiting; drained: nothing new starts");
    assert!(Command::new("kill").arg(served.daemon.id().to_string()).status().unwrap().success());
    wait_for("STOPPING=1");
    assert!(served.daemon.wait().unwrap().success());
}

#[test]
fn a_daemon_whose_executable_was_replaced_still_starts_jobs() {
    let host = FakeHost::with_card(80 * GIB);
    // As a package manager does it: the next version is written beside, and renamed over.
    let (installed, next) = (host.env.path("mhtraind"), host.env.path("mhtraind.next"));
    for copy in [&installed, &next] {
        // By another process: a file that this one has open for writing, or a child that another thread is just
        // forking, could not be executed.
        let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_mhtraind")).arg(copy).status().unwrap();
        assert!(copied.success());
    }
    let served = Served::with(host, |command| {
        let mut installed = Command::new(&installed);
        installed.arg("serve").envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        *command = installed;
    });
    std::fs::rename(&next, &installed).unwrap();
    let id = served.submit(json!({}), &json!({}));
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
}

#[test]
fn a_killed_recorder_is_replaced_with_and_without_the_daemon() {
    let mut served = Served::new();
    let id = served.submit(json!({}), &json!({"step_seconds": 0.3}));
    served.wait_until("a step", |served| !served.host.trained(1).is_empty());
    let recorder = |served: &Served| -> u64 {
        let path = served.host.env.path(&format!("state/jobs/{id}/attempt-1/recorder.json"));
        let record: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        record["pid"].as_u64().unwrap()
    };
    let kill =
        |pid: u64| assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    let first = recorder(&served);
    kill(first);
    served.wait_until("another recorder", |served| recorder(served) != first);
    let second = recorder(&served);
    served.daemon.kill().unwrap();
    kill(second);
    served.kill_and_restart();
    served.wait_until("a third recorder", |served| recorder(served) != second);
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let receipt = served.receipt(&id);
    assert_eq!(receipt["attempts"].as_array().unwrap().len(), 1, "it was trained once");
    assert_eq!(receipt["attempts"][0]["exit"]["kind"], "lost");
    assert_eq!(receipt["proof"], "rows");
    let steps: Vec<u64> = served.host.trained(1).iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_trainer_that_died_with_its_recorder_was_interrupted_and_goes_on() {
    let mut served = Served::new();
    let id = served.submit(json!({}), &json!({"step_seconds": 0.2}));
    served.wait_until("a saved step", |served| served.host.trained(1).len() >= 4);
    served.daemon.kill().unwrap();
    for who in ["recorder", "trainer"] {
        let path = served.host.env.path(&format!("state/jobs/{id}/attempt-1/{who}.json"));
        let record: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let pid = record["pid"].to_string();
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success(), "{who}");
    }
    served.kill_and_restart();
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let attempts = served.receipt(&id)["attempts"].clone();
    assert_eq!(attempts[0]["exit"]["kind"], "lost");
    assert_eq!(attempts[0]["diagnosis"]["kind"], "interrupted");
    assert_eq!(
        (&attempts[1]["resume"]["kind"], &attempts[1]["resume"]["from_step"]),
        (&json!("exact"), &json!(3))
    );
}

#[test]
fn one_job_a_device_by_priority_and_the_others_say_why_they_wait() {
    let served = Served::new();
    let slow = json!({"step_seconds": 0.1});
    let first = served.submit(json!({"output_dir": "a"}), &slow);
    served.wait_until("the first", |served| served.state(&first) == "running");
    let second = served.submit(json!({"output_dir": "b"}), &json!({}));
    let urgent = served.submit(json!({"output_dir": "c", "priority": 5}), &json!({}));
    served.wait_until("a reason", |served| served.state(&second) == "waiting");
    let reason = served.job(&second)["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("GPU 0") && (reason.contains("job") || reason.contains("line")), "{reason}");
    for id in [&first, &second, &urgent] {
        served.run(&["wait", id, "--timeout", "60"]).expect(0);
    }
    let started = |id: &str| served.receipt(id)["attempts"][0]["started_at"].as_str().unwrap().to_owned();
    assert!(started(&urgent) <= started(&second));
}

#[test]
fn a_job_waits_for_memory_with_the_numbers_and_starts_when_it_comes() {
    let served = Served::new();
    served.hold(79 * GIB);
    let id = served.submit(json!({}), &json!({}));
    served.wait_until("a reason", |served| {
        served.job(&id)["reason"].as_str().is_some_and(|reason| reason.contains("needs"))
    });
    let reason = served.job(&id)["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("GPU 0 has") && reason.contains("GiB free"), "{reason}");
    served.hold(0);
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
}

#[test]
fn memory_that_a_dead_trainer_still_holds_costs_the_next_job_no_rung() {
    let served = Served::new();
    let first = served.submit(json!({"output_dir": "a"}), &json!({"step_seconds": 0.3}));
    served.wait_until("some steps", |served| served.host.trained_in("a", 1).len() >= 4);
    // From here on the driver counts what the trainer has; it stays for a while after the trainer is gone.
    served.hold(62 * GIB);
    let planned = served.run(&["plan", "job.json", "--json"]).expect(0).json();
    assert!(planned["chosen"]["micro_batch"].as_u64() < Some(8), "a lower rung would fit now: {planned}");
    let second = served.submit(json!({"output_dir": "b"}), &json!({}));
    served.wait_until("the end of the first", |served| served.state(&first) == "succeeded");
    // No step of it takes as long as the memory may stand still.
    for left in [40, 20, 0] {
        std::thread::sleep(Duration::from_millis(150));
        served.hold(left * GIB);
    }
    served.run(&["wait", &second, "--timeout", "60"]).expect(0);
    assert_eq!(served.job(&second)["tier"], served.job(&first)["tier"]);
}

#[test]
fn one_user_cannot_fill_the_memory_of_the_daemon_with_jobs_on_their_way_in() {
    let served = Served::new();
    let begin = || {
        let mut stream = UnixStream::connect(served.host.env.path("daemon.sock")).unwrap();
        let head = "POST /v1/jobs HTTP/1.1\r\nhost: mhtraind\r\ncontent-type: application/json\r\n";
        write!(stream, "{head}content-length: {}\r\n\r\n", 11 << 20).unwrap();
        stream
    };
    let answer = |mut stream: &UnixStream| {
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut bytes = [0; 4096];
        let read = stream.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    };
    // Each says that 11 MiB will come, and sends nothing. 23 of them are taken in.
    let waiting: Vec<UnixStream> = (0..30).map(|_| begin()).collect();
    let refused = std::cell::Cell::new(0);
    served.wait_until("the bound", |_| {
        let heard = waiting.iter().filter(|stream| answer(stream).contains("too_many_jobs")).count();
        refused.set(refused.get() + heard);
        refused.get() == 7
    });
    let id = served.submit(json!({}), &json!({}));
    drop(waiting);
    served.wait_until("room again", |_| answer(&begin()).is_empty());
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
}

#[test]
fn what_can_never_fit_fails_at_once_with_the_numbers() {
    let served = Served::new();
    served.host.env.write(
        "huge/config.json",
        r#"{"model_type": "qwen2", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "intermediate_size": 29568, "vocab_size": 152064}"#,
    );
    let id = served.submit(json!({"model": "./huge"}), &json!({}));
    let ran = served.run(&["wait", &id, "--timeout", "30"]).expect(1);
    assert!(ran.stderr.contains("never") && ran.stderr.contains("GiB"), "{}", ran.stderr);
    assert_eq!(served.job(&id)["attempt"], 0);
}

#[test]
fn a_key_makes_a_submission_idempotent() {
    let served = Served::new();
    served.host.job(json!({}));
    let submit =
        || served.run(&["submit", "job.json", "--key", "k", "--json"]).expect(0).json()["id"].as_u64();
    assert_eq!(submit(), submit());
    served.host.job(json!({"name": "another"}));
    let ran = served.run(&["submit", "job.json", "--key", "k"]).expect(2);
    assert!(ran.stderr.contains('k'), "{}", ran.stderr);
    assert_eq!(served.run(&["status", "--json"]).expect(0).json()["jobs"].as_array().unwrap().len(), 1);
}

#[test]
fn cancel_ends_a_running_and_a_waiting_job_and_retry_goes_on() {
    let served = Served::new();
    let running = served.submit(json!({"output_dir": "a"}), &json!({"step_seconds": 0.2}));
    let waiting = served.submit(json!({"output_dir": "b"}), &json!({}));
    served.wait_until("a saved step", |served| served.job(&running)["progress"]["step"].as_u64() >= Some(4));
    served.run(&["cancel", &waiting]).expect(0);
    assert_eq!(served.state(&waiting), "cancelled");
    served.run(&["cancel", &running]).expect(0);
    served.run(&["wait", &running, "--timeout", "30"]).expect(1);
    assert_eq!(served.state(&running), "cancelled");
    for (id, told) in [(&waiting, served.receipt(&waiting)), (&running, served.receipt(&running))] {
        assert_eq!(told["reason"], "stopped as asked (cancel)");
        assert_eq!(served.job(id)["reason"], told["reason"], "list and receipt say the same");
    }
    served.run(&["cancel", &running]).expect(1);
    let again = served.run(&["retry", &running]).expect(0).stdout.trim().to_owned();
    served.run(&["wait", &again, "--timeout", "60"]).expect(0);
    let receipt = served.receipt(&again);
    assert_eq!(receipt["attempts"][0]["resume"]["kind"], "exact", "it goes on from the last checkpoint");
    served.run(&["retry", &again]).expect(1);
    served.run(&["rm", &running, &waiting]).expect(0);
    served.run(&["status", &running]).expect(5);
}

#[test]
fn a_retry_goes_on_with_its_own_job_through_other_retries_and_other_jobs() {
    let served = Served::new();
    let slow = json!({"step_seconds": 0.2});
    let first = served.submit(json!({}), &slow);
    served.wait_until("a saved step", |served| served.job(&first)["progress"]["step"].as_u64() >= Some(4));
    served.run(&["cancel", &first]).expect(0);
    served.run(&["wait", &first]).expect(1);
    // Another job in the same place, with later checkpoints of its own.
    served.host.env.write("other.jsonl", std::fs::read(served.host.env.path("train.jsonl")).unwrap());
    let other = served.submit(json!({"dataset": "other.jsonl"}), &json!({"step_seconds": 0.6}));
    served.wait_until("a later step", |served| served.job(&other)["progress"]["step"].as_u64() >= Some(7));
    served.run(&["cancel", &other]).expect(0);
    served.run(&["wait", &other]).expect(1);
    // A retry that never started, and one of it.
    served.run(&["drain"]).expect(0);
    let second = served.run(&["retry", &first]).expect(0).stdout.trim().to_owned();
    served.run(&["cancel", &second]).expect(0);
    served.run(&["undrain"]).expect(0);
    let third = served.run(&["retry", &second]).expect(0).stdout.trim().to_owned();
    served.run(&["wait", &third, "--timeout", "60"]).expect(0);
    let resume = served.receipt(&third)["attempts"][0]["resume"].clone();
    assert_eq!((resume["kind"].as_str(), resume["from_step"].as_u64()), (Some("exact"), Some(3)), "{resume}");
    assert!(resume["checkpoint"].as_str().unwrap().contains("previous-1/"), "{resume}");
}

#[test]
fn a_client_that_hangs_up_leaves_no_job_behind_that_nobody_runs() {
    let served = Served::new();
    served.run(&["drain"]).expect(0);
    for number in 0..20u64 {
        served.host.job(json!({"output_dir": format!("out{number}")}));
        let job: Value =
            serde_json::from_slice(&std::fs::read(served.host.env.path("job.json")).unwrap()).unwrap();
        let cwd = served.host.env.path(".");
        let body = json!({"job": job, "cwd": cwd, "umask": 18}).to_string();
        let mut stream = UnixStream::connect(served.host.env.path("daemon.sock")).unwrap();
        let length = body.len();
        write!(stream, "POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}")
            .unwrap();
        std::thread::sleep(Duration::from_millis(number * 2));
    }
    served.wait_until("every stored job to stand in the queue", |served| {
        let stored = served.run(&["status", "--json"]).expect(0).json()["jobs"].as_array().unwrap().len();
        let about: Value = serde_json::from_str(&ask(served, "GET", "/v1/daemon", "").1).unwrap();
        stored > 0 && about["queued"].as_u64() == Some(stored as u64)
    });
}

#[test]
fn a_cancel_outlives_the_daemon_that_heard_it() {
    let mut served = Served::new();
    let id = served.submit(json!({}), &json!({"step_seconds": 0.5, "on_sigterm": "ignore"}));
    served.wait_until("a step", |served| !served.host.trained(1).is_empty());
    // The answer says what is on disk: it must be there before it is given.
    let answer = served.run(&["cancel", &id, "--json"]).expect(0).json();
    assert_eq!(answer["reason"], "stopping: cancel");
    served.kill_and_restart();
    served.run(&["wait", &id, "--timeout", "40"]).expect(1);
    assert_eq!(served.state(&id), "cancelled");
}

#[test]
fn jobs_wait_for_others_and_fail_with_them() {
    let served = Served::new();
    let broken = json!({"fail": {"at_step": 2, "text": "zorglub: the flux is inverted", "exit_code": 1}});
    let first = served.submit(json!({"output_dir": "a"}), &broken);
    let number: u64 = first.parse().unwrap();
    let second = served.submit(json!({"output_dir": "b", "after": [number]}), &json!({}));
    served.run(&["wait", &first, "--timeout", "60"]).expect(1);
    assert!(served.job(&first)["reason"].as_str().unwrap().contains("zorglub"));
    let ran = served.run(&["wait", &second, "--timeout", "30"]).expect(1);
    assert!(ran.stderr.contains(&format!("job {first}")), "{}", ran.stderr);
}

#[test]
fn of_daemons_that_come_to_a_dead_ones_socket_at_once_one_has_it() {
    let mut served = Served::new();
    served.kill();
    let start = |number: u32| {
        let mut command = served.host.command(&["serve"], &json!({}));
        Served::places(&served.host, &mut command);
        command.env("MHTRAIND_STATE_DIR", served.host.env.path(&format!("state-{number}")));
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let daemons = RefCell::new((0..8).map(start).collect::<Vec<_>>());
    served.wait_until("all but one to end", |_| {
        let lives = |daemon: &mut Child| daemon.try_wait().unwrap().is_none();
        daemons.borrow_mut().iter_mut().map(lives).filter(|lives| *lives).count() == 1
    });
    served.run(&["status"]).expect(0);
    for mut daemon in daemons.into_inner() {
        let lives = daemon.try_wait().unwrap().is_none();
        if lives {
            daemon.kill().unwrap();
        }
        let ran = Ran::from(daemon.wait_with_output().unwrap());
        assert!(lives || ran.stderr.contains("another daemon listens"), "{}", ran.stderr);
    }
    let left = std::fs::read_dir(served.host.env.path(".")).unwrap().flatten();
    let left: Vec<_> = left.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".")).collect();
    assert!(left.is_empty(), "no other name is left: {left:?}");
}

#[test]
fn a_drained_daemon_starts_nothing_until_it_may_again() {
    let mut served = Served::new();
    served.run(&["drain"]).expect(0);
    let id = served.submit(json!({}), &json!({}));
    served.wait_until("a reason", |served| served.state(&id) == "waiting");
    served.kill_and_restart();
    served.wait_until("a reason", |served| {
        served.job(&id)["reason"].as_str().is_some_and(|reason| reason.contains("drained"))
    });
    let about: Value = serde_json::from_str(&ask(&served, "GET", "/v1/daemon", "").1).unwrap();
    assert_eq!(about["drained"], true, "the next daemon knows it too");
    served.run(&["wait", &id, "--timeout", "1.5"]).expect(75);
    served.run(&["undrain"]).expect(0);
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
}

#[test]
fn the_time_limit_ends_a_job_that_waits_for_another_card() {
    let served = Served::new();
    let text = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered";
    let id = served.submit(json!({"time_limit": "5s"}), &json!({"fail": {"at_step": 2, "text": text}}));
    served.wait_until("its waiting", |served| {
        served.job(&id)["attempt"] == 1 && served.state(&id) == "waiting"
    });
    let ran = served.run(&["wait", &id, "--timeout", "30"]).expect(1);
    assert!(ran.stderr.contains("its time limit of 5 s is over"), "{}", ran.stderr);
    assert_eq!(served.state(&id), "failed");
    served.wait_until("the receipt", |served| served.host.receipt()["state"] == "failed");
}

#[test]
fn the_time_limit_ends_a_job() {
    let served = Served::new();
    let id = served.submit(json!({"time_limit": "2s"}), &json!({"step_seconds": 1}));
    let ran = served.run(&["wait", &id, "--timeout", "40"]).expect(1);
    assert!(ran.stderr.contains("time limit"), "{}", ran.stderr);
}

#[test]
fn a_smoke_run_is_short_and_elsewhere() {
    let served = Served::new();
    served.host.job(json!({}));
    let id = served.run(&["submit", "job.json", "--smoke"]).expect(0).stdout.trim().to_owned();
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    assert!(served.job(&id)["output_dir"].as_str().unwrap().ends_with("out-smoke"));
    assert_eq!(served.receipt(&id)["proof_facts"]["global_step"], 2);
}

#[test]
fn bad_jobs_are_refused_and_nothing_is_kept() {
    let served = Served::new();
    for (extra, word) in [
        (json!({"model": "./nowhere"}), "nowhere"),
        (json!({"devices": 2}), "device"),
        (json!({"modle": 1}), "model"),
    ] {
        served.host.job(extra);
        let ran = served.run(&["submit", "job.json"]).expect(2);
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(word), "{}", ran.stderr);
    }
    assert_eq!(served.run(&["status", "--json"]).expect(0).json()["jobs"], json!([]));
    for command in ["status", "follow", "log", "wait", "cancel", "retry", "explain", "rm"] {
        let ran = served.run(&[command, "4711"]).expect(5);
        assert!(ran.stderr.contains("4711"), "{command}: {}", ran.stderr);
    }
}

#[test]
fn what_cannot_be_is_refused_at_submit_and_asked_for_in_json() {
    let served = Served::new();
    served.host.job(json!({"after": [4711]}));
    let ran = served.run(&["submit", "job.json"]).expect(2);
    assert!(ran.stderr.contains("4711"), "{}", ran.stderr);
    served.host.job(json!({"output_dir": served.host.env.path("state/jobs/1")}));
    let ran = served.run(&["submit", "job.json"]).expect(2);
    assert!(ran.stderr.contains("state directory"), "{}", ran.stderr);
    served.host.job(json!({"output_dir": "/dev/null"}));
    served.run(&["submit", "job.json"]).expect(2);
    assert_eq!(served.run(&["status", "--json"]).expect(0).json()["jobs"], json!([]));
    let ran = served.run(&["status", "--limit", "0"]).expect(2);
    assert!(ran.stderr.contains("1000") && ran.stderr.contains('0'), "{}", ran.stderr);
    let ran = served.run(&["status", "--state", "runing"]).expect(2);
    assert!(ran.stderr.contains("running"), "{}", ran.stderr);
    for (method, path) in [
        ("GET", "/v1/jobs/abc"),
        ("GET", "/v1/jobs?bogus=1"),
        ("PUT", "/v1/jobs"),
        ("GET", "/v1/jobs/7/series?attempt=-1"),
    ] {
        let (status, body) = ask(&served, method, path, "");
        assert!((400..500).contains(&status), "{method} {path}: {status}");
        let error: Value = serde_json::from_str(&body).unwrap();
        assert!(error["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
    }
}

#[test]
fn a_job_whose_output_directory_is_gone_can_be_cancelled_and_gives_its_card_back() {
    let mut served = Served::new();
    let id = served.submit(json!({"output_dir": "a"}), &json!({"step_seconds": 1}));
    served.wait_until("a step", |served| served.job(&id)["progress"]["step"].as_u64() >= Some(1));
    let record = served.host.env.path(&format!("state/jobs/{id}/attempt-1/trainer.json"));
    let trainer: Value = serde_json::from_str(&std::fs::read_to_string(record).unwrap()).unwrap();
    served.daemon.kill().unwrap();
    let out = served.host.env.path("a");
    std::fs::rename(&out, served.host.env.path("elsewhere")).unwrap();
    std::fs::write(&out, "no directory").unwrap();
    served.kill_and_restart();
    served.wait_until("the daemon to see it", |served| {
        std::fs::read_to_string(served.host.env.path("daemon.log")).unwrap().contains("cannot be followed")
    });
    assert_eq!(served.state(&id), "running", "the trainer does not notice");
    served.run(&["cancel", &id]).expect(0);
    served.run(&["wait", &id, "--timeout", "40"]).expect(1);
    assert_eq!(served.state(&id), "cancelled");
    assert!(!std::path::Path::new(&format!("/proc/{}", trainer["pid"])).exists(), "nobody is left");
    let next = served.submit(json!({"output_dir": "b"}), &json!({}));
    served.run(&["wait", &next, "--timeout", "60"]).expect(0);
}

#[test]
fn what_a_job_makes_has_the_submitters_umask_and_the_receipt_the_probe() {
    use std::os::unix::fs::PermissionsExt;
    let served = Served::new();
    served.host.job(json!({"output_dir": "deep/out"}));
    let job: Value =
        serde_json::from_slice(&std::fs::read(served.host.env.path("job.json")).unwrap()).unwrap();
    let cwd = served.host.env.path(".").canonicalize().unwrap();
    let (status, body) =
        ask(&served, "POST", "/v1/jobs", &json!({"job": job, "cwd": cwd, "umask": 0o027}).to_string());
    assert_eq!(status, 201, "{body}");
    served.run(&["wait", "1", "--timeout", "60"]).expect(0);
    for dir in ["deep", "deep/out", "deep/out/attempt-1"] {
        let mode = std::fs::metadata(served.host.env.path(dir)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o750, "{dir}");
    }
    let receipt = served.receipt("1");
    assert_eq!(receipt["probe"]["gpus"]["devices"][0]["uuid"], CARD);
    assert!(receipt["proof"].is_string() && receipt["ended_at"].is_string(), "{receipt}");
    let again = served.run(&["submit", "job.json"]).expect(0);
    assert!(again.stderr.contains("previous-"), "{}", again.stderr);
}

#[test]
fn the_next_prediction_is_corrected_by_what_nvml_showed_of_the_last_run() {
    let mut served = Served::new();
    std::fs::create_dir(served.host.env.path("usage")).unwrap();
    let id = served.submit(json!({}), &json!({"step_seconds": 0.4}));
    served.wait_until("a step", |served| served.job(&id)["progress"]["step"].as_u64() >= Some(1));
    let pids = std::fs::read_to_string(served.host.env.path("out/attempt-1/fake-pids.json")).unwrap();
    let pid = serde_json::from_str::<Value>(&pids).unwrap()["trainer"].as_u64().unwrap();
    let first = served.receipt(&id);
    let predicted = |receipt: &Value| {
        let rungs = receipt["rungs"].as_array().unwrap();
        let rung = rungs.iter().find(|rung| rung["tier"] == first["chosen"]).unwrap();
        rung["predicted_peak_bytes"].as_u64().unwrap()
    };
    let cold = predicted(&first);
    assert!(!first["notes"].to_string().contains("because of"), "{}", first["notes"]);
    // Half as much again as was predicted, CUDA context and all.
    let used = cold + cold / 2;
    served.host.env.write(&format!("usage/{CARD}.{pid}"), used.to_string());
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);

    // The next daemon knows it too.
    served.kill_and_restart();
    let next = served.submit(json!({"output_dir": "next"}), &json!({}));
    served.run(&["wait", &next, "--timeout", "60"]).expect(0);
    let receipt = served.receipt(&next);
    let (learned, notes) = (predicted(&receipt), receipt["notes"].to_string());
    assert!(notes.contains(&format!("because of job {id}, attempt 1")), "{notes}");
    assert_ne!(receipt["chosen"], first["chosen"], "so much does not fit");
    let near = |a: u64, b: u64| a.abs_diff(b) < b / 20;
    assert!(near(learned, used), "{learned} is predicted, {used} was seen, {cold} was predicted before");
}

#[test]
fn a_card_that_fails_is_left_for_another_one_and_nothing_more_starts_there() {
    let mut served = Served::new();
    let other = CARD.replace("001", "002");
    let cards = [CARD, &other].map(|uuid| nvml_sim::SimDevice::idle(uuid, "Simulated GPU", 80 * GIB, "8.0"));
    nvml_sim::SimFile::new(cards.to_vec()).write_atomically(&served.host.env.path("nvml.json")).unwrap();
    let text = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered";
    let fault = json!({"attempts": {"1": {"fail": {"at_step": 8, "text": text}}}});
    let id = served.submit(json!({}), &fault);
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let receipt = served.receipt(&id);
    let attempts = receipt["attempts"].as_array().unwrap();
    assert_eq!((attempts.len(), &attempts[0]["diagnosis"]["kind"]), (2, &json!("device_fault")));
    let resume = &attempts[1]["resume"];
    assert_eq!((&resume["kind"], &resume["from_step"]), (&json!("exact"), &json!(6)));
    // Both cards are as good: whichever it had first is left.
    let good = served.job(&id)["device"].as_str().unwrap().to_owned();
    let (bad, uuid) = if good == "GPU 1" { (0, CARD) } else { (1, other.as_str()) };

    // The next daemon knows it too, and a job that wants that very card is told.
    served.kill_and_restart();
    let failed = ask(&served, "GET", "/v1/daemon", "").1;
    assert!(failed.contains(uuid) && failed.contains("uncorrectable ECC"), "{failed}");
    let pinned = served.submit(json!({"device": bad, "output_dir": "pinned"}), &json!({}));
    let why = |served: &Served| served.job(&pinned)["reason"].as_str().unwrap_or_default().to_owned();
    served.wait_until("the reason", |served| why(served).contains("uncorrectable ECC"));
    assert!(why(&served).contains("mhtraind undrain"), "{}", why(&served));
    let free = served.submit(json!({"output_dir": "free"}), &json!({}));
    served.run(&["wait", &free, "--timeout", "60"]).expect(0);
    assert_eq!(served.job(&free)["device"], good.as_str());
    // A job on a card of its own does not move.
    served.run(&["undrain"]).expect(0);
    served.run(&["wait", &pinned, "--timeout", "60"]).expect(0);
    let stays = served.submit(json!({"device": bad, "output_dir": "stays"}), &fault);
    served.run(&["wait", &stays, "--timeout", "60"]).expect(1);
    assert_eq!(served.job(&stays)["attempt"], 1);
}

/// What a neighbour held when the job was planned is not taken for what it took since, also by a daemon that comes later.
#[test]
fn a_daemon_that_takes_a_job_over_knows_who_was_on_the_card_before() {
    for (before, since, kind) in [(59, 59, "device_oom"), (0, 59, "device_oom_by_neighbour")] {
        let mut served = Served::new();
        served.hold(before * GIB);
        let oom = json!({"capacity_gib": 80, "base_gib": 81, "per_sample_gib": 0, "at_step": 8, "kind": "neighbour"});
        let id = served.submit(json!({}), &json!({"attempts": {"1": {"oom": oom, "step_seconds": 0.4}}}));
        served.wait_until("a step", |served| !served.host.trained(1).is_empty());
        served.kill();
        served.hold(since * GIB);
        served.start();
        served.wait_until("the answer", |served| {
            served.host.trained(1).len() >= 7
                && ["waiting", "succeeded"].contains(&served.state(&id).as_str())
        });
        served.hold(before * GIB);
        served.run(&["wait", &id, "--timeout", "60"]).expect(0);
        let attempts = served.receipt(&id)["attempts"].clone();
        assert_eq!(attempts.as_array().unwrap().len(), 2, "it was taken over: {attempts:#}");
        assert_eq!(attempts[0]["diagnosis"]["kind"], kind);
        assert_eq!(attempts[0]["tier"] == attempts[1]["tier"], before == 0, "{attempts:#}");
    }
}

#[test]
fn a_model_is_downloaded_before_the_job_has_a_card() {
    let mut served = Served::new();
    let config = std::fs::read(served.host.env.path("model/config.json")).unwrap();
    served.host.env.write("hub/acme/tiny/config.json", config);
    served.host.env.write("hub/acme/far/unreachable", "");
    let path = |relative: &str| served.host.env.path(relative).display().to_string();
    let env = json!({"FAKE_HUB": path("hub"), "HF_HUB_CACHE": path("hf"), "FAKE_SWIFT_SCENARIO": "{}"});
    let submit = |served: &Served, extra: Value| {
        let mut job = extra;
        job["env"] = env.clone();
        served.host.job(job);
        served.run(&["submit", "job.json"]).expect(0).stdout.trim().to_owned()
    };
    let reason = |served: &Served, id: &str| served.job(id)["reason"].as_str().unwrap_or_default().to_owned();

    // Its size is in no list: only its files can tell it.
    let id = submit(&served, json!({"model": "acme/tiny"}));
    served.wait_until("the download", |served| reason(served, &id).starts_with("downloading acme/tiny"));
    assert_eq!(served.state(&id), "waiting");
    // Nobody waits for it: the card is free.
    let other = submit(&served, json!({"output_dir": "other"}));
    served.run(&["wait", &other, "--timeout", "60"]).expect(0);
    // It dies with the daemon, and the next one begins it again.
    let downloads =
        |served: &Served| processes_with("FAKE_HUB", &served.host.env.path("hub").display().to_string());
    assert_eq!(downloads(&served).len(), 1);
    served.kill_and_restart();
    served.wait_until("another download", |served| reason(served, &id).starts_with("downloading acme/tiny"));
    served.wait_until("one download alone", |served| downloads(served).len() == 1);
    served.host.env.write("hub/acme/tiny/go", "");
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    assert_eq!(served.job(&id)["attempt"], 1);

    let unknown = submit(&served, json!({"model": "acme/typo", "output_dir": "typo"}));
    served.run(&["wait", &unknown, "--timeout", "60"]).expect(1);
    assert!(reason(&served, &unknown).contains("404"), "{}", reason(&served, &unknown));
    // The network may come back, an unknown name does not.
    let far = submit(&served, json!({"model": "acme/far", "output_dir": "far"}));
    served.wait_until("the back-off", |served| reason(served, &far).contains("tried again in 30 s"));
    served.run(&["cancel", &far]).expect(0);
    assert_eq!(served.state(&far), "cancelled");

    std::fs::remove_file(served.host.env.path("hub/acme/tiny/go")).unwrap();
    std::fs::remove_dir_all(served.host.env.path("hf")).unwrap();
    let cancelled = submit(&served, json!({"model": "acme/tiny", "output_dir": "cancelled"}));
    served.wait_until("a download", |served| !downloads(served).is_empty());
    served.run(&["cancel", &cancelled]).expect(0);
    served.wait_until("its end", |served| downloads(served).is_empty());
}

/// Returns the processes that have this value in their environment.
fn processes_with(name: &str, value: &str) -> Vec<u32> {
    let wanted = format!("{name}={value}");
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let numbered = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes())
    };
    numbered.filter(has).collect()
}

#[test]
fn without_a_daemon_clients_end_with_3() {
    let host = FakeHost::with_card(80 * GIB);
    host.job(json!({}));
    for args in [&["status"][..], &["submit", "job.json"], &["wait", "1"], &["follow", "1"], &["log", "1"]] {
        let mut command = host.command(args, &json!({}));
        Served::places(&host, &mut command);
        let ran = Ran::from(command.output().unwrap()).expect(3);
        assert!(ran.stderr.contains("help:  "), "{}", ran.stderr);
    }
}

#[test]
fn a_second_daemon_is_refused() {
    let served = Served::new();
    let mut command = served.host.command(&["serve"], &json!({}));
    Served::places(&served.host, &mut command);
    let ran = Ran::from(command.output().unwrap()).expect(1);
    assert!(ran.stderr.contains("in use"), "{}", ran.stderr);
}

pub(crate) fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().any(|line| line.starts_with("Uid:\t0\t"))
}

/// Sends a request to the daemon's socket and returns the status and the body.
pub(crate) fn ask(served: &Served, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(served.host.env.path("daemon.sock")).unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    // In one write: a server that answers without reading the body would close on the second.
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Asserts that `value` has what a schema of docs/openapi.json requires, with the types that it says.
fn assert_schema(document: &Value, schema: &Value, value: &Value, at: &str) {
    if let Some(name) = schema["$ref"].as_str() {
        let found = document.pointer(name.trim_start_matches('#')).unwrap();
        return assert_schema(document, found, value, at);
    }
    let types = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => return,
    };
    let is = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    assert!(
        types.contains(&is) || (is == "integer" && types.contains(&"number")),
        "{at}: {value} is no {types:?}"
    );
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        assert_schema(document, &schema["properties"][name], &value[name], &format!("{at}.{name}"));
    }
    for item in value.as_array().into_iter().flatten() {
        assert_schema(document, &schema["items"], item, at);
    }
}

#[test]
fn the_openapi_file_and_the_server_agree() {
    let root = crate::environment::root();
    let text = std::fs::read_to_string(root.join("docs/openapi.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let routes = std::fs::read_to_string(root.join("crates/mhtraind/src/api/routes.rs")).unwrap();
    let mut served_paths: Vec<&str> =
        routes.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    let mut described: Vec<&str> =
        document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    served_paths.sort_unstable();
    described.sort_unstable();
    assert_eq!(described, served_paths);

    let served = Served::new();
    let id = served.submit(json!({}), &json!({}));
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let mut compared = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            // The job is needed until the end; what a submission answers is seen by every other test.
            if method == "delete" || path == "/v1/jobs" && method == "post" {
                continue;
            }
            let (status, body) = ask(&served, &method.to_uppercase(), &path.replace("{id}", &id), "");
            let responses = operation["responses"].as_object().unwrap();
            let known = responses.get(&status.to_string()).unwrap_or(&responses["default"]);
            assert!(status != 404 && status != 405, "{method} {path}: {status} {body}");
            if let Some(schema) = known.pointer("/content/application~1json/schema") {
                let value = serde_json::from_str(&body).unwrap();
                assert_schema(&document, schema, &value, &format!("{method} {path}"));
                compared += 1;
            }
        }
    }
    assert!(compared >= 9, "{compared} answers were compared");
    assert_eq!(ask(&served, "GET", "/v1/nothing", "").0, 404);
    assert_eq!(ask(&served, "POST", "/v1/jobs", "{").0, 400);
    assert_eq!(ask(&served, "POST", "/v1/jobs", r#"{"job": {}, "cwd": "/", "umask": 18}"#).0, 400);
}

#[test]
fn a_secret_reaches_the_trainers_environment_and_no_file_or_answer() {
    let served = Served::new();
    let canary = "canary-5b1f0c2e";
    let secrets =
        served.host.env.write(".config/mhtraind/secrets.env", format!("SWANLAB_API_KEY={canary}\n"));
    std::fs::set_permissions(&secrets, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let oom = json!({"oom": {"capacity_gib": 24, "base_gib": 8, "per_sample_gib": 3, "at_step": 3},
        "step_seconds": 0.2});
    // One that comes with the submitter's environment is not kept, whatever pass_env says of its name.
    let job = json!({"model": "./model", "dataset": "train.jsonl", "output_dir": "token"});
    let cwd = served.host.env.path(".").canonicalize().unwrap();
    let token =
        json!({"job": job, "cwd": cwd, "umask": 18, "env": {"HF_TOKEN": canary, "HF_HOME": "/nowhere"}});
    assert_eq!(ask(&served, "POST", "/v1/jobs", &token.to_string()).0, 201);
    let id = served.submit(json!({"secrets": ["SWANLAB_API_KEY"]}), &oom);
    let seen = std::cell::Cell::new(false);
    served.wait_until("the end", |served| {
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
            let holds = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(canary);
            assert!(!holds(&read("cmdline")), "a secret in the arguments of {}", entry.path().display());
            seen.set(seen.get() || holds(&read("environ")));
        }
        matches!(served.state(&id).as_str(), "succeeded" | "failed")
    });
    assert!(seen.get(), "the trainer has it");
    served.run(&["wait", &id]).expect(0);
    assert_eq!(served.job(&id)["attempt"], 2);
    for path in ["", "/receipt", "/series", "/follow", "/log?attempt=1", "/log?attempt=2"] {
        let (status, body) = ask(&served, "GET", &format!("/v1/jobs/{id}{path}"), "");
        assert_eq!(status, 200, "{path}: {body}");
        assert!(!body.contains(canary), "{path}");
    }
    assert_no_file_holds(&served.host.env.path("."), canary, &secrets);
}

fn assert_no_file_holds(dir: &std::path::Path, canary: &str, except: &std::path::Path) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            assert_no_file_holds(&path, canary, except);
        } else if kind.is_file() && path.canonicalize().unwrap() != except.canonicalize().unwrap() {
            let bytes = std::fs::read(&path).unwrap();
            let found = bytes.windows(canary.len()).any(|window| window == canary.as_bytes());
            assert!(!found, "{} holds the secret", path.display());
        }
    }
}

#[test]
fn status_says_that_the_companion_is_not_there_and_a_restart_does_not_forget_it() {
    let mut served = Served::new();
    let id = served.submit(json!({}), &json!({"step_seconds": 0.5}));
    let warnings = json!(["training ran without the companion: it said nothing"]);
    served.wait_until("the warning", |served| served.job(&id)["warnings"] == warnings);
    assert_eq!(served.state(&id), "running", "it is said while the job runs");
    served.kill_and_restart();
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    assert_eq!(served.job(&id)["warnings"], warnings);
    assert_eq!(served.receipt(&id)["warnings"], warnings);
    assert!(served.run(&["status", &id]).expect(0).stdout.contains("without the companion"));
}

#[test]
fn what_lies_where_the_socket_is_to_be_and_is_none_is_not_touched() {
    let served = Served::new();
    served.host.env.write("notes.txt", "mine");
    let socket = served.host.env.path("notes.txt");
    let refused =
        served.run(&["serve", "--socket", socket.to_str().unwrap(), "--state-dir", "other"]).expect(2);
    assert!(refused.stderr.contains("no socket"), "{}", refused.stderr);
    assert_eq!(std::fs::read_to_string(socket).unwrap(), "mine");
}

#[test]
fn one_job_that_cannot_be_cancelled_keeps_no_other_from_it() {
    let served = Served::new();
    served.run(&["drain"]).expect(0);
    let (first, last) =
        (served.submit(json!({}), &json!({})), served.submit(json!({"output_dir": "b"}), &json!({})));
    let ran = served.run(&["cancel", &first, "99", &last]).expect(5);
    assert!(ran.stderr.contains("no job 99"), "{}", ran.stderr);
    assert_eq!((served.state(&first), served.state(&last)), ("cancelled".to_owned(), "cancelled".to_owned()));
    let refused = served.run(&["cancel", &last]).expect(1);
    assert!(refused.stderr.contains("it is cancelled"), "{}", refused.stderr);
}

#[test]
fn status_shows_what_is_not_over_and_the_last_of_the_others() {
    let served = Served::new();
    served.run(&["drain"]).expect(0);
    let ids: Vec<String> =
        (0..5).map(|number| served.submit(json!({"output_dir": format!("o{number}")}), &json!({}))).collect();
    served.run(&["cancel", &ids[1], &ids[2], &ids[3], &ids[4]]).expect(0);
    let shown = |args: &[&str]| {
        let table = served.run(args).expect(0).stdout;
        table.lines().skip(1).map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(shown(&["status", "--limit", "3"]), ["1", "4", "5"]);
    assert_eq!(shown(&["status", "--limit", "2", "--state", "cancelled"]), ["4", "5"]);
    assert_eq!(shown(&["status", "--limit", "2", "--after-id", "0"]), ["1", "2"]);
    assert_eq!(shown(&["status"]), ["1", "2", "3", "4", "5"]);
}

#[test]
fn a_parameter_that_ms_swift_has_not_is_refused_at_submit() {
    let served = Served::new();
    served.host.job(json!({"args": {"lora_rnk": 4}}));
    let refused = served.run(&["submit", "job.json"]).expect(2);
    assert!(refused.stderr.contains("did you mean `lora_rank`"), "{}", refused.stderr);
}

#[test]
fn a_job_waits_for_an_output_directory_that_somebody_has_for_a_moment() {
    let served = Served::new();
    std::fs::create_dir_all(served.host.env.path("out/.mhtraind")).unwrap();
    let lock = std::fs::File::create(served.host.env.path("out/.mhtraind/lock")).unwrap();
    lock.lock().unwrap();
    let id = served.submit(json!({}), &json!({}));
    // Longer than the second for which the lock itself is waited for.
    std::thread::sleep(Duration::from_secs(3));
    assert_ne!(served.state(&id), "failed");
    drop(lock);
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
}

#[test]
fn silent_connections_are_counted_and_closed() {
    use std::os::unix::net::UnixStream;
    let served = Served::new();
    let socket = served.host.env.path("daemon.sock");
    let mut silent: Vec<UnixStream> = (0..128).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    silent[0].write_all(b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-le").unwrap();
    let mut text = String::new();
    UnixStream::connect(&socket).unwrap().read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("128 connections"), "{text}");
    let refused = served.run(&["status"]);
    assert!(refused.code != Some(0) && refused.stderr.contains("128 connections"), "{}", refused.stderr);
    // Nobody has to close them: what says nothing is disconnected.
    served.wait_until("a place", |served| served.run(&["status"]).code == Some(0));
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
}

#[test]
fn one_user_hands_in_so_many_jobs_and_no_more_until_some_have_started() {
    let host = FakeHost::with_card(80 * GIB);
    let settings = std::fs::read_to_string(host.env.path("mhtraind.toml")).unwrap();
    host.env.write("mhtraind.toml", format!("{settings}\n[daemon]\njobs_per_user = 2\n"));
    let served = Served::on(host);
    served.run(&["drain"]).expect(0);
    served.submit(json!({"output_dir": "a"}), &json!({}));
    served.host.job(json!({"output_dir": "b"}));
    served.run(&["submit", "job.json", "--key", "the-last-place"]).expect(0);
    // Somebody who did not hear the answer asks again, and their job is there.
    let again = served.run(&["submit", "job.json", "--key", "the-last-place", "--json"]).expect(0);
    assert!(again.stdout.contains("\"existing\":true"), "{}", again.stdout);
    let refused = served.run(&["submit", "job.json", "--key", "another"]).expect(1);
    assert!(refused.stderr.contains("at most 2 jobs"), "{}", refused.stderr);
    served.host.job(json!({"output_dir": "c"}));
    let refused = served.run(&["submit", "job.json", "--key", "the-last-place"]).expect(2);
    assert!(refused.stderr.contains("the-last-place"), "{}", refused.stderr);
    let refused = served.run(&["submit", "job.json"]).expect(1);
    assert!(refused.stderr.contains("at most 2 jobs"), "{}", refused.stderr);
    served.run(&["undrain"]).expect(0);
    served.run(&["wait", "2", "--timeout", "60"]).expect(0);
    served.run(&["submit", "job.json"]).expect(0);
}

#[test]
fn two_spellings_of_a_directory_are_one_directory() {
    let served = Served::new();
    std::os::unix::fs::symlink(".", served.host.env.path("link")).unwrap();
    served.run(&["drain"]).expect(0);
    let first = served.submit(json!({"output_dir": "shared/out"}), &json!({}));
    let second = served.submit(json!({"output_dir": "link/./shared/../shared/out"}), &json!({}));
    assert_eq!(served.job(&first)["output_dir"], served.job(&second)["output_dir"]);
    served.run(&["undrain"]).expect(0);
    for id in [first, second] {
        served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    }
}
