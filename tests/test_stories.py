"""Stories whose entropy is known: one derivation a text, exact figures, and a floor that runs are held to."""

import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest

from experiments.floor.baselines import lzma_bits_per_byte, ngram_excess
from gptlab.data.grammar import Choice, Grammar
from gptlab.data.stories import (
    GRAMMAR,
    HEDGES,
    LINES,
    STORIES,
    WORDS,
    Stories,
    conversation,
    preference,
    reward,
    story,
    tool_conversation,
)
from gptlab.data.tokens import prepare
from gptlab.tokenizer import EOS_ID, ByteTokenizer

TEXTS = [story(seed=5, index=index) for index in range(1500)]
FOLLOWS = "end"  # a state of the small grammars below, with nothing after it


def toy(alternatives: dict[str, list[Choice]]) -> Grammar:
    return Grammar(lambda state: alternatives.get(state, []), "start")


# The grammar


@pytest.fixture(scope="module")
def exact():
    """Its recursion looks at every state, and so checks them all."""
    return GRAMMAR.measures(GRAMMAR.start)


def test_documents_fit_a_context_of_256_bytes_with_their_end(exact):
    assert max(len(text.encode()) for text in TEXTS) <= exact.most_bytes <= 255


def test_the_mean_of_samples_is_the_exact_entropy_within_its_error(exact):
    nll = np.array([GRAMMAR.optimum(text).nll.sum() for text in TEXTS])
    sizes = np.array([len(text.encode()) for text in TEXTS])
    for found, expected in ((nll, exact.entropy), (sizes, exact.mean_bytes)):
        assert abs(found.mean() - expected) < 3.5 * found.std() / math.sqrt(len(found))
    assert nll.std() / math.sqrt(len(nll)) < 0.01 * exact.entropy  # narrow enough to mean something


def test_a_text_has_the_derivation_that_made_it():
    for index in range(200):
        made = GRAMMAR.sample(random.Random(index))
        text = "".join(choice.text for choice in made)
        assert GRAMMAR.parse(text) == made
        optimum = GRAMMAR.optimum(text)
        assert optimum.nll.sum() == pytest.approx(-sum(math.log(choice.probability) for choice in made), abs=1e-9)
        assert len(optimum.nll) == len(optimum.kinds) == len(optimum.distances) == len(text.encode()) + 1
        assert (optimum.nll > -1e-12).all()


def test_nothing_else_is_a_text():
    text = TEXTS[0]
    for wrong in (text[:-1], text + "Q", text.replace("a", "e", 1), "", "\n" + text):
        with pytest.raises(ValueError, match="no text of this grammar"):
            GRAMMAR.optimum(wrong)


def test_a_byte_costs_what_tells_alternatives_apart():
    choices = [Choice(p, text, FOLLOWS, "grammar") for p, text in ((0.5, "ab"), (0.25, "ac"), (0.25, "é"))]
    optimum = toy({"start": choices}).optimum("ac")
    assert optimum.nll == pytest.approx([-math.log(0.75), -math.log(1 / 3), 0])
    assert toy({"start": choices}).optimum("é").nll == pytest.approx([-math.log(0.25), 0, 0])
    assert toy({"start": choices}).measures("start").entropy == pytest.approx(1.5 * math.log(2))


def test_what_begins_after_a_part_has_ended_adds_to_its_entropy():
    coin = [Choice(0.5, side, FOLLOWS, "grammar") for side in "ht"]
    grammar = toy({"start": [Choice(1.0, "!", "coin", "grammar", then="coin")], "coin": coin})
    assert grammar.measures("start").entropy == pytest.approx(2 * math.log(2))
    drawn = ("".join(choice.text for choice in grammar.sample(random.Random(seed))) for seed in range(40))
    assert set(drawn) == {"!hh", "!ht", "!th", "!tt"}


@pytest.mark.parametrize(
    ("alternatives", "said"),
    [
        ([(0.5, "1"), (0.5, "12")], "'1' begins '12'"),
        ([(0.5, "a"), (0.5, "a")], "'a' begins 'a'"),
        ([(0.5, "a"), (0.4, "b")], "sum to 0.9"),
        ([(1.0, "")], "no text"),
    ],
)
def test_a_broken_grammar_is_refused_with_the_state_named(alternatives, said):
    grammar = toy({"start": [Choice(p, text, FOLLOWS, "grammar") for p, text in alternatives]})
    sample, parse = (lambda: grammar.sample(random.Random(0))), (lambda: grammar.parse("a"))
    for use in (lambda: grammar.measures("start"), sample, parse):
        with pytest.raises(ValueError, match=f"start: .*{said}"):
            use()


def test_a_document_depends_on_its_seed_and_index_alone():
    again = [document.text for document in Stories(documents=20, seed=5).documents()]
    assert again == TEXTS[:20]
    assert [document.text for document in Stories(documents=20, seed=6).documents()] != again
    # The same on any machine. A change of the grammar shows here: runs before it compare with none after.
    assert story(1, 5) == (
        "Once Rita had 8 pink keys. The key of Tom was green.\nQ: Who has something pink?\nA: Rita, pink.\n"
        "Q: Add 6 by tool.\nT: add(8, 6)\nO: 14\nA: 14.\nQ: How many are pink?\nA: 8.\n"
    )


