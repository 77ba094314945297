//! What is tried after each kind of death, through `mhtraind run`: the answer that was given and not only its name.
//!
//! Deaths that a machine without a GPU can have for real are in `tests/trainer/failures.rs`. The words of the others
//! are played here by the fake trainer, in the forms that torch, ms-swift and the hubs' clients print them.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::environment::{CARD, FakeHost, Ran, root};

const GIB: u64 = 1 << 30;

/// A card on which the class's own batch of 8 x 4 fits.
fn host() -> FakeHost {
    let host = FakeHost::with_card(80 * GIB);
    host.job(json!({}));
    host
}

fn attempts(receipt: &Value) -> &Vec<Value> {
    receipt["attempts"].as_array().expect("attempts")
}

/// Asserts how an attempt ended, and that the next one has the same rung.
#[track_caller]
fn assert_same_rung_after(receipt: &Value, attempt: usize, kind: &str) {
    let [ended, next] = [&attempts(receipt)[attempt - 1], &attempts(receipt)[attempt]];
    assert_eq!(ended["diagnosis"]["kind"], kind, "{ended:#}");
    assert_eq!(ended["tier"], next["tier"], "the rung stays");
}

/// Returns what the fake trainer of an attempt was called with: `argv`, names of the `environment`, some `settings`.
fn called(host: &FakeHost, attempt: u32) -> Value {
    let path = host.env.path(&format!("out/attempt-{attempt}/fake-argv.json"));
    serde_json::from_str(&std::fs::read_to_string(path).expect("it was started")).expect("JSON")
}

/// Returns the value of a flag.
fn flag(host: &FakeHost, attempt: u32, name: &str) -> Option<String> {
    let called = called(host, attempt);
    let words: Vec<&str> = called["argv"].as_array()?.iter().filter_map(Value::as_str).collect();
    let at = words.iter().position(|word| *word == name)?;
    Some((*words.get(at + 1)?).to_owned())
}

/// Adds lines to the `[attempt]` settings, the last table of the file.
fn set(host: &FakeHost, line: &str) {
    let path = host.env.path("mhtraind.toml");
    let settings = std::fs::read_to_string(path).expect("settings");
    host.env.write("mhtraind.toml", format!("{settings}{line}\n"));
}

fn traceback(frames: &str, error: &str) -> String {
    format!("Traceback (most recent call last):\n{frames}\n{error}")
}

#[test]
fn rungs_that_the_numbers_of_the_oom_rule_out_are_skipped() {
    let host = host();
    // 8 rows are said to need 320 GiB: 4 rows would need about half of it, 2 rows as much as the whole card.
    let oom = json!({"oom": {"capacity_gib": 80, "base_gib": 8, "per_sample_gib": 39, "at_step": 5}});
    let ran = host.run(&["run", "job.json"], oom).expect(0);
    let receipt = host.receipt();
    let tried: Vec<_> = attempts(&receipt).iter().map(|attempt| &attempt["tier"]["micro_batch"]).collect();
    assert_eq!(tried, [8, 1], "{}", ran.stdout);
    let ladder: Vec<_> = receipt["rungs"].as_array().unwrap().iter().map(|rung| &rung["tier"]).collect();
    for skipped in [4, 2] {
        assert!(ladder.iter().any(|tier| tier["micro_batch"] == skipped), "{skipped} is a rung");
    }
    assert!(ran.stdout.contains("skipped"), "{}", ran.stdout);
}

#[test]
fn a_lack_of_memory_that_is_only_probable_costs_one_rung_and_no_more() {
    let host = host();
    let scenario = json!({"oom": {"capacity_gib": 80, "base_gib": 90, "at_step": 2, "kind": "cublas"}});
    let ran = host.run(&["run", "job.json"], scenario).expect(1);
    let receipt = host.receipt();
    let tried: Vec<_> = attempts(&receipt).iter().map(|attempt| &attempt["tier"]["micro_batch"]).collect();
    assert_eq!(tried, [8, 4]);
    assert!(ran.stdout.contains("nothing proves it"), "{}", ran.stdout);
}

/// Lets somebody else hold so much of the card.
fn hold(host: &FakeHost, bytes: u64) {
    let mut device = nvml_sim::SimDevice::idle(CARD, "Simulated GPU", 80 * GIB, "8.0");
    device.used = bytes;
    nvml_sim::SimFile::new(vec![device]).write_atomically(&host.env.path("nvml.json")).unwrap();
}

