"""Language modelling: how a batch becomes a loss, a loss becomes a step, and a validation split becomes four figures.

Shapes: B batch, T time, V vocabulary.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gptlab import __version__, checkpoint
from gptlab.data.module import data_rank
from gptlab.losses import document_layout, scored, summed_nll
from gptlab.machine import hardware
from gptlab.model import GPT
from gptlab.optim import keep_kernels, parameter_groups
from gptlab.scoring import token_bytes
from gptlab.sharding import local, norm_square, split
from gptlab.tasks.metrics import TokenMetrics
from gptlab.tokenizer import EOS_ID, Tokenizer

log = logging.getLogger("gptlab")

REQUESTS = ("interrupt", "terminate", "time", "save")  # what ranks ask of each other
MATRICES_IN = {"bf16-mixed": torch.bfloat16}  # where that is not the type of the weights
SKIPS_IN_A_ROW = 10  # after so many, the weights themselves are at fault
KEPT = "nothing of it was saved, what was saved before stays"
REMEDY = (
    "Try a lower optimizer.lr, a longer schedule.warmup_steps, a lower trainer.gradient_clip_val, or "
    "trainer.precision=32-true"
)


class NotFiniteError(ArithmeticError):
    """The loss or the gradients became NaN or infinite."""


class LMTask(LightningModule):
    """Next-token prediction over (tokens, targets, loss_mask) batches; what the mask keeps is the data's affair.

    `optimizer` makes an optimizer of parameter groups; `schedule(step, total_steps)` is a factor of its learning rate.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[..., float],
        total_steps: int,
        separate_documents: bool = False,
        skip_nonfinite: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.make_optimizer, self.schedule, self.total_steps = optimizer, schedule, total_steps
        self.separate_documents, self.skip_nonfinite = separate_documents, skip_nonfinite
        self.set_compile(compile)
        self.validation = TokenMetrics(token_bytes(tokenizer))
        self.source_names: list[str] = []  # of a mixture, whose sources are each scored for itself too
        self.validation_by_source = torch.nn.ModuleList()
        # Sums of nll and tokens over one optimizer step, and since the last time that somebody asked; no buffers, which
        # trainer.precision=bf16-true would round to 8 bits.
        self.step_sums, self.interval_sums, self.gradient_norm = torch.zeros(2), torch.zeros(2), torch.zeros(())
        # What this rank asks for, and what any rank asked for at the last step; it travels with the sums.
        self.requests, self.requested = torch.zeros(len(REQUESTS)), torch.zeros(len(REQUESTS))
        self.skipped_steps = self.skipped_in_a_row = 0
        self.figures: dict[str, float] = {}  # of the last validation, in float64, where Lightning keeps float32
        self._circumstances_then: dict[str, Any] = {}  # of the checkpoint that this one goes on from
        self.tokens_a_batch = 0  # of one rank's micro-batch, counted or not; all have one shape

    def set_compile(self, compile: bool) -> None:
        """Compile the network in place, so that no weight changes its name, and with its loss; or stop doing so."""
        self.compiled = compile
        self.loss_and_sums = torch.compile(self._loss_and_sums) if compile else self._loss_and_sums
        self.scored = torch.compile(self._scored) if compile else self._scored
        if compile:
            self.model.compile()
        else:
            self.model._compiled_call_impl = None

    def setup(self, stage: str | None = None) -> None:
        self.source_names = list(getattr(self.trainer.datamodule, "source_names", ()))
        metrics = [TokenMetrics(self.validation.token_bytes) for _ in self.source_names]
        self.validation_by_source = torch.nn.ModuleList(metrics).to(self.device)

    def configure_model(self) -> None:
        """Split the network over the ranks of a strategy that splits it."""
        if self.device_mesh is not None:
            split(self.model, self.device_mesh, MATRICES_IN.get(self.trainer.precision))

    def on_fit_start(self) -> None:
        for name in ("step_sums", "interval_sums", "gradient_norm", "requests", "requested"):
            setattr(self, name, getattr(self, name).to(self.device))

    def logits(self, tokens: Tensor, readout: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """(B, T, V), each token seeing all before it in the row, or in its document; or what `readout` makes of it."""
        if not self.separate_documents:
            return self.model(tokens, readout=readout)
        document_ids, positions = document_layout(tokens, EOS_ID)
        return self.model(tokens, positions, document_ids, readout=readout)

    def _loss_and_sums(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a mean over all tokens, and two sums (2,): the nll of those that count, and how many do."""
        nll = self.logits(
            tokens,
            partial(summed_nll, targets=targets, loss_mask=loss_mask, vocab_size=self.model.config.vocab_size),
        )
        return nll / targets.numel(), torch.stack((nll.detach(), loss_mask.sum()))

    def _scored(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The nll of each target, and the likeliest token in its place, both (B, T)."""
        return self.logits(tokens, partial(scored, targets=targets, vocab_size=self.model.config.vocab_size))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, sums = self.loss_and_sums(batch["tokens"], batch["targets"], batch["loss_mask"])
        self.step_sums += sums
        self.tokens_a_batch = batch["targets"].numel()
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Weigh the gradients by the tokens that counted, and clip their norm; called once an optimizer step.

        Lightning has averaged micro-batches and ranks as if every token of theirs counted. What is wanted is the mean
        over the tokens that did. All is one multiplication, so fused optimizers and bf16 need no special care.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        square = norm_square(parameters, self.trainer.world_size)
        sums = torch.cat((self.step_sums, self.requests, square))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)  # the strategy's own `reduce` would wait at a barrier first
        nll_and_tokens = sums[:2] * data_rank(self.trainer)[1] / self.trainer.world_size  # some count the same tokens
        self.requested = sums[2:-1]
        self.step_sums.zero_()
        scale = self.tokens_a_step / nll_and_tokens[1].clamp(min=1)
        self.gradient_norm.copy_(sums[-1].sqrt() * scale)
        if self.skip_nonfinite and not bool(torch.isfinite(nll_and_tokens[0]) & torch.isfinite(self.gradient_norm)):
            self._skip_step()
            return
        self.skipped_in_a_row = 0
        self.interval_sums += nll_and_tokens
        if gradient_clip_val:
            scale = scale * (gradient_clip_val / (self.gradient_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)

    def _skip_step(self) -> None:
        """Leave weights and optimizer as they are: optimizers pass over parameters without a gradient."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.gradient_norm.zero_()
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise NotFiniteError(
                f"the loss or its gradient was NaN or infinite at {SKIPS_IN_A_ROW} steps in a row, up to step "
                f"{self.trainer.global_step + 1}; {KEPT}. {REMEDY}"
            )

    def finite_sums(self) -> list[float]:
        """The sum of the loss and of tokens since they were last logged, and the last gradient norm, read at once.

        Raises NotFiniteError unless they are numbers.
        """
        sums = torch.cat((self.interval_sums, self.gradient_norm[None])).tolist()
        if not all(map(math.isfinite, sums)):
            raise NotFiniteError(
                f"the loss or its gradient was NaN or infinite by step {self.trainer.global_step} (it is looked for "
                f"when logging and saving); {KEPT}. {REMEDY}, or nonfinite=skip to pass over a few such steps"
            )
        return sums

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one optimizer step over all ranks, counted or not."""
        return self.tokens_a_batch * self.trainer.accumulate_grad_batches * data_rank(self.trainer)[1]

    def training_figures(self) -> dict[str, float]:
        """The mean loss since the last call, and the last gradient norm: where training waits for the device.

        There is no loss where no token has counted since, and no norm where the last step was skipped. Raises
        NotFiniteError.
        """
        nll, tokens, norm = self.finite_sums()
        self.interval_sums.zero_()
        figures = {"train/loss": nll / tokens} if tokens else {}
        return figures if self.skipped_in_a_row else figures | {"train/gradient_norm": norm}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        nll, likeliest = self.scored(batch["tokens"], batch["targets"])
        self.validation.update(nll, likeliest, batch["targets"], batch["loss_mask"])
        for number, metrics in enumerate(self.validation_by_source):
            is_of_it = batch["source"] == number
            metrics.update(nll, likeliest, batch["targets"], batch["loss_mask"] & is_of_it[:, None])

    def on_validation_epoch_end(self) -> None:
        self.figures = figures = {f"val/{name}": value for name, value in self.validation.compute().items()}
        self.validation.reset()
        for source, metrics in zip(self.source_names, self.validation_by_source, strict=True):
            found = metrics.compute()
            figures |= {f"val/{name}/{source}": found[name] for name in ("loss", "bits_per_byte")}
            metrics.reset()
        self.log_dict(figures, logger=False)  # for callbacks that monitor; the record follows, at the optimizer step
        if not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics(figures, step=self.trainer.global_step)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(parameter_groups(self.model))
        optimizer.register_load_state_dict_pre_hook(keep_kernels)
        schedule = LambdaLR(optimizer, lambda step: self.schedule(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        # What a callback has put there, the word for averaged weights, stays.
        state[checkpoint.OWN_KEY] = state.get(checkpoint.OWN_KEY, {}) | checkpoint.describe(
            self.model.config, self.tokenizer
        )
        state[checkpoint.OWN_KEY] |= {
            "interval_sums": self.interval_sums.clone(),
            "skipped_steps": self.skipped_steps,
            "hardware": self.circumstances(),
        }

    def circumstances(self) -> dict[str, Any]:
        """All that a run goes on bit for bit on, where it stays the same."""
        found = hardware(self.device) | {"ranks": self.trainer.world_size, "compiled": self.compiled}
        versions = {"torch": str(torch.__version__), "gptlab": __version__}  # torch's own class of strings is not plain
        return found | {"precision": self.trainer.precision} | versions

    def on_train_start(self) -> None:
        then, now = self._circumstances_then, self.circumstances()
        changed = [f"{key} {then[key]} then, {now[key]} now" for key in now if key in then and then[key] != now[key]]
        if changed:
            log.info("close to the uninterrupted run, but not bit for bit: %s", "; ".join(changed))

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        self.interval_sums.copy_(state[checkpoint.OWN_KEY]["interval_sums"])
        self.skipped_steps = state[checkpoint.OWN_KEY]["skipped_steps"]
        self._circumstances_then = state[checkpoint.OWN_KEY]["hardware"] or {}  # an older gptlab wrote less of it down
