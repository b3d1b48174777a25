"""What the benchmarks share: contenders that take turns, ratios, tables to paste, and runs of `gptlab.train`."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptlab.machine import processor_name

HERE = Path(__file__).parent


Rounds = list[dict[str, float]]  # what each contender measured, round by round


def take_turns(contenders: dict[str, Callable[[], float]], count: int, kept: Path | None = None) -> Rounds:
    """So many rounds, in each of which all contenders run once: a machine's speed drifts.

    `kept` is a file of earlier rounds, which come first, and the new ones join them there. A contender that fails is
    left out from then on, with a line that says why.
    """
    rounds: Rounds = json.loads(kept.read_text()) if kept and kept.exists() else []
    going = dict(contenders)
    for number in range(1, count + 1):
        rounds.append({})
        for name, run in list(going.items()):
            try:
                rounds[-1][name] = run()
            except (subprocess.CalledProcessError, OSError, ValueError) as error:
                print(f"left out: {name}: {reason(error)}", flush=True)
                del going[name]
                continue
            print(f"  round {number}: {name}: {rounds[-1][name]:.5g}", file=sys.stderr, flush=True)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(rounds))
    return rounds


def names_in(rounds: Rounds) -> list[str]:
    return list(dict.fromkeys(name for row in rounds for name in row))


def median(rounds: Rounds, name: str) -> float:
    return statistics.median(row[name] for row in rounds if name in row)


def quotient(rounds: Rounds, one: str, other: str) -> float:
    """The median over the rounds of one / other, each of one round: both met the machine in the same state."""
    both = [row[one] / row[other] for row in rounds if one in row and other in row]
    return statistics.median(both) if both else math.nan


def reason(error: Exception) -> str:
    """The last line that a process said before it failed, or the error itself."""
    said = (getattr(error, "stderr", None) or getattr(error, "stdout", None) or "").strip().splitlines()
    return said[-1].strip() if said else str(error)


def markdown(header: str, rows: list[tuple[Any, ...]]) -> str:
    """A table for a README; `header` separates its columns by |."""
    names = [name.strip() for name in header.split("|")]
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: str) -> str:
    """One line on where figures are from."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{where}, {processor_name()}, torch {torch.__version__}"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_gptlab(folder: Path, *overrides: str, **env: str) -> dict[str, Any]:
    """The result.json of `python -m gptlab.train` with these overrides, and `wall_s`, all of the process's seconds."""
    run_dir = folder / f"run-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "gptlab.train", f"run_dir={run_dir}", *overrides]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | env)
    wall_s = time.perf_counter() - start
    return json.loads((run_dir / "result.json").read_text()) | {"wall_s": wall_s, "run_dir": str(run_dir)}


def drive(python: str, driver: Path, task: dict[str, Any]) -> float:
    """Median seconds of a step, by a driver (peers/clock.py) in a process of its own."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path}
    command = [python, driver, json.dumps(task)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    if figures["parameters"] != task.get("parameters", figures["parameters"]):
        raise ValueError(f"{figures['parameters']:,} parameters, where gptlab has {task['parameters']:,}")
    return statistics.median(figures["seconds"])


def letters(folder: Path, count: int = 300_000) -> Path:
    """A file of random lower-case letters, for runs whose loss is of no interest."""
    path = folder / "letters.txt"
    path.write_text("".join(map(chr, torch.randint(97, 123, (count,), generator=torch.Generator().manual_seed(0)))))
    return path
