"""What can be asked of an evaluation, each with the options that it takes."""

import logging
import os
from argparse import Namespace
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from gptlab.data.formats import Reading
from gptlab.data.module import TextDataModule
from gptlab.evaluate import held_out
from gptlab.evaluate.pairs import read_pairs, scored_pairs
from gptlab.evaluate.quality import excerpts, quality, training_text
from gptlab.evaluate.subject import Subject
from gptlab.evaluate.writing import written
from gptlab.sampling import Sampling

log = logging.getLogger("gptlab")

BATCH_SIZE = 16  # where no training says another
SAMPLE_TOKENS = 128
FIGURES = ("split", "documents", "tokens", "bytes", "unknown_tokens")
FIGURES += ("loss", "perplexity", "bits_per_byte", "accuracy", "by_source")
EXCESS = ("floor_bits_per_byte", "excess_bits_per_byte", "excess_interval")


@cache
def data_of(subject: Subject) -> TextDataModule:
    """The run's own data, made once."""
    return subject.data()


def batch_size(subject: Subject, arguments: Namespace) -> int:
    return arguments.batch_size or subject.setting("batch_size", BATCH_SIZE)


def reading(subject: Subject, arguments: Namespace) -> Reading:
    """How files become documents: as is said, or else as in training."""
    names = ("documents", "separator", "field", "strip_gutenberg")
    own = {name: subject.setting(name, getattr(Reading, name)) for name in names}
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    if given.get("documents") not in (None, "separator", "auto"):
        own["separator"] = None  # of training's documents
    return Reading(**own | given)


def text(subject: Subject, arguments: Namespace) -> held_out.Text:
    """The files that are named, or else the run's own split. Raises ValueError in the words of this door."""
    size = batch_size(subject, arguments)
    if not arguments.files:
        return held_out.of_run(data_of(subject), arguments.batch_size)
    try:
        return held_out.of_files(
            arguments.files, reading(subject, arguments), subject.tokenizer, subject.block_size, size
        )
    except ValueError as error:
        said = str(error)
        for name in ("files", "documents", "separator", "field"):
            said = said.replace(f"data.{name}", f"--{name}")
        raise ValueError(said) from error


def scored(subject: Subject, arguments: Namespace) -> dict[str, Any]:
    """The loss and what follows from it; null where only something else is asked for, and no files are named."""
    found: dict[str, Any] = dict.fromkeys((*FIGURES, *EXCESS, "recorded_loss"))
    only_else = arguments.pairs or arguments.harness or (arguments.samples and subject.origin.config is None)
    if not arguments.files and only_else:
        return found
    found |= held_out.scored_text(subject, text(subject, arguments))
    if not arguments.files:
        found |= held_out.floor_of(subject, data_of(subject))
        found["recorded_loss"] = subject.origin.validation.get("val/loss")
    return found


def answered(subject: Subject, arguments: Namespace) -> dict[str, Any]:
    """What comes of `--pairs`."""
    pairs, size = read_pairs(Path(arguments.pairs)), batch_size(subject, arguments)
    return scored_pairs(pairs, subject.scorer, subject.loaded, arguments.max_tokens, arguments.stop, size)


def sampled(subject: Subject, arguments: Namespace) -> dict[str, Any]:
    """What comes of `--samples`: texts from the start of a document on, their figures, and those of held-out text."""
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    most, size = arguments.max_tokens or SAMPLE_TOKENS, batch_size(subject, arguments)
    files, training = texts_beside(subject, arguments)
    texts = written(subject.loaded, [subject.loaded.prompt_ids("")] * arguments.samples, most, sampling, [], size)
    groups = {"written": [text for text, _ in texts]}
    if files:
        groups["held_out"] = excerpts(files, subject.tokenizer, arguments.samples, most)
    figures = quality(groups, training)
    return {
        **vars(sampling),
        "max_tokens": most,
        "ended": sum(ends for _, ends in texts) / len(texts),
        "written": figures["written"],
        "held_out": figures.get("held_out"),
        "texts": groups["written"],
    }


def texts_beside(subject: Subject, arguments: Namespace) -> tuple[list[Any], Any]:
    """Held-out ids, and the training text: of the run's own data, where it is to be had or nothing else is named."""
    try:
        data = data_of(subject)
    except ValueError as error:
        if subject.origin.config is not None and not arguments.files:
            raise
        log.warning("not compared with the training text: %s", error)
        return (text(subject, arguments).ids if arguments.files else []), None
    parts = getattr(data.prepared, "parts", {"": data.prepared}).values()
    files = [file for part in parts for file in part.train.parts if len(file)]
    if not files:
        log.warning("not compared with the training text, which is read only while training")
    beside = text(subject, arguments).ids
    return beside, training_text(files, subject.tokenizer) if files else None


def of_harness(subject: Subject, arguments: Namespace) -> dict[str, Any]:
    """What comes of `--harness`. With tasks of one's own, nothing is asked of any network."""
    folder = None if arguments.include_path is None else Path(arguments.include_path)
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"--include-path={folder}: no such folder")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.setdefault(name, "1")  # before the harness is imported, or nobody looks
    try:
        from gptlab.evaluate import harness
    except ModuleNotFoundError as error:
        raise ValueError(f'--harness takes lm-evaluation-harness ({error}): pip install "gptlab[harness]"') from error
    tasks = [task for word in arguments.harness.split(",") if (task := word.strip())]
    size = batch_size(subject, arguments)
    return harness.evaluated(subject, tasks, folder, size, arguments.limit, arguments.num_fewshot)
