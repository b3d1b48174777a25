"""A ladder recovers a law that is known, puts its prediction on file before what it predicts, and keeps it there."""

import json
import re
from datetime import datetime
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from conftest import REPOSITORY, compose, door

from experiments.ladder import recipes, stages
from experiments.ladder.law import FORMS, Law, Point, fit, percent, rehearse, shared
from gptlab import checks
from gptlab.jobs import Job

RECIPES = "ladder/recipes"
SIZES, TOKENS = (20_000, 80_000, 190_000, 330_000), range(100_000, 1_000_001, 100_000)
LAWS = {
    "sum": Law("sum", (1.0, 1.0), (1.7, 400.0, 0.34, 410.0, 0.28)),
    "joint": Law("joint", (1.0, 1.0), (1.7, 1500.0, 0.4, 40_000.0, 0.5)),
}


def runs_of(law: Law) -> list[list[Point]]:
    return [[Point(n, d, law(n, d)) for d in TOKENS] for n in SIZES]


@pytest.mark.parametrize("form", FORMS)
def test_known_constants_are_recovered(form):
    known, runs = LAWS[form], runs_of(LAWS[form])
    found = fit([point for run in runs for point in run], form)
    E, _, a, _, b = found.constants
    assert (E, a, b) == pytest.approx((known.constants[0], known.constants[2], known.constants[4]), rel=0.01)
    for factor in (1, 4, 100):
        assert percent(found(factor * 10**6, factor * 10**7), known(factor * 10**6, factor * 10**7)) == pytest.approx(
            0, abs=0.02
        )


def test_forms_are_what_their_papers_say():
    n, d, constants = torch.tensor(2e4), torch.tensor(3e5), torch.tensor([1.5, 90.0, 0.4, 400.0, 0.3])
    E, A, a, B, b = constants.tolist()
    assert float(FORMS["sum"](n, d, *constants)) == pytest.approx(E + A / 2e4**a + B / 3e5**b)
    assert float(FORMS["joint"](n, d, *constants)) == pytest.approx(E + (A / 2e4 ** (a / b) + B / 3e5) ** b)


def test_rehearsal_tells_the_form():
    """Of runs that follow one form, the other predicts the largest worse."""
    for form in FORMS:
        worst = {name: max(map(abs, rehearse(runs_of(LAWS[form]), name))) for name in FORMS}
        assert min(worst, key=worst.get) == form
    with pytest.raises(ValueError, match="four rungs"):
        rehearse(runs_of(LAWS["sum"])[:3], "sum")


