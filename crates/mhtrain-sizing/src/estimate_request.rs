//! What does one line of `mhtraind estimate --json` ask?

use serde::Serialize;
use serde_json::{Map, Value};

use crate::estimate::{Estimate, EstimateError, estimate_with, experts_note};
use crate::model::{Model, ResolveError, ShapeSource, brief};
use crate::reserve::{Group, Reserve};
use crate::unique_json::Unique;
use crate::workload::{AttnImpl, Dtype, ExpertForm, Targets, TrainType, Workload};

/// One line, parsed. The path of a config is for the caller to load: this crate reads no file.
#[derive(Clone, Debug, PartialEq)]
pub struct EstimateRequest {
    /// Where the model's shape is to be found.
    pub config: ConfigRef,
    /// The pass.
    pub workload: Workload,
    /// The allocator's blocks can grow (`expandable_segments:True`), so unequal rows leave fewer gaps.
    pub expandable_segments: bool,
}

/// What a line is answered with; the keys of the JSON interface.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The predicted peak.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// How well the model is known; `partly_known` is a wider interval, `unknown_block` a wide one.
    pub source: ShapeSource,
    /// What a reader should know about it; a sentence each.
    pub notes: Vec<String>,
}

/// Where the model's shape is to be found.
#[derive(Clone, Debug, PartialEq)]
pub enum ConfigRef {
    /// Path of a config.json.
    Path(String),
    /// The object itself.
    Object(Value),
}

/// Why a line cannot be answered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EstimateRequestError {
    /// It is no JSON object.
    #[error("the line is not a JSON object: {reason}")]
    NotAnObject {
        /// What it is instead.
        reason: String,
    },
    /// One object has a key twice.
    #[error("the line has the key `{key}` twice, the second time at column {column}")]
    KeyTwice {
        /// The key.
        key: String,
        /// Where it stands the second time, from 1.
        column: usize,
    },
    /// A key that means nothing.
    #[error("unknown key `{key}`")]
    UnknownKey {
        /// The key.
        key: String,
        /// The nearest key that means something.
        nearest: Option<&'static str>,
    },
    /// A value that cannot be.
    #[error("`{key}` is {found}, and has to be {expected}")]
    Unusable {
        /// The key.
        key: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// Neither or both of `config` and `config_object`.
    #[error("{0} of `config` and `config_object` are given, and exactly one is needed")]
    WhichConfig(&'static str),
    /// The model has no usable shape.
    #[error(transparent)]
    Model(#[from] ResolveError),
    /// The workload cannot be estimated.
    #[error(transparent)]
    Estimate(#[from] EstimateError),
}

impl EstimateRequestError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            EstimateRequestError::UnknownKey { nearest: Some(nearest), .. } => {
                Some(format!("did you mean `{nearest}`?"))
            }
            EstimateRequestError::UnknownKey { nearest: None, .. } => {
                Some(format!("the keys are: {}", KEYS.join(", ")))
            }
            EstimateRequestError::KeyTwice { .. } => Some("keep the one that is meant".to_owned()),
            EstimateRequestError::NotAnObject { .. } | EstimateRequestError::WhichConfig(_) => Some(
                r#"write one object a line, for example {"config": "path/to/config.json", "micro_batch": 4}"#
                    .into(),
            ),
            EstimateRequestError::Unusable { key, expected, .. } => {
                Some(format!("set `{key}` to {expected}"))
            }
            EstimateRequestError::Model(error) => error.help(),
            EstimateRequestError::Estimate(error) => error.help(),
        }
    }

    /// Returns the name of the kind of error for the JSON interface.
    pub fn code(&self) -> &'static str {
        match self {
            EstimateRequestError::NotAnObject { .. } => "not_an_object",
            EstimateRequestError::KeyTwice { .. } => "key_twice",
            EstimateRequestError::UnknownKey { .. } => "unknown_key",
            EstimateRequestError::Unusable { .. } | EstimateRequestError::Estimate(_) => "bad_value",
            EstimateRequestError::WhichConfig(_) => "which_config",
            EstimateRequestError::Model(_) => "bad_config",
        }
    }
}

const KEYS: [&str; 18] = [
    "config",
    "config_object",
    "train_type",
    "lora_rank",
    "target_modules",
    "torch_dtype",
    "micro_batch",
    "accumulation",
    "max_length",
    "packing",
    "padded",
    "attn_impl",
    "gradient_checkpointing",
    "liger_kernel",
    "logit_share",
    "expandable_segments",
    "transformers",
    "router_loss",
];

/// Largest micro-batch, length or rank that is read: beyond any trainer. Several of that size in one pass are refused by
/// the estimate, because nobody has so much memory.
const COUNT_MAX: u32 = 1 << 24;

