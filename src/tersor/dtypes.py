"""Dtypes: how tensors of each dtype of PyTorch are treated. All other tables of dtypes follow from this one.

code      its word in a file's header, as in safetensors. A dtype without one cannot be stored: such a tensor
          is refused before anything is written, and the message names another way to store it
worked    steps rewrite weights of it, and training moves them; others are stored as they are, and noted
coded     entropy coders write it as streams; others stay plain
exported  it may be in a graph for a runtime; a model that computes with others is refused
A dtype that is not listed cannot be stored. tests/test_dtypes.py checks every dtype of the installed PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BYTES = "x.view(torch.uint8), its bytes"
PARTS = "torch.view_as_real(x), its parts as floats"
NUMBERS = "x.dequantize(), or its numbers and scales: x.int_repr(), x.q_scale()"


@dataclass(frozen=True)
class Dtype:
    """How tensors of one dtype are treated."""

    name: str  # "float32"
    code: str = ""  # "F32"; "": it cannot be stored
    worked: bool = False
    coded: bool = False
    exported: bool = True  # tensors of it may be in the graph that is written for ONNX Runtime
    way: str = ""  # what to store instead, if it cannot be stored

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.name)


ROWS = (
    Dtype("bool", "BOOL", coded=True),
    Dtype("uint8", "U8", coded=True),
    Dtype("int8", "I8", coded=True),
    Dtype("uint16", "U16"),
    Dtype("int16", "I16", coded=True),
    Dtype("uint32", "U32"),
    Dtype("int32", "I32", coded=True),
    Dtype("uint64", "U64"),
    Dtype("int64", "I64", coded=True),
    Dtype("float16", "F16", worked=True, coded=True),
    Dtype("bfloat16", "BF16", worked=True, coded=True),
    Dtype("float32", "F32", worked=True, coded=True),
    Dtype("float64", "F64", worked=True, coded=True),
    Dtype("float8_e4m3fn", "F8_E4M3"),
    Dtype("float8_e5m2", "F8_E5M2"),
    Dtype("complex64", "C64"),
    Dtype("float8_e4m3fnuz", "F8_E4M3FNUZ"),
    Dtype("float8_e5m2fnuz", "F8_E5M2FNUZ"),
    Dtype("float8_e8m0fnu", "F8_E8M0", exported=False),
    Dtype("float4_e2m1fn_x2", way=BYTES),
    *(Dtype(name, way=PARTS) for name in ("complex32", "bcomplex32", "complex128")),
    *(Dtype(name, way=BYTES) for name in ("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")),
    *(Dtype(f"{sign}int{bits}", way=BYTES) for sign in ("u", "") for bits in range(1, 8)),
    *(Dtype(name, way=NUMBERS) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")),
)

# An older PyTorch lacks some of them, and has no such tensors.
BY_NAME = {row.name: row for row in ROWS if isinstance(getattr(torch, row.name, None), torch.dtype)}
BY_DTYPE = {row.torch: row for row in BY_NAME.values()}

CODES = {row.torch: row.code for row in BY_NAME.values() if row.code}  # dtypes that files hold
NAMED = {row.name: row.torch for row in BY_NAME.values() if row.code}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FLOATS = tuple(row.torch for row in BY_NAME.values() if row.worked)  # dtypes of tables, scales and factors
INTEGERS = tuple(row.torch for row in BY_NAME.values() if row.coded and not row.worked and row.name != "bool")
CODED = {row.name: row.torch for row in BY_NAME.values() if row.coded}


def unsupported(dtype: torch.dtype) -> str:
    """Why this dtype cannot be stored, and what to store instead. Empty if it can be stored."""
    if dtype in CODES:
        return ""
    way = BY_DTYPE[dtype].way if dtype in BY_DTYPE else BYTES
    return f"a {dtype} tensor; a file holds {listed(CODES)}. Store {way}"


def unexported(tensors: Mapping[str, Tensor]) -> str:
    """The tensors that no exported graph can compute with, and what to do. Empty if there are none."""
    names = {
        name: value.dtype for name, value in tensors.items()
        if value.dtype in BY_DTYPE and not BY_DTYPE[value.dtype].exported
    }  # fmt: skip
    return "".join(f" {name} is {dtype}: give the model x.float()." for name, dtype in names.items())


def skip_reason(dtype: str, *, coders: bool = False) -> str:
    """The note on a tensor that a step, or an entropy coder, leaves alone because of its dtype."""
    reason = f"coders know {', '.join(CODED)}" if coders else f"steps work on {listed(FLOATS)}"
    return f"{dtype} is stored as it is: {reason}"


def listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def in_bytes(value: Tensor) -> Tensor:
    """The elements in row-major order as bytes, flat uint8; a view if no copy is needed."""
    flat = value.detach().contiguous().reshape(-1)
    # With fewer than two elements any stride counts as contiguous, and a view as bytes needs a stride of 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def as_numbers(value: Tensor) -> Tensor:
    """The tensor in a dtype that PyTorch can test for NaN and infinity; it cannot test floats of 8 bits."""
    return value.float() if value.dtype.is_floating_point and value.dtype.itemsize == 1 else value
