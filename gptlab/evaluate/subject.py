"""RUN as something to evaluate: its network, and what its checkpoint tells of the run that it was saved in."""

import logging
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from gptlab import assembly, bundle, checkpoint, checks, cost, loading, resume
from gptlab.data.module import TextDataModule
from gptlab.loading import Loaded
from gptlab.run import RunFolder
from gptlab.scoring import WEIGHTS_IN, Scorer, require_finite
from gptlab.tokenizer import Tokenizer

log = logging.getLogger("gptlab")


@dataclass(frozen=True)
class Origin:
    """What is known of the run that weights are of; of a folder that is no bundle, nothing is."""

    config: dict[str, Any] | None = None
    step: int | None = None
    precision: str | None = None
    fingerprint: str | None = None  # of its data
    validation: dict[str, float] = field(default_factory=dict)  # the figures of its validation at this step, if any

    @property
    def separates_documents(self) -> bool:
        return self.config is not None and self.config["documents"] == "separate"


def origin_of(path: Path) -> Origin:
    """Of a checkpoint, or of an exported folder."""
    if path.is_dir():
        return of_bundle(path / bundle.NAME)
    state = checkpoint.load(path, mapped=True)
    record = state.get("callbacks", {}).get("RunRecord", {})
    history = record.get("history") or [{}]
    is_validated = history[-1].get("step") == state.get("global_step")
    data = next((part for name, part in state.items() if name.endswith("DataModule")), {})
    return Origin(
        config=config_of(path, record.get("config")),
        step=state.get("global_step"),
        precision=(state[checkpoint.OWN_KEY].get("hardware") or {}).get("precision"),
        fingerprint=data.get("fingerprint"),
        validation=record.get("validation", {}) if is_validated else {},
    )


def of_bundle(path: Path) -> Origin:
    """What gptlab.json tells, where there is one."""
    training = bundle.read_json(path).get("training") if path.is_file() else None
    if not isinstance(training, dict):
        return Origin()
    config, hardware = training.get("config"), training.get("hardware")
    return Origin(
        config=None if config is None else resume.parsed_config(yaml.safe_dump(config).encode(), path),
        step=training.get("step"),
        precision=hardware.get("precision") if isinstance(hardware, dict) else None,
        fingerprint=training.get("data_fingerprint"),
    )


def config_of(path: Path, copy: str | None) -> dict[str, Any] | None:
    """The config of the run folder that a checkpoint lies in, or else the copy that it keeps itself."""
    folder = RunFolder(path.absolute().parent.parent)
    if path.absolute().parent == folder.checkpoints and folder.config.is_file():
        return resume.saved_config(folder)
    return None if copy is None else resume.parsed_config(copy.encode(), path)


class Subject:
    """What is evaluated. Raises ValueError where RUN names nothing, or a network whose weights are no numbers."""

    def __init__(self, loaded: Loaded, trust: tuple[str, ...], precision: str):
        if precision != "auto" and precision not in WEIGHTS_IN:
            raise ValueError(f"--precision {precision}: none of auto, {', '.join(WEIGHTS_IN)}")
        require_finite(loaded.model, str(loaded.path))
        self.loaded, self.trust, self.origin = loaded, trust, origin_of(loaded.path)
        self.precision = self._precision(loaded.model.embed.weight.device.type) if precision == "auto" else precision
        self.scorer = Scorer(loaded.model, self.precision, self.origin.separates_documents)

    @classmethod
    def of(cls, arguments: Namespace) -> "Subject":
        """What the command line names."""
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        trust = tuple(arguments.trust)
        loaded = loading.load(arguments.run, arguments.checkpoint, trust, loading.device_of(arguments.device))
        return cls(loaded, trust, arguments.precision)

    def _precision(self, device: str) -> str:
        """That of training, where this device computes in it."""
        own = self.origin.precision
        if own not in WEIGHTS_IN:
            return "32-true"
        if own.startswith("bf16") and not cost.computes_in_bf16(device):
            log.info("trained with trainer.precision=%s, in which this device does not compute: scored in 32-true", own)
            return "32-true"
        return own

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def block_size(self) -> int:
        return self.loaded.model.config.block_size

    def setting(self, name: str, default: Any) -> Any:
        """What the run's config says of `data.<name>`, where there is one."""
        return default if self.origin.config is None else self.origin.config["data"].get(name, default)

    def data(self) -> TextDataModule:
        """The run's own data, its held-out part the one that it was validated on.

        Raises ValueError where that is not to be had, and where it is another by its fingerprint.
        """
        if self.origin.config is None:
            raise ValueError(f"{self.loaded.path} does not say what text it was trained on: name text with --files")
        cfg = self.origin.config | {"trust": list(self.trust)}
        cfg["model"] = cfg["model"] | {"block_size": self.block_size}
        checks.check_targets({"data": cfg["data"]}, self.trust)
        try:
            data = assembly.build_data(cfg, self.tokenizer)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"the text that {self.loaded.path} was validated on is not to be had: {error}\n"
                "put it back, or name other text with --files"
            ) from error
        if (then := self.origin.fingerprint) != data.fingerprint:
            files = "" if then is None else data.files_that_differ(then)
            raise ValueError(
                f"{self.loaded.path} was validated on data with fingerprint {then}, and what is there now has "
                f"{data.fingerprint}: put its text back as it was, or name other text with --files\n{files}".strip()
            )
        return data
