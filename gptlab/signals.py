"""Requests to end: which signals make them, and the exit code that each one has."""

import contextlib
import signal
import threading
from collections.abc import Iterator

# Ctrl-C; a scheduler; SLURM, before the time is up, and submitit on SLURM
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PARENT = "GPTLAB_PARENT"  # names the process that another ends with: a job with its sweep, a rank with the first one


def exit_code(signum: int) -> int:
    return 130 if signum == signal.SIGINT else 143


@contextlib.contextmanager
def later() -> Iterator[None]:
    """Let no signal interrupt what is done meanwhile: the first that comes is heeded afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {signum: signal.signal(signum, lambda number, _: received.append(number)) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if received:
            signal.raise_signal(received[0])


class Interrupted(BaseException):  # a request and no error: what catches errors, a compiler say, must let it pass
    """Somebody asked the run to end."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = exit_code(signum)
