"""Plugin for --external_plugins: kills the companion's rescue at many moments and looks at what is left. For tests.

In the third pass of step KILL_STEP it forks this process again and again. Each fork runs the companion's rescue in a
directory of its own, in which a partial checkpoint of that very step lies, and is ended by SIGKILL: before its k-th
file operation, for each k from the first rename on and for a sample of those before, and after random times. The
rescued files of a fork that nobody killed are the measure. One JSON line for each into KILL_LOG:

    {"at": "os.rename" or a time, "left": "partial" | "nothing" | "whole" | "broken: why"}

Then the error goes its way in this process as well.
"""

import functools
import json
import os
import random
import signal
import sys
import time

import torch
from safetensors.torch import load_file
from transformers import Trainer

STEP, LOG = int(os.environ.get("KILL_STEP", "0")), os.environ.get("KILL_LOG")
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree", "os.listdir"}
EARLY, RANDOM = 20, 10


def fork(trainer, place, kill_before=None, events_into=None):
    """Starts a rescue in a fork and returns its pid."""
    step = trainer.state.global_step
    partial = os.path.join(place, f"checkpoint-{step}")
    os.makedirs(partial)
    with open(os.path.join(partial, "partial"), "w", encoding="ascii") as file:
        file.write("a trainer was killed while it saved this")
    pid = os.fork()
    if pid:
        return pid
    seen = []

    def count(event, args):
        if event in EVENTS and os.getpid() != parent:
            seen.append(event)
            if len(seen) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    parent = os.getppid()
    trainer.args.output_dir = place
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
    except torch.OutOfMemoryError as error:
        sys.addaudithook(count)
        trainer.mhtraind.rescue(error)
    events = list(seen)
    if events_into is not None:
        with open(events_into, "w", encoding="ascii") as file:
            json.dump(events, file)
    os._exit(0)


def left_in(place, step, measure):
    """Says what a resume would find."""
    checkpoint = os.path.join(place, f"checkpoint-{step}")
    if not os.path.exists(checkpoint):
        return "nothing"
    names = sorted(os.listdir(checkpoint))
    if names == ["partial"]:
        return "partial"
    if names != sorted(os.listdir(measure)):
        return f"broken: {names}"
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            if json.load(file)["global_step"] != step:
                return "broken: another step"
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(os.path.join(checkpoint, name), weights_only=True)
        weights = next(name for name in names if name.endswith(".safetensors"))
        ours, theirs = (load_file(os.path.join(place, weights)) for place in (checkpoint, measure))
        if any(not torch.equal(ours[name], theirs[name]) for name in theirs):
            return "broken: other weights"
    except Exception as error:
        return f"broken: {error!r}"
    return "whole"


def kill_and_look(trainer):
    step, base = trainer.state.global_step, trainer.args.output_dir
    rng = random.Random(20)
    events_file, measured = os.path.join(base, "events.json"), os.path.join(base, "kill-measure")
    began = time.monotonic()
    os.waitpid(fork(trainer, measured, events_into=events_file), 0)
    took = time.monotonic() - began
    with open(events_file, encoding="ascii") as file:
        events = json.load(file)
    measure = os.path.join(measured, f"checkpoint-{step}")
    late = events.index("os.rename") + 1
    moments = sorted(rng.sample(range(1, late), min(EARLY, late - 1))) + list(range(late, len(events) + 1))
    with open(LOG, "a", encoding="ascii") as log:
        for number, moment in enumerate(moments + [None] * RANDOM):
            place = os.path.join(base, f"kill-{number}")
            pid = fork(trainer, place, kill_before=moment)
            at = events[moment - 1] if moment else round(rng.uniform(0, took), 4)
            if moment is None:
                time.sleep(at)
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            print(json.dumps({"at": at, "left": left_in(place, step, measure)}), file=log, flush=True)


def wrap(original):
    @functools.wraps(original)
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step + 1 == STEP and not getattr(self, "mhtraind_preflight", False):
            self.passes = getattr(self, "passes", 0) + 1
            if self.passes == 3:
                kill_and_look(self)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
        return original(self, model, inputs, *args, **kwargs)

    return training_step


if STEP and LOG:
    Trainer.training_step = wrap(Trainer.training_step)
