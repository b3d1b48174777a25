"""gptlab.json, which makes a bundle of an exported folder: what was trained, how, and the hash of every file of it."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from gptlab.files import sha256_of_file
from gptlab.run import write_json

NAME = "gptlab.json"
FORMAT = 1  # to be raised whenever what is read of it changes its meaning
LARGEST_JSON = 2**28  # bytes that are believed; a tokenizer.json of 150,000 pieces has 11 million
_FILE = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # in the folder, or in one of its own folders


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write gptlab.json, the last file of a folder: `facts`, and the size and hash of all that is there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): described(path) for path in paths}
    write_json(folder / NAME, {"format": FORMAT} | facts | {"files": files})


def described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def verified(folder: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """The content of gptlab.json, whose every file is there as it was written, `needed` ones among them.

    Raises ValueError, naming the file that is another, is missing, or is none of the folder's own.
    """
    path = folder / NAME
    content = read_json(path)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not isinstance(content.get("format"), int):
        raise ValueError(f"{path}: damaged, it is no record of a bundle")
    if content["format"] > FORMAT:
        raise ValueError(f"{path}: a bundle of format {content['format']}, this gptlab knows up to {FORMAT}")
    if missing := [name for name in needed if name not in files]:
        raise ValueError(f"{path}: damaged, it lists no {missing[0]}")
    there = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    shown = {str(path) for path in there if not any(part.startswith(".") for part in path.parts)}
    if unlisted := sorted(shown - {NAME, *files}):
        raise ValueError(f"{folder / unlisted[0]}: refused, {NAME} does not list it; move it out of the bundle")
    for name, known in files.items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"{path}: refused, it lists {name[:80]!r}, which is no file in its folder")
        if not isinstance(known, dict):
            raise ValueError(f"{path}: damaged, it has no hash of {name}")
        require_file(folder / name)
        if (size := (folder / name).stat().st_size) != known.get("bytes"):
            raise ValueError(f"{folder / name}: damaged, it has {size} bytes, and {NAME} says {known.get('bytes')}")
        if sha256_of_file(folder / name) != known.get("sha256"):
            raise ValueError(f"{folder / name}: damaged or changed, its sha256 is not the one in {NAME}")
    return content


def require_file(path: Path, most: int | None = None) -> None:
    """Raise ValueError unless there is a file, no device or pipe, of at most `most` bytes."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: refused, it is no file")
    if most is not None and found.st_size > most:
        raise ValueError(f"{path}: refused, it has {found.st_size:,} bytes, and {most:,} are believed")


def read_json(path: Path) -> Any:
    require_file(path, LARGEST_JSON)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, it is no JSON ({error})") from error
