//! Hostile clients, a driver that goes and comes back, full disks: the daemon stays up, what runs goes on, and each is said once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nvml_sim::{Fail, FailMode, SimDevice, SimFile};
use serde_json::{Value, json};

use crate::daemon::{Served, ask, is_root};
use crate::environment::{CARD, FakeHost};

const GIB: u64 = 1 << 30;

fn log_of(served: &Served) -> String {
    std::fs::read_to_string(served.host.env.path("daemon.log")).unwrap_or_default()
}

/// Returns a number of `/proc/PID/status` of the daemon, such as `VmHWM` in KiB.
fn status_of_daemon(served: &Served, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// A job that trains long enough for a test to disturb it; returns its id once it has made a step.
fn running(served: &Served, extra: Value, scenario: &Value) -> String {
    let id = served.submit(extra, scenario);
    served.wait_until("a step", |served| served.job(&id)["progress"]["step"].as_u64() >= Some(1));
    id
}

/// Asserts that a job was trained in one attempt and succeeds.
#[track_caller]
fn assert_undisturbed(served: &Served, id: &str) {
    served.run(&["wait", id, "--timeout", "120"]).expect(0);
    assert_eq!(served.job(id)["attempt"], 1, "nothing happened to it");
}

fn card() -> SimDevice {
    SimDevice::idle(CARD, "Simulated GPU", 80 * GIB, "8.0")
}

fn write_cards(served: &Served, change: impl FnOnce(&mut SimFile)) {
    let mut file = SimFile::new(vec![card()]);
    change(&mut file);
    file.write_atomically(&served.host.env.path("nvml.json")).unwrap();
}

#[test]
fn ten_thousand_idle_connections_cost_a_bounded_number_of_descriptors_and_no_job() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, wanted).unwrap();
    let connections =
        usize::try_from(limit.maximum.unwrap_or(20_000)).unwrap().saturating_sub(500).min(10_000);
    let served = Served::new();
    let id = running(&served, json!({}), &json!({"step_seconds": 0.5}));
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", served.pid())).unwrap().count();
    let before = descriptors();
    let socket = served.host.env.path("daemon.sock");
    let mut most = 0;
    let mut idle = Vec::new();
    for number in 0..connections {
        idle.push(UnixStream::connect(&socket).unwrap());
        if number % 500 == 0 {
            most = most.max(descriptors());
        }
    }
    // 128 of one user, 64 that are being told, and those that wait to be taken in.
    assert!(most < before + 400, "{before} descriptors before, {most} under {connections} connections");
    let peak = status_of_daemon(&served, "VmHWM");
    assert!(peak < 300 << 10, "{peak} KiB");
    drop(idle);
    served.wait_until("an answer", |served| served.run(&["status"]).code == Some(0));
    assert_undisturbed(&served, &id);
    assert!(descriptors() <= before + 8, "they are given back: {before} before, {} after", descriptors());
}

