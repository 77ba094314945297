"""What stands in for a card in a dry run: nvml-sim's file and directory, and a script in the place of nvidia-smi."""

import json
import pathlib
import sys

from suite import HERE
from trainings import SIMULATED_TOTAL

UUID = "GPU-51111111-0000-4000-8000-000000000001"


def prepare(folder, library):
    """Writes a machine with one idle card and returns the environment in which it is seen."""
    usage = folder / "nvml-sim-usage"
    usage.mkdir(parents=True, exist_ok=True)
    card = {"uuid": UUID, "name": "Simulated GPU", "total": SIMULATED_TOTAL, "compute_capability": "9.0", "mig": False}
    path = folder / "nvml-sim.json"
    path.write_text(json.dumps({"version": 1, "devices": [card]}), encoding="utf-8")
    return {
        "MHTRAIND_NVML_LIBRARY": str(library),
        "NVML_SIM_FILE": str(path),
        "NVML_SIM_USAGE": str(usage),
        "GPU_SUITE_NVIDIA_SMI": f"{sys.executable} {HERE / 'simulated_smi.py'}",
    }


def find_library(mhtraind):
    """Returns nvml-sim's library, which cargo builds beside the program; None where it is not there."""
    folder = pathlib.Path(mhtraind).resolve().parent
    places = [folder / "deps" / "libnvml_sim.so", folder / "libnvml_sim.so"]
    return next((place for place in places if place.is_file()), None)
