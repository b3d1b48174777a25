"""Sweeps: each job is a process of its own with a run folder of its own, and none hides or ends the others."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.table import Table

from gptlab import signals

INTERRUPTED = (130, 143)
_jobs: list[dict[str, Any]] = []


def run_job(door: str) -> None:
    """Run this job of a sweep as `python -m gptlab.<door>`; its exit code is kept for the summary, not raised."""
    if _jobs and _jobs[-1]["exit_code"] in INTERRUPTED:
        return  # whoever stopped that job wants the sweep to end
    hydra_config = HydraConfig.get()
    overrides = [o for o in hydra_config.overrides.task if not o.startswith(("run_dir=", "hydra."))]
    swept = swept_keys(sys.argv[1:]) | set(hydra_config.sweeper.get("params") or {})
    varied = [override for override in overrides if override.split("=")[0] in swept]  # what tells this job apart
    folder = Path(hydra_config.sweep.dir).absolute() / job_name(hydra_config.job.num, varied)
    print(f"job {hydra_config.job.num}: {' '.join(varied)}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", f"gptlab.{door}", *overrides, f"run_dir={quoted(str(folder))}"]
    # In a group of its own the job gets each signal once, from here, also when a terminal sends Ctrl-C to this group.
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda signum, _: received.append(signum)) for number in signals.SIGNALS}
    process = subprocess.Popen(command, process_group=0, stderr=subprocess.PIPE, text=True, errors="replace", bufsize=1)
    said: list[str] = []
    listener = threading.Thread(target=repeat, args=(process.stderr, said), daemon=True)
    listener.start()
    try:
        while (exit_code := process.poll()) is None:
            while received:
                process.send_signal(received.pop(0))
            time.sleep(0.05)
        if -exit_code in signals.SIGNALS:  # a signal that came before the job was able to end in its own way
            exit_code = signals.exit_code(-exit_code)
        listener.join(timeout=5)  # longer only where something that the job has started outlives it
        if received:  # after the job's end: it is the sweep that is meant
            exit_code = signals.exit_code(received[0])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    job = {"job": hydra_config.job.num, "overrides": overrides, "varied": varied, "run_dir": str(folder)}
    job |= {
        "exit_code": exit_code,
        "seconds": round(time.monotonic() - start, 1),
        "error": error_in(said) if exit_code else None,
    }
    _jobs.append(job)
    with open(Path(hydra_config.sweep.dir) / "sweep.jsonl", "a") as file:
        file.write(json.dumps(job) + "\n")


def swept_keys(arguments: list[str]) -> set[str]:
    """The keys that the command line gives several values, as Hydra reads it."""
    parser = OverridesParser.create()
    keys = set()
    for argument in arguments:
        with contextlib.suppress(HydraException):  # an option, such as -m
            (override,) = parser.parse_overrides([argument])
            if override.is_sweep_override():
                keys.add(argument.split("=")[0])
    return keys


def repeat(stream: IO[str], said: list[str]) -> None:
    """Pass on what a job writes to its standard error, and keep the end of it."""
    for line in stream:
        with contextlib.suppress(OSError):  # whoever listened to this process may have gone
            sys.stderr.write(line)
            sys.stderr.flush()
        said.append(line)
        del said[:-50]


def error_in(said: list[str]) -> str | None:
    """The message that a job ended with, if it ended with one."""
    start = max((number for number, line in enumerate(said) if line.startswith("error: ")), default=None)
    return None if start is None else "".join(said[start:]).removeprefix("error: ").strip()


def job_name(number: int, varied: list[str]) -> str:
    """A folder name that tells the jobs apart: 3_attention-MyAttention_seed-2 of model.attention=mine.MyAttention."""
    words = [str(number)]
    for override in varied:
        key, _, value = override.partition("=")
        if re.fullmatch(r"[A-Za-z_][\w.]*", value):
            value = value.rpartition(".")[2]
        words.append(re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-"))
    return "_".join(words)[:80]


def quoted(value: str) -> str:
    """`value` as Hydra's override grammar reads it back, whatever it holds."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def summarise(show: Callable[[Table], None]) -> int:
    """Print a table of the sweep's jobs, if there was one; 0 if all ended well, otherwise the exit code that tells."""
    if not _jobs:
        return 0
    table = Table(title="sweep", title_justify="left")
    for column in ("job", "overrides", "status", "steps", "val/loss", "total s", "run"):
        table.add_column(column, overflow="fold")
    for job in _jobs:
        result = read_result(Path(job["run_dir"]))
        status = result.get("status") or ("bad input" if job["exit_code"] == 2 else f"exit code {job['exit_code']}")
        loss = result.get("val_loss")
        table.add_row(
            str(job["job"]),
            " ".join(job["varied"]),
            status,
            str(result.get("steps", "")),
            "" if loss is None else f"{loss:.4f}",
            str(job["seconds"]),
            job["run_dir"] if Path(job["run_dir"]).exists() else "none",
        )
    show(table)
    for job in _jobs:
        if job["error"]:
            print(f"job {job['job']}: {job['error'].splitlines()[0]}", flush=True)
    codes = [job["exit_code"] for job in _jobs]
    if codes[-1] in INTERRUPTED:
        return codes[-1]
    return 1 if any(codes) else 0


def read_result(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return {}
