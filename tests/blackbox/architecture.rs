//! What the documents promise about the tree.

use crate::environment::root;

#[test]
fn every_path_of_the_question_table_exists() {
    let text = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let table = text.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let mut paths = 0;
    for line in table {
        let words = line.split('`').skip(1).step_by(2);
        for word in words.filter(|word| {
            ["crates/", "config/", "docs/", "systemd/", "tests/"].iter().any(|top| word.starts_with(top))
        }) {
            assert!(root().join(word).exists(), "docs/ARCHITECTURE.md names {word}, which does not exist");
            paths += 1;
        }
    }
    assert!(paths > 10, "the table was found: {paths} paths");
}

#[test]
fn pure_crates_depend_on_no_runtime_database_or_driver() {
    for name in ["mhtrain-sizing", "mhtrain-job", "mhtrain-swift"] {
        let manifest = std::fs::read_to_string(root().join("crates").join(name).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap();
        for forbidden in ["tokio", "rusqlite", "nvml", "sysinfo", "rustix", "libc", "probe", "supervisor"] {
            assert!(!dependencies.contains(forbidden), "{name} depends on {forbidden}");
        }
    }
}

#[test]
fn the_readme_shows_its_two_commands_on_the_first_screen() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let first_screen: String = text.lines().take(40).collect::<Vec<_>>().join("\n");
    for command in ["cargo run --release -- demo", "cargo xtask test"] {
        assert!(first_screen.contains(command), "{command}");
    }
}
