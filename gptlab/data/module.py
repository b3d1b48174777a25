"""The LightningDataModule: text becomes tokens, tokens become batches."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from gptlab.data.changes import files_that_differ
from gptlab.data.cleaning import Cleaned, Cleaning
from gptlab.data.corpus import Files, Source
from gptlab.data.formats import Reading
from gptlab.data.mixture import Mixture
from gptlab.data.tokens import Prepared, TokenFile, prepare
from gptlab.data.windows import (
    DocumentWindows,
    JoinedWindows,
    ScoringOrder,
    TrainingOrder,
    WindowDataset,
    WindowLoader,
    windows_in,
)
from gptlab.files import cache_dir
from gptlab.tokenizer import Tokenizer

Windows = WindowDataset | JoinedWindows


@dataclass
class DataConfig:
    """What text, and how it is cut into batches."""

    source: Any = field(default_factory=dict)  # where the text comes from, unless data.files names it
    stream: Any = None  # what reads the text while training, instead of making token files first: see data=stream
    files: Any = None  # your own text: a path, glob or URL, or a list of them
    mix: Any = None  # several sources by weight, '{pydocs: 3, code: 1}': words of data, or texts of their own
    validation_files: Any = None  # your own held-out text; null: a share of the text is held out
    tokens: Any = None  # text that is token ids already: .bin with its sidecar, or .npy; goes with tokenizer.path
    validation_tokens: Any = None  # held-out ids; null: a share of data.tokens is held out
    validation_fraction: float = 0.1  # that share, cut off before windows are made
    documents: str = "auto"  # auto | file | line | separator | field: what is one document of data.files
    separator: str | None = None  # the line that stands between two documents; null: none does
    field: str = "text"  # what the text is called in rows of .jsonl, .json, .csv, .tsv and .parquet
    strip_gutenberg: bool = True  # leave out Project Gutenberg's header and licence
    normalize: str | None = None  # null | NFC | NFKC: the normal form that text is brought to
    min_characters: int = 0  # shorter documents are left out
    deduplicate: str | None = None  # null | exact | near: which copies of earlier documents are left out
    similarity: float = 0.8  # of near copies, from 0 to 1: runs of five words that both have, of those either has
    batch_size: int = 16  # sequences a rank and micro-batch
    begin: str = "anywhere"  # anywhere | document: where windows begin; a long document gives several
    stride: int | None = None  # tokens between the starts of two training windows; null: half a block
    text_bytes: int | None = None  # about how large the source's text is; for depth, which is told before it is read
    prepare_workers: int | None = None  # processes that turn text into tokens; null: one a processor, for much text
    num_workers: int = 0  # loader processes; memory-mapped tokens need none


class TextDataModule(LightningDataModule):
    """Sliding windows over the tokens of a corpus, split into training and validation before any window is cut."""

    def __init__(
        self,
        config: DataConfig,
        source: Source | None,
        tokenizer: Callable[..., Tokenizer] | Tokenizer,
        block_size: int,
        seed: int,
        cache: Path | None = None,
        tokenizer_source: Source | None = None,
    ):
        super().__init__()
        check(config, others=tokenizer_source is not None)
        self.config, self.block_size, self.seed = config, block_size, seed
        self.cache = cache or cache_dir()
        self.stride = config.stride or max(1, block_size // 2)
        self.sources = self.named(source)
        self.build_tokenizer, self.tokenizer_source = tokenizer, tokenizer_source
        self.prepared: Prepared | Mixture | None = None

    def named(self, source: Source | None) -> dict[str, Source]:
        """What is trained on, by name; the one source of a config has none."""
        return {"": text_source(self.config, source)}

    @property
    def source(self) -> Source | None:
        """The one source; None of several."""
        return next(iter(self.sources.values())) if len(self.sources) == 1 else None

    def prepare_data(self) -> None:
        """Build tokenizer and token files, or find them in the cache; once, since finding them reads all the text."""
        if self.prepared is not None:
            return
        self.prepared = prepare(
            self.sources[""],
            self.build_tokenizer,
            validation_source=validation_source(self.config),
            validation_fraction=self.config.validation_fraction,
            cache=self.cache,
            workers=self.config.prepare_workers,
            tokenizer_source=self.tokenizer_source,
        )

    def setup(self, stage: str | None = None) -> None:
        if self.prepared is None:  # a rank that built nothing finds it in the cache
            self.prepare_data()
        self.cut_windows()

    def cut_windows(self) -> None:
        """Make the training and the validation windows. Raises ValueError where there are none."""
        assert isinstance(self.prepared, Prepared)
        self.train_windows, self.validation_windows = self.windows_of(self.prepared, self.config)

    @property
    def cuts(self) -> tuple[Callable[[TokenFile], WindowDataset], Callable[[TokenFile], WindowDataset]]:
        """How ids are cut into windows: those of training, and those of validation."""
        size = self.block_size
        if self.config.begin == "document":
            kind, all_of_it = DocumentWindows, {"alone": True}
        else:
            kind, all_of_it = WindowDataset, {"keep_tail": True}
        training = partial(kind, block_size=size, stride=self.stride)
        return training, partial(kind, block_size=size, stride=size, **all_of_it)

    def windows_of(self, prepared: Prepared, config: DataConfig, of: str = "") -> tuple[Windows, Windows]:
        train = windows_in(prepared.train, self.cuts[0])
        if not len(train):
            raise ValueError(
                f"the training split{of} has {len(prepared.train):,} tokens and one window of "
                f"model.block_size={self.block_size} takes {self.block_size + 1}: lower model.block_size, or add text"
            )
        return train, self.held_out_of(prepared, config, of)

    def held_out_of(self, prepared: Prepared, config: DataConfig, of: str = "") -> Windows:
        validation = windows_in(prepared.validation, self.cuts[1])
        if not len(validation):
            raise ValueError(
                f"the validation split{of} has {len(prepared.validation)} tokens and needs at least 2: raise "
                f"data.validation_fraction={config.validation_fraction}, or add text"
            )
        return validation

    @property
    def windows(self) -> dict[str, WindowDataset | JoinedWindows]:
        """The windows of each side, of those that are on the disk."""
        return {"train": self.train_windows, "validation": self.validation_windows}

    @property
    def report_folder(self) -> Path:
        """Where the report on the tokenizer stands: beside the tokens that it made of this text."""
        assert self.prepared is not None
        return self.prepared.folder

    @property
    def tokenizer(self) -> Tokenizer:
        if self.prepared is None:
            self.prepare_data()
        assert self.prepared is not None
        return self.prepared.tokenizer

    def order(self, accumulate: int = 1, rank: int = 0, world: int = 1) -> TrainingOrder:
        """The order of the training windows; raises ValueError when they do not fill one optimizer step."""
        return TrainingOrder(len(self.train_windows), self.config.batch_size, accumulate, self.seed, rank, world)

    @property
    def fingerprint(self) -> str:
        """Equal for equal text and tokens."""
        assert self.prepared is not None
        return self.prepared.fingerprint

    def example(self) -> dict[str, torch.Tensor]:
        """A batch of the shape that training sees, to compile for."""
        return self.train_windows.__getitems__([0] * self.config.batch_size)

    def describe(self) -> str:
        """One line on the text that a run is about to see."""
        assert self.prepared is not None
        train, validation = (self.prepared.meta["splits"][side] for side in ("train", "validation"))
        return (
            f"{train['tokens']:,} training tokens of {train['documents']:,} documents "
            f"in {len(self.train_windows):,} windows, "
            f"{validation['tokens']:,} validation tokens; vocabulary {self.tokenizer.vocab_size:,}"
        )

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        order = self.order(trainer.accumulate_grad_batches, *data_rank(trainer))
        loader = self._loader(self.train_windows, order)
        loader.progress = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return loader

    def val_dataloader(self) -> WindowLoader:
        trainer = self.trainer
        assert trainer is not None
        windows = self.validation_windows
        order = ScoringOrder(len(windows), self.config.batch_size, *data_rank(trainer))
        return self._loader(windows, order)

    def _loader(self, windows: Windows, order: TrainingOrder | ScoringOrder) -> WindowLoader:
        assert self.trainer is not None
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return WindowLoader(windows, order, self.config.num_workers, pin_memory=on_gpu)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's, or the task's own, but that nothing is looked through where there is nowhere to go."""
        task = self.trainer.lightning_module if self.trainer is not None else None
        if is_overridden("transfer_batch_to_device", task, parent=LightningModule):
            return task.transfer_batch_to_device(batch, device, dataloader_idx)
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def identity(self, trainer: Trainer) -> dict[str, Any]:
        """What must be the same for a run to continue: the text, and all that its order follows from."""
        step = self.config.batch_size * data_rank(trainer)[1] * trainer.accumulate_grad_batches
        return {
            "fingerprint": self.fingerprint,
            "block_size": self.block_size,
            "begin": self.config.begin,
            "stride": self.stride,
            "seed": self.seed,
            "windows_a_step": step,
        }

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return self.identity(self.trainer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.trainer is not None
        self.require_same(state, self.trainer)

    def files_that_differ(self, fingerprint: str) -> str:
        """Which files are other than those of the data with this fingerprint, where that is known."""
        assert self.prepared is not None
        return files_that_differ(self.prepared, fingerprint)

    def require_same(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Raise ValueError unless `state`, of a checkpoint, is of the data and order that are here now."""
        for name, now in self.identity(trainer).items():
            before = state.get(name, "anywhere" if name == "begin" else None)  # older checkpoints do not say where
            if before != now:
                files = self.files_that_differ(before) if name == "fingerprint" else ""
                raise ValueError(
                    f"the run was trained on data with {name} {before} and now finds {now}: it would not be the "
                    f"same run; restore the data and settings, or start a new run with init_from\n{files}".strip()
                )


def tensor_ranks(trainer: Trainer) -> int:
    """How many ranks share each matrix of the network, and see the same data."""
    return getattr(trainer.strategy, "tensor_ranks", 1)


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """(rank, number of ranks) among those that split each batch; ranks that share a network's tensors see the same."""
    sharing = tensor_ranks(trainer)
    return trainer.global_rank // sharing, trainer.world_size // sharing


def text_source(config: DataConfig, source: Source | None, key: str = "data") -> Source:
    """The text that `config`, which stands at `key`, names, cleaned: `files`, or else `source`, made of its source.

    Where copies are left out, so are those of the held-out text of its own.
    """
    if config.files is not None:
        source = Files(config.files, reading_of(config), f"{key}.files")
    if source is None:
        raise ValueError("no text to train on: choose data=<name> or give data.files='[...]'")
    return cleaned(source, config, validation_source(config, key) if config.deduplicate else None)


def validation_source(config: DataConfig, key: str = "data") -> Source | None:
    """The held-out text of its own, where `config` names some."""
    if config.validation_files is None:
        return None
    return cleaned(Files(config.validation_files, reading_of(config), f"{key}.validation_files"), config)


def reading_of(config: DataConfig) -> Reading:
    return Reading(config.documents, config.separator, config.field, config.strip_gutenberg)


def cleaned(source: Source, config: DataConfig, held_out: Source | None = None) -> Source:
    """The source, in a wrapper that cleans its documents where something is to be cleaned."""
    cleaning = cleaning_of(config)
    return Cleaned(source, cleaning, held_out) if cleaning.changes_text else source


def cleaning_of(config: DataConfig) -> Cleaning:
    return Cleaning(config.normalize, config.min_characters, config.deduplicate, config.similarity)


def check(config: DataConfig, own: Collection[str] | None = None, others: bool = False) -> None:
    """Raise ValueError with every value that cannot be.

    Of a source of a mixture, `own` are the keys that it gives itself. `others` says that a tokenizer learns from other
    files, which are read in the same way.
    """
    reading_of(config)
    cleaning_of(config)
    faults = [
        f"data.{name}={value} must be at least {least}"
        for name, value, least in (
            ("batch_size", config.batch_size, 1),
            ("stride", config.stride, 1),
            ("num_workers", config.num_workers, 0),
            ("prepare_workers", config.prepare_workers, 0),
        )
        if value is not None and value < least
    ]
    faults += said_of_other_data(config)
    if not others:
        faults += said_of_no_files(config, own)
    if config.begin not in ("anywhere", "document"):
        faults.append(f"data.begin={config.begin!r} is none of anywhere, document")
    if not 0 < config.validation_fraction < 1:
        faults.append(f"data.validation_fraction={config.validation_fraction} is not between 0 and 1")
    if faults:
        raise ValueError("; ".join(faults))


OF_READING = ("documents", "separator", "field", "strip_gutenberg")
OF_TEXT = ("files", "mix", "validation_files", *OF_READING)
OF_TEXT += ("normalize", "min_characters", "deduplicate")


def said_of_other_data(config: DataConfig) -> list[str]:
    """What is said of text where ids are named, and of ids where there are none."""
    if config.tokens is None:
        said = f"data.validation_tokens={config.validation_tokens} goes with data.tokens, which is not given"
        return [said] * (config.validation_tokens is not None)
    given = {name: getattr(config, name) for name in OF_TEXT if getattr(config, name) != getattr(DataConfig, name)}
    return [
        f"data.{name}={value} is of text, and data.tokens={config.tokens} is ids already: leave one of them out"
        for name, value in given.items()
    ]


def said_of_no_files(config: DataConfig, own: Collection[str] | None) -> list[str]:
    """What is said of how files are read where no text is files of one's own, so that nothing would come of it."""
    parts = [{"files": config.files, "validation_files": config.validation_files}, *(config.mix or {}).values()]
    has_files = any(part.get(name) is not None for part in parts for name in ("files", "validation_files"))
    if has_files or config.tokens is not None or config.stream is not None:
        return []
    return [
        f"data.{name}={value} says how data.files are read, and there are none: data.source reads its text in its own "
        "way; leave it out, or name files"
        for name in OF_READING
        if (value := getattr(config, name)) != getattr(DataConfig, name) and (own is None or name in own)
    ]
