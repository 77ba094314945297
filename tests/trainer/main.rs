//! Tests on real ms-swift, on CPU, with a tiny model: what no fake can show.
//!
//! `cargo xtask test` installs both lines and runs these once a line. A plain `cargo test` has no trainer environment:
//! each test then says that it is skipped. The GPU is nvml-sim's; the out-of-memory error is raised by the demo's
//! plugin at a simulated capacity. Everything else is the real thing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and says when it is skipped")]

#[path = "../blackbox/environment.rs"]
#[allow(dead_code, reason = "shared with the black-box tests, which use all of it")]
mod environment;
#[path = "../fake-swift/host.rs"]
#[allow(dead_code, reason = "the real trainer is there instead")]
mod fake_host;

mod companion;
mod daemon;
mod data;
mod failures;
mod histories;
mod lab;
mod ranks;
mod warm;

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

use lab::{Lab, Trained};
use serde_json::{Value, json};

/// 320 rows, E = 32: ten steps an epoch.
const STEPS_PER_EPOCH: u64 = 10;

fn attempts(receipt: &Value) -> &Vec<Value> {
    receipt["attempts"].as_array().expect("attempts")
}

/// Returns the trained rows of a history: of each attempt the steps that the next one did not train again.
fn kept(history: &[Trained], receipt: &Value) -> Trained {
    let mut kept = Trained::new();
    for (index, trained) in history.iter().enumerate() {
        let until = attempts(receipt)
            .get(index + 1)
            .map_or(u64::MAX, |next| next["resume"]["from_step"].as_u64().unwrap_or(0));
        kept.extend(
            trained.iter().filter(|(step, _)| **step <= until).map(|(step, rows)| (*step, rows.clone())),
        );
    }
    kept
}

/// Asserts that each epoch trained every row exactly once.
#[track_caller]
fn assert_every_row_once(trained: &Trained, epochs: u64) {
    for epoch in 0..epochs {
        let steps = trained.range(epoch * STEPS_PER_EPOCH + 1..=(epoch + 1) * STEPS_PER_EPOCH);
        let rows: Vec<u64> = steps.flat_map(|(_, rows)| rows.iter().copied()).collect();
        assert_eq!(rows.len(), 320, "epoch {epoch}: rows trained");
        assert_eq!(rows.iter().collect::<BTreeSet<_>>().len(), 320, "epoch {epoch}: different rows");
    }
}

/// The one uninterrupted run that the others are compared with, then two that ran out of memory.
#[test]
fn an_oom_is_resumed_one_rung_lower_at_the_exact_row() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({}), 2);
    lab.run(&["run", "job.json"], &[]).expect(0);
    let whole = lab.trained(1);
    assert_every_row_once(&whole, 2);
    let receipt = lab.receipt();
    assert_eq!(receipt["proof"], "rows");
    assert_eq!(receipt["proof_facts"]["rows"], 320);
    let (losses, rates) = (lab.logged(1, "loss"), lab.logged(1, "learning_rate"));

    for (oom_step, resumed_from) in [(7, 6), (13, 12)] {
        let lab = Lab::new().expect("as before");
        lab.job(json!({}), 2);
        let growth = oom_step.to_string();
        let ran = lab.run(&["run", "job.json"], &[("MHT_SIM_GROWTH_STEP", &growth)]).expect(0);
        let receipt = lab.receipt();
        let attempts = attempts(&receipt);
        assert_eq!(attempts.len(), 2, "{}", ran.stdout);
        assert_eq!(attempts[0]["diagnosis"]["kind"], "device_oom");
        assert_eq!(
            (&attempts[0]["tier"]["micro_batch"], &attempts[1]["tier"]["micro_batch"]),
            (&json!(8), &json!(4))
        );
        assert_eq!(attempts[1]["tier"]["accumulation"], 8);
        assert_eq!(attempts[1]["resume"]["kind"], "exact");
        // The step that ran out of memory was rescued: nothing that was finished is trained again.
        assert_eq!(attempts[1]["resume"]["from_step"], resumed_from);
        assert_eq!(attempts[1]["resume"]["steps_repeated"], 0);
        assert_eq!(receipt["warnings"], json!([]));
        let trained = kept(&[lab.trained(1), lab.trained(2)], &receipt);
        assert_eq!(trained, whole, "OOM in step {oom_step}: the same rows in every step as without it");
        for (step, rate) in lab.logged(2, "learning_rate") {
            assert!((rate - rates[&step]).abs() < 1e-12, "step {step}: learning rate {rate}");
        }
        for (step, loss) in lab.logged(2, "loss") {
            let expected = losses[&step];
            assert!((loss - expected).abs() < 1e-3, "step {step}: loss {loss}, uninterrupted {expected}");
        }
        let link = std::fs::read_link(lab.env.path("out/final")).unwrap();
        assert_eq!(link.to_str(), Some("attempt-2/checkpoint-20"));
    }
}

