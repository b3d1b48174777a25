"""Bad input ends with one message that names it and the remedy, exit code 2, and nothing lost."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, prose
from lightning.pytorch.accelerators import CUDAAccelerator
from omegaconf import OmegaConf

from gptlab import assembly, checkpoint, checks, files
from gptlab.callbacks.saving import Checkpoints
from gptlab.run import RunFolder

STEPS = "trainer.max_steps=2"


@pytest.fixture
def refused(text_file, tmp_path, monkeypatch, capsys):
    """`refused(*overrides)` gives the one message with which `train` refuses them."""
    import gptlab.train

    def run(*overrides: str, run_dir: Path | None = tmp_path / "run", code: int = 2) -> str:
        folder = () if run_dir is None else (f"run_dir={run_dir}",)
        monkeypatch.setattr("sys.argv", ["train.py", *SMALL, f"data.files={text_file}", STEPS, *folder, *overrides])
        capsys.readouterr()
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as exit_:
            gptlab.train.main()
        message = capsys.readouterr().err
        assert exit_.value.code == code, message
        assert_one_message(message)
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before, "what was there before must stay"
        return message

    return run


def assert_one_message(message: str) -> None:
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert len(message.splitlines()) <= 15
    assert "Traceback" not in message


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "cache" not in str(path)}


def good_run(train, path: Path, *overrides: str) -> Path:
    assert train(path, STEPS, *overrides) == 0
    return path


# Text

TEXTS = {
    "empty.txt": b"",
    "blank.txt": b" \n\n\t ",
    "binary.txt": b"text\0more" * 20,
    "latin1.txt": "Größe\n".encode("latin1") * 50,
    "short.txt": b"hi there",
}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.txt", ("data.files=", "missing.txt", "no such file")),
        ("none/*.txt", ("data.files=", "none/*.txt", "matches no file")),
        ("folder", ("data.files=", "folder", "**/*.txt")),
        ("empty.txt", ("empty.txt", "no text", "remove it")),
        ("blank.txt", ("blank.txt", "no text", "remove it")),
        ("binary.txt", ("binary.txt", "binary", "byte 4")),
        ("latin1.txt", ("latin1.txt", "UTF-8", "byte 2", "line 1", "iconv")),
        ("short.txt", ("8 tokens", "model.block_size=16", "lower model.block_size, or add text")),
    ],
)
def test_text_that_cannot_be_used_and_the_run_folder_is_free_again(refused, train, tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    for file, content in TEXTS.items():
        (tmp_path / file).write_bytes(content)
    message = refused(f"data.files='{tmp_path / name}'")
    for word in says:
        assert word in message
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    if name in ("missing.txt", "short.txt"):
        good_run(train, run)
        assert json.loads((run / "result.json").read_text())["status"] == "completed"


def test_validation_split_without_text(refused, tmp_path):
    for number in range(100):
        (tmp_path / f"document-{number}.txt").write_text(prose(20, number))
    message = refused(f"data.files={tmp_path}/document-*.txt", "data.validation_fraction=1e-6")
    assert "data.validation_fraction=1e-06" in message
    assert "raise it" in message


def test_validation_text_that_is_training_text(refused, text_file):
    message = refused(f"data.validation_files={text_file}")
    assert message.count(str(text_file)) == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.batch_size=1000",), ("1000 windows", "442", "lower data.batch_size")),
        (("data.batch_size=300", "trainer.accumulate_grad_batches=2"), ("600 windows", "accumulate_grad_batches")),
        (("tokenizer=sentencepiece", "tokenizer.vocab_size=20000"), ("tokenizer.vocab_size=20000", "lower it")),
        (("tokenizer=sentencepiece", "tokenizer.vocab_size=10"), ("tokenizer.vocab_size=10", "raise it")),
        (("model.vocab_size=5",), ("model.vocab_size=5", "269", "leave it null")),
        (("tokenizer.path=nowhere",), ("nowhere", "no tokenizer")),
        (("data.files=[]",), ("data.files", "empty")),
        (("init_from=nowhere",), ("nowhere", "no such run")),
    ],
)
def test_what_does_not_fit_the_text(refused, overrides, says):
    message = refused(*overrides)
    for word in says:
        assert word in message


# The config alone: refused before any folder is made

CONFIG_FAULTS = [
    ("model.n_embd=30 model.n_head=4", ("model.n_embd=30", "model.n_head=4", "32 is")),
    ("model.positions=sideways", ("model.positions='sideways'", "rope, learned")),
    ("model.dropout=1.5", ("model.dropout=1.5",)),
    ("modle.n_layer=3", ("modle", "did you mean 'model")),
    ("data=shakespere", ("shakespere", "shakespeare")),
    ("optimizer.lr=-1", ("optimizer.lr=-1",)),
    ("optimizer.lr=nan", ("optimizer", "learning rate", "nan")),
    ("optimizer=muon optimizer.eps=-1", ("optimizer", "-1")),
    ("optimizer=muon optimizer.width=0", ("optimizer.width=0", "at least 1")),
    ("optimizer.weight_decay=-0.1", ("optimizer.weight_decay=-0.1",)),
    ("schedule.warmup_steps=-1", ("schedule.warmup_steps=-1",)),
    ("compile=maybe", ("compile='maybe'", "auto, true, false")),
    ("documents=foo", ("documents='foo'", "joined, separate")),
    ("samples.top_k=0", ("samples.top_k=0", "at least 1")),
    ("samples.max_tokens=-1", ("samples.max_tokens=-1", "at least 1")),
    ("samples.temperature=-1", ("samples.temperature=-1",)),
    ("samples.every_steps=0", ("samples.every_steps=0", "null")),
    ("log.every_steps=0", ("log.every_steps=0", "null")),
    ("log.peak_tflops=0", ("log.peak_tflops=0", "null")),
    ("validation.every_steps=0", ("validation.every_steps=0", "null")),
    ("checkpoint.every_steps=0", ("checkpoint.every_steps=0", "at least 1")),
    ("checkpoint.keep_last=-1", ("checkpoint.keep_last=-1", "at least 0")),
    ("trainer.max_steps=0", ("trainer.max_steps=0", "at least 1")),
    ("trainer.max_epochs=0", ("trainer.max_epochs=0", "at least 1")),
    ("trainer.max_steps=-1", ("trainer.max_steps", "nothing ends this run")),
    ("trainer.accumulate_grad_batches=0", ("trainer.accumulate_grad_batches=0", "at least 1")),
    ("trainer.gradient_clip_val=-1", ("trainer.gradient_clip_val=-1", "null")),
    ("+trainer.gradient_clip_algorithm=value", ("trainer.gradient_clip_algorithm='value'", "leave it out")),
    ("trainer.precision=16-mixed", ("trainer.precision=16-mixed", "bf16-mixed")),
    ("trainer=ddp trainer.accelerator=cpu trainer.devices=0", ("trainer.devices=0", "from 1 on")),
    ("trainer=ddp trainer.accelerator=cpu trainer.devices=-1", ("trainer.devices=-1", "from 1 on")),
    ("trainer=ddp trainer.accelerator=cpu trainer.devices=two", ("trainer.devices=two", "auto")),
    ("trainer=cpu trainer.devices=2", ("trainer.devices=2 are several", "use trainer=ddp, fsdp or tp")),
    ("trainer=fsdp trainer.accelerator=cpu trainer.devices=[0,1]", ("trainer.devices=[0, 1]", "from 1 on")),
    ("trainer.num_nodes=0", ("trainer.num_nodes=0", "at least 1")),
    ("max_time=0", ("max_time=0", "null")),
    ("seed=-1", ("seed=-1", "2^32")),
    ("data.batch_size=0", ("data.batch_size=0", "at least 1")),
    ("data.begin=line", ("data.begin='line'", "anywhere, document")),
    ("data.stride=0", ("data.stride=0", "at least 1")),
    ("data.validation_fraction=1.5", ("data.validation_fraction=1.5", "between 0 and 1")),
    ("trainer=mps", ("trainer=mps", "trainer=auto")),
    ("resume=x init_from=y", ("resume", "init_from", "one of them")),
    ("resume=nowhere", ("resume=nowhere", "no such run")),
    ("samples=null", ("samples=null", "samples.every_steps=null")),
    ("checkpoint=null", ("checkpoint=null", "checkpoint.every_steps=null")),
    ("optimizer._target_=3", ("optimizer._target_=3", "no dotted name")),
    ("optimizer._target_=gptlab.optim", ("optimizer._target_='gptlab.optim'", "neither a class nor a function")),
    ("~optimizer.momentum", ("optimizer", "momentum")),
    ("~schedule.warmup_steps", ("schedule", "warmup_steps")),
    ("model.norm_eps=0", ("model.norm_eps=0", "more than 0")),
]


@pytest.mark.parametrize(("overrides", "says"), CONFIG_FAULTS, ids=[overrides for overrides, _ in CONFIG_FAULTS])
def test_faults_of_the_config_are_found_before_a_folder_is_made(refused, tmp_path, overrides, says):
    if overrides == "trainer=mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has an Apple GPU")
    message = refused(*overrides.split())
    for word in says:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_devices_of_two_gpus(monkeypatch):
    monkeypatch.setattr(assembly, "device_kind", lambda node: CUDAAccelerator)
    for floor in ("fabric", "pytorch"):
        monkeypatch.setattr(f"lightning.{floor}.accelerators.cuda.num_cuda_devices", lambda: 2)
    for devices in (1, 2, -1, "-1", "auto", [0, 1], [1], "0,1", "2"):
        assert list(checks.device_faults({"devices": devices, "strategy": {"by": "rows"}})) == []
    for devices in (0, 3, -2, "0", "none", [], [2], [0, 0], "0,5"):
        (fault,) = checks.device_faults({"devices": devices})
        assert fault.startswith(f"trainer.devices={devices} names no cuda devices")
        assert "1 to 2" in fault


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_where_there_is_none(refused, tmp_path):
    message = refused("trainer=gpu")
    assert "trainer=gpu" in message
    assert "trainer=cpu" in message
    assert not (tmp_path / "run").exists()


def test_several_faults_are_said_together(refused):
    message = refused("optimizer.lr=-1", "documents=foo", "model.n_embd=30", "model.n_head=4")
    for word in ("optimizer.lr=-1", "documents='foo'", "model.n_embd=30"):
        assert word in message


def test_one_fault_is_said_once(refused):
    message = refused("optimizer=adamw", "optimizer.lr=-1", "schedule=wsd", "schedule.decay_fraction=2")
    assert message.count("-1") == message.count("decay_fraction=2") == 1
    assert "Invalid learning rate" not in message


def test_download_without_network(refused, tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "cache"))
    message = refused("data=shakespeare", "data.files=null")
    for word in ("shakespeare.txt", "https://", "network", "GPTLAB_DATA_DIR"):
        assert word in message
    assert not list((tmp_path / "cache").rglob("shakespeare.txt"))


@pytest.mark.parametrize("word", ["wandb", "mlflow"])
def test_logger_without_its_package_names_the_extra(refused, train, tmp_path, monkeypatch, word):
    import lightning.pytorch.loggers as loggers

    def missing(*_args, **_kwargs):
        raise ModuleNotFoundError(f"Requirement '{word}' not met.")

    monkeypatch.setattr(getattr(loggers, {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[word]), "__init__", missing)
    message = refused(f"logger={word}")
    assert f"logger={word}" in message
    assert 'pip install "gptlab[track]"' in message
    good_run(train, tmp_path / "run")


# Checkpoints


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("kind", ["malicious", "truncated", "random", "empty", "torch file", "no run", "text"])
@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_checkpoint_that_is_none(refused, train, tmp_path, key, kind):
    parent = good_run(train, tmp_path / "parent")
    file = parent / "checkpoints/last.ckpt"
    (parent / "checkpoints/best.ckpt").unlink()
    whole = file.read_bytes()
    if kind == "malicious":
        torch.save({"gptlab": Malicious()}, file)
        (file.parent / "manifest.json").unlink()  # which would have refused it for its size
    elif kind == "torch file":
        torch.save({"a": 1}, file)
    elif kind == "no run":
        shutil.rmtree(parent)
        parent.mkdir()
    else:
        parts = {"truncated": whole[:3000], "random": bytes(range(255, 0, -1)) * 20, "empty": b"", "text": b"hello\n"}
        file.write_bytes(parts[kind])
    message = refused(f"{key}={parent}", run_dir=tmp_path / "run" if key == "init_from" else None)
    assert str(parent) in message
    assert "weights_only" not in message
    assert not (tmp_path / "pwned").exists()
    if kind == "malicious":
        assert "system" in message
        assert "not run" in message


def test_init_from_with_another_architecture_or_tokenizer(refused, train, tmp_path):
    parent = good_run(train, tmp_path / "parent")
    other = good_run(train, tmp_path / "other", "tokenizer=char")
    cases = (
        (("model.n_layer=3",), ("(model.n_layer=3)", "model.n_layer: the parent has 2, the command line 3")),
        (("tokenizer=char",), ("(tokenizer=char)", "ByteTokenizer", "CharTokenizer")),
        ((f"tokenizer.path={other}",), (f"(tokenizer.path={other})",)),
    )
    for number, (overrides, says) in enumerate(cases):
        message = refused(f"init_from={parent}", *overrides, run_dir=tmp_path / f"run{number}")
        for word in ("leave out", f"init_from={parent}", *says):
            assert word in message
    good_run(train, tmp_path / "run", f"init_from={parent}", f"tokenizer.path={parent}", "model.block_size=32")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert len(result["parent"]["sha256"]) == 64


def test_context_longer_than_learned_positions(refused, train, tmp_path):
    parent = good_run(train, tmp_path / "parent", "model.positions=learned")
    message = refused(f"init_from={parent}", "model.block_size=32")
    assert "model.block_size: the parent has 16, the command line 32" in message
    model, _ = checkpoint.load_model(checkpoint.find(parent))
    with pytest.raises(ValueError, match=r"17 tokens do not fit into model.block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))


# Run folders


def test_run_folder_that_is_not_empty(refused, train, tmp_path):
    run = good_run(train, tmp_path / "run")
    message = refused()
    for word in (f"run_dir={run}", "not empty", "choose another", f"resume={run}"):
        assert word in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    assert "letter.txt" in refused(run_dir=tmp_path / "mine")


def test_run_folder_in_use_names_the_process(train, tmp_path, text_file):
    run = tmp_path / "run"
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=1000000", "log.every_steps=50")
    process = subprocess.Popen([sys.executable, "-m", "gptlab.train", *options, f"run_dir={run}"])
    try:
        while not (run / "metrics.csv").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"in use by process {process.pid}.*choose another run_dir"):
            train(run, f"resume={run}")
        process.kill()
        process.wait()
        # Now the folder says "running" of a process that is gone.
        assert json.loads((run / "status.json").read_text())["status"] == "running"
        assert RunFolder(run).status()["status"] == "interrupted"
        assert train(run, f"resume={run}", "trainer.max_steps=5") == 0
        assert json.loads((run / "status.json").read_text())["status"] == "completed"
    finally:
        process.kill()


@pytest.mark.parametrize("place", ["file", "/dev/null/run", "/proc/run"])
def test_run_folder_that_cannot_be_made(refused, text_file, place):
    place = f"{text_file}/run" if place == "file" else place
    message = refused(run_dir=Path(place))
    assert f"run_dir={place}" in message
    assert "choose a folder that can be written" in message


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A tmpfs of its own at `folder`; skips where this user cannot mount one."""
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_run_folder_that_is_read_only(refused, tmp_path):
    with small_disk(tmp_path / "disk", "size=1m,ro") as disk:
        message = refused(run_dir=disk / "run")
    assert f"run_dir={disk}/run" in message
    assert "Read-only" in message


