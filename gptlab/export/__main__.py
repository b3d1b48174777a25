"""The door `python -m gptlab.export RUN OUT`: a trained model as a folder or file that other programs load."""

from gptlab import flags, options

if __name__ == "__main__":
    ARGUMENTS = flags.begin(options.export())  # before the imports, which take seconds

import argparse
import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from gptlab import __version__, bundle, loading
from gptlab.architectures import CLASSES, model_type
from gptlab.export import facts, folder, gguf
from gptlab.files import sync
from gptlab.loading import Loaded
from gptlab.run import process_is_alive


def main(arguments: argparse.Namespace) -> int:
    _, known = options.EXPORTS[arguments.format]
    if arguments.dtype not in (None, *known):
        raise ValueError(
            f"--dtype {arguments.dtype} is none of {', '.join(known)}, which --format {arguments.format} has"
        )
    out = Path(arguments.out).expanduser().absolute()
    require_free(out, is_file=arguments.format == "gguf")
    (gguf.library if arguments.format == "gguf" else folder.library)()
    loaded = loading.load(arguments.run, arguments.checkpoint, tuple(arguments.trust))
    write = write_gguf if arguments.format == "gguf" else write_folder
    with beside(out) as temporary:
        said = write(temporary, loaded, arguments)
    print(f"{CLASSES[model_type(loaded.model.config)]}, {size_of(out) / 1e6:.1f} MB; {said}\nexported: {out}")
    return flags.DONE


def write_folder(path: Path, loaded: Loaded, arguments: argparse.Namespace) -> str:
    dtype = folder.TYPES[arguments.dtype] if arguments.dtype else None
    folder.write(path, loaded.model, loaded.tokenizer, dtype, __version__, Path(arguments.out).name)
    difference = folder.check(path, loaded.model, loaded.tokenizer, dtype)
    if arguments.format == "bundle":
        bundle.write(path, facts.facts(loaded))
        loading.load(path)  # verified as it will be
    return f"loaded by transformers with the same ids, and logits that differ by at most {difference:.1g}"


def write_gguf(path: Path, loaded: Loaded, arguments: argparse.Namespace) -> str:
    gguf.write(path, loaded.model, loaded.tokenizer, arguments.dtype or "f32", Path(arguments.out).stem)
    return f"{arguments.dtype or 'f32'}, read again with the same weights"


def require_free(out: Path, is_file: bool) -> None:
    """Raise ValueError where something is there that would be lost or mixed up."""
    if out.exists() and (is_file or not out.is_dir()):
        raise ValueError(f"OUT={out} exists; choose another name")
    if out.is_dir() and (held := sorted(path.name for path in out.iterdir())):
        raise ValueError(f"OUT={out} is not empty (it holds {', '.join(held[:3])}); choose another folder")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A path to be filled, which becomes `out` when all of it is on the disk, or is removed if anything fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp.{os.getpid()}")
    for left in out.parent.glob(".*.tmp.*"):  # by an export that was killed
        found = re.fullmatch(rf"\.{re.escape(out.name)}\.tmp\.(\d+)", left.name)
        if found and not process_is_alive(int(found[1])):
            remove(left)
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            sync(path)
        os.rename(temporary, out)  # in the place of an empty folder too
        sync(out.parent)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())


if __name__ == "__main__":
    flags.end(main, ARGUMENTS)
