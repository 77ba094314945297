"""What do all parts share? The surroundings of a call, the results of this and earlier calls, and processes that end."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import card

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Kept back at the end of a call for ending what runs and writing the report.
RESERVE_S = 20


class CutShort(Exception):
    """The call's time is over; the point comes again in the next call."""


class Failed(Exception):
    """A point cannot be done, or what it shows is not what was promised."""


@dataclasses.dataclass
class Suite:
    """The surroundings of a call."""

    # Results and everything that is made for them.
    folder: pathlib.Path
    mhtraind: pathlib.Path
    # The interpreter that torch and ms-swift are installed in, and its `swift`.
    python: pathlib.Path
    swift: pathlib.Path
    nvml: card.Nvml
    device: dict
    # {name: version} of what is installed for the trainer.
    packages: dict
    simulated: bool
    deadline: float
    # Beside this process's own: where NVML is, which card, no network.
    environment: dict = dataclasses.field(default_factory=dict)

    @property
    def work(self):
        return self.folder / "work"

    def left(self):
        """Returns the seconds that may still be used."""
        return self.deadline - RESERVE_S - time.monotonic()

    def env(self, **more):
        """Returns the environment for a child."""
        return {**os.environ, **self.environment, **{name: str(value) for name, value in more.items()}}

    def trainer_env(self, **more):
        """Returns the environment for a child that sees this card alone. Its index is that of the driver."""
        visible = "" if self.simulated else self.device["uuid"]
        return self.env(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=visible, **more)

    def facts(self):
        """Returns what every result says about where it is from."""
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "card": self.device["name"],
            "driver": self.device["driver"],
            "simulated": self.simulated,
        }


class Results:
    """One JSON line for each point that was done; the last line of an id counts."""

    def __init__(self, path):
        self.path, self.lines = path, {}
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # A line that a kill has cut.
                    line = json.loads(text)
                    self.lines[line["id"]] = line

    def done(self, point):
        """Returns whether the point needs no other run."""
        return self.lines.get(point, {}).get("status") in ("done", "failed", "left_out")

    def add(self, point, line):
        line = {"id": point, **line}
        self.lines[point] = line
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, part):
        return [line for line in self.lines.values() if line["id"].startswith(part)]


def read_lines(path):
    """Returns the JSON lines of a file, without what cannot be read; none of a file that is not there."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def run(suite, command, seconds=None, check=True, **options):
    """Runs a short command to its end and returns it; its output is kept."""
    limit = suite.left() if seconds is None else min(seconds, suite.left())
    options.setdefault("env", suite.env())
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=max(limit, 1), **options
        )
    except subprocess.TimeoutExpired as error:
        if seconds is not None and suite.left() > 0:
            raise Failed(f"{command[0]} took longer than {seconds} s") from error
        raise CutShort(str(command[0])) from error
    if check and done.returncode != 0:
        words = (done.stderr or done.stdout).strip()[-1500:]
        raise Failed(f"{' '.join(map(str, command[:3]))} ended with {done.returncode}: {words}")
    return done


@contextlib.contextmanager
def running(command, log, polite=signal.SIGTERM, grace_s=30, group=False, **options):
    """Runs a command in the background, in a session of its own, its output in `log`; ends it when the block is left.

    `group`: also what it has started is ended. Without it only the process gets the polite signal, because mhtraind ends
    its trainer itself.
    """
    with open(log, "ab") as out:
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=options.pop("stdout", out),
            stderr=out,
            start_new_session=True,
            **options,
        )
    try:
        yield child
    finally:
        end(child, polite, grace_s, group)


def end(child, polite, grace_s, group):
    def send(number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number) if group else child.send_signal(number)

    if child.poll() is None:
        send(polite)
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            send(signal.SIGKILL)
            child.wait()
    if group:
        send(signal.SIGKILL)


def wait_for_end(suite, child, what):
    """Returns the exit status of a child; raises CutShort when the call's time is over before."""
    while child.poll() is None:
        if suite.left() <= 0:
            raise CutShort(what)
        time.sleep(0.1)
    return child.returncode


def say(text):
    print(text, flush=True)


def tail(path, characters=1500):
    """Returns the end of a text file, for a message."""
    with contextlib.suppress(OSError):
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")[-characters:]
    return ""


def stop_with(message):
    """Ends the program for a wrong argument or a missing thing."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
