"""What follows from `depth=8`, in closed form: each formula with its source. Pure numbers; no config, no network.

N are the parameters of the blocks, D the tokens trained on, B those of a step. The formulas go out from `model=tiny`,
which is depth 4: what stands in conf/optimizer was tuned there, in 350 steps of 16 windows of 128 tokens.
"""

import math

TINY_BATCH = 16 * 128
TINY_HORIZON = 350 * TINY_BATCH


def width(depth: int) -> int:
    """64 channels a layer, the aspect ratio of nanochat (Karpathy 2025)."""
    return 64 * depth


def heads(width: int) -> int:
    """Heads of 64 channels, as GPT-2's (Radford et al. 2019), or of a few more where 64 does not divide the width."""
    return next((count for count in range(width // 64, 1, -1) if width % (2 * count) == 0), 1)


def parameters(depth: int, width: int) -> int:
    """N: 12 width^2 a block, 4 of attention and 8 of the MLP; embeddings do not count (Kaplan et al. 2020, table 1)."""
    return 12 * depth * width**2


def horizon(parameters: int, text_tokens: float | None) -> float:
    """D: 20 N, the lowest loss that so much computing can buy (Hoffmann et al. 2022), or four passes over the text.

    Up to four, repeated text is worth nearly as much as new one (Muennighoff et al. 2023).
    """
    return 20.0 * parameters if text_tokens is None else min(20.0 * parameters, 4 * text_tokens)


def batch_tokens(horizon: float) -> float:
    """B: in proportion to D^0.383 (Bergsma et al. 2025, figure 1).

    Only the exponent is theirs: their constant, fitted to runs a thousand times as long, gives several times as many
    tokens, where a step of 2048 keeps a processor busy.
    """
    return TINY_BATCH * (horizon / TINY_HORIZON) ** 0.383


def batch_windows(tokens: float, block_size: int) -> int:
    """So many tokens in windows, to the nearest power of two."""
    return 2 ** max(0, round(math.log2(tokens / block_size)))


def learning_rate(tiny: float, horizon: float, batch_tokens: float) -> float:
    """The peak, from the one in conf/optimizer: by B^0.5 (Malladi et al. 2022) and D^-0.32 (Bjorck et al. 2024)."""
    return tiny * (batch_tokens / TINY_BATCH) ** 0.5 * (horizon / TINY_HORIZON) ** -0.32


def weight_decay(learning_rate: float, horizon: float, batch_tokens: float, parameters: int) -> float:
    """The decay with which weights are an average over the last 1.084 (D / N)^-0.527 of the run.

    It reaches back 1 / (learning rate x decay) steps (Wang and Aitchison 2024); the share that is best is a fit over
    tokens a parameter (Bergsma et al. 2025, figure 1).
    """
    share = 1.084 * (horizon / parameters) ** -0.527
    return batch_tokens / (learning_rate * horizon * share)
