"""The companion: what mhtraind runs inside the trainer. Loaded by --external_plugins, ms-swift 3.x and 4.x.

    telemetry   one JSON line for each thing worth knowing, `begin` first: the proof that this file is alive
    preflight   before step 1, one pass over the longest real rows with room taken for gradients and optimizer, so that
                an out-of-memory error comes in the first minute. Training goes on bit for bit as without it
    rescue      on an out-of-memory error outside of optimizer.step(), a checkpoint of the last finished step
    cures       a resume on transformers 4 takes its micro-batch from the command line, and the rows of its own epoch
    stop        a file that appears: save and leave at the end of the step

    MHTRAIND_COMPANION_TELEMETRY   the file that the lines are appended to. Without it this file does nothing
    MHTRAIND_COMPANION_STOP        the file whose appearance asks to stop
    MHTRAIND_COMPANION_OFF         parts to leave out, with commas between: preflight,rescue,cures,stop

Nothing in here may end or change a training: what goes wrong becomes an `error` line. Two things leave on purpose: an
out-of-memory error of the preflight, which is what it is for, and the trainer's own, after the rescue, as it was. Who
counts micro-batches can tell the preflight by `trainer.mhtraind_preflight`.
One process, or several with plain DDP; with anything else (DeepSpeed, FSDP) only telemetry is left; `aside` says so.
"""

import contextlib
import faulthandler
import functools
import gc
import heapq
import importlib.metadata
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback

# Version of the lines. A reader ignores kinds and keys that it does not know.
PROTOCOL = 1
PARTS = ("preflight", "rescue", "cures", "stop")
# At most one `step` line in so many seconds: a line stands for all steps since the one before.
STEP_LINE_EVERY_S = 1.0
# Above so many rows that have no known length, every k-th is looked at for the longest.
ROWS_RANKED_MAX = 200_000
# Buffers of the model (not parameters) up to so many bytes are put back after the preflight.
BUFFERS_BYTES_MAX = 64 << 20


def complain(text):
    """Says something in the trainer's own output, or nowhere: the disk that is full is the output's as well."""
    try:
        print(f"mhtraind companion: {text}", file=sys.stderr)
    except Exception:
        pass


class Telemetry:
    """Appends whole lines to the file. Several ranks may share it: each line is one write. Nothing leaves it."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.began = time.monotonic()
        # A full disk takes the first half of a line. The next line must not be glued to it.
        self.is_torn = False

    def say(self, kind, **facts):
        try:
            line = {"v": PROTOCOL, "kind": kind, "t": round(time.monotonic() - self.began, 3), "pid": os.getpid()}
            line["rank"] = int(os.environ.get("RANK", "0"))
            line.update(facts)
            text = f"{json.dumps(line)}\n".encode()
            text = b"\n" + text if self.is_torn else text
            self.is_torn = os.write(self.file, text) < len(text)
        except Exception as error:  # A full disk, for example. Training matters more.
            complain(f"no telemetry: {type(error).__name__}: {text_of(error)}")


def describe(error):
    """Returns what an error line says: the error, and the lines of this file that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == __file__]
    return {"error": f"{type(error).__name__}: {text_of(error)}"[:500], "lines": lines[-4:]}


def text_of(error):
    try:
        return str(error)
    except Exception:  # An exception class of the user's that cannot be printed.
        return "?"


def is_device_oom(error):
    import torch

    if isinstance(error, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    texts = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in text_of(error) for text in texts)


