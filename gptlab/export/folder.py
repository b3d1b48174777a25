"""A folder as transformers, vLLM and trl load it: written, loaded again with transformers, and compared."""

import json
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptlab import architectures, exported, tensors, weight_names
from gptlab.checkpoint import build
from gptlab.export.template import END, chat_template
from gptlab.export.vocabulary import special_names, tokenizer_json
from gptlab.model import GPT
from gptlab.pieces import contents
from gptlab.tokenizer import EOS_ID, PAD_ID, SentencePieceTokenizer, Tokenizer

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = 1e-4  # of the largest logit; float32 that adds up in another order differs by a tenth of that
SAMPLES = 100  # texts made of the vocabulary's own pieces
TEXTS = (
    *("Once upon a time", "  two  spaces and a tab\t.\n\n\n", "def f(x):\n    return x ** 2  # 3.14159\r\n", "\n"),
    *(
        "¿Quién? Él, señor. Straße, naïve, Ελληνικά",
        "日本語の文章 and 中文",
        "👩‍👩‍👧 emoji \u200d\ufe0f",
        "e\u0301 \u212b \ufb01",
    ),
    *("don't I'LL we've 12345678 1,000.50", "\u2581\u2581 \u2585 \ufeff\ufffd\x00\x1f", "x" * 300, " " * 40 + "end"),
    *(
        "<s> </s> <|user|> <|end|> <tool_call> <0x41> <unk>",
        "https://example.org/a_b?c=d&e=%20",
        "\u00a0\u2003\u3000 a",
    ),
)
HOW_TO = """# {name}

A {model_class} of {parameters:.3g} M parameters, trained with gptlab {version}.

A text begins with `{begin}`, the end of the one before: the tokenizer puts it there, and the chat template too. It ends
with {ends}. Text that others wrote may hold the names of special tokens; they are taken for text with
`tokenizer(text, split_special_tokens=True)`.
"""


def library() -> ModuleType:
    """transformers, quiet and without a network. Raises ValueError where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f'this export is checked with transformers ({error}): pip install "gptlab[export]"') from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def write(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None, version: str, name: str) -> None:
    """Write all files but gptlab.json to `folder`, which is made. Weights are of `dtype`, or of their own type."""
    config, weights = model.config, model.state_dict()
    require_finite(weights, dtype)
    theirs = weight_names.to_theirs(config, weights)
    vocabulary = tokenizer_json(tokenizer)
    folder.mkdir()
    tensors.write(folder / exported.WEIGHTS, theirs, dtype)
    names, ends = special_names(tokenizer), stop_ids(tokenizer)
    kind = str(dtype or weights["embed.weight"].dtype).removeprefix("torch.")
    ids = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    own = architectures.to_json(config) | ids
    write_json(folder / exported.CONFIG, own | {"dtype": kind, "torch_dtype": kind})
    write_json(folder / "generation_config.json", ids | {"eos_token_id": ends})
    write_json(folder / "tokenizer.json", vocabulary)
    settings = {"bos_token": names[EOS_ID], "eos_token": names[EOS_ID], "pad_token": names[PAD_ID]}
    settings |= {"unk_token": names[0], "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    settings |= {"model_max_length": config.block_size, "clean_up_tokenization_spaces": False}
    settings |= {"chat_template": template} if (template := chat_template(names)) else {}
    write_json(folder / "tokenizer_config.json", settings)
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
    tokenizer.save(folder / "tokenizer")  # by which gptlab loads exactly this one again
    about = {
        "name": name,
        "model_class": own["architectures"][0],
        "parameters": sum(tensor.numel() for tensor in theirs.values()) / 1e6,
        "version": version,
        "begin": names[EOS_ID],
        "ends": " or ".join(f"`{names[i]}`" for i in ends),
    }
    (folder / "README.md").write_text(HOW_TO.format(**about), encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text or a turn."""
    return [EOS_ID, *(i for i, name in enumerate(tokenizer.special_tokens) if name == END)]


def require_finite(weights: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise ValueError for weights that are no numbers, or none in the type that they are written in."""
    for name, tensor in weights.items():
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError(
                f"the weights in {name} are not finite: the run has diverged; choose an older --checkpoint"
            )
        if dtype is not None and largest > torch.finfo(dtype).max:
            raise ValueError(f"--dtype: {name} has {largest:.3g}, which {dtype} cannot hold; use bf16 or f32")


def check(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None) -> float:
    """The largest difference of logits between transformers and gptlab, both of which load the folder.

    Raises ValueError where it is more than rounding, where ids differ, or where the folder has other weights than
    `model`.
    """
    transformers = library()
    check_tokenizer(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), tokenizer)
    config, weights, again, _ = exported.load(folder)
    if again.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{folder}: its tokenizer is not the one that was written")
    for name, tensor in model.state_dict().items():
        kept = tensor[: config.vocab_size] if name in exported.TABLES else tensor
        if not torch.equal(kept.to(dtype or kept.dtype), weights[name]):
            raise ValueError(f"{folder}: {name} is not what was written")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    tokens = torch.randint(
        config.vocab_size, (2, min(config.block_size, 64)), generator=torch.Generator().manual_seed(0)
    )
    tokens[:, 0] = EOS_ID
    with torch.inference_mode():
        expected, got = build(config, weights).float()(tokens), theirs(tokens).logits
    difference = (expected - got).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(f"transformers' logits differ by {difference:.3g}: nothing was exported; please report this")
    return difference


def check_tokenizer(theirs: Any, ours: Tokenizer) -> None:
    """Raise ValueError where transformers makes other ids of a text than gptlab."""
    is_unigram = isinstance(ours, SentencePieceTokenizer) and contents(ours.model)[0] == "unigram"
    for text in (*TEXTS, *samples(ours)):
        ids = ours.encode(text).tolist()
        for begins in (False, True):
            got = theirs(text, add_special_tokens=begins, split_special_tokens=True)["input_ids"]
            wanted = [EOS_ID] * begins + ids
            tied = is_unigram and sorted(got) == sorted(wanted)  # equally likely: rounding chooses the order
            if got != wanted and not tied:
                raise ValueError(
                    f"this tokenizer cannot be written as tokenizer.json exactly: {text[:60]!r} has the ids {ids[:20]} "
                    f"here, and {got[:20]} there"
                )


def samples(tokenizer: Tokenizer) -> list[str]:
    """Texts that a vocabulary can spell, made of its pieces at random."""
    drawn = torch.randint(tokenizer.vocab_size, (SAMPLES, 12), generator=torch.Generator().manual_seed(0))
    return [tokenizer.decode(row.numpy()).replace("\ufffd", "?") for row in drawn]
