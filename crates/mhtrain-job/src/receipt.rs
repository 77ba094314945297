//! What came of a job, and what proves it?
//!
//! The receipt is the answer of `mhtraind explain` and is written to `<output_dir>/receipt.json`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mhtrain_sizing::plan::{Plan, Rung};
use mhtrain_sizing::tier::Tier;
use mhtrain_sizing::units::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnosis::Diagnosis;
use crate::event::{AttemptStart, Exit, JobEvent, Record, Resume, ResumeKind};
use crate::rerun::Adjustment;
use crate::state::JobState;

/// Version of the receipt that is written.
pub const RECEIPT_VERSION: u32 = 1;

/// Everything that explains a job. Field names are those of the JSON interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// Version of the format.
    pub version: u32,
    /// Id of the job; `None` for a job in the foreground.
    pub id: Option<u64>,
    /// The job, complete (`JobSpec::to_json`).
    pub job: Value,
    /// Name of its last state.
    pub state: String,
    /// Why it is in that state.
    pub reason: Option<String>,
    /// What to do, where something can be done.
    pub help: Option<String>,
    /// When the job was accepted, RFC 3339.
    pub submitted_at: String,
    /// When it was over, RFC 3339; `None` before that.
    pub ended_at: Option<String>,
    /// The card, the host and the trainer environment as they were found.
    pub probe: Value,
    /// Installed versions by distribution name.
    pub versions: BTreeMap<String, String>,
    /// The rung that the first attempt took; `None` when no plan was possible.
    pub chosen: Option<Tier>,
    /// Effective batch of every rung.
    pub effective_batch: Option<u64>,
    /// Every rung with the reason why it was, or was not, taken.
    pub rungs: Vec<RungNote>,
    /// What differs from the recipe or from what was asked.
    pub notes: Vec<String>,
    /// The rows of the data and what the run makes of them; `None` where nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// Every attempt, in order.
    pub attempts: Vec<AttemptNote>,
    /// What the success rests on; `None` without success.
    pub proof: Option<ProofKind>,
    /// The numbers and paths behind `proof`.
    pub proof_facts: Option<ProofFacts>,
    /// Rows of the dataset that were not trained; `None` when that cannot be known.
    pub rows_dropped: Option<u64>,
    /// What went on in spite of something.
    pub warnings: Vec<String>,
}

/// A rung of the ladder, as the receipt keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RungNote {
    /// The rung.
    pub tier: Tier,
    /// Predicted device peak, best guess.
    pub predicted_peak_bytes: Bytes,
    /// What the card must have free for it.
    pub admission_bytes: Bytes,
    /// Whether it was admitted.
    pub fits: bool,
    /// Why it was, or was not, taken.
    pub why: String,
}

/// One attempt, as the receipt keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttemptNote {
    /// Number of the attempt; the first is 1.
    pub attempt: u32,
    /// Its rung.
    pub tier: Tier,
    /// What was changed beside the rung.
    pub adjustments: Vec<Adjustment>,
    /// From where it went on; `None` for a beginning.
    pub resume: Option<Resume>,
    /// When it was started, RFC 3339.
    pub started_at: String,
    /// When it was gone, RFC 3339; `None` while it lives.
    pub ended_at: Option<String>,
    /// How the trainer ended.
    pub exit: Option<Exit>,
    /// Why.
    pub diagnosis: Option<Diagnosis>,
    /// Last optimizer step that was finished.
    pub last_step: Option<u64>,
    /// Optimizer steps that were planned.
    pub max_steps: Option<u64>,
    /// Measured device peak.
    pub peak_bytes: Option<Bytes>,
    /// What was decided after it, in words.
    pub then: Option<String>,
}

/// What a success rests on.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofKind {
    /// The number of rows is known, and every one of them was trained as often as planned.
    Rows,
    /// The number of rows is not known: exit status and steps alone say it.
    ExitAndSteps,
}

