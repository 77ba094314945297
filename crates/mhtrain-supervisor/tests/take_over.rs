//! Attempts whose recorder was killed, in both extents: who goes on, who is left, what is written down.
//!
//! Where no cgroup can be made here, the tests of that extent say so and pass.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "the helpers of a test are tests too, which clippy.toml cannot see"
)]

mod lab;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lab::{BOUND, DETACHED_WORKER, LONG, Lab, exe, exit, marked, recorder, trainer, until, wait_for};
use mhtrain_supervisor::recorder::RECORDER_VERB;
use mhtrain_supervisor::{Attempt, AttemptState, Ended, Extent, ProcessIdentity, StopTook};
use rustix::process::Signal;

/// Runs a test in each extent that can be had here.
fn in_both_extents(script: &str, test: impl Fn(Lab)) {
    for extent in [Extent::Subreaper, Extent::Cgroup] {
        if let Some(lab) = lab_of(extent, script) {
            test(lab);
        }
    }
}

fn lab_of(extent: Extent, script: &str) -> Option<Lab> {
    let mut probe = Lab::new("exec sleep 600");
    probe.spec.extent = extent;
    let attempt = probe.launch();
    trainer(&attempt);
    let had = attempt.record().trainer().unwrap().unwrap().extent;
    attempt.request_stop(LONG).unwrap();
    exit(&attempt);
    if had != extent {
        eprintln!("skipped: no cgroup can be made here: {}", attempt.record().complaints());
        return None;
    }
    let mut lab = Lab::new(script);
    lab.spec.extent = extent;
    Some(lab)
}

fn kill_recorder(attempt: &Attempt) {
    let recorder = recorder(attempt);
    assert!(recorder.signal(Signal::KILL).unwrap());
    until("the recorder is gone", || !recorder.is_alive());
}

fn take_over(attempt: &Attempt) {
    attempt.take_over(exe(), None).unwrap();
}

fn assert_nobody_is_left(lab: &Lab, attempt: &Attempt) {
    assert_eq!(marked(lab), Vec::<u32>::new());
    assert_eq!(attempt.kill_everything().unwrap(), 0);
    until("the cgroup is removed", || attempt.clean_up().unwrap());
    if let Some(cgroup) = attempt.record().launch().unwrap().cgroup {
        assert!(!cgroup.exists(), "{}", cgroup.display());
    }
}

#[test]
fn a_killed_recorder_is_replaced_again_and_again_and_the_stop_still_works() {
    let script = format!(
        "{DETACHED_WORKER} trap 'exit 75' TERM
         while [ ! -e $D/quiet ]; do head -c 1000000 /dev/zero | tr '\\0' x; sleep 0.01; done
         : > $D/is-quiet; while :; do sleep 0.02; done"
    );
    in_both_extents(&script, |mut lab| {
        let cap = 4 << 20;
        lab.spec.log_cap_bytes = Some(cap);
        let attempt = lab.launch();
        let (trainer, worker) = (trainer(&attempt), lab.process("worker"));
        for _ in 0..3 {
            kill_recorder(&attempt);
            assert_eq!(attempt.state().unwrap(), AttemptState::Lost { trainer_alive: true });
            take_over(&attempt);
            assert!(matches!(attempt.state().unwrap(), AttemptState::Running { .. }));
            take_over(&attempt);
            let size = || fs::metadata(&lab.spec.stdout).unwrap().size();
            let before = size();
            until("the log grew beyond its cap again", || size() > before + 2 * cap);
        }
        fs::write(lab.path("quiet"), "").unwrap();
        until("the trainer is quiet", || lab.path("is-quiet").exists());
        assert!(trainer.is_alive(), "nobody was disturbed");
        attempt.request_stop(LONG).unwrap();
        let exit = exit(&attempt);
        assert_eq!((&exit.ended, exit.stop), (&Ended::StatusLost, Some(StopTook::Polite)));
        assert!(matches!(exit.leftovers_killed, Some(1..)), "{exit:?}");
        assert!(!trainer.is_alive() && !worker.is_alive());
        let blocks = fs::metadata(&lab.spec.stdout).unwrap().blocks();
        assert!(blocks * 512 <= cap, "{blocks} blocks");
        assert_nobody_is_left(&lab, &attempt);
        // Nothing is left to take over.
        take_over(&attempt);
        assert_eq!(attempt.state().unwrap(), AttemptState::Exited(exit));
    });
}

