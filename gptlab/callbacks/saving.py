"""What is saved and when: the random state, and last.ckpt and best.ckpt, each written whole or not at all."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from gptlab import checkpoint
from gptlab.callbacks.steps import StepCallback, validation_follows


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through gptlab's own files: atomic, synced, and never run as code."""

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint.save(checkpoint_dict, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoint.load(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class RandomState(Callback):
    """Keeps every random generator in the checkpoint, and sets it again before the first batch of a resumed run."""

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, which other code may draw from
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": [version, list(internal), gauss],
            "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), *rest],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restore = state

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        state, self._restore = self._restore, None
        if state is None:
            return
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


class Checkpoints(StepCallback):
    """last.ckpt is the newest complete state, best.ckpt the one of the lowest val/loss; both can be resumed.

    The last is written every `every_steps` optimizer steps, every `every_epochs` epochs, after every validation, and at
    the end. Where a validation follows a step, saving waits for it, so that no resumed run misses it or repeats it.
    `keep_last` of the periodic ones stay as step-<n>.ckpt.
    """

    def __init__(self, every_steps: int | None, every_epochs: int | None, keep_last: int):
        for name, value, least in (
            ("every_steps", every_steps, 1),
            ("every_epochs", every_epochs, 1),
            ("keep_last", keep_last, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"checkpoint.{name}={value} must be at least {least}")
        self.every_steps, self.every_epochs, self.keep_last = every_steps, every_epochs, keep_last
        self.folder = Path("checkpoints")  # set by the door that knows the run folder
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.saved_step = -1

    def _due(self, trainer: Trainer, step: int) -> bool:
        at_step = self.every_steps is not None and step % self.every_steps == 0
        is_epoch_end = trainer.fit_loop.batch_idx + 1 == trainer.num_training_batches
        epochs = trainer.current_epoch + 1
        return at_step or (self.every_epochs is not None and is_epoch_end and epochs % self.every_epochs == 0)

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if self._due(trainer, step) and not validation_follows(trainer):
            self.save_last(trainer)
            self._keep_periodic(trainer, step)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        step, loss = trainer.global_step, task.figures["val/loss"]
        improved = loss == loss and (self.best_loss is None or loss < self.best_loss)
        if improved:
            self.best_loss, self.best_step = loss, step
        self.save_last(trainer)
        if improved:
            link(self.folder / "last.ckpt", self.folder / "best.ckpt")
        if self._due(trainer, step):
            self._keep_periodic(trainer, step)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        require_finite(trainer.lightning_module)
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def _keep_periodic(self, trainer: Trainer, step: int) -> None:
        if not self.keep_last or not trainer.is_global_zero:
            return
        link(self.folder / "last.ckpt", self.folder / f"step-{step:08d}.ckpt")
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep_last]:
            old.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]


class NotFiniteError(ArithmeticError):
    """The loss or the gradients became NaN or infinite."""


def require_finite(task: LightningModule) -> None:
    """Raise NotFiniteError unless the sums of the loss and the last gradient norm are numbers."""
    if not bool(torch.isfinite(task.interval_sums).all() & torch.isfinite(task.gradient_norm)):
        raise NotFiniteError(
            f"the loss or its gradient is NaN or infinite at step {task.trainer.global_step}; the last good checkpoint "
            "is kept. Try a lower optimizer.lr, a longer schedule.warmup_steps, a lower trainer.gradient_clip_val, or "
            "trainer.precision=32-true"
        )


def link(source: Path, target: Path) -> None:
    """Let `target` be the file that `source` is now, without writing it twice; atomic."""
    temporary = target.with_name(f".{target.name}.tmp.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
