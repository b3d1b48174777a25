"""What the tests share: a small text, a small model, and running doors in this process or in another."""

import atexit
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The networks here are small: a second thread costs more than it brings, here and in the processes started from here.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent
# A run that takes a second: a two-layer network on bytes, without compiling.
SMALL = (
    *("trainer=cpu", "trainer.precision=32-true", "compile=false", "tokenizer=byte", "logger=csv"),
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=16", "data.batch_size=4"),
    *("samples.every_steps=null", "validation.every_steps=null", "log.every_steps=1", "schedule.warmup_steps=2"),
)


def prose(words: int, seed: int = 0) -> str:
    """Text with something to learn: sentences of a small vocabulary."""
    rng = random.Random(seed)
    vocabulary = "the a cat dog bird sees hears likes old young quick red blue house tree and or runs sleeps".split()
    sentences = []
    while words > 0:
        length = rng.randint(4, 9)
        sentences.append(" ".join(rng.choices(vocabulary, k=length)).capitalize() + ".")
        words -= length
    return "\n".join(sentences) + "\n"


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_folders(_session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in a folder of their own, with a cache of the session, and see no data of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(_session_cache))
    monkeypatch.delenv("GPTLAB_DATA_DIR", raising=False)
    monkeypatch.delenv("GPTLAB_DEBUG", raising=False)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose(800))
    return path


def compose(*overrides: str, config_name: str = "train") -> dict:
    """The plain config that the command line `overrides` makes."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from gptlab import config, dial, mixing

    config.register()
    config.after_composing(mixing.write_out, dial.apply)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        return config.plain(hydra_compose(config_name, list(overrides)))


@pytest.fixture
def train(text_file: Path) -> Callable[..., int]:
    """Train in this process: `train(run_dir, *overrides)` gives the exit code."""

    def run(run_dir: Path, *overrides: str) -> int:
        from gptlab import checks, config, doors
        from gptlab.given import strip_key
        from gptlab.train import train as train_door

        doors.quiet()
        cfg = compose(*SMALL, f"data.files={text_file}", *overrides)
        checks.check_targets(cfg, config.trusted(cfg))
        keys = {strip_key(override): override for override in overrides}
        if cfg["resume"] is None:
            cfg["run_dir"] = str(run_dir)
        return train_door(cfg, keys, "test")

    return run


# Importing torch and Lightning takes longer than most runs here. A door is a fork of a process that has imported them,
# and nothing of gptlab; what is about signals, and what doors start themselves, are interpreters of their own.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["lightning.pytorch", "hydra", "tensorboard", "typeguard", "rich.table", "pooch"])


def door(*arguments: str, cwd: Path | None = None, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """Run `python -m gptlab.<arguments>` as a user would."""
    with tempfile.TemporaryDirectory() as written:
        output, errors = Path(written, "output"), Path(written, "errors")
        process = WARM.Process(
            target=_enter, args=(arguments, os.environ | env, str(cwd or Path.cwd()), output, errors)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout, output.read_text(), errors.read_text())
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())


def _enter(arguments: tuple[str, ...], env: dict[str, str], cwd: str, *written: Path) -> None:
    """What a fork does to become `python -m gptlab.<arguments>`."""
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = ["-m", *arguments[1:]]
    try:
        runpy.run_module(f"gptlab.{arguments[0]}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[str]], int]]:
    """`composed(*arguments)` gives the commands of a sweep's jobs, and its exit code, without running the jobs.

    What a job comes to is the next of `codes`, or what `ends(job)` returns, which may leave a result as a job would.
    """
    import gptlab.train
    from gptlab.jobs import Job, Runner

    def run(
        *arguments: str, codes: tuple[int, ...] = (), ends: Callable[[Job], int] | None = None
    ) -> tuple[list[list[str]], int]:
        commands: list[list[str]] = []
        left = list(codes)

        def exit_code_of(self: Runner, job: Job, said: list[str]) -> int:
            commands.append(job.command[3:])
            if ends is not None:
                return ends(job)
            return left.pop(0) if left else 0

        monkeypatch.setattr(Runner, "exit_code_of", exit_code_of)
        monkeypatch.setattr("sys.argv", ["train.py", "-m", *arguments])
        with pytest.raises(SystemExit) as exit_:
            gptlab.train.main()
        return commands, exit_.value.code

    return run
