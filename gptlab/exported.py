"""RUN as a folder that `export` wrote, or that transformers did: its network, its weights and its tokenizer.

A tokenizer.json of somebody else's has its ids moved up here, to make room for gptlab's special tokens; the rows of the
embeddings move with them. Its end of text becomes `</s>`, which also begins a text here.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptlab import architectures, bundle, checkpoint, tensors, weight_names
from gptlab.files import sha256_of_file
from gptlab.model import GPT, GPTConfig
from gptlab.tokenizer import BOS_ID, EOS_ID, PAD_ID, SIDECAR, Tokenizer, load_tokenizer

PREFIX = "hf:"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OWN_TOKENIZER = f"tokenizer/{SIDECAR}"
TABLES = ("embed.weight", "head.weight")  # with a row for each token


class Exported(NamedTuple):
    config: GPTConfig  # its vocabulary is not padded
    weights: dict[str, Tensor]  # in the file, from which they are read as they are used
    tokenizer: Tokenizer
    record: dict[str, Any]  # gptlab.json, where it is a bundle


def folder_of(run: str | Path) -> Path | None:
    """The exported folder that RUN, or `hf:<folder>`, means; None where it means something else."""
    name = str(run)
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    found = folder.is_dir() and any((folder / file).is_file() for file in (CONFIG, bundle.NAME, WEIGHTS, INDEX))
    if name.startswith(PREFIX) and not found:
        raise ValueError(
            f"{name}: there is no folder {folder} with a config.json; give hf:<a folder on this machine>, nothing is "
            "downloaded"
        )
    return folder if found else None


def open_model(folder: Path, trust: tuple[str, ...] = ()) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The network, in eval mode, the tokenizer, and gptlab's record of an exported folder, where there is one."""
    config, weights, tokenizer, record = load(folder, trust)
    return checkpoint.build(config, weights), tokenizer, record


def load(folder: Path, trust: tuple[str, ...] = ()) -> Exported:
    """What is in an exported folder. Raises ValueError, naming the file, for what is damaged or cannot be ours."""
    needed = (CONFIG, WEIGHTS, OWN_TOKENIZER)
    record = bundle.verified(folder, needed) if (folder / bundle.NAME).is_file() else None
    content = bundle.read_json(folder / CONFIG)
    try:
        config = architectures.from_json(content)
        if record is not None:
            config = recorded_config(record.get("model"), config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        weights = weight_names.to_ours(config, read_weights(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tokenizer, shift = read_tokenizer(folder, trust)
    if tokenizer.vocab_size > config.vocab_size + shift:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size - shift} ids, and its network {config.vocab_size}"
        )
    if shift:
        taken = special_rows(content, config.vocab_size)
        weights |= {name: moved(weights[name], shift, taken) for name in TABLES if name in weights}
        config = replace(config, vocab_size=config.vocab_size + shift)
    return Exported(config, weights, tokenizer, record or {})


def recorded_config(recorded: Any, found: GPTConfig) -> GPTConfig:
    """The config in a bundle's record, which must be of the network that config.json describes."""
    try:
        unknown = set(recorded) - {field.name for field in fields(GPTConfig)}
        if unknown:
            raise ValueError(f"fields unknown to this gptlab: {', '.join(sorted(unknown))}")
        ours = replace(GPTConfig(**recorded), vocab_multiple=1)
        if faults := ours.faults():
            raise ValueError("; ".join(faults))
        theirs = architectures.from_json(architectures.to_json(ours))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the model in {bundle.NAME} is none ({error})") from error
    for name, value in vars(theirs).items():
        if value != getattr(found, name):
            raise ValueError(f"model.{name} is {getattr(found, name)} here, and {value} in {bundle.NAME}")
    return ours


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights. Raises ValueError where there are none that hold no code."""
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        pickled = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
        reason = f"; {pickled[0]} may hold code and is not read: save it again as safetensors" if pickled else ""
        raise ValueError(f"there is no {WEIGHTS}{reason}")
    index = bundle.read_json(folder / INDEX)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    names = list(listed.values()) if isinstance(listed, dict) and listed else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX}: refused, it lists {str(name)[:80]!r}, which is no safetensors file beside it")
    return [folder / name for name in sorted(set(names))]


def read_weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        bundle.require_file(path)
        part = tensors.read(path)
        if twice := found.keys() & part.keys():
            raise ValueError(f"{path.name} holds {min(twice)}, which another file holds too")
        found |= part
    return found


def read_tokenizer(folder: Path, trust: tuple[str, ...]) -> tuple[Tokenizer, int]:
    """The tokenizer, and by how much its ids have moved up from those that the network in the folder knows."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            bundle.require_file(folder / name, bundle.LARGEST_JSON)
    if any((folder / place).is_file() for place in (SIDECAR, OWN_TOKENIZER)):
        return load_tokenizer(folder, trust), 0
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.model" if alone else folder, trust)
    except ValueError as error:
        remedy = "; if it comes of a folder that gptlab exported, copy the folder tokenizer from there"
        raise ValueError(f"{error}{remedy}") from error
    return tokenizer, getattr(tokenizer, "shift", 0)


def special_rows(content: Mapping[str, Any], vocab_size: int) -> dict[int, int]:
    """Which of gptlab's special ids means which of the ids that a config.json names."""
    taken: dict[int, int] = {}
    for ours, name in ((EOS_ID, "eos_token_id"), (BOS_ID, "bos_token_id"), (PAD_ID, "pad_token_id")):
        theirs = content.get(name)
        theirs = theirs[0] if isinstance(theirs, list) and theirs else theirs
        if type(theirs) is int and 0 <= theirs < vocab_size and theirs not in taken.values():
            taken[ours] = theirs
    return taken


def moved(table: Tensor, shift: int, taken: Mapping[int, int]) -> Tensor:
    """The rows of `table` after `shift` new ones, of which those in `taken` (ours to theirs) have moved there.

    Others are the mean of all: as tied outputs they get the mean of all logits, which is far below what is likely.
    """
    mean = table.mean(dim=0, dtype=torch.promote_types(table.dtype, torch.float32)).to(table.dtype)
    rows = torch.cat((mean.expand(shift, -1), table))
    for ours, theirs in taken.items():
        rows[ours], rows[theirs + shift] = table[theirs], mean
    return rows


def padded(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the rows that a network of this config has beyond its vocabulary; they are never predicted."""
    missing = config.padded_vocab_size - len(weights["embed.weight"])
    tables = {name: weights[name] for name in TABLES if name in weights}
    return dict(weights) | {
        name: torch.cat((table, table.new_zeros(missing, table.shape[1]))) for name, table in tables.items() if missing
    }


def sha256(folder: Path) -> str:
    """Of what tells a folder's weights: gptlab.json, which has their hash, or the weights, the index of several."""
    names = (bundle.NAME, INDEX, WEIGHTS)
    return sha256_of_file(next(folder / name for name in names if (folder / name).is_file()))
