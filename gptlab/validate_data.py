"""The door `python -m gptlab.validate_data`: is this text, with this tokenizer, fit to train on?"""

from gptlab import start

if __name__ == "__main__":
    start.begin("validate_data")  # before the imports, which take seconds

import json
from typing import Any

from rich.table import Table

from gptlab import assembly, checks, config, doors
from gptlab.inherit import before_training
from gptlab.soundness import Soundness

TABLE = {
    "documents": "{:,}",
    "bytes": "{:,}",
    "tokens": "{:,}",
    "coverage": "{:.4%}",
    "round_trip": "{:.2%}",
    "unknown_tokens": "{:,}",
    "overlap_32gram": "{:.3%}",
}


def validate_data(cfg: dict[str, Any], overridden: dict[str, str], name: str) -> int:
    """Say what is wrong with the data that a run with this config would train on; 0 sound, 1 findings, 2 unreadable."""
    cfg, tokenizer = before_training(config.absolute_paths(cfg), overridden)
    if faults := checks.model_faults(cfg):
        raise ValueError("; ".join(faults))
    if cfg["data"]["stream"] is not None:
        raise ValueError(
            "a stream's text is looked at as it is read, while training: give this door the text, or a part of it, as "
            "data.files without data=stream or data=litdata"
        )
    with doors.json_alone(cfg["json"]):
        judged = Soundness(assembly.data_module(cfg, tokenizer), cfg["trainer"]["accumulate_grad_batches"])
    if cfg["json"]:
        doors.say(json.dumps(judged.report, ensure_ascii=False, allow_nan=False))
    elif judged.exit_code == doors.BAD_INPUT:
        doors.fail("\n".join(finding["message"] for finding in judged.findings))
    else:
        show(judged.report)
    return judged.exit_code


def show(report: dict[str, Any]) -> None:
    """The figures as a table, and each finding with its remedy."""
    table = Table()
    table.add_column("")
    table.add_column("found", justify="right")
    for key, form in TABLE.items():
        if report[key] is not None:
            table.add_row(key.replace("_", " "), form.format(report[key]))
    if report["windows"]["train"] is not None:
        table.add_row("windows", "{train:,} train, {validation:,} validation".format(**report["windows"]))
    if "longest" in (lengths := report.get("lengths", {})):
        table.add_row("length of documents", "{shortest:,} to {longest:,} {unit}, median {median:,}".format(**lengths))
    if table.row_count:
        doors.show(table)
    for finding in report["findings"]:
        doors.say(f"{finding['kind']}: {finding['message']}")
    count = len(report["findings"])
    doors.say("sound" if not count else f"{count} finding{'s' * (count > 1)}")


def main() -> None:
    doors.hydra_door("validate_data", validate_data)


if __name__ == "__main__":
    main()
