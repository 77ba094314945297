use std::collections::BTreeMap;

use mhtrain_job::spec::JobSpec;
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::command::{CommandRequest, user_command};
use crate::dialect::Dialect;
use crate::testing::tier;

fn job(text: &str) -> Value {
    import(text, false).unwrap().job
}

fn pinned(text: &str) -> Value {
    import(text, true).unwrap().job
}

const BLOCK: &str = r"
export NO_PROXY=127.0.0.1,localhost,::1
export no_proxy=$NO_PROXY
export SWANLAB_TOKEN=s3cr3t-value
export PROJECT=psy

CUDA_VISIBLE_DEVICES=6 \
swift sft \
  --model org/Model-7B \
  --train_type lora \
  --dataset org/data 'a b.jsonl' \
  --torch_dtype bfloat16 \
  --max_length 3072 \
  --packing true \
  --gradient_checkpointing true \
  --per_device_train_batch_size 8 \
  --gradient_accumulation_steps 4 \
  --learning_rate 2e-4 \
  --num_train_epochs 1 \
  --warmup_ratio 0.1 \
  --save_steps 200 \
  --save_total_limit 3 \
  --logging_steps 20 \
  --output_dir ./output/x-sft \
  --report_to swanlab \
  --swanlab_token $SWANLAB_TOKEN \
  --swanlab_project ${PROJECT} \
  --swanlab_mode cloud \
  --swanlab_exp_name x-sft \
  --attn_impl flash_attn
";

#[test]
fn sizing_knobs_are_left_to_the_engine() {
    assert_eq!(
        job(BLOCK),
        json!({
            "model": "org/Model-7B", "dataset": ["org/data", "a b.jsonl"], "device": 6, "train_type": "lora",
            "output_dir": "./output/x-sft",
            "report_to": {"swanlab": {"project": "psy", "mode": "cloud", "exp_name": "x-sft"}},
            "secrets": ["SWANLAB_API_KEY"], "env": {"PROJECT": "psy"},
        })
    );
}

#[test]
fn pinning_keeps_every_parameter_with_its_type() {
    let args = &pinned(BLOCK)["args"];
    assert_eq!(
        *args,
        json!({
            "torch_dtype": "bfloat16", "max_length": 3072, "packing": true, "gradient_checkpointing": true,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "learning_rate": 2e-4,
            "num_train_epochs": 1, "warmup_ratio": 0.1, "save_steps": 200, "save_total_limit": 3,
            "logging_steps": 20, "attn_impl": "flash_attn",
        })
    );
}

#[test]
fn secrets_reach_neither_the_job_nor_a_warning() {
    let texts = [
        BLOCK.to_owned(),
        "swift sft --model m --dataset d --swanlab_token s3cr3t-value".to_owned(),
        "swift sft --model m --dataset d --swanlab-token=s3cr3t-value".to_owned(),
        "swift sft --model m --dataset d --swanlab_secret s3cr3t-value".to_owned(),
        "HF_TOKEN=s3cr3t-value swift sft --model m --dataset d --system $HF_TOKEN".to_owned(),
        "K=s3cr3t-value; export WANDB_API_KEY=$K\nswift sft --model m --dataset d".to_owned(),
        "export MY_API_KEY=s3cr3t-value\nA=\"x $MY_API_KEY\"\nswift sft --model m --dataset d --system \"$A\"".to_owned(),
        "swanlab login -k s3cr3t-value\nswift sft --model m --dataset d".to_owned(),
        "export http_proxy=http://u:s3cr3t-value@h:1\nswift sft --model m --dataset d".to_owned(),
        "env HF_TOKEN=s3cr3t-value swift sft --model m --dataset d".to_owned(),
    ];
    for text in texts {
        for pin in [false, true] {
            let shown = format!("{:?}", import(&text, pin).unwrap());
            assert!(!shown.contains("s3cr3t"), "{text}: {shown}");
        }
    }
    assert_eq!(job("HF_TOKEN=x swift sft --model m --dataset d")["secrets"], json!(["HF_TOKEN"]));
}

#[test]
fn a_secret_in_the_models_place_is_an_error_without_its_value() {
    let error = import("T_TOKEN=s3cr3t-value\nswift sft --model $T_TOKEN --dataset d", false).unwrap_err();
    assert!(matches!(error, ImportError::Unresolved { flag: "model", .. }));
    assert!(!error.to_string().contains("s3cr3t"));
}

