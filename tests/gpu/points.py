"""Which runs are there, in which order, and which of them can this card do?

Ids are stable: a run that was done is known by its id, in this call or an earlier one. Only data and pure functions.
"""

import dataclasses

GIB = 1 << 30
# Of the memory points that fit, so many are taken, in the order of the list.
MEMORY_POINTS_MAX = 40
# What a pass is taken to need: what torch allocates, a fifth more for what the allocator keeps, and a context. The predicted
# peak of the card is not taken: it is what is tested, and for rows of unequal length its guess is three times as much.
ALLOCATOR_FACTOR, CONTEXT = 1.2, 1 << 30
# Small cards should not spend their time on shapes that a large card shows better, and the other way round: a pass that
# takes less than this share of the card comes after all others.
SMALL_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Pass:
    """One measured training: what `mhtraind estimate` and the worker are both told."""

    model: str
    method: str
    batch: int
    length: int
    # packed: all rows in one; equal: rows of one length; unequal: rows of many lengths, the longest among them
    rows: str
    attn: str = "sdpa"
    checkpointing: bool = True
    expandable: bool = True
    rank: int = 8
    targets: str = "all-linear"
    kept: float = 1.0

    def id(self):
        words = [self.model, self.method, f"{self.batch}x{self.length}", self.rows, self.attn]
        if self.method != "full":
            words.append(f"r{self.rank}")
        if self.targets != "all-linear":
            words.append(self.targets)
        if self.kept != 1.0:
            words.append(f"kept{self.kept:g}")
        words += [] if self.checkpointing else ["no-gc"]
        words += [] if self.expandable else ["segments-off"]
        return "memory/" + "/".join(words)

    def group(self):
        """The group of crates/mhtrain-sizing/src/reserve.rs that the pass belongs to."""
        if self.rows != "unequal":
            return "packed or equal rows"
        return "unequal rows, expandable segments" if self.expandable else "unequal rows"

    def estimate_request(self, config):
        """Returns the line for `mhtraind estimate --json`."""
        return {
            "config_object": config,
            "train_type": self.method,
            "lora_rank": self.rank if self.method != "full" else 0,
            "target_modules": self.targets,
            "torch_dtype": "bfloat16",
            "micro_batch": self.batch,
            # Two micro-batches a step: gradients of the first are alive in the second.
            "accumulation": 2,
            "max_length": self.length,
            "packing": self.rows == "packed",
            # A row that is alone is not padded, whatever its length.
            "padded": self.rows == "unequal" and self.batch > 1,
            "attn_impl": "flash_attn" if self.attn == "flash" else self.attn,
            "gradient_checkpointing": self.checkpointing,
            "logit_share": self.kept,
        }


def memory_passes():
    """Returns every pass, the most telling first: the three groups and methods on a middling shape, then what sets the
    peak in other ways, then other shapes and batches."""
    seven, middle, small, large = "Qwen2.5-7B", "Qwen2.5-3B", "Qwen2.5-0.5B", "Qwen2.5-14B"
    return [
        Pass(seven, "lora", 4, 3072, "unequal"),
        Pass(seven, "lora", 4, 3072, "equal"),
        Pass(seven, "lora", 4, 3072, "unequal", expandable=False),
        Pass(seven, "lora", 2, 3072, "packed"),
        Pass(middle, "full", 2, 2048, "equal"),
        Pass(middle, "lora", 2, 2048, "equal", checkpointing=False),
        Pass(middle, "lora", 4, 3072, "unequal"),
        Pass(middle, "full", 2, 2048, "unequal"),
        Pass(seven, "qlora", 2, 3072, "unequal"),
        Pass(seven, "lora", 4, 3072, "unequal", attn="flash"),
        Pass(seven, "lora", 4, 3072, "packed", attn="flash"),
        Pass(small, "full", 4, 2048, "unequal"),
        Pass(small, "lora", 8, 3072, "unequal"),
        Pass(small, "lora", 8, 3072, "unequal", expandable=False),
        Pass(small, "lora", 4, 2048, "equal", checkpointing=False),
        Pass("Llama-3.2-3B", "lora", 4, 3072, "unequal"),
        Pass("Llama-3.2-3B", "lora", 2, 3072, "packed"),
        Pass("Qwen3-4B", "lora", 4, 3072, "unequal"),
        Pass("Mistral-7B-v0.3", "lora", 4, 3072, "unequal"),
        Pass(seven, "lora", 8, 3072, "unequal"),
        Pass(seven, "lora", 1, 2048, "unequal"),
        Pass(large, "lora", 2, 3072, "unequal"),
        Pass(large, "lora", 2, 3072, "equal"),
        Pass(seven, "full", 1, 2048, "equal"),
        Pass(seven, "lora", 2, 3072, "equal", kept=0.25),
        Pass(middle, "lora", 4, 3072, "unequal", expandable=False),
        Pass(middle, "full", 2, 2048, "unequal", expandable=False),
        Pass("Qwen2.5-1.5B", "lora", 4, 3072, "unequal"),
        Pass("Qwen2.5-1.5B", "full", 2, 2048, "unequal"),
        Pass("Qwen2.5-1.5B", "lora", 2, 2048, "unequal", checkpointing=False),
        Pass("Qwen3-0.6B", "full", 4, 2048, "equal"),
        Pass("Qwen3-0.6B", "lora", 4, 2048, "packed"),
        Pass("Qwen3-4B", "lora", 2, 2048, "equal", checkpointing=False),
        Pass("Mistral-7B-v0.3", "lora", 2, 3072, "packed"),
        Pass(seven, "lora", 2, 2048, "unequal", targets="q_proj,v_proj"),
        Pass(seven, "lora", 2, 3072, "unequal", rank=64),
        Pass(middle, "qlora", 4, 3072, "equal"),
        Pass(large, "qlora", 2, 3072, "unequal"),
        Pass(seven, "lora", 4, 3072, "equal", attn="flash"),
        Pass(middle, "full", 2, 2048, "packed", attn="flash"),
        Pass(seven, "lora", 2, 3072, "unequal", attn="flash", expandable=False),
        Pass("Llama-3.2-3B", "full", 1, 2048, "equal"),
        Pass("Llama-3.2-3B", "lora", 2, 2048, "unequal", expandable=False),
        Pass(small, "full", 2, 1024, "equal", checkpointing=False),
        Pass(small, "qlora", 2, 2048, "unequal"),
        Pass(small, "lora", 2, 1024, "unequal"),
        Pass(small, "lora", 1, 1024, "packed"),
        Pass("Qwen3-0.6B", "lora", 2, 2048, "unequal"),
        Pass("Qwen3-0.6B", "lora", 2, 2048, "unequal", expandable=False),
    ]


