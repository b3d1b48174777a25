"""Text in: what is read, what is refused and in which words, and that no validation text is trained on."""

import glob
import gzip
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SMALL, compose
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab import assembly
from gptlab.config import absolute_paths
from gptlab.data import document, formats
from gptlab.data.corpus import Files, split_documents, split_rule
from gptlab.data.document import Document, without_gutenberg
from gptlab.data.formats import Reading, read_documents, read_text
from gptlab.data.listed import refuse_overlap, text_files

HEADER = "\ufeffThe Project Gutenberg eBook of X\n\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n"
LICENCE = "\n\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nUpdated editions will replace the previous one.\n"


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def split(docs: list[Document], fraction: float = 0.1) -> dict[str, list[str]]:
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    for side, piece in split_documents(docs, fraction, split_rule(docs)):
        sides[side].append(piece.text)
    return sides


@pytest.mark.parametrize("n_documents", [1, 7, 99, 100, 400])
def test_no_validation_word_is_in_training_and_none_is_lost(n_documents):
    docs = documents(["".join(f"<{i}-{j}>" for j in range(30)) for i in range(n_documents)])  # each word occurs once
    sides = split(docs)
    train, validation = (set(re.findall("<[^<]*>", "\n".join(texts))) for texts in sides.values())
    assert train
    assert validation
    assert not train & validation
    assert sum(map(len, sides["train"])) + sum(map(len, sides["validation"])) == sum(len(d.text) for d in docs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=20), st.floats(0.001, 0.999))
def test_tail_pieces_join_to_their_documents(texts, fraction):
    joined = {f"d{i}": "" for i in range(len(texts))}
    for _, piece in split_documents(documents(texts), fraction, "tail"):
        assert piece.text
        joined[piece.name] += piece.text
    assert list(joined.values()) == texts


def test_the_cut_of_one_file_is_that_of_nanogpt():
    sides = split([Document("shakespeare", "x" * 1115394)])
    assert len(sides["train"][0]) == 1003854 == int(1115394 * 0.9)
    assert len(split([Document("ten", "0123456789")], 0.9)["train"][0]) == 1  # not 0, as 10 * (1 - 0.9) would give


def test_hash_split_stays_when_documents_are_added_or_moved():
    docs = documents([f"story {i}" for i in range(300)])
    before, after = split(docs), split(docs[::-1] + documents([f"tale {i}" for i in range(200)]))
    assert set(before["validation"]) < set(after["validation"])
    assert set(before["train"]) < set(after["train"])
    assert 10 < len(before["validation"]) < 60


