"""The figures of an evaluation for a person."""

from typing import Any

from rich.table import Table
from rich.text import Text

from gptlab import doors

FORMS = {
    "tokens": "{:,}",
    "bytes": "{:,}",
    "documents": "{:,}",
    "unknown_tokens": "{:,}",
    "texts": "{:,}",
    "n": "{:,}",
    "accuracy": "{:.2%}",
    "exact_match": "{:.2%}",
    "distinct_1": "{:.1%}",
    "distinct_2": "{:.1%}",
    "distinct_3": "{:.1%}",
    "copied_50_bytes": "{:.2%}",
    "known_words": "{:.2%}",
    "replacement_characters": "{:.3%}",
    "longest_repeat_mean": "{:.1f}",
    "longest_copy_mean": "{:.1f}",
}
PREDICTED = ("tokens", "bytes", "loss", "perplexity", "bits_per_byte", "accuracy")
TEXT = ("documents", "unknown_tokens", *PREDICTED, "floor_bits_per_byte", "excess_bits_per_byte", "recorded_loss")
PAIRS = ("n", *PREDICTED, "exact_match", "bleu", "rouge1", "rouge2", "rougeL")


def show(found: dict[str, Any]) -> None:
    """What was asked for, a table each."""
    doors.say(f"{found['checkpoint']}, step {found['step']:,}" if found["step"] is not None else found["checkpoint"])
    if found["split"] is not None:
        columns("", {found["split"]: found} | (found["by_source"] or {}), TEXT)
    if found["pairs"]:
        columns("", {"completions": found["pairs"]}, PAIRS)
    if (samples := found["samples"]) is not None:
        groups = {"written": samples["written"]} | ({"held out": samples["held_out"]} if samples["held_out"] else {})
        columns(f"samples, {samples['ended']:.0%} of which end by themselves", groups, samples["written"])
    for task, row in (found["harness"] or {}).items():
        columns("", {task: row}, row)


def columns(title: str, groups: dict[str, dict[str, Any]], keys: Any) -> None:
    """A row for each figure that somebody has."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("")
    for name in groups:
        table.add_column(Text(name), justify="right")
    for key in keys:
        if any(group.get(key) is not None for group in groups.values()):
            table.add_row(key.replace("_", " "), *(cell(key, group.get(key)) for group in groups.values()))
    doors.show(table)


def cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    return FORMS.get(key, "{:.4f}" if isinstance(value, float) else "{:,}").format(value)
