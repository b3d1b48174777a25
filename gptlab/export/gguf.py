"""A GGUF file, which llama.cpp and all that is built on it load, written with the package `gguf`."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlab import architectures, weight_names
from gptlab.export.folder import require_finite, stop_ids
from gptlab.export.ggml_vocabulary import BytePairs, Vocabulary, vocabulary_of
from gptlab.export.template import chat_template
from gptlab.model import GPT, GPTConfig
from gptlab.tokenizer import EOS_ID, PAD_ID, UNK_ID, Tokenizer

BLOCK = 32  # numbers that share a scale in Q8_0
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
NAMES = {  # of our modules
    "embed": "token_embd",
    "position": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.qkv": ("attn_q", "attn_k", "attn_v"),
    "attention.proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.up": "ffn_up",
    "mlp.proj": "ffn_down",
}


class Part(NamedTuple):
    """A tensor of the file. No copy of its numbers is made before it is written."""

    name: str
    tensor: Tensor
    head_width: int | None  # where the rows of heads of this width are to be interleaved
    kind: str  # f32, f16 or q8_0

    def numbers(self) -> np.ndarray:
        tensor = self.tensor.detach().float()
        return (tensor if self.head_width is None else interleaved(tensor, self.head_width)).contiguous().numpy()

    def array(self, gguf: ModuleType) -> np.ndarray:
        """The numbers in the type of the file."""
        if self.kind == "q8_0":
            return gguf.quants.quantize(self.numbers(), gguf.GGMLQuantizationType.Q8_0)
        return self.numbers().astype(self.numpy_type)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array: a block of Q8_0 is a scale of two bytes, and a byte for each number."""
        *rows, columns = self.tensor.shape
        return (*rows, columns // BLOCK * (BLOCK + 2) if self.kind == "q8_0" else columns)

    @property
    def numpy_type(self) -> np.dtype:
        return np.dtype({"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[self.kind])


def library() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(f'--format=gguf needs gguf ({error}): pip install "gptlab[export]"') from error


def write(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str, name: str) -> None:
    """Write network and tokenizer to one file, and read it again. Matrices are of `dtype`, and all else is float32."""
    gguf, config = library(), model.config
    vocabulary, kind = vocabulary_of(tokenizer, config.vocab_size), architectures.model_type(config)
    require_finite(model.state_dict(), torch.float16 if dtype == "f16" else None)
    parts = list(tensors(config, kind, model.state_dict(), dtype))
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe_network(writer, config, kind)
    describe_vocabulary(writer, vocabulary, tokenizer)
    for part in parts:
        size = math.prod(part.shape) * part.numpy_type.itemsize
        word = getattr(gguf.GGMLQuantizationType, part.kind.upper())
        writer.add_tensor_info(part.name, part.shape, part.numpy_type, size, word)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        writer.write_tensor_data(part.array(gguf))
    writer.close()
    check(gguf, path, parts, vocabulary)


def describe_network(writer: Any, config: GPTConfig, kind: str) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.n_head)
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def describe_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if isinstance(vocabulary, BytePairs):
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(EOS_ID)  # a text begins with the end of the one before
    writer.add_eos_token_id(EOS_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_unk_token_id(UNK_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if len(stops := stop_ids(tokenizer)) > 1:
        writer.add_eot_token_id(stops[1])
    if template := chat_template(vocabulary.tokens[: len(tokenizer.special_tokens)], generation=False):
        writer.add_chat_template(template)


def tensors(config: GPTConfig, kind: str, weights: dict[str, Tensor], dtype: str) -> Iterator[Part]:
    """The tensors of a file, under llama.cpp's names."""
    for place in weight_names.places(config, kind):
        module, _, role = place.ours.rpartition(".")
        layer = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            layer = f"blk.{number}."
        names = "attn_qkv" if kind == "gpt2" and module == "attention.qkv" else NAMES[module]
        names = (names,) if isinstance(names, str) else names
        own = weights.get(place.ours)
        if own is None:  # GPT-2 always has biases
            own = torch.zeros(len(weights[f"{place.ours.removesuffix('bias')}weight"]))
        if module in ("embed", "head"):
            own = own[: config.vocab_size]
        for name, part in zip(names, own.split(place.sizes) if place.sizes else (own,), strict=True):
            width = config.head_width if kind == "llama" and name in ("attn_q", "attn_k") else None
            yield Part(f"{layer}{name}.{role}", part, width, kind_of(name, part, dtype))


def kind_of(name: str, tensor: Tensor, dtype: str) -> str:
    if tensor.ndim < 2 or name == "position_embd":
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % BLOCK else dtype


def interleaved(rows: Tensor, width: int) -> Tensor:
    """The rows of each head in the order of llama.cpp's Llama, which turns channel 2 i with 2 i + 1."""
    return rows.reshape(-1, 2, width // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def check(gguf: ModuleType, path: Path, parts: list[Part], vocabulary: Vocabulary) -> None:
    """Raise ValueError unless the file holds what was to be written."""
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if reader.fields["tokenizer.ggml.tokens"].contents() != vocabulary.tokens:
        raise ValueError(f"{path}: its tokens are not what was written; please report this")
    for part in parts:
        expected = part.numbers()
        got = gguf.quants.dequantize(found[part.name].data, found[part.name].tensor_type)
        rounding = {"f32": 0, "f16": 2.0**-11, "q8_0": 1 / 220}[part.kind]  # of the largest number
        limit = rounding * np.abs(expected).max() + (1e-7 if rounding else 0)
        if not np.abs(got.reshape(expected.shape) - expected).max() <= limit:
            raise ValueError(f"{path}: {part.name} is not what was written; please report this")
