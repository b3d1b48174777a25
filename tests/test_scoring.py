"""Scoring: the sums of a plain loop, the figures of training's metric, and nothing of what a mask leaves out."""

import math

import pytest
import torch
from test_engine import GPT2, build

from gptlab.scoring import Scorer, figures, require_finite, score, token_bytes, token_sums
from gptlab.tasks.metrics import TokenMetrics
from gptlab.tokenizer import EOS_ID, ByteTokenizer, CharTokenizer

BYTES_OF = torch.arange(50) % 4


def batch(seed: int = 0, rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (rows, length + 1), generator=generator)
    ids[:, 5] = EOS_ID
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": mask}


@pytest.mark.parametrize("changes", [{}, GPT2, {"vocab_size": 45}], ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_sums_are_those_of_a_plain_loop(changes, separate):
    model = build(**changes).float()
    scorer, one = Scorer(model, separate_documents=separate), batch()
    for name in ("tokens", "targets"):
        one[name] = one[name] % 45
    total, _ = score(scorer, [one, batch(1, rows=1) if not changes else one], BYTES_OF)
    expected = torch.zeros(4, dtype=torch.float64)
    for each in [one, batch(1, rows=1) if not changes else one]:
        for tokens, targets, mask in zip(each["tokens"], each["targets"], each["loss_mask"], strict=True):
            for at in range(len(tokens)):
                # after the end token at place 5, or what is 5 after a target's shift, another document begins
                ends = [place for place in range(at) if tokens[place] == EOS_ID]
                start = ends[-1] + 1 if separate and ends else 0
                logits = model(tokens[None, start : at + 1])[0, -1].detach().double()
                if mask[at]:
                    target = int(targets[at])
                    hit = int(logits.argmax()) == target
                    nll = -float(logits.log_softmax(-1)[target])
                    expected += torch.tensor([nll, 1, hit, int(BYTES_OF[target])], dtype=torch.float64)
    assert total.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_sums_by_source_add_up():
    scorer, batches = Scorer(build().float()), [batch(seed) | {"source": torch.tensor([0, 1, 1])} for seed in range(3)]
    total, by_source = score(scorer, batches, BYTES_OF, n_sources=2)
    assert by_source.sum(0).tolist() == pytest.approx(total.tolist())
    alone = [{name: values[:1] for name, values in one.items() if name != "source"} for one in batches]
    assert by_source[0].tolist() == pytest.approx(score(scorer, alone, BYTES_OF)[0].tolist(), rel=1e-5)


def test_the_metric_of_training_has_the_same_figures():
    metric, total = TokenMetrics(BYTES_OF), torch.zeros(4, dtype=torch.float64)
    for seed in range(5):
        one = batch(seed)
        nll, guess = torch.rand(one["targets"].shape), one["targets"] % 7
        metric.update(nll, guess, one["targets"], one["loss_mask"])
        total += token_sums(nll, guess, one["targets"], one["loss_mask"], BYTES_OF)
    assert metric.compute() == figures(total.tolist())


def test_figures_follow_from_sums():
    found = figures([math.log(2) * 30, 10, 4, 20])
    assert found == pytest.approx({"loss": 3 * math.log(2), "perplexity": 8, "bits_per_byte": 1.5, "accuracy": 0.4})
    assert all(math.isnan(figures([0, 0, 0, 0])[name]) for name in ("loss", "bits_per_byte", "accuracy"))
    assert math.isfinite(figures([1e6, 1, 0, 1])["perplexity"])


def test_bytes_of_tokens():
    tokenizer = CharTokenizer.train(["aé"])
    widths = token_bytes(tokenizer)
    assert widths[EOS_ID] == 0
    assert widths[tokenizer.encode("aé")].tolist() == [1, 2]
    assert token_bytes(ByteTokenizer()).sum() == 256


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_is_that_of_the_word(precision):
    exact, _ = Scorer(build(), "64-true")(batch()["tokens"], batch()["targets"])
    near, _ = Scorer(build(), precision)(batch()["tokens"], batch()["targets"])
    error = float((near.double() - exact).abs().max())
    assert 1e-4 < error < 0.5  # rounded to 8 bits, and no further off than that


def test_a_weight_that_is_no_number_is_named_with_its_file():
    model = build()
    require_finite(model, "a.ckpt")
    model.blocks[1].mlp.proj.weight.data[0, :2] = torch.tensor([math.inf, math.nan])
    with pytest.raises(ValueError, match=r"a\.ckpt: 2 of the .* weights of blocks\.1\.mlp\.proj\.weight"):
        require_finite(model, "a.ckpt")