/// What proves a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProofFacts {
    /// Exit status of the trainer; `None` where it was lost.
    pub exit_code: Option<i32>,
    /// Whether the trainer wrote its end-of-training line in this attempt.
    pub end_of_training: bool,
    /// Optimizer steps that were done.
    pub global_step: u64,
    /// Optimizer steps that were planned: `ceil(rows / effective_batch) x epochs`.
    pub max_steps: u64,
    /// Rows, or packs, of the train set after filtering; `None` where it cannot be known.
    pub rows: Option<u64>,
    /// Effective batch.
    pub effective_batch: u64,
    /// Passes over the rows.
    pub epochs: f64,
    /// The final checkpoint, complete.
    pub checkpoint: String,
}

impl From<&Rung> for RungNote {
    fn from(rung: &Rung) -> RungNote {
        RungNote {
            tier: rung.tier.clone(),
            predicted_peak_bytes: rung.predicted_peak_bytes,
            admission_bytes: rung.admission_bytes,
            fits: rung.fits,
            why: rung.why.clone(),
        }
    }
}

impl AttemptNote {
    /// Returns the note of an attempt that is about to start.
    pub fn begun(start: &AttemptStart, at: String) -> AttemptNote {
        AttemptNote {
            attempt: start.attempt,
            tier: start.tier.clone(),
            adjustments: start.adjustments.clone(),
            resume: start.resume.clone(),
            started_at: at,
            ended_at: None,
            exit: None,
            diagnosis: None,
            last_step: None,
            max_steps: None,
            peak_bytes: None,
            then: None,
        }
    }

    /// Returns this note with what was measured of the same attempt, which no event tells.
    fn with_measures(self, kept: &[AttemptNote]) -> AttemptNote {
        let Some(kept) = kept.iter().find(|kept| kept.attempt == self.attempt) else { return self };
        AttemptNote {
            max_steps: self.max_steps.or(kept.max_steps),
            peak_bytes: self.peak_bytes.or(kept.peak_bytes),
            ..self
        }
    }
}

impl Receipt {
    /// Returns the receipt of a job that was just accepted.
    pub fn new(job: Value, submitted_at: String) -> Receipt {
        Receipt {
            version: RECEIPT_VERSION,
            id: None,
            job,
            state: "queued".to_owned(),
            reason: None,
            help: None,
            submitted_at,
            ended_at: None,
            probe: Value::Null,
            versions: BTreeMap::new(),
            chosen: None,
            effective_batch: None,
            rungs: Vec::new(),
            notes: Vec::new(),
            data: None,
            attempts: Vec::new(),
            proof: None,
            proof_facts: None,
            rows_dropped: None,
            warnings: Vec::new(),
        }
    }

    /// Returns the receipt that a job's events tell. What only the process knew that followed it (measured peaks) is not
    /// among them.
    pub fn from_events(id: Option<u64>, records: &[Record]) -> Receipt {
        let (job, submitted_at) = match records.first() {
            Some(Record { event: JobEvent::Submitted { spec }, at, .. }) => (spec.clone(), at.clone()),
            Some(record) => (Value::Null, record.at.clone()),
            None => (Value::Null, String::new()),
        };
        let mut receipt = Receipt::new(job, submitted_at);
        receipt.id = id;
        for record in records {
            receipt.add(record);
        }
        if let Ok(state) = JobState::fold(records.iter().map(|record| &record.event)) {
            receipt.state = state.name().to_owned();
            receipt.reason = state.reason();
            if state.is_final() {
                receipt.ended_at = records.last().map(|record| record.at.clone());
            }
        }
        receipt
    }

    /// Returns the receipt that was kept, which knows more than the events do, with what they tell of the end where its writer
    /// did not live to see it.
    #[must_use]
    pub fn up_to_date(kept: Option<Receipt>, told: Receipt) -> Receipt {
        let Some(kept) = kept else { return told };
        if kept.state == told.state {
            return kept;
        }
        Receipt {
            state: told.state,
            reason: told.reason,
            help: told.help,
            ended_at: told.ended_at,
            attempts: told
                .attempts
                .into_iter()
                .map(|attempt| attempt.with_measures(&kept.attempts))
                .collect(),
            warnings: told.warnings,
            proof: told.proof,
            ..kept
        }
    }

