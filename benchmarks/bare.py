"""Training steps of gptlab's network in a bare loop: no Lightning, no logging, no callbacks, no data on disk.

`plain_step` is what one would write after nanoGPT; `task_step` has the loss and the network as `gptlab.train` compiles
them. As a program it is a driver like those in peers/.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peers.clock import Clock, given, report
from torch import Tensor

from gptlab import formulas
from gptlab.cost import computes_in_bf16
from gptlab.machine import keep_freed_memory, set_compiler
from gptlab.model import GPT, GPTConfig
from gptlab.optim import constant, parameter_groups
from gptlab.tasks.lm import LMTask
from gptlab.tokenizer import ByteTokenizer

STYLES = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True},
    "llama": {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": False, "bias": False},
}
adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)


def random_batch(config: GPTConfig, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T)."""
    assert config.vocab_size is not None
    windows = torch.randint(config.vocab_size, (batch_size, config.block_size + 1)).to(device)
    return windows[:, :-1], windows[:, 1:]


def plain_step(
    config: GPTConfig, batch_size: int, device: str, bf16: bool, compiled: bool
) -> tuple[GPT, Callable[[], Tensor]]:
    """A network and its step, which gives the loss: cross-entropy of all logits, clipping, fused AdamW."""
    model = GPT(config).to(device)
    optimizer = adamw(parameter_groups(model))
    formulas.OWN_FORMULAS = False  # torch's own kernels, as anybody would call them

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step() -> Tensor:
        tokens, targets = random_batch(config, batch_size, device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens, targets)
        return finish(loss, model, optimizer)

    return model, step


def task_step(
    config: GPTConfig,
    batch_size: int,
    device: str,
    compiled: bool = True,
    deterministic: bool = False,
    make_optimizer: Callable[..., torch.optim.Optimizer] = adamw,
) -> tuple[LMTask, Callable[[], Tensor]]:
    """gptlab's own task, and its step in bf16 where the device has it.

    `gptlab.train` on a CPU asks for operations that repeat bit for bit, keeps memory, and has kernels called from C++;
    so does `deterministic`.
    """
    if deterministic:
        keep_freed_memory()
        set_compiler(calls_in_cpp=device == "cpu")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    schedule = partial(constant, warmup_steps=0)
    task = LMTask(GPT(config), ByteTokenizer(), make_optimizer, schedule, total_steps=1, compile=compiled).to(device)
    for name in ("step_sums", "interval_sums", "gradient_norm"):  # what Lightning calls on_fit_start for
        setattr(task, name, getattr(task, name).to(device))
    optimizer = make_optimizer(parameter_groups(task.model))
    bf16 = computes_in_bf16(device)

    def step() -> Tensor:
        tokens, targets = random_batch(config, batch_size, device)
        batch = {"tokens": tokens, "targets": targets, "loss_mask": torch.ones_like(targets, dtype=torch.bool)}
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = task.training_step(batch, 0)
        return finish(loss, task.model, optimizer)

    return task, step


def finish(loss: Tensor, model: GPT, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main() -> None:
    """The driver: a task as in peers/clock.py, with `style`, and `how` one of eager, bf16, compiled, task, exact."""
    task = given()
    shape = {name: getattr(task, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}
    config = GPTConfig(**shape, **STYLES[task.style])
    if task.how in ("task", "exact"):
        owner, step = task_step(config, task.batch_size, task.device, deterministic=task.how == "exact")
        model = owner.model
    else:
        bf16, compiled = task.how != "eager", task.how == "compiled"
        model, step = plain_step(config, task.batch_size, task.device, bf16, compiled)
    clock = Clock(task.steps, task.device)
    for _ in range(clock.total):
        step()
        clock.tick()
    report(clock, model)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    main()
