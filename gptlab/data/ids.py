"""Shards as the data of a run: split before windows are cut, read once to be checked, and never copied."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.checking import Checked, bytes_of_tokens, check_shard, check_shards, hash_of
from gptlab.data.shards import Shard, open_shards
from gptlab.data.tokens import Joined, Prepared, TokenFile, fingerprint_of, open_prepared
from gptlab.run import write_json
from gptlab.tokenizer import EOS_ID, Tokenizer

MANY_SHARDS = 100  # from here on whole shards go to one side; below, each one gives its tail to validation
SIDES = ("train", "validation")
TAIL, HASH, TOKENS = "tail of file", "hash of file", "tokens"  # how the sides are told apart, as meta.json says
Files = str | Sequence[str]


def ready(build: Tokenizer | Callable[..., Tokenizer], files: Files) -> Tokenizer:
    """The tokenizer of the ids in `files`. Raises ValueError where it would have to be learnt from text."""
    if isinstance(build, Tokenizer):
        return build
    texts = next(iter(inspect.signature(build).parameters.values()))
    if texts.default is texts.empty:
        own = prepared_folder(files)
        where = own if own and (own / "tokenizer").is_dir() else "<run, tokenizer folder or file>"
        raise ValueError(
            f"data.tokens={files!r} goes with tokenizer.path: a tokenizer learnt from other text would give the ids "
            f"other meanings; give tokenizer.path={where}, the one that made them"
        )
    return build()


def prepared_folder(files: Files) -> Path | None:
    """The folder that `gptlab.prepare` filled, where `files` is the path of one."""
    path = Path(files).expanduser() if isinstance(files, str) else None
    return path if path is not None and (path / "meta.json").is_file() else None


def count_ids(files: Files) -> int:
    """How many there are, without reading any. Raises ValueError as opening them does."""
    if folder := prepared_folder(files):
        splits = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["splits"]
        return sum(split["tokens"] for split in splits.values())
    return sum(len(shard.ids) for shard in open_shards(files))


def prepare_ids(
    files: Files,
    tokenizer: Tokenizer,
    *,
    validation_files: Files | None = None,
    validation_fraction: float,
    cache: Path,
    again: bool = False,
) -> Prepared:
    """The data in files of ids, whose bytes stay where they are; `files` may be a folder of `gptlab.prepare` instead.

    Every file is read once, in whole: all ids are tokens of `tokenizer`, and the hash and number of documents those of
    the sidecar. `cache` remembers that by path, size and time of the last change, so that another start reads nothing;
    `again` reads anyway. Raises ValueError, naming the file, for whatever is not as it says.
    """
    if folder := prepared_folder(files):
        return _of_folder(folder, tokenizer, validation_files)
    shards = open_shards(files)
    training = len(shards)
    if validation_files is not None:
        shards += open_shards(validation_files, "data.validation_tokens")
    _refuse_copies(shards, [shard.path.resolve() for shard in shards], training)
    for shard in shards:
        _require_fitting(shard, tokenizer)
    rule = TOKENS if validation_files is not None else HASH if len(shards) >= MANY_SHARDS else TAIL
    cuts = [cut_of(shard.ids, validation_fraction) if rule == TAIL else None for shard in shards]
    found = check_shards(shards, cuts, tokenizer, Path(cache) / "shards", again)
    if rule == TOKENS:
        _refuse_copies(shards, [checked.sha256 for checked in found], training)
    if rule == HASH:  # it stays so when others are added, or it is renamed, and is the same for copies
        is_held_out = [int(checked.sha256[:16], 16) / 2**64 < validation_fraction for checked in found]
    else:
        is_held_out = [number >= training for number in range(len(shards))]
    records = [
        {"path": str(shard.path), "size": shard.path.stat().st_size, "sha256": checked.sha256}
        for shard, checked in zip(shards, found, strict=True)
    ]
    split = {"rule": rule, "fraction": None if rule == TOKENS else validation_fraction}
    runs = list(_runs(shards, cuts, found, is_held_out))
    return _prepared(runs, split, records, tokenizer, Path(cache) / "shards")


def _of_folder(folder: Path, tokenizer: Tokenizer, validation_files: Files | None) -> Prepared:
    if validation_files is not None:
        raise ValueError(
            f"data.tokens={folder} is a folder with its own held-out ids, and data.validation_tokens="
            f"{validation_files!r} names others: leave that out, or give {folder}/train.bin a sidecar and name it"
        )
    prepared = open_prepared(folder, (type(tokenizer).__module__.split(".")[0],))
    _require_same_tokenizer(prepared.tokenizer.fingerprint, tokenizer, folder)
    return prepared


def cut_of(ids: TokenFile, fraction: float) -> int:
    """Where the tail of `ids` begins that is held out: after the end of a document, if one ends near enough.

    That is the first end from `fraction` before the end of the file on, within half of the tail. Where none is, as in a
    document longer than that, the cut goes through it: no window lies across the two sides anyway.
    """
    # Rounded as in split_documents.
    cut = int(len(ids) * round(1 - fraction, 12))
    limit = cut + (len(ids) - cut) // 2
    for start, block in ids.blocks(max(cut - 1, 0), limit):
        if (ends := np.flatnonzero(block == EOS_ID)).size:
            return start + int(ends[0]) + 1
    return cut


def _require_same_tokenizer(theirs: str, tokenizer: Tokenizer, path: Path) -> None:
    if theirs != tokenizer.fingerprint:
        raise ValueError(
            f"{path} was made with the tokenizer {theirs}, and this one is {tokenizer.fingerprint}: its ids mean other "
            "text; give tokenizer.path the one that made them"
        )


def _require_fitting(shard: Shard, tokenizer: Tokenizer) -> None:
    """What the sidecar says of its tokenizer, held to ours."""
    if (sidecar := shard.sidecar) is None:
        return
    if sidecar.tokenizer_fingerprint is not None:
        _require_same_tokenizer(sidecar.tokenizer_fingerprint, tokenizer, shard.path)
    if sidecar.vocab_size > tokenizer.vocab_size:
        raise ValueError(
            f"{shard.path} is of a vocabulary of {sidecar.vocab_size:,}, and this tokenizer has "
            f"{tokenizer.vocab_size:,} tokens: give tokenizer.path the one that made it"
        )


def _refuse_copies(shards: list[Shard], known_by: list, training: int) -> None:
    """Raise ValueError where a shard that is held out is known by the same as one of the first ones, for training."""
    known = {name: shard.path for shard, name in zip(shards[:training], known_by[:training], strict=True)}
    for shard, name in zip(shards[training:], known_by[training:], strict=True):
        if same := known.get(name):
            raise ValueError(
                f"{shard.path} is held out, and the same as {same}, which is trained on: leave it out of one of them"
            )


def faults_of(shards: list[Shard], tokenizer: Tokenizer) -> list[str]:
    """What is wrong with each of them, where a run only hears of the first."""
    found, token_bytes = [], bytes_of_tokens(tokenizer)
    for shard in shards:
        try:
            _require_fitting(shard, tokenizer)
            check_shard(shard, None, token_bytes, lambda size: None)
        except ValueError as error:
            found.append(str(error))
    return found


@dataclass(frozen=True)
class Run:
    """Ids of one shard that are on one side, what they sum up to, and what they are known by wherever they lie."""

    side: str
    ids: TokenFile
    sums: dict[str, int]
    name: list  # the hash of the file, and from where to where


def _runs(shards: list[Shard], cuts: list[int | None], found: list[Checked], is_held_out: list[bool]) -> Iterator[Run]:
    for shard, cut, checked, held_out in zip(shards, cuts, found, is_held_out, strict=True):
        size = len(shard.ids)
        if cut is None:
            yield Run(SIDES[held_out], shard.ids, checked.before, [checked.sha256, 0, size])
            continue
        if cut:
            yield Run("train", shard.ids.part(0, cut), checked.before, [checked.sha256, 0, cut])
        if cut < size:
            yield Run("validation", shard.ids.part(cut, size), checked.after, [checked.sha256, cut, size])


def _prepared(
    runs: list[Run], split: dict[str, Any], records: list[dict], tokenizer: Tokenizer, cache: Path
) -> Prepared:
    splits, files = {}, {}
    for side in SIDES:
        own = [run for run in runs if run.side == side]
        if not own:
            raise ValueError(
                f"no ids are left for {side}: data.validation_fraction={split['fraction']} of {len(records)} files "
                f"gives it none; {'lower' if side == 'train' else 'raise'} it, or give data.validation_tokens"
            )
        files[side] = own[0].ids if len(own) == 1 else Joined([run.ids for run in own])
        splits[side] = {name: sum(run.sums[name] for run in own) for name in own[0].sums}
        splits[side] |= {"coverage": None, "sha256": hash_of([run.name for run in own])}
    meta = {
        "splits": splits,
        "split": split,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": EOS_ID,
        "files": {"tokens": records},
    }
    folder = cache / fingerprint_of(meta)[:24]
    if not (folder / "meta.json").exists():  # for a run that finds its files changed, and is to say which
        write_json(folder / "meta.json", meta)
    return Prepared(folder, **files, tokenizer=tokenizer, meta=meta)
