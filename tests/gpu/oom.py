"""Part 3: real trainings on a card that others use. Does the first plan fit, how full is the card, and what happens when
memory runs out late, by our own growth or by a neighbour's?"""

import card
import points
from suite import ROOT, CutShort, Failed, read_lines, say, tail
from trainings import (
    EFFECTIVE_BATCH,
    PLUGINS,
    ROWS,
    Ballast,
    attempt_of_death,
    finish,
    late_death,
    new_training,
    once_each,
    rows_trained,
    scaled,
    seconds_to_next_step,
)

# The second one for cards that a pass of the first does not fit on with room to step down.
SHAPE, SMALL_SHAPE, SMALL_CARD = "Qwen2.5-7B", "Qwen2.5-1.5B", 40 << 30
LATE_STEP, PACKED_EPOCHS = 3, 3
EXPECTED_S = {"oom/late-beside-a-steady-neighbour": 150, "oom/late-alone": 140, "oom/growing-neighbour": 150}
EXPECTED_FIT_S = 100
CLOCK, RUNS_OUT = PLUGINS / "step_clock.py", PLUGINS / "memory_runs_out.py"
ORDER = ROOT / "tests/trainer/row_order.py"
# What is left to a card whose neighbour has grown: less than any pass needs.
GROWN_LEAVES = 256 << 20
# mhtraind looks at the card once a second while it waits.
LOOK_S = 3
# To the late step, and from there to the wait.
STAGE_S_MAX = 180


def expected_s(point):
    return EXPECTED_S.get(point, EXPECTED_FIT_S)


def measure(suite, point):
    if point.startswith("oom/free-"):
        return first_plan(suite, point, int(point.rpartition("-")[2]))
    if point == "oom/growing-neighbour":
        return growing_neighbour(suite, point)
    return late(suite, point, beside=point == "oom/late-beside-a-steady-neighbour")


def shape(suite):
    small = suite.device["total"] < SMALL_CARD and not suite.simulated
    return SMALL_SHAPE if small else SHAPE


def shape_name(suite):
    return "tiny" if suite.simulated else shape(suite)


def late_free(suite):
    usable = suite.nvml.memory(suite.device["index"])["free"]
    return min(scaled(suite, points.LATE_FREE_GIB), int(points.LATE_FREE_SHARE * usable))


def plugins(suite, runs_out):
    # In a dry run the second one is also what makes the card's capacity, so it is always there.
    return [CLOCK, ORDER, RUNS_OUT] if runs_out or suite.simulated else [CLOCK, ORDER]


def first_plan(suite, point, free_gib):
    """A ballast leaves so many GiB; the job is planned by what NVML says, and runs."""
    training = new_training(suite, point, shape(suite))
    # Packed, all rows are less than one step.
    epochs = PACKED_EPOCHS if "flash-attn" in suite.packages else 1
    job = training.write_job(plugins(suite, runs_out=False), num_train_epochs=epochs)
    with Ballast(suite) as ballast:
        usable = suite.nvml.memory(suite.device["index"])["free"]
        if scaled(suite, free_gib) > usable:
            return {"status": "left_out", "why": f"only {usable / points.GIB:.1f} GiB are free on this card"}
        ballast.leave(scaled(suite, free_gib))
        free = suite.nvml.memory(suite.device["index"])["free"]
        with card.Watch(suite.nvml, suite.device["index"], 0.1) as watch, training.running(job) as child:
            code = finish(training, child)
    receipt = training.receipt()
    if receipt is None:
        say(f"  refused: {training.refusal()[:300]}")
        # A card that even the weights do not fit on is refused with the numbers: that is an answer.
        refused = training.refusal()
        return {"free_bytes": free, "refused": refused, "exit": code, "ok": code == 1 and "free" in refused}
    result = {"free_bytes": free, "exit": code, "model": shape_name(suite), **story(training, receipt)}
    result["card_peak"] = watch.rise()
    result["fullness"] = round(watch.rise() / free, 4)
    result["first_plan_fits"] = result["attempts"][0]["ended"] == "success"
    result["ok"] = receipt["state"] == "succeeded"
    tell(result)
    return result


