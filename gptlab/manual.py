"""`--help` of the Hydra doors, written from the comments of the configs themselves, so that it cannot fall behind."""

import re
from collections.abc import Iterator
from pathlib import Path

from gptlab import __version__

PACKAGE = Path(__file__).parent
KEY = re.compile(r"^(?P<indent> *)(?P<key>[a-z_]+):(?: (?P<value>[^#\n]*?))?(?:\s+# (?P<says>.*))?$")
FIELD = re.compile(r"^    (?P<key>[a-z_]+): [^=]+ = (?P<value>[^#\n]*?)(?:\s+# (?P<says>.*))?$")
SWEEPS = ("hydra/launcher", "hydra/sweeper")  # where the jobs of a sweep run, and who chooses them
SHOWN = {  # the groups of each door, and the file of the dataclass behind a group, if there is one
    "train": (
        *("model", "data", "tokenizer", "stage", "task", "optimizer", "schedule", "trainer", "logger", "callbacks"),
        *SWEEPS,
    ),
    "prepare": ("data", "tokenizer"),
    "validate_data": ("data", "tokenizer"),
}
SCHEMAS = {"model": ("model.py", "GPTConfig"), "data": ("data/module.py", "DataConfig")}
FOOT = {
    "train": """\
usage
  one run         python -m gptlab.train model=tiny trainer=gpu optimizer.lr=3e-4
  own text        python -m gptlab.train data.files='[texts/**/*.txt]'
  a sweep         python -m gptlab.train -m model=tiny,small seed=1,2,3
  a search        python -m gptlab.train -m hydra/sweeper=optuna 'optimizer.lr=tag(log,interval(1e-4,1e-2))'
  what would run  python -m gptlab.train model=small --cfg job
More of Hydra's own options: --hydra-help. Files, figures and exit codes: README.md.""",
    "prepare": """\
usage
  a corpus        python -m gptlab.prepare data=pysource tokenizer.vocab_size=8000
  own text        python -m gptlab.prepare data.files='[texts/**/*.txt]' model.block_size=256
It takes every key of train, and prepares what train would with the same ones.""",
    "validate_data": """\
usage
  a corpus        python -m gptlab.validate_data data=pysource tokenizer.vocab_size=8000
  token files     python -m gptlab.validate_data data.tokens='shards/*.bin' tokenizer.path=my-tokenizer
  for a program   python -m gptlab.validate_data data.files='[texts/**/*.txt]' json=true
It takes every key of train. Exit codes: 0 sound, 1 findings, 2 text or token files that cannot be read.""",
}


def conf_dir() -> Path:
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def roots() -> list[Path]:
    """Where words are looked up: here, in the user's own conf/ and experiments/, and beside the package."""
    return list(dict.fromkeys([conf_dir(), Path.cwd() / "conf", Path.cwd(), PACKAGE.parent]))


def files_of(group: str) -> list[Path]:
    """The configs of a group, by word; the first folder that has a word wins."""
    found: dict[str, Path] = {}
    for path in (path for root in roots() for path in sorted((root / group).glob("*.yaml"))):
        found.setdefault(path.stem, path)
    return [found[word] for word in sorted(found)]


def answer(door: str, arguments: list[str]) -> str | None:
    """What --help or --version asks for; None where neither is there."""
    if {"--help", "-h"} & set(arguments):
        return manual(door)
    return f"gptlab {__version__}" if "--version" in arguments else None


def manual(door: str) -> str:
    """The whole page: what the door does, its keys, and every word of every group with the keys that come with it."""
    root = (conf_dir() / f"{door}.yaml").read_text()
    lines = [
        first_comment(root),
        "",
        "key=value sets a key, group=word takes a whole config. Keys, with their defaults:",
        "",
    ]
    lines += list(keys_of(root))
    defaults = default_words()
    for group in SHOWN[door]:
        default = defaults.get(group)
        lines += ["", f"{group}=", *words(group, default)]
        if group in SCHEMAS:
            values = dict(values_of((conf_dir() / group / f"{default}.yaml").read_text()))
            lines += list(fields_of(*SCHEMAS[group], prefix=group, values=values))
            lines += keys_of_words(group, default, nested=True)
        else:
            lines += keys_of_words(group, default)
    if door == "train":
        lines += ["", "experiments=", *words("experiments", None)]
    return "\n".join([*lines, "", FOOT[door]])


def default_words() -> dict[str, str]:
    """The word that each group takes when none is given: the defaults list of train, which prepare shares."""
    root = (conf_dir() / "train.yaml").read_text()
    return dict.fromkeys(SWEEPS, "basic") | dict(re.findall(r"^  - ([a-z]+): ([a-z_]+)$", root, re.MULTILINE))


def first_comment(text: str) -> str:
    """The first line of a config that is not Hydra's own header."""
    return next((row for row in text.splitlines() if not row.startswith("# @")), "").removeprefix("#").strip()


def line(name: str, says: str | None) -> str:
    return f"  {name:<38} {says or ''}".rstrip()


def words(group: str, default: str | None) -> list[str]:
    """The words of a group, each with the first line of its file; the default is marked."""
    marks = {path: " (the default)" if path.stem == default else "" for path in files_of(group)}
    return [line(path.stem + mark, first_comment(path.read_text())) for path, mark in marks.items()]


def keys_of(text: str, prefix: str = "") -> Iterator[str]:
    """The keys of a config as lines of the page."""
    for key, (value, says) in values_of(text):
        yield line(f"{prefix}{key}={value}", says)


def values_of(text: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """The keys of a config with value and comment; what names a class is left out."""
    parents: list[str] = []
    for row in text.splitlines():
        match = KEY.match(row)
        if match is None:
            continue
        depth = len(match["indent"]) // 2
        parents = [*parents[:depth], match["key"]]
        value = match["value"]
        if parents[0] != "defaults" and not match["key"].startswith("_") and value:
            value = re.sub(r"^\$\{unless:.*,(\w+)\}$", r"\1", value)
            yield ".".join(parents), (value, match["says"])


def keys_of_words(group: str, default: str | None, nested: bool = False) -> list[str]:
    """The keys of all words of a group, each once: the default word's value, and others that differ.

    Where a dataclass tells of those at the top, only those `nested` below, of which there is something to say.
    """
    found: dict[str, tuple[str, str | None]] = {}
    others: dict[str, list[str]] = {}
    for path in sorted(files_of(group), key=lambda path: path.stem != default):
        for key, (value, says) in values_of(path.read_text()):
            if nested and not ("." in key and says):
                continue
            if key not in found:
                found[key] = (value, says)
            elif value != found[key][0]:
                others.setdefault(key, []).append(f"{path.stem}: {value}")
    also = {key: f" ({', '.join(values)})" for key, values in others.items()}
    prefix = group.replace("/", ".")
    return [line(f"{prefix}.{key}={value}", (says or "") + also.get(key, "")) for key, (value, says) in found.items()]


def fields_of(file: str, name: str, prefix: str, values: dict[str, tuple[str, str | None]]) -> Iterator[str]:
    """The fields of a config dataclass with their comments, read from its source; `values` win over its defaults."""
    source = (PACKAGE / file).read_text().split(f"class {name}:", 1)[1]
    for row in source.splitlines():
        if row.startswith(("    @", "    def ", "class ", "@")):
            return
        if match := FIELD.match(row):
            value = match["value"].replace("None", "null").replace("True", "true").replace("False", "false").strip('"')
            value = values.get(match["key"], (value, None))[0]
            if "factory" not in value:
                yield line(f"{prefix}.{match['key']}={value}", match["says"])