def test_copies_of_a_document_go_to_one_side():
    sides = split(documents([f"story {i % 150}" for i in range(300)]))
    assert not set(sides["train"]) & set(sides["validation"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"data.validation_fraction={fraction} must lie between"):
        split(documents(["abc"]), fraction)


def test_mark_and_line_ends_are_normalized(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xc3\xa9")
    assert read_text(path) == "one\ntwo\nthree\n\u00e9"


def test_gutenberg_header_and_licence_are_stripped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes((HEADER + "It was a *** START OF something ***\nnew." + LICENCE).replace("\n", "\r\n").encode())
    assert read_text(path, strip_gutenberg=True) == "It was a *** START OF something ***\nnew.\n"
    assert read_text(path).startswith("The Project")
    wrapped = "*** START OF THIS PROJECT GUTENBERG EBOOK OF A\nLONG TITLE ***\nText\n"
    assert without_gutenberg(wrapped) == "Text\n"


def book(name: str, text: str) -> str:
    header = f"The Project Gutenberg eBook of {name}\n\n*** START OF THE PROJECT GUTENBERG EBOOK {name} ***\n\n"
    return f"{header}{text}\n\n*** END OF THE PROJECT GUTENBERG EBOOK {name} ***\nThe licence of {name}.\n"


START, END = "*** START OF THE PROJECT GUTENBERG EBOOK ***\n", "*** END OF THE PROJECT GUTENBERG EBOOK ***\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (book("A", "One.") + book("B", "Two.\n\nMore.") + book("C", "Three."), "One.\n\nTwo.\n\nMore.\n\nThree.\n"),
        (f"One.\n{END}licence\nheader\n{START}Two.\n", "One.\n\nTwo.\n"),  # an end before any start
        (f"header\n{START}One.\nheader\n{START}Two.\n{END}licence\n", "One.\nheader\n\nTwo.\n"),  # an end is missing
        (f"header\n{START}One.\n{END}licence\n{END}licence\n", "One.\n"),
        (f"One.\n{END}licence\n", "One.\n"),
        (f"header\n{START}One.", "One.\n"),
        (f"header\n{START}\n{END}licence\nheader\n{START}Two.\n{END}", "Two.\n"),
    ],
)
def test_of_several_gutenberg_books_in_a_file_each_is_kept(text, kept):
    assert without_gutenberg(text) == kept


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a\n", "\n", "b", "\r\n", "\u00e9", "***", START, END, f"\n{START}", f"\n{END}"]), min_size=1
    )
)
def test_a_large_file_loses_what_a_small_one_does(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes("".join(pieces).encode())
    for size in (4, 50):
        try:
            whole = read_text(path, strip_gutenberg=True)
        except ValueError:
            whole = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "WHOLE_BYTES", 0)
            patch.setattr(formats, "PART_BYTES", size)
            patch.setattr(document, "MARK", 100)
            if whole is None:
                with pytest.raises(ValueError, match="holds no text"):
                    list(read_documents(path, Reading()))
                continue
            parts = list(read_documents(path, Reading()))
            assert "".join(part.text for part in parts) == whole
            assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]


@settings(deadline=None)
@given(st.text())
def test_text_without_gutenberg_lines_is_unchanged(text):
    assert without_gutenberg(text) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.txt holds no text"),
        (b" \n\t\n", "bad.txt holds no text"),
        (HEADER.encode() + LICENCE.encode(), "bad.txt holds no text"),
        (b"ab\0c", "bad.txt is binary: byte 2 is NUL"),
        ("text".encode("utf-16"), "bad.txt is binary: .*UTF-16"),
        (b"one\r\ntwo\nth\xffree", r"bad.txt is not UTF-8: byte 11 \(0xff, line 3\)"),
        (b"\xef\xbb\xbfa\xe9", r"bad.txt is not UTF-8: byte 4 \(0xe9, line 1\)"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Files(str(path)).documents())


def test_globs_are_sorted_recursive_and_know_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["a.txt", "b/c.txt", "b/d/e.txt", "f[1].txt", "z.md"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [doc.text for doc in Files("~/**/*.txt").documents()] == names[:4]
    assert [doc.text for doc in Files("~/**").documents()] == names  # folders that match are passed over
    assert [doc.text for doc in Files(["~/z.md", f"{tmp_path}/f[1].txt"]).documents()] == ["z.md", "f[1].txt"]


def test_bad_names_are_refused_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    for files, message in [
        ([], "data.files is empty"),
        ("missing.txt", f"data.files='missing.txt': there is no such file here in {tmp_path}"),
        ("*.md", r"data.files='\*.md' matches no file"),
        (".", r"data.files='.' is a folder; .*/\*\*/\*.txt'"),
        (["a.txt", "a.txt"], "data.files: a.txt is named twice, by 'a.txt' and 'a.txt'"),
        ("*.txt", r"data.files: link.txt is named twice, by '\*.txt' and '\*.txt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Files(files).paths()


@pytest.mark.parametrize("pack", [None, gzip.compress])
def test_a_link_is_read_by_its_own_name(tmp_path, monkeypatch, pack):
    """As in the cache of a hub, where names are links to files called by their hash."""
    (tmp_path / "blobs").mkdir()
    content = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "blobs/0f3a").write_bytes(pack(content) if pack else content)
    link = tmp_path / f"train.jsonl{'.gz' if pack else ''}"
    link.symlink_to("blobs/0f3a")
    monkeypatch.chdir(tmp_path)
    source = Files("train*")
    assert source.paths() == [link]
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert [file.place for file in text_files("train*")] == [str(link)]
    with pytest.raises(ValueError, match="named twice"):
        text_files(["train*", "blobs/*"])
    with pytest.raises(ValueError, match="is validation text, and the same as"):
        refuse_overlap(text_files("train*"), "blobs/*", Files("blobs/*").paths())


def test_a_file_that_vanishes_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*gone.txt: No such file"):
        read_text(Path(tmp_path / "gone.txt"))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (("data.files={}",), "data.files"),
        (("data.files=there.txt", "data.validation_files={}"), "data.validation_files"),
        (("data.files=there.txt", "tokenizer=char", "tokenizer.files={}"), "tokenizer.files"),
        (("data.mix={{pydocs: 1, own: {{files: '{}'}}}}",), "data.mix.own.files"),
        (("data.mix={{own: {{files: there.txt, validation_files: '{}'}}}}",), "data.mix.own.validation_files"),
        (("data=stream", "data.files={}", "data.validation_files=there.txt"), "data.files"),
        (("data=stream", "data.files=there.txt", "data.validation_files={}"), "data.validation_files"),
    ],
)
@pytest.mark.parametrize("files", ["gone.txt", "*.gone", "memory://gone/*.txt", "."])
def test_what_is_wrong_with_files_is_said_of_the_key_that_names_them(tmp_path, monkeypatch, given, key, files):
    (tmp_path / "there.txt").write_text("one\ntwo\n")
    monkeypatch.setenv("GPTLAB_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}={re.escape(repr(files))}[: ]"):
        assembly.data_module(compose(*SMALL, *(word.format(files) for word in given))).prepare_data()


