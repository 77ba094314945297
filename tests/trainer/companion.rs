//! The companion inside real ms-swift.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Stdio;

use mhtrain_swift::companion::{Preflight, Rescue};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::warm::{Case, Warm};

/// Two epochs of ten steps.
const STEPS: u64 = 20;

#[test]
fn a_training_with_the_companion_is_bit_equal_to_one_without() {
    let Some(mut warm) = Warm::start() else { return };
    let case = Case { lora_dropout: 0.1, epochs: 1, ..Case::default() };
    let with = warm.train("with", &case);
    let without = warm.train("without", &Case { companion: false, ..case });
    assert_eq!((with.code, without.code), (Some(0), Some(0)), "{}", with.output);
    assert!(
        matches!(with.telemetry.preflight(), Some(Preflight::Passed { rows: 8, .. })),
        "{:?}",
        with.telemetry
    );
    assert_eq!(with.logged.len(), 10);
    assert_eq!(with.logged, without.logged, "loss, gradient and learning rate of every step");
    assert_eq!(with.trained, without.trained);
    assert!(with.weights(10) == without.weights(10), "the weights at the end");
    assert_eq!(with.telemetry.rows(), Some(320));
    assert_eq!(with.telemetry.errors(), [""; 0]);
    let time = with.telemetry.own_time().expect("it left its loop");
    // Nothing grossly slow; the real share (0.2 %) is in docs/measurements/companion.md.
    assert!(time.own_seconds <= 0.1 * time.step_seconds, "{time:?}");
}

/// The preflight encodes rows to find the longest ones.
#[test]
fn a_data_set_that_draws_and_replaces_rows_is_not_disturbed() {
    let Some(mut warm) = Warm::start() else { return };
    let case = Case {
        lora_dropout: 0.1,
        epochs: 1,
        plugins: &["drawing_rows.py"],
        args: &["--lazy_tokenize", "true", "--dataloader_num_workers", "0"],
        ..Case::default()
    };
    let with = warm.train("with", &case);
    let without = warm.train("without", &Case { companion: false, ..case });
    assert_eq!((with.code, without.code), (Some(0), Some(0)), "{}", with.output);
    assert!(with.output.contains("this row cannot be encoded"), "{}", with.output);
    assert!(matches!(with.telemetry.preflight(), Some(Preflight::Passed { .. })), "{:?}", with.telemetry);
    assert_eq!(with.trained, without.trained);
    assert_eq!(with.logged, without.logged);
}

#[test]
fn a_full_disk_takes_the_companions_words_and_nothing_else() {
    let Some(mut warm) = Warm::start() else { return };
    let case = Case { epochs: 1, plugins: &["full_disk.py"], ..Case::default() };
    let trained = warm.train("full", &case);
    assert_eq!(trained.code, Some(0), "{}", trained.output);
    assert_eq!(trained.logged.len(), 10);
    assert!(trained.telemetry.begin().is_none());
}

#[test]
fn room_is_taken_for_moments_that_are_known_to_come() {
    let Some(mut warm) = Warm::start() else { return };
    for (name, plugins, comes) in [("plain", &[][..], true), ("8bit", &["eight_bits.py"][..], false)] {
        let trained = warm.train(name, &Case { epochs: 1, plugins, ..Case::default() });
        assert_eq!(trained.code, Some(0), "{}", trained.output);
        let telemetry = std::fs::read_to_string(warm.env.path(&format!("{name}.telemetry"))).unwrap();
        let lines = telemetry.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let preflight = lines.into_iter().find(|line| line["kind"] == "preflight").expect("it ran");
        assert_eq!(preflight["ballast_bytes"].as_u64() > Some(0), comes, "{name}: {preflight}");
    }
}

