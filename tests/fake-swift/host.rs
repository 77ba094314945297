//! What the host of a fake trainer has on its disk. Shared by the black-box tests and `cargo xtask`.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// A model of 0.5 B parameters in Qwen2's shape: real sizes, no weights.
const MODEL: &str = r#"{"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": true}"#;

/// Rows of the data set: ten steps of the least effective batch.
const ROWS: u32 = 320;

/// ms-swift's download, played: FAKE_HUB is a directory of models, and one comes when its file `go` is there.
const FAKE_HUB: &str = r#"
import os, pathlib, shutil, sys, time

def safe_snapshot_download(model, revision=None, use_hf=None):
    source = pathlib.Path(os.environ["FAKE_HUB"]) / model
    if not source.is_dir():
        sys.exit(f"huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. Repository Not Found: {model}")
    if (source / "unreachable").exists():
        sys.exit("requests.exceptions.ConnectionError: Max retries exceeded: Failed to establish a new connection")
    while not (source / "go").exists():
        time.sleep(0.02)
    copy = pathlib.Path(os.environ["HF_HUB_CACHE"]) / ("models--" + model.replace("/", "--"))
    (copy / "refs").mkdir(parents=True)
    (copy / "refs/main").write_text("1234")
    shutil.copytree(source, copy / "snapshots/1234")
"#;

/// Writes a local model and a data set of 320 rows, `model/` and `train.jsonl`.
pub(crate) fn make_model_and_data(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir.join("model"))?;
    std::fs::write(dir.join("model/config.json"), MODEL)?;
    let row = |n| format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"<id {n:04}>\"}}]}}\n");
    std::fs::write(dir.join("train.jsonl"), (0..ROWS).map(row).collect::<String>())
}

/// Makes a virtual environment that looks like one with ms-swift in it, whose sft script is the one given.
pub(crate) fn make_trainer(venv: &Path, sft: &Path, ms_swift: &str, transformers: &str) -> io::Result<()> {
    let made = Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(venv).status()?;
    if !made.success() {
        return Err(io::Error::other(format!("python3 -m venv ended with {made}")));
    }
    let mut lib =
        std::fs::read_dir(venv.join("lib"))?.flatten().map(|entry| entry.path().join("site-packages"));
    let site = lib.find(|path| path.is_dir()).ok_or_else(|| io::Error::other("no site-packages"))?;
    let packages =
        [("ms_swift", ms_swift), ("torch", "2.15.0"), ("transformers", transformers), ("peft", "0.20.0")];
    for (name, version) in packages {
        let dir = site.join(format!("{name}-{version}.dist-info"));
        std::fs::create_dir_all(&dir)?;
        let name = name.replace('_', "-");
        std::fs::write(
            dir.join("METADATA"),
            format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"),
        )?;
    }
    let cli = site.join("swift/cli");
    std::fs::create_dir_all(&cli)?;
    let dataset = "def load_dataset(*_, **__): pass\n";
    for (file, text) in [("__init__", ""), ("utils", FAKE_HUB), ("dataset", dataset)] {
        std::fs::write(site.join(format!("swift/{file}.py")), text)?;
    }
    std::fs::copy(sft, cli.join("sft.py"))?;
    let python = venv.join("bin/python");
    let wrapper = venv.join("bin/swift");
    let script = format!("#!{}\nimport sys\nsys.exit('the wrapper is not used')\n", python.display());
    std::fs::write(&wrapper, script)?;
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))
}
