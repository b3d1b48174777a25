"""Sweeps by the real command: a process and a folder for each job, every failure in sight, and an end when told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, door
from filelock import FileLock

from gptlab import jobs, sweep


def results(folder: Path) -> dict[str, str]:
    """The status that each job's folder tells."""
    return {path.parent.name: json.loads(path.read_text())["status"] for path in sorted(folder.glob("*/status.json"))}


def test_failures_are_told_and_hide_no_other_job(text_file, tmp_path):
    swept = tmp_path / "swept"
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=4", f"run_dir={swept}", "schedule.warmup_steps=0")
    run = door("train", "-m", *options, "optimizer.lr=-1,1e30,0.001")
    assert run.returncode == 1, run.stderr
    jobs = [json.loads(line) for line in (swept / "sweep.jsonl").read_text().splitlines()]
    assert [job["exit_code"] for job in jobs] == [2, 1, 0]
    assert [job["job"] for job in jobs] == [0, 1, 2]
    folders = [Path(job["run_dir"]) for job in jobs]
    assert [folder.parent for folder in folders] == [swept] * 3
    assert results(swept) == {folders[1].name: "failed", folders[2].name: "completed"}
    pids = {json.loads((folder / "status.json").read_text())["pid"] for folder in folders[1:]}
    assert len(pids) == 2
    assert json.loads((folders[2] / "result.json").read_text())["steps"] == 4
    assert run.stderr.count("error: ") == 2
    assert "optimizer.lr=-1" in run.stderr
    assert "NaN or infinite" in run.stderr
    assert "Traceback" not in run.stderr
    table = run.stdout[run.stdout.rindex("val/loss") :]
    for word in ("completed", "failed", "bad input", "job 0: optimizer.lr=-1", "job 1: the loss"):
        assert word in table
    assert [bool(job["error"]) for job in jobs] == [True, True, False]


