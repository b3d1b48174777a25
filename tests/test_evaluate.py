"""The door evaluate: the figures of training's own validation again, those of other text, and what it refuses."""

import csv
import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, door, prose
from test_callbacks import result

from gptlab import checkpoint, options
from gptlab.evaluate.__main__ import evaluate, main
from gptlab.loading import load
from gptlab.tokenizer import EOS_ID

FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy")


def evaluated(run: Path, *words: str) -> dict:
    return evaluate(options.evaluate().parse_args([str(run), *words]))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, _session_cache) -> Path:
    """A folder of texts and a run, whose last checkpoint is worse than its best: the one text unlearns the other."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.txt").write_text(prose(40))
    (folder / "other.txt").write_text(prose(100, seed=3).upper())
    files = ("data.files=tiny.txt", "data.validation_files=other.txt", "run_dir=run", "optimizer.lr=0.01")
    steps = ("trainer.max_steps=30", "validation.every_steps=5")
    done = door("train", *SMALL, *files, *steps, cwd=folder, GPTLAB_CACHE_DIR=str(_session_cache))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, of texts that are copies too."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path / "run"


# The run's own split


def test_best_and_last_have_the_figures_of_their_own_validation(run):
    then = result(run)
    assert then["best_val_loss"] < then["val_loss"]
    best, last = evaluated(run), evaluated(run, "--checkpoint", "last")
    assert best["loss"] == best["recorded_loss"] == then["best_val_loss"]
    assert best["step"] == then["best_step"]
    assert {name: last[name] for name in FIGURES} == {name: then[f"val_{name}"] for name in FIGURES}
    assert (last["split"], last["verification"], last["step"]) == ("validation", None, 30)
    for name in FIGURES:
        assert evaluated(run, "--checkpoint", "last", "--batch-size", "3")[name] == pytest.approx(last[name], rel=1e-6)


STORIES = ("data=stories", "data.files=null", "data.source.documents=300", "model.block_size=256")
MIXED = "data.mix={a: {files: a.jsonl, weight: 1}, b: {files: b.txt, weight: 2}}"


@pytest.mark.parametrize(
    "words",
    [
        ("data.begin=document", "data.documents=line"),
        ("data.begin=document", "data.documents=line", "documents=separate"),
        ("tokenizer=sentencepiece", "tokenizer.vocab_size=330", "model.positions=learned", "model.mlp=gelu"),
        ("callbacks=ema",),
        ("trainer.precision=bf16-mixed",),
        ("trainer.precision=bf16-true",),
        (*STORIES, "data.begin=document", "documents=separate"),
        ("data=mix", "data.files=null", MIXED),
        ("data=stream", "data.validation_files=held_out.txt"),
    ],
    ids=lambda words: words[0],
)
def test_they_are_those_of_validation_for_every_kind_of_data_and_precision(train, tmp_path, words, monkeypatch):
    monkeypatch.setattr("gptlab.cost.computes_in_bf16", lambda device: True)  # emulated or not, the same numbers
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": prose(30, seed=i)}) + "\n" for i in range(60)))
    (tmp_path / "b.txt").write_text(prose(900, seed=8))
    (tmp_path / "held_out.txt").write_text(prose(300, seed=9))
    run = tmp_path / "run"
    assert train(run, *words, "trainer.max_steps=3", "validation.every_steps=2") == 0
    then, found = result(run), evaluated(run, "--checkpoint", "last")
    assert {name: found[name] for name in FIGURES} == {name: then[f"val_{name}"] for name in FIGURES}
    assert found["recorded_loss"] == then["val_loss"]
    assert found["by_source"] == then["val_by_source"]
    for name in ("floor_bits_per_byte", "excess_bits_per_byte", "excess_interval"):
        assert found[name] == then[name]
        assert (found[name] is None) == ("data=stories" not in words)
    assert found["precision"] == next((w.partition("=")[2] for w in words if "precision" in w), "32-true")


@pytest.mark.slow
def test_a_compiled_run_has_them_but_for_rounding(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "compile=true", "trainer.max_steps=20") == 0
    then, found = result(run), evaluated(run, "--checkpoint", "last")
    assert found["loss"] == pytest.approx(then["val_loss"], rel=1e-6)


def test_a_checkpoint_alone_knows_its_text_and_a_moved_run_does_too(run, tmp_path):
    then = result(run)
    shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "alone.ckpt")
    assert evaluated(tmp_path / "alone.ckpt")["loss"] == then["val_loss"]
    assert evaluated(run, "--checkpoint", str(tmp_path / "alone.ckpt"))["loss"] == then["val_loss"]
    shutil.move(run, tmp_path / "moved")
    assert evaluated(tmp_path / "moved", "--checkpoint", "last")["loss"] == then["val_loss"]


@pytest.mark.parametrize("form", ["bundle", "hf"])
def test_an_exported_folder_has_the_figures_of_the_run(run, tmp_path, form):
    """A bundle knows the run's text; another folder must be told of some."""
    pytest.importorskip("transformers")
    done = door("export", str(run), str(tmp_path / "out"), "--format", form)
    assert done.returncode == 0, done.stderr
    if form == "bundle":
        found = evaluated(tmp_path / "out")
        assert found["step"] == result(run)["best_step"]
        assert found["loss"] == pytest.approx(result(run)["best_val_loss"], rel=1e-6)
    else:
        assert "does not say what text it was trained on" in refused(tmp_path / "out")
    files = ("--files", str(tmp_path / "other.txt"))
    assert evaluated(tmp_path / "out", *files)["loss"] == pytest.approx(evaluated(run, *files)["loss"], rel=1e-6)


