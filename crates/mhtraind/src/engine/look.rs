//! What are the rows of a job's data, in tokens?
//!
//! A process of its own looks, as the job's user: tokenizers and data files are code and megabytes of strangers, and whatever
//! they do to a parser ends with that process, at the latest when its time is over.
//!
//! ```text
//! look()  --question on stdin-->  mhtraind look-at-data  --answer on stdout-->  Look
//!                                      cache: <user's cache>/lengths/<hash>.json, by content; <user's cache>/hashes.json
//! ```

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mhtrain_job::spec::{JobSpec, Validation};
use mhtrain_probe::content_hash::{Content, ContentHashes, FileIdentity};
use mhtrain_probe::data_files::{DataFiles, data_files};
use mhtrain_probe::model_files::{
    FoundDataset, FoundModel, ModelFiles, Places, dataset_in_caches, find_dataset, find_model,
};
use mhtrain_probe::token_lengths::{Counted, TemplateWish, TokenCounter, book_template, count_rows};
use mhtrain_sizing::data::LengthProfile;
use mhtrain_sizing::ladder::{RunAdvice, TierBook};
use mhtrain_sizing::tier::{Steps, Tier};
use mhtrain_swift::data_use::{DataUse, LongRows, RunFacts, data_use, percent};
use mhtrain_swift::dialect::{Dialect, Line};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::origin::Origin;
use super::prepare::chain;
use crate::config::Config;

/// Hidden verb of the process that looks.
pub const LOOK_VERB: &str = "look-at-data";

/// How much longer than its time the process that looks may take: it opens a tokenizer of some MiB first, and ends with a
/// row that is begun.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest answer that is read: a histogram of 100,000 different lengths has 2 MiB.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Most answers that are kept.
const CACHED_MAX: usize = 100;

/// What is counted otherwise than before, or kept otherwise, has another number: earlier answers are not read.
const CACHE_VERSION: u32 = 2;

/// Most of the time that goes into hashes of files, beside that of the look: half of the patience with it. A file that was
/// not hashed by then is known by what the kernel says about it, until it changes.
const HASH_TIME_MAX: Duration = Duration::from_secs(5);

/// Answers that this process remembers: the next job of a user often trains on the same files, and a process
/// takes longer than all else at a submit.
const REMEMBERED_MAX: usize = 8;

/// The last answers, each with its user and what it depends on.
static BEFORE: Mutex<VecDeque<(Option<u32>, String, Look)>> = Mutex::new(VecDeque::new());

/// What the look found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Lengths of the rows of the train set.
    pub profile: LengthProfile,
    /// ms-swift's chat template that they were counted with; `None`: the tokenizer's own.
    pub template: Option<String>,
    /// Rows with tools or pictures, whose tokens are only about known.
    pub approximate: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// Bytes that the measured rows came from.
    pub bytes_read: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Whether the answer was in the cache.
    pub cached: bool,
    /// What is wrong with the first row that the trainer would stop at.
    pub problem: Option<String>,
}

/// The rows of a job, or why nobody looked at them; a sentence for people.
pub type Looked = Result<Look, String>;

/// What was found, and what the rung that is taken makes of it. Field names are those of the JSON interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// What the run makes of the rows.
    #[serde(flatten)]
    pub data: DataUse,
    /// ms-swift's chat template that the rows were counted with; `None`: the tokenizer's own.
    pub template: Option<String>,
    /// Seconds that the look took.
    pub look_s: f64,
    /// Whether the answer was in the cache.
    pub cached: bool,
}

impl Look {
    /// Returns what `tier` makes of the rows.
    pub fn report(&self, spec: &JobSpec, tier: &Tier, book: &TierBook, advice: &RunAdvice) -> DataReport {
        let mut data = data_use(&self.profile, tier, &run_facts(spec, book, advice));
        if self.template.is_none() {
            data.warnings.push(
                "ms-swift's chat template of this model is not known here: rows were counted with the tokenizer's own, \
                 and may differ by some tokens a round"
                    .to_owned(),
            );
        }
        if self.approximate > 0 {
            data.warnings.push(format!(
                "{} of the measured rows have tools or pictures, whose tokens are only about known",
                self.approximate
            ));
        }
        if let Some(problem) = &self.problem {
            // First: nothing else about the run matters before this is mended.
            let about = if data.exact { "" } else { "about " };
            data.warnings.insert(
                0,
                format!(
                    "the trainer will stop at {about}{} rows that cannot be read, not leave them out: {problem}",
                    data.unreadable
                ),
            );
        }
        DataReport { data, template: self.template.clone(), look_s: self.seconds, cached: self.cached }
    }
}

