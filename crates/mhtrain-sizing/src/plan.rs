//! Which rung is the best that fits?

mod order;
mod settle;

use std::borrow::Cow;
use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use settle::{
    Attention, Batches, Lengths, check_numbers, note_environment, settle_adapters, settle_attention,
    settle_batch, settle_dtype, settle_lengths, settle_liger, settle_quantising,
};

pub use crate::correct::after_oom;
use crate::cost::Cost;
use crate::data::LengthProfile;
use crate::estimate::{Estimate, EstimateError, estimate_with, experts_note};
use crate::explain::as_shown;
use crate::ladder::{Class, TierBook, Values};
use crate::learn::{Learned, learn};
use crate::observation::{Fingerprint, Observation, Reading, Seen, Versions};
use crate::pace::{Pace, StepTime, step_time};
use crate::request::{Learning, Length, Request};
use crate::reserve::{Group, Reserve};
use crate::tier::{Adapters, Profile, Tier};
use crate::units::Bytes;
use crate::workload::{AttnImpl, Dtype, ExpertForm, TrainType, Workload};

/// One rung of the ladder with the engine's verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rung {
    /// The rung.
    pub tier: Tier,
    /// Predicted device peak, best guess.
    pub predicted_peak_bytes: Bytes,
    /// What the card must have free for this rung to be admitted at the stated risk.
    pub admission_bytes: Bytes,
    /// Whether the rung is admitted.
    pub fits: bool,
    /// Whether the rung is taken where it fits: a larger pass that is hardly faster is not, on any card.
    #[serde(default = "always")]
    pub worth_it: bool,
    /// Why it is, or is not, taken, with both numbers.
    pub why: String,
    /// The prediction in full.
    pub estimate: Estimate,
    /// Time of a trained token, 1 and more; only its ratio to that of another rung means anything. 0 in plans that were
    /// stored before it was told.
    #[serde(default)]
    pub relative_time: f64,
    /// Tokens of a row of a pass, its padding among them; `None` where nobody looked at the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_tokens: Option<f64>,
    /// What it would need if rows were as long as `max_length` lets them; `None` where that is what was predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_rows_peak_bytes: Option<Bytes>,
}

/// Returns what is taken for true of plans that were stored before `worth_it` was in them.
fn always() -> bool {
    true
}

/// A sized job: every rung in order, and the one to start at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Index into `rungs` of the first attempt.
    pub chosen: usize,
    /// Rungs from the first choice to the last resort.
    pub rungs: Vec<Rung>,
    /// Effective batch of every rung.
    pub effective_batch: u64,
    /// What an attempt of the first rung has in common with others.
    pub fingerprint: Fingerprint,
    /// What differs from the recipe or from what the job asked, and why; a sentence each.
    pub notes: Vec<String>,
    /// Whether the weights are not packed into 4 bits and could be (`train_type` qlora).
    #[serde(default)]
    pub can_quantise: bool,
    /// How long a step of the first attempt takes; `None` where no earlier attempt says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_time: Option<StepTime>,
    /// Tokens that no row of the data exceeds, which rows that are not packed were sized with; `None` where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_row: Option<u32>,
}

impl Plan {
    /// Returns the rung that the first attempt takes.
    pub fn chosen_rung(&self) -> &Rung {
        &self.rungs[self.chosen]
    }

    /// Returns a rung with the length that the rows of its passes have at most.
    pub(crate) fn pass(&self, tier: &Tier) -> Tier {
        Tier { max_length: pass_row(tier, self.longest_row), ..tier.clone() }
    }

    /// Returns the rung that the same job takes with `free` free memory; `None` where none is admitted.
    ///
    /// What a rung has to fit by depends on the ladder alone, so this needs no second plan.
    pub fn taken_at(&self, free: Bytes) -> Option<usize> {
        self.rungs.iter().position(|rung| rung.worth_it && rung.admission_bytes <= free)
    }

