//! Black-box tests: the real binary, with everything that it reads from the machine under the test's control.
//!
//! Needs no GPU and no ms-swift: the cards are nvml-sim's, the trainer is `tests/fake-swift`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and says when it is skipped")]

mod architecture;
mod broken_disk;
mod daemon;
mod data;
mod diagnose;
mod environment;
mod estimate;
#[path = "../fake-swift/host.rs"]
mod fake_host;
mod hostile;
mod import;
mod job_files;
mod plan;
mod recovery;
mod run;
mod units;
mod usage;
mod users;
