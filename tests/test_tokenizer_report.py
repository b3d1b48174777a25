"""The tokenizer report: its figures are those of a count by hand, and its page shows any text as text."""

import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from kinds import DOCUMENTS, LOSSY, of_kind
from kinds import train as train_tokenizer

from gptlab.chunks import size
from gptlab.data.corpus import Files
from gptlab.data.tokenizer_report import MANY_SOURCES, STYLE, html, texts_by_source, tokenizer_report
from gptlab.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer


def test_figures_are_those_of_a_count_by_hand():
    report = tokenizer_report(CharTokenizer("ab "), {"one": ["aab", "x a"], "two": ["bb" * 10]})
    one = {"bytes": 6, "chunks": 2, "tokens": 6, "bytes_per_token": 1.0, "native_coverage": 5 / 6}
    one |= {"unknown_tokens": 1, "byte_tokens": 0, "round_trip": 0.5}
    assert report["sources"]["one"] == one
    assert report["sources"]["two"]["round_trip"] == 1
    assert report["total"]["bytes"] == 26
    assert report["total"]["native_coverage"] == 25 / 26
    assert report["total"]["round_trip"] == 2 / 3
    assert report["vocabulary_used"] == 4 / 16
    assert report["kinds"] == {"special": 13, "piece": 3}
    assert report["not_native"] == [{"character": "x", "times": 1}]
    assert report["loses"] == CharTokenizer.loses
    example = report["examples"][0]
    assert (example["text"], example["pieces"], example["kinds"][0]) == ("x a", ["\ufffd", "\u2423", "a"], "special")


def test_bytes_are_counted_and_characters_that_they_spell_named():
    report = tokenizer_report(train_tokenizer("bpe", character_coverage=0.9999), {"": ["def \u0416\u0416\u0417"]})
    assert report["total"]["byte_tokens"] == 6
    assert report["total"]["unknown_tokens"] == 0
    assert report["total"]["round_trip"] == 1
    assert report["not_native"] == [{"character": "\u0416", "times": 2}, {"character": "\u0417", "times": 1}]
    assert tokenizer_report(ByteTokenizer(), {"": ["\u0416"]})["total"]["byte_tokens"] == 2


