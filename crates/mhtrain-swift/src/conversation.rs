//! Which conversation is a row of a data set?
//!
//! ms-swift takes rows of several forms and finds out by the names of the columns which one it is. The same is done here,
//! errors included: a row that ms-swift cannot read is left out there, and is an error here.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

/// Who says something.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one who asks.
    User,
    /// The one who is trained.
    Assistant,
    /// The answer of a tool.
    Tool,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// What.
    pub content: String,
}

/// A row as a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The system message; `None` where the row has none.
    pub system: Option<String>,
    /// The messages in order.
    pub messages: Vec<Message>,
    /// Whether it has tools or pictures, whose tokens are only about known.
    pub is_approximate: bool,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Who asks: a user or a tool.
    pub role: Role,
    /// The question.
    pub query: String,
    /// The answer; `None` where the conversation ends before it.
    pub response: Option<String>,
}

impl Conversation {
    /// Returns the rounds of a conversation; `None` where it has none, or its roles do not alternate.
    ///
    /// Messages of one role in a row are one; a conversation that begins with an answer has an empty question before it.
    /// Source: `_swift_prepare_inputs` and `_get_std_messages` in `swift/template/base.py` (4.6.0).
    pub fn rounds(&self) -> Option<Vec<Round>> {
        let mut merged: Vec<Message> = Vec::new();
        for message in &self.messages {
            match merged.last_mut() {
                Some(last) if last.role == message.role => last.content.push_str(&message.content),
                Some(_) | None => merged.push(message.clone()),
            }
        }
        if merged.first()?.role == Role::Assistant {
            merged.insert(0, Message { role: Role::User, content: String::new() });
        }
        let round = |pair: &[Message]| {
            let asked = pair[0].role != Role::Assistant;
            let answered = pair.get(1).is_none_or(|answer| answer.role == Role::Assistant);
            (asked && answered).then(|| Round {
                role: pair[0].role,
                query: pair[0].content.clone(),
                response: pair.get(1).map(|answer| answer.content.clone()),
            })
        };
        merged.chunks(2).map(round).collect()
    }
}

/// Why ms-swift cannot read a row.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// It is no object of names and values.
    #[error("it is no JSON object")]
    NotAnObject,
    /// There is no message, question or answer in it.
    #[error("it has no messages")]
    NoMessages,
    /// A message has no role or content, or a role that ms-swift does not know.
    #[error("a message has no role or content that ms-swift knows")]
    BadMessage,
    /// A question or answer is no text.
    #[error("a question or an answer is no text")]
    NotText,
}

/// The form of the rows of one data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowForm {
    kind: Kind,
    /// Column -> ms-swift's name of it.
    columns: BTreeMap<String, &'static str>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Kind {
    Messages,
    Alpaca,
    Response,
}

const MESSAGE_COLUMNS: [&str; 3] = ["messages", "conversation", "conversations"];
const SYSTEM_COLUMNS: [&str; 2] = ["system", "system_prompt"];
const QUERY_COLUMNS: [&str; 6] = ["query", "prompt", "input", "instruction", "question", "problem"];
const RESPONSE_COLUMNS: [&str; 11] = [
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "text",
    "completion",
    "content",
];
/// Columns whose tokens are not in any text.
const MEDIA_COLUMNS: [&str; 7] = ["images", "image", "videos", "video", "audios", "audio", "tools"];

