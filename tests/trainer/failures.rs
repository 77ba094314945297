//! Misfortunes that a machine without a GPU can have for real: each ends in its right answer.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::environment::{Ran, root};
use crate::lab::{Lab, trainer};
use crate::{assert_every_row_once, attempts, kept};

/// What happens in a step of the first attempt, with the keys that the job has besides.
fn run_with(what: &str, step: u64, mut extra: Value) -> Option<(Lab, Ran)> {
    let lab = Lab::new()?;
    std::fs::copy(root().join("tests/trainer/provoke.py"), lab.env.path("provoke.py")).unwrap();
    extra["args"]["external_plugins"] = json!(["row_order.py", "simulated_capacity.py", "provoke.py"]);
    lab.job(extra, 1);
    let step = step.to_string();
    let ran = lab.run(&["run", "job.json"], &[("PROVOKE", what), ("PROVOKE_STEP", &step)]);
    Some((lab, ran))
}

fn kind(receipt: &Value, attempt: usize) -> &str {
    attempts(receipt)[attempt - 1]["diagnosis"]["kind"].as_str().unwrap_or_default()
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

fn start(lab: &Lab, args: &[&str]) -> Child {
    lab.command(args, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_worker_costs_workers_and_no_row() {
    let args = json!({"args": {"dataloader_num_workers": 2}});
    // A pinned number of workers stays; this one is the recipe's own.
    let Some((lab, ran)) = run_with("kill_worker", 4, json!({})) else { return };
    ran.expect(0);
    let receipt = lab.receipt();
    assert_eq!(kind(&receipt, 1), "host_oom");
    let [first, second] = [&attempts(&receipt)[0], &attempts(&receipt)[1]];
    assert_eq!(first["tier"], second["tier"], "it lowers no rung");
    assert_eq!(
        second["adjustments"],
        json!([{"dataloader_workers": 0}]),
        "from the recipe's for this host to none"
    );
    assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 1);

    let Some((lab, ran)) = run_with("kill_worker", 4, args) else { return };
    ran.expect(1);
    assert_eq!((attempts(&lab.receipt()).len(), kind(&lab.receipt(), 1)), (1, "host_oom"));
}

#[test]
fn a_loss_that_is_no_number_is_answered_with_the_recipes_stable_learning() {
    let Some((lab, ran)) = run_with("nan", 7, json!({})) else { return };
    ran.expect(0);
    let receipt = lab.receipt();
    assert_eq!(kind(&receipt, 1), "diverged");
    let second = &attempts(&receipt)[1];
    assert_eq!(second["tier"]["micro_batch"], attempts(&receipt)[0]["tier"]["micro_batch"]);
    assert_eq!(
        (&second["resume"]["kind"], &second["resume"]["from_step"]),
        (&json!("weights_only"), &json!(5))
    );
    let rates = lab.logged(2, "learning_rate");
    let highest = rates.values().copied().fold(0.0, f64::max);
    assert!(highest <= 1e-4 && highest > 5e-5, "{rates:?}");
}

/// In the middle of an optimizer's step the weights may be of two steps: they are not saved, and the receipt says so.
#[test]
fn a_step_that_cannot_be_saved_is_in_the_receipt() {
    let Some(lab) = Lab::new() else { return };
    std::fs::copy(root().join("tests/trainer/raise_oom.py"), lab.env.path("raise_oom.py")).unwrap();
    lab.job(
        json!({"args": {"external_plugins": ["row_order.py", "simulated_capacity.py", "raise_oom.py"]}}),
        1,
    );
    let once = [("RAISE_OOM_AT", "optimizer_done"), ("RAISE_OOM_STEP", "9"), ("RAISE_OOM_ONCE", "raised")];
    lab.run(&["run", "job.json"], &once).expect(0);
    let receipt = lab.receipt();
    assert_eq!(attempts(&receipt)[0]["diagnosis"]["kind"], "device_oom");
    let resume = &attempts(&receipt)[1]["resume"];
    assert_eq!((&resume["from_step"], &resume["steps_repeated"]), (&json!(5), &json!(3)));
    assert_eq!(
        receipt["warnings"],
        json!([
            "attempt 1: step 8 could not be saved when memory ran out: weights and optimizer may be of different steps"
        ])
    );
    assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 1);
}

#[test]
fn a_hang_is_ended_and_python_itself_says_where_it_was() {
    let Some(lab) = Lab::new() else { return };
    let settings = std::fs::read_to_string(lab.env.path("mhtraind.toml")).unwrap();
    // Long enough for the slowest first step of a resumed run on a busy machine: four times as long counts there.
    lab.env.write("mhtraind.toml", settings.replace("[attempt]", "[attempt]\nstall_s = 25\nstall_steps = 3"));
    std::fs::copy(root().join("tests/trainer/provoke.py"), lab.env.path("provoke.py")).unwrap();
    let plugins = json!(["row_order.py", "simulated_capacity.py", "provoke.py"]);
    lab.job(json!({"args": {"external_plugins": plugins}}), 1);
    // A simulated card is busy while a process holds memory there: this one holds it on no card that there is.
    let set = [("PROVOKE", "hang"), ("PROVOKE_STEP", "7"), ("MHT_SIM_DEVICE_UUID", "none")];
    lab.run(&["run", "job.json"], &set).expect(0);
    let receipt = lab.receipt();
    assert_eq!((kind(&receipt, 1), attempts(&receipt).len()), ("interrupted", 2));
    let stacks = std::fs::read_to_string(lab.env.path("out/.mhtraind/attempt-1/stacks.txt")).unwrap();
    assert!(stacks.contains("provoke.py") && stacks.contains("in hang"), "{stacks}");
    assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 1);
}

