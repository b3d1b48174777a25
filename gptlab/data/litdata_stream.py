"""`data=litdata`: tokens that `litdata.optimize` has written, here or in an object store, read while training.

A folder of litdata's is cut into blocks of T + 1 tokens side by side. What of a chunk fills no block is never read.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from gptlab.data.corpus import Source
from gptlab.data.module import DataConfig, TextDataModule, data_rank, tensor_ranks, validation_source
from gptlab.data.remote import content_of, is_remote
from gptlab.data.stream import Ordered
from gptlab.data.streaming import StreamedDataModule, faults_of_any_stream
from gptlab.data.windows import TrainingOrder
from gptlab.tokenizer import Tokenizer, load_tokenizer

KEPT = 4  # states of the last batches; Lightning has fetched one more than are processed, at most


def library() -> ModuleType:
    """litdata, imported where it is first needed. Raises ValueError where it is not installed."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask PyPI for a newer one, for up to 30 s
    try:
        import litdata
    except ModuleNotFoundError as error:
        raise ValueError(
            f'data=litdata is not installed ({error}): pip install "gptlab[stream]", and torchvision that fits torch'
        ) from error
    return litdata


@dataclass(frozen=True)
class LitStream:
    """A folder, by path or URL, that `litdata.optimize` has written; chunks from elsewhere are kept in `cache_size`."""

    folder: str | None
    cache_size: str | None

    def check(self, config: DataConfig) -> None:
        """Raise ValueError with all that cannot be together with such a folder."""
        faults = faults_of_any_stream(config, "litdata")
        if self.folder is None:
            faults.append("data=litdata reads data.stream.folder, which is null: give a folder or URL of tokens")
        if config.files is not None:
            faults.append("data=litdata reads tokens, and data.files is text: leave it out, or use data=stream")
        if faults:
            raise ValueError("\n".join(faults))
        library()

    @property
    def data_module(self) -> type[TextDataModule]:
        return LitDataModule


