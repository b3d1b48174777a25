"""Folders of transformers as a start and as RUN, and what damaged, foreign and hostile ones come to."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY, door
from kinds import foreign_json, of_kind
from safetensors.torch import load_file, save_file
from test_export import GPT2, LLAMA, export, network, save

from gptlab import bundle, checkpoint, exported, loading, weight_names
from gptlab.exported import folder_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMAS = SIZES | {"max_position_embeddings": 64, "rope_parameters": ROPE, "rms_norm_eps": 1e-5}
FOREIGN = {
    "llama": ("Llama", LLAMAS | {"num_key_value_heads": 2}),
    "llama, tied": ("Llama", LLAMAS | {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", LLAMAS | {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", LLAMAS | {"head_dim": 12}),
    "qwen3": ("Qwen3", LLAMAS | {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, tied": ("Qwen3", LLAMAS | {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2, untied": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40, "tie_word_embeddings": False},
    ),
}
VOCABULARY = 610  # rows, of which the tokenizer uses 601


def saved_by_transformers(path: Path, name: str, dtype: torch.dtype = torch.float32, **changes):
    """A network with random weights and a tokenizer, saved by transformers as on its hub."""
    kind, settings = FOREIGN[name]
    ids = {"bos_token_id": 600, "eos_token_id": 600} | ({} if kind == "GPT2" else {"initializer_range": 0.3})
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **settings, **ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path, **changes)
    (path / "tokenizer.json").write_text(foreign_json())
    return model


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return getattr(found, "logits", found).float()


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


# Import


@pytest.mark.parametrize("name", FOREIGN)
def test_logits_are_those_of_transformers_under_ids_moved_up(name, tmp_path):
    theirs = saved_by_transformers(tmp_path / "hf", name)
    ours, tokenizer = loading.load(tmp_path / "hf").model, loading.load(tmp_path / "hf").tokenizer
    assert tokenizer.vocab_size == 601 + 13
    assert ours.config.vocab_size == VOCABULARY + 13
    ids = torch.randint(600, (2, 64))
    ids[:, 0] = 600  # their end of text, which is </s> here
    expected, got = logits(theirs, ids), logits(ours, torch.where(ids == 600, 2, ids + 13))
    assert expected.std() > 0.1
    close(got[..., 13 : 13 + 600], expected[..., :600])
    close(got[..., 2], expected[..., 600])
    close(got[..., 13 + 601 :], expected[..., 601:])
    close(got[..., 4], expected.mean(dim=-1))  # a token that it does not know is not likely
    close(got[..., 13 + 600], expected.mean(dim=-1))


def test_text_has_the_ids_of_its_own_tokenizer_moved_up(tmp_path):
    saved_by_transformers(tmp_path / "hf", "llama")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf/tokenizer.json"))
    text = "class Parser:\n    pass  # parse"
    assert loading.load(tmp_path / "hf").tokenizer.encode(text).tolist() == [
        i + 13 for i in theirs(text, add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.parametrize("layout", ["sharded", "bf16", "without its prefix", "tables", "lists of stop ids"])
def test_ways_in_which_folders_are_saved(layout, tmp_path):
    name = "gpt2" if layout in ("without its prefix", "tables") else "llama"
    dtype = torch.bfloat16 if layout == "bf16" else torch.float32
    saved_by_transformers(tmp_path / "hf", name, dtype, **({"max_shard_size": "20KB"} if layout == "sharded" else {}))
    weights = tmp_path / "hf/model.safetensors"
    if layout == "sharded":
        assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    elif layout == "without its prefix":  # as GPT-2's own file is
        save_file({key.removeprefix("transformer."): tensor for key, tensor in load_file(weights).items()}, weights)
    elif layout == "tables":
        more = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
        save_file(load_file(weights) | more, weights)
    elif layout == "lists of stop ids":
        change(tmp_path / "hf/config.json", eos_token_id=[600, 5])
    ours = loading.load(tmp_path / "hf").model
    ids = torch.randint(600, (2, 20))
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    close(logits(ours.float(), ids + 13)[..., 13:613], logits(theirs, ids)[..., :600])


def test_begin_and_padding_of_its_own_move_too(tmp_path):
    theirs = saved_by_transformers(tmp_path / "hf", "qwen3")
    change(tmp_path / "hf/config.json", bos_token_id=7, pad_token_id=7)
    rows = loading.load(tmp_path / "hf").model.embed.weight
    table = theirs.model.embed_tokens.weight
    for ours, own in ((1, 7), (2, 600), (13 + 6, 6), (13 + 8, 8)):
        assert torch.equal(rows[ours], table[own])
    for ours in (0, 3, 4, 12, 13 + 7, 13 + 600):
        torch.testing.assert_close(rows[ours], table.mean(dim=0))


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama, tied", "qwen3"))]
)
def test_from_a_folder_through_training_to_a_folder(name, tmp_path, text_file):
    """With a learning rate of 0 nothing has changed on the way but the names of the ids."""
    theirs = saved_by_transformers(tmp_path / "hf", name)
    options = ["trainer.max_steps=2", "optimizer=adamw", "optimizer.lr=0"]
    assert trained(f"run_dir={tmp_path}/run", f"init_from=hf:{tmp_path}/hf", *options) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["parent"]["checkpoint"] == str(tmp_path / "hf")
    assert result["parent"]["sha256"] == bundle.sha256_of_file(tmp_path / "hf/model.safetensors")
    rows = checkpoint.load(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]["model.embed.weight"]
    assert len(rows) == 640  # padded for training
    export(tmp_path / "run", tmp_path / "again", "--format", "bundle")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    own = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf/tokenizer.json"))
    text = "def parse(self):\n"
    ids, moved = (each(text, add_special_tokens=False)["input_ids"] for each in (own, tokenizer))
    assert [i - 13 for i in moved] == ids
    assert tokenizer(text)["input_ids"] == [2, *moved]
    got, expected = logits(again, torch.tensor([[2, *moved]])), logits(theirs, torch.tensor([[600, *ids]]))
    close(got[..., 13:613], expected[..., :600])
    close(got[..., 2], expected[..., 600])
    assert trained(f"run_dir={tmp_path}/child", f"init_from={tmp_path}/again", *options) == 0
    assert door("train", f"resume={tmp_path}/child", "trainer.max_steps=3").returncode == 0


def trained(*overrides: str) -> int:
    """The exit code of a small run, whose network is its parent's."""
    options = ("trainer=cpu", "trainer.precision=32-true", "compile=false", "logger=csv", "samples.every_steps=null")
    data = ("data.files=text.txt", "data.batch_size=2", "schedule.warmup_steps=2", "validation.every_steps=null")
    return door("train", *options, *data, *overrides).returncode


