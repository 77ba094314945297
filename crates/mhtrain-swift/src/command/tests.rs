use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::testing::tier;

fn spec(extra: Value) -> JobSpec {
    let mut job = json!({"model": "org/M-7B", "dataset": ["org/d"], "output_dir": "./output/m-sft"});
    for (key, value) in extra.as_object().unwrap() {
        job[key] = value.clone();
    }
    JobSpec::from_value(&job).unwrap()
}

fn advice() -> RunAdvice {
    let model = Model::resolve("org/M-7B", None, None).unwrap();
    TierBook::builtin().run_advice(&model, 12)
}

fn dialect(ms_swift: &str) -> Dialect {
    let transformers = if ms_swift.starts_with('3') { "4.57.6" } else { "5.19.0" };
    Dialect::for_versions(Some(ms_swift), Some(transformers)).0
}

fn with_request<T>(
    extra: Value,
    version: &str,
    tier: &Tier,
    inherited: &[(&str, &str)],
    then: impl FnOnce(&CommandRequest<'_>) -> T,
) -> T {
    let inherited = inherited.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    then(&CommandRequest {
        spec: &spec(extra),
        tier,
        dialect: &dialect(version),
        device_index: Some(6),
        advice: &advice(),
        inherited: &inherited,
    })
}

fn user(extra: Value) -> Invocation {
    with_request(extra, "4.6.0", &tier(), &[], user_command).unwrap()
}

fn user_error(extra: Value, version: &str) -> CommandError {
    with_request(extra, version, &tier(), &[], user_command).unwrap_err()
}

fn exact(extra: Value, flags: &AttemptFlags) -> Invocation {
    let start =
        TrainerStart::Script { python: "/env/bin/python".into(), script: "/env/swift/cli/sft.py".into() };
    with_request(extra, "4.6.0", &tier(), &[], |request| exact_command(request, flags, &start)).unwrap()
}

fn value<'a>(invocation: &'a Invocation, name: &str) -> Option<&'a str> {
    let at = invocation.argv.iter().position(|word| word.strip_prefix("--") == Some(name))?;
    invocation.argv.get(at + 1).map(String::as_str)
}

