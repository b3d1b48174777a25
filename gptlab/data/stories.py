"""Text of exactly known entropy: short stories in English and Spanish, and questions that only their facts answer.

What is hard here are latent facts, bound early and needed late; noise there is none, since answers have probability 1.
To extend the grammar, add a line to LINES, in the small language of slots that `_slot` reads; what would have two
derivations is refused. Another one is a `Grammar` of another `step`.
"""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.data.corpus import Source
from gptlab.data.document import Document
from gptlab.data.grammar import Choice, Grammar, Optimum

LINES_A_STORY = 3
NUMBERS = tuple("23456789")
WORDS = {
    "en": {
        "name": ("Mara", "Tom", "Paul", "Vera", "Hugo", "Rita"),
        "colour": ("red", "blue", "green", "white", "yellow", "pink"),
        "thing": ("key", "boat", "lamp", "chair", "shoe", "kite"),
    },
    "es": {
        "name": ("Lola", "Juan", "Berta", "Pedro", "Nuria", "Iván"),
        "colour": ("rojo", "azul", "verde", "blanco", "gris", "marrón"),
        "thing": ("llave", "barca", "silla", "caja", "taza", "vela"),
    },
}
STORIES = {
    "en": (
        "Once {name1} had {n} {colour1} {thing}s. The {thing} of {name2} was {colour2}.\n",
        "These {thing}s are old. The {thing}s of {name1} are {n}, all {colour1}; that of {name2}, {colour2}.\n",
    ),
    "es": (
        "Un día {name1} tenía {n} {thing}s de color {colour1}. La {thing} de {name2} era de color {colour2}.\n",
        "Hay {thing}s: las {thing}s de {name1} son {n}, de color {colour1}; la de {name2}, {colour2}.\n",
    ),
}
# After the story come LINES_A_STORY of these, each drawn anew. Q: asks, A: answers, T: calls a tool, O: is its output.
LINES = {
    "en": (
        "Q: Who has something {colour*}?\nA: {name*}, {colour*}.\n",
        "Q: What colour has {name*}?\nA: {name*}, {colour*}.\n",
        "Q: How many are {colour1}?\nA: {n}.\n",
        "Q: How many has {name1} with {x} more?\nA: {n+x}.\n",
        "Q: Add {x} by tool.\nT: add({n}, {x})\nO: {n+x}\nA: {n+x}.\n",
        "Drum: {k*ta}\nQ: How often?\nA: {#k}.\n",
        "Count to {x}: {1..x}.\n",
    ),
    "es": (
        "Q: ¿Quién tiene algo {colour*}?\nA: {name*}, {colour*}.\n",
        "Q: ¿Qué color tiene {name*}?\nA: {name*}, {colour*}.\n",
        "Q: ¿Cuántas hay de color {colour1}?\nA: {n}.\n",
        "Q: ¿Cuántas tiene {name1} con {x} más?\nA: {n+x}.\n",
        "Q: Suma {x} a máquina.\nT: add({n}, {x})\nO: {n+x}\nA: {n+x}.\n",
        "Oye: {k*ta}\nQ: ¿Cuántas?\nA: {#k}.\n",
        "Cuenta hasta {x}: {1..x}.\n",
    ),
}
HEDGES = {"en": "I think that it is {}.", "es": "Creo que la respuesta es {}."}


class State(NamedTuple):
    """Where a text stands: before part `part` of a line, or between lines, where `line` is empty."""

    language: str = ""
    line: str = ""
    part: int = 0
    facts: tuple[tuple[str, str], ...] = ()  # those that what follows may need: few, so that states are few
    lines_left: int = LINES_A_STORY