def test_an_exported_folder_without_our_own_file_is_read_by_its_tokenizer_json(tmp_path):
    tokenizer = of_kind("hf")
    model = network(tokenizer.vocab_size)
    export(save(model, tokenizer, tmp_path / "x.ckpt"), tmp_path / "out")
    shutil.rmtree(tmp_path / "out/tokenizer")
    again = loading.load(tmp_path / "out")
    assert again.tokenizer.encode("a b").tolist() == tokenizer.encode("a b").tolist()
    assert torch.equal(again.model.embed.weight, model.embed.weight[: tokenizer.vocab_size])
    spm = of_kind("bpe")
    export(save(network(spm.vocab_size), spm, tmp_path / "y.ckpt"), tmp_path / "spm")
    shutil.rmtree(tmp_path / "spm/tokenizer")
    with pytest.raises(ValueError, match=r"not made of bytes.*copy the folder tokenizer from there"):
        loading.load(tmp_path / "spm")
    (tmp_path / "spm/tokenizer.json").unlink()
    assert loading.load(tmp_path / "spm").tokenizer.encode("a b").tolist() == spm.encode("a b").tolist()


def test_a_folder_that_transformers_saved_again_is_read_with_its_tokenizer_copied(tmp_path):
    """As after trl has gone on with it."""
    tokenizer = of_kind("bpe")
    export(save(network(tokenizer.vocab_size), tokenizer, tmp_path / "x.ckpt"), tmp_path / "out", "--format", "bundle")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs.model.norm.weight *= 2
    theirs.save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    shutil.copytree(tmp_path / "out/tokenizer", tmp_path / "again/tokenizer", dirs_exist_ok=True)
    again = loading.load(tmp_path / "again")
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    ids = torch.randint(500, (2, 20))
    close(logits(again.model, ids), logits(theirs, ids))


