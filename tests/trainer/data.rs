//! What `plan` says about the rows of the data is what the trainer does with them.

use serde_json::{Value, json};

use crate::lab::Lab;

/// Writes 600 rows of 1 to 400 words, most of them short, and some that ms-swift cannot read.
fn unequal_rows(lab: &Lab) {
    let words = ["monday", "tuesday", "saturn", "indigo", "north"];
    let text = |count: usize| (0..count).map(|n| words[n % words.len()]).collect::<Vec<_>>().join(" ");
    let row = |n: usize| {
        let long = if n.is_multiple_of(20) { 250 + n / 4 } else { 1 + n * 37 % 90 };
        let ask = json!({"role": "user", "content": format!("<id {n:04}> {}", text(n % 7))});
        json!({"messages": [ask, {"role": "assistant", "content": text(long)}]})
    };
    let broken = json!({"messages": [{"role": "narrator", "content": "x"}]});
    let rows: String =
        (0..600).map(row).chain([broken.clone(), broken]).map(|row| format!("{row}\n")).collect();
    lab.env.write("train.jsonl", rows);
}

/// Returns (before, after) of each "Dataset filtered" line that the trainer printed.
fn filtered(lab: &Lab) -> Vec<(u64, u64)> {
    let text = std::fs::read_to_string(lab.env.path("out/.mhtraind/attempt-1/trainer.log")).expect("its log");
    let number = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    text.lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once("origin length: ")?;
            let (before, after) = rest.split_once(", filtered dataset length: ")?;
            Some((number(before)?, number(after)?))
        })
        .collect()
}

#[test]
fn rows_dropped_and_steps_are_those_of_the_trainer() {
    let Some(lab) = Lab::new() else { return };
    unequal_rows(&lab);
    lab.job(json!({"length": 320, "args": {"packing": false}}), 1);
    let plan = lab.run(&["plan", "job.json", "--json"], &[]).expect(0).json();
    let data = &plan["data"];
    let (rows, dropped) = (data["rows"].as_u64().unwrap(), data["rows_dropped"].as_u64().unwrap());
    assert!((data["exact"] == true) && dropped > 10, "{data}");
    lab.run(&["run", "job.json"], &[]).expect(0);
    let lines = filtered(&lab);
    let unreadable: u64 = data["faulty"].as_u64().unwrap();
    assert_eq!((rows, unreadable), (600, 2));
    // ms-swift leaves out what it cannot read first, and then what is too long.
    assert_eq!(lines, [(602, 600), (600, 600 - dropped)]);
    let receipt = lab.receipt();
    assert_eq!(receipt["proof_facts"]["rows"], data["rows_trained"]);
    assert_eq!(receipt["proof_facts"]["max_steps"], data["optimizer_steps"]);
    assert_eq!(receipt["data"]["rows_dropped"], data["rows_dropped"]);
}

/// Packing needs a flash attention that no CPU has, so ms-swift's packing is asked by itself, with the lengths of its own
/// template: on 600 rows, and on so many that they are packed in several batches.
#[test]
fn packs_are_those_of_the_trainer() {
    let Some(lab) = Lab::new() else { return };
    let (trainer, _) = crate::lab::trainer().expect("as before");
    unequal_rows(&lab);
    let rows = std::fs::read_to_string(lab.env.path("train.jsonl")).unwrap();
    for repeats in [1, 5] {
        lab.env.write("train.jsonl", rows.repeat(repeats));
        lab.job(json!({"length": 320, "args": {"packing": true, "attn_impl": "flash_attn"}}), 1);
        let plan = lab.run(&["plan", "job.json", "--json", "--flash-attn", "yes"], &[]).expect(0).json();
        let script = crate::environment::root().join("tests/trainer/packs.py");
        let mut command = std::process::Command::new(trainer.join("bin/python"));
        command.arg(script).args([lab.env.path("model"), lab.env.path("train.jsonl")]).arg("320");
        let output = command.env("HF_HUB_OFFLINE", "1").output().expect("the interpreter starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let theirs: Value = text
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok())
            .unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
        let ours = &plan["data"];
        assert_eq!(ours["rows_trained"], theirs["rows"], "{ours}");
        let (packs, expected) = (ours["packed_rows"].as_u64().unwrap(), theirs["packs"].as_u64().unwrap());
        // Up to a thousand rows are packed alike in any order; the order of more is a shuffle of the trainer's own.
        let allowed = if repeats == 1 { 0 } else { expected / 100 };
        assert!(
            packs.abs_diff(expected) <= allowed,
            "{repeats}: {packs} packs planned, the trainer makes {expected}"
        );
    }
}
