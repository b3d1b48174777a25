"""What training holds in memory as the context grows, at a vocabulary of 50,257: `python benchmarks/memory.py`.

Each row is a process of its own: gptlab's task on one window of `block` tokens takes two training steps, then scores a
batch as validation does. Its network is 4 layers, 256 wide. On a CPU the figure is the peak of resident memory, on a
GPU that of torch's allocator. `start` is what is held before the first step: torch, weights. `more a token` is what the
peak grew by since the row above, over the tokens that came on top: it stays or falls where memory grows no faster than
linearly. One token's logits alone are 196 KB in float32.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from bare import random_batch, task_step
from turns import default_device, machine, markdown, reason

from gptlab.machine import peak_rss_mb
from gptlab.model import GPTConfig

VOCABULARY = 50_257


def held_mb(device: str) -> float:
    """The peak since this was last called."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    peak = peak_rss_mb()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from here on
    return peak


def one(block: int, device: str, compiled: bool, checkpointing: bool) -> dict[str, float]:
    """Megabytes held at the start, while training, and while validating."""
    config = GPTConfig(VOCABULARY, block_size=block, checkpointing=checkpointing)
    task, step = task_step(config, 1, device, compiled)
    figures = {"start": held_mb(device)}
    for _ in range(2):
        step()
    figures["train"] = held_mb(device)
    tokens, targets = random_batch(config, 1, device)
    targets = targets % task.tokenizer.vocab_size  # those that it knows the bytes of
    batch = {"tokens": tokens, "targets": targets, "loss_mask": torch.ones_like(targets, dtype=torch.bool)}
    task.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        task.validation_step(batch, 0)
    return figures | {"validation": held_mb(device)}


def measure(block: int, arguments: argparse.Namespace, checkpointing: bool) -> dict[str, float]:
    """`one`, in a process of its own. Raises ValueError with what it said if it fails."""
    own = {"block": block, "device": arguments.device, "compiled": arguments.compile, "checkpointing": checkpointing}
    command = [sys.executable, __file__, "--one", json.dumps(own)]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"block {block}: {reason(error)}") from error
    return json.loads(done.stdout.splitlines()[-1])


def show(blocks: list[int], arguments: argparse.Namespace, checkpointing: bool) -> str:
    rows: list[tuple[object, ...]] = []
    before: tuple[int, dict[str, float]] | None = None
    for block in blocks:
        figures = measure(block, arguments, checkpointing)
        print(f"  block {block}: {figures}", file=sys.stderr, flush=True)
        cells = []
        for side in ("train", "validation"):
            cells.append(f"{figures[side]:,.0f}")
            if before is None:
                cells += ["", ""]
                continue
            more = (figures[side] - before[1][side]) / (block - before[0]) * 1024
            cells += [f"{figures[side] / before[1][side]:.2f}x", f"{more:,.0f}"]
        rows.append((block, f"{figures['start']:,.0f}", *cells))
        before = block, figures
    side = ("growth", "more a token, KB")
    return markdown(" | ".join(("block", "start, MB", "training, MB", *side, "validation, MB", *side)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both", help="model.checkpointing")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(**json.loads(arguments.one))))
        return
    print(f"{machine(arguments.device)}, {'compiled' if arguments.compile else 'eager'}", flush=True)
    for on in {"both": (False, True), "on": (True,), "off": (False,)}[arguments.checkpointing]:
        print(f"\nmodel.checkpointing={str(on).lower()}\n\n{show(arguments.blocks, arguments, on)}", flush=True)


if __name__ == "__main__":
    main()
