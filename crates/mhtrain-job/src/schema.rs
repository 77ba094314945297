//! What may stand in job.json, for programs?
//!
//! The schema says what JSON Schema can say; [`JobSpec::parse`](crate::spec::JobSpec::parse) checks more, for
//! example that no secret stands in clear. Whatever the parser accepts is valid by the schema.

use mhtrain_sizing::request::Allow;
use serde_json::{Value, json};

use crate::spec::TRACKERS;

/// Returns the JSON Schema (draft 2020-12) of job.json, version 1.
pub fn job_schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mhtraind job, version 1",
        "description": "One fine-tuning job: what is trained, on which card, and what may be changed so that it fits.",
        "type": "object",
        "required": ["model", "dataset"],
        "additionalProperties": false,
        "properties": properties(),
        "$defs": {
            "line": {
                "description": "One line of text; it does not begin with `-`.",
                "type": "string", "minLength": 1, "maxLength": 4096, "pattern": "^[^-\\x00-\\x1f\\x7f][^\\x00-\\x1f\\x7f]*$"
            },
            "lines": {
                "anyOf": [
                    { "$ref": "#/$defs/line" },
                    { "type": "array", "items": { "$ref": "#/$defs/line" }, "minItems": 1 }
                ]
            },
            "scalar": { "type": ["string", "number", "boolean"] },
            "variable": { "type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$" }
        }
    })
}

