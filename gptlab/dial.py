"""`depth=8` in a composed config: it stands above every word, and below what an experiment or the command line gives."""

import functools
from typing import Any

from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, OmegaConf

from gptlab import depth
from gptlab.given import given_in


def register() -> None:
    """Have the dial turned in every config that Hydra composes, so that `--cfg job` shows what it does.

    Hydra 1.3 calls nothing of ours between composing a config and showing or using it, hence this wrapper.
    """
    composing = Hydra.compose_config
    if hasattr(composing, "__wrapped__"):
        return

    @functools.wraps(composing)
    def composed(self: Hydra, *arguments: Any, **named: Any) -> DictConfig:
        config = composing(self, *arguments, **named)
        if config.get("depth") is not None:
            typed, of_words = given_in(config.hydra)
            turn(config, {*typed, *of_words})
        return config

    Hydra.compose_config = composed


def turn(cfg: DictConfig, given: set[str]) -> None:
    """Set what follows from `depth`, but for the keys that are given."""
    if cfg.depth < 1:
        raise ValueError(f"depth={cfg.depth} must be at least 1, or null: then model=<word> says how large it is")

    def choose(key: str, value: Any) -> Any:
        """The value of a key: what was given for it, or this from now on."""
        if key not in given:
            OmegaConf.update(cfg, key, value)
        return OmegaConf.select(cfg, key)

    layers, width = choose("model.n_layer", cfg.depth), choose("model.n_embd", depth.width(cfg.depth))
    block, parts, stride = cfg.model.block_size, cfg.trainer.accumulate_grad_batches, cfg.data.stride
    if not all(positive(value) for value in (layers, width, block, parts, cfg.data.batch_size)):
        return  # the run is refused, and why is for the checks to say
    choose("model.n_head", depth.heads(width))
    tokens = depth.horizon(depth.parameters(layers, width))
    windows = depth.batch_windows(depth.batch_tokens(tokens), block)
    step = choose("data.batch_size", max(1, windows // parts)) * parts * block
    steps = max(1, round(tokens / step))
    if not {"trainer.max_steps", "trainer.max_epochs"} & given:  # who gives one end means that one
        choose("trainer.max_steps", steps)
        choose("trainer.max_epochs", depth.epochs(block, stride or max(1, block // 2)))
    if positive(peak := cfg.optimizer.get("lr")):
        peak = choose("optimizer.lr", rounded(depth.learning_rate(peak, width, step)))
    if positive(peak) and "weight_decay" in cfg.optimizer:
        choose("optimizer.weight_decay", rounded(depth.weight_decay(peak, steps)))


def positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def rounded(value: float) -> float:
    """Three digits, to be read."""
    return float(f"{value:.3g}")
