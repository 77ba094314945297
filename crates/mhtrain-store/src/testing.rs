//! Values that the tests of several modules need.

use mhtrain_job::event::{Record, read_journal};
use serde_json::{Value, json};

use crate::job::{NewJob, Owner};

/// A whole life: out of memory once, then done.
const LIFE: &str = include_str!("../tests/fixtures/life-v1.jsonl");

/// Returns the records of a job that ran out of memory once and succeeded at the second attempt.
pub(crate) fn life() -> Vec<Record> {
    read_journal(LIFE).unwrap()
}

/// Returns the record that has this JSON beside version and time.
pub(crate) fn record(event: &Value) -> Record {
    let mut line = json!({"v": 1, "at": "2026-01-02T03:04:05Z"});
    line.as_object_mut().unwrap().extend(event.as_object().unwrap().clone());
    read_journal(&format!("{line}\n")).unwrap().remove(0)
}

/// Returns a job of user 1000, submitted with `key`.
pub(crate) fn new_job(key: Option<&str>) -> NewJob {
    NewJob {
        owner: Owner { uid: 1000, gid: 100, name: "ada".to_owned() },
        key: key.map(str::to_owned),
        record: life().remove(0),
        name: "m-sft".to_owned(),
        priority: 0,
        context: json!({"cwd": "/home/ada", "umask": 18, "environment": {"HF_HOME": "/home/ada/hf"}}),
    }
}

/// Returns the events that end a job before it began.
pub(crate) fn failed() -> Record {
    record(&json!({"event": "failed", "reason": "no rung fits", "help": "free memory"}))
}
