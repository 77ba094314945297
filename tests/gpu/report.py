"""What do the results say? The table of the memory points, and the page for docs/measurements. Pure but for the writing."""

import csv
import io
import re

from trainings import EFFECTIVE_BATCH, median

GIB, MIB = 1 << 30, 1 << 20
# As docs/measurements/memory.md reads: the columns of the memory study, then what only a card can show.
STUDY = [
    "model", "family", "method", "rank", "targets", "batch", "length", "packing", "padded", "attn", "gc", "kept",
    "grad_accum", "params", "trainable", "weights_bytes", "grad_bytes", "optim_bytes", "peak_bytes",
]
CARD = [
    "reserved_bytes", "nvml_peak_bytes", "nvml_process_bytes", "context_bytes", "workspace_bytes", "retries", "rows",
    "expandable", "estimate_allocated", "estimate_device", "estimate_low", "estimate_high", "card", "driver", "torch",
    "transformers", "peft", "flash_attn", "bitsandbytes", "date", "id",
]
# The published ratios of crates/mhtrain-sizing/src/reserve.rs: of what is resident, and of what comes and goes.
PRIORS = {
    "packed or equal rows": ("1.02 (0.975 to 1.1)", "1.15 (0.95 to 1.55)"),
    "unequal rows, expandable segments": ("1.01 (0.98 to 1.04)", "1.2 (0.95 to 1.9)"),
    "unequal rows": ("1 (1 to 1)", "3 (1 to 4.65)"),
}


def measured(lines):
    """Returns the results of memory points that have a peak."""
    return [line for line in lines if line.get("seen", {}).get("status") == "measured"]


def csv_row(line):
    """Returns the row of one memory point."""
    one, seen, estimate = line["pass"], line["seen"], line["estimate"]
    versions = seen["versions"]
    family = re.sub(r"-?[\d.]+B.*$", "", one["model"]).lower()
    return {
        "model": one["model"],
        "family": family,
        "method": one["method"],
        "rank": 0 if one["method"] == "full" else one["rank"],
        "targets": "" if one["method"] == "full" else one["targets"].replace(",", "+"),
        "batch": one["batch"],
        "length": one["length"],
        "packing": int(one["rows"] == "packed"),
        "padded": int(one["rows"] == "unequal" and one["batch"] > 1),
        "attn": "flash_attn" if one["attn"] == "flash" else one["attn"],
        "gc": int(one["checkpointing"]),
        "kept": one["kept"],
        "grad_accum": 1,
        **{name: seen[name] for name in ("params", "trainable", "weights_bytes", "grad_bytes", "optim_bytes")},
        "peak_bytes": seen["allocated"],
        "reserved_bytes": seen["reserved"],
        "nvml_peak_bytes": seen["nvml_peak"],
        "nvml_process_bytes": seen["nvml_process"] or "",
        **{name: seen[name] for name in ("context_bytes", "workspace_bytes", "retries")},
        "rows": one["rows"],
        "expandable": int(one["expandable"]),
        "estimate_allocated": estimate["allocated_peak_bytes"],
        "estimate_device": estimate["device_peak_bytes"],
        "estimate_low": estimate["low_bytes"],
        "estimate_high": estimate["high_bytes"],
        "card": line["card"],
        "driver": line["driver"],
        **{name: versions.get(name.replace("_", "-"), "") for name in ("torch", "transformers", "peft")},
        **{name: versions.get(name.replace("_", "-"), "") for name in ("flash_attn", "bitsandbytes")},
        "date": line["date"],
        "id": line["id"],
    }


def to_csv(lines):
    text = io.StringIO()
    writer = csv.DictWriter(text, STUDY + CARD, lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_row(line) for line in measured(lines))
    return text.getvalue()


# ---- figures ----


def quantile(numbers, percent):
    """Returns the percentile by nearest rank; None of no numbers."""
    ordered = sorted(numbers)
    if not ordered:
        return None
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[rank - 1]


def error(line):
    """Returns predicted / measured - 1 of the allocated peak, what cuBLAS keeps taken off: no list of operations has it."""
    own = line["seen"]["allocated"] - line["seen"]["workspace_bytes"]
    return line["estimate"]["allocated_peak_bytes"] / own - 1.0


def resident(line):
    """Returns the bytes of weights, adapters and moments."""
    return line["seen"]["weights_bytes"] + line["seen"]["optim_bytes"]


def ratio(line):
    """Returns what the allocator kept for each byte that it had handed out at its peak."""
    return line["seen"]["reserved"] / line["seen"]["allocated"]


def rest_ratio(line):
    """Returns reserved / predicted of what comes and goes, when what is resident is taken to cost what it is.

    None where there is hardly anything that comes and goes: then the ratio is noise.
    """
    predicted = line["estimate"]["allocated_peak_bytes"]
    rest = predicted - resident(line)
    return (line["seen"]["reserved"] - resident(line)) / rest if rest > 0.05 * predicted else None


