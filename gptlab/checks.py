"""What is wrong in a config alone, said all together before a folder is made or any text is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab import assembly, config
from gptlab.data.module import check as check_data
from gptlab.model import GPT, GPTConfig
from gptlab.optim import parameter_groups
from gptlab.run import RunFolder


def check(cfg: dict[str, Any]) -> None:
    """Raise ValueError with every value that cannot be; what depends on the text comes later."""
    assembly.require_device(cfg["trainer"]["accelerator"])
    assembly.wants_compile(cfg["compile"], cfg["trainer"]["accelerator"])
    if faults := [*value_faults(cfg), *trainer_faults(cfg["trainer"]), *optimizer_faults(cfg), *model_faults(cfg)]:
        raise ValueError("; ".join(faults))
    check_data(config.data_config(cfg["data"]))
    assembly.validation_intervals(cfg)
    assembly.Watchers(cfg, RunFolder(Path()), assembly.steps_to_train(cfg["trainer"], 1))


def value_faults(cfg: dict[str, Any]) -> Iterator[str]:
    if cfg["documents"] not in ("joined", "separate"):
        yield f"documents={cfg['documents']!r} is none of joined, separate"
    if not 0 <= cfg["seed"] < 2**32:
        yield f"seed={cfg['seed']} must be at least 0 and less than 2^32"
    if cfg["max_time"] is not None and cfg["max_time"] <= 0:
        yield f"max_time={cfg['max_time']} must be more than 0 seconds, or null for no such budget"
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


def optimizer_faults(cfg: dict[str, Any]) -> Iterator[str]:
    """What the optimizer itself says of its values, asked with the smallest network there is."""
    smallest = GPTConfig(vocab_size=1, block_size=1, n_layer=1, n_head=1, n_embd=2)
    try:
        config.make(cfg["optimizer"])(parameter_groups(GPT(smallest)))
    except ValueError as error:
        yield f"optimizer: {error}"


def model_faults(cfg: dict[str, Any]) -> list[str]:
    if cfg["init_from"] is not None:  # the network is the parent's
        return []
    model = config.model_config(cfg["model"])
    model.vocab_size = 1 if model.vocab_size is None else model.vocab_size  # not known before the tokenizer is
    return model.faults()
