"""From the logits of a position to a token. Shapes: V vocabulary, or what is left of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; as transformers', in this order. The defaults draw from the network's own distribution."""

    repetition_penalty: float = 1.0  # divides the logits, if positive, of tokens that were there, or multiplies them
    temperature: float = 1.0  # divides all logits; 0 takes the likeliest token
    top_k: int | None = None  # of the k likeliest tokens alone
    top_p: float = 1.0  # of the likeliest that together have this probability (Holtzman et al. 2019)
    min_p: float = 0.0  # of those that have this share of the likeliest's probability (Nguyen et al. 2024)
    seed: int | None = None  # None: another one each time

    def __post_init__(self) -> None:
        """Raises ValueError that names the field, its value, and what it takes."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be from 0.01 to 100; 1 is none")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")

    def generator(self, number: int = 0) -> torch.Generator:
        """The random numbers of sample `number` of a request; the first one's are those of the seed itself."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + number * 0x9E3779B97F4A7C15) % 2**63 if number else self.seed)
        return generator

    def distribution(self, logits: Tensor, seen: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """The ids that may be drawn (None: all, in order) and what each is worth, unnormalised, in float32.

        `logits` (V,); `seen` (V,) is true for the tokens that were there. Raises ValueError if the logits are NaN.
        """
        logits = logits.float()
        if self.repetition_penalty != 1 and seen is not None:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            ids = logits.argmax(dim=-1, keepdim=True)
            if not math.isfinite(logits[ids]):
                raise ValueError(NOT_FINITE)
            return ids, torch.ones(1)
        ids = None
        if self.top_k is not None and self.top_k < len(logits):
            logits, ids = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, ids = logits.sort(descending=True)
        highest = logits.max()
        if not math.isfinite(highest):
            raise ValueError(NOT_FINITE)
        weights = ((logits - highest) / max(self.temperature, COLDEST)).exp()
        if self.top_p < 1:
            before = weights.cumsum(0) - weights
            before[0] = -1  # the likeliest stays, however small top_p is
            weights = weights.where(before < self.top_p * weights.sum(), 0)
        if self.min_p > 0:
            weights = weights.where(weights >= self.min_p, 0)  # the likeliest has weight 1
        return ids, weights

    def draw(self, logits: Tensor, generator: torch.Generator, seen: Tensor | None = None) -> int:
        """One token id of `logits` (V,)."""
        ids, weights = self.distribution(logits, seen)
        if len(weights) == 1:
            return int(ids[0])
        sums = weights.double().cumsum(0)
        place = torch.searchsorted(
            sums, sums[-1] * torch.rand((), dtype=torch.float64, generator=generator), right=True
        )
        return int(place) if ids is None else int(ids[place])


COLDEST = 1e-30  # a temperature below this is 0 in float32
NOT_FINITE = "the network's logits are not finite: its weights are damaged, or its training went wrong"
