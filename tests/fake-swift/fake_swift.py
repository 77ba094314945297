#!/usr/bin/env python3
"""A trainer that trains nothing: it writes what ms-swift would write, as a scenario says.

    FAKE_SWIFT_SCENARIO='{"rows": 320, "oom": {"capacity_gib": 24}}' fake_swift.py sft --output_dir D ...

For black-box tests of a supervisor, where a real launch costs seconds. Python 3.8 or newer, no dependencies.
The leading `sft` may be missing, as when an interpreter is called on ms-swift's own script.

The scenario is a JSON object; every key may be missing. An unknown key is an error, so a typo cannot pass a test.

    dialect         "4" (default) or "3": the forms of ms-swift 4.x with transformers 5, or 3.x with transformers 4
    rows            length of the train set after filtering; default: the lines of the --dataset files
    start_seconds   how long loading takes (0)
    step_seconds    how long a step takes (0)
    oom             {"capacity_gib": 24, "base_gib": 8, "per_sample_gib": 3, "at_step": 1, "kind": "device"}
                    memory runs out in at_step when base + per_sample x micro-batch > capacity. Kinds: device, driver,
                    cublas, neighbour, fragmented, load, eval, save, host_worker, host
                    ("load" looks at base alone; "eval" is a training step whose traceback says evaluate)
    fail            {"at_step": 3, "text": "...", "exit_code": 1}: writes the text to stderr and ends
    kill            {"at_step": 3, "signal": 9, "partial_checkpoint": true}: kills itself, perhaps amid a save
    hang_at_step    goes on living and does nothing more
    diverge_at_step the loss is NaN from here on
    on_sigterm      "die" (default), "ignore", or "save": finish the step, save, exit 75
    workers         how many processes it starts, each in a session of its own and without a parent
    workers_ignore_sigterm   (false)
    noise_bytes     how much it prints to stderr before training
    exit_code       instead of 0 at the end
    end_line        false: the end-of-training line is missing
    lose_steps      steps at the end that are silently not trained although the run claims success
    witness         a directory of the test's own: what this trainer really did is appended to trainers.jsonl there
    attempts        {"2": {...}}: keys that replace the ones above when --output_dir ends in attempt-2

The two traps of resuming under 3.x are played too: the checkpoint's micro-batch wins over the command line, and after a
resume inside a later epoch the rows of the first epoch are trained again.

Beside ms-swift's files it writes into the output directory, for the test to look at:

    fake-argv.json  the arguments, the names (not the values) of the environment, and the values of SETTINGS
    fake-pids.json  {"trainer": pid, "workers": [pid, ...]}
    fake-rows.jsonl {"step": 7, "epoch": 0, "micro_batch": 4, "rows": [...]}: which rows each step trained

A line of trainers.jsonl is {"at": seconds of CLOCK_MONOTONIC, "pid", "job": the name of the directory above attempt-N,
"what"}, where "what" is "start", "step" and "saved" (with "step"), "end" (with "code"), or "beside" (with "of"): another
trainer of this job, or on this card, was still alive at the start. It and its workers hold a lock on each as long as
they live, so that the kernel answers this and no clock.
"""

import datetime
import fcntl
import json
import math
import os
import random
import re
import signal
import sys
import time

