"""Where are mhtraind, torch and ms-swift, and what is done where ms-swift is missing?"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from suite import ROOT, stop_with

MS_SWIFT = "4.6.0"
# Asked in the interpreter itself; nothing is imported.
ASK = """
import importlib.metadata as metadata, json, os, sys, sysconfig
found = {}
for name in ("ms-swift", "torch", "transformers", "peft", "accelerate", "flash-attn", "bitsandbytes"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
standard |= {os.path.join(place, "lib-dynload") for place in standard}
path = [entry for entry in sys.path if os.path.isdir(entry) and entry not in standard]
print(json.dumps({"packages": found, "path": path, "own": sysconfig.get_path("purelib")}))
"""
NEEDED = ("torch", "transformers", "peft", "accelerate")


def mhtraind(wish):
    """Returns the program: as wished, as built here, or as on the PATH."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    places = [wish] if wish else [target / "release/mhtraind", target / "debug/mhtraind", shutil.which("mhtraind")]
    for place in places:
        if place and pathlib.Path(place).is_file():
            return pathlib.Path(place).resolve()
    stop_with("there is no mhtraind: build it (cargo build --release --workspace), or name it with --mhtraind")


def ask(python):
    """Returns {packages: {name: version}, path: [directories with packages], own: the one that is installed into}."""
    done = subprocess.run([str(python), "-c", ASK], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        stop_with(f"{python} cannot be asked: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def trainer(wish, wheels, folder):
    """Returns (python, swift, packages): of the interpreter that is wished for, of this one, of the environment that
    `mhtraind install-trainer` makes, or of one that is made here from wheels."""
    data = pathlib.Path(os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local/share")
    installed = data / f"mhtraind/trainers/ms-swift-{MS_SWIFT}/bin/python"
    made = folder / "trainer/bin/python"
    for python in [wish] if wish else [made, sys.executable, installed]:
        python = pathlib.Path(python).absolute()
        if not python.is_file():
            continue
        packages = ask(python)["packages"]
        if "ms-swift" in packages and "torch" in packages:
            swift = python.parent / "swift"
            if not swift.is_file():
                stop_with(f"{python} has ms-swift, but there is no {swift}")
            return python, swift, packages
    if wheels:
        make(wish or sys.executable, pathlib.Path(wheels), folder / "trainer")
        return trainer(made, None, folder)
    stop_with(
        "there is no interpreter with torch and ms-swift: name one with --python, run `mhtraind install-trainer`, or give "
        "a folder of wheels with --wheels"
    )


def pip_command(base):
    """Returns a pip that can install for another interpreter: environments often have none of their own."""
    for python in (base, sys.executable, shutil.which("python3")):
        command = [str(python), "-m", "pip"]
        if python and subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0:
            return command
    stop_with("ms-swift is to be installed from wheels, and there is no pip")


def make(base, wheels, place):
    """Makes an environment with ms-swift from wheels on top of what an interpreter has; no network, nothing is changed
    there."""
    found = ask(base)
    missing = [name for name in NEEDED if name not in found["packages"]]
    if missing and "torch" in missing:
        stop_with(f"{base} has no torch, and wheels are taken for ms-swift alone")
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([str(base), "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin/python"
    # What the other interpreter sees is seen here as well, behind what is installed here. `--system-site-packages` would
    # miss it where that interpreter is itself that of an environment.
    pathlib.Path(ask(python)["own"], "beneath.pth").write_text("\n".join(found["path"]) + "\n", encoding="utf-8")
    pip = [*pip_command(base), "--python", str(python), "install", "--no-index", "--find-links", str(wheels)]
    done = subprocess.run([*pip, *missing, f"ms-swift=={MS_SWIFT}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(place, ignore_errors=True)
        stop_with(f"ms-swift cannot be installed from {wheels}: {done.stderr.strip()[-600:]}")
