"""The run folder: its paths, its one owner, and the small JSON files that tell how the run stands."""

import contextlib
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptlab.files import sweep_leftovers, write_atomically


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
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
        return not NOT_BEGUN.issuperset(self.held) or any(self.checkpoints.glob("*"))

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
            self._lock.acquire(timeout=0)
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
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        here = status.get("host") in (None, socket.gethostname())
        if status["status"] == "running" and here and not process_is_alive(status["pid"]):
            status["status"] = "interrupted"
        return status

    def truncate_after(self, step: int) -> None:
        """Drop the rows of metrics.csv and samples.jsonl that a resumed run, at `step`, will write again."""
        if self.metrics.exists():
            header, *rows = whole_lines(self.metrics) or [""]
            kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
            write_atomically(self.metrics, lambda file: file.write("".join([header, *kept]).encode()))
        if self.samples.exists():
            kept = [line for line in whole_lines(self.samples) if json.loads(line)["step"] <= step]
            write_atomically(self.samples, lambda file: file.write("".join(kept).encode()))


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, without a last one that was not finished. Only LF ends a line: text may hold U+2028."""
    with open(path, newline="\n") as file:
        return [line for line in file if line.endswith("\n")]


def unfinished_runs(root: Path) -> list[RunFolder]:
    """Run folders below `root` that stopped before their end, newest first."""
    folders = [RunFolder(path.parent) for path in root.glob("**/status.json")]
    folders = [folder for folder in folders if folder.status().get("status") in ("interrupted", "failed")]
    return sorted(folders, key=lambda folder: folder.status_file.stat().st_mtime, reverse=True)
