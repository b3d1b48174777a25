"""How a batch becomes a step and a validation split becomes four figures: against naive loops, by a plain Trainer."""

import json
import math
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from conftest import prose
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from experiments.levers.tasks import GrowingBatch, ZLoss
from gptlab.callbacks.record import Monitor
from gptlab.callbacks.saving import Checkpoints
from gptlab.callbacks.steps import Budget, CompileAhead
from gptlab.data.module import DataConfig, TextDataModule
from gptlab.losses import token_nll
from gptlab.model import GPT, GPTConfig
from gptlab.optim import Muon, constant
from gptlab.tasks.lm import LMTask
from gptlab.tokenizer import ByteTokenizer, CharTokenizer

V = ByteTokenizer().vocab_size
ADAMW = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
MUON = partial(Muon, lr=1e-3, weight_decay=0.1, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, width=None)
FLAT = partial(constant, warmup_steps=0)


def make_task(optimizer=ADAMW, tokenizer=None, seed: int = 0, kind=LMTask, **options) -> LMTask:
    torch.manual_seed(seed)
    tokenizer = tokenizer or ByteTokenizer()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, block_size=16))
    return kind(model, tokenizer, optimizer, FLAT, total_steps=100, **options)


def make_trainer(steps: int = 1, **options) -> lightning.Trainer:
    options = {"accelerator": "cpu", "max_steps": steps, "use_distributed_sampler": False, "logger": False} | options
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**quiet, **options)


def ragged(batches: int, size: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Micro-batches in which from none to all of a row's tokens count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (batches * size, 17), generator=generator)
    kept = torch.arange(batches * size)[:, None] * 16 // (batches * size - 1)
    mask = torch.arange(16)[None] < kept
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}
    return [{name: rows[name][i * size : (i + 1) * size] for name in rows} for i in range(batches)]


