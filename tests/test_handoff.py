"""Shards made by datatrove hold what a plain loop makes of the same documents, however often a task was killed."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import dill
import numpy as np
import pytest
from conftest import REPOSITORY, SMALL, door, prose
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from kinds import of_kind

from gptlab.data.datatrove import TextFiles, TokenShards
from gptlab.data.formats import Reading
from gptlab.data.shards import open_shards, read_sidecar
from gptlab.files import sha256_of_file
from gptlab.tokenizer import ByteTokenizer, CharTokenizer

TASKS = 3
# A pipeline whose last task never comes to its end, and says so.
STALLED = """
import sys, time
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from gptlab.data.datatrove import TextFiles, TokenShards

def stall(data, rank, world_size):
    for number, document in enumerate(data):
        if rank == world_size - 1 and number == 5:
            Path(sys.argv[4], "stalled").touch()
            time.sleep(600)
        yield document

if __name__ == "__main__":
    files, tokenizer, output, tasks = *sys.argv[1:4], int(sys.argv[5])
    pipeline = [TextFiles(files), stall, TokenShards(output, tokenizer)]
    LocalPipelineExecutor(pipeline, tasks, workers=2, logging_dir=f"{output}/logs").run()
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five files of rows, plain or compressed, and a tokenizer."""
    for number in range(5):
        rows = "".join(
            json.dumps({"text": f"{number} {i} Él dijo: {prose(10 + 10 * i, seed=100 * number + i)}"}) + "\n"
            for i in range(8)
        )
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    of_kind("bpe").save(tmp_path / "tokenizer")
    return tmp_path


def expected(corpus: Path, rank: int, tasks: int = TASKS, least: int = 0) -> list[int]:
    """The ids of a task's documents, of those with so many characters."""
    ids: list[int] = []
    for path in sorted(corpus.glob("*.jsonl.gz"))[rank::tasks]:
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            if len(text := json.loads(line)["text"]) >= least:
                ids += [*of_kind("bpe").encode(text).tolist(), 2]
    return ids


def steps(corpus: Path, output: Path) -> list:
    return [TextFiles(f"{corpus}/*.jsonl.gz"), TokenShards(output, corpus / "tokenizer")]


def execute(corpus: Path, output: Path, workers: int = 1) -> None:
    pipeline = steps(corpus, output)
    pipeline[-1].forget_lost(output / "logs", TASKS)
    LocalPipelineExecutor(pipeline, TASKS, workers, logging_dir=str(output / "logs")).run()


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.bin*"))}


def made_at(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.glob("*.bin")}


def test_shards_hold_the_ids_of_a_plain_loop_by_one_worker_and_by_two(corpus, tmp_path):
    execute(corpus, tmp_path / "one", workers=1)
    execute(corpus, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shards = open_shards(f"{tmp_path}/one/*.bin")
    assert [shard.path.name for shard in shards] == [f"{rank:05d}-of-00003.bin" for rank in range(TASKS)]
    for rank, shard in enumerate(shards):
        assert shard.ids[:].tolist() == expected(corpus, rank)
        assert shard.sidecar.documents == 8 * len(range(rank, 5, TASKS))
        assert shard.sidecar.sha256 == sha256_of_file(shard.path)
        assert shard.sidecar.tokenizer_fingerprint == of_kind("bpe").fingerprint
        assert shard.sidecar.vocab_size == of_kind("bpe").vocab_size
        text = of_kind("bpe").decode_bytes(shard.ids[:][shard.ids[:] != 2])
        assert shard.sidecar.bytes == len(text)
    stats = json.loads((tmp_path / "one/logs/stats.json").read_text())
    assert stats[1]["stats"]["tokens"]["total"] == sum(len(shard.ids) for shard in shards)


def test_a_task_that_is_killed_leaves_nothing_that_counts_and_runs_again(corpus, tmp_path):
    reader, shards = steps(corpus, tmp_path / "shards")
    shards.run(reader.run(None, 1, 2), 1, 2)

    def documents():
        yield from reader.run(None, 0, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            shards.run(documents(), 0, 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [shard.path.name for shard in open_shards(f"{tmp_path}/shards/*.bin")] == ["00001-of-00002.bin"]
    assert list((tmp_path / "shards").glob(".00000-of-00002.bin.tmp.*"))
    assert shards.forget_lost(tmp_path / "logs", 2) == [0]
    shards.run(reader.run(None, 0, 2), 0, 2)
    found = [shard.ids[:].tolist() for shard in open_shards(f"{tmp_path}/shards/*.bin")]
    assert found == [expected(corpus, rank, 2) for rank in range(2)]
    assert not list((tmp_path / "shards").glob(".*"))


@pytest.mark.slow
def test_a_task_that_was_killed_leaves_no_shard_and_the_script_makes_it_and_no_other(corpus, tmp_path):
    output, program = tmp_path / "shards", tmp_path / "stalled.py"
    program.write_text(STALLED)
    files, tokenizer = f"{corpus}/*.jsonl.gz", str(corpus / "tokenizer")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, program, files, tokenizer, output, tmp_path, str(TASKS)]
    running = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        others = [output / f"logs/completions/{rank:05d}" for rank in range(TASKS - 1)]
        until(lambda: (tmp_path / "stalled").exists() and all(other.exists() for other in others))
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert [shard.path.name for shard in open_shards(f"{output}/*.bin")] == ["00000-of-00003.bin", "00001-of-00003.bin"]
    assert list(output.glob(".00002-of-00003.bin.tmp.*"))
    before = made_at(output)
    script = [sys.executable, "-m", "experiments.handoff.shards", files, "--tokenizer", tokenizer]
    script += ["--output", output, "--tasks", str(TASKS), "--workers", "2"]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: at for name, at in made_at(output).items() if name in before} == before
    for rank, shard in enumerate(open_shards(f"{output}/*.bin")):
        assert shard.ids[:].tolist() == expected(corpus, rank)
    assert rank == TASKS - 1
    assert not list(output.glob(".*"))


def test_a_run_trains_on_what_datatrove_made(corpus, tmp_path):
    execute(corpus, tmp_path / "shards")
    options = (f"data.tokens={tmp_path}/shards/*.bin", f"tokenizer.path={tmp_path}/tokenizer", "run_dir=run")
    small = [option for option in SMALL if not option.startswith("tokenizer=")]
    done = door("train", *small, *options, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["train_tokens"] == 2 * 4 * 16


PAGE = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "docs/tokens.md").read_text(), re.MULTILINE | re.DOTALL)
SLURM = {  # enough of it to run the tasks of an array, one after another
    "sbatch": """for script in "$@"; do :; done
grep -q merge_stats $script || for task in $(seq 0 $(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node SLURM_JOB_ID=1 bash $script > $HOME/$task.log 2>&1
done
echo Submitted batch job 1""",
    "srun": 'while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; "$@"',
    "scontrol": "echo node",
}


