//! In which state is a job?
//!
//! ```text
//! Submitted
//!     |
//!     v            Waiting            AttemptStarting
//!  queued ------------------> waiting ----------------+
//!     |                        |  ^                   |
//!     | AttemptStarting        |  | Waiting           v
//!     +------------------------|--|--------------> starting --- Started ---> running
//!                              |  |                   |                        |
//!                              |  |                   | AttemptEnded           | AttemptEnded
//!                              |  |                   v                        |
//!                              |  +------------- recovering <------------------+
//!                              |                      |
//!                              |                      +-- RerunDecided --> recovering
//!                              |                      +-- AttemptStarting --> starting
//!                              |                      +-- Succeeded --> succeeded
//!                              v                      v
//!    from every state without a live trainer:   Failed --> failed,  Cancelled --> cancelled
//! ```
//!
//! `Planned` is accepted wherever no trainer lives, and changes no state. `StopRequested` is accepted in every
//! state that is not final; it only marks the state, and after it no attempt starts. `failed` and `cancelled`
//! are reached only when no trainer lives: first the attempt ends, then the job does. Final states accept
//! nothing.

use mhtrain_sizing::tier::Tier;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnosis::Kind;
use crate::event::{AttemptStart, JobEvent, ProcessIdentity};

/// The state of a job. Each variant holds what is true in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum JobState {
    /// Accepted, and nothing was tried yet.
    Queued {
        /// Whether it is to stop, and who asked.
        stop: Option<String>,
    },
    /// Cannot start now.
    Waiting {
        /// What it waits for.
        reason: String,
        /// Attempts that ended before.
        attempts: u32,
        /// Whether it is to stop, and who asked.
        stop: Option<String>,
    },
    /// A trainer may have been started, or not yet.
    Starting {
        /// The attempt.
        attempt: LiveAttempt,
        /// Whether it is to stop, and who asked.
        stop: Option<String>,
    },
    /// A trainer runs.
    Running {
        /// The attempt.
        attempt: LiveAttempt,
        /// The trainer.
        process: ProcessIdentity,
        /// Whether it is to stop, and who asked.
        stop: Option<String>,
    },
    /// An attempt ended, and it is being judged or another one prepared.
    Recovering {
        /// Attempts that ended, the last one included.
        attempts: u32,
        /// Why the last one ended.
        after: Kind,
        /// Why there will be another one; `None` while that is not decided.
        rerun: Option<String>,
        /// Whether it is to stop, and who asked.
        stop: Option<String>,
    },
    /// Done and proven.
    Succeeded {
        /// Attempts it took.
        attempts: u32,
        /// What proves it.
        proof: Value,
    },
    /// Over without success.
    Failed {
        /// Attempts that were made.
        attempts: u32,
        /// Why.
        reason: String,
        /// What to do.
        help: Option<String>,
    },
    /// Stopped because somebody asked.
    Cancelled {
        /// Attempts that were made.
        attempts: u32,
        /// Who or what asked.
        reason: String,
    },
}

/// The attempt that a live trainer belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LiveAttempt {
    /// Number of the attempt; the first is 1.
    pub number: u32,
    /// Index of its rung.
    pub rung: usize,
    /// Its rung.
    pub tier: Tier,
}

/// An event that cannot happen in the state that the job is in: a bug of ours, or a damaged journal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IllegalEvent {
    /// The state does not accept the event.
    #[error("a job that is {state} cannot take the event {event}")]
    NotAccepted {
        /// Name of the state.
        state: &'static str,
        /// Name of the event.
        event: &'static str,
    },
    /// The event is about another attempt.
    #[error("the event {event} is about attempt {found}, expected is attempt {expected}")]
    WrongAttempt {
        /// Name of the event.
        event: &'static str,
        /// The attempt it names.
        found: u32,
        /// The attempt it must name.
        expected: u32,
    },
    /// An attempt would start although the job is to stop.
    #[error("attempt {attempt} cannot start: the job is to stop")]
    StopsAlready {
        /// The attempt.
        attempt: u32,
    },
    /// There is no event, or the first one is not `submitted`.
    #[error("a job begins with the event submitted, not with {found}")]
    NoBeginning {
        /// Name of the first event.
        found: &'static str,
    },
}

impl JobState {
    /// Returns the state of a job whose first event is `event`.
    ///
    /// # Errors
    /// Any other event than `Submitted`.
    pub fn begin(event: &JobEvent) -> Result<JobState, IllegalEvent> {
        match event {
            JobEvent::Submitted { .. } => Ok(JobState::Queued { stop: None }),
            JobEvent::Planned { .. }
            | JobEvent::Waiting { .. }
            | JobEvent::AttemptStarting(_)
            | JobEvent::Started { .. }
            | JobEvent::AttemptEnded { .. }
            | JobEvent::RerunDecided(_)
            | JobEvent::Warned { .. }
            | JobEvent::StopRequested { .. }
            | JobEvent::Succeeded { .. }
            | JobEvent::Failed { .. }
            | JobEvent::Cancelled { .. } => Err(IllegalEvent::NoBeginning { found: event.name() }),
        }
    }

