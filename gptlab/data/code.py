"""Source code of one's own, by language: one document a file."""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from gptlab.data.corpus import Source
from gptlab.data.document import Document
from gptlab.data.formats import read_text

log = logging.getLogger(__name__)

ENDINGS = {
    "bash": (".sh", ".bash"),
    "c": (".c", ".h"),
    "cpp": (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"),
    "csharp": (".cs",),
    "go": (".go",),
    "java": (".java",),
    "javascript": (".js", ".mjs", ".cjs", ".jsx"),
    "kotlin": (".kt", ".kts"),
    "lua": (".lua",),
    "perl": (".pl", ".pm"),
    "php": (".php",),
    "python": (".py", ".pyi"),
    "r": (".r",),
    "ruby": (".rb",),
    "rust": (".rs",),
    "sql": (".sql",),
    "swift": (".swift",),
    "typescript": (".ts", ".tsx"),
}
INTERPRETERS = {"bash": "bash", "sh": "bash", "dash": "bash", "node": "javascript", "Rscript": "r"}
# What tools fetch or make; hidden folders are left out as well.
NOT_OWN = {"__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "build", "dist", "target", "vendor"}


class Code(Source):
    """The source files of `languages` in `folders`, at any depth, named by their ending or their `#!` line.

    Files of more than `max_bytes` are left out, being data more than code, and so are links and what is no UTF-8.
    """

    def __init__(self, folders: str | Sequence[str], languages: Sequence[str], max_bytes: int):
        self.folders = [Path(folders)] if isinstance(folders, str) else [Path(folder) for folder in folders]
        self.languages, self.max_bytes = list(languages), max_bytes
        if unknown := set(languages) - set(ENDINGS):
            raise ValueError(f"data.source.languages={sorted(unknown)}: known are {', '.join(ENDINGS)}")
        self.endings = {ending for language in languages for ending in ENDINGS[language]}

    def paths(self) -> list[Path]:
        return list(self._names)

    @cached_property
    def _names(self) -> dict[Path, str]:
        """Each file with its name in the folder it was found in; walked once a run."""
        found: dict[Path, str] = {}
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"data.source.folders: {folder} is no folder here in {Path.cwd()}; check the path")
            for place, folders, files in os.walk(folder):
                folders[:] = sorted(name for name in folders if name not in NOT_OWN and not name.startswith("."))
                for path in (Path(place, name) for name in sorted(files)):
                    if not path.is_symlink() and self._is_code(path):
                        found.setdefault(path.absolute(), path.relative_to(folder).as_posix())
        if not found:
            raise ValueError(
                f"data.source.folders={[str(folder) for folder in self.folders]} hold no file in "
                f"{', '.join(self.languages)}; name other folders or data.source.languages"
            )
        return found

    def _is_code(self, path: Path) -> bool:
        if not path.is_file() or not 0 < path.stat().st_size <= self.max_bytes:
            return False
        if path.suffix:
            return path.suffix.lower() in self.endings
        with open(path, "rb") as file:
            words = file.readline(100).decode("latin1").split() if file.read(2) == b"#!" else []
        names = [Path(word).name.rstrip("0123456789.") for word in words[:2]]
        return any(INTERPRETERS.get(name, name) in self.languages for name in names)

    def read(self, path: Path) -> Iterator[Document]:
        try:
            yield Document(self._names[path], read_text(path))
        except ValueError as error:
            log.info("left out: %s", str(error).split("; ")[0])
        self._count(path.stat().st_size)

    @property
    def settings(self) -> dict:
        return {"languages": self.languages, "max_bytes": self.max_bytes}