/// A neighbour takes the card while the first attempt trains, and memory runs out in step 5.
fn neighbour() -> Value {
    let oom = json!({"capacity_gib": 80, "base_gib": 90, "at_step": 5, "kind": "neighbour"});
    json!({"attempts": {"1": {"step_seconds": 0.2, "oom": oom}}})
}

#[test]
fn what_a_neighbour_took_is_waited_for_and_the_same_rung_goes_on() {
    let host = host();
    let mut child = host
        .command(&["run", "job.json"], &neighbour())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let wait_until = |what: &str, condition: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < until, "waited 30 s for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_until("a step", &|| !host.trained(1).is_empty());
    hold(&host, 79 * GIB);
    let journal = || std::fs::read_to_string(host.env.path("out/.mhtraind/journal.jsonl")).unwrap();
    wait_until("the wait", &|| journal().contains("\"waiting\""));
    // Longer than a look at the card takes.
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!host.env.path("out/attempt-2").exists(), "nothing is started on a full card");
    hold(&host, 0);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 1, "device_oom_by_neighbour");
    assert_eq!((&attempts(&receipt)[1]["resume"]["from_step"], attempts(&receipt).len()), (&json!(3), 2));
}

/// The job was planned beside it: to wait for memory that was never there would end in the same death.
#[test]
fn a_neighbour_that_was_there_before_is_not_waited_for() {
    let host = host();
    hold(&host, 59 * GIB);
    let oom =
        json!({"capacity_gib": 80, "base_gib": 81, "per_sample_gib": 0, "at_step": 5, "kind": "neighbour"});
    let ran = host.run(&["run", "job.json"], json!({"attempts": {"1": {"oom": oom}}})).expect(0);
    let receipt = host.receipt();
    let [ended, next] = [&attempts(&receipt)[0], &attempts(&receipt)[1]];
    assert_eq!(ended["diagnosis"]["kind"], "device_oom", "{}", ran.stdout);
    assert_ne!(ended["tier"], next["tier"], "a lower rung: {}", ran.stdout);
}

#[test]
fn a_neighbour_that_stays_ends_the_job_with_both_numbers() {
    let host = host();
    set(&host, "neighbour_wait_min = 0");
    let mut child = host.command(&["run", "job.json"], &neighbour()).stdout(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while host.trained(1).is_empty() {
        assert!(Instant::now() < until, "it trains");
        std::thread::sleep(Duration::from_millis(20));
    }
    hold(&host, 79 * GIB);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let receipt = host.receipt();
    let reason = receipt["reason"].as_str().unwrap();
    assert!(reason.contains("did not become free in time: 1.00 GiB free"), "{reason}");
    assert!(receipt["help"].as_str().unwrap().contains("start it again"), "{receipt:#}");
}

#[test]
fn host_memory_costs_workers_until_there_are_none() {
    let host = host();
    let scenario = json!({"oom": {"capacity_gib": 1, "base_gib": 8, "at_step": 4, "kind": "host_worker"}});
    let ran = host.run(&["run", "job.json"], scenario).expect(1);
    let receipt = host.receipt();
    let workers: Vec<u32> = (1..=attempts(&receipt).len())
        .map(|attempt| {
            let attempt = u32::try_from(attempt).unwrap();
            flag(&host, attempt, "--dataloader_num_workers").unwrap().parse().unwrap()
        })
        .collect();
    assert!(workers.len() > 1 && workers.is_sorted_by(|a, b| a > b), "{workers:?}");
    assert_eq!(workers.last(), Some(&0));
    assert_same_rung_after(&receipt, 1, "host_oom");
    assert!(ran.stdout.contains("free host memory"), "{}", ran.stdout);
}

/// What `requests` ends in when nobody answers.
const NO_NETWORK: &str = "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='hub.example', port=443): Max \
                          retries exceeded with url: /api/models/m (Caused by NameResolutionError('Failed to resolve'))";

#[test]
fn the_network_is_waited_for_longer_each_time_and_at_last_given_up() {
    let host = host();
    set(&host, "network_backoff_s = 1");
    let fail = json!({"at_step": 5, "text": traceback("  File \"hub.py\", line 3, in get", NO_NETWORK)});
    let began = Instant::now();
    let scenario = json!({"attempts": {"1": {"fail": fail}, "2": {"fail": fail}}});
    let ran = host.run(&["run", "job.json"], scenario).expect(0);
    assert!(began.elapsed() >= Duration::from_secs(3), "1 s and 2 s");
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 1, "network");
    assert_same_rung_after(&receipt, 2, "network");
    assert_eq!(attempts(&receipt)[2]["resume"]["from_step"], 3);
    assert!(ran.stdout.contains("waiting 1 s") && ran.stdout.contains("waiting 2 s"), "{}", ran.stdout);

    host.env.write(
        "mhtraind.toml",
        std::fs::read_to_string(host.env.path("mhtraind.toml"))
            .unwrap()
            .replace("backoff_s = 1", "backoff_s = 0"),
    );
    host.run(&["run", "job.json", "--fresh"], json!({"fail": fail})).expect(1);
    let receipt = host.receipt();
    assert_eq!(attempts(&receipt).len(), 6, "five waits");
    assert!(receipt["help"].as_str().unwrap().contains("proxy"), "{receipt:#}");
}

