"""The network: causal, the same with and without a cache, and equal to independent implementations of it.

Every attention class in experiments/ goes through the same tests as the one in gptlab/model.py.
"""

import ast
import dataclasses
import itertools
import math
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from gptlab.attention import products
from gptlab.cache import KVCache
from gptlab.losses import document_layout
from gptlab.model import GPT, GPTConfig, ResidualLinear

REPOSITORY = Path(__file__).parent.parent
CORE = "gptlab.model.Attention"
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}
CONFIGS = {
    "default": {},
    "grouped queries": {"n_kv_head": 2},
    "gpt2": GPT2,
    "no qk_norm": {"qk_norm": False},
    "untied": {"tie_embeddings": False},
    "odd vocabulary": {"vocab_size": 67},
    "wide heads": {"head_dim": 12},
    "dropout": {"dropout": 0.3},
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)


def attentions_in(folder: Path) -> list[str]:
    """Dotted names of the classes below `folder` that are called ...Attention."""
    return [
        ".".join((*path.relative_to(folder.parent).with_suffix("").parts, node.name))
        for path in sorted(folder.rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Attention")
    ]


ATTENTIONS = [CORE, *attentions_in(REPOSITORY / "experiments")]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Waiting for one another costs threads more than these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**changes) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes)


def build(**changes) -> GPT:
    """A small network in float64, in eval mode, with weights so large that every part of it matters."""
    torch.manual_seed(0)
    model = GPT(small(init_std=0.3, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are no longer all one, biases no longer zero
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=ATTENTIONS)
def attention(request) -> str:
    return request.param


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request, attention) -> GPT:
    """Every config with every attention; those of experiments with more context, so that a window may matter."""
    try:
        return build(**request.param, attention=attention, block_size=16 if attention == CORE else 48)
    except ValueError as error:
        if attention == CORE:
            raise
        pytest.skip(f"{attention} refuses this config: {error}")


def is_core(model: GPT) -> bool:
    return model.config.attention == CORE


def random_tokens(model: GPT, *shape: int) -> Tensor:
    return torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_attentions_of_experiments_are_found(tmp_path):
    (tmp_path / "experiments" / "idea").mkdir(parents=True)
    (tmp_path / "experiments" / "idea" / "sparse.py").write_text("class SparseAttention: ...\nclass Other: ...\n")
    assert attentions_in(tmp_path / "experiments") == ["experiments.idea.sparse.SparseAttention"]


# Who sees whom


def test_a_token_changes_nothing_before_it(model):
    T = model.config.block_size
    tokens = random_tokens(model, 1, T)
    changed = (tokens + torch.eye(T, dtype=torch.long)) % model.config.vocab_size  # row t: another token at t
    difference = (model(changed) - model(tokens)).abs().amax(dim=-1)
    assert (difference.tril(-1) < 1e-9).all()
    assert (difference.diag() > 1e-6).all()
    if is_core(model):  # another attention may look less far back
        assert (difference[torch.ones(T, T).triu() > 0] > 1e-6).all()


