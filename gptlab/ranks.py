"""Which of several processes this is: known from its environment, before any of them has met another."""

import json
import os
from typing import Any

RUN = "GPTLAB_RUN"  # what the first process of a machine tells those that Lightning starts from it


def is_first() -> bool:
    """Whether this process is the one that writes: logs, samples, the run's record."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def name() -> str:
    """How messages call this process."""
    for variable, word in (("RANK", "rank"), ("SLURM_PROCID", "rank"), ("LOCAL_RANK", "local rank")):
        if os.environ.get(variable):
            return f"{word} {os.environ[variable]}"
    return f"node {os.environ.get('NODE_RANK', 0)}"


def started_outside() -> bool:
    """Whether torchrun or SLURM has started all processes, rather than Lightning from the first one."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS") or 1) > 1


def devices_given() -> tuple[int, int] | None:
    """(processes a machine, machines) as torchrun has started them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return here, all_of_them // here


def tell_followers(run: dict[str, Any]) -> None:
    """Let the processes that Lightning starts from this one know the run that it has chosen."""
    os.environ[RUN] = json.dumps(run)


def leader_said() -> dict[str, Any] | None:
    """What the process that this one was started from has told; None in that process itself, and under torchrun."""
    if int(os.environ.get("LOCAL_RANK") or 0) and RUN in os.environ and not started_outside():
        return json.loads(os.environ[RUN])
    return None