#[test]
fn the_command_reads_like_the_recipe() {
    let report_to = json!({"swanlab": {"project": "psy", "mode": "cloud", "exp_name": "m-sft"}});
    let call = user(json!({"report_to": report_to, "secrets": ["SWANLAB_API_KEY"]}));
    insta::assert_snapshot!(shell_block(&call), @r#"
    : "${SWANLAB_API_KEY:?set it first; it is a secret}"
    CUDA_DEVICE_ORDER=PCI_BUS_ID \
    CUDA_VISIBLE_DEVICES=6 \
    NO_PROXY=127.0.0.1,localhost,::1 \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    SWANLAB_PROJECT=psy \
    no_proxy=127.0.0.1,localhost,::1 \
    swift sft \
      --model org/M-7B \
      --tuner_type lora \
      --dataset org/d \
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
      --output_dir ./output/m-sft \
      --report_to swanlab \
      --swanlab_project psy \
      --swanlab_mode cloud \
      --swanlab_exp_name m-sft \
      --attn_impl flash_attn \
      --dataloader_num_workers 6
    "#);
}

#[test]
fn qlora_becomes_what_ms_swift_takes() {
    for (version, flag) in [("3.12.6", "train_type"), ("4.6.0", "tuner_type")] {
        let extra = json!({"train_type": "qlora"});
        let call = with_request(extra, version, &tier(), &[], user_command).unwrap();
        assert_eq!(value(&call, flag), Some("lora"));
        assert_eq!(value(&call, "quant_method"), Some("bnb"));
        assert_eq!(value(&call, "quant_bits"), Some("4"));
        assert_eq!(value(&call, "bnb_4bit_compute_dtype"), Some("bfloat16"));
        assert!(!call.argv.iter().any(|word| word == "qlora"));
        let packed = Tier { quant_bits: Some(4), ..tier() };
        let rung = with_request(json!({}), version, &packed, &[], user_command).unwrap();
        assert_eq!((value(&rung, flag), value(&rung, "quant_bits")), (Some("lora"), Some("4")));
        let plain = with_request(json!({}), version, &tier(), &[], user_command).unwrap();
        assert_eq!(value(&plain, "quant_bits"), None);
    }
}

#[test]
fn numbers_are_spelled_as_people_write_them() {
    let cases = [
        (2e-4, "2e-4"),
        (1e-3, "1e-3"),
        (0.1, "0.1"),
        (0.05, "0.05"),
        (1.0, "1"),
        (1.5e-4, "1.5e-4"),
        (0.0, "0"),
        (3.0, "3"),
        (100_000.0, "100000"),
        (0.15, "0.15"),
        (2.5, "2.5"),
    ];
    for (number, text) in cases {
        assert_eq!(number_text(number), text);
    }
}

#[test]
fn a_rank_gets_the_recipes_scale_unless_the_job_has_one() {
    for (args, train_type, alpha) in [
        (json!({"lora_rank": 16}), "lora", Some("64")),
        (json!({"lora_rank": 64}), "qlora", Some("256")),
        (json!({"lora_rank": 16, "lora_alpha": 32}), "lora", Some("32")),
        (json!({}), "lora", None),
        (json!({"lora_rank": 16}), "full", None),
    ] {
        let call = user(json!({"args": args, "train_type": train_type}));
        assert_eq!(value(&call, "lora_alpha"), alpha, "{args} {train_type}");
        let is_said = call.notes.iter().any(|note| note.contains("lora_alpha"));
        assert_eq!(is_said, alpha.is_some() && args["lora_alpha"].is_null(), "{args}");
    }
}

#[test]
fn evaluation_flags_come_with_validation_only() {
    assert_eq!(value(&user(json!({})), "eval_steps"), None);
    let call = user(json!({"validation": 0.02}));
    assert_eq!(value(&call, "split_dataset_ratio"), Some("0.02"));
    assert_eq!(value(&call, "eval_steps"), Some("200"));
    assert_eq!(value(&call, "per_device_eval_batch_size"), Some("1"));
    assert_eq!(value(&user(json!({"validation": ["v"]})), "val_dataset"), Some("v"));
}

#[test]
fn a_fully_pinned_job_gets_no_additions() {
    let call = user(json!({"validation": 0.1, "args": {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "max_length": 3072, "packing": true,
        "attn_impl": "flash_attn",
    }}));
    for name in ["dataloader_num_workers", "eval_steps", "per_device_eval_batch_size"] {
        assert_eq!(value(&call, name), None, "{name}");
    }
}

#[test]
fn arguments_appear_once_and_lists_become_several_words() {
    let call = user(json!({"args": {
        "learning_rate": 2e-4, "target_modules": ["q_proj", "v_proj"], "lora_rank": 16, "use_dora": true,
        "dataloader_num_workers": 3, "warmup_steps": 7, "system": "- be kind",
    }}));
    for name in ["learning_rate", "dataloader_num_workers", "warmup_steps"] {
        let flag = format!("--{name}");
        assert_eq!(call.argv.iter().filter(|word| **word == flag).count(), 1, "{name}");
    }
    let at = call.argv.iter().position(|word| word == "--target_modules").unwrap();
    assert_eq!(call.argv[at + 1..at + 3], ["q_proj", "v_proj"]);
    assert_eq!((value(&call, "use_dora"), value(&call, "lora_rank")), (Some("true"), Some("16")));
    assert_eq!(value(&call, "warmup_ratio"), None, "ms-swift 4.6.0 refuses both kinds of warm-up");
    assert!(call.argv.contains(&"--system=- be kind".to_owned()));
}

#[test]
fn unknown_parameters_are_refused_with_the_nearest_known_one() {
    let error = user_error(json!({"args": {"lora_rnak": 8}}), "4.6.0");
    assert_eq!(error.help().as_deref(), Some("did you mean `lora_rank`?"));
    assert!(matches!(
        user_error(json!({"args": {"zzzzzzzz": 8}}), "3.12.6"),
        CommandError::UnknownParameter { .. }
    ));
    let error = user_error(json!({"args": {"experts_impl": "eager"}}), "3.12.6");
    assert!(matches!(error, CommandError::OtherLine { line: Line::V4, .. }));
}

#[test]
fn unknown_parameters_pass_with_a_note_where_no_list_is_exact() {
    let extra = json!({"args": {"zzzzzzzz": 8}});
    let call = with_request(extra, "4.7.1", &tier(), &[], user_command).unwrap();
    assert_eq!(value(&call, "zzzzzzzz"), Some("8"));
    assert!(call.notes.iter().any(|note| note.contains("zzzzzzzz")));
}

#[test]
fn renamed_parameters_are_translated_and_noted() {
    let call = user(json!({"args": {"metric": "acc"}}));
    assert_eq!(value(&call, "eval_metric"), Some("acc"));
    assert!(call.notes.iter().any(|note| note.contains("eval_metric")));
    let error = user_error(json!({"args": {"metric": "acc", "eval_metric": "acc"}}), "4.6.0");
    assert!(matches!(error, CommandError::Twice { .. }));
}

#[test]
fn a_users_proxy_and_allocator_settings_are_merged() {
    let env = [("no_proxy", "corp.example,localhost"), ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")];
    let call = with_request(json!({}), "4.6.0", &tier(), &env, user_command).unwrap();
    assert_eq!(call.env["no_proxy"], "corp.example,localhost,127.0.0.1,::1");
    assert_eq!(call.env["NO_PROXY"], call.env["no_proxy"]);
    for name in ALLOCATOR_VARIABLES {
        assert_eq!(call.env[name], "max_split_size_mb:128,expandable_segments:True");
    }
    let call = user(json!({"env": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}}));
    for name in ALLOCATOR_VARIABLES {
        assert_eq!(call.env[name], "expandable_segments:False");
    }
}

#[test]
fn an_attempt_adds_the_closed_list_and_nothing_else() {
    let flags = AttemptFlags {
        output_dir: "/out/attempt-2".into(),
        resume_from: Some("/out/attempt-1/checkpoint-6".into()),
        resume_only_model: false,
        companion: Some(Launch {
            file: "/run/mhtraind_companion.py".into(),
            telemetry: "/run/telemetry.jsonl".into(),
            stop_file: "/run/stop".into(),
        }),
        expandable_segments: true,
        master_port: Some(29_600),
        adjustments: vec![Adjustment::DataloaderWorkers(2), Adjustment::RecipeStable],
    };
    let extra = json!({"args": {"external_plugins": "mine.py", "custom_register_path": "models.py", "learning_rate": 3e-4}});
    let call = exact(extra.clone(), &flags);
    assert_eq!(call.argv[..2], ["/env/bin/python", "/env/swift/cli/sft.py"]);
    assert_eq!(value(&call, "output_dir"), Some("/out/attempt-2"));
    assert_eq!(value(&call, "resume_from_checkpoint"), Some("/out/attempt-1/checkpoint-6"));
    assert_eq!((value(&call, "add_version"), value(&call, "check_model")), (Some("false"), Some("false")));
    assert_eq!(value(&call, "dataloader_num_workers"), Some("2"));
    assert_eq!(value(&call, "learning_rate"), Some("3e-4"), "a pin is stronger than an adjustment");
    assert_eq!((value(&call, "warmup_ratio"), value(&call, "max_grad_norm")), (Some("0.15"), Some("0.5")));
    let at = call.argv.iter().position(|word| word == "--external_plugins").unwrap();
    assert_eq!(call.argv[at + 1..at + 3], ["mine.py", "/run/mhtraind_companion.py"]);
    assert_eq!(value(&call, "custom_register_path"), Some("models.py"), "another list, left alone");
    assert_eq!(call.env["MHTRAIND_COMPANION_TELEMETRY"], "/run/telemetry.jsonl");
    assert_eq!(call.env["MHTRAIND_COMPANION_STOP"], "/run/stop");
    assert_eq!(call.env["MASTER_PORT"], "29600");

    let typed = user(extra);
    let added =
        parameter_names(&call.argv).difference(&parameter_names(&typed.argv)).copied().collect::<Vec<_>>();
    let documented = EXACT_FLAGS.iter().map(|(flag, _)| *flag).collect::<Vec<_>>().join(" ");
    assert!(added.iter().all(|name| documented.contains(&format!("--{name}"))), "{added:?}");
}

#[test]
fn an_attempt_may_run_without_expandable_segments() {
    let call = exact(json!({}), &AttemptFlags { output_dir: "/o".into(), ..AttemptFlags::default() });
    assert!(
        !call.env.contains_key("PYTORCH_ALLOC_CONF") && !call.env.contains_key("PYTORCH_CUDA_ALLOC_CONF")
    );
}

#[test]
fn without_workers_no_worker_setting_is_left() {
    let flags = AttemptFlags {
        output_dir: "/o".into(),
        adjustments: vec![Adjustment::DataloaderWorkers(0)],
        ..AttemptFlags::default()
    };
    let call = exact(json!({"args": {"dataloader_prefetch_factor": 4}}), &flags);
    assert_eq!(value(&call, "dataloader_num_workers"), Some("0"));
    assert_eq!(value(&call, "dataloader_prefetch_factor"), None);
}

#[test]
fn settings_that_cannot_be_handed_on_are_refused() {
    let error = user_error(json!({"report_to": {"tensorboard": {"dir": "x"}}}), "4.6.0");
    assert!(matches!(error, CommandError::TrackerSetting { .. }));
    let call = user(json!({"report_to": {"wandb": {"project": "p"}}}));
    assert_eq!(call.env["WANDB_PROJECT"], "p");
    let dashed = json!({"args": {"stop_words": ["a", "--x"]}});
    assert!(matches!(user_error(dashed, "4.6.0"), CommandError::BadValue { .. }));
}

proptest! {
    #[test]
    fn a_spelled_number_is_the_same_number(number in prop::num::f64::NORMAL | prop::num::f64::ZERO) {
        prop_assert_eq!(number_text(number).parse::<f64>().unwrap(), number);
    }

    #[test]
    fn a_shell_reads_back_the_words_of_the_block(system in "\\PC{1,40}") {
        let call = user(json!({"args": {"system": system}}));
        let block = shell_block(&call);
        let words = shell_words::split(&block).unwrap();
        prop_assert!(words.ends_with(&call.argv), "{}", block);
    }
}
