//! Does the plan take the rung that one would take who knew the truth?
//!
//! Random jobs on random simulated hosts. The truth is the simulated allocated peak times a ratio of the host (log-normal,
//! sd 10 %, around 1.1) times the noise of a run (sd 2 %), plus the CUDA context. The oracle knows that
//! product and takes the first rung of the same ladder that fits. A death costs one minute, and so does each start, against an hour of training at full
//! speed; a pass of T tokens runs at T / (T + 256) of it, the ladder's own cost model.

use std::io::Write;

use anyhow::Context;
use mhtrain_sizing::estimate::{CONTEXT, estimate};
use mhtrain_sizing::gpu::{Card, ComputeCapability};
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::observation::{Observation, Seen};
use mhtrain_sizing::plan::{History, Plan, after_oom, plan, plan_learned, workload};
use mhtrain_sizing::request::{Allow, Learning, Length, Pins, Request, Save, TrainerFeatures};
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::TrainType;

use crate::draws::Draws;

/// Arguments of `cargo xtask score-plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct ScorePlanArgs {
    /// Random cases.
    #[arg(long, default_value_t = 10_000)]
    cases: u32,
    /// Seed of the cases.
    #[arg(long, default_value_t = 0x9E37_79B9_7F4A_7C15)]
    seed: u64,
}

const MODELS: [&str; 12] = [
    "Qwen2.5-0.5B",
    "Qwen2.5-1.5B",
    "Qwen2.5-3B",
    "Qwen2.5-7B",
    "Qwen2.5-14B",
    "Qwen2.5-32B",
    "Qwen3-8B",
    "Llama-3.1-8B",
    "gemma-2-2b",
    "glm-4-9b",
    "Mistral-7B-v0.3",
    "Qwen3-30B-A3B",
];
const CARDS_GIB: [f64; 6] = [16.0, 24.0, 40.0, 48.0, 80.0, 141.0];
/// Minutes of training at full speed, of a start, and of a death.
const TRAINING: f64 = 60.0;
const START: f64 = 1.0;

/// A job on a host.
struct Case {
    request: Request,
    /// The host's ratios for packed and for unpacked rows.
    ratios: [f64; 2],
}

impl Case {
    fn draw(draws: &mut Draws) -> anyhow::Result<Case> {
        let total = draws.pick(&CARDS_GIB);
        let free = total * (0.55 + 0.44 * draws.uniform());
        let mut pins = Pins::default();
        if draws.uniform() < 0.1 {
            pins.max_length = Some(draws.pick(&[1024, 2048, 4096, 8192]));
        }
        let request = Request {
            model: Model::resolve(draws.pick(&MODELS), None, None).context("a model of the catalogue")?,
            card: Card {
                name: format!("card of {total} GiB"),
                index: Some(0),
                total: Bytes::from_f64(total * 1_073_741_824.0),
                free: Bytes::from_f64(free * 1_073_741_824.0),
                compute_capability: Some(ComputeCapability::AMPERE),
            },
            held_by_others: Bytes::ZERO,
            train_type: draws.pick(&[TrainType::Lora, TrainType::Lora, TrainType::Qlora, TrainType::Full]),
            length: Length::Standard,
            save: Save::Standard,
            learning: Learning::Standard,
            min_effective_batch: 32,
            allow: Allow::default(),
            pins: Pins { lora_rank: Some(draws.pick(&[8, 16, 64])), ..pins },
            features: TrainerFeatures { flash_attn: draws.uniform() < 0.8, liger: false, bitsandbytes: true },
            oom_risk: 0.10,
            data: None,
        };
        let mut ratio = || 1.1 * (0.1 * draws.normal()).exp();
        Ok(Case { request, ratios: [ratio(), ratio()] })
    }

    fn ratio(&self, tier: &Tier) -> f64 {
        self.ratios[usize::from(!tier.packing)]
    }

    /// Device need of a rung without a run's noise; `noise` is one run's factor.
    fn need(&self, allocated: Bytes, tier: &Tier, noise: f64) -> f64 {
        (allocated.as_f64() * self.ratio(tier) * noise).max(allocated.as_f64()) + CONTEXT.as_f64()
    }

    /// Three earlier runs of the same model for each way of forming batches.
    fn history(&self, plan: &Plan, draws: &mut Draws) -> History {
        let mut history = History::default();
        for rung in plan.rungs.iter().rev() {
            let seen = history
                .observations
                .iter()
                .filter(|seen| seen.tier.as_ref().is_some_and(|tier| tier.packing == rung.tier.packing));
            if seen.count() > 0 {
                continue;
            }
            for run in 1..=3 {
                let allocated = rung.estimate.allocated_peak_bytes;
                let reserved = allocated.as_f64() * self.ratio(&rung.tier) * (0.02 * draws.normal()).exp();
                history.observations.push(Observation {
                    name: format!("run {run}"),
                    fingerprint: history.fingerprint(&self.request, rung.tier.packing),
                    tier: Some(rung.tier.clone()),
                    predicted: allocated,
                    seen: Seen::Peak {
                        allocated: None,
                        reserved: Some(Bytes::from_f64(reserved)),
                        device: None,
                    },
                });
            }
        }
        history
    }
}

