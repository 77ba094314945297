"""Answers as nvidia-smi does, out of nvml-sim: the three questions that probe.py asks. For dry runs."""

import sys

import card

MIB = 1 << 20


def main():
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    nvml, index = card.Nvml(), int(options["id"])
    found, memory = nvml.card(index), nvml.memory(index)
    if "query-gpu" in options:
        answers = {f"memory.{name}": str(amount // MIB) for name, amount in memory.items()}
        answers.update(index=str(index), uuid=found["uuid"], name=found["name"], compute_cap=found["capability"])
        answers.update({"compute_mode": "Default", "mig.mode.current": "Disabled", "driver_version": nvml.driver()})
        print(", ".join(answers[field] for field in options["query-gpu"].split(",")))
    elif "query-compute-apps" in options:
        for pid, used in nvml.processes(index).items():
            print(f"{pid}, {'[N/A]' if used is None else used // MIB}")
    else:
        print(f"CUDA Version                              : {nvml.cuda()}")


main()
