"""Of `data.py`: windows a second, by gptlab's loader and by what people write instead.

All give batches of tokens and targets, int64, from one file of uint16 that the system has in memory. The clock runs
after the first batches, so that starting workers and shuffling numbers do not count.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from turns import markdown, median, quotient, take_turns

from gptlab.data.tokens import TokenFile
from gptlab.data.windows import TrainingOrder, WindowDataset, WindowLoader

BLOCK, BATCH, WARM = 256, 32, 50
PART = 2**20  # tokens written at a time


def write_tokens(path: Path, count: int) -> TokenFile:
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, count, PART):
            rng.integers(0, 8000, min(PART, count - start)).astype("<u2").tofile(file)
    return TokenFile(path, "<u2", count)


class Slices(Dataset):
    """One window an item, as a Dataset is commonly written."""

    def __init__(self, path: Path):
        self.ids = np.memmap(path, "<u2", mode="r")

    def __len__(self) -> int:
        return (len(self.ids) - 1) // BLOCK

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self.ids[index * BLOCK : (index + 1) * BLOCK + 1].astype(np.int64))
        return {"tokens": window[:-1], "targets": window[1:]}


def random_slices(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """As nanoGPT does: no epochs, a place drawn for each window, and the map made anew for each batch."""
    while True:
        ids = np.memmap(path, "<u2", mode="r")
        places = torch.randint(len(ids) - BLOCK, (BATCH,))
        tokens = torch.stack([torch.from_numpy(ids[place : place + BLOCK].astype(np.int64)) for place in places])
        after = [torch.from_numpy(ids[place + 1 : place + 1 + BLOCK].astype(np.int64)) for place in places]
        yield {"tokens": tokens, "targets": torch.stack(after)}


def seconds_a_window(loader: Iterable[dict[str, torch.Tensor]], batches: int) -> float:
    drawn = iter(loader)
    for batch in islice(drawn, WARM):
        assert batch["tokens"].shape == batch["targets"].shape == (BATCH, BLOCK)
    start = time.perf_counter()
    count = sum(len(batch["tokens"]) for batch in islice(drawn, batches))
    taken = time.perf_counter() - start
    if count < batches * BATCH:
        raise ValueError(f"{batches * BATCH} windows were asked for, and an epoch has {count} left: raise --tokens")
    return taken / count


def compare(folder: Path, tokens: int, batches: int, rounds: int) -> None:
    file = write_tokens(folder / "tokens.bin", tokens)
    windows = WindowDataset(file, BLOCK, BLOCK)

    def gptlab(workers: int) -> WindowLoader:
        return WindowLoader(windows, TrainingOrder(len(windows), BATCH, 1, seed=0), workers, pin_memory=False)

    def items(workers: int) -> DataLoader:
        return DataLoader(Slices(file.path), BATCH, shuffle=True, drop_last=True, num_workers=workers)

    ways = {
        "random slices of `np.memmap`": lambda: random_slices(file.path),
        "`DataLoader`, an item a window": lambda: items(0),
        "the same, two workers": lambda: items(2),
        "gptlab's `WindowLoader`": lambda: gptlab(0),
        "the same loader, two workers": lambda: gptlab(2),
    }
    taken = take_turns(
        {name: lambda make=make: seconds_a_window(make(), batches) for name, make in ways.items()}, rounds
    )
    first = next(iter(ways))
    rows = [
        (
            *(way, f"{1 / median(taken, way):,.0f}", f"{BATCH * 1e6 * median(taken, way):.0f}"),
            f"{quotient(taken, first, way):.2f}x",
        )
        for way in ways
    ]
    print(markdown("loader | windows/s | µs a batch | beside the first", rows))
