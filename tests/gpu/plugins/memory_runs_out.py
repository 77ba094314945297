"""Plugin for --external_plugins (ms-swift 3.x and 4.x): a real torch.OutOfMemoryError at a chosen step.

    GPU_SUITE_RUNS_OUT     own: this process takes nearly all that is left on the card, so the pass cannot be had
                           neighbour: it gives back what it does not use, and waits until somebody else has taken it
    GPU_SUITE_AT_STEP      the optimizer step, counted from 1
    GPU_SUITE_ONCE         a file that is made then; where it is, nothing happens any more
    GPU_SUITE_GROWN        neighbour: the file that says that somebody has taken the memory
    GPU_SUITE_EVENTS       the file that step_clock.py writes to

In a dry run (GPU_SUITE_SIMULATION names the demo's simulated_capacity.py) the card's capacity is simulated as in the demo,
other processes' memory is what nvml-sim's directory says, and the same is done there.
"""

import functools
import importlib.util
import json
import os
import pathlib
import time

import torch
from transformers import Trainer

# Of what the pass needs so much is left: it begins, and does not come to its end.
SHARE_LEFT = 0.3
PIECE = 1 << 30
NEIGHBOUR_S_MAX = 90


def bytes_left(dynamic, tokens, most_tokens):
    """Returns what is left to a pass of `tokens`, when passes of up to `most_tokens` took up to `dynamic` bytes."""
    return int(SHARE_LEFT * dynamic * tokens / max(most_tokens, tokens, 1))


def say(event, **facts):
    line = {"event": event, "time": time.time(), "pid": os.getpid(), **facts}
    with open(os.environ["GPU_SUITE_EVENTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class CudaCard:
    def __init__(self):
        self.held = []

    def dynamic(self):
        """Returns what passes have taken beside what stays."""
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def give_back_unused(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def free(self):
        return torch.cuda.mem_get_info()[0]

    def take(self, size):
        while size > 0:
            piece = min(size, PIECE)
            try:
                self.held.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                # The last piece was rounded up to more than there is. The error is to come from the pass itself.
                break
            size -= piece

    def one_pass(self, trainer, inputs, original):
        return original()


class SimulatedCard:
    """The demo's device, with the memory of others as nvml-sim shows it."""

    def __init__(self, path):
        settings = {name: value for name, value in os.environ.items() if name.startswith("GPU_SUITE_SIM_")}
        spec = importlib.util.spec_from_file_location("simulated_capacity", path)
        self.demo = importlib.util.module_from_spec(spec)
        # Loaded without its settings it leaves the Trainer alone.
        spec.loader.exec_module(self.demo)
        os.environ.update({name.replace("GPU_SUITE_SIM_", "MHT_SIM_"): value for name, value in settings.items()})
        self.device = self.demo.Device()
        self.pass_bytes = 0
        self.device.publish(self.device.resident)

    def others(self):
        folder, total = pathlib.Path(os.environ["NVML_SIM_USAGE"]), 0
        for path in folder.glob("GPU-*"):
            pid = path.name.rpartition(".")[2]
            if pid != str(os.getpid()) and pathlib.Path("/proc", pid).exists():
                try:
                    total += int(path.read_text(encoding="ascii"))
                except (OSError, ValueError):  # It is being written, or its process has just ended.
                    pass
        return total

    def dynamic(self):
        return self.pass_bytes

    def give_back_unused(self):
        self.device.publish(self.device.resident)

    def free(self):
        return self.device.total - self.others() - self.device.resident

    def take(self, size):
        self.device.resident += size
        self.device.publish(self.device.resident)

    def one_pass(self, trainer, inputs, original):
        rows, longest = inputs["input_ids"].shape[:2]
        self.device.others = self.others()
        self.pass_bytes = max(self.pass_bytes, rows * longest * self.device.per_token)
        error = self.device.begin_pass(rows, longest, trainer.state.global_step + 1)
        hook = self.demo.raise_inside(trainer.model, error) if error else None
        try:
            return original()
        finally:
            if hook is not None:
                hook.remove()


class RunsOut:
    def __init__(self, card):
        self.card, self.most_tokens = card, 0
        self.how, self.step = os.environ.get("GPU_SUITE_RUNS_OUT"), int(os.environ.get("GPU_SUITE_AT_STEP", "0"))
        self.once = pathlib.Path(os.environ.get("GPU_SUITE_ONCE", "/nowhere"))

    def is_due(self, trainer):
        preflight = getattr(trainer, "mhtraind_preflight", False)
        return bool(self.how) and not preflight and trainer.state.global_step + 1 == self.step and not self.once.exists()

    def before_pass(self, trainer, inputs):
        tokens = inputs["input_ids"].numel()
        if self.is_due(trainer):
            self.once.touch()
            left = bytes_left(self.card.dynamic(), tokens, self.most_tokens)
            self.card.give_back_unused()
            if self.how == "own":
                size = self.card.free() - left
                self.card.take(max(size, 0))
                say("taken", bytes=size, left=left)
            else:
                say("may_grow", left=left)
                self.wait_for_neighbour()
        self.most_tokens = max(self.most_tokens, tokens)

    def wait_for_neighbour(self):
        grown, until = pathlib.Path(os.environ["GPU_SUITE_GROWN"]), time.monotonic() + NEIGHBOUR_S_MAX
        while not grown.exists() and time.monotonic() < until:
            time.sleep(0.05)
        say("grown", free=self.card.free())


def wrap(original, state):
    @functools.wraps(original)
    def training_step(self, model, inputs, *args, **kwargs):
        state.before_pass(self, inputs)
        return state.card.one_pass(self, inputs, lambda: original(self, model, inputs, *args, **kwargs))

    return training_step


def main():
    simulation = os.environ.get("GPU_SUITE_SIMULATION")
    card = SimulatedCard(simulation) if simulation else CudaCard()
    Trainer.training_step = wrap(Trainer.training_step, RunsOut(card))


# A data loader worker may load plugins again (ms-swift 4.x), and has no passes.
if os.environ.get("GPU_SUITE_EVENTS") and torch.utils.data.get_worker_info() is None:
    main()
