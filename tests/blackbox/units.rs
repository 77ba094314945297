//! The systemd units are understood by systemd, word for word.

use std::process::Command;

use crate::environment::{Ran, TestEnv, root};

#[test]
fn systemd_finds_nothing_to_complain_about_in_either_unit() {
    if let Err(error) = Command::new("systemd-analyze").arg("--version").output() {
        println!("skipped: there is no systemd-analyze here: {error}");
        return;
    }
    for (file, command, manager) in [
        ("mhtraind.service", "ExecStart=/usr/bin/mhtraind serve", "--system"),
        ("mhtraind-user.service", "ExecStart=mhtraind serve", "--user"),
    ] {
        let env = TestEnv::new();
        let unit = std::fs::read_to_string(root().join("systemd").join(file)).unwrap();
        assert!(unit.lines().any(|line| line == command), "{file} has no line {command}");
        // `verify` looks for the executable, and does not look in ExecSearchPath=.
        let built = format!("ExecStart={} serve", env!("CARGO_BIN_EXE_mhtraind"));
        let path = env.write(file, unit.replace(command, &built));
        let output = Command::new("systemd-analyze")
            .args(["verify", manager, "--man=no"])
            .arg(path)
            .env("XDG_RUNTIME_DIR", env.path("."))
            .output()
            .unwrap();
        // A key that it does not know is only a warning, so silence is asked for and not the exit code alone.
        let ran = Ran::from(output).expect(0);
        assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""), "{file}");
    }
}