#[test]
fn one_that_took_over_kills_after_the_grace_period() {
    in_both_extents(&format!("trap '' TERM; {DETACHED_WORKER} while :; do sleep 0.02; done"), |lab| {
        let attempt = lab.launch();
        let worker = lab.process("worker");
        kill_recorder(&attempt);
        take_over(&attempt);
        attempt.request_stop(Duration::from_millis(100)).unwrap();
        let exit = exit(&attempt);
        assert_eq!((exit.ended, exit.stop), (Ended::StatusLost, Some(StopTook::Kill)));
        assert!(!worker.is_alive());
        assert_nobody_is_left(&lab, &attempt);
    });
}

#[test]
fn a_stop_that_its_recorder_did_not_live_to_carry_out_is_carried_out() {
    in_both_extents("trap 'exit 75' TERM; while :; do sleep 0.02; done", |lab| {
        let attempt = lab.launch();
        trainer(&attempt);
        kill_recorder(&attempt);
        fs::write(lab.path("record/stop"), "600\n").unwrap();
        take_over(&attempt);
        assert_eq!(exit(&attempt).stop, Some(StopTook::Polite));
    });
}

#[test]
fn a_trainer_that_ended_unseen_is_status_lost_and_what_it_left_is_ended() {
    in_both_extents(&format!("{DETACHED_WORKER} exec sleep 600"), |lab| {
        let attempt = lab.launch();
        let (trainer, worker) = (trainer(&attempt), lab.process("worker"));
        kill_recorder(&attempt);
        trainer.signal(Signal::KILL).unwrap();
        until("the trainer is gone", || !trainer.is_alive());
        assert_eq!(attempt.state().unwrap(), AttemptState::Lost { trainer_alive: false });
        take_over(&attempt);
        let exit = exit(&attempt);
        assert_eq!((&exit.ended, exit.stop), (&Ended::StatusLost, None));
        assert!(matches!(exit.leftovers_killed, Some(1..)), "{exit:?}");
        assert!(!worker.is_alive());
        assert_nobody_is_left(&lab, &attempt);
    });
}

#[test]
fn a_sweep_that_was_cut_short_is_finished_and_the_status_stays() {
    let script = format!("{DETACHED_WORKER} while [ ! -s $D/worker ]; do sleep 0.02; done; exit 9");
    in_both_extents(&script, |lab| {
        let attempt = lab.launch();
        let worker = lab.process("worker");
        for _ in 0..3 {
            until("the status is there", || attempt.record().exit().unwrap().is_some());
            kill_recorder(&attempt);
            let AttemptState::Exited(cut_short) = attempt.state().unwrap() else { panic!("not exited") };
            assert_eq!((cut_short.ended, cut_short.leftovers_killed), (Ended::Code(9), None));
            assert!(worker.is_alive());
            take_over(&attempt);
        }
        let exit = exit(&attempt);
        assert_eq!(exit.ended, Ended::Code(9));
        assert!(matches!(exit.leftovers_killed, Some(1..)), "{exit:?}");
        assert!(!worker.is_alive());
        assert_nobody_is_left(&lab, &attempt);
        let names = fs::read_dir(lab.path("record")).unwrap().map(|entry| entry.unwrap().file_name());
        let temporary: Vec<_> = names.filter(|name| name.to_str().unwrap().ends_with(".tmp")).collect();
        assert!(temporary.is_empty(), "{temporary:?}");
    });
}

#[test]
fn a_recorder_that_took_over_may_be_killed_at_any_moment() {
    // A race on purpose: each is killed as soon as it is up, wherever it stands, and every other one a little later.
    in_both_extents(&format!("{DETACHED_WORKER} exec sleep 600"), |lab| {
        let attempt = lab.launch();
        let (trainer, worker) = (trainer(&attempt), lab.process("worker"));
        for number in 0..20 {
            kill_recorder(&attempt);
            if number == 10 {
                trainer.signal(Signal::KILL).unwrap();
                until("the trainer is gone", || !trainer.is_alive());
            }
            take_over(&attempt);
            if number % 2 == 1 {
                std::thread::sleep(Duration::from_millis(number));
            }
        }
        let exit = exit(&attempt);
        assert_eq!(exit.ended, Ended::StatusLost);
        assert!(!worker.is_alive());
        assert_nobody_is_left(&lab, &attempt);
    });
}

#[test]
fn two_that_take_over_at_once_leave_one_recorder() {
    in_both_extents("exec sleep 600", |lab| {
        let attempt = lab.launch();
        trainer(&attempt);
        for _ in 0..5 {
            kill_recorder(&attempt);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| take_over(&attempt));
                }
            });
            assert!(matches!(attempt.state().unwrap(), AttemptState::Running { .. }));
        }
        attempt.request_stop(LONG).unwrap();
        assert_eq!(exit(&attempt).ended, Ended::StatusLost);
    });
}

