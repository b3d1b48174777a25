"""No step is ever lost: whatever ends a run, at whatever moment, it goes on as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, prose
from trials import differences

from gptlab import checkpoint, doors, files
from gptlab.callbacks.steps import CompileAhead
from gptlab.resume import newest_checkpoint
from gptlab.run import RunFolder
from gptlab.signals import SIGNALS
from gptlab.tasks.lm import LMTask

# The table of benchmarks/faults.py, with few trials. Of its faults, test_resume covers damaged checkpoints and changed
# text, test_bad_input full disks, test_callbacks what is not finite, and test_tokens a cache that is not whole.

FEW = "kill -9$|read-only|token file, a bit"


def table(folder: Path, *arguments: str, timeout: float) -> list[dict]:
    rows = folder / "rows.json"
    command = [sys.executable, REPOSITORY / "benchmarks/faults.py", "--json", rows, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert rows.exists(), done.stdout + done.stderr
    return json.loads(rows.read_text())


def assert_nothing_lost(rows: list[dict]) -> None:
    assert rows
    for row in rows:
        if not row["note"].startswith("skipped"):
            assert row["trials"] > 0, row
            assert (row["exact"], row["steps_lost"], row["data_lost"]) == (row["trials"], 0, 0), row


def test_faults_lose_no_step(tmp_path):
    rows = table(tmp_path, "--kills", "3", "--trials", "1", "--only", FEW, timeout=300)
    assert len(rows) == 3
    assert_nothing_lost(rows)


@pytest.mark.slow
def test_fifty_kills_and_three_of_every_other_fault_lose_no_step(tmp_path):
    rows = table(tmp_path, "--kills", "50", "--trials", "3", timeout=1800)
    assert_nothing_lost(rows)
    assert {row["fault"]: row["trials"] for row in rows}["kill -9"] >= 50


# Signals at every kind of moment, in this process

RUN = (
    *("model.dropout=0.3", "trainer.accumulate_grad_batches=4", "data.batch_size=20", "trainer.max_steps=9"),
    *("validation.every_steps=3", "samples.every_steps=4", "samples.max_tokens=5", "log.every_steps=2"),
    *("checkpoint.every_steps=100", "model.n_layer=1", "model.n_embd=16"),
)
EPOCH = 5  # steps of RUN in one


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`uninterrupted(train, *options)` is the run of RUN and these options, trained once."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(train: Callable[..., int], *options: str) -> Path:
        if options not in runs:
            runs[options] = tmp_path_factory.mktemp("whole") / "run"
            assert train(runs[options], *RUN, *options) == 0
        return runs[options]

    return run


@pytest.fixture
def handlers() -> None:
    """What the command line does with signals, for training in this process; afterwards all is as it was."""
    before = {signum: signal.signal(signum, doors.interrupt) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def signalled(
    monkeypatch: pytest.MonkeyPatch, owner: type, hook: str, when: Callable[..., bool], *signums: int
) -> list:
    """Have `owner.hook` send these signals to this process the first time that `when` says so, and then go on."""
    real, sent = getattr(owner, hook), []

    def sending(self, *args, **kwargs):
        if not sent and when(self, *args):
            sent.append(True)
            for signum in signums:
                os.kill(os.getpid(), signum)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, hook, sending)
    return sent


def saved_step(run: Path) -> int:
    path = newest_checkpoint(RunFolder(run))
    return 0 if path is None else checkpoint.load(path)["global_step"]


def assert_goes_on(train: Callable[..., int], whole: Path, part: Path, step: int) -> None:
    """From the checkpoint of `step`, to what the uninterrupted run came to."""
    assert saved_step(part) == step
    assert train(part, f"resume={part}") == 0
    assert differences(whole, part) == []


def at_micro_batch(step: int, micro: int) -> Callable[..., bool]:
    """Whether a training step is that of micro-batch `micro`, from 0 to 3, of an optimizer step."""
    return lambda task, batch, batch_idx: task.trainer.global_step + 1 == step and batch_idx % 4 == micro


MOMENTS = {
    **{f"micro-batch {micro}": (LMTask, "training_step", at_micro_batch(5, micro), 5) for micro in range(4)},
    "first micro-batch of all": (LMTask, "training_step", at_micro_batch(1, 0), 1),
    "last micro-batch of an epoch": (LMTask, "training_step", at_micro_batch(EPOCH, 3), EPOCH),
    "first micro-batch of an epoch": (LMTask, "training_step", at_micro_batch(EPOCH + 1, 0), EPOCH + 1),
    "last micro-batch before a validation": (LMTask, "training_step", at_micro_batch(6, 3), 6),
    "in a validation": (LMTask, "validation_step", lambda task, *_: task.trainer.global_step == 3, 3),
    "end of a validation": (LMTask, "on_validation_epoch_end", lambda task: task.trainer.global_step == 6, 6),
    "end of an epoch": (LMTask, "on_train_epoch_end", lambda task: True, EPOCH + 1),
    "compiling, before the first step": (CompileAhead, "on_train_start", lambda *_: True, 0),
    "reading data": (LMTask, "configure_optimizers", lambda task: True, 0),
}


SELDOM = ("first", "last micro-batch before", "end of", "reading")  # in the slow tests: they are like the others
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=SLOW if name.startswith(SELDOM) else ()) for name in MOMENTS]
)
def test_sigterm_at_any_moment(train, tmp_path, monkeypatch, handlers, uninterrupted, moment, capsys):
    whole, part = uninterrupted(train), tmp_path / "part"
    owner, hook, when, step = MOMENTS[moment]
    with monkeypatch.context() as patch:
        sent = signalled(patch, owner, hook, when, signal.SIGTERM)
        assert train(part, *RUN) == 143
    assert sent
    assert saved_step(part) == step
    saved = f", saved at step {step}" if step else ""
    said = f"interrupted{saved}; continue with: python -m gptlab.train resume={part}"
    assert said in capsys.readouterr().out
    assert json.loads((part / "status.json").read_text())["status"] == "interrupted"
    assert train(part, f"resume={part}", "seed=77") == 0
    assert differences(whole, part) == []


@pytest.mark.parametrize("validation", [pytest.param("null", marks=SLOW), "3"])
def test_a_run_that_is_interrupted_at_every_step(train, tmp_path, monkeypatch, handlers, uninterrupted, validation):
    """Each session does one step: what a resume makes of an epoch's end must not show in the resume after it."""
    options = ("trainer.max_steps=6", "data.batch_size=50", f"validation.every_steps={validation}")  # 2 an epoch
    whole, part = uninterrupted(train, *options), tmp_path / "part"
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            signalled(patch, LMTask, "training_step", at_micro_batch(step, 1), signal.SIGTERM)
            assert train(part, *((*RUN, *options) if step == 1 else (f"resume={part}",))) == 143
        assert saved_step(part) == step
    assert train(part, f"resume={part}") == 0
    assert differences(whole, part) == []


