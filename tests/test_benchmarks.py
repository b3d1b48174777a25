"""Every benchmark runs at its smallest setting, without a network and without peers, and its table has figures."""

import argparse
import inspect
import re
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, prose

SCRIPTS = sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py"))
SHARED = {"turns", "bare", "trials", "goodput", "encoders", "loaders", "clients"}  # what scripts are made of


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, REPOSITORY / f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "left out" not in done.stdout
    return done.stdout


def tables(output: str) -> list[dict[str, list[str]]]:
    """Of each table, the cells behind the first one of each row."""
    found: list[dict[str, list[str]]] = []
    for line in output.splitlines():
        if line.startswith("| ---"):
            if found:
                found[-1].popitem()  # this table's head
            found.append({})
        elif line.startswith("| ") and found:
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[-1][first] = cells
    return found


def number(cell: str) -> float:
    return float(re.sub(r"[x%,]", "", cell))


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in SHARED])
def test_help_tells_how_to_run_it(name):
    assert f"benchmarks/{name}.py" in run(name, "--help").replace("\n", "")


def test_every_script_is_on_the_page():
    page = (REPOSITORY / "benchmarks/README.md").read_text()
    assert [name for name in SCRIPTS if f"{name}.py" not in page] == []


@pytest.mark.slow
def test_train_throughput():
    (table,) = tables(
        run("train_throughput", "--shape", "test", "--style", "gpt2", "--peers", "none", "--steps=4", "--rounds=1")
    )
    assert next(iter(table)) == "eager float32 loop"
    assert number(table["eager float32 loop"][2]) == 1
    ms, tokens = number(table["`gptlab.train`"][0]), number(table["`gptlab.train`"][1])
    assert tokens == pytest.approx(2 * 16 / ms * 1e3, rel=0.01)


@pytest.mark.slow
def test_rounds_that_are_kept_are_added_to(tmp_path):
    options = ("--shape", "test", "--style", "gpt2", "--only", "eager", "--steps=2", "--rounds=1", "--kept", tmp_path)
    assert [tables(run("train_throughput", *options))[0]["eager float32 loop"][-1] for _ in range(2)] == ["1", "2"]