def test_an_import_says_what_contradicts_it(tmp_path):
    saved_by_transformers(tmp_path / "hf", "qwen3")
    (tmp_path / "text.txt").write_text("a few words " * 500)
    done = door("train", "data.files=text.txt", f"init_from=hf:{tmp_path}/hf", "model.n_layer=3", "tokenizer=byte")
    assert done.returncode == 2
    assert "model.n_layer: the parent has 2, the command line 3" in done.stderr
    done = door("train", "data.files=text.txt", "init_from=hf:org/model")
    assert done.returncode == 2
    assert "nothing is downloaded" in done.stderr


# What cannot be ours


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type='mixtral' is none of llama, qwen3, gpt2"),
        ("llama", {"model_type": ["llama"]}, "model_type="),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters={'rope_type': 'llama3'",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "rope_parameters="),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta=x"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not silu"),
        ("llama", {"sliding_window": 128}, "sliding_window=128 is not None"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not mlp_bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True is not False"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("qwen3", {"layer_types": 3}, "layer_types=3"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function=gelu is not gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        (
            "llama",
            {"vocab_size": 611},
            r"embed_tokens.weight has the shape (610, 32), and config.json calls for (611, 32)",
        ),
        ("llama", {"num_key_value_heads": 4}, "k_proj.weight has the shape (16, 32)"),
        ("llama", {"num_hidden_layers": 3}, "there is no tensor model.layers.2."),
        ("llama", {"num_hidden_layers": 1}, "there is a tensor model.layers.1."),
        ("llama", {"num_hidden_layers": 10**9}, "config.json has 1000000000 layers, and there are"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is no whole number"),
        ("llama", {"max_position_embeddings": 10**9}, "max_position_embeddings=1000000000 is no whole number"),
        ("llama", {"hidden_size": 2**30}, "(1073741824"),
        (
            "llama",
            {"hidden_size": 2**30, "vocab_size": 2**31, "intermediate_size": 2**31},
            "no network that can be made",
        ),
        ("llama", {"hidden_size": "32"}, "hidden_size=32 is no whole number"),
        ("llama", {"hidden_size": True}, "hidden_size=True"),
        ("llama", {"hidden_size": -1}, "hidden_size=-1"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_head=3"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings=no"),
    ],
)
def test_what_cannot_be_ours_is_refused_by_its_field(name, fields, says, tmp_path):
    saved_by_transformers(tmp_path / "hf", name)
    change(tmp_path / "hf/config.json", **fields)
    with pytest.raises(ValueError) as error:
        loading.load(tmp_path / "hf")
    assert says in str(error.value)
    assert str(tmp_path / "hf") in str(error.value)


def test_tensors_that_are_no_weights_are_refused(tmp_path):
    saved_by_transformers(tmp_path / "hf", "llama")
    path = tmp_path / "hf/model.safetensors"
    whole = load_file(path)
    for changes, says in (
        ({"lm_head.weight": torch.zeros(VOCABULARY, 32, dtype=torch.int8)}, "lm_head.weight is of type torch.int8"),
        ({"visual.weight": torch.zeros(1)}, "there is a tensor visual.weight"),
    ):
        save_file(whole | changes, path)
        with pytest.raises(ValueError, match=says):
            loading.load(tmp_path / "hf")


def test_a_folder_without_weights_that_hold_no_code_is_refused(tmp_path):
    saved_by_transformers(tmp_path / "hf", "llama")
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no model\.safetensors$"):
        loading.load(tmp_path / "hf")
    torch.save({"x": torch.zeros(1)}, tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin may hold code and is not read"):
        loading.load(tmp_path / "hf")


@pytest.mark.parametrize("listed", ["../x.safetensors", "/etc/passwd", "x.bin", 3, None, ["x"], "sub/x.safetensors"])
def test_an_index_that_lists_other_files_is_refused(tmp_path, listed):
    saved_by_transformers(tmp_path / "hf", "llama")
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": listed}}))
    with pytest.raises(ValueError, match="refused, it lists"):
        loading.load(tmp_path / "hf")


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "3", "[" * 100_000, '{"model_type": "llama"}'])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "gptlab.json", "model.safetensors"])
def test_any_file_may_be_damaged(tmp_path, file, content):
    export(bundle_source(tmp_path), tmp_path / "out", "--format", "bundle")
    if file != "gptlab.json":
        (tmp_path / "out/gptlab.json").unlink()
        shutil.rmtree(tmp_path / "out/tokenizer")
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(ValueError) as error:
        loading.load(tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)


