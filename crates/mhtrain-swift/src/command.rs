//! How is ms-swift called for one rung of one job?
//!
//! [`user_command`] is what a person would type: the recipe's flags in the recipe's order, with its spelling of
//! numbers. [`exact_command`] is what an attempt really executes; it differs from the first by [`EXACT_FLAGS`]
//! and nothing else. Neither ever holds a secret: `swift sft` prints its whole argument list.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub use mhtrain_job::rerun::Adjustment;
use mhtrain_job::spec::{JobSpec, SpecError, Validation};
use mhtrain_sizing::ladder::RunAdvice;
use mhtrain_sizing::request::Pins;
use mhtrain_sizing::tier::{Adapters, Steps, Tier};
use mhtrain_sizing::workload::{Dtype, TrainType};
use serde_json::Value;

use crate::companion::Launch;
use crate::dialect::{Dialect, Line};

/// The trainer's command as a person types it.
pub const TRAINER_COMMAND: [&str; 2] = ["swift", "sft"];

/// What [`exact_command`] may set beyond [`user_command`]: the flag or variable, and why. The list is closed.
pub const EXACT_FLAGS: [(&str, &str); 12] = [
    ("--output_dir", "the attempt's own directory inside the job's output_dir"),
    ("--add_version", "false: ms-swift adds no directory of its own below it"),
    (
        "--check_model",
        "false, unless the job sets it: the check asks a hub and costs about 20 s without network",
    ),
    ("--external_plugins", "the companion, after the job's own plugins"),
    ("--resume_from_checkpoint", "from the second attempt on, where going on is sound"),
    (
        "--resume_only_model",
        "true after a divergence: the optimizer's moments are spoilt, the weights are not",
    ),
    ("--per_device_eval_batch_size", "smaller after an out-of-memory in evaluation, unless the job pins it"),
    (
        "--dataloader_num_workers, --dataloader_persistent_workers",
        "fewer after the host ran out of memory, unless the job pins it; without workers none persist",
    ),
    (
        "--learning_rate, --warmup_ratio, --max_grad_norm",
        "those of `learning.stable` in tiers.toml after a divergence (recipe 5.3), unless the job pins them",
    ),
    ("MASTER_PORT", "another port after the first was in use"),
    (
        "PYTORCH_CUDA_ALLOC_CONF, PYTORCH_ALLOC_CONF",
        "expandable segments on after memory was in pieces, where the surroundings (not the job) switch them off",
    ),
    (
        "MHTRAIND_COMPANION_TELEMETRY, MHTRAIND_COMPANION_STOP",
        "the companion's files: what it writes, and what asks it to stop",
    ),
];

/// Names that never go through a proxy (recipe section 6).
const NO_PROXY_NAMES: [&str; 3] = ["127.0.0.1", "localhost", "::1"];

/// The two names of the allocator's settings. Which of them torch prefers is not known, so both are set alike.
const ALLOCATOR_VARIABLES: [&str; 2] = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"];

/// LoRA's scale where the command says nothing: ms-swift takes it whatever the rank is.
const ALPHA_DEFAULT: u32 = 32;

/// What a command is made from.
#[derive(Clone, Debug)]
pub struct CommandRequest<'a> {
    /// The job.
    pub spec: &'a JobSpec,
    /// The rung.
    pub tier: &'a Tier,
    /// How the installed ms-swift spells things.
    pub dialect: &'a Dialect,
    /// NVML index of the card; `None` leaves `CUDA_VISIBLE_DEVICES` alone.
    pub device_index: Option<u32>,
    /// What the site's tiers.toml advises beside the rung.
    pub advice: &'a RunAdvice,
    /// What the trainer inherits. Only `NO_PROXY`, `no_proxy` and the allocator's settings are read, to be merged.
    pub inherited: &'a BTreeMap<String, String>,
}

/// One call of the trainer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invocation {
    /// Command and arguments, for example `swift`, `sft`, `--model`, ….
    pub argv: Vec<String>,
    /// Variables that are set on top of what is inherited.
    pub env: BTreeMap<String, String>,
    /// Names of the variables that must carry a secret; their values are nowhere in here.
    pub secrets: Vec<String>,
    /// A sentence for each thing that was added, translated or left out.
    pub notes: Vec<String>,
}

