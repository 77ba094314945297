//! Who takes over when a recorder died before its attempt was over?
//!
//! ```text
//! found                                       done
//!   no trainer.json                             nobody ran: the gate never got its word. "Status lost", sweep
//!   trainer.json, the trainer runs              watch it, obey stops, cap the logs; then as below
//!   trainer.json, it runs no more               exit.json with "status lost", sweep, exit.json again
//!   exit.json, but not that nobody is left      keep what it says, sweep, exit.json again
//!   exit.json, nobody is left                   nothing
//! ```
//!
//! One that takes over is a recorder like the first one, but for two things: the trainer is not its child, so how it ended
//! cannot be known; and orphans do not become its children, so they are found in the cgroup, or else by their mark. It may die
//! like the first one: the next one finds one of the cases above.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::{Duration, Instant};

use mhtrain_failpoint::reach;

use crate::log_cap::LogCap;
use crate::oom::OomCounter;
use crate::process::ProcessIdentity;
use crate::record::{Ended, ExitRecord, Extent, LaunchRecord, RecordDir, RecordError, open_plain};
use crate::recorder::{
    RecorderError, become_independent, exit_status, not_started, see_to_the_end, this_process, trainers_group,
};
use crate::signals::{self, Signals};
use crate::wake::end_of;
use crate::watch::{Sight, Watch, complain};

/// The hidden subcommand that calls [`adopt_main`].
pub const ADOPT_VERB: &str = "recorder-adopt";

/// How long the lock of a dead recorder may be held by a child of it that is about to be the gate.
const LOCK_FREE_WITHIN: Duration = Duration::from_secs(5);

/// Takes over the attempt of `record_dir` and records it to its end. Returns the exit status of the recorder.
///
/// Call it first thing in `main`: it closes every descriptor above 2 and must be the only thread.
#[must_use]
pub fn adopt_main(record_dir: &Path) -> i32 {
    // SAFETY: by the contract above nothing in this process owns a descriptor yet.
    unsafe { signals::close_inherited_descriptors() };
    exit_status(become_independent().and_then(|signals| take_over(record_dir, signals)))
}

fn take_over(record_dir: &Path, signals: Signals) -> Result<(), RecorderError> {
    let record = RecordDir::open(record_dir)?;
    let launch = record.launch()?;
    let _held_while_we_live = lock(&record)?;
    let known = record.exit()?;
    if known.as_ref().is_some_and(|exit| exit.leftovers_killed.is_some()) {
        return Ok(());
    }
    reach("adopt.locked", "");
    record.remove_temporaries();
    record.write_recorder(&this_process()?)?;
    if let Err(error) = record.settle(|| false).and_then(|_| record.reserve_exit()) {
        complain("cannot reserve the space of the exit status", &error);
    }
    let trainer = record.trainer()?;
    let known = match (known, &trainer) {
        (None, None) => Some(never_started()),
        (known, _) => known,
    };
    let group = trainers_group(&record, &launch)
        .filter(|_| trainer.as_ref().is_none_or(|trainer| trainer.extent == Extent::Cgroup));
    let trainer = trainer.map(|trainer| trainer.identity);
    let oom = OomCounter::later(group.as_ref().and_then(|group| group.memory_events()));
    let sight = Sight::Stranger(trainer.as_ref().and_then(end_of));
    let watch = Watch::new(
        &record,
        &launch,
        signals,
        trainer.filter(ProcessIdentity::is_alive),
        sight,
        group.clone(),
        logs(&launch),
    );
    see_to_the_end(&record, watch, &oom, known, group)
}

/// The gate opens only after trainer.json, so without that file nothing was executed. That says nothing against the trainer:
/// its recorder was killed, and another attempt may be made.
fn never_started() -> ExitRecord {
    ExitRecord { ended: Ended::StatusLost, leftovers_killed: None, ..not_started(String::new()) }
}

fn lock(record: &RecordDir) -> Result<std::fs::File, RecordError> {
    let until = Instant::now() + LOCK_FREE_WITHIN;
    loop {
        let nobody_there =
            || record.recorder().is_ok_and(|known| !known.is_some_and(|known| known.is_alive()));
        match record.lock() {
            Err(RecordError::Used { .. }) if Instant::now() < until && nobody_there() => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// A log that cannot be opened is not capped. The trainer's own descriptors are not ours to touch.
fn logs(launch: &LaunchRecord) -> LogCap {
    let open = |path: &Path| match open_plain(path, OpenOptions::new().append(true)) {
        Ok(file) => Some(file),
        Err(error) => {
            complain("cannot cap a log", &error);
            None
        }
    };
    LogCap::new(
        [&launch.stdout, &launch.stderr].into_iter().filter_map(|path| open(path)).collect(),
        launch.log_cap_bytes,
    )
}