#[test]
fn the_second_of_two_ranks_leaves_the_rescue_of_the_first() {
    let Some(mut warm) = Warm::start() else { return };
    let env = [("MHT_SIM_GROWTH_STEP", "7")];
    let died = warm.train("two", &Case { plugins: &["second_rank.py"], env: &env, ..Case::default() });
    assert_eq!(died.code, Some(1), "{}", died.output);
    let Some(Rescue::Saved { step: 6, path }) = died.telemetry.rescue() else {
        panic!("{:?}", died.telemetry)
    };
    assert!(path.join("trainer_state.json").exists());
    let telemetry = std::fs::read_to_string(warm.env.path("two.telemetry")).unwrap();
    assert_eq!(telemetry.matches("\"rescued\"").count(), 1, "{telemetry}");
    assert!(telemetry.contains("another rank has saved it"), "{telemetry}");
    let mut left = std::fs::read_dir(&died.dir).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!left.any(|name| name.to_string_lossy().starts_with("rescue-tmp")));
}

/// LoRA is shown by whole jobs (`an_oom_is_resumed_one_rung_lower_at_the_exact_row`).
#[test]
fn a_rescue_of_full_fine_tuning_is_exact_in_both_epochs() {
    let Some(mut warm) = Warm::start() else { return };
    let case = Case { train_type: "full", ..Case::default() };
    let whole = warm.train("whole", &case);
    for oom_step in [7u64, 17] {
        let growth = oom_step.to_string();
        let died = warm.train(
            &format!("died-{oom_step}"),
            &Case { env: &[("MHT_SIM_GROWTH_STEP", &growth)], ..case.clone() },
        );
        assert_eq!(died.code, Some(1));
        assert!(
            died.output.contains("torch.OutOfMemoryError: CUDA out of memory."),
            "as without the companion"
        );
        let Some(Rescue::Saved { step, path }) = died.telemetry.rescue() else {
            panic!("{:?}", died.telemetry)
        };
        assert_eq!(*step, oom_step - 1, "the last step that was finished");
        let resumed = warm.train(
            &format!("resumed-{oom_step}"),
            &Case { micro_batch: 4, accumulation: 8, resume: Some(path.clone()), ..case.clone() },
        );
        resumed.assert_continues(&whole, *step);
    }
}

#[test]
fn memory_may_run_out_anywhere_but_in_the_optimizer() {
    let Some(mut warm) = Warm::start() else { return };
    let eval = ["--val_dataset", "train.jsonl#32", "--eval_steps", "4"];
    for (place, at, step, args, rescued) in [
        ("backward", "backward", "4", &[][..], Some(3)),
        ("save", "save", "5", &[][..], Some(5)),
        ("eval", "eval", "4", &eval[..], Some(4)),
        ("optimizer", "optimizer", "4", &[][..], None),
        ("half-done", "optimizer_done", "4", &[][..], None),
    ] {
        let env = [("RAISE_OOM_AT", at), ("RAISE_OOM_STEP", step)];
        let died =
            warm.train(place, &Case { plugins: &["raise_oom.py"], env: &env, args, ..Case::default() });
        assert_eq!(died.code, Some(1), "{place}: {}", died.output);
        match (died.telemetry.rescue(), rescued) {
            (Some(Rescue::Saved { step, path }), Some(expected)) => {
                assert_eq!(*step, expected, "{place}");
                assert!(path.join("rescue.json").exists() && path.join("trainer_state.json").exists());
            }
            (Some(Rescue::Lost { why, .. }), None) => assert!(why.contains("different steps"), "{why}"),
            (other, _) => panic!("{place}: {other:?}"),
        }
    }
}

/// The rank that ran out of memory writes the checkpoint alone, while the other one waits in a collective.
#[test]
fn one_rank_of_two_rescues_what_both_have_trained() {
    let Some(mut warm) = Warm::start() else { return };
    let case = Case { epochs: 1, ..Case::default() };
    let whole = warm.train("whole", &case);
    let env = [("RAISE_OOM_AT", "backward"), ("RAISE_OOM_STEP", "7"), ("RAISE_OOM_RANK", "1")];
    let died = warm.train_on_two_ranks(
        "ranks",
        &Case { micro_batch: 4, accumulation: 4, plugins: &["raise_oom.py"], env: &env, ..case.clone() },
    );
    assert_eq!(died.code, Some(1), "{}", died.output);
    let begin = died.telemetry.begin().expect("alive");
    assert_eq!((begin.world_size, begin.wrapped.as_str()), (2, "DistributedDataParallel"));
    let Some(Rescue::Saved { step: 6, path }) = died.telemetry.rescue() else {
        panic!("{:?}\n{}", died.telemetry, died.output)
    };
    let resume = Some(path.clone());
    let resumed = warm.train("resumed", &Case { micro_batch: 4, accumulation: 8, resume, ..case });
    resumed.assert_continues(&whole, 6);
}

