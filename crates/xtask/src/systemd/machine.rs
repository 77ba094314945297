//! A machine that is thrown away: `tests/systemd/machine.sh` with a real systemd in it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::workspace::output;

const SYSTEMD: &str = "/lib/systemd/systemd";

/// Where the machine finds the files that it was given.
pub(crate) const FILES: &str = "/srv/mhtraind-test";

/// Places that a boot writes to. Nothing that the machine writes there may be seen outside.
const WRITTEN_AT_BOOT: [&str; 6] = ["/etc", "/var/lib", "/usr", "/tmp", "/run", "/dev"];

/// A running machine. It ends with this value.
#[derive(Debug)]
pub(crate) struct Machine {
    script: Child,
    /// The process 1 inside, as it is called outside.
    init: u32,
    cgroup: PathBuf,
}

impl Machine {
    /// Says what this host lacks, if it cannot have such a machine.
    pub(crate) fn check_host() -> anyhow::Result<()> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let is_root = status.lines().any(|line| line.starts_with("Uid:\t0\t0\t"));
        ensure!(is_root, "needs root, for namespaces and mounts of its own");
        let filesystems = std::fs::read_to_string("/proc/filesystems")?;
        ensure!(filesystems.lines().any(|line| line.ends_with("\toverlay")), "this kernel has no overlayfs");
        ensure!(cgroup_mount().is_some(), "no cgroup v2 is mounted here");
        ensure!(Path::new(SYSTEMD).exists(), "systemd is not installed: there is no {SYSTEMD}");
        for tool in ["unshare", "setpriv", "nsenter", "findmnt", "dpkg", "runuser", "useradd", "loginctl"] {
            let found = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
                .iter()
                .any(|dir| Path::new(dir).join(tool).exists());
            ensure!(found, "the program {tool} is not installed");
        }
        Ok(())
    }

    /// Runs a machine without systemd first, and refuses to go on when it can write outside of itself.
    pub(crate) fn check_isolation(script: &Path, dir: &Path) -> anyhow::Result<()> {
        let name = format!("mhtraind-canary-{}", std::process::id());
        let touch = WRITTEN_AT_BOOT.map(|place| format!("touch {place}/{name}")).join(" && ");
        let canary = Path::new("/tmp").join(&name);
        std::fs::write(&canary, "")?;
        let left = output(Command::new(script).arg(dir).args(["sh", "-c", &format!("ls -A /tmp; {touch}")]));
        let kept = std::fs::remove_file(&canary);
        remove_cgroup(&cgroup_of(dir)?);
        ensure!(left?.trim().is_empty() && kept.is_ok(), "the machine has this host's /tmp");
        for place in WRITTEN_AT_BOOT {
            let path = Path::new(place).join(&name);
            ensure!(!path.exists(), "the machine can write outside of itself: {}", path.display());
        }
        Ok(())
    }

    /// Boots systemd. The script checks the mounts once more before.
    pub(crate) fn boot(script: &Path, dir: &Path, log: &Path) -> anyhow::Result<Machine> {
        let cgroup = cgroup_of(dir)?;
        let file = File::create(log)?;
        let script = Command::new(script)
            .arg(dir)
            .args([SYSTEMD, "--system", "--unit=basic.target", "--log-target=journal"])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("cannot start the machine")?;
        let mut machine = Machine { script, init: 0, cgroup };
        machine.wait_for_systemd().with_context(|| {
            format!("systemd does not boot\n{}", std::fs::read_to_string(log).unwrap_or_default())
        })?;
        Ok(machine)
    }

    fn wait_for_systemd(&mut self) -> anyhow::Result<()> {
        let pid = self.script.id();
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.script.try_wait()? {
                bail!("the machine has ended ({status})");
            }
            ensure!(Instant::now() < until, "no process 1 in a minute");
            let children =
                std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            let child: Option<u32> = children.split_whitespace().next().and_then(|child| child.parse().ok());
            // Before it is systemd it is the script that still builds the root, and nobody may come in.
            let exe = child.and_then(|child| std::fs::read_link(format!("/proc/{child}/exe")).ok());
            if let (Some(child), Some(exe)) = (child, exe)
                && exe.ends_with("systemd")
            {
                self.init = child;
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // "degraded" counts: it says that a service of the host's own, none of ours, could not start.
        while !matches!(self.show_state().as_str(), "running" | "degraded") {
            ensure!(Instant::now() < until, "it is {} after a minute", self.show_state());
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn show_state(&self) -> String {
        let output = self.command(&["systemctl", "is-system-running"]).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    }

    /// Returns where a path of the machine is for us.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// Returns a command that runs in the machine, as root and outside of every unit.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]);
        command.args(["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--"]);
        command.args(words).env_clear().stdin(Stdio::null());
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root").env("LC_ALL", "C.UTF-8");
        command
    }

    /// Runs a command in the machine, whatever comes of it.
    pub(crate) fn try_run(&self, words: &[&str]) -> anyhow::Result<Output> {
        self.command(words).output().with_context(|| format!("cannot run {}", words.join(" ")))
    }

    /// Runs a command in the machine that must succeed; returns its standard output.
    pub(crate) fn run(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = self.try_run(words)?;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{} ({})\n{stdout}{stderr}", words.join(" "), output.status);
        Ok(stdout.trim().to_owned())
    }

    /// Writes a file of the machine, and the directories above it.
    pub(crate) fn write(&self, inside: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(inside);
        std::fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {inside}"))
    }

    /// Reads a file of the machine.
    pub(crate) fn read(&self, inside: &str) -> anyhow::Result<String> {
        std::fs::read_to_string(self.path(inside)).with_context(|| format!("cannot read {inside}"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // `unshare --kill-child` kills process 1, and the kernel everything else of its namespace.
        let _ended_already = self.script.kill();
        let _reaped = self.script.wait();
        remove_cgroup(&self.cgroup);
    }
}

fn cgroup_mount() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines.find_map(|mut words| {
        let path = words.nth(1)?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Returns the cgroup that the script makes for a machine.
fn cgroup_of(dir: &Path) -> anyhow::Result<PathBuf> {
    let mount = cgroup_mount().context("no cgroup v2 is mounted here")?;
    Ok(mount.join(dir.file_name().context("the directory has a name")?))
}

/// Removes a cgroup and those below it. Its last processes may take a moment to go.
fn remove_cgroup(cgroup: &Path) {
    for _ in 0..50 {
        remove_empty(cgroup);
        if !cgroup.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Removes what has no processes of a tree of cgroups, the deepest first.
fn remove_empty(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for child in entries.map(|entry| entry.path()).filter(|path| path.is_dir()) {
        remove_empty(&child);
    }
    // One with processes stays.
    let _busy = std::fs::remove_dir(dir);
}
