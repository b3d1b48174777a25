"""Text read while training: `python benchmarks/streaming.py [--only speed wait memory resume] [--megabytes 40]`.

The text is Python's standard library over and over in JSON lines, each document with a number of its own in front.
`speed` is tokens that a loader of one reader gives in a second of one core's time, by tokenizer, beside what the
tokenizer alone encodes, document by document. `wait` trains on a stream, in blocks of 256 windows, and on the built
files of the same text, in turns: tokens a second, and the share of the time that goes by waiting for batches, the first
block with them, by Lightning's own profiler. `memory` is the largest resident memory of a process that streams all of a
text, which grows with the text or does not. `resume` is how long it takes to the first batch from within a file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_throughput import SHAPES
from turns import Rounds, machine, markdown, median, quotient, run_gptlab, take_turns

from gptlab.borrowed import HuggingFaceTokenizer
from gptlab.data.corpus import Files
from gptlab.data.listed import text_files
from gptlab.data.sources import PySource
from gptlab.data.stream import StreamLoader, Text
from gptlab.data.windows import TrainingOrder
from gptlab.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

BATCH, BLOCK, BUFFER = 16, 1024, 256
PARTS = ("speed", "wait", "memory", "resume")
STREAMED = r"""
import re
import sys
sys.path[:0] = sys.argv[4:]
from streaming import loader_of
from gptlab.tokenizer import load_tokenizer
loader = loader_of(sys.argv[1], load_tokenizer(sys.argv[2]), int(sys.argv[3]))
for _ in loader:
    pass