impl EstimateRequest {
    /// Reads one line.
    ///
    /// Absent keys take ms-swift's recommended setup: LoRA of rank 8 on all linears, bfloat16, one row of 2048 tokens,
    /// no packing, flash attention, checkpointing on. `padded` is true unless rows are packed.
    ///
    /// # Errors
    /// Anything but an object of known keys with usable values.
    pub fn parse(line: &str) -> Result<EstimateRequest, EstimateRequestError> {
        let Unique(value) = serde_json::from_str(line).map_err(|error| not_json(&error))?;
        let Value::Object(object) = value else {
            return Err(EstimateRequestError::NotAnObject { reason: brief(&value) });
        };
        for key in object.keys() {
            if !KEYS.contains(&key.as_str()) {
                return Err(EstimateRequestError::UnknownKey {
                    key: key.chars().take(80).collect(),
                    nearest: nearest_key(key),
                });
            }
        }
        Ok(EstimateRequest {
            config: config_of(&object)?,
            workload: workload_of(&object)?,
            expandable_segments: flag(&object, "expandable_segments", false)?,
        })
    }

    /// Answers it; `loaded` is the content of the file that [`ConfigRef::Path`] names, `None` for an object.
    ///
    /// # Errors
    /// A config without a usable shape, or a workload that cannot be.
    pub fn answer(&self, loaded: Option<&Value>) -> Result<Answer, EstimateRequestError> {
        let (name, config) = match &self.config {
            ConfigRef::Path(path) => (path.as_str(), loaded),
            ConfigRef::Object(object) => ("config_object", Some(object)),
        };
        let model = Model::resolve(name, config, None)?;
        let group = match Group::of(&self.workload) {
            Group::Unequal if self.expandable_segments => Group::Expandable,
            group => group,
        };
        let estimate = estimate_with(&model, &self.workload, &Reserve { group, history: None })?;
        let mut notes = model.notes.clone();
        notes.extend(experts_note(&model, self.workload.experts));
        Ok(Answer { estimate, source: model.source, notes })
    }
}

fn not_json(error: &serde_json::Error) -> EstimateRequestError {
    let text = error.to_string();
    if !error.is_data() {
        return EstimateRequestError::NotAnObject { reason: text };
    }
    let key = text.rsplit_once(" at line ").map_or(text.as_str(), |(key, _)| key).escape_debug().to_string();
    EstimateRequestError::KeyTwice { key, column: error.column() }
}

fn config_of(object: &Map<String, Value>) -> Result<ConfigRef, EstimateRequestError> {
    match (object.get("config"), object.get("config_object")) {
        (Some(Value::String(path)), None) => Ok(ConfigRef::Path(path.clone())),
        (Some(value), None) => Err(unusable("config", value, "a path")),
        (None, Some(value @ Value::Object(_))) => Ok(ConfigRef::Object(value.clone())),
        (None, Some(value)) => Err(unusable("config_object", value, "an object")),
        (None, None) => Err(EstimateRequestError::WhichConfig("none")),
        (Some(_), Some(_)) => Err(EstimateRequestError::WhichConfig("both")),
    }
}

fn workload_of(object: &Map<String, Value>) -> Result<Workload, EstimateRequestError> {
    let packing = flag(object, "packing", false)?;
    Ok(Workload {
        train_type: choice(object, "train_type", TrainType::Lora, "lora, qlora or full")?,
        lora_rank: count(object, "lora_rank", 8)?,
        targets: targets(object)?,
        dtype: choice(object, "torch_dtype", Dtype::Bfloat16, "bfloat16, float16 or float32")?,
        micro_batch: count(object, "micro_batch", 1)?,
        accumulation: count(object, "accumulation", 1)?,
        max_length: count(object, "max_length", 2048)?,
        packing,
        padded: flag(object, "padded", !packing)?,
        attn_impl: choice(
            object,
            "attn_impl",
            AttnImpl::FlashAttn,
            "flash_attn, flash_attention_2, flash_attention_3, flash_attention_4, sdpa, eager or flex_attention",
        )?,
        gradient_checkpointing: flag(object, "gradient_checkpointing", true)?,
        liger_kernel: flag(object, "liger_kernel", false)?,
        logit_share: share(object, "logit_share")?,
        experts: experts(object)?,
        router_loss: flag(object, "router_loss", false)?,
    })
}

/// Returns how the experts are held by the transformers that the line names; without one by 5, as in the measured peaks.
fn experts(object: &Map<String, Value>) -> Result<ExpertForm, EstimateRequestError> {
    match object.get("transformers") {
        None => Ok(ExpertForm::Fused),
        Some(value) => match value.as_u64() {
            Some(4) => Ok(ExpertForm::Modules),
            Some(5) => Ok(ExpertForm::Fused),
            Some(_) | None => Err(unusable("transformers", value, "4 or 5, the first number of its version")),
        },
    }
}

