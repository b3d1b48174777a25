"""RUN: a run folder, one of its checkpoint files, a bundle or an exported folder, as a network and its tokenizer."""

from pathlib import Path
from typing import NamedTuple

from gptlab import checkpoint, exported
from gptlab.model import GPT
from gptlab.tokenizer import Tokenizer


class Loaded(NamedTuple):
    model: GPT  # in eval mode; its weights lie in the file, from which they are read as they are used
    tokenizer: Tokenizer
    path: Path  # the file or folder that was read


def load(run: str | Path, which: str = "best", trust: tuple[str, ...] = ()) -> Loaded:
    """What RUN names. `which` of a run's checkpoints: best (last, where there is none), last, or a file.

    Raises ValueError for what is none of these, is damaged, or names classes of packages outside `trust`.
    """
    if (folder := exported.folder_of(run)) is not None:
        return Loaded(*exported.load_model(folder, trust), folder)
    path = checkpoint.find(Path(run), which)
    return Loaded(*checkpoint.load_model(path, trust), path)
