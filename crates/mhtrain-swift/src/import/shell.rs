//! Which commands would a shell run for this text, as far as that can be known without running anything?
//!
//! A small reader for what people write around `swift sft`: quotes, continuations, comments, `export`, prefixes,
//! variables and arrays, redirections and here-documents. Nothing is executed; what only execution could tell
//! (command substitutions, positional parameters) stays *unresolved* and says so.
//!
//! Some slips that a shell would punish are forgiven, because people make them: a comment between continued lines,
//! blanks after a backslash at the end of a line, and non-breaking spaces.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::vec::IntoIter;

use super::arithmetic;

use mhtrain_job::secrets::{is_secret_name, is_secret_value};

/// A quote or bracket that is never closed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Unterminated {
    /// Line on which it was opened, counted from 1.
    pub(super) line: usize,
}

/// Part of a word as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal {
        text: String,
        quoted: bool,
    },
    Variable {
        name: String,
        default: Option<String>,
        quoted: bool,
    },
    /// `$((16 / N))` or `$(expr 16 / $N)`.
    Arithmetic {
        expression: String,
    },
    /// `$(basename WORD)` or `${NAME##*/}`: what stands behind the last slash of these pieces.
    LastPathPart {
        of: Vec<Piece>,
    },
    /// What only execution could tell.
    Unresolved {
        what: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Vec<Piece>),
    /// `NAME=( … )` or `NAME+=( … )`.
    Array {
        name: String,
        append: bool,
        words: Vec<Vec<Piece>>,
    },
    Newline,
    /// `;`, `&`, `&&`, `||`, `(`, `)`.
    Separator,
    Pipe,
    Redirection,
    HereDocument {
        body: String,
    },
}

/// One word after expansion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Text {
    /// The word; without what could not be resolved.
    pub(super) text: String,
    /// What could not be resolved, in words.
    pub(super) unresolved: Option<String>,
    /// Whether it holds the value of a secret.
    pub(super) is_secret: bool,
}

/// One simple command after expansion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ShellCommand {
    /// Line on which it begins, counted from 1.
    pub(super) line: usize,
    /// The command's words; assignments in front of it are in `env`.
    pub(super) words: Vec<Text>,
    /// What it finds in its environment because of this text.
    pub(super) env: BTreeMap<String, Text>,
    /// Whether its output is redirected or piped, or it is put into the background.
    pub(super) is_redirected: bool,
    /// Whether flags on lines of their own were taken for its continuation.
    pub(super) was_joined: bool,
}

/// The commands of a text, and what was met beside them.
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    /// Commands in order, without assignments that stand alone.
    pub(super) commands: Vec<ShellCommand>,
    /// Texts of here-documents.
    pub(super) here_documents: Vec<String>,
}

/// Reads a text. `joins` says whether a line of flags may continue a command, given by its words.
///
/// # Errors
/// A quote or bracket that is never closed.
pub(super) fn read(text: &str, joins: impl Fn(&[Text]) -> bool) -> Result<Script, Unterminated> {
    let tokens = Lexer::new(text).tokens()?;
    let mut script = Script::default();
    let mut shell = Shell::default();
    let mut tokens = tokens.into_iter().peekable();
    while tokens.peek().is_some() {
        shell.run_one(&mut tokens, &mut script, &joins);
    }
    Ok(script)
}

/// Variables as far as they are known.
#[derive(Debug, Default)]
struct Shell {
    variables: BTreeMap<String, Vec<Text>>,
    exported: BTreeMap<String, ()>,
}

