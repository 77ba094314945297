"""Print, as one JSON object, what is installed here. Runs in about 0.2 s: nothing that is asked about is imported."""
import sys

# `-c` puts the working directory first; the trainer's own script does not have it there.
sys.path[:] = [entry for entry in sys.path if entry]

import importlib.metadata as metadata
import importlib.util as util
import json
import os

# Distributions of other versions of flash attention are `flash-attn-3` and the like: the kernels differ, so they are
# listed under their own names.
NAMES = (
    "ms-swift torch transformers peft accelerate trl datasets modelscope huggingface-hub safetensors tokenizers numpy "
    "flash-attn flash-attn-3 flash-attn-4 liger-kernel bitsandbytes deepspeed swanlab wandb tensorboard kernels triton "
    "hqq eetq optimum-quanto auto-gptq gptqmodel autoawq vllm python-swiftclient swift"
).split()


def directory(name):
    """Directory of a package that is not imported, or None."""
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    places = list(getattr(spec, "submodule_search_locations", None) or [])
    return places[0] if places else None


def torch_version(place):
    """torch/version.py names the build (`+cpu`, `+cu128`), which the metadata may leave out."""
    try:
        with open(os.path.join(place, "version.py"), encoding="utf-8") as file:
            for line in file:
                if line.startswith("__version__"):
                    return line.split("=", 1)[1].strip().strip("'\"")
    except OSError:
        return None


def is_compiled(place):
    return os.path.exists(util.cache_from_source(os.path.join(place, "__init__.py")))


packages = {}
for name in NAMES:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
    if version:
        packages[name] = version

torch, swift, transformers = directory("torch"), directory("swift"), directory("transformers")
if torch and "torch" in packages:
    packages["torch"] = torch_version(torch) or packages["torch"]
script = os.path.join(swift, "cli", "sft.py") if swift else None

print("MHTRAIND" + json.dumps({
    "python_version": "%d.%d.%d" % sys.version_info[:3],
    "packages": packages,
    "swift_directory": swift,
    "sft_script": script if script and os.path.isfile(script) else None,
    "bytecode": all(is_compiled(place) for place in (torch, transformers) if place),
    "watched": [entry for entry in sys.path if os.path.exists(entry)] + [d for d in (torch, swift, transformers) if d],
}))
