"""How a run ends: its status, its exit code, and result.json with every figure, null where it was not measured."""

import contextlib
import hashlib
import json
import logging
import platform
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gptlab import __version__, doors, ranks, start
from gptlab.assembly import Watchers
from gptlab.checkpoint import OWN_KEY
from gptlab.config import is_below
from gptlab.data.module import TextDataModule
from gptlab.resume import OF_THE_COMMAND
from gptlab.run import RunFolder, write_json
from gptlab.signals import Interrupted, later
from gptlab.tasks.lm import LMTask

log = logging.getLogger("gptlab")


class Outcome:
    """Surrounds everything that happens in a run folder, and leaves status.json and result.json however it ends."""

    def __init__(self, folder: RunFolder, cfg: dict[str, Any]):
        self.folder, self.cfg = folder, cfg
        self.exit_code = 0
        self.parent: dict[str, Any] | None = None
        self.watchers: Watchers | None = None
        self._ended: dict[str, Any] | None = None

    def watch(
        self, task: LMTask, data: TextDataModule, watchers: Watchers, parent: dict[str, str] | None = None
    ) -> None:
        """From here on there is something to report on. `parent` is the run that the weights came from."""
        self.task, self.data, self.watchers, self.parent = task, data, watchers, parent

    def nothing_to_do(self, state: dict[str, Any]) -> None:
        """The run had ended before, with this checkpoint; status and result stay as they are, if they are there."""
        self._ended = state

    def __enter__(self) -> "Outcome":
        self._before = self.folder.status()
        if ranks.is_first():
            self.folder.set_status("running", self._before.get("step", 0))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, Interrupted):
            start.finish(error.exit_code)
        with later():  # but for the record, which is written first
            return self._exit(error)

    def _exit(self, error: BaseException | None) -> bool:
        if error is None and self._ended is not None:
            if ranks.is_first():
                self._leave_ended(self._ended)
            return True
        status, message = "completed", None
        if isinstance(error, Interrupted | KeyboardInterrupt):
            status = "interrupted"
            self.exit_code = error.exit_code if isinstance(error, Interrupted) else doors.CTRL_C
            step = -1 if self.watchers is None else self.watchers.checkpoints.saved_step
            saved = f", saved at step {step:,}" if step >= 0 else ""
            log.info("interrupted%s; continue with: python -m gptlab.train resume=%s", saved, self.folder.path)
        elif error is not None:
            status, message = "failed", doors.message_of(error)
            log.debug("failed", exc_info=error)  # the traceback, for train.log alone
            self.exit_code = doors.report(error, not self.has_stepped, message)
        try:
            if ranks.is_first():
                self._leave(status, message)
        except OSError as disk:
            if error is None:  # otherwise it is said already
                self.exit_code = doors.report(disk, before_first_step=False)
        return True

    def _leave_ended(self, state: dict[str, Any]) -> None:
        """A kill between the last checkpoint and the end has left no result: it is made of that checkpoint."""
        assert self.watchers is not None
        step, watchers = state["global_step"], self.watchers
        self.folder.set_status("completed", step)
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = json.loads(self.folder.result.read_text())
            if (found.get("status"), found.get("steps")) == ("completed", step):
                return
        for callback in (watchers.record, watchers.monitor, watchers.checkpoints, watchers.alerts, watchers.budget):
            callback.load_state_dict(state["callbacks"][callback.state_key])
        watchers.record.step, self.task.skipped_steps = step, state[OWN_KEY]["skipped_steps"]
        watchers.record.ranks = (state[OWN_KEY]["hardware"] or {}).get("ranks", 1)
        write_json(self.folder.result, self.result("completed"))

    @property
    def has_stepped(self) -> bool:
        return self.watchers is not None and self.watchers.monitor.first_step_at is not None

    def _leave(self, status: str, message: str | None) -> None:
        if self._before.get("status") in ("completed", "interrupted", "failed") and not self.has_stepped:
            self.folder.set_status(self._before["status"], self._before["step"], self._before.get("error"))
            return  # what was on disk still holds
        step = self.watchers.record.step if self.watchers is not None else 0
        self.folder.set_status(status, step, message)
        if self.watchers is not None:
            write_json(self.folder.result, self.result(status))

    def result(self, status: str) -> dict[str, Any]:
        """The content of result.json."""
        assert self.watchers is not None
        watchers, folder = self.watchers, self.folder
        now, first_step = datetime.now().timestamp(), watchers.monitor.first_step_at
        return {
            "status": status,
            "seed": self.cfg["seed"],
            **watchers.record.result(self.task),
            "best_val_loss": watchers.checkpoints.best_loss,
            "best_step": watchers.checkpoints.best_step,
            "seconds_to_first_step": None if first_step is None else round(first_step - start.PROCESS_START, 3),
            "seconds_to_compile": watchers.compile.seconds,
            "seconds_total": round(now - start.PROCESS_START, 3),
            "fingerprints": {
                "config": config_fingerprint(self.cfg),
                "data": self.data.fingerprint,
                "tokenizer": self.data.tokenizer.fingerprint,
                "code": code_fingerprint(),
            },
            "versions": {
                "gptlab": __version__,
                "torch": torch.__version__,
                "lightning": version("lightning"),
                "python": platform.python_version(),
            },
            "alerts": watchers.alerts.alerts,
            "checkpoints": {"best": relative(folder.best, folder.path), "last": relative(folder.last, folder.path)},
            "parent": self.parent,
        }


def config_fingerprint(cfg: dict[str, Any]) -> str:
    """Equal for equal configs, wherever their runs stand."""
    content = {key: value for key, value in cfg.items() if not is_below(key, OF_THE_COMMAND)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def code_fingerprint() -> str:
    """The hash of the source that ran: the package's own, and that of experiments."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    for name, module in sorted(sys.modules.items()):  # what a config named, and what that imported
        if name.startswith("experiments.") and getattr(module, "__file__", None):
            digest.update(name.encode() + b"\0" + Path(module.__file__).read_bytes())
    return digest.hexdigest()


def relative(path: Path, folder: Path) -> str | None:
    return str(path.relative_to(folder)) if path.exists() else None
