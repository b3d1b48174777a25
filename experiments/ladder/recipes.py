"""How often a small scale picks the better of two recipes: all of them at both scales, and the noise of seeds."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.ladder.stages import Compose, Jobs, Results
from gptlab.run import write_json


def compare(
    folder: Path, compose: Compose, small: str, large: str, recipes: dict[str, str], seeds: list[int]
) -> Iterator[Jobs]:
    """Train every recipe at both scales, the first also with other `seeds`; how often the small one picks the better.

    choices.json keeps the losses, and the share of pairs whose order at the small scale is that at the large one: of
    all, and of those that differ at the large scale by more than twice the noise that seeds give a difference.
    """
    first = next(iter(recipes.values()))
    runs = [*(words.split() for words in recipes.values()), *([*first.split(), f"seed={seed}"] for seed in seeds)]
    losses = []
    for scale in (small, large):
        results: Results = yield [[*scale.split(), *run] for run in runs]
        losses.append([result["val_loss"] for result in results])
    write_json(folder / "choices.json", choices(list(recipes), *losses))
    print((folder / "choices.json").read_text(), flush=True)


def choices(names: list[str], small: list[float], large: list[float]) -> dict[str, Any]:
    """What the losses of recipes at two scales say; those after the recipes are of the first one's other seeds."""
    count = len(names)
    noise = [stdev([losses[0], *losses[count:]]) for losses in (small, large)]
    centred = [[mean([losses[0], *losses[count:]]), *losses[1:count]] for losses in (small, large)]
    pairs = list(combinations(range(count), 2))
    agree = {(i, j): (centred[0][i] < centred[0][j]) == (centred[1][i] < centred[1][j]) for i, j in pairs}
    clear = [(i, j) for i, j in pairs if abs(centred[1][i] - centred[1][j]) > 2 * 2**0.5 * noise[1]]
    return {
        "losses": {name: {"small": a, "large": b} for name, a, b in zip(names, *centred, strict=True)},
        "seed_noise": {"small": noise[0], "large": noise[1]},
        "pairs": len(pairs),
        "agreed": sum(agree.values()) / len(pairs),
        "clear_pairs": len(clear),
        "clear_agreed": sum(agree[pair] for pair in clear) / len(clear) if clear else None,
    }
