"""From text to tokens to batches: `python benchmarks/data.py [--only speed memory kills tokenizers loaders]`.

The text is Python's standard library over and over, each line with a number of its own in front, so that no two are the
same; the tokenizer is sentencepiece BPE with 8,000 pieces. `speed` is MB of text a second with so many processes that
encode (0: in the one that reads), starting them included, in turns. `memory` is the largest resident memory of all
processes, which grows with the corpus or does not. `kills` ends builds by kill -9 at random moments, and compares the
bytes of the one that is left alone with those of a build that nobody killed.

`tokenizers` (encoders.py) is MB of text a second by each kind of tokenizer, alone and through all of that, beside the
batches of its own library, with one thread and two; its text is that of GPTLAB_DATA_DIR. `loaders` (loaders.py) is
windows a second, beside a DataLoader over single items and random slices.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import encoders
import loaders
from turns import machine, markdown, median, quotient, take_turns

from gptlab.data.sources import PySource
from gptlab.tokenizer import SentencePieceTokenizer

WORDS = ("speed", "memory", "kills", "tokenizers", "loaders")
PROCESSORS = len(os.sched_getaffinity(0))
BUILD = """
import json, resource, sys, time
from pathlib import Path
from gptlab.data import encoding
from gptlab.data.corpus import Files
from gptlab.data.tokens import prepare
from gptlab.tokenizer import load_tokenizer
encoding.JOURNAL_SECONDS = float(sys.argv[5])
start = time.monotonic()
made = prepare(Files(sys.argv[1]), load_tokenizer(sys.argv[2]), validation_fraction=0.1, cache=Path(sys.argv[3]),
               workers=int(sys.argv[4]))
own, others = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"seconds": time.monotonic() - start, "own_mb": own, "worker_mb": others, "folder": str(made.folder)}))
"""


def write_text(path: Path, megabytes: float) -> None:
    lines = [line for document in PySource().documents() for line in document.text.splitlines()]
    size, number = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = f"{number} {lines[number % len(lines)]}\n"
            file.write(text)
            size += len(text.encode())
            number += 1


def command(text: Path, tokenizer: Path, cache: Path, workers: int, journal_s: float) -> list[str]:
    return [sys.executable, "-c", BUILD, str(text), str(tokenizer), str(cache), str(workers), str(journal_s)]


def build(text: Path, tokenizer: Path, workers: int) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        said = subprocess.run(command(text, tokenizer, Path(cache), workers, 5), capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(said.stderr)
        return json.loads(said.stdout.splitlines()[-1])


def bytes_of(folder: Path) -> str:
    names = ("train.bin", "validation.bin", "meta.json")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def speed(folder: Path, tokenizer: Path, megabytes: float, rounds: int) -> None:
    text = folder / "text.txt"
    write_text(text, megabytes)
    ways = {
        f"{n} processes": (lambda n=n: build(text, tokenizer, n)["seconds"] / megabytes) for n in (0, 1, PROCESSORS)
    }
    taken = take_turns(ways, rounds)
    rows = [(way, f"{1 / median(taken, way):.1f}", f"{1 / quotient(taken, way, '0 processes'):.2f}x") for way in ways]
    print(markdown("| MB/s | beside the first", rows))


def memory(folder: Path, tokenizer: Path, sizes: list[float]) -> None:
    rows = []
    for size in sizes:
        write_text(folder / "text.txt", size)
        own = build(folder / "text.txt", tokenizer, 2)
        rows.append((f"{size:,.0f}", f"{own['own_mb']:.0f}", f"{own['worker_mb']:.0f}", f"{size / own['seconds']:.1f}"))
        print("  ", rows[-1], flush=True)
    print(markdown("corpus, MB | reading process, MB | a process that encodes, MB | MB/s", rows))


def kills(folder: Path, tokenizer: Path, megabytes: float, count: int) -> None:
    text, draw = folder / "text.txt", random.Random(1)
    write_text(text, megabytes)
    start = time.monotonic()
    whole = finished(command(text, tokenizer, folder / "whole", 2, 0.1))
    seconds = time.monotonic() - start
    killed = ended = 0
    while killed < count:
        process = subprocess.Popen(command(text, tokenizer, folder / "killed", 2, 0.1), stdout=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(0, 0.6 * seconds))
            ended += 1
            shutil.rmtree(folder / "killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    last = finished(command(text, tokenizer, folder / "killed", 2, 0.1))
    same = "the same" if bytes_of(whole) == bytes_of(last) else "OTHER"
    print(f"{killed} builds of {megabytes:.0f} MB killed, {ended} ended between kills; the bytes are {same}")


def finished(command: list[str]) -> Path:
    """The folder of tokens that a build which nobody kills has made."""
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(json.loads(said.stdout.splitlines()[-1])["folder"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=WORDS, choices=WORDS)
    parser.add_argument("--megabytes", type=float, default=100, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 10, 100, 1000], help="MB of text, for memory")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=encoders.KINDS, choices=encoders.KINDS, help="of tokenizers")
    parser.add_argument("--pieces", type=int, default=8000, help="vocabulary of tokenizers that are compared")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of the file that loaders read")
    parser.add_argument("--batches", type=int, default=2000, help="that each loader is timed for")
    arguments = parser.parse_args()
    print(machine("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for word in arguments.only:
            own = Path(folder, word)
            own.mkdir()
            if word == "tokenizers":
                sizes = (arguments.megabytes, arguments.pieces, arguments.rounds)
                encoders.compare(own, arguments.kinds, *sizes, build)
            elif word == "loaders":
                loaders.compare(own, arguments.tokens, arguments.batches, arguments.rounds)
            else:
                of_builds(word, own, arguments)
            shutil.rmtree(own)


def of_builds(word: str, folder: Path, arguments: argparse.Namespace) -> None:
    tokenizer = folder / "tokenizer"
    settings = {"vocab_size": 8000, "model_type": "bpe", "character_coverage": 0.9995, "max_train_bytes": 5 * 10**6}
    SentencePieceTokenizer.train((d.text for d in PySource().documents()), **settings).save(tokenizer)
    if word == "speed":
        speed(folder, tokenizer, arguments.megabytes, arguments.rounds)
    elif word == "memory":
        memory(folder, tokenizer, arguments.sizes)
    else:
        kills(folder, tokenizer, arguments.megabytes, arguments.kills)


if __name__ == "__main__":
    main()