/// Returns what a job says about its steps beside the rung.
fn run_facts(spec: &JobSpec, book: &TierBook, advice: &RunAdvice) -> RunFacts {
    let number = |name: &str| {
        let value = spec.args.get(name)?;
        value.as_f64().or_else(|| value.as_str()?.parse().ok())
    };
    let whole = |name: &str| {
        number(name).filter(|number| *number >= 1.0).map(|number| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "1 or more; `as` saturates"
            )]
            let whole = number as u64;
            whole
        })
    };
    let eval_steps = match number("eval_steps") {
        Some(share) if share < 1.0 => Steps::Share(share),
        Some(_) => Steps::Count(u32::try_from(whole("eval_steps").unwrap_or(1)).unwrap_or(u32::MAX)),
        None => Steps::Count(advice.eval_steps),
    };
    let profiles = &book.profiles;
    let mut other_lengths =
        vec![profiles.shorter.max_length, profiles.standard.max_length, profiles.long.max_length];
    other_lengths.sort_unstable();
    other_lengths.dedup();
    RunFacts {
        long_rows: LongRows::of_strategy(spec.args.get("truncation_strategy").and_then(Value::as_str)),
        packing_length: whole("packing_length").and_then(|length| u32::try_from(length).ok()),
        // A pinned value was checked when the job was read.
        max_steps: spec.max_steps().unwrap_or_default(),
        eval_steps: spec.validation.is_some().then_some(eval_steps),
        warmup_steps: whole("warmup_steps"),
        other_lengths,
    }
}

impl DataReport {
    /// Returns the report for people; a line each.
    pub fn lines(&self) -> Vec<String> {
        let data = &self.data;
        let about = if data.exact { "" } else { "about " };
        let template = self.template.as_deref().unwrap_or("the tokenizer's own");
        let basis = if data.exact {
            format!("every row counted, chat template {template}")
        } else {
            format!("estimated from {} rows, chat template {template}", data.measured)
        };
        let mut lines = vec![format!(
            "data: {about}{} rows, {about}{} tokens; a row has {} (median), {} (95 %), {} (99 %), {} (longest); {basis}",
            data.rows, data.tokens, data.p50, data.p95, data.p99, data.max
        )];
        let packs = data.packed_rows.map_or(String::new(), |packs| format!(" in {about}{packs} packs"));
        lines.push(format!(
            "      @{}: {about}{} rows dropped ({}), {about}{} trained{packs}, {about}{} optimizer steps",
            data.max_length,
            data.rows_dropped,
            percent(data.share_dropped),
            data.rows_trained,
            data.optimizer_steps
        ));
        lines
    }
}

/// What the process that looks is asked.
#[derive(Debug, Serialize, Deserialize)]
struct Question {
    model_directory: PathBuf,
    wish: TemplateWish,
    entries: Vec<Entry>,
    /// Share that is split off for evaluation.
    validation: Option<f64>,
    within_s: u32,
    cache: Option<PathBuf>,
}

/// One data set of the job.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    path: PathBuf,
    /// How many rows are taken; `None`: all.
    rows: Option<u64>,
}

/// Looks at the rows of a job's data, within the time that the settings give.
///
/// # Errors
/// A sentence that says why nobody could: the model or a data set is not on this machine, there is no tokenizer, the job
/// changes what the rows are in a way that is not known here, or it took too long.
pub fn look(spec: &JobSpec, dialect: &Dialect, origin: &Origin, config: &Config) -> Looked {
    if config.data.look_s == 0 {
        return Err("the rows of the data were not looked at (`look_s` is 0)".to_owned());
    }
    if let Some(name) = changed_by(spec) {
        return Err(format!("the rows of the data were not looked at: `args.{name}` changes what they are"));
    }
    let why = |what: String| format!("the rows of the data were not looked at: {what}");
    ask(&question(spec, dialect, origin, config).map_err(why)?, origin).map_err(why)
}

