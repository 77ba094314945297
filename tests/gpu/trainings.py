"""Real trainings: a model on disk, a ballast on the card, a job, `mhtraind run`, and what the plugins wrote down."""

import contextlib
import dataclasses
import json
import pathlib
import signal

import card
from suite import HERE, ROOT, CutShort, Failed, read_lines, run, running, tail, wait_for_end

GIB = 1 << 30
PLUGINS = HERE / "plugins"
ROWS = 128
# Rows of one optimizer step; every class of config/tiers.toml that occurs here has it.
EFFECTIVE_BATCH = 32
# So many rows are as long as they may be: the first micro-batch of the class is full of them in the preflight.
LONG_ROWS = 8
LONG_TOKENS = 3000

# In a dry run the card, and what is left free of it, are a twelfth of an H200's, and a token of a pass takes 1 MiB.
SIMULATED_SCALE = 12
SIMULATED_TOTAL = 141 * GIB // SIMULATED_SCALE
SIMULATED_TOKENS = 150
SIMULATED_CARD = {
    "GPU_SUITE_SIM_CAPACITY_BYTES": SIMULATED_TOTAL,
    "GPU_SUITE_SIM_BYTES_PER_TOKEN": 1 << 20,
    "GPU_SUITE_SIM_RESIDENT_BYTES": 512 << 20,
}


def scaled(suite, gib):
    """Returns the bytes that a point of so many GiB means here."""
    return gib * GIB // (SIMULATED_SCALE if suite.simulated else 1)


