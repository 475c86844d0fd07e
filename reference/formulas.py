"""Formulas: section 6 of docs/format.md, the decoding of each form in plain numpy."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from streams import decode


class BadFile(ValueError):
    """Not a .tersor file of format 1."""


class Array(NamedTuple):
    """A tensor. numpy has no bfloat16 and no 8-bit floats: their values are stored as unsigned integers."""

    dtype: str  # PyTorch's name of the dtype
    values: np.ndarray


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BadFile(otherwise)


DTYPES = {
    "BOOL": ("bool", "?"), "U8": ("uint8", "u1"), "I8": ("int8", "i1"), "U16": ("uint16", "<u2"),
    "I16": ("int16", "<i2"), "U32": ("uint32", "<u4"), "I32": ("int32", "<i4"), "U64": ("uint64", "<u8"),
    "I64": ("int64", "<i8"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"),
    "F32": ("float32", "<f4"), "F64": ("float64", "<f8"), "F8_E4M3": ("float8_e4m3fn", "u1"),
    "F8_E5M2": ("float8_e5m2", "u1"), "C64": ("complex64", "<c8"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "u1"), "F8_E5M2FNUZ": ("float8_e5m2fnuz", "u1"),
    "F8_E8M0": ("float8_e8m0fnu", "u1"),
}  # fmt: skip
NUMPY = dict(DTYPES.values())  # "float32" -> "<f4"
CODED = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
)  # fmt: skip


CHILDREN: dict[str, dict[str, bool]] = {  # children in order, and whether each is aligned with its parent
    "dense": {}, "coded": {}, "masked": {"keep": True, "body": True},
    "affine": {"codes": True, "scale": False, "zero": False, "member": False},
    "codebook": {"index": True, "book": False, "scale": False},
    "loggrid": {"codes": True, "scale": False, "member": False}, "lowrank": {"left": False, "right": False},
    "sum": {"a": True, "b": True}, "grid": {"scale": False, "zero": False},
}  # fmt: skip
OPTIONAL = {
    ("affine", "zero"), ("affine", "member"), ("loggrid", "member"), ("codebook", "scale"), ("grid", "zero"),
    ("grid", "scale"),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # settings and their defaults
    "dense": {}, "coded": {"pack": False, "kept": False, "turned": False, "coder": "max"}, "masked": {},
    "affine": {"bits": 8, "group": 0, "axis": 0, "runs": []}, "codebook": {"axis": 0},
    "loggrid": {"bits": 4, "terms": 1, "group": 0, "axis": 0, "runs": []}, "lowrank": {}, "sum": {},
    "grid": {"bits": 8, "signed": False, "axis": 1, "stale": False},
}  # fmt: skip
BY_NAME = {
    "keep": "bool", "index": "uint8", "codes": "int8", "zero": "int16", "scale": "float32", "book": "float32",
    "member": "uint8",
}  # fmt: skip


class Node(NamedTuple):
    form: str
    settings: dict[str, Any]
    children: dict[str, Node]
    leaf: Array | None  # the array of a dense node, the streams of a coded node


FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")


def widened(x: Array) -> np.ndarray:
    """Floats that numpy can compute with: bfloat16 and float16 as float32, which is exact."""
    if x.dtype == "bfloat16":
        return (x.values.astype("<u4") << 16).view("<f4")
    return x.values.astype("<f4") if x.dtype == "float16" else x.values


def rounded(x: np.ndarray, dtype: str) -> Array:
    """Round to `dtype`, to nearest, ties to even. 16-bit floats are rounded to float32 first."""
    with np.errstate(over="ignore"):
        if dtype in ("float16", "bfloat16"):
            x = x.astype("<f4")
        if dtype != "bfloat16":
            return Array(dtype, x.astype(NUMPY[dtype]))
    bits = x.view("<u4")
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return Array(dtype, np.where(np.isnan(x), 0x7FC0, nearest).astype("<u2"))


def operate(operation: Any, a: Array, b: Array) -> Array:
    """One operation on floats, rounded to the wider of their two dtypes."""
    dtype = wider(a.dtype, b.dtype)
    wide = "float64" if dtype == "float64" else "float32"
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(operation(widened(a).astype(NUMPY[wide]), widened(b).astype(NUMPY[wide])), dtype)


def wider(a: str, b: str) -> str:
    if a == b:
        return a
    return "float64" if "float64" in (a, b) else "float32"


def rows_of(x: Array, axis: int) -> Array:
    """The array as a matrix [O, I], where O is the given axis."""
    if x.values.ndim <= 1:
        return Array(x.dtype, x.values.reshape(1, -1))
    check(axis < x.values.ndim, "bad axis")
    moved = np.moveaxis(x.values, axis, 0)
    return Array(x.dtype, moved.reshape(moved.shape[0], math.prod(moved.shape[1:])))


def from_rows(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    if len(shape) <= 1:
        return Array(rows.dtype, rows.values.reshape(shape))
    order = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return Array(rows.dtype, np.moveaxis(rows.values.reshape(order), 0, axis))


def spread(table: Array, shape: tuple[int, ...], group: int, member: np.ndarray | None = None) -> Array:
    """Expand a table [1, 1], [O, 1] or [O, G] to the elements of [O, I]. member: see member_of."""
    rows, columns = shape
    if member is not None and table.values.shape not in ((1, 1), (rows, 1)):
        check(table.values.ndim == 2 and len(table.values) == rows, "a table of the wrong shape")
        return Array(table.dtype, table.values[:, member])
    allowed = {(1, 1), (rows, 1)} | ({(rows, -(-columns // group))} if group else set())
    check(table.values.shape in allowed, "a table of the wrong shape")
    at = np.arange(columns) // max(group, 1) if table.values.shape[1] != 1 else np.zeros(columns, int)
    return Array(table.dtype, np.broadcast_to(table.values[:, at], shape))


def member_of(s: dict[str, Any], child: dict[str, Array], columns: int) -> np.ndarray | None:
    """The group of each column, if the groups have unequal sizes."""
    check(child["scale"].values.ndim == 2, "a scale must be a matrix")
    given = (s["group"] > 0) + bool(s["runs"]) + ("member" in child)
    check(given <= 1, "groups are given in two ways")
    if s["runs"]:
        check(min(s["runs"]) >= 1 and sum(s["runs"]) == columns, "the runs do not add up to a row")
        check(
            child["scale"].values.shape[-1] in (1, len(s["runs"])), "not one run for each column of the scale"
        )
        return np.repeat(np.arange(len(s["runs"])), s["runs"])
    if "member" not in child:
        return None
    member = child["member"]
    fine = member.dtype in ("uint8", "int16", "int32") and member.values.shape == (columns,)
    check(fine and (not columns or member.values.min() >= 0), "member: not one group for each column")
    check(not columns or member.values.max() < child["scale"].values.shape[1], "member: no such group")
    return member.values.astype(int)


def decoded(node: Node, keep: np.ndarray | None = None) -> Array:
    """Decode a node. `keep` is the mask above, if this node is aligned with it."""
    child = {}
    for key, inner in node.children.items():
        below = keep if CHILDREN[node.form][key] else None
        if node.form == "masked":
            below = None
            if key == "body":
                mask = child["keep"]
                check(mask.dtype == "bool", "a mask must be bool")
                check(keep is None or keep.shape == mask.values.shape, "a mask of another shape")
                below = mask.values if keep is None else mask.values & keep
        child[key] = decoded(inner, below)
    return FORMS[node.form](node, child, keep)


def coded(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    s, dtype = node.settings, np.dtype(NUMPY[node.settings["dtype"]])
    size, planes = tuple(s["size"]), s["planes"]
    check(len(planes) == dtype.itemsize, "the number of streams does not fit the dtype")
    check(not s["pack"] or s["dtype"] == "bool", "only bool can be packed")
    check(not s["turned"] or "float" in s["dtype"], "only floats can be turned")
    check(not s["kept"] or (keep is not None and keep.shape == size), "no mask above")
    count = int(keep.sum()) if s["kept"] else math.prod(size)
    columns, mask = math.prod(size[1:]) if len(size) > 1 else 0, keep.ravel() if s["kept"] else None
    if s["pack"]:
        packed = decode(node.leaf.values.tobytes(), -(-count // 8))
        symbols = [np.unpackbits(packed, count=count)]
    else:
        ends = [sum(planes[:k]) for k in range(len(planes) + 1)]
        streams = [node.leaf.values[a:b].tobytes() for a, b in pairwise(ends)]
        symbols = [decode(stream, count, columns, mask) for stream in streams]
    if s["dtype"] == "bool":
        elements = symbols[0] != 0
    else:
        elements = np.stack(symbols, axis=1).reshape(-1)
        if s["turned"]:
            word = elements.view(f"<u{dtype.itemsize}")
            elements = word >> 1 | word << 8 * dtype.itemsize - 1
        elements = elements.view(dtype)
    if not s["kept"]:
        return Array(s["dtype"], elements.reshape(size))
    values = np.zeros(size, dtype)
    values[keep] = elements
    return Array(s["dtype"], values)


def masked(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    mask, body = child["keep"], child["body"]
    check(mask.values.shape == body.values.shape, "mask and body differ in shape")
    below = mask.values if keep is None else mask.values & keep
    return Array(body.dtype, np.where(below, body.values, body.values.dtype.type(0)))


def affine(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    codes, scale, s = child["codes"], child["scale"], node.settings
    check(codes.dtype in ("int8", "int16") and scale.dtype in FLOATS and 1 <= s["bits"] <= 16, "affine")
    rows = rows_of(codes, s["axis"])
    steps = rounded(rows.values, scale.dtype)
    member = member_of(s, child, rows.values.shape[1])
    if "zero" in child:
        zero = child["zero"]
        check(zero.dtype in INTEGERS and zero.values.shape == scale.values.shape, "affine: zero")
        shift = spread(rounded(zero.values, scale.dtype), rows.values.shape, s["group"], member)
        steps = operate(np.subtract, steps, shift)
    w = operate(np.multiply, steps, spread(scale, rows.values.shape, s["group"], member))
    return from_rows(w, codes.values.shape, s["axis"])


def codebook(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    index, book, s = child["index"], child["book"], node.settings
    check(index.dtype in ("uint8", "int16") and book.dtype in FLOATS, "codebook")
    rows = rows_of(index, s["axis"]).values.astype(int)
    check(book.values.ndim in (1, 2) and book.values.shape[-1] >= 1, "codebook: a table without entries")
    check(book.values.ndim == 1 or len(book.values) == len(rows), "codebook: not one table for each row")
    check(
        not rows.size or 0 <= rows.min() <= rows.max() < book.values.shape[-1],
        "codebook: an index outside of the table",
    )
    values = book.values[rows] if book.values.ndim == 1 else np.take_along_axis(book.values, rows, 1)
    w = Array(book.dtype, values)
    if "scale" in child:
        check(child["scale"].dtype in FLOATS, "codebook: scale")
        w = operate(np.multiply, w, spread(child["scale"], rows.shape, 0))
    return from_rows(w, index.values.shape, s["axis"])


def loggrid(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    codes, scale, s = child["codes"], child["scale"], node.settings
    check(codes.dtype == "int8" and scale.dtype in FLOATS, "loggrid")
    check(2 <= s["bits"] <= 8 and s["terms"] in (1, 2), "loggrid: bits or terms")
    rows, levels = rows_of(codes, s["axis"]).values.astype(int), levels_of(s["bits"], s["terms"])
    check(not rows.size or np.abs(rows).max() < len(levels), "loggrid: a code outside of the levels")
    signed = rounded(np.sign(rows) * levels[np.abs(rows)], "float32")
    steps = spread(scale, rows.shape, s["group"], member_of(s, child, rows.shape[1]))
    w = operate(np.multiply, rounded(signed.values, scale.dtype), steps)
    return from_rows(w, codes.values.shape, s["axis"])


def levels_of(bits: int, terms: int) -> np.ndarray:
    if terms == 1:
        levels = [0.0] + [2.0**-e for e in range(2 ** (bits - 1) - 2, -1, -1)]
    else:
        room = {"A": 2 ** (bits // 2) - 1, "B": 2 ** ((bits - 1) // 2) - 1}
        turns = "AAB" if room["A"] > room["B"] else "AB"
        powers: dict[str, list[float]] = {"A": [0.0], "B": [0.0]}
        for e in range(room["A"] + room["B"]):
            powers[turns[e % len(turns)]].append(2.0**-e)
        sums = sorted(p + q for p in powers["A"] for q in powers["B"])
        levels = [value / sums[-1] for value in sums]
    return np.array(levels).astype("<f4")


def lowrank(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    left, right = child["left"], child["right"]
    check(left.dtype == right.dtype and left.dtype in FLOATS, "lowrank: dtypes")
    check(left.values.ndim == 2 and right.values.ndim >= 1, "lowrank: shapes")
    check(left.values.shape[1] == right.values.shape[0], "lowrank: ranks")
    return rounded(np.tensordot(widened(left).astype("<f8"), widened(right).astype("<f8"), 1), left.dtype)


def total(node: Node, child: dict[str, Array], keep: np.ndarray | None) -> Array:
    a, b = child["a"], child["b"]
    check(a.dtype in FLOATS and b.dtype in FLOATS and a.values.shape == b.values.shape, "sum")
    return operate(np.add, a, b)


FORMS = {
    "dense": lambda node, child, keep: node.leaf, "coded": coded, "masked": masked, "affine": affine,
    "codebook": codebook, "loggrid": loggrid, "lowrank": lowrank, "sum": total,
}  # fmt: skip


def check_grid(node: Node) -> None:
    """Refuse an invalid grid of an edge."""
    s = node.settings
    check(
        all(child.form in ("dense", "coded") for child in node.children.values()), "grid: only leaves allowed"
    )
    child = {key: decoded(inner) for key, inner in node.children.items()}
    if "scale" not in child:
        check(not child and s == SETTINGS["grid"] | {"stale": s["stale"]}, "grid: a dynamic one has 8 bits")
        return
    scale = child["scale"]
    check(scale.dtype == "float32" and scale.values.ndim == 1 and scale.values.size > 0, "grid: scale")
    check(bool(np.isfinite(scale.values).all() and (scale.values > 0).all()), "grid: a scale is not positive")
    check(1 <= s["bits"] <= 16, "grid: bits")
    if "zero" in child:
        zero = child["zero"]
        check(zero.dtype in INTEGERS and zero.values.shape == scale.values.shape, "grid: zero")
        low = -(2 ** (s["bits"] - 1)) if s["signed"] else 0
        fine = low <= int(zero.values.min()) and int(zero.values.max()) < low + 2 ** s["bits"]
        check(fine, "grid: a zero point is no code")
