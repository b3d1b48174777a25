"""How soon a recipe reaches a validation loss: `python benchmarks/time_to_loss.py [--experiment shakespeare_fast]`.

The reference is `experiments=shakespeare_cpu` with nanoGPT's own cosine, eager and in float32: what its user would run.
Its time is that of its 2000 steps alone, at the median step; with `--steps` fewer of them are run, the time is scaled
up, and there is no loss to tell. The experiment's seconds run from its first step to the first validation (of the whole
split) at or below the target, validations included, compilation not; its process, imports and all, is timed when the
compiled code is cached. Then the experiment gets as many steps as fit into the reference's time. All take turns, seed
by seed; samples are off. Shakespeare is downloaded once, or looked for in `GPTLAB_DATA_DIR`.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import default_device, machine, markdown, run_gptlab

REFERENCE_STEPS = 2000
REFERENCE = (
    *("experiments=shakespeare_cpu", "schedule=cosine", "~schedule.decay_fraction", "compile=false"),
    *("trainer.precision=32-true", "validation.every_steps=1000000"),  # and at the end
)


def seconds_to(result: dict[str, Any], target: float) -> float:
    """Training seconds up to the first validation at or below `target`; infinite if there is none."""
    return next((row["seconds"] for row in result["history"] if row["val_loss"] <= target), float("inf"))


def seconds_a_step(result: dict[str, Any]) -> float:
    return result["train_tokens"] / result["steps"] / result["tokens_per_second"]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """Of each contender and seed: seconds, the process's seconds, steps, last val/loss, parameters."""
    rows: dict[str, list[tuple[float, ...]]] = {"reference": [], "experiment": [], "as long": []}

    def run(seed: int, *overrides: str) -> dict[str, Any]:
        return run_gptlab(folder, f"seed={seed}", "samples.every_steps=null", *overrides, *arguments.override)

    def note(name: str, result: dict[str, Any], seconds: float, wall_s: float) -> None:
        rows[name].append((seconds, wall_s, result["steps"], result["val_loss"], result["params"]))
        print(f"  {name}: {rows[name][-1]}", file=sys.stderr, flush=True)

    fast = [f"experiments={arguments.experiment}"]
    own = [f"trainer.max_steps={arguments.fast_steps}"] if arguments.fast_steps else []
    run(1, *fast, "trainer.max_steps=1")  # fills the cache of compiled code
    for seed in range(1, arguments.seeds + 1):
        result = run(seed, *REFERENCE, f"trainer.max_steps={arguments.steps}")
        reference_s = REFERENCE_STEPS * seconds_a_step(result)
        left_s = (REFERENCE_STEPS - arguments.steps) * seconds_a_step(result)
        note("reference", result, reference_s, result["wall_s"] + left_s)
        result = run(seed, *fast, *own)
        note("experiment", result, seconds_to(result, arguments.target), result["wall_s"])
        if arguments.long:
            steps = int(reference_s / seconds_a_step(result))  # validations come on top: the table tells
            result = run(seed, *fast, f"trainer.max_steps={steps}")
            note("as long", result, result["seconds"], result["wall_s"])
    return rows


def median_ratio(ones: list[float], others: list[float]) -> float:
    """Seed by seed."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def show(arguments: argparse.Namespace, rows: dict[str, list[tuple[float, ...]]]) -> str:
    names = {
        "reference": f"`shakespeare_cpu`, eager float32, {REFERENCE_STEPS} steps",
        "experiment": f"`{arguments.experiment}`, to {arguments.target}",
        "as long": f"`{arguments.experiment}`, in the reference's time",
    }
    table = []
    for key, measured in rows.items():
        if not measured:
            continue
        first_s, first_wall_s = (list(column) for column in list(zip(*rows["reference"], strict=True))[:2])
        seconds, walls, steps, losses, params = (list(column) for column in zip(*measured, strict=True))
        is_cut = key == "reference" and arguments.steps < REFERENCE_STEPS
        loss = "not run to its end" if is_cut else ", ".join(f"{loss:.4f}" for loss in losses)
        ratios = [median_ratio(first_s, seconds), median_ratio(first_wall_s, walls)]
        figures = (f"{statistics.median(seconds):.4g}", f"{ratios[0]:.2f}x", f"{statistics.median(walls):.4g}")
        ran = REFERENCE_STEPS if key == "reference" else statistics.median(steps)
        table.append((names[key], f"{params[0]:,.0f}", f"{ran:,.0f}", *figures, f"{ratios[1]:.2f}x", loss))
    header = "| parameters | steps | seconds | faster | process, s | faster | val/loss at the end"
    return markdown(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="shakespeare_fast")
    parser.add_argument("--target", type=float, default=1.88, help="nats")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=REFERENCE_STEPS, help="of the reference that are really run")
    parser.add_argument("--fast-steps", type=int, help="of the experiment; its own number if not given")
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=True, help="also for as long")
    parser.add_argument("override", nargs="*", help="more for gptlab.train, for all: model.n_embd=32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    print(f"{machine(default_device())}, {arguments.seeds} seeds, medians")
    if arguments.steps < REFERENCE_STEPS:
        print(f"the reference's time is scaled up from {arguments.steps} steps")
    print(f"\n{show(arguments, rows)}", flush=True)


if __name__ == "__main__":
    main()
