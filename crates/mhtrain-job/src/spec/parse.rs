//! How is job.json read?

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mhtrain_sizing::request::{Allow, Learning, Length, Save};
use mhtrain_sizing::unique_json::Unique;
use mhtrain_sizing::workload::TrainType;
use serde_json::{Map, Value};

use super::read::{At, check_line, clip, nearest, show};
use super::{DeviceWish, JOB_FILE_BYTES_MAX, JobSpec, SpecError, Validation, args};
use crate::secrets::{is_secret_name, is_secret_value, is_variable_name, shell_reference, variable_for};

/// Every key of job.json.
pub const KEYS: [&str; 21] = [
    "model",
    "dataset",
    "name",
    "device",
    "devices",
    "train_type",
    "length",
    "validation",
    "save",
    "learning",
    "output_dir",
    "report_to",
    "min_effective_batch",
    "allow",
    "secrets",
    "time_limit",
    "args",
    "env",
    "priority",
    "labels",
    "after",
];

/// Every key of `allow`.
pub const ALLOW_KEYS: [&str; 10] = [
    "shorter_max_length",
    "no_packing",
    "lower_precision",
    "emergency",
    "restart",
    "quantize",
    "liger",
    "fewer_targets",
    "no_checkpointing",
    "recipe_stable",
];

/// Trackers that the trainer knows.
///
/// Source: `INTEGRATION_TO_CALLBACK` in transformers 5.19.0, `integrations/integration_utils.py`.
pub const TRACKERS: [&str; 14] = [
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
];

/// Variables that only the supervisor may set, and why.
pub const FORBIDDEN_ENV: [(&str, &str); 8] = [
    ("CUDA_VISIBLE_DEVICES", "the key `device` chooses the card"),
    ("CUDA_DEVICE_ORDER", "indexes must be those of NVML, which the supervisor sees to"),
    ("NPROC_PER_NODE", "the key `devices` says how many cards train"),
    ("NNODES", "a job runs on one machine"),
    ("NODE_RANK", "a job runs on one machine"),
    ("RANK", "the launcher numbers the processes"),
    ("LOCAL_RANK", "the launcher numbers the processes"),
    ("WORLD_SIZE", "the launcher counts the processes"),
];

/// Longest name of a job in bytes: it becomes the name of a directory, and Linux allows 255 (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 200;

/// Most tokens in a row that can be asked for.
const LENGTH_TOKENS_MAX: u32 = 1_000_000;

/// Largest effective batch that can be demanded.
const MIN_EFFECTIVE_BATCH_MAX: u32 = 1_000_000;

/// Longest time limit: a year.
const TIME_LIMIT_SECONDS_MAX: u64 = 365 * 24 * 60 * 60;

const DEFAULT_MIN_EFFECTIVE_BATCH: u32 = 32;

pub(super) fn parse(bytes: &[u8]) -> Result<JobSpec, SpecError> {
    if bytes.len() > JOB_FILE_BYTES_MAX {
        return Err(SpecError::TooLarge { bytes: bytes.len(), limit: JOB_FILE_BYTES_MAX });
    }
    let text =
        std::str::from_utf8(bytes).map_err(|error| SpecError::NotUtf8 { offset: error.valid_up_to() })?;
    // Editors on Windows put a byte order mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let Unique(value) = serde_json::from_str(text).map_err(|error| not_json(&error))?;
    from_value(&value)
}

fn not_json(error: &serde_json::Error) -> SpecError {
    let text = error.to_string();
    let message = text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message);
    if error.is_data() {
        return SpecError::KeyTwice { key: clip(message), line: error.line(), column: error.column() };
    }
    SpecError::NotJson { message: clip(message), line: error.line(), column: error.column() }
}

