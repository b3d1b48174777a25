"""Whether files are still as they were: what is made of them is kept under the hashes of what they held before."""

from pathlib import Path

from gptlab.data.corpus import Source
from gptlab.files import sha256_of_file

States = dict[Path, tuple[int, int]]  # size and date of each file


def look_at(source: Source) -> tuple[list[dict], States]:
    """A record of each file, and the state in which it was before anybody read it."""
    paths = source.paths()
    states = {path: _state(path) for path in paths}
    return [{"path": str(path), "size": states[path][0], "sha256": sha256_of_file(path)} for path in paths], states


def _state(path: Path) -> tuple[int, int]:
    """Size and date, which change with the content."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def refuse_changed(states: States) -> None:
    """Raise ValueError where a file is no longer as it was: what was made of it must not be kept for what it was."""
    for path, state in states.items():
        if not path.is_file() or _state(path) != state:
            raise ValueError(f"{path} changed while it was read: wait until it is written, and start again")
