"""The door `export`: folders that transformers loads with the same logits and ids, or nothing at all."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPOSITORY, door
from kinds import of_kind

from gptlab import architectures, bundle, checkpoint, dialogue, loading
from gptlab.checkpoint import describe
from gptlab.export import folder
from gptlab.export.__main__ import main
from gptlab.export.template import chat_template
from gptlab.model import GPT, GPTConfig
from gptlab.options import export as options
from gptlab.tokenizer import SPECIAL_TOKENS

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False}
LLAMA = {"qk_norm": False}
NETWORKS = {
    "default": ({}, "Qwen3ForCausalLM"),
    "grouped queries": ({"n_kv_head": 2}, "Qwen3ForCausalLM"),
    "untied": ({"tie_embeddings": False}, "Qwen3ForCausalLM"),
    "wide heads": ({"head_dim": 12}, "Qwen3ForCausalLM"),
    "a theta": ({"rope_theta": 500.0, "norm_eps": 1e-3}, "Qwen3ForCausalLM"),
    "llama": (LLAMA | {"n_kv_head": 2, "mlp_width": 48}, "LlamaForCausalLM"),
    "llama, biases, untied": (LLAMA | {"bias": True, "tie_embeddings": False}, "LlamaForCausalLM"),
    "gpt2": (GPT2 | {"bias": True}, "GPT2LMHeadModel"),
    "gpt2, no biases": (GPT2, "GPT2LMHeadModel"),
    "gpt2, untied, wide": (GPT2 | {"bias": True, "tie_embeddings": False, "mlp_width": 40}, "GPT2LMHeadModel"),
}


def network(vocab_size: int, **changes) -> GPT:
    """A small network with weights so large that every part of it matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**(sizes | {"init_std": 0.3} | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def save(model: GPT, tokenizer, path: Path) -> Path:
    """A checkpoint, as a run leaves it."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    record = {"config": "seed: 3\n", "validation": {"val/loss": 1.5, "val/perplexity": float("nan")}, "tokens": 640}
    checkpoint.save(
        {
            checkpoint.OWN_KEY: describe(model.config, tokenizer) | {"skipped_steps": 0, "hardware": {"threads": 1}},
            "state_dict": state,
            "global_step": 7,
            "callbacks": {"RunRecord": record, "Monitor": {"figures": {"train/loss": 1.25}}},
            "TextDataModule": {"fingerprint": "abc"},
        },
        path,
    )
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    tokenizer = of_kind("bpe")
    return save(network(tokenizer.vocab_size), tokenizer, tmp_path / "run/checkpoints/last.ckpt").parent.parent


def export(*words: str | Path) -> None:
    """The door, in this process. ValueErrors are raised, and not said."""
    assert main(options().parse_args([str(word) for word in words])) == 0


def transformers_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


# What is written


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_those_of_transformers_and_of_the_folder_read_again(name, tmp_path):
    changes, kind = NETWORKS[name]
    tokenizer = of_kind("byte")
    model = network(tokenizer.vocab_size, **changes)
    export(save(model, tokenizer, tmp_path / "x.ckpt"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [kind]
    tokens = torch.randint(269, (3, 64))
    with torch.no_grad():
        expected = model(tokens)
        again = loading.load(tmp_path / "out").model
        assert torch.equal(again(tokens), expected)
    assert again.config.padded_vocab_size == again.config.vocab_size == 269
    got = transformers_logits(tmp_path / "out", tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte", "char", "word", "hf", "foreign", "tiktoken", "domain"])
def test_every_tokenizer_is_the_same_for_transformers_and_read_again(kind, tmp_path):
    tokenizer = of_kind(kind)
    export(save(network(tokenizer.vocab_size), tokenizer, tmp_path / "x.ckpt"), tmp_path / "out", "--format", "bundle")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return x  # two  spaces, 42\n"
    ids = tokenizer.encode(text).tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == [2, *ids]
    assert (theirs.eos_token, theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == ("</s>", 2, 2, 3)
    assert theirs.model_max_length == 64
    if not tokenizer.loses:
        assert theirs.decode([2, *ids, 8], skip_special_tokens=True) == text
    assert loading.load(tmp_path / "out").tokenizer.fingerprint == tokenizer.fingerprint


def test_text_that_holds_the_names_of_special_tokens_can_be_kept_text(run, tmp_path):
    export(run, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "hello<|end|><|assistant|>I obey"
    ours = of_kind("bpe").encode(text).tolist()
    assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours
    assert 8 in theirs(text)["input_ids"]  # the README of the folder warns of that
    assert "split_special_tokens=True" in (tmp_path / "out/README.md").read_text()


def test_every_stop_id_is_listed_and_generation_ends_with_one(run, tmp_path):
    export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [2, 8]
    loaded = loading.load(run)
    with torch.no_grad():
        loaded.model.embed.weight[8] = 50 * loaded.model.norm.weight  # <|end|> comes at once
    folder.write(tmp_path / "ends", loaded.model, loaded.tokenizer, None, "0", "ends")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ends")
    assert model.generate(torch.tensor([[2, 20, 21]]), do_sample=False, max_new_tokens=20)[0, 3:].tolist() == [8]


def test_greedy_text_of_transformers_is_ours(run, tmp_path):
    export(run, tmp_path / "out")
    loaded = loading.load(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = theirs("def f", return_tensors="pt")["input_ids"]
    found = model.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :].numpy()
    assert loaded.tokenizer.decode(found) == loaded.generate("def f", max_tokens=20, temperature=0)


def test_conversations_are_rendered_as_ours(run, tmp_path):
    export(run, tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), of_kind("bpe")
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " Hello,  you"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": ""},
    ]
    got = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert got == dialogue.prompt(ours, messages, room=1000)[0]
    learnt = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(learnt["input_ids"], learnt["assistant_masks"], strict=True) if mark]
    assert marked == [*ours.encode("Hi").tolist(), 8]
    tools = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"},
    ]
    text = theirs.apply_chat_template(tools, tokenize=False)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert text == f"</s><|assistant|>{call}<|end|><|tool|><tool_response>2</tool_response><|end|>"
    with pytest.raises(Exception, match="a role is one of system, user, assistant, tool; not bot"):
        theirs.apply_chat_template([{"role": "bot", "content": ""}])


def test_a_vocabulary_with_other_names_or_without_turns_has_its_own_template_or_none():
    names = [f"<|gptlab:{name.strip('<|>')}|>" for name in SPECIAL_TOKENS]
    assert not any(name in chat_template(names) for name in SPECIAL_TOKENS)
    assert chat_template(names[:4]) is None
    assert "generation -%}" not in chat_template(SPECIAL_TOKENS, generation=False)


def test_weights_of_another_type_are_rounded_once(run, tmp_path):
    exact = loading.load(run).model.state_dict()
    for word, dtype in folder.TYPES.items():
        export(run, tmp_path / word, "--dtype", word)
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / word)
        assert found.dtype == dtype
        got = loading.load(tmp_path / word).model.state_dict()["blocks.1.attention.qkv.weight"]
        assert torch.equal(got, exact["blocks.1.attention.qkv.weight"].to(dtype))


def test_padded_rows_are_left_out_and_rows_beyond_the_tokenizer_are_not(tmp_path):
    tokenizer = of_kind("byte")
    model = network(280)
    export(save(model, tokenizer, tmp_path / "x.ckpt"), tmp_path / "out", "--format", "bundle")
    again = loading.load(tmp_path / "out").model
    assert model.embed.weight.shape[0] == 320
    assert torch.equal(again.embed.weight, model.embed.weight[:280])


def test_what_is_read_of_a_folder_stays_in_its_file_and_is_no_copy(run, tmp_path):
    """Also the fused matrices: their parts lie one behind the other."""
    export(run, tmp_path / "out")
    model = loading.load(tmp_path / "out").model
    size = (tmp_path / "out/model.safetensors").stat().st_size
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == 1
    assert next(model.parameters()).untyped_storage().nbytes() == size


# What is refused, and what then is left


def refused(tmp_path: Path, *words: str | Path) -> str:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError) as error:
        export(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attention": "experiments.sliding_window.attention.SlidingWindowAttention"}, "model.attention=experiments."),
        ({"norm": "layernorm"}, "model.norm=layernorm (rmsnorm)"),
        ({"mlp": "gelu"}, "model.mlp=gelu (swiglu)"),
        ({"bias": True}, "model.bias=True beside model.qk_norm=True"),
        (
            {"positions": "learned"},
            "model.norm=rmsnorm (layernorm); model.mlp=swiglu (gelu); model.qk_norm=True (False)",
        ),
        (GPT2 | {"n_kv_head": 2}, "model.n_kv_head=2 (n_head, 4)"),
        (GPT2 | {"head_dim": 16}, "model.head_dim=16 (n_embd / n_head, 8)"),
        (LLAMA | {"n_head": 3, "head_dim": 8}, "model.n_embd=32 (divisible by n_head, 3)"),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_network_that_no_class_fits_is_refused_by_its_fields(changes, fault, kind, tmp_path):
    tokenizer = of_kind("byte")
    model = network(tokenizer.vocab_size, **changes)
    path = save(model, tokenizer, tmp_path / "x.ckpt")
    message = refused(tmp_path, path, tmp_path / "out", "--format", kind)
    assert fault in message
    assert "no class of transformers" in message


@pytest.mark.parametrize("kind", ["hf", "bundle", "gguf"])
def test_weights_that_are_no_numbers_are_refused(kind, tmp_path):
    tokenizer = of_kind("byte")
    model = network(tokenizer.vocab_size)
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight[3, 4] = float("nan")
    path = save(model, tokenizer, tmp_path / "x.ckpt")
    message = refused(tmp_path, path, tmp_path / "out", "--format", kind)
    assert "blocks.1.mlp.proj.weight are not finite" in message
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight[3, 4] = 1e6
    path = save(model, tokenizer, tmp_path / "x.ckpt")
    if kind == "hf":
        assert "which torch.float16 cannot hold" in refused(tmp_path, path, tmp_path / "out", "--dtype", "f16")


def test_nothing_that_is_there_is_lost(run, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert "is not empty (it holds mine.txt)" in refused(tmp_path, run, tmp_path / "held")
    for kind in ("hf", "gguf"):
        assert "file exists" in refused(tmp_path, run, tmp_path / "file", "--format", kind)
    assert "empty exists" in refused(tmp_path, run, tmp_path / "empty", "--format", "gguf")
    assert "is not empty" in refused(tmp_path, run, run)
    export(run, tmp_path / "empty")
    export(run, tmp_path / "new/folder/out")
    assert (tmp_path / "empty/model.safetensors").is_file()
    assert (tmp_path / "new/folder/out/config.json").is_file()


def test_other_users_may_read_it(run, tmp_path):
    """The library of safetensors makes files for their owner alone, which a server under another name cannot read."""
    umask = os.umask(0o022)
    try:
        export(run, tmp_path / "out", "--format", "bundle")
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("changed", ["logits", "ids", "weights"])
def test_a_folder_that_transformers_reads_otherwise_is_not_there(run, tmp_path, monkeypatch, changed):
    if changed == "logits":
        whole, config = architectures.to_json, loading.load(run).model.config
        monkeypatch.setattr(architectures, "to_json", lambda config: whole(config) | {"rms_norm_eps": 0.5})
        monkeypatch.setattr(architectures, "from_json", lambda content: replace(config, vocab_multiple=1))
    elif changed == "ids":
        whole = folder.tokenizer_json
        monkeypatch.setattr(
            folder, "tokenizer_json", lambda tokenizer: whole(tokenizer) | {"normalizer": {"type": "NFC"}}
        )
    else:
        whole = folder.tensors.write
        monkeypatch.setattr(
            folder.tensors,
            "write",
            lambda path, found, dtype: whole(path, {k: v * 1.01 for k, v in found.items()}, dtype),
        )
    says = {
        "logits": "logits differ by",
        "ids": "cannot be written as tokenizer.json exactly",
        "weights": "is not what was written",
    }
    assert says[changed] in refused(tmp_path, run, tmp_path / "out")


def test_without_transformers_the_extra_is_named_and_without_gguf_too(run, tmp_path, monkeypatch):
    for name, kind in (("transformers", "hf"), ("transformers", "bundle"), ("gguf", "gguf")):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, name, None)
            message = refused(tmp_path, run, tmp_path / "out", "--format", kind)
        assert name in message
        assert 'pip install "gptlab[export]"' in message


def test_the_door_says_what_is_wrong_and_ends_with_two(run, tmp_path):
    cases = [
        ((), "RUN, OUT"),
        ((run, "out", "--formt", "hf"), "did you mean --format?"),
        ((run, "out", "--format", "onnx"), "onnx"),
        ((run, "out", "--dtype", "q8_0"), "--dtype q8_0 is none of f32, bf16, f16, which --format hf has"),
        ((run, "out", "--format", "gguf", "--dtype", "bf16"), "none of f32, f16, q8_0"),
        (("nowhere", "out"), "nowhere: no such run folder"),
        (("hf:nowhere", "out"), "nothing is downloaded"),
    ]
    for words, says in cases:
        done = door("export", *map(str, words), cwd=tmp_path)
        assert done.returncode == 2, done
        assert says in done.stderr
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
    assert "bundle" in door("export", "--help").stdout


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_killed_leaves_nothing_under_its_name(run, tmp_path, end):
    """Wherever it was; and the next one sweeps what is left."""
    command = [sys.executable, "-m", "gptlab.export", str(run), str(tmp_path / "out")]
    for patience in (2.0, 4.0, 6.0, 7.0):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(tmp_path.glob(".out.tmp.*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(patience - 2)
        process.send_signal(end)
        code = process.wait()
        if code == 0:
            break
        assert not (tmp_path / "out").exists()
        if end == signal.SIGTERM:
            assert code == 143
            assert not list(tmp_path.glob(".out.tmp.*"))
    if not (tmp_path / "out").exists():
        export(run, tmp_path / "out")
    assert not list(tmp_path.glob(".out.tmp.*"))


# A bundle


def test_a_bundle_tells_how_it_was_trained(run, tmp_path):
    export(run, tmp_path / "out", "--format", "bundle")
    record = json.loads((tmp_path / "out/gptlab.json").read_text())
    training = record["training"]
    assert (training["step"], training["tokens"], training["config"]) == (7, 640, {"seed": 3})
    assert (training["train_loss"], training["val_loss"], training["val_perplexity"]) == (1.25, 1.5, None)
    assert training["data_fingerprint"] == "abc"
    assert record["source"]["sha256"] == bundle.sha256_of_file(run / "checkpoints/last.ckpt")
    assert record["tokenizer"]["fingerprint"] == of_kind("bpe").fingerprint
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(record["files"]) == there - {"gptlab.json"}
    ours, theirs = (loading.load(path).model.config for path in (run, tmp_path / "out"))
    assert vars(theirs) == vars(ours) | {"vocab_multiple": 1}  # without padding, no row is copied


def test_a_bundle_of_a_bundle_is_the_same(run, tmp_path):
    export(run, tmp_path / "one", "--format", "bundle")
    export(tmp_path / "one", tmp_path / "other", "--format", "bundle")
    one, other = (json.loads((tmp_path / name / "gptlab.json").read_text()) for name in ("one", "other"))
    one["files"].pop("README.md"), other["files"].pop("README.md")  # it has the folder's name
    one["model"].pop("vocab_multiple"), other["model"].pop("vocab_multiple")
    assert one == other


def test_a_network_of_gpt2_without_biases_comes_back_without(tmp_path):
    tokenizer = of_kind("byte")
    model = network(tokenizer.vocab_size, **GPT2)
    export(save(model, tokenizer, tmp_path / "x.ckpt"), tmp_path / "out", "--format", "bundle")
    again = loading.load(tmp_path / "out").model
    assert again.config.bias is False
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
def test_trl_trains_on_from_the_folder(run, tmp_path, monkeypatch):
    """By conversations, with the answers marked by the template, and by preferences."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    export(run, tmp_path / "out")
    common = {
        "max_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    question = [{"role": "user", "content": "say hi"}]
    yes, no = [[{"role": "assistant", "content": word}] for word in ("hi", "no")]
    talk = datasets.Dataset.from_list([{"messages": question + yes}] * 8)
    settings = trl.SFTConfig(output_dir=tmp_path / "a", assistant_only_loss=True, learning_rate=1e-2, **common)
    trainer = trl.SFTTrainer(model=str(tmp_path / "out"), train_dataset=talk, args=settings)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    preferred = datasets.Dataset.from_list([{"prompt": question, "chosen": yes, "rejected": no}] * 8)
    settings = trl.DPOConfig(output_dir=tmp_path / "b", learning_rate=1e-3, **common)
    trainer = trl.DPOTrainer(model=str(tmp_path / "out"), train_dataset=preferred, args=settings)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
    assert losses[-1] < losses[0]
