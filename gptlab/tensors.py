"""Files of the safetensors format: tensors by name, read where they lie in the file and written one after another.

A file is the length of its header, in eight bytes; the header, JSON that gives each tensor's type, shape and place; and
the tensors, with nothing between them. It holds no code. The library of that name reads and writes it too, but in an
order of its own, and it does not show that one tensor lies right behind another, so that both can be taken as one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
TYPES = FLOATS | INTEGERS | {"BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in TYPES.items()}
MOST_HEADER = 100_000_000  # bytes, as in the library
MOST_DIMENSIONS = 8
ALIGNMENT = 64


def write(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write `tensors` in their order, as `dtype` where it is given; no more than one of them is copied at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know that
    end = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        start, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            content = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().flatten()
            if content.numel():
                file.write(content.view(torch.uint8).numpy().data)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name: views of the file itself, of which nothing is read before it is used.

    Raises ValueError for a file that is damaged, or whose header says what its bytes do not hold.
    """
    size = path.stat().st_size
    try:
        places, begin = _places(path, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file ({error or type(error).__name__})") from error
    content = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(path), False, size))
    found = {}
    for name, (dtype, shape, start, end) in places.items():
        part = content[begin + start : begin + end]
        if (begin + start) % dtype.itemsize:  # the format does not forbid it
            part = part.clone()
        found[name] = part.view(dtype).view(shape)
    return found


Place = tuple[torch.dtype, list[int], int, int]  # its bytes are those from one number, of the first tensor's first on


def _places(path: Path, size: int) -> tuple[dict[str, Place], int]:
    """Where each tensor is, and the place of the first."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ValueError(f"a header of {length:,} bytes does not fit into it")
        header = json.loads(file.read(length))
    places = {name: _place(name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, (_, _, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(f"{name!r} begins at {start:,}, where {end:,} is due")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors have {end:,} bytes, and it {size - 8 - length:,} of them")
    return places, 8 + length


def _place(name: str, entry: dict[str, Any]) -> Place:
    if entry["dtype"] not in TYPES:
        raise ValueError(f"{name!r} is of type {entry['dtype']!r}, which is none of {', '.join(TYPES)}")
    dtype, shape, (start, end) = TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if len(shape) > MOST_DIMENSIONS or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name!r} has the shape {str(shape)[:80]} at {str([start, end])[:80]}")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{name!r} has the shape {shape} of {entry['dtype']}, and {end - start:,} bytes")
    return dtype, shape, start, end


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`parts` on top of each other: in their place where they lie so, as in a file that was written so, else a copy."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        follows = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and (part.dtype, part.shape[1:], part.storage_offset()) == (first.dtype, first.shape[1:], end)
            and part.is_contiguous()
        )
        if not follows:
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
