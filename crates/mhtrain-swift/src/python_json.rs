//! How is JSON read that Python wrote?
//!
//! Python's `json` writes the floats that JSON lacks as bare words: `NaN`, `Infinity`, `-Infinity`. A loss that
//! diverged ends up so in `logging.jsonl` and in `trainer_state.json`.

use serde_json::Value;

/// Reads one value. The three bare words become strings of the same spelling; [`number`] reads them back.
pub fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|_| serde_json::from_str(&quoted_words(text)))
}

/// Returns the number that a value stands for: a number, a bare word, or a number printed as text (the stdout of
/// ms-swift 4.x).
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// Puts quotes around the three words wherever they stand outside a string.
fn quoted_words(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut in_string = false;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if in_string {
            // An escaped character never ends the string.
            let step = if c == '\\' { rest.chars().take(2).map(char::len_utf8).sum() } else { c.len_utf8() };
            in_string = c != '"';
            out.push_str(&rest[..step]);
            rest = &rest[step..];
            continue;
        }
        if let Some(word) = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| rest.starts_with(word)) {
            out.push('"');
            out.push_str(word);
            out.push('"');
            rest = &rest[word.len()..];
            continue;
        }
        in_string = c == '"';
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_words_of_python_are_numbers_again() {
        let value = parse(r#"{"a": NaN, "b": [-Infinity, Infinity], "c": 1.5, "d": "2.5"}"#).unwrap();
        assert!(number(&value["a"]).unwrap().is_nan());
        assert_eq!(number(&value["b"][0]), Some(f64::NEG_INFINITY));
        assert_eq!(number(&value["b"][1]), Some(f64::INFINITY));
        assert_eq!(number(&value["c"]), Some(1.5));
        assert_eq!(number(&value["d"]), Some(2.5));
    }

    #[test]
    fn words_inside_strings_stay() {
        let value = parse(r#"{"x": NaN, "note": "NaN \" NaN \\", "NaN": -Infinity}"#).unwrap();
        assert_eq!(value, json!({"x": "NaN", "note": "NaN \" NaN \\", "NaN": "-Infinity"}));
    }

    #[test]
    fn broken_text_is_an_error() {
        for text in ["", "{", "NaNNaN", "{\"a\": \"", "\"\\", "nan"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn valid_json_is_read_as_it_is(text in r#"[ -~]{0,40}"#, number in proptest::num::i64::ANY) {
            let value = json!({"text": text, "number": number});
            proptest::prop_assert_eq!(parse(&value.to_string()).unwrap(), value);
        }
    }
}
