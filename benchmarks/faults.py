"""No step is ever lost: faults injected for real, and what each costs. `python benchmarks/faults.py [--kills 50]`

A trial is one fault in a small run, which is then resumed until its end. It is exact where metrics.csv (but for the
clock), samples.jsonl, result.json and all weights are those of the uninterrupted run, bit for bit; where every
checkpoint on disk was whole right after the fault; and where the message said what it should. The columns count, over
all trials of a fault:

steps lost      steps between the checkpoint that checkpoint.every_steps had put on disk, and that the fault did not
                damage itself, and the one from which the run went on
steps repeated  steps that were over and were taken once more
data lost       windows that the run missed at a step, or saw though the uninterrupted run did not

`--goodput MINUTES` trains the default model instead, kills it every `--every` seconds, and gives the share of the time
that went into steps that stayed. Mounting small disks takes root: without it their rows are skipped.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from goodput import goodput
from trials import Trial, differences, is_running, watch_for, write_text

LAST_STEP = 24  # of trials.OPTIONS


class SkipFault(Exception):  # noqa: N818 - no error
    """A fault that cannot be injected on this machine."""


@dataclass
class Row:
    """One line of the table."""

    fault: str
    trials: int = 0
    exact: int = 0
    steps_lost: int = 0
    steps_repeated: int = 0
    data_lost: int = 0
    note: str = ""
    troubles: list[str] = field(default_factory=list)  # what was not as it should be

    def count(
        self, trial: Trial, whole: Trial, troubles: list[str], trials: int = 1, spared: int | None = None
    ) -> None:
        """Enter a run that has come to its end, in which `trials` faults happened."""
        if not (trial.folder / "result.json").exists():
            troubles = [*troubles, f"no result: {trial.said[-2000:]}"]
        else:
            troubles = [*troubles, *(f"{what} differs" for what in differences(whole.folder, trial.folder))]
        self.trials += trials
        self.exact += 0 if troubles else trials
        self.steps_lost += trial.steps_lost(spared)
        self.steps_repeated += trial.steps_repeated()
        self.data_lost += trial.data_lost(whole)
        self.troubles += [f"{trial.folder.name}: {trouble}" for trouble in troubles]


class Bench:
    """Where the trials happen, and the uninterrupted runs that they are held to."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.text = folder / "text.txt"
        write_text(self.text)
        self._whole: dict[tuple[str, ...], Trial] = {}
        self._count = 0

    def trial(self, *options: str, nan_at: int | None = None, disk: Path | None = None) -> Trial:
        self._count += 1
        name = f"run-{self._count:03d}"
        return Trial((disk or self.folder) / name, self.text, options, nan_at, beside=self.folder)

    def whole(self, *options: str, nan_at: int | None = None) -> Trial:
        """The uninterrupted run of these options."""
        key = (*options, str(nan_at))
        if key not in self._whole:
            trial = self._whole[key] = self.trial(*options, nan_at=nan_at)
            if code := trial.run():
                raise RuntimeError(f"the uninterrupted run ended with {code}:\n{trial.said}")
        return self._whole[key]


def finish(trial: Trial, says: str = "", refused: bool = False) -> list[str]:
    """Resume a run to its end: what was not as it should be. `says` must be in what the session says."""
    code, troubles = trial.run(), []
    if code != 0:
        troubles.append(f"the resumed run ended with {code}: {trial.said[-1500:]}")
    if not re.search(says, trial.said):
        troubles.append(f"nothing like {says!r} in: {trial.said[:1500]}")
    return troubles


# Kills


