//! Which rungs are there, and what values do they carry?
//!
//! All numbers are data in `config/tiers.toml`. This module reads them, checks them, and puts the values of one rung
//! together: profile, then class, then what the job asks for by name, then what it pins.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::model::Model;
use crate::request::{Learning, Save};
use crate::tier::Steps;
use crate::workload::{AttnImpl, Targets};

/// Classes, profiles, advice and ladder, read from `config/tiers.toml`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierBook {
    /// Classes by size, the first match counts.
    #[serde(rename = "class")]
    pub classes: Vec<Class>,
    /// Profiles.
    #[serde(rename = "profile")]
    pub profiles: Profiles,
    /// Advice on learning.
    pub learning: LearningAdvice,
    /// Advice on checkpoints.
    pub save: SaveAdvice,
    /// Adapters of a job that says nothing about them.
    pub lora: LoraAdvice,
    /// Values for mixtures of experts.
    pub mixture: MixtureAdvice,
    /// Data loader workers.
    pub workers: Workers,
    /// Evaluation.
    pub eval: EvalAdvice,
    /// How micro-batches are chosen.
    pub ladder: LadderRules,
}

/// Models of one size.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name, in notes and in `models.toml`.
    pub name: String,
    /// Mixtures of experts only.
    #[serde(default)]
    pub mixture: bool,
    /// Fewest parameters.
    #[serde(default)]
    pub from: f64,
    /// Parameters are fewer than this; without it there is no limit.
    pub below: Option<f64>,
    /// E: rows of an optimizer step.
    pub effective_batch: u32,
    /// The presumed micro-batch.
    pub micro_batch: u32,
    /// Micro-batches to try, largest first.
    pub micro_batches: Vec<u32>,
    /// Steps between evaluations.
    pub eval_steps: u32,
    /// Length of rows, where it is not the standard profile's.
    pub max_length: Option<u32>,
    /// Values that replace those of the standard and shorter profile.
    #[serde(flatten)]
    pub values: Values,
    /// A sentence for every plan of this class.
    pub note: Option<String>,
}

/// Values of training that more than one source may state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Values {
    /// Peak learning rate.
    pub learning_rate: Option<f64>,
    /// Share of the steps over which the learning rate rises.
    pub warmup_ratio: Option<f64>,
    /// Gradient clipping.
    pub max_grad_norm: Option<f64>,
    /// Steps between checkpoints.
    pub save_steps: Option<Steps>,
    /// Checkpoints that are kept.
    pub save_total_limit: Option<u32>,
    /// Steps between log lines.
    pub logging_steps: Option<Steps>,
}

impl Values {
    /// Returns these values with the gaps filled from `other`.
    pub fn or(&self, other: &Values) -> Values {
        Values {
            learning_rate: self.learning_rate.or(other.learning_rate),
            warmup_ratio: self.warmup_ratio.or(other.warmup_ratio),
            max_grad_norm: self.max_grad_norm.or(other.max_grad_norm),
            save_steps: self.save_steps.or(other.save_steps),
            save_total_limit: self.save_total_limit.or(other.save_total_limit),
            logging_steps: self.logging_steps.or(other.logging_steps),
        }
    }
}

/// The profiles.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profiles {
    /// The recipe's standard.
    pub standard: Standard,
    /// The same on longer rows.
    pub long: Long,
    /// The same on shorter rows.
    pub shorter: Shorter,
    /// The shorter profile with fewer adapters.
    pub fewer_targets: FewerTargets,
    /// The last resort.
    pub emergency: Emergency,
}

/// The recipe's standard profile.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standard {
    /// Longest row in tokens.
    pub max_length: u32,
    /// Whether rows are packed.
    pub packing: bool,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps over which the learning rate rises.
    pub warmup_ratio: f64,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// Steps between checkpoints.
    pub save_steps: Steps,
    /// Checkpoints that are kept.
    pub save_total_limit: u32,
    /// Steps between log lines.
    pub logging_steps: Steps,
    /// Whether activations are computed again in the backward pass.
    pub gradient_checkpointing: bool,
}

