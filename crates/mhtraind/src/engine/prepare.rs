//! What will run, where, and at which rung?
//!
//! Reads the job file and the host, asks the sizing engine once a card, and takes the best answer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mhtrain_job::queue::Rank;
use mhtrain_job::spec::{JobSpec, SpecError, Validation};
use mhtrain_probe::model_files::{FoundDataset, FoundModel, Places, find_dataset, find_model};
use mhtrain_probe::probe::ProbeReport;
use mhtrain_sizing::data::LengthProfile;
use mhtrain_sizing::explain::what_would_change;
use mhtrain_sizing::gpu::Card;
use mhtrain_sizing::ladder::{RunAdvice, TierBook};
use mhtrain_sizing::model::{Model, ResolveError};
use mhtrain_sizing::plan::{History, Plan, PlanError, plan_learned};
use mhtrain_sizing::request::{Request, TrainerFeatures};
use mhtrain_sizing::units::Bytes;
use mhtrain_swift::command::CommandRequest;
use mhtrain_swift::dialect::Dialect;
use mhtrain_swift::environment::TrainerEnvironment;
use serde::{Deserialize, Serialize};

use super::look::{DataReport, Looked};
use super::observations::{ObservationFile, versions};
use super::origin::Origin;
use crate::cli::output;
use crate::config::Config;
use crate::failure::{Failure, Status, unreadable};

/// A card that a job could take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// As the sizing engine sees it.
    pub card: Card,
    /// Its UUID; `None` when it was described by flags.
    pub uuid: Option<String>,
    /// Memory that other processes hold there.
    pub held_by_others: Bytes,
}

/// The host as far as a plan depends on it, probed or described by flags.
#[derive(Clone, Debug)]
pub struct Host {
    /// Cards that the job could take, in order of their index.
    pub candidates: Vec<Candidate>,
    /// What the trainer environment can do.
    pub features: TrainerFeatures,
    /// How the installed ms-swift spells things.
    pub dialect: Dialect,
    /// Cores that the trainer may use.
    pub cores: u32,
    /// What was assumed, a sentence each.
    pub notes: Vec<String>,
    /// What earlier attempts here showed.
    pub history: Arc<History>,
}

/// A sized job.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The job.
    pub spec: JobSpec,
    /// The card that it takes.
    pub candidate: Candidate,
    /// Rungs and choice.
    pub plan: Plan,
    /// How the installed ms-swift spells things.
    pub dialect: Dialect,
    /// What the site's tiers.toml advises beside the rungs.
    pub advice: RunAdvice,
    /// What was assumed about the host, a sentence each.
    pub notes: Vec<String>,
    /// What would make the plan take a higher rung, for people; a line each.
    pub would_change: Vec<String>,
    /// Variables that the trainer inherits.
    pub inherited: BTreeMap<String, String>,
    /// The rows of the data, and what the rung that is taken makes of them; `None` where nobody looked.
    pub data: Option<DataReport>,
}

impl Prepared {
    /// Returns the question for the command of the rung `index`.
    pub fn command_request(&self, rung: usize) -> CommandRequest<'_> {
        CommandRequest {
            spec: &self.spec,
            tier: &self.plan.rungs[rung].tier,
            dialect: &self.dialect,
            device_index: self.candidate.card.index,
            advice: &self.advice,
            inherited: &self.inherited,
        }
    }
}

/// Returns where everything of a job goes, absolute.
pub fn output_dir(spec: &JobSpec, origin: &Origin) -> PathBuf {
    let path = &spec.output_dir;
    origin.cwd.join(path.strip_prefix("./").unwrap_or(path))
}

/// Returns the working directory.
///
/// # Errors
/// It was removed, or may not be read.
pub fn working_dir() -> Result<PathBuf, Failure> {
    std::env::current_dir().map_err(|e| unreadable(Path::new("."), &e))
}

/// Reads and checks a job file; `-` reads standard input.
///
/// # Errors
/// It cannot be read, is no job, or asks for what this version does not do.
pub fn read_job(path: &Path) -> Result<JobSpec, Failure> {
    let mut spec = JobSpec::parse(&output::read_input(path)?).map_err(|e| spec_failure(path, &e))?;
    spec.check_foreground().map_err(|e| spec_failure(path, &e))?;
    if let Some(home) = std::env::home_dir() {
        spec.expand_home(&home);
    }
    Ok(spec)
}