/// In the second epoch ms-swift 3.x replays the rows of the first after a resume inside it, but for the companion's
/// cure; 4.x is exact by itself.
#[test]
fn a_kill_inside_the_second_epoch_repeats_and_loses_no_row() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({}), 2);
    let mut child =
        lab.command(&["run", "job.json"], &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    lab.wait_for_step(1, 17);
    let pid = lab.trainer_pid(1);
    assert!(std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let receipt = lab.receipt();
    let attempts = attempts(&receipt);
    assert_eq!(attempts.len(), 2);
    assert_ne!(attempts[0]["diagnosis"]["kind"], "device_oom", "signal 9 proves no lack of device memory");
    assert_eq!(attempts[0]["tier"], attempts[1]["tier"], "and lowers nothing");
    assert_eq!(attempts[1]["resume"]["from_step"], 15);
    assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 2);
}

#[test]
fn full_fine_tuning_is_resumed_as_well() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({"train_type": "full"}), 1);
    lab.run(&["run", "job.json"], &[("MHT_SIM_GROWTH_STEP", "7")]).expect(0);
    let receipt = lab.receipt();
    assert_eq!(attempts(&receipt)[1]["resume"]["kind"], "exact");
    assert_eq!(attempts(&receipt)[1]["resume"]["steps_repeated"], 0);
    assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 1);
}

#[test]
fn what_no_rung_cures_stops_at_once_and_says_why() {
    let Some(lab) = Lab::new() else { return };
    // No row is as short as this: the trainer dies with an unhelpful error, and the line that helps is another.
    lab.job(json!({"length": 8}), 1);
    let ran = lab.run(&["run", "job.json"], &[]).expect(1);
    let receipt = lab.receipt();
    assert_eq!(attempts(&receipt).len(), 1);
    assert_eq!(attempts(&receipt)[0]["diagnosis"]["kind"], "bad_data", "{}", ran.stdout);
}

#[test]
fn a_parameter_that_ms_swift_does_not_know_is_found_before_the_start() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({"args": {"lora_rnk": 4}}), 1);
    let ran = lab.run(&["run", "job.json"], &[]).expect(2);
    assert!(ran.stderr.contains("lora_rank"), "{}", ran.stderr);
    assert!(!lab.env.path("out/attempt-1").exists());
}

#[test]
fn ctrl_c_leaves_nobody_and_continue_finishes_the_job() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({}), 1);
    let mut child =
        lab.command(&["run", "job.json"], &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    lab.wait_for_step(1, 6);
    let pid = lab.trainer_pid(1);
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the trainer is gone");
    assert_eq!(lab.processes_of_the_job(), Vec::<u32>::new());
    lab.run(&["run", "job.json", "--continue"], &[]).expect(0);
    let receipt = lab.receipt();
    assert_eq!(attempts(&receipt)[0]["resume"]["from_step"], 5);
    assert_eq!(receipt["proof_facts"]["global_step"], 10);
}

#[test]
fn a_trainer_outlives_us_and_is_taken_over_untouched() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({}), 2);
    let mut child =
        lab.command(&["run", "job.json"], &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    lab.wait_for_step(1, 2);
    child.kill().unwrap();
    child.wait().unwrap();
    let began = Instant::now();
    lab.run(&["run", "job.json", "--continue"], &[]).expect(0);
    assert!(began.elapsed() < Duration::from_secs(120));
    let receipt = lab.receipt();
    assert_eq!(attempts(&receipt).len(), 1, "it was trained once");
    assert_every_row_once(&lab.trained(1), 2);
}