/// How the trainer is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrainerStart {
    /// The interpreter on ms-swift's own script: its true wait status, no echo of the arguments, one import of
    /// torch less than the wrapper.
    Script {
        /// The environment's interpreter.
        python: PathBuf,
        /// `swift/cli/sft.py` of that environment.
        script: PathBuf,
    },
    /// A command, for example `swift sft`.
    Command(Vec<String>),
}

/// What one attempt changes about the command.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttemptFlags {
    /// Directory of the attempt.
    pub output_dir: PathBuf,
    /// Checkpoint to go on from.
    pub resume_from: Option<PathBuf>,
    /// Whether only the weights of that checkpoint go on: optimizer and learning rate begin again.
    pub resume_only_model: bool,
    /// The companion, where it runs inside the trainer.
    pub companion: Option<Launch>,
    /// Whether the allocator may use expandable segments. A setting of the user's is never changed.
    pub expandable_segments: bool,
    /// Port of the process group; what [`Adjustment::NewPort`] asks the supervisor to choose.
    pub master_port: Option<u16>,
    /// Answers to how earlier attempts ended.
    pub adjustments: Vec<Adjustment>,
}

/// Why no command can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The installed ms-swift has no such parameter.
    #[error("{dialect} has no parameter `{name}`")]
    UnknownParameter {
        /// Its name.
        name: String,
        /// The installed version.
        dialect: String,
        /// The known name that is most like it.
        nearest: Option<&'static str>,
    },
    /// Only the other line of ms-swift has that parameter.
    #[error("{dialect} has no parameter `{name}`; only the {line} line has")]
    OtherLine {
        /// Its name.
        name: String,
        /// The installed version.
        dialect: String,
        /// The line that has it.
        line: Line,
    },
    /// Two names of one parameter.
    #[error("the job gives `{name}` twice")]
    Twice {
        /// This line's name.
        name: String,
    },
    /// A value that no command line can carry.
    #[error("`{name}` {problem}")]
    BadValue {
        /// The parameter or the key.
        name: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// A tracker's setting that cannot be handed on.
    #[error("the setting `{setting}` of the tracker `{tracker}` is not known")]
    TrackerSetting {
        /// The tracker.
        tracker: String,
        /// Its setting.
        setting: String,
    },
    /// A pin of the wrong type or outside of its range.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl CommandError {
    /// Returns what the author of the job can do.
    pub fn help(&self) -> Option<String> {
        match self {
            CommandError::UnknownParameter { nearest: Some(nearest), .. } => {
                Some(format!("did you mean `{nearest}`?"))
            }
            CommandError::UnknownParameter { name, nearest: None, .. } => {
                Some(format!("remove `args.{name}`, or install the ms-swift that has it"))
            }
            CommandError::OtherLine { name, line, .. } => {
                Some(format!("remove `args.{name}`, or run the job in an environment with ms-swift {line}"))
            }
            CommandError::Twice { name } => Some(format!("keep one spelling of `{name}`")),
            CommandError::TrackerSetting { tracker, setting } => Some(format!(
                "set it through `env` if {tracker} reads a variable for it, or remove `report_to.{tracker}.{setting}`"
            )),
            CommandError::BadValue { .. } => None,
            CommandError::Spec(error) => error.help(),
        }
    }
}

/// Returns the command that a person would type for this rung.
///
/// # Errors
/// An argument of the job that the installed ms-swift does not take, or a value that no command line can carry.
pub fn user_command(request: &CommandRequest<'_>) -> Result<Invocation, CommandError> {
    let mut command = Command::of(request)?;
    command.set_allocator(request, true, false);
    Ok(command.into_invocation(request, TRAINER_COMMAND.map(str::to_owned).to_vec()))
}

/// Returns what an attempt executes: [`user_command`] changed by [`EXACT_FLAGS`] and nothing else.
///
/// # Errors
/// As for [`user_command`].
pub fn exact_command(
    request: &CommandRequest<'_>,
    flags: &AttemptFlags,
    how: &TrainerStart,
) -> Result<Invocation, CommandError> {
    let mut command = Command::of(request)?;
    let asked = flags.adjustments.contains(&Adjustment::ExpandableSegments);
    command.set_allocator(request, flags.expandable_segments, asked);
    if let Some(port) = flags.master_port {
        command.env.insert("MASTER_PORT".to_owned(), port.to_string());
    }
    for adjustment in &flags.adjustments {
        command.adjust(request, *adjustment);
    }
    command.replace("output_dir", vec![path_text(&flags.output_dir)]);
    command.replace("add_version", vec!["false".to_owned()]);
    if !command.has("check_model") {
        command.push("check_model", vec!["false".to_owned()]);
    }
    if let Some(companion) = &flags.companion {
        command.add_plugin(&companion.file);
        command.env.extend(companion.environment());
    }
    if let Some(checkpoint) = &flags.resume_from {
        command.replace("resume_from_checkpoint", vec![path_text(checkpoint)]);
        if flags.resume_only_model {
            command.replace("resume_only_model", vec!["true".to_owned()]);
        }
    }
    let start = match how {
        TrainerStart::Script { python, script } => vec![path_text(python), path_text(script)],
        TrainerStart::Command(command) => command.clone(),
    };
    Ok(command.into_invocation(request, start))
}

