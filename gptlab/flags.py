"""What the flag doors share: options in either spelling, RUN, and one message where something is wrong.

It imports nothing that takes time, so that --help and a wrong option are answered at once.
"""

import argparse
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from gptlab import __version__, start
from gptlab.signals import SIGNALS, Interrupted

if TYPE_CHECKING:
    from gptlab.loading import Loaded

DONE, FAILED, BAD_INPUT, CTRL_C = 0, 1, 2, 130
MESSAGE_LINES = 15


class Options(argparse.ArgumentParser):
    """Options of one door. `--max_tokens` is `--max-tokens`; nothing is guessed from a beginning."""

    def __init__(self, door: str, does: str, more: str = ""):
        super().__init__(
            prog=f"python -m gptlab.{door}",
            description=does,
            epilog=more or None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"gptlab {__version__}")

    def add_run(self) -> None:
        """RUN, and how to choose what of it is loaded."""
        self.add_argument("run", metavar="RUN", help="a run folder, one of its checkpoint files, or an exported folder")
        self.add_argument(
            "--checkpoint", default="best", metavar="best|last|FILE", help="which of a run's checkpoints (best)"
        )
        self.add_argument(
            "--trust",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="allow classes of this package, besides gptlab and experiments",
        )

    def add_sampling(self) -> None:
        """How tokens are drawn; the fields of `gptlab.sampling.Sampling`, by whose names they are found."""
        add = self.add_argument
        add("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token (0.8)")
        add("--top-k", type=int, metavar="K", help="of the K likeliest tokens alone")
        add("--top-p", type=float, default=1.0, metavar="P", help="of the likeliest that together have probability P")
        add("--min-p", type=float, default=0.0, metavar="P", help="of those with P times the likeliest's probability")
        add("--repetition-penalty", type=float, default=1.0, metavar="X", help="over 1: tokens come again less often")
        add("--seed", type=int, metavar="N", help="the same text every time")

    def add_decoding(self) -> None:
        """Where and how the network computes, and what it may say."""
        add = self.add_argument
        add("--device", default="auto", metavar="auto|cpu|cuda|mps", help="auto: a GPU where there is one")
        add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and products (float32)")
        add("--threads", type=int, metavar="N", help="of the processor; all, if not given")
        add(
            "--safety-mode",
            default="off",
            choices=("off", "standard", "strict"),
            help="standard: no control tokens; strict: lengths are capped, loops and --blocklist end it; a filter, no more",
        )
        add("--blocklist", metavar="FILE", help="words and phrases, a line each, that strict mode does not let pass")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = [self._spelt(word) for word in words[:end]]
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self._nearest(unknown[0])}")
        return known

    def _spelt(self, word: str) -> str:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if name.startswith("--") and dashed in self._option_string_actions else word

    def _nearest(self, word: str) -> str:
        names = [name for name in self._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(word.partition("=")[0].replace("_", "-"), names, n=1)
        return f", did you mean {close[0]}?" if close else "; --help tells what there is"

    def error(self, message: str) -> NoReturn:
        fail(message)
        sys.exit(BAD_INPUT)


def fail(message: str) -> None:
    """One message of at most 15 lines, on standard error."""
    lines = message.strip().splitlines() or ["failed"]
    if len(lines) > MESSAGE_LINES:
        lines = [*lines[: MESSAGE_LINES - 1], f"... and {len(lines) - MESSAGE_LINES + 1} lines more"]
    print("error: " + "\n".join(lines), file=sys.stderr, flush=True)


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
