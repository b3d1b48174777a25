"""The options of the flag doors. Nothing here takes time to import: --help and a wrong word are answered at once."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from gptlab import __version__

DONE, FAILED, BAD_INPUT, CTRL_C = 0, 1, 2, 130  # exit codes
MESSAGE_LINES = 15


def fail(message: str, who: str = "") -> None:
    """One message of at most 15 lines, on standard error; `who` says it, where there are several."""
    lines = message.strip().splitlines() or ["failed"]
    if len(lines) > MESSAGE_LINES:
        lines = [*lines[: MESSAGE_LINES - 1], f"... and {len(lines) - MESSAGE_LINES + 1} lines more"]
    print(f"{who}error: " + "\n".join(lines), file=sys.stderr, flush=True)


class Options(argparse.ArgumentParser):
    """Options of one door. `--max_tokens` is `--max-tokens`; nothing is guessed from a beginning."""

    def __init__(self, door: str, does: str, more: str = ""):
        super().__init__(
            prog=f"python -m gptlab.{door}",
            description=does,
            epilog=more or None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"gptlab {__version__}")

    def add_run(self) -> None:
        """RUN, and how to choose what of it is loaded."""
        self.add_argument("run", metavar="RUN", help="a run folder, one of its checkpoint files, or an exported folder")
        self.add_argument(
            "--checkpoint", default="best", metavar="best|last|FILE", help="which of a run's checkpoints (best)"
        )
        self.add_argument(
            "--trust",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="allow classes of this package, besides gptlab and experiments",
        )

    def add_sampling(self) -> None:
        """How tokens are drawn; the fields of `gptlab.sampling.Sampling`, by whose names they are found."""
        add = self.add_argument
        add("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token (0.8)")
        add("--top-k", type=int, metavar="K", help="of the K likeliest tokens alone")
        add("--top-p", type=float, default=1.0, metavar="P", help="of the likeliest that together have probability P")
        add("--min-p", type=float, default=0.0, metavar="P", help="of those with P times the likeliest's probability")
        add("--repetition-penalty", type=float, default=1.0, metavar="X", help="over 1: tokens come again less often")
        add("--seed", type=int, metavar="N", help="the same text every time")

    def add_decoding(self) -> None:
        """Where and how the network computes, and what it may say."""
        add = self.add_argument
        add("--device", default="auto", metavar="auto|cpu|cuda|mps", help="auto: a GPU where there is one")
        add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and products (float32)")
        add("--threads", type=int, metavar="N", help="of the processor; all, if not given")
        add(
            "--safety-mode",
            default="off",
            choices=("off", "standard", "strict"),
            help="standard: no control tokens; strict: capped lengths, no loops, and --blocklist; a filter, no more",
        )
        add("--blocklist", metavar="FILE", help="words and phrases, a line each, that strict mode does not let pass")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = [self._spelt(word) for word in words[:end]]
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self._nearest(unknown[0])}")
        return known

    def _spelt(self, word: str) -> str:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if name.startswith("--") and dashed in self._option_string_actions else word

    def _nearest(self, word: str) -> str:
        names = [name for name in self._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(word.partition("=")[0].replace("_", "-"), names, n=1)
        return f", did you mean {close[0]}?" if close else "; --help tells what there is"

    def error(self, message: str) -> NoReturn:
        fail(message)
        sys.exit(BAD_INPUT)


def generate() -> Options:
    options = Options("generate", "Continue a text with a trained model, and print what it says as it comes.")
    options.add_run()
    add = options.add_argument
    add(
        "--prompt", required=True, metavar="TEXT", help="what to continue; '' begins a document, - reads standard input"
    )
    add("--max-tokens", type=int, default=200, metavar="N", help="at most so many (200)")
    options.add_sampling()
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--num-samples", type=int, default=1, metavar="N", help="so many continuations, of one reading of the prompt")
    add("--truncate", action="store_true", help="drop the beginning of a prompt that is longer than the context")
    add("--past-context", default="slide", choices=("slide", "stop"), help="when it is full: go on by its newer half")
    add("--json", action="store_true", help="one JSON object instead, with figures of speed and memory")
    options.add_decoding()
    return options


def chat() -> Options:
    options = Options("chat", "Talk with a trained model. A base model, which knows no turns, continues the text.")
    options.add_run()
    options.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer, at most (256)")
    options.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    options.add_sampling()
    options.add_decoding()
    return options


def evaluate() -> Options:
    options = Options(
        "evaluate",
        "Loss, perplexity, bits per byte and accuracy of a trained model, on its run's own validation split or other "
        "text;\nand, where they are asked for, its answers, its samples, and tasks of lm-evaluation-harness.",
        "Exit codes: 0; 2 where something is not to be had; 5 where the verification of the run's stage fails.",
    )
    options.add_run()
    add = options.add_argument
    add("--files", nargs="+", metavar="GLOB", help="other text, by path, glob or URL, instead of the run's own split")
    add("--documents", metavar="WORD", help="what is a document in it: file, line, separator, field (as in training)")
    add("--separator", metavar="LINE", help="what stands between two documents (as in training)")
    add("--field", metavar="NAME", help="what the text is called in rows (as in training)")
    add("--pairs", metavar="FILE", help='answer prompts: rows {"prompt", "completion"}, as JSON lines')
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this; may be given again")
    add("--samples", type=positive, metavar="N", help="measure so many samples beside as many held-out texts")
    add("--max-tokens", type=positive, metavar="N", help="of an answer (the longest completion's), a sample (128)")
    options.add_sampling()
    options.set_defaults(seed=0)
    add("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between them")
    add("--include-path", metavar="FOLDER", help="of tasks of your own, for which no network is asked")
    add("--limit", type=positive, metavar="N", help="examples of each task (all)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each one (as the task says)")
    add("--batch-size", type=positive, metavar="N", help="windows and answers at a time (as in training, or 16)")
    add(
        "--precision", default="auto", metavar="WORD", help="as trainer.precision; auto: that of training, if it can be"
    )
    add("--device", default="auto", metavar="auto|cpu|cuda|mps", help="auto: a GPU where there is one")
    add("--threads", type=positive, metavar="N", help="of the processor; all, if not given")
    add("--json", action="store_true", help="one JSON object instead of tables")
    return options


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number from 1 on")
    return int(word)


EXPORTS = {  # the formats, what each is, and its types of weights
    "hf": ("a folder for transformers, vLLM and trl: Llama, Qwen3 or GPT-2, by the network", ("f32", "bf16", "f16")),
    "bundle": ("that folder with gptlab.json: hashes, training config and figures", ("f32", "bf16", "f16")),
    "gguf": ("a file for llama.cpp, and for what is built on it", ("f32", "f16", "q8_0")),
}


def export() -> Options:
    rows = "\n".join(f"  {name:<8} {does} ({', '.join(types)})" for name, (does, types) in EXPORTS.items())
    checked = "Before it has its name, a folder is loaded by transformers, and its ids and logits are compared."
    options = Options(
        "export", "Write a trained model so that other programs load it.", f"formats:\n{rows}\n\n{checked}"
    )
    options.add_run()
    add = options.add_argument
    add("out", metavar="OUT", help="the folder, or for gguf the file, that is to be made")
    add("--format", choices=EXPORTS, default="hf", help="what to write (hf)")
    add("--dtype", metavar="TYPE", help="of the weights; the type they have, for gguf f32, where it is not given")
    return options
