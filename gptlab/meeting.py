"""Where ranks meet before they can speak with each other: the first keeps a store of words, the others look for it."""

import os
import socket
import sys
import time
from datetime import timedelta

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore

from gptlab import ranks

PAUSE_S, PATIENCE_S = 0.05, 20  # between two looks; until a word is said, and again each time it has doubled
PLACE = "gptlab"  # under which torchrun's store tells where the first rank of this start keeps its own
REMEDY = "start all of them, each machine with its own NODE_RANK, and with MASTER_ADDR and MASTER_PORT of the first"


class MissingRankError(RuntimeError):
    """Another rank did not come."""


def meet(address: str, port: int, rank: int, world: int, timeout: timedelta) -> Store:
    """The store that the first rank keeps at `address`, when all `world` ranks have come to it.

    It is looked for in short steps, so that a signal is heard between them. torchrun has a store of its own, which
    outlives a restart, with the addresses of ranks that are gone: there the first rank only tells where to look.

    Raises MissingRankError, with who is missing; and ValueError where a port is taken, or a rank.
    """
    clock = _Clock(timeout.total_seconds())
    board = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        board, posted = TCPStore(address, port, is_master=False, timeout=timeout), (address, port)
        address, port = (_own_address(*posted), 0) if rank == 0 else ("", 0)
    if rank == 0:
        store = _kept(port, timeout)
        port = store.port
        if board is not None:
            board.set(PLACE, f"{address} {store.port}")
    else:
        while not _answers(address, port):
            clock.wait(f"rank {rank} of {world} finds nobody at {address or 'any address'}:{port}")
            if board is not None and board.check([PLACE]):
                address, number = board.get(PLACE).decode().split()
                port = int(number)
        store = TCPStore(address, port, is_master=False, timeout=timeout)
    store = PrefixStore(ranks.run_name(), store)  # another run may look for its own at the same port
    if store.add(f"rank {rank}", 1) > 1:
        raise ValueError(f"two processes take themselves for rank {rank} of {world}, at {address}:{port}: {REMEDY}")
    store.add("ranks", 1)
    while (come := store.add("ranks", 0)) < world:
        clock.wait(f"{come} of {world} ranks have come to {address}:{port}")
    return store


def _kept(port: int, timeout: timedelta) -> TCPStore:
    """A store at `port` of all addresses of this machine; at any port that is free, for 0."""
    try:
        return TCPStore("127.0.0.1", port, is_master=True, timeout=timeout, wait_for_workers=False)
    except DistNetworkError as error:
        if "in use" not in str(error):
            raise
        raise ValueError(f"MASTER_PORT={port} is in use on this machine; choose another") from error


def _own_address(address: str, port: int) -> str:
    """How other machines reach this one: where it is that of `address`, by this word, otherwise by the way to there."""
    with socket.create_connection((address, port)) as way:
        here, there = way.getsockname()[0], way.getpeername()[0]
    return address if here == there else here


def _answers(address: str, port: int) -> bool:
    if not port:
        return False
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
            raise MissingRankError(f"{state}, after {waited:.0f} s: {REMEDY}")
        if waited > self.patience_s:
            line = f"waiting: {state}, after {waited:.0f} s of at most {self.timeout_s:.0f}"
            print(line, file=sys.stderr, flush=True)
            self.patience_s *= 2
        time.sleep(PAUSE_S)
