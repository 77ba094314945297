"""Plugin for --external_plugins (ms-swift 3.x and 4.x): writes down which rows every micro-batch holds.

Appends to the file ORDER_LOG one JSON line a micro-batch: {"step": the optimizer step that it belongs to, counted from
1, "rows": how many, "longest": padded tokens, "ids": the NNNN of the rows' markers `<id NNNN>`, "pid": whose it is}.
Without ORDER_LOG it does nothing. The companion's preflight is no training and is left out.
"""

import functools
import json
import os
import re

from transformers import Trainer

MARKER = re.compile(r"<id (\d{4})>")


def write_down(trainer, input_ids, path):
    processor = trainer.processing_class if getattr(trainer, "processing_class", None) else trainer.template.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = [int(marker) for row in input_ids.tolist() for marker in MARKER.findall(tokenizer.decode(row))]
    line = {"step": trainer.state.global_step + 1, "rows": input_ids.shape[0], "longest": input_ids.shape[1], "ids": ids}
    line["pid"] = os.getpid()
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def wrap(original):
    @functools.wraps(original)
    def training_step(self, model, inputs, *args, **kwargs):
        trains = not getattr(self, "mhtraind_preflight", False)
        if trains and os.environ.get("ORDER_LOG") and "input_ids" in inputs:
            write_down(self, inputs["input_ids"], os.environ["ORDER_LOG"])
        return original(self, model, inputs, *args, **kwargs)

    return training_step


Trainer.training_step = wrap(Trainer.training_step)