KNOWN = {
    "dialect", "rows", "start_seconds", "step_seconds", "oom", "fail", "kill", "hang_at_step", "diverge_at_step",
    "on_sigterm", "workers", "workers_ignore_sigterm", "noise_bytes", "exit_code", "end_line", "lose_steps", "attempts",
    "witness",
}
WHOLE_NUMBERS = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "logging_steps", "save_total_limit",
    "max_length", "data_seed", "seed",
}
SAFE_STOP_CODE = 75
SETTINGS = ("MASTER_PORT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Scenario:
    """The scenario's keys with their defaults."""

    def __init__(self, keys):
        unknown = set(keys) - KNOWN
        if unknown:
            sys.exit(f"fake-swift: unknown scenario keys {sorted(unknown)}")
        self.dialect = keys.get("dialect", "4")
        if self.dialect not in ("3", "4"):
            sys.exit(f"fake-swift: unknown dialect {self.dialect!r}")
        self.rows = keys.get("rows")
        self.start_seconds = keys.get("start_seconds", 0)
        self.step_seconds = keys.get("step_seconds", 0)
        self.oom = keys.get("oom")
        self.fail = keys.get("fail")
        self.kill = keys.get("kill")
        self.hang_at_step = keys.get("hang_at_step")
        self.diverge_at_step = keys.get("diverge_at_step")
        self.on_sigterm = keys.get("on_sigterm", "die")
        self.workers = keys.get("workers", 0)
        self.workers_ignore_sigterm = keys.get("workers_ignore_sigterm", False)
        self.noise_bytes = keys.get("noise_bytes", 0)
        self.exit_code = keys.get("exit_code", 0)
        self.end_line = keys.get("end_line", True)
        self.lose_steps = keys.get("lose_steps", 0)
        self.witness = keys.get("witness")

    @staticmethod
    def for_attempt(text, output_dir):
        keys = json.loads(text) if text else {}
        attempt = re.search(r"attempt-(\d+)$", output_dir.rstrip("/"))
        own = keys.get("attempts", {}).get(attempt.group(1), {}) if attempt else {}
        return Scenario({**keys, **own})


class Witness:
    """Tells a test what this trainer does, in a place that no supervisor knows."""

    def __init__(self, directory, output_dir):
        self.job = os.path.basename(os.path.dirname(output_dir.rstrip("/")))
        self.file, self.locks = None, []
        if directory:
            self.file = os.open(os.path.join(directory, "trainers.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self.say("start")
            card = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
            self.take(directory, f"job-{self.job}")
            self.take(directory, f"card-{card}")

    def take(self, directory, name):
        lock = os.open(os.path.join(directory, f"{name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.say("beside", of=name)
        self.locks.append(lock)

    def say(self, what, **facts):
        if self.file is not None:
            line = {"at": time.monotonic(), "pid": os.getpid(), "job": self.job, "what": what, **facts}
            os.write(self.file, (json.dumps(line) + "\n").encode())


class TrainerError(Exception):
    """An exception of the trainer, with the text that its traceback ends in."""

    def __init__(self, text, exit_code=1, raw=False):
        super().__init__(text)
        self.exit_code = exit_code
        self.raw = raw


def parse_arguments(argv):
    """Returns the flags as a dictionary; a flag may have several values or none."""
    arguments, name = {}, None
    for word in argv:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            arguments[name] = [value] if value else []
        elif name is None:
            usage(f"unrecognized arguments: {word}")
        else:
            arguments[name].append(word)
    flags = {name: values[0] if len(values) == 1 else values for name, values in arguments.items()}
    for name in WHOLE_NUMBERS & set(flags):
        try:
            flags[name] = int(flags[name])
        except (TypeError, ValueError):
            usage(f"argument --{name}: invalid int value: {flags[name]!r}")
    return flags


def usage(message):
    err(f"usage: sft.py [-h] [--model MODEL] ...\nsft.py: error: {message}\n")
    sys.exit(2)


def out(text):
    os.write(1, text.encode())


def err(text):
    data = text.encode()
    while data:
        data = data[os.write(2, data):]


def info(text):
    err(f"[INFO:swift] {text}\n")


def bar(done, total, seconds):
    tenths = 10 * done // total if total else 10
    blocks = "█" * tenths + " " * (10 - tenths)
    percent = 100 * done // total if total else 100
    err(f"\rTrain: {percent:3d}%|{blocks}| {done}/{total} [00:{int(seconds):02d}<00:00,  6.12it/s]")


class Trainer:
    def __init__(self, flags, scenario):
        self.flags, self.scenario = flags, scenario
        self.output_dir = flags["output_dir"]
        if str(flags.get("add_version", "true")).lower() != "false":
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            self.output_dir = os.path.join(self.output_dir, f"v0-{stamp}")
        self.micro_batch = flags.get("per_device_train_batch_size", 1)
        self.accumulation = flags.get("gradient_accumulation_steps", math.ceil(16 / self.micro_batch))
        self.state = {"global_step": 0, "log_history": []}
        self.last_checkpoint = None
        self.stop_asked = False
        self.replayed_epoch = None
        self.began = time.monotonic()
        self.witness = Witness(scenario.witness, self.output_dir)

    # -- before training

    def run(self):
        os.makedirs(self.output_dir, exist_ok=True)
        self.write_json("fake-argv.json", {"argv": sys.argv[1:], "environment": sorted(os.environ),
                                           "settings": {name: os.environ.get(name) for name in SETTINGS}})
        self.check_arguments()
        self.set_signals()
        self.start_workers()
        info(f"output_dir: {self.output_dir}")
        info("Global seed set to 42")
        self.write_json("args.json", self.flags)
        time.sleep(self.scenario.start_seconds)
        self.maybe_oom(phase="load")
        self.rows = self.scenario.rows if self.scenario.rows is not None else self.count_rows()
        info(f"Start time of running main: {datetime.datetime.now()}")
        info(f"swift.__version__: {'3.12.6' if self.scenario.dialect == '3' else '4.6.0'}")
        err(f"\rMap:   0%|          | 0/{self.rows} [00:00<?, ? examples/s]")
        err(f"\rMap: 100%|██████████| {self.rows}/{self.rows} [00:00<00:00, 2266.59 examples/s]\n")
        if self.rows == 0:
            raise TrainerError("AssertionError" if self.scenario.dialect == "3"
                               else "TypeError: 'NoneType' object is not iterable")
        info(f"Dataset Token Length: 158.824342±32.278866, min=105.000000, max=217.000000, size={self.rows}")
        info(f"The logging file will be saved in: {self.output_dir}/logging.jsonl")
        self.noise()
        self.plan_steps()
        self.resume()
        self.train()

    def check_arguments(self):
        wrong, kind = ("tuner_type", "3") if self.scenario.dialect == "3" else ("train_type", "4")
        if wrong in self.flags:
            raise TrainerError(f"ValueError: remaining_argv: ['--{wrong}', {self.flags[wrong]!r}]")
        tuner = self.flags.get("train_type" if kind == "3" else "tuner_type", "lora")
        if tuner == "qlora":
            name = "train_type" if kind == "3" else "tuner_type"
            raise TrainerError(f"ValueError: Unknown {name}: qlora")
        if str(self.flags.get("packing", "false")).lower() == "true" and "flash" not in str(self.flags.get("attn_impl")):
            raise TrainerError('ValueError: The "packing" feature requires a flash attention implementation. '
                               'Please use one of: "flash_attn", "flash_attention_2", "flash_attention_3".')

    def set_signals(self):
        if self.scenario.on_sigterm == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif self.scenario.on_sigterm == "save":
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop_asked", True))

    def start_workers(self):
        """Each worker is an orphan in its own session: neither parent nor group lead to it."""
        pids = []
        for _ in range(self.scenario.workers):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.setsid()
                if os.fork() == 0:
                    how = signal.SIG_IGN if self.scenario.workers_ignore_sigterm else signal.SIG_DFL
                    signal.signal(signal.SIGTERM, how)
                    os.write(write, b"%d\n" % os.getpid())
                    os.close(write)
                    while True:
                        time.sleep(3600)
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as pipe:
                pids.append(int(pipe.readline()))
            os.waitpid(child, 0)
        self.write_json("fake-pids.json", {"trainer": os.getpid(), "workers": pids})

    def count_rows(self):
        datasets = self.flags.get("dataset", [])
        total = 0
        for dataset in [datasets] if isinstance(datasets, str) else datasets:
            path, _, limit = dataset.partition("#")
            if not os.path.exists(path):
                raise TrainerError("requests.exceptions.ConnectionError: cannot reach the hub")
            with open(path, "rb") as lines:
                count = sum(1 for line in lines if line.strip())
            total += min(count, int(limit)) if limit else count
        return total

    def noise(self):
        line = "[WARNING:swift] a library says the same thing once more\n"
        for _ in range(self.scenario.noise_bytes // len(line)):
            err(line)

    def plan_steps(self):
        self.steps_per_epoch = math.ceil(self.rows / (self.micro_batch * self.accumulation))
        epochs = float(self.flags.get("num_train_epochs", 3))
        max_steps = self.flags.get("max_steps", -1)
        self.max_steps = max_steps if max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)
        save_steps = float(self.flags.get("save_steps", 500))
        self.save_steps = math.ceil(save_steps * self.max_steps) if save_steps < 1 else int(save_steps)

    def resume(self):
        checkpoint = self.flags.get("resume_from_checkpoint")
        if not checkpoint:
            return
        path = os.path.join(checkpoint, "trainer_state.json")
        if not os.path.isfile(path):
            raise TrainerError(f"FileNotFoundError: [Errno 2] No such file or directory: '{path}'")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            if not os.path.isfile(os.path.join(checkpoint, name)):
                raise TrainerError(f"RuntimeError: {name} of {checkpoint} cannot be read")
        with open(path) as file:
            self.state = json.load(file)
        saved = self.state["train_batch_size"]
        if saved != self.micro_batch:
            err("Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint "
                f"directory: \n\tper_device_train_batch_size: {self.micro_batch} (from args) != {saved} "
                "(from trainer_state.json)\n")
            if self.scenario.dialect == "3":
                # transformers 4.57 silently takes the old batch, with the new accumulation.
                self.micro_batch = saved
                self.plan_steps()
        epoch, place = divmod(self.state["global_step"], self.steps_per_epoch)
        if self.scenario.dialect == "3" and place > 0:
            # 3.x skips rows in a rebuilt loader that is back on epoch 0.
            self.replayed_epoch = epoch

    # -- training

    def train(self):
        err(f"\rTrain:   0%|          | 0/{self.max_steps} [00:00<?, ?it/s]")
        step = self.state["global_step"]
        while step < self.max_steps - self.scenario.lose_steps:
            step += 1
            self.before_step(step)
            time.sleep(self.scenario.step_seconds)
            self.record_rows(step)
            self.witness.say("step", step=step)
            self.state["global_step"] = step
            bar(step, self.max_steps, time.monotonic() - self.began)
            if step == 1 or step % self.flags.get("logging_steps", 5) == 0 or step == self.max_steps:
                self.log(step)
            if step % self.save_steps == 0 or step == self.max_steps or self.stop_asked:
                self.save(step)
            if self.stop_asked:
                break
        if self.state["global_step"] >= self.max_steps or self.stop_asked:
            self.log_line({"train_runtime": round(time.monotonic() - self.began, 4), "train_samples_per_second": 40.071,
                           "train_steps_per_second": 5.009, "total_flos": 8603751936.0, "train_loss": 5.96242208})
        self.summary()
        if self.scenario.end_line:
            info(f"last_model_checkpoint: {self.last_checkpoint}")
            info("best_model_checkpoint: None")
            info(f"End time of running main: {datetime.datetime.now()}")
        if self.stop_asked and self.state["global_step"] < self.max_steps:
            sys.exit(SAFE_STOP_CODE)
        sys.exit(self.scenario.exit_code)

    def before_step(self, step):
        self.maybe_oom(phase="train", step=step)
        scenario = self.scenario
        if scenario.fail and scenario.fail.get("at_step", 1) == step:
            raise TrainerError(scenario.fail["text"], scenario.fail.get("exit_code", 1), raw=True)
        if scenario.kill and scenario.kill.get("at_step", 1) == step:
            if scenario.kill.get("partial_checkpoint"):
                partial = os.path.join(self.output_dir, f"checkpoint-{step}")
                os.makedirs(partial, exist_ok=True)
                self.write_bytes(os.path.join(partial, "adapter_model.safetensors"), b"half")
            os.kill(os.getpid(), scenario.kill.get("signal", signal.SIGKILL))
            time.sleep(3600)
        while scenario.hang_at_step == step:
            time.sleep(3600)

    def record_rows(self, step):
        """The row at a position depends on seed and epoch only, not on the shape of the batch."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = list(range(self.rows))
        drawn = 0 if epoch == self.replayed_epoch else epoch
        random.Random(self.flags.get("data_seed", 42) + drawn).shuffle(order)
        batch = self.micro_batch * self.accumulation
        rows = order[place * batch:(place + 1) * batch]
        self.append("fake-rows.jsonl", {"step": step, "epoch": epoch, "micro_batch": self.micro_batch, "rows": rows})

    def log(self, step):
        diverged = self.scenario.diverge_at_step is not None and step >= self.scenario.diverge_at_step
        loss = float("nan") if diverged else 6.0 / (1 + step / 10)
        rate = float(self.flags.get("learning_rate", 1e-4)) * (1 - step / max(self.max_steps, 1))
        entry = {"loss": round(loss, 8), "grad_norm": 0.97, "learning_rate": round(rate, 10), "token_acc": 0.04}
        self.state["log_history"].append({**entry, "epoch": self.epoch(), "step": step})
        self.log_line(entry)

    def epoch(self):
        return round(self.state["global_step"] / self.steps_per_epoch, 8)

    def log_line(self, entry):
        step, elapsed = self.state["global_step"], time.monotonic() - self.began
        line = {**entry, "epoch": self.epoch(), "global_step/max_steps": f"{step}/{self.max_steps}"}
        if self.scenario.dialect == "3":
            line["percentage"] = f"{100 * step / max(self.max_steps, 1):.2f}%"
        line.update({"elapsed_time": f"{int(elapsed)}s", "remaining_time": "1s",
                     "train_speed(s/it)": round(elapsed / max(step, 1), 6)})
        self.append("logging.jsonl", line)
        # 4.x prints rounded strings, 3.x numbers.
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in line.items()}
        out(f"{shown if self.scenario.dialect == '4' else line}\n")

    def save(self, step):
        path = os.path.join(self.output_dir, f"checkpoint-{step}")
        info(f"Saving model checkpoint to {path}")
        os.makedirs(path, exist_ok=True)
        self.maybe_oom(phase="save", step=step)
        self.write_bytes(os.path.join(path, "adapter_model.safetensors"), b"\2\0\0\0\0\0\0\0{}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            self.write_bytes(os.path.join(path, name), b"fake " + name.encode())
        for name, content in (("adapter_config.json", {"peft_type": "LORA"}), ("additional_config.json", {}),
                              ("args.json", self.flags), ("trainer_state.json", self.trainer_state())):
            self.write_json(os.path.join(f"checkpoint-{step}", name), content)
        self.last_checkpoint = path
        if self.scenario.dialect == "4":
            link = os.path.join(self.output_dir, "last-checkpoint")
            if os.path.islink(link):
                os.unlink(link)
            os.symlink(f"checkpoint-{step}", link)
        self.drop_old_checkpoints()
        self.witness.say("saved", step=step)

    def trainer_state(self):
        return {**self.state, "best_global_step": None, "best_metric": None, "best_model_checkpoint": None,
                "epoch": self.epoch(), "eval_steps": self.save_steps, "is_world_process_zero": True,
                "logging_steps": self.flags.get("logging_steps", 5), "max_steps": self.max_steps,
                "num_train_epochs": math.ceil(self.max_steps / self.steps_per_epoch), "save_steps": self.save_steps,
                "stateful_callbacks": {}, "train_batch_size": self.micro_batch}

    def drop_old_checkpoints(self):
        limit = self.flags.get("save_total_limit")
        found = sorted(int(name[11:]) for name in os.listdir(self.output_dir) if re.fullmatch(r"checkpoint-\d+", name))
        for step in found[:-limit] if limit else []:
            path = os.path.join(self.output_dir, f"checkpoint-{step}")
            for name in os.listdir(path):
                os.unlink(os.path.join(path, name))
            os.rmdir(path)

    def summary(self):
        """ms-swift writes this line after a failure too, so it proves nothing."""
        size = f"158.824342±32.278866, min=105.000000, max=217.000000, size={getattr(self, 'rows', 0)}"
        self.append("logging.jsonl", {
            "train_dataset": size,
            "model_parameter_info": "PeftModelForCausalLM: 0.1194M Params (0.0164M Trainable [13.7265%]), 0.0000M Buffers.",
            "last_model_checkpoint": self.last_checkpoint, "best_model_checkpoint": None, "best_metric": None,
            "global_step": self.state["global_step"], "log_history": self.state["log_history"]})

    # -- memory

    def maybe_oom(self, phase, step=1):
        oom = self.scenario.oom
        if oom is None:
            return
        kind = oom.get("kind", "device")
        own_phase = kind if kind in ("load", "save") else "train"
        if phase != own_phase or (phase != "load" and step < oom.get("at_step", 1)):
            return
        capacity, base = oom.get("capacity_gib", 24), oom.get("base_gib", 8)
        need = base if kind == "load" else base + oom.get("per_sample_gib", 3) * self.micro_batch
        if need <= capacity:
            return
        raise TrainerError(oom_text(kind, capacity, base, need))

    # -- files

    def write_bytes(self, path, content):
        with open(path, "wb") as file:
            file.write(content)

    def write_json(self, name, content):
        temporary = os.path.join(self.output_dir, name + ".tmp")
        with open(temporary, "w") as file:
            json.dump(content, file)
        os.replace(temporary, os.path.join(self.output_dir, name))

    def append(self, name, content):
        with open(os.path.join(self.output_dir, name), "a", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False) + "\n")


def oom_text(kind, capacity, base, need):
    """Returns the last line of the traceback. The numbers fit each other, since a diagnosis computes with them."""
    if kind == "host":
        return "MemoryError"
    if kind == "host_worker":
        return "RuntimeError: DataLoader worker (pid 4321) is killed by signal: Killed. "
    if kind == "driver":
        return "RuntimeError: CUDA error: out of memory"
    if kind == "cublas":
        return "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    asked = max(need - capacity, 0.5)
    used, unallocated, neighbour = capacity - 0.25, 0.25, ""
    if kind == "fragmented":
        unallocated = asked + 0.5
    if kind == "neighbour":
        used = capacity / 4
        neighbour = f"Process 424242 has {capacity - 0.25 - used:.2f} GiB memory in use. "
    allocated = used - 0.5 - unallocated
    return (f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked:.2f} GiB. "
            f"GPU 0 has a total capacity of {capacity:.2f} GiB of which 256.00 MiB is free. {neighbour}"
            f"Including non-PyTorch memory, this process has {used:.2f} GiB memory in use. "
            f"Of the allocated memory {allocated:.2f} GiB is allocated by PyTorch, and {unallocated:.2f} GiB is reserved by "
            "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.")


FRAMES = {
    "load": ("swift/model/register.py", "load_model", "model = model_cls.from_pretrained(model_dir, **kwargs)"),
    "eval": ("transformers/trainer.py", "evaluate", "output = eval_loop(dataloader)"),
    "save": ("transformers/trainer.py", "_save_checkpoint", "self.save_model(output_dir)"),
    "train": ("transformers/trainer.py", "training_step", "loss = self.compute_loss(model, inputs)"),
}


def print_traceback(error, kind):
    if error.raw:
        err(f"\n{error}\n")
        return
    file, function, line = FRAMES.get(kind, FRAMES["train"])
    err("\nTraceback (most recent call last):\n"
        '  File "site-packages/swift/cli/sft.py", line 10, in <module>\n    sft_main()\n'
        f'  File "site-packages/{file}", line 297, in {function}\n    {line}\n'
        f"{error}\n")


def main():
    argv = sys.argv[1:]
    flags = parse_arguments(argv[1:] if argv[:1] == ["sft"] else argv)
    if "output_dir" not in flags:
        usage("the following arguments are required: --output_dir")
    scenario = Scenario.for_attempt(os.environ.get("FAKE_SWIFT_SCENARIO", ""), flags["output_dir"])
    trainer = Trainer(flags, scenario)
    try:
        play(trainer)
    except SystemExit as end:
        trainer.witness.say("end", code=end.code)
        raise


def play(trainer):
    """Runs the trainer, and ends as it would."""
    try:
        trainer.run()
    except TrainerError as error:
        print_traceback(error, (trainer.scenario.oom or {}).get("kind"))
        trainer.summary()
        # A progress bar is redrawn when it is closed, so the traceback is not the last thing in the file.
        if hasattr(trainer, "max_steps"):
            bar(trainer.state["global_step"], trainer.max_steps, time.monotonic() - trainer.began)
            err("\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