#[test]
fn comments_blanks_and_windows_line_ends_between_continued_lines_are_forgiven() {
    let variants = [
        "swift sft \\\n  --model m \\\n  # --packing true \\\n  --dataset d",
        "swift sft \\\n  --model m \\\n  # a remark\n  --dataset d",
        "swift sft \\\n  --model m \\ # a remark\n  --dataset d",
        "swift sft \\\n  --model m \\   \n  --dataset d",
        "\u{feff}swift sft \\\r\n  --model m \\\r\n  --dataset d\r\n",
        "swift sft --model m # remark \\\n  --dataset d",
        "swift sft \\\n  --model m \\\n\n  --dataset d",
        "```bash\n$ swift sft --model m --dataset d\n```",
        "swift sft --model=m --dataset='d'",
        "swift sft --model m --dataset \"d\" > log 2>&1 &",
        "nohup swift sft --model m --dataset d 2>&1 | tee log.txt",
        "set -e; cd /data && swift sft --model m --dataset d",
        "python -m swift.cli.sft --model m --dataset d",
        "/opt/env/bin/python /x/swift/cli/sft.py --model m --dataset d",
        "M=m\nswift sft --model \"${M}\" --dataset ${D:-d}",
        "ARGS=\"--model m --dataset d\"\nswift sft $ARGS",
        "ARGS=(--model m\n # remark\n --dataset d)\nswift sft \"${ARGS[@]}\"",
        "if true; then\n  swift sft --model m --dataset d\nfi",
    ];
    for text in variants {
        let job = job(text);
        assert_eq!((&job["model"], &job["dataset"]), (&json!("m"), &json!(["d"])), "{text}");
    }
}

#[test]
fn a_comment_at_the_end_of_a_continuation_ends_the_call() {
    let job = job("swift sft --model m --dataset d \\\n  # --packing true\necho done");
    assert_eq!(job["dataset"], json!(["d"]));
}

#[test]
fn cards_and_processes_become_device_and_devices() {
    let with = |prefix: &str| job(&format!("{prefix} swift sft --model m --dataset d"));
    assert_eq!(with("CUDA_VISIBLE_DEVICES=3")["device"], json!(3));
    let two = with("CUDA_VISIBLE_DEVICES=2,5 NPROC_PER_NODE=2");
    assert_eq!((&two["device"], &two["devices"]), (&json!(2), &json!(2)));
    assert_eq!(with("NPROC_PER_NODE=4")["devices"], json!(4));
    assert_eq!(with("CUDA_VISIBLE_DEVICES=GPU-ab12")["device"], json!("GPU-ab12"));
    assert_eq!(with("CUDA_VISIBLE_DEVICES=")["device"], Value::Null);
    let launched = job("torchrun --nproc_per_node 2 /x/swift/cli/sft.py --model m --dataset d");
    assert_eq!(launched["devices"], json!(2));
    let error = import("NNODES=2 swift sft --model m --dataset d", false).unwrap_err();
    assert!(matches!(error, ImportError::SeveralMachines { .. }));
}

#[test]
fn quantised_lora_is_qlora_in_both_spellings() {
    let bnb = "swift sft --model m --dataset d --tuner_type lora --quant_method bnb --quant_bits 4";
    for text in [bnb, "swift sft --model m --dataset d --train_type qlora"] {
        let job = pinned(text);
        assert_eq!(job["train_type"], "qlora");
        assert!(job["args"].get("quant_bits").is_none());
    }
    let eight = "swift sft --model m --dataset d --quant_method bnb --quant_bits 8";
    assert_eq!(pinned(eight)["args"]["quant_bits"], json!(8));
    let error = import("swift sft --model m --dataset d --train_type adalora", false).unwrap_err();
    assert!(matches!(error, ImportError::TrainType { .. }));
}

#[test]
fn intent_is_kept_and_named_where_the_recipe_has_a_name() {
    let with = |flags: &str| job(&format!("swift sft --model m --dataset d --num_train_epochs 1 {flags}"));
    assert_eq!(with("--max_length 4096")["length"], "long");
    assert_eq!(with("--max_length 8192")["length"], json!(8192));
    assert_eq!(with("--max_length 2048").get("length"), None);
    assert_eq!(with("--learning_rate 5e-4")["learning"], "fast");
    assert_eq!(with("--learning_rate 1e-4 --warmup_ratio 0.15 --max_grad_norm 0.5")["learning"], "stable");
    assert_eq!(with("--learning_rate 3e-5")["args"], json!({"learning_rate": 3e-5}));
    assert_eq!(with("--save_steps 100 --save_total_limit 5")["save"], "fast_iteration");
    assert_eq!(with("--save_steps 500 --save_total_limit 2")["save"], "long_run");
    assert_eq!(with("--save_steps 50")["args"], json!({"save_steps": 50}));
    assert_eq!(with("--use_liger_kernel true")["allow"], json!({"liger": true}));
    assert_eq!(with("--torch_dtype float32")["args"], json!({"torch_dtype": "float32"}));
    assert_eq!(with("--split_dataset_ratio 0.02 --eval_steps 30")["validation"], json!(0.02));
    assert_eq!(with("--val_dataset a b")["validation"], json!(["a", "b"]));
    let large = with("--per_device_train_batch_size 16 --gradient_accumulation_steps 8");
    assert_eq!(large["min_effective_batch"], json!(128));
}

