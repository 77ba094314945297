use proptest::prelude::*;
use serde_json::json;

use super::*;
use mhtrain_sizing::tier::Steps;
use mhtrain_sizing::workload::{AttnImpl, Dtype, ExpertForm, Targets};

fn with(keys: Value) -> Value {
    let mut job = json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": ["d.jsonl"]});
    job.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    job
}

fn parse(keys: Value) -> Result<JobSpec, SpecError> {
    JobSpec::parse(with(keys).to_string().as_bytes())
}

fn good(keys: Value) -> JobSpec {
    parse(keys.clone()).unwrap_or_else(|error| panic!("{keys}: {error}"))
}

fn error(keys: Value) -> SpecError {
    match parse(keys.clone()) {
        Ok(_) => panic!("accepted: {keys}"),
        Err(error) => error,
    }
}

fn code(bytes: &[u8]) -> &'static str {
    JobSpec::parse(bytes).unwrap_err().code()
}

#[test]
fn the_smallest_job_gets_the_documented_defaults() {
    let job = good(json!({}));
    assert_eq!(job.name, "qwen2.5-7b-instruct-sft");
    assert_eq!(job.output_dir, "./output/qwen2.5-7b-instruct-sft");
    assert_eq!((job.device.clone(), job.devices, job.min_effective_batch), (DeviceWish::Auto, 1, 32));
    assert_eq!(job.max_steps(), Ok(None));
    assert!(job.validation.is_none() && job.report_to.is_empty() && job.allow == Allow::default());
    assert_eq!(job.pins(), Ok(mhtrain_sizing::request::Pins::default()));
}

#[test]
fn the_name_comes_from_the_last_part_of_the_model() {
    for (model, name) in [
        ("/data/models/Foo-1B/", "foo-1b-sft"),
        ("./", "model-sft"),
        ("/", "model-sft"),
        ("a/..", "model-sft"),
        ("模型-7B", "模型-7b-sft"),
    ] {
        assert_eq!(good(json!({"model": model})).name, name, "{model}");
    }
    let long = good(json!({"model": "é".repeat(1000)}));
    assert!(long.name.len() <= 200 && long.name.ends_with("-sft"));
}

#[test]
fn a_name_for_the_job_is_also_its_directory() {
    assert_eq!(good(json!({"name": "trial 7"})).output_dir, "./output/trial 7");
    for name in ["a/b", "..", ".", ""] {
        assert_eq!(error(json!({"name": name})).code(), "out_of_range", "{name}");
    }
}

#[test]
fn what_is_no_json_object_is_refused_with_its_place() {
    assert_eq!(code(b""), "job_not_json");
    assert_eq!(code(b"[1, 2]"), "job_not_an_object");
    assert_eq!(code(b"{\"model\": NaN}"), "job_not_json");
    assert_eq!(code(b"{\"model\": 1e999}"), "job_not_json");
    assert_eq!(code(b"{} {}"), "job_not_json");
    assert_eq!(code(b"\xff\xfe{}"), "job_not_utf8");
    assert_eq!(code("[".repeat(100_000).as_bytes()), "job_not_json");
    let text = "{\n  \"model\": \"m\",\n  \"dataset\" [\"d\"]\n}";
    let error = JobSpec::parse(text.as_bytes()).unwrap_err();
    assert_eq!(error.to_string(), "the job file is not JSON: expected `:` at line 3, column 13");
}

#[test]
fn ten_mebibytes_are_read_and_a_byte_more_is_not() {
    assert_eq!(code(&vec![b'x'; JOB_FILE_BYTES_MAX]), "job_not_json");
    let error = JobSpec::parse(&vec![b'x'; JOB_FILE_BYTES_MAX + 1]).unwrap_err();
    assert_eq!(error.to_string(), "the job file has 10485761 bytes, the limit is 10485760 bytes");
}

#[test]
fn a_byte_order_mark_is_no_mistake() {
    let text = format!("\u{feff}{}", with(json!({})));
    assert!(JobSpec::parse(text.as_bytes()).is_ok());
}

