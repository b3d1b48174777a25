"""Files that are whole or not there, and a manifest that knows every one of them, whatever moment a crash comes at."""

import json
import os
from pathlib import Path

import pytest

from gptlab import files
from gptlab.files import Manifest, require_space, write_atomically, write_listed


def put(folder: Path, step: int, *further: str) -> bytes:
    content = b"".join(f"line {line} of step {step}\n".encode() for line in range(50))
    write_listed(folder / "last.ckpt", lambda file: file.write(content), step, [folder / name for name in further])
    return content


def faults(folder: Path) -> list[str]:
    manifest = Manifest(folder)
    assert manifest.fault is None
    return [fault for path in sorted(folder.glob("*.ckpt")) if (fault := manifest.fault_of(path))]


class Crash(BaseException):
    """A kill, as far as a test in the same process can make one: no `except OSError` sees it."""


CALLS = [("os.replace", 3), ("os.fsync", 4), ("os.link", 1)]  # of one save with one further name


@pytest.mark.parametrize("call", [(name, number) for name, count in CALLS for number in range(count)], ids=str)
def test_a_crash_at_any_moment_leaves_files_that_the_manifest_knows(tmp_path, monkeypatch, call):
    (name, number), made = call, []
    old = put(tmp_path, 1, "best.ckpt")
    real = getattr(os, name.removeprefix("os."))

    def crash(*args, **kwargs):
        made.append(args)
        if len(made) - 1 == number:
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(name, crash)
    with pytest.raises(Crash):
        put(tmp_path, 2, "best.ckpt")
    monkeypatch.undo()
    new = b"".join(f"line {line} of step 2\n".encode() for line in range(50))
    assert (tmp_path / "last.ckpt").read_bytes() in (old, new)
    assert (tmp_path / "best.ckpt").read_bytes() in (old, new)
    assert faults(tmp_path) == []
    put(tmp_path, 3)
    assert faults(tmp_path) == []


def test_the_crashes_above_are_at_every_call_there_is(tmp_path, monkeypatch):
    put(tmp_path, 1, "best.ckpt")
    made = []
    for name, _ in CALLS:
        real = getattr(os, name.removeprefix("os."))
        monkeypatch.setattr(name, lambda *args, real=real, name=name: (made.append(name), real(*args))[1])
    put(tmp_path, 2, "best.ckpt")
    assert {name: made.count(name) for name, _ in CALLS} == dict(CALLS)


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "zero", "swap"])
def test_damage_is_seen(tmp_path, damage):
    content = put(tmp_path, 1)
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    (tmp_path / "last.ckpt").write_bytes(
        {
            "flip": content[:middle] + flipped + content[middle + 1 :],
            "truncate": content[:-1],
            "extend": content + b"x",
            "zero": bytes(len(content)),
            "swap": content[middle:] + content[:middle],
        }[damage]
    )
    (fault,) = faults(tmp_path)
    assert "damaged" in fault or "should have" in fault


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "files": []}', '{"format": 1, "files": [1]}']
)
def test_a_manifest_that_is_none_says_so_and_is_made_anew(tmp_path, text):
    put(tmp_path, 1)
    (tmp_path / files.MANIFEST).write_text(text)
    assert "manifest.json cannot be read" in Manifest(tmp_path).fault
    put(tmp_path, 2)
    assert faults(tmp_path) == []


def test_the_manifest_stays_short_and_knows_all_that_is_there(tmp_path):
    for step in range(1, 60):
        put(tmp_path, step, f"step-{step}.ckpt", *(["best.ckpt"] if step == 7 else []))
        (tmp_path / f"step-{step - 2}.ckpt").unlink(missing_ok=True)
    assert faults(tmp_path) == []
    manifest = Manifest(tmp_path)
    assert len(manifest.entries) < 10
    names = ["unknown.ckpt", "best.ckpt", "step-58.ckpt", "step-59.ckpt"]
    places = [manifest.place_of(tmp_path / name) for name in names]
    assert places == sorted(set(places))
    assert places[0] == -1
    assert manifest.place_of(tmp_path / "last.ckpt") == places[-1] == len(manifest.entries) - 1


def test_the_manifest_is_plain_json_of_the_hashes(tmp_path):
    import hashlib

    content = put(tmp_path, 4, "best.ckpt")
    (entry,) = json.loads((tmp_path / files.MANIFEST).read_text())["files"]
    digest = hashlib.sha256(content).hexdigest()
    assert entry == {"sha256": digest, "bytes": len(content), "step": 4, "names": ["last.ckpt", "best.ckpt"]}


def test_a_write_in_a_folder_that_is_gone_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file/below", lambda file: file.write(b""))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_room_is_said_before_anything_is_written(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"checkpoints need 1000000000000\.0 MB here"):
        require_space(tmp_path, 10**18)