@pytest.mark.slow
@pytest.mark.parametrize("by", ["slurm", "filters"])
def test_the_page_says_how(corpus, tmp_path, by):
    """Its programs run, in an imitation of SLURM, and give the shards of one machine."""
    first = next(block for block in PAGE if "SlurmPipelineExecutor(" in block)
    filters = next(block for block in PAGE if "LambdaFilter(" in block)
    program = first if by == "slurm" else first.split("SlurmPipelineExecutor(")[0].replace("Slurm", "Local") + filters
    for name, own in (("corpus/*.jsonl.zst", "*.jsonl.gz"), ("runs/first", "tokenizer"), ("venv/bin/", "")):
        assert name in program or by == "filters"
        program = program.replace(f"/shared/{name}", f"{tmp_path}/{own}")
    program = program.replace("/shared/shards", f"{tmp_path}/shards")
    (tmp_path / "program.py").write_text(f"if __name__ == '__main__':\n{textwrap.indent(program, '    ')}")
    for name, content in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "activate").write_text("")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": path, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "program.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [shard.ids[:].tolist() for shard in open_shards(f"{tmp_path}/shards/*.bin")]
    least = 0 if by == "slurm" else 200
    assert found == [expected(corpus, rank, 5, least) for rank in range(5)]
    assert sum(map(len, found)) < sum(len(expected(corpus, rank, 5)) for rank in range(5)) or by == "slurm"


def until(true, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("lost", ["shard", "sidecar", "half of a shard", "completion"])
def test_what_is_lost_is_made_again_and_nothing_else(corpus, tmp_path, lost):
    output = tmp_path / "shards"
    execute(corpus, output)
    whole, before, shard = contents(output), made_at(output), output / "00001-of-00003.bin"
    if lost == "completion":
        (output / "logs/completions/00001").unlink()
    elif lost == "half of a shard":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        (shard if lost == "shard" else shard.with_name("00001-of-00003.bin.json")).unlink()
    execute(corpus, output)
    assert contents(output) == whole
    assert {name for name, at in made_at(output).items() if at != before[name]} == {shard.name}


def test_a_shard_that_is_being_made_again_does_not_count_meanwhile(corpus, tmp_path):
    output = tmp_path / "shards"
    _, shards = steps(corpus, output)
    shards.run([Document("before", "0")], 0, 1)
    counted = []

    def documents():
        yield Document("now", "0")
        counted.extend(output.glob("*.json"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.run(documents(), 0, 1)
    assert counted == []
    assert not list(output.glob("*.json"))
    assert not list(output.glob(".*"))


def test_memory_does_not_grow_with_the_documents(tmp_path):
    of_kind("byte").save(tmp_path / "tokenizer")
    shards = TokenShards(tmp_path / "shards", tmp_path / "tokenizer")
    tracemalloc.start()
    shards.run((Document("x" * 10_000, str(number)) for number in range(2000)), 0, 1)
    assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
    tracemalloc.stop()
    assert read_sidecar(tmp_path / "shards/00000-of-00001.bin").tokens == 2000 * 10_001


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    characters = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)]))
    (tokenizer := CharTokenizer(characters)).save(tmp_path / "tokenizer")
    assert tokenizer.vocab_size > 2**16
    TokenShards(tmp_path / "shards", tmp_path / "tokenizer").run([Document("a\U00012fff", "0")], 0, 1)
    (shard,) = open_shards(f"{tmp_path}/shards/*.bin")
    assert shard.ids.dtype == np.dtype("<u4")
    assert shard.ids[:].tolist() == [13 + ord("a") - 0x20, tokenizer.vocab_size - 1, 2]


