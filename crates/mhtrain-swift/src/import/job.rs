//! Which job stands for one call of `swift sft`?

use std::collections::{BTreeMap, BTreeSet};

use mhtrain_job::secrets::{is_secret_name, is_secret_value, variable_for};
use mhtrain_job::spec::{FORBIDDEN_ARGS, FORBIDDEN_ENV, JobSpec, TRACKERS};
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use serde_json::{Map, Value, json};

use super::ImportError;
use super::block::{Call, check_one_machine, clipped};
use super::shell::Text;
use crate::command::{merge_expandable_segments, merge_no_proxy};
use crate::parameters::{ParameterKind, Parameters};

/// The recipe's standard values of what the engine decides (its sections 2 and 4): the engine arrives there itself.
const STANDARD: [(&str, f64); 7] = [
    ("learning_rate", 2e-4),
    ("warmup_ratio", 0.1),
    ("max_grad_norm", 1.0),
    ("num_train_epochs", 1.0),
    ("save_steps", 200.0),
    ("save_total_limit", 3.0),
    ("logging_steps", 20.0),
];

/// The recipe's emergency profile (section 2.4): its values were chosen for want of memory, all together.
const EMERGENCY: [(&str, f64); 7] = [
    ("per_device_train_batch_size", 1.0),
    ("gradient_accumulation_steps", 32.0),
    ("max_length", 2048.0),
    ("learning_rate", 1e-4),
    ("save_steps", 100.0),
    ("save_total_limit", 2.0),
    ("logging_steps", 50.0),
];

/// Knobs that only trade memory for speed: always the engine's, unless they are pinned.
const KNOBS: [&str; 5] = [
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "packing",
    "attn_impl",
    "gradient_checkpointing",
];

/// Rows up to the recipe's standard (section 4.2) lose nothing when the engine chooses.
const STANDARD_LENGTH: f64 = 3072.0;
const LONG_LENGTH: f64 = 4096.0;

/// The largest effective batch that the recipe's own table has (section 3, 6 x 6).
const RECIPE_EFFECTIVE_BATCH_MAX: u64 = 36;

/// Smallest effective batch of a job that says nothing else.
const MIN_EFFECTIVE_BATCH: u64 = 32;

/// Secrets that ms-swift reads from the command line only, where everybody can see them.
const COMMAND_LINE_SECRETS: [&str; 2] = ["swanlab_secret", "swanlab_webhook_url"];

/// Returns the job, read back by the job's own reader.
pub(super) fn describe(call: &Call, pin: bool, warnings: &mut Vec<String>) -> Result<Value, ImportError> {
    let mut import = Import {
        call: call.clone(),
        pin,
        warnings,
        secrets: BTreeSet::new(),
        unknowable: BTreeSet::new(),
        job: Map::new(),
    };
    import.take_secrets();
    import.take_unknowable()?;
    import.warn_about_placeholders();
    import.set_model_and_data();
    import.set_devices()?;
    import.set_train_type()?;
    import.set_validation();
    import.set_output_and_trackers();
    import.drop_forbidden();
    import.keep_lora_scale();
    if pin {
        import.pin_everything()
    } else {
        import.leave_sizing_to_the_engine()
    }
    import.set_env();
    let job = import.finish();
    JobSpec::from_value(&job).map_err(ImportError::Job)?;
    Ok(job)
}

/// A job that is being put together: what is understood leaves `call` and enters `job`.
struct Import<'a> {
    call: Call,
    pin: bool,
    warnings: &'a mut Vec<String>,
    secrets: BTreeSet<String>,
    /// Parameters that the block sets to what only a running shell would know.
    unknowable: BTreeSet<String>,
    job: Map<String, Value>,
}

/// Keys of the job in the order in which they are written.
const KEY_ORDER: [&str; 15] = [
    "model",
    "dataset",
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
    "args",
];