impl Shell {
    /// Takes the tokens of one simple command and carries out what it does to variables.
    fn run_one(
        &mut self,
        tokens: &mut Peekable<IntoIter<(Token, usize)>>,
        script: &mut Script,
        joins: &impl Fn(&[Text]) -> bool,
    ) {
        let mut command = ShellCommand::default();
        let mut prefix: Vec<(String, Vec<Text>)> = Vec::new();
        for (token, line) in tokens.by_ref() {
            if command.line == 0 {
                command.line = line;
            }
            match token {
                Token::Newline | Token::Separator => break,
                Token::Pipe => {
                    command.is_redirected = true;
                    break;
                }
                Token::Redirection => command.is_redirected = true,
                Token::HereDocument { body } => script.here_documents.push(body),
                Token::Array { name, append, words } => {
                    let words = words.iter().flat_map(|word| self.expand(word)).collect();
                    self.assign(&name, words, append);
                }
                Token::Word(pieces) if command.words.is_empty() => match assignment(&pieces) {
                    Some((name, append, value)) => {
                        let value = vec![self.expand_whole(&value)];
                        prefix.push((name.clone(), value.clone()));
                        if append {
                            self.assign(&name, value, true);
                            prefix.pop();
                        }
                    }
                    None => command.words.extend(self.expand(&pieces)),
                },
                Token::Word(pieces) => self.push_argument(&mut command, &pieces),
            }
        }
        self.finish(command, prefix, script, joins);
    }

    /// Adds a word; `export A=$B` keeps its value in one piece, as a shell does.
    fn push_argument(&self, command: &mut ShellCommand, pieces: &[Piece]) {
        let declares = command.words.first().is_some_and(|word| is_declaration(&word.text));
        if declares && assignment(pieces).is_some() {
            command.words.push(self.expand_whole(pieces));
        } else {
            command.words.extend(self.expand(pieces));
        }
    }

    fn finish(
        &mut self,
        mut command: ShellCommand,
        prefix: Vec<(String, Vec<Text>)>,
        script: &mut Script,
        joins: &impl Fn(&[Text]) -> bool,
    ) {
        let Some(first) = command.words.first() else {
            for (name, value) in prefix {
                self.assign(&name, value, false);
            }
            return;
        };
        if first.text.starts_with("--")
            && let Some(previous) = script.commands.last_mut()
            && joins(&previous.words)
        {
            previous.words.append(&mut command.words);
            previous.is_redirected |= command.is_redirected;
            previous.was_joined = true;
            return;
        }
        if is_declaration(&first.text) || is_assignment_of_cmd(&command.words) {
            self.declare(&command.words);
            return;
        }
        command.env = self.environment();
        for (name, value) in prefix {
            let value = marked(&name, join(&value));
            command.env.insert(name, value);
        }
        script.commands.push(command);
    }

    /// Carries out `export`, `declare`, `readonly` and `unset`.
    fn declare(&mut self, words: &[Text]) {
        let exports =
            matches!(words[0].text.as_str(), "export" | "set") || words.iter().any(|word| word.text == "-x");
        for word in &words[1..] {
            let (name, value) = match word.text.split_once('=') {
                Some((name, value)) => (name, Some(Text { text: value.to_owned(), ..word.clone() })),
                None => (word.text.as_str(), None),
            };
            if !is_name(name) {
                continue;
            }
            if words[0].text == "unset" {
                self.variables.remove(name);
                self.exported.remove(name);
                continue;
            }
            if let Some(value) = value {
                self.assign(name, vec![value], false);
            }
            if exports {
                self.exported.insert(name.to_owned(), ());
            }
        }
    }

    fn assign(&mut self, name: &str, words: Vec<Text>, append: bool) {
        let words = words.into_iter().map(|word| marked(name, word));
        let variable = self.variables.entry(name.to_owned()).or_default();
        if !append {
            variable.clear();
        }
        variable.extend(words);
    }

    fn environment(&self) -> BTreeMap<String, Text> {
        let known = self.exported.keys().filter_map(|name| Some((name, self.variables.get(name)?)));
        known.map(|(name, words)| (name.clone(), join(words))).collect()
    }