    /// Adds what one event tells about the attempts.
    fn add(&mut self, record: &Record) {
        match &record.event {
            JobEvent::AttemptStarting(start) => {
                self.attempts.push(AttemptNote::begun(start, record.at.clone()));
            }
            JobEvent::AttemptEnded { exit, diagnosis, last_step, .. } => {
                if let Some(note) = self.attempts.last_mut() {
                    note.ended_at = Some(record.at.clone());
                    note.exit = Some(exit.clone());
                    note.diagnosis = Some(diagnosis.as_ref().clone());
                    note.last_step = *last_step;
                }
            }
            JobEvent::RerunDecided(rerun) => self.then(&rerun.reason),
            JobEvent::Warned { warning } => self.warnings.push(warning.clone()),
            JobEvent::Succeeded { proof } => {
                self.then("success was proven");
                self.proof = proof.get("proof").cloned().and_then(|kind| serde_json::from_value(kind).ok());
            }
            JobEvent::Failed { reason, help } => {
                self.then(reason);
                self.help.clone_from(help);
            }
            JobEvent::Submitted { .. }
            | JobEvent::Planned { .. }
            | JobEvent::Waiting { .. }
            | JobEvent::Started { .. }
            | JobEvent::StopRequested { .. }
            | JobEvent::Cancelled { .. } => {}
        }
    }

    /// Notes what was decided after the last attempt.
    pub fn then(&mut self, what: &str) {
        if let Some(note) = self.attempts.last_mut() {
            note.then = Some(what.to_owned());
        }
    }

    /// Takes over what was planned.
    pub fn record_plan(&mut self, plan: &Plan) {
        self.chosen = plan.rungs.get(plan.chosen).map(|rung| rung.tier.clone());
        self.effective_batch = Some(plan.effective_batch);
        self.rungs = plan.rungs.iter().map(RungNote::from).collect();
        self.notes.clone_from(&plan.notes);
    }
}

/// Returns the receipt for people.
pub fn render(receipt: &Receipt) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail, so the results below carry nothing.
    let _ = render_head(&mut text, receipt);
    let _ = render_rungs(&mut text, receipt);
    let _ = render_attempts(&mut text, receipt);
    let _ = render_proof(&mut text, receipt);
    let _ = render_list(&mut text, "notes", &receipt.notes);
    let _ = render_list(&mut text, "warnings", &receipt.warnings);
    text
}

fn render_head(text: &mut String, receipt: &Receipt) -> std::fmt::Result {
    let name = receipt.job.get("name").and_then(Value::as_str).unwrap_or("job");
    match receipt.id {
        Some(id) => write!(text, "job {id}, {name}: {}", receipt.state)?,
        None => write!(text, "{name}: {}", receipt.state)?,
    }
    if let Some(reason) = &receipt.reason {
        write!(text, " ({reason})")?;
    }
    writeln!(text)?;
    if let Some(help) = &receipt.help {
        writeln!(text, "help: {help}")?;
    }
    write!(text, "from {}", receipt.submitted_at)?;
    match &receipt.ended_at {
        Some(ended) => writeln!(text, " to {ended}")?,
        None => writeln!(text)?,
    }
    if !receipt.versions.is_empty() {
        let versions: Vec<String> =
            receipt.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        writeln!(text, "with {}", versions.join(", "))?;
    }
    Ok(())
}

fn render_rungs(text: &mut String, receipt: &Receipt) -> std::fmt::Result {
    if receipt.rungs.is_empty() {
        return Ok(());
    }
    write!(text, "\nrungs")?;
    if let Some(batch) = receipt.effective_batch {
        write!(text, " (effective batch {batch})")?;
    }
    writeln!(text)?;
    for rung in &receipt.rungs {
        let mark = if receipt.chosen.as_ref() == Some(&rung.tier) { '>' } else { ' ' };
        let tier = rung.tier.to_string();
        writeln!(text, "{mark} {tier:<44} {:>10}  {}", rung.predicted_peak_bytes, rung.why)?;
    }
    Ok(())
}

