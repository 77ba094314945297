//! Does the plan take the rung that one would take who knew the truth?
//!
//! Random jobs on random simulated hosts. The truth is the simulated allocated peak times a ratio of the host (log-normal,
//! sd 10 %, around 1.1) times the noise of a run (sd 2 %), plus the host's CUDA context (sd 124 MiB, around 512). The oracle
//! knows that sum and takes the first rung of the same ladder that fits. A death costs one minute, and so does each start,
//! against an hour of training at the oracle's rung; how much slower another rung is, is the ladder's own cost model.
//!
//! Nobody but the oracle knows the noise of the run that is planned, so some cases lie inside of it. The ideal is one who knows
//! the laws that the hosts are drawn from, noise and context included, and has seen the same three runs: what it misses, nobody
//! can have.

use std::io::Write;

use anyhow::Context;
use mhtrain_sizing::cost::Cost;
use mhtrain_sizing::data::LengthProfile;
use mhtrain_sizing::estimate::{CONTEXT, estimate};
use mhtrain_sizing::gpu::{Card, ComputeCapability};
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::learn::upper_tail;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::observation::{Observation, Seen};
use mhtrain_sizing::plan::{History, Plan, after_oom, pass_row, plan, plan_learned, workload};
use mhtrain_sizing::request::{Allow, Learning, Length, Pins, Request, Save, TrainerFeatures};
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::{ExpertForm, TrainType};

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
    /// Every job has data whose longest row has so many tokens, and every row was counted.
    #[arg(long)]
    longest_row: Option<u32>,
    /// The rows are longer than was counted: as long as the rung lets them.
    #[arg(long, requires = "longest_row")]
    miscounted: bool,
    /// The plans take rows for as long as their rung lets them, as they do where nobody looked at the data.
    #[arg(long, requires = "longest_row", conflicts_with = "miscounted")]
    sized_full: bool,
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
/// Minutes of training at the oracle's rung, of a start, and of a death.
const TRAINING: f64 = 60.0;
const START: f64 = 1.0;
/// The laws that hosts and runs are drawn from: standard deviations, and the middle of the ratio.
const HOSTS: f64 = 0.1;
const RUNS: f64 = 0.02;
const RATIO: f64 = 1.1;
const CONTEXTS_MIB: f64 = 124.0;
/// Risks at which the ideal takes a rung.
const IDEAL_RISKS: [f64; 5] = [0.5, 0.3, 0.2, 0.15, 0.1];

/// A job on a host.
struct Case {
    request: Request,
    /// The host's ratios for packed and for unpacked rows.
    ratios: [f64; 2],
    /// The host's CUDA context, in bytes.
    context: f64,
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
            features: TrainerFeatures {
                flash_attn: draws.uniform() < 0.8,
                liger: false,
                bitsandbytes: true,
                experts: ExpertForm::Fused,
            },
            oom_risk: 0.10,
            data: None,
        };
        let mut ratio = || RATIO * (HOSTS * draws.normal()).exp();
        let ratios = [ratio(), ratio()];
        let context = CONTEXT.as_f64() + 1_048_576.0 * CONTEXTS_MIB * draws.normal();
        Ok(Case { request, ratios, context: context.max(0.5 * CONTEXT.as_f64()) })
    }

    fn ratio(&self, tier: &Tier) -> f64 {
        self.ratios[usize::from(!tier.packing)]
    }

    /// Device need of a rung without a run's noise; `noise` is one run's factor.
    fn need(&self, allocated: Bytes, tier: &Tier, noise: f64) -> f64 {
        (allocated.as_f64() * self.ratio(tier) * noise).max(allocated.as_f64()) + self.context
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
                let reserved = allocated.as_f64() * self.ratio(&rung.tier) * (RUNS * draws.normal()).exp();
                history.observations.push(Observation {
                    name: format!("run {run}"),
                    fingerprint: history.fingerprint(&self.request, rung.tier.packing),
                    tier: Some(rung.tier.clone()),
                    predicted: allocated,
                    sized_row: Some(pass_row(&rung.tier, plan.longest_row)),
                    seen: Seen::Peak {
                        allocated: None,
                        reserved: Some(Bytes::from_f64(reserved)),
                        device: Some(Bytes::from_f64(reserved + self.context)),
                    },
                    pace: None,
                });
            }
        }
        history
    }
}