#[test]
fn the_emergency_profile_is_left_to_the_engine_as_a_whole() {
    let text = "swift sft --model m --dataset d --max_length 2048 --packing false --per_device_train_batch_size 1 \
                --gradient_accumulation_steps 32 --learning_rate 1e-4 --num_train_epochs 1 --warmup_ratio 0.1 \
                --save_steps 100 --save_total_limit 2 --logging_steps 50 --attn_impl sdpa";
    assert_eq!(job(text).get("args"), None);
}

#[test]
fn a_pinned_block_with_a_small_batch_lowers_the_jobs_minimum() {
    let job = pinned(
        "swift sft --model m --dataset d --per_device_train_batch_size 1 --gradient_accumulation_steps 16",
    );
    assert_eq!(job["min_effective_batch"], json!(16));
    assert_eq!(job["args"]["learning_rate"], json!(1e-4), "ms-swift's own default, not the recipe's");
}

#[test]
fn every_block_trains_as_long_as_it_did() {
    assert_eq!(job("swift sft --model m --dataset d")["args"], json!({"num_train_epochs": 3}));
    assert_eq!(job("swift sft --model m --dataset d --max_steps 9")["args"], json!({"max_steps": 9}));
}

#[test]
fn unknown_flags_negative_numbers_and_repetitions_are_kept_in_args() {
    let imported = import(
        "swift sft --model m --dataset d --max_steps 5 --no_such_thing_at_all 7 --seed -3 --lora-rank 8 --lora_rank 16 \
         --target_modules q_proj v_proj --system '-x --y' --streaming --no_dataset_shuffle",
        false,
    )
    .unwrap();
    assert_eq!(
        imported.job["args"],
        json!({
            "max_steps": 5, "no_such_thing_at_all": 7, "seed": -3, "lora_rank": 16,
            "target_modules": ["q_proj", "v_proj"], "system": "-x --y", "streaming": true, "dataset_shuffle": false, "lora_alpha": 32,
        })
    );
    assert!(imported.warnings.iter().any(|warning| warning.contains("more than once")));
    assert!(imported.warnings.iter().any(|warning| warning.contains("no_such_thing_at_all")));
}

#[test]
fn an_abbreviated_flag_gets_its_whole_name() {
    let job = pinned("swift sft --model m --dataset d --per_device_train_batch 4");
    assert_eq!(job["args"]["per_device_train_batch_size"], json!(4));
}

#[test]
fn what_only_the_supervisor_may_set_is_left_out_with_the_reason() {
    let imported = import(
        "swift sft --model m --dataset d --resume_from_checkpoint x/checkpoint-9 --add_version false",
        true,
    )
    .unwrap();
    assert!(imported.job["args"].get("resume_from_checkpoint").is_none());
    assert!(imported.warnings.iter().any(|warning| warning.contains("resume_from_checkpoint")));
}

#[test]
fn values_of_a_running_shell_are_left_out_or_refused() {
    let imported =
        import("swift sft --model m --dataset d --output_dir out/$(date +%F) --run_name $1", false).unwrap();
    assert!(imported.job.get("output_dir").is_none() && imported.job["args"].get("run_name").is_none());
    let error = import("swift sft --model $MODEL --dataset d", false).unwrap_err();
    assert!(error.to_string().contains("$MODEL"), "{error}");
}

