"""The door `python -m gptlab.evaluate`: what a trained network is worth, by its loss, its answers and its samples."""

import argparse

from gptlab import flags


def options() -> flags.Options:
    parser = flags.Options(
        "evaluate",
        "Loss, perplexity, bits per byte and accuracy on a run's own validation split, or on other text; answers to "
        "prompts, samples, and lm-evaluation-harness.",
        "Exit code 0, or 2 where something is not to be had, or 5 where the verification of the run's stage fails.",
    )
    parser.add_run()
    text = parser.add_argument_group("text")
    text.add_argument("--files", nargs="+", metavar="GLOB", help="text, as data.files takes it, instead of the split")
    text.add_argument("--documents", help="what is one document: auto, file, line, separator, field (as in training)")
    text.add_argument("--separator", help="the line between two documents (as in training)")
    text.add_argument("--field", help="what the text is called in rows (as in training)")
    asked = parser.add_argument_group("answers, samples, tasks")
    asked.add_argument("--pairs", metavar="FILE", help='rows {"prompt", "completion"}, as JSON lines')
    asked.add_argument("--stop", action="append", default=[], metavar="TEXT", help="what ends an answer")
    asked.add_argument("--samples", type=positive, metavar="N", help="texts to write, and to measure beside real ones")
    asked.add_argument("--temperature", type=float, default=0.7, help="of the samples (0.7)")
    asked.add_argument("--top-k", type=positive, default=50, help="of the samples (50)")
    asked.add_argument("--seed", type=int, default=1, help="of the samples (1)")
    asked.add_argument("--max-tokens", type=positive, help="of an answer (the longest completion), a sample (128)")
    asked.add_argument("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between them")
    asked.add_argument("--include-path", metavar="FOLDER", help="of tasks of your own; then no network is asked")
    asked.add_argument("--limit", type=positive, metavar="N", help="examples of each task (all)")
    asked.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (as the task says)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="windows at a time (as in training, or 16)")
    parser.add_argument("--precision", default="auto", choices=["auto", "32-true", "bf16-mixed", "bf16-true", "64-true"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, and nothing else there")
    return parser


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number from 1 on")
    return int(word)


if __name__ == "__main__":
    ARGUMENTS = flags.begin(options())  # before the imports, which take seconds

import contextlib
import json
import sys
import time

from gptlab import doors
from gptlab.evaluate import table
from gptlab.evaluate.parts import answered, of_harness, sampled, scored
from gptlab.evaluate.subject import Subject


def evaluate(arguments: argparse.Namespace) -> dict:
    """All that was asked for, by the names of the contract; what was not is null."""
    start = time.perf_counter()
    trust = tuple(arguments.trust)
    subject = Subject(arguments.run, arguments.checkpoint, trust, arguments.device, arguments.precision)
    return {
        "checkpoint": str(subject.path),
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