/// One who knows the laws that hosts and runs are drawn from, and has seen the same runs.
struct Ideal<'a> {
    case: &'a Case,
    /// Mean of the logarithm of the next run's ratio, for packed and for unpacked rows, and its standard deviation.
    means: [f64; 2],
    deviation: f64,
}

impl Ideal<'_> {
    fn new<'a>(case: &'a Case, history: &History) -> Ideal<'a> {
        let (host, run) = (1.0 / (HOSTS * HOSTS), 1.0 / (RUNS * RUNS));
        let mut sums = [(host * RATIO.ln(), host); 2];
        for seen in &history.observations {
            let (Some(tier), Seen::Peak { reserved: Some(reserved), .. }) = (&seen.tier, seen.seen) else {
                continue;
            };
            let (sum, weight) = &mut sums[usize::from(!tier.packing)];
            *sum += run * (reserved.as_f64() / seen.predicted.as_f64()).ln();
            *weight += run;
        }
        let deviation = (RUNS * RUNS + 1.0 / (host + 3.0 * run)).sqrt();
        Ideal { case, means: sums.map(|(sum, weight)| sum / weight), deviation }
    }

    /// Returns the risk that a rung does not fit.
    fn risk(&self, allocated: Bytes, tier: &Tier) -> f64 {
        let room = self.case.request.card.free.as_f64() - self.case.context;
        if room < allocated.as_f64() {
            return 1.0;
        }
        let mean = self.means[usize::from(!tier.packing)];
        upper_tail(((room / allocated.as_f64()).ln() - mean) / self.deviation)
    }

    /// Returns the first of the rungs that fits at this risk, else the one that fits most likely.
    fn choose(&self, plan: &Plan, rungs: &[usize], accepted: f64) -> usize {
        let risk = |index: usize| {
            self.risk(plan.rungs[index].estimate.allocated_peak_bytes, &plan.rungs[index].tier)
        };
        let first = rungs.iter().copied().find(|index| risk(*index) <= accepted);
        let likeliest = || rungs.iter().copied().min_by(|a, b| risk(*a).total_cmp(&risk(*b)));
        first.or_else(likeliest).unwrap_or(0)
    }
}

/// How a policy did over all cases.
#[derive(Default)]
struct Score {
    cases: f64,
    right: f64,
    lower: f64,
    died_first: f64,
    never: f64,
    lost: f64,
}

/// How a policy did in one case.
struct Course {
    /// It began at the oracle's rung.
    right: bool,
    /// It began at a lower one.
    lower: bool,
    deaths: u32,
    /// Time of a token at the rung that ran, against the oracle's; `None`: nothing ran.
    time: Option<f64>,
}

impl Score {
    fn add(&mut self, course: &Course) {
        let count = |yes: bool| f64::from(u8::from(yes));
        self.cases += 1.0;
        self.right += count(course.right);
        self.lower += count(course.lower);
        self.died_first += count(course.deaths > 0);
        self.never += count(course.time.is_none());
        self.lost += course.time.map_or(1.0, |time| {
            let took = TRAINING * time + START * f64::from(course.deaths + 1) + f64::from(course.deaths);
            (1.0 - (TRAINING + START) / took).max(0.0)
        });
    }