def test_a_signal_in_the_last_step_lets_the_run_end(train, tmp_path, monkeypatch, handlers, uninterrupted):
    whole, part = uninterrupted(train), tmp_path / "part"
    sent = signalled(monkeypatch, LMTask, "training_step", at_micro_batch(9, 2), signal.SIGTERM)
    assert train(part, *RUN) == 0
    assert sent
    assert differences(whole, part) == []


def test_a_second_ctrl_c_ends_at_once_and_the_last_checkpoint_is_whole(
    train, tmp_path, monkeypatch, handlers, uninterrupted
):
    whole, part = uninterrupted(train), tmp_path / "part"
    with monkeypatch.context() as patch:
        signalled(patch, LMTask, "training_step", at_micro_batch(6, 1), signal.SIGINT, signal.SIGINT)
        assert train(part, *RUN) == 130
    assert_goes_on(train, whole, part, 3)  # of the validation: nothing was saved on the way out


def test_ctrl_c_twice_in_the_middle_of_saving_leaves_the_file_of_before(
    train, tmp_path, monkeypatch, handlers, uninterrupted
):
    whole, part = uninterrupted(train), tmp_path / "part"
    real = torch.save

    def interrupted_save(content, file):
        if content["global_step"] == 6:
            file.write(b"half of it")
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted_save)
        assert train(part, *RUN) == 130
    assert not list(part.rglob("*.tmp.*"))
    assert_goes_on(train, whole, part, 3)


