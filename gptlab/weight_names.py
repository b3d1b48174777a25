"""Weights by the names that transformers has for them, and back: what is one matrix here may be three there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.architectures import CLASSES, model_type
from gptlab.model import GPT, GPTConfig
from gptlab.tensors import joined


@dataclass(frozen=True)
class Place:
    """One tensor of ours, and those of theirs that it holds, one on top of the other."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] | None = None  # rows of each of several
    transposed: bool = False  # GPT-2 keeps its matrices the other way round


def places(config: GPTConfig, kind: str) -> Iterator[Place]:
    """Every tensor of a network."""
    for layer in range(config.n_layer):
        yield from _layer(config, kind, layer)
    if kind == "gpt2":
        yield Place("embed.weight", ("transformer.wte.weight",))
        yield Place("position.weight", ("transformer.wpe.weight",))
        for part in ("weight", "bias"):
            yield Place(f"norm.{part}", (f"transformer.ln_f.{part}",))
    else:
        yield Place("embed.weight", ("model.embed_tokens.weight",))
        yield Place("norm.weight", ("model.norm.weight",))
    if not config.tie_embeddings:
        yield Place("head.weight", ("lm_head.weight",))


def _layer(config: GPTConfig, kind: str, layer: int) -> Iterator[Place]:
    ours, width = f"blocks.{layer}.", config.head_width
    if kind == "gpt2":
        theirs = f"transformer.h.{layer}."
        names = {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj"}
        for own, name in (names | {"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}).items():
            yield Place(f"{ours}{own}.weight", (f"{theirs}{name}.weight",), transposed="norm" not in own)
            yield Place(f"{ours}{own}.bias", (f"{theirs}{name}.bias",))
        return
    theirs = f"model.layers.{layer}."
    qkv = (config.n_head * width, config.kv_heads * width, config.kv_heads * width)
    linear = {
        "attention.qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv),
        "attention.proj": (("self_attn.o_proj",), None),
        "mlp.gate_up": (("mlp.gate_proj", "mlp.up_proj"), (config.hidden_width,) * 2),
        "mlp.proj": (("mlp.down_proj",), None),
    }
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if kind == "qwen3":
        norms |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    for own, name in norms.items():
        yield Place(f"{ours}{own}.weight", (f"{theirs}{name}.weight",))
    for own, (found, sizes) in linear.items():
        for part in ("weight", "bias") if config.bias else ("weight",):
            yield Place(f"{ours}{own}.{part}", tuple(f"{theirs}{name}.{part}" for name in found), sizes)


def to_theirs(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours by their names: views, which lie behind each other where ours are one."""
    kind, found = model_type(config), {}
    for place in places(config, kind):
        tensor = weights.get(place.ours)
        if tensor is None:  # GPT-2 always has biases
            assert place.ours.endswith(".bias")
            rows = weights[place.ours.removesuffix("bias") + "weight"]
            tensor = rows.new_zeros(len(rows))
        if place.ours in ("embed.weight", "head.weight"):
            tensor = tensor[: config.vocab_size]
        parts = tensor.split(place.sizes) if place.sizes else (tensor,)
        found |= {name: part.mT if place.transposed else part for name, part in zip(place.theirs, parts, strict=True)}
    return found


IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tables that some versions save


def to_ours(config: GPTConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of theirs by our names, in their place in the file where that is possible.

    Raises ValueError where there are others than the config calls for, in name, shape or type.
    """
    kind = model_type(config)
    if config.n_layer > len(theirs):  # before that many layers are made
        raise ValueError(f"config.json has {config.n_layer} layers, and there are {len(theirs)} tensors in all")
    left = {_full_name(name, kind): tensor for name, tensor in theirs.items() if not name.endswith(IGNORED)}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    try:
        with torch.device("meta"):
            wanted = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    except RuntimeError as error:  # sizes that no memory can have
        raise ValueError(f"config.json has no network that can be made ({str(error).splitlines()[0]})") from error
    found = {}
    for place in places(config, kind):
        if missing := [name for name in place.theirs if name not in left]:
            raise ValueError(f"there is no tensor {missing[0]}, which config.json calls for")
        parts = [left.pop(name) for name in place.theirs]
        for name, part in zip(place.theirs, parts, strict=True):
            if not part.is_floating_point():
                raise ValueError(f"{name} is of type {part.dtype}, and weights are floating-point numbers")
        if place.ours not in wanted:  # a bias that we do not have
            if parts[0].count_nonzero():
                raise ValueError(f"{place.theirs[0]} is not zero, and the network has model.bias=False")
            continue
        _require_shapes(place, parts, wanted[place.ours])
        tensor = joined(parts) if len(parts) > 1 else parts[0]
        found[place.ours] = tensor.mT if place.transposed else tensor
    if left:
        raise ValueError(f"there is a tensor {min(left)}, which a {CLASSES[kind]} of this config does not have")
    return found


def _full_name(name: str, kind: str) -> str:
    """GPT-2's own file has its names without the first word."""
    return f"transformer.{name}" if kind == "gpt2" and not name.startswith(("transformer.", "lm_head.")) else name


def _require_shapes(place: Place, parts: list[Tensor], wanted: torch.Size) -> None:
    sizes = place.sizes or (wanted[0],)
    for name, part, rows in zip(place.theirs, parts, sizes, strict=True):
        shape = (rows, *wanted[1:])
        shape = shape[::-1] if place.transposed else shape
        if part.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(part.shape)}, and config.json calls for {shape}")
