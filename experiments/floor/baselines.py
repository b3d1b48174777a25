"""What a compressor and a fitted 5-gram make of the stories, beside their floor.

python -m experiments.floor.baselines
"""

import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from gptlab.data.stories import GRAMMAR, story

ORDER = 5
END = b"\0"


def lzma_bits_per_byte(texts: Sequence[str]) -> float:
    """Of all texts in one archive, at the highest setting."""
    content = "".join(texts).encode()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


class NGram:
    """Bytes by the ORDER - 1 before them, each order smoothed with the one below (Witten and Bell 1991, method C)."""

    def __init__(self, texts: Sequence[str]):
        self.seen: dict[bytes, Counter[int]] = defaultdict(Counter)
        for text in texts:
            content = END * (ORDER - 1) + text.encode() + END
            for at in range(ORDER - 1, len(content)):
                for length in range(ORDER):
                    self.seen[content[at - length : at]][content[at]] += 1

    def nll(self, text: str) -> float:
        """Of the text and its end, in nats."""
        content = END * (ORDER - 1) + text.encode() + END
        total = 0.0
        for at in range(ORDER - 1, len(content)):
            p = 1 / 256
            for length in range(ORDER):
                if (seen := self.seen.get(content[at - length : at])) is not None:
                    p = (seen[content[at]] + len(seen) * p) / (seen.total() + len(seen))
            total -= math.log(p)
        return total


def ngram_excess(training: Sequence[str], held_out: Sequence[str]) -> float:
    """Nats a byte of a fitted 5-gram above the floor, on the same documents."""
    model = NGram(training)
    above = sum(model.nll(text) - GRAMMAR.optimum(text).nll.sum() for text in held_out)
    return above / sum(len(text.encode()) for text in held_out)


def main() -> None:
    texts = [story(seed=1, index=index) for index in range(20_000)]
    exact = GRAMMAR.measures(GRAMMAR.start)
    floor = exact.entropy / exact.mean_bytes
    squeezed = lzma_bits_per_byte(texts)
    print(f"floor: {floor:.4f} nats, {floor / math.log(2):.4f} bits a byte; {exact.entropy:.3f} nats a document of")
    print(f"{exact.mean_bytes:.1f} bytes, {exact.most_bytes} at most")
    print(f"LZMA: {squeezed:.4f} bits a byte, {squeezed * math.log(2) / floor:.2f} times the floor")
    print(f"5-gram: {ngram_excess(texts[:18_000], texts[18_000:]):.4f} nats a byte above it")


if __name__ == "__main__":
    main()
