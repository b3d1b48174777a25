"""Distributions over texts whose probabilities are known: state machines of prefix-free alternatives.

Where no alternative at a state begins another, a text has one derivation, and its probability is the product of its
choices; the entropy follows by recursion over the states, which must not come round to themselves.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gptlab.data.corpus import Optimum


class Choice(NamedTuple):
    """One alternative: its text, and the state after it. A `then` begins where what `state` leads to has ended."""

    probability: float
    text: str
    state: Any
    kind: str  # grammar, recall, arithmetic, counting
    fact: str | None = None  # what it tells of: new with kind grammar, again with recall
    then: Any = None


class Measures(NamedTuple):
    """Of all that may follow a state, exactly: entropy in nats, the expected length, and the greatest, in bytes."""

    entropy: float
    mean_bytes: float
    most_bytes: int


class Grammar:
    """A state machine as a distribution over texts. Raises ValueError, naming the state, where it is none."""

    def __init__(self, step: Callable[[Any], list[Choice]], start: Any):
        self.step, self.start = step, start
        self.alternatives = lru_cache(maxsize=2**14)(self._alternatives)  # those of all states would fill 100 MB
        self.measures = cache(self._measures)

    def _alternatives(self, state: Any) -> list[Choice]:
        choices = self.step(state)
        if choices and not math.isclose(total := sum(choice.probability for choice in choices), 1, abs_tol=1e-9):
            raise ValueError(f"{state}: the probabilities sum to {total}")
        texts = sorted(choice.text.encode() for choice in choices)
        for one, other in pairwise(texts):  # a prefix stands right before what it begins
            if other.startswith(one):
                raise ValueError(f"{state}: {one.decode()!r} begins {other.decode()!r}: a text has two derivations")
        if b"" in texts:
            raise ValueError(f"{state}: a choice has no text")
        return choices

    def _measures(self, state: Any) -> Measures:
        entropy, mean, most = 0.0, 0.0, 0
        for choice in self._alternatives(state):  # each state comes up once
            follow = [self.measures(choice.state)] + ([self.measures(choice.then)] if choice.then is not None else [])
            size = len(choice.text.encode())
            entropy += choice.probability * (sum(part.entropy for part in follow) - math.log(choice.probability))
            mean += choice.probability * (size + sum(part.mean_bytes for part in follow))
            most = max(most, size + sum(part.most_bytes for part in follow))
        return Measures(entropy, mean, most)

    def sample(self, rng: random.Random) -> list[Choice]:
        """A derivation; its text is that of its choices, one after the other."""

        def draw(choices: list[Choice]) -> Choice:
            at = rng.random()
            for choice in choices:
                at -= choice.probability
                if at < 0:
                    return choice
            return choices[-1]

        return [choice for _, choice in self._walk(draw)]

    def parse(self, text: str) -> list[Choice]:
        """The derivation of `text`. Raises ValueError if it has none."""
        return [choice for _, choice in self._follow(text)]

    def optimum(self, text: str) -> Optimum:
        """What the best possible model makes of `text`; its end is certain. Raises ValueError if it cannot come up."""
        nll: list[float] = []
        kinds: list[str] = []
        distances: list[int] = []
        told: dict[str, int] = {}  # where each fact stood last
        for choices, choice in self._follow(text):
            start, content = len(nll), choice.text.encode()
            distance = start - told[choice.fact] if choice.kind == "recall" else -1
            alive, mass = [(other.text.encode(), other.probability) for other in choices], 1.0
            for place in range(len(content)):
                alive = [(other, p) for other, p in alive if other[place : place + 1] == content[place : place + 1]]
                left = sum(p for _, p in alive) if len(alive) > 1 else choice.probability
                nll.append(math.log(mass / left))
                mass = left
            kinds += [choice.kind] * len(content)
            distances += [distance] * len(content)
            if choice.fact is not None:
                told[choice.fact] = start
        return Optimum(np.array([*nll, 0.0]), np.array([*kinds, "grammar"]), np.array([*distances, -1]))

    def _follow(self, text: str) -> Iterator[tuple[list[Choice], Choice]]:
        at = 0

        def find(choices: list[Choice]) -> Choice:
            nonlocal at
            for choice in choices:
                if text.startswith(choice.text, at):
                    at += len(choice.text)
                    return choice
            raise ValueError(f"no text of this grammar: {text[:at]!r} cannot go on with {text[at : at + 20]!r}")

        yield from self._walk(find)
        if at < len(text):
            raise ValueError(f"no text of this grammar: {text[:at]!r} is whole, and {text[at : at + 20]!r} follows")

    def _walk(self, choose: Callable[[list[Choice]], Choice]) -> Iterator[tuple[list[Choice], Choice]]:
        waiting = [self.start]
        while waiting:
            choices = self.alternatives(waiting.pop())
            if not choices:
                continue
            choice = choose(choices)
            waiting += [choice.state] if choice.then is None else [choice.then, choice.state]
            yield choices, choice