fn spec_failure(path: &Path, error: &SpecError) -> Failure {
    Failure::bad_input(error.code(), format!("{}: {error}", path.display())).help(error.help())
}

/// Whether the data sets of a job must be there.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Datasets {
    /// Local ones must exist: the job is about to run.
    MustExist,
    /// They are not looked for: the plan may be for another machine.
    NotNeeded,
}

/// What a job's model and data sets are, as far as they are on this machine.
#[derive(Clone, Debug)]
pub struct Files {
    /// The model; an error where its size is not known, which a download mends.
    pub model: Result<Model, Failure>,
    /// What the trainer would download.
    pub missing: Missing,
}

/// What a job needs and this machine may not have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// The model, when it is in no cache.
    pub model: Option<String>,
    /// Data sets of a hub. Their caches hold prepared tables that only their own library understands, so these may be
    /// there; then it takes seconds to find that out.
    pub datasets: Vec<String>,
}

impl Missing {
    /// Returns whether everything is there.
    pub fn is_nothing(&self) -> bool {
        self.model.is_none() && self.datasets.is_empty()
    }
}

/// Finds the model, and the data sets where they are needed.
///
/// # Errors
/// A local path is not there or holds no model; a hub id that no source knows the size of.
pub fn find_files(spec: &JobSpec, datasets: Datasets, origin: &Origin) -> Result<Model, Failure> {
    look_for_files(spec, datasets, origin)?.model
}

/// Like [`find_files`], where what is not here may still be downloaded.
///
/// # Errors
/// A local path is not there or holds no model.
pub fn look_for_files(spec: &JobSpec, datasets: Datasets, origin: &Origin) -> Result<Files, Failure> {
    let variable =
        |name: &str| spec.env.get(name).map(std::ffi::OsString::from).or_else(|| origin.variable(name));
    let places = Places::from_variables(&origin.cwd, variable);
    let found = find_model(&spec.model, &places)
        .map_err(|e| Failure::bad_input("missing_model", chain(&e)).help(e.help()))?;
    let mut missing = Missing::default();
    if datasets == Datasets::MustExist {
        let validation = match &spec.validation {
            Some(Validation::Datasets(datasets)) => datasets.as_slice(),
            Some(Validation::Share(_)) | None => &[],
        };
        for entry in spec.dataset.iter().chain(validation) {
            let found = find_dataset(entry, &places)
                .map_err(|e| Failure::bad_input("missing_dataset", &e).help(e.help()))?;
            if let FoundDataset::Hub { .. } = found {
                missing.datasets.push(entry.clone());
            }
        }
    }
    let unknown = |e: ResolveError| Failure::bad_input("unknown_model", chain(&e)).help(e.help());
    let model = match &found {
        FoundModel::Here(files) => {
            Ok(Model::resolve(&spec.model, Some(&files.config), files.weight_files()).map_err(unknown)?)
        }
        FoundModel::NotLocal { id } => {
            missing.model = Some(id.clone());
            Model::resolve(id, None, None).map_err(unknown)
        }
    };
    Ok(Files { model, missing })
}

/// Returns an error with its causes behind colons.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// Returns the host as it was probed, for the card that the job wishes. What the processes `ours` hold there counts as
/// free: they are the job's own.
///
/// # Errors
/// No card can take the job.
pub fn probed_host(spec: &JobSpec, report: &ProbeReport, ours: &[u32]) -> Result<Host, Failure> {
    let cards = report
        .gpus
        .resolve(&spec.device)
        .map_err(|e| Failure::failed("no_device", &e).help(device_help(e.help())))?;
    let candidates = cards
        .into_iter()
        .map(|(state, mut card)| {
            let held_by_others = state.held_by_others(ours);
            let held_by_us = state.held_by_others(&[]).saturating_sub(held_by_others);
            card.free = card.free.saturating_add(held_by_us);
            Candidate { card, uuid: state.uuid.clone(), held_by_others }
        })
        .collect();
    let (dialect, mut notes) = match report.trainer.environment() {
        Some(environment) => Dialect::for_environment(environment),
        None => Dialect::for_versions(None, None),
    };
    let features = report.trainer.environment().map_or_else(
        || {
            notes.push(
                "no trainer environment was found; flash-attn and bitsandbytes are taken for installed"
                    .to_owned(),
            );
            TrainerFeatures { flash_attn: true, liger: false, bitsandbytes: true, experts: dialect.experts() }
        },
        |environment| environment.features(),
    );
    let cores = u32::try_from(report.host.cores).unwrap_or(u32::MAX);
    let history = report.trainer.environment().map(history_of_this_user).unwrap_or_default();
    Ok(Host { candidates, features, dialect, cores, notes, history })
}