fn properties() -> Value {
    let mut properties = json!({
        "model": described(json!({ "$ref": "#/$defs/line" }), "Hub id or local directory.",
            "Qwen/Qwen2.5-7B-Instruct"),
        "dataset": described(json!({ "$ref": "#/$defs/lines" }),
            "Hub id or local file, or a list of them. `name#N` takes N rows.", json!(["CodyWhy/mh-sharegpt-20250820"])),
        "name": described(json!({ "$ref": "#/$defs/line" }),
            "For people. Default: the last part of the model's name in lower case, with -sft behind it.",
            "qwen2.5-7b-sft"),
        "devices": with_default(json!({ "type": "integer", "minimum": 1, "maximum": 1024 }),
            "How many cards. This version refuses more than one.", 1),
        "length": with_default(
            json!({ "anyOf": [
                { "enum": ["standard", "long", "short"] },
                { "type": "integer", "minimum": 1, "maximum": 1_000_000 }
            ] }),
            "How long a row may be: 3072, 4096 or 2048 tokens; a number pins max_length.", "standard"),
        "validation": with_default(
            json!({ "anyOf": [
                { "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 },
                { "$ref": "#/$defs/lines" },
                { "type": "null" }
            ] }),
            "Share of the data that is split off for evaluation, or datasets of its own. Without it nothing is evaluated.",
            Value::Null),
        "output_dir": described(json!({ "$ref": "#/$defs/line" }),
            "Where everything goes, relative to the working directory. Default: ./output/NAME.",
            "./output/qwen2.5-7b-sft"),
        "report_to": report_to(),
        "min_effective_batch": with_default(json!({ "type": "integer", "minimum": 1, "maximum": 1_000_000 }),
            "Smallest micro-batch x accumulation x cards that is allowed.", 32),
        "allow": allow(),
        "time_limit": with_default(
            json!({ "anyOf": [
                { "type": "integer", "minimum": 1, "maximum": 31_536_000 },
                { "type": "string", "pattern": "^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$" },
                { "type": "null" }
            ] }),
            "Longest time from the start of the first attempt: 12h, 90m, 45s, 1d12h, or a number of seconds.",
            Value::Null),
        "priority": with_default(json!({ "type": "integer", "minimum": i32::MIN, "maximum": i32::MAX }),
            "Higher goes first; for the daemon.", 0),
    });
    extend(&mut properties, choices());
    extend(&mut properties, maps_and_lists());
    properties
}

fn choices() -> Value {
    json!({
        "device": with_default(
            json!({ "anyOf": [
                { "type": "integer", "minimum": 0, "maximum": 1023 },
                { "type": "string", "pattern": "^(auto|GPU-[A-Za-z0-9-]+)$" }
            ] }),
            "NVML index, GPU-… uuid, or auto: the card with the best rung.", "auto"),
        "train_type": with_default(json!({ "enum": ["lora", "qlora", "full"] }),
            "What is trained: adapters, adapters over 4-bit weights, or every parameter.", "lora"),
        "save": with_default(json!({ "enum": ["standard", "fast_iteration", "long_run"] }),
            "Checkpoints: every 200 steps and 3 kept, every 100 and 5, every 500 and 2.", "standard"),
        "learning": with_default(json!({ "enum": ["standard", "fast", "stable"] }),
            "Learning rate 2e-4, 5e-4, or 1e-4 with warm-up 0.15 and gradients clipped at 0.5.", "standard"),
    })
}

fn maps_and_lists() -> Value {
    json!({
        "secrets": with_default(json!({ "type": "array", "items": { "$ref": "#/$defs/variable" } }),
            "Names of environment variables whose values are secrets; the values come from systemd credentials or the env file.",
            json!([])),
        "args": with_default(
            json!({
                "type": "object",
                "propertyNames": { "pattern": "^-*[A-Za-z_][A-Za-z0-9_-]*$" },
                "additionalProperties": { "anyOf": [
                    { "$ref": "#/$defs/scalar" },
                    { "type": "array", "items": { "$ref": "#/$defs/scalar" } }
                ] }
            }),
            "Any other parameter of `swift sft`; what stands here is pinned.", json!({})),
        "env": with_default(
            json!({
                "type": "object",
                "propertyNames": { "$ref": "#/$defs/variable" },
                "additionalProperties": { "type": ["string", "number"] }
            }),
            "Environment of the trainer; no secrets.", json!({})),
        "labels": with_default(json!({ "type": "object", "additionalProperties": { "type": "string" } }),
            "For people and scripts.", json!({})),
        "after": with_default(json!({ "type": "array", "items": { "type": "integer", "minimum": 1 } }),
            "Ids of jobs that must have succeeded before. `submit` waits for them; `run` and `plan` refuse it.", json!([])),
    })
}

fn report_to() -> Value {
    let tracker = json!({ "enum": TRACKERS });
    with_default(
        json!({ "anyOf": [
            { "enum": TRACKERS.iter().copied().chain(["none"]).collect::<Vec<_>>() },
            { "type": "array", "items": tracker },
            {
                "type": "object",
                "propertyNames": tracker,
                "additionalProperties": { "type": "object", "additionalProperties": { "$ref": "#/$defs/scalar" } }
            }
        ] }),
        "Experiment trackers: one, a list, or an object with the settings of each.",
        json!({}),
    )
}

fn allow() -> Value {
    let defaults = json!(Allow::default());
    let flag = |key: &str, description: &str| {
        with_default(json!({ "type": "boolean" }), description, defaults[key].clone())
    };
    json!({
        "description": "What a lower rung, or the answer to a failure, may change. Each change is in the receipt.",
        "type": "object",
        "additionalProperties": false,
        "default": defaults,
        "properties": {
            "shorter_max_length": flag("shorter_max_length", "Rows may be cut shorter than asked; longer ones are dropped."),
            "no_packing": flag("no_packing", "Packing may be switched off."),
            "lower_precision": flag("lower_precision", "fp16 may stand in for bf16 on cards that lack it."),
            "emergency": flag("emergency", "The emergency profile may be tried as the last rung."),
            "restart": flag("restart", "Training may begin again where it cannot be resumed exactly."),
            "quantize": flag("quantize", "Base weights may be quantised to 4 bits."),
            "liger": flag("liger", "Liger's fused kernels may be used."),
            "fewer_targets": flag("fewer_targets", "Adapters may be left off some layers."),
            "no_checkpointing": flag("no_checkpointing", "Activations may be kept instead of computed again."),
            "recipe_stable": flag("recipe_stable", "After a divergence the recipe's stable learning may be used."),
        }
    })
}

fn described(mut schema: Value, description: &str, example: impl Into<Value>) -> Value {
    schema["description"] = description.into();
    schema["examples"] = json!([example.into()]);
    schema
}

fn with_default(mut schema: Value, description: &str, default: impl Into<Value>) -> Value {
    schema["description"] = description.into();
    schema["default"] = default.into();
    schema
}

fn extend(to: &mut Value, from: Value) {
    if let (Value::Object(to), Value::Object(from)) = (to, from) {
        to.extend(from);
    }
}

#[cfg(test)]
mod tests;
