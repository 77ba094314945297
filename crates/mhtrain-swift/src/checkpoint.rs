//! Which checkpoint can be resumed, and what must be repaired in it?
//!
//! Resume is exact or it is said not to be. Exact means: the rows that follow are those that an uninterrupted run
//! would have trained, in the same order.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use mhtrain_sizing::tier::Tier;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::python_json;

/// A `trainer_state.json` that was read, with its own text.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub global_step: u64,
    /// Steps that the trainer meant to do.
    pub max_steps: u64,
    /// Passes over the data, with a fraction; a whole number exactly at the end of an epoch.
    pub epoch: Option<f64>,
    /// Rows of one pass on one device. transformers 4.x trains with this number, whatever its command line says.
    pub train_batch_size: Option<u64>,
    text: String,
}

/// A `trainer_state.json` that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrainerStateError {
    /// The text is no JSON, for example because it was cut.
    #[error("trainer_state.json is no JSON: {reason}")]
    NotJson {
        /// What the parser says.
        reason: String,
    },
    /// A key is missing or of another type.
    #[error("trainer_state.json: `{key}` should be {expected}, found {found}")]
    WrongField {
        /// The key.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The micro-batch cannot be replaced in this text.
    #[error("trainer_state.json: `train_batch_size` cannot be set to {wanted}")]
    NotRepairable {
        /// The micro-batch that was to be written.
        wanted: u32,
    },
}

impl TrainerStateError {
    /// Returns what can be done about it.
    pub fn help(&self) -> Option<String> {
        Some("resume from the checkpoint before, or start again".to_owned())
    }
}

impl TrainerState {
    /// Reads the text of a `trainer_state.json`. Keys that are not used here may be anything.
    pub fn parse(text: &str) -> Result<TrainerState, TrainerStateError> {
        let value = python_json::parse(text)
            .map_err(|error| TrainerStateError::NotJson { reason: error.to_string() })?;
        Ok(TrainerState {
            global_step: required(&value, "global_step")?,
            max_steps: required(&value, "max_steps")?,
            epoch: match value.get("epoch") {
                None | Some(Value::Null) => None,
                Some(Value::Number(number)) => number.as_f64(),
                Some(other) => return Err(wrong("epoch", "a number", Some(other))),
            },
            train_batch_size: match value.get("train_batch_size") {
                None | Some(Value::Null) => None,
                Some(_) => Some(required(&value, "train_batch_size")?),
            },
            text: text.to_owned(),
        })
    }

    /// Returns the text with `train_batch_size` set to `micro_batch` and nothing else changed: numbers keep their
    /// digits, and `NaN` stays what only Python can read.
    pub fn with_train_batch_size(&self, micro_batch: u32) -> Result<String, TrainerStateError> {
        let refused = TrainerStateError::NotRepairable { wanted: micro_batch };
        let text = match value_span(&self.text, "train_batch_size") {
            Some((start, end)) => format!("{}{micro_batch}{}", &self.text[..start], &self.text[end..]),
            None => {
                let open = self.text.find('{').ok_or_else(|| refused.clone())? + 1;
                let (head, tail) = self.text.split_at(open);
                format!("{head}\n  \"train_batch_size\": {micro_batch},{tail}")
            }
        };
        let repaired = TrainerState::parse(&text).map_err(|_| refused.clone())?;
        let only_that_changed = repaired.train_batch_size == Some(u64::from(micro_batch))
            && repaired.global_step == self.global_step
            && repaired.max_steps == self.max_steps;
        if only_that_changed { Ok(text) } else { Err(refused) }
    }

    /// Returns whether the step lies in the first epoch or exactly between two.
    fn is_in_first_epoch_or_at_boundary(&self, steps_per_epoch: Option<u64>) -> bool {
        match (steps_per_epoch, self.epoch) {
            (Some(steps), _) if steps > 0 => {
                self.global_step <= steps || self.global_step.is_multiple_of(steps)
            }
            (_, Some(epoch)) => epoch <= 1.0 || epoch.fract() == 0.0,
            (_, None) => false,
        }
    }
}

fn required(value: &Value, key: &'static str) -> Result<u64, TrainerStateError> {
    value.get(key).and_then(Value::as_u64).ok_or_else(|| wrong(key, "a whole number", value.get(key)))
}