    /// Returns the fields of a word: unquoted variables are split at blanks.
    fn expand(&self, pieces: &[Piece]) -> Vec<Text> {
        let mut fields: Vec<Text> = Vec::new();
        let mut open: Option<Text> = None;
        for piece in pieces {
            match piece {
                Piece::Literal { text, .. } => open.get_or_insert_default().text.push_str(text),
                Piece::Unresolved { what } => open.get_or_insert_default().unresolved = Some(what.clone()),
                Piece::Arithmetic { expression } => {
                    append(open.get_or_insert_default(), &self.computed(expression));
                }
                Piece::LastPathPart { of } => {
                    let whole = self.expand_whole(of);
                    let path = whole.text.trim_end_matches('/');
                    let last = path.rsplit('/').next().unwrap_or(path).to_owned();
                    append(open.get_or_insert_default(), &Text { text: last, ..whole });
                }
                Piece::Variable { name, default, quoted } => {
                    let values = self.value(name, default.as_deref());
                    let values = if *quoted { values } else { values.iter().flat_map(split).collect() };
                    for (i, value) in values.into_iter().enumerate() {
                        if i > 0 {
                            fields.extend(open.take());
                        }
                        append(open.get_or_insert_default(), &value);
                    }
                }
            }
        }
        fields.extend(open);
        fields
    }

    fn expand_whole(&self, pieces: &[Piece]) -> Text {
        join(&self.expand(pieces))
    }

    fn computed(&self, expression: &str) -> Text {
        let number = |name: &str| self.value(name, None).first()?.text.trim().parse().ok();
        match arithmetic::evaluate(expression, number) {
            Some(value) => Text { text: value.to_string(), ..Text::default() },
            None => Text {
                unresolved: Some("a computation that only a shell can do".to_owned()),
                ..Text::default()
            },
        }
    }

    fn value(&self, name: &str, default: Option<&str>) -> Vec<Text> {
        let known =
            self.variables.get(name).filter(|words| words.iter().any(|word| *word != Text::default()));
        match (known, default) {
            (Some(words), _) => words.clone(),
            (None, Some(default)) if !default.contains(['$', '`']) => {
                vec![Text { text: default.trim_matches(['"', '\'']).to_owned(), ..Text::default() }]
            }
            (None, _) => vec![Text {
                unresolved: Some(format!("${name}, which the text does not set")),
                is_secret: is_secret_name(name),
                ..Text::default()
            }],
        }
    }
}

fn marked(name: &str, word: Text) -> Text {
    let is_secret = word.is_secret || is_secret_name(name) || is_secret_value(&word.text);
    Text { is_secret, ..word }
}

fn append(to: &mut Text, value: &Text) {
    to.text.push_str(&value.text);
    to.is_secret |= value.is_secret;
    to.unresolved = to.unresolved.take().or_else(|| value.unresolved.clone());
}

fn join(words: &[Text]) -> Text {
    let mut joined = Text::default();
    for (i, word) in words.iter().enumerate() {
        if i > 0 {
            joined.text.push(' ');
        }
        append(&mut joined, word);
    }
    joined
}

fn split(word: &Text) -> Vec<Text> {
    if word.unresolved.is_some() {
        return vec![word.clone()];
    }
    word.text.split_whitespace().map(|text| Text { text: text.to_owned(), ..word.clone() }).collect()
}

fn is_declaration(word: &str) -> bool {
    matches!(word, "export" | "declare" | "typeset" | "readonly" | "local" | "unset")
}

/// Whether this is `set NAME=VALUE`, which in cmd is an export. A shell's `set` has options there.
fn is_assignment_of_cmd(words: &[Text]) -> bool {
    let named = |word: &Text| word.text.split_once('=').is_some_and(|(name, _)| is_name(name));
    words.len() == 2 && words[0].text == "set" && named(&words[1])
}

fn is_name(text: &str) -> bool {
    mhtrain_job::secrets::is_variable_name(text)
}

/// Returns the name, whether it is `+=`, and the value of a word that is an assignment.
fn assignment(pieces: &[Piece]) -> Option<(String, bool, Vec<Piece>)> {
    let Some(Piece::Literal { text, quoted: false }) = pieces.first() else { return None };
    let (name, value) = text.split_once('=')?;
    let (name, append) = name.strip_suffix('+').map_or((name, false), |name| (name, true));
    if !is_name(name) {
        return None;
    }
    let mut rest = vec![Piece::Literal { text: value.to_owned(), quoted: false }];
    rest.extend_from_slice(&pieces[1..]);
    Some((name.to_owned(), append, rest))
}