    /// Returns what an attempt of a rung leaves behind for later predictions.
    pub fn observation(
        &self,
        rung: usize,
        name: String,
        seen: Seen,
        pace: Option<Pace>,
    ) -> Option<Observation> {
        let Rung { tier, estimate, row_tokens, .. } = self.rungs.get(rung)?;
        let pace = pace.map(|pace| Pace { row_tokens: *row_tokens, ..pace });
        let group = Group::of_attempt(tier.packing);
        let method = method(self.fingerprint.method, tier);
        let fingerprint = Fingerprint { group, method, ..self.fingerprint.clone() };
        let predicted = estimate.allocated_peak_bytes;
        let sized_row = Some(pass_row(tier, self.longest_row));
        Some(Observation { name, fingerprint, tier: Some(tier.clone()), predicted, sized_row, seen, pace })
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The model or a pinned value cannot be estimated.
    #[error(transparent)]
    Estimate(#[from] EstimateError),
    /// A number of the request cannot be.
    #[error("`{what}` is {found}, and has to be {expected}")]
    Unusable {
        /// Key of the job.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Both factors of the batch are pinned, and their product is too small.
    #[error(
        "micro-batch {micro_batch} x accumulation {accumulation} = {product} is pinned, and the effective batch has \
         to be {min_effective_batch} or more"
    )]
    PinnedBatchTooSmall {
        /// Pinned micro-batch.
        micro_batch: u32,
        /// Pinned accumulation.
        accumulation: u32,
        /// Their product.
        product: u64,
        /// Least effective batch.
        min_effective_batch: u32,
    },
    /// Two wishes exclude each other.
    #[error("{0}")]
    Conflict(String, String),
    /// No rung fits, and the emergency profile may not be tried, or cannot fit with what is pinned.
    #[error("no tier fits on {card}: the smallest ({tier}) needs {needed}, {free} are free{costs}")]
    NothingFits {
        /// The card.
        card: String,
        /// The rung that needs least.
        tier: String,
        /// What that rung needs.
        needed: Bytes,
        /// What the card has free.
        free: Bytes,
        /// What pins cost, as the end of the sentence; empty when they cost nothing.
        costs: String,
        /// What would help.
        help: String,
    },
    /// The weights alone are too much.
    #[error("`{model}` does not fit on {card}: what stays in memory needs {needed}, {free} are free")]
    WeightsDoNotFit {
        /// The model.
        model: String,
        /// The card.
        card: String,
        /// Weights, adapters, optimizer moments and CUDA context.
        needed: Bytes,
        /// What the card has free.
        free: Bytes,
        /// What would help.
        help: String,
    },
}

impl PlanError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            PlanError::Estimate(error) => error.help(),
            PlanError::Unusable { what, expected, .. } => Some(format!("set `{what}` to {expected}")),
            PlanError::PinnedBatchTooSmall { product, min_effective_batch, .. } => Some(format!(
                "pin only one of the two and let the other be solved, or set `min_effective_batch` to {product} \
                 instead of {min_effective_batch}"
            )),
            PlanError::Conflict(_, help)
            | PlanError::NothingFits { help, .. }
            | PlanError::WeightsDoNotFit { help, .. } => Some(help.clone()),
        }
    }
}

/// Returns every rung in order and the one to start at.
///
/// Order is lexicographic: first what is trained, then throughput. The class's own batch is the presumption and is
/// taken when its best guess fits; smaller batches and shorter rows are taken when they fit at the stated risk, larger
/// batches when they fit with room to spare and are faster. A rung under which nothing needs less is taken when its best
/// guess fits. When nothing fits, the emergency rung is tried once, unless the weights alone are too much, or a pinned batch or
/// length puts it out of reach. Every threshold depends on the ladder alone, so more free memory never picks a lower rung.
///
/// # Errors
/// Pins or wishes that exclude each other, and models that do not fit.
pub fn plan(request: &Request, book: &TierBook) -> Result<Plan, PlanError> {
    plan_learned(request, book, &History::default())
}

/// What earlier attempts on this machine showed, and what is installed now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// Earlier attempts, in any order.
    pub observations: Vec<Observation>,
    /// Installed versions.
    pub versions: Versions,
}

impl History {
    /// Returns what an attempt of `request` on packed or unpacked rows has in common with others.
    pub fn fingerprint(&self, request: &Request, packing: bool) -> Fingerprint {
        Fingerprint {
            model: request.model.name.clone(),
            family: request.model.shape.model_type.clone(),
            method: request.train_type,
            group: Group::of_attempt(packing),
            versions: self.versions.clone(),
            card: request.card.name.clone(),
        }
    }

    /// Returns the history without the runs that say nothing about a job whose rows are known to be `longest_row` tokens at most.
    ///
    /// A run that was sized with rows as long as they may be, and stayed below what was to be allocated, had shorter rows: it
    /// shows how much shorter, not what the allocator keeps.
    fn telling(&self, longest_row: Option<u32>) -> Cow<'_, History> {
        let says_nothing = |seen: &Observation| {
            let is_full =
                seen.tier.as_ref().is_none_or(|tier| seen.sized_row.is_none_or(|row| row >= tier.max_length));
            seen.fingerprint.group != Group::Equal
                && is_full
                && matches!(seen.reading(), Some(Reading::Exactly(ratio)) if ratio < 1.0)
        };
        if longest_row.is_none() || !self.observations.iter().any(says_nothing) {
            return Cow::Borrowed(self);
        }
        let observations = self.observations.iter().filter(|seen| !says_nothing(seen)).cloned().collect();
        Cow::Owned(History { observations, versions: self.versions.clone() })
    }

    /// Returns the ratio of reserved to allocated memory for a rung of `request`, and which observations moved it.
    pub fn learned(&self, request: &Request, tier: &Tier, estimate: &Estimate) -> Learned {
        let method = method(request.train_type, tier);
        let next = Fingerprint { method, ..self.fingerprint(request, tier.packing) };
        learn(next.group.prior(estimate.resident_share()), &next, &self.observations)
    }
}

