//! What does a job pin, and which parameters of `swift sft` may it not set?

use std::collections::BTreeMap;

use mhtrain_sizing::request::{Length, Pins};
use mhtrain_sizing::tier::Steps;
use mhtrain_sizing::workload::{AttnImpl, Dtype, Targets, TrainType};
use serde_json::Value;

use super::parse::check_not_secret;
use super::read::{At, check_no_nul, clip};
use super::{JobSpec, SpecError};
use crate::secrets::is_variable_name;

/// Parameters that a key of the job says already, and that key.
pub const REPEATED_ARGS: [(&str, &str); 6] = [
    ("model", "model"),
    ("dataset", "dataset"),
    ("output_dir", "output_dir"),
    ("train_type", "train_type"),
    ("tuner_type", "train_type"),
    ("report_to", "report_to"),
];

/// Parameters that only the supervisor may set, and why.
pub const FORBIDDEN_ARGS: [(&str, &str); 7] = [
    ("resume_from_checkpoint", "the supervisor chooses the checkpoint and repairs it"),
    ("resume_only_model", "the supervisor decides how an attempt resumes, and says so in the receipt"),
    ("ignore_data_skip", "rows would be trained again after every resume"),
    ("add_version", "each attempt has a directory of its own, which the supervisor names"),
    ("auto_find_batch_size", "it changes the batch without the accumulation, so the effective batch drifts"),
    ("config", "the parameters of a file would not be seen; write them into `args`"),
    ("save_strategy", "the supervisor needs checkpoints; `save` or `args.save_steps` says how often"),
];

/// Forbidden parameters that are harmless with this value.
const HARMLESS: [(&str, &str); 4] = [
    ("auto_find_batch_size", "false"),
    ("resume_only_model", "false"),
    ("ignore_data_skip", "false"),
    ("save_strategy", "steps"),
];

/// Parameters that are read here. ms-swift takes any unambiguous beginning of a name for the name, so an
/// abbreviation of one of these would pass by the pins (measured: `--per_device_train_batch 4` runs).
pub const ABBREVIATIONS_GUARDED: [&str; 28] = [
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_steps",
    "packing",
    "attn_impl",
    "torch_dtype",
    "gradient_checkpointing",
    "use_liger_kernel",
    "learning_rate",
    "warmup_ratio",
    "max_grad_norm",
    "num_train_epochs",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "router_aux_loss_coef",
    "lora_rank",
    "target_modules",
    "quant_bits",
    "dataloader_num_workers",
    "split_dataset_ratio",
    "val_dataset",
    "resume_from_checkpoint",
    "auto_find_batch_size",
    "output_dir",
    "report_to",
];

const COUNT_MAX: u32 = 1_000_000;

type Args = BTreeMap<String, Value>;

pub(super) fn read_args(at: At<'_>) -> Result<Args, SpecError> {
    let Value::Object(given) = at.value else {
        return Err(at.wrong_type("an object of parameters of `swift sft`"));
    };
    let mut args = Args::new();
    for (written, value) in given {
        let name = written.trim_start_matches('-').replace('-', "_");
        check_name(written, &name)?;
        check_value(&name, value)?;
        if args.insert(name.clone(), value.clone()).is_some() {
            return Err(SpecError::ArgTwice { arg: name });
        }
    }
    Ok(args)
}

fn check_name(written: &str, name: &str) -> Result<(), SpecError> {
    let arg = clip(name);
    if !is_variable_name(name) {
        return Err(SpecError::UnknownKey { key: format!("args.{}", clip(written)), nearest: None });
    }
    if let Some((_, field)) = REPEATED_ARGS.iter().find(|(repeated, _)| *repeated == name) {
        return Err(SpecError::ArgRepeatsField { arg, field });
    }
    let known = ABBREVIATIONS_GUARDED.contains(&name);
    match ABBREVIATIONS_GUARDED.iter().find(|full| full.starts_with(name)) {
        Some(full) if !known && name != "config" => Err(SpecError::AbbreviatedArg { arg, full }),
        Some(_) | None => Ok(()),
    }
}

fn check_value(name: &str, value: &Value) -> Result<(), SpecError> {
    let key = format!("args.{name}");
    check_not_secret(&key, name, name, value)?;
    if let Some((_, why)) = FORBIDDEN_ARGS.iter().find(|(forbidden, _)| *forbidden == name) {
        let text = spelled(value).to_lowercase();
        if !HARMLESS.iter().any(|(harmless, with)| *harmless == name && *with == text) {
            return Err(SpecError::ForbiddenArg { arg: name.to_owned(), why });
        }
    }
    match value {
        Value::String(text) => check_no_nul(&key, text),
        Value::Bool(_) | Value::Number(_) => Ok(()),
        Value::Array(items) => items.iter().try_for_each(|item| match item {
            Value::String(text) => check_no_nul(&key, text),
            Value::Bool(_) | Value::Number(_) => Ok(()),
            Value::Null | Value::Array(_) | Value::Object(_) => {
                Err(At::new(&key, item).wrong_type("a list of strings, numbers or true/false"))
            }
        }),
        Value::Object(_) => Err(At::new(&key, value).wrong_type(
            "a string, a number, true/false or a list of those (write an object as a JSON string)",
        )),
        Value::Null => {
            Err(At::new(&key, value).wrong_type("a string, a number, true/false or a list of those"))
        }
    }
}

