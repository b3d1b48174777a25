"""What a training step takes, gptlab's beside what one would run otherwise: `python benchmarks/train_throughput.py`.

Two tables. The GPT-2 style network (LayerNorm, learned positions, GELU, biases) in a plain eager float32 loop (of
gptlab's network, with torch's own attention, loss and fused AdamW), then with bf16, with `torch.compile`, with gptlab's
attention, MLPs and loss, with memory kept, kernels called from C++ and the order of adding up that lets runs repeat,
and in `python -m gptlab.train` itself: what the frame costs is between the last two. The Llama style one (RMSNorm,
rotary positions, SwiGLU) in transformers' Trainer and LitGPT's loop, by their defaults and at their best. Batch,
vocabulary and parameters are the same for all.

Each contender is a process of its own, and all take turns; the figure of a round is the median over intervals of ten
steps after the first ten, the table's that over rounds, and ratios are taken within a round. FLOPs are 6 N + 12 L H E T
a token (gptlab/cost.py), and the share is of what a bf16 matrix product reached in the same rounds. Peers are installed
into environments of their own below `GPTLAB_CACHE_DIR`, on top of this one, so that torch is the same.
"""

import argparse
import csv
import functools
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bare import STYLES
from peers.clock import EVERY, WARM
from turns import (
    HERE,
    Rounds,
    default_device,
    drive,
    letters,
    machine,
    markdown,
    median,
    names_in,
    quotient,
    run_gptlab,
    take_turns,
)

from gptlab.cost import count_parameters, flops_per_token
from gptlab.files import cache_dir
from gptlab.model import GPT, GPTConfig

SHAPES = {  # n_layer, n_head, n_embd, block_size, batch_size
    "test": (1, 2, 32, 16, 2),
    "small": (4, 4, 128, 64, 12),
    "baby": (6, 6, 384, 256, 16),
    "124m": (12, 12, 768, 1024, 16),
}
VOCABULARY = 320  # bytes and gptlab's special tokens, padded to its multiple of 64
PEERS = {  # what is installed, and the driver
    "transformers": (("transformers==5.23.0", "accelerate==1.15.0"), "transformers_trainer.py"),
    "litgpt": (
        ("litgpt==0.5.13", "transformers>=4.51.3,<4.57"),
        "litgpt_loop.py",
    ),  # of a newer one, hub is not its own
}
PEAK, OWN = "bf16 matrix product", "`gptlab.train`"


