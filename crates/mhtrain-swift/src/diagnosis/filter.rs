//! Which of many patterns match a line, without trying each?
//!
//! One automaton for all wordings would be the plain answer, but gaps like `.{0,80}` multiply its states: on English
//! sentences it spent all its time on building states (0.2 MB/s). So each alternative of each pattern is first asked
//! for letters that every match of it must hold, as RE2's `FilteredRE2` does; one pass over the line finds those
//! letters, and only the alternatives whose letters are there are tried. Most lines hold none.

use std::sync::OnceLock;

use aho_corasick::AhoCorasick;
use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Hir, HirKind};

/// A set of patterns that ignore the case of ASCII letters.
#[derive(Debug)]
pub(super) struct Filter {
    letters: AhoCorasick,
    /// For each of the texts of `letters`: the alternatives that need it.
    needed_by: Vec<Vec<usize>>,
    /// Alternatives of all patterns, in the order of the patterns.
    alternatives: Vec<Alternative>,
    /// Alternatives that need no letters.
    always: Vec<usize>,
}

/// One alternative of a pattern.
#[derive(Debug)]
struct Alternative {
    /// Which pattern it belongs to.
    pattern: usize,
    source: String,
    regex: OnceLock<Regex>,
}

/// More texts than this say little about an alternative.
const TEXTS_MAX: usize = 48;

impl Filter {
    /// Returns the set of these patterns; they are written in lower case and know ASCII only.
    ///
    /// # Panics
    /// A pattern is malformed; they are written in this module's files.
    pub(super) fn new<'a>(patterns: impl Iterator<Item = &'a str>) -> Filter {
        let mut alternatives = Vec::new();
        let mut always = Vec::new();
        let mut texts: Vec<Vec<u8>> = Vec::new();
        let mut needed_by: Vec<Vec<usize>> = Vec::new();
        for (pattern, source) in patterns.enumerate() {
            let parsed = ParserBuilder::new().unicode(false).utf8(false).build().parse(source);
            let hir = parsed.expect("the patterns of this module are well-formed");
            let branches = match hir.kind() {
                HirKind::Alternation(branches) => branches.clone(),
                _ => vec![hir],
            };
            for branch in branches {
                let number = alternatives.len();
                alternatives.push(Alternative {
                    pattern,
                    source: branch.to_string(),
                    regex: OnceLock::new(),
                });
                let Some(needed) = needed_texts(&branch) else {
                    always.push(number);
                    continue;
                };
                for text in needed {
                    match texts.iter().position(|known| *known == text) {
                        Some(at) => needed_by[at].push(number),
                        None => {
                            texts.push(text);
                            needed_by.push(vec![number]);
                        }
                    }
                }
            }
        }
        let letters = AhoCorasick::builder().ascii_case_insensitive(true).build(&texts);
        let letters = letters.expect("a few thousand letters fit in an automaton");
        Filter { letters, needed_by, alternatives, always }
    }

    /// Returns the numbers of the patterns that match, in their order.
    pub(super) fn matches(&self, text: &str) -> Vec<usize> {
        let mut matching: Vec<usize> = Vec::new();
        for alternative in self.candidates(text) {
            if matching.last() != Some(&alternative.pattern) && alternative.regex().is_match(text.as_bytes())
            {
                matching.push(alternative.pattern);
            }
        }
        matching
    }

    /// Returns the alternatives that have to be tried on a line, in the order of their patterns.
    fn candidates(&self, text: &str) -> impl Iterator<Item = &Alternative> {
        let mut numbers = self.always.clone();
        for found in self.letters.find_overlapping_iter(text) {
            numbers.extend(&self.needed_by[found.pattern().as_usize()]);
        }
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().map(|number| &self.alternatives[number])
    }

    /// Returns how many alternatives are tried on a line, and how many there are. For tests: the speed hangs on it.
    #[cfg(test)]
    pub(super) fn tried(&self, text: &str) -> (usize, usize) {
        (self.candidates(text).count(), self.alternatives.len())
    }
}

impl Alternative {
    /// Compiled when it is first needed: most never are.
    fn regex(&self) -> &Regex {
        self.regex.get_or_init(|| {
            RegexBuilder::new(&self.source)
                .case_insensitive(true)
                .unicode(false)
                .build()
                .expect("a part of a well-formed pattern is well-formed")
        })
    }
}

/// Returns texts of which every match holds at least one; `None` when there are none.
fn needed_texts(hir: &Hir) -> Option<Vec<Vec<u8>>> {
    let texts = match hir.kind() {
        HirKind::Literal(literal) => vec![literal.0.to_vec()],
        HirKind::Capture(capture) => needed_texts(&capture.sub)?,
        HirKind::Repetition(repetition) if repetition.min > 0 => needed_texts(&repetition.sub)?,
        HirKind::Concat(parts) => {
            // The part that says most: its shortest text is the longest.
            let say_most = |texts: &Vec<Vec<u8>>| (shortest(texts), std::cmp::Reverse(texts.len()));
            parts.iter().filter_map(needed_texts).max_by_key(say_most)?
        }
        HirKind::Alternation(branches) => {
            let each: Option<Vec<Vec<Vec<u8>>>> = branches.iter().map(needed_texts).collect();
            each?.into_iter().flatten().collect()
        }
        HirKind::Empty | HirKind::Class(_) | HirKind::Look(_) | HirKind::Repetition(_) => return None,
    };
    (texts.len() <= TEXTS_MAX).then_some(texts)
}

fn shortest(texts: &[Vec<u8>]) -> usize {
    texts.iter().map(Vec::len).min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERNS: [&str; 6] = [
        r"out of (?:device )?memory",
        r"\bxid\b.{0,10}\d+|fallen off",
        r"^(?:\w+\.)*(?:key|value)error\b",
        r"[a-c]+\d",
        r"(?:one|two).{0,5}three",
        r"x{2,}y",
    ];

    #[test]
    fn the_filter_finds_what_each_pattern_alone_finds() {
        let filter = Filter::new(PATTERNS.into_iter());
        for text in [
            "",
            "CUDA OUT OF MEMORY",
            "out of device memory, Xid: 79",
            "xid79",
            "GPU has fallen off the bus",
            "a.b.KeyError: 'x'",
            "monkeyerror",
            "abc1",
            "twothree and onetwothree",
            "xxxxY",
            "xy",
            "\u{fffd}out of memory\u{fffd}",
        ] {
            let alone: Vec<usize> = (0..PATTERNS.len())
                .filter(|&at| {
                    RegexBuilder::new(PATTERNS[at])
                        .case_insensitive(true)
                        .unicode(false)
                        .build()
                        .unwrap()
                        .is_match(text.as_bytes())
                })
                .collect();
            assert_eq!(filter.matches(text), alone, "{text}");
        }
    }

    #[test]
    fn letters_that_a_match_needs() {
        let needed = |pattern: &str| {
            let hir = ParserBuilder::new().unicode(false).utf8(false).build().parse(pattern).unwrap();
            needed_texts(&hir).map(|texts| {
                texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect::<Vec<_>>()
            })
        };
        assert_eq!(needed(r"out of (?:device )?memory"), Some(vec!["out of ".to_owned()]));
        assert_eq!(needed(r"(?:key|value)error"), Some(vec!["error".to_owned()]));
        assert_eq!(needed(r"(?:one|two)\d"), Some(vec!["one".to_owned(), "two".to_owned()]));
        assert_eq!(needed(r"[a-c]+\d?"), None);
        assert_eq!(needed(r"(?:ab)*"), None);
    }
}