def inside(line):
    """Returns whether the card's peak lies in the predicted 90 % interval."""
    return line["estimate"]["low_bytes"] <= line["seen"]["nvml_peak"] <= line["estimate"]["high_bytes"]


def by_group(lines):
    """Returns {name: lines} in the order in which the names first occur: all, the groups of the reserve, and others."""
    groups = {"all": list(lines)}
    for line in lines:
        one = line["pass"]
        names = [line["group"], one["method"], "flash-attn" if one["attn"] == "flash" else "sdpa"]
        names.append("checkpointing" if one["checkpointing"] else "no checkpointing")
        names.append(one["model"])
        for name in names:
            groups.setdefault(name, []).append(line)
    return groups


def brief(text):
    """Returns the end of a message on one line: of a traceback that is what counts."""
    words = " ".join(text.split())
    return words if len(words) <= 400 else f"… {words[-400:]}"


def percent(share):
    return "-" if share is None else f"{100 * share:+.2f} %"


def figure(number, form=".3f"):
    return "-" if number is None else f"{number:{form}}"


def spread(numbers, low, high):
    """Returns the median with two percentiles."""
    return f"{figure(median(numbers))} ({figure(quantile(numbers, low))} to {figure(quantile(numbers, high))})"


def error_table(lines):
    """Returns the table of errors and ratios for each group."""
    text = [
        "| points of | points | allocated: median error | largest | card: in the 90 % interval | card / predicted, median "
        "| reserved / allocated, median (10th to 90th) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, group in by_group(lines).items():
        errors, ratios = [error(line) for line in group], [ratio(line) for line in group]
        near = [line["seen"]["nvml_peak"] / line["estimate"]["device_peak_bytes"] for line in group]
        share = sum(inside(line) for line in group) / len(group)
        text.append(
            f"| {name} | {len(group)} | {percent(median(errors))} | {percent(max(errors, key=abs))} | {100 * share:.0f} % "
            f"| {figure(median(near))} | {spread(ratios, 10, 90)} |"
        )
    return text


def prior_table(lines):
    """Returns the table that the priors of reserve.rs are corrected from."""
    text = [
        "| group | points | reserved / predicted of what comes and goes: median (5th to 95th) | prior of it "
        "| prior of what is resident |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for group, (resident_prior, rest_prior) in PRIORS.items():
        found = [rest_ratio(line) for line in lines if line["group"] == group]
        found = [one for one in found if one is not None]
        text.append(f"| {group} | {len(found)} | {spread(found, 5, 95)} | {rest_prior} | {resident_prior} |")
    return text


def memory_section(lines):
    found = measured(lines)
    if not found:
        return ["No memory point was measured."]
    contexts = [line["seen"]["context_bytes"] for line in found]
    beside = [line["seen"]["nvml_peak"] - line["seen"]["reserved"] for line in found]
    text = [
        "Error is predicted / measured - 1 of the peak that torch has allocated, less cuBLAS's workspace "
        f"({found[0]['seen']['workspace_bytes'] / MIB:.1f} MiB), which no estimate has. *Card* is what NVML showed above "
        "what it showed before. One estimate line knows the shape of a pass and not the allocator's setting.",
        "",
        *error_table(found),
        "",
        "What the priors of `crates/mhtrain-sizing/src/reserve.rs` are corrected from:",
        "",
        *prior_table(found),
        "",
        f"CUDA context with torch, before anything is trained: {median(contexts) / MIB:.0f} MiB "
        f"({min(contexts) / MIB:.0f} to {max(contexts) / MIB:.0f}). Card beside the allocator at the peak: "
        f"{median(beside) / MIB:.0f} MiB ({min(beside) / MIB:.0f} to {max(beside) / MIB:.0f}).",
        "",
        "| point | allocated | predicted | error | reserved | card | predicted, with its interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in found:
        seen, said = line["seen"], line["estimate"]
        low, guess, high = (said[name] / GIB for name in ("low_bytes", "device_peak_bytes", "high_bytes"))
        text.append(
            f"| {line['id'].removeprefix('memory/')} | {seen['allocated'] / GIB:.2f} "
            f"| {said['allocated_peak_bytes'] / GIB:.2f} | {percent(error(line))} | {seen['reserved'] / GIB:.2f} "
            f"| {seen['nvml_peak'] / GIB:.2f} | {guess:.2f} ({low:.2f} to {high:.2f}) |"
        )
    without = [line for line in lines if line.get("seen", {}).get("status") == "out_of_memory"]
    text += [""] if without else []
    text += [f"- {line['id']}: memory ran out. {line['seen']['error'][:200]}" for line in without]
    return text


def probe_section(line):
    if "rows" not in line:
        return [f"Not measured: {brief(line.get('why', ''))}"]
    text = ["| field | mhtraind probe | nvidia-smi | same |", "| --- | --- | --- | --- |"]
    for field, ours, theirs, same in line["rows"]:
        text.append(f"| {field} | {ours} | {theirs} | {'yes' if same else '**no**'} |")
    return text + ["", *(f"- note of the probe: {note}" for note in line["notes"])]


def oom_section(lines):
    text = [
        "Shapes with random weights, LoRA, 128 rows of which 8 are as long as they may be; a ballast process holds the rest of "
        "the card.",
        "",
        "| point | model | free | chosen, predicted | attempts: how they ended, peak on the card | fills | outcome |",
        "| --- | --- | ---: | --- | --- | ---: | --- |",
    ]
    for line in lines:
        if "attempts" not in line:
            text.append(f"| {line['id']} | - | - | - | - | - | {brief(line.get('refused') or line.get('why', ''))} |")
            continue
        attempts = "; ".join(map(attempt_text, line["attempts"]))
        fills = f"{100 * line['fullness']:.0f} %" if "fullness" in line else "-"
        text.append(
            f"| {line['id']} | {line['model']} | {line['free_bytes'] / GIB:.2f} GiB "
            f"| {line['chosen']}{size(line['predicted_bytes'])} | {attempts} | {fills} | {line['state']} |"
        )
    for line in lines:
        if "promises" in line:
            kept = "; ".join(f"{promise}: {'yes' if kept else '**no**'}" for promise, kept in line["promises"].items())
            after = ", ".join(f"{what} {seconds} s" for what, seconds in line["seconds"].items())
            text += ["", f"**{line['id']}**. {kept}. After memory ran out: {after or 'nothing followed'}."]
    return text


def attempt_text(one):
    """Returns how an attempt ended, what the card showed for it, and the allocator's peaks where the companion told."""
    text = f"{one['tier']}: {one['ended']}{size(one['peak_bytes'])}"
    if one["allocated_peak"]:
        text += f" (allocated {one['allocated_peak'] / GIB:.2f}, reserved {one['reserved_peak'] / GIB:.2f})"
    return text


def size(amount):
    return f", {amount / GIB:.2f} GiB" if amount else ""


def overhead_section(lines):
    text = [
        "| | runs | all, s | to the first step, s | a step, s | allocated | companion's own share of the steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, word in (("bare `swift sft`", "bare"), ("under `mhtraind run`", "supervised")):
        found = [line for line in lines if word in line["id"] and "wall_seconds" in line]
        if not found:
            continue
        numbers = [figure(median([line[key] for line in found]), ".2f") for key in ("wall_seconds", "first_step")]
        own = [line["companion"]["own_seconds"] / line["companion"]["step_seconds"] for line in found if line["companion"]]
        allocated = size(found[0]["allocated"]).removeprefix(", ") or "-"
        step = figure(median([line["step"] for line in found]), ".4f")
        text.append(f"| {name} | {len(found)} | {' | '.join(numbers)} | {step} | {allocated} | {percent(median(own))} |")
    return text


def page(lines, device, simulated):
    """Returns the page for docs/measurements. `lines` are all results."""
    dates = sorted(line["date"][:10] for line in lines if "date" in line)
    parts = {part: [line for line in lines if line["id"].startswith(part)] for part in ("memory", "oom", "overhead")}
    versions = next((line["seen"]["versions"] for line in parts["memory"] if "versions" in line.get("seen", {})), {})
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    left_out = [line for line in lines if line.get("status") == "left_out"]
    failed = [line for line in lines if line.get("status") == "failed"]
    probe = next((line for line in lines if line["id"] == "probe"), {"why": "it was not asked for"})
    warning = "**DRY RUN. Nothing here was measured on a GPU: card, capacity and peaks are simulated.**"
    title = f"# DRY RUN on {device['name']}" if simulated else f"# {device['name']}, measured"
    text = [
        title,
        "",
        *([warning, ""] if simulated else []),
        f"Written by `tests/gpu/run`, {' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'no date'}. "
        f"{device['name']}, {device['total'] / GIB:.1f} GiB, compute capability {device['capability']}, "
        f"driver {device['driver']}, CUDA {device['cuda']}; {said}. How: [tests/gpu/README.md](../../tests/gpu/README.md).",
        "",
        "## Memory of a training pass",
        "",
        *memory_section(parts["memory"]),
        "",
        "## Probe and nvidia-smi",
        "",
        *probe_section(probe),
        "",
        f"## Trainings on a shared card (effective batch {EFFECTIVE_BATCH})",
        "",
        *oom_section(parts["oom"]),
        "",
        "## Cost of supervision",
        "",
        *overhead_section(parts["overhead"]),
        "",
    ]
    if failed:
        text += ["## Failed", "", *(f"- {line['id']}: {brief(line.get('why', ''))}" for line in failed), ""]
    if left_out:
        text += ["## Left out", "", *(f"- {line['id']}: {line['why']}" for line in left_out), ""]
    return "\n".join(text)


def slug(name):
    """Returns the file name for a card: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
