"""The law of a ladder: loss as a function of parameters and tokens, fitted to runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean

import torch
from torch import Tensor

STARTS = (0.2, 0.5, 1.0)  # of each exponent


@dataclass(frozen=True)
class Point:
    """What a network of `parameters` had come to after so many `tokens`."""

    parameters: int
    tokens: int
    loss: float  # nats a token, of the whole validation split


def sum_of_both(n: Tensor, d: Tensor, E: Tensor, A: Tensor, a: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, eq. 2)."""
    return E + A * n**-a + B * d**-b


def joint(n: Tensor, d: Tensor, E: Tensor, A: Tensor, a: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """L(N, D) = E + (A / N^(a/b) + B / D)^b (Kaplan et al. 2020, eq. 1.5, above an entropy E).

    A larger network also learns more of each token, as in the sum it does not.
    """
    return E + (A * n ** (-a / b) + B / d) ** b


FORMS = {"sum": sum_of_both, "joint": joint}


@dataclass(frozen=True)
class Law:
    """A form and its constants; N and D are counted in `units`, the largest of the runs that were fitted."""

    form: str
    units: tuple[float, float]
    constants: tuple[float, ...]  # E, A, a, B, b

    def __call__(self, parameters: float, tokens: float) -> float:
        n, d = (torch.tensor(value / unit) for value, unit in zip((parameters, tokens), self.units, strict=True))
        return float(FORMS[self.form](n, d, *torch.tensor(self.constants)))


def fit(points: Sequence[Point], form: str) -> Law:
    """The law of this form with the least squares of relative errors; all constants are positive."""
    counts = [(p.parameters, p.tokens) for p in points]
    if any(len(set(each)) < 3 for each in zip(*counts, strict=True)):
        raise ValueError("a law needs three sizes and three numbers of tokens: add rungs, or validate more often")
    n, d = torch.tensor(counts, dtype=torch.float64).T
    units = (float(n.max()), float(d.max()))
    n, d, loss = n / units[0], d / units[1], torch.tensor([p.loss for p in points], dtype=torch.float64)
    quarter = float(loss.min()) / 4
    starts = [(2 * quarter, quarter, a, quarter, b) for a, b in product(STARTS, STARTS)]
    found = [descend(form, n, d, loss, start) for start in starts]
    return Law(form, units, min(found, key=lambda entry: entry[0])[1])


def descend(form: str, n: Tensor, d: Tensor, loss: Tensor, start: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """The mean square of relative errors, in percent, to which L-BFGS comes from `start`, and the constants there."""
    logs = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logs], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = (100 * (FORMS[form](n, d, *logs.exp()) / loss).log()).square().mean()
        error.backward()
        return error

    optimizer.step(closure)
    error = float(closure().detach())
    return (error if error == error else float("inf")), tuple(logs.detach().exp().tolist())


def percent(predicted: float, actual: float) -> float:
    """How far a prediction is off, in percent of what came."""
    return 100 * (predicted / actual - 1)


def shared(law: Law, runs: Sequence[Sequence[Point]]) -> dict[int, float]:
    """The mean of loss over law at each number of tokens, of the longest of `runs`: the same ones everywhere.

    All runs read the same windows in the same order: what they read last lifts or lowers all of them alike, and so it
    will a larger run. What the law itself misses of these runs is in it too.
    """
    ends = [max(point.tokens for point in run) for run in runs]
    ratios: dict[int, list[float]] = {}
    for run, end in zip(runs, ends, strict=True):
        for point in run if end == max(ends) else ():
            ratios.setdefault(point.tokens, []).append(point.loss / law(point.parameters, point.tokens))
    return {tokens: mean(found) for tokens, found in ratios.items()}


def rehearse(runs: Sequence[Sequence[Point]], form: str) -> list[float]:
    """How far off, in percent, what the runs of at most two thirds of its size say is at each point of the last."""
    others = [run for run in runs[:-1] if 3 * run[0].parameters <= 2 * runs[-1][0].parameters]
    if len(others) < 3:
        raise ValueError("a ladder needs four rungs at least: three sizes for a law, and one half as large again")
    law = fit([point for run in others for point in run], form)
    lift = shared(law, others)
    return [percent(law(p.parameters, p.tokens) * lift.get(p.tokens, 1.0), p.loss) for p in runs[-1]]
