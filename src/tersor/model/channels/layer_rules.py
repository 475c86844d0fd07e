"""Layer rules: products, convolutions, norms, attention, recurrent layers.

conv      x[1] ~ w[1], result w[0] ~ bias; space and kernel are never cut
linear    x[-1] ~ w[1], result w[0] ~ bias          matmul    the contracted pair
norms     x[1] ~ weight, bias, statistics           LayerNorm and kin count the channels: flagged
grouped   tables x[1]; G, w[1] and w[0]; G, each    depthwise: the second axis has size 1, so edges remain
"""

from __future__ import annotations

import numpy as np

from tersor.model.channels.atoms import Array, Label, alive
from tersor.model.channels.call import Call, Labels, NoRuleError, elementwise, is_label, tensors
from tersor.model.channels.reshape import merged


def convolution(call: Call) -> Labels:
    atoms, w, bias = call.atoms, call.given["weight"], call.given.get("bias")
    turned = "transpose" in call.name or bool(call.given.get("transposed"))
    groups, space = int(call.given.get("groups", 1) or 1), len(w) - 2
    x = call.x if len(call.x) == len(w) else [atoms.dead("batch"), *call.x]
    atoms.freeze_all([x[2:]], f"{call.name} slides over it")
    atoms.freeze_all([w[2:]], "kernel")
    ins, outs = (w[0], w[1]) if turned else (w[1], w[0])
    if groups == 1:
        atoms.tie(x[1], ins)
    else:
        group = call.groups = atoms.fresh(groups)
        if turned:
            atoms.table(x[1], [group, atoms.fresh(len(x[1]) // groups)])
            atoms.tie(x[1], ins)
            outs = merged(atoms, [group, outs])
        else:
            atoms.table(x[1], [group, ins])
            atoms.table(outs, [group, atoms.fresh(len(outs) // groups)])
    if bias is not None:
        atoms.tie(bias[0], outs)
    result = [x[0], outs, *call.other(call.shape[-space:])]
    return result[-len(call.shape) :]


def linear(call: Call) -> Labels:
    w, bias = call.given["weight"], call.given.get("bias")
    call.atoms.tie(call.x[-1], w[-1])
    if len(w) == 1:
        return call.x[:-1]
    if bias is not None:
        call.atoms.tie(bias[0], w[0])
    return [*call.x[:-1], w[0]]


def product(call: Call) -> Labels:
    """matmul, mm, bmm, mv, dot."""
    a, b = tensors(list(call.given.values()))[:2]
    call.atoms.tie(a[-1], b[-2] if len(b) > 1 else b[-1])
    if len(a) > 1 and len(b) > 1:
        batch = elementwise(call.atoms, [a[:-2], b[:-2]], call.shape[:-2])
        return [*batch, a[-2], b[-1]]
    return [*a[:-1], *(b[:-2] + b[-1:] if len(b) > 1 else [])]


def added_product(call: Call) -> Labels:
    """addmm, baddbmm."""
    added, a, b = tensors(list(call.given.values()))[:3]
    call.atoms.tie(a[-1], b[-2])
    return elementwise(call.atoms, [[*a[:-1], b[-1]], added], call.shape)


def einsum(call: Call) -> Labels:
    left, arrow, right = str(call.given["equation"]).replace(" ", "").partition("->")
    words = left.split(",")
    found: dict[str, Array] = {}
    if not arrow or "." in left:
        raise NoRuleError(call.name)
    for label, word in zip(tensors(call.given["tensors"]), words, strict=True):
        for letter, array in zip(word, label, strict=True):
            known = found.get(letter)
            if known is None or len(known) == 1:
                found[letter] = array
            elif len(array) == len(known):
                call.atoms.tie(known, array)
                found[letter] = known if alive(known) else array
    return [found[letter] for letter in right]


def batch_norm(call: Call) -> Labels:
    for key in ("weight", "bias", "running_mean", "running_var"):
        if tensors(call.given.get(key)):
            call.atoms.tie(call.x[1], call.given[key][0])
    statistics = call.given.get("running_mean") is None or call.given.get("training") is True
    if "instance" in call.name or statistics:
        for array in [*call.x[2:], *([] if "instance" in call.name else call.x[:1])]:
            call.atoms.flag(array, f"{call.name} with statistics of the batch")
    return list(call.x)


def trailing_norm(call: Call) -> Labels:
    """layer_norm, rms_norm."""
    inside = call.x[-len(call.given["normalized_shape"]) :]
    for key in ("weight", "bias"):
        if tensors(call.given.get(key)):
            for array, own in zip(inside, call.given[key], strict=True):
                call.atoms.tie(array, own)
    for array in inside:
        call.atoms.flag(array, call.name)
    return list(call.x)


def group_norm(call: Call) -> Labels:
    channels, groups = call.x[1], int(call.given["num_groups"])
    for key in ("weight", "bias"):
        if tensors(call.given.get(key)):
            call.atoms.tie(channels, call.given[key][0])
    for array in call.x[2:]:
        call.atoms.flag(array, call.name)
    if groups == 1:
        call.atoms.flag(channels, call.name)
        return list(call.x)
    group, each = call.atoms.fresh(groups), call.atoms.fresh(len(channels) // groups)
    call.groups = group
    call.atoms.table(channels, [group, each])
    call.atoms.flag(each, call.name)
    return list(call.x)


def attention(call: Call) -> Labels:
    atoms, q, k, v = call.atoms, call.given["query"], call.given["key"], call.given["value"]
    mask = call.given.get("attn_mask")
    atoms.tie(q[-1], k[-1])
    atoms.tie(k[-2], v[-2])
    batch: Label = []
    for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True):
        if len(a) == len(b):
            batch += elementwise(atoms, [[a], [b], [c]], [len(a)])
        else:  # grouped queries
            atoms.tie(b, c)
            atoms.table(a, [b, atoms.fresh(len(a) // len(b))])
            batch.append(a)
    atoms.flag(k[-2], "softmax")
    if tensors(mask):
        scores = [*batch, q[-2], k[-2]]
        elementwise(atoms, [scores, *tensors(mask)], [len(array) for array in scores])
    return [*batch, q[-2], v[-1]]


def normalized(call: Call) -> Labels:
    """softmax and log_softmax."""
    call.atoms.flag(call.x[call.dim()], call.name)
    return list(call.x)


def embedding(call: Call) -> Labels:
    rows, width = call.given["weight"]
    call.atoms.freeze(rows, "rows are looked up")
    return [*call.given["indices"], width]


def reduced(call: Call) -> Labels:
    """sum drops a dimension; mean, maximum and kin count its elements. The larger of two tensors has none."""
    if "other" in call.given:
        return elementwise(call.atoms, tensors(list(call.given.values())), call.shape)
    gone = call.dims()
    if call.name not in ("sum", "linalg_vector_norm"):
        for d in gone:
            call.atoms.flag(call.x[d], call.name)
    kept = len(call.shape[0] if isinstance(call.shape, list) else call.shape) == len(call.x)
    one = call.atoms.dead("size 1")
    label = [one if d in gone else array for d, array in enumerate(call.x) if kept or d not in gone]
    return [label for _ in call.shape] if isinstance(call.shape, list) else label


def cumulative(call: Call) -> Labels:
    """cumsum, sort, roll along a dimension: the order of its indices counts."""
    for d in call.dims("dims" if "dims" in call.given else "dim"):
        call.atoms.freeze(call.x[d], call.name)
    return [list(call.x) for _ in call.shape] if isinstance(call.shape, list) else list(call.x)


def halved(call: Call) -> Labels:
    """glu: the first half times a function of the second."""
    at, found = call.dim(default=-1), list(call.x)
    first, second = np.split(call.x[at], 2)
    call.atoms.tie(first, second)
    found[at] = first
    return found


def slopes(call: Call) -> Labels:
    """prelu."""
    own = call.given["weight"][0]
    if len(own) > 1:
        call.atoms.tie(call.x[1], own)
    return list(call.x)


def weight_norm(call: Call) -> Labels:
    """v * g / |v|: the norm is over all other dimensions, so cutting one of those changes the weight."""
    v, g, at = call.given["v"], call.given["g"], call.dim()
    call.atoms.tie(v[at], g[at])
    for d, array in enumerate(v):
        if d != at:
            call.atoms.flag(array, "weight_norm")
    return [list(v), list(g)] if isinstance(call.shape, list) else list(v)


def recurrent(call: Call) -> Labels:
    """Gates are stacked; all layers of nn.LSTM and nn.GRU have one hidden size."""
    if "params" not in call.given or "batch_first" not in call.given:
        raise NoRuleError(call.name)
    atoms, weights = call.atoms, call.given["params"]
    states = [call.given["hx"]] if is_label(call.given["hx"]) else list(call.given["hx"])
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    biases, both = bool(call.given["has_biases"]), bool(call.given["bidirectional"])
    per, ways = (4 if biases else 2), (2 if both else 1)
    if len(weights) != per * ways * int(call.given["num_layers"]):
        raise NoRuleError(call.name)  # projected: a weight more in each cell
    hidden, inside = weights[1][1], call.x[-1]
    cells = [weights[k : k + per] for k in range(0, len(weights), per)]
    for layer in range(len(cells) // ways):
        for cell in cells[layer * ways : (layer + 1) * ways]:
            atoms.tie(inside, cell[0][1])
            atoms.tie(cell[1][1], hidden)
            for tensor in cell:
                atoms.tie(tensor[0], np.tile(hidden, gates))
        inside = np.concatenate([hidden] * ways)
    for state in states:
        atoms.freeze(state[0], "layers")
        atoms.tie(state[-1], hidden)
    first = call.x[0 if call.given["batch_first"] else 1]
    end = [atoms.dead("layers", call.shape[1][0]), first, hidden]
    return [[*call.x[:-1], inside], *([list(end)] * (len(call.shape) - 1))]
