//! A disk that fails, played by `crates/disk-sim`: an fsync that is refused, a file system that turns read-only. The daemon
//! stays up, what runs goes on, nothing that was refused is there later, and all goes on by itself when the disk is well again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::daemon::{Served, ask};
use crate::environment::{CARD, FakeHost};

const GIB: u64 = 1 << 30;

/// A daemon on a disk that a test can break. Recorders and trainers of jobs that are submitted here have it too.
struct Broken {
    served: Served,
}

impl Broken {
    fn new() -> Broken {
        let host = FakeHost::with_card(80 * GIB);
        let file = host.env.path("faults");
        Broken { served: Served::with(host, |command| under_it(command, &file)) }
    }

    /// Kills the daemon and starts another one on this disk.
    fn kill_and_restart(&mut self) {
        self.served.kill();
        let file = self.served.host.env.path("faults");
        self.served.start_with(|command| under_it(command, &file));
    }

    /// Submits a job whose recorder is on this disk too; its trainer takes no notice of it.
    fn submit(&self, mut scenario: Value, output_dir: &str, extra: &[&str]) -> crate::environment::Ran {
        scenario["step_seconds"] = scenario.get("step_seconds").cloned().unwrap_or(json!(0));
        self.served.host.job(json!({"output_dir": output_dir, "env": {
            "FAKE_SWIFT_SCENARIO": scenario.to_string(),
            "LD_PRELOAD": library(),
            "DISK_SIM_FILE": self.served.host.env.path("faults"),
        }}));
        self.served.run(&[&["submit", "job.json"], extra].concat())
    }

    fn submitted(&self, scenario: Value, output_dir: &str) -> String {
        self.submit(scenario, output_dir, &[]).expect(0).stdout.trim().to_owned()
    }

    /// A job that has trained a step, and takes some seconds more.
    fn running(&self) -> String {
        let id = self.submitted(json!({"step_seconds": 0.4}), "a");
        self.served.wait_until("a step", |served| served.job(&id)["progress"]["step"].as_u64() >= Some(1));
        id
    }

    /// A job whose last checkpoint the disk refuses, and one that trains on its card.
    fn proven_and_next(&self) -> (String, String) {
        let id = self.running();
        self.breaks(&[("fsync-fails", "a")]);
        let next = self.submitted(json!({"step_seconds": 0.4}), "b");
        self.served.wait_until("the next job's turn", |served| {
            served.job(&next)["progress"]["step"].as_u64() >= Some(1)
        });
        (id, next)
    }

    /// A job that waits for the first one, and says so.
    fn waiting(&self) -> String {
        let id = self.submitted(json!({}), "b");
        self.served.wait_until("its turn", |served| served.state(&id) == "waiting");
        id
    }

    /// Breaks the disk from now on, one way a line.
    fn breaks(&self, faults: &[(&str, &str)]) {
        let root = self.served.host.env.path("").canonicalize().unwrap();
        let lines = faults.iter().map(|(fault, place)| format!("{fault} {}\n", root.join(place).display()));
        let next = self.served.host.env.write("faults.new", lines.collect::<String>());
        std::fs::rename(next, self.served.host.env.path("faults")).unwrap();
    }

    fn is_well_again(&self) {
        std::fs::remove_file(self.served.host.env.path("faults")).unwrap();
    }

