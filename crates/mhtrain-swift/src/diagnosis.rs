//! Why did the trainer die?
//!
//! The text is read once, in whatever pieces it arrives, in bounded memory. Each line that names a cause becomes a
//! candidate with a weight: a raised exception weighs more than a printed line, a cause more than its consequences,
//! and of equals the first one over all ranks holds. Lines that a healthy trainer prints afterwards prove that a
//! candidate was survived. Text of the data, which may say anything, is no evidence.
//!
//! - `diagnosis/lines.rs`: a line without what launchers and loggers put around it
//! - `diagnosis/signatures.rs`: which words mean which cause
//! - `diagnosis/filter.rs`: how so many wordings are looked for in so many lines
//! - `diagnosis/metrics.rs`: progress, divergence and the end of training
//! - `diagnosis/pattern.rs`: how all these patterns are compiled

mod filter;
mod lines;
mod metrics;
mod pattern;
mod signatures;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mhtrain_job::diagnosis::{Answer, Diagnosis, Evidence, Kind, Phase};
use mhtrain_sizing::units::Bytes;

use self::lines::{Level, Line};
use self::metrics::{Meaning, Metrics};
use self::pattern::pattern;
use self::signatures::Form;
use crate::oom_message::{self, OomMessage};

/// What is known about the end beside the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExitFacts {
    /// Exit code, where it is known. The codes of the `swift` wrapper (256 less the signal) and of a shell (128 and
    /// the signal) are understood.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether the kernel counted an out-of-memory kill in the attempt's cgroup; `None` where nobody counts.
    pub oom_kill: Option<bool>,
    /// Whether the supervisor asked it to stop.
    pub we_stopped_it: bool,
    /// Whether expandable segments were on; `None` where that is unknown.
    pub expandable_segments: Option<bool>,
    /// The file that the trainer printed into, when there was no room for it to grow at the end.
    pub full_log: Option<PathBuf>,
    /// What others held on the card when the trainer was started; `None` where nobody looked.
    pub others_before: Option<Bytes>,
}

/// Longest line that is looked at as a whole; of a longer one the beginning and the end are.
const LONGEST_LINE: usize = 32 << 10;

/// Longest evidence.
const LONGEST_EVIDENCE: usize = 2000;

/// Ranks whose tracebacks are kept apart.
const RANKS: usize = 256;

/// Frames and code lines of one traceback that are kept, the last ones.
const FRAMES: usize = 96;

/// Lines after an exception that may belong to its message.
const MESSAGE_LINES: u8 = 16;

/// Lines over which an out-of-memory message may be wrapped.
const OOM_LINES: u8 = 16;

/// Lines of data that may follow the head of a sample.
const DATA_LINES: u32 = 20_000;

/// Reads what a trainer printed and says why it ended.
#[derive(Clone, Debug, Default)]
pub struct Diagnoser {
    head: Vec<u8>,
    /// The last bytes of a line that is longer than [`LONGEST_LINE`].
    tail: std::collections::VecDeque<u8>,
    overflowed: bool,
    metrics: Metrics,
    traces: BTreeMap<Option<u32>, Trace>,
    tracebacks: u64,
    data_lines_left: u32,
    assembly: Option<Assembly>,
    oom_messages: u64,
    /// The first message that names amounts, for a cause whose own line names none.
    first_amounts: Option<OomMessage>,
    pending: Option<Cause>,
    survived: Option<Cause>,
    last_line: String,
}

/// One traceback, or the message that ended it.
#[derive(Clone, Debug, Default)]
struct Trace {
    open: bool,
    frames: Vec<String>,
    message_lines: u8,
    /// Python or a logger reports an exception that did not end anything.
    reported_only: bool,
    number: u64,
}

/// An out-of-memory message that may go on over the next lines.
#[derive(Clone, Debug)]
struct Assembly {
    number: u64,
    rank: Option<u32>,
    text: String,
    lines_left: u8,
}

/// A line that may be why the trainer ended.
#[derive(Clone, Debug)]
struct Cause {
    kind: Kind,
    weight: f64,
    certain: bool,
    form: Option<Form>,
    line: String,
    rank: Option<u32>,
    phase: Option<Phase>,
    amounts: Option<OomMessage>,
    /// Which of the out-of-memory messages it is, so that the rest of a wrapped one finds it.
    oom_number: Option<u64>,
    traceback: u64,
}

/// Weights of a cause; see the module's own words.
mod weight {
    /// An exception that is known.
    pub(super) const RAISED: f64 = 3.0;
    /// A line of the message of an exception.
    pub(super) const MESSAGE: f64 = 2.9;
    /// A known line outside any exception.
    pub(super) const PRINTED: f64 = 2.5;
    /// A consequence, a kill, something caught.
    pub(super) const SYMPTOM: f64 = 2.0;
    /// An exception that nothing is known about.
    pub(super) const UNKNOWN_EXCEPTION: f64 = 0.5;
    /// A known text in a warning or in passing.
    pub(super) const MENTIONED: f64 = 0.45;
    /// What survivors of another death raise.
    pub(super) const ECHO_RAISED: f64 = 0.48;
    /// What survivors of another death print.
    pub(super) const ECHO: f64 = 0.3;
}

