//! `mhtraind plan`: the recipe's profiles come back, and the numbers are in the reasons.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::environment::{Ran, TestEnv};

/// An idle 80 GiB card of the A100's kind with flash-attn, described by flags.
const IDLE_80_GIB: [&str; 8] =
    ["--gpu-free", "80GiB", "--gpu-total", "80GiB", "--compute-capability", "8.0", "--flash-attn", "yes"];

/// The recipe's `swift sft` blocks as (model, micro-batch, accumulation, max_length, packing, lr, save, limit, log, attn).
type Row = (&'static str, u32, u32, u32, bool, &'static str, u32, u32, u32, &'static str);
const RECIPE: [Row; 5] = [
    ("Qwen/Qwen2.5-7B-Instruct", 8, 4, 3072, true, "2e-4", 200, 3, 20, "flash_attn"),
    ("meta-llama/Llama-3.1-8B-Instruct", 6, 6, 3072, true, "2e-4", 200, 3, 20, "flash_attn"),
    ("internlm/internlm-20b", 2, 16, 3072, true, "2e-4", 200, 3, 20, "flash_attn"),
    ("Qwen/Qwen2.5-7B-Instruct", 1, 32, 2048, false, "1e-4", 100, 2, 50, "sdpa"),
    ("Qwen/Qwen2-7B-Instruct", 8, 4, 3072, true, "2e-4", 200, 3, 20, "flash_attn"),
];

/// Returns the values that a recipe row sets, by flag.
fn values(
    (model, micro, accumulation, length, packing, lr, save, limit, log, attn): Row,
) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("--model", model.to_owned()),
        ("--train_type", "lora".to_owned()),
        ("--dataset", "CodyWhy/mh-sharegpt-20250820".to_owned()),
        ("--torch_dtype", "bfloat16".to_owned()),
        ("--max_length", length.to_string()),
        ("--packing", packing.to_string()),
        ("--gradient_checkpointing", "true".to_owned()),
        ("--per_device_train_batch_size", micro.to_string()),
        ("--gradient_accumulation_steps", accumulation.to_string()),
        ("--learning_rate", lr.to_owned()),
        ("--num_train_epochs", "1".to_owned()),
        ("--warmup_ratio", "0.1".to_owned()),
        ("--save_steps", save.to_string()),
        ("--save_total_limit", limit.to_string()),
        ("--logging_steps", log.to_string()),
        ("--output_dir", "./output/my-sft".to_owned()),
        ("--report_to", "swanlab".to_owned()),
        ("--swanlab_project", "multi-model-psychology".to_owned()),
        ("--swanlab_mode", "cloud".to_owned()),
        ("--swanlab_exp_name", "my-sft".to_owned()),
        ("--attn_impl", attn.to_owned()),
    ])
}

/// Returns the shell block that a person would have for a row, token and all.
fn block(row: Row) -> String {
    let mut text = "export NO_PROXY=127.0.0.1,localhost,::1\nexport SWANLAB_TOKEN=canary-4711\n\n".to_owned();
    text += "CUDA_VISIBLE_DEVICES=6 \\\nswift sft \\\n  --swanlab_token $SWANLAB_TOKEN";
    for (flag, value) in values(row) {
        text += &format!(" \\\n  {flag} {value}");
    }
    text + "\n"
}

fn plan(env: &TestEnv, job: &str, extra: &[&str]) -> Ran {
    let mut args = vec!["plan", job, "--json"];
    args.extend(extra);
    env.run(&args)
}

