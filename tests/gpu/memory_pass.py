"""One measured training of a model with random weights. Runs under the trainer's interpreter.

    python memory_pass.py --serve                 # reads one JSON request a line, forks for each, writes an answer a line
    python memory_pass.py --one < request.json    # one request in this very process

Torch, transformers and peft are imported once and before CUDA is touched, so a fork starts in no time and has a CUDA
context of its own. Where a package touches CUDA at import a fork cannot use it: the answer says `"forked": false`, and
the caller goes over to `--one`.

The training is what ms-swift 4.x does on one card: weights in bfloat16, adapters in fp32, autocast with outputs lifted
to fp32, reentrant checkpointing, the loss inside the model, fused AdamW. Weights are made on the card.
"""

import gc
import importlib.metadata
import json
import os
import random
import sys
import time
import traceback

import card

ALPHA, DROPOUT, LEARNING_RATE = 32, 0.05, 1e-4
# Each step has two micro-batches; the second step is the first that finds moments and gradients in memory.
MICRO_BATCHES = 2
STEPS = {"packed": 2, "equal": 2, "unequal": 6}
# Of rows of unequal length one in so many is as long as it may be. The first and the last step have one.
LONGEST_EVERY = 4


def import_all():
    # is_available() asks NVML then and not CUDA, which would spoil every fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import accelerate.utils  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401


class CudaMeter:
    """What torch's allocator and the card say."""

    is_simulated = False

    def __init__(self, request):
        import torch

        self.torch, self.cuda = torch, torch.cuda
        self.device = torch.device("cuda", 0)
        self.nvml, self.index = card.Nvml(), request["card_index"]
        self.before = self.nvml.memory(self.index)["used"]
        self.cuda.init()
        torch.zeros(1, device=self.device)
        self.cuda.synchronize()
        # The context with what torch itself loads; kernels come later and are in the peak of the card.
        self.context = self.nvml.memory(self.index)["used"] - self.before - self.cuda.memory_reserved()

    def workspace(self):
        """Returns what cuBLAS takes from the allocator at its first product, and keeps."""
        before = self.cuda.memory_allocated()
        one = self.torch.ones(128, 128, dtype=self.torch.bfloat16, device=self.device)
        product = one @ one
        self.cuda.synchronize()
        taken = self.cuda.memory_allocated() - before
        return taken - 2 * one.untyped_storage().nbytes() if product is not None else 0

    def reset(self):
        gc.collect()
        self.cuda.empty_cache()
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()

    def allocated(self):
        return self.cuda.memory_allocated()

    def peaks(self):
        self.cuda.synchronize()
        stats = self.cuda.memory_stats()
        # What the allocator really does, not what it was told; torch before 2.1 does not say.
        settings = self.cuda.memory._snapshot().get("allocator_settings", {})
        own = self.nvml.processes(self.index).get(os.getpid())
        return {
            "allocated": self.cuda.max_memory_allocated(),
            "reserved": self.cuda.max_memory_reserved(),
            "retries": stats.get("num_alloc_retries", 0),
            "expandable_seen": settings.get("expandable_segments"),
            "nvml_used": self.nvml.memory(self.index)["used"] - self.before,
            "nvml_process": own,
        }


class HostMeter:
    """Stands in on a machine without CUDA: the process's own memory, so that every figure is a number. It says nothing
    about a card."""

    is_simulated = True
    context = 0

    def __init__(self, request):
        import torch

        self.torch, self.device = torch, torch.device("cpu")
        self.nvml, self.index = card.Nvml(), request["card_index"]
        self.uuid = request["card_uuid"]
        self.base = 0
        torch.set_num_threads(1)

    def workspace(self):
        return 0

    def reset(self):
        gc.collect()
        # Puts the high-water mark back to what is resident now (proc(5)).
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        self.base = self.status("VmRSS")

    def status(self, name):
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    def allocated(self):
        return self.status("VmRSS")

    def peaks(self):
        peak = max(self.status("VmHWM"), 1)
        with open(os.path.join(os.environ["NVML_SIM_USAGE"], f"{self.uuid}.{os.getpid()}"), "w", encoding="ascii") as file:
            file.write(str(peak))
        own = self.nvml.processes(self.index).get(os.getpid())
        return {"allocated": peak, "reserved": peak, "retries": 0, "nvml_used": peak, "nvml_process": own}


def set_allocator(torch, expandable):
    """Sets expandable segments for this process, before its first allocation.

    The variable alone is not enough in a fork: torch reads it when its libraries are loaded.
    """
    setting = f"expandable_segments:{expandable}"
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = setting
    if not torch.backends.cuda.is_built():
        return
    setters = (getattr(torch._C, "_accelerator_setAllocatorSettings", None), torch.cuda.memory._set_allocator_settings)
    next(setter for setter in setters if setter is not None)(setting)


def attention(one):
    return "flash_attention_2" if one["attn"] == "flash" else one["attn"]


def make_model(torch, one, config, device):
    """Returns the model with its adapters, and how many parameters the base has."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = dict(config)
    settings = AutoConfig.for_model(facts.pop("model_type"), **facts)
    settings.use_cache = False
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=torch.bfloat16, attn_implementation=attention(one)
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if one["method"] == "qlora":
        pack_into_four_bits(torch, model)
    if one["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    if one["method"] != "full":
        targets = one["targets"]
        lora = LoraConfig(
            r=one["rank"],
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            task_type="CAUSAL_LM",
            target_modules=targets if targets == "all-linear" else targets.split(","),
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # peft makes adapters of a model in half precision in fp32.
        model = get_peft_model(model, lora)
    model.train()
    return model, parameters


def pack_into_four_bits(torch, model):
    """Replaces the linear layers of the blocks by bitsandbytes' NF4 with double quantisation, as ms-swift asks for."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or name.endswith("lm_head"):
            continue
        packed = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        device = module.weight.device
        weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        # Quantised by the move to the device.
        packed.weight = weight.to(device)
        packed.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, packed)
        del module
    model.is_loaded_in_4bit = model.is_quantized = True


