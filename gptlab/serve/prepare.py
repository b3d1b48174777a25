"""From what a client asked for to what the engine is asked for."""

import sys
from dataclasses import dataclass

from gptlab import dialogue
from gptlab.engine import Request
from gptlab.loading import Loaded
from gptlab.safety import Safety
from gptlab.serve.errors import ApiError
from gptlab.serve.limits import MAX_SAMPLES, Limits
from gptlab.serve.schema import Asked, Chat, Completion
from gptlab.tokenizer import EOS_ID


@dataclass
class Prepared:
    """Requests for the engine, one for each prompt, and the prompts' texts."""

    requests: list[Request]
    texts: list[str]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


def count(asked: Asked, limits: Limits) -> int:
    """The samples that are asked for. Raises ApiError for too many."""
    n, prompts = asked.n or 1, len(asked.prompts()) if isinstance(asked, Completion) else 1
    if n > limits.parallel:
        message = f"n={n} is more than the {limits.parallel} samples that run at a time"
        raise ApiError(400, message, "n", "invalid_value")
    if n * prompts > MAX_SAMPLES:
        message = f"{prompts} prompts times n={n} are more than the {MAX_SAMPLES} samples that a request may have"
        raise ApiError(400, message, "prompt", "invalid_value")
    return n * prompts


class Preparer:
    """Makes a `Prepared` of a request, for one model. Raises ApiError for what that model does not take."""

    def __init__(self, loaded: Loaded, limits: Limits, safety: Safety):
        self.loaded, self.tokenizer, self.safety = loaded, loaded.tokenizer, safety
        self.block_size = loaded.model.config.block_size
        self.max_tokens = safety.max_tokens(limits.max_tokens)
        self.allowed = safety.allowed(self.tokenizer, loaded.stop_ids)

    def completion(self, asked: Completion) -> Prepared:
        slides = asked.truncation == "auto"
        given = asked.prompts()
        prompts = [self._ids(prompt, asked) for prompt in given]
        texts = [one if isinstance(one, str) else self.tokenizer.decode(one) for one in given]
        for text in texts:
            self._require_prompt(text)
        requests = []
        for ids in prompts:
            room = self._room(len(ids), slides)
            max_tokens = self._max_tokens(asked.max_tokens, 16, room, "max_tokens", len(ids))
            requests.append(self._request(asked, ids, max_tokens, slides, bool(asked.echo)))
        return Prepared(requests, texts)

    def chat(self, asked: Chat) -> Prepared:
        if not self.loaded.knows_turns:
            message = "this is a base model, which knows no turns: it continues text, at /v1/completions"
            raise ApiError(400, message, "messages", "unsupported_model")
        try:
            messages = dialogue.checked(asked.turns())
        except ValueError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from None
        for message in messages:
            self._require_prompt(message["content"])
        param = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
        wanted = getattr(asked, param)
        if asked.truncation == "auto":
            half = max(self.block_size // 2, 1)
            max_tokens = self._max_tokens(wanted, half, None, param, 0)
            try:
                ids, _ = dialogue.prompt(self.tokenizer, messages, self.block_size - min(max_tokens, half))
            except ValueError as error:
                raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
        else:
            ids, _ = dialogue.prompt(self.tokenizer, messages, sys.maxsize)
            room = self._room(len(ids), slides=False)
            max_tokens = self._max_tokens(wanted, self.max_tokens, room, param, len(ids))
        request = self._request(asked, ids, max_tokens)
        return Prepared([request], ["\n".join(message["content"] for message in messages)])

    def _ids(self, prompt: str | list[int], asked: Completion) -> list[int]:
        if isinstance(prompt, str):
            ids = self.loaded.prompt_ids(prompt)
        else:
            ids, marks = prompt, len(self.tokenizer.special_tokens) if self.safety.mode == "strict" else 0
            for token in ids:
                if not 0 <= token < self.tokenizer.vocab_size:
                    message = f"token id {token} is not from 0 to {self.tokenizer.vocab_size - 1}"
                    raise ApiError(400, message, "prompt", "invalid_value")
                if token < marks and token != EOS_ID:
                    message = f"token id {token} is a mark, which safety_mode=strict takes from nobody"
                    raise ApiError(400, message, "prompt", "invalid_value")
        if len(ids) > self.block_size and asked.truncation == "auto":
            if asked.echo:
                message = f"a prompt of {len(ids)} tokens, past the context of {self.block_size}, cannot be echoed"
                raise ApiError(400, message, "echo", "context_length_exceeded")
            ids = ids[-self.block_size :]
        return ids

    def _require_prompt(self, text: str) -> None:
        try:
            self.safety.require_prompt(text)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt", "invalid_value") from None

    def _room(self, prompt_tokens: int, slides: bool) -> int | None:
        """The tokens that can come after a prompt: the last one is drawn when the context is full. None: any number."""
        if slides:
            return None
        if prompt_tokens > self.block_size:
            message = f"the prompt has {prompt_tokens} tokens, and the context {self.block_size}"
            raise ApiError(400, f"{message}: shorten it, or ask for truncation=auto", None, "context_length_exceeded")
        return self.block_size - prompt_tokens + 1

    def _max_tokens(self, wanted: int | None, default: int, room: int | None, param: str, prompt_tokens: int) -> int:
        if wanted is None:
            return min(default, self.max_tokens, default if room is None else room)
        if wanted > self.max_tokens:
            message = f"{param}={wanted} is more than the {self.max_tokens} that this server gives"
            raise ApiError(400, message, param, "invalid_value")
        if room is not None and wanted > room:
            message = f"{param}={wanted} after a prompt of {prompt_tokens} tokens do not fit into the context of "
            message += f"{self.block_size}: ask for at most {room}, or for truncation=auto"
            raise ApiError(400, message, param, "context_length_exceeded")
        return wanted

    def _request(
        self, asked: Asked, ids: list[int], max_tokens: int, slides: bool = False, echo: bool = False
    ) -> Request:
        likeliest = asked.likeliest()
        return Request(
            ids,
            max_tokens,
            asked.sampling(),
            asked.n or 1,
            self.loaded.stop_ids,
            slides=slides,
            logprobs=likeliest,
            prompt_logprobs=echo and likeliest is not None,
            allowed=self.allowed,
        )
