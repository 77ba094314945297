//! How many tokens has each row of the data?
//!
//! The rows are rendered with ms-swift's own template of the model, or with the chat template of the tokenizer where there is
//! none in the book, and counted with the model's own tokenizer.json, for as long as the time lasts.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mhtrain_sizing::data::LengthProfile;
use mhtrain_swift::conversation::{Conversation, Role, RowForm};
use mhtrain_swift::template::{SpecialTokens, Template, TemplateBook};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::data_files::{DataError, DataFiles, Progress};

/// Longest file of a tokenizer that is read; real ones are below 40 MiB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// Most threads that count.
const THREADS_MAX: usize = 8;

/// Why the rows cannot be counted.
#[derive(Debug, thiserror::Error)]
pub enum CountError {
    /// The model has no tokenizer.json, or one that cannot be used.
    #[error("{}: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Neither the book nor the tokenizer has a chat template for the model.
    #[error("no chat template is known for the model in {}", path.display())]
    NoTemplate {
        /// The model.
        path: PathBuf,
    },
    /// The data cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
}

/// Counts the tokens of conversations as ms-swift does for one model.
pub struct TokenCounter {
    tokenizer: Tokenizer,
    renderer: Renderer,
    tokens: SpecialTokens,
    /// Tokens that the tokenizer puts around a text by itself.
    added: usize,
}

enum Renderer {
    /// ms-swift's own template.
    Book(Box<Template>),
    /// The chat template of the tokenizer, compiled.
    Jinja(Box<Environment<'static>>),
}

impl fmt::Debug for TokenCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCounter").field("template", &self.template()).finish_non_exhaustive()
    }
}

/// What a job says about templates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TemplateWish {
    /// The model as the job names it.
    pub model: String,
    /// `--template`.
    pub template: Option<String>,
    /// `--model_type`.
    pub model_type: Option<String>,
    /// Whether the trainer is ms-swift 3.x, where the template follows from the model type alone.
    pub is_line_3: bool,
    /// `--system`.
    pub system: Option<String>,
}

impl TokenCounter {
    /// Opens the tokenizer of a model directory.
    ///
    /// # Errors
    /// There is no tokenizer.json, it is damaged, or no template is known.
    pub fn open(directory: &Path, wish: &TemplateWish) -> Result<TokenCounter, CountError> {
        let path = directory.join("tokenizer.json");
        let bad = |what: String| CountError::Tokenizer { path: path.clone(), what };
        let found = path.metadata().map_err(|e| bad(e.to_string()))?;
        if found.len() > TOKENIZER_BYTES_MAX {
            return Err(bad(format!("it is longer than {} MiB", TOKENIZER_BYTES_MAX >> 20)));
        }
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| bad(e.to_string()))?;
        // transformers ignores what tokenizer.json says about both.
        tokenizer.with_truncation(None).map_err(|e| bad(e.to_string()))?.with_padding(None);
        let settings = read_json(&directory.join("tokenizer_config.json"));
        let mut tokens = SpecialTokens {
            bos: token(&settings, "bos_token"),
            eos: token(&settings, "eos_token"),
            adds_end: false,
        };
        let length = |special| tokenizer.encode_fast("a", special).map(|encoding| encoding.len());
        let (with, without) = (length(true), length(false));
        let added = with.and_then(|with| Ok(with - without?.min(with))).map_err(|e| bad(e.to_string()))?;
        tokens.adds_end = ends_with_special(&tokenizer);
        let renderer = match book_template(directory, wish) {
            Some(template) => Renderer::Book(Box::new(template)),
            None => {
                let source = chat_template(directory, &settings)
                    .ok_or_else(|| CountError::NoTemplate { path: directory.to_owned() })?;
                Renderer::Jinja(Box::new(compile(source).map_err(|e| bad(e.to_string()))?))
            }
        };
        Ok(TokenCounter { tokenizer, renderer, tokens, added })
    }

    /// Returns the name of ms-swift's template; `None` where that of the tokenizer stands in.
    pub fn template(&self) -> Option<&str> {
        match &self.renderer {
            Renderer::Book(template) => Some(&template.name),
            Renderer::Jinja(_) => None,
        }
    }

    /// Returns the tokens of a row; `None` where ms-swift cannot encode it, and leaves it out.
    pub fn count(&self, conversation: &Conversation) -> Option<u32> {
        let tokens = match &self.renderer {
            Renderer::Book(template) => self.count_segments(template, conversation)?,
            Renderer::Jinja(environment) => {
                let text = self.chat_text(environment, conversation)?;
                self.tokenizer.encode_fast(text, false).ok()?.len()
            }
        };
        u32::try_from(tokens).ok()
    }

    fn count_segments(&self, template: &Template, conversation: &Conversation) -> Option<usize> {
        let segments = template.render(conversation, &self.tokens)?;
        let mut tokens = if template.bos { self.added } else { 0 };
        for segment in segments {
            tokens += self.tokenizer.encode_fast(segment.text, false).ok()?.len();
        }
        let marks = usize::try_from(template.mark_tokens).ok()?;
        Some(tokens + marks * conversation.rounds()?.len())
    }

    fn chat_text(&self, environment: &Environment<'_>, conversation: &Conversation) -> Option<String> {
        conversation.rounds()?;
        let mut messages: Vec<minijinja::Value> = Vec::new();
        if let Some(system) = &conversation.system {
            messages.push(context! { role => "system", content => system.as_str() });
        }
        for message in &conversation.messages {
            let role = match message.role {
                Role::User => "user",
                Role::Assistant => "assistant",
                Role::Tool => "tool",
            };
            messages.push(context! { role => role, content => message.content.as_str() });
        }
        let values = context! {
            messages => messages, add_generation_prompt => false, bos_token => self.tokens.bos.as_str(),
            eos_token => self.tokens.eos.as_str(), tools => (), documents => (),
        };
        environment.get_template(CHAT).ok()?.render(values).ok()
    }
}