def test_a_peer_that_cannot_be_had_is_left_out_with_a_word(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import train_throughput
    from turns import take_turns

    monkeypatch.setitem(train_throughput.PEERS, "litgpt", (("no-such-package==0",), "litgpt_loop.py"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    train_throughput.peer_python.cache_clear()
    ways = {"peer": lambda: float(train_throughput.peer_python("litgpt")), "own": lambda: 2.0}
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    assert take_turns(ways, 2) == [{"own": 2.0}, {"own": 2.0}]
    assert [line for line in said if line.startswith("left out: peer: litgpt cannot be installed (ERROR")] != []
    assert sum(line.startswith("left out") for line in said) == 1


@pytest.mark.slow
def test_time_to_loss(tmp_path, monkeypatch):
    (tmp_path / "shakespeare.txt").write_text(prose(4000))
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    small = ("model.n_layer=1", "model.n_embd=32", "model.block_size=16", "validation.every_steps=5")
    options = ("--experiment=shakespeare_cpu", "--seeds=1", "--steps=10", "--fast-steps=20", "--target=9", "--no-long")
    output = run("time_to_loss", *options, *small, "compile=false", "schedule.warmup_steps=2", "tokenizer=char")
    assert "scaled up from 10 steps" in output
    reference, fast = tables(output)[0].values()
    assert number(fast[3]) == pytest.approx(number(reference[2]) / number(fast[2]), rel=0.05)
    assert number(fast[2]) < number(fast[4])  # the process took longer than its steps


@pytest.mark.slow
def test_memory():
    table, checkpointed = tables(run("memory", "--blocks", "32", "64", "--no-compile", "--device=cpu"))
    for rows in (table, checkpointed):
        start, train, growth, *_ = rows["64"]
        assert number(train) > number(start) > 100
        assert number(growth) == pytest.approx(number(train) / number(rows["32"][1]), abs=0.01)


@pytest.mark.slow
def test_startup():
    (table,) = tables(run("startup", "--rounds=1", "--no-runs"))
    assert number(table["`import gptlab.train`"][0]) > number(table["`import torch`"][0]) > 0.1


@pytest.mark.slow
def test_data():
    output = run(
        "data", "--only", "speed", "memory", "kills", "--megabytes=2", "--rounds=1", "--sizes", "2", "--kills=2"
    )
    speed, memory = tables(output)
    assert number(speed["0 processes"][1]) == 1
    assert number(speed["0 processes"][0]) > 0.1
    assert number(memory["2"][0]) > number(memory["2"][1]) > 100
    assert "2 builds of 2 MB killed" in output
    assert output.rstrip().endswith("the bytes are the same")


@pytest.mark.slow
def test_data_by_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(prose(4000) + inspect.getsource(argparse))
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    options = ("--megabytes=0.5", "--pieces=600", "--rounds=1", "--kinds", "BPE", "tiktoken", "byte")
    own, libraries = tables(run("data", "--only", "tokenizers", *options))
    assert [number(cells[0]) for cells in own.values()] == [600, 600, 269]
    assert number(own["byte"][1]) == 1 < number(own["tiktoken"][1])
    for cells in own.values():
        assert number(cells[2]) > number(cells[4]) > 0  # starting processes takes longer than this text
    assert list(libraries) == ["`sentencepiece`, `encode(texts)`, BPE", "`tiktoken`, `encode_ordinary_batch`, tiktoken"]
    assert all(number(cells[0]) > 0 for cells in libraries.values())


def test_ids_that_a_library_gives_otherwise_end_the_comparison(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import encoders

    (tmp_path / "text.txt").write_text(inspect.getsource(argparse))
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    comparison = encoders.Comparison(tmp_path / "own", ["tiktoken"], 0.01, 600, build=None)
    ways = dict(comparison.contenders())
    assert list(ways) == ["tiktoken: alone", "tiktoken: 0", "tiktoken: 2", "tiktoken: 1 threads", "tiktoken: 2 threads"]
    monkeypatch.setattr(encoders, "alone", lambda *task: {"seconds": 1.0, "tokens": 7 if task[2] is None else 8})
    ways["tiktoken: alone"]()
    with pytest.raises(RuntimeError, match="tiktoken: 8 tokens by tiktoken, 7 by gptlab"):
        ways["tiktoken: 2 threads"]()


def test_data_by_loader():
    (table,) = tables(run("data", "--only", "loaders", "--tokens=500000", "--batches=5", "--rounds=1"))
    assert next(iter(table)) == "random slices of `np.memmap`"
    assert number(table["random slices of `np.memmap`"][2]) == 1
    windows, us, _ = table["gptlab's `WindowLoader`"]
    assert abs(32e6 / number(windows) - number(us)) <= 0.51  # which is a whole number


def test_loaders_give_the_same_windows_and_say_when_there_are_too_few(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import loaders

    file = loaders.write_tokens(tmp_path / "tokens.bin", 2**20 + 7)
    assert len(file) == len(file[:]) == 2**20 + 7
    slices = loaders.Slices(file.path)
    windows = loaders.WindowDataset(file, loaders.BLOCK, loaders.BLOCK)
    assert len(slices) == len(windows)
    for index in (0, 5, len(slices) - 1):
        for name, values in slices[index].items():
            assert torch.equal(values, windows[index][name])
    batch = next(loaders.random_slices(file.path))
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    with pytest.raises(ValueError, match="64 windows were asked for, and an epoch has 32 left: raise --tokens"):
        loaders.seconds_a_window([batch] * (loaders.WARM + 1), 2)


@pytest.mark.slow
def test_streaming():
    small = ("--megabytes=2", "--rounds=1", "--shapes", "test", "--steps=2", "--sizes", "2")
    speed, wait, memory, resume = tables(run("streaming", *small))
    assert set(speed) == {"sentencepiece bpe", "sentencepiece unigram", "hf", "byte"}
    for stream, alone, ratio in speed.values():  # of one round, on a machine that may be loaded
        assert number(ratio) == pytest.approx(number(stream) / number(alone), rel=0.05, abs=0.01)
    assert number(wait["test, built"][1]) == 1
    assert 0 <= number(wait["test, stream"][2]) < 100
    assert number(memory["2"][0]) > 100
    assert len(resume) == 3


@pytest.mark.slow
def test_scaling():
    steps, corpus = tables(
        run(
            *("scaling", "--only", "depth", "corpus", "--doublings=1", "--windows", "1000", "2000000000"),
            *("--shapes", "test", "--steps=1", "--rounds=1", "--batches=20"),
        )
    )
    assert number(steps["depth 8"][2]) == pytest.approx(1.8, abs=0.2)  # twice the blocks, and one head
    assert list(corpus) == ["1,000", "2,000,000,000"]
    assert number(corpus["2,000,000,000"][2]) < 200  # MB: four gigabytes of tokens are not read


@pytest.mark.slow
def test_step_profile():
    operations, hooks = tables(run("step_profile", "--shape", "test", "--steps=10"))
    for table, whole in ((operations, "all, under the profiler"), (hooks, "all, under the profiler")):
        total = number(table.pop(whole)[0])
        assert sum(number(cells[0]) for cells in table.values()) == pytest.approx(total, rel=0.1)
    assert number(operations["matrix products"][0]) > 0
    assert number(hooks["optimizer"][0]) > 0


@pytest.mark.slow
def test_serve():
    (table,) = tables(run("serve", "--clients", "1", "2", "--seconds=2", "--tokens=10", "--rounds=1"))
    assert number(table["1"][1]) == 1
    assert number(table["2"][1]) == pytest.approx(number(table["2"][0]) / number(table["1"][0]), rel=0.1)


@pytest.mark.slow
def test_a_server_outlives_an_ordeal():
    output = run("serve_load", "--clients", "30", "--seconds", "12")
    assert output.rstrip().endswith("nothing was wrong")
    (table,) = tables(output)
    assert {"garbage", "half", "leaving", "looking", "several", "slow", "stream", "too_much", "whole"} == set(table)
