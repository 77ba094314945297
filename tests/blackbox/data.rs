//! `mhtraind plan` looks at the rows of the data: counted, cached, and said when nobody could.

use serde_json::{Value, json};

use crate::environment::{FakeHost, TestEnv};

const CARD: [&str; 6] = ["--gpu-free", "80GiB", "--compute-capability", "8.0", "--flash-attn", "yes"];

/// A tokenizer with one token for each word.
const WORDS: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}"#;

/// Writes a model of a known shape with a tokenizer, and a job on `rows` rows of 100 words and `long` of 2500.
fn job(env: &TestEnv, rows: usize, long: usize) {
    env.write(
        "Qwen2.5-0.5B/config.json",
        r#"{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
            "tie_word_embeddings": true}"#,
    );
    env.write("Qwen2.5-0.5B/tokenizer.json", WORDS);
    let row = |words: usize| format!("{}\n", json!({"query": "q", "response": "w ".repeat(words)}));
    env.write("train.jsonl", row(100).repeat(rows) + &row(2500).repeat(long));
    env.write(
        "job.json",
        json!({"model": "./Qwen2.5-0.5B", "dataset": "train.jsonl", "length": "short"}).to_string(),
    );
}

fn plan(env: &TestEnv) -> Value {
    env.run(&[&["plan", "job.json", "--json"][..], &CARD].concat()).expect(0).json()
}

#[test]
fn a_plan_says_what_a_length_drops_and_what_never_comes() {
    let env = TestEnv::new();
    job(&env, 97, 3);
    let data = &plan(&env)["data"];
    assert_eq!(
        (&data["rows"], &data["exact"], &data["template"]),
        (&json!(100), &json!(true), &json!("qwen2_5"))
    );
    assert_eq!((&data["max_length"], &data["rows_dropped"]), (&json!(2048), &json!(3)));
    assert!(data["p50"].as_u64().unwrap() > 100 && data["max"].as_u64().unwrap() > 2500, "{data}");
    // Of about 120 tokens each, 17 go into a pack of 2048: six packs, one step.
    assert_eq!(data["optimizer_steps"], 1, "{data}");
    let warnings = data["warnings"].to_string();
    assert!(warnings.contains("2048 drops 3.0 % of rows (3); 3072 0.0 %"), "{warnings}");
    assert!(warnings.contains("save_steps 200 never comes"), "{warnings}");
    let text = env.run(&[&["plan", "job.json"][..], &CARD].concat()).expect(0).stdout;
    assert!(text.contains("data: 100 rows") && text.contains("@2048: 3 rows dropped (3.0 %)"), "{text}");
}

#[test]
fn the_same_files_are_counted_once() {
    let env = TestEnv::new();
    job(&env, 10, 0);
    let first = plan(&env);
    assert_eq!(first["data"]["cached"], false);
    assert_eq!(plan(&env)["data"]["cached"], true);
    job(&env, 11, 0);
    let changed = plan(&env);
    assert_eq!((&changed["data"]["cached"], &changed["data"]["rows"]), (&json!(false), &json!(11)));
}

#[test]
fn a_list_that_is_cut_off_is_not_looked_at_and_the_error_is_told() {
    let env = TestEnv::new();
    job(&env, 1, 0);
    let rows: Vec<Value> =
        (0..1000).map(|id| json!({"query": "q", "response": format!("w {id} ").repeat(40)})).collect();
    let list = json!(rows).to_string();
    env.write("train.json", &list[..list.len() - 40]);
    env.write("job.json", json!({"model": "./Qwen2.5-0.5B", "dataset": "train.json"}).to_string());
    let plan = plan(&env);
    assert_eq!(plan["data"], Value::Null, "{}", plan["data"]);
    let notes = plan["notes"].to_string();
    assert!(notes.contains("were not looked at: cannot read") && notes.contains("EOF"), "{notes}");
}

