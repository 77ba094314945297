//! At which points of its work can a test kill a process?
//!
//! A point is a call of [`reach`] before or after a step that must not be done by halves. In a release build it is nothing.
//! In a debug build it is nothing either, unless [`DIRECTORY_VARIABLE`] names a directory of the test's own:
//!
//! ```text
//! trace     every point that was reached, one a line, in order, whatever process reached it
//! kill      "POINT N": whoever reaches this point as the Nth, counted over all processes, is killed as by kill -9;
//!           perhaps a second line "+M": and whoever reaches the Mth point after that, whichever it is
//! killed    who was: a line "PID LINE" for each, with the line of the trace
//! ```
//!
//! A point of the trace is `ROLE:POINT/WHAT`, where the role is the first word of the process's command line: the same code runs
//! in a daemon and in its recorders.

/// Names the directory of a test. A recorder that is started with an environment of its own gets it as well.
pub const DIRECTORY_VARIABLE: &str = "MHTRAIND_FAILPOINTS";

/// Says that the process is at a point of its work, about to do `what` or just done with it.
#[inline]
pub fn reach(point: &str, what: &str) {
    #[cfg(debug_assertions)]
    debug::reach(point, what);
    #[cfg(not(debug_assertions))]
    let _ = (point, what);
}

/// Returns the directory, for the environment of a process that does not inherit ours.
#[must_use]
pub fn directory() -> Option<std::ffi::OsString> {
    #[cfg(debug_assertions)]
    return std::env::var_os(DIRECTORY_VARIABLE);
    #[cfg(not(debug_assertions))]
    None
}

#[cfg(debug_assertions)]
mod debug {
    use std::fs::{self, File};
    use std::io::{self, Write};
    use std::path::Path;

    use rustix::fs::{FlockOperation, flock};
    use rustix::process::{Signal, getpid, kill_process};

    pub(super) fn reach(point: &str, what: &str) {
        let Some(directory) = super::directory() else { return };
        let role = std::env::args().nth(1).unwrap_or_default();
        let line = if what.is_empty() { format!("{role}:{point}") } else { format!("{role}:{point}/{what}") };
        // A test that cannot be told of a point misses it, and fails by that.
        if note(Path::new(&directory), &line).is_ok_and(|is_the_one| is_the_one) {
            let _sent = kill_process(getpid(), Signal::KILL);
            // Other threads may be between the signal and their end; this one does no more.
            loop {
                std::thread::park();
            }
        }
    }

    /// Notes a point. Returns whether it is one at which its process is to be killed.
    fn note(directory: &Path, line: &str) -> io::Result<bool> {
        let mut trace = File::options().append(true).open(directory.join("trace"))?;
        // One at a time, so that the count is exact.
        flock(&trace, FlockOperation::LockExclusive)?;
        writeln!(trace, "{line}")?;
        let wanted = fs::read_to_string(directory.join("kill")).unwrap_or_default();
        let killed = fs::read_to_string(directory.join("killed")).unwrap_or_default();
        let text = fs::read_to_string(directory.join("trace"))?;
        let at = text.lines().count();
        let is_the_one = match (wanted.lines().nth(killed.lines().count()), killed.lines().last()) {
            (Some(wanted), None) => wanted.rsplit_once(' ').is_some_and(|(point, nth)| {
                let count = text.lines().filter(|reached| *reached == line).count();
                point == line && count.to_string() == nth
            }),
            (Some(wanted), Some(last)) => {
                let before = last.rsplit(' ').next().and_then(|line| line.parse::<usize>().ok());
                before.is_some_and(|before| wanted == format!("+{}", at - before))
            }
            (None, _) => false,
        };
        if is_the_one {
            let mut killed = File::options().append(true).create(true).open(directory.join("killed"))?;
            writeln!(killed, "{} {at}", std::process::id())?;
        }
        Ok(is_the_one)
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::path::Path;

    use super::*;

    const THIS: &str = "tests::a_process_is_killed_at_the_point_that_was_asked_for";

    /// Runs this very test in a process of its own, which reaches a point three times. Returns the signal that ended it.
    fn reach_three(dir: &Path) -> Option<i32> {
        let mut command = std::process::Command::new(std::env::current_exe().expect("Linux"));
        command.args([THIS, "--exact"]).env(DIRECTORY_VARIABLE, dir);
        command.output().expect("it starts").status.signal()
    }

    #[test]
    fn a_process_is_killed_at_the_point_that_was_asked_for() {
        if directory().is_some() {
            (0..3).for_each(|_| reach("commit", "submitted"));
            return;
        }
        let line = format!("{THIS}:commit/submitted");
        let dir = tempfile::tempdir().unwrap();
        let reached = || std::fs::read_to_string(dir.path().join("trace")).unwrap();
        std::fs::write(dir.path().join("trace"), "").unwrap();
        assert_eq!(reach_three(dir.path()), None);
        assert_eq!(reached(), format!("{line}\n").repeat(3));

        std::fs::write(dir.path().join("kill"), format!("{line} 5\n+2\n")).unwrap();
        assert_eq!(reach_three(dir.path()), Some(9));
        assert_eq!(reached().lines().count(), 5);
        assert_eq!(reach_three(dir.path()), Some(9), "the second kill");
        assert_eq!(reached().lines().count(), 7);
        assert_eq!(reach_three(dir.path()), None, "there is no third");
    }
}
