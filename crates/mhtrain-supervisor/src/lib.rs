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
//! written down. "Exited" means that everything the attempt started is gone, not only its first process: it is in a
//! cgroup of its own, or else below a sub-reaper ([`Extent`]). A recorder that dies is [replaced](adopt). For a daemon
//! that runs as root, recorder and trainer are the submitter's processes ([`Identity`]).
//!
//! What this crate does not do: it does not know what ms-swift prints, why a trainer died, or what happens
//! next; it reads no device. Linux only.

pub mod adopt;
pub mod attempt;
mod cgroup;
mod identity;
mod log_cap;
pub mod log_tail;
mod oom;
pub mod process;
pub mod record;
pub mod recorder;
mod signals;
mod spawn;
mod wake;
mod watch;

pub use attempt::{Attempt, AttemptState, LaunchSpec};
pub use identity::{FileRights, Identity};
pub use log_tail::LogTail;
pub use process::ProcessIdentity;
pub use record::{Ended, ExitRecord, Extent, StopTook, TrainerRecord};
pub use wake::Arrivals;
