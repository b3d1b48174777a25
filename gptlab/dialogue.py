"""Messages as token ids: one way of writing a conversation, for whoever trains on it, talks in it or serves it.

`</s><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>`: the marks are special tokens, which no text that a
person gives can spell.
"""

from collections.abc import Sequence
from itertools import chain

from gptlab.tokenizer import EOS_ID, Tokenizer

ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # {"role", "content"}


def checked(messages: object) -> list[Message]:
    """`messages`, if they are a conversation: a system's turn first, if any. Raises ValueError that names the fault."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one {role, content}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{number}] must be {{role, content}}, not {message!r}")
        if (role := message.get("role")) not in ROLES:
            raise ValueError(f"messages[{number}].role={role!r} is none of {', '.join(ROLES)}")
        if role == "system" and number:
            raise ValueError(f"messages[{number}].role='system': only the first message can be the system's")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{number}].content must be a text, not {message.get('content')!r}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    """One message, its marks included."""
    mark, end = tokenizer.special_id(f"<|{message['role']}|>"), tokenizer.special_id("<|end|>")
    return [mark, *tokenizer.encode(message["content"]).tolist(), end]


def prompt(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> tuple[list[int], int]:
    """The ids after which the assistant's answer comes, at most `room`, and how many messages were dropped for that.

    Dropped are the oldest turns, whole, so that the first that is left is a user's again; never the system's. Raises
    ValueError if the last turn alone does not fit.
    """
    turns = [turn(tokenizer, message) for message in messages]
    head = 1 if messages[0]["role"] == "system" else 0
    starts = [i for i in range(head, len(messages)) if i == head or messages[i]["role"] == "user"]
    for start in starts:
        kept = [EOS_ID, *chain(*turns[:head], *turns[start:]), tokenizer.special_id("<|assistant|>")]
        if len(kept) <= room:
            return kept, start - head
    raise ValueError(
        f"the last turn has {len(kept)} tokens with the system's and the marks, and there is room for {room}"
    )
