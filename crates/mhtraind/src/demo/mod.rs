//! What does the demo train, and when does it run out of memory?

pub mod assets;
