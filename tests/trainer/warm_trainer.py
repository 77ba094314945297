"""Imports ms-swift once and trains once for every line on standard input, each time in a fork: a launch costs under a
second instead of six. For matrices of tests; what a start itself does is tested with real starts.

    {"argv": ["--model", ...], "env": {"NAME": "value"}, "cwd": "DIR", "output": "FILE"}

The child has the arguments, the directory, the variables (on top of ours) and, for standard output and error, the file;
from there on it is the code that `swift/cli/sft.py` runs. The answer is one line, {"exit": code} or {"signal": number}.
Needs OMP_NUM_THREADS=1: a pool of threads does not survive a fork.
"""

import importlib
import json
import os
import sys
import traceback

# Everything that `sft.py` would import, and what is imported on first use there.
MODULES = ("torch", "transformers", "peft", "datasets", "swift.llm", "swift.pipelines", "swift.trainers")


def load():
    """Returns ms-swift's entry: `swift.llm.sft_main` in 3.x, `swift.pipelines.sft_main` in 4.x."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    for name in ("swift.pipelines", "swift.llm"):
        entry = getattr(sys.modules.get(name), "sft_main", None)
        if entry is not None:
            return entry
    raise ImportError("ms-swift has no sft_main")


def train(entry, order):
    """Runs in the child and does not return."""
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    os.environ.update(order.get("env", {}))
    # ms-swift 3.x imports plugins by name, and prepends their directories.
    sys.argv = ["sft.py", *order["argv"]]
    code = 0
    try:
        entry()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main():
    entry = load()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            train(entry, order)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"exit": code} if code >= 0 else {"signal": -code}), file=answers, flush=True)


main()