fn wrong(key: &'static str, expected: &'static str, found: Option<&Value>) -> TrainerStateError {
    let found =
        found.map_or_else(|| "nothing".to_owned(), |value| value.to_string().chars().take(80).collect());
    TrainerStateError::WrongField { key, expected, found }
}

/// Finds the bytes of the value of the last top-level `key` (the last one is what Python takes). The text is known to
/// be JSON.
fn value_span(text: &str, key: &str) -> Option<(usize, usize)> {
    let bytes = text.as_bytes();
    let mut depth = 0usize;
    let mut at = 0;
    let mut found = None;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = end_of_string(bytes, at)?;
                let colon = skip_blanks(bytes, end);
                if depth == 1 && bytes.get(colon) == Some(&b':') && text.get(at + 1..end - 1) == Some(key) {
                    let start = skip_blanks(bytes, colon + 1);
                    let length =
                        bytes[start..].iter().position(|b| matches!(b, b',' | b'}' | b'\n' | b' '))?;
                    found = Some((start, start + length));
                }
                at = end;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    found
}

/// Returns where the string that opens at `start` has ended.
fn end_of_string(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

fn skip_blanks(bytes: &[u8], start: usize) -> usize {
    bytes[start..]
        .iter()
        .position(|byte| !byte.is_ascii_whitespace())
        .map_or(bytes.len(), |blanks| start + blanks)
}

/// What a shell has read of one `checkpoint-N` directory.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointFacts {
    /// The directory.
    pub path: PathBuf,
    /// N of its name.
    pub step: u64,
    /// Its `trainer_state.json`; `None` when there is none or it cannot be read.
    pub state: Option<TrainerState>,
    /// Whether it has an optimizer state that is not empty.
    pub has_optimizer: bool,
    /// Whether it has a scheduler state that is not empty.
    pub has_scheduler: bool,
    /// Whether it has the state of the random generators. Only the noise of dropout depends on it.
    pub has_rng: bool,
    /// Whether it has weights: of the adapter or of the model.
    pub has_weights: bool,
}

impl CheckpointFacts {
    /// Returns what is missing for a resume, or `None` when the checkpoint is complete.
    ///
    /// A trainer that is killed while it saves leaves a part of a checkpoint. `trainer_state.json` is what
    /// transformers writes last.
    pub fn defect(&self) -> Option<Defect> {
        match &self.state {
            None => Some(Defect::NoState),
            Some(state) if state.global_step != self.step => {
                Some(Defect::OtherStep { named: self.step, found: state.global_step })
            }
            Some(_) if !self.has_weights => Some(Defect::NoWeights),
            Some(_) if !self.has_optimizer => Some(Defect::NoOptimizer),
            Some(_) if !self.has_scheduler => Some(Defect::NoScheduler),
            Some(_) => None,
        }
    }

    /// Returns whether it can be resumed.
    pub fn is_complete(&self) -> bool {
        self.defect().is_none()
    }
}

/// Why a checkpoint is passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Defect {
    /// No readable `trainer_state.json`.
    #[error("it has no readable trainer_state.json")]
    NoState,
    /// The state belongs to another step than the name says.
    #[error("its name says step {named}, its trainer_state.json step {found}")]
    OtherStep {
        /// By its name.
        named: u64,
        /// By its state.
        found: u64,
    },
    /// No weights.
    #[error("it has no weights")]
    NoWeights,
    /// No optimizer state.
    #[error("it has no optimizer state")]
    NoOptimizer,
    /// No scheduler state.
    #[error("it has no scheduler state")]
    NoScheduler,
    /// A resume from it has failed before.
    #[error("it could not be read by an earlier attempt")]
    KnownCorrupt,
    /// This trainer would replay the rows of the first epoch.
    #[error("step {step} lies inside a later epoch, where this trainer would replay the rows of the first")]
    ReplaysFirstEpoch {
        /// Its step.
        step: u64,
    },
    /// The micro-batch of the next attempt cannot be written into it.
    #[error("its trainer_state.json cannot be repaired")]
    NotRepairable,
}