def loader(batches: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def text_data(path: Path, batch_size: int = 4, tokenizer=None, **options) -> TextDataModule:
    config = DataConfig(files=str(path), batch_size=batch_size, **options)
    return TextDataModule(config, None, tokenizer or ByteTokenizer(), block_size=16, seed=1)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_gradient_is_the_mean_over_tokens_that_count_however_they_are_cut_into_micro_batches(count):
    task = make_task(partial(torch.optim.SGD, lr=1.0))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    (whole,) = ragged(1, 8)
    nll = F.cross_entropy(task.model(whole["tokens"]).transpose(1, 2), whole["targets"], reduction="none")
    (nll * whole["loss_mask"]).sum().div(whole["loss_mask"].sum()).backward()
    naive = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.zero_grad()
    make_trainer(accumulate_grad_batches=count).fit(task, loader(ragged(count, 8 // count)))
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), naive[name], atol=1e-6, rtol=0)
    loss = float((nll * whole["loss_mask"]).sum() / whole["loss_mask"].sum())
    assert task.training_figures()["train/loss"] == pytest.approx(loss, abs=1e-6)


def test_step_without_any_token_that_counts_changes_nothing_and_is_finite():
    task = make_task(partial(torch.optim.SGD, lr=1.0))
    before = [p.detach().clone() for p in task.model.parameters()]
    (batch,) = ragged(1, 8)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    make_trainer().fit(task, loader([batch]))
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
    assert task.training_figures() == {"train/gradient_norm": 0.0}  # and no loss


def norms(optimizer, precision: str, accumulate: int, clip: float | None) -> tuple[list[float], dict[str, float]]:
    """The gradient norm that the optimizer sees at each of two steps, and what is logged after the first."""
    seen: list[float] = []

    class Recording(LMTask):
        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            gradients = [p.grad.double().flatten() for p in self.model.parameters()]
            seen.append(float(torch.cat(gradients).norm()))

    logged: list[dict[str, float]] = []

    class Ask(lightning.Callback):
        def on_train_batch_end(self, trainer, task, *_):
            if trainer.global_step == 1 and not logged:
                logged.append(task.training_figures())

    task = make_task(optimizer, kind=Recording)
    trainer = make_trainer(
        2, precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=clip, callbacks=[Ask()]
    )
    trainer.fit(task, loader(ragged(2 * accumulate, 5)))
    return seen, logged[0]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_clipping_caps_the_norm_and_logs_it_unclipped(precision, optimizer, accumulate):
    tolerance = 2e-2 if precision == "bf16-true" else 1e-4  # of gradients kept in 8 bits
    free, logged_free = norms(optimizer, precision, accumulate, None)
    assert min(free) > 0.1
    assert logged_free["train/gradient_norm"] == pytest.approx(free[0], rel=tolerance)
    capped, logged = norms(optimizer, precision, accumulate, 0.1)
    assert capped == pytest.approx([0.1, 0.1], rel=tolerance)
    assert logged["train/gradient_norm"] == pytest.approx(free[0], rel=tolerance)
    loose, _ = norms(optimizer, precision, accumulate, 100.0)
    assert loose == pytest.approx(free, rel=tolerance)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_logged_loss_is_exact_over_many_tokens_in_any_precision(precision):
    """Sums of 80,000 tokens do not fit a bf16 number: what counts tokens must keep its own type."""
    task = make_task(partial(torch.optim.SGD, lr=0.0))
    batches = ragged(50, 100)
    make_trainer(10, precision=precision, accumulate_grad_batches=5).fit(task, loader(batches))
    tokens = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert int(task.interval_sums[1]) == tokens
    model = make_task().model
    with torch.no_grad():
        nll = sum(
            float((token_nll(model(b["tokens"]), b["targets"]) * b["loss_mask"]).sum(dtype=torch.float64))
            for b in batches
        )
    assert task.training_figures()["train/loss"] == pytest.approx(nll / tokens, rel=1e-6 if "32" in precision else 1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_validation_figures_are_the_same_for_any_batch_size(text_file, precision):
    figures = []
    for batch_size in (1, 3, 7, 64):
        data, task = text_data(text_file, batch_size), make_task()
        make_trainer(precision=precision).validate(task, data, verbose=False)
        assert len(data.validation_windows) % 3
        assert len(data.validation_windows) % 7
        figures.append(task.figures)
    for other in figures[1:]:
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            assert other[name] == pytest.approx(figures[0][name], rel=1e-6 if precision == "32-true" else 2e-3), name
        assert other["val/accuracy"] == pytest.approx(
            figures[0]["val/accuracy"], abs=1e-9 if "32" in precision else 0.02
        )


def test_validation_in_bf16_is_within_half_a_percent_of_float32(text_file):
    data, task = text_data(text_file, 16), make_task(partial(torch.optim.AdamW, lr=1e-2))
    make_trainer(60, max_epochs=-1, precision="bf16-mixed", limit_val_batches=0).fit(task, data)
    figures = []
    for precision in ("32-true", "bf16-mixed"):
        make_trainer(precision=precision).validate(task, data, verbose=False)
        figures.append(task.figures["val/loss"])
    assert figures[0] < 0.7 * math.log(V)  # it has learnt something that rounding could lose
    assert figures[0] != figures[1]
    assert figures[1] == pytest.approx(figures[0], rel=5e-3)


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_bits_per_byte_is_the_nll_in_bits_over_the_bytes_of_the_real_text(tmp_path, kind):
    text = (prose(300) + "Größe: 1 €, naïve façade. " * 8) * 3
    path = tmp_path / "real.txt"
    path.write_text(text)
    tokenizer = ByteTokenizer() if kind == "byte" else CharTokenizer.train([text])
    task, data = make_task(tokenizer=tokenizer), text_data(path, 5, tokenizer)
    make_trainer().validate(task, data, verbose=False)

    held_out = text[int(len(text) * 0.9) :]
    ids = [*tokenizer.encode(held_out).tolist(), 2]  # closed by the end of document
    task.model.eval()
    nll, correct = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        tokens = torch.tensor([ids[start : min(start + 16, len(ids) - 1)]])
        with torch.no_grad():
            logits = task.model(tokens)[0].double()
        for at, row in enumerate(logits):
            target = ids[start + at + 1]
            nll -= float(row[target] - row.logsumexp(0))
            correct += int(row.argmax()) == target
    scored = len(held_out.encode()) - len(tokenizer.decode_bytes(ids[:1]))  # the first token is never predicted
    assert task.figures["val/loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-6)
    assert task.figures["val/perplexity"] == pytest.approx(math.exp(task.figures["val/loss"]), rel=1e-12)
    assert task.figures["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / scored, rel=1e-6)
    assert task.figures["val/accuracy"] == pytest.approx(correct / (len(ids) - 1), abs=1e-9)


def test_validation_with_nothing_to_score_is_no_number_and_a_huge_loss_does_not_overflow():
    task = make_task()
    assert math.isnan(task.validation.compute()["loss"])
    task.validation.update(*(torch.tensor([[v]]) for v in (1e5, 3, 3, True)))
    assert task.validation.compute()["perplexity"] == math.exp(700)


def test_separate_documents_do_not_see_each_other():
    task = make_task(separate_documents=True).eval()
    one = torch.tensor([[50, 60, 70, 2, 80, 90, 100, 110]])
    other = torch.tensor([[51, 61, 71, 2, 80, 90, 100, 110]])
    with torch.no_grad():
        torch.testing.assert_close(task.logits(one)[:, 4:], task.logits(other)[:, 4:], atol=1e-6, rtol=0)
        torch.testing.assert_close(task.logits(one)[:, 4:], task.model(one[:, 4:]), atol=1e-5, rtol=0)
        task.separate_documents = False
        assert not torch.allclose(task.logits(one)[:, 4:], task.logits(other)[:, 4:], atol=1e-3)


def test_documents_separate_trains(train, tmp_path):
    for number in range(20):
        (tmp_path / f"doc{number}.txt").write_text(prose(40, number))
    files = f"data.files={tmp_path}/doc*.txt"
    assert train(tmp_path / "run", "documents=separate", files, "trainer.max_steps=30", "optimizer.lr=0.01") == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["val_loss"] < 4.5


def test_a_plain_trainer_learns_with_task_data_and_callbacks_and_no_hydra(text_file, tmp_path):
    data, task, saving = text_data(text_file, 8), make_task(), Checkpoints(50, None, None, 1, False)
    saving.folder = tmp_path / "kept"
    budget = Budget(120, None)
    trainer = make_trainer(
        -1, callbacks=[CompileAhead(must=False), budget, saving], gradient_clip_val=1.0, num_sanity_val_steps=0
    )
    trainer.fit(task, data)
    assert trainer.global_step == 120
    assert task.figures["val/loss"] < 0.6 * math.log(V)
    assert {path.name for path in saving.folder.iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "step-00000100.ckpt",
        "manifest.json",
    }
    assert torch.load(saving.folder / "last.ckpt", weights_only=True)["gptlab"]["model"]["n_embd"] == 32
    assert budget.seconds > 0


def test_logged_learning_rate_is_the_one_that_the_step_took(train, tmp_path):
    """The schedule has moved on by the time a step is logged."""
    options = ("schedule=linear", "optimizer.lr=1.0", "trainer.max_steps=6", "validation.every_steps=3")
    assert train(tmp_path / "run", *options) == 0
    header, *rows = (line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines())
    rates = [float(row[header.index("train/learning_rate")]) for row in rows]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0], abs=1e-9)
    history = json.loads((tmp_path / "run/result.json").read_text())["history"]
    assert [entry["learning_rate"] for entry in history] == pytest.approx([1, 0], abs=1e-9)


@pytest.mark.slow
def test_compiled_losses_equal_those_of_eager_and_nothing_is_compiled_after_the_start(
    train, tmp_path, monkeypatch, capsys
):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # or what an earlier test has compiled would be there already
    options = ("trainer.max_steps=12", "validation.every_steps=5", "trainer.accumulate_grad_batches=2")
    options = (*options, "samples.every_steps=4", "samples.max_tokens=20", "optimizer=adamw", "optimizer.lr=0.01")
    graphs = []
    ahead = CompileAhead.on_train_start

    def counting(self, trainer, task):
        ahead(self, trainer, task)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(CompileAhead, "on_train_start", counting)
    losses = []
    for word in ("false", "true"):
        assert train(tmp_path / word, *options, f"compile={word}") == 0
        header, *rows = (line.split(",") for line in (tmp_path / word / "metrics.csv").read_text().splitlines())
        losses.append([float(row[header.index("train/loss")]) for row in rows])
        losses[-1] += [h["val_loss"] for h in json.loads((tmp_path / word / "result.json").read_text())["history"]]
        said = "compiling the network (compile=false to skip)"
        assert capsys.readouterr().out.count(said) == (word == "true")
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert graphs[-1] > 0
    assert counters["stats"]["unique_graphs"] == graphs[-1]
    result = json.loads((tmp_path / "true/result.json").read_text())
    assert result["seconds_to_compile"] > result["seconds"]


def test_metrics_stay_on_the_cpu_where_a_device_has_no_float64():
    """As on MPS: moving a float64 tensor there raises; the sums must stay behind and still take batches from there."""
    from gptlab.tasks.metrics import TokenMetrics

    class Elsewhere:
        """What a move to the device gives for an empty tensor, in the one respect that counts."""

        device, dtype = torch.device("mps"), torch.float32

    def move(tensor: torch.Tensor) -> Elsewhere:
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return Elsewhere()

    metrics = TokenMetrics(torch.ones(7, dtype=torch.float64))
    metrics._apply(move)
    assert metrics.nll.device.type == "cpu"
    tokens = torch.tensor([[1, 2, 3]])
    metrics.update(torch.ones(1, 3), tokens, tokens, torch.tensor([[True, True, False]]))
    assert metrics.compute()["loss"] == 1.0


class Reads(TorchDispatchMode):
    """Counts what Python reads from tensors: on a GPU, each time it waits for the device."""

    count = 0

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu", "nonzero"):  # these go by no number's way
            self.patch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def counted(self, method):
        def read(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return read

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nothing_is_read_from_the_device_but_when_logging(train, tmp_path, monkeypatch, optimizer):
    reads, counts = Reads(), {}
    on_step_end = Monitor.on_step_end

    def counting(self, trainer, task, step):
        before = reads.count
        on_step_end(self, trainer, task, step)
        counts[step] = (before, reads.count)

    monkeypatch.setattr(Monitor, "on_step_end", counting)
    more = (f"optimizer={optimizer}", "trainer.max_steps=12", "log.every_steps=5", "trainer.precision=32-true")
    with reads:
        assert train(tmp_path / "run", *more, "samples.every_steps=null", "checkpoint.every_steps=null") == 0
    between = [counts[step + 1][0] - counts[step][1] for step in range(1, 12)]
    logged = {step: after - before for step, (before, after) in counts.items()}
    assert between == [0] * 11
    assert {step for step, number in logged.items() if number} == {1, 5, 10, 12}
    assert max(logged.values()) == 1


# The tasks of experiments/levers


def test_a_z_loss_adds_its_penalty_to_the_gradient_and_to_no_figure():
    plain, task = make_task(), make_task(kind=ZLoss, weight=0.01)
    (batch,) = ragged(1, 8)
    losses = [one.training_step(batch, 0) for one in (plain, task)]
    log_sums = plain.model(batch["tokens"]).logsumexp(dim=-1)
    penalty = log_sums.square()[batch["loss_mask"]].sum() / batch["targets"].numel()
    torch.testing.assert_close(losses[1] - losses[0], 0.01 * penalty)
    assert penalty > 1
    torch.testing.assert_close(plain.step_sums, task.step_sums)


def test_a_growing_batch_learns_from_half_of_its_windows_at_first():
    def trained(task: LMTask, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        make_trainer(len(batches)).fit(task, loader(batches))
        return list(task.model.parameters())

    first, second = ragged(2, 8)
    for batch in (first, second):
        batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    half = {name: rows[:4] for name, rows in first.items()}
    growing = trained(make_task(kind=GrowingBatch, half_until=1), [first, second])
    for a, b in zip(growing, trained(make_task(), [half, second]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
