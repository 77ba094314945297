//! `mhtraind import`: real people's shell blocks become job files.

use crate::environment::TestEnv;

fn import(env: &TestEnv, text: &str, args: &[&str]) -> crate::environment::Ran {
    let mut words = vec!["import", "-"];
    words.extend(args);
    env.run_with_input(&words, text.as_bytes())
}

#[test]
fn quotes_comments_variables_and_other_commands_are_understood() {
    let env = TestEnv::new();
    let text = r#"#!/bin/bash
set -e
# my run
export MODEL='Qwen/Qwen2.5-7B-Instruct'
DATA="a.jsonl"
cd /data/project
pip list > /dev/null
nohup env CUDA_VISIBLE_DEVICES=3 swift sft \
    --model "$MODEL" \
    --tuner_type lora `# comment` \
    --dataset ${DATA} 'b c.jsonl' \
    --lora_rank=16 \
    --some_new_flag yes \
    --weight_decay -0.1 > train.log 2>&1 &
"#;
    let job = import(&env, text, &["--pin"]).expect(0).json();
    assert_eq!(job["model"], "Qwen/Qwen2.5-7B-Instruct");
    assert_eq!(job["dataset"], serde_json::json!(["a.jsonl", "b c.jsonl"]));
    assert_eq!(job["device"], 3);
    assert_eq!(job["args"]["lora_rank"], 16);
    assert_eq!(job["args"]["some_new_flag"], "yes");
    assert_eq!(job["args"]["weight_decay"], -0.1);
}

#[test]
fn what_import_prints_is_a_job_that_plan_accepts() {
    let env = TestEnv::new();
    let text = "swift sft --model Qwen/Qwen2.5-7B-Instruct --dataset org/data --train_type lora --learning_rate 5e-4";
    let job = import(&env, text, &[]).expect(0).stdout;
    env.write("job.json", job);
    env.run(&["plan", "job.json", "--json", "--gpu-free", "80GiB", "--flash-attn", "yes"]).expect(0);
}

#[test]
fn secrets_are_moved_out_and_never_shown() {
    let env = TestEnv::new();
    let text = "export SWANLAB_TOKEN=canary-1\nHF_TOKEN=canary-2 swift sft --model m/m --dataset d/d --report_to swanlab --swanlab_token canary-3";
    for args in [&[][..], &["--pin"][..]] {
        let ran = import(&env, text, args).expect(0);
        assert!(
            !ran.stdout.contains("canary") && !ran.stderr.contains("canary"),
            "{}{}",
            ran.stdout,
            ran.stderr
        );
        let secrets = ran.json()["secrets"].to_string();
        assert!(secrets.contains("SWANLAB_API_KEY"), "{secrets}");
    }
}

#[test]
fn of_several_calls_one_can_be_chosen() {
    let env = TestEnv::new();
    let text = "swift sft --model a/one-7B --dataset d\nswift export --adapters x\nswift sft --model a/two-7B --dataset d\n";
    let ran = import(&env, text, &[]).expect(2);
    assert!(ran.stderr.contains("lines 1, 3") && ran.stderr.contains("--call"), "{}", ran.stderr);
    assert_eq!(import(&env, text, &["--call", "2"]).expect(0).json()["model"], "a/two-7B");
    let ran = import(&env, text, &["--call", "3", "--json"]).expect(2);
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["code"], "bad_block");
}

#[test]
fn text_without_swift_sft_is_refused() {
    let env = TestEnv::new();
    for text in ["", "echo hello\n", "swift infer --model x\n", "\u{feff}"] {
        let ran = import(&env, text, &[]).expect(2);
        assert!(ran.stderr.contains("swift sft"), "{}", ran.stderr);
    }
}
