"""Muon with a learning rate for each kind of parameter, to find how each of them should follow the width."""

from collections.abc import Iterable
from typing import Any

from gptlab.optim import Muon


class Parts(Muon):
    """gptlab's Muon, whose one learning rate is multiplied by a factor for each kind of parameter."""

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, matrix: float, embedding: float, vector: float, **rest: Any
    ):
        factor = {"matrix": matrix, "embedding": embedding, "vector": vector}
        super().__init__([{**group, "lr": lr * factor[group["kind"]]} for group in params], lr=lr, **rest)