/// Where a line stands.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Place {
    Exception,
    Message,
    Reported,
    Plain,
    Error,
    Warning,
    Info,
}

pattern!(TRACEBACK, r"Traceback \(most recent call last\)");
pattern!(
    FRAME,
    r#"^\s*(?:File "([^"]+)", line \d+(?:, in (\S+))?|File (\S+?):\d+,? in (\S+)|(\S+\.py):\d+ in (\S+)|<ipython-input-\S+> in (\S+)|(/\S+\.py) in (\S+))"#
);
pattern!(
    EXCEPTION,
    concat!(
        r"^(?:(?:[A-Za-z_]\w*\.)*_?[A-Z]\w*",
        r"(?:Error|Exception|Interrupt|Exit|OutOfResources|Timeout|NotFound|Died|Failure)(?::|\s*$)",
        r"|(?:[a-z_]\w*\.)+(?:[A-Z]\w*|\w*error): )"
    )
);
pattern!(ANY_EXCEPTION, r"^(?:[A-Za-z_][\w<>]*\.)*(_?[A-Za-z]\w*)(?:: |:$|$)");
pattern!(
    DATA_HEAD,
    r"^\[?(?:INPUT|INPUT_IDS|LABELS|LABELS_IDS|PROMPT|QUERY|RESPONSE|OUTPUT|HISTORY|CHOSEN|REJECTED|CHOSEN_INPUT|REJECTED_INPUT|SYSTEM)(?:_IDS)?\]|^(?:training|eval|unsupervised|inference) example:|^(?:input_ids|inputs|label_ids|labels|chosen_inputs|rejected_inputs):\s*$|^args: |^Sample \d+ of the training set|^run sh: "
);
pattern!(BAR_OR_RECORD, r"\d+%\|[^|]*\|\s*\d+/\d+|^\{.?(?:loss|eval_loss|train_runtime)");
pattern!(
    DATA_WORDS,
    r#"<\|im_(?:start|end)\|>|<\|(?:user|assistant|system|eot_id|start_header_id)\|>|['"](?:role|content|messages|conversations|instruction|query|response)['"]\s*:|^run sh: |\[/?INST\]"#
);
pattern!(OOM_AMOUNT, r"(?i)tri(?:ed|es) to allocate|trying to allocate|killed process|allocat\w+ of \d");
pattern!(
    ADVICE_BEFORE,
    concat!(
        r"(?i)\b(?:avoid\w*|prevent\w*|if|when(?:ever)?|in case|may|might|could|can|leads?|leading|causes?|causing|",
        r"results? in|resulting|risk|risks|reduces?|reducing|fix|fixes|fixing|solve|solves|solution|solutions|handles?|",
        r"handling|against|how|instead|likely|possible|tips?|hint|faq|i (?:got|get|had|have|see|saw))\b.{0,60}",
        r"(?:\b(?:out|short|shortage) of \w*\s?memory|outofmemory|\boom\b)"
    )
);
pattern!(
    ADVICE_AFTER,
    concat!(
        r"(?i)(?:\b(?:out|short|shortage) of \w*\s?memory|outofmemoryerror|\boom\b)['\x22`]?,? ",
        r"(?:reduce|lower|decrease|errors? (?:is|are|can|may|might|will)|handl\w+|guard|hooks?|callback|watch\w*|protection|",
        r"is (?:possible|likely)|may|might|can|could|will|would|happens?|issues?|faq|when|if)\b"
    )
);
pattern!(
    ERROR_WORDS,
    r"(?i)^\s*(?:fatal|error|failed|failure|exception|abort(?:ed)?|terminate called|what\(\):|last error)\b|: (?:fatal )?error: "
);
pattern!(
    ENCODE_RETRIED,
    r"errors? in the (?:template\.encode|dataset, the data will be deleted)|another piece of data will be randomly selected|will retry|retrying"
);
pattern!(
    LAUNCHER_ERROR,
    r"^(?:\w+\.)*(?:ChildFailedError|CalledProcessError|SystemExit|ProcessRaisedException|ProcessExitedException)\b"
);
pattern!(
    AFTERMATH,
    r"^(?:\w+\.)*(?:BrokenPipeError|EOFError|ConnectionResetError|ConnectionRefusedError|ConnectionAbortedError|CancelledError)\b"
);
pattern!(
    PINNED,
    r"pin_memory=True|\.pin_memory\(|pin_memory\.py|cudaHostAlloc|cudaHostRegister|HostAllocator|pinned_memory|pin_tensor"
);

impl Diagnoser {
    /// Returns a diagnoser that has read nothing.
    pub fn new() -> Diagnoser {
        Diagnoser::default()
    }

