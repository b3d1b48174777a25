"""Which files of a text are no longer what they were when its tokens were made."""

import json
from pathlib import Path

from gptlab.data.tokens import Prepared, fingerprint_of


def files_that_differ(prepared: Prepared, fingerprint: str) -> str:
    """Which files are other than when tokens with this fingerprint were made, if those are still in the same cache."""
    now = [(file["path"], file["sha256"]) for files in prepared.meta["files"].values() for file in files]
    for path in prepared.folder.parent.glob("*/meta.json"):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            then = [(file["path"], file["sha256"]) for files in meta["files"].values() for file in files]
            if fingerprint_of(meta) == fingerprint:
                return differences(then, now)
        except (OSError, KeyError, TypeError, AttributeError, ValueError):  # half of one
            continue
    return ""


def differences(then: list[tuple[str, str]], now: list[tuple[str, str]]) -> str:
    """Of files as (path, hash): those that changed, are missing or new. They may have been moved, all of them."""
    old, new = ([sha256 for _, sha256 in side] for side in (then, now))
    lost, found = set(old) - set(new), set(new) - set(old)
    gone, come = ([path for path, sha256 in side if sha256 in odd] for side, odd in ((then, lost), (now, found)))
    changed = [path for path in come if path in gone]
    gone, come = ([path for path in side if path not in changed] for side in (gone, come))
    moved = [path for path in come if [Path(other).name for other in gone].count(Path(path).name) == 1]
    names = {Path(path).name for path in moved}
    kinds = {
        "changed": changed + moved,
        "missing": [path for path in gone if Path(path).name not in names],
        "new": [path for path in come if path not in moved],
    }
    if not lost and not found and old != new:
        return "the files are the same, in another order"
    return "; ".join(f"{kind}: {several(paths)}" for kind, paths in kinds.items() if paths)


def several(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
