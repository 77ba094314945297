use std::collections::BTreeSet;

use super::*;
use crate::spec::{ALLOW_KEYS, JobSpec, KEYS};

const DOCS: &str = include_str!("../../../../docs/job.md");

/// Returns the JSON blocks of the documentation.
fn examples() -> Vec<Value> {
    let blocks = DOCS.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.map(|block| serde_json::from_str(block).unwrap()).collect()
}

fn names(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Returns whether `value` is valid, as far as the words go that the schema uses (patterns aside).
fn is_valid(root: &Value, schema: &Value, value: &Value) -> bool {
    let known = [
        "$ref",
        "type",
        "enum",
        "anyOf",
        "items",
        "properties",
        "additionalProperties",
        "propertyNames",
        "required",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minItems",
        "minLength",
        "maxLength",
        "pattern",
        "description",
        "default",
        "examples",
        "$schema",
        "title",
        "$defs",
    ];
    let schema = schema.as_object().unwrap();
    schema.iter().all(|(word, with)| {
        assert!(known.contains(&word.as_str()), "this check does not know the word {word}");
        let number = value.as_f64();
        match word.as_str() {
            "$ref" => {
                is_valid(root, &root["$defs"][with.as_str().unwrap().rsplit('/').next().unwrap()], value)
            }
            "type" => match with {
                Value::String(name) => is_of_type(name, value),
                other => {
                    other.as_array().unwrap().iter().any(|name| is_of_type(name.as_str().unwrap(), value))
                }
            },
            "enum" => with.as_array().unwrap().contains(value),
            "anyOf" => with.as_array().unwrap().iter().any(|one| is_valid(root, one, value)),
            "items" => {
                value.as_array().is_none_or(|items| items.iter().all(|item| is_valid(root, with, item)))
            }
            "required" => value.as_object().is_none_or(|o| {
                with.as_array().unwrap().iter().all(|key| o.contains_key(key.as_str().unwrap()))
            }),
            "properties" => value.as_object().is_none_or(|o| {
                o.iter().all(|(key, inner)| with.get(key).is_none_or(|schema| is_valid(root, schema, inner)))
            }),
            "additionalProperties" => value.as_object().is_none_or(|o| {
                o.iter()
                    .filter(|(key, _)| schema.get("properties").is_none_or(|p| p.get(key).is_none()))
                    .all(|(_, inner)| if with == &json!(false) { false } else { is_valid(root, with, inner) })
            }),
            "propertyNames" => {
                value.as_object().is_none_or(|o| o.keys().all(|key| is_valid(root, with, &json!(key))))
            }
            "minimum" => number.is_none_or(|n| n >= with.as_f64().unwrap()),
            "maximum" => number.is_none_or(|n| n <= with.as_f64().unwrap()),
            "exclusiveMinimum" => number.is_none_or(|n| n > with.as_f64().unwrap()),
            "exclusiveMaximum" => number.is_none_or(|n| n < with.as_f64().unwrap()),
            "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= with.as_u64().unwrap()),
            "minLength" => {
                value.as_str().is_none_or(|text| text.chars().count() as u64 >= with.as_u64().unwrap())
            }
            "maxLength" => {
                value.as_str().is_none_or(|text| text.chars().count() as u64 <= with.as_u64().unwrap())
            }
            _ => true,
        }
    })
}

fn is_of_type(name: &str, value: &Value) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("unknown type {other}"),
    }
}

#[test]
fn schema_and_parser_know_the_same_keys() {
    let schema = job_schema();
    assert_eq!(names(&schema["properties"]), BTreeSet::from(KEYS));
    assert_eq!(names(&schema["properties"]["allow"]["properties"]), BTreeSet::from(ALLOW_KEYS));
    assert_eq!(names(&json!(Allow::default())), BTreeSet::from(ALLOW_KEYS));
    let complete = JobSpec::from_value(&json!({"model": "m", "dataset": "d"})).unwrap().to_json();
    assert_eq!(names(&complete), BTreeSet::from(KEYS));
}

