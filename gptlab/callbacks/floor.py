"""How far a model is from the best possible one, where that is known, at each validation."""

import logging
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gptlab.callbacks.averaging import averaged
from gptlab.excess import KnownDocuments, in_bits
from gptlab.run import write_json

log = logging.getLogger("gptlab")


class Floor(Callback):
    """After each validation, scores the first held-out documents beside their own optimum, if the source knows it.

    This costs a forward pass of DOCUMENTS rows, 4 s on one thread of a Xeon for 0.7 M parameters and blocks of 256, and
    once their parsing, 0.1 s. `floor.json` has the last validation's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._documents: KnownDocuments | None = None

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        data = trainer.datamodule
        if getattr(getattr(data, "source", None), "optimum", None) is None:  # somebody's own data has no source
            return
        try:
            self._documents = KnownDocuments(
                data.prepared.validation[:],
                data.tokenizer,
                data.source.optimum,
                task.validation.token_bytes.cpu().numpy(),
                data.block_size,
                data.config.batch_size,
            )
        except ValueError as error:
            self._documents = None
            log.warning("no floor is measured: %s", error)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        if self._documents is None or trainer.sanity_checking:
            return
        was_training = task.training
        task.eval()
        with averaged(trainer, task), torch.no_grad(), trainer.precision_plugin.val_step_context():
            found = {"step": trainer.global_step} | self._documents.measure(task.scored, task.device)
        task.train(was_training)
        totals = in_bits(found)
        low, high = totals.pop("excess_interval")
        bits = {f"val/{name}": value for name, value in totals.items()}
        task.figures |= bits | {"val/excess_low": low, "val/excess_high": high}  # the record keeps them
        kinds = {f"val/excess_nats/{kind}": row["excess"] for kind, row in found["kinds"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(bits | kinds, step=trainer.global_step)
        if trainer.is_global_zero:
            write_json(self.path, found)
        log.info(
            f"floor {bits['val/floor_bits_per_byte']:.4f} bits a byte, excess {bits['val/excess_bits_per_byte']:.4f} "
            f"({low:.4f} to {high:.4f}); in nats a byte of "
            + ", ".join(f"{kind} {row['excess']:.4f}" for kind, row in found["kinds"].items())
        )