def test_full_disk_at_the_start(refused, tmp_path):
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(bytes(65536))
        message = refused(run_dir=disk / "run")
    assert "No space left" in message
    assert str(disk) in message


def test_full_disk_in_mid_run_keeps_the_old_checkpoint_and_the_run_goes_on_later(tmp_path, text_file, train):
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=100000", "checkpoint.every_steps=20")
    with small_disk(tmp_path / "disk", "size=12m") as disk:
        run = disk / "run"
        process = subprocess.Popen(
            [sys.executable, "-m", "gptlab.train", *options, f"run_dir={run}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not (run / "checkpoints/last.ckpt").exists():
                assert process.poll() is None
                time.sleep(0.02)
            with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(65536))
            _, message = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 1, message
        assert_one_message(message)
        assert "No space left" in message
        assert checkpoint.load(run / "checkpoints/last.ckpt")["global_step"] >= 20
        assert not list(run.rglob("*.tmp.*"))
        (disk / "filler").unlink()
        step = checkpoint.load(run / "checkpoints/last.ckpt")["global_step"]
        assert train(run, f"resume={run}", f"trainer.max_steps={step + 3}") == 0
        assert json.loads((run / "result.json").read_text())["steps"] == step + 3


def test_disk_that_fills_while_saving(train, tmp_path, monkeypatch, capsys):
    """The same without a mount: a save fails after the first few steps."""
    real = Checkpoints._save
    calls = []

    def failing(self, trainer, **options):
        calls.append(trainer.global_step)
        if trainer.global_step >= 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder / "last.ckpt"))
        real(self, trainer, **options)

    monkeypatch.setattr(Checkpoints, "_save", failing)
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=8", "checkpoint.every_steps=2") == 1
    assert_one_message(capsys.readouterr().err)
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 4)
    assert "No space left" in status["error"]
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    monkeypatch.setattr(Checkpoints, "_save", real)
    assert checkpoint.load(run / "checkpoints/last.ckpt")["global_step"] == 2
    assert train(run, f"resume={run}") == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 8


