"""On a CUDA device: bf16, compiling, memory and MFU, saving on it and resuming."""

import json

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RUN = ("trainer=gpu", "trainer.precision=auto", "model.n_embd=64", "model.block_size=64", "log.peak_tflops=100")


def result(run) -> dict:
    return json.loads((run / "result.json").read_text())


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_on_a_gpu_learns_and_knows_its_memory_and_mfu(train, tmp_path, compiled):
    run = tmp_path / "run"
    assert train(run, *RUN, f"compile={compiled}", "trainer.max_steps=60", "optimizer.lr=0.01") == 0
    figures = result(run)
    assert figures["val_loss"] < 4.0
    assert figures["peak_gpu_mb"] > 0
    assert 0 < figures["mfu"] < 1
    assert figures["hardware"]["device"] == torch.cuda.get_device_name()


def test_resume_on_a_gpu_is_exact_with_deterministic_operations(train, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = (*RUN, "deterministic=true", "model.dropout=0.2", "schedule=constant")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(whole, *options, "trainer.max_steps=12") == 0
    assert train(part, *options, "trainer.max_steps=7") == 0
    assert train(part, f"resume={part}", "trainer.max_steps=12") == 0
    files = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, part)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(train, tmp_path):
    from gptlab.checkpoint import load_model

    assert train(tmp_path / "run", *RUN, "trainer.max_steps=2") == 0
    model, tokenizer = load_model(tmp_path / "run/checkpoints/last.ckpt")
    assert model(torch.tensor([tokenizer.encode("the cat").tolist()])).device.type == "cpu"