@pytest.mark.parametrize("kind", ["bpe", "hf", "foreign", "tiktoken", "domain", *LOSSY])
def test_any_kind_can_be_reported_on(kind):
    tokenizer = of_kind(kind)
    texts = {"code": DOCUMENTS, "other": ["\u4e2d\u6587 \U0001f600"]}
    report = json.loads(json.dumps(tokenizer_report(tokenizer, texts)))
    assert report["sources"]["code"]["round_trip"] == 1
    assert (report["sources"]["other"]["round_trip"] == 1) == (not tokenizer.loses)
    lengths = [row["bytes"] for row in report["longest_pieces"]]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(len(tokenizer.decode_bytes([i])) for i in range(13, tokenizer.vocab_size))
    for example in report["examples"]:
        assert tokenizer.encode(example["text"]).tolist() == example["ids"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte", "char", "hf"])
def test_native_coverage_is_the_one_that_the_tokenizer_gives(kind):
    text = DOCUMENTS[0] + "\u4e2d\u6587\u00e9" * 100
    report = tokenizer_report(of_kind(kind), {"": [text]})
    assert report["total"]["native_coverage"] == pytest.approx(of_kind(kind).coverage(Counter(text)), abs=1e-12)


def test_characters_of_unknown_words_are_not_native():
    report = tokenizer_report(of_kind("word"), {"": ["a unheardof b"]})
    assert report["total"]["native_coverage"] == 4 / 13


def test_a_report_reads_no_more_than_its_budget_and_repeats():
    texts = [f"line {i}\n" * 400 for i in range(200)]
    reports = [tokenizer_report(ByteTokenizer(), {"a": iter(texts), "b": iter(texts[:2])}, 40_000) for _ in range(2)]
    assert reports[0] == reports[1]
    assert 10_000 < reports[0]["sources"]["a"]["bytes"] <= 20_000
    assert reports[0]["sources"]["b"]["bytes"] == sum(map(size, texts[:2]))


def test_a_source_without_text_has_no_ratios():
    report = tokenizer_report(ByteTokenizer(), {"none": [], "some": ["a"]})
    assert report["sources"]["none"]["bytes_per_token"] is report["sources"]["none"]["round_trip"] is None
    assert "none" in html(report)


@pytest.mark.parametrize("n", [1, MANY_SOURCES - 1, MANY_SOURCES])
@pytest.mark.parametrize("folders", [1, MANY_SOURCES])
def test_sources_are_files_or_folders_or_all(tmp_path, n, folders):
    for folder in range(folders):
        (tmp_path / f"folder{folder}").mkdir()
        for i in range(n):
            (tmp_path / f"folder{folder}" / f"{folder}-{i}.txt").write_text(f"{folder}-{i} ")
    texts = {name: list(parts) for name, parts in texts_by_source({"": Files(f"{tmp_path}/*/*.txt")}).items()}
    assert sorted(itertools.chain(*texts.values())) == sorted(f"{f}-{i} " for f in range(folders) for i in range(n))
    if folders * n < MANY_SOURCES:
        assert set(texts) == {f"0-{i}.txt" for i in range(n)}
    else:
        assert set(texts) == ({"folder0"} if folders == 1 else {"all files"})


class Page(HTMLParser):
    """The texts of a page by tag, and whether each tag is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.attributes = [], {}, {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes.setdefault(tag, []).append(dict(attributes))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(text)


def test_the_page_shows_text_as_text_and_needs_nothing_else():
    nasty = "<script>alert('1')</script> & \"quoted\" </style></pre>"
    report = tokenizer_report(of_kind("bpe"), {nasty: [nasty], "plain": DOCUMENTS})
    page = Page(html(report))
    assert page.open == []
    assert page.texts["pre"][0] == nasty
    assert f"{nasty}" in page.texts["th"]
    assert [len(example["pieces"]) for example in report["examples"]] == [
        sum(attributes["title"].isdigit() for attributes in page.attributes["li"][: len(report["examples"][0]["ids"])]),
        len(page.attributes["li"]) - len(report["examples"][0]["ids"]),
    ]
    assert not {"script", "link", "img"} & set(page.attributes)
    assert "url(" not in "".join(page.texts["style"])


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_the_page_can_be_read_in_light_and_dark(side):
    """Every background under the ink has the contrast of 4.5 that WCAG 2 asks for."""
    colours = [
        dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    ]
    ink = luminance(colours[side]["ink"])
    for name in ("paper", "one", "two", "odd"):
        lighter, darker = sorted((ink, luminance(colours[side][name])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, name


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- the door


@pytest.fixture
def prepare_door(text_file, monkeypatch, capsys):
    """`prepare_door(*overrides)` gives the exit code, the output and the message of `python -m gptlab.prepare`."""
    import gptlab.prepare

    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["prepare.py", f"data.files={text_file}", "model.block_size=16", *overrides])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            gptlab.prepare.main()
        output = capsys.readouterr()
        return exit_.value.code, output.out, output.err

    return run


def folder_of(output: str) -> Path:
    return Path(next(line for line in output.splitlines() if line.startswith("tokens: ")).removeprefix("tokens: "))


@pytest.mark.parametrize("word", ["byte", "char", "word", "hf tokenizer.vocab_size=300"])
def test_prepare_prints_and_keeps_the_report(prepare_door, text_file, word):
    code, output, error = prepare_door(*f"tokenizer={word}".split())
    assert (code, error) == (0, "")
    report = json.loads((folder_of(output) / "tokenizer_report.json").read_text())
    assert report["sources"]["text.txt"]["bytes"] == len(text_file.read_bytes())
    assert f"{report['total']['bytes_per_token']:.3f}" in output
    assert (report["loses"] or "it loses nothing").split(":")[0] in output
    page = (folder_of(output) / "tokenizer.html").read_text()
    assert page == html(report)
    assert f"tokenizer: {folder_of(output)}/tokenizer.html" in output


def test_a_report_that_is_there_is_not_made_again_and_a_damaged_one_is(prepare_door, monkeypatch):
    code, output, _ = prepare_door("tokenizer=byte")
    assert code == 0
    path = folder_of(output) / "tokenizer_report.json"
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("gptlab.data.tokenizer_report.tokenizer_report", lambda *_: pytest.fail("made again"))
        assert prepare_door("tokenizer=byte")[:2] == (0, output.split("\n", 1)[1] if "prepared" in output else output)
    for damage in ("{", "{}", "[]", before.replace('"format": 1', '"format": 0')):
        path.write_text(damage)
        assert prepare_door("tokenizer=byte")[0] == 0
        assert path.read_text() == before


# --- tokenizer.files


def test_a_tokenizer_learns_from_other_text_than_the_model(prepare_door, tmp_path):
    (tmp_path / "chat.txt").write_text("xylophone " * 200)
    (tmp_path / "more.txt").write_text("quartz " * 100)
    trained = {}
    for files in ("chat.txt", "[chat.txt,more.txt]", "*.txt", "null"):
        code, output, error = prepare_door("tokenizer=word", f"tokenizer.files={files}")
        assert (code, error) == (0, "")
        trained[files] = load_tokenizer(folder_of(output))
    assert [("xylophone" in t.words, "quartz" in t.words, "the" in t.words) for t in trained.values()] == [
        (True, False, False),
        (True, True, False),
        (True, True, True),
        (False, False, True),
    ]
    (tmp_path / "chat.txt").write_text("marimba " * 200)  # in the same place
    _, output, _ = prepare_door("tokenizer=word", "tokenizer.files=chat.txt")
    assert "marimba" in load_tokenizer(folder_of(output)).words


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "tokenizer=word tokenizer.files=gone.txt",
            ("tokenizer.files='", "gone.txt", "no such file", "check the path"),
        ),
        ("tokenizer=word tokenizer.files=[]", ("tokenizer.files is empty", "name a file")),
        ("tokenizer=word tokenizer.files=[3]", ("tokenizer.files=3", "no path")),
        (
            "tokenizer=word tokenizer.files=text.txt tokenizer.path=x",
            ("tokenizer.files=", "tokenizer.path=", "leave one"),
        ),
        ("tokenizer=byte tokenizer.files=text.txt", ("tokenizer.files",)),
        ("tokenizer=word tokenizer.vocab_size=5", ("tokenizer.vocab_size=5", "17", "raise it")),
        ("tokenizer=hf tokenizer.vocab_size=5", ("tokenizer.vocab_size=5", "269", "raise it")),
        ("tokenizer=hf tokenizer.vocab_size=50000", ("tokenizer.vocab_size=50000", "lower it")),
        ("tokenizer=word tokenizer.domain_tokens=['</s>']", ("tokenizer.domain_tokens=", "</s>", "leave it out")),
        ("tokenizer=word tokenizer.domain_tokens=ACME", ("tokenizer.domain_tokens='ACME'", "[a text]")),
        ("tokenizer=char tokenizer.domain_tokens=[ACME]", ("tokenizer.domain_tokens",)),
        ("tokenizer=tiktoken", ("tokenizer.name=gpt2", "gpt2.tiktoken", 'pip install "gptlab[data]"')),
        ("tokenizer=tiktoken tokenizer.name=gpt9", ("tokenizer.name='gpt9'", "cl100k_base")),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(prepare_door, tmp_path, monkeypatch, overrides, says):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    code, _, error = prepare_door(*overrides.split())
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("error: ") == 1
    assert len(error.splitlines()) <= 15
    for word in says:
        assert word in error


def test_a_run_with_a_parent_keeps_its_tokenizer(train, tmp_path, capsys):
    assert train(tmp_path / "parent", "tokenizer=word", "trainer.max_steps=1") == 0
    for override in ("tokenizer.files=text.txt", "tokenizer.domain_tokens=[ACME]"):
        assert train(tmp_path / "child", "tokenizer=word", f"init_from={tmp_path}/parent", override) == 2
        assert f"contradicts them ({override}):\n{override.split('=')[0]}: the parent has" in capsys.readouterr().err
