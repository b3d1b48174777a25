"""The door `python -m gptlab.prepare`: text becomes a tokenizer and token files, and a table says what they hold."""

from gptlab import start

if __name__ == "__main__":
    start.begin("prepare")  # before the imports, which take seconds

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from gptlab import assembly, checks, config, doors
from gptlab.data import tokenizer_report
from gptlab.data.mixture import Mixture
from gptlab.data.module import TextDataModule
from gptlab.data.tokens import Prepared
from gptlab.data.windows import report
from gptlab.inherit import before_training
from gptlab.run import write_json, write_text


def prepare(cfg: dict[str, Any], overridden: dict[str, str], name: str) -> int:
    """Prepare the data that a run with this config would train on, and print what it is."""
    cfg, tokenizer = before_training(config.absolute_paths(cfg), overridden)
    if faults := checks.model_faults(cfg):
        raise ValueError("; ".join(faults))
    data = assembly.build_data(cfg, tokenizer)
    prepared = data.prepared
    assert prepared is not None
    rows = report(prepared.meta["splits"], **data.windows)
    rule = {
        "tail": "the tail of each document",
        "hash": "a hash of the document",
        "source": "data.validation_files",
        "mix": "that of each source",
        "tail of file": "the tail of each file",
        "hash of file": "a hash of the file",
        "tokens": "data.validation_tokens",
    }
    held_out = rule[prepared.meta["split"]["rule"]]
    title = f"{data.tokenizer.vocab_size:,} tokens known; validation is {held_out}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for side in rows:
        table.add_column(side, justify="right")
    for key, form in {
        "documents": "{:,}",
        "bytes": "{:,}",
        "tokens": "{:,}",
        "bytes_per_token": "{:.3f}",
        "coverage": "{:.4%}",
        "unknown_tokens": "{:,}",
        "windows": "{:,}",
        "dropped_tokens": "{:,}",
    }.items():
        cells = ("" if row[key] is None else form.format(row[key]) for row in rows.values())
        table.add_row(key.replace("_", " "), *cells)
    doors.show(table)
    since = " from the beginning of each document on" if data.config.begin == "document" else ""
    apart = f"{data.stride} apart{since} in training and {data.block_size} in validation"
    doors.say(f"windows of {data.block_size} tokens, {apart}")
    if isinstance(prepared, Mixture):
        show_sources(data, prepared)
    if not data.sources:  # ids that stay where they are
        return 0
    show_tokenizer(stored_report(data, prepared))
    doors.say(f"tokenizer: {data.report_folder / 'tokenizer.html'}")
    doors.say(f"tokens: {prepared.folder}")
    return 0


def show_sources(data: TextDataModule, mixture: Mixture) -> None:
    """What each source gives to an epoch, a line each."""
    order = data.order()
    table = Table(title=f"an epoch has {order.count:,} windows", title_justify="left")
    for column in ("", "weight", "share", "windows", "of its own", "passes"):
        table.add_column(column, justify="right" if column else "left")
    for name, own, quota in zip(order.names, order.counts, order.quotas, strict=True):
        figures = (
            f"{mixture.weights[name]:g}",
            f"{quota / order.count:.1%}",
            f"{quota:,}",
            f"{own:,}",
            f"{quota / own:.2f}",
        )
        table.add_row(Text(name), *figures)
    doors.show(table)


def stored_report(data: TextDataModule, prepared: Prepared | Mixture) -> dict[str, Any]:
    """The report on the tokenizer that stands beside its tokens, made and put there if there is none."""
    path = data.report_folder / "tokenizer_report.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == tokenizer_report.FORMAT and path.with_name("tokenizer.html").is_file():
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    texts = tokenizer_report.texts_by_source(data.sources)
    content = tokenizer_report.tokenizer_report(prepared.tokenizer, texts)
    write_text(path.with_name("tokenizer.html"), tokenizer_report.html(content))
    write_json(path, content)
    return content


def show_tokenizer(content: dict[str, Any]) -> None:
    """The main figures of the report, a line for each source."""
    total = content["total"]
    doors.say(f"the tokenizer on {total['bytes']:,} bytes of it; it loses {content['loses'] or 'nothing'}")
    table = Table()
    table.add_column("")
    columns = {key: form for key, form in tokenizer_report.COLUMNS.items() if key not in ("bytes", "tokens")}
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right")
    rows = content["sources"] | ({"all": total} if len(content["sources"]) > 1 else {})
    for name, figures in rows.items():
        cells = ("" if figures[key] is None else form.format(figures[key]) for key, form in columns.items())
        table.add_row(Text(name), *cells)
    doors.show(table)
    if longest := content["longest_pieces"][:6]:
        doors.say("longest pieces: " + "  ".join(row["piece"][:40] for row in longest))


def main() -> None:
    doors.hydra_door("prepare", prepare)


if __name__ == "__main__":
    main()
