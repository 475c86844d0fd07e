"""Integer ops: which operators have integer kernels, which arguments they multiply, which pass values on.

IntegerLayer is what is said of a layer that has one. What is chosen among them in a graph: integer_edges.py.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import fx

from tersor.model.graph import arguments, floating, op_name, value, values

CONVS = ("conv1d", "conv2d", "conv3d")
WEIGHTED = (
    *CONVS, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul", "addmm",
    "baddbmm", "attention",
)  # fmt: skip
PRODUCTS = {"linear": 1, "matmul": 1, "addmm": 2}  # what dynamic grids are for: which argument is the weight
LSTM = "lstm"
RECURRENT = ("gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
# Of `mean` only means over all positions, as in a pool: joined().
POOLS = (*(f"{kind}{n}d" for kind in ("avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)), "mean")
JOINS = ("add", "mul", "cat", *POOLS)
PAIRS = ("matmul", "baddbmm", "attention")  # what can multiply two activations
CLIPS = ("relu", "hardtanh", "clamp")
PASSED = ("max_pool1d", "max_pool2d", "max_pool3d")  # edges whose values are some of those that they read
# Operators without an edge of their own, that move values and do not change them.
MOVES = {
    "view", "view_as", "reshape", "reshape_as", "_unsafe_view", "flatten", "unflatten", "permute",
    "transpose", "t", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach", "slice", "select",
    "narrow", "expand", "expand_as", "repeat", "chunk", "split", "split_with_sizes", "unbind", "getitem",
    "roll", "pad", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "movedim",
    "swapaxes", "index_select", "to", "_to_copy", "type_as",
    *(f"{kind}dropout{place}" for kind in ("", "feature_", "alpha_") for place in ("", "_")),
}  # fmt: skip
MULTIPLIED = ("weight", "self", "mat2", "other")  # the arguments of an operator that are its weight
# The argument that is its bias, where it is not "bias".
BIASES = {"addmm": "self", "baddbmm": "self"}
# Which arguments are activations, where it is not the first.
ACTIVATIONS = {"matmul": (0, 2), "addmm": (1, 2), "baddbmm": (1, 3), "attention": (0, 3)}


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer that computes with integers: its tensors by name, and the edge that it reads."""

    weight: str
    bias: str | None
    edge: str
    op: str  # "linear", "conv2d"
    read: str  # the edge as it reads it, in its own shape
    ndim: int  # of that
    source: str  # what it reads, in the graph: equal for layers that read the same
    alone: bool  # whether nothing else reads its bias
    direct: bool  # whether it reads its weight as that is stored, and not x @ w.t()


def joined(node: fx.Node, op: str | None) -> bool:
    """Whether an operator can be a join, by its name and arguments."""
    if op != "mean":
        return op in JOINS
    axes, source = arguments(node).get("dim"), node.args[0]
    ndim = value(source).ndim if isinstance(source, fx.Node) else 0
    return ndim > 2 and axes is not None and sorted(at % ndim for at in axes) == list(range(2, ndim))


def floats(node: fx.Node) -> bool:
    return any(map(floating, values(node)))


def why_no_kernel(node: fx.Node, tensors: Container[fx.Node]) -> str:
    """Why a recurrent operator computes in float with dynamic grids, too; "" if it does not, and for other
    operators. `tensors`: the model's own."""
    name = op_name(node)
    if name != LSTM:
        return f"{name} has no integer kernel" if name in RECURRENT else ""
    given = arguments(node)
    if "batch_sizes" in given:
        return "the integer kernel of lstm takes no packed sequences"
    each = 4 if given["has_biases"] else 2
    if len(given["params"]) != given["num_layers"] * (1 + given["bidirectional"]) * each:
        return "the integer kernel of lstm has no projections"
    return "" if all(item in tensors for item in given["params"]) else "the weights of its lstm are computed"
