//! Where do the measured queues run, and what do they run?
//!
//! Every queue is given the same job: a shell script that says in a pipe that it was executed and then leaves what a trainer
//! leaves that trained ten steps. Not Python: its start of 20 to 60 ms would be what is measured.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::fake_host::{make_model_and_data, make_trainer};

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(240);

/// What a job prints whose output is measured.
pub(super) const OUTPUT_MIB: u64 = 512;

/// The directory of a measurement, with the script and the pipe.
pub(super) struct Ground {
    pub(super) dir: PathBuf,
    words: Receiver<(Instant, String)>,
}

impl Ground {
    pub(super) fn make(dir: &Path, root: &Path) -> anyhow::Result<Ground> {
        make_model_and_data(dir)?;
        let sft = root.join("tests/fake-swift/fake_swift.py");
        make_trainer(&dir.join("trainer"), &sft, "4.6.0", "5.19.0")?;
        // One true run of the fake trainer is what every job leaves.
        let template = dir.join("template");
        let flags = "sft --model model --dataset train.jsonl --per_device_train_batch_size 8 \
            --gradient_accumulation_steps 4 --num_train_epochs 1 --save_steps 10 --logging_steps 10 --add_version false";
        let mut run = Command::new("python3");
        run.arg(&sft).args(flags.split_whitespace()).arg("--output_dir").arg(&template).current_dir(dir);
        if !run.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success() {
            bail!("the fake trainer cannot train the template");
        }
        let pipe = dir.join("pipe");
        if !Command::new("mkfifo").arg(&pipe).status()?.success() {
            bail!("no pipe can be made");
        }
        let (trainer, python) = (dir.join("trainer/bin/python"), dir.join("trainer/bin/python3"));
        let script = format!(
            "#!/bin/sh\n\
             # Questions about the environment are answered by the interpreter itself.\n\
             case $1 in -[a-zA-Z]) exec '{python}' \"$@\";; esac\n\
             echo begin > '{pipe}'\n\
             for word; do [ \"$before\" = --output_dir ] && out=$word; before=$word; done\n\
             [ -n \"$BENCH_MIB\" ] && yes 'a line of a trainer that says the same thing again' | head -c ${{BENCH_MIB}}M\n\
             cp -r '{template}/.' \"$out\"\n\
             echo end > '{pipe}'\n",
            python = python.display(),
            pipe = pipe.display(),
            template = template.display()
        );
        // The other name leads to the first in a virtual environment.
        let real = fs::canonicalize(&trainer)?;
        fs::remove_file(&trainer)?;
        fs::remove_file(&python)?;
        std::os::unix::fs::symlink(real, &python)?;
        fs::write(&trainer, script)?;
        fs::set_permissions(&trainer, fs::Permissions::from_mode(0o755))?;
        Ok(Ground { dir: dir.to_owned(), words: listen(&pipe)? })
    }

    /// Returns the job's command for queues that only start commands.
    pub(super) fn command(&self, output: &str) -> Vec<String> {
        let out = self.dir.join("peers").join(output);
        let text = |path: PathBuf| path.display().to_string();
        vec![text(self.dir.join("trainer/bin/python")), "--output_dir".to_owned(), text(out)]
    }

    /// Forgets what earlier jobs said. Nothing may run.
    pub(super) fn forget(&self) {
        while self.words.try_recv().is_ok() {}
    }

    /// Returns when the next job said this.
    pub(super) fn next(&self, wanted: &str) -> anyhow::Result<Instant> {
        let until = Instant::now() + PATIENCE;
        loop {
            let (at, word) = self
                .words
                .recv_timeout(until.saturating_duration_since(Instant::now()))
                .with_context(|| format!("no job said {wanted}"))?;
            if word == wanted {
                return Ok(at);
            }
        }
    }

    /// Returns the median cost of writing 4 KiB and an fsync.
    pub(super) fn fsync_p50(&self) -> anyhow::Result<Duration> {
        let mut file = File::create(self.dir.join("fsync"))?;
        let once = || {
            let begin = Instant::now();
            file.write_all(&[0x5a; 4096])?;
            file.sync_data()?;
            Ok(begin.elapsed())
        };
        median_of(200, once)
    }

    /// Returns the rate at which the job's output goes into a plain file.
    pub(super) fn plain_output(&self) -> anyhow::Result<f64> {
        self.forget();
        let command = self.command("plain");
        fs::create_dir_all(self.dir.join("peers/plain"))?;
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .env("BENCH_MIB", OUTPUT_MIB.to_string())
            .stdout(File::create(self.dir.join("plain.log"))?)
            .spawn()?;
        let rate = self.output_rate()?;
        child.wait()?;
        fs::remove_file(self.dir.join("plain.log"))?;
        Ok(rate)
    }

    /// Waits for a job that prints, and returns the MiB per second of its output.
    #[expect(clippy::cast_precision_loss, reason = "hundreds of MiB")]
    pub(super) fn output_rate(&self) -> anyhow::Result<f64> {
        let begin = self.next("begin")?;
        let end = self.next("end")?;
        Ok(OUTPUT_MIB as f64 / (end - begin).as_secs_f64())
    }
}

/// Reads the pipe in a thread. It is opened for writing too, so that it has no end between two jobs.
fn listen(pipe: &Path) -> anyhow::Result<Receiver<(Instant, String)>> {
    let file = File::options().read(true).write(true).open(pipe)?;
    let (words, heard) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            if words.send((Instant::now(), line)).is_err() {
                return;
            }
        }
    });
    Ok(heard)
}

/// Returns the median of so many measurements.
pub(super) fn median_of(
    times: usize,
    mut once: impl FnMut() -> anyhow::Result<Duration>,
) -> anyhow::Result<Duration> {
    let mut all = (0..times).map(|_| once()).collect::<anyhow::Result<Vec<_>>>()?;
    all.sort_unstable();
    Ok(all[times / 2])
}

/// Returns how long something takes.
pub(super) fn time(what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    what()?;
    Ok(begin.elapsed())
}

/// Returns what a process has resident, in MiB.
pub(super) fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// Returns the share of one core that a process takes over some time, in percent.
pub(super) fn cpu_percent(pid: u32, over: Duration) -> anyhow::Result<f64> {
    let ticks = || -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("a stat line")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        Ok(fields[11].parse::<f64>()? + fields[12].parse::<f64>()?)
    };
    let before = ticks()?;
    std::thread::sleep(over);
    // A tick is 10 ms on every Linux that mhtraind runs on (USER_HZ).
    Ok((ticks()? - before) / over.as_secs_f64())
}

/// Waits for a condition.
pub(super) fn until(what: &str, mut condition: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    while !condition()? {
        if Instant::now() >= until {
            bail!("waited {} s in vain for {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