/// Returns ms-swift's template with the system text of the job: the one that the job names, that an `args.json` beside the
/// model leads to (ms-swift writes one into what it exports), or that architecture and name lead to; `None` where that of
/// the tokenizer stands in.
///
/// Source: 4.x takes `template` of that file (`_read_args_json_template_type` in `swift/template/register.py`), 3.x only
/// `model_type` (`_read_args_json_model_type` in `swift/llm/model/register.py`).
pub fn book_template(directory: &Path, wish: &TemplateWish) -> Option<Template> {
    found_template(directory, wish).map(|template| template.with_system(wish.system.clone()))
}

fn found_template(directory: &Path, wish: &TemplateWish) -> Option<Template> {
    let book = TemplateBook::builtin();
    if let Some(name) = &wish.template {
        return book.named(name).cloned();
    }
    let exported = read_json(&directory.join("args.json"));
    let found = if wish.is_line_3 {
        let model_type = wish.model_type.as_deref().or_else(|| exported["model_type"].as_str());
        model_type.and_then(|name| book.of_model_type(name))
    } else {
        exported["template"].as_str().and_then(|name| book.named(name))
    };
    if let Some(template) = found {
        return Some(template.clone());
    }
    let config = read_json(&directory.join("config.json"));
    let architectures: Vec<&str> =
        config["architectures"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    book.of_model(&architectures, &wish.model).cloned()
}

/// Returns a file as JSON, `Null` where it is not there or none: what is read so can do without.
fn read_json(path: &Path) -> Value {
    std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or(Value::Null)
}

/// Returns a special token of tokenizer_config.json: a text, or an object with it.
fn token(settings: &Value, name: &str) -> String {
    let value = &settings[name];
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

fn ends_with_special(tokenizer: &Tokenizer) -> bool {
    let ids = |special| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    matches!((ids(true), ids(false)), (Ok(with), Ok(without)) if with.last() != without.last())
}

/// Name of the chat template inside its environment.
const CHAT: &str = "chat";

/// Returns the chat template of a tokenizer: a file of its own, or in its settings, alone or the one named `default`.
fn chat_template(directory: &Path, settings: &Value) -> Option<String> {
    if let Ok(text) = std::fs::read_to_string(directory.join("chat_template.jinja")) {
        return Some(text);
    }
    match &settings["chat_template"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or_else(|| named.first())?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Compiles a chat template with what transformers offers to it.
///
/// Source: `transformers/utils/chat_template_utils.py`, `_compile_jinja_template`.
fn compile(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |what: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, what))
    });
    // Any day has about as many tokens.
    environment.add_function("strftime_now", |_format: String| "26 Jul 2024".to_owned());
    environment.add_template_owned(CHAT, source)?;
    Ok(environment)
}

