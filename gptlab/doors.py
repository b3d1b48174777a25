"""What the Hydra doors share: composing, logging, sweeps, and saying what went wrong."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console as RichConsole
from rich.table import Table

from gptlab import checks, config, dial, launchers, mixing, options, ranks, staged, start, study, sweep
from gptlab.explain import explain
from gptlab.given import given_keys
from gptlab.meeting import MissingRankError
from gptlab.options import BAD_INPUT, CTRL_C, FAILED
from gptlab.signals import SIGNALS, Interrupted, exit_code

log = logging.getLogger("gptlab")


def say(message: str) -> None:
    """Print for a person or program; with progress bars about, through whatever stdout is just now."""
    if ranks.is_first():
        print(message, flush=True)


def show(table: Table) -> None:
    """Print a table as wide as the terminal, or wide enough for a file."""
    RichConsole(width=None if on_terminal() else 160).print(table)


def on_terminal() -> bool:
    return ranks.is_first() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class Console(logging.Handler):
    to_stderr = False  # while standard output is for a program to read

    def emit(self, record: logging.LogRecord) -> None:
        if not self.to_stderr:
            say(self.format(record))
        elif ranks.is_first():
            print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def json_alone(wanted: bool) -> Iterator[None]:
    """Where it is wanted, keep gptlab's own log off standard output."""
    before, Console.to_stderr = Console.to_stderr, wanted
    try:
        yield
    finally:
        Console.to_stderr = before


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """gptlab's own log on the console, and with times in `path`; of several processes, the first one's alone."""
    if not ranks.is_first():
        yield
        return
    file = logging.FileHandler(path)
    file.setLevel(logging.DEBUG)
    file.handleError = lambda record: None  # a full disk is said once, by who needs the space
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    try:
        yield
    finally:
        log.removeHandler(file)
        with contextlib.suppress(OSError):
            file.close()


def quiet() -> None:
    """Only what a user can act on: gptlab's own words, and the libraries' warnings in the log of a debugging run."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if not any(isinstance(handler, Console) for handler in log.handlers):
        log.addHandler(Console(logging.INFO))
    if not debugging():
        for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning|torch")


def debugging() -> bool:
    return os.environ.get("GPTLAB_DEBUG") == "1"


def fail(message: str) -> None:
    """One message of at most 15 lines, on standard error."""
    options.fail(message, "" if ranks.is_first() else f"{ranks.name()}: ")


def root_of(error: BaseException) -> BaseException:
    """What lies below the wrappers of Hydra's instantiate."""
    while type(error).__module__.startswith(("hydra", "omegaconf")) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_bad_input(error: BaseException) -> bool:
    """Whether a user can mend it: our own ValueErrors, files that cannot be used, what Lightning refuses to set up."""
    mendable = isinstance(error, ValueError | OSError) or type(error).__name__ == "MisconfigurationException"
    return mendable and not isinstance(error, UnicodeError)


def is_lost_rank(error: BaseException) -> bool:
    """Whether torch.distributed could not reach another process."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
    )


def message_of(error: BaseException) -> str:
    """What went wrong while running, in a line or two."""
    error = root_of(error)
    if is_lost_rank(error):
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0].splitlines()[0]
        who = ranks.wait_for_lost_follower(patience_s=2) or f"another rank has ended or cannot be reached ({reason})"
        return f"{who}; {ranks.go_on()}"
    is_ours = isinstance(error, ValueError | OSError | ArithmeticError | MissingRankError)
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


def report(error: BaseException, before_first_step: bool, message: str | None = None, door: str = "train") -> int:
    """Say what went wrong, `message` where that is known already, and give the exit code."""
    if debugging():
        traceback.print_exception(error)
    explained = explain(error, door)
    error = root_of(error)
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    if isinstance(error, Interrupted):
        return error.exit_code
    if before_first_step and (explained or is_bad_input(error)):
        fail(explained or str(error))
        return BAD_INPUT
    message = message or message_of(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message += f"\nfree some space, then go on with resume={ranks.run_dir()}"
    fail(f"{message}\n(GPTLAB_DEBUG=1 shows where)")
    return FAILED


def interrupt(signum: int, frame: FrameType | None) -> None:
    """What signals do outside of training, where there is nothing to save: end in order, and a second one at once."""
    start.finish(exit_code(signum))
    raise Interrupted(signum)


def run_name(cfg: dict[str, Any]) -> str:
    """What a new run folder is called: the experiment, or model and data."""
    choices = HydraConfig.get().runtime.choices
    if choices.get("experiments"):
        return str(choices["experiments"]).replace("/", "-")
    files = cfg["data"]["files"] or cfg["data"]["tokens"]
    if files is None:
        return f"{choices['model']}-{'mix' if cfg['data']['mix'] else choices['data']}"
    stem = re.sub(r"[^\w.]+", "-", Path(files).stem)[:40].strip("-") if isinstance(files, str) else ""
    return f"{choices['model']}-{stem or 'files'}"


def hydra_door(name: str, act: Callable[[dict[str, Any], dict[str, str], str], int]) -> None:
    """Compose the config `name` from the command line, act on it, and exit. Each job of a sweep is its own process."""
    start.imported()
    quiet()
    for signum in SIGNALS:
        signal.signal(signum, interrupt)
    config.register()
    config.after_composing(mixing.write_out, dial.apply)
    launchers.register(*launchers.WORDS, study.Optuna, staged.Staged)
    outcome = {"code": 0}

    def job(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            word = HydraConfig.get().runtime.choices["hydra/launcher"]
            known = ", ".join(config.words_of("hydra/launcher"))
            raise ValueError(f"hydra/launcher={word} starts no processes for jobs; use one of {known}")
        try:
            if (run := HydraConfig.get().run.dir) != ".":
                raise ValueError(f"hydra.run.dir={run} has no use here: give run_dir={run}")
            plain = config.plain(cfg)
            checks.check_targets(plain, config.trusted(plain))
            outcome["code"] = act(plain, given_keys(), run_name(plain))
        except BaseException as error:
            outcome["code"] = report(error, before_first_step=True, door=name)

    try:
        hydra.main(config_path=str(config.conf_dir()), config_name=name, version_base="1.3")(job)()
    except (Exception, Interrupted) as error:
        outcome["code"] = report(error, before_first_step=True, door=name)
    start.finish(outcome["code"] or CTRL_C)
    code = outcome["code"] or sweep.summarise(show)
    start.finish(code)
    sys.exit(code)
