//! Attempts with real processes: what is true on disk, who is alive, who is not.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "the helpers of a test are tests too, which clippy.toml cannot see"
)]

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{BOUND, DETACHED_WORKER, LONG, Lab, exe, exit, marked, recorder, trainer, until, wait_for};
use mhtrain_supervisor::attempt::StopError;
use mhtrain_supervisor::record::RecordDir;
use mhtrain_supervisor::{Attempt, AttemptState, Ended, LogTail, StopTook};
use rustix::process::Signal;

#[test]
fn the_exit_code_is_the_trainers_own() {
    for code in [0, 1, 75, 255] {
        let lab = Lab::new(&format!("exit {code}"));
        let exit = exit(&lab.launch());
        assert_eq!(
            (exit.ended, exit.stop, exit.leftovers_killed),
            (Ended::Code(code), None, Some(0)),
            "{code}"
        );
    }
}

#[test]
fn a_death_by_signal_is_told_from_an_exit_code() {
    let lab = Lab::new("kill -9 $$");
    let exit = exit(&lab.launch());
    assert_eq!((exit.ended, exit.stop), (Ended::Signal(9), None));
    assert_ne!(exit.oom_kill, Some(true), "nobody ran out of memory");
}

#[test]
fn a_command_that_cannot_be_executed_is_reported_with_its_name() {
    let mut lab = Lab::new("");
    lab.spec.argv = vec!["/no/such/program".into()];
    let Ended::NotStarted(why) = exit(&lab.launch()).ended else { panic!("started") };
    assert!(why.contains("/no/such/program") && why.contains("No such file"), "{why}");

    let mut lab = Lab::new("exit 0");
    lab.spec.cwd = "/no/such/directory".into();
    let Ended::NotStarted(why) = exit(&lab.launch()).ended else { panic!("started") };
    assert!(why.contains("/no/such/directory"), "{why}");

    let mut lab = Lab::new("exit 0");
    lab.spec.stdout = "/no/such/directory/stdout".into();
    let Ended::NotStarted(why) = exit(&lab.launch()).ended else { panic!("started") };
    assert!(why.contains("/no/such/directory/stdout"), "{why}");
}