/// Returns what the foreground runs of this user showed, for a trainer.
fn history_of_this_user(environment: &TrainerEnvironment) -> Arc<History> {
    let uid = rustix::process::geteuid().as_raw();
    let file = ObservationFile::of_this_user();
    file.map(|file| file.read().history(uid, &versions(environment))).unwrap_or_default()
}

fn device_help(help: Option<String>) -> String {
    let plan = "`mhtraind plan` can plan for a card that is not here: --gpu-free 22.5GiB --gpu-total 24GiB";
    match help {
        Some(help) => format!("{help}\n{plan}"),
        None => plan.to_owned(),
    }
}

/// Returns the tier book of the site.
///
/// # Errors
/// The site's own file cannot be read or understood.
pub fn tier_book(config: &Config) -> Result<TierBook, Failure> {
    if config.sizing.tiers.is_empty() {
        return Ok(TierBook::builtin());
    }
    let path = PathBuf::from(&config.sizing.tiers);
    let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
    TierBook::from_toml(&text).map_err(|e| {
        Failure::bad_input("bad_tiers", format!("{}: {}", path.display(), chain(&e))).help(e.help())
    })
}

/// Sizes a job on every card that it could take, and takes the best: the most faithful profile, then the fastest rung, then
/// the most free memory.
///
/// # Errors
/// No rung fits anywhere; the error is that of the card with the most free memory.
pub fn prepare(
    spec: JobSpec,
    model: &Model,
    host: Host,
    book: &TierBook,
    origin: &Origin,
    config: &Config,
    looked: &Looked,
) -> Result<Prepared, Failure> {
    let rows = looked.as_ref().ok().map(|look| &look.profile);
    let asked = |candidate: &Candidate| sizing_request(&spec, model, candidate, host.features, config, rows);
    let mut by_free = host.candidates.clone();
    by_free.sort_by_key(|candidate| std::cmp::Reverse(candidate.card.free));
    let mut best: Option<(Candidate, Plan)> = None;
    let mut refusal: Option<(Candidate, PlanError)> = None;
    for candidate in by_free {
        match plan_learned(&asked(&candidate)?, book, &host.history) {
            Ok(plan) => {
                let rank = |(candidate, plan): &(Candidate, Plan)| Rank::of(plan, candidate.card.free);
                let this = (candidate, plan);
                if best.as_ref().is_none_or(|other| rank(&this) > rank(other)) {
                    best = Some(this);
                }
            }
            Err(error) => {
                refusal.get_or_insert((candidate, error));
            }
        }
    }
    match (best, refusal) {
        (Some((candidate, plan)), _) => {
            let advice = book.run_advice(model, host.cores);
            let tier = &plan.chosen_rung().tier;
            Ok(Prepared {
                would_change: what_would_change(&asked(&candidate)?, book, &host.history, &plan),
                data: looked.as_ref().ok().map(|look| look.report(&spec, tier, book, &advice)),
                advice,
                spec,
                candidate,
                plan,
                dialect: host.dialect,
                notes: host.notes.into_iter().chain(looked.as_ref().err().cloned()).collect(),
                inherited: origin.text_variables(),
            })
        }
        (None, Some((candidate, error))) => {
            let place =
                candidate.card.index.map_or(candidate.card.name.clone(), |index| format!("GPU {index}"));
            Err(Failure::failed("no_plan", format!("no plan on {place}: {}", chain(&error)))
                .help(error.help()))
        }
        (None, None) => Err(Failure::new(Status::Bug, "bug", "a job without any card to size it for")),
    }
}

/// Returns what a job asks the sizing engine about one card.
///
/// # Errors
/// A pinned value that cannot be.
pub fn sizing_request(
    spec: &JobSpec,
    model: &Model,
    candidate: &Candidate,
    features: TrainerFeatures,
    config: &Config,
    rows: Option<&LengthProfile>,
) -> Result<Request, Failure> {
    let Candidate { card, held_by_others, .. } = candidate;
    let request = spec
        .sizing_request(model.clone(), card.clone(), *held_by_others, features, config.sizing.oom_risk)
        .map_err(|e| Failure::bad_input(e.code(), &e).help(e.help()))?;
    Ok(Request { data: rows.cloned(), ..request })
}
