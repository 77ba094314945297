//! Where in a text is `swift sft` called, and with which flags and variables?

use std::collections::BTreeMap;

use super::ImportError;
use super::shell::{self, ShellCommand, Text};
use crate::dialect::Dialect;
use crate::parameters::Parameters;

/// One call of `swift sft`, taken apart.
#[derive(Clone, Debug, Default)]
pub(super) struct Call {
    /// Line on which it begins.
    pub(super) line: usize,
    /// Its parameters by name without dashes, in order, each once.
    pub(super) flags: Vec<Flag>,
    /// What the text puts into its environment.
    pub(super) env: BTreeMap<String, Text>,
    /// Processes that a launcher in front of it starts.
    pub(super) launched: Option<u32>,
}

/// One parameter as it is given.
#[derive(Clone, Debug)]
pub(super) struct Flag {
    /// Its name without dashes, with underscores.
    pub(super) name: String,
    /// Its values; empty for a bare flag.
    pub(super) values: Vec<Text>,
}

impl Call {
    /// Returns the values of a parameter.
    pub(super) fn values(&self, name: &str) -> Option<&[Text]> {
        self.flags.iter().find(|flag| flag.name == name).map(|flag| flag.values.as_slice())
    }

    /// Takes a parameter out.
    pub(super) fn take(&mut self, name: &str) -> Option<Vec<Text>> {
        let at = self.flags.iter().position(|flag| flag.name == name)?;
        Some(self.flags.remove(at).values)
    }
}

/// Programs that only show their arguments.
const QUOTING_PROGRAMS: [&str; 8] = ["echo", "printf", "grep", "which", "type", "man", "alias", "pip"];

/// Returns the call that is meant.
pub(super) fn find_call(
    text: &str,
    nth: Option<usize>,
    warnings: &mut Vec<String>,
) -> Result<Call, ImportError> {
    let text = prepared(text, warnings);
    let script = shell::read(&text, |words| trainer_start(words).is_some())
        .map_err(|open| ImportError::Unterminated { line: open.line })?;
    let calls: Vec<(&ShellCommand, usize)> = script
        .commands
        .iter()
        .filter_map(|command| trainer_start(&command.words).map(|start| (command, start)))
        .collect();
    let (command, start) = match (calls.as_slice(), nth) {
        ([], _) => return Err(no_call(&text, &script)),
        ([only], None) => *only,
        (several, None) => {
            return Err(ImportError::Several { lines: several.iter().map(|(call, _)| call.line).collect() });
        }
        (several, Some(nth)) => *nth
            .checked_sub(1)
            .and_then(|index| several.get(index))
            .ok_or(ImportError::NoSuchCommand { asked: nth, count: several.len() })?,
    };
    warn_about_others(&script.commands, warnings);
    take_apart(command, start, warnings)
}