/// Returns the flags of a plan's command.
fn flags(plan: &Value) -> BTreeMap<String, String> {
    let words: Vec<&str> = plan["command"].as_array().unwrap().iter().map(|w| w.as_str().unwrap()).collect();
    assert_eq!(&words[..2], ["swift", "sft"]);
    words[2..].chunks(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
}

fn import(env: &TestEnv, row: Row, pin: bool) -> Value {
    env.write("train.sh", block(row));
    let args: &[&str] = if pin { &["import", "train.sh", "--pin"] } else { &["import", "train.sh"] };
    let ran = env.run(args).expect(0);
    assert!(!ran.stdout.contains("canary") && !ran.stderr.contains("canary"), "the token leaked");
    env.write("job.json", &ran.stdout);
    ran.json()
}

#[test]
fn pinned_blocks_come_back_unchanged() {
    for row in RECIPE {
        let env = TestEnv::new();
        import(&env, row, true);
        let extra: Vec<&str> = IDLE_80_GIB.into_iter().chain(["--ms-swift", "3.12.6"]).collect();
        let plan = plan(&env, "job.json", &extra).expect(0).json();
        let wanted: BTreeMap<String, String> =
            values(row).into_iter().map(|(flag, value)| (flag.to_owned(), value)).collect();
        let mut got = flags(&plan);
        // The one path: relative to where the job was submitted, it is shown absolute or as written.
        let output_dir = got.remove("--output_dir").unwrap();
        assert!(output_dir.ends_with("output/my-sft"), "{output_dir}");
        let mut wanted = wanted;
        wanted.remove("--output_dir");
        assert_eq!(got, wanted);
        assert_eq!(plan["env"]["CUDA_VISIBLE_DEVICES"], "6");
        assert!(plan["env"]["NO_PROXY"].as_str().unwrap().contains("127.0.0.1"));
    }
}

#[test]
fn the_engine_itself_arrives_at_the_recipes_rows() {
    for row in [RECIPE[0], RECIPE[1], RECIPE[2], RECIPE[4]] {
        let env = TestEnv::new();
        import(&env, row, false);
        let extra: Vec<&str> = IDLE_80_GIB.into_iter().chain(["--ms-swift", "3.12.6"]).collect();
        let plan = plan(&env, "job.json", &extra).expect(0).json();
        let got = flags(&plan);
        for (flag, value) in values(row).into_iter().filter(|(flag, _)| *flag != "--output_dir") {
            assert_eq!(got.get(flag), Some(&value), "{} {flag}", row.0);
        }
        assert_eq!(plan["chosen"]["micro_batch"], row.1, "{}", row.0);
        assert_eq!(plan["effective_batch"], row.1 * row.2);
    }
}

#[test]
fn gpt_oss_gets_the_recipes_large_moe_values_with_e_32() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "openai/gpt-oss-20b", "dataset": "org/data"}).to_string());
    let plan = plan(&env, "job.json", &IDLE_80_GIB).expect(0).json();
    let chosen = &plan["chosen"];
    assert_eq!(chosen["micro_batch"], 1);
    assert_eq!(chosen["accumulation"], 32);
    assert_eq!(chosen["max_length"], 2048);
    assert_eq!(chosen["warmup_ratio"], 0.05);
    assert_eq!(chosen["save_steps"], 50);
    assert_eq!(chosen["save_total_limit"], 2);
    assert_eq!(chosen["logging_steps"], 5);
    assert_eq!(chosen["router_aux_loss_coef"], 0.001);
    assert_eq!(chosen["attn_impl"], "eager");
    assert_eq!(chosen["packing"], false);
}

#[test]
fn what_a_site_writes_into_its_tiers_toml_is_in_the_command() {
    let env = TestEnv::new();
    let mut book = include_str!("../../config/tiers.toml").to_owned();
    for (from, to) in [
        ("[lora]                        # recipe 8.1\nrank = 8\nalpha = 32", "[lora]\nrank = 16\nalpha = 48"),
        ("cores_per_worker = 2\nmin = 1\nmax = 8", "cores_per_worker = 1\nmin = 3\nmax = 3"),
        ("per_device_eval_batch_size = 1", "per_device_eval_batch_size = 4"),
        ("eval_steps = 200              # recipe 8.4, small models", "eval_steps = 70"),
    ] {
        assert!(book.contains(from), "{from}");
        book = book.replace(from, to);
    }
    env.write("tiers.toml", book);
    env.write("site.toml", "[sizing]\ntiers = \"tiers.toml\"\n");
    let job = json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data", "validation": 0.02});
    env.write("job.json", job.to_string());
    let site: Vec<&str> = ["--config", "site.toml"].into_iter().chain(IDLE_80_GIB).collect();
    let plan = plan(&env, "job.json", &site).expect(0).json();
    let flags = flags(&plan);
    for (flag, value) in [
        ("--lora_rank", "16"),
        ("--lora_alpha", "48"),
        ("--dataloader_num_workers", "3"),
        ("--per_device_eval_batch_size", "4"),
        ("--eval_steps", "70"),
    ] {
        assert_eq!(flags.get(flag).map(String::as_str), Some(value), "{flag}");
    }
    assert_eq!(plan["chosen"]["lora_rank"], 16);
}

