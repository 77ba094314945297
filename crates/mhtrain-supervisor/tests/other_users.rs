//! Attempts that root starts for somebody else: as whom they run, and what a hostile record can do to root.
//!
//! Only root can start processes as another user; as anybody else these tests say so and pass. The other user needs no entry
//! in a password file.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "the helpers of a test are tests too, which clippy.toml cannot see"
)]

mod lab;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{LONG, Lab, exit, recorder, trainer, until};
use mhtrain_supervisor::attempt::{SpawnError, StopError};
use mhtrain_supervisor::record::{RecordDir, RecordError};
use mhtrain_supervisor::{Attempt, AttemptState, Ended, Extent, Identity, ProcessIdentity, StopTook};
use rustix::process::Signal;

const UID: u32 = 61_001;
const GID: u32 = 61_002;
const GROUPS: [u32; 2] = [61_002, 61_003];

/// A [`Lab`] whose attempts run as another user, with an executable that this user can reach.
struct Theirs {
    lab: Lab,
    exe: PathBuf,
    _exe_dir: tempfile::TempDir,
}

impl Theirs {
    fn new(script: &str) -> Option<Theirs> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can start an attempt as another user");
            return None;
        }
        let mut lab = Lab::new(script);
        lab.spec.identity = Some(identity());
        chown(lab.dir.path(), Some(UID), Some(GID)).unwrap();
        let exe_dir = tempfile::tempdir().unwrap();
        fs::set_permissions(exe_dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let exe = exe_dir.path().join("recorder");
        // Not by ourselves: a child that another test forks meanwhile would hold the copy open for writing, and it could not be
        // executed (ETXTBSY).
        assert!(Command::new("cp").arg(lab::exe()).arg(&exe).status().unwrap().success());
        Some(Theirs { lab, exe, _exe_dir: exe_dir })
    }

    fn launch(&self) -> Attempt {
        Attempt::launch(&self.exe, &self.record(), &self.lab.spec, &self.lab.env).unwrap()
    }

    fn record(&self) -> PathBuf {
        self.lab.path("record")
    }
}

fn identity() -> Identity {
    Identity { uid: UID, gid: GID, groups: GROUPS.to_vec() }
}

/// Returns the value of a line of `/proc/PID/status`.
fn status(process: &ProcessIdentity, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn become_that_user() {
    // SAFETY: two numbers; the rights of this thread alone change, and it belongs to this test.
    unsafe {
        libc::setfsgid(GID);
        libc::setfsuid(UID);
    }
}

fn assert_all_is_theirs(directory: &Path) {
    let found = fs::symlink_metadata(directory).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (UID, GID, 0o700));
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let found = entry.metadata().unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (UID, GID, 0o600), "{entry:?}");
    }
}

#[test]
fn recorder_and_trainer_are_the_users_and_cannot_come_back() {
    let Some(mut theirs) = Theirs::new("umask > umask; : > ready; exec sleep 600") else { return };
    theirs.lab.spec.umask = Some(0o027);
    let attempt = theirs.launch();
    until("the trainer runs", || theirs.lab.path("ready").exists());
    let (trainer, recorder) = (trainer(&attempt), recorder(&attempt));
    let score = |pid: &str| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    for process in [&recorder, &trainer] {
        assert_eq!(status(process, "Uid"), format!("{UID} {UID} {UID} {UID}"));
        assert_eq!(status(process, "Gid"), format!("{GID} {GID} {GID} {GID}"));
        assert_eq!(status(process, "Groups"), "61002 61003");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status(process, set), "0000000000000000", "{set}");
        }
        assert_eq!(score(&process.pid.to_string()), score("self"));
        // A process that is not dumpable has its files in /proc owned by root, and no tool of its own user works on it.
        let environment = fs::metadata(format!("/proc/{}/environ", process.pid)).unwrap();
        assert_eq!(environment.uid(), UID);
    }
    assert_all_is_theirs(&theirs.record());
    assert_eq!(theirs.lab.read("umask"), "0027\n");
    for log in [&theirs.lab.spec.stdout, &theirs.lab.spec.stderr] {
        assert_eq!(fs::metadata(log).unwrap().uid(), UID);
    }
    attempt.request_stop(LONG).unwrap();
    let exit = exit(&attempt);
    assert_eq!((exit.ended, exit.stop), (Ended::Signal(15), Some(StopTook::Polite)));
    assert_all_is_theirs(&theirs.record());
}

#[test]
fn a_launch_with_the_users_file_rights_works_and_changes_nothing_else() {
    let Some(theirs) = Theirs::new("exec sleep 600") else { return };
    // A parent into which only that user can write, whatever root may do elsewhere.
    let attempt = std::thread::scope(|scope| {
        let launched = scope.spawn(|| {
            become_that_user();
            let attempt = theirs.launch();
            // What somebody does later with the same rights.
            assert!(matches!(
                attempt.state().unwrap(),
                AttemptState::Running { .. } | AttemptState::Starting
            ));
            // SAFETY: asks for this thread's own number; an impossible one changes nothing.
            assert_eq!(unsafe { libc::setfsuid(u32::MAX) }.cast_unsigned(), UID);
            attempt
        });
        launched.join().unwrap()
    });
    let running = trainer(&attempt);
    assert_eq!(status(&running, "Uid"), format!("{UID} {UID} {UID} {UID}"));
    assert_eq!(status(&running, "CapPrm"), "0000000000000000");
    assert_all_is_theirs(&theirs.record());
    std::thread::scope(|scope| {
        let attempt = &attempt;
        scope.spawn(move || {
            become_that_user();
            attempt.request_stop(LONG).unwrap();
            assert_eq!(exit(attempt).ended, Ended::Signal(15));
        });
    });
}