    /// Reads the next bytes, however they are cut. They need not be valid UTF-8.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                self.end_line();
            } else if self.head.len() < LONGEST_LINE / 2 {
                self.head.push(byte);
            } else {
                if self.tail.len() == LONGEST_LINE / 2 {
                    self.tail.pop_front();
                    self.overflowed = true;
                }
                self.tail.push_back(byte);
            }
        }
    }

    /// Returns the diagnosis of a training that ended with a loss that was no number.
    pub fn ended_diverged(&self) -> Option<Diagnosis> {
        self.metrics.divergence().map(|line| diverged(line, false))
    }

    /// Returns the diagnosis of a training that diverged and cannot come back, while it still runs.
    pub fn diverged_for_good(&self) -> Option<Diagnosis> {
        self.metrics.lost().map(|line| diverged(line, true))
    }

    /// Returns why the trainer ended, judged by the text and by what is known about its end.
    pub fn finish(mut self, exit: ExitFacts) -> Diagnosis {
        self.end_line();
        self.close_assembly();
        verdict(self, &exit)
    }

    fn end_line(&mut self) {
        if self.head.is_empty() {
            return;
        }
        let mut bytes = std::mem::take(&mut self.head);
        if self.overflowed {
            bytes.extend_from_slice(" … ".as_bytes());
        }
        bytes.extend(std::mem::take(&mut self.tail));
        self.overflowed = false;
        if !lines::is_binary(&bytes) {
            let text = lines::without_colours(&String::from_utf8_lossy(&bytes));
            for part in lines::unglued(&text) {
                if !part.trim().is_empty() {
                    self.read(Line::of(part));
                }
            }
        }
        self.head = bytes;
        self.head.clear();
    }

    fn read(&mut self, mut line: Line) {
        if self.is_data(&mut line) {
            return;
        }
        let line = &line;
        match self.metrics.read(&line.text, &line.shown) {
            Meaning::WentOn | Meaning::Ended => return self.went_on(),
            Meaning::Metrics => return,
            // Records are data, whatever they say.
            Meaning::Other
                if line.text.trim_start().starts_with(['{', '[']) && line.level != Level::Error =>
            {
                return;
            }
            Meaning::Other => {}
        }
        self.remember(line);
        if self.continues_oom(line) || self.is_part_of_traceback(line) {
            return;
        }
        if ENCODE_RETRIED.is_match(&line.text) && line.level != Level::Plain {
            // The traceback before it was only shown; other data is taken instead.
            let shown = self.pending.as_ref().is_some_and(|cause| cause.traceback == self.tracebacks);
            if shown {
                self.pending = None;
            }
            return;
        }
        let place = self.place_of(line);
        self.weigh(line, place);
    }

    /// Returns whether a line belongs to a sample of the data, an arguments dump or a command line.
    fn is_data(&mut self, line: &mut Line) -> bool {
        let from_trainer = line.logged || (line.rank.is_some() && TRACEBACK.is_match(&line.text));
        if self.data_lines_left > 0 && !from_trainer && !is_bar_or_record(&line.text) {
            self.data_lines_left -= 1;
            return true;
        }
        self.data_lines_left = 0;
        if DATA_HEAD.is_match(&line.text) {
            // A command line ends with its line.
            self.data_lines_left = if line.text.starts_with("run sh: ") { 0 } else { DATA_LINES };
            return true;
        }
        let Some(row) = DATA_WORDS.find(&line.text) else { return false };
        if self.traces.get(&line.rank).is_some_and(|trace| trace.open) && EXCEPTION.is_match(&line.text) {
            // An exception about a row: its own words are evidence, the row is not.
            line.text.truncate(row.start());
            return false;
        }
        true
    }

    /// Notes that the trainer went on: what was printed so far did not stop it.
    fn went_on(&mut self) {
        self.close_assembly();
        let Some(cause) = self.pending.take() else { return };
        if self.survived.as_ref().is_none_or(|before| before.weight < cause.weight) {
            self.survived = Some(cause);
        }
    }

    /// Keeps the last line that says something, for a death that nothing explains.
    fn remember(&mut self, line: &Line) {
        if line.text.chars().any(char::is_alphanumeric)
            && !line.text.trim_start().starts_with("For debugging")
        {
            self.last_line.clear();
            self.last_line.push_str(&shortened(&line.shown));
        }
    }

    /// Adds a line to an out-of-memory message that was wrapped.
    fn continues_oom(&mut self, line: &Line) -> bool {
        let Some(assembly) = &mut self.assembly else { return false };
        let other = assembly.rank != line.rank
            || assembly.lines_left == 0
            || TRACEBACK.is_match(&line.text)
            || FRAME.is_match(&line.text)
            || EXCEPTION.is_match(&line.text)
            || line.level == Level::Error
            || line.text.starts_with("CUDA kernel errors");
        if other {
            self.close_assembly();
            return false;
        }
        assembly.lines_left -= 1;
        assembly.text.push('\n');
        assembly.text.push_str(&line.text);
        // A line with a logger's prefix may be part of the message, or something else: it is both.
        !line.logged && line.level == Level::Plain && oom_message_goes_on(&line.text)
    }

    fn close_assembly(&mut self) {
        let Some(assembly) = self.assembly.take() else { return };
        let Some(amounts) = oom_message::parse(&assembly.text) else { return };
        if let Some(cause) = self.pending.as_mut().filter(|cause| cause.oom_number == Some(assembly.number)) {
            cause.amounts = Some(amounts.clone());
        }
        self.first_amounts.get_or_insert(amounts);
    }

    /// Follows a traceback; returns whether the line is nothing but a part of it.
    fn is_part_of_traceback(&mut self, line: &Line) -> bool {
        let begins = TRACEBACK.is_match(&line.text);
        let ignored = line.text.starts_with("Exception ignored in");
        let frame = FRAME.captures(&line.text);
        let key = self.trace_key(line.rank);
        if begins || ignored {
            self.tracebacks += 1;
            self.metrics.something_happened();
        }
        let number = self.tracebacks;
        let trace = self.traces.entry(key).or_default();
        if ignored {
            *trace = Trace { reported_only: true, number, ..Trace::default() };
            return true;
        }
        if begins {
            let reported_only =
                trace.reported_only && trace.frames.is_empty() && !trace.open && trace.message_lines == 0
                    || matches!(line.level, Level::Info | Level::Warning);
            *trace = Trace { open: true, reported_only, number, ..Trace::default() };
            return true;
        }
        if let Some(found) = frame {
            if !trace.open && trace.message_lines == 0 && trace.frames.is_empty() {
                trace.reported_only = false;
            }
            trace.open = true;
            let words: Vec<&str> = found.iter().skip(1).flatten().map(|word| word.as_str()).collect();
            trace.push(format!("@{}", words.join(" ")));
            return true;
        }
        if trace.open && (line.text.starts_with(' ') || line.text.starts_with('❱')) {
            trace.push(line.text.trim().to_owned());
            return true;
        }
        // A line of code at the very beginning of a tail.
        line.text.starts_with("    raise ")
    }

    /// Tracebacks of more ranks than are kept share one place.
    fn trace_key(&self, rank: Option<u32>) -> Option<u32> {
        if self.traces.len() < RANKS || self.traces.contains_key(&rank) { rank } else { None }
    }

    fn place_of(&mut self, line: &Line) -> Place {
        let key = self.trace_key(line.rank);
        let number = self.tracebacks;
        let trace = self.traces.entry(key).or_default();
        let text = line.text.as_str();
        let raised = EXCEPTION.is_match(text) || (trace.open && ANY_EXCEPTION.is_match(text));
        if raised && line.level != Level::Info {
            if !trace.open && trace.message_lines == 0 {
                // An exception without its traceback: the tail begins here, or somebody printed only the end.
                *trace = Trace { number, ..Trace::default() };
            }
            trace.open = false;
            trace.message_lines = MESSAGE_LINES;
            return match (trace.reported_only, line.level) {
                (true, _) | (false, Level::Warning) => Place::Reported,
                (false, _) => Place::Exception,
            };
        }
        if line.logged {
            trace.message_lines = 0;
        }
        let in_message = trace.message_lines > 0;
        trace.message_lines = trace.message_lines.saturating_sub(1);
        match line.level {
            Level::Info => Place::Info,
            Level::Warning => Place::Warning,
            Level::Plain if in_message && trace.reported_only => Place::Reported,
            Level::Plain if in_message => Place::Message,
            Level::Error => Place::Error,
            Level::Plain if ERROR_WORDS.is_match(text) => Place::Error,
            Level::Plain => Place::Plain,
        }
    }

    /// Makes a line a candidate when it names a cause.
    fn weigh(&mut self, line: &Line, place: Place) {
        let found = signatures::matches(&line.text)
            .filter(|signature| place == Place::Exception || !is_advice(signature.kind, &line.text))
            .filter_map(|signature| Some((signature, weight_of(signature.form, place)?)))
            // Of the signatures of one line the first holds, unless a later one weighs more here.
            .reduce(|best, next| if next.1 > best.1 { next } else { best });
        let key = self.trace_key(line.rank);
        let trace = self.traces.entry(key).or_default();
        let cause = match found {
            Some((signature, weight)) => {
                let mut kind = signature.kind;
                if kind == Kind::DeviceOom
                    && line.text.to_ascii_lowercase().contains("error: out of memory")
                    && trace.frames.iter().rev().take(4).any(|frame| PINNED.is_match(frame))
                {
                    // The driver's words for page-locked memory of the host are the same.
                    kind = Kind::HostOom;
                }
                Cause {
                    kind,
                    weight,
                    certain: matches!(
                        signature.form,
                        Form::Raised | Form::Printed | Form::Always | Form::Caught
                    ) && weight > weight::MENTIONED
                        && !is_librarys_allocation(&line.text),
                    form: Some(signature.form),
                    ..Cause::of(line, trace)
                }
            }
            None if place == Place::Exception && !LAUNCHER_ERROR.is_match(&line.text) => {
                let weight =
                    if AFTERMATH.is_match(&line.text) { weight::ECHO } else { weight::UNKNOWN_EXCEPTION };
                Cause { kind: kind_by_frames(&line.text, &trace.frames), weight, ..Cause::of(line, trace) }
            }
            None => return,
        };
        self.propose(cause, line);
    }

    fn propose(&mut self, mut cause: Cause, line: &Line) {
        if cause.kind == Kind::DeviceOom && cause.weight > weight::MENTIONED {
            self.close_assembly();
            self.oom_messages += 1;
            cause.oom_number = Some(self.oom_messages);
            self.assembly = Some(Assembly {
                number: self.oom_messages,
                rank: line.rank,
                text: line.text.clone(),
                lines_left: OOM_LINES,
            });
            cause.phase = cause.phase.or_else(|| self.metrics.training_began().then_some(Phase::Train));
        }
        if self.pending.as_ref().is_none_or(|before| before.weight < cause.weight) {
            self.metrics.something_happened();
            self.pending = Some(cause);
        }
    }
}

