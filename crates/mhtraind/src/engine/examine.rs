//! What must be known about a job before it stands in a queue, and how does it fit on a card now?
//!
//! A job is examined once: model, data, trainer, secrets. From then on a card is only a question to the sizing engine,
//! asked again whenever memory comes or goes.

use std::sync::Arc;

use mhtrain_job::queue::{self, Fit, Room};
use mhtrain_job::spec::JobSpec;
use mhtrain_probe::gpu::{GpuReport, GpuState};
use mhtrain_probe::host::HostReport;
use mhtrain_probe::probe::{ProbeReport, TrainerReport};
use mhtrain_probe::trainer_environment::trainer_environment_as;
use mhtrain_sizing::ladder::{RunAdvice, TierBook};
use mhtrain_sizing::model::Model;
use mhtrain_sizing::plan::{History, Plan};
use mhtrain_swift::command::check_arguments;
use mhtrain_swift::dialect::Dialect;
use mhtrain_swift::environment::TrainerEnvironment;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::look::{DataReport, Look, look};
use super::origin::Origin;
use super::plans::Plans;
use super::prepare::{Candidate, Datasets, Files, Missing, Prepared, chain, look_for_files, sizing_request};
use super::secrets;
use crate::config::Config;
use crate::failure::Failure;

/// A job that can be sized for any card of this host.
#[derive(Clone, Debug)]
pub struct Examined {
    /// The job.
    pub spec: JobSpec,
    /// Its model; `None` while its size is not known, which a download mends.
    pub model: Option<Model>,
    /// What must be downloaded before the job may have a card.
    pub missing: Missing,
    /// Its trainer.
    pub environment: TrainerEnvironment,
    /// What was assumed, a sentence each.
    pub notes: Vec<String>,
    /// Cores that the trainer may use.
    pub cores: u32,
    /// The rows of its data, where somebody could look at them.
    pub rows: Option<Look>,
}

/// A job sized for one card: all that an attempt, and whoever takes it over, needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sized {
    candidate: Candidate,
    plan: Plan,
    environment: TrainerEnvironment,
    advice: RunAdvice,
    notes: Vec<String>,
    /// What was probed, for the receipt.
    probe: Value,
    /// The rows of the data, for the receipt.
    #[serde(default)]
    data: Option<DataReport>,
}

/// Reads what a job needs: its files, its trainer, its secrets.
///
/// # Errors
/// Something is missing; nothing was started.
pub fn examine(spec: JobSpec, origin: &Origin, config: &Config, cores: u32) -> Result<Examined, Failure> {
    let Files { model, missing } = look_for_files(&spec, Datasets::MustExist, origin)?;
    let query = origin.trainer_query(config);
    let environment = trainer_environment_as(&query, &|command| origin.prepare(command))
        .map_err(|e| Failure::failed("no_trainer", chain(&e)).help(e.help()))?;
    secrets::find(&spec.secrets, &origin.secrets)?;
    let (dialect, mut notes) = Dialect::for_environment(&environment);
    check_arguments(&spec, &dialect)
        .map_err(|e| Failure::bad_input("bad_command", chain(&e)).help(e.help()))?;
    let looked = look(&spec, &dialect, origin, config);
    notes.extend(looked.as_ref().err().cloned());
    Ok(Examined { spec, model: model.ok(), missing, environment, notes, cores, rows: looked.ok() })
}

impl Examined {
    /// Returns how the job fits on a card now (`mhtrain_job::queue::fit`), and all that it would start with.
    ///
    /// # Errors
    /// The job cannot be sized at all.
    pub fn fit(
        &self,
        gpu: &GpuState,
        plans: &Plans,
        history: &Arc<History>,
        config: &Config,
    ) -> Result<(Fit, Option<Sized>), Failure> {
        let Some(model) = &self.model else {
            let why = "its size is not known before it is downloaded".to_owned();
            return Ok((Fit::Unusable { why }, None));
        };
        let card = match gpu.card() {
            Ok(card) => card,
            Err(refusal) => return Ok((Fit::Unusable { why: refusal.to_string() }, None)),
        };
        let held_by_others = gpu.held_by_others(&[]);
        let room = Room { total: card.total, free: card.free, held_by_others, holders: holders(gpu) };
        let now = Candidate { card, uuid: gpu.uuid.clone(), held_by_others };
        let rows = self.rows.as_ref().map(|look| &look.profile);
        let (fit, plan) = queue::fit(&room, |free, held_by_others| {
            let mut candidate = Candidate { held_by_others, ..now.clone() };
            candidate.card.free = free;
            let features = self.environment.features();
            let request = sizing_request(&self.spec, model, &candidate, features, config, rows)?;
            Ok::<_, Failure>(plans.answer(request, history))
        })?;
        let advice = || plans.book.run_advice(model, self.cores);
        let sized = plan.map(|plan| self.sized(now, Arc::unwrap_or_clone(plan), &plans.book, advice()));
        Ok((fit, sized))
    }

    fn sized(&self, candidate: Candidate, plan: Plan, book: &TierBook, advice: RunAdvice) -> Sized {
        let tier = &plan.chosen_rung().tier;
        Sized {
            data: self.rows.as_ref().map(|look| look.report(&self.spec, tier, book, &advice)),
            candidate,
            plan,
            environment: self.environment.clone(),
            advice,
            notes: self.notes.clone(),
            probe: Value::Null,
        }
    }
}

impl Sized {
    /// Returns the plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the sized job with what was probed for it.
    #[must_use]
    pub fn with_probe(self, gpus: GpuReport, host: HostReport) -> Sized {
        let report =
            ProbeReport { gpus, host, disk: None, trainer: TrainerReport::Ready(self.environment.clone()) };
        // A report that is no JSON would be a bug of serde; the receipt does without.
        Sized { probe: serde_json::to_value(report).unwrap_or_default(), ..self }
    }

    /// Returns what was probed.
    pub fn probe(&self) -> &Value {
        &self.probe
    }

    /// Returns the UUID of the card.
    pub fn device(&self) -> Option<&str> {
        self.candidate.uuid.as_deref()
    }

    /// Returns the card for people: `GPU 6`.
    pub fn device_name(&self) -> String {
        device_name(self.candidate.card.index, self.candidate.uuid.as_deref())
    }

    /// Returns the sized job as a run takes it, and its trainer.
    pub fn prepared(self, spec: JobSpec, origin: &Origin) -> (Prepared, TrainerEnvironment) {
        let (dialect, _) = Dialect::for_environment(&self.environment);
        let prepared = Prepared {
            spec,
            candidate: self.candidate,
            plan: self.plan,
            dialect,
            advice: self.advice,
            notes: self.notes,
            // A line for somebody who still decides; this job is started.
            would_change: Vec::new(),
            inherited: origin.text_variables(),
            data: self.data,
        };
        (prepared, self.environment)
    }
}

/// Returns a card's name for people.
pub fn device_name(index: Option<u32>, uuid: Option<&str>) -> String {
    match (index, uuid) {
        (Some(index), _) => format!("GPU {index}"),
        (None, Some(uuid)) => uuid.to_owned(),
        (None, None) => "a GPU".to_owned(),
    }
}

fn holders(gpu: &GpuState) -> String {
    let processes = gpu.processes.iter().flatten();
    let named = processes.map(|process| match &process.owner {
        Some(owner) => format!("pid {} of {owner}", process.pid),
        None => format!("pid {}", process.pid),
    });
    named.collect::<Vec<_>>().join(", ")
}