/// What the next attempt is like.
#[derive(Clone, Debug)]
pub struct ResumeQuestion<'a> {
    /// The tier that wrote the checkpoints.
    pub old: &'a Tier,
    /// The tier of the next attempt.
    pub new: &'a Tier,
    /// Whether the trainer takes its micro-batch from the checkpoint (transformers 4.x). The repair is made on
    /// every trainer, so this only decides whether one that cannot be repaired is refused.
    pub restores_train_batch_size: bool,
    /// Whether a resume inside a later epoch replays the rows of the first (ms-swift 3.x without the companion's patch).
    pub replays_first_epoch: bool,
    /// Steps of one epoch, where they are known.
    pub steps_per_epoch: Option<u64>,
    /// Whether trained steps may be given up to start again.
    pub allow_restart: bool,
    /// Steps whose checkpoint an earlier attempt could not read.
    pub corrupt_steps: &'a BTreeSet<u64>,
}

/// A checkpoint that is newer than the chosen one and cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    /// The directory.
    pub path: PathBuf,
    /// Why.
    pub why: Defect,
}

/// How the next attempt begins.
#[derive(Clone, Debug, PartialEq)]
pub enum ResumeDecision {
    /// From a checkpoint, with the very rows that would have followed.
    Exact {
        /// The directory.
        checkpoint: PathBuf,
        /// Steps that are done.
        step: u64,
        /// Steps that were trained and saved beyond it, and are trained again.
        repeated_steps: u64,
        /// The text that `trainer_state.json` must have in the view of the checkpoint that is resumed; `None`: as it is.
        repair: Option<String>,
        /// Newer checkpoints that cannot be used.
        passed_over: Vec<PassedOver>,
    },
    /// Every step is trained: nothing is left but to prove it. A resume would train nothing and exit with 0.
    Finished {
        /// The last checkpoint.
        checkpoint: PathBuf,
        /// Its step.
        step: u64,
    },
    /// From the first row.
    Restart {
        /// Why no checkpoint is resumed.
        why: NoResume,
        /// Saved steps that are given up.
        lost_steps: u64,
    },
    /// Not at all: a restart is not allowed.
    Refuse {
        /// Why no checkpoint is resumed.
        why: NoResume,
        /// Saved steps that a restart would give up.
        lost_steps: u64,
    },
}

impl ResumeDecision {
    /// Returns what the user can do about a refusal.
    pub fn help(&self) -> Option<String> {
        match self {
            ResumeDecision::Refuse { lost_steps, .. } => Some(format!(
                "set `allow.restart` to true to train the {lost_steps} saved steps again, or resume by hand"
            )),
            ResumeDecision::Exact { .. }
            | ResumeDecision::Finished { .. }
            | ResumeDecision::Restart { .. } => None,
        }
    }
}

/// Why no checkpoint is resumed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoResume {
    /// Nothing was saved yet.
    NothingSaved,
    /// A step means other rows or other adapters now.
    OtherRows {
        /// What changed, in words: `effective batch 36 -> 32`.
        changes: Vec<String>,
    },
    /// Checkpoints are there, but none can be used.
    NoneUsable {
        /// Each of them, newest first.
        passed_over: Vec<PassedOver>,
    },
}

impl fmt::Display for NoResume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoResume::NothingSaved => f.write_str("no checkpoint was saved yet"),
            NoResume::OtherRows { changes } => {
                write!(f, "a step of the old checkpoints means other training now: {}", changes.join(", "))
            }
            NoResume::NoneUsable { passed_over } => {
                f.write_str("no checkpoint can be resumed")?;
                let separators = std::iter::once(": ").chain(std::iter::repeat("; "));
                separators.zip(passed_over).try_for_each(|(separator, passed)| {
                    write!(f, "{separator}{}: {}", passed.path.display(), passed.why)
                })
            }
        }
    }
}

