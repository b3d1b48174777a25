"""Files of the safetensors format: what we write the library of that name reads, and the other way round."""

import json
import os
import random
import stat

import pytest
import safetensors
import safetensors.torch
import torch

from gptlab import tensors
from gptlab.tensors import TYPES, joined, read, write

SHAPES = [(), (0,), (3,), (2, 0, 4), (5, 7), (2, 3, 4)]


def examples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for word, dtype in TYPES.items():
        for shape in SHAPES:
            numbers = torch.randint(0, 2, shape, generator=generator) * 100
            found[f"{word} {shape}"] = numbers.to(dtype)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.shape == other[name].shape
        assert torch.equal(tensor, other[name])


def test_each_reads_what_the_other_writes(tmp_path):
    found = examples()
    write(tmp_path / "ours", found)
    safetensors.torch.save_file(found, tmp_path / "theirs", {"format": "pt"})
    for name in ("ours", "theirs"):
        same(found, read(tmp_path / name))
        same(found, safetensors.torch.load_file(tmp_path / name))
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_another_type_is_a_matter_of_writing(tmp_path):
    tensor = torch.randn(4, 3)
    write(tmp_path / "x", {"x": tensor.mT}, torch.bfloat16)
    assert torch.equal(read(tmp_path / "x")["x"], tensor.mT.bfloat16())


def test_who_may_read_the_file_is_for_the_system_to_say(tmp_path):
    write(tmp_path / "x", {"x": torch.zeros(1)})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_what_is_read_stays_in_the_file(tmp_path):
    write(tmp_path / "x", {"x": torch.arange(4.0)})
    read(tmp_path / "x")["x"][0] = 5
    assert read(tmp_path / "x")["x"][0] == 0
    with open(tmp_path / "x", "r+b") as file:  # the system reads what is there when it is used
        found = read(tmp_path / "x")["x"]
        file.seek(-4, os.SEEK_END)
        file.write(torch.tensor(7.0).numpy().tobytes())
        file.flush()
        assert found[3] == 7


def test_parts_that_lie_together_are_joined_in_their_place(tmp_path):
    whole = torch.randn(9, 4)
    write(tmp_path / "x", dict(zip("abc", whole.split((4, 3, 2)), strict=True)) | {"d": torch.randn(2, 4)})
    found = read(tmp_path / "x")
    once = joined([found[name] for name in "abc"])
    assert torch.equal(once, whole)
    assert once.data_ptr() == found["a"].data_ptr()
    for order in ("acb", "ab", "bc", "ad", "aa"):
        parts = [found[name] for name in order]
        assert torch.equal(joined(parts), torch.cat(parts)), order
    assert torch.equal(joined([whole[:4], whole[4:]]), whole)
    assert torch.equal(joined([whole[:4].mT, whole[4:8].mT]), torch.cat([whole[:4].mT, whole[4:8].mT]))


def file_of(header, content: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a header of 0 bytes does not fit"),
        (b"\xff" * 8, "does not fit"),
        (file_of(b"[1]"), "no safetensors file"),
        (file_of(b"{"), "no safetensors file"),
        (file_of(b"[" * 100_000), "no safetensors file"),
        (file_of({"x": None}), "no safetensors file"),
        (file_of({"x": {"dtype": "F32"}}), "shape"),
        (file_of({"x": entry(dtype="F7")}), "'F7', which is none of F64"),
        (file_of({"x": entry(dtype=["F32"])}), "no safetensors file"),
        (file_of({"x": entry(shape=(3,))}), r"the shape \[3\] of F32, and 8 bytes"),
        (file_of({"x": entry(shape=(-2,))}), "the shape"),
        (file_of({"x": entry(shape=(2.0,))}), "the shape"),
        (file_of({"x": entry(shape=(True, 2))}), "the shape"),
        (file_of({"x": entry(shape=[1] * 9)}), "the shape"),
        (file_of({"x": entry(shape=(2**62, 2**62))}), "the shape"),
        (file_of({"x": entry(shape=(2**32,), offsets=(0, 2**34))}), "its tensors have 17,179,869,184 bytes"),
        (file_of({"x": entry(offsets=(-8, 0))}), "the shape"),
        (file_of({"x": entry(offsets=(8, 0))}), "the shape"),
        (file_of({"x": entry(offsets=(0, 8, 9))}), "no safetensors file"),
        (file_of({"x": entry(), "y": entry()}), "'y' begins at 0, where 8 is due"),
        (file_of({"x": entry(offsets=(8, 16))}), "'x' begins at 8, where 0 is due"),
        (file_of({"x": entry()}, bytes(9)), "its tensors have 8 bytes, and it 9 of them"),
        (file_of({}), "its tensors have 0 bytes"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.safetensors: damaged.*{says}"):
        read(path)


def test_no_damage_does_more_than_be_refused_or_read(tmp_path):
    """Bits flipped and bytes cut at random: what is read at all lies in the file."""
    path, rng = tmp_path / "x", random.Random(0)
    write(path, {"a": torch.randn(3, 4), "b": torch.arange(5)})
    whole = path.read_bytes()
    read_at_all = 0
    for _ in range(500):
        content = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(0, 3)):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = tensors.read(path)
        except ValueError:
            continue
        read_at_all += 1
        assert sum(tensor.nbytes for tensor in found.values()) < len(content)
        for tensor in found.values():
            tensor.sum()
    assert 0 < read_at_all < 500


def test_a_file_that_is_not_aligned_is_read_too(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(file_of({"x": entry()}).replace(b'{"x"', b' {"x"').replace(b"\x3a", b"\x3a", 1))
    text = json.dumps({"x": entry()}).encode()
    for spaces in range(4):
        path.write_bytes(file_of(text + b" " * spaces, torch.tensor([1.0, 2.0]).numpy().tobytes()))
        assert read(path)["x"].tolist() == [1, 2]
