"""lm-evaluation-harness, where it is installed: tasks of one's own without a network, and figures found another way."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import door
from test_evaluate import TEXTS, by_hand, evaluated, run, trained  # noqa: F401

from gptlab import options
from gptlab.evaluate.subject import Subject
from gptlab.loading import load

QUESTIONS = [("The cat", [" sees", " zzzz"], 0), ("A dog ", ["runs.", "qqqq", "sleeps"], 2)]

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWER = """
task: own_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answer.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tasks(run, tmp_path) -> Path:  # noqa: F811
    """A folder of three tasks; of the answers that the last wants, all but one are the model's own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in (("choice", CHOICE), ("rolling", ROLLING), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    write_rows(folder / "choice.jsonl", [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS])
    write_rows(folder / "rolling.jsonl", [{"text": text} for text in TEXTS if text])
    own = load(run)
    prompts = ["The", "A cat", "Old", "Red"]
    answers = [own.generate(prompt, 6, stop=("\n",), temperature=0) for prompt in prompts]
    rows = [{"question": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    rows[-1]["answer"] += "?"
    write_rows(folder / "answer.jsonl", rows)
    return folder


def likeliest(run: Path, question: str, choices: list[str]) -> int:  # noqa: F811
    """Which of the choices the network finds likeliest, each scored by a pass of its own."""
    loaded, sums = load(run), []
    for choice in choices:
        stripped = question.rstrip()
        before = loaded.prompt_ids(stripped)
        ids = loaded.prompt_ids(question + choice)
        logp = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)
        sums.append(sum(float(logp[at - 1, ids[at]]) for at in range(len(before), len(ids))))
    return max(range(len(sums)), key=sums.__getitem__)


@pytest.mark.slow
def test_tasks_of_ones_own_have_the_figures_that_another_way_finds(run, tasks):  # noqa: F811
    pytest.importorskip("lm_eval")
    words = ("--harness", "own_choice, own_rolling,own_answer", "--include-path", str(tasks))
    found = evaluated(run, *words)["harness"]
    right = [likeliest(run, question, choices) == answer for question, choices, answer in QUESTIONS]
    assert found["own_choice"]["acc"] == pytest.approx(sum(right) / len(right))
    assert found["own_answer"]["exact_match"] == pytest.approx(3 / 4)
    assert found["own_answer"]["n"] == 4
    # Documents of more than one context are read by the harness with more before each token, and without an end.
    short = [text for text in TEXTS if text and len(text.encode()) < 16]
    write_rows(tasks / "rolling.jsonl", [{"text": text} for text in short])
    found = evaluated(run, "--harness", "own_rolling", "--include-path", str(tasks))["harness"]
    nll = 0.0
    for text in short:
        loaded = load(run)
        ids = loaded.prompt_ids(text)
        logp = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)
        nll -= sum(float(logp[at - 1, ids[at]]) for at in range(1, len(ids)))
    text_bytes = sum(len(text.encode()) for text in short)
    assert found["own_rolling"]["bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.slow
def test_it_asks_no_network_and_leaves_standard_output_alone(run, tasks):  # noqa: F811
    pytest.importorskip("lm_eval")
    done = door("evaluate", str(run), "--harness", "own_choice", "--include-path", str(tasks), "--limit", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["harness"]["own_choice"]["n"] == 1


@pytest.mark.slow
def test_a_task_that_nobody_knows_is_named(run, tasks):  # noqa: F811
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="--harness nowhere: lm-evaluation-harness knows no such task"):
        evaluated(run, "--harness", "own_choice,nowhere", "--include-path", str(tasks))


@pytest.mark.slow
def test_the_exported_folder_has_the_same_figures_by_the_harness_own_model(run, tasks, tmp_path):  # noqa: F811
    """transformers reads the export and knows nothing of gptlab; the token that begins a document is its own BOS."""
    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from gptlab.evaluate.harness import HarnessModel

    done = door("export", str(run), str(tmp_path / "hf"), "--format", "hf")
    assert done.returncode == 0, done.stderr
    theirs = huggingface.HFLM(str(tmp_path / "hf"), device="cpu", dtype="float32", add_bos_token=True)
    ours = HarnessModel(Subject.of(options.evaluate().parse_args([str(run)])), batch_size=3)

    pairs = [("The cat", " sees"), ("A dog ", "runs."), ("Old and young birds like", " red trees"), ("x\n", "é")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (value, is_likeliest), (other, other_is) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True
    ):
        assert value == pytest.approx(other, rel=1e-5)
        assert is_likeliest == other_is
    texts = [
        Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(t for t in TEXTS if t)
    ]
    plain = huggingface.HFLM(
        str(tmp_path / "hf"), device="cpu", dtype="float32", add_bos_token=False
    )  # it adds its own
    assert ours.loglikelihood_rolling(texts) == pytest.approx(plain.loglikelihood_rolling(texts), rel=1e-5)

    names = ["own_choice", "own_answer"]
    found = lm_eval.simple_evaluate(
        theirs, tasks=names, task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0
    )["results"]
    own = evaluated(run, "--harness", ",".join(names), "--include-path", str(tasks))["harness"]
    assert own["own_choice"]["acc"] == found["own_choice"]["acc,none"]
    assert own["own_answer"]["exact_match"] == found["own_answer"]["exact_match,none"]


def test_without_it_the_extra_is_named(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gptlab.evaluate.harness", raising=False)
    monkeypatch.delattr("gptlab.evaluate.harness", raising=False)
    with pytest.raises(ValueError, match=r"gptlab\[harness\]"):
        evaluated(run, "--harness", "own_choice", "--include-path", str(tmp_path))
