"""Part 1: what does a training pass take on the card, beside what `mhtraind estimate` says?"""

import contextlib
import dataclasses
import json
import selectors
import subprocess

import card
import points
from suite import HERE, CutShort, Failed, run, running, say, tail

# A pass takes seconds; loading of kernels and a slow disk make the first one longer.
PASS_S_MAX = 150
EXPECTED_S = 12
RETURN_S_MAX, RETURNED_NEAR = 5, 64 << 20


def configs(passes):
    """Returns the config.json of each model that occurs."""
    names = {one.model for one in passes}
    return {name: json.loads((HERE / "configs" / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def estimates(suite, passes, shapes):
    """Returns what `mhtraind estimate` says about each pass, by id."""
    lines = "".join(json.dumps(one.estimate_request(shapes[one.model])) + "\n" for one in passes)
    command = [suite.mhtraind, "estimate", "--json", "-"]
    answers = [json.loads(line) for line in run(suite, command, 60, input=lines).stdout.splitlines()]
    if len(answers) != len(passes):
        raise Failed(f"`mhtraind estimate` answered {len(answers)} of {len(passes)} lines")
    return {one.id(): answer for one, answer in zip(passes, answers)}


class Part:
    """The memory points of a call, and the worker that does them."""

    def __init__(self, suite):
        self.suite = suite
        passes = points.tiny_passes() if suite.simulated else points.memory_passes()
        self.shapes = configs(passes)
        self.estimates = estimates(suite, passes, self.shapes)
        free = suite.nvml.memory(suite.device["index"])["free"]
        taken, self.left_out = points.select(passes, self.estimates, free, suite.packages)
        self.passes = {one.id(): one for one in taken}
        self.worker, self.stack, self.forks = None, contextlib.ExitStack(), True
        self.used_at_first = self.used()

    def used(self):
        return self.suite.nvml.memory(self.suite.device["index"])["used"]

    def run(self, point):
        """Measures one pass and returns its result."""
        one = self.passes[point]
        request = {
            "id": point,
            "pass": dataclasses.asdict(one),
            "config": self.shapes[one.model],
            "card_index": self.suite.device["index"],
            "card_uuid": self.suite.device["uuid"],
            "simulated": self.suite.simulated,
        }
        # The memory of the pass before may come back a moment after its process has gone.
        card.wait_until(lambda: self.used() <= self.used_at_first + RETURNED_NEAR, RETURN_S_MAX)
        with card.Watch(self.suite.nvml, self.suite.device["index"]) as watch:
            seen = self.ask(request)
        seen.update(nvml_peak=max(watch.rise(), seen.get("nvml_used") or 0))
        result = {"pass": dataclasses.asdict(one), "group": one.group(), "estimate": self.estimates[point], "seen": seen}
        if seen["status"] == "failed":
            raise Failed(seen["error"])
        if seen.get("expandable_seen") not in (None, one.expandable):
            raise Failed(f"the allocator has expandable segments {seen['expandable_seen']}, {one.expandable} was asked for")
        self.say(point, result)
        return result

    def ask(self, request):
        if self.forks:
            seen = self.ask_server(request)
            if seen.get("forked", True):
                return seen
            say("  a fork cannot use CUDA with these packages: a process for each pass from now on, which takes longer")
            self.close()
            self.forks = False
        command = [self.suite.python, HERE / "memory_pass.py", "--one"]
        done = run(self.suite, command, PASS_S_MAX, input=json.dumps(request), env=self.suite.trainer_env())
        return json.loads(done.stdout)

    def ask_server(self, request):
        if self.worker is None:
            command = [self.suite.python, HERE / "memory_pass.py", "--serve"]
            log = self.suite.folder / "memory-worker.log"
            options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "group": True, "grace_s": 5}
            self.worker = self.stack.enter_context(running(command, log, env=self.suite.trainer_env(), **options))
            self.read_line(PASS_S_MAX)
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        return self.read_line(PASS_S_MAX)

    def read_line(self, seconds):
        """Returns the worker's next answer. A pass that takes too long costs the worker: the next point gets a new one."""
        limit = min(seconds, self.suite.left())
        with selectors.DefaultSelector() as selector:
            selector.register(self.worker.stdout, selectors.EVENT_READ)
            if not selector.select(timeout=max(limit, 1)):
                self.close()
                raise CutShort("a pass") if limit < seconds else Failed(f"no answer within {seconds} s")
        line = self.worker.stdout.readline()
        if not line:
            self.close()
            raise Failed(f"the worker ended: {tail(self.suite.folder / 'memory-worker.log')}")
        return json.loads(line)

    def close(self):
        self.stack.close()
        self.worker = None

    def say(self, point, result):
        seen, estimate = result["seen"], result["estimate"]
        if seen["status"] != "measured":
            say(f"  {seen['status']}: {seen.get('error', '')[:200]}")
            return
        gib = {name: value / points.GIB for name, value in seen.items() if name in ("allocated", "reserved", "nvml_peak")}
        say(
            f"  allocated {gib['allocated']:.2f} GiB (predicted {estimate['allocated_peak_bytes'] / points.GIB:.2f}), "
            f"reserved {gib['reserved']:.2f}, card {gib['nvml_peak']:.2f} "
            f"(predicted {estimate['device_peak_bytes'] / points.GIB:.2f})"
        )
