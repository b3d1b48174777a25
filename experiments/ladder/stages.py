"""What a ladder runs, stage by stage: rungs, a prediction on file, and only then the runs that were predicted."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from experiments.ladder.law import FORMS, Law, Point, fit, percent, rehearse
from gptlab.config import model_config
from gptlab.cost import count_parameters
from gptlab.model import GPT
from gptlab.run import write_json

Jobs, Results = list[list[str]], list[dict[str, Any]]
Compose = Callable[[list[str]], dict[str, Any]]


def ladder(folder: Path, compose: Compose, rungs: list[str], held_out: list[str], from_step: int) -> Iterator[Jobs]:
    """Train `rungs`, predict `held_out` in prediction.json, train those, and compare in outcome.json.

    Each is the overrides of one run, as typed. All that a rung validates from `from_step` on are points of the law. The
    largest comes last: the form of the law that predicts it best from the others is the one that goes further.
    """
    results: Results = yield [rung.split() for rung in rungs]
    runs = [points_of(result, from_step) for result in results]
    fitted = [point for run in runs for point in run]
    rehearsals = {form: rehearse(runs, form) for form in FORMS}
    law = fit(fitted, min(rehearsals, key=lambda form: max(map(abs, rehearsals[form]))))
    predicted = [predict(law, compose(run.split())) for run in held_out]
    written = write_once(
        folder / "prediction.json",
        {
            "law": asdict(law),
            "fitted": [asdict(point) | {"law": law(point.parameters, point.tokens)} for point in fitted],
            "rehearsal_percent": rehearsals,
            "predicted": [
                {"run": run, "points": list(map(asdict, at))} for run, at in zip(held_out, predicted, strict=True)
            ],
        },
        begun=len(results) < sum(path.is_dir() for path in folder.iterdir()),
    )
    results = yield [run.split() for run in held_out]
    began = [began_at(Path(result["run_dir"])) for result in results]
    largest = max(point.parameters * point.tokens for point in fitted)
    rows = [
        compared(guess, came, largest) | {"run": run}
        for run, guesses, result in zip(held_out, predicted, results, strict=True)
        for guess, came in zip(guesses, points_of(result, 0), strict=True)
    ]
    is_before = all(datetime.fromisoformat(written) < time for time in began)
    head = {"predicted": written, "began": [time.isoformat() for time in began], "predicted_before": is_before}
    write_json(folder / "outcome.json", head | {"rows": rows})
    show(rows)


def points_of(result: dict[str, Any], from_step: int) -> list[Point]:
    """The validations of a run from `from_step` on."""
    tokens_a_step = result["train_tokens"] // result["steps"]
    history = [entry for entry in result["history"] if entry["step"] >= from_step]
    return [
        Point(result["params_non_embedding"], entry["step"] * tokens_a_step, entry["val_loss"]) for entry in history
    ]


def predict(law: Law, cfg: dict[str, Any]) -> list[Point]:
    """What each validation of a run will say."""
    node, trainer, every = model_config(cfg["model"]), cfg["trainer"], cfg["validation"]["every_steps"]
    node.vocab_size = node.vocab_size or 1  # a tokenizer's; it changes the embedding alone
    with torch.device("meta"):
        parameters = count_parameters(GPT(node))[1]
    a_step = cfg["data"]["batch_size"] * trainer["accumulate_grad_batches"] * node.block_size
    steps = sorted({*range(every, trainer["max_steps"], every), trainer["max_steps"]})
    return [Point(parameters, step * a_step, law(parameters, step * a_step)) for step in steps]


def write_once(path: Path, content: dict[str, Any], begun: bool) -> str:
    """Write a prediction with its time and commit, unless just this one is there: the time when it was written.

    Raises ValueError where another is, or where what it predicts has `begun`.
    """
    if path.exists():
        there = json.loads(path.read_text())
        if {key: there.get(key) for key in content} != content:
            raise ValueError(f"{path} was written at {there.get('written')} and says something else; it is kept")
        return there["written"]
    if begun:
        raise ValueError(
            f"{path.parent} holds runs that were to be predicted, and no prediction; choose another run_dir"
        )
    written = datetime.now().astimezone().isoformat(timespec="milliseconds")
    write_json(path, {"written": written, "commit": commit(), **content})
    print(f"the larger runs are predicted in {path}", flush=True)
    return written


def commit() -> str | None:
    """The commit of this code, with a + where files were changed since; None where it is in no repository."""
    if shutil.which("git") is None:
        return None
    words = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    said = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or None


def began_at(run: Path) -> datetime:
    """When a run said its first word."""
    first = (run / "train.log").read_text()[:23]
    return datetime.strptime(first, "%Y-%m-%d %H:%M:%S,%f").astimezone()


def compared(guess: Point, came: Point, largest: float) -> dict[str, float]:
    """A prediction beside what came; `factor` is the compute, N D, over that of the largest rung."""
    assert (guess.parameters, guess.tokens) == (came.parameters, came.tokens)
    return {
        "factor": guess.parameters * guess.tokens / largest,
        "tokens": guess.tokens,
        "predicted": guess.loss,
        "actual": came.loss,
        "error_percent": percent(guess.loss, came.loss),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'run':<50} {'tokens':>10} {'compute':>8} {'predicted':>9} {'actual':>8} {'error':>8}")
    for row in rows:
        figures = f"{row['predicted']:>9.4f} {row['actual']:>8.4f} {row['error_percent']:>+7.2f}%"
        print(f"{row['run']:<50} {row['tokens']:>10,} {row['factor']:>7.1f}x {figures}", flush=True)


def recipes(
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
