//! Does the daemon keep its promises whatever is killed when?
//!
//! ```text
//!   trial:  submit some jobs, perhaps cancel one  ──>  at a random moment kill -9  ──>  serve again
//!   end:    submit again what was not acknowledged, wait for quiet, compare
//! ```
//!
//! The truth is kept outside of the daemon: what was acknowledged is known here, and each trainer writes down what it
//! does, and with whom it shares a card ([`verdict`]).

mod failpoints;
mod foreground;
mod host;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mhtrain_store::{JobId, Store};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::draws::Draws;
use crate::workspace::{cargo, root, target_dir};
use host::{Answer, GRACE_S, Host, User, kill};
use verdict::{Asked, Cancel, Fate, Fault, Found, Killed, Kind, What, judge};

/// Most jobs that are not over when a trial begins: four cards work them off in some seconds.
const PENDING_MAX: usize = 10;

/// How long every job may take to be over by itself after the last kill.
const QUIET_WITHIN: Duration = Duration::from_secs(90);

/// How long a trainer may go on after a cancel was acknowledged and a daemon was there, beside its grace period: a look of
/// the recorder, and a machine that does other things too.
const CANCEL_WITHIN_S: f64 = GRACE_S as f64 + 2.0;

/// Most kills of trainers of one job: the daemon resumes five times what dies without a reason.
const TRAINER_KILLS_MAX: usize = 2;

/// Files that an attempt may have in the state directory.
const FILES_MAX: usize = 24;

/// Kill daemons, recorders and trainers at random moments, and see whether anything is lost or done twice
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask chaos                      # 50 kills: about two minutes\n  cargo xtask chaos --failpoints         # at every step that must not be done by halves\n  cargo xtask chaos --trials 500 --seed 7"
)]
pub(crate) struct ChaosArgs {
    /// Kills
    #[arg(long, default_value_t = 50)]
    trials: u32,

    /// Seed of jobs, moments and victims; what they meet depends on the machine as well
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Instead: one kill at each point that daemons and recorders reach, in scenarios of one job
    #[arg(long, conflicts_with = "trials")]
    failpoints: bool,

    /// With --failpoints: a second kill some points later, as the seed says
    #[arg(long, requires = "failpoints")]
    twice: bool,

    /// With --failpoints: who runs the jobs
    #[arg(long, requires = "failpoints", default_value = "daemon")]
    of: By,

    /// With --failpoints: each different point once, in the first scenario that reaches it
    #[arg(long, requires = "failpoints")]
    once: bool,

    /// With --failpoints: only those whose name has this in it
    #[arg(long, requires = "failpoints")]
    point: Option<String>,
}

/// Who runs the jobs whose steps are tried.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum By {
    /// A daemon, for whoever gives this command
    #[default]
    Daemon,
    /// `mhtraind run`
    Foreground,
    /// Root's daemon, for an account that is made for it and removed afterwards
    AnotherUser,
}

/// Whom a trial kills.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Daemon,
    /// Several daemons, each while it starts.
    Daemons,
    Recorder,
    DaemonAndRecorder,
    Trainer,
    DaemonAndTrainer,
    All,
}

impl Victim {
    /// As often as they stand here.
    const DRAWN: [Victim; 10] = [
        Victim::Daemon,
        Victim::Daemon,
        Victim::Daemon,
        Victim::Daemons,
        Victim::Recorder,
        Victim::DaemonAndRecorder,
        Victim::DaemonAndRecorder,
        Victim::Trainer,
        Victim::DaemonAndTrainer,
        Victim::All,
    ];

    fn name(self) -> &'static str {
        match self {
            Victim::Daemon => "the daemon",
            Victim::Daemons => "several daemons in quick succession",
            Victim::Recorder => "a recorder",
            Victim::DaemonAndRecorder => "the daemon and a recorder",
            Victim::Trainer => "a trainer",
            Victim::DaemonAndTrainer => "the daemon and a trainer",
            Victim::All => "the daemon, a recorder and its trainer",
        }
    }

    fn has_daemon(self) -> bool {
        !matches!(self, Victim::Recorder | Victim::Trainer)
    }

    fn has_recorder(self) -> bool {
        matches!(self, Victim::Recorder | Victim::DaemonAndRecorder | Victim::All)
    }

    fn has_trainer(self) -> bool {
        matches!(self, Victim::Trainer | Victim::DaemonAndTrainer | Victim::All)
    }
}