/// Returns `existing` with the loopback names that are not in it, for `NO_PROXY` and `no_proxy`.
pub fn merge_no_proxy(existing: Option<&str>) -> String {
    let mut names: Vec<&str> =
        existing.unwrap_or_default().split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    for name in NO_PROXY_NAMES {
        if !names.contains(&name) && !names.contains(&"*") {
            names.push(name);
        }
    }
    names.join(",")
}

/// Returns the allocator's settings with expandable segments on; `existing` unchanged where it names them already.
pub fn merge_expandable_segments(existing: Option<&str>) -> String {
    match existing.map(str::trim).filter(|text| !text.is_empty()) {
        None => "expandable_segments:True".to_owned(),
        Some(text) if text.contains("expandable_segments") => text.to_owned(),
        Some(text) => format!("{text},expandable_segments:True"),
    }
}

/// Returns the allocator's settings with expandable segments on, whatever they said about them.
fn with_expandable_segments(settings: &str) -> String {
    let others = settings.split(',').filter(|setting| !setting.contains("expandable_segments"));
    others.chain(["expandable_segments:True"]).collect::<Vec<_>>().join(",")
}

/// Returns a number as a person writes it: `2e-4`, `0.1`, `1`; whichever of the two spellings is shorter.
pub fn number_text(number: f64) -> String {
    let plain = number.to_string();
    let scientific = format!("{number:e}");
    if scientific.len() < plain.len() && (number.fract() != 0.0 || plain.len() > 15) {
        scientific
    } else {
        plain
    }
}

/// Returns the call as a shell block that can be pasted: a check for each secret, variables, command, one flag a line.
pub fn shell_block(invocation: &Invocation) -> String {
    let mut block = String::new();
    for name in &invocation.secrets {
        block.push_str(&format!(": \"${{{name}:?set it first; it is a secret}}\"\n"));
    }
    let mut lines: Vec<String> =
        invocation.env.iter().map(|(name, value)| format!("{name}={}", shell_words::quote(value))).collect();
    let is_flag = |word: &String| word.starts_with("--");
    let start = invocation.argv.iter().position(is_flag).unwrap_or(invocation.argv.len());
    lines.push(quoted(&invocation.argv[..start]));
    let mut rest = &invocation.argv[start..];
    while !rest.is_empty() {
        let end = rest.iter().skip(1).position(is_flag).map_or(rest.len(), |next| next + 1);
        lines.push(format!("  {}", quoted(&rest[..end])));
        rest = &rest[end..];
    }
    block + &lines.join(" \\\n") + "\n"
}

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| shell_words::quote(word)).collect::<Vec<_>>().join(" ")
}

/// A command that is being built: every parameter once, in order.
#[derive(Debug, Default)]
struct Command {
    parameters: Vec<(String, Vec<String>)>,
    env: BTreeMap<String, String>,
    notes: Vec<String>,
}

impl Command {
    /// Builds everything but the allocator's settings.
    fn of(request: &CommandRequest<'_>) -> Result<Command, CommandError> {
        let mut command = Command { env: request.spec.env.clone(), ..Command::default() };
        let pins = request.spec.pins()?;
        let mut arguments = arguments(request.spec, request.dialect, &mut command.notes)?;
        command.push_recipe_flags(request, &mut arguments)?;
        if !pins.leave_nothing_to_size() {
            command.push_additions(request, &pins, &arguments);
        }
        for (name, words) in arguments {
            if command.has(&name) {
                return Err(CommandError::Twice { name });
            }
            command.push(&name, words);
        }
        command.set_environment(request);
        Ok(command)
    }

    fn has(&self, name: &str) -> bool {
        self.parameters.iter().any(|(known, _)| known == name)
    }