impl Trace {
    fn push(&mut self, frame: String) {
        if self.frames.len() == FRAMES {
            self.frames.remove(0);
        }
        self.frames.push(frame.chars().take(300).collect());
    }
}

impl Cause {
    fn of(line: &Line, trace: &Trace) -> Cause {
        Cause {
            kind: Kind::Unknown,
            weight: 0.0,
            certain: false,
            form: None,
            line: shortened(&line.shown),
            rank: line.rank,
            phase: phase_of(&trace.frames),
            amounts: None,
            oom_number: None,
            traceback: trace.number,
        }
    }

    /// Whether the trainer itself said that it caught this.
    fn is_caught(&self) -> bool {
        self.form == Some(Form::Caught)
    }
}

/// Returns what a wording is worth where it stands; `None`: nothing.
fn weight_of(form: Form, place: Place) -> Option<f64> {
    use Place::{Error, Exception, Info, Message, Plain, Reported, Warning};
    match (form, place) {
        (Form::Always, Exception) => Some(weight::RAISED),
        (Form::Always, _) => Some(weight::PRINTED),
        (Form::Caught, _) | (Form::Symptom | Form::Kill, Exception | Message | Plain | Error | Warning) => {
            Some(weight::SYMPTOM)
        }
        (Form::Kill, Info) => Some(weight::SYMPTOM),
        (Form::Symptom, Reported) | (Form::Raised | Form::Printed, Reported | Warning) => {
            Some(weight::MENTIONED)
        }
        (Form::Echo, Exception) => Some(weight::ECHO_RAISED),
        (Form::Kill, Reported) | (Form::Echo, Message | Plain | Error | Warning) => Some(weight::ECHO),
        (Form::Raised | Form::Printed, Exception) => Some(weight::RAISED),
        (Form::Raised | Form::Printed, Message) => Some(weight::MESSAGE),
        (Form::Raised | Form::Printed, Error) | (Form::Printed, Plain) => Some(weight::PRINTED),
        (Form::Raised, Plain) => Some(weight::MENTIONED),
        (Form::Raised | Form::Printed | Form::Symptom | Form::Echo, Info) | (Form::Echo, Reported) => None,
    }
}