#[test]
fn fewer_targets_are_a_rung_of_their_own_where_the_job_allows_them() {
    let env = TestEnv::new();
    let job = json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data",
        "allow": {"fewer_targets": true, "emergency": false}});
    env.write("job.json", job.to_string());
    let small = ["--gpu-free", "21.5GiB", "--compute-capability", "8.6", "--flash-attn", "yes"];
    let plan = plan(&env, "job.json", &small).expect(0).json();
    assert_eq!(plan["chosen"]["name"], "fewer_targets", "{plan}");
    let words = plan["command"].as_array().unwrap();
    let at = words.iter().position(|word| word == "--target_modules").unwrap();
    assert_eq!((&words[at + 1], &words[at + 2]), (&json!("q_proj"), &json!("v_proj")));
    let said = |note: &Value| note.as_str().unwrap().contains("q_proj,v_proj instead of all-linear");
    assert!(plan["notes"].as_array().unwrap().iter().any(said), "{plan}");
}

#[test]
fn memory_without_a_unit_is_bad_usage_that_suggests_one() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    for (said, suggested) in [("22.5", "write 22.5GiB"), ("24", "write 24GiB, or all bytes (25769803776)")] {
        let ran = plan(&env, "job.json", &["--gpu-free", said]).expect(2);
        assert!(ran.stderr.contains(suggested), "{}", ran.stderr);
    }
}

#[test]
fn a_full_card_gets_a_lower_rung_and_every_refusal_has_both_numbers() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    let flags =
        ["--gpu-free", "22GiB", "--gpu-total", "24GiB", "--compute-capability", "8.6", "--flash-attn", "yes"];
    let plan = plan(&env, "job.json", &flags).expect(0).json();
    assert!(plan["chosen"]["micro_batch"].as_u64().unwrap() < 8);
    assert!(plan["effective_batch"].as_u64().unwrap() >= 32);
    let refused: Vec<&Value> =
        plan["rungs"].as_array().unwrap().iter().filter(|rung| rung["fits"] == false).collect();
    assert!(!refused.is_empty());
    for rung in refused {
        let why = rung["why"].as_str().unwrap();
        assert!(why.contains("22.00 GiB") && why.matches("GiB").count() >= 2, "{why}");
    }
}

#[test]
fn no_flash_attention_means_sdpa_without_packing() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    let flags = ["--gpu-free", "80GiB", "--flash-attn", "no", "--compute-capability", "8.0"];
    let plan_json = plan(&env, "job.json", &flags).expect(0).json();
    assert_eq!(plan_json["chosen"]["packing"], false);
    assert_eq!(plan_json["chosen"]["attn_impl"], "sdpa");
    let job =
        json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data", "allow": {"no_packing": false}});
    env.write("job.json", job.to_string());
    let ran = plan(&env, "job.json", &flags).expect(1);
    assert!(ran.stderr.contains("packing"), "{}", ran.stderr);
}

#[test]
fn qlora_becomes_what_ms_swift_takes() {
    let env = TestEnv::new();
    let job = json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data", "train_type": "qlora"});
    env.write("job.json", job.to_string());
    for (version, flag) in [("3.12.6", "--train_type"), ("4.6.0", "--tuner_type")] {
        let extra: Vec<&str> = IDLE_80_GIB.into_iter().chain(["--ms-swift", version]).collect();
        let got = flags(&plan(&env, "job.json", &extra).expect(0).json());
        assert_eq!(got[flag], "lora");
        assert_eq!(got["--quant_method"], "bnb");
        assert_eq!(got["--quant_bits"], "4");
    }
}

