"""gptlab: train GPT models from scratch, change one thing, and know whether it helped."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`gptlab.load(RUN)`: a trained network and its tokenizer, with `generate`. What that needs is imported then."""
    if name == "load":
        return importlib.import_module("gptlab.loading").load
    raise AttributeError(f"module 'gptlab' has no attribute {name!r}")
