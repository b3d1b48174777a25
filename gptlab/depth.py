"""What follows from `depth=8`, in closed form: each formula with its source. Pure numbers; no config, no network.

The reference is `model=tiny`, which is depth 4: what stands in conf/optimizer was tuned there, in steps of 16 windows
of 128 tokens.
"""

import math

REFERENCE_DEPTH = 4
REFERENCE_BATCH = 16 * 128  # tokens
TOKENS_A_PARAMETER = 20
PASSES = 4


def width(depth: int) -> int:
    """64 channels a layer, the aspect ratio of nanochat (Karpathy 2025)."""
    return 64 * depth


def heads(width: int) -> int:
    """Heads of 64 channels, as GPT-2's (Radford et al. 2019), or of a few more where 64 does not divide the width."""
    return next((count for count in range(width // 64, 1, -1) if width % (2 * count) == 0), 1)


def parameters(depth: int, width: int) -> int:
    """12 D^2 a block, 4 of attention and 8 of the MLP; embeddings do not count (Kaplan et al. 2020, table 1)."""
    return 12 * depth * width**2


def horizon(parameters: int) -> int:
    """Tokens to train on, for the lowest loss that so much computing can buy: 20 a parameter (Hoffmann et al. 2022)."""
    return TOKENS_A_PARAMETER * parameters


def epochs(block_size: int, stride: int) -> int:
    """Passes over the training windows, after which a text too short for the horizon ends the run.

    By then it was seen four times, up to which repeated text is worth nearly as much as new one (Muennighoff et al.
    2023). Windows overlap: one pass shows a token block_size / stride times.
    """
    return max(1, round(PASSES * stride / block_size))


def batch_tokens(horizon: float) -> float:
    """Tokens of a step: they grow with the horizon to the power of 0.383 (Bergsma et al. 2025, figure 1).

    Only the exponent is theirs. Their constant, fitted on clusters to runs a thousand times as long, would give 30 times
    as many tokens, where a step of 2048 already keeps a processor busy.
    """
    reference = TOKENS_A_PARAMETER * parameters(REFERENCE_DEPTH, width(REFERENCE_DEPTH))
    return REFERENCE_BATCH * (horizon / reference) ** 0.383


def batch_windows(tokens: float, block_size: int) -> int:
    """So many tokens in windows, to the nearest power of two."""
    return 2 ** max(0, round(math.log2(tokens / block_size)))


def learning_rate(reference: float, width: int, batch_tokens: float) -> float:
    """The peak, from the one in conf/optimizer: by the root of the batch (Malladi et al. 2022)."""
    return reference * math.sqrt(batch_tokens / REFERENCE_BATCH)


def weight_decay(learning_rate: float, steps: int) -> float:
    """The decay with which weights are an average over the last 22 % of the steps of a whole horizon.

    It reaches back 1 / (learning rate x decay) steps (Wang and Aitchison 2024); the best share of the run, over tokens
    a parameter, is 1.084 (D / N)^-0.527 (Bergsma et al. 2025, figure 1).
    """
    share = 1.084 * TOKENS_A_PARAMETER**-0.527
    return 1 / (learning_rate * steps * share)