/// What people's scripts do around the call, and the value that it comes to.
#[test]
fn values_that_need_no_running_shell_are_known() {
    for (text, pointer, value) in [
        ("M=${1:-org/M-7B}\nswift sft --model $M --dataset d", "/model", json!("org/M-7B")),
        ("swift sft --model ${2-a/b} --dataset d", "/model", json!("a/b")),
        (
            "M=org/M-7B\nswift sft --model $M --dataset d --output_dir out/$(basename $M)-x",
            "/output_dir",
            json!("out/M-7B-x"),
        ),
        (
            "M=org/M-7B/\nswift sft --model $M --dataset d --output_dir \"out/$(basename \"$M\")\"",
            "/output_dir",
            json!("out/M-7B"),
        ),
        (
            "M=org/M-7B\nswift sft --model $M --dataset d --output_dir out/${M##*/}",
            "/output_dir",
            json!("out/M-7B"),
        ),
        (
            "N=2\nswift sft --model m/m --dataset d --lora_rank $((16 / N)) --lora_alpha $(expr 32 / $N)",
            "/args/lora_rank",
            json!(8),
        ),
        (
            "N=2\nswift sft --model m/m --dataset d --lora_alpha $(expr 32 / $N)",
            "/args/lora_alpha",
            json!(16),
        ),
        ("swift sft \\\n\u{a0}\u{a0}--model\u{a0}m/m --dataset d", "/model", json!("m/m")),
        ("swift sft --model m/m --dataset d --system 'a\u{a0}b'", "/args/system", json!("a\u{a0}b")),
        ("$ swift sft \\\n>   --model m/m \\\n>   --dataset d", "/model", json!("m/m")),
        ("swift sft `\n  --model m/m `\n  --dataset d `\n  --lora_rank 4", "/args/lora_rank", json!(4)),
        ("set CUDA_VISIBLE_DEVICES=3\r\nswift sft --model m/m --dataset d\r\n", "/device", json!(3)),
        ("set -e\nswift sft --model m/m --dataset d\n", "/model", json!("m/m")),
        ("swift sft ^\r\n  --model m/m ^\r\n  --dataset d", "/dataset/0", json!("d")),
    ] {
        assert_eq!(job(text).pointer(pointer), Some(&value), "{text}");
    }
}

#[test]
fn a_block_that_names_only_a_rank_keeps_ms_swifts_scale() {
    let text = "swift sft --model m/m --dataset d --lora_rank 16";
    for job in [job(text), pinned(text)] {
        assert_eq!(job.pointer("/args/lora_alpha"), Some(&json!(32)));
    }
    assert_eq!(job("swift sft --model m/m --dataset d").pointer("/args/lora_alpha"), None);
}

#[test]
fn a_pinned_value_that_only_a_shell_knows_is_not_replaced_by_a_default() {
    let text = "swift sft --model m/m --dataset d --per_device_train_batch_size 2 --gradient_accumulation_steps $STEPS";
    let imported = import(text, true).unwrap();
    assert_eq!(imported.job.pointer("/args/gradient_accumulation_steps"), None);
    assert!(imported.warnings.iter().any(|warning| warning.contains("gradient_accumulation_steps")));
}

#[test]
fn placeholders_of_an_example_are_no_redirections() {
    let imported =
        import("swift sft --model <MODEL_ID> --dataset d --output_dir ./out/<name>-sft", false).unwrap();
    assert_eq!(
        (&imported.job["model"], &imported.job["output_dir"]),
        (&json!("<MODEL_ID>"), &json!("./out/<name>-sft"))
    );
    assert!(imported.warnings.iter().any(|warning| warning.contains("<MODEL_ID>")));
}

#[test]
fn errors_say_what_is_there_instead() {
    let two = "swift sft --model a --dataset d\nswift sft --model b --dataset d";
    let cases = [
        ("", "no `swift sft`"),
        ("echo swift sft --model m", "no `swift sft`"),
        ("cat <<'EOF'\nswift sft --model m\nEOF", "here-document"),
        ("bash -c 'swift sft --model m --dataset d'", "quotes"),
        ("# swift sft --model m", "a comment"),
        ("swift rlhf --model m", "`swift rlhf`"),
        (two, "2 times (lines 1, 2)"),
        ("ｓｗｉｆｔ　ｓｆｔ --model m", "not"),
        ("swift sft —model m --dataset d", "not"),
        ("swift sft --model m --dataset 'd", "never closed"),
        ("swift sft job.yaml", "job.yaml"),
        ("swift sft --config job.yaml --model m --dataset d", "job.yaml"),
        ("swift sft --dataset d", "--model"),
        ("swift sft --model m", "--dataset"),
        ("swift sft --model m --dataset d --learning_rate fast", "learning_rate"),
    ];
    for (text, expected) in cases {
        let error = import(text, true).unwrap_err();
        assert!(error.to_string().contains(expected), "{text}: {error}");
    }
    assert_eq!(import_nth(two, 2, false).unwrap().job["model"], "b");
    assert!(matches!(import_nth(two, 3, false), Err(ImportError::NoSuchCommand { .. })));
    assert!(matches!(import_nth(two, 0, false), Err(ImportError::NoSuchCommand { .. })));
}

