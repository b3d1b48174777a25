"""A grammar's figures are those of its texts: one derivation each, whose probability, entropy and bytes agree."""

import itertools
import lzma
import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from gptlab.data.grammar import Choice, Grammar
from gptlab.data.stories import (
    GRAMMAR,
    Stories,
    conversation,
    preference,
    reward,
    step,
    story,
    tool_conversation,
)
from gptlab.data.tokens import prepare
from gptlab.tokenizer import ByteTokenizer

TEXTS = [story(seed=3, index=index) for index in range(1500)]


def states(limit: int = 4000) -> list:
    """States in the order in which they are reached."""
    found, waiting = dict.fromkeys([GRAMMAR.start]), [GRAMMAR.start]
    while waiting and len(found) < limit:
        for choice in step(waiting.pop(0)):
            for state in (choice.state, choice.then):
                if state is not None and state not in found:
                    found[state] = None
                    waiting.append(state)
    return list(found)


def test_alternatives_are_a_prefix_free_distribution():
    for state in states():
        choices = step(state)
        assert not choices or math.isclose(sum(choice.probability for choice in choices), 1)
        for one, other in itertools.permutations([choice.text for choice in choices], 2):
            assert not other.startswith(one), state


def test_a_text_has_the_derivation_that_made_it():
    for index in range(300):
        made = GRAMMAR.sample(random.Random(f"3/{index}"))
        assert "".join(choice.text for choice in made) == TEXTS[index]
        assert GRAMMAR.parse(TEXTS[index]) == made


def test_bytes_add_up_to_the_probability_of_the_document():
    for text in TEXTS[:300]:
        optimum = GRAMMAR.optimum(text)
        assert len(optimum.nll) == len(optimum.kinds) == len(optimum.distances) == len(text.encode()) + 1
        exact = -sum(math.log(choice.probability) for choice in GRAMMAR.parse(text))
        assert optimum.nll.sum() == pytest.approx(exact, abs=1e-9)
        assert optimum.nll.min() > -1e-12


def test_entropy_and_length_are_those_of_samples():
    exact = GRAMMAR.measures(GRAMMAR.start)
    for known, found in (
        (exact.entropy, [GRAMMAR.optimum(text).nll.sum() for text in TEXTS]),
        (exact.mean_bytes, [len(text.encode()) for text in TEXTS]),
    ):
        assert abs(known - np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found))
    assert max(len(text.encode()) for text in TEXTS) <= exact.most_bytes < 256  # with its end, it fits a block of 256


def test_entropy_of_a_grammar_that_one_can_count():
    def coins(state: int) -> list[Choice]:
        sides = (("heads ", 0.25), ("tails ", 0.75))
        return [Choice(p, text, state - 1, "grammar") for text, p in sides] if state else []

    found = Grammar(coins, 3).measures(3)
    assert found.entropy == pytest.approx(3 * -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert found.mean_bytes == found.most_bytes == 18


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ([Choice(0.5, "a", "", "grammar"), Choice(0.5, "ab", "", "grammar")], r"start: 'a' begins 'ab'"),
        ([Choice(0.5, "a", "", "grammar"), Choice(0.5, "a", "", "grammar")], r"start: 'a' begins 'a'"),
        ([Choice(0.5, "a", "", "grammar"), Choice(0.4, "b", "", "grammar")], r"start: the probabilities sum to 0.9"),
        ([Choice(1.0, "", "", "grammar")], r"start: a choice has no text"),
    ],
)
def test_a_broken_grammar_is_refused(choices, says):
    grammar = Grammar(lambda state: choices if state == "start" else [], "start")
    with pytest.raises(ValueError, match=says):
        grammar.measures("start")


@pytest.mark.parametrize("spoil", [lambda text: text + "x", lambda text: text[:-9], lambda text: "x" + text])
def test_a_text_of_no_story_is_refused(spoil):
    with pytest.raises(ValueError, match="no text of this grammar"):
        GRAMMAR.parse(spoil(TEXTS[0]))


def test_recall_says_how_far_back_the_fact_stands():
    repeated = 0
    for text in TEXTS[:200]:
        optimum, content = GRAMMAR.optimum(text), text.encode()
        recalls = np.flatnonzero(optimum.distances >= 0)
        assert set(optimum.kinds[recalls]) <= {"recall"}
        for at in recalls:
            assert content[at] == content[at - optimum.distances[at]]
        repeated += len(recalls)
    assert repeated > 1000


def test_answers_are_certain_once_the_question_is_asked():
    kinds = Counter()
    for text in TEXTS[:300]:
        optimum = GRAMMAR.optimum(text)
        assert optimum.nll[np.isin(optimum.kinds, ["arithmetic", "counting"])].sum() == pytest.approx(0, abs=1e-9)
        kinds.update(optimum.kinds.tolist())
    assert set(kinds) == {"grammar", "recall", "arithmetic", "counting"}


def test_it_is_hard_for_a_compressor():
    content = "".join(TEXTS).encode()
    floor = sum(GRAMMAR.optimum(text).nll.sum() for text in TEXTS) / math.log(2) / len(content)
    assert 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content) > 2 * floor


def test_as_a_source_it_is_a_function_of_its_seed(tmp_path):
    made = [[document.text for document in Stories(150, seed).documents()] for seed in (3, 3, 4)]
    assert made[0] == made[1] == TEXTS[:150]
    assert made[2] != made[0]
    folders = {
        prepare(Stories(count, seed), ByteTokenizer(), validation_fraction=0.1, cache=tmp_path).folder
        for count, seed in ((150, 3), (150, 4), (200, 3))
    }
    assert len(folders) == 3
    assert Stories(1, 1).optimum(TEXTS[0]).nll.sum() == GRAMMAR.optimum(TEXTS[0]).nll.sum()
    with pytest.raises(ValueError, match=r"data.source.documents=0 must be at least 1"):
        Stories(0, 1)


def test_conversations_call_the_tool_and_tell_what_it_gave():
    called = 0
    for index in range(200):
        messages = tool_conversation(1, index)
        assert messages == tool_conversation(1, index)
        for place, said in enumerate(messages):
            for call in said.get("tool_calls", ()):
                total = str(sum(call["arguments"].values()))
                assert [(m["role"], m["content"]) for m in messages[place + 1 : place + 3]] == [
                    ("tool", total),
                    ("assistant", f"{total}."),
                ]
                called += 1
        roles = [said["role"] for said in conversation(1, index)]
        assert roles[0] == "user"
        assert all(a != b for a, b in itertools.pairwise(roles) if a == "user")
    assert called >= 200


def test_preferences_are_drawn_at_the_odds_of_their_rewards():
    pairs = [preference(1, index) for index in range(2000)]
    assert pairs[7] == preference(1, 7)
    right = 0
    for pair in pairs:
        assert pair.prompt[-1]["role"] in ("user", "tool")
        assert pair.first != pair.second
    for low, high in ((0.0, 0.2), (0.2, 0.4), (0.6, 0.8), (0.8, 1.0)):
        some = [pair for pair in pairs if low <= pair.probability < high]
        expected, drawn = (np.mean([getattr(p, name) for p in some]) for name in ("probability", "first_is_preferred"))
        assert abs(expected - drawn) < 4 * 0.5 / math.sqrt(len(some))
        right += len(some)
    assert right > 1000
    assert reward("red.", "red") == 3
    assert reward("I think that it is red.", "red") == 2
    assert reward("blue.", "red") == 1
    assert re.search("I think|Creo", " ".join(pair.first for pair in pairs))