#[test]
fn a_rescue_that_is_killed_at_any_moment_leaves_no_broken_checkpoint() {
    let Some(mut warm) = Warm::start() else { return };
    let log = warm.env.path("kills.jsonl");
    let text = log.display().to_string();
    let env = [("KILL_STEP", "7"), ("KILL_LOG", text.as_str())];
    let died = warm.train("kills", &Case { plugins: &["rescue_kills.py"], env: &env, ..Case::default() });
    assert_eq!(died.code, Some(1), "{}", died.output);
    assert!(matches!(died.telemetry.rescue(), Some(Rescue::Saved { step: 6, .. })), "{:?}", died.telemetry);
    let mut found: BTreeMap<String, u32> = BTreeMap::new();
    for line in std::fs::read_to_string(log).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let left = line["left"].as_str().unwrap();
        assert!(!left.starts_with("broken"), "killed before {}: {left}", line["at"]);
        *found.entry(left.to_owned()).or_default() += 1;
    }
    println!("killed rescues left: {found:?}");
    assert!(found["partial"] >= 10 && found["whole"] >= 3, "moments before and after the rename: {found:?}");
    assert!(found.values().sum::<u32>() >= 30, "{found:?}");
}

#[test]
fn a_stop_file_saves_at_the_end_of_the_step_and_what_follows_is_exact() {
    let Some(mut warm) = Warm::start() else { return };
    let whole = warm.train("whole", &Case { epochs: 1, ..Case::default() });
    std::fs::write(warm.stop_file("stopped"), "").unwrap();
    let stopped = warm.train("stopped", &Case { epochs: 1, ..Case::default() });
    assert_eq!(stopped.code, Some(0), "the exit code does not tell it from an end");
    assert_eq!((stopped.telemetry.stopped_at(), stopped.telemetry.saved_step()), (Some(1), Some(1)));
    let resumed = warm.train(
        "resumed",
        &Case { epochs: 1, resume: Some(stopped.dir.join("checkpoint-1")), ..Case::default() },
    );
    assert_eq!(resumed.telemetry.stopped_at(), None);
    resumed.assert_continues(&whole, 1);
}

#[test]
fn parts_are_switched_off_by_a_variable() {
    let Some(mut warm) = Warm::start() else { return };
    let env = [("MHTRAIND_COMPANION_OFF", "preflight, rescue"), ("MHT_SIM_GROWTH_STEP", "3")];
    let died = warm.train("off", &Case { env: &env, ..Case::default() });
    assert_eq!((died.code, died.telemetry.preflight()), (Some(1), None));
    assert_eq!(died.telemetry.begin().expect("alive").parts, ["cures", "stop"]);
    assert!(matches!(died.telemetry.rescue(), Some(Rescue::Lost { step: 2, .. })));
    assert!(!died.dir.join("checkpoint-2").exists());
}

#[test]
fn a_job_that_does_not_fit_dies_in_the_preflight_and_goes_on_a_rung_lower() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({}), 1);
    // The growth is there from the first step on: eight rows of the longest never fit.
    lab.run(&["run", "job.json"], &[("MHT_SIM_GROWTH_STEP", "1")]).expect(0);
    let receipt = lab.receipt();
    let attempts = receipt["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!(attempts[0]["diagnosis"]["kind"], "device_oom");
    assert_eq!(attempts[0]["diagnosis"]["phase"], "train");
    assert_eq!(attempts[0]["last_step"], Value::Null);
    assert_eq!(attempts[1]["tier"]["micro_batch"], 4);
    assert_eq!(receipt["warnings"], json!([]));
    assert!(
        lab.trained(1).len() == 10,
        "no step was trained before: the first that trained is the second attempt"
    );
}