    fn push(&mut self, name: &str, words: Vec<String>) {
        self.parameters.push((name.to_owned(), words));
    }

    fn replace(&mut self, name: &str, words: Vec<String>) {
        match self.parameters.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = words,
            None => self.push(name, words),
        }
    }

    /// Adds the flags of the recipe's blocks in their order. A pinned one is spelled as the job spells it.
    fn push_recipe_flags(
        &mut self,
        request: &CommandRequest<'_>,
        arguments: &mut BTreeMap<String, Vec<String>>,
    ) -> Result<(), CommandError> {
        let (spec, tier) = (request.spec, request.tier);
        self.push("model", vec![checked("model", &spec.model)?]);
        self.push_method(request, arguments);
        self.push("dataset", all_checked("dataset", &spec.dataset)?);
        let has_warmup_steps = arguments.contains_key("warmup_steps");
        for (name, value) in rung_flags(tier) {
            if name == "attn_impl" {
                self.push("output_dir", vec![checked("output_dir", &spec.output_dir)?]);
                self.push_trackers(request)?;
            }
            match arguments.remove(name) {
                Some(words) => self.push(name, words),
                None if name == "warmup_ratio" && has_warmup_steps => self.notes.push(
                    "`warmup_ratio` is left out, because the job sets `warmup_steps` and ms-swift refuses both".into(),
                ),
                None => self.push(name, vec![value]),
            }
        }
        self.push_optional_rung_flags(tier, arguments);
        self.push_validation(spec)
    }

    /// Adds what is trained. ms-swift knows no `qlora`: it is lora over weights that bitsandbytes quantises.
    fn push_method(&mut self, request: &CommandRequest<'_>, arguments: &mut BTreeMap<String, Vec<String>>) {
        let flag = request.dialect.tuner_flag();
        if flag != "train_type" {
            self.notes
                .push(format!("`train_type` is called `{flag}` in ms-swift {}", request.dialect.line()));
        }
        if request.spec.train_type != TrainType::Qlora && request.tier.quant_bits.is_none() {
            self.push(flag, vec![request.spec.train_type.to_string()]);
            return;
        }
        self.push(flag, vec!["lora".to_owned()]);
        let mut quantisation = vec![("quant_method", "bnb"), ("quant_bits", "4")];
        // For fp16 and fp32 ms-swift's own default is kept: it computes in fp32 then.
        if request.tier.torch_dtype == Dtype::Bfloat16 {
            quantisation.push(("bnb_4bit_compute_dtype", "bfloat16"));
        }
        for (name, value) in quantisation {
            let words = arguments.remove(name).unwrap_or_else(|| vec![value.to_owned()]);
            self.push(name, words);
        }
        self.notes.push(
            "ms-swift has no train type `qlora`; it is lora with `quant_method bnb` and `quant_bits 4`"
                .to_owned(),
        );
    }

    /// Adds what a rung may hold beyond the recipe's blocks.
    fn push_optional_rung_flags(&mut self, tier: &Tier, arguments: &mut BTreeMap<String, Vec<String>>) {
        let optional = [
            (
                "router_aux_loss_coef",
                tier.router_aux_loss_coef.map(number_text),
                "keeps the experts of this mixture-of-experts model in balance (recipe 8.2)",
            ),
            ("max_grad_norm", tier.max_grad_norm.map(number_text), "clips gradients (recipe 5.3)"),
            (
                "use_liger_kernel",
                tier.liger_kernel.then(|| "true".to_owned()),
                "saves the memory of the logits, as `allow.liger` permits",
            ),
        ];
        for (name, value, why) in optional {
            match (arguments.remove(name), value) {
                (Some(words), _) => self.push(name, words),
                (None, Some(value)) => {
                    self.notes.push(format!("`{name} {value}` was added: it {why}"));
                    self.push(name, vec![value]);
                }
                (None, None) => {}
            }
        }
    }

    /// Adds the trackers, and SwanLab's settings as the recipe spells them.
    ///
    /// Without a tracker `none` is passed, because ms-swift's own default is tensorboard.
    fn push_trackers(&mut self, request: &CommandRequest<'_>) -> Result<(), CommandError> {
        let trackers = &request.spec.report_to;
        if trackers.is_empty() {
            self.notes.push("`report_to none` was added: ms-swift's own default is tensorboard".to_owned());
            self.push("report_to", vec!["none".to_owned()]);
            return Ok(());
        }
        self.push("report_to", trackers.keys().cloned().collect());
        for (tracker, settings) in trackers {
            match tracker.as_str() {
                "swanlab" => self.push_swanlab(request.dialect, settings)?,
                "wandb" | "mlflow" => self.set_tracker_variables(tracker, settings)?,
                _ => {
                    if let Some(setting) = settings.keys().next().cloned() {
                        return Err(CommandError::TrackerSetting { tracker: tracker.clone(), setting });
                    }
                }
            }
        }
        Ok(())
    }

    fn push_swanlab(
        &mut self,
        dialect: &Dialect,
        settings: &BTreeMap<String, Value>,
    ) -> Result<(), CommandError> {
        const RECIPE_ORDER: [&str; 3] = ["project", "mode", "exp_name"];
        let others = settings.keys().map(String::as_str).filter(|key| !RECIPE_ORDER.contains(key));
        for setting in RECIPE_ORDER.into_iter().chain(others) {
            let Some(value) = settings.get(setting) else { continue };
            let name = format!("swanlab_{setting}");
            if dialect.parameters().get(&name).is_none() {
                let tracker = "swanlab".to_owned();
                return Err(CommandError::TrackerSetting { tracker, setting: setting.to_owned() });
            }
            let words = words_of(&name, value, false)?;
            if setting == "mode" && !words.iter().all(|word| dialect.swanlab_modes().contains(&word.as_str()))
            {
                let problem = format!("takes {} only", dialect.swanlab_modes().join(" or "));
                return Err(CommandError::BadValue { name: "report_to.swanlab.mode".to_owned(), problem });
            }
            if setting == "project" {
                self.env.entry("SWANLAB_PROJECT".to_owned()).or_insert_with(|| words.concat());
            }
            self.push(&name, words);
        }
        Ok(())
    }

    /// Hands settings on by the variables that the tracker reads, `WANDB_PROJECT` for example.
    fn set_tracker_variables(
        &mut self,
        tracker: &str,
        settings: &BTreeMap<String, Value>,
    ) -> Result<(), CommandError> {
        for (setting, value) in settings {
            let variable = format!("{tracker}_{setting}").to_uppercase();
            let text = scalar_text(&format!("report_to.{tracker}.{setting}"), value)?;
            self.notes.push(format!("`report_to.{tracker}.{setting}` is handed on as {variable}"));
            self.env.entry(variable).or_insert(text);
        }
        Ok(())
    }

    fn push_validation(&mut self, spec: &JobSpec) -> Result<(), CommandError> {
        match &spec.validation {
            None => {}
            Some(Validation::Share(share)) => self.push("split_dataset_ratio", vec![number_text(*share)]),
            Some(Validation::Datasets(datasets)) => {
                self.push("val_dataset", all_checked("validation", datasets)?);
            }
        }
        Ok(())
    }

    /// Adds what the recipe advises beside its blocks (8.1, 8.2, 8.4). A job that pins everything gets none of it.
    fn push_additions(
        &mut self,
        request: &CommandRequest<'_>,
        pins: &Pins,
        arguments: &BTreeMap<String, Vec<String>>,
    ) {
        debug_assert!(!pins.leave_nothing_to_size());
        let advice = request.advice;
        if request.spec.validation.is_some() {
            let why = format!("for a model of class `{}` (recipe 8.4)", advice.class);
            self.add("eval_steps", advice.eval_steps, &why, arguments);
            let rows = advice.per_device_eval_batch_size;
            self.add("per_device_eval_batch_size", rows, "recipe 8.2", arguments);
        }
        if request.spec.train_type != TrainType::Full {
            let rung = request.tier.adapters.clone().unwrap_or_default();
            let adapters = Adapters { lora_rank: pins.lora_rank.unwrap_or(rung.lora_rank), ..rung };
            self.push_adapters(&adapters, advice, arguments);
        }
        let why = format!("for {} cores (recipe 8.4)", advice.cores);
        self.add("dataloader_num_workers", advice.dataloader_num_workers, &why, arguments);
    }

    /// Adds what the rung's adapters have beyond ms-swift's own defaults, and the scale that goes with a rank.
    fn push_adapters(
        &mut self,
        adapters: &Adapters,
        advice: &RunAdvice,
        arguments: &BTreeMap<String, Vec<String>>,
    ) {
        let (rank, own) = (adapters.lora_rank, Adapters::default());
        if rank != own.lora_rank {
            self.add("lora_rank", rank, "tiers.toml", arguments);
        }
        let alpha = advice.lora.alpha_for(rank);
        if arguments.contains_key("lora_rank") || alpha != ALPHA_DEFAULT {
            let why = format!("{}/{} x the rank (recipe 8.1)", advice.lora.alpha, advice.lora.rank);
            self.add("lora_alpha", alpha, &why, arguments);
        }
        if adapters.target_modules != own.target_modules && !arguments.contains_key("target_modules") {
            let targets = adapters.target_modules.to_string();
            self.notes.push(format!("`target_modules {targets}` was added: the rung's adapters"));
            self.push("target_modules", targets.split(',').map(str::to_owned).collect());
        }
    }

    fn add(&mut self, name: &str, value: u32, why: &str, arguments: &BTreeMap<String, Vec<String>>) {
        if !arguments.contains_key(name) {
            self.notes.push(format!("`{name} {value}` was added: {why}"));
            self.push(name, vec![value.to_string()]);
        }
    }

    /// Sets the card, and keeps loopback names away from proxies (recipe section 6).
    fn set_environment(&mut self, request: &CommandRequest<'_>) {
        if let Some(index) = request.device_index {
            // Only with this order is CUDA's index the one that NVML uses.
            self.env.insert("CUDA_DEVICE_ORDER".to_owned(), "PCI_BUS_ID".to_owned());
            self.env.insert("CUDA_VISIBLE_DEVICES".to_owned(), index.to_string());
        }
        let names = ["NO_PROXY", "no_proxy"];
        // Programs read one or the other, so a user's value under one name holds under both.
        let merged = names.map(|name| {
            let twin = names.into_iter().find(|other| *other != name);
            merge_no_proxy(
                request.set_by_user(name).or_else(|| twin.and_then(|twin| request.set_by_user(twin))),
            )
        });
        for (name, value) in names.into_iter().zip(merged) {
            self.env.insert(name.to_owned(), value);
        }
    }

    /// Switches expandable segments on under both names, or leaves the user's settings as they are. After memory was
    /// in pieces (`needed`) a setting that only the surroundings have is no obstacle; one of the job is.
    fn set_allocator(&mut self, request: &CommandRequest<'_>, expandable_segments: bool, needed: bool) {
        let says = |text: &str| text.contains("expandable_segments");
        let pinned =
            ALLOCATOR_VARIABLES.iter().any(|name| request.spec.env.get(*name).is_some_and(|text| says(text)));
        let users = ALLOCATOR_VARIABLES.map(|name| request.set_by_user(name));
        let decided = users.iter().flatten().any(|text| says(text));
        let either = users.into_iter().flatten().next();
        for (name, own) in ALLOCATOR_VARIABLES.into_iter().zip(users) {
            if decided {
                // One name may be set only: both must say the same, whichever torch reads.
                let text = own.filter(|text| says(text));
                let other = users.iter().flatten().find(|text| says(text));
                if let Some(text) = text.or(other.copied()) {
                    let switched =
                        if needed && !pinned { with_expandable_segments(text) } else { text.to_owned() };
                    self.env.insert(name.to_owned(), switched);
                }
            } else if expandable_segments || needed {
                self.env.insert(name.to_owned(), merge_expandable_segments(own.or(either)));
            }
        }
    }

    /// Changes what an earlier attempt's end asks for. What the job pins stays.
    fn adjust(&mut self, request: &CommandRequest<'_>, adjustment: Adjustment) {
        let spec = request.spec;
        match adjustment {
            Adjustment::EvalBatch(rows) => {
                self.adjust_one(spec, "per_device_eval_batch_size", rows.to_string());
            }
            Adjustment::DataloaderWorkers(workers) => {
                self.adjust_one(spec, "dataloader_num_workers", workers.to_string());
                if workers == 0 && !spec.args.contains_key("dataloader_num_workers") {
                    self.drop_worker_flags();
                }
            }
            // Both are the supervisor's to carry out: `expandable_segments` and `master_port` of the flags.
            Adjustment::ExpandableSegments | Adjustment::NewPort => {}
            Adjustment::RecipeStable => {
                let stable = &request.advice.stable;
                let values = [
                    ("learning_rate", stable.learning_rate),
                    ("warmup_ratio", stable.warmup_ratio),
                    ("max_grad_norm", stable.max_grad_norm),
                ];
                for (name, value) in values {
                    if let Some(value) = value {
                        self.adjust_one(spec, name, number_text(value));
                    }
                }
            }
        }
    }

    fn adjust_one(&mut self, spec: &JobSpec, name: &str, value: String) {
        if spec.args.contains_key(name) {
            self.notes.push(format!("`{name}` stays as the job pins it, not {value}"));
        } else {
            self.notes.push(format!("`{name}` is {value} in this attempt"));
            self.replace(name, vec![value]);
        }
    }

    /// Leaves out what torch's DataLoader refuses without workers.
    fn drop_worker_flags(&mut self) {
        self.parameters.retain(|(name, _)| {
            name != "dataloader_prefetch_factor" && name != "dataloader_persistent_workers"
        });
        self.push("dataloader_persistent_workers", vec!["false".to_owned()]);
    }

    /// Adds a plugin after the job's own. `custom_register_path` is another list on both lines and stays as it is.
    fn add_plugin(&mut self, plugin: &Path) {
        let mine = self.parameters.iter().find(|(name, _)| name == "external_plugins");
        let mut words = mine.map(|(_, words)| words.clone()).unwrap_or_default();
        words.push(path_text(plugin));
        self.replace("external_plugins", words);
    }

    fn into_invocation(self, request: &CommandRequest<'_>, start: Vec<String>) -> Invocation {
        let mut argv = start;
        for (name, words) in self.parameters {
            match words.as_slice() {
                // argparse takes `--name=-x` where it would read `-x` alone as an option.
                [word] if is_option_like(word) => argv.push(format!("--{name}={word}")),
                _ => {
                    argv.push(format!("--{name}"));
                    argv.extend(words);
                }
            }
        }
        Invocation { argv, env: self.env, secrets: request.spec.secrets.clone(), notes: self.notes }
    }
}

