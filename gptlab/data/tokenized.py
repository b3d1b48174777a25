"""The data module of text that is token ids already, `data.tokens`."""

from gptlab.data.corpus import Source
from gptlab.data.ids import prepare_ids, ready
from gptlab.data.module import TextDataModule


class TokenizedDataModule(TextDataModule):
    """Windows of files of ids, which stay where they are. No text is read, so `sources` has none."""

    again = False  # whether to read all ids even if they were read before, and checked

    def named(self, source: Source | None) -> dict[str, Source]:
        return {}

    def prepare_data(self) -> None:
        if self.prepared is not None:
            return
        self.prepared = prepare_ids(
            self.config.tokens,
            ready(self.build_tokenizer, self.config.tokens),
            validation_files=self.config.validation_tokens,
            validation_fraction=self.config.validation_fraction,
            cache=self.cache,
            again=self.again,
        )
