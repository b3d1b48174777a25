"""What is wrong in a config alone, said all together before a folder is made or any text is read."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typeguard
from hydra.utils import get_object
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from gptlab import assembly, config
from gptlab.data.mixed import checked as check_mixture
from gptlab.data.module import check as check_data
from gptlab.explain import nearest
from gptlab.model import GPT, GPTConfig
from gptlab.names import OWN_PACKAGES
from gptlab.optim import parameter_groups
from gptlab.run import RunFolder

# Packages whose classes a config may name without `trust`: our own, and the parts of torch and Lightning that runs use.
TRUSTED_TARGETS = (
    *(f"{package}." for package in OWN_PACKAGES),
    *("torch.optim.", "lightning.pytorch.Trainer", "lightning.pytorch.callbacks."),
    *("lightning.pytorch.loggers.", "lightning.pytorch.strategies."),
)


def check(cfg: dict[str, Any]) -> None:
    """Raise ValueError with every value that cannot be; what depends on the text comes later."""
    if faults := list(missing_parts(cfg)):  # before what looks into them
        raise ValueError("; ".join(faults))
    assembly.require_device(cfg["trainer"]["accelerator"])
    assembly.wants_compile(cfg["compile"], cfg["trainer"])
    faults = [*value_faults(cfg), *trainer_faults(cfg["trainer"])]
    for node, said in (("optimizer", optimizer_faults), ("schedule", schedule_faults)):
        if not any(fault.startswith(f"{node}.") for fault in faults):  # of the same value, in other words
            faults += said(cfg)
    if faults := [*faults, *model_faults(cfg)]:
        raise ValueError("; ".join(faults))
    data = config.data_config(cfg["data"])
    check_data(data, others=cfg["tokenizer"].get("files") is not None)
    if data.mix is not None:
        check_mixture(data)
    if (stream := config.make(data.stream)) is not None:
        stream.check(data)
    assembly.validation_intervals(cfg)
    assembly.Watchers(cfg, RunFolder(Path()), assembly.steps_to_train(cfg["trainer"], 1))


def missing_parts(cfg: dict[str, Any]) -> Iterator[str]:
    """The parts without which there is no run, and what switches them off where that was meant."""
    off = {"samples": "samples.every_steps=null", "checkpoint": "checkpoint.every_steps=null"}
    for name in ("task", "optimizer", "schedule", "trainer", *off):
        if not (isinstance(cfg[name], dict) and cfg[name].get("_target_")):
            remedy = f"; {off[name]} switches off what it does at intervals" if name in off else ""
            yield f"{name}={shown(cfg[name])}: no run is without it{remedy}"


def value_faults(cfg: dict[str, Any]) -> Iterator[str]:
    if cfg["documents"] not in ("joined", "separate"):
        yield f"documents={cfg['documents']!r} is none of joined, separate"
    if cfg["nonfinite"] not in ("stop", "skip"):
        yield f"nonfinite={cfg['nonfinite']!r} is none of stop, skip"
    if not 0 <= cfg["seed"] < 2**32:
        yield f"seed={cfg['seed']} must be at least 0 and less than 2^32"
    if cfg["max_time"] is not None and cfg["max_time"] <= 0:
        yield f"max_time={cfg['max_time']} must be more than 0 seconds, or null for no such budget"
    if cfg["depth"] is not None and cfg["init_from"] is not None:
        yield f"depth={cfg['depth']}: init_from brings its own network; leave depth out"
    limits = {"lr": None, "weight_decay": None, "warmup_steps": None, "decay_fraction": 1, "final_factor": 1}
    for node in ("optimizer", "schedule"):
        for name, most in limits.items():
            value = cfg[node].get(name)
            if value is not None and (value < 0 or (most is not None and value > most)):
                yield f"{node}.{name}={value} must be 0 or more" + (f", and at most {most}" if most else "")


def trainer_faults(trainer: dict[str, Any]) -> Iterator[str]:
    if (accumulate := trainer["accumulate_grad_batches"]) < 1:
        yield f"trainer.accumulate_grad_batches={accumulate} must be at least 1"
    if (clip := trainer["gradient_clip_val"]) is not None and clip <= 0:
        yield f"trainer.gradient_clip_val={clip} must be more than 0, or null for no clipping"
    if (algorithm := trainer.get("gradient_clip_algorithm")) not in (None, "norm"):
        yield f"trainer.gradient_clip_algorithm={algorithm!r}: only the norm is clipped; leave it out"
    if str(trainer["precision"]).startswith("16"):  # a fused optimizer unscales after the norm is taken
        yield f"trainer.precision={trainer['precision']} is not supported; use bf16-mixed or 32-true"
    if (nodes := trainer["num_nodes"]) < 1:
        yield f"trainer.num_nodes={nodes} must be at least 1"
    yield from device_faults(trainer)


def device_faults(trainer: dict[str, Any]) -> Iterator[str]:
    """What Lightning says of `trainer.devices`: other kinds of devices take other values."""
    devices, kind = trainer["devices"], assembly.device_kind(trainer)
    if devices == "auto":
        return
    try:
        usable = kind.parse_devices(devices)
    except (TypeError, ValueError, MisconfigurationException):
        usable = None
    if not usable:
        there = kind.auto_device_count()
        some = "a whole number from 1 on" if kind is CPUAccelerator else f"1 to {there}, a list such as [0], -1 for all"
        yield f"trainer.devices={devices} names no {kind.name()} devices that are here; use {some}, or auto"
    elif not trainer.get("strategy") and len(kind.get_parallel_devices(usable)) > 1:
        yield f"trainer.devices={devices} are several, each with a process of its own: use trainer=ddp, fsdp or tp"


def optimizer_faults(cfg: dict[str, Any]) -> Iterator[str]:
    """What the optimizer itself says of its values, asked with the smallest network there is."""
    smallest = GPTConfig(vocab_size=1, block_size=1, n_layer=1, n_head=1, n_embd=2)
    try:
        config.make(cfg["optimizer"])(parameter_groups(GPT(smallest)))
    except (TypeError, ValueError) as error:
        yield str(error) if str(error).startswith("optimizer.") else f"optimizer: {error}"


def schedule_faults(cfg: dict[str, Any]) -> Iterator[str]:
    """What the schedule itself says of its values, asked for the first step of two."""
    try:
        config.make(cfg["schedule"])(0, 2)
    except (TypeError, ValueError) as error:
        yield f"schedule: {error}"


def model_faults(cfg: dict[str, Any]) -> list[str]:
    if cfg["init_from"] is not None:  # the network is the parent's
        return []
    model = config.model_config(cfg["model"])
    model.vocab_size = 1 if model.vocab_size is None else model.vocab_size  # not known before the tokenizer is
    return model.faults()


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a plain config that names something to be made, with its key."""
    if isinstance(node, dict):
        if node.get("_target_"):
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def check_targets(cfg: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Raise one ValueError with every `_target_` that is not trusted, and every value that it would not take."""
    faults = []
    for path, node in targets(cfg):
        name = node["_target_"]
        if not isinstance(name, str):
            faults.append(f"{path}._target_={name!r} is no dotted name")
            continue
        if not name.startswith(TRUSTED_TARGETS + tuple(f"{package}." for package in trust)):
            faults.append(
                f"{path}._target_={name!r}: allow it, if you trust that code, with trust={name.split('.')[0]}"
            )
            continue
        try:
            target = get_object(name)
        except Exception as error:
            faults.append(f"{path}._target_={name!r} cannot be imported ({error})")
            continue
        if not callable(target):
            faults.append(f"{path}._target_={name!r} is neither a class nor a function")
            continue
        faults += misfits(path, target, node)
    if faults:
        raise ValueError("\n".join(faults))


def misfits(path: str, target: Any, node: dict[str, Any]) -> Iterator[str]:
    """The values in `node`, which stands at `path`, that the signature of `target` has no place or another type for."""
    made = target.__init__ if isinstance(target, type) else target
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    try:
        hints = get_type_hints(made)
    except (NameError, TypeError):  # annotations that only a type checker can read
        hints = {}
    for name, value in node.items():
        is_of_a_door = name in ("path", "files") and path == "tokenizer"  # read before the target is called
        if name.startswith("_") or is_of_a_door or (name, value) == ("precision", "auto"):
            continue
        if name not in parameters and not takes_any:
            close = nearest(name, parameters)
            yield f"{path}.{name}={value!r}: {target.__qualname__} takes no such key{close} ~{path}.{name} drops it"
        elif name in hints and not (isinstance(value, dict) and "_target_" in value):
            accepted = tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]).lower() else value
            try:
                typeguard.check_type(accepted, hints[name])
            except typeguard.TypeCheckError:
                words = list(dict.fromkeys(accepted_words(hints[name]) + ["auto"] * (name == "precision")))
                close = nearest(str(value), [word for word in words if " " not in word])
                yield f"{path}.{name}={shown(value)} is not what it takes: {' | '.join(words)}{close}"


def shown(value: Any) -> str:
    """A value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)


PLAIN_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true | false", type(None): "null"}


def accepted_words(hint: Any) -> list[str]:
    """What a user may type where `hint` is the annotation: words, and the names of kinds of values."""
    if hint in PLAIN_NAMES:
        return PLAIN_NAMES[hint].split(" | ")
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return list(dict.fromkeys(word for part in get_args(hint) for word in accepted_words(part)))
    if get_origin(hint) in (tuple, list, Sequence):
        parts = [" or ".join(accepted_words(part)) for part in get_args(hint) if part is not Ellipsis]
        return [f"[{', '.join(parts)}]"]
    return [] if hint is Tensor else [getattr(hint, "__name__", str(hint))]
