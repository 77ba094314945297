//! How do programs run so that a cancelled install leaves none of them behind?
//!
//! Each is started in a process group of its own, with its output in a pipe that we read. Cancelling ends the groups.
//! When this process is killed outright, the kernel ends its direct children for us.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// How often a silent child is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a group may take to leave after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);
/// How long output may still come after a child has left, held open by something that it started.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// Lines of output kept for an error message.
const LINES_KEPT: usize = 12;

/// Why running did not end well.
#[derive(Debug)]
pub enum RunError {
    /// The program could not be started or watched.
    Io(io::Error),
    /// It ended with a status other than 0.
    Failed { status: ExitStatus, last_lines: Vec<String> },
    /// The cancel flag was set. Everything that was started is gone.
    Cancelled,
}

/// What a running child has to say.
#[derive(Debug)]
pub enum News<'a> {
    /// A line of its standard output or standard error; the index tells which of the children.
    Line(usize, &'a str),
    /// Nothing new.
    Tick,
}

/// Runs one program to its end and returns its lines, at most [`LINES_KEPT`].
pub fn run(
    command: Command,
    cancel: &AtomicBool,
    news: &mut dyn FnMut(News<'_>),
) -> Result<Vec<String>, RunError> {
    run_all(vec![command], cancel, news)
}

/// Runs programs side by side until all have ended with status 0. The first failure ends the others.
pub fn run_all(
    commands: Vec<Command>,
    cancel: &AtomicBool,
    news: &mut dyn FnMut(News<'_>),
) -> Result<Vec<String>, RunError> {
    let mut groups = Groups::default();
    let lines = groups.start_all(commands).map_err(RunError::Io)?;
    groups.wait(&lines, cancel, news)
}

/// The running children. Dropping it ends every group that is left.
#[derive(Debug, Default)]
struct Groups {
    running: Vec<Child>,
}

impl Groups {
    fn start_all(&mut self, commands: Vec<Command>) -> io::Result<Receiver<(usize, String)>> {
        let (sender, receiver) = mpsc::channel();
        for (index, mut command) in commands.into_iter().enumerate() {
            let (reader, writer) = io::pipe()?;
            command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
            die_with_this_thread(&mut command);
            self.running.push(command.spawn()?);
            // The command holds the pipe's writing ends: without this the reader would never see the end.
            drop(command);
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(reader);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    line.clear();
                    if sender.send((index, text)).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(receiver)
    }

    fn wait(
        &mut self,
        lines: &Receiver<(usize, String)>,
        cancel: &AtomicBool,
        news: &mut dyn FnMut(News<'_>),
    ) -> Result<Vec<String>, RunError> {
        let mut kept = VecDeque::new();
        let mut all_left_at = None;
        loop {
            if cancel.load(Ordering::Relaxed) {
                return Err(RunError::Cancelled);
            }
            let output_ended = match lines.recv_timeout(TICK) {
                Ok((index, line)) => {
                    news(News::Line(index, &line));
                    kept.push_back(line);
                    kept.drain(..kept.len().saturating_sub(LINES_KEPT));
                    false
                }
                Err(RecvTimeoutError::Timeout) => {
                    news(News::Tick);
                    false
                }
                Err(RecvTimeoutError::Disconnected) => {
                    std::thread::sleep(TICK / 10);
                    true
                }
            };
            if let Some(status) = self.reap().map_err(RunError::Io)? {
                kept.extend(
                    lines.recv_timeout(TICK).into_iter().chain(lines.try_iter()).map(|(_, line)| line),
                );
                kept.drain(..kept.len().saturating_sub(LINES_KEPT));
                return Err(RunError::Failed { status, last_lines: kept.into() });
            }
            if self.running.is_empty() {
                let left_at = *all_left_at.get_or_insert_with(Instant::now);
                if output_ended || left_at.elapsed() > LAST_OUTPUT {
                    return Ok(kept.into());
                }
            }
        }
    }

    /// Forgets the children that have ended well, and returns the status of one that has not. What a child leaves in
    /// its group goes with it; it is reaped after that, because until then the group's id is not reused.
    fn reap(&mut self) -> io::Result<Option<ExitStatus>> {
        let mut failed = Ok(None);
        self.running.retain_mut(|child| {
            let pid = Pid::from_child(child);
            if !has_ended(pid) {
                return true;
            }
            signal_all(&[pid], Signal::KILL);
            match child.wait() {
                Ok(status) if status.success() => {}
                Ok(status) => failed = Ok(Some(status)),
                Err(error) => failed = Err(error),
            }
            false
        });
        failed
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        let groups: Vec<Pid> = self.running.iter().map(Pid::from_child).collect();
        signal_all(&groups, Signal::TERM);
        let asked = Instant::now();
        // The leaders are looked at without being reaped: until then their ids, and so the groups', are not reused.
        while asked.elapsed() < GRACE && !groups.iter().all(|pid| has_ended(*pid)) {
            std::thread::sleep(TICK / 10);
        }
        signal_all(&groups, Signal::KILL);
        for child in &mut self.running {
            let _ = child.wait();
        }
    }
}

fn signal_all(groups: &[Pid], signal: Signal) {
    for group in groups {
        let _ = rustix::process::kill_process_group(*group, signal);
    }
}

fn has_ended(pid: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(rustix::process::waitid(WaitId::Pid(pid), options), Ok(None))
}

/// Asks the kernel to end the child when the thread that starts it is gone: that thread waits for it in [`run_all`].
fn die_with_this_thread(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        // The parent may have died before the line above; then nobody would ever send the signal.
        if rustix::process::getppid() != Some(parent) {
            return Err(rustix::io::Errno::SRCH.into());
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed. It makes two
    // system calls (prctl, getppid) and allocates nothing: its errors are bare error numbers.
    unsafe { command.pre_exec(prepare) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_of_both_streams_arrive_and_success_is_told_from_failure() {
        let never = AtomicBool::new(false);
        let mut seen = Vec::new();
        let kept = run(shell("echo one; echo two >&2"), &never, &mut |news| {
            if let News::Line(_, line) = news {
                seen.push(line.to_owned());
            }
        })
        .unwrap();
        assert_eq!(seen, ["one", "two"]);
        assert_eq!(kept, seen);
        let failed = run(shell("echo reason; exit 3"), &never, &mut |_| {});
        let Err(RunError::Failed { status, last_lines }) = failed else { panic!("{failed:?}") };
        assert_eq!(status.code(), Some(3));
        assert_eq!(last_lines, ["reason"]);
    }

    #[test]
    fn cancelling_ends_the_whole_group_even_one_that_ignores_sigterm() {
        let cancel = AtomicBool::new(false);
        let mut grandchild = None;
        let result = run(shell("trap '' TERM; sleep 60 & echo $!; wait; sleep 60"), &cancel, &mut |news| {
            if let News::Line(_, line) = news {
                grandchild = line.parse::<i32>().ok();
                cancel.store(true, Ordering::Relaxed);
            }
        });
        assert!(matches!(result, Err(RunError::Cancelled)), "{result:?}");
        let pid = Pid::from_raw(grandchild.expect("the shell printed it")).unwrap();
        // Its new parent reaps it; an unreaped one is a zombie and does nothing.
        let gone = (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
            status.map_or(true, |text| text.contains(") Z "))
        });
        assert!(gone, "process {pid:?} is still there");
    }

    #[test]
    fn one_failure_ends_the_others() {
        let never = AtomicBool::new(false);
        let started = Instant::now();
        let result = run_all(vec![shell("sleep 60"), shell("exit 9")], &never, &mut |_| {});
        assert!(matches!(result, Err(RunError::Failed { .. })), "{result:?}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