/// Whether a line only talks about memory that might run out. A message with an amount is no talk.
fn is_advice(kind: Kind, text: &str) -> bool {
    let is_memory = matches!(kind, Kind::DeviceOom | Kind::HostOom);
    is_memory && !OOM_AMOUNT.is_match(text) && (ADVICE_BEFORE.is_match(text) || ADVICE_AFTER.is_match(text))
}

/// Words of frames that say what was being done, in the order in which they are asked.
const FRAME_WORDS: &[(Kind, &[&str])] = &[
    (
        Kind::BadArguments,
        &["argparse", "hf_argparser", "training_args", "/argument", "_args.py", "arguments.py"],
    ),
    (Kind::Network, &["urllib3", "requests/", "httpx", "httpcore", "aiohttp", "file_download", "/hub/"]),
    (
        Kind::CheckpointCorrupt,
        &[
            "load_state_dict",
            "_load_from_checkpoint",
            "load_checkpoint",
            "load_from_json",
            "_load_optimizer",
            "torch/serialization",
            "safetensors",
        ],
    ),
    (
        Kind::BadData,
        &[
            "dataset",
            "preprocess",
            "template",
            "collat",
            "/data/",
            "data_utils",
            "tokeniz",
            "encode",
            "jinja",
        ],
    ),
];

/// Exceptions that values raise; others are bugs wherever they come from.
const VALUE_EXCEPTIONS: &[&str] = &[
    "ValueError",
    "KeyError",
    "TypeError",
    "AssertionError",
    "IndexError",
    "AttributeError",
    "JSONDecodeError",
    "StopIteration",
    "Exception",
    "RuntimeError",
    "OSError",
    "EOFError",
];

