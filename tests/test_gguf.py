"""GGUF: the file holds the network and vocabulary; and llama.cpp, where it is installed, reads them as we do."""

import json

import numpy as np
import pytest
import tokenizers as tokenizers_library
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from kinds import of_kind, train
from test_export import GPT2, LLAMA, NETWORKS, export, network, save

from gptlab.borrowed import HuggingFaceTokenizer
from gptlab.export.folder import TEXTS, samples
from gptlab.export.ggml_vocabulary import LLAMA_3, vocabulary_of
from gptlab.export.gguf import interleaved
from gptlab.export.vocabulary import split, tokenizer_json
from gptlab.tokenizer import SPECIAL_TOKENS

EXACT = ["bpe", "domain", "byte", "hf", "hf-domain", "foreign", "tiktoken"]


def written(tmp_path, tokenizer, dtype: str = "f32", **changes):
    """The network, and the file that it was written to."""
    model = network(tokenizer.vocab_size, **{"n_embd": 64, "n_head": 4} | changes)
    path = tmp_path / "model.gguf"
    export(save(model, tokenizer, tmp_path / "x.ckpt"), path, "--format", "gguf", "--dtype", dtype)
    return model, path


def value(reader: GGUFReader, key: str):
    return reader.fields[key].contents()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_is_there_under_its_name(name, tmp_path):
    changes, _ = NETWORKS[name]
    model, path = written(tmp_path, of_kind("byte"), **changes)
    reader = GGUFReader(path)
    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    config = model.config
    kind = value(reader, "general.architecture")
    assert (
        kind == {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2"}[NETWORKS[name][1]]
    )
    assert ("output.weight" in found) == (not config.tie_embeddings)
    assert np.array_equal(found["token_embd.weight"], model.embed.weight[:269].detach())
    block = model.blocks[1]
    assert np.array_equal(found["blk.1.ffn_down.weight"], block.mlp.proj.weight.detach())
    q, k, v = block.attention.qkv.weight.detach().split(
        [n * config.head_width for n in (4, config.kv_heads, config.kv_heads)]
    )
    if kind == "gpt2":
        assert np.array_equal(found["blk.1.attn_qkv.weight"], torch.cat((q, k, v)))
        assert found["blk.1.attn_norm.bias"].shape == (64,)
        return
    assert np.array_equal(found["blk.1.attn_v.weight"], v)
    if kind == "qwen3":
        assert np.array_equal(found["blk.1.attn_q.weight"], q)
        assert np.array_equal(found["blk.1.attn_q_norm.weight"], block.attention.q_norm.weight.detach())
    else:  # channel i and i + E / 2 have become neighbours
        half = config.head_width // 2
        got = found["blk.1.attn_k.weight"].reshape(config.kv_heads, -1, 64)
        assert np.array_equal(got[:, 0::2], k.reshape(config.kv_heads, -1, 64)[:, :half])
        assert np.array_equal(got[:, 1::2], k.reshape(config.kv_heads, -1, 64)[:, half:])
    assert value(reader, f"{kind}.attention.key_length") == config.head_width
    assert value(reader, f"{kind}.rope.freq_base") == pytest.approx(config.rope_theta)
    assert value(reader, f"{kind}.attention.layer_norm_rms_epsilon") == pytest.approx(config.norm_eps)
    assert value(reader, f"{kind}.context_length") == config.block_size


def test_biases_are_interleaved_as_their_rows_are():
    rows, bias = torch.randn(24, 5), torch.randn(24)
    both = interleaved(torch.cat((rows, bias[:, None]), dim=1), 6)
    assert torch.equal(interleaved(rows, 6), both[:, :5])
    assert torch.equal(interleaved(bias, 6), both[:, 5])


@pytest.mark.parametrize(("dtype", "most"), [("f16", 2e-3), ("q8_0", 2e-2)])
def test_smaller_types_are_close_and_norms_stay_exact(dtype, most, tmp_path):
    model, path = written(tmp_path, of_kind("byte"), dtype)
    whole = written(tmp_path / "f32", of_kind("byte"))[1] if (tmp_path / "f32").mkdir() is None else None
    assert path.stat().st_size < 0.65 * whole.stat().st_size
    for tensor in GGUFReader(path).tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            exact = model.blocks[0].mlp.gate_up.weight[model.config.hidden_width :].detach().numpy()
            error = np.abs(dequantize(tensor.data, tensor.tensor_type) - exact).max()
            assert 0 < error < most * np.abs(exact).max()
            assert tensor.tensor_type.name.lower() == dtype
        if "norm" in tensor.name:
            assert tensor.tensor_type.name == "F32"


def test_rows_that_no_block_divides_are_f16(tmp_path):
    _, path = written(tmp_path, of_kind("byte"), "q8_0", n_embd=48)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q8_0"


@pytest.mark.parametrize("kind", EXACT)
def test_the_vocabulary_is_there(kind, tmp_path):
    tokenizer = of_kind(kind)
    _, path = written(tmp_path, tokenizer, n_embd=32)
    reader = GGUFReader(path)
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert tokens[:13] == list(SPECIAL_TOKENS)
    assert len(tokens) == len(types) == tokenizer.vocab_size
    for key, number in (("bos", 2), ("eos", 2), ("padding", 3), ("unknown", 0), ("eot", 8)):
        assert value(reader, f"tokenizer.ggml.{key}_token_id") == number
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.ggml.add_space_prefix") is False
    assert "<|assistant|>" in value(reader, "tokenizer.chat_template")
    model = value(reader, "tokenizer.ggml.model")
    assert model == ("llama" if kind in ("bpe", "domain") else "gpt2")
    for domain in tokenizer.domain_tokens:
        assert types[tokens.index(domain)] == 4
    if model == "gpt2":
        merges = [" ".join(pair) for pair in tokenizer_json(tokenizer)["model"]["merges"]]
        assert value(reader, "tokenizer.ggml.merges") == merges or kind == "byte"
    else:
        assert value(reader, "tokenizer.ggml.scores") == [tokenizer.score(i) for i in range(tokenizer.vocab_size)]


def test_rows_beyond_the_tokenizer_have_names(tmp_path):
    for kind in ("byte", "bpe"):
        tokenizer = of_kind(kind)
        vocabulary = vocabulary_of(tokenizer, tokenizer.vocab_size + 3)
        assert len(vocabulary.tokens) == len(vocabulary.types) == tokenizer.vocab_size + 3
        assert vocabulary.tokens[-1] == f"[PAD{tokenizer.vocab_size + 2}]"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("unigram", "unigram tokenizer does not spell in bytes"),
        ("char", "no tokenizer like CharTokenizer"),
        ("word", "no tokenizer like WordTokenizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(kind, says, tmp_path):
    tokenizer = of_kind(kind)
    with pytest.raises(ValueError, match=says):
        written(tmp_path, tokenizer)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        ({}, "gpt-2"),
        ({"pre_tokenizer": LLAMA_3}, "llama-bpe"),
        ({"pre_tokenizer": LLAMA_3.replace("{1,3}", "")}, "qwen2"),
        ({"pre_tokenizer": r"\s+"}, None),
        ({"normalizer": {"type": "NFC"}}, None),
    ],
)
def test_how_text_is_cut_has_a_name_in_llama_cpp_or_is_refused(changes, cut):
    content = json.loads(of_kind("hf").json)
    if isinstance(pattern := changes.get("pre_tokenizer"), str):
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        changes = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(pattern), level]}}
    tokenizer = HuggingFaceTokenizer(json.dumps(content | changes).encode())
    if cut is None:
        with pytest.raises(ValueError, match=r"llama\.cpp"):
            vocabulary_of(tokenizer, tokenizer.vocab_size)
    else:
        assert vocabulary_of(tokenizer, tokenizer.vocab_size).pre == cut