/// Cuts a text into tokens.
struct Lexer {
    chars: Vec<char>,
    at: usize,
    line: usize,
    tokens: Vec<(Token, usize)>,
    /// Delimiters of here-documents that begin after this line, and whether tabs are stripped.
    here_documents: Vec<(String, bool)>,
}

impl Lexer {
    fn new(text: &str) -> Lexer {
        let chars = text.chars().collect();
        Lexer { chars, at: 0, line: 1, tokens: Vec::new(), here_documents: Vec::new() }
    }

    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek(0)?;
        self.at += 1;
        if c == '\n' {
            self.line += 1;
        }
        Some(c)
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn tokens(mut self) -> Result<Vec<(Token, usize)>, Unterminated> {
        while let Some(c) = self.peek(0) {
            match c {
                c if is_blank(c) => {
                    self.at += 1;
                }
                '\\' | '`' | '^' if self.continuation_length().is_some() => self.take_continuation(),
                '\n' => self.take_newline(),
                '#' => self.skip_line(),
                ';' | '(' | ')' => {
                    self.at += 1;
                    self.push(Token::Separator);
                }
                '|' => self.take_pipe(),
                '&' => self.take_ampersand()?,
                '<' if self.placeholder_length().is_some() => self.take_word()?,
                '<' | '>' => self.take_redirection()?,
                _ if self.is_numbered_redirection() => {
                    self.at += 1;
                    self.take_redirection()?;
                }
                _ => self.take_word()?,
            }
        }
        Ok(self.tokens)
    }

    /// Returns the characters of a backslash, blanks and what ends the line, if they stand here.
    fn continuation_length(&self) -> Option<usize> {
        let blanks = self.chars[self.at + 1..].iter().take_while(|c| is_blank(**c)).count();
        match (self.peek(0), self.peek(1 + blanks)) {
            (Some('\\'), None | Some('\n')) => Some(1 + blanks),
            // PowerShell and cmd continue lines so; in a shell a word of its own like this has no use.
            (Some('`' | '^'), Some('\n')) if self.next_line_holds_a_flag_after(1 + blanks) => {
                Some(1 + blanks)
            }
            // A backslash, a blank and a comment: the blank was meant to be the end of the line.
            (Some('\\'), Some('#')) if blanks > 0 => Some(1 + blanks),
            (_, _) => None,
        }
    }

    fn next_line_holds_a_flag_after(&self, ahead: usize) -> bool {
        let next = self.chars[self.at + ahead + 1..].iter().find(|c| !is_blank(**c));
        next == Some(&'-')
    }

    /// Goes on to the next line, and past comments that stand between continued lines.
    fn take_continuation(&mut self) {
        self.at += self.continuation_length().unwrap_or(1);
        if self.peek(0) == Some('#') {
            self.skip_line();
        }
        self.next();
        loop {
            let blanks = self.chars[self.at..].iter().take_while(|c| is_blank(**c)).count();
            if self.peek(blanks) != Some('#') {
                return;
            }
            let start = self.at;
            self.skip_line();
            let goes_on = self.chars[start..self.at].iter().rev().find(|c| !c.is_whitespace()) == Some(&'\\');
            if !goes_on && !self.next_line_holds_a_flag() {
                return;
            }
            self.next();
        }
    }

    fn next_line_holds_a_flag(&self) -> bool {
        let rest = self.chars[self.at..].iter().skip(1).find(|c| !matches!(c, ' ' | '\t'));
        matches!(rest, Some('-' | '#'))
    }

    fn skip_line(&mut self) {
        while self.peek(0).is_some_and(|c| c != '\n') {
            self.at += 1;
        }
    }