/// Judges an exception whose words are unknown by where it was raised: the deepest frame that says something.
fn kind_by_frames(text: &str, frames: &[String]) -> Kind {
    let class =
        ANY_EXCEPTION.captures(text).and_then(|found| found.get(1)).map_or("", |class| class.as_str());
    if class == "PermissionError" {
        return Kind::BadArguments;
    }
    if !VALUE_EXCEPTIONS.contains(&class) {
        return Kind::CodeError;
    }
    // The moments of a checkpoint have another shape than the parameters of this model.
    let mismatch = text.to_ascii_lowercase().contains("size mismatch");
    let by_frame = |frame: String| {
        if mismatch && ["adam", "/optim/", "optimizer"].iter().any(|word| frame.contains(word)) {
            return Some(Kind::CheckpointCorrupt);
        }
        let said = FRAME_WORDS.iter().find(|(_, words)| words.iter().any(|word| frame.contains(word)));
        // torch's data loader only passes on what its workers raise.
        said.map(|(kind, _)| *kind)
            .filter(|kind| *kind != Kind::BadData || !frame.contains("torch/utils/data"))
    };
    let by_frames = frames.iter().rev().take(6).map(|frame| frame.to_ascii_lowercase()).find_map(by_frame);
    by_frames.unwrap_or(match class {
        "JSONDecodeError" => Kind::BadData,
        // Nearly every check of a setting raises this one.
        "ValueError" => Kind::BadArguments,
        _ => Kind::CodeError,
    })
}

/// Returns in which part of the run a traceback lies. The trainer's loop calls eval and save, so these are asked first.
fn phase_of(frames: &[String]) -> Option<Phase> {
    let any = |words: &[&str]| frames.iter().any(|frame| words.iter().any(|word| frame.contains(word)));
    if any(&[
        " evaluate",
        " evaluation_loop",
        " prediction_loop",
        " prediction_step",
        " _evaluate",
        " validate",
        "trainer.evaluate(",
    ]) {
        Some(Phase::Eval)
    } else if any(&[
        " _save_checkpoint",
        " save_model",
        " save_pretrained",
        " _save",
        " save_checkpoint",
        " save_state",
        "torch.save(",
    ]) {
        Some(Phase::Save)
    } else if any(&[
        " training_step",
        " _inner_training_loop",
        " backward",
        "backward(",
        " compute_loss",
        " train_step",
        " _load_from_checkpoint",
        " _load_optimizer_and_scheduler",
        "optimizer.step(",
    ]) {
        Some(Phase::Train)
    } else if any(&[
        " from_pretrained",
        " get_model_tokenizer",
        " load_model",
        " _load_pretrained_model",
        " _load_state_dict_into",
        " load_checkpoint_in_model",
        " _move_model_to_device",
        " get_model_processor",
        " create_weights",
        " _prepare_model_tokenizer",
        " materialize",
    ]) {
        Some(Phase::Load)
    } else {
        None
    }
}

/// Whether an unindented line looks like the rest of a wrapped message: it names an amount or one of its words.
fn oom_message_goes_on(text: &str) -> bool {
    const WORDS: [&str; 13] = [
        "iB",
        "bytes",
        "memory",
        "allocat",
        "reserved",
        "PyTorch",
        "fragmentation",
        "Documentation",
        "documentation",
        "max_split",
        "expandable",
        "Requested",
        "Device limit",
    ];
    WORDS.iter().any(|word| text.contains(word))
}

fn is_bar_or_record(text: &str) -> bool {
    BAR_OR_RECORD.is_match(text)
}

fn shortened(line: &str) -> String {
    let line = line.trim();
    let end = line.char_indices().nth(LONGEST_EVIDENCE).map_or(line.len(), |(end, _)| end);
    line[..end].to_owned()
}

/// Diagnoses a whole text at once.
pub fn diagnose(text: &[u8], exit: ExitFacts) -> Diagnosis {
    let mut diagnoser = Diagnoser::new();
    diagnoser.push_bytes(text);
    diagnoser.finish(exit)
}

const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGBUS: i32 = 7;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// Our own stop leaves the trainer with this code (`EX_TEMPFAIL`).
const STOPPED_ON_REQUEST: i32 = 75;

impl ExitFacts {
    /// Returns the signal that ended the trainer, whoever reports it: the kernel, a shell (128 + n), Python's
    /// `subprocess` (-n), or ms-swift's wrapper, whose `sys.exit(-n)` the kernel cuts to 256 - n.
    fn death_signal(&self) -> Option<i32> {
        let known = |signal: i32| matches!(signal, 1..=31).then_some(signal);
        self.signal.or_else(|| match self.code? {
            code @ -31..=-1 => known(-code),
            code @ 129..=159 => known(code - 128),
            code @ 225..=255 if code != 255 => known(256 - code),
            _ => None,
        })
    }

    fn failed(&self) -> Option<bool> {
        match (self.signal, self.code) {
            (Some(_), _) => Some(true),
            (None, Some(code)) => Some(code != 0),
            (None, None) => None,
        }
    }
}

