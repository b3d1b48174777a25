"""How long one waits for gptlab to begin: `python benchmarks/startup.py`.

The wall time of `--help`; the imports, each in an interpreter of its own, less the time of an empty one; and the
default run up to its first step, from `seconds_to_first_step` in its result.json, with the time of compiling in it:
cold, with an empty cache of compiled code (tokens are cached), warm, with what the cold one left, and uncompiled. What
is asked takes turns; each figure is the median of the rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import default_device, machine, markdown, median, names_in, run_gptlab, take_turns

EMPTY = "an empty interpreter"
FEW_SCORED = ("data.validation_fraction=0.005",)  # nobody waits here for the validation that ends a run
IMPORTS = ("torch", "lightning.pytorch", "hydra", "gptlab.train")


def wall_s(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return time.perf_counter() - start


class DefaultRun:
    """`python -m gptlab.train` for two steps, and what it said of compiling."""

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder, self.overrides = folder, overrides
        self.compiling: dict[str, list[float]] = {"cold": [], "warm": []}
        self.cold_caches = 0

    def to_first_step(self, how: str) -> float:
        """Seconds from the start of the process, `how` one of cold, warm and eager; warm follows cold."""
        self.cold_caches += how == "cold"
        env = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / f"compiled-{self.cold_caches}")}
        compile_ = "compile=false" if how == "eager" else "compile=true"
        few = ("trainer.max_steps=2", "samples.every_steps=null", *FEW_SCORED, compile_)
        result = run_gptlab(self.folder, *few, *self.overrides, **env)
        if how != "eager":
            self.compiling[how].append(result["seconds_to_compile"])
        return result["seconds_to_first_step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", action=argparse.BooleanOptionalAction, default=True, help="the default run, too")
    parser.add_argument("override", nargs="*", help="more for gptlab.train: trainer=gpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = DefaultRun(Path(folder), arguments.override)
        ways = {EMPTY: lambda: wall_s("-c", ""), "`--help`": lambda: wall_s("-m", "gptlab.train", "--help")}
        ways |= {f"`import {name}`": lambda name=name: wall_s("-c", f"import {name}") for name in IMPORTS}
        if arguments.runs:
            wall_s("-m", "gptlab.prepare", *FEW_SCORED)
            ways["first step, cold"] = lambda: run.to_first_step("cold")
            ways["first step, warm"] = lambda: run.to_first_step("warm")
            ways["first step, `compile=false`"] = lambda: run.to_first_step("eager")
        rounds = take_turns(ways, arguments.rounds)
    rows = []
    for name in names_in(rounds):
        seconds = [row[name] for row in rounds]
        own = median(rounds, name) - (median(rounds, EMPTY) if "import" in name else 0)
        compiling = run.compiling.get(name.rpartition(" ")[2])
        of_it = f"{statistics.median(compiling):.2f}" if compiling else ""
        rows.append((name, f"{own:.2f}", of_it, f"{min(seconds):.2f} to {max(seconds):.2f}"))
    print(f"{machine(default_device())}, {os.cpu_count()} processors, median of {arguments.rounds} rounds\n")
    print(markdown("| seconds | compiling | between", rows))


if __name__ == "__main__":
    main()