/// Chooses how the next attempt begins: from the newest checkpoint that can be resumed exactly, else again.
pub fn choose_resume(checkpoints: &[CheckpointFacts], question: &ResumeQuestion<'_>) -> ResumeDecision {
    let mut newest_first: Vec<&CheckpointFacts> = checkpoints.iter().collect();
    newest_first.sort_by_key(|checkpoint| std::cmp::Reverse(checkpoint.step));
    let saved_steps = newest_first
        .iter()
        .find(|checkpoint| checkpoint.is_complete())
        .map_or(0, |checkpoint| checkpoint.step);
    let no_resume = |why| match (question.allow_restart, saved_steps) {
        // With nothing to give up, a first attempt is no restart.
        (true, _) | (false, 0) => ResumeDecision::Restart { why, lost_steps: saved_steps },
        (false, _) => ResumeDecision::Refuse { why, lost_steps: saved_steps },
    };
    if newest_first.is_empty() {
        return no_resume(NoResume::NothingSaved);
    }
    if !question.old.trains_the_same_as(question.new) {
        return no_resume(NoResume::OtherRows { changes: changes(question.old, question.new) });
    }
    let mut passed_over = Vec::new();
    for checkpoint in newest_first {
        match usable(checkpoint, question) {
            Ok(Usable::Finished) => {
                return ResumeDecision::Finished {
                    checkpoint: checkpoint.path.clone(),
                    step: checkpoint.step,
                };
            }
            Ok(Usable::Resume { repair }) => {
                return ResumeDecision::Exact {
                    checkpoint: checkpoint.path.clone(),
                    step: checkpoint.step,
                    repeated_steps: saved_steps.saturating_sub(checkpoint.step),
                    repair,
                    passed_over,
                };
            }
            Err(why) => passed_over.push(PassedOver { path: checkpoint.path.clone(), why }),
        }
    }
    no_resume(NoResume::NoneUsable { passed_over })
}

enum Usable {
    Finished,
    Resume { repair: Option<String> },
}

fn usable(checkpoint: &CheckpointFacts, question: &ResumeQuestion<'_>) -> Result<Usable, Defect> {
    if question.corrupt_steps.contains(&checkpoint.step) {
        return Err(Defect::KnownCorrupt);
    }
    if let Some(defect) = checkpoint.defect() {
        return Err(defect);
    }
    let Some(state) = &checkpoint.state else { return Err(Defect::NoState) };
    if state.global_step >= state.max_steps {
        return Ok(Usable::Finished);
    }
    if question.replays_first_epoch && !state.is_in_first_epoch_or_at_boundary(question.steps_per_epoch) {
        return Err(Defect::ReplaysFirstEpoch { step: checkpoint.step });
    }
    if state.train_batch_size == Some(u64::from(question.new.micro_batch)) {
        return Ok(Usable::Resume { repair: None });
    }
    match state.with_train_batch_size(question.new.micro_batch) {
        Ok(text) => Ok(Usable::Resume { repair: Some(text) }),
        Err(_) if question.restores_train_batch_size => Err(Defect::NotRepairable),
        Err(_) => Ok(Usable::Resume { repair: None }),
    }
}

