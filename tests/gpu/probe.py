"""Part 2: does `mhtraind probe` say what nvidia-smi says, field by field?"""

import csv
import io
import json
import os
import re

from suite import Failed, run, say
from trainings import Ballast

MIB = 1 << 20
# nvidia-smi writes whole MiB.
ROUNDING = MIB
# What other programs may take or give between the two questions.
DRIFT = 64 * MIB
# A process of ours holds so much, so that there is one to be listed.
HELD_FREE_SHARE = 0.9

FIELDS = [
    "index", "uuid", "name", "compute_cap", "memory.total", "memory.reserved", "memory.used", "memory.free",
    "compute_mode", "mig.mode.current", "driver_version",
]
EXPECTED_S = 20
# mhtraind's words for what nvidia-smi calls otherwise.
COMPUTE_MODES = {
    "default": "Default", "exclusive_thread": "Exclusive_Thread", "prohibited": "Prohibited",
    "exclusive_process": "Exclusive_Process",
}
MIG_MODES = {"not_supported": "[N/A]", "disabled": "Disabled", "enabled": "Enabled"}


def smi_command():
    # A dry run has a stand-in that answers in the same form.
    return os.environ.get("GPU_SUITE_NVIDIA_SMI", "nvidia-smi").split()


def read_smi(suite, index):
    """Returns {field: text} of one card, its processes as {pid: MiB or None}, and the CUDA version."""
    query = f"--query-gpu={','.join(FIELDS)}"
    text = run(suite, [*smi_command(), query, "--format=csv,noheader,nounits", f"--id={index}"], 30).stdout
    fields = parse_fields(text)
    query = "--query-compute-apps=pid,used_memory"
    text = run(suite, [*smi_command(), query, "--format=csv,noheader,nounits", f"--id={index}"], 30).stdout
    found = re.search(r"CUDA Version\s*:\s*([\d.]+)", run(suite, [*smi_command(), "-q", f"--id={index}"], 30).stdout)
    return {**fields, "processes": parse_processes(text), "cuda": found and found[1]}


def parse_fields(text):
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    if len(rows) != 1 or len(rows[0]) != len(FIELDS):
        raise Failed(f"nvidia-smi answered {text[:300]!r}")
    return dict(zip(FIELDS, rows[0]))


def parse_processes(text):
    """Returns {pid: MiB}; None where nvidia-smi does not say how much."""
    processes = {}
    for row in csv.reader(io.StringIO(text)):
        cells = [cell.strip() for cell in row]
        if len(cells) == 2 and cells[0].isdigit():
            processes[int(cells[0])] = int(cells[1]) if cells[1].isdigit() else None
    return processes


def compare(probed, smi):
    """Returns [(field, what probe says, what nvidia-smi says, whether that is the same)].

    `probed` is the answer of `mhtraind probe --json` for this card, with the driver's versions put in.
    """
    memory = probed["memory"] or {}
    table = [
        ("index", str(probed["index"]), smi["index"]),
        ("uuid", probed["uuid"], smi["uuid"]),
        ("name", probed["name"], smi["name"]),
        ("compute capability", probed["compute_capability"], smi["compute_cap"]),
        ("driver", probed["driver"], smi["driver_version"]),
        ("CUDA", probed["cuda"], smi["cuda"]),
        ("compute mode", COMPUTE_MODES.get(probed["compute_mode"], probed["compute_mode"]), smi["compute_mode"]),
        ("MIG", MIG_MODES.get(probed["mig"], probed["mig"]), smi["mig.mode.current"]),
    ]
    rows = [(field, ours, theirs, ours == theirs) for field, ours, theirs in table]
    for field in ("total", "reserved", "used", "free"):
        near = DRIFT if field in ("used", "free") else ROUNDING
        rows.append(amount_row(f"memory {field}", memory.get(field), smi[f"memory.{field}"], near))
    ours = {process["pid"]: process["used"] for process in probed["processes"] or []}
    theirs = smi["processes"]
    rows.append(("processes", words(sorted(ours)), words(sorted(theirs)), sorted(ours) == sorted(theirs)))
    for pid in sorted(set(ours) & set(theirs)):
        rows.append(amount_row(f"held by pid {pid}", ours[pid], theirs[pid], ROUNDING))
    return rows


def amount_row(field, ours, theirs, near):
    """Compares bytes with nvidia-smi's MiB, which may be a text that is no number."""
    mib = int(theirs) if str(theirs).isdigit() else None
    same = (ours is None) == (mib is None) and (ours is None or abs(ours - mib * MIB) <= near)
    ours_text = "not available" if ours is None else f"{ours / MIB:.1f} MiB"
    return (field, ours_text, "not available" if mib is None else f"{mib} MiB", same)


def words(pids):
    return ", ".join(map(str, pids)) or "none"


def measure(suite, _point):
    """Asks nvidia-smi, then mhtraind, then nvidia-smi, while a process of ours holds a tenth of the card."""
    index = suite.device["index"]
    free = suite.nvml.memory(index)["free"]
    with Ballast(suite) as ballast:
        ballast.leave(int(HELD_FREE_SHARE * free))
        before = read_smi(suite, index)
        report = json.loads(run(suite, [suite.mhtraind, "probe", "--json"], 60, env=suite.trainer_env()).stdout)
        after = read_smi(suite, index)
    gpus = report["gpus"]
    if gpus["state"] != "ready":
        raise Failed(f"`mhtraind probe` sees no cards: {gpus}")
    probed = next(card for card in gpus["devices"] if card["uuid"] == suite.device["uuid"])
    probed.update(driver=gpus["driver"], cuda=gpus["cuda"])
    # What moved between the questions is compared with the nearer of the two answers.
    first, second = compare(probed, before), compare(probed, after)
    rows = [one if one[3] else other for one, other in zip(first, second)] if len(first) == len(second) else second
    for field, ours, theirs, same in rows:
        say(f"  {'same ' if same else 'OTHER'} {field}: {ours} / {theirs}")
    return {"rows": rows, "notes": probed["notes"], "ok": all(same for *_, same in rows)}
