"""`data=stream`: the data module of text that is read while training, with validation text in token files as ever."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from gptlab.data.changes import differences
from gptlab.data.corpus import Source
from gptlab.data.module import DataConfig, TextDataModule, data_rank, text_source, validation_source
from gptlab.data.shards import Nothing, Sample, Shard, fingerprint_of, refuse_overlap
from gptlab.data.stream import StreamLoader, Text
from gptlab.data.tokens import Prepared, SplitText, encoded, tokenizer_for
from gptlab.data.windows import JoinedWindows, TrainingOrder, WindowDataset
from gptlab.run import write_json
from gptlab.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextStream:
    """How text is read while training: the node `data.stream` of `data=stream`.

    `buffer` windows are shuffled at a time by each of `readers` threads, which read as many files side by side. An
    epoch is `epoch_windows`, since nobody knows how many there are. A tokenizer learns from `sample_bytes` of the text.
    """

    buffer: int
    readers: int
    epoch_windows: int
    sample_bytes: int

    def __post_init__(self):
        faults = [f"data.stream.{name}={value} must be at least 1" for name, value in vars(self).items() if value < 1]
        if faults:
            raise ValueError("; ".join(faults))

    def check(self, config: DataConfig) -> None:
        """Raise ValueError with all that cannot be together with a stream."""
        faults = []
        if config.files is None:
            faults.append("data=stream reads data.files, which is null: give paths, globs or URLs")
        if config.mix is not None:
            faults.append("data.mix is of texts that are prepared before training: leave it out, or data=stream")
        if config.validation_files is None:
            faults.append(
                "data=stream needs data.validation_files: a share of a text can only be held out by reading all of it "
                "first, as other data=<name> do; give files that are not among data.files"
            )
        if config.stride is not None:
            faults.append(f"data.stride={config.stride}: windows of a stream stand side by side; leave it out")
        if config.deduplicate is not None:
            faults.append(
                f"data.deduplicate={config.deduplicate}: a stream does not know what it has read before; leave copies "
                "out of the files, before training"
            )
        if config.num_workers:
            faults.append(f"data.num_workers={config.num_workers}: data.stream.readers read a stream; leave it 0")
        if faults:
            raise ValueError("\n".join(faults))

    @property
    def data_module(self) -> type[TextDataModule]:
        return StreamDataModule


class StreamDataModule(TextDataModule):
    """Windows of text that is read while training. Validation is what `data.validation_files` holds, in token files."""

    def __init__(
        self,
        config: DataConfig,
        stream: TextStream,
        tokenizer: Callable[..., Tokenizer] | Tokenizer,
        block_size: int,
        seed: int,
        cache: Path | None = None,
        tokenizer_source: Source | None = None,
    ):
        stream.check(config)
        self.stream = stream
        super().__init__(config, None, tokenizer, block_size, seed, cache, tokenizer_source)
        self.stride = block_size
        self._reading: StreamLoader | None = None

    def named(self, source: Source | None) -> dict[str, Source]:
        """The sample, which is all that is looked at before training."""
        self.text = text_source(self.config, None)
        self.sample = Sample(self.config.files, self.text, self.stream.sample_bytes, self.cache)
        return {"": self.sample}

    @property
    def shards(self) -> list[Shard]:
        return self.sample.shards

    def prepare_data(self) -> None:
        """List the shards; build the tokenizer, of a sample of them, and validation's tokens, or find them."""
        if self.prepared is not None:
            return
        config, stream = self.config, self.stream
        if stream.readers > len(self.shards):
            raise ValueError(
                f"data.stream.readers={stream.readers}, and data.files names {len(self.shards)} files: a reader "
                "takes at least one: lower it, or divide the text into more files"
            )
        held_out = validation_source(config)
        assert held_out is not None
        refuse_overlap(self.shards, held_out.paths())
        tokenizer = tokenizer_for([], self.build_tokenizer, self.cache, self.tokenizer_source or self.sample)
        both = SplitText(Nothing(), held_out, config.validation_fraction)
        prepared = encoded(both, tokenizer, self.cache, config.prepare_workers)
        known = {"validation": prepared.meta["splits"]["validation"]}  # nobody knows what all of the text has
        self.prepared = replace(prepared, meta=prepared.meta | {"splits": known})
        write_json(self._record(self.fingerprint), [shard.identity for shard in self.shards])

    def cut_windows(self) -> None:
        assert isinstance(self.prepared, Prepared)
        self.validation_windows = self.held_out_of(self.prepared, self.config)

    @property
    def windows(self) -> dict[str, WindowDataset | JoinedWindows]:
        return {"validation": self.validation_windows}

    def _record(self, fingerprint: str) -> Path:
        return self.cache / "streams" / f"{fingerprint[:24]}.json"

    @property
    def fingerprint(self) -> str:
        """Equal for the same files, read and tokenized alike; of a file's content its size and date are known."""
        assert self.prepared is not None
        parts = [
            fingerprint_of(self.shards),
            json.dumps(self.text.settings, sort_keys=True),
            self.prepared.meta["tokenizer_fingerprint"],
            self.prepared.meta["splits"]["validation"]["sha256"],
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def files_that_differ(self, fingerprint: str) -> str:
        try:
            then = json.loads(self._record(fingerprint).read_text(encoding="utf-8"))
            return differences(
                [(name, f"{size} {version}") for name, size, version in then],
                [(name, f"{size} {version}") for name, size, version in (shard.identity for shard in self.shards)],
            )
        except (OSError, ValueError, TypeError):
            return ""

    def identity(self, trainer: Trainer) -> dict[str, Any]:
        stream = self.stream
        own = {"buffer": stream.buffer, "readers": stream.readers, "epoch_windows": stream.epoch_windows}
        return super().identity(trainer) | own

    def order(self, accumulate: int = 1, rank: int = 0, world: int = 1) -> TrainingOrder:
        windows, step = self.stream.epoch_windows, self.config.batch_size * world * accumulate
        if windows < step:
            raise ValueError(
                f"data.stream.epoch_windows={windows} is less than the {step} windows that an optimizer step takes: "
                "raise it, or lower data.batch_size or trainer.accumulate_grad_batches"
            )
        return TrainingOrder(windows, self.config.batch_size, accumulate, self.seed, rank, world)

    def example(self) -> dict[str, torch.Tensor]:
        return self.validation_windows.__getitems__([0] * self.config.batch_size)

    def describe(self) -> str:
        assert self.prepared is not None
        validation = self.prepared.meta["splits"]["validation"]
        return (
            f"training text of {len(self.shards):,} files, {size_of(self.shards)} as they lie, is read while training; "
            f"{validation['tokens']:,} validation tokens; vocabulary {self.tokenizer.vocab_size:,}"
        )

    def train_dataloader(self) -> StreamLoader:
        trainer = self.trainer
        assert trainer is not None
        self.close()
        text = Text(
            self.shards,
            self.text,
            self.tokenizer,
            self.block_size,
            self.stream.buffer,
            self.stream.readers,
            self.seed,
            self.cache,
        )
        order = self.order(trainer.accumulate_grad_batches, *data_rank(trainer))
        loader = StreamLoader(text, order, pin_memory=trainer.strategy.root_device.type == "cuda")
        loader.progress = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed
        self._reading = loader
        return loader

    def close(self) -> None:
        """End the reading, if it has begun."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        self.close()


def size_of(shards: list[Shard]) -> str:
    size, unit = float(sum(shard.size for shard in shards)), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.1f} {unit}"