def row_lengths(one, steps, rng):
    """Returns the longest row of each micro-batch. Rows of unequal length are padded to it."""
    count = steps * MICRO_BATCHES
    if one["rows"] != "unequal":
        return [one["length"]] * count
    lengths = [max(8, int(one["length"] * rng.uniform(0.1, 0.95))) for _ in range(count)]
    for index in range(1, count, LONGEST_EVERY):
        lengths[index] = one["length"]
    lengths[-1] = one["length"]
    return lengths


def make_batch(torch, one, longest, vocabulary, device, rng):
    """Returns the arguments of the model for one micro-batch."""
    rows, width = (1, one["batch"] * longest) if one["rows"] == "packed" else (one["batch"], longest)
    ids = torch.randint(0, vocabulary, (rows, width), device=device)
    batch = {"input_ids": ids, "use_cache": False}
    if one["rows"] == "packed" and one["attn"] == "flash":
        # Positions begin anew with each row, and flash attention cuts there. sdpa would get a mask of all tokens by all
        # tokens for it, so there the pack is one long row, which takes the same memory.
        batch["position_ids"] = torch.arange(longest, device=device).repeat(one["batch"]).unsqueeze(0)
    if one["rows"] == "unequal" and rows > 1:
        mask = torch.ones(rows, width, dtype=torch.long, device=device)
        for row in range(1, rows):
            mask[row, max(4, int(width * rng.uniform(0.3, 1.0))) :] = 0
        batch["attention_mask"] = mask
    kept = max(1, round(width * one["kept"]))
    batch["labels"] = ids[:, -kept:].clone()
    if one["kept"] < 1.0:
        # As ms-swift does: positions for a row that is alone, the common end of several.
        batch["logits_to_keep"] = torch.arange(width - kept, width, device=device) if rows == 1 else kept
    return batch


def nbytes(tensors):
    """Returns the bytes of the tensors' storages, each counted once, in the allocator's blocks."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(-(-size // 512) * 512 for size in storages.values())


def scales(model):
    """Yields what bitsandbytes keeps beside packed weights: the scale of each block, packed once more, and both tables."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield state.absmax
            yield state.code
            state = state.state2


def train(torch, one, config, meter):
    """Trains some steps and returns what was seen."""
    from accelerate.utils import convert_outputs_to_fp32

    rng = random.Random(7)
    torch.manual_seed(7)
    steps = STEPS[one["rows"]]
    model, parameters = make_model(torch, one, config, meter.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    forward = convert_outputs_to_fp32(torch.autocast(meter.device.type, dtype=torch.bfloat16)(model.forward))
    # Making weights takes more than keeping them: only what follows counts.
    meter.reset()
    resident, seconds = meter.allocated(), []
    micro_batches = iter(row_lengths(one, steps, rng))
    for _ in range(steps):
        began = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            batch = make_batch(torch, one, next(micro_batches), config["vocab_size"], meter.device, rng)
            output = forward(**batch, num_items_in_batch=torch.tensor(batch["labels"].numel(), device=meter.device))
            loss = output["loss"] if isinstance(output, dict) else output[0]
            # The logits live in the output: the Trainer lets go of it before the backward pass, too.
            del output, batch
            loss.backward()
            del loss
        optimizer.step()
        gradients = nbytes([parameter.grad for parameter in trained if parameter.grad is not None])
        optimizer.zero_grad(set_to_none=True)
        seconds.append(round(time.perf_counter() - began, 4))
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "params": parameters,
        "trainable": sum(parameter.numel() for parameter in trained),
        "weights_bytes": nbytes([*model.parameters(), *model.buffers(), *scales(model)]),
        "grad_bytes": gradients,
        "optim_bytes": nbytes(state for state in states if state.dim() > 0),
        "resident_before_bytes": resident,
        "step_seconds": seconds,
        **meter.peaks(),
    }


def versions():
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "accelerate", "flash-attn", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def answer(request):
    """Returns what came of one request; an error is an answer as well."""
    import torch

    one = request["pass"]
    began = time.perf_counter()
    try:
        set_allocator(torch, one["expandable"])
        meter = HostMeter(request) if request["simulated"] else CudaMeter(request)
        seen = {"context_bytes": meter.context, "workspace_bytes": meter.workspace()}
        seen.update(train(torch, one, request["config"], meter))
        seen.update(status="measured", simulated=meter.is_simulated)
    except torch.OutOfMemoryError as error:
        seen = {"status": "out_of_memory", "error": str(error)[:1000]}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        # torch's words for a CUDA that was touched before the fork.
        forked = "forked subprocess" not in text and "initialization error" not in text
        seen = {"status": "failed", "error": text[:1000], "trace": traceback.format_exc()[-3000:], "forked": forked}
    seen.update(id=request["id"], versions=versions(), seconds=round(time.perf_counter() - began, 2))
    return seen


def serve():
    import_all()
    out = sys.stdout
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            with os.fdopen(write, "w", encoding="utf-8") as pipe:
                json.dump(answer(request), pipe)
            # No interpreter shutdown: it would run what the parent has registered.
            os._exit(0)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        died = {"id": request["id"], "status": "failed", "error": f"the worker died with wait status {status}"}
        print(text or json.dumps(died), file=out, flush=True)


def main():
    # Whatever libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = answers
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:] == ["--one"]:
        import_all()
        print(json.dumps(answer(json.load(sys.stdin))), flush=True)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