def test_answers_cost_nothing_and_stand_far_from_their_facts():
    optima = list(map(GRAMMAR.optimum, TEXTS[:300]))
    nll, kinds, distances = (
        np.concatenate([getattr(optimum, name) for optimum in optima]) for name in ("nll", "kinds", "distances")
    )
    assert set(kinds) == {"grammar", "recall", "arithmetic", "counting"}
    assert nll[kinds == "arithmetic"].max() == nll[kinds == "counting"].max() == 0
    assert ((distances > 0) == (kinds == "recall")).all()
    assert (distances > 64).sum() > 1000


def test_distances_lead_back_to_the_same_text():
    for text in TEXTS[:100]:
        content, optimum = text.encode(), GRAMMAR.optimum(text)
        for at in np.flatnonzero(optimum.distances >= 0):
            assert content[at] == content[at - optimum.distances[at]]


def test_sums_and_counts_are_right():
    for text in TEXTS[:300]:
        for a, b, total in re.findall(r"add\((\d+), (\d+)\)\nO: (\d+)", text):
            assert int(a) + int(b) == int(total)
        for said, count in re.findall(r"^(?:Drum|Oye): (.*)\.\n.*\nA: (\d)", text, re.MULTILINE):
            assert len(said.split()) == int(count)


def test_both_languages_have_the_same_questions():
    slots = {language: [sorted(re.findall(r"\{.*?\}", line)) for line in lines] for language, lines in LINES.items()}
    assert slots["en"] == slots["es"]
    assert STORIES.keys() == LINES.keys()


def test_the_corpus_is_hard_for_what_does_not_recall(exact):
    floor = exact.entropy / exact.mean_bytes
    squeezed, above = lzma_bits_per_byte(TEXTS) * math.log(2), ngram_excess(TEXTS[:1200], TEXTS[1200:])
    print(f"floor {floor:.4f} nats a byte, LZMA {squeezed / floor:.2f} times that, 5-gram {above:.4f} above it")
    assert squeezed > 2 * floor
    assert above > 0.2


# For later stages


def test_conversations_alternate_and_hold_the_text_of_the_story():
    for index in range(100):
        messages = conversation(5, index)
        assert messages[0]["role"] == "user"
        roles = [message["role"] for message in messages]
        assert all((a, b) != ("user", "user") for a, b in pairwise(roles))
        assert all(b == "tool" for a, b, said in zip(roles, roles[1:], messages, strict=False) if "tool_calls" in said)
        for message in messages:
            assert message["content"] in TEXTS[index].replace("Q: ", "")


def test_tools_are_called_with_arguments_whose_sum_comes_back():
    for index in range(50):
        messages = tool_conversation(5, index)
        calls = [at for at, message in enumerate(messages) if "tool_calls" in message]
        assert calls
        for at in calls:
            (call,) = messages[at]["tool_calls"]
            assert call["name"] == "add"
            assert messages[at + 1] == {"role": "tool", "content": str(sum(call["arguments"].values()))}
    assert tool_conversation(5, 3) == tool_conversation(5, 3) != tool_conversation(5, 4)


def test_preferences_are_drawn_with_the_probability_that_they_tell():
    pairs = [preference(5, index) for index in range(3000)]
    assert pairs[7] == preference(5, 7)
    assert all(pair.first != pair.second and pair.prompt[-1]["role"] in ("user", "tool") for pair in pairs)
    name, colour = ("|".join(WORDS["en"][kind] + WORDS["es"][kind]) for kind in ("name", "colour"))
    hedge = "|".join(HEDGES.values()).replace("{}.", "")
    shape = re.compile(rf"({hedge}|)(\d+|({name}), ({colour}))\.")
    assert all(shape.fullmatch(said) for pair in pairs for said in (pair.first, pair.second))
    assert len({round(pair.probability, 6) for pair in pairs}) == 7  # rewards 0 to 3 differ by -3 to 3
    for probability in {round(pair.probability, 6) for pair in pairs}:
        drawn = [pair.first_is_preferred for pair in pairs if round(pair.probability, 6) == probability]
        assert abs(np.mean(drawn) - probability) < 4 * math.sqrt(probability * (1 - probability) / len(drawn))


def test_the_reward_is_for_the_facts_and_for_saying_nothing_else():
    answers = ("5.", "I think that it is 5.", "15.", "I think that it is 4.")
    assert [reward(answer, "5") for answer in answers] == [3, 2, 1, 0]
    answers = ("Rita, pink.", "I think that it is Rita, pink.", "Tom, pink.", "I think that it is Rita, green.")
    assert [reward(answer, "Rita, pink") for answer in answers] == [3, 2, 1, 0]


# As a corpus


def test_a_source_without_files_is_prepared_and_found_again(tmp_path):
    source = Stories(documents=120, seed=1)
    prepared = prepare(source, ByteTokenizer(), validation_fraction=0.1, cache=tmp_path)
    assert prepared.meta["split"]["rule"] == "hash"
    assert sum(prepared.meta["splits"][side]["documents"] for side in ("train", "validation")) == 120
    ids = np.concatenate([prepared.train[:], prepared.validation[:]])
    parts = np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)[:-1]
    held = sorted(prepared.tokenizer.decode(part) for part in parts)
    assert held == sorted(document.text for document in source.documents())
    again = prepare(Stories(documents=120, seed=1), ByteTokenizer(), validation_fraction=0.1, cache=tmp_path)
    other = prepare(Stories(documents=120, seed=2), ByteTokenizer(), validation_fraction=0.1, cache=tmp_path)
    assert again.folder == prepared.folder != other.folder


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="documents=0"):
        Stories(documents=0, seed=1)
