"""Files of any format give the documents that were put into them, or one message that names file and line."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.data import formats
from gptlab.data.corpus import Files, split_documents
from gptlab.data.formats import Reading, read_documents, read_text

TEXTS = ['One day, "Tom" ran.\nThen he slept.', "Un d\u00eda, Ana\tcorri\u00f3.", "x" * 10_000]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


MEND = "there, and must be text: mend or remove that row"


def as_parquet(columns: dict[str, list]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def as_rows(kind: str, texts: list[str]) -> bytes:
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind == ".json":
        return json.dumps(rows).encode()
    if kind in (".csv", ".tsv"):
        file = io.StringIO()
        writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()
    if kind == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
        return sink.getvalue()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts_of(path, **reading) -> list[str]:
    return [document.text for document in read_documents(path, Reading(**reading))]


def test_one_csv_file_that_ends_does_not_disturb_another_that_is_read(tmp_path):
    """The limit of a field is csv's own, for all that read at the time."""
    for name, rows in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.csv").write_bytes(as_rows(".csv", ["x" * 200_000] * rows))
    first, second = (read_documents(tmp_path / f"{name}.csv", Reading()) for name in "ab")
    next(first), next(second)
    assert list(first) == []
    assert len(next(second).text) == 200_000


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".py"])
def test_what_was_written_is_read(tmp_path, kind, packed):
    path = tmp_path / f"text{kind}{packed}"
    has_rows = kind in formats.ROWS
    path.write_bytes(COMPRESS[packed](as_rows(kind, TEXTS) if has_rows else "\n---\n".join(TEXTS).encode()))
    sizes = []
    reading = Reading() if has_rows else Reading(separator="---")
    assert [document.text for document in read_documents(path, reading, sizes.append)] == TEXTS
    assert sum(sizes) == path.stat().st_size


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 700_000])
def test_frames_that_stand_one_after_another_are_one_text(tmp_path, packed, size):
    texts = [f"part {number} " * size for number in range(3)]
    frames = [COMPRESS[packed](text.encode()) for text in texts]
    if packed == ".zst":  # as pzstd and the seekable format put between them
        frames.insert(1, b"\x50\x2a\x4d\x18\x03\x00\x00\x00xyz")
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(b"".join(frames))
    assert "".join(texts_of(path)) == "".join(texts)


def test_a_byte_order_mark_before_a_separator_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    for first, texts in ((b"---\n", ["one", "two"]), (b"zero\n---\n", ["zero", "one", "two"])):
        path.write_bytes(b"\xef\xbb\xbf" + first + b"one\n---\ntwo\n")
        assert texts_of(path, separator="---") == texts
    path.write_bytes(b"\xef\xbb\xbf---\none\n---\n\xff\n")
    with pytest.raises(ValueError, match=r"byte 15 \(0xff, line 4\)"):
        texts_of(path, separator="---")


def test_no_cut_through_a_frame_is_taken_for_its_end(tmp_path):
    content = zstandard.compress(b"".join(b"%d squared is %d\n" % (n, n * n) for n in range(300)))
    path = tmp_path / "a.txt.zst"
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a.txt.zst is damaged, or not what its ending says"):
            texts_of(path)