def test_no_gradient_flows_from_later_tokens(model):
    inputs = []
    model.embed.register_forward_hook(lambda module, args, output: inputs.append(output))
    T = model.config.block_size
    logits = model(random_tokens(model, 1, T))
    for t in (0, T // 2, T - 1):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), inputs[0], retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert (gradient[0, 0 if is_core(model) else t : t + 1].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_cached_equals_uncached(model, seed):
    """One token at a time (no seed), or in random chunks."""
    T = model.config.block_size
    tokens = random_tokens(model, 3, T)
    cache = KVCache(model.config, 3, T, torch.float64, "cpu")
    rng, parts = random.Random(seed), []
    while (start := cache.length) < T:
        size = 1 if seed is None else rng.randint(1, min(T // 2, T - start))
        parts.append(model(tokens[:, start : start + size], cache=cache))
        assert cache.length == start + size
    close(torch.cat(parts, dim=1), model(tokens))


def test_a_cleared_cache_is_empty(model):
    tokens = random_tokens(model, 1, 16)
    cache = KVCache(model.config, 1, 16, torch.float64, "cpu")
    model(tokens, cache=cache)
    cache.clear()
    close(model(tokens[:, 5:9], cache=cache), model(tokens[:, 5:9]))


def test_overflow_is_an_error():
    model = build()
    tokens = random_tokens(model, 1, 17)
    with pytest.raises(ValueError, match=r"17 tokens do not fit into model.block_size=16"):
        model(tokens)
    cache = KVCache(model.config, 1, 16, torch.float64, "cpu")
    model(tokens[:, :16], cache=cache)
    with pytest.raises(ValueError, match=r"model.block_size=16"):
        model(tokens[:, 16:], cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
        model(tokens[:, :5], cache=KVCache(model.config, 1, 4, torch.float64, "cpu"))


def test_documents_see_only_themselves(model):
    """A packed row gives what its documents give alone, and changing one leaves the others as they were."""
    tokens = random_tokens(model, 2, 16)
    bounds = [[0, 4, 5, 12, 16], [0, 9, 15, 16]]
    for row, ends in enumerate(bounds):
        tokens[row, [end - 1 for end in ends[1:-1]]] = 0  # the end token
    document_ids, positions = document_layout(tokens, end_id=0)
    packed = model(tokens, positions, document_ids)
    for row, ends in enumerate(bounds):
        for start, end in itertools.pairwise(ends):
            close(packed[row, start:end], model(tokens[row : row + 1, start:end])[0])
    changed = tokens.clone()
    changed[0, 1] = changed[0, 1] % (model.config.vocab_size - 1) + 1
    again = model(changed, positions, document_ids)
    assert not torch.equal(again[0, 1:4], packed[0, 1:4])
    close(again[0, 4:], packed[0, 4:])


def test_documents_do_not_go_with_a_cache():
    model = build()
    cache = KVCache(model.config, 1, 16, torch.float64, "cpu")
    tokens = random_tokens(model, 1, 4)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="document_ids"):
        model(tokens, document_ids=torch.zeros_like(tokens), cache=cache)


# Independent implementations


def copy_gpt2(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    ours = {"embed.weight": theirs["transformer.wte.weight"], "position.weight": theirs["transformer.wpe.weight"]}
    names = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    names |= {"attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    names |= {"mlp.proj": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for layer in range(layers):
            for our, their in names.items():  # they keep matrices transposed
                ours[f"blocks.{layer}.{our}.{kind}"] = theirs[f"transformer.h.{layer}.{their}.{kind}"].t()
    return ours


def copy_llama(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Llama's names, and Qwen3's, which has two norms more."""
    names = {"attention_norm": ["input_layernorm"], "mlp_norm": ["post_attention_layernorm"]}
    names |= {"attention.qkv": [f"self_attn.{x}_proj" for x in "qkv"], "attention.proj": ["self_attn.o_proj"]}
    names |= {"mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}
    names |= {f"attention.{x}_norm": [f"self_attn.{x}_norm"] for x in "qk"}
    ours = {"embed.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(layers):
        for our, parts in names.items():
            found = [theirs.get(f"model.layers.{layer}.{part}.weight") for part in parts]
            if found[0] is not None:
                ours[f"blocks.{layer}.{our}.weight"] = torch.cat(found)
    return ours


def compare(theirs: nn.Module, ours: GPT, copy) -> None:
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    state = copy(theirs.state_dict(), ours.config.n_layer)
    for name in ("embed.weight", "head.weight"):
        if name in state:
            state[name] = F.pad(state[name], (0, 0, 0, ours.config.padded_vocab_size - ours.config.vocab_size))
    if ours.head is None:
        state.pop("head.weight", None)
    ours.load_state_dict(state)  # strict: every weight of ours has one of theirs
    tokens = random_tokens(ours, 3, ours.config.block_size)
    with torch.no_grad():
        expected, got = theirs.eval()(tokens).logits, ours.eval()(tokens)
    assert expected.std() > 0.1
    assert (expected - got).abs().max() < 1e-5


def test_logits_equal_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = small(**GPT2, vocab_size=99, n_layer=3)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_positions=16, n_embd=32, n_layer=3, n_head=4, attn_implementation="eager"
        )
    )
    compare(theirs, GPT(config), copy_gpt2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_logits_equal_llama_and_qwen3_of_transformers(name, tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = small(
        vocab_size=99, n_layer=3, n_kv_head=2, rope_theta=500.0, qk_norm=name == "Qwen3", tie_embeddings=tied
    )
    settings = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    compare(theirs, GPT(config), copy_llama)


# Sizes and first values


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def formula(c: GPTConfig) -> int:
    D, E, W, bias = c.n_embd, c.head_dim or c.n_embd // c.n_head, c.hidden_width, int(c.bias)
    norm = D * (1 + (bias if c.norm == "layernorm" else 0))
    qkv = (D + bias) * (c.n_head + 2 * c.kv_heads) * E
    attention = qkv + (c.n_head * E + bias) * D + (2 * E if c.qk_norm else 0)
    mlp = (D + bias) * W * (2 if c.mlp == "swiglu" else 1) + (W + bias) * D
    tables = c.padded_vocab_size * (1 if c.tie_embeddings else 2) + (c.block_size if c.positions == "learned" else 0)
    return tables * D + c.n_layer * (attention + mlp + 2 * norm) + norm


@every_config
def test_parameter_count_is_the_formula(changes):
    config = small(**changes)
    assert count(GPT(config)) == formula(config)
    wide = dataclasses.replace(config, mlp_width=48)
    assert count(GPT(wide)) == formula(wide)


def preset(name: str) -> dict:
    values = yaml.safe_load((REPOSITORY / "conf" / "model" / f"{name}.yaml").read_text())
    return {key: value for key, value in values.items() if key != "defaults"}


def test_gpt2_has_its_124_439_808_parameters():
    with torch.device("meta"):
        assert count(GPT(GPTConfig(**preset("gpt2")))) == 124_439_808


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 5_262_080),
        ("small", 29_795_840),
        ("medium", 91_099_392),
        ("large", 999_224_896),
        ("xlarge", 2_040_306_688),
    ],
)
def test_sizes(name, parameters):
    """With 8,000 tokens."""
    config = GPTConfig(vocab_size=8000, **preset(name))
    with torch.device("meta"):
        assert count(GPT(config)) == formula(config) == parameters


@every_config
def test_an_untrained_network_knows_nothing(changes):
    torch.manual_seed(0)
    model = GPT(small(**{"vocab_size": 500} | changes)).eval()
    tokens = random_tokens(model, 8, 17)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(model.config.vocab_size)) < 0.1


def test_initial_values():
    torch.manual_seed(0)
    model = GPT(small(n_layer=8, n_embd=64, **GPT2))
    residual = [module for module in model.modules() if isinstance(module, ResidualLinear)]
    assert len(residual) == 16
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02 / math.sqrt(16) if module in residual else 0.02
            assert module.weight.std().item() == pytest.approx(std, rel=0.07)
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_are_never_predicted(tied):
    model = build(vocab_size=67, tie_embeddings=tied)
    tokens = random_tokens(model, 2, 16)
    before = model(tokens)
    assert model.embed.weight.shape[0] == 128
    assert before.shape == (2, 16, 67)
    with torch.no_grad():
        (model.embed if tied else model.head).weight[67:] = 1e3
    assert torch.equal(model(tokens), before)


# Training


def loss_and_gradients(model: GPT) -> tuple[Tensor, list[Tensor]]:
    tokens = random_tokens(model, 4, 16)
    torch.manual_seed(5)  # the dropout
    loss = model(tokens).log_softmax(dim=-1)[..., 1].mean()
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_number(attention, dropout):
    plain, checkpointed = (build(dropout=dropout, checkpointing=c, attention=attention).train() for c in (False, True))
    calls = []
    checkpointed.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(plain)
    again, gradients_again = loss_and_gradients(checkpointed)
    assert len(calls) == 2  # it did recompute
    assert torch.equal(loss, again)
    for one, other in zip(gradients, gradients_again, strict=True):
        close(one, other)


def test_dropout_is_for_training_alone():
    model = build(dropout=0.3)
    tokens = random_tokens(model, 2, 16)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_bf16_autocast_is_close(attention):
    torch.manual_seed(0)
    model = GPT(small(attention=attention, init_std=0.1))
    tokens = random_tokens(model, 4, 16)
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()


# Errors


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"vocab_size": None}, "model.vocab_size=None must be at least 1"),
        ({"vocab_multiple": 0}, "model.vocab_multiple=0 must be at least 1"),
        ({"block_size": 0}, "model.block_size=0 must be at least 1"),
        ({"n_layer": -1}, "model.n_layer=-1 must be at least 1"),
        ({"n_head": 0}, "model.n_head=0 must be at least 1"),
        ({"n_kv_head": 0}, "model.n_kv_head=0 must be at least 1"),
        ({"n_kv_head": -2}, "model.n_kv_head=-2 must be at least 1"),
        ({"n_embd": 0}, "model.n_embd=0 must be at least 1"),
        ({"mlp_width": 0}, "model.mlp_width=0 must be at least 1"),
        ({"n_embd": 30}, "model.n_embd=30 is not divisible by model.n_head=4; 32 is"),
        ({"n_embd": 2}, "model.n_embd=2 is not divisible by model.n_head=4; 8 is"),
        ({"n_embd": 36}, "model.positions=rope needs an even head width, n_embd / n_head is 9"),
        ({"head_dim": 0}, "model.head_dim=0 must be at least 1"),
        ({"head_dim": 7}, "model.positions=rope needs an even head width, model.head_dim is 7"),
        ({"n_kv_head": 3}, "model.n_head=4 is not divisible by model.n_kv_head=3"),
        ({"positions": "alibi"}, "model.positions='alibi' is none of rope, learned"),
        ({"norm": "batchnorm"}, "model.norm='batchnorm' is none of rmsnorm, layernorm, nor a dotted name"),
        ({"mlp": "relu"}, "model.mlp='relu' is none of swiglu, gelu, nor a dotted name"),
        ({"dropout": 1.0}, "model.dropout=1.0 is not in [0, 1)"),
        ({"dropout": -0.1}, "model.dropout=-0.1 is not in [0, 1)"),
    ],
)
def test_a_fault_names_its_field(changes, fault):
    config = small(**changes)
    (found,) = config.faults()
    assert found.startswith(fault)
    with pytest.raises(ValueError) as error:
        GPT(config)
    assert str(error.value) == found


def test_all_faults_are_told_at_once():
    fields = {"n_layer": 0, "n_embd": 30, "n_kv_head": 3, "positions": "x", "norm": "y", "mlp": "z", "dropout": 2.0}
    faults = small(**fields).faults()
    assert len(faults) == len(fields)
    for field in fields:
        assert any(f"model.{field}=" in fault for fault in faults)


@every_config
def test_a_good_config_has_no_fault(changes):
    assert small(**changes).faults() == []


@pytest.mark.parametrize("field", ["attention", "block", "norm", "mlp"])
def test_untrusted_code_is_not_imported(field):
    sys.modules.pop("this", None)
    with pytest.raises(ValueError, match="trust=this"):
        GPT(small(**{field: "this.that.Part"}))
    assert "this" not in sys.modules


def test_a_package_can_be_trusted():
    config = small(attention="torch.nn.Identity")  # takes and ignores any argument
    with pytest.raises(ValueError, match="trust=torch"):
        GPT(config)
    assert type(GPT(config, trust=("torch",)).blocks[0].attention) is nn.Identity


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptlab.model.GPTConfig", "is not a subclass of torch.nn"),
        ("gptlab.model.rotate", "is not a subclass of torch.nn"),
        ("gptlab.model.Nothing", "has no 'Nothing'"),
        ("gptlab.nowhere.Attention", "no module 'gptlab.nowhere'"),
        ("Attention", "is not a dotted name"),
    ],
)
def test_a_name_that_is_no_module_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        GPT(small(attention=name))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"n_kv_head": 2}, GPT2], ids=["own", "gpt2"])
def test_compiled_for_a_cpu_logits_and_gradients_are_those_of_eager(changes, monkeypatch):
    """Other formulas for attention, MLPs and biases, and in float64 nothing is lost by them."""
    monkeypatch.setattr("gptlab.attention.products", partial(products, block=6))
    model = build(**changes, n_layer=1)
    tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(1))

    def found(network) -> list[Tensor]:
        logits = network(tokens)
        direction = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        return [logits, *torch.autograd.grad((logits * direction).sum(), list(model.parameters()))]

    for compiled, eager in zip(found(torch.compile(model)), found(model), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)
