"""Parameter groups, the optimizer that shares its state between two, and schedules."""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gptlab.model import GPT, GPTConfig
from gptlab.optim import Muon, batches, constant, cosine, linear, orthogonal, parameter_groups, wsd

SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "betas": (0.8, 0.95), "eps": 1e-7, "width": None}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}


def build(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab_size": 64, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes))


def named_kinds(model: nn.Module) -> dict[str, str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["kind"] for group in parameter_groups(model) for p in group["params"]}


# Parameter groups


@pytest.mark.parametrize("changes", [{}, GPT2, {"tie_embeddings": False}, {"n_kv_head": 1}], ids=str)
def test_every_parameter_is_in_one_group(changes):
    model = build(**changes)
    grouped = [id(p) for group in parameter_groups(model) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_kinds():
    kinds = named_kinds(build(**GPT2, tie_embeddings=False))
    tables = {"embed.weight", "position.weight", "head.weight"}
    for name, kind in kinds.items():
        if name in tables:
            assert kind == "embedding"
        else:
            assert kind == ("vector" if name.endswith("bias") or "norm" in name else "matrix")
    assert tables <= set(kinds)


def test_a_tied_head_is_there_once():
    kinds = named_kinds(build())
    assert kinds["embed.weight"] == "embedding"
    assert [kind for kind in kinds.values() if kind == "embedding"] == ["embedding"]


def test_vectors_are_not_decayed():
    model = build(**GPT2)
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    decays = {group["kind"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"matrix": 0.5, "embedding": 0.5, "vector": 0.0}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient, decay is all there is
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if new.ndim == 2 else 1.0))


def test_frozen_parameters_are_left_out():
    model = build()
    model.embed.requires_grad_(False)
    assert {group["kind"] for group in parameter_groups(model)} == {"matrix", "vector"}


# Muon


def train(model: GPT, *optimizers, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        tokens = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(tokens).log_softmax(dim=-1)[..., 0].mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps of Jordan et al. (2024), as they stand there."""
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def naive_muon(matrices: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """The update of Jordan et al. (2024) at the size of Liu et al. (2025), matrix by matrix, in float64."""
    lr, decay, momentum = SETTINGS["lr"], SETTINGS["weight_decay"], SETTINGS["momentum"]
    found = []
    for number, matrix in enumerate(matrices):
        weight, buffer = matrix.double(), torch.zeros_like(matrix, dtype=torch.float64)
        for step in gradients:
            gradient = step[number].double()
            buffer = momentum * buffer + (1 - momentum) * gradient
            x = momentum * buffer + (1 - momentum) * gradient
            x = newton_schulz(x)
            weight = weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(matrix.shape)) * x
        found.append(weight)
    return found


@pytest.mark.parametrize("at_once", [1, 2**13, 2**26])
def test_muon_is_the_naive_muon(monkeypatch, at_once):
    """However many matrices it computes at a time."""
    monkeypatch.setattr("gptlab.optim.computes_in_bf16", lambda device: False)
    monkeypatch.setattr("gptlab.optim.AT_ONCE", at_once)
    model = build()
    optimizer = Muon(parameter_groups(model), **SETTINGS)
    matrices = next(group["params"] for group in optimizer.param_groups if group["kind"] == "matrix")
    start, gradients = [matrix.detach().clone() for matrix in matrices], []
    for step in range(5):
        train(model, optimizer, steps=1, first=step)
        gradients.append([matrix.grad.clone() for matrix in matrices])
    for expected, found in zip(naive_muon(start, gradients), matrices, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_muon_is_the_muon_and_adamw_of_torch(monkeypatch):
    """Of the same gradients: how bfloat16 rounds in one step must not be what the next one learns from."""
    monkeypatch.setattr("gptlab.optim.computes_in_bf16", lambda device: True)  # as torch does anywhere
    ours = build()
    theirs = copy.deepcopy(ours)
    groups = {group["kind"]: group for group in parameter_groups(theirs)}
    muon = torch.optim.Muon(
        groups["matrix"]["params"], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    rest = [{"params": groups["embedding"]["params"]}, {"params": groups["vector"]["params"], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-7, fused=True)
    start, our_own = copy.deepcopy(ours), Muon(parameter_groups(ours), **SETTINGS)
    for seed in range(5):
        for model in (ours, theirs):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        for optimizer in (our_own, muon, adamw):
            optimizer.step()
    matrices = {id(parameter) for parameter in groups["matrix"]["params"]}
    for (name, before), a, b in zip(start.named_parameters(), ours.parameters(), theirs.parameters(), strict=True):
        if id(b) in matrices:  # bfloat16 rounds elsewhere, and on another processor in yet another order
            assert (a - b).norm() < 0.05 * (b - before).norm(), name
        else:
            assert torch.equal(a, b), name
        assert not torch.equal(before, a), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 10), (2, 10, 24)])
def test_orthogonal_keeps_the_directions_of_the_singular_vectors(monkeypatch, shape, bf16):
    """Against the singular value decomposition itself, which Newton-Schulz stands in for."""
    monkeypatch.setattr("gptlab.optim.computes_in_bf16", lambda device: bf16)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = torch.stack(orthogonal(list(matrices))).float()
    in_their_basis = u.mT @ found @ vh.mT  # diagonal, and near 1
    diagonal = in_their_basis.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3
    torch.testing.assert_close(in_their_basis, torch.diag_embed(diagonal), rtol=0, atol=0.05 if bf16 else 1e-4)


@pytest.mark.parametrize("at_once", [2**26, 400])
def test_matrices_of_several_shapes_go_together_and_come_back_as_they_were_alone(monkeypatch, at_once):
    """Tall, long and square, of two narrower sides, in the order of their batches; in float32."""
    monkeypatch.setattr("gptlab.optim.computes_in_bf16", lambda device: False)
    monkeypatch.setattr("gptlab.optim.AT_ONCE", at_once)
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 20), (12, 12), (8, 8), (8, 20), (30, 12)]
    given = [torch.randn(shape) for shape in shapes]
    together = list(batches(given))
    assert {id(matrix) for group in together for matrix in group} == {id(matrix) for matrix in given}
    assert len(together) == (2 if at_once > 400 else 4)
    for group in together:
        assert len({min(matrix.shape) for matrix in group}) == 1
        assert sum(map(Tensor.numel, group)) <= at_once or len(group) == 1
        for matrix, found in zip(group, orthogonal(group), strict=True):
            torch.testing.assert_close(found, newton_schulz(matrix), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_rounding_does_not_grow_where_singular_values_are_far_apart(monkeypatch, power):
    """Those of gradients fall like these."""
    monkeypatch.setattr("gptlab.optim.computes_in_bf16", lambda device: True)
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(128, 320, dtype=torch.float64), full_matrices=False)
    matrix = u * torch.arange(1, 129).double() ** -power @ vh
    expected, found = newton_schulz(matrix), orthogonal([matrix.float()])[0].double()
    assert (found - expected).norm() < 1.1 * (newton_schulz(matrix.bfloat16()).double() - expected).norm()
    assert torch.linalg.matrix_norm(found, 2) < 1.35


def changes_of(n_embd: int, width: int | None) -> dict[str, Tensor]:
    """What the first step of Muon adds to each matrix of a network `n_embd` wide."""
    model = build(n_embd=n_embd)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, Muon(parameter_groups(model), **SETTINGS | {"width": width, "weight_decay": 0.0}), steps=1)
    kinds = named_kinds(model)
    return {name: new.detach() - before[name] for name, new in model.named_parameters() if kinds[name] == "matrix"}


def test_a_rate_found_at_this_width_is_torch_s():
    for name, change in changes_of(32, width=32).items():
        assert torch.equal(change, changes_of(32, width=None)[name])


def test_what_a_step_does_to_a_vector_does_not_depend_on_the_width():
    """The largest singular value of the change; Newton-Schulz leaves it between 0.7 and 1.2 of what it should be."""
    name = "blocks.0.attention.proj.weight"
    sizes = {
        width: [torch.linalg.matrix_norm(changes_of(n, width)[name], 2).item() for n in (16, 256)]
        for width in (None, 64)
    }
    assert 0.5 < sizes[64][1] / sizes[64][0] < 2
    assert sizes[None][1] / sizes[None][0] == pytest.approx(4 * sizes[64][1] / sizes[64][0], rel=0.01)


def test_muon_continues_from_a_file_bit_for_bit():
    model = build()
    optimizer = Muon(parameter_groups(model), **SETTINGS)
    train(model, optimizer, steps=3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, steps=3, first=3)

    again = build()
    restored = Muon(parameter_groups(again), **SETTINGS | {"lr": 1.0})  # the file's settings win
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    train(again, restored, steps=3, first=3)
    assert_same_weights(model, again)
    state, state_again = optimizer.state_dict()["state"], restored.state_dict()["state"]
    assert len(state) == len(list(model.parameters()))
    for key, entry in state.items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state_again[key][name]))


@pytest.mark.parametrize("restored", [False, True])
def test_a_schedule_reaches_both_halves_of_muon(restored):
    model = build()
    optimizer = Muon(parameter_groups(model), **SETTINGS)
    schedule = LambdaLR(optimizer, lambda step: float(step == 1))
    if restored:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(model)
    train(model, optimizer, steps=1)  # factor 0
    assert_same_weights(before, model)
    schedule.step()
    train(model, optimizer, steps=1)  # factor 1
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_muon_runs_a_closure_once_and_gives_back_its_loss():
    model = build()
    optimizer = Muon(parameter_groups(model), **SETTINGS)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.zeros(1, 4, dtype=torch.long)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert len(calls) == 1


def test_muon_without_matrices_is_an_error():
    groups = [group for group in parameter_groups(build()) if group["kind"] != "matrix"]
    with pytest.raises(ValueError, match="optimizer=adamw"):
        Muon(groups, **SETTINGS)


def test_muon_says_which_parameter_is_no_matrix():
    class Convolves(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(4, 2), nn.Conv1d(2, 2, 3)

    with pytest.raises(ValueError, match=r"shape \(2, 2, 3\)"):
        Muon(parameter_groups(Convolves()), **SETTINGS)


# Schedules


def test_values_by_hand():
    """100 steps, 10 of warmup, down to a tenth."""
    for schedule in (linear, cosine):
        values = [schedule(step, 100, 10, 0.1) for step in range(100)]
        assert values[0] == pytest.approx(1 / 11)
        assert values[9] == pytest.approx(10 / 11)
        assert values[10] == 1
        assert values[99] == pytest.approx(0.1)
        assert schedule(10_000, 100, 10, 0.1) == pytest.approx(0.1)  # and stays there
    assert linear(45, 100, 10, 0.1) == pytest.approx(1 - 0.9 * 35 / 89)
    assert cosine(45, 100, 10, 0.1) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 35 / 89)) / 2)
    values = [wsd(step, 100, 10, 0.2, 0.1) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert set(values[10:80]) == {1}  # the stable part
    assert values[80:] == pytest.approx([1 - 0.9 * n / 20 for n in range(1, 21)])  # the last fifth
    assert [wsd(step, 5, 0, 0.2, 0.0) for step in range(5)] == [1, 1, 1, 1, 0]  # one step of decay
    assert [constant(step, 100, 3) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


sizes = {
    "total_steps": st.integers(1, 300),
    "warmup_steps": st.integers(0, 320),
    "final_factor": st.floats(0, 1),
    "decay_fraction": st.floats(0, 1),
}


@settings(deadline=None, max_examples=150)
@given(**sizes)
def test_schedules_stay_within_bounds(total_steps, warmup_steps, final_factor, decay_fraction):
    schedules = {
        "constant": lambda step: constant(step, total_steps, warmup_steps),
        "linear": lambda step: linear(step, total_steps, warmup_steps, final_factor),
        "cosine": lambda step: cosine(step, total_steps, warmup_steps, final_factor),
        "wsd": lambda step: wsd(step, total_steps, warmup_steps, decay_fraction, final_factor),
    }
    decay_steps = decay_fraction * total_steps
    for name, schedule in schedules.items():
        values = [schedule(step) for step in range(total_steps)]
        assert min(values) >= 0, name
        assert max(values) <= 1, name
        after = values[warmup_steps:]
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after)), name
        if name in ("linear", "cosine") and warmup_steps < total_steps - 1:
            assert after[0] == 1
            assert after[-1] == pytest.approx(final_factor)
        if name == "wsd" and warmup_steps < total_steps:
            assert set(values[warmup_steps : math.floor(total_steps - decay_steps)]) <= {1.0}
            if decay_steps >= 1:  # however few they are, the last one gets there
                assert after[-1] == pytest.approx(final_factor)