#[test]
fn output_is_appended_exactly_and_privately() {
    let lab = Lab::new("printf 'a\\nb\\r\\0c'; printf 'err' >&2");
    fs::write(&lab.spec.stdout, "before\n").unwrap();
    exit(&lab.launch());
    assert_eq!(fs::read(&lab.spec.stdout).unwrap(), b"before\na\nb\r\0c");
    assert_eq!(lab.read("stderr"), "err");
    assert_eq!(fs::metadata(&lab.spec.stderr).unwrap().permissions().mode() & 0o777, 0o600);
    for entry in fs::read_dir(lab.path("record")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
}

#[test]
fn one_file_can_take_both_outputs() {
    let mut lab = Lab::new("for i in 1 2 3; do echo out $i; echo err $i >&2; done");
    lab.spec.stderr = lab.spec.stdout.clone();
    exit(&lab.launch());
    assert_eq!(lab.read("stdout"), "out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n");
}

#[test]
fn the_trainer_gets_the_given_environment_directory_and_umask_and_nothing_else() {
    // A descriptor that a careless library of ours left open for every child.
    let leaked = rustix::io::dup(std::io::stdin()).unwrap();
    let mut lab = Lab::new("cat /proc/$$/environ > environ; umask > umask; exec ls /proc/self/fd");
    lab.spec.umask = Some(0o027);
    assert_eq!(exit(&lab.launch()).ended, Ended::Code(0));
    drop(leaked);
    let environment = lab.read("environ");
    let names = environment.split_terminator('\0').map(|entry| entry.split_once('=').unwrap().0);
    let names: BTreeSet<_> = names.collect();
    assert_eq!(names, BTreeSet::from(["D", "MHTRAIND_ATTEMPT", "PATH"]));
    // 3 is the directory that `ls` itself reads.
    assert_eq!(lab.read("stdout"), "0\n1\n2\n3\n");
    assert_eq!(lab.read("umask"), "0027\n");
}

#[test]
fn secrets_of_the_environment_are_in_no_file() {
    let secret = "s3cr3t-value-of-a-token";
    let mut lab = Lab::new("test ${#TOKEN} = 23");
    lab.env.insert("TOKEN".into(), secret.into());
    assert_eq!(exit(&lab.launch()).ended, Ended::Code(0));
    let mut files = vec![lab.spec.stdout.clone(), lab.spec.stderr.clone()];
    files.extend(fs::read_dir(lab.path("record")).unwrap().map(|entry| entry.unwrap().path()));
    assert!(files.len() > 6);
    for file in files {
        let bytes = fs::read(&file).unwrap();
        assert!(!bytes.windows(secret.len()).any(|part| part == secret.as_bytes()), "{}", file.display());
    }
}

#[test]
fn a_polite_stop_lets_the_trainer_finish() {
    let lab = Lab::new("trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.02; done");
    let attempt = lab.launch();
    until("the trap is set", || fs::read_to_string(&lab.spec.stdout).is_ok_and(|text| text == "ready\n"));
    attempt.request_stop(LONG).unwrap();
    let exit = exit(&attempt);
    assert_eq!((exit.ended, exit.stop), (Ended::Code(75), Some(StopTook::Polite)));
    assert_eq!(lab.read("stdout"), "ready\nsaved\n");
}

#[test]
fn a_polite_stop_signals_the_trainer_and_not_its_workers() {
    let lab = Lab::new(
        "sh -c 'trap \"echo worker told\" TERM; echo $$ > $D/w; while [ ! -e $D/done ]; do sleep 0.02; done' &
         trap 'kill -0 $(cat $D/w) && echo worker alive; : > $D/done; wait; exit 75' TERM
         while [ ! -s $D/w ]; do sleep 0.02; done; : > $D/ready; while :; do sleep 0.02; done",
    );
    let attempt = lab.launch();
    until("the worker runs", || lab.path("ready").exists());
    attempt.request_stop(LONG).unwrap();
    assert_eq!(exit(&attempt).ended, Ended::Code(75));
    assert_eq!(lab.read("stdout"), "worker alive\n");
}

#[test]
fn a_trainer_that_ignores_sigterm_is_killed_after_the_grace_period() {
    let lab = Lab::new("trap '' TERM; : > $D/ready; while :; do sleep 0.02; done");
    let attempt = lab.launch();
    until("the trap is set", || lab.path("ready").exists());
    let asked = Instant::now();
    attempt.request_stop(Duration::from_millis(400)).unwrap();
    let exit = exit(&attempt);
    assert!(asked.elapsed() >= Duration::from_millis(400), "{:?}", asked.elapsed());
    assert_eq!((exit.ended, exit.stop), (Ended::Signal(9), Some(StopTook::Kill)));
}

#[test]
fn a_second_request_shortens_the_grace_period() {
    let lab = Lab::new("trap ': > $D/told' TERM; : > $D/ready; while :; do sleep 0.02; done");
    let attempt = lab.launch();
    until("the trap is set", || lab.path("ready").exists());
    attempt.request_stop(LONG).unwrap();
    until("the trainer was told", || lab.path("told").exists());
    assert!(matches!(attempt.state().unwrap(), AttemptState::Running { .. }));
    attempt.request_stop(Duration::ZERO).unwrap();
    assert_eq!(exit(&attempt).stop, Some(StopTook::Kill));
}

#[test]
fn a_stop_file_alone_is_a_request() {
    let lab = Lab::new("exec sleep 600");
    let attempt = lab.launch();
    trainer(&attempt);
    fs::write(lab.path("record/stop"), "600\n").unwrap();
    let exit = exit(&attempt);
    assert_eq!((exit.ended, exit.stop), (Ended::Signal(15), Some(StopTook::Polite)));
}

#[test]
fn a_signal_to_the_recorder_is_a_request_with_the_usual_grace() {
    for signal in [Signal::TERM, Signal::INT] {
        let lab = Lab::new("exec sleep 600");
        let attempt = lab.launch();
        trainer(&attempt);
        recorder(&attempt).signal(signal).unwrap();
        assert_eq!(exit(&attempt).stop, Some(StopTook::Polite));
    }
}

#[test]
fn garbage_in_the_stop_file_means_the_usual_grace() {
    let mut lab = Lab::new("trap '' TERM; : > $D/ready; while :; do sleep 0.02; done");
    lab.spec.grace = Duration::from_millis(50);
    let attempt = lab.launch();
    until("the trap is set", || lab.path("ready").exists());
    fs::write(lab.path("record/stop"), b"\xff soon").unwrap();
    assert_eq!(exit(&attempt).stop, Some(StopTook::Kill));
}

#[test]
fn what_outlives_the_trainer_is_gone_before_it_counts_as_exited() {
    let lab = Lab::new(&format!("{DETACHED_WORKER} while [ ! -s $D/worker ]; do sleep 0.02; done; exit 3"));
    let attempt = lab.launch();
    let worker = lab.process("worker");
    let exit = exit(&attempt);
    assert!(!worker.is_alive(), "exited means that nobody is left");
    assert_eq!(exit.ended, Ended::Code(3));
    // The worker, and the `sleep` it may be running.
    assert!(matches!(exit.leftovers_killed, Some(1..)), "{exit:?}");
    assert_eq!(attempt.kill_everything().unwrap(), 0);
}

#[test]
fn a_stop_ends_grandchildren_in_their_own_sessions() {
    let lab = Lab::new(&format!("trap '' TERM; {DETACHED_WORKER} while :; do sleep 0.05; done"));
    let attempt = lab.launch();
    let worker = lab.process("worker");
    attempt.request_stop(Duration::from_millis(50)).unwrap();
    assert_eq!(exit(&attempt).stop, Some(StopTook::Kill));
    assert!(!worker.is_alive());
}

#[test]
fn a_recorder_killed_before_the_gate_opens_leaves_nobody() {
    // A race on purpose: the recorder is killed as soon as it says who it is, again and again, until the kill came before
    // the trainer was written down. A test of the recorder shows the gate's part without a race.
    let (mut before, mut attempts) = (0, 0);
    while before < 5 && attempts < 400 {
        attempts += 1;
        let lab = Lab::new(": > $D/ran; exec sleep 600");
        let record = lab.path("record");
        let watcher = std::thread::spawn(move || {
            let end = Instant::now() + BOUND;
            while Instant::now() < end {
                if let Ok(Some(recorder)) = RecordDir::open(&record).and_then(|record| record.recorder()) {
                    return recorder.signal(Signal::KILL).unwrap();
                }
            }
            panic!("no recorder in {BOUND:?}");
        });
        // Killed that early it may or may not count as having come up.
        let launched = Attempt::launch(exe(), &lab.path("record"), &lab.spec, &lab.env);
        assert!(watcher.join().unwrap());
        drop(launched);
        let attempt = Attempt::open(&lab.path("record")).unwrap();
        let state = wait_for(&attempt, |state| matches!(state, AttemptState::Lost { .. }));
        if attempt.record().trainer().unwrap().is_none() {
            before += 1;
            assert_eq!(state, AttemptState::Lost { trainer_alive: false });
            until("the gate is gone", || marked(&lab).is_empty());
            assert!(!lab.path("ran").exists(), "a trainer ran that nobody can find");
        }
    }
    assert!(before > 0, "no recorder was killed before its gate opened in {attempts} attempts");
}

#[test]
fn a_killed_recorder_leaves_a_lost_attempt_that_can_be_ended() {
    let lab = Lab::new(&format!("{DETACHED_WORKER} trap '' TERM; while :; do sleep 0.05; done"));
    let attempt = lab.launch();
    let (trainer, worker) = (trainer(&attempt), lab.process("worker"));
    recorder(&attempt).signal(Signal::KILL).unwrap();
    let state = wait_for(&attempt, |state| !matches!(state, AttemptState::Running { .. }));
    assert_eq!(state, AttemptState::Lost { trainer_alive: true });
    assert!(matches!(attempt.request_stop(LONG), Err(StopError::RecorderGone { .. })));

    // A later mhtraind sees the same, and ends all of it: the worker's parents are gone, only its mark leads to it.
    let adopted = Attempt::open(&lab.path("record")).unwrap();
    assert_eq!(adopted.state().unwrap(), AttemptState::Lost { trainer_alive: true });
    assert!(adopted.kill_everything().unwrap() >= 2);
    assert!(!trainer.is_alive() && !worker.is_alive());
    assert_eq!(adopted.state().unwrap(), AttemptState::Lost { trainer_alive: false });
}

#[test]
fn a_recorder_killed_during_its_sweep_does_not_lose_the_status() {
    let lab = Lab::new(&format!("{DETACHED_WORKER} while [ ! -s $D/worker ]; do sleep 0.02; done; exit 9"));
    let attempt = lab.launch();
    let worker = lab.process("worker");
    until("the status is there", || attempt.record().exit().unwrap().is_some());
    // The worker ignores SIGTERM, so the sweep lasts seconds; it is still Running for everybody.
    assert!(matches!(attempt.state().unwrap(), AttemptState::Running { .. }));
    recorder(&attempt).signal(Signal::KILL).unwrap();
    let exit = exit(&attempt);
    assert_eq!((exit.ended, exit.leftovers_killed), (Ended::Code(9), None));
    attempt.kill_everything().unwrap();
    assert!(!worker.is_alive());
}

#[test]
fn an_attempt_is_adopted_by_a_later_client() {
    let lab = Lab::new("exec sleep 600");
    let identity = trainer(&lab.launch());
    let adopted = Attempt::open(&lab.path("record")).unwrap();
    assert_eq!(trainer(&adopted), identity);
    adopted.request_stop(LONG).unwrap();
    assert_eq!(exit(&adopted).stop, Some(StopTook::Polite));
    assert!(!identity.is_alive());
}

#[test]
fn signals_ignored_by_the_launcher_are_heard_by_the_trainer() {
    // What a shell does for `mhtraind run job.json &`: an `sh` that ignores SIGINT, SIGHUP and SIGTERM starts the recorder.
    // The shell reads its own file: while it starts a `grep`, dash blocks every signal.
    let lab = Lab::new("while read -r line; do echo \"$line\"; done < /proc/$$/status");
    let attempt = lab.launch();
    exit(&attempt);
    until("the recorder is gone and its lock free", || !recorder(&attempt).is_alive());
    fs::remove_file(&lab.spec.stdout).unwrap();
    for file in ["recorder.json", "trainer.json", "exit.json"] {
        fs::remove_file(lab.path("record").join(file)).unwrap();
    }
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "trap '' INT HUP TERM; exec \"$0\" recorder \"$1\""])
        .arg(exe())
        .arg(lab.path("record"));
    assert!(command.envs(&lab.env).process_group(0).status().unwrap().success());
    let ignored = lab.read("stdout");
    let mask = |name: &str| {
        let line = ignored.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    // Signals 32 and 33 belong to the C library, which lets nobody touch them.
    let ours = !(0b11 << 31);
    assert_eq!((mask("SigIgn:") & ours, mask("SigBlk:") & ours), (0, 0), "{ignored}");
}

