//! `mhtraind estimate`: lines in, lines out.

use serde_json::{Value, json};

use crate::environment::TestEnv;

fn shape() -> Value {
    json!({"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": false})
}

#[test]
fn good_and_bad_lines_are_answered_in_order() {
    let env = TestEnv::new();
    env.write("config.json", shape().to_string());
    let good = json!({"config": "config.json", "train_type": "lora", "lora_rank": 8, "micro_batch": 1,
        "max_length": 2048, "packing": true, "attn_impl": "flash_attn"});
    let object = json!({"config_object": shape(), "train_type": "full", "micro_batch": 1, "max_length": 512});
    let unknown_key = json!({"config": "config.json", "micro_bach": 1, "max_length": 2048});
    let input = format!(
        "{good}\nnot json\n{object}\n{unknown_key}\n{}\n",
        json!({"config": "absent.json", "micro_batch": 1, "max_length": 8})
    );
    let ran = env.run_with_input(&["estimate", "--json", "-"], input.as_bytes()).expect(2);
    let answers: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 5);
    for good in [&answers[0], &answers[2]] {
        let number = |key: &str| good[key].as_u64().unwrap_or_else(|| panic!("{key}: {good}"));
        assert!(number("low_bytes") <= number("device_peak_bytes"));
        assert!(number("device_peak_bytes") <= number("high_bytes"));
        assert!(number("allocated_peak_bytes") <= number("device_peak_bytes"));
        for term in ["weights", "adapter", "gradients", "optimizer", "activations", "logits", "context"] {
            assert!(good["terms"][term].is_u64(), "{term}");
        }
    }
    assert_eq!((&answers[0]["source"], &answers[0]["notes"]), (&json!("config"), &json!([])));
    for bad in [&answers[1], &answers[3], &answers[4]] {
        assert!(bad["error"]["code"].is_string() && bad["error"]["message"].is_string(), "{bad}");
    }
    assert!(answers[3]["error"].to_string().contains("micro_batch"), "names the nearest key");
    assert!(answers[4]["error"]["message"].as_str().unwrap().contains("absent.json"));
}

#[test]
fn only_good_lines_end_with_0() {
    let env = TestEnv::new();
    let line = json!({"config_object": shape(), "train_type": "lora", "micro_batch": 2, "max_length": 1024});
    let text = line.to_string() + "\n";
    env.run_with_input(&["estimate", "--json"], text.as_bytes()).expect(0);
    let table = env.run_with_input(&["estimate"], text.as_bytes()).expect(0).stdout;
    assert!(table.contains("GiB"), "{table}");
    let novel = text.replace("qwen2", "novel");
    let table = env.run_with_input(&["estimate"], novel.as_bytes()).expect(0).stdout;
    assert!(table.contains("the blocks of `novel` are not among those"), "{table}");
}

#[test]
fn odd_shapes_are_errors_and_no_panics() {
    let env = TestEnv::new();
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!("3584")),
        ("num_hidden_layers", json!(u64::MAX)),
        ("vocab_size", json!(9_223_372_036_854_775_808u64)),
        ("num_attention_heads", json!(null)),
        ("intermediate_size", json!([])),
    ] {
        let mut odd = shape();
        odd[key] = value.clone();
        let line = json!({"config_object": odd, "train_type": "lora", "micro_batch": 1, "max_length": 2048});
        let ran = env.run_with_input(&["estimate", "--json"], format!("{line}\n").as_bytes()).expect(2);
        let answer: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert!(answer["error"]["message"].is_string(), "{key} = {value}: {answer}");
    }
}

#[test]
fn a_byte_order_mark_and_a_line_without_end_are_understood_and_refused() {
    let env = TestEnv::new();
    let line = json!({"config_object": shape(), "micro_batch": 2});
    env.run_with_input(&["estimate", "--json"], format!("\u{feff}{line}").as_bytes()).expect(0);
    let ran = env.run_with_input(&["estimate", "--json"], &vec![b' '; (10 << 20) + 1]).expect(2);
    let error: Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["code"], "too_large");
}
