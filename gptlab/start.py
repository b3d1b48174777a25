"""What a door does before its imports take seconds: the clock, --help and --version, and a quiet end on a signal."""

import os
import signal
import sys
import time
from types import FrameType

from gptlab import manual
from gptlab.signals import SIGNALS, exit_code

PROCESS_START = time.time()


def begin(door: str) -> None:
    """Answer --help and --version and exit; otherwise end without a traceback if a signal comes during the imports."""
    if page := manual.answer(door, sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may have seen enough
        print(page)
        sys.exit(0)
    for signum in SIGNALS:
        signal.signal(signum, leave)


def leave(signum: int, frame: FrameType | None) -> None:
    """End at once: nothing has been made that would have to be saved or removed."""
    os._exit(exit_code(signum))
