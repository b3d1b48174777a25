"""What a process spends before its first step: imports, garbage collection, and compiling what was compiled before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

ENTER = """
import runpy, sys
sys.argv = ["-m", *sys.argv[2:]]
try:
    runpy.run_module(f"gptlab.{door}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""


def enter(door: str, *arguments: str, then: str, **env: str) -> str:
    """The last line that a door prints in an interpreter of its own, which does `then` at the end."""
    command = [sys.executable, "-c", f"door = {door!r}{ENTER}{then}", door, *arguments]
    ended = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("door", ["train", "prepare", "validate_data"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_needs_none_of_the_libraries_that_take_seconds_to_import(door, option):
    found = enter(door, option, then="print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "gptlab" in found
    assert not {"torch", "lightning", "hydra", "omegaconf", "numpy", "rich"} & set(found)


def test_garbage_is_looked_for_again_after_the_imports():
    then = "import gc; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    assert enter("train", "--cfg", "job", then=then) == "True True"


@pytest.mark.slow
def test_a_run_finds_what_another_has_compiled(text_file, tmp_path):
    counts, seconds = [], []
    then = """
from torch._dynamo.utils import counters
found = counters["aot_autograd"]
print(found["autograd_cache_hit"], found["autograd_cache_miss"], found["autograd_cache_bypass"])
"""
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=1", "compile=true")
    for run in (tmp_path / "first", tmp_path / "second"):
        line = enter("train", *options, f"run_dir={run}", then=then, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"))
        counts.append([int(count) for count in line.split()])
        seconds.append(json.loads((run / "result.json").read_text())["seconds_to_compile"])
        assert f"compiled in {seconds[-1]:.1f} s" in Path(run / "train.log").read_text()
    (hits, misses, bypassed), graphs = counts[0], sum(counts[0])
    assert (hits, bypassed) == (0, 0)
    assert misses == graphs > 0
    assert counts[1] == [graphs, 0, 0]
    assert seconds[1] < seconds[0]
