"""A server under everything that clients do to one: `python benchmarks/serve_load.py`.

`--clients` at a time, for `--seconds`: streams and whole answers, those who leave in the middle, who read slowly, who
send garbage, half a body, or far too much, and who ask too often. At the end every place must be free, no answer may
have been a failure of the server, what it holds may not have grown, and what it says must be what it said at the
beginning. The exit code is 1 if any of that does not hold.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from clients import Client, Server, make_run, server, single_thread
from turns import machine, markdown

ASKED = {"prompt": "once upon a time", "max_tokens": 24, "temperature": 0}
DONE = b"data: [DONE]\n\n"


class Load:
    """What the clients did, and what came of it: by kind of client and outcome."""

    def __init__(self, served: Server, seed: int):
        self.served, self.client, self.rng = served, Client(served.port), random.Random(seed)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self.expected = b""

    async def stream(self) -> str:
        body = ASKED | {"stream": True, "temperature": 1.0, "max_tokens": self.rng.randint(1, 100)}
        answer = await self.client.ask("/v1/completions", body)
        return self.judged(answer.status, answer.status != 200 or answer.content.endswith(DONE), answer.content)

    async def whole(self) -> str:
        answer = await self.client.ask("/v1/completions", ASKED)
        is_right = answer.status != 200 or text_of(answer.content) == self.expected
        return self.judged(answer.status, is_right, answer.content)

    async def several(self) -> str:
        body = ASKED | {"n": self.rng.randint(1, 4), "logprobs": 2, "echo": True, "temperature": 1.0}
        answer = await self.client.ask("/v1/completions", body)
        right = answer.status != 200 or len(json.loads(answer.content)["choices"]) == body["n"]
        return self.judged(answer.status, right, answer.content)

    async def leaving(self) -> str:
        body = ASKED | {"stream": True, "max_tokens": 2000, "truncation": "auto", "temperature": 1.0}
        answer = await self.client.ask("/v1/completions", body, leave_after=self.rng.randint(1, 20))
        return self.judged(answer.status, True, answer.content)

    async def slow(self) -> str:
        body = ASKED | {"stream": True, "max_tokens": 60, "temperature": 1.0, "logprobs": 10}
        answer = await self.client.ask("/v1/completions", body, pause_s=self.rng.uniform(0.01, 0.2))
        return self.judged(answer.status, answer.status != 200 or answer.content.endswith(DONE), answer.content)

    async def garbage(self) -> str:
        kinds = [b"", b"{", b"\x00\xff" * 50, b"[" * 5000, b'{"prompt": 3}', json.dumps(ASKED | {"n": 99}).encode()]
        kinds.append(json.dumps({name: self.rng.choice([None, -1, 1e9, "x", [], {}]) for name in ASKED}).encode())
        answer = await self.client.ask("/v1/completions", self.rng.choice(kinds))
        return self.judged(answer.status, answer.status in (400, 429), answer.content)

    async def too_much(self) -> str:
        answer = await self.client.ask("/v1/completions", b"[" + b" " * 3_000_000 + b"]")
        return self.judged(answer.status, answer.status == 413, answer.content)

    async def half(self) -> str:
        """Half a request, and gone."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.served.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        await asyncio.sleep(self.rng.uniform(0, 0.2))
        writer.close()
        return "left"

    async def looking(self) -> str:
        answer = await self.client.ask(self.rng.choice(["/", "/health", "/metrics", "/v1/models", "/nowhere"]))
        return self.judged(answer.status, answer.status in (200, 404), answer.content)

    def judged(self, status: int, is_right: bool, content: bytes) -> str:
        if status >= 500 or not is_right:
            self.wrong.append(f"{status}: {content[-200:]!r}")
        return str(status)

    async def one(self, until: float) -> None:
        """A client that does one thing after the other."""
        kinds = [self.stream] * 6 + [self.whole] * 5 + [self.several, self.leaving, self.leaving, self.slow]
        kinds += [self.garbage, self.garbage, self.too_much, self.half, self.looking]
        while time.monotonic() < until:
            act = self.rng.choice(kinds)
            try:
                outcome = await act()
            except (OSError, EOFError, ValueError, IndexError) as error:
                outcome = type(error).__name__
                if act != self.too_much:  # whose connection may be reset while it still sends
                    self.wrong.append(f"{act.__name__}: {error!r}")
            self.outcomes[act.__name__, outcome] += 1
            if outcome == "429":
                await asyncio.sleep(self.rng.uniform(0.05, 0.3))


def text_of(content: bytes) -> bytes:
    return json.loads(content)["choices"][0]["text"].encode()


async def settled(client: Client, seconds: float = 20) -> dict[str, int]:
    """What /health says when nothing is under way any more, or when the time is over."""
    end = time.monotonic() + seconds
    while True:
        health = json.loads((await client.ask("/health")).content)
        if health["active"] == health["waiting"] == 0 or time.monotonic() > end:
            return health
        await asyncio.sleep(0.1)


async def ordeal(served: Server, clients: int, seconds: float, seed: int) -> list[str]:
    """Run it, print what happened, and return what was wrong."""
    load = Load(served, seed)
    load.expected = text_of((await load.client.ask("/v1/completions", ASKED)).content)
    marks = []
    began = time.monotonic()

    async def watch() -> None:
        while True:
            marks.append((served.rss_mb(), served.descriptors()))
            await asyncio.sleep(max(seconds / 12, 0.5))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(load.one(began + seconds) for _ in range(clients)))
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    health = await settled(load.client)
    await asyncio.sleep(1)
    marks.append((served.rss_mb(), served.descriptors()))
    again = text_of((await load.client.ask("/v1/completions", ASKED)).content)
    rows = [(kind, outcome, count) for (kind, outcome), count in sorted(load.outcomes.items())]
    print(markdown("client | outcome | times", rows))
    print("\nMB held, and files open: " + ", ".join(f"{rss:.0f} {files}" for rss, files in marks))
    wrong = list(load.wrong)
    if health["active"] or health["waiting"]:
        wrong.append(f"places are still taken: {health}")
    if again != load.expected:
        wrong.append("the same question has another answer than before")
    if marks[-1][1] > marks[0][1] + 5:
        wrong.append(f"{marks[-1][1]} files are open, where there were {marks[0][1]}")
    warm = marks[len(marks) // 4][0]
    if marks[-1][0] > warm * 1.1 + 10:
        wrong.append(f"{marks[-1][0]:.0f} MB are held, {warm:.0f} after a quarter of the time")
    if sum(count for (_, outcome), count in load.outcomes.items() if outcome == "200") < clients:
        wrong.append("hardly any request was served")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    single_thread()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", n_layer=2, n_head=2, n_embd=64, block_size=128)
        with server(run, "--threads", "1") as served:
            print(f"{machine('cpu')}; {arguments.clients} clients for {arguments.seconds:g} s\n", flush=True)
            wrong = asyncio.run(ordeal(served, arguments.clients, arguments.seconds, arguments.seed))
    for line, times in Counter(wrong).most_common(20):
        print(f"wrong, {times} times: {line}")
    print("\nnothing was wrong" if not wrong else f"\n{len(wrong)} things were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