#[test]
fn trainer_and_recorder_are_in_sessions_of_their_own() {
    let lab = Lab::new("exec sleep 600");
    let attempt = lab.launch();
    let session = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        text.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().parse::<u32>().unwrap()
    };
    let (trainer, recorder) = (trainer(&attempt).pid, recorder(&attempt).pid);
    assert_eq!(session(trainer), trainer);
    assert_eq!(session(recorder), recorder);
    assert_ne!(session(recorder), session(std::process::id()));
}

#[test]
fn an_attempt_without_a_recorder_can_be_given_up_for_good() {
    let lab = Lab::new(": > $D/ran");
    let attempt = lab.launch();
    exit(&attempt);
    assert!(!attempt.abandon_unrecorded().unwrap(), "a recorder was there");
    // As a launch leaves it that was cut off: the wish and nothing else.
    for file in ["recorder.json", "trainer.json", "exit.json"] {
        fs::remove_file(lab.path("record").join(file)).unwrap();
    }
    fs::remove_file(lab.path("ran")).unwrap();
    assert!(attempt.abandon_unrecorded().unwrap());
    // The recorder that comes too late starts nothing.
    let status = Command::new(exe()).arg("recorder").arg(lab.path("record")).envs(&lab.env).status().unwrap();
    assert!(!status.success());
    assert!(!lab.path("ran").exists());
    assert_eq!(attempt.state().unwrap(), AttemptState::Lost { trainer_alive: false });
}