    fn take_newline(&mut self) {
        self.push(Token::Newline);
        self.next();
        for (delimiter, strips_tabs) in std::mem::take(&mut self.here_documents) {
            let mut body = String::new();
            while self.peek(0).is_some() {
                let start = self.at;
                self.skip_line();
                let line: String = self.chars[start..self.at].iter().collect();
                self.next();
                let text = if strips_tabs { line.trim_start_matches('\t') } else { &line };
                if text == delimiter {
                    break;
                }
                body.push_str(text);
                body.push('\n');
            }
            self.push(Token::HereDocument { body });
            self.push(Token::Newline);
        }
    }

    /// Returns the length of a `<PLACEHOLDER>` that stands here. A shell would read a redirection; people who copy
    /// an example mean the text.
    fn placeholder_length(&self) -> Option<usize> {
        let is_name = |c: &&char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let name = self.chars[self.at + 1..].iter().take_while(is_name).count();
        let starts = self.peek(1).is_some_and(|c| c.is_ascii_alphabetic());
        (starts && self.peek(0) == Some('<') && self.peek(1 + name) == Some('>')).then_some(name + 2)
    }

    fn take_pipe(&mut self) {
        self.at += 1;
        match self.peek(0) {
            Some('|') => {
                self.at += 1;
                self.push(Token::Separator);
            }
            Some('&') => {
                self.at += 1;
                self.push(Token::Pipe);
            }
            Some(_) | None => self.push(Token::Pipe),
        }
    }

    fn take_ampersand(&mut self) -> Result<(), Unterminated> {
        self.at += 1;
        match self.peek(0) {
            Some('>') => self.take_redirection(),
            Some('&') => {
                self.at += 1;
                self.push(Token::Separator);
                Ok(())
            }
            Some(_) | None => {
                self.push(Token::Redirection);
                self.push(Token::Separator);
                Ok(())
            }
        }
    }

    fn is_numbered_redirection(&self) -> bool {
        self.peek(0).is_some_and(|c| c.is_ascii_digit()) && matches!(self.peek(1), Some('<' | '>'))
    }

    /// Takes `> file`, `2>&1`, `<<EOF` and their relatives together with their target.
    fn take_redirection(&mut self) -> Result<(), Unterminated> {
        let mut operator = String::new();
        while let Some(c) = self.peek(0).filter(|c| matches!(c, '<' | '>' | '&' | '|')) {
            operator.push(c);
            self.at += 1;
        }
        if operator == "<<" && self.peek(0) == Some('-') {
            operator.push('-');
            self.at += 1;
        }
        while self.peek(0).is_some_and(is_blank) {
            self.at += 1;
        }
        if self.peek(0) == Some('(') {
            self.at += 1;
            self.skip_brackets('(', ')')?;
        } else if self.peek(0).is_some_and(|c| !is_word_end(c)) {
            let target = self.word()?;
            if operator.starts_with("<<") && operator != "<<<" {
                self.here_documents.push((plain(&target), operator.ends_with('-')));
            }
        }
        self.push(Token::Redirection);
        Ok(())
    }

    fn take_word(&mut self) -> Result<(), Unterminated> {
        let line = self.line;
        let pieces = self.word()?;
        if let [Piece::Literal { text, quoted: false }] = pieces.as_slice()
            && let Some(name) = text.strip_suffix('=')
            && self.peek(0) == Some('(')
        {
            let (name, append) = name.strip_suffix('+').map_or((name, false), |name| (name, true));
            if is_name(name) {
                self.at += 1;
                let words = self.array()?;
                self.tokens.push((Token::Array { name: name.to_owned(), append, words }, line));
                return Ok(());
            }
        }
        self.tokens.push((Token::Word(pieces), line));
        Ok(())
    }

    fn array(&mut self) -> Result<Vec<Vec<Piece>>, Unterminated> {
        let line = self.line;
        let mut words = Vec::new();
        loop {
            match self.peek(0) {
                None => return Err(Unterminated { line }),
                Some(')') => {
                    self.at += 1;
                    return Ok(words);
                }
                Some('#') => self.skip_line(),
                Some('\\') if self.continuation_length().is_some() => self.take_continuation(),
                Some(c) if is_word_end(c) => {
                    self.next();
                }
                Some(_) => words.push(self.word()?),
            }
        }
    }