/// When a trial kills.
#[derive(Copy, Clone, Debug)]
enum Moment {
    /// So long after its clients were started.
    After(Duration),
    /// So long after the next attempt got its directory: between plan and first step most is on its way.
    AfterLaunch(Duration),
}

/// Runs the trials and prints what came of them.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(crate) fn run(args: &ChaosArgs) -> anyhow::Result<()> {
    let root = root()?;
    let status = cargo().args(["build", "--quiet"]).current_dir(&root).status()?;
    if !status.success() {
        bail!("the daemon cannot be built");
    }
    let dir = tempfile::Builder::new().prefix("mhtraind-chaos-").tempdir()?;
    let host = Host::make(dir.path(), &target_dir(&root), &root)?;
    if args.failpoints {
        let user = if args.of == By::AnotherUser { User::make(dir.path())? } else { None };
        if args.of == By::AnotherUser && user.is_none() {
            println!("skipped: only root can make an account, with useradd");
            return Ok(());
        }
        let host = match &user {
            Some(user) => host.open_to(user)?,
            None => host,
        };
        let done = failpoints::run(args, &host, dir.path());
        if done.is_err() {
            let _kept = dir.keep();
        }
        return done;
    }
    let mut trials = Trials::begin(&host, args.seed)?;
    let began = Instant::now();
    let faults = trials.run(args.trials)?;
    trials.print(began.elapsed(), &faults, args);
    if faults.is_empty() {
        return Ok(());
    }
    trials.print_histories(&faults);
    let kept = dir.keep();
    bail!("{} promises were broken; everything is kept in {}", faults.len(), kept.display());
}

struct Trials<'a> {
    host: &'a Host,
    daemon: Child,
    draws: Draws,
    asked: Vec<Asked>,
    jobs: Vec<Value>,
    killed: Killed,
    /// How often each trainer's job was hit already.
    trainer_kills: BTreeMap<String, usize>,
    /// When who was killed, for the story of a failure.
    story: Vec<(f64, String)>,
    kills: BTreeMap<Victim, u32>,
    clients_killed: u32,
    found: Vec<Found>,
    faults: Vec<Fault>,
    worst_start: Duration,
}

/// What a client of a trial did.
enum Done {
    Submitted(usize, Answer),
    Cancelled(usize, Answer, f64),
}

