//! Which checkpoints are on disk, and how is a repaired one shown to the trainer?
//!
//! The decision is `mhtrain-swift`'s; this module reads the facts for it and makes the view that it asks for.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mhtrain_swift::checkpoint::{CheckpointFacts, TrainerState};

use super::directory::read_plain;

/// Largest trainer_state.json that is read, in bytes. It holds every log line of a run: 64 MiB are millions of steps.
const STATE_BYTES_MAX: u64 = 64 << 20;

/// Returns the checkpoints in a directory that a trainer wrote to, in no order. A missing directory holds none.
///
/// # Errors
/// The directory is there and cannot be listed.
pub fn checkpoints_in(output_dir: &Path) -> std::io::Result<Vec<CheckpointFacts>> {
    let entries = match fs::read_dir(output_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("checkpoint-")?.parse().ok());
        if let Some(step) = step
            && entry.file_type()?.is_dir()
        {
            found.push(facts(entry.path(), step));
        }
    }
    Ok(found)
}

/// Returns what is known about one checkpoint; a file that cannot be read counts as absent.
pub fn facts(path: PathBuf, step: u64) -> CheckpointFacts {
    let holds = |names: &[&str]| names.iter().any(|name| is_filled(&path.join(name)));
    let state = read_state(&path.join("trainer_state.json"));
    let has_rng = fs::read_dir(&path).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("rng_state"))
    });
    CheckpointFacts {
        step,
        state,
        has_optimizer: holds(&["optimizer.pt", "optimizer.bin"]),
        has_scheduler: holds(&["scheduler.pt"]),
        has_rng,
        has_weights: holds(&[
            "adapter_model.safetensors",
            "adapter_model.bin",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ]),
        path,
    }
}

fn is_filled(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() > 0)
}

fn read_state(path: &Path) -> Option<TrainerState> {
    let text = read_plain(path, STATE_BYTES_MAX).ok()?;
    TrainerState::parse(&String::from_utf8(text).ok()?).ok()
}

/// Makes a view of a checkpoint in which only trainer_state.json differs: hard links to every other file. The
/// original is not touched, and the view costs no space.
///
/// Returns the view's path, `<parent>/checkpoint-N`: the trainer reads the step from the name.
///
/// # Errors
/// The file system has no hard links between the two places, or something cannot be written.
pub fn repaired_view(checkpoint: &Path, state: &str, parent: &Path) -> std::io::Result<PathBuf> {
    let name = checkpoint.file_name().ok_or_else(|| std::io::Error::other("the checkpoint has no name"))?;
    let view = parent.join(name);
    fs::create_dir_all(&view)?;
    link_tree(checkpoint, &view, Some("trainer_state.json"))?;
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(view.join("trainer_state.json"))?;
    std::io::Write::write_all(&mut file, state.as_bytes())?;
    file.sync_all()?;
    Ok(view)
}

fn link_tree(from: &Path, to: &Path, except: Option<&str>) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if except.is_some_and(|except| name == except) {
            continue;
        }
        let target = to.join(&name);
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            link_tree(&entry.path(), &target, None)?;
        } else if let Err(e) = fs::hard_link(entry.path(), &target)
            && e.kind() != std::io::ErrorKind::AlreadyExists
        {
            // Some shared file systems have no hard links; an absolute symbolic link serves as well.
            std::os::unix::fs::symlink(fs::canonicalize(entry.path())?, &target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATE: &str = r#"{"global_step": 5, "max_steps": 20, "train_batch_size": 8, "epoch": 0.5, "log_history": [{"loss": NaN}]}"#;

    fn checkpoint(dir: &Path, step: u64) -> PathBuf {
        let path = dir.join(format!("checkpoint-{step}"));
        fs::create_dir_all(path.join("sub")).unwrap();
        for name in ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sub/x"] {
            fs::write(path.join(name), name).unwrap();
        }
        fs::write(path.join("trainer_state.json"), STATE).unwrap();
        path
    }

    #[test]
    fn whole_and_half_written_checkpoints_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        checkpoint(dir.path(), 5);
        let half = checkpoint(dir.path(), 10);
        fs::remove_file(half.join("scheduler.pt")).unwrap();
        fs::create_dir(dir.path().join("checkpoint-x")).unwrap();
        fs::write(dir.path().join("checkpoint-7"), "a file").unwrap();
        let mut found = checkpoints_in(dir.path()).unwrap();
        found.sort_by_key(|facts| facts.step);
        assert_eq!(found.iter().map(|facts| facts.step).collect::<Vec<_>>(), [5, 10]);
        assert!(found[0].is_complete());
        assert!(!found[1].is_complete());
        assert!(checkpoints_in(&dir.path().join("absent")).unwrap().is_empty());
    }

    #[test]
    fn a_view_differs_in_the_state_alone_and_leaves_the_original() {
        let dir = tempfile::tempdir().unwrap();
        let original = checkpoint(dir.path(), 5);
        let repaired = TrainerState::parse(STATE).unwrap().with_train_batch_size(4).unwrap();
        let view = repaired_view(&original, &repaired, &dir.path().join("resume")).unwrap();
        assert_eq!(view.file_name(), original.file_name());
        assert_eq!(fs::read_to_string(original.join("trainer_state.json")).unwrap(), STATE);
        assert_eq!(read_state(&view.join("trainer_state.json")).unwrap().train_batch_size, Some(4));
        for name in ["adapter_model.safetensors", "optimizer.pt", "sub/x"] {
            assert_eq!(fs::read_to_string(view.join(name)).unwrap(), name);
        }
        // Made again after a crash in between: the same view.
        assert_eq!(repaired_view(&original, &repaired, &dir.path().join("resume")).unwrap(), view);
    }
}
