//! What every command does alike: help, errors, exit codes.

use crate::environment::TestEnv;

#[test]
fn every_command_has_help_with_an_example() {
    let env = TestEnv::new();
    let commands = [
        "run",
        "plan",
        "estimate",
        "import",
        "diagnose",
        "probe",
        "doctor",
        "schema",
        "install-trainer",
        "demo",
        "serve",
        "submit",
        "status",
        "follow",
        "log",
        "wait",
        "cancel",
        "retry",
        "explain",
        "drain",
        "undrain",
        "rm",
    ];
    for command in commands {
        let help = env.run(&[command, "--help"]).expect(0).stdout;
        assert!(help.contains("Example"), "{command}: {help}");
    }
    let all = env.run(&["--help"]).expect(0).stdout;
    for command in commands {
        assert!(all.contains(command), "{command}");
    }
}

#[test]
fn bad_usage_ends_with_2() {
    let env = TestEnv::new();
    env.run(&["plam", "job.json"]).expect(2);
    env.run(&["plan"]).expect(2);
    env.run(&["plan", "job.json", "--gpu-fre", "1GiB"]).expect(2);
}

#[test]
fn an_unknown_setting_is_an_error_that_names_the_nearest() {
    let env = TestEnv::new();
    let config = env.write("mhtraind.toml", "[nvml]\nlibary = '/x'\n");
    let ran = env.run(&["probe", "--config", config.to_str().unwrap()]).expect(2);
    assert!(ran.stderr.contains("`nvml.library`"), "{}", ran.stderr);
}
