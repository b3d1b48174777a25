"""Data modules of text that is read while training; and `data=stream`, files of text that are."""

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
from gptlab.data.listed import Nothing, Sample, TextFile, fingerprint_of, refuse_overlap
from gptlab.data.module import DataConfig, TextDataModule, data_rank, text_source, validation_source
from gptlab.data.stream import StreamLoader, Text
from gptlab.data.tokens import Prepared, SplitText, encoded, tokenizer_for
from gptlab.data.windows import JoinedWindows, TrainingOrder, WindowDataset
from gptlab.run import write_json
from gptlab.tokenizer import Tokenizer


class StreamedDataModule(TextDataModule):
    """Training text is read while training, by a loader that knows its place. Only validation's has token files."""

    def __init__(
        self,
        config: DataConfig,
        stream: Any,
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
        self._reading: Any = None

    def prepare_held_out(self, tokenizer: Tokenizer) -> Prepared:
        """Validation's tokens, found or made; nobody knows what all of the training text has."""
        text = SplitText(Nothing(), validation_source(self.config), self.config.validation_fraction)
        prepared = encoded(text, tokenizer, self.cache, self.config.prepare_workers)
        known = {"validation": prepared.meta["splits"]["validation"]}
        return replace(prepared, meta=prepared.meta | {"splits": known})

    def cut_windows(self) -> None:
        assert isinstance(self.prepared, Prepared)
        self.validation_windows = self.held_out_of(self.prepared, self.config)

    @property
    def windows(self) -> dict[str, WindowDataset | JoinedWindows]:
        return {"validation": self.validation_windows}

    def example(self) -> dict[str, torch.Tensor]:
        return self.validation_windows.__getitems__([0] * self.config.batch_size)

    @property
    def fingerprint(self) -> str:
        assert self.prepared is not None
        known = [self.prepared.meta["tokenizer_fingerprint"], self.prepared.meta["splits"]["validation"]["sha256"]]
        return hashlib.sha256("\n".join([*self.training_identity(), *known]).encode()).hexdigest()

    def training_identity(self) -> list[str]:
        """What tells the training text, and how it is read, from others."""
        raise NotImplementedError

    def describe(self) -> str:
        assert self.prepared is not None
        tokens = self.prepared.meta["splits"]["validation"]["tokens"]
        return (
            f"{self.describe_training()}, read while training; {tokens:,} validation tokens; "
            f"vocabulary {self.tokenizer.vocab_size:,}"
        )

    def describe_training(self) -> str:
        raise NotImplementedError

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        self.close()
        order = self.order(trainer.accumulate_grad_batches, *data_rank(trainer))
        self._reading = loader = self.reading(order, pin_memory=trainer.strategy.root_device.type == "cuda")
        loader.progress = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return loader

    def reading(self, order: TrainingOrder, pin_memory: bool) -> Any:
        """What reads the training text, as a loader with `progress`, a state, and `close`."""
        raise NotImplementedError

    def close(self) -> None:
        """End the reading, if it has begun."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        self.close()


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
        faults = faults_of_any_stream(config, "stream")
        if config.files is None:
            faults.append("data=stream reads data.files, which is null: give paths, globs or URLs")
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


class StreamDataModule(StreamedDataModule):
    """Windows of text that is read, tokenized, cut and shuffled while training."""

    stream: TextStream

    def named(self, source: Source | None) -> dict[str, Source]:
        """The sample, which is all that is looked at before training."""
        self.text = text_source(self.config, None)
        self.sample = Sample(self.config.files, self.text, self.stream.sample_bytes, self.cache)
        return {"": self.sample}

    @property
    def files(self) -> list[TextFile]:
        return self.sample.files

    def prepare_data(self) -> None:
        """List the files; build the tokenizer, of a sample of them, and validation's tokens, or find them."""
        if self.prepared is not None:
            return
        if self.stream.readers > len(self.files):
            raise ValueError(
                f"data.stream.readers={self.stream.readers}, and data.files names {len(self.files)} files: a reader "
                "takes at least one: lower it, or divide the text into more files"
            )
        held_out = validation_source(self.config)
        assert held_out is not None
        refuse_overlap(self.files, held_out.paths())
        learnt_from = self.tokenizer_source or self.sample
        self.prepared = self.prepare_held_out(tokenizer_for([], self.build_tokenizer, self.cache, learnt_from))
        write_json(self._record(self.fingerprint), [file.identity for file in self.files])

    def _record(self, fingerprint: str) -> Path:
        return self.cache / "streams" / f"{fingerprint[:24]}.json"

    def training_identity(self) -> list[str]:
        return [fingerprint_of(self.files), json.dumps(self.text.settings, sort_keys=True)]

    def files_that_differ(self, fingerprint: str) -> str:
        try:
            then = json.loads(self._record(fingerprint).read_text(encoding="utf-8"))
            return differences(
                [(name, f"{size} {version}") for name, size, version in then],
                [(name, f"{size} {version}") for name, size, version in (file.identity for file in self.files)],
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

    def describe_training(self) -> str:
        return f"training text of {len(self.files):,} files, {size_of(self.files)} as they lie"

    def reading(self, order: TrainingOrder, pin_memory: bool) -> StreamLoader:
        stream = self.stream
        text = Text(
            self.files,
            self.text,
            self.tokenizer,
            block_size=self.block_size,
            buffer=stream.buffer,
            readers=stream.readers,
            seed=self.seed,
            cache=self.cache,
        )
        return StreamLoader(text, order, pin_memory)


def faults_of_any_stream(config: DataConfig, word: str) -> list[str]:
    """What is wrong in a config where `data=<word>` reads the training text while training."""
    faults = [
        f"data.{name} is of texts that are prepared before training: leave it out, or data={word}"
        for name in ("mix", "tokens", "validation_tokens")
        if getattr(config, name) is not None
    ]
    if config.validation_files is None:
        faults.append(
            f"data={word} needs data.validation_files: a share of a text can only be held out by reading all of it "
            "first, as other data=<name> do; give files that are not trained on"
        )
    if config.begin != "anywhere":
        faults.append(f"data.begin={config.begin}: data={word} cuts windows where the last one ended; leave it out")
    if config.stride is not None:
        faults.append(f"data.stride={config.stride}: windows of data={word} stand side by side; leave it out")
    return faults


def size_of(files: list[TextFile]) -> str:
    size, unit = float(sum(file.size for file in files)), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.1f} {unit}"
