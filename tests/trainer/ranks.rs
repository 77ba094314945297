//! Two ranks of real torch under torchrun: when their process group dies, nobody of them is left.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mhtrain_supervisor::attempt::LaunchSpec;
use mhtrain_supervisor::process::ProcessIdentity;
use mhtrain_supervisor::record::Extent;
use mhtrain_supervisor::{Attempt, AttemptState, Ended};
use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};

use crate::environment::root;
use crate::lab::trainer;

/// Three imports of torch on two cores, and room.
const UP_WITHIN: Duration = Duration::from_secs(120);

/// The grace of what outlived its trainer is 5 s.
const OVER_WITHIN: Duration = Duration::from_secs(20);

/// An attempt whose trainer is torchrun, with two ranks that train.
struct TwoRanks {
    dir: tempfile::TempDir,
    attempt: Attempt,
    torchrun: ProcessIdentity,
    ranks: [ProcessIdentity; 2],
}

impl Drop for TwoRanks {
    fn drop(&mut self) {
        let _gone_already = self.attempt.kill_everything();
    }
}

fn exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_mhtraind"))
}

fn pid(process: &ProcessIdentity) -> Pid {
    Pid::from_raw(i32::try_from(process.pid).unwrap()).unwrap()
}

impl TwoRanks {
    fn start(extent: Extent) -> Option<TwoRanks> {
        let (trainer, _) = trainer()?;
        let dir = tempfile::tempdir().unwrap();
        let text = |path: PathBuf| path.display().to_string();
        let mut argv = vec![text(trainer.join("bin/python"))];
        argv.extend(
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"].map(str::to_owned),
        );
        argv.extend([text(root().join("tests/trainer/gloo_ranks.py")), text(dir.path().to_owned())]);
        let log = dir.path().join("trainer.log");
        let spec = LaunchSpec {
            argv,
            cwd: dir.path().to_owned(),
            stdout: log.clone(),
            stderr: log.clone(),
            grace: Duration::from_secs(5),
            umask: None,
            log_cap_bytes: None,
            identity: None,
            extent,
        };
        let mut env: BTreeMap<OsString, OsString> = BTreeMap::new();
        env.insert("PATH".into(), std::env::var_os("PATH").unwrap_or_default());
        env.insert("OMP_NUM_THREADS".into(), "1".into());
        env.insert("GLOO_SOCKET_IFNAME".into(), "lo".into());
        let attempt = Attempt::launch(exe(), &dir.path().join("record"), &spec, &env).unwrap();
        let until = Instant::now() + UP_WITHIN;
        let both = [0, 1].map(|rank| dir.path().join(format!("rank-{rank}")));
        while !both.iter().all(|path| path.exists()) {
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(Instant::now() < until, "two ranks train: {}", said());
            assert!(!matches!(attempt.state().unwrap(), AttemptState::Exited(_)), "{}", said());
            std::thread::sleep(Duration::from_millis(20));
        }
        let identity = |path: PathBuf| {
            ProcessIdentity::of(std::fs::read_to_string(path).unwrap().parse().unwrap()).unwrap()
        };
        let ranks = both.map(identity);
        let AttemptState::Running { trainer } = attempt.state().unwrap() else { panic!("it runs") };
        let torchrun = trainer.identity;
        for rank in &ranks {
            let groups = (getpgid(Some(pid(rank))).unwrap(), getpgid(Some(pid(&torchrun))).unwrap());
            assert_ne!(groups.0, groups.1, "torchrun gives each rank a session of its own");
        }
        Some(TwoRanks { dir, attempt, torchrun, ranks })
    }

    fn kill_recorder(&self) {
        let recorder = pid(&self.attempt.record().recorder().unwrap().unwrap());
        kill_process(recorder, Signal::KILL).unwrap();
        self.wait(|state| matches!(state, AttemptState::Lost { trainer_alive: true }));
        assert!(self.ranks.iter().all(ProcessIdentity::is_alive), "they do not notice");
    }

    fn kill_group(&self) {
        kill_process_group(pid(&self.torchrun), Signal::KILL).unwrap();
    }

    fn wait(&self, wanted: impl Fn(&AttemptState) -> bool) -> AttemptState {
        let until = Instant::now() + OVER_WITHIN;
        loop {
            let state = self.attempt.state().unwrap();
            if wanted(&state) {
                return state;
            }
            assert!(Instant::now() < until, "still {state:?}: {}", self.attempt.record().complaints());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the recorder's word that nobody is left, and looks whether it is so. Returns how the trainer ended.
    fn end(&self) -> Ended {
        let over = |state: &AttemptState| matches!(state, AttemptState::Exited(exit) if exit.leftovers_killed.is_some());
        let AttemptState::Exited(exit) = self.wait(over) else { unreachable!("it is over") };
        assert!(exit.leftovers_killed >= Some(2), "both ranks outlived their group: {exit:?}");
        for process in self.ranks.iter().chain([&self.torchrun]) {
            assert!(!process.is_alive(), "{process:?} is left");
        }
        let mark = self.dir.path().as_os_str().as_encoded_bytes();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
            let marked = read("environ").windows(mark.len()).any(|window| window == mark);
            assert!(
                !marked,
                "{} is left: {}",
                entry.path().display(),
                String::from_utf8_lossy(&read("cmdline"))
            );
        }
        exit.ended
    }
}

#[test]
fn two_ranks_whose_group_was_killed_leave_nobody_behind() {
    for extent in [Extent::Cgroup, Extent::Subreaper] {
        let Some(ranks) = TwoRanks::start(extent) else { return };
        ranks.kill_group();
        assert_eq!(ranks.end(), Ended::Signal(9), "{extent:?}");
    }
}

#[test]
fn two_ranks_whose_recorder_and_then_group_were_killed_leave_nobody_behind() {
    for extent in [Extent::Cgroup, Extent::Subreaper] {
        let Some(ranks) = TwoRanks::start(extent) else { return };
        ranks.kill_recorder();
        ranks.kill_group();
        ranks.wait(|state| matches!(state, AttemptState::Lost { trainer_alive: false }));
        assert!(ranks.ranks.iter().all(ProcessIdentity::is_alive), "nobody is there who would end them");
        ranks.attempt.take_over(exe(), None).unwrap();
        assert_eq!(ranks.end(), Ended::StatusLost, "{extent:?}");
    }
}
