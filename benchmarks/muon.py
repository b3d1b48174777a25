"""What a step of the optimizer costs: AdamW, torch's Muon (matrices alone) and gptlab's, on random gradients.

`python benchmarks/muon.py` prints milliseconds a step and the ratio to AdamW; the contenders take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from gptlab.machine import keep_freed_memory
from gptlab.model import GPT, GPTConfig
from gptlab.optim import Muon, parameter_groups

SIZES = {"tiny": (4, 4, 256), "small": (8, 8, 512), "medium": (12, 12, 768)}


def torch_muon(model: GPT) -> torch.optim.Optimizer:
    matrices = next(group for group in parameter_groups(model) if group["kind"] == "matrix")
    return torch.optim.Muon([matrices], lr=1e-3, adjust_lr_fn="match_rms_adamw")


CONTENDERS: dict[str, Callable[[GPT], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda model: torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=True),
    "torch.optim.Muon": torch_muon,
    "gptlab.optim.Muon": lambda model: Muon(
        parameter_groups(model), lr=1e-3, weight_decay=0.1, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, width=None
    ),
}


def seconds_a_step(make: Callable[[GPT], torch.optim.Optimizer], config: GPTConfig, device: str, steps: int) -> float:
    torch.manual_seed(0)
    model = GPT(config).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(model)
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training
    n_layer, n_head, n_embd = SIZES[arguments.size]
    config = GPTConfig(vocab_size=4096, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    rounds = [
        {name: seconds_a_step(make, config, arguments.device, arguments.steps) for name, make in CONTENDERS.items()}
        for _ in range(arguments.rounds)
    ]
    print(f"{arguments.size} on {arguments.device}, {torch.get_num_threads()} threads, median of {len(rounds)} rounds")
    base = statistics.median(row["AdamW, fused"] for row in rounds)
    for name in CONTENDERS:
        seconds = statistics.median(row[name] for row in rounds)
        print(f"{name:<20} {seconds * 1e3:10.1f} ms {seconds / base:8.1f}x")


if __name__ == "__main__":
    main()