/// Returns the argument that makes other rows, or other texts, of the data than are counted here.
fn changed_by(spec: &JobSpec) -> Option<&'static str> {
    let is_on = |name: &str| {
        let value = spec.args.get(name)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        (!matches!(text.to_lowercase().as_str(), "false" | "null" | "[]" | "{}" | "")).then_some(())
    };
    let names = [
        "streaming",
        "columns",
        "lazy_tokenize",
        "interleave_prob",
        "cached_dataset",
        "custom_dataset_info",
        "disable_auto_column_mapping",
    ];
    let is_said = |name: &str, value: &str| spec.args.get(name).is_some_and(|said| said == value);
    let is_off = spec.args.get("use_chat_template").is_some_and(|on| on == false || on == "false");
    names.into_iter().find(|name| is_on(name).is_some()).or_else(|| {
        let jinja = is_said("template_backend", "jinja").then_some("template_backend");
        jinja.or_else(|| is_off.then_some("use_chat_template"))
    })
}

fn question(spec: &JobSpec, dialect: &Dialect, origin: &Origin, config: &Config) -> Result<Question, String> {
    let variable =
        |name: &str| spec.env.get(name).map(std::ffi::OsString::from).or_else(|| origin.variable(name));
    let places = Places::from_variables(&origin.cwd, variable);
    let model_directory = match find_model(&spec.model, &places).map_err(|e| chain(&e))? {
        FoundModel::Here(ModelFiles { directory, .. }) => directory,
        FoundModel::NotLocal { id } => return Err(format!("the model {id} is not on this machine")),
    };
    let mut entries = Vec::new();
    for text in &spec.dataset {
        entries.push(match find_dataset(text, &places).map_err(|e| e.to_string())? {
            FoundDataset::Here { path, rows } => Entry { path, rows },
            FoundDataset::Hub { id, rows } => {
                let path = dataset_in_caches(&id, &places);
                let path = path.ok_or_else(|| format!("the data set {id} is not on this machine"))?;
                Entry { path, rows }
            }
        });
    }
    let text = |name: &str| spec.args.get(name).and_then(Value::as_str).map(str::to_owned);
    Ok(Question {
        model_directory,
        wish: TemplateWish {
            model: spec.model.clone(),
            template: text("template"),
            model_type: text("model_type"),
            is_line_3: dialect.line() == Line::V3,
            system: text("system"),
        },
        entries,
        validation: match spec.validation {
            Some(Validation::Share(share)) => Some(share),
            Some(Validation::Datasets(_)) | None => None,
        },
        within_s: config.data.look_s,
        cache: origin.cache.as_ref().map(|cache| cache.join("lengths")),
    })
}

/// Answers what was answered before, and lets a process of the job's user find out the rest.
fn ask(question: &Question, origin: &Origin) -> Looked {
    let tokenizer = question.model_directory.join("tokenizer.json");
    if let Err(error) = tokenizer.metadata() {
        return Err(format!("{}: {error}", tokenizer.display()));
    }
    let files = question.entries.iter().map(|entry| data_files(&entry.path).map_err(|e| e.to_string()));
    let (asked, is_settled) = asked(question, &files.collect::<Result<Vec<_>, _>>()?);
    let user = origin.identity.as_ref().map(|identity| identity.uid);
    let before = || BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    let is_asked = |(of, before, _): &&(Option<u32>, String, Look)| *of == user && *before == asked;
    if let Some((_, _, look)) = before().iter().find(is_asked) {
        return Ok(Look { cached: true, ..look.clone() });
    }
    let look = ask_process(question, origin)?;
    if is_settled {
        let mut before = before();
        before.truncate(REMEMBERED_MAX - 1);
        before.push_front((user, asked, look.clone()));
    }
    Ok(look)
}

