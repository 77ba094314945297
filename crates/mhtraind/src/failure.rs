//! How does a command end, and what does it say when it fails?

use std::borrow::Cow;
use std::fmt;

use serde_json::json;

/// Exit statuses of `mhtraind`, as documented in the README. They are part of the interface.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The thing asked for was done.
    Done = 0,
    /// The thing asked for failed: the job failed, or no plan is possible.
    Failed = 1,
    /// Bad usage or a bad input file; nothing was started.
    BadInput = 2,
    /// No daemon can be reached.
    NoDaemon = 3,
    /// Not permitted.
    NotPermitted = 4,
    /// There is no such job.
    NotFound = 5,
    /// A bug of ours.
    Bug = 70,
    /// `wait --timeout` ran out.
    WaitRanOut = 75,
    /// Ctrl-C.
    Interrupted = 130,
    /// SIGTERM.
    Terminated = 143,
}

/// What went wrong, for people and for scripts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// How the process ends.
    pub status: Status,
    /// A short word for scripts.
    pub code: Cow<'static, str>,
    /// What failed, with the numbers and names that matter.
    pub message: String,
    /// What the reader can do about it.
    pub help: Option<String>,
}

impl Failure {
    /// Returns a failure without help.
    pub fn new(status: Status, code: &'static str, message: impl fmt::Display) -> Failure {
        Failure { status, code: Cow::Borrowed(code), message: message.to_string(), help: None }
    }

    /// Returns a failure caused by bad usage or a bad input file.
    pub fn bad_input(code: &'static str, message: impl fmt::Display) -> Failure {
        Failure::new(Status::BadInput, code, message)
    }

    /// Returns a failure of the thing that was asked for.
    pub fn failed(code: &'static str, message: impl fmt::Display) -> Failure {
        Failure::new(Status::Failed, code, message)
    }

    /// Adds what the reader can do.
    #[must_use]
    pub fn help(mut self, help: impl Into<Option<String>>) -> Failure {
        self.help = help.into();
        self
    }

    /// Returns the failure as the JSON interface shows it.
    pub fn to_json(&self) -> serde_json::Value {
        json!({"error": {"code": self.code, "message": self.message, "help": self.help}})
    }

    /// Returns the failure that an answer of the daemon holds.
    pub fn from_json(value: &serde_json::Value) -> Option<Failure> {
        let error = value.get("error")?;
        let text = |key: &str| error.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
        let status = match error.get("exit_code").and_then(serde_json::Value::as_u64) {
            Some(2) => Status::BadInput,
            Some(4) => Status::NotPermitted,
            Some(5) => Status::NotFound,
            Some(70) => Status::Bug,
            _ => Status::Failed,
        };
        Some(Failure {
            status,
            code: Cow::Owned(text("code")?),
            message: text("message")?,
            help: text("help"),
        })
    }

    /// Returns the failure as people see it: `error: …` and, where there is something to do, `help: …`.
    pub fn for_people(&self) -> String {
        match &self.help {
            Some(help) => {
                format!("error: {}\nhelp:  {}", self.message, help.trim_end().replace('\n', "\n       "))
            }
            None => format!("error: {}", self.message),
        }
    }
}

/// Turns an error of file access into a failure that names the path.
pub fn unreadable(path: &std::path::Path, error: &std::io::Error) -> Failure {
    let help = match error.kind() {
        std::io::ErrorKind::NotFound => "is the path right? A relative one begins at the working directory",
        std::io::ErrorKind::PermissionDenied => "ask its owner for the right to read it",
        std::io::ErrorKind::IsADirectory => "name a file in it",
        _ => "check the file and the disk that it is on",
    };
    Failure::bad_input("unreadable", format!("cannot read {}: {error}", path.display())).help(help.to_owned())
}

/// Turns an error of writing into a failure that names the path.
pub fn unwritable(path: &std::path::Path, error: &std::io::Error) -> Failure {
    let status = match error.kind() {
        std::io::ErrorKind::PermissionDenied => Status::NotPermitted,
        _ => Status::Failed,
    };
    Failure::new(status, "unwritable", format!("cannot write {}: {error}", path.display()))
}

/// The code of a failure of [`own_unwritable`].
const OWN_UNWRITABLE: &str = "own_unwritable";

/// Marks the failure to write a file of the daemon's own: no job is to blame for it.
pub fn own_unwritable(failure: Failure) -> Failure {
    let help = "a job that has not begun waits for it; check space, mode and owner of the state directory";
    Failure { code: Cow::Borrowed(OWN_UNWRITABLE), ..failure }.help(help.to_owned())
}

impl Failure {
    /// Returns whether the daemon could not write a file of its own.
    pub fn is_own_unwritable(&self) -> bool {
        self.code == OWN_UNWRITABLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_of_several_lines_stays_aligned() {
        let failure = Failure::failed("x", "no").help("do this\nor that".to_owned());
        assert_eq!(failure.for_people(), "error: no\nhelp:  do this\n       or that");
    }
}
