"""One job of a sweep, wherever it runs: a process of its own, watched to its end, and a line on it in sweep.jsonl.

What runs a job may be the sweep itself, a thread of it, or a process on another machine that sees the same folder. So
all that passes between them are files there: `.stop` holds the signals that the sweep has had, `sweep.jsonl` what the
jobs came to.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from gptlab import signals

INTERRUPTED = (130, 143)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
POLL_S, LOCK_POLL_S, GRACE_S = 0.1, 1.0, 5.0


@dataclass(frozen=True)
class Job:
    number: int
    door: str
    overrides: list[str]
    varied: list[str]  # those of the overrides that tell it from the sweep's other jobs
    run_dir: str
    sweep_dir: str
    cwd: str
    resume: bool = False  # go on with what its run folder holds
    threads: int | None = None  # of the libraries that compute; None: their own choice
    labelled: bool = False  # others write to the same console meanwhile

    @property
    def command(self) -> list[str]:
        alone = "hydra.mode=RUN"  # an experiment may be a sweep by itself
        command = [sys.executable, "-m", f"gptlab.{self.door}", *self.overrides, alone]
        command.append(f"run_dir={quoted(self.run_dir)}")
        return [*command, "resume=auto"] if self.resume else command

    @property
    def label(self) -> str:
        return f"[{self.number}] " if self.labelled else ""


class Runner:
    """Runs a job to its end and keeps what it came to; nothing of it runs where the sweep has been told to end."""

    process: subprocess.Popen | None = None

    def __call__(self, job: Job) -> dict[str, Any] | None:
        if stop_signals(job) or not folder_is_free(job):
            return None
        print(f"job {job.number}: {' '.join(job.varied)}", flush=True)
        start, said = time.monotonic(), []
        exit_code = self.exit_code_of(job, said)
        record = {"job": job.number, "overrides": job.overrides, "varied": job.varied, "run_dir": job.run_dir}
        record |= {"exit_code": exit_code, "seconds": round(time.monotonic() - start, 1)}
        record["error"] = error_in(said) if exit_code else None
        append(Path(job.sweep_dir), record)
        return record

    def exit_code_of(self, job: Job, said: list[str]) -> int:
        # In a group of its own the job gets each signal once, from here, also when a terminal sends Ctrl-C to this
        # group; and what it leaves behind can be found.
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE if job.labelled else None}
        text = {"text": True, "errors": "replace", "bufsize": 1}
        process = subprocess.Popen(job.command, cwd=job.cwd, env=environment(job), process_group=0, **pipes, **text)
        self.process = process
        listeners = [threading.Thread(target=repeat, args=(process.stderr, sys.stderr, job.label, said), daemon=True)]
        if job.labelled:
            listeners.append(
                threading.Thread(target=repeat, args=(process.stdout, sys.stdout, job.label, []), daemon=True)
            )
        for listener in listeners:
            listener.start()
        passed_on = 0
        while (exit_code := process.poll()) is None:
            for signum in stop_signals(job)[passed_on:]:
                process.send_signal(signum)  # to it alone: what it has started is its own to end, loaders last
                passed_on += 1
            time.sleep(POLL_S)
        end_group(process.pid)
        for listener in listeners:
            listener.join(timeout=GRACE_S)
        if -exit_code in signals.SIGNALS:  # a signal that came before the job was able to end in its own way
            exit_code = signals.exit_code(-exit_code)
        return exit_code

    def end(self, signum: int) -> None:
        """Let the job that runs save and end, and wait for that."""
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait()


def processors() -> int:
    """Those that this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(job: Job) -> dict[str, str]:
    env = os.environ | {signals.PARENT: str(os.getpid())}
    if job.threads is not None:
        env |= dict.fromkeys(THREADS, str(min(job.threads, processors())))
    return env


def quoted(value: str) -> str:
    """`value` as Hydra's override grammar reads it back, whatever it holds."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def folder_is_free(job: Job) -> bool:
    """Wait until nobody trains in the job's folder, as a job may whose sweep was killed; False if told to end."""
    lock = Path(job.run_dir) / ".lock"
    told = False
    while lock.exists() and not stop_signals(job):
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            return True
        if not told:
            print(f"job {job.number}: waiting for the process that still trains in {job.run_dir}", flush=True)
        told = True
        time.sleep(LOCK_POLL_S)
    return not stop_signals(job)


def stop_signals(job: Job) -> list[int]:
    """The signals that the sweep has had, in their order."""
    try:
        return [int(word) for word in (Path(job.sweep_dir) / ".stop").read_text().split()]
    except FileNotFoundError:
        return []


def stop(folder: Path, signum: int) -> None:
    """Tell every job of the sweep in `folder`; a handler of signals may call this."""
    with open(folder / ".stop", "a") as file:
        file.write(f"{int(signum)}\n")


def end_group(group: int) -> None:
    """End what a job has left behind in its process group: politely, and then not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for signum in (0, signal.SIGTERM, signal.SIGKILL):  # 0 only asks whether there is anybody
            os.killpg(group, signum)
            end = time.monotonic() + GRACE_S
            while time.monotonic() < end:
                time.sleep(POLL_S)
                os.killpg(group, 0)


def repeat(stream: IO[str], to: IO[str], label: str, said: list[str]) -> None:
    """Pass on what a job writes, and keep the end of it."""
    for line in stream:
        with contextlib.suppress(OSError):  # whoever listened to this process may have gone
            to.write(label + line)
            to.flush()
        said.append(line)
        del said[:-50]


def error_in(said: list[str]) -> str | None:
    """The message that a job ended with, if it ended with one."""
    start = max((number for number, line in enumerate(said) if line.startswith("error: ")), default=None)
    return None if start is None else "".join(said[start:]).removeprefix("error: ").strip()


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a line to sweep.jsonl, as several processes may at a time."""
    with FileLock(folder / ".sweep.lock"), open(folder / "sweep.jsonl", "ab+") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        cut_off = file.read(1) not in (b"", b"\n")  # whoever wrote last was killed
        file.write(b"\n" * cut_off + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def records(folder: Path) -> dict[int, dict[str, Any]]:
    """What each job came to when it ran last, by its number."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "sweep.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off
                record = json.loads(line)
                found[record["job"]] = record
    return dict(sorted(found.items()))
