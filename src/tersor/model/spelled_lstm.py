"""Spelled LSTM: an LSTM step by step, so that what its matrices multiply can be rounded.

i, f, g, o = W r(x_t) + R r(h_t-1) + b + b'      r: rounded; both products are summed before the biases
c_t = sigmoid(f) c_t-1 + sigmoid(i) tanh(g)      h_t = sigmoid(o) tanh(c_t)       Hochreiter 1997, Gers 2000
A range of x is one of all its steps and samples; one of h is one of all samples at a step. A layer reads what
the layer before it gives, and both directions read the same.
Source: ONNX Runtime's kernel DynamicQuantizeLSTM, which computes so on one thread. On more it deals out the
samples, and each thread has ranges of its own of h.
Cost: a Python loop over the steps. Exported, it is one operator tersor::dynamic_lstm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import RefusedError
from tersor.maths.rounding import dynamic

ALL = "<all"  # after the name of the edge that an LSTM makes: all that it multiplies

State = tuple[Tensor, Tensor, Tensor]  # outputs [T, B, D H], the last h [L D, B, H], the last c; D directions


def spelled_lstm(  # noqa: PLR0917  the call of torch's function
    rounded: Callable[[Tensor], Tensor], input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor],
    has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
    batch_first: bool = False,
) -> State:  # fmt: skip
    """`rounded` is applied to all that matrices multiply. The rest is the call of torch.lstm."""
    refuse_packed(hx)
    (h, c), x = hx, input.transpose(0, 1) if batch_first else input
    ways, each = 1 + bidirectional, 4 if has_biases else 2
    last: list[list[Tensor]] = []
    for layer in range(num_layers):
        if layer:
            x = F.dropout(x, dropout, train)
        outputs = []
        for way in range(ways):
            at = layer * ways + way
            w, r, *biases = params[at * each : (at + 1) * each]
            y, *state = one_way(rounded, x, (h[at], c[at]), (w, r), biases, way == 1)
            last.append(state)
            outputs.append(y)
        x = torch.cat(outputs, -1) if ways > 1 else outputs[0]
    hs, cs = (torch.stack(each) for each in zip(*last, strict=True))
    return x.transpose(0, 1) if batch_first else x, hs, cs


def one_way(  # noqa: PLR0917
    rounded: Callable[[Tensor], Tensor], x: Tensor, state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor], biases: Sequence[Tensor], reverse: bool,
) -> State:  # fmt: skip
    """(the outputs [T, B, H], the last h [B, H], the last c) of one layer in one direction."""
    (h, c), (w, r) = state, weights
    bias = biases[0] + biases[1] if biases else None
    steps = list(F.linear(rounded(x), w))
    outputs: list[Tensor] = []
    for sums in reversed(steps) if reverse else steps:
        gates = sums + F.linear(rounded(h), r)
        i, f, g, o = (gates if bias is None else gates + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h, c


def marked_lstm(  # noqa: PLR0917  the call of torch's function
    input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool = False,
) -> State:  # fmt: skip
    """The call of torch.lstm as one operator of an exported graph, in eval mode: with dynamic grids."""
    refuse_packed(hx)
    found: State = torch.ops.tersor.dynamic_lstm(
        input, hx[0], hx[1], list(params), has_biases, num_layers, bidirectional, batch_first
    )
    return found


def refuse_packed(hx: Any) -> None:
    """RefusedError for the other call of torch.lstm, whose second argument are the sizes of packed steps."""
    if isinstance(hx, Tensor):
        raise RefusedError(
            "lstm: it reads packed sequences now, and its grid was found with padded ones; leave its weights "
            "in float, or give padded sequences"
        )


@torch.library.custom_op("tersor::dynamic_lstm", mutates_args=())
def dynamic_lstm(  # noqa: PLR0917  an operator has no keywords
    x: Tensor, h: Tensor, c: Tensor, params: Sequence[Tensor], biased: bool, layers: int, both: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An LSTM with dynamic grids on all that its matrices multiply, as one operator of an exported graph."""
    found = spelled_lstm(dynamic, x, (h, c), params, biased, layers, 0.0, False, both, batch_first)
    return found[0].contiguous(), found[1], found[2]


@dynamic_lstm.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, params: Sequence[Tensor], *settings: Any) -> Any:
    both = settings[2]
    y = x.new_empty((*x.shape[:2], h.shape[-1] * (1 + both)))
    return y, torch.empty_like(h), torch.empty_like(c)
