"""How far a network is from the best possible one, where that is known, and in what. Shapes: B batch, T time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.data.grammar import Optimum
from gptlab.tokenizer import EOS_ID, UNK_ID, Tokenizer

DOCUMENTS = 512  # scored at each validation
NEAREST = 16  # bytes; the first bucket of distances, each of the others reaching twice as far
INTERVAL = 1.96  # standard errors to either side: 95 %


class KnownDocuments:
    """The first held-out documents of a source that knows the optimum of each, to be scored beside it.

    A document stands alone in its row, from its start: the floor assumes that all before is seen. Its end counts, as in
    val/bits_per_byte: for the model and for the optimum. A token's nll is spread evenly over its bytes, and a byte has
    the kind of the choice that it belongs to, so that the breakdown is exact for byte tokens, and the sum for any.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        tokenizer: Tokenizer,
        optimum: Callable[[str], Optimum],
        token_bytes: np.ndarray,
        block_size: int,
        batch_size: int,
    ):
        """`tokens` are the held-out ids. Raises ValueError where their documents cannot be scored so."""
        documents = first_documents(tokens)
        if (longest := max(map(len, documents)) + 1) > block_size:
            raise ValueError(f"documents have up to {longest} tokens; raise model.block_size={block_size} to that")
        if any((ids == UNK_ID).any() for ids in documents):
            raise ValueError("the tokenizer cannot spell this text; use one that loses nothing")
        self.batch_size = batch_size
        self._widths = [np.append(token_bytes[ids], 1) for ids in documents]  # bytes of each token; of the end, 1
        self._optima = [optimum(tokenizer.decode(ids)) for ids in documents]
        windows = np.full((-(-len(documents) // batch_size) * batch_size, block_size + 1), EOS_ID)
        for row, ids in zip(windows, documents, strict=False):
            row[1 : len(ids) + 1] = ids
        self._windows = torch.from_numpy(windows)  # end token, document, end token, padding

    def measure(self, scored: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], device: Any) -> dict[str, Any]:
        """`compared` with what `scored(tokens, targets)` gives, in batches of the shape that validation has."""
        rows: list[np.ndarray] = []
        for windows in self._windows.split(self.batch_size):
            windows = windows.to(device)
            nll, _ = scored(windows[:, :-1], windows[:, 1:])
            rows += list(nll.float().cpu().numpy().astype(np.float64))
        found = zip(rows, self._widths, strict=False)  # there may be rows of nothing but padding
        return compared([np.repeat(row[: len(widths)] / widths, widths) for row, widths in found], self._optima)


def in_bits(found: dict[str, Any]) -> dict[str, Any]:
    """The totals of `compared` by the names of result.json."""
    nats = math.log(2)
    return {
        "floor_bits_per_byte": found["floor_nats_per_byte"] / nats,
        "excess_bits_per_byte": found["excess_nats_per_byte"] / nats,
        "excess_interval": [end / nats for end in found["interval"]],
    }


def first_documents(tokens: np.ndarray) -> list[np.ndarray]:
    """The ids of the first DOCUMENTS that end in `tokens`, without their end tokens."""
    ends = np.flatnonzero(tokens == EOS_ID)[:DOCUMENTS]
    return [ids[:-1].astype(np.int64) for ids in np.split(tokens[: ends[-1] + 1], ends[:-1] + 1)]


def compared(model: Sequence[np.ndarray], optima: Sequence[Optimum]) -> dict[str, Any]:
    """The nll of a model beside the optimum's, byte by byte, as totals and by kind of choice.

    All in nats: the totals over the bytes of the text, and those of a kind over its own bytes, of which it has `share`.
    The excess is a ratio of sums over documents, and its 95 % interval that of a ratio estimator (Cochran 1977, 6.3).
    """
    text_bytes = np.array([len(optimum.nll) - 1 for optimum in optima])  # without the end
    floor = np.array([optimum.nll.sum() for optimum in optima])
    above = np.array([nll.sum() for nll in model]) - floor
    excess = above.sum() / text_bytes.sum()
    residual = above - excess * text_bytes
    error = math.sqrt((residual**2).sum() * len(optima) / max(1, len(optima) - 1)) / text_bytes.sum()
    nll, best, kinds, distances = (
        np.concatenate(parts)
        for parts in (model, *zip(*((one.nll, one.kinds, one.distances) for one in optima), strict=True))
    )

    def part(chosen: np.ndarray) -> dict[str, float]:
        means = {"model": float(nll[chosen].mean()), "floor": float(best[chosen].mean())}
        return {"share": float(chosen.mean()), **means, "excess": means["model"] - means["floor"]}

    repeats = distances >= 0
    reach = NEAREST * 2 ** np.ceil(np.log2(np.maximum(distances, NEAREST) / NEAREST)).astype(int)
    return {
        "documents": len(optima),
        "bytes": int(text_bytes.sum()),
        "floor_nats_per_byte": float(floor.sum() / text_bytes.sum()),
        "excess_nats_per_byte": float(excess),
        "interval": [float(excess - INTERVAL * error), float(excess + INTERVAL * error)],
        "kinds": {str(kind): part(kinds == kind) for kind in sorted(set(kinds.tolist()))},
        "by_distance": {  # of what repeats a fact: up to so many bytes back
            str(limit): part(repeats & (reach == limit)) for limit in sorted(set(reach[repeats].tolist()))
        },
    }
