"""What happens around training: when it ends, what is saved, what is recorded, and what a person is told."""

import contextlib
import csv
import errno
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, door, prose

from gptlab import checkpoint
from gptlab.callbacks.record import MetricsFile, Monitor
from gptlab.callbacks.saving import Checkpoints
from gptlab.callbacks.watching import Alerts, one_line
from gptlab.tasks.lm import LMTask

RESULT = """
    status seed steps epochs params params_non_embedding train_tokens
    train_loss val_loss val_perplexity val_bits_per_byte val_accuracy best_val_loss best_step
    seconds seconds_to_first_step tokens_per_second peak_rss_mb peak_gpu_mb mfu
    fingerprints versions floor_bits_per_byte excess_bits_per_byte history hardware alerts seconds_total
    checkpoints parent
""".split()
INSIDE = {
    "fingerprints": "config data tokenizer code",
    "versions": "gptlab torch lightning python",
    "hardware": "device processor threads ranks",
    "checkpoints": "best last",
}
HISTORY = "step epoch seconds train_loss val_loss learning_rate tokens_per_second".split()


def result(run: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((run / "result.json").read_text(), parse_constant=refuse)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def validated(run: Path) -> list[int]:
    return [entry["step"] for entry in result(run)["history"]]


def step_of(path: Path) -> int:
    return checkpoint.load(path)["global_step"]


# Saving


def test_last_is_the_last_step_and_best_the_lowest_loss_though_the_loss_rises(train, tmp_path):
    run, tiny, held_out = tmp_path / "run", tmp_path / "tiny.txt", tmp_path / "other.txt"
    tiny.write_text(prose(40))
    held_out.write_text(prose(200, seed=3).upper())  # learning the one unlearns the other
    files = (f"data.files={tiny}", f"data.validation_files={held_out}")
    assert train(run, *files, "trainer.max_steps=60", "validation.every_steps=4", "optimizer.lr=0.01") == 0
    figures = result(run)
    losses = {entry["step"]: entry["val_loss"] for entry in figures["history"]}
    best = min(losses, key=losses.get)
    assert best < 60
    assert losses[60] > losses[best] + 0.05
    assert (figures["best_step"], figures["best_val_loss"]) == (best, losses[best])
    assert step_of(run / "checkpoints/last.ckpt") == 60
    assert step_of(run / "checkpoints/best.ckpt") == best
    assert not (run / "checkpoints/previous.ckpt").exists()  # two files are enough
    assert figures["checkpoints"] == {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt"}


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (2, [9, 12]), (100, [3, 6, 9, 12])])
def test_keep_last_checkpoints(train, tmp_path, keep, kept):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=13", "checkpoint.every_steps=3", f"checkpoint.keep_last={keep}") == 0
    files = sorted((run / "checkpoints").glob("step-*.ckpt"))
    assert [step_of(file) for file in files] == kept
    assert [file.name for file in files] == [f"step-{step:08d}.ckpt" for step in kept]
    assert step_of(run / "checkpoints/last.ckpt") == 13


def test_checkpoints_every_so_many_epochs(train, tmp_path, text_file):
    run = tmp_path / "run"
    epochs = ("data.batch_size=50", "trainer.max_epochs=5", "trainer.max_steps=-1")  # 8 steps each
    options = ("checkpoint.every_steps=null", "checkpoint.every_epochs=2", "checkpoint.keep_last=9")
    assert train(run, *epochs, *options) == 0
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [
        "step-00000016.ckpt",
        "step-00000032.ckpt",
    ]
    assert validated(run) == [8, 16, 24, 32, 40]  # validation.every_steps=null: once an epoch
    assert result(run)["epochs"] == 5


