"""Every command of the README and of the experiments' notes runs, long ones with fewer steps."""

import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, door, prose

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TOUR = [row for block in BLOCKS[2:] for row in block.strip().splitlines()]
FEW = ("trainer.max_steps=3", "compile=false", "samples.max_tokens=5", "data.batch_size=4", "model.block_size=32")
SMALLER = ("model.n_layer=2", "model.n_embd=32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's paths mean, and small texts where downloads would be."""
    (tmp_path / "gptlab").mkdir()
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    shutil.copy(REPOSITORY / "gptlab/model.py", tmp_path / "gptlab")
    data = tmp_path / "downloads"
    (data / "gutenberg").mkdir(parents=True)
    for name in ("shakespeare.txt", "gutenberg/pg1342.txt", "gutenberg/pg11.txt", "gutenberg/pg2000.txt"):
        (data / name).write_text(prose(4000, seed=len(name)))
    (data / "TinyStories-train.txt").write_text("\n<|endoftext|>\n".join(prose(60, seed=seed) for seed in range(150)))
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(data))
    return tmp_path


def run(command: str, folder: Path, *more: str) -> str:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    done = door(words[2].removeprefix("gptlab."), *words[3:], *more, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def serve(command: str, folder: Path) -> None:
    """The command listens, answers, and ends when it is told to."""
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('gptlab.serve', None, '__main__')"
    )
    words = [sys.executable, "-c", program, str(REPOSITORY), *shlex.split(command)[3:], "--port", "0"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        with urllib.request.urlopen(f"{line.partition('API: ')[2].partition(')')[0]}/models", timeout=60) as answer:
            assert b'"id":"first"' in answer.read()
        process.terminate()
        assert process.wait(60) == 143


def paced(command: str) -> Any:
    """The command as a parameter, slow if it is: each job of a sweep starts anew, and this one has six."""
    return pytest.param(command, marks=pytest.mark.slow) if "seed=1,2,3" in command else command


LINKED = re.compile("resume=|run_dir=|runs/|exported")  # rows of several that go together


@pytest.mark.parametrize("command", [paced(row) for row in TOUR if not LINKED.search(row)])
def test_tour(command, folder):
    options = () if "gptlab.prepare" in command else (*FEW, *(() if "model." in command else SMALLER))
    if "experiments=" in command:  # the vocabulary of the experiment is too large for the small text
        options = (*options, "tokenizer=char")
    output = run(command, folder, *options)
    if "gptlab.train" in command and " -m " not in command.split("gptlab.train")[1]:
        assert output.splitlines()[-1].startswith("run: ")


def test_stop_and_go_on_and_use_what_was_trained(folder):
    first, second, *others = (row for row in TOUR if "runs/first" in row)
    small = ("compile=false", "data.batch_size=4", *SMALLER)
    run(first, folder, *small)
    assert "at step 40" in run(second, folder)
    for command in others:
        (serve if "gptlab.serve" in command else run)(command, folder)


def test_export_and_start_from_it(folder):
    train, export, again = (row for row in TOUR if "exported" in row)
    run(train, folder, "compile=false", "data.batch_size=4", *SMALLER[:1])
    assert run(export, folder).splitlines()[-1] == f"exported: {folder}/exported"
    assert "run: " in run(again, folder, "compile=false", "data.batch_size=4")


def test_every_test_that_the_page_on_reliability_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (REPOSITORY / "docs/reliability.md").read_text())
    assert len(named) > 25
    for file, name in named:
        assert re.search(rf"^def {name}\(", (REPOSITORY / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "experiments").glob("*.yaml")))
def test_every_experiment_runs(name, folder):
    note = (REPOSITORY / "experiments" / name / "README.md").read_text()
    commands = [row for row in re.findall(r"^python -m .*$", note, re.MULTILINE) if f"experiments={name}" in row]
    assert commands
    smaller = ("tokenizer.vocab_size=330", "trainer=cpu") if name in ("gutenberg", "tinystories") else ()
    alone = (
        ("hydra.mode=RUN", "model.n_head=2") if name == "ladder" else ()
    )  # one of its runs; all of them: test_ladder.py
    output = run(commands[0], folder, *FEW, *SMALLER, *smaller, *alone)
    assert output.splitlines()[-1].startswith("run: ")


def test_links_and_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (REPOSITORY / target).exists(), target


@pytest.mark.slow
def test_the_wheel_carries_configs_and_experiments_and_runs_anywhere(tmp_path):
    """Built, unpacked into a folder of its own, and used from another, without the checkout."""
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info", "dist")
    )
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "import gptlab; assert 'site/gptlab' in gptlab.__file__; "
        "sys.argv[0] = 'train'; runpy.run_module('gptlab.train', run_name='__main__', alter_sys=True)"
    )
    (elsewhere / "own.txt").write_text(prose(3000))
    small = [*FEW, *SMALLER, "tokenizer=byte", "data.files=own.txt", "experiments=sliding_window", "data.stride=16"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(site), *small],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (site / "gptlab/conf/train.yaml").exists()
    assert list(elsewhere.glob("runs/*/*-sliding_window/checkpoints/last.ckpt"))


def test_nothing_is_left_to_be_filled_in():
    pages = [
        REPOSITORY / "README.md",
        *(REPOSITORY / "experiments").glob("*/README.md"),
        *(REPOSITORY / "docs").glob("*.md"),
    ]
    assert [str(page) for page in pages if re.search(r"@[A-Z]+@", page.read_text())] == []
