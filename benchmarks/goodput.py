"""How much of the time of a run that is killed again and again goes into steps that stay."""

import subprocess
import sys
import time
from pathlib import Path

import torch


def goodput(minutes: float, every_s: float, overrides: list[str], folder: Path) -> None:
    """The time that went into steps which stayed, over all of it, in a run killed every `every_s` seconds."""
    run, start, killed = folder / "run", time.monotonic(), 0
    options = ["trainer.max_steps=1000000", "checkpoint.every_steps=10", "checkpoint.background=true", *overrides]
    while (left := minutes * 60 - (time.monotonic() - start)) > 0:
        given = [f"resume={run}"] if (run / "config.yaml").exists() else [*options, f"run_dir={run}"]
        with open(folder / "log", "w") as log:
            session = subprocess.Popen([sys.executable, "-m", "gptlab.train", *given], stdout=log, stderr=log)
        try:
            code = session.wait(timeout=min(left, every_s))
            raise RuntimeError(f"the run ended by itself with {code}:\n{(folder / 'log').read_text()[-2000:]}")
        except subprocess.TimeoutExpired:
            session.kill()
            session.wait()
            killed += 1
    elapsed = time.monotonic() - start
    if not (run / "checkpoints/last.ckpt").exists():
        raise RuntimeError(f"no checkpoint within {every_s:g} s of a start: kill less often")
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    useful, step = state["callbacks"]["Budget"]["seconds"], state["global_step"]
    print(f"{killed} kills, one every {every_s:g} s, in {elapsed:.0f} s: {step:,} steps stayed")
    print(f"goodput: {useful:.0f} s in those steps and their validations, of {elapsed:.0f} s: {useful / elapsed:.1%}")
    print(f"the rest, {(elapsed - useful) / killed:.1f} s a kill: starting anew, and steps taken again")