#[test]
fn a_stopped_job_is_cancelled_and_goes_on_from_its_stop() {
    let Some(lab) = Lab::new() else { return };
    lab.job(json!({}), 1);
    let stop = lab.env.path("out/.mhtraind/attempt-1/stop-after-step");
    let child = lab.command(&["run", "job.json"], &[]).stdout(Stdio::null()).spawn().unwrap();
    lab.wait_for_step(1, 2);
    std::fs::write(stop, "").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let receipt = lab.receipt();
    assert_eq!(
        (&receipt["state"], &receipt["reason"]),
        (&json!("cancelled"), &json!("stopped by its stop file"))
    );
    let last_step = receipt["attempts"][0]["last_step"].as_u64().unwrap();
    assert!((2..10).contains(&last_step), "{last_step}");
    lab.run(&["run", "job.json", "--continue"], &[]).expect(0);
    let receipt = lab.receipt();
    let resume = receipt["attempts"].as_array().unwrap().last().unwrap()["resume"].clone();
    assert_eq!((&resume["from_step"], &resume["steps_repeated"]), (&json!(last_step), &json!(0)));
}

#[test]
fn a_companion_that_cannot_be_installed_is_missed_by_the_receipt_alone() {
    let Some(lab) = Lab::new() else { return };
    let plugin = crate::environment::root().join("tests/trainer/broken_metadata.py");
    std::fs::copy(plugin, lab.env.path("broken_metadata.py")).unwrap();
    let plugins = ["row_order.py", "simulated_capacity.py", "broken_metadata.py"];
    lab.job(json!({"args": {"external_plugins": plugins}}), 1);
    lab.run(&["run", "job.json"], &[]).expect(0);
    let receipt = lab.receipt();
    let warnings = receipt["warnings"].to_string();
    assert!(warnings.contains("training ran without the companion"), "{warnings}");
    assert!(warnings.contains("the metadata of ms-swift cannot be read"), "{warnings}");
    assert_eq!((&receipt["proof"], &receipt["proof_facts"]["rows"]), (&json!("rows"), &json!(320)));
    assert_eq!(lab.trained(1).len(), 10, "the job's own plugins worked");
}

/// Every place of an OOM, every smaller micro-batch, data that do and do not fill the last step. Only with
/// `cargo xtask test --full`: some minutes a line. What was measured is in `docs/measurements/companion.md`.
#[test]
fn the_large_matrix() {
    if std::env::var_os("MHTRAIND_TEST_FULL").is_none() {
        println!("skipped: `cargo xtask test --full` runs it");
        return;
    }
    let Some(mut warm) = Warm::start() else { return };
    let mut table = String::from(
        "| method | rows | OOM in step | rescued | resumed as | steps | same rows | learning rate | largest difference of a loss |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for train_type in ["lora", "full"] {
        for rows in [320, 310] {
            let case = Case { train_type, rows, ..Case::default() };
            let whole = warm.train(&format!("{train_type}-{rows}"), &case);
            for oom_step in [2u64, 7, 11, 13, 17, STEPS] {
                let name = format!("{train_type}-{rows}-{oom_step}");
                let growth = oom_step.to_string();
                let died =
                    warm.train(&name, &Case { env: &[("MHT_SIM_GROWTH_STEP", &growth)], ..case.clone() });
                let done = oom_step - 1;
                let how = match died.telemetry.rescue() {
                    Some(Rescue::Saved { step, .. }) if *step == done => "rescue",
                    Some(Rescue::Needless { step }) if *step == done => "regular checkpoint",
                    other => panic!("{name}: {other:?}"),
                };
                for (micro_batch, accumulation) in [(4, 8), (2, 16), (1, 32)] {
                    let resume = Some(died.dir.join(format!("checkpoint-{done}")));
                    let resumed = warm.train(
                        &format!("{name}-{micro_batch}"),
                        &Case { micro_batch, accumulation, resume, ..case.clone() },
                    );
                    let largest = resumed.assert_continues(&whole, done);
                    let steps = resumed.trained.len();
                    writeln!(
                        table,
                        "| {train_type} | {rows} | {oom_step} | step {done}, {how} | {micro_batch}x{accumulation} | \
                         {steps} | {steps} of {steps} | equal | {largest:.1e} |"
                    )
                    .unwrap();
                }
            }
        }
    }
    println!("{table}");
    if let Some(file) = std::env::var_os("MHTRAIND_TEST_TABLE") {
        std::fs::write(file, table).unwrap();
    }
}
