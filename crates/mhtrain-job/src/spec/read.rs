//! How is one JSON value read as what a key takes?

use serde_json::Value;

use super::error::SpecError;

/// Longest text of a path, a name or a hub id; Linux takes no longer path (`PATH_MAX`).
const TEXT_BYTES_MAX: usize = 4096;

/// Words that are at least so alike are taken for a slip of the pen (Jaro-Winkler, 0 to 1).
const ALIKE_MIN: f64 = 0.8;

/// A value and the key it stands under.
#[derive(Copy, Clone)]
pub(super) struct At<'a> {
    pub(super) key: &'a str,
    pub(super) value: &'a Value,
}

impl<'a> At<'a> {
    pub(super) fn new(key: &'a str, value: &'a Value) -> At<'a> {
        At { key, value }
    }

    pub(super) fn wrong_type(self, expected: &str) -> SpecError {
        SpecError::WrongType {
            key: self.key.to_owned(),
            expected: expected.to_owned(),
            found: show(self.value),
        }
    }

    pub(super) fn out_of_range(self, expected: &str) -> SpecError {
        SpecError::OutOfRange {
            key: self.key.to_owned(),
            expected: expected.to_owned(),
            found: show(self.value),
        }
    }

    /// Reads one line of text that is not empty and does not look like an option.
    pub(super) fn line(self, expected: &str) -> Result<String, SpecError> {
        let Value::String(text) = self.value else { return Err(self.wrong_type(expected)) };
        check_line(self.key, text)?;
        if text.trim().is_empty() {
            return Err(self.out_of_range(&format!("{expected} that is not empty")));
        }
        if text.len() > TEXT_BYTES_MAX {
            return Err(self.out_of_range(&format!("{expected} of at most {TEXT_BYTES_MAX} bytes")));
        }
        if text.starts_with('-') {
            return Err(self.out_of_range(&format!("{expected} that does not begin with `-`")));
        }
        Ok(text.clone())
    }

    /// Reads one line or a list of lines that is not empty.
    pub(super) fn lines(self, expected: &str) -> Result<Vec<String>, SpecError> {
        match self.value {
            Value::String(_) => Ok(vec![self.line(expected)?]),
            Value::Array(items) if items.is_empty() => {
                Err(self.out_of_range(&format!("{expected}, or a list with at least one")))
            }
            Value::Array(items) => items
                .iter()
                .enumerate()
                .map(|(i, item)| At::new(&format!("{}[{i}]", self.key), item).line(expected))
                .collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
                Err(self.wrong_type(&format!("{expected}, or a list of them")))
            }
        }
    }

    /// Reads a whole number from `min` to `max`.
    pub(super) fn whole(self, min: i64, max: i64) -> Result<i64, SpecError> {
        let expected = format!("a whole number from {min} to {max}");
        let Value::Number(number) = self.value else { return Err(self.wrong_type(&expected)) };
        match number.as_i64() {
            Some(n) if (min..=max).contains(&n) => Ok(n),
            _ => Err(self.out_of_range(&expected)),
        }
    }

    /// Reads a whole number from `min` to `max`, both inside of u32.
    pub(super) fn count(self, min: u32, max: u32) -> Result<u32, SpecError> {
        let n = self.whole(i64::from(min), i64::from(max))?;
        u32::try_from(n).map_err(|_| self.out_of_range("a whole number"))
    }

    /// Reads true or false.
    pub(super) fn flag(self) -> Result<bool, SpecError> {
        self.value.as_bool().ok_or_else(|| self.wrong_type("true or false"))
    }

    /// Reads one of some words.
    pub(super) fn choice<T: Clone>(self, known: &[(&str, T)]) -> Result<T, SpecError> {
        let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
        let Value::String(text) = self.value else {
            return Err(self.wrong_type(&format!("one of {}", words.join(", "))));
        };
        known
            .iter()
            .find(|(word, _)| word == text)
            .map(|(_, meaning)| meaning.clone())
            .ok_or_else(|| self.unknown_value(&words))
    }

    /// Returns the error about a word that is none of `known`.
    pub(super) fn unknown_value(self, known: &[&str]) -> SpecError {
        let nearest = self.value.as_str().and_then(|text| nearest(text, known));
        SpecError::UnknownValue {
            key: self.key.to_owned(),
            found: show(self.value),
            known: known.iter().map(|&word| word.to_owned()).collect(),
            nearest: nearest.map(str::to_owned),
        }
    }
}

/// Refuses characters that one line of text cannot hold.
pub(super) fn check_line(key: &str, text: &str) -> Result<(), SpecError> {
    check_no_nul(key, text)?;
    let what = if text.contains(['\n', '\r']) {
        "a line break"
    } else if text.chars().any(char::is_control) {
        "a control character"
    } else {
        return Ok(());
    };
    Err(SpecError::ForbiddenCharacter { key: key.to_owned(), what })
}

/// Refuses NUL: no argument and no variable of a process can hold it.
pub(super) fn check_no_nul(key: &str, text: &str) -> Result<(), SpecError> {
    if text.contains('\0') {
        return Err(SpecError::ForbiddenCharacter { key: key.to_owned(), what: "a NUL byte" });
    }
    Ok(())
}

/// Returns the word of `known` that is most like `text`, if any is alike.
pub(super) fn nearest<'k>(text: &str, known: &[&'k str]) -> Option<&'k str> {
    // Nobody mistypes a whole novel: long texts are not compared, which also bounds the time.
    if text.len() > 64 {
        return None;
    }
    let text = text.to_lowercase().replace('-', "_");
    known
        .iter()
        .map(|&word| (strsim::jaro_winkler(&text, word), word))
        .filter(|(likeness, _)| *likeness >= ALIKE_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}

/// Returns a value for an error message: short, and without characters that disturb a terminal.
pub(super) fn show(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => clip(&value.to_string()),
        Value::String(text) => format!("\"{}\"", clip(text)),
        Value::Array(items) if items.is_empty() => "an empty list".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// Returns the start of a text, escaped.
pub(super) fn clip(text: &str) -> String {
    const CHARACTERS_MAX: usize = 48;
    let mut shown: String = text.chars().take(CHARACTERS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(CHARACTERS_MAX).is_some() {
        shown.push('…');
    }
    shown
}
