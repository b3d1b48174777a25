"""From the command line to a plain config: schemas, search path, known keys and words."""

import functools
import glob
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from gptlab.data.module import DataConfig
from gptlab.data.remote import is_remote
from gptlab.manual import conf_dir, files_of, roots
from gptlab.model import GPTConfig


@dataclass
class Interval:
    every_steps: int | None = MISSING


@dataclass
class Log(Interval):
    peak_tflops: float | None = MISSING


@dataclass
class TrainConfig:
    """The types of the top-level keys of `train`; their values and meanings stand in conf/train.yaml."""

    depth: int | None = MISSING
    seed: int = MISSING
    max_time: float | None = MISSING
    compile: Any = MISSING
    documents: str = MISSING
    nonfinite: str = MISSING
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


@dataclass
class ValidateConfig(TrainConfig):
    """Those of `validate_data`."""

    json: bool = MISSING


class ProjectSearchPath(SearchPathPlugin):
    """Adds the current folder's own conf/ and experiments/, and then the project's experiments/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for root in roots():
            holds_words = root.name == "conf" or (root / "experiments").is_dir()
            if root.is_dir() and holds_words and root != conf_dir():
                search_path.append("gptlab", f"file://{root}")


@functools.cache
def new_sweep_dir() -> str:
    """Where the sweep of this process goes, unless it is told: a folder that no sweep of this second has."""
    stem = f"runs/sweeps/{time.strftime('%Y-%m-%d/%H-%M-%S')}"
    return next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, 1000))) if not Path(name).exists())


def register() -> None:
    """Tell Hydra of schemas, resolvers and where configs are; for doors, before they compose."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the door, which says them in its own way
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=TrainConfig)
    store.store(group="schema", name="validate_data", node=ValidateConfig)
    store.store(group="schema", name="gpt", node=GPTConfig)
    store.store(group="schema", name="data", node=DataConfig)
    Plugins.instance().register(ProjectSearchPath)
    for group in ("launcher", "sweeper"):  # a published plugin's config of the same name would be the schema of ours
        for word in words_of(f"hydra/{group}"):
            store.repo["hydra"].get(group, {}).pop(f"{word}.yaml", None)
    for name, resolver in {
        "unless": lambda given, value: -1 if given is not None and given != -1 else value,
        "sweep_dir": lambda run_dir: run_dir or new_sweep_dir(),
    }.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def after_composing(*changes: Callable[[DictConfig], None]) -> None:
    """Have every config that Hydra composes changed by these, in turn, so that `--cfg job` shows what they do.

    Hydra 1.3 calls nothing of ours between composing a config and showing or using it, hence this wrapper.
    """
    composing = Hydra.compose_config
    if hasattr(composing, "__wrapped__"):
        return

    @functools.wraps(composing)
    def composed(self: Hydra, *arguments: Any, **named: Any) -> DictConfig:
        config = composing(self, *arguments, **named)
        for change in changes:
            change(config)
        return config

    Hydra.compose_config = composed


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and values, interpolations resolved."""
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return content


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """{"model.n_layer": 4, ...} of a plain config; lists and empty dicts count as values."""
    if isinstance(node, dict) and node:
        leaves = {}
        for key, value in node.items():
            leaves |= flat(value, f"{path}.{key}" if path else str(key))
        return leaves
    return {path: node}


def is_below(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `names`, or stands below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def known_keys(config_name: str) -> list[str]:
    """Every key that can be overridden, parents too."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        leaves = flat(OmegaConf.to_container(compose(config_name), resolve=False))
    keys = dict.fromkeys(leaves)
    for key in leaves:
        for end in range(key.count(".")):
            keys[key.rsplit(".", end + 1)[0]] = None
    return list(keys)


def groups() -> list[str]:
    """Every group whose word can be chosen; Hydra's own two stand below conf/hydra."""
    holders = {path.parent.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml")} - {Path()}
    return [*sorted(map(str, holders)), "experiments"]


def words_of(group: str) -> list[str]:
    """The words that a group takes, from every folder that is searched."""
    return [path.stem for path in files_of(group)]


def model_config(node: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{field.name: node[field.name] for field in fields(GPTConfig)})


def data_config(node: dict[str, Any]) -> DataConfig:
    return DataConfig(**{field.name: node[field.name] for field in fields(DataConfig) if field.name in node})


def absolute_path(path: str) -> Path:
    return Path(path).expanduser().absolute()


def absolute_glob(pattern: str) -> Path:
    """A path or glob made absolute: what stands before it is a path, and no glob even if it looks like one."""
    path = absolute_path(pattern)
    if path.exists() or Path(pattern).is_absolute():
        return path
    first, *rest = Path(pattern).parts
    before, rest = (Path(first).expanduser(), rest) if first.startswith("~") else (Path.cwd(), [first, *rest])
    return Path(glob.escape(str(before)), *rest)


def absolute_paths(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config with its paths made absolute, so that the run can be resumed from any folder."""

    def absolute(key: str, value: Any, of: Callable[[str], Path] = absolute_path) -> Any:
        if isinstance(value, list):
            return [absolute(key, item, of) for item in value]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key}={value!r} is no path; quote one that looks like a number: {key}=\\'{value}\\'")
        return value if value is None or is_remote(value) else str(of(value))

    def with_paths(key: str, node: dict[str, Any]) -> dict[str, Any]:
        """A node of `data`, or of one of its sources."""
        named = [name for name in ("files", "validation_files", "tokens", "validation_tokens") if name in node]
        paths = {name: absolute(f"{key}.{name}", node[name], absolute_glob) for name in named}
        if "folders" in (source := node.get("source") or {}):
            paths["source"] = source | {"folders": absolute(f"{key}.source.folders", source["folders"])}
        if "folder" in (stream := node.get("stream") or {}):
            paths["stream"] = stream | {"folder": absolute(f"{key}.stream.folder", stream["folder"])}
        return node | paths

    data = with_paths("data", cfg["data"])
    if data.get("mix"):
        data["mix"] = {name: with_paths(f"data.mix.{name}", part) for name, part in data["mix"].items()}
    given = [name for name in ("path", "files") if name in cfg["tokenizer"]]
    kinds = {"path": absolute_path, "files": absolute_glob}
    tokenizer = {name: absolute(f"tokenizer.{name}", cfg["tokenizer"][name], kinds[name]) for name in given}
    run, prefix = cfg["init_from"], ""
    if isinstance(run, str) and run.startswith("hf:"):
        run, prefix = run.removeprefix("hf:"), "hf:"
    run = absolute("init_from", run)
    return cfg | {
        "data": data,
        "tokenizer": cfg["tokenizer"] | tokenizer,
        "init_from": prefix + run if prefix else run,
    }


def trusted(config: dict[str, Any]) -> tuple[str, ...]:
    """`trust`, which may be one package or a list of them."""
    trust = config["trust"]
    return () if trust is None else (trust,) if isinstance(trust, str) else tuple(trust)


def make(node: dict[str, Any] | None) -> Any:
    """What a checked node describes, or None where it names nothing."""
    if not node or not node.get("_target_"):
        return None
    made = instantiate(node, _convert_="all")
    if isinstance(made, functools.partial):  # Hydra's own kind asks at each call whether it may: 0.5 ms of every step
        return functools.partial(made.func, *made.args, **made.keywords)
    return made
