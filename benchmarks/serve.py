"""How the server's speed grows with the clients that ask at the same time: `python benchmarks/serve.py`.

A network of about 10 M parameters and random weights, on bytes, in a server of its own; every client asks for streams
of `--tokens` tokens after a prompt of 16, one after the other. Each row is tokens a second of all clients together over
what one client gets, within the same round; what a token takes of the server's processors, which other processes change
least; the time to the first token; and between two tokens, for one client.
`--threads` are the server's; the clients share the machine with it.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from clients import Answer, Client, make_run, server, single_thread
from turns import Rounds, machine, markdown, median, quotient


async def load(port: int, clients: int, requests: int, tokens: int) -> tuple[float, list[Answer]]:
    """Seconds for all, and the answers."""

    async def one(number: int) -> list[Answer]:
        body = {"prompt": "fifteen letters", "max_tokens": tokens, "stream": True}
        return [await Client(port).ask("/v1/completions", body | {"seed": number * 1000 + i}) for i in range(requests)]

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(number) for number in range(clients)))
    return time.perf_counter() - began, [answer for own in answers for answer in own]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=3, help="of each client, one after the other")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    single_thread()
    rounds: Rounds = []
    firsts: dict[int, list[float]] = {}
    gaps: dict[int, list[float]] = {}
    costs: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", n_layer=6, n_head=6, n_embd=384, block_size=256)
        parallel = str(max(arguments.clients))
        with server(run, "--threads", str(arguments.threads), "--parallel", parallel) as served:
            asyncio.run(load(served.port, 1, 1, arguments.tokens))  # the first one warms up
            for _ in range(arguments.rounds):
                rounds.append({})
                for clients in arguments.clients:
                    cpu_s = served.cpu_s()
                    seconds, answers = asyncio.run(load(served.port, clients, arguments.requests, arguments.tokens))
                    if any(answer.status != 200 or b"[DONE]" not in answer.content for answer in answers):
                        raise SystemExit("a request failed")
                    done = sum(usage_of(answer) for answer in answers)
                    rounds[-1][str(clients)] = done / seconds
                    costs.setdefault(clients, []).append((served.cpu_s() - cpu_s) / done)
                    firsts.setdefault(clients, []).extend(answer.times[0] for answer in answers)
                    gaps.setdefault(clients, []).extend(b - a for answer in answers for a, b in pairwise(answer.times))
            rss = served.rss_mb()
    rows = []
    for clients in arguments.clients:
        name, between = str(clients), sorted(gaps[clients])
        rows.append(
            (
                clients,
                f"{median(rounds, name):,.0f}",
                f"{quotient(rounds, name, str(arguments.clients[0])):.2f}x",
                f"{1000 * statistics.median(costs[clients]):.2f}",
                f"{1000 * statistics.median(firsts[clients]):.1f}",
                f"{1000 * statistics.median(between):.2f}",
                f"{1000 * between[int(0.95 * len(between))]:.2f}",
            )
        )
    print(f"{machine('cpu')} for the clients, {arguments.threads} for the server; {rss:.0f} MB held\n")
    print(
        markdown(
            "clients | tokens a second | beside one | CPU a token, ms | first token, ms | between two, ms | p95, ms",
            rows,
        )
    )


def usage_of(answer: Answer) -> int:
    """Tokens of a stream: an event each, but for those that are half a character; all of them were asked for."""
    return answer.content.count(b'"text_completion"')


if __name__ == "__main__":
    main()
