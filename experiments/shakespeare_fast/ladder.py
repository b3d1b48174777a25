"""The table of this note: one thing changed after the other, from nanoGPT's recipe to `experiments=shakespeare_fast`.

A bare loop around the parts that each row's config names, so that imports and compiling are paid once. Every
combination of the words given is a run, and a line of runs.csv; other words go to every config.

    python -m experiments.shakespeare_fast.ladder row=adamw,muon lr=2e-3,4e-3 seed=1,2,3 steps=300 model.dropout=0.1
"""

import csv
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gptlab import assembly, config
from gptlab.data.module import TextDataModule
from gptlab.losses import masked_sum
from gptlab.tasks.lm import LMTask

FILE = Path(__file__).with_name("runs.csv")
FAST = ["experiments=shakespeare_fast"]
PLAIN = [*FAST, "model.attention=gptlab.model.Attention"]
SHORT = ["experiments=shakespeare_cpu", "schedule.warmup_steps=20"]
ROWS = {
    "nanogpt": [*SHORT, "compile=false", "trainer.precision=32-true"],
    "compiled": SHORT,
    "line": [*SHORT, "schedule.decay_fraction=1"],
    "llama": [*PLAIN, "optimizer=adamw", "~optimizer.momentum"],
    "muon": [*PLAIN, "optimizer.momentum=0.95"],
    "momentum": PLAIN,
    "shift": FAST,
}
AXES = {"row": ",".join(ROWS), "lr": "", "seed": "1", "steps": "300"}


def nll(task: LMTask, batch: dict[str, Tensor], bf16: bool) -> Tensor:
    """Summed over the tokens that count, of one batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return masked_sum(task.token_nll(task.logits(batch["tokens"]), batch["targets"]), batch["loss_mask"])


def train(cfg: dict[str, Any], data: TextDataModule, steps: int) -> tuple[float, float, float, float]:
    """Training loss of the last fifth of the steps, validation loss, seconds of both together, milliseconds a step."""
    task = assembly.build_task(cfg, assembly.build_model(cfg, data.tokenizer), data.tokenizer, steps)
    bf16, size = cfg["trainer"]["precision"] != "32-true", cfg["data"]["batch_size"]
    made = task.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    first = data.train_windows.__getitems__([0] * size)
    nll(task, first, bf16).backward()  # compiles
    task.eval()
    with torch.no_grad():
        nll(task, first, bf16)
    task.train()
    optimizer.zero_grad()
    losses, begun = [], time.perf_counter()
    for indices in itertools.islice(itertools.cycle(data.order()), steps):
        batch = data.train_windows.__getitems__(indices)
        loss = nll(task, batch, bf16) / batch["targets"].numel()
        loss.backward()
        clip_grad_norm_(task.model.parameters(), cfg["trainer"]["gradient_clip_val"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    step = (time.perf_counter() - begun) / steps
    task.eval()
    windows, late = data.validation_windows, torch.stack(losses[-steps // 5 :]).mean().item()
    with torch.no_grad():
        places = range(0, len(windows), size)
        batches = (windows.__getitems__([i if i < len(windows) else -1 for i in range(at, at + size)]) for at in places)
        scored = torch.stack([torch.stack((nll(task, b, bf16), b["loss_mask"].sum())) for b in batches]).sum(dim=0)
    return late, (scored[0] / scored[1]).item(), time.perf_counter() - begun, 1e3 * step


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    budget, file = float(given.pop("seconds", "inf")), Path(given.pop("file", FILE))
    axes = [given.pop(name, values).split(",") for name, values in AXES.items()]
    others = " ".join(f"{key}={value}" for key, value in given.items())
    begun, done = time.monotonic(), []
    if file.exists():
        done = [[row[name] for name in (*AXES, "others")] for row in csv.DictReader(file.open())]
    config.register()
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        for values in itertools.product(*axes):
            key = [*values, others]
            row, lr, seed, steps = values
            if key in done or time.monotonic() - begun > budget:
                continue
            rate = [f"optimizer.lr={lr}"] if lr else []
            cfg = config.plain(compose("train", [*ROWS[row], *rate, f"seed={seed}", *others.split()]))
            figures = train(cfg, assembly.build_data(cfg), int(steps))
            figures = dict(zip(("train", "val", "seconds", "step_ms"), (f"{x:.4f}" for x in figures), strict=True))
            print(*key, *figures.values(), flush=True)
            is_new = not file.exists()
            with file.open("a", newline="") as out:
                writer = csv.DictWriter(out, [*AXES, "others", *figures])
                if is_new:
                    writer.writeheader()
                writer.writerow(dict(zip((*AXES, "others"), key, strict=True)) | figures)


if __name__ == "__main__":
    main()
