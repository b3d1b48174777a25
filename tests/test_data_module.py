"""The data module with a trainer: other orders each epoch, no held-out text in training, and one identity a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from conftest import SMALL, compose, prose

from gptlab import assembly, checks
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.tokenizer import EOS_ID, ByteTokenizer


class Recorder(lightning.LightningModule):
    """Learns nothing, and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[torch.Tensor]] = {}

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).append(torch.cat((batch["tokens"], batch["targets"][:, -1:]), 1))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def module(files, batch_size: int = 8, block_size: int = 16, seed: int = 1, **options) -> TextDataModule:
    config = DataConfig(files=files, batch_size=batch_size, **options)
    return TextDataModule(config, None, ByteTokenizer(), block_size=block_size, seed=seed)


def epochs_of(data: TextDataModule, epochs: int = 2, **options) -> list[np.ndarray]:
    """The windows, one a row, that each epoch of a real run trains on."""
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(recorder, data)
    return [torch.cat(batches).numpy() for _, batches in sorted(recorder.epochs.items())]


def test_epochs_visit_the_windows_in_different_orders_and_repeat_with_the_seed(text_file):
    first, second = epochs_of(module(str(text_file)))
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
    windows = module(str(text_file))
    windows.setup()
    assert len(first) == len(windows.train_windows) // 8 * 8
    common = {row.tobytes() for row in first} & {row.tobytes() for row in second}
    assert len(common) > 0.9 * len({row.tobytes() for row in first})
    again = epochs_of(module(str(text_file)))
    assert np.array_equal(again[0], first)
    assert np.array_equal(again[1], second)
    assert not np.array_equal(epochs_of(module(str(text_file), seed=2), 1)[0], first)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"batch_size": 4}])
def test_the_same_windows_make_a_step_however_they_are_loaded(text_file, options):
    accumulate = 8 // options.get("batch_size", 8)
    (plain,) = epochs_of(module(str(text_file)), 1)
    (other,) = epochs_of(module(str(text_file), **options), 1, accumulate_grad_batches=accumulate)
    assert np.array_equal(plain, other)


@pytest.mark.parametrize("documents", [1, 120])
def test_no_held_out_text_is_trained_on(tmp_path, documents):
    for number in range(documents):
        (tmp_path / f"{number}.txt").write_text(prose(6000 // documents, number))
    data = module(f"{tmp_path}/*.txt", validation_fraction=0.2)
    (seen,) = epochs_of(data, 1)
    train, validation = (np.asarray(getattr(data.prepared, side).array) for side in ("train", "validation"))
    assert len(train) + len(validation) == sum(p.stat().st_size for p in tmp_path.glob("*.txt")) + np.sum(
        [(side == EOS_ID).sum() for side in (train, validation)]
    )
    # Windows as long as a few sentences, which chance does not repeat.
    width = 120
    held_out = {validation[i : i + width].tobytes() for i in range(len(validation) - width)}
    trained = {train[i : i + width].tobytes() for i in range(len(train) - width)}
    assert not held_out & trained
    text = train.astype(np.int64).tobytes()
    assert all(row.astype(np.int64).tobytes() in text for row in seen)


def test_own_validation_files_are_the_validation_text_whole(tmp_path, text_file):
    held_out = tmp_path / "held-out.md"
    held_out.write_text(prose(100, seed=9))
    data = module(str(text_file), validation_files=str(held_out))
    data.setup()
    tokenizer = data.tokenizer
    assert tokenizer.decode(data.prepared.validation.array[:-1].tolist()) == held_out.read_text()
    assert tokenizer.decode(data.prepared.train.array[:-1].tolist()) == text_file.read_text()
    scored = sum(int(data.validation_windows[i]["loss_mask"].sum()) for i in range(len(data.validation_windows)))
    assert scored == len(data.prepared.validation) - 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("block_size", {"block_size": 32}),
        ("begin", {"begin": "document"}),
        ("stride", {"stride": 3}),
        ("seed", {"seed": 5}),
        ("windows_a_step", {"batch_size": 4}),
        ("fingerprint", {"validation_fraction": 0.3}),
    ],
)
def test_another_identity_is_refused_with_both_values(text_file, name, options):
    one, other = module(str(text_file)), module(str(text_file), **options)
    for data in (one, other):
        data.setup()
    trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1, strategy=None)
    state = one.identity(trainer)
    one.require_same(json.loads(json.dumps(state)), trainer)
    with pytest.raises(ValueError, match=name) as refusal:
        other.require_same(state, trainer)
    assert str(state[name]) in str(refusal.value)
    assert str(other.identity(trainer)[name]) in str(refusal.value)
    assert "init_from" in str(refusal.value)


