"""The floor in runs: a perfect model is at it, another is above it by what it lacks, and the record says so."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_callbacks import result, rows

from gptlab.callbacks.floor import Floor
from gptlab.data.grammar import Optimum
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.data.stories import Stories
from gptlab.excess import compared, first_documents
from gptlab.tasks.metrics import TokenMetrics
from gptlab.tokenizer import EOS_ID, ByteTokenizer, CharTokenizer, SentencePieceTokenizer

STORIES = Stories(documents=300, seed=3)
RUN = ("data=stories", "data.files=null", "data.source.documents=400", "model.block_size=256", "trainer.max_steps=4")


class Perfect(SimpleNamespace):
    """A task whose model is the optimum, but `worse` nats worse at each byte of a kind."""

    def __init__(self, data: TextDataModule, worse: dict[str, float] | None = None):
        token_bytes = torch.tensor([len(data.tokenizer.decode_bytes([i])) for i in range(data.tokenizer.vocab_size)])
        super().__init__(
            data=data, worse=worse or {}, validation=TokenMetrics(token_bytes), training=True, device="cpu", figures={}
        )
        self.eval = lambda: None
        self.train = lambda mode: None

    def scored(self, tokens, targets):
        assert (tokens[:, 0] == EOS_ID).all()
        assert tokens.shape == (self.data.config.batch_size, self.data.block_size)
        nll = torch.full(targets.shape, 7.0)  # padding, which must not count
        for row, ids in zip(nll, targets, strict=True):
            length = int((ids == EOS_ID).nonzero()[0])
            if length:  # a row of padding has no document
                optimum = STORIES.optimum(self.data.tokenizer.decode(ids[:length].numpy()))
                each = optimum.nll + np.array([self.worse.get(kind, 0.0) for kind in optimum.kinds])
                widths = np.append(self.validation.token_bytes.numpy()[ids[:length].numpy()], 1)
                row[: length + 1] = torch.from_numpy(np.add.reduceat(each, np.cumsum(widths) - widths))
        return nll, targets


def measured(tmp_path, task: Perfect) -> dict:
    logger = SimpleNamespace(logged={})
    logger.log_metrics = lambda metrics, step: logger.logged.update(metrics)
    trainer = SimpleNamespace(
        datamodule=task.data, sanity_checking=False, callbacks=[], global_step=9, loggers=[logger], is_global_zero=True
    )
    trainer.precision_plugin = SimpleNamespace(val_step_context=torch.no_grad)
    floor = Floor(tmp_path / "floor.json")
    floor.on_fit_start(trainer, task)
    floor.on_validation_end(trainer, task)
    return json.loads(floor.path.read_text()) if floor.path.exists() else {}


def stories(tmp_path, tokenizer, block_size: int = 256) -> TextDataModule:
    config = DataConfig(validation_fraction=0.2, batch_size=16)
    data = TextDataModule(config, STORIES, tokenizer, block_size, seed=1, cache=tmp_path / "cache")
    data.prepare_data()
    data.setup()
    return data


def pieces() -> SentencePieceTokenizer:
    settings = {"model_type": "bpe", "character_coverage": 1.0, "max_train_bytes": 10**6}
    return SentencePieceTokenizer.train([d.text for d in STORIES.documents()], vocab_size=400, **settings)


@pytest.mark.parametrize("build", [ByteTokenizer, pieces])
def test_a_perfect_model_has_no_excess_with_any_tokenizer_that_loses_nothing(tmp_path, build):
    tokenizer = build()
    found = measured(tmp_path, Perfect(data := stories(tmp_path, tokenizer)))
    split = data.prepared.meta["splits"]["validation"]
    assert (found["documents"], found["bytes"]) == (split["documents"], split["bytes"])
    assert found["excess_nats_per_byte"] == pytest.approx(0, abs=1e-6)
    assert found["interval"] == pytest.approx([0, 0], abs=1e-6)
    assert 0.10 < found["floor_nats_per_byte"] < 0.14


def test_what_a_model_lacks_shows_in_its_kind_and_adds_up(tmp_path):
    found = measured(tmp_path, Perfect(stories(tmp_path, ByteTokenizer()), {"recall": 0.5, "counting": 0.25}))
    kinds = found["kinds"]
    assert {kind: row["excess"] for kind, row in kinds.items()} == pytest.approx(
        {"arithmetic": 0, "counting": 0.25, "grammar": 0, "recall": 0.5}, abs=1e-6
    )
    for row in kinds.values():
        assert row["model"] - row["floor"] == pytest.approx(row["excess"])
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    scored = found["bytes"] + found["documents"]  # and their ends
    total = sum(row["share"] * row["excess"] for row in kinds.values()) * scored / found["bytes"]
    assert found["excess_nats_per_byte"] == pytest.approx(total, abs=1e-6)
    assert found["interval"][0] < found["excess_nats_per_byte"] < found["interval"][1]
    assert list(found["by_distance"]) == sorted(found["by_distance"], key=int)
    assert sum(row["share"] for row in found["by_distance"].values()) == pytest.approx(kinds["recall"]["share"])


def test_distances_fall_into_buckets_that_double():
    kinds, nll = np.array(["recall"] * 6 + ["grammar"]), np.arange(7.0)
    optimum = Optimum(np.zeros(7), kinds, np.array([1, 16, 17, 32, 33, 200, -1]))
    found = compared([nll], [optimum])["by_distance"]
    assert {limit: row["model"] for limit, row in found.items()} == {"16": 0.5, "32": 2.5, "64": 4.0, "256": 5.0}


def test_the_interval_holds_the_true_excess_as_often_as_it_says():
    """Documents of many lengths, whose excess a byte varies: 95 % of intervals must hold the ratio of the means."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        sizes = rng.integers(5, 60, size=80)
        model = [np.append(rng.exponential(0.1) * np.ones(size), 0.0) for size in sizes]
        optima = [Optimum(np.zeros(size + 1), np.full(size + 1, "a"), np.full(size + 1, -1)) for size in sizes]
        low, high = compared(model, optima)["interval"]
        hits += low < 0.1 < high
    assert 0.91 < hits / 400 < 0.98