impl Standard {
    fn values(&self) -> Values {
        Values {
            learning_rate: Some(self.learning_rate),
            warmup_ratio: Some(self.warmup_ratio),
            max_grad_norm: None,
            save_steps: Some(self.save_steps),
            save_total_limit: Some(self.save_total_limit),
            logging_steps: Some(self.logging_steps),
        }
    }
}

/// The standard profile on longer rows.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Long {
    /// Longest row in tokens.
    pub max_length: u32,
}

/// The standard profile on shorter rows.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shorter {
    /// Longest row in tokens.
    pub max_length: u32,
    /// Largest micro-batch that is tried.
    pub micro_batch_max: u32,
}

/// The shorter profile with adapters on a few layers only.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FewerTargets {
    /// Adapted layers.
    pub target_modules: Targets,
}

/// The last resort.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Emergency {
    /// Longest row in tokens.
    pub max_length: u32,
    /// Whether rows are packed.
    pub packing: bool,
    /// Attention implementation.
    pub attn_impl: AttnImpl,
    /// Rows of one pass.
    pub micro_batch: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps over which the learning rate rises.
    pub warmup_ratio: f64,
    /// Steps between checkpoints.
    pub save_steps: Steps,
    /// Checkpoints that are kept.
    pub save_total_limit: u32,
    /// Steps between log lines.
    pub logging_steps: Steps,
}

impl Emergency {
    fn values(&self) -> Values {
        Values {
            learning_rate: Some(self.learning_rate),
            warmup_ratio: Some(self.warmup_ratio),
            max_grad_norm: None,
            save_steps: Some(self.save_steps),
            save_total_limit: Some(self.save_total_limit),
            logging_steps: Some(self.logging_steps),
        }
    }
}

/// Advice on learning.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningAdvice {
    /// Quick convergence.
    pub fast: Advice,
    /// Against divergence.
    pub stable: Advice,
}

/// Advice on checkpoints.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveAdvice {
    /// Many checkpoints.
    pub fast_iteration: Advice,
    /// Few checkpoints.
    pub long_run: Advice,
}

/// Values that a job asks for by name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Advice {
    /// The values.
    #[serde(flatten)]
    pub values: Values,
    /// A sentence for the plan.
    pub note: Option<String>,
}

/// Adapters of a job that says nothing about them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraAdvice {
    /// Rank.
    pub rank: u32,
    /// Scale.
    pub alpha: u32,
    /// Adapted layers.
    pub target_modules: Targets,
}

impl LoraAdvice {
    /// Returns the scale for adapters of `rank`: as many times the rank as the book's own pair has.
    pub fn alpha_for(&self, rank: u32) -> u32 {
        let alpha = u64::from(self.alpha) * u64::from(rank) / u64::from(self.rank.max(1));
        u32::try_from(alpha).unwrap_or(u32::MAX)
    }
}

/// What the book advises for the command of one job beside its rungs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunAdvice {
    /// Adapters of a job that says nothing about them.
    pub lora: LoraAdvice,
    /// Class of the model.
    pub class: String,
    /// Steps between evaluations.
    pub eval_steps: u32,
    /// Rows of one evaluation pass.
    pub per_device_eval_batch_size: u32,
    /// Data loader workers.
    pub dataloader_num_workers: u32,
    /// Cores that the workers were counted for.
    pub cores: u32,
    /// Against divergence.
    pub stable: Values,
}

/// Values for mixtures of experts.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureAdvice {
    /// Weight of the router's auxiliary loss.
    pub router_aux_loss_coef: f64,
}

/// Data loader workers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workers {
    /// Cores that one worker is given.
    pub cores_per_worker: u32,
    /// Fewest workers.
    pub min: u32,
    /// Most workers.
    pub max: u32,
}

/// Evaluation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalAdvice {
    /// Rows of one evaluation pass.
    pub per_device_eval_batch_size: u32,
}

/// How micro-batches above the class's own are chosen.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LadderRules {
    /// Least gain in throughput over the next smaller micro-batch.
    pub throughput_gain_min: f64,
    /// Tokens of a pass at which half the full speed is reached.
    pub saturation_tokens: f64,
    /// Share of the accepted risk that a larger micro-batch, or a pass without checkpointing, may take.
    pub larger_risk_share: f64,
    /// How many times the accepted risk a rung may take on a machine that has run this model before.
    #[serde(default = "known_risk_share")]
    pub known_risk_share: f64,
}

