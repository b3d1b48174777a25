"""lm-evaluation-harness with a network of gptlab; needs the extra `harness`."""

from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptlab.evaluate.subject import Subject
from gptlab.evaluate.writing import written
from gptlab.sampling import Sampling
from gptlab.scoring import finite
from gptlab.tokenizer import EOS_ID

MAX_TOKENS = 256  # of a generated answer whose task does not say


@register_model("gptlab")
class HarnessModel(TemplateLM):
    """A network as the harness asks for it. A text begins as a document does, after an end token.

    Text that does not fit into the context loses its beginning.
    """

    def __init__(self, subject: Subject, batch_size: int):
        super().__init__()
        self.subject, self.batch_size = subject, batch_size

    @property
    def eot_token_id(self) -> int:
        return EOS_ID

    @property
    def max_length(self) -> int:
        return self.subject.block_size

    @property
    def tokenizer_name(self) -> str:
        return self.subject.tokenizer.fingerprint

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        return self.subject.tokenizer.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As that of TemplateLM, which imports transformers for it: white space between them goes with what follows."""
        stripped = context.rstrip()
        whole, before = self.tok_encode(context + continuation), self.tok_encode(stripped)
        return [EOS_ID, *before], whole[len(before) :]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of (what the cache calls it, context, continuation): the log-likelihood, and whether it is the likeliest."""
        if (longest := max(len(after) for _, _, after in requests)) > self.max_length:
            raise ValueError(
                f"--harness: an answer of {longest} tokens is to be scored, and the context is model.block_size="
                f"{self.max_length}: leave that task out, or evaluate a network with more"
            )
        rows = [(before + after)[-(self.max_length + 1) :] for _, before, after in requests]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for first in range(0, len(order), self.batch_size):
            numbers = order[first : first + self.batch_size]
            ids = torch.full((len(numbers), len(rows[numbers[0]])), EOS_ID)
            for into, number in zip(ids, numbers, strict=True):
                into[: len(rows[number])] = torch.tensor(rows[number])
            nll, likeliest = (out.cpu() for out in self.subject.scorer(ids[:, :-1], ids[:, 1:]))
            hits = likeliest == ids[:, 1:]
            for row, number in enumerate(numbers):
                end = len(rows[number]) - 1
                own = slice(max(0, end - len(requests[number][2])), end)
                found[number] = -float(nll[row, own].double().sum()), bool(hits[row, own].all())
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token scored once, with as much before it as the context holds."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=EOS_ID, max_seq_len=self.max_length, context_len=1
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(nll for nll, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to what the task stops at. Those that it asks for in one way are written together."""
        found = [""] * len(requests)
        ways: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            ways.setdefault(repr(request.args[1]), []).append(number)
        for numbers in ways.values():
            settings = requests[numbers[0]].args[1]
            stops = settings.get("until") or []
            stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
            most = int(settings.get("max_gen_toks", MAX_TOKENS))
            room = max(self.max_length - most, (self.max_length + 1) // 2)  # then the context slides
            prompts = [self.subject.loaded.prompt_ids(requests[number].args[0])[-room:] for number in numbers]
            texts = written(self.subject.loaded, prompts, most, sampling_of(settings), stops, self.batch_size)
            for number, (text, _) in zip(numbers, texts, strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """How a task wants its answers drawn: the likeliest tokens, unless it says `do_sample`."""
    if not settings.get("do_sample"):
        return Sampling(temperature=0)
    named = {name: settings[name] for name in ("temperature", "top_k", "top_p") if settings.get(name) is not None}
    return Sampling(**named, seed=0)


def evaluated(
    subject: Subject, tasks: list[str], include_path: Path | None, batch_size: int, limit: int | None, shots: int | None
) -> dict[str, Any]:
    """The figures of each task, and of how many examples. Raises ValueError for a task that nobody knows."""
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"--harness {','.join(unknown)}: lm-evaluation-harness knows no such task; --include-path names a folder "
            "of your own, each a YAML file with `task: <name>`"
        )
    found = simple_evaluate(
        HarnessModel(subject, batch_size),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=shots,
        bootstrap_iters=1000,
        log_samples=False,
    )
    figures = {}
    for task, row in found["results"].items():
        named = {key.removesuffix(",none"): value for key, value in row.items() if key not in ("alias", "name")}
        figures[task] = {key: finite(value) if isinstance(value, int | float) else None for key, value in named.items()}
        figures[task]["n"] = found.get("n-samples", {}).get(task, {}).get("effective")
    return figures
