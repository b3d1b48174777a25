"""Several runs as one model: `python -m experiments.gutenberg.ensemble RUN RUN ...`, whose probabilities are averaged.

Each line is the first runs together, scored on the whole validation split that they were trained with.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from gptlab import checkpoint
from gptlab.assembly import build_data
from gptlab.config import trusted
from gptlab.losses import token_nll
from gptlab.model import GPT
from gptlab.resume import saved_config
from gptlab.run import RunFolder
from gptlab.tasks.metrics import TokenMetrics

WINDOWS_AT_ONCE = 16


def mean_nlls(models: list[GPT], tokens: Tensor, targets: Tensor) -> Tensor:
    """-log of the mean probability that the first 1, 2, ... `models` give each target: (models, B, T)."""
    alone = torch.stack([token_nll(model(tokens), targets) for model in models])
    counts = torch.arange(1, len(models) + 1)[:, None, None]
    return counts.log() - alone.neg().logcumsumexp(dim=0)


@torch.no_grad()
def scores(runs: list[Path]) -> list[dict[str, float]]:
    """val/loss, bits a byte and more of the first 1, 2, ... runs together. Raises ValueError unless they share data."""
    paths = [checkpoint.find(run) for run in runs]
    cfg = saved_config(RunFolder(runs[0]))
    loaded = [checkpoint.load_model(path, trusted(cfg)) for path in paths]
    models, tokenizers = [model for model, _ in loaded], [tokenizer for _, tokenizer in loaded]
    for run, tokenizer in zip(runs, tokenizers, strict=True):
        if tokenizer.fingerprint != tokenizers[0].fingerprint:
            raise ValueError(f"{run} has another tokenizer than {runs[0]}: their probabilities are of different pieces")
    windows = build_data(cfg, tokenizers[0]).validation_windows
    token_bytes = torch.tensor([len(tokenizers[0].decode_bytes([i])) for i in range(tokenizers[0].vocab_size)])
    metrics = [TokenMetrics(token_bytes) for _ in models]
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = windows.__getitems__(list(range(start, min(start + WINDOWS_AT_ONCE, len(windows)))))
        nlls = mean_nlls(models, batch["tokens"], batch["targets"])
        for metric, nll in zip(metrics, nlls, strict=True):
            metric.update(nll, batch["targets"], batch["targets"], batch["loss_mask"])
    return [metric.compute() for metric in metrics]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    runs = parser.parse_args().runs
    try:
        found = scores(runs)
    except ValueError as error:
        parser.error(str(error))
    print("| runs | val/loss | bits a byte |\n|---|---|---|")
    for count, figures in enumerate(found, start=1):
        print(f"| {count} | {figures['loss']:.4f} | {figures['bits_per_byte']:.4f} |")


if __name__ == "__main__":
    main()
