//! `mhtraind run`: one job, here and now, to its proven end.

use std::path::{Path, PathBuf};

use clap::Args;
use mhtrain_job::event::JobEvent;
use mhtrain_job::receipt::Receipt;
use mhtrain_job::spec::{DeviceWish, JobSpec};
use mhtrain_job::state::JobState;
use mhtrain_probe::nvml::Gpus;
use mhtrain_probe::probe::{ProbeQuery, ProbeReport, TrainerReport, probe};
use mhtrain_supervisor::attempt::Attempt;
use serde_json::Value;

use super::{output, plan};
use crate::config::Config;
use crate::engine::directory::{JobDirectory, Lasting, read_receipt};
use crate::engine::journal::Journal;
use crate::engine::local::{self, LocalRun, OldAttempt};
use crate::engine::look::look;
use crate::engine::observations::{ObservationFile, Observer};
use crate::engine::origin::Origin;
use crate::engine::prepare::{self, Datasets};
use crate::engine::screen::{Screen, Sentences};
use crate::engine::secrets;
use crate::failure::{Failure, Status};

/// Run one job here, in the foreground, through out-of-memory errors to the proven end
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind run job.json
  mhtraind run job.json --continue      # from the last checkpoint, after Ctrl-C or a full disk
  mhtraind run job.json --json > receipt.json

Everything goes to the job's output_dir: attempt-N/ (what the trainer writes), final (a link to the last
checkpoint), receipt.json (what was chosen, why, what was retried). Ctrl-C stops the trainer, and nothing is left
running. Exit code 0 only when success was proven.")]
pub struct RunArgs {
    /// The job file; `-` reads standard input
    job: PathBuf,
    /// Print the receipt as JSON at the end; what happens is told on standard error
    #[arg(long)]
    pub json: bool,
    /// Go on with the job that output_dir holds: take over its live trainer, or resume from its last checkpoint
    #[arg(long = "continue", conflicts_with = "fresh")]
    go_on: bool,
    /// Set what output_dir holds aside (into previous-N, nothing is deleted) and start from the beginning
    #[arg(long)]
    fresh: bool,
}

/// Runs the command.
pub fn run(args: &RunArgs, config: &Config) -> Result<Status, Failure> {
    let spec = prepare::read_job(&args.job)?;
    let sentences = if args.json { Sentences::ToStderr } else { Sentences::ToStdout };
    let verdict = run_job(spec, args, sentences, config)?;
    local::show(&verdict, args.json)?;
    // Only a daemon has another card to give.
    Ok(verdict.status.unwrap_or(Status::Failed))
}

/// What to do with a job that the output directory holds already.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Earlier {
    /// Refuse.
    Refuse,
    /// Go on with it.
    Continue,
    /// Set it aside.
    SetAside,
}

fn run_job(
    spec: JobSpec,
    args: &RunArgs,
    sentences: Sentences,
    config: &Config,
) -> Result<local::Verdict, Failure> {
    let earlier = match (args.go_on, args.fresh) {
        (true, _) => Earlier::Continue,
        (_, true) => Earlier::SetAside,
        _ => Earlier::Refuse,
    };
    let started = start(spec, earlier, sentences, config)?;
    local::run(started, config)
}

