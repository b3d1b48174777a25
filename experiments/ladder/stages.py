"""What a ladder runs, stage by stage: rungs, a prediction on file, and only then the runs that were predicted."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from experiments.ladder.law import FORMS, Law, Point, fit, percent, rehearse, shared
from gptlab.config import model_config, trusted
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
    code = commit()  # now: the files may change while rungs are trained
    results: Results = yield [rung.split() for rung in rungs]
    runs = [points_of(result, from_step) for result in results]
    fitted = [point for run in runs for point in run]
    path, others = folder / "prediction.json", sum(path.is_dir() for path in folder.iterdir()) - len(results)
    if path.exists():
        said = kept(path, fitted, held_out)
    elif others:
        raise ValueError(f"{folder} holds runs that were to be predicted, and no prediction; choose another run_dir")
    else:
        said = prediction(runs, {run: compose(run.split()) for run in held_out}, code)
        write_json(path, said)
        print(f"the larger runs are predicted in {path}", flush=True)
    results = yield [run.split() for run in held_out]
    began = [began_at(Path(result["run_dir"])) for result in results]
    largest = max(point.parameters * point.tokens for point in fitted)
    rows = [
        compared(guess, came, largest) | {"run": run["run"]}
        for run, result in zip(said["predicted"], results, strict=True)
        for guess, came in zip(run["points"], points_of(result, 0), strict=True)
    ]
    is_before = all(datetime.fromisoformat(said["written"]) < time for time in began)
    head = {"predicted": said["written"], "began": [time.isoformat() for time in began], "predicted_before": is_before}
    write_json(folder / "outcome.json", head | {"rows": rows})
    show(rows)


def points_of(result: dict[str, Any], from_step: int) -> list[Point]:
    """The validations of a run from `from_step` on."""
    tokens_a_step = result["train_tokens"] // result["steps"]
    history = [entry for entry in result["history"] if entry["step"] >= from_step]
    return [
        Point(result["params_non_embedding"], entry["step"] * tokens_a_step, entry["val_loss"]) for entry in history
    ]


def prediction(runs: list[list[Point]], held_out: dict[str, dict[str, Any]], code: str | None) -> dict[str, Any]:
    """What is known now: the law of the rungs, and what it says of the configs of larger runs."""
    fitted = [point for run in runs for point in run]
    rehearsals = {form: rehearse(runs, form) for form in FORMS}
    law = fit(fitted, min(rehearsals, key=lambda form: max(map(abs, rehearsals[form]))))
    lift = shared(law, runs)
    return {
        "written": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "commit": code,
        "law": asdict(law),
        "rehearsal_percent": rehearsals,
        "shared": lift,
        "fitted": [asdict(point) for point in fitted],
        "predicted": [{"run": run, "points": predict(law, lift, cfg)} for run, cfg in held_out.items()],
    }


def predict(law: Law, lift: dict[int, float], cfg: dict[str, Any]) -> list[dict[str, float]]:
    """What each validation of a run will say: the law, and that lifted by what rungs share after as many tokens."""
    node, trainer, every = model_config(cfg["model"]), cfg["trainer"], cfg["validation"]["every_steps"]
    node.vocab_size = node.vocab_size or 1  # a tokenizer's; it changes the embedding alone
    with torch.device("meta"):
        parameters = count_parameters(GPT(node, trusted(cfg)))[1]
    a_step = cfg["data"]["batch_size"] * trainer["accumulate_grad_batches"] * node.block_size
    steps = sorted({*range(every, trainer["max_steps"], every), trainer["max_steps"]})
    found = [(count, law(parameters, count)) for count in (step * a_step for step in steps)]
    return [asdict(Point(parameters, count, loss * lift.get(count, 1.0))) | {"law": loss} for count, loss in found]


def kept(path: Path, fitted: list[Point], held_out: list[str]) -> dict[str, Any]:
    """The prediction that is on file, which nothing overwrites. Raises ValueError where it is of other runs."""
    said = json.loads(path.read_text())
    then = [Point(point["parameters"], point["tokens"], point["loss"]) for point in said["fitted"]]
    if then != fitted or [run["run"] for run in said["predicted"]] != held_out:
        raise ValueError(f"{path} was written at {said['written']} of other runs, and is kept; choose another run_dir")
    return said


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


def compared(guess: dict[str, Any], came: Point, largest: float) -> dict[str, float]:
    """A prediction beside what came; `factor` is the compute, N D, over that of the largest rung."""
    assert (guess["parameters"], guess["tokens"]) == (came.parameters, came.tokens)
    return {
        "factor": came.parameters * came.tokens / largest,
        "tokens": came.tokens,
        "predicted": guess["loss"],
        "actual": came.loss,
        "error_percent": percent(guess["loss"], came.loss),
        "law_error_percent": percent(guess["law"], came.loss),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'run':<50} {'tokens':>10} {'compute':>8} {'predicted':>9} {'actual':>8} {'error':>8} {'of law':>8}")
    for row in rows:
        errors = f"{row['error_percent']:>+7.2f}% {row['law_error_percent']:>+7.2f}%"
        figures = f"{row['predicted']:>9.4f} {row['actual']:>8.4f} {errors}"
        print(f"{row['run']:<50} {row['tokens']:>10,} {row['factor']:>7.1f}x {figures}", flush=True)
