"""The folder of a sweep: which jobs it has, what they came to, and who runs it now."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from gptlab import jobs, signals
from gptlab.given import strip_key
from gptlab.jobs import INTERRUPTED, Job

OF_THE_SWEEP = ("run_dir", "resume")  # what the sweep itself answers to, not its jobs
current: "Sweep | None" = None  # the one that this process runs


class Sweep:
    """A folder that belongs to one process at a time, from `open` to `close`."""

    def __init__(self, folder: Path, door: str, resume: bool, swept: set[str]):
        self.folder, self.door, self.resume, self.swept = folder, door, resume, swept
        self.received: list[int] = []  # signals
        self.jobs: list[Job] = []
        self._lock = FileLock(folder / ".lock")

    @classmethod
    def open(cls, config: DictConfig, loader: Any) -> "Sweep":
        """Take over the folder that the command line names. Raises ValueError where it can't be begun or continued."""
        global current
        swept = swept_keys(sys.argv[1:]) | set(config.hydra.sweeper.get("params") or {})
        folder, resume = Path(config.hydra.sweep.dir).absolute(), config.resume
        if several := swept.intersection(OF_THE_SWEEP):
            raise ValueError(f"{several.pop()}: a sweep takes one value of it")
        if resume not in (None, "auto"):
            raise ValueError(f"resume={resume}: a sweep is continued by resume=auto with run_dir=<its folder>")
        if resume == "auto" and config.run_dir is None:
            raise ValueError("resume=auto: name the sweep to continue with run_dir=<its folder>")
        held = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
        is_sweep = "multirun.yaml" in held
        held = [name for name in held if name != "multirun.yaml"]  # which is there before any job is
        if held and resume is None:
            raise ValueError(
                f"run_dir={folder} is not empty (it holds {', '.join(held[:3])}); choose another, "
                "or continue the sweep in it with resume=auto"
            )
        if held and not is_sweep:
            raise ValueError(f"run_dir={folder} holds no sweep (no multirun.yaml); choose another folder")
        if held:
            require_same_sweep(folder, config, loader)
        current = cls(folder, config.hydra.job.config_name, resume == "auto", swept)
        current._acquire()
        return current

    def _acquire(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run_dir={self.folder} is in use by another process; wait for it, or choose another"
            ) from None
        except OSError as error:
            raise ValueError(f"run_dir={self.folder}: {error.strerror}; choose a folder that can be written") from error
        (self.folder / ".stop").unlink(missing_ok=True)

    def close(self) -> None:
        (self.folder / ".stop").unlink(missing_ok=True)
        self._lock.release()

    def job(self, number: int, overrides: Sequence[str], threads: int | None = None, labelled: bool = False) -> Job:
        keys = {o: strip_key(o) for o in overrides}
        overrides = [
            o for o in overrides if keys[o] not in OF_THE_SWEEP and not keys[o].startswith(("hydra.", "hydra/"))
        ]
        varied = [override for override in overrides if strip_key(override) in self.swept]
        job = Job(
            number=number,
            door=self.door,
            overrides=overrides,
            varied=varied,
            run_dir=str(self.folder / job_name(number, varied)),
            sweep_dir=str(self.folder),
            cwd=str(Path.cwd()),
            resume=self.resume,
            threads=threads,
            labelled=labelled,
        )
        self.jobs.append(job)
        return job

    def is_done(self, job: Job) -> bool:
        """Whether the job has run to its end before, with these same overrides."""
        record = jobs.records(self.folder).get(job.number)
        if record is None or record["exit_code"] != 0 or record["overrides"] != job.overrides:
            return False
        return self.door != "train" or read_result(Path(job.run_dir)).get("status") == "completed"

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Signals are for the jobs meanwhile: each that runs is sent them, and no other starts."""

        def heed(signum: int, _: Any) -> None:
            self.received.append(signum)
            jobs.stop(self.folder, signum)

        handlers = {number: signal.signal(number, heed) for number in signals.SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """0 if all jobs ended well, otherwise the code that tells."""
        codes = [record["exit_code"] for record in self.records()]
        if self.received:
            return signals.exit_code(self.received[0])
        return next((code for code in codes if code in INTERRUPTED), 1 if any(codes) else 0)

    def records(self) -> list[dict[str, Any]]:
        """What the jobs of this command have come to, now or before."""
        found = jobs.records(self.folder)
        return [found[job.number] for job in self.jobs if job.number in found]


def swept_keys(arguments: list[str]) -> set[str]:
    """The keys that the command line gives several values, as Hydra reads it."""
    parser = OverridesParser.create()
    keys = set()
    for argument in arguments:
        with contextlib.suppress(HydraException):  # an option, such as -m
            (override,) = parser.parse_overrides([argument])
            if override.is_sweep_override():
                keys.add(strip_key(argument))
    return keys


def require_same_sweep(folder: Path, config: DictConfig, loader: Any) -> None:
    """Raise ValueError unless the sweep in `folder` is this one, or one with more or fewer values at its end."""
    if config.hydra.runtime.choices["hydra/sweeper"] != "basic":  # it has its own way to know
        return
    try:
        then = OmegaConf.load(folder / "multirun.yaml")
        is_basic = then.hydra.runtime.choices["hydra/sweeper"] == "basic"
    except (OSError, yaml.YAMLError, OmegaConfBaseException, AttributeError):  # a sweep was killed while it wrote this
        return
    (one, typed), (other, typed_now) = values_of(then, loader) if is_basic else ([], []), values_of(config, loader)
    common = min(len(one), len(other))
    if not common or one[:common] != other[:common]:
        raise ValueError(
            f"run_dir={folder} holds another sweep, of {' '.join(typed) or 'hydra/sweeper=optuna'}, and this one is of "
            f"{' '.join(typed_now)}: choose another folder"
        )


def values_of(config: DictConfig, loader: Any) -> tuple[list[list[str]], list[str]]:
    """What tells the jobs of a sweep apart, one job after another, as Hydra makes them; and how that was typed."""
    params = config.hydra.sweeper.get("params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    last = {override.get_key_element(): override for override in OverridesParser.create(loader).parse_overrides(given)}
    swept = [override for override in last.values() if override.is_sweep_override()]
    return BasicSweeper.split_arguments(swept, None)[0], [str(override.input_line) for override in swept]


def job_name(number: int, varied: list[str]) -> str:
    """A folder name that tells the jobs apart: 3_attention-MyAttention_seed-2 of model.attention=mine.MyAttention."""
    words = [str(number)]
    for override in varied:
        key, _, value = override.partition("=")
        if re.fullmatch(r"[A-Za-z_][\w.]*", value):
            value = value.rpartition(".")[2]
        words.append(re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-"))
    return "_".join(words)[:80]


def summarise(show: Callable[[Table], None]) -> int:
    """Print a table of the sweep's jobs, if there was one; the exit code."""
    global current
    if current is None:
        return 0
    folder, records, code = current.folder, current.records(), current.exit_code
    missing = len(current.jobs) - len(records)
    current.close()
    current = None
    table = Table(title="sweep", title_justify="left")
    for column in ("job", "overrides", "status", "steps", "val/loss", "total s", "run"):
        table.add_column(column, overflow="fold")
    for record in records:
        table.add_row(*row_of(record, folder))
    if records:
        show(table)
    if missing:
        print(f"{missing} {'job' if missing == 1 else 'jobs'} not begun", flush=True)
    for record in records:
        if record["error"]:
            print(f"job {record['job']}: {record['error'].splitlines()[0]}", flush=True)
    with contextlib.suppress(FileNotFoundError):
        best = yaml.safe_load((folder / "best.yaml").read_text())
        print(f"best: job {best['job']}, {best['metric']} {best['value']:.4f}: {' '.join(best['varied'])}", flush=True)
    if code in INTERRUPTED:
        print(f"go on with the same command and run_dir={folder} resume=auto", flush=True)
    return code


def row_of(record: dict[str, Any], folder: Path) -> tuple[str, ...]:
    run_dir = folder / Path(record["run_dir"]).name  # the sweep may have been moved
    result = read_result(run_dir)
    words = {2: "bad input"} | dict.fromkeys(INTERRUPTED, "interrupted")
    status = result.get("status") or words.get(record["exit_code"], f"exit code {record['exit_code']}")
    loss = result.get("val_loss")
    return (
        str(record["job"]),
        " ".join(record["varied"]),
        status,
        str(result.get("steps", "")),
        "" if loss is None else f"{loss:.4f}",
        str(record["seconds"]),
        str(run_dir) if run_dir.exists() else "none",
    )


def read_result(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return {}
