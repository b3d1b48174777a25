"""Attention that never looks further back than its window, in any layer: what is out of reach shows by distance."""

from experiments.sliding_window.attention import SlidingWindowAttention


class LocalAttention(SlidingWindowAttention):
    """WINDOW tokens in each layer, so that n_layer layers reach n_layer * (WINDOW - 1) tokens back."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.is_local = True
