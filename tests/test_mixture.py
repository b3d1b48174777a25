"""Mixtures: shares as weighed, nothing twice before its time, one order from any place on, and each source's loss."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, compose, door, prose
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_module import epochs_of

from gptlab.config import absolute_paths
from gptlab.data.corpus import Files
from gptlab.data.mixed import MixedDataModule
from gptlab.data.mixture import MixedOrder, quotas
from gptlab.data.module import DataConfig
from gptlab.data.windows import ScoringOrder, permute
from gptlab.tokenizer import EOS_ID, ByteTokenizer

COUNTS, WEIGHTS = {"small": 30, "large": 500, "middle": 110}, {"small": 2, "large": 1, "middle": 1.0}


def order(batch_size: int = 8, seed: int = 1, **options) -> MixedOrder:
    return MixedOrder(COUNTS, WEIGHTS, batch_size, accumulate=1, seed=seed, **options)


def epoch(number: int, of: MixedOrder | None = None) -> list[int]:
    of = of or order()
    of.set_epoch(number)
    return [window for batch in of for window in batch]


def owner(window: int) -> str:
    return "small" if window < 30 else "large" if window < 530 else "middle"


# The order


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.integers(0, 10**7))
def test_quotas_are_whole_and_within_one_of_their_share(weights, windows):
    found = quotas(weights, windows)
    assert sum(found) == windows
    for quota, weight in zip(found, weights, strict=True):
        assert abs(quota - weight / sum(weights) * windows) < 1 + 1e-6 * windows


def test_an_epoch_has_the_share_of_each_source_that_its_weight_says():
    for number in range(3):
        found = Counter(map(owner, epoch(number)))
        assert found == {"small": 320, "large": 160, "middle": 160}  # of 640, all of which fill steps


def test_a_source_is_gone_through_before_any_of_it_comes_again():
    drawn = [window for number in range(8) for window in sorted_by_draw(number)]
    for name, count in COUNTS.items():
        own = [window for window in drawn if owner(window) == name]
        rounds = [own[start : start + count] for start in range(0, len(own), count)]
        assert len(rounds) > 1
        for full in rounds[:-1]:
            assert len(set(full)) == count
        assert len(set(rounds[-1])) == len(rounds[-1])
        for one, other in pairwise(rounds[:-1]):
            assert one != other


def sorted_by_draw(number: int) -> list[int]:
    """The windows of an epoch by their draws, the places before they are shuffled."""
    return order().windows_at(np.arange(640), number).tolist()


def test_it_is_the_naive_loop():
    """Written down once more, window by window."""
    for number in (0, 3):
        expected = []
        for position in range(640):
            place = int(permute(np.array([position]), 640, f"1/{number}")[0])
            for name, start, quota, first in (("small", 0, 320, 0), ("large", 320, 160, 30), ("middle", 480, 160, 530)):
                if start <= place < start + quota:
                    draw = place - start + number * quota
                    key = f"1/{name}/{draw // COUNTS[name]}"
                    expected.append(first + int(permute(np.array([draw % COUNTS[name]]), COUNTS[name], key)[0]))
        assert epoch(number) == expected


def test_any_place_can_be_gone_on_from_with_any_ranks():
    whole = epoch(2, order(batch_size=8))
    for start in (0, 1, 37, 79):
        resumed = order(batch_size=8)
        resumed.epoch, resumed.start = 2, start
        assert [window for batch in resumed for window in batch] == whole[start * 8 :]
    halves = [order(batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    for half in halves:
        half.set_epoch(2)
    together = [
        window for batches in zip(*halves, strict=True) for pair in zip(*batches, strict=True) for window in pair
    ]
    assert together == whole


def test_seeds_and_epochs_differ():
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, order(seed=2))


def test_a_weight_of_no_window_is_refused():
    with pytest.raises(ValueError, match=r"data.mix.b.weight=1e-09: that is none of the 20 windows of an epoch; raise"):
        MixedOrder({"a": 10, "b": 10}, {"a": 1, "b": 1e-9}, 1, 1, seed=1)


# The data


@pytest.fixture
def texts(tmp_path) -> dict[str, Path]:
    """Two texts that share no letter, so that a window tells where it is from."""
    paths = {"lower": tmp_path / "lower.txt", "upper": tmp_path / "upper.txt"}
    paths["lower"].write_text(prose(900).lower())
    paths["upper"].write_text(prose(300, seed=1).upper())
    return paths


def module(texts: dict[str, Path], weights: dict[str, float], batch_size: int = 8, **options) -> MixedDataModule:
    mix = {name: {"weight": weight, "files": str(texts[name])} for name, weight in weights.items()}
    config = DataConfig(mix=mix, batch_size=batch_size, **options)
    return MixedDataModule(config, {}, ByteTokenizer(), block_size=16, seed=1)


def test_training_sees_each_text_as_often_as_its_weight_says(texts):
    data = module(texts, {"lower": 1, "upper": 3})
    rows = np.concatenate(epochs_of(data, epochs=2))
    is_upper = np.array([data.tokenizer.decode(row).isupper() for row in rows])
    assert abs(is_upper.mean() - 0.75) < 0.01
    assert all(data.tokenizer.decode(row).isupper() or data.tokenizer.decode(row).islower() for row in rows)


def test_validation_scores_every_target_of_every_text_once_and_says_whose(texts):
    data = module(texts, {"lower": 5, "upper": 1})
    data.setup()
    assert data.prepared is not None
    scored: Counter = Counter()
    for indices in ScoringOrder(len(data.validation_windows), 8):
        batch = data.validation_windows.__getitems__(indices)
        for row, number in enumerate(batch["source"].tolist()):
            text = data.tokenizer.decode(batch["targets"][row][batch["loss_mask"][row]])
            assert not text.strip() or (text.isupper() if number else text.islower()) or not text.strip(" .\n")
            scored[number] += int(batch["loss_mask"][row].sum())
    assert scored == {i: len(part.validation) - 1 for i, part in enumerate(data.prepared.parts.values())}


def test_another_weight_makes_no_tokens_again_but_another_fingerprint(texts):
    one, other, again = (module(texts, {"lower": 1, "upper": weight}) for weight in (1, 2, 1))
    for data in (one, other, again):
        data.setup()
    folders = [[part.folder for part in data.prepared.parts.values()] for data in (one, other)]
    assert folders[0] == folders[1]
    assert one.prepared.fingerprint == again.prepared.fingerprint != other.prepared.fingerprint
    splits = one.prepared.meta["splits"]
    parts = [part.meta["splits"] for part in one.prepared.parts.values()]
    for side in ("train", "validation"):
        assert splits[side]["tokens"] == sum(part[side]["tokens"] for part in parts)


def test_sources_keep_settings_of_their_own(texts):
    held_out = texts["upper"].with_name("held.txt")
    held_out.write_text("HELD OUT.\n" * 9)
    parts = {
        "lower": {"weight": 1, "files": str(texts["lower"]), "validation_fraction": 0.5},
        "upper": {"weight": 1, "files": str(texts["upper"]), "validation_files": str(held_out)},
    }
    data = MixedDataModule(DataConfig(mix=parts, batch_size=2), {}, ByteTokenizer(), block_size=16, seed=1)
    data.setup()
    lower, upper = data.prepared.parts.values()
    assert abs(len(lower.validation) / len(lower.train) - 1) < 0.01
    assert upper.tokenizer.decode(upper.validation[:]).startswith("HELD OUT.")
    assert len(upper.train) == len(texts["upper"].read_bytes()) + 1


def test_windows_of_every_source_may_begin_with_a_document(texts):
    data = module(texts, {"lower": 1, "upper": 1}, documents="line", begin="document")
    data.setup()
    for part in data.train_windows.parts:
        documents = (part.tokens[:] == EOS_ID).sum()
        first = part.__getitems__(list(range(len(part))))["tokens"][:, 0]
        assert documents > 5
        assert (first == EOS_ID).sum() > 0.9 * documents


def test_a_tokenizer_is_trained_on_all_sources(texts):
    learnt = []

    def build(content):
        learnt.append("".join(content))
        return ByteTokenizer()

    data = module(texts, {"lower": 1, "upper": 1})
    data.build_tokenizer = build
    data.prepare_data()
    assert learnt[0].count("cat") >= 10 <= learnt[0].count("CAT")


def test_text_in_two_sources_is_refused(texts):
    texts["again"] = texts["upper"].with_name("again.txt")
    texts["again"].write_bytes(texts["upper"].read_bytes())
    with pytest.raises(ValueError, match=r"again.txt is text of data.mix.upper and of data.mix.again"):
        module(texts, {"lower": 1, "upper": 1, "again": 1}).prepare_data()


def test_a_source_too_small_is_named(texts):
    texts["upper"].write_text("A B C D E F\n" * 2)
    with pytest.raises(ValueError, match=r"the training split of data.mix.upper has \d+ tokens"):
        module(texts, {"lower": 1, "upper": 1}, validation_fraction=0.5).setup()


# The command line


def mix_of(texts: dict[str, Path], upper: float = 1) -> str:
    lower, of_upper = f"{{files: {texts['lower']}, weight: 1}}", f"{{files: {texts['upper']}, weight: {upper}}}"
    return f"data.mix={{lower: {lower}, upper: {of_upper}}}"


def test_words_are_written_out_in_the_config(tmp_path):
    data = compose("data.mix={pydocs: 3, gutenberg: {weight: 0.5, validation_fraction: 0.2}, own: {files: a.txt}}")[
        "data"
    ]
    mix = data["mix"]
    assert list(mix) == ["pydocs", "gutenberg", "own"]
    assert mix["pydocs"] == {
        "weight": 3,
        "text_bytes": 1_600_000,
        "source": {"_target_": "gptlab.data.sources.PyDocs"},
    }
    assert mix["gutenberg"]["source"]["_target_"].endswith("Download")
    assert (mix["gutenberg"]["weight"], mix["gutenberg"]["validation_fraction"]) == (0.5, 0.2)
    assert mix["own"] == {"weight": 1, "files": "a.txt"}
    assert data["text_bytes"] == 1_600_000  # of the config that is mixed into; "own" says none
    assert compose("data=mix")["data"]["text_bytes"] == 1_600_000 + compose("data=stories")["data"]["text_bytes"]
    assert absolute_paths(compose("data.mix={own: {files: a.txt}}"))["data"]["mix"]["own"]["files"] == str(
        Path("a.txt").absolute()
    )


def test_a_weight_can_be_swept(texts):
    assert compose("data=mix", "data.mix={pydocs: 1, code: 1}", "data.mix.code=4")["data"]["mix"]["code"]["weight"] == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.mix={pydoc: 1}", "data.mix.pydoc: there is no such source, did you mean 'pydocs'?"),
        ("data.mix={mix: 1}", "data.mix.mix: there is no such source"),
        (
            "data.mix={a: {files: x, min_characters: many}}",
            "data.mix.a.min_characters='many' is not what it takes",
        ),
        ("data.mix={a: {files: x, normalize: 3}}", "data.mix.a.normalize=3 is not what it takes: a text | null"),
        ("data.mix={a: {files: x, validation_fraction: null}}", "data.mix.a.validation_fraction=null is not what it"),
        ("data.mix={a: {file: x}}", "data.mix.a.file: there is no such key, did you mean 'files'?"),
        ("data.mix=[pydocs]", "is no mixture; name sources and their weights"),
        ("data.mix={pydocs: 0}", "data.mix.pydocs.weight=0 must be a number more than 0"),
        ("data.mix={pydocs: much}", "data.mix.pydocs.weight='much' must be a number more than 0"),
        ("data.mix={pydocs: {validation_fraction: 2}}", "data.mix.pydocs: data.validation_fraction=2 is not between"),
        ("data.mix={pydocs: 1} data.files=a.txt", "leave data.files and data.validation_files out"),
        ("data.mix={a: {source: {_target_: os.system}}}", "data.mix.a.source._target_='os.system': allow it"),
    ],
)
def test_what_is_no_mixture_is_refused(given, said):
    mix, *others = given.split(" data.files=")
    done = door("train", *SMALL, mix, *(f"data.files={files}" for files in others))
    assert done.returncode == 2
    assert said in done.stderr


def test_a_run_tells_the_loss_of_each_source_and_goes_on_as_if_never_interrupted(texts, tmp_path):
    common = (*SMALL, mix_of(texts, upper=2), "schedule=constant", "validation.every_steps=4")
    for command in (
        (*common, "trainer.max_steps=8", "run_dir=whole"),
        (*common, "trainer.max_steps=6", "run_dir=parts"),
        ("resume=parts", "trainer.max_steps=8"),
    ):
        done = door("train", *command)
        assert done.returncode == 0, done.stderr
    assert "val of lower " in done.stdout
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert parts["val_loss"] == whole["val_loss"]
    assert parts["val_by_source"] == whole["val_by_source"]
    rows = (tmp_path / "whole/metrics.csv").read_text().splitlines()
    assert "val/loss/upper" in rows[0]

    # Each source's loss is that of a run on it alone with the same weights, and the whole is their mean by tokens.
    checkpoint = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    tokens = {}
    for name in ("lower", "upper"):
        text = Files(str(texts[name]))
        held_out = next(text.documents()).text.encode()
        tokens[name] = len(held_out) - int(len(held_out) * 0.9)  # the end token stands for the first, no target
        done = door(
            *("train", *SMALL, f"data.files={texts[name]}", "init_from=whole", f"run_dir={name}", "optimizer.lr=0"),
            *("trainer.max_steps=1", "optimizer=adamw"),
        )
        assert done.returncode == 0, done.stderr
        alone = json.loads((tmp_path / name / "result.json").read_text())
        assert alone["val_loss"] == pytest.approx(whole["val_by_source"][name]["loss"], rel=1e-5)
        assert alone["val_bits_per_byte"] == pytest.approx(whole["val_by_source"][name]["bits_per_byte"], rel=1e-5)
        assert alone["val_by_source"] is None
    mean = sum(tokens[name] * whole["val_by_source"][name]["loss"] for name in tokens) / sum(tokens.values())
    assert math.isclose(mean, whole["val_loss"], rel_tol=1e-6)


def test_a_mixture_is_prepared_and_told_source_by_source(texts):
    done = door("prepare", *SMALL, mix_of(texts, upper=3))
    assert done.returncode == 0, done.stderr
    assert "74.9%" in done.stdout  # 502 of 670 windows
    assert "that of each source" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_the_mixture_that_is_given_when_none_is_named_can_be_prepared():
    done = door("prepare", "data=mix", "tokenizer=byte", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "pydocs" in done.stdout
    assert "stories" in done.stdout


@pytest.mark.slow
def test_a_run_on_text_that_has_moved_goes_on(texts, tmp_path):
    common = (*SMALL, mix_of(texts), "schedule=constant", "run_dir=run", "trainer.max_steps=2")
    assert door("train", *common).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    for path in texts.values():
        path.rename(tmp_path / "elsewhere" / path.name)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace(f"{tmp_path}/lower", f"{tmp_path}/elsewhere/lower"))
    config.write_text(config.read_text().replace(f"{tmp_path}/upper", f"{tmp_path}/elsewhere/upper"))
    done = door("train", "resume=run", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr


def test_a_mixture_of_generated_text_alone_can_be_trained_on():
    done = door("train", *SMALL, "data=mix", "data.mix={stories: 1}", "model.block_size=64", "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