#[test]
fn a_record_directory_serves_one_attempt() {
    let lab = Lab::new("exit 0");
    exit(&lab.launch());
    let again = Attempt::launch(exe(), &lab.path("record"), &lab.spec, &lab.env);
    assert!(again.unwrap_err().to_string().contains("record"));
    // Nor does a second recorder record it again.
    let before = lab.read("record/exit.json");
    let status = Command::new(exe()).arg("recorder").arg(lab.path("record")).status().unwrap();
    assert!(!status.success());
    assert_eq!(lab.read("record/exit.json"), before);
}

#[test]
fn a_launch_without_a_recorder_is_an_error_and_leaves_nobody() {
    let lab = Lab::new(": > $D/ran");
    let missing = Attempt::launch(Path::new("/no/such/exe"), &lab.path("a"), &lab.spec, &lab.env);
    assert!(missing.unwrap_err().to_string().contains("/no/such/exe"));
    let wrong = Attempt::launch(Path::new("/bin/false"), &lab.path("b"), &lab.spec, &lab.env);
    let wrong = wrong.unwrap_err();
    assert!(wrong.to_string().contains("before it was up") && !wrong.is_recorder_killed());
    fs::write(lab.path("killed"), "#!/bin/sh\nkill -9 $$\n").unwrap();
    fs::set_permissions(lab.path("killed"), fs::Permissions::from_mode(0o755)).unwrap();
    let killed = Attempt::launch(&lab.path("killed"), &lab.path("k"), &lab.spec, &lab.env);
    assert!(killed.unwrap_err().is_recorder_killed());
    let mut nothing = lab.spec.clone();
    nothing.argv.clear();
    assert!(Attempt::launch(exe(), &lab.path("c"), &nothing, &lab.env).is_err());
    assert!(!lab.path("ran").exists());
    assert!(Attempt::open(&lab.path("c")).is_err());
}

