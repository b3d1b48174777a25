"""What a training step costs beside a bare loop of the same network: `python benchmarks/overhead.py [--shape small]`.

Each contender trains the same shape on the same token file in turns, several times over; the table gives the median
time of a step and its ratio to the first. The bare loop is eager float32 with torch's AdamW and clipping, no Lightning,
no logging, no callbacks; the others add one thing each; the last two are `python -m gptlab.train` itself.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gptlab.losses import token_nll
from gptlab.model import GPT, GPTConfig

SHAPES = {  # n_layer, n_head, n_embd, block_size, batch_size
    "small": (4, 4, 128, 64, 12),
    "tiny": (4, 4, 256, 128, 32),
    "baby": (6, 6, 384, 256, 16),
}
VOCABULARY = 269  # bytes


def config_of(shape: str) -> tuple[GPTConfig, int]:
    n_layer, n_head, n_embd, block_size, batch_size = SHAPES[shape]
    return GPTConfig(VOCABULARY, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size), batch_size


def bare_loop(shape: str, steps: int, bf16: bool, compiled: bool) -> float:
    """Median seconds of a step."""
    torch.manual_seed(0)
    config, batch_size = config_of(shape)
    model, nll = GPT(config), token_nll
    if compiled:
        model.compile()
        nll = torch.compile(token_nll)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(13, VOCABULARY, 100_000))
    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        at = torch.randint(len(tokens) - config.block_size - 1, (batch_size, 1)) + torch.arange(config.block_size + 1)
        batch = tokens[at]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nll(model(batch[:, :-1]), batch[:, 1:]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def gptlab_run(shape: str, steps: int, folder: Path, more: str = "") -> float:
    """Median seconds of a step of the real command, from its result.json."""
    n_layer, n_head, n_embd, block_size, batch_size = SHAPES[shape]
    text, run_dir = folder / "text.txt", folder / f"run-{time.monotonic_ns()}"
    text.write_text("".join(chr(97 + byte % 26) for byte in np.random.default_rng(0).bytes(200_000)))
    shape_keys = f"model.n_layer={n_layer} model.n_head={n_head} model.n_embd={n_embd} model.block_size={block_size}"
    options = f"{shape_keys} data.batch_size={batch_size} tokenizer=byte optimizer=adamw compile=true"
    options += f" trainer.max_steps={steps}"
    options += f" data.files={text} run_dir={run_dir} validation.every_steps=100000 samples.every_steps=null"
    options += f" {more}"
    command = [sys.executable, "-m", "gptlab.train", *options.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((run_dir / "result.json").read_text())
    return batch_size * block_size / result["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shape, steps = arguments.shape, arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "bare loop, eager, float32": lambda: bare_loop(shape, steps, bf16=False, compiled=False),
            "+ bf16 autocast": lambda: bare_loop(shape, steps, bf16=True, compiled=False),
            "+ torch.compile": lambda: bare_loop(shape, steps, bf16=True, compiled=True),
            "gptlab.train (auto)": lambda: gptlab_run(shape, steps, Path(folder)),
            "  with callbacks=ema": lambda: gptlab_run(shape, steps, Path(folder), "callbacks=ema"),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, run in contenders.items():
                times[name].append(run())
    first = statistics.median(next(iter(times.values())))
    print(f"shape {shape}: {SHAPES[shape]}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:<28} {median * 1e3:8.2f} ms  {first / median:5.2f}x  (of {len(measured)} rounds)")


if __name__ == "__main__":
    main()