pub(super) fn from_value(value: &Value) -> Result<JobSpec, SpecError> {
    let Value::Object(job) = value else {
        return Err(SpecError::NotAnObject { found: show(value) });
    };
    check_keys("", job, &KEYS)?;
    let get = |key: &'static str| job.get(key).map(|value| At::new(key, value));
    let need = |key: &'static str| get(key).ok_or(SpecError::Missing { key });

    let model = need("model")?.line("a hub id or a local directory")?;
    let dataset = read_datasets(need("dataset")?, "a hub id or a local file")?;
    let name = get("name").map(read_name).transpose()?.unwrap_or_else(|| default_name(&model));
    let output_dir = get("output_dir").map(|at| at.line("a directory")).transpose()?;
    let spec = JobSpec {
        output_dir: output_dir.unwrap_or_else(|| format!("./output/{name}")),
        device: get("device").map(read_device).transpose()?.unwrap_or_default(),
        devices: get("devices").map(|at| at.count(1, 1024)).transpose()?.unwrap_or(1),
        train_type: get("train_type").map(read_train_type).transpose()?.unwrap_or_default(),
        length: get("length").map(read_length).transpose()?.unwrap_or_default(),
        validation: get("validation").map(read_validation).transpose()?.flatten(),
        save: get("save").map(read_save).transpose()?.unwrap_or_default(),
        learning: get("learning").map(read_learning).transpose()?.unwrap_or_default(),
        report_to: get("report_to").map(read_report_to).transpose()?.unwrap_or_default(),
        min_effective_batch: get("min_effective_batch")
            .map(|at| at.count(1, MIN_EFFECTIVE_BATCH_MAX))
            .transpose()?
            .unwrap_or(DEFAULT_MIN_EFFECTIVE_BATCH),
        allow: get("allow").map(read_allow).transpose()?.unwrap_or_default(),
        secrets: get("secrets").map(read_secrets).transpose()?.unwrap_or_default(),
        time_limit: get("time_limit").map(read_time_limit).transpose()?.flatten(),
        args: get("args").map(args::read_args).transpose()?.unwrap_or_default(),
        env: get("env").map(read_env).transpose()?.unwrap_or_default(),
        priority: get("priority").map(read_priority).transpose()?.unwrap_or_default(),
        labels: get("labels").map(read_labels).transpose()?.unwrap_or_default(),
        after: get("after").map(read_after).transpose()?.unwrap_or_default(),
        model,
        dataset,
        name,
    };
    check_whole(&spec)?;
    Ok(spec)
}

/// Checks what no single key can show.
fn check_whole(spec: &JobSpec) -> Result<(), SpecError> {
    check_no_secret_in_text(spec)?;
    args::check_against_keys(spec)?;
    spec.check_pins()
}

fn check_keys(prefix: &str, object: &Map<String, Value>, known: &[&str]) -> Result<(), SpecError> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(SpecError::UnknownKey {
            key: format!("{prefix}{}", clip(key)),
            nearest: nearest(key, known).map(|near| format!("{prefix}{near}")),
        }),
    }
}

fn read_name(at: At<'_>) -> Result<String, SpecError> {
    let name = at.line("a name")?;
    if name.contains('/') || name == "." || name == ".." || name.len() > NAME_BYTES_MAX {
        return Err(at.out_of_range(&format!("a name without `/` and of at most {NAME_BYTES_MAX} bytes")));
    }
    Ok(name)
}

/// Returns the last part of the model's name in lower case, with `-sft` behind it.
fn default_name(model: &str) -> String {
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let base = if matches!(last, "" | "." | "..") { "model" } else { last };
    let mut name = base.to_lowercase();
    let limit = NAME_BYTES_MAX - "-sft".len();
    if name.len() > limit {
        let end = (0..=limit).rev().find(|&i| name.is_char_boundary(i)).unwrap_or(0);
        name.truncate(end);
    }
    name + "-sft"
}

fn read_device(at: At<'_>) -> Result<DeviceWish, SpecError> {
    const EXPECTED: &str = "an index (0, 1, …), a \"GPU-…\" uuid or \"auto\"";
    match at.value {
        Value::Number(_) => at.count(0, 1023).map(DeviceWish::Index),
        Value::String(text) if text == "auto" => Ok(DeviceWish::Auto),
        Value::String(text) if text.starts_with("MIG-") => Err(SpecError::MigDevice),
        Value::String(text) if is_gpu_uuid(text) => Ok(DeviceWish::Uuid(text.clone())),
        Value::String(_) => Err(at.out_of_range(EXPECTED)),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => Err(at.wrong_type(EXPECTED)),
    }
}