impl RowForm {
    /// Returns the form of rows with these columns.
    ///
    /// Source: `AutoPreprocessor`, `ResponsePreprocessor` and `safe_rename_columns` in
    /// `swift/dataset/preprocessor/core.py` (4.6.0; the same in 3.12.6). Names are compared without case, and when two
    /// columns mean the same, neither is renamed.
    pub fn of_columns<'a>(columns: impl IntoIterator<Item = &'a str>) -> RowForm {
        let columns: BTreeSet<&str> = columns.into_iter().collect();
        let kind = if MESSAGE_COLUMNS.iter().any(|name| columns.contains(name)) {
            Kind::Messages
        } else if columns.contains("instruction") && columns.contains("input") {
            Kind::Alpaca
        } else {
            Kind::Response
        };
        let mut meanings: Vec<(&'static [&'static str], &'static str)> = vec![(&SYSTEM_COLUMNS, "system")];
        match kind {
            Kind::Messages => meanings.push((&MESSAGE_COLUMNS, "messages")),
            Kind::Alpaca | Kind::Response => {
                meanings.extend([(&QUERY_COLUMNS[..], "query"), (&RESPONSE_COLUMNS[..], "response")]);
            }
        }
        let mut named = BTreeMap::new();
        for (names, meaning) in meanings {
            let same: Vec<&str> = columns
                .iter()
                .copied()
                .filter(|column| names.contains(&column.to_lowercase().as_str()))
                .collect();
            match same[..] {
                [column] => {
                    named.insert(column.to_owned(), meaning);
                }
                _ if columns.contains(meaning) => {
                    named.insert(meaning.to_owned(), meaning);
                }
                _ => {}
            }
        }
        RowForm { kind, columns: named }
    }

    /// Returns the conversation of a row.
    ///
    /// # Errors
    /// ms-swift cannot read the row, and leaves it out.
    pub fn conversation(&self, row: &Value) -> Result<Conversation, RowError> {
        let row = row.as_object().ok_or(RowError::NotAnObject)?;
        let value = |meaning: &str| {
            let column = self.columns.iter().find(|(_, named)| **named == meaning)?.0;
            row.get(column).filter(|value| !value.is_null())
        };
        let mut conversation = match self.kind {
            Kind::Messages => messages(value("messages").ok_or(RowError::NoMessages)?)?,
            Kind::Alpaca => {
                let query = alpaca_query(row)?;
                let response =
                    row.get("output").filter(|value| !value.is_null()).or_else(|| value("response"));
                pairs(None, query, response)?
            }
            Kind::Response => {
                let query = value("query").map(text).transpose()?;
                pairs(row.get("history"), query, value("response"))?
            }
        };
        if conversation.system.is_none() {
            conversation.system = value("system").map(text).transpose()?;
        }
        if conversation.messages.is_empty() {
            return Err(RowError::NoMessages);
        }
        let has_media = |name: &str| row.get(name).is_some_and(|value| !is_empty(value));
        conversation.is_approximate |= MEDIA_COLUMNS.iter().any(|name| has_media(name));
        Ok(conversation)
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => false,
    }
}

fn text(value: &Value) -> Result<String, RowError> {
    value.as_str().map(str::to_owned).ok_or(RowError::NotText)
}

/// Source: `AlpacaPreprocessor.concat_inst_input`.
fn alpaca_query(row: &Map<String, Value>) -> Result<Option<String>, RowError> {
    let part = |name: &str| row.get(name).filter(|value| !is_empty(value)).map(text).transpose();
    match (part("instruction")?, part("input")?) {
        (Some(instruction), Some(input)) => Ok(Some(format!("{instruction}\n{input}"))),
        (Some(one), None) | (None, Some(one)) => Ok(Some(one)),
        // An empty text is a question too; what is missing altogether is none.
        (None, None) if row.get("input").or_else(|| row.get("instruction")).is_some_and(Value::is_string) => {
            Ok(Some(String::new()))
        }
        (None, None) => Err(RowError::NotText),
    }
}

/// Returns the conversation of a question, its answer (the first of several), and the rounds before them.
///
/// Source: `ResponsePreprocessor.preprocess`, `history_to_messages`.
fn pairs(
    history: Option<&Value>,
    query: Option<String>,
    response: Option<&Value>,
) -> Result<Conversation, RowError> {
    let mut messages = Vec::new();
    let mut push = |role, content: Option<String>| {
        messages.extend(content.map(|content| Message { role, content }));
    };
    let written;
    let history = match history {
        Some(Value::String(text)) => {
            // Python's spelling of a list; with the quotes of JSON it is mostly readable.
            written = serde_json::from_str(text)
                .or_else(|_| serde_json::from_str(&text.replace('\'', "\"")))
                .map_err(|_| RowError::BadMessage)?;
            Some(&written)
        }
        other => other,
    };
    for round in history.and_then(Value::as_array).into_iter().flatten() {
        let round = round.as_array().filter(|round| round.len() >= 2).ok_or(RowError::BadMessage)?;
        for (role, said) in [(Role::User, &round[0]), (Role::Assistant, &round[1])] {
            push(role, (!said.is_null()).then(|| text(said)).transpose()?);
        }
    }
    push(Role::User, query);
    let response = match response {
        Some(Value::Array(several)) => Some(several.first().ok_or(RowError::NoMessages)?),
        other => other,
    };
    push(Role::Assistant, response.map(text).transpose()?);
    Ok(Conversation { system: None, messages, is_approximate: false })
}