class LitLoader(Ordered):
    """A sized loader over litdata's own, which is begun anew each epoch; its state is of what was trained on.

    litdata counts batches as it yields them, and changes a state that it has been given. So a copy is kept of the
    state after each of the last batches, and it is the one of the last that is processed that is saved.
    """

    def __init__(self, make: Callable[[], Any], order: TrainingOrder, vocab_size: int):
        self.make, self.order, self.vocab_size = make, order, vocab_size
        self.progress: Callable[[], int] = lambda: 0
        self._states: deque[tuple[int, dict[str, Any] | None]] = deque([(0, None)], maxlen=KEPT)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self.order
        epoch, start, order.start = order.epoch, order.start, 0
        loader, (_, state) = self.make(), self._states[-1]
        if start:
            loader.load_state_dict(deepcopy(state))
        else:
            self._states.append((0, None))
            loader.current_epoch = epoch  # it counts one further as it begins
        batches = iter(loader)
        for batch in range(start, len(order)):
            windows = torch.as_tensor(next(batches)).long()
            self._states.append((batch + 1, deepcopy(loader.state_dict())))
            if (highest := int(windows.max())) >= self.vocab_size:
                raise ValueError(
                    f"data.stream.folder holds the token {highest}, and the tokenizer knows {self.vocab_size}: "
                    "give the one that made it as tokenizer.path"
                )
            mask = torch.ones(len(windows), windows.shape[1] - 1, dtype=torch.bool)
            yield {"tokens": windows[:, :-1], "targets": windows[:, 1:], "loss_mask": mask}

    def state_dict(self) -> dict[str, Any]:
        done = self.progress()
        state = next(state for batches, state in reversed(self._states) if batches == done)
        return {"epoch": self.order.epoch, "batches": done, "litdata": deepcopy(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        order = self.order
        order.epoch, order.start = state["epoch"], state["batches"]
        if order.start >= len(order):
            order.epoch, order.start = order.epoch + 1, 0
        self._states.append((order.start, state["litdata"] if order.start else None))

    def close(self) -> None:
        """Nothing is left behind: litdata's threads and processes end with its iterator."""


class LitDataModule(StreamedDataModule):
    """Blocks of a folder of litdata's. The tokenizer is `tokenizer.path`, or what stands in the folder itself."""

    stream: LitStream

    def named(self, source: Source | None) -> dict[str, Source]:
        """The held-out text, which is all there is of text."""
        held_out = validation_source(self.config)
        assert held_out is not None
        return {"": held_out}

    def prepare_data(self) -> None:
        """Read the index; find the tokenizer; make validation's tokens, or find them."""
        if self.prepared is not None:
            return
        folder = self.stream.folder
        assert folder is not None
        try:
            content = content_of(f"{folder}/index.json")
            index = json.loads(content)
            kind, chunks = index["config"]["item_loader"], index["chunks"]
        except Exception as error:  # each library of a store has its own
            raise ValueError(
                f"data.stream.folder={folder!r}: no index.json of litdata's there ({type(error).__name__}: {error}); "
                "name a folder that litdata.optimize has written"
            ) from error
        if kind != "TokensLoader":
            raise ValueError(
                f"data.stream.folder={folder!r} holds items of {kind}: write it with item_loader=TokensLoader()"
            )
        self.index_hash = hashlib.sha256(content).hexdigest()
        self.tokens = sum(chunk["dim"] for chunk in chunks)
        self.blocks = sum(chunk["dim"] // (self.block_size + 1) for chunk in chunks)
        self.prepared = self.prepare_held_out(self._tokenizer(folder))

    def _tokenizer(self, folder: str) -> Tokenizer:
        given = self.build_tokenizer if isinstance(self.build_tokenizer, Tokenizer) else None
        beside = Path(folder) / "tokenizer"
        own = load_tokenizer(beside) if not is_remote(folder) and beside.is_dir() else None
        if given is None and own is None:
            raise ValueError(
                f"data.stream.folder={folder!r} says nothing of the tokenizer that made it: give tokenizer.path, or "
                f"save that tokenizer in {folder}/tokenizer"
            )
        if given is not None and own is not None and given.fingerprint != own.fingerprint:
            raise ValueError(
                f"tokenizer.path is not the tokenizer that made data.stream.folder={folder!r}, which stands in it: "
                "leave tokenizer.path out"
            )
        return given or own

    def training_identity(self) -> list[str]:
        return [self.index_hash]

    def identity(self, trainer: Trainer) -> dict[str, Any]:
        config = self.config
        own = {"ranks": data_rank(trainer)[1], "batch_size": config.batch_size, "num_workers": config.num_workers}
        return super().identity(trainer) | own

    def order(self, accumulate: int = 1, rank: int = 0, world: int = 1) -> TrainingOrder:
        """An epoch is what every worker of every rank has whole batches of."""
        size, workers = self.config.batch_size, max(1, self.config.num_workers)
        batches = self.blocks // (world * workers) // size * workers
        return TrainingOrder(batches * size * world, size, accumulate, self.seed, rank, world)

    def describe_training(self) -> str:
        return f"{self.tokens:,} training tokens in {self.blocks:,} windows of {self.stream.folder}"

    def reading(self, order: TrainingOrder, pin_memory: bool) -> LitLoader:
        if self.trainer is not None and tensor_ranks(self.trainer) > 1:
            raise ValueError("data=litdata gives every rank other windows: use trainer=ddp or fsdp, or data=stream")
        litdata, stream, is_elsewhere = library(), self.stream, is_remote(str(self.stream.folder))

        def make() -> Any:
            dataset = litdata.StreamingDataset(
                stream.folder,
                cache_dir=str(self.cache / "litdata") if is_elsewhere else None,
                item_loader=litdata.TokensLoader(block_size=self.block_size + 1),
                shuffle=True,
                drop_last=True,
                seed=self.seed,
                max_cache_size=stream.cache_size,
            )
            return litdata.StreamingDataLoader(
                dataset,
                batch_size=self.config.batch_size,
                num_workers=self.config.num_workers,
                drop_last=True,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # its own, so that starting an iterator draws nothing from torch's
            )

        return LitLoader(make, order, self.tokenizer.vocab_size)
