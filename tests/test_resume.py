"""A run that is interrupted and resumed is the run that was not: losses, samples and weights, bit for bit."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, compose, door, prose
from trials import differences, rows, weights

from gptlab import assembly, checkpoint, doors
from gptlab.resume import newest_checkpoint
from gptlab.run import RunFolder

STEPS = 13  # an epoch has 5 of them
RUN = (
    *("model.dropout=0.3", "trainer.accumulate_grad_batches=2", f"trainer.max_steps={STEPS}", "data.batch_size=30"),
    *("validation.every_steps=4", "samples.every_steps=3", "samples.max_tokens=20", "log.every_steps=2"),
    *("checkpoint.every_steps=1", "checkpoint.keep_last=100"),
)


def assert_same_run(one: Path, other: Path) -> None:
    assert differences(one, other) == []


def interrupted_at(run: Path, step: int, into: Path) -> Path:
    """The run folder as a kill -9 just after the save at `step` would have left it, with later rows in its files."""
    shutil.copytree(run, into)
    shutil.copy(into / f"checkpoints/step-{step:08d}.ckpt", into / "checkpoints/last.ckpt")
    (into / "result.json").unlink()
    (into / "status.json").write_text(json.dumps({"status": "running", "step": step, "pid": 2**22 + 1}))
    return into


def killed(run: Path) -> None:
    """Have the status say what it would after a kill -9 before the first save."""
    for file in ("result.json", "metrics.csv"):
        (run / file).unlink()
    (run / "status.json").write_text(json.dumps({"status": "running", "step": 0, "pid": 2**22 + 1}))


@pytest.fixture(scope="module", params=["adamw cosine", "muon wsd two workers"])
def variant(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "adamw cosine":
        return ("optimizer=adamw",)
    return ("optimizer=muon", "schedule=wsd", "data.num_workers=2", "model=tiny", "model.n_layer=1", "model.n_embd=16")


def test_resume_from_every_step_equals_uninterrupted(train, tmp_path, variant):
    whole = tmp_path / "whole"
    assert train(whole, *RUN, *variant) == 0
    assert len(list((whole / "checkpoints").glob("step-*.ckpt"))) == STEPS
    steps = range(1, STEPS) if variant == ("optimizer=adamw",) else (3, 5, 8, 10)
    for step in steps:
        part = interrupted_at(whole, step, tmp_path / f"part-{step}")
        assert train(part, f"resume={part}", "seed=77") == 0
        assert_same_run(whole, part)


def test_resume_extends_a_finished_run(train, tmp_path):
    """With a schedule that does not look at the end, stopping at 6 and going on to 13 is running to 13."""
    options = (*RUN, "schedule=constant")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(whole, *options) == 0
    assert train(part, *options, "trainer.max_steps=8") == 0
    assert json.loads((part / "status.json").read_text())["status"] == "completed"
    assert train(part, f"resume={part}", f"trainer.max_steps={STEPS}") == 0
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(part)[name]), name


def test_resuming_a_finished_run_changes_nothing(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=3") == 0
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("train.log", "status.json")
    }
    assert train(run, f"resume={run}") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_resume_of_a_run_without_checkpoint_starts_at_step_0(train, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(whole, *RUN, "trainer.max_steps=4") == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints")
    killed(part)
    assert train(part, f"resume={part}") == 0
    assert_same_run(whole, part)


def test_resume_auto_finds_the_unfinished_run_of_this_config_or_starts_one(train, tmp_path):
    whole = tmp_path / "whole"
    assert train(whole, *RUN) == 0
    part = interrupted_at(whole, 6, tmp_path / "runs/2026-01-01/00-00-00-test")
    other = tmp_path / "runs/2026-01-01/00-00-01-other"
    assert train(other, *RUN, "optimizer.lr=0.01") == 0
    (other / "status.json").write_text(json.dumps({"status": "interrupted", "step": 3, "pid": 1}))
    assert train(part, *RUN, "resume=auto") == 0
    assert_same_run(whole, part)
    assert train(tmp_path / "x", *RUN, "resume=auto", "optimizer.lr=0.5", "trainer.max_steps=2") == 0
    assert len([path for path in (tmp_path / "runs").glob("*/*") if path.is_dir()]) == 3


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("manifest", ["there", "damaged", "gone"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_damaged_checkpoint_falls_back_to_the_newest_valid_one_and_says_so(train, tmp_path, capsys, damage, manifest):
    whole = tmp_path / "whole"
    assert train(whole, *RUN) == 0
    part = interrupted_at(whole, 6, tmp_path / "part")
    folder = part / "checkpoints"
    for file in folder.glob("step-*.ckpt"):
        if file.name > "step-00000005.ckpt":
            file.unlink()
    (folder / "best.ckpt").unlink()
    damage(folder / "last.ckpt")
    if manifest == "damaged":
        (folder / "manifest.json").write_text("{")
    elif manifest == "gone":
        (folder / "manifest.json").unlink()
    capsys.readouterr()
    assert train(part, f"resume={part}") == 0
    said = capsys.readouterr().out
    assert f"passed over: {folder / 'last.ckpt'}" in said
    assert f"continuing from {folder / 'step-00000005.ckpt'}, at step 5" in said
    assert ("its own checksums" in said) == (manifest != "there")
    assert_same_run(whole, part)


@pytest.mark.parametrize("background", ["true", "false"])
def test_no_damaged_file_takes_all_there_is(train, tmp_path, capsys, background):
    """The newest state is the best one too, and both names are one file; a second one holds the state before."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = (*RUN, "schedule=constant", "checkpoint.keep_last=0", f"checkpoint.background={background}")
    assert train(whole, *options) == 0
    assert train(part, *options, "trainer.max_steps=6") == 0
    folder = part / "checkpoints"
    assert (folder / "last.ckpt").samefile(folder / "best.ckpt")
    assert len({path.stat().st_ino for path in folder.glob("*.ckpt")}) == 2
    truncate(folder / "last.ckpt")
    capsys.readouterr()
    assert train(part, f"resume={part}", f"trainer.max_steps={STEPS}") == 0
    assert f"continuing from {folder / 'previous.ckpt'}, at step 5" in capsys.readouterr().out
    assert_same_run(whole, part)
    assert checkpoint.load(folder / "previous.ckpt")["global_step"] == STEPS - 1


