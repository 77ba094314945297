//! What is left of a line when colours, prefixes and progress bars are taken off?

use super::pattern::pattern;

/// How loud a logger was, where the line has a logger's prefix.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// No logger: a print, a traceback, a C library.
    Plain,
    /// Debug or info.
    Info,
    /// Warning.
    Warning,
    /// Error or worse.
    Error,
}

/// One line, taken apart.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// As it was printed, without colours.
    pub(super) shown: String,
    /// Without what launchers and loggers put in front of it.
    pub(super) text: String,
    /// The rank that a launcher put in front of it.
    pub(super) rank: Option<u32>,
    /// How loud it is.
    pub(super) level: Level,
    /// Whether a logger's prefix was taken off.
    pub(super) logged: bool,
}

pattern!(
    COLOUR,
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]|[\x00-\x08\x0b\x0c\x0e-\x1a\x7f]"
);
pattern!(BAR_END, r"\d+%\|[^|]{0,300}\|\s*[\d.,kKMGT]+/[\d.,kKMGT?]+\s*\[[^\]\[]{0,200}\]");
pattern!(
    LAUNCHER,
    concat!(
        r"^\s*(?:",
        r"\[rank[ :]?(?P<a>\d+)\]:?\s?|\[default(?P<b>\d+)\]:\s?|\[\d+,(?P<c>\d+)\]<std(?:err|out)>:\s?|",
        r"\[Rank (?P<d>\d+)\]:\s|(?P<e>\d{1,3}): (?P<mark>)|",
        r"\((?:[A-Za-z_][\w.()-]*\s+)*(?:pid|PID|rank|ip)=[^)]*\)\s?|",
        r">+\s+|[│┃║]\s?|\|\s+|!!!\s+(?:Exception during processing !!!\s+)?)"
    )
);
pattern!(
    TIME,
    concat!(
        r"^\s*[-|,]?\s*\[?(?:",
        r"\d{4}[-/]\d\d[-/]\d\d[ T_-]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?|",
        r"\d\d[-/]\d\d(?:[-/]\d{2,4})?\s+\d\d:\d\d:\d\d(?:[.,]\d+)?|",
        r"\d\d:\d\d:\d\d(?:[.,]\d+)?)",
        r"(?:[ ,]+(?P<level>DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL))?\]?(?:\s*[-|,:]\s+|\s+|$)"
    )
);
pattern!(
    LEVEL,
    concat!(
        r"^\s*[-|]?\s*(?:[\w.]+ [-|] )?(?:",
        r"\[(?P<a>DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)(?:[:|][^\]]*)?\]\s*|",
        r"(?P<b>DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)(?::[A-Za-z_][\w.]*:|:\s+|\s+[-|:]\s+|\s+)",
        r")"
    )
);
pattern!(
    GLOG,
    r"^\s*\[?(?P<letter>[IWEF])\s?\d{3,4} \d\d:\d\d:\d\d(?:\.\d+)?\s+(?:\d+ )?(?P<place>[^\s\]]+:\d+)\]\s?"
);
pattern!(NCCL_LOG, r"^\s*\[(?P<letter>[IWE]) [^\]]*?[\w.]+\.(?:cpp|hpp|cc|cu|ts|h):\d+\]\s?");
pattern!(
    PLACE,
    r"^\s*(?:\[?[\w./-]+\.(?:py|cpp|cc|cu|ts|h):\d+(?::[\w<>]+)?\](?::\s?|\s?)|[\w.]+:[\w<>]+:\d+ - |\[[a-z][\w.-]*\]\s|[\w.]+ \| )"
);
pattern!(PYTHON_WARNING, r"^\s*(?:\S+:\d+: )?\w*Warning: |^\s*[Ww]arning\b");

/// Prefixes that are taken off one after the other; a line has rarely more than five.
const PREFIXES: usize = 10;

/// Splits where a progress bar is glued to what follows it without a line end.
pub(super) fn unglued(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut start = 0;
    for bar in BAR_END.find_iter(text) {
        parts.push(&text[start..bar.end()]);
        start = bar.end();
    }
    if start < text.len() {
        parts.push(&text[start..]);
    }
    parts
}

/// One byte in this many that no text has makes a line binary. In noise it is every tenth.
const BINARY_SHARE: usize = 25;

/// Returns whether a line is no text at all: a weight file in place of a log, or what a crash left there. Noise of some
/// megabytes holds every short word somewhere.
///
/// Zero bytes do not count, because UTF-16 has them, nor do bells, erasures and escapes, because terminals have them; nor
/// bytes above 127, because some logs are in an older Chinese encoding.
pub(super) fn is_binary(line: &[u8]) -> bool {
    let odd = |byte: &&u8| matches!(**byte, 0x01..=0x06 | 0x0e..=0x1a | 0x1c..=0x1f | 0x7f);
    let count = line.iter().filter(odd).count();
    count >= 2 && count * BINARY_SHARE >= line.len()
}

/// Takes the colours out.
pub(super) fn without_colours(text: &str) -> String {
    COLOUR.replace_all(text, "").trim_end().to_owned()
}

impl Line {
    /// Takes a line apart that has no colours.
    pub(super) fn of(shown: &str) -> Line {
        let mut line = Line {
            shown: shown.to_owned(),
            text: String::new(),
            rank: None,
            level: Level::Plain,
            logged: false,
        };
        let mut rest = shown;
        for _ in 0..PREFIXES {
            let Some(length) = line.take_prefix(rest) else { break };
            rest = &rest[length..];
        }
        // The right border of a boxed traceback.
        rest = rest.strip_suffix(['│', '┃', '║']).unwrap_or(rest);
        if line.level == Level::Plain && PYTHON_WARNING.is_match(rest) {
            line.level = Level::Warning;
        }
        line.text = rest.trim_end().to_owned();
        line
    }