    /// Returns the state after all `events`.
    ///
    /// # Errors
    /// The first event that cannot follow on those before it.
    pub fn fold<'a>(events: impl IntoIterator<Item = &'a JobEvent>) -> Result<JobState, IllegalEvent> {
        let mut events = events.into_iter();
        let first = events.next().ok_or(IllegalEvent::NoBeginning { found: "nothing" })?;
        events.try_fold(JobState::begin(first)?, |state, event| state.next(event))
    }

    /// Returns the state after `event`. Nothing else changes a job's state.
    ///
    /// # Errors
    /// An event that cannot happen in this state.
    pub fn next(&self, event: &JobEvent) -> Result<JobState, IllegalEvent> {
        use JobEvent as E;
        use JobState as S;
        match (self, event) {
            (S::Succeeded { .. } | S::Failed { .. } | S::Cancelled { .. }, _) => Err(self.refuses(event)),

            (_, E::StopRequested { by }) => Ok(self.to_stop(by)),
            (_, E::Warned { .. }) => Ok(self.clone()),
            (S::Queued { .. } | S::Waiting { .. } | S::Recovering { .. }, E::Planned { .. }) => {
                Ok(self.clone())
            }
            (
                S::Queued { stop } | S::Waiting { stop, .. } | S::Recovering { stop, .. },
                E::Waiting { reason },
            ) => Ok(S::Waiting { reason: reason.clone(), attempts: self.attempts(), stop: stop.clone() }),
            (
                S::Queued { stop } | S::Waiting { stop, .. } | S::Recovering { stop, .. },
                E::AttemptStarting(start),
            ) => self.starting(start, stop.as_ref()),

            (S::Starting { attempt, stop }, E::Started { attempt: number, process }) => {
                same_attempt(event, *number, attempt.number)?;
                Ok(S::Running { attempt: attempt.clone(), process: process.clone(), stop: stop.clone() })
            }
            (
                S::Starting { attempt, stop } | S::Running { attempt, stop, .. },
                E::AttemptEnded { attempt: number, diagnosis, .. },
            ) => {
                same_attempt(event, *number, attempt.number)?;
                Ok(S::Recovering {
                    attempts: attempt.number,
                    after: diagnosis.kind,
                    rerun: None,
                    stop: stop.clone(),
                })
            }

            (S::Recovering { attempts, after, stop, .. }, E::RerunDecided(rerun)) => Ok(S::Recovering {
                attempts: *attempts,
                after: *after,
                rerun: Some(rerun.reason.clone()),
                stop: stop.clone(),
            }),
            (S::Recovering { attempts, .. }, E::Succeeded { proof }) => {
                Ok(S::Succeeded { attempts: *attempts, proof: proof.clone() })
            }
            (S::Queued { .. } | S::Waiting { .. } | S::Recovering { .. }, E::Failed { reason, help }) => {
                Ok(S::Failed { attempts: self.attempts(), reason: reason.clone(), help: help.clone() })
            }
            (S::Queued { .. } | S::Waiting { .. } | S::Recovering { .. }, E::Cancelled { reason }) => {
                Ok(S::Cancelled { attempts: self.attempts(), reason: reason.clone() })
            }

            (
                S::Queued { .. } | S::Waiting { .. },
                E::Submitted { .. }
                | E::Started { .. }
                | E::AttemptEnded { .. }
                | E::RerunDecided(_)
                | E::Succeeded { .. },
            )
            | (
                S::Starting { .. },
                E::Submitted { .. }
                | E::Planned { .. }
                | E::Waiting { .. }
                | E::AttemptStarting(_)
                | E::RerunDecided(_)
                | E::Succeeded { .. }
                | E::Failed { .. }
                | E::Cancelled { .. },
            )
            | (
                S::Running { .. },
                E::Submitted { .. }
                | E::Planned { .. }
                | E::Waiting { .. }
                | E::AttemptStarting(_)
                | E::Started { .. }
                | E::RerunDecided(_)
                | E::Succeeded { .. }
                | E::Failed { .. }
                | E::Cancelled { .. },
            )
            | (S::Recovering { .. }, E::Submitted { .. } | E::Started { .. } | E::AttemptEnded { .. }) => {
                Err(self.refuses(event))
            }
        }
    }

    /// Returns the number of attempts that were started so far.
    pub fn attempts(&self) -> u32 {
        match self {
            JobState::Queued { .. } => 0,
            JobState::Starting { attempt, .. } | JobState::Running { attempt, .. } => attempt.number,
            JobState::Waiting { attempts, .. }
            | JobState::Recovering { attempts, .. }
            | JobState::Succeeded { attempts, .. }
            | JobState::Failed { attempts, .. }
            | JobState::Cancelled { attempts, .. } => *attempts,
        }
    }

    /// Every name that [`JobState::name`] returns, in the order of a job's life.
    pub const NAMES: [&str; 8] =
        ["queued", "waiting", "starting", "running", "recovering", "succeeded", "failed", "cancelled"];

    /// Returns the name of the state, as in the JSON interface.
    pub fn name(&self) -> &'static str {
        match self {
            JobState::Queued { .. } => "queued",
            JobState::Waiting { .. } => "waiting",
            JobState::Starting { .. } => "starting",
            JobState::Running { .. } => "running",
            JobState::Recovering { .. } => "recovering",
            JobState::Succeeded { .. } => "succeeded",
            JobState::Failed { .. } => "failed",
            JobState::Cancelled { .. } => "cancelled",
        }
    }

    /// Returns why the job is in its state, in words; `None` while it runs undisturbed.
    pub fn reason(&self) -> Option<String> {
        if let Some(by) = self.stop() {
            return Some(format!("stopping: {by}"));
        }
        match self {
            JobState::Running { .. } => None,
            JobState::Queued { .. } => Some("nothing was tried yet".to_owned()),
            JobState::Starting { attempt, .. } => {
                Some(format!("attempt {} is started at {}", attempt.number, attempt.tier))
            }
            JobState::Recovering { rerun: Some(reason), .. } => Some(reason.clone()),
            JobState::Recovering { attempts, after, rerun: None, .. } => {
                Some(format!("attempt {attempts} ended: {after}"))
            }
            JobState::Succeeded { attempts, .. } => Some(format!("done in {attempts} attempt(s)")),
            JobState::Waiting { reason, .. }
            | JobState::Failed { reason, .. }
            | JobState::Cancelled { reason, .. } => Some(reason.clone()),
        }
    }

    /// Returns who asked the job to stop; `None` when nobody did, or it is over.
    pub fn stop(&self) -> Option<&str> {
        match self {
            JobState::Queued { stop }
            | JobState::Waiting { stop, .. }
            | JobState::Starting { stop, .. }
            | JobState::Running { stop, .. }
            | JobState::Recovering { stop, .. } => stop.as_deref(),
            JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled { .. } => None,
        }
    }

    /// Returns whether the state of this name is final; false for what is no state.
    pub fn is_final_name(name: &str) -> bool {
        matches!(name, "succeeded" | "failed" | "cancelled")
    }

    /// Returns whether nothing more can happen.
    pub fn is_final(&self) -> bool {
        matches!(self, JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled { .. })
    }

    /// Returns whether a trainer lives, or may live.
    pub fn has_live_attempt(&self) -> bool {
        matches!(self, JobState::Starting { .. } | JobState::Running { .. })
    }

    fn starting(&self, start: &AttemptStart, stop: Option<&String>) -> Result<JobState, IllegalEvent> {
        if stop.is_some() {
            return Err(IllegalEvent::StopsAlready { attempt: start.attempt });
        }
        let expected = self.attempts().saturating_add(1);
        if start.attempt != expected {
            return Err(IllegalEvent::WrongAttempt {
                event: "attempt_starting",
                found: start.attempt,
                expected,
            });
        }
        let attempt = LiveAttempt { number: start.attempt, rung: start.rung, tier: start.tier.clone() };
        Ok(JobState::Starting { attempt, stop: None })
    }

    /// Returns the same state, marked as to be stopped. The first who asks is kept.
    fn to_stop(&self, by: &str) -> JobState {
        let mut state = self.clone();
        match &mut state {
            JobState::Queued { stop }
            | JobState::Waiting { stop, .. }
            | JobState::Starting { stop, .. }
            | JobState::Running { stop, .. }
            | JobState::Recovering { stop, .. } => {
                stop.get_or_insert_with(|| by.to_owned());
            }
            JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled { .. } => {}
        }
        state
    }

    fn refuses(&self, event: &JobEvent) -> IllegalEvent {
        IllegalEvent::NotAccepted { state: self.name(), event: event.name() }
    }
}

fn same_attempt(event: &JobEvent, found: u32, expected: u32) -> Result<(), IllegalEvent> {
    if found == expected {
        return Ok(());
    }
    Err(IllegalEvent::WrongAttempt { event: event.name(), found, expected })
}

impl JobEvent {
    /// Returns the name of the event, as it is stored.
    pub fn name(&self) -> &'static str {
        match self {
            JobEvent::Submitted { .. } => "submitted",
            JobEvent::Planned { .. } => "planned",
            JobEvent::Waiting { .. } => "waiting",
            JobEvent::AttemptStarting(_) => "attempt_starting",
            JobEvent::Started { .. } => "started",
            JobEvent::AttemptEnded { .. } => "attempt_ended",
            JobEvent::RerunDecided(_) => "rerun_decided",
            JobEvent::Warned { .. } => "warned",
            JobEvent::StopRequested { .. } => "stop_requested",
            JobEvent::Succeeded { .. } => "succeeded",
            JobEvent::Failed { .. } => "failed",
            JobEvent::Cancelled { .. } => "cancelled",
        }
    }
}

#[cfg(test)]
mod tests;