#[test]
fn model_and_dataset_are_required() {
    assert_eq!(JobSpec::parse(b"{}"), Err(SpecError::Missing { key: "model" }));
    assert_eq!(JobSpec::parse(b"{\"model\": \"m\"}"), Err(SpecError::Missing { key: "dataset" }));
}

#[test]
fn an_unknown_key_names_the_nearest_known_one() {
    for (key, near) in [
        ("datset", Some("dataset")),
        ("output-dir", Some("output_dir")),
        ("Model", Some("model")),
        ("trainType", Some("train_type")),
        ("zzz", None),
    ] {
        let SpecError::UnknownKey { nearest, .. } = error(json!({key: 1})) else { panic!("{key}") };
        assert_eq!(nearest.as_deref(), near, "{key}");
    }
    assert_eq!(
        error(json!({"allow": {"emergancy": true}})).help().as_deref(),
        Some("did you mean `allow.emergency`?")
    );
}

#[test]
fn a_wrong_type_names_the_key_what_it_must_be_and_what_it_was() {
    assert_eq!(
        error(json!({"device": true})).to_string(),
        "`device` must be an index (0, 1, …), a \"GPU-…\" uuid or \"auto\", not true"
    );
    assert_eq!(
        error(json!({"devices": "two"})).to_string(),
        "`devices` must be a whole number from 1 to 1024, not \"two\""
    );
    assert_eq!(
        error(json!({"dataset": ["a", 7]})).to_string(),
        "`dataset[1]` must be a hub id or a local file, not 7"
    );
    assert_eq!(
        error(json!({"train_type": "LoRa"})).help().as_deref(),
        Some("did you mean \"lora\"? known are: lora, qlora, full")
    );
}

#[test]
fn numbers_outside_of_their_range_are_refused() {
    for keys in [
        json!({"devices": 0}),
        json!({"devices": -1}),
        json!({"device": -3}),
        json!({"device": 4_294_967_296_u64}),
        json!({"device": 18_446_744_073_709_551_615_u64}),
        json!({"min_effective_batch": 0}),
        json!({"length": 0}),
        json!({"length": 1_000_001}),
        json!({"length": 3072.5}),
        json!({"validation": 0}),
        json!({"validation": 1.0}),
        json!({"validation": -0.1}),
        json!({"priority": 1e300}),
        json!({"time_limit": 0}),
        json!({"time_limit": -5}),
    ] {
        assert_eq!(error(keys.clone()).code(), "out_of_range", "{keys}");
    }
}

#[test]
fn texts_that_are_empty_or_no_single_line_are_refused() {
    for key in ["model", "dataset", "name", "output_dir"] {
        assert_eq!(error(json!({key: ""})).code(), "out_of_range");
        assert_eq!(error(json!({key: "  "})).code(), "out_of_range");
        assert_eq!(error(json!({key: "--flag"})).code(), "out_of_range");
        assert_eq!(error(json!({key: "a\u{0}b"})).to_string(), format!("`{key}` holds a NUL byte"));
        assert_eq!(error(json!({key: "a\nb"})).to_string(), format!("`{key}` holds a line break"));
        assert_eq!(
            error(json!({key: "a\u{1b}[2Jb"})).to_string(),
            format!("`{key}` holds a control character")
        );
        assert_eq!(error(json!({key: "x".repeat(5000)})).code(), "out_of_range");
    }
    assert_eq!(error(json!({"dataset": []})).code(), "out_of_range");
}