#[test]
fn the_time_of_a_job_goes_on_while_it_waits_and_no_attempt_begins_after_it() {
    let host = host();
    set(&host, "network_backoff_s = 3600");
    let fail = json!({"at_step": 5, "text": traceback("  File \"hub.py\", line 3, in get", NO_NETWORK)});
    host.job(json!({"time_limit": "4s"}));
    let ran = host.run(&["run", "job.json"], json!({"fail": fail})).expect(1);
    assert!(ran.stdout.contains("until the next try"), "{}", ran.stdout);
    let receipt = host.receipt();
    assert_eq!((&receipt["state"], attempts(&receipt).len()), (&json!("failed"), 1), "{receipt:#}");
    assert!(receipt["reason"].as_str().unwrap().contains("time limit of 4 s"), "{receipt:#}");
}

#[test]
fn a_port_in_use_is_answered_with_another_one() {
    let host = host();
    let text = traceback(
        "  File \"torch/distributed/rendezvous.py\", line 189, in _create_c10d_store",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: \
         29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    );
    let fail = json!({"at_step": 1, "text": text});
    host.run(&["run", "job.json"], json!({"attempts": {"1": {"fail": fail}, "2": {"fail": fail}}})).expect(0);
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 1, "communication");
    let ports: Vec<Value> =
        (1..=3).map(|attempt| called(&host, attempt)["settings"]["MASTER_PORT"].clone()).collect();
    assert_eq!(ports[0], Value::Null, "the first has the launcher's own");
    assert!(ports[1].is_string() && ports[2].is_string() && ports[1] != ports[2], "{ports:?}");
    let bound = host.run(&["run", "job.json", "--fresh"], json!({"fail": fail})).expect(1);
    assert_eq!(attempts(&host.receipt()).len(), 4, "three other ports: {}", bound.stdout);
}

#[test]
fn a_checkpoint_that_cannot_be_read_is_passed_over_for_the_one_before() {
    let host = host();
    let text = traceback(
        "  File \"torch/serialization.py\", line 1484, in load",
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    );
    let scenario =
        json!({"attempts": {"1": {"kill": {"at_step": 8}}, "2": {"fail": {"at_step": 7, "text": text}}}});
    host.run(&["run", "job.json"], scenario).expect(0);
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 2, "checkpoint_corrupt");
    let from: Vec<_> = attempts(&receipt).iter().map(|attempt| &attempt["resume"]["from_step"]).collect();
    assert_eq!(from, [&Value::Null, &json!(6), &json!(3)]);
    assert_eq!(attempts(&receipt)[2]["resume"]["steps_repeated"], 4, "steps 4 to 7 were done before");
}

#[test]
fn memory_that_runs_out_in_an_evaluation_makes_its_batch_smaller_and_no_rung() {
    let oom = json!({"capacity_gib": 80, "base_gib": 90, "at_step": 5, "kind": "eval"});
    let host = host();
    // The built-in ladder evaluates one row at a time, as the recipe says; this site does more.
    let tiers = std::fs::read_to_string(root().join("config/tiers.toml")).unwrap();
    let one = "\nper_device_eval_batch_size = 1\n";
    assert!(tiers.contains(one));
    host.env.write("tiers.toml", tiers.replace(one, "\nper_device_eval_batch_size = 8\n"));
    set(&host, &format!("[sizing]\ntiers = {:?}", host.env.path("tiers.toml")));
    host.job(json!({"validation": 0.1}));
    host.run(&["run", "job.json"], json!({"attempts": {"1": {"oom": oom}}})).expect(0);
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 1, "device_oom");
    assert_eq!(attempts(&receipt)[0]["diagnosis"]["phase"], "eval");
    let name = "--per_device_eval_batch_size";
    assert_eq!((flag(&host, 1, name).as_deref(), flag(&host, 2, name).as_deref()), (Some("8"), Some("1")));

    host.job(json!({"validation": 0.1, "args": {"save_steps": 3, "num_train_epochs": 1, "per_device_eval_batch_size": 4}}));
    let ran = host.run(&["run", "job.json", "--fresh"], json!({"oom": oom})).expect(1);
    assert!(ran.stdout.contains("the job pins its batch"), "{}", ran.stdout);
    assert_eq!(attempts(&host.receipt()).len(), 1);
}

