"""Which of several processes this is: known from its environment, before any of them has met another."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptlab.signals import PARENT

GRACE_S = 5  # for a process to notice by itself that another is gone: its own message is the better one
RUN = "GPTLAB_RUN"  # what the first process of a machine tells those that Lightning starts from it


def is_first() -> bool:
    """Whether this process is the one that writes: logs, samples, the run's record."""
    if os.environ.get("RANK"):  # torchrun's own word, which SLURM's may contradict
        return int(os.environ["RANK"]) == 0
    return not any(int(os.environ.get(name) or 0) for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def name() -> str:
    """How messages call this process."""
    for variable in ("RANK", "SLURM_PROCID"):
        if os.environ.get(variable):
            return f"rank {os.environ[variable]}"
    node, local = (os.environ.get(variable) or "0" for variable in ("NODE_RANK", "LOCAL_RANK"))
    return f"local rank {local}" + (f" of node {node}" if node != "0" else "")


def started_outside() -> bool:
    """Whether torchrun or SLURM has started all processes, rather than Lightning from the first one."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS") or 1) > 1


def processes_outside() -> int:
    """How many processes torchrun or SLURM has started."""
    return int(os.environ.get("WORLD_SIZE") if devices_given() else os.environ.get("SLURM_NTASKS") or 1)


def devices_given() -> tuple[int, int] | None:
    """(processes a machine, machines) as torchrun has started them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return here, all_of_them // here


def tell_followers(run: dict[str, Any]) -> None:
    """Let the processes that Lightning starts from this one know the run that it has chosen."""
    os.environ[RUN] = json.dumps(run)


def run_dir() -> str:
    """The folder of the run that this process takes part in, as far as it is known."""
    return json.loads(os.environ[RUN])["run_dir"] if RUN in os.environ else "<run folder>"


def run_name() -> str:
    """What all ranks call their run; machines may see its folder in different places."""
    return Path(run_dir()).name


def go_on() -> str:
    """How a run that has lost a rank continues."""
    return f"all ranks end; go on with resume={run_dir()}"


def leader_said() -> dict[str, Any] | None:
    """What the process that this one was started from has told; None in that process itself, and under torchrun."""
    if int(os.environ.get("LOCAL_RANK") or 0) and RUN in os.environ and not started_outside():
        return json.loads(os.environ[RUN])
    return None


def watch_followers(followers: Sequence[subprocess.Popen]) -> None:
    """End this process and the others when one that it has started is lost, rather than wait for it."""

    _followers[:] = followers

    def end() -> None:
        for process in followers:
            process.kill()

    _watch(lost_follower, end)


_followers: list[subprocess.Popen] = []


def lost_follower(only_killed: bool = False) -> str | None:
    """Which of the processes that this one has started has failed, and how; None where it has started none that did."""
    for local_rank, process in enumerate(_followers, start=1):
        if (code := process.poll()) and (code < 0 or not only_killed):
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with code {code}"
            return f"local rank {local_rank} {how}"
    return None


def wait_for_lost_follower(patience_s: float) -> str | None:
    """`lost_follower`, for one that closed its connections as it was killed, and is not seen to have ended yet.

    One that ends by itself meanwhile has lost the same rank as this one, and is not named for it.
    """
    lost, deadline = lost_follower(), time.monotonic() + patience_s
    while not lost and _followers and time.monotonic() < deadline:
        time.sleep(0.05)
        lost = lost_follower(only_killed=True)
    return lost


def watch_leader() -> None:
    """End this process when the one that has started it is gone."""
    leader = os.getppid()
    _watch(lambda: None if os.getppid() == leader else "the first process has ended")


@contextlib.contextmanager
def ending_with_this_process() -> Iterator[None]:
    """Processes that are started in here get SIGTERM when this one is gone, however it ends."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]


_ending = threading.Event()


def end_in_own_way() -> None:
    """This process ends already, and has still something to save: nobody is to end it for another's sake."""
    _ending.set()


def _watch(lost: Callable[[], str | None], end: Callable[[], None] = lambda: None) -> None:
    def watch() -> None:
        while not (reason := lost()):
            time.sleep(0.5)
        time.sleep(GRACE_S)
        end()
        if not _ending.is_set():
            who = "" if is_first() else f"{name()}: "
            print(f"{who}error: {reason}; {go_on()}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch").start()
