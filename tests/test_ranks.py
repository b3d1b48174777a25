"""Several processes train the run that one would: the same windows, losses and files, whoever splits what."""

import contextlib
import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import SMALL, door, prose
from test_resume import assert_same_run, interrupted_at, weights
from torch.distributed.device_mesh import init_device_mesh

from gptlab import meeting, ranks
from gptlab.doors import message_of
from gptlab.model import GPT, GPTConfig
from gptlab.sharding import split
from gptlab.sharding import whole as whole_tensor

STEPS = 12
ALONE = tuple(word for word in SMALL if not word.startswith(("trainer=", "data.batch_size")))
RUN = (
    *(*ALONE, "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", "optimizer=adamw", "task=ragged"),
    *("validation.every_steps=5", "samples.every_steps=6", "samples.max_tokens=10", "checkpoint.every_steps=1"),
    "checkpoint.keep_last=100",
)
ONE = ("trainer=cpu", "data.batch_size=8")
HALVES = ("trainer.devices=2", "data.batch_size=4")
KINDS = {
    "accumulated": ("trainer=cpu", "data.batch_size=4", "trainer.accumulate_grad_batches=2"),
    "ddp": ("trainer=ddp", *HALVES),
    "fsdp": ("trainer=fsdp", *HALVES),
    "tp": ("trainer=tp", "trainer.devices=2", "data.batch_size=8"),
}
PARTS = '''
import os, signal
from pathlib import Path

import torch
from lightning.pytorch import Callback

from gptlab.tasks.lm import LMTask


class Ragged(LMTask):
    """Counts a third of the tokens or so, and of some rows none: what ranks have to count differs."""

    def training_step(self, batch, batch_idx):
        row = batch["tokens"].sum(dim=1, keepdim=True)
        keep = ((batch["tokens"] * 7 + row) % 3 == 0) & (row % 5 != 0)
        return super().training_step(batch | {"loss_mask": batch["loss_mask"] & keep}, batch_idx)


class Fault(Callback):
    """Sends `signum` to one rank after a step, once."""

    def __init__(self, rank, step, signum):
        self.rank, self.step, self.signum = rank, step, signum

    def on_train_batch_end(self, trainer, task, *_):
        marker = Path("fault-was-here")
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), self.signum)


class Twins(Callback):
    """Writes down after each step whether all ranks hold the same of what each holds whole."""

    def on_train_batch_end(self, trainer, task, *_):
        own = task.model.embed.weight.detach().double().sum()
        others = [torch.zeros_like(own) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(others, own)
        if trainer.is_global_zero:
            with open("twins", "a") as file:
                print("same" if len({float(other) for other in others}) == 1 else "other", file=file)


class Collectives(Callback):
    """Writes down what this rank asks of torch.distributed at each step; what runs in DDP's own C++ is not seen."""

    NAMES = ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object", "broadcast_object_list", "reduce")

    def on_train_start(self, trainer, task):
        self.calls = []
        for name in self.NAMES:
            real = getattr(torch.distributed, name)
            setattr(torch.distributed, name, self.counted(name, real))

    def counted(self, name, real):
        def call(*args, **kwargs):
            self.calls.append(name)
            return real(*args, **kwargs)

        return call

    def on_train_batch_start(self, trainer, task, *_):
        if trainer.is_global_zero and trainer.global_step:
            with open("collectives", "a") as file:
                print(trainer.global_step, *self.calls, file=file)
        self.calls = []
'''


def lay_out(folder: Path) -> Path:
    """A folder to train in, with text and parts of its own."""
    (folder / "conf/task").mkdir(parents=True)
    (folder / "conf/task/ragged.yaml").write_text("# Ragged\n_target_: experiments.parts.Ragged\n_partial_: true\n")
    (folder / "experiments").mkdir()
    (folder / "experiments/parts.py").write_text(PARTS)
    (folder / "text.txt").write_text(prose(800))
    return folder


