"""The sources that come with gptlab: Python's own text, and downloads that are checked, kept, and unneeded offline."""

import hashlib
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from gptlab.data import sources
from gptlab.data.corpus import split_documents, split_rule
from gptlab.data.sources import Download, PyDocs, PySource

TEXT = b"To be, or not to be"
CLOSED = "http://127.0.0.1:9/play.txt"  # the discard port: nothing listens
CONF = Path(__file__).parents[1] / "conf" / "data"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def play(url: str, digest: str | None = sha256(TEXT)) -> dict:
    return {"url": url, "local": "plays/play.txt", "sha256": digest, "size_bytes": len(TEXT)}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTLAB_DATA_DIR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        self.server.requests += 1


@pytest.fixture
def site(tmp_path):
    """A web server on this machine, with the play; `requests` counts."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "play.txt").write_bytes(TEXT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "site"))
    server.requests = 0
    server.url = f"http://127.0.0.1:{server.server_port}/play.txt"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def pydocs():
    return list(PyDocs().documents())


def test_pydocs_is_prose_of_megabytes_and_many_documents(pydocs):
    size = sum(len(document.text.encode()) for document in pydocs)
    assert 1e6 < size < 4e6
    assert len(pydocs) > 200
    assert split_rule(pydocs) == "hash"
    names = [document.name for document in pydocs]
    assert len(set(names)) == len(names)
    assert "topics/assignment" in names
    assert "textwrap.py" in names
    assert not [name for name in names if "test" in Path(name).parts or "site-packages" in name]


def test_pydocs_is_the_same_each_time(pydocs):
    assert list(PyDocs().documents()) == pydocs


def test_pydocs_holds_no_text_twice(pydocs):
    sides = {"train": set(), "validation": set()}
    for side, document in split_documents(pydocs, 0.1, "hash"):
        sides[side] |= {text for text in document.text.split("\n\n") if len(text) >= 200}
    shared = sides["train"] & sides["validation"]
    assert len(shared) <= 0.02 * len(sides["validation"])


def test_pysource_is_code_without_tests():
    source = PySource()
    names = [document.name for document in source.documents()]
    assert {"textwrap.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert not [name for name in names if name.startswith(("test/", "site-packages/", "encodings/"))]
    assert sum(path.stat().st_size for path in source.paths()) > 5e6


def test_own_folder_is_looked_in_first(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "play.txt").write_bytes(TEXT)
    assert [document.text.encode() for document in Download([play(CLOSED)]).documents()] == [TEXT]
    assert not caplog.records
    (tmp_path / "plays" / "play.txt").write_bytes(b"Another play")
    assert [document.text for document in Download([play(CLOSED)]).documents()] == ["Another play"]
    assert sha256(TEXT) in caplog.text
    assert sha256(b"Another play") in caplog.text


def test_download_happens_once(tmp_path, site):
    for _ in range(2):
        source = Download([play(site.url)])
        assert [document.text.encode() for document in source.documents()] == [TEXT]
    assert site.requests == 1
    assert source.paths()[0].is_relative_to(tmp_path / "cache" / "downloads")


def test_files_of_one_name_and_two_addresses_are_kept_apart(site, tmp_path):
    (tmp_path / "site" / "other.txt").write_bytes(b"other")
    one, two = Download([play(site.url, None)]), Download([play(site.url.replace("play", "other"), None)])
    assert [document.text for source in (one, two) for document in source.documents()] == [TEXT.decode(), "other"]


def test_unpinned_download_logs_its_checksum(site, caplog):
    caplog.set_level(logging.INFO)
    Download([play(site.url, None)]).paths()
    assert sha256(TEXT) in caplog.text


def test_damaged_download_is_fetched_again(site):
    path = Download([play(site.url)]).paths()[0]
    path.write_bytes(TEXT[:5])
    assert Download([play(site.url)]).paths()[0].read_bytes() == TEXT


def test_checksum_mismatch_shows_both_and_a_remedy(site, tmp_path):
    with pytest.raises(ValueError, match=r"set data.source.files' sha256 to the new hash") as caught:
        Download([play(site.url, sha256(b"old"))]).paths()
    assert sha256(TEXT) in str(caught.value)
    assert sha256(b"old") in str(caught.value)
    assert not list((tmp_path / "cache").rglob("play.txt"))


def test_offline_error_says_where_to_put_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"\$GPTLAB_DATA_DIR/plays/play.txt") as caught:
        Download([play(CLOSED)]).paths()
    assert CLOSED in str(caught.value)
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    with pytest.raises(OSError, match=f"{tmp_path}/plays/play.txt"):
        Download([play(CLOSED)]).paths()


def test_missing_page_is_an_error_that_names_it(site):
    with pytest.raises(OSError, match=r"404.*nothing"):
        Download([play(site.url.replace("play", "nothing"), None)]).paths()


def test_a_download_too_large_for_the_disk_is_not_begun(site):
    with pytest.raises(OSError, match=r"set GPTLAB_CACHE_DIR to a larger disk"):
        Download([play(site.url) | {"size_bytes": 10**18}]).paths()
    assert site.requests == 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"each file must have just url, local, sha256, size_bytes .*'sha'"):
        Download([{"url": CLOSED, "sha": "1"}])
    with pytest.raises(ValueError, match=r"data.source.separator=' ' must be a line of text"):
        Download([play(CLOSED)], separator=" ")


def separated(tmp_path, monkeypatch, content: bytes) -> list[str]:
    monkeypatch.setenv("GPTLAB_DATA_DIR", str(tmp_path))
    (tmp_path / "plays").mkdir(exist_ok=True)
    (tmp_path / "plays" / "play.txt").write_bytes(content)
    return [doc.text for doc in Download([play(CLOSED, None)], separator="<|endoftext|>").documents()]


def test_separator_makes_a_document_of_each_story(tmp_path, monkeypatch):
    content = b"\xef\xbb\xbfOne.\r\n\r\nMore of <|endoftext|> it.\n<|endoftext|>\nTwo.\n<|endoftext|>\n\n"
    content += b"<|endoftext|>\r\nThree"
    stories = ["One.\n\nMore of <|endoftext|> it.", "Two.", "Three"]
    assert separated(tmp_path, monkeypatch, content) == stories
    assert separated(tmp_path, monkeypatch, content + b"\n<|endoftext|>") == stories


def test_bad_bytes_in_a_stream_are_located_in_the_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"play.txt is not UTF-8: byte 20 \(0xff, line 4\)"):
        separated(tmp_path, monkeypatch, b"a\n<|endoftext|>\nb\ncd\xff\n")
    with pytest.raises(ValueError, match=r"play.txt is binary: byte 16 is NUL"):
        separated(tmp_path, monkeypatch, b"a\n<|endoftext|>\n\0\n")
    with pytest.raises(ValueError, match=r"play.txt holds no text"):
        separated(tmp_path, monkeypatch, b"\n<|endoftext|>\n")


@pytest.mark.parametrize("name", ["pydocs", "pysource", "shakespeare", "gutenberg", "tinystories"])
def test_each_word_of_the_command_line_names_a_source(name):
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    arguments = yaml.safe_load(text)["source"]
    module, _, kind = arguments.pop("_target_").rpartition(".")
    assert module == "gptlab.data.sources"
    source = getattr(sources, kind)(**arguments)
    for file in getattr(source, "files", ()):
        assert file.url.startswith("https://")
        assert file.sha256 is None or len(file.sha256) == 64
