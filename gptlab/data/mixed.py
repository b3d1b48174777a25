"""The data module of several sources, `data.mix`."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from gptlab.data.corpus import Source
from gptlab.data.mixture import MixedOrder, Mixture, prepare_mixture
from gptlab.data.module import DataConfig, TextDataModule, check, text_source, validation_source
from gptlab.data.tokens import SplitText
from gptlab.data.windows import JoinedWindows
from gptlab.tokenizer import Tokenizer

OF_ALL = (
    *("mix", "stream", "tokens", "validation_tokens", "batch_size", "begin", "stride"),
    *("prepare_workers", "num_workers"),
)
OF_A_SOURCE = tuple(name for name in (field.name for field in fields(DataConfig)) if name not in OF_ALL)


class MixedDataModule(TextDataModule):
    """Windows of several sources, in the shares that `config.mix` gives: {name: {weight, and keys of a DataConfig}}.

    What a source leaves unsaid is as in `config`. Validation scores every held-out window of every source once, as one
    split, and each source's for itself.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: dict[str, Source | None],
        tokenizer: Callable[..., Tokenizer] | Tokenizer,
        block_size: int,
        seed: int,
        cache: Path | None = None,
        tokenizer_source: Source | None = None,
    ):
        self.configs, self.weights = checked(config)
        self.given = sources
        super().__init__(config, None, tokenizer, block_size, seed, cache, tokenizer_source)

    def named(self, source: Source | None) -> dict[str, Source]:
        given = self.given
        return {name: text_source(own, given.get(name), f"data.mix.{name}") for name, own in self.configs.items()}

    @property
    def source(self) -> None:
        """No text is the one that all windows are of, even if only one is named."""
        return

    @property
    def source_names(self) -> list[str]:
        return list(self.sources)

    def prepare_data(self) -> None:
        if self.prepared is not None:
            return
        texts = {
            name: SplitText(source, validation_source(own, f"data.mix.{name}"), own.validation_fraction)
            for (name, source), own in zip(self.sources.items(), self.configs.values(), strict=True)
        }
        self.prepared = prepare_mixture(
            texts,
            self.weights,
            self.build_tokenizer,
            cache=self.cache,
            workers=self.config.prepare_workers,
            tokenizer_source=self.tokenizer_source,
        )

    def cut_windows(self) -> None:
        assert isinstance(self.prepared, Mixture)
        both = [
            self.windows_of(prepared, self.configs[name], of=f" of data.mix.{name}")
            for name, prepared in self.prepared.parts.items()
        ]
        self.train_windows = JoinedWindows([train for train, _ in both], says_which=True)
        self.validation_windows = JoinedWindows([validation for _, validation in both], says_which=True)

    def order(self, accumulate: int = 1, rank: int = 0, world: int = 1) -> MixedOrder:
        counts = dict(zip(self.sources, map(len, self.train_windows.parts), strict=True))
        return MixedOrder(counts, self.weights, self.config.batch_size, accumulate, self.seed, rank, world)


def checked(config: DataConfig) -> tuple[dict[str, DataConfig], dict[str, float]]:
    """The config and the weight of each source of a mixture. Raises ValueError with every value that cannot be."""
    configs, weights, faults = {}, {}, []
    for name, part in config.mix.items():
        own = {key: value for key, value in part.items() if key in OF_A_SOURCE}
        configs[name] = replace(config, **({"mix": None, "files": None, "validation_files": None} | own))
        weights[name] = weight = part["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            faults.append(f"data.mix.{name}.weight={weight!r} must be a number more than 0")
        try:
            check(configs[name], own)
        except ValueError as error:
            faults.append(f"data.mix.{name}: {error}")
    if config.files is not None or config.validation_files is not None:
        faults.append("data.mix has texts of its own: leave data.files and data.validation_files out, or data.mix")
    if faults:
        raise ValueError("; ".join(faults))
    return configs, weights
