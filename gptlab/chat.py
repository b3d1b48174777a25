"""The door `python -m gptlab.chat`: a conversation with a run, in the terminal."""

from gptlab import flags, options

if __name__ == "__main__":
    ARGUMENTS = flags.begin(options.chat())  # before the imports, which take seconds

import argparse
import atexit
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from gptlab import dialogue
from gptlab.engine import Request
from gptlab.files import cache_dir, write_atomically
from gptlab.loading import Loaded
from gptlab.safety import Safety
from gptlab.sampling import Sampling
from gptlab.signals import Interrupted
from gptlab.texts import Output

HELP = """\
/reset          forget what was said
/system TEXT    what the model is told first; without TEXT, nothing
/temp X         the temperature
/save FILE      keep the conversation, as JSON
/load FILE      take up one that was kept
/help           this
/exit           leave (or Ctrl-D); Ctrl-C stops an answer"""


class Conversation:
    """What was said, and what the model makes of it."""

    def __init__(self, loaded: Loaded, sampling: Sampling, safety: Safety, max_tokens: int, system: str = ""):
        block_size = loaded.model.config.block_size
        if max_tokens < 1:
            raise ValueError(f"--max-tokens {max_tokens} must be at least 1")
        self.loaded, self.sampling, self.safety = loaded, sampling, safety
        self.max_tokens = safety.max_tokens(
            min(max_tokens, max(block_size // 2, 1)) if loaded.knows_turns else max_tokens
        )
        self.engine = loaded.engine()
        self.system, self.messages = system, []

    def reset(self) -> None:
        self.messages = []

    def say(self, text: str, show: Callable[[str], None]) -> str:
        """Answer `text`, piece by piece to `show`; why the answer ended. What an interruption leaves of it is kept."""
        self.safety.require_prompt(text)
        request = self.request([*self.messages, {"role": "user", "content": text}])
        output, answer = Output(self.loaded.tokenizer, (), self.safety), {"role": "assistant", "content": ""}
        self.messages += [{"role": "user", "content": text}, answer]
        if self.safety.blocks(text):
            return "content_filter"
        (sample,) = self.engine.add(request)
        try:
            while output.finish_reason is None:
                for grown in self.engine.step():
                    show(output.take(grown))
        finally:
            self.engine.cancel(sample)
            answer["content"] = output.text
        return output.finish_reason

    def request(self, messages: list[dialogue.Message]) -> Request:
        tokenizer, block_size = self.loaded.tokenizer, self.loaded.model.config.block_size
        if self.loaded.knows_turns:
            system = [{"role": "system", "content": self.system}] if self.system else []
            ids, _ = dialogue.prompt(tokenizer, system + messages, block_size - self.max_tokens)
        else:
            ids = self.loaded.prompt_ids("".join(message["content"] for message in messages))[-block_size:]
        return Request(
            ids,
            self.max_tokens,
            self.sampling,
            stop_ids=self.loaded.stop_ids,
            slides=not self.loaded.knows_turns,
            allowed=self.safety.allowed(tokenizer, self.loaded.stop_ids),
        )

    def save(self, file: Path) -> None:
        content = json.dumps({"system": self.system, "messages": self.messages}, ensure_ascii=False, indent=1)
        write_atomically(file, lambda out: out.write(content.encode()))

    def load(self, file: Path) -> None:
        """Raises ValueError for a file that holds no conversation."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            messages = dialogue.checked(content["messages"]) if content["messages"] else []
            system = content["system"]
            if not isinstance(system, str):
                raise ValueError(f"system must be a text, not {system!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: no conversation that /save wrote ({error})") from error
        self.system, self.messages = system, messages


def command(conversation: Conversation, line: str) -> str:
    """Do what a line that begins with / says; what to answer. Raises ValueError for what cannot be."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    match word:
        case "/help":
            return HELP
        case "/reset":
            conversation.reset()
            return "forgotten"
        case "/system":
            if not conversation.loaded.knows_turns:
                raise ValueError("/system: this model knows no turns; begin with the text that it is to continue")
            conversation.system = rest
            return f"system: {rest or 'nothing'}"
        case "/temp":
            try:
                temperature = float(rest)
            except ValueError:
                raise ValueError(f"/temp {rest}: give a number, such as /temp 0.7") from None
            conversation.sampling = replace(conversation.sampling, temperature=temperature)
            return f"temperature {temperature}"
        case "/save" | "/load":
            if not rest:
                raise ValueError(f"{word}: give a file, such as {word} talk.json")
            (conversation.save if word == "/save" else conversation.load)(Path(rest))
            return f"{word[1:]}: {rest}, {len(conversation.messages)} messages"
    raise ValueError(f"{word}: there is no such command; /help tells which there are")


def by_line() -> str | None:
    """A line of what is no keyboard."""
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def by_keys() -> Callable[[], str | None]:
    """A line of a keyboard, with the lines before at the arrow keys, those of earlier conversations too."""
    import readline

    file = cache_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)

    def keep() -> None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)

    atexit.register(keep)

    def read() -> str | None:
        try:
            return input("> ")
        except EOFError:
            print()
            return None

    return read


def plainly(conversation: Conversation, line: str) -> str:
    reason = conversation.say(line, lambda text: print(text, end="", flush=True))
    print(flush=True)
    return reason


def as_markdown(conversation: Conversation, line: str) -> str:
    """The answer as it grows, with what Markdown makes of it."""
    said = ""
    with Live(console=Console(), refresh_per_second=12, vertical_overflow="visible") as live:

        def show(text: str) -> None:
            nonlocal said
            said += text
            live.update(Markdown(said))

        return conversation.say(line, show)


def main(arguments: argparse.Namespace) -> int:
    safety = Safety.of(arguments.safety_mode, arguments.blocklist)
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    loaded = flags.load(arguments)
    if arguments.system and not loaded.knows_turns:
        raise ValueError("--system: this model knows no turns; it only continues text")
    conversation = Conversation(loaded, sampling, safety, arguments.max_tokens, arguments.system)
    read = by_keys() if sys.stdin.isatty() else by_line
    answer = as_markdown if sys.stdout.isatty() and loaded.knows_turns else plainly
    print(f"{loaded.path}; /help tells the commands", flush=True)
    if not loaded.knows_turns:
        print("a base model: it knows no turns, and continues the text", flush=True)
    while True:
        try:
            line = read()
            if line is None or line.strip() in ("/exit", "/quit"):
                break
            if line.startswith("/"):
                print(command(conversation, line.strip()), flush=True)
            elif line.strip() and (reason := answer(conversation, line)) != "stop":
                print(f"[{reason}]", flush=True)
        except ValueError as error:
            flags.fail(str(error))
        except Interrupted as request:
            if request.exit_code != flags.CTRL_C:
                raise
            print("\n[stopped]", flush=True)
    return flags.DONE


if __name__ == "__main__":
    flags.end(main, ARGUMENTS)