/// Weighs text against exit facts.
fn verdict(read: Diagnoser, exit: &ExitFacts) -> Diagnosis {
    let failed = exit.failed();
    if failed == Some(false) {
        return ended_well(&read, exit);
    }
    // Whatever met it later, it had done what it was there for, and that was worth nothing.
    if failed.is_none()
        && read.metrics.ended()
        && let Some(line) = read.metrics.divergence()
    {
        return diverged(line, false);
    }
    let named = |minimum: f64| read.pending.as_ref().filter(move |cause| cause.weight >= minimum);
    if exit.oom_kill == Some(true) && named(weight::MESSAGE).is_none_or(|cause| cause.kind != Kind::DeviceOom)
    {
        return told(&read, Kind::HostOom, Answer::FewerWorkers, true);
    }
    if exit.we_stopped_it {
        return match named(weight::MESSAGE)
            .filter(|cause| matches!(cause.kind, Kind::DeviceOom | Kind::HostOom | Kind::DiskFull))
        {
            Some(cause) => by_cause(&read, cause, exit, true),
            None => told(&read, Kind::Interrupted, Answer::None, true),
        };
    }
    match exit.death_signal() {
        Some(SIGKILL) => {
            match (named(weight::SYMPTOM).filter(|cause| cause.form != Some(Form::Kill)), exit.oom_kill) {
                (Some(cause), _) => by_cause(&read, cause, exit, true),
                // The kernel's counter says that memory was not the reason: somebody killed it.
                (None, Some(false)) => told(&read, Kind::Interrupted, Answer::Resume, true),
                (None, _) => told(&read, Kind::HostOom, Answer::Resume, false),
            }
        }
        Some(SIGHUP | SIGINT | SIGTERM) => match named(weight::PRINTED) {
            Some(cause) => by_cause(&read, cause, exit, true),
            None => told(&read, Kind::Interrupted, Answer::Resume, true),
        },
        Some(SIGBUS) if named(weight::SYMPTOM).is_none() => {
            told(&read, Kind::HostOom, Answer::FewerWorkers, false)
        }
        Some(_) | None => by_text(&read, exit, failed),
    }
}

/// Judges a death, or a text without an exit code, by the text.
fn by_text(read: &Diagnoser, exit: &ExitFacts, failed: Option<bool>) -> Diagnosis {
    let loop_ended = read.metrics.ended();
    // After the end of training a warning in passing is not why anything died.
    let enough = if failed.is_none() && loop_ended { weight::PRINTED } else { weight::ECHO };
    let pending = read.pending.as_ref().filter(|cause| cause.weight >= enough);
    if let Some(line) = read.metrics.divergence()
        && pending.is_none_or(|cause| cause.weight <= weight::UNKNOWN_EXCEPTION)
    {
        return diverged(line, pending.is_some() || failed == Some(true));
    }
    if let Some(cause) = pending {
        // Without an exit code a warning in passing proves no death; broken connections mean one.
        let in_passing = cause.weight <= weight::MENTIONED && cause.form != Some(Form::Echo);
        let mentioned_only = failed.is_none() && (in_passing || cause.is_caught());
        if !mentioned_only {
            // Something caught may have broken what died after it.
            return by_cause(read, cause, exit, true);
        }
    }
    let survived = read.survived.as_ref().filter(|cause| cause.weight >= weight::SYMPTOM);
    match (failed, survived) {
        (Some(true), Some(cause)) => by_cause(read, cause, exit, true),
        (Some(true), None) if exit.code == Some(STOPPED_ON_REQUEST) => {
            told(read, Kind::Interrupted, Answer::Resume, true)
        }
        (Some(true), None) if exit.death_signal().is_some() => {
            told(read, Kind::CodeError, Answer::Stop, false)
        }
        (Some(true), None) => exit
            .full_log
            .as_deref()
            .map_or_else(|| told(read, Kind::Unknown, Answer::Stop, false), words_lost_on_the_disk),
        (_, _) if loop_ended => success(read, true),
        (_, Some(cause)) => by_cause(read, cause, exit, false),
        (_, None) if pending.is_some_and(Cause::is_caught) => match pending {
            Some(cause) => by_cause(read, cause, exit, false),
            None => unexplained(read),
        },
        (_, None) if read.metrics.saved() && pending.is_none() => success(read, false),
        (_, None) => unexplained(read),
    }
}

/// The trainer failed without a word, into a log that could not take any: to print is what failed, or comes before it.
fn words_lost_on_the_disk(log: &Path) -> Diagnosis {
    let line = format!(
        "{} takes nothing more of what the trainer prints: its disk is full or read-only",
        log.display()
    );
    Diagnosis {
        kind: Kind::DiskFull,
        fatal: true,
        certain: false,
        phase: None,
        evidence: Evidence { line, ..Evidence::default() },
        answer: Answer::Stop,
    }
}

/// A text that explains nothing, without an exit code: it may be of a run that goes on.
fn unexplained(read: &Diagnoser) -> Diagnosis {
    Diagnosis { fatal: false, ..told(read, Kind::Unknown, Answer::Stop, false) }
}

