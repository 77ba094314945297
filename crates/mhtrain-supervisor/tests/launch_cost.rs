//! What does a launch cost? Prints the figures; `cargo test -- --nocapture` shows them.

#![expect(clippy::unwrap_used, reason = "the helpers of a test are tests too, which clippy.toml cannot see")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mhtrain_supervisor::{Attempt, AttemptState, Extent, LaunchSpec};

const LAUNCHES: usize = 50;

/// What a machine that is busy with something else may take; the figure that counts is the printed one.
const BUSY: Duration = Duration::from_secs(2);

#[test]
fn half_of_the_launches_execute_their_trainer_soon() {
    let dir = tempfile::tempdir().unwrap();
    let mut costs: Vec<Duration> = (0..LAUNCHES).map(|number| launch(dir.path(), number)).collect();
    costs.sort();
    let at = |percent: usize| costs[percent * (LAUNCHES - 1) / 100];
    eprintln!(
        "launch to a running trainer, {LAUNCHES} times: p50 {:?}, p90 {:?}, max {:?}",
        at(50),
        at(90),
        at(100)
    );
    assert!(at(50) < BUSY, "{costs:?}");
}

/// Returns the time from the call until the trainer says what time it is: it was executed shortly before.
fn launch(dir: &Path, number: usize) -> Duration {
    let spec = LaunchSpec {
        argv: vec!["/bin/date".into(), "+%s%N".into()],
        cwd: dir.to_owned(),
        stdout: dir.join(number.to_string()),
        stderr: dir.join(number.to_string()),
        grace: Duration::from_secs(60),
        umask: None,
        log_cap_bytes: None,
        identity: None,
        extent: Extent::Cgroup,
    };
    let record = dir.join(format!("record-{number}"));
    let called = SystemTime::now();
    let exe = Path::new(env!("CARGO_BIN_EXE_recorder-for-tests"));
    let attempt = Attempt::launch(exe, &record, &spec, &BTreeMap::new()).unwrap();
    let mut state = attempt.state().unwrap();
    loop {
        if let AttemptState::Exited(_) = state {
            assert!(attempt.clean_up().unwrap());
            let said = std::fs::read_to_string(&spec.stdout).unwrap();
            let said = SystemTime::UNIX_EPOCH + Duration::from_nanos(said.trim().parse().unwrap());
            return said.duration_since(called).unwrap();
        }
        state = attempt.wait_for_change(&state, Duration::from_secs(60)).unwrap();
    }
}
