"""Requests in OpenAI's words: the fields that mean something, those that change nothing, and a word on all others."""

import difflib
import re
import reprlib
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from gptlab.sampling import Sampling
from gptlab.serve.errors import ApiError

ANY = None  # whatever is said there
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_LOGPROBS = 16, 1000, 20

# Fields of OpenAI's that are taken with the values that change nothing. With any other they would have to do something.
NEUTRAL: dict[str, list[Any] | None] = {
    "frequency_penalty": [None, 0],
    "presence_penalty": [None, 0],
    "logit_bias": [None, {}],
    "user": ANY,
}
NEUTRAL_IN_COMPLETIONS = NEUTRAL | {"suffix": [None, ""]}
NEUTRAL_IN_CHAT = NEUTRAL | {
    "audio": [None],
    "function_call": [None, "none", "auto"],
    "functions": [None, []],
    "metadata": ANY,
    "modalities": [None, ["text"]],
    "moderation": [None],
    "parallel_tool_calls": ANY,
    "prediction": [None],
    "prompt_cache_key": ANY,
    "prompt_cache_options": ANY,
    "prompt_cache_retention": ANY,
    "reasoning_effort": [None, "none"],
    "response_format": [None, {"type": "text"}],
    "safety_identifier": ANY,
    "service_tier": [None, "auto", "default"],
    "store": [None, False],
    "tool_choice": [None, "none", "auto"],
    "tools": [None, []],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(Strict):
    """What both ways of asking have in common; `top_k`, `min_p`, `repetition_penalty`, `truncation` are gptlab's own.

    truncation=auto drops the beginning of what does not fit into the context, and a text goes on past its end.
    """

    neutral: ClassVar[dict[str, list[Any] | None]]

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @classmethod
    def of(cls, body: bytes) -> Self:
        """The request in a body. Raises ApiError that names the field, its value, and what is wrong with it."""
        try:
            content = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
        if not isinstance(content, dict):
            raise ApiError(400, f"the body must be a JSON object, not {shown(content)}", code="invalid_json")
        try:
            asked = cls.model_validate(cls._without_neutral(content))
        except ValidationError as error:
            raise invalid(error) from None
        asked.check()
        return asked

    @classmethod
    def _without_neutral(cls, content: dict[str, Any]) -> dict[str, Any]:
        meant = {}
        for name, value in content.items():
            if name in cls.model_fields:
                meant[name] = value
            elif name not in cls.neutral:
                close = difflib.get_close_matches(name[:100], [*cls.model_fields, *cls.neutral], n=1)
                hint = f", did you mean {close[0]!r}?" if close else "; leave it out"
                raise ApiError(400, f"unknown field {shown(name)}{hint}", name[:100], "unknown_parameter")
            elif (values := cls.neutral[name]) is not ANY and value not in values:
                message = f"{name}={shown(value)} is not supported by this server; leave it out"
                raise ApiError(400, message, name, "unsupported_parameter")
        return meant

    def check(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise bad("max_tokens", self.max_tokens, "0 or more")
        if self.n is not None and self.n < 1:
            raise bad("n", self.n, "at least 1")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options go with stream=true", "stream_options")
        if len(self.stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stops):
            what = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
            raise bad("stop", self.stop, what)
        self.sampling()

    def sampling(self) -> Sampling:
        given = {name: getattr(self, name) for name in Sampling.__dataclass_fields__}
        try:
            return Sampling(**{name: value for name, value in given.items() if value is not None})
        except ValueError as error:
            raise ApiError(400, str(error), re.match(r"\w*", str(error))[0], "invalid_value") from None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def likeliest(self) -> int | None:
        """How many likeliest tokens to tell beside each one's own log-probability; None: no log-probabilities."""
        raise NotImplementedError


class Completion(Asked):
    neutral = NEUTRAL_IN_COMPLETIONS

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            message = f"best_of={self.best_of} is not supported other than as n; leave it out"
            raise ApiError(400, message, "best_of", "unsupported_parameter")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise bad("logprobs", self.logprobs, f"from 0 to {MAX_LOGPROBS}")
        self.prompts()

    def likeliest(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """What to continue: a text, texts, token ids, or lists of them."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(text, str) for text in prompt):
                return prompt
            if all(type(token) is int for token in prompt):
                return [prompt]
            if all(isinstance(ids, list) and ids and all(type(token) is int for token in ids) for ids in prompt):
                return prompt
        raise bad("prompt", prompt, "a text, a list of texts, a list of token ids, or a list of such lists, none empty")


class Chat(Asked):
    neutral = NEUTRAL_IN_CHAT

    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens mean the same: give one of them"
            raise ApiError(400, message, "max_completion_tokens")
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "at least 1")
        if self.top_logprobs is not None:
            if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
                raise bad("top_logprobs", self.top_logprobs, f"from 0 to {MAX_LOGPROBS}")
            if not self.logprobs:
                raise ApiError(400, "top_logprobs go with logprobs=true", "top_logprobs")
        self.turns()

    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self) -> list[Any]:
        """The messages as `dialogue.checked` takes them: text parts joined, developer as system."""
        if not isinstance(self.messages, list) or not self.messages:
            raise bad("messages", self.messages, "a list of at least one {role, content}")
        return [turn(message, f"messages[{number}]") for number, message in enumerate(self.messages)]


def turn(message: Any, where: str) -> Any:
    if not isinstance(message, dict):
        raise bad(where, message, "an object with role and content")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            text = f"{where}.{shown(name).strip(chr(39))}={shown(value)} is not supported by this server; leave it out"
            raise ApiError(400, text, where, "unsupported_parameter")
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        raise ApiError(400, f"{where}.role={role!r}: this server runs no tools", where, "unsupported_parameter")
    if role not in ("system", "developer", "user", "assistant"):
        raise bad(f"{where}.role", role, "one of system, user, assistant")
    if isinstance(content, list):
        content = "".join(part_text(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise bad(f"{where}.content", content, "a text, or a list of text parts")
    return {"role": "system" if role == "developer" else role, "content": content}


def part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ApiError(400, f"{where}={shown(part)}: only text parts are supported", where, "unsupported_parameter")


def bad(param: str, value: Any, what: str) -> ApiError:
    return ApiError(400, f"{param}={shown(value)} must be {what}", param, "invalid_value")


def shown(value: Any) -> str:
    """A value as a message shows it, at no length."""
    return reprlib.repr(value)[:120]


def invalid(error: ValidationError) -> ApiError:
    """What pydantic found first, in one sentence."""
    first, *others = error.errors(include_url=False, include_context=False)
    field = first["loc"][0] if first["loc"] else "body"
    reasons = dict.fromkeys(one["msg"] for one in (first, *others) if one["loc"][:1] == first["loc"][:1])
    said = " or ".join(reason[0].lower() + reason[1:] for reason in reasons)
    return ApiError(400, f"{field}={shown(first['input'])}: {said}", str(field), "invalid_value")
