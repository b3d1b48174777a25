"""How not to split: windows are cut first, and random ones validate. And a text so small that it is soon known."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import random_split

from gptlab.data.document import Document
from gptlab.data.sources import Download
from gptlab.data.windows import WindowDataset


class Excerpt(Download):
    """The first `characters` of each downloaded text."""

    def __init__(self, files: Sequence[Mapping], characters: int):
        super().__init__(files)
        self.characters = characters

    def read(self, path: Path) -> Iterator[Document]:
        for document in super().read(path):
            yield replace(document, text=document.text[: self.characters])

    @property
    def settings(self) -> dict:
        return super().settings | {"characters": self.characters}


class Chosen(WindowDataset):
    """Those of `windows` that `numbers` name, in this order; window -1 stays nothing but padding."""

    def __init__(self, windows: WindowDataset, numbers: Sequence[int]):
        super().__init__(windows.tokens, windows.block_size, windows.stride)
        self.numbers = np.append(np.asarray(numbers, dtype=np.int64), -1)

    def __len__(self) -> int:
        return len(self.numbers) - 1

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return super().__getitems__(self.numbers[indices].tolist())


def at_random(windows: WindowDataset, fraction: float, seed: int) -> tuple[Chosen, Chosen]:
    """Training and validation windows as `torch.utils.data.random_split` deals them out."""
    generator = torch.Generator().manual_seed(seed)
    train, validation = random_split(range(len(windows)), [1 - fraction, fraction], generator)
    return Chosen(windows, train.indices), Chosen(windows, validation.indices)


def in_order(windows: WindowDataset, fraction: float) -> tuple[Chosen, Chosen]:
    """The first windows for training, the last ones for validation."""
    cut = int(len(windows) * round(1 - fraction, 12))
    return Chosen(windows, range(cut)), Chosen(windows, range(cut, len(windows)))


class RandomSplit(Callback):
    """Undoes the split of a text that is one document: cuts windows from all of it, and lets random ones validate."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule
        prepared = data.prepared
        if (documents := prepared.meta["splits"]["train"]["documents"]) != 1:
            raise ValueError(f"RandomSplit puts a text together that is one document, and here are {documents}")
        whole = np.concatenate((prepared.train[:-1], prepared.validation[:]))  # without the end mark between them
        windows = WindowDataset(whole, data.block_size, data.stride)
        data.train_windows, data.validation_windows = at_random(windows, data.config.validation_fraction, data.seed)