def step(state: State) -> list[Choice]:
    """The alternatives at `state`; none at its end."""
    if state.line:
        part = _parts(state.line)[state.part]
        if state.part % 2 == 0:
            return [Choice(1.0, part, _after(state, dict(state.facts)), "grammar")]
        options = _slot(state.language, part, dict(state.facts))
        return [Choice(p, text, _after(state, facts), kind, fact) for p, text, facts, kind, fact in options]
    if not state.lines_left:
        return []
    if not state.language:  # the story: its facts stay
        opened = [(language, line) for language in STORIES for line in STORIES[language]]
        return [
            Choice(1 / len(opened), _parts(line)[0], State(language, line, 1), "grammar") for language, line in opened
        ]
    rest = state._replace(lines_left=state.lines_left - 1)
    if not rest.lines_left:
        rest = rest._replace(facts=())
    lines, choices = LINES[state.language], []
    for line in lines:  # what it binds stays in the line, so that what follows does not depend on it
        facts = tuple(fact for fact in state.facts if fact[0] in _read(line, 1))
        choices.append(
            Choice(1 / len(lines), _parts(line)[0], State(state.language, line, 1, facts, 0), "grammar", then=rest)
        )
    return choices


def _slot(language: str, slot: str, facts: dict[str, str]) -> list[tuple[float, str, dict[str, str], str, str | None]]:
    """What may stand in a slot, each as probability, text, the facts after it, kind, and the fact told.

    {name1} is drawn where it is new, unlike name2, and else repeated; {name*} that of one of the two, the same one all
    through the line; {n+x} a sum; {1..x} all numbers up to x; {k*ta} draws k, and says "ta" so often; {#k} that number.
    """
    if slot.startswith("1.."):
        return [(1.0, " ".join(map(str, range(1, int(facts[slot[3:]]) + 1))), facts, "counting", None)]
    if slot.startswith("#"):
        return [(1.0, facts[slot[1:]], facts, "counting", None)]
    if slot.endswith("*"):
        sides = facts.get("*", "12")
        told = [(side, slot[:-1] + side) for side in sides]
        return [(1 / len(sides), facts[fact], facts | {"*": side}, "recall", fact) for side, fact in told]
    if slot in facts:
        return [(1.0, facts[slot], facts, "recall", slot)]
    if "+" in slot:
        total = str(sum(int(facts[name]) for name in slot.split("+")))
        return [(1.0, total, facts | {slot: total}, "arithmetic", slot)]
    name, _, word = slot.partition("*")
    taken = {value for fact, value in facts.items() if fact.rstrip("12") == name.rstrip("12")}
    values = [value for value in WORDS[language].get(name.rstrip("12"), NUMBERS) if value not in taken]
    texts = [" ".join([word] * int(value)) + "." if word else value for value in values]
    return [
        (1 / len(values), text, facts | {name: value}, "grammar", name)
        for text, value in zip(texts, values, strict=True)
    ]


def _after(state: State, facts: dict[str, str]) -> State:
    """The state one part further on, with the facts that are still needed."""
    part, parts = state.part + 1, _parts(state.line)
    ends = part == len(parts)
    needed = frozenset() if ends else _read(state.line, part)
    if state.lines_left:
        needed |= _asked(state.language)
    kept = tuple(sorted((fact, value) for fact, value in facts.items() if fact in needed))
    return state._replace(line="" if ends else state.line, part=0 if ends else part, facts=kept)


@cache
def _parts(line: str) -> tuple[str, ...]:
    """Fixed text at even places, slots at odd ones."""
    return tuple(re.split(r"\{(.*?)\}", line))


@cache
def _read(line: str, part: int) -> frozenset[str]:
    """The facts that a line reads from `part` on."""
    slots = [slot for place, slot in enumerate(_parts(line)) if place % 2 and place >= part]
    names = {name for slot in slots for name in re.findall(r"[a-z]+[12*]?", slot.partition("*ta")[0])}
    both = {name[:-1] + side for name in names if name.endswith("*") for side in "12"}
    return frozenset(names | both | set(slots) | ({"*"} if both else set()))


@cache
def _asked(language: str) -> frozenset[str]:
    return frozenset().union(*(_read(line, 1) for line in LINES[language]))


GRAMMAR = Grammar(step, State())


def story(seed: int, index: int) -> str:
    return _text(GRAMMAR.sample(random.Random(f"{seed}/{index}")))


def _text(choices: list[Choice]) -> str:
    return "".join(choice.text for choice in choices)


