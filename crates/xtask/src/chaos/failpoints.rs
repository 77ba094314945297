//! Does the daemon, or `mhtraind run`, keep its promises when it, or a recorder, is killed at each of the steps that it takes?
//!
//! ```text
//!   first:  every scenario once, undisturbed: the points that its processes reach are the list of trials
//!   trial:  the scenario again; at one point kill -9; a daemon that is gone is started again, as a service manager would
//!   end:    wait for quiet, compare, remove the job, look for what is left
//! ```
//!
//! Where the points are is said by the product itself ([`mhtrain_failpoint`]); nothing here names one of them but to leave out
//! what is only noted for listings.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::foreground::{Foreground, ID};
use super::host::{Answer, Host, kill};
use super::verdict::{Asked, Cancel, Fate, Fault, Found, Killed, Kind, What, judge};
use super::{By, CANCEL_WITHIN_S, ChaosArgs, monotonic, names};
use crate::draws::Draws;

/// Trials at the same time: each mostly waits.
const LANES: usize = 6;

/// How long a trial may take until all of it is over by itself.
const QUIET_WITHIN: Duration = Duration::from_secs(60);

/// How often a point counts that is about listings alone: samples come as often as the clock says.
const NOTES_MAX: usize = 2;

/// How long a receipt may take that tells of an end before its daemon died.
const RECEIPT_WITHIN: Duration = Duration::from_secs(10);

/// What happens in a trial, beside the kill.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scenario {
    Trains,
    RunsOutOfMemory,
    Fails,
    CancelledWhileItRuns,
    CancelledWhileItWaits,
    TakenOver,
    TriedAgain,
    OnAnotherCard,
}

impl Scenario {
    const ALL: [Scenario; 8] = [
        Scenario::Trains,
        Scenario::RunsOutOfMemory,
        Scenario::Fails,
        Scenario::CancelledWhileItRuns,
        Scenario::CancelledWhileItWaits,
        Scenario::TakenOver,
        Scenario::TriedAgain,
        Scenario::OnAnotherCard,
    ];

    /// Those without a queue.
    const OF_THE_FOREGROUND: [Scenario; 6] = [
        Scenario::Trains,
        Scenario::RunsOutOfMemory,
        Scenario::Fails,
        Scenario::CancelledWhileItRuns,
        Scenario::TakenOver,
        Scenario::TriedAgain,
    ];

    fn of(by: By) -> &'static [Scenario] {
        match by {
            By::Daemon | By::AnotherUser => &Scenario::ALL,
            By::Foreground => &Scenario::OF_THE_FOREGROUND,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Scenario::Trains => "submit, train, finish, remove",
            Scenario::RunsOutOfMemory => "out of memory, and a rerun",
            Scenario::Fails => "a failure",
            Scenario::CancelledWhileItRuns => "cancel of a running job",
            Scenario::CancelledWhileItWaits => "cancel of a waiting job",
            Scenario::TakenOver => "take-over from a dead daemon and recorder",
            Scenario::TriedAgain => "retry of a failed job",
            Scenario::OnAnotherCard => "a card that fails, and another one",
        }
    }

    pub(super) fn trainer(self) -> Value {
        match self {
            Scenario::Trains => json!({}),
            Scenario::RunsOutOfMemory => {
                json!({"oom": {"capacity_gib": 24, "base_gib": 8, "per_sample_gib": 3, "at_step": 5}})
            }
            Scenario::Fails | Scenario::TriedAgain => {
                json!({"fail": {"at_step": 5, "text": "zorglub: the flux is inverted"}})
            }
            Scenario::CancelledWhileItRuns => json!({"step_seconds": 0.6, "workers": 1}),
            Scenario::CancelledWhileItWaits => json!({"step_seconds": 0.3}),
            Scenario::TakenOver => json!({"step_seconds": 0.1, "workers": 1}),
            Scenario::OnAnotherCard => {
                let text = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered";
                json!({"attempts": {"1": {"fail": {"at_step": 5, "text": text}}}})
            }
        }
    }

    pub(super) fn fate(self) -> Fate {
        match self {
            Scenario::RunsOutOfMemory | Scenario::OnAnotherCard => Fate::RunsOutOfMemory,
            Scenario::Fails | Scenario::TriedAgain => Fate::Fails,
            _ => Fate::Succeeds,
        }
    }
}

