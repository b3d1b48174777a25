"""Of `data.py`: text to ids by each tokenizer, alone, through gptlab's pipeline, and by its library's own batches.

Each figure is of a process of its own, since threads are counted out at its start: `python encoders.py <task>` prints
the seconds and tokens of one. The text is what GPTLAB_DATA_DIR holds, else Python's standard library, in documents of
at most 4,096 characters, over and over; vocabularies are learnt from it.
"""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
import tokenizers
from turns import markdown, median, quotient, take_turns

from gptlab.borrowed import PATTERNS, HuggingFaceTokenizer, TiktokenTokenizer
from gptlab.chunks import chunks
from gptlab.data.corpus import Files
from gptlab.data.sources import PySource
from gptlab.tokenizer import N_SPECIAL, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from gptlab.words import WordTokenizer

BATCH = 1000  # documents that a library is given at a time
WARM = 100  # documents encoded before the clock runs
BATCHES = {  # what a library calls its own way with many texts; `threads` of tokenizers are those of its process
    "sentencepiece": "`sentencepiece`, `encode(texts)`",
    "tokenizers": "`tokenizers`, `encode_batch_fast`",
    "tiktoken": "`tiktoken`, `encode_ordinary_batch`",
}
KINDS = ("BPE", "unigram", "hf", "tiktoken", "word", "char", "byte")
LIBRARY_OF = {"BPE": "sentencepiece", "unigram": "sentencepiece", "hf": "tokenizers", "tiktoken": "tiktoken"}

Build = Callable[[Path, Path, int], dict]  # text, tokenizer, workers: `build` of data.py
Encode = Callable[[Sequence[str]], int]  # texts in, how many tokens they are


def documents() -> list[str]:
    folder = os.environ.get("GPTLAB_DATA_DIR")
    source = Files(f"{folder}/**/*.txt") if folder else PySource()
    return [chunk for document in source.documents() for chunk in chunks(document.text)]


def size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def trained(kind: str, texts: Sequence[str], pieces: int) -> Tokenizer:
    """One of `kind`, of `pieces` tokens where that can be chosen; tiktoken has the vocabulary of hf."""
    settings = {"vocab_size": pieces, "max_train_bytes": 5 * 10**7}
    if kind in ("BPE", "unigram"):
        return SentencePieceTokenizer.train(iter(texts), model_type=kind.lower(), character_coverage=0.9997, **settings)
    if kind == "hf":
        return HuggingFaceTokenizer.train(iter(texts), **settings)
    if kind == "tiktoken":
        hf = trained("hf", texts, pieces)
        learnt = (hf.decode_bytes([i]) for i in range(N_SPECIAL, hf.vocab_size))
        ranks = b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(learnt))
        return TiktokenTokenizer(ranks, "gpt2")
    if kind == "word":
        return WordTokenizer.train(iter(texts), **settings)
    return CharTokenizer.train(iter(texts)) if kind == "char" else ByteTokenizer()


def gptlab_way(tokenizer: Tokenizer) -> Encode:
    return lambda texts: sum(len(tokenizer.encode(text)) for text in texts)


