"""What a bundle tells of the training that its weights come from, as plain JSON."""

import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from gptlab import __version__, bundle, checkpoint
from gptlab.files import sha256_of_file
from gptlab.loading import Loaded

FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy")


def facts(loaded: Loaded) -> dict[str, Any]:
    """All of gptlab.json but its format and files."""
    tokenizer = loaded.tokenizer
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    return {
        "model": asdict(loaded.model.config),
        "tokenizer": {"class": kind, "fingerprint": tokenizer.fingerprint},
        **(of_folder(loaded.path) if loaded.path.is_dir() else of_checkpoint(loaded.path)),
        "versions": {"gptlab": __version__, "torch": torch.__version__, "transformers": version("transformers")},
    }


def of_folder(folder: Path) -> dict[str, Any]:
    """What a bundle tells already; nothing is known of another folder."""
    known = bundle.read_json(folder / bundle.NAME) if (folder / bundle.NAME).is_file() else {}
    return {key: known.get(key) for key in ("training", "source", "knows_turns")}


def of_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint tells of its run: figures of its last validation, config, and the fingerprint of the data."""
    state = checkpoint.load(path, mapped=True)
    callbacks = state.get("callbacks", {})
    record, monitor = callbacks.get("RunRecord", {}), callbacks.get("Monitor", {})
    validation = record.get("validation", {})
    data = next((part for key, part in state.items() if key.endswith("DataModule") and isinstance(part, dict)), {})
    text = record.get("config")
    own = state[checkpoint.OWN_KEY]
    training = {
        "step": state.get("global_step"),
        "epochs": record.get("epochs"),
        "tokens": record.get("tokens"),
        "train_loss": monitor.get("figures", {}).get("train/loss"),
        **{f"val_{name}": validation.get(f"val/{name}") for name in FIGURES},
        "data_fingerprint": data.get("fingerprint"),
        "hardware": own.get("hardware"),
        "config": yaml.safe_load(text) if text else None,
    }
    source = {"checkpoint": path.name, "sha256": sha256_of_file(path)}
    return {"training": plain(training), "source": source, "knows_turns": bool(own.get("knows_turns"))}


def plain(value: Any) -> Any:
    """As JSON has it: null for what is no number."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
