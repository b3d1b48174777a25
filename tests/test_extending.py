"""docs/extending.md, followed to the letter from an empty folder."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SMALL, door, prose

PAGE = (REPOSITORY / "docs/extending.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`((?:experiments|conf)/[\w/]+\.(?:py|yaml))`")
COMMANDS = re.findall(r"^python -m gptlab\.train .*$", PAGE, re.MULTILINE)
QUICK = tuple(option for option in SMALL if not option.startswith(("schedule.", "trainer=")))


def files_of_the_page() -> dict[str, str]:
    """Each code block that a file name introduces."""
    files, end = {}, 0
    for block in BLOCK.finditer(PAGE):
        if (names := NAME.findall(PAGE[end : block.start()])) and block[1] in ("python", "yaml"):
            files[names[-1]] = block[2]
        end = block.end()
    return files


@pytest.fixture
def folder(tmp_path):
    """A user's folder with every file that the page shows, and some fables."""
    files = files_of_the_page()
    assert len(files) == 9, list(files)
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "fables.txt").write_text(prose(3000))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_recipe_trains(command, folder):
    *python, name = shlex.split(command)[:3]
    assert python == ["python", "-m"], command
    options = [*QUICK, "trainer.max_steps=3", "run_dir=run"]
    if "data=" not in command and "experiments=mine" not in command.split("attention=")[0]:
        options.append("data.files=fables.txt")
    done = door(name.removeprefix("gptlab."), *shlex.split(command)[3:], *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "run/checkpoints/last.ckpt").exists()


def test_from_python(folder):
    program = PAGE.split("## From Python")[1].split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("tensor(")
