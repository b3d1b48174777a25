"""Generation: cached decoding of a prompt, sampled from the logits. Shapes: B batch, T time, V vocabulary."""

from collections.abc import Callable

import torch
from torch import Tensor

from gptlab.cache import KVCache
from gptlab.model import GPT


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token id (B,) from each row of logits (B, V); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop_id: int | None = None,
    vocab_size: int | None = None,
    agree: Callable[[int], int] = int,
) -> list[int]:
    """The ids that follow `prompt` (T,), up to and without `stop_id`. Same seed, same ids; torch's own is not touched.

    When the context is full, it goes on with its newer half. `vocab_size` keeps to the ids that a tokenizer knows,
    where the network has room for more. `agree` makes one token of those that the ranks of a split network have drawn.
    """
    ids, count = prompt.tolist(), len(prompt)
    if not ids:
        raise ValueError("generation needs at least one token to start from")
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    block_size, device = model.config.block_size, model.embed.weight.device
    cache = KVCache(model.config, 1, block_size, model.embed.weight.dtype, device)
    pending = ids[-block_size:]
    # A compiled network would be compiled again for every new shape; one that is split over ranks needs its hooks.
    run = model if model._compiled_call_impl is None else model.forward
    try:
        while len(ids) - count < max_tokens:
            if cache.length + len(pending) > block_size:
                cache.clear()
                pending = ids[-max(1, block_size // 2) :]
            logits = run(torch.tensor([pending], device=device), cache=cache)[:, -1, :vocab_size]
            token = agree(int(sample(logits, temperature, top_k, generator)))
            if token == stop_id:
                break
            ids.append(token)
            pending = [token]
    finally:
        model.train(was_training)
    return ids[count:]