/// Returns the text with plain line ends, without byte order mark, markdown fences and prompts.
fn prepared(text: &str, warnings: &mut Vec<String>) -> String {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n").replace('\r', "\n");
    if text.lines().any(|line| line.trim_start().starts_with("#SBATCH")) {
        warnings.push("`#SBATCH` lines are left out: a job is no Slurm script".to_owned());
    }
    if text.contains(['\u{a0}', '\u{202f}']) {
        warnings.push(
            "non-breaking spaces were taken for blanks; a shell would take them for letters".to_owned(),
        );
    }
    let mut goes_on = false;
    let lines = text.lines().map(|line| {
        let shown = match line.trim_start() {
            fence if fence.starts_with("```") => "",
            prompt if prompt.starts_with("$ ") => &prompt[2..],
            // The prompt of a continued line; a redirection stands there hardly ever.
            prompt if goes_on && prompt.starts_with("> ") => &prompt[2..],
            _ => line,
        };
        goes_on = shown.trim_end().ends_with('\\');
        shown
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the index of the first word behind the trainer's command.
fn trainer_start(words: &[Text]) -> Option<usize> {
    if words.first().is_some_and(|word| QUOTING_PROGRAMS.contains(&base_name(&word.text))) {
        return None;
    }
    let is = |at: usize, text: &str| words.get(at).is_some_and(|word| word.text == text);
    (0..words.len()).find_map(|at| {
        let word = words[at].text.as_str();
        let length = match word {
            "-m" if is(at + 1, "swift.cli.sft") => 2,
            "-m" if is(at + 1, "swift.cli.main") && is(at + 2, "sft") => 3,
            _ if word.ends_with("swift/cli/sft.py") => 1,
            _ if word.ends_with("swift/cli/main.py") && is(at + 1, "sft") => 2,
            _ if base_name(word) == "swift" && is(at + 1, "sft") => 2,
            _ => return None,
        };
        Some(at + length)
    })
}

fn base_name(word: &str) -> &str {
    let last = word.rsplit('/').next().unwrap_or(word);
    last.strip_suffix(".exe").unwrap_or(last)
}

/// Says why there is no call: another command, other characters, or a call that would not be run.
fn no_call(text: &str, script: &shell::Script) -> ImportError {
    for command in &script.commands {
        for pair in command.words.windows(2) {
            let (program, verb) = (base_name(&pair[0].text), pair[1].text.as_str());
            let is_trainer = program == "megatron" || (program == "swift" && verb != "sft");
            if is_trainer && !verb.is_empty() && verb.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
                return ImportError::OtherCommand {
                    command: format!("{program} {verb}"),
                    line: command.line,
                };
            }
        }
    }
    let narrow = |line: &str| line.chars().map(narrowed).collect::<String>();
    let wide = text
        .lines()
        .enumerate()
        .find(|(_, line)| !line.contains("swift sft") && narrow(line).contains("swift sft"));
    if let Some((index, line)) = wide {
        return ImportError::NotAscii { found: clipped(line.trim()), line: index + 1 };
    }
    let mut words = script.commands.iter().flat_map(|command| &command.words);
    let hint = if script.here_documents.iter().any(|body| body.contains("swift sft")) {
        Some("a here-document")
    } else if words.any(|word| word.text.contains("swift sft")) {
        Some("quotes")
    } else if text.lines().any(|line| line.trim_start().starts_with('#') && line.contains("swift sft")) {
        Some("a comment")
    } else {
        None
    };
    ImportError::NoCommand { hint }
}

/// Returns the ASCII character that a full-width one looks like.
///
/// Source: Unicode's block Halfwidth and Fullwidth Forms, U+FF01 to U+FF5E, and the ideographic space U+3000.
fn narrowed(c: char) -> char {
    match c {
        '\u{3000}' | '\u{a0}' => ' ',
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        _ => c,
    }
}

/// Returns a text of at most 40 characters.
pub(super) fn clipped(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Names what else the text does. Only programs are named: an argument may be a secret.
fn warn_about_others(commands: &[ShellCommand], warnings: &mut Vec<String>) {
    for command in commands.iter().filter(|command| trainer_start(&command.words).is_none()) {
        let Some(program) = command.words.first().map(|word| base_name(&word.text)) else { continue };
        if matches!(program, "set" | "shopt" | "true" | ":" | "fi" | "done" | "esac" | "}" | "{" | "wait") {
            continue;
        }
        let is_plain =
            program.len() <= 30 && program.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        let name = if is_plain { program } else { "a command" };
        let line = command.line;
        warnings.push(match name {
            "cd" | "pushd" => format!(
                "line {line}: `{name}` is left out; relative paths of a job begin at the directory where it is submitted"
            ),
            "for" | "while" | "until" => format!("line {line}: the loop is left out; the job is one round of it"),
            _ => format!("line {line}: `{name}` is left out; a job only trains"),
        });
    }
}

fn take_apart(command: &ShellCommand, start: usize, warnings: &mut Vec<String>) -> Result<Call, ImportError> {
    let line = command.line;
    if command.is_redirected {
        warnings.push("redirections, pipes and `&` are left out: each attempt keeps its own log".to_owned());
    }
    if command.was_joined {
        warnings.push("flags on lines of their own were taken for the end of the call, as if a backslash stood before them".to_owned());
    }
    let mut call = Call { line, env: command.env.clone(), ..Call::default() };
    read_launcher(&command.words[..start], &mut call, warnings)?;
    read_flags(&command.words[start..], &mut call, warnings)?;
    Ok(call)
}

/// Reads what stands in front of the trainer's command: `nohup`, `env A=b`, `torchrun --nproc_per_node 2`, ….
fn read_launcher(words: &[Text], call: &mut Call, warnings: &mut Vec<String>) -> Result<(), ImportError> {
    const COUNTS: [&str; 4] = ["nproc_per_node", "nproc-per-node", "num_processes", "num_gpus"];
    let mut named = Vec::new();
    for (at, word) in words.iter().enumerate() {
        if let Some((name, value)) = word.text.split_once('=')
            && mhtrain_job::secrets::is_variable_name(name)
        {
            let is_secret = word.is_secret || mhtrain_job::secrets::is_secret_name(name);
            call.env.insert(name.to_owned(), Text { text: value.to_owned(), is_secret, ..word.clone() });
            continue;
        }
        let (name, value) = match word.text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word.text.as_str(), words.get(at + 1).map(|next| next.text.as_str())),
        };
        let name = name.trim_start_matches('-');
        if word.text.starts_with("--") && COUNTS.contains(&name) {
            call.launched = value.and_then(|count| count.parse().ok());
        } else if word.text.starts_with("--") && name == "nnodes" {
            check_one_machine(call.line, value.unwrap_or_default())?;
        }
        let program = base_name(&word.text);
        if ["nohup", "torchrun", "accelerate", "deepspeed", "sudo", "srun", "time", "setsid"]
            .contains(&program)
        {
            named.push(format!("`{program}`"));
        }
    }
    if !named.is_empty() {
        warnings.push(format!(
            "{} in front of the call is left out: the supervisor starts the trainer",
            named.join(", ")
        ));
    }
    Ok(())
}

/// Refuses a number of machines above one.
pub(super) fn check_one_machine(line: usize, nodes: &str) -> Result<(), ImportError> {
    match nodes.trim() {
        "" | "1" | "1:1" => Ok(()),
        several => Err(ImportError::SeveralMachines { line, nodes: clipped(several) }),
    }
}

fn read_flags(words: &[Text], call: &mut Call, warnings: &mut Vec<String>) -> Result<(), ImportError> {
    let line = call.line;
    if let Some(file) = words.first().filter(|word| is_config_file(&word.text)) {
        return Err(ImportError::ConfigFile { file: clipped(&file.text), line });
    }
    let mut current: Option<Flag> = None;
    let mut is_closed = false;
    let mut strays = 0_usize;
    for word in words {
        if is_flag(&word.text) {
            close(current.take(), call, warnings);
            let (flag, with_value) = flag_of(word, line, warnings)?;
            current = Some(flag);
            is_closed = with_value;
        } else if looks_like_flag(&word.text) {
            return Err(ImportError::NotAscii { found: clipped(&word.text), line });
        } else if let Some(flag) = current.as_mut().filter(|flag| !is_closed && takes_another(flag)) {
            flag.values.push(word.clone());
        } else {
            strays += 1;
        }
    }
    close(current, call, warnings);
    if strays > 0 {
        // The words themselves are not shown: one of them may be a secret.
        warnings.push(format!("{strays} words of the call belong to no flag and are left out"));
    }
    if let Some(file) = call.values("config").and_then(<[Text]>::first) {
        return Err(ImportError::ConfigFile { file: clipped(&file.text), line });
    }
    Ok(())
}

fn is_config_file(word: &str) -> bool {
    [".yaml", ".yml", ".json"].iter().any(|end| word.ends_with(end))
}

fn is_flag(word: &str) -> bool {
    word.len() > 2 && word.starts_with("--")
}

/// Returns whether a word begins with a dash or quote that is not ASCII.
fn looks_like_flag(word: &str) -> bool {
    word.starts_with(['－', '—', '–', '−', '‐', '‑', '“', '”', '‘', '’', '\u{3000}'])
}

/// Returns a flag's name, and its value if it is joined by `=`.
fn flag_of(word: &Text, line: usize, warnings: &mut Vec<String>) -> Result<(Flag, bool), ImportError> {
    let (written, value) = match word.text[2..].split_once('=') {
        Some((name, value)) => (name, Some(Text { text: value.to_owned(), ..word.clone() })),
        None => (&word.text[2..], None),
    };
    if !written.is_ascii() {
        return Err(ImportError::NotAscii { found: clipped(&word.text), line });
    }
    let with_value = value.is_some();
    let mut flag = Flag { name: written.replace('-', "_"), values: value.into_iter().collect() };
    complete_name(&mut flag, warnings);
    Ok((flag, with_value))
}

/// Completes an abbreviated name as argparse does, and turns `--no_x` into x = false.
fn complete_name(flag: &mut Flag, warnings: &mut Vec<String>) {
    let is_known =
        |name: &str| Parameters::of_3().get(name).is_some() || Parameters::of_4().get(name).is_some();
    if is_known(&flag.name) {
        return;
    }
    if let Some(positive) =
        flag.name.strip_prefix("no_").filter(|name| is_known(name) && flag.values.is_empty())
    {
        flag.name = positive.to_owned();
        flag.values.push(Text { text: "false".to_owned(), ..Text::default() });
        return;
    }
    let completed = match (
        Parameters::of_3().by_unique_prefix(&flag.name),
        Parameters::of_4().by_unique_prefix(&flag.name),
    ) {
        (Some(three), Some(four)) if three == four => Some(three),
        (Some(one), None) | (None, Some(one)) => Some(one),
        (Some(_), Some(_)) | (None, None) => None,
    };
    match completed {
        Some(full) => {
            warnings.push(format!("`--{}` is short for `--{full}`", clipped(&flag.name)));
            flag.name = full.to_owned();
        }
        None => {
            let (dialect, _) = Dialect::for_versions(None, None);
            let near =
                dialect.parameters().nearest(&flag.name).map(|near| format!(" (did you mean `--{near}`?)"));
            warnings.push(format!(
                "`--{}` is no known parameter of `swift sft`{}; it is kept in `args`",
                clipped(&flag.name),
                near.unwrap_or_default()
            ));
        }
    }
}

/// Returns whether a further word is a value of this flag. Unknown flags take any number.
fn takes_another(flag: &Flag) -> bool {
    let known = Parameters::of_4().get(&flag.name).or_else(|| Parameters::of_3().get(&flag.name));
    flag.values.is_empty() || known.is_none_or(|parameter| parameter.many)
}

fn close(flag: Option<Flag>, call: &mut Call, warnings: &mut Vec<String>) {
    let Some(flag) = flag else { return };
    if call.take(&flag.name).is_some() {
        warnings.push(format!("`--{}` is given more than once; the last one counts", clipped(&flag.name)));
    }
    call.flags.push(flag);
}
