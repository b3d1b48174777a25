"""Several sources in one training: each gives the share of windows that its weight says, whatever its size.

Which window stands where is a function of (seed, epoch, position) here too, so that a run can be continued anywhere.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.corpus import Source
from gptlab.data.encoding import SIDES
from gptlab.data.tokens import Prepared, SplitText, encoded, fingerprint_of, tokenizer_for
from gptlab.data.windows import TrainingOrder, permute
from gptlab.run import write_json
from gptlab.tokenizer import Tokenizer

SUMS = ("tokens", "unknown_tokens", "documents", "bytes")


@dataclass(frozen=True)
class Mixture:
    """Sources as tokens of one tokenizer, and the weight of each: what a `Prepared` is of one source."""

    folder: Path
    parts: dict[str, Prepared]
    weights: dict[str, float]

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self.parts.values())).tokenizer

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.meta)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """As that of a `Prepared`: sums over the sources, and the files of each."""
        metas = {name: part.meta for name, part in self.parts.items()}
        first = next(iter(metas.values()))
        splits = {side: _joined({name: meta["splits"][side] for name, meta in metas.items()}) for side in SIDES}
        weighted = json.dumps([splits["train"]["sha256"], self.weights])
        splits["train"]["sha256"] = hashlib.sha256(weighted.encode()).hexdigest()
        return {
            **{key: first[key] for key in ("format", "tokenizer_fingerprint", "vocab_size", "eos_id", "versions")},
            "splits": splits,
            "split": {"rule": "mix", "rules": {name: meta["split"] for name, meta in metas.items()}},
            "weights": self.weights,
            "files": {f"{name}.{role}": of for name, meta in metas.items() for role, of in meta["files"].items()},
        }


def _joined(splits: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of one side of several sources, together."""
    sums = {key: sum(split[key] for split in splits.values()) for key in SUMS}
    named = json.dumps({name: split["sha256"] for name, split in splits.items()})
    covered = sum(split["coverage"] * split["bytes"] for split in splits.values())  # characters are not counted
    return sums | {"sha256": hashlib.sha256(named.encode()).hexdigest(), "coverage": covered / sums["bytes"]}


def prepare_mixture(
    texts: Mapping[str, SplitText],
    weights: dict[str, float],
    tokenizer: Tokenizer | Callable[..., Tokenizer],
    *,
    cache: Path,
    workers: int | None = None,
    tokenizer_source: Source | None = None,
) -> Mixture:
    """Every source as tokens, each in a cache entry of its own: another weight encodes nothing again.

    A tokenizer that is trained learns from all of them, each as large as it is, unless there is a `tokenizer_source`.
    """
    _refuse_shared_files(texts)
    tokenizer = tokenizer_for(list(texts.values()), tokenizer, cache, tokenizer_source)
    parts = {name: encoded(text, tokenizer, cache, workers) for name, text in texts.items()}
    mixture = Mixture(Path(cache), parts, weights)
    folder = Path(cache) / "mixtures" / mixture.fingerprint[:24]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "meta.json", mixture.meta)
    return Mixture(folder, parts, weights)


def _refuse_shared_files(texts: Mapping[str, SplitText]) -> None:
    """One source may hold out what another trains on."""
    owners: dict[str, str] = {}
    for name, text in texts.items():
        for record in (record for records in text.files.values() for record in records if record["size"]):
            if (owner := owners.setdefault(record["sha256"], name)) != name:
                raise ValueError(
                    f"{record['path']} is text of data.mix.{owner} and of data.mix.{name}, and one may hold out what "
                    "the other trains on: leave it out of one; a larger weight repeats it"
                )


def quotas(weights: list[float], windows: int) -> list[int]:
    """How many of `windows` fall to each weight: whole numbers in their proportion, by largest remainder."""
    shares = [weight / sum(weights) * windows for weight in weights]
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in by_remainder[: windows - sum(whole)]:
        whole[i] += 1
    return whole


class MixedOrder(TrainingOrder):
    """Micro-batches of windows of several sources, numbered through as `JoinedWindows` does, for one rank.

    An epoch has as many windows as all sources together, and of each the share that its weight says: the same number in
    every epoch, at places drawn anew. A source is gone through in a shuffled order from its first window to its last,
    over the ends of epochs, and then again in another order: a small one comes back within an epoch, and a large one
    repeats nothing before all of it was drawn. (What an epoch leaves out, so as to be whole steps, counts as drawn.)
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        weights: Mapping[str, float],
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(sum(counts.values()), batch_size, accumulate, seed, rank, world)
        self.names, self.counts = list(counts), list(counts.values())
        self.quotas = quotas([weights[name] for name in counts], self.count)
        for name, quota in zip(counts, self.quotas, strict=True):
            if not quota:
                raise ValueError(
                    f"data.mix.{name}.weight={weights[name]}: that is none of the {self.count:,} windows of an epoch; "
                    "raise it, or leave the source out"
                )
        self.starts = np.cumsum([0, *self.counts])
        self.ends = np.cumsum(self.quotas)

    def windows_at(self, places: np.ndarray, epoch: int) -> np.ndarray:
        owners = np.searchsorted(self.ends, places, side="right")
        windows = np.empty_like(places)
        for owner in np.unique(owners).tolist():
            count, quota = self.counts[owner], self.quotas[owner]
            draws = places[owners == owner] - (self.ends[owner] - quota) + epoch * quota
            passes, positions = np.divmod(draws, count)
            own = np.empty_like(draws)
            for number in np.unique(passes).tolist():
                key = f"{self.seed}/{self.names[owner]}/{number}"
                own[passes == number] = permute(positions[passes == number], count, key)
            windows[owners == owner] = self.starts[owner] + own
        return windows