def bundle_source(tmp_path: Path) -> Path:
    tokenizer = of_kind("hf")
    path = tmp_path / "x.ckpt"
    return path if path.exists() else save(network(tokenizer.vocab_size), tokenizer, path)


def test_a_device_or_a_pipe_is_no_file(tmp_path):
    saved_by_transformers(tmp_path / "hf", "llama")
    for name in ("config.json", "model.safetensors"):
        whole = (tmp_path / "hf" / name).read_bytes()
        (tmp_path / "hf" / name).unlink()
        (tmp_path / "hf" / name).symlink_to("/dev/zero")
        with pytest.raises(ValueError):
            loading.load(tmp_path / "hf") if folder_of(tmp_path / "hf") else pytest.fail("no folder")
        (tmp_path / "hf" / name).unlink()
        (tmp_path / "hf" / name).write_bytes(whole)
    with pytest.raises(ValueError, match="refused, it has"):
        bundle.require_file(tmp_path / "hf/config.json", most=3)


# Bundles


@pytest.fixture
def packed(tmp_path) -> Path:
    export(bundle_source(tmp_path), tmp_path / "out", "--format", "bundle")
    return tmp_path / "out"


def recorded(path: Path, **fields) -> None:
    """The record, changed, with the hashes of the files as they are now."""
    record = json.loads((path / "gptlab.json").read_text()) | fields
    if "files" not in fields:
        record["files"] = {name: bundle.described(path / name) for name in record["files"]}
    (path / "gptlab.json").write_text(json.dumps(record))


def test_every_file_of_a_bundle_is_verified(packed):
    for name in json.loads((packed / "gptlab.json").read_text())["files"]:
        path = packed / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{path.name}: damaged or changed, its sha256"):
            loading.load(packed)
        path.write_bytes(whole + b" ")
        with pytest.raises(ValueError, match=rf"{path.name}: damaged, it has \d+ bytes"):
            loading.load(packed)
        path.unlink()
        with pytest.raises(ValueError, match=rf"{path.name}: No such file"):
            loading.load(packed)
        path.write_bytes(whole)
    loading.load(packed)
    assert door("export", str(packed), "again").returncode == 0
    (packed / "config.json").write_text("{}")
    done = door("export", str(packed), "once more")
    assert done.returncode == 2
    assert "config.json" in done.stderr


def test_loading_a_bundle_imports_nothing_that_is_heavy(packed):
    program = f"import sys; from gptlab import loading; loading.load({str(packed)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    heavy = {"transformers", "safetensors", "lightning", "torchmetrics", "hydra", "gguf", "yaml"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "tokenizer/../../x", "a/b/c", "", ".", "..", "a\\b", "x\ny", "-rf"]
)
def test_a_bundle_that_lists_what_is_not_its_own_is_refused(packed, name):
    files = json.loads((packed / "gptlab.json").read_text())["files"]
    recorded(packed, files=files | {name: {"bytes": 3, "sha256": "x"}})
    with pytest.raises(ValueError, match="refused, it lists"):
        loading.load(packed)


def test_a_bundle_with_more_files_than_it_lists_is_refused(packed):
    for name in ("gptlab_tokenizer.json", "model.safetensors.index.json", "tokenizer/tokenizer.model"):
        (packed / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"{name}: refused, gptlab.json does not list it"):
            loading.load(packed)
        (packed / name).unlink()
    (packed / ".git").mkdir()
    for name in (".DS_Store", ".git/config"):
        (packed / name).write_text("x")
    loading.load(packed)
    files = json.loads((packed / "gptlab.json").read_text())["files"]
    for name in ("config.json", "model.safetensors", "tokenizer/gptlab_tokenizer.json"):
        recorded(packed, files={other: known for other, known in files.items() if other != name})
        with pytest.raises(ValueError, match=r"does not list it|lists no"):
            loading.load(packed)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": 2}, "a bundle of format 2, this gptlab knows up to 1"),
        ({"format": None}, "no record of a bundle"),
        ({"files": None}, "no record of a bundle"),
        ({"files": []}, "no record of a bundle"),
        ({"model": None}, "the model in gptlab.json is none"),
        ({"model": {"n_layer": "two"}}, "the model in gptlab.json is none"),
        ({"model": {"spam": 1}}, "fields unknown to this gptlab: spam"),
        ({"model": {"vocab_size": 500}}, "model.block_size is 64 here, and 256 in gptlab.json"),
        ({"model": {"vocab_size": 500, "attention": "os.system"}}, "no class of transformers is this network"),
    ],
)
def test_a_record_that_lies_is_refused(packed, fields, says):
    recorded(packed, **fields)
    with pytest.raises(ValueError) as error:
        loading.load(packed)
    assert says in str(error.value)