def late(suite, point, beside):
    """Memory of our own making runs out in a late step: the rung is lowered, and no step is lost."""
    training = new_training(suite, point, shape(suite))
    job = training.write_job(plugins(suite, runs_out=True), packing=False)
    once = training.folder / "ran-out"
    with Ballast(suite) as ballast:
        ballast.leave(late_free(suite) if beside else None)
        free = suite.nvml.memory(suite.device["index"])["free"]
        settings = {"GPU_SUITE_RUNS_OUT": "own", "GPU_SUITE_AT_STEP": LATE_STEP, "GPU_SUITE_ONCE": once}
        with training.running(job, **settings) as child:
            code = finish(training, child)
    result = after_a_death(training, code, free)
    promises = {
        "ours to blame": result["attempts"][result["died"]]["ended"] == "device_oom",
        "a lower rung": is_lower([attempt["tier"] for attempt in around(result)]),
        **nothing_lost(result),
    }
    return judged(result, promises)


def growing_neighbour(suite, point):
    """A neighbour takes what the trainer does not use: the job waits, and goes on at the same rung."""
    training = new_training(suite, point, shape(suite))
    job = training.write_job(plugins(suite, runs_out=True), packing=False)
    grown = training.folder / "grown"
    settings = {
        "GPU_SUITE_RUNS_OUT": "neighbour",
        "GPU_SUITE_AT_STEP": LATE_STEP,
        "GPU_SUITE_ONCE": training.folder / "ran-out",
        "GPU_SUITE_GROWN": grown,
    }
    with Ballast(suite) as ballast:
        at_first = late_free(suite)
        ballast.leave(at_first)
        free = suite.nvml.memory(suite.device["index"])["free"]
        with training.running(job, **settings) as child:
            until(training, child, "the late step", lambda: has_event(training, "may_grow"))
            ballast.leave(GROWN_LEAVES)
            grown.touch()
            until(training, child, "the wait for memory", lambda: is_waiting(training))
            # A second look must not start anything either.
            next_one = training.output / f"attempt-{len(list(training.output.glob('attempt-*'))) + 1}"
            started = card.wait_until(next_one.exists, LOOK_S)
            ballast.leave(at_first)
            code = finish(training, child)
    result = after_a_death(training, code, free)
    tiers = [attempt["tier"] for attempt in around(result)]
    promises = {
        "the neighbour to blame": result["attempts"][result["died"]]["ended"] == "device_oom_by_neighbour",
        "nothing started on a full card": not started,
        "the same rung": len(tiers) == 2 and tiers[0] == tiers[1],
        **nothing_lost(result),
    }
    return judged(result, promises)


def until(training, child, what, condition):
    def is_over():
        return child.poll() is not None or condition()

    came = card.wait_until(is_over, min(STAGE_S_MAX, max(training.suite.left(), 0)))
    if not came and training.suite.left() <= 0:
        raise CutShort(what)
    if not condition():
        raise Failed(f"waited for {what} in vain: {tail(training.folder / 'run.log')}")


def has_event(training, name):
    return any(event["event"] == name for event in training.events)


def is_waiting(training):
    return any("waiting" in str(record) for record in training.journal())


# ---- what came of it ----


