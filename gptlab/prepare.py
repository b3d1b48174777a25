"""The door `python -m gptlab.prepare`: text becomes a tokenizer and token files, and a table says what they hold."""

from gptlab import start

if __name__ == "__main__":
    start.begin("prepare")  # before the imports, which take seconds

from typing import Any

from rich.table import Table

from gptlab import assembly, checks, doors
from gptlab.data.windows import report


def prepare(cfg: dict[str, Any], overridden: dict[str, str], name: str) -> int:
    """Prepare the data that a run with this config would train on, and print what it is."""
    cfg = assembly.absolute_paths(cfg)
    if faults := checks.model_faults(cfg):
        raise ValueError("; ".join(faults))
    data = assembly.build_data(cfg)
    prepared = data.prepared
    assert prepared is not None
    rows = report(prepared, data.block_size, data.stride)
    rule = {"tail": "the tail of each document", "hash": "a hash of the document", "source": "data.validation_files"}
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
        table.add_row(key.replace("_", " "), *(form.format(row[key]) for row in rows.values()))
    doors.show(table)
    doors.say(
        f"windows of {data.block_size} tokens, {data.stride} apart in training and {data.block_size} in validation"
    )
    doors.say(f"tokens: {prepared.folder}")
    return 0


def main() -> None:
    doors.hydra_door("prepare", prepare)


if __name__ == "__main__":
    main()
