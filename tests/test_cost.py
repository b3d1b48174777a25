"""Costs without running, against what running really takes."""

import resource
import sys
import time
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptlab.cost import activation_bytes, count_parameters, estimate, flops_per_token, peak_tflops
from gptlab.losses import summed_nll
from gptlab.model import GPT, GPTConfig

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}
CONFIGS = [{}, GPT2, {"n_kv_head": 2}, {"tie_embeddings": False}]


def small(**changes) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 100, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 64} | changes)


def loss_of(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    keep_all = torch.ones_like(tokens, dtype=torch.bool)
    vocab_size = model.config.vocab_size
    return model(tokens, readout=partial(summed_nll, targets=tokens, loss_mask=keep_all, vocab_size=vocab_size))


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_flops_are_those_of_a_step(changes):
    """Equal to the last one, with attention computed in full: the formula knows of no causal saving."""
    model = GPT(small(**changes))
    tokens = torch.randint(100, (2, 64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(model, tokens).backward()
    assert counter.get_total_flops() == flops_per_token(model, 64) * tokens.numel()


def test_attention_costs_with_the_context():
    model = GPT(small())
    difference = flops_per_token(model, 64) - flops_per_token(model, 32)
    assert difference == 12 * 3 * 64 * 32  # 12 L D T


@pytest.mark.parametrize(
    ("changes", "outside"),
    [({}, 0), ({"tie_embeddings": False}, 128 * 64), ({"positions": "learned"}, 0)],
    ids=str,
)
def test_count_parameters(changes, outside):
    """Tables of tokens and positions are no part of the second figure; an untied head is."""
    model = GPT(small(**changes))
    total, non_embedding = count_parameters(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert non_embedding == sum(p.numel() for p in (*model.blocks.parameters(), *model.norm.parameters())) + outside


def kept_bytes(config: GPTConfig, batch_size: int, bf16: bool) -> int:
    """What a real forward pass keeps for the backward pass, weights aside."""
    model = GPT(config)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(batch_size, config.block_size, dtype=torch.long)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = loss_of(model, tokens)
    del loss
    return sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", [*CONFIGS, {"dropout": 0.1}, {"checkpointing": True}], ids=str)
def test_activation_bytes_are_those_of_a_step(changes, bf16):
    config = small(**changes)
    assert activation_bytes(config, 4, bf16, ()) == pytest.approx(kept_bytes(config, 4, bf16), rel=0.01)


def test_checkpointing_keeps_less():
    plain, checkpointed = (activation_bytes(small(checkpointing=c), 4, False, ()) for c in (False, True))
    assert checkpointed < plain / 5


def test_estimate_adds_up():
    config = small(tie_embeddings=False)
    cost, model = estimate(config, 4), GPT(config)
    assert (cost.parameters, cost.parameters_non_embedding) == count_parameters(model)
    assert cost.flops_per_token == flops_per_token(model, 64)
    logits = 4 * 64 * config.padded_vocab_size
    assert cost.memory_bytes == 16 * cost.parameters + activation_bytes(config, 4, False, ()) + 16 * logits
    assert estimate(config, 4, averaged=True).memory_bytes == cost.memory_bytes + 4 * cost.parameters


def test_estimate_leaves_the_seed_alone():
    before = torch.get_rng_state()
    estimate(small(dropout=0.1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def peak_memory() -> int:
    """The most that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_two_billion_parameters_cost_nothing_to_estimate():
    config = GPTConfig(vocab_size=50_000, block_size=2048, n_layer=40, n_head=32, n_embd=2048)
    before, start = peak_memory(), time.monotonic()
    cost = estimate(config, batch_size=8, bf16=True)
    assert time.monotonic() - start < 10
    assert peak_memory() - before < 200e6
    assert cost.parameters > 2e9
    assert cost.memory_bytes > 100e9


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peak_tflops(device_name, tflops):
    assert peak_tflops(device_name) == tflops
