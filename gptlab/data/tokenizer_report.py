"""What a tokenizer makes of a text: figures by source, longest pieces, what it loses, examples; as JSON and as HTML.

All figures are of a sample of whole chunks, kept to a budget of bytes and the same each time; the report says how much.
"""

import html as markup
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gptlab.chunks import CHUNK_CHARACTERS, chunks, sample, size
from gptlab.data.corpus import Source
from gptlab.tokenizer import UNK_ID, Tokenizer
from gptlab.vocabulary import readable

FORMAT = 1  # to be raised whenever the report holds other things
MAX_BYTES = 8_000_000  # of text, all sources together
SEED = 0
LISTED = 20  # pieces, and characters, that are named
EXAMPLES, EXAMPLE_CHARACTERS = 6, 240
MANY_SOURCES = 12  # from here on files are taken together


def texts_by_source(sources: Mapping[str, Source]) -> dict[str, Iterator[str]]:
    """The texts of several sources by their names; of one, by name of file.

    Where files are many, they are taken by folder; and where those are many too, or there are none, all as one.
    """
    if len(sources) > 1:
        return {name: (document.text for document in source.documents()) for name, source in sources.items()}
    (source,) = sources.values()
    if not (paths := source.paths()):
        return {"text": (document.text for document in source.documents())}
    names = [[path.name for path in paths], [path.parent.name for path in paths], ["all files"] * len(paths)]
    chosen = next(row for row in names if len(set(row)) < MANY_SOURCES)
    groups: dict[str, list[Path]] = {}
    for name, path in zip(chosen, paths, strict=True):
        groups.setdefault(name, []).append(path)
    return {name: _texts(source, group) for name, group in groups.items()}


def _texts(source: Source, paths: list[Path]) -> Iterator[str]:
    return (document.text for path in paths for document in source.read(path))


