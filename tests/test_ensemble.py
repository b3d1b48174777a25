"""Several runs as one model: alone a run scores what it validated, and together the mean of their probabilities."""

import json
import math

import pytest
import torch
from conftest import SMALL, prose

from experiments.gutenberg.ensemble import main, mean_nlls, scores
from gptlab.model import GPT, GPTConfig


def test_probabilities_are_averaged():
    torch.manual_seed(1)
    models = [GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_size=11)).eval() for _ in range(3)]
    tokens, targets = torch.randint(11, (2, 2, 8))
    with torch.no_grad():
        found = mean_nlls(models, tokens, targets)
        probabilities = [model(tokens).softmax(dim=-1) for model in models]
    for count, nlls in enumerate(found, start=1):
        for b in range(2):
            for t in range(8):
                mean = sum(float(p[b, t, targets[b, t]]) for p in probabilities[:count]) / count
                assert float(nlls[b, t]) == pytest.approx(-math.log(mean), abs=1e-5)


def test_a_run_alone_scores_what_it_validated(train, tmp_path):
    for seed in (1, 2):
        assert train(tmp_path / f"run-{seed}", *SMALL, "trainer.max_steps=30", f"seed={seed}", "optimizer.lr=1e-2") == 0
    runs = [tmp_path / "run-1", tmp_path / "run-2"]
    alone = [json.loads((run / "result.json").read_text())["val_loss"] for run in runs]
    found = scores(runs)
    assert found[0]["loss"] == pytest.approx(alone[0], abs=1e-5)
    assert scores(runs[::-1])[0]["loss"] == pytest.approx(alone[1], abs=1e-5)
    assert found[1]["loss"] < sum(alone) / 2, "log is concave"


def test_documents_apart_are_scored_apart(train, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(200):
        (tmp_path / f"texts/{number}.txt").write_text(prose(10, seed=number))
    more = (f"data.files={tmp_path}/texts/*.txt", "documents=separate", "trainer.max_steps=30", "optimizer.lr=1e-2")
    assert train(tmp_path / "run", *SMALL, *more) == 0
    loss = json.loads((tmp_path / "run/result.json").read_text())["val_loss"]
    assert scores([tmp_path / "run"])[0]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("tokenizer=char", "data and tokenizer"),
        ("data.validation_fraction=0.2", "data and tokenizer"),
        ("documents=separate", "documents"),
        ("model.block_size=8", "block_size"),
    ],
)
def test_what_is_not_scored_alike_is_refused(train, tmp_path, changed, named):
    assert train(tmp_path / "one", *SMALL, "trainer.max_steps=2") == 0
    assert train(tmp_path / "other", *SMALL, "trainer.max_steps=2", changed) == 0
    with pytest.raises(ValueError, match=f"other {named}|other model.{named}"):
        scores([tmp_path / "one", tmp_path / "other"])


def test_command(train, tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "run", *SMALL, "trainer.max_steps=2") == 0
    loss = json.loads((tmp_path / "run/result.json").read_text())["val_loss"]
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["ensemble", str(tmp_path / "run")])
    main()
    assert f"| 1 | {loss:.4f} |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ensemble", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err
