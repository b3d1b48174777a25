"""Text to be scored: a run's own validation split, in the batches of training's validation, or files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gptlab.data.corpus import Files
from gptlab.data.formats import Reading
from gptlab.data.listed import Nothing
from gptlab.data.module import TextDataModule
from gptlab.data.tokens import SplitText, TokenFile, encoded
from gptlab.data.windows import DocumentWindows, ScoringOrder, WindowLoader
from gptlab.evaluate.subject import Subject
from gptlab.excess import KnownDocuments, in_bits
from gptlab.files import cache_dir
from gptlab.scoring import figures, finite, score, token_bytes
from gptlab.tokenizer import EOS_ID, Tokenizer


class FromStart:
    """A file of ids with an end token before it, so that its first token, too, is a target."""

    def __init__(self, tokens: TokenFile):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens) + 1

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if not isinstance(index, slice):
            return np.where(index == 0, EOS_ID, self.tokens[np.maximum(index - 1, 0)])
        start, stop, _ = index.indices(len(self))
        found = self.tokens[max(start - 1, 0) : max(stop - 1, 0)]
        return np.insert(found, 0, EOS_ID) if start == 0 < stop else found


@dataclass(frozen=True)
class Text:
    """Held-out text: its ids, and what was counted of it."""

    name: str  # validation, or files
    ids: Sequence[Any]  # files of ids, each to be sliced
    counts: dict[str, int]  # documents, and tokens that the tokenizer could not spell
    batches: Iterator[dict[str, Tensor]]
    sources: tuple[str, ...] = ()


def of_run(data: TextDataModule, batch_size: int | None) -> Text:
    """The validation split, in the order and the shapes of training's validation."""
    windows = data.validation_windows
    order = ScoringOrder(len(windows), batch_size or data.config.batch_size)
    assert data.prepared is not None
    split = data.prepared.meta["splits"]["validation"]
    parts = getattr(data.prepared, "parts", {"": data.prepared})
    return Text(
        "validation",
        [file for part in parts.values() for file in part.validation.parts],
        {"documents": split["documents"], "unknown_tokens": split["unknown_tokens"]},
        iter(WindowLoader(windows, order, num_workers=0, pin_memory=False)),
        tuple(getattr(data, "source_names", ())),
    )


def of_files(files: list[str], reading: Reading, tokenizer: Tokenizer, block_size: int, batch_size: int) -> Text:
    """Files, each document from its start to its end, so that every token is scored once.

    Their ids are kept in the cache, as those of training text are.
    """
    text = SplitText(Nothing(), Files(files, reading), 0.0)
    prepared = encoded(text, tokenizer, cache_dir())
    split = prepared.meta["splits"]["validation"]
    ids = FromStart(prepared.validation)
    windows = DocumentWindows(ids, block_size, stride=block_size, alone=True)
    return Text(
        "files",
        [ids],
        {"documents": split["documents"], "unknown_tokens": split["unknown_tokens"]},
        by_length(windows, batch_size),
    )


def by_length(windows: DocumentWindows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All windows, the longest first, in batches no wider than their longest: short documents are mostly padding."""
    lengths = windows.last - windows.starts
    order = np.argsort(-lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = windows.__getitems__(indices.tolist())
        yield {name: values[:, : lengths[indices[0]]] for name, values in batch.items()}


def scored_text(subject: Subject, text: Text) -> dict[str, Any]:
    """The figures of the contract, and what they were found on."""
    sums, by_source = score(subject.scorer, text.batches, token_bytes(subject.tokenizer), len(text.sources))
    found = figures(sums.tolist())
    if not math.isfinite(found["loss"]):
        raise ValueError(
            f"{subject.loaded.path}: the loss is {found['loss']}, though the weights are numbers: they overflow"
        )
    return {
        "split": text.name,
        "tokens": int(sums[1]),
        "bytes": int(sums[3]),
        **text.counts,
        **{name: finite(value) for name, value in found.items()},
        "by_source": by_source_name(text.sources, by_source.tolist()),
    }


def by_source_name(names: tuple[str, ...], rows: list[list[float]]) -> dict[str, dict[str, float | None]] | None:
    """{source: {loss, bits_per_byte}} of a mixture, as in result.json."""
    each = {name: figures(sums) for name, sums in zip(names, rows, strict=True)}
    return {name: {key: finite(row[key]) for key in ("loss", "bits_per_byte")} for name, row in each.items()} or None


def floor_of(subject: Subject, data: TextDataModule) -> dict[str, Any]:
    """How far the network is from the best possible one, as training reports it; {} where nobody knows."""
    source = data.source
    if source is None or source.optimum is None:
        return {}
    try:
        documents = KnownDocuments(
            data.prepared.validation[:],
            subject.tokenizer,
            source.optimum,
            token_bytes(subject.tokenizer).numpy(),
            subject.block_size,
            data.config.batch_size,
        )
    except ValueError:  # training has said why
        return {}
    return in_bits(documents.measure(subject.scorer, subject.scorer.device))
