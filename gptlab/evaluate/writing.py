"""What a network writes: many continuations at a time, as text."""

from collections.abc import Sequence
from dataclasses import replace

from gptlab.engine import Engine, Request, Sample
from gptlab.loading import Loaded
from gptlab.sampling import Sampling
from gptlab.texts import Output


def written(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str],
    rows: int,
) -> list[tuple[str, bool]]:
    """What follows each of the prompts, which are ids, and whether it ends by itself, or at one of `stops`.

    `rows` of them are continued at a time. The seed of the n-th is that of `sampling` and n.
    """
    engine = Engine(loaded.model, min(rows, len(prompts)), loaded.tokenizer.vocab_size)
    outputs: dict[Sample, Output] = {}
    for number, prompt in enumerate(prompts):
        own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
        request = Request(list(prompt), max_tokens, own, stop_ids=loaded.stop_ids, slides=True)
        outputs[engine.add(request)[0]] = Output(loaded.tokenizer, stops)
    while not engine.is_idle:
        for sample in engine.step():
            outputs[sample].take(sample)
            if outputs[sample].finish_reason:
                engine.cancel(sample)
            if sample.error is not None:
                raise sample.error
    return [finished(output) for output in outputs.values()]


def finished(output: Output) -> tuple[str, bool]:
    """The text of an output, without the half of a character at which it may have been cut off."""
    ends = output.finish_reason == "stop"
    return (output.text if ends else output.text.rstrip("\ufffd")), ends
