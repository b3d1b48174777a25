"""Two hosts, as two network namespaces of one machine, each with an address of its own: the run of one process."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from test_ranks import ONE, RUN, assert_close, lay_out, run

HOSTS = {"gptlab-a": "10.231.7.1", "gptlab-b": "10.231.7.2"}
PORT = "29741"
pytestmark = pytest.mark.slow


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """A cable between two namespaces; all of it is gone afterwards. Skips where that takes a privilege we lack."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command `ip` here")
    names = list(HOSTS)
    try:
        try:
            for name in names:
                command("ip", "netns", "add", name)
            command("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for name, address in HOSTS.items():
            command("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                command("ip", "-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                command("ip", "netns", "delete", name)


def by_torchrun(node: int) -> list[str]:
    rendezvous = ("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", f"--master-port={PORT}")
    master = f"--master-addr={HOSTS['gptlab-a']}"
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, master, "-m", "gptlab.train"]


def by_lightning(node: int) -> list[str]:
    return [sys.executable, "-m", "gptlab.train", "trainer.num_nodes=2", "trainer.devices=1"]


@pytest.mark.parametrize("start", [by_torchrun, by_lightning])
def test_two_hosts_train_the_run_of_one_process(hosts, tmp_path, start):
    folder = lay_out(tmp_path / "work")
    assert run(folder, "one", *ONE).returncode == 0
    options = (
        f"data.files={folder / 'text.txt'}",
        *RUN,
        "trainer=ddp",
        "data.batch_size=4",
        f"run_dir={folder / 'two'}",
    )
    processes = []
    for node, name in enumerate(HOSTS):
        env = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "NODE_RANK": str(node)}
        env |= {"MASTER_ADDR": HOSTS["gptlab-a"], "MASTER_PORT": PORT}
        words = ["ip", "netns", "exec", name, *start(node), *options]
        processes.append(subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert_close(folder / "one", folder / "two")


def test_the_two_hosts_have_no_other_way_to_each_other(hosts):
    """Cut the cable, and they are alone: what passes between them above passes over it."""
    first = next(iter(HOSTS))
    ping = "import socket; socket.create_connection(('10.231.7.2', 9), timeout=2)"
    reached = subprocess.run(["ip", "netns", "exec", first, sys.executable, "-c", ping], capture_output=True, text=True)
    assert "ConnectionRefusedError" in reached.stderr  # there, and nobody listens
    command("ip", "-n", first, "link", "set", "cable", "down")
    cut = subprocess.run(["ip", "netns", "exec", first, sys.executable, "-c", ping], capture_output=True, text=True)
    assert "unreachable" in cut.stderr or "timed out" in cut.stderr
