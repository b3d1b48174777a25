"""The whole network in one file, to be read top to bottom: config, norms, rotary positions, attention, MLP, block, GPT.

Shapes: B batch, T time, S keys seen (T plus what is cached), D model width, H heads, K key/value heads, E head width,
V vocabulary. The default (pre-norm RMSNorm, RoPE, SwiGLU, per-head QK-norm, tied embeddings, no bias) is the network of
Qwen3, and without QK-norm that of Llama; `model=gpt2` is GPT-2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptlab.attention import attend
from gptlab.cache import KVCache, LayerCache
from gptlab.formulas import gelu, linear, swiglu
from gptlab.names import load_class


@dataclass
class GPTConfig:
    """What is needed to rebuild the weights; plain data that travels inside every checkpoint."""

    vocab_size: int | None = None  # tokens known; null: the tokenizer's
    vocab_multiple: int = 64  # rows of the embedding are padded to a multiple of this, for the matrix units
    block_size: int = 256  # tokens of context
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_kv_head: int | None = None  # key/value heads (grouped queries); null: n_head
    n_embd: int = 256  # model width
    head_dim: int | None = None  # width of a head; null: n_embd / n_head
    mlp_width: int | None = None  # null: 4 x n_embd, for swiglu two thirds of that, rounded up to 64
    norm: str = "rmsnorm"  # rmsnorm | layernorm | a dotted name
    positions: str = "rope"  # rope | learned
    mlp: str = "swiglu"  # swiglu | gelu | a dotted name
    attention: str = "gptlab.model.Attention"  # a dotted name
    block: str = "gptlab.model.Block"  # a dotted name
    qk_norm: bool = True  # RMSNorm on the queries and keys of each head
    bias: bool = False  # in linear layers and layer norms
    tie_embeddings: bool = True  # one matrix for reading and predicting tokens
    dropout: float = 0.0  # of embeddings, attention and both outputs of a block
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-5  # added to the mean square or variance
    init_std: float = 0.02  # layers that write into the residual stream start at init_std / sqrt(2 n_layer)
    checkpointing: bool = False  # recompute each block's activations in the backward pass: less memory, a third slower

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_width(self) -> int:
        if self.mlp_width is not None:
            return self.mlp_width
        if self.mlp == "swiglu":  # three matrices instead of two, so two thirds of the width: equal parameters
            return math.ceil(8 * self.n_embd / 3 / 64) * 64
        return 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        assert self.vocab_size is not None
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def faults(self) -> list[str]:
        """Every reason why no network can be built from this config, each with its field and value."""
        optional = [name for name in ("n_kv_head", "mlp_width", "head_dim") if getattr(self, name) is not None]
        counts = ("vocab_size", "vocab_multiple", "block_size", "n_layer", "n_head", "n_embd", *optional)
        low = [name for name in counts if (getattr(self, name) or 0) < 1]
        faults = [f"model.{name}={getattr(self, name)} must be at least 1" for name in low]
        if not {"n_head", "n_embd", "head_dim"} & set(low):
            if self.head_dim is None and self.n_embd % self.n_head:
                step = self.n_head * (2 if self.positions == "rope" else 1)
                near = round(self.n_embd / step) * step or step
                faults.append(f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; {near} is")
            elif self.positions == "rope" and self.head_width % 2:
                which = "n_embd / n_head" if self.head_dim is None else "model.head_dim"
                faults.append(f"model.positions=rope needs an even head width, {which} is {self.head_width}")
        if not {"n_head", "n_kv_head"} & set(low) and self.n_head % self.kv_heads:
            faults.append(f"model.n_head={self.n_head} is not divisible by model.n_kv_head={self.n_kv_head}")
        if self.positions not in ("rope", "learned"):
            faults.append(f"model.positions={self.positions!r} is none of rope, learned")
        for name, words in (("norm", NORMS), ("mlp", MLPS)):
            value = getattr(self, name)
            if value not in words and "." not in value:
                faults.append(f"model.{name}={value!r} is none of {', '.join(words)}, nor a dotted name")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not (value := getattr(self, name)) > 0:
                faults.append(f"model.{name}={value} must be more than 0")
        if not 0 <= self.dropout < 1:
            faults.append(f"model.dropout={self.dropout} is not in [0, 1)")
        return faults


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, config: GPTConfig):
        super().__init__(width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # one type: the fused kernel


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, config: GPTConfig):
        super().__init__(width, eps=config.norm_eps, bias=config.bias)


class Linear(nn.Linear):
    """x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ResidualLinear(Linear):
    """A linear layer that writes into the residual stream, and so starts smaller (GPT-2, section 2.3)."""


