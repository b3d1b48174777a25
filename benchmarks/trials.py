"""Runs that are hurt on purpose: sessions that can be killed, and whether what they leave is the run that was not.

A session is a forked process, so that fifty of them import torch once. Each writes down, outside of the run folder,
which windows it trains on at which step: the witness.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gptlab import config, doors
from gptlab.files import Manifest
from gptlab.given import strip_key
from gptlab.resume import fault_of
from gptlab.run import RunFolder
from gptlab.signals import SIGNALS
from gptlab.tasks.lm import LMTask
from gptlab.train import train

# Everything that a resume has to carry over is on: dropout, accumulation, several epochs, validations, samples.
OPTIONS = (
    *("trainer=cpu", "trainer.precision=32-true", "compile=false", "tokenizer=byte", "logger=csv", "model=tiny"),
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=16", "model.dropout=0.3"),
    *("data.batch_size=16", "trainer.accumulate_grad_batches=2", "trainer.max_steps=24", "schedule.warmup_steps=4"),
    *("validation.every_steps=4", "samples.every_steps=6", "samples.max_tokens=10", "log.every_steps=2"),
    *("checkpoint.every_steps=1", "checkpoint.keep_last=2"),
)
CLOCK = ("seconds", "train/tokens_per_second", "train/mfu")
RESULT = ("status", "steps", "epochs", "train_tokens", "train_loss", "val_loss", "best_val_loss", "best_step")


def rows(run: Path) -> list[str]:
    """metrics.csv without what depends on the clock."""
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    timed = {header.split(",").index(name) for name in CLOCK}
    return [",".join(v for i, v in enumerate(line.split(",")) if i not in timed) for line in lines]


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ, their clocks aside; [] where they are one run, bit for bit."""
    found = []
    if rows(one) != rows(other):
        found.append("metrics.csv")
    if (one / "samples.jsonl").read_text() != (other / "samples.jsonl").read_text():
        found.append("samples.jsonl")
    found += [f"{name}.ckpt" for name in ("last", "best") if not same_weights(weights(one, name), weights(other, name))]
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    found += [key for key in (*RESULT, "alerts", "skipped_steps") if results[0][key] != results[1][key]]
    history = [
        [[entry[key] for key in ("step", "epoch", "train_loss", "val_loss")] for entry in result["history"]]
        for result in results
    ]
    return found if history[0] == history[1] else [*found, "history"]