/// Exit code 0: at worst worthless, never a reason for a lower tier.
fn ended_well(read: &Diagnoser, exit: &ExitFacts) -> Diagnosis {
    if let Some(line) = read.metrics.divergence() {
        return diverged(line, false);
    }
    let cause =
        read.pending.as_ref().or(read.survived.as_ref()).filter(|cause| cause.weight >= weight::PRINTED);
    match cause {
        _ if exit.we_stopped_it => {
            Diagnosis { fatal: false, ..told(read, Kind::Interrupted, Answer::None, true) }
        }
        _ if read.metrics.ended() => success(read, true),
        Some(cause) => by_cause(read, cause, exit, false),
        None => success(read, false),
    }
}

fn success(read: &Diagnoser, certain: bool) -> Diagnosis {
    Diagnosis { fatal: false, ..told(read, Kind::Success, Answer::None, certain) }
}

fn diverged(line: &str, fatal: bool) -> Diagnosis {
    Diagnosis {
        kind: Kind::Diverged,
        fatal,
        certain: true,
        phase: Some(Phase::Train),
        evidence: Evidence { line: shortened(line), ..Evidence::default() },
        answer: Answer::RecipeStable,
    }
}

/// A verdict that exit facts give. The line is the best that the text has.
fn told(read: &Diagnoser, kind: Kind, answer: Answer, certain: bool) -> Diagnosis {
    let line = match &read.pending {
        Some(cause) if cause.kind == kind || kind == Kind::Unknown => cause.line.clone(),
        Some(_) | None => read.last_line.clone(),
    };
    Diagnosis {
        kind,
        fatal: true,
        certain,
        phase: None,
        evidence: Evidence { line, ..Evidence::default() },
        answer,
    }
}

/// A verdict that a line of the text gives.
fn by_cause(read: &Diagnoser, cause: &Cause, exit: &ExitFacts, fatal: bool) -> Diagnosis {
    let mut evidence = Evidence { line: cause.line.clone(), rank: cause.rank, ..Evidence::default() };
    let mut kind = cause.kind;
    let mut amounts = None;
    if kind == Kind::DeviceOom {
        amounts = cause.amounts.as_ref().filter(|own| own.tried.is_some()).or(read.first_amounts.as_ref());
        if let Some(amounts) = amounts {
            amounts.fill(&mut evidence);
            if amounts.neighbour_is_to_blame(exit.others_before) {
                kind = Kind::DeviceOomByNeighbour;
            }
        }
    }
    let phase = cause.phase.filter(|_| {
        matches!(kind, Kind::DeviceOom | Kind::DeviceOomByNeighbour | Kind::HostOom | Kind::DiskFull)
    });
    let answer = if fatal { answer_to(kind, phase, cause, amounts, exit) } else { Answer::None };
    Diagnosis { kind, fatal, certain: cause.certain, phase, evidence, answer }
}

/// Returns what is done about a cause (design section 5).
fn answer_to(
    kind: Kind,
    phase: Option<Phase>,
    cause: &Cause,
    amounts: Option<&OomMessage>,
    exit: &ExitFacts,
) -> Answer {
    match kind {
        Kind::DeviceOom => match phase {
            Some(Phase::Load) => Answer::QuantizeOrStop,
            Some(Phase::Eval) => Answer::LowerEvalBatch,
            // Activations are gone by then: no rung of training changes what a save needs.
            Some(Phase::Save) => Answer::Stop,
            Some(Phase::Train) | None => {
                let segments_were_off = exit.expandable_segments == Some(false);
                match amounts {
                    Some(amounts) if segments_were_off && amounts.is_fragmented() => {
                        Answer::SameTierExpandable
                    }
                    Some(_) | None => Answer::LowerTier,
                }
            }
        },
        Kind::DeviceOomByNeighbour => Answer::WaitSameTier,
        // A kill without a word proves nothing about memory.
        Kind::HostOom if cause.form == Some(Form::Kill) => Answer::Resume,
        Kind::HostOom => Answer::FewerWorkers,
        Kind::Network => Answer::Backoff,
        Kind::Communication => Answer::NewPort,
        Kind::Diverged => Answer::RecipeStable,
        Kind::DeviceFault if is_programs_fault(&cause.line) => Answer::Stop,
        Kind::DeviceFault => Answer::OtherDevice,
        Kind::CheckpointCorrupt => Answer::PreviousCheckpoint,
        Kind::Interrupted => Answer::Resume,
        Kind::Success => Answer::None,
        Kind::DiskFull
        | Kind::MissingModelOrDataset
        | Kind::BadArguments
        | Kind::IncompatibleEnvironment
        | Kind::BadData
        | Kind::CodeError
        | Kind::Unknown => Answer::Stop,
    }
}

/// Whether a library of the driver could not make its handle or workspace: mostly for lack of memory, but a version that
/// does not fit, or a context that an earlier fault broke, says the same.
fn is_librarys_allocation(line: &str) -> bool {
    line.to_ascii_lowercase().contains("alloc_failed")
}

/// Whether a device fault is one that any card would show: a wrong index, not a broken card.
fn is_programs_fault(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    ["assert", "illegal", "misaligned", "cublas", "invalid program counter"]
        .iter()
        .any(|word| line.contains(word))
}

#[cfg(test)]
mod tests;