def test_signal_to_a_job_that_is_still_starting_ends_the_sweep(text_file, tmp_path):
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=2", "seed=1,2", f"run_dir={tmp_path}/swept")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", "-m", *options], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout.readline().startswith("job 0")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert len((tmp_path / "swept/sweep.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_job_that_runs_and_starts_no_other(text_file, tmp_path, train, signum, code):
    swept = tmp_path / "swept"
    options = (*SMALL, f"data.files={text_file}", "trainer.max_steps=1000000", "log.every_steps=20", "seed=1,2")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", "-m", *options, f"run_dir={swept}"], stdout=subprocess.PIPE, text=True
    )
    try:
        while not list(swept.glob("*/metrics.csv")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert list(results(swept).values()) == ["interrupted"]
    assert "interrupted" in output[output.index("sweep") :]
    (job,) = [json.loads(line) for line in (swept / "sweep.jsonl").read_text().splitlines()]
    run = Path(job["run_dir"])
    step = json.loads((run / "status.json").read_text())["step"]
    assert train(run, f"resume={run}", f"trainer.max_steps={step + 2}") == 0
    assert results(swept) == {run.name: "completed"}


def test_glob_of_experiments_makes_a_job_of_each(composed, tmp_path):
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name in ("aa_one", "aa_two"):
        (folder / f"{name}.yaml").write_text("# @package _global_\nseed: 7\n")
    commands, code = composed("experiments=glob(aa_*)", f"run_dir={tmp_path}/a")
    assert code == 0
    assert [command[0] for command in commands] == ["experiments=aa_one", "experiments=aa_two"]
    assert all(command[-1].startswith("run_dir=") for command in commands)
    commands, _ = composed("experiments=glob(*)", f"run_dir={tmp_path}/b")
    assert {"experiments=aa_one", "experiments=aa_two"} <= {command[0] for command in commands}


def test_folder_of_a_sweep_has_its_date_and_time(composed, tmp_path):
    commands, _ = composed("seed=1,2", "model=tiny,small")
    assert len(commands) == 4
    for number, command in enumerate(commands):
        path = Path(command[-1].removeprefix("run_dir=").strip("'"))
        place = path.relative_to(tmp_path)
        assert re.fullmatch(r"runs/sweeps/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d/" + re.escape(path.name), str(place))
        assert path.name.startswith(f"{number}_seed-")
    assert len({command[-1] for command in commands}) == 4
    assert len(list((tmp_path / "runs/sweeps").glob("*/*/sweep.jsonl"))) == 1


def test_exit_code_of_a_sweep_tells_the_worst(composed, tmp_path):
    assert composed("seed=1,2,3", f"run_dir={tmp_path}/a", codes=(0, 0, 0))[1] == 0
    assert composed("seed=1,2,3", f"run_dir={tmp_path}/b", codes=(0, 1, 0))[1] == 1
    commands, code = composed("seed=1,2,3", f"run_dir={tmp_path}/c", codes=(0, 143, 0))
    assert (len(commands), code) == (2, 143)
    jobs = (tmp_path / "c/sweep.jsonl").read_text().splitlines()
    assert [json.loads(job)["exit_code"] for job in jobs] == [0, 143]


def history(run: Path) -> dict:
    """What a run came to, without what a clock or a place has to do with."""
    result = json.loads((run / "result.json").read_text())
    rows = [(row["step"], row["train_loss"], row["val_loss"]) for row in result["history"]]
    return {key: result[key] for key in ("status", "steps", "val_loss", "best_val_loss", "best_step")} | {"rows": rows}


@pytest.mark.slow
def test_killed_sweep_goes_on_where_it_was_and_equals_one_that_was_not(text_file, tmp_path):
    steps = ("trainer.max_steps=200", "log.every_steps=50", "validation.every_steps=50", "checkpoint.every_steps=20")
    options = ("-m", *SMALL, *steps, f"data.files={text_file}", "seed=1,2,3")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert door("train", *options, f"run_dir={whole}").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", *options, f"run_dir={broken}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (broken / "1_seed-2/checkpoints/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (broken / "0_seed-1/result.json").read_bytes()
    again = door("train", *options, f"run_dir={broken}", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "job 0: seed=1: done before" in again.stdout
    assert "continuing from" in again.stdout
    assert (broken / "0_seed-1/result.json").read_bytes() == first
    names = ["0_seed-1", "1_seed-2", "2_seed-3"]
    assert sorted(path.name for path in broken.iterdir() if path.is_dir()) == names
    assert [history(broken / name) for name in names] == [history(whole / name) for name in names]
    assert [(number, job["exit_code"]) for number, job in jobs.records(broken).items()] == [(0, 0), (1, 0), (2, 0)]
    assert len((broken / "sweep.jsonl").read_text().splitlines()) == 3
    table = again.stdout[again.stdout.rindex("val/loss") :]
    assert [name for name in names if name in table] == names


def test_what_a_sweep_is_told_of_its_folder(composed, tmp_path, capfd):
    def refused(*arguments: str) -> str:
        commands, code = composed("seed=1,2", *arguments)
        assert (commands, code) == ([], 2)
        return capfd.readouterr().err

    swept = tmp_path / "swept"
    assert composed("seed=1,2", f"run_dir={swept}")[1] == 0
    message = refused(f"run_dir={swept}")
    assert "resume=auto" in message
    assert "choose another" in message
    assert "run_dir=<its folder>" in refused("resume=auto")
    assert "resume=auto with run_dir=<its folder>" in refused("resume=runs/a", f"run_dir={swept}")
    assert "takes one value" in refused("resume=auto,runs/a", f"run_dir={swept}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    assert "holds no sweep" in refused("resume=auto", f"run_dir={tmp_path}/other")
    with FileLock(swept / ".lock"):
        assert "in use" in refused("resume=auto", f"run_dir={swept}")


def finished(job: jobs.Job) -> int:
    Path(job.run_dir).mkdir(exist_ok=True)
    (Path(job.run_dir) / "result.json").write_text('{"status": "completed", "val_loss": 1.0, "steps": 3}')
    return 0


def test_only_what_is_not_done_runs_again(composed, tmp_path):
    """What failed is tried again, what is missing is run, and what now differs in a value too."""
    place = (f"run_dir={tmp_path}/swept", "resume=auto")

    def ran(*arguments: str, ends=finished) -> list[str]:
        return [command[-2].rpartition("/")[2].strip("'") for command in composed(*arguments, *place, ends=ends)[0]]

    assert ran("seed=1,2", ends=lambda job: 1 if "seed=1" in job.varied else finished(job)) == ["0_seed-1", "1_seed-2"]
    assert ran("seed=1,2") == ["0_seed-1"]
    assert ran("seed=1,2") == []
    assert ran("seed=1,2,3") == ["2_seed-3"]
    assert ran("seed=1,2,3", "trainer.max_steps=9") == ["0_seed-1", "1_seed-2", "2_seed-3"]
    (tmp_path / "swept/1_seed-2/result.json").unlink()
    assert ran("seed=1,2,3", "trainer.max_steps=9") == ["1_seed-2"]


def test_another_sweep_in_the_same_folder_is_refused_naming_both(composed, tmp_path, capfd):
    swept = tmp_path / "swept"
    place = (f"run_dir={swept}", "resume=auto")

    def refused(*arguments: str) -> bool:
        before = {path.name: path.read_bytes() for path in swept.iterdir() if path.is_file()}
        commands, code = composed(*arguments, *place, ends=finished)
        after = {path.name: path.read_bytes() for path in swept.iterdir() if path.is_file()}
        message = capfd.readouterr().err
        if code == 2:
            assert before == after
            assert commands == []
            for word in ("holds another sweep, of optimizer.lr=1e-3,1e-2 seed=1,2", *arguments, "another folder"):
                assert word in message
        return code == 2

    lr = "optimizer.lr=1e-3,1e-2"
    assert composed(lr, "seed=1,2", *place, ends=finished)[1] == 0
    assert refused("optimizer=adamw,muon")
    assert refused("seed=1,2")
    assert refused(lr)
    assert refused(lr, "seed=1,2,3")  # job 2 would be another
    assert refused("seed=1,2", lr)
    assert not refused(lr, "seed=1,2")
    assert not refused("optimizer.lr=1e-3,1e-2,1e-1", "seed=1,2")
    assert sorted(jobs.records(swept)) == [0, 1, 2, 3, 4, 5]


def test_jobs_that_were_not_begun_are_counted_and_one_that_was_importing_was_interrupted(composed, tmp_path, capfd):
    commands, code = composed("seed=1,2,3,4", f"run_dir={tmp_path}/swept", codes=(0, 130))
    assert (len(commands), code) == (2, 130)
    output = capfd.readouterr().out
    (row,) = [line for line in output.splitlines() if line.startswith("│ 1 ")]
    assert "interrupted" in row
    assert "exit code 130" not in output
    assert "\n2 jobs not begun\n" in output
    composed("seed=1,2", f"run_dir={tmp_path}/other")
    assert "not begun" not in capfd.readouterr().out


def test_wrong_word_in_a_sweep_is_bad_input(composed, tmp_path, capfd):
    commands, code = composed("model=tiny,tinny", f"run_dir={tmp_path}/swept")
    message = capfd.readouterr().err
    assert code == 2
    assert message.startswith("error: model=tinny: ")
    assert "'tiny'" in message
    assert "Traceback" not in message
    assert len(commands) <= 1


def test_what_a_job_writes_to_standard_error_may_be_any_bytes(tmp_path):
    program = "import os; os.write(2, b'\\xe9' * 300_000 + b'\\nerror: the end\\n')"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, errors="replace", bufsize=1
    )
    said: list[str] = []
    jobs.repeat(process.stderr, sys.stderr, "", said)
    assert process.wait(timeout=20) == 0
    assert jobs.error_in(said) == "the end"


def test_what_varies_is_what_has_several_values():
    """However Hydra writes a value anew: compile=False for false, 0.001 for 1e-3, no quotes, none for null."""
    fixed = (
        "-m",
        "compile=false",
        "optimizer.eps=1e-3",
        "data.files='[a.txt,b c.txt]'",
        "trust=null",
        "--config-dir",
        "x",
    )
    varied = (
        "model.n_kv_head=null,2",
        "optimizer.lr=1e-3,2e-3",
        "seed=range(1,4)",
        "experiments=glob(*)",
        "+x=choice(1,2)",
    )
    assert sweep.swept_keys([*fixed, *varied]) == {override.split("=")[0].strip("+") for override in varied}


def test_names_of_jobs_differ_and_are_good_file_names():
    names = [sweep.job_name(n, [f"data.files='{'x' * 100}/a b.txt'", f"seed={n}"]) for n in range(12)]
    assert len(set(names)) == 12
    assert all(len(name) <= 80 and os.sep not in name and " " not in name and "'" not in name for name in names)
    assert sweep.job_name(3, ["model=tiny", "seed=2"]) == "3_model-tiny_seed-2"
