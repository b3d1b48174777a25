"""What the machine is asked for."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from gptlab.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in [2**18, 2**20, 3 * 2**20] * 10:
        held = [torch.ones(size) for _ in range(4)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if keep:
    keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_that_steps_free_is_kept_for_the_next():
    """Pages that the system clears anew for tensors of the sizes of the round before."""
    faults = [
        int(subprocess.run([sys.executable, "-c", f"{keep=}\n{FAULTS}"], check=True, capture_output=True).stdout)
        for keep in (False, True)
    ]
    assert faults[1] < 100
    assert faults[0] > 10 * faults[1]
