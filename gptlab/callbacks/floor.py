"""How far a model is from the best possible one, where that is known, and in what. Shapes: B batch, T time."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gptlab.callbacks.averaging import averaged
from gptlab.data.grammar import Optimum
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID, UNK_ID

log = logging.getLogger("gptlab")

DOCUMENTS = 512  # scored at each validation
NEAREST = 16  # bytes; the first bucket of distances, each of the others reaching twice as far
INTERVAL = 1.96  # standard errors to either side: 95 %


class Floor(Callback):
    """After each validation, scores the first held-out documents beside their own optimum, if the source knows it.

    A document stands alone in its row, from its start: the floor assumes that all before is seen. Its end counts, as in
    val/bits_per_byte: for the model and for the optimum. A token's nll is spread evenly over its bytes, and a byte has
    the kind of the choice that it belongs to, so that the breakdown is exact for byte tokens, and the sum for any.

    This costs a forward pass of DOCUMENTS rows, 4 s on one thread of a Xeon for 0.7 M parameters and blocks of 256, and
    once their parsing, 0.1 s. `floor.json` has the last validation's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._windows = torch.empty(0)  # (DOCUMENTS or a little more, T + 1): end token, document, end token, padding
        self._widths: list[np.ndarray] = []  # bytes of each token of a document; of the end token, 1
        self._optima: list[Optimum] = []

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        data = trainer.datamodule
        if getattr(getattr(data, "source", None), "optimum", None) is None:  # somebody's own data has no source
            return
        try:
            self._lay_out(first_documents(data.prepared.validation[:]), data, task)
        except ValueError as error:
            self._optima = []
            log.warning("no floor is measured: %s", error)

    def _lay_out(self, documents: list[np.ndarray], data: Any, task: LightningModule) -> None:
        size, batch = data.block_size, data.config.batch_size
        token_bytes = task.validation.token_bytes.cpu().numpy()
        if (longest := max(map(len, documents)) + 1) > size:
            raise ValueError(f"documents have up to {longest} tokens; raise model.block_size={size}")
        if any((ids == UNK_ID).any() for ids in documents):
            raise ValueError("the tokenizer cannot spell this text; use one that loses nothing")
        self._widths = [np.append(token_bytes[ids], 1) for ids in documents]
        self._optima = [data.source.optimum(data.tokenizer.decode(ids)) for ids in documents]
        windows = np.full((-(-len(documents) // batch) * batch, size + 1), EOS_ID)
        for row, ids in zip(windows, documents, strict=False):
            row[1 : len(ids) + 1] = ids
        self._windows = torch.from_numpy(windows)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        if not self._optima or trainer.sanity_checking:
            return
        was_training = task.training
        task.eval()
        with averaged(trainer, task), torch.no_grad(), trainer.precision_plugin.val_step_context():
            token_nll = self._token_nll(task, trainer.datamodule.config.batch_size)
        task.train(was_training)
        model = [np.repeat(nll / widths, widths) for nll, widths in zip(token_nll, self._widths, strict=True)]
        found = {"step": trainer.global_step} | compared(model, self._optima)
        nats = math.log(2)
        bits = {f"val/{name}_bits_per_byte": found[f"{name}_nats_per_byte"] / nats for name in ("floor", "excess")}
        low, high = (end / nats for end in found["interval"])
        task.figures |= bits | {"val/excess_low": low, "val/excess_high": high}  # the record keeps them
        kinds = {f"val/excess_nats/{kind}": row["excess"] for kind, row in found["kinds"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(bits | kinds, step=trainer.global_step)
        if trainer.is_global_zero:
            write_json(self.path, found)
        log.info(
            f"floor {bits['val/floor_bits_per_byte']:.4f} bits a byte, excess {bits['val/excess_bits_per_byte']:.4f} "
            f"({low:.4f} to {high:.4f}); in nats a byte of "
            + ", ".join(f"{kind} {row['excess']:.4f}" for kind, row in found["kinds"].items())
        )

    def _token_nll(self, task: LightningModule, batch_size: int) -> list[np.ndarray]:
        """Of each document, the nll of its tokens and of its end, in batches of the shape that validation has."""
        rows = []
        for windows in self._windows.split(batch_size):
            windows = windows.to(task.device)
            nll, _ = task.scored(windows[:, :-1], windows[:, 1:])
            rows += list(nll.float().cpu().numpy().astype(np.float64))
        return [row[: len(widths)] for row, widths in zip(rows, self._widths, strict=False)]


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
