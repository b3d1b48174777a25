"""Where ranks meet before they can speak with each other: one keeps a store of words, the others look for it."""

import os
import socket
import sys
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

PAUSE_S, PATIENCE_S = 0.05, 20  # between two looks; until a word is said, and again each time it has doubled
REMEDY = "start all of them, each machine with its own NODE_RANK, and with MASTER_ADDR and MASTER_PORT of the first"


def meet(address: str, port: int, rank: int, world: int, timeout: timedelta) -> Store:
    """The store at `address`, when all `world` ranks have come to it.

    It is looked for in short steps, so that a signal is heard between them. torchrun's store outlives a restart, with
    the addresses of ranks that are gone: what this start writes there is kept apart.

    Raises TimeoutError, with who is missing; and ValueError where two processes take themselves for one rank.
    """
    clock = _Clock(timeout.total_seconds())
    is_keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{address}:{port}"
    while not is_keeper and not _answers(address, port):
        clock.wait(f"rank {rank} of {world} finds nobody at {where}")
    store = TCPStore(address, port, world, is_keeper, timeout, wait_for_workers=False)
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if store.add(f"rank {rank}", 1) > 1:
        raise ValueError(f"two processes take themselves for rank {rank} of {world}, at {where}: {REMEDY}")
    store.add("ranks", 1)
    while (come := store.add("ranks", 0)) < world:
        clock.wait(f"{come} of {world} ranks have come to {where}")
    return store


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


class _Clock:
    """Waits, says what for when it takes long, and gives up after `timeout_s`."""

    def __init__(self, timeout_s: float):
        self.start, self.timeout_s, self.patience_s = time.monotonic(), timeout_s, PATIENCE_S

    def wait(self, state: str) -> None:
        waited = time.monotonic() - self.start
        if waited > self.timeout_s:
            raise TimeoutError(f"{state}, after {waited:.0f} s: {REMEDY}")
        if waited > self.patience_s:
            line = f"waiting: {state}, after {waited:.0f} s of at most {self.timeout_s:.0f}"
            print(line, file=sys.stderr, flush=True)
            self.patience_s *= 2
        time.sleep(PAUSE_S)