/// Returns the conversation of a list of messages, or of a text that holds one.
///
/// Source: `MessagesPreprocessor.preprocess`, `sharegpt_to_messages`, `to_std_messages`, `_check_messages`.
fn messages(value: &Value) -> Result<Conversation, RowError> {
    let written;
    let list = match value {
        Value::String(text) => {
            written = serde_json::from_str::<Value>(text).map_err(|_| RowError::BadMessage)?;
            &written
        }
        other => other,
    };
    let list = list.as_array().filter(|list| !list.is_empty()).ok_or(RowError::NoMessages)?;
    let mut conversation = Conversation::default();
    let is_pair_form = list[0].as_object().is_some_and(|first| {
        !["role", "from", "content", "value"].iter().any(|key| first.contains_key(*key))
    });
    for (index, message) in list.iter().enumerate() {
        let message = message.as_object().ok_or(RowError::BadMessage)?;
        if is_pair_form {
            for (role, keys) in
                [(Role::User, &["user", "human"][..]), (Role::Assistant, &["assistant", "gpt", "bot"][..])]
            {
                let said = keys.iter().find_map(|key| message.get(*key)).ok_or(RowError::BadMessage)?;
                conversation.messages.push(Message { role, content: text(said)? });
            }
            continue;
        }
        let get = |keys: [&str; 2]| keys.iter().find_map(|key| message.get(*key).filter(|v| !v.is_null()));
        let role = get(["role", "from"]).and_then(Value::as_str).ok_or(RowError::BadMessage)?;
        let calls = message.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty());
        let content = match get(["content", "value"]) {
            Some(content) => content_text(content, &mut conversation.is_approximate)?,
            None if calls.is_some() => String::new(),
            None => return Err(RowError::BadMessage),
        };
        let role = match role.replace('-', "_").as_str() {
            "system" if index == 0 => {
                conversation.system = Some(content);
                continue;
            }
            "user" | "human" => Role::User,
            "assistant" | "gpt" | "bot" => Role::Assistant,
            "tool" | "tool_response" | "function_response" | "observation" | "observations" => {
                conversation.is_approximate = true;
                Role::Tool
            }
            "tool_call" | "function_call" => {
                conversation.is_approximate = true;
                let content = tool_call(&content);
                conversation.messages.push(Message { role: Role::Assistant, content });
                continue;
            }
            _ => return Err(RowError::BadMessage),
        };
        conversation.messages.push(Message { role, content });
        for call in calls.into_iter().flatten() {
            conversation.is_approximate = true;
            let content = tool_call(&call.get("function").unwrap_or(call).to_string());
            conversation.messages.push(Message { role: Role::Assistant, content });
        }
    }
    Ok(conversation)
}

/// How most agent templates write a call.
fn tool_call(call: &str) -> String {
    format!("<tool_call>\n{call}\n</tool_call>")
}

