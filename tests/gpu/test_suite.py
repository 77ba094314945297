"""The pure functions of the suite. `python3 -m unittest discover tests/gpu`; a dry run and `cargo xtask test` run them too."""

import importlib.util
import pathlib
import random
import sys
import tempfile
import types
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ballast  # noqa: E402
import card  # noqa: E402
import memory_pass  # noqa: E402
import oom  # noqa: E402
import points  # noqa: E402
import probe  # noqa: E402
import report  # noqa: E402
import trainings  # noqa: E402
from suite import HERE, Failed, Results, read_lines  # noqa: E402

GIB = 1 << 30


def estimate(gib):
    return {"allocated_peak_bytes": gib * GIB, "device_peak_bytes": gib * GIB, "low_bytes": 0, "high_bytes": 2 * gib * GIB}


def result(one, allocated, reserved, predicted, weights=10):
    """Returns the line of a memory point, amounts in GiB."""
    seen = {
        "status": "measured", "allocated": allocated * GIB, "reserved": reserved * GIB, "nvml_peak": (reserved + 1) * GIB,
        "nvml_process": None, "context_bytes": 500 << 20, "workspace_bytes": 0, "retries": 0, "params": 7, "trainable": 1,
        "weights_bytes": weights * GIB, "grad_bytes": 1, "optim_bytes": 0, "versions": {"torch": "2.15.0", "flash-attn": "2"},
    }
    said = {**estimate(predicted), "device_peak_bytes": (predicted + 1) * GIB, "high_bytes": 100 * GIB}
    facts = {"card": "Card", "driver": "1", "date": "2026-01-01T00:00:00Z", "status": "done", "ok": True}
    as_dict = {**one.__dict__}
    return {"id": one.id(), "pass": as_dict, "group": one.group(), "estimate": said, "seen": seen, **facts}


class Points(unittest.TestCase):
    def test_ids_are_different_and_name_a_shape_that_is_there(self):
        passes = points.memory_passes()
        self.assertEqual(len({one.id() for one in passes}), len(passes))
        for one in passes + points.tiny_passes():
            self.assertTrue((HERE / "configs" / f"{one.model}.json").is_file(), one.model)

    def test_the_first_points_are_of_each_group_and_method(self):
        first = points.memory_passes()[:9]
        self.assertEqual({one.group() for one in first}, set(report.PRIORS))
        self.assertEqual({one.method for one in first}, {"lora", "full", "qlora"})

    def test_what_does_not_fit_and_what_is_not_installed_is_left_out_with_a_reason(self):
        passes = points.memory_passes()
        sizes = {one.id(): estimate({"Qwen2.5-14B": 40}.get(one.model, 10)) for one in passes}
        taken, left_out = points.select(passes, sizes, 24 * GIB, {"torch": "2"})
        self.assertLessEqual(len(taken), points.MEMORY_POINTS_MAX)
        self.assertEqual(len(taken) + len(left_out), len(passes))
        self.assertFalse([one for one in taken if one.attn == "flash" or one.method == "qlora" or one.model == "Qwen2.5-14B"])
        self.assertIn("too large for this card: about 49.0 GiB, 24.0 GiB are free", left_out.values())
        self.assertIn("flash-attn is not installed", left_out.values())

    def test_on_a_large_card_small_passes_come_last(self):
        passes = points.memory_passes()
        sizes = {one.id(): estimate(1 if one.model == "Qwen2.5-3B" else 30) for one in passes}
        taken, _ = points.select(passes, sizes, 140 * GIB, {"flash-attn", "bitsandbytes"})
        first_small = next((i for i, one in enumerate(taken) if one.model == "Qwen2.5-3B"), len(taken))
        self.assertFalse([one for one in taken[first_small:] if one.model != "Qwen2.5-3B"])

    def test_each_point_comes_once_and_the_most_valuable_first(self):
        memory_ids = [f"memory/{i}" for i in range(40)]
        ids = points.order(memory_ids)
        self.assertEqual(sorted(ids), sorted([*memory_ids, points.PROBE, *points.RUN_POINTS]))
        self.assertEqual(ids[0], "memory/0")
        self.assertEqual(points.wanted(ids, "probe,oom/free"), [one for one in ids if one.startswith(("probe", "oom/free"))])

    def test_a_single_row_is_not_padded_and_full_training_has_no_rank(self):
        alone = points.Pass("tiny", "full", 1, 64, "unequal").estimate_request({})
        self.assertEqual((alone["padded"], alone["lora_rank"]), (False, 0))
        self.assertTrue(points.Pass("tiny", "lora", 2, 64, "unequal").estimate_request({})["padded"])