/// Returns the plan as [`plan`] does, with predictions corrected by earlier attempts.
///
/// # Errors
/// As [`plan`].
pub fn plan_learned(request: &Request, book: &TierBook, history: &History) -> Result<Plan, PlanError> {
    let longest_row = request.data.as_ref().and_then(LengthProfile::bound);
    let telling = history.telling(longest_row);
    let sizing = Sizing::of(request, book, &telling, longest_row)?;
    let candidates = sizing.candidates()?;
    let chosen = sizing.choose(&candidates)?;
    let rungs = sizing.rungs(&candidates, chosen);
    let mut notes = sizing.notes(&candidates, chosen);
    let can_quantise = request.train_type != TrainType::Qlora && request.model.can_be_packed();
    let tier = &rungs[chosen].tier;
    let fingerprint = history.fingerprint(request, tier.packing);
    let step_time = step_time(request, &book.ladder, tier, &fingerprint, &history.observations);
    notes.extend(step_time.as_ref().map(StepTime::sentence));
    let effective_batch = sizing.effective_batch;
    Ok(Plan { chosen, effective_batch, rungs, fingerprint, notes, can_quantise, step_time, longest_row })
}

/// Returns the most tokens that a row of a pass at `tier` has, where no row of the data has more than `longest_row`. Packs are
/// filled whatever the rows are.
pub fn pass_row(tier: &Tier, longest_row: Option<u32>) -> u32 {
    let longest = longest_row.filter(|_| !tier.packing);
    longest.map_or(tier.max_length, |longest| longest.min(tier.max_length))
}

/// Returns how a rung of a job is trained: one that packs the weights does what qlora does.
fn method(train_type: TrainType, tier: &Tier) -> TrainType {
    if tier.quant_bits.is_some() { TrainType::Qlora } else { train_type }
}

/// Returns the pass that a rung of a job means for the card, where no row of its data has more than `longest_row` tokens.
pub fn workload(
    train_type: TrainType,
    experts: ExpertForm,
    tier: &Tier,
    longest_row: Option<u32>,
) -> Workload {
    let adapters = tier.adapters.clone().unwrap_or_default();
    Workload {
        train_type: method(train_type, tier),
        lora_rank: adapters.lora_rank,
        targets: adapters.target_modules,
        dtype: tier.torch_dtype,
        micro_batch: tier.micro_batch,
        accumulation: tier.accumulation,
        max_length: pass_row(tier, longest_row),
        packing: tier.packing,
        // A single row has nothing to be padded to.
        padded: !tier.packing && tier.micro_batch > 1,
        attn_impl: tier.attn_impl,
        gradient_checkpointing: tier.gradient_checkpointing,
        liger_kernel: tier.liger_kernel,
        logit_share: 1.0,
        experts,
        router_loss: tier.router_aux_loss_coef.is_some_and(|coefficient| coefficient > 0.0),
    }
}

/// Bits of a base weight that bitsandbytes packs: QLoRA's (Dettmers et al. 2023), and what the peaks were measured with.
const QUANT_BITS: u8 = 4;

/// By which rule a rung is admitted.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Rule {
    /// The class's own batch, or a pinned one: the best guess has to fit.
    Presumed,
    /// The class's own batch on longer rows, because the data has them: the best guess has to fit.
    LongerForData,
    /// A smaller batch or shorter rows: has to fit at the stated risk.
    Careful,
    /// A larger batch, or no checkpointing: has to fit at a smaller risk, and be faster than the rung that it stands for by
    /// this share.
    Larger { gain: f64 },
}

/// What a rung has to fit by.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Basis {
    /// Its best guess.
    BestGuess,
    /// Its best guess, because no rung under it needs less.
    NothingSafer,
    /// What it does not exceed but for this risk.
    Risk(f64),
}

/// A rung before the choice.
#[derive(Clone, Debug)]
struct Candidate {
    tier: Tier,
    rule: Rule,
    estimate: Estimate,
    relative_time: f64,
    basis: Basis,
    needed: Bytes,
    admitted: bool,
}

/// Everything that is settled before the rungs are listed.
struct Sizing<'a> {
    request: &'a Request,
    book: &'a TierBook,
    class: &'a Class,
    effective_batch: u64,
    batches: Batches,
    lengths: Lengths,
    attention: Attention,
    dtype: Dtype,
    adapters: Option<Adapters>,
    /// The adapters of the most frugal rungs; those of the others where fewer are not allowed.
    fewest: Option<Adapters>,
    liger: bool,
    /// Whether the last rungs pack the base weights.
    quantises: bool,
    history: &'a History,
    /// Tokens that no row of the data exceeds.
    longest_row: Option<u32>,
    /// What packed and unpacked rungs have in common with earlier attempts; the second of each packs the weights as well.
    packed: [Fingerprint; 2],
    unpacked: [Fingerprint; 2],
    notes: Vec<String>,
}

