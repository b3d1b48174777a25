"""Prompts with known completions: the loss by a plain loop, scores that can be counted, and a model that is right."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_evaluate import evaluated, run, trained  # noqa: F401

from gptlab.evaluate.pairs import nearness, read_pairs
from gptlab.loading import load

PAIRS = [("The ", "cat sees."), ("", "A dog"), ("Who is é? ", "é\n")]


def write(path: Path, pairs) -> Path:
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_loss_is_that_of_the_completions_alone(run, tmp_path):  # noqa: F811
    loaded, nll, tokens, correct = load(run), 0.0, 0, 0
    for prompt, completion in PAIRS:
        before, after = loaded.prompt_ids(prompt), loaded.tokenizer.encode(completion).tolist()
        logits = loaded.model(torch.tensor([before + after]))[0, len(before) - 1 : -1].detach().double()
        nll += float(F.cross_entropy(logits, torch.tensor(after), reduction="sum"))
        correct += int((logits.argmax(-1) == torch.tensor(after)).sum())
        tokens += len(after)
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    for size in ("1", "2", "8"):
        found = evaluated(run, "--pairs", str(path), "--batch-size", size)
        assert found["pairs"]["loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert found["pairs"]["accuracy"] == pytest.approx(correct / tokens)
        assert (found["pairs"]["n"], found["pairs"]["tokens"]) == (3, tokens)
        assert found["split"] is found["loss"] is None  # nothing else was asked for


def test_a_model_that_says_what_is_wanted_is_right(run, tmp_path):  # noqa: F811
    """Its own likeliest answers are the completions that are wanted; other ones are not."""
    loaded = load(run)
    own = [(prompt, loaded.generate(prompt, 8, temperature=0)) for prompt in ("The", "A cat", "Old ")]
    assert all(text for _, text in own)
    path = write(tmp_path / "own.jsonl", own)
    found = evaluated(run, "--pairs", str(path), "--max-tokens", "8")["pairs"]
    assert found["exact_match"] == 1
    assert [example["written"] for example in found["examples"]] == [text for _, text in own]
    path = write(tmp_path / "other.jsonl", [(prompt, text + "?") for prompt, text in own])
    assert evaluated(run, "--pairs", str(path), "--max-tokens", "8")["pairs"]["exact_match"] == 0


def test_an_answer_ends_before_a_stop_text(run, tmp_path):  # noqa: F811
    text = load(run).generate("The", 10, temperature=0)
    stop = text[4]
    path = write(tmp_path / "pairs.jsonl", [("The", text)])
    found = evaluated(run, "--pairs", str(path), "--stop", stop, "--max-tokens", "10")["pairs"]
    assert found["examples"][0]["written"] == text[: text.index(stop)]


def test_equal_texts_are_as_near_as_can_be():
    texts = ["the cat sees the old red dog", "a bird sleeps and the dog runs"]
    assert nearness(texts, texts) == pytest.approx(
        dict.fromkeys(("exact_match", "bleu", "rouge1", "rouge2", "rougeL"), 1)
    )
    assert nearness([f" {text}\n" for text in texts], texts)["exact_match"] == 1
    assert set(nearness(["x", ""], ["y", "z"]).values()) == {0}


def test_scores_are_those_that_one_counts():
    found = nearness(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougeL"] == pytest.approx(5 / 6)
    assert found["bleu"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_letters_beyond_a_to_z_are_words_too():
    found = nearness(["¿Qué color?"], ["¿qué, marrón?"])
    assert found["rouge1"] == pytest.approx(0.5)  # one of two


def test_sacrebleu_and_rouge_score_agree():
    """The implementations that papers use, where they are installed."""
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    texts = ["the cat sat on a mat, and slept.", "it's 3.5 dogs (or 4) that run away", "a b c d e f g"]
    wanted = ["the cat sat on the mat and slept.", "it's 3.5 dogs (or 5) that ran away", "a b c d x f g"]
    found = nearness(texts, wanted)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [wanted]).score / 100, abs=1e-6)
    scorer = rouge.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(one, other)[name].fmeasure for one, other in zip(wanted, texts, strict=True)]
        assert found[name] == pytest.approx(sum(each) / len(each), abs=1e-6)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "a"}', "line 2 has no text called 'completion'"),
        ('{"prompt": 1, "completion": "b"}', "line 2 has no text called 'prompt'"),
        ('["a", "b"]', "line 2 has no text called 'prompt'"),
        ('{"prompt": "a", "completion": ""}', "line 2 has an empty completion"),
        ('{"prompt": "a", ', "line 2 is no JSON"),
    ],
)
def test_rows_that_are_no_pairs_are_named(tmp_path, row, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + row)
    with pytest.raises(ValueError, match=said):
        read_pairs(path)


def test_a_pair_that_does_not_fit_into_the_context_is_named(run, tmp_path):  # noqa: F811
    path = write(tmp_path / "pairs.jsonl", [("a", "b"), ("a" * 10, "b" * 7)])
    with pytest.raises(ValueError, match=r"line 2: prompt and completion have 17 tokens and the context is .*=16"):
        evaluated(run, "--pairs", str(path))
    assert evaluated(run, "--pairs", str(write(path, [("a" * 10, "b" * 6)])))["pairs"]["n"] == 1
