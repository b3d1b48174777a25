"""Whether data is fit to train on: what is wrong with text, tokenizer and tokens, and what to do about it."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from tqdm import tqdm

from gptlab.callbacks.watching import Alerts
from gptlab.data.checking import require_known
from gptlab.data.corpus import Source
from gptlab.data.document import Document, UnreadableText
from gptlab.data.encoding import SIDES
from gptlab.data.ids import faults_of, prepared_folder, ready
from gptlab.data.mixed import MixedDataModule
from gptlab.data.mixture import Mixture
from gptlab.data.module import TextDataModule, validation_source
from gptlab.data.overlap import GRAM, overlap
from gptlab.data.shards import Shard, open_shards
from gptlab.data.survey import Survey, documents_of, survey_ids, survey_text
from gptlab.data.tokenized import TokenizedDataModule
from gptlab.data.tokens import TokenFile
from gptlab.data.windows import windows_in
from gptlab.prepare import stored_report
from gptlab.tokenizer import EOS_ID, Tokenizer

# What is beyond these is a finding.
COPIES = 0.01  # of the documents
SUSPECT = 1e-6  # of the characters
LONG = {"characters": 10_000_000, "tokens": 2_500_000}  # of one document
COVERAGE = 0.99  # of the characters
# Of the held-out runs of 32 tokens, and where those have less than 64 bytes, as characters do. Prose and code have
# 0.003 to 0.01, and 0.03 to 0.13 by bytes, with no document there twice; windows that were split at random, 0.8.
OVERLAP, OVERLAP_OF_SHORT = 0.05, 0.25
SAME_IDS = 0.5  # of documents that are decoded and encoded again
NAMED = 20  # unreadable files, and characters, that are named
PLACES, AROUND = 200, 2**14  # where in ids documents are looked for that are encoded again, and in how many


class Soundness:
    """Judges the data of a module, which has prepared nothing yet.

    `accumulate` are the micro-batches of an optimizer step, for which there must be windows. `report` is the JSON of
    the door: figures are None where they were not found out.
    """

    def __init__(self, data: TextDataModule, accumulate: int):
        self.data, self.accumulate = data, accumulate
        self.findings: list[dict[str, Any]] = []
        names = ("documents", "bytes", "tokens", "coverage", "round_trip", "unknown_tokens", "overlap_32gram")
        self.figures: dict[str, Any] = dict.fromkeys(names) | {"windows": {"train": None, "validation": None}}
        if data.sources:
            self._judge_text()
        else:
            self._judge_ids()

    @property
    def exit_code(self) -> int:
        if any(finding["kind"] == "unreadable" for finding in self.findings):
            return 2
        return 1 if self.findings else 0

    @property
    def report(self) -> dict[str, Any]:
        return {"sound": not self.findings, "findings": self.findings} | self.figures

    def find(self, kind: str, message: str, **details: Any) -> None:
        self.findings.append({"kind": kind, "message": message} | details)

    def _judge_text(self) -> None:
        sources = list(sources_of(self.data))
        try:
            survey = survey_text(with_a_bar(documents_in(sources), sources))
        except (ValueError, OSError) as error:
            for fault in list(unreadable_files(sources)) or [error]:
                of_text = isinstance(fault, UnreadableText)
                place = {"file": str(fault.path), "line": fault.line, "byte": fault.byte} if of_text else {}
                self.find("unreadable", str(fault), **place)
            return
        drawn = all(source.optimum is not None for source in sources)  # copies are chance then
        self._judge_documents(survey, drawn, lambda: (d.name for d in documents_in(sources) if d.ends))
        self.figures["bytes"] = survey.bytes
        try:
            self.data.prepare_data()
        except ValueError as error:  # a vocabulary that is too large for the text, a side without any
            self.find("prepare", str(error))
            return
        self._judge_coverage(survey)
        self._judge_tokens(drawn)
        content = stored_report(self.data, self.data.prepared)
        total = content["total"]
        self.figures["round_trip"] = total["round_trip"]
        self.figures["round_trip_of"] = {"chunks": total["chunks"], "bytes": total["bytes"]}
        if total["round_trip"] < 1 and not content["loses"]:
            self.find(
                "round_trip",
                f"{1 - total['round_trip']:.2%} of {total['chunks']:,} pieces of the text do not come back from their "
                "tokens, and the tokenizer promises that they do: use another, or mend its decode_bytes",
            )

    def _judge_ids(self) -> None:
        data = self.data
        assert isinstance(data, TokenizedDataModule)
        tokenizer = ready(data.build_tokenizer, data.config.tokens)
        shards: list[Shard] = []
        try:
            if not (folder := prepared_folder(data.config.tokens)):
                shards = open_shards(data.config.tokens)
                if data.config.validation_tokens is not None:
                    shards += open_shards(data.config.validation_tokens, "data.validation_tokens")
        except (ValueError, OSError) as error:
            self.find("unreadable", str(error))
            return
        data.again = True
        try:
            data.prepare_data()
            for run in runs_of(data, "train") + runs_of(data, "validation") if folder else []:
                for start, block in run.blocks():
                    require_known(run, start, block, tokenizer.vocab_size)
        except ValueError as error:
            for fault in faults_of(shards, tokenizer) or [str(error)]:
                self.find("tokens", fault)
            return
        runs = runs_of(data, "train") + runs_of(data, "validation")
        self._judge_documents(survey_ids(runs, tokenizer), False, lambda: (name for name, _, _ in documents_of(runs)))
        self.figures["bytes"] = sum(split["bytes"] for split in data.prepared.meta["splits"].values())
        self._judge_tokens(drawn=False)
        documents = sampled_documents(runs)
        same = sum(is_encoded_so(tokenizer, ids) for ids in documents)
        self.figures["round_trip"] = same / len(documents) if documents else None
        self.figures["round_trip_of"] = {"documents": len(documents), "tokens": sum(map(len, documents))}
        if same < SAME_IDS * len(documents):
            self.find(
                "round_trip",
                f"of {len(documents):,} documents only {same:,} get the same ids again when they are decoded and "
                "encoded: another tokenizer made them, or made them in another way; give tokenizer.path that one",
            )

    def _judge_documents(self, survey: Survey, drawn: bool, names: Callable[[], Iterable[str]]) -> None:
        copies, lengths, suspects = survey.copies(names), survey.lengths(), survey.suspects()
        self.figures |= {"documents": survey.documents, "duplicates": copies, "lengths": lengths}
        self.figures |= {"empty_documents": survey.empty_documents, "control_characters": suspects}
        if copies["documents"] > COPIES * survey.documents and not drawn:
            pairs = "; ".join(f"{copy} is {first}" for first, copy in copies["examples"])
            self.find(
                "duplicates",
                f"{copies['documents']:,} of {survey.documents:,} documents are copies of others ({pairs}); "
                "data.deduplicate=exact leaves them out",
            )
        if survey.empty_documents:
            names_of_some = ", ".join(survey.empty)
            self.find("empty", f"{survey.empty_documents:,} documents are empty ({names_of_some}); leave them out")
        if lengths.get("longest", 0) > LONG[survey.unit]:
            self.find(
                "long",
                f"{survey.longest} is one document of {lengths['longest']:,} {survey.unit}; if it holds several, say "
                "what is between them (data.documents=line, or data.separator), and whole ones are held out",
            )
        if sum(one["times"] for one in suspects) > SUSPECT * survey.length:
            form = "{character} ({name}) {times:,} times, first in {first}"
            said = "; ".join(form.format(**one) for one in suspects[:NAMED])
            self.find("control_characters", f"{said}: no characters of text; remove them from the files")

    def _judge_coverage(self, survey: Survey) -> None:
        counts = {chr(code): int(survey.characters[code]) for code in np.flatnonzero(survey.characters).tolist()}
        self.figures["coverage"] = coverage = self.data.tokenizer.coverage(counts)
        if coverage < COVERAGE:
            self.find(
                "coverage",
                f"the vocabulary holds {coverage:.2%} of the characters whole; raise tokenizer.vocab_size or "
                "tokenizer.character_coverage, or train the tokenizer on text like this (tokenizer.files)",
            )

    def _judge_tokens(self, drawn: bool) -> None:
        """The tokens that are there now: unknown ones, windows, and what is on both sides."""
        prepared = self.data.prepared
        splits = prepared.meta["splits"]
        for name in ("tokens", "unknown_tokens"):
            self.figures[name] = sum(split[name] for split in splits.values())
        self.figures |= {"vocab_size": prepared.tokenizer.vocab_size, "tokenizer": prepared.tokenizer.fingerprint}
        shares = {side: split["unknown_tokens"] / split["tokens"] for side, split in splits.items()}
        if max(shares.values()) > Alerts.UNKNOWN_SHARE:
            said = " and ".join(f"{share:.2%} of the {side} tokens" for side, share in shares.items())
            self.find(
                "unknown_tokens",
                f"{said} are <unk>: the tokenizer cannot spell this text; use tokenizer=sentencepiece or byte, or one "
                "that learnt from text like this",
            )
        self._judge_windows()
        found = overlap(runs_of(self.data, "train"), runs_of(self.data, "validation"))
        if found is None:
            return
        self.figures["overlap_32gram"] = found.share
        self.figures["overlap_of"] = {"runs": found.runs, "looked_at": found.looked_at}
        run_bytes = GRAM * sum(split["bytes"] for split in splits.values()) / self.figures["tokens"]
        if found.share > (OVERLAP if run_bytes >= 2 * GRAM else OVERLAP_OF_SHORT) and not drawn:
            example = prepared.tokenizer.decode(found.example)
            self.find(
                "overlap",
                f"{found.share:.1%} of the held-out runs of {GRAM} tokens also stand in the training text, such as "
                f"{example!r}: val/loss will be too low; leave copies out (data.deduplicate=exact or near), or hold "
                "out text of another kind (data.validation_files)",
            )

    def _judge_windows(self) -> None:
        data = self.data
        for side, cut in zip(SIDES, data.cuts, strict=True):
            self.figures["windows"][side] = sum(len(windows_in(run, cut)) for run in runs_of(data, side))
        try:
            data.setup()
            data.order(self.accumulate)
        except ValueError as error:
            self.find("windows", str(error))


def sources_of(data: TextDataModule) -> Iterator[Source]:
    """Of training text, and then of held-out text."""
    configs = data.configs.values() if isinstance(data, MixedDataModule) else [data.config]
    yield from data.sources.values()
    yield from (source for config in configs if (source := validation_source(config)) is not None)


def documents_in(sources: list[Source]) -> Iterator[Document]:
    return chain.from_iterable(source.documents() for source in sources)


def with_a_bar(documents: Iterator[Document], sources: list[Source]) -> Iterator[Document]:
    """The documents; how much of their files was read is shown on a terminal."""
    hidden = not sys.stderr.isatty()
    bar = tqdm(unit="B", unit_scale=True, desc="text", delay=1, leave=False, disable=hidden)
    before = sum(source.bytes_read for source in sources)
    with bar:
        for document in documents:
            yield document
            bar.update(sum(source.bytes_read for source in sources) - before - bar.n)


def unreadable_files(sources: list[Source]) -> Iterator[Exception]:
    """What is wrong with each file that cannot be read; none where something else was the matter."""
    found = 0
    for source in sources:
        try:
            paths = source.paths()
        except (ValueError, OSError) as error:
            yield error
            continue
        for path in paths:
            try:
                for _ in source.read(path):
                    pass
            except (ValueError, OSError) as error:
                yield error
                if (found := found + 1) == NAMED:
                    return


def runs_of(data: TextDataModule, side: str) -> list[TokenFile]:
    prepared = data.prepared
    parts = prepared.parts.values() if isinstance(prepared, Mixture) else [prepared]
    return [run for part in parts for run in getattr(part, side).parts]


def sampled_documents(runs: list[TokenFile]) -> list[np.ndarray]:
    """Ids of whole documents, without their ends, of PLACES places far apart; where they are short enough."""
    found = []
    total = sum(map(len, runs))
    for place in range(0, total, max(1, total // PLACES)):
        for run in runs:
            if place < len(run):
                break
            place -= len(run)
        ids = next((block for _, block in run.blocks(place, min(place + AROUND, len(run)))), np.zeros(0, dtype=int))
        ends = np.flatnonzero(ids == EOS_ID)
        if len(ends) > 1 and ends[1] > ends[0] + 1:
            found.append(ids[ends[0] + 1 : ends[1]].astype(np.int64))
    return found


def is_encoded_so(tokenizer: Tokenizer, ids: np.ndarray) -> bool:
    return np.array_equal(tokenizer.encode(tokenizer.decode_bytes(ids)), ids)