    /// Notes what the first prefix of `rest` says, and returns its length.
    fn take_prefix(&mut self, rest: &str) -> Option<usize> {
        if let Some(found) = LAUNCHER.captures(rest) {
            // `12: ` is a launcher's rank only in front of something that looks like a message.
            if found.name("mark").is_none()
                || rest[found[0].len()..].starts_with(|c: char| c.is_ascii_alphabetic())
            {
                let rank = ["a", "b", "c", "d", "e"].iter().find_map(|name| found.name(name));
                self.rank = rank.and_then(|rank| rank.as_str().parse().ok()).or(self.rank);
                return Some(found[0].len());
            }
        }
        if let Some(found) = GLOG.captures(rest).or_else(|| NCCL_LOG.captures(rest)) {
            // The place names the library (`ProcessGroupNCCL.cpp`), which the signatures want to see.
            self.note_level(match &found["letter"] {
                "I" => Level::Info,
                "W" => Level::Warning,
                _ => Level::Error,
            });
            return Some(found[0].len());
        }
        if let Some(found) = TIME.captures(rest) {
            self.logged = true;
            if let Some(level) = found.name("level") {
                self.note_level(level_of(level.as_str()));
            }
            return Some(found[0].len());
        }
        if let Some(found) = LEVEL.captures(rest) {
            let level = found.name("a").or_else(|| found.name("b"))?;
            self.note_level(level_of(level.as_str()));
            return Some(found[0].len());
        }
        let place = PLACE.find(rest)?;
        Some(place.len())
    }

    /// The first logger in a line is the outermost; the innermost knows best how bad it is, and the worst counts.
    fn note_level(&mut self, level: Level) {
        self.logged = true;
        let rank = |level| match level {
            Level::Plain => 0,
            Level::Info => 1,
            Level::Warning => 2,
            Level::Error => 3,
        };
        if rank(level) > rank(self.level) {
            self.level = level;
        }
    }
}

fn level_of(word: &str) -> Level {
    match word {
        "DEBUG" | "INFO" => Level::Info,
        "WARNING" | "WARN" => Level::Warning,
        _ => Level::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_launchers_and_loggers_are_taken_off() {
        let cases = [
            ("[rank3]: ValueError: x", "ValueError: x", Some(3), Level::Plain),
            (
                "[rank0]:   File \"a.py\", line 1, in f",
                "  File \"a.py\", line 1, in f",
                Some(0),
                Level::Plain,
            ),
            (
                "(Worker pid=12, ip=10.0.0.1) ERROR 10-14 09:10:22 w.py:233] KeyError: 'a'",
                "KeyError: 'a'",
                None,
                Level::Error,
            ),
            ("[INFO:swift] hello", "hello", None, Level::Info),
            (
                "[2025-01-02 03:04:05,678] [INFO] [launch.py:12:main] [deepspeed] hello",
                "hello",
                None,
                Level::Info,
            ),
            (
                "E0612 21:40:17.911000 7001 torch/api.py:869] failed (exitcode: 1)",
                "failed (exitcode: 1)",
                None,
                Level::Error,
            ),
            ("2022-08-21 01:12:47 | WARNING | a.trainer | OOM: x", "OOM: x", None, Level::Warning),
            ("> RuntimeError: x", "RuntimeError: x", None, Level::Plain),
            (
                "WARNING:torch.distributed.elastic:Sending process 1",
                "Sending process 1",
                None,
                Level::Warning,
            ),
            ("site/a.py:12: UserWarning: x", "site/a.py:12: UserWarning: x", None, Level::Warning),
            ("│ ValueError: x     │", "ValueError: x", None, Level::Plain),
            ("2: ValueError: x", "ValueError: x", Some(2), Level::Plain),
            ("OSError: [Errno 28] No space", "OSError: [Errno 28] No space", None, Level::Plain),
        ];
        for (shown, text, rank, level) in cases {
            let line = Line::of(shown);
            assert_eq!((line.text.as_str(), line.rank, line.level), (text, rank, level), "{shown}");
        }
    }

    #[test]
    fn a_message_glued_to_a_bar_is_a_line_of_its_own() {
        let text = "Epoch 0:   6%|#    | 310/5001 [6:20<95:10,  1.37it/s][E x.cpp:1] boom";
        assert_eq!(unglued(text)[1], "[E x.cpp:1] boom");
        assert_eq!(unglued("no bar").len(), 1);
    }

    #[test]
    fn noise_is_binary_and_text_in_any_encoding_is_not() {
        assert!(is_binary(b"\x01\x9cxid 79\x13 7 \x11"));
        assert!(is_binary(b"\x02\x03"));
        let utf16: Vec<u8> = "CUDA out of memory".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(!is_binary(&utf16));
        assert!(!is_binary(b"OSError: [WinError 1455] \xd2\xb3\xc3\xe6\xce\xc4\xbc\xfe\xcc\xab\xd0\xa1"));
        assert!(!is_binary(b"\x1b[31mTrain:  10%|\xe2\x96\x88\x1b[0m\x07\x08\x08"));
        assert!(!is_binary(b""));
    }

    #[test]
    fn colours_are_taken_out() {
        assert_eq!(without_colours("\u{1b}[31mred\u{1b}[0m \u{1b}]0;title\u{7}x \r"), "red x");
    }
}
