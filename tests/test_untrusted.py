"""Files that somebody else made: whatever they hold, nothing of it runs, and no memory is filled with it."""

import builtins
import importlib
import io
import os
import resource
import subprocess
import sys
import tomllib
import zipfile

import pytest
import torch
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.version import Version

from gptlab import checkpoint
from gptlab.callbacks.saving import AtomicCheckpointIO
from gptlab.model import GPT, GPTConfig
from gptlab.strategies import Sharded
from gptlab.tokenizer import ByteTokenizer


class Calls:
    """A pickle that calls `function` when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


CODE = {
    "os.system": Calls(os.system, "touch pwned"),
    "eval": Calls(builtins.eval, "open('pwned', 'w')"),
    "import": Calls(importlib.import_module, "evil"),
    "subprocess": Calls(subprocess.call, ["touch", "pwned"]),
    "a module of ours": Calls(GPT, GPTConfig(vocab_size=8)),
}


def sound() -> dict:
    config = GPTConfig(vocab_size=269, block_size=8, n_layer=1, n_head=1, n_embd=8)
    weights = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    return {"state_dict": weights, "global_step": 1, "gptlab": checkpoint.describe(config, ByteTokenizer.train([]))}


READERS = {
    "load": checkpoint.load,
    "load_model": checkpoint.load_model,
    "Lightning, told to trust": lambda path: AtomicCheckpointIO(False).load_checkpoint(path, weights_only=False),
    "Lightning, split network": lambda path: Sharded("rows", 1).load_checkpoint(path, weights_only=False),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CODE)
def test_code_in_a_checkpoint_is_never_run(tmp_path, name, reader):
    path = tmp_path / "bad.ckpt"
    torch.save(sound() | {"extra": CODE[name]}, path)
    with pytest.raises(ValueError, match=r"holds code .* which was not run"):
        READERS[reader](path)
    assert not (tmp_path / "pwned").exists()


def test_the_readers_read_what_is_sound(tmp_path):
    torch.save(sound(), tmp_path / "good.ckpt")
    assert checkpoint.load(tmp_path / "good.ckpt")["global_step"] == 1
    assert checkpoint.load_model(tmp_path / "good.ckpt")[0].config.n_embd == 8
    assert AtomicCheckpointIO(False).load_checkpoint(tmp_path / "good.ckpt")["global_step"] == 1


def rewritten(change) -> bytes:
    """A checkpoint whose parts `change` has written anew: change(archive, name, content)."""
    whole, out = io.BytesIO(), io.BytesIO()
    torch.save(sound(), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(out, "w") as target:
        for part in source.infolist():
            change(target, part.filename, source.read(part))
    return out.getvalue()


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path):
    def blow_up(archive, name, content):
        if name.endswith("data.pkl"):
            archive.writestr(name, content + bytes(2**28), zipfile.ZIP_DEFLATED)
        else:
            archive.writestr(name, content)

    path = tmp_path / "bomb.ckpt"
    path.write_bytes(rewritten(blow_up))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"bomb.ckpt: .*compressed"):
        checkpoint.load(path)


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path):
    content = rewritten(lambda archive, name, content: archive.writestr(name, content))
    start = content.index(b"PK\x01\x02")  # the first entry of the directory; its size of the part is at 24
    claimed = content[: start + 24] + (2**32 - 2).to_bytes(4, "little") + content[start + 28 :]
    path = tmp_path / "large.ckpt"
    path.write_bytes(claimed)
    with pytest.raises(ValueError, match=r"large.ckpt: .*more bytes than the file has"):
        checkpoint.load(path)


def test_a_tensor_that_claims_more_than_its_storage_takes_no_memory(tmp_path):
    """2^40 elements, of which the file holds a few; read in a process that may not take more than a few GB."""
    state = sound()
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] = torch.zeros(1).expand(2**20, 2**20)  # one element, so stored as one
    path = tmp_path / "wide.ckpt"
    torch.save(state, path)
    program = f"from pathlib import Path; from gptlab import checkpoint; checkpoint.load_model(Path({str(path)!r}))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))

    done = subprocess.run([sys.executable, "-c", program], preexec_fn=limit, capture_output=True, text=True)
    assert "ValueError" in done.stderr
    assert "the weights do not fit their own config" in done.stderr


@pytest.mark.parametrize("field", ["attention", "block", "norm", "mlp"])
def test_a_dotted_name_outside_the_trusted_packages_is_not_imported(tmp_path, field):
    (tmp_path / "evil.py").write_text("open('pwned', 'w')\n")
    state = sound()
    state["gptlab"]["model"][field] = "evil.Part"
    torch.save(state, tmp_path / "named.ckpt")
    with pytest.raises(ValueError, match="trust=evil"):
        checkpoint.load_model(tmp_path / "named.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_nothing_in_the_package_unpacks_archives_or_runs_pickles_or_shells():
    """What is not there cannot be led out of its folder, or astray."""
    forbidden = (
        "extractall(",
        "tarfile",
        "unpack_archive",
        "pickle.load",
        "weights_only=False",
        "shell=True",
        "os.system",
    )
    found = {
        (path.name, word)
        for path in (REPOSITORY / "gptlab").rglob("*.py")
        for word in forbidden
        if word in path.read_text()
    }
    assert found == set()


def test_the_malicious_releases_of_lightning_cannot_resolve():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (needed,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "lightning"]
    for version in ("2.6.2", "2.6.3"):
        assert not needed.specifier.contains(version)
    assert needed.specifier.contains("2.6.6")
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    for name in ("lightning", "pytorch-lightning"):
        assert Version(pins[name]) not in {Version("2.6.2"), Version("2.6.3")}
    names = {Requirement(r).name.lower() for r in project["dependencies"]}
    assert names <= {name.lower() for name in pins}  # all that a run needs is pinned
