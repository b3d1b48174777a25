"""Averaged weights: against naive loops, in files that are resumed, and without a trace in the training itself."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import compose, door
from hydra.errors import InstantiationException
from test_resume import RUN, STEPS, assert_same_run, interrupted_at
from test_task import ByteTokenizer, loader, make_task, make_trainer, ragged
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptlab import assembly, checkpoint
from gptlab.callbacks.averaging import MovingAverage, averaged
from gptlab.engine import generate
from gptlab.model import GPT, GPTConfig
from gptlab.tasks.lm import LMTask
from gptlab.tokenizer import EOS_ID

EMA = ("callbacks=ema", "callbacks.ema.decay=0.5")  # reached at the eighth update
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=100", "optimizer.lr=0.02")


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def saved(run: Path, step: int) -> dict:
    return checkpoint.load(run / f"checkpoints/step-{step:08d}.ckpt")


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def network_of(weights: dict[str, Tensor], state: dict) -> GPT:
    model = GPT(checkpoint.model_config(state))
    model.load_state_dict(checkpoint.model_weights({"state_dict": weights}))
    return model.eval()


@pytest.mark.parametrize(("from_step", "every_steps"), [(0, 1), (3, 2)])
def test_average_is_that_of_a_naive_loop_over_the_weights_of_each_step(train, tmp_path, from_step, every_steps):
    run = tmp_path / "run"
    when = (f"callbacks.ema.from_step={from_step}", f"callbacks.ema.every_steps={every_steps}")
    assert train(run, *EMA, *EVERY_STEP, *when, "trainer.max_steps=16") == 0
    begun = assembly.build_model(config_of(run), ByteTokenizer())
    naive = {f"model.{name}": weight.double() for name, weight in begun.state_dict().items()}
    n = 0
    for step in range(1, 17):
        state = saved(run, step)
        trained = {name: weight.double() for name, weight in state["current_model_state"].items()}
        if step <= from_step:
            naive = trained
        elif (step - from_step) % every_steps == 0:
            decay = min(0.5, (1 + n) / (10 + n))
            naive = {name: decay * naive[name] + (1 - decay) * trained[name] for name in trained}
            n += 1
        for name, weight in state["state_dict"].items():
            torch.testing.assert_close(weight.double(), naive[name], atol=1e-6, rtol=0)
        assert differs(state["state_dict"], state["current_model_state"]) == (step > from_step)
    assert n == (16 - from_step) // every_steps


def test_training_is_the_same_with_and_without_it(train, tmp_path):
    options = ("trainer.max_steps=9", "validation.every_steps=3", "samples.every_steps=4", "model.dropout=0.2")
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert train(plain, *EVERY_STEP, *options) == 0
    assert train(run, *EMA, *EVERY_STEP, *options) == 0
    for step in range(1, 10):
        assert_equal(saved(plain, step)["state_dict"], saved(run, step)["current_model_state"])
        assert "current_model_state" not in saved(plain, step)
    losses = [[entry["train_loss"] for entry in result(folder)["history"]] for folder in (plain, run)]
    assert losses[0] == losses[1]


def loss_by_hand(model: GPT, run: Path) -> float:
    """The mean loss over the validation split, of a plain network on all windows at once."""
    windows = assembly.build_data(config_of(run)).validation_windows
    batch = windows.__getitems__(list(range(len(windows))))
    with torch.no_grad():
        nll = F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["targets"], reduction="none").double()
    return float((nll * batch["loss_mask"]).sum() / batch["loss_mask"].sum())


def test_validation_and_best_are_of_the_average_and_say_so(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, *EMA, *EVERY_STEP, "trainer.max_steps=12", "validation.every_steps=4") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    figures = result(run)
    assert figures["weights"] == "ema"
    assert len(figures["history"]) == len(lines) == 3
    for entry, line in zip(figures["history"], lines, strict=True):
        state = saved(run, entry["step"])
        assert loss_by_hand(network_of(state["state_dict"], state), run) == pytest.approx(entry["val_loss"], rel=1e-6)
        raw = loss_by_hand(network_of(state["current_model_state"], state), run)
        assert raw != pytest.approx(entry["val_loss"], rel=1e-4)
        assert f"val {entry['val_loss']:.3f} (ema)  ppl" in line
    best, _ = checkpoint.load_model(run / "checkpoints/best.ckpt")
    assert loss_by_hand(best, run) == pytest.approx(figures["best_val_loss"], rel=1e-6)
    assert checkpoint.load(run / "checkpoints/best.ckpt")["gptlab"]["weights"] == "ema"


def test_a_run_without_it_is_of_raw_weights(train, tmp_path, capsys):
    assert train(tmp_path / "run", "trainer.max_steps=2") == 0
    assert result(tmp_path / "run")["weights"] == "raw"
    assert "weights" not in checkpoint.load(tmp_path / "run/checkpoints/last.ckpt")["gptlab"]
    assert "(ema)" not in capsys.readouterr().out


def test_samples_are_of_the_average_up_to_the_last(train, tmp_path):
    run = tmp_path / "run"
    options = ("samples.every_steps=3", "samples.max_tokens=30", "samples.prompts=['The cat']", "trainer.max_steps=8")
    assert train(run, *EMA, *EVERY_STEP, *options) == 0
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]

    def continuation(weights: dict[str, Tensor], state: dict) -> str:
        tokenizer = ByteTokenizer()
        prompt = torch.tensor([EOS_ID, *tokenizer.encode("The cat").tolist()])
        options = {"temperature": 0.7, "top_k": 50, "seed": 1, "stop_id": EOS_ID, "vocab_size": tokenizer.vocab_size}
        return tokenizer.decode(generate(network_of(weights, state), prompt, 30, **options))

    states = [saved(run, line["step"]) for line in lines]
    assert [continuation(state["state_dict"], state) for state in states] == [line["text"] for line in lines]
    assert [continuation(state["current_model_state"], state) for state in states] != [line["text"] for line in lines]


@pytest.mark.slow
def test_resume_from_every_step_equals_uninterrupted(train, tmp_path):
    whole = tmp_path / "whole"
    assert train(whole, *RUN, *EMA, "callbacks.ema.from_step=2", "optimizer.lr=0.02") == 0
    for step in range(1, STEPS):
        part = interrupted_at(whole, step, tmp_path / f"part-{step}")
        assert train(part, f"resume={part}", "seed=77") == 0
        assert_same_run(whole, part)  # the averages of last.ckpt among it
        for later in range(step, STEPS + 1):
            for key in ("state_dict", "current_model_state"):
                assert_equal(saved(whole, later)[key], saved(part, later)[key])
        shutil.rmtree(part)


def test_resuming_does_not_forget_or_gain_it(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, *EMA, "trainer.max_steps=2") == 0
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay: the run has 0\.5, the command line 0\.9"):
        train(run, f"resume={run}", "callbacks=ema", "callbacks.ema.decay=0.9")


def test_init_from_takes_the_average_and_begins_one_with_it(train, tmp_path):
    parent, child = tmp_path / "parent", tmp_path / "child"
    assert train(parent, *EMA, *EVERY_STEP, "trainer.max_steps=4", "validation.every_steps=4") == 0
    options = (f"init_from={parent}", "callbacks=ema", "callbacks.ema.from_step=1", "optimizer.lr=0", "optimizer=adamw")
    assert train(child, *options, "trainer.max_steps=1", "optimizer.weight_decay=0") == 0
    begun = checkpoint.load(child / "checkpoints/last.ckpt")
    assert_equal(begun["state_dict"], saved(parent, 4)["state_dict"])
    assert_equal(begun["current_model_state"], saved(parent, 4)["state_dict"])


def test_with_early_stopping(train, tmp_path):
    run = tmp_path / "run"
    words = ("callbacks=[ema,early_stopping]", "callbacks.early_stopping.min_delta=100", "callbacks.ema.decay=0.9")
    assert train(run, *words, "validation.every_steps=2", "trainer.max_steps=100") == 0
    assert (result(run)["steps"], result(run)["weights"]) == (8, "ema")  # the first and its patience of three
    state = checkpoint.load(run / "checkpoints/last.ckpt")
    assert differs(state["state_dict"], state["current_model_state"])
    assert set(compose("callbacks=[early_stopping,ema]")["callbacks"]) == {"ema", "early_stopping"}


def test_a_skipped_step_leaves_the_average_as_it_is(train, tmp_path, monkeypatch):
    real = LMTask.training_step

    def poisoned(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step + 1 in (5, 6) else loss

    monkeypatch.setattr(LMTask, "training_step", poisoned)
    run = tmp_path / "run"
    assert train(run, *EMA, *EVERY_STEP, "nonfinite=skip", "trainer.max_steps=8") == 0
    assert result(run)["skipped_steps"] == 2
    averages = [saved(run, step)["state_dict"] for step in (4, 5, 6, 7)]
    assert_equal(averages[0], averages[1])
    assert_equal(averages[0], averages[2])
    assert differs(averages[2], averages[3])
    assert all(torch.isfinite(weight).all() for weight in averages[3].values())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("decay=1", r"callbacks\.ema\.decay=1 must be at least 0 and less than 1"),
        ("decay=-0.1", r"callbacks\.ema\.decay=-0\.1 must be"),
        ("every_steps=0", r"callbacks\.ema\.every_steps=0 must be at least 1"),
        ("from_step=-1", r"callbacks\.ema\.from_step=-1 must be at least 0"),
        ("decay=much", r"callbacks\.ema\.decay='much' is not what it takes: a number"),
    ],
)
def test_values_that_cannot_be(train, tmp_path, override, says):
    with pytest.raises((ValueError, InstantiationException), match=says):
        train(tmp_path / "run", "callbacks=ema", f"callbacks.ema.{override}")


def test_exit_code_of_a_value_that_cannot_be(tmp_path):
    done = door("train", "callbacks=ema", "callbacks.ema.decay=1.5", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: callbacks.ema.decay=1.5 must be at least 0 and less than 1, such as 0.999\n"


def test_weights_too_coarse_for_it_are_refused(train, tmp_path, capsys):
    assert train(tmp_path / "run", "callbacks=ema", "trainer.precision=bf16-true", "trainer.max_steps=2") == 2
    assert "trainer.precision=bf16-true: weights in bfloat16" in capsys.readouterr().err


# With a Trainer of one's own


def weights_of(task: LMTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.state_dict().items()}


class Watch(lightning.Callback):
    """Notes what the network holds and what would be saved, at the end of steps and amid validations."""

    def __init__(self):
        self.trained, self.validated, self.saved = {}, {}, {}

    def on_train_batch_end(self, trainer, task, *_):
        self.trained[trainer.global_step] = weights_of(task)

    def on_validation_batch_start(self, trainer, task, *_):
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validated[trainer.global_step] = weights_of(task)
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.saved[trainer.global_step] = {
            key: {name: tensor.clone() for name, tensor in state[key].items()}
            for key in ("state_dict", "current_model_state")
        }


def fit(task: LMTask, *callbacks: lightning.Callback, steps: int = 6) -> lightning.Trainer:
    trainer = make_trainer(steps, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[*callbacks])
    trainer.fit(task, loader(ragged(steps, 4)), loader(ragged(2, 4, seed=1)))
    return trainer


def test_the_network_holds_the_average_in_validation_alone_and_is_left_with_it(tmp_path):
    task, average, watch = make_task(), MovingAverage(0.5, 0, 1), Watch()
    addresses = [parameter.data_ptr() for parameter in task.parameters()]
    trainer = fit(task, average, watch)
    assert sorted(watch.validated) == [2, 4, 6]
    for step in (2, 4, 6):
        assert differs(watch.trained[step], watch.validated[step])
        assert_equal(watch.saved[step]["state_dict"], watch.validated[step])  # also when it is saved amid a validation
        assert_equal(watch.saved[step]["current_model_state"], watch.trained[step])
    assert_equal(weights_of(task), watch.validated[6])
    assert [parameter.data_ptr() for parameter in task.parameters()] == addresses
    before = task.figures["val/loss"]
    trainer.validate(task, loader(ragged(2, 4, seed=1)), verbose=False)
    assert task.figures["val/loss"] == before
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = checkpoint.load(tmp_path / "after.ckpt")
    assert_equal(after["state_dict"], watch.validated[6])
    assert after["gptlab"]["weights"] == "ema"


def test_an_error_amid_a_validation_leaves_the_trained_weights():
    class Fails(Watch):
        def on_validation_batch_end(self, trainer, task, *_):
            if trainer.global_step == 4:
                raise RuntimeError("no more")

    task, watch = make_task(), Fails()
    with pytest.raises(RuntimeError, match="no more"):
        fit(task, MovingAverage(0.5, 0, 1), watch)
    assert differs(watch.trained[4], watch.validated[4])
    assert_equal(weights_of(task), watch.trained[4])


def test_tied_and_frozen_weights():
    """A tied weight is one weight under two names; one that is not trained has no average and needs none."""
    task, watch = make_task(), Watch()
    task.twin = task.model.embed
    task.model.norm.weight.requires_grad_(False)
    average = MovingAverage(0.5, 0, 1)
    fit(task, average, watch)
    state = watch.saved[6]["state_dict"]
    assert torch.equal(state["twin.weight"], state["model.embed.weight"])
    assert not torch.equal(state["twin.weight"], watch.trained[6]["twin.weight"])
    assert torch.equal(state["model.norm.weight"], watch.trained[6]["model.norm.weight"])


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given:
                self.now += made.nbytes
                weakref.finalize(made, self.forget, made.nbytes)
        self.most = max(self.most, self.now)
        return out

    def forget(self, size: int) -> None:
        self.now -= size


def test_it_takes_one_more_copy_of_the_weights_and_no_more():
    task, average = make_task(), MovingAverage(0.999, 0, 1)
    trainer = SimpleNamespace(callbacks=[average], global_step=0)
    size = sum(parameter.nbytes for parameter in task.parameters())
    with Allocated() as allocated:
        average.on_train_start(trainer, task)
        assert allocated.now == allocated.most == size
        average.on_step_end(trainer, task, 1)
        assert allocated.most == size
        with averaged(trainer, task):
            state = {"state_dict": task.state_dict()}
            average.on_save_checkpoint(trainer, task, state)
        assert allocated.now == size
        assert allocated.most == size + max(parameter.nbytes for parameter in task.parameters())


def test_a_compiled_network_is_not_compiled_again_and_computes_with_the_average():
    counter, frames = CompileCounter(), []

    class Count(lightning.Callback):
        def on_validation_end(self, trainer, task):
            if not trainer.sanity_checking:
                frames.append(counter.frame_count)

    torch._dynamo.reset()
    task, plain = make_task(), make_task()
    task.model.compile(backend=counter)
    fit(task, MovingAverage(0.5, 0, 1), Count(), steps=8)
    fit(plain, MovingAverage(0.5, 0, 1), steps=8)
    assert frames[0] > 0
    assert set(frames) == {frames[0]}
    assert len(frames) == 4
    assert task.figures == pytest.approx(plain.figures, rel=1e-4)


@pytest.mark.slow
def test_a_run_compiled_by_inductor_is_that_without(train, tmp_path):
    losses, graphs = [], []
    for run, options in (("plain", ()), ("eager", EMA), ("compiled", EMA)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        more = (*options, "trainer.max_steps=9", "validation.every_steps=2", "optimizer=adamw", "optimizer.lr=0.02")
        assert train(tmp_path / run, *more, f"compile={'false' if run == 'eager' else 'true'}") == 0
        losses.append([entry["val_loss"] for entry in result(tmp_path / run)["history"]])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
    assert graphs[0] == graphs[2] > 0


# Sharded weights


class Bare(nn.Module):
    """What the average needs of a task."""

    skipped_in_a_row = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(vocab_size=50, n_layer=2, n_head=3, n_embd=30, block_size=8))


def sharded(task: Bare) -> Bare:
    from torch.distributed.fsdp import fully_shard

    for block in task.model.blocks:
        fully_shard(block)
    fully_shard(task.model)
    return task


def full(task: Bare) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(task, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train_sharded(rank: int, folder: str) -> None:
    """Some steps of a sharded network on one of two processes, with what should hold of its average."""
    file = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    task, average = sharded(Bare()), MovingAverage(0.5, 0, 1)
    trainer = SimpleNamespace(callbacks=[average], global_step=0)
    average.on_train_start(trainer, task)
    assert all(isinstance(weight, DTensor) for weight in average._weights)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.01)
    tokens = torch.arange(32).view(4, 8)
    naive = {name: weight.double() for name, weight in Bare().state_dict().items()}
    for step in range(1, 4):
        F.cross_entropy(task.model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.on_step_end(trainer, task, step)
        trained, decay = full(task), step / (9 + step)
        if rank == 0:  # others are given none
            naive = {name: decay * naive[name] + (1 - decay) * trained[name].double() for name in naive}
        state = {"state_dict": trained}
        average.on_save_checkpoint(trainer, task, state)
        with torch.no_grad():
            raw = task.model(tokens)  # the root stays gathered after this
            with averaged(trainer, task):
                found = task.model(tokens)
            assert torch.equal(task.model(tokens), raw)
        if rank == 0:
            assert_equal(state["current_model_state"], trained)
            other = Bare()
            other.load_state_dict(state["state_dict"])
            for name, weight in state["state_dict"].items():
                torch.testing.assert_close(weight.double(), naive[name], atol=1e-6, rtol=0)
            torch.testing.assert_close(found, other.model(tokens).detach(), atol=1e-5, rtol=0)
            assert not torch.allclose(found, raw, atol=1e-3)
            torch.save(state, f"{folder}/state.pt")
    torch.distributed.barrier()
    state = torch.load(f"{folder}/state.pt", weights_only=True)
    other, again = Bare(), MovingAverage(0.5, 0, 1)
    other.load_state_dict(state["state_dict"])
    again.on_load_checkpoint(trainer, sharded(other), state)
    again.on_train_start(trainer, other)
    for one, two in ((average._weights, again._weights), (average._kept, again._kept)):
        assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(one, two, strict=True))
    (Path(folder) / f"done-{rank}").touch()
    torch.distributed.destroy_process_group()


def test_sharded_weights(tmp_path):
    torch.multiprocessing.spawn(train_sharded, args=(str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