#[test]
fn the_users_attempt_has_the_cgroup_that_roots_has() {
    let Some(mut theirs) = Theirs::new("exec sleep 600") else { return };
    let roots = Lab::new("exec sleep 600");
    let root = roots.launch();
    trainer(&root);
    let wanted = root.record().trainer().unwrap().unwrap().extent;
    root.kill_everything().unwrap();
    theirs.lab.spec.extent = Extent::Cgroup;
    let attempt = theirs.launch();
    trainer(&attempt);
    assert_eq!(attempt.record().trainer().unwrap().unwrap().extent, wanted);
    let cgroup = attempt.record().launch().unwrap().cgroup;
    attempt.request_stop(Duration::ZERO).unwrap();
    assert_eq!(exit(&attempt).stop, Some(StopTook::Kill));
    until("the cgroup is removed", || cgroup.as_ref().is_none_or(|cgroup| !cgroup.exists()));
}

#[test]
fn whoever_takes_over_is_the_same_user() {
    for extent in [Extent::Subreaper, Extent::Cgroup] {
        let Some(mut theirs) = Theirs::new("trap '' TERM; while :; do sleep 0.05; done") else { return };
        theirs.lab.spec.extent = extent;
        let attempt = theirs.launch();
        let trainer = trainer(&attempt);
        recorder(&attempt).signal(Signal::KILL).unwrap();
        until("the recorder is gone", || !recorder(&attempt).is_alive());
        // As anybody else it is refused.
        for wrong in [None, Some(Identity { uid: UID + 7, ..identity() })] {
            let error = attempt.take_over(&theirs.exe, wrong.as_ref()).unwrap_err();
            assert!(matches!(error, SpawnError::Record(RecordError::Foreign { .. })), "{error}");
        }
        attempt.take_over(&theirs.exe, Some(&identity())).unwrap();
        let recorder = recorder(&attempt);
        assert_eq!(status(&recorder, "Uid"), format!("{UID} {UID} {UID} {UID}"));
        assert_eq!(status(&recorder, "Groups"), "61002 61003");
        assert_all_is_theirs(&theirs.record());
        attempt.request_stop(Duration::from_millis(50)).unwrap();
        assert_eq!(exit(&attempt).ended, Ended::StatusLost);
        assert!(!trainer.is_alive());
    }
}

#[test]
fn a_directory_of_somebody_else_is_not_used() {
    let Some(theirs) = Theirs::new("exit 0") else { return };
    fs::DirBuilder::new().mode(0o700).create(theirs.record()).unwrap();
    let launched = Attempt::launch(&theirs.exe, &theirs.record(), &theirs.lab.spec, &theirs.lab.env);
    let error = launched.unwrap_err();
    assert!(
        matches!(error, SpawnError::Record(RecordError::Foreign { found: 0, wanted: UID, .. })),
        "{error}"
    );
    assert_eq!(fs::metadata(theirs.record()).unwrap().uid(), 0, "nothing is given away");
    // Their own, made by themselves, is.
    chown(theirs.record(), Some(UID), Some(GID)).unwrap();
    assert_eq!(exit(&theirs.launch()).ended, Ended::Code(0));
}

#[test]
fn an_executable_that_the_user_may_not_execute_is_an_error() {
    let Some(theirs) = Theirs::new("exit 0") else { return };
    fs::set_permissions(&theirs.exe, fs::Permissions::from_mode(0o700)).unwrap();
    let launched = Attempt::launch(&theirs.exe, &theirs.record(), &theirs.lab.spec, &theirs.lab.env);
    assert!(matches!(launched.unwrap_err(), SpawnError::Recorder { .. }));
}