impl Import<'_> {
    fn warn(&mut self, sentence: impl Into<String>) {
        self.warnings.push(sentence.into());
    }

    /// Moves secrets out: parameters and variables whose name says so, and values that carry one.
    fn take_secrets(&mut self) {
        let flags = std::mem::take(&mut self.call.flags);
        for flag in flags {
            let shown = clipped(&flag.name);
            if is_secret_name(&flag.name) {
                self.take_secret_flag(&flag.name);
            } else if flag.values.iter().any(|value| value.is_secret || is_secret_value(&value.text)) {
                if matches!(flag.name.as_str(), "model" | "dataset") {
                    let unresolved = Some("a secret".to_owned());
                    let hidden = Text { unresolved, ..Text::default() };
                    self.call.flags.push(super::block::Flag { name: flag.name, values: vec![hidden] });
                } else {
                    self.warn(format!("`--{shown}` is left out: its value holds a secret"));
                }
            } else {
                self.call.flags.push(flag);
            }
        }
        let env = std::mem::take(&mut self.call.env);
        for (name, value) in env {
            if !is_secret_name(&name) && !value.is_secret && !is_secret_value(&value.text) {
                self.call.env.insert(name, value);
                continue;
            }
            let variable = if name == "SWANLAB_TOKEN" { variable_for(&name) } else { name.clone() };
            self.warn(if variable == name {
                format!("{name} is a secret: its value is left out, and its name is in `secrets`")
            } else {
                format!("{name} is a secret: its value is left out, and {variable}, which the trainer reads, is in `secrets`")
            });
            self.secrets.insert(variable);
        }
    }

    fn take_secret_flag(&mut self, name: &str) {
        if COMMAND_LINE_SECRETS.contains(&name) {
            self.warn(format!(
                "`--{name}` is left out: ms-swift takes this secret on the command line only, where every user of the host can read it"
            ));
            return;
        }
        let variable = variable_for(name);
        self.warn(format!("`--{name}` is a secret: its value is left out, and {variable} is in `secrets`"));
        self.secrets.insert(variable);
    }

    /// Leaves out parameters whose value only a running shell would know.
    fn take_unknowable(&mut self) -> Result<(), ImportError> {
        let line = self.call.line;
        for flag in ["model", "dataset"] {
            let values = self.call.values(flag).filter(|values| !values.is_empty());
            let values = values.ok_or(ImportError::MissingFlag { flag, line })?;
            if let Some(what) = values.iter().find_map(|value| value.unresolved.clone()) {
                return Err(ImportError::Unresolved { flag, line, what });
            }
            if values.iter().all(|value| value.text.is_empty()) {
                return Err(ImportError::MissingFlag { flag, line });
            }
        }
        let flags = std::mem::take(&mut self.call.flags);
        for flag in flags {
            match flag.values.iter().find_map(|value| value.unresolved.as_ref()) {
                Some(what) => {
                    let name = clipped(&flag.name);
                    self.warn(format!("`--{name}` is left out: its value uses {what}"));
                    self.unknowable.insert(flag.name);
                }
                None => self.call.flags.push(flag),
            }
        }
        Ok(())
    }

    fn warn_about_placeholders(&mut self) {
        let values = self.call.flags.iter().flat_map(|flag| &flag.values);
        let placeholders: BTreeSet<String> = values.filter_map(|value| placeholder(&value.text)).collect();
        for placeholder in placeholders {
            self.warn(format!("`{placeholder}` is a placeholder: put the real value in its place"));
        }
    }

    fn set_model_and_data(&mut self) {
        let texts = |values: Vec<Text>| values.into_iter().map(|value| Value::String(value.text)).collect();
        let model: Vec<Value> = texts(self.call.take("model").unwrap_or_default());
        let dataset: Vec<Value> = texts(self.call.take("dataset").unwrap_or_default());
        self.job.insert("model".to_owned(), model.into_iter().next().unwrap_or_default());
        self.job.insert("dataset".to_owned(), Value::Array(dataset));
    }

    /// Reads which cards, and how many.
    fn set_devices(&mut self) -> Result<(), ImportError> {
        for name in ["NNODES", "nnodes"] {
            if let Some(nodes) = self.call.env.remove(name) {
                check_one_machine(self.call.line, &nodes.text)?;
            }
        }
        let visible = self.call.env.remove("CUDA_VISIBLE_DEVICES");
        let processes =
            self.call.env.remove("NPROC_PER_NODE").and_then(|count| count.text.trim().parse().ok());
        let processes: Option<u32> = processes.or(self.call.launched);
        let cards: Vec<String> = match &visible {
            Some(value) if value.unresolved.is_some() => {
                self.warn("CUDA_VISIBLE_DEVICES is left out: its value is not in the text");
                Vec::new()
            }
            Some(value) => value
                .text
                .split(',')
                .map(|card| card.trim().to_owned())
                .filter(|card| !card.is_empty())
                .collect(),
            None => Vec::new(),
        };
        if let Some(card) = cards.first() {
            match card.parse::<u32>() {
                Ok(index) => drop(self.job.insert("device".to_owned(), json!(index))),
                Err(_) if card.starts_with("GPU-") || card.starts_with("MIG-") => {
                    self.job.insert("device".to_owned(), json!(card));
                }
                Err(_) => self.warn("CUDA_VISIBLE_DEVICES names no card; the engine chooses one"),
            }
        } else if visible.is_some_and(|value| value.unresolved.is_none()) {
            self.warn("CUDA_VISIBLE_DEVICES is empty; the engine chooses a card");
        }
        let visible_count = u32::try_from(cards.len()).unwrap_or(u32::MAX);
        let devices = visible_count.max(processes.unwrap_or(1)).max(1);
        if devices > 1 {
            self.job.insert("devices".to_owned(), json!(devices));
            if processes.unwrap_or(1) == 1 {
                self.warn(format!(
                    "{devices} cards without NPROC_PER_NODE: ms-swift would spread one model over them; the job asks for {devices} devices"
                ));
            }
        }
        Ok(())
    }

    fn devices(&self) -> u64 {
        self.job.get("devices").and_then(Value::as_u64).unwrap_or(1)
    }

    /// Reads what is trained; 4-bit bitsandbytes under lora is qlora.
    fn set_train_type(&mut self) -> Result<(), ImportError> {
        let given = [self.call.take("train_type"), self.call.take("tuner_type")];
        let text = given.into_iter().flatten().flatten().next().map(|value| value.text);
        let is = |call: &Call, name: &str, wanted: &str| {
            call.values(name).and_then(<[Text]>::first).is_some_and(|value| value.text == wanted)
        };
        let four_bits = is(&self.call, "quant_bits", "4")
            && (is(&self.call, "quant_method", "bnb") || self.call.values("quant_method").is_none());
        let train_type = match text.as_deref() {
            Some("lora") | None if four_bits => "qlora",
            Some("lora") | None => "lora",
            Some("qlora") => "qlora",
            Some("full") => "full",
            Some(other) => return Err(ImportError::TrainType { value: clipped(other) }),
        };
        if train_type == "qlora" {
            self.call.take("quant_method");
            self.call.take("quant_bits");
            if is(&self.call, "bnb_4bit_compute_dtype", "bfloat16") {
                self.call.take("bnb_4bit_compute_dtype");
            }
        }
        self.job.insert("train_type".to_owned(), json!(train_type));
        Ok(())
    }

    fn set_validation(&mut self) {
        if let Some(values) = self.call.take("val_dataset").filter(|values| !values.is_empty()) {
            let datasets: Vec<String> = values.into_iter().map(|value| value.text).collect();
            self.job.insert("validation".to_owned(), json!(datasets));
            if self.call.take("split_dataset_ratio").is_some() {
                self.warn(
                    "`--split_dataset_ratio` is left out: with a validation set ms-swift does not split",
                );
            }
            return;
        }
        let Some(share) = self.number("split_dataset_ratio") else { return };
        if share > 0.0 && share < 1.0 {
            self.call.take("split_dataset_ratio");
            self.job.insert("validation".to_owned(), json!(share));
        } else if share == 0.0 && !self.pin {
            self.call.take("split_dataset_ratio");
        }
    }

    fn set_output_and_trackers(&mut self) {
        if let Some(directory) = self.call.take("output_dir").and_then(|values| values.into_iter().next()) {
            self.job.insert("output_dir".to_owned(), json!(directory.text));
        }
        let Some(names) = self.call.take("report_to") else {
            if self.pin {
                self.warn("`report_to` is set to tensorboard, ms-swift's own default");
                self.job.insert("report_to".to_owned(), json!({"tensorboard": {}}));
            }
            return;
        };
        let mut trackers = Map::new();
        for name in names.into_iter().map(|name| name.text).filter(|name| name != "none") {
            if TRACKERS.contains(&name.as_str()) {
                let settings = if name == "swanlab" { self.swanlab_settings() } else { Map::new() };
                trackers.insert(name, Value::Object(settings));
            } else {
                self.warn(format!("the tracker `{}` is left out: it is not known", clipped(&name)));
            }
        }
        let value = if trackers.is_empty() { json!("none") } else { Value::Object(trackers) };
        self.job.insert("report_to".to_owned(), value);
    }

    fn swanlab_settings(&mut self) -> Map<String, Value> {
        let mut settings = Map::new();
        for setting in ["project", "mode", "exp_name"] {
            let value =
                self.call.take(&format!("swanlab_{setting}")).and_then(|values| values.into_iter().next());
            if let Some(value) = value {
                settings.insert(setting.to_owned(), Value::String(value.text));
            }
        }
        settings
    }

    /// ms-swift's own scale stands for a block that names only a rank: a job without one gets the recipe's.
    fn keep_lora_scale(&mut self) {
        let is_open = self.call.values("lora_alpha").is_none() && !self.unknowable.contains("lora_alpha");
        if self.job.get("train_type") == Some(&json!("full")) || !is_open || self.text("lora_rank").is_empty()
        {
            return;
        }
        self.warn("`lora_alpha` is 32, ms-swift's own default, because the block does not say");
        self.call.flags.push(super::block::Flag {
            name: "lora_alpha".to_owned(),
            values: vec![Text { text: "32".to_owned(), ..Text::default() }],
        });
    }

    /// Leaves out what only the supervisor may set.
    fn drop_forbidden(&mut self) {
        for (name, why) in FORBIDDEN_ARGS {
            let Some(values) = self.call.values(name) else { continue };
            let text = values.first().map(|value| value.text.to_lowercase()).unwrap_or_default();
            let harmless = match name {
                "save_strategy" => text == "steps",
                "auto_find_batch_size" | "resume_only_model" | "ignore_data_skip" => text == "false",
                _ => false,
            };
            if harmless && self.pin {
                continue;
            }
            self.call.take(name);
            if !harmless {
                self.warn(format!("`--{name}` is left out: {why}"));
            }
        }
    }

    /// Pins what ms-swift would choose by itself, so that the engine does not choose something else.
    fn pin_everything(&mut self) {
        let batch = self.number("per_device_train_batch_size").unwrap_or(1.0).max(1.0);
        let world = f64::from(u32::try_from(self.devices()).unwrap_or(u32::MAX));
        let is_full = self.job.get("train_type") == Some(&json!("full"));
        let mut defaults = vec![
            ("packing", "false".to_owned()),
            ("gradient_checkpointing", "true".to_owned()),
            ("per_device_train_batch_size", "1".to_owned()),
            ("gradient_accumulation_steps", (16.0 / batch / world).ceil().max(1.0).to_string()),
            ("learning_rate", if is_full { "1e-5" } else { "1e-4" }.to_owned()),
            ("save_steps", "500".to_owned()),
            ("logging_steps", "5".to_owned()),
        ];
        if self.call.values("warmup_steps").is_none() {
            defaults.push(("warmup_ratio", "0".to_owned()));
        }
        if self.call.values("max_steps").is_none() {
            defaults.push(("num_train_epochs", "3".to_owned()));
        }
        let mut added = Vec::new();
        for (name, value) in defaults {
            // What ms-swift would choose is not what a value would be that only a shell knows.
            if self.call.values(name).is_none() && !self.unknowable.contains(name) {
                added.push(format!("{name} {value}"));
                self.call.flags.push(super::block::Flag {
                    name: name.to_owned(),
                    values: vec![Text { text: value, ..Text::default() }],
                });
            }
        }
        if !added.is_empty() {
            self.warn(format!(
                "pinned at ms-swift's own default, because the block leaves it open: {}",
                added.join(", ")
            ));
        }
        let open: Vec<&str> = ["max_length", "attn_impl", "torch_dtype", "save_total_limit"]
            .into_iter()
            .filter(|name| self.call.values(name).is_none())
            .collect();
        if !open.is_empty() {
            self.warn(format!("left to the engine, because the block leaves it open: {}", open.join(", ")));
        }
        if let Some(effective) = self.effective_batch().filter(|batch| *batch < MIN_EFFECTIVE_BATCH) {
            self.warn(format!(
                "the block's effective batch is {effective}, below {MIN_EFFECTIVE_BATCH}: `min_effective_batch` is lowered to it"
            ));
            self.job.insert("min_effective_batch".to_owned(), json!(effective));
        }
    }

    fn effective_batch(&self) -> Option<u64> {
        let whole = |name| self.call.values(name)?.first()?.text.trim().parse::<u64>().ok();
        let product =
            whole("per_device_train_batch_size")?.checked_mul(whole("gradient_accumulation_steps")?)?;
        product.checked_mul(self.devices()).filter(|product| *product > 0)
    }

    /// Takes the sizing knobs out, and turns what has a name in the recipe into that name.
    fn leave_sizing_to_the_engine(&mut self) {
        self.keep_amount_of_training();
        let effective = self.effective_batch();
        let is_emergency = EMERGENCY.iter().all(|(name, value)| self.number(name) == Some(*value));
        if is_emergency {
            for (name, _) in EMERGENCY {
                self.call.take(name);
            }
            self.warn("the block is the recipe's emergency profile; the engine takes it only if nothing better fits");
        }
        let knobs: Vec<&str> = KNOBS.into_iter().filter(|name| self.call.take(name).is_some()).collect();
        if !knobs.is_empty() {
            self.warn(format!("left to the engine (`--pin` keeps the block's values): {}", knobs.join(", ")));
        }
        match effective {
            Some(batch) if batch > RECIPE_EFFECTIVE_BATCH_MAX => {
                self.warn(format!("the block's effective batch of {batch} is kept as `min_effective_batch`"));
                self.job.insert("min_effective_batch".to_owned(), json!(batch));
            }
            Some(batch) if batch < MIN_EFFECTIVE_BATCH => self.warn(format!(
                "the block's effective batch is {batch}; the engine keeps it at {MIN_EFFECTIVE_BATCH} or more"
            )),
            Some(_) | None => {}
        }
        self.choose_length();
        self.choose_learning();
        self.choose_save();
        for (name, value) in STANDARD {
            if self.number(name) == Some(value) {
                self.call.take(name);
            }
        }
        self.leave_precision_and_kernels();
        self.drop_evaluation_without_validation();
    }

    fn choose_length(&mut self) {
        let Some(tokens) = self.number("max_length") else { return };
        if tokens == LONG_LENGTH {
            self.job.insert("length".to_owned(), json!("long"));
        } else if tokens > STANDARD_LENGTH {
            self.job.insert("length".to_owned(), typed_scalar(&ParameterKind::Int, &self.text("max_length")));
            self.warn(format!(
                "rows of {tokens} tokens are longer than the recipe's, so the length stays pinned"
            ));
        } else {
            self.warn(format!(
                "`max_length {tokens}` is left to the engine, which begins at {}",
                self.first_length()
            ));
        }
        self.call.take("max_length");
    }

    /// Returns the length at which the engine begins for the block's model, as far as its name tells.
    fn first_length(&self) -> u32 {
        let book = TierBook::builtin();
        let model = self.job.get("model").and_then(Value::as_str);
        let model = model.and_then(|name| Model::resolve(name, None, None).ok());
        let own = model.and_then(|model| book.class_of(&model).max_length);
        own.unwrap_or(book.profiles.standard.max_length)
    }

    fn choose_learning(&mut self) {
        let values = ["learning_rate", "warmup_ratio", "max_grad_norm"].map(|name| self.number(name));
        if values == [Some(1e-4), Some(0.15), Some(0.5)] {
            self.job.insert("learning".to_owned(), json!("stable"));
            for name in ["learning_rate", "warmup_ratio", "max_grad_norm"] {
                self.call.take(name);
            }
        } else if values[0] == Some(5e-4) {
            self.job.insert("learning".to_owned(), json!("fast"));
            self.call.take("learning_rate");
        }
    }

    /// Recipe section 4.4.
    fn choose_save(&mut self) {
        let named = match (self.number("save_steps"), self.number("save_total_limit")) {
            (Some(100.0), Some(5.0)) => "fast_iteration",
            (Some(500.0), Some(2.0)) => "long_run",
            _ => return,
        };
        self.job.insert("save".to_owned(), json!(named));
        self.call.take("save_steps");
        self.call.take("save_total_limit");
    }

    fn leave_precision_and_kernels(&mut self) {
        if self.text("torch_dtype") == "bfloat16" {
            self.call.take("torch_dtype");
        }
        if self.call.take("use_liger_kernel").is_some_and(|values| bool_of(&values) == Some(true)) {
            self.job.insert("allow".to_owned(), json!({"liger": true}));
        }
    }

    /// ms-swift trains 3 epochs where nothing is said, the recipe 1: how much is trained is not the engine's to change.
    fn keep_amount_of_training(&mut self) {
        if self.call.values("num_train_epochs").is_some() || self.call.values("max_steps").is_some() {
            return;
        }
        self.warn("`num_train_epochs` is 3, ms-swift's own default, because the block does not say");
        self.call.flags.push(super::block::Flag {
            name: "num_train_epochs".to_owned(),
            values: vec![Text { text: "3".to_owned(), ..Text::default() }],
        });
    }

    fn drop_evaluation_without_validation(&mut self) {
        if self.job.contains_key("validation") || self.call.values("split_dataset_ratio").is_some() {
            return;
        }
        let names = ["eval_steps", "per_device_eval_batch_size", "eval_strategy"];
        let dropped: Vec<&str> = names.into_iter().filter(|name| self.call.take(name).is_some()).collect();
        if !dropped.is_empty() {
            self.warn(format!("left out, because the block has no validation data: {}", dropped.join(", ")));
        }
    }

    /// Keeps what the text exports, but for what every job gets anyway.
    fn set_env(&mut self) {
        let mut kept = BTreeMap::new();
        for (name, value) in std::mem::take(&mut self.call.env) {
            if let Some(what) = &value.unresolved {
                self.warn(format!("{name} is left out: its value uses {what}"));
            } else if let Some((_, why)) = FORBIDDEN_ENV.iter().find(|(forbidden, _)| *forbidden == name) {
                if !(name == "CUDA_DEVICE_ORDER" && value.text == "PCI_BUS_ID") {
                    self.warn(format!("{name} is left out: {why}"));
                }
            } else if is_automatic(&name, &value.text) {
                self.warn(format!("{name} is left out: every job gets this value"));
            } else if name != "SWANLAB_PROJECT" || !self.reports_to_project(&value.text) {
                kept.insert(name, value.text);
            }
        }
        if !kept.is_empty() {
            self.job.insert("env".to_owned(), json!(kept));
        }
    }

    /// Returns whether SwanLab's project is that one already; then its variable follows from it.
    fn reports_to_project(&self, project: &str) -> bool {
        let set = self.job.get("report_to").and_then(|trackers| trackers.pointer("/swanlab/project"));
        set.and_then(Value::as_str) == Some(project)
    }

    /// Puts the keys in order, and what is left of the parameters into `args`.
    fn finish(mut self) -> Value {
        let flags = std::mem::take(&mut self.call.flags);
        let args: Map<String, Value> = flags
            .into_iter()
            .map(|flag| {
                let value = typed(&flag.name, &flag.values);
                (flag.name, value)
            })
            .collect();
        if !args.is_empty() {
            self.job.insert("args".to_owned(), Value::Object(args));
        }
        if !self.secrets.is_empty() {
            self.job.insert("secrets".to_owned(), json!(self.secrets));
        }
        let mut ordered = Map::new();
        for key in KEY_ORDER {
            if let Some(value) = self.job.remove(key) {
                ordered.insert(key.to_owned(), value);
            }
        }
        ordered.append(&mut self.job);
        Value::Object(ordered)
    }

    fn text(&self, name: &str) -> String {
        let first = self.call.values(name).and_then(<[Text]>::first);
        first.map(|value| value.text.trim().to_owned()).unwrap_or_default()
    }

    fn number(&self, name: &str) -> Option<f64> {
        self.text(name).parse().ok().filter(|number: &f64| number.is_finite())
    }
}