impl CommandRequest<'_> {
    /// Returns the user's value of a variable: the job's, else the inherited one.
    fn set_by_user(&self, name: &str) -> Option<&str> {
        self.spec.env.get(name).or_else(|| self.inherited.get(name)).map(String::as_str)
    }
}

/// Looks whether the installed ms-swift takes the `args` of a job, before anything else is known of it.
///
/// # Errors
/// It has no such parameter, or a value that no command line can carry.
pub fn check_arguments(spec: &JobSpec, dialect: &Dialect) -> Result<(), CommandError> {
    arguments(spec, dialect, &mut Vec::new()).map(drop)
}

/// Returns the job's `args` under this line's names, as words of a command line.
fn arguments(
    spec: &JobSpec,
    dialect: &Dialect,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<String, Vec<String>>, CommandError> {
    let mut arguments = BTreeMap::new();
    for (written, value) in &spec.args {
        let name = name_in_this_line(spec, dialect, written, notes)?;
        let many = dialect.parameters().get(&name).is_none_or(|parameter| parameter.many);
        let words = words_of(&name, value, many)?;
        if arguments.insert(name.clone(), words).is_some() {
            return Err(CommandError::Twice { name });
        }
    }
    Ok(arguments)
}

/// Returns the name that the installed ms-swift has for a parameter.
///
/// A name that is in no list is refused where the list is that of the very version that is installed, and
/// where it looks like a misspelling. On other versions it passes with a note: they may have it.
fn name_in_this_line(
    spec: &JobSpec,
    dialect: &Dialect,
    name: &str,
    notes: &mut Vec<String>,
) -> Result<String, CommandError> {
    let parameters = dialect.parameters();
    if parameters.get(name).is_some() {
        return Ok(name.to_owned());
    }
    if let Some(here) = dialect.renamed(name) {
        notes.push(format!("`{name}` is called `{here}` in ms-swift {}", dialect.line()));
        return Ok(here.to_owned());
    }
    let tolerates = spec.args.get("ignore_args_error").is_some_and(|value| *value == Value::Bool(true));
    let in_other_line = dialect.other_parameters().get(name).is_some();
    let nearest = parameters.nearest(name);
    let is_certain = dialect.is_listed_version() || (nearest.is_some() && !in_other_line);
    if tolerates || !is_certain {
        notes.push(format!("`{name}` is not among the known parameters of {}", dialect));
        return Ok(name.to_owned());
    }
    let (name, line, dialect) = (name.to_owned(), dialect.line(), dialect.to_string());
    Err(match (in_other_line, line) {
        (true, Line::V3) => CommandError::OtherLine { name, dialect, line: Line::V4 },
        (true, Line::V4) => CommandError::OtherLine { name, dialect, line: Line::V3 },
        (false, Line::V3 | Line::V4) => CommandError::UnknownParameter { name, dialect, nearest },
    })
}

/// Returns the rung's values under the parameters' names, in the recipe's order.
///
/// The accumulation is always among them: ms-swift's own default depends on the batch and not on what was planned.
fn rung_flags(tier: &Tier) -> [(&'static str, String); 13] {
    [
        ("torch_dtype", tier.torch_dtype.to_string()),
        ("max_length", tier.max_length.to_string()),
        ("packing", tier.packing.to_string()),
        ("gradient_checkpointing", tier.gradient_checkpointing.to_string()),
        ("per_device_train_batch_size", tier.micro_batch.to_string()),
        ("gradient_accumulation_steps", tier.accumulation.to_string()),
        ("learning_rate", number_text(tier.learning_rate)),
        ("num_train_epochs", number_text(tier.num_train_epochs)),
        ("warmup_ratio", number_text(tier.warmup_ratio)),
        ("save_steps", steps_text(tier.save_steps)),
        ("save_total_limit", tier.save_total_limit.to_string()),
        ("logging_steps", steps_text(tier.logging_steps)),
        ("attn_impl", tier.attn_impl.to_string()),
    ]
}

fn steps_text(steps: Steps) -> String {
    match steps {
        Steps::Count(count) => count.to_string(),
        Steps::Share(share) => number_text(share),
    }
}

/// Returns a value of `args` as words of a command line.
fn words_of(name: &str, value: &Value, many: bool) -> Result<Vec<String>, CommandError> {
    let bad = |problem: &str| CommandError::BadValue { name: name.to_owned(), problem: problem.to_owned() };
    let Value::Array(items) = value else { return Ok(vec![scalar_text(name, value)?]) };
    if items.is_empty() {
        return Err(bad("is an empty list; leave it out instead"));
    }
    if items.len() > 1 && !many {
        return Err(bad("takes one value, not a list"));
    }
    let words = items.iter().map(|item| scalar_text(name, item)).collect::<Result<Vec<_>, _>>()?;
    if words.len() > 1 && words.iter().any(|word| is_option_like(word)) {
        return Err(bad("has a value that begins with a dash; the trainer would read it as a flag"));
    }
    Ok(words)
}

fn scalar_text(name: &str, value: &Value) -> Result<String, CommandError> {
    let bad = |problem: &str| CommandError::BadValue { name: name.to_owned(), problem: problem.to_owned() };
    match value {
        Value::String(text) if text.contains('\0') => Err(bad("holds a NUL character")),
        Value::String(text) => Ok(text.clone()),
        Value::Bool(flag) => Ok(flag.to_string()),
        Value::Number(number) if number.is_f64() => {
            Ok(number.as_f64().map_or_else(|| number.to_string(), number_text))
        }
        Value::Number(number) => Ok(number.to_string()),
        // ms-swift reads JSON where a parameter is a mapping (`model_kwargs`).
        Value::Object(_) => Ok(value.to_string()),
        Value::Null => Err(bad("is null; leave it out instead")),
        Value::Array(_) => Err(bad("is a list inside a list")),
    }
}

/// Returns a text that must not be taken for a flag.
fn checked(key: &str, text: &str) -> Result<String, CommandError> {
    if is_option_like(text) || text.contains('\0') {
        let problem = "begins with a dash or holds a NUL character; the trainer would not read it as a name";
        return Err(CommandError::BadValue { name: key.to_owned(), problem: problem.to_owned() });
    }
    Ok(text.to_owned())
}

fn all_checked(key: &str, texts: &[String]) -> Result<Vec<String>, CommandError> {
    texts.iter().map(|text| checked(key, text)).collect()
}

/// Returns whether argparse would read a word as an option. Negative numbers it takes as values.
fn is_option_like(word: &str) -> bool {
    word.len() > 1 && word.starts_with('-') && word.parse::<f64>().is_err()
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Returns the names of all parameters that a command sets, without dashes. For comparisons in tests and receipts.
pub fn parameter_names(argv: &[String]) -> BTreeSet<&str> {
    let flags = argv.iter().filter_map(|word| word.strip_prefix("--"));
    flags.map(|flag| flag.split_once('=').map_or(flag, |(name, _)| name)).collect()
}

#[cfg(test)]
mod tests;
