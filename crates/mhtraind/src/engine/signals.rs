//! Who asked us to stop?

use std::fmt;

use mhtrain_job::stop;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::failure::{Failure, Status};

/// What asked for the end of a job.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// Ctrl-C, or SIGINT from elsewhere.
    CtrlC,
    /// SIGTERM: a container, an sbatch script or a service manager ends us.
    Sigterm,
    /// SIGHUP: the terminal was closed.
    Hangup,
    /// The job's own `time_limit`.
    TimeLimit,
    /// `mhtraind cancel`.
    Cancel,
    /// The file that the companion watches appeared.
    StopFile,
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopCause::CtrlC => "Ctrl-C",
            StopCause::Sigterm => "SIGTERM",
            StopCause::Hangup => "SIGHUP (the terminal was closed)",
            StopCause::TimeLimit => stop::TIME_LIMIT,
            StopCause::Cancel => stop::CANCEL,
            StopCause::StopFile => "its stop file",
        })
    }
}

impl StopCause {
    /// Returns the cause that a journal names; whatever it does not know was a cancel.
    pub fn recorded_as(by: &str) -> StopCause {
        let all = [
            StopCause::CtrlC,
            StopCause::Sigterm,
            StopCause::Hangup,
            StopCause::TimeLimit,
            StopCause::StopFile,
        ];
        all.into_iter().find(|cause| cause.to_string() == by).unwrap_or(StopCause::Cancel)
    }

    /// Returns how a foreground run ends that was stopped so.
    pub fn status(self) -> Status {
        match self {
            StopCause::CtrlC | StopCause::StopFile => Status::Interrupted,
            StopCause::Sigterm | StopCause::Hangup => Status::Terminated,
            StopCause::TimeLimit | StopCause::Cancel => Status::Failed,
        }
    }
}

/// Who may stop a job: the signals of a foreground run, or the daemon's requests.
#[derive(Debug)]
pub enum StopSignals {
    /// Signals to this process.
    Signals {
        /// SIGINT.
        interrupt: Signal,
        /// SIGTERM.
        terminate: Signal,
        /// SIGHUP.
        hangup: Signal,
    },
    /// Requests of the daemon.
    Requests(mpsc::UnboundedReceiver<StopCause>),
}

impl StopSignals {
    /// Listens from now on. Must be called inside a runtime.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn listen() -> Result<StopSignals, Failure> {
        let open = |kind| signal(kind).map_err(|e| Failure::new(Status::Bug, "no_signals", e));
        Ok(StopSignals::Signals {
            interrupt: open(SignalKind::interrupt())?,
            terminate: open(SignalKind::terminate())?,
            hangup: open(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one. Safe to drop and call again: no signal is lost.
    pub async fn next(&mut self) -> StopCause {
        match self {
            StopSignals::Signals { interrupt, terminate, hangup } => tokio::select! {
                _ = interrupt.recv() => StopCause::CtrlC,
                _ = terminate.recv() => StopCause::Sigterm,
                _ = hangup.recv() => StopCause::Hangup,
            },
            StopSignals::Requests(requests) => match requests.recv().await {
                Some(cause) => cause,
                // Nobody is left who could ask.
                None => std::future::pending().await,
            },
        }
    }
}
