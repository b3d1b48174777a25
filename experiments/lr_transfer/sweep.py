"""The sweep behind this note: every combination of its arguments, in one process, a line of runs.csv each.

A bare loop around the parts that `experiments=lr_transfer` names, so that imports and compiling are paid once a width.

    python -m experiments.lr_transfer.sweep data=pydocs,shakespeare width=64,128,256,512 lr=1.5e-3,3e-3,6e-3
"""

import csv
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.nn.utils import clip_grad_norm_

from gptlab import assembly, config
from gptlab.data.module import TextDataModule
from gptlab.losses import token_nll
from gptlab.model import GPT
from gptlab.optim import parameter_groups

FILE = Path(__file__).with_name("runs.csv")
AXES = {"data": "pydocs", "width": "256", "batch": "4", "steps": "200", "seed": "1"}
AXES |= {"matrix": "1", "embedding": "1", "vector": "1", "init": "0.02", "lr": "3e-3"}
SCORED = 64  # windows of the validation split


def config_of(row: dict[str, str]) -> dict[str, Any]:
    width, optimizer = int(row["width"]), [f"optimizer.{name}={row[name]}" for name in ("lr", "matrix", "embedding")]
    overrides = ["experiments=lr_transfer", f"data={row['data']}", f"seed={row['seed']}", *optimizer]
    overrides += [f"model.n_embd={width}", f"model.n_head={width // 64}", f"model.init_std={row['init']}"]
    overrides += [f"optimizer.vector={row['vector']}", f"data.batch_size={row['batch']}"]
    overrides += ["tokenizer=char"] if row["data"] == "shakespeare" else []
    return config.plain(compose("train", overrides))


def train(cfg: dict[str, Any], data: TextDataModule, model: GPT, nll: Any, steps: int) -> tuple[float, float]:
    """The mean loss of the last fifth of the steps, and that of the scored windows of the validation split."""
    optimizer = config.make(cfg["optimizer"])(parameter_groups(model))
    schedule = config.make(cfg["schedule"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    losses = []
    for indices in itertools.islice(itertools.cycle(data.order()), steps):
        batch = data.train_windows.__getitems__(indices)
        loss = nll(model, batch["tokens"], batch["targets"])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    size, windows = cfg["data"]["batch_size"], data.validation_windows
    with torch.no_grad():
        batches = (windows.__getitems__(list(range(at, at + size))) for at in range(0, SCORED, size))
        scored = [nll(model, batch["tokens"], batch["targets"]).item() for batch in batches]
    late = losses[-steps // 5 :]
    return sum(late) / len(late), sum(scored) / len(scored)


def mean_nll(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return token_nll(model(tokens), targets).mean()


def main() -> None:
    given = dict(word.split("=") for word in sys.argv[1:])
    seconds = float(given.pop("seconds", "inf"))
    begun, done, file = time.monotonic(), [], Path(given.pop("file", FILE))
    if file.exists():
        done = [{name: row[name] for name in AXES} for row in csv.DictReader(file.open())]
    config.register()
    torch.set_num_threads(int(given.pop("threads", torch.get_num_threads())))
    nll = torch.compile(mean_nll)
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        for values in itertools.product(*(given.get(name, AXES[name]).split(",") for name in AXES)):
            row = dict(zip(AXES, values, strict=True))
            if row in done or time.monotonic() - begun > seconds:
                continue
            cfg = config_of(row)
            data = assembly.build_data(cfg)
            start = time.monotonic()
            late, scored = train(cfg, data, assembly.build_model(cfg, data.tokenizer), nll, int(row["steps"]))
            figures = {"train": f"{late:.4f}", "val": f"{scored:.4f}", "seconds": f"{time.monotonic() - start:.1f}"}
            print(*row.values(), *figures.values(), flush=True)
            is_new = not file.exists()
            with file.open("a", newline="") as out:
                writer = csv.DictWriter(out, [*AXES, *figures])
                if is_new:
                    writer.writeheader()
                writer.writerow(row | figures)


if __name__ == "__main__":
    main()