def library_way(tokenizer: Any, library: str, threads: int) -> Encode:
    """The same vocabulary, in the hands of the library alone."""
    if library == "sentencepiece":
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
        return lambda texts: sum(map(len, processor.encode(list(texts), num_threads=threads)))
    if library == "tokenizers":
        own = tokenizers.Tokenizer.from_str(tokenizer.json.decode())
        return lambda texts: sum(len(found.ids) for found in own.encode_batch_fast(texts, add_special_tokens=False))
    lines = (line.split() for line in tokenizer.ranks.splitlines())
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    encoding = tiktoken.Encoding("own", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    return lambda texts: sum(map(len, encoding.encode_ordinary_batch(list(texts), num_threads=threads)))


def measure(task: dict[str, Any]) -> dict[str, float]:
    with open(task["text"], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = load_tokenizer(task["tokenizer"])
    library = task["library"]
    encode = library_way(tokenizer, library, task["threads"]) if library else gptlab_way(tokenizer)
    encode(texts[:WARM])
    start = time.perf_counter()
    tokens = sum(encode(texts[first : first + BATCH]) for first in range(0, len(texts), BATCH))
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def alone(text: Path, tokenizer: Path, library: str | None, threads: int) -> dict[str, float]:
    """What `measure` finds in a process of its own."""
    env = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
    task = {"text": str(text), "tokenizer": str(tokenizer), "library": library, "threads": threads}
    command = [sys.executable, __file__, json.dumps(task)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


class Comparison:
    """The contenders over one text: each gives the seconds that a megabyte takes it."""

    def __init__(self, folder: Path, kinds: Sequence[str], megabytes: float, pieces: int, build: Build):
        self.folder, self.text, self.build = folder, folder / "text.jsonl", build
        texts = documents()
        self.own = {kind: trained(kind, texts, pieces) for kind in kinds}
        for name, tokenizer in self.own.items():
            tokenizer.save(folder / name)
        self.bytes_a_token = {name: size(texts) / gptlab_way(own)(texts) for name, own in self.own.items()}
        self.megabytes = 0.0
        with open(self.text, "w", encoding="utf-8") as file:
            for text in cycle(texts):
                file.write(json.dumps({"text": text}) + "\n")
                self.megabytes += len(text.encode()) / 1e6
                if self.megabytes >= megabytes:
                    break
        self.tokens: dict[str, float] = {}  # of the text, by tokenizer: the same, whoever encodes it

    def contenders(self) -> Iterator[tuple[str, Callable[[], float]]]:
        for name in self.own:
            yield f"{name}: alone", lambda name=name: self.encoded(name, None, 1)
            for workers in (0, 2):
                yield f"{name}: {workers}", lambda name=name, workers=workers: self.built(name, workers)
            for threads in (1, 2) if name in LIBRARY_OF else ():
                library = LIBRARY_OF[name]
                yield (
                    f"{name}: {threads} threads",
                    lambda name=name, library=library, threads=threads: self.encoded(name, library, threads),
                )

    def encoded(self, name: str, library: str | None, threads: int) -> float:
        found = alone(self.text, self.folder / name, library, threads)
        if self.tokens.setdefault(name, found["tokens"]) != found["tokens"]:
            raise RuntimeError(f"{name}: {found['tokens']} tokens by {library}, {self.tokens[name]} by gptlab")
        return found["seconds"] / self.megabytes

    def built(self, name: str, workers: int) -> float:
        return self.build(self.text, self.folder / name, workers)["seconds"] / self.megabytes


def compare(folder: Path, kinds: Sequence[str], megabytes: float, pieces: int, rounds: int, build: Build) -> None:
    comparison = Comparison(folder, kinds, megabytes, pieces, build)
    taken = take_turns(dict(comparison.contenders()), rounds)

    def speed(name: str) -> str:
        return f"{1 / median(taken, name):.1f}"

    rows = [
        (
            *(name, f"{tokenizer.vocab_size:,}", f"{comparison.bytes_a_token[name]:.2f}"),
            *(speed(f"{name}: alone"), speed(f"{name}: 0"), speed(f"{name}: 2")),
            f"{quotient(taken, f'{name}: 0', f'{name}: 2'):.2f}x",
        )
        for name, tokenizer in comparison.own.items()
    ]
    head = "tokenizer | tokens | bytes a token | `encode`, MB/s | to disk, one process | two that encode | beside one"
    print(markdown(head, rows))
    rows = [
        (
            *(f"{BATCHES[library]}, {name}", speed(f"{name}: 1 threads"), speed(f"{name}: 2 threads")),
            f"{quotient(taken, f'{name}: 1 threads', f'{name}: alone'):.2f}x",
            f"{quotient(taken, f'{name}: 2 threads', f'{name}: 2'):.2f}x",
        )
        for name, library in LIBRARY_OF.items()
        if name in comparison.own
    ]
    head = "library | one thread, MB/s | two threads | `encode` beside one | two processes, to disk, beside two"
    print(markdown(head, rows))


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
