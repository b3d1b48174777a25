"""How the server's speed grows with the clients that ask at the same time: `python benchmarks/serve.py`.

A network of about 10 M parameters and random weights, on bytes, in a server of its own; every client asks for streams
of up to `--tokens` tokens after a prompt of 16, one after the other. Each row is tokens a second of all clients
together over what one client gets, within the same round; what a token takes of the server's processors, which other
processes change least; the time to the first token; and between two tokens, for one client.
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


async def load(port: int, clients: int, seconds: float, tokens: int) -> tuple[int, list[Answer]]:
    """Tokens within `seconds`, in which each client asks again when it is done, and the answers."""
    begun = time.perf_counter()

    async def one(number: int) -> list[Answer]:
        body, answers = {"prompt": "fifteen letters", "max_tokens": tokens, "stream": True}, []
        while time.perf_counter() - begun < seconds:
            seed = number * 1000 + len(answers)
            answers.append(await Client(port).ask("/v1/completions", body | {"seed": seed}))
        return answers

    answers = [answer for own in await asyncio.gather(*(one(number) for number in range(clients))) for answer in own]
    return sum(tokens_until(answer, begun + seconds) for answer in answers), answers


def tokens_until(answer: Answer, end: float) -> int:
    """Events that had come by then: tokens, but for the few that are a part of a character."""
    return sum(count for at, count in zip(answer.times, answer.events, strict=True) if answer.begun + at <= end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=10, help="for each number of clients and round")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, at most: some end before")
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
            asyncio.run(load(served.port, max(arguments.clients), 1, arguments.tokens))  # the first ones warm up
            for _ in range(arguments.rounds):
                rounds.append({})
                for clients in arguments.clients:
                    cpu_s = served.cpu_s()
                    done, answers = asyncio.run(load(served.port, clients, arguments.seconds, arguments.tokens))
                    if any(answer.status != 200 or b"[DONE]" not in answer.content for answer in answers):
                        raise SystemExit("a request failed")
                    rounds[-1][str(clients)] = done / arguments.seconds
                    every = sum(sum(answer.events) for answer in answers)
                    costs.setdefault(clients, []).append((served.cpu_s() - cpu_s) / every)
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


if __name__ == "__main__":
    main()
