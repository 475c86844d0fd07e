"""Rules: how each operator uses a parameter, in one table.

moves      the operator passes on the parameter or a part of it: the origins of its axes (axis_origins.py)
decides    the operator uses it: the role of the parameter (roles.py), by the argument that it is
An operator without a rule makes a parameter "unknown" if it depends on an input of the model. If not, it
passes the parameter on, and the labels are blurred if the shape changes. Further knowledge about operators
belongs in this table too, as a field of Rule.
"""

from __future__ import annotations

from torch import fx

from tersor.model import axis_rules
from tersor.model.axis_origins import Dim, axes_of
from tersor.model.graph import op_name
from tersor.model.parameter_use import Decides, Moves, Role, Rule, Use


def single(dim: Dim) -> int | None:
    """The only axis of the parameter that a dimension holds; None if it holds several or none."""
    axes = axes_of(dim)
    return next(iter(axes)) if len(axes) == 1 else None


def product(use: Use, out: int, contracted: int, word: str = "matrix", groups: int = 1) -> Role:
    """The role of a factor of a product: its dimension `contracted` is summed over, `out` stays."""
    labels = use.labels
    if len(labels) < max(-out, -contracted, out + 1, contracted + 1):
        return (
            Role("unknown", why=f"{use.name} with a vector") if use.long > 1 else Role("bias", why=use.name)
        )
    inside, outside = axes_of(labels[contracted]), axes_of(labels[out])
    if not inside and len(outside) <= 1:
        return Role("scale", why=use.name)  # constant along the inputs, so a factor of the weight
    along = single(labels[contracted])
    rows = single(labels[out])
    if rows is None and not outside and len(use.parameter) == 2 and along is not None:
        rows = 1 - along
    if along is None or rows is None or along == rows:
        return Role("unknown", why=f"{use.name} with mixed axes")
    return Role(word, rows, along, groups, use.name)


def added(use: Use) -> Role:
    return Role("mask" if use.boolean else "position" if use.long > 1 else "bias", why=use.name)


def learned_input(use: Use) -> Role:
    """The role of a learned input: a query, a class token."""
    return Role("mask" if use.boolean else "position", why=use.name)


def linear(use: Use) -> Role:
    if use.slot == "weight":
        return product(use, -2, -1)
    return Role("bias", why=use.name) if use.slot == "bias" else learned_input(use)


def matmul(use: Use) -> Role:
    """mm, bmm, matmul, addmm and the like: left [..., O, I], right [..., I, O]."""
    if use.slot in ("other", "mat2", "batch2", "vec"):
        return product(use, -1, -2)
    if use.slot in ("mat1", "batch1") or "add" not in use.name:
        return product(use, -2, -1)
    return added(use)


def einsum(use: Use) -> Role:
    left, _, result = str(use.arg("equation")).replace(" ", "").partition("->")
    words = left.split(",")
    letters = words.pop(int(use.slot.partition(".")[2] or 0))
    if "." in letters or not result or len(letters) != len(use.labels):
        return Role("unknown", why=f"einsum {use.arg('equation')}")
    others = set("".join(words))
    contracted = [at for at, letter in enumerate(letters) if letter not in result and letter in others]
    outs = [at for at, letter in enumerate(letters) if letter in result and letter not in others]
    if len(contracted) != 1 or not outs:
        return Role("unknown", why=f"einsum {use.arg('equation')}")
    found = [product(use, out, contracted[0]) for out in outs]
    # With several axes of outputs, take the one for which Site.contracted is the contracted axis.
    fit = [role for role in found if role.contracted == last_but(role.axis, len(use.parameter))]
    return (fit or [Role("unknown", why=f"einsum {use.arg('equation')}")])[-1]


def last_but(axis: int, axes: int) -> int | None:
    """The last of the axes other than this one."""
    return next((at for at in reversed(range(axes)) if at != axis), None)


def convolution(use: Use) -> Role:
    if use.slot == "bias":
        return Role("bias", why=use.name)
    if use.slot != "weight":
        return learned_input(use)
    turned = "transpose" in use.name or bool(use.arg("transposed", False))
    return product(use, *((1, 0) if turned else (0, 1)), "convolution", int(use.arg("groups", 1)))


def normalized(use: Use) -> Role | None:
    if use.slot in ("weight", "running_var"):
        return Role("scale", why=use.name)
    if use.slot in ("bias", "running_mean"):
        return Role("bias", why=use.name)
    return None if use.constant else learned_input(use)


