//! What happens in one history?
//!
//! Everything is drawn from the seed before anything happens, so that a part can be left out and the rest stays.

use mhtrain_sizing::workload::TrainType;
use serde_json::{Value, json};

use crate::draws::Draws;
use crate::faults::{Fault, name};

/// One history before it happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Script {
    /// Decides who acts next.
    pub seed: u64,
    /// GiB of each card.
    pub cards: Vec<u64>,
    /// Whether the trainer is of the line 3.x: it takes the micro-batch of a checkpoint, and replays the first epoch.
    pub three: bool,
    /// Whether jobs are sized by what earlier ones showed.
    pub learns: bool,
    /// How many jobs of a user may wait.
    pub jobs_per_user: u32,
    /// Whether each attempt has a cgroup, whose counter knows of memory kills.
    pub cgroups: bool,
    /// The jobs, in the order in which they are submitted.
    pub jobs: Vec<JobScript>,
    /// What goes wrong, and before which event.
    pub faults: Vec<(u32, Fault)>,
}

/// One job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobScript {
    /// Event before which it is submitted.
    pub at: u32,
    /// Whose it is.
    pub user: usize,
    /// Seconds after the start of its first attempt when it is to be over.
    pub time_limit: Option<u64>,
    /// What is trained and how it may be changed.
    pub wish: Wish,
    /// The card that it names.
    pub card: Option<usize>,
    /// Higher goes first.
    pub priority: i32,
    /// An earlier job that must have succeeded.
    pub after: Option<usize>,
    /// An earlier job whose output directory it has too.
    pub same_directory_as: Option<usize>,
    /// Rows of its data.
    pub rows: u64,
    /// Whether the trainer prints how many there are.
    pub rows_known: bool,
    /// What its steps really need of what is predicted, in percent.
    pub truth_percent: u64,
    /// Step of an attempt in which the most is needed.
    pub peak_step: u64,
    /// Whether the trainer only says that a library could not allocate, which is no proof.
    pub vague: bool,
    /// What happens to its attempts.
    pub misfortunes: Vec<Misfortune>,
    /// Its host is flaky: somebody kills each attempt after so many steps of its own.
    pub killed_each: Option<u64>,
}

/// What the job file says about training, as far as it matters for the ladder.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wish {
    /// Name of the model.
    pub model: &'static str,
    /// Method.
    pub train_type: &'static str,
    /// Pinned micro-batch.
    pub micro_batch: Option<u32>,
    /// Pinned length of rows.
    pub max_length: Option<u32>,
    /// Smallest effective batch, where the job sets one.
    pub min_effective_batch: Option<u32>,
    /// `allow.shorter_max_length`, `allow.emergency`, `allow.restart`.
    pub allow: [bool; 3],
    /// Passes over the data.
    pub epochs: u32,
    /// Steps between checkpoints.
    pub save_steps: u32,
}

/// Something that happens to one attempt of a job.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Misfortune {
    /// The attempt that started as this one, counted from 1.
    pub attempt: u32,
    /// After so many steps of its own.
    pub after_steps: u64,
    /// What.
    pub death: Death,
}

/// How an attempt ends, or goes on, in a way that it should not.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Death {
    /// The hub cannot be reached.
    Network,
    /// A port is in use.
    Port,
    /// A data-loader worker is killed for lack of host memory.
    Worker,
    /// The checkpoint cannot be read. Only where there is one.
    Corrupt,
    /// A bug in somebody's code.
    Code,
    /// A row that cannot be trained on.
    Data,
    /// Nothing is printed, exit code 1.
    Silent,
    /// Exit code 0 in the middle, without an end-of-training line.
    EarlyExit,
    /// The last steps are not trained, and all the rest says that they were.
    LostSteps,
    /// The loss is no number from here on.
    Diverges,
    /// It lives and does nothing.
    Hang,
    /// Memory runs out while weights are loaded.
    LoadOom,
    /// The allocator's memory is in pieces.
    Fragmented,
    /// Memory runs out in an evaluation, unless its batch was made smaller.
    EvalOom,
    /// Memory runs out while a checkpoint is written.
    SaveOom,
}