/// Returns what this process knows an answer by, without opening a file: the question, and what the kernel says about each
/// file; and whether any change of a file would show in that.
fn asked(question: &Question, files: &[Vec<PathBuf>]) -> (String, bool) {
    let identities: Vec<_> =
        of_model(question).iter().chain(files.iter().flatten()).map(|path| FileIdentity::of(path)).collect();
    let now = SystemTime::now();
    let is_settled = identities.iter().flatten().all(|identity| identity.is_settled(now));
    (format!("{question:?} {files:?} {identities:?}"), is_settled)
}

/// Returns the files of the model that say how its rows are counted; some may not be there.
fn of_model(question: &Question) -> [PathBuf; 5] {
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "args.json"]
        .map(|name| question.model_directory.join(name))
}

/// Lets a process of the job's user answer.
fn ask_process(question: &Question, origin: &Origin) -> Looked {
    let failed = |e: std::io::Error| format!("the process that looks cannot be started: {e}");
    let program = std::env::current_exe().map_err(failed)?;
    let mut command: Command = origin.command(&program).map_err(failed)?;
    command.arg(LOOK_VERB).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.current_dir("/").env("RAYON_NUM_THREADS", "1");
    let mut child = command.spawn().map_err(failed)?;
    let text = serde_json::to_vec(question).map_err(|e| e.to_string())?;
    let stdin = child.stdin.take();
    let deadline = Instant::now() + Duration::from_secs(u64::from(question.within_s)) + PATIENCE;
    let answer = read_in_a_thread(&mut child);
    // A process that is gone already says so with its answer.
    let _gone = stdin.map(|mut stdin| stdin.write_all(&text));
    let answer = answer.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    let _ended = child.kill();
    let _reaped = child.wait();
    let answer = answer.map_err(|_| {
        format!("it took longer than {} s", u64::from(question.within_s) + PATIENCE.as_secs())
    })?;
    serde_json::from_slice::<Looked>(&answer)
        .unwrap_or_else(|_| Err("the process that looks ended without an answer".to_owned()))
}

fn read_in_a_thread(child: &mut Child) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut answer = Vec::new();
            // What is cut off, or was not read to its end, is no JSON and counts as no answer.
            let _read = stdout.take(ANSWER_BYTES_MAX).read_to_end(&mut answer);
            let _nobody_waits = sender.send(answer);
        });
    }
    receiver
}

/// The process that looks: reads a question from standard input, and writes the answer to standard output.
///
/// Returns its exit status.
pub fn look_main() -> i32 {
    let mut text = Vec::new();
    let question = std::io::stdin().read_to_end(&mut text).map_err(|e| e.to_string());
    let question = question.and_then(|_| serde_json::from_slice(&text).map_err(|e| e.to_string()));
    let answer: Looked = question.and_then(|question: Question| {
        end_after(Duration::from_secs(u64::from(question.within_s)) + PATIENCE);
        answer(&question)
    });
    let written = serde_json::to_writer(std::io::stdout(), &answer);
    i32::from(written.is_err())
}

/// Ends this process after a time, whoever asked may be gone, and one row can keep a regular expression busy for ever.
fn end_after(time: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(time);
        std::process::abort();
    });
}

fn answer(question: &Question) -> Looked {
    let started = Instant::now();
    let mut files = Vec::new();
    for entry in &question.entries {
        files.push(data_files(&entry.path).map_err(|e| e.to_string())?);
    }
    let as_they_are = || files.iter().flatten().map(|path| FileIdentity::of(path)).collect::<Vec<_>>();
    let before = as_they_are();
    let key = key(question, &files);
    let cached = question.cache.as_ref().and_then(|directory| read_cache(directory, &key, &files));
    if let Some(look) = cached {
        return Ok(Look { cached: true, ..look });
    }
    let counter = TokenCounter::open(&question.model_directory, &question.wish).map_err(|e| chain(&e))?;
    let within = Duration::from_secs(u64::from(question.within_s));
    // Each data set has its part of the time that is left.
    let deadline = Instant::now() + within;
    let (mut counted, mut left) = (Vec::new(), u32::try_from(files.len()).unwrap_or(u32::MAX));
    for paths in &files {
        let files = DataFiles::open(paths).map_err(|e| e.to_string())?;
        let part = deadline.saturating_duration_since(Instant::now()) / left.max(1);
        counted.push(count_rows(&files, &counter, part).map_err(|e| e.to_string())?);
        left -= 1;
    }
    let look = together(question, &counter, counted, started.elapsed());
    // A file that was changed meanwhile was counted as another content than its key says.
    if let Some(directory) = question.cache.as_ref().filter(|_| as_they_are() == before) {
        write_cache(directory, &Cached { key, files, look: look.clone() });
    }
    Ok(look)
}