def test_a_run_that_goes_on_has_two_files_from_its_first_save_on(train, tmp_path):
    run = tmp_path / "run"
    options = (*RUN, "schedule=constant", "checkpoint.keep_last=0", "validation.every_steps=1")
    assert train(run, *options, "trainer.max_steps=4") == 0
    (run / "checkpoints/previous.ckpt").unlink()
    assert train(run, f"resume={run}", "trainer.max_steps=5") == 0
    assert checkpoint.load(run / "checkpoints/previous.ckpt")["global_step"] == 4


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, *RUN, "trainer.max_steps=7") == 0
    before = (run / "metrics.csv").read_text()
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.unlink()
    with pytest.raises(ValueError, match="no checkpoint is left of a run that had some: put a whole one there"):
        train(run, f"resume={run}")
    shutil.rmtree(run / "checkpoints")
    for status in ("completed", "interrupted"):  # then, by the validations that it has made
        (run / "status.json").write_text(json.dumps({"status": status, "step": 3, "pid": 1}))
        with pytest.raises(ValueError, match="no checkpoint is left"):
            train(run, f"resume={run}")
    assert (run / "metrics.csv").read_text() == before
    killed(run)
    assert train(run, f"resume={run}") == 0
    assert "no checkpoint yet: the run begins at step 0" in capsys.readouterr().out


