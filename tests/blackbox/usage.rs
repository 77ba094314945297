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
fn bad_usage_is_json_for_who_asked_for_json() {
    let env = TestEnv::new();
    for words in [
        &["plan", "job.json", "--json", "--gpu-fre", "1GiB"][..],
        &["plan", "job.json", "--json", "--gpu-free", "-1"],
        &["plan", "job.json", "--json", "--compute-capability", "eight"],
        &["estimate", "--json", "a", "b"],
        &["import", "--json"],
        &["diagnose", "--json"],
    ] {
        let ran = env.run(words).expect(2);
        let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
        assert_eq!(error["error"]["code"], "usage", "{words:?}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(!message.is_empty() && !message.contains("error:"), "{message}");
        assert_eq!(ran.stdout, "");
    }
    env.run(&["plan", "--json", "--help"]).expect(0);
}

#[test]
fn a_file_that_cannot_be_read_is_one_error_with_help() {
    let env = TestEnv::new();
    env.write("sub/file", "");
    for command in ["plan", "import", "estimate", "diagnose"] {
        for path in ["no-such-file", "sub"] {
            let ran = env.run(&[command, path]).expect(2);
            assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains("help: "), "{}", ran.stderr);
            assert!(ran.stderr.contains(path), "{}", ran.stderr);
        }
    }
}

#[test]
fn an_unknown_setting_is_an_error_that_names_the_nearest() {
    let env = TestEnv::new();
    let config = env.write("mhtraind.toml", "[nvml]\nlibary = '/x'\n");
    let ran = env.run(&["probe", "--config", config.to_str().unwrap()]).expect(2);
    assert!(ran.stderr.contains("`nvml.library`"), "{}", ran.stderr);
}
