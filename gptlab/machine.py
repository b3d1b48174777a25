"""The machine that a run is on: memory held and kept, and the processor, on which bit-for-bit repetition depends."""

import contextlib
import ctypes
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

MALLOC = {-3: 2**25, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of <malloc.h>: bytes


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the next step, whose tensors have the same sizes.

    What goes back to the system comes again page by page, each of them cleared: a tenth of a step of 25 ms. Tensors of
    over 32 MiB still go back. Only glibc can be told so.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOC.items():
            mallopt(option, value)


def set_compiler(calls_in_cpp: bool) -> None:
    """Let the compiler find graphs again that have gradients of their own (formulas, attention, losses).

    `calls_in_cpp`: it writes the calls of its kernels in C++ too, for a CPU; Python takes 20 to 50 µs between two.
    """
    from torch._functorch import config as cache  # here, because both take a while
    from torch._inductor import config

    if hasattr(cache, "autograd_cache_allow_custom_autograd_functions"):
        cache.autograd_cache_allow_custom_autograd_functions = True
    config.cpp_wrapper = calls_in_cpp


def peak_rss_mb() -> float:
    """The most memory this process has held; VmHWM, since ru_maxrss starts from the parent's."""
    return memory_mb("VmHWM")


def rss_mb() -> float:
    """The memory that this process holds now; where the system does not tell, the most that it has held."""
    return memory_mb("VmRSS")


def memory_mb(field: str) -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / 2**20 if sys.platform == "darwin" else used / 1024


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processor": processor_name(), "threads": torch.get_num_threads()}
