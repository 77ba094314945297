//! What do ms-swift and torch want to be told, and what do their files and last words mean?
//!
//! Pure: text and values in, text and values out. Everything that is known about ms-swift is in this crate.

pub mod command;
pub mod dialect;
pub mod environment;
pub mod import;
pub mod parameters;
