"""Windows dealt out at random share with training what the formula says, and those of gptlab's own split nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import compose, prose

from experiments.leakage.measure import Leak, alike, by_gptlab, expected, leak
from experiments.leakage.split import Chosen, RandomSplit, at_random, in_order
from gptlab import assembly
from gptlab.data import tokens
from gptlab.data.corpus import Files
from gptlab.data.windows import WindowDataset
from gptlab.tokenizer import CharTokenizer

T = 64
NOTHING = Leak(0.0, 0.0, 0.0, 0)


def distinct(characters: int, start: int = 0) -> str:
    """Text in which no character comes twice, so that each is found at one position only."""
    return "".join(map(chr, range(0x4E00 + start, 0x4E00 + start + characters)))


def positions(stride: int, characters: int = 400_000) -> WindowDataset:
    return WindowDataset(np.arange(characters), T, stride)


@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_random_windows_leak_what_the_formula_says(overlap):
    windows = positions(T // overlap)
    found = leak(*at_random(windows, 0.1, seed=1), number=np.arange(400_000 - 31))
    targets, covered = expected(overlap)
    assert found.targets == pytest.approx(targets, abs=0.02)  # 0.9 at half overlap, of 1250 windows
    assert found.windows == pytest.approx(covered, abs=0.03)
    # Of the T - 30 runs of 32 characters in a window, T / 2 - 30 lie in each neighbour.
    assert overlap == 4 or found.grams == pytest.approx({1: 0, 2: 0.9 * (T - 60) / (T - 30)}[overlap], abs=0.02)


def test_the_formula_by_hand():
    assert expected(1) == (0, 0)
    assert expected(2) == pytest.approx((0.9, 0.81))  # the other window; both neighbours
    assert expected(4) == pytest.approx((0.999, 1 - 0.001 * 3.7))


def test_windows_in_order_leak_at_the_border():
    for stride in (1, T // 4, T // 2, T):
        found = leak(*in_order(positions(stride, 5000), 0.1), number=np.arange(5000 - 31))
        assert found.positions == T - stride


@pytest.mark.parametrize("text", [prose(3000), distinct(20_000)], ids=["prose", "distinct"])
@pytest.mark.parametrize("stride", [1, T // 2, T])
def test_gptlab_leaks_none(tmp_path, text, stride):
    (tmp_path / "text.txt").write_text(text)
    pair = by_gptlab(Files(f"{tmp_path}/text.txt"), CharTokenizer.train([text]), text, T, stride)
    found = leak(*pair, alike(text))
    assert found[:2] == (0, 0)
    assert found.positions == 0
    if text[0] == distinct(1):
        assert found == NOTHING
        # And no id of one side is among the other's: what was just found does not rest on where text was found.
        sides = [set(windows.tokens[:].tolist()) - {len(text) + 1, len(text) + 2} for windows in pair]
        assert not sides[0] & sides[1]
        assert len(sides[0] | sides[1]) == len(text)


def test_gptlab_leaks_none_of_many_documents(tmp_path):
    """Here whole documents go to one side."""
    texts = [distinct(150, start=150 * number) for number in range(120)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.txt").write_text(text)
    text = "".join(texts)
    pair = by_gptlab(Files(f"{tmp_path}/*.txt"), CharTokenizer.train([text]), text, T, T // 2)
    assert leak(*pair, alike(text)) == NOTHING


@pytest.mark.parametrize("shared", [1, 100])
def test_a_split_that_overlaps_is_found(tmp_path, monkeypatch, shared):
    text = distinct(10_000)
    (tmp_path / "text.txt").write_text(text)

    def overlapping(documents, fraction, rule):
        for document in documents:
            yield "train", type(document)(document.name, document.text[: 9000 + shared])
            yield "validation", type(document)(document.name, document.text[9000:])

    monkeypatch.setattr(tokens, "split_documents", overlapping)
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "cache"))
    pair = by_gptlab(Files(f"{tmp_path}/text.txt"), CharTokenizer.train([text]), text, T, 1)
    assert leak(*pair, alike(text)).positions == shared - 1  # the first token of a split is no target


def test_alike_numbers_the_same_text_the_same():
    text = prose(400)
    number = alike(text)
    assert len(number) == len(text) - 31
    runs = [text[place : place + 32] for place in range(len(number))]
    assert len(set(runs)) == len(set(number.tolist())) == len(set(zip(runs, number.tolist(), strict=True)))


def test_chosen_windows_are_those_windows_and_padding():
    windows = positions(T // 2, 1000)
    chosen = Chosen(windows, [5, 2])
    batch = chosen.__getitems__([1, 0, -1])
    assert len(chosen) == 2
    assert batch["targets"][:2, 0].tolist() == [2 * T // 2 + 1, 5 * T // 2 + 1]
    assert batch["loss_mask"].all(dim=1).tolist() == [True, True, False]
    assert not batch["loss_mask"][2].any()


def test_the_callback_deals_out_the_windows_of_all_the_text(tmp_path):
    text = distinct(6000)
    (tmp_path / "text.txt").write_text(text)
    data = assembly.build_data(
        compose(f"data.files={tmp_path}/text.txt", "tokenizer=char", f"model.block_size={T}"),
        CharTokenizer.train([text]),
    )
    RandomSplit().setup(SimpleNamespace(datamodule=data), None, "fit")
    windows = [data.train_windows, data.validation_windows]
    assert sorted(np.concatenate([side.numbers[:-1] for side in windows])) == list(range((6001 - T - 1) // 32 + 1))
    whole = data.train_windows.tokens
    assert data.tokenizer.decode(whole) == text
    for side in windows:  # the same windows over positions
        side.tokens = np.arange(len(whole))
    assert leak(*windows, np.arange(len(whole) - 31)).targets == pytest.approx(0.9, abs=0.15)  # 19 windows


def test_several_documents_are_not_put_together(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(prose(300))
    data = assembly.build_data(compose(f"data.files={tmp_path}/*.txt", "tokenizer=byte", "model.block_size=16"))
    with pytest.raises(ValueError, match="here are 2"):
        RandomSplit().setup(SimpleNamespace(datamodule=data), None, "fit")


def test_a_run_trains_on_what_it_validates(train, tmp_path):
    """Of letters drawn by lot nobody can tell the next who has not seen it: that costs ln 8 = 2.08 nats, or more."""
    (tmp_path / "noise.txt").write_text("".join(np.random.default_rng(1).choice(list("abcdefgh"), 300)))
    losses = []
    for more in ((), ("+callbacks.split._target_=experiments.leakage.split.RandomSplit",)):
        run = tmp_path / f"run{len(more)}"
        options = ("data.files=noise.txt", "data.stride=1", "data.batch_size=16", "trainer.max_steps=150")
        assert train(run, *options, "optimizer.lr=1e-2", "log.every_steps=50", *more) == 0
        losses.append(json.loads((run / "result.json").read_text())["val_loss"])
    assert losses[0] > 2
    assert losses[1] < 1
