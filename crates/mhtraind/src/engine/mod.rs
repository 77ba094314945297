//! Where and how does a job run?
//!
//! `local` runs one job on this host, in the foreground; a queue and other places come around it later.

pub mod companion;
mod curve;
pub mod directory;
pub mod download;
pub mod eta;
pub mod examine;
pub mod follow;
pub mod journal;
pub mod local;
pub mod look;
pub mod memory;
pub mod observations;
pub mod origin;
pub mod plans;
pub mod prepare;
pub mod resume;
pub mod screen;
pub mod secrets;
pub mod signals;
pub mod stall;
