"""lm-evaluation-harness asks the server, and finds the network's own log-probabilities."""

import json

import pytest
import torch
from kinds import of_kind
from serving import serving, small

pytestmark = pytest.mark.slow
PAIRS = [("def f(x):\n    return", " x + 1"), ("import", " os\nimport sys"), ("", "class A:"), ("self.a = ", "None")]
TASK = """\
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    pytest.importorskip("tenacity")  # of its extra `api`
    return pytest.importorskip("lm_eval")


def score(loaded, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum of ln p of a continuation, and whether it is the likeliest throughout; by the network without a cache."""
    ids = context + continuation
    with torch.no_grad():
        logprobs = loaded.model(torch.tensor([ids]))[0].log_softmax(-1)[len(context) - 1 : -1]
    own = logprobs[range(len(continuation)), continuation]
    return float(own.sum()), bool((logprobs.argmax(-1) == torch.tensor(continuation)).all())


def test_the_harness_finds_the_network_s_own_figures(harness, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    loaded = small(of_kind("hf"), block_size=128)
    loaded.tokenizer.save(tmp_path / "tokenizer")
    (file,) = (path for path in (tmp_path / "tokenizer").iterdir() if path.read_bytes().startswith(b'{"version"'))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="</s>", bos_token="</s>")
    fast.save_pretrained(tmp_path / "fast")
    with serving(loaded) as served:
        lm = LocalCompletionsAPI(
            base_url=f"{served.url}/completions",
            model="small",
            tokenizer=str(tmp_path / "fast"),
            max_length=128,
            num_concurrent=1,
            max_retries=1,
        )
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
        found = lm.loglikelihood(asked)
        for pair, (logprob, is_greedy) in zip(PAIRS, found, strict=True):
            context, continuation = (
                lm._encode_pair(*pair) if pair[0] else ([2], loaded.tokenizer.encode(pair[1]).tolist())
            )
            assert loaded.tokenizer.decode(context + continuation) == "".join(pair)
            expected = score(loaded, context, continuation)
            assert logprob == pytest.approx(expected[0], abs=1e-3)
            assert is_greedy == expected[1]
        (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a = b\nc = d\n",), 0)])
        ids = loaded.tokenizer.encode("a = b\nc = d\n").tolist()
        assert rolling == pytest.approx(score(loaded, [2], ids)[0], abs=1e-3)
        settings = {"until": ["\n\n"], "max_gen_toks": 20, "temperature": 0}
        (said,) = lm.generate_until([Instance("generate_until", {}, ("def f", settings), 0)])
        prompt = loaded.tokenizer.encode("def f").tolist()
        _, answer = served.post(
            "/v1/completions", {"prompt": prompt, "max_tokens": 20, "temperature": 0, "stop": "\n\n"}
        )
        assert said == answer["choices"][0]["text"]

        rows = [
            {"question": q, "choices": [" yes", " no", " None"], "answer": i % 3} for i, (q, _) in enumerate(PAIRS) if q
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "pairs.yaml").write_text(TASK.replace("DATA", str(tmp_path / "pairs.jsonl")))
        report = harness.simple_evaluate(
            lm, tasks=["pairs"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False)
        )
    right = 0
    for row in rows:
        scores = [score(loaded, *lm._encode_pair(row["question"], choice))[0] for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert report["results"]["pairs"]["acc,none"] == pytest.approx(right / len(rows))
