"""`gptlab <word>` and `python -m gptlab <word>`: the same doors as `python -m gptlab.<word>`."""

import os
import runpy
import sys

from gptlab import __version__

DOORS = {
    "train": "train a model, or continue a run",
    "prepare": "turn text into a tokenizer and token files",
    "validate_data": "check text, its tokenizer and its tokens",
    "generate": "let a run continue a text",
    "chat": "talk with a run in the terminal",
    "evaluate": "the loss of a run on held-out text, its answers and samples",
    "export": "write a run so that other programs load it",
    "serve": "answer OpenAI's API with a run, and offer a chat page",
}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        print(f"gptlab {__version__}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gptlab <door> [arguments]; gptlab <door> --help tells more\n")
        print("\n".join(f"  {door:<14} {does}" for door, does in DOORS.items()))
    elif (door := arguments[0].replace("-", "_")) not in DOORS:
        print(f"error: {arguments[0]!r} is no door of gptlab; known: {', '.join(DOORS)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.path.insert(0, os.getcwd())  # as under python -m: code in the current folder can be named in a config
        sys.argv = sys.argv[1:]
        runpy.run_module(f"gptlab.{door}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
