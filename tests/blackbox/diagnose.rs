//! `mhtraind diagnose`: the shape that scripts read.

use crate::environment::TestEnv;

const OOM: &str = "Train:  10%|#         | 3/30 [00:09<01:21,  3.0s/it]\r\nTraceback (most recent call last):\n  File \"/x/swift/cli/sft.py\", line 10, in <module>\n    sft_main()\n  File \"/x/transformers/trainer.py\", line 2, in training_step\n    loss = self.compute_loss(model, inputs)\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB of which 1.00 GiB is free. Including non-PyTorch memory, this process has 22.50 GiB memory in use. Of the allocated memory 20.00 GiB is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated.\n";

#[test]
fn an_oom_is_told_with_its_numbers() {
    let env = TestEnv::new();
    env.write("train.log", OOM);
    let answer = env.run(&["diagnose", "train.log", "--json", "--exit-code", "1"]).expect(0).json();
    assert_eq!(answer["kind"], "device_oom");
    assert_eq!(answer["fatal"], true);
    assert_eq!(answer["certain"], true);
    assert_eq!(answer["answer"], "lower_tier");
    assert_eq!(answer["evidence"]["tried_bytes"], 2u64 << 30);
    assert_eq!(answer["evidence"]["total_bytes"], 24u64 << 30);
    assert_eq!(answer["evidence"]["free_bytes"], 1u64 << 30);
    assert!(answer["evidence"]["line"].as_str().unwrap().contains("CUDA out of memory"));
}

#[test]
fn a_log_can_come_through_a_pipe_and_be_any_bytes() {
    let env = TestEnv::new();
    let answer = env.run_with_input(&["diagnose", "-", "--json"], OOM.as_bytes()).expect(0).json();
    assert_eq!(answer["kind"], "device_oom");
    let noise: Vec<u8> = (0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let answer = env.run_with_input(&["diagnose", "-", "--json"], &noise).expect(0).json();
    assert_eq!(answer["kind"], "unknown");
    assert_eq!(answer["answer"], "stop");
}

#[test]
fn a_bare_signal_9_is_not_certain_and_lowers_no_tier() {
    let env = TestEnv::new();
    env.write("train.log", "Train:  10%|#         | 3/30 [00:09<01:21,  3.0s/it]");
    let answer = env.run(&["diagnose", "train.log", "--json", "--exit-code", "-9"]).expect(0).json();
    assert_eq!(answer["certain"], false);
    assert_eq!(answer["answer"], "resume");
}

#[test]
fn a_missing_log_ends_with_2() {
    let env = TestEnv::new();
    let ran = env.run(&["diagnose", "no.log"]).expect(2);
    assert!(ran.stderr.contains("no.log"), "{}", ran.stderr);
}

#[test]
fn an_empty_log_is_an_error_for_people_unless_the_exit_code_says_something() {
    let env = TestEnv::new();
    env.write("train.log", "\n");
    let ran = env.run(&["diagnose", "train.log"]).expect(2);
    assert!(
        ran.stderr.contains("train.log is empty") && ran.stderr.contains("--exit-code"),
        "{}",
        ran.stderr
    );
    let answer = env.run_with_input(&["diagnose", "-", "--json"], b"").expect(0).json();
    assert_eq!(answer["kind"], "unknown");
    let answer = env.run(&["diagnose", "train.log", "--json", "--exit-code", "-9"]).expect(0).json();
    assert_eq!(answer["answer"], "resume");
}