/// Returns what the data sets are together, as ms-swift puts them together: of each the rows that are asked for, less
/// those that are split off to evaluate on.
fn together(question: &Question, counter: &TokenCounter, counted: Vec<Counted>, took: Duration) -> Look {
    let sum = |of: fn(&Counted) -> u64| counted.iter().map(of).sum();
    let (approximate, bytes, bytes_read) = (sum(|c| c.approximate), sum(|c| c.bytes), sum(|c| c.bytes_read));
    let problem = counted.iter().find_map(|counted| counted.problem.clone());
    let parts = question.entries.iter().zip(counted).map(|(entry, counted)| {
        let rows = entry.rows.unwrap_or_else(|| counted.profile.rows());
        let split_off =
            question.validation.map_or(0, |share| split_off(counted.profile.rows().min(rows), share));
        counted.profile.draw(rows.saturating_sub(split_off))
    });
    // The tokenizer's own template differs from ms-swift's by some tokens a round.
    let about = approximate > 0 || counter.template().is_none();
    Look {
        profile: LengthProfile::together(parts).with_approximate(about),
        template: counter.template().map(str::to_owned),
        approximate,
        bytes,
        bytes_read,
        seconds: took.as_secs_f64(),
        cached: false,
        problem,
    }
}

/// Returns how many of `rows` are split off. Source: `DatasetLoader.post_process`: max(int(rows x share), 1), of each
/// data set.
fn split_off(rows: u64, share: f64) -> u64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rows are far below 2^53, and a share is between 0 and 1"
    )]
    let split_off = (rows as f64 * share) as u64;
    split_off.max(1)
}

/// Returns what an answer depends on, as text: how many rows of which files are counted for how long and with what template,
/// and the content of each file. Where the files lie is none of it.
fn key(question: &Question, files: &[Vec<PathBuf>]) -> String {
    // Beside the answers, and not among those that are forgotten for newer ones.
    let memory = question.cache.as_ref().map(|directory| directory.with_file_name("hashes.json"));
    let mut hashes = memory.as_deref().map_or_else(ContentHashes::default, ContentHashes::open);
    let within = Duration::from_secs(u64::from(question.within_s)).min(HASH_TIME_MAX);
    let deadline = Instant::now() + within;
    let mut contents = |paths: &[PathBuf]| -> Vec<(String, Content)> {
        // A file is read as what its name says that it is.
        let format = |path: &PathBuf| path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        paths.iter().map(|path| (format(path), hashes.content(path, deadline))).collect()
    };
    let model = contents(&of_model(question));
    let sets: Vec<_> =
        question.entries.iter().zip(files).map(|(entry, files)| (entry.rows, contents(files))).collect();
    let saved = memory.map_or(Ok(()), |memory| hashes.save(&memory));
    if let Err(error) = saved {
        tracing::debug!(%error, "the hashes of the files were not kept");
    }
    // With its text: another build may know the template of that name as another one.
    let template = book_template(&question.model_directory, &question.wish);
    let (validation, within) = (question.validation, question.within_s);
    let program = env!("CARGO_PKG_VERSION");
    format!("{CACHE_VERSION} {program} {within} {validation:?} {template:?} {model:?} {sets:?}")
}

/// An answer with what it depends on.
#[derive(Debug, Serialize, Deserialize)]
struct Cached {
    key: String,
    /// Files of each data set as they were called.
    files: Vec<Vec<PathBuf>>,
    look: Look,
}

fn cache_file(directory: &Path, key: &str) -> PathBuf {
    directory.join(format!("{}.json", &blake3::hash(key.as_bytes()).to_hex()[..32]))
}