# Other text


def by_hand(run: Path, documents: list[str]) -> dict[str, float]:
    """Every document on its own, T tokens at a time, one after another."""
    model, tokenizer = load(run).model, load(run).tokenizer
    nll, tokens, correct, size = 0.0, 0, 0, model.config.block_size
    for document in documents:
        ids = torch.tensor([EOS_ID, *tokenizer.encode(document).tolist(), EOS_ID])
        for start in range(0, len(ids) - 1, size):
            given, targets = ids[start : start + size][: len(ids) - 1 - start], ids[start + 1 : start + size + 1]
            logits = model(given[None])[0].detach().double()
            nll += float(F.cross_entropy(logits, targets, reduction="sum"))
            tokens += len(targets)
            correct += int((logits.argmax(-1) == targets).sum())
    text_bytes = sum(len(document.encode()) for document in documents)
    return {
        "tokens": tokens,
        "bytes": text_bytes,
        "documents": len(documents),
        "loss": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / text_bytes,
        "accuracy": correct / tokens,
    }


TEXTS = [prose(5, seed=1), "é", prose(60, seed=2), "", "a b", prose(2, seed=3)]


def write(kind: str, folder: Path) -> Path:
    path = folder / f"held.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    else:
        path.write_text(json.dumps(TEXTS) if kind == "json" else "\n".join(TEXTS))
    return path


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl.gz", "csv", "parquet"])
def test_files_have_the_figures_that_a_plain_loop_finds(run, tmp_path, kind):
    path = write(kind, tmp_path)
    found = evaluated(run, "--files", str(path))
    documents = [text for text in TEXTS if text] if kind != "txt" else [path.read_text()]
    expected = by_hand(run, documents)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (found["split"], found["recorded_loss"], found["unknown_tokens"]) == ("files", None, 0)
    assert evaluated(run, "--files", str(path), "--batch-size", "1")["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_files_are_read_as_in_training_unless_it_is_said_otherwise(train, tmp_path):
    run, held_out = tmp_path / "run", tmp_path / "held_out.txt"
    assert train(run, "data.documents=line", "trainer.max_steps=1") == 0
    held_out.write_text("one line\nand another\n")
    assert evaluated(run, "--files", str(held_out))["documents"] == 2
    assert evaluated(run, "--files", str(held_out), "--documents", "file")["documents"] == 1
    held_out.write_text("one line\nand another\n%%\nand a third\n")
    separated = ("--documents", "separator", "--separator", "%%")
    assert evaluated(run, "--files", str(held_out), *separated)["documents"] == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"said": "one"}\n{"said": "two"}\n')
    assert evaluated(run, "--files", str(rows), "--documents", "field", "--field", "said")["documents"] == 2