fn count(object: &Map<String, Value>, key: &'static str, default: u32) -> Result<u32, EstimateRequestError> {
    let Some(value) = object.get(key) else { return Ok(default) };
    let number = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=COUNT_MAX).contains(n));
    // A full fine-tuning line may state rank 0: there is no adapter.
    let number = number.or_else(|| (key == "lora_rank" && value.as_u64() == Some(0)).then_some(0));
    number.ok_or_else(|| unusable(key, value, &format!("a whole number from 1 to {COUNT_MAX}")))
}

fn flag(object: &Map<String, Value>, key: &'static str, default: bool) -> Result<bool, EstimateRequestError> {
    match object.get(key) {
        None => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(value) => Err(unusable(key, value, "true or false")),
    }
}

fn share(object: &Map<String, Value>, key: &'static str) -> Result<f64, EstimateRequestError> {
    let Some(value) = object.get(key) else { return Ok(1.0) };
    let number = value.as_f64().filter(|share| *share > 0.0 && *share <= 1.0);
    number.ok_or_else(|| unusable(key, value, "a number above 0 and at most 1"))
}

fn choice<T: serde::de::DeserializeOwned>(
    object: &Map<String, Value>,
    key: &'static str,
    default: T,
    choices: &str,
) -> Result<T, EstimateRequestError> {
    let Some(value) = object.get(key) else { return Ok(default) };
    T::deserialize(value).map_err(|_| unusable(key, value, choices))
}

fn targets(object: &Map<String, Value>) -> Result<Targets, EstimateRequestError> {
    let expected = "`all-linear`, or names of layers in a text or a list";
    match object.get("target_modules") {
        None => Ok(Targets::AllLinear),
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(Targets::parse(text)),
        Some(value @ Value::Array(list)) => {
            let names: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
            match names {
                Some(names) if !names.is_empty() => Ok(Targets::parse(&names.join(","))),
                Some(_) | None => Err(unusable("target_modules", value, expected)),
            }
        }
        Some(value) => Err(unusable("target_modules", value, expected)),
    }
}

fn unusable(key: &'static str, value: &Value, expected: &str) -> EstimateRequestError {
    EstimateRequestError::Unusable { key, found: brief(value), expected: expected.to_owned() }
}