def versions():
    found = {"python": sys.version.split()[0]}
    for name in ("ms-swift", "transformers", "torch", "accelerate", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


# ---- random state ----------------------------------------------------------------------------------------------------


def random_state(all_devices):
    """Returns the state of all generators, in the form of transformers' rng_state.pth."""
    import numpy
    import torch

    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        cuda = torch.cuda.random
        state["cuda"] = cuda.get_rng_state_all() if all_devices else cuda.get_rng_state()
    return state


def set_random_state(state):
    """Puts a state back that was taken with `all_devices`."""
    import numpy
    import torch

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.random.set_rng_state_all(state["cuda"])


# ---- the longest rows ------------------------------------------------------------------------------------------------


def longest_rows(dataset, count):
    """Returns the indices of the `count` longest rows, longest first."""
    if hasattr(dataset, "packed_length"):
        lengths = dataset.packed_length
        return heapq.nlargest(count, range(len(lengths)), key=lengths.__getitem__)
    table = getattr(dataset, "dataset", dataset)
    columns = getattr(table, "column_names", None) or []
    for name in ("length", "lengths"):
        if name in columns:
            lengths = [max(length) if isinstance(length, (list, tuple)) else length for length in table[name]]
            return heapq.nlargest(count, range(len(lengths)), key=lengths.__getitem__)
    # Not tokenized yet: of the rows with most text those with most tokens.
    stride = -(-len(table) // ROWS_RANKED_MAX)
    candidates = heapq.nlargest(4 * count, range(0, len(table), stride), key=lambda row: len(str(table[row])))
    return heapq.nlargest(count, candidates, key=lambda row: len(dataset[row]["input_ids"]))


# ---- files -----------------------------------------------------------------------------------------------------------


def is_whole(checkpoint, step):
    """Returns whether a checkpoint can be resumed. transformers writes trainer_state.json last."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            found = json.load(file)["global_step"]
    except (OSError, ValueError, KeyError):
        return False
    return found == step and all(
        os.path.exists(os.path.join(checkpoint, name)) for name in ("optimizer.pt", "scheduler.pt")
    )


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder):
    for here, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(here, name))
        sync(here)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- the companion of one trainer ------------------------------------------------------------------------------------


def guarded(hook):
    """A hook whose exception becomes an `error` line, and whose time is counted as the companion's own."""

    @functools.wraps(hook)
    def run(self, *args, **kwargs):
        began = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self.say("error", where=hook.__name__, **describe(error))
        finally:
            self.own_seconds += time.perf_counter() - began

    return run


def make_companion(TrainerCallback, telemetry, parts, stop_file):
    """Returns the callback class. It is made late: transformers must be importable for it."""
    import torch

    class MhtraindCompanion(TrainerCallback):
        # Where the loop is. Weights and optimizer belong to the step `done` in "forward" and "between" alone.
        phase = "start"
        start = done = 0
        rng = None
        first_of_epoch = False
        step_began = line_at = None
        own_seconds = step_seconds = 0.0
        pending_steps, pending_seconds, width, micro_rows = 0, 0.0, 0, 0
        stopping = stop_at = None

        def __init__(self, trainer):
            self.trainer = trainer
            self.say = telemetry.say
            self.parts = set(parts)

        # -- telemetry --

        @guarded
        def begin(self):
            trainer = self.trainer
            args, state = trainer.args, trainer.state
            # Asked by this signal, Python prints where every thread is: it may hang some day. A handler of the user's stays.
            if signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL:
                faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
            self.start = self.done = state.global_step
            kind = str(getattr(trainer.accelerator, "distributed_type", "NO")).rpartition(".")[2]
            plain = args.world_size == 1 if kind == "NO" else kind in ("MULTI_GPU", "MULTI_CPU")
            if not plain:
                self.parts.clear()
                self.say("aside", why=f"{kind} on {args.world_size} ranks: only telemetry is left")
            if args.process_index == 0:
                self.say(
                    "begin",
                    parts=sorted(self.parts),
                    rows=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
                    step=state.global_step,
                    max_steps=state.max_steps,
                    micro_batch=trainer._train_batch_size,
                    accumulation=args.gradient_accumulation_steps,
                    world_size=args.world_size,
                    device=str(args.device),
                    wrapped=type(trainer.model_wrapped).__name__,
                )
            return True

        def memory(self):
            """Returns the allocator's running peaks; nothing without CUDA."""
            if not torch.cuda.is_available() or not torch.cuda.is_initialized():
                return {}
            stats = torch.cuda.memory_stats()
            names = {
                "allocated_peak": "allocated_bytes.all.peak",
                "reserved_peak": "reserved_bytes.all.peak",
                "retries": "num_alloc_retries",
            }
            return {ours: stats.get(theirs, 0) for ours, theirs in names.items()}

        def saw_batch(self, inputs):
            shape = inputs["input_ids"].shape
            self.micro_rows, self.width = shape[0], max(self.width, shape[-1])

        def step_line(self, state, now):
            if self.trainer.args.process_index == 0 and self.pending_steps:
                self.say(
                    "step",
                    step=state.global_step,
                    max_steps=state.max_steps,
                    steps=self.pending_steps,
                    seconds=round(self.pending_seconds, 4),
                    rows=self.micro_rows,
                    width=self.width,
                    own_seconds=round(self.own_seconds, 6),
                    **self.memory(),
                )
            self.line_at, self.pending_steps, self.pending_seconds, self.width = now, 0, 0.0, 0

        @guarded
        def end(self):
            state = self.trainer.state
            self.step_line(state, time.monotonic())
            if self.stopping and self.trainer.args.process_index == 0:
                self.say("stopped", step=state.global_step, max_steps=state.max_steps)
            self.say(
                "end",
                step=state.global_step,
                max_steps=state.max_steps,
                own_seconds=round(self.own_seconds, 6),
                step_seconds=round(self.step_seconds, 6),
            )

        # -- the loop's callbacks, in their order --

        def on_train_begin(self, args, state, control, **kwargs):
            if not self.begin():
                # What kind of training this is was not understood: hands off.
                self.parts.clear()
            if "preflight" in self.parts:
                self.preflight()

        @guarded
        def on_epoch_begin(self, args, state, control, **kwargs):
            # A resume at an epoch's boundary loads the random state before it makes the iterator, one inside an
            # epoch after it has fetched a window. So the first step of an epoch keeps what was captured here.
            self.rng = random_state(args.world_size > 1)
            self.first_of_epoch = True

        @guarded
        def on_step_begin(self, args, state, control, **kwargs):
            self.phase = "forward"
            if not self.first_of_epoch:
                self.rng = random_state(args.world_size > 1)
            self.first_of_epoch = False
            self.step_began = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.phase = "optimizer"

        @guarded
        def on_step_end(self, args, state, control, **kwargs):
            # Weights, optimizer and scheduler have moved, the gradients are gone, the step is counted.
            self.phase, self.done = "between", state.global_step
            self.rng = random_state(args.world_size > 1)
            if self.step_began is not None:
                seconds = time.perf_counter() - self.step_began
                self.step_seconds += seconds
                self.pending_seconds += seconds
                self.pending_steps += 1
            now = time.monotonic()
            if self.line_at is None or now - self.line_at >= STEP_LINE_EVERY_S:
                self.step_line(state, now)
            if "stop" in self.parts and stop_file and self.stop_is_due(state.global_step):
                self.stopping = True
                control.should_save = control.should_training_stop = True
                self.say("stopping", step=state.global_step, max_steps=state.max_steps)

        @guarded
        def on_save(self, args, state, control, **kwargs):
            if args.process_index == 0:
                self.say("saved", step=state.global_step)

        def stop_is_due(self, step):
            """Returns whether to stop after this step. Several ranks must all leave after the same one.

            Rank 0 sees the file and writes down the next step; whoever ends that step has reduced gradients with
            rank 0 after the write, so all of them can read it.
            """
            if self.trainer.args.world_size == 1:
                return os.path.exists(stop_file)
            agreed = f"{stop_file}.step"
            if self.trainer.args.process_index == 0 and self.stop_at is None and os.path.exists(stop_file):
                self.stop_at = step + 1
                with open(f"{agreed}.new", "w", encoding="ascii") as file:
                    file.write(str(self.stop_at))
                os.replace(f"{agreed}.new", agreed)
            elif self.stop_at is None and os.path.exists(agreed):
                with open(agreed, encoding="ascii") as file:
                    self.stop_at = int(file.read())
            return self.stop_at is not None and step >= self.stop_at

        # -- preflight --

        def preflight(self):
            """One pass over the longest rows. Only an out-of-memory error leaves it."""
            before = self.phase
            self.phase, began = "preflight", time.perf_counter()
            try:
                with self.undisturbed_rows():
                    rows, why = self.longest_batch()
                    if rows is None:
                        self.say("preflight_skipped", why=why)
                        return
                    self.try_rows(rows, began)
            except Exception as error:
                if is_device_oom(error):
                    self.say("preflight_oom", micro_batch=self.trainer._train_batch_size, **describe(error))
                    raise
                self.say("error", where="preflight", **describe(error))
            finally:
                self.phase, self.width = before, 0

        @contextlib.contextmanager
        def undisturbed_rows(self):
            """Puts back what looking at rows moves: to encode one may draw, and one that cannot be encoded is replaced
            by the next of ms-swift's own order."""
            dataset = self.trainer.train_dataset
            rng, fetch = random_state(True), getattr(dataset, "_idx", None)
            try:
                yield
            finally:
                if fetch is not None:
                    dataset._idx = fetch
                set_random_state(rng)

        def longest_batch(self):
            dataset = self.trainer.train_dataset
            if not hasattr(dataset, "__len__"):
                return None, "the data set is streamed: its longest rows are not known"
            if len(dataset) == 0:
                return None, "there are no rows"
            return longest_rows(dataset, self.trainer._train_batch_size), None

        def try_rows(self, rows, began):
            trainer = self.trainer
            model, accelerator, dataset = trainer.model_wrapped, trainer.accelerator, trainer.train_dataset
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            buffers = [buffer for buffer in model.buffers()]
            kept = {
                "grads": [parameter.grad for parameter in trained],
                "buffers": [buffer.clone() for buffer in buffers] if bytes_of(buffers) <= BUFFERS_BYTES_MAX else [],
                "metrics": getattr(trainer, "custom_metrics", None),
                "accumulation": getattr(trainer, "current_gradient_accumulation_steps", None),
                "sync": accelerator.gradient_state.sync_gradients,
                "training": model.training,
            }
            facts, ballast = {}, []
            try:
                batch = trainer.data_collator([dataset[row] for row in rows])
                if kept["metrics"] is not None:
                    trainer.custom_metrics = {name: type(m)(m.default_factory) for name, m in kept["metrics"].items()}
                trainer.current_gradient_accumulation_steps = 1
                # What a later step finds in memory: both moments, and the gradients of earlier micro-batches.
                if not trainer.optimizer.state and self.keeps_moments_as_parameters():
                    ballast = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
                if trainer.args.gradient_accumulation_steps > 1:
                    for parameter in trained:
                        parameter.grad = torch.zeros_like(parameter)
                counted = (batch["labels"][..., 1:] != -100).sum() if "labels" in batch else None
                facts = {"rows": len(rows), "width": batch["input_ids"].shape[-1], "ballast_bytes": bytes_of(ballast)}
                # A mark for plugins that count micro-batches: this one is not part of the training.
                trainer.mhtraind_preflight = True
                with accelerator.no_sync(model):
                    trainer.training_step(model, batch, None if counted is None else counted.to(trainer.args.device))
                facts.update(self.memory())
            finally:
                trainer.mhtraind_preflight = False
                ballast.clear()
                for parameter, grad in zip(trained, kept["grads"]):
                    parameter.grad = grad
                with torch.no_grad():
                    for buffer, value in zip(buffers, kept["buffers"]):
                        buffer.copy_(value)
                if kept["metrics"] is not None:
                    trainer.custom_metrics = kept["metrics"]
                if kept["accumulation"] is not None:
                    trainer.current_gradient_accumulation_steps = kept["accumulation"]
                accelerator.gradient_state._set_sync_gradients(kept["sync"])
                model.train(kept["training"])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                # Among them the count of retries.
                torch.cuda.reset_accumulated_memory_stats()
            self.say("preflight", seconds=round(time.perf_counter() - began, 4), **facts)

        def keeps_moments_as_parameters(self):
            """Whether the optimizer keeps two moments like each parameter. Those of 8 bits, on the host or of low rank are
            called Adam as well, and ballast for moments that never come would end a training that fits."""
            kind = type(self.bare_optimizer())
            return kind.__module__.startswith("torch.optim.") and "Adam" in kind.__name__

        def bare_optimizer(self):
            optimizer = self.trainer.optimizer
            return getattr(optimizer, "optimizer", optimizer)

        # -- rescue --

        def rescue(self, error):
            """After an out-of-memory error: writes a checkpoint of the last finished step, or says why there is none.
            Nothing leaves it."""
            try:
                if not is_device_oom(error):
                    return
                facts = {"step": self.done, "phase": self.phase}
                if self.done == self.start:
                    self.say("rescue_needless", why="no step was finished since the start", **facts)
                    return
                why = self.why_no_rescue()
                if why is not None:
                    self.say("rescue_refused", why=why, **facts)
                    return
                self.let_go(error)
                self.write_rescue(error)
            except Exception as failure:
                self.say("rescue_failed", step=self.done, **describe(failure))

        def why_no_rescue(self):
            if "rescue" not in self.parts:
                return "switched off, or a kind of parallel training that it cannot save"
            if self.phase not in ("forward", "between"):
                return "weights and optimizer may be of different steps"
            if self.trainer.state.global_step != self.done:
                return f"the trainer counts step {self.trainer.state.global_step}"
            if self.trainer.args.save_only_model:
                return "save_only_model is set"
            return None

        def let_go(self, error):
            """Frees what the dead pass holds: nearly all of it hangs on the frames of the traceback."""
            chain, seen = [error], set()
            while chain:
                one = chain.pop()
                if one is None or id(one) in seen:
                    continue
                seen.add(id(one))
                traceback.clear_frames(one.__traceback__)
                chain += [one.__cause__, one.__context__]
            self.trainer.model_wrapped.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                # Raises when the context is dead, and then nothing can be copied from the device.
                torch.cuda.synchronize()

        def write_rescue(self, error):
            trainer, state, began = self.trainer, self.trainer.state, time.perf_counter()
            output_dir = trainer.args.output_dir
            final = os.path.join(output_dir, f"checkpoint-{self.done}")
            if is_whole(final, self.done):
                self.say("rescue_needless", step=self.done, phase=self.phase, why="it was saved already")
                return
            expected = self.checkpoint_bytes()
            free = shutil.disk_usage(output_dir).free
            if free < expected + expected // 20:
                self.say("rescue_refused", step=self.done, phase=self.phase, why=f"{expected} bytes, {free} are free")
                return
            self.say("rescue_begin", step=self.done, phase=self.phase, bytes=expected)
            # The name is none that rotation or a search for the last checkpoint takes for one.
            parent = os.path.join(output_dir, f"rescue-tmp-{os.getpid()}")
            staged = os.path.join(parent, "checkpoint")
            os.makedirs(staged)
            # ms-swift copies args.json from the directory above into each checkpoint.
            if os.path.exists(os.path.join(output_dir, "args.json")):
                shutil.copy(os.path.join(output_dir, "args.json"), parent)
            trainer._save(staged)
            torch.save(trainer.optimizer.state_dict(), os.path.join(staged, "optimizer.pt"))
            torch.save(trainer.lr_scheduler.state_dict(), os.path.join(staged, "scheduler.pt"))
            if getattr(trainer.accelerator, "scaler", None) is not None:
                torch.save(trainer.accelerator.scaler.state_dict(), os.path.join(staged, "scaler.pt"))
            many = trainer.args.world_size > 1
            name = f"rng_state_{trainer.args.process_index}.pth" if many else "rng_state.pth"
            torch.save(self.rng, os.path.join(staged, name))
            note = {"step": self.done, "phase": self.phase, "error": text_of(error)[:500], "protocol": PROTOCOL}
            with open(os.path.join(staged, "rescue.json"), "w", encoding="utf-8") as file:
                json.dump(note, file)
            self.update_stateful_callbacks(state)
            state.last_model_checkpoint = final
            state.save_to_json(os.path.join(staged, "trainer_state.json"))
            sync_tree(staged)
            if is_whole(final, self.done):
                # Another rank was here meanwhile. Its checkpoint is as good, and it has said so.
                shutil.rmtree(parent, ignore_errors=True)
                self.say("rescue_needless", step=self.done, phase=self.phase, why="another rank has saved it")
                return
            if os.path.lexists(final):
                os.rename(final, os.path.join(parent, "partial"))
            os.rename(staged, final)
            sync(output_dir)
            shutil.rmtree(parent, ignore_errors=True)
            self.say("rescued", step=self.done, path=final, seconds=round(time.perf_counter() - began, 4))

        def checkpoint_bytes(self):
            parameters = list(self.trainer.model.parameters())
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            # An adapter's checkpoint has no base weights.
            weights = trained if hasattr(self.trainer.model, "peft_config") else parameters
            states = self.bare_optimizer().state.values()
            moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
            return bytes_of(weights) + bytes_of(moments) + (1 << 20)

        def update_stateful_callbacks(self, state):
            """As Trainer._save_checkpoint does, without its control: what it was about to do is not repeated."""
            for callback in self.trainer.callback_handler.callbacks:
                name = type(callback).__name__
                if hasattr(callback, "state") and name in state.stateful_callbacks:
                    if not isinstance(state.stateful_callbacks[name], list):
                        state.stateful_callbacks[name] = callback.state()

    return MhtraindCompanion


# ---- installation ----------------------------------------------------------------------------------------------------


def cure_row_order(telemetry):
    """A resume inside a later epoch: ms-swift 3.x makes a new loader to skip rows, and that one begins at epoch 0."""
    from swift.trainers import mixin

    original = mixin.DataLoaderMixin.get_train_dataloader

    @functools.wraps(original)
    def get_train_dataloader(self, skip_batches=0):
        loader = original(self, skip_batches=skip_batches)
        try:
            if skip_batches > 0 and self.state.epoch is not None:
                sampler = getattr(loader, "batch_sampler", None)
                while sampler is not None and not hasattr(sampler, "set_epoch"):
                    sampler = getattr(sampler, "batch_sampler", None)
                if sampler is not None:
                    # The epoch of the checkpoint. It is no whole number: at a boundary nothing is skipped.
                    sampler.set_epoch(int(self.state.epoch))
                    telemetry.say("cured", what="row_order", epoch=int(self.state.epoch), skipped=skip_batches)
        except Exception as error:
            telemetry.say("error", where="cure_row_order", **describe(error))
        return loader

    mixin.DataLoaderMixin.get_train_dataloader = get_train_dataloader


def install(telemetry, parts, stop_file):
    import transformers
    from transformers import Trainer, TrainerCallback

    if getattr(Trainer, "mhtraind_companion", None) is not None:
        return
    if "rescue" in parts and not hasattr(TrainerCallback, "on_pre_optimizer_step"):
        # Without this callback nobody knows when the optimizer is at work.
        parts = parts - {"rescue"}
        telemetry.say("aside", why="this transformers does not tell when the optimizer steps: no rescue")
    installed = versions()
    old = int(transformers.__version__.split(".")[0]) < 5
    cures = []
    if "cures" in parts and old:
        cure_row_order(telemetry)
        cures = ["checkpoint_batch", "row_order"]
    Companion = make_companion(TrainerCallback, telemetry, parts, stop_file)
    init, loop, step = Trainer.__init__, Trainer._inner_training_loop, Trainer.training_step

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        try:
            self.mhtraind = Companion(self)
            self.add_callback(self.mhtraind)
        except Exception as error:
            telemetry.say("error", where="__init__", **describe(error))

    @functools.wraps(loop)
    def _inner_training_loop(self, *args, **kwargs):
        companion = getattr(self, "mhtraind", None)
        try:
            if "checkpoint_batch" in cures and "batch_size" in kwargs and not self.args.auto_find_batch_size:
                # transformers 4 took it from the checkpoint that is resumed.
                if kwargs["batch_size"] != self.args.train_batch_size:
                    telemetry.say("cured", what="checkpoint_batch", was=kwargs["batch_size"])
                kwargs["batch_size"] = self.args.train_batch_size
        except Exception as error:
            telemetry.say("error", where="cure_checkpoint_batch", **describe(error))
        try:
            return loop(self, *args, **kwargs)
        except Exception as error:
            if companion is not None:
                companion.rescue(error)
            raise
        finally:
            if companion is not None:
                companion.end()

    @functools.wraps(step)
    def training_step(self, model, inputs, *args, **kwargs):
        try:
            self.mhtraind.saw_batch(inputs)
        except Exception:  # A model whose rows are no token ids has no width.
            pass
        return step(self, model, inputs, *args, **kwargs)

    Trainer.__init__ = __init__
    Trainer._inner_training_loop = _inner_training_loop
    Trainer.training_step = training_step
    Trainer.mhtraind_companion = Companion
    telemetry.say("loaded", versions=installed, parts=sorted(parts), cures=cures)


def main():
    path = os.environ.get("MHTRAIND_COMPANION_TELEMETRY")
    if not path:
        return
    from torch.utils.data import get_worker_info

    # ms-swift 4.x loads plugins again in every data loader worker, which trains nothing.
    if get_worker_info() is not None:
        return
    off = {part.strip() for part in os.environ.get("MHTRAIND_COMPANION_OFF", "").split(",")}
    telemetry = Telemetry(path)
    try:
        install(telemetry, set(PARTS) - off, os.environ.get("MHTRAIND_COMPANION_STOP"))
    except Exception as error:
        telemetry.say("error", where="install", **describe(error))


try:
    main()
except Exception as error:  # Whatever it is: the training does not end for it.
    complain(f"not loaded: {type(error).__name__}: {text_of(error)}")
