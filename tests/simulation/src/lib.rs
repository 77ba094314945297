//! Do the decisions keep their promises whatever happens when?
//!
//! ```text
//!   seed ──> script: cards, jobs, misfortunes, faults         (script.rs, faults.rs)
//!              │
//!              v        one actor does one thing, drawn by the seed
//!   world ─────┬─ users        submit, ask again, cancel, retry, drain       (users.rs)
//!              ├─ daemon       queue and job loops, all decisions real       (daemon.rs, attempts.rs)
//!              ├─ recorders    start, watch and end a trainer                (processes.rs)
//!              ├─ trainers     print what ms-swift prints, and die of it     (trainer.rs)
//!              └─ disk, cards  what is synced survives a power cut           (disk.rs, world.rs)
//!              │
//!              v        after every event
//!   invariants ── broken ──> fewer faults, jobs and steps, a readable history  (invariants.rs, shrink.rs, history.rs)
//! ```
//!
//! What is decided is decided by the product: `queue::fit` and `queue::decide`, `plan`, `take_over::goes_on`,
//! `beginning::begin`, the readers of a trainer's output, `diagnose_end`, `prove`, `conclude`, `rerun::decide`, and the fold
//! of the events. What the daemon's shell does with the answers is played here, a durable step at a time, so that a kill
//! can fall between any two. That the real shell does the same is shown with real processes by `cargo xtask chaos`.
//!
//! No clock, no thread and no randomness but the seed's: the same number is the same history.

mod attempts;
pub mod bugs;
mod daemon;
mod disk;
#[path = "../../../crates/xtask/src/draws.rs"]
#[expect(dead_code, reason = "shared with xtask, which draws more kinds of numbers")]
mod draws;
pub mod faults;
pub mod history;
pub mod invariants;
mod processes;
pub mod script;
pub mod shrink;
mod sizing;
mod trainer;
mod users;
pub mod world;
