"""How well a network predicts text that is there: sums over its tokens, and the figures that follow from them.

Shapes: B batch, T time, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from gptlab.losses import document_layout, scored
from gptlab.model import GPT
from gptlab.tokenizer import EOS_ID, Tokenizer

WEIGHTS_IN = {  # by Lightning's words for `trainer.precision`
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
}


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """How many bytes of text each token stands for, (V,)."""
    return torch.tensor([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])


def token_sums(nll: Tensor, predictions: Tensor, targets: Tensor, loss_mask: Tensor, bytes_of: Tensor) -> Tensor:
    """Over what `loss_mask` keeps of a batch: nll, tokens, tokens predicted, and bytes of text; (4,) in float64.

    All of a batch are (B, T): nll in nats, predicted and true ids, and which of them count.
    """
    keep = loss_mask.double()
    hits, widths = predictions == targets, bytes_of[targets]
    return torch.stack(((nll.double() * keep).sum(), keep.sum(), (hits * keep).sum(), (widths * keep).sum()))


def figures(sums: Sequence[float]) -> dict[str, float]:
    """Loss, perplexity, bits per byte of the text scored, and token accuracy, from `token_sums`; NaN of nothing."""
    nll, tokens, correct, text_bytes = sums
    loss = nll / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # beyond that float64 overflows
        "bits_per_byte": nll / math.log(2) / text_bytes if text_bytes else math.nan,
        "accuracy": correct / tokens if tokens else math.nan,
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN: what is not a number is null."""
    return value if value is not None and math.isfinite(value) else None


def require_finite(model: GPT, name: str) -> None:
    """Raise ValueError where a weight is NaN or infinite: every figure would be, or mean nothing."""
    for key, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            raise ValueError(
                f"{name}: {count:,} of the {weight.numel():,} weights of {key} are NaN or infinite: the run diverged "
                "before it was saved, or the file was changed; name another checkpoint"
            )


class Scorer:
    """Scores batches with a network as the validation of training does, in the same precision.

    The network's weights become those of `precision`, which copies them only where they are of another type.
    """

    def __init__(self, model: GPT, precision: str = "32-true", separate_documents: bool = False):
        self.model = model.to(WEIGHTS_IN[precision]).eval()
        self.mixed, self.separate_documents = precision == "bf16-mixed", separate_documents

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    def computing(self) -> contextlib.AbstractContextManager:
        """The types that products are computed in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else contextlib.nullcontext()

    @torch.no_grad()
    def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The nll in nats of each target, and the likeliest token in its place, (B, T), on the network's device."""
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        layout = document_layout(tokens, EOS_ID)[::-1] if self.separate_documents else ()
        with self.computing():
            return self.model(
                tokens, *layout, readout=partial(scored, targets=targets, vocab_size=self.model.config.vocab_size)
            )


def score(
    scorer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    batches: Iterable[dict[str, Tensor]],
    bytes_of: Tensor,
    n_sources: int = 0,
) -> tuple[Tensor, Tensor]:
    """`token_sums` over all batches, (4,), and over those of each source where they say which they are of."""
    total, by_source = torch.zeros(4, dtype=torch.float64), torch.zeros(n_sources, 4, dtype=torch.float64)
    for batch in batches:
        targets, mask = batch["targets"], batch["loss_mask"]
        nll, likeliest = (found.cpu() for found in scorer(batch["tokens"], targets))
        total += token_sums(nll, likeliest, targets, mask, bytes_of)
        for number in range(n_sources):
            is_of_it = (batch["source"] == number)[:, None]
            by_source[number] += token_sums(nll, likeliest, targets, mask & is_of_it, bytes_of)
    return total, by_source