/// Returns the shipped value, for a site's file that was written before there was one.
fn known_risk_share() -> f64 {
    2.0
}

/// Why a tier book cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TierBookError {
    /// The file is not what it should be.
    #[error("cannot read tiers.toml: {0}")]
    Toml(#[from] toml::de::Error),
    /// A value cannot be.
    #[error("tiers.toml: {what} is {found}, and has to be {expected}")]
    Unusable {
        /// Where it stands.
        what: String,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl TierBookError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            TierBookError::Toml(_) => {
                Some("compare it with the tiers.toml that comes with the program".to_owned())
            }
            TierBookError::Unusable { what, expected, .. } => Some(format!("set {what} to {expected}")),
        }
    }
}

/// Keys that [`Class`] and [`Advice`] take over from [`Values`]; serde cannot refuse unknown keys beside `flatten`.
const VALUE_KEYS: [&str; 6] =
    ["learning_rate", "warmup_ratio", "max_grad_norm", "save_steps", "save_total_limit", "logging_steps"];
const CLASS_KEYS: [&str; 10] = [
    "name",
    "mixture",
    "from",
    "below",
    "effective_batch",
    "micro_batch",
    "micro_batches",
    "eval_steps",
    "max_length",
    "note",
];

impl TierBook {
    /// Reads and checks a tier book.
    ///
    /// # Errors
    /// Unknown keys, wrong types, and values that cannot be.
    pub fn from_toml(text: &str) -> Result<TierBook, TierBookError> {
        let table: toml::Table = toml::from_str(text)?;
        refuse_unknown_values(&table)?;
        let book: TierBook = toml::from_str(text)?;
        book.check()?;
        Ok(book)
    }

    /// Returns the book that comes with the program.
    pub fn builtin() -> TierBook {
        static BUILTIN: OnceLock<TierBook> = OnceLock::new();
        BUILTIN
            .get_or_init(|| {
                TierBook::from_toml(include_str!("../../../config/tiers.toml"))
                    .expect("the embedded tiers.toml is read by a test")
            })
            .clone()
    }

    /// Returns the class of a model: the one that the catalogue names, else the first that its size is in.
    pub fn class_of(&self, model: &Model) -> &Class {
        let named =
            model.class.as_ref().and_then(|name| self.classes.iter().find(|class| &class.name == name));
        let parameters = crate::block::float(model.parameters());
        let mixture = model.shape.experts.is_some();
        let fits = |class: &&Class| {
            (mixture || !class.mixture)
                && parameters >= class.from
                && class.below.is_none_or(|below| parameters < below)
        };
        named
            .or_else(|| self.classes.iter().find(fits))
            .or(self.classes.last())
            .expect("a book is checked to have classes")
    }

    /// Returns what goes into the command beside a rung, for a model on a host of `cores` cores (recipe section 8).
    pub fn run_advice(&self, model: &Model, cores: u32) -> RunAdvice {
        let class = self.class_of(model);
        RunAdvice {
            lora: self.lora.clone(),
            class: class.name.clone(),
            eval_steps: class.eval_steps,
            per_device_eval_batch_size: self.eval.per_device_eval_batch_size,
            dataloader_num_workers: (cores / self.workers.cores_per_worker)
                .clamp(self.workers.min, self.workers.max),
            cores,
            stable: self.learning.stable.values.clone(),
        }
    }

    /// Returns the advice that a job asked for by name, learning before saving.
    pub(crate) fn asked(&self, learning: Learning, save: Save) -> Values {
        let learning = match learning {
            Learning::Standard => Values::default(),
            Learning::Fast => self.learning.fast.values.clone(),
            Learning::Stable => self.learning.stable.values.clone(),
        };
        let save = match save {
            Save::Standard => Values::default(),
            Save::FastIteration => self.save.fast_iteration.values.clone(),
            Save::LongRun => self.save.long_run.values.clone(),
        };
        learning.or(&save)
    }

    /// Returns the values of a rung of the standard kinds.
    pub(crate) fn standard_values(&self, class: &Class, asked: &Values) -> Values {
        asked.or(&class.values).or(&self.profiles.standard.values())
    }