/// Returns whether a text has the form of NVML's uuids. Their length is not checked: simulated cards have others.
fn is_gpu_uuid(text: &str) -> bool {
    text.strip_prefix("GPU-").is_some_and(|rest| {
        !rest.is_empty() && rest.len() <= 64 && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}

fn read_train_type(at: At<'_>) -> Result<TrainType, SpecError> {
    at.choice(&[("lora", TrainType::Lora), ("qlora", TrainType::Qlora), ("full", TrainType::Full)])
}

fn read_save(at: At<'_>) -> Result<Save, SpecError> {
    at.choice(&[
        ("standard", Save::Standard),
        ("fast_iteration", Save::FastIteration),
        ("long_run", Save::LongRun),
    ])
}

fn read_learning(at: At<'_>) -> Result<Learning, SpecError> {
    at.choice(&[("standard", Learning::Standard), ("fast", Learning::Fast), ("stable", Learning::Stable)])
}

fn read_length(at: At<'_>) -> Result<Length, SpecError> {
    match at.value {
        Value::Number(_) => at.count(1, LENGTH_TOKENS_MAX).map(Length::Tokens),
        Value::String(_) => {
            at.choice(&[("standard", Length::Standard), ("long", Length::Long), ("short", Length::Short)])
        }
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
            Err(at.wrong_type("\"standard\", \"long\", \"short\" or a number of tokens"))
        }
    }
}

/// Reads data sets, `name#N` among them: ms-swift takes the last N for a number of rows, and dies where it is below 1.
///
/// What is no number may be the end of a file's name, and is looked at where the files are.
fn read_datasets(at: At<'_>, expected: &str) -> Result<Vec<String>, SpecError> {
    let datasets = at.lines(expected)?;
    for text in &datasets {
        let rows = text.rsplit_once('#').and_then(|(_, rows)| rows.trim().parse::<i128>().ok());
        if rows.is_some_and(|rows| rows < 1) {
            let value = Value::String(text.clone());
            return Err(
                At::new(at.key, &value).out_of_range("`name#N` with N from 1, or a name without `#N`")
            );
        }
    }
    Ok(datasets)
}

fn read_validation(at: At<'_>) -> Result<Option<Validation>, SpecError> {
    match at.value {
        Value::Null => Ok(None),
        Value::Number(number) => match number.as_f64() {
            Some(share) if share > 0.0 && share < 1.0 => Ok(Some(Validation::Share(share))),
            _ => Err(at.out_of_range("a share above 0 and below 1, or datasets")),
        },
        Value::String(_) | Value::Array(_) => {
            read_datasets(at, "a dataset").map(|datasets| Some(Validation::Datasets(datasets)))
        }
        Value::Bool(_) | Value::Object(_) => Err(at.wrong_type("a share of the data (0.02), or datasets")),
    }
}

type Trackers = BTreeMap<String, BTreeMap<String, Value>>;

fn read_report_to(at: At<'_>) -> Result<Trackers, SpecError> {
    const EXPECTED: &str = "a tracker, a list of trackers, or an object of trackers with their settings";
    match at.value {
        Value::String(name) if name == "none" => Ok(Trackers::new()),
        Value::String(_) => Ok(Trackers::from([(read_tracker(at)?, BTreeMap::new())])),
        Value::Array(names) => {
            names.iter().map(|name| Ok((read_tracker(At::new(at.key, name))?, BTreeMap::new()))).collect()
        }
        Value::Object(trackers) => trackers
            .iter()
            .map(|(name, settings)| {
                let tracker = read_tracker(At::new(at.key, &Value::String(name.clone())))?;
                let settings = read_tracker_settings(At::new(&format!("report_to.{tracker}"), settings))?;
                Ok((tracker, settings))
            })
            .collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => Err(at.wrong_type(EXPECTED)),
    }
}

fn read_tracker(at: At<'_>) -> Result<String, SpecError> {
    let known: Vec<(&str, &str)> = TRACKERS.iter().map(|&name| (name, name)).collect();
    at.choice(&known).map(str::to_owned)
}

fn read_tracker_settings(at: At<'_>) -> Result<BTreeMap<String, Value>, SpecError> {
    let Value::Object(settings) = at.value else {
        return Err(at.wrong_type("an object of settings"));
    };
    settings
        .iter()
        .map(|(name, value)| {
            let key = format!("{}.{}", at.key, clip(name));
            check_setting_name(&key, name)?;
            // `token` in a tracker's settings is its key: the tracker's name says which variable carries it.
            let tracker = at.key.trim_start_matches("report_to.");
            check_not_secret(&key, name, &format!("{tracker}_{name}"), value)?;
            match value {
                Value::String(text) => check_line(&key, text)?,
                Value::Bool(_) | Value::Number(_) => {}
                Value::Null | Value::Array(_) | Value::Object(_) => {
                    return Err(At::new(&key, value).wrong_type("a string, a number or true/false"));
                }
            }
            if key == "report_to.swanlab.mode" {
                // ms-swift's parser ends with status 2 on SwanLab's other modes.
                At::new(&key, value).choice(&[("cloud", ()), ("local", ())])?;
            }
            Ok((name.clone(), value.clone()))
        })
        .collect()
}

fn check_setting_name(key: &str, name: &str) -> Result<(), SpecError> {
    if is_variable_name(name) {
        return Ok(());
    }
    Err(SpecError::OutOfRange {
        key: key.to_owned(),
        expected: "named with letters, digits and `_`".to_owned(),
        found: format!("\"{}\"", clip(name)),
    })
}

fn read_allow(at: At<'_>) -> Result<Allow, SpecError> {
    let Value::Object(object) = at.value else {
        return Err(at.wrong_type("an object of switches, for example {\"emergency\": false}"));
    };
    check_keys("allow.", object, &ALLOW_KEYS)?;
    let defaults = Allow::default();
    let flag = |key: &str, default: bool| match object.get(key) {
        None => Ok(default),
        Some(value) => At::new(&format!("allow.{key}"), value).flag(),
    };
    Ok(Allow {
        shorter_max_length: flag("shorter_max_length", defaults.shorter_max_length)?,
        no_packing: flag("no_packing", defaults.no_packing)?,
        lower_precision: flag("lower_precision", defaults.lower_precision)?,
        emergency: flag("emergency", defaults.emergency)?,
        restart: flag("restart", defaults.restart)?,
        quantize: flag("quantize", defaults.quantize)?,
        liger: flag("liger", defaults.liger)?,
        fewer_targets: flag("fewer_targets", defaults.fewer_targets)?,
        no_checkpointing: flag("no_checkpointing", defaults.no_checkpointing)?,
        recipe_stable: flag("recipe_stable", defaults.recipe_stable)?,
    })
}

fn read_secrets(at: At<'_>) -> Result<Vec<String>, SpecError> {
    let Value::Array(names) = at.value else {
        return Err(SpecError::WrongType {
            key: at.key.to_owned(),
            expected: "a list of names of environment variables".to_owned(),
            // The value of a wrong `secrets` may be the secret itself.
            found: kind_of(at.value).to_owned(),
        });
    };
    names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let key = format!("secrets[{i}]");
            match name {
                Value::String(name) if is_variable_name(name) && !is_secret_value(name) => Ok(name.clone()),
                // `NAME=value` and a bare key are the likely slips, so the text is not shown.
                Value::String(_) => {
                    Err(SpecError::BadVariableName { key, found: "the text there (not shown)".to_owned() })
                }
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
                    Err(SpecError::BadVariableName { key, found: kind_of(name).to_owned() })
                }
            }
        })
        .collect()
}

