//! How does text reach the terminal?
//!
//! The one place that prints. A reader that went away (`| head`) ends us quietly, as it ends other tools.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use crate::failure::{Failure, Status, unreadable};

/// Writes a line to standard output.
///
/// # Errors
/// Standard output cannot be written, for example because the disk behind it is full. A closed pipe is no error.
pub fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    written(writeln!(io::stdout().lock(), "{text}"))
}

/// Writes a value as JSON: indented for a terminal, on one line for a program.
pub fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = if io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    line(text.map_err(|e| Failure::new(Status::Bug, "not_json", e))?)
}

/// Writes a value as JSON on one line, wherever it goes.
pub fn json_line(value: &impl serde::Serialize) -> Result<(), Failure> {
    line(serde_json::to_string(value).map_err(|e| Failure::new(Status::Bug, "not_json", e))?)
}

/// Writes a line to standard error; nothing can be done when that fails.
pub fn note(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Says what failed on standard error, as the caller reads it.
pub fn failure(failure: &Failure, as_json: bool) {
    if as_json {
        note(failure.to_json());
    } else {
        note(failure.for_people());
    }
}

fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::failed("unwritable", format!("cannot write to standard output: {e}")))
        }
        _ => Ok(()),
    }
}

/// Largest input file that is read, in bytes. A job file or shell block is a few KiB.
pub const INPUT_BYTES_MAX: u64 = 10 << 20;

/// Reads a small input file, or standard input for `-`.
///
/// # Errors
/// It cannot be read, or is larger than [`INPUT_BYTES_MAX`].
pub fn read_input(path: &Path) -> Result<Vec<u8>, Failure> {
    use io::Read;
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        io::stdin().lock().take(INPUT_BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(INPUT_BYTES_MAX + 1).read_to_end(&mut bytes))
    };
    read.map_err(|e| unreadable(path, &e))?;
    if bytes.len() as u64 > INPUT_BYTES_MAX {
        return Err(Failure::bad_input(
            "too_large",
            format!("{} is larger than {} MiB", path.display(), INPUT_BYTES_MAX >> 20),
        )
        .help("is it the right file?".to_owned()));
    }
    Ok(bytes)
}

/// Opens a file, or standard input for `-`, to be read line by line however long it is.
///
/// # Errors
/// It cannot be opened.
pub fn open_lines(path: &Path) -> Result<Box<dyn io::BufRead>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = std::fs::File::open(path).map_err(|e| unreadable(path, &e))?;
    Ok(Box::new(io::BufReader::new(file)))
}

/// Reads a small text file, or standard input for `-`.
///
/// # Errors
/// As [`read_input`]; or it is no UTF-8.
pub fn read_text(path: &Path) -> Result<String, Failure> {
    String::from_utf8(read_input(path)?).map_err(|e| {
        Failure::bad_input(
            "not_utf8",
            format!("{} is no UTF-8 text (byte {})", path.display(), e.utf8_error().valid_up_to()),
        )
        .help("save the file as UTF-8".to_owned())
    })
}