def test_steps_of_validating_saving_and_logging_do_not_depend_on_accumulation(train, tmp_path):
    found = []
    for accumulate, batch_size in ((1, 8), (4, 2)):
        run = tmp_path / f"run-{accumulate}"
        options = (f"trainer.accumulate_grad_batches={accumulate}", f"data.batch_size={batch_size}")
        intervals = ("validation.every_steps=5", "checkpoint.every_steps=3", "log.every_steps=2")
        more = ("checkpoint.keep_last=99", "samples.every_steps=4", "samples.max_tokens=2", "trainer.max_steps=70")
        more += ("optimizer=adamw",)  # Muon's bfloat16 would make more of how sums are rounded at each step
        assert train(run, *options, *intervals, *more) == 0  # more than one epoch of 55 steps
        saved = [int(path.stem[5:]) for path in sorted((run / "checkpoints").glob("step-*"))]
        sampled = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
        losses = [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]
        found.append((validated(run), saved, sampled, [row["step"] for row in rows(run)], result(run)["train_tokens"]))
        assert len(losses) == 36
        found[-1] += (pytest.approx(losses, rel=1e-3),) if accumulate == 1 else (losses,)
    assert found[1] == found[0]
    assert found[0][0] == [*range(5, 71, 5)]
    assert found[0][1] == [*range(3, 70, 3)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_nan_ends_the_run_and_keeps_the_good_checkpoint(train, tmp_path, monkeypatch, capsys, accumulate):
    real = LMTask.training_step

    def poisoned(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        if self.trainer.global_step == 7:  # while the eighth step is made
            self.step_sums *= math.nan
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(LMTask, "training_step", poisoned)
    run = tmp_path / "run"
    options = ("checkpoint.every_steps=2", "log.every_steps=5", f"trainer.accumulate_grad_batches={accumulate}")
    assert train(run, "trainer.max_steps=20", *options) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in ("NaN", "step 8", "optimizer.lr", "what was saved before stays"):
        assert word in message
    assert "Traceback" not in message
    kept = checkpoint.load(run / "checkpoints/last.ckpt")
    assert kept["global_step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())
    assert status(run)["status"] == result(run)["status"] == "failed"
    monkeypatch.setattr(LMTask, "training_step", real)
    assert train(run, f"resume={run}") == 0
    assert result(run)["steps"] == 20


def test_infinite_gradient_is_not_saved(train, tmp_path, monkeypatch):
    real = LMTask.configure_gradient_clipping

    def poisoned(self, *args, **kwargs):
        if self.trainer.global_step == 3:
            next(self.model.parameters()).grad.fill_(math.inf)
        real(self, *args, **kwargs)

    monkeypatch.setattr(LMTask, "configure_gradient_clipping", poisoned)
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=20", "checkpoint.every_steps=1", "log.every_steps=null") == 1
    assert step_of(run / "checkpoints/last.ckpt") == 3


def poison(monkeypatch, at: set[int]) -> None:
    """Make loss and gradients of the steps that would become step `at` NaN."""
    real = LMTask.training_step

    def poisoned(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        if self.trainer.global_step + 1 in at:
            self.step_sums *= math.nan
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(LMTask, "training_step", poisoned)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_are_not_finite_are_skipped_and_counted(train, tmp_path, monkeypatch, optimizer):
    """Weights and optimizer stay as they are at such a step, and the figures leave it out."""
    poison(monkeypatch, {5, 6, 9})
    run = tmp_path / "run"
    options = ("nonfinite=skip", "checkpoint.every_steps=1", "checkpoint.keep_last=100", f"optimizer={optimizer}")
    assert train(run, "trainer.max_steps=12", *options) == 0
    assert result(run)["skipped_steps"] == 3
    for row in rows(run):
        if row["step"] in ("5", "6", "9"):
            assert row["train/loss"] == row["train/gradient_norm"] == ""
        else:
            assert 0 < float(row["train/loss"]) < 6
            assert float(row["train/gradient_norm"]) > 0
    (alert,) = result(run)["alerts"]
    assert (alert["step"], alert["kind"]) == (12, "skipped")
    assert alert["message"].startswith("3 of 12 steps were skipped")
    states = [checkpoint.load(run / f"checkpoints/step-{step:08d}.ckpt") for step in (4, 6, 7)]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    one, two = [state["optimizer_states"][0]["state"] for state in states[:2]]
    for index in one:
        for name, value in one[index].items():
            assert torch.equal(value, two[index][name])
    changed = [name for name, w in states[1]["state_dict"].items() if not torch.equal(w, states[2]["state_dict"][name])]
    assert "model.embed.weight" in changed
    assert states[2]["gptlab"]["skipped_steps"] == 2


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_an_interval_that_was_skipped_whole_has_no_figures(train, tmp_path, monkeypatch, capsys, logger):
    poison(monkeypatch, {7, 8, 9})
    run = tmp_path / "run"
    steps = ("trainer.max_steps=9", "log.every_steps=3", "validation.every_steps=3", "callbacks=early_stopping")
    monitor = "callbacks.early_stopping.monitor=train/loss"
    assert train(run, *steps, monitor, "nonfinite=skip", f"logger={logger}") == 0
    losses = {row["step"]: row["train/loss"] for row in rows(run)}
    assert (float(losses["6"]) > 0, losses["9"]) == (True, "")
    assert [entry["train_loss"] is None for entry in result(run)["history"]] == [False, False, True]
    assert result(run)["train_loss"] is None
    output = capsys.readouterr().out
    assert "step 9  train -  val " in output
    assert output.count("3 of 9 steps were skipped") == 1


def test_skipping_ends_where_every_step_would_be_skipped(train, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, set(range(7, 100)))
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=40", "nonfinite=skip", "checkpoint.every_steps=2") == 1
    assert "10 steps in a row, up to step 16" in capsys.readouterr().err
    kept = checkpoint.load(run / "checkpoints/last.ckpt")
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())


def test_a_checkpoint_after_so_many_minutes(train, tmp_path):
    run = tmp_path / "run"
    options = ("checkpoint.every_steps=null", "checkpoint.keep_last=1000", "max_time=2", "trainer.max_steps=100000")
    assert train(run, *options, f"checkpoint.every_minutes={0.5 / 60}") == 0
    steps = [int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.ckpt")]
    assert 2 <= len(steps) <= 4


def test_what_fails_in_the_background_ends_the_run(train, tmp_path, monkeypatch, capsys):
    real = checkpoint.save

    def failing(state, path, *names):
        if state["global_step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(state, path, *names)

    monkeypatch.setattr(checkpoint, "save", failing)
    run = tmp_path / "run"
    options = ("checkpoint.background=true", "checkpoint.every_steps=2", "trainer.max_steps=100000")
    assert train(run, *options) == 1
    assert "No space left" in capsys.readouterr().err
    assert step_of(run / "checkpoints/last.ckpt") == 2


# When it ends


def test_max_time_ends_the_run_early_after_a_validation(train, tmp_path):
    run = tmp_path / "run"
    assert (
        train(run, "trainer.max_steps=1000000", "max_time=0.5", "log.every_steps=50", "samples.every_steps=100000") == 0
    )
    figures = result(run)
    assert status(run)["status"] == figures["status"] == "completed"
    assert 1 < figures["steps"] < 1000000
    assert validated(run)[-1] == figures["steps"] == step_of(run / "checkpoints/last.ckpt")
    assert 0.5 <= figures["seconds"] < 5
    assert json.loads((run / "samples.jsonl").read_text().splitlines()[-1])["step"] == figures["steps"]


def test_early_stopping_is_a_word(train, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text(prose(200, seed=3).upper())
    options = (
        f"data.validation_files={other}",
        "validation.every_steps=3",
        "optimizer.lr=0.02",
        "samples.every_steps=1000",
    )
    assert train(run, "callbacks=early_stopping", "trainer.max_steps=400", *options) == 0
    figures = result(run)
    assert figures["status"] == "completed"
    assert figures["steps"] < 400
    steps = validated(run)
    assert figures["steps"] == steps[-1] == step_of(run / "checkpoints/last.ckpt")
    assert len(steps) - 1 - steps.index(figures["best_step"]) == 3  # its patience
    assert json.loads((run / "samples.jsonl").read_text().splitlines()[-1])["step"] == figures["steps"]


# What is recorded


def test_the_ranks_of_a_run_are_told(tmp_path, text_file):
    run, small = tmp_path / "run", [word for word in SMALL if word != "trainer=cpu"]
    ranks = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=1")
    done = door("train", *small, *ranks, f"data.files={text_file}", f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    assert "1 steps of 8 windows on 2 x cpu, 32-true" in done.stdout
    assert result(run)["hardware"]["ranks"] == 2
    (run / "result.json").unlink()  # as a kill just before the end leaves it
    again = door("train", f"resume={run}")
    assert "nothing to do" in again.stdout
    assert result(run)["hardware"]["ranks"] == 2


def test_result_has_every_key_of_the_contract_and_nulls_for_what_was_not_measured(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=6", "validation.every_steps=3") == 0
    figures = result(run)
    assert set(RESULT) <= set(figures)
    for key, inside in INSIDE.items():
        assert set(figures[key]) == set(inside.split())
    assert [set(entry) for entry in figures["history"]] == [set(HISTORY)] * 2
    unmeasured = {"mfu", "floor_bits_per_byte", "excess_bits_per_byte", "parent"}
    unmeasured |= set() if torch.cuda.is_available() else {"peak_gpu_mb"}
    assert {key for key in RESULT if figures[key] is None} == unmeasured
    assert figures["train_tokens"] == 6 * 4 * 16
    assert figures["val_perplexity"] == pytest.approx(math.exp(figures["val_loss"]))
    assert figures["seconds"] < figures["seconds_total"]
    assert figures["seconds_to_first_step"] <= figures["seconds_total"]
    assert 50 < figures["peak_rss_mb"] < 20_000
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in figures["fingerprints"].values())


def test_result_of_a_run_that_measured_nothing_has_nulls(train, tmp_path, monkeypatch):
    monkeypatch.setattr(LMTask, "training_step", lambda *_: 1 / 0)
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=6") == 1
    figures = result(run)
    assert set(RESULT) <= set(figures)
    for key in ("train_loss", "val_loss", "best_val_loss", "tokens_per_second", "seconds_to_first_step"):
        assert figures[key] is None
    assert figures["steps"] == 0
    assert figures["checkpoints"] == {"best": None, "last": None}
    assert "division" in status(run)["error"]


def test_throughput_is_tokens_over_time(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=60", "log.every_steps=10", "log.peak_tflops=1") == 0
    figures = result(run)
    average = figures["train_tokens"] / figures["seconds"]
    assert 0.3 * average < figures["tokens_per_second"] < 30 * average
    logged = [float(row["train/tokens_per_second"]) for row in rows(run)]
    assert figures["tokens_per_second"] == pytest.approx(sorted(logged)[len(logged) // 2], rel=0.5)
    assert 0 < figures["mfu"] < 1


def test_training_waits_for_the_device_once_a_logged_step(train, tmp_path, monkeypatch):
    calls = []
    real = LMTask.training_figures

    def counting(self):
        calls.append(self.trainer.global_step)
        return real(self)

    monkeypatch.setattr(LMTask, "training_figures", counting)
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=25", "log.every_steps=10", "validation.every_steps=7") == 0
    assert calls == [1, 10, 20, 25]
    logged = {int(row["step"]) for row in rows(run)}
    assert logged == {1, 7, 10, 14, 20, 21, 25}
    assert all(row["train/loss"] for row in rows(run) if int(row["step"]) in calls)


def test_metrics_have_a_header_and_one_row_a_logged_step(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=9", "validation.every_steps=4", "log.every_steps=2") == 0
    found = rows(run)
    assert [int(row["step"]) for row in found] == [1, 2, 4, 6, 8, 9]
    assert [bool(row["val/loss"]) for row in found] == [False, False, True, False, True, True]
    assert all(None not in row and None not in row.values() for row in found)
    seconds = [float(row["seconds"]) for row in found]
    assert seconds == sorted(seconds)


def test_metrics_file_takes_a_new_column_later(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"train/loss": 3.0}, step=1)
    file.log_metrics({"train/loss": 2.0}, step=2)
    file.log_metrics({"val/loss": 2.5, "val/own, figure": 1}, step=2)
    file.log_metrics({"train/loss": 1.0}, step=3)
    again = MetricsFile(tmp_path / "metrics.csv")  # as after a resume
    again.log_metrics({"val/own, figure": 4}, step=4)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert [row["train/loss"] for row in found] == ["3.0", "2.0", "1.0", ""]
    assert [row["val/own, figure"] for row in found] == ["", "1", "", "4"]
    assert found[1]["val/loss"] == "2.5"


def test_status_tells_how_the_run_stands(train, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    real = Checkpoints.save_last

    def watching(self, trainer):
        seen.append(status(run))
        real(self, trainer)

    monkeypatch.setattr(Checkpoints, "save_last", watching)
    assert train(run, "trainer.max_steps=4", "checkpoint.every_steps=2") == 0
    assert {(entry["status"], type(entry["pid"])) for entry in seen} == {("running", int)}
    assert (status(run)["status"], status(run)["step"]) == ("completed", 4)
    assert "error" not in status(run)


def test_samples_have_their_fields_and_repeat_with_the_seed(train, tmp_path):
    options = (
        "samples.every_steps=2",
        "samples.max_tokens=12",
        "samples.prompts=['','The cat']",
        "trainer.max_steps=5",
    )
    for name, extra in (("one", ()), ("two", ()), ("other", ("samples.seed=9",))):
        assert train(tmp_path / name, *options, *extra) == 0
    one, two, other = ((tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two", "other"))
    assert one == two != other
    lines = [json.loads(line) for line in one.splitlines()]
    assert [set(line) for line in lines] == [{"step", "prompt", "text"}] * 6
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 5, 5]
    assert [line["prompt"] for line in lines] == ["", "The cat"] * 3
    # Sampling draws nothing from what training draws.
    assert result(tmp_path / "one")["val_loss"] == result(tmp_path / "other")["val_loss"]


def test_tensorboard_holds_the_scalars_and_the_samples(train, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    options = ("validation.every_steps=2", "samples.every_steps=2", "samples.max_tokens=3")
    assert train(run, "logger=tensorboard", "trainer.max_steps=4", *options) == 0
    events = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "val/loss", "val/bits_per_byte"} <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("val/loss")] == [2, 4]
    logged = [float(row["train/loss"]) for row in rows(run)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert any(tag.startswith("samples/") for tag in events.Tags()["tensors"])


# What a person is told


def test_line_of_a_validation(train, tmp_path, capsys):
    assert train(tmp_path / "run", "trainer.max_steps=120", "validation.every_steps=60", "log.every_steps=10") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    number = r"[\d.]+"
    expected = rf"epoch [12]/2  step \d+  train {number}  val {number}  ppl {number}  {number}k? tok/s  \d+ s"
    assert len(lines) == 2
    assert all(re.fullmatch(expected, line) for line in lines), lines
    assert lines[1].startswith("epoch 2/2  step 120  ")


class History:
    """Alerts shown a made-up history of one figure a step."""

    def __init__(self):
        self.monitor = Monitor(1, SimpleNamespace(seconds=0.0), None)
        self.alerts = Alerts(self.monitor)
        self.step = 0

    def train(self, loss: float, norm: float = 1.0, step: int | None = None) -> None:
        self.step = self.step + 1 if step is None else step
        self.monitor.figures |= {"train/loss": loss, "train/gradient_norm": norm}
        self.monitor.logged_step = self.step
        task = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=1000)))
        self.alerts.on_step_end(SimpleNamespace(), task, self.step)

    def validate(self, loss: float) -> None:
        trainer = SimpleNamespace(global_step=self.step)
        self.alerts.on_validation_end(trainer, SimpleNamespace(figures={"val/loss": loss}))

    @property
    def kinds(self) -> list[str]:
        return [alert["kind"] for alert in self.alerts.alerts]


def good(history: History, steps: int = 400) -> None:
    for step in range(steps):
        history.train(2.0 + 5 * math.exp(-step / 60) + 0.1 * math.sin(step), norm=1.0 + 0.5 * math.sin(step * 0.7))
        if step % 50 == 49:
            history.validate(2.2 + 5 * math.exp(-step / 60) + 0.01 * math.sin(step))


def test_no_alert_on_a_good_run():
    history = History()
    good(history)
    assert history.alerts.alerts == []


@pytest.mark.parametrize("kind", ["spike", "diverging", "overfitting", "stuck"])
def test_alert_of_each_kind_with_an_override_that_helps(kind):
    history = History()
    if kind == "stuck":
        for step in range(1, 320):
            history.train(6.9, step=step)
        assert [alert["step"] for alert in history.alerts.alerts] == [300]
    else:
        good(history)
    if kind == "spike":
        history.train(3.5)
    elif kind == "diverging":
        history.train(2.0, norm=50.0)
    elif kind == "overfitting":
        for loss in (2.3, 2.4, 2.5, 2.6):
            history.train(1.9 - loss / 10)
            history.validate(loss)
    assert history.kinds == [kind]
    (alert,) = history.alerts.alerts
    assert set(alert) == {"step", "kind", "message"}
    assert re.search(r"(optimizer|schedule|model|trainer|data)\.\w+", alert["message"])


def test_alert_is_not_repeated_at_once_and_stale_figures_raise_none():
    history = History()
    good(history)
    for _ in range(3):
        history.train(4.0)
    assert history.kinds == ["spike"]
    for _ in range(600):
        history.train(2.0)
    history.train(4.0)
    assert history.kinds == ["spike", "spike"]
    history.monitor.logged_step = 0  # nothing was logged at the next step
    history.monitor.figures["train/gradient_norm"] = 1e9
    history.alerts.on_step_end(SimpleNamespace(), SimpleNamespace(), 5000)
    assert history.kinds == ["spike", "spike"]


def test_alerts_go_into_the_result_and_survive_a_checkpoint(train, tmp_path):
    history = History()
    good(history)
    history.train(4.0)
    other = Alerts(history.monitor)
    other.load_state_dict(json.loads(json.dumps(history.alerts.state_dict())))
    assert (other.alerts, other.losses, other.validations) == (
        history.alerts.alerts,
        history.alerts.losses,
        history.alerts.validations,
    )
    run, held_out = tmp_path / "run", tmp_path / "other.txt"
    held_out.write_text(prose(200, seed=3).upper())
    options = (f"data.validation_files={held_out}", "validation.every_steps=10", "optimizer.lr=0.02")
    assert train(run, "trainer.max_steps=100", *options) == 0
    assert "overfitting" in [alert["kind"] for alert in result(run)["alerts"]]


def test_samples_keep_to_the_tokenizer_where_the_network_has_room_for_more(train, tmp_path):
    """As with model=gpt2, whose 50,257 rows are more than a small tokenizer knows."""
    run = tmp_path / "run"
    assert (
        train(run, "model.vocab_size=5000", "trainer.max_steps=2", "samples.every_steps=1", "samples.top_k=null") == 0
    )
    assert len((run / "samples.jsonl").read_text().splitlines()) >= 4


def test_a_terminal_has_a_progress_bar_of_steps_and_a_file_has_plain_lines(tmp_path, text_file):
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=30", "validation.every_steps=10")
    command = [sys.executable, "-m", "gptlab.train", *options]
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*command, "run_dir=seen"], stdout=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end, as a terminal tells it
        while chunk := os.read(ours, 4096):
            shown += chunk
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"step\s+30/30", text)
    assert re.search(r"epoch 1/\d+  step 20  train", text)
    assert text.split()[-2] == "run:"

    plain = subprocess.run([*command, "run_dir=plain"], capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in plain
    assert "30/30" not in plain


def test_text_that_the_tokenizer_cannot_spell_is_an_alert_once(train, tmp_path, capsys):
    """Else the figures look good: <unk> is easily guessed."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    assert train(parent, "tokenizer=char", "trainer.max_steps=1") == 0
    assert result(parent)["alerts"] == []
    (tmp_path / "other.txt").write_text("cafe\u0301 na\u00efve \u4e2d " * 300)
    options = (f"tokenizer.path={parent}", f"data.files={tmp_path / 'other.txt'}", "trainer.max_steps=1")
    assert train(child, *options) == 0
    assert "tokens are <unk>" in capsys.readouterr().out
    assert train(child, f"resume={child}", "trainer.max_steps=2") == 0
    (alert,) = result(child)["alerts"]
    assert "of the train tokens and" in alert["message"]
    kinds = [(alert["kind"], alert["step"]) for alert in result(child)["alerts"]]
    assert kinds == [("unknown", 0)]


def test_samples_on_the_console_cannot_steer_the_terminal():
    assert one_line("a\n b\x1b[2J\x07 \u00e9\ufffd") == "a b\\x1b[2J\\x07 \u00e9\ufffd"