#[test]
fn a_plan_that_cannot_be_says_what_is_missing() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-72B-Instruct", "dataset": "org/data"}).to_string());
    let ran = plan(&env, "job.json", &["--gpu-free", "20GiB", "--flash-attn", "yes"]).expect(1);
    let error: Value = serde_json::from_str(&ran.stderr).unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("20.00 GiB") && message.matches("GiB").count() >= 2, "{message}");
    assert!(error["error"]["help"].is_string());
}

#[test]
fn without_a_card_the_error_says_how_to_describe_one() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    let ran = env.run(&["plan", "job.json"]).expect(1);
    assert!(ran.stderr.contains("--gpu-free"), "{}", ran.stderr);
}

#[test]
fn the_table_for_people_ends_in_a_block_that_can_be_pasted() {
    let env = TestEnv::new();
    env.write(
        "job.json",
        json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data", "device": 6}).to_string(),
    );
    let mut args = vec!["plan", "job.json"];
    args.extend(IDLE_80_GIB);
    let text = env.run(&args).expect(0).stdout;
    assert!(text.contains("CUDA_VISIBLE_DEVICES=6"), "{text}");
    env.write("pasted.sh", &text.as_bytes()[text.find("CUDA_VISIBLE_DEVICES").unwrap()..]);
    let again = env.run(&["import", "pasted.sh", "--pin"]).expect(0).json();
    assert_eq!(again["device"], 6);
    assert_eq!(again["args"]["per_device_train_batch_size"], 8);
}

#[test]
fn what_is_assumed_about_a_described_card_is_said_and_what_would_change_the_answer_is_in_the_json() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    let card = ["--gpu-free", "30GiB", "--gpu-total", "80GiB"];
    let assumed = plan(&env, "job.json", &card).expect(0).json();
    for tool in ["flash-attn", "bitsandbytes", "liger-kernel", "compute capability"] {
        assert!(assumed["notes"].to_string().contains(tool), "{tool}: {}", assumed["notes"]);
    }
    let changes = assumed["would_change"].as_array().unwrap();
    assert!(changes[0].as_str().unwrap().contains(" free -> standard "), "{changes:?}");
    assert!(changes.iter().any(|line| line.as_str().unwrap().contains("qlora")), "{changes:?}");
    let told = [&card[..], &["--bitsandbytes", "no"]].concat();
    let told = plan(&env, "job.json", &told).expect(0).json();
    assert!(
        !told["notes"].to_string().contains("bitsandbytes is installed was not given"),
        "{}",
        told["notes"]
    );
    assert!(!told["would_change"].to_string().contains("qlora"), "{}", told["would_change"]);
}

#[test]
fn the_plan_for_people_shows_what_the_rung_needs_and_what_would_take_a_higher_one() {
    let env = TestEnv::new();
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    let card = [
        "--gpu-free",
        "23GiB",
        "--compute-capability",
        "8.6",
        "--flash-attn",
        "yes",
        "--gpu-name",
        "RTX 4090",
    ];
    let mut args = vec!["plan", "job.json", "--liger", "yes"];
    args.extend(card);
    let text = env.run(&args).expect(0).stdout;
    let shown = text.split("notes:").next().unwrap();
    insta::assert_snapshot!(shown);
}

/// The spellings of the two hubs.
#[test]
fn names_of_both_hubs_are_in_the_catalogue() {
    let env = TestEnv::new();
    for model in [
        "internlm/internlm-chat-20b",
        "internlm/internlm2_5-20b-chat",
        "internlm/internlm2_5-7b-chat",
        "Shanghai_AI_Laboratory/internlm2_5-1_8b",
        "Shanghai_AI_Laboratory/internlm2-chat-20b",
        "LLM-Research/Meta-Llama-3-8B-Instruct",
        "01ai/Yi-1.5-9B-Chat",
        "ZhipuAI/glm-4-9b-chat",
        "openai-mirror/gpt-oss-20b",
    ] {
        env.write("job.json", json!({"model": model, "dataset": "org/data"}).to_string());
        let ran = env.run(&[&["plan", "job.json", "--json"][..], &IDLE_80_GIB].concat()).expect(0);
        assert!(!ran.stdout.contains("no entry in models.toml"), "{model}");
    }
}