class Cards(unittest.TestCase):
    CARDS = [{"index": 0, "uuid": "GPU-aa", "name": "A"}, {"index": 1, "uuid": "GPU-bb", "name": "B"}]

    def test_a_card_is_chosen_by_wish_then_by_what_is_visible_then_the_first(self):
        self.assertEqual(card.choose(self.CARDS, "1", "0")["name"], "B")
        self.assertEqual(card.choose(self.CARDS, None, "GPU-bb,0")["name"], "B")
        self.assertEqual(card.choose(self.CARDS, None, None)["name"], "A")
        with self.assertRaises(card.NvmlError):
            card.choose(self.CARDS, "7", None)

    def test_structures_have_the_sizes_of_nvml_h(self):
        import ctypes

        self.assertEqual(ctypes.sizeof(card.MemoryV2) | 2 << 24, 33554472)
        self.assertEqual(ctypes.sizeof(card.ProcessInfo), 24)


class Probe(unittest.TestCase):
    SMI = "0, GPU-a, NVIDIA H200, 9.0, 143771, 600, 1024, 142147, Default, Disabled, 570.86.15\n"

    def smi(self):
        return {**probe.parse_fields(self.SMI), "processes": {7: 1024, 8: None}, "cuda": "12.8"}

    def probed(self):
        memory = {"total": 143771 << 20, "reserved": 600 << 20, "used": (1024 << 20) + 99, "free": 142147 << 20}
        return {
            "index": 0, "uuid": "GPU-a", "name": "NVIDIA H200", "compute_capability": "9.0", "driver": "570.86.15",
            "cuda": "12.8", "compute_mode": "default", "mig": "disabled", "memory": memory,
            "processes": [{"pid": 7, "used": 1024 << 20}, {"pid": 8, "used": None}],
        }

    def test_what_is_the_same_is_the_same(self):
        rows = probe.compare(self.probed(), self.smi())
        self.assertEqual([row for row in rows if not row[3]], [])
        self.assertEqual(len(rows), 15)

    def test_each_difference_is_seen(self):
        for field, value in (("name", "Other"), ("compute_mode", "prohibited"), ("mig", "enabled"), ("processes", [])):
            rows = probe.compare({**self.probed(), field: value}, self.smi())
            self.assertTrue([row for row in rows if not row[3]], field)
        moved = self.probed()
        moved["memory"]["reserved"] += 3 << 20
        self.assertEqual([row[0] for row in probe.compare(moved, self.smi()) if not row[3]], ["memory reserved"])

    def test_what_is_not_available_is_no_number(self):
        self.assertEqual(probe.parse_processes("12, 300\n13, [N/A]\n"), {12: 300, 13: None})
        with self.assertRaises(Failed):
            probe.parse_fields("Field \"memory.reserved\" is not a valid field to query.\n")


