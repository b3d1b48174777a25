"""The launchers by the real command: one folder, table and exit code wherever the jobs run, and an end when told."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL, door

from gptlab import jobs, launchers
from gptlab.jobs import Job, Runner

WORDS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": (
        *("hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.parameters.cpus_per_task=1"),
    ),
    "ray": ("hydra/launcher=ray",),
}


def needs(word: str):
    missing = importlib.util.find_spec(word) is None
    return pytest.param(word, marks=pytest.mark.skipif(missing, reason=f"{word} is not installed"))


@pytest.mark.slow
@pytest.mark.parametrize("word", [needs(word) for word in WORDS])
def test_failures_are_told_and_hide_no_other_job(word, text_file, tmp_path):
    swept = tmp_path / "swept"
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=4", f"run_dir={swept}")
    run = door("train", "-m", *options, *WORDS[word], "optimizer.lr=-1,0.001", timeout=200)
    assert run.returncode == 1, run.stderr
    assert {number: job["exit_code"] for number, job in jobs.records(swept).items()} == {0: 2, 1: 0}
    assert json.loads((swept / "1_lr-0.001/result.json").read_text())["steps"] == 4
    table = run.stdout[run.stdout.rindex("val/loss") :]
    for text in ("bad input", "completed", "job 0: optimizer.lr=-1"):
        assert text in table
    before = (run.stdout + run.stderr).removesuffix(table)
    assert "optimizer.lr=-1 must be 0 or more" in before, "told when it happens"
    if word == "submitit":
        assert re.search(rf"job 0: exit code 2: optimizer.lr=-1 .* \(log: {swept}/\.submitit/\S+\.err\)", before)
        assert "job 1: ended well" in before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "signum", "code"),
    [(needs(word).values[0], *end) for word, end in zip(WORDS, [(2, 130), (15, 143), (2, 130)], strict=True)],
)
def test_signal_lets_every_job_save_and_starts_no_other(word, signum, code, text_file, tmp_path):
    if importlib.util.find_spec(word) is None:
        pytest.skip(f"{word} is not installed")
    swept = tmp_path / "swept"
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=1000000", "log.every_steps=20", "seed=1,2")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", "-m", *options, *WORDS[word], f"run_dir={swept}"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while len(list(swept.glob("*/metrics.csv"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)  # as a terminal does
        else:
            process.send_signal(signum)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == code
    assert [job["exit_code"] for job in jobs.records(swept).values()] == [code, code]
    for status in swept.glob("*/status.json"):
        assert json.loads(status.read_text())["status"] == "interrupted"
        assert (status.parent / "checkpoints/last.ckpt").exists()
    assert f"run_dir={swept} resume=auto" in output[output.rindex("val/loss") :]
    assert not (swept / ".stop").exists()


def test_missing_package_is_named_with_the_extra(composed, tmp_path, capfd, monkeypatch):
    for word in (*(f"hydra/launcher={word}" for word in WORDS), "hydra/sweeper=optuna"):
        monkeypatch.setitem(sys.modules, word.partition("=")[2], None)
        assert composed(word, "seed=1,2", f"run_dir={tmp_path}/swept") == ([], 2)
        message = capfd.readouterr().err
        assert message.startswith(f"error: {word} is not installed")
        assert 'pip install "gptlab[sweep]"' in message
    assert not (tmp_path / "swept").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("hydra/launcher=jobl",), ("hydra/launcher=jobl", "'joblib'", "submitit")),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=two"), ("hydra.launcher.n_jobs='two'", "a whole number")),
        (("hydra/launcher=joblib", "hydra.launcher.n_job=2"), ("hydra.launcher.n_job", "no such key")),
        (("hydra/launcher=submitit", "hydra.launcher.cluster=lokal"), ("hydra.launcher.cluster=lokal",)),
        (
            ("hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.parameters.timeout_min=0.5"),
            ("timeout_min", "0.5"),
        ),
    ],
)
def test_wrong_values_are_named(options, says, composed, tmp_path, capfd):
    for word in ("joblib", "submitit"):
        pytest.importorskip(word)
    assert composed(*options, "seed=1,2", f"run_dir={tmp_path}/swept") == ([], 2)
    message = capfd.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for word in says:
        assert word in message


def test_jobs_of_joblib_share_the_threads(composed, tmp_path, monkeypatch):
    pytest.importorskip("joblib")
    given: list[Job] = []

    def threads(number: int, n_jobs: int, omp: int | None) -> set[int | None]:
        given.clear()
        if omp is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", str(omp))
        options = (f"hydra.launcher.n_jobs={n_jobs}", f"run_dir={tmp_path}/{number}", "seed=1,2,3")
        assert composed("hydra/launcher=joblib", *options, ends=lambda job: given.append(job) or 0)[1] == 0
        return {job.threads for job in given}

    monkeypatch.setattr(launchers, "processors", lambda: 12)
    assert threads(0, n_jobs=2, omp=None) == {6}
    assert threads(1, n_jobs=-1, omp=None) == {4}  # three jobs, no more
    assert threads(2, n_jobs=2, omp=4) == {2}
    assert threads(3, n_jobs=3, omp=1) == {1}
    monkeypatch.setattr(jobs, "processors", lambda: 12)
    env = jobs.environment(replace(given[0], threads=5))
    assert {env[name] for name in jobs.THREADS} == {"5"}
    monkeypatch.setattr(jobs, "processors", lambda: 2)
    assert jobs.environment(replace(given[0], threads=5))["OMP_NUM_THREADS"] == "2"


class Shell(Job):
    """A job that is a line of shell."""

    @property
    def command(self) -> list[str]:
        return ["sh", "-c", self.overrides[0]]


def shell(folder: Path, line: str, **options) -> Shell:
    return Shell(0, "train", [line], [], str(folder / "run"), str(folder), cwd=str(folder), **options)


@pytest.mark.slow
def test_job_of_slurm_starts_its_own_ranks(tmp_path, monkeypatch):
    """Under SLURM's variables Lightning would wait for ranks that nobody starts."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "submitit")
    program = "from lightning.fabric.plugins.environments import SLURMEnvironment as S; raise SystemExit(S.detect())"
    line = f"{sys.executable} -c '{program}'"
    assert Runner()(shell(tmp_path, line))["exit_code"] == 1
    assert launchers.Requeued()(shell(tmp_path, line))["exit_code"] == 0