def story(training, receipt):
    """Returns what the receipt and the companion say about each attempt."""
    attempts = []
    for note in receipt["attempts"]:
        diagnosis, resume = note.get("diagnosis") or {}, note.get("resume") or {}
        lines = training.telemetry(note["attempt"])
        peaks = [line for line in lines if "allocated_peak" in line]
        attempts.append(
            {
                "tier": short_tier(note["tier"]),
                "ended": diagnosis.get("kind", "success"),
                "line": (diagnosis.get("evidence") or {}).get("line", "")[:300],
                "resume": resume.get("kind"),
                "from_step": resume.get("from_step"),
                "steps_repeated": resume.get("steps_repeated"),
                "peak_bytes": note.get("peak_bytes"),
                "allocated_peak": max((line["allocated_peak"] for line in peaks), default=None),
                "reserved_peak": max((line["reserved_peak"] for line in peaks), default=None),
                "companion": [line["kind"] for line in lines if line["kind"] not in ("step", "loaded", "begin", "end")],
            }
        )
    chosen = short_tier(receipt["chosen"]) if receipt["chosen"] else None
    rung = next((rung for rung in receipt["rungs"] if short_tier(rung["tier"]) == chosen), {})
    return {
        "state": receipt["state"],
        "reason": receipt["reason"],
        "chosen": chosen,
        "predicted_bytes": rung.get("predicted_peak_bytes"),
        "admission_bytes": rung.get("admission_bytes"),
        "attempts": attempts,
        "versions": receipt["versions"],
        "warnings": receipt["warnings"],
    }


def short_tier(tier):
    packed = ", packed" if tier["packing"] else ""
    return f"{tier['name']} {tier['micro_batch']}x{tier['accumulation']} @{tier['max_length']} {tier['attn_impl']}{packed}"


def around(result):
    """Returns the attempt that died late and the one that followed, which is the last."""
    died = result["died"]
    return result["attempts"][died:] if len(result["attempts"]) == died + 2 else []


def is_lower(tiers):
    """Whether the second of two rungs has a smaller micro-batch, or is of a later profile."""
    if len(tiers) != 2:
        return False
    first, second = (tier.split()[:3] for tier in tiers)
    size = [int(words[1].partition("x")[0]) for words in (first, second)]
    return size[1] < size[0] or first[0] != second[0] or first[2] != second[2]


def after_a_death(training, code, free):
    receipt = training.receipt()
    if receipt is None:
        raise Failed(f"no attempt was made: {training.refusal()}")
    result = {"free_bytes": free, "exit": code, "model": shape_name(training.suite), **story(training, receipt)}
    rows = rows_trained(read_lines(training.folder / "order.jsonl"), training.events)
    result["rows_missing"], result["rows_twice"] = once_each(rows, ROWS)
    result["seconds"] = seconds_to_next_step(training.events)
    failure = late_death(training.events)
    if failure is None:
        raise Failed(f"memory did not run out: {tail(training.folder / 'run.log')}")
    result.update(words=failure["words"], died=attempt_of_death(training.events))
    tell(result)
    return result


def nothing_lost(result):
    second = around(result)[1] if around(result) else {}
    return {
        "success is proven": result["state"] == "succeeded" and result["exit"] == 0,
        "resumed exactly": second.get("resume") == "exact" and second.get("from_step") == LATE_STEP - 1,
        "no step is lost": second.get("steps_repeated") == 0,
        f"each of {ROWS} rows once, {EFFECTIVE_BATCH} a step": not result["rows_missing"] and not result["rows_twice"],
    }


def judged(result, promises):
    for promise, kept in promises.items():
        say(f"  {'yes' if kept else 'NO '} {promise}")
    return {**result, "promises": promises, "ok": all(promises.values())}


def tell(result):
    gib = points.GIB
    predicted = result["predicted_bytes"] / gib
    say(f"  {result['free_bytes'] / gib:.2f} GiB free, chosen {result['chosen']}, {predicted:.2f} GiB predicted")
    for attempt in result["attempts"]:
        peak = f", peak {attempt['peak_bytes'] / gib:.2f} GiB" if attempt["peak_bytes"] else ""
        say(f"  {attempt['tier']}: {attempt['ended']}{peak}")
    if result.get("seconds"):
        say("  seconds after memory ran out: " + ", ".join(f"{what} {s}" for what, s in result["seconds"].items()))