def rotary_tables(config: GPTConfig) -> Tensor:
    """Cosines and sines of every position and pair of channels (Su et al. 2021), stacked: (2, block_size, E / 2).

    Half-split: channel i turns with channel i + E / 2, as in Llama.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_width, 2).float() / config.head_width)
    angles = torch.arange(config.block_size).float()[:, None] * frequencies  # (block_size, E / 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the channel pairs of x (B, H, T, E) by the angles in `rotary` (2, B or 1, 1, T, E / 2), in float32."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads. This is the interface of `model.attention`.

    `forward(x, rotary, mask, cache)` maps x (B, T, D) to (B, T, D). `rotary` (2, B or 1, 1, T, E / 2) is what `rotate`
    turns by, None without rotary positions. `mask` (B or 1, 1, T, S) is true where a query may look; None means causal
    over the T tokens given. `cache`, when generating, takes the new keys and values and gives back all S so far.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_width = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.qkv = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_width, bias=config.bias)
        self.proj = ResidualLinear(self.n_head * self.head_width, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_width, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_width, config) if config.qk_norm else nn.Identity()
        self.residual_dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E), keys and values (B, K, T, E), normalised and turned to their positions."""
        B, T, _ = x.shape
        q, k, v = (  # apart before they turn: their gradients are then joined as the product before reads them
            heads.transpose(1, 2)
            for heads in self.qkv(x)
            .view(B, T, -1, self.head_width)
            .split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def forward(self, x: Tensor, rotary: Tensor | None, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        causal = mask is None and T > 1  # a single query may look at every key there is
        y = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)
        return self.residual_dropout(self.proj(y.transpose(1, 2).reshape(B, T, -1)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are the two halves of one matrix."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.hidden_width, bias=config.bias)
        self.proj = ResidualLinear(config.hidden_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(swiglu(self.gate_up(x))))


class GELU(nn.Module):
    """GPT-2's MLP, with its tanh approximation of GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.proj = ResidualLinear(config.hidden_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(gelu(self.up(x))))


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
MLPS = {"swiglu": SwiGLU, "gelu": GELU}


class Block(nn.Module):
    """One layer, pre-norm: tokens look at each other, then each thinks for itself."""

    def __init__(self, config: GPTConfig, layer: int, parts: dict[str, Any]):
        super().__init__()
        self.attention_norm = parts["norm"](config.n_embd, config)
        self.attention = parts["attention"](config, layer)
        self.mlp_norm = parts["norm"](config.n_embd, config)
        self.mlp = parts["mlp"](config)

    def forward(self, x: Tensor, rotary: Tensor | None, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


def load_parts(config: GPTConfig, trust: tuple[str, ...]) -> dict[str, Any]:
    """The classes that a config names, of packages that are trusted."""
    return {
        "norm": NORMS.get(config.norm) or load_class(config.norm, nn.Module, trust),
        "mlp": MLPS.get(config.mlp) or load_class(config.mlp, nn.Module, trust),
        "attention": load_class(config.attention, nn.Module, trust),
        "block": load_class(config.block, nn.Module, trust),
    }


class GPT(nn.Module):
    """Tokens in, logits out. `trust`: packages, besides gptlab and experiments, whose classes the config may name."""

    def __init__(self, config: GPTConfig, trust: tuple[str, ...] = ()):
        super().__init__()
        if faults := config.faults():
            raise ValueError("; ".join(faults))
        self.config = config
        parts = load_parts(config, trust)
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.position = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(parts["block"](config, layer, parts) for layer in range(config.n_layer))
        self.norm = parts["norm"](config.n_embd, config)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        rotary = rotary_tables(config) if config.positions == "rope" else None
        self.register_buffer("rotary", rotary, persistent=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.init_std
            if isinstance(module, ResidualLinear):  # 2 n_layer of them add up, so the stream's variance stays put
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        readout: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Logits (B, T, V) of the token after each of `tokens` (B, T).

        `positions` (B, T) default to 0, 1, ... after what `cache` holds. With `document_ids` (B, T), tokens look
        only at tokens of their own document. `readout(hidden, weight)` is what to make of the residual stream
        (B, T, D) and the matrix (V or more, D) whose product are the logits, where they need not all be there at once.
        """
        x = self.hidden(tokens, positions, document_ids, cache)
        weight = self.embed.weight if self.head is None else self.head.weight
        if readout is not None:
            return readout(x, weight)
        return F.linear(x, weight)[..., : self.config.vocab_size]  # padded rows are never predicted

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The residual stream after the last norm, (B, T, D)."""
        T = tokens.shape[1]
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into model.block_size={self.config.block_size}")
        x = self.embed(tokens)
        if self.position is not None:
            following = torch.arange(start, start + T, device=tokens.device)[None]
            x = x + self.position(following if positions is None else positions)
        x = self.dropout(x)
        rotary = self.rotary  # (2, block_size, E / 2), and below (2, B or 1, 1, T, E / 2)
        if rotary is not None:
            rotary = rotary[:, None, start : start + T] if positions is None else rotary[:, positions]
            rotary = rotary[:, :, None]
        if cache is None or cache.mask is None:
            mask = attention_mask(T, start, document_ids, tokens.device)
        else:
            mask = cache.mask
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[layer]
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, rotary, mask, layer_cache, use_reentrant=False)
            else:
                x = block(x, rotary, mask, layer_cache)
        return self.norm(x)


def attention_mask(T: int, start: int, document_ids: Tensor | None, device: torch.device) -> Tensor | None:
    """Where T queries, `start` tokens into the context, may look: (B or 1, 1, T, start + T); None is plain causal."""
    if document_ids is None and (start == 0 or T == 1):
        return None
    causal = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)[None, None]
    if document_ids is None:
        return causal
    if start:
        raise ValueError("document_ids go with whole sequences, not with a cache")
    return causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
