//! The daemon with a real trainer.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::environment::{Ran, root};
use crate::lab::Lab;
use crate::{assert_every_row_once, attempts};

/// A process that ends with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A lab whose jobs a daemon runs.
struct Served {
    lab: Lab,
    daemon: Option<Ends>,
}

impl Served {
    fn new() -> Option<Served> {
        let mut served = Served { lab: Lab::new()?, daemon: None };
        served.restart();
        Some(served)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.lab.command(args, &[]);
        command.env("MHTRAIND_SOCKET", self.lab.env.path("daemon.sock"));
        command.env("MHTRAIND_STATE_DIR", self.lab.env.path("state"));
        command
    }

    /// Kills the daemon, if there is one, and starts another.
    fn restart(&mut self) {
        self.daemon = None;
        let daemon = self.command(&["serve"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.daemon = Some(Ends(daemon.unwrap()));
        let until = Instant::now() + Duration::from_secs(30);
        while self.command(&["status"]).output().unwrap().status.code() != Some(0) {
            assert!(Instant::now() < until, "the daemon is up");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().unwrap())
    }

    /// Submits a job with `extra` keys, and `env` beside what the plugins of the lab need; returns its id.
    fn submit(&self, mut extra: Value, env: &Value) -> String {
        // The simulated capacity and the log of rows are the job's: a daemon passes its own environment to nobody.
        let mut variables: Map<String, Value> = self
            .command(&["serve"])
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_str()?.to_owned(), json!(value?.to_str()?))))
            .filter(|(name, _)| {
                name.starts_with("MHT_SIM") || name.starts_with("NVML_SIM") || name == "ORDER_LOG"
            })
            .collect();
        variables.extend(env.as_object().unwrap().clone());
        extra["env"] = Value::Object(variables);
        self.lab.job(extra, 1);
        self.run(&["submit", "job.json"]).expect(0).stdout.trim().to_owned()
    }
}

#[test]
fn a_daemon_killed_in_the_middle_of_a_training_loses_and_repeats_nothing() {
    let Some(mut served) = Served::new() else { return };
    let id = served.submit(json!({}), &json!({}));
    served.lab.wait_for_step(1, 3);
    served.restart();
    served.run(&["wait", &id, "--timeout", "180"]).expect(0);
    let receipt = served.lab.receipt();
    assert_eq!(attempts(&receipt).len(), 1, "it was trained once");
    assert_eq!(receipt["proof"], "rows");
    assert_every_row_once(&served.lab.trained(1), 1);
}

#[test]
fn a_model_and_data_of_a_hub_are_here_before_the_job_has_a_card() {
    let Some(served) = Served::new() else { return };
    let path = |relative: &str| served.lab.env.path(relative);
    std::fs::create_dir_all(path("hub/acme/rows")).unwrap();
    std::fs::rename(path("model"), path("hub/acme/tiny")).unwrap();
    std::fs::rename(path("train.jsonl"), path("hub/acme/rows/train.jsonl")).unwrap();
    let mut hub = Command::new("python3")
        .arg(root().join("tests/trainer/hub.py"))
        .arg(path("hub"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(hub.stdout.take().unwrap()).lines().map(Result::unwrap);
    let hub = Ends(hub);
    let endpoint = format!("http://127.0.0.1:{}", said.next().unwrap());
    let job = json!({"model": "acme/tiny", "dataset": "acme/rows", "args": {"use_hf": true}});
    let env = json!({"HF_ENDPOINT": endpoint, "HF_HOME": path("hf"), "HF_HUB_OFFLINE": "0"});
    let id = served.submit(job, &env);
    served.run(&["wait", &id, "--timeout", "240"]).expect(0);
    let receipt = served.run(&["explain", &id, "--json"]).expect(0).json();
    assert_eq!((receipt["proof"].as_str(), attempts(&receipt).len()), (Some("rows"), 1));
    assert_every_row_once(&served.lab.trained(1), 1);
    // It waited for them first; the trainer found them where it looks.
    let events = served.run(&["follow", &id, "--json"]).expect(0).stdout;
    let place = |word: &str| events.find(word).unwrap_or_else(|| panic!("{word} in {events}"));
    assert!(place("downloading acme/tiny, acme/rows") < place("\"planned\""), "{events}");
    drop(hub);
    let sent: Vec<String> = said.collect();
    for file in ["acme/tiny/model.safetensors", "acme/rows/train.jsonl"] {
        assert_eq!(sent.iter().filter(|name| *name == file).count(), 1, "{file} in {sent:?}");
    }
}
