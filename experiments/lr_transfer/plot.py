"""Draws lr_transfer.png from runs.csv: loss over learning rate, a line a width, its best rate marked.

python -m experiments.lr_transfer.plot
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
TINY = 256
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
RULES = {"one rate": 0.0, "matrices by width$^{-1/2}$": 0.5}


def curves() -> dict[tuple[str, str, int], dict[float, list[float]]]:
    """{(data, rule, width): {learning rate: the losses of its seeds}}"""
    found: dict = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader((HERE / "runs.csv").open()):
        width = int(row["width"])
        for rule, power in RULES.items():
            if (
                abs(float(row["matrix"]) / (TINY / width) ** power - 1) < 0.01
                and row["embedding"] == row["vector"] == "1"
            ):
                found[row["data"], rule, width][float(row["lr"])].append(float(row["val"]))
    return {key: curve for key, curve in found.items() if len(curve) > 2}


def best(curve: dict[float, list[float]]) -> float:
    """The rate at the lowest point of a parabola through the three best neighbours."""
    rates = sorted(curve)
    at = min(max(min(range(len(rates)), key=lambda i: mean(curve[rates[i]])), 1), len(rates) - 2)
    three = rates[at - 1 : at + 2]
    a, b, _ = np.polyfit(np.log(three), [mean(curve[rate]) for rate in three], 2)
    return float(np.clip(np.exp(-b / (2 * a)), rates[0], rates[-1])) if a > 0 else rates[at]


def main() -> None:
    found = curves()
    corpora = sorted({key[0] for key in found})
    figure, axes = plt.subplots(len(RULES), len(corpora), figsize=(9, 6), sharex=True, sharey="col", squeeze=False)
    for line, rule in zip(axes, RULES, strict=True):
        for axis, data in zip(line, corpora, strict=True):
            for width in sorted(key[2] for key in found if key[:2] == (data, rule)):
                curve = found[data, rule, width]
                rates, colour = sorted(curve), f"C{width.bit_length() - 7}"
                axis.plot(rates, [mean(curve[rate]) for rate in rates], "o-", color=colour, label=f"{width} wide", ms=3)
                axis.axvline(best(curve), color=colour, alpha=0.4, ls="--")
                print(f"{data:12} {rule:28} {width:4} wide: best at {best(curve):.2e}")
            axis.set(xscale="log", title=f"{data}: {rule}")
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
