"""What the flag doors share: a command line that is read at once, RUN, and one message where something is wrong."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from gptlab import start
from gptlab.options import BAD_INPUT, CTRL_C, DONE, FAILED, Options, fail
from gptlab.signals import SIGNALS, Interrupted

if TYPE_CHECKING:
    from gptlab.loading import Loaded


def begin(options: Options) -> argparse.Namespace:
    """The command line, read before the imports, which take seconds; a signal during them ends without a traceback."""
    start.before_imports()
    return options.parse_args()


def load(arguments: argparse.Namespace) -> "Loaded":
    """RUN, where and how the options say. Raises ValueError for what of them cannot be."""
    import torch  # here, since they take a second

    from gptlab import loading

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads {arguments.threads} must be at least 1")
        torch.set_num_threads(arguments.threads)
    device, dtype = loading.device_of(arguments.device), getattr(torch, arguments.dtype)
    return loading.load(arguments.run, arguments.checkpoint, tuple(arguments.trust), device, dtype)


def interrupt(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def end(act: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> NoReturn:
    """Act, say what went wrong if anything did, and exit with the contract's code."""
    start.imported()
    for signum in SIGNALS:
        signal.signal(signum, interrupt)
    try:
        code = act(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who read has seen enough; Python would complain once more at its own end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except BaseException as error:
        code = report(error)
    sys.exit(code)


def report(error: BaseException) -> int:
    """Say what went wrong; the exit code: 2 for what a user can mend, 1 for the rest."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    if isinstance(error, Interrupted):
        return error.exit_code
    if os.environ.get("GPTLAB_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, ValueError | OSError | ImportError) and not isinstance(error, UnicodeError):
        fail(str(error))
        return BAD_INPUT
    fail(f"{type(error).__name__}: {error}\n(GPTLAB_DEBUG=1 shows where)")
    return FAILED
