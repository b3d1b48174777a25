"""The picture in the README: a run's loss curve with samples by step. `python docs/run_picture.py RUN docs/run.png`

Needs matplotlib, which gptlab itself does not.
"""

import csv
import json
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt


def main(run: Path, target: Path) -> None:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {
        name: [(int(row["step"]), float(row[f"{name}/loss"])) for row in rows if row[f"{name}/loss"]]
        for name in ("train", "val")
    }
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().strip().split("\n")]
    prompt = samples[-1]["prompt"]
    chosen = [sample for sample in samples if sample["prompt"] == prompt]
    chosen = [chosen[place] for place in sorted({0, (len(chosen) - 1) // 2, len(chosen) - 1})]
    result = json.loads((run / "result.json").read_text())

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), width_ratios=(1, 1.25))
    left.plot(*zip(*curves["train"], strict=True), color="#9db4c8", linewidth=1, label="train/loss")
    left.plot(*zip(*curves["val"], strict=True), "o-", color="#c0392b", markersize=4, label="val/loss")
    left.set_xlabel("optimizer step")
    left.set_ylabel("nats a token")
    left.legend(frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    left.set_title(
        f"{result['params'] / 1e6:.1f} M parameters, {result['seconds']:.0f} s, {result['hardware']['threads']} cores",
        fontsize=10,
    )
    right.axis("off")
    height = 1.0
    for sample in chosen:
        text = " ".join((sample["prompt"] + sample["text"]).split()).replace("$", r"\$")
        lines = textwrap.wrap(text, 78)[:5]
        right.text(0, height, f"step {sample['step']:,}", fontsize=9, weight="bold", va="top")
        right.text(0, height - 0.06, "\n".join(lines), fontsize=8.5, family="monospace", va="top")
        height -= 0.14 + 0.055 * len(lines)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