fn command_of(job: &Value) -> Vec<String> {
    let spec = JobSpec::from_value(job).unwrap();
    let (dialect, _) = Dialect::for_versions(Some("3.12.6"), Some("4.57.6"));
    let request = CommandRequest {
        spec: &spec,
        tier: &tier(),
        dialect: &dialect,
        device_index: Some(0),
        advice: &TierBook::builtin().run_advice(&Model::resolve("org/M-7B", None, None).unwrap(), 8),
        inherited: &BTreeMap::new(),
    };
    user_command(&request).unwrap().argv
}

/// Returns the words behind a flag.
fn words<'a>(argv: &'a [String], name: &str) -> Vec<&'a str> {
    let start = argv.iter().position(|word| word.strip_prefix("--") == Some(name));
    let rest = start.map(|start| &argv[start + 1..]).unwrap_or_default();
    rest.iter().take_while(|word| !word.starts_with("--")).map(String::as_str).collect()
}

#[test]
fn a_length_that_is_left_to_the_engine_names_where_the_models_class_begins() {
    for (model, begins) in [("openai/gpt-oss-20b", 2048), ("org/M-7B", 3072)] {
        let text = format!("swift sft --model {model} --dataset d --max_length 2048");
        let warnings = import(&text, false).unwrap().warnings;
        let said = format!("`max_length 2048` is left to the engine, which begins at {begins}");
        assert!(warnings.contains(&said), "{warnings:?}");
    }
}

#[test]
fn a_pinned_block_comes_back_flag_for_flag() {
    let argv = command_of(&pinned(BLOCK));
    let given: Vec<&str> = BLOCK
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("--"))
        .filter(|name| *name != "swanlab_token")
        .collect();
    let returned: Vec<&str> = argv.iter().filter_map(|word| word.strip_prefix("--")).collect();
    assert_eq!(returned, given, "the same flags in the same order");
    assert_eq!(words(&argv, "dataset"), ["org/data", "a b.jsonl"]);
    assert_eq!(words(&argv, "learning_rate"), ["2e-4"]);
}

proptest! {
    #[test]
    fn import_never_panics_on_any_text(text in "\\PC{0,200}", pin: bool) {
        let _ = import(&text, pin);
    }

    #[test]
    fn import_never_panics_on_shell_like_text(
        parts in prop::collection::vec(prop::sample::select(vec![
            "swift sft", " ", "\\\n", "\n", "--model", "m", "--dataset", "'", "\"", "$", "${", "}", "$(", ")", "`", "#",
            "<<EOF\n", "EOF", ">", "2>&1", "&", "|", ";", "A=(", "A+=b", "export ", "=", "--", "-", "--x=", "\\", "<",
            "<M>", "${A[@]}", "$A", "é", "—", "\u{3000}", "NPROC_PER_NODE=2 ", "CUDA_VISIBLE_DEVICES=1, ", "unset A",
        ]), 0..40),
        pin: bool,
    ) {
        let _ = import(&parts.concat(), pin);
    }

    #[test]
    fn a_pinned_blocks_command_has_every_parameter_of_the_block(
        micro in 1_u32..64, accumulation in 1_u32..64, length in 1_u32..100_000, packing: bool,
        rate in 1e-6_f64..0.9, warmup in 0.0_f64..0.99, epochs in 0.1_f64..9.0, save in 1_u32..5000,
        rank in 1_u32..256, seed in -5_i64..5, share in prop::option::of(0.01_f64..0.9),
        attn in prop::sample::select(vec!["flash_attn", "sdpa", "eager", "flash_attention_2"]),
    ) {
        let mut flags = vec![
            ("per_device_train_batch_size", micro.to_string()), ("gradient_accumulation_steps", accumulation.to_string()),
            ("max_length", length.to_string()), ("packing", packing.to_string()), ("attn_impl", attn.to_owned()),
            ("learning_rate", format!("{rate:e}")), ("warmup_ratio", warmup.to_string()),
            ("num_train_epochs", epochs.to_string()), ("save_steps", save.to_string()),
            ("lora_rank", rank.to_string()), ("seed", seed.to_string()),
        ];
        flags.extend(share.map(|share| ("split_dataset_ratio", share.to_string())));
        let block = flags.iter().fold("swift sft --model m --dataset d".to_owned(), |block, (name, value)| {
            format!("{block} \\\n  --{name} {value}")
        });
        let argv = command_of(&pinned(&block));
        for (name, value) in flags {
            let returned = words(&argv, name);
            prop_assert_eq!(returned.len(), 1, "{} in {:?}", name, argv);
            match (value.parse::<f64>(), returned[0].parse::<f64>()) {
                (Ok(value), Ok(returned)) => prop_assert_eq!(value, returned, "{}", name),
                _ => prop_assert_eq!(&value, returned[0], "{}", name),
            }
        }
    }
}
