"""`data.mix` in a composed config: a word of `data=` becomes what its file says, so that a run's config is whole."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import typeguard
import yaml
from omegaconf import DictConfig, OmegaConf

from gptlab import checks
from gptlab.config import words_of
from gptlab.data.mixed import OF_A_SOURCE
from gptlab.data.module import DataConfig
from gptlab.explain import nearest
from gptlab.manual import files_of

TYPES = {name: hint for name, hint in get_type_hints(DataConfig).items() if name != "source"}
NO_SOURCES = ("mix", "stream", "litdata")  # words that say how text is read, not which


def write_out(cfg: DictConfig) -> None:
    """Replace each source of `data.mix` by a mapping of its weight and what it is."""
    mix = OmegaConf.select(cfg, "data.mix")
    if mix is None:
        return
    if isinstance(mix, str):  # as a default, which would otherwise add to what is given
        mix = yaml.safe_load(mix)
    if OmegaConf.is_config(mix):
        mix = OmegaConf.to_container(mix)
    if not isinstance(mix, Mapping) or not mix:
        raise ValueError(
            f"data.mix={mix!r} is no mixture; name sources and their weights: data.mix='{{pydocs: 3, code: 1}}'"
        )
    parts = {str(name): written_out(str(name), part) for name, part in mix.items()}
    OmegaConf.update(cfg, "data.mix", parts, merge=False)
    sizes = [part.get("text_bytes") for part in parts.values()]
    if cfg.data.text_bytes is None and None not in sizes:
        cfg.data.text_bytes = sum(sizes)


def written_out(name: str, part: Any) -> dict[str, Any]:
    """A source of a mixture, given as its weight or as a mapping of keys of `data`."""
    part = dict(part) if isinstance(part, Mapping) else {"weight": part}
    for key in part:
        if key not in ("weight", *OF_A_SOURCE):
            raise ValueError(f"data.mix.{name}.{key}: there is no such key{nearest(key, ('weight', *OF_A_SOURCE))}")
        if key in TYPES:
            try:
                typeguard.check_type(part[key], TYPES[key])
            except typeguard.TypeCheckError:
                takes = " | ".join(dict.fromkeys(checks.accepted_words(TYPES[key])))
                raise ValueError(
                    f"data.mix.{name}.{key}={checks.shown(part[key])} is not what it takes: {takes}"
                ) from None
    if part.get("source") is None and part.get("files") is None:
        part = of_word(name) | part
    return {"weight": 1} | part


def of_word(name: str) -> dict[str, Any]:
    """The keys that `data=name` gives."""
    file = next((path for path in files_of("data") if path.stem == name and name not in NO_SOURCES), None)
    if file is None:
        words = [word for word in words_of("data") if word not in NO_SOURCES]
        raise ValueError(
            f"data.mix.{name}: there is no such source{nearest(name, words)} Known: {', '.join(words)}; or give it "
            f"text: data.mix='{{{name}: {{files: texts/*.txt, weight: 1}}}}'"
        )
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key in OF_A_SOURCE}
