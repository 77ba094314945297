//! `mhtraind run` around a fake trainer: every answer, the proof, and what is left behind.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::environment::{FakeHost, Ran};

const GIB: u64 = 1 << 30;

/// A card on which the class's own batch of 8 x 4 fits.
fn host() -> FakeHost {
    FakeHost::with_card(80 * GIB)
}

fn pid_is_alive(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

/// Waits for a condition, at most 30 s.
#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < until, "waited 30 s for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn send(signal: &str, pid: u32) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

#[test]
fn a_run_without_trouble_is_proven_by_its_rows() {
    let host = host();
    host.job(json!({}));
    let ran = host.run(&["run", "job.json"], json!({})).expect(0);
    assert!(ran.stdout.contains("swift sft"), "the plan is shown: {}", ran.stdout);
    let receipt = host.receipt();
    assert_eq!(receipt["state"], "succeeded");
    assert_eq!(receipt["proof"], "rows");
    assert_eq!(receipt["proof_facts"]["rows"], 320);
    assert_eq!(receipt["proof_facts"]["global_step"], 10);
    assert_eq!(receipt["attempts"].as_array().unwrap().len(), 1);
    let link = std::fs::read_link(host.env.path("out/final")).unwrap();
    assert_eq!(link.to_str(), Some("attempt-1/checkpoint-10"));
    let argv: Value = serde_json::from_str(
        &std::fs::read_to_string(host.env.path("out/attempt-1/fake-argv.json")).unwrap(),
    )
    .unwrap();
    assert!(argv.to_string().contains("--check_model"), "{argv}");
}

#[test]
fn an_end_that_nobody_judged_is_judged_by_the_next_process() {
    let host = host();
    host.job(json!({}));
    let oom = json!({"oom": {"capacity_gib": 24, "base_gib": 8, "per_sample_gib": 3, "at_step": 5}});
    host.run(&["run", "job.json"], oom.clone()).expect(0);
    // As a process leaves it that was killed between the end of an attempt and the decision about it.
    let path = host.env.path("out/.mhtraind/journal.jsonl");
    let journal = std::fs::read_to_string(&path).unwrap();
    let end = journal.find("\"attempt_ended\"").unwrap();
    let end = end + journal[end..].find('\n').unwrap() + 1;
    std::fs::write(&path, &journal[..end]).unwrap();
    for left in ["attempt-2", ".mhtraind/attempt-2"] {
        std::fs::remove_dir_all(host.env.path("out").join(left)).unwrap();
    }
    host.run(&["run", "job.json", "--continue"], oom).expect(0);
    let receipt = host.receipt();
    let tiers: Vec<_> =
        receipt["attempts"].as_array().unwrap().iter().map(|note| &note["tier"]["micro_batch"]).collect();
    assert_eq!(tiers, [8, 4], "the rung that ran out of memory is not tried again");
}

#[test]
fn a_stop_that_came_after_the_last_step_takes_no_success_away() {
    let host = FakeHost::with_card(80 * GIB);
    host.job(json!({}));
    host.run(&["run", "job.json"], json!({})).expect(0);
    // As if it had been stopped at its end, and mhtraind had died between the end of the attempt and the verdict.
    let path = host.env.path("out/.mhtraind/journal.jsonl");
    let journal = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = journal.lines().collect();
    let ended = lines.iter().rposition(|line| line.contains("\"attempt_ended\"")).unwrap();
    lines.truncate(ended + 1);
    lines.insert(ended, r#"{"v":1,"at":"2026-11-24T00:00:00Z","event":"stop_requested","by":"SIGTERM"}"#);
    std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    host.run(&["run", "job.json", "--continue"], json!({})).expect(0);
    assert_eq!(host.receipt()["state"], "succeeded");
}

#[test]
fn an_oom_goes_one_rung_down_and_on_from_the_saved_step() {
    let host = host();
    host.job(json!({}));
    let scenario = json!({"oom": {"capacity_gib": 80, "base_gib": 30, "per_sample_gib": 7, "at_step": 5}});
    host.run(&["run", "job.json"], scenario).expect(0);
    let receipt = host.receipt();
    let attempts = receipt["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2, "{attempts:#?}");
    assert_eq!(attempts[0]["tier"]["micro_batch"], 8);
    assert_eq!(attempts[0]["diagnosis"]["kind"], "device_oom");
    assert!(attempts[1]["tier"]["micro_batch"].as_u64().unwrap() < 8);
    assert_eq!(attempts[1]["resume"]["kind"], "exact");
    assert_eq!(attempts[1]["resume"]["from_step"], 3);
    for attempt in attempts {
        let tier = &attempt["tier"];
        assert_eq!(tier["micro_batch"].as_u64().unwrap() * tier["accumulation"].as_u64().unwrap(), 32);
    }
    let kept = host.trained(1).into_iter().filter(|(step, _)| *step <= 3);
    let rows: Vec<u64> = kept.chain(host.trained(2)).flat_map(|(_, rows)| rows).collect();
    assert_eq!(rows.len(), 320, "no row twice");
    assert_eq!(rows.iter().collect::<BTreeSet<_>>().len(), 320, "no row missing");
    let link = std::fs::read_link(host.env.path("out/final")).unwrap();
    assert_eq!(link.to_str(), Some("attempt-2/checkpoint-10"));
}

#[test]
fn exit_code_0_without_the_planned_steps_is_no_success() {
    let host = host();
    host.job(json!({}));
    let ran = host.run(&["run", "job.json"], json!({"lose_steps": 2})).expect(1);
    assert_eq!(host.receipt()["state"], "failed");
    assert!(ran.stdout.contains("8 of 10"), "{}", ran.stdout);
    assert!(!host.env.path("out/final").exists());
}

#[test]
fn a_neighbour_makes_it_wait_and_keeps_the_rung() {
    let host = host();
    host.job(json!({}));
    let scenario = json!({"attempts": {"1": {"oom": {"capacity_gib": 80, "base_gib": 79, "per_sample_gib": 7, "at_step": 5, "kind": "neighbour"}}}});
    host.run(&["run", "job.json"], scenario).expect(0);
    let receipt = host.receipt();
    let attempts = receipt["attempts"].as_array().unwrap();
    assert_eq!(attempts[0]["diagnosis"]["kind"], "device_oom_by_neighbour");
    assert_eq!(attempts[0]["tier"], attempts[1]["tier"]);
}

#[test]
fn a_trainer_that_hangs_is_ended_with_its_stacks_kept_and_goes_on() {
    let host = host();
    let settings = std::fs::read_to_string(host.env.path("mhtraind.toml")).unwrap();
    host.env.write("mhtraind.toml", settings.replace("[attempt]", "[attempt]\nstall_s = 2\nstall_steps = 3"));
    host.job(json!({}));
    let scenario = json!({"step_seconds": 0.3, "attempts": {"1": {"step_seconds": 0.3, "hang_at_step": 7}}});
    host.run(&["run", "job.json"], scenario).expect(0);
    let receipt = host.receipt();
    let attempts = receipt["attempts"].as_array().unwrap();
    assert_eq!((attempts.len(), &attempts[0]["diagnosis"]["kind"]), (2, &json!("interrupted")));
    let line = attempts[0]["diagnosis"]["evidence"]["line"].as_str().unwrap();
    assert!(
        line.starts_with("no step, no output and an idle card for ") && line.contains("after step 6"),
        "{line}"
    );
    assert_eq!(
        (&attempts[0]["tier"], &attempts[1]["resume"]["kind"]),
        (&attempts[1]["tier"], &json!("exact"))
    );
    let stacks = std::fs::read_to_string(host.env.path("out/.mhtraind/attempt-1/stacks.txt")).unwrap();
    assert!(stacks.contains("State:") || stacks.contains("python"), "{stacks}");
}

#[test]
fn a_bare_signal_9_resumes_at_the_same_rung() {
    let host = host();
    host.job(json!({}));
    let scenario =
        json!({"attempts": {"1": {"kill": {"at_step": 7, "signal": 9, "partial_checkpoint": true}}}});
    host.run(&["run", "job.json"], scenario).expect(0);
    let receipt = host.receipt();
    let attempts = receipt["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!(attempts[0]["tier"], attempts[1]["tier"]);
    assert_eq!(attempts[1]["resume"]["kind"], "exact");
}

#[test]
fn interruptions_between_which_it_progresses_do_not_add_up() {
    let host = host();
    host.job(json!({"args": {"save_steps": 1, "logging_steps": 1, "num_train_epochs": 1}}));
    let killed: serde_json::Map<String, Value> =
        (1..=8).map(|n| (n.to_string(), json!({"kill": {"at_step": n + 1, "signal": 9}}))).collect();
    host.run(&["run", "job.json"], json!({"attempts": killed})).expect(0);
    let receipt = host.receipt();
    assert_eq!(receipt["attempts"].as_array().unwrap().len(), 9, "{receipt:#}");
    assert_eq!(receipt["attempts"][8]["resume"]["kind"], "exact");
    // One that never comes further is given up after five.
    let stuck = self::host();
    stuck.job(json!({"args": {"save_steps": 1, "logging_steps": 1, "num_train_epochs": 1}}));
    let ran = stuck.run(&["run", "job.json"], json!({"kill": {"at_step": 4, "signal": 9}})).expect(1);
    assert_eq!(stuck.receipt()["attempts"].as_array().unwrap().len(), 6, "{}", ran.stdout);
    let reason = stuck.receipt()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("6 times, and no further step in between"), "{reason}");
}

#[test]
fn unknown_words_stop_the_job_and_show_the_line() {
    let host = host();
    host.job(json!({}));
    let scenario = json!({"fail": {"at_step": 2, "text": "zorglub: the flux is inverted", "exit_code": 1}});
    let ran = host.run(&["run", "job.json"], scenario).expect(1);
    assert!(ran.stdout.contains("zorglub"), "{}", ran.stdout);
    assert_eq!(host.receipt()["attempts"].as_array().unwrap().len(), 1);
}

#[test]
fn nothing_is_left_running_after_ctrl_c_and_continue_goes_on() {
    let host = host();
    host.job(json!({}));
    let slow = json!({"step_seconds": 0.2, "workers": 2, "workers_ignore_sigterm": true});
    let mut child = host
        .command(&["run", "job.json"], &slow)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("four trained steps", || host.trained(1).len() >= 4);
    send("-INT", child.id());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{status:?} {:?}", status.signal());
    let pids: Value = serde_json::from_str(
        &std::fs::read_to_string(host.env.path("out/attempt-1/fake-pids.json")).unwrap(),
    )
    .unwrap();
    let workers = pids["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    for pid in workers.iter().chain([&pids["trainer"]]) {
        assert!(!pid_is_alive(pid.as_u64().unwrap()), "pid {pid} still runs");
    }
    assert_eq!(host.receipt()["state"], "cancelled");
    host.run(&["run", "job.json"], json!({})).expect(2);
    host.run(&["run", "job.json", "--continue"], json!({})).expect(0);
    let receipt = host.receipt();
    assert_eq!(receipt["attempts"][0]["resume"]["kind"], "exact");
    let from = receipt["attempts"][0]["resume"]["from_step"].as_u64().unwrap();
    assert!(from >= 3 && from.is_multiple_of(3), "saved every 3 steps, resumed from {from}");
}

#[test]
fn a_trainer_outlives_us_and_is_taken_over() {
    let host = host();
    host.job(json!({}));
    let slow = json!({"step_seconds": 0.3});
    let mut child = host
        .command(&["run", "job.json"], &slow)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("two trained steps", || host.trained(1).len() >= 2);
    send("-KILL", child.id());
    child.wait().unwrap();
    host.run(&["run", "job.json", "--continue"], slow).expect(0);
    let receipt = host.receipt();
    assert_eq!(receipt["attempts"].as_array().unwrap().len(), 1, "it was not started again");
    assert_eq!(host.trained(1).len(), 10);
}

#[test]
fn a_changed_job_file_is_not_continued() {
    let host = host();
    host.job(json!({}));
    host.run(&["run", "job.json"], json!({"fail": {"at_step": 2, "text": "zorglub", "exit_code": 1}}))
        .expect(1);
    host.job(json!({"args": {"learning_rate": 3e-4}}));
    let ran = host.run(&["run", "job.json", "--continue"], json!({})).expect(2);
    assert!(ran.stderr.contains("args"), "{}", ran.stderr);
    host.run(&["run", "job.json", "--fresh"], json!({})).expect(0);
    assert!(host.env.path("out/previous-1/attempt-1").is_dir(), "nothing is deleted");
}

#[test]
fn secrets_reach_the_trainer_and_no_file() {
    let host = host();
    host.job(json!({"secrets": ["SWANLAB_API_KEY"]}));
    let mut command = host.command(&["run", "job.json"], &json!({}));
    command.env("SWANLAB_API_KEY", "canary-4711");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let names = std::fs::read_to_string(host.env.path("out/attempt-1/fake-argv.json")).unwrap();
    assert!(names.contains("SWANLAB_API_KEY"), "the trainer has it");
    let found = Command::new("grep").args(["-rl", "canary-4711"]).arg(host.env.path(".")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "", "files with the secret");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("canary"));
}

#[test]
fn a_secret_without_a_value_is_an_error_before_anything_starts() {
    let host = host();
    host.job(json!({"secrets": ["SWANLAB_API_KEY"]}));
    let ran = host.run(&["run", "job.json"], json!({})).expect(2);
    assert!(ran.stderr.contains("SWANLAB_API_KEY"), "{}", ran.stderr);
    assert!(!host.env.path("out/attempt-1").exists());
}

#[test]
fn a_time_limit_ends_it() {
    let host = host();
    host.job(json!({"time_limit": "2s"}));
    let ran = host.run(&["run", "job.json"], json!({"step_seconds": 5})).expect(1);
    assert!(ran.stdout.contains("time limit"), "{}", ran.stdout);
}

#[test]
fn no_card_is_chosen_where_none_may_be_seen() {
    let host = host();
    host.job(json!({}));
    let run = |visible: &str| {
        let mut command = host.command(&["run", "job.json"], &json!({}));
        Ran::from(command.env("CUDA_VISIBLE_DEVICES", visible).output().unwrap())
    };
    for visible in ["", "-1", "NoDevFiles"] {
        let ran = run(visible).expect(2);
        assert!(ran.stderr.contains("CUDA_VISIBLE_DEVICES is set to"), "{}", ran.stderr);
        assert!(ran.stderr.contains("help:"), "{}", ran.stderr);
    }
    assert!(!host.env.path("out").exists(), "nothing was begun");
    // A job that names its card has it.
    host.job(json!({"device": 0}));
    run("").expect(0);
    let receipt = host.receipt();
    assert_eq!(receipt["state"], "succeeded");
}

#[test]
fn a_receipt_says_how_a_job_ended_whose_process_could_not_write_it() {
    let host = host();
    host.job(json!({}));
    host.run(&["run", "job.json"], json!({})).expect(0);
    let path = host.env.path("out/receipt.json");
    let whole = host.receipt();
    let before =
        std::fs::read_to_string(&path).unwrap().replace("\"state\": \"succeeded\"", "\"state\": \"running\"");
    std::fs::write(&path, before).unwrap();
    let refused = host.run(&["run", "job.json"], json!({})).expect(2);
    assert!(refused.stderr.contains("a job already (succeeded)"), "{}", refused.stderr);
    let receipt = host.receipt();
    assert_eq!((&receipt["state"], &receipt["proof"]), (&whole["state"], &whole["proof"]));
    assert_eq!(receipt["rungs"], whole["rungs"], "what only it knew is kept");
}

/// Leaves what a kill leaves between setting a job aside and the beginning of the next one.
fn lose_the_job(host: &FakeHost) {
    std::fs::remove_file(host.env.path("out/.mhtraind/journal.jsonl")).unwrap();
    for name in ["receipt.json", ".mhtraind/receipt.json", "attempt-1", ".mhtraind/attempt-1"] {
        let path = host.env.path("out").join(name);
        let _a_file = std::fs::remove_file(&path);
        let _a_directory = std::fs::remove_dir_all(&path);
    }
}

#[test]
fn a_fresh_job_goes_on_with_nothing_that_another_left() {
    let host = host();
    host.job(json!({}));
    host.run(&["run", "job.json"], json!({"fail": {"at_step": 5, "text": "zorglub: the flux is inverted"}}))
        .expect(1);
    host.run(&["run", "job.json", "--continue"], json!({"fail": {"at_step": 5, "text": "zorglub"}}))
        .expect(1);
    lose_the_job(&host);
    // It saves nothing.
    host.run(&["run", "job.json", "--fresh"], json!({"fail": {"at_step": 1, "text": "zorglub"}})).expect(1);
    host.run(&["run", "job.json", "--continue"], json!({})).expect(0);
    assert_eq!(host.receipt()["attempts"][0]["resume"], Value::Null, "{}", host.receipt());
}

#[test]
fn a_job_that_goes_on_with_another_knows_its_checkpoints_after_a_kill() {
    let host = host();
    host.job(json!({}));
    let fails = json!({"fail": {"at_step": 5, "text": "zorglub: the flux is inverted"}});
    host.run(&["run", "job.json"], fails).expect(1);
    host.run(&["run", "job.json", "--continue"], json!({"fail": {"at_step": 5, "text": "zorglub"}}))
        .expect(1);
    lose_the_job(&host);
    let refused = host.run(&["run", "job.json"], json!({})).expect(2);
    assert!(refused.stderr.contains("--continue"), "{}", refused.stderr);
    host.job(json!({"args": {"learning_rate": 0.5}}));
    let refused = host.run(&["run", "job.json", "--continue"], json!({})).expect(2);
    assert!(
        refused.stderr.contains("learning_rate") || refused.stderr.contains("args"),
        "{}",
        refused.stderr
    );
    host.job(json!({}));
    host.run(&["run", "job.json", "--continue"], json!({})).expect(0);
    assert_eq!(host.receipt()["attempts"][0]["resume"]["from_step"], 3);
}

#[test]
fn json_is_the_receipt_and_nothing_else() {
    let host = host();
    host.job(json!({}));
    let receipt = host.run(&["run", "job.json", "--json"], json!({})).expect(0).json();
    assert_eq!(receipt["state"], "succeeded");
}

/// The fake trainer loads no plugin, as a trainer would in which the companion cannot be installed.
#[test]
fn a_trainer_without_the_companion_is_said_to_be_so() {
    let host = host();
    host.job(json!({"args": {"save_steps": 3, "logging_steps": 1, "num_train_epochs": 1, "external_plugins": "mine.py"}}));
    let receipt = host.run(&["run", "job.json", "--json"], json!({})).expect(0).json();
    assert_eq!(receipt["warnings"], json!(["training ran without the companion: it said nothing"]));
    let argv = std::fs::read_to_string(host.env.path("out/attempt-1/fake-argv.json")).unwrap();
    let plugins = argv.find("mine.py").zip(argv.find("/out/.mhtraind/companion/mhtraind_companion.py"));
    assert!(plugins.is_some_and(|(mine, ours)| mine < ours), "after the job's own: {argv}");
    assert!(argv.contains("MHTRAIND_COMPANION_TELEMETRY"), "{argv}");
}

#[test]
fn a_site_can_leave_the_companion_out() {
    let host = host();
    host.job(json!({}));
    let settings = std::fs::read_to_string(host.env.path("mhtraind.toml")).unwrap();
    host.env.write("mhtraind.toml", settings.replace("[trainer]\n", "[trainer]\ncompanion = false\n"));
    let receipt = host.run(&["run", "job.json", "--json"], json!({})).expect(0).json();
    assert_eq!(receipt["warnings"], json!([]));
    let argv = std::fs::read_to_string(host.env.path("out/attempt-1/fake-argv.json")).unwrap();
    assert!(!argv.contains("external_plugins") && !argv.contains("MHTRAIND_COMPANION"), "{argv}");
    assert!(!host.env.path("out/.mhtraind/companion").exists());
}

#[test]
fn a_companion_that_cannot_be_written_costs_no_training() {
    let host = host();
    host.job(json!({}));
    host.env.write("out/.mhtraind/companion", "a file where its directory should be");
    let receipt = host.run(&["run", "job.json", "--json"], json!({})).expect(0).json();
    let warnings = receipt["warnings"].to_string();
    assert!(warnings.contains("training ran without the companion: cannot make"), "{warnings}");
}