#[test]
fn a_log_of_200_mb_stays_under_its_cap_and_keeps_head_and_tail() {
    let mut lab = Lab::new(
        "echo first line; yes 'a line of a trainer that does not stop talking' | head -c 200000000; echo last line",
    );
    let cap = 4 << 20;
    lab.spec.log_cap_bytes = Some(cap);
    let attempt = lab.launch();
    let mut tail = LogTail::new(&lab.spec.stdout);
    let (mut first, mut read, mut last) = (Vec::new(), 0, Vec::new());
    exit(&attempt);
    tail.drain(|bytes| {
        read += bytes.len() as u64;
        if first.len() < 11 {
            first.extend_from_slice(bytes);
        }
        last = bytes.to_vec();
    })
    .unwrap();
    let metadata = fs::metadata(&lab.spec.stdout).unwrap();
    assert_eq!(metadata.size(), 200_000_000 + 11 + 10);
    assert!(metadata.blocks() * 512 <= cap, "{} blocks", metadata.blocks());
    assert!(first.starts_with(b"first line\n") && last.ends_with(b"last line\n"));
    assert!(read <= cap, "{read}");
    // Two newlines stand for what is missing at most; everything else is counted as read or skipped.
    assert!((read + tail.skipped_bytes()).abs_diff(metadata.size()) <= 2);
}

#[test]
fn a_tail_follows_a_running_trainer_and_loses_nothing() {
    let lab = Lab::new("i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done");
    let attempt = lab.launch();
    let (mut tail, mut text) = (LogTail::new(&lab.spec.stdout), Vec::new());
    while !matches!(attempt.state().unwrap(), AttemptState::Exited(_)) {
        tail.read_new(|bytes| text.extend_from_slice(bytes)).unwrap();
    }
    tail.drain(|bytes| text.extend_from_slice(bytes)).unwrap();
    let wanted: String = (0..2000).map(|number| format!("line {number}\n")).collect();
    assert_eq!(String::from_utf8(text).unwrap(), wanted);
}

#[test]
fn waiting_ends_with_the_timeout_or_with_the_change() {
    let lab = Lab::new("exec sleep 600");
    let attempt = lab.launch();
    trainer(&attempt);
    let seen = attempt.state().unwrap();
    let began = Instant::now();
    assert_eq!(attempt.wait_for_change(&seen, Duration::from_millis(120)).unwrap(), seen);
    assert!(began.elapsed() >= Duration::from_millis(120));
    attempt.request_stop(LONG).unwrap();
    assert_ne!(attempt.wait_for_change(&seen, BOUND).unwrap(), seen);
}

/// A file system that is full, until the end of the test; `None`, with the reason, where none can be mounted.
struct FullDisk(PathBuf);

impl FullDisk {
    fn mount(at: PathBuf) -> Option<FullDisk> {
        fs::create_dir(&at).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&at).output();
        if !mounted.is_ok_and(|mounted| mounted.status.success()) {
            eprintln!("skipped: no file system can be mounted here");
            return None;
        }
        Some(FullDisk(at))
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_log_that_could_not_take_the_last_words_is_told() {
    let mut lab = Lab::new("head -c 10000000 /dev/zero | tr '\\0' x; exit 1");
    let attempt = lab.launch();
    assert_eq!((exit(&attempt).ended, exit(&attempt).log_full), (Ended::Code(1), false));
    fs::remove_dir_all(lab.path("record")).unwrap();
    let Some(disk) = FullDisk::mount(lab.path("full")) else { return };
    lab.spec.stdout = disk.0.join("log");
    let attempt = lab.launch();
    assert_eq!((exit(&attempt).ended, exit(&attempt).log_full), (Ended::Code(1), true));
}