    /// Takes one word, at least one character long.
    fn word(&mut self) -> Result<Vec<Piece>, Unterminated> {
        let mut pieces = Vec::new();
        while let Some(c) = self.peek(0) {
            match c {
                '<' if self.placeholder_length().is_some() => {
                    let end = self.at + self.placeholder_length().unwrap_or(1);
                    let text: String = self.chars[self.at..end].iter().collect();
                    self.at = end;
                    literal(&mut pieces, &text, true);
                }
                _ if is_word_end(c) => break,
                '\'' => {
                    let line = self.line;
                    self.at += 1;
                    let text = self.until('\'', line)?;
                    literal(&mut pieces, &text, true);
                }
                '"' => self.double_quoted(&mut pieces)?,
                '`' => self.backticks(&mut pieces)?,
                '$' => self.dollar(&mut pieces, false)?,
                '\\' if self.continuation_length().is_some() => {
                    // In the middle of a word the line goes on without a gap, as in a shell; before a comment
                    // the word ends.
                    let before = self.at;
                    self.take_continuation();
                    if self.at == before {
                        self.at += 1;
                    }
                }
                '\\' => {
                    self.at += 1;
                    let escaped = self.next().map(String::from).unwrap_or_default();
                    literal(&mut pieces, &escaped, true);
                }
                _ => {
                    self.at += 1;
                    literal(&mut pieces, c.encode_utf8(&mut [0; 4]), false);
                }
            }
        }
        Ok(pieces)
    }

    fn until(&mut self, end: char, line: usize) -> Result<String, Unterminated> {
        let mut text = String::new();
        loop {
            match self.next() {
                None => return Err(Unterminated { line }),
                Some(c) if c == end => return Ok(text),
                Some(c) => text.push(c),
            }
        }
    }

    fn double_quoted(&mut self, pieces: &mut Vec<Piece>) -> Result<(), Unterminated> {
        let line = self.line;
        self.at += 1;
        literal(pieces, "", true);
        loop {
            match self.peek(0) {
                None => return Err(Unterminated { line }),
                Some('"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some('$') => self.dollar(pieces, true)?,
                Some('`') => self.backticks(pieces)?,
                Some('\\') if matches!(self.peek(1), Some('"' | '\\' | '$' | '`')) => {
                    self.at += 1;
                    let escaped = self.next().map(String::from).unwrap_or_default();
                    literal(pieces, &escaped, true);
                }
                Some('\\') if self.peek(1) == Some('\n') => {
                    self.at += 1;
                    self.next();
                }
                Some(c) => {
                    self.next();
                    literal(pieces, c.encode_utf8(&mut [0; 4]), true);
                }
            }
        }
    }

    fn backticks(&mut self, pieces: &mut Vec<Piece>) -> Result<(), Unterminated> {
        let line = self.line;
        self.at += 1;
        self.until('`', line)?;
        pieces.push(Piece::Unresolved { what: "a command substitution".to_owned() });
        Ok(())
    }

    fn dollar(&mut self, pieces: &mut Vec<Piece>, quoted: bool) -> Result<(), Unterminated> {
        self.at += 1;
        match self.peek(0) {
            Some('(') => {
                self.at += 1;
                let start = self.at;
                self.skip_brackets('(', ')')?;
                let inside: String = self.chars[start..self.at - 1].iter().collect();
                pieces.push(command_substitution(&inside));
            }
            Some('{') => {
                let line = self.line;
                self.at += 1;
                let inside = self.until('}', line)?;
                pieces.push(parameter_expansion(&inside, quoted));
            }
            Some('\'') if !quoted => {
                let line = self.line;
                self.at += 1;
                let text = self.until('\'', line)?;
                literal(pieces, &text.replace("\\n", "\n").replace("\\t", "\t"), true);
            }
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                let mut name = String::new();
                while let Some(c) = self.peek(0).filter(|c| c.is_ascii_alphanumeric() || *c == '_') {
                    name.push(c);
                    self.at += 1;
                }
                pieces.push(Piece::Variable { name, default: None, quoted });
            }
            Some(c) if c.is_ascii_digit() || "@*#?$!-".contains(c) => {
                self.at += 1;
                pieces.push(Piece::Unresolved { what: format!("${c}, which only a running script knows") });
            }
            Some(_) | None => literal(pieces, "$", quoted),
        }
        Ok(())
    }

