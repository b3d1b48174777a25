"""What a user typed wrong, in a few words: the messages for what Hydra and OmegaConf refuse."""

import difflib
import re
import sys
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from gptlab.config import groups, known_keys, words_of
from gptlab.given import of_resumed_run


def explain(error: BaseException, config_name: str = "train") -> str | None:
    """What a user did wrong, in a few lines, when composing a config failed with `error`; None if that was not it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    said = "\n".join(str(link) for link in chain)
    if "Config group override must be a string or a list" in said:
        return f"a group takes one of its words, not a number, null, true or false; groups are {', '.join(groups())}"
    composing = any(isinstance(link, HydraException | OmegaConfBaseException) for link in chain)
    if not composing or any(isinstance(link, InstantiationException) for link in chain):
        return None
    return in_words(said, config_name)


def in_words(said: str, config_name: str) -> str:
    """What the libraries' errors mean, or failing that their own first lines."""
    if match := re.search(r"[Cc]ould not find '([^']+)/([^'/]+)'", said):
        group, word = match.groups()
        words = words_of(group)
        return f"{group}={word}: there is no such word{nearest(word, words)} Known: {', '.join(words)}"
    if match := re.search(r"Could not override '([^'@]+)", said):
        key = match[1]
        return (
            of_resumed_run(key, sys.argv[1:])
            or f"{key}: there is no such key{nearest(key, [*known_keys(config_name), *groups()])}"
        )
    if "override_grammar" in said and (word := unreadable(sys.argv[1:])):
        return (
            f"{word}: cannot be read; close every bracket, and put a text with other signs than letters, digits and "
            "/._-*?[] into quotes within the quotes: 'key=\"a text\"'"
        )
    if match := re.search(r"Key '([^']+)' (?:is )?not in '\w+'(?:.|\n)*?full_key: (\S+)", said):
        return f"{match[2]}: there is no such key{nearest(match[2], known_keys(config_name))}"
    if match := re.search(r"field '(\S+)' is not Optional", said):
        return f"{match[1]}=null is not what it takes: it needs a value"
    if match := re.search(
        r"Value '(.*?)' (?:.* could not be converted to|is not a valid) (\w+)(?:.|\n)*?full_key: (\S+)", said
    ):
        takes = {"Integer": "a whole number", "Float": "a number", "bool": "true | false"}
        return f"{match[3]}={match[1]} is not what it takes: {takes.get(match[2], match[2])}"
    if match := re.search(r"Invalid type assigned:.*value: (.*)\n\s*full_key: (\S+)", said):
        below = [key for key in known_keys(config_name) if key.startswith(f"{match[2]}.")]
        return f"{match[2]}={match[1]} is not what it takes: it has keys of its own, {', '.join(below)}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if line != "None" and not line.startswith(("reference_type", "object_type"))]
    return "\n".join(list(dict.fromkeys(lines))[:6])


def unreadable(arguments: list[str]) -> str | None:
    """The first override that Hydra's grammar does not take."""
    parser = OverridesParser.create()
    for word in arguments:
        try:
            if "=" in word and not word.startswith("-"):
                parser.parse_override(word)
        except HydraException:
            return word
    return None


def nearest(word: str, known: Any) -> str:
    """ ", did you mean ...?" for the likeliest of the known words, or a full stop."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else "."
