"""Files in, documents out: plain text in several readings, rows of JSON, CSV and Parquet, compressed or not.

Nothing larger than PART_BYTES is held but a document that its file gives as one row or line; a larger text file comes
in parts.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gptlab.data.document import Document, decode_text, gutenberg_spans, gutenberg_texts, without_gutenberg
from gptlab.data.opening import OPENERS, Count, opened

WHOLE_BYTES = 2**24  # a text file up to this size is one piece; no book is larger
PART_BYTES = 2**20
READINGS = ("auto", "file", "line", "separator", "field")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
NOTHING = "{} holds no text; remove it from the data, or check that it was written whole"


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    `documents`: "file", one each; "line", each line that is not blank; "separator", what stands between two lines that
    are just `separator`; "field", the text called `field` in each row of JSON, JSON lines, CSV, TSV or Parquet. "auto"
    is "field" for files whose name says that they have rows, else "separator" where there is one, else "file".
    """

    documents: str = "auto"
    separator: str | None = None
    field: str = "text"
    strip_gutenberg: bool = True

    def __post_init__(self):
        if self.documents not in READINGS:
            raise ValueError(f"data.documents={self.documents!r} is none of {', '.join(READINGS)}")
        if self.separator is not None and not self.separator.strip():
            raise ValueError(f"data.separator={self.separator!r} must be a line of text, or null")
        if (self.documents == "separator") != (self.separator is not None) and self.documents != "auto":
            raise ValueError(
                f"data.documents={self.documents} with data.separator={self.separator!r}: a separator goes with "
                "documents=separator, and is needed there"
            )

    def of(self, path: Path) -> str:
        """The word for this file, "auto" resolved. Raises ValueError where the file cannot be read so."""
        has_rows = kind_of(path) in ROWS
        word = self.documents
        if word == "auto":
            word = "field" if has_rows else "separator" if self.separator is not None else "file"
        if word == "field" and not has_rows:
            raise ValueError(f"data.documents=field: {path} has no rows; files that do end in {', '.join(ROWS)}")
        if word != "field" and kind_of(path) == ".parquet":
            raise ValueError(f"data.documents={word}: {path} has rows; read it with data.documents=field")
        return word

    def named(self, path: Path) -> list[str]:
        """All that the file's name decides: the word, what kind of rows it has, and how it is compressed."""
        word, ending = self.of(path), path.suffix.lower()
        return [word, kind_of(path) if word == "field" else "", ending if ending in OPENERS else ""]


def kind_of(path: Path) -> str:
    """The ending that tells what a file holds, ".jsonl" of "a.jsonl.gz"."""
    inner = Path(path.stem) if path.suffix.lower() in OPENERS else path
    return inner.suffix.lower()


def read_documents(path: Path, reading: Reading, count: Count = lambda size: None) -> Iterator[Document]:
    """The documents of a file. `count` is told of its bytes on the disk as they are read.

    Raises ValueError, naming the file and line or byte, for what cannot be read, is damaged, or holds no text.
    """
    word = reading.of(path)
    if word == "file":
        yield from _file(path, reading.strip_gutenberg, count)
        return
    readers = {"line": _lines, "separator": _separated, "field": _rows}
    found = False
    for document in readers[word](path, reading, count):
        found = True
        yield document
    if not found:
        raise ValueError(NOTHING.format(path))


def read_text(path: Path, *, strip_gutenberg: bool = False) -> str:
    """The text of a UTF-8 file of any size, without byte-order mark and with LF line ends.

    Raises ValueError, naming the file, if it is missing, binary, not UTF-8, or holds no text.
    """
    return "".join(document.text for document in _file(Path(path), strip_gutenberg, lambda size: None))


def _file(path: Path, strip_gutenberg: bool, count: Count) -> Iterator[Document]:
    with opened(path, lambda size: None) as file:
        content = file.read(WHOLE_BYTES + 1)
    if len(content) <= WHOLE_BYTES:
        count(path.stat().st_size)
        text = decode_text(content, path)
        text = without_gutenberg(text) if strip_gutenberg else text
        if not text.strip():
            raise ValueError(NOTHING.format(path))
        yield Document(path.name, text)
        return
    measure = _Measure(_parts(path, lambda size: None))
    spans = gutenberg_spans(measure) if strip_gutenberg else None

    def parts(count: Count) -> Iterator[str]:
        return _parts(path, count) if spans is None else gutenberg_texts(_parts(path, count), spans)

    if spans is not None:
        measure = _Measure(parts(lambda size: None))
    for _ in measure:  # unless they have passed by
        pass
    if measure.is_blank:
        raise ValueError(NOTHING.format(path))
    start = 0
    for text in parts(count):
        yield Document(path.name, text, start, measure.length)
        start += len(text)


class _Measure:
    """The parts of a text, and what is known of it when they have passed by."""

    def __init__(self, parts: Iterator[str]):
        self.parts, self.length, self.is_blank = parts, 0, True

    def __iter__(self) -> Iterator[str]:
        for text in self.parts:
            self.length += len(text)
            self.is_blank = self.is_blank and not text.strip()
            yield text


