"""All that knows Hydra besides the doors: schemas, search path, checks, and the messages of what went wrong."""

import difflib
import functools
import inspect
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

import typeguard
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.data.module import DataConfig
from gptlab.manual import conf_dir, files_of, roots
from gptlab.model import GPTConfig
from gptlab.names import OWN_PACKAGES

# Packages whose classes a config may name without `trust`: our own, and the parts of torch and Lightning that runs use.
TRUSTED_TARGETS = (
    *(f"{package}." for package in OWN_PACKAGES),
    *("torch.optim.", "lightning.pytorch.Trainer", "lightning.pytorch.callbacks."),
    *("lightning.pytorch.loggers.", "lightning.pytorch.strategies."),
)


@dataclass
class Interval:
    every_steps: int | None = MISSING


@dataclass
class Log(Interval):
    peak_tflops: float | None = MISSING


@dataclass
class TrainConfig:
    """The types of the top-level keys of `train`; their values and meanings stand in conf/train.yaml."""

    seed: int = MISSING
    max_time: float | None = MISSING
    compile: Any = MISSING
    documents: str = MISSING
    deterministic: bool = MISSING
    run_dir: str | None = MISSING
    resume: str | None = MISSING
    init_from: str | None = MISSING
    trust: Any = MISSING
    validation: Interval = field(default_factory=Interval)
    log: Log = field(default_factory=Log)
    checkpoint: Any = MISSING
    samples: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    tokenizer: Any = MISSING
    task: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: Any = field(default_factory=dict)


class ProjectSearchPath(SearchPathPlugin):
    """Adds the current folder's own conf/ and experiments/, and then the project's experiments/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for root in roots():
            holds_words = root.name == "conf" or (root / "experiments").is_dir()
            if root.is_dir() and holds_words and root != conf_dir():
                search_path.append("gptlab", f"file://{root}")


@functools.cache
def sweep_time() -> str:
    return time.strftime("%Y-%m-%d/%H-%M-%S")


def register() -> None:
    """Tell Hydra of schemas, resolvers and where configs are; for doors, before they compose."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the door, which says them in its own way
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=TrainConfig)
    store.store(group="schema", name="gpt", node=GPTConfig)
    store.store(group="schema", name="data", node=DataConfig)
    Plugins.instance().register(ProjectSearchPath)
    for name, resolver in {
        "unless": lambda given, value: -1 if given is not None and given != -1 else value,
        "sweep_dir": lambda run_dir: run_dir or f"runs/sweeps/{sweep_time()}",
    }.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and values, interpolations resolved."""
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return content


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a plain config that names something to be made, with its key."""
    if isinstance(node, dict):
        if node.get("_target_"):
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def check_targets(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Raise one ValueError with every `_target_` that is not trusted, and every value that it would not take."""
    faults = []
    for path, node in targets(config):
        name = node["_target_"]
        if not name.startswith(TRUSTED_TARGETS + tuple(f"{package}." for package in trust)):
            faults.append(
                f"{path}._target_={name!r}: allow it, if you trust that code, with trust={name.split('.')[0]}"
            )
            continue
        try:
            target = get_object(name)
        except Exception as error:
            faults.append(f"{path}._target_={name!r} cannot be imported ({error})")
            continue
        faults += [f"{path}.{fault}" for fault in value_faults(target, node)]
    if faults:
        raise ValueError("\n".join(faults))


def value_faults(target: Any, node: dict[str, Any]) -> Iterator[str]:
    """The values in `node` that the signature of `target` has no place or another type for."""
    made = target.__init__ if isinstance(target, type) else target
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    try:
        hints = get_type_hints(made)
    except (NameError, TypeError):  # annotations that only a type checker can read
        hints = {}
    for name, value in node.items():
        if name.startswith("_") or name == "path" or (name, value) == ("precision", "auto"):
            continue
        if name not in parameters and not takes_any:
            yield f"{name}: there is no such key{nearest(name, parameters)}"
        elif name in hints and not (isinstance(value, dict) and "_target_" in value):
            accepted = tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]).lower() else value
            try:
                typeguard.check_type(accepted, hints[name])
            except typeguard.TypeCheckError:
                expected = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else hints[name]
                yield f"{name}={value!r} has the wrong type, it takes {str(expected).replace('typing.', '')}"


def nearest(word: str, known: Any) -> str:
    """ ", did you mean ...?" for the likeliest of the known words, or a full stop."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else "."


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """{"model.n_layer": 4, ...} of a plain config; lists and empty dicts count as values."""
    if isinstance(node, dict) and node:
        leaves = {}
        for key, value in node.items():
            leaves |= flat(value, f"{path}.{key}" if path else str(key))
        return leaves
    return {path: node}


def explain(error: BaseException, config_name: str = "train") -> str | None:
    """What a user did wrong, in a few lines, when composing a config failed with `error`; None if that was not it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    composing = any(isinstance(link, HydraException | OmegaConfBaseException) for link in chain)
    if not composing or any(isinstance(link, InstantiationException) for link in chain):
        return None
    said = "\n".join(str(link) for link in chain)
    if match := re.search(r"[Cc]ould not find '([^']+)/([^'/]+)'", said):
        group, word = match.groups()
        words = words_of(group)
        return f"{group}={word}: there is no such word{nearest(word, words)} Known: {', '.join(words)}"
    if match := re.search(r"Could not override '([^'@]+)", said):
        key = match[1]
        return f"{key}: there is no such key{nearest(key, [*known_keys(config_name), *groups()])}"
    if match := re.search(r"Key '([^']+)' (?:is )?not in '\w+'(?:.|\n)*?full_key: (\S+)", said):
        return f"{match[2]}: there is no such key{nearest(match[2], known_keys(config_name))}"
    if match := re.search(r"(Value .*)\n\s*full_key: (\S+)", said):
        return f"{match[2]}: {match[1]}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if line != "None" and not line.startswith(("reference_type", "object_type"))]
    return "\n".join(list(dict.fromkeys(lines))[:6])


def known_keys(config_name: str) -> list[str]:
    """Every key that can be overridden, parents too."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        leaves = flat(OmegaConf.to_container(compose(config_name), resolve=False))
    keys = dict.fromkeys(leaves)
    for key in leaves:
        for end in range(key.count(".")):
            keys[key.rsplit(".", end + 1)[0]] = None
    return list(keys)


def groups() -> list[str]:
    return [*sorted(path.name for path in conf_dir().iterdir() if path.is_dir()), "experiments"]


def words_of(group: str) -> list[str]:
    """The words that a group takes, from every folder that is searched."""
    return [path.stem for path in files_of(group)]


def model_config(node: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{field.name: node[field.name] for field in fields(GPTConfig)})


def data_config(node: dict[str, Any]) -> DataConfig:
    return DataConfig(**{field.name: node[field.name] for field in fields(DataConfig)})


def trusted(config: dict[str, Any]) -> tuple[str, ...]:
    """`trust`, which may be one package or a list of them."""
    trust = config["trust"]
    return () if trust is None else (trust,) if isinstance(trust, str) else tuple(trust)


def make(node: dict[str, Any] | None) -> Any:
    """What a checked node describes, or None where it names nothing."""
    return instantiate(node, _convert_="all") if node and node.get("_target_") else None
