"""The door `python -m gptlab.serve`: a run answers OpenAI's API, and has a page to talk to it."""

from gptlab import flags
from gptlab.serve import options

if __name__ == "__main__":
    ARGUMENTS = flags.begin(options.serve())  # before the imports, which take seconds

import argparse
import os
import socket
from pathlib import Path

STALLED_MS = 60_000  # that a client may read nothing, before the connection is given up


def key_of(arguments: argparse.Namespace) -> str | None:
    """Raises ValueError for an empty key, which would keep nobody out."""
    if arguments.api_key is not None and not arguments.api_key.strip():
        raise ValueError("--api-key is empty; leave it out for a server without a key")
    key = arguments.api_key or os.environ.get(options.KEY) or ""
    if not key.isascii() or key != key.strip() or not key.isprintable():
        raise ValueError("the key must be printable ASCII without spaces around it, as it travels in a header")
    return key or None


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Raises ValueError for an address that cannot be had."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} must be from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of the connections, too
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
    return listener


def name_of(path: Path) -> str:
    """What a model is called by the file or folder that it is from."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return folder.resolve().name if path.is_dir() or folder != path else path.stem


def main(arguments: argparse.Namespace) -> int:
    try:
        import uvicorn  # here, with what needs it: an extra

        from gptlab.serve import api
        from gptlab.serve.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gptlab"):
            raise
        raise ValueError(f"serve needs more packages ({error}): pip install 'gptlab[serve]'") from error
    from gptlab.safety import Safety
    from gptlab.serve.limits import Limits, require_key
    from gptlab.serve.metrics import Metrics

    limits = Limits(arguments.parallel, arguments.queue, arguments.max_tokens, arguments.max_body_kb, arguments.timeout)
    key = key_of(arguments)
    require_key(arguments.host, key)
    safety = Safety.of(arguments.safety_mode, arguments.blocklist)
    with listen(arguments.host, arguments.port) as listener:
        loaded = flags.load(arguments)
        service = Service(loaded, arguments.name or name_of(loaded.path), limits, safety, Metrics())
        application = api.build(service, key, frozenset({arguments.host.lower()}))

        class Server(uvicorn.Server):
            def handle_exit(self, *signal: object) -> None:
                service.stop()  # so that what is under way ends
                super().handle_exit(*signal)

        config = uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        server = Server(config)
        host, port = listener.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        kind = "chat model" if loaded.knows_turns else "base model"
        print(f"{service.name}, a {kind}, at {where} (API: {where}/v1); Ctrl-C ends", flush=True)
        server.run(sockets=[listener])
    return flags.DONE if server.started else flags.FAILED


if __name__ == "__main__":
    flags.end(main, ARGUMENTS)