def test_a_record_with_a_network_of_another_shape_is_refused(packed):
    model = json.loads((packed / "gptlab.json").read_text())["model"]
    for name, value in (("n_head", 2), ("dropout", "much"), ("dropout", 2.0), ("rope_theta", 3.0), ("n_embd", 2**40)):
        recorded(packed, model=model | {name: value})
        with pytest.raises(ValueError, match=r"gptlab\.json"):
            loading.load(packed)
    recorded(packed, model=model | {"dropout": 0.5, "vocab_multiple": 2**40})
    assert loading.load(packed).model.config.dropout == 0.5


def test_code_in_a_bundle_is_not_run(packed, tmp_path):
    """A pickle in place of weights, or of the tokenizer's own files, and a class of another package."""

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/pwned",)

    torch.save({"x": Malicious()}, packed / "model.safetensors")
    recorded(packed)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        loading.load(packed)
    shutil.rmtree(packed)
    export(bundle_source(tmp_path), packed, "--format", "bundle")
    change(packed / "tokenizer/gptlab_tokenizer.json", **{"class": "os.system"})
    recorded(packed)
    with pytest.raises(ValueError, match="trust=os"):
        loading.load(packed)
    assert not (tmp_path / "pwned").exists()


def test_a_tokenizer_of_another_size_is_refused(packed):
    of_kind("foreign").save(packed / "tokenizer")
    for old in packed.glob("tokenizer.old-*"):
        shutil.rmtree(old)
    recorded(packed)
    with pytest.raises(ValueError, match="its tokenizer has 614 ids, and its network 500"):
        loading.load(packed)


def test_no_damage_to_a_bundle_passes(packed):
    rng = random.Random(0)
    files = [path for path in packed.rglob("*") if path.is_file()]
    for _ in range(40):
        path = rng.choice(files)
        whole = path.read_bytes()
        content = bytearray(whole)
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            loaded = loading.load(packed)
        except ValueError:
            pass
        else:  # of the record itself, not all is held to something
            assert path.name == "gptlab.json"
            assert loaded.model.config.n_layer == 2
        path.write_bytes(whole)


def test_names_of_theirs_are_all_used_and_no_other():
    """What `to_ours` asks for is what `to_theirs` gives, for each kind of network."""
    for changes in ({}, LLAMA, LLAMA | {"bias": True}, GPT2, GPT2 | {"bias": True}, {"tie_embeddings": False}):
        model = network(269, **changes)
        theirs = weight_names.to_theirs(model.config, model.state_dict())
        again = weight_names.to_ours(model.config, exported_rows(theirs, model))
        assert again.keys() == model.state_dict().keys()


def exported_rows(theirs: dict, model) -> dict:
    """With the padded rows again."""
    config = model.config
    missing = config.padded_vocab_size - config.vocab_size
    return {
        name: torch.cat([tensor, torch.zeros(missing, tensor.shape[1])])
        if name in ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight")
        else tensor
        for name, tensor in theirs.items()
    }


def test_moving_rows_leaves_the_others_as_they_are():
    table = torch.randn(5, 3)
    rows = exported.moved(table, 4, {2: 4, 1: 0})
    kept = [rows[4 + i] for i in (1, 2, 3)]
    assert torch.equal(torch.stack(kept), table[1:4])
    assert torch.equal(rows[2], table[4])
    assert torch.equal(rows[1], table[0])
    assert np.allclose(rows[[0, 3, 4, 8]], table.mean(dim=0))
