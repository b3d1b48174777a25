"""`depth=8` in a composed config: it stands above every word, and below what an experiment or a user gives."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from gptlab import depth
from gptlab.data.ids import count_ids
from gptlab.data.listed import text_files
from gptlab.given import given_in

# and of others four: pydocs has 3.7 with the default pieces
BYTES_A_TOKEN = {"ByteTokenizer": 1, "CharTokenizer": 1, "WordTokenizer": 2.6}


def apply(cfg: DictConfig) -> None:
    """Turn the dial of a composed config, if it has one."""
    if cfg.get("depth") is not None:
        typed, of_words = given_in(cfg.hydra)
        turn(cfg, {*typed, *of_words})


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
    block, parts = cfg.model.block_size, cfg.trainer.accumulate_grad_batches
    if not all(positive(value) for value in (layers, width, block, parts, cfg.data.batch_size)):
        return  # the run is refused, and why is for the checks to say
    choose("model.n_head", depth.heads(width))
    parameters = depth.parameters(layers, width)
    horizon = depth.horizon(parameters, tokens_of(cfg))
    windows = depth.batch_windows(depth.batch_tokens(horizon), block)
    step = choose("data.batch_size", max(1, windows // parts)) * parts * block
    if "trainer.max_epochs" not in given:
        choose("trainer.max_steps", max(1, round(horizon / step)))
    if positive(rate := cfg.optimizer.get("lr")):
        rate = choose("optimizer.lr", rounded(depth.learning_rate(rate, horizon, step)))
    if positive(rate) and "weight_decay" in cfg.optimizer:
        choose("optimizer.weight_decay", rounded(depth.weight_decay(rate, horizon, step, parameters)))


def tokens_of(cfg: DictConfig) -> float | None:
    """About how many tokens the training text has, judged by its size before any of it is read; None where unknown."""
    held_out = 0 if cfg.data.validation_files or cfg.data.validation_tokens else cfg.data.validation_fraction
    if cfg.data.tokens is not None:
        try:
            return count_ids(OmegaConf.to_container(cfg.data).get("tokens")) * (1 - held_out)
        except (OSError, ValueError, KeyError, TypeError):
            return None
    size = cfg.data.text_bytes
    if cfg.data.files is not None:
        try:
            size = sum(file.size for file in text_files(OmegaConf.to_container(cfg.data).get("files")))
        except (OSError, ValueError, TypeError):  # for who reads the text to say
            return None
    if not positive(size):
        return None
    kind = str(cfg.tokenizer.get("_target_")).rsplit(".", 2)[-2:][0]
    return size * (1 - held_out) / BYTES_A_TOKEN.get(kind, 4)


def positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def rounded(value: float) -> float:
    """Three digits, to be read."""
    return float(f"{value:.3g}")
