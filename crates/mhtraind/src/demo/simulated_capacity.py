"""Plugin for --external_plugins (ms-swift 3.x and 4.x): training on a device of simulated capacity. For demo and tests.

The training is real, on whatever device there is. Simulated is only how many bytes a pass needs, and how many there
are: a pass over a micro-batch needs MHT_SIM_BYTES_PER_TOKEN for every token of its padded rectangle (rows x longest
row), on top of MHT_SIM_RESIDENT_BYTES. A pass that needs more than the device has left raises torch.OutOfMemoryError
from inside the model, in torch's own words and with figures that add up.

    MHT_SIM_CAPACITY_BYTES     total of the device; without it the plugin does nothing
    MHT_SIM_BYTES_PER_TOKEN    of a pass
    MHT_SIM_RESIDENT_BYTES     what stays between passes: weights, optimizer, context
    MHT_SIM_OTHERS_BYTES       what other processes hold [0]
    MHT_SIM_OTHERS_FILE        a file with that number, read anew before each pass: a neighbour that comes and goes
    MHT_SIM_GROWTH_BYTES       resident bytes that join them at optimizer step MHT_SIM_GROWTH_STEP, counted from 1:
    MHT_SIM_GROWTH_STEP        an out-of-memory error that comes late [0, 1]
    MHT_SIM_DEVICE_INDEX       for the message [0]
    MHT_SIM_DEVICE_UUID        with NVML_SIM_USAGE, a directory: what this process uses is kept in the file UUID.PID
                               there, in bytes, where nvml-sim reads it
"""

import atexit
import functools
import os

import torch
from transformers import Trainer

# A pass does not allocate in one piece. Where it fails, the pieces before the failing one are in use.
PIECES = 8
# The share of resident memory that is not PyTorch's, up to what a CUDA context takes: about 500 MiB.
CONTEXT_SHARE, CONTEXT_BYTES_MAX = 4, 500 << 20


def setting(name, default=None):
    text = os.environ.get(f"MHT_SIM_{name}", default)
    if text is None:
        raise ValueError(f"MHT_SIM_{name} is not set, and MHT_SIM_CAPACITY_BYTES is")
    return int(text)


def size_text(size):
    """Writes a size as torch does: format_size in c10/cuda/CUDACachingAllocator.cpp."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size > unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


class Device:
    """The simulated device, as its settings describe it."""

    def __init__(self):
        self.total = setting("CAPACITY_BYTES")
        self.per_token = setting("BYTES_PER_TOKEN")
        self.resident = setting("RESIDENT_BYTES")
        self.others = setting("OTHERS_BYTES", "0")
        self.others_file = os.environ.get("MHT_SIM_OTHERS_FILE")
        self.growth = setting("GROWTH_BYTES", "0")
        self.growth_step = setting("GROWTH_STEP", "1")
        self.index = setting("DEVICE_INDEX", "0")
        self.usage_file = usage_file()

    def begin_pass(self, rows, longest, step):
        """Returns the error that the pass shall end in, or None; says meanwhile what it uses."""
        if self.others_file is not None:
            with open(self.others_file, encoding="ascii") as file:
                self.others = int(file.read())
        resident = self.resident + (self.growth if step >= self.growth_step else 0)
        piece = -(-rows * longest * self.per_token // PIECES)
        left = self.total - self.others - resident
        fitting = min(PIECES, max(0, left // piece)) if piece else PIECES
        used = min(resident + fitting * piece, self.total - self.others)
        self.publish(used)
        return None if fitting == PIECES else torch.OutOfMemoryError(self.message(piece, used, resident))

    def message(self, tried, used, resident):
        free = self.total - self.others - used
        context = min(resident // CONTEXT_SHARE, CONTEXT_BYTES_MAX)
        # Blocks that are free but too small for the piece: else it would have gone there.
        unallocated = min(tried // 2, (used - context) // 50)
        allocated = used - context - unallocated
        return (
            f"CUDA out of memory. Tried to allocate {size_text(tried)}. GPU {self.index} has a total capacity of "
            f"{size_text(self.total)} of which {size_text(free)} is free. Including non-PyTorch memory, this process "
            f"has {size_text(used)} memory in use. Of the allocated memory {size_text(allocated)} is allocated by "
            f"PyTorch, and {size_text(unallocated)} is reserved by PyTorch but unallocated. If reserved but "
            "unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid "
            "fragmentation.  See documentation for Memory Management  "
            "(https://docs.pytorch.org/docs/stable/notes/cuda.html"
            "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
        )

    def publish(self, used):
        if self.usage_file is None:
            return
        # Written beside it and renamed over it: a reader never sees half a number.
        folder, name = os.path.split(self.usage_file)
        temporary = os.path.join(folder, f".{name}")
        with open(temporary, "w", encoding="ascii") as file:
            file.write(str(used))
        os.replace(temporary, self.usage_file)


def usage_file():
    folder, uuid = os.environ.get("NVML_SIM_USAGE"), os.environ.get("MHT_SIM_DEVICE_UUID")
    if not folder or not uuid:
        return None
    path, owner = os.path.join(folder, f"{uuid}.{os.getpid()}"), os.getpid()

    def remove():
        # Data loader workers are forks of this process, and leave through here as well.
        if os.getpid() == owner and os.path.exists(path):
            os.remove(path)

    atexit.register(remove)
    return path


def raise_inside(model, error):
    """Makes the next forward pass raise `error` in the last decoder layer: where a real one would come from."""
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2].isdigit()]

    def fail(module, args):
        raise error

    return (layers[-1] if layers else model).register_forward_pre_hook(fail)


def wrap(original, device):
    @functools.wraps(original)
    def training_step(self, model, inputs, *args, **kwargs):
        rows, longest = inputs["input_ids"].shape[:2]
        error = device.begin_pass(rows, longest, self.state.global_step + 1)
        hook = raise_inside(model, error) if error else None
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()

    return training_step


# A data loader worker may load plugins again (ms-swift 4.x), and has no passes.
if "MHT_SIM_CAPACITY_BYTES" in os.environ and torch.utils.data.get_worker_info() is None:
    Trainer.training_step = wrap(Trainer.training_step, Device())
