"""How much of the validation text do three ways to split train on? `python -m experiments.leakage.measure`

The text is that of `data=shakespeare`, by characters. Windows are read through gptlab's own classes, over the positions
of the characters in the text instead of the characters: so what is trained on twice is seen, whatever it says.

Shapes: B batch, T time (block_size).
"""

import argparse
import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import yaml
from torch import Tensor

from experiments.leakage.split import at_random, in_order
from gptlab.config import conf_dir
from gptlab.data.corpus import Source
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.data.sources import Download
from gptlab.data.windows import WindowDataset
from gptlab.tokenizer import EOS_ID, CharTokenizer, Tokenizer

FRACTION = 0.1  # of windows, or of text, to validation
GRAM = 32  # characters; a power of two
TOKENS_AT_ONCE = 2**20
BEHIND = 2  # ends of documents are given places behind the text, where nothing comes before them


class Leak(NamedTuple):
    """What validation shares with training."""

    targets: float  # share of its targets whose position in the text is also a target of training
    windows: float  # share of its windows all of whose targets are
    grams: float  # share of the runs of GRAM characters in its windows that stand in a window of training
    positions: int  # how many positions are targets of both


def expected(overlap: int, fraction: float = FRACTION) -> tuple[float, float]:
    """Leak.targets and Leak.windows where each of very many windows validates with probability `fraction`.

    `overlap` k = T / stride windows cover each target. One in a validation window is not trained on if the k - 1 others
    validate too. A whole window is trained on unless k - 1 in a row of its 2 (k - 1) neighbours validate.
    """
    others = overlap - 1
    alone = fraction**others
    return 1 - alone, 1 - alone * (1 + others * (1 - fraction))


def alike(text: str) -> np.ndarray:
    """A number for each place in `text`, the same where the next GRAM characters are; so there are GRAM - 1 fewer."""
    found = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
    length = 1
    while length < GRAM:  # of two halves that are known by number
        found = np.unique(found[:-length] * (found.max() + 1) + found[length:], return_inverse=True)[1]
        length *= 2
    return found


def placed(windows: WindowDataset, tokenizer: Tokenizer, text: str, end: int) -> WindowDataset:
    """`windows` over positions in `text` where there were tokens of it; the end of a document is at `end`."""
    ids, start, positions = windows.tokens[:], 0, []
    for stop in np.flatnonzero(ids == EOS_ID):
        if (place := text.find(piece := tokenizer.decode(ids[start:stop]))) < 0:
            raise ValueError(f"{piece[:40]!r}..., of the prepared tokens, is no part of the text")
        positions += [np.arange(place, place + len(piece)), [end]]
        start = stop + 1
    there = copy.copy(windows)
    there.tokens = np.concatenate(positions)
    assert len(there.tokens) == len(ids), "a token is a character"
    return there


def by_gptlab(
    source: Source, tokenizer: Tokenizer, text: str, block_size: int, stride: int
) -> tuple[WindowDataset, WindowDataset]:
    """The windows that a run has, over positions in `text`."""
    config = DataConfig(stride=stride, validation_fraction=FRACTION)
    data = TextDataModule(config, source, tokenizer, block_size, seed=1)
    data.prepare_data()
    data.setup()
    train, validation = data.train_windows, data.validation_windows
    return placed(train, tokenizer, text, len(text) + 1), placed(validation, tokenizer, text, len(text) + BEHIND)


def batches(windows: WindowDataset) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """Positions of targets (B, T), which of them count (B, T), and where runs of GRAM characters start (any)."""
    count = max(1, TOKENS_AT_ONCE // windows.block_size)
    for first in range(0, len(windows), count):
        batch = windows.__getitems__(list(range(first, min(first + count, len(windows)))))
        stop = batch["targets"][:, GRAM - 2 :]
        start = batch["tokens"][:, : stop.shape[1]]
        yield batch["targets"], batch["loss_mask"], start[stop - start == GRAM - 1].numpy()


def leak(train: WindowDataset, validation: WindowDataset, number: np.ndarray) -> Leak:
    """What the windows, over positions in a text of which `number` is alike(text), share."""
    trained, scored = (np.zeros(len(number) + GRAM + BEHIND, dtype=bool) for _ in range(2))
    known = np.zeros(number.max() + 1, dtype=bool)
    for targets, counts, starts in batches(train):
        trained[targets[counts]] = True
        known[number[starts]] = True
    sums = np.zeros((3, 2), dtype=np.int64)  # targets, windows, grams: how many of how many
    for targets, counts, starts in batches(validation):
        scored[targets[counts]] = True
        hit, is_counted = trained[targets], counts.numpy()
        sums[0] += (hit & is_counted).sum(), is_counted.sum()
        sums[1] += (hit | ~is_counted).all(axis=1).sum(), len(hit)
        sums[2] += known[number[starts]].sum(), len(starts)
    return Leak(*(sums[:, 0] / sums[:, 1]).tolist(), positions=int((trained & scored).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5, help="how many random splits to average over")
    arguments = parser.parse_args()
    block_size = arguments.block_size
    source = Download(yaml.safe_load((conf_dir() / "data/shakespeare.yaml").read_text())["source"]["files"])
    text = next(source.documents()).text
    tokenizer, number = CharTokenizer.train([text]), alike(text)
    print("| split | stride | targets | lowest, highest | windows | runs of 32 | positions |\n|" + "---|" * 7)
    for stride in (block_size, block_size // 2, block_size // 4, 1):
        windows = WindowDataset(np.arange(len(text)), block_size, stride)
        for split, pairs in (
            ("windows at random", (at_random(windows, FRACTION, seed + 1) for seed in range(arguments.seeds))),
            ("windows in order", [in_order(windows, FRACTION)]),
            ("gptlab", [by_gptlab(source, tokenizer, text, block_size, stride)]),
        ):
            found = [leak(*pair, number) for pair in pairs]
            mean = Leak(*np.mean(found, axis=0))
            ends = [f"{end(one.targets for one in found):.2%}" for end in (min, max)] if len(found) > 1 else []
            shares = f"{mean.targets:.2%} | {', '.join(ends)} | {mean.windows:.2%} | {mean.grams:.2%}"
            print(f"| {split} | {stride} | {shares} | {mean.positions:,.0f} |", flush=True)
        targets, covered = expected(block_size // stride)
        print(f"| windows at random, by the formula | {stride} | {targets:.2%} | | {covered:.2%} | | |", flush=True)


if __name__ == "__main__":
    main()
