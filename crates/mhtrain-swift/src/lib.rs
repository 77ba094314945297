//! What do ms-swift and torch want to be told, and what do their files and last words mean?
//!
//! Pure: text and values in, text and values out. Everything that is known about ms-swift is in this crate.

pub mod beginning;
pub mod checkpoint;
pub mod command;
pub mod companion;
pub mod conversation;
pub mod data_use;
pub mod diagnosis;
pub mod dialect;
pub mod download;
pub mod environment;
pub mod import;
pub mod oom_message;
pub mod packing;
pub mod parameters;
pub mod progress;
pub mod proof;
pub mod python_json;
pub mod showed;
pub mod stall;
pub mod template;
#[cfg(test)]
mod testing;
pub mod verdict;