def tiny_passes():
    """Returns the passes of a dry run: each branch of the worker that a CPU can take, on a shape that takes no time."""
    return [
        Pass("tiny", "lora", 4, 96, "unequal"),
        Pass("tiny", "lora", 2, 96, "equal", expandable=False),
        Pass("tiny", "lora", 2, 96, "packed", kept=0.25),
        Pass("tiny", "lora", 1, 64, "unequal", targets="q_proj,v_proj", checkpointing=False),
        Pass("tiny", "full", 2, 64, "unequal", expandable=False),
        Pass("tiny", "full", 2, 64, "equal", checkpointing=False),
        Pass("tiny", "qlora", 2, 64, "unequal"),
        Pass("tiny", "lora", 2, 64, "packed", attn="flash"),
        # Predicted far above the simulated card, so that leaving one out is tried as well.
        Pass("tiny", "lora", 4096, 4096, "equal"),
    ]


def select(passes, estimates, free_bytes, features):
    """Returns (the passes to measure in order, {id: why not} for the others).

    `estimates` are the answers of `mhtraind estimate` by id, `features` the optional packages that are installed.
    """
    taken, later, left_out = [], [], {}
    for one in passes:
        need = ALLOCATOR_FACTOR * estimates[one.id()]["allocated_peak_bytes"] + CONTEXT
        missing = "bitsandbytes" if one.method == "qlora" else "flash-attn" if one.attn == "flash" else None
        if missing and missing not in features:
            left_out[one.id()] = f"{missing} is not installed"
        elif need > free_bytes:
            left_out[one.id()] = f"too large for this card: about {need / GIB:.1f} GiB, {free_bytes / GIB:.1f} GiB are free"
        elif need < SMALL_SHARE * free_bytes:
            later.append(one)
        else:
            taken.append(one)
    taken += later
    for one in taken[MEMORY_POINTS_MAX:]:
        left_out[one.id()] = f"the first {MEMORY_POINTS_MAX} are enough"
    return taken[:MEMORY_POINTS_MAX], left_out


# ---- real trainings ----

# Where memory is made to run out, or a neighbour made to grow, so much is left free at first; on a smaller card this share
# of it, so that the neighbour holds a good part in any case.
LATE_FREE_GIB, LATE_FREE_SHARE = 48, 0.6

PROBE = "probe"
RUN_POINTS = [
    "oom/late-beside-a-steady-neighbour",
    "oom/free-24",
    "oom/growing-neighbour",
    "oom/free-48",
    "oom/late-alone",
    "overhead/bare-1",
    "overhead/supervised-1",
    "oom/free-16",
    "oom/free-80",
    "overhead/supervised-2",
    "overhead/bare-2",
]


def order(memory_ids):
    """Returns the ids of all points, the most valuable first: a third of the memory points, the probe, the first
    training of each kind, the other memory points, the rest."""
    first, rest = memory_ids[:12], memory_ids[12:]
    return [*first, PROBE, *RUN_POINTS[:4], *rest, *RUN_POINTS[4:]]


def wanted(ids, only):
    """Returns the ids that begin with one of the words in `only`; all of them without."""
    words = [word for word in (only or "").split(",") if word]
    return [point for point in ids if not words or any(point.startswith(word) for word in words)]
