"""Where a training step's time goes: `python benchmarks/step_profile.py [--shape baby]`; profile.md keeps its tables.

First gptlab's compiled step in a bare loop, as `gptlab.train` compiles it, under torch's profiler: the own time of each
operation goes to one kind, told by its name; what is left of the clock's time is Python, dispatch and autograd. Then
the frame, from `gptlab.train trainer.profiler=simple`: what the hooks of Lightning's loop took a step.
"""

import argparse
import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from bare import STYLES, task_step
from torch.profiler import ProfilerActivity, profile
from train_throughput import SHAPES, VOCABULARY, gptlab_keys
from turns import default_device, letters, machine, markdown, run_gptlab

from gptlab.machine import set_compiler
from gptlab.model import GPTConfig

KINDS = {  # of operations; the first that fits
    "attention, one kernel": r"scaled_dot_product|flash|mem_efficient",
    "attention, matrix products": r"aten::(bmm|baddbmm)|bmm_",
    "matrix products": r"aten::(mm|addmm)$|gemm|cutlass|nvjet|onednn",
    "optimizer": r"_fused_adamw|Optimizer\.step|multi_tensor",
    "clipping the gradient": r"_foreach|aten::(linalg_)?(vector_)?norm|aten::stack",
    "softmax and loss, compiled": r"(cpp|triton)\w*(softmax|log|nll)",
    "embedding's gradient, compiled": r"(cpp|triton)\w*(index_put|embedding_dense)|index_put",
    "elementwise and norms, compiled": r"(cpp|triton)_",
}
HOOKS = {  # of Lightning's loop
    "forward": r"Strategy\.training_step$",
    "backward": r"Strategy\.backward$",
    "weighing and clipping the gradient": r"configure_gradient_clipping",
    "data": r"train_dataloader_next|batch_to_device",
    "callbacks: Monitor (logging)": r"\[Callback\]Monitor\.on_train_batch",
    "callbacks: the others": r"\[Callback\].*\.on_train_batch",
    "learning rate": r"lr_scheduler_step",
}
NESTED = r"LMTask\.optimizer_step$"  # forward, backward, clipping, and the optimizer


def kind_of(name: str, kinds: dict[str, str]) -> str | None:
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), None)


def operations(shape: str, style: str, steps: int, device: str) -> list[tuple[str, str, str]]:
    """Kind, ms a step, share."""
    torch._inductor.config.cpp.enable_kernel_profile = True  # gives the compiler's kernels names
    n_layer, n_head, n_embd, block_size, batch_size = SHAPES[shape]
    config = GPTConfig(
        VOCABULARY, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, **STYLES[style]
    )
    _, step = task_step(config, batch_size, device, deterministic=True)
    set_compiler(calls_in_cpp=False)  # of which the profiler sees nothing
    for _ in range(5):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        total_ms = (time.perf_counter() - start) * 1e3 / steps
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        if kind := kind_of(event.key, KINDS):
            own_us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            spent[kind] += own_us / 1e3 / steps
    spent["Python, dispatch, autograd"] = total_ms - sum(spent.values())
    return [(kind, f"{ms:.2f}", f"{ms / total_ms:.1%}") for kind, ms in spent.most_common()] + [
        ("all, under the profiler", f"{total_ms:.2f}", "100%")
    ]


def hooks(shape: str, style: str, steps: int, device: str) -> list[tuple[str, str, str]]:
    """Kind, ms a step, share; by Lightning's own table of a real run."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
    task = dict(zip(names, SHAPES[shape], strict=True)) | {"vocab_size": VOCABULARY, "style": style}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = gptlab_keys(task | {"steps": steps, "device": device}, letters(folder))
        result = run_gptlab(folder, *keys, "trainer.profiler=simple")
        lines = Path(result["run_dir"], "fit-profile.txt").read_text().splitlines()
    spent: Counter[str] = Counter()
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or "on_validation" in cells[0] or not cells[2].isdigit():
            continue
        if re.search(NESTED, cells[0]):
            spent["optimizer"] += float(cells[3]) * 1e3 / steps
        elif kind := kind_of(cells[0], HOOKS):
            spent[kind] += float(cells[3]) * 1e3 / steps
    spent["optimizer"] -= sum(spent[kind] for kind in ("forward", "backward", "weighing and clipping the gradient"))
    total_ms = SHAPES[shape][3] * SHAPES[shape][4] / result["tokens_per_second"] * 1e3
    spent["Lightning's loop, the profiler in it"] = total_ms - sum(spent.values())
    rows = [(kind, f"{ms:.3f}", f"{ms / total_ms:.2%}") for kind, ms in spent.most_common()]
    return [*rows, ("all, under the profiler", f"{total_ms:.3f}", "100%")]


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--style", choices=STYLES, default="gpt2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    arguments = parser.parse_args()
    which = (arguments.shape, arguments.style, arguments.steps, arguments.device)
    print(f"{arguments.shape}, {arguments.style}, {arguments.steps} steps; {machine(arguments.device)}")
    print(f"\n{markdown('operations | ms a step | share', operations(*which))}", flush=True)
    print(f"\n{markdown('hooks | ms a step | share', hooks(*which))}", flush=True)


if __name__ == "__main__":
    main()
