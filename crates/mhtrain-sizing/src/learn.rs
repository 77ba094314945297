//! What do earlier runs on this machine say about the next one?
//!
//! The logarithm of reserved / predicted is taken for normal. The published prior of the group is one voice; runs of the
//! same model with the same versions are the next; runs of its family, of anything with the same versions, and of the
//! same model with other versions are voices too, each less sure by what such runs are known to differ. A voice of n runs
//! has the variance `difference^2 + noise^2 / n`; voices are weighed by the inverse of their variances (the posterior of
//! normal means). So a new version of torch, transformers, ms-swift or flash-attn takes the surest voice away and the
//! interval is wide again, until the first run with it.
//!
//! A run that died says only that its peak was above a limit: the normal is cut there and matched by its moments
//! (Minka 2001, expectation propagation, one step).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::estimate::Z_95;
use crate::observation::{Fingerprint, Observation, Reading};
use crate::reserve::Ratio;
use crate::units::Bytes;

/// How near a run is to the one that is predicted, nearest first.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nearness {
    /// Same model, method, batches and versions.
    SameModel,
    /// Same family, method, batches and versions.
    SameFamily,
    /// Same batches and versions.
    SameVersions,
    /// Same model, method and batches; a version differs.
    OtherVersions,
}

impl Nearness {
    const ALL: [Nearness; 4] =
        [Nearness::SameModel, Nearness::SameFamily, Nearness::SameVersions, Nearness::OtherVersions];

    /// Returns how near a run is; `None` when it says nothing about the other.
    pub fn of(run: &Fingerprint, next: &Fingerprint) -> Option<Nearness> {
        if run.group != next.group {
            return None;
        }
        let same_method = run.method == next.method;
        let same_model = same_method && run.model == next.model;
        match (same_model, run.versions == next.versions) {
            (true, true) => Some(Nearness::SameModel),
            (true, false) => Some(Nearness::OtherVersions),
            (false, true) if same_method && run.family == next.family => Some(Nearness::SameFamily),
            (false, true) => Some(Nearness::SameVersions),
            (false, false) => None,
        }
    }

    /// Returns the standard deviation of the log ratio between such runs.
    ///
    /// Set by judgement; the one check on it is the spread inside a group of the published figures, where models of one
    /// framework and group differ by a standard deviation of 0.12 (packed or equal rows): another model of the same
    /// versions 0.10, of the same family half of that, a new version in between.
    fn difference(self) -> f64 {
        match self {
            Nearness::SameModel => 0.0,
            Nearness::SameFamily => 0.05,
            Nearness::SameVersions => 0.10,
            Nearness::OtherVersions => 0.08,
        }
    }
}

impl fmt::Display for Nearness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Nearness::SameModel => "of this model",
            Nearness::SameFamily => "of its family",
            Nearness::SameVersions => "of other models",
            Nearness::OtherVersions => "of this model with other versions",
        })
    }
}

/// Another card of the same versions: standard deviation of the log ratio, by judgement.
const CARD_DIFFERENCE: f64 = 0.02;

/// Noise between runs of the same thing: standard deviation of the log ratio before any run was seen, and how many runs
/// that belief is worth.
const NOISE: f64 = 0.02;
const NOISE_RUNS: f64 = 6.0;

/// What one observation did to the prediction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Name of the observation.
    pub name: String,
    /// How near it is.
    pub nearness: Nearness,
    /// The ratio that it shows; a lower limit when `at_least`.
    pub ratio: f64,
    /// It ran out of memory, so the ratio was more than that.
    pub at_least: bool,
    /// Its share in the prediction, 0 to 1; of a lower limit 0 or 1: whether it moved the prediction.
    pub weight: f64,
}

/// A ratio corrected by earlier runs, and which of them moved it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Best guess and 90 % interval for the next run.
    pub ratio: Ratio,
    /// What was believed before any run.
    pub prior: Ratio,
    /// The observations that moved it, the heaviest first.
    pub evidence: Vec<Evidence>,
}

impl Learned {
    /// Returns what moved the prediction, as a sentence; `None` when nothing did.
    pub fn sentence(&self) -> Option<String> {
        let heaviest = self.evidence.first()?;
        let runs = self.evidence.len();
        let names: Vec<&str> = self.evidence.iter().take(3).map(|evidence| evidence.name.as_str()).collect();
        let more =
            if runs > names.len() { format!(" and {} more", runs - names.len()) } else { String::new() };
        Some(format!(
            "reserved memory is taken as {:.2} times the allocated ({:.2} to {:.2}) instead of {:.2} ({:.2} to {:.2}), \
             because of {}{more} ({})",
            self.ratio.guess,
            self.ratio.low,
            self.ratio.high,
            self.prior.guess,
            self.prior.low,
            self.prior.high,
            names.join(", "),
            heaviest.nearness
        ))
    }
}