impl<'a> Trials<'a> {
    fn begin(host: &'a Host, seed: u64) -> anyhow::Result<Trials<'a>> {
        let mut daemon = host.serve()?;
        host.wait_until_it_serves(&mut daemon)?;
        Ok(Trials {
            host,
            daemon,
            // Small seeds are alike in their first draws.
            draws: Draws::new(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            asked: Vec::new(),
            jobs: Vec::new(),
            killed: Killed::default(),
            trainer_kills: BTreeMap::new(),
            story: Vec::new(),
            kills: BTreeMap::new(),
            clients_killed: 0,
            found: Vec::new(),
            faults: Vec::new(),
            worst_start: Duration::ZERO,
        })
    }

    fn run(&mut self, trials: u32) -> anyhow::Result<Vec<Fault>> {
        for _ in 0..trials {
            if let Err(error) = self.trial() {
                self.fault(Kind::Manual, None, format!("{error:#}"));
                break;
            }
        }
        if self.faults.is_empty()
            && let Err(error) = self.come_to_rest()
        {
            self.fault(Kind::Manual, None, format!("{error:#}"));
        }
        let mut faults = std::mem::take(&mut self.faults);
        faults.extend(judge(&self.asked, &self.found, &self.host.testimonies()?, &self.killed));
        self.end(&mut faults)?;
        Ok(faults)
    }

    fn fault(&mut self, kind: Kind, job: Option<String>, what: String) {
        self.faults.push(Fault { kind, job, what });
    }

    // -- a trial

    fn trial(&mut self) -> anyhow::Result<()> {
        let victim = self.draws.pick(&Victim::DRAWN);
        let moment = self.moment();
        let pending = self.host.jobs()?.iter().filter(|job| !job.is_over()).count();
        let mut submits: Vec<usize> =
            (0..self.asked.len()).filter(|n| self.asked[*n].ids.is_empty()).collect();
        if pending < PENDING_MAX {
            for _ in 0..=self.draws.below(3) {
                submits.push(self.new_job());
            }
        }
        let submits: Vec<_> = submits
            .into_iter()
            .map(|n| {
                let after = Duration::from_millis(self.draws.below(300) as u64);
                let killed =
                    (self.draws.uniform() < 0.1).then(|| Duration::from_millis(self.draws.below(40) as u64));
                (n, after, killed)
            })
            .collect();
        self.clients_killed += u32::try_from(submits.iter().filter(|(.., killed)| killed.is_some()).count())?;
        let cancel = self.one_to_cancel().map(|(n, id)| (n, id, self.millis(400)));
        let (host, jobs, asked) = (self.host, self.jobs.clone(), self.asked.clone());
        let done = std::thread::scope(|scope| -> anyhow::Result<Vec<Done>> {
            let mut clients = Vec::new();
            for (n, after, killed) in submits {
                let (name, job) = (&asked[n].name, &jobs[n]);
                clients.push(scope.spawn(move || {
                    std::thread::sleep(after);
                    Ok(Done::Submitted(n, host.submit(name, job, killed)?))
                }));
            }
            if let Some((n, id, after)) = cancel {
                clients.push(scope.spawn(move || {
                    std::thread::sleep(after);
                    let answer = host.cancel(id)?;
                    Ok(Done::Cancelled(n, answer, monotonic()))
                }));
            }
            self.await_moment(moment);
            self.kill(victim)?;
            let join = |client: std::thread::ScopedJoinHandle<'_, anyhow::Result<Done>>| {
                client.join().expect("a client does not panic")
            };
            clients.into_iter().map(join).collect()
        })?;
        // From here on a daemon is there that can carry out what it was asked.
        let served = monotonic();
        for done in done {
            self.note(done, served);
        }
        Ok(())
    }

    fn moment(&mut self) -> Moment {
        match self.draws.below(4) {
            0 => Moment::After(self.millis(60)),
            1 => Moment::After(self.millis(1500)),
            2 => Moment::After(self.millis(500)),
            _ => Moment::AfterLaunch(self.millis(60)),
        }
    }

    fn millis(&mut self, below: usize) -> Duration {
        Duration::from_millis(self.draws.below(below) as u64)
    }

    fn await_moment(&self, moment: Moment) {
        let before = self.host.attempts();
        match moment {
            Moment::After(time) => std::thread::sleep(time),
            Moment::AfterLaunch(time) => {
                let until = Instant::now() + Duration::from_secs(1);
                while Instant::now() < until && self.host.attempts().is_subset(&before) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                std::thread::sleep(time);
            }
        }
    }

    fn new_job(&mut self) -> usize {
        let n = self.asked.len();
        let name = format!("job-{:03}", n + 1);
        let seconds = self.draws.pick(&[0.0, 0.0, 0.02, 0.1, 0.1, 0.3, 0.5]);
        let at = 1 + self.draws.below(9);
        let mut scenario = json!({"step_seconds": seconds});
        let fate = match self.draws.below(8) {
            0 => {
                scenario["fail"] =
                    json!({"at_step": at, "text": "zorglub: the flux is inverted", "exit_code": 1});
                Fate::Fails
            }
            1 => {
                scenario["oom"] =
                    json!({"capacity_gib": 24, "base_gib": 8, "per_sample_gib": 3, "at_step": at});
                Fate::RunsOutOfMemory
            }
            _ => Fate::Succeeds,
        };
        if self.draws.below(4) == 0 {
            scenario["workers"] = json!(1 + self.draws.below(2));
            scenario["workers_ignore_sigterm"] = json!(self.draws.below(8) == 0);
        }
        if self.draws.below(4) == 0 {
            scenario["on_sigterm"] = json!("ignore");
        }
        self.jobs.push(self.host.job(&name, &scenario));
        self.asked.push(Asked { name, fate, ids: BTreeSet::new(), cancel: None });
        n
    }

    /// Returns a job to cancel, in some trials.
    fn one_to_cancel(&mut self) -> Option<(usize, u64)> {
        if self.draws.uniform() > 0.3 {
            return None;
        }
        // One of the last, which is most likely not over.
        let last = self.asked.len().checked_sub(1 + self.draws.below(4))?;
        let asked = &self.asked[last];
        let id = asked.ids.first().copied().filter(|_| asked.cancel.is_none())?;
        self.asked[last].cancel = Some(Cancel { over_by: None });
        Some((last, id))
    }

    fn note(&mut self, done: Done, served: f64) {
        match done {
            Done::Submitted(n, Answer::Acknowledged(Some(id))) => {
                self.asked[n].ids.insert(id);
            }
            Done::Submitted(_, Answer::Unknown) | Done::Cancelled(_, Answer::Unknown, _) => {}
            Done::Submitted(n, answer) => {
                let name = self.asked[n].name.clone();
                self.fault(Kind::Wrong, Some(name), format!("the submit was answered by {answer:?}"));
            }
            Done::Cancelled(n, Answer::Acknowledged(_), at) => {
                self.asked[n].cancel = Some(Cancel { over_by: Some(at.max(served) + CANCEL_WITHIN_S) });
            }
            // It was over already.
            Done::Cancelled(_, Answer::Refused(_), _) => {}
        }
    }

    // -- kills

    fn kill(&mut self, victim: Victim) -> anyhow::Result<()> {
        *self.kills.entry(victim).or_default() += 1;
        let of =
            if victim.has_recorder() || victim.has_trainer() { self.trainer_or_recorder() } else { None };
        if victim.has_daemon() {
            self.kill_daemon()?;
        }
        if victim.has_recorder()
            && let Some((recorder, id)) = of.as_ref().and_then(|of| of.recorder)
            && kill(recorder)
        {
            self.killed.recorders.push(id);
            self.tell(format!("recorder {recorder} of job {id} is killed"));
        }
        if victim.has_trainer()
            && let Some((trainer, job)) = of.and_then(|of| of.trainer)
        {
            // Noted first: what it says is read later.
            self.killed.trainers.insert(trainer);
            if kill(trainer) {
                *self.trainer_kills.entry(job.clone()).or_default() += 1;
                self.tell(format!("trainer {trainer} of {job} is killed"));
            }
        }
        if !victim.has_daemon() {
            return Ok(());
        }
        if victim == Victim::Daemons {
            for _ in 0..=self.draws.below(4) {
                self.daemon = self.host.serve()?;
                std::thread::sleep(self.millis(120));
                self.kill_daemon()?;
            }
        }
        let began = Instant::now();
        self.daemon = self.host.serve()?;
        self.host.wait_until_it_serves(&mut self.daemon)?;
        self.worst_start = self.worst_start.max(began.elapsed());
        self.tell("a daemon serves".to_owned());
        Ok(())
    }

    fn kill_daemon(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.daemon.try_wait()? {
            bail!("the daemon had ended by itself with {status}");
        }
        self.daemon.kill()?;
        self.daemon.wait()?;
        self.tell(format!("daemon {} is killed", self.daemon.id()));
        Ok(())
    }

    /// Returns a recorder that lives and the trainer of the same job, as far as there are any.
    fn trainer_or_recorder(&mut self) -> Option<Pair> {
        let lines = self.host.testimonies().ok()?;
        let ended: BTreeSet<u32> =
            lines.iter().filter(|line| matches!(line.what, What::End { .. })).map(|line| line.pid).collect();
        let spared =
            |job: &String| self.trainer_kills.get(job).is_some_and(|kills| *kills >= TRAINER_KILLS_MAX);
        let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
        for (recorder, id) in self.host.recorders() {
            let name =
                self.asked.iter().find(|asked| asked.ids.contains(&id)).map(|asked| asked.name.clone());
            pairs.entry(name.unwrap_or_else(|| id.to_string())).or_default().recorder = Some((recorder, id));
        }
        for line in lines.iter().filter(|line| line.what == What::Start && !ended.contains(&line.pid)) {
            if self.host.is_trainer(line.pid)
                && !self.killed.trainers.contains(&line.pid)
                && !spared(&line.job)
            {
                pairs.entry(line.job.clone()).or_default().trainer = Some((line.pid, line.job.clone()));
            }
        }
        let pairs: Vec<Pair> = pairs.into_values().collect();
        (!pairs.is_empty()).then(|| pairs[self.draws.below(pairs.len())].clone())
    }

    fn tell(&mut self, what: String) {
        self.story.push((monotonic(), what));
    }

    // -- the end

    /// Submits again what was not acknowledged, and waits until every job is over.
    fn come_to_rest(&mut self) -> anyhow::Result<()> {
        for n in 0..self.asked.len() {
            // Those with an id as well: the same key must give the same one.
            let answer = self.host.submit(&self.asked[n].name, &self.jobs[n], None)?;
            let served = monotonic();
            self.note(Done::Submitted(n, answer), served);
        }
        let until = Instant::now() + QUIET_WITHIN;
        loop {
            self.found = self.host.jobs()?;
            if self.found.iter().all(Found::is_over) || Instant::now() >= until {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends the daemon and looks for what is left of it.
    fn end(&mut self, faults: &mut Vec<Fault>) -> anyhow::Result<()> {
        let mut left = |what: String| faults.push(Fault { kind: Kind::LeftBehind, job: None, what });
        for path in self.host.attempts().iter().filter(|path| path.is_dir()) {
            let files: Vec<String> = names(path);
            if files.len() > FILES_MAX || files.iter().any(|name| name.ends_with(".new")) {
                left(format!("{} holds {files:?}", path.display()));
            }
        }
        let over: Vec<u64> = self.found.iter().filter(|job| job.is_over()).map(|job| job.id).collect();
        let quiet = !over.is_empty() && over.len() == self.found.len();
        let log = std::fs::read_to_string(self.host.log())?;
        for line in log.lines().filter(|line| line.contains("panicked") || line.contains("a bug")) {
            left(format!("the daemon says: {line}"));
        }
        if quiet && faults.is_empty() {
            let mut left = |what: String| faults.push(Fault { kind: Kind::LeftBehind, job: None, what });
            if let Answer::Refused(why) = self.host.remove(&over)? {
                left(format!("jobs that are over cannot be removed: {why}"));
            }
            let jobs = names(&self.host.state_dir().join("jobs"));
            if !jobs.is_empty() {
                left(format!("every job was removed, and of these there are files: {jobs:?}"));
            }
        }
        let mut left = |what: String| faults.push(Fault { kind: Kind::LeftBehind, job: None, what });
        terminate(&self.daemon)?;
        let status = self.daemon.wait()?;
        if !status.success() {
            left(format!("the daemon ended with {status}"));
        }
        for (pid, line) in self.host.everybody() {
            left(format!("pid {pid} is left: {line}"));
            kill(pid);
        }
        Ok(())
    }

    #[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
    fn print(&self, time: Duration, faults: &[Fault], args: &ChaosArgs) {
        let row = |name: &str, value: String| println!("{name:<44} {value:>8}");
        let states = |state: &str| self.found.iter().filter(|job| job.state == state).count().to_string();
        row("killed at random moments", "times".to_owned());
        for (victim, count) in &self.kills {
            row(&format!("  {}", victim.name()), count.to_string());
        }
        row("  a client amid its submit", self.clients_killed.to_string());
        row("jobs asked for", self.asked.len().to_string());
        for state in ["succeeded", "failed", "cancelled"] {
            row(&format!("  {state}"), states(state));
        }
        for (kind, name) in [
            (Kind::Lost, "acknowledged and lost"),
            (Kind::Twice, "trained twice"),
            (Kind::Wrong, "in a wrong state"),
            (Kind::Manual, "in need of a person"),
            (Kind::LeftBehind, "processes and files left behind"),
        ] {
            row(name, faults.iter().filter(|fault| fault.kind == kind).count().to_string());
        }
        row("slowest start of a daemon, ms", self.worst_start.as_millis().to_string());
        row("seconds", format!("{:.1}", time.as_secs_f64()));
        row("seed", args.seed.to_string());
    }

    /// Prints what happened to the jobs that faults are about, and when who was killed.
    #[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
    fn print_histories(&self, faults: &[Fault]) {
        println!("\nkills, in seconds of CLOCK_MONOTONIC");
        for (at, what) in &self.story {
            println!("  {at:.3}  {what}");
        }
        // The daemon has ended: its lock is free.
        let store = Store::open(&self.host.state_dir());
        let testimonies = self.host.testimonies().unwrap_or_default();
        for fault in faults {
            let job = fault.job.as_deref();
            println!("\n{:?}: {}: {}", fault.kind, job.unwrap_or("the daemon"), fault.what);
            let ids =
                self.found.iter().filter(|found| Some(found.name.as_str()) == job).map(|found| found.id);
            for id in ids {
                let events =
                    store.as_ref().ok().zip(JobId::new(id)).and_then(|(store, id)| store.events(id).ok());
                for record in events.unwrap_or_default() {
                    // A plan fills pages.
                    let line: String = record.to_line().trim().chars().take(600).collect();
                    println!("  job {id} {line}");
                }
            }
            for line in testimonies.iter().filter(|line| Some(line.job.as_str()) == job) {
                println!("  trainer {} {:.3} {:?}", line.pid, line.at, line.what);
            }
        }
    }
}

/// A recorder with the id of its job, and the trainer with its job's name.
#[derive(Clone, Debug, Default)]
struct Pair {
    recorder: Option<(u32, u64)>,
    trainer: Option<(u32, String)>,
}

/// Asks a process to end.
fn terminate(process: &Child) -> anyhow::Result<()> {
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw).context("a pid")?;
    Ok(kill_process(pid, Signal::TERM)?)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Returns the clock that the trainers read too.
#[expect(clippy::cast_precision_loss, reason = "seconds since boot, with microseconds")]
fn monotonic() -> f64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
