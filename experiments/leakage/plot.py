"""Scores the checkpoints of runs on text that none of them saw, and draws leakage.png: what a run says, and what is so.

python -m experiments.leakage.plot runs/<sweep>

The figures are kept in curves.csv, from which they are drawn when no folder is given. Needs matplotlib, which gptlab
itself does not.
"""

import csv
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch

from gptlab import checkpoint
from gptlab.config import trusted
from gptlab.data.sources import Download
from gptlab.data.windows import WindowDataset
from gptlab.losses import token_nll
from gptlab.model import GPT
from gptlab.resume import saved_config
from gptlab.run import RunFolder
from gptlab.tokenizer import Tokenizer

HERE = Path(__file__).parent
ARMS = {  # split, stride -> how it is drawn
    ("text", "32"): ("text split first, half overlap", "#2c7a4b"),
    ("text", "1"): ("text split first, stride 1", "#8fc2a4"),
    ("windows", "32"): ("windows at random, half overlap", "#c0392b"),
    ("windows", "1"): ("windows at random, stride 1", "#e8a79f"),
}
COLUMNS = {"train_loss": "train/loss", "val_loss": "val/loss"}


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, text: str) -> float:
    """The loss on `text`, each of its tokens but the first scored once."""
    block_size = model.config.block_size
    windows = WindowDataset(tokenizer.encode(text), block_size, block_size, keep_tail=True)
    batch = windows.__getitems__(list(range(len(windows))))
    return float(token_nll(model(batch["tokens"]), batch["targets"])[batch["loss_mask"]].mean())


def lines(run: Path) -> list[dict[str, Any]]:
    """What the run validated, and the loss of each of these checkpoints on as much text, which follows on its own."""
    cfg = saved_config(RunFolder(run))
    node = cfg["data"]["source"]
    length = node["characters"]
    unseen = next(Download(node["files"]).documents()).text[length : 2 * length]
    with open(run / "metrics.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["val/loss"]}
    arm = {
        "split": "windows" if cfg["callbacks"] else "text",
        "stride": cfg["data"]["stride"] or cfg["model"]["block_size"] // 2,
        "seed": cfg["seed"],
    }
    found = []
    for step, row in rows.items():
        model, tokenizer = checkpoint.load_model(run / f"checkpoints/step-{step:08d}.ckpt", trusted(cfg))
        losses = {name: round(float(row[column]), 4) for name, column in COLUMNS.items()}
        found.append(arm | {"step": step} | losses | {"unseen_loss": round(score(model, tokenizer, unseen), 4)})
    return found


def gather(sweep: Path) -> list[dict[str, Any]]:
    """All finished runs of a sweep, written to curves.csv."""
    found = [line for result in sorted(sweep.glob("*/result.json")) for line in lines(result.parent)]
    found.sort(key=lambda line: (line["split"], -line["stride"], line["seed"], line["step"]))
    with (HERE / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    return found


def draw(found: list[dict[str, str]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for (split, stride), (label, colour) in ARMS.items():
        arm = [line for line in found if (line["split"], line["stride"]) == (split, stride)]
        if not (seeds := sorted({line["seed"] for line in arm})):
            continue
        for axis, name in zip(axes, ("val_loss", "unseen_loss"), strict=True):
            for number, seed in enumerate(seeds):
                curve = [(int(line["step"]), float(line[name])) for line in arm if line["seed"] == seed]
                axis.plot(*zip(*curve, strict=True), color=colour, linewidth=1.2, label=None if number else label)
        print(row(label, arm, seeds))
    axes[0].set(title="what the runs say: val/loss", ylabel="nats a character", xlabel="optimizer step")
    axes[1].set(title="the same networks on the next 12,000 characters", xlabel="optimizer step")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "leakage.png", dpi=80)


def row(label: str, arm: list[dict[str, str]], seeds: list[str]) -> str:
    """A line of the note's table: means over seeds, of the step with the lowest val_loss and of the last step."""
    runs = [[line for line in arm if line["seed"] == seed] for seed in seeds]
    best = [min(run, key=lambda line: float(line["val_loss"])) for run in runs]
    last = [run[-1] for run in runs]
    steps = ", ".join(line["step"] for line in best)
    names = ("val_loss", "unseen_loss")
    losses = [f"{mean(float(line[name]) for line in chosen):.2f}" for chosen in (best, last) for name in names]
    train = f"{mean(float(line['train_loss']) for line in last):.2f}"
    return f"| {label} | {steps} | {' | '.join(losses)} | {train} |"


def main() -> None:
    if sys.argv[1:]:
        gather(Path(sys.argv[1]))
    with (HERE / "curves.csv").open(newline="") as file:
        draw(list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
