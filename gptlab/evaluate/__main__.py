"""The door `python -m gptlab.evaluate`: what a trained network is worth, by its loss, its answers and its samples."""

from gptlab import flags, options

if __name__ == "__main__":
    ARGUMENTS = flags.begin(options.evaluate())  # before the imports, which take seconds

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from gptlab import doors
from gptlab.evaluate import table
from gptlab.evaluate.parts import answered, of_harness, sampled, scored
from gptlab.evaluate.subject import Subject


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for, by the names of the contract; what was not is null."""
    start = time.perf_counter()
    subject = Subject.of(arguments)
    return {
        "checkpoint": str(subject.loaded.path),
        "step": subject.origin.step,
        "precision": subject.precision,
        **scored(subject, arguments),
        "verification": None,  # no stage has one yet
        "pairs": answered(subject, arguments) if arguments.pairs else None,
        "samples": sampled(subject, arguments) if arguments.samples else None,
        "harness": of_harness(subject, arguments) if arguments.harness else None,
        "seconds": round(time.perf_counter() - start, 3),
    }


def main(arguments: argparse.Namespace) -> int:
    doors.quiet()
    with doors.json_alone(True), contextlib.redirect_stdout(sys.stderr):  # libraries print what they like
        found = evaluate(arguments)
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
    else:
        table.show(found)
    return flags.DONE


if __name__ == "__main__":
    flags.end(main, ARGUMENTS)