impl<'a> Sizing<'a> {
    fn of(
        request: &'a Request,
        book: &'a TierBook,
        history: &'a History,
        longest_row: Option<u32>,
    ) -> Result<Sizing<'a>, PlanError> {
        check_numbers(request)?;
        let class = book.class_of(&request.model);
        let mut notes = request.model.notes.clone();
        // What the class would take says nothing about a batch that is pinned whole.
        if request.pins.micro_batch.is_none() || request.pins.accumulation.is_none() {
            notes.extend(class.note.clone());
        }
        let (effective_batch, batches) = settle_batch(request, class, &mut notes)?;
        let lengths = settle_lengths(request, book, class)?;
        let attention = settle_attention(request, book, &mut notes)?;
        let dtype = settle_dtype(request, &mut notes)?;
        let (adapters, fewest) = settle_adapters(request, book, &mut notes);
        let liger = settle_liger(request, &mut notes);
        note_environment(request, &mut notes);
        notes.extend(experts_note(&request.model, request.features.experts));
        if request.learning == Learning::Fast {
            notes.extend(book.learning.fast.note.clone());
        }
        let quantises = settle_quantising(request, &mut notes);
        let fingerprints = |packing| {
            let plain = history.fingerprint(request, packing);
            [plain.clone(), Fingerprint { method: TrainType::Qlora, ..plain }]
        };
        let (packed, unpacked) = (fingerprints(true), fingerprints(false));
        Ok(Sizing {
            history,
            longest_row,
            request,
            book,
            class,
            effective_batch,
            batches,
            lengths,
            attention,
            dtype,
            adapters,
            fewest,
            liger,
            quantises,
            packed,
            unpacked,
            notes,
        })
    }

    /// Returns every rung in order, with its prediction.
    fn candidates(&self) -> Result<Vec<Candidate>, PlanError> {
        let mut tiers: Vec<(Tier, Rule)> = Vec::new();
        if let Some(length) = self.lengths.long_for_data {
            tiers.push((self.standard_tier(Profile::Long, self.batches.own, length), Rule::LongerForData));
        }
        let whole = [(Profile::Long, self.lengths.long), (Profile::Standard, self.lengths.standard)];
        for (profile, length) in whole {
            if let Some(length) = length {
                tiers.extend(self.by_speed(profile, length));
            }
        }
        if let Some(length) = self.lengths.shorter {
            let shorter = |micro| (self.standard_tier(Profile::Shorter, micro, length), Rule::Careful);
            tiers.extend(self.small_batches().map(shorter));
        }
        let last = self.lengths.shorter.or(self.lengths.standard).or(self.lengths.long);
        if let (Some(length), true) = (last, self.fewest != self.adapters) {
            let fewer = |micro| (self.fewer_targets_tier(micro, length), Rule::Careful);
            tiers.extend(self.small_batches().map(fewer));
        }
        // At full length first: packed weights leave more room than shorter rows do.
        let whole = self.lengths.standard.or(self.lengths.long);
        for length in [whole, self.lengths.shorter].into_iter().flatten().filter(|_| self.quantises) {
            let quantised = |micro| (self.quantised_tier(micro, length), Rule::Careful);
            tiers.extend(self.small_batches().map(quantised));
        }
        if self.request.allow.emergency && !self.request.pins.leave_nothing_to_size() {
            tiers.push((self.emergency_tier(), Rule::Careful));
        }
        let mut candidates = tiers
            .into_iter()
            .map(|(tier, rule)| self.candidate(tier, rule))
            .collect::<Result<Vec<_>, _>>()?;
        self.admit(&mut candidates);
        Ok(candidates)
    }

    /// Settles what each rung has to fit by, and whether it does.
    fn admit(&self, candidates: &mut [Candidate]) {
        // What the rungs below need at least.
        let mut below: Option<Bytes> = None;
        for candidate in candidates.iter_mut().rev() {
            let guess = candidate.estimate.device_peak_bytes;
            let is_larger = matches!(candidate.rule, Rule::Larger { .. });
            if !is_larger && guess < candidate.needed && below.is_none_or(|below| guess <= below) {
                (candidate.basis, candidate.needed) = (Basis::NothingSafer, guess);
            }
            let worth_it = self.is_worth_it(candidate.rule);
            candidate.admitted = worth_it && candidate.needed <= self.request.card.free;
            if worth_it {
                below = Some(below.map_or(candidate.needed, |below| below.min(candidate.needed)));
            }
        }
    }

    /// Returns whether a rung is taken where it fits.
    fn is_worth_it(&self, rule: Rule) -> bool {
        match rule {
            Rule::Larger { gain } => gain >= self.book.ladder.throughput_gain_min,
            Rule::Presumed | Rule::LongerForData | Rule::Careful => true,
        }
    }

    /// Returns the micro-batches that are tried once the rows are as short as they may be: larger ones need more than a
    /// small one of longer rows does.
    fn small_batches(&self) -> impl Iterator<Item = u32> {
        let smallest = self.batches.micro.last().copied();
        let most = self.book.profiles.shorter.micro_batch_max;
        let pinned = self.batches.pinned;
        self.batches
            .micro
            .iter()
            .copied()
            .filter(move |micro| pinned || *micro <= most || Some(*micro) == smallest)
    }

    fn fewer_targets_tier(&self, micro: u32, max_length: u32) -> Tier {
        let tier = self.standard_tier(Profile::FewerTargets, micro, max_length);
        Tier { adapters: self.fewest.clone(), ..tier }
    }

    fn quantised_tier(&self, micro: u32, max_length: u32) -> Tier {
        let tier = self.standard_tier(Profile::Quantized, micro, max_length);
        Tier { quant_bits: Some(QUANT_BITS), ..tier }
    }

    fn candidate(&self, tier: Tier, rule: Rule) -> Result<Candidate, PlanError> {
        let estimate = self.estimate(&tier)?;
        let rules = &self.book.ladder;
        let basis = match rule {
            // A machine that has seen this model knows its risk, so nothing has to be presumed, or spared.
            _ if self.reserve(&tier).knows_model(tier.liger_kernel) => Basis::Risk(rules.known_risk_share),
            Rule::Presumed | Rule::LongerForData => Basis::BestGuess,
            Rule::Careful => Basis::Risk(1.0),
            Rule::Larger { .. } => Basis::Risk(rules.larger_risk_share),
        };
        let (basis, needed) = match basis {
            Basis::BestGuess | Basis::NothingSafer => (basis, estimate.device_peak_bytes),
            // More than even odds are no admission.
            Basis::Risk(share) => {
                let risk = (share * self.request.oom_risk).min(self.request.oom_risk.max(0.5));
                (Basis::Risk(risk), estimate.admission_bytes(risk))
            }
        };
        let relative_time = self.timing().of(&tier);
        Ok(Candidate { tier, rule, estimate, relative_time, basis, needed, admitted: false })
    }

    fn estimate(&self, tier: &Tier) -> Result<Estimate, EstimateError> {
        self.estimate_for(tier, self.longest_row)
    }

    fn estimate_for(&self, tier: &Tier, longest_row: Option<u32>) -> Result<Estimate, EstimateError> {
        let Request { model, train_type, features, .. } = self.request;
        let work = workload(*train_type, features.experts, tier, longest_row);
        estimate_with(model, &work, &self.reserve(tier))
    }

    /// Returns what a rung would need if rows were as long as they may be; `None` where that is what is predicted.
    fn full_rows_peak(&self, tier: &Tier) -> Option<Bytes> {
        let is_less = pass_row(tier, self.longest_row) < tier.max_length;
        // A pass that is too large for any machine is predicted nowhere, so nothing is compared with it.
        is_less
            .then(|| self.estimate_for(tier, None).ok())
            .flatten()
            .map(|estimate| estimate.device_peak_bytes)
    }

    fn reserve(&self, tier: &Tier) -> Reserve<'_> {
        let next = if tier.packing { &self.packed } else { &self.unpacked };
        let next = &next[usize::from(tier.quant_bits.is_some())];
        Reserve { group: next.group, history: Some((next, &self.history.observations)) }
    }

    fn accumulation(&self, micro: u32) -> u32 {
        let passes = self.effective_batch.div_ceil(u64::from(micro.max(1)));
        self.request.pins.accumulation.unwrap_or_else(|| u32::try_from(passes).unwrap_or(u32::MAX))
    }

    fn standard_tier(&self, name: Profile, micro: u32, max_length: u32) -> Tier {
        let asked = self.book.asked(self.request.learning, self.request.save);
        let values = self.book.standard_values(self.class, &asked);
        let attention = self.attention;
        self.tier(name, micro, max_length, attention.packing, attention.attn_impl, &values)
    }

    fn emergency_tier(&self) -> Tier {
        let asked = self.book.asked(self.request.learning, self.request.save);
        let values = self.book.emergency_values(&asked);
        let micro = if self.batches.pinned {
            self.batches.own
        } else {
            self.smallest(self.book.profiles.emergency.micro_batch)
        };
        let attention = self.attention;
        let tier = self.tier(
            Profile::Emergency,
            micro,
            self.lengths.emergency,
            attention.emergency_packing,
            attention.emergency_attn_impl,
            &values,
        );
        Tier { adapters: self.fewest.clone(), quant_bits: self.quantises.then_some(QUANT_BITS), ..tier }
    }

    /// Returns the largest divisor of the effective batch up to `micro`, so that E stays what it is.
    fn smallest(&self, micro: u32) -> u32 {
        (1..=micro).rev().find(|rows| self.effective_batch.is_multiple_of(u64::from(*rows))).unwrap_or(1)
    }

    fn timing(&self) -> Cost<'_> {
        Cost::new(self.request, &self.book.ladder)
    }

    fn tier(
        &self,
        name: Profile,
        micro_batch: u32,
        max_length: u32,
        packing: bool,
        attn_impl: AttnImpl,
        values: &Values,
    ) -> Tier {
        let (pins, standard) = (&self.request.pins, &self.book.profiles.standard);
        let mixture = self.request.model.shape.experts.is_some();
        Tier {
            name,
            micro_batch,
            accumulation: self.accumulation(micro_batch),
            world_size: 1,
            max_length,
            packing,
            attn_impl,
            torch_dtype: self.dtype,
            gradient_checkpointing: pins.gradient_checkpointing.unwrap_or(standard.gradient_checkpointing),
            liger_kernel: self.liger,
            quant_bits: None,
            learning_rate: pins.learning_rate.or(values.learning_rate).unwrap_or(standard.learning_rate),
            warmup_ratio: pins.warmup_ratio.or(values.warmup_ratio).unwrap_or(standard.warmup_ratio),
            max_grad_norm: pins.max_grad_norm.or(values.max_grad_norm),
            num_train_epochs: pins.num_train_epochs.unwrap_or(standard.num_train_epochs),
            save_steps: pins.save_steps.or(values.save_steps).unwrap_or(standard.save_steps),
            save_total_limit: pins
                .save_total_limit
                .or(values.save_total_limit)
                .unwrap_or(standard.save_total_limit),
            logging_steps: pins.logging_steps.or(values.logging_steps).unwrap_or(standard.logging_steps),
            router_aux_loss_coef: pins
                .router_aux_loss_coef
                .or(mixture.then_some(self.book.mixture.router_aux_loss_coef)),
            adapters: self.adapters.clone(),
        }
    }

    /// Returns the first rung that is admitted, else the last resort.
    fn choose(&self, candidates: &[Candidate]) -> Result<usize, PlanError> {
        if let Some(index) = candidates.iter().position(|candidate| candidate.admitted) {
            return Ok(index);
        }
        let free = self.request.card.free;
        let smallest =
            candidates.iter().min_by_key(|candidate| candidate.needed).ok_or(PlanError::Unusable {
                what: "tiers.toml",
                found: "without a rung for this job".to_owned(),
                expected: "a book with micro-batches for its class",
            })?;
        let resident = smallest.estimate.resident_bytes();
        if resident > free {
            return Err(PlanError::WeightsDoNotFit {
                model: self.request.model.name.clone(),
                card: self.card(),
                needed: resident,
                free,
                help: self.what_would_help(smallest.needed),
            });
        }
        let is_emergency = |last: &Candidate| last.tier.name == Profile::Emergency;
        let tried = candidates.last().filter(|last| is_emergency(last)).map(|_| self.last_resort(candidates));
        match tried.filter(|index| !self.is_pinned_out_of_reach(&candidates[*index])) {
            Some(index) => Ok(index),
            None => Err(PlanError::NothingFits {
                card: self.card(),
                tier: smallest.tier.to_string(),
                needed: smallest.needed,
                free,
                costs: self.cost_of_pins(&smallest.tier),
                help: self.what_would_help(smallest.needed),
            }),
        }
    }

    /// Returns whether pins make a last resort of more than the emergency profile's own, and even the low end of what it may
    /// need is more than what is free: then the pins are wrong, not the prediction.
    fn is_pinned_out_of_reach(&self, candidate: &Candidate) -> bool {
        let (tier, frugal) = (&candidate.tier, &self.book.profiles.emergency);
        let more_rows = self.batches.pinned && tier.micro_batch > frugal.micro_batch;
        let longer_rows = self.pinned_length() && tier.max_length > frugal.max_length;
        (more_rows || longer_rows) && candidate.estimate.low_bytes > self.request.card.free
    }

    /// Returns the rung that is tried although nothing fits: the emergency rung, unless this machine knows better.
    ///
    /// Its single rows are mostly shorter than they may be, so without knowledge it is the likeliest to fit, whatever is
    /// predicted. Where runs of this model packed and not packed were seen, the one that needs least is.
    fn last_resort(&self, candidates: &[Candidate]) -> usize {
        let last = candidates.len() - 1;
        let known = |index: usize| {
            let tier: &Tier = &candidates[index].tier;
            self.reserve(tier).knows_model(tier.liger_kernel)
        };
        let guess = |index: &usize| candidates[*index].estimate.device_peak_bytes;
        if !known(last) {
            return last;
        }
        // Of equals the last.
        (0..=last).rev().filter(|index| known(*index)).min_by_key(guess).unwrap_or(last)
    }

    fn card(&self) -> String {
        match self.request.card.index {
            Some(index) => format!("GPU {index} ({})", self.request.card.name),
            None => self.request.card.name.clone(),
        }
    }

    /// Returns what each pin of `tier` costs against the most frugal value, as the end of a sentence.
    fn cost_of_pins(&self, tier: &Tier) -> String {
        let pins = &self.request.pins;
        let frugal = &self.book.profiles.emergency;
        let mut released: Vec<(String, Tier)> = Vec::new();
        if self.batches.pinned && tier.micro_batch > 1 {
            let text = format!("micro-batch {} instead of 1", tier.micro_batch);
            released.push((text, Tier { micro_batch: 1, ..tier.clone() }));
        }
        if tier.max_length > frugal.max_length && self.pinned_length() {
            let text = format!("max_length {} instead of {}", tier.max_length, frugal.max_length);
            released.push((text, Tier { max_length: frugal.max_length, ..tier.clone() }));
        }
        if pins.gradient_checkpointing == Some(false) {
            let text = "gradient_checkpointing false instead of true".to_owned();
            released.push((text, Tier { gradient_checkpointing: true, ..tier.clone() }));
        }
        if pins.torch_dtype == Some(Dtype::Float32) {
            let text = "torch_dtype float32 instead of bfloat16".to_owned();
            released.push((text, Tier { torch_dtype: Dtype::Bfloat16, ..tier.clone() }));
        }
        if pins.attn_impl == Some(AttnImpl::Eager) {
            let text = "attn_impl eager instead of sdpa".to_owned();
            released.push((text, Tier { attn_impl: AttnImpl::Sdpa, ..tier.clone() }));
        }
        let costs: Vec<String> =
            released.into_iter().filter_map(|(text, other)| self.cost(tier, &text, &other)).collect();
        if costs.is_empty() { String::new() } else { format!("; of that, {}", costs.join(", ")) }
    }

    fn cost(&self, tier: &Tier, text: &str, released: &Tier) -> Option<String> {
        let need = |tier| Some(self.estimate(tier).ok()?.device_peak_bytes);
        let saved = need(tier)?.checked_sub(need(released)?)?;
        (saved > Bytes::ZERO).then(|| format!("{text} (pinned) costs {saved}"))
    }

    fn pinned_length(&self) -> bool {
        self.request.pins.max_length.is_some() || matches!(self.request.length, Length::Tokens(_))
    }

    fn what_would_help(&self, needed: Bytes) -> String {
        let missing = as_shown(needed.saturating_sub(self.request.card.free));
        let mut ways = Vec::new();
        // No one can free what the card does not have.
        if needed <= self.request.card.total {
            let held = self.request.held_by_others;
            let holders =
                if held > Bytes::ZERO { format!(" (other processes hold {held})") } else { String::new() };
            ways.push(format!("free {missing} more on {}{holders}", self.card()));
        }
        match (self.request.train_type, self.request.model.can_be_packed()) {
            (TrainType::Full, true) => ways.push("train adapters (`train_type` lora or qlora)".to_owned()),
            (TrainType::Full, false) => ways.push("train adapters (`train_type` lora)".to_owned()),
            (TrainType::Lora, true) => {
                ways.push("pack the weights into 4 bits (`train_type` qlora)".to_owned());
            }
            (TrainType::Lora, false) | (TrainType::Qlora, _) => {}
        }
        if self.pinned_length() {
            ways.push("unpin the length".to_owned());
        } else if !self.request.allow.shorter_max_length {
            ways.push("allow shorter rows (`allow.shorter_max_length`)".to_owned());
        }
        if self.batches.pinned {
            ways.push("unpin the batch".to_owned());
        }
        if !self.request.allow.emergency {
            ways.push("allow the emergency profile (`allow.emergency`)".to_owned());
        }
        if !self.liger && self.request.features.liger {
            ways.push("allow Liger's fused loss (`allow.liger`)".to_owned());
        }
        ways.push("take a smaller model or a larger card".to_owned());
        one_of(&ways)
    }

    fn rungs(&self, candidates: &[Candidate], chosen: usize) -> Vec<Rung> {
        let rung = |(index, candidate): (usize, &Candidate)| Rung {
            tier: candidate.tier.clone(),
            predicted_peak_bytes: candidate.estimate.device_peak_bytes,
            admission_bytes: candidate.needed,
            fits: candidate.admitted,
            worth_it: self.is_worth_it(candidate.rule),
            relative_time: candidate.relative_time,
            row_tokens: self.timing().row_tokens(&candidate.tier),
            full_rows_peak_bytes: self.full_rows_peak(&candidate.tier),
            why: self.why(candidate, index.cmp(&chosen)),
            estimate: candidate.estimate.clone(),
        };
        candidates.iter().enumerate().map(rung).collect()
    }

    /// Returns why a rung is, or is not, taken, with both numbers.
    fn why(&self, candidate: &Candidate, place: Ordering) -> String {
        let free = self.request.card.free;
        let basis = match candidate.basis {
            Basis::BestGuess => "best guess".to_owned(),
            Basis::NothingSafer => "best guess, because nothing below needs less".to_owned(),
            Basis::Risk(risk) => format!("at {} risk", percent(risk)),
        };
        let numbers = format!("needs {} ({basis}), {free} are free", candidate.needed);
        let emergency = candidate.tier.name == Profile::Emergency;
        match (place, candidate.admitted, candidate.rule) {
            (Ordering::Equal, true, _) if emergency => format!("taken, nothing better fits: {numbers}"),
            (Ordering::Equal, true, _) => format!("taken: {numbers}"),
            (Ordering::Equal, false, _) => format!("tried once although nothing fits: {numbers}"),
            (Ordering::Greater, true, _) => format!("in reserve: {numbers}"),
            (Ordering::Greater, false, _) if emergency => {
                format!("in reserve, as the last resort: {numbers}")
            }
            // Whatever is free: to say "refused: needs …" would send people to look for memory that changes nothing.
            (_, false, Rule::Larger { gain }) if !self.is_worth_it(candidate.rule) => format!(
                "not worth it on any card: {} than {}; {numbers}",
                faster(gain),
                if candidate.tier.gradient_checkpointing {
                    "the next smaller micro-batch"
                } else {
                    "the class's own batch with checkpointing"
                }
            ),
            (Ordering::Less, _, _) | (Ordering::Greater, false, _) => format!("refused: {numbers}"),
        }
    }

    /// Returns what differs from the recipe or from what the job asked.
    fn notes(&self, candidates: &[Candidate], chosen: usize) -> Vec<String> {
        let mut notes = self.notes.clone();
        let Some(taken) = candidates.get(chosen) else { return notes };
        notes.extend(self.note_on_data(taken));
        notes.extend(self.note_on_longest_row(candidates));
        notes.extend(self.history.learned(self.request, &taken.tier, &taken.estimate).sentence());
        let free = self.request.card.free;
        let first = candidates.iter().find(|candidate| candidate.rule == Rule::Presumed);
        let is_lower = taken.rule != Rule::LongerForData;
        if let Some(first) = first.filter(|first| is_lower && first.tier != taken.tier) {
            let relation = if first.admitted { "would fit" } else { "does not fit" };
            notes.push(format!(
                "{} is taken instead of the class's own {}, which needs {} (best guess) and {relation} in the {free} \
                 that are free",
                taken.tier, first.tier, first.estimate.device_peak_bytes
            ));
            notes.extend(self.note_on_speed(first, taken));
            notes.extend(what_changes(&first.tier, &taken.tier));
            notes.extend(self.liger_hint(&first.tier));
        }
        if self.request.held_by_others > Bytes::ZERO {
            notes.push(format!("other processes hold {} on this card", self.request.held_by_others));
        }
        notes
    }

    /// Returns what the rows of the data changed about the rung that is taken.
    fn note_on_data(&self, taken: &Candidate) -> Option<String> {
        let data = self.request.data.as_ref()?;
        let (standard, length) = (self.lengths.standard?, taken.tier.max_length);
        (taken.rule == Rule::LongerForData).then(|| {
            let gained = data.rows_over(standard) - data.rows_over(length);
            format!(
                "rows may have {length} tokens instead of {standard}: that keeps {gained} rows more, and the class's own \
                 batch fits"
            )
        })
    }

    /// Returns that rows were not taken for as long as they may be, where that made a difference.
    fn note_on_longest_row(&self, candidates: &[Candidate]) -> Option<String> {
        let data = self.request.data.as_ref()?;
        let row = self.longest_row?;
        candidates.iter().any(|candidate| pass_row(&candidate.tier, self.longest_row) < candidate.tier.max_length).then(
            || {
                format!(
                    "rows that are not packed are sized with {row} tokens: every row of the data was counted, and the \
                     longest has {}",
                    data.longest()
                )
            },
        )
    }

    /// Returns a hint when Liger's fused loss would let the class's own batch in.
    fn liger_hint(&self, tier: &Tier) -> Option<String> {
        if self.liger || !self.request.features.liger || self.request.pins.liger_kernel.is_some() {
            return None;
        }
        let with = Tier { liger_kernel: true, ..tier.clone() };
        let need = self.estimate(&with).ok()?.device_peak_bytes;
        (need <= self.request.card.free).then(|| {
            format!("with `allow.liger` {tier} would need {need} and fit, because Liger never holds all logits at once")
        })
    }
}

