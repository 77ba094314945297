//! The fake trainer of `tests/fake-swift` under a recorder: both are what they say they are.
//!
//! Needs python3; without it these tests say so and pass.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "the helpers of a test are tests too, which clippy.toml cannot see"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mhtrain_supervisor::{
    Attempt, AttemptState, Ended, ExitRecord, Extent, LaunchSpec, ProcessIdentity, StopTook,
};
use serde_json::Value;

const BOUND: Duration = Duration::from_secs(60);

struct Lab {
    dir: tempfile::TempDir,
    python: PathBuf,
}

impl Lab {
    fn new() -> Option<Lab> {
        let path = std::env::var_os("PATH")?;
        let python = std::env::split_paths(&path).map(|dir| dir.join("python3")).find(|file| file.exists());
        let Some(python) = python else {
            eprintln!("skipped: there is no python3");
            return None;
        };
        Some(Lab { dir: tempfile::tempdir().unwrap(), python })
    }

    fn output(&self, number: u32) -> PathBuf {
        self.dir.path().join(format!("attempt-{number}"))
    }

    fn launch(&self, number: u32, scenario: &str, arguments: &str) -> Attempt {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fake-swift/fake_swift.py");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let mut argv = vec![text(&self.python), text(&script), "sft".into()];
        argv.extend([
            "--output_dir".into(),
            text(&self.output(number)),
            "--add_version".into(),
            "false".into(),
        ]);
        argv.extend(
            ["--num_train_epochs", "2", "--save_steps", "3", "--logging_steps", "1"].map(String::from),
        );
        argv.extend(arguments.split_whitespace().map(String::from));
        let spec = LaunchSpec {
            argv,
            cwd: self.dir.path().to_owned(),
            stdout: self.dir.path().join(format!("{number}.stdout")),
            stderr: self.dir.path().join(format!("{number}.stderr")),
            grace: BOUND,
            umask: None,
            log_cap_bytes: None,
            identity: None,
            extent: Extent::Cgroup,
        };
        let env = BTreeMap::from([("FAKE_SWIFT_SCENARIO".into(), scenario.into())]);
        let exe = Path::new(env!("CARGO_BIN_EXE_recorder-for-tests"));
        Attempt::launch(exe, &self.record(number), &spec, &env).unwrap()
    }

    fn record(&self, number: u32) -> PathBuf {
        self.dir.path().join(format!("record-{number}"))
    }

    fn stderr(&self, number: u32) -> String {
        fs::read_to_string(self.dir.path().join(format!("{number}.stderr"))).unwrap()
    }

    /// Returns step, micro-batch and rows of each step that was trained.
    fn steps(&self, number: u32) -> Vec<(u64, u64, Vec<u64>)> {
        let text = fs::read_to_string(self.output(number).join("fake-rows.jsonl")).unwrap_or_default();
        text.lines()
            .map(|line| {
                let line: Value = serde_json::from_str(line).unwrap();
                let rows = line["rows"].as_array().unwrap().iter().map(|row| row.as_u64().unwrap()).collect();
                (line["step"].as_u64().unwrap(), line["micro_batch"].as_u64().unwrap(), rows)
            })
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for number in 1..=3 {
            if let Ok(attempt) = Attempt::open(&self.record(number)) {
                let _ = attempt.kill_everything();
            }
        }
    }
}

