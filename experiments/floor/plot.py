"""Draws floor.png: the excess of a run by kind of choice and step, and that of several runs by distance at their end.

python -m experiments.floor.plot "full=runs/<run>" "local=runs/<another>" ...

Needs matplotlib, which gptlab itself does not. Prints the rows of the tables in the README besides.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
KINDS = ("grammar", "recall", "arithmetic", "counting")


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Of each kind, and of all text, (step, excess in nats a byte) of every validation."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/excess_bits_per_byte"]]
    names = {kind: f"val/excess_nats/{kind}" for kind in KINDS}
    found = {kind: [(int(row["step"]), float(row[name])) for row in rows] for kind, name in names.items()}
    nats = 0.6931471805599453
    return found | {"all text": [(int(row["step"]), float(row["val/excess_bits_per_byte"]) * nats) for row in rows]}


def print_rows(name: str, run: Path, found: dict[str, Any]) -> None:
    result = json.loads((run / "result.json").read_text())
    low, high = found["interval"]
    total = f"{found['excess_nats_per_byte']:.4f} ({low:.4f} to {high:.4f})"
    kinds = [f"{found['kinds'][kind]['excess']:.3f}" for kind in KINDS]
    print("| " + " | ".join([name, f"{result['steps']:,}", f"{result['seconds']:.0f} s", total, *kinds]) + " |")
    print("| " + " | ".join([name, *(f"{row['excess']:.3f}" for row in found["by_distance"].values())]) + " |")


def main() -> None:
    runs = {name: Path(path) for name, _, path in (word.partition("=") for word in sys.argv[1:])}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
    first = next(iter(runs.values()))
    for kind, points in curves(first).items():
        left.plot(*zip(*points, strict=True), "k-o" if kind == "all text" else "-", label=kind, markersize=3)
    left.axhline(0.01, color="grey", linestyle=":")
    left.set(yscale="log", xlabel="optimizer step", ylabel="excess, nats a byte of the kind")
    for name, run in runs.items():
        found = json.loads((run / "floor.json").read_text())
        print_rows(name, run, found)
        limits = list(found["by_distance"])
        right.plot(range(len(limits)), [row["excess"] for row in found["by_distance"].values()], "-o", label=name)
        right.set_xticks(range(len(limits)), [f"up to {limit}" for limit in limits])
    right.set(xlabel="bytes back to the fact", ylabel="excess of recall, nats a byte")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "floor.png", dpi=80)


if __name__ == "__main__":
    main()
