"""What causal attention costs on a CPU, forward and backward: torch's kernel, and compiled matrix products.

`python benchmarks/attention.py [--shape baby]` prints milliseconds and the ratio to the kernel, for products by several
numbers of queries at a time; contenders take turns. `gptlab/attention.py` is set by its figures.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab import attention
from gptlab.machine import keep_freed_memory

SHAPES = {  # batch, heads, tokens, head width
    "small": (12, 4, 64, 32),
    "tiny": (16, 4, 128, 64),
    "baby": (16, 6, 256, 64),
    "512": (8, 8, 512, 64),
    "1024": (4, 8, 1024, 64),
    "2048": (2, 8, 2048, 64),
}


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def products_by(block: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled with this many queries at a time."""

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.products(q, k, v, dropout=0.0, block=block)

    return torch.compile(products, dynamic=False)


def milliseconds(attend: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> float:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    direction, times = torch.randn(shape, dtype=dtype), []
    for _ in range(steps + 3):
        start = time.perf_counter()
        attend(q, k, v).backward(direction)
        times.append(time.perf_counter() - start)
        q.grad = k.grad = v.grad = None
    return statistics.median(times[3:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.shape:
        torch.compiler.reset()  # after eight versions of one function it would compile no more
        T = SHAPES[name][2]
        contenders = {"kernel": kernel}
        contenders |= {f"products by {T // n}": products_by(T // n) for n in (1, 2, 4, 8) if T // n >= 32}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for word, attend in contenders.items():
                times[word].append(milliseconds(attend, SHAPES[name], getattr(torch, arguments.dtype), arguments.steps))
        first = statistics.median(times["kernel"])
        for word, measured in times.items():
            median = statistics.median(measured)
            print(f"{name:<6} {SHAPES[name]!s:<18} {word:<18} {median:8.2f} ms  {first / median:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