fn exit(attempt: &Attempt) -> ExitRecord {
    let end = Instant::now() + BOUND;
    let mut state = attempt.state().unwrap();
    loop {
        if let AttemptState::Exited(exit) = state {
            return exit;
        }
        assert!(Instant::now() < end, "waited {BOUND:?} in vain, the state is {state:?}");
        state = attempt.wait_for_change(&state, Duration::from_secs(1)).unwrap();
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < end, "waited {BOUND:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const AS_8X4: &str = "--per_device_train_batch_size 8 --gradient_accumulation_steps 4";
const AS_4X8: &str = "--per_device_train_batch_size 4 --gradient_accumulation_steps 8";

#[test]
fn a_resume_after_an_oom_trains_the_rows_of_an_uninterrupted_run() {
    let Some(lab) = Lab::new() else { return };
    let scenario = r#"{"rows": 320, "attempts": {"1": {"oom": {"capacity_gib": 24, "at_step": 8}}}}"#;
    assert_eq!(exit(&lab.launch(1, scenario, AS_8X4)).ended, Ended::Code(1));
    assert!(
        lab.stderr(1).contains("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB.")
    );
    assert_eq!(lab.steps(1).len(), 7);
    let resume =
        format!("{AS_4X8} --resume_from_checkpoint {}", lab.output(1).join("checkpoint-6").display());
    assert_eq!(exit(&lab.launch(2, scenario, &resume)).ended, Ended::Code(0));
    assert_eq!(exit(&lab.launch(3, scenario, AS_8X4)).ended, Ended::Code(0));
    let without_shape = |number: u32| lab.steps(number).into_iter().map(|(step, _, rows)| (step, rows));
    let joined: Vec<_> = without_shape(1).take(6).chain(without_shape(2)).collect();
    assert_eq!(joined, without_shape(3).collect::<Vec<_>>());
    assert_eq!(joined.len(), 20);
}

#[test]
fn under_3x_the_micro_batch_of_the_checkpoint_wins_silently() {
    let Some(lab) = Lab::new() else { return };
    let scenario = r#"{"rows": 320, "dialect": "3", "attempts": {"1": {"kill": {"at_step": 8}}}}"#;
    assert_eq!(exit(&lab.launch(1, scenario, AS_8X4)).ended, Ended::Signal(9));
    let resume =
        format!("{AS_4X8} --resume_from_checkpoint {}", lab.output(1).join("checkpoint-6").display());
    assert_eq!(exit(&lab.launch(2, scenario, &resume)).ended, Ended::Code(0));
    let steps = lab.steps(2);
    assert_eq!(
        steps.last().map(|(step, micro_batch, rows)| (*step, *micro_batch, rows.len())),
        Some((10, 8, 64))
    );
}

#[test]
fn a_trainer_that_ignores_a_stop_goes_with_its_workers() {
    let Some(lab) = Lab::new() else { return };
    let scenario = r#"{"rows": 320, "hang_at_step": 4, "on_sigterm": "ignore", "workers": 2,
                       "workers_ignore_sigterm": true}"#;
    let attempt = lab.launch(1, scenario, AS_8X4);
    until("step 3 is trained", || lab.steps(1).len() == 3);
    let pids: Value =
        serde_json::from_slice(&fs::read(lab.output(1).join("fake-pids.json")).unwrap()).unwrap();
    let identity = |pid: &Value| ProcessIdentity::of(u32::try_from(pid.as_u64().unwrap()).unwrap()).unwrap();
    let workers: Vec<_> = pids["workers"].as_array().unwrap().iter().map(identity).collect();
    assert!(workers.len() == 2 && workers.iter().all(ProcessIdentity::is_alive));
    attempt.request_stop(Duration::from_millis(100)).unwrap();
    assert_eq!(exit(&attempt).stop, Some(StopTook::Kill));
    assert!(!workers.iter().any(ProcessIdentity::is_alive));
}

#[test]
fn a_safe_stop_saves_and_exits_with_75() {
    let Some(lab) = Lab::new() else { return };
    let attempt = lab.launch(1, r#"{"rows": 320000, "step_seconds": 0.02, "on_sigterm": "save"}"#, AS_8X4);
    until("step 1 is trained", || !lab.steps(1).is_empty());
    attempt.request_stop(BOUND).unwrap();
    let exit = exit(&attempt);
    assert_eq!((exit.ended, exit.stop), (Ended::Code(75), Some(StopTook::Polite)));
    let last = lab.steps(1).last().unwrap().0;
    assert!(lab.output(1).join(format!("checkpoint-{last}/trainer_state.json")).exists());
}

#[test]
fn a_typo_in_a_scenario_is_an_error() {
    let Some(lab) = Lab::new() else { return };
    assert_eq!(exit(&lab.launch(1, r#"{"row": 320}"#, AS_8X4)).ended, Ended::Code(1));
    assert!(lab.stderr(1).contains("unknown scenario keys ['row']"));
}
