"""Files of ids are taken as the page says that they are, and refused by name where they are not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from gptlab.data.shards import Sidecar, open_shards, read_sidecar, sidecar_path, write_sidecar
from gptlab.files import sha256_of_file
from gptlab.tokenizer import EOS_ID

DOCUMENTS = [[20, 21, 22], [30], [40, 41]]


def ids_of(documents: list[list[int]]) -> np.ndarray:
    return np.array([i for document in documents for i in (*document, EOS_ID)])


def write_shard(path: Path, ids: np.ndarray, dtype: str = "<u2", **changes) -> Path:
    """A shard as docs/tokens.md describes it; `changes` are other values of its sidecar."""
    ids.astype(dtype).tofile(path)
    known = {"tokens": len(ids), "documents": int((ids == EOS_ID).sum()), "vocab_size": 269}
    write_sidecar(path, Sidecar(**{"dtype": dtype, "sha256": sha256_of_file(path)} | known | changes))
    return path


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_what_is_written_is_read(tmp_path, dtype):
    ids = ids_of(DOCUMENTS)
    (shard,) = open_shards(str(write_shard(tmp_path / "a.bin", ids, dtype, bytes=6, tokenizer_fingerprint="0" * 64)))
    assert np.array_equal(shard.ids[:], ids)
    assert shard.ids.dtype == dtype
    assert (shard.sidecar.documents, shard.sidecar.bytes, shard.sidecar.tokenizer_fingerprint) == (3, 6, "0" * 64)
    assert np.array_equal(shard.ids.part(2, 5)[:], ids[2:5])


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", ">i8", "u1"])
def test_npy_of_any_integers(tmp_path, dtype):
    np.save(tmp_path / "a.npy", ids_of(DOCUMENTS).astype(dtype))
    (shard,) = open_shards(str(tmp_path / "a.npy"))
    assert shard.ids[:].tolist() == ids_of(DOCUMENTS).tolist()
    assert [block.tolist() for _, block in shard.ids.blocks(1, 3)] == [[21, 22]]
    assert shard.ids.part(4, 6)[:].tolist() == [30, EOS_ID]


def test_blocks_are_the_whole_file_in_order(tmp_path, monkeypatch):
    from gptlab.data import tokens

    monkeypatch.setattr(tokens, "BLOCK_BYTES", 6)
    (shard,) = open_shards(str(write_shard(tmp_path / "a.bin", ids_of(DOCUMENTS))))
    found = list(shard.ids.blocks(1))
    assert [start for start, _ in found] == [1, 4, 7]
    assert np.concatenate([block for _, block in found]).tolist() == ids_of(DOCUMENTS)[1:].tolist()


def test_shards_of_a_glob_come_by_name_and_those_of_a_list_as_given(tmp_path, caplog):
    for name in "cab":
        write_shard(tmp_path / f"{name}.bin", ids_of(DOCUMENTS))
    np.save(tmp_path / "d.npy", ids_of(DOCUMENTS))
    (tmp_path / "notes.txt").write_text("no ids")
    ids_of(DOCUMENTS).astype("<u2").tofile(tmp_path / "unfinished.bin")
    names = [shard.path.name for shard in open_shards(str(tmp_path / "*"))]
    assert names == ["a.bin", "b.bin", "c.bin", "d.npy"]
    assert "1 shards without a sidecar, unfinished (unfinished.bin)" in caplog.text
    assert [shard.path.name for shard in open_shards([str(tmp_path / "c.bin"), str(tmp_path / "a*")])] == [
        *("c.bin", "a.bin")
    ]


def test_a_shard_without_ids_is_left_out(tmp_path):
    write_shard(tmp_path / "a.bin", ids_of([]))
    np.save(tmp_path / "b.npy", np.zeros(0, dtype="u2"))
    write_shard(tmp_path / "c.bin", ids_of(DOCUMENTS))
    assert [shard.path.name for shard in open_shards(str(tmp_path / "*"))] == ["c.bin"]
    with pytest.raises(ValueError, match="holds no ids"):
        open_shards(str(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2, where this gptlab reads 1"),
        ({"dtype": "<i2"}, "dtype='<i2' is none of <u2, <u4"),
        ({"tokens": -1}, "tokens=-1 must be a whole number"),
        ({"tokens": True}, "tokens=True must be a whole number"),
        ({"documents": 1.5}, "documents=1.5"),
        ({"vocab_size": 70000}, "vocab_size=70000 does not fit dtype='<u2'"),
        ({"eos_id": 50256}, "eos_id=50256, where every tokenizer of gptlab ends documents with 2"),
        ({"sha256": "abc"}, "sha256='abc' must be 64 hexadecimal digits"),
        ({"sha256": None}, "sha256=None"),
        ({"tokenizer_fingerprint": 7}, "tokenizer_fingerprint=7"),
        ({"bytes": "many"}, "bytes='many'"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"format": ...}, "'format' is missing"),
        ({"tokens": 8}, "has 18 bytes, and by its sidecar 8 tokens, which take 16: it is truncated"),
        ({"dtype": "<u4"}, "has 18 bytes, and by its sidecar 9 tokens, which take 36"),
    ],
)
def test_a_sidecar_that_cannot_be_is_refused_by_file_and_field(tmp_path, changes, says):
    path = write_shard(tmp_path / "a.bin", ids_of(DOCUMENTS))
    content = json.loads(sidecar_path(path).read_text()) | changes
    sidecar_path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        open_shards(str(path))
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 1', b"\xff", b"null"])
def test_a_damaged_sidecar_is_refused_by_name(tmp_path, content):
    path = write_shard(tmp_path / "a.bin", ids_of(DOCUMENTS))
    sidecar_path(path).write_bytes(content)
    with pytest.raises(ValueError, match=r"a.bin.json is no sidecar of a shard"):
        open_shards(str(path))


def save(name: str, array: np.ndarray, **options):
    return lambda folder: np.save(folder / name, array, **options)


@pytest.mark.parametrize(
    ("make", "files", "says"),
    [
        (None, "missing.bin", "data.tokens='{}/missing.bin': there is no such file"),
        (None, "*.bin", "matches no .bin or .npy file"),
        (lambda folder: (folder / "a.bin").write_bytes(b"ab"), "a.bin", "has no sidecar a.bin.json, which is written"),
        (lambda folder: (folder / "a.bin").write_bytes(b"ab"), "*.bin", "matches only 1 without their sidecars"),
        (lambda folder: (folder / "a.txt").write_bytes(b"ab"), "a.txt", "is no file of ids; these end in .bin or .npy"),
        (lambda folder: (folder / "sub").mkdir(), "sub", "is a folder; name the shards in it: '{}/sub/*.bin'"),
        (lambda folder: (folder / "a.npy").write_bytes(b"ab"), "a.npy", "is no .npy file of ids, or a damaged one"),
        (save("a.npy", np.zeros((2, 3), "u2")), "a.npy", "an array of uint16 in 2 dimensions"),
        (save("a.npy", np.zeros(3)), "a.npy", "an array of float64 in 1 dimensions"),
        (save("a.npy", np.array([{}]), allow_pickle=True), "a.npy", "no .npy file of ids"),
    ],
)
def test_what_is_no_shard_is_refused_by_name(tmp_path, make, files, says):
    if make is not None:
        make(tmp_path)
    with pytest.raises(ValueError, match=re.escape(says.format(tmp_path))):
        open_shards(f"{tmp_path}/{files}")


def test_a_truncated_npy_and_an_archive_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(100, "u2"))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    np.savez(tmp_path / "b.npz", np.zeros(100, "u2"))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    for name in "ab":
        with pytest.raises(ValueError, match=rf"{name}.npy is no .npy file of ids"):
            open_shards(str(tmp_path / f"{name}.npy"))


def test_a_file_named_twice_and_a_url_are_refused(tmp_path):
    path = write_shard(tmp_path / "a.bin", ids_of(DOCUMENTS))
    for twice in ([str(path), str(tmp_path / "*.bin")], [str(path)] * 2):
        with pytest.raises(ValueError, match=r"a.bin is named twice"):
            open_shards(twice)
    with pytest.raises(ValueError, match="mapped where they lie; copy the files"):
        open_shards("https://example.org/a.bin")


def test_a_file_whose_name_holds_signs_of_a_glob(tmp_path):
    path = write_shard(tmp_path / "a[1].bin", ids_of(DOCUMENTS))
    assert open_shards(str(path))[0].path == path


def test_the_page_describes_the_sidecar_that_is_written(tmp_path):
    page = (REPOSITORY / "docs/tokens.md").read_text()
    keys = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    path = write_shard(tmp_path / "a.bin", ids_of(DOCUMENTS))
    assert sorted(json.loads(sidecar_path(path).read_text())) == sorted(keys)
    example = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    assert sorted(example) == sorted(keys)
    sidecar_path(path).write_text(json.dumps(example | {"a key of somebody else": 1}))
    assert read_sidecar(path).documents == example["documents"]


def test_the_code_of_the_page_runs(tmp_path):
    from gptlab.tokenizer import ByteTokenizer

    page = (REPOSITORY / "docs/tokens.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    path, tokenizer = tmp_path / "a.bin", ByteTokenizer()
    exec(code, {"ids": ids_of(DOCUMENTS), "path": path, "tokenizer": tokenizer})
    (shard,) = open_shards(str(path))
    assert shard.sidecar.tokenizer_fingerprint == tokenizer.fingerprint
