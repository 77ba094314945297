//! One attempt, from spawn to outcome: who starts a trainer, who stops it, and how do we know that it is gone?
//!
//! ```text
//!  mhtraind ──launch──> recorder (own session, sub-reaper) ──gate──> trainer (own session) ──> workers, ranks
//!     │                     │ writes                          writes │
//!     │ reads               v                                        v
//!     └──────────> record directory                          stdout and stderr files
//! ```
//!
//! Nobody holds a pipe of the trainer, so nothing breaks when mhtraind or the recorder dies. All that the two
//! know about each other is in the [record directory](record). The trainer may run only after its identity is
//! on disk. "Exited" means that everything the attempt started is gone, not only its first process.
//!
//! What this crate does not do: it does not know what ms-swift prints, why a trainer died, or what happens
//! next; it reads no device. Linux only.

pub mod attempt;
mod log_cap;
pub mod log_tail;
mod oom;
pub mod process;
pub mod record;
pub mod recorder;
mod signals;

pub use attempt::{Attempt, AttemptState, LaunchSpec};
pub use log_tail::LogTail;
pub use process::ProcessIdentity;
pub use record::{Ended, ExitRecord, StopTook, TrainerRecord};