/// Returns the type of a value in words; for values that must not be shown.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn read_time_limit(at: At<'_>) -> Result<Option<Duration>, SpecError> {
    const EXPECTED: &str = "a time such as \"12h\", \"90m\", \"45s\", \"1d12h\" or a number of seconds";
    let range = format!("{EXPECTED}, from 1 s to 365 d");
    let seconds = match at.value {
        Value::Null => return Ok(None),
        Value::Number(number) => number.as_u64(),
        Value::String(text) => duration_seconds(text),
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => return Err(at.wrong_type(EXPECTED)),
    };
    match seconds {
        Some(seconds) if (1..=TIME_LIMIT_SECONDS_MAX).contains(&seconds) => {
            Ok(Some(Duration::from_secs(seconds)))
        }
        _ => Err(at.out_of_range(&range)),
    }
}

/// Returns the seconds of a text like `1d12h30m`: units from large to small, each at most once.
fn duration_seconds(text: &str) -> Option<u64> {
    const UNITS: [(char, u64); 4] = [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];
    let mut rest = text.trim();
    let mut units = UNITS.iter();
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..end].parse().ok()?;
        let unit = rest[end..].chars().next()?;
        let (_, seconds) = units.by_ref().find(|(name, _)| *name == unit)?;
        total = total.checked_add(number.checked_mul(*seconds)?)?;
        rest = &rest[end + unit.len_utf8()..];
    }
    Some(total)
}

fn read_env(at: At<'_>) -> Result<BTreeMap<String, String>, SpecError> {
    let Value::Object(variables) = at.value else {
        return Err(at.wrong_type("an object of environment variables"));
    };
    variables.iter().map(|(name, value)| Ok((name.clone(), read_variable(name, value)?))).collect()
}