#[test]
fn a_hostile_record_is_an_error_and_no_hang() {
    let Some(theirs) = Theirs::new("exit 0") else { return };
    let attempt = theirs.launch();
    exit(&attempt);
    until("the recorder is gone", || !recorder(&attempt).is_alive());
    let record = theirs.record();
    let put = |name: &str, trap: &dyn Fn(&Path)| {
        let path = record.join(name);
        let _ = fs::remove_file(&path);
        trap(&path);
    };
    let fifo = |path: &Path| {
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
    };
    let huge = |path: &Path| fs::File::create(path).unwrap().set_len(1 << 30).unwrap();
    let link = |path: &Path| symlink("/etc/shadow", path).unwrap();
    let directory = |path: &Path| fs::create_dir(path).unwrap();
    let began = Instant::now();

    for name in ["exit.json", "trainer.json", "recorder.json", "launch.json"] {
        let kept = fs::read(record.join(name)).unwrap();
        put(name, &link);
        let error = state_of(&record).unwrap_err();
        assert!(matches!(&error, RecordError::NotPlain { path } if path.ends_with(name)), "{error}");
        assert!(error.help().unwrap().contains(name));
        put(name, &fifo);
        assert!(matches!(state_of(&record).unwrap_err(), RecordError::NotPlain { .. }));
        put(name, &huge);
        fs::set_permissions(record.join(name), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(state_of(&record).unwrap_err(), RecordError::TooLarge { .. }));
        put(name, &directory);
        assert!(matches!(state_of(&record).unwrap_err(), RecordError::NotPlain { .. }));
        fs::remove_dir(record.join(name)).unwrap();
        fs::write(record.join(name), kept).unwrap();
        chown(record.join(name), Some(UID), Some(GID)).unwrap();
    }
    state_of(&record).unwrap();

    // What root would write: through a link, into a pipe.
    put("recorder.log", &fifo);
    assert_eq!(attempt.record().complaints(), "");
    fs::remove_file(record.join("exit.json")).unwrap();
    assert!(attempt.take_over(&theirs.exe, Some(&identity())).is_err());
    put("recorder.log", &|path| symlink("/etc/mhtraind-was-here", path).unwrap());
    assert!(attempt.take_over(&theirs.exe, Some(&identity())).is_err());
    let temporary = format!("stop.{}.tmp", std::process::id());
    put(&temporary, &fifo);
    let _nobody_is_there = attempt.request_stop(LONG);
    put(&temporary, &|path| symlink("/etc/mhtraind-was-here", path).unwrap());
    let _nobody_is_there = attempt.request_stop(LONG);
    assert!(!Path::new("/etc/mhtraind-was-here").exists());
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn an_attempt_with_a_hostile_record_can_still_be_killed() {
    let Some(theirs) = Theirs::new("setsid sh -c 'echo $$ > $D/worker; exec sleep 600' & exec sleep 600")
    else {
        return;
    };
    let attempt = theirs.launch();
    let processes = [trainer(&attempt), recorder(&attempt), theirs.lab.process("worker")];
    for name in ["launch.json", "trainer.json", "recorder.json"] {
        fs::remove_file(theirs.record().join(name)).unwrap();
        symlink("/etc/shadow", theirs.record().join(name)).unwrap();
    }
    assert!(Attempt::open(&theirs.record()).is_err());
    let attempt = Attempt::from(RecordDir::open(&theirs.record()).unwrap());
    assert!(attempt.kill_everything().unwrap() >= 2);
    assert!(!processes[0].is_alive() && !processes[2].is_alive());
    // Without a cgroup nobody knows who the recorder is. It ends when there is nobody left to record.
    until("the recorder is gone", || !processes[1].is_alive());
}

fn state_of(record: &Path) -> Result<AttemptState, RecordError> {
    Attempt::open(record)?.state()
}

#[test]
fn a_record_that_names_a_stranger_gets_nobody_killed() {
    let Some(theirs) = Theirs::new("exec sleep 600") else { return };
    let attempt = theirs.launch();
    let (trainer, recorder) = (trainer(&attempt), recorder(&attempt));
    let mut stranger =
        Command::new("sleep").arg("600").env("MHTRAIND_ATTEMPT", theirs.record()).spawn().unwrap();
    let victim = ProcessIdentity::of(stranger.id()).unwrap();
    // The user writes a process of root into both files, and a cgroup of root beside.
    let record = theirs.record();
    for file in ["recorder.json", "trainer.json"] {
        let text = fs::read_to_string(record.join(file)).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["pid"] = victim.pid.into();
        json["start_time"] = victim.start_time.into();
        fs::write(record.join(file), json.to_string()).unwrap();
    }
    let text = fs::read_to_string(record.join("launch.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let own = json["cgroup"].as_str().map(PathBuf::from);
    let foreign = own.as_ref().map(|own| own.with_file_name("somebody-elses"));
    if let Some(foreign) = &foreign {
        fs::create_dir(foreign).unwrap();
        fs::write(foreign.join("cgroup.procs"), victim.pid.to_string()).unwrap();
        json["cgroup"] = foreign.to_str().unwrap().into();
        fs::write(record.join("launch.json"), json.to_string()).unwrap();
    }

    let stop = attempt.request_stop(Duration::ZERO);
    let kill = attempt.kill_everything();
    let victim_lives = victim.is_alive();
    // What really runs ends by its own recorder, which nobody named any more.
    recorder.signal(Signal::KILL).unwrap();
    trainer.signal(Signal::KILL).unwrap();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    for cgroup in own.iter().chain(&foreign) {
        until("the cgroups are removed", || {
            for part in [cgroup.join("recorder"), cgroup.join("trainer"), cgroup.clone()] {
                let _not_yet = fs::remove_dir(part);
            }
            !cgroup.exists()
        });
    }
    assert!(matches!(stop, Err(StopError::NotTheirs { .. })), "{stop:?}");
    assert!(kill.is_ok(), "{kill:?}");
    assert!(victim_lives);
}