#[test]
fn every_key_is_described_and_in_the_documentation() {
    let schema = job_schema();
    for (key, property) in schema["properties"].as_object().unwrap() {
        assert!(property["description"].is_string(), "{key}");
        assert!(DOCS.contains(&format!("\n| `{key}` |")), "{key} is not in the table of docs/job.md");
    }
    for key in ALLOW_KEYS {
        assert!(DOCS.contains(&format!("\n| `{key}` |")), "{key} is not in the table of docs/job.md");
    }
}

#[test]
fn defaults_of_the_schema_are_those_of_the_parser() {
    let schema = job_schema();
    let complete = JobSpec::from_value(&json!({"model": "m", "dataset": "d"})).unwrap().to_json();
    let mut seen = 0;
    for (key, property) in schema["properties"].as_object().unwrap() {
        if let Some(default) = property.get("default") {
            assert_eq!(default, &complete[key], "{key}");
            seen += 1;
        }
    }
    assert_eq!(seen, KEYS.len() - 4, "all but model, dataset, name and output_dir have a fixed default");
}

#[test]
fn every_example_of_the_documentation_is_accepted_by_schema_and_parser() {
    let (schema, examples) = (job_schema(), examples());
    assert!(examples.len() >= 5);
    for example in &examples {
        assert!(is_valid(&schema, &schema, example), "{example}");
        JobSpec::from_value(example).unwrap_or_else(|error| panic!("{error}: {example}"));
    }
    assert_eq!(names(&examples[1]), BTreeSet::from(KEYS), "the second example shows every key");
}

#[test]
fn the_documentation_lists_everything_that_is_refused_or_secret() {
    let code = |text: &str| format!("`{text}`");
    for (arg, _) in crate::spec::REPEATED_ARGS.iter().chain(&crate::spec::FORBIDDEN_ARGS) {
        assert!(DOCS.contains(&code(arg)), "{arg}");
    }
    for (name, _) in crate::spec::FORBIDDEN_ENV {
        assert!(DOCS.contains(&code(name)), "{name}");
    }
    for word in crate::secrets::WORDS.iter().chain(&crate::secrets::LAST_WORDS_IN_CAPITALS) {
        assert!(DOCS.contains(&code(word)), "{word}");
    }
    for (a, b) in crate::secrets::PAIRS {
        assert!(DOCS.contains(&code(&format!("{a} {b}"))), "{a} {b}");
    }
    for prefix in crate::secrets::VALUE_PREFIXES.iter().chain(&TRACKERS).chain(&crate::secrets::PLACES) {
        assert!(DOCS.contains(&code(prefix)), "{prefix}");
    }
}

#[test]
fn what_the_schema_refuses_the_parser_refuses() {
    let schema = job_schema();
    let wrong = [
        ("devices", json!(0)),
        ("devices", json!(1.5)),
        ("device", json!(-1)),
        ("device", json!(true)),
        ("dataset", json!([])),
        ("dataset", json!(7)),
        ("model", json!("")),
        ("train_type", json!("dora")),
        ("length", json!(0)),
        ("length", json!("huge")),
        ("validation", json!(1.0)),
        ("validation", json!({})),
        ("save", json!(3)),
        ("learning", json!("wild")),
        ("min_effective_batch", json!(0)),
        ("allow", json!([])),
        ("allow", json!({"emergency": 1})),
        ("allow", json!({"emergensy": true})),
        ("secrets", json!("A")),
        ("time_limit", json!(0)),
        ("time_limit", json!(true)),
        ("args", json!({"a": null})),
        ("args", json!({"a": {}})),
        ("env", json!({"A": true})),
        ("labels", json!({"a": 1})),
        ("after", json!([0])),
        ("priority", json!("high")),
        ("report_to", json!("swanlap")),
        ("report_to", json!({"swanlab": 1})),
        ("colour", json!("red")),
    ];
    for (key, value) in wrong {
        let mut job = json!({"model": "m", "dataset": "d"});
        job[key] = value;
        assert!(!is_valid(&schema, &schema, &job), "the schema accepts {job}");
        assert!(JobSpec::from_value(&job).is_err(), "the parser accepts {job}");
    }
}