def tokenizer_report(
    tokenizer: Tokenizer, texts_by_source: Mapping[str, Iterable[str]], max_bytes: int = MAX_BYTES
) -> dict:
    """The report of `tokenizer` on at most about `max_bytes` of the texts, in plain types; they are read once."""
    kinds = [tokenizer.kind(i) for i in range(tokenizer.vocab_size)]
    share = max_bytes // max(len(texts_by_source), 1)
    measures, examples = {}, []
    for name, texts in texts_by_source.items():
        kept = sample((chunk for text in texts for chunk in chunks(text) if chunk), share, SEED)
        measures[name] = _Measure(tokenizer, kinds).add(kept)
        if kept and len(examples) < EXAMPLES:
            examples.append(_example(tokenizer, name, kept[len(kept) // 2]))
    total = sum(measures.values(), _Measure(tokenizer, kinds))
    return {
        "format": FORMAT,
        "kind": type(tokenizer).__qualname__,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "kinds": dict(Counter(kinds)),
        "loses": tokenizer.loses,
        "total": total.figures(),
        "vocabulary_used": float((total.used > 0).sum() / tokenizer.vocab_size),
        "sources": {name: measure.figures() for name, measure in measures.items()},
        "not_native": total.not_native(),
        "longest_pieces": _longest(tokenizer, kinds),
        "examples": examples,
    }


class _Measure:
    """Counts of one source; two of them add up."""

    def __init__(self, tokenizer: Tokenizer, kinds: list[str]):
        self.tokenizer, self.kinds = tokenizer, kinds
        self.chunks = self.exact = self.bytes = self.native = 0
        self.characters: Counter[str] = Counter()
        self.used = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # how often each id occurs

    def add(self, parts: list[str]) -> "_Measure":
        for part in parts:
            ids = self.tokenizer.encode(part)
            self.used += np.bincount(ids, minlength=self.used.size)
            self.native += len(self.tokenizer.decode(ids[~np.isin(ids, list(self.tokenizer.spelling_ids))]))
            self.chunks += 1
            self.exact += self.tokenizer.decode(ids) == part
            self.bytes += size(part)
            self.characters.update(part)
        return self

    def __add__(self, other: "_Measure") -> "_Measure":
        both = _Measure(self.tokenizer, self.kinds)
        for name in ("chunks", "exact", "bytes", "native", "characters", "used"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def figures(self) -> dict:
        tokens = int(self.used.sum())
        return {
            "bytes": self.bytes,
            "chunks": self.chunks,
            "tokens": tokens,
            "bytes_per_token": self.bytes / tokens if tokens else None,
            "native_coverage": self.native / self.characters.total() if self.chunks else None,
            "unknown_tokens": int(self.used[UNK_ID]),
            "byte_tokens": int(self.used[[kind == "byte" for kind in self.kinds]].sum()),
            "round_trip": self.exact / self.chunks if self.chunks else None,
        }

    def not_native(self) -> list[dict]:
        """The most frequent characters that the vocabulary does not hold whole."""
        missing = [(n, c) for c, n in self.characters.items() if not self.tokenizer.coverage({c: 1})]
        most = sorted(missing, key=lambda item: (-item[0], item[1]))[:LISTED]
        return [{"character": readable(c.encode("utf-8", "replace")), "times": n} for n, c in most]


def _longest(tokenizer: Tokenizer, kinds: list[str]) -> list[dict]:
    content = {i: tokenizer.decode_bytes([i]) for i, kind in enumerate(kinds) if kind in ("piece", "domain")}
    longest = sorted(content, key=lambda i: (-len(content[i]), i))[:LISTED]
    return [{"piece": readable(content[i]), "bytes": len(content[i]), "id": i} for i in longest]


def _example(tokenizer: Tokenizer, name: str, chunk: str) -> dict:
    text = chunk[:EXAMPLE_CHARACTERS]
    ids = tokenizer.encode(text).tolist()
    pieces = [readable(tokenizer.decode_bytes([i])) or tokenizer.special_tokens[i] for i in ids]
    return {"source": name, "text": text, "ids": ids, "pieces": pieces, "kinds": [tokenizer.kind(i) for i in ids]}


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --rule: #b5b5b5; --one: #dcebff; --two: #fdf0c8;
  --odd: #ffd9d5; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #161618; --rule: #55555a; --one: #1d3a5f;
  --two: #4a3d10; --odd: #6b2320; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
.columns { display: flex; flex-wrap: wrap; gap: 0 4rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .75rem; text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
code, .pieces { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.pieces { line-height: 2; list-style: none; padding: 0; }
.pieces li { display: inline; padding: .15rem .1rem; border-radius: .2rem; background: var(--one); }
.pieces li:nth-child(even) { background: var(--two); }
.pieces li.byte, .pieces li.special { background: var(--odd); text-decoration: underline dotted; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--rule); padding-left: .75rem; }
"""
COLUMNS = {
    "bytes": "{:,}",
    "tokens": "{:,}",
    "bytes_per_token": "{:.3f}",
    "native_coverage": "{:.4%}",
    "unknown_tokens": "{:,}",
    "byte_tokens": "{:,}",
    "round_trip": "{:.2%}",
}


def html(report: dict) -> str:
    """The report as one page that needs no other file."""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in report["kinds"].items())
    kept = report["loses"] or "nothing: text comes back exactly"
    body = [
        f"<h1>Tokenizer of {report['vocab_size']:,} tokens</h1>",
        f"<p><code>{_safe(report['kind'])}</code>, fingerprint <code>{_safe(report['fingerprint'][:16])}</code>: "
        f"{kinds}. What it loses: {_safe(kept)}.</p>",
        f"<p>Figures are of a sample of {report['total']['bytes']:,} bytes, in chunks of up to {CHUNK_CHARACTERS:,} "
        f"characters. {report['vocabulary_used']:.1%} of the vocabulary occurs in it. Native coverage is the share of "
        "characters that the vocabulary holds whole; round trip is the share of chunks that come back exactly.</p>",
        "<h2>By source</h2>",
        _by_source(report),
        "<h2>Examples</h2>",
        "<p>A space is written \u2423. Underlined tokens are bytes of a character, or unknown.</p>",
        *(_example_html(example) for example in report["examples"]),
        '<div class="columns"><section>\n<h2>Longest pieces</h2>',
        _table(["piece", "bytes", "id"], [list(map(str, row.values())) for row in report["longest_pieces"]]),
        "</section>\n<section>\n<h2>Characters outside the vocabulary</h2>",
        _table(["character", "times"], [[row["character"], f"{row['times']:,}"] for row in report["not_native"]])
        if report["not_native"]
        else "<p>None in the sample.</p>",
        "</section></div>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Tokenizer report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _safe(text: str) -> str:
    return markup.escape(text)


def _by_source(report: dict) -> str:
    sources = dict(report["sources"]) | ({"all": report["total"]} if len(report["sources"]) > 1 else {})
    rows = [[name, *(_shown(form, figures[key]) for key, form in COLUMNS.items())] for name, figures in sources.items()]
    return _table(["source", *(key.replace("_", " ") for key in COLUMNS)], rows)


def _shown(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in header)
    lines = [
        f'<tr><th scope="row">{_safe(first)}</th>{"".join(f"<td>{_safe(value)}</td>" for value in others)}</tr>'
        for first, *others in rows
    ]
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="by {_safe(header[0])}">{table}</div>'


def _example_html(example: dict) -> str:
    pieces = "".join(
        f'<li class="{_safe(kind)}" title="{i}">{_safe(piece)}</li>'
        for i, piece, kind in zip(example["ids"], example["pieces"], example["kinds"], strict=True)
    )
    return (
        f"<h3>{_safe(example['source'])}: {len(example['ids'])} tokens</h3>\n<pre>{_safe(example['text'])}</pre>\n"
        f'<ul class="pieces">{pieces}</ul>'
    )
