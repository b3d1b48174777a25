"""The picture of resuming, by gptlab and by plain Lightning. `python docs/resume_picture.py docs/resume.png`

Of four runs each, one is left alone, and three are ended at different steps and resumed under another seed: the same
network, data and optimizer, dropout on. Trains for two minutes or so. Needs matplotlib, which gptlab itself does not.
"""

import csv
import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from gptlab.data.sources import PyDocs
from gptlab.data.tokens import prepare
from gptlab.data.windows import WindowDataset, as_it_is
from gptlab.files import cache_dir
from gptlab.losses import token_nll
from gptlab.model import GPT, GPTConfig
from gptlab.tokenizer import ByteTokenizer

STEPS, ENDS, SAVE_EVERY = 150, (38, 75, 112), 5
LAYERS, HEADS, WIDTH, BLOCK, BATCH, DROPOUT, LR = 2, 2, 64, 64, 16, 0.2, 1e-3
Curve = dict[int, float]  # the loss of each step; a step that was taken twice has that of the second time


def by_gptlab(run: Path, end: int | None) -> tuple[int | None, Curve]:
    options = f"data=pydocs tokenizer=byte model=tiny model.n_layer={LAYERS} model.n_head={HEADS} model.n_embd={WIDTH}"
    options += f" model.block_size={BLOCK} model.dropout={DROPOUT} data.batch_size={BATCH} trainer.max_steps={STEPS}"
    options += f" optimizer=adamw optimizer.lr={LR} schedule=constant schedule.warmup_steps=0 compile=false"
    options += f" trainer=cpu trainer.precision=32-true checkpoint.every_steps={SAVE_EVERY} log.every_steps=1"
    options += f" logger=csv validation.every_steps=1000 samples.every_steps=null seed=1 run_dir={run}"
    first = subprocess.Popen([sys.executable, "-m", "gptlab.train", *options.split()], stdout=subprocess.DEVNULL)
    if end is not None:
        while first.poll() is None and steps_of(run) < end:
            time.sleep(0.002)
        first.send_signal(signal.SIGTERM)
    assert first.wait() == (0 if end is None else 143)
    if end is not None:
        end = json.loads((run / "status.json").read_text())["step"]
        again = [sys.executable, "-m", "gptlab.train", f"resume={run}", f"seed={end}"]
        subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    with open(run / "metrics.csv", newline="") as file:
        return end, {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def steps_of(run: Path) -> int:
    file = run / "metrics.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else 0


class PlainTask(pl.LightningModule):
    """The same network, the way that a tutorial trains one."""

    def __init__(self, curve: Curve, end: int | None):
        super().__init__()
        config = GPTConfig(
            ByteTokenizer().vocab_size, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=BLOCK, dropout=DROPOUT
        )
        self.model, self.curve, self.end = GPT(config), curve, end

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = token_nll(self.model(batch["tokens"]), batch["targets"]).mean()
        if self.global_step + 1 == self.end:
            raise KeyboardInterrupt
        self.curve[self.global_step + 1] = loss.item()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR)


def by_lightning(run: Path, end: int | None) -> tuple[int | None, Curve]:
    prepared = prepare(PyDocs(), ByteTokenizer(), validation_fraction=0.1, cache=cache_dir())
    windows = WindowDataset(prepared.train, BLOCK, BLOCK // 2)
    curve: Curve = {}
    for session, seed in enumerate([1] if end is None else [1, end]):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=[ModelCheckpoint(dirpath=run, save_last=True, every_n_train_steps=SAVE_EVERY)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        task = PlainTask(curve, end if session == 0 else None)
        batches = DataLoader(windows, BATCH, shuffle=True, collate_fn=as_it_is)
        try:
            trainer.fit(task, batches, ckpt_path=run / "last.ckpt" if session else None)
        except SystemExit:  # what Lightning makes of Ctrl-C
            continue
    return end, curve


def draw(target: Path, columns: dict[str, dict[int | None, Curve]]) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 5.2), sharex=True, sharey="row", height_ratios=(1.6, 1))
    pens = (("#222222", 5), ("#c0392b", 3.4), ("#2e86c1", 2), ("#27ae60", 0.8))  # of four widths, so that all are seen
    for (title, curves), (top, bottom) in zip(columns.items(), axes.T, strict=True):
        alone = curves[None]
        for (colour, width), (end, curve) in zip(pens, curves.items(), strict=True):
            name = "uninterrupted" if end is None else f"ended at step {end} and resumed"
            top.plot(curve.keys(), curve.values(), color=colour, linewidth=width, alpha=0.85, label=name)
            if end is None:
                continue
            gap = {step: loss - alone[step] for step, loss in curve.items()}
            bottom.plot(gap.keys(), gap.values(), color=colour, linewidth=width / 2 + 0.4)
            for axis in (top, bottom):
                axis.axvline(end, color=colour, linewidth=0.8, linestyle=":")
        largest = max(abs(loss - alone[step]) for curve in curves.values() for step, loss in curve.items())
        top.set_title(title, fontsize=11)
        top.legend(frameon=False, fontsize=9)
        bottom.set_title(
            f"largest difference: {largest:.2g}" if largest else "no difference, to the last bit", fontsize=10
        )
        bottom.set_xlabel("optimizer step")
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("train/loss, nats a byte")
    axes[1, 0].set_ylabel("minus uninterrupted")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main(target: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    makers: dict[str, Callable[[Path, int | None], tuple[int | None, Curve]]] = {
        "gptlab": by_gptlab,
        "plain Lightning": by_lightning,
    }
    with tempfile.TemporaryDirectory() as folder:
        columns = {
            name: dict(make(Path(folder) / name.split()[0] / str(end), end) for end in (None, *ENDS))
            for name, make in makers.items()
        }
    draw(target, columns)
    for name, curves in columns.items():
        for end, curve in curves.items():
            gaps = [abs(loss - curves[None][step]) for step, loss in curve.items()]
            print(f"{name}, ended at step {end}: largest difference {max(gaps):.3g}, in {len(gaps)} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
