"""`init_from`: another run's network, weights and tokenizer, as the start of a run of its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab import checkpoint, config, exported
from gptlab.files import sha256_of_file
from gptlab.model import GPTConfig
from gptlab.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_state


def inherit(cfg: dict[str, Any], overridden: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer]:
    """The config with the parent's network and record, the parent's weights, and its tokenizer.

    `overridden` are the keys given on the command line, each with what was typed for it: what contradicts the parent is
    an error, except for the fields of the network that change no weight.
    """
    if (folder := exported.folder_of(cfg["init_from"])) is not None:
        path, sha256 = folder, exported.sha256(folder)
        theirs, weights, tokenizer, _ = exported.load(folder, config.trusted(cfg))
        theirs = replace(theirs, vocab_multiple=cfg["model"]["vocab_multiple"])  # its file has no more rows than tokens
        weights = exported.padded(theirs, weights)
    else:
        path = checkpoint.find(Path(cfg["init_from"]))
        sha256, parent = sha256_of_file(path), checkpoint.load(path)
        theirs, weights = checkpoint.model_config(parent), checkpoint.model_weights(parent)
        tokenizer = tokenizer_from_state(parent[checkpoint.OWN_KEY]["tokenizer"], config.trusted(cfg))
    faults = dict(network_faults(cfg["model"], theirs, overridden))
    faults |= tokenizer_faults(cfg["tokenizer"], tokenizer, config.trusted(cfg), overridden)
    if faults:
        above = {fault: [key for key in overridden if config.is_below(fault, (key,))] for fault in faults}
        culprits = sorted({overridden[max(keys, key=len)] for keys in above.values() if keys})
        lines = [f"{key}: the parent has {has}, the command line {given}" for key, (has, given) in faults.items()]
        raise ValueError(
            f"init_from={path} brings its own network and tokenizer; leave out what contradicts them "
            f"({', '.join(culprits)}):\n" + "\n".join(lines)
        )
    own = {name for name in free_fields(theirs) if f"model.{name}" in overridden}
    network = cfg["model"] | {name: value for name, value in vars(theirs).items() if name not in own}
    record = {"checkpoint": str(path.absolute()), "sha256": sha256}
    return cfg | {"model": network, "parent": record}, weights, tokenizer


def before_training(cfg: dict[str, Any], overridden: dict[str, str]) -> tuple[dict[str, Any], Tokenizer | None]:
    """The config and the tokenizer of what a run would train on: those of its parent, if it has one.

    Raises ValueError for `resume`: what a run goes on with is that run's own.
    """
    if cfg["resume"] is not None:
        raise ValueError(f"resume={cfg['resume']} goes on with what that run has: leave it out here")
    if cfg["init_from"] is None:
        return cfg, None
    cfg, _, tokenizer = inherit(cfg, overridden)
    return cfg, tokenizer


def free_fields(theirs: GPTConfig) -> set[str]:
    """The fields of a network that may differ from its parent's: they change no weight."""
    return {"dropout", "checkpointing"} | ({"block_size"} if theirs.positions == "rope" else set())


Faults = Iterator[tuple[str, tuple[Any, Any]]]


def network_faults(node: dict[str, Any], theirs: GPTConfig, overridden: dict[str, str]) -> Faults:
    """The given fields that are not the parent's: key, the parent's value, ours."""
    for name, value in vars(theirs).items():
        given = node[name] is not None and bool({"model", f"model.{name}"} & set(overridden))
        if given and name not in free_fields(theirs) and node[name] != value:
            yield f"model.{name}", (value, node[name])


def tokenizer_faults(
    node: dict[str, Any], theirs: Tokenizer, trust: tuple[str, ...], overridden: dict[str, str]
) -> Faults:
    """What was given for the tokenizer and makes, or is, another one than the parent's."""
    if node.get("path"):
        other = load_tokenizer(node["path"], trust)
        if other.fingerprint != theirs.fingerprint:
            yield (
                "tokenizer.path",
                (f"tokenizer {theirs.fingerprint[:12]}", f"{other.fingerprint[:12]} ({node['path']})"),
            )
        return
    kind = f"{type(theirs).__module__}.{type(theirs).__qualname__}"
    if "tokenizer" in overridden and not node["_target_"].startswith(kind):
        yield "tokenizer", (kind, node["_target_"].removesuffix(".train"))
        return
    for name, value in ({"files": "its own tokenizer", "domain_tokens": []} | theirs.settings).items():
        given = node.get(name) is not None and bool({"tokenizer", f"tokenizer.{name}"} & set(overridden))
        if given and node[name] != value:
            yield f"tokenizer.{name}", (value, node[name])
