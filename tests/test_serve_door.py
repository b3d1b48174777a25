"""The door serve: what it says, what it refuses, how it ends, and what it does not import."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY, door
from serving import save, small

HEAVY = ["lightning", "torchmetrics", "hydra", "transformers", "omegaconf", "tensorboard", "sympy"]
SHOWN = f"""
import runpy, sys
try:
    runpy.run_module("gptlab.serve", run_name="__main__", alter_sys=True)
finally:
    print("imported", sorted(set({HEAVY}) & {{name.partition(".")[0] for name in sys.modules}}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(small(), tmp_path_factory.mktemp("made") / "my-run")


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[tuple[subprocess.Popen, str, str]]:
    """The process, its first line, and its address."""
    command = [sys.executable, "-c", SHOWN, *arguments, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )  # whose gptlab it is then
    try:
        line = process.stdout.readline()
        assert " at http://" in line, line + process.stderr.read()
        yield process, line, line.partition(" at ")[2].partition(" ")[0]
    finally:
        process.kill()
        process.communicate()


def test_it_serves_and_ends_in_order_without_what_is_heavy(run):
    with server(str(run)) as (process, line, url):
        assert line.startswith("my-run, a base model, at http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
            assert json.load(response)["data"][0]["id"] == "my-run"
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            asked = {"prompt": "once", "max_tokens": 4000, "truncation": "auto", "stream": True, "temperature": 0}
            body = json.dumps(asked).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            said = connection.recv(1000)
            process.send_signal(signal.SIGINT)
            while piece := connection.recv(2**16):
                said += piece
        assert said.startswith(b"HTTP/1.1 200")
        assert b'"code":"unavailable"' in said
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (130, "")
        assert output.splitlines()[-1] == "imported []"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-run"], "no-such-run"),
        (["RUN", "--host", "0.0.0.0"], "GPTLAB_API_KEY"),
        (["RUN", "--api-key", ""], "--api-key is empty"),
        (["RUN", "--parallel", "0"], "--parallel 0"),
        (["RUN", "--prot", "80"], "--port"),
        (["RUN", "--blocklist", "no-such-file", "--safety-mode", "strict"], "no-such-file"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_and_the_exit_code_is_2(run, arguments, said):
    done = door("serve", *[str(run) if word == "RUN" else word for word in arguments], timeout=60)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = door("serve", str(run), "--port", port, timeout=60)
    assert done.returncode == 2
    assert f"--port {port}" in done.stderr


def test_without_the_extra_it_is_named(run):
    program = "import sys; sys.modules['uvicorn'] = None" + SHOWN
    command = [sys.executable, "-c", program, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY)
    assert done.returncode == 2
    assert "pip install 'gptlab[serve]'" in done.stderr