/// Returns the answer that is kept under a key, for files of these names: a sentence about damaged rows names their file.
fn read_cache(directory: &Path, key: &str, files: &[Vec<PathBuf>]) -> Option<Look> {
    let text = std::fs::read(cache_file(directory, key)).ok()?;
    let cached: Cached = serde_json::from_slice(&text).ok()?;
    let says_names = cached.look.problem.is_some();
    (cached.key == key && (!says_names || cached.files == files)).then_some(cached.look)
}

/// Keeps an answer. A cache that cannot be written costs some seconds the next time, and nothing else.
fn write_cache(directory: &Path, answer: &Cached) {
    let write = || -> std::io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        forget_oldest(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(&serde_json::to_vec(answer)?)?;
        file.persist(cache_file(directory, &answer.key))?;
        Ok(())
    };
    if let Err(error) = write() {
        tracing::debug!(directory = %directory.display(), %error, "the lengths were not cached");
    }
}

/// Removes the oldest answers, so that one more may be kept.
fn forget_oldest(directory: &Path) -> std::io::Result<()> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    let surplus = (files.len() + 1).saturating_sub(CACHED_MAX);
    files.iter().take(surplus).try_for_each(|(_, path)| std::fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use serde_json::json;

    use super::*;

    fn job(args: Value) -> JobSpec {
        JobSpec::from_value(&json!({"model": "org/m", "dataset": "d.jsonl", "args": args})).unwrap()
    }

    #[test]
    fn what_makes_other_rows_is_named() {
        assert_eq!(changed_by(&job(json!({"streaming": true}))), Some("streaming"));
        assert_eq!(changed_by(&job(json!({"streaming": "false", "columns": "{}"}))), None);
        assert_eq!(changed_by(&job(json!({"template_backend": "jinja"}))), Some("template_backend"));
        assert_eq!(changed_by(&job(json!({"use_chat_template": false}))), Some("use_chat_template"));
        assert_eq!(changed_by(&job(json!({"lora_rank": 8}))), None);
    }

    #[test]
    fn the_share_for_evaluation_is_one_row_at_least() {
        assert_eq!([split_off(320, 0.02), split_off(10, 0.02), split_off(1000, 0.5)], [6, 1, 500]);
    }

    /// An answer about one file.
    fn answer(key: &str, file: &str) -> Cached {
        let look = Look {
            profile: LengthProfile::from_measured(&[1, 2], 0, 2, true),
            template: None,
            approximate: 0,
            bytes: 0,
            bytes_read: 0,
            seconds: 0.0,
            cached: false,
            problem: None,
        };
        Cached { key: key.to_owned(), files: vec![vec![file.into()]], look }
    }

    #[test]
    fn no_more_than_so_many_answers_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..CACHED_MAX + 5 {
            write_cache(directory.path(), &answer(&format!("key {number}"), "a"));
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), CACHED_MAX);
        let newest = format!("key {}", CACHED_MAX + 4);
        let file = cache_file(directory.path(), &newest);
        assert_eq!(read_cache(directory.path(), &newest, &[]), Some(answer(&newest, "a").look));
        assert_eq!(read_cache(directory.path(), "another key", &[]), None);
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_said_about_a_damaged_file_names_the_file_of_this_job() {
        let directory = tempfile::tempdir().unwrap();
        let mut damaged = answer("key", "a.jsonl");
        damaged.look.problem = Some("a.jsonl: the line at byte 0 is no JSON".to_owned());
        write_cache(directory.path(), &damaged);
        let of = |name: &str| read_cache(directory.path(), "key", &[vec![PathBuf::from(name)]]);
        assert_eq!((of("a.jsonl"), of("copy.jsonl")), (Some(damaged.look), None));
    }

    #[test]
    fn an_answer_of_before_it_was_kept_whether_tokens_are_only_about_known_bounds_nothing() {
        let profile = LengthProfile::from_measured(&[100], 0, 1, true);
        let mut stored = serde_json::to_value(&profile).unwrap();
        let read = |stored: &Value| serde_json::from_value::<LengthProfile>(stored.clone()).unwrap().bound();
        assert_eq!(read(&stored), profile.bound());
        assert!(profile.bound().is_some());
        stored.as_object_mut().unwrap().remove("approximate");
        assert_eq!(read(&stored), None);
    }
}
