"""Checkpoint files: written whole or not at all, holding only tensors and plain types, and read back as such."""

import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gptlab.files import require_space, write_listed
from gptlab.model import GPT, GPTConfig, rotary_tables
from gptlab.tokenizer import Tokenizer, tokenizer_from_state

OWN_KEY = "gptlab"  # our part of a checkpoint: {format, model, tokenizer, ...}
MODEL_PREFIX = "model."  # where the network's weights stand in `state_dict`


def save(checkpoint: dict[str, Any], path: Path, links: Sequence[Path] = (), spare: Path | None = None) -> None:
    """Write a checkpoint atomically, enter it in its folder's manifest, and give it the further names `links`.

    The file that was there before is kept as `spare`.

    Raises OSError, naming the file, when the disk is full or read-only; what was there before stays.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's zip writer hides the OSError of the file below it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, tensor_bytes(checkpoint))
        write_listed(path, write, checkpoint.get("global_step", -1), links, spare)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; no checkpoint was written, an older one is as it was", str(path)
        ) from error


def tensor_bytes(content: Any) -> int:
    """The bytes of all tensors in nested dicts, lists and tuples."""
    return sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, Tensor))


def _require_as_torch_writes(path: Path) -> None:
    """Raise ValueError where the parts of the archive claim more than the file has: unpacking would fill the memory."""
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are compressed, as torch never writes them")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts claim more bytes than the file has")


def load(path: Path, map_location: Any = "cpu", mapped: bool = False) -> dict[str, Any]:
    """The checkpoint in `path`; never runs code that it holds. Raises ValueError when it is none of ours or damaged.

    With `mapped` the tensors stay in the file, from which they are read when they are used.
    """
    try:
        _require_as_torch_writes(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # the rest is torch's advice to load it all the same
        what = f"it holds code ({found[1]}), which was not run" if found else "it is damaged or no checkpoint"
        raise ValueError(f"{path}: refused, {what}; give a checkpoint that gptlab wrote") from error
    except Exception as error:  # whatever bytes that are no pickle make its reader do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged or no checkpoint ({reason}); give a checkpoint that gptlab wrote") from error
    own = checkpoint.get(OWN_KEY) if isinstance(checkpoint, dict) else None
    if own is None:
        raise ValueError(f"{path}: a torch file, but no checkpoint of gptlab: it has no {OWN_KEY!r} entry")
    if own["format"] > FORMAT:
        raise ValueError(
            f"{path}: a checkpoint of format {own['format']}, this gptlab knows up to {FORMAT}; use a newer one"
        )
    for migrate in MIGRATIONS[own["format"] - 1 :]:
        migrate(checkpoint)
    return checkpoint


def _from_1(checkpoint: dict[str, Any]) -> None:
    checkpoint[OWN_KEY] |= {"format": 2, "skipped_steps": 0, "hardware": None}
    if random := checkpoint.get("callbacks", {}).get("RandomState"):
        checkpoint["callbacks"]["RandomState"] = {"ranks": [random | {"cuda": (random["cuda"] or [None])[0]}]}


MIGRATIONS = (_from_1,)  # of a checkpoint, from format 1 to 2 and so on
FORMAT = len(MIGRATIONS) + 1


def checksum_fault(path: Path) -> str | None:
    """What the CRC-32 of each part of the file, which torch writes and does not read, says against it, if anything."""
    with zipfile.ZipFile(path) as file:
        part = file.testzip()
    return f"{path}: damaged, the checksum of its part {part} is wrong" if part else None


def describe(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Our part of a checkpoint: all that the weights need beside themselves."""
    return {"format": FORMAT, "model": asdict(config), "tokenizer": tokenizer.state()}


def model_config(checkpoint: dict[str, Any]) -> GPTConfig:
    """The config in a checkpoint. Raises ValueError for fields that this version does not know."""
    stored = checkpoint[OWN_KEY]["model"]
    if unknown := set(stored) - {field.name for field in fields(GPTConfig)}:
        raise ValueError(f"the checkpoint's model has fields unknown to this gptlab: {', '.join(sorted(unknown))}")
    return GPTConfig(**stored)


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The network's own weights, without the names of what held it."""
    return {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(MODEL_PREFIX)
    }


def load_model(path: Path, trust: tuple[str, ...] = ()) -> tuple[GPT, Tokenizer]:
    """The network, in eval mode, and the tokenizer of a checkpoint file."""
    return open_model(path, trust)[:2]


def open_model(path: Path, trust: tuple[str, ...] = ()) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The network, in eval mode, the tokenizer, and our part of a checkpoint, of which nothing else is read."""
    checkpoint = load(path, mapped=True)
    try:
        model = build(model_config(checkpoint), model_weights(checkpoint), trust)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit their own config ({error})") from error
    return model, tokenizer_from_state(checkpoint[OWN_KEY]["tokenizer"], trust), checkpoint[OWN_KEY]


def build(config: GPTConfig, weights: dict[str, Tensor], trust: tuple[str, ...] = ()) -> GPT:
    """A network, in eval mode, whose parameters are `weights` themselves. Raises RuntimeError if they don't fit."""
    with torch.device("meta"), Unfilled():
        model = GPT(config, trust)
    if all(type(part).__module__.startswith(("gptlab.", "torch.")) for part in model.modules()):
        model.load_state_dict(weights, assign=True)
        if model.rotary is not None:
            model.rotary = rotary_tables(config)
    else:  # somebody's own part may make tensors that no checkpoint holds
        model = GPT(config, trust)
        model.load_state_dict(weights)
    return model.eval()


class Unfilled(TorchFunctionMode):
    """No first values for weights that will be replaced: on `meta` they are of no use, and torch imports 80 MB more."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange:  # of the rotary tables
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def find(run: Path, which: str = "best") -> Path:
    """The checkpoint file that RUN means: RUN itself, or in a run folder best.ckpt if there is one, else last.ckpt.

    `which` is best, last, or a file, in the run's folder of checkpoints or elsewhere.
    """
    if run.is_file():
        return run
    if not run.exists():
        raise ValueError(f"{run}: no such run folder or checkpoint")
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        for path in (folder / which, Path(which)):
            if path.is_file():
                return path
        there = ", ".join(sorted(path.name for path in folder.glob("*.ckpt"))) or "none"
        raise ValueError(f"{run}: has no checkpoint {which}; there are {there}")
    for name in (which, "last"):
        if (path := folder / f"{name}.ckpt").is_file():
            return path
    raise ValueError(f"{run}: holds no checkpoints/last.ckpt; is it a run folder, and has the run saved yet?")
