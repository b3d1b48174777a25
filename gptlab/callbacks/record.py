"""What is recorded: metrics.csv, throughput, and the figures of result.json."""

import csv
import io
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from gptlab.callbacks.averaging import average_in
from gptlab.callbacks.steps import Budget, StepCallback
from gptlab.cost import count_parameters, flops_per_token, peak_tflops
from gptlab.files import write_atomically
from gptlab.machine import hardware, peak_rss_mb
from gptlab.run import RunFolder
from gptlab.scoring import finite

COLUMNS = (
    *("step", "epoch", "seconds", "train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"),
    *("train/learning_rate", "train/gradient_norm", "train/tokens_per_second", "train/mfu"),
)


class MetricsFile(Logger):
    """One row a logged step in a CSV file; figures that come later for the same step join its row."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._columns = list(COLUMNS)
        self._row: dict[str, Any] = {}
        self._row_start = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml beside the file says it all."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of `step`, or begin it."""
        if not self.path.exists():
            self.path.write_text(self._line(dict(zip(self._columns, self._columns, strict=True))))
        if self._row.get("step") != step:
            self._row, self._row_start = {"step": step}, self.path.stat().st_size
            with open(self.path, newline="") as file:
                self._columns = next(csv.reader(file))
        self._row |= metrics
        if new := [name for name in self._row if name not in self._columns]:
            self._widen(new)
        with open(self.path, "r+") as file:
            file.seek(self._row_start)
            file.write(self._line(self._row))
            file.truncate()

    def _widen(self, new: list[str]) -> None:
        """Add columns, for a task that logs its own figures: the file is written anew, once."""
        with open(self.path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"] != str(self._row["step"])]
        self._columns += new
        text = self._line(dict(zip(self._columns, self._columns, strict=True))) + "".join(map(self._line, rows))
        write_atomically(self.path, lambda file: file.write(text.encode()))
        self._row_start = len(text.encode())

    def _line(self, row: dict[str, Any]) -> str:
        line = io.StringIO()
        csv.DictWriter(line, self._columns, restval="", lineterminator="\n").writerow(row)
        return line.getvalue()


class Monitor(StepCallback):
    """Logs loss, gradient norm, learning rate, tokens a second and MFU at step 1, every `every_steps`, and at the end.

    This is the only place where training waits for the device. MFU is the share of the device's dense bf16 peak,
    `peak_tflops` or the figure of its maker; where neither is known there is none.
    """

    def __init__(self, every_steps: int | None, budget: Budget, peak: float | None):
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"log.every_steps={every_steps} must be at least 1, or null for never")
        if peak is not None and peak <= 0:
            raise ValueError(f"log.peak_tflops={peak} must be more than 0, or null for its maker's figure")
        self.every_steps, self.budget, self.peak = every_steps, budget, peak
        self.figures: dict[str, float | None] = {}
        self.rates: list[float] = []  # tokens a second of each interval without a validation
        self.first_step_at: float | None = None
        self.learning_rate: float | None = None  # of the last step; the optimizer holds that of the next one by now
        self.logged_step = -1
        self.mfu: float | None = None  # at the median rate
        self._mark: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        super().on_train_start(trainer, task)
        self._flops = flops_per_token(task.model, task.model.config.block_size)
        if self.peak is None and task.device.type == "cuda":
            self.peak = peak_tflops(torch.cuda.get_device_name(task.device))
        self._mark = (time.perf_counter(), trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, task: LightningModule, optimizer: Optimizer) -> None:
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if self.first_step_at is None:
            self.first_step_at = time.time()
        due = self.every_steps is not None and (step % self.every_steps == 0 or step == 1)
        if due or trainer.should_stop:
            self._log(trainer, task, step)

    def _log(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        found = task.training_figures()
        for name in ("train/loss", "train/gradient_norm"):  # nothing stands for an interval that was skipped
            self.figures.pop(name, None)
        self.figures |= found
        now = time.perf_counter()
        if self._mark is not None and step > self._mark[1]:
            rate = (step - self._mark[1]) * task.tokens_a_step / (now - self._mark[0])
            self.rates.append(rate)
            self.figures["train/tokens_per_second"] = rate
            if self.peak is not None:
                share = self._flops / (self.peak * 1e12 * trainer.world_size)
                self.figures["train/mfu"], self.mfu = rate * share, statistics.median(self.rates) * share
        self._mark, self.logged_step = (now, step), step
        self.figures["train/learning_rate"] = self.learning_rate
        logged = {"epoch": trainer.current_epoch, "seconds": round(self.budget.seconds, 3), **self.figures}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        if "train/loss" in self.figures:
            # For callbacks that monitor it; `task.log` takes 2 ms.
            trainer.callback_metrics["train/loss"] = torch.tensor(self.figures["train/loss"])

    def on_validation_start(self, trainer: Trainer, task: LightningModule) -> None:
        self._mark = None

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        self._mark = (time.perf_counter(), trainer.global_step)

    @property
    def tokens_per_second(self) -> float | None:
        return statistics.median(self.rates) if self.rates else None

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures, "rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.figures, self.rates = state["figures"], state["rates"]


class RunRecord(StepCallback):
    """Keeps status.json up to date, and knows the figures of result.json."""

    STATUS_EVERY_S = 10

    def __init__(self, folder: RunFolder, monitor: Monitor, budget: Budget):
        self.folder, self.monitor, self.budget = folder, monitor, budget
        self.history: list[dict[str, Any]] = []
        self.validation: dict[str, float] = {}
        self.step, self.epochs, self.tokens = 0, 0.0, 0
        self.device, self.ranks = torch.device("cpu"), 1
        self.weights = "raw"  # what the figures of validation are of
        self.config_text: str | None = None  # config.yaml, which checkpoints keep a copy of
        self._written = 0.0

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        super().on_train_start(trainer, task)
        self.ranks = trainer.world_size
        self.device = task.device  # Lightning moves the network back before anybody asks
        if average := average_in(trainer):
            self.weights = average.word
        self._write_status(trainer, trainer.global_step)

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        self.step, self.tokens = step, step * task.tokens_a_step
        self.epochs = step * trainer.accumulate_grad_batches / trainer.num_training_batches
        if time.monotonic() - self._written > self.STATUS_EVERY_S:
            self._write_status(trainer, step)

    def _write_status(self, trainer: Trainer, step: int) -> None:
        if not trainer.is_global_zero:
            return
        self._written = time.monotonic()
        self.folder.set_status("running", step)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.validation = figures = task.figures
        self.history.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "seconds": round(self.budget.seconds, 3),
                "train_loss": finite(self.monitor.figures.get("train/loss")),
                "val_loss": finite(figures.get("val/loss")),
                "learning_rate": self.monitor.learning_rate,
                "tokens_per_second": finite(self.monitor.figures.get("train/tokens_per_second")),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """What result.json needs, and what mends the files beside the checkpoint where they are damaged."""
        figures = {"history": self.history, "validation": self.validation, "epochs": self.epochs, "tokens": self.tokens}
        return figures | {"config": self.config_text, "tails": self.folder.tails()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.validation = state["history"], state["validation"]
        self.epochs, self.tokens = state.get("epochs", 0.0), state.get("tokens", 0)

    def result(self, task: LightningModule) -> dict[str, Any]:
        """The measured part of result.json; figures that were not measured are null."""
        total, non_embedding = count_parameters(task.model)
        figures, validation = self.monitor.figures, self.validation
        return {
            "steps": self.step,
            "epochs": round(self.epochs, 4),
            "params": total,
            "params_non_embedding": non_embedding,
            "train_tokens": self.tokens,
            "train_loss": finite(figures.get("train/loss")),
            "weights": self.weights,
            "val_loss": finite(validation.get("val/loss")),
            "val_perplexity": finite(validation.get("val/perplexity")),
            "val_bits_per_byte": finite(validation.get("val/bits_per_byte")),
            "val_accuracy": finite(validation.get("val/accuracy")),
            "val_by_source": by_source(validation),
            "seconds": round(self.budget.seconds, 3),
            "tokens_per_second": finite(self.monitor.tokens_per_second),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else None,
            "mfu": finite(self.monitor.mfu),
            "skipped_steps": task.skipped_steps,
            "floor_bits_per_byte": finite(validation.get("val/floor_bits_per_byte")),
            "excess_bits_per_byte": finite(validation.get("val/excess_bits_per_byte")),
            "excess_interval": interval(validation.get("val/excess_low"), validation.get("val/excess_high")),
            "history": self.history,
            "hardware": hardware(self.device) | {"ranks": self.ranks},
        }


def by_source(validation: dict[str, float]) -> dict[str, dict[str, float | None]] | None:
    """{source: {loss, bits_per_byte}} of a mixture, or None where there is but one source."""
    sources = [key.removeprefix("val/loss/") for key in validation if key.startswith("val/loss/")]
    names = ("loss", "bits_per_byte")
    return {source: {name: finite(validation[f"val/{name}/{source}"]) for name in names} for source in sources} or None


def interval(low: float | None, high: float | None) -> list[float] | None:
    return None if finite(low) is None or finite(high) is None else [low, high]