/// A kill that is to be tried.
#[derive(Clone, Debug)]
struct Point {
    scenario: Scenario,
    /// As the trace names it.
    name: String,
    nth: usize,
    /// How many points later a second kill comes.
    then: Option<usize>,
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} #{}", self.scenario.name(), self.name, self.nth)?;
        self.then.map_or(Ok(()), |then| write!(f, ", and {then} points later"))
    }
}

/// What came of a trial.
struct Outcome {
    /// How many of the kills came about.
    kills: usize,
    faults: Vec<Fault>,
}

/// Runs every trial and prints what came of them.
#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
pub(super) fn run(args: &ChaosArgs, host: &Host, dir: &Path) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut points = Vec::new();
    for scenario in Scenario::of(args.of) {
        let dir = dir.join(format!("undisturbed-{scenario:?}"));
        points.extend(discover(host, &dir, args.of, *scenario)?);
    }
    if args.once {
        let mut seen = BTreeSet::new();
        points.retain(|point| seen.insert(point.name.clone()));
    }
    if args.twice {
        let mut draws = Draws::new(args.seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        points.iter_mut().for_each(|point| point.then = Some(1 + draws.below(40)));
    }
    if let Some(only) = &args.point {
        points.retain(|point| point.to_string().contains(only.as_str()));
    }
    let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let failed = std::thread::scope(|scope| {
        let lane = || -> anyhow::Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(point) = points.get(number) else { return Ok(()) };
                let dir = dir.join(format!("trial-{number:04}"));
                let outcome = trial(host, &dir, args.of, point).with_context(|| format!("in {point}"))?;
                match outcome.faults.is_empty() {
                    true => std::fs::remove_dir_all(&dir)?,
                    false => std::fs::write(dir.join("faults"), format!("{point}: {:#?}\n", outcome.faults))?,
                }
                outcomes.lock().unwrap_or_else(PoisonError::into_inner).push((number, outcome));
            }
        };
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().filter_map(|lane| lane.join().expect("a trial does not panic").err()).next()
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    print(args.of, &points, &outcomes, began.elapsed());
    let broken: Vec<_> = outcomes.iter().filter(|(_, outcome)| !outcome.faults.is_empty()).collect();
    for (number, outcome) in &broken {
        println!("\n{}  (trial-{number:04})", points[*number]);
        for fault in &outcome.faults {
            println!("  {:?}: {}: {}", fault.kind, fault.job.as_deref().unwrap_or("the daemon"), fault.what);
        }
    }
    // What comes in another order than before can leave a trial without its kill, but hardly many.
    let missed = outcomes.iter().filter(|(_, outcome)| outcome.kills == 0).count();
    if missed > (outcomes.len() / 50).max(1) {
        bail!(
            "{missed} of {} kills did not come about: the points are not reached as they were before",
            outcomes.len()
        );
    }
    if !broken.is_empty() {
        bail!("{} kills broke a promise; everything of them is kept in {}", broken.len(), dir.display());
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a command for developers reports on standard output")]
fn print(by: By, points: &[Point], outcomes: &[(usize, Outcome)], time: Duration) {
    println!("{:<44} {:>8} {:>8} {:>8}", "killed at every point of", "points", "kills", "faults");
    for scenario in Scenario::of(by).iter().copied() {
        let of: Vec<_> = outcomes.iter().filter(|(number, _)| points[*number].scenario == scenario).collect();
        let kills: usize = of.iter().map(|(_, outcome)| outcome.kills).sum();
        let faults: usize = of.iter().map(|(_, outcome)| outcome.faults.len()).sum();
        println!("  {:<42} {:>8} {kills:>8} {faults:>8}", scenario.name(), of.len());
    }
    let places: BTreeSet<&str> = points.iter().map(|point| point.name.as_str()).collect();
    println!("{:<44} {:>8}", "different points", places.len());
    println!("{:<44} {:>8.1}", "seconds", time.as_secs_f64());
}

/// Runs a scenario undisturbed and returns the points that it reaches.
fn discover(host: &Host, dir: &Path, by: By, scenario: Scenario) -> anyhow::Result<Vec<Point>> {
    let undisturbed = Point { scenario, name: String::new(), nth: 0, then: None };
    let outcome = trial(host, dir, by, &undisturbed)?;
    if let Some(fault) = outcome.faults.first() {
        bail!("undisturbed, {} went wrong: {}; see {}", scenario.name(), fault.what, dir.display());
    }
    let trace = std::fs::read_to_string(dir.join("failpoints/trace"))?;
    // What comes before is the same as in the first scenario: there it is tried.
    let noted = |name: &str| std::fs::read_to_string(dir.join("failpoints").join(name)).ok()?.parse().ok();
    let starts = || trace.lines().position(|name| name == "recorder:recorder.gate_opened");
    let from = match scenario {
        Scenario::Trains => 0,
        _ => noted("from").or_else(starts).context("no trainer was started")?,
    };
    let until = match scenario {
        Scenario::Trains => usize::MAX,
        _ => noted("until").context("nothing was removed")?,
    };
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut points = Vec::new();
    for (line, name) in trace.lines().enumerate() {
        let nth = seen.entry(name).or_default();
        *nth += 1;
        if line < from || line >= until || (name.ends_with("/note") && *nth > NOTES_MAX) {
            continue;
        }
        points.push(Point { scenario, name: name.to_owned(), nth: *nth, then: None });
    }
    Ok(points)
}

/// Plays a scenario with a kill.
fn trial(shared: &Host, dir: &Path, by: By, point: &Point) -> anyhow::Result<Outcome> {
    let host = shared.beside(dir, if point.scenario == Scenario::OnAnotherCard { 2 } else { 1 })?;
    if !point.name.is_empty() {
        let then = point.then.map_or(String::new(), |then| format!("+{then}\n"));
        std::fs::write(dir.join("failpoints/kill"), format!("{} {}\n{then}", point.name, point.nth))?;
    }
    let keeper = Keeper { host: &host, state: Mutex::new(Kept::default()) };
    let mut play =
        Play { host: &host, keeper: &keeper, dir: dir.to_owned(), asked: Vec::new(), faults: Vec::new() };
    if by == By::Foreground {
        if let Err(error) = play.in_the_foreground(point.scenario) {
            play.fault(Kind::Manual, None, format!("{error:#}"));
        }
    } else {
        std::thread::scope(|scope| {
            scope.spawn(|| keeper.keep());
            if let Err(error) = play.all(point.scenario) {
                play.fault(Kind::Manual, None, format!("{error:#}"));
            }
            keeper.end();
        });
    }
    play.look_for_leftovers()?;
    play.faults.append(&mut keeper.state().faults);
    let killed = std::fs::read_to_string(dir.join("failpoints/killed")).unwrap_or_default();
    Ok(Outcome { kills: killed.lines().count(), faults: play.faults })
}

/// Starts a daemon again whenever it is gone.
struct Keeper<'a> {
    host: &'a Host,
    state: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    daemon: Option<Child>,
    ends: bool,
    faults: Vec<Fault>,
}

impl Keeper<'_> {
    fn state(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self) {
        while !self.state().ends {
            if let Err(error) = self.look() {
                let fault = Fault { kind: Kind::Manual, job: None, what: format!("{error:#}") };
                self.state().faults.push(fault);
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn look(&self) -> anyhow::Result<()> {
        let mut state = self.state();
        let ended = match &mut state.daemon {
            Some(daemon) => daemon.try_wait()?,
            None => None,
        };
        if let Some(status) = ended
            && status.signal() != Some(9)
        {
            let what = format!("the daemon ended by itself with {status}");
            state.faults.push(Fault { kind: Kind::Manual, job: None, what });
        }
        if state.daemon.is_none() || ended.is_some() {
            state.daemon = Some(self.host.serve()?);
        }
        Ok(())
    }

    /// Kills the daemon; another one is there soon.
    fn kill_daemon(&self) {
        if let Some(daemon) = &self.state().daemon {
            kill(daemon.id());
        }
    }

    fn end(&self) {
        let mut state = self.state();
        state.ends = true;
        let Some(mut daemon) = state.daemon.take() else { return };
        let told = super::terminate(&daemon).is_ok();
        match daemon.wait() {
            Ok(status) if told && (status.success() || status.signal() == Some(9)) => {}
            other => {
                let what = format!("the daemon did not end as it should: {other:?}");
                state.faults.push(Fault { kind: Kind::LeftBehind, job: None, what });
            }
        }
    }
}

/// Notes how many points of a trial were reached until now.
pub(super) fn note(dir: &Path, name: &str) -> anyhow::Result<()> {
    let reached = std::fs::read_to_string(dir.join("failpoints/trace"))?.lines().count();
    Ok(std::fs::write(dir.join("failpoints").join(name), reached.to_string())?)
}

struct Play<'a> {
    host: &'a Host,
    keeper: &'a Keeper<'a>,
    dir: PathBuf,
    asked: Vec<Asked>,
    faults: Vec<Fault>,
}

impl Play<'_> {
    fn fault(&mut self, kind: Kind, job: Option<String>, what: String) {
        self.faults.push(Fault { kind, job, what });
    }

    fn all(&mut self, scenario: Scenario) -> anyhow::Result<()> {
        let first = self.submit("job", &scenario.trainer(), scenario.fate())?;
        match scenario {
            Scenario::Trains | Scenario::RunsOutOfMemory | Scenario::Fails | Scenario::OnAnotherCard => {}
            Scenario::CancelledWhileItRuns => {
                self.until_step(2)?;
                self.cancel(first)?;
            }
            Scenario::CancelledWhileItWaits => {
                let second = self.submit("second", &json!({}), Fate::Succeeds)?;
                self.note("from")?;
                self.cancel(second)?;
            }
            Scenario::TakenOver => {
                self.until_step(2)?;
                self.note("from")?;
                let recorders = self.host.recorders();
                self.keeper.kill_daemon();
                for (recorder, _) in recorders {
                    kill(recorder);
                }
            }
            Scenario::TriedAgain => {
                self.until_quiet()?;
                self.note("from")?;
                self.retry(first)?;
            }
        }
        let found = self.until_quiet()?;
        let killed = self.killed(first)?;
        let told = self.host.testimonies()?;
        if scenario == Scenario::TriedAgain {
            self.judge_retry(&found, &["failed", "failed"], killed.recorders.len())?;
        } else {
            self.faults.extend(judge(&self.asked, &found, &told, &killed));
        }
        if self.faults.is_empty() {
            self.look_at_receipts(&found)?;
            self.remove(&found)?;
        }
        Ok(())
    }

    fn in_the_foreground(&mut self, scenario: Scenario) -> anyhow::Result<()> {
        let (asked, found) = Foreground::play(self.host, &self.dir, scenario, &mut self.faults)?;
        let killed = self.killed(ID)?;
        if scenario == Scenario::TriedAgain {
            // Killed after it had failed again, the same command tries it once more.
            return self.judge_retry(&found, &["failed"], killed.recorders.len() + 1);
        }
        self.faults.extend(judge(&[asked], &found, &self.host.testimonies()?, &killed));
        Ok(())
    }

    fn note(&self, name: &str) -> anyhow::Result<()> {
        note(&self.dir, name)
    }

    /// Returns whom the trial killed.
    fn killed(&self, job: u64) -> anyhow::Result<Killed> {
        let trace = std::fs::read_to_string(self.dir.join("failpoints/trace"))?;
        let killed = std::fs::read_to_string(self.dir.join("failpoints/killed")).unwrap_or_default();
        let at = |line: &str| -> Option<&str> {
            let line: usize = line.rsplit(' ').next()?.parse().ok()?;
            trace.lines().nth(line - 1)
        };
        let recorders = killed.lines().filter_map(at).filter(|name| name.starts_with("recorder"));
        Ok(Killed { trainers: BTreeSet::new(), recorders: recorders.map(|_| job).collect() })
    }

    // -- what a client does, and does again where nobody answered

    fn submit(&mut self, name: &str, trainer: &Value, fate: Fate) -> anyhow::Result<u64> {
        let job = self.host.job(name, trainer);
        let id = self.again("a submit", |host| match host.submit(name, &job, None)? {
            Answer::Acknowledged(Some(id)) => Ok(Some(id)),
            Answer::Unknown => Ok(None),
            other => bail!("the submit was answered by {other:?}"),
        })?;
        self.asked.push(Asked { name: name.to_owned(), fate, ids: [id].into(), cancel: None });
        Ok(id)
    }

    fn cancel(&mut self, id: u64) -> anyhow::Result<()> {
        let over_by = self.again("a cancel", |host| match host.cancel(id)? {
            Answer::Acknowledged(_) => Ok(Some(Some(monotonic() + CANCEL_WITHIN_S))),
            Answer::Unknown => Ok(None),
            // Over already: by a cancel that was heard and not answered.
            Answer::Refused(_) => Ok(Some(None)),
        })?;
        for asked in self.asked.iter_mut().filter(|asked| asked.ids.contains(&id)) {
            asked.cancel = Some(Cancel { over_by });
        }
        Ok(())
    }

    fn retry(&mut self, id: u64) -> anyhow::Result<()> {
        self.again("a retry", |host| {
            if host.jobs()?.iter().any(|job| job.id > id) {
                return Ok(Some(()));
            }
            match host.ask(&["retry", &id.to_string()])?.0 {
                Answer::Refused(why) => bail!("the retry was refused: {why}"),
                Answer::Acknowledged(_) => Ok(Some(())),
                Answer::Unknown => Ok(None),
            }
        })
    }

    fn remove(&mut self, found: &[Found]) -> anyhow::Result<()> {
        self.note("until")?;
        for job in found {
            self.again("a removal", |host| match host.remove(&[job.id])? {
                Answer::Acknowledged(_) => Ok(Some(())),
                Answer::Unknown => Ok(None),
                Answer::Refused(why) if why.starts_with("exit code 5") => Ok(Some(())),
                Answer::Refused(why) => bail!("job {} cannot be removed: {why}", job.id),
            })?;
        }
        if let Some(job) = self.host.jobs()?.first() {
            self.fault(Kind::Wrong, None, format!("job {} was removed and is {}", job.id, job.state));
        }
        self.again("every job was removed, and their files", |host| {
            Ok(names(&host.state_dir().join("jobs")).is_empty().then_some(()))
        })
    }

    fn again<T>(&self, what: &str, ask: impl Fn(&Host) -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
        let until = Instant::now() + QUIET_WITHIN;
        while Instant::now() < until {
            if let Some(answer) = ask(self.host)? {
                return Ok(answer);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("{what}: not within {} s", QUIET_WITHIN.as_secs())
    }

    fn until_step(&self, wanted: u64) -> anyhow::Result<()> {
        self.again(&format!("step {wanted}"), |host| {
            let told = host.testimonies()?;
            let there = told.iter().any(|line| matches!(line.what, What::Step { step } if step >= wanted));
            Ok(there.then_some(()))
        })
    }

    fn until_quiet(&self) -> anyhow::Result<Vec<Found>> {
        let until = Instant::now() + QUIET_WITHIN;
        loop {
            let found = self.host.jobs()?;
            let Some(job) = found.iter().find(|job| !job.is_over()) else { return Ok(found) };
            if Instant::now() >= until {
                return Ok(found);
            }
            // It ends with the job, or with the daemon.
            self.host.ask(&["wait", &job.id.to_string(), "--timeout", "20"])?;
        }
    }

    // -- what must be so in the end

    /// A job that fails, and its retry, which fails at the same step: it went on from what was saved.
    fn judge_retry(&mut self, found: &[Found], expected: &[&str], excused: usize) -> anyhow::Result<()> {
        let states: Vec<&str> = found.iter().map(|job| job.state.as_str()).collect();
        if states != expected {
            let what = found.iter().map(|job| format!("{} {:?}", job.state, job.reason));
            self.fault(
                Kind::Wrong,
                None,
                format!("the job and its retry are {:?}", what.collect::<Vec<_>>()),
            );
        }
        let (mut pids, mut steps, mut saved) = (Vec::new(), Vec::new(), 0);
        for line in self.host.testimonies()? {
            match line.what {
                What::Start => {
                    pids.push(line.pid);
                    steps.push((saved, Vec::new()));
                }
                What::Beside { of } => {
                    self.fault(Kind::Twice, None, format!("pid {} started while {of} was held", line.pid));
                }
                What::Step { step } => steps.last_mut().context("a start before a step")?.1.push(step),
                What::Saved { step } => saved = step,
                What::End { .. } => {}
            }
        }
        let goes_on =
            steps.iter().all(|(saved, steps)| steps.first().is_none_or(|first| *first == saved + 1));
        let last = steps.last().and_then(|(_, steps)| steps.last()).copied();
        // A failure whose status died with its recorder may be taken for an interruption.
        let trainers = 2..=2 + excused;
        if !trainers.contains(&pids.len()) || !goes_on || last != Some(4) {
            self.fault(
                Kind::Twice,
                None,
                format!("the trainers {pids:?} trained, after what was saved, {steps:?}"),
            );
        }
        Ok(())
    }

    /// The receipt that is shown and the one that lies beside the results tell the same end.
    fn look_at_receipts(&mut self, found: &[Found]) -> anyhow::Result<()> {
        for job in found {
            let id = job.id.to_string();
            let told = self.again("explain", |host| {
                let (answer, told) = host.ask(&["explain", &id, "--json"])?;
                Ok((answer == Answer::Acknowledged(None)).then_some(told))
            })?;
            let told: Value = serde_json::from_str(&told)?;
            if told["state"] != job.state.as_str() {
                self.fault(
                    Kind::Wrong,
                    None,
                    format!("job {id} is {}, its receipt {}", job.state, told["state"]),
                );
            }
            let out = self.dir.join("out").join(&job.name);
            if let Some(state) = self.left_beside(&out, job)? {
                self.fault(
                    Kind::Wrong,
                    None,
                    format!("job {id} is {}, the receipt beside its results says {state}", job.state),
                );
            }
            if job.state == "succeeded" && !out.join("final/trainer_state.json").exists() {
                self.fault(Kind::Wrong, None, format!("job {id} succeeded without its final checkpoint"));
            }
        }
        Ok(())
    }

    /// Returns the state in the receipt that lies in a job's output directory, if it is another one than the job's and stays so.
    fn left_beside(&self, out: &Path, job: &Found) -> anyhow::Result<Option<String>> {
        let path = out.join("receipt.json");
        let until = Instant::now() + RECEIPT_WITHIN;
        loop {
            let text = match std::fs::read_to_string(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                text => text?,
            };
            let receipt: Value = serde_json::from_str(&text)?;
            let state = receipt["state"].as_str().unwrap_or("nothing");
            // A later job has the directory.
            let is_later = receipt["id"].as_u64().is_some_and(|id| id > job.id);
            if is_later || (receipt["id"] == job.id && state == job.state) {
                return Ok(None);
            }
            if Instant::now() >= until {
                return Ok(Some(state.to_owned()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// After the daemon has ended: who and what is left?
    fn look_for_leftovers(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + Duration::from_secs(5);
        // A recorder that has said its last word may still be on its way out.
        while !self.host.everybody().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        for (pid, line) in self.host.everybody() {
            self.fault(Kind::LeftBehind, None, format!("pid {pid} is left: {line}"));
            kill(pid);
        }
        // Without a daemon there is none.
        let log = std::fs::read_to_string(self.host.log()).unwrap_or_default();
        for line in log.lines().filter(|line| line.contains("panicked") || line.contains("a bug")) {
            self.fault(Kind::Wrong, None, format!("the daemon says: {line}"));
        }
        Ok(())
    }
}