def test_ctrl_c_twice_waits_for_a_file_that_is_written_in_the_background(
    train, tmp_path, monkeypatch, handlers, uninterrupted
):
    whole, part = uninterrupted(train), tmp_path / "part"
    real = torch.save

    def slow_save(content, file):
        time.sleep(0.3)
        real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", slow_save)
        signalled(patch, LMTask, "training_step", at_micro_batch(7, 0), signal.SIGINT, signal.SIGINT)
        assert train(part, *RUN, "checkpoint.background=true") == 130
    assert saved_step(part) == 6
    assert train(part, f"resume={part}") == 0
    assert differences(whole, part) == []


@pytest.mark.parametrize(
    ("optimizer", "schedule", "workers"),
    [
        ("adamw", "constant", 2),
        ("muon", "linear", 0),
        pytest.param("muon", "constant", 0, marks=SLOW),
        pytest.param("adamw", "linear", 2, marks=SLOW),
        pytest.param("adamw", "wsd", 0, marks=SLOW),
        pytest.param("muon", "cosine", 2, marks=SLOW),
    ],  # test_resume has adamw with cosine, and muon with wsd and two workers
)
def test_optimizers_schedules_and_workers(
    train, tmp_path, monkeypatch, handlers, uninterrupted, optimizer, schedule, workers
):
    options = (f"optimizer={optimizer}", f"schedule={schedule}", f"data.num_workers={workers}")
    whole, part = uninterrupted(train, *options[:2]), tmp_path / "part"
    with monkeypatch.context() as patch:
        signalled(patch, LMTask, "training_step", at_micro_batch(7, 2), signal.SIGTERM)
        assert train(part, *RUN, *options) == 143
    assert saved_step(part) == 7
    assert train(part, f"resume={part}", "seed=77") == 0
    assert differences(whole, part) == []


# Runs that end by themselves

# The loss stays where it is, so it does not improve on that of step 2, and the run ends 2 * patience steps later.
STOPPING = (
    *("callbacks=early_stopping", "optimizer=adamw", "optimizer.lr=0", "trainer.max_steps=40"),
    *("validation.every_steps=2", "samples.every_steps=3", "samples.max_tokens=5", "log.every_steps=1"),
)


def test_a_run_that_has_stopped_early_stays_so_until_its_patience_is_longer(train, tmp_path, capsys):
    run, longer = tmp_path / "run", tmp_path / "longer"
    patience = "callbacks.early_stopping.patience"
    assert train(run, *STOPPING, f"{patience}=2") == 0
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.suffix in (".csv", ".jsonl", ".ckpt")}
    assert saved_step(run) == 6
    capsys.readouterr()
    for more in ((), ("trainer.max_steps=60",)):
        assert train(run, f"resume={run}", *more) == 0
        assert "nothing to do: the run has stopped early" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((run / "status.json").read_text())["status"] == "completed"

    assert train(run, f"resume={run}", f"+{patience}=4") == 0
    assert saved_step(run) == 10
    assert train(longer, *STOPPING, f"{patience}=4") == 0
    assert differences(longer, run) == []


def test_patience_is_not_given_anew_to_a_run_that_was_interrupted(train, tmp_path, monkeypatch, handlers):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(whole, *STOPPING) == 0
    with monkeypatch.context() as patch:
        signalled(patch, LMTask, "training_step", lambda task, *_: task.trainer.global_step == 5, signal.SIGTERM)
        assert train(part, *STOPPING) == 143
    assert train(part, f"resume={part}") == 0
    assert saved_step(part) == 8
    assert differences(whole, part) == []


@pytest.mark.parametrize("result", ["gone", "of before", "damaged"])
def test_a_kill_after_the_last_checkpoint_still_leaves_a_result(train, tmp_path, uninterrupted, result):
    whole, part = uninterrupted(train), tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "status.json").write_text(json.dumps({"status": "running", "step": 8, "pid": 2**22 + 1}))
    if result == "gone":
        (part / "result.json").unlink()
    else:
        (part / "result.json").write_text('{"status": "interrupted", "steps": 3}' if result == "of before" else "{")
    assert train(part, f"resume={part}") == 0
    assert differences(whole, part) == []
    status = json.loads((part / "status.json").read_text())
    assert (status["status"], status["step"]) == ("completed", 9)


