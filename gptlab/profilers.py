"""The words of `trainer.profiler`: Lightning's profilers, with their tables in the run folder."""

import contextlib
from functools import partial
from pathlib import Path

from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler


class StepProfiler(PyTorchProfiler):
    """Of three training steps, from loss to loss; Lightning's own shows what came last, and so validation."""

    STEP_FUNCTIONS = {"training_step"}

    def _cache_functions_events(self) -> None:
        with contextlib.suppress(AssertionError):  # of a run that ended before anything was recorded
            super()._cache_functions_events()


def of_word(word: str, run_dir: Path) -> Profiler:
    """The profiler that a word names, to leave `fit-profile.txt`; Lightning alone would print it into a log not shown.

    `simple` has what each hook of the loop took, `advanced` the Python functions in it, and `pytorch` the operations of
    three steps, and a trace of them for a browser.
    """
    kinds = {
        "simple": SimpleProfiler,
        "advanced": AdvancedProfiler,
        # Names of modules would take hooks in the network, which is then not the one that was compiled.
        "pytorch": partial(StepProfiler, record_module_names=False, row_limit=60),
    }
    if word not in kinds:
        raise ValueError(f"trainer.profiler={word} is none of {', '.join(kinds)}")
    return kinds[word](dirpath=run_dir, filename="profile")