/// Returns the `<NAME>` in a text.
fn placeholder(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('<')?;
    let (name, _) = rest.split_once('>')?;
    Some(format!("<{}>", clipped(name)))
}

/// Returns whether a variable has the value that every job gets (recipe section 6, expandable segments).
fn is_automatic(name: &str, value: &str) -> bool {
    match name {
        "NO_PROXY" | "no_proxy" => {
            let own = merge_no_proxy(None);
            value
                .split(',')
                .all(|part| part.trim().is_empty() || own.split(',').any(|known| known == part.trim()))
        }
        "PYTORCH_CUDA_ALLOC_CONF" | "PYTORCH_ALLOC_CONF" => value == merge_expandable_segments(None),
        _ => false,
    }
}

/// Returns the values of a parameter as JSON: by its known type, else by how they look.
fn typed(name: &str, values: &[Text]) -> Value {
    let known = Parameters::of_4().get(name).or_else(|| Parameters::of_3().get(name));
    let kind = known.map(|parameter| &parameter.kind);
    let one = |value: &Text| match kind {
        Some(kind) => typed_scalar(kind, &value.text),
        None => guessed(&value.text),
    };
    match values {
        // A bare flag switches on.
        [] => Value::Bool(true),
        [value] => one(value),
        several => Value::Array(several.iter().map(one).collect()),
    }
}

