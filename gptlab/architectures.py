"""Networks as transformers knows them: which of its classes one is, and its config.json, from ours and to ours.

One network of ours is theirs exactly or not at all. Llama is the default without QK-norm (with biases too), Qwen3 the
default, GPT-2 `model=gpt2` (where it has no biases, theirs are zero).
"""

from collections.abc import Mapping
from typing import Any

from gptlab.model import GPTConfig

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
COMMON = {"attention": "gptlab.model.Attention", "block": "gptlab.model.Block"}
ROPE = {"norm": "rmsnorm", "mlp": "swiglu"}
LEARNED = {"norm": "layernorm", "mlp": "gelu", "qk_norm": False}
LONGEST = 2**20  # a context that is believed: its rotary angles are computed before anything else is
LARGEST = 2**31


def model_type(config: GPTConfig) -> str:
    """Which of CLASSES this network is. Raises ValueError, naming each field that none of them has."""
    rotary = config.positions == "rope"
    wanted = COMMON | (ROPE if rotary else LEARNED)
    faults = [
        f"model.{name}={getattr(config, name)} ({value})"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if rotary and config.qk_norm and config.bias:
        faults.append("model.bias=True beside model.qk_norm=True (Qwen3's MLP has none)")
    if not rotary and config.kv_heads != config.n_head:
        faults.append(f"model.n_kv_head={config.n_kv_head} (n_head, {config.n_head})")
    if not rotary and config.n_head * config.head_width != config.n_embd:
        faults.append(f"model.head_dim={config.head_dim} (n_embd / n_head, {config.n_embd / config.n_head:g})")
    if rotary and not config.qk_norm and config.n_embd % config.n_head:
        faults.append(f"model.n_embd={config.n_embd} (divisible by n_head, {config.n_head})")
    if faults:
        families = "Llama and Qwen3" if rotary else "GPT-2"
        raise ValueError(
            f"no class of transformers is this network: with model.positions={config.positions} there are {families}, "
            f"which differ in {'; '.join(faults)}"
        )
    return "gpt2" if not rotary else "qwen3" if config.qk_norm else "llama"


def to_json(config: GPTConfig) -> dict[str, Any]:
    """What config.json says of the network itself; not its type of numbers nor its special tokens."""
    kind = model_type(config)
    common = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,  # padded rows are left out
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }
    if kind == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        return (
            common
            | dropout
            | {
                "n_positions": config.block_size,
                "n_embd": config.n_embd,
                "n_layer": config.n_layer,
                "n_head": config.n_head,
                "n_inner": config.hidden_width,
                "activation_function": "gelu_new",  # by a tanh, as ours
                "layer_norm_epsilon": config.norm_eps,
            }
        )
    return common | {
        "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # for transformers 4 and vLLM
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "attention_dropout": config.dropout,
        **({"mlp_bias": config.bias} if kind == "llama" else {"use_sliding_window": False}),
    }