/// What was found out about the rows of one data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// Their lengths.
    pub profile: LengthProfile,
    /// Rows with tools or pictures, whose tokens are only about known, among those that were measured.
    pub approximate: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// Bytes that the measured rows came from.
    pub bytes_read: u64,
    /// How long that took, in seconds.
    pub seconds: f64,
    /// What is wrong with the first row that the trainer would stop at.
    pub problem: Option<String>,
}

/// What a thread has found out so far.
#[derive(Debug, Default)]
struct Tally {
    lengths: Vec<u32>,
    /// Rows that the template refuses: they are left out.
    faulty: u64,
    /// Rows that are none: the trainer stops at the first.
    unreadable: u64,
    approximate: u64,
    problem: Option<String>,
}

/// Counts the rows of `files` until all are counted or `within` is over.
///
/// A row that is none (no JSON, no UTF-8) is told from one that the template refuses: measured on ms-swift 4.6.0, the
/// library that it reads files with raises at the first, and only the second is left out.
///
/// # Errors
/// A file is damaged, as [`DataFiles::read`] says.
pub fn count_rows(files: &DataFiles, counter: &TokenCounter, within: Duration) -> Result<Counted, DataError> {
    let started = Instant::now();
    let deadline = started + within;
    let form = RowForm::of_columns(files.columns());
    let tally: Mutex<Tally> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(THREADS_MAX);
    let progress = files.read(threads, &|row| {
        let counted = row.map(|row| {
            let conversation = form.conversation(&row).ok()?;
            Some((counter.count(&conversation)?, conversation.is_approximate))
        });
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        match counted {
            Ok(Some((length, is_approximate))) => {
                tally.lengths.push(length);
                tally.approximate += u64::from(is_approximate);
            }
            Ok(None) => tally.faulty += 1,
            Err(problem) => {
                tally.unreadable += 1;
                tally.problem.get_or_insert(problem);
            }
        }
        if Instant::now() < deadline { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    let Progress { bytes_read, bytes, rows, rows_known, .. } = progress;
    let not_counted = tally.faulty + tally.unreadable;
    Ok(Counted {
        profile: LengthProfile::from_measured(&tally.lengths, not_counted, rows, rows_known)
            .with_unreadable(tally.unreadable, not_counted),
        approximate: tally.approximate,
        bytes,
        bytes_read,
        seconds: started.elapsed().as_secs_f64(),
        problem: tally.problem,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A tokenizer with a token for each word and each mark.
    const WORDS: &str = r#"{"version": "1.0", "truncation": {"max_length": 2, "stride": 0, "strategy": "LongestFirst",
        "direction": "Right"}, "padding": null, "added_tokens": [
        {"id": 5, "content": "<|im_start|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
         "special": true},
        {"id": 6, "content": "<|im_end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
         "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "user": 2, "assistant": 3, "?": 4}, "unk_token": "?"}}"#;

    fn model(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        directory
    }

    fn talk(query: &str, response: &str) -> Conversation {
        let row = json!({"query": query, "response": response});
        RowForm::of_columns(["query", "response"]).conversation(&row).unwrap()
    }

    #[test]
    fn the_template_of_the_book_comes_before_that_of_the_tokenizer() {
        let config = r#"{"architectures": ["Qwen3ForCausalLM"]}"#;
        let directory = model(&[("tokenizer.json", WORDS), ("config.json", config)]);
        let wish = TemplateWish { model: "Qwen/Qwen3-8B".to_owned(), ..TemplateWish::default() };
        let counter = TokenCounter::open(directory.path(), &wish).unwrap();
        assert_eq!(counter.template(), Some("qwen3"));
        // <im_start> user a b <im_end> <im_start> assistant | < think > </ think > a <im_end>: no truncation to 2.
        assert_eq!(counter.count(&talk("a b", "a")), Some(7 + 3 + 3 + 2));
    }

    #[test]
    fn what_an_export_says_about_its_template_is_read_as_each_line_reads_it() {
        let exported = r#"{"model_type": "qwen2", "template": "qwen2_5"}"#;
        let directory = model(&[("tokenizer.json", WORDS), ("args.json", exported)]);
        for (is_line_3, template) in [(false, "qwen2_5"), (true, "qwen")] {
            let wish = TemplateWish { is_line_3, ..TemplateWish::default() };
            assert_eq!(TokenCounter::open(directory.path(), &wish).unwrap().template(), Some(template));
        }
    }

    #[test]
    fn an_unknown_model_is_counted_with_the_chat_template_of_its_tokenizer() {
        let settings = r#"{"eos_token": {"content": "<|im_end|>"}, "chat_template":
            "{%- for m in messages %}{{ '<|im_start|>' + m.role.strip() + ' ' + m['content'] + eos_token }}{% endfor %}"}"#;
        let directory = model(&[("tokenizer.json", WORDS), ("tokenizer_config.json", settings)]);
        let counter = TokenCounter::open(directory.path(), &TemplateWish::default()).unwrap();
        assert_eq!(counter.template(), None);
        assert_eq!(counter.count(&talk("a b", "a")), Some(5 + 4));
    }

    #[test]
    fn without_tokenizer_or_template_the_error_says_which() {
        let nothing = model(&[]);
        let error = TokenCounter::open(nothing.path(), &TemplateWish::default()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
        let no_template = model(&[("tokenizer.json", WORDS)]);
        let error = TokenCounter::open(no_template.path(), &TemplateWish::default()).unwrap_err();
        assert!(matches!(error, CountError::NoTemplate { .. }), "{error}");
    }

    #[test]
    fn rows_that_cannot_be_encoded_are_counted_apart() {
        let rows = "{\"query\": \"a\", \"response\": \"b\"}\n{\"query\": 3}\n";
        let directory = model(&[("tokenizer.json", WORDS), ("data.jsonl", rows)]);
        let wish = TemplateWish { template: Some("qwen3_nothinking".to_owned()), ..TemplateWish::default() };
        let counter = TokenCounter::open(directory.path(), &wish).unwrap();
        let files = DataFiles::open(&[directory.path().join("data.jsonl")]).unwrap();
        let counted = count_rows(&files, &counter, Duration::from_secs(5)).unwrap();
        assert_eq!((counted.profile.rows(), counted.profile.faulty()), (1, 1));
        assert!(counted.profile.is_complete());
        let none = count_rows(&files, &counter, Duration::ZERO).unwrap();
        assert!(!none.profile.is_complete() && none.profile.measured() == 1, "one row at least: {none:?}");
    }

    #[test]
    fn rows_at_which_the_trainer_stops_are_not_said_to_be_left_out() {
        let rows = "{\"query\": \"a\", \"response\": \"b\"}\n{\"query\": 3}\n{oops\n{oops\n";
        let directory = model(&[("tokenizer.json", WORDS), ("data.jsonl", rows)]);
        let wish = TemplateWish { template: Some("qwen3_nothinking".to_owned()), ..TemplateWish::default() };
        let counter = TokenCounter::open(directory.path(), &wish).unwrap();
        let files = DataFiles::open(&[directory.path().join("data.jsonl")]).unwrap();
        let Counted { profile, problem, .. } = count_rows(&files, &counter, Duration::from_secs(5)).unwrap();
        assert_eq!((profile.rows(), profile.faulty(), profile.unreadable()), (1, 1, 2));
        assert!(profile.is_complete());
        assert!(problem.is_some_and(|problem| problem.contains("is no JSON")));
    }
}