/// Probes, sizes and prepares the directory of a job; the next thing is its first attempt.
///
/// # Errors
/// A local file is missing, no card or trainer is there, no rung fits, or the directory holds another job. Nothing
/// was started then, and before the plan stands nothing was written.
pub fn start(
    spec: JobSpec,
    earlier: Earlier,
    sentences: Sentences,
    config: &Config,
) -> Result<LocalRun, Failure> {
    let origin = Origin::of_this_process(config)?;
    may_take_a_card(&spec.device, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())?;
    let output_dir = prepare::output_dir(&spec, &origin);
    let model = prepare::find_files(&spec, Datasets::MustExist, &origin)?;
    let report = probe(&ProbeQuery {
        nvml_library: config.nvml_library(),
        trainer: origin.trainer_query(config),
        output_dir: output_dir.clone(),
    });
    let environment = match &report.trainer {
        TrainerReport::Ready(environment) => environment.clone(),
        TrainerReport::Missing { error, help } => {
            let install = "`mhtraind install-trainer` installs one";
            let help = match help {
                Some(help) if help.contains("install-trainer") => help.clone(),
                Some(help) => format!("{help}\n{install}"),
                None => install.to_owned(),
            };
            return Err(Failure::failed("no_trainer", error).help(help));
        }
    };
    // Looked up again at each spawn; a missing one must be known before anything is started.
    secrets::find(&spec.secrets, &origin.secrets)?;
    let ours = if earlier == Earlier::Continue { live_trainer(&output_dir) } else { Vec::new() };
    let host = prepare::probed_host(&spec, &report, &ours)?;
    let book = prepare::tier_book(config)?;
    let looked = look(&spec, &host.dialect, &origin, config);
    let prepared = prepare::prepare(spec, &model, host, &book, &origin, config, &looked)?;
    let command = plan::typed(&prepared)?;
    let directory = JobDirectory::open(&output_dir)?;
    let (journal, from) = take_up(&directory, &prepared.spec, earlier)?;
    let text = plan::plan_text(&prepared, &command);
    match sentences {
        Sentences::ToStdout => output::line(text)?,
        Sentences::ToStderr => output::note(text),
    }
    Ok(LocalRun {
        probe: probe_json(&report)?,
        prepared,
        environment,
        directory,
        gpus: Gpus::new(config.nvml_library().as_deref()),
        id: None,
        journal,
        other_device: false,
        earlier: from,
        origin,
        screen: Screen::terminal(sentences),
        observer: ObservationFile::of_this_user().map(|file| Box::new(file) as Box<dyn Observer>),
    })
}

/// Refuses to choose a card where the surroundings show programs none. A job that names its card has it all the same.
fn may_take_a_card(wish: &DeviceWish, visible: Option<&str>) -> Result<(), Failure> {
    let Some(visible) = visible.filter(|_| *wish == DeviceWish::Auto) else { return Ok(()) };
    // CUDA takes the cards before the first that it does not know; schedulers write NoDevFiles.
    let first = visible.split(',').next().unwrap_or_default().trim();
    if !(first.is_empty() || first == "-1" || first == "NoDevFiles") {
        return Ok(());
    }
    let what = format!("CUDA_VISIBLE_DEVICES is set to {visible:?} here: no program may use a card");
    let help = "unset it, or name the card in the job: `\"device\": 0`";
    Err(Failure::bad_input("no_visible_device", what).help(help.to_owned()))
}

/// Returns the processes of a trainer that an earlier process of ours left behind in `output_dir`.
fn live_trainer(output_dir: &Path) -> Vec<u32> {
    let records = std::fs::read_dir(output_dir.join(".mhtraind")).into_iter().flatten().flatten();
    let attempts = records.filter_map(|entry| Attempt::open(&entry.path()).ok());
    attempts
        .filter_map(|attempt| attempt.record().trainer().ok().flatten())
        .filter(|trainer| trainer.identity.is_alive())
        .flat_map(|trainer| local::family(trainer.identity.pid))
        .collect()
}

fn probe_json(report: &ProbeReport) -> Result<Value, Failure> {
    serde_json::to_value(report).map_err(|e| Failure::new(Status::Bug, "not_json", e))
}

const HOW_TO_GO_ON: &str =
    "`--continue` goes on with it, `--fresh` sets it aside and starts again, or choose another output_dir";