def _parts(path: Path, count: Count) -> Iterator[str]:
    """The text of a file in parts that end at a line's end where they can."""
    first_byte, first_line, rest = 0, 1, b""
    with opened(path, count) as file:
        while block := file.read(PART_BYTES):
            content = rest + block
            end = content.rfind(b"\n") + 1 or _whole_characters(content)
            yield decode_text(content[:end], path, first_byte, first_line)
            first_line += content.count(b"\n", 0, end)
            first_byte, rest = first_byte + end, content[end:]
    if rest:
        yield decode_text(rest, path, first_byte, first_line)


def _whole_characters(content: bytes) -> int:
    """Where to cut bytes that go on, so that no character and no CR LF is cut through."""
    end = len(content)
    while end > len(content) - 4 and content[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if content[end - 1] >= 0xC0 or content[end - 1 : end] == b"\r" else len(content)


def _lines(path: Path, reading: Reading, count: Count) -> Iterator[Document]:
    first_byte = 0
    with opened(path, count) as file:
        for number, line in enumerate(file, start=1):
            if (text := decode_text(line, path, first_byte, number).strip("\n")).strip():
                yield Document(f"{path.name}:{number}", text)
            first_byte += len(line)


def _separated(path: Path, reading: Reading, count: Count) -> Iterator[Document]:
    assert reading.separator is not None
    separator = reading.separator.strip().encode()
    lines: list[bytes] = []
    first_byte, first_line = 0, 1
    with opened(path, count) as file:
        for number, line in enumerate(chain(file, [separator]), start=1):
            if (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip() != separator:
                lines.append(line)
                continue
            content = b"".join(lines)
            if text := decode_text(content, path, first_byte, first_line).strip():
                yield Document(f"{path.name}:{first_line}", text)
            first_byte += len(content) + len(line)
            first_line, lines = number + 1, []


def _rows(path: Path, reading: Reading, count: Count) -> Iterator[Document]:
    kind = kind_of(path)
    if kind == ".parquet":
        rows = _parquet_rows(path, reading.field, count)
    elif kind == ".json":
        rows = _json_rows(path, count)
    elif kind in (".csv", ".tsv"):
        rows = _csv_rows(path, "\t" if kind == ".tsv" else ",", count)
    else:
        rows = json_lines(path, count)
    for where, row in rows:
        is_named = isinstance(row, Mapping) and reading.field in row
        text, called = (row[reading.field], repr(reading.field)) if is_named else (row, "the text")
        if is_named and not isinstance(text, str):
            raise ValueError(
                f"{path}: {where}: {called} is {_shown(text)} there, and must be text: mend or remove that row"
            )
        if not isinstance(text, str):
            has = f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is {_shown(row)}"
            raise ValueError(
                f"{path}: {where} has no text called {reading.field!r} ({has}): name the one to read with data.field"
            )
        if "\0" in text:  # as in plain text, where it tells of bytes that are none
            raise ValueError(f"{path}: {where}: {called} has a NUL, which no text has: mend or remove that row")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            yield Document(f"{path.name}:{where.split()[-1]}", text)


def _shown(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return "a list" if isinstance(value, list) else "a mapping"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)[:40]


def json_lines(path: Path, count: Count = lambda size: None) -> Iterator[tuple[str, Any]]:
    """Where each row of a file of JSON lines stands, and what it is. Raises ValueError, naming the line, for others."""
    first_byte = 0
    with opened(path, count) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = decode_text(line, path, first_byte, number)
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    at = f"byte {first_byte + len(error.doc[: error.pos].encode())}"
                    raise ValueError(
                        f"{path}: line {number} is no JSON ({error.msg} at {at}): mend or remove that line"
                    ) from error
                except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
                    raise ValueError(
                        f"{path}: line {number} cannot be read as JSON ({error}): mend or remove that line"
                    ) from error
                yield f"line {number}", row
            first_byte += len(line)


def _json_rows(path: Path, count: Count) -> Iterator[tuple[str, Any]]:
    with opened(path, count) as file:
        text = decode_text(file.read(), path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is no JSON ({error.msg}); JSON lines end in .jsonl") from error
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise ValueError(f"{path} cannot be read as JSON ({error}): mend or remove what is wrong with it") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json file must be a list of texts or rows; as plain text: data.documents=file")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _csv_rows(path: Path, delimiter: str, count: Count) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # for good: it is one for all files that are being read
    with opened(path, count) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: line {reader.line_num + 1} is no CSV in UTF-8 ({error})") from error


def _parquet_rows(path: Path, field: str, count: Count) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(f'{path}: reading Parquet takes pyarrow: pip install "gptlab[data]"') from error
    number, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in (names := file.schema_arrow.names):
                raise ValueError(
                    f"{path}: row 1 has no text called {field!r} (it has {', '.join(names)}): name the "
                    "one to read with data.field"
                )
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(1024, row_groups=[group], columns=[field]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield f"row {number}", {field: text}
                count(size // file.num_row_groups)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or a damaged one ({error})") from error