const DEATHS: [Death; 15] = [
    Death::Network,
    Death::Port,
    Death::Worker,
    Death::Corrupt,
    Death::Code,
    Death::Data,
    Death::Silent,
    Death::EarlyExit,
    Death::LostSteps,
    Death::Diverges,
    Death::Hang,
    Death::LoadOom,
    Death::Fragmented,
    Death::EvalOom,
    Death::SaveOom,
];

/// One history of so many is sized by what earlier attempts showed. The sizing engine is asked something new in it again and
/// again, which costs most of the time.
const LEARNS_ONE_OF: usize = 4;

/// Events within which jobs come and faults strike.
const EVENTS: usize = 160;

impl Script {
    /// Returns the script of a history of a run with this seed.
    pub fn of(seed: u64, history: u64) -> Script {
        let mixed = mix(seed ^ mix(history));
        let mut draws = Draws::new(mixed);
        let cards = (0..1 + draws.below(3)).map(|_| draws.pick(&[24, 40, 80])).collect::<Vec<u64>>();
        let mut jobs = Vec::new();
        for n in 0..1 + draws.below(4) {
            jobs.push(JobScript::draw(&mut draws, n, cards.len()));
        }
        jobs.sort_by_key(|job: &JobScript| job.at);
        for n in 0..jobs.len() {
            // Nobody may wait for another user's job: `must_exist` of mhtraind.
            let user = jobs[n].user;
            jobs[n].after = jobs[n].after.filter(|after| jobs[*after].user == user);
        }
        let mut faults: Vec<(u32, Fault)> = Vec::new();
        for _ in 0..draws.below(8) {
            let fault = draw_fault(&mut draws, jobs.len(), cards.len());
            faults.push((event(&mut draws), fault));
        }
        faults.sort_by_key(|(at, _)| *at);
        let (three, cgroups) = (draws.below(3) == 0, draws.below(2) == 0);
        let learns = draws.below(LEARNS_ONE_OF) == 0;
        let jobs_per_user = draws.pick(&[1, 1, 2, 100]);
        Script { seed: mix(mixed), cards, three, learns, jobs_per_user, cgroups, jobs, faults }
    }
}

impl JobScript {
    fn draw(draws: &mut Draws, n: usize, cards: usize) -> JobScript {
        let misfortunes = (0..draws.below(3)).map(|_| Misfortune {
            attempt: draw_u32(draws, 3) + 1,
            after_steps: u64::from(draw_u32(draws, 8)),
            death: draws.pick(&DEATHS),
        });
        let misfortunes = misfortunes.collect();
        JobScript {
            user: draws.pick(&[0, 0, 1]),
            time_limit: draws.pick(&[None, None, None, None, None, Some(40), Some(90), Some(240)]),
            at: if n == 0 { draw_u32(draws, 4) } else { event(draws) / 2 },
            wish: Wish::draw(draws),
            card: (draws.below(4) == 0).then(|| draws.below(cards)),
            priority: draws.pick(&[0, 0, 0, 1]),
            after: (n > 0 && draws.below(6) == 0).then(|| draws.below(n)),
            same_directory_as: (n > 0 && draws.below(8) == 0).then(|| draws.below(n)),
            rows: draws.pick(&[40, 96, 190, 320]),
            rows_known: draws.below(4) != 0,
            truth_percent: draws.pick(&[85, 95, 100, 105, 115, 130, 170, 230]),
            peak_step: draws.pick(&[1, 1, 2, 4, 7]),
            vague: draws.below(8) == 0,
            misfortunes,
            killed_each: draws.pick(&[None, None, None, None, None, None, None, None, Some(1), Some(3)]),
        }
    }