/// Standard deviations beyond the runs that came through from where an out-of-memory death is not about the ratio. By
/// judgement.
const OUTLIER: f64 = 6.0;

/// A limit that moves the best guess leaves at least this part of the move as standard deviation. By judgement.
const SURPRISE: f64 = 3.0;

/// Runs of one nearness.
struct Voice {
    nearness: Nearness,
    /// Indices into the observations, with the logarithm of the ratio.
    runs: Vec<(usize, f64)>,
    mean: f64,
    variance: f64,
}

/// Returns the ratio for the next run of `next`, from `prior` and `observations`.
pub fn learn(prior: Ratio, next: &Fingerprint, observations: &[Observation]) -> Learned {
    let mut exact: Vec<Vec<(usize, f64)>> = vec![Vec::new(); Nearness::ALL.len()];
    let mut limits: Vec<(usize, Nearness, f64)> = Vec::new();
    for (index, observation) in observations.iter().enumerate() {
        let Some(nearness) = Nearness::of(&observation.fingerprint, next) else { continue };
        match observation.reading() {
            Some(Reading::Exactly(ratio)) => exact[nearness as usize].push((index, ratio.ln())),
            Some(Reading::MoreThan(ratio)) => limits.push((index, nearness, ratio.ln())),
            None => {}
        }
    }
    let noise = noise(&exact);
    let voices = voices(exact, noise.variance, next, observations);
    let belief = Belief::of(prior);
    let (mut mean, mut variance) = belief.weighed(&voices);
    let mut evidence = evidence_of(&voices, variance, observations);
    for (index, nearness, limit) in limits {
        let slack = noise.variance + nearness.difference().powi(2);
        // Runs of the same model that came through say more than one that died of something else, for example an evaluation.
        let told = voices.iter().find(|voice| voice.nearness == Nearness::SameModel);
        if told.is_some_and(|voice| limit - voice.mean > OUTLIER * (voice.variance + slack).sqrt()) {
            continue;
        }
        let (moved_mean, moved_variance) = above(mean, variance, limit, slack);
        let step = moved_mean - mean;
        let moved = step.abs() > 0.001;
        // How much more it was is not known: the further from what was believed, the less.
        (mean, variance) = (moved_mean, moved_variance.max((step / SURPRISE).powi(2)));
        if moved {
            evidence.push(Evidence {
                name: observations[index].name.clone(),
                nearness,
                ratio: limit.exp(),
                at_least: true,
                weight: 1.0,
            });
        }
    }
    if evidence.is_empty() {
        return Learned { ratio: prior, prior, evidence };
    }
    Learned { ratio: belief.predicts(mean, variance, &noise), prior, evidence }
}

/// Returns what a CUDA context takes, in bytes, from runs on the same kind of card with the same versions; `None` without
/// any.
///
/// The median, because each figure is the difference of two readings that may be of different moments. Its interval is
/// by judgement: the same kernels are loaded, and workspaces differ by some tens of MiB from job to job.
pub fn learned_context(next: &Fingerprint, observations: &[Observation]) -> Option<Ratio> {
    let same = |run: &Fingerprint| run.card == next.card && run.versions == next.versions;
    let mut seen: Vec<Bytes> = observations
        .iter()
        .filter(|observation| same(&observation.fingerprint))
        .filter_map(Observation::context)
        .collect();
    seen.sort_unstable();
    let guess = seen.get(seen.len() / 2)?.as_f64();
    Some(Ratio { low: 0.85 * guess, guess, high: 1.15 * guess })
}

/// The prior as a normal on the logarithm, with another spread below than above.
struct Belief {
    mean: f64,
    variance: f64,
    below: f64,
    above: f64,
}

impl Belief {
    fn of(prior: Ratio) -> Belief {
        let (low, guess, high) = (prior.low.ln(), prior.guess.ln(), prior.high.ln());
        let (below, above) = ((guess - low) / Z_95, (high - guess) / Z_95);
        let variance = f64::midpoint(below, above).powi(2).max(1e-6);
        Belief { mean: guess, variance, below: below.max(1e-6), above: above.max(1e-6) }
    }

    /// Returns mean and variance after all voices.
    fn weighed(&self, voices: &[Voice]) -> (f64, f64) {
        // Runs that contradict the prior make it less sure instead of being pulled to it.
        let conflict = voices.iter().map(|voice| (voice.mean - self.mean).powi(2)).fold(0.0, f64::max);
        let prior_weight = 1.0 / if voices.is_empty() { self.variance } else { self.variance.max(conflict) };
        let weights: f64 = prior_weight + voices.iter().map(|voice| 1.0 / voice.variance).sum::<f64>();
        let sum =
            prior_weight * self.mean + voices.iter().map(|voice| voice.mean / voice.variance).sum::<f64>();
        (sum / weights, 1.0 / weights)
    }

