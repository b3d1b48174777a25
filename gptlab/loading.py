"""RUN: a run folder, one of its checkpoint files, a bundle or an exported folder, as a network that generates."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptlab import checkpoint, exported
from gptlab.engine import Engine, Request
from gptlab.model import GPT
from gptlab.sampling import Sampling
from gptlab.texts import Output
from gptlab.tokenizer import EOS_ID, Tokenizer


@dataclass
class Loaded:
    """A network, in eval mode, its tokenizer, and the file or folder that they are from."""

    model: GPT
    tokenizer: Tokenizer
    path: Path
    knows_turns: bool = False  # it was trained on conversations as `dialogue` writes them

    def prompt_ids(self, text: str) -> list[int]:
        """A document that begins with `text`: as in training, it comes after the end of another."""
        return [EOS_ID, *self.tokenizer.encode(text).tolist()]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text, or an answer."""
        tokenizer = self.tokenizer
        return frozenset(tokenizer.special_id(name) for name in ("</s>", "<|end|>") if name in tokenizer.special_tokens)

    def engine(self, rows: int = 1) -> Engine:
        return Engine(self.model, rows, self.tokenizer.vocab_size)

    def stream(self, prompt: str, max_tokens: int = 200, stop: tuple[str, ...] = (), **sampling: Any) -> Iterator[str]:
        """What comes after `prompt`, piece by piece, up to and without the first of the strings `stop`.

        `sampling`: fields of `gptlab.sampling.Sampling`.
        """
        request = Request(
            self.prompt_ids(prompt), max_tokens, Sampling(**sampling), stop_ids=self.stop_ids, slides=True
        )
        output = Output(self.tokenizer, stop)
        for sample in self.engine().run(request):
            yield output.take(sample)
            if output.finish_reason:
                return

    def generate(self, prompt: str, max_tokens: int = 200, stop: tuple[str, ...] = (), **sampling: Any) -> str:
        """What comes after `prompt`; the arguments are those of `stream`."""
        return "".join(self.stream(prompt, max_tokens, stop, **sampling))


def load(
    run: str | Path,
    which: str = "best",
    trust: tuple[str, ...] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """What RUN names. `which` of a run's checkpoints: best (last, where there is none), last, or a file.

    On a CPU, in the type that they are kept in, the weights stay in the file, and are read as they are used.
    Raises ValueError for what is no RUN, is damaged, or names classes of packages outside `trust`.
    """
    if (path := exported.folder_of(run)) is not None:
        model, tokenizer, own = exported.open_model(path, trust)
    else:
        path = checkpoint.find(Path(run), which)
        model, tokenizer, own = checkpoint.open_model(path, trust)
    return Loaded(model.to(device, dtype), tokenizer, path, knows_turns=bool(own.get("knows_turns")))


def device_of(word: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1` or `mps` means here. Raises ValueError for one that is not."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if word == "auto":
        word = "cuda" if cuda else "mps" if mps else "cpu"
    there = [
        "auto",
        "cpu",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
        *(["cuda"] * cuda),
        *(["mps"] * mps),
    ]
    if word not in there:
        raise ValueError(f"--device {word}: not here; there are {', '.join(there)}")
    return torch.device(word)
