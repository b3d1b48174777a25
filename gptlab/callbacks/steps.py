"""The hook of callbacks that count optimizer steps, the end of training, signals, and compiling before the clock."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from torch.optim import Optimizer

from gptlab.signals import SIGNALS, Interrupted
from gptlab.tasks.lm import REQUESTS

log = logging.getLogger("gptlab")


class StepCallback(Callback):
    """A callback with `on_step_end`, called once an optimizer step, however many micro-batches make one.

    `trainer.should_stop` is true there at the last step; `validation_follows` tells whether Lightning validates next.
    """

    _last_step = -1

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, task, trainer.global_step)


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates at the step that has just ended."""
    if trainer.should_stop:
        return True
    if trainer.check_val_every_n_epoch is None:  # counted over epochs
        return (trainer.fit_loop.total_batch_idx + 1) % trainer.val_check_batch == 0
    return (trainer.fit_loop.batch_idx + 1) % trainer.val_check_batch == 0


class Requests(Callback):
    """What any rank asks of all: to end, after a signal or for the time, and to save, for the time.

    A request travels with the sums of a step, in the one all-reduce that a step has, so that every rank hears of it at
    the same step. On GPUs it is read a step later: nobody waits for a device. A single process hears itself at once.
    """

    def __init__(self) -> None:
        self.asked = [False] * len(REQUESTS)
        self._told = list(self.asked)  # what the task knows
        self.heard_step = -1  # at which step what is heard was asked for
        self._heard = [False] * len(REQUESTS)
        self._read_step = -1
        self._under_way: tuple[torch.Tensor, torch.cuda.Event, int] | None = None
        self._handlers: dict[int, Any] = {}
        self._single, self._begun = True, False

    def ask(self, kind: str, wanted: bool = True) -> None:
        self.asked[REQUESTS.index(kind)] = wanted

    def heard(self, trainer: Trainer, task: LightningModule, kind: str) -> bool:
        """Whether any rank has asked; the same on all ranks, when called after a step."""
        if trainer.world_size == 1:
            self._heard, self.heard_step = self.asked, trainer.global_step
        elif self._read_step != trainer.global_step:
            self._read_step = trainer.global_step
            self._read(task, trainer.global_step)
        return self._heard[REQUESTS.index(kind)]

    def _read(self, task: LightningModule, step: int) -> None:
        if task.device.type != "cuda":
            self._heard, self.heard_step = [count > 0 for count in task.requested.tolist()], step
            return
        if self._under_way is not None:
            copied, event, self.heard_step = self._under_way
            event.synchronize()  # long done: it is a step old
            self._heard = [count > 0 for count in copied.tolist()]
        buffer, event = torch.empty(len(REQUESTS), pin_memory=True), torch.cuda.Event()
        buffer.copy_(task.requested, non_blocking=True)
        event.record()
        self._under_way = (buffer, event, step)

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        self._begun = True

    def on_before_optimizer_step(self, trainer: Trainer, task: LightningModule, optimizer: Optimizer) -> None:
        if trainer.world_size > 1 and self.asked != self._told:  # copying waits for the device
            self._told = list(self.asked)
            task.requests.copy_(torch.tensor(self._told, dtype=torch.float32))

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self._single = trainer.world_size == 1
        # Lightning would broadcast a flag of its own before every batch, and wait for the device to read it.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if threading.current_thread() is threading.main_thread():  # here, because Lightning has set its own by now
            self._handlers = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        kind = "interrupt" if signum == signal.SIGINT else "terminate"
        is_second = signum == signal.SIGINT and self.asked[0]
        if is_second or (self._single and not self._begun):  # before the first step there is nothing to save
            raise Interrupted(signum)
        self.ask(kind)

    def teardown(self, trainer: Trainer, task: LightningModule, stage: str) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}


