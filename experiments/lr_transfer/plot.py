"""Gathers the runs of sweeps into runs.csv and draws lr_transfer.png: loss over learning rate, a line a width.

python -m experiments.lr_transfer.plot runs/<sweep> runs/<another>

Needs matplotlib, which gptlab itself does not.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import yaml

HERE = Path(__file__).parent
RULES = {"null": "one rate", "256": "matrices by width$^{-1/2}$"}  # optimizer.width
SOURCES = {"PyDocs": "pydocs", "Download": "shakespeare"}
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)


def row(run: Path) -> dict[str, Any]:
    cfg, result = yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "result.json").read_text())
    rule = cfg["optimizer"]["width"]
    return {
        "data": SOURCES[cfg["data"]["source"]["_target_"].rpartition(".")[2]],
        "width": cfg["model"]["n_embd"],
        "rule": "null" if rule is None else rule,
        "lr": cfg["optimizer"]["lr"],
        "seed": cfg["seed"],
        "val_loss": round(result["val_loss"], 4),
    }


def gather(sweeps: list[str]) -> list[dict[str, str]]:
    """The lines of runs.csv, with those of `sweeps` added."""
    file = HERE / "runs.csv"
    lines = list(csv.DictReader(file.open())) if file.exists() else []
    for result in sorted(path for sweep in sweeps for path in Path(sweep).glob("*/result.json")):
        line = {name: str(value) for name, value in row(result.parent).items()}
        lines = [other for other in lines if any(other[name] != line[name] for name in line if name != "val_loss")]
        lines.append(line)
    lines.sort(key=lambda line: (line["data"], line["rule"], int(line["width"]), float(line["lr"]), int(line["seed"])))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return lines


def best(curve: dict[float, float]) -> float:
    """The rate at the lowest point of a parabola through the three best neighbours."""
    rates = sorted(curve)
    at = min(max(rates.index(min(curve, key=curve.__getitem__)), 1), len(rates) - 2)
    three = rates[at - 1 : at + 2]
    a, b, _ = np.polyfit(np.log(three), [curve[rate] for rate in three], 2)
    return float(np.clip(np.exp(-b / (2 * a)), rates[0], rates[-1])) if a > 0 else min(curve, key=curve.__getitem__)


def main() -> None:
    found: dict[tuple[str, str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in gather(sys.argv[1:]):
        rules = RULES if line["width"] == "256" else [line["rule"]]  # at 256 both are one
        for rule in rules:
            found[line["data"], rule, int(line["width"])][float(line["lr"])].append(float(line["val_loss"]))
    curves = {key: {lr: mean(losses) for lr, losses in sorted(curve.items())} for key, curve in found.items()}
    corpora, widths = (sorted({key[place] for key in curves}) for place in (0, 2))
    figure, axes = plt.subplots(len(RULES), len(corpora), figsize=(9, 6), sharex=True, sharey="col", squeeze=False)
    for line, rule in zip(axes, RULES, strict=True):
        for axis, data in zip(line, corpora, strict=True):
            for width in sorted(key[2] for key in curves if key[:2] == (data, rule)):
                curve, colour = curves[data, rule, width], f"C{widths.index(width)}"
                axis.plot(list(curve), list(curve.values()), "o-", color=colour, label=f"{width} wide", ms=3)
                if len(curve) > 2:
                    axis.axvline(best(curve), color=colour, alpha=0.4, ls="--")
                    losses = " | ".join(f"{loss:.3f}" for loss in curve.values())
                    print(f"| {data} | {rule} | {width} | {losses} | {best(curve):.1e} |")
            axis.set(xscale="log", title=f"{data}: {RULES[rule]}")
            axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES], minor=False)
            axis.minorticks_off()
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate (its best dashed)")
    for line in axes:
        line[0].set_ylabel("validation loss after 200 steps")
    figure.tight_layout()
    figure.savefig(HERE / "lr_transfer.png", dpi=80)


if __name__ == "__main__":
    main()
