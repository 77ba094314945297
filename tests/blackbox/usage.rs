//! What every command does alike: help, errors, exit codes.

use std::process::Command;

use crate::environment::{Ran, TestEnv};

/// Every command that can be typed.
const COMMANDS: [&str; 24] = [
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
    "completions",
    "man-pages",
];

#[test]
fn every_command_has_help_with_an_example() {
    let env = TestEnv::new();
    for command in COMMANDS {
        let help = env.run(&[command, "--help"]).expect(0).stdout;
        assert!(help.contains("Example"), "{command}: {help}");
    }
    let all = env.run(&["--help"]).expect(0).stdout;
    for command in COMMANDS {
        assert!(all.contains(command), "{command}");
    }
}

#[test]
fn the_list_of_commands_here_is_the_list_of_the_binary() {
    let help = TestEnv::new().run(&["--help"]).expect(0).stdout;
    let listed = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let mut names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    names.sort_unstable();
    let mut known = COMMANDS;
    known.sort_unstable();
    assert_eq!(names, known);
}

#[test]
fn completions_of_each_shell_know_every_command() {
    let env = TestEnv::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = env.run(&["completions", shell]).expect(0).stdout;
        for command in COMMANDS {
            assert!(script.contains(command), "{shell}: {command}");
        }
        assert!(script.contains("gpu-free"), "{shell}: the flags too");
        let file = env.write(&format!("completion.{shell}"), script);
        // Each shell reads its own script; one that is not installed cannot.
        match Command::new(shell).arg("-n").arg(&file).output() {
            Ok(output) => {
                let ran = Ran::from(output).expect(0);
                assert_eq!(ran.stderr, "", "{shell}");
            }
            Err(error) => println!("skipped: {shell} cannot read its script: {error}"),
        }
    }
    env.run(&["completions", "cmd.exe"]).expect(2);
}

#[test]
fn bash_completes_a_command_and_a_flag() {
    let env = TestEnv::new();
    let file = env.write("completion.bash", env.run(&["completions", "bash"]).expect(0).stdout);
    let complete = |line: &str| {
        let script = format!(
            "source {}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _mhtraind mhtraind \"${{COMP_WORDS[COMP_CWORD]}}\" x; echo \"${{COMPREPLY[*]}}\"",
            file.display()
        );
        Ran::from(Command::new("bash").args(["-c", &script]).output().unwrap()).expect(0).stdout
    };
    assert_eq!(complete("mhtraind subm").trim(), "submit");
    assert_eq!(complete("mhtraind plan --gpu-fr").trim(), "--gpu-free");
}

#[test]
fn every_command_has_a_man_page_with_its_examples() {
    let env = TestEnv::new();
    env.run(&["man-pages", "made/man1"]).expect(0);
    let page = |name: &str| std::fs::read_to_string(env.path(&format!("made/man1/{name}.1"))).unwrap();
    for command in COMMANDS {
        let page = page(&format!("mhtraind-{command}"));
        let examples = page.split(".SH EXAMPLES").nth(1).unwrap_or_else(|| panic!("{command}: {page}"));
        assert!(examples.contains("mhtraind") || examples.contains("systemctl"), "{command}: {examples}");
    }
    let root = page("mhtraind");
    assert!(root.contains("mhtraind\\-submit(1)") && root.contains("Exit codes"), "{root}");
    assert_eq!(std::fs::read_dir(env.path("made/man1")).unwrap().count(), COMMANDS.len() + 1);
    env.write("file", "");
    env.run(&["man-pages", "file"]).expect(1);
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