def test_parquet_and_lists_of_plain_texts_are_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_rows(".parquet", TEXTS))
    assert texts_of(tmp_path / "a.parquet") == TEXTS
    (tmp_path / "b.json").write_text(json.dumps(TEXTS))
    assert texts_of(tmp_path / "b.json") == TEXTS
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    assert texts_of(tmp_path / "c.jsonl") == TEXTS
    (tmp_path / "d.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n{"body": " "}\n')
    assert texts_of(tmp_path / "d.jsonl", field="body") == ["one", "two"]


def test_documents_by_line_and_by_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\r\nthree")
    assert texts_of(path, documents="line") == ["one", "  two", "three"]
    assert texts_of(path) == ["one\n\n  two\nthree"]
    rows = tmp_path / "a.json"
    rows.write_text('{"not": "a list"}')
    assert texts_of(rows, documents="file") == ['{"not": "a list"}']


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab\n\r\u00e9\u20ac\U0001f600"), min_size=1, max_size=60), st.integers(4, 20))
def test_a_large_file_in_parts_is_the_file(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes(("x" + text).encode())
    whole = read_text(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "WHOLE_BYTES", 0)
        patch.setattr(formats, "PART_BYTES", size)
        parts = list(read_documents(path, Reading()))
        assert "".join(part.text for part in parts) == whole
        assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
        for fraction in (0.1, 0.5):
            sides = {"train": [], "validation": []}
            for side, piece in split_documents(parts, fraction, "tail"):
                sides[side].append(piece)
            assert "".join(piece.text for piece in sides["train"]) == whole[: int(len(whole) * (1 - fraction))]
            assert "".join(piece.text for side in sides.values() for piece in side) == whole
            assert all(
                [piece.ends for piece in side] == [False] * (len(side) - 1) + [True] for side in sides.values() if side
            )
        assert len({side for side, _ in split_documents(parts, 0.5, "hash")}) == 1


@pytest.mark.parametrize(
    ("name", "content", "reading", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n', {}, r"a.jsonl: line 2 is no JSON .* at byte 23\): mend"),
        ("a.jsonl", b'{"body": "a"}\n', {}, r"line 1 has no text called 'text' \(it has body\): .* data.field"),
        ("a.jsonl", b"3\n", {}, r"line 1 has no text called 'text' \(it is 3\)"),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, r"a.jsonl is not UTF-8: byte 10 \(0xff, line 1\)"),
        ("a.json", b'{"text": "a"}', {}, r"must be a list of texts or rows; as plain text: data.documents=file"),
        ("a.json", b'["a",\n', {}, r"a.json: line 2 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"id": 1, "text": null}\n', {}, rf"line 2: 'text' is null {MEND}"),
        ("a.jsonl", b'{"text": 3.5}\n', {}, rf"a.jsonl: line 1: 'text' is 3.5 {MEND}"),
        ("a.jsonl", b'{"text": ["a", "b"]}\n', {}, rf"a.jsonl: line 1: 'text' is a list {MEND}"),
        ("a.json", b'[{"body": "a"}, {"body": true}]', {"field": "body"}, rf"a.json: row 2: 'body' is true {MEND}"),
        ("a.csv", b"id,text\n1,a\n2\n", {}, rf"a.csv: line 3: 'text' is null {MEND}"),
        ("a.parquet", as_parquet({"text": ["a", None]}), {}, rf"a.parquet: row 2: 'text' is null {MEND}"),
        ("a.parquet", as_parquet({"text": [1, 2]}), {}, rf"a.parquet: row 1: 'text' is 1 {MEND}"),
        ("a.parquet", as_parquet({"text": [b"a"]}), {}, rf"a.parquet: row 1: 'text' is b'a' {MEND}"),
        (
            "a.jsonl",
            b'"a"\n{"text": ' + b"9" * 5000 + b"}\n",
            {},
            r"a.jsonl: line 2 cannot be read as JSON \(Exceeds the",
        ),
        (
            "a.jsonl",
            b'"a"\n' + b"[" * 200_000 + b"]" * 200_000,
            {},
            r"a.jsonl: line 2 cannot be read as JSON \(.*recurs",
        ),
        ("a.json", b"[" + b"9" * 5000 + b"]", {}, r"a.json cannot be read as JSON \(Exceeds the"),
        ("a.json", b"[" * 200_000 + b"]" * 200_000, {}, r"a.json cannot be read as JSON \(.*recurs"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\\u0000c"}\n', {}, r"a.jsonl: line 2: 'text' has a NUL, .*: mend"),
        (
            "a.json",
            b'["a\\u0000"]',
            {},
            r"a.json: row 1: the text has a NUL, which no text has: mend or remove that row",
        ),
        ("a.csv", b"text\na\n\0\n", {}, r"a.csv: line 3: 'text' has a NUL"),
        ("a.parquet", as_parquet({"text": ["a\0b"]}), {}, r"a.parquet: row 1: 'text' has a NUL"),
        ("a.csv", b'id,text\n1,"a\n', {}, r"a.csv: line \d is no CSV"),
        ("a.csv", b"id,body\n1,a\n", {}, r"has no text called 'text' \(it has id, body\)"),
        ("a.parquet", b"PAR1", {}, r"a.parquet is no Parquet file, or a damaged one"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            {},
            r"a.txt.gz is damaged, or not what its ending says",
        ),
        ("a.txt.gz", b"plain", {}, r"a.txt.gz is damaged, or not what its ending says"),
        ("a.txt.zst", b"plain text", {}, r"a.txt.zst is damaged, or not what its ending says"),
        ("a.txt.zst", zstandard.compress(b"text\n" * 99_999)[:-9], {}, r"a.txt.zst is damaged, or not what its ending"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n')[:-1], {}, r"a.jsonl.zst is damaged, or not what its"),
        ("a.txt.zst", zstandard.compress(b"one") + zstandard.compress(b"two")[:-2], {}, r"a.txt.zst is damaged"),
        ("a.txt.zst", zstandard.compress(b"one") + b"and no frame", {}, r"a.txt.zst is damaged"),
        ("a.txt.zst", zstandard.compress(b"one") + b"\x28\xb5", {}, r"a.txt.zst is damaged"),
        ("a.txt.xz", b"plain text", {}, r"a.txt.xz is damaged, or not what its ending says"),
        ("a.txt", b"a", {"documents": "field"}, r"data.documents=field: .*a.txt has no rows; files that do end in"),
        ("a.parquet", b"a", {"documents": "line"}, r"data.documents=line: .*a.parquet has rows"),
        ("a.txt", b"---\n", {"separator": "---"}, r"a.txt holds no text"),
        ("a.jsonl", b'{"text": ""}\n', {}, r"a.jsonl holds no text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, reading, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        texts_of(tmp_path / name, **reading)


@pytest.mark.parametrize("reading", [{"documents": "word"}, {"documents": "separator"}, {"separator": " "}])
def test_a_reading_that_cannot_be_is_refused(reading):
    with pytest.raises(ValueError, match=r"^data\.(documents|separator)="):
        Reading(**reading)


def test_text_by_url_is_copied_once_and_read(tmp_path, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, text in {"a.txt": "one", "b.txt": "two"}.items():
        memory.pipe(f"/texts/{name}", text.encode())
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "cache"))

    def read() -> list[str]:
        return [document.text for document in Files("memory://texts/*.txt").documents()]

    assert read() == ["one", "two"]
    files = list((tmp_path / "cache").rglob("*.txt"))
    assert len(files) == 2
    files[0].write_text(files[0].read_text().upper())
    assert sorted(read(), key=str.lower) != ["one", "two"], "it was copied again"
    memory.pipe("/texts/a.txt", b"three")  # another version
    assert "three" in read()
    with pytest.raises(ValueError, match=r"data.files='memory://texts/\*.md': there is no such file"):
        Files("memory://texts/*.md").paths()
    with pytest.raises(ValueError, match=r"data.files='nowhere://x': .*nowhere"):
        Files("nowhere://x").paths()
    with pytest.raises(ValueError, match=r"data.files='http://127.0.0.1:9/x.txt': .* no way to it .*; check"):
        Files("http://127.0.0.1:9/x.txt").paths()
