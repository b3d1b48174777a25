"""Averaged weights: a moving average of the network, kept beside the weights that are trained."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from gptlab.callbacks.steps import StepCallback
from gptlab.checkpoint import OWN_KEY
from gptlab.sharding import local, row_orders, share, whole


class MovingAverage(StepCallback):
    """Keeps an exponential moving average of the trained weights; validation, samples and best.ckpt are made with it.

    At its n-th update, counted from 0, the average goes the share 1 - d of the way to the weights, where d is the least
    of `decay` and (1 + n) / (10 + n): the warm-up of TensorFlow's ExponentialMovingAverage(num_updates=n). So it looks
    back over a ninth of the updates so far, until that is more than 1 / (1 - decay) of them. A step skipped as not
    finite leaves it as it is.

    Training never sees the average: to use it, the two exchange their values in place, which leaves what holds on to
    the parameters, optimizers and compiled graphs among them, as it is. In a checkpoint `state_dict` is the average and
    `current_model_state` the trained weights, as in Lightning's WeightAveraging. When training has ended, the network
    is left with the average; after an error, with the trained weights.
    """

    word = "ema"  # what figures made with it are labelled with

    def __init__(self, decay: float, from_step: int, every_steps: int):
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must be at least 0 and less than 1, such as 0.999")
        for name, value, least in (("from_step", from_step, 0), ("every_steps", every_steps, 1)):
            if value < least:
                raise ValueError(f"callbacks.ema.{name}={value} must be at least {least}")
        self.decay, self.from_step, self.every_steps = decay, from_step, every_steps
        self.in_use = False  # whether the network holds the average just now
        self._weights: list[Tensor] = []  # the parameters that are trained
        self._kept: list[Tensor] = []  # the average of each; the trained values while the average is in use
        self._places: dict[str, int] = {}  # in both lists, by name; a tied weight has two names
        self._trained: dict[str, Tensor] | None = None  # of the checkpoint that the run continues from

    def on_load_checkpoint(self, trainer: Trainer, task: LightningModule, state: dict[str, Any]) -> None:
        self._trained = state.get("current_model_state")

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Begin with the weights as they are: those of the seed, of `init_from`, or the average of a checkpoint."""
        super().on_train_start(trainer, task)
        self._weights = [weight for weight in task.parameters() if weight.requires_grad]
        if coarse := [weight.dtype for weight in self._weights if weight.dtype.itemsize < 4]:
            raise ValueError(
                f"trainer.precision={trainer.precision}: weights in {str(coarse[0]).removeprefix('torch.')} are too "
                f"coarse for the small steps of callbacks={self.word}; use bf16-mixed or 32-true, or leave it out"
            )
        place_of = {id(weight): place for place, weight in enumerate(self._weights)}
        named = task.named_parameters(remove_duplicate=False)
        self._places = {name: place_of[id(weight)] for name, weight in named if id(weight) in place_of}
        self._kept, self.in_use = [weight.detach().clone() for weight in self._weights], False
        trained, self._trained = self._trained, None
        if trained is not None:
            orders = row_orders(task)
            for name, place in self._places.items():
                weight = self._weights[place]
                weight.copy_(share(trained[name].to(weight.device), weight, orders.get(weight)))

    @torch.no_grad()
    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        weights, averages = ([local(tensor) for tensor in tensors] for tensors in (self._weights, self._kept))
        if step <= self.from_step:
            torch._foreach_copy_(averages, weights)
        elif (step - self.from_step) % self.every_steps == 0 and not task.skipped_in_a_row:
            n = (step - self.from_step) // self.every_steps - 1
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + n) / (10 + n)))

    @torch.no_grad()
    def exchange(self, task: LightningModule) -> None:
        """Give the network the values that it does not hold, and keep those that it did: in place, tensor by tensor."""
        for module in task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or it would go on with what it had gathered before
        for weight, kept in zip(map(local, self._weights), map(local, self._kept), strict=True):
            swap(weight, kept)
        self.in_use = not self.in_use

    def on_validation_start(self, trainer: Trainer, task: LightningModule) -> None:
        if self._kept and trainer.state.fn == TrainerFn.FITTING:
            self.exchange(task)

    def on_validation_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        if self.in_use and trainer.state.fn == TrainerFn.FITTING:
            self.exchange(task)

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        if self.in_use:
            self.exchange(task)

    def on_fit_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.exchange(task)
        self._weights, self._kept = [], []

    def on_save_checkpoint(self, trainer: Trainer, task: LightningModule, state: dict[str, Any]) -> None:
        """Put both into the file, and say what `state_dict` is. Lightning's `weights_only=True` passes this over."""
        if self._kept:
            present = state["state_dict"]
            orders = row_orders(task)  # of a network that is split; its parts are put together by all ranks, on the CPU
            kept = [
                tensor if local(tensor) is tensor else whole(tensor, orders.get(weight)).cpu()
                for weight, tensor in zip(self._weights, self._kept, strict=True)
            ]
            other = present | {name: kept[place] for name, place in self._places.items() if name in present}
            state["state_dict"], state["current_model_state"] = (present, other) if self.in_use else (other, present)
        if self._kept or self.in_use:
            state.setdefault(OWN_KEY, {})["weights"] = self.word


def average_in(trainer: Trainer) -> MovingAverage | None:
    """The average that a training keeps, if it keeps one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, MovingAverage)), None)


@contextlib.contextmanager
def averaged(trainer: Trainer, task: LightningModule) -> Iterator[None]:
    """Let the network hold the average, where there is one, as long as this lasts."""
    average = average_in(trainer)
    if average is None or average.in_use:
        yield
        return
    average.exchange(task)
    try:
        yield
    finally:
        average.exchange(task)


def swap(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors, in place."""
    held = one.clone()
    one.copy_(other)
    other.copy_(held)
