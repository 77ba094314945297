"""Part 4: what do supervision and companion cost? The same `swift sft`, bare and under `mhtraind run`, in turns."""

import json
import time

import card
from suite import Failed, run, running, say, tail, wait_for_end
from trainings import PLUGINS, finish, median, new_training, step_seconds

SHAPE = "Qwen2.5-0.5B"
EPOCHS = {False: 3, True: 2}
EXPECTED_S = 75


def measure(suite, point):
    training = new_training(suite, point, SHAPE)
    plugins = [PLUGINS / "step_clock.py"]
    job = training.write_job(plugins, num_train_epochs=EPOCHS[suite.simulated], packing=False)
    env = training.environment()
    began = time.time()
    with card.Watch(suite.nvml, suite.device["index"], 0.1) as watch:
        if "bare" in point:
            code, log = bare(training, job, env)
        else:
            with training.running(job) as child:
                code, log = finish(training, child), training.folder / "run.log"
    if code != 0:
        raise Failed(f"it ended with {code}: {tail(log)}")
    result = {"wall_seconds": round(time.time() - began, 2), "card_peak": watch.rise(), **times(training.events, began)}
    result["companion"] = next((line for line in training.telemetry(1) if line["kind"] == "end"), None)
    say(f"  {result['wall_seconds']} s, first step after {result['first_step']} s, {result['step']} s a step")
    return {**result, "ok": True}


def bare(training, job, env):
    """Runs what `mhtraind plan` shows as a person would, and returns the exit status and the log."""
    suite = training.suite
    command = [suite.mhtraind, "plan", job, "--json"]
    plan = json.loads(run(suite, command, 60, env=suite.env(**env)).stdout)
    words = [str(suite.swift), *plan["command"][1:]]
    log = training.folder / "run.log"
    options = {"env": suite.env(**{**env, **plan["env"]}), "cwd": training.folder, "group": True, "grace_s": 10}
    with running(words, log, **options) as child:
        return wait_for_end(suite, child, training.folder.name), log


def times(events, began):
    """Returns the seconds to the first step, of a step (median), and from the last step to the trainer's end."""
    steps = [event["time"] for event in events if event["event"] == "step"]
    if len(steps) < 3:
        raise Failed(f"only {len(steps)} steps were seen")
    seconds = step_seconds(events)
    peaks = next((event for event in events if event["event"] == "end"), {})
    return {
        "first_step": round(steps[0] - began, 2),
        "step": round(median(seconds), 4),
        "steps": len(steps),
        "allocated": peaks.get("allocated"),
        "reserved": peaks.get("reserved"),
    }
