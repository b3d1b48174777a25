"""The picture of a ladder: rungs, their law, and larger runs. `python docs/ladder_picture.py SWEEP docs/ladder.png`

Needs matplotlib, which gptlab itself does not.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.ladder.law import Law


def main(sweep: Path, target: Path) -> None:
    said, came = (json.loads((sweep / f"{name}.json").read_text()) for name in ("prediction", "outcome"))
    law = Law(said["law"]["form"], tuple(said["law"]["units"]), tuple(said["law"]["constants"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
    sizes = sorted({point["parameters"] for point in said["fitted"]})
    for place, size in enumerate(sizes):
        points = [point for point in said["fitted"] if point["parameters"] == size]
        tokens = np.geomspace(points[0]["tokens"], points[-1]["tokens"])
        colour = plt.get_cmap("viridis")(0.85 * place / len(sizes))
        left.plot(tokens / 1e6, [law(size, count) for count in tokens], color=colour, linewidth=1)
        dots = [point["tokens"] / 1e6 for point in points], [point["loss"] for point in points]
        left.plot(*dots, "o", color=colour, markersize=4, label=f"{size / 1e3:.0f} k, fitted")
    for run in said["predicted"]:
        size, rows = run["points"][0]["parameters"], [row for row in came["rows"] if row["run"] == run["run"]]
        left.plot(
            [row["tokens"] / 1e6 for row in rows], [row["predicted"] for row in rows], color="#c0392b", linewidth=1
        )
        dots = [row["tokens"] / 1e6 for row in rows], [row["actual"] for row in rows]
        left.plot(*dots, "s", color="#c0392b", markersize=4, label=f"{size / 1e3:.0f} k, predicted")
        factors = [row["factor"] for row in rows], [row["error_percent"] for row in rows]
        right.plot(*factors, "s-", color="#c0392b", markersize=4, linewidth=1, label=f"{size / 1e3:.0f} k")
    left.set(xscale="log", xlabel="million tokens", ylabel="val/loss, nats a token")
    right.axhspan(-0.5, 0.5, color="#dddddd", label="half a percent")
    right.set(xscale="log", xlabel="compute, over the largest rung's", ylabel="predicted over actual, percent")
    for side in (left, right):
        side.legend(frameon=False, fontsize=8)
        side.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