#[test]
fn a_traceback_and_the_words_of_an_oom_in_the_data_end_nothing() {
    let Some(lab) = Lab::new() else { return };
    let words =
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity";
    let rows = std::fs::read_to_string(lab.env.path("train.jsonl")).unwrap();
    let spoiled: String = rows
        .lines()
        .map(|line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            let text = row["messages"][0]["content"].as_str().unwrap().to_owned();
            row["messages"][0]["content"] = json!(format!("{text} {words}"));
            format!("{row}\n")
        })
        .collect();
    lab.env.write("train.jsonl", spoiled);
    std::fs::copy(root().join("tests/trainer/provoke.py"), lab.env.path("provoke.py")).unwrap();
    let plugins = json!(["row_order.py", "simulated_capacity.py", "provoke.py"]);
    lab.job(json!({"args": {"external_plugins": plugins}}), 1);
    let mut child = lab
        // Such rows are longer: there is room for them.
        .command(
            &["run", "job.json"],
            &[("PROVOKE", "traceback"), ("PROVOKE_STEP", "3"), ("MHT_SIM_BYTES_PER_TOKEN", "1")],
        )
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    lab.wait_for_step(1, 6);
    signal(lab.trainer_pid(1), "-KILL");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let receipt = lab.receipt();
    let output = std::fs::read_to_string(lab.env.path("out/.mhtraind/attempt-1/trainer.log")).unwrap();
    assert!(output.contains(words) && output.contains("Traceback"), "the trainer printed both");
    assert!(!kind(&receipt, 1).contains("oom"), "{}", kind(&receipt, 1));
    assert_eq!(attempts(&receipt)[0]["tier"], attempts(&receipt)[1]["tier"]);
    assert_eq!((attempts(&receipt).len(), receipt["proof"].as_str()), (2, Some("rows")));
}

#[test]
fn a_signal_to_the_trainer_is_an_interruption_and_it_goes_on() {
    for name in ["-TERM", "-INT"] {
        let Some(lab) = Lab::new() else { return };
        lab.job(json!({}), 1);
        let mut child = start(&lab, &["run", "job.json"]);
        lab.wait_for_step(1, 6);
        signal(lab.trainer_pid(1), name);
        assert_eq!(child.wait().unwrap().code(), Some(0), "{name}");
        let receipt = lab.receipt();
        assert_eq!((kind(&receipt, 1), attempts(&receipt).len()), ("interrupted", 2), "{name}");
        assert_eq!(attempts(&receipt)[1]["resume"]["kind"], "exact");
        assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 1);
    }
}

