"""What a network costs before it runs: parameters, FLOPs a token, and memory, without allocating any of it."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gptlab.losses import LOGITS_AT_ONCE, summed_nll
from gptlab.model import GPT, GPTConfig

# Dense bf16 peaks in TFLOP/s, from the makers' data sheets (the figures with sparsity are twice these). The longest
# name that is part of the device's own counts. Desktop and laptop cards share names and not speeds: they are left out.
PEAK_TFLOPS = {
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 150.0,
    "A100": 312.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "L4": 121.0,
    "L40S": 362.0,
}


LOGIT_BYTES = 16  # float32 logits, their exponentials, and two more in between, while the loss is computed


@dataclass(frozen=True)
class Cost:
    parameters: int  # all, padded vocabulary included
    parameters_non_embedding: int  # without token and position tables; an untied head counts
    flops_per_token: float  # one training step: forward and backward
    memory_bytes: int  # weights, their average if any, gradients, two moments, activations and logits of a micro-batch


def computes_in_bf16(device: str) -> bool:
    """Whether a kind of device, cuda, mps or cpu, computes in bfloat16 itself, rather than emulating it."""
    if device != "cpu":
        return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters: all, and those outside embedding tables."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(table.numel() for table in tables)


def flops_per_token(model: GPT, block_size: int) -> float:
    """FLOPs a trained token takes, forward and backward: 6 N + 12 L H E T (Chowdhery et al. 2022, appendix B).

    N are the parameters of matrix products, the prediction of the next token included and table look-ups left out.
    """
    config = model.config
    products = sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim >= 2)
    products += config.padded_vocab_size * config.n_embd
    return 6.0 * products + 12.0 * config.n_layer * config.n_head * config.head_width * block_size


def activation_bytes(config: GPTConfig, batch_size: int, bf16: bool, trust: tuple[str, ...]) -> int:
    """Bytes that the backward pass of one micro-batch keeps, found by a forward pass with tensors that hold no data.

    It is the eager CPU's figure; a compiled network, which recomputes cheap parts, keeps less.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(config, trust)
        tokens = torch.zeros(batch_size, config.block_size, dtype=torch.long)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            keep_all = torch.ones_like(tokens, dtype=torch.bool)
            readout = partial(summed_nll, targets=tokens, loss_mask=keep_all, vocab_size=config.vocab_size)
            loss = model(tokens, readout=readout)  # kept alive, so that no storage is counted twice or reused
        del loss
    return sum(size for storage, size in kept.items() if storage not in own)


def estimate(
    config: GPTConfig, batch_size: int, bf16: bool = False, trust: tuple[str, ...] = (), averaged: bool = False
) -> Cost:
    """What training with micro-batches of `batch_size` sequences costs; nothing is allocated.

    `averaged`: with an average of the weights kept beside them.
    """
    with torch.device("meta"):
        model = GPT(config, trust)
    total, non_embedding = count_parameters(model)
    state = (20 if averaged else 16) * total  # float32 weight, gradient and AdamW's two moments
    activations = activation_bytes(config, batch_size, bf16, trust)
    logits = LOGIT_BYTES * min(batch_size * config.block_size * config.padded_vocab_size, LOGITS_AT_ONCE)
    return Cost(total, non_embedding, flops_per_token(model, config.block_size), state + activations + logits)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, or None where it is not known: no figure is better than a wrong one."""
    words = f" {device_name.replace('-', ' ')} ".lower()
    known = [name for name in PEAK_TFLOPS if f" {name} ".lower() in words]
    return PEAK_TFLOPS[max(known, key=len)] if known and " mig " not in words else None  # MIG: a slice of a device