#[test]
fn a_divergence_goes_back_to_the_weights_from_before_it_unless_that_is_forbidden() {
    let host = host();
    host.job(
        json!({"args": {"save_steps": 3, "save_total_limit": 10, "logging_steps": 1, "num_train_epochs": 1}}),
    );
    host.run(&["run", "job.json"], json!({"attempts": {"1": {"diverge_at_step": 5}}})).expect(0);
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 1, "diverged");
    let resume = &attempts(&receipt)[1]["resume"];
    assert_eq!((&resume["kind"], &resume["from_step"]), (&json!("weights_only"), &json!(3)));
    for (name, value) in [("--learning_rate", "1e-4"), ("--warmup_ratio", "0.15"), ("--max_grad_norm", "0.5")]
    {
        assert_eq!(flag(&host, 2, name).as_deref(), Some(value), "{name}");
    }

    let pinned = json!({"args": {"logging_steps": 1, "num_train_epochs": 1, "learning_rate": 3e-4}});
    let forbidden = json!({"allow": {"recipe_stable": false}});
    for (job, help) in [(pinned, "args.learning_rate"), (forbidden, "\"learning\": \"stable\"")] {
        host.job(job);
        host.run(&["run", "job.json", "--fresh"], json!({"diverge_at_step": 5})).expect(1);
        let receipt = host.receipt();
        assert_eq!(attempts(&receipt).len(), 1);
        assert!(receipt["help"].as_str().unwrap().contains(help), "{receipt:#}");
    }
}

/// Until its end, newer checkpoints would have replaced all from before.
#[test]
fn a_divergence_is_ended_before_the_good_checkpoints_are_replaced() {
    let host = host();
    let args = json!({"save_steps": 3, "save_total_limit": 3, "logging_steps": 1, "num_train_epochs": 4});
    host.job(json!({"args": args}));
    let scenario =
        json!({"step_seconds": 0.3, "attempts": {"1": {"diverge_at_step": 5, "step_seconds": 0.3}}});
    host.run(&["run", "job.json"], scenario).expect(0);
    let receipt = host.receipt();
    let first = &attempts(&receipt)[0];
    assert_eq!(first["diagnosis"]["kind"], "diverged");
    assert!(first["last_step"].as_u64() < first["max_steps"].as_u64(), "{first:#}");
    let resume = &attempts(&receipt)[1]["resume"];
    assert_eq!((&resume["kind"], &resume["from_step"]), (&json!("weights_only"), &json!(3)));
}

