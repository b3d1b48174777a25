"""Many continuations at a time: the same as one after another, and each from its own seed."""

import pytest
import torch
from test_engine import build

from gptlab.evaluate.writing import written
from gptlab.loading import Loaded
from gptlab.sampling import Sampling
from gptlab.tokenizer import ByteTokenizer


@pytest.fixture
def loaded(tmp_path) -> Loaded:
    return Loaded(build(vocab_size=269), ByteTokenizer(), tmp_path)


PROMPTS = [[2], [2, 30, 31], [2, 40], [2, 90, 91, 92, 93, 94], [2, 20]]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_texts_do_not_depend_on_how_many_are_written_at_a_time(loaded, rows):
    for sampling in (Sampling(temperature=0), Sampling(seed=3)):
        alone = [
            written(loaded, [prompt], 9, Sampling(**vars(sampling) | {"seed": sampling.seed and 3 + number}), [], 1)[0]
            for number, prompt in enumerate(PROMPTS)
        ]
        assert written(loaded, PROMPTS, 9, sampling, [], rows) == alone
    assert len({text for text, _ in alone}) == len(alone)


def test_memory_that_holds_no_numbers_yet_does_not_matter(loaded, monkeypatch):
    """A cache is memory as it is found: what one row has not filled stands beside what another has."""
    expected = written(loaded, PROMPTS, 9, Sampling(temperature=0), [], 4)
    empty = torch.empty
    monkeypatch.setattr("torch.empty", lambda *shape, **settings: empty(*shape, **settings).fill_(torch.nan))
    assert written(loaded, PROMPTS, 9, Sampling(temperature=0), [], 4) == expected


def test_a_text_says_whether_it_ends_by_itself(loaded):
    (text, ends), *_ = written(loaded, [[2]], 5, Sampling(temperature=0), [], 1)
    assert not ends
    assert written(loaded, [[2]], 5, Sampling(temperature=0), [text[2]], 1) == [(text[: text.index(text[2])], True)]