/// Reads one variable. No error shows its value.
fn read_variable(name: &str, value: &Value) -> Result<String, SpecError> {
    let key = format!("env.{}", clip(name));
    if !is_variable_name(name) {
        return Err(SpecError::BadVariableName { key, found: format!("\"{}\"", clip(name)) });
    }
    if let Some((_, why)) = FORBIDDEN_ENV.iter().find(|(forbidden, _)| *forbidden == name) {
        return Err(SpecError::ForbiddenEnv { name: name.to_owned(), why });
    }
    check_not_secret(&key, name, name, value)?;
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
            return Err(SpecError::WrongType {
                key,
                expected: "a string or a number".to_owned(),
                found: kind_of(value).to_owned(),
            });
        }
    };
    check_line(&key, &text)?;
    Ok(text)
}

/// Refuses a secret in clear, and a shell variable that nobody would expand.
///
/// An empty text is no secret: it switches a variable off. Nor are true, false and null.
pub(super) fn check_not_secret(
    key: &str,
    name: &str,
    variable: &str,
    value: &Value,
) -> Result<(), SpecError> {
    let refuse = || SpecError::SecretInClear { key: key.to_owned(), variable: variable_for(variable) };
    match value {
        Value::String(text) if is_secret_value(text) => Err(refuse()),
        Value::String(text) if is_secret_name(name) && !text.is_empty() => Err(refuse()),
        Value::String(text) => match shell_reference(text) {
            Some(reference) => Err(SpecError::NotExpanded {
                key: key.to_owned(),
                reference: format!("${}", clip(reference)),
            }),
            None => Ok(()),
        },
        Value::Number(_) if is_secret_name(name) => Err(refuse()),
        Value::Array(items) => items.iter().try_for_each(|item| check_not_secret(key, name, variable, item)),
        Value::Object(_) if is_secret_name(name) => Err(refuse()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Ok(()),
    }
}

/// Refuses keys and passwords in texts that are no parameter: they would be shown in status and receipt.
fn check_no_secret_in_text(spec: &JobSpec) -> Result<(), SpecError> {
    let validation = match &spec.validation {
        Some(Validation::Datasets(datasets)) => datasets.as_slice(),
        Some(Validation::Share(_)) | None => &[],
    };
    let texts = [("model", &spec.model), ("name", &spec.name), ("output_dir", &spec.output_dir)]
        .into_iter()
        .chain(spec.dataset.iter().map(|text| ("dataset", text)))
        .chain(validation.iter().map(|text| ("validation", text)))
        .chain(spec.labels.values().map(|text| ("labels", text)));
    for (key, text) in texts {
        if is_secret_value(text) {
            return Err(SpecError::SecretInClear { key: key.to_owned(), variable: "MY_SECRET".to_owned() });
        }
    }
    match spec.secrets.iter().find(|name| spec.env.contains_key(*name)) {
        Some(name) => Err(SpecError::SecretInClear { key: format!("env.{name}"), variable: name.clone() }),
        None => Ok(()),
    }
}

fn read_priority(at: At<'_>) -> Result<i32, SpecError> {
    let n = at.whole(i64::from(i32::MIN), i64::from(i32::MAX))?;
    i32::try_from(n).map_err(|_| at.out_of_range("a whole number"))
}

fn read_labels(at: At<'_>) -> Result<BTreeMap<String, String>, SpecError> {
    let Value::Object(labels) = at.value else {
        return Err(at.wrong_type("an object of texts"));
    };
    labels
        .iter()
        .map(|(name, value)| {
            let key = format!("labels.{}", clip(name));
            check_line(&key, name)?;
            let Value::String(text) = value else { return Err(At::new(&key, value).wrong_type("a string")) };
            check_line(&key, text)?;
            Ok((name.clone(), text.clone()))
        })
        .collect()
}

fn read_after(at: At<'_>) -> Result<Vec<u64>, SpecError> {
    const EXPECTED: &str = "a list of job ids (whole numbers from 1)";
    let Value::Array(ids) = at.value else { return Err(at.wrong_type(EXPECTED)) };
    let mut seen = BTreeSet::new();
    for (i, id) in ids.iter().enumerate() {
        let key = format!("after[{i}]");
        match id.as_u64() {
            Some(id) if id > 0 => seen.insert(id),
            _ => return Err(At::new(&key, id).wrong_type("a job id (a whole number from 1)")),
        };
    }
    Ok(seen.into_iter().collect())
}
