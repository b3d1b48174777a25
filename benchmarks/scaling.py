"""How cost grows with size: `python benchmarks/scaling.py [--only block width depth vocabulary corpus]`.

Steps: from a base of 4 layers, 256 wide, block 128, batch 16 and 4,096 tokens (the default run's), one dimension at a
time is doubled; all sizes take turns, each in a process of its own, compiled as `gptlab.train` compiles them, in a bare
loop. `growth` is to the row before, within a round, and `of the FLOPs` that of 6 N + 12 L H E T beside it: where the
first is the smaller one, the larger network is the more efficient.

Data: the loader over a token file of so many windows, which is sparse, so that the largest needs no disk: the time to
the first batch, microseconds a batch for the shapes of train_throughput.py, and what resident memory grew by in a
thousand batches: the process's own, and pages of the file, which the system takes back when it needs them. Below it,
the share of each shape's step that waiting for a batch of the largest corpus is.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bare import STYLES
from train_throughput import SHAPES, VOCABULARY
from turns import HERE, default_device, drive, machine, markdown, median, names_in, quotient, take_turns

from gptlab.cost import flops_per_token
from gptlab.data.tokens import TokenFile
from gptlab.data.windows import TrainingOrder, WindowDataset, WindowLoader
from gptlab.model import GPT, GPTConfig

BASE = {"n_layer": 4, "n_embd": 256, "block_size": 128, "vocab_size": 4096}
DIMENSIONS = {"block": "block_size", "width": "n_embd", "depth": "n_layer", "vocabulary": "vocab_size"}
WINDOWS = (10**5, 10**7, 2 * 10**9)
HEAD = 64  # wide


def step_of(sizes: dict[str, int], batch_size: int, steps: int, device: str) -> Callable[[], float]:
    """Seconds of a step of a Llama style network, when called."""
    how = {"style": "llama", "how": "exact", "steps": steps, "device": device, "batch_size": batch_size}
    return lambda: drive(sys.executable, HERE / "bare.py", sizes | how)


def grow_steps(dimensions: list[str], arguments: argparse.Namespace) -> str:
    sizes: dict[str, dict[str, int]] = {}
    for word in dimensions:
        for times in range(arguments.doublings + 1):
            own = BASE | {DIMENSIONS[word]: BASE[DIMENSIONS[word]] * 2**times}
            sizes[f"{word} {own[DIMENSIONS[word]]}"] = own | {"n_head": own["n_embd"] // HEAD}
    ways = {name: step_of(own, 16, arguments.steps, arguments.device) for name, own in sizes.items()}
    rounds, rows = take_turns(ways, arguments.rounds), []
    flops = {name: flops_a_step(own) for name, own in sizes.items()}
    for word in dimensions:
        names = [name for name in names_in(rounds) if name.startswith(word)]
        for before, name in zip([None, *names], names, strict=False):
            seconds = median(rounds, name)
            grown = (quotient(rounds, name, before), flops[name] / flops[before]) if before else ()
            cells = [f"{factor:.2f}x" for factor in grown] or ["", ""]
            rows.append((name, f"{seconds * 1e3:.1f}", *cells, f"{flops[name] / seconds / 1e9:,.0f}"))
    return markdown("| ms a step | growth | of the FLOPs | GFLOP/s", rows)


def flops_a_step(sizes: dict[str, int]) -> float:
    return 16 * sizes["block_size"] * flops_per_token(GPT(GPTConfig(**sizes, **STYLES["llama"])), sizes["block_size"])


def resident_mb() -> tuple[float, float]:
    """The process's own memory and its pages of files. Linux."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024, int(lines["RssFile"].split()[0]) / 1024


def walk(folder: Path, windows: int, block: int, batch: int, batches: int) -> dict[str, Any]:
    """What the loader takes over a corpus of `windows` windows, one at every token."""
    path, tokens = folder / "tokens.bin", windows + block
    with open(path, "wb") as file:
        file.truncate(tokens * 2)
    before, start = resident_mb(), time.perf_counter()
    dataset = WindowDataset(TokenFile(path, "<u2", tokens), block, stride=1)
    loader = WindowLoader(dataset, TrainingOrder(len(dataset), batch, 1, seed=0), num_workers=0, pin_memory=False)
    stream = iter(loader)
    next(stream)
    first_s, start, seen = time.perf_counter() - start, time.perf_counter(), 0
    for _ in itertools.islice(stream, batches):
        seen += 1
    seconds = (time.perf_counter() - start) / seen
    own, pages = (after - then for after, then in zip(resident_mb(), before, strict=True))
    return {"first_s": first_s, "seconds": seconds, "own": own, "pages": pages}


def grow_corpus(arguments: argparse.Namespace) -> str:
    rows, waits = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for windows in arguments.windows:
            rounds: dict[str, list[dict[str, Any]]] = {shape: [] for shape in arguments.shapes}
            for _ in range(arguments.rounds):
                for shape, measured in rounds.items():
                    block, batch = SHAPES[shape][3:]
                    measured.append(walk(Path(folder), windows, block, batch, arguments.batches))
            waits = {shape: statistics.median(row["seconds"] for row in own) for shape, own in rounds.items()}
            everything = [row for own in rounds.values() for row in own]
            first = statistics.median(row["first_s"] for row in everything) * 1e3
            memory = (f"{max(row[kind] for row in everything):.0f}" for kind in ("own", "pages"))
            each = (f"{wait * 1e6:.0f}" for wait in waits.values())
            rows.append((f"{windows:,}", f"{first:.1f}", *each, *memory))
    words = " | ".join(f"µs a batch, {shape}" for shape in arguments.shapes)
    table = markdown(f"windows | first batch, ms | {words} | own memory, MB more | pages of the file, MB", rows)
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
    for shape, wait in waits.items():
        sizes = dict(zip(names, SHAPES[shape], strict=True)) | {"vocab_size": VOCABULARY}
        step = step_of(sizes, sizes.pop("batch_size"), arguments.steps, arguments.device)()
        table += f"\n\n{shape}: {wait * 1e6:.0f} µs of a step of {step * 1e3:.1f} ms are waiting: {wait / step:.2%}"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*DIMENSIONS, "corpus"), default=[*DIMENSIONS, "corpus"])
    parser.add_argument("--doublings", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["small", "baby"], help="of the data's table")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    arguments = parser.parse_args()
    print(machine(arguments.device), flush=True)
    if dimensions := [word for word in DIMENSIONS if word in arguments.only]:
        print(f"\n{grow_steps(dimensions, arguments)}", flush=True)
    if "corpus" in arguments.only:
        print(f"\n{grow_corpus(arguments)}", flush=True)


if __name__ == "__main__":
    main()