#[test]
fn a_checkpoint_that_was_cut_short_is_passed_over_for_the_one_before() {
    for file in ["optimizer.pt", "adapter_model.safetensors"] {
        let Some(lab) = Lab::new() else { return };
        lab.job(json!({}), 2);
        let mut child = start(&lab, &["run", "job.json"]);
        lab.wait_for_step(1, 12);
        let pid = lab.trainer_pid(1);
        child.kill().unwrap();
        child.wait().unwrap();
        signal(pid, "-KILL");
        let path = lab.env.path("out/attempt-1/checkpoint-10").join(file);
        let bytes = path.metadata().unwrap().size();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes / 2).unwrap();
        lab.run(&["run", "job.json", "--continue"], &[]).expect(0);
        let receipt = lab.receipt();
        let last = attempts(&receipt).last().unwrap();
        assert_eq!(
            (&last["resume"]["kind"], &last["resume"]["from_step"]),
            (&json!("exact"), &json!(5)),
            "{file}"
        );
        assert_eq!(receipt["proof"], "rows");
        let last = attempts(&receipt).len();
        let trained = lab.trained(if lab.trained(last).is_empty() { last - 1 } else { last });
        assert_eq!(trained.keys().next(), Some(&6), "{file}: it goes on after step 5");
    }
}

/// A small file system in memory. It is unmounted at the end of the test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one; `None`, with a word, where that is not allowed.
    fn at(path: PathBuf, kib: u32) -> Option<SmallDisk> {
        std::fs::create_dir_all(&path).unwrap();
        let options = format!("size={kib}k");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(SmallDisk(path));
        }
        println!("skipped: a file system cannot be mounted here");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _reported_by_nobody = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_stops_the_job_and_says_so() {
    let Some(lab) = Lab::new() else { return };
    let Some(_disk) = SmallDisk::at(lab.env.path("small"), 700) else { return };
    lab.job(json!({"output_dir": "small/out"}), 1);
    let ran = lab.run(&["run", "job.json"], &[]).expect(1);
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(said.contains("disk_full") || said.contains("No space left on device"), "{said}");
    assert!(said.contains("help") || said.contains("free"), "{said}");
}

/// A memory cgroup (v1) with a limit. It is removed at the end of the test.
struct Limit(PathBuf);