#[test]
fn without_a_trainer_there_is_nothing_to_watch() {
    in_both_extents("exit 0", |lab| {
        let attempt = lab.launch();
        exit(&attempt);
        until("the recorder is gone", || !recorder(&attempt).is_alive());
        for file in ["trainer.json", "exit.json"] {
            fs::remove_file(lab.path("record").join(file)).unwrap();
        }
        assert_eq!(attempt.state().unwrap(), AttemptState::Lost { trainer_alive: false });
        take_over(&attempt);
        // Not "not started": that would be a reason not to start it again.
        assert_eq!(exit(&attempt).ended, Ended::StatusLost);
    });
}

#[test]
fn one_that_takes_over_never_touches_a_process_that_only_has_the_pid() {
    in_both_extents("exec sleep 600", |lab| {
        let attempt = lab.launch();
        let trainer = trainer(&attempt);
        kill_recorder(&attempt);
        trainer.signal(Signal::KILL).unwrap();
        // The kernel tells the start in hundredths of a second: so that the stranger's is another one.
        std::thread::sleep(Duration::from_millis(30));
        let mut stranger = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        // As if the pid had been used again: everything but the start time is that of a stranger.
        let path = lab.path("record/trainer.json");
        let text = fs::read_to_string(&path).unwrap();
        let pid = |pid: u32| format!("\"pid\": {pid}");
        assert!(text.contains(&pid(trainer.pid)));
        fs::write(&path, text.replace(&pid(trainer.pid), &pid(stranger.id()))).unwrap();
        take_over(&attempt);
        assert_eq!(exit(&attempt).ended, Ended::StatusLost);
        assert_eq!(attempt.kill_everything().unwrap(), 0);
        let stranger_lives = ProcessIdentity::of(stranger.id()).unwrap().is_alive();
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert!(stranger_lives);
    });
}

/// A record as the death of the launching process leaves it: all is said about the trainer, and no recorder is up.
fn cut_off(lab: &Lab) -> Attempt {
    let attempt = lab.launch();
    until("the trainer runs", || lab.path("ran").exists());
    let launch = lab.read("record/launch.json");
    let cgroup = attempt.record().launch().unwrap().cgroup;
    attempt.kill_everything().unwrap();
    until("the recorder is gone", || !recorder(&attempt).is_alive());
    until("the cgroup is removed", || attempt.clean_up().unwrap());
    fs::remove_dir_all(lab.path("record")).unwrap();
    fs::remove_file(lab.path("ran")).unwrap();
    fs::create_dir(lab.path("record")).unwrap();
    fs::write(lab.path("record/launch.json"), launch).unwrap();
    for group in ["recorder", "trainer"] {
        cgroup.iter().for_each(|cgroup| fs::create_dir_all(cgroup.join(group)).unwrap());
    }
    Attempt::open(&lab.path("record")).unwrap()
}