#[test]
fn a_body_of_100_mib_is_refused_and_not_kept() {
    let served = Served::new();
    let before = status_of_daemon(&served, "VmHWM");
    for head in ["content-length: 104857600", "transfer-encoding: chunked"] {
        let mut stream = UnixStream::connect(served.host.env.path("daemon.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(stream, "POST /v1/jobs HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n\r\n").unwrap();
        let mut chunk = vec![b' '; 1 << 20];
        if head.contains("chunked") {
            chunk = [b"100000\r\n".to_vec(), chunk, b"\r\n".to_vec()].concat();
        }
        let mut answer = Vec::new();
        // The server answers and closes before all of it was sent.
        let sent = (0..100).take_while(|_| stream.write_all(&chunk).is_ok()).count();
        let _closed_by_the_server = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(sent < 100 || answer.starts_with("HTTP/1.1 4"), "{head}: all was taken: {answer}");
        assert!(answer.is_empty() || answer.contains("10 MiB"), "{head}: {answer}");
    }
    let after = status_of_daemon(&served, "VmHWM");
    assert!(after < before + (64 << 10), "{before} KiB before, {after} after");
    let id = served.submit(json!({}), &json!({}));
    assert_undisturbed(&served, &id);
}

#[test]
fn clients_that_ask_and_do_not_read_hold_no_memory_and_no_job() {
    let served = Served::new();
    let id = running(&served, json!({}), &json!({"step_seconds": 0.3, "noise_bytes": 4 << 20}));
    let before = status_of_daemon(&served, "VmRSS");
    let deaf: Vec<UnixStream> = (0..40)
        .map(|number| {
            let mut stream = UnixStream::connect(served.host.env.path("daemon.sock")).unwrap();
            let path = if number % 2 == 0 { "log?follow=true" } else { "follow" };
            write!(stream, "GET /v1/jobs/{id}/{path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            stream
        })
        .collect();
    assert_undisturbed(&served, &id);
    let after = status_of_daemon(&served, "VmHWM");
    assert!(after < before + (160 << 10), "{before} KiB before, {after} at most");
    drop(deaf);
}

#[test]
fn names_and_directories_lead_nowhere_else() {
    let served = Served::new();
    for name in ["../../evil", "/etc/evil", "a/b", "..", ".", "a\nb", "a\u{0}b", &"x".repeat(4000)] {
        served.host.job(json!({"name": name}));
        let mut job: Value =
            serde_json::from_slice(&std::fs::read(served.host.env.path("job.json")).unwrap()).unwrap();
        job.as_object_mut().unwrap().remove("output_dir");
        let cwd = served.host.env.path("work");
        std::fs::create_dir_all(&cwd).unwrap();
        for path in ["model", "train.jsonl"] {
            let _there_already = std::os::unix::fs::symlink(served.host.env.path(path), cwd.join(path));
        }
        let body = json!({"job": job, "cwd": cwd.canonicalize().unwrap(), "umask": 18});
        let (status, answer) = ask(&served, "POST", "/v1/jobs", &body.to_string());
        assert!(status == 201 || status == 400, "{name:?}: {status} {answer}");
        if status == 201 {
            let id = serde_json::from_str::<Value>(&answer).unwrap()["id"].to_string();
            let out = served.job(&id)["output_dir"].as_str().unwrap().to_owned();
            let inside = cwd.canonicalize().unwrap();
            assert!(Path::new(&out).starts_with(&inside), "{name:?} leads to {out}");
            served.run(&["wait", &id, "--timeout", "60"]);
        }
    }
    assert_eq!(served.run(&["status"]).code, Some(0));
}

#[test]
fn links_in_the_way_are_not_followed_to_somebody_elses_file() {
    let served = Served::new();
    let victim = served.host.env.write("victim", "precious");
    let out = served.host.env.path("out");
    std::fs::create_dir_all(out.join(".mhtraind")).unwrap();
    for name in [".mhtraind/lock", "receipt.json.new", ".final.new"] {
        std::os::unix::fs::symlink(&victim, out.join(name)).unwrap();
    }
    let id = served.submit(json!({}), &json!({}));
    let ran = served.run(&["wait", &id, "--timeout", "60"]);
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    assert!(ran.code == Some(1), "it says so: {}", ran.stderr);
    assert!(ran.stderr.contains("out/"), "and where: {}", ran.stderr);
    for name in [".mhtraind/lock", "receipt.json.new", ".final.new"] {
        std::fs::remove_file(out.join(name)).unwrap();
    }
    let again = served.run(&["retry", &id]).expect(0).stdout.trim().to_owned();
    assert_undisturbed(&served, &again);
}

#[test]
fn a_driver_that_goes_and_comes_back_disturbs_no_job_and_starts_none() {
    for code in [9, 18, 999] {
        let served = Served::new();
        let first = running(&served, json!({"output_dir": "a"}), &json!({"step_seconds": 0.4}));
        write_cards(&served, |file| file.init_error = Some(code));
        let second = served.submit(json!({"output_dir": "b"}), &json!({}));
        let reason = |served: &Served| served.job(&second)["reason"].as_str().unwrap_or_default().to_owned();
        let said =
            |reason: &str| ["GPU", "NVML", "NVIDIA", "driver"].iter().any(|word| reason.contains(word));
        served.wait_until("a reason", |served| said(&reason(served)));
        assert_undisturbed(&served, &first);
        write_cards(&served, |_| {});
        assert_undisturbed(&served, &second);
        let errors = log_of(&served).lines().filter(|line| line.contains("ERROR")).count();
        assert!(errors <= 3, "{code}: it is not said again and again\n{}", log_of(&served));
    }
}

#[test]
fn a_card_that_falls_off_the_bus_keeps_its_job_and_takes_no_other_until_the_next_daemon() {
    for mode in [FailMode::Lost, FailMode::FallenOffBus, FailMode::ResetRequired] {
        let mut served = Served::new();
        let first = running(&served, json!({"output_dir": "a"}), &json!({"step_seconds": 0.3}));
        write_cards(&served, |file| file.devices[0].fail = Some(Fail { mode, after_calls: 0 }));
        let second = served.submit(json!({"output_dir": "b"}), &json!({}));
        assert_undisturbed(&served, &first);
        let reason = |served: &Served| served.job(&second)["reason"].as_str().unwrap_or_default().to_owned();
        served.wait_until("the reason", |served| {
            let reason = reason(served);
            ["is lost", "must be reset", "does not answer"].iter().any(|word| reason.contains(word))
        });
        assert!(
            matches!(served.state(&second).as_str(), "waiting" | "queued"),
            "{mode:?}: {}",
            reason(&served)
        );
        // What is simulated stays broken for a process that saw it, as a card does until a reset.
        write_cards(&served, |_| {});
        served.kill_and_restart();
        assert_undisturbed(&served, &second);
        let errors = log_of(&served).lines().filter(|line| line.contains("ERROR")).count();
        assert!(errors <= 3, "{mode:?}: it is not said again and again\n{}", log_of(&served));
    }
}

#[test]
fn a_flood_of_output_is_capped_on_disk_and_read_in_little_memory() {
    // A whole GiB takes minutes in a build that is not optimised.
    let mib: u64 = std::env::var("MHTRAIND_TEST_FLOOD_MIB").map_or(8, |text| text.parse().unwrap());
    let host = FakeHost::with_card(80 * GIB);
    let settings = std::fs::read_to_string(host.env.path("mhtraind.toml")).unwrap();
    host.env.write("mhtraind.toml", format!("{settings}log_cap_mib = 4\n"));
    let served = Served::on(host);
    let began = Instant::now();
    let id = served.submit(json!({}), &json!({"noise_bytes": mib << 20, "step_seconds": 0.1}));
    served.run(&["wait", &id, "--timeout", "900"]).expect(0);
    let peak = status_of_daemon(&served, "VmHWM");
    assert!(peak < 300 << 10, "{peak} KiB");
    let log = served.host.env.path(&format!("state/jobs/{id}/attempt-1/trainer.log"));
    let found = std::fs::metadata(&log).unwrap();
    let held = std::os::unix::fs::MetadataExt::blocks(&found) * 512;
    assert!(held <= 5 << 20, "{held} bytes are held of a log of {}", found.len());
    println!("{mib} MiB in {:.1} s, {} MiB at most in the daemon", began.elapsed().as_secs_f64(), peak >> 10);
}

/// A daemon whose state directory is a small disk of its own, in a mount namespace that goes with it.
fn on_a_small_disk() -> Option<(Served, PathBuf)> {
    if !is_root() {
        println!("skipped: only root can mount");
        return None;
    }
    let host = FakeHost::with_card(80 * GIB);
    let state = host.env.path("state");
    std::fs::create_dir(&state).unwrap();
    let served = Served::with(host, |command| {
        let mut inside = Command::new("unshare");
        let script =
            format!("mount -t tmpfs -o size=3m,mode=0700 tmpfs {:?} && exec \"$0\" serve", state.display());
        inside.args(["--mount", "--propagation", "private", "sh", "-c", &script]).arg(command.get_program());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        *command = inside;
    });
    // The same directory, as the daemon sees it.
    let seen = PathBuf::from(format!("/proc/{}/root{}", served.pid(), state.display()));
    Some((served, seen))
}

#[test]
fn a_full_state_directory_refuses_jobs_and_is_left_behind_when_there_is_room() {
    let Some((served, state)) = on_a_small_disk() else { return };
    let first = running(&served, json!({"output_dir": "a"}), &json!({"step_seconds": 0.7}));
    let filler = state.join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);
    // What SQLite has in its log already may still take some.
    served.host.job(json!({"output_dir": "b"}));
    served.wait_until("a refusal", |served| served.run(&["submit", "job.json"]).code == Some(1));
    let refused = served.run(&["submit", "job.json"]).expect(1);
    assert!(refused.stderr.contains("space") || refused.stderr.contains("full"), "{}", refused.stderr);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(served.run(&["status"]).code, Some(0), "it answers");
    std::fs::remove_file(&filler).unwrap();
    // Its output is on that disk too: a trainer that cannot print dies of it, one that has nothing to print goes on.
    let ran = served.run(&["wait", &first, "--timeout", "60"]);
    assert_ne!(ran.code, Some(75), "it is over\n{}\n{}", served.run(&["status"]).stdout, log_of(&served));
    if ran.code != Some(0) {
        assert!(ran.stderr.contains("disk") || ran.stderr.contains("space"), "{}", ran.stderr);
        let again = served.run(&["retry", &first]).expect(0).stdout.trim().to_owned();
        assert_undisturbed(&served, &again);
    }
    let second = served.submit(json!({"output_dir": "c"}), &json!({}));
    assert_undisturbed(&served, &second);
}

#[test]
fn a_state_directory_that_is_replaced_is_said_and_the_trainer_goes_on() {
    let mut served = Served::new();
    let first = running(&served, json!({"output_dir": "a"}), &json!({"step_seconds": 0.5}));
    let (state, elsewhere) = (served.host.env.path("state"), served.host.env.path("elsewhere"));
    std::fs::rename(&state, &elsewhere).unwrap();
    std::fs::create_dir(&state).unwrap();
    served.host.job(json!({"output_dir": "b"}));
    let refused = served.run(&["submit", "job.json"]).expect(1);
    assert!(refused.stderr.contains("state"), "{}", refused.stderr);
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&elsewhere, &state).unwrap();
    assert_undisturbed(&served, &first);
    served.kill_and_restart();
    assert_eq!(served.state(&first), "succeeded");
}

#[test]
fn a_pid_that_is_used_again_is_neither_followed_nor_killed() {
    let mut served = Served::new();
    let id = running(&served, json!({}), &json!({"step_seconds": 0.3}));
    served.wait_until("a saved step", |served| served.host.trained(1).len() >= 3);
    served.kill();
    let record = |name: &str| served.host.env.path(&format!("state/jobs/{id}/attempt-1/{name}.json"));
    let read =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(record(name)).unwrap()).unwrap() };
    for name in ["recorder", "trainer"] {
        let pid = read(name)["pid"].to_string();
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        served.wait_for_end(&pid);
    }
    // Somebody else has both numbers now.
    let mut strangers: Vec<_> = (0..2).map(|_| Command::new("sleep").arg("600").spawn().unwrap()).collect();
    for (name, stranger) in ["recorder", "trainer"].iter().zip(&strangers) {
        let mut changed = read(name);
        changed["pid"] = json!(stranger.id());
        std::fs::write(record(name), changed.to_string()).unwrap();
    }
    served.start();
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    assert_eq!(served.job(&id)["attempt"], 2, "it was interrupted and went on");
    for stranger in &mut strangers {
        assert!(stranger.try_wait().unwrap().is_none(), "a stranger was killed");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}

#[test]
fn processes_of_before_a_reboot_are_gone_and_the_job_goes_on() {
    let mut served = Served::new();
    let id = running(&served, json!({}), &json!({"step_seconds": 0.3}));
    served.wait_until("a saved step", |served| served.host.trained(1).len() >= 3);
    served.kill();
    for name in ["recorder", "trainer"] {
        let path = served.host.env.path(&format!("state/jobs/{id}/attempt-1/{name}.json"));
        let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let pid = record["pid"].to_string();
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        // Ourselves, in another life of the machine: alive by number and start.
        record["pid"] = json!(std::process::id());
        record["start_time"] = json!(start_time());
        record["boot_id"] = json!("00000000-0000-4000-8000-000000000000");
        std::fs::write(&path, record.to_string()).unwrap();
        served.wait_for_end(&pid);
    }
    served.start();
    served.run(&["wait", &id, "--timeout", "60"]).expect(0);
    let receipt = served.receipt(&id);
    assert_eq!(receipt["attempts"][1]["resume"]["from_step"], 3, "{receipt:#}");
}

/// Returns this process's start in ticks: the 20th field after the name in parentheses, proc_pid_stat(5).
fn start_time() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap()
}