def test_the_shortest_text_has_a_beginning_and_an_end(run, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    found = evaluated(run, "--files", str(tmp_path / "a.txt"))
    assert (found["tokens"], found["bytes"]) == (2, 1)
    assert found["loss"] == pytest.approx(by_hand(run, ["a"])["loss"], rel=1e-5)


# Samples


def test_samples_are_measured_beside_as_many_held_out_texts(run):
    words = ("--samples", "3", "--max-tokens", "20", "--seed", "5")
    found = evaluated(run, *words)
    samples = found["samples"]
    assert found["loss"] == result(run)["best_val_loss"]
    assert len(samples["texts"]) == samples["written"]["texts"] == samples["held_out"]["texts"] == 3
    assert samples["texts"][0] == load(run).generate("", 20, temperature=0.8, seed=5).rstrip("\ufffd")
    assert samples["written"].keys() == samples["held_out"].keys()
    assert samples["held_out"]["known_words"] == samples["held_out"]["longest_copy_max"] == 0  # it is in capitals
    assert (samples["seed"], samples["temperature"], samples["max_tokens"]) == (5, 0.8, 20)
    assert evaluated(run, *words, "--batch-size", "1")["samples"] == samples  # however many are written at a time
    assert evaluated(run, *words[:-1], "6")["samples"]["texts"] != samples["texts"]


def test_what_was_learnt_by_heart_is_told_from_what_was_not(train, tmp_path):
    """A network that has seen one sentence a hundred times copies it; held-out text does so by chance alone."""
    (tmp_path / "sentence.txt").write_text("The old house sleeps and the quick red bird sees it from a tree.\n" * 100)
    (tmp_path / "held_out.txt").write_text("A tree sees nothing, or does it? Nobody in the red house knows. " * 3)
    files = ("data.files=sentence.txt", "data.documents=line", "data.validation_files=held_out.txt")
    larger = ("model.block_size=64", "model.n_embd=64", "trainer.max_steps=150", "optimizer.lr=0.01")
    assert train(tmp_path / "run", *files, *larger, "data.batch_size=8", "data.begin=document") == 0
    samples = evaluated(tmp_path / "run", "--samples", "4", "--temperature", "0")["samples"]
    assert samples["written"]["copied_50_bytes"] > 0.9
    assert samples["written"]["known_words"] > 0.9
    assert samples["written"]["longest_copy_mean"] > 50 > 2 * samples["held_out"]["longest_copy_max"]
    assert samples["held_out"]["copied_50_bytes"] == 0
    assert samples["ended"] == 1


def test_samples_without_a_known_text_have_no_figures_that_need_one(run, tmp_path):
    shutil.copy(changed(run, forget), tmp_path / "alone.ckpt")
    words = ("--samples", "2", "--max-tokens", "8")
    found = evaluated(tmp_path / "alone.ckpt", *words)
    assert found["loss"] is found["split"] is found["samples"]["held_out"] is None
    written = found["samples"]["written"]
    assert written["known_words"] is written["longest_copy_max"] is written["copied_50_bytes"] is None
    assert written["distinct_1"] > 0
    found = evaluated(tmp_path / "alone.ckpt", *words, "--files", str(tmp_path / "other.txt"))
    assert found["loss"] > 0
    assert found["samples"]["held_out"]["texts"] == 2


def forget(state) -> None:
    """What a checkpoint of another program, or an exported one, would not have."""
    del state["callbacks"]


# What a person and a program see


def test_json_stands_alone_on_standard_output(run, tmp_path):
    done = door("evaluate", str(run), "--json", "--batch_size=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"split", "tokens", "verification", *FIGURES} <= set(found)
    assert found["loss"] == pytest.approx(result(run)["best_val_loss"], rel=1e-6)


def test_a_person_sees_tables(run, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ("--pairs", "pairs.jsonl", "--samples", "2", "--max-tokens", "8", "--files", "other.txt")
    assert main(options.evaluate().parse_args([str(run), *words])) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("files", "completions", "exact match", "held out", "distinct 2"))
    assert main(options.evaluate().parse_args([str(run)])) == 0
    said = capsys.readouterr().out
    assert f"{result(run)['best_val_loss']:.4f}" in said
    assert "bits per byte" in said
    assert "best.ckpt, step" in said


def refused(run: Path, *words: str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        evaluated(run, *words)
    assert len(str(error.value).splitlines()) <= 15
    return str(error.value)


def test_text_that_is_gone_or_changed_is_refused(run, tmp_path):
    (tmp_path / "tiny.txt").write_text(prose(40) + "More.")
    said = refused(run)
    then = result(run)["fingerprints"]["data"]
    assert then in said
    assert "and what is there now has" in said
    assert f"changed: {tmp_path / 'tiny.txt'}" in said
    (tmp_path / "tiny.txt").unlink()
    said = refused(run)
    assert "is not to be had" in said
    assert str(tmp_path / "tiny.txt") in said
    assert "--files" in said
    assert evaluated(run, "--files", str(tmp_path / "other.txt"))["loss"] > 0


def changed(run: Path, change) -> Path:
    path = run / "checkpoints/last.ckpt"
    state = checkpoint.load(path)
    change(state)
    for old in (run / "checkpoints").glob("*.ckpt"):
        old.unlink()
    torch.save(state, path)
    return path


def test_weights_that_are_no_numbers_are_named(run):
    def damage(state):
        state["state_dict"]["model.blocks.1.mlp.proj.weight"][2, 3] = math.nan

    path = changed(run, damage)
    said = refused(run)
    assert str(path) in said
    assert "1 of the" in said
    assert "blocks.1.mlp.proj.weight" in said


def test_a_loss_that_is_no_number_is_said(run):
    def damage(state):
        state["state_dict"]["model.norm.weight"][:] = 3e38

    changed(run, damage)
    assert "overflow" in refused(run)


def test_a_checkpoint_that_does_not_know_its_text_needs_files(run, tmp_path):
    shutil.copy(changed(run, forget), tmp_path / "alone.ckpt")
    assert "name text with --files" in refused(tmp_path / "alone.ckpt")
    assert evaluated(tmp_path / "alone.ckpt", "--files", str(tmp_path / "other.txt"))["loss"] > 0


def test_code_that_a_config_names_is_not_run(run):
    path = run / "config.yaml"
    cfg = yaml.safe_load(path.read_text())
    cfg["data"] |= {"files": None, "source": {"_target_": "os.system", "command": "touch pwned"}}
    path.write_text(yaml.safe_dump(cfg | {"trust": "os"}))
    assert "trust=os" in refused(run)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--files", "nowhere.txt"), ("--files='nowhere.txt'", "no such file")),
        (("--files", "empty.txt"), ("empty.txt holds no text",)),
        (("--files", "rows.jsonl"), ("rows.jsonl", "line 1 has no text called 'text'", "--field")),
        (("--files", "binary.txt"), ("binary.txt is binary", "byte 2")),
        (("--pairs", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--pairs", "rows.jsonl"), ("rows.jsonl: line 1 has no text called 'prompt'",)),
        (("--pairs", "binary.txt"), ("binary.txt",)),
        (("--pairs", "empty.txt"), ("empty.txt holds no pairs",)),
        (("--precision", "8-bit"), ("--precision 8-bit", "bf16-mixed")),
        (("--device", "tpu"), ("--device tpu",)),
        (("--samples", "2", "--temperature", "-1"), ("temperature=-1",)),
        (("--harness", "x", "--include-path", "nowhere"), ("--include-path", "nowhere")),
    ],
    ids=lambda words: " ".join(words),
)
def test_what_cannot_be_is_named(run, tmp_path, words, said):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\0")
    (tmp_path / "rows.jsonl").write_text('{"said": "one"}\n')
    message = refused(run, *words)
    for word in said:
        assert word in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fils", "x"), "did you mean --files?"),
        (("--samples", "0"), "is no whole number from 1 on"),
        (("--samples", "many"), "is no whole number from 1 on"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_one_line(words, said, tmp_path):
    done = door("evaluate", str(tmp_path), *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_run_is_exit_code_2(tmp_path):
    done = door("evaluate", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