    /// Returns the calls that were refused.
    fn hits(&self) -> String {
        std::fs::read_to_string(self.served.host.env.path("faults.hits")).unwrap_or_default()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.served.host.env.path("daemon.log")).unwrap_or_default()
    }

    /// Waits until the first job has trained all its steps.
    #[track_caller]
    fn wait_for_ten_steps(&self, id: &str) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.served.host.trained_in("a", 1).len() < 10 {
            if Instant::now() >= until {
                let record = |name: &str| {
                    let path = self.served.host.env.path(&format!("state/jobs/{id}/attempt-1/{name}"));
                    std::fs::read_to_string(path).unwrap_or_default()
                };
                let told =
                    ["trainer.log", "recorder.log", "trainer.json", "exit.json"].map(record).join("\n--\n");
                panic!("it does not train\n{told}\n{}\n{}", self.hits(), self.log());
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Asserts that a job is over with success, in one attempt that trained each of its ten steps once.
    #[track_caller]
    fn assert_undisturbed(&self, id: &str, output_dir: &str) {
        self.served.run(&["wait", id, "--timeout", "60"]).expect(0);
        assert_eq!(self.served.job(id)["attempt"], 1, "nothing happened to it\n{}", self.log());
        let trained: Vec<u64> =
            self.served.host.trained_in(output_dir, 1).iter().map(|(step, _)| *step).collect();
        assert_eq!(trained, (1..=10).collect::<Vec<_>>());
    }

    /// Asserts that the first job trains to its end while the database cannot be written, that this is told to nobody, and that
    /// the other one waits.
    #[track_caller]
    fn assert_ends_untold(&self, first: &str, second: &str) {
        self.wait_for_ten_steps(first);
        std::thread::sleep(Duration::from_secs(3));
        let state = self.served.state(first);
        assert!(
            ["running", "recovering"].contains(&state.as_str()),
            "{state}: no end that is not on disk is told"
        );
        assert_eq!(self.served.state(second), "waiting");
        assert!(self.hits().contains("state/mhtraind.db"), "{}", self.hits());
    }

    /// Lets the disk be well again, and asserts that both jobs end as if nothing had been, that the one that was refused can be
    /// submitted now, and that the next daemon knows these three and no other.
    #[track_caller]
    fn assert_goes_on_by_itself(&mut self, first: &str, second: &str) {
        self.is_well_again();
        self.assert_undisturbed(first, "a");
        self.assert_undisturbed(second, "b");
        self.assert_said(1..=4);
        let third = self.submit(json!({}), "c", &["--key", "k"]).expect(0).stdout.trim().to_owned();
        self.assert_undisturbed(&third, "c");
        self.served.kill_and_restart();
        let jobs = self.served.run(&["status", "--json"]).expect(0).json()["jobs"].clone();
        assert_eq!(jobs.as_array().unwrap().len(), 3, "what was refused is not there: {jobs:#}");
        assert!(jobs.as_array().unwrap().iter().all(|job| job["state"] == "succeeded"), "{jobs:#}");
        let exit = &self.served.receipt(first)["attempts"][0]["exit"];
        assert_eq!(*exit, json!({"kind": "code", "code": 0}));
    }

    /// Asserts that what went wrong was said, and not again and again.
    #[track_caller]
    fn assert_said(&self, times: std::ops::RangeInclusive<usize>) {
        let log = self.log();
        let said = log.lines().filter(|line| line.contains("ERROR") || line.contains("WARN")).count();
        assert!(times.contains(&said), "{said} lines\n{log}");
    }
}

fn under_it(command: &mut Command, faults: &Path) {
    command.env("LD_PRELOAD", library()).env("DISK_SIM_FILE", faults);
}

/// Returns the library that is preloaded: cargo builds it with these tests, beside that of the cards.
fn library() -> PathBuf {
    let library = nvml_sim::find_library().expect("libnvml_sim.so was built with the tests");
    library.with_file_name("libdisk_sim.so")
}

#[test]
fn a_database_whose_fsync_fails_takes_no_job_and_keeps_those_it_has() {
    let mut disk = Broken::new();
    let first = disk.running();
    let second = disk.waiting();
    disk.breaks(&[("fsync-fails", "state")]);
    let refused = disk.submit(json!({}), "c", &["--key", "k"]).expect(1);
    assert!(refused.stderr.contains("mhtraind.db") && refused.stderr.contains("help:"), "{}", refused.stderr);
    assert_eq!(refused.stderr.lines().count(), 2, "one clear error: {}", refused.stderr);
    // .cargo/config.toml tells SQLite that there is an fdatasync, and a commit needs no more.
    let hits = disk.hits();
    let log = hits.lines().find(|line| line.ends_with("mhtraind.db-wal"));
    assert!(log.is_some_and(|line| line.starts_with("fdatasync ")), "{hits}");
    // The first ends meanwhile; its end can be read from its files, and not be written down.
    disk.assert_ends_untold(&first, &second);
    assert!(disk.hits().contains(&format!("state/jobs/{first}/attempt-1/exit.json")), "{}", disk.hits());
    disk.assert_goes_on_by_itself(&first, &second);
}

#[test]
fn a_state_directory_that_turns_read_only_takes_no_job_and_keeps_those_it_has() {
    let mut disk = Broken::new();
    let first = disk.running();
    let second = disk.waiting();
    // What the trainer prints is spared: see the next test.
    let log = format!("state/jobs/{first}/attempt-1/trainer.log");
    disk.breaks(&[("read-only", "state"), ("spared", &log)]);
    let refused = disk.submit(json!({}), "c", &["--key", "k"]).expect(1);
    assert!(refused.stderr.contains("read-only") && refused.stderr.contains("help:"), "{}", refused.stderr);
    disk.served.run(&["cancel", &second]).expect(1);
    disk.assert_ends_untold(&first, &second);
    disk.assert_goes_on_by_itself(&first, &second);
}

#[test]
fn a_last_checkpoint_that_cannot_be_put_on_disk_is_no_success_until_it_can() {
    let disk = Broken::new();
    let id = disk.running();
    disk.breaks(&[("fsync-fails", "a")]);
    disk.served.wait_until("a refusal", |_| disk.hits().contains("fsync"));
    std::thread::sleep(Duration::from_secs(7));
    let job = disk.served.job(&id);
    assert_ne!(job["state"], "succeeded", "{job:#}");
    disk.is_well_again();
    disk.assert_undisturbed(&id, "a");
    disk.assert_said(1..=2);
    let receipt: Value =
        serde_json::from_slice(&std::fs::read(disk.served.host.env.path("a/receipt.json")).unwrap()).unwrap();
    assert_eq!(receipt["state"], "succeeded");
}

#[test]
fn the_card_of_a_job_whose_success_is_proven_is_free_before_its_checkpoint_is_durable() {
    let mut broken = Broken::new();
    let (id, next) = broken.proven_and_next();
    assert_eq!(
        broken.served.state(&id),
        "recovering",
        "its last checkpoint is not on disk\n{}",
        broken.log()
    );
    // Whoever takes both over finds them on the same card.
    broken.kill_and_restart();
    let last = broken.submitted(json!({}), "c");
    broken.served.wait_until("its turn", |served| served.state(&last) == "waiting");
    let reason = broken.served.job(&last)["reason"].as_str().unwrap_or_default().to_owned();
    assert!(reason.contains(&format!("job {next}")), "{reason}");
    broken.assert_undisturbed(&next, "b");
    broken.assert_undisturbed(&last, "c");
    assert_eq!(broken.served.state(&id), "recovering", "{}", broken.log());
    broken.is_well_again();
    broken.assert_undisturbed(&id, "a");
}

#[test]
fn a_job_that_gave_its_card_back_starts_nothing_there_when_its_proof_is_lost() {
    let mut broken = Broken::new();
    let (id, next) = broken.proven_and_next();
    broken.served.kill();
    std::fs::remove_dir_all(broken.served.host.env.path("a/attempt-1/checkpoint-10")).unwrap();
    broken.kill_and_restart();
    broken.served.run(&["wait", &id, "--timeout", "60"]).expect(1);
    let job = broken.served.job(&id);
    assert!(job["reason"].as_str().unwrap_or_default().contains("success cannot be proven"), "{job:#}");
    assert_eq!(job["attempt"], 1, "{job:#}");
    broken.assert_undisturbed(&next, "b");
}

#[test]
fn a_trainer_that_cannot_print_any_more_dies_of_it_and_its_job_says_so() {
    let disk = Broken::new();
    let first = disk.running();
    disk.breaks(&[("read-only", "state")]);
    disk.served.wait_until("the trainer's end", |_| disk.hits().contains("trainer.log"));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(disk.served.run(&["status"]).code, Some(0), "it answers");
    disk.is_well_again();
    let ran = disk.served.run(&["wait", &first, "--timeout", "60"]).expect(1);
    assert!(ran.stderr.contains("trainer.log") && ran.stderr.contains("read-only"), "{}", ran.stderr);
    let again = disk.served.run(&["retry", &first]).expect(0).stdout.trim().to_owned();
    disk.served.run(&["wait", &again, "--timeout", "60"]).expect(0);
    disk.assert_said(0..=2);
}

#[test]
fn a_job_that_was_refused_for_an_fsync_is_there_at_most_once_after_a_kill() {
    let mut disk = Broken::new();
    let first = disk.running();
    disk.breaks(&[("fsync-fails", "state")]);
    disk.submit(json!({}), "b", &["--key", "k"]).expect(1);
    // What was refused is in SQLite's log all the same, and a daemon that comes after a crash finds it there.
    disk.served.kill();
    disk.is_well_again();
    disk.served.start();
    let id = disk.submit(json!({}), "b", &["--key", "k"]).expect(0).stdout.trim().to_owned();
    let jobs = disk.served.run(&["status", "--json"]).expect(0).json()["jobs"].clone();
    assert_eq!(jobs.as_array().unwrap().len(), 2, "{jobs:#}");
    disk.assert_undisturbed(&first, "a");
    disk.assert_undisturbed(&id, "b");
}

#[test]
fn a_running_job_can_be_stopped_while_no_fsync_of_its_files_works() {
    let disk = Broken::new();
    let id = disk.submitted(json!({"step_seconds": 60}), "a");
    disk.served.wait_until("the trainer", |served| served.state(&id) == "running");
    disk.breaks(&[("fsync-fails", "state/jobs")]);
    disk.served.run(&["cancel", &id]).expect(0);
    disk.served.run(&["wait", &id, "--timeout", "30"]).expect(1);
    assert_eq!(disk.served.state(&id), "cancelled");
    assert!(disk.hits().contains("/stop."), "{}", disk.hits());
    disk.is_well_again();
    disk.served.wait_until("the receipt", |served| served.run(&["explain", &id]).code == Some(0));
    assert_eq!(disk.served.receipt(&id)["attempts"][0]["exit"]["kind"], "signal");
}

#[test]
fn a_daemon_takes_jobs_over_whose_own_files_it_cannot_write() {
    let mut disk = Broken::new();
    let first = disk.running();
    let log = format!("state/jobs/{first}/attempt-1");
    disk.breaks(&[("read-only", "state/jobs"), ("spared", &log)]);
    disk.kill_and_restart();
    disk.served.wait_until("a refusal", |_| disk.hits().contains("job.json"));
    disk.wait_for_ten_steps(&first);
    disk.served.run(&["wait", &first, "--timeout", "60"]).expect(0);
    disk.is_well_again();
    disk.served.wait_until("the receipt", |served| served.run(&["explain", &first]).code == Some(0));
    disk.assert_undisturbed(&first, "a");
    disk.assert_said(0..=2);
}

#[test]
fn a_job_leaves_a_card_that_failed_although_its_own_files_cannot_be_written_then() {
    let disk = Broken::new();
    let cards = [CARD, &CARD.replace("001", "002")]
        .map(|uuid| nvml_sim::SimDevice::idle(uuid, "Simulated GPU", 80 * GIB, "8.0"));
    let nvml = disk.served.host.env.path("nvml.json");
    nvml_sim::SimFile::new(cards.to_vec()).write_atomically(&nvml).unwrap();
    let text = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered";
    let fails = json!({"attempts": {"1": {"step_seconds": 0.4, "fail": {"at_step": 8, "text": text}}}});
    let id = disk.submitted(fails, "a");
    disk.served.wait_until("a step", |served| served.job(&id)["progress"]["step"].as_u64() >= Some(1));
    let record = format!("state/jobs/{id}/attempt-1");
    disk.breaks(&[("read-only", "state/jobs"), ("spared", &record)]);
    disk.served.wait_until("the trouble", |_| disk.log().contains("the job cannot be followed"));
    assert_eq!(disk.served.state(&id), "recovering");
    disk.is_well_again();
    disk.served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let attempts = disk.served.receipt(&id)["attempts"].clone();
    assert_eq!(attempts.as_array().unwrap().len(), 2, "{attempts:#}");
    assert_eq!(attempts[1]["resume"]["from_step"], 6);
    let failed = ask(&disk.served, "GET", "/v1/daemon", "").1;
    assert!(failed.contains("uncorrectable ECC"), "{failed}");
    disk.assert_said(1..=3);
}

#[test]
fn a_rerun_whose_record_cannot_be_made_waits_for_the_disk_and_goes_on_by_itself() {
    let disk = Broken::new();
    let text = "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. \
                port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use";
    let fails = json!({"attempts": {"1": {"step_seconds": 0.4, "fail": {"at_step": 8, "text": text}}}});
    let id = disk.submitted(fails, "a");
    disk.served.wait_until("a step", |served| served.job(&id)["progress"]["step"].as_u64() >= Some(1));
    let records: Vec<String> =
        ["attempt-2", "attempt-3.trial"].iter().map(|name| format!("state/jobs/{id}/{name}")).collect();
    disk.breaks(&[("read-only", &records[0]), ("read-only", &records[1])]);
    disk.served.wait_until("its waiting", |served| served.state(&id) == "waiting");
    let reason = disk.served.job(&id)["reason"].to_string();
    assert!(reason.contains("cannot be written") && reason.contains("attempt-2"), "{reason}");
    disk.served.wait_until("another try", |_| disk.hits().contains("attempt-3.trial"));
    assert_eq!(disk.served.state(&id), "waiting");
    disk.is_well_again();
    disk.served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let attempts = disk.served.receipt(&id)["attempts"].clone();
    assert_eq!(attempts.as_array().unwrap().len(), 3, "{attempts:#}");
    assert_eq!(attempts[2]["resume"]["from_step"], 6);
    disk.assert_said(1..=1);
}

#[test]
fn a_recorder_that_the_disk_refuses_before_its_trainer_runs_is_no_failure_of_the_job() {
    let disk = Broken::new();
    let host = &disk.served.host;
    let root = host.env.path("").canonicalize().unwrap();
    // Before it is up, and when it says why it did not start the trainer.
    for (id, place) in [("1", ""), ("2", "/trainer.log")] {
        let refused = root.join(format!("state/jobs/{id}/attempt-1{place}"));
        let faults = host.env.write(&format!("faults-{id}"), format!("read-only {}\n", refused.display()));
        host.job(json!({"output_dir": format!("out-{id}"), "env": {
            "FAKE_SWIFT_SCENARIO": json!({"step_seconds": 0}).to_string(),
            "LD_PRELOAD": library(),
            "DISK_SIM_FILE": faults,
        }}));
        assert_eq!(disk.served.run(&["submit", "job.json"]).expect(0).stdout.trim(), id);
        disk.served.wait_until("its waiting", |served| served.state(id) == "waiting");
        let reason = disk.served.job(id)["reason"].to_string();
        let why = ["the disk does not take its files", "os error 30"];
        assert!(reason.contains("cannot be written") && why.iter().any(|it| reason.contains(it)), "{reason}");
        disk.served.run(&["wait", id, "--timeout", "60"]).expect(0);
        let attempts = disk.served.receipt(id)["attempts"].clone();
        assert_eq!(attempts.as_array().unwrap().len(), 2, "{attempts:#}");
        assert_eq!(attempts[0]["exit"]["kind"], "lost", "{attempts:#}");
    }
    disk.assert_said(2..=2);
}

#[test]
fn a_job_waits_for_a_jobs_directory_that_cannot_be_written_at_the_first_start() {
    let host = FakeHost::with_card(80 * GIB);
    let file = host.env.path("faults");
    let jobs = host.env.path("").canonicalize().unwrap().join("state/jobs");
    std::fs::write(&file, format!("read-only {}\n", jobs.display())).unwrap();
    let disk = Broken { served: Served::with(host, |command| under_it(command, &file)) };
    for (id, output_dir) in [("1", "a"), ("2", "b")] {
        assert_eq!(disk.submitted(json!({}), output_dir), id);
        disk.served.wait_until("its waiting", |served| served.state(id) == "waiting");
        let reason = disk.served.job(id)["reason"].to_string();
        assert!(reason.contains("cannot write") && reason.contains("state/jobs"), "{reason}");
        disk.is_well_again();
        disk.assert_undisturbed(id, output_dir);
        // There, and full: the first file of the next one.
        disk.breaks(&[("read-only", "state/jobs/2/job.json.new")]);
    }
    disk.assert_said(2..=3);
}