@functools.cache
def peer_python(name: str) -> str:
    """The interpreter of a peer's environment, which is made where it is not there. Raises OSError if it cannot be."""
    wanted, folder = PEERS[name][0], cache_dir() / "peers" / name
    python, ready = folder / "bin/python", folder / "installed.txt"
    said = f"{sys.executable} {torch.__version__} {' '.join(wanted)}"
    if ready.exists() and ready.read_text() == said:
        return str(python)
    print(f"  installing {name} into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    own = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    Path(own, "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise OSError(f"{name} cannot be installed ({errors[-1] if errors else done.stderr.strip()[-200:]})")
    ready.write_text(said)
    return str(python)


def gptlab_keys(task: dict[str, Any], text: Path) -> list[str]:
    """What is told to `gptlab.train` so that it takes the steps of the others."""
    fields = {name: task[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    return [
        *(f"model.{name}={value}" for name, value in (fields | STYLES[task["style"]]).items()),
        f"data.files={text}",
        f"data.batch_size={task['batch_size']}",
        f"trainer={'gpu' if task['device'] == 'cuda' else 'cpu'}",
        f"trainer.max_steps={task['steps']}",
        *("tokenizer=byte", "optimizer=adamw", "samples.every_steps=null", "validation.every_steps=100000"),
    ]


def by_gptlab(folder: Path, task: dict[str, Any], *more: str) -> float:
    """Median seconds of a step of the real command, from what it logs after as many as count for nobody."""
    longer = task | {"steps": WARM + task["steps"]}
    result = run_gptlab(folder, *gptlab_keys(longer, letters(folder)), *more)
    if result["params"] != task["parameters"]:
        raise ValueError(f"{result['params']:,} parameters, where the others have {task['parameters']:,}")
    with open(Path(result["run_dir"], "metrics.csv"), newline="") as file:
        logged = {int(row["step"]): row["train/tokens_per_second"] for row in csv.DictReader(file)}
    whole = [step for step in logged if step > WARM and step % EVERY == 0] or [max(logged)]
    rates = [float(logged[step]) for step in whole]
    return task["batch_size"] * task["block_size"] / statistics.median(rates)


def matrix_product(device: str, size: int) -> float:
    """Seconds of one bf16 product of two square matrices, the best of ten: the machine's peak, in all that follows."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def contenders(task: dict[str, Any], peers: list[str], folder: Path) -> dict[str, Callable[[], float]]:
    def bare(how: str) -> Callable[[], float]:
        return lambda: drive(sys.executable, HERE / "bare.py", task | {"how": how})

    def peer(name: str, best: bool) -> Callable[[], float]:
        return lambda: drive(peer_python(name), HERE / "peers" / PEERS[name][1], task | {"best": best})

    own = {OWN: lambda: by_gptlab(folder, task)}
    if task["style"] == "gpt2":
        ways = {
            "eager float32 loop": bare("eager"),
            "+ bf16 autocast": bare("bf16"),
            "+ `torch.compile`": bare("compiled"),
            "+ gptlab's attention, MLPs and loss": bare("task"),
            "+ memory kept, calls from C++, repeats bit for bit": bare("exact"),
        }
        return ways | own | {"`gptlab.train callbacks=ema`": lambda: by_gptlab(folder, task, "callbacks=ema")}
    ways = {f"{name}, {word}": peer(name, best) for name in peers for word, best in (("defaults", 0), ("best", 1))}
    return ways | own


def show(task: dict[str, Any], rounds: Rounds, flops: float, product_flops: float) -> str:
    """`flops` a token, and those of the matrix product that counts as the peak."""
    tokens, rows = task["batch_size"] * task["block_size"], []
    names = [name for name in names_in(rounds) if name != PEAK]
    for name in names:
        seconds = median(rounds, name)
        share = quotient(rounds, PEAK, name) * flops * tokens / product_flops
        ratios = (f"{quotient(rounds, names[0], name):.2f}x", f"{quotient(rounds, name, OWN):.2f}x")
        rates = (f"{tokens / seconds:,.0f}", *ratios, f"{flops * tokens / seconds / 1e9:,.0f}", f"{share:.0%}")
        rows.append((name, f"{seconds * 1e3:.2f}", *rates, sum(name in row for row in rounds)))
    header = "| ms a step | tokens/s | beside the first | `gptlab.train` beside it | GFLOP/s | of the peak | rounds"
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--style", choices=STYLES, nargs="*", default=list(STYLES))
    parser.add_argument("--peers", nargs="*", choices=(*PEERS, "none"), default=list(PEERS))
    parser.add_argument("--only", nargs="+", default=[""], help="only contenders in whose name one of these is")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--kept", type=Path, help="a folder that keeps the rounds, so that the next run adds to them")
    arguments = parser.parse_args()
    shape = dict(zip(("n_layer", "n_head", "n_embd", "block_size", "batch_size"), SHAPES[arguments.shape], strict=True))
    size = 8192 if arguments.device == "cuda" else 2048
    print(machine(arguments.device), flush=True)
    for style in arguments.style:
        task = shape | {"style": style, "vocab_size": VOCABULARY, "steps": arguments.steps, "device": arguments.device}
        config = GPTConfig(**{k: task[k] for k in task.keys() & GPTConfig.__dataclass_fields__}, **STYLES[style])
        model = GPT(config)
        task |= {"mlp_width": config.hidden_width, "parameters": count_parameters(model)[0]}
        with tempfile.TemporaryDirectory() as folder:
            ways = contenders(task, [name for name in arguments.peers if name != "none"], Path(folder))
            ways = {name: run for name, run in ways.items() if any(word in name for word in arguments.only)}
            ways |= {PEAK: lambda: matrix_product(arguments.device, size)}
            kept = arguments.kept and arguments.kept / f"{arguments.shape}-{style}.json"
            rounds = take_turns(ways, arguments.rounds, kept)
        flops, product_flops = flops_per_token(model, config.block_size), 2.0 * size**3
        sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
        print(f"\n{arguments.shape}, {style}: {sizes}, vocabulary {VOCABULARY}, {task['parameters']:,} parameters,")
        print(f"{flops / 1e6:.2f} MFLOPs a token; peak {product_flops / median(rounds, PEAK) / 1e9:,.0f} GFLOP/s\n")
        print(show(task, rounds, flops, product_flops), flush=True)


if __name__ == "__main__":
    main()