/// Says what makes a step mean other rows.
fn changes(old: &Tier, new: &Tier) -> Vec<String> {
    let mut changes = Vec::new();
    if old.effective_batch() != new.effective_batch() {
        changes.push(format!("effective batch {} -> {}", old.effective_batch(), new.effective_batch()));
    }
    if old.max_length != new.max_length {
        changes.push(format!("max_length {} -> {}", old.max_length, new.max_length));
    }
    if old.packing != new.packing {
        changes.push(format!("packing {} -> {}", old.packing, new.packing));
    }
    let adapters = |tier: &Tier| tier.adapters.clone().unwrap_or_default();
    let (before, now) = (adapters(old), adapters(new));
    if before.lora_rank != now.lora_rank {
        changes.push(format!("lora_rank {} -> {}", before.lora_rank, now.lora_rank));
    }
    if before.target_modules != now.target_modules {
        changes.push(format!("target_modules {} -> {}", before.target_modules, now.target_modules));
    }
    if old.quant_bits != new.quant_bits {
        let bits = |tier: &Tier| tier.quant_bits.map_or("none".to_owned(), |bits| bits.to_string());
        changes.push(format!("quant_bits {} -> {}", bits(old), bits(new)));
    }
    changes
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::testing;

    fn tier(micro_batch: u32, accumulation: u32) -> Tier {
        Tier { micro_batch, accumulation, num_train_epochs: 2.0, ..testing::tier() }
    }

    #[test]
    fn weights_in_other_bits_are_named_as_what_changed() {
        let packed = Tier { quant_bits: Some(4), ..tier(2, 16) };
        assert!(!tier(2, 16).trains_the_same_as(&packed));
        assert_eq!(changes(&tier(2, 16), &packed), ["quant_bits none -> 4"]);
        assert_eq!(changes(&packed, &tier(4, 8)), ["quant_bits 4 -> none"]);
    }

    /// The text of the state of a run of 2 epochs with 10 steps each.
    fn state_text(step: u64, micro_batch: u32) -> String {
        let epoch = step as f64 / 10.0;
        format!(
            "{{\n  \"epoch\": {epoch},\n  \"global_step\": {step},\n  \"log_history\": [\n    {{\"loss\": NaN, \
             \"train_batch_size\": 77, \"note\": \"\\\"train_batch_size\\\": 5\"}}\n  ],\n  \"max_steps\": 20,\n  \
             \"train_batch_size\": {micro_batch},\n  \"trial_name\": null\n}}\n"
        )
    }

    fn checkpoint(step: u64) -> CheckpointFacts {
        CheckpointFacts {
            path: PathBuf::from(format!("out/attempt-1/checkpoint-{step}")),
            step,
            state: Some(TrainerState::parse(&state_text(step, 8)).unwrap()),
            has_optimizer: true,
            has_scheduler: true,
            has_rng: true,
            has_weights: true,
        }
    }

    /// Asks for the transition from 8 x 4 to `new`, on 3.x or on 4.x.
    fn ask(checkpoints: &[CheckpointFacts], new: &Tier, three: bool) -> ResumeDecision {
        choose_resume(
            checkpoints,
            &ResumeQuestion {
                old: &tier(8, 4),
                new,
                restores_train_batch_size: three,
                replays_first_epoch: three,
                steps_per_epoch: Some(10),
                allow_restart: true,
                corrupt_steps: &BTreeSet::new(),
            },
        )
    }

    #[test]
    fn a_smaller_micro_batch_is_written_into_the_newest_checkpoint() {
        let decision = ask(&[checkpoint(5), checkpoint(8)], &tier(4, 8), true);
        let ResumeDecision::Exact { step: 8, repeated_steps: 0, repair: Some(text), passed_over, .. } =
            decision
        else {
            panic!("{decision:?}");
        };
        assert!(passed_over.is_empty());
        assert_eq!(text, state_text(8, 4), "only the one number may change");
    }

    #[test]
    fn the_same_micro_batch_needs_no_repair() {
        let decision = ask(&[checkpoint(8)], &tier(8, 4), true);
        assert!(matches!(decision, ResumeDecision::Exact { step: 8, repair: None, .. }), "{decision:?}");
    }

    #[test]
    fn half_written_and_corrupt_checkpoints_are_passed_over() {
        let mut cut = checkpoint(9);
        cut.has_optimizer = false;
        let mut renamed = checkpoint(7);
        renamed.step = 10;
        let corrupt = BTreeSet::from([8]);
        let decision = choose_resume(
            &[checkpoint(5), checkpoint(8), cut, renamed],
            &ResumeQuestion {
                old: &tier(8, 4),
                new: &tier(4, 8),
                restores_train_batch_size: false,
                replays_first_epoch: false,
                steps_per_epoch: None,
                allow_restart: false,
                corrupt_steps: &corrupt,
            },
        );
        // checkpoint-8 is whole but unreadable, so its three steps beyond 5 are trained again.
        let ResumeDecision::Exact { step: 5, repeated_steps: 3, passed_over, .. } = decision else {
            panic!("{decision:?}");
        };
        let why: Vec<Defect> = passed_over.into_iter().map(|passed| passed.why).collect();
        assert_eq!(
            why,
            [Defect::OtherStep { named: 10, found: 7 }, Defect::NoOptimizer, Defect::KnownCorrupt]
        );
    }

    #[test]
    fn inside_a_later_epoch_the_old_line_goes_back_to_the_boundary() {
        let saved = [checkpoint(5), checkpoint(10), checkpoint(15)];
        let decision = ask(&saved, &tier(4, 8), true);
        assert!(
            matches!(decision, ResumeDecision::Exact { step: 10, repeated_steps: 5, .. }),
            "{decision:?}"
        );
        let decision = ask(&saved, &tier(4, 8), false);
        assert!(matches!(decision, ResumeDecision::Exact { step: 15, .. }), "{decision:?}");
    }

    #[test]
    fn the_epoch_of_the_state_tells_the_boundary_where_steps_per_epoch_is_unknown() {
        for (step, fine) in [(5, true), (10, true), (15, false), (20, true)] {
            let state = TrainerState::parse(&state_text(step, 8)).unwrap();
            assert_eq!(state.is_in_first_epoch_or_at_boundary(None), fine, "step {step}");
            assert_eq!(state.is_in_first_epoch_or_at_boundary(Some(10)), fine, "step {step}");
        }
    }

    #[test]
    fn a_changed_effective_batch_starts_again_or_is_refused() {
        let (old, new) = (tier(6, 6), tier(2, 16));
        let corrupt_steps = BTreeSet::new();
        let mut question = ResumeQuestion {
            old: &old,
            new: &new,
            restores_train_batch_size: false,
            replays_first_epoch: false,
            steps_per_epoch: None,
            allow_restart: true,
            corrupt_steps: &corrupt_steps,
        };
        let ResumeDecision::Restart { why, lost_steps: 5 } = choose_resume(&[checkpoint(5)], &question)
        else {
            panic!("a restart was allowed");
        };
        assert!(why.to_string().contains("effective batch 36 -> 32"), "{why}");
        question.allow_restart = false;
        let refused = choose_resume(&[checkpoint(5)], &question);
        assert!(matches!(refused, ResumeDecision::Refuse { lost_steps: 5, .. }));
        assert!(refused.help().unwrap().contains("allow.restart"));
        assert!(matches!(
            choose_resume(&[], &question),
            ResumeDecision::Restart { why: NoResume::NothingSaved, .. }
        ));
    }

    #[test]
    fn a_finished_checkpoint_is_not_resumed() {
        let decision = ask(&[checkpoint(15), checkpoint(20)], &tier(4, 8), false);
        assert!(matches!(decision, ResumeDecision::Finished { step: 20, .. }), "{decision:?}");
    }

    #[test]
    fn a_state_without_the_micro_batch_gets_one() {
        let state = TrainerState::parse(r#"{"global_step": 1, "max_steps": 2}"#).unwrap();
        let repaired = TrainerState::parse(&state.with_train_batch_size(4).unwrap()).unwrap();
        assert_eq!(repaired.train_batch_size, Some(4));
        let null =
            TrainerState::parse("{\"train_batch_size\": null, \"global_step\":1,\"max_steps\":2}").unwrap();
        assert_eq!(
            null.with_train_batch_size(4).unwrap(),
            "{\"train_batch_size\": 4, \"global_step\":1,\"max_steps\":2}"
        );
    }

    #[test]
    fn states_of_the_wrong_form_say_which_key() {
        for (text, key) in [
            (r#"{"max_steps": 2}"#, "global_step"),
            (r#"{"global_step": "1", "max_steps": 2}"#, "global_step"),
            (r#"{"global_step": 1, "max_steps": -1}"#, "max_steps"),
            (r#"{"global_step": 1, "max_steps": 2, "epoch": "x"}"#, "epoch"),
            (r#"{"global_step": 1, "max_steps": 2, "train_batch_size": 1.5}"#, "train_batch_size"),
            (r#"{"global_step": 1, "max_"#, "no JSON"),
        ] {
            let error = TrainerState::parse(text).unwrap_err();
            assert!(error.to_string().contains(key), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,200}") {
            if let Ok(state) = TrainerState::parse(&text) {
                let _ = state.with_train_batch_size(1);
            }
        }

        #[test]
        fn a_repair_changes_one_number(note in r#"[a-z"\\{}:, ]{0,30}"#, before in 1u32..999, after in 1u32..999) {
            let note = serde_json::to_string(&note).unwrap();
            let text = |micro: u32| format!("{{\"note\": {note}, \"train_batch_size\":{micro}, \"x\": [NaN, {note}], \"global_step\": 3, \"max_steps\": 9}}");
            let state = TrainerState::parse(&text(before)).unwrap();
            proptest::prop_assert_eq!(state.with_train_batch_size(after).unwrap(), text(after));
        }
    }
}
