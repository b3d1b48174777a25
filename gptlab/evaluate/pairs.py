"""Prompts whose completions are known: how likely the network finds them, and how near its own come to them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.data.formats import json_lines
from gptlab.evaluate.writing import written
from gptlab.loading import Loaded
from gptlab.sampling import Sampling
from gptlab.scoring import figures, finite, score, token_bytes
from gptlab.tokenizer import EOS_ID

EXAMPLES = 3
A_ROW = 'a row is {"prompt": "..", "completion": ".."}'


@dataclass(frozen=True)
class Pair:
    where: str  # the file, and the line in it
    prompt: str
    completion: str


def read_pairs(path: Path) -> list[Pair]:
    """The rows {"prompt", "completion"} of a file. Raises ValueError, naming the line, for any other."""
    pairs = []
    for line, row in json_lines(path):
        pair = row if isinstance(row, Mapping) else {}
        for name in ("prompt", "completion"):
            if not isinstance(pair.get(name), str):
                raise ValueError(f"{path}: {line} has no text called {name!r}; {A_ROW}")
        if not pair["completion"]:
            raise ValueError(f"{path}: {line} has an empty completion: leave it out")
        pairs.append(Pair(f"{path}: {line}", pair["prompt"], pair["completion"]))
    if not pairs:
        raise ValueError(f"{path} holds no pairs; {A_ROW}")
    return pairs


@dataclass(frozen=True)
class Encoded:
    """A pair as ids, each of the two encoded for itself: so a prompt is, when its completion is asked for."""

    prompt: list[int]  # after the token that begins a document
    completion: list[int]

    @property
    def all(self) -> list[int]:
        return self.prompt + self.completion


def encode_pairs(pairs: Sequence[Pair], loaded: Loaded) -> list[Encoded]:
    """Raises ValueError for a pair that is longer than the context: what was cut off could not be answered for."""
    encoded, block_size = [], loaded.model.config.block_size
    for pair in pairs:
        one = Encoded(loaded.prompt_ids(pair.prompt), loaded.tokenizer.encode(pair.completion).tolist())
        if (length := len(one.all) - 1) > block_size:
            raise ValueError(
                f"{pair.where}: prompt and completion have {length} tokens and the context is model.block_size="
                f"{block_size}: shorten the pair, or leave it out"
            )
        encoded.append(one)
    return encoded


def batches(encoded: Sequence[Encoded], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All pairs, the longest first; the targets that count are the completions' tokens."""
    longest_first = sorted(encoded, key=lambda one: -len(one.all))
    for first in range(0, len(longest_first), batch_size):
        rows = longest_first[first : first + batch_size]
        ids = torch.full((len(rows), len(rows[0].all)), EOS_ID)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (one, into) in enumerate(zip(rows, ids, strict=True)):
            into[: len(one.all)] = torch.tensor(one.all)
            mask[row, len(one.prompt) : len(one.all)] = True
        yield {"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": mask[:, 1:]}


def scored_pairs(
    pairs: Sequence[Pair],
    scorer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    loaded: Loaded,
    max_tokens: int | None,
    stops: Sequence[str],
    batch_size: int,
) -> dict[str, Any]:
    """The loss of the completions given their prompts, and how near the likeliest completions are to them.

    A completion that the network writes ends with its document, with one of `stops`, or when it is `max_tokens` long:
    None is as long as the longest of those that are known.
    """
    encoded = encode_pairs(pairs, loaded)
    sums, _ = score(scorer, batches(encoded, batch_size), token_bytes(loaded.tokenizer))
    most = max_tokens or max(len(one.completion) for one in encoded)
    prompts = [one.prompt for one in encoded]
    texts = [text for text, _ in written(loaded, prompts, most, Sampling(temperature=0), stops, batch_size)]
    shown = zip(pairs[:EXAMPLES], texts, strict=False)
    return {
        "n": len(pairs),
        "tokens": int(sums[1]),
        **{name: finite(value) for name, value in figures(sums.tolist()).items()},
        **nearness(texts, [pair.completion for pair in pairs]),
        "max_tokens": most,
        "examples": [vars(pair) | {"written": text} for pair, text in shown],
    }


def nearness(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Shares from 0 to 1: texts that are equal but for white space at their ends, BLEU of all (with sacrebleu's words),
    and ROUGE, the mean F1 of each (Lin 2004)."""
    from torchmetrics.functional.text import rouge_score, sacre_bleu_score  # here, because both take a while

    equal = [one.strip() == other.strip() for one, other in zip(texts, wanted, strict=True)]
    rouge = rouge_score(list(texts), list(wanted), normalizer=words, rouge_keys=("rouge1", "rouge2", "rougeL"))
    return {
        "exact_match": sum(equal) / len(equal),
        "bleu": float(sacre_bleu_score(list(texts), [[one] for one in wanted])),
        **{name: float(rouge[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")},
    }


def words(text: str) -> str:
    """Letters and digits in lower case, a space for all else: as the original does, but for letters beyond a to z."""
    return re.sub(r"[\W_]+", " ", text.lower())