    /// Goes past the closing bracket; quotes inside are respected.
    fn skip_brackets(&mut self, open: char, close: char) -> Result<(), Unterminated> {
        let line = self.line;
        let mut depth = 1_usize;
        while depth > 0 {
            match self.next() {
                None => return Err(Unterminated { line }),
                Some(c @ ('\'' | '"')) => {
                    self.until(c, line)?;
                }
                Some(c) if c == open => depth += 1,
                Some(c) if c == close => depth -= 1,
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// Reads what stands between `$(` and `)`: a computation or `basename`, which can be known, or a command.
fn command_substitution(inside: &str) -> Piece {
    let inside = inside.trim();
    if let Some(expression) = inside.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')) {
        return Piece::Arithmetic { expression: expression.to_owned() };
    }
    if let Some(expression) = inside.strip_prefix("expr ") {
        return Piece::Arithmetic { expression: expression.to_owned() };
    }
    if let Some(word) = inside.strip_prefix("basename ") {
        let mut lexer = Lexer::new(word.trim());
        // A suffix to take off, or anything else behind the word, is left to a shell.
        if let Ok(of) = lexer.word()
            && lexer.at == lexer.chars.len()
        {
            return Piece::LastPathPart { of };
        }
    }
    Piece::Unresolved { what: "a command substitution".to_owned() }
}

/// Reads what stands between `${` and `}`: a name, an array as a whole, or a name with a default.
fn parameter_expansion(inside: &str, quoted: bool) -> Piece {
    let end = inside.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(inside.len());
    let (name, rest) = inside.split_at(end);
    let default = [":-", ":=", "-", "="].into_iter().find_map(|mark| rest.strip_prefix(mark));
    match (is_name(name), rest, default) {
        (true, "" | "[@]" | "[*]", _) => Piece::Variable { name: name.to_owned(), default: None, quoted },
        (true, "##*/", _) => Piece::LastPathPart {
            of: vec![Piece::Variable { name: name.to_owned(), default: None, quoted: true }],
        },
        // Called without parameters, a script takes its defaults.
        (false, _, Some(default)) if name.starts_with(|c: char| c.is_ascii_digit()) => {
            Piece::Variable { name: name.to_owned(), default: Some(default.to_owned()), quoted }
        }
        (true, _, Some(default)) => {
            Piece::Variable { name: name.to_owned(), default: Some(default.to_owned()), quoted }
        }
        _ => Piece::Unresolved { what: "an expansion that only a shell can do".to_owned() },
    }
}

fn is_word_end(c: char) -> bool {
    is_blank(c) || matches!(c, '\n' | ';' | '&' | '|' | '(' | ')' | '<' | '>')
}

/// Whether a character separates words. A shell takes the non-breaking space for a letter; people who copy from a web
/// page see a blank.
fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\u{a0}' | '\u{202f}')
}

fn literal(pieces: &mut Vec<Piece>, text: &str, quoted: bool) {
    match pieces.last_mut() {
        Some(Piece::Literal { text: last, quoted: kind }) if *kind == quoted => last.push_str(text),
        _ => pieces.push(Piece::Literal { text: text.to_owned(), quoted }),
    }
}

fn plain(pieces: &[Piece]) -> String {
    let texts = pieces.iter().map(|piece| match piece {
        Piece::Literal { text, .. } => text.as_str(),
        Piece::Variable { name, .. } => name.as_str(),
        Piece::Unresolved { .. } | Piece::Arithmetic { .. } | Piece::LastPathPart { .. } => "",
    });
    texts.collect()
}