def test_a_task_without_documents_makes_a_shard_that_is_left_out(corpus, tmp_path):
    _, shards = steps(corpus, tmp_path / "shards")
    shards.run([], 0, 2)
    shards.run([Document("text", "0")], 1, 2)
    assert shards.forget_lost(tmp_path / "logs", 2) == []
    assert [shard.path.name for shard in open_shards(f"{tmp_path}/shards/*.bin")] == ["00001-of-00002.bin"]


def test_steps_travel_light(corpus, tmp_path):
    """What an executor sends to each task is paths, not a tokenizer; a task loads that itself."""
    pipeline = steps(corpus, tmp_path / "shards")
    sent = dill.dumps(pipeline)
    assert len(sent) < 5000
    reader, shards = dill.loads(sent)
    shards.run(reader.run(rank=1, world_size=TASKS), 1, TASKS)
    assert open_shards(f"{tmp_path}/shards/*.bin")[0].ids[:].tolist() == expected(corpus, 1)


def test_text_files_are_read_as_gptlab_reads_them_and_bad_ones_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("four\n")
    texts = [document.text for document in TextFiles(f"{tmp_path}/*.txt", Reading(documents="line")).run()]
    assert texts == ["one", "two", "three", "four"]
    ids = [document.id for document in TextFiles(f"{tmp_path}/*.txt", Reading(documents="line")).run(None, 0, 2)]
    assert ids == [f"{tmp_path}/a.txt/{number}" for number in range(3)]
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl.*line 2"):
        list(TextFiles(str(tmp_path / "bad.jsonl")).run())
    with pytest.raises(ValueError, match="matches no file"):
        TextFiles(f"{tmp_path}/*.md")


def test_shards_of_another_number_of_tasks_are_refused(corpus, tmp_path):
    _, shards = steps(corpus, tmp_path / "shards")
    shards.run([Document("text", "0")], 0, 1)
    with pytest.raises(ValueError, match=r"holds 00000-of-00001\.bin, of another number of tasks than 2.*twice"):
        shards.run([Document("text", "0")], 0, 2)


def test_another_tokenizer_than_the_pipeline_was_made_with_is_refused(corpus, tmp_path):
    _, shards = steps(corpus, tmp_path / "shards")
    of_kind("byte").save(corpus / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer has become another tokenizer since"):
        shards.run([], 0, 1)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("folder", "tokenizer", "says"),
    [
        ("s3://bucket/shards", "tokenizer", "folder=s3://bucket/shards: give a folder"),
        ("shards", "hf://gpt2", "tokenizer=hf://gpt2: give a folder"),
        ("shards", "nowhere", "no tokenizer at nowhere"),
    ],
)
def test_what_tasks_could_not_use_is_refused_before_any_begins(folder, tokenizer, says):
    with pytest.raises(ValueError, match=says):
        TokenShards(folder, tokenizer)


def test_without_datatrove_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    monkeypatch.delitem(sys.modules, "gptlab.data.datatrove")
    with pytest.raises(ModuleNotFoundError, match=r'needs datatrove .*pip install "gptlab\[data\]"'):
        import gptlab.data.datatrove  # noqa: F401


def test_the_script_names_what_it_cannot_use():
    script = [sys.executable, "-m", "experiments.handoff.shards", "*.none", "--tokenizer", "x", "--output", "y"]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"error: data.files='*.none' matches no file here in {REPOSITORY}; check the folder and the ending"
    )


def test_shards_of_another_tokenizer_are_made_anew(corpus, tmp_path):
    execute(corpus, tmp_path / "shards")
    logs = tmp_path / "shards/logs"
    assert TokenShards(tmp_path / "shards", corpus / "tokenizer").forget_lost(logs, TASKS) == []
    ByteTokenizer().save(tmp_path / "other")
    assert TokenShards(tmp_path / "shards", tmp_path / "other").forget_lost(logs, TASKS) == list(range(TASKS))


def test_text_that_has_changed_or_is_read_otherwise_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n')
    ByteTokenizer().save(tmp_path / "tokenizer")
    shards = TokenShards(tmp_path / "shards", tmp_path / "tokenizer")
    (tmp_path / "shards").mkdir()
    for _ in range(2):
        assert shards.forget_lost(tmp_path / "logs", 1, TextFiles(str(path))) == [0]
    with pytest.raises(ValueError, match="read otherwise"):
        shards.forget_lost(tmp_path / "logs", 1, TextFiles(str(path), Reading(field="body")))
    path.write_text('{"text": "one", "body": "two"}\n{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"before it changed.*inputs\.json"):
        shards.forget_lost(tmp_path / "logs", 1, TextFiles(str(path)))
    (tmp_path / "shards/inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs\.json: damaged"):
        shards.forget_lost(tmp_path / "logs", 1, TextFiles(str(path)))