#[test]
fn error_messages_stay_short_and_print_no_control_characters() {
    let nasty = "\u{1b}[31m".repeat(10_000);
    for keys in [json!({nasty.clone(): 1}), json!({"length": nasty}), json!({"args": {nasty.clone(): 1}})] {
        let text = error(keys).to_string();
        assert!(text.len() < 600 && !text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn devices_are_named_by_index_uuid_or_auto() {
    let uuid = "GPU-5a7d1f2e-0000-1111-2222-333344445555";
    assert_eq!(good(json!({"device": 6})).device, DeviceWish::Index(6));
    assert_eq!(good(json!({"device": uuid})).device, DeviceWish::Uuid(uuid.to_owned()));
    assert_eq!(error(json!({"device": "MIG-5a7d1f2e"})), SpecError::MigDevice);
    assert_eq!(error(json!({"device": "6"})).code(), "out_of_range");
    assert_eq!(error(json!({"device": "GPU-"})).code(), "out_of_range");
}

#[test]
fn what_this_version_does_not_do_is_read_and_then_refused_by_name() {
    let two = good(json!({"devices": 2})).check_supported().unwrap_err();
    assert!(two.to_string().contains("more than one device") && two.help().is_some());
    let after = good(json!({"after": [3]})).check_foreground().unwrap_err();
    assert!(after.to_string().contains("does not wait"), "{after}");
    assert!(after.help().unwrap().contains("`mhtraind submit`"));
    assert_eq!(good(json!({})).check_foreground(), Ok(()));
    assert_eq!(good(json!({"after": [3]})).check_supported(), Ok(()));
}

#[test]
fn time_limits_are_read_in_every_form() {
    for (limit, seconds) in [
        (json!("12h"), 43_200),
        (json!("90m"), 5_400),
        (json!("45s"), 45),
        (json!("1d12h"), 129_600),
        (json!("1d2h3m4s"), 93_784),
        (json!(600), 600),
    ] {
        assert_eq!(good(json!({"time_limit": limit})).time_limit, Some(Duration::from_secs(seconds)));
    }
    for limit in [
        "",
        "12",
        "h",
        "12h1d",
        "1h1h",
        "-1h",
        "1.5h",
        "12 hours",
        "99999999999999999999h",
        "366d",
        "0s",
        "1ü",
    ] {
        assert_eq!(error(json!({"time_limit": limit})).code(), "out_of_range", "{limit}");
    }
}

#[test]
fn trackers_are_a_name_a_list_or_an_object() {
    let names = |keys| good(keys).report_to.into_keys().collect::<Vec<_>>();
    assert_eq!(names(json!({"report_to": "swanlab"})), ["swanlab"]);
    assert_eq!(names(json!({"report_to": ["wandb", "tensorboard"]})), ["tensorboard", "wandb"]);
    assert!(names(json!({"report_to": "none"})).is_empty());
    let job = good(json!({"report_to": {"swanlab": {"project": "p", "mode": "cloud"}}}));
    assert_eq!(job.report_to["swanlab"]["project"], "p");
    assert_eq!(
        error(json!({"report_to": "swanlap"})).help().unwrap().split('?').next(),
        Some("did you mean \"swanlab\"")
    );
    assert_eq!(error(json!({"report_to": {"swanlab": {"mode": "offline"}}})).code(), "unknown_value");
    assert_eq!(error(json!({"report_to": {"swanlab": {"project": ["p"]}}})).code(), "wrong_type");
    assert_eq!(error(json!({"report_to": {"swanlab": {"a b": 1}}})).code(), "out_of_range");
}

#[test]
fn a_data_set_of_less_than_one_row_is_refused_and_other_hashes_are_names() {
    for text in ["train.jsonl#0", "hub/id#0", "hub/id#-3", "hub/id:subset# 0 ", "a#5#-1"] {
        for key in ["dataset", "validation"] {
            let refused = error(json!({ key: ["d.jsonl", text] }));
            assert_eq!(refused.code(), "out_of_range", "{text}");
            assert!(
                refused.to_string().contains("N from 1") && refused.to_string().contains(text),
                "{refused}"
            );
        }
    }
    for text in ["train.jsonl#1", "hub/id:subset#500", "a#0.jsonl", "a#b.jsonl", "a#0#7", "d.jsonl"] {
        assert_eq!(good(json!({"dataset": text})).dataset, [text]);
    }
}

#[test]
fn validation_is_a_share_or_datasets() {
    assert_eq!(good(json!({"validation": 0.02})).validation, Some(Validation::Share(0.02)));
    let datasets = Some(Validation::Datasets(vec!["v".to_owned()]));
    assert_eq!(good(json!({"validation": "v"})).validation, datasets);
    assert_eq!(good(json!({"validation": ["v"]})).validation, datasets);
    assert_eq!(good(json!({"validation": null})).validation, None);
}

#[test]
fn names_of_arguments_are_normalised() {
    let job = good(json!({"args": {"--lora-rank": 16, "lora_alpha": 64}}));
    assert_eq!(job.args.keys().collect::<Vec<_>>(), ["lora_alpha", "lora_rank"]);
    assert_eq!(job.pins().unwrap().lora_rank, Some(16));
    assert_eq!(error(json!({"args": {"--lora-rank": 16, "lora_rank": 8}})).code(), "arg_twice");
    for name in ["", "--", "a b", "a=b", "ä", "1a"] {
        assert_eq!(error(json!({"args": {name: 1}})).code(), "unknown_key", "{name}");
    }
}

#[test]
fn arguments_that_repeat_a_key_name_that_key() {
    for (arg, key) in REPEATED_ARGS {
        assert_eq!(
            error(json!({"args": {format!("--{arg}"): "x"}})),
            SpecError::ArgRepeatsField { arg: arg.to_owned(), field: key }
        );
    }
    for keys in [
        json!({"validation": 0.1, "args": {"split_dataset_ratio": 0.1}}),
        json!({"validation": 0.1, "args": {"val_dataset": "v"}}),
        json!({"length": 1024, "args": {"max_length": 2048}}),
        json!({"report_to": {"swanlab": {"project": "p"}}, "args": {"swanlab_project": "q"}}),
    ] {
        assert_eq!(error(keys.clone()).code(), "arg_repeats_key", "{keys}");
    }
    good(json!({"length": 1024, "args": {"max_length": 1024}}));
}

#[test]
fn arguments_of_the_supervisor_are_refused_with_the_reason() {
    for (arg, why) in FORBIDDEN_ARGS {
        assert!(error(json!({"args": {arg: "true"}})).to_string().ends_with(why), "{arg}");
    }
    good(json!({"args": {"auto_find_batch_size": false, "save_strategy": "steps"}}));
    assert_eq!(error(json!({"args": {"auto_find_batch_size": true}})).code(), "arg_forbidden");
    for (name, why) in FORBIDDEN_ENV {
        assert!(error(json!({"env": {name: "1"}})).to_string().ends_with(why), "{name}");
    }
}

#[test]
fn an_abbreviation_of_a_pin_cannot_pass_by_it() {
    for (short, full) in [
        ("per_device_train_batch", "per_device_train_batch_size"),
        ("--gradient-acc", "gradient_accumulation_steps"),
        ("max_len", "max_length"),
        ("resume_from", "resume_from_checkpoint"),
        ("use_liger", "use_liger_kernel"),
    ] {
        let SpecError::AbbreviatedArg { full: found, .. } = error(json!({"args": {short: 1}})) else {
            panic!("{short}")
        };
        assert_eq!(found, full);
    }
}

#[test]
fn values_of_arguments_are_plain_or_lists_of_plain() {
    good(
        json!({"args": {"system": "line one\nline two", "stop_words": [1, "x", true], "weight_decay": 1e-3}}),
    );
    for value in [json!(null), json!({}), json!([[]]), json!([null])] {
        assert_eq!(error(json!({"args": {"weight_decay": value}})).code(), "wrong_type", "{value}");
    }
    assert_eq!(error(json!({"args": {"system": "x\u{0}"}})).code(), "forbidden_character");
    assert_eq!(error(json!({"args": {"system": ["x\u{0}"]}})).code(), "forbidden_character");
}

#[test]
fn every_pin_is_read_as_number_and_as_text() {
    let pins = good(json!({"args": {
        "per_device_train_batch_size": "8", "gradient_accumulation_steps": 4.0, "max_length": 3072, "packing": "True",
        "attn_impl": "flash_attn", "torch_dtype": "bfloat16", "gradient_checkpointing": false,
        "use_liger_kernel": "no", "learning_rate": "2e-4", "warmup_ratio": 0, "max_grad_norm": "0.5",
        "num_train_epochs": 1, "save_steps": 0.1, "save_total_limit": 3, "logging_steps": "20",
        "router_aux_loss_coef": 1e-3
    }}))
    .pins()
    .unwrap();
    assert_eq!((pins.micro_batch, pins.accumulation, pins.max_length), (Some(8), Some(4), Some(3072)));
    assert_eq!(
        (pins.packing, pins.gradient_checkpointing, pins.liger_kernel),
        (Some(true), Some(false), Some(false))
    );
    assert_eq!((pins.attn_impl, pins.torch_dtype), (Some(AttnImpl::FlashAttn), Some(Dtype::Bfloat16)));
    assert_eq!(
        (pins.learning_rate, pins.warmup_ratio, pins.max_grad_norm),
        (Some(2e-4), Some(0.0), Some(0.5))
    );
    assert_eq!((pins.save_steps, pins.logging_steps), (Some(Steps::Share(0.1)), Some(Steps::Count(20))));
    assert_eq!((pins.num_train_epochs, pins.save_total_limit), (Some(1.0), Some(3)));
    assert_eq!(pins.router_aux_loss_coef, Some(1e-3));
    assert!(pins.leave_nothing_to_size());
}

#[test]
fn a_wrong_pin_names_its_argument() {
    for (arg, value) in [
        ("per_device_train_batch_size", json!(0)),
        ("per_device_train_batch_size", json!(-4)),
        ("gradient_accumulation_steps", json!(1.5)),
        ("max_length", json!("long")),
        ("packing", json!("maybe")),
        ("attn_impl", json!("flash")),
        ("torch_dtype", json!("bf16")),
        ("learning_rate", json!(0)),
        ("learning_rate", json!("NaN")),
        ("learning_rate", json!("inf")),
        ("learning_rate", json!(2)),
        ("warmup_ratio", json!(1)),
        ("num_train_epochs", json!(-1)),
        ("save_steps", json!(0)),
        ("save_steps", json!(1.5)),
        ("save_total_limit", json!(0)),
        ("router_aux_loss_coef", json!(-0.1)),
        ("lora_rank", json!(0)),
        ("lora_rank", json!("eight")),
        ("max_steps", json!(0)),
        ("max_steps", json!(-2)),
        ("target_modules", json!([])),
        ("target_modules", json!(3)),
        ("dataloader_num_workers", json!(-1)),
    ] {
        let text = error(json!({"args": {arg: value}})).to_string();
        assert!(text.contains(&format!("`args.{arg}")), "{arg}: {text}");
    }
    let near = error(json!({"args": {"attn_impl": "flash_atn"}})).help().unwrap();
    assert!(near.starts_with("did you mean \"flash_attn\"?"), "{near}");
}

#[test]
fn length_in_tokens_is_a_pin() {
    assert_eq!(good(json!({"length": 1500})).pins().unwrap().max_length, Some(1500));
    assert_eq!(good(json!({"length": "long"})).pins().unwrap().max_length, None);
}

#[test]
fn a_pinned_batch_below_the_minimum_is_refused_with_both_numbers() {
    let small = json!({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4});
    let error = error(json!({"args": small}));
    assert!(error.to_string().contains("is 16 (4 x 4 x 1 device(s)), the smallest allowed is 32"), "{error}");
    good(json!({"args": small, "min_effective_batch": 16}));
    good(json!({"args": small, "devices": 2}));
    good(json!({"args": {"per_device_train_batch_size": 4}}));
    let huge = json!({"per_device_train_batch_size": 1_000_000, "gradient_accumulation_steps": 1_000_000});
    good(json!({"args": huge, "devices": 1024}));
}

#[test]
fn targets_are_a_text_or_a_list() {
    let names = Targets::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]);
    for value in [json!("q_proj,v_proj"), json!("q_proj v_proj"), json!(["q_proj", "v_proj"])] {
        let pins = good(json!({"args": {"target_modules": value}})).pins().unwrap();
        assert_eq!(pins.target_modules.as_ref(), Some(&names));
    }
    let pins = good(json!({"args": {"target_modules": ["all-linear"]}})).pins().unwrap();
    assert_eq!(pins.target_modules, Some(Targets::AllLinear));
}

#[test]
fn max_steps_is_read_and_minus_one_means_none() {
    assert_eq!(good(json!({"args": {"max_steps": "10"}})).max_steps(), Ok(Some(10)));
    assert_eq!(good(json!({"args": {"max_steps": -1}})).max_steps(), Ok(None));
}

#[test]
fn lora_over_four_bits_is_qlora_in_memory() {
    let memory = |keys| good(keys).train_type_in_memory().unwrap();
    assert_eq!(memory(json!({"args": {"quant_bits": 4}})), TrainType::Qlora);
    assert_eq!(memory(json!({"args": {"quant_bits": "8"}})), TrainType::Lora);
    assert_eq!(memory(json!({"train_type": "full"})), TrainType::Full);
}

#[test]
fn a_secret_in_clear_is_refused_without_showing_it() {
    const SECRET: &str = "Zx81mYc0nF1d3nt1alTok3nQ";
    for keys in [
        json!({"args": {"--swanlab_token": SECRET}}),
        json!({"args": {"swanlab-secret": SECRET}}),
        json!({"args": {"hub_token": [SECRET]}}),
        json!({"args": {"anything": format!("hf_{SECRET}")}}),
        json!({"env": {"SWANLAB_API_KEY": SECRET}}),
        json!({"env": {"HTTP_PROXY": format!("http://me:{SECRET}@proxy:3128")}}),
        json!({"env": {"MY": SECRET}, "secrets": ["MY"]}),
        json!({"report_to": {"swanlab": {"token": SECRET}}}),
        json!({"report_to": {"swanlab": {"webhook_url": SECRET}}}),
        json!({"labels": {"a": format!("hf_{SECRET}")}}),
        json!({"dataset": format!("https://me:{SECRET}@host/d.jsonl")}),
        json!({"validation": [format!("https://me:{SECRET}@host/d.jsonl")]}),
    ] {
        let error = error(keys.clone());
        let all = format!("{error} {error:?} {}", error.help().unwrap());
        assert_eq!(error.code(), "secret_in_clear", "{keys}");
        assert!(!all.contains(SECRET) && all.contains("0600"), "{all}");
    }
    assert!(
        error(json!({"report_to": {"swanlab": {"token": SECRET}}}))
            .help()
            .unwrap()
            .contains("SWANLAB_API_KEY")
    );
}

#[test]
fn no_error_about_env_or_secrets_shows_a_value() {
    const VALUE: &str = "v4lu3";
    for keys in [
        json!({"env": {"A": [VALUE]}}),
        json!({"env": {"A": format!("{VALUE}\n")}}),
        json!({"env": {"A": format!("{VALUE}\u{0}")}}),
        json!({"env": {"CUDA_VISIBLE_DEVICES": VALUE}}),
        json!({"secrets": VALUE}),
        json!({"secrets": [format!("A={VALUE}")]}),
        json!({"secrets": {"A": VALUE}}),
        json!({"secrets": [{"A": VALUE}]}),
    ] {
        let error = error(keys.clone());
        assert!(!format!("{error} {error:?} {:?}", error.help()).contains(VALUE), "{keys}: {error}");
    }
}

#[test]
fn ordinary_parameters_about_tokens_are_no_secrets() {
    good(json!({
        "args": {"max_new_tokens": 64, "pad_token": "<pad>", "eos_token": "</s>", "tokenizer": "t", "num_tokens": 3,
                 "tokens_per_batch": 4096, "use_auth_token": true, "hub_token": ""},
        "env": {"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": "", "HTTP_PROXY": "http://proxy:3128"}
    }));
}

#[test]
fn a_shell_variable_is_not_taken_for_a_value() {
    for keys in [
        json!({"args": {"swanlab_project": "$SWANLAB_PROJECT"}}),
        json!({"env": {"A": "${HOME}"}}),
        json!({"report_to": {"swanlab": {"project": "$P"}}}),
    ] {
        assert_eq!(error(keys.clone()).code(), "not_expanded", "{keys}");
    }
    assert_eq!(error(json!({"args": {"swanlab_token": "$SWANLAB_TOKEN"}})).code(), "secret_in_clear");
    good(json!({"env": {"LD_LIBRARY_PATH": "/opt/lib:$LD_LIBRARY_PATH"}}));
}

#[test]
fn numbers_in_the_environment_become_text() {
    let job = good(json!({"env": {"A": 1, "B": 0.5, "C": "x"}}));
    assert_eq!(job.env.values().collect::<Vec<_>>(), ["1", "0.5", "x"]);
    for name in ["", "A B", "A=B", "1A"] {
        assert_eq!(error(json!({"env": {name: "x"}})).code(), "bad_variable_name", "{name}");
    }
}

#[test]
fn debug_output_hides_the_environment() {
    let job = good(json!({"env": {"NAME": "value-in-here"}}));
    assert!(format!("{job:?}").contains("NAME") && !format!("{job:?}").contains("value-in-here"));
}

#[test]
fn a_full_job_is_the_same_after_writing_and_reading() {
    let job = good(json!({
        "name": "n", "device": 6, "train_type": "qlora", "length": 1024, "validation": ["v1", "v2"], "save": "long_run",
        "learning": "stable", "output_dir": "/o", "report_to": {"swanlab": {"project": "p"}, "wandb": {}},
        "min_effective_batch": 64, "allow": {"emergency": false, "liger": true}, "secrets": ["A", "B"],
        "time_limit": "1d", "args": {"lora_rank": 16, "x": [1, 2.5, "y"]}, "env": {"C": "1"}, "priority": -3,
        "labels": {"k": "v"}, "after": [2, 1]
    }));
    assert_eq!(JobSpec::from_value(&job.to_json()), Ok(job));
}

#[test]
fn the_sizing_request_carries_the_wishes_and_the_pins() {
    let job =
        good(json!({"train_type": "full", "length": "short", "args": {"lora_rank": 4, "packing": false}}));
    let card = Card {
        name: "card".to_owned(),
        index: Some(0),
        total: Bytes::from_gib(80),
        free: Bytes::from_gib(70),
        compute_capability: None,
    };
    let features =
        TrainerFeatures { flash_attn: true, liger: false, bitsandbytes: false, experts: ExpertForm::Fused };
    let request = job.sizing_request(any_model(), card.clone(), Bytes::from_gib(10), features, 0.1).unwrap();
    assert_eq!((request.card, request.held_by_others), (card, Bytes::from_gib(10)));
    assert_eq!(
        (request.train_type, request.length, request.pins.lora_rank),
        (TrainType::Full, Length::Short, Some(4))
    );
    assert_eq!((request.pins.packing, request.oom_risk), (Some(false), 0.1));
}

fn any_model() -> Model {
    Model::resolve("Qwen/Qwen2.5-7B-Instruct", None, None).unwrap()
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        proptest::sample::select(vec!["standard", "auto", "lora", "12h", "$A", "none", "GPU-1", "-x", "8"])
            .prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::btree_map("[a-z_]{1,8}|[A-Z]{1,3}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn any_bytes_give_a_job_or_an_error_and_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = JobSpec::parse(&bytes);
    }

    #[test]
    fn any_values_give_an_error_or_a_job_that_reads_back_the_same(
        keys in proptest::collection::btree_map(proptest::sample::select(&KEYS[2..]), any_json(), 0..4),
    ) {
        let keys: Value = Value::Object(keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect());
        match JobSpec::from_value(&with(keys)) {
            Ok(job) => {
                prop_assert!(job.pins().is_ok());
                prop_assert_eq!(JobSpec::from_value(&job.to_json()), Ok(job));
            }
            Err(error) => prop_assert!(error.to_string().len() < 700),
        }
    }
}

#[test]
fn the_home_directory_is_written_out_where_a_path_begins_with_it() {
    let keys = json!({"model": "~/models/m", "dataset": ["~/a.jsonl", "org/~/b", "c~/d.jsonl"],
        "validation": ["~/v.jsonl"], "output_dir": "~/out"});
    let mut spec = good(keys);
    spec.expand_home(Path::new("ann"));
    assert_eq!(spec.model, "~/models/m");
    spec.expand_home(Path::new("/home/ann/"));
    assert_eq!(spec.model, "/home/ann/models/m");
    assert_eq!(spec.dataset, ["/home/ann/a.jsonl", "org/~/b", "c~/d.jsonl"]);
    assert_eq!(spec.validation, Some(Validation::Datasets(vec!["/home/ann/v.jsonl".to_owned()])));
    assert_eq!(spec.output_dir, "/home/ann/out");
}