    /// Returns the interval for the next run. As long as the prior has a say its lop-sidedness stays.
    fn predicts(&self, mean: f64, variance: f64, noise: &Noise) -> Ratio {
        let share = (variance / self.variance).clamp(0.0, 1.0);
        let spread = (variance + noise.variance).sqrt();
        let middle = self.variance.sqrt();
        let side = |own: f64| 1.0 + share * (own / middle - 1.0);
        let reach = noise.reach() * spread;
        Ratio {
            low: (mean - reach * side(self.below)).exp(),
            guess: mean.exp(),
            high: (mean + reach * side(self.above)).exp(),
        }
    }
}

/// Noise between runs of the same thing.
struct Noise {
    variance: f64,
    degrees: f64,
}

impl Noise {
    /// Returns the 95th percentile of Student's t for what is known about the variance.
    ///
    /// Source: Abramowitz and Stegun 1964, formula 26.7.5, first term.
    fn reach(&self) -> f64 {
        Z_95 * (1.0 + (Z_95 * Z_95 + 1.0) / (4.0 * self.degrees))
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of runs")]
fn noise(exact: &[Vec<(usize, f64)>]) -> Noise {
    let same = &exact[Nearness::SameModel as usize];
    let n = same.len() as f64;
    let mean = same.iter().map(|(_, x)| x).sum::<f64>() / n.max(1.0);
    let squares: f64 = same.iter().map(|(_, x)| (x - mean).powi(2)).sum();
    let degrees = NOISE_RUNS + (n - 1.0).max(0.0);
    Noise { variance: (NOISE_RUNS * NOISE * NOISE + squares) / degrees, degrees }
}

#[expect(clippy::cast_precision_loss, reason = "counts of runs")]
fn voices(
    exact: Vec<Vec<(usize, f64)>>,
    noise: f64,
    next: &Fingerprint,
    observations: &[Observation],
) -> Vec<Voice> {
    let voice = |(nearness, runs): (Nearness, Vec<(usize, f64)>)| {
        let n = runs.len() as f64;
        let mean = runs.iter().map(|(_, x)| x).sum::<f64>() / n;
        let foreign = runs.iter().all(|(index, _)| observations[*index].fingerprint.card != next.card);
        let card = if foreign { CARD_DIFFERENCE * CARD_DIFFERENCE } else { 0.0 };
        let variance = nearness.difference().powi(2) + card + noise / n;
        Voice { nearness, runs, mean, variance }
    };
    Nearness::ALL.into_iter().zip(exact).filter(|(_, runs)| !runs.is_empty()).map(voice).collect()
}

#[expect(clippy::cast_precision_loss, reason = "counts of runs")]
fn evidence_of(voices: &[Voice], variance: f64, observations: &[Observation]) -> Vec<Evidence> {
    let mut evidence: Vec<Evidence> = voices
        .iter()
        .flat_map(|voice| {
            let weight = variance / voice.variance / voice.runs.len() as f64;
            voice.runs.iter().map(move |(index, x)| Evidence {
                name: observations[*index].name.clone(),
                nearness: voice.nearness,
                ratio: x.exp(),
                at_least: false,
                weight,
            })
        })
        .filter(|evidence| evidence.weight > 0.005)
        .collect();
    evidence.sort_by(|a, b| b.weight.total_cmp(&a.weight));
    evidence
}

/// Returns mean and variance of a normal after one draw from it, with noise of variance `slack`, was above `limit`.
fn above(mean: f64, variance: f64, limit: f64, slack: f64) -> (f64, f64) {
    let spread = (variance + slack).sqrt();
    let alpha = (limit - mean) / spread;
    let hazard = hazard(alpha);
    let moved = mean + variance / spread * hazard;
    let left = variance - variance * variance / (spread * spread) * hazard * (hazard - alpha);
    (moved, left.max(variance * 1e-3))
}

/// Returns density over upper tail of the standard normal distribution.
fn hazard(x: f64) -> f64 {
    if x > 6.0 {
        // Mills' ratio: x + 1/x - 2/x^3.
        return x + 1.0 / x - 2.0 / x.powi(3);
    }
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    density / upper_tail(x).max(1e-12)
}

/// Returns the upper tail of the standard normal distribution, to 7.5e-8.
///
/// Source: Abramowitz and Stegun 1964, formula 26.2.17.
pub fn upper_tail(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let series = t
        * (0.319_381_530
            + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt() * series;
    if x >= 0.0 { tail } else { 1.0 - tail }
}
