"""Plugin for --external_plugins (ms-swift 3.x and 4.x), beside row_order.py: writes down which steps were finished.

Appends to the file ORDER_LOG, between the lines of row_order.py, one JSON line an event:

    {"event": "begin" | "done" | "saved" | "end", "step": ..., "pid": ..., "cpu": seconds of this process so far}

A training begins after `step` steps (0: from zero; more: it was resumed), an optimizer step is done, a checkpoint was saved,
the process is about to leave. One process may begin several times: `auto_find_batch_size` does. Without ORDER_LOG nothing.
"""

import atexit
import functools
import json
import os
import time

import torch
from transformers import Trainer, TrainerCallback

PATH, OWNER = os.environ.get("ORDER_LOG"), os.getpid()


def write_down(event, step):
    # A data loader worker is a fork of this process, and leaves through here as well.
    if os.getpid() != OWNER:
        return
    line = {"event": event, "step": step, "pid": OWNER, "cpu": round(time.process_time(), 3)}
    with open(PATH, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Witness(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        write_down("begin", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        write_down("done", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        write_down("saved", state.global_step)


def witnessed(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Witness())

    return __init__


# A data loader worker may load plugins again (ms-swift 4.x), and trains nothing.
if PATH and torch.utils.data.get_worker_info() is None:
    Trainer.__init__ = witnessed(Trainer.__init__)
    atexit.register(write_down, "end", 0)