def test_what_all_runs_share_is_told_from_their_law():
    lifts = {tokens: 1.02 if tokens // 100_000 % 2 else 0.98 for tokens in TOKENS}
    runs = [[Point(p.parameters, p.tokens, p.loss * lifts[p.tokens]) for p in run] for run in runs_of(LAWS["joint"])]
    assert shared(LAWS["joint"], runs) == pytest.approx(lifts)
    shorter = [[Point(p.parameters, p.tokens, 2 * p.loss) for p in run[:-1]] for run in runs]
    assert shared(LAWS["joint"], [runs[0], *shorter]) == pytest.approx(lifts), "of the longest alone"
    law = fit([point for run in runs[:-1] for point in run], "joint")
    alone = max(abs(percent(law(point.parameters, point.tokens), point.loss)) for point in runs[-1])
    assert max(map(abs, rehearse(runs, "joint"))) < 0.5 < 1.5 < alone, "what they share is left out of the rehearsal"


def test_too_few_sizes_are_no_law():
    with pytest.raises(ValueError, match="three sizes"):
        fit([point for run in runs_of(LAWS["sum"])[:2] for point in run], "sum")


def test_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    said = stages.commit()
    assert said is None or len(said.rstrip("+")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stages.commit() is None


def trains_by(law: Law, folder: Path):
    """What a job leaves that learns by this law, and has luck with the windows that all jobs read."""

    def loss(size: int, tokens: int) -> float:
        return law(size, tokens) * (1.005 if tokens // (16 * 64) % 128 == 0 else 0.995)

    def end(job: Job) -> int:
        values = dict(override.split("=") for override in job.overrides)
        width, steps = int(values["model.n_embd"]), int(values.get("trainer.max_steps", 1024))
        every, tokens = int(values.get("validation.every_steps", 64)), 16 * 64
        hidden = int(values.get("model.mlp_width", 8 * width // 3))
        size = 3 * (4 * width**2 + 3 * width * hidden + 2 * width + 2 * 12) + width
        assert (folder / "prediction.json").exists() == (width == 192)
        run = Path(job.run_dir)
        run.mkdir()
        (run / "train.log").write_text(f"{datetime.now():%Y-%m-%d %H:%M:%S,%f}"[:23] + " INFO a first word\n")
        history = [{"step": s, "val_loss": loss(size, s * tokens)} for s in range(every, steps + 1, every)]
        result = {"status": "completed", "params_non_embedding": size, "train_tokens": steps * tokens, "steps": steps}
        (run / "result.json").write_text(json.dumps(result | {"history": history}))
        return 0

    return end


def test_larger_runs_are_predicted_before_they_begin(composed, tmp_path, capfd):
    folder = tmp_path / "ladder"
    commands, code = composed("experiments=ladder", f"run_dir={folder}", ends=trains_by(LAWS["joint"], folder))
    assert code == 0
    assert all(command[-2] == "hydra.mode=RUN" for command in commands), "a job would be a ladder again"
    said = json.loads((folder / "prediction.json").read_text())
    came = json.loads((folder / "outcome.json").read_text())
    assert said["law"]["form"] == "joint"
    assert said["commit"] == stages.commit()
    assert datetime.fromisoformat(said["written"]).tzinfo is not None
    assert came["predicted_before"] is True
    assert len(came["rows"]) == sum(len(run["points"]) for run in said["predicted"]) >= 4
    lifted, alone = (mean(abs(row[f"{name}error_percent"]) for row in came["rows"]) for name in ("", "law_"))
    assert lifted < 0.2 < 0.4 < alone, "half a percent is what they share"
    assert max(row["factor"] for row in came["rows"]) > 4
    before = (folder / "prediction.json").read_bytes()
    again = ("experiments=ladder", f"run_dir={folder}", "resume=auto")
    assert composed(*again) == ([], 0), "all is done"
    assert (folder / "prediction.json").read_bytes() == before
    result = next(folder.glob("0_*/result.json"))
    result.write_text(result.read_text().replace('"val_loss": ', '"val_loss": 1'))
    capfd.readouterr()
    assert composed(*again) == ([], 2)
    assert "of other runs, and is kept" in capfd.readouterr().err
    (folder / "prediction.json").unlink()
    assert composed(*again) == ([], 2)
    assert "runs that were to be predicted" in capfd.readouterr().err


def test_a_failed_rung_ends_the_ladder(composed, tmp_path):
    commands, code = composed("experiments=ladder", f"run_dir={tmp_path}/ladder", codes=(0, 1, *[0] * 5))
    assert (len(commands), code) == (7, 1)
    assert not (tmp_path / "ladder/prediction.json").exists()


def test_a_ladder_takes_overrides_that_it_does_not_choose_itself(composed, tmp_path, capfd):
    folder = tmp_path / "ladder"
    commands, _ = composed("experiments=ladder", "model.mlp=gelu", f"run_dir={folder}", codes=(1,) * 7)
    assert all("model.mlp=gelu" in command for command in commands)
    for fault, said in (
        ("model.n_embd=64", "model.n_embd=64: this sweep chooses that itself"),
        ("seed=1,2", "seed: hydra/sweeper=staged takes one value of it"),
        ("hydra.sweeper.stages._target_=os.system", "trust=os"),
        ("hydra.sweeper.stages=null", "hydra.sweeper.stages._target_="),
    ):
        assert composed("experiments=ladder", fault, f"run_dir={tmp_path}/other") == ([], 2)
        assert said in capfd.readouterr().err
    again = composed("experiments=ladder", "model.mlp=swiglu", f"run_dir={folder}", "resume=auto")
    assert again == ([], 2)
    assert "holds another sweep" in capfd.readouterr().err


def test_function_of_the_readme_runs_as_it_stands(composed, tmp_path, monkeypatch):
    said = (REPOSITORY / "README.md").read_text()
    (program,) = re.findall(r"^```python\n(def halve.*?)^```", said, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"is `python -m gptlab.train -m (.*halve)`", said)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)

    def end(job: Job) -> int:
        rate = float(job.varied[0].partition("=")[2])
        Path(job.run_dir).mkdir()
        (Path(job.run_dir) / "result.json").write_text(
            json.dumps({"status": "completed", "val_loss": abs(rate - 4e-3)})
        )
        return 0

    commands, code = composed(*command.split(), f"run_dir={tmp_path}/halved", ends=end)
    assert (len(commands), code) == (5, 0)
    assert commands[-1][:2] == ["optimizer.lr=0.004", "trainer.max_steps=400"]


def test_recipes_are_compared_at_both_scales(composed, tmp_path):
    def end(job: Job) -> int:
        small, run = "model.n_embd=24" in job.overrides, Path(job.run_dir)
        loss = 4.0 - small + 0.01 * (job.number % 14)
        if "model.mlp=gelu" in job.overrides and small:
            loss = 0.0
        run.mkdir()
        (run / "result.json").write_text(json.dumps({"status": "completed", "val_loss": loss}))
        return 0

    commands, code = composed("experiments=ladder/recipes", f"run_dir={tmp_path}/recipes", ends=end)
    assert (len(commands), code) == (28, 0)
    said = json.loads((tmp_path / "recipes/choices.json").read_text())
    assert (len(said["losses"]), said["pairs"]) == (12, 66)
    assert 0.5 < said["agreed"] < 1


SWEEPS = {
    name: yaml.safe_load((REPOSITORY / "experiments" / f"{name}.yaml").read_text()) for name in ("ladder", RECIPES)
}


@pytest.mark.parametrize(
    "recipe", SWEEPS[RECIPES]["hydra"]["sweeper"]["stages"]["recipes"].items(), ids=lambda pair: pair[0]
)
def test_every_recipe_fits_its_classes(recipe):
    checks.check_targets(compose("experiments=ladder/rung", *recipe[1].split()), ())


@pytest.mark.parametrize("part", ["rungs", "held_out"])
def test_every_rung_fits_its_classes(part):
    for rung in SWEEPS["ladder"]["hydra"]["sweeper"]["stages"][part]:
        checks.check(compose("experiments=ladder/rung", *rung.split()))


def test_choices_by_hand():
    """Three recipes, the first with two more seeds: it stands with their mean, and the noise is theirs."""
    said = recipes.choices(["a", "b", "c"], [1.0, 1.5, 0.9, 1.1, 1.2], [2.0, 2.9, 2.2, 2.1, 2.2])
    assert said["losses"]["a"] == pytest.approx({"small": 1.1, "large": 2.1})
    assert said["seed_noise"] == pytest.approx({"small": 0.1, "large": 0.1})
    assert (said["pairs"], said["clear_pairs"]) == (3, 2), "a and c are 0.1 apart, less than 2 sqrt(2) 0.1"
    assert (said["agreed"], said["clear_agreed"]) == (pytest.approx(2 / 3), 1.0)


@pytest.mark.slow
def test_a_ladder_by_the_real_command(text_file, tmp_path):
    text_file.write_text(text_file.read_text() * 20)
    words = "'model.n_embd={} model.n_head=1 trainer.max_steps=12 validation.every_steps=3'"
    small = (
        *("tokenizer.vocab_size=330", f"data.files={text_file}", "data.validation_fraction=0.1", "model.n_layer=1"),
        *("trainer.precision=32-true", "schedule.warmup_steps=2", "logger=csv", "hydra.sweeper.stages.from_step=3"),
        "hydra.sweeper.stages.rungs=[" + ",".join(words.format(width) for width in (8, 16, 24, 32)) + "]",
        f"hydra.sweeper.stages.held_out=[{words.format(48)}]",
    )
    done = door("train", "experiments=ladder", *small, f"run_dir={tmp_path}/ladder", timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "ladder/prediction.json").read_text())
    came = json.loads((tmp_path / "ladder/outcome.json").read_text())
    assert came["predicted_before"] is True
    assert [row["predicted"] for row in came["rows"]] == [point["loss"] for point in said["predicted"][0]["points"]]
    for row in came["rows"]:
        assert row["error_percent"] == pytest.approx(100 * (row["predicted"] / row["actual"] - 1))
    run = next((tmp_path / "ladder").glob("4_*"))
    held_out = words.format(48).strip("'").split()
    longer = ("experiments=ladder", "hydra.mode=RUN", *small[:-3], *held_out, "trainer.max_steps=15")
    done = door("train", f"resume={run}", *(word for word in longer if word != "trainer.max_steps=12"))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 15
