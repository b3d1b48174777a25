"""What a person sees while a model trains: a line a validation, samples, and a word when something goes wrong."""

import contextlib
import json
import logging
import math
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptlab.callbacks.averaging import average_in, averaged
from gptlab.callbacks.record import Monitor
from gptlab.callbacks.steps import Budget, StepCallback
from gptlab.engine import generate
from gptlab.sharding import is_split, of_first_rank
from gptlab.tokenizer import EOS_ID

log = logging.getLogger("gptlab")


def short(count: float) -> str:
    """3100 as 3.1k."""
    for unit in ("", "k", "M"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"


def one_line(text: str) -> str:
    """Text for a terminal: each run of white space as a space, and what would steer the terminal spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


class ConsoleLines(Callback):
    """One line a validation that a person can read."""

    def __init__(self, monitor: Monitor, budget: Budget):
        self.monitor, self.budget = monitor, budget

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        figures, average, loss = task.figures, average_in(trainer), self.monitor.figures.get("train/loss")
        epochs = self.budget.total_steps * trainer.accumulate_grad_batches / trainer.num_training_batches
        parts = [
            f"epoch {trainer.current_epoch + 1}/{math.ceil(epochs)}",
            f"step {trainer.global_step:,}",
            "train -" if loss is None else f"train {loss:.3f}",
            f"val {figures['val/loss']:.3f}" + (f" ({average.word})" if average else ""),
            f"ppl {figures['val/perplexity']:.4g}",
            f"{short(self.monitor.figures.get('train/tokens_per_second') or math.nan)} tok/s",
            f"{self.budget.seconds:.0f} s",
        ]
        log.info("  ".join(parts))
        if task.source_names:
            log.info("  ".join(f"val of {name} {figures[f'val/loss/{name}']:.3f}" for name in task.source_names))


class ProgressBar(StepCallback):
    """The last line of a terminal: optimizer steps done of the whole run, the loss, and the time left."""

    def __init__(self, monitor: Monitor, budget: Budget):
        self.monitor, self.budget = monitor, budget
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[loss]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True)

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        super().on_train_start(trainer, task)
        if trainer.is_global_zero:
            total, step = self.budget.total_steps, trainer.global_step
            self._bar = self._progress.add_task("step", total=total, completed=step, loss="")
            self._progress.start()

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if trainer.is_global_zero:
            loss = self.monitor.figures.get("train/loss")
            self._progress.update(self._bar, completed=step, loss="" if loss is None else f"train {loss:.3f}")

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        self._progress.stop()


class Samples(StepCallback):
    """Lets the model continue fixed prompts every `every_steps` optimizer steps and at the end.

    The texts go to the console, to samples.jsonl as {step, prompt, text}, and to TensorBoard. Their randomness has a
    seed of its own: sampling changes nothing in the training.
    """

    def __init__(
        self,
        every_steps: int | None,
        prompts: list[str],
        max_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
    ):
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"samples.every_steps={every_steps} must be at least 1, or null for never")
        if temperature < 0:
            raise ValueError(f"samples.temperature={temperature} must be 0 (greedy) or more")
        for name, value in (("top_k", top_k), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"samples.{name}={value} must be at least 1")
        self.every_steps, self.prompts = every_steps, list(prompts)
        self.max_tokens, self.temperature, self.top_k, self.seed = max_tokens, temperature, top_k, seed
        self.path = Path("samples.jsonl")  # set by the door that knows the run folder
        self._sampled = -1

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if self.every_steps is not None and (step % self.every_steps == 0 or trainer.should_stop):
            self._sample(trainer, task, step)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        if self.every_steps is not None and self._sampled != trainer.global_step:  # an early stop comes after the step
            self._sample(trainer, task, trainer.global_step)

    def _sample(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        self._sampled = step
        with averaged(trainer, task):
            self._write(trainer, task, step)

    def _write(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if not trainer.is_global_zero and not is_split(task.model):
            return
        for prompt in self.prompts:
            text = self.continuation(trainer, task, prompt)  # by all ranks that hold a part of the network
            if not trainer.is_global_zero:
                continue
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            log.info("sample at step %s: %s", f"{step:,}", one_line(prompt + text))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(f"samples/{prompt or 'from nothing'}", prompt + text, step)

    def continuation(self, trainer: Trainer, task: LightningModule, prompt: str) -> str:
        ids = torch.tensor([EOS_ID, *task.tokenizer.encode(prompt).tolist()])  # as at the start of a document
        context, agree = contextlib.nullcontext(), int
        if is_split(task.model):  # its matrices are gathered in the type of training, and compute in no other
            context, agree = trainer.precision_plugin.forward_context(), partial(of_first_rank, device=task.device)
        with context:
            new = generate(
                task.model,
                ids,
                self.max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
                stop_id=EOS_ID,
                vocab_size=task.tokenizer.vocab_size,
                agree=agree,
            )
        return task.tokenizer.decode(new)


class Alerts(StepCallback):
    """Says so when training goes wrong, with the override that helps; `alerts` goes into result.json.

    - unknown: before the first step, over 0.1 % of the tokens of a side are <unk>
    - overfitting: val/loss has risen at three validations in a row while train/loss fell
    - stuck: after 300 steps the loss is still within 5 % of ln V, a uniform guess
    - spike: the loss is 0.5 nats and 20 % above the median of the last 20 logged
    - diverging: the gradient norm, before clipping, is over 20 times the median of the last 20 logged
    - skipped: at the end, how many steps `nonfinite=skip` has passed over
    """

    UNKNOWN_SHARE = 0.001
    HISTORY = 20
    REST_STEPS = 500  # before the same kind is reported again

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self.alerts: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.validations: list[list[float]] = []  # [train, val]

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        prepared = getattr(trainer.datamodule, "prepared", None)  # somebody's own data need not have it
        splits = {} if prepared is None else prepared.meta["splits"]
        shares = {side: split["unknown_tokens"] / split["tokens"] for side, split in splits.items()}
        if shares and max(shares.values()) > self.UNKNOWN_SHARE:
            said = " and ".join(f"{share:.1%} of the {side} tokens" for side, share in shares.items())
            message = f"{said} are <unk>: the tokenizer cannot spell this text, and bits per byte compares with nothing"
            self._alert(0, "unknown", message, "tokenizer=sentencepiece or byte, or one that learnt this text")

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        figures = self.monitor.figures
        loss, norm = figures.get("train/loss"), figures.get("train/gradient_norm")
        if self.monitor.logged_step != step or loss is None or norm is None:
            return
        uniform = math.log(task.model.config.vocab_size)
        if step >= 300 and loss > 0.95 * uniform:
            advice = (
                "a higher optimizer.lr, or check that data and tokenizer hold what you think (python -m gptlab.prepare)"
            )
            self._alert(step, "stuck", f"train/loss {loss:.2f} is still near ln V = {uniform:.2f}", advice)
        if len(self.losses) >= self.HISTORY // 2:
            usual, usual_norm = statistics.median(self.losses), statistics.median(self.norms)
            if loss > max(usual + 0.5, 1.2 * usual):
                advice = "a lower optimizer.lr, or a longer schedule.warmup_steps"
                self._alert(step, "spike", f"train/loss jumped from {usual:.2f} to {loss:.2f}", advice)
            if norm > 20 * usual_norm:
                advice = "a lower trainer.gradient_clip_val or optimizer.lr"
                self._alert(step, "diverging", f"the gradient norm grew from {usual_norm:.2g} to {norm:.2g}", advice)
        self.losses = [*self.losses, loss][-self.HISTORY :]
        self.norms = [*self.norms, norm][-self.HISTORY :]

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        train, val = self.monitor.figures.get("train/loss"), task.figures["val/loss"]
        if train is None:
            return
        self.validations = [*self.validations, [train, val]][-4:]
        trains, vals = zip(*self.validations, strict=True)
        if len(vals) == 4 and all(a < b for a, b in pairwise(vals)) and trains[-1] < trains[0]:
            message = f"val/loss rose from {vals[0]:.3f} to {vals[-1]:.3f} while train/loss fell to {train:.3f}"
            advice = "model.dropout=0.1, more text, fewer trainer.max_steps, or callbacks=early_stopping"
            self._alert(trainer.global_step, "overfitting", message, advice)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        if task.skipped_steps:
            self.alerts = [alert for alert in self.alerts if alert["kind"] != "skipped"]  # of a run that is extended
            message = f"{task.skipped_steps} of {trainer.global_step:,} steps were skipped, their loss not finite"
            self._alert(trainer.global_step, "skipped", message, "a lower optimizer.lr, or trainer.precision=32-true")

    def _alert(self, step: int, kind: str, message: str, advice: str) -> None:
        if any(alert["kind"] == kind and step - alert["step"] < self.REST_STEPS for alert in self.alerts):
            return
        self.alerts.append({"step": step, "kind": kind, "message": f"{message}; try {advice}"})
        log.warning("alert at step %s: %s: %s; try %s", f"{step:,}", kind, message, advice)

    def state_dict(self) -> dict[str, Any]:
        return {"alerts": self.alerts, "losses": self.losses, "norms": self.norms, "validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alerts, self.losses = state["alerts"], state["losses"]
        self.norms, self.validations = state["norms"], state["validations"]