def kill_in_mid_write(bench: Bench, trial: Trial) -> bool:
    """Kill a session at a random moment, most of them in a save; whether it lived until then."""
    rng, folder = bench.rng, trial.folder / "checkpoints"
    pid = trial.begin()
    temporary = folder / f".{rng.choice(['last.ckpt'] * 4 + ['manifest.json'])}.tmp.{pid}"
    if rng.random() < 0.2:  # any moment: imports are over, all the rest is under way
        alive = not watch_for(pid, lambda: False, rng.uniform(0, 3))  # False: its time was up, or the run's
        alive = alive and is_running(pid)
    else:
        alive = watch_for(pid, temporary.exists, 60)
        for _ in range(rng.randint(0, 3)):  # some saves later
            alive = alive and watch_for(pid, lambda: not temporary.exists(), 60)
            alive = alive and watch_for(pid, temporary.exists, 60)
        time.sleep(rng.choice([0, rng.uniform(0, 0.004)]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return trial.end(pid) == -signal.SIGKILL and alive


def kills(bench: Bench, row: Row, count: int, *options: str) -> None:
    """`count` kills, as many in one run as come before its end, over as many runs as that takes."""
    whole, killed, writing = bench.whole(*options), 0, 0
    while killed < count:
        trial, here, troubles = bench.trial(*options), 0, []
        while killed + here < count and kill_in_mid_write(bench, trial):
            here += 1
            writing += any(trial.folder.rglob(".*.tmp.*"))
            troubles += trial.unsound()
        if not (trial.folder / "result.json").exists():
            troubles += finish(trial)
        row.count(trial, whole, troubles, here)
        killed += here
    row.note = f"{writing} of them while a file was being written"


def terminations(bench: Bench, row: Row, count: int) -> None:
    whole = bench.whole()
    for _ in range(count):
        trial = bench.trial()
        pid = trial.begin()
        trial.until_step(pid, bench.rng.randint(1, LAST_STEP - 6))
        time.sleep(bench.rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGTERM)
        code = trial.end(pid)
        troubles = [] if code == 143 else [f"SIGTERM ended with {code}: {trial.said[-500:]}"]
        row.count(trial, whole, [*troubles, *trial.unsound(), *finish(trial, "continuing from")])


# Disks


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """`mount OPTIONS folder`, or SkipFault where this user must not."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        raise SkipFault("skipped: mounting takes root")
    if subprocess.run([mount, *options, str(folder)], capture_output=True, check=False).returncode:
        raise SkipFault("skipped: mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(bench: Bench, row: Row, count: int) -> None:
    whole = bench.whole()
    for number in range(count):
        with mounted(bench.folder / f"disk-{number}", "-t", "tmpfs", "-o", "size=24m", "tmpfs") as disk:
            trial = bench.trial(disk=disk)
            pid = trial.begin()
            trial.until_step(pid, bench.rng.randint(2, 12))
            spare = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
            with contextlib.suppress(OSError):
                while is_running(pid):
                    os.write(spare, bytes(65536))
            os.close(spare)
            code, troubles = trial.end(pid), trial.unsound()
            if code != 1 or not re.search(r"error: .*No space left[\s\S]*resume=", trial.said):
                troubles.append(f"ended with {code}: {trial.said[-500:]}")
            (disk / "filler").unlink()
            row.count(trial, whole, [*troubles, *finish(trial, "continuing from")])


def read_only_folder(bench: Bench, row: Row, count: int) -> None:
    """The checkpoints' folder becomes read-only under a run, as a file system does that has seen an error."""
    whole = bench.whole()
    for _ in range(count):
        trial = bench.trial()
        pid = trial.begin()
        trial.until_step(pid, bench.rng.randint(2, 12))
        folder = trial.folder / "checkpoints"
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
            code, troubles = trial.end(pid), trial.unsound()
            if code != 1 or not re.search(r"error: .*Read-only[\s\S]*last\.ckpt", trial.said):
                troubles.append(f"ended with {code}: {trial.said[-500:]}")
        row.count(trial, whole, [*troubles, *finish(trial, "continuing from")])


# Damage between two sessions


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def no_text(path: Path) -> None:
    path.write_bytes(b"\x00\xff{" * 9)


def prepared(bench: Bench, name: str) -> Path:
    (path,) = (bench.folder / "cache/tokens").glob(f"*/{name}")
    return path


@dataclass(frozen=True)
class Damage:
    """What is done to which file, and what the next session must say."""

    fault: str
    file: str  # in the run folder, or `cache/...`
    do: Callable[[Path], None]
    says: str
    takes_a_checkpoint: bool = False  # the newest: the one before it is what the fault has spared


DAMAGES = (
    Damage("last.ckpt truncated", "checkpoints/last.ckpt", half, r"passed over: \S+last.ckpt", True),
    Damage("last.ckpt, a bit flipped", "checkpoints/last.ckpt", flip_a_bit, r"passed over: \S+last.ckpt", True),
    Damage("last.ckpt deleted", "checkpoints/last.ckpt", Path.unlink, "continuing from"),
    Damage("manifest.json, half of it", "checkpoints/manifest.json", half, "manifest.json cannot be read"),
    Damage("manifest.json deleted", "checkpoints/manifest.json", Path.unlink, "there is no manifest.json"),
    Damage("status.json, half of it", "status.json", half, "status.json"),
    Damage("status.json is no text", "status.json", no_text, "status.json"),
    Damage("config.yaml, half of it", "config.yaml", half, "config.yaml"),
    Damage("config.yaml is no text", "config.yaml", no_text, "config.yaml"),
    Damage("config.yaml deleted", "config.yaml", Path.unlink, "config.yaml"),
    Damage("metrics.csv, half a line", "metrics.csv", cut_last_line, r"metrics.csv: line \d+ damaged"),
    Damage("metrics.csv is no text", "metrics.csv", no_text, r"metrics.csv: line \d+ damaged"),
    Damage("samples.jsonl, half a line", "samples.jsonl", cut_last_line, r"samples.jsonl: line \d+ damaged"),
    Damage("token file deleted", "cache/train.bin", Path.unlink, "building anew"),
    Damage("token file, a bit flipped", "cache/train.bin", flip_a_bit, "building anew"),
    Damage("meta.json of the tokens, half of it", "cache/meta.json", half, "building anew"),
)


def damage(bench: Bench, row: Row, count: int, what: Damage) -> None:
    whole = bench.whole()
    for _ in range(count):
        trial = bench.trial()
        trial.kill_at_step(bench.rng.randint(7, LAST_STEP - 4))
        place, _, name = what.file.partition("/")
        path = prepared(bench, name) if place == "cache" else trial.folder / what.file
        newest = torch.load(trial.folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        what.do(path)
        row.count(trial, whole, finish(trial, what.says), spared=newest - 1 if what.takes_a_checkpoint else None)


def changed_text(bench: Bench, row: Row, count: int) -> None:
    """Refused, naming both fingerprints; with the text as it was, the run goes on."""
    whole, text = bench.whole(), bench.text.read_bytes()
    for _ in range(count):
        trial = bench.trial()
        trial.kill_at_step(bench.rng.randint(2, LAST_STEP - 4))
        bench.text.write_bytes(text + b"One more sentence.\n")
        code, fingerprints = trial.run(), set(re.findall(r"\b[0-9a-f]{64}\b", trial.said))
        bench.text.write_bytes(text)
        troubles = [] if code == 2 and len(fingerprints) == 2 else [f"not refused ({code}): {trial.said[-500:]}"]
        row.count(trial, whole, [*troubles, *finish(trial, "continuing from")])


# Losses that are no numbers


def nan_stops(bench: Bench, row: Row, count: int) -> None:
    """At step 50, of a cause that is gone when the run is resumed."""
    longer = ("trainer.max_steps=60",)
    whole = bench.whole(*longer)
    for _ in range(count):
        trial = bench.trial(*longer, nan_at=50)
        code, troubles = trial.run(), trial.unsound()
        if code != 1 or "NaN or infinite by step 50" not in trial.said:
            troubles.append(f"ended with {code}: {trial.said[-500:]}")
        trial.nan_at = None
        row.count(trial, whole, [*troubles, *finish(trial, "continuing from .* at step 49")])


def nan_is_skipped(bench: Bench, row: Row, count: int) -> None:
    """A run that passes over step 50, killed and resumed around it; its count is part of what must be the same."""
    longer = ("trainer.max_steps=60", "nonfinite=skip")
    whole = bench.whole(*longer, nan_at=50)
    skipped = json.loads((whole.folder / "result.json").read_text())["skipped_steps"]
    for _ in range(count):
        trial = bench.trial(*longer, nan_at=50)
        trial.kill_at_step(bench.rng.randint(49, 54))
        troubles = [] if skipped == 1 else [f"{skipped} steps were skipped"]
        row.count(trial, whole, [*troubles, *trial.unsound(), *finish(trial, "continuing from")])


# The table


def faults(kill_count: int, count: int) -> dict[str, Callable[[Bench, Row], None]]:
    """Each fault by its name, and what injects it."""
    fewer = max(1, kill_count // 5)
    return {
        "kill -9": lambda bench, row: kills(bench, row, kill_count),
        "kill -9, saving in the background": lambda b, row: kills(b, row, fewer, "checkpoint.background=true"),
        "kill -9, two loader processes": lambda b, row: kills(b, row, fewer, "data.num_workers=2"),
        "SIGTERM": lambda bench, row: terminations(bench, row, count),
        "full disk": lambda bench, row: full_disk(bench, row, count),
        "folder becomes read-only": lambda bench, row: read_only_folder(bench, row, count),
        **{what.fault: lambda bench, row, what=what: damage(bench, row, count, what) for what in DAMAGES},
        "text changed since the start": lambda bench, row: changed_text(bench, row, count),
        "NaN at step 50, nonfinite=stop": lambda bench, row: nan_stops(bench, row, count),
        "NaN at step 50, nonfinite=skip": lambda bench, row: nan_is_skipped(bench, row, count),
    }


def inject(kill_count: int, count: int, only: str, seed: int, folder: Path) -> list[Row]:
    bench, found = Bench(folder, seed), []
    for name, act in faults(kill_count, count).items():
        if not re.search(only, name):
            continue
        row = Row(name)
        try:
            act(bench, row)
        except SkipFault as reason:
            row.note = str(reason)
        found.append(row)
        show(row)
    return found


WIDTHS = (36, 7, 8, 7, 9, 6)


def show(row: Row) -> None:
    values = (row.fault, row.trials, row.exact, row.steps_lost, row.steps_repeated, row.data_lost)
    cells = [
        f"{value:<{w}}" if i == 0 else f"{value:>{w}}" for i, (value, w) in enumerate(zip(values, WIDTHS, strict=True))
    ]
    print(*cells, row.note, flush=True)
    for trouble in row.troubles:
        print(f"    {trouble}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kill -9s in a plain run; a fifth of it in the variants")
    parser.add_argument("--trials", type=int, default=3, help="of each other fault")
    parser.add_argument("--only", default="", help="a regular expression: the faults to inject")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which faults happen")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--goodput", type=float, metavar="MINUTES", help="a long run, instead of the table")
    parser.add_argument("--every", type=float, default=120, help="seconds between the kills of the long run")
    parser.add_argument("overrides", nargs="*", help="of the long run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        if given.goodput:
            goodput(given.goodput, given.every, given.overrides, folder)
            return 0
        os.environ |= {"GPTLAB_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        torch.set_num_threads(1)  # sessions are forked: no threads before that
        elsewhere = Path("/dev/shm")
        if elsewhere.is_dir() and elsewhere.stat().st_dev != folder.stat().st_dev:
            os.environ["TMPDIR"] = tempfile.tempdir = str(elsewhere)  # a file must not be moved in from there
        print(f"{'fault':<{WIDTHS[0]}} trials  resumed   steps     steps   data")
        print(f"{'':<{WIDTHS[0]}}         exactly    lost  repeated   lost")
        rows = inject(given.kills, given.trials, given.only, given.seed, folder)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.exact == row.trials and not row.steps_lost and not row.data_lost for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