class Foreign:
    """A config.json that somebody else may have written: each field is asked for by name, and checked."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.faults: list[str] = []

    def refuse(self, name: str, why: str) -> None:
        self.faults.append(f"{name}={str(self.content.get(name))[:80]} {why}")

    def must(self, name: str, *values: Any) -> None:
        """The field is one of `values`, the first of which is what its absence means."""
        if self.content.get(name, values[0]) not in values:
            self.refuse(name, f"is not {' or '.join(map(str, values))}")

    def number(self, name: str, default: float | None = None, kind: type = int, most: float = LARGEST) -> Any:
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) not in (int, kind) or not 0 < value <= most:
            self.refuse(
                name, f"is no number up to {most:g}" if kind is float else f"is no whole number from 1 to {most}"
            )
            return 1
        return kind(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name, default)
        if type(value) is not bool:
            self.refuse(name, "is neither true nor false")
        return value is True


def from_json(content: Any) -> GPTConfig:
    """The network that a config.json describes. Raises ValueError, naming each field that ours cannot be."""
    if not isinstance(content, dict):
        raise ValueError("it holds no config of a network")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ValueError(f"model_type={str(kind)[:80]!r} is none of {', '.join(CLASSES)}")
    given = Foreign(content)
    given.must("quantization_config", None)
    config = _gpt2(given) if kind == "gpt2" else _llama(given, kind)
    if faults := [*given.faults, *([] if given.faults else config.faults())]:
        raise ValueError(f"gptlab has no such network: {'; '.join(faults)}")
    return config


def _gpt2(given: Foreign) -> GPTConfig:
    given.must("activation_function", "gelu_new", "gelu_pytorch_tanh")
    given.must("scale_attn_weights", True)
    given.must("scale_attn_by_inverse_layer_idx", False)
    given.must("add_cross_attention", False)
    width = given.number("n_embd", 768)
    return GPTConfig(
        vocab_size=given.number("vocab_size", 50257),
        vocab_multiple=1,
        block_size=given.number("n_positions", 1024, most=LONGEST),
        n_layer=given.number("n_layer", 12),
        n_head=given.number("n_head", 12),
        n_embd=width,
        mlp_width=given.number("n_inner", 4 * width),
        **LEARNED,
        positions="learned",
        bias=True,
        tie_embeddings=given.flag("tie_word_embeddings", True),
        norm_eps=given.number("layer_norm_epsilon", 1e-5, float),
    )


def _llama(given: Foreign, kind: str) -> GPTConfig:
    content = given.content
    given.must("hidden_act", "silu")
    given.must("pretraining_tp", 1, None)
    given.must("use_sliding_window", False)
    given.must("partial_rotary_factor", 1, None)
    if kind == "llama":
        given.must("sliding_window", None)
    kinds = content.get("layer_types") or []
    if not isinstance(kinds, list) or any(each != "full_attention" for each in kinds):
        given.refuse("layer_types", "has others than full_attention")
    biased = given.flag("attention_bias", False)
    if biased != (given.flag("mlp_bias", False) and kind == "llama"):
        given.refuse("attention_bias", "is not mlp_bias; here both have biases, or neither")
    heads, width = given.number("num_attention_heads"), given.number("hidden_size")
    head = given.number("head_dim", 128 if kind == "qwen3" else width // heads or 1)
    kv_heads = given.number("num_key_value_heads", 32 if kind == "qwen3" else heads)
    return GPTConfig(
        vocab_size=given.number("vocab_size"),
        vocab_multiple=1,
        block_size=given.number("max_position_embeddings", most=LONGEST),
        n_layer=given.number("num_hidden_layers"),
        n_head=heads,
        n_kv_head=None if kv_heads == heads else kv_heads,
        n_embd=width,
        head_dim=None if head * heads == width else head,
        mlp_width=given.number("intermediate_size"),
        **ROPE,
        positions="rope",
        qk_norm=kind == "qwen3",
        bias=biased,
        tie_embeddings=given.flag("tie_word_embeddings", False),
        rope_theta=_theta(given),
        norm_eps=given.number("rms_norm_eps", 1e-6, float),
    )


def _theta(given: Foreign) -> float:
    """The base of the rotary wavelengths, by either of two fields; what stretches them is refused."""
    theta = given.number("rope_theta", 10_000.0, float, most=1e12)
    for name in ("rope_scaling", "rope_parameters"):
        if (found := given.content.get(name)) is None:
            continue
        known = {"rope_type": "default", "type": "default", "rope_theta": None, "partial_rotary_factor": 1}
        if not isinstance(found, dict) or any(found[key] != known.get(key) for key in set(found) - {"rope_theta"}):
            given.refuse(name, "is not of rope_type default alone")
            continue
        inner = Foreign(found)
        theta = inner.number("rope_theta", theta, float, most=1e12)
        given.faults += [f"{name}.{fault}" for fault in inner.faults]
    return theta
