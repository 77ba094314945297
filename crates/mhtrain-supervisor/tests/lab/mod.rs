//! What the tests with real processes share.
//!
//! No test sleeps and hopes: each waits for a condition, with a bound that only a broken program reaches.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mhtrain_supervisor::recorder::RECORDER_VERB;
use mhtrain_supervisor::{Attempt, AttemptState, ExitRecord, Extent, LaunchSpec, ProcessIdentity};

/// The longest that anything may take here, on a machine that is busy with something else.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

/// A grace period that no test can outlast.
pub(crate) const LONG: Duration = Duration::from_secs(600);

/// One attempt in a directory of its own, which ends with the test whatever happens.
pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) spec: LaunchSpec,
    pub(crate) env: BTreeMap<OsString, OsString>,
}

impl Lab {
    /// The trainer is a shell script; `$D` is the directory of the test.
    pub(crate) fn new(script: &str) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let spec = LaunchSpec {
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            cwd: dir.path().to_owned(),
            stdout: dir.path().join("stdout"),
            stderr: dir.path().join("stderr"),
            grace: LONG,
            umask: None,
            log_cap_bytes: None,
            identity: None,
            extent: Extent::Cgroup,
        };
        let mut env = BTreeMap::new();
        env.insert("PATH".into(), std::env::var_os("PATH").unwrap());
        env.insert("D".into(), dir.path().into());
        Lab { dir, spec, env }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub(crate) fn launch(&self) -> Attempt {
        Attempt::launch(exe(), &self.path("record"), &self.spec, &self.env).unwrap()
    }

    /// Waits for a file that a script wrote and renamed or made in one go, and returns the process it names.
    pub(crate) fn process(&self, name: &str) -> ProcessIdentity {
        let path = self.path(name);
        until(&format!("{name} has a pid"), || {
            fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))
        });
        ProcessIdentity::of(self.read(name).trim().parse().unwrap()).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Ok(attempt) = Attempt::open(&self.path("record")) {
            let _ = attempt.kill_everything();
        }
    }
}

pub(crate) fn exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_recorder-for-tests"))
}

pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < end, "waited {BOUND:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn wait_for(attempt: &Attempt, wanted: impl Fn(&AttemptState) -> bool) -> AttemptState {
    let end = Instant::now() + BOUND;
    let mut state = attempt.state().unwrap();
    while !wanted(&state) {
        assert!(Instant::now() < end, "waited {BOUND:?} in vain, the state is {state:?}");
        state = attempt.wait_for_change(&state, Duration::from_secs(1)).unwrap();
    }
    state
}

pub(crate) fn exit(attempt: &Attempt) -> ExitRecord {
    match wait_for(attempt, |state| matches!(state, AttemptState::Exited(_) | AttemptState::Lost { .. })) {
        AttemptState::Exited(exit) => exit,
        other => panic!("{other:?}: {}", attempt.record().complaints()),
    }
}

/// Returns the trainer when it is executed: it is written down while its gate is still closed, and the gate ends with its recorder.
pub(crate) fn trainer(attempt: &Attempt) -> ProcessIdentity {
    let trainer = match wait_for(attempt, |state| matches!(state, AttemptState::Running { .. })) {
        AttemptState::Running { trainer } => trainer.identity,
        other => panic!("{other:?}"),
    };
    let is_gate = |words: Vec<u8>| words.split(|byte| *byte == 0).nth(1) == Some(RECORDER_VERB.as_bytes());
    let command = format!("/proc/{}/cmdline", trainer.pid);
    until("the trainer is executed", || !fs::read(&command).is_ok_and(is_gate));
    trainer
}

pub(crate) fn recorder(attempt: &Attempt) -> ProcessIdentity {
    attempt.record().recorder().unwrap().unwrap()
}

/// Every process that carries the mark of this attempt.
pub(crate) fn marked(lab: &Lab) -> Vec<u32> {
    let mark = format!("MHTRAIND_ATTEMPT={}", lab.path("record").display());
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    all.filter(|pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
    })
    .collect()
}

/// A worker in a session of its own, whose parent is gone: neither group nor parent lead to it.
pub(crate) const DETACHED_WORKER: &str =
    "(setsid sh -c 'trap \"\" TERM HUP; echo $$ > $D/worker; while :; do sleep 0.05; done' &) ; ";