# What lies beside the checkpoints


def stopped_at_6(train: Callable[..., int], part: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        signalled(patch, LMTask, "training_step", at_micro_batch(6, 0), signal.SIGTERM)
        assert train(part, *RUN) == 143
    return part


DAMAGED = {
    "empty metrics": ("metrics.csv", b""),
    "half a header": ("metrics.csv", b"step,epoch"),
    "no metrics": ("metrics.csv", None),
    "metrics that are no text": ("metrics.csv", b"\xff\xfe\n\0\0\0\n,,,\n"),
    "samples that are none": ("samples.jsonl", b'[]\n{"step": null}\n\xff\n'),
    "no samples": ("samples.jsonl", None),
    "status that is no text": ("status.json", b"\xff\xff"),
    "status of another form": ("status.json", b"[]"),
    "half a status": ("status.json", b'{"status": "running"}'),
    "no status": ("status.json", None),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW if kind.startswith("no ") else ()) for kind in DAMAGED])
def test_a_damaged_file_beside_the_checkpoints_is_mended(train, tmp_path, monkeypatch, handlers, uninterrupted, kind):
    (file, content), whole, part = DAMAGED[kind], uninterrupted(train), tmp_path / "part"
    stopped = whole.parent / "stopped"
    if not stopped.exists():
        stopped_at_6(train, stopped, monkeypatch)
    shutil.copytree(stopped, part)
    if content is None:
        (part / file).unlink()
    else:
        (part / file).write_bytes(content)
    assert train(part, f"resume={part}") == 0
    assert differences(whole, part) == []


def test_a_run_whose_status_is_damaged_is_found_by_resume_auto(train, tmp_path, monkeypatch, handlers, capsys):
    part = stopped_at_6(train, tmp_path / "runs/2026-01-01/00-00-00-test", monkeypatch)
    (part / "status.json").write_text('{"status": "inter')
    assert train(part, *RUN, "resume=auto") == 0
    said = capsys.readouterr().out
    assert f"{part / 'status.json'}: damaged" in said
    assert "at step 6" in said


def test_resume_auto_passes_over_a_run_that_cannot_be_read_and_says_so(train, tmp_path, monkeypatch, handlers, capsys):
    part = stopped_at_6(train, tmp_path / "runs/2026-01-01/00-00-00-test", monkeypatch)
    newer = shutil.copytree(part, part.with_name("00-00-01-test"))
    shutil.rmtree(newer / "checkpoints")
    (newer / "config.yaml").write_text("a: [")
    (newer / "status.json").touch()
    assert train(part, *RUN, "resume=auto") == 0
    said = capsys.readouterr().out
    assert f"passed over: {newer / 'config.yaml'}: damaged" in said
    assert f"continuing from {part}" in said


