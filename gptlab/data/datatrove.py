"""Steps of a datatrove pipeline, for a corpus past one machine: text in as gptlab reads it, shards of ids out.

datatrove's executors run a pipeline as so many tasks on this machine, by SLURM or on Ray; each task makes one shard of
what it reads. docs/tokens.md has an example.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptlab.chunks import size
from gptlab.data.cleaning import whole
from gptlab.data.corpus import Files
from gptlab.data.formats import Reading, read_documents
from gptlab.data.shards import Sidecar, read_sidecar, sidecar_path, write_sidecar
from gptlab.files import write_atomically
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID, UNK_ID, Tokenizer, load_tokenizer

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'gptlab.data.datatrove needs datatrove ({error}): pip install "gptlab[data]"') from error


class TextFiles(PipelineStep):
    """The documents of text files, as `data.files` reads them: task r of n reads every n-th file, from the r-th on.

    Documents are held whole, one at a time. Raises ValueError, naming the file and line or byte, for what cannot be
    read, where datatrove's own readers pass over it.
    """

    name = "text files"
    type = "READER"

    def __init__(self, files: str | Sequence[str], reading: Reading | None = None):
        super().__init__()
        self.paths = [str(path.absolute()) for path in Files(files).paths()]  # a task may start in another folder
        self.reading = reading or Reading()

    def identity(self) -> dict[str, Any]:
        """What is read, and how, as plain types: files that have changed differ in size or time."""
        found = [(path, Path(path).stat()) for path in self.paths]
        files = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in found]
        return {"files": files, "reading": asdict(self.reading)}

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from data or ()
        for path in self.paths[rank::world_size]:
            for number, document in enumerate(whole(read_documents(Path(path), self.reading))):
                self.stat_update("documents", value=1, unit="task")
                yield Document(text=document.text, id=f"{path}/{number}")


class TokenShards(PipelineStep):
    """The last step: each task writes the ids of its documents, an end of text after each, as one shard in `folder`.

    `folder` is one that all tasks, and training, can reach by this path, as is `tokenizer`: a run, a tokenizer folder
    or file, as for `tokenizer.path`. A shard depends on its documents alone. It counts once its sidecar is there, which
    is written last, so that a task may be killed at any time, and run again. One document is held at a time.
    """

    name = "gptlab shards"
    type = "TOKENIZER"

    def __init__(self, folder: str | Path, tokenizer: str | Path, trust: tuple[str, ...] = ()):
        super().__init__()
        for key, path in (("folder", folder), ("tokenizer", tokenizer)):
            if "://" in str(path):
                raise ValueError(f"{key}={path}: give a folder of a disk that all tasks share, and training sees")
        self.folder, self.tokenizer = str(Path(folder).absolute()), str(Path(tokenizer).absolute())
        self.trust = tuple(trust)
        self.fingerprint = load_tokenizer(tokenizer, self.trust).fingerprint  # said here, before any task begins

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer, self.trust)
        if tokenizer.fingerprint != self.fingerprint:
            raise ValueError(f"{self.tokenizer} has become another tokenizer since the pipeline was made: make it anew")
        path = self.shard(rank, world_size)
        self._refuse_others(world_size)
        sidecar_path(path).unlink(missing_ok=True)  # until it is made again, the shard does not count
        for leftover in path.parent.glob(f".{path.name}.*tmp.*"):
            leftover.unlink(missing_ok=True)
        written: list[Sidecar] = []
        write_atomically(path, lambda file: written.append(self._write(file, data, tokenizer)))
        write_sidecar(path, written[0])

    def _write(self, file: BinaryIO, data: Iterable[Document], tokenizer: Tokenizer) -> Sidecar:
        dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        digest, tokens, documents, text_bytes = hashlib.sha256(), 0, 0, 0
        for document in data:
            with self.track_time():
                ids = np.append(tokenizer.encode(document.text), EOS_ID)
                assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
                content = ids.astype(dtype).tobytes()
                file.write(content)
                digest.update(content)
            tokens, documents, text_bytes = tokens + len(ids), documents + 1, text_bytes + size(document.text)
            self.stat_update("tokens", value=len(ids))
            self.stat_update("unknown_tokens", value=int(np.count_nonzero(ids == UNK_ID)))
        return Sidecar(
            dtype=dtype,
            tokens=tokens,
            documents=documents,
            vocab_size=tokenizer.vocab_size,
            sha256=digest.hexdigest(),
            bytes=text_bytes,
            tokenizer_fingerprint=self.fingerprint,
        )

    def shard(self, rank: int, world_size: int) -> Path:
        return Path(self.folder, f"{rank:05d}-of-{world_size:05d}.bin")

    def _refuse_others(self, world_size: int) -> None:
        """Raise ValueError where the shards of another number of tasks stand, which hold the same text."""
        own = f"-of-{world_size:05d}.bin.json"
        if others := sorted(p.name for p in Path(self.folder).glob("*-of-*.bin.json") if not p.name.endswith(own)):
            raise ValueError(
                f"{self.folder} holds {others[0].removesuffix('.json')}, of another number of tasks than {world_size}, "
                "so text would be there twice: remove those shards, or take another folder"
            )

    def forget_lost(self, logging_dir: str | Path, tasks: int, text: TextFiles | None = None) -> list[int]:
        """Let an executor with this `logging_dir` make again what it has made and is gone, cut short, or of another
        tokenizer.

        datatrove runs no task again that it knows to be completed. Returns the tasks without a shard, done or not.
        Raises ValueError where the folder's shards are of other text than `text`, or of that text before it changed.
        """
        if text is not None:
            self._require_same(text.identity())
        lost = [rank for rank in range(tasks) if not self._is_whole(self.shard(rank, tasks))]
        for rank in lost:
            Path(logging_dir, "completions", f"{rank:05d}").unlink(missing_ok=True)
        return lost

    def _is_whole(self, path: Path) -> bool:
        try:
            sidecar = read_sidecar(path)
            is_whole = path.stat().st_size == sidecar.tokens * np.dtype(sidecar.dtype).itemsize
            return is_whole and sidecar.tokenizer_fingerprint == self.fingerprint
        except (ValueError, OSError):
            return False

    def _require_same(self, identity: dict[str, Any]) -> None:
        path = Path(self.folder, "inputs.json")
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            write_json(path, identity)
            return
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}); remove the folder's shards and it") from error
        if before != identity:
            raise ValueError(
                f"{self.folder} holds shards of other text than this, of it before it changed, or read otherwise "
                f"({path.name} tells): remove them, or take another folder"
            )