def test_save_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def half(file: io.BufferedWriter) -> None:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_message_is_cut_to_fifteen_lines(capsys):
    from gptlab import doors

    doors.fail("\n".join(f"line {number}" for number in range(40)))
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 15
    assert "26 lines more" in message


def test_traceback_goes_to_the_log_and_with_debugging_to_the_screen(train, tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "one", "data.files=nowhere.txt") == 2
    assert "Traceback" in (tmp_path / "one/train.log").read_text()
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("GPTLAB_DEBUG", "1")
    assert train(tmp_path / "two", "data.files=nowhere.txt") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_is_an_interruption(train, tmp_path, monkeypatch):
    from gptlab import assembly

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(assembly, "build_data", interrupted)
    assert train(tmp_path / "run", STEPS) == 130
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"


def test_bad_data_leaves_no_folder_that_nobody_named(refused, tmp_path):
    refused("data.files=nowhere.txt", run_dir=None)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/2020-01-01").mkdir(parents=True)
    refused("data.files=nowhere.txt", run_dir=None)
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs/2020-01-01"]


def test_a_fault_after_the_first_step_keeps_the_folder_whatever_it_was(text_file, tmp_path, monkeypatch, capsys):
    """Even one of Hydra's or OmegaConf's, which before the first step would be the user's."""
    import gptlab.train
    from gptlab.callbacks.watching import ConsoleLines

    def fail(*_):
        return OmegaConf.create({"a": "${b}"}).a

    monkeypatch.setattr(ConsoleLines, "on_validation_end", fail)
    monkeypatch.setattr("sys.argv", ["train.py", *SMALL, f"data.files={text_file}", STEPS, "validation.every_steps=1"])
    with pytest.raises(SystemExit) as exit_:
        gptlab.train.main()
    assert exit_.value.code == 1
    assert_one_message(capsys.readouterr().err)
    (status,) = (tmp_path / "runs").glob("*/*/status.json")
    assert json.loads(status.read_text())["status"] == "failed"


def test_ctrl_c_while_modules_are_imported_ends_quietly(tmp_path):
    """The first seconds of a run are imports."""
    for delay in (0.2, 0.6, 1.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "gptlab.train"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors == b""
        assert list(tmp_path.iterdir()) == []