def test_training_windows_may_begin_with_a_document(tmp_path):
    """With its first words and the end token before it; windows that begin elsewhere go on with a long document."""
    lines = [f"line {number}: {prose(1 + number % 25, number)}".replace("\n", " ") for number in range(300)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    options = {"documents": "line", "block_size": 48, "begin": "document", "stride": 16}
    (seen,) = epochs_of(module(str(tmp_path / "lines.txt"), batch_size=1, **options), 1)
    tokenizer = ByteTokenizer()
    begun = [tokenizer.decode(row[1:10]) for row in seen if row[0] == EOS_ID]
    assert len(begun) == len(set(begun)) > 0.85 * len(lines)
    assert set(begun) <= {line[:9] for line in lines}
    further = [tokenizer.decode(row[:16]) for row in seen if row[0] != EOS_ID]
    assert len(further) > len(lines)
    assert all(any(text in line for line in lines) for text in further)


def test_a_checkpoint_from_before_windows_had_a_beginning_resumes(text_file):
    one, other = module(str(text_file)), module(str(text_file), begin="document")
    for data in (one, other):
        data.setup()
    trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1, strategy=None)
    state = one.identity(trainer)
    del state["begin"]
    one.require_same(state, trainer)
    with pytest.raises(ValueError, match="begin anywhere and now finds document"):
        other.require_same(state, trainer)


def test_accumulation_and_batch_size_may_be_traded(text_file):
    """What counts is the number of windows a step, however they are cut."""
    states = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        data = module(str(text_file), batch_size)
        epochs_of(data, 1, accumulate_grad_batches=accumulate)
        states.append(data.state_dict())
    assert states[0] == states[1]


def test_tokenizer_of_a_run_folder(train, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, "tokenizer=char", "trainer.max_steps=1") == 0
    other = tmp_path / "other.txt"
    other.write_text(prose(300, seed=5).replace("e", "ë"))
    assert train(second, f"data.files={other}", f"tokenizer.path={first}", "trainer.max_steps=1") == 0
    results = [json.loads((run / "result.json").read_text()) for run in (first, second)]
    assert results[0]["fingerprints"]["tokenizer"] == results[1]["fingerprints"]["tokenizer"]
    assert results[0]["fingerprints"]["data"] != results[1]["fingerprints"]["data"]


def test_settings_that_cannot_be_are_said_together(text_file):
    with pytest.raises(ValueError, match=r"data.batch_size=0.*data.stride=-1.*validation_fraction=2"):
        module(str(text_file), batch_size=0, stride=-1, validation_fraction=2)
    with pytest.raises(ValueError, match="no text to train on"):
        TextDataModule(DataConfig(), None, ByteTokenizer(), block_size=16, seed=1)


def test_windows_too_few_for_a_step_are_refused_with_the_remedies(text_file: Path):
    data = module(str(text_file), batch_size=500)
    data.setup()
    with pytest.raises(ValueError, match=r"takes 500 windows .* has 442: lower data.batch_size"):
        data.order()


def test_a_task_may_still_say_how_batches_are_moved(text_file):
    moved = []

    class Task(Recorder):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            moved.append(device.type)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False, limit_val_batches=0, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Task(), module([text_file]))
    assert moved == ["cpu", "cpu"]


READING = {"documents": "line", "separator": "---", "field": "body", "strip_gutenberg": False}


@pytest.mark.parametrize(("name", "value"), READING.items())
@pytest.mark.parametrize(
    "given",
    [
        ("data=pydocs",),
        ("data=code",),
        ("data=gutenberg",),
        ("data=stories", "tokenizer.path=somewhere"),
        ("data.mix={pydocs: 1, code: 1}",),
    ],
)
def test_how_files_are_read_is_refused_where_none_are(name, value, given):
    """`data.source` reads its text in its own way, and would pass over it."""
    said = json.dumps(value).strip('"')
    with pytest.raises(ValueError, match=rf"data.{name}={value} .* data.files .*leave it out"):
        checks.check(compose(*SMALL, *given, f"data.{name}={said}"))
    if "tokenizer.path=somewhere" not in given:
        with pytest.raises(ValueError, match=rf"data.{name}={value} .* data.files .*leave it out"):
            assembly.data_module(compose(*SMALL, *given, f"data.{name}={said}"))


def test_a_source_of_a_mixture_that_has_no_files_is_not_told_how_they_are_read():
    mix = "data.mix={pydocs: {weight: 1, documents: line}, own: {files: a.txt}}"
    with pytest.raises(ValueError, match=r"data.mix.pydocs: data.documents=line .*leave it out"):
        assembly.data_module(compose(*SMALL, mix))


@pytest.mark.parametrize(
    "given",
    [
        ("data.files=a.jsonl",),
        ("data=pydocs", "data.validation_files=a.jsonl"),
        ("data=pydocs", "tokenizer=char", "tokenizer.files=a.jsonl"),
        ("data.mix={pydocs: 1, own: {files: a.jsonl}}",),
        ("data.mix={pydocs: {weight: 1, validation_files: a.jsonl}}",),
        ("data=stream", "data.files=a.jsonl", "data.validation_files=a.jsonl"),
    ],
)
def test_how_files_are_read_may_be_said_where_some_are(tmp_path, given):
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    cfg = compose(*SMALL, *given, "data.field=body")
    checks.check(cfg)
    assembly.data_module(cfg)
    assembly.data_module(cfg, ByteTokenizer())  # as when a run goes on, whose tokenizer is in its checkpoint
    (tmp_path / "a.jsonl").unlink()
    assembly.data_module(cfg, ByteTokenizer())