#[test]
fn memory_in_pieces_is_answered_by_another_allocator_at_the_same_rung() {
    let host = host();
    let oom = json!({"capacity_gib": 80, "base_gib": 90, "at_step": 5, "kind": "fragmented"});
    let scenario = json!({"attempts": {"1": {"oom": oom}}});
    // Switched off by the surroundings, say a profile of the shell: no wish of this job.
    let mut command = host.command(&["run", "job.json"], &scenario);
    command.env("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:False");
    Ran::from(command.output().unwrap()).expect(0);
    let receipt = host.receipt();
    assert_same_rung_after(&receipt, 1, "device_oom");
    assert_eq!(attempts(&receipt)[1]["adjustments"], json!(["expandable_segments"]));
    let settings = |attempt| called(&host, attempt)["settings"]["PYTORCH_CUDA_ALLOC_CONF"].clone();
    assert_eq!(settings(1), "max_split_size_mb:512,expandable_segments:False");
    assert_eq!(settings(2), "max_split_size_mb:512,expandable_segments:True");

    // What the job itself says stays, and where they are on they are no answer: the next rung is.
    for env in [json!({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}), json!({})] {
        host.job(json!({"env": env}));
        host.run(&["run", "job.json", "--fresh"], scenario.clone()).expect(0);
        let receipt = host.receipt();
        assert_ne!(attempts(&receipt)[0]["tier"], attempts(&receipt)[1]["tier"]);
        assert_eq!(attempts(&receipt)[1]["adjustments"], json!([]));
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_numbers() {
    let host = host();
    let oom = json!({"oom": {"capacity_gib": 80, "base_gib": 90, "kind": "load"}});
    host.run(&["run", "job.json"], oom).expect(1);
    let receipt = host.receipt();
    assert_eq!(attempts(&receipt).len(), 1, "no rung has smaller weights");
    assert_eq!(attempts(&receipt)[0]["diagnosis"]["phase"], "load");
    let reason = receipt["reason"].as_str().unwrap();
    assert!(reason.contains("weights alone take") && reason.contains("asked for 10.00 GiB"), "{reason}");
    assert!(receipt["help"].as_str().unwrap().contains("qlora"), "{receipt:#}");
}

#[test]
fn a_model_that_does_not_fit_is_packed_into_4_bits_where_the_job_allows_it() {
    let host = host();
    let python = std::fs::read_dir(host.env.path("trainer/lib")).unwrap().next().unwrap().unwrap();
    let package = python.path().join("site-packages/bitsandbytes-0.49.0.dist-info");
    std::fs::create_dir(&package).unwrap();
    std::fs::write(package.join("METADATA"), "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.49.0\n")
        .unwrap();
    host.job(json!({"allow": {"quantize": true}}));
    let oom = json!({"capacity_gib": 80, "base_gib": 90, "kind": "load"});
    host.run(&["run", "job.json"], json!({"attempts": {"1": {"oom": oom}}})).expect(0);
    let receipt = host.receipt();
    let second = &attempts(&receipt)[1];
    assert_eq!((&second["tier"]["name"], &second["tier"]["quant_bits"]), (&json!("quantized"), &json!(4)));
    assert_eq!(
        (flag(&host, 1, "--quant_bits"), flag(&host, 2, "--quant_bits").as_deref()),
        (None, Some("4"))
    );
    assert_eq!(attempts(&receipt).len(), 2);
}

#[test]
fn memory_that_runs_out_in_a_save_stops_since_no_batch_helps() {
    let host = host();
    let oom = json!({"oom": {"capacity_gib": 80, "base_gib": 90, "at_step": 3, "kind": "save"}});
    let ran = host.run(&["run", "job.json"], oom).expect(1);
    assert_eq!(attempts(&host.receipt()).len(), 1);
    assert!(ran.stdout.contains("a smaller batch does not help here"), "{}", ran.stdout);
}

/// Kind, last frame, error, and a word of the help.
const HOPELESS: [(&str, &str, &str, &str); 6] = [
    (
        "disk_full",
        "  File \"torch/serialization.py\", line 965, in save",
        "OSError: [Errno 28] No space left on device",
        "free space",
    ),
    (
        "missing_model_or_dataset",
        "  File \"huggingface_hub/utils/_http.py\", line 402, in hf_raise_for_status",
        "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. Repository Not Found for url: \
         https://hub.example/api/models/a/b",
        "check `model` and `dataset`",
    ),
    (
        "bad_arguments",
        "  File \"swift/arguments/base.py\", line 61, in _parse_args",
        "ValueError: remaining_argv: ['--lora_rnk', '8']",
        "argument in `args`",
    ),
    (
        "incompatible_environment",
        "  File \"torch/cuda/__init__.py\", line 319, in _lazy_init",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "mhtraind doctor",
    ),
    (
        "bad_data",
        "  File \"datasets/builder.py\", line 1855, in _prepare_split_single",
        "datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset",
        "correct the row",
    ),
    (
        "code_error",
        "  File \"plugin.py\", line 7, in compute_loss",
        "AttributeError: 'Seq2SeqTrainer' object has no attribute 'mymetric'",
        "end of the attempt's log",
    ),
];

#[test]
fn what_no_other_attempt_cures_stops_at_once_with_its_line_and_help() {
    for (kind, frame, error, help) in HOPELESS {
        let host = host();
        let ran = host
            .run(&["run", "job.json"], json!({"fail": {"at_step": 2, "text": traceback(frame, error)}}))
            .expect(1);
        let receipt = host.receipt();
        assert_eq!(attempts(&receipt).len(), 1, "{kind}");
        assert_eq!(attempts(&receipt)[0]["diagnosis"]["kind"], kind);
        assert!(receipt["reason"].as_str().unwrap().contains(error), "{kind}: {}", receipt["reason"]);
        assert!(receipt["help"].as_str().unwrap().contains(help), "{kind}: {}", receipt["help"]);
        assert!(ran.stdout.contains(error), "{kind}: {}", ran.stdout);
    }
}
