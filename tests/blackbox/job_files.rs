//! Bad job files: one clear error each, exit 2, nothing started and nothing left behind.

use serde_json::json;

use crate::environment::TestEnv;

/// Runs `run` and `plan` on a bad job file; both must refuse it with `word` in the message.
#[track_caller]
fn refused(content: impl AsRef<[u8]>, word: &str) {
    let env = TestEnv::new();
    env.write("job.json", content);
    for command in [&["run", "job.json"][..], &["plan", "job.json", "--gpu-free", "80GiB"][..]] {
        let ran = env.run(command).expect(2);
        assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
        assert_eq!(ran.stderr.matches("error: ").count(), 1, "one error: {}", ran.stderr);
        assert!(ran.stderr.contains(word), "{word:?} is missing in: {}", ran.stderr);
    }
    let left: Vec<_> = std::fs::read_dir(env.path(".")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["job.json"], "nothing may be left behind");
}

fn job(key: &str, value: serde_json::Value) -> String {
    let mut job = json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"});
    job[key] = value;
    job.to_string()
}

#[test]
fn text_that_is_no_job() {
    refused("", "JSON");
    refused("{", "JSON");
    refused("[1, 2]", "object");
    refused(vec![b'x'; 10 << 20], "JSON");
    refused(vec![b' '; (10 << 20) + 1], "10 MiB");
    refused(b"{\"model\": \"\xff\xfe\"}", "UTF-8");
    refused("{}", "model");
    refused(r#"{"model": "a/b-7B", "dataset": "a", "model": "a/c-7B"}"#, "`model` twice");
    refused(
        r#"{"model": "a/b-7B", "dataset": "a", "args": {"lora_rank": 8, "lora_rank": 9}}"#,
        "`lora_rank` twice",
    );
    refused(r#"{"model": "Qwen/Qwen2.5-7B-Instruct"}"#, "dataset");
}

#[test]
fn wrong_types_and_ranges() {
    refused(job("model", json!(7)), "model");
    refused(job("devices", json!(-1)), "devices");
    refused(job("length", json!(-5)), "length");
    refused(job("min_effective_batch", json!(0)), "min_effective_batch");
    refused(job("train_type", json!("loora")), "lora");
    refused(job("validation", json!(1.5)), "validation");
    refused(job("time_limit", json!("soon")), "time_limit");
    refused(job("args", json!({"learning_rate": "fast"})), "learning_rate");
    refused(job("args", json!({"per_device_train_batch_size": -8})), "per_device_train_batch_size");
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    refused(job("modle", json!("x")), "model");
    refused(job("allow", json!({"shorter_maxlength": true})), "shorter_max_length");
}

#[test]
fn both_pins_under_the_minimum_say_both_numbers() {
    let pins = json!({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8});
    refused(job("args", pins.clone()), "16");
    refused(job("args", pins), "32");
}

#[test]
fn secrets_in_clear_are_refused_and_not_repeated() {
    for (key, value) in [
        ("args", json!({"swanlab_token": "canary-1"})),
        ("env", json!({"SWANLAB_API_KEY": "canary-1"})),
        ("env", json!({"HF_TOKEN": "canary-1"})),
    ] {
        let env = TestEnv::new();
        env.write("job.json", job(key, value));
        let ran = env.run(&["run", "job.json"]).expect(2);
        assert!(!ran.stderr.contains("canary"), "{}", ran.stderr);
        assert!(ran.stderr.contains("secrets"), "{}", ran.stderr);
    }
}

#[test]
fn missing_local_files_are_found_before_anything_starts() {
    refused(json!({"model": "./no/such/model", "dataset": "org/data"}).to_string(), "./no/such/model");
}

#[test]
fn what_is_out_of_scope_is_refused_by_name() {
    refused(job("devices", json!(2)), "more than one device");
    refused(job("after", json!([3])), "does not wait");
    refused(job("device", json!("MIG-4711")), "MIG");
}

#[test]
fn a_missing_job_file_ends_with_2() {
    let env = TestEnv::new();
    for command in ["run", "plan"] {
        let ran = env.run(&[command, "nowhere.json"]).expect(2);
        assert!(ran.stderr.contains("nowhere.json"), "{}", ran.stderr);
    }
}