class Stories(Source):
    """`documents` texts of the grammar; the i-th is a function of (seed, i) alone."""

    def __init__(self, documents: int, seed: int):
        if documents < 1:
            raise ValueError(f"data.source.documents={documents} must be at least 1")
        self.count, self.seed = documents, seed

    def paths(self) -> list[Path]:
        return []

    def read(self, path: Path) -> Iterator[Document]:
        raise ValueError(f"{path}: stories are generated, and read from no file")

    def documents(self) -> Iterator[Document]:
        for index in range(self.count):
            yield Document(f"story {index}", story(self.seed, index))

    @property
    def kinds(self) -> list[type]:
        return [Stories, Grammar]

    @property
    def settings(self) -> dict:
        return {"documents": self.count, "seed": self.seed}

    def optimum(self, text: str) -> Optimum:
        """What the best possible model makes of a story. Raises ValueError for a text that cannot come up."""
        return GRAMMAR.optimum(text)


# What later stages learn from, and are verified on; each is a function of (seed, index) alone.


def conversation(seed: int, index: int) -> list[dict[str, Any]]:
    """A story as messages {role, content}; a call of the tool has `tool_calls` [{name, arguments}] instead."""
    return _messages(story(seed, index))


def tool_conversation(seed: int, index: int) -> list[dict[str, Any]]:
    """A conversation in which the tool is called at least once, and so its call is known to be right."""
    rng = random.Random(f"tool/{seed}/{index}")
    while "\nT: " not in (text := _text(GRAMMAR.sample(rng))):
        continue
    return _messages(text)


def _messages(text: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for line in text.splitlines():
        if line.startswith("T: "):
            name, a, b = re.fullmatch(r"T: (\w+)\((\d+), (\d+)\)", line).groups()
            call = {"name": name, "arguments": {"a": int(a), "b": int(b)}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            continue
        role = {"A": "assistant", "O": "tool"}.get(line.partition(": ")[0], "user")
        content = line.removeprefix("Q: ").removeprefix("A: ").removeprefix("O: ")
        if role == "user" and messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


@dataclass(frozen=True)
class Preference:
    """Two answers to `prompt`, and which one a judge preferred, whose odds are known (Bradley and Terry 1952)."""

    prompt: list[dict[str, Any]]
    first: str
    second: str
    probability: float  # that the first is preferred: a sigmoid of the difference of their rewards
    first_is_preferred: bool  # as drawn with it


def reward(answer: str, truth: str) -> float:
    """2 for an answer that tells the true facts, and 1 for one that says nothing else."""
    words, facts = re.findall(r"\w+", answer), re.findall(r"\w+", truth)
    return 2.0 * (set(facts) <= set(words)) + 1.0 * (len(words) == len(facts))


def preference(seed: int, index: int) -> Preference:
    """Two answers to a question of a story, each right or wrong, short or hedged, by the toss of a coin."""
    rng = random.Random(f"preference/{seed}/{index}")
    while True:  # a story may ask nothing
        choices = GRAMMAR.sample(rng)
        messages = _messages(_text(choices))
        places = [i for i, said in enumerate(messages) if said["role"] == "assistant" and said["content"]]
        if places:
            break
    place, language = rng.choice(places), choices[0].state.language
    truth = messages[place]["content"].rstrip(".")
    first = second = _answer(rng, language, truth)
    while second == first:
        second = _answer(rng, language, truth)
    probability = 1 / (1 + math.exp(reward(second, truth) - reward(first, truth)))
    return Preference(messages[:place], first, second, probability, rng.random() < probability)


def _answer(rng: random.Random, language: str, truth: str) -> str:
    said = truth
    if rng.random() < 0.5:
        fact = rng.choice(re.findall(r"\w+", truth))  # "Rita, pink" may be wrong in either
        kinds = [words for words in WORDS[language].values() if fact in words]
        others = kinds[0] if kinds else [str(int(fact) + off) for off in (-2, -1, 1, 2)]
        said = truth.replace(fact, rng.choice([other for other in others if other != fact]))
    return f"{said}." if rng.random() < 0.5 else HEDGES[language].format(said)