def compose(*overrides: str) -> dict[str, Any]:
    """The plain config that a command line makes."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        return config.plain(hydra_compose("train", list(overrides)))


def write_text(path: Path, seed: int = 0) -> None:
    """Sentences of a small vocabulary: an epoch of OPTIONS is seven steps."""
    rng = random.Random(seed)
    words = "the a cat dog bird sees hears likes old young quick red blue house tree and or runs sleeps".split()
    path.write_text("".join(" ".join(rng.choices(words, k=7)).capitalize() + ".\n" for _ in range(60)))


@dataclass
class Seen:
    """What the witness saw of one session: the windows of each step, in order."""

    windows: dict[int, Counter[str]] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """The step that it went on from."""
        return min(self.windows) - 1

    @property
    def done(self) -> int:
        """The last step that was over for certain: the next one had begun."""
        return max(self.windows) - 1


@dataclass
class Trial:
    """One run folder, from its start through its sessions to its end. `options` are added to OPTIONS.

    The witness and what the sessions say are written to `beside`, which must be whole when the run's disk is not.
    """

    folder: Path
    text: Path
    options: tuple[str, ...] = ()
    nan_at: int | None = None  # the step at which a session's loss becomes NaN
    beside: Path | None = None  # the folder that the run's folder is in, unless said

    def __post_init__(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        beside = self.beside or self.folder.parent
        self.witness = beside / f"{self.folder.name}.witness"
        self.log = beside / f"{self.folder.name}.log"

    # Sessions

    def begin(self, *overrides: str) -> int:
        """Start or resume the run in a process of its own: its id."""
        if (self.folder / "config.yaml").exists() or any(self.folder.glob("checkpoints/*.ckpt")):
            given: tuple[str, ...] = (f"resume={self.folder}", "seed=77", *overrides)
        else:
            given = (*OPTIONS, *self.options, f"data.files={self.text}", f"run_dir={self.folder}", *overrides)
        self.log.write_text("")
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = self._session(given)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _session(self, given: tuple[str, ...]) -> int:
        """What a door does, in this process."""
        self._testify()
        doors.quiet()
        for signum in SIGNALS:
            signal.signal(signum, doors.interrupt)
        try:
            return train(compose(*given), {strip_key(override): override for override in given}, "trial")
        except BaseException as error:
            return doors.report(error, before_first_step=True)

    def _testify(self) -> None:
        """Have the training step write down what it sees, and fail where this trial says so."""
        real, pid, nan_at = LMTask.training_step, os.getpid(), self.nan_at
        witness = open(self.witness, "ab", buffering=0)  # noqa: SIM115 - until the process ends

        def training_step(task: LMTask, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            step = task.trainer.global_step + 1
            seen = [hashlib.blake2b(row.numpy().tobytes(), digest_size=6).hexdigest() for row in batch["tokens"]]
            witness.write(f"{pid} {step} {' '.join(seen)}\n".encode())
            loss = real(task, batch, batch_idx)
            if step == nan_at:
                task.step_sums *= torch.nan
                loss = loss * torch.nan
            return loss

        LMTask.training_step = training_step

    def end(self, pid: int, timeout_s: float = 120) -> int:
        """Wait for a session: its exit code, negative for the signal that ended it."""
        for _ in waiting(timeout_s):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TimeoutError(f"{self.folder}: a session did not end in {timeout_s} s:\n{self.said}")

    def run(self, *overrides: str) -> int:
        return self.end(self.begin(*overrides))

    def until_step(self, pid: int, step: int) -> None:
        """Return when a session has begun a step, or is over."""
        for _ in waiting(120):
            if not is_running(pid) or any(number >= step for seen in self.sessions(pid) for number in seen.windows):
                return

    def kill_at_step(self, step: int) -> None:
        pid = self.begin()
        self.until_step(pid, step)
        os.kill(pid, signal.SIGKILL)
        self.end(pid)

    # What is left

    @property
    def said(self) -> str:
        return self.log.read_text()

    def sessions(self, only: int | None = None) -> list[Seen]:
        """What the witness saw, session by session; those that never trained are left out."""
        found: dict[int, Seen] = {}
        lines = self.witness.read_text().splitlines(keepends=True) if self.witness.exists() else []
        for line in lines:
            pid, step, *windows = line.split()
            if line.endswith("\n") and only in (None, int(pid)):
                found.setdefault(int(pid), Seen()).windows.setdefault(int(step), Counter()).update(windows)
        return list(found.values())

    def history(self) -> dict[int, Counter[str]]:
        """The windows of each step of the run as it stands: the last session that took a step has the word."""
        return {step: windows for seen in self.sessions() for step, windows in seen.windows.items()}

    def data_lost(self, whole: "Trial") -> int:
        """Windows that this run missed at a step, or saw though the uninterrupted run did not."""
        here, there = self.history(), whole.history()
        steps = {*here, *there}
        empty: Counter[str] = Counter()
        pairs = [(here.get(step, empty), there.get(step, empty)) for step in steps]
        return sum((one - other).total() + (other - one).total() for one, other in pairs)

    def steps_repeated(self) -> int:
        """Steps that were over, and that the next session took again."""
        sessions = self.sessions()
        return sum(max(0, one.done - other.start) for one, other in pairwise(sessions))

    def steps_lost(self, spared: int | None = None) -> int:
        """Steps between the checkpoint that the interval had put on disk and the one from which a session went on.

        `spared` is the newest checkpoint that a fault left whole, where it damaged some. Of checkpoints written in the
        background, the one before the newest is on disk for certain.
        """
        every = next(int(word.split("=")[1]) for word in self.words if word.startswith("checkpoint.every_steps="))
        behind = every if "checkpoint.background=true" in self.options else 0
        lost = 0
        sessions = self.sessions()
        for before, after in pairwise(sessions):
            due = max(before.done // every * every - behind, before.start)
            lost += max(0, (due if spared is None else min(due, spared)) - after.start)
        return lost

    @property
    def words(self) -> tuple[str, ...]:
        """The options, the last of two for one key first."""
        return (*OPTIONS, *self.options)[::-1]

    def unsound(self) -> list[str]:
        """What is wrong with the checkpoints on disk: nothing, whenever it was that a session was killed."""
        folder = RunFolder(self.folder)
        manifest = Manifest(folder.checkpoints)
        files = sorted(folder.checkpoints.glob("*.ckpt"))
        if files and manifest.fault:
            return [manifest.fault]
        return [fault for path in files if (fault := fault_of(path, manifest))]


def waiting(timeout_s: float) -> Iterator[None]:
    """Turns of a few milliseconds, until `timeout_s` is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(0.003)


def is_running(pid: int) -> bool:
    """Whether a process of ours is neither over nor waiting to be asked how it ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def watch_for(pid: int, due: Callable[[], bool], timeout_s: float) -> bool:
    """Look as often as the processor can; whether `due` came while the process ran."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for _ in range(200):
            if due():
                return True
        if not is_running(pid):
            return False
    return False
