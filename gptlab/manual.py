"""`--help` of the Hydra doors, written from the comments of the configs themselves, so that it cannot fall behind."""

import re
from collections.abc import Iterator
from pathlib import Path

from gptlab import __version__

PACKAGE = Path(__file__).parent
KEY = re.compile(r"^(?P<indent> *)(?P<key>[a-z_]+):(?: (?P<value>[^#\n]*?))?(?:\s+# (?P<says>.*))?$")
FIELD = re.compile(r"^    (?P<key>[a-z_]+): [^=]+ = (?P<value>[^#\n]*?)(?:\s+# (?P<says>.*))?$")
SHOWN = {  # the groups of each door, and the file of the dataclass behind a group, if there is one
    "train": ("model", "data", "tokenizer", "stage", "task", "optimizer", "schedule", "trainer", "logger", "callbacks"),
    "prepare": ("data", "tokenizer"),
}
SCHEMAS = {"model": ("model.py", "GPTConfig"), "data": ("data/module.py", "DataConfig")}
FOOT = {
    "train": """\
usage
  one run         python -m gptlab.train model=tiny trainer=gpu optimizer.lr=3e-4
  own text        python -m gptlab.train data.files='[texts/**/*.txt]'
  a sweep         python -m gptlab.train -m model=tiny,small seed=1,2,3
  what would run  python -m gptlab.train model=small --cfg job
More of Hydra's own options: --hydra-help. Files, figures and exit codes: README.md.""",
    "prepare": """\
usage
  a corpus        python -m gptlab.prepare data=pysource tokenizer.vocab_size=8000
  own text        python -m gptlab.prepare data.files='[texts/**/*.txt]' model.block_size=256
It takes every key of train, and prepares what train would with the same ones.""",
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


def answer(door: str, arguments: list[str]) -> bool:
    """Print what --help or --version asks for; whether one of them was there."""
    if {"--help", "-h"} & set(arguments):
        print(manual(door))
        return True
    if "--version" in arguments:
        print(f"gptlab {__version__}")
        return True
    return False


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
    for group in SHOWN[door]:
        lines += ["", f"{group}=", *words(group)]
        if group in SCHEMAS:
            lines += list(fields_of(*SCHEMAS[group], prefix=group))
        else:
            lines += keys_of_words(group)
    if door == "train":
        lines += ["", "experiments=", *words("experiments")]
    return "\n".join([*lines, "", FOOT[door]])


def first_comment(text: str) -> str:
    """The first line of a config that is not Hydra's own header."""
    return next(row for row in text.splitlines() if not row.startswith("# @")).removeprefix("#").strip()


def line(name: str, says: str | None) -> str:
    return f"  {name:<38} {says or ''}".rstrip()


def words(group: str) -> list[str]:
    return [line(path.stem, first_comment(path.read_text())) for path in files_of(group)]


def keys_of(text: str, prefix: str = "") -> Iterator[str]:
    """The keys of a config with their comments; what names a class is left out."""
    parents: list[str] = []
    in_defaults = False
    for row in text.splitlines():
        match = KEY.match(row)
        if match is None:
            continue
        depth = len(match["indent"]) // 2
        parents = [*parents[:depth], match["key"]]
        in_defaults = parents[0] == "defaults"
        value = match["value"]
        if not in_defaults and not match["key"].startswith("_") and value:
            yield line(f"{prefix}{'.'.join(parents)}={value}", match["says"])


def keys_of_words(group: str) -> list[str]:
    """The keys of all words of a group, each key once."""
    found: dict[str, str] = {}
    for path in files_of(group):
        for row in keys_of(path.read_text(), f"{group}."):
            found.setdefault(row.split("=")[0], row)
    return list(found.values())


def fields_of(file: str, name: str, prefix: str) -> Iterator[str]:
    """The fields of a config dataclass with their comments, read from its source."""
    source = (PACKAGE / file).read_text().split(f"class {name}:", 1)[1]
    for row in source.splitlines():
        if row.startswith(("    @", "    def ", "class ", "@")):
            return
        if match := FIELD.match(row):
            value = match["value"].replace("None", "null").strip('"')
            if "factory" not in value:
                yield line(f"{prefix}.{match['key']}={value}", match["says"])