/// Returns the text of a message: a text, or blocks of which some are text.
fn content_text(content: &Value, is_approximate: &mut bool) -> Result<String, RowError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => {
            let mut text = String::new();
            for block in blocks {
                match block.get("text").and_then(Value::as_str) {
                    Some(part) => text.push_str(part),
                    None => *is_approximate = true,
                }
            }
            Ok(text)
        }
        Value::Object(_) => {
            *is_approximate = true;
            Ok(content.to_string())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Err(RowError::NotText),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(row: Value) -> Result<Conversation, RowError> {
        let columns: Vec<String> = row.as_object().unwrap().keys().cloned().collect();
        RowForm::of_columns(columns.iter().map(String::as_str)).conversation(&row)
    }

    /// Returns system and messages as one text.
    fn said(row: Value) -> String {
        let conversation = read(row).unwrap();
        let system = conversation.system.map(|system| format!("S:{system} ")).unwrap_or_default();
        let messages = conversation.messages.iter().map(|message| {
            let role = match message.role {
                Role::User => "U",
                Role::Assistant => "A",
                Role::Tool => "T",
            };
            format!("{role}:{}", message.content)
        });
        system + &messages.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_form_of_a_row_becomes_the_same_conversation() {
        for row in [
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            json!({"conversation": [{"human": "q", "assistant": "a"}]}),
            json!({"messages": "[{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"bot\", \"content\": \"a\"}]"}),
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"}]}),
            json!({"query": "q", "response": "a"}),
            json!({"Prompt": "q", "completion": "a"}),
            json!({"instruction": "q", "input": "", "output": "a"}),
            json!({"instruction": "q", "output": "a"}),
            json!({"question": "q", "answers": ["a", "b"]}),
        ] {
            assert_eq!(said(row.clone()), "U:q A:a", "{row}");
        }
    }

    #[test]
    fn system_history_and_input_are_where_they_belong() {
        let row = json!({"system": "s", "history": [["h", "i"]], "query": "q", "response": "a"});
        assert_eq!(said(row), "S:s U:h A:i U:q A:a");
        let row = json!({"system": "s", "history": "[['h', 'i']]", "query": "q", "response": "a"});
        assert_eq!(said(row), "S:s U:h A:i U:q A:a");
        assert_eq!(said(json!({"instruction": "do", "input": "this", "output": "a"})), "U:do\nthis A:a");
        let row = json!({"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}],
            "system": "other"});
        assert_eq!(said(row), "S:own U:q");
        assert_eq!(said(json!({"text": "only this"})), "A:only this");
    }

    /// As in ms-swift: it does not guess which of two is meant.
    #[test]
    fn two_columns_of_one_meaning_are_neither() {
        assert_eq!(said(json!({"query": "q", "answer": "a", "text": "b"})), "U:q");
        assert_eq!(said(json!({"query": "q", "prompt": "p", "answer": "a"})), "U:q A:a");
    }

    #[test]
    fn what_ms_swift_cannot_read_is_an_error() {
        for row in [
            json!({"messages": []}),
            json!({"messages": null}),
            json!({"messages": [{"role": "user", "content": null}]}),
            json!({"messages": [{"role": "narrator", "content": "x"}]}),
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "late"}]}),
            json!({"label": 3}),
            json!({"query": 3, "response": "a"}),
        ] {
            assert!(read(row.clone()).is_err(), "{row}");
        }
    }

    #[test]
    fn tools_and_pictures_are_marked_as_only_about_known() {
        assert!(read(json!({"query": "q", "response": "a", "images": ["x.png"]})).unwrap().is_approximate);
        assert!(!read(json!({"query": "q", "response": "a", "images": []})).unwrap().is_approximate);
        let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "tool_call", "content": "{}"},
            {"role": "tool_response", "content": "r"}, {"role": "assistant", "content": "a"}]});
        let conversation = read(row).unwrap();
        assert!(conversation.is_approximate);
        assert_eq!(conversation.rounds().map(|rounds| rounds.len()), Some(2));
    }

    #[test]
    fn rounds_alternate_after_neighbours_are_merged() {
        let rounds = |row| read(row).unwrap().rounds();
        let one =
            rounds(json!({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"}]}));
        assert_eq!(one.map(|rounds| (rounds.len(), rounds[0].query.clone())), Some((1, "ab".to_owned())));
        let answer_first = rounds(json!({"text": "t"})).unwrap();
        assert_eq!((answer_first[0].query.as_str(), answer_first[0].response.as_deref()), ("", Some("t")));
        let unanswered = rounds(json!({"query": "q"})).unwrap();
        assert_eq!(unanswered[0].response, None);
        let tool_asks_tool = rounds(json!({"messages": [{"role": "user", "content": "q"},
            {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]}));
        assert_eq!(tool_asks_tool, None);
    }
}
