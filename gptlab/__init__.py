"""gptlab: train GPT models from scratch, change one thing, and know whether it helped."""

__version__ = "0.1.0"