    fn print(&self, out: &mut impl Write, name: &str) -> std::io::Result<()> {
        let share = |count: f64| 100.0 * count / self.cases.max(1.0);
        writeln!(
            out,
            "{name:<38} {:>11.2} % {:>11.2} % {:>11.2} % {:>11.2} % {:>11.2} %",
            share(self.right),
            share(self.lower),
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
    let mut ideals: [Score; IDEAL_RISKS.len()] = Default::default();
    let (mut impossible, mut refused, mut refused_rightly) = (0u32, 0u32, 0u32);
    // Every length up to the longest equally often.
    let data = args.longest_row.map(|longest| {
        let lengths: Vec<u32> = (1..=longest).step_by(7).chain([longest]).collect();
        LengthProfile::from_measured(&lengths, 0, lengths.len() as u64, true)
    });
    let bound = data.as_ref().and_then(LengthProfile::bound);
    for _ in 0..args.cases {
        let mut case = Case::draw(&mut draws)?;
        case.request.data.clone_from(&data);
        let mut roomy = case.request.clone();
        roomy.card.free = Bytes::from_gib(100_000);
        let Ok(mut whole) = plan(&roomy, &book) else { continue };
        if args.miscounted {
            for rung in &mut whole.rungs {
                let Request { model, train_type, features, .. } = &case.request;
                let work = workload(*train_type, features.experts, &rung.tier, None);
                rung.estimate.allocated_peak_bytes = estimate(model, &work)?.allocated_peak_bytes;
            }
        }
        let fits = |index: usize, noise: f64| {
            let rung = &whole.rungs[index];
            case.need(rung.estimate.allocated_peak_bytes, &rung.tier, noise)
                <= case.request.card.free.as_f64()
        };
        let last = whole.rungs.len() - 1;
        let noise = (RUNS * draws.normal()).exp();
        // A larger micro-batch that gains nothing is not in question.
        let rungs: Vec<usize> =
            (0..=last).filter(|index| whole.rungs[*index].fits || *index == last).collect();
        let Some(oracle) = rungs.iter().copied().find(|index| fits(*index, noise)) else {
            impossible += 1;
            refused_rightly += u32::from(plan(&case.request, &book).is_err());
            continue;
        };
        let cost = Cost::new(&case.request, &book.ladder);
        let best = cost.of(&whole.rungs[oracle].tier);
        let time = |tier: &Tier| cost.of(tier) / best;
        let history = case.history(&whole, &mut draws);
        let run = |planned: &Plan, first: usize| {
            let (mut at, mut deaths) = (Some(first), 0);
            while let Some(index) = at.filter(|index| !fits(*index, noise)) {
                deaths += 1;
                let rung = &whole.rungs[index];
                let needed = case.need(rung.estimate.allocated_peak_bytes, &rung.tier, noise);
                at = after_oom(planned, index, Some(Bytes::from_f64(needed)), Some(case.request.card.free));
            }
            Course {
                right: first == oracle,
                lower: first > oracle,
                deaths,
                time: at.map(|index| time(&whole.rungs[index].tier)),
            }
        };
        let mut asked = case.request.clone();
        asked.data = asked.data.map(|data| data.with_approximate(args.sized_full));
        let warm = plan_learned(&asked, &book, &history);
        if let Ok(planned) = &warm {
            let ideal = Ideal::new(&case, &history);
            for (score, accepted) in ideals.iter_mut().zip(IDEAL_RISKS) {
                score.add(&run(planned, ideal.choose(&whole, &rungs, accepted)));
            }
        }
        for (index, planned) in [plan(&asked, &book), warm].into_iter().enumerate() {
            let Ok(planned) = planned else {
                refused += u32::from(index == 0);
                scores[index].add(&Course { right: false, lower: false, deaths: 0, time: None });
                continue;
            };
            scores[index].add(&run(&planned, planned.chosen));
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
            let first = tier.clone();
            let mut deaths = 0;
            while tier.micro_batch > 0 {
                let said = estimate(
                    &case.request.model,
                    &workload(
                        case.request.train_type,
                        case.request.features.experts,
                        &tier,
                        bound.filter(|_| !args.miscounted),
                    ),
                )?;
                if case.need(said.allocated_peak_bytes, &tier, noise) <= case.request.card.free.as_f64() {
                    break;
                }
                deaths += 1;
                tier.micro_batch = shrink(tier.micro_batch);
            }
            let first_of = whole.rungs.iter().position(|rung| rung.tier.micro_batch == first.micro_batch);
            scores[2 + offset].add(&Course {
                right: tier == whole.rungs[oracle].tier && deaths == 0,
                lower: deaths == 0 && first_of.is_some_and(|index| index > oracle),
                deaths,
                time: (tier.micro_batch > 0).then(|| time(&tier)),
            });
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<38} {:>13} {:>13} {:>13} {:>13} {:>13}",
        "", "oracle's rung", "a lower one", "died at first", "never ran", "time lost"
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
    for (risk, score) in IDEAL_RISKS.iter().zip(&ideals) {
        score.print(&mut out, &format!("the ideal after three runs, risk {risk:.2}"))?;
    }
    writeln!(
        out,
        "{impossible} of {} cases fit on no rung and are left out: the cold plan refused {refused_rightly} of them, and \
         {refused} of the others",
        args.cases
    )?;
    Ok(())
}