def test_a_file_that_is_not_what_was_to_be_written_is_refused(tmp_path, monkeypatch):
    import gguf

    whole = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensor_data", lambda self, array: whole(self, array * array.dtype.type(1.1))
    )
    with pytest.raises(ValueError, match="is not what was written"):
        written(tmp_path, of_kind("byte"))
    assert not list(tmp_path.glob("*.gguf"))


# llama.cpp itself: pip install llama-cpp-python


def evaluated(path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits after each of `ids`."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_llama_cpp_has_the_same_logits(name, tmp_path):
    pytest.importorskip("llama_cpp")
    model, path = written(tmp_path, of_kind("byte"), **NETWORKS[name][0])
    ids = [2, *torch.randint(13, 269, (50,), generator=torch.Generator().manual_seed(0)).tolist()]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    got = evaluated(path, ids)
    assert np.abs(got - expected).max() < 0.005 * np.abs(expected).max()  # its cache of keys and values is float16
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("changes", [{}, LLAMA, GPT2 | {"bias": True}], ids=["qwen3", "llama", "gpt2"])
def test_llama_cpp_is_close_with_smaller_types(dtype, changes, tmp_path):
    pytest.importorskip("llama_cpp")
    model, path = written(tmp_path, of_kind("byte"), dtype, init_std=0.05, **changes)
    ids = [2, *range(20, 60)]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    got = torch.tensor(evaluated(path, ids)).log_softmax(dim=-1)
    divergence = (expected.exp() * (expected - got)).sum(dim=-1).mean()
    assert divergence < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*EXACT, "llama 3's cut"])
def test_llama_cpp_makes_the_same_ids(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = of_kind(kind) if kind in EXACT else with_llama_3_cut()
    _, path = written(tmp_path, tokenizer)
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    different = []
    for text in (*TEXTS, *samples(tokenizer)):
        if "\x00" in text:  # the end of a text in C
            continue
        got = llama.tokenize(text.encode(), add_bos=False, special=False)
        if got != tokenizer.encode(text).tolist():
            different.append((text, got, tokenizer.encode(text).tolist()))
    assert different == []
    assert llama.tokenize(b"a b", add_bos=True, special=False)[0] == 2
    assert 8 in llama.tokenize(b"a<|end|>", special=True)


def with_llama_3_cut() -> HuggingFaceTokenizer:
    content = json.loads(train("hf").json)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split(LLAMA_3), level]}
    content["model"]["ignore_merges"] = True
    assert tokenizers_library.Tokenizer.from_str(json.dumps(content))
    return HuggingFaceTokenizer(json.dumps(content).encode())