class Budget(StepCallback):
    """Ends training after `total_steps`, or at the first step after `max_time_s` seconds of training.

    It asks Lightning to stop, rather than being cut off, and so the last step is validated like any other. Of several
    ranks the first one's clock counts.
    """

    def __init__(self, total_steps: int, max_time_s: float | None, requests: Requests | None = None):
        self.total_steps, self.max_time_s = total_steps, max_time_s
        self.requests = requests or Requests()
        self.seconds_before = 0.0
        self._start: float | None = None
        self._end: float | None = None
        self._trainer: Trainer | None = None

    @property
    def seconds(self) -> float:
        """Seconds from the first step of the run on, over all its sessions; without start-up and compilation."""
        if self._start is None:
            return self.seconds_before
        return self.seconds_before + (self._end or time.perf_counter()) - self._start

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        super().on_train_start(trainer, task)
        self._start, self._trainer = time.perf_counter(), trainer

    def is_spent(self, step: int, seconds: float) -> bool:
        return step >= self.total_steps or (self.max_time_s is not None and seconds >= self.max_time_s)

    def on_before_optimizer_step(self, trainer: Trainer, task: LightningModule, optimizer: Optimizer) -> None:
        if trainer.is_global_zero and self.is_spent(0, self.seconds):
            self.requests.ask("time")

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if step >= self.total_steps or self.requests.heard(trainer, task, "time"):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self._end = time.perf_counter()

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        self._end = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """`stopped_early`: something else has ended the run, such as early stopping."""
        trainer, seconds = self._trainer, self.seconds
        early = trainer is not None and trainer.should_stop and not self.is_spent(trainer.global_step, seconds)
        return {"seconds": seconds, "stopped_early": early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds_before = state["seconds"]


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, with a patience that a resumed run may change: the checkpoint's own would come back."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})


class Interrupts(StepCallback):
    """Ends the run at the next step boundary after a signal, once `save` has put everything needed to resume on disk.

    A signal is only noted while a step or a validation is under way: saving in the middle of either would lose it. A
    second Ctrl-C does not wait.
    """

    def __init__(self, save: Callable[[Trainer], None], requests: Requests):
        self.save, self.requests = save, requests

    def on_step_end(self, trainer: Trainer, task: LightningModule, step: int) -> None:
        if not validation_follows(trainer):
            self._end_if_asked(trainer, task)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        if not trainer.should_stop and not trainer.sanity_checking:
            self._end_if_asked(trainer, task)

    def _end_if_asked(self, trainer: Trainer, task: LightningModule) -> None:
        for kind, signum in (("interrupt", signal.SIGINT), ("terminate", signal.SIGTERM)):
            if self.requests.heard(trainer, task, kind):
                self.save(trainer)
                raise Interrupted(signum)


class CompileAhead(Callback):
    """Compiles the training and the validation graph before the first step, so that no clock counts it.

    Both are run once on a batch that is then forgotten: gradients, sums and random numbers stay as they were. Where the
    compiler fails and nobody said that it `must` work, training goes on without it.
    """

    def __init__(self, must: bool):
        self.must = must
        self.seconds: float | None = None  # what compiling took

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        if not task.compiled:
            return
        start = time.perf_counter()
        log.info("compiling the network (compile=false to skip)")
        try:
            self._run_once(trainer, task)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            if self.must:
                raise
            reason = str(error).strip().splitlines()[0]
            log.warning(
                "compiling failed (%s): going on without; compile=true shows why, compile=false skips this", reason
            )
            task.set_compile(False)
        task.zero_grad()
        task.step_sums.zero_()
        for metrics in (task.validation, *task.validation_by_source):
            metrics.reset()
        self.seconds = time.perf_counter() - start
        if task.compiled:
            log.info("compiled in %.1f s", self.seconds)

    def _run_once(self, trainer: Trainer, task: LightningModule) -> None:
        batch = {name: tensor.to(task.device) for name, tensor in trainer.datamodule.example().items()}
        devices = [task.device] if task.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            with trainer.precision_plugin.train_step_context():
                loss = task.training_step(batch, 0)
            loss.backward()
            task.eval()
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                task.validation_step(batch, 0)
            task.train()
