"""Several runs as one model: `python -m experiments.gutenberg.ensemble RUN RUN ...`, whose probabilities are averaged.

Each line is the first runs together, scored on the whole validation split that they were trained with.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab import checkpoint
from gptlab.assembly import build_data
from gptlab.checks import check_targets
from gptlab.config import trusted
from gptlab.data.module import TextDataModule
from gptlab.losses import document_layout, token_nll
from gptlab.model import GPT
from gptlab.resume import saved_config
from gptlab.run import RunFolder
from gptlab.tasks.metrics import TokenMetrics
from gptlab.tokenizer import EOS_ID

WINDOWS_AT_ONCE = 16


def mean_nlls(models: list[GPT], tokens: Tensor, targets: Tensor, separate_documents: bool = False) -> Tensor:
    """-log of the mean probability that the first 1, 2, ... `models` give each target: (models, B, T)."""
    ids, positions = document_layout(tokens, EOS_ID) if separate_documents else (None, None)
    alone = torch.stack([token_nll(model(tokens, positions, ids), targets) for model in models])
    counts = torch.arange(1, len(models) + 1)[:, None, None]
    return counts.log() - alone.neg().logcumsumexp(dim=0)


def required_same(runs: list[Path]) -> dict[str, Any]:
    """The config of the first of `runs`. Raises ValueError unless all score the same windows in the same way."""
    said = []
    for run in runs:
        cfg = saved_config(RunFolder(run))
        check_targets(cfg, trusted(cfg))
        state = checkpoint.load(checkpoint.find(run))
        own = {"data and tokenizer": state[TextDataModule.__qualname__]["fingerprint"]}
        said.append((cfg, own | {"documents": cfg["documents"], "model.block_size": cfg["model"]["block_size"]}))
        for name, value in said[0][1].items():
            if said[-1][1][name] != value:
                raise ValueError(f"{run} has other {name} than {runs[0]}: {said[-1][1][name]}, {value}")
    return said[0][0]


@torch.no_grad()
def scores(runs: list[Path]) -> list[dict[str, float]]:
    """Loss and bits a byte of the first 1, 2, ... runs together, on the validation split of all."""
    cfg = required_same(runs)
    loaded = [checkpoint.load_model(checkpoint.find(run), trusted(cfg)) for run in runs]
    models, tokenizer = [model for model, _ in loaded], loaded[0][1]
    windows = build_data(cfg, tokenizer).validation_windows
    token_bytes = torch.tensor([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    metrics = [TokenMetrics(token_bytes) for _ in models]
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = windows.__getitems__(list(range(start, min(start + WINDOWS_AT_ONCE, len(windows)))))
        tokens, targets = batch["tokens"], batch["targets"]
        nlls = mean_nlls(models, tokens, targets, cfg["documents"] == "separate")
        for metric, nll in zip(metrics, nlls, strict=True):
            metric.update(nll, targets, targets, batch["loss_mask"])
    return [{name: metric.compute()[name] for name in ("loss", "bits_per_byte")} for metric in metrics]


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
