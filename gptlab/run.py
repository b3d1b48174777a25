"""The run folder: its paths, its one owner, and the small JSON files that tell how the run stands."""

import contextlib
import csv
import io
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptlab.files import sweep_leftovers, sync, write_atomically

log = logging.getLogger("gptlab")


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def process_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and belongs to somebody else
    return True


# All that a run leaves which failed before it began.
NOT_BEGUN = {".lock", "checkpoints", "config.yaml", "result.json", "status.json", "train.log"}
LEFTOVER = re.compile(r"\..*\.tmp\.\d+$")  # of a killed writer
WORKERS_END_S = 15  # loader processes of a killed run may hold its lock until they notice, within 5 s
TAIL_STEPS = 20  # logged steps that a checkpoint keeps of the files beside it,
TAIL_BYTES = 2**16  # from as much of their ends


class RunFolder:
    """A folder that belongs to one process at a time, from `acquire` to `release`."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.metrics = self.path / "metrics.csv"
        self.samples = self.path / "samples.jsonl"
        self.log = self.path / "train.log"
        self.status_file = self.path / "status.json"
        self.result = self.path / "result.json"
        self.floor = self.path / "floor.json"
        self._lock = FileLock(self.path / ".lock")

    @classmethod
    def new(cls, name: str, root: Path = Path("runs")) -> "RunFolder":
        """Make a folder for a new run, `<root>/<date>/<time>-<name>`, that no other run has, nor takes just now."""
        stem, count = time.strftime("%Y-%m-%d/%H-%M-%S") + f"-{name}", 1
        while True:
            path = root / (stem if count == 1 else f"{stem}-{count}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                count += 1
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}; choose a run_dir that can be written") from error
            else:
                return cls(path)

    @property
    def held(self) -> list[str]:
        return sorted(file.name for file in self.path.iterdir()) if self.path.is_dir() else []

    @property
    def has_begun(self) -> bool:
        """Whether there is more here than a run leaves that failed before its first step."""
        held = [name for name in self.held if not LEFTOVER.match(name)]
        return not NOT_BEGUN.issuperset(held) or any(self.checkpoints.glob("*.ckpt"))

    def acquire(self, resume: bool) -> None:
        """Become the folder's owner. Raises ValueError if it has one, or holds files that a new run would mix with."""
        if not resume and self.has_begun:
            held = [name for name in self.held if name != ".lock"]
            raise ValueError(
                f"run_dir={self.path} is not empty (it holds {', '.join(held[:3])}); "
                f"choose another, or continue that run with resume={self.path}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_it()
        except Timeout:
            status = self.status()
            raise ValueError(
                f"{self.path} is in use by process {status.get('pid', 'unknown')} on {status.get('host', 'unknown')}; "
                "wait for it, or choose another run_dir"
            ) from None
        except OSError as error:
            raise ValueError(f"run_dir={self.path}: {error.strerror}; choose a folder that can be written") from error
        self.checkpoints.mkdir(exist_ok=True)
        for folder in (self.path, self.checkpoints):
            sweep_leftovers(folder)

    def _lock_it(self) -> None:
        """Raises Timeout where a process that lives has the lock."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if self.status().get("status") == "running":
                raise
            self._lock.acquire(timeout=WORKERS_END_S)

    def release(self) -> None:
        self._lock.release()

    def discard(self) -> None:
        """Remove the folder of a run that never began, and the folders around it that hold nothing else."""
        shutil.rmtree(self.path)
        with contextlib.suppress(OSError):  # other runs are there
            for folder in self.path.parents[:2]:
                folder.rmdir()

    def set_status(self, status: str, step: int, error: str | None = None) -> None:
        content = {"status": status, "step": step, "pid": os.getpid(), "host": socket.gethostname()}
        write_json(self.status_file, content | ({"error": error} if error else {}))

    def status(self) -> dict[str, Any]:
        """status.json, where a run whose process is gone counts as interrupted; {} if there is none."""
        try:
            status = json.loads(self.status_file.read_text())
            if not {"status", "step", "pid"} <= status.keys():
                raise ValueError("keys are missing")
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:  # no JSON, or JSON of something else
            log.warning("%s: damaged (%s); the run counts as interrupted", self.status_file, error)
            return {"status": "interrupted", "step": 0}
        here = status.get("host") in (None, socket.gethostname())
        if status["status"] == "running" and here and not process_is_alive(status["pid"]):
            status["status"] = "interrupted"
        return status

    @property
    def _records(self) -> tuple[tuple[Path, Callable[[str], int]], ...]:
        """The files that grow with the run, and how to tell the step of a line. Their header, if any, has step -1."""
        return (self.metrics, step_of_row), (self.samples, lambda line: int(json.loads(line)["step"]))

    def validated_steps(self) -> set[int]:
        """The steps of which metrics.csv has a val/loss."""
        try:
            with open(self.metrics, newline="") as file:
                return {int(row["step"]) for row in csv.DictReader(file) if row.get("val/loss")}
        except (OSError, ValueError, KeyError, csv.Error):  # none, or damaged
            return set()

    def tails(self) -> dict[str, list[str]]:
        """The last lines of metrics.csv and samples.jsonl, for a checkpoint: by them a resumed run mends the files."""
        tails = {}
        for path, step_of in self._records:
            if path.exists():
                sync(path)  # a power cut must not leave the checkpoint alone
                lines, _ = readable(last_bytes(path), step_of)
                steps = sorted({step for step, _ in lines if step >= 0})
                if path.stat().st_size > TAIL_BYTES:
                    steps = steps[2:]  # that of the first line, and one whose first lines may be missing
                steps = steps[-TAIL_STEPS:]
                tails[path.name] = [line for step, line in lines if step < 0 or step in steps]
        return tails

    def truncate_after(self, step: int, tails: dict[str, list[str]]) -> None:
        """Drop what a resumed run, at `step`, will write again, and mend what was lost of the last lines before."""
        for path, step_of in self._records:
            tail = [(step_of(line), line) for line in tails.get(path.name, [])]
            if not path.exists() and not tail:
                continue
            lines, damaged = readable(path.read_bytes(), step_of) if path.exists() else ([], [])
            if damaged:
                log.warning("%s: line %s damaged; mended as far as the checkpoint knows it", path, ", ".join(damaged))
            header = [line for at, line in (*lines, *tail) if at < 0][:1]
            own, known = by_step(lines), by_step(tail)
            kept = []
            for at in sorted({at for at in (*own, *known) if 0 <= at <= step}):
                whole = at not in known or len(own.get(at, [])) == len(known[at])
                kept += own[at] if whole else known[at]
            if path == self.metrics and not header:  # rows without their names
                path.unlink(missing_ok=True)
            else:
                write_text(path, "".join([*header, *kept]))


def step_of_row(row: str) -> int:
    return -1 if row.startswith("step,") else int(row.split(",", 1)[0])


def by_step(lines: list[tuple[int, str]]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for step, line in lines:
        found.setdefault(step, []).append(line)
    return found


def last_bytes(path: Path) -> bytes:
    """The first line of a file and its last lines, however long it has grown: saving must not take longer for that."""
    with open(path, "rb") as file:
        first, size = file.readline(), path.stat().st_size
        if size <= TAIL_BYTES:
            return first + file.read()
        file.seek(size - TAIL_BYTES)
        file.readline()  # the end of a line
        return first + file.read()


def readable(content: bytes, step_of: Callable[[str], int]) -> tuple[list[tuple[int, str]], list[str]]:
    """The lines of a file with their steps, and the numbers of lines that are damaged or unfinished.

    Only LF ends a line: text may hold U+2028.
    """
    lines, damaged = [], []
    for number, raw in enumerate(io.BytesIO(content), start=1):
        try:
            line = raw.decode()
            if not line.endswith("\n") or "\0" in line:
                raise ValueError
            lines.append((step_of(line), line))
        except (ValueError, KeyError, TypeError):
            damaged.append(str(number))
    return lines, damaged


def unfinished_runs(root: Path) -> list[RunFolder]:
    """Run folders below `root` that stopped before their end, newest first."""
    folders = [RunFolder(path.parent) for path in root.glob("**/status.json")]
    folders = [folder for folder in folders if folder.status().get("status") in ("interrupted", "failed")]
    return sorted(folders, key=lambda folder: folder.status_file.stat().st_mtime, reverse=True)
