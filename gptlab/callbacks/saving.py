"""What is saved and when: the random state, and last.ckpt and best.ckpt, each written whole or not at all."""

import logging
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from gptlab import checkpoint, ranks
from gptlab.callbacks.averaging import average_in
from gptlab.callbacks.steps import Requests, StepCallback, validation_follows
from gptlab.data.module import data_rank
from gptlab.files import require_space

log = logging.getLogger("gptlab")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through gptlab's own files: whole or not at all, listed in a manifest, never run as code.

    `storage_options` are {"links": further names of the file, "spare": a name for the one before it, "drop": files to
    remove once all have their names}. With `background`, a copy of the state is written while training goes on; one
    file at a time, so that what is on disk is the same as without, some steps later.
    """

    def __init__(self, background: bool):
        self.background = background
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        options = storage_options or {}
        arguments = (Path(path), options.get("links", []), options.get("spare"), options.get("drop", []))
        if not self.background:
            self._write(checkpoint_dict, *arguments)
            return
        self._pending = self._writer.submit(self._write, tree_map(copied, checkpoint_dict), *arguments)

    def _write(
        self, checkpoint_dict: dict[str, Any], path: Path, links: list[Path], spare: Path | None, drop: list[Path]
    ) -> None:
        checkpoint.save(checkpoint_dict, path, links, spare)
        for old in drop:
            old.unlink(missing_ok=True)

    def wait(self) -> None:
        """Return when everything is on disk. Raises what went wrong in the background."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the background, if it is known yet."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoint.load(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def copied(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf


class RandomState(Callback):
    """Keeps every random generator of every rank in the checkpoint, to be set again before a resumed run's first batch.

    Ranks that see other data draw other numbers: rank r, of those that split the batch, starts from seed + r. A rank
    that the checkpoint does not know, since more of them go on than there were, starts from the seed, r and the step.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._sharing = 1  # ranks that see the same data
        self._restore: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        rank, world = data_rank(trainer)
        self._sharing = trainer.world_size // world
        if self._restore is None and rank:
            torch.manual_seed(self.seed + rank)

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, which other code may draw from
        own = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "python": [version, list(internal), gauss],
            "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), *rest],
        }
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [own]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, own)
        return {"ranks": states[:: self._sharing]}  # those that share a network's tensors draw the same numbers

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restore = state["ranks"]

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        states, self._restore = self._restore, None
        if states is None:
            return
        rank, _ = data_rank(trainer)
        if rank >= len(states):
            torch.manual_seed((self.seed + trainer.global_step) * 2**16 + rank)
            return
        state = states[rank]
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


class Checkpoints(StepCallback):
    """last.ckpt is the newest complete state, best.ckpt the one of the lowest val/loss; both can be resumed.

    The last is written every `every_steps` optimizer steps, every `every_epochs` epochs, `every_minutes` minutes after
    the one before, after every validation, and at the end. Where a validation follows a step, saving waits for it, so
    that no resumed run misses it or repeats it. `keep_last` of those at intervals stay as step-00000060.ckpt and so on.
    One file may have several of these names; where no second one would be left if it were damaged, the last but one
    stays as previous.ckpt. With `background`, training goes on while a copy of the state is written.
    """

    def __init__(
        self,
        every_steps: int | None,
        every_epochs: int | None,
        every_minutes: float | None,
        keep_last: int,
        background: bool,
    ):
        for name, value, least in (
            ("every_steps", every_steps, 1),
            ("every_epochs", every_epochs, 1),
            ("keep_last", keep_last, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"checkpoint.{name}={value} must be at least {least}")
        if every_minutes is not None and every_minutes <= 0:
            raise ValueError(f"checkpoint.every_minutes={every_minutes} must be more than 0, or null")
        self.every_steps, self.every_epochs, self.every_minutes = every_steps, every_epochs, every_minutes
        self.keep_last = keep_last
        self.files = AtomicCheckpointIO(background)
        self.folder = Path("checkpoints")  # set by the door that knows the run folder
        self.requests = Requests()  # set where there are others who ask
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.saved_step = -1
        self._saved_at = 0.0
        self._has_saved = False

    def setup(self, trainer: Trainer, task: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self.files

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        super().on_train_start(trainer, task)
        begin_the_epoch(trainer)
        self._saved_at = time.monotonic()
        self._has_saved = Path(trainer.ckpt_path or "") == self.folder / "last.ckpt"
        if trainer.is_global_zero:  # the best, the last and, until it is whole, a new one, besides those to be kept
            self.folder.mkdir(parents=True, exist_ok=True)
            state = task.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]
            weights, optimizer = (checkpoint.tensor_bytes(part) for part in state)
            averages = weights if average_in(trainer) else 0
            size = averages + max(weights + optimizer, 3 * weights)
            files = {path.stat().st_ino: path.stat().st_size for path in self.folder.glob("*.ckpt")}
            require_space(self.folder, max(size, (3 + self.keep_last) * size - sum(files.values())))

    def _due(self, trainer: Trainer, step: int) -> bool:
        at_step = self.every_steps is not None and step % self.every_steps == 0
        is_epoch_end = trainer.fit_loop.batch_idx + 1 == trainer.num_training_batches
        epochs = trainer.current_epoch + 1
        at_epoch = self.every_epochs is not None and is_epoch_end and epochs % self.every_epochs == 0
        asked = self.requests.heard(trainer, trainer.lightning_module, "save")
        return at_step or at_epoch or (asked and self.requests.heard_step > self.saved_step)

    def on_before_optimizer_step(self, trainer: Trainer, task: LightningModule, optimizer: Optimizer) -> None:
        if self.every_minutes is not None and trainer.is_global_zero:  # of several ranks, the first one's clock counts
            self.requests.ask("save", time.monotonic() - self._saved_at >= 60 * self.every_minutes)

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        self.files.raise_if_failed()
        if self._due(trainer, step) and not validation_follows(trainer):
            self._save(trainer, keep=True)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        step, loss = trainer.global_step, task.figures["val/loss"]
        improved = loss == loss and (self.best_loss is None or loss < self.best_loss)
        if improved:
            self.best_loss, self.best_step = loss, step
        self._save(trainer, keep=self._due(trainer, step), is_best=improved)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.save_last(trainer)

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        ranks.end_in_own_way()
        try:
            self.files.wait()
        except OSError as error:
            log.error("%s", error)  # besides what ended the training

    def save_last(self, trainer: Trainer) -> None:
        """Have the state as it is now on disk, and wait until it is there."""
        if self.saved_step != trainer.global_step:
            self._save(trainer)
        self.files.wait()

    def _save(self, trainer: Trainer, keep: bool = False, is_best: bool = False) -> None:
        trainer.lightning_module.finite_sums()  # or nothing is saved
        self.files.wait()  # what it writes counts among those that are kept
        best, previous = self.folder / "best.ckpt", self.folder / "previous.ckpt"
        links, drop = [best] if is_best else [], []
        steps = set(self.folder.glob("step-*.ckpt"))
        if keep and self.keep_last:
            links.append(self.folder / f"step-{trainer.global_step:08d}.ckpt")
            drop = sorted({*steps, links[-1]})[: -self.keep_last]
        stay = steps.union([best] if best.exists() else []).difference(links, drop)
        names = {"links": links, "drop": drop if not stay else [*drop, previous]}
        if not stay and self._has_saved:  # otherwise nobody knows whether the last one is whole
            names["spare"] = previous
        trainer.save_checkpoint(self.folder / "last.ckpt", storage_options=names)
        self._has_saved = True
        self.saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self.requests.ask("save", False)  # or the next step would carry it once more

    def on_load_checkpoint(self, trainer: Trainer, task: LightningModule, state: dict[str, Any]) -> None:
        """Count micro-batches anew where a step is made of another number of them than when it was saved."""
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        accumulated = max(1, progress["total"]["processed"] // max(1, state["global_step"]))
        for counts in (progress["total"], progress["current"]):
            more = counts["processed"] // accumulated * trainer.accumulate_grad_batches - counts["processed"]
            counts.update({name: count + more for name, count in counts.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]


def begin_the_epoch(trainer: Trainer) -> None:
    """Let Lightning count the epoch that begins, where a run goes on from the last step of the one before.

    It takes that for the middle of an epoch, and would not: what is saved next could not be resumed exactly.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if trainer.fit_loop.restarted_mid_epoch and epochs.ready == epochs.processed:
        trainer.fit_loop.reset_restart_stage()