class Ballast:
    """A stranger's process that holds memory."""

    def __init__(self, suite):
        self.suite, self.number, self.stack = suite, 0, contextlib.ExitStack()
        self.folder = suite.work / "ballast"

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("wish.json", "held.json"):
            (self.folder / name).unlink(missing_ok=True)
        command = [self.suite.python, HERE / "ballast.py", self.folder]
        device = {"GPU_SUITE_CARD_INDEX": self.suite.device["index"]}
        if self.suite.simulated:
            device["MHT_SIM_DEVICE_UUID"] = self.suite.device["uuid"]
        log, env = self.folder / "log", self.suite.trainer_env(**device)
        self.process = self.stack.enter_context(running(command, log, env=env, grace_s=5))
        return self

    def __exit__(self, *_):
        self.stack.close()

    def leave(self, free):
        """Takes so much that about `free` bytes stay free; None gives everything back. Returns what it holds then."""
        self.number += 1
        beside = self.folder / "wish.json.new"
        beside.write_text(json.dumps({"number": self.number, "free": free}), encoding="utf-8")
        beside.replace(self.folder / "wish.json")

        def is_done():
            if self.process.poll() is not None:
                raise Failed(f"the ballast ended: {tail(self.folder / 'log')}")
            return self.answer().get("number") == self.number

        if not card.wait_until(is_done, min(90, self.suite.left())):
            raise Failed("the ballast took longer than 90 s") if self.suite.left() > 0 else CutShort("ballast")
        return self.answer()

    def answer(self):
        try:
            return json.loads((self.folder / "held.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def model_of(suite, shape):
    """Returns the folder with the model of a shape and its rows; it is made at the first use and kept."""
    shape = "tiny" if suite.simulated else shape
    folder = suite.work / f"model-{shape}"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = ["--rows", ROWS, "--long-rows", LONG_ROWS]
        sizes += ["--tokens", SIMULATED_TOKENS if suite.simulated else LONG_TOKENS]
        kind = ["--device", "cpu", "--dtype", "float32"] if suite.simulated else ["--device", "cuda"]
        config = HERE / "configs" / f"{shape}.json"
        command = [suite.python, HERE / "make_checkpoint.py", config, folder, *sizes, *kind]
        run(suite, command, env=suite.trainer_env())
        (folder / "whole").touch()
    return folder


@dataclasses.dataclass
class Training:
    """One job's folder: what goes in, and what is read from it afterwards."""

    suite: "object"
    folder: pathlib.Path
    model: pathlib.Path

    @property
    def events(self):
        return read_lines(self.folder / "events.jsonl")

    @property
    def output(self):
        return self.folder / "out"

    def journal(self):
        return read_lines(self.output / ".mhtraind" / "journal.jsonl")

    def telemetry(self, attempt):
        found = sorted((self.output / ".mhtraind" / f"attempt-{attempt}").glob("*.jsonl"))
        lines = [line for path in found for line in read_lines(path)]
        return [line for line in lines if "kind" in line and "pid" in line]

    def write_job(self, plugins, **args):
        """Writes the job that a user would write, with the plugins that look on."""
        fixed = {"save_steps": 100, "logging_steps": 1, "num_train_epochs": 1, "lora_dropout": 0.0}
        if self.suite.simulated:
            fixed["torch_dtype"] = "float32"
        job = {
            "model": str(self.model / "model"),
            "dataset": [str(self.model / "train.jsonl")],
            "device": self.suite.device["index"],
            "output_dir": str(self.output),
            "args": {**fixed, **args, "external_plugins": [str(path) for path in plugins]},
        }
        path = self.folder / "job.json"
        path.write_text(json.dumps(job, indent=1), encoding="utf-8")
        return path

    def environment(self, **more):
        """Returns the environment of mhtraind and its trainer: no network, and nothing that earlier runs have taught."""
        settings = self.folder / "mhtraind.toml"
        command = json.dumps([str(self.suite.swift), "sft"])
        settings.write_text(
            f"[trainer]\ncommand = {command}\n[attempt]\ngrace_s = 5\nneighbour_wait_min = 3\n", encoding="utf-8"
        )
        env = {
            "MHTRAIND_CONFIG": settings,
            "XDG_STATE_HOME": self.folder / "state",
            "XDG_CACHE_HOME": self.suite.work / "cache",
            "HF_HOME": self.suite.work / "cache" / "huggingface",
            "MODELSCOPE_CACHE": self.suite.work / "cache" / "modelscope",
            "HF_HUB_OFFLINE": 1,
            "TOKENIZERS_PARALLELISM": "false",
            "GPU_SUITE_EVENTS": self.folder / "events.jsonl",
            "ORDER_LOG": self.folder / "order.jsonl",
        }
        if self.suite.simulated:
            env.update(SIMULATED_CARD, OMP_NUM_THREADS=2, MHT_SIM_DEVICE_UUID=self.suite.device["uuid"])
            env["GPU_SUITE_SIMULATION"] = ROOT / "crates/mhtraind/src/demo/simulated_capacity.py"
        return {**env, **more}

    @contextlib.contextmanager
    def running(self, job, **more):
        """Runs `mhtraind run` in the background. What is left of it and its trainer is ended with the block."""
        command = [self.suite.mhtraind, "run", job, "--json"]
        env = self.suite.env(**self.environment(**more))
        with open(self.folder / "receipt.json", "wb") as receipt:
            options = {"stdout": receipt, "env": env, "cwd": self.folder, "polite": signal.SIGTERM, "grace_s": 15}
            with running(command, self.folder / "run.log", **options) as child:
                yield child

    def receipt(self):
        """Returns the receipt, from standard output or from its file; None where no attempt was made."""
        for path in (self.folder / "receipt.json", self.output / "receipt.json"):
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(path.read_text(encoding="utf-8"))
                if "attempts" in found:
                    return found
        return None

    def refusal(self):
        """Returns the error that a job ended with before its first attempt."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "receipt.json").read_text(encoding="utf-8"))["error"]["message"]
        return tail(self.folder / "run.log", 600).strip()


def new_training(suite, point, shape):
    """Returns the empty folder of a point's job; what an earlier try left is removed."""
    import shutil

    model = model_of(suite, shape)
    folder = suite.work / point.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Training(suite, folder, model)


def finish(training, child):
    """Waits for the end of a run and returns its exit status."""
    return wait_for_end(training.suite, child, training.folder.name)


# ---- what the lines of the plugins say: pure ----


def late_death(events):
    """Returns the first out-of-memory error of a step; one of the pass that is tried before step 1 is none."""
    return next((event for event in events if event["event"] == "out_of_memory" and not event.get("preflight")), None)


def attempt_of_death(events):
    """Returns which attempt, counted from 0, died late; None when none did. Each attempt is one process."""
    failure = late_death(events)
    pids = list(dict.fromkeys(event["pid"] for event in events if event["event"] == "loaded"))
    return pids.index(failure["pid"]) if failure else None


def seconds_to_next_step(events):
    """Returns {what: seconds} from the late out-of-memory error to what follows; without what did not come."""
    failure = late_death(events)
    if failure is None:
        return {}
    later = [event for event in events if event["time"] > failure["time"] and event["pid"] != failure["pid"]]
    first = {}
    for event in later:
        first.setdefault(event["event"], event["time"] - failure["time"])
    names = {"loaded": "plugins loaded", "begin": "training begins", "step": "next step done"}
    return {said: round(first[name], 2) for name, said in names.items() if name in first}


def rows_trained(order, events):
    """Returns the rows of all finished steps in order, over all attempts.

    A step that memory ran out in has trained nothing, though some of its micro-batches were begun.
    """
    finished = {(event["pid"], event["step"]) for event in events if event["event"] == "step"}
    return [row for line in order if (line["pid"], line["step"]) in finished for row in line["ids"]]


def once_each(rows, count):
    """Returns (rows that are missing, rows that came more than once) of 0 to count - 1."""
    missing = sorted(set(range(count)) - set(rows))
    return missing, sorted({row for row in rows if rows.count(row) > 1})


def median(numbers):
    ordered = sorted(numbers)
    half = len(ordered) // 2
    if not ordered:
        return None
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def step_seconds(events):
    """Returns the seconds of each step but the first, which compiles and warms up, in each process."""
    seconds = []
    for pid in dict.fromkeys(event["pid"] for event in events):
        times = [event["time"] for event in events if event["pid"] == pid and event["event"] == "step"]
        seconds += [after - before for before, after in zip(times, times[1:])]
    return seconds
