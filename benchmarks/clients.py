"""What the benchmarks of the server share: a server in a process of its own, and clients that cost little."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptlab import checkpoint
from gptlab.model import GPT, GPTConfig
from gptlab.tokenizer import ByteTokenizer

HERE = Path(__file__).parent


def make_run(folder: Path, **config: int) -> Path:
    """A run folder with a network of random weights, on bytes."""
    tokenizer = ByteTokenizer()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config))
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters: {config}", flush=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    own = checkpoint.describe(model.config, tokenizer)
    content = {"state_dict": weights, checkpoint.OWN_KEY: own, "global_step": 0}
    checkpoint.save(content, folder / "checkpoints/last.ckpt")
    return folder


@dataclass
class Server:
    process: subprocess.Popen
    port: int

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        """Of all its threads, so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def server(run: Path, *arguments: str) -> Iterator[Server]:
    """`python -m gptlab.serve`, from when it listens."""
    command = [sys.executable, "-m", "gptlab.serve", str(run), "--port", "0", *arguments]
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    try:
        line = process.stdout.readline()
        if " at http://" not in line:
            raise ValueError(f"the server did not start: {line}")
        yield Server(process, int(line.split(" at http://")[1].split()[0].rpartition(":")[2]))
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Answer:
    """What one request got: the status, its content, and when each piece of it came, in seconds from the start."""

    status: int = 0
    content: bytes = b""
    begun: float = 0
    times: list[float] = field(default_factory=list)
    events: list[int] = field(default_factory=list)  # in each piece, if it is a stream
    headers: dict[str, str] = field(default_factory=dict)


class Client:
    """One request over a connection of its own."""

    def __init__(self, port: int):
        self.port = port

    async def ask(
        self, path: str, body: bytes | dict[str, Any] | None = None, leave_after: int | None = None, pause_s: float = 0
    ) -> Answer:
        """The connection is dropped `leave_after` so many pieces; `pause_s` is waited before each is read."""
        answer = Answer(begun=time.perf_counter())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        try:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            head = f"{'GET' if content is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            if content is not None:
                head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
            writer.write(head.encode() + b"\r\n" + (content or b""))
            await writer.drain()
            answer.status = int((await reader.readline()).split()[1])
            while line := (await reader.readline()).strip():
                name, _, value = line.decode().partition(": ")
                answer.headers[name.lower()] = value
            parts = []
            async for part in pieces(reader, answer.headers):
                answer.times.append(time.perf_counter() - answer.begun)
                answer.events.append(part.count(b"data: {"))
                parts.append(part)
                if leave_after is not None and len(parts) >= leave_after:
                    break
                if pause_s:
                    await asyncio.sleep(pause_s)
            answer.content = b"".join(parts)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return answer


async def pieces(reader: asyncio.StreamReader, headers: dict[str, str]):
    """The chunks of a body, or all of it."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.read(int(headers["content-length"]) if "content-length" in headers else -1)
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


def single_thread() -> None:
    """The clients are to take as little of the processors as they can."""
    torch.set_num_threads(1)