def test_what_a_job_leaves_behind_is_ended_with_it(tmp_path):
    """Ranks of a job that was killed would hold its GPU."""
    line = "sleep 300 & echo $! > left; exit 7"
    assert Runner()(shell(tmp_path, line))["exit_code"] == 7
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "left").read_text()), 0)


def test_job_waits_for_whoever_trains_in_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    program = "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True); time.sleep(3)"
    command = [sys.executable, "-c", program, str(tmp_path / "run/.lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    holder.stdout.read(1)
    assert Runner()(shell(tmp_path, "exit 0"))["exit_code"] == 0
    assert holder.wait(timeout=1) == 0


def test_nothing_starts_where_the_sweep_has_been_told_to_end(tmp_path):
    jobs.stop(tmp_path, signal.SIGTERM)
    assert Runner()(shell(tmp_path, "touch started")) is None
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
def test_job_ends_with_the_process_that_watches_it(tmp_path):
    program = (
        "import sys; from gptlab.jobs import Job, Runner; "
        "Runner()(Job(0, 'train', sys.argv[2:], [], sys.argv[1] + '/run', sys.argv[1], cwd=sys.argv[1]))"
    )
    text = tmp_path / "text.txt"
    text.write_text("A few words, many times over.\n" * 300)
    options = (*SMALL, f"data.files={text}", "trainer.max_steps=1000000")
    watcher = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), *options])
    metrics, status = tmp_path / "run/metrics.csv", tmp_path / "run/status.json"
    while not metrics.exists():
        assert watcher.poll() is None
        time.sleep(0.05)
    watcher.kill()
    watcher.wait()
    deadline = time.monotonic() + 60
    while json.loads(status.read_text())["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads(status.read_text())["status"] == "interrupted"


def write_some(folder: Path, number: int) -> None:
    for k in range(25):
        jobs.append(folder, {"job": 100 * number + k, "error": "x" * 3000})


def test_several_processes_write_sweep_jsonl_and_a_cut_off_line_costs_no_other(tmp_path):
    (tmp_path / "sweep.jsonl").write_text('{"job": 999, "exit_c')
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(write_some, [tmp_path] * 4, range(4)))
    assert sorted(jobs.records(tmp_path)) == sorted(100 * number + k for number in range(4) for k in range(25))