def run(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess:
    return door("train", f"data.files={folder / 'text.txt'}", *RUN, *overrides, f"run_dir={folder / name}", cwd=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process in `one`."""
    folder = lay_out(tmp_path_factory.mktemp("ranks"))
    done = run(folder, "one", *ONE)
    assert done.returncode == 0, done.stderr
    return folder


def figures(path: Path) -> list[dict[str, str]]:
    with open(path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_close(one: Path, other: Path) -> None:
    """The same run but for the order in which numbers are added up."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    a, b = figures(one), figures(other)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for left, right in zip(a, b, strict=True):
        for key in ("train/loss", "train/gradient_norm", "val/loss", "val/bits_per_byte", "val/accuracy"):
            assert (left[key] == "") == (right[key] == ""), (left["step"], key)
            if left[key]:
                assert float(left[key]) == pytest.approx(float(right[key]), rel=1e-5), (left["step"], key)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=1e-4, atol=2e-6, msg=name)
    results = [json.loads((path / "result.json").read_text()) for path in (one, other)]
    for key in ("steps", "epochs", "train_tokens", "params", "best_step"):
        assert results[0][key] == results[1][key], key


@pytest.mark.parametrize("kind", [*list(KINDS)[:3], pytest.param("tp", marks=pytest.mark.slow)])
def test_ranks_and_micro_batches_make_the_same_run(whole, kind):
    done = run(whole, kind, *KINDS[kind])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert_close(whole / "one", whole / kind)
    # What one process writes, another can use without the others.
    state = torch.load(whole / kind / "checkpoints/last.ckpt", weights_only=True)
    alone = torch.load(whole / "one/checkpoints/last.ckpt", weights_only=True)
    shapes = [
        {
            (index, name): tuple(value.shape)
            for index, entry in of["optimizer_states"][0]["state"].items()
            for name, value in entry.items()
        }
        for of in (state, alone)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_muon_is_the_same_on_several_ranks(whole, kind):
    muon = ("optimizer=muon", "optimizer.lr=3e-3")  # at a higher rate, rounding makes more of a difference
    if not (whole / "muon").exists():
        assert run(whole, "muon", *ONE, *muon).returncode == 0
    assert run(whole, f"muon-{kind}", *KINDS[kind], *muon).returncode == 0
    for left, right in zip(figures(whole / "muon"), figures(whole / f"muon-{kind}"), strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), rel=1e-4)  # it divides by norms


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("one", "ddp"),
        pytest.param("ddp", "one", marks=pytest.mark.slow),
        pytest.param("fsdp", "one", marks=pytest.mark.slow),
        pytest.param("tp", "fsdp", marks=pytest.mark.slow),
        pytest.param("one", "tp", marks=pytest.mark.slow),
        pytest.param("accumulated", "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(whole, tmp_path, then, now):
    """From a step inside the epoch, to windows and figures that are the uninterrupted run's."""
    if not (whole / then).exists():
        assert run(whole, then, *KINDS[then]).returncode == 0
    part = interrupted_at(whole / then, 7, tmp_path / "part")
    where = [word for word in {"one": ONE, **KINDS}[now] if word.startswith(("trainer=", "trainer.devices"))]
    done = door("train", f"resume={part}", "trainer.accelerator=cpu", *where, cwd=whole)
    assert done.returncode == 0, done.stderr
    assert_close(whole / "one", part)


def test_ranks_that_cannot_share_a_step_are_refused(whole, tmp_path):
    part = interrupted_at(whole / "one", 7, tmp_path / "part")
    done = door("train", f"resume={part}", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3", cwd=whole)
    assert done.returncode == 2
    assert "a step of this run has 8 windows, which 3 ranks cannot share" in done.stderr


def test_heads_that_ranks_cannot_share_are_refused_before_these_start(whole):
    done = run(whole, "thirds", *KINDS["tp"], "trainer.devices=3")
    assert done.returncode == 2
    assert done.stderr == "error: model.n_head=2 cannot be shared by 3 ranks: use a trainer.devices that divides it\n"


def test_a_split_network_is_not_compiled(whole):
    done = run(whole, "compiled", *KINDS["fsdp"], "compile=true")
    assert done.returncode == 2
    assert "compile=true: a network that is split over ranks is not compiled" in done.stderr


FAULT = "+callbacks.fault._target_=experiments.parts.Fault"


def fault(rank: int, signum: int) -> tuple[str, ...]:
    return (FAULT, f"+callbacks.fault.rank={rank}", "+callbacks.fault.step=6", f"+callbacks.fault.signum={signum}")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the uninterrupted run of two ranks in `whole`, with dropout, which draws from each rank's own."""
    folder = lay_out(tmp_path_factory.mktemp("two"))
    done = run(folder, "whole", *KINDS["ddp"], "model.dropout=0.3")
    assert done.returncode == 0, done.stderr
    return folder


def processes_in(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
    return [pid for pid in found if pid != str(os.getpid())]


@pytest.mark.parametrize(
    ("rank", "signum", "code"),
    [
        (1, 15, 143),
        pytest.param(1, 9, 1, marks=pytest.mark.slow),
        pytest.param(0, 9, -9, marks=pytest.mark.slow),
        pytest.param(0, 2, 130, marks=pytest.mark.slow),
    ],
)
def test_what_befalls_one_rank_ends_all_and_the_run_goes_on_exactly(on_two_ranks, tmp_path, rank, signum, code):
    """A request to end reaches every rank at one step; a rank that is lost ends the others within a minute."""
    folder = on_two_ranks
    (folder / "fault-was-here").unlink(missing_ok=True)
    part = tmp_path / "part"
    command = [sys.executable, "-m", "gptlab.train", f"data.files={folder / 'text.txt'}", *RUN, *KINDS["ddp"]]
    command += ["model.dropout=0.3", *fault(rank, signum), f"run_dir={part}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr  # all of it: the pipe is open until the last rank has ended
    if signum == 9:
        assert f"all ranks end; go on with resume={part}" in done.stderr
        assert ("local rank 1 was ended by SIGKILL" in done.stderr) == (rank == 1)
        assert "Traceback" not in done.stderr
    else:
        assert json.loads((part / "status.json").read_text())["status"] == "interrupted"
        assert json.loads((part / "status.json").read_text())["step"] in (6, 7)
    deadline = 60
    while processes_in(part) and deadline:
        time.sleep(1)
        deadline -= 1
    assert processes_in(part) == []
    again = door("train", f"resume={part}", "seed=77", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert_same_run(folder / "whole", part)


@pytest.mark.slow
def test_a_split_network_in_bfloat16_validates_samples_and_goes_on_as_whole_copies(whole, tmp_path):
    """As on any GPU, where trainer.precision=auto is bf16-mixed."""
    for kind in ("ddp", "fsdp"):
        done = run(whole, f"bf16-{kind}", *KINDS[kind], "trainer.precision=bf16-mixed")
        assert done.returncode == 0, done.stderr
    one, other = (figures(whole / f"bf16-{kind}") for kind in ("ddp", "fsdp"))
    for left, right in zip(one, other, strict=True):
        for key in ("train/loss", "val/loss"):
            assert bool(left[key]) == bool(right[key])
            if left[key]:
                assert float(left[key]) == pytest.approx(float(right[key]), rel=2e-3)  # norms add up in another order
    samples = [(whole / f"bf16-{kind}/samples.jsonl").read_text().count("text") for kind in ("ddp", "fsdp")]
    assert samples[0] == samples[1] > 0
    part = interrupted_at(whole / "bf16-fsdp", 7, tmp_path / "part")
    assert door("train", f"resume={part}", cwd=whole).returncode == 0
    assert_same_run(whole / "bf16-fsdp", part)


def test_a_lost_rank_is_named_though_its_connections_close_before_it_is_seen_to_have_ended(monkeypatch):
    """By itself it ends because it has lost the same rank, of another machine."""
    closed = RuntimeError("[pair.cc:547] Gloo: Connection closed by peer [127.0.0.1]:32994")
    nobody = (
        "another rank has ended or cannot be reached (Gloo: Connection closed by peer [127.0.0.1]:32994); all ranks end"
    )
    assert message_of(closed).startswith(nobody)
    for code, said in ((-9, "local rank 1 was ended by SIGKILL; all ranks end; go on with resume="), (1, nobody)):
        follower = Mock(poll=Mock(side_effect=itertools.chain([None, None], itertools.repeat(code))))
        monkeypatch.setattr(ranks, "_followers", [follower])
        assert message_of(closed).startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_a_split_network_that_loses_a_rank_goes_on_exactly(whole, tmp_path, kind):
    """With dropout, on the same number of ranks; a save is gathered from all of them."""
    dropped = tmp_path / "dropped"
    assert run(whole, str(dropped), *KINDS[kind], "model.dropout=0.3").returncode == 0
    (whole / "fault-was-here").unlink(missing_ok=True)
    part = tmp_path / "part"
    done = run(whole, str(part), *KINDS[kind], "model.dropout=0.3", *fault(1, signal.SIGKILL))
    assert done.returncode == 1
    assert "local rank 1 was ended by SIGKILL" in done.stderr
    again = door("train", f"resume={part}", cwd=whole)
    assert again.returncode == 0, again.stderr
    assert_same_run(dropped, part)


@pytest.mark.parametrize(
    ("signum", "to_all", "code"),
    [
        (signal.SIGTERM, False, 143),
        pytest.param(signal.SIGINT, True, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_ranks_wait_for_each_other_ends_them_all_in_an_orderly_way(
    whole, tmp_path, signum, to_all, code
):
    """As a terminal's Ctrl-C does, to all; or a scheduler's, to the first one alone."""
    path = tmp_path / "run"
    command = [sys.executable, "-m", "gptlab.train", f"data.files={whole / 'text.txt'}", *RUN, *KINDS["ddp"]]
    process = subprocess.Popen(
        [*command, "trainer.max_steps=100000", f"run_dir={path}"],
        cwd=whole,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(processes_in(path)) < 2:  # the other one, whose imports take seconds, is waited for from here on
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    (os.killpg if to_all else os.kill)(process.pid, signum)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert json.loads((path / "status.json").read_text())["status"] == "interrupted"
    assert output.splitlines()[-1] == f"run: {path}"
    assert errors == ""
    deadline = time.monotonic() + 10
    while processes_in(path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(path) == []


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_host_that_stays_alone_says_who_is_missing(whole, free_port, node):
    hosts = ("trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2", "trainer.strategy.timeout_s=2")
    address = {"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    options = (f"data.files={whole / 'text.txt'}", *RUN, *hosts, "data.batch_size=4", f"run_dir={whole / node}")
    done = door("train", *options, cwd=whole, **address)
    assert done.returncode == 1  # the other may come later
    who = {
        "0": f"1 of 2 ranks have come to 127.0.0.1:{free_port}",
        "1": f"rank 1 of 2 finds nobody at 127.0.0.1:{free_port}",
    }
    assert f"{who[node]}, after 2 s: start all of them, each machine with its own NODE_RANK" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def come_as(number: int, *place: str | int, world: int = 2, seconds: float = 5) -> torch.distributed.Store:
    return meeting.meet(*place, rank=number, world=world, timeout=timedelta(seconds=seconds))


def test_ranks_meet_anew_at_each_start_and_two_of_one_number_are_refused(monkeypatch):
    """torchrun's store outlives its restarts, and says where the first rank of the last start was."""
    board = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    here = ("127.0.0.1", board.port)
    with ThreadPoolExecutor(1) as threads:
        for _ in range(2):
            first = threads.submit(come_as, 0, *here)
            second = come_as(1, *here)
            first.result().set("word", "of this start")
            assert second.get("word") == b"of this start"
            with pytest.raises(ValueError, match="two processes take themselves for rank 1 of 2"):
                come_as(1, *here)
            del first, second
            with pytest.raises(meeting.MissingRankError, match="rank 1 of 2 finds nobody"):
                come_as(1, *here, seconds=0.3)  # the store of that start is gone


def test_runs_do_not_mix_at_one_port(monkeypatch, free_port):
    monkeypatch.setenv(ranks.RUN, json.dumps({"run_dir": "runs/one"}))
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(come_as, 0, "127.0.0.1", free_port, seconds=3)
        time.sleep(0.5)
        with pytest.raises(ValueError, match=f"MASTER_PORT={free_port} is in use on this machine; choose another"):
            come_as(0, "127.0.0.1", free_port)
        monkeypatch.setenv(ranks.RUN, json.dumps({"run_dir": "runs/other"}))
        with pytest.raises(meeting.MissingRankError, match="1 of 2 ranks have come"):
            come_as(1, "127.0.0.1", free_port, seconds=0.3)
        with pytest.raises(meeting.MissingRankError, match="1 of 2 ranks have come"):
            first.result()


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--standalone",)])
def test_torchrun_starts_a_run_and_starts_it_again(on_two_ranks, tmp_path, how):
    folder = on_two_ranks
    (folder / "fault-was-here").unlink(missing_ok=True)
    part = tmp_path / "part"
    command = [sys.executable, "-m", "torch.distributed.run", *how, "--nproc-per-node=2", "--max-restarts=1"]
    options = (*RUN, "trainer=ddp", "data.batch_size=4", "model.dropout=0.3", *fault(1, 9), "resume=auto")
    command += ["-m", "gptlab.train", f"data.files={folder / 'text.txt'}", *options, f"run_dir={part}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert (folder / "fault-was-here").exists()
    assert_same_run(folder / "whole", part)


@pytest.mark.slow
def test_torchrun_starts_a_run_on_two_machines_again(on_two_ranks, tmp_path, free_port):
    """Each machine's torchrun counts its own restarts; what both share is a store that outlives them."""
    folder, part = on_two_ranks, tmp_path / "part"
    (folder / "fault-was-here").unlink(missing_ok=True)
    meeting_place = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port}", "--rdzv-id=one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *meeting_place, "--max-restarts=3"]
    options = (*RUN, "trainer=ddp", "data.batch_size=4", "model.dropout=0.3", *fault(1, 9), "resume=auto")
    command += ["-m", "gptlab.train", f"data.files={folder / 'text.txt'}", *options, f"run_dir={part}"]
    machines = [
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert any("continuing from" in words for words in said)
    assert_same_run(folder / "whole", part)


def test_one_task_of_slurm_for_several_devices_is_refused(whole, tmp_path):
    """It would train on one of them."""
    slurm = {"JOB_ID": "29753", "JOB_NAME": "train", "NTASKS": "1", "NNODES": "1", "NODEID": "0", "PROCID": "0"}
    env = {f"SLURM_{name}": value for name, value in (slurm | {"NODELIST": "127.0.0.1", "LOCALID": "0"}).items()}
    options = (f"data.files={whole / 'text.txt'}", *RUN, *KINDS["ddp"], f"run_dir={tmp_path / 'run'}")
    done = door("train", *options, cwd=whole, **env)
    assert done.returncode == 2
    assert "ask for 2 processes, and SLURM has started 1: give srun --ntasks-per-node" in done.stderr


@pytest.mark.slow
def test_tasks_of_slurm_are_ranks_and_its_signal_saves(on_two_ranks, tmp_path):
    """As srun starts two tasks on one node, and as `--signal=USR1@90` tells them all that the time is nearly up."""
    folder, part = on_two_ranks, tmp_path / "part"
    (folder / "fault-was-here").unlink(missing_ok=True)
    options = (f"data.files={folder / 'text.txt'}", *RUN, *KINDS["ddp"], "model.dropout=0.3", f"run_dir={part}")
    tasks = []
    for rank in range(2):
        slurm = {"JOB_ID": "29752", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
        slurm |= {"NODEID": "0", "NODELIST": "127.0.0.1", "PROCID": str(rank), "LOCALID": str(rank)}
        env = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
        words = [sys.executable, "-m", "gptlab.train", *options, *fault(rank=1, signum=10), "resume=auto"]
        tasks.append(subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    errors = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [143, 143], errors
    assert json.loads((part / "status.json").read_text())["status"] == "interrupted"
    assert door("train", f"resume={part}", cwd=folder).returncode == 0
    assert_same_run(folder / "whole", part)


def test_processes_started_outside_must_be_told_the_folder(tmp_path, text_file):
    outside = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = door("train", f"data.files={text_file}", *ALONE, "trainer=ddp", **outside)
    assert done.returncode == 2
    assert "give run_dir=<folder>" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_processes_started_outside_for_a_trainer_of_one_device_are_refused(whole, tmp_path):
    """Each would train alone, into one folder."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "gptlab.train",
    ]
    options = (f"data.files={whole / 'text.txt'}", *RUN, *ONE, f"run_dir={tmp_path / 'run'}")
    done = subprocess.run([*command, *options], cwd=whole, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "2 processes were started, and this trainer is one of 1" in done.stderr


@pytest.mark.slow
def test_ranks_that_share_a_network_draw_the_same_numbers(whole, tmp_path):
    """Also where the run began on one rank: what they hold whole, such as embeddings, stays the same on all."""
    assert run(whole, "dropped", *ONE, "model.dropout=0.3").returncode == 0
    part = interrupted_at(whole / "dropped", 7, tmp_path / "part")
    twins = "+callbacks.twins._target_=experiments.parts.Twins"
    for folder, more in ((part, (f"resume={part}", "trainer=tp", "trainer.devices=2", "trainer.accelerator=cpu")),):
        cfg = yaml.safe_load((folder / "config.yaml").read_text())
        cfg["callbacks"] = {"twins": {"_target_": "experiments.parts.Twins"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
        for path in (folder / "checkpoints").glob("*.ckpt"):  # their copies of the config say nothing of it
            state = torch.load(path, weights_only=True)
            state["callbacks"]["RunRecord"]["config"] = None
            torch.save(state, path)
        (folder / "checkpoints/manifest.json").unlink()
        done = door("train", *more, cwd=whole)
        assert done.returncode == 0, done.stderr
    assert (whole / "twins").read_text().split() == ["same"] * 5
    assert run(whole, "fresh", *KINDS["tp"], "model.dropout=0.3", twins).returncode == 0
    assert (whole / "twins").read_text().split() == ["same"] * (5 + STEPS)


@pytest.mark.slow
def test_several_ranks_save_by_the_clock_once_at_a_time(whole):
    clock = (
        "checkpoint.every_steps=null",
        f"checkpoint.every_minutes={1 / 60}",
        "trainer.max_steps=100000",
        "max_time=6",
    )
    assert (
        run(
            whole, "clock", *KINDS["ddp"], *clock, "validation.every_steps=100000", "samples.every_steps=null"
        ).returncode
        == 0
    )
    saved = sorted(int(path.stem.removeprefix("step-")) for path in (whole / "clock/checkpoints").glob("step-*.ckpt"))
    assert 3 <= len(saved) <= 7
    assert min(b - a for a, b in itertools.pairwise(saved)) > 3


@pytest.mark.slow
def test_the_network_of_gpt2_is_split_by_heads(whole, tmp_path):
    """Its biases are split too, some of them; and one process goes on with what the ranks have saved of them."""
    gpt2 = ("model.bias=true", "model.norm=layernorm", "model.mlp=gelu", "model.positions=learned")
    for name, words in (("gpt2", ONE), ("gpt2-tp", KINDS["tp"])):
        done = run(whole, name, *words, *gpt2, "model.qk_norm=false")
        assert done.returncode == 0, done.stderr
    assert_close(whole / "gpt2", whole / "gpt2-tp")
    for then, now in (("gpt2-tp", ONE), ("gpt2", KINDS["tp"])):
        part = interrupted_at(whole / then, 7, tmp_path / then)
        where = [word for word in now if word.startswith(("trainer=", "trainer.devices"))]
        done = door("train", f"resume={part}", "trainer.accelerator=cpu", *where, cwd=whole)
        assert done.returncode == 0, done.stderr
        assert_close(whole / "gpt2", part)


def gather(rank: int, store: str, found: str) -> None:
    """Train a network whose copies are whole, and one that is split, in bfloat16; write down what each came to."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    lines = []
    for is_split in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=128, n_layer=3, n_embd=64, block_size=32))
        shapes = {frozenset(parameter.shape) for parameter in model.blocks.parameters() if parameter.ndim == 2}
        if is_split:
            split(model, mesh, torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = torch.Generator().manual_seed(rank)
        for _ in range(3):
            tokens = torch.randint(0, 128, (4, 32), generator=batches)
            kept = []

            def keep(saved, kept=kept, shapes=shapes):
                if saved.ndim == 2 and frozenset(saved.shape) in shapes:
                    kept.append(saved.untyped_storage())
                return saved

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved), torch.autocast("cpu"):
                logits = model(tokens)
            copies = sum(storage.nbytes() for storage in kept)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
            loss.backward()
            if not is_split:
                for parameter in model.parameters():
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= 2
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([whole_tensor(parameter.detach()).flatten() for parameter in model.parameters()])
        lines.append((float(loss), weights, copies))
    torch.save(lines, f"{found}-{rank}")
    torch.distributed.destroy_process_group()


def test_a_split_network_in_bfloat16_is_that_of_whole_copies_and_keeps_none(tmp_path):
    """Bit for bit; and between forward and backward no rank holds a copy of the matrices of a block."""
    torch.multiprocessing.spawn(gather, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
    for rank in (0, 1):
        copied, gathered = torch.load(tmp_path / f"found-{rank}", weights_only=True)
        assert copied[0] == gathered[0]
        assert torch.equal(copied[1], gathered[1])
        assert copied[2] > 0
        assert gathered[2] == 0


def test_a_step_of_two_ranks_has_one_collective_besides_the_strategys_own(whole):
    counting = "+callbacks.count._target_=experiments.parts.Collectives"
    assert run(whole, "counted", *KINDS["ddp"], counting, "checkpoint.every_steps=null").returncode == 0
    counts = dict(line.split(maxsplit=1) for line in (whole / "collectives").read_text().splitlines())
    quiet = {step: calls for step, calls in counts.items() if step not in ("5", "10", "12")}  # no validation there
    assert set(quiet) >= {"2", "3", "4", "6", "7", "8", "9", "11"}
    assert set(quiet.values()) == {"all_reduce"}


@pytest.mark.slow
def test_a_sweep_of_runs_on_two_ranks_has_one_folder_a_job(whole, tmp_path):
    sweep = tmp_path / "sweep"
    options = (f"data.files={whole / 'text.txt'}", *RUN, *KINDS["ddp"], f"run_dir={sweep}")
    done = door("train", "-m", "seed=1,2", *options, cwd=whole)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0_seed-1", "1_seed-2"]
    assert not (whole / "runs").exists()
    assert_close(whole / "one", sweep / "0_seed-1")


@pytest.mark.slow
def test_the_averages_of_a_split_network_are_those_of_one_process(whole):
    averaged = ("callbacks=ema", "callbacks.ema.decay=0.8")
    assert run(whole, "ema", *ONE, *averaged).returncode == 0
    for kind in ("fsdp", "tp"):
        done = run(whole, f"ema-{kind}", *KINDS[kind], *averaged)
        assert done.returncode == 0, done.stderr
        assert_close(whole / "ema", whole / f"ema-{kind}")
        states = [
            torch.load(whole / name / "checkpoints/last.ckpt", weights_only=True) for name in ("ema", f"ema-{kind}")
        ]
        for name, tensor in states[0]["current_model_state"].items():
            torch.testing.assert_close(tensor, states[1]["current_model_state"][name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
    ],
)
def test_the_first_process_is_known_from_its_environment(monkeypatch, variables, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks.is_first() == first
