"""Holds memory on the card, so that a stranger's process leaves as much free as it is told. Under the trainer's interpreter.

    python ballast.py FOLDER     # a line {"number": 1, "free": bytes} in FOLDER/wish.json is carried out once

The amount is not corrected afterwards: what the trainer takes later is taken from what was left to it. The answer
{"number": 1, "held": bytes, "free": bytes} goes to FOLDER/held.json. `"free": null` gives everything back. In a dry run
the memory is a number in nvml-sim's directory.
"""

import json
import os
import pathlib
import sys
import time

import card

# Taken in pieces, smaller ones at the end. Below 10 MiB torch would take 20 at once.
PIECES = (1 << 30, 1 << 28, 1 << 25)


class CudaMemory:
    def __init__(self):
        import torch

        self.torch, self.held = torch, []
        torch.cuda.init()
        torch.zeros(1, device="cuda")

    def free(self):
        return self.torch.cuda.mem_get_info()[0]

    def take(self, size):
        """Takes a piece. Returns whether it could be had."""
        try:
            self.held.append(self.torch.empty(size, dtype=self.torch.uint8, device="cuda"))
        except self.torch.OutOfMemoryError:
            return False
        return True

    def give_back(self):
        self.held.clear()
        self.torch.cuda.empty_cache()

    def amount(self):
        return sum(tensor.numel() for tensor in self.held)


class SimulatedMemory:
    def __init__(self):
        self.nvml, self.index = card.Nvml(), int(os.environ["GPU_SUITE_CARD_INDEX"])
        self.path = pathlib.Path(os.environ["NVML_SIM_USAGE"], f"{os.environ['MHT_SIM_DEVICE_UUID']}.{os.getpid()}")
        self.held = 0

    def free(self):
        return self.nvml.memory(self.index)["free"]

    def take(self, size):
        if self.free() < size:
            return False
        self.write(self.held + size)
        return True

    def give_back(self):
        self.write(0)

    def amount(self):
        return self.held

    def write(self, held):
        self.held = held
        beside = self.path.with_name(f".{self.path.name}")
        beside.write_text(str(held), encoding="ascii")
        beside.replace(self.path)


def leave(memory, free):
    """Takes or gives back until about `free` bytes are free."""
    memory.give_back()
    for piece in PIECES:
        while memory.free() - piece >= free and memory.take(piece):
            pass


def answer(folder, wish, memory):
    path = folder / "held.json"
    beside = folder / "held.json.new"
    beside.write_text(json.dumps({"number": wish["number"], "held": memory.amount(), "free": memory.free()}))
    beside.replace(path)


def main():
    folder = pathlib.Path(sys.argv[1])
    memory = SimulatedMemory() if os.environ.get("NVML_SIM_USAGE") else CudaMemory()
    done = None
    # Whoever started this is gone: nobody would ever give the memory back.
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            wish = json.loads((folder / "wish.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            wish = {"number": done}
        if wish["number"] != done:
            if wish["free"] is None:
                memory.give_back()
            else:
                leave(memory, wish["free"])
            done = wish["number"]
            answer(folder, wish, memory)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