loader.close()
print(int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def write_shards(folder: Path, megabytes: float, files: int = 4) -> str:
    """About so many bytes of text in JSON lines, and the glob that names the files."""
    texts = [document.text for document in PySource().documents()]
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for file in range(files):
        with open(folder / f"{file}.jsonl", "w", encoding="utf-8") as lines:
            while lines.tell() < megabytes / files * 1e6:
                lines.write(json.dumps({"text": f"{number} {texts[number % len(texts)]}"}) + "\n")
                number += 1
    return f"{folder}/*.jsonl"


def tokenizers() -> dict[str, Tokenizer]:
    texts = [document.text for document in PySource().documents()]
    pieces = {"vocab_size": 8000, "max_train_bytes": 5 * 10**6}
    of_kind = {
        f"sentencepiece {kind}": SentencePieceTokenizer.train(
            iter(texts), model_type=kind, character_coverage=0.9995, **pieces
        )
        for kind in ("bpe", "unigram")
    }
    return of_kind | {"hf": HuggingFaceTokenizer.train(iter(texts), **pieces), "byte": ByteTokenizer()}


def loader_of(files: str, tokenizer: Tokenizer, windows: int, buffer: int = BUFFER) -> StreamLoader:
    """A loader of one reader, an epoch of which is so many windows."""
    text = Text(text_files(files), Files(files), tokenizer, BLOCK, buffer, readers=1, seed=1, cache=Path(files).parent)
    return StreamLoader(text, TrainingOrder(windows, BATCH, 1, seed=1), pin_memory=False)


def seconds_a_token(files: str, tokenizer: Tokenizer, megabytes: float) -> tuple[float, float]:
    """Of the loader over about that much text, its first block left out; and of the tokenizer alone, over the same."""
    documents = [text for path in Files(files).paths() for text in (d.text for d in Files(files).read(path))]
    documents = documents[: max(1, int(len(documents) * min(1, 10 / megabytes)))]
    start = time.process_time()  # of all threads; others may use the machine as well
    count = sum(len(tokenizer.encode(text)) for text in documents)
    alone = (time.process_time() - start) / count
    windows = max(3 * BUFFER, count // BLOCK // BUFFER * BUFFER)
    loader = loader_of(files, tokenizer, windows)
    batches = iter(loader)
    for _ in range(BUFFER // BATCH):
        next(batches)
    start = time.process_time()
    left = sum(1 for _ in batches)
    seconds = time.process_time() - start
    loader.close()
    return seconds / (left * BATCH * BLOCK), alone


def speed(folder: Path, megabytes: float, rounds: int) -> None:
    files = write_shards(folder, megabytes)
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    rows = []
    for name, tokenizer in tokenizers().items():
        taken: Rounds = []
        for _ in range(rounds):
            stream, alone = seconds_a_token(files, tokenizer, megabytes)
            taken.append({"stream": stream, "alone": alone})
        rates = [f"{1e-6 / median(taken, way):.2f}" for way in ("stream", "alone")]
        rows.append((name, *rates, f"{quotient(taken, 'alone', 'stream'):.2f}x"))
        print("  ", rows[-1], file=sys.stderr, flush=True)
    print(markdown("| M tokens a second | the tokenizer alone | beside it", rows))


def share_waited(run_dir: str) -> float:
    """The share of an epoch's time that went into asking for batches, by trainer.profiler=simple."""
    text = (Path(run_dir) / "fit-profile.txt").read_text()

    def total(action: str) -> float:
        return max(float(row.split("|")[4]) for row in text.splitlines() if re.search(action, row))

    return total(r"train_dataloader_next") / total(r"run_training_epoch")


def wait(folder: Path, megabytes: float, rounds: int, shapes: list[str], steps: int) -> None:
    files = write_shards(folder / "shards", megabytes)
    write_shards(folder / "held-out", 0.2, files=1)
    ways = {"built": ("data.stride=BLOCK",), "stream": ("data=stream", f"data.stream.buffer={BUFFER}")}
    rows = []
    for shape in shapes:
        keys = ()
        if shape != "tiny":
            layers, heads, width, block, batch = SHAPES[shape]
            keys = (f"model.n_layer={layers}", f"model.n_head={heads}", f"model.n_embd={width}")
            keys = (*keys, f"model.block_size={block}", f"data.batch_size={batch}")
        else:
            block = 128
        own = (
            *(f"data.files={files}", f"data.validation_files={folder}/held-out/0.jsonl", f"trainer.max_steps={steps}"),
            *("trainer.profiler=simple", "validation.every_steps=null", "samples.every_steps=null", *keys),
            *("checkpoint.every_steps=null", "log.every_steps=5"),
        )
        waited: dict[str, list[float]] = {way: [] for way in ways}

        def train(way: str, own: tuple[str, ...] = own, waited: dict = waited, block: int = block) -> float:
            options = (word.replace("BLOCK", str(block)) for word in ways[way])
            result = run_gptlab(folder, *own, *options)
            waited[way].append(share_waited(result["run_dir"]))
            return 1 / result["tokens_per_second"]

        taken = take_turns({way: (lambda way=way: train(way)) for way in ways}, rounds)
        for way in ways:
            rate, share = 1 / median(taken, way), sorted(waited[way])[len(waited[way]) // 2]
            rows.append((f"{shape}, {way}", f"{rate:,.0f}", f"{quotient(taken, 'built', way):.2f}x", f"{share:.2%}"))
    print(markdown("| tokens a second | beside built | waited", rows))


def memory(folder: Path, sizes: list[float]) -> None:
    tokenizer = tokenizers()["sentencepiece bpe"]
    tokenizer.save(folder / "tokenizer")
    rows = []
    for size in sizes:
        files = write_shards(folder / "shards", size)
        windows = int(size * 1e6 / 2.75 / BLOCK)
        command = [sys.executable, "-c", STREAMED, files, str(folder / "tokenizer"), str(windows), *sys.path]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append((f"{size:,.0f}", f"{float(said.stdout):.0f}"))
        print("  ", rows[-1], file=sys.stderr, flush=True)
    print(markdown("text, MB | MB at most", rows))


def resume(folder: Path, megabytes: float) -> None:
    files = write_shards(folder, megabytes, files=1)
    tokenizer = tokenizers()["sentencepiece bpe"]
    rows = []
    documents = (folder / "0.jsonl").read_bytes().count(b"\n")
    for share in (0.0, 0.5, 0.99):
        loader = loader_of(files, tokenizer, 10**9)
        place = [1, 0, 0, int(share * documents), 0]
        loader.load_state_dict({"epoch": 0, "windows": BUFFER, "places": [place]})
        start = time.perf_counter()
        next(iter(loader))
        rows.append((f"{share:.0%} of {megabytes:,.0f} MB", f"{time.perf_counter() - start:.2f}"))
        loader.close()
    print(markdown("place in a file | seconds to the first batch", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "baby"], choices=["tiny", *SHAPES])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sizes", type=float, nargs="+", default=[10, 100])
    arguments = parser.parse_args()
    print(machine("cpu"))
    affinity = os.sched_getaffinity(0)
    for part in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            if part == "speed":
                speed(Path(folder), arguments.megabytes, arguments.rounds)
            elif part == "wait":
                wait(Path(folder), arguments.megabytes, arguments.rounds, arguments.shapes, arguments.steps)
            elif part == "memory":
                memory(Path(folder), arguments.sizes)
            else:
                resume(Path(folder), arguments.megabytes)
        os.sched_setaffinity(0, affinity)


if __name__ == "__main__":
    main()
