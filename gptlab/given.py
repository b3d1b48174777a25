"""What the command line gives: each key, with the word that was typed for it."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gptlab.config import flat, is_below
from gptlab.resume import BOTH, FREE, KEEPS_ITS_CONFIG, saved_config
from gptlab.run import RunFolder

FOR_ANY_KEY = ("experiments", "stage")  # groups whose words set keys anywhere


def strip_key(override: str) -> str:
    """The key that an override names: model.n_layer of +model.n_layer=4."""
    return re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]


def given_keys() -> dict[str, str]:
    """The keys of this process's command line, and those that an experiment among them gives, each with its override.

    Where a run ends and what is watched is only ever taken from what was typed, never from an experiment.
    """
    typed, of_words = given_in(HydraConfig.get())
    return {key: override for key, override in of_words.items() if not is_below(key, FREE)} | typed


def given_in(hydra: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The keys that were typed, and those that the words of an experiment or stage give, each with its override.

    `hydra` is Hydra's own part of the composed config.
    """
    typed = {strip_key(override): override for override in hydra.overrides.task}
    of_words = {
        key: typed[group]
        for group in FOR_ANY_KEY
        if group in typed
        for word in re.findall(r"[\w./-]+", typed[group].partition("=")[2])
        for key in keys_in(group, word, hydra)
        if not key.startswith(("hydra.", "hydra/"))
    }
    return {key: override for key, override in typed.items() if key not in FOR_ANY_KEY}, of_words


def of_resumed_run(key: str, arguments: list[str]) -> str | None:
    """Why `key`, which nothing composed from `arguments` has, is refused, where they resume a run that has it."""
    typed = {}
    for argument in arguments:
        with contextlib.suppress(HydraException):  # an option, or what composing refuses
            (typed[strip_key(argument)],) = OverridesParser.create().parse_overrides([argument])
    if key not in typed or "resume" not in typed:
        return None
    path = Path(str(typed["resume"].value())).absolute()
    try:
        run = flat(saved_config(RunFolder(path.parent.parent if path.is_file() else path)))
    except ValueError:  # this is for later to say
        return None
    if key not in run:
        return None
    if is_below(key, FREE):
        return f"{key}: the run has {run[key]!r}; +{typed[key].input_line} changes it"
    return f"{KEEPS_ITS_CONFIG}\n{BOTH.format(key, run[key], typed[key].value(), typed[key].input_line)}"


def keys_in(group: str, word: str, hydra: Any) -> Iterator[str]:
    """The keys that the file of a word sets, and the groups that it chooses for."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    file = next((path for folder in folders if (path := folder / group / f"{word}.yaml").is_file()), None)
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file is not None else None
    if not isinstance(content, dict):
        return
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):
            yield from (re.sub(r"^override |@.*$", "", key).strip().strip("/") for key in entry)
        elif entry != "_self_":
            yield from keys_in(group, entry, hydra)
    yield from (key for key in flat(content) if key)
