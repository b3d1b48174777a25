"""The sample that tokenizers learn from: bounded, from all over the text, and the same each time."""

import numpy as np
from kinds import train

from gptlab.chunks import chunks, sample, size


def test_the_training_sample_is_kept_to_its_budget_and_repeats():
    parts = [f"{i:03} " * 100 for i in range(200)]
    kept = sample(iter(parts), 4000, seed=1)
    assert kept == sorted(kept)
    assert len(kept) == len(set(kept)) == 10
    assert kept == sample(iter(parts), 4000, seed=1) != sample(iter(parts), 4000, seed=2)
    assert 60 < np.mean([int(chunk[:3]) for chunk in sample(iter(parts), 40_000, seed=1)]) < 140  # from all over
    assert sample(iter(parts), 10**6, seed=1) == parts
    one, same, other = (train("bpe", max_train_bytes=40_000, seed=seed).fingerprint for seed in (1, 1, 2))
    assert one == same != other


def test_chunks_are_the_text_in_pieces():
    for text in ("", "a" * 10_000, "word " * 3000, "line\n" * 3000, "\n" * 9000):
        pieces = list(chunks(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 4096
    assert all(piece.endswith("\n") for piece in chunks("line\n" * 3000))
    assert size("\u00e9\ud800") == 5