#[test]
fn rows_that_are_no_text_stop_the_trainer_and_are_not_said_to_be_left_out() {
    let env = TestEnv::new();
    job(&env, 1, 0);
    env.write(
        "train.csv",
        [&b"query,response\n"[..], &b"q,\xff\xfe\n".repeat(20), &b"q,fine\n".repeat(80)].concat(),
    );
    env.write("job.json", json!({"model": "./Qwen2.5-0.5B", "dataset": "train.csv"}).to_string());
    let plan = plan(&env);
    let data = &plan["data"];
    assert_eq!(
        (&data["rows"], &data["faulty"], &data["unreadable"]),
        (&json!(80), &json!(0), &json!(20)),
        "{data}"
    );
    let first = data["warnings"][0].as_str().unwrap();
    assert!(first.starts_with("the trainer will stop at 20 rows that cannot be read"), "{first}");
    assert!(first.contains("train.csv"), "{first}");
    assert!(!data["warnings"].to_string().contains("leaves them out"), "{data}");
}

#[test]
fn where_nobody_could_look_a_note_says_why() {
    let env = TestEnv::new();
    job(&env, 10, 0);
    std::fs::remove_file(env.path("Qwen2.5-0.5B/tokenizer.json")).unwrap();
    let without = plan(&env);
    assert_eq!(without["data"], Value::Null);
    let notes = without["notes"].to_string();
    assert!(notes.contains("not looked at") && notes.contains("tokenizer.json"), "{notes}");
    env.write("job.json", json!({"model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "org/data"}).to_string());
    let notes = plan(&env)["notes"].to_string();
    assert!(notes.contains("Qwen/Qwen2.5-7B-Instruct is not on this machine"), "{notes}");
}

#[test]
fn what_strangers_put_into_a_tokenizer_ends_the_look_and_not_the_plan() {
    let env = TestEnv::new();
    job(&env, 10, 0);
    env.write("Qwen2.5-0.5B/tokenizer.json", "[".repeat(1 << 20));
    let plan = plan(&env);
    assert_eq!(plan["data"], Value::Null);
    assert!(plan["notes"].to_string().contains("not looked at"), "{}", plan["notes"]);
}

#[test]
fn the_time_of_a_run_is_told_once_a_run_was_seen_and_not_before() {
    let host = FakeHost::with_card(80 << 30);
    host.job(
        json!({"name": "timed", "args": {"template": "qwen2_5", "logging_steps": 1, "num_train_epochs": 1}}),
    );
    host.env.write("model/tokenizer.json", WORDS);
    let row = json!({"query": "q", "response": "w w w"});
    host.env.write("train.jsonl", format!("{row}\n").repeat(320));
    let planned = || host.run(&["plan", "job.json", "--json"], json!({})).expect(0).json();
    let shown = || host.run(&["plan", "job.json"], json!({})).expect(0).stdout;
    let before = planned();
    assert_eq!((&before["eta"]["step_s"], &before["eta"]["run_s"]), (&Value::Null, &Value::Null));
    assert!(shown().contains("time: not known yet: no run of this model"), "{}", shown());
    host.run(&["run", "job.json"], json!({"step_seconds": 0.2})).expect(0);
    let after = planned();
    let (eta, steps) = (&after["eta"], after["data"]["optimizer_steps"].as_u64().unwrap());
    assert_eq!(steps, 10, "{}", after["data"]);
    let guess = |of: &str| eta[of]["guess"].as_f64().unwrap();
    assert!((0.2..1.0).contains(&guess("step_s")), "{eta}");
    assert!((guess("run_s") - 10.0 * guess("step_s")).abs() < 1e-6, "{eta}");
    assert!(eta["run_s"]["low"].as_f64() < eta["run_s"]["guess"].as_f64(), "{eta}");
    assert_eq!(eta["same_rung"], true, "{eta}");
    assert!(eta["from"].to_string().contains("timed of "), "{eta}");
    assert!(shown().contains("time: about 0:0"), "{}", shown());
    // Another card may be faster or slower by any factor.
    let other = host.run(&["plan", "job.json", "--json", "--gpu-free", "80GiB"], json!({})).expect(0).json();
    assert_eq!(other["eta"]["run_s"], Value::Null);
    assert!(other["eta"]["why_not"].as_str().unwrap().contains("no run of this model"), "{other}");
}

#[test]
fn a_copy_or_a_touched_file_is_known_and_a_change_in_place_is_seen_whatever_its_time() {
    let env = TestEnv::new();
    job(&env, 10, 0);
    let seen = || {
        let plan = plan(&env);
        (plan["data"]["cached"].clone(), plan["data"]["max"].clone())
    };
    let (is_cached, longest) = seen();
    assert_eq!(is_cached, false);
    // Another time, another inode and another name; the model lies elsewhere, too.
    let file = std::fs::File::options().write(true).open(env.path("train.jsonl")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1 << 30)).unwrap();
    assert_eq!(seen(), (json!(true), longest.clone()), "touched");
    env.write("elsewhere/rows.jsonl", std::fs::read(env.path("train.jsonl")).unwrap());
    std::fs::rename(env.path("Qwen2.5-0.5B"), env.path("elsewhere/Qwen2.5-0.5B")).unwrap();
    env.write(
        "job.json",
        json!({"model": "elsewhere/Qwen2.5-0.5B", "dataset": "elsewhere/rows.jsonl", "length": "short"})
            .to_string(),
    );
    assert_eq!(seen(), (json!(true), longest.clone()), "copied");
    // As many bytes and the same time, but a word less and a longer one.
    let path = env.path("elsewhere/rows.jsonl");
    let modified = path.metadata().unwrap().modified().unwrap();
    let changed = std::fs::read_to_string(&path).unwrap().replace("w w ", "www ");
    std::fs::write(&path, changed).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    let (is_cached, shorter) = seen();
    assert_eq!(is_cached, false);
    assert!(shorter.as_u64() < longest.as_u64(), "{shorter} {longest}");
    // What the tokenizer makes of the same text counts, too.
    let tokenizer = WORDS.replace("WhitespaceSplit", "Whitespace");
    env.write("elsewhere/Qwen2.5-0.5B/tokenizer.json", tokenizer);
    assert_eq!(seen().0, false, "another tokenizer");
}

#[test]
fn unpacked_rows_are_sized_by_the_longest_of_the_data_where_that_is_sure() {
    let env = TestEnv::new();
    job(&env, 50, 0);
    let spec = json!({"model": "./Qwen2.5-0.5B", "dataset": "train.jsonl", "args": {"packing": false}});
    env.write("job.json", spec.to_string());
    let row = |words: usize| format!("{}\n", json!({"query": "q", "response": "w ".repeat(words)}));
    // The bound, whether each rung is sized by it, and what the first needs.
    let sized = |plan: &Value| {
        let rungs = plan["rungs"].as_array().unwrap();
        let number = |value: &Value| value.as_u64().unwrap();
        let full = |rung: &Value| number(&rung["tier"]["max_length"]);
        let bound = plan["longest_row"].as_u64();
        for rung in rungs {
            let expected = bound.map_or(full(rung), |bound| bound.min(full(rung)));
            assert_eq!(number(&rung["sized_row"]), expected, "{rung}");
        }
        (bound, number(&rungs[0]["predicted_peak_bytes"]))
    };
    let all = |rows: Vec<String>| env.write("train.jsonl", rows.concat());

    let of_100 = plan(&env);
    let longest = of_100["data"]["max"].as_u64().unwrap();
    let (bound, need) = sized(&of_100);
    // 16 tokens more, and a multiple of 64: docs/sizing.md, section 5.
    assert_eq!(bound, Some((longest + 16).next_multiple_of(64)), "{longest}");
    let notes = of_100["notes"].to_string();
    assert!(notes.contains(&format!("the longest has {longest}")), "{notes}");

    all(vec![row(100).repeat(50), row(700)]);
    let (longer, more) = sized(&plan(&env));
    assert!(longer > bound && more > need, "{longer:?} {more}");

    // The rung's own length, where the longest row is beyond it or nobody knows the longest.
    all(vec![row(100).repeat(50), row(9000)]);
    let (_, most) = sized(&plan(&env));
    assert!(most > more, "{most}");
    all(vec![row(100).repeat(50), "{\"query\": \n".to_owned()]);
    let damaged = plan(&env);
    assert_eq!((&damaged["data"]["unreadable"], sized(&damaged)), (&json!(1), (None, most)));
    for number in 0..=1000 {
        env.write(&format!("many/{number}.jsonl"), row(100));
    }
    let spec = json!({"model": "./Qwen2.5-0.5B", "dataset": "./many", "args": {"packing": false}});
    env.write("job.json", spec.to_string());
    let many = plan(&env);
    assert_eq!((&many["data"], sized(&many)), (&Value::Null, (None, most)));
    assert!(many["notes"].to_string().contains("more than 1000 files"), "{}", many["notes"]);
}
