"""Ops: the functions whose outputs are edges of the graph, and their names.

Only listed operators with floating outputs count: no views, casts or dropout, so that a name means the same
edge in a run (Python functions) and in an exported graph (ATen operators). All spellings of an operator share
a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

LISTED = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "matmul", "addmm", "baddbmm", "einsum", "attention", "add", "sub", "rsub",
    "mul", "div", "reciprocal", "cat", "stack", "where", "pow", "rsqrt", "mean", "sum", "relu",
    "hardtanh", "clamp", "leaky_relu", "elu", "silu", "hardswish", "hardsigmoid", "mish", "sigmoid",
    "tanh", "softplus", "glu", "gelu", "prelu", "softmax", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "interpolate", "layer_norm", "group_norm", "rms_norm", "batch_norm",
    "instance_norm", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell",
)  # fmt: skip

# What these read can be named, too: each multiplies its first arguments with weights or with each other.
READERS = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "addmm", "baddbmm", "attention",
)  # fmt: skip

# Keywords of their first arguments, in order: F.linear(input=x, weight=w), torch.mm(a, mat2=b).
KEYWORDS = (("input", "self", "vec"), ("weight", "other", "mat2"))
OWN_KEYWORDS = {  # of those that differ: addmm adds its first argument to a product
    "addmm": (("input",), ("mat1",), ("mat2",)),
    "baddbmm": (("input",), ("batch1",), ("batch2",)),
    "attention": (("query",), ("key",), ("value",)),
}

# Other spellings. A run calls relu6 what an exported graph may call hardtanh: both have one name here.
ALIASES = {
    "matmul": "mm bmm __matmul__ __rmatmul__",
    "hardtanh": "relu6",
    "clamp": "clip",
    "add": "__add__ __radd__ __iadd__",
    "sub": "subtract __sub__ __isub__",
    "rsub": "__rsub__",
    "mul": "multiply __mul__ __rmul__ __imul__",
    "div": "divide true_divide __truediv__ __itruediv__",
    "pow": "__pow__ __rpow__ __ipow__",
    "cat": "concat concatenate",
    "attention": "scaled_dot_product_attention",
    "max_pool1d": "max_pool1d_with_indices",
    "max_pool2d": "max_pool2d_with_indices",
    "max_pool3d": "max_pool3d_with_indices",
    "interpolate": "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
}

OPS: dict[str, str] = {name: name for name in LISTED if name != "interpolate"}
OPS |= {word: name for name, words in ALIASES.items() for word in words.split()}
WRITES = {f"{word}_": name for word, name in OPS.items() if not word.startswith("_")}  # in place
WRITES |= {word: name for word, name in OPS.items() if word.startswith("__i")}
OPS |= WRITES

# The place of the argument `inplace` of functions that have one.
INPLACE_AT = {
    "relu": 1, "relu6": 1, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1, "leaky_relu": 2, "elu": 2,
    "hardtanh": 3,
}  # fmt: skip


def op_of(func: Callable[..., Any]) -> str | None:
    """The name of this function's operator, or None if its outputs are not edges."""
    return OPS.get(name_of(func))


def name_of(func: Callable[..., Any]) -> str:
    """A function's name; of an operator of PyTorch without its overload: add for add.Tensor."""
    if isinstance(func, OpOverload):
        func = func.overloadpacket
    name: str = getattr(func, "__name__", "")
    return name


def place_of(op: str, keyword: str) -> int | None:
    """The place of an argument that one of READERS was given by keyword."""
    places = enumerate(OWN_KEYWORDS.get(op, KEYWORDS))
    return next((place for place, words in places if keyword in words), None)


def writes(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether this call writes its result to its first argument: x.relu_(), x += y, relu(x, inplace=True)."""
    name = name_of(func)
    if name in WRITES:
        return True
    at = INPLACE_AT.get(name)
    return at is not None and bool(kwargs.get("inplace", len(args) > at and args[at]))


def _never(*args: Any) -> bool:
    return False


def twin(func: Any) -> Callable[..., Any]:
    """A private copy of a Python function of torch that shows its inner calls to a function mode.

    Such a function calls the mode once for itself ("has_torch_function"), which hides the calls inside. The
    copy shares the code, but in its globals these checks return False, so it runs its body under the mode.
    """
    checks = {name: _never for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(
        func.__code__, func.__globals__ | checks, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# Python functions that are not listed themselves and call listed operators.
OPENED: dict[Any, Callable[..., Any]] = {
    func: twin(func)
    for func in (
        F.multi_head_attention_forward, F.normalize, F.interpolate, F.softmin, F.softsign, F.tanhshrink,
        F.gumbel_softmax, F.local_response_norm, F.lp_pool1d, F.lp_pool2d, F.lp_pool3d,
        Tensor.__rdiv__,
    )
}  # fmt: skip
