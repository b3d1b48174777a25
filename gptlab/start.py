"""What a door does before its imports take seconds: the clock, --help and --version, and a quiet end on a signal."""

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
from types import FrameType

from gptlab import manual
from gptlab.signals import PARENT, SIGNALS, exit_code

PROCESS_START = time.time()
_begun = False
last_words: str | None = None  # a line that is owed, however the process ends


def begin(door: str) -> None:
    """Answer --help and --version and exit; otherwise `before_imports`."""
    if page := manual.answer(door, sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may have seen enough
        print(page)
        sys.exit(0)
    before_imports()


def before_imports() -> None:
    """End without a traceback if a signal comes during the imports, and let them be quick."""
    if os.environ.get("GPTLAB_DEBUG") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are pages of addresses
    gc.disable()  # until `imported`: what modules make stays, and looking for garbage in it takes a fifth of the time
    global _begun
    _begun = True
    atexit.register(ignore_signals)  # the first to be registered runs last
    for signum in SIGNALS:
        signal.signal(signum, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked where a worker of Ray or submitit starts this
    if parent := os.environ.pop(PARENT, None):  # not for the processes that this one starts
        end_with(int(parent))


def imported() -> None:
    """The imports are over: garbage is looked for again, and not in what they have made."""
    if _begun:  # otherwise the process is somebody else's
        gc.freeze()
        gc.enable()


def end_with(parent: int) -> None:
    """Have the kernel, where it can, send SIGTERM when `parent` dies: a job is not to outlive its killed sweep."""
    with contextlib.suppress(AttributeError):  # macOS
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        leave(signal.SIGTERM, None)


def leave(signum: int, frame: FrameType | None) -> None:
    """End at once: nothing has been made that would have to be saved or removed."""
    os._exit(exit_code(signum))


def finish(code: int) -> None:
    """From here on a signal ends the process at once, with the code that it ends with anyway, and its last words."""

    def end(*_: object) -> None:
        if last_words:
            os.write(1, f"{last_words}\n".encode())
        os._exit(code)

    if _begun:  # otherwise the process is somebody else's
        for signum in SIGNALS:
            signal.signal(signum, end)


def ignore_signals() -> None:
    """What is left is Python's own end, during which a signal would find no handler, and kill."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
