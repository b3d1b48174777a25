"""Signals while a process ends: whenever they come, the exit code is the one that the README promises."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import SMALL

from gptlab import checkpoint, doors
from gptlab.signals import SIGNALS, Interrupted, later


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_after_the_run_is_saved_end_it_with_a_code_of_the_contract(tmp_path, text_file, signum, code):
    """However many come while it ends: none of them kills it, and the record is whole."""
    part = tmp_path / "part"
    options = (*SMALL, "trainer.max_steps=1000000", "log.every_steps=50", f"data.files={text_file}", f"run_dir={part}")
    process = subprocess.Popen([sys.executable, "-m", "gptlab.train", *options], stdout=subprocess.PIPE, text=True)
    try:
        while not (part / "metrics.csv").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signum)
        line = next(line for line in process.stdout if line.startswith("interrupted"))
        while process.poll() is None:
            process.send_signal(signum)
            time.sleep(0.002)
        assert process.stdout.read() == f"run: {part}\n"
    finally:
        process.kill()
        process.stdout.close()
    assert process.returncode == code
    step = int(line.split("saved at step ")[1].split(";")[0].replace(",", ""))
    assert checkpoint.load(part / "checkpoints/last.ckpt")["global_step"] == step
    for file in ("status.json", "result.json"):
        assert json.loads((part / file).read_text())["status"] == "interrupted"


def test_a_signal_that_comes_meanwhile_is_not_lost():
    before = {number: signal.signal(number, doors.interrupt) for number in SIGNALS}
    done = []

    def busy() -> None:
        with later():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    try:
        with pytest.raises(Interrupted) as heard:
            busy()
        assert (done, heard.value.exit_code) == ([True], 143)
        assert {signal.getsignal(number) for number in SIGNALS} == {doors.interrupt}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