def test_a_checkpoint_that_was_put_back_by_hand_is_held_to_its_own_checksums(train, tmp_path, capsys):
    """The manifest has forgotten it, which makes it no damaged one."""
    run, aside = tmp_path / "run", tmp_path / "aside.ckpt"
    assert train(run, *RUN, "checkpoint.keep_last=2") == 0
    other = tmp_path / "other"
    assert train(other, *RUN, "trainer.max_steps=4", "seed=5") == 0
    shutil.copy(other / "checkpoints/last.ckpt", aside)
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.unlink()
    shutil.copy(aside, run / "checkpoints/last.ckpt")
    capsys.readouterr()
    assert newest_checkpoint(RunFolder(run)) == run / "checkpoints/last.ckpt"
    assert "manifest.json does not know it; by its own checksums it is whole" in capsys.readouterr().out
    flip_a_bit(run / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt: it has .* bytes and should have"):
        newest_checkpoint(RunFolder(run))


def test_a_named_checkpoint_that_is_damaged_is_refused(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, *RUN, "trainer.max_steps=3") == 0
    flip_a_bit(run / "checkpoints/step-00000002.ckpt")
    with pytest.raises(ValueError, match=r"step-00000002.ckpt: its bytes are none that manifest.json knows"):
        train(run, f"resume={run}/checkpoints/step-00000002.ckpt")
    assert train(run, f"resume={run}/checkpoints/step-00000001.ckpt") == 0


def as_format_1(run: Path) -> None:
    """The run folder as the first version of gptlab left it."""
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    assert cfg.pop("format") == 4
    del (
        cfg["depth"],
        cfg["model"]["head_dim"],
        cfg["data"]["text_bytes"],
        cfg["nonfinite"],
        cfg["checkpoint"]["every_minutes"],
        cfg["checkpoint"]["background"],
    )
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    (run / "checkpoints/manifest.json").unlink()
    for path in (run / "checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)
        del state["gptlab"]["skipped_steps"], state["gptlab"]["hardware"]
        state["gptlab"]["format"] = 1
        (own,) = state["callbacks"]["RandomState"]["ranks"]
        state["callbacks"]["RandomState"] = own | {"cuda": []}
        torch.save(state, path)


def test_a_run_of_an_older_format_goes_on(train, tmp_path):
    whole = tmp_path / "whole"
    assert train(whole, *RUN, "optimizer.width=null", "data.text_bytes=null") == 0  # what had no key then
    part = interrupted_at(whole, 6, tmp_path / "part")
    as_format_1(part)
    assert train(part, f"resume={part}") == 0
    assert_same_run(whole, part)
    assert yaml.safe_load((part / "config.yaml").read_text())["format"] == 4


def test_a_run_of_a_newer_format_is_refused_by_name(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2") == 0
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("format: 4", "format: 5"))
    with pytest.raises(ValueError, match="a run folder of format 5, this gptlab knows up to 4"):
        train(run, f"resume={run}")
    (run / "config.yaml").write_text(text)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    state["gptlab"]["format"] = 3
    torch.save(state, run / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="a checkpoint of format 3, this gptlab knows up to 2"):
        checkpoint.load(run / "checkpoints/last.ckpt")


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "format: two"])
def test_a_config_that_is_none_is_refused_by_name(train, tmp_path, text):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2") == 0
    shutil.rmtree(run / "checkpoints")  # each of them has a copy
    killed(run)
    (run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml: damaged"):
        train(run, f"resume={run}")


def test_another_machine_is_said_and_not_refused(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2") == 0
    path = run / "checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)
    state["gptlab"]["hardware"] |= {"processor": "an abacus", "threads": 99, "compiled": True, "ranks": 3}
    state["gptlab"]["hardware"] |= {"torch": "1.0", "gptlab": "0.0.1"}  # other versions round otherwise
    checkpoint.save(state, path)
    assert train(run, f"resume={run}", "trainer.max_steps=3") == 0
    said = capsys.readouterr().out
    assert "not bit for bit: processor an abacus then" in said
    for changed in (
        "threads 99 then",
        "ranks 3 then, 1 now",
        "compiled True then, False now",
        "torch 1.0 then",
        "gptlab 0.0.1",
    ):
        assert changed in said
    assert train(run, f"resume={run}", "trainer.max_steps=4") == 0
    assert "not bit for bit" not in capsys.readouterr().out


def test_compiling_may_change_when_a_run_goes_on(train, tmp_path, capsys):
    """As it must where the network is split from there on."""
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2", "compile=true") == 0
    assert train(run, f"resume={run}", "trainer.max_steps=3", "compile=false") == 0
    assert "compiled True then, False now" in capsys.readouterr().out


def test_a_run_saved_in_the_background_is_the_same_run(train, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert train(one, *RUN) == 0
    assert train(other, *RUN, "checkpoint.background=true") == 0
    assert_same_run(one, other)
    names = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints").iterdir())
    part = interrupted_at(other, 7, tmp_path / "part")
    assert train(part, f"resume={part}") == 0
    assert_same_run(one, part)


def test_other_overrides_than_the_free_ones_are_refused_with_both_values(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "optimizer.lr=0.001", "trainer.max_steps=2") == 0
    with pytest.raises(ValueError, match=r"optimizer.lr: the run has 0.001, the command line 0.5"):
        train(run, f"resume={run}", "optimizer.lr=0.5")
    with pytest.raises(ValueError, match=r"model\.n_layer"):
        train(run, f"resume={run}", "model.n_layer=3")


def contents(run: Path) -> dict[str, bytes]:
    """What a run has on disk, but for its log and who runs it."""
    files = [
        path for path in run.rglob("*") if path.is_file() and path.name not in ("train.log", "status.json", ".lock")
    ]
    return {str(path): path.read_bytes() for path in files}


def test_changed_data_is_refused_naming_both_fingerprints_and_nothing_is_lost(train, tmp_path, text_file, capsys):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2", "samples.every_steps=1") == 0
    before, old = contents(run), json.loads((run / "result.json").read_text())["fingerprints"]["data"]
    text_file.write_text(text_file.read_text() + "More text.\n")
    assert train(run, f"resume={run}", "trainer.max_steps=4") == 2
    message = capsys.readouterr().err
    found = re.findall(r"\b[0-9a-f]{64}\b", message)
    assert old in found
    assert f"\nchanged: {text_file}\n" in message
    assert len(set(found)) == 2
    assert contents(run) == before
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("completed", 2)


@pytest.mark.parametrize("damage", ["gone", "broken", "half"])
@pytest.mark.parametrize("kind", ["char", "sentencepiece", "hf", "word"])
def test_a_damaged_tokenizer_is_mended_from_the_checkpoint(train, tmp_path, capsys, kind, damage):
    run = tmp_path / "run"
    size = ("tokenizer.vocab_size=320",) if kind in ("sentencepiece", "hf") else ()
    assert train(run, "trainer.max_steps=2", f"tokenizer={kind}", *size) == 0
    before = {path.name: path.read_bytes() for path in (run / "tokenizer").iterdir()}
    sidecar = run / "tokenizer/gptlab_tokenizer.json"
    if damage == "gone":
        shutil.rmtree(run / "tokenizer")
    else:
        sidecar.write_text("{broken" if damage == "broken" else "{}")
    assert train(run, f"resume={run}", "trainer.max_steps=4") == 0
    said = capsys.readouterr().out
    assert f"{run}/tokenizer" in said
    assert f"going on with the copy in {run}/checkpoints/last.ckpt" in said
    assert "tokenizer.path" not in said
    assert {path.name: path.read_bytes() for path in (run / "tokenizer").iterdir()} == before


def test_a_word_for_the_device_changes_where_a_run_goes_on_and_nothing_else(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=3", "trainer.accumulate_grad_batches=2") == 0
    assert train(run, f"resume={run}", "trainer=cpu", "trainer.max_steps=5") == 0
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["train_tokens"]) == (5, 5 * 2 * 4 * 16)


def test_another_logger_may_go_on_with_a_run(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2") == 0
    assert train(run, f"resume={run}", "logger=tensorboard", "trainer.max_steps=4") == 0
    assert list((run / "tensorboard").glob("events*"))
    assert train(run, f"resume={run}", "logger=csv", "trainer.max_steps=5") == 0


def test_either_limit_extends_a_run_that_ended_by_the_other(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_epochs=1", "trainer.max_steps=-1", "data.batch_size=64") == 0
    steps = json.loads((run / "result.json").read_text())["steps"]
    assert train(run, f"resume={run}", f"trainer.max_steps={steps + 2}") == 0
    assert json.loads((run / "result.json").read_text())["steps"] == steps + 2
    assert train(run, f"resume={run}", "trainer.max_epochs=3") == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 3 * steps


def test_a_spent_budget_of_time_is_nothing_to_do(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=100000", "max_time=0.2") == 0
    steps = json.loads((run / "result.json").read_text())["steps"]
    assert train(run, f"resume={run}") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert json.loads((run / "result.json").read_text())["steps"] == steps


def test_odd_line_separators_in_samples_do_not_break_a_resume(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, *RUN, "trainer.max_steps=4") == 0
    odd = json.dumps({"step": 2, "prompt": "", "text": "a\u2028b\u0085c\u2029"}, ensure_ascii=False) + "\n"
    (run / "samples.jsonl").write_text(odd + '{"step": 4, "half a li')
    assert train(run, f"resume={run}", "trainer.max_steps=6") == 0
    assert (run / "samples.jsonl").read_text().startswith(odd)
    assert "half" not in (run / "samples.jsonl").read_text()


def test_a_run_on_relative_paths_resumes_from_another_folder(tmp_path, text_file):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = door("train", *SMALL, f"data.files={text_file.name}", "run_dir=here", "trainer.max_steps=2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    again = door("train", f"resume={tmp_path / 'here'}", "trainer.max_steps=4", cwd=elsewhere)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_signals_save_and_exit_and_the_run_resumes_exactly(train, tmp_path, text_file, signum, code):
    options = (*SMALL, f"data.files={text_file}", *RUN, "trainer.max_steps=2000", "checkpoint.every_steps=500")
    options = (*options, "samples.every_steps=1000", "validation.every_steps=500", "checkpoint.keep_last=0")
    options = (*options, "schedule=constant")
    whole, part = tmp_path / "whole", tmp_path / "part"
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", *options, f"run_dir={part}"], stdout=subprocess.PIPE, text=True
    )
    while not (part / "metrics.csv").exists() or len((part / "metrics.csv").read_text().splitlines()) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert output.splitlines()[-1] == f"run: {part}"
    status = json.loads((part / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert json.loads((part / "result.json").read_text())["status"] == "interrupted"
    at = torch.load(part / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert at == status["step"] < 2000

    end = at + 7  # the schedule of both looks at this end from `at` on, so only a constant one is the same before
    resumed = door("train", f"resume={part}", f"trainer.max_steps={end}")
    assert resumed.returncode == 0, resumed.stderr
    whole_run = door("train", *options, f"run_dir={whole}", f"trainer.max_steps={end}")
    assert whole_run.returncode == 0, whole_run.stderr
    assert rows(whole) == rows(part)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(part)[name]), name


def test_init_from_takes_weights_network_and_tokenizer_and_starts_anew(train, tmp_path):
    parent, child = tmp_path / "parent", tmp_path / "child"
    assert train(parent, *RUN, "tokenizer=char", "trainer.max_steps=4") == 0
    assert train(child, *RUN, f"init_from={parent}", "trainer.max_steps=4", "optimizer.lr=0", "model.dropout=0.0") == 0
    for name, tensor in weights(parent).items():
        assert torch.equal(tensor, weights(child)[name]) or name.endswith("rotary"), name
    result = json.loads((child / "result.json").read_text())
    assert result["parent"]["checkpoint"] == str(parent / "checkpoints/best.ckpt")
    assert result["steps"] == 4
    fingerprints = [json.loads((run / "result.json").read_text())["fingerprints"] for run in (parent, child)]
    assert fingerprints[0]["tokenizer"] == fingerprints[1]["tokenizer"]

    shutil.rmtree(parent)  # a child resumes without its parent, and still knows it
    (child / "result.json").unlink()
    assert train(child, f"resume={child}", "trainer.max_steps=6") == 0
    assert json.loads((child / "result.json").read_text())["parent"] == result["parent"]


def test_init_from_refuses_another_network(train, tmp_path, capsys):
    parent = tmp_path / "parent"
    assert train(parent, "trainer.max_steps=1") == 0
    cfg = ("model.n_layer=3", f"init_from={parent}")
    assert train(tmp_path / "child", *cfg, "trainer.max_steps=1") == 2
    assert "model.n_layer: the parent has 2, the command line 3" in capsys.readouterr().err


def test_init_from_a_word_names_the_word_and_all_that_differs(train, tmp_path, capsys):
    parent = tmp_path / "parent"
    sizes = ("tokenizer=sentencepiece", "tokenizer.vocab_size=320")
    assert train(parent, *sizes, "trainer.max_steps=1") == 0
    other = ("model=gpt2", "tokenizer=sentencepiece", "tokenizer.vocab_size=300")
    assert train(tmp_path / "child", *other, f"init_from={parent}") == 2
    message = capsys.readouterr().err
    assert "(model=gpt2, tokenizer.vocab_size=300)" in message
    assert "model.norm: the parent has rmsnorm, the command line layernorm" in message
    assert "tokenizer.vocab_size: the parent has 320, the command line 300" in message
    assert train(tmp_path / "child", *sizes, f"init_from={parent}", "trainer.max_steps=1") == 0


@pytest.fixture
def commanded(text_file, monkeypatch, capsys):
    """`commanded(*overrides)` trains by the whole command line: the exit code, and what standard error says."""
    import gptlab.train

    def run(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["train.py", *overrides])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            gptlab.train.main()
        return exit_.value.code, capsys.readouterr().err

    return run


def test_what_is_said_of_the_same_windows_on_other_ranks(capsys):
    cfg = compose("data.batch_size=8", "trainer.accumulate_grad_batches=1")
    doors.quiet()
    said = {}
    for world, windows in ((1, 8), (1, 16), (2, 16), (4, 12), (16, 16)):
        fitted = assembly.fit_to_ranks(cfg, windows, world)
        batch, accumulate = fitted["data"]["batch_size"], fitted["trainer"]["accumulate_grad_batches"]
        assert batch * accumulate * world == windows
        said[world, windows] = capsys.readouterr().out.strip()
    assert said == {
        (1, 8): "",
        (1, 16): "a step is 2 micro-batches of 8 windows on one rank now, as many windows as before",
        (2, 16): "",
        (4, 12): "a step is 1 micro-batch of 3 windows on each of 4 ranks now, as many windows as before",
        (16, 16): "a step is 1 micro-batch of 1 window on each of 16 ranks now, as many windows as before",
    }


def test_a_config_that_is_missing_is_said_to_be_no_more_than_that(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=1") == 0
    (run / "config.yaml").unlink()
    capsys.readouterr()
    assert train(run, f"resume={run}", "trainer.max_steps=2") == 0
    said = capsys.readouterr().out
    assert f"{run}/config.yaml is missing; going on with the copy in {run}/checkpoints/" in said
    assert "no run folder" not in said


def test_text_that_is_no_longer_the_same_is_named_by_file(train, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcdef":
        (texts / name).write_text(prose(100, seed=ord(name)))
    run, data = tmp_path / "run", f"data.files={texts}/*"
    assert train(run, data, "trainer.max_steps=1") == 0
    (texts / "a").write_text(prose(100, seed=7))
    (texts / "b").unlink()
    (texts / "g").write_text(prose(100, seed=8))
    capsys.readouterr()
    assert train(run, f"resume={run}", "trainer.max_steps=2") == 2
    message = capsys.readouterr().err
    assert f"\nchanged: {texts}/a; missing: {texts}/b; new: {texts}/g\n" in message
    for name in "cdefg":
        (texts / name).unlink()
    (texts / "a").write_text(prose(100, seed=ord("a")))
    assert train(run, f"resume={run}", "trainer.max_steps=2") == 2
    assert f"missing: {texts}/b, {texts}/c, {texts}/d and 2 more\n" in capsys.readouterr().err


def test_a_key_that_only_the_run_has_is_refused_with_both_values(commanded, train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=1", "callbacks=[ema,early_stopping]") == 0
    before = contents(run)
    for place in (run, run / "checkpoints/last.ckpt"):
        code, message = commanded(f"resume={place}", "callbacks.ema.decay=0.9")
        assert code == 2
        assert message.startswith("error: a resumed run keeps its config; leave these overrides out")
        assert "callbacks.ema.decay: the run has 0.999, the command line 0.9 (callbacks.ema.decay=0.9)" in message
    code, message = commanded(f"resume={run}", "callbacks.early_stopping.patience=9")
    assert code == 2
    assert "the run has 3; +callbacks.early_stopping.patience=9 changes it" in message
    for other in (f"resume={run}", "resume=nowhere"):
        code, message = commanded(other, "callbacks.emma.decay=0.9")
        assert (code, "callbacks.emma.decay: there is no such key" in message) == (2, True)
    assert contents(run) == before


def test_what_an_experiment_says_counts_as_said(commanded, text_file, tmp_path):
    """Also where it says what is the default anyway, and where it chooses a word; and the message names it."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\n# Mine\ndefaults:\n  - override /tokenizer: char\nmodel: {n_layer: 4, n_embd: 32}\n"
    )
    small = [word for word in SMALL if not word.startswith(("tokenizer", "model.n_layer", "model.n_embd"))]
    run, limit = tmp_path / "run", "trainer.max_steps=1"
    given = (f"data.files={text_file}", f"run_dir={run}", limit)
    assert commanded(*small, *given, "experiments=mine", "model.n_layer=2") == (0, "")
    code, message = commanded(f"resume={run}", "experiments=mine")
    assert code == 2
    assert "model.n_layer: the run has 2, the command line 4 (experiments=mine)" in message
    child = (f"data.files={text_file}", f"run_dir={tmp_path / 'child'}", limit, f"init_from={run}")
    code, message = commanded("experiments=mine", *child)
    assert code == 2
    assert "(experiments=mine)" in message
    assert "model.n_layer: the parent has 2, the command line 4" in message
    code, message = commanded(*child, "tokenizer=byte")
    assert code == 2
    assert "CharTokenizer" in message
    assert commanded(f"resume={run}", "experiments=mine", "model.n_layer=2", "trainer.max_steps=2") == (0, "")


def test_an_experiment_from_a_folder_given_by_config_dir(commanded, text_file, tmp_path):
    folder = tmp_path / "elsewhere/experiments"
    folder.mkdir(parents=True)
    (folder / "far.yaml").write_text("# @package _global_\n# Far\nseed: 5\n")
    given = (*SMALL, f"data.files={text_file}", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1")
    assert commanded("--config-dir", str(folder.parent), "experiments=far", *given)[0] == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["seed"] == 5


def test_resume_auto_says_that_it_found_nothing(train, tmp_path, capsys):
    assert train(tmp_path / "run", "resume=auto", "trainer.max_steps=1") == 0
    assert "a new one starts" in capsys.readouterr().out


def test_a_signal_before_training_ends_in_an_orderly_way_too(tmp_path, text_file):
    """While data is being read, say: nothing to save, but the status and the exit code tell."""
    run = tmp_path / "run"
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=100000", f"run_dir={run}")
    process = subprocess.Popen([sys.executable, "-m", "gptlab.train", *options], stdout=subprocess.PIPE, text=True)
    while not (run / "status.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    assert door("train", f"resume={run}", "trainer.max_steps=2").returncode == 0


@pytest.mark.slow
def test_a_compiled_run_on_two_threads_repeats_and_resumes_exactly(tmp_path, text_file):
    """Compiled kernels may add up in the order in which threads finish, unless they are told not to."""
    size = "model.n_embd=64 model.n_layer=2 model.n_head=2 model.block_size=64 data.batch_size=16 tokenizer=byte"
    options = (
        *size.split(),
        f"data.files={text_file}",
        "compile=true",
        "trainer=cpu",
        "model.dropout=0.1",
        "logger=csv",
    )
    options = (
        *options,
        "validation.every_steps=20",
        "log.every_steps=5",
        "schedule=constant",
        "samples.every_steps=null",
    )
    one, two, part = tmp_path / "one", tmp_path / "two", tmp_path / "part"
    commands = [(*options, f"run_dir={run}", "trainer.max_steps=60") for run in (one, two)]
    commands += [(*options, f"run_dir={part}", "trainer.max_steps=33"), (f"resume={part}", "trainer.max_steps=60")]
    for command in commands:
        done = door("train", *command, OMP_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
    for other in (two, part):
        for name, tensor in weights(one).items():
            assert torch.equal(tensor, weights(other)[name]), (other.name, name)
    assert rows(one) == rows(two)
