"""What does the card say? NVML through ctypes, and a thread that watches the memory of one card.

The library is the driver's own, or the one that MHTRAIND_NVML_LIBRARY names: in a dry run that is nvml-sim, so the very
same calls are made there.
"""

import ctypes
import os
import threading
import time

MIB, GIB = 1 << 20, 1 << 30
DEFAULT_LIBRARY = "libnvidia-ml.so.1"
# What NVML writes for the memory of a process that it will not tell (containers, WSL).
NOT_AVAILABLE = (1 << 64) - 1
INSUFFICIENT_SIZE = 7


class NvmlError(Exception):
    """NVML cannot be opened, or has answered with an error."""


class MemoryV2(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class MemoryV1(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class ProcessInfo(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class Nvml:
    """An open connection to NVML."""

    def __init__(self, library=None):
        name = library or os.environ.get("MHTRAIND_NVML_LIBRARY") or DEFAULT_LIBRARY
        try:
            self.library = ctypes.CDLL(name)
        except OSError as error:
            raise NvmlError(f"{name} cannot be opened: {error}") from error
        self.call("nvmlInit_v2")

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise NvmlError(f"{name} answered {code}")

    def text(self, name, *arguments):
        buffer = ctypes.create_string_buffer(128)
        self.call(name, *arguments, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode()

    def driver(self):
        return self.text("nvmlSystemGetDriverVersion")

    def cuda(self):
        version = ctypes.c_int()
        self.call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def handle(self, index):
        handle = ctypes.c_void_p()
        self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def cards(self):
        """Returns all cards as {index, uuid, name, capability} in the order of their index."""
        count = ctypes.c_uint()
        self.call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return [self.card(index) for index in range(count.value)]

    def card(self, index):
        handle, major, minor = self.handle(index), ctypes.c_int(), ctypes.c_int()
        self.call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        return {
            "index": index,
            "uuid": self.text("nvmlDeviceGetUUID", handle),
            "name": self.text("nvmlDeviceGetName", handle),
            "capability": f"{major.value}.{minor.value}",
        }

    def memory(self, index):
        """Returns {total, reserved, used, free} in bytes; reserved is None where the driver has only the first call."""
        handle = self.handle(index)
        if hasattr(self.library, "nvmlDeviceGetMemoryInfo_v2"):
            info = MemoryV2(version=ctypes.sizeof(MemoryV2) | 2 << 24)
            self.call("nvmlDeviceGetMemoryInfo_v2", handle, ctypes.byref(info))
            return {"total": info.total, "reserved": info.reserved, "used": info.used, "free": info.free}
        info = MemoryV1()
        self.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(info))
        return {"total": info.total, "reserved": None, "used": info.used, "free": info.free}

    def processes(self, index):
        """Returns {pid: bytes, or None where the driver does not say}."""
        handle, count = self.handle(index), ctypes.c_uint(0)
        # Asked without room first: the answer is how many there are. A few may come between the two calls.
        code = self.library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), None)
        if code not in (0, INSUFFICIENT_SIZE):
            raise NvmlError(f"nvmlDeviceGetComputeRunningProcesses_v3 answered {code}")
        if count.value == 0:
            return {}
        count.value += 8
        found = (ProcessInfo * count.value)()
        self.call("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), found)
        listed = found[: count.value]
        return {one.pid: None if one.used == NOT_AVAILABLE else one.used for one in listed}


def choose(cards, wish, visible):
    """Returns the card that is wished for: an index or the beginning of a UUID; else the first of
    CUDA_VISIBLE_DEVICES; else the first."""
    word = wish or (visible or "").split(",")[0].strip()
    for card in cards:
        if not word or word == str(card["index"]) or (word.startswith("GPU-") and card["uuid"].startswith(word)):
            return card
    names = ", ".join(f"{card['index']} ({card['name']})" for card in cards) or "none"
    raise NvmlError(f"there is no card {word or 0}; there are: {names}")


class Watch(threading.Thread):
    """The largest memory that a card shows while this runs, above what it showed at the beginning."""

    def __init__(self, nvml, index, every_s=0.02):
        super().__init__(daemon=True)
        self.nvml, self.index, self.every_s = nvml, index, every_s
        self.before = self.peak = nvml.memory(index)["used"]
        self.least_free = nvml.memory(index)["free"]
        self.by_process = {}
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(self.every_s):
            self.look()

    def look(self):
        try:
            memory = self.nvml.memory(self.index)
            processes = self.nvml.processes(self.index)
        except NvmlError:  # Another look follows; a card that is gone shows in the point itself.
            return
        self.peak, self.least_free = max(self.peak, memory["used"]), min(self.least_free, memory["free"])
        for pid, used in processes.items():
            if used is not None:
                self.by_process[pid] = max(self.by_process.get(pid, 0), used)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.look()
        self.ended.set()
        self.join()

    def rise(self):
        """Returns by how many bytes the card's memory rose at most. It is ours where nobody else came or went."""
        return self.peak - self.before


def wait_until(condition, seconds, every_s=0.05):
    """Returns whether the condition came true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(every_s)
    return True