    /// Returns the values of the emergency rung.
    pub(crate) fn emergency_values(&self, asked: &Values) -> Values {
        asked.or(&self.profiles.emergency.values())
    }

    fn check(&self) -> Result<(), TierBookError> {
        if self.classes.is_empty() {
            return Err(unusable("the list of classes", "empty", "one class or more"));
        }
        if self.classes.last().is_some_and(|class| class.below.is_some() || class.mixture || class.from > 0.0)
        {
            return Err(unusable(
                "the last class",
                "limited",
                "without `below`, `from` and `mixture`: it takes the rest",
            ));
        }
        self.classes.iter().try_for_each(Class::check)?;
        let lengths = [
            ("profile.standard.max_length", self.profiles.standard.max_length),
            ("profile.long.max_length", self.profiles.long.max_length),
            ("profile.shorter.max_length", self.profiles.shorter.max_length),
            ("profile.emergency.max_length", self.profiles.emergency.max_length),
            ("profile.shorter.micro_batch_max", self.profiles.shorter.micro_batch_max),
            ("profile.emergency.micro_batch", self.profiles.emergency.micro_batch),
            ("workers.cores_per_worker", self.workers.cores_per_worker),
            ("workers.min", self.workers.min),
            ("lora.rank", self.lora.rank),
            ("lora.alpha", self.lora.alpha),
            ("eval.per_device_eval_batch_size", self.eval.per_device_eval_batch_size),
        ];
        for (what, value) in lengths {
            if value == 0 {
                return Err(unusable(what, "0", "1 or more"));
            }
        }
        if self.workers.max < self.workers.min {
            return Err(unusable("workers.max", &self.workers.max.to_string(), "workers.min or more"));
        }
        let rules = [
            ("ladder.throughput_gain_min", self.ladder.throughput_gain_min, 0.0),
            ("ladder.saturation_tokens", self.ladder.saturation_tokens, 0.0),
            ("ladder.larger_risk_share", self.ladder.larger_risk_share, f64::MIN_POSITIVE),
            ("ladder.known_risk_share", self.ladder.known_risk_share, f64::MIN_POSITIVE),
        ];
        for (what, value, least) in rules {
            if !(value >= least && value.is_finite()) {
                return Err(unusable(what, &value.to_string(), "a number above 0"));
            }
        }
        if self.ladder.larger_risk_share > 1.0 {
            return Err(unusable("ladder.larger_risk_share", "above 1", "at most 1"));
        }
        Ok(())
    }
}

impl Class {
    fn check(&self) -> Result<(), TierBookError> {
        let what = |key: &str| format!("`{key}` of class `{}`", self.name);
        if self.effective_batch == 0 {
            return Err(unusable(&what("effective_batch"), "0", "1 or more"));
        }
        if self.eval_steps == 0 {
            return Err(unusable(&what("eval_steps"), "0", "1 or more"));
        }
        if self.max_length == Some(0) {
            return Err(unusable(&what("max_length"), "0", "1 or more"));
        }
        let divides = |micro: &u32| *micro > 0 && self.effective_batch.is_multiple_of(*micro);
        if !self.micro_batches.iter().all(divides) {
            let found = format!("{:?}", self.micro_batches);
            return Err(unusable(&what("micro_batches"), &found, "divisors of the effective batch"));
        }
        if !self.micro_batches.is_sorted_by(|a, b| a > b) {
            let found = format!("{:?}", self.micro_batches);
            return Err(unusable(&what("micro_batches"), &found, "in falling order"));
        }
        if !self.micro_batches.contains(&self.micro_batch) {
            return Err(unusable(
                &what("micro_batch"),
                &self.micro_batch.to_string(),
                "one of its `micro_batches`",
            ));
        }
        Ok(())
    }
}

fn unusable(what: &str, found: &str, expected: &'static str) -> TierBookError {
    TierBookError::Unusable { what: what.to_owned(), found: found.to_owned(), expected }
}