impl Limit {
    fn new(mib: u64) -> Option<Limit> {
        let path = Path::new("/sys/fs/cgroup/memory").join(format!("mhtraind-test-{}", std::process::id()));
        let made = std::fs::create_dir(&path);
        let limited =
            made.and_then(|()| std::fs::write(path.join("memory.limit_in_bytes"), (mib << 20).to_string()));
        if limited.is_ok() {
            return Some(Limit(path));
        }
        println!("skipped: no memory cgroup of version 1 can be made here");
        None
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        for _ in 0..50 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

#[test]
fn a_host_out_of_memory_is_told_from_a_bare_signal_9_by_the_kernels_count() {
    let Some(lab) = Lab::new() else { return };
    let Some(limit) = Limit::new(3072) else { return };
    std::fs::copy(root().join("tests/trainer/provoke.py"), lab.env.path("provoke.py")).unwrap();
    let plugins = json!(["row_order.py", "simulated_capacity.py", "provoke.py"]);
    lab.job(json!({"args": {"external_plugins": plugins}}), 1);
    let run = lab.command(&["run", "job.json"], &[("PROVOKE", "hog"), ("PROVOKE_STEP", "4")]);
    let mut inside = Command::new("sh");
    inside.args(["-c", "echo $$ > \"$0/cgroup.procs\"; exec \"$@\""]).arg(&limit.0);
    inside.arg(run.get_program()).args(run.get_args()).current_dir(lab.env.path(".")).env_clear();
    inside.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Ran::from(inside.output().unwrap()).expect(0);
    let receipt = lab.receipt();
    assert_eq!(kind(&receipt, 1), "host_oom");
    assert_eq!(attempts(&receipt)[0]["exit"], json!({"kind": "signal", "signal": 9}));
    assert_eq!(attempts(&receipt)[0]["tier"], attempts(&receipt)[1]["tier"], "it lowers no rung");
    assert_every_row_once(&kept(&[lab.trained(1), lab.trained(2)], &receipt), 1);
}

/// Runs ms-swift as a person would, and returns what `diagnose` makes of its words and its end.
fn diagnosed(
    lab: &Lab,
    program: &str,
    args: &[&str],
    env: &[(&str, &str)],
    then: impl FnOnce(&mut Child),
) -> Value {
    let (home, _) = trainer().unwrap();
    let log = std::fs::File::create(lab.env.path("typed.log")).unwrap();
    let like = lab.command(&["run"], env);
    let mut command = Command::new(home.join("bin").join(program));
    command.args(args).current_dir(lab.env.path(".")).env_clear();
    command.envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
    // A terminal shows each line at once; a file gets them by the page.
    command.env("PYTHONUNBUFFERED", "1");
    let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    then(&mut child);
    let status = child.wait().unwrap();
    let code = status
        .code()
        .unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap());
    let code = code.to_string();
    lab.run(&["diagnose", "typed.log", "--json", "--exit-code", &code], &[]).expect(0).json()
}

const TYPED: [&str; 17] = [
    "sft",
    "--model",
    "./model",
    "--dataset",
    "train.jsonl",
    "--output_dir",
    "typed",
    "--torch_dtype",
    "float32",
    "--per_device_train_batch_size",
    "8",
    "--logging_steps",
    "1",
    "--use_cpu",
    "true",
    // Else a hub is asked for the model first, and asked again when it does not answer.
    "--check_model",
    "false",
];

/// Kills whoever works in a directory: 3.x's wrapper leaves its child alone when it is told to end.
fn end_those_in(dir: &Path) {
    let dir = dir.canonicalize().unwrap();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let is_there = std::fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == dir);
        if let Some(pid) =
            process.file_name().to_str().and_then(|name| name.parse().ok()).filter(|_| is_there)
        {
            signal(pid, "-KILL");
        }
    }
}

#[test]
fn a_missing_flash_attn_and_a_port_in_use_are_told_by_real_words() {
    let Some(lab) = Lab::new() else { return };
    let flash = [&TYPED[..], &["--attn_impl", "flash_attn"]].concat();
    let found = diagnosed(&lab, "swift", &flash, &[], |_| {});
    assert_eq!(
        (&found["kind"], &found["answer"]),
        (&json!("incompatible_environment"), &json!("stop")),
        "{found}"
    );

    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = held.local_addr().unwrap().port().to_string();
    let ranks = [("NPROC_PER_NODE", "2"), ("MASTER_PORT", port.as_str()), ("MASTER_ADDR", "127.0.0.1")];
    let found = diagnosed(&lab, "swift", &TYPED, &ranks, |_| {});
    assert_eq!((&found["kind"], &found["answer"]), (&json!("communication"), &json!("new_port")), "{found}");
}

#[test]
fn a_signal_to_the_wrapper_is_an_interruption() {
    for name in ["-TERM", "-INT"] {
        let Some(lab) = Lab::new() else { return };
        // More steps than it can take before it is told to end.
        let long = [&TYPED[..], &["--max_steps", "100000"]].concat();
        let found = diagnosed(&lab, "swift", &long, &[], |child| {
            let until = std::time::Instant::now() + std::time::Duration::from_secs(300);
            let trains = || {
                let said = std::fs::read_to_string(lab.env.path("typed.log")).unwrap_or_default();
                said.contains("'loss'") || said.contains("\"loss\"")
            };
            while !trains() {
                assert!(std::time::Instant::now() < until, "it trains");
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            signal(child.id(), name);
        });
        end_those_in(&lab.env.path("."));
        assert_eq!(found["kind"], "interrupted", "{name}: {found}");
    }
}