def test_documents_are_those_between_end_tokens():
    tokens = np.array([5, 6, EOS_ID, EOS_ID, 7, EOS_ID, 8], dtype=np.uint16)
    assert [ids.tolist() for ids in first_documents(tokens)] == [[5, 6], [], [7]]


@pytest.mark.parametrize(
    ("tokenizer", "block_size", "said"),
    [
        (ByteTokenizer(), 64, "raise model.block_size=64"),
        (CharTokenizer.train(["Once upon a time"]), 256, "loses nothing"),
    ],
)
def test_where_it_cannot_be_measured_a_word_says_why(tmp_path, caplog, tokenizer, block_size, said):
    assert measured(tmp_path, Perfect(stories(tmp_path, tokenizer, block_size))) == {}
    assert said in caplog.text


@pytest.mark.parametrize("begin", ["anywhere", "document"])
def test_a_run_reports_it(train, tmp_path, begin):
    run = tmp_path / "run"
    assert train(run, *RUN, f"data.begin={begin}", "documents=separate", "validation.every_steps=2") == 0
    figures, found = result(run), json.loads((run / "floor.json").read_text())
    for name in ("floor", "excess"):
        assert figures[f"{name}_bits_per_byte"] == pytest.approx(found[f"{name}_nats_per_byte"] / math.log(2))
    low, high = figures["excess_interval"]
    assert low < figures["excess_bits_per_byte"] < high
    # What validation scores, in windows of either beginning, is nearly the same text.
    assert figures["floor_bits_per_byte"] + figures["excess_bits_per_byte"] == pytest.approx(
        figures["val_bits_per_byte"], rel=0.05
    )
    assert found["step"] == 4
    logged = [float(row["val/excess_bits_per_byte"]) for row in rows(run) if row["val/excess_bits_per_byte"]]
    assert len(logged) == 2
    assert logged[-1] == pytest.approx(figures["excess_bits_per_byte"])
    assert f"floor {figures['floor_bits_per_byte']:.4f} bits a byte, excess" in (run / "train.log").read_text()


def test_measuring_changes_nothing_of_the_run(train, tmp_path, monkeypatch):
    weights = []
    for name in ("with", "without"):
        assert train(tmp_path / name, *RUN, "validation.every_steps=2", "model.dropout=0.1") == 0
        weights.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
        monkeypatch.setattr(Stories, "optimum", None)
    assert result(tmp_path / "without")["excess_bits_per_byte"] is None
    assert result(tmp_path / "without")["excess_interval"] is None
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_the_average_is_measured_where_there_is_one(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, *RUN, "callbacks=ema") == 0
    figures = result(run)
    assert figures["floor_bits_per_byte"] + figures["excess_bits_per_byte"] == pytest.approx(
        figures["val_bits_per_byte"], rel=0.05
    )