/// Refuses unknown keys where serde cannot.
fn refuse_unknown_values(table: &toml::Table) -> Result<(), TierBookError> {
    let classes = table.get("class").and_then(toml::Value::as_array).into_iter().flatten();
    for class in classes.filter_map(toml::Value::as_table) {
        refuse_unknown("class", class, &CLASS_KEYS)?;
    }
    for group in ["learning", "save"] {
        let advice = table.get(group).and_then(toml::Value::as_table).into_iter().flatten();
        for (name, values) in advice.filter_map(|(name, value)| Some((name, value.as_table()?))) {
            refuse_unknown(&format!("{group}.{name}"), values, &["note"])?;
        }
    }
    Ok(())
}

fn refuse_unknown(place: &str, table: &toml::Table, own: &[&str]) -> Result<(), TierBookError> {
    let known = |key: &str| own.contains(&key) || VALUE_KEYS.contains(&key);
    match table.keys().find(|key| !known(key)) {
        Some(key) => Err(unusable(
            &format!("`{key}` in [{place}]"),
            "no known key",
            "left out, or spelt as in the shipped file",
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../config/tiers.toml");

    #[test]
    fn the_shipped_book_is_read() {
        assert!(TierBook::from_toml(SHIPPED).is_ok(), "{:?}", TierBook::from_toml(SHIPPED));
    }

    #[test]
    fn unknown_keys_are_refused_everywhere() {
        for (from, to) in [
            ("[ladder]", "[ladder]\nnovel = 1"),
            ("[profile.standard] ", "[profile.standard]\nnovel = 1 "),
            ("name = \"7b\"", "novel = 1\nname = \"7b\""),
            ("[learning.fast] ", "[learning.fast]\nnovel = 1 "),
            ("[save.long_run]", "[save.long_run]\nnovel = 1"),
            ("[lora] ", "[novel]\n[lora] "),
        ] {
            let text = SHIPPED.replacen(from, to, 1);
            assert_ne!(text, SHIPPED, "{from}");
            let error = TierBook::from_toml(&text).unwrap_err();
            assert!(error.to_string().contains("novel"), "{from}: {error}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        for (from, to) in [
            ("micro_batches = [32, 16, 8, 4, 2, 1]", "micro_batches = [32, 9]"),
            ("micro_batches = [32, 16, 8, 4, 2, 1]", "micro_batches = [4, 8]"),
            ("micro_batches = [32, 16, 8, 4, 2, 1]", "micro_batches = [4]"),
            ("micro_batches = [32, 16, 8, 4, 2, 1]", "micro_batches = [0, 8]"),
            ("cores_per_worker = 2", "cores_per_worker = 0"),
            ("max_length = 3072", "max_length = 0"),
            ("larger_risk_share = 0.25", "larger_risk_share = 2.0"),
            ("saturation_tokens = 256", "saturation_tokens = -1.0"),
        ] {
            assert!(TierBook::from_toml(&SHIPPED.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn classes_split_7b_from_8b_and_30b_from_70b() {
        let book = TierBook::builtin();
        for (name, class) in [
            ("Qwen2.5-7B", "7b"),
            ("Qwen-7B", "7b"),
            ("internlm2_5-7b", "7b"),
            ("Qwen2.5-0.5B", "7b"),
            ("novel-7B", "7b"),
            ("Llama-3-8B", "8b"),
            ("novel-8B", "8b"),
            ("Yi-9B", "8b"),
            ("glm-4-9b", "8b"),
            ("gemma-2-9b", "8b"),
            ("Qwen2.5-14B", "20b"),
            ("internlm-20b", "20b"),
            ("Yi-34B", "20b"),
            ("Qwen3-30B-A3B", "20b"),
            ("gpt-oss-20b", "moe-20b"),
            ("Qwen2.5-72B", "large"),
            ("gpt-oss-120b", "large"),
        ] {
            let model = Model::resolve(name, None, None).unwrap();
            assert_eq!(book.class_of(&model).name, class, "{name}");
        }
    }

    #[test]
    fn workers_are_half_the_cores_within_bounds() {
        let (book, model) = (TierBook::builtin(), Model::resolve("Qwen2.5-7B", None, None).unwrap());
        let workers = |cores| book.run_advice(&model, cores).dataloader_num_workers;
        assert_eq!([0, 1, 2, 8, 16, 128].map(workers), [1, 1, 1, 4, 8, 8]);
    }
}
