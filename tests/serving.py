"""A server in a thread of this process, around a small network, and plain HTTP to it."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn

from gptlab import checkpoint
from gptlab.loading import Loaded
from gptlab.model import GPT, GPTConfig
from gptlab.safety import Safety
from gptlab.serve import api
from gptlab.serve.limits import Limits
from gptlab.serve.metrics import Metrics
from gptlab.serve.service import Service
from gptlab.tokenizer import CharTokenizer, Tokenizer

LETTERS = CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz .,\n"])


def small(tokenizer: Tokenizer = LETTERS, knows_turns: bool = False, **changes: Any) -> Loaded:
    """A network whose weights are large enough that it has opinions, and that seldom says it is done."""
    torch.manual_seed(0)
    settings = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "init_std": 0.4, "tie_embeddings": False}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **settings | changes)).eval()
    with torch.no_grad():
        model.head.weight[: len(tokenizer.special_tokens)] *= 0.05
    return Loaded(model, tokenizer, Path("runs/small/checkpoints/last.ckpt"), knows_turns)


def save(loaded: Loaded, run: Path) -> Path:
    """A run folder with this network."""
    own = checkpoint.describe(loaded.model.config, loaded.tokenizer) | {"knows_turns": loaded.knows_turns}
    weights = {f"model.{name}": tensor for name, tensor in loaded.model.state_dict().items()}
    content = {"state_dict": weights, checkpoint.OWN_KEY: own, "global_step": 1}
    checkpoint.save(content, run / "checkpoints/last.ckpt")
    return run


@dataclass
class Served:
    service: Service
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def slow_down(self, seconds: float) -> None:
        """Let each step of the engine take so long."""
        engine = self.service.worker.engine
        step = engine.step

        def slow() -> list:
            time.sleep(seconds)
            return step()

        engine.step = slow

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, content, {"Content-Type": "application/json"} | named)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, content = self.ask("POST", path, body, **headers)
        return status, json.loads(content)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stream says, up to the [DONE] that must end it."""
        status, headers, content = self.ask("POST", path, body | {"stream": True})
        assert status == 200, content
        assert headers["content-type"].startswith("text/event-stream")
        *events, done, rest = content.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def open(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """A connection that has asked, and has read nothing yet."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def until_idle(self, seconds: float = 10) -> None:
        """Fails if a place is taken for longer than that."""
        end = time.monotonic() + seconds
        while self.service.admission.here or not self.service.worker.engine.is_idle or self.service.worker._texts:
            assert time.monotonic() < end, f"{self.service.admission.here} samples are still there"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    loaded: Loaded | None = None,
    safety: Safety | None = None,
    key: str | None = None,
    buffer_bytes: int = 0,
    **limits: Any,
) -> Iterator[Served]:
    service = Service(loaded or small(), "small", Limits(**limits), safety or Safety(), Metrics())
    config = uvicorn.Config(api.build(service, key), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    if buffer_bytes:  # of what is sent and not read yet
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Served(service, listener.getsockname()[1])
    finally:
        service.stop()
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
