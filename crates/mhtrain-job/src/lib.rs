//! What is a job, how did an attempt end, and what happens next?
//!
//! A job file becomes a [`spec::JobSpec`]. What happens to the job is a list of [`event::JobEvent`]s, and its
//! state is their fold ([`state::JobState::next`] is the only transition). When an attempt ends with a
//! [`diagnosis::Diagnosis`], [`rerun::decide`] says what is tried next. What came of it all is the
//! [`receipt::Receipt`].
//!
//! Pure: no clock, no file, no process. It does not know what a log line or a flag of ms-swift looks like
//! (`mhtrain-swift`), nor how much memory a rung takes (`mhtrain-sizing`).

pub mod diagnosis;
pub mod event;
pub mod queue;
pub mod receipt;
pub mod rerun;
pub mod schema;
pub mod secrets;
pub mod spec;
pub mod state;
pub mod stop;
pub mod take_over;

#[cfg(test)]
mod testing;