/// Returns a value as it would stand on a command line.
fn spelled(value: &Value) -> String {
    match value {
        Value::String(text) => text.trim().to_owned(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    }
}

/// Refuses arguments that contradict a key which the job does set.
pub(super) fn check_against_keys(spec: &JobSpec) -> Result<(), SpecError> {
    let repeats = |arg: &str, field| Err(SpecError::ArgRepeatsField { arg: arg.to_owned(), field });
    if spec.validation.is_some() {
        for arg in ["split_dataset_ratio", "val_dataset"] {
            if spec.args.contains_key(arg) {
                return repeats(arg, "validation");
            }
        }
    }
    for setting in spec.report_to.get("swanlab").into_iter().flat_map(BTreeMap::keys) {
        let arg = format!("swanlab_{setting}");
        if spec.args.contains_key(&arg) {
            return repeats(&arg, "report_to");
        }
    }
    match (spec.length, ArgReader(&spec.args).count("max_length", 1, COUNT_MAX)?) {
        (Length::Tokens(tokens), Some(pinned)) if tokens != pinned => repeats("max_length", "length"),
        _ => Ok(()),
    }
}

impl JobSpec {
    /// Returns what the job pins: the sizing parameters in `args`, and `length` where it is a number.
    ///
    /// # Errors
    /// A value of the wrong type or outside of its range; none after [`JobSpec::parse`].
    pub fn pins(&self) -> Result<Pins, SpecError> {
        let args = ArgReader(&self.args);
        let length = match self.length {
            Length::Tokens(tokens) => Some(tokens),
            Length::Standard | Length::Long | Length::Short => None,
        };
        Ok(Pins {
            micro_batch: args.count("per_device_train_batch_size", 1, COUNT_MAX)?,
            accumulation: args.count("gradient_accumulation_steps", 1, COUNT_MAX)?,
            max_length: args.count("max_length", 1, COUNT_MAX)?.or(length),
            packing: args.flag("packing")?,
            attn_impl: args.choice("attn_impl", &AttnImpl::ALL.map(|attn| (attn.to_string(), attn)))?,
            torch_dtype: args.choice(
                "torch_dtype",
                &[Dtype::Bfloat16, Dtype::Float16, Dtype::Float32].map(|dtype| (dtype.to_string(), dtype)),
            )?,
            gradient_checkpointing: args.flag("gradient_checkpointing")?,
            liger_kernel: args.flag("use_liger_kernel")?,
            learning_rate: args
                .number("learning_rate", "a number above 0 and up to 1", |n| n > 0.0 && n <= 1.0)?,
            warmup_ratio: args.number("warmup_ratio", "a share from 0 up to, not including, 1", |n| {
                (0.0..1.0).contains(&n)
            })?,
            max_grad_norm: args.number("max_grad_norm", "a number from 0", |n| n >= 0.0)?,
            num_train_epochs: args.number("num_train_epochs", "a number above 0 and up to 100000", |n| {
                n > 0.0 && n <= 100_000.0
            })?,
            save_steps: args.steps("save_steps")?,
            save_total_limit: args.count("save_total_limit", 1, COUNT_MAX)?,
            logging_steps: args.steps("logging_steps")?,
            router_aux_loss_coef: args.number("router_aux_loss_coef", "a number from 0", |n| n >= 0.0)?,
            lora_rank: args.count("lora_rank", 1, 65_536)?,
            target_modules: self.target_modules()?,
        })
    }

    /// Returns the adapted layers if the job pins them: `args.target_modules`, a text or a list.
    fn target_modules(&self) -> Result<Option<Targets>, SpecError> {
        let names = |value| At::new("args.target_modules", value).lines("the name of a layer");
        let names = self.args.get("target_modules").map(names).transpose()?;
        Ok(names.map(|names| Targets::parse(&names.join(","))))
    }

    /// Returns `args.max_steps`, the number of optimizer steps after which training ends; `None`: by epochs.
    ///
    /// # Errors
    /// A value that is no whole number from 1 (or -1, ms-swift's "no limit"); none after [`JobSpec::parse`].
    pub fn max_steps(&self) -> Result<Option<u64>, SpecError> {
        let Some(value) = self.args.get("max_steps") else { return Ok(None) };
        let number = plain_number(value);
        let value = number.as_ref().unwrap_or(value);
        match At::new("args.max_steps", value).whole(-1, i64::from(u32::MAX))? {
            -1 => Ok(None),
            0 => Err(At::new("args.max_steps", value).out_of_range("a whole number from 1, or -1")),
            steps => Ok(u64::try_from(steps).ok()),
        }
    }

    /// Returns `args.dataloader_num_workers` if the job pins it.
    ///
    /// # Errors
    /// A value that is no whole number from 0 to 1024; none after [`JobSpec::parse`].
    pub fn dataloader_workers(&self) -> Result<Option<u32>, SpecError> {
        ArgReader(&self.args).count("dataloader_num_workers", 0, 1024)
    }

    /// Returns `args.per_device_eval_batch_size` if the job pins it.
    ///
    /// # Errors
    /// A value that is no whole number from 1; none after [`JobSpec::parse`].
    pub fn eval_batch(&self) -> Result<Option<u32>, SpecError> {
        ArgReader(&self.args).count("per_device_eval_batch_size", 1, COUNT_MAX)
    }

    /// Returns what the job is in memory: lora over weights of 4 bits is qlora, however it is written.
    pub(super) fn train_type_in_memory(&self) -> Result<TrainType, SpecError> {
        let args = ArgReader(&self.args);
        // The value may also be `float8`, so only the four bits of qlora are looked for.
        let four_bits = args.0.get("quant_bits").is_some_and(|bits| spelled(bits) == "4");
        Ok(match self.train_type {
            TrainType::Lora if four_bits => TrainType::Qlora,
            other @ (TrainType::Lora | TrainType::Qlora | TrainType::Full) => other,
        })
    }

    /// Checks every parameter that is read here, and the effective batch where it is pinned whole.
    pub(super) fn check_pins(&self) -> Result<(), SpecError> {
        let pins = self.pins()?;
        self.max_steps()?;
        self.dataloader_workers()?;
        self.eval_batch()?;
        let (Some(micro_batch), Some(accumulation)) = (pins.micro_batch, pins.accumulation) else {
            return Ok(());
        };
        let product = u64::from(micro_batch) * u64::from(accumulation) * u64::from(self.devices);
        if product < u64::from(self.min_effective_batch) {
            return Err(SpecError::PinsBelowMinimum {
                micro_batch,
                accumulation,
                devices: self.devices,
                product,
                minimum: self.min_effective_batch,
            });
        }
        Ok(())
    }
}

/// Reads parameters by name. A number or a flag may be spelled as text, as on a command line: `"2e-4"`.
struct ArgReader<'a>(&'a Args);

