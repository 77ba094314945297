//! What is a job, how did an attempt end, and what happens next?
//!
//! Pure: no clock, no file, no process.

pub mod diagnosis;
pub mod spec;