/// Returns whether a process that was started here ended well.
fn ended_well(mut child: Child) -> bool {
    let mut status = None;
    until("it ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.is_some_and(|status| status.success())
}

/// Starts what the launching process would have started.
fn start_recorder(lab: &Lab) -> Child {
    let mut command = Command::new(exe());
    command.arg(RECORDER_VERB).arg(lab.path("record")).env_clear().envs(&lab.env);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_launch_that_was_cut_off_is_given_up_for_good() {
    in_both_extents(": > $D/ran; exec sleep 600", |lab| {
        let attempt = cut_off(&lab);
        let cgroup = attempt.record().launch().unwrap().cgroup;
        assert!(attempt.abandon_unrecorded().unwrap());
        assert!(!cgroup.is_some_and(|cgroup| cgroup.exists()));
        assert_eq!(attempt.state().unwrap(), AttemptState::Lost { trainer_alive: false });
        // The recorder that was under way when its launcher died.
        assert!(!ended_well(start_recorder(&lab)));
        assert!(attempt.abandon_unrecorded().is_ok_and(|again| !again), "somebody is recorded: nobody");
        assert!(!lab.path("ran").exists() && attempt.record().trainer().unwrap().is_none());
        assert_nobody_is_left(&lab, &attempt);
    });
}

#[test]
fn a_recorder_that_is_up_is_not_given_up() {
    in_both_extents("exec sleep 600", |lab| {
        let attempt = lab.launch();
        let trainer = trainer(&attempt);
        assert!(!attempt.abandon_unrecorded().unwrap());
        assert!(trainer.is_alive());
        kill_recorder(&attempt);
        assert!(!attempt.abandon_unrecorded().unwrap(), "one that was up can be taken over");
    });
}

#[test]
fn a_recorder_that_comes_up_meanwhile_runs_the_trainer_or_nobody_does() {
    // A race on purpose: the recorder gets some time, less than it needs, about what it needs, or more.
    let mut given_up = 0;
    for round in 0..24 {
        let lab = Lab::new(": > $D/ran; exec sleep 600");
        let attempt = cut_off(&lab);
        let recorder = start_recorder(&lab);
        std::thread::sleep(Duration::from_micros(250 * round));
        if attempt.abandon_unrecorded().unwrap() {
            given_up += 1;
            assert!(!ended_well(recorder));
            assert!(!lab.path("ran").exists() && attempt.record().trainer().unwrap().is_none());
        } else {
            until("the trainer runs", || lab.path("ran").exists());
            assert!(trainer(&attempt).is_alive());
            attempt.kill_everything().unwrap();
            ended_well(recorder);
        }
        assert_eq!(marked(&lab), Vec::<u32>::new());
    }
    assert!(given_up > 0, "the first round leaves the recorder no time");
}

/// What torchrun makes: an agent, and ranks with sessions of their own and workers, all deaf to SIGTERM.
const TWO_RANKS: &str = "
    for rank in 0 1; do
        setsid sh -c 'trap \"\" TERM HUP; (trap \"\" TERM; while :; do sleep 0.05; done) & echo $! > $D/loader-$0
                      echo $$ > $D/rank-$0; while :; do sleep 0.05; done' $rank &
    done
    wait";

fn ranks(lab: &Lab) -> Vec<ProcessIdentity> {
    ["rank-0", "rank-1", "loader-0", "loader-1"].map(|name| lab.process(name)).into()
}

#[test]
fn ranks_whose_agent_and_its_group_were_killed_do_not_stay() {
    in_both_extents(TWO_RANKS, |lab| {
        let attempt = lab.launch();
        let (trainer, ranks) = (trainer(&attempt), ranks(&lab));
        let group = rustix::process::Pid::from_raw(trainer.pid.cast_signed()).unwrap();
        rustix::process::kill_process_group(group, Signal::KILL).unwrap();
        assert!(ranks.iter().all(ProcessIdentity::is_alive), "a group kill does not reach them");
        let exit = exit(&attempt);
        assert_eq!(exit.ended, Ended::Signal(9));
        assert!(!ranks.iter().any(ProcessIdentity::is_alive));
        assert_nobody_is_left(&lab, &attempt);
    });
}

#[test]
fn ranks_whose_agent_and_recorder_were_killed_do_not_stay() {
    in_both_extents(TWO_RANKS, |lab| {
        let attempt = lab.launch();
        let (trainer, ranks) = (trainer(&attempt), ranks(&lab));
        kill_recorder(&attempt);
        let group = rustix::process::Pid::from_raw(trainer.pid.cast_signed()).unwrap();
        rustix::process::kill_process_group(group, Signal::KILL).unwrap();
        until("the agent is gone", || !trainer.is_alive());
        take_over(&attempt);
        assert_eq!(exit(&attempt).ended, Ended::StatusLost);
        assert!(!ranks.iter().any(ProcessIdentity::is_alive));
        assert_nobody_is_left(&lab, &attempt);
    });
}

/// Without the mark, without a parent of ours, in another session: only the cgroup leads to it.
const HIDDEN: &str = "env -i D=$D setsid sh -c '(sh -c \"trap \\\"\\\" TERM HUP; echo \\$\\$ > $D/hidden
                      while :; do sleep 0.05; done\" &)'; ";

#[test]
fn a_process_that_hides_does_not_leave_its_cgroup() {
    for killed_by_us in [true, false] {
        let Some(lab) = lab_of(Extent::Cgroup, &format!("{HIDDEN} exec sleep 600")) else { return };
        let attempt = lab.launch();
        let (trainer, hidden) = (trainer(&attempt), lab.process("hidden"));
        assert!(!marked(&lab).contains(&hidden.pid));
        kill_recorder(&attempt);
        trainer.signal(Signal::KILL).unwrap();
        until("the trainer is gone", || !trainer.is_alive());
        assert!(hidden.is_alive());
        if killed_by_us {
            assert!(attempt.kill_everything().unwrap() >= 1);
        } else {
            take_over(&attempt);
            assert_eq!(exit(&attempt).ended, Ended::StatusLost);
        }
        assert!(!hidden.is_alive());
        assert_nobody_is_left(&lab, &attempt);
    }
}

#[test]
fn the_cgroup_is_made_holds_the_trainer_and_is_removed() {
    let Some(lab) = lab_of(Extent::Cgroup, "exec sleep 600") else { return };
    let attempt = lab.launch();
    let trainer = trainer(&attempt);
    let cgroup = attempt.record().launch().unwrap().cgroup.unwrap();
    let holds = |group: &str, pid: u32| {
        let procs = fs::read_to_string(cgroup.join(group).join("cgroup.procs")).unwrap();
        procs.lines().eq([pid.to_string()])
    };
    assert!(holds("trainer", trainer.pid) && holds("recorder", recorder(&attempt).pid));
    assert!(fs::read_to_string(cgroup.join("cgroup.events")).unwrap().contains("populated 1"));
    assert!(!attempt.clean_up().unwrap(), "nothing is removed while somebody runs");
    // A cgroup of the trainer's own making is ended and removed too.
    let own = cgroup.join("trainer/own");
    fs::create_dir(&own).unwrap();
    fs::write(own.join("cgroup.procs"), trainer.pid.to_string()).unwrap();
    attempt.request_stop(LONG).unwrap();
    assert_eq!(exit(&attempt).ended, Ended::Signal(15));
    // By the thread that reaps the recorder; nobody has to ask.
    until("the cgroup is removed", || !cgroup.exists());
}

#[test]
fn whoever_opens_the_attempt_next_removes_its_cgroup() {
    let Some(lab) = lab_of(Extent::Cgroup, "exit 0") else { return };
    let attempt = lab.launch();
    exit(&attempt);
    let cgroup = attempt.record().launch().unwrap().cgroup.unwrap();
    until("the cgroup is removed", || !cgroup.exists());
    // As if mhtraind had died before it could.
    fs::create_dir_all(cgroup.join("recorder")).unwrap();
    Attempt::open(&lab.path("record")).unwrap();
    assert!(!cgroup.exists());
}

#[test]
fn a_cgroup_that_cannot_be_made_is_no_error_and_is_said_once() {
    let Some(lab) = lab_of(Extent::Cgroup, "exec sleep 600") else { return };
    // Taken by somebody: the name of a record's cgroup is always the same.
    let first = lab.launch();
    let cgroup = first.record().launch().unwrap().cgroup.unwrap();
    first.kill_everything().unwrap();
    until("the cgroup is removed", || !cgroup.exists());
    fs::remove_dir_all(lab.path("record")).unwrap();
    let mut squatter = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    fs::create_dir(&cgroup).unwrap();
    fs::write(cgroup.join("cgroup.procs"), squatter.id().to_string()).unwrap();
    let attempt = lab.launch();
    let trainer = trainer(&attempt);
    let extent = attempt.record().trainer().unwrap().unwrap().extent;
    let complaints = attempt.record().complaints();
    let killed = attempt.kill_everything();
    let squatter_lives = ProcessIdentity::of(squatter.id()).unwrap().is_alive();
    squatter.kill().unwrap();
    squatter.wait().unwrap();
    until("the squatter's cgroup is empty", || fs::remove_dir(&cgroup).is_ok());
    assert_eq!(extent, Extent::Subreaper);
    assert_eq!(complaints.matches("without a cgroup").count(), 1, "{complaints}");
    assert!(killed.is_ok() && !trainer.is_alive());
    assert!(squatter_lives, "whoever is in a cgroup that we did not make is not ours");
}

#[test]
fn a_waiter_learns_of_the_recorders_death_at_once() {
    let lab = Lab::new("exec sleep 600");
    let attempt = lab.launch();
    trainer(&attempt);
    let seen = attempt.state().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| attempt.wait_for_change(&seen, BOUND).unwrap());
        kill_recorder(&attempt);
        assert_eq!(waiter.join().unwrap(), AttemptState::Lost { trainer_alive: true });
    });
    let lost = attempt.state().unwrap();
    let trainer = attempt.record().trainer().unwrap().unwrap().identity;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| attempt.wait_for_change(&lost, BOUND).unwrap());
        trainer.signal(Signal::KILL).unwrap();
        assert_eq!(waiter.join().unwrap(), AttemptState::Lost { trainer_alive: false });
    });
    take_over(&attempt);
    assert!(matches!(wait_for(&attempt, |s| matches!(s, AttemptState::Exited(_))), AttemptState::Exited(_)));
}
