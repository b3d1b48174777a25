"""What the drivers of peers share: their task, as JSON on the command line, and the clock that they look at.

A driver trains one network for some steps in its library's own way, in a process of its own, and prints JSON:
`seconds` a step, one figure an interval of steps, and `parameters`. The task has n_layer, n_head, n_embd, mlp_width,
block_size, batch_size, vocab_size, steps, device (cpu or cuda), and best: whether to use the library's fastest settings
instead of its defaults.
"""

import json
import sys
import time
from types import SimpleNamespace

import torch

EVERY = 10  # steps between two looks at the clock, as many as between gptlab's; on a GPU a look waits for the device
WARM = EVERY  # steps that do not count: compilation, first allocations


class Clock:
    def __init__(self, steps: int, device: str):
        self.every, self.device = min(EVERY, steps), device
        self.total = WARM + steps  # steps to train
        self.step = -WARM
        self.seconds: list[float] = []

    def tick(self) -> None:
        """To be called after each step."""
        self.step += 1
        if self.step < 0 or self.step % self.every:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.step:
            self.seconds.append((now - self.then) / self.every)
        self.then = now


def given() -> SimpleNamespace:
    return SimpleNamespace(**json.loads(sys.argv[1]))


def report(clock: Clock, model: torch.nn.Module) -> None:
    """The last line of a driver's output."""
    print(json.dumps({"seconds": clock.seconds, "parameters": sum(p.numel() for p in model.parameters())}))