/// Returns the known key that is written most like `key`; `None` when none is near.
fn nearest_key(key: &str) -> Option<&'static str> {
    let key: String = key.chars().take(80).collect();
    let near = KEYS.iter().map(|known| (strsim::jaro_winkler(&key, known), *known));
    near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.75).map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const OBJECT: &str = r#""config_object": {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
        "tie_word_embeddings": true}"#;

    fn with(rest: &str) -> Result<Estimate, EstimateRequestError> {
        Ok(EstimateRequest::parse(&format!("{{{OBJECT}{rest}}}"))?.answer(None)?.estimate)
    }

    #[test]
    fn an_answer_says_how_well_the_model_is_known_beside_the_keys_of_the_interface() {
        let answer = |model_type: &str| {
            let line = format!("{{{}}}", OBJECT.replace("qwen2", model_type));
            serde_json::to_value(EstimateRequest::parse(&line).unwrap().answer(None).unwrap()).unwrap()
        };
        let known = answer("qwen2");
        assert_eq!((&known["source"], &known["notes"]), (&json!("config"), &json!([])));
        assert!(known["terms"]["weights"].as_u64().unwrap() > 0 && known["low_bytes"].is_u64());
        let unknown = answer("novel");
        assert_eq!(unknown["source"], "unknown_block");
        assert!(unknown["notes"][0].as_str().unwrap().contains("`novel`"), "{unknown}");
    }

    #[test]
    fn counts_that_nobody_has_memory_for_are_errors_that_name_the_largest() {
        for (line, key) in [
            (r#", "micro_batch": 16777216, "max_length": 16777215, "attn_impl": "sdpa""#, "micro_batch"),
            (r#", "micro_batch": 4000000, "max_length": 16777216, "lora_rank": 16777215"#, "max_length"),
        ] {
            let error = with(line).unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{key}` is 16777216")), "{error}");
            assert!(error.help().is_some());
        }
    }

    #[test]
    fn every_key_of_the_interface_is_taken() {
        let line = r#", "train_type": "lora", "lora_rank": 8, "target_modules": "q_proj,v_proj", "torch_dtype": "bfloat16",
            "micro_batch": 4, "accumulation": 8, "max_length": 3072, "packing": false, "padded": true,
            "attn_impl": "sdpa", "gradient_checkpointing": true, "liger_kernel": false, "logit_share": 0.5,
            "expandable_segments": true, "transformers": 4, "router_loss": false"#;
        let estimate = with(line).unwrap();
        assert!(
            estimate.low_bytes <= estimate.device_peak_bytes
                && estimate.device_peak_bytes <= estimate.high_bytes
        );
    }

    #[test]
    fn expandable_segments_narrow_the_interval_of_unequal_rows_alone() {
        let on = r#", "expandable_segments": true"#;
        let (plain, expandable) = (with("").unwrap(), with(on).unwrap());
        assert_eq!(plain.allocated_peak_bytes, expandable.allocated_peak_bytes);
        assert!(expandable.high_bytes < plain.high_bytes);
        let packed = r#", "packing": true"#;
        assert_eq!(with(packed).unwrap(), with(&format!("{packed}{on}")).unwrap());
    }

    #[test]
    fn a_mixture_is_sized_for_the_transformers_and_the_loss_of_the_line() {
        // With few words and narrow blocks the loss of the router is more than that of the words.
        let mixture = r#""config_object": {"model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512,
            "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 1000}"#;
        let of = |rest: &str| {
            EstimateRequest::parse(&format!("{{{mixture}{rest}}}")).unwrap().answer(None).unwrap()
        };
        let (five, four) = (of(r#", "transformers": 5"#), of(r#", "transformers": 4"#));
        assert_eq!(five, of(""));
        assert!(four.estimate.terms.adapter > five.estimate.terms.adapter);
        assert!(four.notes.len() > five.notes.len());
        let loss = of(r#", "transformers": 4, "router_loss": true"#);
        assert!(loss.estimate.allocated_peak_bytes > four.estimate.allocated_peak_bytes);
    }

    #[test]
    fn rows_are_padded_unless_packed() {
        let padded = |line: &str| EstimateRequest::parse(line).unwrap().workload.padded;
        assert!(padded(r#"{"config": "a"}"#));
        assert!(!padded(r#"{"config": "a", "packing": true}"#));
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_the_nearest_one() {
        let error = with(r#", "max_lenght": 2048"#).unwrap_err();
        assert_eq!(error.to_string(), "unknown key `max_lenght`");
        assert_eq!(error.help().unwrap(), "did you mean `max_length`?");
    }

    #[test]
    fn a_key_written_twice_is_an_error_that_names_it() {
        let error = with(r#", "micro_batch": 4, "micro_batch": 8"#).unwrap_err();
        assert_eq!((error.code(), error.help().is_some()), ("key_twice", true));
        assert!(error.to_string().starts_with("the line has the key `micro_batch` twice"), "{error}");
        let inside = r#"{"config_object": {"hidden_size": 64, "hidden_size": 128}}"#;
        assert_eq!(EstimateRequest::parse(inside).unwrap_err().code(), "key_twice");
    }

    #[test]
    fn values_that_cannot_be_are_errors_that_name_their_key() {
        for (key, values) in [
            ("micro_batch", vec!["0", "-1", "1.5", "\"4\"", "null", "99999999999", "[1]", "true"]),
            ("accumulation", vec!["0", "-8"]),
            ("max_length", vec!["0", "1e30", "{}"]),
            ("lora_rank", vec!["-1", "\"8\"", "0"]),
            ("logit_share", vec!["0", "1.1", "-0.5", "\"all\""]),
            ("packing", vec!["1", "\"true\"", "null"]),
            ("expandable_segments", vec!["1", "\"on\""]),
            ("transformers", vec!["3", "4.57", "\"4\"", "null"]),
            ("router_loss", vec!["0.001"]),
            ("train_type", vec!["\"dora\"", "3"]),
            ("torch_dtype", vec!["\"int8\""]),
            ("attn_impl", vec!["\"flash\""]),
            ("target_modules", vec!["\"\"", "[]", "[1]", "3", "\"no_such_proj\""]),
        ] {
            for value in values {
                let error = with(&format!(r#", "{key}": {value}"#)).unwrap_err();
                let text = error.to_string();
                assert!(text.contains(key) || text.contains("no_such_proj"), "{key} {value}: {text}");
                assert!(error.help().is_some());
            }
        }
    }

    #[test]
    fn garbage_is_one_error() {
        for line in [
            "",
            "{",
            "null",
            "[]",
            "3",
            "\"x\"",
            "{}",
            "\u{0}",
            r#"{"config": 3}"#,
            r#"{"config_object": []}"#,
            r#"{"config": "a", "config_object": {}}"#,
        ] {
            assert!(EstimateRequest::parse(line).is_err(), "{line}");
        }
        assert!(EstimateRequest::parse(&"[".repeat(100_000)).is_err());
    }
}
