"""The door `python -m gptlab.generate`: a run continues a text."""

from gptlab import flags, options

if __name__ == "__main__":
    ARGUMENTS = flags.begin(options.generate())  # before the imports, which take seconds

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import fields
from itertools import pairwise

from gptlab import loading, machine
from gptlab.engine import Request
from gptlab.safety import Safety
from gptlab.sampling import Sampling
from gptlab.texts import Output


def main(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    safety = Safety.of(arguments.safety_mode, arguments.blocklist)
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    loaded = flags.load(arguments)
    load_s = time.perf_counter() - started
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    request = request_for(arguments, loaded, safety, sampling, prompt)
    outputs = [Output(loaded.tokenizer, arguments.stop, safety) for _ in range(request.n)]
    engine, times = loaded.engine(rows=request.n), [time.perf_counter()]
    samples = engine.add(request)
    if safety.blocks(prompt):
        for sample, output in zip(samples, outputs, strict=True):
            output.finish_reason = "content_filter"
            engine.cancel(sample)
    while not engine.is_idle:
        if grown := engine.step():
            times.append(time.perf_counter())
        for sample in grown:
            output = outputs[sample.number]
            new = output.take(sample)
            if request.n == 1 and not arguments.json:
                print(new, end="", flush=True)
            if output.finish_reason:
                engine.cancel(sample)
    if arguments.json:
        tokens = sum(len(sample.ids) for sample in samples)
        report = {
            "text": outputs[0].text,
            "samples": [output.text for output in outputs],
            "prompt": prompt,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": tokens,
            "finish_reason": outputs[0].finish_reason,
            "metrics": figures(times, tokens, request.n) | {"load_s": round(load_s, 3)},
        }
        print(json.dumps(report, ensure_ascii=False))
    elif request.n == 1:
        print()
    else:
        for number, output in enumerate(outputs, start=1):
            print(f"--- {number}\n{output.text}")
    return 0


def figures(times: list[float], tokens: int, n: int) -> dict[str, float | None]:
    """Speed and memory. The first token's latency has the prompt's reading in it, and the others' have not."""
    steps = [1000 * (after - before) for before, after in pairwise(times)]
    later = sorted(steps[1:])
    return {
        "tokens_per_sec": round(max(tokens - n, 0) / sum(later) * 1000, 1) if later else None,
        "latency_first_ms": round(steps[0], 3) if steps else None,
        "latency_p50_ms": round(statistics.median(later), 3) if later else None,
        "latency_p95_ms": round(later[math.ceil(0.95 * len(later)) - 1], 3) if later else None,
        "rss_mb": round(machine.rss_mb(), 1),
        "peak_mb": round(machine.peak_rss_mb(), 1),
    }


def request_for(
    arguments: argparse.Namespace, loaded: loading.Loaded, safety: Safety, sampling: Sampling, prompt: str
) -> Request:
    """What the command line asks for. Raises ValueError for a prompt that is too long, if it is not to be cut."""
    safety.require_prompt(prompt)
    ids, block_size = loaded.prompt_ids(prompt), loaded.model.config.block_size
    if len(ids) > block_size:
        if not arguments.truncate:
            raise ValueError(
                f"--prompt has {len(ids)} tokens with the one that begins a document, and the context {block_size}; "
                "shorten it, or give --truncate to go on from its end"
            )
        ids = ids[-block_size:]
    return Request(
        ids,
        safety.max_tokens(arguments.max_tokens),
        sampling,
        arguments.num_samples,
        loaded.stop_ids,
        slides=arguments.past_context == "slide",
        allowed=safety.allowed(loaded.tokenizer, loaded.stop_ids),
    )


if __name__ == "__main__":
    flags.end(main, ARGUMENTS)
