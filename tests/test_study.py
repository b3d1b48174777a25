"""A study proposes the same trials however often it is interrupted, learns from them, and survives those that fail."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, door

from gptlab import jobs
from gptlab.jobs import Job
from gptlab.signals import Interrupted

pytest.importorskip("optuna")

SPACE = ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.n_layer=choice(2,4)", "model.n_head=range(1,9)")
STUDY = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=16", *SPACE)


def loss(job: Job) -> float:
    """Best at optimizer.lr=1e-3, model.n_layer=4 and model.n_head=3."""
    values = dict(override.split("=") for override in job.varied)
    far = abs(math.log10(float(values["optimizer.lr"])) + 3) + abs(int(values["model.n_head"]) - 3) / 4
    return far + (values["model.n_layer"] == "2")


def finished(job: Job) -> int:
    Path(job.run_dir).mkdir(exist_ok=True)
    (Path(job.run_dir) / "result.json").write_text(json.dumps({"status": "completed", "best_val_loss": loss(job)}))
    return 0


def always_one(job: Job) -> int:
    Path(job.run_dir).mkdir()
    (Path(job.run_dir) / "result.json").write_text('{"best_val_loss": 1.0}')
    return 0


def trials(folder: Path) -> list[tuple]:
    """The trials as Optuna reads them from the sweep's folder."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    return [(trial.number, trial.params, trial.value, trial.state.name) for trial in study.trials]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("hydra.sweeper.n_jobs=3",)])
def test_interrupted_study_equals_one_that_was_not(more, composed, tmp_path, capfd):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert composed(*STUDY, *more, f"run_dir={whole}", ends=finished)[1] == 0
    told = capfd.readouterr().out
    rng = random.Random(0)

    def sometimes(job: Job) -> int:
        if rng.random() < 0.3:
            raise Interrupted(signal.SIGTERM)
        return finished(job)

    codes = [composed(*STUDY, *more, f"run_dir={broken}", "resume=auto", ends=sometimes)[1] for _ in range(16)]
    assert codes[0] == 143 or codes[1] == 143
    assert codes[-1] == 0
    assert trials(broken) == trials(whole)
    assert [trial[3] for trial in trials(whole)] == ["COMPLETE"] * 16
    assert len((broken / "sweep.jsonl").read_text().splitlines()) == 16
    again = capfd.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith("best: "))
    assert again.count(line) == codes.count(0)


def test_study_learns_and_reports_the_best(composed, tmp_path):
    swept = tmp_path / "swept"
    assert composed(*STUDY, "hydra.sweeper.n_trials=40", f"run_dir={swept}", ends=finished)[1] == 0
    values = [trial[2] for trial in trials(swept)]
    assert sum(values[20:]) < sum(values[:20])
    best = yaml.safe_load((swept / "best.yaml").read_text())
    assert best["value"] == min(values) == loss(Job(0, "train", [], best["varied"], "", "", ""))
    assert best["job"] == values.index(min(values))
    assert set(best["varied"]) <= set(best["overrides"])
    assert Path(best["run_dir"]).is_dir()


def test_seed_decides_what_is_proposed(composed, tmp_path):
    def proposed(seed: int, folder: str) -> list[tuple]:
        options = ("hydra.sweeper.n_trials=3", f"hydra.sweeper.seed={seed}", f"run_dir={tmp_path / folder}")
        assert composed(*STUDY, *options, ends=finished)[1] == 0
        return trials(tmp_path / folder)

    assert proposed(1, "a") == proposed(1, "b") != proposed(2, "c")


def test_failed_trials_are_told_and_do_not_end_the_study(composed, tmp_path):
    swept = tmp_path / "swept"
    more = ("hydra.sweeper.n_trials=8", f"run_dir={swept}")
    commands, code = composed(*STUDY, *more, ends=lambda job: 1 if job.number % 3 == 0 else finished(job))
    assert (len(commands), code) == (8, 1)
    assert [trial[3] for trial in trials(swept)] == ["FAIL" if n % 3 == 0 else "COMPLETE" for n in range(8)]
    assert composed(*STUDY, *more, "resume=auto", ends=finished) == ([], 1)  # they stay failed
    more = ("hydra.sweeper.n_trials=10", f"run_dir={swept}", "resume=auto")
    assert len(composed(*STUDY, *more, ends=finished)[0]) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("seed=1",), ("nothing to vary", "interval(")),
        (("optimizer.lr=interval(0,1)", "model=tiny,tinny"), ("model=tinny", "'tiny'")),
        (("seed=1,2", "hydra.sweeper.direction=down"), ("hydra.sweeper.direction='down'", "minimize")),
        (("seed=1,2", "hydra.sweeper.n_trials=many"), ("hydra.sweeper.n_trials='many'", "a whole number")),
        (("seed=1,2", "hydra.sweeper.sampler._target_=os.system"), ("os.system",)),
        (("seed=1,2", "+hydra.sweeper.sampler.n_startup=3"), ("n_startup", "n_startup_trials")),
        (("seed=1,2", "hydra.sweeper.metric=val_los"), ("hydra.sweeper.metric=val_los", "best_val_loss")),
    ],
)
def test_wrong_values_are_named(options, says, composed, tmp_path, capfd):
    commands, code = composed("hydra/sweeper=optuna", *options, f"run_dir={tmp_path}/swept", ends=always_one)
    message = capfd.readouterr().err
    assert code == 2, message
    assert len(commands) <= 1
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for word in says:
        assert word in message


def test_another_study_is_not_mixed_in(composed, tmp_path, capfd):
    place = (f"run_dir={tmp_path}/swept", "resume=auto")
    assert composed(*STUDY, "hydra.sweeper.n_trials=1", *place, ends=finished)[1] == 0
    capfd.readouterr()
    assert composed(*STUDY, "hydra.sweeper.seed=2", "trainer.max_steps=5", *place) == ([], 2)
    message = capfd.readouterr().err
    assert "seed: 1 then, 2 now" in message
    assert "trainer.max_steps=5" in message
    assert composed("seed=1,2", f"run_dir={tmp_path}/grid", ends=lambda _: 0)[1] == 0
    assert composed(*STUDY, f"run_dir={tmp_path}/grid", "resume=auto") == ([], 2)


@pytest.mark.slow
def test_killed_study_goes_on_by_the_real_command(text_file, tmp_path):
    options = ("-m", *SMALL, f"data.files={text_file}", "trainer.max_steps=200", "checkpoint.every_steps=20")
    study = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "+hydra.sweeper.sampler.n_startup_trials=1")
    options = (*options, *study, "optimizer.lr=tag(log,interval(1e-4,1e-2))")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = door("train", *options, f"run_dir={whole}")
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", *options, f"run_dir={broken}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(broken.glob("1_*/checkpoints/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = door("train", *options, f"run_dir={broken}", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert trials(broken) == trials(whole)
    assert len(jobs.records(broken)) == len((broken / "sweep.jsonl").read_text().splitlines()) == 3
    best = yaml.safe_load((broken / "best.yaml").read_text())
    assert best["value"] == yaml.safe_load((whole / "best.yaml").read_text())["value"]
    assert f"best: job {best['job']}, best_val_loss {best['value']:.4f}: optimizer.lr=" in again.stdout