fn speed(tier: &Tier) -> f64 {
    let tokens = f64::from(tier.micro_batch) * f64::from(tier.max_length);
    tokens / (tokens + 256.0)
}

/// How a policy did over all cases.
#[derive(Default)]
struct Score {
    cases: f64,
    right: f64,
    died_first: f64,
    never: f64,
    lost: f64,
}

impl Score {
    /// Adds a case that took `deaths` deaths and ended at `speed` (`None`: it never ran), against the oracle's speed.
    fn add(&mut self, right: bool, deaths: u32, reached: Option<f64>, oracle: f64) {
        self.cases += 1.0;
        self.right += f64::from(u8::from(right));
        self.died_first += f64::from(u8::from(deaths > 0));
        let best = TRAINING / oracle + START;
        match reached {
            Some(reached) => {
                let took = TRAINING / reached + START * f64::from(deaths + 1) + f64::from(deaths);
                self.lost += (1.0 - best / took).max(0.0);
            }
            None => {
                self.never += 1.0;
                self.lost += 1.0;
            }
        }
    }

    fn print(&self, out: &mut impl Write, name: &str) -> std::io::Result<()> {
        let share = |count: f64| 100.0 * count / self.cases.max(1.0);
        writeln!(
            out,
            "{name:<38} {:>11.2} % {:>11.2} % {:>11.2} % {:>11.2} %",
            share(self.right),
            share(self.died_first),
            share(self.never),
            share(self.lost)
        )
    }
}

/// Prints how the plan and simpler policies do against an oracle.
///
/// # Errors
/// A model that is not in the catalogue.
pub(crate) fn run(args: &ScorePlanArgs) -> anyhow::Result<()> {
    let book = TierBook::builtin();
    let mut draws = Draws::new(args.seed);
    let mut scores: [Score; 5] = Default::default();
    let (mut impossible, mut refused) = (0u32, 0u32);
    for _ in 0..args.cases {
        let case = Case::draw(&mut draws)?;
        let mut roomy = case.request.clone();
        roomy.card.free = Bytes::from_gib(100_000);
        let Ok(whole) = plan(&roomy, &book) else { continue };
        let fits = |index: usize, noise: f64| {
            let rung = &whole.rungs[index];
            case.need(rung.estimate.allocated_peak_bytes, &rung.tier, noise)
                <= case.request.card.free.as_f64()
        };
        let last = whole.rungs.len() - 1;
        let noise = (0.02 * draws.normal()).exp();
        let oracle =
            (0..=last).find(|index| (whole.rungs[*index].fits || *index == last) && fits(*index, noise));
        let Some(oracle) = oracle else {
            impossible += 1;
            continue;
        };
        let best = speed(&whole.rungs[oracle].tier);
        let history = case.history(&whole, &mut draws);
        for (index, planned) in
            [plan(&case.request, &book), plan_learned(&case.request, &book, &history)].into_iter().enumerate()
        {
            let Ok(planned) = planned else {
                refused += u32::from(index == 0);
                scores[index].add(false, 0, None, best);
                continue;
            };
            let right = planned.chosen == oracle;
            let (mut at, mut deaths) = (Some(planned.chosen), 0);
            while let Some(index) = at.filter(|index| !fits(*index, noise)) {
                deaths += 1;
                let rung = &whole.rungs[index];
                let needed = case.need(rung.estimate.allocated_peak_bytes, &rung.tier, noise);
                at = after_oom(&planned, index, Some(Bytes::from_f64(needed)), Some(case.request.card.free));
            }
            scores[index].add(right, deaths, at.map(|index| speed(&whole.rungs[index].tier)), best);
        }
        let own = book.class_of(&case.request.model).micro_batch;
        let standard = whole.rungs.iter().find(|rung| rung.tier.micro_batch == own);
        let standard = standard.unwrap_or(&whole.rungs[0]).tier.clone();
        let shrinks: [fn(u32) -> u32; 3] = [|_| 0, |rows| rows / 2, |rows| rows * 9 / 10];
        for (offset, shrink) in shrinks.into_iter().enumerate() {
            let mut tier = standard.clone();
            if offset > 0 && case.request.pins.micro_batch.is_none() {
                tier.micro_batch = 8;
            }
            let mut deaths = 0;
            while tier.micro_batch > 0 {
                let said = estimate(&case.request.model, &workload(&case.request, &tier))?;
                if case.need(said.allocated_peak_bytes, &tier, noise) <= case.request.card.free.as_f64() {
                    break;
                }
                deaths += 1;
                tier.micro_batch = shrink(tier.micro_batch);
            }
            let reached = (tier.micro_batch > 0).then(|| speed(&tier));
            let right = tier == whole.rungs[oracle].tier;
            scores[2 + offset].add(right, deaths, reached, best);
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<38} {:>13} {:>13} {:>13} {:>13}",
        "", "oracle's rung", "died at first", "never ran", "time lost"
    )?;
    let names = [
        "the plan, nothing seen yet",
        "the plan after three runs",
        "the class's own row, fixed",
        "8 rows, halved at each death",
        "8 rows, x 0.9 at each death",
    ];
    for (name, score) in names.iter().zip(&scores) {
        score.print(&mut out, name)?;
    }
    writeln!(
        out,
        "{impossible} of {} cases fit on no rung and are left out; the cold plan refused {refused}",
        args.cases
    )?;
    Ok(())
}