class Report(unittest.TestCase):
    def lines(self):
        equal = points.Pass("Qwen2.5-7B", "lora", 2, 3072, "equal")
        unequal = points.Pass("Qwen2.5-3B", "full", 4, 2048, "unequal")
        return [result(equal, 20, 22, 19), result(unequal, 40, 60, 42)]

    def test_errors_and_ratios(self):
        equal, unequal = self.lines()
        self.assertAlmostEqual(report.error(equal), -0.05)
        self.assertAlmostEqual(report.error(unequal), 0.05)
        self.assertAlmostEqual(report.ratio(equal), 1.1)
        # 10 GiB stay; 9 GiB were predicted to come and go, and 12 GiB were kept for them.
        self.assertAlmostEqual(report.rest_ratio(equal), 12 / 9)

    def test_where_nearly_all_stays_there_is_no_ratio_of_the_rest(self):
        self.assertIsNone(report.rest_ratio(result(points.Pass("tiny", "full", 1, 64, "equal"), 10, 11, 10, weights=9.9)))

    def test_the_table_has_the_columns_that_score_memory_reads(self):
        header, first, _ = report.to_csv(self.lines()).splitlines()
        self.assertTrue(header.startswith(",".join(report.STUDY)))
        self.assertTrue(first.startswith("Qwen2.5-7B,qwen2.5,lora,8,all-linear,2,3072,0,0,sdpa,1,1.0,1,7,1,"))

    def test_groups_and_page(self):
        lines = self.lines()
        self.assertEqual(len(report.by_group(lines)["all"]), 2)
        device = {"name": "NVIDIA H200", "total": 141 * GIB, "capability": "9.0", "driver": "1", "cuda": "12.8"}
        page = report.page([*lines, {"id": "oom/free-16", "status": "failed", "why": "it broke", "ok": False}], device, True)
        self.assertTrue(page.startswith("# DRY RUN"))
        self.assertIn("| packed or equal rows | 1 | -5.00 % | -5.00 % | 100 % | 1.150 | 1.100 (1.100 to 1.100) |", page)
        self.assertIn("it broke", page)
        self.assertNotIn("DRY RUN", report.page(lines, device, False))
        self.assertEqual(report.slug("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3")

    def test_quantiles(self):
        self.assertEqual([report.quantile([3, 1, 2], p) for p in (5, 50, 95)], [1, 2, 3])
        self.assertIsNone(report.quantile([], 50))


class Trainings(unittest.TestCase):
    EVENTS = [
        {"event": "step", "pid": 1, "step": 1, "time": 10.0},
        {"event": "step", "pid": 1, "step": 2, "time": 12.0},
        {"event": "out_of_memory", "pid": 1, "step": 3, "time": 13.0},
        {"event": "loaded", "pid": 2, "time": 20.0},
        {"event": "begin", "pid": 2, "step": 2, "time": 21.0},
        {"event": "step", "pid": 2, "step": 3, "time": 24.5},
        {"event": "step", "pid": 2, "step": 4, "time": 26.5},
    ]

    def test_seconds_from_the_error_to_the_next_step(self):
        expected = {"plugins loaded": 7.0, "training begins": 8.0, "next step done": 11.5}
        self.assertEqual(trainings.seconds_to_next_step(self.EVENTS), expected)
        self.assertEqual(trainings.seconds_to_next_step(self.EVENTS[:2]), {})
        # A pass that was tried before step 1 is a plan that did not fit, and not the late death.
        tried = {"event": "out_of_memory", "pid": 0, "step": 1, "time": 1.0, "preflight": True}
        self.assertEqual(trainings.seconds_to_next_step([tried, *self.EVENTS]), expected)

    def test_which_attempt_died_late(self):
        loaded = [{"event": "loaded", "pid": pid, "time": 0.0} for pid in (0, 1)]
        self.assertEqual(trainings.attempt_of_death([*loaded, *self.EVENTS]), 1)
        self.assertIsNone(trainings.attempt_of_death(self.EVENTS[:2]))

    def test_a_step_that_died_has_trained_nothing(self):
        order = [
            {"pid": 1, "step": 1, "ids": [0, 1]}, {"pid": 1, "step": 2, "ids": [2]}, {"pid": 1, "step": 3, "ids": [3]},
            {"pid": 2, "step": 3, "ids": [3, 4]}, {"pid": 2, "step": 4, "ids": [5]},
        ]
        rows = trainings.rows_trained(order, self.EVENTS)
        self.assertEqual(rows, [0, 1, 2, 3, 4, 5])
        self.assertEqual(trainings.once_each(rows, 6), ([], []))
        self.assertEqual(trainings.once_each([0, 2, 2], 4), ([1, 3], [2]))

    def test_steps_are_timed_within_a_process(self):
        self.assertEqual(trainings.step_seconds(self.EVENTS), [2.0, 2.0])

    def test_which_rung_is_lower(self):
        tiers = ["standard 8x4 @3072 sdpa", "standard 4x8 @3072 sdpa", "emergency 1x32 @2048 sdpa"]
        self.assertTrue(oom.is_lower(tiers[:2]) and oom.is_lower(tiers[1:]))
        self.assertFalse(oom.is_lower([tiers[0], tiers[0]]) or oom.is_lower(tiers[1::-1]) or oom.is_lower(tiers[:1]))


class Store(unittest.TestCase):
    def test_results_are_read_back_and_a_cut_line_is_left_out(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "results.jsonl")
            results = Results(path)
            results.add("a", {"status": "cut"})
            results.add("a", {"status": "done", "ok": True})
            with open(path, "a", encoding="utf-8") as file:
                file.write('{"id": "b", "sta')
            again = Results(path)
            self.assertTrue(again.done("a"))
            self.assertFalse(again.done("b"))


class Worker(unittest.TestCase):
    def test_lengths_of_rows(self):
        equal = {"rows": "equal", "length": 96}
        self.assertEqual(memory_pass.row_lengths(equal, 2, random.Random(7)), [96] * 4)
        lengths = memory_pass.row_lengths({"rows": "unequal", "length": 96}, 6, random.Random(7))
        self.assertEqual((len(lengths), max(lengths), lengths[1], lengths[-1]), (12, 96, 96, 96))
        self.assertGreater(len(set(lengths)), 4)


class FakeCuda:
    """A card of so many bytes in the place of torch: enough for the code that only a GPU runs."""

    class OutOfMemoryError(RuntimeError):
        pass

    def __init__(self, total):
        self.total, self.tensors, self.cuda, self.uint8 = total, [], self, "uint8"

    def empty(self, size, dtype, device):
        if size > self.mem_get_info()[0]:
            raise self.OutOfMemoryError
        self.tensors.append(size)
        tensor = mock.Mock()
        tensor.numel.return_value = size
        return tensor

    def mem_get_info(self):
        return self.total - sum(self.tensors), self.total

    def empty_cache(self):
        self.tensors.clear()

    def zeros(self, *_, **__):
        return None

    def memory_allocated(self):
        return 300

    def max_memory_allocated(self):
        return 1300

    def init(self):
        pass

    def synchronize(self):
        pass


def load(path, torch):
    """Returns a file of the suite as a module that finds this torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"torch": torch, "transformers": mock.MagicMock()}):
        spec.loader.exec_module(module)
    return module


class OnACard(unittest.TestCase):
    def test_the_ballast_leaves_what_it_is_told(self):
        torch = FakeCuda(140 * GIB)
        with mock.patch.dict(sys.modules, {"torch": torch}):
            memory = ballast.CudaMemory()
        for wish in (24 * GIB, 80 * GIB, 256 << 20):
            ballast.leave(memory, wish)
            self.assertTrue(0 <= memory.free() - wish < 32 << 20, wish)
            self.assertEqual(memory.amount() + memory.free(), torch.total)
        memory.give_back()
        self.assertEqual(memory.free(), torch.total)
        self.assertFalse(memory.take(141 * GIB))

    def test_what_is_left_to_a_pass_is_too_little_for_it(self):
        torch = FakeCuda(10 << 30)
        plugin = load(HERE / "plugins/memory_runs_out.py", torch)
        self.assertEqual(plugin.bytes_left(1000, 50, 100), 150)
        with tempfile.TemporaryDirectory() as folder:
            events = pathlib.Path(folder, "events.jsonl")
            settings = {"RUNS_OUT": "own", "AT_STEP": "3", "ONCE": f"{folder}/once", "EVENTS": str(events)}
            with mock.patch.dict("os.environ", {f"GPU_SUITE_{name}": value for name, value in settings.items()}):
                state = plugin.RunsOut(plugin.CudaCard())
                inputs = {"input_ids": mock.Mock(**{"numel.return_value": 100})}
                for step in (1, 2, 2, 2):
                    trainer = types.SimpleNamespace(state=types.SimpleNamespace(global_step=step))
                    state.before_pass(trainer, inputs)
                preflight = types.SimpleNamespace(state=trainer.state, mhtraind_preflight=True)
                self.assertFalse(state.is_due(preflight))
            self.assertEqual(torch.mem_get_info()[0], 300)
            self.assertEqual([line["event"] for line in read_lines(events)], ["taken"])

    def test_the_meter_reads_allocator_and_card(self):
        torch = mock.MagicMock()
        cuda = torch.cuda
        cuda.memory_reserved.return_value, cuda.memory_allocated.side_effect = 2 << 20, [0, 8_585_216]
        cuda.max_memory_allocated.return_value, cuda.max_memory_reserved.return_value = 5 * GIB, 6 * GIB
        cuda.memory._snapshot.return_value = {"allocator_settings": {"expandable_segments": True}}
        cuda.memory_stats.return_value = {"num_alloc_retries": 1}
        torch.ones.return_value.untyped_storage.return_value.nbytes.return_value = 32768
        nvml = mock.Mock()
        nvml.memory.side_effect = [{"used": 1 << 30}, {"used": (1 << 30) + (502 << 20)}, {"used": 8 << 30}]
        nvml.processes.return_value = {}
        with mock.patch.dict(sys.modules, {"torch": torch}), mock.patch.object(card, "Nvml", return_value=nvml):
            meter = memory_pass.CudaMeter({"card_index": 0})
        self.assertEqual(meter.context, 500 << 20)
        self.assertEqual(meter.workspace(), 8_585_216 - 65536)
        meter.reset()
        cuda.reset_peak_memory_stats.assert_called_once_with()
        expected = {"allocated": 5 * GIB, "reserved": 6 * GIB, "retries": 1, "expandable_seen": True}
        self.assertEqual(meter.peaks(), {**expected, "nvml_used": 7 * GIB, "nvml_process": None})


if __name__ == "__main__":
    unittest.main()