def test_what_a_checkpoint_keeps_of_long_files_stays_small_and_whole(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [f"{step},{'x' * 90}\n" for step in range(1, 5001)]
    folder.metrics.write_text("step,words\n" + "".join(rows))
    samples = [json.dumps({"step": step, "text": "y" * 30_000}) + "\n" for step in (1, 1, 2, 2, 3, 3, 4)]
    folder.samples.write_text("".join(samples))
    tails = folder.tails()
    assert tails["metrics.csv"] == ["step,words\n", *rows[-20:]]
    assert tails["samples.jsonl"] in ([], samples[-1:])
    folder.metrics.write_text("step,words\n" + "".join(rows[:-3]) + rows[-3][:40])
    folder.truncate_after(5000, tails)
    assert folder.metrics.read_text() == "step,words\n" + "".join(rows)
    assert folder.samples.read_text() == "".join(samples)


def test_a_config_that_has_changed_since_is_refused_with_both_values(train, tmp_path, monkeypatch, handlers, capsys):
    part = stopped_at_6(train, tmp_path / "part", monkeypatch)
    text = (part / "config.yaml").read_text()
    (part / "config.yaml").write_text(text.replace("  dropout: 0.3", "  dropout: 0.7"))
    capsys.readouterr()
    assert train(part, f"resume={part}") == 2
    message = capsys.readouterr().err
    assert f"{part / 'config.yaml'} is not the one" in message
    assert "model.dropout: 0.7, and 0.3 in the checkpoint" in message
    (part / "config.yaml").unlink()
    assert train(part, f"resume={part}") == 0
    assert (part / "config.yaml").read_text() == text


def test_after_going_back_to_an_older_checkpoint_the_newest_is_the_last_one_written(
    train, tmp_path, monkeypatch, handlers, uninterrupted
):
    options = ("checkpoint.every_steps=1", "checkpoint.keep_last=100")
    whole, part = uninterrupted(train, *options), tmp_path / "part"
    shutil.copytree(whole, part)
    with monkeypatch.context() as patch:
        signalled(patch, LMTask, "training_step", at_micro_batch(8, 0), signal.SIGTERM)
        assert train(part, f"resume={part}/checkpoints/step-00000002.ckpt") == 143
    assert saved_step(part) == 8
    assert train(part, f"resume={part}") == 0
    assert differences(whole, part) == []


# Who owns the folder


def test_the_lock_that_a_killed_run_has_left_to_its_loader_processes_is_waited_for(tmp_path):
    """They live for some seconds more, and were forked with its files open."""
    run = tmp_path / "run"
    code = f"""
import subprocess, sys, time
from pathlib import Path
from gptlab.run import RunFolder, write_json
folder = RunFolder(Path({str(run)!r}))
folder.acquire(resume=False)
gone = subprocess.Popen([sys.executable, "-c", ""])
gone.wait()
folder.set_status("running", 3)
write_json(folder.status_file, folder.status() | {{"pid": gone.pid}})
print("ready", flush=True)
time.sleep(1.5)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "ready\n"
    folder = RunFolder(run)
    folder.acquire(resume=True)
    assert holder.wait(10) == 0
    folder.release()


def test_a_kill_in_the_first_write_of_all_leaves_a_folder_that_can_be_used(train, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.tmp.123").write_text("format: 3\nsee")
    (run / "checkpoints").mkdir()
    assert train(run, "trainer.max_steps=1") == 0
    assert not list(run.rglob("*.tmp.*"))


def test_further_names_of_a_checkpoint_are_never_older_than_the_file(tmp_path, monkeypatch):
    """A kill between the two would leave best.ckpt behind for good: the run goes on from last.ckpt, past that step."""
    folder, real = tmp_path, os.replace

    def put(step: int) -> None:
        names = [folder / "best.ckpt"]
        files.write_listed(folder / "last.ckpt", lambda file: file.write(f"{step}".encode()), step, names)

    put(1)
    for crash_at in range(3):
        calls = []

        def crash(source, target, calls=calls, crash_at=crash_at):
            if len(calls) == crash_at:
                raise KeyboardInterrupt
            calls.append(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            put(2)
        monkeypatch.setattr(os, "replace", real)
        last, best = ((folder / f"{name}.ckpt").read_text() for name in ("last", "best"))
        assert last == "1" or best == "2"


def test_bits_that_flip_in_a_token_file_are_seen(train, tmp_path, text_file, capsys):
    text_file.write_text(prose(300, seed=5))
    assert train(tmp_path / "one", "trainer.max_steps=1") == 0
    source = json.loads((tmp_path / "one/result.json").read_text())["fingerprints"]["data"]
    cache = Path(os.environ["GPTLAB_CACHE_DIR"]) / "tokens"
    for meta in cache.glob("*/meta.json"):
        if text_file.name in meta.read_text() and str(text_file) in meta.read_text():
            path = meta.with_name("train.bin")
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content)
    assert train(tmp_path / "two", "trainer.max_steps=1") == 0
    assert json.loads((tmp_path / "two/result.json").read_text())["fingerprints"]["data"] == source
    assert bytes(content) != path.read_bytes()