fn render_attempts(text: &mut String, receipt: &Receipt) -> std::fmt::Result {
    if receipt.attempts.is_empty() {
        return Ok(());
    }
    writeln!(text, "\nattempts")?;
    receipt.attempts.iter().try_for_each(|attempt| render_attempt(text, attempt))
}

fn render_attempt(text: &mut String, attempt: &AttemptNote) -> std::fmt::Result {
    writeln!(text, "{:>2}  {}", attempt.attempt, attempt.tier)?;
    let ended = attempt.ended_at.as_deref().unwrap_or("now");
    writeln!(text, "    {} to {ended}", attempt.started_at)?;
    writeln!(text, "    {}", resume_in_words(attempt.resume.as_ref()))?;
    if !attempt.adjustments.is_empty() {
        let changes: Vec<String> = attempt.adjustments.iter().map(|change| change.to_string()).collect();
        writeln!(text, "    with {}", changes.join(", "))?;
    }
    if let Some(step) = attempt.last_step {
        match attempt.max_steps {
            Some(max) => writeln!(text, "    reached step {step} of {max}")?,
            None => writeln!(text, "    reached step {step}")?,
        }
    }
    if let Some(peak) = attempt.peak_bytes {
        writeln!(text, "    measured peak {peak}")?;
    }
    if let Some(diagnosis) = &attempt.diagnosis {
        let doubt = if diagnosis.certain { "" } else { ", not certain" };
        writeln!(text, "    ended: {}{doubt}", diagnosis.kind)?;
        if !diagnosis.evidence.line.is_empty() {
            writeln!(text, "    | {}", diagnosis.evidence.line)?;
        }
    }
    match &attempt.then {
        Some(then) => writeln!(text, "    then: {then}"),
        None => Ok(()),
    }
}

fn resume_in_words(resume: Option<&Resume>) -> String {
    let Some(resume) = resume else { return "from the beginning".to_owned() };
    let again = match resume.steps_repeated {
        0 => "no step is repeated".to_owned(),
        steps => format!("{steps} step(s) are repeated"),
    };
    match resume.kind {
        ResumeKind::Exact => format!("resumed exactly after step {}, {again}", resume.from_step),
        ResumeKind::WeightsOnly => {
            format!("resumed with the weights of step {} only, {again}", resume.from_step)
        }
        ResumeKind::Restart => format!("started again from the beginning, {again}"),
    }
}

fn render_proof(text: &mut String, receipt: &Receipt) -> std::fmt::Result {
    let Some(kind) = receipt.proof else { return Ok(()) };
    writeln!(text, "\nproof: {kind}")?;
    if let Some(facts) = &receipt.proof_facts {
        let ProofFacts { global_step, max_steps, effective_batch, epochs, .. } = facts;
        writeln!(
            text,
            "  step {global_step} of {max_steps}, effective batch {effective_batch}, epochs {epochs}"
        )?;
        if let Some(rows) = facts.rows {
            writeln!(text, "  {rows} rows after filtering and packing")?;
        }
        writeln!(text, "  {}", facts.checkpoint)?;
    }
    match receipt.rows_dropped {
        Some(rows) => writeln!(text, "  {rows} row(s) dropped"),
        None => Ok(()),
    }
}

fn render_list(text: &mut String, title: &str, lines: &[String]) -> std::fmt::Result {
    if lines.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n{title}")?;
    lines.iter().try_for_each(|line| writeln!(text, "- {line}"))
}

impl std::fmt::Display for ProofKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ProofKind::Rows => "every row that was planned was trained",
            ProofKind::ExitAndSteps => "exit status and steps (the number of rows is not known)",
        })
    }
}

impl std::fmt::Display for Adjustment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Adjustment::ExpandableSegments => f.write_str("expandable segments"),
            Adjustment::EvalBatch(rows) => write!(f, "evaluation batch {rows}"),
            Adjustment::DataloaderWorkers(count) => write!(f, "{count} data-loader workers"),
            Adjustment::NewPort => f.write_str("another port"),
            Adjustment::RecipeStable => f.write_str("the recipe's stable learning"),
        }
    }
}

#[cfg(test)]
mod tests;
