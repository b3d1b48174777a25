"""The ladder of experiments=shakespeare_fast: its rows are configs that exist, and a run is done once."""

import csv
import itertools
import sys

import pytest
from conftest import compose, prose

from experiments.shakespeare_fast import ladder
from gptlab import checks


@pytest.mark.parametrize("row", ladder.ROWS)
def test_every_row_composes(row):
    checks.check_targets(compose(*ladder.ROWS[row]), ())


def test_each_row_changes_one_thing_and_the_last_is_the_experiment():
    configs = [compose(*overrides) for overrides in ladder.ROWS.values()]
    assert configs[-1] == compose("experiments=shakespeare_fast")
    assert all(one != other for one, other in itertools.pairwise(configs))
    assert configs[-2]["model"] | {"attention": configs[-1]["model"]["attention"]} == configs[-1]["model"]


def test_a_run_is_a_line_and_is_not_repeated(tmp_path, monkeypatch):
    (tmp_path / "shakespeare.txt").write_text(prose(4000))
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["ladder", "row=momentum,shift", "steps=3", f"file={tmp_path}/runs.csv", "compile=false", "model.n_embd=32"]
    for seeds in ("seed=1", "seed=1,2"):
        monkeypatch.setattr(sys, "argv", [*words, seeds, "data.files=shakespeare.txt"])
        ladder.main()
    runs = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert sorted(f"{run['row']} {run['seed']}" for run in runs) == ["momentum 1", "momentum 2", "shift 1", "shift 2"]
    assert all(0 < float(run["val"]) < 10 and float(run["seconds"]) > 0 for run in runs)