def prelu(use: Use) -> Role | None:
    return Role("scale", why=use.name) if use.slot == "weight" else None


def recurrent(use: Use) -> Role:
    """Arguments other than the input and the state: weights [gates * H, I], biases."""
    head = use.slot.partition(".")[0]
    if head in ("input", "hx", "data", "batch_sizes"):
        return learned_input(use)
    if len(use.labels) == 1:
        return Role("bias", why=use.name)
    return product(use, 0, 1, "recurrent")


def attention(use: Use) -> Role | None:
    return added(use) if use.slot == "attn_mask" else None if use.constant else learned_input(use)


def table(use: Use) -> Role | None:
    """Rows that are looked up. With constant indices it is no table: they depend on positions, not data."""
    if use.slot not in ("weight", "self"):
        return Role("unknown", why=f"indices of {use.name}")
    if use.constant:
        return None
    at = use.dim() if use.name in ("index_select", "gather") else 0
    if use.name == "index":
        indices = use.arg("indices") or []
        at = next((n for n, index in enumerate(indices) if isinstance(index, fx.Node)), 0)
    rows = single(use.labels[at]) if use.labels else None
    if rows is None:
        return Role("unknown", why=f"{use.name} with mixed axes")
    return Role("table", rows, last_but(rows, len(use.parameter)), why=use.name)


def additions(use: Use) -> Role | None:
    return None if use.constant else added(use)


def multiplies(use: Use) -> Role | None:
    """An elementwise product. Followed by a sum it is a matrix product by hand, which is not recognized."""
    if use.constant:
        return None
    if use.long > 1 and any(op_name(user) in ("sum", "mean") for user in use.node.users):
        return Role("unknown", why=f"{use.name}, then a sum")
    return Role("mask" if use.boolean else "scale", why=use.name)


def chosen(use: Use) -> Role | None:
    """where, masked_fill: the condition is a mask, the values are learned inputs."""
    if use.slot in ("condition", "mask"):
        return Role("mask", why=use.name)
    return None if use.constant else learned_input(use)


def concatenated(use: Use) -> Role | None:
    return None if use.constant else learned_input(use)


def rules(names: str, move: Moves | None = None, decides: Decides | None = None) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), Rule(move, decides))


RULES: dict[str, Rule] = {
    **rules("linear", decides=linear),
    **rules("matmul mm bmm mv dot addmm baddbmm addbmm addmv", decides=matmul),
    **rules("einsum", decides=einsum),
    **rules("conv1d conv2d conv3d convolution", decides=convolution),
    **rules("conv_transpose1d conv_transpose2d conv_transpose3d", decides=convolution),
    **rules("embedding index index_select gather", axis_rules.looked_up, table),
    **rules("embedding_bag _embedding_bag", decides=table),
    **rules("layer_norm batch_norm group_norm instance_norm rms_norm", axis_rules.same, normalized),
    **rules("prelu", decides=prelu),
    **rules("lstm gru rnn_tanh rnn_relu", decides=recurrent),
    **rules("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", decides=recurrent),
    **rules("scaled_dot_product_attention", decides=attention),
    **rules("add sub rsub", axis_rules.same, additions),
    **rules("mul div pow maximum minimum addcmul addcdiv lerp", axis_rules.same, multiplies),
    **rules("where masked_fill", axis_rules.same, chosen),
    **rules("cat", axis_rules.resized, concatenated),
    **rules("stack", axis_rules.stack, concatenated),
    **rules("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as", axis_rules.view),
    **rules("_unsafe_view", axis_rules.view),
    **rules("permute", axis_rules.permute),
    **rules("transpose swapaxes swapdims t mT adjoint", axis_rules.transpose),
    **rules("numpy_T", axis_rules.reverse),
    **rules("movedim moveaxis", axis_rules.movedim),
    **rules("select", axis_rules.select),
    **rules("slice narrow flip roll pad constant_pad_nd repeat tile", axis_rules.resized),
    **rules("split split_with_sizes chunk tensor_split", axis_rules.parts),
    **rules("unbind", axis_rules.unbind),
    **rules("expand expand_as broadcast_to", axis_rules.same),
    **rules("sum mean amax amin std var norm linalg_vector_norm logsumexp prod", axis_rules.reduced),
}  # fmt: skip
