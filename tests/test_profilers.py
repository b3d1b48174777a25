"""Every word of trainer.profiler leaves a table of training in the run folder."""

import pytest
import torch


@pytest.mark.parametrize(
    ("word", "shown"),
    [("simple", "LMTask.optimizer_step"), ("advanced", "cumtime"), ("pytorch", "LMTask.optimizer_step")],
)
def test_a_profiler_leaves_its_table(word, shown, train, tmp_path):
    assert train(tmp_path / "run", f"trainer.profiler={word}", "trainer.max_steps=8") == 0
    table = (tmp_path / "run/fit-profile.txt").read_text()
    assert shown in table
    assert len(list((tmp_path / "run").glob("*training_step*.json"))) == (word == "pytorch")
    assert not list((tmp_path / "run").glob("*validation_step*"))


@pytest.mark.slow
def test_the_products_of_a_compiled_step_are_seen(train, tmp_path):
    torch.compiler.reset()  # what another test has compiled in this process calls its kernels where nobody looks
    assert train(tmp_path / "run", "trainer.profiler=pytorch", "trainer.max_steps=8", "compile=true") == 0
    assert "aten::mm " in (tmp_path / "run/fit-profile.txt").read_text()


def test_a_run_too_short_to_be_profiled_still_ends_well(train, tmp_path):
    assert train(tmp_path / "run", "trainer.profiler=pytorch", "trainer.max_steps=1") == 0


def test_a_word_that_is_none_is_bad_input(train, tmp_path, capsys):
    assert train(tmp_path / "run", "trainer.profiler=deep", "trainer.max_steps=1") == 2
    assert "trainer.profiler=deep is none of simple, advanced, pytorch" in capsys.readouterr().err