/// Returns a list as the end of a sentence: `a, b, or c`.
fn one_of(ways: &[String]) -> String {
    match ways {
        [all @ .., last] if !all.is_empty() => format!("{}, or {last}", all.join(", ")),
        _ => ways.concat(),
    }
}

fn faster(gain: f64) -> String {
    if gain < 0.0 { format!("{} slower", percent(-gain)) } else { format!("only {} faster", percent(gain)) }
}

fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if (percent - percent.round()).abs() < 0.05 {
        format!("{percent:.0} %")
    } else {
        format!("{percent:.1} %")
    }
}

/// Returns what a lower rung changes about the training beside the batch.
fn what_changes(from: &Tier, to: &Tier) -> Vec<String> {
    let mut changes = Vec::new();
    if to.max_length != from.max_length {
        changes.push(format!(
            "rows are at most {} tokens instead of {}: longer ones are left out",
            to.max_length, from.max_length
        ));
    }
    if to.packing != from.packing {
        changes.push("rows are not packed: there are more steps, and each is less full".to_owned());
    }
    if to.quant_bits != from.quant_bits {
        changes.push("the base weights are packed into 4 bits, as `allow.quantize` lets: the adapters learn on top of rounded \
                      ones".to_owned());
    }
    if let (Some(to), Some(from)) = (&to.adapters, &from.adapters)
        && to.target_modules != from.target_modules
    {
        changes.push(format!(
            "adapters are on {} instead of {}: less is trained (recipe 8.4)",
            to.target_modules, from.target_modules
        ));
    }
    if to.learning_rate != from.learning_rate {
        changes.push(format!(
            "the learning rate is {:e} instead of {:e} (the emergency profile's)",
            to.learning_rate, from.learning_rate
        ));
    }
    changes
}