def test_a_glob_means_the_same_in_a_folder_whose_name_is_one(tmp_path, monkeypatch):
    folder = tmp_path / "run [1] of *"
    folder.mkdir()
    (tmp_path / "run 1 of 2").mkdir()  # which the name would match
    for name in ("a.txt", "b.txt", "draft[2].txt", "draft2.txt"):
        (folder / name).write_text(name)
        (tmp_path / "run 1 of 2" / name).write_text("another")
    monkeypatch.chdir(folder)
    given = {
        "*.txt": ["a.txt", "b.txt", "draft2.txt", "draft[2].txt"],
        "draft[2].txt": ["draft[2].txt"],
        "a.txt": ["a.txt"],
    }
    given |= {"./[ab].txt": ["a.txt", "b.txt"], f"{glob.escape(str(folder))}/[a].txt": ["a.txt"]}
    for pattern, names in given.items():
        own = f"files: ['{pattern}'], validation_files: '{pattern}'"
        options = (f"data.mix={{own: {{{own}}}}}", "tokenizer=char", f"tokenizer.files='{pattern}'")
        cfg = absolute_paths(compose(*SMALL, *options, f"data.tokens='{pattern}'"))
        node = cfg["data"]["mix"]["own"]
        for files in (node["files"], node["validation_files"], cfg["tokenizer"]["files"], cfg["data"]["tokens"]):
            assert Files(files).paths() == [folder / name for name in names]
            monkeypatch.chdir(tmp_path)
            assert Files(files).paths() == [folder / name for name in names], "and from another folder"
            monkeypatch.chdir(folder)
    cfg = absolute_paths(
        compose("data=code", "data.source.folders=['src*']", "tokenizer.path='tok*'", "init_from='r*'")
    )
    assert cfg["data"]["source"]["folders"] == [f"{folder}/src*"], "what is no glob is left alone"
    monkeypatch.setenv("HOME", str(folder))
    assert Files(absolute_paths(compose("data.files='~/a*.txt'"))["data"]["files"]).paths() == [folder / "a.txt"]
    (tmp_path / "run 1 of 2/gone.txt").write_text("another")
    with pytest.raises(ValueError, match="no file"):
        Files(absolute_paths(compose("data.files=gone.txt"))["data"]["files"]).paths()
    assert (cfg["tokenizer"]["path"], cfg["init_from"]) == (f"{folder}/tok*", f"{folder}/r*")