/// Decides what becomes of a job that the directory holds already.
fn take_up(
    directory: &JobDirectory,
    spec: &JobSpec,
    earlier: Earlier,
) -> Result<(Option<Journal>, Vec<OldAttempt>), Failure> {
    let root = directory.root().display();
    if earlier == Earlier::SetAside {
        directory.goes_on_with_none()?;
        if directory.holds_a_job() {
            directory.set_earlier_job_aside()?;
        }
        return Ok((None, Vec::new()));
    }
    let Some(journal) = Journal::open(&directory.journal())? else {
        directory.end_setting_aside()?;
        if directory.holds_a_job() {
            let what = format!("{root} holds what a job of a daemon left");
            let help = "`mhtraind retry` goes on with that job, `--fresh` sets it aside, or choose another output_dir";
            return Err(Failure::bad_input("not_empty", what).help(help.to_owned()));
        }
        // Somebody may have been killed between setting a job aside and going on with it.
        let before = gone_on_with(directory)?;
        if earlier == Earlier::Refuse && !before.is_empty() {
            let what = format!("{root} holds a job already, which was about to be gone on with");
            return Err(Failure::bad_input("not_empty", what).help(HOW_TO_GO_ON.to_owned()));
        }
        if let Some(aside) = directory.gone_on_with().first()
            && let Some(journal) = journal_aside(aside)?
        {
            must_be_same_job(&journal, spec)?;
        }
        return Ok((None, before));
    };
    let state = journal.state().clone();
    // Nobody was left to write how it ended.
    end_receipt(directory, &journal)?;
    if earlier == Earlier::Refuse {
        let what = format!("{root} holds a job already ({})", state.name());
        return Err(Failure::bad_input("not_empty", what).help(HOW_TO_GO_ON.to_owned()));
    }
    must_be_same_job(&journal, spec)?;
    match state {
        JobState::Succeeded { .. } => Err(Failure::bad_input(
            "done",
            format!("the job in {root} has succeeded: there is nothing to continue"),
        )
        .help("`--fresh` sets it aside and starts again".to_owned())),
        JobState::Failed { .. } | JobState::Cancelled { .. } => {
            drop(journal);
            directory.goes_on_with_this()?;
            directory.set_earlier_job_aside()?;
            Ok((None, gone_on_with(directory)?))
        }
        JobState::Queued { .. }
        | JobState::Waiting { .. }
        | JobState::Starting { .. }
        | JobState::Running { .. }
        | JobState::Recovering { .. } => Ok((Some(journal), gone_on_with(directory)?)),
    }
}

/// Returns the attempts of the jobs that the one of this directory goes on with, oldest first.
fn gone_on_with(directory: &JobDirectory) -> Result<Vec<OldAttempt>, Failure> {
    let mut attempts = Vec::new();
    for aside in directory.gone_on_with() {
        let Some(journal) = journal_aside(&aside)? else { break };
        let of = |attempt| aside.join(format!("attempt-{attempt}"));
        attempts.splice(0..0, OldAttempt::all_of(journal.records(), of));
    }
    Ok(attempts)
}

fn journal_aside(aside: &Path) -> Result<Option<Journal>, Failure> {
    Journal::open(&aside.join(".mhtraind/journal.jsonl"))
}

/// Brings the receipt of a job that is over up to date: the process that ended it may have been killed before it could.
fn end_receipt(directory: &JobDirectory, journal: &Journal) -> Result<(), Failure> {
    let state = journal.state();
    if !state.is_final() || directory.is_being_set_aside() {
        return Ok(());
    }
    let kept = read_receipt(directory.root());
    if kept.as_ref().is_some_and(|kept| kept.state == state.name()) {
        return Ok(());
    }
    let receipt = Receipt::up_to_date(kept, Receipt::from_events(None, journal.records()));
    let text = serde_json::to_vec_pretty(&receipt).map_err(|e| Failure::new(Status::Bug, "not_json", e))?;
    directory.write_receipt(&text, Lasting::OverPowerCut)
}

/// Keys of a job that change nothing about the rows that are trained.
const KEYS_THAT_MAY_CHANGE: [&str; 10] = [
    "name",
    "device",
    "output_dir",
    "report_to",
    "allow",
    "secrets",
    "time_limit",
    "env",
    "priority",
    "labels",
];

/// A job is only continued as what it was: other data or another learning rate would make one model of two runs.
fn must_be_same_job(journal: &Journal, spec: &JobSpec) -> Result<(), Failure> {
    let Some(JobEvent::Submitted { spec: before }) = journal.records().first().map(|record| &record.event)
    else {
        return Ok(());
    };
    let now = spec.to_json();
    let changed: Vec<&str> = now
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| {
            !KEYS_THAT_MAY_CHANGE.contains(&key.as_str()) && before.get(key.as_str()) != Some(value)
        })
        .map(|(key, _)| key.as_str())
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Failure::bad_input(
        "other_job",
        format!("the job file is not the one that was started: it differs in {}", changed.join(", ")),
    )
    .help("put it back to continue, or start again with `--fresh`".to_owned()))
}