impl ArgReader<'_> {
    fn read<T>(
        &self,
        name: &str,
        read: impl FnOnce(At<'_>) -> Result<T, SpecError>,
    ) -> Result<Option<T>, SpecError> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        let number = plain_number(value);
        let key = format!("args.{name}");
        read(At::new(&key, number.as_ref().unwrap_or(value))).map(Some)
    }

    fn count(&self, name: &str, min: u32, max: u32) -> Result<Option<u32>, SpecError> {
        self.read(name, |at| at.count(min, max))
    }

    fn number(
        &self,
        name: &str,
        expected: &str,
        accept: impl FnOnce(f64) -> bool,
    ) -> Result<Option<f64>, SpecError> {
        self.read(name, |at| match at.value.as_f64() {
            Some(n) if n.is_finite() && accept(n) => Ok(n),
            Some(_) => Err(at.out_of_range(expected)),
            None => Err(at.wrong_type(expected)),
        })
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, SpecError> {
        self.read(name, |at| match spelled(at.value).to_lowercase().as_str() {
            // The words of transformers' `string_to_bool` (hf_argparser.py, 4.57 and 5.19).
            "true" | "t" | "yes" | "y" | "1" => Ok(true),
            "false" | "f" | "no" | "n" | "0" => Ok(false),
            _ => Err(at.wrong_type("true or false")),
        })
    }

    fn choice<T: Clone>(&self, name: &str, known: &[(String, T)]) -> Result<Option<T>, SpecError> {
        let known: Vec<(&str, T)> =
            known.iter().map(|(word, meaning)| (word.as_str(), meaning.clone())).collect();
        self.read(name, |at| at.choice(&known))
    }

    fn steps(&self, name: &str) -> Result<Option<Steps>, SpecError> {
        const EXPECTED: &str = "a whole number of steps from 1, or a share of all steps above 0 and below 1";
        self.read(name, |at| match at.value.as_f64() {
            Some(n) if n > 0.0 && n < 1.0 => Ok(Steps::Share(n)),
            Some(_) => at.count(1, COUNT_MAX).map(Steps::Count).map_err(|_| at.out_of_range(EXPECTED)),
            None => Err(at.wrong_type(EXPECTED)),
        })
    }
}

/// Returns the number that a value means: `"8"` is 8, and 200.0 is 200. `None` if it needs no change or is none.
fn plain_number(value: &Value) -> Option<Value> {
    let number: f64 = match value {
        Value::String(text) => {
            let text = text.trim();
            if let Ok(whole) = text.parse::<i64>() {
                return Some(Value::from(whole));
            }
            text.parse()
                .ok()
                .filter(|_| text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)))?
        }
        Value::Number(number) if number.is_f64() => number.as_f64()?,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => return None,
    };
    if number.fract() == 0.0 && number.abs() < 1e15 {
        // Exact: whole, and below 2^53.
        return format!("{number:.0}").parse::<i64>().ok().map(Value::from);
    }
    Value::Number(serde_json::Number::from_f64(number)?).into()
}