    /// Returns the user id of its user.
    pub fn uid(&self) -> u32 {
        1000 + u32::try_from(self.user).unwrap_or(0)
    }

    /// Returns what the user submits. `after`: ids of the jobs that must have succeeded.
    pub fn job_file(&self, own: usize, after: &[u64]) -> Value {
        let directory = self.same_directory_as.unwrap_or(own);
        let wish = &self.wish;
        let mut args =
            json!({"save_steps": wish.save_steps, "num_train_epochs": wish.epochs, "logging_steps": 1});
        if let Some(micro_batch) = wish.micro_batch {
            args["per_device_train_batch_size"] = json!(micro_batch);
        }
        let mut job = json!({
            "model": wish.model, "dataset": ["rows.jsonl"], "name": name(own), "train_type": wish.train_type,
            "output_dir": format!("/out/{}", name(directory)), "args": args, "priority": self.priority, "after": after,
            "allow": {"shorter_max_length": wish.allow[0], "emergency": wish.allow[1], "restart": wish.allow[2]},
        });
        if let Some(length) = wish.max_length {
            job["length"] = json!(length);
        }
        if let Some(least) = wish.min_effective_batch {
            job["min_effective_batch"] = json!(least);
        }
        if let Some(seconds) = self.time_limit {
            job["time_limit"] = json!(seconds);
        }
        if let Some(card) = self.card {
            job["device"] = json!(card);
        }
        job
    }
}

impl Wish {
    fn draw(draws: &mut Draws) -> Wish {
        Wish {
            model: draws.pick(&["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-14B"]),
            train_type: draws.pick(&["lora", "lora", "full"]),
            micro_batch: draws.pick(&[None, None, None, Some(4)]),
            max_length: draws.pick(&[None, None, None, Some(2048)]),
            min_effective_batch: draws.pick(&[None, None, None, None, None, Some(8)]),
            allow: draws.pick(&[
                [true, true, true],
                [true, true, true],
                [true, true, false],
                [false, true, true],
                [true, false, true],
            ]),
            epochs: draws.pick(&[1, 2]),
            save_steps: draws.pick(&[2, 3]),
        }
    }

    /// Returns the method.
    pub fn method(&self) -> TrainType {
        if self.train_type == "full" { TrainType::Full } else { TrainType::Lora }
    }
}

fn draw_fault(draws: &mut Draws, jobs: usize, cards: usize) -> Fault {
    let job = draws.below(jobs);
    let card = draws.below(cards);
    let events = 5 + draw_u32(draws, 60);
    match draws.below(22) {
        0..=3 => Fault::KillDaemon,
        4 => Fault::KillRecorder(job),
        5 | 6 => Fault::KillTrainer(job),
        7 => Fault::KillAttempt(job),
        8 => Fault::OomKill(job),
        9 => Fault::KillEverything,
        10 => Fault::PowerCut,
        11 => Fault::DiskFull(events),
        12 => Fault::NvmlLost(events),
        13 | 14 => Fault::Neighbour { card, gib: draws.pick(&[4, 12, 20, 36, 70]), events },
        15 => Fault::CardFails(card),
        16 => Fault::ClockJump(draws.pick(&[-86_400, -30, 30, 3600, 86_400])),
        17 => Fault::PidReused(job),
        18 => draws.pick(&[Fault::Cancel(job), Fault::Retry(job), Fault::CancelByAnother(job)]),
        19 | 20 => Fault::RecordsRefused(events),
        _ => Fault::Drain(events),
    }
}

fn event(draws: &mut Draws) -> u32 {
    u32::try_from(draws.below(EVENTS)).unwrap_or(0)
}

fn draw_u32(draws: &mut Draws, end: usize) -> u32 {
    u32::try_from(draws.below(end)).unwrap_or(0)
}

/// Returns a number in which every bit depends on every bit of `n` (splitmix64, Steele et al. 2014): neighbouring numbers
/// of histories must not be neighbouring histories.
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}