fn typed_scalar(kind: &ParameterKind, text: &str) -> Value {
    let trimmed = text.trim();
    let value = match kind {
        ParameterKind::Bool => bool_word(trimmed).map(Value::Bool),
        ParameterKind::Int => trimmed.parse::<i64>().ok().map(Value::from),
        ParameterKind::Float => number_value(trimmed),
        ParameterKind::Choice(_) => trimmed.parse::<i64>().ok().map(Value::from),
        ParameterKind::Text => None,
    };
    value.unwrap_or_else(|| Value::String(text.to_owned()))
}

fn guessed(text: &str) -> Value {
    match text {
        "true" | "True" => Value::Bool(true),
        "false" | "False" => Value::Bool(false),
        _ => number_value(text).unwrap_or_else(|| Value::String(text.to_owned())),
    }
}

/// Returns a decimal number; words that Rust takes for numbers (`inf`, `nan`) are none.
fn number_value(text: &str) -> Option<Value> {
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.')) {
        return None;
    }
    if let Ok(whole) = text.parse::<i64>() {
        return Some(Value::from(whole));
    }
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite())?;
    serde_json::Number::from_f64(number).map(Value::Number)
}

fn bool_of(values: &[Text]) -> Option<bool> {
    match values {
        [] => Some(true),
        [value, ..] => bool_word(value.text.trim()),
    }
}

/// Source: the words of transformers' `string_to_bool`.
fn bool_word(word: &str) -> Option<bool> {
    match word.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "1" => Some(true),
        "false" | "f" | "no" | "n" | "0" => Some(false),
        _ => None,
    }
}
