//! How are the patterns of this module compiled?

use regex::Regex;

/// Returns a pattern whose `\b`, `\w`, `\d` and `\s` mean ASCII.
///
/// What is looked for is ASCII in every log, and the crate answers a Unicode `\b` on a line that has any other
/// letter only with its slowest engine: a log with Chinese rows took 40 times as long.
///
/// # Panics
/// The pattern is malformed; patterns are written in this module's files.
pub(super) fn ascii(pattern: &str) -> Regex {
    const CLASSES: [(&str, &str); 5] = [
        (r"\b", r"(?-u:\b)"),
        (r"\w", "[0-9A-Za-z_]"),
        (r"\d", "[0-9]"),
        (r"\s", r"[\t\n\x0b\x0c\r ]"),
        (r"\S", r"[^\t\n\x0b\x0c\r ]"),
    ];
    let written = CLASSES.iter().fold(pattern.to_owned(), |text, (class, ascii)| text.replace(class, ascii));
    Regex::new(&written).expect("the patterns of this module are well-formed")
}

/// Defines a pattern that is compiled when it is first used.
macro_rules! pattern {
    ($name:ident, $pattern:expr) => {
        static $name: std::sync::LazyLock<regex::Regex> =
            std::sync::LazyLock::new(|| crate::diagnosis::pattern::ascii($pattern));
    };
}
pub(super) use pattern;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_ascii_inside_and_outside_of_brackets() {
        let name = ascii(r"^[\w.-]+\b: \d+\s\S+$");
        assert!(name.is_match("a_b.c-d: 12 x"));
        assert!(!name.is_match("é: 12 x"));
        assert!(!name.is_match("a: ٣ x"));
        assert!(ascii(r"^\S+$").is_match("数据"));
    }
}
